"""The 16-bit weights of a quantised module leave the GPU, and come back to the bit when something needs them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch


class Weights:
    """Parameters whose 8-bit copies are in use. While they are away their tensors keep shape, dtype and device, which compiled
    code checks at every call, but have no memory: nobody may read them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.away: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # key -> (parameter, copy on the CPU)
        self.released: list[torch.Tensor] = []
        self.borrowers = 0

    def release(self, parameters: Iterable[torch.Tensor]) -> None:
        """From now on these are away, and no others. A parameter that shares its memory with another tensor stays."""
        with self.lock:
            self._fetch()
            self.released = [p for p in parameters if p.is_cuda and p.untyped_storage().nbytes() == p.numel() * p.element_size()]
            if not self.borrowers:
                self._send()

    def _send(self) -> None:
        for p in self.released:
            if key(p) not in self.away:
                self.away[key(p)] = (p, p.detach().to("cpu", copy=True))
                p.untyped_storage().resize_(0)

    def _fetch(self) -> None:
        for p, copy in self.away.values():
            p.untyped_storage().resize_(copy.numel() * copy.element_size())
            p.data.copy_(copy)  # .data: not a change of the weight that a version counter should see
        self.away.clear()

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """The weights are on the GPU while the context is open."""
        with self.lock:
            self.borrowers += 1
            self._fetch()
        try:
            yield
        finally:
            with self.lock:
                self.borrowers -= 1
                if not self.borrowers:
                    self._send()

    def restore(self) -> None:
        """Bring them back for good."""
        with self.lock:
            self.released = []
            self._fetch()


def key(weight: torch.Tensor) -> int:
    """What stays the same for every tensor over one memory, also while the memory is given back."""
    return int(weight.untyped_storage()._cdata)

"""The one owner of where a 16-bit weight is: on its device, or in memory of the host that the GPU reads through the bus.

A weight whose 8-bit codes are in use may go to the host. Its tensor keeps shape, strides, dtype and device, which compiled code
checks at every call, and everybody may go on reading and writing it: a copy, a merge of an adapter, saving and moving are right
without knowing of it, only slower.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

CHUNK = 256 * 2**20  # bytes of host memory that are pinned at a time: torch rounds each up to a power of two
ALIGNMENT = 256
_LOCK = threading.RLock()
# parameter -> key of the host memory that it was sent to. Where the parameter has another memory now, somebody moved it
_SENT: Any = WeakIdKeyDictionary()
_BORROWED: Any = WeakIdKeyDictionary()  # parameter -> (how many need it on its device, its tensor in host memory)


def key(weight: torch.Tensor) -> int:
    """What is the same for every tensor over one memory."""
    return int(weight.untyped_storage()._cdata)


def away(parameter: torch.Tensor) -> bool:
    """Whether its values are in host memory."""
    return bool(_SENT.get(parameter) == key(parameter))


def can_leave(parameter: torch.Tensor) -> bool:
    """Whether this weight takes memory of a GPU that no other tensor shares."""
    return parameter.is_cuda and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def release(parameters: Iterable[torch.Tensor]) -> None:
    """Their values go to host memory, to the bit, and the GPU's is free. Those that cannot leave stay, and so do those that
    somebody borrows."""
    with _LOCK:
        leaving = [p for p in parameters if not away(p) and p not in _BORROWED and can_leave(p)]
        if not leaving:
            return
        homes = list(_host_tensors(leaving))
        for p, home in zip(leaving, homes, strict=True):
            home.copy_(p.detach())
        _finish(leaving)
        for p, home in zip(leaving, homes, strict=True):
            p.data = home
            _SENT[p] = key(p)


def restore(parameters: Iterable[torch.Tensor]) -> None:
    """Their values are in their device's own memory again."""
    with _LOCK:
        for p in [p for p in parameters if away(p)]:
            p.data = p.detach().clone(memory_format=torch.preserve_format)
            del _SENT[p]


@contextlib.contextmanager
def borrowed(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """While the context is open the values are in their device's own memory, where kernels read them fast. What is written
    meanwhile is kept."""
    wanted = list(parameters)
    with _LOCK:
        for p in wanted:
            if away(p):
                _BORROWED[p] = (0, p.data)
                p.data = p.detach().clone(memory_format=torch.preserve_format)
            if p in _BORROWED:
                count, home = _BORROWED[p]
                _BORROWED[p] = (count + 1, home)
        mine = [p for p in wanted if p in _BORROWED]
    try:
        yield
    finally:
        with _LOCK:
            back = []
            for p in mine:
                count, home = _BORROWED[p]
                _BORROWED[p] = (count - 1, home)
                if count == 1:
                    back.append((p, _BORROWED.pop(p)[1]))
            back = [(p, home) for p, home in back if _alike(p, home)]  # moved or converted meanwhile: no longer ours
            for p, home in back:
                home.copy_(p.detach())
            _finish([p for p, _ in back])
            for p, home in back:
                p.data = home
                _SENT[p] = key(p)


def _alike(p: torch.Tensor, home: torch.Tensor) -> bool:
    return (p.device, p.dtype, p.shape, p.stride()) == (home.device, home.dtype, home.shape, home.stride())


def _finish(parameters: Iterable[torch.Tensor]) -> None:
    """Wait for all kernels that may read the memory that is about to be given back, on whichever stream they run."""
    for device in {p.device for p in parameters if p.is_cuda}:
        torch.cuda.synchronize(device)


class _Mapped:
    """Pinned host memory as the GPU sees it: torch takes this for a tensor of the GPU and keeps the memory as long as any tensor
    over it lives. (Unified addressing: one pointer is valid on both sides.)"""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {"shape": tuple(host.shape), "typestr": "|u1", "version": 2,
                                         "data": (host.data_ptr(), False), "strides": None}


def _host_tensors(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """A tensor in host memory for each, of its shape, strides, dtype and device, with a storage of its own. Pinned memory is
    shared in chunks, each of which lives as long as the last tensor in it."""
    chunk, used, device = None, 0, None
    for p in parameters:
        size = p.numel() * p.element_size()
        if chunk is None or device != p.device or used + size > len(chunk):
            room = max(size, CHUNK) if p.is_cuda else size
            with torch.cuda.device_of(p):  # pinned memory belongs to the GPU that is current
                chunk, used, device = torch.empty(room, dtype=torch.uint8, pin_memory=p.is_cuda), 0, p.device
        part = _own_storage(chunk[used : used + size], p.device)
        used += -(-size // ALIGNMENT) * ALIGNMENT
        yield part.view(p.dtype).as_strided(p.shape, p.stride())


def _own_storage(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_Mapped(part), device=device) if device.type == "cuda" else part.clone()

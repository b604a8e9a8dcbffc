"""The constants that steps are built from, and whether they still are what they were.

Three ways to notice a change. A version counts what is written in place: it is looked at in every call. One value of each and its
address are looked at every few calls, as some write past the version, and offloading moves what a step reads.
"""

from __future__ import annotations

import ctypes
import math
import operator
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import weights

CHECKED = 18  # constants whose values a call may look at on average, of models with no more than five hundred
EVERY = 4  # calls from one look to the next, at most
PARTS = 7  # in which they are looked at, at most
_VERSION = operator.attrgetter("_version")


class Stamps:
    """What the constants of a module were when steps were built from them."""

    def __init__(self) -> None:
        self.known: Any = WeakIdKeyDictionary()  # constant -> (version, one value, dtype)

    def add(self, constants: Sequence[torch.Tensor]) -> None:
        """A step was built from what these are now."""
        new = [p for p in constants if p not in self.known]
        for p, value in zip(new, elements(new).tolist(), strict=True):
            self.known[p] = version(p), value, p.dtype

    def changed(self, constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Those that are not what a step was built from."""
        known = [p for p in constants if p in self.known]
        written = {id(p) for p in known if self.known[p][0] != version(p)}
        return [p for p in known if id(p) in written] + self.differing([p for p in known if id(p) not in written])

    def differing(self, constants: Sequence[torch.Tensor], values: Sequence[float] | None = None) -> list[torch.Tensor]:
        """Those of ``constants`` that have another value than a step was built from. values: their ``elements``."""
        values = elements(constants).tolist() if values is None else values
        return [p for p, value in zip(constants, values, strict=True)
                if (known := self.known.get(p, (0, value, None))[1]) != value and not (math.isnan(known) and math.isnan(value))]

    def alike(self, p: torch.Tensor) -> bool:
        """Whether the constant has the dtype that it had: another one makes it no constant that changes."""
        return p in self.known and bool(self.known[p][2] == p.dtype)

    def forget(self, ids: set[int]) -> None:
        """Nothing that was built stands for the constants with these ids any more."""
        for p in [p for p in self.known if id(p) in ids]:
            del self.known[p]


class Constants:
    """Those of one graph. Dynamo sees to it that sizes, strides and dtypes are the same in every call.

    They are looked at in parts, in turn, each of which has some of every region of the model: what changes many, as an adapter
    does that is swapped, is noticed by the next look, and what changes one after as many looks as there are parts.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], now: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        self.tensors = tuple(tensors)
        self.count(now)
        self.every = max(1, min(EVERY, len(self.tensors) // CHECKED))
        count = min(PARTS, math.ceil(len(self.tensors) / (CHECKED * self.every)))
        mixed = random.Random(0).sample(self.tensors, len(self.tensors))  # layers that repeat do not fall into one part
        self.parts = [Part(mixed[i::count]) for i in range(count)] if mixed else []

    def count(self, now: Mapping[torch.Tensor, torch.Tensor] | None) -> None:
        """now: constant -> the module's own tensor over its memory, see ``Buffers``, which is the one that is written."""
        self.now = [(p, now[p]) for p in self.tensors if p in now] if now else []
        replaced = {id(p): t for p, t in self.now}
        # inference tensors cannot be written, and count nothing
        self.counted = [replaced.get(id(p), p) for p in self.tensors if not p.is_inference()]
        self.accept()

    def follow(self, now: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """The same later: what was written before it is still to be noticed."""
        written = self.written()
        self.count(now)
        if written:
            self.version -= 1

    def _version(self) -> int:
        return sum(map(_VERSION, self.counted))

    def written(self) -> bool:
        """Whether one was written in place since ``accept``."""
        if self.version == self._version():
            return False
        for (p, now), version in zip(self.now, self.versions, strict=True):
            if now._version != version:
                torch.autograd.graph.increment_version(p)
        return True

    def accept(self) -> None:
        """A step was built from what they are now, or none is left."""
        self.version = self._version()
        self.versions = [now._version for _, now in self.now]

    def due(self, call: int) -> Part | None:
        """Those to be looked at in this call."""
        look, rest = divmod(call, self.every)
        return None if rest or not self.parts else self.parts[look % len(self.parts)]


def version(p: torch.Tensor) -> int:
    """Changes when the tensor is written in place. Inference tensors have none and cannot be written."""
    return 0 if p.is_inference() else p._version


@torch.no_grad()
def elements(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One value of each, from its middle: fp32 [tensors] on the device of the first; NaN for an empty one and for those
    elsewhere."""
    return _read(tensors, lambda t, middle: t.as_strided((1,), (1,), t.storage_offset() + middle))()


def _read(tensors: Sequence[torch.Tensor], scalar: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What reads ``elements``. scalar: (tensor, how far its middle element is from its first) -> the middle one, [1]."""
    if not tensors:
        return lambda: torch.empty(0)
    device = tensors[0].device
    found: dict[torch.dtype, tuple[list[int], list[torch.Tensor]]] = {}
    for i, t in enumerate(tensors):
        if t.device == device and t.numel():
            places, views = found.setdefault(t.dtype, ([], []))
            places.append(i)
            views.append(scalar(t, sum(n // 2 * s for n, s in zip(t.shape, t.stride(), strict=True))))
    parts = [views for _, views in found.values()]
    order = [i for places, _ in found.values() for i in places]
    indices = None if order == list(range(len(tensors))) else torch.tensor(order, dtype=torch.long, device=device)

    def read() -> torch.Tensor:
        values = torch.cat([torch.cat(views).float() for views in parts]) if parts else torch.empty(0, device=device)
        return values if indices is None else torch.full((len(tensors),), math.nan, device=device).index_copy_(0, indices, values)

    return read


class Part:
    """Constants whose elements are read time and again, which takes a tenth of the time while they stay where they are. It knows
    their addresses and keeps none of their memory: a module that is moved gives it back."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.plain = all(type(t) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in self.tensors)
        self.known: tuple[list[int], Callable[[], torch.Tensor] | None] = [], None
        self.same: list[float] | None = None  # elements that were what the steps were built from
        self.placed: tuple[Sequence[torch.Tensor], list[int] | None] = (), None  # what a step reads, addresses that were right

    def addresses(self) -> list[int] | None:
        """Where they are now; None where a tensor of a library's own class is among them, which may have none."""
        return list(map(torch.Tensor.data_ptr, self.tensors)) if self.plain else None

    @torch.no_grad()
    def elements(self, addresses: list[int] | None) -> torch.Tensor:
        """See ``elements``. addresses: theirs at this moment."""
        known, read = self.known
        if addresses is None:
            return elements(self.tensors)
        if addresses != known:  # offloading moves them at every call: what is made below would be made for nothing
            self.known = addresses, None
            return elements(self.tensors)
        if read is None:
            read = _read(self.tensors, _unowned)
            self.known = addresses, read
        return read()

    def differing(self, values: Sequence[float], stamps: Stamps) -> list[torch.Tensor]:
        """Those that have another value than a step was built from. values: their elements."""
        if values == self.same:
            return []
        changed = stamps.differing(self.tensors, values)
        if not changed:
            self.same = list(values)
        return changed

    def moved(self, reads: Sequence[torch.Tensor], read_from: Sequence[int], addresses: list[int] | None) -> list[torch.Tensor]:
        """Of the constants that a step ``reads`` those that are in other memory than it reads, of which ``read_from`` has the
        keys; none while the part's own ``addresses`` are those that were right."""
        if addresses is not None and reads is self.placed[0] and addresses == self.placed[1]:
            return []  # the step holds what it read from, so that nothing else is there
        moved = [p for p, memory in zip(reads, read_from, strict=True) if weights.key(p) != memory]
        if not moved:
            self.placed = reads, addresses
        return moved


def _unowned(t: torch.Tensor, middle: int) -> torch.Tensor:
    """The element of ``t`` that is ``middle`` after its first one, [1], over memory that it does not keep: to be read while
    ``t`` is where it is."""
    address, size = t.data_ptr() + middle * t.element_size(), t.element_size()
    if t.is_cuda:
        found = torch.as_tensor(_At(address, size), device=t.device)
    else:
        found = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    return found.view(t.dtype)


class _At:
    """Bytes of a GPU's memory, from which torch makes a tensor."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "version": 2, "data": (address, False),
                                         "strides": None}

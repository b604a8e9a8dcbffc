"""Buffers of a module that was moved: ``Module.to``, which offloading calls around every picture, gives a parameter other memory
and puts a new tensor in the place of a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Buffers:
    """The first tensor of each buffer that was met stands for those that take its place, in their memory: like a parameter that
    is moved.

    now: it -> the module's own tensor at the last call."""

    def __init__(self) -> None:
        self.first: dict[Any, torch.Tensor] = {}  # path, device and form -> the first tensor
        self.now: Any = WeakIdKeyDictionary()

    def first_of(self, tensors: Mapping[int, torch.Tensor], paths: Mapping[int, str],
                 ) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
        """(place -> the first tensor of its buffer, those of them whose values are others than before).

        tensors: buffers by place; paths: id of a buffer -> its path. One that has none stands for itself."""
        found, changed = dict(tensors), []
        for place, t in tensors.items():
            if id(t) not in paths or t.is_inference():  # whose memory cannot be replaced
                continue
            first = self.first.setdefault((paths[id(t)], t.device, t.dtype, t.shape, t.stride()), t)
            if t is not self.now.get(first, first):
                if not torch.equal(first, t):
                    changed.append(first)
                first.data = t.data
            if t is not first:
                self.now[first] = t
            found[place] = first
        return found, changed

    def of(self, paths: Mapping[int, str]) -> set[int]:
        """ids of the first tensors of the buffers at these paths."""
        present = set(paths.values())
        return {id(first) for (path, *_), first in self.first.items() if path in present}

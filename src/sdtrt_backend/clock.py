"""When a call of the denoiser begins, and at which timestep: told by whoever sees it, to all graphs below it."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import names
from .timesteps import TIMESTEP_NAMES, Candidates, Trajectories, timestep_value

# Calls without a timestep by name that are looked at before each call counts as a whole picture: where no small input changes
# at all, and where some do, but not as timesteps
LOOKED_AT, MOVING = 16, 1000


class Clock:
    """Tells ``begin`` once per call of the root its timestep, NaN where none is known.

    Three sources. Where the root's forward names a timestep, or the root itself is not compiled, the arguments of its call. Else
    the graph that receives the timestep. Else the first graph that is called. Where none of them has a name for it, small inputs
    are observed: the one that moves as timesteps do is taken for it. Until that is decided ``begin`` is told so, and afterwards
    ``again`` is given the trajectories of those calls, with the one that begins. failed: told of an error of any of this.
    """

    def __init__(self, begin: Callable[[float, bool], None], again: Callable[[Trajectories], None],
                 failed: Callable[[Exception], None]) -> None:
        self.begin, self.again, self.failed = begin, again, failed
        self.frame: int | None = None  # Dynamo's number of the piece of code whose graphs are the source
        self.by_name = False  # whether that source has a timestep by name
        self.running = threading.local()  # call: keyword arguments of the root's call that this thread was last seen in
        self.candidates = Candidates()
        self.first: dict[Any, float] = {}  # candidate -> its value in the first call
        self.moved = False  # a candidate had another value since
        self.whole_calls = False

    def inside(self, root: torch.nn.Module) -> bool:
        """A graph of the root is called; False where the root's own call does not tell the time."""
        call = names.call_of(root)
        if call is None:
            return False
        signature = names.call_signature(root)
        if signature.parameters.keys().isdisjoint(TIMESTEP_NAMES) and names.runs_compiled(root):
            return False
        args, keywords = call
        if getattr(self.running, "call", None) is not keywords:
            given = _given(signature, args, keywords)
            if given is None:
                return False
            self.running.call = keywords
            self.tell(_named(given), given)
        return True

    def stop(self) -> None:
        """Nobody waits for the time any more."""
        self.running = threading.local()

    def called(self, frame: int, timestep: Any, inputs: Mapping[Any, Any]) -> None:
        """A graph of the piece ``frame`` is called. timestep: its input of that name, or None; inputs: index -> value."""
        if self.frame is None or (timestep is not None and not self.by_name):
            self.frame, self.by_name = frame, timestep is not None
        if frame == self.frame:
            self.tell(timestep, inputs)

    def tell(self, timestep: Any, inputs: Mapping[Any, Any]) -> None:
        """A call of the root begins. Never raises: it is the user's call."""
        try:
            self._tell(timestep, inputs)
        except Exception as error:
            self.failed(error)

    def _tell(self, timestep: Any, inputs: Mapping[Any, Any]) -> None:
        if timestep is not None:
            self.begin(timestep_value(timestep), True)
            return
        small = {i: timestep_value(v) for i, v in inputs.items() if _may_be_a_timestep(v)}
        candidates = self.candidates
        if candidates.chosen is None and not self.whole_calls:
            candidates.observe(small)
            if candidates.chosen is not None:
                self.again(candidates.tracks[candidates.chosen])
                return
            self.moved |= any(self.first.setdefault(i, v) != v for i, v in small.items())
            self.whole_calls = not small or candidates.calls > (MOVING if self.moved else LOOKED_AT)
            if not self.whole_calls:
                self.begin(math.nan, False)
                return
        self.begin(math.nan if self.whole_calls else small.get(candidates.chosen, math.nan), True)


def timestep_of_call(root: torch.nn.Module) -> Any:
    """What the root was given for its timestep in the call that this thread is inside of, None where it was given none."""
    call = names.call_of(root)
    given = None if call is None else _given(names.call_signature(root), *call)
    return None if given is None else _named(given)


def _given(signature: inspect.Signature, args: Sequence[Any], keywords: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Arguments of a call by name. None where something wraps the module, and calls its forward with other ones."""
    try:
        return {**signature.bind_partial(*args, **keywords).arguments, **keywords}  # a forward may collect keywords
    except TypeError:
        return None


def _named(given: Mapping[str, Any]) -> Any:
    return next((given[n] for n in TIMESTEP_NAMES if n in given), None)


def _may_be_a_timestep(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() <= 1 and value.numel() > 0 and not value.is_meta
    return isinstance(value, int | float) and not isinstance(value, bool)

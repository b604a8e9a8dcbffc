"""The state machine behind a compiled module: calibrating -> building -> ready, or refused.

While calibrating, calls run the captured graph operation by operation, which gives the user's own numbers to the bit.
Of the threads that call a module one calibrates or builds, and in a process one builds; the others run unquantised meanwhile
and never wait.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .calibrate import Calibration, Observer
from .capture import Captured, concrete, tensor_inputs
from .drift import KEPT_BYTES, ZEROS, Drift, Later, Watch, peaks, trouble
from .errors import CalibrationError
from .graphs import Memory
from .measure import outputs
from .options import Options
from .recipe import Recipe
from .report import Report
from .timesteps import timestep_value
from .values import LayerReport
from .weights import key

log = logging.getLogger("sdtrt_backend")
CALIBRATING, BUILDING, READY, REFUSED = "calibrating", "building", "ready", "refused"
CHANGED = ("the weights were changed after the 8-bit step was built (a LoRA fused, a checkpoint loaded?): restore and accelerate "
           "again to quantise the new ones")
# held while a step is built, or compiled and first run: it is timed, and its CUDA graph is captured, while nothing of ours waits
# for the whole GPU, which would end the capture
BUILDING_ALONE = threading.RLock()
LOOKED_AT = 4  # weights that a watched call looks at, in turn: merging an adapter changes many, and counts no version


@dataclass(frozen=True)
class Built:
    """A step for one set of shapes: the callable on tensor inputs, or None with the reason why it is not used.

    replaced: the module's weights that the step holds in 8 bits and does not read; watch: what its drift is noticed by.
    """

    step: Callable[..., Any] | None
    refusal: str | None
    layers: tuple[LayerReport, ...] = ()
    error: float | None = None
    quantized_flops_share: float | None = None
    timings: dict[str, float] = field(default_factory=dict)
    replaced: tuple[torch.Tensor, ...] = ()
    notes: tuple[str, ...] = ()
    watch: Watch | None = None


class ModuleState:
    """What is known of one module under one set of options, shared by all its graphs and shapes."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.lock = threading.Lock()
        self.status = CALIBRATING
        self.calibration = Calibration()
        self.recipe: Recipe | None = None
        self.built: Built | None = None
        self.made: dict[Any, tuple[Built, Callable[..., Any]]] = {}  # (what a graph does, its inputs) -> what is used for it
        self.fallbacks: list[str] = []
        self.notes: list[str] = []
        self.memory = Memory()
        self.drift = Drift(lambda sentence: self.say(self.notes, sentence))
        self.unread: dict[int, torch.Tensor] | None = None  # weights that no step in use reads
        self.stamps: Any = WeakIdKeyDictionary()  # weight that is in use as codes -> (version, one element) when they were made
        self.needs_weights = False
        self.steps: weakref.WeakSet[Step] = weakref.WeakSet()

    def refuse(self, reason: str) -> None:
        """From now on the module runs in the user's precision; said once."""
        self.status = REFUSED
        self.memory.weights.restore()
        self.say(self.fallbacks, f"{reason}; the module runs in its own precision")

    def release(self, replaced: Iterable[torch.Tensor]) -> None:
        """The weights that every step in use holds in 8 bits may leave the GPU."""
        now = {key(w): w for w in replaced}
        self.unread = now if self.unread is None else {k: w for k, w in self.unread.items() if k in now}
        if self.options.weights == "release" and not self.needs_weights:
            self.memory.weights.release(self.unread.values())

    def keep_weights(self) -> None:
        """From now on they stay on the GPU: code that no state knows of reads them."""
        self.needs_weights = True
        self.memory.weights.restore()

    def say(self, where: list[str], sentence: str) -> None:
        if sentence not in where:
            where.append(sentence)
            log.warning("sd_%s: %s", self.options.precision, sentence)

    def report(self) -> Report:
        self.drift.look()
        built = self.built or Built(None, None)
        provenance = dict(self.recipe.provenance) if self.recipe else {}
        return Report(self.status, built.layers, tuple(self.fallbacks), tuple(self.notes), built.timings, built.error,
                      built.quantized_flops_share if self.status == READY else 0.0, provenance, self.drift.watched())


# weight -> options -> state; entries die with the weights
_STATES: Any = WeakIdKeyDictionary()


def state_of(captured: Captured, options: Options) -> ModuleState:
    """The module's state: graphs for other shapes of the same weights share it, so they never recalibrate."""
    weights = [captured.constants[i] for i in sorted(captured.constants)]
    for weight in weights:
        if options in _STATES.get(weight, {}):
            state: ModuleState = _STATES[weight][options]
            break
    else:
        state = ModuleState(options)
    for weight in weights:
        _STATES.setdefault(weight, {})[options] = state
    return state


def states(module: torch.nn.Module) -> list[ModuleState]:
    """Every state that the module's parameters belong to, oldest first."""
    found: dict[int, ModuleState] = {}
    for parameter in module.parameters():
        for state in _STATES.get(parameter, {}).values():
            found.setdefault(id(state), state)
    return list(found.values())


@contextlib.contextmanager
def borrowed(module: torch.nn.Module) -> Iterator[None]:
    """The module's weights are where they belong, also while an accelerated pipeline keeps them elsewhere."""
    with contextlib.ExitStack() as stack:
        for state in states(module):
            stack.enter_context(state.memory.weights.borrowed())
        yield


def forget(module: torch.nn.Module) -> None:
    """Drop the states of a module and what they hold: the next compilation starts anew."""
    for state in states(module):
        state.built = None
        state.made.clear()
        state.memory.codes.clear()
        for step in state.steps:  # Dynamo keeps them
            step.clear()
    for parameter in module.parameters():
        _STATES.pop(parameter, None)


class Step:
    """What Dynamo calls: one graph, any number of shapes.

    build: (captured, args, recipe, options, graph memory) -> Built; unquantized: (captured, args) -> callable on tensor inputs;
    sibling: args -> the Step of another module that Dynamo sends through this one, because its structure is the same.
    """

    def __init__(self, captured: Captured, state: ModuleState,
                 build: Callable[[Captured, Sequence[Any], Recipe, Options, Memory], Built],
                 unquantized: Callable[[Captured, Sequence[Any]], Callable[..., Any]],
                 sibling: Callable[[Sequence[Any]], Step]) -> None:
        self.captured, self.state = captured, state
        self.build, self.unquantized, self.sibling = build, unquantized, sibling
        state.steps.add(self)
        self.siblings: list[Step] = []
        self.variants: dict[Any, Callable[..., Any]] = {}
        self.watches: dict[Any, Watch] = {}
        self.fallback: dict[Any, Callable[..., Any]] = {}
        self.weights = list(captured.constants.values())
        self.weights_version = self._version()
        self.looked_at: list[torch.Tensor] = []  # weights that a step of this graph holds in 8 bits

    def clear(self) -> None:
        """Let go of every step that was built."""
        for built in (self.variants, self.watches, self.fallback):
            built.clear()

    def owns(self, args: Sequence[Any]) -> bool:
        """Whether ``args`` carry this step's own weights."""
        return all(args[i] is p for i, p in self.captured.constants.items())

    def __call__(self, *args: Any) -> Any:
        if not self.owns(args):
            if not any(s.owns(args) for s in self.siblings):
                self.siblings.append(self.sibling(args))
            return next(s for s in self.siblings if s.owns(args))(*args)
        sizes = shapes(self.captured, args)
        if self.state.drift.waiting:
            self.state.drift.look()
        if self.state.status != REFUSED and sizes in self.variants:
            if self._version() == self.weights_version:
                tensors = tensor_inputs(self.captured, args)
                result = self.variants[sizes](*tensors)
                return result if sizes not in self.watches else self._watched(self.watches[sizes], args, tensors, result)
            self.state.refuse(CHANGED)
        if self.state.status == REFUSED:
            return self._refused(sizes, args)
        if not self.state.lock.acquire(blocking=False):
            return self._own(args)
        try:
            if self.state.recipe is None:
                result = self._calibrate(args)
                if self.state.recipe is None:
                    return result
            if not BUILDING_ALONE.acquire(blocking=False):
                return self._own(args)
            try:
                with self.state.memory.weights.borrowed():
                    self._build(sizes, args)
                return self(*args)  # the first run, in which Inductor tunes what it compiled
            finally:
                BUILDING_ALONE.release()
        finally:
            self.state.lock.release()

    def _own(self, args: Sequence[Any]) -> Any:
        """The module's own result, operation by operation."""
        with self.state.memory.weights.borrowed():
            return self.captured.graph(*args)

    def _calibrate(self, args: Sequence[Any]) -> Any:
        """One observed call, or None when this call starts after the last calibrating trajectory."""
        state, calibration = self.state, self.state.calibration
        timestep = None if self.captured.timestep is None else args[self.captured.timestep]
        calibration.start_call(timestep_value(timestep))
        if calibration.trajectories.complete >= state.options.calibration_runs:
            try:
                state.recipe = calibration.recipe(state.options, self._provenance())
            except CalibrationError as error:
                broken = next((layer.name for layer in self.captured.layers if not layer.weight.isfinite().all()), None)
                if broken is not None:
                    state.refuse(f"the weights of {broken} are not finite")
                else:
                    state.say(state.notes, f"{error}; calibrating goes on")
                    state.calibration = Calibration()
                return self.captured.graph(*args)
            if calibration.nonfinite:
                layers = ", ".join(sorted(calibration.nonfinite)[:3])
                state.say(state.notes, f"NaN or infinite inputs seen while calibrating were left out (layers {layers}, ...)")
            return None
        weights = {layer.name: layer.weight for layer in self.captured.layers}

        def see(name: str, op: str, channel_axis: int, arguments: tuple[Any, ...]) -> None:
            calibration.observe(name, op, arguments[0], weights[name], channel_axis)

        return Observer(self.captured.graph, self.captured.layer_names(), see).run(*args)

    def _build(self, shape: Any, args: Sequence[Any]) -> None:
        state = self.state
        known = [w for w in self.weights if w in state.stamps]
        if stamped(known) != [state.stamps[w] for w in known]:
            state.refuse(CHANGED)
            return
        state.status = BUILDING
        work = concrete(self.captured, args), tuple(s for s in shape if isinstance(s, tuple))
        if work not in state.made:  # by another graph of Dynamo's, perhaps
            made = self._made(args)
            if made is None:
                return
            state.made[work] = made
        built, step = state.made[work]
        state.release(built.replaced)
        state.built = state.built or built
        self.variants[shape] = step
        if step is built.step and built.watch is not None:
            self.watches[shape] = built.watch
            state.drift.expect(built.watch)
        self.weights_version = self._version()
        codes = {key(w) for w in built.replaced}
        self.looked_at += [w for w in self.weights if key(w) in codes and all(w is not known for known in self.looked_at)]
        for w, stamp in zip(self.looked_at, stamped(self.looked_at), strict=True):
            state.stamps.setdefault(w, stamp)
        state.status = READY

    def _made(self, args: Sequence[Any]) -> tuple[Built, Callable[..., Any]] | None:
        """What was built for inputs like ``args``, and the step to use, which is not of 8 bits where those are in use for other
        sizes only. None where the module was refused."""
        state = self.state
        assert state.recipe is not None
        log.info("sd_%s: building the 8-bit step", state.options.precision)
        start = time.perf_counter()
        try:
            with torch.cuda.device_of(self.weights[0]):
                built = self.build(self.captured, args, state.recipe, state.options, state.memory)
        except Exception as error:
            log.debug("building failed", exc_info=True)
            built = Built(None, f"building the 8-bit step failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        except BaseException:
            state.status = READY if state.built else CALIBRATING  # Ctrl-C: the next call tries again
            raise
        built.timings["cold_start_s"] = time.perf_counter() - start
        for note in built.notes:
            state.say(state.notes, note)
        if built.step is not None:
            return built, built.step
        if state.built is None:
            state.built = built
            state.refuse(built.refusal or "no reason given")
            return None
        sizes = ", ".join("x".join(map(str, t.shape)) or "scalar" for t in tensor_inputs(self.captured, args))
        state.say(state.fallbacks, f"{built.refusal}; inputs of {sizes} run in the module's own precision")
        return built, self.unquantized(self.captured, args)

    def _watched(self, watch: Watch, args: Sequence[Any], tensors: Sequence[torch.Tensor], result: Any) -> Any:
        """``result`` of the 8-bit step, or the module's own where that one is not to be used and it is known already."""
        drift = self.state.drift
        drift.called = call = next(drift.calls)
        if watch.due(call):
            drift.sample(watch, tensors)
        made, given = outputs(result), outputs(tensors)
        if not made:
            return result
        some = len(self.looked_at)
        turn = [self.looked_at[(call * LOOKED_AT + i) % some] for i in range(min(LOOKED_AT, some))]
        looked = [w for w in turn if w.untyped_storage().nbytes() and w.device == made[0].device]
        expected = [self.state.stamps[w][1] for w in looked]
        largest = peaks([*made, *(t for t in given if t.device == made[0].device)])
        numbers = Later(torch.cat([largest, elements(looked)]) if looked else largest)
        if numbers.ready():
            own = self._examine(call, args, len(made), expected, numbers.values())
            return result if own is None else own
        kept = args if sum(t.numel() * t.element_size() for t in given) <= KEPT_BYTES else None
        drift.waiting.append((numbers, lambda values: self._examine(call, kept, len(made), expected, values, late=True)))
        return result

    def _examine(self, call: int, args: Sequence[Any] | None, outs: int, expected: Sequence[float], values: Sequence[float],
                 late: bool = False) -> Any:
        """The module's own result where the 8-bit step is to blame for a bad one, else None.

        values: peaks of the call's outputs, of which there are ``outs``, and of its inputs, and the elements of weights that were
        ``expected`` when the step was built. args: None where they were not kept.
        """
        state, what = self.state, trouble(values[:outs])
        since = "; results since that call are to be made again" if late else ""
        if state.status == REFUSED:
            return None
        if list(values[len(values) - len(expected):]) != expected:
            state.refuse(f"{CHANGED}; it was noticed on call {call}{since}")
            with torch.no_grad():
                return self.captured.graph(*args) if args else None
        if not all(map(math.isfinite, values[outs:])):
            state.say(state.notes, "the module was given NaN or infinite inputs, so its outputs mean nothing, even where 8-bit "
                                   "codes made them finite; the 8-bit step goes on")
            return None
        if what is None or (what == ZEROS and state.drift.own_zeros):
            return None
        own, whose, at = None, "from finite inputs", ""
        if args:
            with state.memory.weights.borrowed(), torch.no_grad():
                own = self.captured.graph(*args)
            if trouble(peaks(outputs(own)).tolist()) == what:
                state.drift.own_zeros = what == ZEROS
                state.say(state.notes, f"the module gave {what}, and gives the same in its own precision; the 8-bit step goes on")
                return None
            whose = "the module's own precision does not"
            at = "" if self.captured.timestep is None else f" at timestep {timestep_value(args[self.captured.timestep]):g}"
        state.refuse(f"the 8-bit step gave {what} on call {call}{at}, {whose}{since}")
        return own

    def _refused(self, shape: Any, args: Sequence[Any]) -> Any:
        tensors = tensor_inputs(self.captured, args)
        if shape in self.fallback:
            return self.fallback[shape](*tensors)
        if not BUILDING_ALONE.acquire(blocking=False):
            return self._own(args)
        try:
            step = self.fallback[shape] = self.unquantized(self.captured, args)
            return step(*tensors)
        finally:
            BUILDING_ALONE.release()

    def _version(self) -> int:
        """Changes when a weight is written in place. Inference tensors cannot be written and have no counter."""
        return sum(w._version for w in self.weights if not w.is_inference())

    def _provenance(self) -> dict[str, Any]:
        trajectories = self.state.calibration.trajectories
        return {"front_door": "self-calibration", "trajectories": trajectories.complete, "calls": trajectories.calls - 1}


def elements(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """One element of each, from its middle: fp32 [weights]."""
    return torch.stack([w.detach()[tuple(n // 2 for n in w.shape)].float() for w in weights])


def stamped(weights: Sequence[torch.Tensor]) -> list[tuple[int, float]]:
    """(version, one element) of each, by which a change is noticed. Inference tensors have no version and cannot be written."""
    values = elements(weights).tolist() if weights else []
    return [(0 if w.is_inference() else w._version, value) for w, value in zip(weights, values, strict=True)]


def shapes(captured: Captured, args: Iterable[Any]) -> tuple[Any, ...]:
    """What a built step is valid for: sizes, dtypes and devices of tensor inputs, and strides unless a CUDA graph copies them."""
    return tuple((a.shape, None if a.is_cuda else a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else a
                 for i, a in enumerate(args) if i not in captured.constants)

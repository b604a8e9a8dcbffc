"""What is known of one denoiser under one set of options: its calibration, recipe, 8-bit weights and sentences.

A state belongs to its root, the denoiser that the user calls, and dies with it. All graphs that Dynamo makes of the root, of its
blocks and of the pieces between graph breaks share it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import names, weights
from .adapters import adapters_of
from .buffers import Buffers
from .calibrate import Calibration
from .clock import Clock
from .drift import Drift
from .errors import CalibrationError
from .graphs import Graphed, Memory
from .options import Options
from .recipe import Recipe
from .report import merged
from .rules import SIDE_BRANCH, layers_of, reason_to_keep
from .timesteps import Trajectories
from .values import LayerReport, Report

if TYPE_CHECKING:
    from .unit import Unit

log = logging.getLogger("sdtrt_backend")
SIDE_BRANCHES = ("LoRAs of load_lora_weights run beside the 8-bit layers in 16 bits, two small products for each: "
                 "sdtrt_backend.load_lora writes them into the 8-bit codes instead, so that a step runs no product more")
CALIBRATING, BUILDING, READY, REFUSED = "calibrating", "building", "ready", "refused"


class Behind:
    """One thread that builds while others call the module."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None

    def me(self) -> bool:
        return self.thread is threading.current_thread()

    def start(self, build: Callable[[], None]) -> None:
        """Unless one builds already: the size is built when it is called again."""
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=build, name="sdtrt_backend builds")
            self.thread.start()


class State:
    """recipe: None while calibrating; units: one per graph and module that it was called for."""

    def __init__(self, options: Options, root: torch.nn.Module | None, recipe_hash: str = "") -> None:
        self.options, self.recipe_hash = options, recipe_hash
        self.root = None if root is None else weakref.ref(root)
        self.lock = threading.RLock()  # held by the one thread that calibrates or builds
        self.closed = False
        self.refusal: str | None = None  # why no graph of the module runs in 8 bits
        self.runs = options.calibration_runs  # pictures that calibrate
        self._begin()
        self.fallbacks: list[str] = []
        self.notes: list[str] = []
        self.memory = Memory()
        self.units: list[Unit] = []
        self.buffers = Buffers()
        self.live: Any = WeakIdKeyDictionary()  # constants that were seen to change: steps take them as inputs
        self.anew = False  # calibrated by itself, whatever recipe it was given
        self.needs_weights = False
        self.looking = root is not None  # for layers that no graph has
        self.stepped_in: list[torch.nn.Module] = []
        self.whole = False  # the root is compiled as a whole, not some of its blocks
        self.slept = False  # since the module was moved
        self.behind = Behind()
        self.adapters = adapters_of(root)  # LoRAs that are part of the codes
        if self.adapters is not None:
            self.adapters.states.add(self)
        self.own_loras: set[Any] = set()  # sets that 8 bits do not serve
        self.changed_by_loras: Any = WeakIdKeyDictionary()  # weights that stay in 16 bits: steps for such sets read others
        self.end = None if root is None else weakref.finalize(root, self.close)
        if self.end is not None:
            self.end.atexit = False

    def _begin(self) -> None:
        """Nothing is known of the ranges."""
        self.calibration = Calibration()
        self.clock = Clock(self.observe_call, self.observed_calls, self.failed)
        self.recipe: Recipe | None = None
        self.drift = Drift(lambda sentence: self.say(self.notes, sentence))

    # --- sentences

    def say(self, where: list[str], sentence: str) -> None:
        if sentence not in where:
            where.append(sentence)
            log.warning("sd_%s: %s", self.options.precision, sentence)

    def refuse(self, reason: str) -> None:
        """From now on all of the module runs in the user's precision; said once."""
        self.refusal = reason
        self.clock.stop()
        self.say(self.fallbacks, f"{reason}; the module runs in its own precision")
        self.place_weights()

    def failed(self, error: Exception) -> None:
        """An error of ours while calibrating; the traceback goes to the log."""
        sentence = f"calibrating failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        log.info("%s", sentence, exc_info=error)
        self.refuse(sentence)

    # --- calibration

    def observed_calls(self, trajectories: Trajectories) -> None:
        """The timesteps of the calls so far, and of the one that begins, turned out to be these."""
        self.observe_call(trajectories.previous or 0.0, False)
        self.calibration.trajectories = trajectories

    def observe_call(self, timestep: float, known: bool) -> None:
        """A call of the root begins. After the last calibrating picture the ranges become the recipe. known: whether ``timestep``
        is what it is called at, or NaN because it has none."""
        if self.recipe is not None or self.refusal is not None or not self.lock.acquire(blocking=False):
            return  # another thread calibrates
        try:
            calibration = self.calibration
            calibration.start_call(timestep)
            if not known or calibration.trajectories.complete < self.runs:
                return
            trajectories = calibration.trajectories
            facts = {"front_door": "self-calibration", "trajectories": trajectories.complete, "calls": trajectories.calls - 1}
            try:
                self.recipe = calibration.recipe(self.options, facts)
            except CalibrationError as error:
                self._without_recipe(error, timestep)
                return
            self.clock.stop()
            if self.clock.whole_calls:
                self.say(self.notes, "no timestep is known, so while calibrating each call of the module counted as a picture")
            if calibration.nonfinite:
                layers = ", ".join(sorted(calibration.nonfinite)[:3])
                self.say(self.notes, f"NaN or infinite inputs seen while calibrating were left out (layers {layers}, ...)")
        finally:
            self.lock.release()

    @property
    def timeless(self) -> bool:
        """Whether each of its calls is a picture, or a prompt, of its own."""
        root = None if self.root is None else self.root()
        return root is not None and self.recipe is not None and len(self.recipe.timesteps) == 1 and (
            not names.takes_a_timestep(root))

    def calibrate_again(self, why: str, more: int) -> None:
        """The ranges are of other weights: those of the coming pictures take their place, ``more`` than at first. The first of
        them has begun already."""
        if self.closed or not self.lock.acquire(blocking=False):
            return  # another thread does, or builds
        try:
            for unit in self.units:
                unit.clear()
                unit.to_judge = 0
            self.memory.forget_all()
            self._begin()
            self.runs, self.anew = self.options.calibration_runs + more, True
            self.place_weights()
            self.say(self.notes, f"{why}: the ranges are calibrated anew, by the coming pictures")
        finally:
            self.lock.release()

    def _without_recipe(self, error: CalibrationError, timestep: float) -> None:
        broken = next((layer.name for unit in self.units for layer in unit.plain.layers
                       if not layer.weight.isfinite().all()), None)
        if broken is not None:
            self.refuse(f"the weights of {broken} are not finite")
            return
        self.say(self.notes, f"{error}; calibrating goes on")
        self.calibration = Calibration()
        self.calibration.start_call(timestep)

    # --- layers that no graph has

    def step_in(self) -> None:
        """Dynamo runs a function as it is where a break lies in a loop of it, with the layers that it calls. From now on those of
        them that no graph has are pieces like any other."""
        self.looking = False
        root = None if self.root is None else self.root()
        self.whole = root is not None and names.runs_compiled(root)
        if root is None or self.closed or not self.whole:
            return
        in_graphs = {i for unit in self.units for i in unit.ids}
        left = [layer.name for layer in layers_of(root) if id(layer.weight) not in in_graphs
                and reason_to_keep(layer, self.options.exclude, self.options.level) is None]
        self.stepped_in = [m for m in map(root.get_submodule, left) if m._compiled_call_impl is None]
        for module in self.stepped_in:
            names.step_into(module)
        if self.stepped_in:
            self.runs += 1  # the picture that has begun has them from its second step on

    def step_out(self) -> None:
        for module in self.stepped_in:
            names.step_out(module)
        self.stepped_in = []

    # --- weights

    def covered(self) -> Iterator[torch.Tensor]:
        """Every parameter that a graph of this state was called with."""
        for unit in self.units:
            yield from unit.plain.constants.values()

    def place_weights(self) -> None:
        """Weights that no step reads go to host memory where the options say so; all others are on their device."""
        mine = {id(p): p for p in self.covered()}
        unread: dict[int, torch.Tensor] = {}
        if self.options.weights == "release" and not (self.closed or self.needs_weights or self.refusal):
            replaced = {id(w): w for unit in self.units for w in unit.replaced()}
            read = {k for unit in self.units for k in unit.reads()}
            unread = {i: w for i, w in replaced.items() if i not in read and self._nobody_else_reads(w)}
        weights.restore(p for i, p in mine.items() if i not in unread)
        weights.release(unread.values(), self.memory.spare)
        self.memory.spare.clear()

    def _nobody_else_reads(self, weight: torch.Tensor) -> bool:
        return all(state is self or id(weight) not in {k for unit in state.units for k in unit.reads()}
                   for state in _of_parameter(weight))

    def bytes_held(self) -> dict[str, int]:
        """Kind -> bytes of memory that is this module's; see ``Report``."""
        steps = [step for unit in self.units for made in unit.results.values()
                 if isinstance(step := getattr(made, "step", None), Graphed)]
        kinds = {"weights": [p for p in self.covered() if not weights.away(p)],
                 "in host memory": [p for p in self.covered() if weights.away(p)],
                 "codes": list(self.memory.tensors()),
                 "steps": [t for step in steps for t in (*step.constants, *step.inputs)]}
        held, seen = dict.fromkeys(kinds, 0), set[int]()
        for kind, tensors in kinds.items():
            for t in tensors:
                if weights.key(t) not in seen:
                    seen.add(weights.key(t))
                    held[kind] += t.untyped_storage().nbytes()
        held["graphs"] = self.memory.graph_bytes()
        return {kind: count for kind, count in held.items() if count}

    def keep_weights(self) -> None:
        """From now on they stay on their device: code that no state knows of reads them at every call."""
        self.needs_weights = True
        self.place_weights()

    def sleep(self) -> None:
        """The module has left its device: what was built there gives the memory back, and is brought back by the next call."""
        with self.lock:
            in_use = {weights.key(p) for p in self.covered()}
            for unit in self.units:
                for made in unit.results.values():
                    step = getattr(made, "step", None)
                    if isinstance(step, Graphed):
                        step.sleep(in_use)
            self.memory.sleep()
            self.slept = True

    def woken(self) -> None:
        """The module is on a GPU again, with all its weights: those that no step reads leave it again."""
        with self.lock:
            self.slept = False
            self.place_weights()

    # --- the end

    def close(self) -> None:
        """Let go of everything that was built, and never build again. Waits for a build in another thread. Also called when the
        root has died."""
        with self.lock:
            self.closed = True
            self.clock.stop()
            self.step_out()
            if self.end is not None and self.end.detach() is not None:
                self.place_weights()
            for unit in self.units:
                unit.clear()
            self.units.clear()
            self.drift.waiting.clear()
            self.memory.forget_all()
            self.buffers, self.adapters = Buffers(), None  # Dynamo may hold a closed state

    def purge(self) -> None:
        """Drop units of parameters that the root has no more, or has in another dtype: an adapter was removed, a checkpoint was
        assigned, the module was converted."""
        root = None if self.root is None else self.root()
        if root is None:
            return
        paths = names.paths(root)
        has = paths.keys() | self.buffers.of(paths)
        gone = [u for u in self.units if not u.fits() or any(id(p) not in has for p in u.plain.constants.values())]
        for unit in gone:
            unit.clear()
            self.units.remove(unit)
        if gone:
            left = {id(p) for unit in self.units for p in unit.plain.constants.values()}
            self.memory.drop(lambda i: i not in left)
            self.drop_unused()

    def drop_unused(self) -> None:
        """Steps that no unit uses are kept for nobody."""
        used = {id(made) for unit in self.units for made in unit.results.values()}
        self.memory.made = {work: made for work, made in self.memory.made.items() if id(made) in used}

    # --- the report

    @property
    def status(self) -> str:
        if self.refusal is not None:
            return REFUSED
        if self.recipe is None:
            return CALIBRATING
        return _status_of(self.units)

    def report(self, of: Iterable[torch.Tensor] | None = None) -> Report:
        """Of all graphs, or of those that read one of these parameters."""
        self.drift.look()
        wanted = None if of is None else {id(p) for p in of}
        units = [u for u in self.units if wanted is None or any(id(p) in wanted for p in u.plain.constants.values())]
        status = self.status if len(units) == len(self.units) or self.recipe is None else _status_of(units)
        pieces = [(r, u.name) for u in units for r in u.reports()]
        found = merged([r for r, _ in pieces], [n for _, n in pieces]) if pieces else Report(status)
        if pieces and len({u.frame for u in self.units}) + len({u.ids for u in self.units}) > 2:
            found = self._with_the_rest(found, wanted)
        memory = {"": self.bytes_held()} if pieces else {}
        notes = (*self.notes, *self._of_loras(), *self._of_sizes(units), *found.notes)
        return replace(found, state=status, memory=memory, fallbacks=tuple(self.fallbacks), notes=notes,
                       provenance=dict(self.recipe.provenance) if self.recipe else {}, watched=self.drift.watched())

    def _of_loras(self) -> Iterator[str]:
        if self.adapters is not None and self.adapters.loaded:
            yield self.adapters.sentence(self.memory.loras or ())
        if any(fnmatchcase(layer.name, SIDE_BRANCH) for unit in self.units for layer in unit.plain.layers):
            yield SIDE_BRANCHES

    def _of_sizes(self, units: Iterable[Unit]) -> Iterator[str]:
        waiting = max((len(unit.pictures) for unit in units), default=0)
        if waiting and self.recipe is not None:
            yield (f"inputs of {waiting} sizes were met in fewer than build_after={self.options.build_after} pictures each and "
                   "run in the module's own precision")

    def _with_the_rest(self, found: Report, wanted: Container[int] | None) -> Report:
        """With a row for each layer of which nothing was built: of a module in pieces, Dynamo may leave some as they are, and may
        also do so after they were calibrated."""
        root = None if self.root is None else self.root()
        if root is None:
            return found
        seen = {row.name for row in found.layers}
        rest = [replace(layer, name=name) for layer in layers_of(root) if (name := names.layer_name(layer.name)) not in seen
                and (wanted is None or id(layer.weight) in wanted)]
        if not rest:
            return found
        options = self.options
        rows = [LayerReport(layer.name, layer.op, tuple(layer.weight.shape), str(layer.weight.dtype)[6:], "eager",
                            reason_to_keep(layer, options.exclude, options.level) or "nothing was built of its part")
                for layer in rest]
        note = (f"{len(rows)} layers ({rows[0].name}, ...) are in no graph that was built, and not in the share of 8 bits: "
                "Dynamo runs them as they are, or no call reached them; where Dynamo's limit of recompilations was hit, set "
                "torch._dynamo.config.recompile_limit = 64 before compiling")
        return replace(found, layers=(*found.layers, *rows), notes=(note,))


def _status_of(units: Sequence[Unit]) -> str:
    """Of graphs that have a recipe: one that was superseded, or was not called yet, says nothing where another is in use."""
    statuses = {u.status for u in units}
    if any(u.building for u in units):
        return BUILDING
    return next((s for s in (READY, BUILDING, CALIBRATING) if s in statuses), REFUSED if statuses else CALIBRATING)


# root -> (options, hash of the recipe's contents) -> state
_OF_ROOT: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, State]] = weakref.WeakKeyDictionary()
_OF_PARAMETER: Any = WeakIdKeyDictionary()  # parameter -> weak references to the states that cover it
_LOCK = threading.RLock()


def _of_parameter(parameter: torch.Tensor) -> list[State]:
    return [s for ref in _OF_PARAMETER.get(parameter, ()) if (s := ref()) is not None and not s.closed]


def state_of(root: torch.nn.Module | None, constants: Iterable[torch.Tensor], options: Options, recipe_hash: str = "") -> State:
    """The state of these parameters under these options, a new one where there is none."""
    constants = list(constants)
    with _LOCK:
        key = options, recipe_hash
        if root is not None:
            known = _OF_ROOT.setdefault(root, {})
            state = known.get(key)
        else:
            known = {}
            state = next((s for p in constants for s in _of_parameter(p) if (s.options, s.recipe_hash) == key), None)
        if state is None or state.closed:
            state = known[key] = State(options, root, recipe_hash)
        ref = weakref.ref(state)
        for p in constants:
            found = _OF_PARAMETER.setdefault(p, [])
            if ref not in found:
                found[:] = [r for r in found if r() is not None] + [ref]
        return state


def states(module: torch.nn.Module) -> list[State]:
    """Every state of the module, or that covers one of its parameters, oldest first."""
    found = {id(s): s for s in _OF_ROOT.get(module, {}).values() if not s.closed}  # its parameters may be others at each call
    for p in (*module.parameters(), *module.buffers()):
        for state in _of_parameter(p):
            found.setdefault(id(state), state)
    return list(found.values())


def report(module: torch.nn.Module) -> Report | None:
    """Of the newest state of the module's parameters, over all graphs that read them; None where no state covers one."""
    found = states(module)
    return found[-1].report([*module.parameters(), *module.buffers()]) if found else None


def forget(module: torch.nn.Module) -> None:
    """Close the states of a module: the next call of a compiled one starts anew."""
    for state in states(module):
        state.close()
    with _LOCK:
        for root, known in list(_OF_ROOT.items()):
            for key in [k for k, s in known.items() if s.closed]:
                del known[key]
            if not known:
                del _OF_ROOT[root]

"""One graph with the parameters of one module, and its 8-bit steps: one for every size.

While calibrating, calls run the captured graph operation by operation, which gives the user's own numbers to the bit. Of the
threads that call a module one calibrates or builds, and in a process one builds; the others run unquantised meanwhile and never
wait. A failure of ours leaves the call the module's own result.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import operator
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from . import weights
from .adapters import Adapters, Change, Set
from .build import Ready, Refused, Request, build, planned_of, sizes_of, unquantized
from .calibrate import Observer
from .capture import Captured, concrete, exchanged, follow, follow_all, tensor_inputs
from .clock import timestep_of_call
from .constants import Constants, Part
from .drift import KEPT_BYTES, ZEROS, Later, Watch, looked_at, peaks, trouble
from .graphs import Graphed
from .measure import bound, bounded_by, compare, outputs
from .names import layer_name, paths
from .rules import SIDE_BRANCH, layers_of, reason_to_keep
from .state import BUILDING, CALIBRATING, READY, REFUSED, State
from .timesteps import Trajectories, timestep_value
from .values import Plan, Report

log = logging.getLogger("sdtrt_backend")
# held while a step is built, or compiled and first run: it is timed, and its CUDA graph is captured, while nothing of ours waits
# for the whole GPU, which would end the capture
BUILDING_ALONE = threading.RLock()
RETRY = 8  # calls until a build that failed for want of memory or of a lock is tried again; doubled each time
SIZES_COUNTED = 256  # whose pictures are counted until their steps are built
# calls that are each compared with the module's own precision after values of 8-bit layers have changed: those of one picture,
# where the recipe tells how many it has. The first of them as well where a module has no timestep: one call of a text encoder
# says little of the next
JUDGED = (8, 64)
WHY = {False: "weights were changed after they were calibrated, and",
       True: "few calls calibrated it, or weights were changed since, and"}  # whether it has no timestep -> why a call is off
SETS_KNOWN = 256  # of LoRAs, of which a unit remembers what they change
MANY_VALUES = 8  # of a Python number that is no size: each is a graph of its own, so more are no way to run


@dataclass(frozen=True)
class Variant:
    """A step for one set of inputs. captured: the graph whose tensor inputs it takes; made: what was built, None where the step
    is the module's own precision; input_bytes: of the inputs."""

    step: Callable[..., Any]
    captured: Captured
    made: Ready | None = None
    input_bytes: int = 0

    @property
    def watch(self) -> Watch | None:
        return None if self.made is None else self.made.watch


class Unit:
    """One graph with the parameters of one module, and its steps. Held by its state, so that it dies with the module."""

    def __init__(self, captured: Captured, state: State, frame: int) -> None:
        self.state, self.frame = state, frame  # Dynamo's number of the piece of code
        self.places = tuple(captured.constants)
        self.pick = _getter(self.places)
        self._owns(tuple(captured.constants.values()))
        coded = {id(layer.weight) for layer in captured.layers}
        self.works: dict[Any, Any] = {}  # key -> see ``_work``
        self.buffers, changed = self._first_of({i: p for i, p in captured.constants.items()
                                                if not isinstance(p, torch.nn.Parameter) and id(p) not in coded})
        captured = replace(captured, constants=captured.constants | self.buffers)
        self.constants = tuple(captured.constants.values())
        self.ids = tuple(map(id, self.constants))
        self.dtypes = [p.dtype for p in self.constants]
        self.of_layers = {id(layer.weight) for layer in captured.layers} | {id(captured.constants[i]) for i in captured.biases}
        self._follow(captured)
        self.variants: OrderedDict[Any, Variant] = OrderedDict()  # the one used longest ago first
        self.results: dict[Any, Ready | Refused] = {}
        self.refusal: str | None = None
        self.building = False
        self.calls = 0
        self.called = False
        self.to_judge = 0  # calls: the values of its layers are not those that were calibrated
        self.met: set[Set] = set()  # LoRAs that its steps ran with
        if state.adapters is not None:
            state.adapters.look_again()
        self.failures: dict[Any, tuple[int, int]] = {}  # sizes -> (how often a build failed for now, the call to try again at)
        self.numbers: dict[Any, set[Any]] = {}
        self.baked: list[int] = []  # inputs whose number is part of each step
        self.pictures: OrderedDict[Any, Trajectories] = OrderedDict()  # of sizes whose steps are not built
        if changed:
            self.renew(changed)

    def _owns(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """From now on it is called with these."""
        self.mine = tensors
        self.single = [(i, p) for i, p in zip(self.places, tensors, strict=True) if p.numel() == 1]  # equal ones are not the same

    def _first_of(self, buffers: dict[int, torch.Tensor]) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
        """See ``Buffers``."""
        root = None if self.state.root is None or not buffers else self.state.root()
        return self.state.buffers.first_of(buffers, {} if root is None else paths(root))

    def _follow(self, captured: Captured) -> None:
        """Constants that are known to change are inputs from now on."""
        self.plain = follow(captured, self.state.live)
        self.beside = {id(self.plain.constants[i]) for i in self.plain.written}
        self.take = _getter(self.plain.inputs)
        self.frozen = Constants(self.plain.constants.values(), self.state.buffers.now)
        self._follow_loras_anew()

    def _follow_loras_anew(self) -> None:
        self.works.clear()
        self.others: dict[torch.device, Captured] = {}
        self.changes: dict[Set, tuple[Sequence[Change], Sequence[Change], bool]] = {}

    def _beside(self) -> bool:
        """Whether this call's LoRAs change weights that stay in 16 bits, so that its step reads others in their place."""
        adapters = self.state.adapters
        return adapters is not None and self._changes(adapters)[2]

    def _with_others(self, adapters: Adapters) -> Captured:
        """The graph with those other weights."""
        device, merged = self.constants[0].device, self.state.memory.merged
        if device not in self.others:
            changed = {i: p for i, p in self.plain.constants.items() if p in self.state.changed_by_loras}
            adapters.beside(self.state.memory, changed.values(), adapters.mine)
            self.others[device] = exchanged(self.plain, {i: merged[id(p), p.device].tensor for i, p in changed.items()})
        return self.others[device]

    def _changes(self, adapters: Adapters) -> tuple[Sequence[Change], Sequence[Change], bool]:
        """What the LoRAs of this picture change among the arguments of a call, among those of them that are inputs of steps, and
        whether that are weights besides that stay in 16 bits."""
        if adapters.mine not in self.changes:
            if len(self.changes) >= SETS_KNOWN:
                self.changes.clear()
            found = adapters.changes({id(p): i for p, i in zip(self.constants, self.places, strict=True)})
            inputs = [one for one in found if one.place in self.plain.inputs]
            beside = any(one.weight in self.state.changed_by_loras for one in found if one.place in self.plain.constants)
            self.changes[adapters.mine] = found, inputs, beside
        return self.changes[adapters.mine]

    # --- what the state asks

    def replaced(self) -> list[torch.Tensor]:
        """The weights that steps in use hold in 8 bits."""
        return [w for v in self.variants.values() if v.made is not None for w in v.made.replaced]

    def reads(self) -> set[int]:
        """ids of the constants that a step in use reads, or that the module's own precision needs at every call."""
        if not self.variants:
            return set()
        if self.to_judge or self.refusal is not None or any(v.made is None for v in self.variants.values()):
            return {id(p) for p in self.constants}
        held = {id(w) for w in self.replaced()}
        kept = {id(p) for v in self.variants.values() if v.made is not None for p in v.made.reads}
        return {id(p) for p in self.constants if id(p) not in held or id(p) in kept}

    def fits(self) -> bool:
        """Whether the constants have the dtypes that they had when the graph was made."""
        return all(p.dtype == dtype for p, dtype in zip(self.constants, self.dtypes, strict=True))

    def clear(self) -> None:
        self.variants.clear()
        self.results.clear()
        self.others.clear()
        self.met.clear()

    @property
    def status(self) -> str:
        if self.building:
            return BUILDING
        if any(v.made is not None for v in self.variants.values()):
            return READY
        if self.refusal is not None or self.state.refusal is not None:
            return REFUSED
        return CALIBRATING if self.state.recipe is None else BUILDING  # by the next call

    @property
    def name(self) -> str:
        """What its layers have in common, for a report of several graphs; "" where it is the only one."""
        if len({u.frame for u in self.state.units}) == 1 and len({u.ids for u in self.state.units}) == 1:
            return ""
        paths = [layer.name for layer in self.plain.layers]
        return os.path.commonpath([p.replace(".", "/") for p in paths]).replace("/", ".") if paths else ""

    def reports(self) -> list[Report]:
        return [made.report(self.status) for made in self.results.values()]

    # --- a call

    def owns(self, args: Sequence[Any]) -> bool:
        """Whether ``args`` carry this unit's own constants."""
        if args[self.places[0]] is not self.mine[0] or any(args[i] is not p for i, p in self.single):
            return False
        try:  # tuples look whether their elements are identical, ten times as fast as we can, and compare only others
            return self.pick(args) == self.mine
        except RuntimeError:  # the truth of a tensor of several elements
            return False

    def follows(self, args: Sequence[Any]) -> bool:
        """Whether ``args`` carry this unit's own constants, but for buffers that a move of the module has replaced: those take
        the place of the ones before. Buffers that have other values than those become inputs."""
        if any(args[i] is not p for i, p in zip(self.places, self.mine, strict=True) if i not in self.buffers):
            return False
        found, changed = self._first_of({i: args[i] for i in self.buffers})
        if any(found[i] is not p for i, p in self.buffers.items()):
            return False
        self._owns(self.pick(args))
        self.frozen.follow(self.state.buffers.now)
        if changed:
            self.renew(changed)
        return True

    def __call__(self, args: Sequence[Any]) -> Any:
        adapters = self.state.adapters
        if adapters is None:
            return self._call(args)
        at, root = self.plain.timestep, adapters.root()
        with adapters.call(args[at] if at is not None else None if root is None else timestep_of_call(root)):
            return self._call(args)

    def _call(self, args: Sequence[Any]) -> Any:
        if self.state.drift.waiting:  # first: what has arrived may end the steps, or make inputs of constants
            try:
                self.state.drift.look()
            except Exception as error:
                return self._failed(error, "looking at what was watched", self._key(self.take(args), args), args)
        if self.state.looking:
            if self.called:  # another call of the root
                self._say_failures(self.state.step_in, "looking for layers that no graph has")
            self.called = True
        if self.state.slept and self.constants[0].is_cuda:
            self.state.woken()
        inputs = self.take(args)
        key = self._key(inputs, args)
        variant = self.variants.get(key)
        if variant is None or self.frozen.written():
            return self._slow(key, args, inputs)
        try:
            if len(self.variants) > 1:
                with contextlib.suppress(KeyError):  # another thread has just let it go
                    self.variants.move_to_end(key)
            return self._run(variant, args)
        except Exception as error:
            return self._failed(error, "running the step", key, args)

    def _say_failures(self, do: Callable[[], None], what: str) -> None:
        try:
            do()
        except Exception as error:
            self._say_failure(error, what)

    def _key(self, inputs: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
        """See ``signature``; with the numbers that became part of steps, and whether those read other weights for LoRAs."""
        key = signature(inputs)
        if self._beside():
            key = (*key, "LoRAs")
        return (*key, *((i, float(args[i])) for i in self.baked)) if self.baked else key

    def _bake(self, baked: frozenset[str], key: Any, args: Sequence[Any]) -> Any:
        """The key of a step whose graph holds the numbers of these inputs."""
        new = [i for i, n in enumerate(self.plain.placeholders()) if n.name in baked and i not in self.baked]
        if not new:
            return key
        self.baked += new
        self.variants.clear()
        return self._key(self.take(args), args)

    def _run(self, variant: Variant, args: Sequence[Any]) -> Any:
        self.calls += 1
        part, elements = self.frozen.due(self.calls), None
        if part is not None:
            addresses = part.addresses()
            if self._follow_moved(variant, part, addresses):
                return self._call(args)
            elements = part.elements(addresses)
        adapters = self.state.adapters
        if adapters is not None:
            if not self._holds(variant, adapters):
                return self.own(args)
            now = self.others.get(self.constants[0].device) if self._beside() else self.plain
            if variant.made is not None and variant.captured is not now:  # it does not follow all that LoRAs change
                return self._call(args)
        tensors = tensor_inputs(variant.captured, self.with_loras(args, of_inputs=variant.made is not None))
        result = variant.step(*tensors)
        if part is not None or variant.watch is not None:
            result = self._watched(variant, args, tensors, result, part, elements)
        return self._judged(args, result) if self.to_judge and variant.made is not None else result

    def _slow(self, key: Any, args: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """A call that is not served by what is built."""
        state = self.state
        if self.frozen.written():
            self.renew(state.memory.stamps.changed(self.frozen.tensors))
            self.frozen.accept()
            inputs = self.take(args)  # constants may be among them now
            key = self._key(inputs, args)
            if key in self.variants:
                return self._call(args)
        if state.recipe is None and state.refusal is None and self.refusal is None:
            self._tell_the_time(args)
        if state.refusal is not None or self.refusal is not None:
            return self._own_precision(key, args)
        if not state.lock.acquire(blocking=False):
            return self._call(args) if self._has_another(key, args) else self.own(args)
        try:
            seen_enough = self._seen_enough(key, args)
            if state.recipe is None:
                return self._calibrate(args)
            if not seen_enough:
                return self.own(args)
            if key in self.failures and self.calls < self.failures[key][1]:
                self.calls += 1
                return self.own(args)
            if self._another_number(key, inputs):
                return self._own_precision(key, args)
            if state.options.background and not state.behind.me():
                if self._has_another(key, args):
                    return self._call(args)
                state.behind.start(self._build_behind(key, args))
                return self.own(args)
            if state.closed or not BUILDING_ALONE.acquire(blocking=False):
                return self.own(args)
            try:
                key = self._build(key, args)
                if key in self.variants:  # the first run, in which Inductor tunes what it compiled
                    return self._run(self.variants[key], args)
            finally:
                BUILDING_ALONE.release()
            return self._own_precision(key, args) if self.refusal is not None else self.own(args)
        except Exception as error:
            return self._failed(error, "building the 8-bit step", key, args)
        finally:
            state.lock.release()

    def _seen_enough(self, key: Any, args: Sequence[Any]) -> bool:
        """Whether this call is of the picture with which the step of its size is to be built, or of a later one."""
        after = self.state.options.build_after
        if after == 1 or self.state.behind.me():
            return True
        at, root = self.plain.timestep, None if self.state.root is None else self.state.root()
        timestep = args[at] if at is not None else None if root is None else timestep_of_call(root)
        seen = self.pictures.setdefault(key, Trajectories())
        seen.observe(timestep_value(timestep))
        self.pictures.move_to_end(key)
        if len(self.pictures) > SIZES_COUNTED:
            self.pictures.popitem(last=False)
        return seen.complete + 1 >= after

    def _build_behind(self, key: Any, args: Sequence[Any]) -> Callable[[], None]:
        """What builds the step in another thread: from copies of the call's inputs, in its precision, with its LoRAs."""
        inputs = set(self.plain.inputs)
        with torch.inference_mode(False):
            copies = [a.detach().clone() if i in inputs and isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
        device, adapters = self.constants[0].device.type, self.state.adapters
        mine = () if adapters is None else adapters.mine
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def build() -> None:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast), contextlib.ExitStack() as loras:
                if adapters is not None:
                    loras.enter_context(adapters.block(mine))
                    loras.enter_context(adapters.call(None))
                with self.state.lock, BUILDING_ALONE:
                    if key not in self.variants and not self.state.closed and self.refusal is None:
                        self._slow(key, copies, self.take(copies))

        return build

    def own(self, args: Sequence[Any]) -> Any:
        """The module's own result, operation by operation."""
        return self.plain.graph(*self.with_loras(args))

    # --- LoRAs

    def with_loras(self, args: Sequence[Any], of_inputs: bool = False) -> Sequence[Any]:
        """``args`` with the weights that LoRAs change as they change them: all, or those that are inputs of steps."""
        adapters = self.state.adapters
        if adapters is None:
            return args
        everything, inputs, _ = self._changes(adapters)
        return adapters.applied(args, inputs if of_inputs else everything)

    def _holds(self, variant: Variant, adapters: Adapters) -> bool:
        """Whether the step may run: its codes are of this picture's LoRAs."""
        made, mine, state = variant.made, adapters.mine, self.state
        if made is None:
            return not (mine and variant.captured.constants)  # else it reads all weights at every call
        if made.derived is None:
            if mine:
                state.say(state.notes, "8-bit weights are part of what was compiled here, so that pictures with LoRAs of "
                                       "load_lora run in the module's own precision: use pipe.load_lora_weights, or "
                                       "engine='inductor'")
            return not mine
        if mine in state.own_loras or not adapters.hold(state, mine):
            return False
        if mine not in self.met:
            if len(self.met) >= SETS_KNOWN:
                self.met.clear()
            self.met.add(mine)
            if not self._follow_loras(adapters, made.plan):
                self.to_judge = max(self.to_judge, 1)
        return True

    def _follow_loras(self, adapters: Adapters, plan: Plan | None) -> bool:
        """Of weights that LoRAs change and that stay in 16 bits steps read others, with the LoRAs. Returns whether there were any
        new ones."""
        assert plan is not None
        held = {id(d.layer.weight) for d in plan.decisions if d.quantized}
        state = self.state
        found = [change.weight for change in self._changes(adapters)[0]]
        new = [w for w in found if id(w) not in held and w not in state.live and w not in state.changed_by_loras]
        for weight in new:
            state.changed_by_loras[weight] = True
        for unit in state.units if new else ():
            for key in [k for k, v in unit.variants.items() if v.captured.written - unit.plain.written]:
                del unit.variants[key]
                unit.results.pop(key, None)
            unit._follow_loras_anew()
        if new:
            state.drop_unused()
        return bool(new)

    # --- while calibrating

    def _tell_the_time(self, args: Sequence[Any]) -> None:
        captured, root = self.plain, None if self.state.root is None else self.state.root()
        if root is not None and self.state.clock.inside(root):
            return
        at = None if captured.timestep is None else args[captured.timestep]
        self.state.clock.called(self.frame, at, {i: args[i] for i in captured.inputs})

    def _calibrate(self, args: Sequence[Any]) -> Any:
        calibration = self.state.calibration
        parameters = {layer.name: layer.weight for layer in self.plain.layers}
        calibration.roles |= {layer.name: layer.role for layer in self.plain.layers if layer.role}
        failure: list[Exception] = []

        def see(name: str, op: str, channel_axis: int, arguments: tuple[Any, ...]) -> None:
            if not failure:
                try:
                    calibration.observe(name, op, arguments[0], parameters[name], channel_axis)
                except Exception as error:  # ours, and none of the user's call
                    failure.append(error)

        result = Observer(self.plain.graph, {node: name for node, name in self.plain.layer_names().items()
                                                if not fnmatchcase(name, SIDE_BRANCH)}, see).run(*self.with_loras(args))
        if failure:
            self._say_failure(failure[0], "calibrating")
        return result

    # --- building

    def _build(self, key: Any, args: Sequence[Any]) -> Any:
        """Build a step for ``args``, or refuse; returns its key."""
        state = self.state
        assert state.recipe is not None
        changed = state.memory.stamps.changed(self.frozen.tensors)
        if changed:
            self.renew(changed)
            key = self._key(self.take(args), args)
        anew = self.to_judge > 0 and not state.timeless  # ranges that do not fit are calibrated anew, and no layers left out
        adapters, adapt, captured = state.adapters, Request.adapt, self.plain
        if adapters is not None:
            if not adapters.hold(state, adapters.mine):
                return key
            if self._follow_loras(adapters, planned_of(self.plain, state.recipe, state.options)):
                key = self._key(self.take(args), args)
            adapt = partial(adapters.rewrite, state.memory, adapters.mine)
            captured = self._with_others(adapters) if self._beside() else self.plain
        work = self._work(captured, key, args)
        made = state.memory.made.get(work)
        if made is None:
            log.info("sd_%s: building the 8-bit step", state.options.precision)
            self.building, start = True, time.perf_counter()
            state.memory.wake(self.constants[0].device)
            try:
                with weights.borrowed(self.constants), torch.cuda.device_of(self.constants[0]):
                    made = build(Request(captured, self.with_loras(args), state.recipe, state.options, state.memory,
                                         budgeted=anew, adapt=adapt))
            finally:
                self.building = False
            made = made.timed(cold_start_s=time.perf_counter() - start)
            for note in made.notes:
                state.say(state.notes, note)
        if state.closed:
            return key
        key = self._bake(made.baked, key, args)
        if anew and isinstance(made, Refused) and made.error is not None and made.error > made.bound:
            self._calibrate_again(made.error, made.bound, args)
            return key
        self.results[key] = made
        self.failures.pop(key, None)
        self.pictures.pop(key, None)
        if isinstance(made, Refused):
            self._refused(key, args, made)
        else:
            state.memory.made[work] = made
            self.variants[key] = self._variant(captured, made, args)
            if state.timeless:
                self.to_judge = max(self.to_judge, JUDGED[0])
            if adapters is not None:
                self.met.add(adapters.mine)
            if made.watch is not None:
                state.drift.expect(made.watch)
        state.memory.stamps.add(self.frozen.tensors)
        self.frozen.accept()
        self._let_go()
        state.place_weights()
        if self.constants[0].is_cuda:  # whose memory waits for nothing: what led to this step may hold tensors in cycles
            gc.collect()
        return key

    def _work(self, captured: Captured, key: Any, args: Sequence[Any]) -> Any:
        """What is the same for graphs and inputs that one step serves."""
        return concrete(captured, args), tuple(s for s in key if isinstance(s, tuple)), _autocast(self.constants[0].device)

    def _variant(self, captured: Captured, made: Ready, args: Sequence[Any]) -> Variant:
        return Variant(made.step, captured, made, sum(t.numel() * t.element_size() for t in tensor_inputs(self.plain, args)))

    def _has_another(self, key: Any, args: Sequence[Any]) -> bool:
        """Whether another graph has a step for this call, which is this one's as well now: while one of further sizes is built,
        Dynamo's graph for every size takes the place of that for the first."""
        if key not in self.works:
            if len(self.works) >= SIZES_COUNTED:
                self.works.clear()
            self.works[key] = self._work(self.plain, key, args)
        made = self.state.memory.made.get(self.works[key])
        if made is None or self._beside() or self.state.memory.stamps.changed(self.frozen.tensors):
            return False
        self.results[key], self.variants[key] = made, self._variant(self.plain, made, args)
        return True

    def _let_go(self) -> None:
        """Of the steps beyond ``max_sizes``."""
        held = self.state.options.max_sizes
        while len(self.variants) > held:
            oldest, _ = self.variants.popitem(last=False)
            self.results.pop(oldest, None)
            self.state.drop_unused()
            self.state.say(self.state.notes, f"steps for {held} sizes are held; one that was used longest ago goes for "
                                             "each new one, and is built again when it is needed")

    def _refused(self, key: Any, args: Sequence[Any], made: Refused) -> None:
        state = self.state
        if self._in_use() or _autocast(self.constants[0].device):  # which may be why
            sizes = sizes_of(tensor_inputs(self.plain, args))
            state.say(state.fallbacks, f"{made.reason}; inputs of {sizes} run in the module's own precision")
            self.variants[key] = self._compiled(args)[0] if made.fallback is None else Variant(made.fallback, self.plain)
            return
        self.refuse(made.reason, quiet=made.by_rule and self._others_may_be_quantized())
        if made.fallback is not None:
            self.variants[key] = Variant(made.fallback, self.plain)

    def _in_use(self) -> bool:
        """Whether 8-bit steps of the same parameters serve other sizes."""
        return any(v.made is not None for unit in self.state.units if unit.ids == self.ids for v in unit.variants.values())

    def _others_may_be_quantized(self) -> bool:
        """Whether other graphs of the module run in 8 bits, or are to: if they do not, they say so themselves."""
        options, others = self.state.options, [unit for unit in self.state.units if unit is not self]
        if any(unit.status == READY for unit in others):
            return True
        layers = [layer for unit in others if unit.refusal is None for layer in unit.plain.layers]
        root, recipe = None if self.state.root is None else self.state.root(), self.state.recipe
        if root is not None and recipe is not None:  # pieces that were not called yet, but while calibrating
            met = {layer.name for unit in self.state.units for layer in unit.plain.layers}
            layers += [layer for layer in layers_of(root) if layer_name(layer.name) in recipe.layers.keys() - met]
        return any(reason_to_keep(layer, options.exclude, options.level) is None for layer in layers)

    def refuse(self, reason: str, quiet: bool = False) -> None:
        """From now on this graph runs in the user's precision. quiet: its rows say why."""
        self.refusal = reason
        for key in [k for k, v in self.variants.items() if v.made is not None]:
            del self.variants[key]
        whole = all(unit.ids == self.ids for unit in self.state.units)
        part = "the module" if whole else f"the part with {self.plain.layers[0].name}"
        if not quiet:
            self.state.say(self.state.fallbacks, f"{reason}; {part} runs in its own precision")
        self.state.place_weights()

    def _own_precision(self, key: Any, args: Sequence[Any]) -> Any:
        """The captured graph through Inductor, or as it is where that fails."""
        if key not in self.variants:
            if not BUILDING_ALONE.acquire(blocking=False):
                return self.own(args)
            try:
                variant, baked = self._compiled(args)
                key = self._bake(baked, key, args)
                result = variant.step(*tensor_inputs(variant.captured, self.with_loras(args)))
                self.variants[key] = variant
                self._let_go()
                return result
            except Exception as error:
                self._say_failure(error, "compiling the module in its own precision")
                self.variants[key] = self._as_it_is(args)
                return self.own(args)
            finally:
                BUILDING_ALONE.release()
        return self._run(self.variants[key], args)

    def _compiled(self, args: Sequence[Any]) -> tuple[Variant, frozenset[str]]:
        whole = follow_all(self.plain)  # it reads the constants at every call, whatever becomes of them
        step, baked = unquantized(whole, args)
        return Variant(step, whole), baked

    def _as_it_is(self, args: Sequence[Any]) -> Variant:
        """The captured graph itself, in place of a compiled one."""
        whole = follow_all(self.plain)
        numbers = {i: args[i] for i in whole.inputs if not isinstance(args[i], torch.Tensor)}

        def run(*tensors: torch.Tensor) -> Any:
            left = iter(tensors)
            return whole.graph(*(numbers[i] if i in numbers else next(left) for i in range(len(args))))

        return Variant(run, whole)

    def _another_number(self, key: Any, inputs: Sequence[Any]) -> bool:
        """Whether a Python number takes too many values for a step of each; the unit is refused then."""
        numbers = (*(v for v in inputs if not isinstance(v, torch.Tensor)), *key[len(key) - len(self.baked):])
        sizes = {s for v in inputs if isinstance(v, torch.Tensor) for s in v.shape}
        free = tuple(n for n in numbers if n not in sizes)
        if not free:
            return False
        seen = self.numbers.setdefault(tuple(k for k in key if isinstance(k, tuple)), set())
        seen.add(free)
        if len(seen) <= MANY_VALUES:
            return False
        self.refuse(f"a Python number that the module is given took {len(seen)} values on the same sizes, each of which is a "
                    "step of its own: pass a tensor")
        return True

    def judge_a_picture(self) -> None:
        """Values of its layers are not those that were calibrated."""
        if self.state.recipe is not None:
            least, most = JUDGED
            self.to_judge = min(most, max(least, len(self.state.recipe.timesteps)))

    def _judged(self, args: Sequence[Any], result: Any) -> Any:
        """``result`` where it is inside ``max_error``, else the module's own: a build looks at its first call only, which is
        enough for the weights that were calibrated. Ranges of other weights may fit at one timestep and clip at another."""
        self.to_judge -= 1
        with torch.no_grad():
            own = self.own(args)
        error, limit = compare(result, own), bound(self.state.options, own)
        if error <= self._share_of(limit) or not all(bool(t.isfinite().all()) for t in outputs(own)):
            if not self.to_judge:
                self.state.place_weights()
            return result
        adapters = self.state.adapters
        mine = () if adapters is None else adapters.mine
        if mine and self.state.options.lora_policy == "own":
            self.state.own_loras.add(mine)
            named = ", ".join(name for name, _, _ in mine)
            self.state.say(self.state.fallbacks, f"with the LoRAs {named} the 8-bit output differed by {error:.3f} from the "
                           f"full-precision output on the same input{self._at(args)}, "
                           f"{self._allowed(limit)}; pictures with this set run in the module's own precision")
        else:
            self._calibrate_again(error, limit, args)
        return own

    def _share_of(self, limit: float) -> float:
        """Of a module in pieces each is compared with its own result on what the pieces before it gave, so that errors add up: as
        independent ones do, by their squares."""
        pieces = {unit.ids for unit in self.state.units if any(v.made is not None for v in unit.variants.values())}
        return limit / math.sqrt(max(1, len(pieces)))

    def _allowed(self, limit: float) -> str:
        name, value = bounded_by(self.state.options, limit)
        shared = self._share_of(limit)
        return f"{name} is {value}" + (f", which allows this piece of it {shared:.3g}" if shared < limit else "")

    def _calibrate_again(self, error: float, limit: float, args: Sequence[Any]) -> None:
        """Of a module without a timestep once: where more calls do not help, it is not for 8 bits."""
        what = (f"the 8-bit output differed by {error:.3f} from the full-precision output on the same input{self._at(args)}, "
                f"{self._allowed(limit)}")
        if self.state.timeless and self.state.anew:
            self.refuse(f"{what}, after {self.state.runs} calls had calibrated it")
        else:
            self.state.calibrate_again(f"{WHY[self.state.timeless]} {what}", JUDGED[0] if self.state.timeless else 1)

    def _at(self, args: Sequence[Any]) -> str:
        """The timestep of a call, for a sentence."""
        return "" if self.plain.timestep is None else f" at timestep {timestep_value(args[self.plain.timestep]):g}"

    # --- failures

    def _failed(self, error: Exception, what: str, key: Any, args: Sequence[Any]) -> Any:
        """The module's own result after a failure of ours."""
        self.building = False
        self.variants.pop(key, None)
        sentence = self._say_failure(error, what, say=False)
        if transient(error):
            times = self.failures.get(key, (0, 0))[0]
            self.failures[key] = times + 1, self.calls + RETRY * 2**times
            sizes = sizes_of(tensor_inputs(self.plain, args))
            self.state.say(self.state.fallbacks, f"{sentence}; inputs of {sizes} run in the module's own precision, and it is "
                                                 "tried again later")
        elif (self._in_use() or _autocast(self.constants[0].device)) and what.startswith("building"):
            sizes = sizes_of(tensor_inputs(self.plain, args))
            self.state.say(self.state.fallbacks, f"{sentence}; inputs of {sizes} run in the module's own precision")
            self.variants[key] = self._as_it_is(args)
        else:
            self.refuse(sentence)
        return self.own(args)

    def _say_failure(self, error: Exception, what: str, say: bool = True) -> str:
        """The sentence; the traceback goes to the log once."""
        sentence = f"{what} failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if sentence not in self.state.notes:
            log.info("%s", sentence, exc_info=error)
        if say:
            self.state.say(self.state.notes, sentence)
        return sentence

    # --- changed values

    def _holds_values(self) -> bool:
        """Whether a step has the values of constants as a part of what was compiled."""
        return any(v.made is not None and v.made.derived is None for v in self.variants.values())

    def renew(self, changed: Sequence[torch.Tensor], what: str = "values") -> bool:
        """What was built from other values of these constants goes: the next call builds from what they are now. Constants that
        no layer holds in 8 bits become inputs of that step, which then follows them by itself. False where nothing had to go:
        steps read what adapters beside a layer are now."""
        state = self.state
        ids = {id(p) for p in changed}
        units = [unit for unit in state.units if any(id(p) in ids for p in unit.frozen.tensors)]
        if what == "values":
            held = {id(p) for unit in units for p in unit.frozen.tensors if id(p) not in unit.beside or unit._holds_values()}
            read = [p for p in changed if id(p) not in held]
            state.memory.stamps.forget({id(p) for p in read})
            state.memory.stamps.add(read)
            changed = [p for p in changed if id(p) in held]
            for unit in units if read else ():
                unit.to_judge = max(unit.to_judge, 1)
        if not changed:
            return False
        ids = {id(p) for p in changed}
        of_layers = {k for unit in units for k in unit.of_layers}
        for p in changed:
            if id(p) not in of_layers and state.memory.stamps.alike(p):
                state.live[p] = True
        for unit in units:
            unit.clear()
            unit._follow(unit.plain)
            if what == "values" and not ids.isdisjoint(unit.of_layers):
                unit.judge_a_picture()
        state.memory.forget(ids)
        how = "changed" if what == "values" else "moved to other memory"
        why = "an adapter merged or swapped, a checkpoint loaded" if what == "values" else "offloading"
        state.say(state.notes, f"constants of the module were {how} after the 8-bit step was built ({why}?): it is built again "
                               f"from the new {what}")
        return True

    def _follow_moved(self, variant: Variant, part: Part, addresses: list[int] | None) -> bool:
        """Constants whose memory was replaced, as moving and offloading do it, become inputs: a step that holds the memory that
        they had would keep it for ever. A CUDA graph is left: what it reads is a small part, and a move to another device wakes
        it anew. Returns whether there were any."""
        made = variant.made
        if made is None or isinstance(variant.step, Graphed):
            return False
        moved = part.moved(made.reads, made.read_from, addresses)
        for p in moved:
            self.state.live[p] = True
        if moved:
            self.renew(moved, "memory")
        return bool(moved)

    def _watched(self, variant: Variant, args: Sequence[Any], tensors: Sequence[torch.Tensor], result: Any, part: Part | None,
                 elements: torch.Tensor | None) -> Any:
        """``result`` of the 8-bit step, or the module's own where that one is not to be used and it is known already. elements:
        of the ``part`` of the constants that is looked at."""
        state, watch = self.state, variant.watch
        drift, outs, numbers = state.drift, 0, []
        call = next(drift.calls)
        if watch is not None:
            drift.called = call
            if watch.due(call):
                drift.sample(watch, tensors)
            *result, seen = result
            outs, numbers = len(looked_at(result, self.constants[0].device)), [seen] if len(seen) else []
        peaked = sum(map(len, numbers))
        if elements is not None:
            numbers.append(elements)
        if not numbers:
            return result
        later = Later(numbers[0] if len(numbers) == 1 else torch.cat(numbers))
        if later.ready():
            values = later.values()
            if part is None and math.isfinite(sum(values)) and any(values[:outs]):
                return result  # as nearly always
            own = self._examine(call, args, outs, peaked, part, values)
            return result if own is None else own
        kept = args if variant.input_bytes <= KEPT_BYTES else None
        me = weakref.ref(self)

        def when_there(values: list[float]) -> None:
            unit = me()
            if unit is not None:
                unit._examine(call, kept, outs, peaked, part, values, late=True)

        drift.waiting.append((later, when_there))
        return result

    def _examine(self, call: int, args: Sequence[Any] | None, outs: int, peaked: int, part: Part | None,
                 values: Sequence[float], late: bool = False) -> Any:
        """The module's own result where the 8-bit step is to blame for a bad one, else None.

        values: ``peaked`` peaks, of the call's outputs, of which there are ``outs``, and of its inputs, and the elements of the
        ``part`` of the constants that was looked at. args: None where they were not kept.
        """
        state, what = self.state, trouble(values[:outs])
        since = "; results since that call are to be made again" if late else ""
        if state.refusal is not None or self.refusal is not None or state.closed:
            return None
        changed = [] if part is None else part.differing(values[peaked:], state.memory.stamps)
        if changed and self.renew(state.memory.stamps.changed(self.frozen.tensors) or changed):  # others as well, most likely
            if late:
                state.say(state.notes, f"it was noticed on call {call}{since}")
            return None if not args or late else self.own(args)
        if not all(v == v and v != float("inf") for v in values[outs:peaked]):
            state.say(state.notes, "the module was given NaN or infinite inputs, so its outputs mean nothing, even where 8-bit "
                                   "codes made them finite; the 8-bit step goes on")
            return None
        if what is None or (what == ZEROS and state.drift.own_zeros):
            return None
        own, whose, at = None, "from finite inputs", ""
        if args:
            with torch.no_grad():
                own = self.own(args)
            if trouble(peaks(outputs(own)).tolist()) == what:
                state.drift.own_zeros = what == ZEROS
                state.say(state.notes, f"the module gave {what}, and gives the same in its own precision; the 8-bit step goes on")
                return None
            whose = "the module's own precision does not"
            at = self._at(args)
        self.refuse(f"the 8-bit step gave {what} on call {call}{at}, {whose}{since}")
        return own


def transient(error: BaseException) -> bool:
    """Whether the same may succeed later: memory was short, or a lock was held."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | TimeoutError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("out of memory", "ALLOC_FAILED"))


def _getter(indices: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Those elements of a sequence, as a tuple also where it is one or none."""
    if len(indices) == 1:
        (one,) = indices
        return lambda args: (args[one],)
    return operator.itemgetter(*indices) if indices else lambda args: ()


def signature(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What a built step is valid for: sizes, dtypes and devices of tensor inputs, strides unless a CUDA graph copies them,
    numbers, and the precision that autocast imposes."""
    key = tuple([(a.shape, None if a.is_cuda else a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else a
                 for a in inputs])
    return (*key, *_autocast(torch.device("cuda"))) if torch.is_autocast_enabled("cuda") else (
        (*key, *_autocast(torch.device("cpu"))) if torch.is_autocast_enabled("cpu") else key)


def _autocast(device: torch.device) -> tuple[Any, ...]:
    return ((device.type, torch.get_autocast_dtype(device.type)),) if torch.is_autocast_enabled(device.type) else ()

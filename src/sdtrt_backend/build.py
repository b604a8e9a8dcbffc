"""From a captured graph and a recipe to an 8-bit step that was measured, or to the reason why there is none."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from . import budget, drift, measure, work
from .calibrate import Observer
from .capture import Captured, bind, tensor_inputs
from .graphs import Graphed, Memory
from .lower import Derived, Held, Lowered, Lowering, Scaled, choose
from .names import layer_name
from .options import Options
from .programs import inductor
from .quantize import covering, free_convs, insert, plan, smooth_convs
from .recipe import Recipe
from .regions import in_pieces
from .values import Decision, LayerReport, Plan, Report
from .weights import key, pinning

# A step that is so much ahead of the graph compiled in pieces is ahead of the graph compiled as a whole, which takes minutes for
# a deep model: that was 1.01 to 1.07 times as fast as the pieces for eight transformers (H200)
CLEARLY_AHEAD = 1.1
RACES = 2  # that an 8-bit step must lose to be refused: what else runs on the machine decides a close one


@dataclass(frozen=True)
class Request:
    """What a step is built from: a graph with its parameters, the arguments of the call that asks for it, and the state's parts.

    budgeted: no layers are looked for that stay unquantised for ``max_error``: the recipe names them already, or its ranges are
    to be calibrated anew instead; adapt: writes LoRAs into codes that do not have them.
    """

    captured: Captured
    args: Sequence[Any]
    recipe: Recipe
    options: Options
    memory: Memory
    budgeted: bool = False
    adapt: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timings:
    """What was measured of a build, seconds and milliseconds of a step; None where it was not."""

    choice_s: float | None = None
    build_s: float | None = None
    cold_start_s: float | None = None
    kernels_ms: float | None = None
    eager_ms: float | None = None
    step_ms: float | None = None
    compile_ms: float | None = None
    fp8_attentions: int | None = None

    def named(self, precision: str) -> dict[str, float]:
        """As reports show them."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        new = {"step_ms": f"sd_{precision}_ms", "kernels_ms": "16-bit_kernels_ms"}
        return {new.get(name, name): value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class _Made:
    """layers: one row per layer; error: of the first output; bound: that it may have; timings: of this build; eight_bit_flops: of
    the kernels that are called; sizes: of the inputs; baked: names of the inputs whose number became part of it."""

    precision: str
    layers: tuple[LayerReport, ...] = ()
    error: float | None = None
    bound: float = math.inf
    timings: Timings = Timings()
    notes: tuple[str, ...] = ()
    plan: Plan | None = None
    eight_bit_flops: int = 0
    measured: bool = False
    sizes: str = ""
    baked: frozenset[str] = frozenset()

    def timed(self, **seconds: float) -> Any:
        return replace(self, timings=replace(self.timings, **seconds))  # type: ignore[arg-type]

    def report(self, status: str) -> Report:
        flops = sum(layer.flops for layer in self.layers)
        share = (self.eight_bit_flops / max(1, flops) if self.measured else 0.0) if isinstance(self, Ready) else 0.0
        return Report(status, self.layers, timings=self.timings.named(self.precision), error=self.error,
                      quantized_flops_share=share, flops=flops, sizes=self.sizes)


@dataclass(frozen=True)
class Ready(_Made):
    """A step on tensor inputs, which may be used.

    step: its last output is ``drift.peaks`` where there is a ``watch``, what its drift is noticed by; replaced: the module's
    weights that it holds in 8 bits and does not read; reads: constants that it does read; read_from: keys of their memory;
    derived: see ``Lowered``.
    """

    step: Callable[..., Any] = lambda *_: None
    replaced: tuple[torch.Tensor, ...] = ()
    reads: tuple[torch.Tensor, ...] = ()
    read_from: tuple[int, ...] = ()
    derived: tuple[Derived | Scaled | Held, ...] | None = None
    watch: drift.Watch | None = None


@dataclass(frozen=True)
class Refused(_Made):
    """Why no step is used. fallback: the module's own precision, compiled, where the comparison has made it; by_rule: every layer
    has its own reason, whatever 8 bits would have been worth."""

    reason: str = ""
    fallback: Callable[..., Any] | None = None
    by_rule: bool = False


def unquantized(captured: Captured, args: Sequence[Any],
                tensors: Sequence[torch.Tensor] | None = None) -> tuple[Callable[..., Any], frozenset[str]]:
    """(the captured graph in the user's precision through Inductor, for the shapes of ``args``, names of the inputs whose number
    became part of it). tensors: what it will be called with, if not with the tensors of ``args``."""
    graph, _ = bind(captured, args)
    return inductor(graph, tensor_inputs(captured, args) if tensors is None else tensors), graph.meta["baked"]


def sizes_of(tensors: Sequence[torch.Tensor]) -> str:
    """2x4x32x32, scalar, 2x77x768"""
    return ", ".join("x".join(map(str, t.shape)) or "scalar" for t in tensors)


def build(request: Request) -> Ready | Refused:
    """plan -> refine -> insert -> lower -> judge -> watch. Each stage may refuse."""
    request = replace(request, recipe=covering(request.recipe, request.captured.layers))
    options, args, captured = request.options, request.args, request.captured
    tensors = _dense(tensor_inputs(captured, args))
    made = _Made(options.precision, sizes=sizes_of(tensors))
    start = time.perf_counter()
    lowering, refusal = choose(options, tensors[0].device if tensors else _device(captured))
    if lowering is None:
        return _refused(made, refusal or "")
    with _progress(options) as bar:
        graph, nodes = bind(captured, args)
        made = replace(made, baked=graph.meta["baked"])
        planned = planned_of(captured, request.recipe, options, lowering, nodes)
        if not planned.quantized:
            first = planned.decisions[0]
            why = f"no layer can be quantised ({first.layer.name}: {first.reason})"
            return replace(_as_they_are(request, planned, made, why), by_rule=True)
        bar("measuring kernels")
        last = [d.layer for d in planned.decisions if d.quantized][-1]
        planned = lowering.refine(planned, graph, nodes, tensors, options)
        made = replace(made, plan=planned, timings=replace(made.timings, choice_s=time.perf_counter() - start,
                                                           **planned.measured))
        if not planned.quantized:
            return _as_they_are(request, planned, made, lowering.none_left(next(d for d in planned.decisions if d.layer is last)))
        bar("compiling")
        quantized = insert(graph, nodes, planned.decisions, request.memory.codes)
        request.adapt()
        by_node = {nodes[d.layer.node].name: d for d in planned.decisions if d.quantized}
        watched = options.watch and tensors[0].device.type in drift.DEVICES
        counter = drift.counter(quantized, by_node, request.recipe) if watched else None  # before a lowering changes the graph
        read = {key(buffer) for _, buffer in quantized.named_buffers()}  # also by a call of a layer that stays in 16 bits
        leaving = [d.layer.weight for d in planned.decisions if d.quantized and options.weights == "release"]
        with pinning(leaving, request.memory.spare):
            lowered = lowering.lower(quantized, tensors, options)
        if counter is not None:  # it reads them when the step was called, and sleeps with it
            lowered = replace(lowered, constants=(*lowered.constants, *counter.constants))
        made = replace(made, timings=replace(made.timings, build_s=time.perf_counter() - start))
        bar("comparing with full precision")
        judged = _judge(request, tensors, planned.decisions, lowered, lowering, {n: nodes[n].name for n in nodes}, made, watched)
    if isinstance(judged, Refused):
        return _within_max_error(request, planned, judged)
    device = tensors[0].device.type
    unwatched = (f"drift, NaN and black pictures are not watched for on {device}: so far that is for "
                 f"{', '.join(drift.DEVICES)} only",) if options.watch and not watched else ()
    weights = [d.layer.weight for d in planned.decisions if d.quantized]
    reads = tuple(p for p in captured.constants.values() if key(p) in read)
    return replace(judged, notes=(*lowering.why(options, tensors[0].device), *lowered.notes, *unwatched),
                   replaced=tuple(w for w in weights if key(w) not in read),
                   reads=reads, read_from=tuple(map(key, reads)),
                   derived=None if lowered.derived is None else tuple(lowered.derived),
                   watch=None if counter is None else drift.watch(counter, tensors, judged.timings.step_ms))


def planned_of(captured: Captured, recipe: Recipe, options: Options, lowering: Lowering | None = None,
               nodes: Container[str] | None = None) -> Plan:
    """What rules and recipe say about each layer. nodes: of those whose results are used, where that is known."""
    device, may = _device(captured), lowering is None or lowering.free_convs
    decisions = plan(captured.layers, recipe, options.exclude, options.level, may and free_convs(device, options.precision),
                     options.two_codes, may and smooth_convs(device))
    used = tuple(d if nodes is None or d.layer.node in nodes else
                 Decision(d.layer, "16-bit", "nobody uses its result, so it is not computed") for d in decisions)
    return Plan(()).then("rules and recipe", used)


def _refused(made: _Made, reason: str, fallback: Callable[..., Any] | None = None) -> Refused:
    return Refused(**{f.name: getattr(made, f.name) for f in fields(_Made)}, reason=reason, fallback=fallback)


@torch.no_grad()
def _as_they_are(request: Request, planned: Plan, made: _Made, reason: str) -> Refused:
    """No layer is in 8 bits; each has a row with its reason."""
    return _refused(replace(made, layers=_layer_reports(request.captured, request.args, planned.decisions, {})), reason)


def _device(captured: Captured) -> torch.device:
    return next(iter(captured.constants.values())).device


def _dense(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """On a GPU as a CUDA graph holds them: a pipeline's timestep.expand(batch) is not dense."""
    return [t.detach().clone() for t in tensors] if tensors and tensors[0].is_cuda else tensors


@contextlib.contextmanager
def _progress(options: Options) -> Iterator[Callable[[str], None]]:
    """A bar of three stages on a terminal; nothing elsewhere. Yields what begins the next one."""
    from tqdm.auto import tqdm

    with tqdm(total=3, desc=f"sd_{options.precision}", disable=None, leave=False, bar_format="{desc} |{bar}| {elapsed}") as bar:
        def begin(stage: str) -> None:
            bar.set_description(f"sd_{options.precision}: {stage}")
            bar.update()

        yield begin


def _judge(request: Request, tensors: Sequence[torch.Tensor], decisions: Sequence[Decision], lowered: Lowered, lowering: Lowering,
           names: Mapping[str, str], made: _Made, watched: bool) -> Ready | Refused:
    """Use the step only if its first output is finite and inside its bound, and its time beats the 16-bit step."""
    captured, args, options = request.captured, request.args, request.options
    where = {d.layer.node: lowered.engines.get(names.get(d.layer.node, ""), lowering.name) for d in decisions}
    step = lowered.step
    with torch.no_grad():
        layers = _layer_reports(captured, args, decisions, where)
        full = captured.graph(*args)
        with measure.CountInt8() as counted:
            first = step(*tensors)
    step = _in_dtypes(step, first, full)
    if watched:
        step = drift.with_peaks(step, tensors[0].device)
    error, bound = measure.compare(first, full), measure.bound(options, full)
    ran = counted.flops if lowered.eight_bit_flops is None else lowered.eight_bit_flops
    made = replace(made, layers=layers, error=error, bound=bound, measured=lowering.counts,
                   eight_bit_flops=lowering.flops(ran, layers, decisions))
    if not all(bool(t.isfinite().all()) for t in measure.outputs(full)):
        return _refused(replace(made, error=None), "the model's own output is not finite on this input, so an 8-bit step cannot "
                                                   "be judged")
    if not error <= bound:
        what = "is not finite" if error == math.inf else f"differs by {error:.3f}"
        name, value = measure.bounded_by(options, bound)
        return _refused(made, f"the first 8-bit output {what} from the full-precision output on the same input, {name} is "
                              f"{value}")
    if lowering.graphed and tensors[0].is_cuda:
        step = Graphed(step, tensors, request.memory, lowered.constants)
        if not measure.compare(step(*tensors)[:len(full)], full) <= bound:
            return _refused(made, "the CUDA graph of the 8-bit step does not give what the step gives")
    made, slower, compiled = _raced(request, tensors, step, lowering, made)
    if slower is not None:
        return _refused(made, slower, compiled)
    return Ready(**{f.name: getattr(made, f.name) for f in fields(_Made)}, step=step)


def _in_dtypes(step: Callable[..., Any], first: Sequence[Any], full: Sequence[Any]) -> Callable[..., Any]:
    """``step`` with outputs in the dtypes of the module's own: under autocast 8-bit kernels write the dtype of the weights."""
    dtypes = [y.dtype if isinstance(y, torch.Tensor) else None for y in full]
    if dtypes == [y.dtype if isinstance(y, torch.Tensor) else None for y in first]:
        return step
    return lambda *tensors: [y if dtype is None else y.to(dtype) for y, dtype in zip(step(*tensors), dtypes, strict=True)]


def _raced(request: Request, tensors: Sequence[torch.Tensor], step: Callable[..., Any], lowering: Lowering,
           made: _Made) -> tuple[_Made, str | None, Callable[..., Any] | None]:
    """(with its times, why the step is not used, the compiled 16-bit step where one was made)."""
    if not lowering.timed:
        return made, None, None
    captured, args = request.captured, request.args
    eager_ms, step_ms = measure.step_ms(lambda: captured.graph(*args), lambda: step(*tensors))
    made = made.timed(eager_ms=eager_ms, step_ms=step_ms)
    if request.options.engine != "auto" or not lowering.may_be_slower(made.timings):
        return made, None, None
    if tensors[0].is_cuda and (pieces := in_pieces(bind(captured, args)[0], tensors)) is not None:
        made, ahead = _ahead(made, _warm(pieces, request, tensors, lowering), step, tensors)
        if ahead >= CLEARLY_AHEAD:
            return made, None, None
    compiled = _warm(unquantized(captured, args, tensors)[0], request, tensors, lowering)
    for _ in range(RACES):
        made, ahead = _ahead(made, compiled, step, tensors)
        if ahead >= 1:
            return made, None, None
    return made, (f"the 8-bit step takes {made.timings.step_ms:.2f} ms and the unquantised compiled step "
                  f"{made.timings.compile_ms:.2f} ms on these shapes"), compiled


def _warm(compiled: Callable[..., Any], request: Request, tensors: Sequence[torch.Tensor],
          lowering: Lowering) -> Callable[..., Any]:
    """It was called once, and is a CUDA graph where the 8-bit step is one."""
    compiled(*tensors)
    return Graphed(compiled, tensors, request.memory, ()) if lowering.graphed and tensors[0].is_cuda else compiled


def _ahead(made: _Made, compiled: Callable[..., Any], step: Callable[..., Any],
           tensors: Sequence[torch.Tensor]) -> tuple[_Made, float]:
    """(with the times of both, how many times as long the unquantised step takes)."""
    compile_ms, step_ms = measure.step_ms(lambda: compiled(*tensors), lambda: step(*tensors))
    return made.timed(compile_ms=compile_ms, step_ms=step_ms), compile_ms / step_ms


def _within_max_error(request: Request, planned: Plan, refused: Refused) -> Ready | Refused:
    """The step again, with layers in the user's precision that bring too much of the error; ``refused`` where that is no way."""
    options, error = request.options, refused.error
    if error is None or not refused.bound < error < math.inf or request.budgeted:
        return refused
    name, value = measure.bounded_by(options, refused.bound)
    flops = {layer.name: layer.flops for layer in refused.layers}
    smaller = budget.within(request.captured, request.args, request.recipe, planned.decisions, flops, error, refused.bound,
                            f"{name}={value:g}")
    if smaller is None:
        return refused
    again = build(replace(request, recipe=smaller, budgeted=True))
    kept = sum(la.keep is not None for la in smaller.layers.values())
    return replace(again, notes=(*again.notes, f"with every layer in 8 bits the first output differed by {error:.3f}, {name} "
                                               f"is {value}: {kept} layers stay in their own precision"))


def _layer_reports(captured: Captured, args: Sequence[Any], decisions: Sequence[Decision],
                   where: Mapping[str, str]) -> tuple[LayerReport, ...]:
    """One row per layer, its noise measured on the input that the unquantised graph feeds it."""
    by_node = {d.layer.node: d for d in decisions}
    names, constants = captured.layer_names(), {n for i, n in enumerate(captured.placeholders()) if i in captured.constants}
    others = {w.node: w for w in work.weighted(captured.graph.graph, lambda n: n in constants or n.op == "get_attr")
              if w.node.name not in names}
    rows: list[LayerReport] = []

    class Measure(Observer):
        def run_node(self, n: fx.Node) -> Any:
            self.current = n
            y = super().run_node(n)
            if n in others:
                rows.append(_other_row(others[n], captured, work.flops(n, y, *self.fetch_args_kwargs_from_env(n)), y))
            return y

    def see(name: str, op: str, channel_axis: int, arguments: tuple[Any, ...]) -> None:
        n = observer.current.name
        d = by_node[n]
        sqnr, flops = measure.layer_noise(d, arguments, observer.current.target)  # type: ignore[arg-type]
        precision = d.precision if d.quantized else _dtype(d.layer.weight)
        rows.append(LayerReport(name, op, tuple(d.layer.weight.shape), precision, where[n] if d.quantized else "inductor",
                                d.reason, d.amax if d.quantized else None, sqnr, flops, rotations=d.rotations))

    observer = Measure(captured.graph, names, see)
    observer.run(*args)
    return tuple(rows)


def _other_row(found: work.Work, captured: Captured, flops: int, result: Any) -> LayerReport:
    """The row of an operation with a weight that is no layer of the plan."""
    name = layer_name(found.name)
    row = found.kept(flops, _dtype(result) if isinstance(result, torch.Tensor) else "")
    return replace(row, name=name, reason=captured.unquantizable.get(name, row.reason))


def _dtype(t: torch.Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")

"""``sd_int8`` and ``sd_fp8``: the stages, one line each. This file alone connects them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from . import budget, drift, measure
from .assign import assign, attentions_in_fp8, kernels_ms
from .calibrate import Observer
from .capture import Captured, bind, capture, tensor_inputs
from .engine import installed
from .errors import ModelError, OptionError
from .fx import inductor, propagate
from .graphs import Graphed, Memory
from .kernels import chooser
from .lower import LOWERINGS, choose
from .options import Options
from .quantize import for_engine, for_torchao, free_convs, insert, plan
from .recipe import Recipe
from .rules import BY_CALL
from .run import CALIBRATING, Built, ModuleState, Step, state_of
from .timesteps import number_for_timestep
from .values import Decision, LayerReport
from .weights import key

log = logging.getLogger("sdtrt_backend")

# torch.compile on the CPU was never seen to be twice as fast as eager on a denoiser (1.1x to 1.4x). An 8-bit step at
# least this much faster than eager needs no comparison with the compiled 16-bit step, which costs a whole compilation.
CLEARLY_FASTER = 2.0


def sd_int8(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
            **_: Any) -> Callable[..., Any]:
    """The ``torch.compile`` backend with int8 kernels. ``options``: see ``Options``."""
    return _backend(gm, example_inputs, Options.parse(options, "int8"))


def sd_fp8(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
           **_: Any) -> Callable[..., Any]:
    """The same with float8_e4m3fn, and int8 where that was measured to be faster. NVIDIA GPUs of capability 8.9 or newer."""
    return _backend(gm, example_inputs, Options.parse(options, "fp8"))


def _backend(gm: fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Callable[..., Any]:
    captured = capture(gm, example_inputs)
    if any(p.is_meta for p in captured.constants.values()):
        raise ModelError.on_meta("the module")
    if not captured.layers:
        return _inductor(gm, example_inputs)
    state = _state(captured, parsed)
    for name, why in captured.unquantizable.items():
        state.say(state.notes, f"{name} stays in its own precision: {why}")
    if number_for_timestep([n.name for n in gm.graph.find_nodes(op="placeholder")], example_inputs):
        state.refuse("the timestep comes as a Python number, and every value of it would be a step of its own: pass a tensor, "
                     "torch.tensor(t)")
        return _inductor(gm, example_inputs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in example_inputs if isinstance(t, torch.Tensor)):
        state.keep_weights()
        state.say(state.fallbacks, "gradients are enabled and the weights or inputs require them, and 8-bit kernels have none: "
                                   "this call runs unquantised; for inference call the module under torch.no_grad()")
        return _inductor(gm, example_inputs)
    return Step(captured, state, build, unquantized, lambda args: _step(gm, args, parsed))


def _step(gm: fx.GraphModule, args: Sequence[Any], parsed: Options) -> Step:
    """A step for another module with the same graph: Dynamo runs one compiled function for all modules of one structure."""
    captured = capture(gm, args)
    return Step(captured, _state(captured, parsed), build, unquantized, lambda args: _step(gm, args, parsed))


def _state(captured: Captured, parsed: Options) -> ModuleState:
    """The module's state, with the recipe that the options name."""
    if parsed.recipe is None:
        check_made_for(parsed, None)
    state = state_of(captured, parsed)
    if parsed.recipe is not None and state.recipe is None:
        recipe = Recipe.load(parsed.recipe)
        recipe.check_model(captured.fingerprints())
        check_made_for(parsed, recipe)
        state.recipe = recipe
    if state.status == CALIBRATING:
        _, refusal = choose(parsed, next(iter(captured.constants.values())).device)
        if refusal is not None:
            state.refuse(refusal)
    return state


def check_made_for(parsed: Options, recipe: Recipe | None) -> None:
    """Raise OptionError for what only ``calibrate`` can do, unless the recipe was made with it."""
    if recipe is None and parsed.rule in BY_CALL:
        raise OptionError.counts_calls(parsed.rule)
    target = 0.0 if recipe is None else recipe.provenance.get("min_psnr", {}).get("target_db", 0.0)
    if parsed.min_psnr is not None and target < parsed.min_psnr:
        raise OptionError.needs_pictures(parsed.min_psnr)


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """What torch.compile does by itself, called by Dynamo while it compiles, with gradients where they are enabled."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Callable[..., Any], compile_fx(gm, list(example_inputs)))


def unquantized(captured: Captured, args: Sequence[Any], tensors: Sequence[torch.Tensor] | None = None) -> Callable[..., Any]:
    """The captured graph in the user's precision through Inductor, for the shapes of ``args``. tensors: what it will be called
    with, if not with the tensors of ``args``."""
    graph, _ = bind(captured, args)
    return inductor(graph, tensor_inputs(captured, args) if tensors is None else tensors)


def build(captured: Captured, args: Sequence[Any], recipe: Recipe, options: Options, memory: Memory,
          budgeted: bool = False) -> Built:
    """Recipe and graph -> an 8-bit step for the shapes of ``args``, measured on ``args``, or the reason why not.

    budgeted: the recipe names layers that stay unquantised for ``max_error``.
    """
    tensors = tensor_inputs(captured, args)
    if tensors[0].is_cuda:  # dense, as a CUDA graph holds them: a pipeline's timestep.expand(batch) is not
        tensors = [t.detach().clone() for t in tensors]
    start = time.perf_counter()
    target, refusal = choose(options, tensors[0].device)
    free = free_convs(tensors[0].device, options.precision) and target != "torchao"  # whose product takes one code
    decisions = plan(captured.layers, recipe, options.exclude, options.level, free, options.two_codes)
    if not any(d.quantized for d in decisions):
        return Built(None, f"no layer can be quantised ({decisions[0].layer.name}: {decisions[0].reason})")
    if refusal is not None:
        return Built(None, refusal)
    timings: dict[str, float] = {}
    bar = _progress(options)
    graph, nodes = bind(captured, args)
    if target == "tensorrt":
        decisions = tuple(for_engine(d, options.precision, installed() or "") for d in decisions)
    elif target == "inductor-cuda":
        propagate(graph, tensors)
        measured = chooser(tensors[0].device)
        decisions = assign(decisions, nodes, measured, options.precision, options.engine == "inductor", bar.update)
        if options.precision == "fp8" and options.level >= 4:
            timings["fp8_attentions"] = float(len(attentions_in_fp8(graph, tensors, measured)))
        timings["16-bit_kernels_ms"] = kernels_ms(graph, measured)
        timings["choice_s"] = time.perf_counter() - start
        bar.n = 1
        if not any(d.quantized for d in decisions):
            return Built(None, f"no 8-bit kernel is faster than the 16-bit one on these shapes ({decisions[-1].reason})")
    elif target == "torchao":
        propagate(graph, tensors)
        decisions = tuple(for_torchao(d, nodes[d.layer.source].meta["val"]) for d in decisions)
        if not any(d.quantized for d in decisions):
            return Built(None, f"TorchAO runs no layer of this module ({decisions[-1].layer.name}: {decisions[-1].reason})")
    elif options.precision == "fp8":
        decisions = tuple(replace(d, precision="fp8") if d.quantized else d for d in decisions)
    bar.set_description(f"sd_{options.precision}: compiling")
    quantized = insert(graph, nodes, decisions, memory.codes)
    by_node = {nodes[d.layer.node].name: d for d in decisions if d.quantized}
    watched = options.watch and tensors[0].device.type in drift.DEVICES
    counter = drift.counter(quantized, by_node, recipe) if watched else None  # before a lowering changes the graph
    read = {key(buffer) for _, buffer in quantized.named_buffers()}  # also by a call of the same layer that stays in 16 bits
    step = LOWERINGS[target](quantized, tensors, options)
    engines = getattr(step, "engines", {})
    where = {d.layer.node: engines.get(nodes[d.layer.node].name, target) for d in decisions}
    timings["build_s"] = time.perf_counter() - start
    bar.n = 2
    bar.set_description(f"sd_{options.precision}: comparing with full precision")
    built = _judge(captured, args, tensors, decisions, step, target, where, options, timings, memory)
    built = replace(built, replaced=tuple(w for w in built.replaced if key(w) not in read))
    if built.step is None and built.error is not None and options.max_error < built.error < math.inf and not budgeted:
        flops = {layer.name: layer.flops for layer in built.layers}
        smaller = budget.within(captured, args, recipe, decisions, flops, built.error, options)
        if smaller is not None:
            bar.close()
            again = build(captured, args, smaller, options, memory, True)
            said = (f"with every layer in 8 bits the first output differed by {built.error:.3f}, max_error is "
                    f"{options.max_error}: {sum(la.keep is not None for la in smaller.layers.values())} layers stay in their own "
                    "precision")
            return replace(again, notes=(*again.notes, said))
    unwatched = (f"drift, NaN and black pictures are not watched for on {tensors[0].device.type}: so far that is for "
                 f"{', '.join(drift.DEVICES)} only",) if options.watch and not watched else ()
    built = replace(built, notes=(*_lane(options, tensors[0].device), *getattr(step, "notes", ()), *unwatched))
    if counter is not None and built.step is not None:
        built = replace(built, watch=drift.watch(counter, tensors, timings.get(f"sd_{options.precision}_ms")))
    bar.n = bar.total
    bar.close()
    return built


def _lane(options: Options, device: torch.device) -> tuple[str, ...]:
    """Which way the step takes, where that was left to us."""
    if options.engine != "auto":
        return ()
    why = "TensorRT engines are built where engine='tensorrt' asks for them"
    if device.type != "cuda":
        why = "TensorRT engines run on NVIDIA GPUs only"
    elif installed() is None:
        why = "no TensorRT is installed"
    return (f"the step runs through Inductor: {why}",)


def _progress(options: Options) -> Any:
    """A bar of three stages (kernels measured, compiled, compared) on a terminal; nothing elsewhere."""
    from tqdm.auto import tqdm

    return tqdm(total=3, desc=f"sd_{options.precision}: measuring kernels", disable=None, leave=False,
                bar_format="{desc} |{bar}| {elapsed}")


def _judge(captured: Captured, args: Sequence[Any], tensors: Sequence[torch.Tensor], decisions: Sequence[Decision],
           step: Callable[..., Any], target: str, where: Mapping[str, str], options: Options, timings: dict[str, float],
           memory: Memory) -> Built:
    """Use the step only if its first output is finite and inside ``max_error``, and its time beats the 16-bit step.

    tensors: the inputs of ``step``, which are those of ``args``.
    """
    with torch.no_grad():
        layers = _layer_reports(captured, args, decisions, where)
        full = captured.graph(*args)
        with measure.CountInt8() as counted:
            first = step(*tensors)
    error = measure.compare(first, full)
    if not all(bool(t.isfinite().all()) for t in measure.outputs(full)):
        return Built(None, "the model's own output is not finite on this input, so an 8-bit step cannot be judged", layers)
    if not error <= options.max_error:
        what = "is not finite" if error == float("inf") else f"differs by {error:.3f}"
        return Built(None, f"the first 8-bit output {what} from the full-precision output on the same input, "
                           f"max_error is {options.max_error}", layers, error)
    # what runs inside an engine is not seen from outside: its layers count as planned
    counted.flops += sum(layer.flops for layer in layers if layer.engine == "tensorrt")
    if target == "inductor":  # the second product of two codes is no work of the model's
        twice = {d.layer.name for d in decisions if d.two_codes}
        counted.flops -= sum(layer.flops for layer in layers if layer.name in twice)
    share = counted.flops / max(1, sum(layer.flops for layer in layers))
    if target != "reference" and tensors[0].is_cuda:
        step = Graphed(step, tensors, memory)
        if not measure.compare(step(*tensors), full) <= options.max_error:
            return Built(None, "the CUDA graph of the 8-bit step does not give what the step gives", layers, error)
    replaced = tuple(d.layer.weight for d in decisions if d.quantized)
    built = Built(step, None, layers, error, share if target != "reference" else 0.0, timings, replaced)
    if target == "reference":
        return built
    mine = f"sd_{options.precision}_ms"
    timings["eager_ms"], timings[mine] = measure.step_ms(lambda: captured.graph(*args), lambda: step(*tensors))
    if options.engine == "auto" and _may_be_slower(timings, mine, target):
        compiled = unquantized(captured, args, tensors)
        compiled(*tensors)
        if target == "inductor-cuda":
            compiled = Graphed(compiled, tensors, memory)
        timings["compile_ms"], timings[mine] = measure.step_ms(lambda: compiled(*tensors), lambda: step(*tensors))
        if timings["compile_ms"] < timings[mine]:
            return Built(None, f"the 8-bit step takes {timings[mine]:.2f} ms and the unquantised compiled step "
                               f"{timings['compile_ms']:.2f} ms on these shapes", layers, error, None, timings)
    return built


def _may_be_slower(timings: Mapping[str, float], mine: str, target: str) -> bool:
    """Whether the 8-bit step must be compared with the compiled 16-bit step, which costs a whole compilation more.

    On a GPU not when it is faster than the 16-bit matrix products, convolutions and attention alone, which torch.compile
    calls as they are; on the CPU not when it is CLEARLY_FASTER than eager.
    """
    if target == "inductor-cuda":
        return timings[mine] >= timings["16-bit_kernels_ms"]
    return timings["eager_ms"] < CLEARLY_FASTER * timings[mine]


def _layer_reports(captured: Captured, args: Sequence[Any], decisions: Sequence[Decision],
                   where: Mapping[str, str]) -> tuple[LayerReport, ...]:
    """One row per layer, its noise measured on the input that the unquantised graph feeds it."""
    by_node = {d.layer.node: d for d in decisions}
    rows: list[LayerReport] = []

    class Measure(Observer):
        def run_node(self, n: fx.Node) -> Any:
            self.current = n
            return super().run_node(n)

    def see(name: str, op: str, channel_axis: int, arguments: tuple[Any, ...]) -> None:
        n = observer.current.name
        d = by_node[n]
        sqnr, flops = measure.layer_noise(d, arguments, observer.current.target)  # type: ignore[arg-type]
        precision = d.precision if d.quantized else str(d.layer.weight.dtype).removeprefix("torch.")
        rows.append(LayerReport(name, op, tuple(d.layer.weight.shape), precision, where[n] if d.quantized else "inductor",
                                d.reason, d.amax if d.quantized else None, sqnr, flops))

    observer = Measure(captured.graph, captured.layer_names(), see)
    observer.run(*args)
    return tuple(rows)

"""``autoquant``: TorchAO's 8-bit schemes timed on a module's own linear shapes; the fastest inside an error bound is applied.

Every distinct (input rows, weight shape, dtype) that counts is compiled and timed once per scheme, alone, on an input that the
module gave it. The error is measured on every layer. At the end the whole module is timed: a plan slower than plain
``torch.compile`` is emptied. What was found is a plan, a JSON file that another process applies without timing anything.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .errors import ModelError, OptionError, PlanError, require_torchao
from .files import read_json, write_json
from .kernels import graph_ms
from .measure import finish_device, step_ms
from .recipe import versions
from .stats import TINY_AMAX, sqnr_db
from .store import processor
from .values import INT8_MAX

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
MIN_SQNR = 30.0  # dB: 3 % of the output's norm
LAYER_REPEATS, MODULE_REPEATS = 15, 10
GAIN = 0.95  # a scheme must win by a twentieth: less is the noise of a timing
NEGLIGIBLE = 1e-3  # share of the linears' work: layers of a shape that has less are not worth the timing
OWN = "own precision"


@dataclass(frozen=True)
class Candidate:
    """One scheme. capability: of the GPU it needs; cpu: whether it is tried on the CPU; config: amax, dimensions and device of
    the layer's input -> TorchAO's configuration."""

    capability: tuple[int, int]
    cpu: bool
    config: Callable[[float, int, torch.device], Any]


# set_inductor_config=False: applying a plan changes nothing outside the module
def _int8_weight_only(amax: float, dims: int, device: torch.device) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int8_dynamic(amax: float, dims: int, device: torch.device) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _int8_static(amax: float, dims: int, device: torch.device) -> Any:
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor

    scale = torch.full((1,) * dims, max(amax, TINY_AMAX) / INT8_MAX, device=device)
    return Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=[PerTensor(), PerRow()],
                                                set_inductor_config=False)


def _float8(granularity: str, amax: float, dims: int, device: torch.device) -> Any:
    from torchao import quantization

    return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=getattr(quantization, granularity)(),
                                                                  set_inductor_config=False)


CANDIDATES: dict[str, Candidate] = {
    "int8_weight_only": Candidate((8, 0), True, _int8_weight_only),
    "int8_dynamic": Candidate((8, 0), True, _int8_dynamic),
    "int8_static": Candidate((8, 0), False, _int8_static),
    "float8_rowwise": Candidate((9, 0), False, partial(_float8, "PerRow")),
    "float8_tensorwise": Candidate((8, 9), False, partial(_float8, "PerTensor")),
}


@dataclass(frozen=True)
class LinearChoice:
    """What one linear got. weight: [out, in]; shape: key of the timings; sqnr_db: of its output; amax and dims of the input it
    was seen with."""

    candidate: str
    weight: tuple[int, int]
    shape: str
    sqnr_db: float
    amax: float
    dims: int


@dataclass(frozen=True)
class AutoquantPlan:
    """layers: path -> choice, those that stay as they are left out; times: shape -> candidate -> milliseconds of one compiled
    layer; module_ms: of the whole compiled module, with and without the plan; verdict: what was found, in a sentence."""

    environment: Mapping[str, str]
    min_sqnr: float
    layers: Mapping[str, LinearChoice]
    times: Mapping[str, Mapping[str, float]]
    module_ms: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""

    def config(self, device: torch.device) -> Any:
        """The same as TorchAO's FqnToConfig, for ``quantize_(module on device, plan.config(device), filter_fn=None)``."""
        from torchao.quantization import FqnToConfig

        return FqnToConfig(OrderedDict((name, CANDIDATES[c.candidate].config(c.amax, c.dims, device))
                                       for name, c in self.layers.items()))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, atomically."""
        path = Path(path)
        write_json(path, SCHEMA, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AutoquantPlan:
        """Read what ``save`` wrote. Raises PlanError when it is missing, truncated, edited or of a newer schema."""
        body = read_json(Path(path), SCHEMA, partial(PlanError.unreadable, path))
        del body["schema"]
        try:
            layers = {name: LinearChoice(**{**c, "weight": tuple(c["weight"])}) for name, c in body.pop("layers").items()}
            return cls(layers=layers, **body)
        except (KeyError, TypeError, AttributeError) as error:
            why = f"{Path(path).name} has not the form of its schema ({type(error).__name__}: {error})"
            raise PlanError.unreadable(path, why) from None

    def check(self, module: nn.Module) -> None:
        """Raise PlanError unless the plan was made on this hardware with these versions, for linears that ``module`` has."""
        here = environment(_device(module))
        for what in sorted(here.keys() | self.environment.keys()):
            if self.environment.get(what) != here.get(what):
                raise PlanError.elsewhere(what, self.environment.get(what), here.get(what))
        linears = _linears(module)
        for name, choice in self.layers.items():
            found = tuple(linears[name].weight.shape) if name in linears else "none"
            if found != choice.weight:
                raise PlanError.other_module(name, choice.weight, found)

    def apply(self, module: nn.Module) -> None:
        """Quantise ``module`` in place; timings are not needed. Raises PlanError, with the module unchanged, as ``check``."""
        from torchao.quantization import quantize_

        self.check(module)
        if self.layers:
            quantize_(module, self.config(_device(module)), filter_fn=None)

    def __str__(self) -> str:
        chosen = {name: sum(c.candidate == name for c in self.layers.values()) for name in CANDIDATES}
        rows = [f"{shape:44} " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
                for shape, times in self.times.items()]
        return "\n".join([self.verdict, ", ".join(f"{n} {name}" for name, n in chosen.items() if n), *rows])


def autoquant(module: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | None = None, *,
              candidates: Iterable[str] | None = None, min_sqnr: float = MIN_SQNR,
              plan: AutoquantPlan | str | os.PathLike[str] | None = None) -> AutoquantPlan:
    """Quantise in place the linears of ``module`` that TorchAO makes faster under ``torch.compile``; returns the plan.

    example_inputs: positional arguments, or keyword arguments as a dict, of a real call; candidates: names of ``CANDIDATES``,
    by default those that this hardware has; min_sqnr: least signal to quantisation noise of a layer's output, dB; plan: one made
    before, or its file, applied without timing anything.
    Compile the module afterwards. Raises OptionError, PlanError and ModelError with the module unchanged.
    """
    require_torchao("autoquant")
    if plan is not None:
        made = plan if isinstance(plan, AutoquantPlan) else AutoquantPlan.load(plan)
        made.apply(module)
        return made
    if not isinstance(example_inputs, tuple | list | Mapping):
        raise OptionError.example_inputs(example_inputs)
    from tqdm.auto import tqdm

    device = _device(module)
    names = _checked(candidates, device)
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    seen: dict[str, Seen] = {}
    with torch.no_grad(), _observed(module, names, seen):
        module(*args, **kwargs)
    work: dict[str, int] = {}
    for s in seen.values():
        work[s.shape] = work.get(s.shape, 0) + s.work
    counting = [shape for shape, mine in work.items() if mine > NEGLIGIBLE * sum(work.values())]
    times = {shape: _times(next(s for s in seen.values() if s.shape == shape), names, min_sqnr)
             for shape in tqdm(counting, "autoquant: timing layers", disable=None, leave=False)}
    layers = {name: choice for name, s in seen.items()
              if (choice := _choose(s, times.get(s.shape, {}), min_sqnr)) is not None}
    found = AutoquantPlan(environment(device), min_sqnr, layers, times)
    small = sum(s.shape not in times for s in seen.values())
    result = _judged(module, found, len(seen) - small, partial(_call, args, kwargs))
    if small:
        result = replace(result, verdict=f"{result.verdict}; {small} linears with next to no work were not timed and stay as is")
    log.info("autoquant: %s", result.verdict)
    result.apply(module)
    return result


def environment(device: torch.device) -> dict[str, str]:
    """What a plan's times depend on: the processor's or the GPU's name and capability, torch's and TorchAO's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        name, capability = processor(), torch.backends.cpu.get_cpu_capability()
    return {"device": name, "capability": capability, **versions(("torch", "torchao"))}


@dataclass
class Seen:
    """One linear in one call of the module. work: its multiplications; x: its input, kept for the first layer of each shape;
    noise: candidate -> SQNR."""

    layer: nn.Linear
    shape: str
    work: int
    x: torch.Tensor | None
    amax: float
    dims: int
    noise: dict[str, float]


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.is_meta:
        raise ModelError.on_meta(type(module).__name__)
    return parameter.device


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Path -> linear with a plain floating-point weight; quantised ones are not ours."""
    return {name: m for name, m in module.named_modules()
            if type(m) is nn.Linear and type(m.weight) is nn.Parameter and m.weight.is_floating_point()}


def available(device: torch.device) -> list[str]:
    """Names of the candidates that run on ``device``."""
    if device.type == "cuda":
        have = torch.cuda.get_device_capability(device)
        return [name for name, c in CANDIDATES.items() if have >= c.capability]
    return [name for name, c in CANDIDATES.items() if c.cpu and device.type == "cpu"]


def _checked(candidates: Iterable[str] | None, device: torch.device) -> list[str]:
    valid = available(device)
    names = valid if candidates is None else [candidates] if isinstance(candidates, str) else list(candidates)
    for name in names:
        if name not in valid:
            raise OptionError.candidate(name, valid, CANDIDATES)
    return names


@contextmanager
def _observed(module: nn.Module, names: Sequence[str], seen: dict[str, Seen]) -> Iterator[None]:
    """While open, every linear that runs is also run in each candidate scheme, and its noise noted; the first call counts."""
    def hook(name: str, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor) -> None:
        if name in seen:
            return
        x = args[0] if args else kwargs["input"]
        rows = math.prod(x.shape[:-1])
        shape = f"{rows} x {x.shape[-1]} by {layer.out_features} {'' if layer.bias is None else 'bias '}{str(x.dtype)[6:]}"
        first = all(s.shape != shape for s in seen.values())
        entry = seen[name] = Seen(layer, shape, x.numel() * layer.out_features, x.detach().clone() if first else None,
                                  float(x.abs().max()), x.dim(), {})
        for candidate in names:
            noisy = _attempt(entry, candidate, lambda quantized: quantized(x))
            if noisy is not None and bool(noisy.isfinite().all()):
                entry.noise[candidate] = sqnr_db(noisy, y)

    handles = [layer.register_forward_hook(partial(hook, name), with_kwargs=True) for name, layer in _linears(module).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attempt(entry: Seen, candidate: str, use: Callable[[nn.Module], Any]) -> Any:
    """``use(the layer in the candidate's scheme)``, or None where TorchAO refuses the layer: it is no candidate then."""
    from torchao.quantization import quantize_

    layer = entry.layer
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    try:
        quantize_(twin, CANDIDATES[candidate].config(entry.amax, entry.dims, layer.weight.device))
        return use(twin)
    except Exception as refusal:  # which shapes a scheme takes is written nowhere
        if entry.x is not None:  # once for every shape
            log.info("autoquant: %s is no candidate for %s: %s", candidate, entry.shape, str(refusal).partition("\n")[0])
        return None


def _times(entry: Seen, names: Sequence[str], min_sqnr: float) -> dict[str, float]:
    """Milliseconds of the compiled layer, in its own precision and in every scheme that met the bound on this layer."""
    x = entry.x
    assert x is not None
    compiled = {OWN: _compiled(entry.layer, x)}
    for name in names:
        step = _attempt(entry, name, lambda layer: _compiled(layer, x)) if entry.noise.get(name, -1.0) >= min_sqnr else None
        if step is not None:
            compiled[name] = step
    if len(compiled) == 1:
        return {}
    if x.is_cuda:
        # replays of a CUDA graph: a single layer's launch from Python takes longer than the layer
        with torch.cuda.device_of(x):
            return {name: graph_ms([step]) for name, step in compiled.items()}
    return dict(zip(compiled, step_ms(*compiled.values(), repeats=LAYER_REPEATS), strict=True))


def _compiled(layer: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """The layer alone through torch.compile, warm. Its graph module has code of its own: Dynamo counts recompilations per code
    object, and stops compiling ``Linear.forward`` after a few."""
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    step = partial(torch.compile(fx.GraphModule({"layer": layer}, graph), dynamic=False), x)

    def run() -> Any:
        with torch.no_grad():
            return step()

    run()
    run()
    return run


def _choose(entry: Seen, times: Mapping[str, float], min_sqnr: float) -> LinearChoice | None:
    """The fastest scheme inside the bound on this layer; None when its own precision is as fast."""
    inside = [name for name in times if entry.noise.get(name, -1.0) >= min_sqnr]
    best = min(inside, key=times.__getitem__, default=None)
    if best is None or times[best] > GAIN * times[OWN]:
        return None
    out, width = entry.layer.weight.shape
    return LinearChoice(best, (out, width), entry.shape, entry.noise[best], entry.amax, entry.dims)


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Callable[..., Any]) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


def _judged(module: nn.Module, found: AutoquantPlan, linears: int, call: Callable[[Callable[..., Any]], Any]) -> AutoquantPlan:
    """The plan with the times of the whole module, emptied where plain torch.compile was faster."""
    def verdict(layers: Mapping[str, LinearChoice], module_ms: Mapping[str, float], sentence: str) -> AutoquantPlan:
        return AutoquantPlan(found.environment, found.min_sqnr, layers, found.times, module_ms, sentence)

    if not found.layers:
        return verdict({}, {}, f"none of {linears} linears is faster in 8 bits within {found.min_sqnr:g} dB: they stay as is")
    log.info("autoquant: %d of %d linears are faster alone; timing the whole module with and without", len(found.layers), linears)
    twin = copy.deepcopy(module)
    found.apply(twin)
    steps = [partial(call, torch.compile(m, dynamic=False)) for m in (module, twin)]
    for step in (*steps, *steps):
        step()
    finish_device()
    plain, planned = step_ms(*steps, repeats=MODULE_REPEATS)
    module_ms = {"torch.compile": plain, "plan": planned}
    figures = f"the compiled module takes {planned:.2f} ms with the plan and {plain:.2f} ms without"
    if planned > plain:
        return verdict({}, module_ms, f"{figures}, so the plan is empty and the module stays as it is")
    return verdict(found.layers, module_ms, f"{len(found.layers)} of {linears} linears in 8 bits: {figures}")

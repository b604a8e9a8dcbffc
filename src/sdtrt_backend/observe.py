"""What the inputs of quantisable layers are like, by the timestep the model receives: statistics, and the recipe they make.

``observed`` sees a module through forward hooks, ``Observer`` a captured graph.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from . import names, stats
from .errors import CalibrationError
from .options import FITTED, Options
from .recipe import LayerRecipe, Recipe, fingerprint, model_hash, versions
from .rules import MODULES, OPS, SIDE_BRANCH, AmaxByTimestep, range_rule
from .timesteps import TIMESTEP_NAMES, Buckets, Trajectories, timestep_value

ALPHA_OPTIONS = {"linear": "alpha", "conv2d": "alpha_conv"}
FITTED_OP = "conv2d"  # operations whose smoothing may be fitted: their inputs' power is observed


@dataclass
class InputStats:
    """One tensor at one timestep, over calls: channel amax (max, min, sum) [channels], tensor amax, |x| histogram."""

    channel_max: torch.Tensor
    channel_min: torch.Tensor
    channel_sum: torch.Tensor
    tensor_max: float
    tensor_min: float
    tensor_sum: float
    histogram: torch.Tensor
    count: int = 1

    @classmethod
    def of_call(cls, channels: torch.Tensor, histogram: torch.Tensor) -> InputStats:
        """One call. channels: amax [channels]; histogram: counts [stats.BINS]."""
        amax = float(channels.max())
        return cls(channels, channels, channels, amax, amax, amax, histogram)

    def merge(self, other: InputStats) -> None:
        """Take in the calls of ``other``: associative and commutative, but for the rounding of sums."""
        self.channel_max = torch.maximum(self.channel_max, other.channel_max)
        self.channel_min = torch.minimum(self.channel_min, other.channel_min)
        self.channel_sum = self.channel_sum + other.channel_sum
        self.tensor_max, self.tensor_min = max(self.tensor_max, other.tensor_max), min(self.tensor_min, other.tensor_min)
        self.tensor_sum += other.tensor_sum
        self.histogram = self.histogram + other.histogram
        self.count += other.count


@dataclass
class Calibration:
    """Streaming statistics: memory grows with layers and timesteps, not with samples.

    total_step: calls of a trajectory for rules of ``rules.BY_CALL``, whose timestep is the count of calls modulo this; else 0.
    inputs: group -> timestep -> InputStats; ranges: group -> (smallest, largest value) [channels] over all calls; power: group ->
    sum over calls of the mean square [channels], of groups that begin with a convolution; weights: layer -> WeightStats; rotated:
    group -> amax of the rotated tensor (``stats.rotate``) over all calls, where that can be, of groups of one layer;
    group_of: layer -> group (the first layer that reads the same tensor); roles: layer -> ``roles``, where there is a graph.
    """

    total_step: int = 0
    inputs: dict[str, dict[float, InputStats]] = field(default_factory=dict)
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    power: dict[str, torch.Tensor] = field(default_factory=dict)
    rotated: dict[str, float] = field(default_factory=dict)
    group_of: dict[str, str] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    weights: dict[str, stats.WeightStats] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    buckets: Buckets = field(default_factory=Buckets)
    trajectories: Trajectories = field(default_factory=Trajectories)
    _bucket: float = 0.0
    _shared: set[str] = field(default_factory=set)
    _seen: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buckets.limit = max(self.buckets.limit, self.total_step)  # rules by call are number for number

    def start_call(self, timestep: float) -> None:
        """Before each forward of the denoiser."""
        self.trajectories.observe(timestep)
        at = (self.trajectories.calls - 1) % self.total_step if self.total_step else timestep
        self._bucket = self.buckets.key(at, self._merge)
        self._seen.clear()

    def _merge(self, gone: float, into: float) -> None:
        """Of every group: two timesteps are one from now on."""
        for at in self.inputs.values():
            if gone in at:
                self._add(at, into, at.pop(gone))

    @staticmethod
    def _add(at: dict[float, InputStats], timestep: float, more: InputStats) -> None:
        if timestep in at:
            at[timestep].merge(more)
        else:
            at[timestep] = more

    def observe(self, name: str, op: str, x: torch.Tensor, weight: torch.Tensor, channel_axis: int) -> None:
        """Record input ``x`` of layer ``name``; layers handed the same tensor object share one record. An ``x`` without elements
        tells nothing and is passed over."""
        if not x.numel():
            return
        if name not in self.ops:
            self.ops[name] = op
            self.fingerprints[name] = fingerprint(weight)
            self.weights[name] = stats.WeightStats.of(weight)
        tensor = (id(x), 0 if x.is_inference() else x._version)  # written in place, it is another tensor
        seen = self._seen.get(tensor)
        first = seen is None or seen[0]() is not x  # a dead tensor's id may have been given to this one
        if first:
            seen = self._seen[tensor] = (weakref.ref(x), self.group_of.get(name, name))
        assert seen is not None
        self.group_of.setdefault(name, seen[1])
        if not first:
            self._shared.add(seen[1])
            return
        low, high = stats.channel_range(x, channel_axis)
        channels = torch.maximum(low.abs(), high.abs())
        if not bool(channels.isfinite().all()):
            self.nonfinite[name] = self.nonfinite.get(name, 0) + 1
            return
        histogram = stats.log_histogram(x)
        group = self.group_of[name]
        known = self.ranges.get(group, (low, high))
        self.ranges[group] = torch.minimum(known[0], low), torch.maximum(known[1], high)
        if self.ops[group] == FITTED_OP:
            power = stats.channel_power(x, channel_axis)
            self.power[group] = self.power[group] + power if group in self.power else power
        alone = group not in self._shared  # as what attention gives is read; of fewer than three dimensions it is not
        if alone and op == "linear" and x.dim() > 2 and not x.shape[-1] % stats.ROTATED:
            self.rotated[group] = max(self.rotated.get(group, 0.0), float(stats.rotate(x.detach()).abs().max()))
        self._add(self.inputs.setdefault(group, {}), self._bucket, InputStats.of_call(channels, histogram))

    def timesteps(self) -> list[float]:
        """Every timestep seen, in the direction the model was stepped through: noisiest first."""
        return sorted(self.buckets.values, reverse=self.trajectories.direction <= 0 and not self.total_step)

    def amax(self, group: str) -> tuple[AmaxByTimestep, AmaxByTimestep]:
        """(per tensor [T], per channel [T, channels]) of a group, over the timesteps it ran at, noisiest first."""
        rows = [self.inputs[group][t] for t in self.timesteps() if t in self.inputs[group]]
        count, histogram = torch.tensor([float(r.count) for r in rows]), torch.stack([r.histogram for r in rows])
        tensor = AmaxByTimestep(torch.tensor([r.tensor_max for r in rows]), torch.tensor([r.tensor_min for r in rows]),
                                torch.tensor([r.tensor_sum for r in rows]), count, histogram)
        channel = AmaxByTimestep(torch.stack([r.channel_max for r in rows]), torch.stack([r.channel_min for r in rows]),
                                 torch.stack([r.channel_sum for r in rows]), count, histogram)
        return tensor, channel

    def recipe(self, options: Options, provenance: Mapping[str, Any]) -> Recipe:
        """Apply the range rule and SmoothQuant to what was observed: one factor per group, none where operations are mixed or one
        is a grouped convolution."""
        if not self.ops:
            raise CalibrationError("no quantisable layer ran during calibration: is this the pipeline's denoiser?")
        blind = sorted(name for name, group in self.group_of.items() if group not in self.inputs)
        if blind:
            raise CalibrationError(f"{len(blind)} layers saw nothing but NaN or infinite inputs ({', '.join(blind[:3])}, ...): "
                                   "check the weights and the latents, or run the pipeline in fp32")
        layers, smoothing, amaxes = {}, {}, {}
        for group in self.inputs:
            members = [name for name, g in self.group_of.items() if g == group]
            tensor, channel = self.amax(group)
            table = torch.zeros(len(self.buckets.values), 4)
            ran = torch.tensor([t in self.inputs[group] for t in self.timesteps()])
            table[ran] = torch.stack([tensor.maximum, tensor.minimum, tensor.total, tensor.count], 1)
            amaxes[group] = table
            ops = {self.ops[m] for m in members}
            rule = range_rule(options.rule, options.percentile, min(ops))  # of a convolution, if one is among them
            amax = plain = float(rule(tensor))
            s = torch.ones_like(channel.maximum[0])
            # a grouped convolution, which has no 8-bit kernel, has fewer input channels in its weight than in its input
            weights = [self.weights[m] for m in members]
            alike = len(ops) == 1 and all(len(w.amax) == len(s) for w in weights)
            alpha = getattr(options, ALPHA_OPTIONS[ops.pop()]) if alike else None
            if alpha is not None:
                if alpha == FITTED:  # to all that was seen: no channel has codes to spare
                    ends = -self.ranges[group][0], self.ranges[group][1]
                    channel_amax = stats.expected_amax(torch.maximum(*ends))
                    power = self.power[group] / sum(at.count for at in self.inputs[group].values())
                    s = stats.fitted_smoothing(channel_amax, power, weights, stats.range_span(channel_amax, ends))
                else:
                    channel_amax = rule(channel)
                    s = stats.smoothing_factor(channel_amax, torch.stack([w.amax for w in weights]).amax(0), alpha)
                smoothing[group], amax = s, float((channel_amax / s).max())
            # of its range as much as the rule takes of the range that is not rotated
            taken = plain / max(float(tensor.maximum.max()), stats.TINY_AMAX)
            rotated = self.rotated[group] * taken if group in self.rotated and len(members) == 1 else None
            low, high = float((self.ranges[group][0] / s).min()), float((self.ranges[group][1] / s).max())
            for name in members:
                layers[name] = LayerRecipe(self.ops[name], self.fingerprints[name], group, amax, alpha, plain, low, high,
                                           role=self.roles.get(name, ""), rotated_amax=rotated)
        facts = {"rule": options.rule, "percentile": options.percentile, "alpha": options.alpha,
                 "alpha_conv": options.alpha_conv, "versions": versions(),
                 "skipped_nonfinite": dict(sorted(self.nonfinite.items())), **provenance}
        return Recipe(model_hash(self.fingerprints.items()), layers, smoothing, amaxes, tuple(self.timesteps()), facts)


class Observer(torch.fx.Interpreter):
    """Runs a captured graph in the user's precision, operation by operation, and shows each layer's input."""

    def __init__(self, graph: torch.fx.GraphModule, names: Mapping[str, str],
                 see: Callable[[str, str, int, tuple[Any, ...]], None]) -> None:
        super().__init__(graph)
        self.names, self.see = names, see  # FX node name -> layer name

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.name in self.names:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            rule = OPS[n.target]
            full = tuple(args) + tuple(kwargs.get(key, default) for key, default in rule.arguments[len(args):])
            self.see(self.names[n.name], rule.name, rule.channel_axis, full)
        return super().run_node(n)


@contextlib.contextmanager
def observed(module: torch.nn.Module, calibration: Calibration, tick: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Forward hooks on every quantisable submodule while the context is open; removed however it ends."""
    signature = names.call_signature(module)

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}  # kwargs: a forward may collect them
        calibration.start_call(timestep_value(next((given[n] for n in TIMESTEP_NAMES if n in given), None)))

    def after(*_: Any) -> None:
        tick()

    def layer_hook(name: str, child: torch.nn.Module) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        rule = MODULES[type(child)]
        weight = child.get_parameter("weight")
        return lambda _, args, kwargs: calibration.observe(name, rule.name, args[0] if args else kwargs["input"], weight,
                                                           rule.channel_axis)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        for name, child in module.named_modules():
            if type(child) in MODULES and not fnmatchcase(name, SIDE_BRANCH):
                hook = layer_hook(names.layer_name(name), child)
                handles.append(child.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()

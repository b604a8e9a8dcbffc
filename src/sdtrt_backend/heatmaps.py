"""The report's charts: noise by layer and timestep, and how far the calibrated ranges reach. Values first, then Matplotlib draws.

Colours and lines carry the numbers, so every chart has its scale and its unit beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from . import measure
from .calibrate import Calibration, observed
from .errors import SdtrtError
from .quantize import free_convs, plan, smooth_convs
from .recipe import Recipe
from .report import Chart
from .rules import KEEP, MODULES, TWO_CODES_REASON
from .values import Decision, Layer, LayerReport

Array = np.ndarray[Any, np.dtype[np.float64]]

MAX_ROWS = 160  # of a heat map: more names than that are no longer read
CHARTS, MAX_CHARTS = 6, 24  # of layers: when nothing was asked for, and at most
DPI = 100
# where there is no value, and what lies between the largest and the smallest
GAP, BAND = "#e4e4e4", "#ececf4"
MAXIMUM, MEAN, MINIMUM, CLIP = "#b2182b", "#222222", "#2166ac", "#c87800"


@dataclass(frozen=True)
class Grid:
    """values: [rows, columns], NaN where there is none. rows: layer names; columns: timesteps."""

    rows: tuple[str, ...]
    columns: tuple[float, ...]
    values: Array


@dataclass(frozen=True)
class Ranges:
    """Input amax of a group of layers over calibration, by timestep [T], NaN where it did not run. clip: values beyond it are
    clipped; of a smoothed input that of its widest channel."""

    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    maximum: Array
    mean: Array
    minimum: Array
    clip: float
    smoothed: bool


class _Noise(Calibration):
    """Measures where a calibration would count: dB of every 8-bit layer, a row of ``found`` per call."""

    def __init__(self, module: torch.nn.Module, decisions: dict[str, Decision]) -> None:
        super().__init__()
        self.module, self.decisions = module, decisions
        self.columns: list[float] = []
        self.found: list[dict[str, float]] = []

    def start_call(self, timestep: float) -> None:
        self.columns.append(timestep)
        self.found.append({})

    def observe(self, name: str, op: str, x: torch.Tensor, weight: torch.Tensor, channel_axis: int) -> None:
        if name not in self.decisions:
            return
        layer: Any = self.module.get_submodule(name)
        convolution = op == "conv2d"
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups) if convolution else ()
        call = torch.nn.functional.conv2d if convolution else torch.nn.functional.linear
        noise, _ = measure.layer_noise(self.decisions[name], (x, weight, layer.bias, *geometry), call)
        self.found[-1][name] = math.nan if noise is None else noise


def noise_by_timestep(module: torch.nn.Module, recipe: Recipe, layers: Sequence[LayerReport],
                      calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> Grid:
    """SQNR in dB of each 8-bit layer's own output, on the inputs that ``calls`` of the unquantised module feed it.

    layers: of a report; calls: (args, kwargs), one per timestep, in the order they were made.
    """
    modules = dict(module.named_modules())
    decisions = {}
    for row in layers:
        kept, calibrated = modules.get(row.name), recipe.layers.get(row.name)
        if row.amax is None or calibrated is None or kept is None or type(kept) not in MODULES:
            continue
        layer = Layer(row.name, row.op, "", "", kept.get_parameter("weight"), getattr(kept, "groups", 1))
        (decision,) = plan((layer,), recipe, (), free_convs=free_convs(layer.weight.device, row.precision),
                           two_codes=(row.name,) if row.reason == TWO_CODES_REASON else (),
                           smooth_convs=smooth_convs(layer.weight.device))
        rotated, turned = row.rotations
        decision = replace(decision.with_rotated_input() if rotated else decision, turned=turned)
        decisions[row.name] = replace(decision, precision=row.precision)
    noise = _Noise(module, decisions)
    with torch.no_grad(), observed(module, noise):
        for args, kwargs in calls:
            module(*args, **kwargs)
    rows = tuple(name for name in decisions if any(name in found for found in noise.found))
    values = np.array([[found.get(name, math.nan) for found in noise.found] for name in rows])
    return Grid(rows, tuple(noise.columns), values.reshape(len(rows), len(noise.columns)))


def ranges(recipe: Recipe, pattern: str | None = None) -> list[Ranges]:
    """What calibration saw of each group with a layer that ``pattern`` matches, in the recipe's order; without one, of all but
    the layers that stay unquantised by their name.

    Raises SdtrtError when nothing matches or the recipe holds no ranges by timestep.
    """
    if not recipe.amax_by_timestep:
        raise SdtrtError("this recipe holds no ranges by timestep, so there is nothing to draw: make one with sdtrt calibrate")
    members: dict[str, list[str]] = {}
    for name, layer in recipe.layers.items():
        members.setdefault(layer.group, []).append(name)
    def wanted(name: str) -> bool:
        return not any(fnmatchcase(name, keep) for keep, _ in KEEP) if pattern is None else fnmatchcase(name, pattern)

    chosen = [group for group, names in members.items() if group in recipe.amax_by_timestep and any(map(wanted, names))]
    if not chosen:
        raise SdtrtError(f"no layer matches {pattern!r}; the recipe has {len(recipe.layers)}, for example "
                         f"{', '.join(list(recipe.layers)[:3])}; patterns are globs such as '*.to_q'")
    found = []
    for group in chosen:
        table = recipe.amax_by_timestep[group].double()
        ran = table[:, 3] > 0
        smoothing = recipe.smoothing.get(group)
        clip = recipe.layers[members[group][0]].amax * (1.0 if smoothing is None else float(smoothing.max()))
        columns = (table[:, 0], table[:, 2] / table[:, 3], table[:, 1])
        maximum, mean, minimum = (torch.where(ran, c, torch.full_like(c, math.nan)).numpy() for c in columns)
        found.append(Ranges(tuple(members[group]), recipe.timesteps, maximum, mean, minimum, clip, smoothing is not None))
    return found


def widest_first(found: Sequence[Ranges]) -> list[Ranges]:
    """Those whose range changes most over the timesteps first: where one range for all of them costs most."""
    def spread(r: Ranges) -> float:
        return float(np.nanmax(r.maximum) / max(float(np.nanmin(r.maximum)), 1e-12))

    return sorted(found, key=spread, reverse=True)


def reach(found: Sequence[Ranges]) -> Grid:
    """log2 of (largest amax seen at the timestep / clipping value): above 0 values were clipped, at -1 half the codes idle."""
    values = np.array([np.log2(np.maximum(r.maximum, 1e-12) / max(r.clip, 1e-12)) for r in found])
    return Grid(tuple(_title(r) for r in found), found[0].timesteps, values)


def number(value: float) -> str:
    """Three digits, four from 100 on."""
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def heat_map(grid: Grid, title: str, unit: str, low: float, high: float, colours: str = "viridis",
             label: Callable[[float], str] = number) -> Figure:
    """A cell per layer and timestep, coloured from ``low`` to ``high`` (beyond them as at them), with a colour bar in ``unit``
    whose values ``label`` writes. colours: a map of Matplotlib's. Of more than MAX_ROWS layers those with the lowest values are
    shown.
    """
    rows = list(range(len(grid.rows)))
    if len(rows) > MAX_ROWS:
        worst = sorted(rows, key=lambda r: float(np.nanmin(grid.values[r])))[:MAX_ROWS]
        rows, title = sorted(worst), f"{title}; the lowest {MAX_ROWS} of {len(rows)} layers"
    figure = Figure((10, 1.5 + 0.14 * max(len(rows), 12)), DPI, layout="constrained")
    axes = figure.subplots()
    cells = axes.pcolormesh(np.ma.masked_invalid(grid.values[rows]), cmap=colours, vmin=low, vmax=high, edgecolors="white",
                            linewidth=0.5)
    axes.set(facecolor=GAP, xlabel="timestep, noisiest first")
    axes.set_title(title, loc="left")
    axes.invert_yaxis()
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [grid.rows[r] for r in rows], fontsize=7)
    columns = range(0, len(grid.columns), -(-len(grid.columns) // 15) or 1)
    axes.set_xticks([x + 0.5 for x in columns], [number(grid.columns[x]) for x in columns], fontsize=8)
    figure.colorbar(cells, ax=axes, label=unit, anchor=(0, 1), shrink=min(1, 20 / max(len(rows), 1)),
                    format=FuncFormatter(lambda value, _: label(value)))
    return figure


def range_charts(found: Sequence[Ranges], columns: int = 3) -> Figure:
    """One small chart per group of layers: max, mean and min of amax over calls at each timestep, and the clipping value."""
    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    figure = Figure((4 * max(columns, 2), 0.5 + 2.4 * rows), DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    beyond = "clipped beyond" + (" (a smoothed input: its widest channel)" if any(r.smoothed for r in found) else "")
    for axes, r in zip(panels, found, strict=False):
        ran = ~np.isnan(r.maximum)
        at = np.array(r.timesteps)[ran]
        axes.fill_between(at, r.minimum[ran], r.maximum[ran], color=BAND)
        for name, values, colour in (("max over calls", r.maximum, MAXIMUM), ("mean", r.mean, MEAN), ("min", r.minimum, MINIMUM)):
            axes.plot(at, values[ran], color=colour, label=name)
        axes.axhline(r.clip, color=CLIP, linestyle="--", label=beyond)
        axes.set_title(_end(_title(r)), loc="left", fontsize=8)
        axes.set_xlabel("amax of the input, by timestep", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color=GAP)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_xaxis()
    for axes in panels[len(found):]:  # of the last row, when it is not full
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    return figure


def picture(figure: Figure) -> Image.Image:
    """RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def noise_chart(grid: Grid) -> Chart:
    """The heat map of ``noise_by_timestep``; its scale ends at multiples of 5 dB."""
    low, high = 5 * math.floor(float(np.nanmin(grid.values)) / 5), 5 * math.ceil(float(np.nanmax(grid.values)) / 5)
    image = picture(heat_map(grid, "Signal to quantisation noise of each 8-bit layer", "dB", low, max(high, low + 5)))
    return Chart("noise", "Noise by layer and timestep",
                 "Each layer alone in 8 bits, on the input that the unquantised model feeds it: output over quantisation "
                 "noise, in dB. Dark is noisy.", image)


def range_pages(recipe: Recipe, pattern: str | None = None) -> list[Chart]:
    """How far the inputs of the layers reached in calibration: a heat map of those that were asked for, and charts of the
    first MAX_CHARTS, or of the CHARTS whose range changes most where nothing was asked for."""
    found = ranges(recipe, pattern)
    shown = widest_first(found)[:CHARTS] if pattern is None else found[:MAX_CHARTS]
    which = "the range changes most over the timesteps" if pattern is None else f"a name matches {pattern}"
    more = f", the first {len(shown)} of {len(found)}" if pattern is not None and len(found) > len(shown) else ""
    mapped = found if len(found) <= MAX_ROWS else widest_first(found)[:MAX_ROWS]
    reached = heat_map(reach(mapped), "Largest input of each layer at each timestep, over its clipping value", "ratio", -1, 1,
                         "RdBu_r", lambda v: f"{2**v:.2g}x")
    cut = f" The {MAX_ROWS} of {len(found)} whose range changes most." if len(found) > MAX_ROWS else ""
    return [Chart("ranges", "Ranges by layer and timestep",
                  "The largest input that calibration saw, over the value beyond which it is clipped. Red was clipped; where it "
                  f"is blue the 8-bit codes were not used up.{cut}", picture(reached)),
            Chart("layers", "Ranges of single layers", f"Layers of which {which}{more}. Layers named together read one tensor.",
                  picture(range_charts(shown)))]


def _title(r: Ranges) -> str:
    return r.layers[0] + (f" and {len(r.layers) - 1} more" if len(r.layers) > 1 else "")


def _end(text: str, characters: int = 52) -> str:
    """The end of a module path tells layers apart."""
    return text if len(text) <= characters else "..." + text[-characters:]

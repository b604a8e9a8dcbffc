"""The report's charts: noise by layer and timestep, and how far the calibrated ranges reach. Values first, then Pillow draws.

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
from PIL import Image, ImageDraw, ImageFont

from . import measure
from .calibrate import Calibration, observed
from .errors import SdtrtError
from .quantize import free_convs, plan
from .recipe import Recipe
from .report import Chart
from .rules import KEEP, MODULES, TWO_CODES_REASON
from .values import Decision, Layer, LayerReport

Array = np.ndarray[Any, np.dtype[np.float64]]
Colour = tuple[int, int, int]

INK, FAINT, GAP = (34, 34, 34), (221, 221, 221), (240, 240, 240)
MAX_ROWS = 160  # of a heat map: more names than that are no longer read
CHARTS, MAX_CHARTS = 6, 24  # of layers: when nothing was asked for, and at most
# one hue per end; both are told apart by lightness alone
VIRIDIS: tuple[Colour, ...] = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
DIVERGING: tuple[Colour, ...] = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))
MAXIMUM, MEAN, MINIMUM, CLIP = (178, 24, 43), (34, 34, 34), (33, 102, 172), (200, 120, 0)
BAND = (236, 236, 244)


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
                           two_codes=(row.name,) if row.reason == TWO_CODES_REASON else ())
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


def heat_map(grid: Grid, title: str, unit: str, low: float, high: float, colours: Sequence[Colour] = VIRIDIS,
             label: Callable[[float], str] = number) -> Image.Image:
    """A cell per layer and timestep, coloured from ``low`` to ``high`` (beyond them as at them), with a colour bar in ``unit``
    whose values ``label`` writes. Of more than MAX_ROWS layers those with the lowest values are shown.
    """
    rows = list(range(len(grid.rows)))
    if len(rows) > MAX_ROWS:
        worst = sorted(rows, key=lambda r: float(np.nanmin(grid.values[r])))[:MAX_ROWS]
        rows, title = sorted(worst), f"{title}; the lowest {MAX_ROWS} of {len(rows)} layers"
    cell_w, cell_h = max(16, min(40, 800 // max(1, len(grid.columns)))), 13
    left, top = 18 + max((int(_font(11).getlength(grid.rows[r])) for r in rows), default=0), 58
    width, height = cell_w * len(grid.columns), cell_h * len(rows)
    bar = left + width + 24
    sheet = Image.new("RGB", (max(bar + 90, 24 + int(_font(15).getlength(title))), top + max(height, 180) + 50), "white")
    ink = ImageDraw.Draw(sheet)
    ink.text((12, 10), title, fill=INK, font=_font(15))
    for y, r in enumerate(rows):
        ink.text((left - 8, top + y * cell_h + cell_h // 2), grid.rows[r], fill=INK, font=_font(11), anchor="rm")
        for x, value in enumerate(grid.values[r]):
            colour = GAP if math.isnan(value) else _colour((value - low) / (high - low), colours)
            corner = (left + x * cell_w, top + y * cell_h)
            ink.rectangle((*corner, corner[0] + cell_w - 2, corner[1] + cell_h - 2), fill=colour)
    _timesteps(ink, grid.columns, left + cell_w / 2, cell_w, top + height + 4)
    ink.text((left + width / 2, top + height + 34), "timestep, noisiest first", fill=INK, font=_font(12), anchor="mm")
    ink.text((left - 8, top - 10), "layer", fill=INK, font=_font(12), anchor="rm")
    for y in range(160):
        ink.line((bar, top + y, bar + 16, top + y), fill=_colour(1 - y / 159, colours))
    for value in np.arange(low, high * (1 + 1e-9), _round_up((high - low) / 6)):
        tick = top + 159 - 159 * (value - low) / (high - low)
        ink.line((bar + 16, tick, bar + 20, tick), fill=INK)
        ink.text((bar + 24, tick), label(value), fill=INK, font=_font(11), anchor="lm")
    ink.text((bar, top - 10), unit, fill=INK, font=_font(12), anchor="lm")
    return sheet


def range_charts(found: Sequence[Ranges], columns: int = 3) -> Image.Image:
    """One small chart per group of layers: max, mean and min of amax over calls at each timestep, and the clipping value."""
    w, h, top = 400, 250, 44
    columns = min(columns, len(found))
    sheet = Image.new("RGB", (max(columns * w, 640), top + -(-len(found) // columns) * h), "white")
    ink = ImageDraw.Draw(sheet)
    x, beyond = 14.0, "clipped beyond" + (" (a smoothed input: its widest channel)" if any(r.smoothed for r in found) else "")
    for name, colour in (("max over calls", MAXIMUM), ("mean", MEAN), ("min", MINIMUM), (beyond, CLIP)):
        _line(ink, [(x, 20), (x + 24, 20)], colour, dashed=colour == CLIP)
        ink.text((x + 30, 20), name, fill=INK, font=_font(12), anchor="lm")
        x += 46 + _font(12).getlength(name)
    for i, r in enumerate(found):
        _range_chart(ink, r, i % columns * w, top + i // columns * h, w, h)
    return sheet


def noise_chart(grid: Grid) -> Chart:
    """The heat map of ``noise_by_timestep``; its scale ends at multiples of 5 dB."""
    low, high = 5 * math.floor(float(np.nanmin(grid.values)) / 5), 5 * math.ceil(float(np.nanmax(grid.values)) / 5)
    image = heat_map(grid, "Signal to quantisation noise of each 8-bit layer", "dB", low, max(high, low + 5))
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
    image = heat_map(reach(mapped), "Largest input of each layer at each timestep, over its clipping value", "ratio", -1, 1,
                     DIVERGING, lambda v: f"{2**v:.2g}x")
    cut = f" The {MAX_ROWS} of {len(found)} whose range changes most." if len(found) > MAX_ROWS else ""
    return [Chart("ranges", "Ranges by layer and timestep",
                  "The largest input that calibration saw, over the value beyond which it is clipped. Red was clipped; where it "
                  f"is blue the 8-bit codes were not used up.{cut}", image),
            Chart("layers", "Ranges of single layers", f"Layers of which {which}{more}. Layers named together read one tensor.",
                  range_charts(shown))]


def _range_chart(ink: ImageDraw.ImageDraw, r: Ranges, x0: int, y0: int, w: int, h: int) -> None:
    left, right, upper, lower = x0 + 56, x0 + w - 16, y0 + 26, y0 + h - 48
    step = _round_up(max(float(np.nanmax(r.maximum)), r.clip) / 4)
    top = 4 * step
    pitch = (right - left) / max(1, len(r.timesteps) - 1)

    def points(values: Array) -> list[tuple[float, float]]:
        return [(left + i * pitch, lower - (lower - upper) * v / top) for i, v in enumerate(values) if not math.isnan(v)]

    ink.text((x0 + 12, y0 + 10), _fit(_title(r), w - 24, 12), fill=INK, font=_font(12), anchor="lm")
    ink.polygon(points(r.maximum) + points(r.minimum)[::-1], fill=BAND)
    for part in range(5):
        y = lower - (lower - upper) * part / 4
        ink.line((left, y, right, y), fill=FAINT)
        ink.text((left - 6, y), number(part * step), fill=INK, font=_font(11), anchor="rm")
    for values, colour in ((r.minimum, MINIMUM), (r.maximum, MAXIMUM), (r.mean, MEAN)):
        _line(ink, points(values), colour)
    y = lower - (lower - upper) * r.clip / top
    _line(ink, [(left, y), (right, y)], CLIP, dashed=True)
    _timesteps(ink, r.timesteps, left, pitch, lower + 4)
    ink.text(((left + right) / 2, lower + 32), "amax of the input, by timestep", fill=INK, font=_font(11), anchor="mm")


def _title(r: Ranges) -> str:
    return r.layers[0] + (f" and {len(r.layers) - 1} more" if len(r.layers) > 1 else "")


def _timesteps(ink: ImageDraw.ImageDraw, timesteps: Sequence[float], first: float, pitch: float, y: float) -> None:
    """As many labels as there is room for."""
    every = max(1, math.ceil(40 / pitch))
    for i in range(0, len(timesteps), every):
        ink.line((first + i * pitch, y - 3, first + i * pitch, y), fill=INK)
        ink.text((first + i * pitch, y + 9), number(timesteps[i]), fill=INK, font=_font(11), anchor="mm")


def _line(ink: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: Colour, dashed: bool = False) -> None:
    if not dashed:
        ink.line(list(points), fill=colour, width=2)
        return
    (x0, y), (x1, _) = points
    for start in np.arange(x0, x1, 9.0):
        ink.line((start, y, min(start + 5, x1), y), fill=colour, width=2)


def _colour(share: float, colours: Sequence[Colour]) -> Colour:
    """Colour at ``share`` of the scale, 0..1, linear between the anchors."""
    at = min(max(share, 0.0), 1.0) * (len(colours) - 1)
    i = min(int(at), len(colours) - 2)
    a, b, c = (round(p + (q - p) * (at - i)) for p, q in zip(colours[i], colours[i + 1], strict=True))
    return a, b, c


def _round_up(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-12)))
    return next((m * power for m in (1.0, 2.0, 2.5, 5.0) if value <= m * power * (1 + 1e-9)), 10 * power)


def _fit(text: str, width: int, size: int) -> str:
    """``text`` with its beginning left out where it is too wide: the end of a module path tells layers apart."""
    if _font(size).getlength(text) <= width:
        return text
    while len(text) > 1 and _font(size).getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def _font(size: int) -> Any:
    return ImageFont.load_default(size)

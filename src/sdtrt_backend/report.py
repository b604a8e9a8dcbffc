"""Renderers: a Report as text and tables, the demo's result as JSON, a self-contained HTML page and a picture."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console, RenderableType
from rich.table import Table

from .metrics import Pictures
from .recipe import Recipe
from .values import LayerReport

WIDTH = 118


@dataclass(frozen=True)
class Watched:
    """What the drift watch counted. groups: layers that read one tensor -> shares (0..1) of its values beyond everything that
    calibration saw, on the build's input and on the last sampled calls."""

    calls: int
    samples: int
    groups: Mapping[tuple[str, ...], tuple[float, float]]

    def __str__(self) -> str:
        counts = f"{self.calls} calls in 8 bits watched, {self.samples} sampled"
        if not self.groups:
            return counts
        layers, (built, lately) = max(self.groups.items(), key=lambda group: group[1][1])
        return (f"{counts}: at most {lately:.2%} of what a layer reads lay "
                f"beyond its calibrated range ({layers[0]}, {built:.2%} when it was built)")


@dataclass(frozen=True)
class Chart:
    """A picture of the report and what it shows. name: of its file, without the suffix."""

    name: str
    heading: str
    text: str
    image: Image.Image


@dataclass(frozen=True)
class Report:
    """What became of a module. Times in ms per step or seconds; error is relative to the user's precision."""

    state: str
    layers: tuple[LayerReport, ...] = ()
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    quantized_flops_share: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    watched: Watched | None = None

    def __str__(self) -> str:
        return render_text(self)


def render_text(report: Report) -> str:
    """The report for a terminal: state, what was said, and one line per layer."""
    lines = [f"state: {report.state}"]
    if report.error is not None:
        lines.append(f"relative error of the first 8-bit output: {report.error:.4f}")
    if report.quantized_flops_share:
        lines.append(f"FLOPs of convolutions and linears that run in 8 bits: {report.quantized_flops_share:.1%}")
    lines += [f"{name}: {value:.2f}" for name, value in report.timings.items()]
    if report.watched is not None:
        lines.append(str(report.watched))
    lines += [f"fallback: {sentence}" for sentence in report.fallbacks]
    lines += [f"note: {sentence}" for sentence in report.notes]
    if report.layers:
        lines.append(_as_text(layer_table(report)))
        for (precision, reason), names in kept_layers(report).items():
            lines.append(f"{len(names)} layers {precision}, {reason}: {', '.join(names)}")
    return "\n".join(lines)


def layer_table(report: Report) -> Table:
    """The 8-bit layers, noisiest first."""
    table = Table("8-bit layer", "shape", "engine", "amax", "SQNR, dB", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for layer in sorted((la for la in report.layers if la.amax is not None), key=lambda la: la.sqnr_db or 0.0):
        table.add_row(layer.name, "x".join(map(str, layer.shape)), layer.engine, f"{layer.amax:.3g}", f"{layer.sqnr_db:.1f}")
    return table


def kept_layers(report: Report) -> dict[tuple[str, str], list[str]]:
    """(precision, reason) -> names of the layers that stay unquantised."""
    kept: dict[tuple[str, str], list[str]] = {}
    for layer in report.layers:
        if layer.amax is None:
            kept.setdefault((layer.precision, layer.reason), []).append(layer.name)
    return kept


def budget_table(recipe: Recipe) -> Table:
    """What a recipe for ``min_psnr`` found: its parts, noisiest first."""
    facts = recipe.provenance["min_psnr"]
    title = (f"{facts['mean_db']:.1f} dB on {facts['judges']} prompts that calibrated nothing, surely {facts['surely_db']:.1f}, "
             f"{facts['target_db']:g} asked for")
    table = Table("part", "share of the error", "saves, ms a step", "runs in", title=title, title_justify="left", box=None)
    table.columns[0].overflow = "fold"
    whole = sum(p["error"] for p in facts["parts"])
    for part in sorted(facts["parts"], key=lambda p: -p["error"]):
        table.add_row(part["name"], f"{part['error'] / whole:.1%}", f"{part['gain_ms']:.3f}",
                      "its own precision" if part["kept"] else "two codes" if part.get("two_codes") else "8 bits")
    return table


def summary_table(result: Mapping[str, Any]) -> Table:
    """The demo's one table, from the dictionary that ``report.json`` holds."""
    steps, ratio = result["step_ms"], result["step_ms"]["compile"]
    table = Table("", "eager", "torch.compile", "sd_int8", title=result["title"], title_justify="left")
    table.add_row("step, ms", *(f"{steps[k]:.1f}" for k in ("eager", "compile", "sd_int8")))
    table.add_row("speed-up over torch.compile", *(f"{ratio / steps[k]:.2f}x" for k in ("eager", "compile", "sd_int8")))
    table.add_row("PSNR to full precision, dB", "", "", "mean {mean:.1f}, worst {min:.1f}".format(**result["psnr_db"]))
    table.add_row("SSIM to full precision", "", "", "mean {mean:.3f}, worst {min:.3f}".format(**result["ssim"]))
    table.add_row("FLOPs in 8 bit", "0 %", "0 %", f"{result['quantized_flops_share']:.1%}")
    table.add_row("cold start, s", "", f"{result['compile_cold_start_s']:.1f}", f"{result['cold_start_s']:.1f}")
    return table


def result_json(result: Mapping[str, Any], report: Report) -> str:
    """``result`` with the report's layers, fallbacks, notes and provenance, as text."""
    body = {**result, "layers": [asdict(layer) for layer in report.layers], "fallbacks": list(report.fallbacks),
            "notes": list(report.notes), "provenance": dict(report.provenance)}
    return json.dumps(body, indent=1, default=str) + "\n"


def comparison_picture(rows: Sequence[tuple[str, Pictures]], captions: Sequence[str], scale: int | None = None) -> Image.Image:
    """One row of pictures per label, a column per caption; small pictures are doubled."""
    size = rows[0][1].shape[1:3]
    scale = scale or max(1, 128 // max(size))
    w, h, margin, label = size[1] * scale, size[0] * scale, 16, 120
    sheet = Image.new("RGB", (label + len(captions) * (w + margin), 44 + len(rows) * (h + margin)), "white")
    ink = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = label + column * (w + margin)
        ink.multiline_text((x, 6), _wrap(caption, w // 6), fill="black", font_size=11)
        for row, (_, pictures) in enumerate(rows):
            sheet.paste(_image(pictures[column]).resize((w, h), Image.Resampling.LANCZOS), (x, 44 + row * (h + margin)))
    for row, (name, _) in enumerate(rows):
        ink.multiline_text((6, 44 + row * (h + margin) + h // 2 - 10), name, fill="black", font_size=12)
    return sheet


def result_html(result: Mapping[str, Any], report: Report, picture: Image.Image, charts: Sequence[Chart] = ()) -> str:
    """A page that needs no other file: summary, pictures, charts, fallbacks, layers."""
    said = "".join(f"<li>{html.escape(s)}</li>" for s in (*report.fallbacks, *report.notes)) or "<li>none</li>"
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    steps = result["step_ms"]
    facts = _html_table(("", "eager", "torch.compile", "sd_int8"), [
        ("step, ms", *(f"{steps[k]:.1f}" for k in ("eager", "compile", "sd_int8"))),
        ("speed-up over torch.compile", *(f"{steps['compile'] / steps[k]:.2f}x" for k in ("eager", "compile", "sd_int8"))),
        ("PSNR to full precision, dB", "", "", "mean {mean:.1f}, worst {min:.1f}".format(**result["psnr_db"])),
        ("SSIM to full precision", "", "", "mean {mean:.3f}, worst {min:.3f}".format(**result["ssim"])),
        ("FLOPs in 8 bit", "0 %", "0 %", f"{result['quantized_flops_share']:.1%}"),
        ("cold start, s", "", f"{result['compile_cold_start_s']:.1f}", f"{result['cold_start_s']:.1f}"),
    ])
    layers = _html_table(("layer", "shape", "precision", "engine", "SQNR, dB", "MFLOP", "reason"), [
        (la.name, "x".join(map(str, la.shape)), la.precision, la.engine, "" if la.sqnr_db is None else f"{la.sqnr_db:.1f}",
         f"{la.flops / 1e6:.1f}", la.reason) for la in report.layers])
    watched = f"<p>{html.escape(str(report.watched))}</p>" if report.watched else ""
    pictures = Chart("demo", "Pictures", "The same prompts, side by side; the last row names how much it is amplified.", picture)
    return _page(result["title"], f"""<p>{html.escape(result["machine"])}; {html.escape(versions)}</p>
{facts}{"".join(map(_section, (pictures, *charts)))}
<h2>Fallbacks and notes</h2><ul>{said}</ul>{watched}<h2>Layers</h2>{layers}
""")


def charts_html(title: str, charts: Sequence[Chart]) -> str:
    """A page of charts that needs no other file."""
    return _page(title, "".join(map(_section, charts)))


def write_result(folder: Path, result: Mapping[str, Any], report: Report, picture: Image.Image,
                 charts: Sequence[Chart] = ()) -> list[Path]:
    """``demo.png``, ``report.html``, ``report.json`` and the charts in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / "demo.png")
    (folder / "report.html").write_text(result_html(result, report, picture, charts))
    (folder / "report.json").write_text(result_json(result, report))
    return [folder / name for name in ("demo.png", "report.html", "report.json")] + save_charts(folder, charts)


def save_charts(folder: Path, charts: Sequence[Chart]) -> list[Path]:
    """Each chart as a PNG in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        chart.image.save(folder / f"{chart.name}.png")
    return [folder / f"{chart.name}.png" for chart in charts]


def _page(title: str, body: str) -> str:
    return f"""<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:82rem;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd}}
img{{max-width:100%}}h1{{font-size:1.5rem}}h2{{font-size:1.15rem;margin-top:2rem}}</style>
<h1>{html.escape(title)}</h1>{body}"""


def _section(chart: Chart) -> str:
    buffer = io.BytesIO()
    chart.image.save(buffer, "PNG")
    return (f'<h2>{html.escape(chart.heading)}</h2><p>{html.escape(chart.text)}</p><img alt="{html.escape(chart.heading)}" '
            f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line("th", head) + "".join(line("td", row) for row in rows) + "</table>"


def _as_text(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _image(picture: Pictures) -> Image.Image:
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])

"""Reports: many merged into one, the demo's result as JSON, a self-contained HTML page and a picture."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import page
from .recipe import Recipe
from .text import READY, kept_layers, label, layer_rows, numbered, render_text
from .values import LayerReport, Report, Watched

if TYPE_CHECKING:  # a compiled module has a report, and need not be able to draw it
    from PIL import Image
    from rich.table import Table

    from .metrics import Pictures

__all__ = ["Chart", "Report", "Watched", "budget_table", "charts_html", "comparison_picture", "kept_layers", "layer_rows",
           "merged", "numbered", "of_parts", "render_text", "result_html", "result_json", "save_charts", "summary_table",
           "write_result"]

REFUSED, NOT_YET = "refused", ("calibrating", "building")


@dataclass(frozen=True)
class Chart:
    """A picture of the report and what it shows. name: of its file, without the suffix."""

    name: str
    heading: str
    text: str
    image: Image.Image


def merged(reports: Sequence[Report], names: Sequence[str]) -> Report:
    """One report of a module's graphs, whose own reports it keeps as ``pieces``. names: of the graphs, one each; graphs of one
    name are the same one, built for other sizes.

    Merging merged reports gives what merging all their pieces gives; their order is that of rows and sentences, and nothing more.
    A layer has a row for each way in which it runs: the largest range, the worst noise and the FLOPs of all its graphs. The share
    of 8 bits is of the FLOPs of all graphs together.
    Times: seconds add up. Milliseconds of a call add up over the graphs that are ready, as if each ran once a step, where all of
    them were timed and none was built for two sizes; else there is no sum, and ``pieces`` tells each. Raises ValueError for none.
    """
    pieces = tuple(piece for report, name in zip(reports, names, strict=True) for piece in _pieces(report, name))
    if not pieces:
        raise ValueError("merged() was given no report: it takes those of a module's graphs, at least one")
    each = [report for _, report in pieces]
    work = sum(report.work for report in each)
    shares = [report.quantized_flops_share for report in each if report.quantized_flops_share is not None]
    share = sum(report.quantized_flops for report in each) / work if work else max(shares, default=0.0)
    error = max((report.error for report in each if report.error is not None), default=None)
    return Report(_state(each), _rows(pieces), _union(r.fallbacks for r in each), _union(r.notes for r in each), _timings(pieces),
                  error, share if shares else None, _agreed([r.provenance for r in each]),
                  _watched([r.watched for r in each if r.watched is not None]), work, "", pieces)


def of_parts(reports: Mapping[str, Report], first: str, every_timestep: Callable[[str], bool]) -> Report:
    """One report of a pipeline's parts, by name: rows and sentences of those that are not the first carry their name. The state
    is that of all parts; where one is not ready yet, its; "partly refused" where some are refused. Milliseconds add up over those
    that are called at every timestep."""
    if list(reports) == [first]:
        return reports[first]
    named = []
    for part, report in reports.items():
        if part == first:
            named.append(replace(report, pieces=()))  # its sentences are of the whole, and not in a piece
            continue
        rows = tuple(replace(row, name=f"{part}.{row.name}") for row in report.layers)
        fallbacks, notes = ([f"{part}: {sentence}" for sentence in said] for said in (report.fallbacks, report.notes))
        named.append(replace(report, layers=rows, fallbacks=tuple(fallbacks), notes=tuple(notes), pieces=()))
    found = merged(named, list(reports))
    waiting = [report.state for report in named if report.state in NOT_YET]
    step = _timings([piece for piece in found.pieces if every_timestep(piece[0])]) if found.pieces else {}
    timings = {key: value for key, value in found.timings.items() if key.endswith("_s")} | {
        key: value for key, value in step.items() if not key.endswith("_s")}
    memory = {part: of for part, report in reports.items() for of in report.memory.values()}
    return replace(found, state=waiting[0] if waiting else found.state, timings=timings, memory=memory,
                   provenance=next(iter(reports.values())).provenance)


def _pieces(report: Report, name: str) -> tuple[tuple[str, Report], ...]:
    """The graphs of a report, which is one of them or was merged, under ``name``."""
    if not report.pieces:
        return ((name, report),)
    return tuple((": ".join(filter(None, (name, inner))), piece) for inner, piece in report.pieces)


def _state(reports: Sequence[Report]) -> str:
    """That of all graphs, where it is one."""
    states = {report.state for report in reports}
    if len(states) == 1:
        return states.pop()
    return "partly refused" if REFUSED in states else "partly ready"


def _rows(pieces: Sequence[tuple[str, Report]]) -> tuple[LayerReport, ...]:
    found: dict[Any, LayerReport] = {}
    for piece in pieces:
        where = label(piece)
        for row in piece[1].layers:
            row = replace(row, where=row.where or ((where,) if where else ()))
            way = (row.name, row.op, row.shape, row.precision, row.engine, row.reason, row.amax is None)
            found[way] = _one_row(found[way], row) if way in found else row
    return tuple(found.values())


def _one_row(a: LayerReport, b: LayerReport) -> LayerReport:
    return replace(a, amax=max((v for v in (a.amax, b.amax) if v is not None), default=None),
                   sqnr_db=min((v for v in (a.sqnr_db, b.sqnr_db) if v is not None), default=None),
                   flops=a.flops + b.flops, where=_union((a.where, b.where)))


def _union(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Every one once, in order."""
    return tuple(dict.fromkeys(one for part in parts for one in part))


def _timings(pieces: Sequence[tuple[str, Report]]) -> dict[str, float]:
    run = [piece for piece in pieces if piece[1].state == READY] or list(pieces)
    once_each = len({name for name, _ in run}) == len(run)
    sums: dict[str, float] = {}
    for key in _union(report.timings for _, report in pieces):
        of = pieces if key.endswith("_s") else run
        values = [report.timings[key] for _, report in of if key in report.timings]
        if values and (not key.endswith("_ms") or (once_each and len(values) == len(run))):
            sums[key] = sum(values)
    return sums


def _agreed(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What none of them contradicts."""
    return {key: value for one in facts for key, value in one.items() if all(other.get(key, value) == value for other in facts)}


def _watched(watched: Sequence[Watched]) -> Watched | None:
    if not watched:
        return None
    groups: dict[tuple[str, ...], tuple[float, float]] = {}
    for one in watched:
        for layers, (built, lately) in one.groups.items():
            known = groups.get(layers, (0.0, 0.0))
            groups[layers] = max(known[0], built), max(known[1], lately)
    return Watched(sum(w.calls for w in watched), sum(w.samples for w in watched), groups)


def budget_table(recipe: Recipe) -> Table:
    """What a recipe for ``min_psnr`` found: its parts, noisiest first."""
    from rich.table import Table

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
    from rich.table import Table

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
    """``result`` with the report's layers, fallbacks, notes, provenance and graphs, as text."""
    body = {**result, "layers": [asdict(layer) for layer in report.layers], "fallbacks": list(report.fallbacks),
            "notes": list(report.notes), "provenance": dict(report.provenance), "peak": report.peak,
            "memory": {part: dict(held) for part, held in report.memory.items()},
            "graphs": [{"name": name, "sizes": piece.sizes, "state": piece.state, "flops": piece.work, "error": piece.error,
                        "quantized_flops_share": piece.quantized_flops_share, "timings": dict(piece.timings)}
                       for name, piece in report.pieces]}
    return json.dumps(body, indent=1, default=str) + "\n"


def comparison_picture(rows: Sequence[tuple[str, Pictures]], captions: Sequence[str], scale: int | None = None) -> Image.Image:
    """One row of pictures per label, a column per caption; small pictures are doubled."""
    from PIL import Image, ImageDraw

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
    facts = page.table(("", "eager", "torch.compile", "sd_int8"), [
        ("step, ms", *(f"{steps[k]:.1f}" for k in ("eager", "compile", "sd_int8"))),
        ("speed-up over torch.compile", *(f"{steps['compile'] / steps[k]:.2f}x" for k in ("eager", "compile", "sd_int8"))),
        ("PSNR to full precision, dB", "", "", "mean {mean:.1f}, worst {min:.1f}".format(**result["psnr_db"])),
        ("SSIM to full precision", "", "", "mean {mean:.3f}, worst {min:.3f}".format(**result["ssim"])),
        ("FLOPs in 8 bit", "0 %", "0 %", f"{result['quantized_flops_share']:.1%}"),
        ("cold start, s", "", f"{result['compile_cold_start_s']:.1f}", f"{result['cold_start_s']:.1f}"),
    ])
    watched = f"<p>{html.escape(str(report.watched))}</p>" if report.watched else ""
    shown = Chart("demo", "Pictures", "The same prompts, side by side; the last row names how much it is amplified.", picture)
    return page.page(result["title"], "".join((
        f'<p class="soft">{html.escape(result["machine"])}; {html.escape(versions)}</p>', facts,
        *map(_section, (shown, *charts)), page.heading("Fallbacks and notes"), f"<ul>{said}</ul>", watched, report_html(report))))


def report_html(report: Report) -> str:
    """Tables of what a report holds: graphs, memory, layers."""
    pieces = report.pieces if len(report.pieces) > 1 else ()
    times = sorted({name for _, piece in pieces for name in piece.timings if name.endswith("_ms")})
    graphs = page.table(("graph", "state", "FLOPs in 8 bits", "relative error", *times), [
        (label(one), one[1].state, f"{one[1].quantized_flops_share or 0:.1%}", _number(one[1].error, 4),
         *(_number(one[1].timings.get(name), 2) for name in times)) for one in pieces])
    kinds = list(dict.fromkeys(kind for held in report.memory.values() for kind in held))
    memory = page.table(("part", *(f"{kind}, MB" for kind in kinds)), [
        (part, *(_number(held[kind] / 1e6 if kind in held else None, 1) for kind in kinds))
        for part, held in report.memory.items()])
    peak = f"<p>The process had {report.peak / 1e6:.1f} MB on this GPU at most so far.</p>" if report.peak else ""
    layers = page.sorted_table("layers", ("layer", "shape", "precision", "engine", "SQNR, dB", "MFLOP", "reason"), [
        (la.name, "x".join(map(str, la.shape)), la.precision, la.engine, _number(la.sqnr_db, 1), f"{la.flops / 1e6:.1f}",
         la.reason) for la in report.layers])
    return "".join((page.heading("Graphs") + graphs if pieces else "", page.heading("Memory") + memory if kinds else "", peak,
                    page.heading("Layers"), layers))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def charts_html(title: str, charts: Sequence[Chart]) -> str:
    """A page of charts that needs no other file."""
    return page.page(title, "".join(map(_section, charts)))


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


def _section(chart: Chart) -> str:
    return page.picture(chart.heading, chart.text, chart.image)


def _image(picture: Pictures) -> Image.Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])

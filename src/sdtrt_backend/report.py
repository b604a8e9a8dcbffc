"""Renderers: a Report as text and tables, the demo's result as JSON, a self-contained HTML page and a picture."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import Recipe
from .values import LayerReport, Report, Watched

if TYPE_CHECKING:  # a compiled module has a report, and need not be able to draw it
    from PIL import Image
    from rich.console import RenderableType
    from rich.table import Table

    from .metrics import Pictures

__all__ = ["Chart", "Report", "Watched", "budget_table", "charts_html", "comparison_picture", "kept_layers", "layer_table",
           "merged", "render_text", "result_html", "result_json", "save_charts", "summary_table", "write_result"]

WIDTH = 118
READY, REFUSED = "ready", "refused"
# of a report of many graphs: what its text holds; the value holds all of it
MAX_LAYERS, MAX_PIECES, MAX_ALIKE, MAX_NAMED = 60, 10, 3, 3


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


def _pieces(report: Report, name: str) -> tuple[tuple[str, Report], ...]:
    """The graphs of a report, which is one of them or was merged, under ``name``."""
    if not report.pieces:
        return ((name, report),)
    return tuple((": ".join(filter(None, (name, inner))), piece) for inner, piece in report.pieces)


def _label(piece: tuple[str, Report]) -> str:
    return ", ".join(filter(None, (piece[0], piece[1].sizes)))


def _state(reports: Sequence[Report]) -> str:
    """That of all graphs, where it is one."""
    states = {report.state for report in reports}
    if len(states) == 1:
        return states.pop()
    return "partly refused" if REFUSED in states else "partly ready"


def _rows(pieces: Sequence[tuple[str, Report]]) -> tuple[LayerReport, ...]:
    found: dict[Any, LayerReport] = {}
    for piece in pieces:
        label = _label(piece)
        for row in piece[1].layers:
            row = replace(row, where=row.where or ((label,) if label else ()))
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


def render_text(report: Report) -> str:
    """The report for a terminal: state, what was said, and one line per layer. Of many graphs or layers the noisiest and those
    that are not ready; the rest are counted."""
    lines = [f"state: {report.state}{_counts(report)}"]
    if report.error is not None:
        largest = ", the largest of all graphs" if len(report.pieces) > 1 else ""
        lines.append(f"relative error of the first 8-bit output{largest}: {report.error:.4f}")
    lines += _share(report)
    lines += [f"{name}: {value:.2f}" for name, value in report.timings.items()]
    if report.watched is not None:
        lines.append(str(report.watched))
    lines += _graphs(report)
    lines += [f"fallback: {said}" for said in _sentences(report, "fallbacks")]
    lines += [f"note: {said}" for said in _sentences(report, "notes")]
    if any(layer.amax is not None for layer in report.layers):
        lines.append(_as_text(layer_table(report, MAX_LAYERS)))
        rest = sum(layer.amax is not None for layer in report.layers) - MAX_LAYERS
        if rest > 0:
            lines.append(f"and {rest} 8-bit layers with less noise")
    lines += _kept_lines(report)
    return "\n".join(lines)


def _counts(report: Report) -> str:
    if len(report.pieces) < 2:
        return ""
    states = Counter(piece.state for _, piece in report.pieces)
    each = "" if len(states) == 1 else ": " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f" ({len(report.pieces)} graphs{each})"


def _share(report: Report) -> list[str]:
    if report.quantized_flops_share is None or not (report.quantized_flops_share or report.state == READY):
        return []
    unknown = sum(not piece.work for _, piece in report.pieces)
    but = f", without {unknown} of {len(report.pieces)} graphs, whose work is not counted yet" if unknown else ""
    return [f"FLOPs of all operations with a weight that run in 8 bits{but}: {report.quantized_flops_share:.1%}"]


def _graphs(report: Report) -> list[str]:
    """A line for each graph, or for those that are not ready where there are many."""
    pieces = report.pieces if len(report.pieces) > 1 else ()
    if len(pieces) > MAX_PIECES:
        pieces = tuple(piece for piece in pieces if piece[1].state != READY)
    lines = []
    for piece in pieces[:MAX_PIECES]:
        facts = [piece[1].state]
        if piece[1].quantized_flops_share:
            facts.append(f"{piece[1].quantized_flops_share:.1%} in 8 bits")
        if piece[1].error is not None:
            facts.append(f"relative error {piece[1].error:.4f}")
        facts += [f"{name} {value:.2f}" for name, value in piece[1].timings.items() if name.endswith("_ms")]
        lines.append(f"graph {_label(piece) or 'without a name'}: {', '.join(facts)}")
    rest = Counter(piece.state for _, piece in pieces[MAX_PIECES:])
    return lines + [f"and {count} graphs more: {state}" for state, count in sorted(rest.items())]


def _sentences(report: Report, kind: str) -> list[str]:
    """Each with the graphs that said it, unless all did. Of sentences that differ in their numbers alone the first few."""
    alike: dict[str, list[str]] = {}
    for sentence in getattr(report, kind):
        said = [_label(piece) for piece in report.pieces if sentence in getattr(piece[1], kind)]
        where = f" (in {_some(said, len(report.pieces))})" if len(said) < len(report.pieces) else ""
        alike.setdefault(re.sub(r"\d+(\.\d+)?", "#", sentence), []).append(sentence + where)
    lines = []
    for same in alike.values():
        lines += same[:MAX_ALIKE]
        if len(same) > MAX_ALIKE:
            lines.append(f"and {len(same) - MAX_ALIKE} more that differ from the last one in their numbers alone")
    return lines


def _some(names: Sequence[str], of: int) -> str:
    named = [name or "a graph without a name" for name in names]
    return ", ".join(named) if len(named) <= MAX_NAMED else f"{len(named)} of {of} graphs"


def layer_table(report: Report, most: int | None = None) -> Table:
    """The 8-bit layers, noisiest first, ``most`` of them. A layer that runs in several ways tells in which graphs."""
    from rich.table import Table

    rows = sorted((la for la in report.layers if la.amax is not None), key=lambda la: la.sqnr_db or 0.0)[:most]
    several = _in_several_ways(report)
    split = any((la.name, la.shape) in several for la in rows)
    table = Table("8-bit layer", "shape", "engine", "amax", "SQNR, dB", *(["in"] if split else []), box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for la in rows:
        where = [_some(la.where, len(report.pieces)) if (la.name, la.shape) in several else ""] if split else []
        sqnr = "" if la.sqnr_db is None else f"{la.sqnr_db:.1f}"
        table.add_row(la.name, "x".join(map(str, la.shape)), la.engine, f"{la.amax:.3g}", sqnr, *where)
    return table


def _in_several_ways(report: Report) -> set[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the layers that have more than one row, in which a graph or its sizes make the difference."""
    ways = Counter((la.name, la.shape) for la in report.layers if la.where)
    return {layer for layer, count in ways.items() if count > 1}


def kept_layers(report: Report) -> dict[tuple[str, str], list[str]]:
    """(precision, reason) -> names of the layers, and of the other operations with a weight, that stay unquantised."""
    return {way: [layer.name for layer in layers] for way, layers in _kept(report).items()}


def _kept(report: Report) -> dict[tuple[str, str], list[LayerReport]]:
    kept: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        if layer.amax is None:
            kept.setdefault((layer.precision, layer.reason), []).append(layer)
    return kept


def _kept_lines(report: Report) -> list[str]:
    """A line per reason: how many layers, their part of the work, and every name."""
    several, lines = _in_several_ways(report), []
    for (precision, reason), layers in _kept(report).items():
        names = [la.name for la in layers if (la.name, la.shape) not in several]
        split = [f"{la.name} (in {_some(la.where, len(report.pieces))})" for la in layers if (la.name, la.shape) in several]
        part = f", {sum(la.flops for la in layers) / report.work:.1%} of the FLOPs" if report.work else ""
        lines.append(f"{len(layers)} layers {precision}{part}, {reason}: {', '.join([*numbered(names), *split])}")
    return lines


def numbered(names: Sequence[str]) -> list[str]:
    """The names, of which those that differ in their first number alone are one: "blocks.0-37.norm", "blocks.1,3.norm"."""
    parts: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(.*?)(?:(?<![^.])(0|[1-9]\d*)(?=\.|$)(.*))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
        parts.setdefault((head, "" if number is None else tail), []).append(-1 if number is None else int(number))
    return [head + (_runs(sorted(set(numbers))) if numbers[0] >= 0 else "") + tail for (head, tail), numbers in parts.items()]


def _runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


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
            "notes": list(report.notes), "provenance": dict(report.provenance),
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
    from rich.console import Console

    console = Console(file=io.StringIO(), width=WIDTH, no_color=True)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _image(picture: Pictures) -> Image.Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])

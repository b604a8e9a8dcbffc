"""A Report as text, for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .values import LayerReport, Report

READY = "ready"
# of a report of many graphs: what its text holds; the value holds all of it
MAX_LAYERS, MAX_PIECES, MAX_ALIKE, MAX_NAMED = 60, 10, 3, 3


def label(piece: tuple[str, Report]) -> str:
    """Name and sizes of one graph of a report."""
    return ", ".join(filter(None, (piece[0], piece[1].sizes)))


def render_text(report: Report) -> str:
    """The report for a terminal: state, what was said, and one line per layer. Of many graphs or layers the noisiest and those
    that are not ready; the rest are counted."""
    lines = [f"state: {report.state}{_counts(report)}"]
    if report.error is not None:
        largest = ", the largest of all graphs" if len(report.pieces) > 1 else ""
        lines.append(f"relative error of the first 8-bit output{largest}: {report.error:.4f}")
    lines += _share(report)
    lines += [f"{name}: {value:.2f}" for name, value in report.timings.items()]
    lines += [f"memory{f' of {part}' if part else ''}: " + ", ".join(f"{kind} {count / 1e6:.1f} MB" for kind, count in of.items())
              for part, of in report.memory.items()]
    lines += [f"memory of the process on this GPU, at most so far: {report.peak / 1e6:.1f} MB"] if report.peak else []
    if report.watched is not None:
        lines.append(str(report.watched))
    lines += _graphs(report)
    lines += [f"fallback: {said}" for said in _sentences(report, "fallbacks")]
    lines += [f"note: {said}" for said in _sentences(report, "notes")]
    if any(layer.amax is not None for layer in report.layers):
        shown = MAX_LAYERS if _many(report) else len(report.layers)
        lines += columns(layer_rows(report, shown))
        rest = sum(layer.amax is not None for layer in report.layers) - shown
        if rest > 0:
            lines.append(f"and {rest} 8-bit layers with less noise")
    lines += _kept_lines(report)
    return "\n".join(lines)


def _many(report: Report) -> bool:
    return len(report.pieces) > MAX_PIECES


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
        lines.append(f"graph {label(piece) or 'without a name'}: {', '.join(facts)}")
    rest = Counter(piece.state for _, piece in pieces[MAX_PIECES:])
    return lines + [f"and {count} graphs more: {state}" for state, count in sorted(rest.items())]


def _sentences(report: Report, kind: str) -> list[str]:
    """Each with the graphs that said it, unless all did. Of sentences that differ in their numbers alone the first few."""
    alike: dict[str, list[str]] = {}
    for sentence in getattr(report, kind):
        said = [label(piece) for piece in report.pieces if sentence in getattr(piece[1], kind)]
        where = f" (in {_some(said, len(report.pieces))})" if 0 < len(said) < len(report.pieces) else ""
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


def layer_rows(report: Report, most: int | None = None) -> list[list[str]]:
    """The 8-bit layers, noisiest first, ``most`` of them, below a row of what the cells are. A layer that runs in several ways
    tells in which graphs."""
    rows = sorted((la for la in report.layers if la.amax is not None), key=lambda la: la.sqnr_db or 0.0)[:most]
    several = _in_several_ways(report)
    split = any((la.name, la.shape) in several for la in rows)
    found = [["8-bit layer", "shape", "engine", "amax", "SQNR, dB", *(["in"] if split else [])]]
    for la in rows:
        where = [_some(la.where, len(report.pieces)) if (la.name, la.shape) in several else ""] if split else []
        sqnr = "" if la.sqnr_db is None else f"{la.sqnr_db:.1f}"
        found.append([la.name, "x".join(map(str, la.shape)), la.engine, f"{la.amax:.3g}", sqnr, *where])
    return found


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, its cells below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


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
        told = numbered(names) if _many(report) else names
        split = [f"{la.name} (in {_some(la.where, len(report.pieces))})" for la in layers if (la.name, la.shape) in several]
        part = f", {sum(la.flops for la in layers) / report.work:.1%} of the FLOPs" if report.work else ""
        lines.append(f"{len(layers)} layers {precision}{part}, {reason}: {', '.join([*told, *split])}")
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

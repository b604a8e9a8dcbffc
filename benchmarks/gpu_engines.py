"""One denoising step through Inductor and through TensorRT engines, beside each other, on one GPU:

    python benchmarks/gpu_engines.py --model bundled --limit 540 --out results     # sd_fp8 and sd_int8, fp16
    python benchmarks/gpu_engines.py --model sdxl --backends sd_fp8 --limit 540 --work kept --out results
    python benchmarks/gpu_engines.py --tiny --engines inductor,torchao             # the same code on a CPU, small

The bundled UNet has its own weights, calibrated on two prompts, and a step of a picture as input; SDXL has random weights and
the inputs of ``gpu.py``. Each engine is compiled twice, in a copy of the module each: with empty caches (cold), and with what the
first left on disk, engines too (cached). The second is the one that is timed, in turn with torch.compile.

Every stage prints what it found as soon as it is over, and writes the JSON; an error is printed with its traceback, a build
that the backend refused too, and the other columns go on. At ``--limit`` seconds the process prints where it is and ends with
status 3. ``--work`` keeps recipe, caches and engines for the next call: nothing is cold then but what is not in there.

What the columns of the table mean:
cold, cached  seconds of the first call, the first and the second time; engines, cached: of these, to build TensorRT's engines
              and to get them from disk
step          median over ``--rounds``, ms; compile: torch.compile of the 16-bit module, replayed as a CUDA graph
ratio         step of compile / this step, timed in turn
error         relative, and cosine, the worst of several denoising steps, to ``engine="reference"`` with the same layers in
              8 bits: how far the engine is from its specification. The row "ref fp32" is that reference computed in fp32: what
              the rounding of 16-bit arithmetic alone does, as values near the border of two codes fall to the other side
to full       relative error to the module in fp32
8-bit         share of the FLOPs of linears and convolutions in 8 bits; layers: how many run where
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import torch

import sdtrt_backend
from sdtrt_backend.demo import CALIBRATION_PROMPTS, GUIDANCE
from sdtrt_backend.recipe import versions

START = time.monotonic()
PACKAGES = ("sdtrt_backend", "torch", "triton", "tensorrt_rtx", "tensorrt", "torchao", "onnx", "diffusers")
BACKENDS = ("sd_fp8", "sd_int8")
ENGINES = ("inductor", "tensorrt", "torchao", "auto")
OUT_OF_TIME = 3


def say(*words: Any) -> None:
    print(f"[{time.monotonic() - START:6.1f}]", *words, flush=True)


# the model

Call = Callable[[Any], torch.Tensor]  # module -> its output on one denoising step


def bundled(batch: int, recipe: Path) -> tuple[torch.nn.Module, list[Call]]:
    """(the bundled UNet, the steps of a picture); writes the recipe where there is none."""
    dtype = torch.float16 if gpu.DEVICE.type == "cuda" else torch.float32
    pipe = sdtrt_backend.demo_pipeline(dtype).to(gpu.DEVICE)
    pipe.set_progress_bar_config(disable=True)
    if not recipe.exists():
        sdtrt_backend.calibrate(pipe, CALIBRATION_PROMPTS[:2], guidance_scale=GUIDANCE, progress=False).save(recipe)
    seen: list[tuple[Any, Any]] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    pipe(list(CALIBRATION_PROMPTS[: max(1, batch // 2)]), num_inference_steps=8, guidance_scale=GUIDANCE,
         generator=torch.Generator("cpu").manual_seed(0))
    handle.remove()

    def call(args: Any, kwargs: Any) -> Call:
        given = {k: v for k, v in kwargs.items() if v is not None} | {"return_dict": False}
        return lambda module: module(*_as(module, args), **_as(module, given))[0]

    return pipe.unet, [call(*step) for step in seen]


def sdxl(batch: int, tiny: bool, recipe: Path) -> tuple[torch.nn.Module, list[Call]]:
    """The same of SDXL with random weights."""
    module = gpu.build("sdxl", tiny)
    arguments = gpu.inputs(module, batch, tiny)
    if not recipe.exists():
        gpu.calibrated(module, arguments, recipe)

    def call(t: float) -> Call:
        given = arguments(t)
        return lambda m: m(**_as(m, given))[0]

    return module, [call(t) for t in gpu.TIMESTEPS]


def _as(module: Any, values: Any) -> Any:
    """Floating-point tensors in the module's dtype."""
    dtype = next(module.parameters()).dtype
    if isinstance(values, dict):
        return {k: _as(module, v) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(_as(module, v) for v in values)
    return values.to(dtype) if isinstance(values, torch.Tensor) and values.is_floating_point() else values


# a column

def distance(y: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(relative error, cosine) of ``y``."""
    y, expected = y.double().flatten(), expected.double().flatten()
    return float((y - expected).norm() / expected.norm()), float(torch.nn.functional.cosine_similarity(y, expected, 0))


def distances(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, Any]:
    """The worst of the steps, and the cosine of each."""
    errors, cosines = zip(*(distance(y, e) for y, e in zip(outputs, expected, strict=True)), strict=True)
    return {"error": max(errors), "cosine": min(cosines), "cosines": cosines}


def explained(module: torch.nn.Module) -> dict[str, Any]:
    """What became of a module."""
    report = sdtrt_backend.explain(module)
    total = sum(layer.flops for layer in report.layers) or 1
    return {"state": report.state, "fallbacks": list(report.fallbacks), "notes": list(report.notes),
            "timings": dict(report.timings), "share": sum(la.flops for la in report.layers if la.amax is not None) / total,
            "layers": dict(Counter(f"{la.engine} {la.precision}" for la in report.layers)),
            "kept": [la.name for la in report.layers if la.amax is None]}


def started(module: torch.nn.Module, call: Call, backend: str, **options: Any,
            ) -> tuple[Any, float, dict[str, Any]]:
    """(a copy of the module, compiled anew; seconds of its first call; what ``explained`` says)."""
    torch._dynamo.reset()
    mine = copy.deepcopy(module)
    if backend == "compile":
        compiled: Any = torch.compile(mine, dynamic=False)
    else:
        compiled = torch.compile(mine, backend=backend, dynamic=False, options=options)
    seconds = gpu.first_call(lambda: call(compiled))
    return compiled, seconds, {} if backend == "compile" else explained(mine)


def engine_seconds(notes: list[str]) -> float:
    """Seconds that it took to build the engines, or to get them from the cache."""
    said = re.compile(r"the engine (?:was built|came from the cache) in ([\d.]+) s")
    return sum(float(seconds) for note in notes for seconds in said.findall(note))


def column(module: torch.nn.Module, call: Call, backend: str, engine: str, recipe: Path,
           work: Path, once: bool) -> tuple[dict[str, Any], Any]:
    """(row, compiled module) of an engine, compiled twice unless ``once``; says what it finds."""
    row: dict[str, Any] = {"backend": backend, "engine": engine}
    folder = work / f"{backend}_{engine}"
    options = {"recipe": str(recipe), "engine": engine, "engine_dir": str(folder / "engines")}
    compiled: Any = None
    for which in ("cold", "cached")[: 1 if once else 2]:
        gpu.use_caches(folder, fresh=which == "cold")
        compiled = None  # its memory is free before the next is built
        gpu.memory()
        compiled, row[f"{which}_s"], found = started(module, call, backend, **options)
        row |= found | {f"{which}_notes": found["notes"], f"{which}_engines_s": engine_seconds(found["notes"])}
        say(f"{backend} {engine} {which}: {row['state']}, {row[f'{which}_s']:.1f} s, layers {row['layers']}")
        for sentence in (*found["fallbacks"], *found["notes"]):
            say("   ", sentence)
        say("   ", {name: round(value, 3) for name, value in found["timings"].items()})
        if row["state"] != "ready":
            break
    return row, compiled


class References:
    """Outputs of the reference lowering, each made once: by backend, kept layers and precision."""

    def __init__(self, module: torch.nn.Module, calls: list[Call], recipe: Path) -> None:
        self.module, self.calls, self.recipe = module, calls, recipe
        self.known: dict[Any, list[torch.Tensor]] = {}

    def outputs(self, backend: str, kept: list[str], wide: bool = False) -> list[torch.Tensor]:
        key = backend, tuple(kept), wide
        if key not in self.known:
            module = copy.deepcopy(self.module).float() if wide else self.module
            compiled, _, found = started(module, self.calls[-1], backend, recipe=str(self.recipe), engine="reference",
                                         exclude=list(kept))
            assert found["state"] == "ready", found["fallbacks"]
            self.known[key] = [call(compiled).float() for call in self.calls]
        return self.known[key]


# the run

def table(rows: list[dict[str, Any]]) -> str:
    """Every row that there is, in the columns of the module's docstring."""
    lines = [f"{'':18}{'state':>9}{'cold s':>8}{'cached s':>9}{'engines':>9}{'cached':>9}{'step ms':>9}{'ratio':>7}{'error':>9}"
             f"{'cosine':>9}{'to full':>9}{'8-bit':>7}  layers"]
    for row in rows:
        cells = [f"{row.get(name, math.nan):{width}.{digits}f}".replace("nan", "").rjust(width)
                 for name, width, digits in (("cold_s", 8, 1), ("cached_s", 9, 1), ("cold_engines_s", 9, 1),
                                             ("cached_engines_s", 9, 2), ("step_ms", 9, 2), ("ratio", 7, 2),
                                             ("error", 9, 4), ("cosine", 9, 5), ("to_full", 9, 4), ("share", 7, 2))]
        layers = ", ".join(f"{n} {where}" for where, n in row.get("layers", {}).items())
        lines.append(f"{row['backend'] + ' ' + row['engine']:18}{row.get('state', ''):>9}{''.join(cells)}  {layers}")
        if row.get("failed"):
            lines.append(f"    {row['failed']}")
    return "\n".join(lines)


class Rows:
    """The rows of a run, on disk after every change."""

    def __init__(self, facts: dict[str, Any], path: Path) -> None:
        self.facts, self.path = facts, path
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n")


@torch.no_grad()
def main(given: argparse.Namespace, rows: Rows, work: Path) -> None:
    recipe = work / "recipe"
    module, calls = bundled(given.batch, recipe) if given.model == "bundled" else sdxl(given.batch, given.tiny, recipe)
    call = calls[-1]
    say(f"{given.model}: {sum(p.numel() for p in module.parameters()):,} parameters, calibrated")
    full = call(copy.deepcopy(module).float()).float()
    references = References(module, calls, recipe)
    baseline: dict[str, Callable[[], Any]] = {}
    if "compile" in given.engines:
        gpu.use_caches(work / "compile", fresh=True)
        compiled, seconds, _ = started(module, call, "compile")
        row = {"backend": "compile", "engine": "inductor", "cold_s": seconds, "to_full": distance(call(compiled), full)[0]}
        replay = gpu.graphed(functools.partial(call, compiled))
        rows.add(row | {"step_ms": gpu.times_ms({"compile": replay}, given.rounds)["compile"]})
        say(f"torch.compile: first call {seconds:.1f} s, then {rows.rows[-1]['step_ms']:.3f} ms")
        if gpu.DEVICE.type == "cuda":  # the others reset Dynamo, which a CUDA graph does not need
            baseline["compile"] = replay
    for backend in given.backends:
        for engine in (e for e in given.engines if e != "compile"):
            compiled = None
            try:
                row, compiled = column(module, call, backend, engine, recipe, work, given.once)
                step = functools.partial(call, compiled)
                times = gpu.times_ms(baseline | {"mine": step}, given.rounds)
                row["step_ms"] = times["mine"]
                if "compile" in times:
                    row["compile_ms"], row["ratio"] = times["compile"], times["compile"] / times["mine"]
                row["to_full"] = distance(step(), full)[0]
                rows.add(row)
                outputs = [call(compiled).float() for call in calls]
                row |= distances(outputs, references.outputs(backend, row["kept"]))
                if given.model == "bundled":
                    wide = references.outputs(backend, row["kept"], wide=True)
                    rows.add({"backend": backend, "engine": "ref fp32", "kept": row["kept"]}
                             | distances(wide, references.outputs(backend, row["kept"])))
                rows.write()
            except Exception as error:
                rows.add({"backend": backend, "engine": engine, "failed": gpu.first_line(error)})
                say(f"{backend} {engine} failed")
                traceback.print_exc(file=sys.stdout)
            print(table(rows.rows), flush=True)


def at_the_limit(rows: Rows) -> None:
    say("out of time, here:")
    print("".join(traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0])[-12:]))
    print(table(rows.rows), flush=True)
    os._exit(OUT_OF_TIME)  # a builder may be deep in a library


def show_tracebacks() -> None:
    """The backend refuses a build that failed in one sentence, and logs its traceback at DEBUG."""
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(lambda record: record.levelno == logging.INFO or record.exc_info is not None)
    handler.setFormatter(logging.Formatter("    %(message)s"))
    log = logging.getLogger("sdtrt_backend")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False


def names(valid: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Reader of a comma-separated option."""
    def read(text: str) -> list[str]:
        wrong = [name for name in text.split(",") if name not in valid]
        if wrong:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(wrong)}; there are {', '.join(valid)}")
        return text.split(",")

    return read


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("bundled", "sdxl"), default="bundled")
    parser.add_argument("--backends", type=names(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--engines", type=names(("compile", *ENGINES)), default=["compile", "inductor", "tensorrt"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--once", action="store_true", help="compile each engine once, with empty caches")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=540, help="seconds after which the process ends")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_engines")
    parser.add_argument("--work", type=Path, help="folder of recipe, caches and engines; a temporary one when not given")
    parser.add_argument("--tiny", action="store_true", help="SDXL in a small configuration of the same structure")
    given = parser.parse_args(argv)
    given.model = "sdxl" if given.tiny else given.model
    return given


if __name__ == "__main__":
    given = parsed()
    facts = {"model": given.model, "tiny": given.tiny, "batch": given.batch, "machine": gpu.machine(),
             "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions(PACKAGES)}
    rows = Rows(facts, given.out / f"{'tiny-' * given.tiny}{given.model}_{given.batch}_engines.json")
    timer = threading.Timer(given.limit, at_the_limit, [rows])
    timer.daemon = True
    timer.start()
    show_tracebacks()
    with tempfile.TemporaryDirectory() as folder:
        main(given, rows, given.work or Path(folder))

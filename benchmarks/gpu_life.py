"""Does an accelerated denoiser live with its user on a GPU, and what memory does it take? One case small, one of published size.

    python benchmarks/gpu_life.py                                        # the bundled model, then the UNet of SDXL; one GPU
    python benchmarks/gpu_life.py --device cpu --tiny --engine reference # the same code on a CPU, where memory reads 0

Each case is one life: made, accelerated with ``weights="release"``, calibrated by two pictures and ready; timed in turn with
torch.compile; moved to the CPU and back; copied; ten weights written as a fused adapter writes them; dropped. A part that fails
is a row of the table with its error, and the others go on. The bundled model goes first: a failure shows in a minute.

Memory is what the allocator holds after gc.collect() and empty_cache(), less what it held before the case; the workspaces of
cuBLAS and cuBLASLt, which stay for good, are made before. The UNet of SDXL has random fp16 weights (``gpu.py`` says why), batch
2, 1024x1024.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu
import torch

import sdtrt_backend
from sdtrt_backend.demo import draw
from sdtrt_backend.graphs import WARM_UPS, record, side_stream
from sdtrt_backend.measure import compare, finish_device
from sdtrt_backend.options import Options
from sdtrt_backend.recipe import versions

PICTURES = 6  # until the module must be ready: two calibrate, one builds
FUSED, STRENGTH = 10, 1.0  # layers that an adapter's fuse writes; of the spread of their weights
FOLLOWED = 40  # calls until a written weight must be followed: all are looked at in 16, and their numbers arrive later
MOVED = 0.02  # of the module's size: what may stay on the GPU after it has left
MAX_ERROR = Options.parse(None).max_error


class Latents:
    """What ``accelerate`` takes for a pipeline: a denoiser."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet = unet


class Case:
    """make: -> (pipeline, its denoiser's keyword arguments at a timestep, what draws a picture of it)."""

    def __init__(self, name: str, make: Callable[[], tuple[Any, Callable[[float], dict[str, Any]], Callable[[int], Any]]],
                 options: dict[str, Any], rounds: int) -> None:
        self.name, self.make, self.options, self.rounds = name, make, options, rounds


def bundled() -> tuple[Any, Callable[[float], dict[str, Any]], Callable[[int], Any]]:
    pipe = sdtrt_backend.demo_pipeline(torch.float16 if gpu.DEVICE.type == "cuda" else torch.float32).to(gpu.DEVICE)
    return pipe, gpu.inputs(pipe.unet, 2, True), lambda seed: draw(pipe, ["rocket, fluent style"], 4, seed)


def sdxl(tiny: bool) -> tuple[Any, Callable[[float], dict[str, Any]], Callable[[int], Any]]:
    pipe = Latents(gpu.build("sdxl", tiny))
    arguments = gpu.inputs(pipe.unet, 2, tiny)
    return pipe, arguments, lambda seed: [pipe.unet(**arguments(t)) for t in gpu.TIMESTEPS]


class Life:
    """The parts of a case, in order; ``rows`` are what they found."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows: list[dict[str, Any]] = []
        self.before = gpu.memory()
        self.size = 0

    def run(self) -> list[dict[str, Any]]:
        for part in (self.made, self.ready, self.timed, self.to_cpu, self.back, self.copied, self.fused, self.dropped):
            start = time.perf_counter()
            row: dict[str, Any] = {"case": self.case.name, "part": part.__name__}
            try:
                found = part()
            except Exception as error:  # a row of the table; the other parts go on
                traceback.print_exc()
                found = {"error": gpu.first_line(error)}
                error.__traceback__ = None  # its frames hold the module
            row |= found | self.memory() | {"seconds": time.perf_counter() - start}
            print(json.dumps(row), flush=True)
            self.rows.append(row)
        return self.rows

    def memory(self) -> dict[str, Any]:
        """Bytes since the case began; shares are of the module's own size."""
        allocated, reserved = (now - then for now, then in zip(gpu.memory(), self.before, strict=True))
        return {"allocated": allocated, "reserved": reserved, "share": allocated / self.size if self.size else 0.0}

    @property
    def unet(self) -> torch.nn.Module:
        unet: torch.nn.Module = self.pipe.unet
        return unet

    def moved(self) -> Any:
        """The pipeline with all its models, where it is one."""
        return self.pipe if hasattr(self.pipe, "to") else self.unet

    def call(self) -> torch.Tensor:
        result: torch.Tensor = self.unet(**self.kwargs)[0]
        return result

    def own(self) -> torch.Tensor:
        """The module's own result: its forward, past what it is compiled with."""
        result: torch.Tensor = self.unet.forward(**self.kwargs)[0]
        return result

    def made(self) -> dict[str, Any]:
        self.pipe, arguments, self.draw = self.case.make()
        self.kwargs = arguments(gpu.TIMESTEPS[2])
        self.size = sum(p.numel() * p.element_size() for p in self.unet.parameters())
        self.expected = self.own().cpu()
        return {"size": self.size}

    def ready(self) -> dict[str, Any]:
        options = {"weights": "release", "calibration_runs": 2} | self.case.options
        sdtrt_backend.accelerate(self.pipe, backend="sd_int8", **options)
        pictures = 0
        while pictures < PICTURES:
            self.draw(pictures)
            pictures += 1
            if sdtrt_backend.explain(self.pipe).state not in ("calibrating", "building"):
                break
        error = compare(self.call().cpu(), self.expected)
        report = sdtrt_backend.explain(self.pipe)
        if report.state != "ready":
            raise RuntimeError(f"{report.state} after {pictures} pictures: {'; '.join((*report.fallbacks, *report.notes))}")
        return {"pictures": pictures, "error_of_output": error, "flops_share": report.quantized_flops_share,
                "timings": dict(report.timings), "fallbacks": list(report.fallbacks), "notes": list(report.notes),
                **_wrong(error, MAX_ERROR)}

    def timed(self) -> dict[str, Any]:
        """Ours and torch.compile in turn, the latter of a module of its own and as one CUDA graph."""
        plain, arguments, _ = self.case.make()
        compiled, kwargs = torch.compile(plain.unet, dynamic=False), arguments(gpu.TIMESTEPS[2])

        def step() -> Any:
            return compiled(**kwargs)

        step()
        taken = gpu.times_ms({"ours": self.call, "compile": _graphed(step)}, self.case.rounds)
        return {"step_ms": taken["ours"], "compile_ms": taken["compile"], "ratio": taken["compile"] / taken["ours"]}

    def to_cpu(self) -> dict[str, Any]:
        held = self.memory()
        self.moved().to("cpu")
        left = self.memory()["allocated"]
        found: dict[str, Any] = {"held_before": held["allocated"], "left_of_module": left / self.size,
                                 "left_of_held": left / max(1, held["allocated"])}
        if gpu.DEVICE.type == "cuda" and left > MOVED * self.size:
            found["error"] = f"{left / 1e6:.0f} MB stay on the GPU, {left / self.size:.1%} of the module"
        return found

    def back(self) -> dict[str, Any]:
        moved = gpu.first_call(lambda: self.moved().to(gpu.DEVICE))
        woken = gpu.first_call(self.call)
        again = gpu.first_call(self.call)
        error = compare(self.call().cpu(), self.expected)
        return {"move_s": moved, "first_call_s": woken, "next_call_s": again, "error_of_output": error,
                "state": sdtrt_backend.explain(self.pipe).state, **_wrong(error, MAX_ERROR)}

    def copied(self) -> dict[str, Any]:
        held = self.memory()["allocated"]
        start = time.perf_counter()
        twin = copy.deepcopy(self.unet)
        finish_device()
        seconds = time.perf_counter() - start
        took = self.memory()["allocated"] - held
        mine, theirs = dict(self.unet.named_parameters()), dict(twin.named_parameters())
        different = [n for n in mine if n not in theirs or not torch.equal(mine[n], theirs[n])]
        devices = sorted({str(p.device) for p in twin.parameters()})
        found: dict[str, Any] = {"copy_s": seconds, "copy_bytes": took, "copy_of_module": took / self.size, "devices": devices}
        if different or len(mine) != len(theirs):
            found["error"] = f"{len(different)} of {len(mine)} parameters differ in the copy, {different[:3]} among them"
        return found

    def fused(self) -> dict[str, Any]:
        before, state = self.expected.to(gpu.DEVICE), ""
        for weight in _written(self.unet):
            noise = torch.randn(weight.shape, generator=torch.Generator(weight.device).manual_seed(7), device=weight.device)
            weight.data += (STRENGTH * weight.detach().float().std() * noise).to(weight.dtype)
        after = self.own().clone()
        change = compare(after, before)
        start, slowest, errors, followed = time.perf_counter(), 0.0, [], False
        for _ in range(FOLLOWED):
            made: list[torch.Tensor] = []
            slowest = max(slowest, gpu.first_call(lambda: made.append(self.call())))  # noqa: B023  # called here
            errors.append(compare(made[0], after))
            state = sdtrt_backend.explain(self.pipe).state  # the call that notices gives the module's own result: not yet built
            followed = state == "ready" and errors[-1] < min(MAX_ERROR, compare(made[0], before))
            if followed:
                break
        found: dict[str, Any] = {"change_of_output": change, "error_of_output": errors[-1], "calls": len(errors),
                                 "followed_s": time.perf_counter() - start, "slowest_call_s": slowest,
                                 "state": state}
        if not followed:
            found["error"] = (f"{state} and {errors[-1]:.4f} from the new output after {len(errors)} calls; the output moved by "
                              f"{change:.4f}")
        return found

    def dropped(self) -> dict[str, Any]:
        del self.pipe, self.draw, self.kwargs, self.expected
        gc.collect()
        left = self.memory()["allocated"]
        if gpu.DEVICE.type == "cuda" and left > MOVED * self.size:
            return {"error": f"{left / 1e6:.0f} MB stay on the GPU, {left / max(1, self.size):.1%} of the module"}
        return {}


def _graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as one CUDA graph, made on the stream that ours are made on: cuBLAS keeps a workspace for each."""
    if gpu.DEVICE.type == "cpu":
        return step
    with side_stream() as stream:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        stream.synchronize()
        graph, result = record(step, stream)

    def replay() -> Any:
        graph.replay()
        return result, step  # what the graph writes, and the weights that it reads

    return replay


def _workspaces() -> None:
    """cuBLAS makes one for each stream at the first product there, and cuBLASLt at the first with a bias."""
    if gpu.DEVICE.type == "cuda":
        x = torch.ones(256, 256, device=gpu.DEVICE, dtype=torch.float16)
        torch.addmm(x[0], x @ x, x)
        with side_stream() as stream, torch.cuda.stream(stream):
            torch.addmm(x[0], x @ x, x)
        torch.cuda.synchronize()


def _wrong(error: float, most: float) -> dict[str, str]:
    return {} if error < most else {"error": f"the output differs by {error:.4f} from the module's own, max_error is {most}"}


def _written(unet: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Weights of FUSED layers, from the first to the last."""
    named = [m.get_parameter("weight") for n, m in unet.named_modules()
             if n.endswith(("conv1", "conv2", "to_out.0")) and isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    yield from named[:: max(1, len(named) // FUSED)][:FUSED]


SHOWN = {"step_ms": "step {:.2f} ms", "compile_ms": "torch.compile {:.2f} ms", "ratio": "{:.2f}x", "pictures": "{} pictures",
         "error_of_output": "error {:.4f}", "change_of_output": "the output moved by {:.4f}", "calls": "followed after {} calls",
         "slowest_call_s": "the slowest {:.1f} s", "left_of_module": "{:.2%} of the module left",
         "left_of_held": "{:.2%} of what it held",
         "move_s": "moved in {:.2f} s", "first_call_s": "first call {:.2f} s", "next_call_s": "next {:.3f} s",
         "copy_s": "copied in {:.2f} s", "copy_of_module": "{:.0%} of the module's size", "state": "{}"}


def table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'case':10}{'part':9}{'s':>7}{'alloc MB':>10}{'reserved':>10}{'of module':>11}  found")
    for row in rows:
        found = ", ".join(text.format(row[key]) for key, text in SHOWN.items() if key in row)
        print(f"{row['case']:10}{row['part']:9}{row['seconds']:7.1f}{row['allocated'] / 1e6:10.1f}{row['reserved'] / 1e6:10.1f}"
              f"{row['share']:11.2%}  {found}" + (f"; WRONG: {row['error']}" if "error" in row else ""))
    print(f"{sum('error' in row for row in rows)} of {len(rows)} parts are wrong")


@torch.no_grad()
def main(given: argparse.Namespace) -> int:
    gpu.DEVICE = torch.device(given.device)
    engine = {"engine": given.engine} if given.engine else {}
    # the bundled model is so small that 16 bits are faster: the engine is named, so that it is not refused for that
    cases = [Case("bundled", bundled, {"engine": "inductor"} | engine, given.rounds),
             Case("sdxl", lambda: sdxl(given.tiny), engine, given.rounds)]
    rows: list[dict[str, Any]] = []
    _workspaces()
    facts = {"machine": gpu.machine(), "versions": versions(gpu.PACKAGES), "tiny": given.tiny, "engine": given.engine}
    for case in cases:
        if case.name not in given.cases:
            continue
        rows += Life(case).run()
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")  # what there is, should the next one be stopped
    table(rows)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", choices=("bundled", "sdxl"), default=("bundled", "sdxl"))
    parser.add_argument("--engine", help="option of accelerate; default: of the bundled model inductor, of the other auto")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a small configuration of SDXL's structure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_life.json")
    raise SystemExit(main(parser.parse_args()))

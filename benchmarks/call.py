"""What does one call of the compiled denoiser cost outside its kernels? Python time of the callable that Dynamo calls.

    python benchmarks/call.py                       # this version
    python benchmarks/call.py --against 20ca304     # and another one, in turn with it; the ratio last
    python benchmarks/call.py --count               # traces the published configurations again for the counts in GRAPHS

A module of many layers of width 32 has the parameters and inputs of the graph of a published model. It is compiled, calibrated
and built as a user's is; then the built step gives way to a function that returns a fixed tensor, and so does the counter of the
drift watch, so that no kernel is left. Timed is ``step(*args)`` with the arguments that Dynamo gave, with the watch on, in time
of the processor. Each version is one process; they take turns in rounds of ``--calls`` calls. A figure is the median
over the rounds of the mean of a round, as some calls do what others do not; the ratio is the median over the rounds too. On the
CPU, what a GPU adds is not in it: ``--device cuda``.
"""

from __future__ import annotations

import argparse
import gc
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ROWS = 32, 4


@dataclass(frozen=True)
class Counts:
    """Of the largest graph that Dynamo makes of a model. linears counts convolutions too; both kinds of norm have a weight.

    Neither model has a buffer. inputs: tensors that are no parameter, latents and timestep among them.
    """

    linears: int
    biased_linears: int
    norms: int
    biased_norms: int
    inputs: int

    @property
    def parameters(self) -> int:
        return self.linears + 2 * self.biased_linears + self.norms + 2 * self.biased_norms


# Z-Image: 30 blocks and 4 of its refiners; its other graphs hold 7 parameters. Its list of rotary tables are three of the inputs
GRAPHS = {"SDXL UNet": Counts(420, 374, 0, 256, 5), "Z-Image, 30 blocks": Counts(238, 35, 206, 0, 9)}


class Stand(nn.Module):
    """Stands for a model: as many parameters and inputs, in layers of width 32."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(counts.linears)]
            + [nn.Linear(WIDTH, WIDTH) for _ in range(counts.biased_linears)]
            + [nn.RMSNorm(WIDTH) for _ in range(counts.norms)]
            + [nn.LayerNorm(WIDTH) for _ in range(counts.biased_norms)])

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        h = sample + timestep / 1000
        for other in others:
            h = h + other
        for layer in self.layers:
            h = (h + layer(h)) / 2
        return h


# one version, in a process of its own

def ready(counts: Counts, device: str) -> tuple[Any, tuple[Any, ...], nn.Module]:
    """(what Dynamo calls for such a module, the arguments that it gives, the module, with which the step dies); nothing that is
    built computes."""
    import sdtrt_backend
    from sdtrt_backend.backend import sd_int8

    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Stand(counts).eval().requires_grad_(False).to(device)
    made: list[Any] = []
    given: list[tuple[Any, ...]] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        step = sd_int8(gm, example_inputs, options={"engine": "reference", "calibration_runs": 1, "max_error": 1.0})
        made.append(step)

        def call(*args: Any) -> Any:
            given[:] = [args]
            return step(*args)
        return call

    compiled = torch.compile(module, backend=backend)
    sample = torch.randn(2, ROWS, WIDTH, device=device)
    others = [torch.randn(1, WIDTH, device=device) for _ in range(counts.inputs - 2)]
    with torch.no_grad():
        for t in (900.0, 100.0, 900.0, 100.0):
            result = compiled(sample, torch.tensor(t, device=device), others)
    report = sdtrt_backend.explain(compiled)
    assert (report.state, len(made)) == ("ready", 1), f"{report.state}, {len(made)} graphs: {report}"
    parameters = sum(isinstance(a, nn.Parameter) for a in given[0])
    assert (parameters, len(given[0]) - parameters) == (counts.parameters, counts.inputs), f"{len(given[0])} arguments"
    without_kernels(made[0], result, given[0])
    return made[0], given[0], module


def without_kernels(step: Any, result: torch.Tensor, args: tuple[Any, ...]) -> None:
    """The step returns ``result`` and samples nothing, in the objects of the version that is imported. What tells NaN and black
    is a part of the step now, and of its CUDA graph; on the CPU it is computed."""
    def fixed(*_: torch.Tensor) -> tuple[torch.Tensor]:
        return (result,)

    def unsampled(watch: Any) -> Any:
        shares = torch.zeros(len(watch.counter.groups), device=result.device)
        return replace(watch, counter=replace(watch.counter, shares=lambda *_: shares))

    if hasattr(step, "variants"):  # run.Step, until 20ca304
        step.variants = dict.fromkeys(step.variants, fixed)
        step.watches = {key: unsampled(watch) for key, watch in step.watches.items()}
        assert step.variants
        assert step.watches
        return
    unit = step.last()
    assert unit.variants
    assert all(variant.watch is not None for variant in unit.variants.values())
    from sdtrt_backend.drift import with_peaks

    watched = with_peaks(fixed, result.device)
    seen = watched(*(a for a in args if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter)))
    for key, variant in unit.variants.items():
        made = replace(variant.made, watch=unsampled(variant.watch))
        unit.variants[key] = replace(variant, step=watched if result.is_cpu else lambda *_: seen, made=made)


@torch.no_grad()
def round_us(step: Any, args: tuple[Any, ...], calls: int) -> float:
    """Mean microseconds of a call, of the processor: what else runs on the machine does not count."""
    gc.collect()
    start = time.process_time()
    for _ in range(calls):
        step(*args)
    return 1e6 * (time.process_time() - start) / calls


def serve() -> None:
    """Lines of JSON from the parent, {"graph": name} to build it and {"calls": n} to time the last one; answers in lines."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    step, args, module = None, (), None
    for line in sys.stdin:
        asked = json.loads(line)
        if "graph" in asked:
            step, args, module = ready(GRAPHS[asked["graph"]], asked["device"])
            answer: dict[str, Any] = {"layers": len(module.layers)}
        elif asked.get("profile"):
            profile(step, args)
            answer = {}
        else:
            answer = {"us": round_us(step, args, asked["calls"])}
        print(json.dumps(answer), file=answers, flush=True)


def profile(step: Any, args: tuple[Any, ...]) -> None:
    """Where the time goes, to stderr."""
    import cProfile
    import pstats

    recorded = cProfile.Profile()
    with torch.no_grad(), recorded:
        for _ in range(320):
            step(*args)
    pstats.Stats(recorded, stream=sys.stderr).sort_stats("tottime").print_stats(25)


# both versions

class Version:
    """A process that has one version of the package imported."""

    def __init__(self, source: Path) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")])),
                                    "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the measuring process ended with exit status {self.process.wait()}")
        return dict(json.loads(answer))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def source_of(revision: str, stack: ExitStack) -> Path:
    """Its src folder, in a worktree that goes with ``stack``; or the revision is a folder that holds the package."""
    if (Path(revision) / "sdtrt_backend").is_dir():
        return Path(revision).resolve()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "worktree"
    worktree = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*worktree, "add", "--detach", str(folder), revision], check=True, capture_output=True)
    stack.callback(subprocess.run, [*worktree, "remove", "--force", str(folder)], check=True)
    return folder / "src"


def main(given: argparse.Namespace) -> None:
    with ExitStack() as stack:
        sources = {"this version": ROOT / "src"}
        if given.against:
            sources[given.against] = source_of(given.against, stack)
        versions = {}
        for name, source in sources.items():
            versions[name] = Version(source)
            stack.callback(versions[name].end)
        found = {graph: measured(versions, graph, given) for graph in given.graphs}
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"torch": torch.__version__, "calls": given.calls, "rounds": given.rounds,
                                         "us": found}, indent=1) + "\n")
    table(found, list(versions))


def measured(versions: dict[str, Version], graph: str, given: argparse.Namespace) -> dict[str, float]:
    """Version -> microseconds of a call."""
    for name, version in versions.items():
        start = time.perf_counter()
        version.ask(graph=graph, device=given.device)
        print(f"{graph}: {name} is ready after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        version.ask(calls=given.calls)
    taken = [{name: version.ask(calls=given.calls)["us"] for name, version in versions.items()} for _ in range(given.rounds)]
    if given.profile:
        for version in versions.values():
            version.ask(profile=True)
    found = {name: statistics.median(t[name] for t in taken) for name in versions}
    if len(found) > 1:
        found["ratio"] = statistics.median(operator.truediv(*t.values()) for t in taken)
    return found


def table(found: dict[str, dict[str, float]], names: list[str]) -> None:
    print(f"{'microseconds of a call':28}{'parameters':>11}{'inputs':>8}" + "".join(f"{n:>14}" for n in names)
          + ("   ratio" if len(names) > 1 else ""))
    for graph, us in found.items():
        counts = GRAPHS[graph]
        print(f"{graph:28}{counts.parameters:11}{counts.inputs:8}" + "".join(f"{us[n]:14.1f}" for n in names)
              + (f"{us['ratio']:8.2f}" if len(names) > 1 else ""))


# what the counts are from

@torch.no_grad()
def count() -> None:
    """Prints the parameters and inputs of each graph that Dynamo makes of the published models, on the meta device."""
    import gpu
    from diffusers import UNet2DConditionModel, ZImageTransformer2DModel

    gpu.DEVICE = torch.device("meta")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    unet = {"sample": empty(2, 4, 128, 128), "timestep": empty(), "encoder_hidden_states": empty(2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": empty(2, 1280), "time_ids": empty(2, 6)}, "return_dict": False}
    dit = {"x": [empty(16, 1, 128, 128)], "t": empty(1), "cap_feats": [empty(77, 2560)], "return_dict": False}
    for name, model, kwargs in (("SDXL UNet", lambda: UNet2DConditionModel(**gpu.UNET["sdxl"]), unet),
                                ("Z-Image, 30 blocks", ZImageTransformer2DModel, dit)):
        with torch.device("meta"):
            module = model().eval().requires_grad_(False)
        buffers = {id(b) for b in module.buffers()}

        def see(gm: Any, example_inputs: Any, name: str = name, buffers: set[int] = buffers) -> Any:
            parameters = sum(isinstance(v, nn.Parameter) for v in example_inputs)
            held = sum(id(v) in buffers for v in example_inputs)
            print(f"{name}: a graph with {parameters} parameters, {held} buffers and "
                  f"{len(example_inputs) - parameters - held} inputs", flush=True)
            return gm

        torch.compile(module, backend=see)(**kwargs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="a commit to measure too, or a folder that holds the package")
    parser.add_argument("--graphs", nargs="+", choices=tuple(GRAPHS), default=tuple(GRAPHS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--profile", action="store_true", help="say in which functions the time goes")
    parser.add_argument("--count", action="store_true", help="of the published models; measures nothing")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
    elif arguments.count:
        count()
    else:
        main(arguments)

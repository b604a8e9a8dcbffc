"""What does a LoRA cost a step, and what does it cost to switch to another one? SDXL's UNet or Flux, on a GPU.

    python benchmarks/lora.py --model sdxl                                     # all ways, one table
    python benchmarks/lora.py --model sdxl --side-by-side                      # the same, each in a process of its own
    python benchmarks/lora.py --model flux --ways eager,keep,release
    python benchmarks/lora.py --model sdxl --tiny --rank 4                     # the same code on a CPU

Two LoRAs of ``--rank`` over all linears and convolutions, random weights. Ways: ``eager`` and PEFT; ``compile``: torch.compile
and PEFT's hot swap; ``side``: sd_int8 and the same, two products beside each layer; ``keep`` and ``release``: sd_int8 and
``sdtrt_backend.set_loras``, with the 16-bit weights on the GPU and in memory of the host.

step       ms without a LoRA, with one, and after the switches; median of ROUNDS means of CALLS calls, as a user calls it. Of
           set_loras without and with one in turn: the GPU's clock, which its power limits, moves by more than they differ
switch     ms from one LoRA to the other until the GPU has done it: median of SWITCHES, the first two of each left out
compiled   frames that Dynamo compiled, and CUDA graphs that were captured, during the timed switches and the steps behind them
error      relative, of a step with the second LoRA, to the module with it merged in fp32

With ``--side-by-side`` the ways compile at the same time, and measure one after the other when all have, or after ``--limit`` s.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu
import torch

import sdtrt_backend
from sdtrt_backend import graphs
from sdtrt_backend.measure import compare, finish_device
from sdtrt_backend.recipe import versions

WAYS = ("eager", "compile", "side", "keep", "release")
OURS = ("keep", "release", "side")
HOT = ("side", "compile")  # a LoRA is loaded before they compile, and swapped behind it, as PEFT wants it
ROUNDS, CALLS, SWITCHES = 10, 5, 8
PICTURES = 5  # until the module must be ready: two calibrate, one builds
MEASURING = 120  # s that it may take all ways to measure
STRENGTH = 0.2  # of the spread of a weight, that a LoRA adds to it


def lora(module: torch.nn.Module, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A state dict as PEFT writes it, on the module's device."""
    noise, found = torch.Generator(gpu.DEVICE).manual_seed(seed), {}
    for path, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and ".lora_" not in path:
            w = layer.weight
            down = torch.randn(rank, *w.shape[1:], generator=noise, device=w.device) * w[0].numel() ** -0.5
            up = torch.randn(w.shape[0], rank, *[1] * (w.dim() - 2), generator=noise, device=w.device)
            up *= STRENGTH * w.float().std() * (w[0].numel() / rank) ** 0.5
            found |= {f"{path}.lora_A.weight": down.to(w.dtype), f"{path}.lora_B.weight": up.to(w.dtype)}
    return found


def merged(module: torch.nn.Module, factors: dict[str, torch.Tensor]) -> torch.nn.Module:
    whole = copy.deepcopy(module).float()
    for path in {key.partition(".lora_")[0] for key in factors}:
        w = whole.get_submodule(path).weight
        up, down = (factors[f"{path}.lora_{x}.weight"].float().flatten(1) for x in "BA")
        w += (up @ down).view(w.shape)
    return whole


class Turns:
    """Of the ways that share a machine: they measure in turn, and only while none compiles. Alone a way never waits."""

    def __init__(self, way: str, ways: list[str], folder: str, until: float) -> None:
        self.way, self.ways, self.folder, self.until = way, ways, Path(folder), until

    def wait(self, phase: str, ways: list[str]) -> None:
        while len(self.ways) > 1 and time.time() < self.until and not all((self.folder / f"{phase}-{w}").exists() for w in ways):
            time.sleep(0.05)

    @contextlib.contextmanager
    def mine(self, phase: str) -> Iterator[None]:
        if len(self.ways) == 1:
            yield
            return
        (self.folder / f"{phase}-{self.way}").touch()
        self.wait(phase, self.ways)
        with open(self.folder / "turn", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Pipe:
    """What ``accelerate`` takes for a pipeline."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet = unet


def round_ms(step: Callable[[], Any]) -> float:
    finish_device()
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    finish_device()
    return 1e3 * (time.perf_counter() - start) / CALLS


def step_ms(step: Callable[[], Any]) -> float:
    return statistics.median(round_ms(step) for _ in range(ROUNDS))


def in_turn(module: torch.nn.Module, step: Callable[[], Any], sets: dict[str, dict[str, float]]) -> dict[str, float]:
    """The step with each of these sets of LoRAs."""
    times: dict[str, list[float]] = {name: [] for name in sets}
    for _ in range(ROUNDS):
        for name, weights in sets.items():
            sdtrt_backend.set_loras(module, weights)
            step()
            step()
            times[name].append(round_ms(step))
    return {name: statistics.median(taken) for name, taken in times.items()}


def measured(way: str, module: torch.nn.Module, arguments: Callable[[float], dict[str, Any]], dicts: dict[str, Any],
             expected: torch.Tensor, rank: int, turns: Turns) -> dict[str, Any]:
    """The row of one way."""
    torch._dynamo.reset()
    kwargs, ours, start = arguments(gpu.TIMESTEPS[2]), way in OURS, time.perf_counter()
    if way in HOT:
        module.enable_lora_hotswap(target_rank=rank, check_compiled="ignore")
        _switch(way, module, dicts)("a")
    if ours:
        first = next(w for w in turns.ways if w in OURS)
        turns.wait("without", [first] if way != first else [])  # which times the kernels
        options = {} if gpu.DEVICE.type == "cuda" else {"engine": "reference"}
        sdtrt_backend.accelerate(Pipe(module), weights="release" if way == "release" else "keep", max_error=1.0, **options)
    if way == "compile":
        module.compile()

    def step() -> torch.Tensor:
        result: torch.Tensor = module(**kwargs)[0]
        return result

    if ours:
        for _ in range(PICTURES):
            for t in gpu.TIMESTEPS:
                module(**arguments(t))
        assert sdtrt_backend.explain(module).state == "ready", sdtrt_backend.explain(module).fallbacks
    if way == "compile":
        step()
    row: dict[str, Any] = {"way": way, "build_s": time.perf_counter() - start}
    with turns.mine("without"):
        if way == "eager":
            row["before_ms"] = step_ms(step)
    with turns.mine("begin"):  # all have measured
        pass
    switch, row["first_s"] = _switch(way, module, dicts), []
    for name in "ababa":
        start = time.perf_counter()
        switch(name)
        step()
        step()
        row["first_s"].append(time.perf_counter() - start)
    with turns.mine("with"):
        row |= _switched(way, module, switch, step, expected)
    return row


def _switched(way: str, module: torch.nn.Module, switch: Callable[[str], None], step: Callable[[], torch.Tensor],
              expected: torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"with_ms": step_ms(step)}
    captured: list[int] = []
    record, frames = graphs.record, _frames()
    graphs.record = lambda *a, **k: captured.append(1) or record(*a, **k)  # type: ignore[func-returns-value]
    try:
        times = []
        for i in range(SWITCHES):
            finish_device()
            start = time.perf_counter()
            switch("ba"[i % 2])
            finish_device()
            times.append(1e3 * (time.perf_counter() - start))
            step()
        row |= {"switch_ms": statistics.median(times), "after_ms": step_ms(step)}
    finally:
        graphs.record = record
    switch("b")
    row |= {"frames": _frames() - frames, "graphs": len(captured), "error": compare([step()], [expected])}
    if way in ("keep", "release"):
        row |= in_turn(module, step, {"before_ms": {}, "with_ms": {"b": 1.0}})
        row["said"] = [note for note in sdtrt_backend.explain(module).notes if "LoRAs" in note]
    return row


def _frames() -> int:
    return int(sum(torch._dynamo.utils.counters["frames"].values()))


def _switch(way: str, module: Any, dicts: dict[str, Any]) -> Callable[[str], None]:
    if way in ("keep", "release"):
        for name, factors in dicts.items():
            sdtrt_backend.load_lora(module, factors, name)
        return lambda name: sdtrt_backend.set_loras(module, {name: 1.0})
    if way in HOT:
        return lambda name: module.load_lora_adapter(dict(dicts[name]), prefix=None, adapter_name="one",
                                                     hotswap="one" in getattr(module, "peft_config", {}))
    for name, factors in dicts.items():
        module.load_lora_adapter(dict(factors), prefix=None, adapter_name=name)
    return lambda name: module.set_adapters([name], [1.0])


@torch.no_grad()
def rows_of(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One after the other, in this process."""
    rows: list[dict[str, Any]] = []
    module = gpu.build(given.model, given.tiny)
    arguments = gpu.inputs(module, given.batch, given.tiny, given.model)
    dicts = {name: lora(module, given.rank, seed) for name, seed in (("a", 1), ("b", 2))}
    whole = merged(module, dicts["b"])
    expected = gpu.in_float32(whole, arguments(gpu.TIMESTEPS[2]))
    del whole
    for way in given.ways.split(","):
        gc.collect()
        if gpu.DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        mine = copy.deepcopy(module)
        try:
            turns = Turns(way, given.turns.split(",")[1:] if given.turns else [way], given.turns.split(",")[0], given.until)
            rows.append(measured(way, mine, arguments, dicts, expected, given.rank, turns))
        except Exception as error:  # a row of the table; the others go on
            rows.append({"way": way, "error": gpu.first_line(error)})
        print(json.dumps(rows[-1]), flush=True)
        sdtrt_backend.restore(mine)
    return rows


def side_by_side(given: argparse.Namespace, ways: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        given.turns, given.until = ",".join([folder, *ways]), time.time() + given.limit
        children = {}
        for way in ways:
            options = [f"--{name}={value}" for name, value in vars(given).items() if not isinstance(value, bool)]
            options += [*["--tiny"] * given.tiny, f"--ways={way}", f"--out={folder}/{way}.json"]
            children[way] = subprocess.Popen([sys.executable, __file__, *options])
        left, rows = dict(children), []
        while left:
            time.sleep(0.5)
            too_late = time.time() > given.until + MEASURING
            for way in [way for way, child in left.items() if child.poll() is not None or too_late]:
                left.pop(way).kill()  # one that ended can be killed again
                for phase in ("without", "begin", "with"):  # nobody waits for it
                    (Path(folder) / f"{phase}-{way}").touch()
        for way, child in children.items():
            file = Path(folder) / f"{way}.json"
            rows += json.loads(file.read_text())["rows"] if file.exists() else [
                {"way": way, "error": f"no result: its process ended with {child.wait()}"}]
        return rows


def main(given: argparse.Namespace) -> None:
    ways = given.ways.split(",")
    rows = side_by_side(given, ways) if given.side_by_side else rows_of(given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": gpu.machine(), "versions": versions(), "model": given.model, "rank": given.rank, "batch": given.batch,
             "tiny": given.tiny}
    given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    if given.turns and not given.side_by_side:
        return
    print(f"\n{given.model}, batch {given.batch}, rank {given.rank}\n"
          f"{'':8} {'step without':>13} {'with':>8} {'after':>8} {'switch ms':>10} {'frames':>7} {'graphs':>7} {'error':>9}")
    for r in rows:
        if "switch_ms" not in r:
            print(f"{r['way']:8} {r['error']}")
            continue
        before = f"{r['before_ms']:13.2f}" if "before_ms" in r else f"{'':13}"
        print(f"{r['way']:8} {before} {r['with_ms']:8.2f} {r['after_ms']:8.2f} {r['switch_ms']:10.1f} {r['frames']:7} "
              f"{r['graphs']:7} {r['error']:9.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sdxl", "sd15", "flux"), default="sdxl")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--tiny", action="store_true", help="a small configuration of the same structure")
    parser.add_argument("--side-by-side", action="store_true", help="each way in a process, all at the same time")
    parser.add_argument("--limit", type=float, default=420.0, help="of that: s until those that are ready measure")
    parser.add_argument("--turns", default="", help=argparse.SUPPRESS)  # of one way: a folder, all ways
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lora_gpu.json")
    main(parser.parse_args())

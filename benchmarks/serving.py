"""One server in the pipeline's own precision and then one in 8 bits, under the same load: pictures a second and p50, p95, p99.

    python benchmarks/serving.py                            # the bundled model on the CPU, four pictures a request
    python benchmarks/serving.py --model DIR --recipe R --size 512x512 --steps 50 --clients 2 --duration 300

Writes load_cpu.json and load_cpu.svg (load_gpu.* on a GPU). Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sdtrt_backend.demo import PROMPTS
from sdtrt_backend.files import write_atomically
from sdtrt_backend.recipe import versions
from sdtrt_backend.serving.http import Server, begin, end
from sdtrt_backend.serving.load import Outcome, Plan, chart, run_with_bar, summary
from sdtrt_backend.serving.painter import Setup

COLUMNS = ("requests", "pictures_per_s", "p50", "p95", "p99", "refused", "failed")


def measure(setup: Setup, server: Server, plan: Plan) -> list[Outcome]:
    """Of a server that is started for it; its first requests are not counted."""
    begin(setup, server)
    try:
        run_with_bar(replace(plan, rate=None, clients=1, duration_s=1.0))
        return run_with_bar(plan)
    finally:
        end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers pipeline folder; the bundled model when left out")
    parser.add_argument("--recipe")
    parser.add_argument("--size", default="")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--count", type=int, default=4, help="pictures of a request")
    parser.add_argument("--rate", type=float, help="requests a second; without it clients ask")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--backend", default="sd_int8")
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    sizes = tuple((int(w), int(h)) for w, h in (size.split("x") for size in filter(None, given.size.split(","))))
    own = Setup(model=given.model, backend=None, sizes=sizes, batches=(given.count,), steps=given.steps)
    server = Server(port=given.port, queue=64)
    plan = Plan(f"http://127.0.0.1:{given.port}", PROMPTS, given.rate, given.clients, given.duration, count=given.count)
    runs = {"own precision": measure(own, server, plan),
            given.backend: measure(replace(own, backend=given.backend, recipe=given.recipe), server, plan)}
    rows: dict[str, dict[str, Any]] = {name: summary(outcomes) for name, outcomes in runs.items()}
    gpu = torch.cuda.is_available()
    body = {"machine": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(), "versions": versions(["sdtrt_backend", "torch", "diffusers", "ray"]),
            "setup": asdict(own), "plan": asdict(plan), "rows": rows}
    stem = given.out / ("load_gpu" if gpu else "load_cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomically(stem.with_suffix(".json"), (json.dumps(body, indent=1) + "\n").encode())
    write_atomically(stem.with_suffix(".svg"), chart(runs).encode())
    print(f"\n{'':16}" + "".join(f"{name:>16}" for name in COLUMNS))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[c]:16.2f}" if isinstance(row[c], float) else f"{row[c]!s:>16}" for c in COLUMNS))
    print(f"pictures a second: {rows[given.backend]['pictures_per_s'] / rows['own precision']['pictures_per_s']:.2f}x")


if __name__ == "__main__":
    main()

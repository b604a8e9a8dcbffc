"""Pictures a second of ``sdtrt serve`` and of ``sdtrt batch`` with one pipeline and with several, each on a GPU of its own.

    python benchmarks/scaling.py --model sd15 --replicas 2        # two GPUs: SD1.5 as published, random weights, 512x512
    python benchmarks/scaling.py --duration 10                    # the bundled model, on the cores of a CPU

serve: ``--clients`` a pipeline ask for ``--count`` pictures each, again and again, for ``--duration`` seconds after all are warm.
batch: ``--pictures`` a pipeline, by when their files were written, without the first and last call of each actor: it has begun
to draw by then, and has not run out of prompts. Writes scaling_gpu.json, or scaling_cpu.json. Needs ``sdtrt_backend[serve]``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_pipeline
import torch

from sdtrt_backend.demo import PROMPTS
from sdtrt_backend.files import write_atomically
from sdtrt_backend.recipe import versions
from sdtrt_backend.serving.http import Server, begin, end
from sdtrt_backend.serving.jobs import run_batch
from sdtrt_backend.serving.load import Plan, run_with_bar, summary
from sdtrt_backend.serving.painter import Setup

SIDE = {"sd15": 512, "sdxl": 1024}


def served(setup: Setup, replicas: int, given: argparse.Namespace) -> float:
    """Pictures a second of a server that is started for it; its first requests are not counted."""
    plan = Plan(f"http://127.0.0.1:{given.port}", PROMPTS, clients=given.clients * replicas, duration_s=given.duration,
                count=given.count)
    begin(setup, Server(port=given.port, replicas=replicas, queue=1024))
    try:
        run_with_bar(replace(plan, duration_s=5.0))
        found = summary(run_with_bar(plan))
    finally:
        end()
    assert not found["failed"], found
    return float(found["pictures_per_s"])


def batched(setup: Setup, actors: int, given: argparse.Namespace, folder: Path) -> float:
    """Pictures a second of a job of its own."""
    prompts = folder / f"prompts-{actors}.jsonl"
    asked = [{"prompt": PROMPTS[i % len(PROMPTS)], "seed": i} for i in range(given.pictures * actors)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in asked))
    out = folder / f"drawn-{actors}"
    done = run_batch(prompts, out, setup, actors=actors)
    assert done.drawn == len(asked), done
    times = sorted(path.stat().st_mtime_ns for path in out.glob("*.png"))
    ends = given.count * actors
    inside = times[ends : len(times) - ends]
    return (len(inside) - 1) / ((inside[-1] - inside[0]) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIDE), help="with random weights; the bundled model when left out")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--backend", default="sd_int8")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--count", type=int, default=4, help="pictures of a request, and of a call")
    parser.add_argument("--clients", type=int, default=4, help="for each pipeline")
    parser.add_argument("--duration", type=float, default=30.0)
    parser.add_argument("--pictures", type=int, default=80, help="of a batch job, for each pipeline")
    parser.add_argument("--port", type=int, default=8018)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {"serve": {}, "batch": {}}
    with tempfile.TemporaryDirectory() as name:
        folder, setup = Path(name), Setup(backend=given.backend, batches=(given.count,), steps=given.steps)
        if given.model:
            gpu_pipeline.build(given.model, False).save_pretrained(folder / "model")
            torch.cuda.empty_cache()
            side = SIDE[given.model]
            setup = replace(setup, model=str(folder / "model"), sizes=((side, side),), options={"max_error": 1.0})
        for replicas in (1, given.replicas):
            rows["serve"][str(replicas)] = served(setup, replicas, given)
            rows["batch"][str(replicas)] = batched(setup, replicas, given, folder)
    on_gpu = torch.cuda.is_available()
    body = {"machine": torch.cuda.get_device_name() if on_gpu else "cpu", "model": given.model or "bundled",
            "versions": versions(["sdtrt_backend", "torch", "diffusers", "ray"]), "setup": asdict(setup), "pictures_per_s": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out / f"scaling_{'gpu' if on_gpu else 'cpu'}.json", (json.dumps(body, indent=1) + "\n").encode())
    print(f"\npictures a second{'1':>10}{given.replicas:>10}{'ratio':>10}")
    for what, row in rows.items():
        one, several = row["1"], row[str(given.replicas)]
        print(f"{what:17}{one:10.2f}{several:10.2f}{several / one:9.2f}x")


if __name__ == "__main__":
    main()

"""``autoquant`` on the linears of the SDXL UNet, against ``torch.compile`` alone, on one GPU:

    python benchmarks/gpu_autoquant.py                                       # batch 2, fp16, random weights
    python benchmarks/gpu_autoquant.py --dtype bfloat16 --min-sqnr 25        # torchao's row-wise fp8 takes bf16 only
    python benchmarks/gpu_autoquant.py --tiny --dtype float32 --out results  # the same code on a CPU, small

autoquant times the layers and then the whole module with and without its plan, each compiled, in turn; the second pair is the
benchmark. The plan is saved, and a fresh process applies it with every timing function made to fail.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import gpu
import torch

import sdtrt_backend
from sdtrt_backend.autoquant import MIN_SQNR
from sdtrt_backend.recipe import versions

FRESH = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import gpu, torch, sdtrt_backend
def fail(*_, **__): raise AssertionError("something was timed")
autoquant = sys.modules["sdtrt_backend.autoquant"]
autoquant.step_ms = autoquant.graph_ms = autoquant._compiled = fail
with torch.no_grad():
    module = gpu.build("sdxl", bool(int(sys.argv[3]))).to(getattr(torch, sys.argv[5]))
    start = time.perf_counter()
    plan = sdtrt_backend.autoquant(module, plan=sys.argv[2])
    seconds = time.perf_counter() - start
    kwargs = gpu.inputs(module, int(sys.argv[4]), bool(int(sys.argv[3])))(gpu.TIMESTEPS[2])
    finite = bool(module(**kwargs)[0].isfinite().all())
print(json.dumps({"layers": len(plan.layers), "apply_s": seconds, "finite": finite}))
"""


@torch.no_grad()
def main(batch: int, tiny: bool, out: Path, dtype: str, min_sqnr: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    module = gpu.build("sdxl", tiny).to(getattr(torch, dtype))
    kwargs = gpu.inputs(module, batch, tiny)(gpu.TIMESTEPS[2])
    before = module(**kwargs)[0].float()
    start = time.perf_counter()
    plan = sdtrt_backend.autoquant(module, kwargs, min_sqnr=min_sqnr)
    seconds = time.perf_counter() - start
    path = plan.save(out / f"{dtype}_plan.json")
    print(plan, flush=True)
    after = module(**kwargs)[0].float()
    arguments = (str(Path(__file__).parent), str(path), str(int(tiny)), str(batch), dtype)
    fresh = subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, capture_output=True, text=True)
    reloaded = json.loads(fresh.stdout.splitlines()[-1])
    row = {"machine": gpu.machine(), "versions": versions(gpu.PACKAGES), "batch": batch, "tiny": tiny, "dtype": dtype,
           "min_sqnr": min_sqnr, "seconds": seconds, "module_ms": dict(plan.module_ms), "verdict": plan.verdict,
           "times": {k: dict(v) for k, v in plan.times.items()}, "layers": len(plan.layers),
           "least_sqnr_db": min((c.sqnr_db for c in plan.layers.values()), default=None),
           "relative_error": float((after - before).norm() / before.norm()), "fresh_process": reloaded}
    (out / f"{dtype}.json").write_text(json.dumps(row, indent=1) + "\n")
    print(f"found in {seconds:.0f} s; a fresh process applied {reloaded['layers']} layers in {reloaded['apply_s']:.2f} s; "
          f"output changed by {row['relative_error']:.4f}")
    assert reloaded["layers"] == len(plan.layers)
    assert reloaded["finite"]
    assert all(c.sqnr_db >= plan.min_sqnr for c in plan.layers.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small configuration of the same structure")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--min-sqnr", type=float, default=MIN_SQNR, help="dB, of each layer's output")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_autoquant")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sdtrt_backend").setLevel(logging.INFO)
    main(given.batch, given.tiny, given.out, given.dtype, given.min_sqnr)

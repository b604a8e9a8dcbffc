"""Attention of the published denoisers on this GPU: torch's in 16 bits beside every kernel over fp8 codes.

    python benchmarks/tune_attention.py --out benchmarks/results/attention.json

ms and TFLOP/s of each, as ``kernels.gpu.MeasuredChooser`` times them: q, k, v as projections write them, calls replayed as a CUDA
graph. The passes that quantise q, k and v are in no column.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from sdtrt_backend.kernels.gpu import MeasuredChooser
from sdtrt_backend.recipe import versions

# what: batch, heads, tokens, width of a head
SHAPES = {"SDXL, batch 2, 64x64": (2, 10, 4096, 64), "SDXL, batch 2, 32x32": (2, 20, 1024, 64),
          "SDXL, batch 16, 64x64": (16, 10, 4096, 64), "SDXL, batch 16, 32x32": (16, 20, 1024, 64),
          "SD1.5, batch 8, 64x64": (8, 8, 4096, 40), "SD3.5-large, batch 2": (2, 38, 4429, 64), "FLUX.1-dev": (1, 24, 4608, 128),
          "Z-Image": (1, 30, 4192, 128), "Qwen-Image": (1, 24, 4224, 128), "LTX-Video": (1, 32, 5280, 64),
          "Wan 2.1 1.3B": (1, 12, 32760, 128)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    chooser = MeasuredChooser(torch.device("cuda"))
    rows = []
    for name, shape in SHAPES.items():
        wide = chooser.attention_times(shape, shape[2], torch.bfloat16, torch.bfloat16)["torch"]
        chooser.attention_fp8(shape, shape[2])
        known = chooser.measurements.get(f"attention fp8 {'x'.join(map(str, shape))} over {shape[2]}", dict)
        times: dict[str, float | str | None] = {"16 bits": wide, **known}
        rows.append({"shape": shape, "name": name, "ms": times})
        flops = 4 * math.prod(shape) * shape[2]
        told = (f"{kernel} {ms:.3f} ms {flops / ms / 1e9:4.0f}" if isinstance(ms, float) else f"{kernel}: {ms}"
                for kernel, ms in times.items())
        print(f"{name:24} {' | '.join(told)}", flush=True)
    libraries = versions(("torch", "triton", "nvidia-cudnn-frontend", "fa3-fwd"))
    found = {"gpu": torch.cuda.get_device_name(), "versions": libraries, "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

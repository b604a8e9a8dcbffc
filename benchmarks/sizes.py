"""What a new size costs on the CPU: the bundled UNet in 8 bits at two resolutions, four batch sizes and three prompt lengths.

    python benchmarks/sizes.py [--out FILE]

Each row, in turn: seconds of the first call (the build is in it), of the next one, of torch.compile's first call for the same
size as a graph of its own, and the relative error to the module's own output.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import sdtrt_backend
from sdtrt_backend.measure import compare
from sdtrt_backend.provenance import versions
from sdtrt_backend.store import processor

SIZES = [(2, 32, 8), (2, 64, 8), (1, 32, 8), (4, 32, 8), (8, 32, 8), (2, 32, 16), (2, 32, 24)]  # batch, latent, tokens
AGAIN = [(2, 32, 8), (4, 32, 8)]  # whose step is there already


@torch.no_grad()
def call(module: torch.nn.Module, config, size, timestep: int):
    batch, latent, tokens = size
    noise = torch.Generator().manual_seed(timestep)
    sample = torch.randn(batch, config.in_channels, latent, latent, generator=noise)
    context = torch.randn(batch, tokens, config.cross_attention_dim, generator=noise)
    start = time.perf_counter()
    y = module(sample, torch.tensor(timestep), encoder_hidden_states=context, return_dict=False)[0]
    return y, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pipe = sdtrt_backend.demo_pipeline()
    unet, config = pipe.unet, pipe.unet.config
    plain = sdtrt_backend.demo_pipeline().unet
    theirs = torch.compile(sdtrt_backend.demo_pipeline().unet, dynamic=False)
    recipe = sdtrt_backend.calibrate(pipe, ["red apple, noto style", "owl, fluent style"], num_inference_steps=8, progress=False)
    sdtrt_backend.accelerate(pipe, recipe=recipe, max_error=0.5)  # the inputs are noise
    rows = []
    print(f"{'batch':>5} {'latent':>6} {'tokens':>6} {'first call, s':>14} {'next, ms':>9} {'torch.compile, s':>17} {'error':>7}")
    for size in (*SIZES, *AGAIN):
        mine, first = call(unet, config, size, 500)
        _, again = call(unet, config, size, 500)
        own, _ = call(plain, config, size, 500)
        compiled = call(theirs, config, size, 500)[1] if size not in [r["size"] for r in rows] else None
        rows.append({"size": size, "first_s": first, "next_s": again, "torch_compile_s": compiled, "error": compare(mine, own)})
        shown = "" if compiled is None else f"{compiled:.1f}"
        print(f"{size[0]:>5} {size[1]:>6} {size[2]:>6} {first:>14.1f} {1e3 * again:>9.1f} {shown:>17} {rows[-1]['error']:>7.4f}",
              flush=True)
    report = sdtrt_backend.explain(pipe)
    print(report.state, *report.fallbacks, sep="\n  ")
    if given.out:
        given.out.write_text(json.dumps({"cpu": processor(), "threads": torch.get_num_threads(), "versions": versions(),
                                         "state": report.state, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""FLUX.1 in fp8 on a GPU that holds half of it: under model offload the 8-bit codes are what moves.

    python examples/flux.py "a lighthouse" --offload
"""

import argparse

import torch
from diffusers import FluxPipeline

import sdtrt_backend


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=4, help="the first two calibrate, the third one builds")
    parser.add_argument("--offload", action="store_true", help="one part of the pipeline on the GPU at a time")
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    pipe = FluxPipeline.from_pretrained(given.model, dtype=torch.bfloat16 if gpu else torch.float32)
    if given.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda" if gpu else "cpu")
    fp8 = gpu and torch.cuda.get_device_capability() >= (8, 9)
    sdtrt_backend.accelerate(pipe, backend="sd_fp8" if fp8 else "sd_int8")
    for seed in range(given.pictures):
        noise = torch.Generator().manual_seed(seed)
        pipe(given.prompt, num_inference_steps=given.steps, generator=noise).images[0].save(f"flux_{seed}.png")
    print(sdtrt_backend.explain(pipe))


if __name__ == "__main__":
    main()

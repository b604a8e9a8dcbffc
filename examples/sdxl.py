"""SDXL in 8 bits: the first two pictures calibrate, the third one builds, the rest are fast.

    python examples/sdxl.py "a lighthouse" "a red bicycle" "a bowl of soup" "a fox"
"""

import argparse

import torch
from diffusers import StableDiffusionXLPipeline

import sdtrt_backend


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--all-parts", action="store_true", help="the VAE and the text encoders too")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionXLPipeline.from_pretrained(given.model, dtype=dtype).to(device)
    sdtrt_backend.accelerate(pipe, parts="auto" if given.all_parts else "denoisers")
    for i, prompt in enumerate(given.prompts):
        pipe(prompt, num_inference_steps=given.steps).images[0].save(f"sdxl_{i}.png")
    print(sdtrt_backend.explain(pipe))


if __name__ == "__main__":
    main()

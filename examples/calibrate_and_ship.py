"""Calibrate once on your own prompts, ship the recipe, and be in 8 bits from the first picture everywhere.

    python examples/calibrate_and_ship.py MODEL calibrate prompts.txt recipe      # where you have time
    python examples/calibrate_and_ship.py MODEL draw recipe "a lighthouse"        # on every server
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import sdtrt_backend


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name on the hub, or a folder")
    parser.add_argument("what", choices=("calibrate", "draw"))
    parser.add_argument("source", type=Path, help="a file of prompts, one in a line; or the folder of a recipe")
    parser.add_argument("target", help="folder for the recipe; or the prompt")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(given.model, dtype=dtype).to(device)
    if given.what == "calibrate":
        prompts = [line for line in given.source.read_text().splitlines() if line.strip()]
        recipe = sdtrt_backend.calibrate(pipe, prompts, num_inference_steps=given.steps)
        print(f"{len(recipe.layers)} layers -> {recipe.save(given.target)}")
    else:
        sdtrt_backend.accelerate(pipe, recipe=given.source)
        pipe(given.target, num_inference_steps=given.steps).images[0].save("picture.png")
        print(sdtrt_backend.explain(pipe).state, "-> picture.png")


if __name__ == "__main__":
    main()

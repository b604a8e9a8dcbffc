"""How often the bundled model draws what the caption asks for.

    python benchmarks/recall.py DATA [--model FOLDER] [--captions 200] [--sheet sheet.png]

For canonical captions in the styles noto and fluent: the picture is right when the nearest training picture (mean
squared distance of 16x16 thumbnails) has the caption's code point.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """float [N, 64, 64, 3] in 0..1 -> [N, 16 * 16 * 3] by 4x4 averages."""
    n = len(pictures)
    return pictures.reshape(n, 16, 4, 16, 4, 3).mean((2, 4)).reshape(n, -1).astype(np.float32)


def draw_sheet(pictures: np.ndarray, captions: list[str], path: Path, columns: int = 8) -> None:
    """Contact sheet: each picture doubled to 128x128 with its caption under it."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * 160, rows * 160), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * 160, i // columns * 160
        sheet.paste(Image.fromarray((picture * 255).round().astype(np.uint8)).resize((128, 128), Image.LANCZOS), (x + 16, y))
        ink.text((x + 4, y + 132), caption[:26] + "\n" + caption[26:52], fill="black", font_size=11)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "src/sdtrt_backend/assets/tiny_emoji")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    data = np.load(args.data / "images.npz")
    captions = json.loads((args.data / "captions.json").read_text())
    codes = data["hexcodes"]
    eligible = np.flatnonzero(np.isin(data["sources"], ["noto", "fluent-color"]) & (codes != ""))
    chosen = np.random.default_rng(0).choice(eligible, args.captions, replace=False)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, local_files_only=True).to(device)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = [captions[i][0] for i in chosen]
    pictures = []
    for i in range(0, len(prompts), args.batch):
        part = prompts[i : i + args.batch]
        seeds = [torch.Generator("cpu").manual_seed(i + j) for j in range(len(part))]
        pictures.append(pipe(part, num_inference_steps=25, guidance_scale=5.0, generator=seeds, output_type="np").images)
        print(f"{i + len(part)}/{len(prompts)}", end="\r", flush=True)
    drawn = np.concatenate(pictures)
    known = thumbnails(data["images"] / 255.0)
    right = 0
    for i, thumbnail in zip(chosen, thumbnails(drawn), strict=True):
        nearest = ((known - thumbnail) ** 2).mean(1).argmin()
        right += codes[nearest] == codes[i]
    print(f"recall: {right} of {len(chosen)} = {right / len(chosen):.1%} (Euler 25 steps, guidance 5, styles noto and fluent)")
    if args.sheet:
        draw_sheet(drawn[:48], prompts[:48], args.sheet)


if __name__ == "__main__":
    main()

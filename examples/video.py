"""A video model in 8 bits: Wan 2.1 draws a clip, as frames of a GIF.

    python examples/video.py "a lighthouse in a storm"
"""

import argparse

import torch
from diffusers import WanPipeline

import sdtrt_backend


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="name on the hub, or a folder")
    parser.add_argument("--size", type=int, nargs=3, default=(81, 480, 832), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    pipe = WanPipeline.from_pretrained(given.model, dtype=torch.bfloat16 if gpu else torch.float32)
    pipe.to("cuda" if gpu else "cpu")
    sdtrt_backend.accelerate(pipe, calibration_runs=1)  # a clip has many tokens: one calibrates, the second builds
    frames, height, width = given.size
    for clip in range(3):
        noise = torch.Generator().manual_seed(clip)
        pictures = pipe(given.prompt, num_frames=frames, height=height, width=width, num_inference_steps=given.steps,
                        generator=noise, output_type="pil").frames[0]
        pictures[0].save(f"video_{clip}.gif", save_all=True, append_images=pictures[1:], duration=62, loop=0)
    print(sdtrt_backend.explain(pipe))


if __name__ == "__main__":
    main()

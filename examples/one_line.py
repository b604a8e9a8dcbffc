"""The one line on the bundled pipeline: the first two pictures calibrate, the third is drawn in 8 bits.

    python examples/one_line.py
"""

import torch

import sdtrt_backend


def main() -> None:
    pipe = sdtrt_backend.demo_pipeline()
    pipe.unet = torch.compile(pipe.unet, backend="sd_int8")
    for prompt in ("owl, fluent style", "red apple, noto style", "rocket, fluent style"):
        picture = pipe(prompt, num_inference_steps=25, guidance_scale=5.0).images[0]
        picture.save(f"{prompt.partition(',')[0].replace(' ', '_')}.png")
    print(sdtrt_backend.explain(pipe))


if __name__ == "__main__":
    main()

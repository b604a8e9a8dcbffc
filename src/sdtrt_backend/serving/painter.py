"""One accelerated pipeline that draws what is asked of it, in batches of few sizes; a server's replica holds one, and so does a
batch job's actor."""

from __future__ import annotations

import inspect
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BundleError, ModelError, OptionError, RequestError
from ..lora import load_lora, set_loras
from ..options import Options
from ..parts import EVERY_TIMESTEP, denoiser_name
from ..pictures import prompt_name
from ..pipeline import accelerate, check_folder, demo_pipeline, explain, load_pipeline
from ..recipe import Recipe
from ..report import NOT_YET
from .ask import Ask, Facts

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = ("a lighthouse on a cliff at dusk", "portrait of an old fisherman", "a bowl of fruit, studio light",
           "a city street in the rain at night", "a red fox in fresh snow", "mountains above a lake, watercolour",
           "a vintage car in front of a diner", "an astronaut in a garden")
BUILT_IN = 2  # steps of a picture that only makes its size be built
DTYPES = ("auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Setup:
    """How to make a Painter; plain values, so that it goes to other processes and into files.

    model: a diffusers pipeline folder, None for the bundled model. backend: "sd_int8", "sd_fp8", or None for the pipeline's own
    precision. recipe: folder of a saved one, or bundle and trust, as of ``accelerate``; without either ``prompts`` calibrate,
    while the painter warms up. loras: a folder of .safetensors files, each known by its name without the suffix. sizes: (width,
    height) in pixels, the default first; () is the model's own. batches: pictures of one call: a smaller batch is filled up to
    the next of them, as each is built once. steps, guidance: the defaults of a request; guidance None is the pipeline's own.
    dtype: "auto" is float32 on a CPU, on a GPU float16 for a UNet and bfloat16 for a transformer. threads: of torch on a CPU,
    None for its own number. options: of ``accelerate``.
    """

    model: str | None = None
    backend: str | None = "sd_int8"
    recipe: str | None = None
    bundle: str | None = None
    trust: bool = False
    loras: str | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: int = 25
    max_steps: int = 100
    max_prompt: int = 2000
    guidance: float | None = None
    prompts: tuple[str, ...] = ()
    parts: str = EVERY_TIMESTEP
    dtype: str = "auto"
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calibrates(self) -> bool:
        """Whether a painter of it begins with pictures that calibrate."""
        return self.backend is not None and not (self.recipe or self.bundle)

    def check(self) -> None:
        """Raises OptionError, ModelError, RecipeError or BundleError for what could not be drawn with, before anything is
        loaded."""
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype expects one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.batches or any(type(b) is not int or b < 1 for b in self.batches):
            raise OptionError(f"batches expects whole numbers of pictures, at least 1 each, such as 1,4; got {self.batches}")
        if any(w < 8 or h < 8 or w % 8 or h % 8 for w, h in self.sizes):
            raise OptionError(f"sizes expects WIDTHxHEIGHT in pixels, multiples of 8, such as 1024x1024; got {self.sizes}")
        if not 1 <= self.steps <= self.max_steps:
            raise OptionError(f"steps expects a number from 1 to max_steps = {self.max_steps}, got {self.steps}")
        if self.backend is None and (self.recipe or self.loras or self.bundle):
            raise OptionError("a pipeline in its own precision takes no recipe, bundle or folder of LoRAs: leave them out, or "
                              "leave out full")
        Options.parse(self.options)
        if self.model:
            check_folder(self.model)
        if self.recipe:
            Recipe.load(self.recipe)
        if self.bundle and not Path(self.bundle).is_file():
            raise BundleError.missing(self.bundle)
        if self.loras and not list(Path(self.loras).glob("*.safetensors")):
            raise OptionError(f"the folder of LoRAs, {self.loras}, holds no .safetensors file; name another, or leave it out")


@dataclass(frozen=True)
class Drawn:
    """The pictures of one call, seconds it took, and how many it drew: more where the batch was filled up."""

    pictures: list[Image]
    seconds: float
    batch: int


class Painter:
    """One pipeline on this process's GPU, else its CPU. Not for several threads at once."""

    def __init__(self, setup: Setup) -> None:
        setup.check()
        self.setup = setup
        if setup.threads:
            torch.set_num_threads(setup.threads)
        self.pipe = _pipeline(setup)
        self.denoiser = denoiser_name(self.pipe)
        self.takes = inspect.signature(self.pipe).parameters
        if prompt_name(self.pipe) is None:
            raise ModelError(f"{type(self.pipe).__name__} takes no prompt: a served pipeline draws from texts")
        if setup.backend:
            accelerate(self.pipe, recipe=setup.recipe, bundle=setup.bundle, trust=setup.trust, backend=setup.backend,
                       parts=setup.parts, **setup.options)
        found = sorted(Path(setup.loras).glob("*.safetensors")) if setup.loras else ()
        for path in found:
            load_lora(self.pipe, path, path.stem)
        self.set: tuple[tuple[str, float], ...] = ()
        self.facts = self._facts(tuple(path.stem for path in found))

    def _facts(self, loras: tuple[str, ...]) -> Facts:
        setup, kind = self.setup, type(self.pipe).__name__
        # the bundled model is trained for it; another's own default is its pipeline's
        guidance = 5.0 if setup.model is None and setup.guidance is None else setup.guidance
        scale = guidance if guidance is not None or "guidance_scale" not in self.takes else self.takes["guidance_scale"].default
        model = Path(setup.model).name if setup.model else "tiny-emoji"
        return Facts(model, kind, setup.sizes or (_own_size(self.pipe, self.denoiser),), setup.steps, setup.max_steps,
                     setup.max_prompt, guidance, "negative_prompt" in self.takes and (scale or 0) > 1,
                     "negative_prompt" in self.takes, loras, tuple(self.edits), tuple(sorted(set(setup.batches))))

    @cached_property
    def edits(self) -> dict[str, Any]:
        """"image" and "mask" -> the pipeline of the same parts that draws from one."""
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        made = {}
        for name, auto in (("image", AutoPipelineForImage2Image), ("mask", AutoPipelineForInpainting)):
            try:
                made[name] = auto.from_pipe(self.pipe)
            except ValueError:  # diffusers knows none for this class
                continue
            made[name].set_progress_bar_config(disable=True)
        return made

    def warm(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Calibrate where there is no recipe, and build each size and batch, so that no request waits for either."""
        sizes = [(size, batch) for size in self.facts.sizes for batch in self.facts.batches]
        prompts = self.setup.prompts or _prompts(self.setup.model)
        calibrating = 0
        for size, batch in sizes:
            tell(f"warming up {size[0]}x{size[1]}, {batch} at once")
            while True:
                asks = [self._warming(prompts[(calibrating + i) % len(prompts)], size, calibrating + i) for i in range(batch)]
                self.draw(asks)
                if self.setup.backend is None or explain(self.pipe).state not in NOT_YET:
                    break
                calibrating += batch
                tell(f"calibrated by {calibrating} pictures")

    def _warming(self, prompt: str, size: tuple[int, int], seed: int) -> Ask:
        waits = self.setup.backend is not None and self.setup.recipe is None and not self._has_ranges
        return Ask(prompt, None, *size, self.facts.steps if waits else min(BUILT_IN, self.facts.steps), self.facts.guidance, seed)

    @property
    def _has_ranges(self) -> bool:
        try:
            return explain(self.pipe).state not in NOT_YET
        except ModelError:  # not called yet
            return False

    def draw(self, asks: Sequence[Ask]) -> Drawn:
        """One picture per ask, which are ``alike`` and at most as many as the largest batch. Raises RequestError for a picture
        of an edit that cannot be read."""
        first, batch = asks[0], next((b for b in self.facts.batches if b >= len(asks)), None)
        if batch is None or any(ask.alike != first.alike for ask in asks):
            raise ValueError(f"draw() expects at most {self.facts.batches[-1]} asks that are alike, got {len(asks)}")
        filled = [*asks, *[asks[-1]] * (batch - len(asks))]
        pipe = self.pipe if first.image is None else self.edits["image" if first.mask is None else "mask"]
        how: dict[str, Any] = {
            prompt_name(self.pipe) or "prompt": [ask.prompt for ask in filled], "num_inference_steps": first.steps,
            "generator": [torch.Generator("cpu").manual_seed(ask.seed) for ask in filled], "output_type": "pil"}
        if first.guidance is not None:
            how["guidance_scale"] = first.guidance
        if first.negative is not None:
            how["negative_prompt"] = [ask.negative for ask in filled]
        if first.image is None or "height" in inspect.signature(pipe).parameters:
            how |= {"height": first.height, "width": first.width}
        if first.image is not None:
            how |= {"image": [_opened(ask.image, ask, "RGB") for ask in filled], "strength": first.strength}
        if first.mask is not None:
            how["mask_image"] = [_opened(ask.mask, ask, "L") for ask in filled]
        begin = time.perf_counter()
        if first.loras != self.set:
            set_loras(self.pipe, dict(first.loras))
            self.set = first.loras
        pictures = pipe(**how).images[: len(asks)]
        return Drawn(pictures, time.perf_counter() - begin, batch)

    def state(self) -> dict[str, Any]:
        """Of the 8-bit step: its state, and the sentences of ``explain``."""
        if self.setup.backend is None:
            return {"state": "full precision", "fallbacks": [], "notes": []}
        report = explain(self.pipe)
        return {"state": report.state, "fallbacks": list(report.fallbacks), "notes": list(report.notes)}


def _pipeline(setup: Setup) -> Any:
    gpu = torch.cuda.is_available()
    if setup.dtype != "auto":
        dtype = getattr(torch, setup.dtype)
    elif not gpu:
        dtype = torch.float32
    else:  # the folder of a pipeline says which denoiser it has
        unet = setup.model is None or (Path(setup.model) / "unet").is_dir()
        dtype = torch.float16 if unet else torch.bfloat16
    pipe = load_pipeline(setup.model, dtype) if setup.model else demo_pipeline(dtype)
    return pipe.to("cuda") if gpu else pipe


def _own_size(pipe: Any, denoiser: str) -> tuple[int, int]:
    samples = getattr(pipe, "default_sample_size", None) or getattr(getattr(pipe, denoiser).config, "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    if not isinstance(samples, int) or not isinstance(scale, int):
        raise OptionError(f"{type(pipe).__name__} does not say which size its pictures have: name sizes, such as 1024x1024")
    return samples * scale, samples * scale


def _prompts(model: str | None) -> tuple[str, ...]:
    from ..demo import CALIBRATION_PROMPTS

    return PROMPTS if model else CALIBRATION_PROMPTS


def _opened(data: bytes | None, ask: Ask, mode: str) -> Image:
    """A picture of an edit, in the size that is asked for."""
    from PIL import Image, UnidentifiedImageError

    name = "image" if mode == "RGB" else "mask"
    try:
        with Image.open(io.BytesIO(data or b"")) as found:
            return found.convert(mode).resize((ask.width, ask.height), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(name, f"{name} expects the file of a picture, such as a PNG ({type(error).__name__})") from None

"""Arguments that commands share: how they are written, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import SdtrtError

if TYPE_CHECKING:
    from .serving.painter import Setup

console = Console()
BAD_INPUT, NOT_QUANTIZED, SOME_FAILED = 2, 3, 3  # the last two: not as hoped

Model = Annotated[Path | None, typer.Option(help="A diffusers pipeline folder; the bundled model when omitted.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Inputs = Annotated[list[str] | None, typer.Option("--input", metavar="NAME=VALUE", help="What else the pipeline takes, as often "
                                                  "as needed: image=photo.png, strength=0.6, control_image=edges/ (a folder: its "
                                                  "pictures in the order of their names, one for each prompt).")]
Parts = Annotated[str, typer.Option(help="denoisers, auto (the VAE and text encoders too), or paths: unet,vae.decoder.")]
Seed = Annotated[int, typer.Option(help="Picture i starts from noise of seed + i.")]
ServedRecipe = Annotated[Path | None, typer.Option("--recipe", help="A saved recipe; without one each pipeline calibrates itself "
                                                   "first.")]
LoraDir = Annotated[Path | None, typer.Option(help="Folder of .safetensors; a request names them without the suffix.")]
Sizes = Annotated[str | None, typer.Option("--size", metavar="WxH,...", help="Sizes in pixels that may be asked for, the default "
                                           "first: 1024x1024,768x1344; the model's own when omitted.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own when omitted, of the bundled model 5.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU; all that there are when omitted.")]
Int8 = Annotated[bool, typer.Option("--int8", help="sd_int8; the default.")]
Fp8 = Annotated[bool, typer.Option("--fp8", help="sd_fp8, on NVIDIA GPUs of capability 8.9 or newer.")]
Bundled = Annotated[Path | None, typer.Option("--bundle", help="What sdtrt bundle wrote, in place of a recipe.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run the bundle's compiled code: whoever made it can do what you can.")]
Full = Annotated[bool, typer.Option("--full", help="The model's own precision.")]
Batches = Annotated[str, typer.Option(metavar="N,...", help="Pictures of one call, each built once; fewer are filled up to the "
                                                            "next of them.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster; Ray on this machine alone when omitted.")]


def setup_of(*, model: Path | None, recipe: Path | None, int8: bool, fp8: bool, full: bool, lora_dir: Path | None,
             size: str | None, batches: tuple[int, ...], steps: int, guidance: float | None, parts: str,
             threads: int | None, bundle: Path | None = None, trust: bool = False) -> Setup:
    """Options of a command as what makes a Painter."""
    from .serving.painter import Setup

    if int8 + fp8 + full > 1:
        raise SdtrtError("name one of --int8, --fp8 and --full, not several")
    model_dir, recipe_dir, bundled, loras = (str(path) if path else None for path in (model, recipe, bundle, lora_dir))
    setup = Setup(model=model_dir, backend=None if full else "sd_fp8" if fp8 else "sd_int8", recipe=recipe_dir,
                  bundle=bundled, trust=trust, loras=loras, sizes=_sizes(size), batches=batches, steps=steps,
                  max_steps=max(steps, Setup.max_steps), guidance=guidance, parts=parts, threads=threads)
    setup.check()
    return setup


def whole_numbers(option: str, given: str) -> tuple[int, ...]:
    """Of a list such as 1,4."""
    if not all(text.strip().isdecimal() for text in given.split(",")):
        raise SdtrtError(f"{option} expects whole numbers, such as 1,4; got {given!r}")
    return tuple(int(text) for text in given.split(","))


def _sizes(given: str | None) -> tuple[tuple[int, int], ...]:
    """(width, height) in pixels for each of a list such as 1024x1024,768x1344."""
    found = []
    for text in given.split(",") if given else ():
        width, _, height = text.strip().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise SdtrtError(f"--size expects WIDTHxHEIGHT in pixels, or several: 1024x1024,768x1344; got {given!r}")
        found.append((int(width), int(height)))
    return tuple(found)


def read_inputs(given: list[str] | None, prompts: int) -> dict[str, Any]:
    """name=value pairs of ``--input`` as arguments of the pipeline."""
    found: dict[str, Any] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals and value):
            raise SdtrtError(f"--input expects NAME=VALUE, such as image=photo.png or strength=0.6, got {pair!r}")
        if name in found:
            raise SdtrtError(f"--input {name} is given twice: for one picture for each prompt name a folder of them")
        found[name] = _input(name, value, prompts)
    return found


def _input(name: str, value: str, prompts: int) -> Any:
    """A picture, a folder's pictures, a number, true or false, else the text itself."""
    from PIL import Image, UnidentifiedImageError

    path = Path(value)
    if not path.exists():
        if path.suffix.lower() in Image.registered_extensions() or "/" in value:
            raise SdtrtError(f"--input {name}: there is no file or folder {value}")
        try:
            return json.loads(value)
        except ValueError:
            return value
    try:
        if path.is_file():
            return Image.open(path).convert("RGB")
        pictures = [Image.open(f).convert("RGB") for f in sorted(path.iterdir())
                    if f.suffix.lower() in Image.registered_extensions()]
    except UnidentifiedImageError as error:
        raise SdtrtError(f"--input {name}: {error}") from error
    if len(pictures) != prompts:
        raise SdtrtError(f"--input {name}: the folder {value} holds {len(pictures)} pictures, and there are {prompts} prompts; "
                         "expected one for each, or a single file for all")
    return pictures


def read_prompts(path: Path) -> list[str]:
    """A prompt a line."""
    if not path.is_file():
        raise SdtrtError(f"prompts file {path} does not exist; write one prompt per line")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise SdtrtError(f"prompts file {path} holds no prompt; write one per line")
    return prompts

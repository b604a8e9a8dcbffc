"""``sdtrt``: demo, report, calibrate, show, generate, export, bundle, batch, serve, load, doctor, cache."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from dataclasses import replace
from datetime import datetime
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from .arguments import (
    BAD_INPUT,
    NOT_QUANTIZED,
    Batches,
    Full,
    Guidance,
    Inputs,
    LoraDir,
    Model,
    Parts,
    Seed,
    Sizes,
    Steps,
    Threads,
    console,
    read_inputs,
    read_prompts,
    setup_of,
    whole_numbers,
)
from .errors import ExportError, SdtrtError
from .options import Options
from .parts import EVERY_TIMESTEP
from .serving import commands

if TYPE_CHECKING:
    pass

app = typer.Typer(no_args_is_help=True, add_completion=False, help="8-bit inference for diffusion models.",
                  pretty_exceptions_enable=False)
SHORT = 24  # characters of a value that a table cell shows
OF_TRITON = {"name", "full", "lora_dir", "size", "batches", "steps", "guidance", "parts", "threads", "instances", "gpu",
             "memory_budget", "queue_delay"}  # parameters of ``export``
NOT_OF_TRITON = {"flavour", "inputs", "sm", "batch", "height", "width", "max_batch", "max_height", "max_width"}
CHATTY = ("torchao", "torch.utils._pytree")  # warn, on being imported, of what a user of this command can do nothing about

def main() -> None:
    """Run the command line; errors of this package become one line and exit code 2."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except SdtrtError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(BAD_INPUT)


@app.command()
def demo(
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt per line.")] = None,
    steps: Steps = 25,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for demo.png, report.html, report.json and charts.")] = Path("out"),
    model: Model = None,
) -> None:
    """Draw the same prompts in full precision and in 8 bits and compare. Exit code 3 when 8 bits were refused."""
    from . import demo as demonstration

    pipe = _load(model)
    chosen = read_prompts(prompts) if prompts else list(demonstration.PROMPTS)
    result = demonstration.run(pipe, chosen, demonstration.CALIBRATION_PROMPTS, steps, seed, out, console,
                               str(model) if model else "the bundled model")
    if result["state"] != "ready":
        raise typer.Exit(NOT_QUANTIZED)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What sdtrt demo wrote.")] = Path("out"),
    browser: Annotated[bool, typer.Option(help="Open report.html, too.")] = True,
) -> None:
    """Print the table of a saved report and what was said, and open its page in the browser."""
    from .report import summary_table

    try:
        result = json.loads((folder / "report.json").read_text())
        console.print(summary_table(result))
        said = [*result["fallbacks"], *result["notes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SdtrtError(f"{folder} holds no report: expected the folder that sdtrt demo wrote ({error!r})") from None
    console.print(*said, sep="\n", highlight=False, markup=False, soft_wrap=True)
    if browser and typer.launch((folder / "report.html").resolve().as_uri()):
        console.print(f"no browser could be opened: open {folder / 'report.html'}", highlight=False)


@app.command()
def calibrate(
    prompts: Annotated[Path, typer.Argument(help="A text file, one prompt per line.")],
    out: Annotated[Path, typer.Option(help="Folder for recipe.json and its tensors.")] = Path("recipe"),
    model: Model = None,
    steps: Steps = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own when omitted, of the bundled model "
                                                        "5.")] = None,
    inputs: Inputs = None,
    seed: Seed = 0,
    rule: Annotated[str, typer.Option(help="Range rule over timesteps.")] = Options.rule,
    min_psnr: Annotated[float | None, typer.Option(help="dB to full precision that new prompts are to have: layers get a "
                                                        "second code or stay unquantised where they must; a quarter of the "
                                                        "prompts judges.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder that keeps finished prompts; the same call goes on.")] = None,
    parts: Parts = EVERY_TIMESTEP,
) -> None:
    """Run the pipeline over your prompts and save the recipe for options={"recipe": ...}."""
    from .calibrate import calibrate as run
    from .demo import GUIDANCE
    from .report import budget_table

    texts = read_prompts(prompts)
    try:
        recipe = run(_load(model), texts, num_inference_steps=steps, seed=seed, resume=resume,
                     guidance_scale=GUIDANCE if guidance is None and model is None else guidance,
                     options={"rule": rule, "min_psnr": min_psnr}, parts=parts, **read_inputs(inputs, len(texts)))
    except KeyboardInterrupt as stop:
        console.print(*getattr(stop, "__notes__", ()), sep="\n", highlight=False, markup=False, soft_wrap=True)
        raise
    recipe.save(out)
    if min_psnr is not None:
        console.print(budget_table(recipe))
    console.print(f"{len(recipe.layers)} layers over {len(recipe.timesteps)} timesteps -> {out}")


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="A saved recipe (sdtrt calibrate).")],
    layer: Annotated[str | None, typer.Option(help="A glob of layers: '*.to_q'. Those that change most when omitted.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for ranges.html, ranges.png and layers.png.")] = Path("ranges"),
) -> None:
    """Draw the ranges of a recipe by layer and timestep; no model is needed."""
    from .heatmaps import range_pages
    from .recipe import Recipe
    from .report import charts_html, save_charts

    charts = range_pages(Recipe.load(recipe), layer)
    files = save_charts(out, charts)
    page = out / "ranges.html"
    page.write_text(charts_html(f"Ranges of {recipe}", charts))
    console.print("written: " + ", ".join(map(str, (page, *files))), highlight=False, soft_wrap=True)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    recipe: Annotated[Path | None, typer.Option(help="A saved recipe; without one the first pictures calibrate.")] = None,
    model: Model = None,
    inputs: Inputs = None,
    steps: Steps = 25,
    seed: Seed = 0,
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 4,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("picture.png"),
    int8: Annotated[bool, typer.Option("--int8", help="sd_int8; the default.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="sd_fp8, on NVIDIA GPUs of capability 8.9 or newer.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The model's own precision.")] = False,
    onnx_dir: Annotated[Path | None, typer.Option(help="Also write the denoiser there as Q/DQ ONNX (needs a recipe).")] = None,
    engine_dir: Annotated[Path | None, typer.Option(help="Run through TensorRT engines, kept in this folder.")] = None,
    quantization_level: Annotated[float, typer.Option(help="1, 2, 2.5, 3 or 4: see the option level.")] = Options.level,
    parts: Parts = EVERY_TIMESTEP,
) -> None:
    """Draw pictures of one prompt, in 8 bits by default, and print the latency of each part."""
    import numpy as np
    from PIL import Image

    from .demo import draw
    from .latency import Stopwatch
    from .pipeline import accelerate, explain
    from .report import NOT_YET, comparison_picture

    if int8 + fp8 + full > 1:
        raise SdtrtError("name one of --int8, --fp8 and --full, not several")
    if (onnx_dir or engine_dir) and full:
        raise SdtrtError("--onnx-dir and --engine-dir are for --int8 and --fp8, not for --full")
    if out.suffix.lower() not in Image.registered_extensions():
        raise SdtrtError(f"--out expects the file of a picture, such as picture.png, got {out}")
    given = read_inputs(inputs, 1)
    pipe = _load(model)
    backend = None if full else "sd_fp8" if fp8 else "sd_int8"
    if onnx_dir:
        if recipe is None:
            raise SdtrtError("--onnx-dir needs a recipe: sdtrt calibrate prompts.txt --out recipe, then --recipe recipe")
        from .export import export_onnx

        console.print(str(export_onnx(pipe, recipe, onnx_dir, precision="fp8" if fp8 else "int8", level=quantization_level,
                                      **given)), highlight=False, markup=False, soft_wrap=True)
    if backend:
        engines: dict[str, Any] = {"engine": "tensorrt", "engine_dir": engine_dir} if engine_dir else {}
        accelerate(pipe, recipe=recipe, backend=backend, level=quantization_level, parts=parts, **engines)
    watch, warm = Stopwatch(pipe), []
    pictures: list[Any] = []
    for i in range(count):
        # neither a picture that calibrates or builds nor the first one tells how long a picture takes
        warm.append(i > 0 and (backend is None or explain(pipe).state not in NOT_YET))
        with watch.picture():
            pictures.append(draw(pipe, [prompt], steps, seed + i, watch.tick, given))
    watch.close()
    out.parent.mkdir(parents=True, exist_ok=True)
    comparison_picture([(backend or "full precision", np.concatenate(pictures))], [prompt] * count).save(out)
    if backend:
        report = explain(pipe)
        said = "; ".join((*report.fallbacks, *report.notes))
        console.print(f"state: {report.state}" + (f" ({said})" if said else ""), highlight=False)
    rows = watch.rows(lambda picture: warm[picture])
    if rows:
        table = Table("part", "calls", "mean ms", "p50", "p99", title=f"latency of {sum(warm)} pictures, {steps} steps each",
                      title_justify="left")
        for name, calls, *times in rows:
            table.add_row(name, str(calls), *(f"{ms:.1f}" for ms in times))
        console.print(table)
    else:
        console.print(f"no latency: none of the {count} pictures came after calibrating and building; raise --count")
    console.print(f"written: {out}")


@app.command()
def export(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder for model.onnx, and for the engine and its manifest; of triton, the "
                                                "model repository.")],
    to: Annotated[str, typer.Option(help="onnx, engine: the ONNX file and a TensorRT engine built from it, or triton: a model "
                                         "repository of Triton Inference Server.")] = "onnx",
    recipe: Annotated[Path | None, typer.Option(help="A saved recipe of this model (sdtrt calibrate).")] = None,
    model: Model = None,
    int8: Annotated[bool, typer.Option("--int8/--fp8", help="The 8-bit type.")] = True,
    dtype: Annotated[str | None, typer.Option(help="The rest: float16, bfloat16 (where float16 overflows) or float32; when "
                                                   "omitted float16, of triton what suits the model and the server.")] = None,
    flavour: Annotated[str | None, typer.Option(help="tensorrt or tensorrt_rtx; the installed one when omitted.")] = None,
    inputs: Inputs = None,
    sm: Annotated[int | None, typer.Option(help="Build ahead of time for this compute capability: 89 for 8.9.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own when omitted.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own when omitted.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Makes the batch dynamic, up to this.")] = None,
    max_height: Annotated[int | None, typer.Option(min=8, help="Makes the height dynamic, up to this.")] = None,
    max_width: Annotated[int | None, typer.Option(min=8, help="Makes the width dynamic, up to this.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model in the repository; that of --model's folder when "
                                                  "omitted.")] = None,
    full: Full = False,
    lora_dir: LoraDir = None,
    size: Sizes = None,
    batches: Batches = "1,4",
    steps: Steps = 25,
    guidance: Guidance = None,
    parts: Parts = EVERY_TIMESTEP,
    threads: Threads = None,
    instances: Annotated[int, typer.Option(min=1, help="Pipelines at once, on each GPU of the server, else on its CPU.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="The server must have a GPU.")] = False,
    memory_budget: Annotated[float | None, typer.Option(metavar="GB", help="What the weights of all models there may take of a "
                                                                          "GPU, or of the CPU.")] = None,
    queue_delay: Annotated[float, typer.Option(min=0, help="Milliseconds that a picture waits for others.")] = 50,
) -> None:
    """Write the denoiser in 8 bits as Q/DQ ONNX, build a TensorRT engine of it, or write a repository for Triton.

    A GPU is not needed for --sm. The options from --name on are of --to triton, those from --flavour to --max-width are not."""
    from . import engine
    from .export import Size, build_engine, export_onnx
    from .recipe import Recipe

    if to not in ("onnx", "engine", "triton"):
        raise ExportError.unknown("--to", to, ("onnx", "engine", "triton"))
    named = _refuse_options_of_others(ctx, to)
    if to == "triton":
        from .serving.triton import export_triton

        setup = setup_of(model=model, recipe=recipe, int8=int8 and "int8" in named, fp8=not int8, full=full, lora_dir=lora_dir,
                         size=size, batches=whole_numbers("--batches", batches), steps=steps, guidance=guidance, parts=parts,
                         threads=threads)
        name = name or (model.resolve().name if model else "tiny-emoji")
        written = export_triton(folder, {name: replace(setup, dtype=dtype or "auto")}, instances=instances, gpu=gpu,
                                memory_budget=memory_budget, max_queue_delay_ms=queue_delay)
        console.print(str(written), highlight=False, markup=False, soft_wrap=True)
        return
    if recipe is None:
        raise ExportError("an export needs a recipe: sdtrt calibrate prompts.txt --out recipe, then --recipe recipe")
    precision = "int8" if int8 else "fp8"
    if to == "engine":
        engine.check(flavour or engine.installed(), precision, sm)  # before minutes of work
    ranges = Recipe.load(recipe)
    least, largest = Size(batch, height, width), Size(max_batch or batch, max_height or height, max_width or width)
    exported = export_onnx(_load(model), ranges, folder, precision=precision, dtype=dtype or "float16", flavour=flavour,
                           size=least, largest=None if largest == least else largest, **read_inputs(inputs, batch))
    console.print(str(exported), highlight=False, markup=False, soft_wrap=True)
    if to == "engine":
        console.print(str(build_engine(exported, sm)), highlight=False, markup=False, soft_wrap=True)


for served in (commands.bundle, commands.batch, commands.serve, commands.load):
    app.command()(served)


@app.command()
def doctor(model: Model = None,
           as_json: Annotated[bool, typer.Option("--json", help="For a report of a fault.")] = False) -> None:
    """What this machine can do, which packages fit, and what would be quantised. Exit code 3 when nothing would be."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    rows, counts = _machine(compiler), _would_quantize(_load(model))
    if as_json:
        rows_of = {what: {"found": found, "means": means} for what, found, means in rows}
        print(json.dumps({"machine": rows_of, "layers": counts}, indent=1))
    else:
        table = Table("what", "found", "what it means", title="sdtrt doctor", title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print(f"{counts['int8']} of {sum(counts.values())} layers would be quantised; the rest: " + "; ".join(
            f"{n} x {reason}" for reason, n in counts.items() if reason != "int8"), highlight=False)
    if not counts["int8"] or compiler is None:
        raise typer.Exit(NOT_QUANTIZED)


def _machine(compiler: str | None) -> list[tuple[str, str, str]]:
    """(what, found, what it means)."""
    import torch

    from .recipe import versions

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    vnni = capabilities.get("avx512_vnni", False) or capabilities.get("avx_vnni", False)
    onednn = torch.backends.mkldnn.is_available()
    bf16 = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    rows = [("CPU", torch.backends.cpu.get_cpu_capability(),
             "int8 dot products" if vnni else "no VNNI: int8 runs, but may not be faster; the measured choice decides"),
            ("oneDNN", str(onednn), "runs the int8 kernels on the CPU"),
            ("bf16", str(bf16), "attention runs in it where a timing says it pays" if bf16 else "attention stays in fp32")]
    if torch.cuda.is_available():
        from .kernels import CAPABILITY, missing

        capability = torch.cuda.get_device_capability()
        rows.append(("GPU", torch.cuda.get_device_name(), "; ".join(
            f"sd_{precision}: {missing(precision, capability) or 'yes'}" for precision in CAPABILITY)))
    else:
        rows.append(("GPU", "none", "the 8-bit kernels run on the CPU"))
    rows.append(("C++ compiler", compiler or "none", "Inductor needs it" if compiler else "install g++: apt-get install g++"))
    for requirement in _requirements():
        found = versions([requirement.name]).get(requirement.name)
        fits = found is not None and found in requirement.specifier
        advice = "fits" if fits else f"does not fit: pip install '{requirement}'"
        rows.append((requirement.name, found or "not installed", advice))
    for module, extra in (("cudnn", "cuda"), ("fa3_fwd_interface", "fa3"), ("torchao", "torchao"), ("modelopt", "modelopt"),
                          ("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx"), ("onnx", "onnx")):
        if importlib.util.find_spec(module) is None:
            rows.append((module, "not installed", f"optional: pip install 'sdtrt_backend[{extra}]'"))
    return rows


@app.command()
def cache(what: Annotated[str, typer.Argument(help="ls, verify (delete what is damaged) or clear.")] = "ls") -> None:
    """The built engines on disk. Exit code 3 when verify found a damaged one."""
    from .enginecache import EngineCache

    engines = EngineCache()
    if what == "clear":
        console.print(f"{engines.clear() / 1e6:.1f} MB freed in {engines.folder}", highlight=False)
        return
    if what not in ("ls", "verify"):
        raise SdtrtError(f"unknown argument {what!r} of sdtrt cache; valid: ls, verify, clear")
    entries = engines.entries()
    table = Table("engine", "MB", "last used", "part", "built for", "state", title=str(engines.folder), title_justify="left")
    for e in entries:
        used = datetime.fromtimestamp(e.used).isoformat(" ", "minutes")
        built_for = ", ".join(f"{name} {value}" for name, value in e.key.items() if name != "part" and len(value) <= SHORT)
        table.add_row(e.name[:12], f"{e.size / 1e6:.1f}", used, e.key.get("part", "?"), built_for, e.problem or "good")
    console.print(table)
    console.print(f"{len(entries)} engines, {sum(e.size for e in entries) / 1e6:.1f} MB of {engines.limit / 1e6:.0f} MB",
                  highlight=False)
    damaged = [e for e in entries if e.problem]
    if what == "verify" and damaged:
        for e in damaged:
            engines.drop(e)
        console.print(f"{len(damaged)} damaged engines were deleted; they are built again when needed")
        raise typer.Exit(NOT_QUANTIZED)


def _requirements() -> list[Requirement]:
    """What this package needs, and what its pipelines need."""
    found = [Requirement(text) for text in requires("sdtrt_backend") or ()]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": "diffusers"})]


def _would_quantize(pipe: Any) -> dict[str, int]:
    """Reason (or "int8") -> number of layers, from the modules alone."""
    from .parts import denoiser_name
    from .rules import layers_of, reason_to_keep

    counts = {"int8": 0}
    for layer in layers_of(getattr(pipe, denoiser_name(pipe))):
        reason = reason_to_keep(layer, ()) or "int8"
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _load(model: Path | None) -> Any:
    from .pipeline import demo_pipeline, load_pipeline

    return load_pipeline(model) if model else demo_pipeline()


def _refuse_options_of_others(ctx: typer.Context, to: str) -> set[str]:
    """Names of the parameters of ``sdtrt export`` that were given, none of which ``--to`` does not take."""
    sources = {p.name or "": ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
    named = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    wrong = [p.opts[0] for p in ctx.command.params if p.name in named & (NOT_OF_TRITON if to == "triton" else OF_TRITON)]
    if wrong:
        raise ExportError(f"--to {to} takes no {', '.join(wrong)}: leave it out" if to == "triton" else
                          f"{', '.join(wrong)} means something with --to triton alone: leave it out, or export to triton")
    return named

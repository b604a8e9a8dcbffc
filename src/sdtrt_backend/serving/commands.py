"""``sdtrt bundle``, ``batch``, ``serve``, ``load``: the commands of servers."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..arguments import (
    NOT_QUANTIZED,
    SOME_FAILED,
    Address,
    Batches,
    Bundled,
    Fp8,
    Full,
    Guidance,
    Int8,
    LoraDir,
    Model,
    Parts,
    Seed,
    ServedRecipe,
    Sizes,
    Steps,
    Threads,
    Trust,
    console,
    read_prompts,
    setup_of,
    whole_numbers,
)
from ..errors import SdtrtError, require_serving
from ..parts import EVERY_TIMESTEP


def batch(
    prompts: Annotated[Path, typer.Argument(help="A JSON object with a prompt per line; or a .txt, a prompt per line.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and manifest.jsonl; the same call goes on "
                                           "there.")] = Path("batch"),
    model: Model = None,
    recipe: ServedRecipe = None,
    bundled: Bundled = None,
    trust: Trust = False,
    int8: Int8 = False,
    fp8: Fp8 = False,
    full: Full = False,
    lora_dir: LoraDir = None,
    size: Sizes = None,
    per_call: Annotated[int, typer.Option("--batch", min=1, help="Pictures of one call of the pipeline.")] = 4,
    steps: Steps = 25,
    guidance: Guidance = None,
    parts: Parts = EVERY_TIMESTEP,
    threads: Threads = None,
    actors: Annotated[int | None, typer.Option(min=1, help="Pipelines at once; when omitted one per GPU, else one per "
                                                           "host.")] = None,
    gpus_per_actor: Annotated[float, typer.Option(help="0.5: two pipelines share a GPU.")] = 1.0,
    address: Address = None,
) -> None:
    """Draw the pictures of many prompts with Ray, over any number of GPUs and hosts. Exit code 3 when some could not be drawn."""
    from .jobs import run_batch

    setup = setup_of(model=model, recipe=recipe, int8=int8, fp8=fp8, full=full, lora_dir=lora_dir, size=size, batches=(per_call,),
                     steps=steps, guidance=guidance, parts=parts, threads=threads, bundle=bundled, trust=trust)
    try:
        done = run_batch(prompts, out, setup, actors=actors, address=address, gpus_per_actor=gpus_per_actor)
    except KeyboardInterrupt:
        console.print(f"stopped; the same call goes on with what is in {out}", highlight=False, markup=False, soft_wrap=True)
        raise
    console.print(f"{done.drawn} drawn, {done.kept} were there, {done.failed} failed: {done.manifest}", highlight=False,
                  markup=False, soft_wrap=True)
    if done.failed:
        raise typer.Exit(SOME_FAILED)


def bundle(
    recipe: Annotated[Path, typer.Option(help="A saved recipe of this model (sdtrt calibrate).")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.sdtrt"),
    model: Model = None,
    size: Sizes = None,
    batches: Batches = "1,4",
    int8: Int8 = False,
    fp8: Fp8 = False,
    parts: Parts = EVERY_TIMESTEP,
    threads: Threads = None,
) -> None:
    """Build each size and batch, and write recipe, kernel times and compiled code into one file that new workers begin with."""
    from tempfile import TemporaryDirectory

    from ..bundle import compiling_into, pack
    from ..recipe import Recipe
    from .painter import Painter, Setup

    setup = setup_of(model=model, recipe=recipe, int8=int8, fp8=fp8, full=False, lora_dir=None, size=size,
                     batches=whole_numbers("--batches", batches), steps=Setup.steps, guidance=None, parts=parts, threads=threads)
    with TemporaryDirectory() as work, compiling_into(Path(work)):
        painter = Painter(setup)
        painter.warm(lambda what: console.print(what, highlight=False))
        about = {"backend": setup.backend, "sizes": painter.facts.sizes, "batches": painter.facts.batches, "parts": parts}
        members = pack(out, Recipe.load(recipe), Path(work), painter.pipe.device, about)
    console.print(f"{members} members, {out.stat().st_size / 1e6:.1f} MB, {painter.state()['state']} -> {out}", highlight=False)


def serve(
    model: Model = None,
    recipe: ServedRecipe = None,
    bundled: Bundled = None,
    trust: Trust = False,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt per line, to calibrate with.")] = None,
    int8: Int8 = False,
    fp8: Fp8 = False,
    full: Full = False,
    lora_dir: LoraDir = None,
    size: Sizes = None,
    batches: Batches = "1,4",
    steps: Steps = 25,
    max_steps: Annotated[int, typer.Option(min=1, help="The most steps of a request.")] = 100,
    guidance: Guidance = None,
    parts: Parts = EVERY_TIMESTEP,
    threads: Threads = None,
    host: Annotated[str, typer.Option(help="Any other than 127.0.0.1 wants a key in SDTRT_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[str, typer.Option(help="Pipelines, each on a GPU of its own: 2, or 1-4, which follows the load.")] = "1",
    queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait; then requests get 429.")] = 64,
    wait: Annotated[float, typer.Option(min=0, help="Seconds for which a picture waits for others of its batch.")] = 0.05,
    address: Address = None,
) -> None:
    """Serve the pipeline behind OpenAI's images API, on Ray Serve, until Ctrl-C."""
    require_serving("sdtrt serve")
    from .http import Server, begin, end

    setup = setup_of(model=model, recipe=recipe, int8=int8, fp8=fp8, full=full, lora_dir=lora_dir, size=size,
                     batches=whole_numbers("--batches", batches), steps=steps, guidance=guidance, parts=parts, threads=threads,
                     bundle=bundled, trust=trust)
    setup = replace(setup, max_steps=max(max_steps, steps), prompts=tuple(read_prompts(prompts)) if prompts else ())
    least, dash, most = replicas.partition("-")
    if not least.isdecimal() or (dash and not most.isdecimal()):
        raise SdtrtError(f"--replicas expects a number such as 2, or two of them such as 1-4, got {replicas!r}")
    server = Server(host, port, (int(least), int(most or least)), queue, wait, address)
    try:
        with console.status("starting Ray, loading, calibrating, building each size and batch: a minute or more"):
            begin(setup, server)
        console.print(f"ready: http://{host}:{port}/v1/images/generations, Ctrl-C to stop", highlight=False)
        signal.pause()
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        end()


def load(
    prompts: Annotated[Path | None, typer.Argument(help="A text file, one prompt per line.")] = None,
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://127.0.0.1:8000",
    rate: Annotated[float | None, typer.Option(help="Requests a second, at random moments. Without it --clients ask.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients that each wait for an answer before they ask again.")] = 1,
    duration: Annotated[float, typer.Option(help="Seconds for which requests are made.")] = 30.0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of a request.")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; the server's own when omitted.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The server's own when omitted.")] = None,
    triton: Annotated[str | None, typer.Option(metavar="MODEL", help="The server is Triton, and this its model.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for load.json and load.svg.")] = None,
) -> None:
    """Ask a server for pictures and time its answers. Exit code 3 when some failed."""
    require_serving("sdtrt load")
    from .load import Plan, chart, run_with_bar, summary, write

    fields = tuple((name, value) for name, value in (("size", size), ("steps", steps)) if value is not None)
    plan = Plan(url, tuple(read_prompts(prompts)) if prompts else ("a lighthouse",), rate, clients, duration, fields, count,
                "triton" if triton else "openai", triton, os.environ.get("SDTRT_API_KEY"), seed)
    outcomes = run_with_bar(plan)
    found = summary(outcomes)
    table = Table("requests", "pictures", "pictures/s", "p50 s", "p95 s", "p99 s", "refused", "failed", title_justify="left",
                  title=f"{url}, {f'{rate:g} requests a second' if rate else f'{clients} clients'}, {duration:g} s")
    times = ["-" if found[share] is None else f"{found[share]:.2f}" for share in ("p50", "p95", "p99")]
    table.add_row(str(found["requests"]), str(found["pictures"]), f"{found['pictures_per_s']:.2f}", *times, str(found["refused"]),
                  str(found["failed"]))
    console.print(table)
    if found["failed"]:
        console.print(f"answers: {found['statuses']}", highlight=False)
    if out:
        write(out, plan, found, chart({url: outcomes}))
        console.print(f"written: {out / 'load.json'}, {out / 'load.svg'}", highlight=False)
    if found["failed"]:
        raise typer.Exit(NOT_QUANTIZED)

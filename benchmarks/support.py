"""What works with which model: each family of tests/test_families.py, tried as a user would, into docs/support.md.

    python benchmarks/support.py                    # all of them: an hour on one core
    python benchmarks/support.py --only flux sana   # these; the rows of the others stay as they were
    python benchmarks/support.py --trial LoRA       # this one alone; the other cells stay as they were
    python benchmarks/support.py --table            # writes the table again, tries nothing

A model is a tiny one of its class with random weights, on the CPU, in fp32. A cell says "works" where the checks below held,
"in part" where they hold of a part, "refused" where the package said no in a sentence of its own, "fails" otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import test_families as families  # noqa: E402  # it is in no package

import sdtrt_backend  # noqa: E402
from sdtrt_backend.errors import SdtrtError  # noqa: E402
from sdtrt_backend.export import _tensors, export_onnx  # noqa: E402
from sdtrt_backend.provenance import versions  # noqa: E402
from sdtrt_backend.store import processor  # noqa: E402

RESULTS, TABLE = ROOT / "benchmarks" / "results" / "support.json", ROOT / "docs" / "support.md"
WORKS, IN_PART, REFUSED, FAILS, NOT_TRIED = "works", "in part", "refused", "fails", "not tried"
NO_GPU = "it moves a module from and to a GPU, and the table is made without one"
RANK, STRENGTH = 4, 0.3  # of an adapter: its product is this much of the weight it is added to
# family -> the model that it is a tiny one of; in the order of the table
MODELS = {
    "sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL", "sd3_first": "Stable Diffusion 3",
    "sd3": "Stable Diffusion 3.5 medium", "sd35_large": "Stable Diffusion 3.5 large",
    "flux": "FLUX.1 dev", "flux_kontext": "FLUX.1 Kontext", "flux_fill": "FLUX.1 Fill", "flux2": "FLUX.2", "chroma": "Chroma",
    "pixart": "PixArt", "sana": "Sana", "hunyuan_dit": "HunyuanDiT", "hunyuan_image": "HunyuanImage", "lumina2": "Lumina 2",
    "auraflow": "AuraFlow", "kandinsky_prior": "Kandinsky 2.2 prior", "kandinsky22": "Kandinsky 2.2", "kandinsky3": "Kandinsky 3",
    "kandinsky5": "Kandinsky 5", "cogview4": "CogView 4", "qwen_image": "Qwen-Image", "qwen_image_edit": "Qwen-Image Edit",
    "z_image": "Z-Image", "hidream": "HiDream", "stable_cascade": "Stable Cascade", "svd": "Stable Video Diffusion",
    "animatediff": "AnimateDiff", "cogvideox": "CogVideoX", "ltx": "LTX", "ltx2": "LTX 2", "hunyuan_video": "HunyuanVideo",
    "hunyuan_video15": "HunyuanVideo 1.5", "wan": "Wan 2.1", "wan22": "Wan 2.2", "mochi": "Mochi", "cosmos": "Cosmos",
}


class InPartError(Exception):
    """What a cell says of a trial that is neither."""


def one_line(family: str, folder: Path) -> str:
    report = families.check_the_one_line(family)
    rows = {row.name.rstrip("'"): row for row in report.layers}
    eight = [row for row in rows.values() if row.precision == "int8"]
    share = sum(row.flops for row in eight) / sum(row.flops for row in rows.values())
    return f"{len(eight)} of {len(rows)} layers, {share:.0%} of the work"


def recipe(family: str, folder: Path) -> str:
    return f"cosine {families.check_the_recipe(family, folder):.6f}"


def restore(family: str, folder: Path) -> str:
    families.check_the_restore(families.with_recipe(family, folder, engine="reference"), families.Pipeline(family))
    return ""


def lora(family: str, folder: Path) -> str:
    """An adapter on the attention of a model in 8 bits, whose ranges are those of the model without it: the output is nearer to
    the model's own with the adapter than to its own without it, and not twice as far as before."""
    pipe = families.with_recipe(family, folder, engine="reference", max_error=sdtrt_backend.Options().max_error)
    module = pipe.transformer

    def own() -> list[Any]:
        return [families.tensors(module.forward(**step)) for step in pipe.steps]

    def error(mine: list[Any], theirs: list[Any]) -> float:
        return sum(map(families.error, mine, theirs)) / len(theirs)

    eight_bits, plain = families.in_8_bits(sdtrt_backend.explain(pipe)), own()
    before = error(pipe.each_step(), plain)
    targets = [name for name, m in module.named_modules() if isinstance(m, torch.nn.Linear) and name in eight_bits
               and "att" in name]
    if not targets:
        raise InPartError("no layer of its attention is in 8 bits, so none was given an adapter")
    add_lora(module, targets)
    mine, adapted = pipe.each_step(), own()
    report = sdtrt_backend.explain(pipe)
    if report.state == "refused":
        raise SdtrtError(report.fallbacks[-1])
    assert report.state == "ready", f"{report.state} with the adapter"
    to_adapted, to_plain = error(mine, adapted), error(mine, plain)
    assert to_adapted < min(to_plain, 2 * before), (f"the output is {to_adapted:.2f} from the model's own with the adapter, "
                                                    f"{to_plain:.2f} from that without one; it was {before:.2f} before")
    assert families.in_8_bits(report).issuperset(targets), "a layer with an adapter is not in 8 bits any more"
    return f"on {len(targets)} layers"


def add_lora(module: torch.nn.Module, targets: list[str]) -> None:
    """diffusers has it for the classes that say so, peft for any."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    if hasattr(module, "add_adapter"):
        module.add_adapter(config)
    else:
        inject_adapter_in_model(config, module)
    noise = torch.Generator().manual_seed(0)
    for path, p in module.named_parameters():
        if ".lora_" in path:
            p.copy_(torch.randn(p.shape, generator=noise) * STRENGTH ** 0.5 * p[0].numel() ** -0.5)


def sequential_offload(family: str, folder: Path) -> str:
    from accelerate import cpu_offload

    torch._dynamo.reset()
    pipe = families.Pipeline(family)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    sdtrt_backend.accelerate(pipe, recipe=folder)
    return ""


def export(family: str, folder: Path) -> str:
    """The first step in onnxruntime gives what the reference lowering of the same layers gives, one code to an input."""
    import onnxruntime

    exported = export_onnx(families.Pipeline(family), folder, folder / "onnx")
    kept = [d.layer.name for d in exported.decisions if not d.quantized]
    reference = families.with_recipe(family, folder, engine="reference", exclude=kept, two_codes=[])
    step = reference.steps[0]
    session = onnxruntime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
    given = _tensors(step)
    found = session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})
    missing = {d.layer.name for d in exported.decisions if d.quantized} - families.in_8_bits(sdtrt_backend.explain(reference))
    if missing:
        raise InPartError(f"the file runs in onnxruntime; {len(missing)} of its 8-bit layers are not in 8 bits in the reference "
                          "lowering, so that there is nothing to compare it with")
    theirs = families.tensors(reference.transformer(**step))
    cosine = families.cosine([torch.from_numpy(y) for y in found], theirs)
    families.check_cosine(cosine, reference, [theirs])
    return f"cosine {cosine:.6f}"


TRIALS: dict[str, Callable[[str, Path], str]] = {"one line": one_line, "recipe": recipe, "restore": restore, "LoRA": lora,
                                                 "sequential offload": sequential_offload, "ONNX export": export}
COLUMNS = ("one line", "recipe", "restore", "LoRA", "model offload", "sequential offload", "ONNX export")


@torch.no_grad()
def tried(what: str, family: str, folder: Path) -> dict[str, Any]:
    """A cell. Whatever stops a trial is what the table says of it."""
    start = time.perf_counter()
    try:
        cell = {"state": WORKS, "said": TRIALS[what](family, folder)}
    except InPartError as part:
        cell = {"state": IN_PART, "said": str(part)}
    except SdtrtError as error:
        cell = {"state": REFUSED, "said": str(error)}
    except Exception as caught:
        error: BaseException = caught
        while error.__cause__ is not None:  # exporters wrap what went wrong
            error = error.__cause__
        words = next((line for line in str(error).splitlines() if line.strip()), "").replace(str(folder), "")
        ours = isinstance(error, AssertionError) and words
        cell = {"state": FAILS, "said": words if ours else f"{type(error).__name__}: {words}"}
    return {**cell, "seconds": round(time.perf_counter() - start, 1)}


def row_of(family: str, trials: list[str], known: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        plain = families.Pipeline(family)
        sdtrt_backend.calibrate(plain, ["a"], num_inference_steps=len(families.SHARES), progress=False).save(folder)
        cells: dict[str, Any] = {**known.get("cells", {}), "model offload": {"state": NOT_TRIED, "said": NO_GPU}}
        for what in trials:
            cells[what] = tried(what, family, folder)
            print(f"  {what}: {cells[what]['state']}, {cells[what]['said']} ({cells[what]['seconds']} s)", flush=True)
    return {"class": type(plain.transformer).__name__, "cells": cells}


def table(results: dict[str, Any]) -> str:
    """The page: a row for each model; what a cell has to say is a note below, once for all cells that say it."""
    notes: dict[str, int] = {}

    def cell(model: dict[str, Any], what: str) -> str:
        found = model["cells"].get(what, {"state": NOT_TRIED, "said": "left out of the run that made this table"})
        if found["state"] == WORKS:
            return f"{WORKS}, {found['said']}" if what in ("one line", "recipe") else WORKS
        number = notes.setdefault(found["said"].replace(model["class"], "the module"), len(notes) + 1)
        return f"{found['state']} [{number}]"

    rows = [(name, f"`{model['class']}`", *(cell(model, what) for what in COLUMNS))
            for family, name in MODELS.items() if (model := results["models"].get(family))]
    head = ("model", "class", *COLUMNS)
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    made = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    said = [f"{n}. {sentence}" for sentence, n in notes.items()]
    return "\n".join([INTRODUCTION.format(versions=made), *lines, "", *said]) + "\n"


INTRODUCTION = """# What works with which model

Made by `python benchmarks/support.py`, which takes a tiny model of each class, of random weights, through what users do, on the
CPU and in fp32. Versions:
{versions}.

- one line: `torch.compile(module, backend="sd_int8")` is ready after two pictures, its output is near the model's own, and
  every layer that ran is in 8 bits or has its reason in the report. Said: how many layers are in 8 bits
- recipe: `accelerate(pipe, recipe=...)` of a fresh copy is ready at its first call. Said: the least cosine of the compiled step
  to the reference lowering, over four steps on the same inputs. Where it is below 0.9999, the reference is as far from itself
  with its inputs changed by 1e-6, and every operation of the step gives what the reference gives from the same input
- restore: the model's own output, to the bit
- LoRA: an adapter on its attention, added to the model in 8 bits, is in its output, with the ranges of the model without it
- model offload, sequential offload: `enable_model_cpu_offload`, `enable_sequential_cpu_offload`
- ONNX export: the file in onnxruntime gives what the reference lowering gives
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), metavar="FAMILY")
    parser.add_argument("--trial", choices=list(TRIALS))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    wanted = [] if given.table else given.only or list(MODELS)
    trials = [given.trial] if given.trial else list(TRIALS)
    for i, family in enumerate(wanted):
        print(f"{i + 1} of {len(wanted)}: {MODELS[family]}", flush=True)
        results |= {"cpu": processor(), "versions": versions(("sdtrt_backend", "torch", "diffusers", "peft", "accelerate", "onnx",
                                                              "onnxruntime"))}
        results["models"][family] = row_of(family, trials, results["models"].get(family, {}))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        TABLE.write_text(table(results))
    TABLE.write_text(table(results))


if __name__ == "__main__":
    main()

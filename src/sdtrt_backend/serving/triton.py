"""``sdtrt export --to triton``: a model repository of Triton Inference Server, whose python backend draws with a painter."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ExportError, ModelError
from ..files import write_atomically
from ..pipeline import ASSETS
from .painter import BUILT_IN, PROMPTS, Setup
from .triton_model import INPUTS, OUTPUTS, SETUP, Saved

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
GB = 1e9
MODEL_PY = '''"""Written by sdtrt export --to triton. Triton's python backend loads it; sdtrt_backend does the work."""

import triton_python_backend_utils

from sdtrt_backend.serving.triton_model import TritonModel


class TritonPythonModel(TritonModel):
    """What Triton calls: initialize and execute."""

    triton = triton_python_backend_utils
'''
CONFIG = """\
# Written by sdtrt export --to triton.
name: "{name}"
backend: "python"
max_batch_size: {most}
{batching}instance_group [ {{ count: {instances} kind: {kind} }} ]
version_policy {{ latest {{ num_versions: 1 }} }}
input [
{inputs}
]
output [
{outputs}
]
model_warmup [
{warmups}
]
{parameters}
"""


@dataclass(frozen=True)
class Repository:
    """What was written. saved: name -> model, also of those that were there before; memory_budget: bytes, None for no limit."""

    folder: Path
    written: tuple[str, ...]
    saved: Mapping[str, Saved]
    memory_budget: int | None

    @property
    def weights(self) -> int:
        """Bytes of all instances of all models."""
        return sum(model.weights * model.instances for model in self.saved.values())

    def __str__(self) -> str:
        calibrating = [name for name in self.written if self.saved[name].setup.calibrates]
        budget = "" if self.memory_budget is None else f" of {_gb(self.memory_budget)}"
        return "\n".join((
            f"written: {', '.join(str(self.folder / name) for name in self.written)}",
            f"models in {self.folder}: {_figures(self.saved)}; together {_gb(self.weights)}{budget}",
            *(f"{name} has no recipe: it calibrates itself at every start of the server; give one with --recipe"
              for name in calibrating),
            f"serve it: tritonserver --model-repository {self.folder} --disable-auto-complete-config"))


def export_triton(folder: str | os.PathLike[str], models: Mapping[str, Setup], *, instances: int = 1, gpu: bool = False,
                  memory_budget: float | None = None, max_queue_delay_ms: float = 50, version: int = 1) -> Repository:
    """Write a model repository, or add to the one that is there: a name that it has is replaced, the others stay.

    instances: of each of ``models``, on every GPU of the server, else on its CPU. gpu: the server must have one. memory_budget:
    GB (1e9 bytes) of one GPU, or of the CPU, for the weights of all models; None is the least of earlier exports into it.
    max_queue_delay_ms: how long a picture waits for others to fill its batch. Raises ExportError for a folder that holds
    something else, a name or number that Triton would not take, and weights beyond the budget; OptionError, ModelError and
    RecipeError for a setup that could not be served. Nothing is written then.
    """
    folder = Path(folder)
    _check_numbers(models, instances, memory_budget, max_queue_delay_ms, version)
    before = _found(folder)
    setups = {name: _checked(name, setup) for name, setup in models.items()}
    budgets = [model.memory_budget for model in before.values() if model.memory_budget is not None]
    budget = min(budgets, default=None) if memory_budget is None else round(memory_budget * GB)
    new = {name: Saved(setup, _weights(setup), instances, budget) for name, setup in setups.items()}
    made = Repository(folder, tuple(new), {**before, **new}, budget)
    if budget is not None and made.weights > budget:
        raise ExportError(f"the weights do not fit: {_figures(made.saved)} make {_gb(made.weights)}, the memory budget is "
                          f"{_gb(budget)}; raise --memory-budget, take fewer --instances, or serve a model elsewhere")
    texts = {name: config_text(name, model, gpu, max_queue_delay_ms) for name, model in new.items()}
    for name, model in new.items():
        _write(folder / name, model, texts[name], version)
    return made


def config_text(name: str, model: Saved, gpu: bool, max_queue_delay_ms: float) -> str:
    """The config.pbtxt of a model."""
    batches = sorted(set(model.setup.batches))
    most = batches[-1]
    # only the largest is preferred: Triton sends a preferred size at once, and a picture that could wait for others would not
    batching = (f"dynamic_batching {{ preferred_batch_size: [ {most} ] max_queue_delay_microseconds: "
                f"{round(max_queue_delay_ms * 1000)} }}\n") if most > 1 else ""
    inputs = [f'  {{ name: "{field}" data_type: {kind} dims: [ 1 ]{"" if field == "PROMPT" else " optional: true"} }}'
              for field, kind in INPUTS.items()]
    outputs = [f'  {{ name: "{field}" data_type: {kind} dims: [ {", ".join(map(str, shape))} ] }}'
               for field, (kind, shape) in OUTPUTS.items()]
    parameters = {"weights_bytes": model.weights, "memory_budget_bytes": model.memory_budget}
    return CONFIG.format(
        # not KIND_CPU or KIND_GPU by what the exporting machine has: another may serve, and AUTO is what that one has
        name=name, most=most, batching=batching, instances=model.instances, kind="KIND_GPU" if gpu else "KIND_AUTO",
        inputs=",\n".join(inputs), outputs=",\n".join(outputs), warmups=",\n".join(_warmup(batch) for batch in batches),
        parameters="\n".join(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
                             for key, value in parameters.items() if value is not None))


def _warmup(batch: int) -> str:
    """Requests that Triton sends, as one batch, before it calls the model ready."""
    inputs = [f'    inputs {{ key: "{field}" value {{ data_type: {INPUTS[field]} dims: [ 1 ] input_data_file: "{file}" }} }}'
              for field, file in (("PROMPT", "prompt"), ("STEPS", "steps"))]
    return "\n".join(("  {", f'    name: "batch of {batch}" batch_size: {batch}', *inputs, "  }"))


def _warmup_data(setup: Setup) -> dict[str, bytes]:
    """File name -> the input of one warm-up request, in the form of Triton's tensors."""
    prompt = PROMPTS[0].encode()
    return {"prompt": struct.pack("<I", len(prompt)) + prompt, "steps": struct.pack("<i", min(BUILT_IN, setup.steps))}


def _check_numbers(models: Mapping[str, Setup], instances: int, memory_budget: float | None, delay_ms: float,
                   version: int) -> None:
    wrong = next((name for name in models if not NAME.fullmatch(name)), None)
    if wrong is not None:
        raise ExportError(f"a model's name expects letters, digits, _, - and ., as it is a folder and a part of an address; got "
                          f"{wrong!r}: give another with --name")
    for what, value, least in (("instances", instances, 1), ("version", version, 1), ("max_queue_delay_ms", delay_ms, 0)):
        if not value >= least:
            raise ExportError(f"{what} expects a number from {least}, got {value}")
    if memory_budget is not None and not memory_budget > 0:
        raise ExportError(f"memory_budget expects gigabytes, more than 0, got {memory_budget}")


def _found(folder: Path) -> dict[str, Saved]:
    """The models that an earlier export has written. Raises ExportError where there is anything else."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; expected a new or empty folder, or one that sdtrt export --to triton wrote")
    models: dict[str, Saved] = {}
    strangers: list[str] = []
    for entry in sorted(folder.iterdir()) if folder.exists() else ():
        versions = [int(path.parent.name) for path in entry.glob(f"*/{SETUP}") if path.parent.name.isdecimal()]
        try:
            models[entry.name] = Saved.load(entry / str(max(versions, default=1)))
        except ModelError as error:
            strangers.append(f"{entry.name} ({error})" if versions else entry.name)
    if strangers:
        raise ExportError(f"{folder} holds what is no model of sdtrt export: {', '.join(strangers)}; expected a new or empty "
                          "folder, or one that sdtrt export --to triton wrote: name another, or take that away")
    return models


def _checked(name: str, setup: Setup) -> Setup:
    """With absolute paths, as the server starts in a folder of its own. Raises what a server would, as long as it can be seen."""
    setup.check()
    model, recipe, bundle, loras = (given and str(Path(given).resolve())
                                    for given in (setup.model, setup.recipe, setup.bundle, setup.loras))
    folders = {key: str(Path(setup.options[key]).resolve()) for key in ("recipe", "engine_dir") if setup.options.get(key)}
    return replace(setup, model=model, recipe=recipe, bundle=bundle, loras=loras, options={**setup.options, **folders})


def _weights(setup: Setup) -> int:
    """Bytes of the model's and the LoRAs' files: on a GPU about what a pipeline takes before it is in 8 bits, and later less."""
    folders = [Path(setup.model) if setup.model else ASSETS / "tiny_emoji", *([Path(setup.loras)] if setup.loras else [])]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _write(folder: Path, model: Saved, config: str, version: int) -> None:
    home, warmup = folder / str(version), folder / "warmup"
    home.mkdir(parents=True, exist_ok=True)
    warmup.mkdir(exist_ok=True)
    model.save(home)  # first: by it the next export knows the folder, also when this one is stopped
    write_atomically(home / "model.py", MODEL_PY.encode())
    for name, data in _warmup_data(model.setup).items():
        write_atomically(warmup / name, data)
    write_atomically(folder / "config.pbtxt", config.encode())  # last: a server that looks meanwhile sees no half of a model


def _figures(models: Mapping[str, Saved]) -> str:
    return ", ".join(f"{name} {_gb(model.weights)}" + (f" x {model.instances}" if model.instances > 1 else "")
                     for name, model in models.items())


def _gb(size: float) -> str:
    return f"{size / GB:.3g} GB"

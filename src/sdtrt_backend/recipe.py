"""Recipe: ranges, smoothing and provenance of one calibrated model; KBs, no weights; JSON and safetensors on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from .errors import RecipeError, require_modelopt

SCHEMA = 1
JSON_NAME, TENSORS_NAME = "recipe.json", "recipe.safetensors"
FINGERPRINT_SAMPLES = 1024


@dataclass(frozen=True)
class LayerRecipe:
    """Calibrated input of one layer.

    fingerprint: identifies the weight; group: layers of one group read one tensor and share amax and smoothing;
    amax: clipping value after smoothing; alpha: migration strength or None; plain_amax: clipping value without smoothing or
    None, see ``rules.FREE_CONVS``; low, high: smallest and largest value after smoothing, or None; keep: the sentence why the
    layer is to stay in the user's precision, or None; second: the sentence why its input is to have two codes, or to stay in
    the user's precision where kernels take one, or None.
    """

    op: str
    fingerprint: str
    group: str
    amax: float
    alpha: float | None = None
    plain_amax: float | None = None
    low: float | None = None
    high: float | None = None
    keep: str | None = None
    second: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What calibration found. ``smoothing``: group -> divisor per input channel, fp32 [in].

    ``amax_by_timestep``: group -> fp32 [T, 4] (max, min, sum, count of the unsmoothed amax), rows in the order of
    ``timesteps``, noisiest first; a row of zeros where the layer did not run.
    """

    model_hash: str
    layers: Mapping[str, LayerRecipe]
    smoothing: Mapping[str, torch.Tensor] = field(default_factory=dict)
    amax_by_timestep: Mapping[str, torch.Tensor] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def input_of(self, name: str, free_convs: bool) -> tuple[float, torch.Tensor | None]:
        """(clipping value, divisor per channel [in] or None) of a layer's input. free_convs: see ``rules.FREE_CONVS``."""
        layer = self.layers[name]
        if layer.op == "conv2d" and layer.plain_amax is not None and not free_convs:
            return layer.plain_amax, None
        return layer.amax, self.smoothing.get(layer.group)

    def check_model(self, fingerprints: Mapping[str, str]) -> None:
        """Raise RecipeError unless every layer of the recipe that the model has carries the recipe's weight."""
        known = [name for name in self.layers if name in fingerprints]
        if not known:
            example = next(iter(self.layers), "-")
            raise RecipeError.other_model(f"none of its {len(self.layers)} layers ({example}, ...) exist here")
        for name in known:
            if not one_weight(fingerprints[name], self.layers[name].fingerprint):
                raise RecipeError.other_weight(name)

    def to_modelopt(self, module: torch.nn.Module, *, original: torch.nn.Module | None = None,
                    exclude: Iterable[str] = ()) -> None:
        """Write the recipe into a module that modelopt quantised, in place: see ``modelopt.to_modelopt``."""
        require_modelopt("Recipe.to_modelopt")
        from . import modelopt

        modelopt.to_modelopt(self, module, original, exclude)

    @classmethod
    def from_modelopt(cls, module: torch.nn.Module, *, original: torch.nn.Module | None = None) -> Recipe:
        """The recipe of a module that modelopt quantised: see ``modelopt.from_modelopt``."""
        require_modelopt("Recipe.from_modelopt")
        from . import modelopt

        return modelopt.from_modelopt(module, original)

    def _files(self) -> tuple[bytes, bytes]:
        """What ``save`` writes: the JSON and the tensors."""
        from safetensors.torch import save

        tensors = {f"smoothing/{k}": v.contiguous() for k, v in sorted(self.smoothing.items())}
        tensors |= {f"amax/{k}": v.contiguous() for k, v in sorted(self.amax_by_timestep.items())}
        blob = save(tensors)
        body = {
            "schema": SCHEMA,
            "model_hash": self.model_hash,
            "timesteps": list(self.timesteps),
            "provenance": dict(self.provenance),
            "layers": {name: asdict(layer) for name, layer in sorted(self.layers.items())},
            "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        }
        body["sha256"] = digest(body)
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode(), blob

    def content_hash(self) -> str:
        """Of all that ``save`` writes: 32 hexadecimal digits."""
        return hashlib.sha256(self._files()[0]).hexdigest()[:32]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``recipe.json`` and ``recipe.safetensors`` into ``folder``, atomically, also while others save and load there.

        Raises RecipeError where that is no folder and none can be made, or it cannot be written."""
        text, blob = self._files()
        try:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder, exclusive=True):
                write_atomically(folder / TENSORS_NAME, blob)
                write_atomically(folder / JSON_NAME, text)
        except (OSError, TypeError, ValueError) as error:
            raise RecipeError.unwritable(folder, error) from None
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Recipe:
        """Read what ``save`` wrote. Raises RecipeError when it is missing, truncated, edited or of a newer schema."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            folder = Path(folder)
            with _locked(folder):
                body = json.loads((folder / JSON_NAME).read_text())
                blob = (folder / TENSORS_NAME).read_bytes()
        except FileNotFoundError as error:
            raise RecipeError.unreadable(folder, f"{Path(error.filename).name} is missing") from None
        except NotADirectoryError:
            raise RecipeError.unreadable(folder, "a recipe is a folder, this is a file") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise RecipeError.unreadable(folder, f"{JSON_NAME} is truncated or not JSON") from None
        except (OSError, TypeError, ValueError) as error:
            raise RecipeError.unreadable(folder, f"expected the folder of a saved recipe ({error})") from None
        if not isinstance(body, dict) or not isinstance(body.get("schema"), int):
            raise RecipeError.unreadable(folder, f"{JSON_NAME} has no schema number")
        if body["schema"] > SCHEMA:
            raise RecipeError.newer(folder, body["schema"], SCHEMA)
        if body.pop("sha256", None) != digest(body):
            raise RecipeError.unreadable(folder, f"{JSON_NAME} was edited or damaged (its checksum does not match)")
        if hashlib.sha256(blob).hexdigest() != body["tensors_sha256"]:
            raise RecipeError.unreadable(folder, f"{TENSORS_NAME} is truncated, edited or of another recipe")
        try:
            tensors = load(blob)
        except SafetensorError as error:
            raise RecipeError.unreadable(folder, f"{TENSORS_NAME}: {error}") from None
        return cls(
            model_hash=body["model_hash"],
            layers={name: LayerRecipe(**layer) for name, layer in body["layers"].items()},
            smoothing={k.removeprefix("smoothing/"): v for k, v in tensors.items() if k.startswith("smoothing/")},
            amax_by_timestep={k.removeprefix("amax/"): v for k, v in tensors.items() if k.startswith("amax/")},
            timesteps=tuple(body["timesteps"]),
            provenance=body["provenance"],
        )


def fingerprint(weight: torch.Tensor) -> str:
    """Identity of a weight: SHA-256 over its shape and at most 1024 evenly spaced elements as bf16, 16 hexadecimal digits; where
    fp16 would round to other ones, a space and the same of the weight as fp16. ``one_weight`` compares.

    So a checkpoint is known in whichever precision it is loaded, but for fp16 and bf16 roundings of one fp32 checkpoint, which
    are told to be the same by its fp32 weights only."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, -(-flat.numel() // FINGERPRINT_SAMPLES))].cpu()
    codes = [t.to(torch.bfloat16).view(torch.int16).numpy().tobytes() for t in (sample, sample.half())]
    return " ".join(dict.fromkeys(hashlib.sha256(repr(tuple(weight.shape)).encode() + c).hexdigest()[:16] for c in codes))


def one_weight(first: str, second: str) -> bool:
    """Whether two fingerprints are of one weight, each in any precision."""
    return not set(first.split()).isdisjoint(second.split())


def model_hash(fingerprints: Iterable[tuple[str, str]]) -> str:
    """One hash over (layer name, fingerprint) pairs, order-independent."""
    return hashlib.sha256(repr(sorted(fingerprints)).encode()).hexdigest()[:32]


def versions(names: Iterable[str] = ("sdtrt_backend", "torch", "torchao", "diffusers", "transformers")) -> dict[str, str]:
    """Versions of packages, by default those whose behaviour shapes a recipe or a measurement; only installed ones."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, exclusive: bool = False) -> Iterator[None]:
    """The two files are of one save, whoever else saves meanwhile. The lock is the folder's own, so it leaves no file there."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows, and file systems without locks, do without
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never half of it, also after a power cut."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}")  # not of mkstemp, whose files only their owner may read
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

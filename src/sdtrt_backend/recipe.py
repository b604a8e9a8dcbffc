"""Recipe: ranges, smoothing and provenance of one calibrated model; KBs, no weights; JSON and safetensors on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import RecipeError, require_modelopt
from .files import Format
from .files import digest as digest
from .files import write_atomically as write_atomically
from .provenance import fingerprint as fingerprint
from .provenance import model_hash as model_hash
from .provenance import one_weight as one_weight
from .provenance import versions as versions
from .values import LayerRecipe as LayerRecipe

# 1: the tensors were recipe.safetensors; 2: layers had no role; 3: none had ranges of weights; 4: or of rotated inputs
SCHEMA = 5
FORMAT = Format("recipe", SCHEMA, RecipeError.unreadable, lambda folder, found: RecipeError.newer(folder, found, SCHEMA),
                old_tensors=r"recipe\.safetensors", old_name=lambda body: "recipe.safetensors")
JSON_NAME = FORMAT.json_name


@dataclass(frozen=True)
class Recipe:
    """What calibration found. ``smoothing``: group -> divisor per input channel, fp32 [in].

    ``amax_by_timestep``: group -> fp32 [T, 4] (max, min, sum, count of the unsmoothed amax), rows in the order of
    ``timesteps``, noisiest first; a row of zeros where the layer did not run. ``parts``: those of a pipeline's other modules that
    are called at every timestep, by their names in it: a second denoiser, ControlNets, priors. ``weight_amax``: layer -> max |W|
    of each output channel that its int8 codes are to reach, after smoothing, fp32 [out], where that is not the weight's own:
    quantisation-aware training leaves it as it was.
    """

    model_hash: str
    layers: Mapping[str, LayerRecipe]
    smoothing: Mapping[str, torch.Tensor] = field(default_factory=dict)
    amax_by_timestep: Mapping[str, torch.Tensor] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Recipe] = field(default_factory=dict)
    weight_amax: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def input_of(self, name: str, smooth_convs: bool) -> tuple[float, torch.Tensor | None]:
        """(clipping value, divisor per channel [in] or None) of a layer's input. smooth_convs: see ``rules.SMOOTH_CONVS``."""
        layer = self.layers[name]
        if layer.op == "conv2d" and layer.plain_amax is not None and not smooth_convs:
            return layer.plain_amax, None
        return layer.amax, self.smoothing.get(layer.group)

    def fitting(self, fingerprints: Mapping[str, str]) -> Recipe:
        """This recipe, or the part of it that is of the model with these weights."""
        def shared(recipe: Recipe) -> int:
            return sum(name in fingerprints and one_weight(fingerprints[name], layer.fingerprint)
                       for name, layer in recipe.layers.items())

        return max((self, *self.parts.values()), key=shared) if self.parts else self

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

        return modelopt.from_modelopt(cls, module, original)

    def _content(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The body of the JSON, and the tensors; those of a part have its name before theirs."""
        body: dict[str, Any] = {
            "model_hash": self.model_hash, "timesteps": list(self.timesteps), "provenance": dict(self.provenance),
            "layers": {name: asdict(layer) for name, layer in self.layers.items()}}
        tensors = {**{f"smoothing/{k}": v for k, v in self.smoothing.items()},
                   **{f"amax/{k}": v for k, v in self.amax_by_timestep.items()},
                   **{f"weight_amax/{k}": v for k, v in self.weight_amax.items()}}
        for name, part in self.parts.items():
            inner, more = part._content()
            body.setdefault("parts", {})[name] = inner
            tensors |= {f"{name}:{k}": v for k, v in more.items()}
        return body, tensors

    @classmethod
    def _of(cls, body: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Recipe:
        """What ``_content`` took apart."""
        return cls(
            model_hash=body["model_hash"],
            layers={name: LayerRecipe(**layer) for name, layer in body["layers"].items()},
            smoothing={k.removeprefix("smoothing/"): v for k, v in tensors.items() if k.startswith("smoothing/")},
            amax_by_timestep={k.removeprefix("amax/"): v for k, v in tensors.items() if k.startswith("amax/")},
            weight_amax={k.removeprefix("weight_amax/"): v for k, v in tensors.items() if k.startswith("weight_amax/")},
            timesteps=tuple(body["timesteps"]),
            provenance=dict(body["provenance"]),
            parts={name: cls._of(inner, {k.removeprefix(f"{name}:"): v for k, v in tensors.items() if k.startswith(f"{name}:")})
                   for name, inner in body.get("parts", {}).items()},
        )

    def content_hash(self) -> str:
        """Of all that ``save`` writes: 32 hexadecimal digits. What ``load`` gives has the hash of what was saved."""
        return hashlib.sha256(FORMAT.files(*self._content())[0]).hexdigest()[:32]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``recipe.json`` and ``recipe-<SHA-256>.safetensors`` into ``folder``; see ``Format.save``.

        Whoever loads meanwhile, or after the process was killed here, gets the recipe before or this one. Raises RecipeError
        where that is no folder and none can be made, or it cannot be written."""
        try:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            FORMAT.save(folder, *self._content())
        except (OSError, TypeError, ValueError) as error:
            raise RecipeError.unwritable(folder, error) from None
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Recipe:
        """Read what ``save`` wrote. Raises RecipeError when it is missing, truncated, edited or of a newer schema."""
        try:
            folder = Path(folder)
            body, tensors = FORMAT.load(folder)
        except (TypeError, ValueError) as error:
            raise RecipeError.unreadable(folder, f"expected the folder of a saved recipe ({error})") from None
        with FORMAT.shaped(folder):
            return cls._of(body, tensors)

"""A calibration that goes on where it stopped: its statistics on disk after each batch of prompts; JSON and safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CalibrationError
from .files import Format, make_private
from .observe import Calibration, InputStats
from .recipe import fingerprint, model_hash, versions
from .stats import WeightStats

# 1: the tensors were calibration-<finished prompts>.safetensors, and pictures were counted otherwise; 2: of a weight only the
# largest value was kept, which is too little to go on
SCHEMA = 3
FORMAT = Format("calibration", SCHEMA, CalibrationError.kept_unreadable,
                lambda folder, found: CalibrationError.kept_unreadable(
                    folder, f"it has schema {found}, this version reads up to {SCHEMA}"),
                old_tensors=r"calibration-\d+\.safetensors", old_name=lambda body: f"calibration-{body['done']}.safetensors",
                sort_keys=False)  # the order of layers and timesteps is restored
COUNTED = "steps counted by the rule"
HASH = "sha256:"  # settings that start so are told apart, not shown


@dataclass(frozen=True)
class ResumeFolder:
    """Where the statistics of one ``calibrate`` call are kept, and the settings that they belong to.

    settings: name -> JSON value of everything that shapes the statistics, see ``settings_of``. One call at a time per folder.
    """

    path: Path
    settings: Mapping[str, Any]

    def save(self, calibrations: Mapping[str, Calibration], done: int) -> None:
        """Replace what is kept with the statistics after ``done`` prompts. Stopped anywhere, one of the two can be loaded.

        calibrations: by the denoiser's name in the pipeline, the first one first."""
        packed = {name: pack(calibration) for name, calibration in calibrations.items()}
        (_, (facts, tensors)), *others = packed.items()
        body = {"done": done, "settings": dict(self.settings), "calibration": facts,
                "parts": {name: more for name, (more, _) in others}}
        for name, (_, more) in others:
            tensors |= {f"{name}:{key}": t for key, t in more.items()}
        make_private(self.path)
        FORMAT.save(self.path, body, tensors)

    def load(self, first: str) -> tuple[dict[str, Calibration], int]:
        """(statistics by the denoiser's name, finished prompts); none where nothing is kept, and the folder is made, for its
        owner only. first: name of the first denoiser.

        Raises CalibrationError for a file that is missing, truncated or edited, and for other settings.
        """
        total_step = self.settings[COUNTED]
        if not self.path.exists() or (self.path.is_dir() and not (self.path / FORMAT.json_name).exists()):
            make_private(self.path)
            return {}, 0
        body, tensors = FORMAT.load(self.path)
        with FORMAT.shaped(self.path):
            different = differences(body["settings"], self.settings)
        if different:
            raise CalibrationError.kept_differs(self.path, different)
        with FORMAT.shaped(self.path):
            parts = {name: unpack(facts, {key.removeprefix(f"{name}:"): t for key, t in tensors.items()
                                          if key.startswith(f"{name}:")}, total_step)
                     for name, facts in body.get("parts", {}).items()}
            return {first: unpack(body["calibration"], tensors, total_step), **parts}, int(body["done"])


def pack(calibration: Calibration) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(JSON value, name -> tensor) of all that was observed, T timesteps in the order of their first visit.

    Per group: ``channels`` fp32 [T, 3, channels] (max, min, sum), ``tensor`` fp64 [T, 4] (max, min, sum, count), ``histogram``
    int64 [T, bins], ``range`` fp32 [2, channels], ``power`` fp32 [channels] of some; per layer: ``weight`` fp32 [3, channels]
    (largest, energy, peak).
    """
    c = calibration
    tensors = {f"weight/{name}": torch.stack([w.amax, w.energy, w.peak]) for name, w in c.weights.items()}
    for group, at in c.inputs.items():
        rows = list(at.values())
        tensors |= {
            f"channels/{group}": torch.stack([torch.stack([r.channel_max, r.channel_min, r.channel_sum]) for r in rows]),
            f"tensor/{group}": torch.tensor([[r.tensor_max, r.tensor_min, r.tensor_sum, r.count] for r in rows],
                                            dtype=torch.float64),
            f"histogram/{group}": torch.stack([r.histogram for r in rows]),
            f"range/{group}": torch.stack(c.ranges[group]),
            **({f"power/{group}": c.power[group]} if group in c.power else {}),
        }
    facts = {"layers": {name: [op, c.fingerprints[name], c.group_of[name], c.weights[name].products]
                        for name, op in c.ops.items()},
             "timesteps": {group: list(at) for group, at in c.inputs.items()}, "nonfinite": c.nonfinite, "rotated": c.rotated,
             "buckets": [[key, *span] for key, span in c.buckets.spans.items()], "trajectories": vars(c.trajectories)}
    return facts, tensors


def unpack(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], total_step: int) -> Calibration:
    """What ``pack`` took apart, to the bit, dictionaries in the same order."""
    c = Calibration(total_step, nonfinite=dict(facts["nonfinite"]), rotated=dict(facts.get("rotated", {})))
    for name, (op, weight, group, products) in facts["layers"].items():
        c.ops[name], c.fingerprints[name], c.group_of[name] = op, weight, group
        amax, energy, peak = tensors[f"weight/{name}"]
        c.weights[name] = WeightStats(amax, energy, peak, products)
    for group, timesteps in facts["timesteps"].items():
        low, high = tensors[f"range/{group}"]
        c.ranges[group] = low, high
        if f"power/{group}" in tensors:
            c.power[group] = tensors[f"power/{group}"]
        numbers = tensors[f"tensor/{group}"].tolist()
        rows = zip(timesteps, tensors[f"channels/{group}"], numbers, tensors[f"histogram/{group}"], strict=True)
        c.inputs[group] = {t: InputStats(channels[0], channels[1], channels[2], amax, amin, total, histogram, int(count))
                           for t, channels, (amax, amin, total, count), histogram in rows}
    c.buckets.spans = {key: (low, high) for key, low, high in facts["buckets"]}
    vars(c.trajectories).update(facts["trajectories"])
    return c


def settings_of(pipe: Any, denoiser: torch.nn.Module, prompts: Sequence[str], pipe_kwargs: Mapping[str, Any], total_step: int,
                **named: Any) -> dict[str, Any]:
    """Everything that shapes the statistics, as JSON: texts, tensors, images and the pipeline's parts as hashes.

    A part is known by its class, its configuration and samples of its weights (``fingerprint``), in their precision. What
    else was set up on the pipeline (attention slicing, adapters' strengths, number of threads) is not looked at.
    Raises CalibrationError for a pipeline argument that cannot be compared.
    """
    device = next(denoiser.parameters(), torch.empty(0)).device.type
    components = getattr(pipe, "components", None) or {
        n: v for n, v in vars(pipe).items() if isinstance(v, torch.nn.Module) or n == "scheduler"}
    return {**named, COUNTED: total_step, "prompts": [_hash(p) for p in prompts],
            "pipeline": type(pipe).__qualname__, "device": device,
            **{f"version of {name}": version for name, version in versions().items()},
            **{f"argument {name}": described(name, value) for name, value in sorted(pipe_kwargs.items())},
            **{name: _part(name, part) for name, part in sorted(components.items())}}


def described(name: str, value: Any) -> Any:
    """A pipeline argument as JSON that is the same in another process; arrays and images as hashes, functions by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _hash([str(value.dtype), list(value.shape)], plain.numpy().tobytes())
    if isinstance(value, Mapping):
        return {str(k): described(name, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [described(name, v) for v in value]
    if isinstance(value, torch.dtype | torch.device | os.PathLike):
        return str(value)
    if hasattr(value, "tobytes"):  # a numpy array, a picture of Pillow
        facts = (type(value).__qualname__, *(str(getattr(value, a, None)) for a in ("dtype", "shape", "mode", "size")))
        return _hash(facts, value.tobytes())
    if isinstance(value, torch.nn.Module):
        return _part(name, value)
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    raise CalibrationError(f"resume= cannot tell whether {name}, a {type(value).__qualname__}, is the same in the next call; "
                           "pass numbers, texts, tensors, arrays, pictures or lists of them, or calibrate without resume=")


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A few words for each setting that is not the same, in the order of ``now``."""
    found = []
    for name in dict.fromkeys((*now, *kept)):
        then, here = kept.get(name, ()), now.get(name, ())
        if then == here:
            continue
        if name == "prompts":
            changed = [i for i, (a, b) in enumerate(zip(then, here, strict=False)) if a != b]
            found.append(f"prompt {changed[0] + 1} is another one" if changed else f"{len(then)} prompts, now {len(here)}")
        elif any(str(v).find(HASH) >= 0 for v in (then, here)):
            what = "is another one" if name.startswith("argument") else "has other weights, precision or configuration"
            found.append(f"{name} {what}")
        else:
            found.append(f"{name} was {_shown(kept, name)}, is {_shown(now, name)}")
    return found


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not given"


def _hash(facts: Any, data: bytes = b"") -> str:
    return HASH + hashlib.sha256(json.dumps(facts).encode() + data).hexdigest()


def _part(name: str, part: Any) -> str:
    part = getattr(part, "_orig_mod", part)  # torch.compile's wrapper
    config = getattr(part, "config", None)
    plain = {k: v for k, v in config.items() if not k.startswith("_")} if isinstance(config, Mapping) else {}
    weights = []
    if isinstance(part, torch.nn.Module):
        for key, p in (*part.named_parameters(), *part.named_buffers()):
            if type(p) in (torch.Tensor, torch.nn.Parameter) and not p.is_meta:  # on meta when offloaded piece by piece
                weights.append((key, f"{p.dtype} {fingerprint(p)}"))
            else:
                weights.append((key, f"{type(p).__name__} {getattr(p, 'shape', '')}"))
    return _hash([type(part).__qualname__, described(name, plain), model_hash(weights)])

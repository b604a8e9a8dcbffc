"""Where a recipe comes from: which weights, which model, which versions of packages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

FINGERPRINT_SAMPLES = 1024


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
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

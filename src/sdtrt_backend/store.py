"""Measurements kept on disk: one JSON file per (GPU, driver, library versions, kernel sources) in the user's cache directory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("sdtrt_backend")
KERNELS = Path(__file__).parent / "kernels"


def cache_folder() -> Path:
    """SDTRT_CACHE, or sdtrt_backend in the user's cache directory; made with mode 0700."""
    named = os.environ.get("SDTRT_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdtrt_backend"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@cache
def device_key(device: torch.device) -> dict[str, str]:
    """Everything that a measurement depends on; two machines with equal keys may share it."""
    sources = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(KERNELS.glob("*.py"))))
    if device.type == "cpu":
        return {"cpu": processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
                "kernels": sources.hexdigest()[:16]}
    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count), "torch": torch.__version__,
            "cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version()), "driver": _driver(),
            "triton": _version("triton"), "nvidia-cudnn-frontend": _version("nvidia-cudnn-frontend"),
            "kernels": sources.hexdigest()[:16]}


@cache
def processor() -> str:
    """Name of the CPU."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return name


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].strip() if path.exists() else ""


class Store:
    """name -> JSON value, computed once. A file that cannot be read, or of another key, is measured anew and said so."""

    def __init__(self, key: Mapping[str, str]) -> None:
        self.key = dict(key)
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder() / f"kernels-{digest}.json"
        self.values: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            body = json.loads(self.path.read_text())
            if body["key"] == self.key and isinstance(body["values"], dict):
                return body["values"]
            why = "it was measured on another machine"
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"it cannot be read ({error})"
        log.warning("%s is not used: %s; measuring anew", self.path, why)
        return {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The stored value, or ``measure()``, which is stored."""
        if name not in self.values:
            self.values[name] = measure()
            self.save()
        return self.values[name]

    def save(self) -> None:
        """Atomically; a cache that cannot be written costs time, not correctness."""
        try:
            handle, partial = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            with os.fdopen(handle, "w") as file:
                json.dump({"key": self.key, "values": self.values}, file, indent=1, sort_keys=True)
            os.replace(partial, self.path)
        except OSError as error:
            log.warning("measurements cannot be kept in %s: %s", self.path, error)

"""Measurements kept on disk: one JSON file per (GPU or CPU, driver, library versions, kernel sources) in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import threading
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .files import Unusable, alone, read_json, write_json
from .files import cache_folder as cache_folder

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
KERNELS = Path(__file__).parent / "kernels"


def device_key(device: torch.device) -> dict[str, str]:
    """Everything that a measurement depends on; two machines with equal keys may share it.

    On the CPU the number of threads counts, as ``torch.set_num_threads`` leaves it now."""
    if device.type == "cpu":
        return {"cpu": processor(), "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
                "threads": str(torch.get_num_threads()), "kernels": _sources()}
    return dict(_gpu_key(device))


@cache
def _gpu_key(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count), "torch": torch.__version__,
            "cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version()), "driver": _driver(),
            "triton": _version("triton"), "nvidia-cudnn-frontend": _version("nvidia-cudnn-frontend"),
            "fa3-fwd": _version("fa3-fwd"),
            "kernels": _sources()}


@cache
def _sources() -> str:
    """Hash of the kernels' source."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(KERNELS.glob("*.py")))).hexdigest()[:16]


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
    """name -> JSON value, computed once, by whichever process comes first. A file that cannot be read, or of another key, is
    measured anew and said so.

    A value is what the caller makes of it: times in milliseconds, or the sentence why there are none."""

    def __init__(self, key: Mapping[str, str]) -> None:
        self.key = dict(key)
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder() / f"kernels-{name}.json"
        self.lock = threading.Lock()
        self.values: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            body = read_json(self.path, SCHEMA)
            if body.get("key") == self.key and isinstance(body.get("values"), dict):
                return dict(body["values"])
            why = "it was measured on another machine"
        except Unusable as unusable:
            why = str(unusable)
        log.warning("%s is not used: %s; measuring anew", self.path, why)
        return {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The stored value, or ``measure()``, which is stored. Where another process has stored one meanwhile, that."""
        if name not in self.values:
            self._merge({})
        if name not in self.values:
            self._merge({name: measure()}, write=True)
        return self.values[name]

    def save(self) -> None:
        """Add all values to those on disk; a cache that cannot be written costs time, not correctness."""
        self._merge({}, write=True)

    def _merge(self, found: Mapping[str, Any], write: bool = False) -> None:
        """Values on disk come first, then ours: two processes that measured one thing go on with one value."""
        with self.lock, alone(self.path) if write else contextlib.nullcontext():
            self.values = {**found, **self.values, **self._read()}
            if not write:
                return
            try:
                write_json(self.path, SCHEMA, {"key": self.key, "values": self.values})
            except OSError as error:
                log.warning("measurements cannot be kept in %s: %s", self.path, error)

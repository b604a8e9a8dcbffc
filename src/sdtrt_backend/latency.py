"""Milliseconds of each part of a diffusers pipeline, picture by picture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .measure import finish_device


class Stopwatch:
    """``with watch.picture():`` around a call of the pipeline with ``watch.tick`` at the end of each denoising step.

    Text encoders and the VAE's decoder are timed by forward hooks, or around what they were compiled to, until ``close``; the
    denoiser by the distance between the ends of its steps, with what the scheduler does in between. Parts that the pipeline does
    not have are not reported.
    """

    def __init__(self, pipe: Any) -> None:
        parts = {name: m for name, m in pipe.components.items()
                 if name.startswith("text_encoder") and isinstance(m, torch.nn.Module)}
        decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
        if decoder is not None:
            parts["vae decoder"] = decoder
        self.pictures: list[dict[str, list[float]]] = []
        self.now: dict[str, list[float]] = {}
        self.ends: list[float] = []
        self._undo = [self._time(name, module) for name, module in parts.items()]

    def _time(self, name: str, module: torch.nn.Module) -> Callable[[], object]:
        """Returns what undoes it."""
        compiled, started = module._compiled_call_impl, list[float]()
        if compiled is not None:  # hooks would be a part of it

            def timed(*args: Any, **kwargs: Any) -> Any:
                start = clock_ms()
                result = compiled(*args, **kwargs)
                self.now.setdefault(name, []).append(clock_ms() - start)
                return result

            module._compiled_call_impl = timed
            return lambda: setattr(module, "_compiled_call_impl", compiled)

        def before(*_: Any) -> None:
            started.append(clock_ms())

        def after(*_: Any) -> None:
            self.now.setdefault(name, []).append(clock_ms() - started.pop())

        hooks = contextlib.ExitStack()
        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after).remove)
        return hooks.close

    def tick(self) -> None:
        """A denoising step is over."""
        self.ends.append(clock_ms())

    @contextlib.contextmanager
    def picture(self) -> Iterator[None]:
        """Everything inside is one picture."""
        self.now, self.ends = {}, []
        start = clock_ms()
        yield
        self.now["denoiser step"] = list(np.diff(self.ends))
        self.now["pipeline"] = [clock_ms() - start]
        self.pictures.append(self.now)

    def close(self) -> None:
        """The parts are called as before."""
        for undo in self._undo:
            undo()

    def rows(self, counts: Callable[[int], bool] = lambda picture: True) -> list[tuple[str, int, float, float, float]]:
        """(part, calls, mean, median, 99th percentile in ms) over the pictures that count, in the order they run."""
        chosen = [p for i, p in enumerate(self.pictures) if counts(i)]
        names = dict.fromkeys(name for p in chosen for name in p)
        order = sorted(names, key=lambda n: (n == "pipeline", n == "vae decoder", "text" not in n, n))
        values = {name: [ms for p in chosen for ms in p.get(name, [])] for name in order}
        return [(name, len(v), float(np.mean(v)), float(np.median(v)), float(np.percentile(v, 99)))
                for name, v in values.items() if v]


def clock_ms() -> float:
    """Milliseconds since some moment, once the GPU is done."""
    finish_device()
    return 1e3 * time.perf_counter()

"""A recipe from the user's own pipeline: it draws its prompts in its own precision while forward hooks look on.

A compiled module that was given no recipe makes one from its first pictures (``step.py``), by the same statistics
(``observe.py``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import budget, names, weights
from .errors import CalibrationError, ModelError
from .observe import Calibration, InputStats, Observer, observed
from .options import Options
from .parts import EVERY_TIMESTEP, chosen, defaults, denoisers, every_timestep, holder
from .pictures import asked
from .recipe import Recipe
from .resume import ResumeFolder, settings_of
from .rules import BY_CALL

__all__ = ["Calibration", "InputStats", "Observer", "calibrate", "observed", "quiet", "uncompiled"]

log = logging.getLogger(__name__)


@contextlib.contextmanager
def uncompiled(pipe: Any, name: str) -> Iterator[torch.nn.Module]:
    """The pipeline with this part of it plain, whatever torch.compile made of it; put back afterwards."""
    owner, attribute = holder(pipe, name)
    compiled = getattr(owner, attribute)
    module: torch.nn.Module = getattr(compiled, "_orig_mod", compiled)
    in_place, module._compiled_call_impl = module._compiled_call_impl, None
    if module is not compiled:
        setattr(owner, attribute, module)
    names.named(module)
    try:
        with weights.borrowed(module.parameters()):
            yield module
    finally:
        module._compiled_call_impl = in_place
        if module is not compiled:
            setattr(owner, attribute, compiled)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def calibrate(pipe: Any, prompts: Iterable[str] | None, *, num_inference_steps: int = 25, guidance_scale: float | None = None,
              seed: int = 0, batch_size: int = 1, options: Mapping[str, Any] | None = None, progress: bool = True,
              resume: str | os.PathLike[str] | None = None, parts: str | Iterable[str] = EVERY_TIMESTEP,
              **pipe_kwargs: Any) -> Recipe:
    """Run the user's own pipeline over ``prompts`` in its own precision and return the Recipe, with ``parts`` for what else than
    its denoiser it calls at every timestep.

    pipe: a diffusers pipeline (anything with a ``unet`` or ``transformer``, and a call); it gets everything by keyword.
    prompts: a list or anything else that yields them in order, but no set or dict; None for a pipeline that takes none.
    guidance_scale: None for the pipeline's default; seed: prompt i starts from noise of seed + i, so the same call
    gives the same recipe to the byte; options: as for torch.compile (``rule``, ``percentile``, ``alpha``, ``min_psnr``: the last
    quarter of the prompts then judges what the others calibrate);
    resume: a folder that keeps the statistics after every batch of prompts, so that the same call goes on after Ctrl-C or a
    crash, to the same recipe to the byte. They stay there: once all prompts are done, the call observes nothing and makes the
    recipe, also with another ``rule``, ``percentile``, ``alpha`` or ``alpha_conv``. Of another call, or damaged: an error.
    parts: see ``accelerate``; the recipe is of the denoisers in any case.
    pipe_kwargs: anything else the pipeline takes (height, width, image, mask_image, control_image, ...). Of prompts, images,
    masks, videos and audio a list as long as ``prompts`` is one for each, anything else one for all.
    Raises CalibrationError, ModelError, OptionError; the pipeline is left as it was, also after Ctrl-C.
    """
    for what, number, least in (("num_inference_steps", num_inference_steps, 1), ("batch_size", batch_size, 1)):
        if not _integer(number) or number < least:
            raise CalibrationError.no_number(what, f"an integer >= {least}", number)
    if not _integer(seed):
        raise CalibrationError.no_number("seed", "an integer, as prompt i starts from noise of seed + i", seed)
    parsed = Options.parse(options)
    modules = denoisers(pipe) | chosen(pipe, parts)
    first, denoiser = next(iter(modules.items()))
    for name, module in modules.items():
        if any(p.is_meta for p in module.parameters()):
            raise ModelError.on_meta(name)
    if guidance_scale is not None:
        pipe_kwargs["guidance_scale"] = guidance_scale
    ask = asked(pipe, prompts, pipe_kwargs)
    drawn, judging = (list(range(ask.count)), []) if parsed.min_psnr is None else budget.split(range(ask.count))
    steps_by_call = num_inference_steps if parsed.rule in BY_CALL else 0
    calibrations, done, kept = {name: Calibration(steps_by_call) for name in modules}, 0, None
    if resume is not None:
        texts = [ask.prompts[i] if ask.prompts else "" for i in drawn]
        more = {} if all(map(every_timestep, modules)) else {"parts": list(modules)}
        kept = ResumeFolder(Path(resume), settings_of(pipe, denoiser, texts, pipe_kwargs, steps_by_call, seed=seed, **more,
                                                      num_inference_steps=num_inference_steps, batch_size=batch_size))
        loaded, done = kept.load(first)
        calibrations |= loaded
    calibration = calibrations[first]

    def draw(which: Sequence[int], first: int, steps: int, output_type: str) -> Any:
        """Pictures of the prompts with these indices, from noise of seed + first and on."""
        noise = [torch.Generator("cpu").manual_seed(seed + first + i) for i in range(len(which))]
        return ask.draw(which, num_inference_steps=steps, generator=noise, output_type=output_type)

    drawn_as = "np" if any("output_psnr" in defaults(name) for name in modules) else "latent"  # which is not decoded
    total = len(range(0, len(drawn), batch_size)) * num_inference_steps
    with _progress("calibrating", "step", progress, total, calibration.trajectories.calls) as bar:
        try:
            with torch.no_grad(), quiet(pipe), contextlib.ExitStack() as stack:
                for name in modules:
                    module = stack.enter_context(uncompiled(pipe, name))
                    stack.enter_context(observed(module, calibrations[name], bar.update if name == first else lambda: None))
                for start in range(done, len(drawn), batch_size):
                    part = drawn[start : start + batch_size]
                    draw(part, start, num_inference_steps, drawn_as)
                    if kept is not None:
                        kept.save(calibrations, start + len(part))
                    done = start + len(part)
        except KeyboardInterrupt as stop:
            stop.add_note(f"calibration interrupted after {calibration.trajectories.calls} steps: no recipe was made, "
                          "the hooks are removed and the pipeline is as it was; " + (
                              f"{kept.path} holds {done} of {len(drawn)} prompts, the same call goes on from there" if kept else
                              "with resume='a folder' (--resume) the finished prompts would be kept"))
            raise
    seen = len(calibration.buckets.values)
    provenance: dict[str, Any] = {"prompts": len(drawn), "seed": seed, "num_inference_steps": num_inference_steps,
                                  "guidance_scale": guidance_scale, "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
                                  "pipeline": type(pipe).__name__, "front_door": "calibrate"}
    if seen < num_inference_steps:
        why = f", as a picture of strength {pipe_kwargs['strength']} starts from less noise" if "strength" in pipe_kwargs else ""
        provenance["note"] = (f"asked for {num_inference_steps} steps, the denoiser saw {seen} different timesteps{why}; "
                              "the ranges cover those only")
        log.warning("calibrate: %s", provenance["note"])
    others = {name: c.recipe(parsed, provenance) for name, c in calibrations.items() if name != first and c.ops}
    recipe = replace(calibration.recipe(parsed, provenance), parts=others)
    if parsed.min_psnr is None:
        return recipe

    def judge(which: Sequence[int], steps: int, output_type: str) -> Any:
        batches = [which[i : i + batch_size] for i in range(0, len(which), batch_size)]
        made = [draw([judging[i % len(judging)] for i in batch], len(drawn) + batch[0], steps, output_type)
                for batch in batches]
        if not hasattr(made[0], "images"):
            raise CalibrationError(f"min_psnr compares pictures, and {type(pipe).__name__} gives none: leave it out")
        made = [output.images for output in made]
        return torch.cat(made) if isinstance(made[0], torch.Tensor) else np.concatenate(made)

    with quiet(pipe), contextlib.ExitStack() as stack, _progress("trying parts in 8 bits", "part", progress) as bar:
        plain = {name: stack.enter_context(uncompiled(pipe, name)) for name in modules}
        return budget.fit(plain[first], recipe, parsed, judge, len(judging), num_inference_steps, bar,
                          {name: plain[name] for name in others})


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline without its own progress bar; as it was afterwards."""
    before = getattr(pipe, "_progress_bar_config", None)
    try:
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        yield
    finally:
        if before is None and hasattr(pipe, "_progress_bar_config"):
            del pipe._progress_bar_config
        elif before is not None:
            pipe._progress_bar_config = before


def _progress(what: str, unit: str, show: bool, total: int | None = None, done: int = 0) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not show)

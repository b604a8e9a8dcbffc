"""How any diffusers pipeline is asked for pictures: by keyword, and with what its call takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .errors import CalibrationError

PROMPT = ("prompt", "prompts")  # what pipelines call it, the usual name first
# Words in the names of arguments of which a list as long as the prompts is one for each. A list of another name, such as
# ``timesteps`` or ``sigmas``, is one value
OF_A_PROMPT = ("prompt", "image", "mask", "video", "audio")


@dataclass(frozen=True)
class Asked:
    """A pipeline with what it is given beside steps and noise.

    count: how many prompts, or runs of a pipeline that takes none; prompts: () for such a one; given: arguments of its call, of
    which those in ``each`` have an element for every prompt.
    """

    pipe: Any
    count: int
    prompts: tuple[str, ...]
    given: Mapping[str, Any]
    each: frozenset[str]

    def draw(self, which: Sequence[int], **how: Any) -> Any:
        """What the pipeline returns for the prompts of these indices, as one batch; of ``how`` it gets what it takes.

        One prompt alone comes in a list; what else it has comes without: a picture, the frames of a video.
        """
        takes, name = parameters(self.pipe), prompt_name(self.pipe)
        call = {k: v for k, v in how.items() if takes is None or k in takes}
        if self.prompts and name is not None:
            call[name] = [self.prompts[i] for i in which]
        for k, v in self.given.items():
            call[k] = v if k not in self.each else v[which[0]] if len(which) == 1 else [v[i] for i in which]
        return self.pipe(**call)


def parameters(pipe: Any) -> tuple[str, ...] | None:
    """Names that the pipeline's call takes; None where it takes any."""
    found = inspect.signature(pipe).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return None
    return tuple(p.name for p in found)


def prompt_name(pipe: Any) -> str | None:
    """What the pipeline calls its prompts; None where it takes none."""
    found = inspect.signature(pipe).parameters
    return next((n for n in PROMPT if n in found), "prompt" if parameters(pipe) is None else None)


def asked(pipe: Any, prompts: Iterable[str] | None, given: Mapping[str, Any]) -> Asked:
    """``prompts`` and the pipeline's other arguments, checked. Raises CalibrationError for what its call does not take."""
    takes, kind = parameters(pipe), type(pipe).__name__
    for name in given:
        if takes is not None and name not in takes:
            like = [t for t in takes if name in t or t in name] or get_close_matches(name, takes, n=1)
            raise CalibrationError.no_argument(kind, name, like or takes)
    # a set has no order to repeat
    if isinstance(prompts, str | bytes | Mapping | Set) or not (prompts is None or isinstance(prompts, Iterable)):
        raise CalibrationError.no_prompts(prompts)
    texts = () if prompts is None else tuple(prompts)
    if prompt_name(pipe) is None:
        if texts:
            raise CalibrationError(f"{kind} takes no prompts: pass None for them, and what it takes by name, with a list of one "
                                   f"for each run where they differ; it takes {', '.join(takes or ())}")
    elif not texts and not any(n.startswith("prompt_embeds") for n in given):
        raise CalibrationError.no_prompts(prompts)
    lists = {n: len(v) for n, v in given.items() if isinstance(v, list | tuple) and any(w in n for w in OF_A_PROMPT)}
    count = len(texts) or max(lists.values(), default=1)
    each = frozenset(n for n, length in lists.items() if length == count)
    return Asked(pipe, count, texts, dict(given), each)

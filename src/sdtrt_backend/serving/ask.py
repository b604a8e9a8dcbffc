"""What may be asked of a pipeline that is served, and what was asked: checked once, at the door, in any process."""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RequestError

MOST_SEED = 2**63 - 1  # of torch.Generator.manual_seed
MOST_GUIDANCE = 30.0
MOST_WEIGHT = 10.0  # of a LoRA, either sign


@dataclass(frozen=True)
class Facts:
    """What the pipeline is and takes.

    sizes: (width, height) in pixels; the first is the default. steps: the default, and max_steps the most. guidance: the default,
    None for the pipeline's own; guided: classifier-free guidance is on, and a scale of 1 or less would switch it off, which makes
    other shapes of the denoiser's inputs. loras: names of those that are loaded. edits: of "image" and "mask", what it takes.
    """

    model: str
    pipeline: str
    sizes: tuple[tuple[int, int], ...]
    steps: int
    max_steps: int
    max_prompt: int
    guidance: float | None
    guided: bool
    negative: bool
    loras: tuple[str, ...]
    edits: tuple[str, ...]
    batches: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Facts:
        """What ``to_json`` gave, after a way through JSON."""
        return cls(**{**body, "sizes": tuple((w, h) for w, h in body["sizes"]),
                      **{name: tuple(body[name]) for name in ("loras", "edits", "batches")}})


@dataclass(frozen=True)
class Ask:
    """One picture that is asked for. image, mask: of an edit, as bytes of a picture file; strength: 0..1, how far from it."""

    prompt: str
    negative: str | None
    width: int
    height: int
    steps: int
    guidance: float | None
    seed: int
    loras: tuple[tuple[str, float], ...] = ()
    image: bytes | None = None
    mask: bytes | None = None
    strength: float = 0.8

    @property
    def alike(self) -> Hashable:
        """What all pictures of one call of the pipeline have in common."""
        return (self.width, self.height, self.steps, self.guidance, self.negative is None, self.loras,
                self.image is None, self.mask is None, self.strength)

    def to_json(self) -> dict[str, Any]:
        """Without an edit's pictures."""
        return {"prompt": self.prompt, "negative_prompt": self.negative, "size": f"{self.width}x{self.height}",
                "steps": self.steps, "guidance": self.guidance, "seed": self.seed, "loras": dict(self.loras)}


FIELDS = ("prompt", "negative_prompt", "size", "steps", "guidance", "seed", "loras")


def checked(given: Mapping[str, Any], facts: Facts) -> Ask:
    """``given`` (``FIELDS``; None is the same as left out) as an Ask. Raises RequestError, which names the field."""
    for name in given:
        if name not in FIELDS:
            raise RequestError(name, f"unknown field {name!r}; valid: {', '.join(FIELDS)}")
    asked = {name: value for name, value in given.items() if value is not None}
    width, height = _size(asked.get("size", "auto"), facts)
    return Ask(_text("prompt", asked.get("prompt"), facts), _negative(asked.get("negative_prompt"), facts), width, height,
               _whole("steps", asked.get("steps", facts.steps), 1, facts.max_steps), _guidance(asked.get("guidance"), facts),
               _whole("seed", asked["seed"], 0, MOST_SEED) if "seed" in asked else secrets.randbelow(2**32),
               _loras(asked.get("loras", {}), facts))


def _text(name: str, value: Any, facts: Facts) -> str:
    if not isinstance(value, str):
        raise RequestError(name, f"{name} expects a text, got {_short(value)}")
    if name == "prompt" and not value.strip():
        raise RequestError(name, "prompt is empty: say what to draw")
    if len(value) > facts.max_prompt:
        raise RequestError(name, f"{name} has {len(value)} characters; at most {facts.max_prompt} are taken")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(name, f"{name} holds half of a surrogate pair, which is no text") from None
    return value


def _negative(value: Any, facts: Facts) -> str | None:
    if value is None:
        return None
    if not facts.negative:
        raise RequestError("negative_prompt", f"{facts.model} is a {facts.pipeline}, which takes no negative prompt: leave it "
                                              "out")
    return _text("negative_prompt", value, facts)


def _size(value: Any, facts: Facts) -> tuple[int, int]:
    valid = {f"{w}x{h}": (w, h) for w, h in facts.sizes}
    if value == "auto":
        return facts.sizes[0]
    if not isinstance(value, str) or value not in valid:
        raise RequestError("size", f"size expects one of {', '.join(valid)} or auto, got {_short(value)}")
    return valid[value]


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise RequestError(name, f"{name} expects an integer from {least} to {most}, got {_short(value)}")
    return int(value)


def _number(name: str, value: Any, least: float, most: float, what: str) -> float:
    if type(value) not in (int, float) or not least <= value <= most:  # not a NaN either
        raise RequestError(name, f"{name} expects {what}, got {_short(value)}")
    return float(value)


def _guidance(value: Any, facts: Facts) -> float | None:
    if value is None:
        return facts.guidance
    least = 1.0 if facts.guided else 0.0
    found = _number("guidance", value, least, MOST_GUIDANCE, f"a number from {least:g} to {MOST_GUIDANCE:g}")
    if facts.guided and found <= 1:
        raise RequestError("guidance", "guidance expects a number above 1: this server was built for classifier-free guidance, "
                                       "which 1 switches off")
    return found


def _loras(value: Any, facts: Facts) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        raise RequestError("loras", f"loras expects names and weights, such as {{\"ink\": 0.8}}, got {_short(value)}")
    for name in value:
        if name not in facts.loras:
            raise RequestError("loras", f"there is no LoRA {_short(name)}; valid: {', '.join(facts.loras) or 'none is loaded'}")
    return tuple((name, _number("loras", value[name], -MOST_WEIGHT, MOST_WEIGHT,
                                f"a weight from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g} for {name}")) for name in sorted(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

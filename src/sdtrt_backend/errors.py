"""Every error this package raises: what was wrong, what was expected, what came, what to do next."""

from __future__ import annotations

from collections.abc import Iterable


class SdtrtError(Exception):
    """Base of every error of this package."""


class OptionError(SdtrtError):
    """An option of the backend is unknown or has the wrong type or value."""

    @classmethod
    def unknown(cls, name: str, valid: Iterable[str]) -> OptionError:
        return cls(f"unknown option {name!r} for backend sd_int8; valid options: {', '.join(sorted(valid))}")

    @classmethod
    def ill_typed(cls, name: str, expected: str, actual: object) -> OptionError:
        return cls(f"option {name!r} expects {expected}, got {actual!r} ({type(actual).__name__}); change it in options={{...}}")


class RecipeError(SdtrtError):
    """A recipe cannot be used: truncated, edited, of a newer schema, or of another model."""

    @classmethod
    def unreadable(cls, path: object, why: str) -> RecipeError:
        return cls(f"recipe {path}: {why}; calibrate again and save it anew")

    @classmethod
    def newer(cls, path: object, found: object, known: int) -> RecipeError:
        return cls(f"recipe {path} has schema {found}, this version reads up to {known}; upgrade sdtrt_backend or recalibrate")

    @classmethod
    def other_model(cls, detail: str) -> RecipeError:
        return cls(f"the recipe belongs to another model: {detail}; calibrate this model, or load the one the recipe names")


class ExportError(SdtrtError):
    """A model cannot be exported, or an engine cannot be built."""

    @classmethod
    def unknown(cls, what: str, given: object, valid: Iterable[object]) -> ExportError:
        return cls(f"unknown {what} {given!r}; valid: {', '.join(map(str, valid))}")

    @classmethod
    def not_installed(cls, what: str, install: str) -> ExportError:
        return cls(f"{what} needs packages that are not installed: pip install {install}")

    @classmethod
    def sm_too_old(cls, precision: str, sm: int, least: int) -> ExportError:
        return cls(f"{precision} needs compute capability {least} or newer, got --sm {sm}: name a newer one, or use the other "
                   "precision")


class CalibrationError(SdtrtError):
    """Calibration could not produce usable statistics."""


class ModelError(SdtrtError):
    """The module or pipeline handed in cannot be used."""

    @classmethod
    def on_meta(cls, name: str) -> ModelError:
        return cls(f"the weights of {name} are on the meta device, so there is nothing to quantise; load the weights first "
                   "(from_pretrained, or module.to_empty() and load_state_dict)")

    @classmethod
    def no_denoiser(cls, what: object, names: Iterable[str]) -> ModelError:
        return cls(f"{type(what).__name__} has no denoiser: expected a pipeline with one of {', '.join(names)}, or an nn.Module")

    @classmethod
    def not_compiled(cls, what: object) -> ModelError:
        return cls(f"{type(what).__name__} was not compiled by sd_int8, or was not called yet; call "
                   "torch.compile(module, backend='sd_int8') or accelerate(pipe), draw a picture, and ask again")

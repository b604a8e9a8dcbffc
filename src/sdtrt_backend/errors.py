"""Every error this package raises: what was wrong, what was expected, what came, what to do next."""

from __future__ import annotations

from collections.abc import Container, Iterable
from difflib import get_close_matches
from importlib.util import find_spec


class SdtrtError(Exception):
    """Base of every error of this package."""


class OptionError(SdtrtError):
    """An option of the backend is unknown or has the wrong type or value."""

    @classmethod
    def unknown(cls, name: str, valid: Iterable[str]) -> OptionError:
        return cls(f"unknown option {name!r} for backend sd_int8; valid options: {', '.join(sorted(valid))}")

    @classmethod
    def not_taken(cls, name: str, value: object) -> OptionError:
        return cls(f"torch.compile(..., {name}={value!r}) means nothing to backend sd_int8 or sd_fp8: leave it out; what they "
                   "take is options={...}")

    @classmethod
    def no_part(cls, given: object, kind: str, all_of: Iterable[str], valid: Iterable[str]) -> OptionError:
        return cls(f"parts expects {' or '.join(map(repr, all_of))}, or a list of parts of this {kind}, which are "
                   f"{', '.join(filter(None, valid)) or 'none but itself'}; got {given!r}")

    @classmethod
    def no_backend(cls, given: object, valid: Iterable[str]) -> OptionError:
        return cls(f"accelerate expects backend to be one of {', '.join(valid)}, got {given!r}; for any other call torch.compile")

    @classmethod
    def ill_typed(cls, name: str, expected: str, actual: object) -> OptionError:
        return cls(f"option {name!r} expects {expected}, got {actual!r} ({type(actual).__name__}); change it in options={{...}}")

    @classmethod
    def no_mapping(cls, given: object) -> OptionError:
        return cls(f"options expects a dict of option names and values, or None, got {given!r} ({type(given).__name__}); write "
                   "options={'rule': 'max'}")

    @classmethod
    def no_tensorrt(cls) -> OptionError:
        return cls("option 'engine' is 'tensorrt', and no TensorRT is installed: pip install 'sdtrt_backend[engine]' "
                   "(TensorRT-RTX) or pip install 'sdtrt_backend[tensorrt]', or leave the option out")

    @classmethod
    def no_torchao(cls) -> OptionError:
        return cls("option 'engine' is 'torchao', and TorchAO is not installed: pip install 'sdtrt_backend[torchao]', or leave "
                   "the option out")

    @classmethod
    def counts_calls(cls, rule: str) -> OptionError:
        return cls(f"rule {rule!r} needs the number of steps, which a module that calibrates itself does not know: "
                   f"calibrate(pipe, prompts, options={{'rule': {rule!r}}}) and pass the recipe")

    @classmethod
    def needs_pictures(cls, target: float) -> OptionError:
        return cls(f"min_psnr={target:g} is solved with pictures, which a denoiser alone does not draw: "
                   f"calibrate(pipe, prompts, options={{'min_psnr': {target:g}}}) and pass the recipe")

    @classmethod
    def candidate(cls, name: str, valid: Iterable[str], elsewhere: Container[str]) -> OptionError:
        if name in elsewhere:
            return cls(f"candidate {name!r} has no kernels on this hardware; candidates here: {', '.join(sorted(valid))}")
        return cls(f"unknown candidate {name!r} for autoquant; candidates here: {', '.join(sorted(valid))}")

    @classmethod
    def example_inputs(cls, came: object) -> OptionError:
        return cls("autoquant expects example_inputs, a tuple of the module's arguments or a dict of keyword arguments, to time "
                   f"the layers on, or a plan made before; got {type(came).__name__}")


class PlanError(SdtrtError):
    """A plan of ``autoquant`` cannot be used: truncated, edited, or made elsewhere."""

    @classmethod
    def unreadable(cls, path: object, why: str) -> PlanError:
        return cls(f"plan {path}: {why}; run autoquant again and save the new plan")

    @classmethod
    def elsewhere(cls, what: str, made: object, here: object) -> PlanError:
        return cls(f"the plan was made with {what} {made}, this is {here}: its times do not hold here; run autoquant again")

    @classmethod
    def other_module(cls, name: str, expected: object, found: object) -> PlanError:
        return cls(f"the plan belongs to another module: it expects a linear of weight {expected} at {name!r}, found {found}; "
                   "run autoquant on this module")


class RecipeError(SdtrtError):
    """A recipe cannot be used: truncated, edited, of a newer schema, or of another model."""

    @classmethod
    def unreadable(cls, path: object, why: str) -> RecipeError:
        return cls(f"recipe {path}: {why}; calibrate again and save it anew")

    @classmethod
    def unwritable(cls, path: object, why: object) -> RecipeError:
        return cls(f"recipe {path} cannot be saved: expected a folder to write in, or to make ({why}); name another")

    @classmethod
    def newer(cls, path: object, found: object, known: int) -> RecipeError:
        return cls(f"recipe {path} has schema {found}, this version reads up to {known}; upgrade sdtrt_backend or recalibrate")

    @classmethod
    def other_model(cls, detail: str) -> RecipeError:
        return cls(f"the recipe belongs to another model: {detail}; calibrate this model, or load the one the recipe names")

    @classmethod
    def other_weight(cls, name: str) -> RecipeError:
        return cls.other_model(f"the weight of {name} differs from the calibrated one (fp16 and bf16 weights rounded from one "
                               "fp32 checkpoint differ too: a recipe of its fp32 weights fits both)")

    @classmethod
    def no_layer(cls, name: str, known: Iterable[str]) -> RecipeError:
        close = get_close_matches(name, list(known), 3, 0.0)
        return cls(f"the recipe has no layer {name!r}; expected the path of a calibrated layer, for example {', '.join(close)}")

    @classmethod
    def one_weight(cls, first: str, second: str, config: str) -> RecipeError:
        return cls(f"{first} and {second} have one weight and different calibrated ranges, and TorchAO hands over layers without "
                   f"their path; use quantize_(module, {config}.for_module(module, recipe), filter_fn=None), which names them")

    @classmethod
    def not_expressible(cls, name: str, what: str) -> RecipeError:
        return cls(f"a recipe cannot hold {name}: {what}; expected int8 with one calibrated range for the input and max |W| per "
                   "output channel: quantise it with mtq.INT8_DEFAULT_CFG or mtq.INT8_SMOOTHQUANT_CFG, or disable its quantizers")

    @classmethod
    def rounded(cls, name: str, dtype: object) -> RecipeError:
        return cls(f"{name} was smoothed and its weight rounded to {dtype}, so the fingerprint of the original weight cannot be "
                   "told for sure; pass original=, the module as it was before mtq.quantize, loaded afresh")


class ExportError(SdtrtError):
    """A model cannot be exported, or an engine cannot be built."""

    @classmethod
    def unknown(cls, what: str, given: object, valid: Iterable[object]) -> ExportError:
        return cls(f"unknown {what} {given!r}; valid: {', '.join(map(str, valid))}")

    @classmethod
    def not_installed(cls, what: str, install: str) -> ExportError:
        return cls(f"{what} needs packages that are not installed: pip install {install}")

    @classmethod
    def no_file(cls, module: object, step: str, error: Exception) -> ExportError:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter's own error is a page on how to report it
            cause = cause.__cause__
        why = next(iter(str(cause).splitlines()), "")
        return cls(f"there is no ONNX file of {type(module).__name__}: {step} failed with {type(cause).__name__}: {why}; compile "
                   "it instead (torch.compile or accelerate), which needs no file")

    @classmethod
    def sm_too_old(cls, precision: str, sm: int, least: int) -> ExportError:
        return cls(f"{precision} needs compute capability {least} or newer, got --sm {sm}: name a newer one, or use the other "
                   "precision")


class CalibrationError(SdtrtError):
    """Calibration could not produce usable statistics, or what it kept cannot be used."""

    @classmethod
    def no_prompts(cls, given: object) -> CalibrationError:
        return cls(f"calibrate expects a non-empty list of prompts, got {given!r}; pass for example 8 of your own")

    @classmethod
    def no_argument(cls, pipeline: str, name: str, known: Iterable[str]) -> CalibrationError:
        return cls(f"{pipeline} takes no argument {name!r}: leave it out, or did you mean {', '.join(known)}?")

    @classmethod
    def no_number(cls, name: str, expected: str, given: object) -> CalibrationError:
        return cls(f"calibrate expects {name} to be {expected}, got {given!r} ({type(given).__name__}); change or omit it")

    @classmethod
    def kept_unreadable(cls, path: object, why: str) -> CalibrationError:
        return cls(f"the calibration kept in {path} cannot be resumed: {why}; delete it to start anew, or name another "
                   "folder for resume=")

    @classmethod
    def kept_differs(cls, path: object, differences: Iterable[str]) -> CalibrationError:
        return cls(f"the calibration kept in {path} is of another call: {'; '.join(differences)}; repeat the call that it is of, "
                   "name another folder for resume=, or delete this one")


class GraphError(SdtrtError):
    """A captured graph has no identity, so nothing can be kept for it; or it is not what was given to PyTorch."""

    @classmethod
    def other_inputs(cls, found: int, given: int) -> GraphError:
        return cls(f"PyTorch compiles a graph of {found} inputs, expected the {given} that it was given; please report this, "
                   "with the model's class and PyTorch's version")

    @classmethod
    def no_identity(cls, what: str, kind: type) -> GraphError:
        return cls(f"the graph uses {what} ({kind.__name__}), which has no name or text that is the same in another process; "
                   "expected functions that can be imported, and plain values: define it at the top of a module, or register an "
                   "operator")


class ModelError(SdtrtError):
    """The module or pipeline handed in cannot be used."""

    @classmethod
    def in_pieces(cls, module: object, why: str) -> ModelError:
        return cls(f"{type(module).__name__}: {why}")

    @classmethod
    def on_meta(cls, name: str) -> ModelError:
        return cls(f"the weights of {name} are on the meta device, so there is nothing to quantise; load the weights first "
                   "(from_pretrained, or module.to_empty() and load_state_dict)")

    @classmethod
    def no_denoiser(cls, what: object, names: Iterable[str]) -> ModelError:
        return cls(f"{type(what).__name__} has no denoiser: expected a pipeline with one of {', '.join(names)}, or an nn.Module")

    @classmethod
    def no_bundled_model(cls) -> ModelError:
        return cls("the bundled model is not installed: pip install sdtrt_backend_model, or name the folder of another pipeline")

    @classmethod
    def no_diffusers(cls) -> ModelError:
        return cls("loading a pipeline needs diffusers: pip install 'sdtrt_backend[diffusers]'")

    @classmethod
    def not_compiled(cls, what: object) -> ModelError:
        return cls(f"{type(what).__name__} was not compiled by sd_int8, or was not called yet; call "
                   "torch.compile(module, backend='sd_int8') or accelerate(pipe), draw a picture, and ask again")

    @classmethod
    def not_accelerated(cls, what: object) -> ModelError:
        return cls(f"{type(what).__name__} is not accelerated, so it has no 8-bit codes that a LoRA can be written into: call "
                   "accelerate(pipe) first, or use pipe.load_lora_weights")

    @classmethod
    def not_a_layer(cls, module: object, config: str) -> ModelError:
        return cls(f"{config} takes single layers (nn.Linear, nn.Conv2d), got {type(module).__name__}, which has submodules; "
                   "choose the layers: filter_fn=lambda m, name: isinstance(m, (nn.Linear, nn.Conv2d)), or a pattern")

    @classmethod
    def no_kernel(cls, layer: str, codes: str, device: object, dtype: object) -> ModelError:
        return cls(f"{layer} with {codes} weights has no kernel for {dtype} inputs on {device}; expected any float input "
                   "on the CPU (int8 only), float16 or bfloat16 on an NVIDIA GPU; convert with .to(...)")

    @classmethod
    def no_quantizers(cls, module: object) -> ModelError:
        return cls(f"{type(module).__name__} has no nn.Linear or nn.Conv2d with an enabled modelopt quantizer; expected what "
                   "mtq.quantize(module, mtq.INT8_DEFAULT_CFG, forward_loop) or mto.restore returns")

    @classmethod
    def does_not_fit(cls, file: object, name: str, found: object) -> ModelError:
        return cls(f"{file} does not belong to this module: it differs at {name!r} (here: {found}); load it into a freshly made, "
                   "unquantised module of the model it was saved from")


class LoraError(SdtrtError):
    """A LoRA cannot be loaded or used."""

    @classmethod
    def no_peft(cls) -> LoraError:
        return cls("load_lora needs peft, which is not installed: pip install peft")

    @classmethod
    def no_loader(cls, pipeline: str) -> LoraError:
        return cls(f"{pipeline} has no load_lora_weights, so no LoRA is made for it: expected a pipeline of diffusers that has "
                   "one, or a denoiser of diffusers itself")

    @classmethod
    def unreadable(cls, error: Exception) -> LoraError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return cls(f"diffusers cannot read this LoRA for this pipeline: {type(error).__name__}: {' '.join(lines[:2])}; expected "
                   "a file, a folder or a state dict that its load_lora_weights takes")

    @classmethod
    def nothing_of(cls, pipeline: str, parts: Iterable[str]) -> LoraError:
        return cls(f"nothing in this file belongs to {', '.join(parts)} of {pipeline}: it is of another model, or no LoRA")

    @classmethod
    def no_layer(cls, path: str, module: str) -> LoraError:
        return cls(f"the LoRA changes {path}, which {module} does not have: it is of another model, or of projections that were "
                   "fused since (unfuse_qkv_projections, then load it)")

    @classmethod
    def other_shape(cls, path: str, expected: object, came: object) -> LoraError:
        return cls(f"the LoRA changes {path} by {came}, its weight is {expected}: it is of another model")

    @classmethod
    def in_no_graph(cls, path: str) -> LoraError:
        return cls(f"the LoRA changes {path}, which is in none of the blocks that were compiled, so that it would run without "
                   "it: compile the whole denoiser, as accelerate(pipe) does, or use pipe.load_lora_weights")

    @classmethod
    def other_kind(cls, kind: str, where: str) -> LoraError:
        return cls(f"{where} is of {kind}, expected up and down factors alone: use pipe.load_lora_weights, where diffusers reads "
                   "it, or merge it into the weights")

    @classmethod
    def unknown(cls, name: object, known: Iterable[str]) -> LoraError:
        loaded = ", ".join(known) or "none"
        return cls(f"no LoRA {name!r} is loaded; loaded: {loaded}; load it with sdtrt_backend.load_lora(pipe, file, {name!r})")

    @classmethod
    def no_weight(cls, name: str, given: object) -> LoraError:
        return cls(f"expected a finite number for the weight of {name!r}, got {given!r} ({type(given).__name__})")


class BundleError(SdtrtError):
    """A bundle cannot be opened or written."""

    @classmethod
    def missing(cls, path: object) -> BundleError:
        return cls(f"bundle {path} does not exist; make one with sdtrt bundle")


class RequestError(SdtrtError):
    """What is asked of a served pipeline cannot be drawn. field: the one of the request that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it goes from the process that draws to the one that answers
        return type(self), (self.field, str(self))


def require_torchao(what: str) -> None:
    """Raise ImportError with the install line where TorchAO is missing."""
    if find_spec("torchao") is None:
        raise ImportError(f"{what} needs TorchAO, which is not installed: pip install 'sdtrt_backend[torchao]'")


def require_modelopt(what: str) -> None:
    """Raise ImportError with the install line where NVIDIA's Model Optimizer is missing."""
    if find_spec("modelopt") is None:
        raise ImportError(f"{what} needs nvidia-modelopt, which is not installed: pip install 'sdtrt_backend[modelopt]'")


def require_serving(what: str) -> None:
    """Raise SdtrtError with the install line where what a server needs is missing."""
    missing = [name for name in ("ray", "httpx", "prometheus_client", "python_multipart") if find_spec(name) is None]
    if missing:
        raise SdtrtError(f"{what} needs {', '.join(missing)}, which is not installed: pip install 'sdtrt_backend[serve]'")

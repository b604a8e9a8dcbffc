"""8-bit kernels of NVIDIA GPUs: one table of providers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from .. import ops
from ..values import DTYPES

HEURISTIC = ("0", "1", "2", "3", "4")  # indices of cuDNN's own list of plans
# compute capability from which a GPU has the matrix instructions of a precision
CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class Provider:
    """One row of the table. variants: names of what is timed for a precision, in families: the first of each, then the others
    of the fastest; fallback: names of what is timed where all of them are refused.

    instead_of: a package that, where it is installed, makes timing this provider a waste: it was always faster.
    one_scale: takes a scale of one element only; narrow_bias: takes the bias in the result's dtype, not in fp32; writes_codes:
    also writes float8_e4m3fn.
    """

    name: str
    op: str
    precision: str
    module: str
    variants: Callable[[str], Sequence[tuple[str, ...]]]
    fallback: tuple[str, ...] = ()
    instead_of: str = ""
    one_scale: bool = False
    narrow_bias: bool = False
    writes_codes: bool = False


def _cudnn_variants(precision: str) -> Sequence[tuple[str, ...]]:
    from . import cudnn

    return cudnn.variants(DTYPES[precision])


def _tiles(precision: str) -> Sequence[tuple[str, ...]]:
    from . import triton_candidates

    return [(tile,) for tile in triton_candidates.TILES]


def _one(precision: str) -> Sequence[tuple[str, ...]]:
    return [("",)]


PROVIDERS = (
    Provider("cudnn", "linear8", "int8", "cudnn", _cudnn_variants, HEURISTIC, writes_codes=True),
    Provider("cudnn", "conv8", "int8", "cudnn", _cudnn_variants, HEURISTIC),
    Provider("cudnn", "conv8", "fp8", "cudnn", _cudnn_variants, HEURISTIC),
    *(Provider("triton", op, precision, "triton", _tiles, instead_of="cudnn")
      for op in ("linear8", "conv8") for precision in CAPABILITY),
    Provider("cublaslt", "linear8", "fp8", "", _one, one_scale=True, narrow_bias=True),
)


# kernel of attention over fp8 codes -> (module, package, first and last major compute capability)
ATTENTION_FP8 = {"cudnn": ("cudnn", "nvidia-cudnn-frontend", 9, 99), "fa3": ("fa3_fwd_interface", "fa3-fwd", 9, 9)}


def provider(op: str, kernel: str, precision: str) -> Provider:
    """The row that a kernel's name comes from; "reference", the plain-torch oracle, has none of its own."""
    name = kernel.partition(":")[0]
    rows = (p for p in PROVIDERS if (p.name, p.op, p.precision) == (name, op, precision))
    return next(rows, Provider(name, op, precision, "", _one, writes_codes=True))


def rows(op: str, precision: str) -> list[Provider]:
    """The rows that are timed for an operator of ``ops.KERNELS`` with what is installed here."""
    return [p for p in PROVIDERS if (p.op, p.precision) == (op, precision) and installed(p.module)
            and not (p.instead_of and installed(p.instead_of))]


@cache
def register() -> None:
    """Make the installed providers' functions known to the operators."""
    from . import cublaslt, cudnn, fa3

    if installed("triton"):
        from . import triton_candidates, triton_norm, triton_rope

        ops.KERNELS["rms_rope8", "triton"] = triton_rope.rms_rope
        ops.KERNELS["linear8", "triton"] = triton_candidates.linear
        ops.KERNELS["conv8", "triton"] = triton_candidates.conv
        ops.KERNELS["group_norm8", "triton"] = triton_candidates.group_norm
        ops.KERNELS["layer_norm8", "triton"] = triton_candidates.layer_norm
        ops.KERNELS["geglu8", "triton"] = triton_norm.geglu
        ops.KERNELS["attention8", "triton"] = triton_candidates.attention
    ops.KERNELS["linear8", "cublaslt"] = cublaslt.linear
    ops.KERNELS["linear8", "cudnn"] = cudnn.linear
    ops.KERNELS["linear_gelu8", "cudnn"] = cudnn.linear_gelu
    ops.KERNELS["conv8", "cudnn"] = cudnn.conv
    ops.KERNELS["attention_fp8", "cudnn"] = cudnn.attention_fp8
    ops.KERNELS["attention_fp8", "fa3"] = fa3.attention_fp8


def missing(precision: str, capability: tuple[int, int]) -> str | None:
    """Why no kernel of ``precision`` can run on a GPU of this compute capability, or None."""
    if capability < CAPABILITY[precision]:
        need, have = (".".join(map(str, c)) for c in (CAPABILITY[precision], capability))
        other = "sd_int8" if precision == "fp8" and capability >= CAPABILITY["int8"] else "a 16-bit torch.compile"
        return f"{precision} needs a GPU of compute capability {need} or newer, this one has {have}: use {other}"
    convolutions = [p.module for p in PROVIDERS if (p.op, p.precision) == ("conv8", precision)]
    if not any(installed(module) for module in convolutions):
        return f"no package with {precision} kernels is installed: pip install nvidia-cudnn-frontend"
    return None


def no_attention_fp8(kernel: str, capability: tuple[int, int]) -> str | None:
    """Why a kernel of ATTENTION_FP8 cannot run on a GPU of this compute capability, or None."""
    module, package, first, last = ATTENTION_FP8[kernel]
    if not installed(module):
        return f"{package} is not installed"
    if not first <= capability[0] <= last:
        return f"{package} has no fp8 attention for compute capability {capability[0]}.{capability[1]}"
    return None


@cache
def installed(module: str) -> bool:
    """Whether a provider's package can be imported; "" is PyTorch itself."""
    return not module or importlib.util.find_spec(module) is not None


def attention_variants(tokens: int, width: int) -> Sequence[str]:
    """Names of the Triton kernels to time for heads of ``width`` over ``tokens`` keys."""
    from . import triton_candidates

    return triton_candidates.attention_variants(tokens, width)

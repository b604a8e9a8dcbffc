"""What the tests of Triton kernels share: the device they run on, Triton's interpreter repaired, and poisoned memory.

The interpreter must be chosen before triton is first imported, so each file runs itself once more in a process that does.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
INT8, FP8 = torch.int8, torch.float8_e4m3fn
LIMITS = {INT8: (-128, 127), FP8: (-448, 448)}


def on_device(test):
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return test if INTERPRETED else pytest.mark.gpu(without(test))


on_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no warps, stages, graphs or approximate instructions")


def run_interpreted(file):
    run = subprocess.run([sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider"], capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@contextlib.contextmanager
def poisoned():
    """torch.empty returns NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def saturating(exact, dtype, shape=(1,)):
    """Random fp32 factors of ``shape`` that move the largest values of ``exact`` out of the range of an 8-bit dtype."""
    return ((1.2 + 0.4 * torch.rand(shape, device=DEVICE)) * LIMITS.get(dtype, (0, 1))[1] / exact.abs().max()).float()


def assert_written(y, exact, out_scale, noise):
    """``y`` is ``exact``, float64, rounded to y's dtype, 8 bits after out_scale; the kernel's own error is up to ``noise``."""
    if y.dtype in LIMITS:
        exact, noise = exact * out_scale.double(), noise * out_scale.double()
        low, high = LIMITS[y.dtype]
        assert ((exact < low) | (exact > high)).any(), "nothing saturates"
        exact = exact.clamp(low, high)
    # half of the distance between neighbours at ``exact``, and below the normal numbers
    relative, least = {INT8: (0, 0.5), FP8: (2**-4, 2**-10), torch.float16: (2**-11, 2**-25)}.get(
        y.dtype, (torch.finfo(y.dtype).eps / 2 if y.dtype.is_floating_point else 0, 0))
    excess = (y.double() - exact).abs() - (exact.abs() * relative).clamp_min(least) * 1.001 - noise
    assert (excess <= 0).all(), f"up to {float(excess.max())} more than rounding and noise"


if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        # Triton 3.6 calls int() on arrays of one element, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_rounding(data, source, target, mode):
        # Triton 3.6's own truncates to bf16, and halves what rounds up to a power of 2 in fp8
        to = {"bf16": (torch.bfloat16, torch.uint16), "fp8e4nv": (FP8, torch.uint8)}.get(target.name)
        if source.name != "fp32" or to is None:
            return convert(data, source, target, mode)
        return torch.tensor(data).to(to[0]).view(to[1]).numpy()

    dot = interpreter.InterpreterBuilder.create_dot

    def dot_in_fp32(self, a, b, *rest):
        # Triton 3.6's own multiplies the bit patterns of bf16
        wide = (self.create_fp_to_fp(x, tl.float32, None) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, *rest)

    interpreter._patch_lang_tensor, interpreter._convert_float = patch_with_index, convert_rounding
    interpreter.InterpreterBuilder.create_dot = dot_in_fp32

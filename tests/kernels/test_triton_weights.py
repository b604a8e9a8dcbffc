"""Codes of weights with LoRAs against torch's own: on the GPU, and on the CPU under Triton's interpreter."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from interpreted import DEVICE, FP8, INT8, INTERPRETED, on_device, run_interpreted

from sdtrt_backend.lower.lowered import scaled
from sdtrt_backend.merge import Factors
from sdtrt_backend.stats import over_channels, quantize_weight, rotate, shared_scale, weight_scale

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LAST = {"memory_format": torch.channels_last}
SHAPES = ((5, 7), (64, 128), (130, 208), (3, 8, 1, 1), (70, 6, 3, 3), (67, 32, 3, 3), (2, 130, 3, 1))


class Given(NamedTuple):
    """A weight and what is to be written."""

    weight: torch.Tensor
    factors: list
    codes: torch.Tensor
    scale: torch.Tensor
    smoothing: torch.Tensor
    shared: str
    rotations: tuple


def make(shape, dtype, code, ranks, last=False, codes_last=True, smoothed=True, shared=None, factor=None,
         rotations=(False, False)):
    w = torch.randn(shape, device=DEVICE).to(dtype)
    w = w.contiguous(**LAST) if last and len(shape) == 4 else w
    smoothing = torch.rand(shape[1], device=DEVICE) + 0.5 if smoothed else None
    codes = torch.full(shape, 77.0, device=DEVICE).to(code)
    codes = codes.contiguous(**LAST) if codes_last and len(shape) == 4 else codes
    if code not in (INT8, FP8):
        codes = torch.empty_like(w)
    factors = []
    for i, rank in enumerate(ranks):
        up, down = (torch.randn(s, device=DEVICE).to(factor or dtype) for s in ((shape[0], rank), (rank, *shape[1:])))
        factors.append((up, down, 0.5 - i))
    in_order = [(Factors(down, up, 1.0).beside(w), s) if factor is None else (Factors(down.flatten(1), up, 1.0), s)
                for up, down, s in factors]
    scale = None if code not in (INT8, FP8) else torch.full((shape[0] if shared is None else 1,), math.nan, device=DEVICE)
    return Given(w, in_order, codes, scale, smoothing, shared, rotations), factors


def with_loras(write, factors):
    whole = write.weight.float()
    for up, down, strength in factors:
        whole = whole + (up.float() @ down.float().flatten(1)).view(whole.shape) * strength
    whole = whole if write.smoothing is None else whole * over_channels(write.smoothing, whole)
    for rotated, dim in zip(write.rotations, (1, 0), strict=True):
        whole = rotate(whole, dim) if rotated else whole
    return whole


def check(made):
    """Codes and scales of what torch makes: the same ones without LoRAs, else but for the last bit of a sum."""
    from sdtrt_backend.kernels.triton_weights import Writes, to_write

    expected, strengths = [with_loras(*one) for one in made], [strength for g, _ in made for _, strength in g.factors]
    places = iter(range(len(strengths)))
    Writes([to_write(g.weight, g.codes, g.scale, g.smoothing, g.shared, [(f, next(places)) for f, _ in g.factors], g.rotations)
            for g, _ in made], torch.device(DEVICE))(strengths)
    for (write, factors), whole in zip(made, expected, strict=True):
        if write.scale is None:
            torch.testing.assert_close(write.codes, whole.to(write.codes.dtype), atol=1e-5, rtol=2e-3 if factors else 0)
            continue
        if write.shared is None:
            scale = weight_scale(whole, write.codes.dtype)
        else:
            scale = shared_scale(torch.stack([w.abs().max() for (other, _), w in zip(made, expected, strict=True)
                                              if other.shared == write.shared]).max().view(1))
        rows = scale.view(-1, *[1] * (whole.dim() - 1))
        codes = quantize_weight(whole, scale.expand(len(whole))) if write.codes.dtype is INT8 else (
            (whole / rows).clamp(-448, 448).to(FP8))
        in_scale = [other for other in made if other[0].shared == write.shared] if write.shared else [(write, factors)]
        if not any(f or any(other.rotations) for other, f in in_scale):
            assert torch.equal(write.scale, scale)
            assert torch.equal(write.codes.float(), codes.float())
            continue
        torch.testing.assert_close(write.scale, scale, rtol=1e-5, atol=0)
        step = 1 if codes.dtype is INT8 else codes.float().abs().clamp_min(2**-6) / 8
        steps = (write.codes.float() - codes.float()).abs() / step
        assert steps.max() <= 1
        assert (steps > 0).float().mean() < 2e-3


if not INTERPRETED:
    @pytest.mark.slow
    def test_this_file_passes_under_the_interpreter():
        run_interpreted(__file__)


@on_device
@pytest.mark.parametrize("code", [INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32], ids=str)
def test_many_weights_at_once(dtype, code):
    check([make(shape, dtype, code, ranks, last=bool(i % 2), codes_last=i % 3 != 0, smoothed=i % 4 != 0)
           for i, (shape, ranks) in enumerate(itertools.product(SHAPES, ((), (4,), (16,), (33, 8), (48, 16, 32))))])


@on_device
def test_rows_of_several_fp8_weights_share_a_scale():
    check([make(shape, BF16, FP8, ranks, shared=name) for shape, ranks, name in
           (((5, 24), (4,), "a"), ((70, 24), (), "a"), ((6, 40), (), "b"), ((8, 40), (), "b"))]
          + [make((6, 4, 3, 3), BF16, FP8, (2,))])


@on_device
@pytest.mark.parametrize("code", [INT8, FP8], ids=str)
def test_rotated_weights(code):
    """Of its input, of its output, of both; beside others in one launch, in one scale too."""
    check([make(shape, HALF, code, ranks, rotations=rotations) for shape, rotations in (
        ((72, 192), (True, False)), ((128, 72), (False, True)), ((192, 64), (True, True)), ((64, 64), (False, False)))
        for ranks in ((), (4,), (33, 16))]
        + [make((n, 64), HALF, FP8, (8,), shared="qkv", rotations=(False, n == 64)) for n in (64, 128) if code is FP8])


@on_device
@pytest.mark.parametrize("last", [False, True])
def test_weights_that_stay_in_16_bits(last):
    check([make(shape, HALF, HALF, ranks, last=last, smoothed=False) for shape in SHAPES for ranks in ((), (4,))])


@on_device
def test_factors_in_fp32_of_weights_in_16_bits():
    check([make((40, 56), HALF, INT8, (4, 3), factor=FP32), make((40, 56), HALF, INT8, ())])


@on_device
def test_a_row_of_zeros_has_codes_of_zero():
    write, factors = make((4, 16), HALF, INT8, ())
    write.weight[2] = 0
    check([(write, factors)])
    assert not write.codes[2].any()


@on_device
def test_what_was_put_together_takes_other_strengths():
    from sdtrt_backend.kernels.triton_weights import Writes, to_write

    given, factors = make((24, 32), BF16, INT8, (4, 16))
    writes = Writes([to_write(given.weight, given.codes, given.scale, given.smoothing, None, [(given.factors[0][0], 0),
                                                                                             (given.factors[1][0], 1)])],
                    torch.device(DEVICE))
    for strengths in ((1.0, 0.0), (0.0, -2.0), (0.5, 0.25)):
        writes(strengths)
        whole = with_loras(given, [(up, down, s) for (up, down, _), s in zip(factors, strengths, strict=True)])
        torch.testing.assert_close(given.codes * given.scale[:, None], whole, rtol=0, atol=float(given.scale.max()) * 0.51)


@on_device
def test_products():
    from sdtrt_backend.kernels.triton_weights import Products

    parts = [[(torch.rand(1, device=DEVICE), 1030, 0.1), (torch.rand(5, device=DEVICE), 5, 0.2)],
             [(torch.rand(2000, device=DEVICE), 2000, 1.1)], [(torch.rand(1, device=DEVICE), 1, 2.1)]]
    targets = [torch.full((sum(rows for _, rows, _ in some) + 1,), math.nan, device=DEVICE) for some in parts]
    Products(list(zip(targets, parts, strict=True)))()
    for target, some in zip(targets, parts, strict=True):
        assert torch.equal(target[:-1], scaled(some))
        assert target[-1].isnan()


@on_device
def test_other_layouts_are_not_taken():
    from sdtrt_backend.kernels.triton_weights import to_write

    w, codes = torch.zeros(8, 16, device=DEVICE), torch.zeros(8, 16, dtype=INT8, device=DEVICE)
    assert to_write(w.double(), codes) is None
    assert to_write(w.t().contiguous().t(), codes) is None
    assert to_write(w, codes[:, ::2]) is None
    assert to_write(w[0], codes) is None
    other = Factors(torch.zeros(1, 16), torch.zeros(8, 1), 1.0, last=True)
    assert to_write(w, codes, factors=[(other, 0)]) is None, "in another order than the weight"
    assert to_write(w, codes) is not None

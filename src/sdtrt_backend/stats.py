"""Statistics of tensors and the formulas of quantisation: pure functions in the papers' symbols, fp32 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from .values import FP8_MAX, INT8_MAX, Decision

# Histogram of |x|: 8 bins per octave from 2^-16 to 2^12; the first and last bin take what lies outside.
OCTAVES = (-16, 12)
BINS_PER_OCTAVE = 8
BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
HISTOGRAM_SAMPLE = 4096  # elements looked at per call: a full log2 would triple the cost of calibration
ROTATED = 64  # channels that are rotated together: a power of 4, and of most models the width of a head, or half of it
TRIED_REACHES = 41  # of a smoothed weight, from the least one to a hundred times that, see ``fitted_smoothing``
HEADROOM = 1.15  # of ranges, for prompts that calibrated nothing
SHRINKAGE = 0.25  # of the ranges of a tensor's channels towards its largest
ROW_PEAK = 1.6  # the largest of a row of a smoothed weight, to what its channels have on average
TINY_AMAX = 2.0**-24  # below this a tensor is all zeros for int8


def log_histogram(x: torch.Tensor) -> torch.Tensor:
    """Counts [BINS] int64 of |x| in log-spaced bins, from every ``sample_step``-th element of ``x`` in row-major order."""
    sample = x.detach().reshape(-1)[:: sample_step(x.shape)].float().abs()
    octave = sample.clamp(2.0 ** OCTAVES[0], 2.0 ** OCTAVES[1]).log2()
    index = ((octave - OCTAVES[0]) * BINS_PER_OCTAVE).long().clamp(0, BINS - 1)
    return torch.bincount(index.cpu(), minlength=BINS)


def sample_step(shape: Sequence[int]) -> int:
    """Elements from one sampled element to the next: about HISTOGRAM_SAMPLE are sampled, or one of each channel of the last axis.

    The step shares no divisor with the number of elements, hence none with the length of a row. A multiple of that length
    would look at one channel of [tokens, channels], or at one column of a picture.
    """
    elements = math.prod(shape)
    step = max(1, elements // max((HISTOGRAM_SAMPLE, *shape[-1:])))
    while math.gcd(step, elements) > 1:
        step -= 1
    return step


def value_quantile(histogram: torch.Tensor, share: float) -> float:
    """|x| that ``share`` of the values do not exceed: the upper end of its bin. histogram: counts [BINS]."""
    below = histogram.double().cumsum(0)
    return _upper_ends()[int((below < share * below[-1]).sum())].item()


def mse_clip(histogram: torch.Tensor) -> float:
    """The clipping value of least mean squared int8 error: c^2 / (12 * 127^2) for values inside, (|x| - c)^2 for those beyond
    (Banner et al. 2019, eq. 4 for a measured distribution). histogram: counts [BINS]; values count as the middle of their bin."""
    ends, counts = _upper_ends(), histogram.double()
    middles = ends * 2 ** (-0.5 / BINS_PER_OCTAVE)
    beyond = (middles[None] - ends[:, None]).clamp_min(0).square()  # [clip, bin]
    inside = (middles[None] <= ends[:, None]) * (ends[:, None] / INT8_MAX).square() / 12
    return ends[int(((beyond + inside) * counts).sum(1).argmin())].item()


def _upper_ends() -> torch.Tensor:
    """|x| at the end of each bin, fp64 [BINS]."""
    return torch.pow(2.0, OCTAVES[0] + torch.arange(1, BINS + 1, dtype=torch.float64) / BINS_PER_OCTAVE)


def channel_power(x: torch.Tensor, channel_axis: int) -> torch.Tensor:
    """Mean of x^2 of every channel, fp32 [channels] on the CPU."""
    dims = [d for d in range(x.dim()) if d != channel_axis % x.dim()]
    return x.detach().float().square().mean(dims).cpu()


def channel_range(x: torch.Tensor, channel_axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(min x, max x) of every channel, fp32 [channels] on the CPU; of no elements (inf, -inf), which change no other range."""
    dims = [d for d in range(x.dim()) if d != channel_axis % x.dim()]
    x = x.detach()
    if not x.numel():
        low = torch.full((x.shape[channel_axis],), math.inf)
        return low, -low
    low, high = (x.amin(dims), x.amax(dims)) if dims else (x, x)  # aminmax takes one dimension: a copy, 14x slower
    return low.float().cpu(), high.float().cpu()


def weight_scale(weight: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Per output channel, fp32 [out]: see ``row_scale``."""
    return row_scale(weight.detach().float().flatten(1).abs().amax(1), dtype)


def int8_scale(decision: Decision, weight: torch.Tensor) -> torch.Tensor:
    """Of a layer's (smoothed) weight, per output channel, fp32 [out]: by the range that the decision names, if any."""
    return weight_scale(weight) if decision.weight_amax is None else row_scale(decision.weight_amax.to(weight.device))


def row_scale(amax: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """max |W| of channels / 127, or 448 for float8_e4m3fn, fp32; of an all-zero channel as if that were 127: its codes are zero
    anyway."""
    scale = torch.where(amax > TINY_AMAX, amax / INT8_MAX, torch.ones_like(amax))
    return scale if dtype is torch.int8 else scale * (INT8_MAX / FP8_MAX)


def shared_scale(amax: torch.Tensor) -> torch.Tensor:
    """The one scale of weights in float8_e4m3fn with this largest |W|, fp32."""
    return amax.clamp_min(TINY_AMAX) / FP8_MAX


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(W / s) in [-128, 127], int8, same shape; ``scale`` is per output channel (axis 0). -128 is reached where that is less
    than max |W| / 127 only."""
    s = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight.detach().float() / s).round().clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8)


def fake_quantize(x: torch.Tensor, scale: float, zero_point: int = 0, largest: int = INT8_MAX) -> torch.Tensor:
    """Per-tensor int8 and back, fp32: x_hat = s * (clamp(round(x / s) + z, -128, 127) - z). largest: 32767 for int16."""
    return ((x.float() / scale).round() + zero_point).clamp(-largest - 1, largest).sub(zero_point) * scale


def fake_quantize_fp8(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """To float8_e4m3fn and back, fp32: s * fp8(clamp(x / s, -448, 448))."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def over_channels(s: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A factor per input channel [in], shaped to be multiplied with the weight and with the input: [in] or [in, 1, 1]."""
    return s.view(-1, *[1] * (weight.dim() - 2))


def channels_last(weight: torch.Tensor) -> bool:
    """Whether its memory is in the order of channels last, and in no other: that of [out, in, 1, 1] is in both."""
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


@cache
def _hadamard(device: torch.device) -> torch.Tensor:
    """The regular Hadamard matrix of ROTATED channels, its own inverse, fp32: a row of another sign than its neighbours in every
    four keeps a common mean from gathering in one channel."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    h = torch.ones(1, 1)
    while len(h) < ROTATED:
        h = torch.kron(h, four / 2)
    return h.to(device)


def rotate(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Every ROTATED neighbours along ``dim``, whose length is a multiple of that, times an orthogonal matrix that is its own
    inverse: outliers of one channel become a little of each (QuaRot, Ashkboos et al. 2024). fp32, of the same shape."""
    moved = x.float().movedim(dim, -1)
    turned: torch.Tensor = moved.unflatten(-1, (-1, ROTATED)) @ _hadamard(x.device)
    return turned.flatten(-2).movedim(-1, dim)


def smoothing_factor(act_amax: torch.Tensor, weight_amax: torch.Tensor, alpha: float) -> torch.Tensor:
    """SmoothQuant (Xiao et al. 2022, eq. 4): s_j = max|X_j|^alpha / max|W_j|^(1-alpha), input divided by s_j.

    act_amax, weight_amax: [in], fp32. Channels that are zero in either keep s_j = 1. Returns fp32 [in].
    """
    s = act_amax.clamp_min(TINY_AMAX).pow(alpha) / weight_amax.clamp_min(TINY_AMAX).pow(1 - alpha)
    live = (act_amax > TINY_AMAX) & (weight_amax > TINY_AMAX)
    return torch.where(live, s.clamp(1e-4, 1e4), torch.ones_like(s))


@dataclass(frozen=True)
class WeightStats:
    """What fits the smoothing of an input to a weight [out, in, ...]: per input channel its largest |W|, its energy (the sum of
    W^2) and its peak (the root mean square, over the rows, of a row's largest |W|), fp32 [in]; products: of one input channel."""

    amax: torch.Tensor
    energy: torch.Tensor
    peak: torch.Tensor
    products: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> WeightStats:
        w = weight.detach().float().flatten(2) if weight.dim() > 2 else weight.detach().float().unsqueeze(-1)
        row_amax = w.abs().amax(2)
        return cls(row_amax.amax(0).cpu(), w.square().sum((0, 2)).cpu(), row_amax.square().mean(0).sqrt().cpu(),
                   w.shape[0] * w.shape[2])


def expected_amax(seen: torch.Tensor) -> torch.Tensor:
    """How far channels are expected to reach on prompts that calibrated nothing, by how far they were seen to, both [channels]:
    further, and most where a channel was seldom awake."""
    return HEADROOM * seen ** (1 - SHRINKAGE) * seen.max() ** SHRINKAGE


def range_span(amax: torch.Tensor, ends: Sequence[torch.Tensor]) -> float:
    """Of ranges that reach -ends[0] and ends[1], in units of ``amax``, all [channels]: 1 where all begin at zero, 2 at most."""
    return sum(float((end / amax.clamp_min(TINY_AMAX)).max().clamp(0, 1)) for end in ends)


def fitted_smoothing(act_amax: torch.Tensor, act_power: torch.Tensor, weights: Sequence[WeightStats],
                     span: float) -> torch.Tensor:
    """The factors s, fp32 [in], that leave the least noise of rounding x / s and W * s to 8 bits in W x.

    A step of the input's codes is D = span / 255 for every s_j >= a_j, and the noise D^2 / 12 * sum_j s_j^2 E_j; that of the
    weight's codes (P / 127)^2 / 12 * n * sum_j m_j / s_j^2 for every s_j <= P / p_j, where a is ``act_amax``, m ``act_power``
    (the mean of x^2), E, p and n energy, peak and products of the weights, and P the largest of a row of the smoothed weight.
    Within these bounds the sum is least at s_j^4 = (P / 127)^2 n m_j / (D^2 E_j). P is tried from the least that leaves room.

    span: of the range to the larger of its ends, 1 of one that begins at zero and 2 of a symmetric one. Channels that are zero
    get the largest factor that costs the weights nothing.
    """
    live, amax, power = act_amax > TINY_AMAX, act_amax.clamp_min(TINY_AMAX), act_power.clamp_min(TINY_AMAX**2)
    energy = (torch.stack([w.energy for w in weights]).sum(0) * live).clamp_min(TINY_AMAX**2)
    peak = ROW_PEAK * torch.stack([w.peak for w in weights]).amax(0).clamp_min(TINY_AMAX)
    step, products = span / (2 * INT8_MAX + 1), sum(w.products for w in weights)
    reach = (amax * peak).max() * torch.logspace(0, 2, TRIED_REACHES).unsqueeze(-1)
    row_step = reach / INT8_MAX
    s = (row_step.square() * products * power / (step**2 * energy)).pow(0.25)
    s = torch.where(live, s, torch.inf).clamp_min(amax).minimum(reach / peak)
    noise = step**2 * (s.square() * energy).sum(1) + row_step.square().squeeze(1) * products * (power / s.square()).sum(1)
    return s[noise.argmin()].clamp(1e-4, 1e4)


def fake_quantize_input(decision: Decision, x: torch.Tensor) -> torch.Tensor:
    """A layer's input, smoothed, in 8 bits and back, fp32; of a rotated one rotated back."""
    if decision.rotated:
        return rotate(fake_quantize_input(replace(decision, rotated=False), rotate(x)))
    if decision.smoothing is not None:
        x = x / over_channels(decision.smoothing.to(x.device), decision.layer.weight)
    if decision.precision == "fp8":
        return fake_quantize_fp8(x, decision.amax / FP8_MAX)
    return fake_quantize(x, *decision.int8_range, decision.largest_code)


def rotated_weight(decision: Decision, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight [out, in], its input and its output rotated where the decision says so."""
    for turned, dim in ((decision.rotated, 1), (decision.turned, 0)):
        if turned:
            weight = rotate(weight, dim)
    return weight


def fake_quantize_weight(decision: Decision, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight, times its smoothing factor, in 8 bits and back, fp32; of a rotated one rotated back."""
    if decision.rotated or decision.turned:
        plain = replace(decision, rotated=False, turned=False)
        return rotated_weight(decision, fake_quantize_weight(plain, rotated_weight(decision, weight.detach())))
    w = weight.detach().float()
    if decision.smoothing is not None:
        w = w * over_channels(decision.smoothing.to(w.device), w)
    s = int8_scale(decision, w) if decision.precision == "int8" else weight_scale(w, torch.float8_e4m3fn)
    column = s.view(-1, *[1] * (w.dim() - 1))
    return fake_quantize_fp8(w, column) if decision.precision == "fp8" else quantize_weight(w, s).float() * column


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """||y - ref|| / ||ref|| in fp32."""
    reference = reference.detach().float()
    return float((y.detach().float() - reference).norm() / reference.norm().clamp_min(1e-30))


def sqnr_db(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal to quantisation noise, dB: -20 log10 of the relative error."""
    return -20 * math.log10(max(relative_error(y, reference), 1e-12))

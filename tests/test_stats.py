"""Laws of the arithmetic."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrt_backend import stats
from sdtrt_backend.values import INT8_MAX, Decision, Layer


@pytest.fixture
def noise():
    return torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))


def test_quantisation_inside_the_range_is_off_by_half_a_step_at_most(noise):
    amax = float(noise.abs().max())
    error = (stats.fake_quantize(noise, amax / INT8_MAX) - noise).abs().max()
    assert error <= amax / INT8_MAX / 2 * (1 + 1e-5)
    assert error > 0


def test_what_lies_outside_the_range_is_clipped(noise):
    clipped = stats.fake_quantize(noise, 0.5 / INT8_MAX)
    assert clipped.max() == pytest.approx(0.5)
    assert clipped.min() >= -0.5 * 128 / 127 - 1e-6


def test_a_zero_point_spends_every_code_on_a_one_sided_range_and_keeps_zero_exact(noise):
    x = torch.nn.functional.silu(noise)
    low, high = float(x.min()), float(x.max())
    decision = Decision(Layer("", "conv2d", "", "", noise), "int8", "", high, low=low, high=high)
    one_sided, symmetric = (stats.fake_quantize(x, *d.int8_range) for d in (decision, replace(decision, low=None)))
    assert stats.fake_quantize(torch.zeros(1), *decision.int8_range) == 0
    assert stats.sqnr_db(one_sided, x) > stats.sqnr_db(symmetric, x) + 4
    assert replace(decision, low=None).int8_range == (high / INT8_MAX, 0)


def test_weight_codes_fill_the_range_of_every_channel_and_zero_channels_are_safe():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    scale = stats.weight_scale(weight)
    codes = stats.quantize_weight(weight, scale)
    assert codes.dtype is torch.int8
    assert codes.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127, 127]
    assert torch.all((codes * scale[:, None] - weight).abs() <= scale[:, None] / 2 * (1 + 1e-5))


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_smoothing_leaves_the_product_as_it_was(noise, alpha):
    x, w = noise[0].T, torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    s = stats.smoothing_factor(x.abs().amax(0), w.abs().amax(0), alpha)
    torch.testing.assert_close((x / s) @ (w * s).T, x @ w.T, rtol=1e-4, atol=1e-4)


def test_smoothing_at_one_gives_every_channel_of_the_input_the_same_range(noise):
    x = noise[0].T * torch.logspace(-2, 2, 64)
    s = stats.smoothing_factor(x.abs().amax(0), torch.ones(64), 1.0)
    torch.testing.assert_close((x / s).abs().amax(0), torch.ones(64))


def test_channels_that_are_zero_are_not_smoothed():
    s = stats.smoothing_factor(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), 0.5)
    assert s.tolist() == [1.0, 1.0, 1.0]


def rounding_noise(x, w, s):
    """Relative error of a product whose input, over s, and weight, times s, are in int8."""
    amax = float((stats.expected_amax(x.abs().amax(0)) / s).max())
    codes = stats.fake_quantize(x / s, amax / INT8_MAX)
    weight = w * s
    rounded = stats.quantize_weight(weight, stats.weight_scale(weight)).float() * stats.weight_scale(weight)[:, None]
    return stats.relative_error(codes @ rounded.T, x @ w.T)


@pytest.fixture
def uneven():
    """(x [rows, in], W [out, in]): channels of ranges that lie two decades apart, a tail in some, weights that lie one apart."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4096, 64, generator=generator) * torch.logspace(-1, 1, 64)
    x[:, ::5] = x[:, ::5] ** 3 / x[:, ::5].abs().amax(0) ** 2
    order = torch.randperm(64, generator=generator)
    return x, torch.randn(96, 64, generator=generator) * torch.logspace(0, 1, 64)[order]


def fitted(x, w, span=2.0):
    return stats.fitted_smoothing(stats.expected_amax(x.abs().amax(0)), x.square().mean(0), [stats.WeightStats.of(w)], span)


def test_fitted_factors_leave_less_noise_than_any_strength_of_smoothing(uneven):
    x, w = uneven
    s = fitted(x, w)
    torch.testing.assert_close((x / s) @ (w * s).T, x @ w.T, rtol=1e-4, atol=1e-3)
    others = [stats.smoothing_factor(x.abs().amax(0), w.abs().amax(0), alpha) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert rounding_noise(x, w, s) < 0.95 * min(rounding_noise(x, w, other) for other in (*others, torch.ones(64)))


def test_fitted_factors_of_a_convolution_are_those_of_the_same_taps_beside_each_other(uneven):
    _, w = uneven
    taps = torch.stack([w, 0.1 * w], -1).unsqueeze(-1)
    found, expected = stats.WeightStats.of(taps), stats.WeightStats.of(w)
    torch.testing.assert_close(found.energy, 1.01 * expected.energy)
    assert torch.equal(found.peak, expected.peak)
    assert torch.equal(found.amax, expected.amax)
    assert found.products == 2 * expected.products == 2 * 96


def test_channels_that_are_zero_cost_the_fitted_ones_nothing(uneven):
    x, w = (t.clone() for t in uneven)
    without = fitted(x[:, 2:], w[:, 2:])
    x[:, 0] = 0
    w[:, 1] = 0
    s = fitted(x, w)
    assert bool(s.isfinite().all())
    assert float(s.min()) > 0
    assert rounding_noise(x, w, s) <= 1.05 * rounding_noise(x[:, 2:], w[:, 2:], without)
    assert bool(fitted(torch.zeros(8, 64), w).isfinite().all())


@pytest.mark.parametrize("axis", [1, -1])
def test_channel_power_is_the_mean_square_of_each_channel(noise, axis):
    dims = [d for d in range(3) if d != axis % 3]
    torch.testing.assert_close(stats.channel_power(noise, axis), noise.square().mean(dims))


@pytest.mark.parametrize("axis", [1, -1])
def test_channel_range_is_the_smallest_and_the_largest_value_of_each_channel(noise, axis):
    dims = [d for d in range(3) if d != axis % 3]
    assert all(map(torch.equal, stats.channel_range(noise, axis), (noise.amin(dims), noise.amax(dims))))


def test_a_histogram_counts_every_sampled_element_in_the_bin_of_its_octave():
    counts = stats.log_histogram(torch.tensor([0.0, 1.0, 1.01, -2.0, 1e9]))
    assert int(counts.sum()) == 5
    assert counts[0] == 1
    assert counts[-stats.OCTAVES[0] * stats.BINS_PER_OCTAVE] == 2
    assert counts[(1 - stats.OCTAVES[0]) * stats.BINS_PER_OCTAVE] == 1
    assert counts[-1] == 1


def test_sqnr_is_the_relative_error_in_decibels(noise):
    assert stats.relative_error(1.01 * noise, noise) == pytest.approx(0.01, rel=1e-3)
    assert stats.sqnr_db(1.01 * noise, noise) == pytest.approx(40.0, abs=1e-2)


REAL = [(2, 4096, 320), (2, 4096, 640), (2, 4096, 2560), (2, 1024, 1280), (2, 1024, 5120), (1, 4608, 3072), (1, 4608, 15360),
        (2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32), (2, 128, 32, 32)]


def sampled(shape):
    """Coordinates of the elements that a histogram of that shape looks at: a row per axis."""
    return torch.unravel_index(torch.arange(math.prod(shape))[:: stats.sample_step(shape)], shape)


@pytest.mark.parametrize("shape", REAL)
def test_every_channel_row_and_column_is_sampled_about_alike(shape):
    """The last axis of [tokens, channels] are channels; pictures have channels, rows and columns."""
    batch, *axes = sampled(shape)
    assert len(batch.unique()) == shape[0]
    for at, size in list(zip(axes, shape[1:], strict=True))[-1 if len(shape) == 3 else 0 :]:
        counts = torch.bincount(at, minlength=size)
        assert counts.min() >= 1
        assert counts.max() <= 2 * len(at) / size + 2
    assert len(axes[0].unique()) >= min(shape[1], stats.HISTOGRAM_SAMPLE) // 2  # a half of the tokens at least, spread over all
    assert axes[0].max() - axes[0].min() >= 0.99 * shape[1] - 1


@pytest.mark.parametrize("shape", [(2, 4096, 640), (2, 64, 128, 128)])
@pytest.mark.parametrize("axis", [1, -1])
def test_values_of_one_channel_or_column_have_their_share_in_the_histogram(shape, axis):
    x, where = torch.ones(shape), [slice(None)] * len(shape)
    where[axis] = slice(0, shape[axis] // 4)
    x[tuple(where)] = 64.0
    assert float(stats.log_histogram(x)[(6 - stats.OCTAVES[0]) * stats.BINS_PER_OCTAVE]) / int(
        stats.log_histogram(x).sum()) == pytest.approx(0.25, abs=0.02)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_a_histogram_samples_enough_and_not_much_more(shape):
    elements, wanted = math.prod(shape), max(stats.HISTOGRAM_SAMPLE, shape[-1])
    step = stats.sample_step(shape)
    assert math.gcd(step, elements) == 1
    assert min(elements, wanted) <= len(range(0, elements, step)) <= 20 * wanted
    assert len({i * step % shape[-1] for i in range(shape[-1])}) == shape[-1]  # every channel of as many samples


@pytest.mark.parametrize("shape", [(4096 * 16,), (1,), (3, 5), (0,), (2, 0, 64), ()])
def test_a_histogram_is_the_same_each_time_and_counts_its_sample(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    counts = stats.log_histogram(x)
    assert counts.shape == (stats.BINS,)
    assert torch.equal(counts, stats.log_histogram(x.clone()))
    assert int(counts.sum()) == len(range(0, x.numel(), stats.sample_step(shape)))


@pytest.mark.parametrize(("shape", "axis", "channels"), [((2, 0, 64), -1, 64), ((0, 3, 8, 8), 1, 3), ((0,), -1, 0)])
def test_the_range_of_no_elements_is_empty(shape, axis, channels):
    low, high = stats.channel_range(torch.empty(shape, dtype=torch.float16), axis)
    assert (low.tolist(), high.tolist()) == ([math.inf] * channels, [-math.inf] * channels)
    assert low.dtype is high.dtype is torch.float32


def test_a_value_quantile_is_the_end_of_the_bin_that_holds_it():
    x = torch.linspace(0, 1, 4001)
    for share in (0.25, 0.5, 0.99, 1.0):
        assert share <= stats.value_quantile(stats.log_histogram(x), share) <= share * 2 ** (1 / stats.BINS_PER_OCTAVE) * 1.001


@pytest.mark.parametrize("tail", [0.0, 8.0])
def test_the_mse_clip_is_near_the_best_of_a_fine_search(tail):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x[:2] += tail
    def error(clip):
        return float((stats.fake_quantize(x.clamp(-clip, clip), clip / INT8_MAX) - x).square().mean())

    best = min(error(c) for c in torch.linspace(0.5, 12, 400).tolist())
    assert error(stats.mse_clip(stats.log_histogram(x))) <= 1.15 * best

"""Laws of the picture metrics."""

import numpy as np
import pytest
import torch

from sdtrt_backend.metrics import BEST_PSNR, feature_distance, mean_interval, psnr, ssim


@pytest.fixture
def pictures():
    return np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32)


def test_equal_pictures_are_perfect(pictures):
    assert psnr(pictures, pictures) == [BEST_PSNR] * 2
    assert ssim(pictures, pictures) == pytest.approx([1.0] * 2)


def test_psnr_is_minus_ten_log_of_the_squared_error(pictures):
    assert psnr(pictures + np.float32(0.1), pictures) == pytest.approx([20.0] * 2, abs=1e-3)


def test_both_fall_with_more_noise(pictures):
    noise = np.random.default_rng(1).normal(size=pictures.shape).astype(np.float32)
    for metric in (psnr, ssim):
        little, much = (np.mean(metric(pictures + s * noise, pictures)) for s in (0.05, 0.2))
        assert little > much


def test_ssim_ignores_neither_contrast_nor_structure(pictures):
    assert max(ssim(0.5 * pictures, pictures)) < 0.9
    assert max(ssim(pictures[:, ::-1].copy(), pictures)) < 0.5


@pytest.fixture
def stages():
    torch.manual_seed(0)
    return [torch.randn(2, 8, 6, 6), torch.randn(2, 16, 3, 3)]


def test_features_of_equal_direction_have_no_distance(stages):
    assert feature_distance(stages, stages) == [0.0] * 2
    assert feature_distance([3 * s for s in stages], stages) == pytest.approx([0.0] * 2, abs=1e-6)


def test_opposite_features_have_the_largest_distance(stages):
    assert feature_distance([-s for s in stages], stages) == pytest.approx([4.0] * 2)


def test_feature_distance_of_a_picture_does_not_depend_on_the_others(stages):
    other = [s + torch.arange(1.0, 3)[:, None, None, None] for s in stages]
    both = feature_distance(other, stages)
    assert [feature_distance([s[i : i + 1] for s in other], [s[i : i + 1] for s in stages])[0] for i in range(2)] == both
    assert both[1] > both[0] > 0


def test_stages_count_alike(stages):
    first, second = (feature_distance([-s if i == j else s for j, s in enumerate(stages)], stages) for i in range(2))
    assert first == pytest.approx([2.0] * 2)
    assert second == pytest.approx([2.0] * 2)


def test_interval_of_the_mean_is_close_to_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, 400)
    half = 1.96 * values.std() / 20
    assert mean_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert mean_interval(values) == mean_interval(values)


def test_interval_of_equal_values_is_a_point():
    assert mean_interval([3.0] * 5) == (3.0, 3.0)


def test_a_picture_that_is_not_finite_has_no_psnr():
    pictures = np.zeros((3, 4, 4, 3), np.float32)
    pictures[1, 0, 0, 0], pictures[2, 0, 0, 0] = np.nan, np.inf
    first, *others = psnr(pictures, np.zeros_like(pictures))
    assert first == BEST_PSNR
    assert all(np.isnan(p) for p in others)

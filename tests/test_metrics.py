"""Laws of the picture metrics."""

import numpy as np
import pytest

from sdtrt_backend.metrics import BEST_PSNR, psnr, ssim


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

"""How alike two sets of pictures are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Pictures = NDArray[np.float32]  # [N, height, width, 3] in 0..1
BEST_PSNR = 100.0  # dB, reported for equal pictures, whose PSNR is infinite


def psnr(pictures: Pictures, reference: Pictures) -> list[float]:
    """Peak signal to noise ratio of each picture, dB, peak 1; NaN where either is not finite."""
    errors = ((pictures.astype(np.float64) - reference) ** 2).reshape(len(pictures), -1).mean(1)
    return [math.nan if not math.isfinite(e) else -10 * math.log10(max(e, 10 ** (-BEST_PSNR / 10))) for e in errors]


def ssim(pictures: Pictures, reference: Pictures) -> list[float]:
    """Structural similarity of each picture (Wang et al. 2004): Gaussian window 11x11, sigma 1.5, mean over colours."""
    x, y = (torch.from_numpy(np.ascontiguousarray(p)).permute(0, 3, 1, 2).double() for p in (pictures, reference))
    taps = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    window = torch.outer(taps, taps) / taps.sum() ** 2

    def mean(t: torch.Tensor) -> torch.Tensor:
        return F.conv2d(t, window.expand(t.shape[1], 1, 11, 11), groups=t.shape[1])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return [float(s) for s in score.flatten(1).mean(1)]


def feature_distance(features: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[float]:
    """Perceptual distance of each picture (the unweighted form of LPIPS: Zhang et al. 2018, eq. 1 with w = 1).

    features, reference: activations of a network at several stages, [N, channels, height, width] each, the same shapes on both
    sides. Every position's channels are scaled to unit length; squared differences are summed over channels and averaged over
    positions and stages. 0 is equal, 4 the largest possible.
    """
    stages = [(F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).flatten(1).mean(1)
              for a, b in zip(features, reference, strict=True)]
    return [float(d) for d in torch.stack(stages).mean(0)]


def mean_interval(values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000,
                  seed: int = 0) -> tuple[float, float]:
    """Confidence interval of the mean, in the unit of ``values``: percentile bootstrap (Efron 1979), reproducible by its seed."""
    data = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    low, high = np.quantile(data[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

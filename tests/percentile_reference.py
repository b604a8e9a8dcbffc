"""NVIDIA's Percentile Quant, written anew from its description: the oracle of the range rules named after modelopt."""

import torch

METHODS = ("global_min", "min-max", "min-mean", "mean-max")


class PercentileReference:
    """amax of one layer's input over denoising steps; "percentile" is a share of the steps, from the first one on.

    total_step: calls counted as one trajectory; percentile: in (0, 1]; method: one of METHODS.
    The step is a call counter modulo ``total_step``, whatever the scheduler does. ``min-mean`` divides the sum over batches by
    the number of steps, as the original does, so its range grows with the number of batches. A share below one step is one
    step: the first release of the original clamped it, later ones fail on it.
    """

    def __init__(self, total_step, percentile=1.0, method="min-mean"):
        assert method in METHODS
        assert 0 < percentile <= 1
        self.total_step, self.percentile, self.method = total_step, percentile, method
        self.calls = 0
        self.at_step = {}

    def collect(self, x):
        """Once per forward of the layer, with its input."""
        amax, step = float(x.abs().max()), self.calls % self.total_step
        self.calls += 1
        if step not in self.at_step:
            self.at_step[step] = amax
        elif self.method == "global_min":
            self.at_step[step] = min(self.at_step[step], amax)
        elif self.method == "min-mean":
            self.at_step[step] += amax
        else:
            self.at_step[step] = max(self.at_step[step], amax)

    def compute_amax(self):
        """fp32 scalar. Raises KeyError when fewer calls came than steps are looked at."""
        used = [self.at_step[step] for step in range(max(1, int(self.total_step * self.percentile)))]
        if self.method == "min-mean":
            used = [total / self.total_step for total in used]
        return torch.tensor(sum(used) / len(used) if self.method == "mean-max" else min(used))

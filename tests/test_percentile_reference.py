"""The oracle of the modelopt range rules, pinned on sequences worked out by hand."""

import pytest
import torch
from percentile_reference import METHODS, PercentileReference

# amax of two batches over four steps
BATCHES = ((8.0, 6.0, 3.0, 4.0), (7.0, 6.5, 5.0, 2.0))


def calibrated(calls, total_step, percentile, method):
    reference = PercentileReference(total_step, percentile, method)
    for i, amax in enumerate(calls):
        sign = -1 if i % 2 else 1  # the largest |x| of every other call is negative
        reference.collect(torch.tensor([[0.5 * amax, sign * amax], [0.0, -sign * 0.25 * amax]]))
    return float(reference.compute_amax())


@pytest.mark.parametrize(("method", "percentile", "expected"), [
    ("global_min", 1.0, 2.0),  # min of (7, 6, 3, 2)
    ("min-max", 1.0, 4.0),  # min of (8, 6.5, 5, 4)
    ("min-mean", 1.0, 6.0 / 4),  # sums (15, 12.5, 8, 6) over 4 steps, though there are 2 batches
    ("mean-max", 1.0, 23.5 / 4),  # mean of (8, 6.5, 5, 4)
    ("global_min", 0.5, 6.0),  # the first two steps
    ("min-max", 0.5, 6.5),
    ("min-mean", 0.5, 12.5 / 4),  # still over 4 steps
    ("mean-max", 0.5, 7.25),
    ("min-max", 0.99, 5.0),  # int(3.96) is 3 steps
])
def test_two_batches(method, percentile, expected):
    assert calibrated(BATCHES[0] + BATCHES[1], 4, percentile, method) == pytest.approx(expected)


@pytest.mark.parametrize(("method", "expected"), [("global_min", 3.0), ("min-max", 3.0), ("min-mean", 0.75), ("mean-max", 5.25)])
def test_one_batch(method, expected):
    assert calibrated(BATCHES[0], 4, 1.0, method) == pytest.approx(expected)


def test_min_mean_grows_with_the_number_of_batches_and_the_others_do_not():
    ranges = {m: [calibrated(BATCHES[0] * n, 4, 1.0, m) for n in (1, 4, 8)] for m in METHODS}
    assert ranges.pop("min-mean") == pytest.approx([0.75, 3.0, 6.0])
    assert all(len(set(values)) == 1 for values in ranges.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_share_below_one_step_is_one_step(method):
    batch = (9.0, 1.0, 1.0, 1.0)
    assert calibrated(batch, 4, 0.2, method) == calibrated(batch, 4, 0.25, method) == (9.0 / 4 if method == "min-mean" else 9.0)


@pytest.mark.parametrize(("method", "in_step", "drifted"), [
    # Two trajectories of amax 21, 20, ..., 1, counted modulo 20: key k collects 21 - k and, from the second one, 22 - k;
    # key 0 collects 21, 1 (the end of the first) and 2, key 1 collects 20, 21 and 1.
    ("global_min", 1.0, 1.0),
    ("min-max", 1.0, 3.0),  # key 19 collects 2 and 3, so the smallest maximum is 3
    ("min-mean", 2.0 / 21, 5.0 / 20),  # key 19: 2 + 3
    ("mean-max", 11.0, (21 + sum(22 - k for k in range(1, 20))) / 20),
])
def test_a_scheduler_of_one_more_call_drifts(method, in_step, drifted):
    trajectories = tuple(float(a) for a in range(21, 0, -1)) * 2
    assert calibrated(trajectories, 21, 1.0, method) == pytest.approx(in_step)
    assert calibrated(trajectories, 20, 1.0, method) == pytest.approx(drifted)


def test_after_a_drift_the_first_step_has_seen_the_last_one():
    trajectories = tuple(float(a) for a in range(21, 0, -1)) * 2
    assert calibrated(trajectories, 21, 0.05, "global_min") == 21.0
    assert calibrated(trajectories, 20, 0.05, "global_min") == 1.0


def test_fewer_calls_than_steps_are_an_error():
    reference = PercentileReference(4)
    reference.collect(torch.ones(2))
    with pytest.raises(KeyError):
        reference.compute_amax()

"""Which input is the timestep, and when a trajectory is complete."""

import math

import pytest
import torch

from sdtrt_backend.timesteps import MAX_BUCKETS, Buckets, Trajectories, find_timestep, number_for_timestep, timestep_value

LATENT, TEXT, SCALAR = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 64), torch.tensor(5)


def complete(*runs):
    trajectories = Trajectories()
    for run in runs:
        for timestep in run:
            trajectories.observe(timestep)
    return trajectories.complete


@pytest.mark.parametrize(("names", "values", "index"), [
    (["l_args_0_", "l_args_1_", "l_kwargs_encoder_hidden_states_"], [LATENT, SCALAR, TEXT], 1),
    (["s33", "l_sample_", "l_timestep_"], [2, LATENT, SCALAR], 2),
    (["l_kwargs_hidden_states_", "l_kwargs_guidance_", "l_kwargs_timestep_"], [LATENT, torch.ones(2), torch.ones(2)], 2),
    (["l_x_", "l_timestep_ratio_"], [LATENT, torch.ones(2)], 1),
    (["l_kwargs_hidden_states_", "l_kwargs_text_"], [LATENT, TEXT], None),
    (["l_weight_", "l_x_"], [torch.nn.Parameter(torch.ones(3)), LATENT], None),
])
def test_the_timestep_is_found_by_name_or_by_shape(names, values, index):
    assert find_timestep(names, values) == index


def test_a_call_has_one_key_whatever_the_shape_of_its_timestep():
    assert timestep_value(torch.tensor([0.0, 700.0, 700.0])) == timestep_value(torch.tensor(700)) == timestep_value(700) == 700.0


@pytest.mark.parametrize("run", [range(999, 0, -40), range(1, 999, 40), [1.6, 0.9, 0.1, -1.5], [1.0, 0.75, 0.5]])
def test_a_run_is_complete_when_the_next_one_starts(run):
    run = list(run)
    assert complete(run) == 0
    assert complete(run, run[:1]) == 1
    assert complete(run, run, run[:1]) == 2


@pytest.mark.parametrize("run", [
    [t for t in range(999, 0, -40) for _ in (0, 1)],  # guidance in two calls
    [981, 961, 961, 941, 921, 901],  # n+1 schedulers
    [999, 959, 969, 919, 929, 879, 500, 1],  # small steps back
    [999, 666, 333, 1, 11],  # one at the end
])
def test_repeated_and_slightly_rising_timesteps_do_not_end_a_run(run):
    assert complete(run, run, run[:1]) == 2


def test_an_interrupted_run_does_not_count():
    run = list(range(999, 0, -40))
    assert complete(run[:7], run, run[:1]) == 1
    assert complete(run, run[:7], run, run[:1]) == 2


def test_a_model_of_one_step_completes_every_two_calls():
    assert complete([999]) == complete([999] * 2) == 0  # may be both halves of a guided first step
    assert complete([999] * 6) == 2


def test_a_call_without_a_timestep_does_not_end_a_run():
    """Dynamo makes the first number a constant and gives those after it."""
    run = [990.0, 900.0, 500.0, 90.0]
    assert complete([math.nan], run[1:], run, run, run[:1]) == 3
    assert complete([math.nan] * 6) == 2


def test_a_number_called_timestep_is_told_from_sizes():
    assert number_for_timestep(["s33", "l_kwargs_timestep_", "l_sample_"], [2, 900, LATENT])
    assert not number_for_timestep(["s33", "l_sample_", "l_timestep_"], [2, LATENT, SCALAR])


def test_buckets_are_the_values_until_there_are_too_many_then_the_nearest():
    buckets = Buckets()
    for value in range(MAX_BUCKETS):
        assert buckets.key(float(value)) == float(value)
    assert buckets.key(MAX_BUCKETS + 100.0) == MAX_BUCKETS - 1
    assert buckets.key(3.4) == 3.0
    assert len(buckets.values) == MAX_BUCKETS


@pytest.mark.parametrize("buffer", ["l_self_buffers_frequencies_", "l_self_buffers_sigmas_"])
def test_a_buffer_of_the_model_is_not_the_timestep(buffer):
    assert find_timestep([buffer, "l_args_0_", "l_args_1_"], [torch.ones(8), LATENT, SCALAR]) == 2

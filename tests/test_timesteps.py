"""Which input is the timestep, which bucket a value falls into, and when a picture is complete."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrt_backend.timesteps import (
    HABIT,
    MAX_BUCKETS,
    Buckets,
    Candidates,
    Trajectories,
    candidates,
    find_timestep,
    number_for_timestep,
    timestep_value,
)

LATENT, TEXT, SCALAR = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 64), torch.tensor(5)


def complete(*runs):
    trajectories = Trajectories()
    for run in runs:
        for timestep in run:
            trajectories.observe(timestep)
    return trajectories.complete


@pytest.mark.parametrize(("names", "values", "index"), [
    (["l_args_0_", "l_args_1_", "l_kwargs_encoder_hidden_states_"], [LATENT, SCALAR, TEXT], None),
    (["s33", "l_sample_", "l_timestep_"], [2, LATENT, SCALAR], 2),
    (["l_kwargs_hidden_states_", "l_kwargs_guidance_", "l_kwargs_timestep_"], [LATENT, torch.ones(2), torch.ones(2)], 2),
    (["l_x_", "l_timestep_ratio_"], [LATENT, torch.ones(2)], 1),
    (["l_kwargs_hidden_states_", "l_kwargs_text_"], [LATENT, TEXT], None),
    (["l_weight_", "l_x_"], [torch.nn.Parameter(torch.ones(3)), LATENT], None),
    (["l_timestep_", "l_t_"], [torch.nn.Parameter(torch.ones(3)), SCALAR], 1),
    (["l_self_buffers_sigmas_", "l_args_1_"], [torch.ones(8), SCALAR], None),
])
def test_the_timestep_is_found_by_name_alone(names, values, index):
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


def test_two_equal_calls_may_be_one_guided_step_so_three_of_them_are_a_picture():
    assert [complete([999] * calls) for calls in range(1, 8)] == [0, 0, 0, 1, 1, 1, 2]
    full = list(range(999, 0, -40))
    assert complete(full, [39] * 5) == 0  # guidance and a second-order scheduler's last step
    assert complete(full, [39] * 6) == 2  # pictures of the last step alone


def test_every_call_without_a_timestep_is_a_picture_complete_when_the_next_one_begins():
    assert [complete([math.nan] * calls) for calls in range(1, 5)] == [0, 1, 2, 3]


def test_a_call_without_a_timestep_among_others_is_none():
    """Dynamo makes the first number a constant and gives those after it."""
    run = [990.0, 900.0, 500.0, 90.0]
    assert complete([math.nan], run[1:], run, run, run[:1]) == 3
    assert complete(run[:2], [math.nan], run[2:], run[:1]) == 1


def test_a_number_called_timestep_is_told_from_sizes():
    assert number_for_timestep(["s33", "l_kwargs_timestep_", "l_sample_"], [2, 900, LATENT])
    assert not number_for_timestep(["s33", "l_sample_", "l_timestep_"], [2, LATENT, SCALAR])


FULL, PART, RISING = list(range(999, 0, -40)), list(range(399, 0, -40)), list(range(39, 1000, 40))


@pytest.mark.parametrize(("pictures", "expected"), [
    ([FULL] + [PART] * 6, 6),  # image-to-image after text-to-image
    ([PART] * 3 + [FULL] * 3, 5),
    ([list(range(299, 0, -20)), list(range(599, 0, -20))] * 5, 9),
    ([RISING, FULL] * 5, 9),  # inversion and sampling: the next one turns without a jump
    ([RISING] * 4, 3),
    ([[751, 501, 251, 1]] + [[81, 61, 41, 21, 1]] * 5, 5),  # jumps of a third of the other's step
    ([[999, 749, 499, 249]] + [list(range(279, 0, -20))] * 5, 5),  # the next one begins a little above the end
    ([[999, 499]] * 6, 5),
    ([[1.5708, 1.3]] * 6, 5),
    ([[999], [999, 749, 499, 249], [999, 499]] * 4, 7),  # the picture of one step is taken for part of the next one
    ([[i / 30 for i in range(30) for _ in (0, 1)]] * 4, 3),  # from 0 to 1, twice per step
    ([[999, 937, 864, 775, 663, 511, 301, 102, 18, 0], [102, 18, 0]] * 3, 5),  # steps that shrink
    ([[1000, 988, 964, 923, 857, 750, 545], [923, 857, 750, 545]] * 3, 5),  # steps that grow
    ([[999.0, 913.147, 913.0, 811.945, 812.0, 689.368, 689.0, 537.354, 537.0, 353.69, 354.0, 171.466, 171.0, 53.046, 53.0, 8.657,
       9.0, 0.0, 0.0]] * 4, 3),
])
def test_pictures_are_counted_whatever_came_first(pictures, expected):
    assert complete(*pictures) == expected


def test_pictures_that_all_stop_early_count_once_they_are_a_habit():
    base = [t for t in FULL if t > 200]  # a refiner goes on from there
    assert complete(base, base, base[:1]) == 2
    assert [complete(FULL, *[base] * n, base[:1]) for n in range(5)] == [1, 1, 1, 1 + HABIT, 2 + HABIT]


@pytest.mark.parametrize(("pictures", "direction"), [
    ([[5, 5]], 0), ([FULL] * 2, -1), ([RISING] * 2, 1), ([RISING, FULL] * 3, -1), ([[math.nan] * 3], 0)])
def test_the_direction_is_that_of_sampling(pictures, direction):
    trajectories = Trajectories()
    for timestep in (t for picture in pictures for t in picture):
        trajectories.observe(float(timestep))
    assert trajectories.direction == direction


def schedule(steps, executed, spacing="trailing"):
    """The last ``executed`` timesteps of that many steps, integers in 0..4096."""
    at = {"trailing": [4096 - round(4096 / steps * i) for i in range(steps)],
          "leading": [4096 // steps * i + 1 for i in reversed(range(steps))],
          "shrinking": [round(4096 * (1 - i / steps) ** 2) for i in range(steps)],  # Karras et al. 2022 bend so
          # a flow's shift
          "growing": [round(4096 * 3 * s / (1 + 2 * s)) for s in (1 - i / steps for i in range(steps))]}[spacing]
    return at[steps - executed:]


SPACINGS = ("trailing", "leading", "shrinking", "growing")


@st.composite
def sequences(draw, least=3, sizes=None, pictures=(1, 8)):
    """Pictures of one scheduler: of one number of steps, or each of one in ``sizes``."""
    spacing, steps = draw(st.sampled_from(SPACINGS)), draw(st.integers(least, 50))
    made = []
    for _ in range(draw(st.integers(*pictures))):
        n = draw(sizes) if sizes is not None else steps
        made.append(schedule(n, draw(st.integers(min(least, n), n)), spacing))
    return made


anything = st.lists(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1.0, 2.0, math.nan])), max_size=40)


def counts(values):
    """``complete`` after each call."""
    trajectories = Trajectories()
    found = []
    for value in values:
        trajectories.observe(float(value))
        found.append(trajectories.complete)
    return found


def joined(pictures):
    return [t for picture in pictures for t in picture]


@given(anything)
def test_the_count_never_decreases_and_never_passes_the_calls_before(values):
    found = counts(values)
    assert all(a <= b <= a + 3 for a, b in pairwise(found))
    assert all(n <= i for i, n in enumerate(found))


@given(sequences())
def test_pictures_of_any_strength_are_complete_once_the_next_one_began(pictures):
    starts = [0, *accumulate(map(len, pictures))]
    found = counts(joined(pictures))
    for begun, start in enumerate(starts[:-1]):
        assert begun - 1 <= found[start] <= begun
        assert all(n <= begun for n in found[start : starts[begun + 1]])


@given(sequences(sizes=st.integers(3, 50), pictures=(7, 20)))
def test_mixed_step_counts_are_never_counted_early_and_six_pictures_are_enough_for_two(pictures):
    starts = [0, *accumulate(map(len, pictures))]
    found = counts(joined(pictures))
    for begun, start in enumerate(starts[:-1]):
        assert all(n <= begun for n in found[start : starts[begun + 1]])
    assert found[starts[6]] >= 2


@given(sequences())
def test_inversion_and_sampling_of_one_strength_are_two_pictures(pictures):
    there_and_back = [*reversed(pictures[0]), *pictures[0]]
    assert counts(there_and_back * len(pictures))[-1] == 2 * len(pictures) - 1


@given(sequences(least=4), st.data())
def test_interrupted_pictures_do_not_count(pictures, data):
    """Places differ; at least two steps are missing, and the next picture is of full strength."""
    whole = [max(pictures, key=len)] * len(pictures)
    cuts = data.draw(st.lists(st.integers(1, len(whole[0]) - 2), max_size=len(whole), unique=True))
    mixed = joined(picture + picture[:cut] for picture, cut in zip(whole, [*cuts, *[0] * len(whole)], strict=False))
    assert counts([*mixed, whole[0][0]])[-1] == len(whole)


@given(sequences())
def test_two_calls_per_step_change_nothing(pictures):
    values = joined(pictures)
    twice = [t for t in values for _ in (0, 1)]
    assert counts(twice)[::2] == counts(twice)[1::2] == counts(values)


@given(st.one_of(sequences().map(joined), anything), st.sampled_from([2.0**-14, 0.25, 1.0, 1024.0]))
def test_scale_and_mirror_change_nothing(values, scale):
    assert counts(values) == counts([scale * t for t in values]) == counts([-t for t in values])


@given(sequences().map(joined), st.integers(-10_000, 10_000))
def test_a_shift_changes_nothing(values, shift):
    assert counts(values) == counts([t + shift for t in values])


@given(st.integers(1, 6), st.integers(1, 12))
def test_calibrating_a_model_of_one_step_takes_at_most_six_pictures(calls_per_step, pictures):
    found = counts([999] * calls_per_step * pictures)
    if calls_per_step <= 3:
        assert all(n <= i // calls_per_step for i, n in enumerate(found))
    if pictures > 6:
        assert found[6 * calls_per_step] >= 2


def test_buckets_are_the_values_until_there_are_too_many_then_the_nearest_are_one():
    buckets, merged = Buckets(), []
    for value in range(0, 10 * MAX_BUCKETS, 10):
        assert buckets.key(float(value), lambda *two: merged.append(two)) == value
    assert not merged
    assert buckets.key(333.0, lambda *two: merged.append(two)) == 330.0
    assert merged == [(333.0, 330.0)]
    assert buckets.key(332.0) == 330.0  # spanned already
    assert buckets.key(1e6, lambda *two: merged.append(two)) == 1e6
    assert merged[1:] == [(10.0, 0.0)]
    assert len(buckets.values) == MAX_BUCKETS
    assert buckets.key(math.nan) == 0.0


@given(st.lists(st.floats(-1e4, 1e4), max_size=60), st.integers(2, 9))
def test_every_value_lies_in_its_bucket_and_buckets_do_not_overlap(values, limit):
    buckets, bucket_of = Buckets(limit), {}

    def merge(gone, into):
        bucket_of.update({value: into for value, key in bucket_of.items() if key == gone})

    for value in values:
        key = buckets.key(value, merge)
        bucket_of[value] = key
    assert set(bucket_of.values()) == set(buckets.values)
    assert len(buckets.values) == min(limit, len(buckets.values))
    assert all(buckets.spans[key][0] <= value <= buckets.spans[key][1] for value, key in bucket_of.items())
    assert all(a[1] < b[0] for a, b in pairwise(sorted(buckets.spans.values())))
    if len(set(values)) <= limit:
        assert buckets.values == list(dict.fromkeys(values))


@pytest.mark.parametrize(("names", "values", "indices"), [
    (["l_args_0_", "l_args_1_", "s33", "l_text_"], [LATENT, SCALAR, 8, TEXT], [1, 2]),
    (["l_args_0_", "l_flag_", "l_scale_"], [torch.ones(2), True, 0.5], [0, 2]),
    (["l_self_buffers_sigmas_", "l_weight_", "l_mask_"],
     [torch.ones(8), torch.nn.Parameter(torch.ones(3)), torch.ones(4, dtype=torch.bool)], []),
])
def test_candidates_are_real_numbers_and_vectors_that_come_with_the_call(names, values, indices):
    assert candidates(names, values) == indices


def chosen(calls):
    seen = Candidates()
    for values in calls:
        seen.observe(values)
    return seen.chosen


def test_the_timestep_is_the_input_that_moves_one_way_and_jumps_back():
    """0 a random number, 1 guidance, 2 the timestep, 3 a counter, 4 the half of guidance, 5 changes with the picture."""
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    calls = [{0: noise[i], 1: 5.0, 2: float(t), 3: float(i), 4: float(i % 2), 5: float(picture * 7 % 4)}
             for picture in range(4) for i, t in enumerate(FULL, 25 * picture)]
    seen = Candidates()
    for values in calls[:25]:
        seen.observe(values)
        assert seen.chosen is None
    seen.observe(calls[25])
    assert seen.chosen == 2
    assert seen.tracks[2].complete == 1  # the pictures before the choice are not lost
    assert chosen(calls) == 2
    del_timestep = [{i: v for i, v in values.items() if i != 2} for values in calls]
    assert chosen(del_timestep) is None


@given(sequences(least=4, pictures=(6, 9)), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_the_timestep_is_chosen_among_constants_counters_and_flags(pictures, calls_per_step, rising, index):
    values = [t for t in joined(pictures) for _ in range(calls_per_step)]
    calls = []
    for i, t in enumerate(values):
        others = iter((7.5, float(i), float(i % 2)))
        calls.append({j: (-t if rising else t) if j == index else next(others) for j in range(4)})
    assert chosen(calls) == index
    assert chosen([{i: v for i, v in call.items() if i != index} for call in calls]) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(4, 30))
def test_what_changes_with_the_picture_alone_is_no_timestep(of_pictures, steps):
    assert chosen([{0: v} for v in of_pictures for _ in range(steps + 1)]) is None


@given(st.lists(st.dictionaries(st.integers(0, 3), st.floats(-9, 9) | st.just(math.nan)), max_size=60))
def test_a_choice_stays(calls):
    seen, before = Candidates(), None
    for values in calls:
        seen.observe(values)
        assert before in (None, seen.chosen)
        before = seen.chosen


def test_inputs_that_move_alike_are_told_apart_by_their_place():
    assert chosen([{5: t / 1000, 3: float(t)} for _ in range(3) for t in FULL]) == 3


def test_numbers_that_jump_about_are_rarely_taken_for_a_timestep():
    """Independent ones are, by chance; no test of 60 values can do better than rarely."""
    noise = torch.rand(200, 60, generator=torch.Generator().manual_seed(1)).tolist()
    assert sum(chosen([{0: v} for v in row]) is not None for row in noise) <= 2

"""Statistics: streaming equals all at once, hooks never stay, groups follow tensors, what is not finite is left out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from percentile_reference import METHODS, PercentileReference

from sdtrt_backend.calibrate import Calibration, InputStats, Observer, calibrate, observed
from sdtrt_backend.errors import CalibrationError
from sdtrt_backend.options import Options
from sdtrt_backend.timesteps import MAX_BUCKETS, Buckets


def observe(calibration, tensors, timesteps, name="layer"):
    weight = torch.ones(16, tensors[0].shape[1])
    for x, t in zip(tensors, timesteps, strict=True):
        calibration.start_call(t)
        calibration.observe(name, "conv2d", x, weight, 1)
    return calibration


@pytest.fixture
def tensors():
    return [torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(4)]


def test_streaming_equals_all_at_once(tensors):
    tensor, channel = observe(Calibration(), tensors, [9.0, 1.0, 9.0, 1.0]).amax("layer")
    stacked = torch.stack(tensors).view(2, 2, 2, 16, 4, 4)  # call, timestep
    each = stacked.abs().amax((2, 4, 5))  # call, timestep, channel
    assert torch.equal(channel.maximum, each.amax(0))
    assert torch.equal(channel.minimum, each.amin(0))
    torch.testing.assert_close(channel.total, each.sum(0))
    assert torch.equal(tensor.maximum, each.amax((0, 2)))
    assert torch.equal(tensor.minimum, each.amax(2).amin(0))
    assert tensor.count.tolist() == [2, 2]


@pytest.mark.parametrize("calls", [20, 21])  # the second: a scheduler that calls the denoiser once more than it has steps
@pytest.mark.parametrize("percentile", [1.0, 0.4, 0.01])
@pytest.mark.parametrize("method", METHODS)
def test_the_rules_named_after_modelopt_are_its_percentile_quant(method, percentile, calls):
    reference, calibration = PercentileReference(20, percentile, method), Calibration(total_step=20)
    noise = torch.Generator().manual_seed(0)
    for trajectory in range(3):
        for step in range(calls):
            x = torch.randn(1, 16, 2, 2, generator=noise) * (25 - step + trajectory)
            reference.collect(x)
            observe(calibration, [x], [999.0 - 40 * step])
            calibration.observe("linear", "linear", x.flatten(1), torch.ones(8, 64), 1)
    options = Options(rule="modelopt_" + method.replace("-", "_"), percentile=percentile, alpha=None)
    recipe = calibration.recipe(options, {})
    assert recipe.layers["layer"].plain_amax == pytest.approx(float(reference.compute_amax()), rel=1e-6)
    assert recipe.layers["linear"].amax == max(at.tensor_max for at in calibration.inputs["linear"].values())


def test_statistics_are_keyed_by_timestep_in_the_order_of_the_first_visit(tensors):
    calibration = observe(Calibration(), tensors, [9.0, 5.0, 1.0, 9.0])
    assert calibration.buckets.values == [9.0, 5.0, 1.0]
    assert [calibration.inputs["layer"][t].count for t in (9.0, 5.0, 1.0)] == [2, 1, 1]


def test_memory_does_not_grow_with_samples(tensors):
    calibration = observe(Calibration(), tensors * 5, [9.0, 1.0] * 10)
    assert len(calibration.inputs["layer"]) == 2
    assert not any(isinstance(v, torch.Tensor) and v.dim() > 1 for v in vars(calibration.inputs["layer"][9.0]).values())


def pooled(calls):
    """All calls at once: channels [calls, C] and histograms [calls, bins] -> the statistics."""
    channels, histograms = (torch.stack(part) for part in zip(*calls, strict=True))
    tensor = channels.amax(1)
    return InputStats(channels.amax(0), channels.amin(0), channels.sum(0), float(tensor.max()), float(tensor.min()),
                      float(tensor.sum()), histograms.sum(0), len(calls))


def assert_same(one, other):
    """Integers in floats: sums are exact."""
    for name, value in vars(one).items():
        same = torch.equal if isinstance(value, torch.Tensor) else float.__eq__ if isinstance(value, float) else int.__eq__
        assert same(value, getattr(other, name)), name


calls_of_three_channels = st.lists(st.tuples(
    st.lists(st.integers(0, 999), min_size=3, max_size=3).map(lambda c: torch.tensor(c, dtype=torch.float32)),
    st.lists(st.integers(0, 9), min_size=4, max_size=4).map(torch.tensor)), min_size=1, max_size=6)


@given(st.lists(calls_of_three_channels, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_merged_statistics_are_those_of_all_calls_in_any_order(parts, random):
    merged = []
    for part in parts:
        stats = InputStats.of_call(*part[0])
        for call in part[1:]:
            stats.merge(InputStats.of_call(*call))
        merged.append(stats)
    random.shuffle(merged)
    while len(merged) > 1:
        other = merged.pop(random.randrange(len(merged)))
        merged[random.randrange(len(merged))].merge(other)
    assert_same(merged[0], pooled([call for part in parts for call in part]))


@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["a", "b"]), st.integers(-50, 50)), min_size=1, max_size=40),
       st.integers(2, 6))
def test_timesteps_beyond_the_limit_are_pooled_with_their_neighbours(calls, limit):
    """Group b runs at other timesteps than a: every group is told of a merge, whether it ran there or not."""
    calibration, seen = Calibration(buckets=Buckets(limit)), {"a": [], "b": []}
    for timestep, name, value in calls:
        x = torch.full((2, 16), float(value))
        observe(calibration, [x], [float(timestep)], name)
        alone = observe(Calibration(), [x], [float(timestep)], name)
        seen[name].append((float(timestep), alone.inputs[name][float(timestep)]))
    spans = calibration.buckets.spans
    assert calibration.timesteps() == sorted(spans, reverse=True) or calibration.trajectories.direction > 0
    for name, alone in seen.items():
        at = calibration.inputs.get(name, {})
        assert set(at) <= set(spans)
        assert sum(stats.count for stats in at.values()) == len(alone)
        for key, stats in at.items():
            low, high = spans[key]
            assert_same(stats, pooled([(s.channel_max, s.histogram) for t, s in alone if low <= t <= high]))


def test_a_hundred_steps_make_rows_of_neighbours_noisiest_first():
    calibration = Calibration()
    for _ in range(2):
        for t in range(990, -1, -10):
            observe(calibration, [torch.full((1, 16), 1.0 + t)], [float(t)])
    tensor, _ = calibration.amax("layer")
    assert calibration.timesteps() == sorted(calibration.timesteps(), reverse=True)
    assert len(tensor.count) == MAX_BUCKETS
    assert int(tensor.count.sum()) == 200
    assert tensor.count.max() <= 8  # no bucket swallows what comes after the first ones
    assert tensor.maximum[0] > tensor.maximum[-1]
    assert calibration.recipe(Options(alpha=None), {}).timesteps == tuple(calibration.timesteps())


def test_rules_by_call_keep_every_step_of_theirs():
    calibration = Calibration(total_step=100)
    for t in range(200):
        observe(calibration, [torch.ones(1, 16)], [float(t)])
    assert calibration.timesteps() == [float(t) for t in range(100)]


def test_layers_handed_one_tensor_are_one_group_recorded_once(denoiser, inputs):
    calibration = Calibration()
    with torch.no_grad(), observed(denoiser, calibration):
        denoiser(*inputs)
    assert calibration.group_of["to_k"] == calibration.group_of["to_v"] == "to_q"
    assert calibration.group_of["context_v"] == "context_k" != "to_q"
    assert calibration.inputs["to_q"][500.0].count == 1
    assert "to_k" not in calibration.inputs


def test_a_group_has_one_range_and_one_factor_from_its_largest_weights(denoiser, inputs):
    with torch.no_grad():
        denoiser.to_v.weight.mul_(50)
    calibration = Calibration()
    with torch.no_grad(), observed(denoiser, calibration):
        denoiser(*inputs)
    recipe = calibration.recipe(Options(rule="max", alpha=0.5), {})
    assert len({(recipe.layers[n].amax, recipe.layers[n].group) for n in ("to_q", "to_k", "to_v")}) == 1
    _, channel = calibration.amax("to_q")
    expected = (channel.maximum.amax(0) / denoiser.to_v.weight.detach().abs().amax(0)).sqrt()
    torch.testing.assert_close(recipe.smoothing["to_q"], expected)


def test_hooks_are_removed_also_when_the_body_raises(denoiser, inputs):
    def stop(*_):
        assert denoiser.conv1._forward_pre_hooks
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observed(denoiser, Calibration(), stop):
        denoiser(*inputs)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())


def test_calls_that_are_not_finite_are_counted_and_left_out(tensors):
    tensors[1][0, 0, 0, 0] = float("nan")
    calibration = observe(Calibration(), tensors, [9.0, 9.0, 9.0, 9.0])
    assert calibration.nonfinite == {"layer": 1}
    assert calibration.amax("layer")[0].count.tolist() == [3]


def test_nothing_finite_is_an_error_that_names_the_layer():
    calibration = observe(Calibration(), [torch.full((1, 16, 2, 2), float("inf"))], [1.0])
    with pytest.raises(CalibrationError, match=r"NaN or infinite inputs \(layer"):
        calibration.recipe(Options(), {})
    with pytest.raises(CalibrationError, match="no quantisable layer ran"):
        Calibration().recipe(Options(), {})


def test_a_call_without_elements_is_not_recorded(tensors):
    calibration = observe(Calibration(), [torch.empty(0, 16, 4, 4), *tensors], [9.0, 9.0, 9.0, 9.0, 9.0])
    assert calibration.nonfinite == {}
    assert calibration.amax("layer")[0].count.tolist() == [4]
    with pytest.raises(CalibrationError, match="no quantisable layer ran"):
        observe(Calibration(), [torch.empty(2, 16, 0, 4)], [1.0]).recipe(Options(), {})


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4, 64])
def test_grouped_convolutions_have_a_range_and_no_smoothing(groups, also):
    """also: a convolution of one group reads the same tensor."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, groups=groups), torch.nn.Conv2d(64, 64, 1))
    calibration, x = Calibration(), torch.randn(1, 64, 8, 8)
    calibration.start_call(1.0)
    calibration.observe("0", "conv2d", x, module[0].weight, 1)
    if also:
        calibration.observe("same", "conv2d", x, module[1].weight, 1)
    calibration.observe("1", "conv2d", module[0](x), module[1].weight, 1)
    recipe = calibration.recipe(Options(rule="max"), {})
    assert ("0" in recipe.smoothing) == (groups == 1)
    assert recipe.layers["0"].alpha == ("fitted" if groups == 1 else None)
    assert recipe.layers["0"].plain_amax == pytest.approx(float(x.abs().max()))
    assert recipe.layers["1"].alpha == "fitted"
    assert set(recipe.layers) == {"0", "1", *["same"] * also}


def test_both_front_doors_see_the_same(denoiser, graph, inputs):
    by_hooks, by_graph = Calibration(), Calibration()
    captured, args = graph
    weights = {layer.name: layer.weight for layer in captured.layers}
    by_graph.start_call(float(inputs[1]))
    with torch.no_grad(), observed(denoiser, by_hooks):
        expected = denoiser(*inputs)
        result = Observer(captured.graph, captured.layer_names(), lambda name, op, axis, a: by_graph.observe(
            name, op, a[0], weights[name], axis)).run(*args)
    assert torch.equal(result[0], expected)
    mine, theirs = by_hooks.recipe(Options(), {}), by_graph.recipe(Options(), {})
    assert mine.layers == theirs.layers
    assert mine.timesteps == theirs.timesteps == (500.0,)
    assert all(torch.equal(mine.smoothing[group], factor) for group, factor in theirs.smoothing.items())


def test_the_users_numbers_are_the_same_while_observed(denoiser, inputs):
    with torch.no_grad():
        expected = denoiser(*inputs)
        with observed(denoiser, Calibration()):
            assert torch.equal(denoiser(*inputs), expected)


def test_a_tensor_written_in_place_is_another_tensor():
    calibration, x = Calibration(), torch.ones(2, 16)
    calibration.start_call(1.0)
    calibration.observe("before", "linear", x, torch.ones(16, 16), -1)
    calibration.observe("after", "linear", x.mul_(100), torch.ones(16, 16), -1)
    assert calibration.recipe(Options(rule="max", alpha=None), {}).layers["after"].amax == 100.0


class Keywords(torch.nn.Module):
    """A denoiser that takes everything by keyword, and passes it on so or not."""

    def __init__(self, pass_on):
        super().__init__()
        self.to_q, self.pass_on = torch.nn.Linear(64, 64), pass_on

    def forward(self, **inputs):
        return self.to_q(input=inputs["sample"]) if self.pass_on else self.to_q(inputs["sample"])


def test_a_layer_called_by_keyword_is_observed():
    calibration, module = Calibration(), Keywords(pass_on=True)
    with observed(module, calibration):
        module(sample=torch.ones(2, 64), timestep=torch.tensor(7.0))
    assert list(calibration.inputs) == ["to_q"]


class Pipeline:
    """Draws with the keyword denoiser, a step for each timestep."""

    def __init__(self):
        self.unet = Keywords(pass_on=False)

    def __call__(self, prompts, num_inference_steps, generator, output_type):
        for timestep in reversed(range(num_inference_steps)):
            self.unet(sample=torch.ones(len(prompts), 64), timestep=torch.tensor(float(timestep)))


@pytest.mark.parametrize("prompts", [None, 3, "one", b"one", {"one"}, {"one": 1}, [], iter(())])
def test_prompts_that_are_no_list_are_refused(prompts):
    with pytest.raises(CalibrationError, match="expects a non-empty list of prompts, got"):
        calibrate(Pipeline(), prompts, progress=False)


def test_prompts_may_come_one_by_one():
    made = [calibrate(Pipeline(), p, num_inference_steps=2, progress=False)
            for p in (["a", "b"], ("a", "b"), (p for p in ("a", "b")))]
    assert all(recipe.provenance == made[0].provenance for recipe in made)
    assert made[0].provenance["prompts"] == 2


@pytest.mark.parametrize(("name", "value"), [
    ("num_inference_steps", 0), ("num_inference_steps", -1), ("num_inference_steps", "4"), ("batch_size", 0), ("batch_size", -1),
    ("batch_size", 1.0), ("seed", None), ("seed", "a"), ("seed", True),
])
def test_a_wrong_number_is_refused_by_its_name(name, value):
    with pytest.raises(CalibrationError, match=rf"expects {name} to be an integer.*got {value!r}"):
        calibrate(Pipeline(), ["one"], progress=False, **{name: value})


def test_a_timestep_among_the_keywords_of_a_denoiser_is_its_timestep():
    calibration, module = Calibration(), Keywords(pass_on=False)
    with observed(module, calibration):
        module(sample=torch.ones(2, 64), timestep=torch.tensor(7.0))
    assert list(calibration.inputs["to_q"]) == [7.0]

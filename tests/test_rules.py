"""The tables: range rules on a hand-made record, and which layers stay unquantised."""

import pytest
import torch

from sdtrt_backend.rules import KEEP, LEVELS, RANGE_RULES, AmaxByTimestep, level_of, reason_to_keep
from sdtrt_backend.stats import HEADROOM, log_histogram
from sdtrt_backend.values import Layer


def histogram(scale):
    return torch.stack([log_histogram(scale * torch.tensor([v] * 998 + [8.0])) for v in (1.0, 0.5, 0.25)])


# three timesteps, noisiest first; two calls each
RECORD = AmaxByTimestep(torch.tensor([8.0, 4.0, 2.0]), torch.tensor([6.0, 3.0, 1.0]), torch.tensor([14.0, 7.0, 3.0]),
                        torch.tensor([2.0, 2.0, 2.0]), histogram(1))
EXPECTED = {"max": 8.0, "mean_max": 14 / 3, "wide": HEADROOM * 14 / 3, "quartile_max": 6.0, "min_max": 2.0, "min_mean": 1.5,
            "mean_mean": 4.0, "global_min": 1.0, "modelopt_min_max": 2.0, "modelopt_min_mean": 1.0, "modelopt_mean_max": 14 / 3,
            "modelopt_global_min": 1.0, "value_999": 8.0, "value_9999": 8.0, "mse": 8.0}


def layer(name="mid.conv", shape=(64, 64, 3, 3), groups=1, op="conv2d"):
    return Layer(name, op, "n", "s", torch.ones(shape), groups)


@pytest.mark.parametrize("rule", RANGE_RULES)
def test_a_rule_gives_its_formula_per_tensor_and_per_channel(rule):
    assert float(RANGE_RULES[rule](RECORD)) == pytest.approx(EXPECTED[rule])
    wide = AmaxByTimestep(*(torch.stack([t, 2 * t], 1) for t in (RECORD.maximum, RECORD.minimum, RECORD.total)), RECORD.count,
                          histogram(2))
    assert RANGE_RULES[rule](wide).tolist() == pytest.approx([EXPECTED[rule], 2 * EXPECTED[rule]])


@pytest.mark.parametrize(("percentile", "kept"), [(1.0, 3), (0.67, 2), (0.34, 1), (0.01, 1)])
def test_a_prefix_starts_at_the_noisy_end_and_never_is_empty(percentile, kept):
    assert RECORD.prefix(percentile).maximum.tolist() == RECORD.maximum[:kept].tolist()


def test_an_ordinary_layer_may_be_quantised():
    assert reason_to_keep(layer(), ()) is None
    assert reason_to_keep(layer("up_blocks.0.attentions.1.proj_out"), ()) is None  # not the model's last projection


@pytest.mark.parametrize("name", ["conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.resnets.1.time_emb_proj",
                                  "time_extra_emb.timestep_embedder.linear_1", "t_embedder.mlp.0", "p.text_embedder.linear"])
def test_layers_of_the_table_stay_with_its_reason(name):
    assert reason_to_keep(layer(name), ()) in {why for _, why in KEEP}


@pytest.mark.parametrize(("kept", "word"), [(layer(shape=(64, 4, 3, 3)), "fewer"), (layer(shape=(64, 40, 3, 3)), "multiples"),
                                            (layer(groups=64), "grouped"), (layer("a.b"), "excluded")])
def test_every_other_refusal_is_a_sentence(kept, word):
    assert word in reason_to_keep(kept, ("a.*",))


def test_weights_that_are_not_finite_stay():
    broken = layer()
    broken.weight[0, 0, 0, 0] = float("inf")
    assert "not finite" in reason_to_keep(broken, ())


@pytest.mark.parametrize("name", ["mid.conv_in", "conv_in.conv", "blocks.0.proj_out", "pos.x_embedder", "blocks.0.norm_out",
                                  "time.conv1", "embedding.time", "context_embedder.token_refiner.0.to_q",
                                  "context_embedder_2.linear_1"])
def test_a_layer_deeper_in_the_model_does_not_match_the_name_of_an_outer_one(name):
    assert reason_to_keep(layer(name), ()) is None


@pytest.mark.parametrize(("name", "op", "least"), [
    ("down_blocks.0.resnets.0.conv1", "conv2d", 1), ("up_blocks.1.transformer_blocks.0.ff.net.0.proj", "linear", 2),
    ("transformer_blocks.3.ff_context.net.2", "linear", 2), ("mid_block.transformer_blocks.0.attn1.to_k", "linear", 2.5),
    ("transformer_blocks.3.attn.add_v_proj", "linear", 2.5), ("mid_block.attentions.0.proj_in", "linear", 3),
    ("mid_block.transformer_blocks.0.attn2.to_out.0", "linear", 3),
    ("single_transformer_blocks.0.proj_mlp", "linear", 3)])
def test_a_level_quantises_what_its_row_names_and_all_below(name, op, least):
    some = layer(name) if op == "conv2d" else layer(name, shape=(64, 64), op="linear")
    assert level_of(some) == least
    for level in LEVELS:
        reason = reason_to_keep(some, (), level)
        assert (reason is None) == (level >= least)
        assert reason is None or f"from level {least:g} on, the option level is {level:g}" in reason

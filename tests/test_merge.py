"""LoRAs written into codes, scales and weights: by the kernels what torch writes, in any order of memory."""

import pytest
import torch

from sdtrt_backend.lower.lowered import Derived, Scaled, scaled
from sdtrt_backend.merge import RANKS, Factors, Merged, added, renew, write
from sdtrt_backend.quantize import Coded, quantized_weights
from sdtrt_backend.values import Decision, Layer

LAST = {"memory_format": torch.channels_last}


def factors(weight, rank=5):
    return Factors(torch.randn(rank, *weight.shape[1:]), torch.randn(weight.shape[0], rank), 0.5)


def coded(weights, op="conv2d", precision="int8", smoothing=None):
    members = [Decision(Layer(f"layer{i}", op, f"node{i}", "x", w), precision, "") for i, w in enumerate(weights)]
    return Coded(members, smoothing, quantized_weights(members, smoothing))


def write_all(targets, loras_of):
    """loras_of: weight -> its LoRAs, each with its strength."""
    write(targets, lambda w: [(f, id(f)) for f, _ in loras_of(w)],
          {id(f): strength for one in targets for w, *_ in one.parts for f, strength in loras_of(w)}, {})


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(6, 10), (6, 8, 3, 3), (6, 8, 1, 1)], ids=str)
def test_factors_beside_a_weight_add_the_same(shape, last):
    weight = torch.randn(shape)
    weight = weight.contiguous(**LAST) if last and len(shape) == 4 else weight
    one = factors(weight)
    near = one.beside(weight)
    assert near.last == (last and shape[-1] == 3)
    assert near.down.shape[0] == near.up.shape[1] == RANKS
    torch.testing.assert_close(near.delta(weight), one.delta(weight), rtol=1e-5, atol=1e-5)


def test_factors_take_the_dtype_of_the_weight_only_where_both_have_it():
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    one = factors(weight)
    assert one.beside(weight).up.dtype is torch.float32
    assert Factors(one.down.bfloat16(), one.up.bfloat16(), 1.0).beside(weight).down.dtype is torch.bfloat16


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_codes_are_those_of_the_weights_with_the_loras(precision, smoothed):
    weights = [torch.randn(6, 8), torch.randn(4, 8)]
    loras = {id(weights[0]): [(factors(weights[0]), 0.7), (factors(weights[0], 3), -1.0)]}
    one = coded(weights, "linear", precision, torch.rand(8) + 0.5 if smoothed else None)
    before = [(c.clone(), s.clone()) for c, s in one.tensors]
    held = [(c.data_ptr(), s.data_ptr()) for c, s in one.tensors]
    write_all([one], lambda w: loras.get(id(w), []))
    fresh = coded([added(weights[0], loras[id(weights[0])]), weights[1]], "linear", precision, one.smoothing)
    for (codes, scale), (other, other_scale) in zip(one.tensors, fresh.tensors, strict=True):
        assert torch.equal(codes.float(), other.float())
        assert torch.equal(scale, other_scale)
    assert [(c.data_ptr(), s.data_ptr()) for c, s in one.tensors] == held
    write_all([one], lambda w: [])
    assert all(torch.equal(c.float(), b.float()) and torch.equal(s, t)
               for (c, s), (b, t) in zip(one.tensors, before, strict=True))


def test_a_trained_range_holds_until_a_lora_changes_the_weight():
    weight, amax = torch.randn(6, 8), torch.rand(6) + 0.5
    member = Decision(Layer("layer", "linear", "node", "x", weight), "int8", "", weight_amax=amax)
    one = Coded([member], None, quantized_weights([member], None))
    ((codes, scale),) = one.tensors
    assert torch.equal(scale, amax / 127)
    assert int(codes.abs().max()) == 127  # and what lies beyond it is clipped
    before, lora = (codes.clone(), scale.clone()), factors(weight)
    write_all([one], lambda w: [(lora, 1.0)])
    fresh = coded([added(weight, [(lora, 1.0)])], "linear").tensors[0]
    assert torch.equal(codes, fresh[0])
    assert torch.equal(scale, fresh[1])
    write_all([one], lambda w: [])
    assert torch.equal(codes, before[0])
    assert torch.equal(scale, before[1])


def test_a_weight_that_stays_in_16_bits_is_written_beside_it():
    weight = torch.randn(6, 8, 3, 3, dtype=torch.bfloat16).contiguous(**LAST)
    kept, one = weight.clone(), Merged(weight, torch.empty_like(weight))
    lora = factors(weight)
    write_all([one], lambda w: [(lora, 1.0)])
    assert torch.equal(one.tensor, (weight.float() + lora.delta(weight)).bfloat16())
    assert torch.equal(weight, kept)


def test_only_what_is_made_of_written_codes_is_made_again():
    one, other = (coded([torch.randn(4, 8)], "linear") for _ in range(2))
    made = []

    def derived(of):
        return Derived(torch.zeros(4, 8), [of.tensors[0][0]], lambda: made.append(of) or of.tensors[0][0].float())

    scale = one.tensors[0][1]
    factor = Scaled(torch.zeros(4), [(scale, 4, 0.25)])
    renew([derived(one), derived(other), factor], [one], {})
    assert made == [one]
    assert torch.equal(factor.target, scale * 0.25)
    renew([derived(one), derived(other)], None, {})
    assert made == [one, one, other]


def test_scales_of_several_weights_lie_one_behind_the_other():
    one, rows = torch.tensor([2.0]), torch.tensor([1.0, 3.0])
    assert scaled([(one, 3, 0.5), (rows, 2, 0.25)]).tolist() == [1.0, 1.0, 1.0, 0.25, 0.75]

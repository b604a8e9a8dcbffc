"""The graph handed to Inductor equals the Q/DQ graph; each rewrite has its match and its non-match."""

import pytest
import torch
import torch.nn.functional as F
from conftest import grab
from fragments import PIXELS, TOKENS, Fragment, conv, count, linear, noise, planned
from tolerances import TOLERANCES
from torch import nn

from sdtrt_backend import measure, ops
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.lower.inductor_cpu import ATTENTION, attention_in_bf16, bf16_pays, group_norm_by_aten, to_int8_operators
from sdtrt_backend.quantize import QD, insert
from sdtrt_backend.stats import HEADROOM


def pieces(module, *inputs, alpha=0.5, **how):
    """(function that makes a fresh Q/DQ graph, tensors) for a module calibrated on its own inputs."""
    captured, args, decisions, tensors = planned(module, *inputs, alpha=alpha, **how)
    return lambda: insert(*bind(captured, args), decisions), tensors


def same(module, *inputs, alpha=0.5, **how):
    """The graph of 8-bit operators gives what the Q/DQ graph gives."""
    make, tensors = pieces(module, *inputs, alpha=alpha, **how)
    with torch.no_grad():
        mine, reference = to_int8_operators(make(), None)(*tensors), make()(*tensors)
    assert [t.shape for t in mine] == [t.shape for t in reference]
    assert measure.compare(mine, reference) < TOLERANCES["int8_operator"]


@pytest.mark.parametrize(("module", "x"), [
    (Fragment(lambda m, x: m.a(x), a=linear), TOKENS),
    (Fragment(lambda m, x: m.a(x), a=linear), noise(2, 3, 5, 64)),
    (Fragment(lambda m, x: m.a(x), a=lambda: nn.Linear(64, 128, bias=False)), TOKENS),
    (Fragment(lambda m, x: m.a(x), a=lambda: conv(padding=1)), PIXELS),
    (Fragment(lambda m, x: m.a(x), a=lambda: conv(stride=2, padding=(1, 0))), PIXELS),
    (Fragment(lambda m, x: m.a(x), a=lambda: conv(dilation=2, padding_mode="circular", padding=1)), PIXELS),
    (Fragment(lambda m, x: m.a(F.silu(m.n(x))), a=conv, n=lambda: nn.GroupNorm(8, 64)), PIXELS),
    (Fragment(lambda m, x: m.b(F.silu(m.a(m.n(x)))), a=linear, b=linear, n=lambda: nn.LayerNorm(64)), TOKENS),
    (Fragment(lambda m, x: m.a(torch.mul(x, x)), a=linear), TOKENS),
    (Fragment(lambda m, x: m.a(F.silu(x)), a=linear), noise(2, 64)),
    (Fragment(lambda m, x: m.a(torch.mul(x, 0.5)), a=conv), PIXELS),
    (Fragment(lambda m, x: m.a(torch.mul(x, m.g)), a=conv, g=lambda: nn.Parameter(torch.rand(1, 64, 1, 1))), PIXELS),
], ids=["tokens", "4d", "no bias", "conv", "stride", "dilation", "group norm", "layer norm", "product", "2d", "scalar product",
        "channel product"])
def test_8_bit_operators_equal_the_graph_they_replace(module, x):
    same(module, x)


@pytest.mark.parametrize(("make", "x"), [(linear, TOKENS), (lambda: conv(padding=1), PIXELS), (lambda: conv(stride=2), PIXELS)])
def test_two_codes_of_an_input_carry_its_outliers(make, x):
    x = x.clone()
    x.view(-1)[:3] = torch.tensor([300.0, -200.0, 7.0])
    module = Fragment(lambda m, x: m.a(x), a=make).eval()
    same(module, x, free_convs=True, two_codes=("a",))
    graph, tensors = pieces(module, x, free_convs=True, two_codes=("a",))
    one, _ = pieces(module, x, free_convs=True)
    with torch.no_grad():
        full, fine, coarse = module(x), graph()(*tensors)[0], one()(*tensors)[0]
        weights_alone = F.mse_loss(fine, full)
        assert measure.compare(fine, full) < 0.02
        assert F.mse_loss(coarse, full) > 4 * weights_alone
        lowered = to_int8_operators(graph(), None)
    operator = ops.int8_linear if make is linear else ops.int8_conv2d
    assert count(lowered, operator) == 2
    assert count(lowered, torch.round) == 1


def test_two_codes_cover_all_of_int16():
    module = Fragment(lambda m, x: m.a(x), a=linear)
    (decision,) = planned(module, TOKENS, free_convs=True, two_codes=("a",))[2]
    assert decision.two_codes
    scale, zero = decision.int8_range
    assert zero == 0
    assert scale * 32767 == pytest.approx(8 * HEADROOM * float(TOKENS.abs().max()))
    make, _ = pieces(module, TOKENS, free_convs=True, two_codes=("a",))
    beyond = torch.where(TOKENS > 0, 1e9, -1e9)
    with torch.no_grad():
        assert measure.compare(to_int8_operators(make(), None)(beyond), make()(beyond)) < TOLERANCES["int8_operator"]


def test_every_dequantise_is_gone_and_one_code_serves_all_readers_of_a_tensor():
    make, _ = pieces(Fragment(lambda m, x: m.q(x) + m.k(x) + m.v(x), q=linear, k=linear, v=linear), TOKENS)
    gm = to_int8_operators(make(), None)
    assert count(gm, ops.int8_linear) == 3
    assert count(gm, torch.round) == 1
    assert count(gm, QD.quantize_per_tensor.default) == count(gm, QD.dequantize_per_tensor.default) == 0
    assert count(gm, QD.dequantize_per_channel.default) == 0


def test_an_unfolded_factor_and_the_scale_are_one_multiplication():
    make, _ = pieces(Fragment(lambda m, x: m.a(x), a=linear), TOKENS)
    assert count(make(), torch.mul) == 1
    assert count(to_int8_operators(make(), None), torch.mul) == 1


def test_a_layer_that_is_not_quantised_is_left_alone():
    make, tensors = pieces(Fragment(lambda m, x: m.b(m.a(x)), a=linear, b=lambda: nn.Linear(64, 20)), TOKENS)
    gm = to_int8_operators(make(), None)
    assert count(gm, ops.int8_linear) == 1
    assert gm(*tensors)[0].shape == (2, 5, 20)


def test_narrow_kernels_give_the_dtype_of_the_graph():
    make, tensors = pieces(Fragment(lambda m, x: m.a(x), a=linear), TOKENS)
    wide, narrow = to_int8_operators(make(), None), to_int8_operators(make(), torch.bfloat16)
    assert count(narrow, "to", "call_method") == count(wide, "to", "call_method") + 1
    with torch.no_grad():
        assert narrow(*tensors)[0].dtype is torch.float32
        assert torch.equal(narrow(*tensors)[0], wide(*tensors)[0].bfloat16().float())


def attention(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_by_name(q, k, v):
    return F.scaled_dot_product_attention(query=torch.tanh(q), key=torch.tanh(k), value=torch.tanh(v), dropout_p=0.0)


def test_attention_whose_arguments_are_named_is_narrowed_too():
    inputs = [noise(2, 4, 6, 16), noise(2, 4, 7, 16), noise(2, 4, 7, 16) + 1]
    torch._dynamo.reset()
    captured, args = grab(Fragment(lambda m, *inputs: attention_by_name(*inputs)), inputs)
    assert bf16_pays(bind(captured, args)[0]) in (True, False)
    gm = attention_in_bf16(bind(captured, args)[0])
    assert count(gm, "to", "call_method") == 4
    assert measure.compare(gm(*inputs), attention_by_name(*inputs)) < TOLERANCES["kernels_vs_reference_step"]


@pytest.mark.parametrize(("dtype", "mask", "casts"), [(torch.float32, False, 4), (torch.bfloat16, False, 0),
                                                      (torch.float32, True, 0)])
def test_attention_is_narrowed_only_in_fp32_and_without_a_mask(dtype, mask, casts):
    torch._dynamo.reset()
    inputs = [noise(2, 4, 6, 16).to(dtype)] * 3 + [torch.zeros(6, 6)] * mask
    captured, args = grab(Fragment(lambda m, *inputs: attention(*inputs)), inputs)
    before, _ = bind(captured, args)
    gm = attention_in_bf16(bind(captured, args)[0])
    tensors = tensor_inputs(captured, args)
    assert count(gm, ATTENTION) == 1
    assert count(gm, "to", "call_method") == casts
    assert gm(*tensors)[0].dtype is dtype
    assert measure.compare(gm(*tensors), before(*tensors)) < TOLERANCES["kernels_vs_reference_step"]


@pytest.mark.parametrize("x", [PIXELS, PIXELS.to(memory_format=torch.channels_last), noise(2, 64, 7),
                               noise(2, 7, 64).transpose(1, 2)],
                         ids=["nchw", "channels last", "tokens", "transposed tokens"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_group_norm_call_gives_what_the_functional_one_gives(x, affine):
    torch._dynamo.reset()
    captured, args = grab(Fragment(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(8, 64, affine=affine)), (x,))
    gm = group_norm_by_aten(bind(captured, args)[0])
    assert count(gm, ops.group_norm) == 1
    with torch.no_grad():
        torch.testing.assert_close(gm(x)[0], captured.graph(*args)[0])


def test_a_group_norm_called_with_its_defaults_keeps_them():
    torch._dynamo.reset()
    x = 1e-2 * PIXELS  # so small that eps shows
    captured, args = grab(Fragment(lambda m, x: F.group_norm(x, 8)), (x,))
    gm = group_norm_by_aten(bind(captured, args)[0])
    assert count(gm, ops.group_norm) == 1
    torch.testing.assert_close(gm(x)[0], F.group_norm(x, 8))

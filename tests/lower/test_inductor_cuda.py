"""The graph for the GPU, run with the plain-torch kernels on the CPU, equals the Q/DQ graph; each rewrite has its match and
its non-match."""

import operator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from choosers import Reference
from fragments import PIXELS, TOKENS, Fragment, conv, count, linear, noise, planned
from tolerances import TOLERANCES
from torch import nn

from sdtrt_backend import measure, ops
from sdtrt_backend.capture import bind
from sdtrt_backend.fx import propagate
from sdtrt_backend.kernels import provider
from sdtrt_backend.lower import inductor_cuda
from sdtrt_backend.lower.inductor_cuda import to_8_bit_operators
from sdtrt_backend.lower.producers import simplify
from sdtrt_backend.quantize import insert


def lower(module, *inputs, precision="int8", **how):
    """(graph for the GPU, Q/DQ graph, tensors). how: arguments of ``plan``."""
    captured, args, decisions, tensors = planned(module, *inputs, **how)
    decisions = [replace(d, precision=precision) if d.quantized else d for d in decisions]

    def make():
        return insert(*bind(captured, args), decisions)

    gm = make()
    propagate(gm, tensors)
    simplify(gm)
    return to_8_bit_operators(gm, Reference()), make(), tensors


def heads(x):
    return x.view(2, -1, 4, 16).transpose(1, 2)


def attend(m, x, **mask):
    y = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), **mask)
    return m.o(y.transpose(1, 2).reshape(2, -1, 64))


def gated(m, x, halves=lambda y: y.chunk(2, dim=-1)):
    value, gate = halves(m.a(x))
    return m.b(value * F.gelu(gate))


def rotate(x, cos, sin):
    """Rotary embedding of neighbouring pairs, as diffusers' transformers write it."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([-b, a], dim=-1).flatten(3)
    cos, sin = (t[None, :, None, :].to(x.device) for t in (cos, sin))
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


class Norms(nn.Module):
    """RMS norms of the heads of q and k, by stream."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.RMSNorm(16, eps=1e-6) for name in ("q", "k", "q2", "k2")})
        for i, norm in enumerate(self.norms.values()):
            nn.init.normal_(norm.weight, 1, 0.1 + 0.1 * i)

    def forward(self, name, x):
        return self.norms[name](x.unflatten(-1, (-1, 16)))


def rotary(m, x, text, cos, sin):
    """Joint attention of two streams, the text in front."""
    q, k = (torch.cat([m.n(f"{name}2", layer(text)), m.n(name, layer(x))], dim=1) for name, layer in (("q", m.q), ("k", m.k)))
    v = torch.cat([m.v(text), m.v(x)], dim=1).unflatten(-1, (-1, 16))
    q, k = (rotate(t, cos, sin) for t in (q, k))
    y = F.scaled_dot_product_attention(*(t.permute(0, 2, 1, 3) for t in (q, k, v)))
    return m.o(y.permute(0, 2, 1, 3).flatten(2, 3))


class PlainNorms(Norms):
    """The same, in the operations that diffusers' own RMSNorm is written in."""

    def forward(self, name, x):
        x, norm = x.unflatten(-1, (-1, 16)), self.norms[name]
        y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + norm.eps)
        return y.to(norm.weight.dtype) * norm.weight


def rotate_complex(x, factors, dim):
    """Rotary embedding as a product of complex numbers; dim: of the heads in ``factors``."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * factors.unsqueeze(dim)).flatten(3).type_as(x)


def rotary_complex(m, x, text, factors, of_text, mask=None):
    """Joint attention of two streams, each embedded before they are put together."""
    q, k = (torch.cat([rotate_complex(m.n(f"{name}2", layer(text)), of_text, 1), rotate_complex(m.n(name, layer(x)), factors, 1)],
                      dim=1) for name, layer in (("q", m.q), ("k", m.k)))
    v = torch.cat([m.v(text), m.v(x)], dim=1).unflatten(-1, (-1, 16))
    y = F.scaled_dot_product_attention(*(t.permute(0, 2, 1, 3) for t in (q, k, v)), attn_mask=mask)
    return m.o(y.permute(0, 2, 1, 3).flatten(2, 3))


def rotary_by_image(m, x, factors):
    q, k = (rotate_complex(m.n(name, layer(x)), factors, 2) for name, layer in (("q", m.q), ("k", m.k)))
    v = m.v(x).unflatten(-1, (-1, 16))
    return m.o(F.scaled_dot_product_attention(*(t.permute(0, 2, 1, 3) for t in (q, k, v))).permute(0, 2, 1, 3).flatten(2, 3))


def angles(*shape):
    return torch.polar(torch.ones(shape), 3 * noise(*shape))


def rotary_single(m, x, cos, sin):
    q, k = (rotate(m.n(name, layer(x)), cos, sin) for name, layer in (("q", m.q), ("k", m.k)))
    v = m.v(x).unflatten(-1, (-1, 16))
    y = F.scaled_dot_product_attention(*(t.permute(0, 2, 1, 3) for t in (q, k, v)), scale=0.3)
    mlp = F.gelu(m.mlp(x), approximate="tanh")
    return m.o(torch.cat([y.permute(0, 2, 1, 3).flatten(2, 3), mlp], dim=2))


MODULES = {
    "rotary": (Fragment(rotary, q=linear, k=linear, v=linear, o=linear, n=Norms), TOKENS, noise(2, 3, 64), noise(8, 16),
               noise(16, 8).T),
    "rotary single": (Fragment(rotary_single, q=linear, k=linear, v=linear, mlp=linear, o=lambda: nn.Linear(128, 64), n=Norms),
                      TOKENS, noise(5, 16), noise(16, 5).T),
    "rotary complex": (Fragment(rotary_complex, q=linear, k=linear, v=linear, o=linear, n=PlainNorms), TOKENS, noise(2, 3, 64),
                       angles(5, 8), angles(3, 8)),
    "rotary masked": (Fragment(rotary_complex, q=linear, k=linear, v=linear, o=linear, n=PlainNorms), TOKENS, noise(2, 3, 64),
                      angles(5, 8), angles(3, 8), noise(2, 1, 1, 8) > -0.5),
    "rotary by image": (Fragment(rotary_by_image, q=linear, k=linear, v=linear, o=linear, n=PlainNorms), TOKENS, angles(2, 5, 8)),
    "linear": (Fragment(lambda m, x: m.a(x), a=linear), TOKENS),
    "vector": (Fragment(lambda m, x: m.a(F.silu(x)), a=linear), noise(2, 64)),
    "no bias": (Fragment(lambda m, x: m.a(x), a=lambda: nn.Linear(64, 128, bias=False)), TOKENS),
    "three readers": (Fragment(lambda m, x: m.q(x) + m.k(x) * m.v(x), q=linear, k=lambda: nn.Linear(64, 64, bias=False),
                               v=linear), TOKENS),
    "conv": (Fragment(lambda m, x: m.a(x), a=lambda: conv(padding=1)), PIXELS),
    "stride": (Fragment(lambda m, x: m.a(x), a=lambda: conv(stride=2, padding=(1, 0))), PIXELS),
    "residual": (Fragment(lambda m, x: (x + m.a(x)) / 1.0, a=lambda: conv(padding=1)), PIXELS),
    "group norm": (Fragment(lambda m, x: m.a(F.silu(m.n(x))), a=conv, n=lambda: nn.GroupNorm(8, 64)), PIXELS),
    "group norm, linear": (Fragment(lambda m, x: m.a(m.n(x).permute(0, 2, 3, 1).reshape(2, -1, 64)), a=linear,
                                    n=lambda: nn.GroupNorm(8, 64)), PIXELS),
    "concatenation": (Fragment(lambda m, x: m.a(F.silu(m.n(torch.cat([x[:, :24], x[:, 24:]], dim=1)))), a=conv,
                               n=lambda: nn.GroupNorm(8, 64)), PIXELS),
    "shift": (Fragment(lambda m, x, t: m.b(F.silu(m.n(m.a(x) + t[:, :, None, None]))), a=conv, b=conv,
                       n=lambda: nn.GroupNorm(8, 64)), PIXELS, noise(2, 64)),
    "layer norm": (Fragment(lambda m, x: m.a(m.n(x)), a=linear, n=lambda: nn.LayerNorm(64)), TOKENS),
    "layer norm of a sum": (Fragment(lambda m, x, y: (x + y) + m.a(m.n(x + y)), a=linear, n=lambda: nn.LayerNorm(64)), TOKENS,
                            TOKENS.flip(1)),
    "plain layer norm": (Fragment(lambda m, x: m.a(m.n(x)), a=linear, n=lambda: nn.LayerNorm(64, elementwise_affine=False)),
                         TOKENS),
    "geglu": (Fragment(gated, a=lambda: linear(256), b=lambda: nn.Linear(128, 64)), TOKENS),
    "gelu": (Fragment(lambda m, x: m.b(F.dropout(F.gelu(m.a(x), approximate="tanh"), 0.0)), a=lambda: linear(128),
                      b=lambda: nn.Linear(128, 64)), TOKENS),
    "attention": (Fragment(attend, q=linear, k=linear, v=linear, o=linear), TOKENS),
    "masked attention": (Fragment(lambda m, x: attend(m, x, is_causal=True), q=linear, k=linear, v=linear, o=linear), TOKENS),
}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", MODULES)
def test_8_bit_operators_equal_the_graph_they_replace(name, precision):
    gm, reference, tensors = lower(*MODULES[name], precision=precision)
    with torch.no_grad():
        mine, theirs = gm(*tensors), reference(*tensors)
    assert [t.shape for t in mine] == [t.shape for t in theirs]
    # behind a norm or an attention of another order of summation a rounding tie may fall to the other side
    assert measure.compare(mine, theirs) < (TOLERANCES["int8_operator"] if name in ("linear", "conv", "stride", "residual")
                                            else TOLERANCES["rounding_ties"])


@pytest.mark.parametrize(("name", "op"), [("group norm", ops.group_norm8), ("group norm, linear", ops.group_norm8),
                                          ("concatenation", ops.group_norm8), ("shift", ops.group_norm8),
                                          ("layer norm", ops.layer_norm8), ("plain layer norm", ops.layer_norm8),
                                          ("layer norm of a sum", ops.add_layer_norm8), ("geglu", ops.geglu8),
                                          ("attention", ops.attention8)])
def test_what_computes_a_tensor_writes_it_in_8_bits(name, op):
    gm, _, _ = lower(*MODULES[name])
    assert count(gm, op) == 1
    # no quantisation of its own, but for the module's input in front of a first linear or convolution
    assert count(gm, torch.round) == (1 if name in ("shift", "geglu", "attention") else 0)


@pytest.mark.parametrize("name", ["rotary", "rotary single", "rotary complex", "rotary masked", "rotary by image"])
def test_the_norm_and_rotation_of_q_and_k_are_one_kernel_each(name):
    gm, _, _ = lower(*MODULES[name])
    assert count(gm, ops.rms_rope8) == 2
    assert count(gm, torch.rms_norm) == count(gm, torch.stack) == count(gm, torch.rsqrt) == count(gm, torch.view_as_complex) == 0
    tables = sum(n.target in ("repeat_interleave", torch.cat) for n in gm.graph.nodes)
    # made once, for q and k; one more is of v
    assert tables == {"rotary complex": 7, "rotary masked": 7, "rotary by image": 2}.get(name, tables)


@pytest.mark.parametrize("body", [
    lambda m, x, f: attend_to(m, rotate_complex(split(m.q(x)), f, 2), split(x)),
    lambda m, x, f: attend_to(m, rotate_complex(split(m.q(x)), f[:1, :1], 2), split(x)),
    lambda m, x, f: m.o(torch.view_as_real(torch.view_as_complex(m.q(x).reshape(2, 5, 32, 2)) * f[0, 0, 0]).flatten(2)),
    lambda m, x, f: attend_to(m, torch.cat([rotate_complex(m.n("q", m.q(x[:, :2])), f[:, :2], 2),
                                            rotate_complex(m.n("k", m.q(x[:, 2:])), f[0, 2:], 1)], 1), split(x)),
    lambda m, x, f: attend_to(m, rotate_complex(m.n("one", m.q(x)), f, 2), split(x)),
], ids=["no norm", "one angle for all", "a number", "tables for each image and for all", "one weight for all"])
def test_complex_products_that_no_kernel_takes_are_real_ones(body):
    module = Fragment(body, q=linear, o=linear, n=PlainNorms)
    module.n.norms["one"] = nn.RMSNorm(16, eps=1e-6)
    module.n.norms["one"].weight = nn.Parameter(torch.full((1,), 1.5))
    gm, reference, tensors = lower(module, TOKENS, angles(2, 5, 8))
    assert count(gm, ops.rms_rope8) == count(gm, torch.view_as_complex) == 0
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


@pytest.mark.parametrize(("pairs", "wider"), [
    (lambda x: x.reshape(2, 5, 2, 32).transpose(2, 3).contiguous(), False), (lambda x: x.reshape(2, 5, 32, 2), True),
], ids=["no neighbours", "in another precision"])
def test_a_complex_product_of_another_kind_stays(pairs, wider):
    def body(m, x, f):
        product = torch.view_as_complex(pairs(m.q(x))) * (f.to(torch.complex128) if wider else f)[:, :, :1]
        return m.o(torch.view_as_real(product).flatten(2).float())

    gm, reference, tensors = lower(Fragment(body, q=linear, o=linear), TOKENS, angles(2, 5, 8))
    assert count(gm, torch.view_as_complex) == 1
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


@pytest.mark.parametrize("other", ["rotate_half", "no norm", "no eps"])
def test_another_embedding_or_norm_is_left_as_it_is(other):
    def body(m, x, cos, sin):
        q = m.n("q", m.q(x)) if other != "no norm" else m.q(x).unflatten(-1, (-1, 16))
        if other == "rotate_half":
            a, b = q.chunk(2, dim=-1)
            q = q * cos[None, :, None, :] + torch.cat([-b, a], dim=-1) * sin[None, :, None, :]
        else:
            q = rotate(q, cos, sin)
        return F.scaled_dot_product_attention(*[q.permute(0, 2, 1, 3)] * 3).permute(0, 2, 1, 3).flatten(2, 3)

    module = Fragment(body, q=linear, n=Norms)
    if other == "no eps":
        module.n.norms["q"].eps = None
    gm, reference, tensors = lower(module, TOKENS, noise(5, 16), noise(16, 5).T)
    assert count(gm, ops.rms_rope8) == 0
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


def lower_in_fp8(module, *inputs, centred=False):
    """(graph for the GPU whose attention was planned in fp8, Q/DQ graph without it, tensors)."""
    captured, args, decisions, tensors = planned(module, *inputs)
    graph, nodes = bind(captured, args)
    (attention,) = graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    attention.meta["fp8_attention"] = ("reference", [2**-5, 2**-5, 2**-6], centred)
    gm = insert(graph, nodes, decisions)
    propagate(gm, tensors)
    simplify(gm)
    return to_8_bit_operators(gm, Reference()), lower(module, *inputs)[1], tensors


@pytest.mark.parametrize("centred", [False, True], ids=["", "without the mean of v"])
@pytest.mark.parametrize("name", ["rotary", "rotary single", "rotary complex", "rotary by image", "attention"])
def test_a_planned_attention_reads_and_writes_fp8(name, centred):
    gm, reference, tensors = lower_in_fp8(*MODULES[name], centred=centred)
    assert count(gm, ops.attention_fp8) == 1
    assert count(gm, F.scaled_dot_product_attention) == count(gm, ops.attention8) == 0
    assert count(gm, ops.rms_rope8) == (0 if name == "attention" else 2)
    # q, k and v leave their product as codes, where nothing lies between and it may write all of them
    in_codes = [n for n in gm.graph.find_nodes(op="call_function", target=ops.linear8) if n.args[4] is torch.float8_e4m3fn]
    assert len(in_codes) == (name == "attention" and not centred)
    if in_codes:
        assert count(gm, torch.clamp) == 2  # of what the products read, and of what the last one does
    with torch.no_grad():
        assert 0 < measure.compare(gm(*tensors), reference(*tensors)) < 0.1  # the noise of e4m3, at large scores


@pytest.mark.parametrize("centred", [False, True], ids=["", "without the mean of v"])
def test_narrow_heads_are_filled_up_to_what_kernels_take(monkeypatch, centred):
    def body(m, x):
        y = F.scaled_dot_product_attention(*(layer(x).view(2, -1, 8, 8).transpose(1, 2) for layer in (m.q, m.k, m.v)))
        return m.o(y.transpose(1, 2).reshape(2, -1, 64))

    widths = []
    kernel = ops.KERNELS["attention_fp8", "reference"]
    monkeypatch.setitem(ops.KERNELS, ("attention_fp8", "reference"),
                        lambda *given: widths.extend(t.shape[-1] for t in given[:3]) or kernel(*given))
    module = Fragment(body, q=linear, k=linear, v=linear, o=linear)
    gm, reference, tensors = lower_in_fp8(module, TOKENS, centred=centred)
    with torch.no_grad():
        assert 0 < measure.compare(gm(*tensors), reference(*tensors)) < 0.1
    assert widths == [16] * 3


@pytest.mark.parametrize("why", ["the kernel writes 16 bits only", "q is read by others", "q and k are one",
                                 "q and k are one view"])
def test_codes_are_made_behind_a_product_that_cannot_write_them(monkeypatch, why):
    def body(m, x):
        q = m.q(x)
        k = q if why == "q and k are one" else m.k(x)
        query = heads(q)
        y = F.scaled_dot_product_attention(query, query if why == "q and k are one view" else heads(k), heads(m.v(x)))
        y = m.o(y.transpose(1, 2).reshape(2, -1, 64))
        return y + q if why == "q is read by others" else y

    if why == "the kernel writes 16 bits only":
        monkeypatch.setattr(inductor_cuda, "provider", lambda *row: replace(provider(*row), writes_codes=False))
    module = Fragment(body, q=linear, k=linear, v=linear, o=linear)
    gm, reference, tensors = lower_in_fp8(module, TOKENS)
    assert all(n.args[4] is torch.float32 for n in gm.graph.find_nodes(op="call_function", target=ops.linear8))
    with torch.no_grad():
        assert 0 < measure.compare(gm(*tensors), reference(*tensors)) < 0.1


class InFloat(nn.LayerNorm):
    """A layer norm that converts its parameters."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class Buffered(nn.Module):
    """A layer norm whose weight is no parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", noise(64))

    def forward(self, x):
        return F.layer_norm(x, (64,), self.weight)


def split(x):
    return x.unflatten(-1, (-1, 16))


def attend_to(m, q, k):
    return m.o(F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2)).transpose(1, 2).flatten(2))


def rotated_sum(make):
    """Attention whose queries are ``make`` of q and of q with neighbours as rotations swap them."""
    def body(m, x, cos, sin):
        q = m.n("q", m.q(x))
        a, b = q.reshape(*q.shape[:-1], -1, 2).unbind(-1)
        cos, sin = (t[None, :, None, :] for t in (cos, sin))
        return attend_to(m, make(q, torch.stack([-b, a], dim=-1).flatten(3), cos, sin), q)

    return Fragment(body, q=linear, o=linear, n=Norms), TOKENS, noise(5, 16), noise(16, 5).T


def named_lists(m, x, cos, sin):
    """The rotation of two streams one behind the other, with every list given by its name."""
    q = torch.cat(tensors=[m.n("q2", m.q(x[:, :2])), m.n("q", m.q(x[:, 2:]))], dim=1)
    a, b = q.reshape(*q.shape[:-1], -1, 2).unbind(-1)
    return attend_to(m, q * cos[None, :, None, :] + torch.stack(tensors=[-b, a], dim=-1).flatten(3) * sin[None, :, None, :], q)


def gated_by_name(m, x):
    value, gate = torch.chunk(input=x, chunks=2, dim=2)
    return m.b(torch.mul(value, other=F.gelu(input=gate)))


def attend_by_name(m, x):
    q = torch.transpose(heads(m.q(x)), dim0=-3, dim1=-2).transpose(1, 2)
    y = F.scaled_dot_product_attention(query=q, key=heads(x), value=heads(x))
    return m.o(torch.permute(y, dims=(0, -2, 1, 3)).flatten(2))


NORM, GROUP = {"a": linear, "n": lambda: nn.LayerNorm(64)}, {"a": conv, "n": lambda: nn.GroupNorm(8, 64)}
ONE_ROW = (noise(1, 16), noise(16, 1).T)
DECLINED = {
    "group norm with a computed weight": ((Fragment(lambda m, x: m.a(F.group_norm(x, 8, 1 + m.n.weight)), **GROUP), PIXELS),
                                          ops.group_norm8),
    "wide group norm with a computed weight": ((Fragment(lambda m, x: F.group_norm(m.a(x), 8, 1 + m.n.weight), **GROUP), PIXELS),
                                               ops.group_norm8),
    "layer norm with converted weights": ((Fragment(lambda m, x: m.a(m.n(x)), a=linear, n=lambda: InFloat(64)), TOKENS),
                                          ops.layer_norm8),
    "layer norm with a buffer": ((Fragment(lambda m, x: m.a(m.n(x)), a=linear, n=Buffered), TOKENS), ops.layer_norm8),
    "gelu by name": ((Fragment(lambda m, x: m.b(x[..., :64] * F.gelu(input=m.a(x))), a=linear, b=linear), TOKENS), ops.geglu8),
    "sum with a number": ((Fragment(lambda m, x: attend_to(m, split(m.q(x)) * 2 + 1.0, split(x)), q=linear, o=linear), TOKENS),
                          ops.rms_rope8),
    "products with numbers": ((Fragment(lambda m, x: attend_to(m, split(m.q(x)) * 2 + split(x) * 3, split(x)), q=linear,
                                        o=linear), TOKENS), ops.rms_rope8),
    "scaled sum": (rotated_sum(lambda q, r, cos, sin: torch.add(q * cos, r * sin, alpha=2)), ops.rms_rope8),
    "parts of a normed tensor": (rotated_sum(lambda q, r, cos, sin: torch.cat(q.split([2, 3], 1), 1) * cos + r * sin),
                                 ops.rms_rope8),
    "one angle for all": ((*rotated_sum(lambda q, r, cos, sin: q * cos + r * sin)[:2], *ONE_ROW), ops.rms_rope8),
    "keys for all images": ((Fragment(lambda m, x: attend_to(m, split(m.q(x)), split(x[:1])), q=linear, o=linear), TOKENS),
                            ops.attention8),
    "keys for all heads": ((Fragment(lambda m, x: attend_to(m, split(m.q(x)), split(x)[:, :, :1]), q=linear, o=linear), TOKENS),
                           ops.attention8),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_no_kernel_reads_as_it_is_written_stays(name):
    module, op = DECLINED[name]
    gm, reference, tensors = lower(*module)
    assert count(gm, op) == 0
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


@pytest.mark.parametrize(("body", "children", "x", "op"), [
    (lambda m, x: m.a(F.silu(input=m.n(x))), GROUP, PIXELS, ops.group_norm8),
    (lambda m, x: m.a(m.n(torch.cat([x[:, :24], x[:, 24:].half()], dim=1))), GROUP, PIXELS, ops.group_norm8),
    (lambda m, x: m.a(m.n(x.mean((2, 3), keepdim=True) + 1.0).expand(2, 64, 3, 3)), GROUP, PIXELS, ops.group_norm8),
    (lambda m, x: m.a(m.n(x[:1] + x.mean((2, 3), keepdim=True))), GROUP, PIXELS, ops.group_norm8),
    (lambda m, x: gated(m, x, lambda y: torch.chunk(y, chunks=2, dim=-1)), {"a": lambda: linear(128), "b": linear}, TOKENS,
     ops.geglu8),
], ids=["silu by name", "concatenation of dtypes", "sum with a number", "one image", "chunks by name"])
def test_what_lies_around_a_rewritten_call_may_be_written_in_any_way(body, children, x, op):
    gm, reference, tensors = lower(Fragment(body, **children), x)
    assert count(gm, op) == 1
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


@pytest.mark.parametrize(("module", "op"), [
    (rotated_sum(lambda q, r, cos, sin: torch.add(q * cos, other=r * sin)), ops.rms_rope8),
    (rotated_sum(lambda q, r, cos, sin: q * cos + torch.mul(r, other=sin)), ops.rms_rope8),
    ((Fragment(named_lists, q=linear, o=linear, n=Norms), TOKENS, noise(5, 16), noise(16, 5).T), ops.rms_rope8),
    ((Fragment(lambda m, x: gated_by_name(m, m.a(x)), a=lambda: linear(128), b=linear), TOKENS), ops.geglu8),
    ((Fragment(lambda m, x: m.b(torch.flatten(m.n(m.a(x)), 1, 1).swapaxes(1, 2).transpose(-1, 1)), a=linear, b=linear,
               n=lambda: nn.LayerNorm(64)), TOKENS), ops.layer_norm8),
    ((Fragment(attend_by_name, q=linear, o=linear), TOKENS), ops.attention8),
], ids=["sum", "product", "lists", "gate", "views", "attention"])
def test_arguments_may_be_given_by_name_and_calls_as_functions_or_methods(module, op):
    gm, reference, tensors = lower(*module)
    assert count(gm, op) == (0 if op is ops.layer_norm8 else 1)  # a layer norm's kernel has no views behind it
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(("body", "kernels"), [
    (lambda m, x: m.a(F.silu(m.n(x))), 1), (lambda m, x: m.a(m.n(x)), 1),
    (lambda m, x: m.a(F.silu(m.n(torch.cat([x[:, :24], x[:, 24:]], dim=1)))), 1),
    (lambda m, x: m.a(F.interpolate(x, scale_factor=2.0)), 0), (lambda m, x: m.a(F.layer_norm(x, (8,))), 0),
    (lambda m, x: m.a(m.a(x) + x), 0),
], ids=["silu", "norm", "concatenation", "upsampled", "norm of columns", "twice"])
def test_a_smoothed_convolution_reads_what_its_factors_are_in(body, kernels, precision):
    """With the factor of each channel in the kernel that writes the codes, or in the pass that does."""
    module = Fragment(body, a=lambda: conv(padding=1), n=lambda: nn.GroupNorm(8, 64))
    uneven = PIXELS * torch.linspace(0.1, 8, 64).view(1, 64, 1, 1)
    gm, reference, tensors = lower(module, uneven, precision=precision, smooth_convs=True)
    assert count(gm, ops.group_norm8) == kernels
    assert not [n for n in gm.graph.nodes if n.meta.get("smoothing")]
    _, plain, _ = lower(module, uneven, precision=precision)
    with torch.no_grad():
        smoothed, exact = gm(*tensors), module(uneven)
        assert measure.compare(smoothed, reference(*tensors)) < TOLERANCES["rounding_ties"]
        if precision == "int8" and kernels == 0:  # behind a norm all channels are alike
            assert measure.compare(smoothed, (exact,)) < measure.compare(plain(*tensors), (exact,))


@pytest.mark.parametrize(("make", "taken_in"), [
    (lambda x: torch.cat(tensors=[x[:, :24], x[:, 24:]], dim=1), True),
    (lambda x: torch.cat([x[:, :24], x[:, 24:]], -3), True),
    (lambda x: torch.cat([x[:1], x[1:]]), False),
    (lambda x: torch.cat(x.chunk(2, 1), 1), True),
    (lambda x: torch.cat([x[:, :24], x[:, 24:].half()], dim=1), False)],
    ids=["by name", "from behind", "images", "halves", "dtypes"])
def test_a_concatenation_of_two_is_read_where_it_lies_however_it_is_written(make, taken_in):
    gm, reference, tensors = lower(Fragment(lambda m, x: m.a(m.n(make(x))), **GROUP), PIXELS)
    (norm,) = gm.graph.find_nodes(op="call_function", target=ops.group_norm8)
    assert (norm.args[1] is not None) is taken_in
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


def test_a_group_norm_is_found_through_views_however_they_are_written():
    def body(m, x):
        return m.a(torch.permute(input=m.n(x), dims=(0, 2, 3, 1)).flatten(start_dim=1, end_dim=2))

    gm, reference, tensors = lower(Fragment(body, a=linear, n=lambda: nn.GroupNorm(8, 64)), PIXELS)
    assert count(gm, ops.group_norm8) == 1
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


def test_a_rewritten_call_may_be_read_by_another_one():
    def body(m, x):
        y = F.silu(m.n(F.silu(m.n(m.a(x))) + x.mean((2, 3))[:, :, None, None]))
        return attention(attention(F.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)))

    def attention(x):
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)

    gm, reference, tensors = lower(Fragment(body, **GROUP), PIXELS)
    assert count(gm, ops.group_norm8) == 2
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["int8_operator"]


def add_to_shared(m, x):
    h = same = torch.relu(x)
    h += torch.tanh(x)
    return m.a(m.n(h)) + same


def add_shift_to_shared(m, x):
    h = same = torch.relu(x)
    h += x.mean((2, 3), keepdim=True)
    return m.a(m.n(h)) + same[:, :, 1:-1, 1:-1]


def add_to_a_copy(m, x):
    h = torch.relu(m.a(x))
    copy = h / 1.0
    copy += 1.0
    return copy + h


def negate_behind_a_group_norm(m, x):
    x = torch.relu(x)
    h = m.n(x)
    x.neg_()
    return m.a(F.silu(h)) + x[:, :, 1:-1, 1:-1]


def negate_half_of_a_concatenation(m, x):
    left, right = torch.relu(x[:, :32]), torch.tanh(x[:, 32:])
    both = torch.cat([left, right], dim=1)
    left.neg_()
    return m.a(F.silu(m.n(both))) + left.mean()


def negate_a_sum(m, x):
    both = torch.relu(x) + torch.tanh(x)
    both.neg_()
    return m.a(m.n(both)) + both


def negate_a_gate(m, x):
    value, gate = m.a(x).chunk(2, dim=-1)
    gated = F.gelu(gate)
    gate.neg_()
    return m.b(value * gated) + gate


def negate_a_query(m, x):
    q = heads(torch.relu(x))
    y = F.scaled_dot_product_attention(q, heads(m.k(x)), heads(m.v(x)))
    q.neg_()
    return m.o(y.transpose(1, 2).reshape(2, -1, 64)) + q.mean()


@pytest.mark.parametrize(("body", "children", "x"), [
    (add_to_shared, NORM, TOKENS), (add_shift_to_shared, GROUP, PIXELS), (add_to_a_copy, {"a": linear}, TOKENS),
    (negate_behind_a_group_norm, GROUP, PIXELS), (negate_half_of_a_concatenation, GROUP, PIXELS), (negate_a_sum, NORM, TOKENS),
    (negate_a_gate, {"a": lambda: linear(128), "b": linear}, TOKENS), (negate_a_query, dict.fromkeys("kvo", linear), TOKENS)])
def test_what_is_changed_in_place_is_changed_for_all_who_read_it(body, children, x):
    gm, reference, tensors = lower(Fragment(body, **children), x)
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


def test_a_product_in_int8_applies_gelu_and_writes_the_codes():
    gm, _, _ = lower(*MODULES["gelu"])
    assert count(gm, ops.linear_gelu8) == count(gm, ops.linear8) == count(gm, torch.round) == 1  # the input's, and the second one
    gm, _, _ = lower(*MODULES["gelu"], precision="fp8")
    assert (count(gm, ops.linear_gelu8), count(gm, ops.linear8), count(gm, F.gelu)) == (0, 2, 0)


@pytest.mark.parametrize("body", [
    lambda m, x: m.b(F.gelu(m.a(x))),
    lambda m, x: m.b(F.gelu(y := m.a(x), approximate="tanh")) + y,
    lambda m, x: m.b(y := F.gelu(m.a(x), approximate="tanh")) + y,
    lambda m, x: m.b(F.gelu(m.a(x) + x, approximate="tanh")),
    lambda m, x: m.b(F.gelu(m.a(x).flatten(), approximate="tanh").view(2, 5, 64)),
], ids=["exact", "product read twice", "result read twice", "sum", "views"])
def test_a_gelu_that_no_product_can_apply_stays(body):
    gm, reference, tensors = lower(Fragment(body, a=linear, b=linear), TOKENS)
    assert count(gm, ops.linear_gelu8) == 0
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


def test_gelu_by_sigmoid_is_the_tanh_one():
    module = Fragment(lambda m, x: m.a(F.gelu(x * 8, approximate="tanh")) + F.gelu(x * 8, approximate="tanh"), a=linear)
    gm, reference, tensors = lower(module, TOKENS)
    assert count(gm, F.gelu) == 0
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["int8_operator"]


def test_readers_of_one_tensor_are_one_matrix_product_over_one_stored_weight():
    gm, _, _ = lower(*MODULES["three readers"])
    (product,) = gm.graph.find_nodes(op="call_function", target=ops.linear8)
    weight = getattr(gm, product.args[1].target)
    assert weight.shape == (192, 64)
    assert weight.untyped_storage().nbytes() == weight.numel()


def test_a_residual_is_added_by_the_convolution():
    gm, _, _ = lower(*MODULES["residual"])
    assert count(gm, operator.add) == count(gm, operator.truediv) == 0


def test_a_concatenation_and_a_shift_are_read_where_they_lie():
    assert count(lower(*MODULES["concatenation"])[0], torch.cat) == 0
    assert count(lower(*MODULES["shift"])[0], operator.add) == 0


@pytest.mark.parametrize("shape", [(1, 64), (2, 1), (1, 1)])
def test_a_shift_that_is_broadcast_over_images_or_channels_is_added_on_its_own(shape):
    module = Fragment(lambda m, x, t: m.a(m.n(x + t[:, :, None, None])), a=conv, n=lambda: nn.GroupNorm(8, 64))
    gm, reference, tensors = lower(module, PIXELS, noise(*shape))
    assert count(gm, ops.group_norm8) == count(gm, operator.add) == 1
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]


def test_a_mask_keeps_attention_as_it_is():
    gm, _, _ = lower(*MODULES["masked attention"])
    assert count(gm, ops.attention8) == 0
    assert count(gm, F.scaled_dot_product_attention) == 1


def test_a_norm_that_others_read_too_keeps_its_16_bit_result():
    gm, reference, tensors = lower(Fragment(lambda m, x: m.a(m.n(x)) + m.n(x), a=linear, n=lambda: nn.LayerNorm(64)), TOKENS)
    gm2, reference2, tensors2 = lower(Fragment(lambda m, x: shared(m, m.n(x)), a=linear, n=lambda: nn.LayerNorm(64)), TOKENS)
    assert count(gm2, ops.layer_norm8) == 0
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["rounding_ties"]
        assert measure.compare(gm2(*tensors2), reference2(*tensors2)) < TOLERANCES["rounding_ties"]


def shared(m, y):
    return m.a(y) + y


def test_a_group_norm_that_stays_in_16_bits_takes_its_silu_along():
    gm, reference, tensors = lower(Fragment(lambda m, x: F.silu(m.n(m.a(x))).mean((2, 3)), a=conv, n=lambda: nn.GroupNorm(8, 64)),
                                   PIXELS)
    assert count(gm, ops.group_norm8) == 1
    assert count(gm, F.silu) == 0
    with torch.no_grad():
        assert measure.compare(gm(*tensors), reference(*tensors)) < TOLERANCES["int8_operator"]


def test_only_what_changes_nothing_is_dropped():
    def body(m, x):
        return F.dropout(m.a(x), 0.5, training=False) / 1.0 + F.dropout(x, 0.5) / 2.0

    gm, _, _ = lower(Fragment(body, a=linear), TOKENS)
    assert count(gm, F.dropout) == 1
    assert count(gm, operator.truediv) == 1

"""Linears through TorchAO's int8 product: numbers, what it refuses, what the report says. On the CPU."""

import pytest
import torch
import torch.nn.functional as F
from fragments import Fragment, count, linear, noise, planned
from tolerances import TOLERANCES
from torch import nn

import sdtrt_backend
from sdtrt_backend import measure, ops
from sdtrt_backend.capture import bind
from sdtrt_backend.errors import OptionError
from sdtrt_backend.fx import propagate
from sdtrt_backend.lower import LOWERINGS, choose, torchao
from sdtrt_backend.lower.producers import simplify
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import for_torchao, insert, plan
from sdtrt_backend.rules import TORCHAO_KEEP, TORCHAO_MIN_ROWS

TOKENS = noise(2, 24, 64)
MODULES = {
    "linear": Fragment(lambda m, x: m.a(F.silu(x)), a=linear),
    "no bias": Fragment(lambda m, x: m.a(x), a=lambda: nn.Linear(64, 128, bias=False)),
    "three readers": Fragment(lambda m, x: m.q(x) + m.k(x) * m.v(x), q=linear, k=lambda: nn.Linear(64, 64, bias=False), v=linear),
    "layer norm": Fragment(lambda m, x: m.a(m.n(x)), a=linear, n=lambda: nn.LayerNorm(64)),
    "gelu": Fragment(lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh")), a=linear, b=linear),
}


@pytest.mark.parametrize("name", MODULES)
def test_torchaos_product_equals_the_graph_it_replaces(name):
    pytest.importorskip("torchao", reason="the product is TorchAO's: pip install torchao")
    captured, args, decisions, tensors = planned(MODULES[name], TOKENS)
    gm, reference = (insert(*bind(captured, args), decisions) for _ in range(2))
    propagate(gm, tensors)
    simplify(gm)
    torchao.to_torchao(gm)
    assert count(gm, torchao.linear) == (2 if name == "gelu" else 1)
    assert count(gm, ops.linear8) == 0
    with torch.no_grad(), measure.CountInt8() as counted:
        mine = gm(*tensors)
    with torch.no_grad():
        # behind a norm or gelu of another order of summation a rounding tie may fall to the other side
        assert measure.compare(mine, reference(*tensors)) < TOLERANCES["rounding_ties" if name in ("layer norm", "gelu")
                                                                       else "int8_operator"]
    assert counted.flops == 2 * 48 * 64 * sum(m.out_features for m in MODULES[name].modules() if isinstance(m, nn.Linear))


def test_a_module_runs_through_torchao_and_the_report_says_what_and_why_not(denoiser, recipe, inputs, tmp_path):
    pytest.importorskip("torchao", reason="the product is TorchAO's: pip install torchao")
    folder = str(recipe.save(tmp_path))
    sample, timestep, _ = inputs
    context = noise(2, 5, 64)

    def compiled(engine, exclude):
        torch._dynamo.reset()
        return torch.compile(denoiser, backend="sd_int8", options={"recipe": folder, "engine": engine, "exclude": exclude})

    mine = compiled("torchao", [])
    with torch.no_grad():
        y, full = mine(sample, timestep, context), denoiser(sample, timestep, context)
    report = sdtrt_backend.explain(mine)
    assert report.state == "ready"
    layers = {layer.name: layer for layer in report.layers}
    assert {layer.engine for layer in report.layers if layer.precision == "int8"} == {"torchao"}
    assert layers["to_q"].engine == layers["ff_out"].engine == "torchao"
    assert layers["context_k"].reason == f"its input has 10 rows, TorchAO's int8 product takes {TORCHAO_MIN_ROWS} or more"
    assert (layers["conv1"].engine, layers["conv1"].reason) == ("inductor", TORCHAO_KEEP["conv2d"])
    assert report.quantized_flops_share > 0.3
    assert 0 < measure.compare(y, full) < TOLERANCES["int8_step"]
    reference = compiled("reference", ["conv*", "context_*"])
    with torch.no_grad():
        assert measure.compare(y, reference(sample, timestep, context)) < TOLERANCES["kernels_vs_reference_step"]


def test_what_torchao_has_no_kernel_for_stays_with_the_reason(graph, recipe):
    decisions = {d.layer.name: d for d in plan(graph[0].layers, recipe, ())}
    conv = for_torchao(decisions["conv1"], noise(2, 64, 8, 8))
    assert (conv.precision, conv.reason) == ("16-bit", TORCHAO_KEEP["conv2d"])
    few, enough = (for_torchao(decisions["to_q"], noise(rows, 64)) for rows in (TORCHAO_MIN_ROWS - 1, TORCHAO_MIN_ROWS))
    assert f"its input has {TORCHAO_MIN_ROWS - 1} rows" in few.reason
    assert enough.quantized
    kept = decisions["conv_in"]
    assert for_torchao(kept, noise(2, 4, 8, 8)) is kept


def test_only_int8_on_cpus_and_gpus():
    assert choose(Options(engine="torchao"), torch.device("cpu")) == (LOWERINGS["torchao"], None)
    target, why = choose(Options(engine="torchao", precision="fp8"), torch.device("cpu"))
    assert target is None
    assert "runs int8 and not fp8: use sd_int8" in why
    assert "not on xpu" in choose(Options(engine="torchao"), torch.device("xpu"))[1]


def test_without_torchao_the_option_raises_with_the_install_line(monkeypatch):
    monkeypatch.setattr("sdtrt_backend.options.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"TorchAO is not installed: pip install 'sdtrt_backend\[torchao\]'"):
        Options.parse({"engine": "torchao"})
    with pytest.raises(OptionError, match="one of auto, inductor, tensorrt, torchao, reference"):
        Options.parse({"engine": "tensorflow"})

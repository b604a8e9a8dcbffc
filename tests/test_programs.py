"""What was compiled of a graph is loaded by the next process, for graphs that do the same alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from sdtrt_backend import fx as fx_helpers
from sdtrt_backend import measure, programs
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.lower import LOWERINGS, inductor_cpu, inductor_cuda
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import insert, plan

pytestmark = pytest.mark.slow


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path


@pytest.fixture
def compilations(monkeypatch):
    """How often Inductor was called."""
    calls = []

    def generated(*args):
        calls.append(args)
        return fx_helpers.generated(*args)

    monkeypatch.setattr(programs, "generated", generated)
    return calls


def lowered(graph, recipe):
    captured, args = graph
    gm = insert(*bind(captured, args), plan(captured.layers, recipe, ()))
    return LOWERINGS["inductor"].lower(gm, tensor_inputs(captured, args), Options(rest="float32")), tensor_inputs(captured, args)


def kept(caches):
    return sorted((caches / "own" / "programs").glob("*.json"))


@pytest.mark.parametrize("from_cpp", [False, True], ids=["called from Python", "called from C++"])
def test_a_second_lowering_loads_what_the_first_has_compiled(graph, recipe, caches, compilations, monkeypatch, from_cpp):
    monkeypatch.setattr(inductor_cpu, "LAYERS_FOR_CPP", 1 if from_cpp else 1000)
    first, tensors = lowered(graph, recipe)
    second, _ = lowered(graph, recipe)
    assert len(compilations) == len(kept(caches)) == 1
    assert compilations[0][2]["cpp_wrapper"] is from_cpp
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(first.step(*tensors), second.step(*tensors), strict=True))
    assert first.eight_bit_flops == second.eight_bit_flops > 0
    assert (caches / "own" / "programs").stat().st_mode & 0o777 == 0o700
    for one in second.derived:  # as after weights were written: what was loaded reads what is written to it
        one.renew()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(first.step(*tensors), second.step(*tensors), strict=True))


def test_what_was_loaded_reads_the_weights_of_its_own_module(graph, recipe, caches, compilations):
    first, tensors = lowered(graph, recipe)
    second, _ = lowered(graph, recipe)
    with torch.no_grad():
        before = first.step(*tensors)
        for one in second.derived:
            one.sources[1].mul_(2)  # its scales
            one.renew()
        assert measure.compare(second.step(*tensors), before) > 0.1
        assert measure.compare(first.step(*tensors), before) == 0


@pytest.mark.parametrize("from_cpp", [False, True], ids=["called from Python", "called from C++"])
def test_autocast_and_gradients_are_none_of_its_business(graph, recipe, caches, monkeypatch, from_cpp):
    monkeypatch.setattr(inductor_cpu, "LAYERS_FOR_CPP", 1 if from_cpp else 1000)
    step, tensors = lowered(graph, recipe)
    with torch.no_grad():
        expected = step.step(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = step.step(*(t.clone().requires_grad_(t.is_floating_point()) for t in tensors))
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("damage", ["the code was edited", "the code is gone", "the note was edited"])
def test_what_is_not_what_was_compiled_is_compiled_anew(graph, recipe, caches, compilations, caplog, damage):
    lowered(graph, recipe)
    (note,) = kept(caches)
    code = caches / "inductor" / json.loads(note.read_text())["file"]
    if damage == "the code was edited":
        code.write_text(code.read_text() + "\nraise SystemExit\n")
    elif damage == "the code is gone":
        code.unlink()
    else:
        note.write_text(note.read_text().replace("0", "1"))
    lowered(graph, recipe)
    assert len(compilations) == 2
    assert ("compiling anew" in caplog.text) is (damage != "the code is gone")  # which is no damage: caches are emptied


def traced(call, **buffers):
    """A graph of one call of a tensor."""
    graph, root = fx.Graph(), torch.nn.Module()
    for name, tensor in buffers.items():
        root.register_buffer(name, tensor)
    graph.output((call(graph, graph.placeholder("x")),))
    return fx.GraphModule(root, graph)


def named(gm, *shape, settings=None):
    return programs.key(gm, [torch.zeros(shape or (2, 3))], settings or {"a": 1}, Path(__file__))


def test_keys_tell_graphs_inputs_settings_autocast_and_threads_apart(monkeypatch):
    def sigmoid():
        return traced(lambda graph, x: graph.call_function(torch.sigmoid, (x,)))

    one = named(sigmoid())
    others = [named(traced(lambda graph, x: graph.call_function(torch.tanh, (x,)))), named(sigmoid(), 3, 2),
              named(sigmoid(), settings={"a": 2})]
    with torch.autocast("cpu", torch.bfloat16):
        others.append(named(sigmoid()))
    with torch._inductor.config.patch(epilogue_fusion=False):
        others.append(named(sigmoid()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.append(named(sigmoid()))
    assert named(sigmoid()) == others[-1]
    assert len({one, *others}) == 7


def test_a_graph_of_a_function_without_a_name_is_not_kept():
    assert named(traced(lambda graph, x: graph.call_function(lambda t: t + 1, (x,)))) is None


@pytest.mark.parametrize("small", [True, False])
def test_a_small_result_that_lies_in_an_input_is_copied_and_a_large_one_goes_through_torch(caches, monkeypatch, small):
    monkeypatch.setattr(programs, "SMALL", 6 if small else 5)
    gm, x = traced(lambda graph, x: graph.call_method("view", (x, 6))), torch.arange(6.0).view(2, 3)
    next(iter(gm.graph.find_nodes(op="call_method"))).meta["val"] = torch.empty(6, device="meta")
    call = programs.compiled(gm, [torch.zeros(2, 3)])
    (y,) = call([x])
    assert torch.equal(y, x.view(6))
    assert (y.data_ptr() == x.data_ptr()) is not small
    programs.keep("0" * 64, call, {}, {})
    assert len(kept(caches)) == small


def test_what_changes_a_tensor_of_its_own_is_kept_and_what_changes_an_input_is_not(caches):
    def filled(graph, x):
        return graph.call_method("fill_", (x, 2.0))

    own = traced(lambda graph, x: graph.call_method("mul", (filled(graph, graph.call_function(torch.zeros_like, (x,))), x)))
    given = traced(lambda graph, x: graph.call_method("mul", (filled(graph, x), 3.0)))
    x = torch.ones(2, 3)
    for number, (gm, expected) in enumerate([(own, 2.0), (given, 6.0)]):
        call = programs.compiled(gm, [torch.ones(2, 3)])
        assert (call([x])[0] == expected).all()
        programs.keep(str(number) * 64, call, {}, {})
    assert (x == 2).all()
    assert [path.stem[0] for path in kept(caches)] == ["0"]


def test_what_cpp_cannot_call_is_called_from_python_and_the_report_says_so(graph, recipe, caches, monkeypatch):
    monkeypatch.setattr(inductor_cpu, "LAYERS_FOR_CPP", 1)

    def generated(gm, inputs, settings):
        if settings["cpp_wrapper"]:
            raise NotImplementedError("no such operator in C++")
        return fx_helpers.generated(gm, inputs, settings)

    expected, tensors = lowered(graph, recipe)
    monkeypatch.setenv("SDTRT_CACHE", str(caches / "another"))
    monkeypatch.setattr(programs, "generated", generated)
    other, _ = lowered(graph, recipe)
    assert "no such operator in C++" in other.notes[0]
    assert lowered(graph, recipe)[0].notes == other.notes  # it is kept with what was compiled
    assert other.eight_bit_flops == expected.eight_bit_flops
    with torch.no_grad():
        assert measure.compare(other.step(*tensors), expected.step(*tensors)) < 1e-3


def test_a_constant_of_two_names_is_one_input():
    def call(graph, x):
        return graph.call_function(torch.add, (x, graph.call_function(
            torch.mul, (graph.get_attr("one"), graph.get_attr("other")))))

    tensor = torch.ones(3)
    gm = traced(call, one=tensor, other=tensor)
    assert [t is tensor for t in programs.as_inputs(gm)] == [True]
    assert dict(gm.named_buffers()) == {}
    assert torch.equal(gm(torch.zeros(3), tensor)[0], tensor)


def test_pieces_for_a_gpu_are_loaded_too_and_hold_no_constant(caches, compilations):
    def scaled(factor):
        gm = traced(lambda graph, x: graph.call_function(torch.mul, (graph.call_function(torch.sigmoid, (x,)),
                                                                     graph.get_attr("factor"))), factor=factor)
        return inductor_cuda.compiled(gm, [torch.zeros(2, 3)])

    x = torch.randn(2, 3)
    for factor in (torch.full((3,), 2.0), torch.full((3,), 5.0)):
        with torch.no_grad():
            assert torch.allclose(scaled(factor)(x)[0], x.sigmoid() * factor)
    assert len(compilations) == len(kept(caches)) == 1


class Wrapped(torch.Tensor):
    """More than a tensor."""


def test_what_a_graph_goes_on_holding_is_read_and_not_kept(caches, compilations):
    held = torch.full((3,), 2.0).as_subclass(Wrapped)
    for number in (2.0, 5.0):
        gm = traced(lambda graph, x: graph.call_function(torch.mul, (x, graph.get_attr("number"))),
                    number=held * (number / 2))
        assert torch.equal(torch.Tensor(programs.inductor(gm, [torch.zeros(3)])(torch.ones(3))[0]), torch.full((3,), number))
    assert len(compilations) == 2
    assert kept(caches) == []


def test_an_input_that_does_not_begin_where_the_code_takes_it_to_is_copied():
    given = []
    call = programs.called(SimpleNamespace(call=lambda tensors: given.extend(tensors)), aligned=(0,))
    memory = torch.arange(64.0)
    off, other = (memory.as_strided((3, 4), (1, 8), start) for start in (1, 1))
    assert off.data_ptr() % programs.ALIGNED
    call([off, other])
    assert given[0].data_ptr() % programs.ALIGNED == 0
    assert given[0].stride() == off.stride()
    assert torch.equal(given[0], off)
    assert given[1] is other  # of which nothing was assumed

"""Buffers that are other tensors after a move of the module, as offloading makes them around every picture."""

import gc

import pytest
import torch
from test_situations import CLOSE, ENGINES, REFERENCE, STEPS, Block, block_call, close, ready
from torch.multiprocessing.reductions import StorageWeakRef

from sdtrt_backend import state, unit
from sdtrt_backend.buffers import Buffers
from sdtrt_backend.constants import Constants
from sdtrt_backend.measure import compare


@pytest.fixture
def block():
    torch._dynamo.reset()
    yield Block().eval()
    torch._dynamo.reset()


@pytest.fixture
def built(monkeypatch):
    """Grows by one with every build."""
    built, build = [], unit.build
    monkeypatch.setattr(unit, "build", lambda request: built.append(1) or build(request))
    return built


def move(module):
    """As ``Module.to`` another device and back: parameters keep their identity, buffers do not."""
    before = module.shift
    module._apply(torch.clone)
    assert module.shift is not before


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_with_buffers_is_not_built_for_every_move(block, built, engine):
    compiled = ready(block, engine=engine)
    for _ in range(3):  # on a CPU the first looks notice that parameters have moved
        move(block)
        for _ in range(unit.JUDGED[0]):
            close(block_call(compiled), block_call(block))
    before = len(built)
    for _ in range(5):
        move(block)
        for t in STEPS:
            close(block_call(compiled, t), block_call(block, t))
    assert len(built) == before
    assert [len(s.units) for s in state.states(block)] == [1]


def test_a_buffer_alone_is_replaced_by_an_equal_one(block, built):
    compiled = ready(block, weights="keep")
    before, y = len(built), block_call(compiled)
    for _ in range(5):
        block.shift = block.shift.clone()
        assert torch.equal(block_call(compiled), y)
    assert len(built) <= before + 1  # its memory is looked at


@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_with_other_values_is_followed_by_the_next_call(block, built, engine):
    compiled = ready(block, engine=engine)
    for i in range(4):  # to values in the range of those that calibrated
        before = block_call(block)
        block.shift = -block.shift if i % 2 else block.shift.roll(1)
        assert compare(before, block_call(block)) > 2 * CLOSE
        close(block_call(compiled), block_call(block))
    assert len(built) <= 3


def test_a_buffer_that_is_written_after_a_move_is_followed_by_the_next_call(block):
    compiled = ready(block)
    for _ in range(3):
        block.shift = block.shift.clone()
        block_call(compiled)
        block.shift[:32].neg_()  # no element in its middle
        close(block_call(compiled), block_call(block))


@pytest.mark.parametrize("which", ["shift", "norm.bias"])
def test_a_constant_that_is_written_costs_one_build(block, built, which):
    compiled = ready(block)
    before, tensor = len(built), dict((*block.named_parameters(), *block.named_buffers()))[which]
    for _ in range(3):
        with torch.no_grad():
            tensor.neg_()
        for t in STEPS:
            close(block_call(compiled, t), block_call(block, t))
    assert len(built) == before + 1


def test_sizes_that_are_known_stay_known_after_a_move(block, built):
    compiled = ready(block)
    block_call(compiled, batch=3)
    block.shift = block.shift.clone()
    for batch in (5, 2, 3, 5, 2, 3):
        close(block_call(compiled, batch=batch), block_call(block, batch=batch))
    before = len(built)
    block.shift = block.shift.clone()
    for batch in (5, 2, 3, 5, 2, 3):
        close(block_call(compiled, batch=batch), block_call(block, batch=batch))
    assert len(built) == before


def test_buffers_of_before_are_let_go(block):
    compiled, memory = ready(block), []
    for _ in range(4):
        memory.append(StorageWeakRef(block.shift.untyped_storage()))
        block.shift = block.shift.clone()
        for _ in range(2 * unit.JUDGED[0]):
            block_call(compiled)
    assert sum(not m.expired() for m in memory) <= 1


def test_a_module_that_is_gone_leaves_no_buffer(block):
    compiled = torch.compile(block, backend="sd_int8", options=REFERENCE)
    for _ in range(3):
        for t in STEPS:
            block_call(compiled, t)
        move(block)
    (known,) = state.states(block)
    memory = [StorageWeakRef(t.untyped_storage()) for t in known.buffers.first.values()]
    assert memory
    state.forget(block)
    block.shift = torch.zeros(64)
    gc.collect()
    assert known.closed
    assert all(m.expired() for m in memory)


def test_two_modules_of_one_class_have_buffers_of_their_own():
    torch._dynamo.reset()
    blocks = [Block(seed).eval() for seed in (0, 1)]
    compiled = [ready(b) for b in blocks]
    for _ in range(2):
        for one in blocks:
            move(one)
        for mine, one in zip(compiled, blocks, strict=True):
            close(block_call(mine), block_call(one))
    torch._dynamo.reset()


def test_the_first_tensor_of_a_buffer_stands_for_those_after_it():
    buffers, a = Buffers(), torch.arange(3.0)
    assert buffers.first_of({4: a}, {id(a): "a"}) == ({4: a}, [])
    for b, changed in ((a.clone(), False), (a + 1, True)):
        found, others = buffers.first_of({4: b}, {id(b): "a"})
        assert found[4] is a
        assert [t is a for t in others] == [True] * changed
        assert a.data_ptr() == b.data_ptr()
        assert buffers.now[a] is b
    other, inference = torch.arange(4.0), torch.inference_mode()(torch.ones)(3)
    assert buffers.first_of({1: other}, {id(other): "a"}) == ({1: other}, [])  # of another form
    assert buffers.first_of({1: other}, {}) == ({1: other}, [])  # no buffer of the module
    assert buffers.first_of({1: inference}, {id(inference): "a"})[0][1] is inference
    assert buffers.of({1: "a", 2: "b"}) == {id(a), id(other)}
    assert buffers.of({2: "b"}) == set()


def test_what_is_written_is_counted_of_the_tensor_that_took_the_place():
    first, now, rest = torch.ones(2), torch.ones(2), torch.ones(2)
    frozen = Constants([first, rest])
    rest.add_(1)
    frozen.follow({first: now})
    assert frozen.written()  # of before
    frozen.accept()
    assert not frozen.written()
    before = first._version
    now.add_(1)
    assert frozen.written()
    assert first._version > before
    frozen.accept()
    assert not frozen.written()


def test_calibrating_goes_on_after_a_move(block):
    compiled = torch.compile(block, backend="sd_int8", options=REFERENCE | {"calibration_runs": 2})
    for _ in range(4):
        for t in STEPS:
            close(block_call(compiled, t), block_call(block, t))
        move(block)
    assert [s.status for s in state.states(block)] == ["ready"]

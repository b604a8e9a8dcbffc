"""Weights whose values are in host memory: everybody reads and writes them as before. (On a GPU: tests/gpu.)"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from collections import defaultdict

import pytest
import torch

from sdtrt_backend import weights

pytestmark = pytest.mark.usefixtures("weights_leave_the_cpu_too")


@pytest.fixture
def parameter():
    return torch.nn.Parameter(torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last))


def test_its_memory_is_another_and_its_values_are_the_same_to_the_bit(parameter):
    before, version, memory = parameter.detach().clone(), parameter._version, weights.key(parameter)
    weights.release([parameter])
    assert weights.away(parameter)
    assert weights.key(parameter) != memory
    assert torch.equal(parameter, before)
    assert (parameter.stride(), parameter._version) == (before.stride(), version)
    weights.restore([parameter])
    assert not weights.away(parameter)
    assert torch.equal(parameter, before)
    assert (parameter.stride(), parameter._version) == (before.stride(), version)


def test_the_memory_it_had_is_free(parameter):
    memory = weakref.ref(parameter.untyped_storage())
    weights.release([parameter])
    gc.collect()
    assert memory() is None


def test_host_memory_that_was_pinned_ahead_is_taken(monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 4096)
    parameters = [torch.nn.Parameter(torch.randn(10, 50)) for _ in range(5)]  # two in a chunk
    before, spare, started = [p.detach().clone() for p in parameters], defaultdict(list), threading.active_count()
    with weights.pinning(parameters, spare):
        while len(spare[torch.device("cpu")]) < 2:
            time.sleep(0.001)
    assert threading.active_count() == started
    (ahead,) = spare.values()
    assert [len(chunk) for chunk in ahead] == [4096, 4096]  # no more than they surely fill
    weights.release(parameters, spare)
    assert ahead == []
    assert all(map(torch.equal, parameters, before))


def test_memory_that_cannot_be_pinned_ahead_is_no_error(parameter, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", parameter.nbytes)
    spare, tried = defaultdict(list), threading.Event()

    def failing(size, device):
        tried.set()
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(weights, "pinned", failing)
    with weights.pinning([parameter], spare):
        assert tried.wait(10)
    assert not spare[parameter.device]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), lambda p: p.detach().clone()])
def test_it_can_be_copied(parameter, twin_of):
    weights.release([parameter])
    twin = twin_of(parameter)
    assert torch.equal(twin, parameter)
    assert not weights.away(twin)


def test_what_is_written_while_it_is_away_stays(parameter):
    weights.release([parameter])
    with torch.no_grad():
        parameter.mul_(2)
    parameter.data += 1
    expected = parameter.detach().clone()
    weights.restore([parameter])
    assert torch.equal(parameter, expected)


def test_what_is_written_while_it_is_borrowed_stays(parameter):
    weights.release([parameter])
    with weights.borrowed([parameter]):
        assert not weights.away(parameter)
        parameter.data += 1
        expected = parameter.detach().clone()
    assert weights.away(parameter)
    assert torch.equal(parameter, expected)


def test_it_is_on_its_device_while_anybody_borrows_it(parameter):
    weights.release([parameter])
    with weights.borrowed([parameter]):
        with weights.borrowed([parameter]):
            assert not weights.away(parameter)
        assert not weights.away(parameter)
        weights.release([parameter])
        assert not weights.away(parameter)
    assert weights.away(parameter)


def test_moved_while_it_was_borrowed_it_is_left_where_it_is(parameter):
    weights.release([parameter])
    with weights.borrowed([parameter]):
        parameter.data = parameter.data.to(torch.float64)
    assert parameter.dtype is torch.float64
    assert not weights.away(parameter)


def test_moved_by_somebody_else_it_is_no_longer_away(parameter):
    weights.release([parameter])
    before = parameter.detach().clone()
    parameter.data = parameter.data.clone()
    assert not weights.away(parameter)
    weights.restore([parameter])
    assert torch.equal(parameter, before)


def test_memory_that_two_share_stays(parameter):
    whole = torch.randn(8)
    half = torch.nn.Parameter(whole[:4])
    weights.release([half])
    assert not weights.away(half)


def test_a_weight_that_dies_is_forgotten():
    parameter = torch.nn.Parameter(torch.randn(3))
    weights.release([parameter])
    known = len(weights._SENT)
    del parameter
    gc.collect()
    assert len(weights._SENT) == known - 1


@pytest.fixture
def cpu_is_a_gpu(monkeypatch):
    """For parameters that were released there."""
    monkeypatch.setattr(weights, "on_a_gpu", lambda p: p in weights._SENT)


def test_what_lies_in_host_memory_is_moved_without_a_copy(parameter, cpu_is_a_gpu):
    """Both ways."""
    module, copied = torch.nn.Module(), []
    module.weight, module.other = parameter, torch.nn.Parameter(torch.randn(3))
    before = parameter.detach().clone()
    weights.release([parameter])
    address = parameter.data_ptr()

    def move(t):
        copied.append(tuple(t.shape))
        return t.clone()

    for _ in range(3):
        module._apply(weights.moving(move))
        assert not weights.away(parameter)  # a tensor of the CPU like any other
        with torch.no_grad():
            parameter.mul_(2)  # and written there
        module._apply(weights.moving(move))
        assert weights.away(parameter)
    assert (parameter.data_ptr(), parameter.stride()) == (address, before.stride())
    assert torch.equal(parameter, 8 * before)
    assert copied.count((2, 2, 2, 2)) == 6  # what tells where it goes
    assert before.shape not in copied
    assert copied.count((3,)) == 6
    gc.collect()
    assert parameter.untyped_storage().nbytes() == before.nbytes


@pytest.mark.parametrize("move", [lambda t: t.half(), lambda t: t.contiguous(), lambda t: t.half().clone()])
def test_a_move_that_changes_more_than_the_device_is_the_users_own(parameter, move, cpu_is_a_gpu):
    weights.release([parameter])
    expected = move(parameter.detach())
    moved = weights.moving(move)(parameter)
    assert torch.equal(moved, expected)
    assert (moved.dtype, moved.stride()) == (expected.dtype, expected.stride())


def test_host_memory_is_let_go_with_the_weights_that_lay_in_it(parameter, monkeypatch, cpu_is_a_gpu):
    monkeypatch.setattr(weights, "CHUNK", parameter.nbytes)
    module = torch.nn.Module()
    module.weight = parameter
    weights.release([parameter])
    module._apply(weights.moving(torch.clone))
    address = parameter.data_ptr()
    weights.restore([parameter])  # the state has ended: it moves like any other
    module._apply(weights.moving(torch.clone))
    gc.collect()
    assert parameter.data_ptr() != address
    assert address not in weights._PARTS
    assert not weights.away(parameter)

"""One value of each constant, by which a change is noticed. (CUDA graphs, and what sleeps on a GPU: tests/gpu.)"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sdtrt_backend.graphs import Elements, Memory, elements


def middle(t):
    return float(t[tuple(n // 2 for n in t.shape)])


@pytest.fixture
def constants():
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=noise), torch.randn(4, 6, 3, 3, generator=noise).to(memory_format=torch.channels_last),
            torch.randn(7, generator=noise).bfloat16(), torch.randn(8, 2, generator=noise).t(), torch.tensor(2.5),
            torch.arange(5), torch.randn(2, 9, generator=noise).half()[:, 1:]]


def test_elements_are_from_the_middle_of_each_in_order(constants):
    assert elements(constants).tolist() == [middle(t) for t in constants]
    assert elements([]).tolist() == []


def test_an_empty_tensor_and_one_elsewhere_have_none(constants):
    values = elements([constants[0], torch.empty(0, 3), torch.empty(3, device="meta"), constants[1]]).tolist()
    assert values[0] == middle(constants[0])
    assert values[1] != values[1]
    assert values[2] != values[2]
    assert values[3] == middle(constants[1])


def test_elements_that_are_read_again_and_again_follow_what_is_written(constants):
    read = Elements(constants)
    for i in range(4):
        assert read().tolist() == [middle(t) for t in constants]
        constants[i].data.neg_()
    assert read().tolist() == [middle(t) for t in constants]


def test_elements_follow_a_tensor_to_other_memory_and_hold_neither(constants):
    read = Elements(constants)
    for _ in range(3):  # by then it reads at the addresses that it knows
        read()
    memory = weakref.ref(constants[0].untyped_storage())
    constants[0].data = -constants[0].data
    gc.collect()
    assert memory() is None
    for _ in range(3):
        assert read().tolist() == [middle(t) for t in constants]


def test_a_change_is_told_by_the_version_or_by_the_value(constants):
    memory = Memory()
    memory.stamp(constants)
    assert memory.changed(constants) == []
    constants[0][0, 0] += 1  # a version, and not the value that is looked at
    constants[1].data.neg_()  # the value, and no version
    assert [id(t) for t in memory.changed(constants)] == [id(constants[0]), id(constants[1])]
    assert [id(t) for t in memory.differing(constants)] == [id(constants[1])]
    memory.forget({id(constants[0]), id(constants[1])})
    memory.stamp(constants)
    assert memory.changed(constants) == []


def test_a_constant_that_is_nan_has_not_changed():
    nan = torch.full((3,), float("nan"))
    memory = Memory()
    memory.stamp([nan])
    assert memory.changed([nan]) == []

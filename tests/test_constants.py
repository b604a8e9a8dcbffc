"""What tells that a constant was changed: its version, one of its values, where it is."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sdtrt_backend import weights
from sdtrt_backend.constants import Constants, Part, Stamps, elements


def middle(t):
    return float(t[tuple(n // 2 for n in t.shape)])


def again(constants):
    part = Part(constants)
    return lambda: part.elements(part.addresses())


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
    read = again(constants)
    for i in range(4):
        assert read().tolist() == [middle(t) for t in constants]
        constants[i].data.neg_()
    assert read().tolist() == [middle(t) for t in constants]


def test_elements_follow_a_tensor_to_other_memory_and_hold_neither(constants):
    read = again(constants)
    for _ in range(3):  # by then it reads at the addresses that it knows
        read()
    memory = weakref.ref(constants[0].untyped_storage())
    constants[0].data = -constants[0].data
    gc.collect()
    assert memory() is None
    for _ in range(3):
        assert read().tolist() == [middle(t) for t in constants]


def test_a_change_is_told_by_the_version_or_by_the_value(constants):
    stamps = Stamps()
    stamps.add(constants)
    assert stamps.changed(constants) == []
    constants[0][0, 0] += 1  # a version, and not the value that is looked at
    constants[1].data.neg_()  # the value, and no version
    assert [id(t) for t in stamps.changed(constants)] == [id(constants[0]), id(constants[1])]
    assert [id(t) for t in stamps.differing(constants)] == [id(constants[1])]
    stamps.forget({id(constants[0]), id(constants[1])})
    stamps.add(constants)
    assert stamps.changed(constants) == []


def test_a_constant_that_is_nan_has_not_changed():
    nan = torch.full((3,), float("nan"))
    stamps = Stamps()
    stamps.add([nan])
    assert stamps.changed([nan]) == []


def test_what_was_written_is_known_until_it_is_accepted(constants):
    frozen = Constants(constants)
    assert not frozen.written()
    constants[3].mul_(2)
    assert frozen.written()
    frozen.accept()
    assert not frozen.written()


def test_a_difference_is_found_again_after_equal_values(constants):
    stamps = Stamps()
    stamps.add(constants)
    part = Part(constants)
    values = elements(constants).tolist()
    assert part.differing(values, stamps) == []
    other = [*values[:2], values[2] + 1, *values[3:]]
    assert [id(t) for t in part.differing(other, stamps)] == [id(constants[2])]
    assert part.differing(values, stamps) == []


def test_what_a_step_reads_from_memory_that_was_replaced_has_moved(constants):
    part = Part(constants)
    reads, read_from = constants[:3], [weights.key(t) for t in constants[:3]]
    for _ in range(2):
        assert part.moved(reads, read_from, part.addresses()) == []
    held = constants[1].data
    constants[1].data = held.clone()
    constants[5].data = constants[5].clone()  # which the step does not read
    for _ in range(2):
        assert [id(t) for t in part.moved(reads, read_from, part.addresses())] == [id(constants[1])]


class Wrapped(torch.Tensor):
    """A tensor of a library's own class."""


def test_constants_of_a_class_of_their_own_are_looked_at_without_addresses(constants):
    part = Part([constants[0].as_subclass(Wrapped), constants[2]])
    assert part.addresses() is None
    assert part.elements(None).tolist() == [middle(constants[0]), middle(constants[2])]
    assert part.moved(constants[:1], [weights.key(constants[0])], None) == []


@pytest.mark.parametrize(("count", "every", "parts"), [(0, 1, 0), (1, 1, 1), (35, 1, 2), (63, 3, 2), (128, 4, 2), (277, 4, 4),
                                                       (600, 4, 7), (1680, 4, 7)])
def test_all_constants_are_looked_at_in_turn_and_a_change_of_many_at_the_next_look(count, every, parts):
    frozen = Constants([torch.zeros(1) for _ in range(count)])
    assert (frozen.every, len(frozen.parts)) == (every, parts)
    looks = [part for call in range(1, every * parts + 1) if (part := frozen.due(call)) is not None]
    assert sorted(id(t) for part in looks for t in part.tensors) == sorted(map(id, frozen.tensors))
    for period in (2, 4, 7, 26):  # parameters of a block
        for first in range(period):
            ids = {id(t) for t in frozen.tensors[first::period]}
            assert len(ids) < 24 or all(ids & {id(t) for t in part.tensors} for part in looks)

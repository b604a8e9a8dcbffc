"""16-bit weights that are away: no memory, the same to the bit when they come back. (On a GPU: tests/gpu.)"""

import torch

from sdtrt_backend.weights import Weights, key


def away(*parameters):
    weights = Weights()
    weights.released = list(parameters)
    weights._send()
    return weights


def test_a_weight_comes_back_to_the_bit_and_nobody_saw_it_change():
    parameter = torch.nn.Parameter(torch.randn(4, 5))
    before, version, identity = parameter.detach().clone(), parameter._version, key(parameter)
    weights = away(parameter)
    assert parameter.untyped_storage().nbytes() == 0
    assert parameter.shape == (4, 5)
    assert key(parameter) == identity
    weights.restore()
    assert torch.equal(parameter, before)
    assert parameter._version == version


def test_a_weight_is_there_while_anybody_borrows_it():
    parameter = torch.nn.Parameter(torch.randn(3))
    before = parameter.detach().clone()
    weights = away(parameter)
    with weights.borrowed():
        with weights.borrowed():
            assert torch.equal(parameter, before)
        assert torch.equal(parameter, before)
    assert parameter.untyped_storage().nbytes() == 0


def test_restored_while_borrowed_it_stays():
    parameter = torch.nn.Parameter(torch.randn(3))
    before = parameter.detach().clone()
    weights = away(parameter)
    with weights.borrowed():
        weights.restore()
    assert torch.equal(parameter, before)


def test_weights_on_the_cpu_and_shared_memory_are_never_sent_away():
    parameter = torch.nn.Parameter(torch.randn(3))
    weights = Weights()
    weights.release([parameter])
    assert weights.released == []
    assert parameter.untyped_storage().nbytes() == 12

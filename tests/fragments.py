"""Small modules for the lowerings, calibrated on their own inputs."""

import torch
from conftest import grab
from torch import nn

from sdtrt_backend.calibrate import Calibration, Observer
from sdtrt_backend.capture import tensor_inputs
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import plan


class Fragment(nn.Module):
    """A module of the given children; ``body`` is its forward."""

    def __init__(self, body, **children):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        for name, make in children.items():
            setattr(self, name, make())

    def forward(self, *inputs):
        return self.body(self, *inputs)


def planned(module, *inputs, alpha=0.5, **how):
    """(captured, args, decisions, tensors) of a module calibrated on its own inputs. how: arguments of ``plan``."""
    torch._dynamo.reset()
    captured, args = grab(module.eval(), inputs)
    calibration, weights = Calibration(), {layer.name: layer.weight for layer in captured.layers}
    calibration.start_call(0.0)
    with torch.no_grad():
        Observer(captured.graph, captured.layer_names(),
                 lambda name, op, axis, a: calibration.observe(name, op, a[0], weights[name], axis)).run(*args)
    decisions = plan(captured.layers, calibration.recipe(Options(alpha=alpha), {}), (), **how)
    assert any(d.quantized for d in decisions)
    return captured, args, decisions, tensor_inputs(captured, args)


def linear(features=64):
    return nn.Linear(64, features)


def conv(**geometry):
    return nn.Conv2d(64, 64, 3, **geometry)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def count(gm, target, op="call_function"):
    return len(gm.graph.find_nodes(op=op, target=target))


TOKENS, PIXELS = noise(2, 5, 64), noise(2, 64, 9, 8)

"""Fixtures that several files share: the toy denoiser, captured and calibrated."""

import contextlib
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from toy import ToyDenoiser

from sdtrt_backend import step, weights
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.capture import capture
from sdtrt_backend.options import Options
from sdtrt_backend.unit import Unit

# How fast a machine draws examples is no property of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items):
    if "SDTRT_LONG" not in os.environ:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="SDTRT_LONG=1 runs it: half a minute or more"))


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_run(tmp_path_factory):
    """Measured times of kernels and built engines of a test run are not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDTRT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make_denoiser():
    torch._dynamo.reset()
    return lambda seed=0: ToyDenoiser(seed).eval()


@pytest.fixture
def denoiser(make_denoiser):
    return make_denoiser()


@pytest.fixture
def killed_before(monkeypatch):
    """``with killed_before(name):`` the process is stopped before the file of that name is put in place."""
    @contextlib.contextmanager
    def until(name):
        replacing = os.replace

        def stop(source, target):
            if target.name == name:
                raise KeyboardInterrupt
            replacing(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                yield

    return until


@pytest.fixture
def weights_leave_the_cpu_too(monkeypatch):
    """What a GPU does with ``weights="release"``: their values move to other memory, where everybody still reads them."""
    monkeypatch.setattr(weights, "can_leave", lambda p: p.untyped_storage().nbytes() == p.numel() * p.element_size())


@pytest.fixture
def inputs():
    noise = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=noise), torch.tensor(500), torch.randn(2, 5, 64, generator=noise)


def grab(module, *calls):
    """What Dynamo hands to a backend and then passes to its callable, for the last of the calls."""
    found = []

    def backend(graph, example_inputs):
        captured = capture(graph, example_inputs)

        def run(*args):
            found.append((captured, args))
            return graph(*args)

        return run

    compiled = torch.compile(module, backend=backend)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    return found[-1]


@pytest.fixture
def graph(denoiser, inputs):
    """(Captured, args as Dynamo passes them)."""
    return grab(denoiser, inputs)


@pytest.fixture
def recipe(denoiser, inputs):
    calibration = Calibration()
    with torch.no_grad(), observed(denoiser, calibration):
        denoiser(*inputs)
    return calibration.recipe(Options(alpha=0.5), {})


@pytest.fixture
def steps(monkeypatch):
    """Every Unit that is made, in order: one per graph of Dynamo's and module."""
    made = []

    class Recorded(Unit):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(step, "Unit", Recorded)
    return made

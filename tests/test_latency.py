"""The times of a pipeline's parts, on a pipeline of sleeping modules."""

import time

import pytest
import torch

from sdtrt_backend.latency import Stopwatch


class Sleep(torch.nn.Module):
    """Takes ``ms``."""

    def __init__(self, ms):
        super().__init__()
        self.ms = ms

    def forward(self, x):
        time.sleep(self.ms / 1e3)
        return x


class Pipe:
    """A text encoder of 20 ms, called twice, steps of 30 ms and a decoder of 40 ms."""

    def __init__(self):
        self.text_encoder, self.unet, self.vae = Sleep(20), Sleep(30), torch.nn.Module()
        self.vae.decoder = Sleep(40)
        self.components = {"text_encoder": self.text_encoder, "text_encoder_2": None, "unet": self.unet, "vae": self.vae,
                           "tokenizer": object()}

    def __call__(self, tick, steps):
        self.text_encoder(self.text_encoder(0))
        for _ in range(steps):
            self.unet(0)
            tick()
        self.vae.decoder(0)


@pytest.fixture(params=["plain", "compiled"])
def watch(request):
    pipe = Pipe()
    parts = [pipe.text_encoder, pipe.unet, pipe.vae.decoder] if request.param == "compiled" else []
    for part in parts:
        part.compile(backend="eager")
        part(0)
    before = [part._compiled_call_impl for part in parts]
    watch = Stopwatch(pipe)
    for steps in (3, 3, 5):
        with watch.picture():
            pipe(watch.tick, steps)
    watch.close()
    assert [part._compiled_call_impl for part in parts] == before
    pipe(lambda: None, 1)  # no longer seen
    return watch


def test_each_part_is_timed_where_it_runs(watch):
    rows = {row[0]: row[1:] for row in watch.rows()}
    assert list(rows) == ["text_encoder", "denoiser step", "vae decoder", "pipeline"]
    assert [calls for calls, *_ in rows.values()] == [6, 2 + 2 + 4, 3, 3]
    for name, least in (("text_encoder", 20), ("denoiser step", 30), ("vae decoder", 40), ("pipeline", 40 + 90 + 40)):
        _, mean, median, worst = rows[name]
        assert least <= median <= worst
        assert least <= mean <= worst
    assert rows["denoiser step"][1] < 60


def test_pictures_that_do_not_count_are_left_out(watch):
    rows = {row[0]: row[1] for row in watch.rows(lambda picture: picture == 2)}
    assert rows == {"text_encoder": 2, "denoiser step": 4, "vae decoder": 1, "pipeline": 1}
    assert watch.rows(lambda picture: False) == []

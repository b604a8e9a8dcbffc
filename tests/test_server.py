"""``sdtrt serve`` with Ray, the bundled model and OpenAI's client."""

import base64
import concurrent.futures
import io
import os
import random
import signal
import socket
import time
from dataclasses import replace

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

import sdtrt_backend
from sdtrt_backend.serving.ask import checked
from sdtrt_backend.serving.http import Server, begin, end
from sdtrt_backend.serving.painter import Painter, Setup

pytestmark = pytest.mark.slow
DRAW = "/v1/images/generations"
LONG = "SDTRT_LONG" in os.environ
BODIES, PICTURES = 500, 1000 if LONG else 60
QUEUE = 12
# nothing of them is about the kernels, and the reference lowering takes no minute to build
EIGHT_BITS = Setup(steps=2, batches=(4,), threads=1, prompts=("owl, noto style", "rocket, fluent style"),
                   options={"engine": "reference", "max_error": 1.0})
OWN = Setup(backend=None, steps=2, max_steps=4, batches=(1, 4), sizes=((64, 64), (96, 64)), threads=1, max_prompt=200)


@pytest.fixture(scope="module")
def url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def serving(url):
    """setup -> a client of a server that was made so; Ray is started once, and stopped at the end."""
    def start(setup, **how):
        begin(setup, Server(port=int(url.rpartition(":")[2]), queue=QUEUE, wait_s=0.2, **how))
        return httpx.Client(base_url=url, timeout=180)

    yield start
    end()


@pytest.fixture(scope="module")
def own(serving):
    """In the bundled model's own precision."""
    return serving(OWN)


def metrics(client):
    """Sums over labels."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"] if isinstance(image, dict) else image.b64_json))))


def replicas():
    """Processes of those that draw."""
    return [p for p in psutil.process_iter(["cmdline"])
            if any("ServeReplica:sdtrt:Replica" in text for text in p.info["cmdline"] or ())]


def test_pictures_are_the_painters(own):
    answer = own.post(DRAW, json={"prompt": "owl", "seed": 5, "size": "96x64"}).json()
    painter = Painter(OWN)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = painter.draw([checked({"prompt": "owl", "seed": 5, "size": "96x64"}, painter.facts)]).pictures[0]
    finally:
        torch.set_num_threads(threads)
    assert answer["size"] == "96x64"
    assert np.array_equal(pixels(answer["data"][0]), np.asarray(expected))


def test_eight_at_once_are_drawn_together(own):
    before = metrics(own)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: own.post(DRAW, json={"prompt": "owl", "seed": i}), range(8)))
    after = metrics(own)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 8
    drawn, batches = (after[name] - before.get(name, 0) for name in ("sdtrt_pictures_total", "sdtrt_batch_size_sum"))
    assert drawn == 8
    assert batches / drawn > 2  # of at most 4


def test_beyond_the_queue_it_is_429_with_the_time_to_wait(own):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: own.post(DRAW, json={"prompt": "owl", "n": 4, "seed": i}), range(6)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) >= 3
    assert statuses.count(429) >= 1
    assert set(statuses) == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


@pytest.mark.parametrize("fields", [{"n": 11}, {"steps": 5}, {"size": "4096x4096"}, {"prompt": "x" * 201}])
def test_what_is_too_large_is_400(own, fields):
    answer = own.post(DRAW, json={"prompt": "owl", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(fields))


def test_edits_begin_at_the_picture(own):
    means = []
    for colour in ("red", "blue"):
        file = io.BytesIO()
        Image.new("RGB", (50, 70), colour).save(file, "PNG")
        answer = own.post("/v1/images/edits", files={"image": ("photo.png", file.getvalue())},
                          data={"prompt": "owl", "seed": "1", "strength": "0.25", "steps": "4"})
        means.append(pixels(answer.json()["data"][0]).reshape(-1, 3).mean(0))
    (red, _, no_blue), (no_red, _, blue) = means
    assert red > no_red + 20
    assert blue > no_blue + 20
    broken = own.post("/v1/images/edits", files={"image": ("photo.png", b"no picture")}, data={"prompt": "owl"})
    assert broken.status_code == 400
    assert broken.json()["error"]["param"] == "image"


def some_body(draw):
    """A request's body, right or wrong in one place or all over."""
    good = {"prompt": "owl", "seed": draw.randrange(9), "n": 1, "steps": 1}
    wrong = [None, True, -1, 0, 1e300, 10**30, "", "\x00", "x" * 300, [], [[]], {}, {"a": 1}, "auto", "64x64"]
    others = ["size", "guidance", "loras", "negative_prompt", "model", "response_format", "x"]
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        good[draw.choice([*good, *others])] = draw.choice(wrong)
    return good


def test_no_body_is_a_fault_of_the_server(own):
    def send(seed):
        draw = random.Random(seed)
        if draw.random() < 0.9:
            return own.post(DRAW, json=some_body(draw))
        return own.post(draw.choice((DRAW, "/v1/images/edits", "/v1/x")), content=draw.randbytes(draw.randrange(300)))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(BODIES)))
    statuses = [answer.status_code for answer in answers]
    assert all(answer.json()["error"]["message"] for answer in answers if answer.status_code != 200)
    assert set(statuses) <= {200, 400, 404}
    assert min(map(statuses.count, (200, 400, 404))) > 3
    assert metrics(own)["sdtrt_pending_pictures"] == 0


def test_memory_does_not_grow(own):
    def draw(count):
        for i in range(count // 4):
            body = {"prompt": "owl", "n": 4, "steps": 1, "seed": i, "response_format": "url"}
            assert own.post(DRAW, json=body).status_code == 200
        return sum(p.memory_info().rss for p in replicas())

    before = draw(20)
    assert draw(PICTURES) - before < 40e6


def test_a_client_that_hangs_up_is_dropped(own):
    with pytest.raises(httpx.ReadTimeout):
        own.post(DRAW, json={"prompt": "owl", "n": 8, "steps": 4}, timeout=0.3)
    deadline = time.monotonic() + 20
    while metrics(own)["sdtrt_pending_pictures"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert metrics(own)["sdtrt_pending_pictures"] == 0
    assert 'status="gone"' in own.get("/metrics").text


def test_a_killed_replica_comes_back_and_loses_nothing(own):
    killed = replicas()
    assert len(killed) == 1
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(own.post, DRAW, json={"prompt": "owl", "n": 4, "steps": 4, "seed": i}) for i in range(3)]
        time.sleep(0.5)
        os.kill(killed[0].pid, signal.SIGKILL)
        found = [answer.result() for answer in answers]
    assert [answer.status_code for answer in found] == [200] * 3
    assert metrics(own)["sdtrt_retried_pictures_total"] >= 1
    assert own.get("/readyz").status_code == 200
    assert replicas()[0].pid != killed[0].pid


def test_openais_client_draws_in_8_bits_with_a_lora(serving, url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    unet, noise = sdtrt_backend.demo_pipeline().unet, torch.Generator().manual_seed(1)
    factors = {}
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            shapes = {"A": (4, layer.in_features), "B": (layer.out_features, 4)}
            factors |= {f"unet.{name}.lora_{f}.weight": torch.randn(*shape, generator=noise) * 0.2 for f, shape in shapes.items()}
    save_file(factors, folder / "ink.safetensors")
    plain = serving(replace(EIGHT_BITS, loras=str(folder)))
    assert plain.get("/healthz").status_code == plain.get("/readyz").status_code == 200
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny-emoji"]

    def draw(**fields):
        asked = client.images.generate(model="tiny-emoji", prompt="owl, noto style", size="64x64",
                                       extra_body={"seed": 3, **fields})
        return pixels(asked.data[0])

    first, with_lora, again = draw(), draw(loras={"ink": 1.0}), draw()
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, with_lora)
    with pytest.raises(openai.BadRequestError, match="valid: ink"):
        draw(loras={"pen": 1.0})
    states = [s.labels["state"] for family in text_string_to_metric_families(plain.get("/metrics").text)
              for s in family.samples if s.name == "sdtrt_step_state"]
    assert states == ["ready"]

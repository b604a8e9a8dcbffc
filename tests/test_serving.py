"""What may be asked of a served pipeline, how asks become calls, and what a request's body says: without a server."""

import asyncio
import base64
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError
from starlette.requests import Request

from sdtrt_backend.errors import OptionError, RequestError, SdtrtError
from sdtrt_backend.serving.answers import Held, Refused, asks_of, read_form, read_json
from sdtrt_backend.serving.ask import FIELDS, Facts, checked
from sdtrt_backend.serving.batcher import Batcher
from sdtrt_backend.serving.http import Door, Picture, Server, _reason
from sdtrt_backend.serving.load import Outcome, Plan, chart, summary
from sdtrt_backend.serving.painter import Setup

FACTS = Facts("emoji", "StableDiffusionPipeline", ((64, 64), (96, 64)), steps=25, max_steps=50, max_prompt=200, guidance=5.0,
              guided=True, negative=True, loras=("ink",), edits=("image",), batches=(1, 4))


def test_facts_go_through_json():
    assert Facts.from_json(json.loads(json.dumps(FACTS.to_json()))) == FACTS


def test_what_is_left_out_is_the_servers():
    ask = checked({"prompt": "owl", "size": None}, FACTS)
    assert (ask.width, ask.height, ask.steps, ask.guidance, ask.negative, ask.loras) == (64, 64, 25, 5.0, None, ())
    assert checked({"prompt": "owl"}, FACTS).seed != checked({"prompt": "owl"}, FACTS).seed


@pytest.mark.parametrize(("field", "value", "says"), [
    ("prompt", "", "say what to draw"), ("prompt", 3, "expects a text, got 3"), ("prompt", "x" * 201, "at most 200"),
    ("prompt", "\ud800", "surrogate"), ("size", "32x32", "one of 64x64, 96x64 or auto"), ("size", [64], "one of"),
    ("steps", 51, "from 1 to 50"), ("steps", True, "from 1 to 50"), ("steps", 2.0, "from 1 to 50"), ("seed", -1, "from 0"),
    ("seed", 2**63, "from 0"), ("guidance", 1, "above 1"), ("guidance", float("nan"), "a number from 1 to 30"),
    ("guidance", "high", "a number"), ("loras", {"pen": 1}, "valid: ink"), ("loras", {"ink": "much"}, "a weight"),
    ("loras", 3, "names"), ("negative_prompt", 3, "expects a text"), ("bogus", 1, "valid: prompt, negative_prompt")])
def test_what_cannot_be_drawn_is_said_by_its_field(field, value, says):
    with pytest.raises(RequestError, match=says) as raised:
        checked({"prompt": "owl", field: value}, FACTS)
    assert raised.value.field == field


def test_a_pipeline_without_negative_prompts_says_so():
    with pytest.raises(RequestError, match="takes no negative prompt"):
        checked({"prompt": "owl", "negative_prompt": "cat"}, replace(FACTS, negative=False))


ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "n", "model", "response_format", "output_format", "quality", "x"]), ANYTHING))
def test_any_body_is_asks_or_a_named_error(body):
    wrong = None
    try:
        asks, form, _ = asks_of(body, {}, FACTS)
    except RequestError as error:
        wrong = error
    if wrong:
        assert wrong.field in (*body, "prompt")
        assert str(wrong)
    else:
        assert 1 <= len(asks) <= 10
        assert form in ("png", "jpeg", "webp")


def test_pictures_of_a_request_have_seeds_one_after_the_other():
    asks, _, as_url = asks_of({"prompt": "owl", "n": 3, "seed": 7, "response_format": "url", "user": "me"}, {}, FACTS)
    assert [ask.seed for ask in asks] == [7, 8, 9]
    assert as_url


@pytest.mark.parametrize(("body", "says"), [
    ({"model": "other"}, "'emoji'"), ({"quality": "hd"}, "leave it out"), ({"n": 11}, "1 to 10"),
    ({"stream": True}, "leave it out"),
    ({"response_format": "file"}, "b64_json, url")])
def test_what_openai_has_and_this_server_not_is_refused(body, says):
    with pytest.raises(RequestError, match=says):
        asks_of({"prompt": "owl", **body}, {}, FACTS)


def test_edits_are_of_what_the_pipeline_can():
    asks, _, _ = asks_of({"prompt": "owl", "strength": 0.5}, {"image": b"x"}, FACTS)
    assert (asks[0].image, asks[0].strength) == (b"x", 0.5)
    for files, fields, says in (({"image": b"x", "mask": b"y"}, {}, "draws from no mask"),
                                ({"image": b"x"}, {"strength": 2}, "0.1 to 1"),
                                ({"image": b"x", "photo": b"y"}, {}, "valid: image, mask")):
        with pytest.raises(RequestError, match=says):
            asks_of({"prompt": "owl", **fields}, files, FACTS)


def request(body, content_type="application/json", pieces=3):
    """A request whose body comes in pieces."""
    step = max(1, -(-len(body) // pieces))
    parts = [body[i : i + step] for i in range(0, len(body), step)] or [b""]
    messages = iter([{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)])

    async def receive():
        return next(messages)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", content_type.encode())]}
    return Request(scope, receive)


@pytest.mark.parametrize(("body", "status"), [
    (b"{", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 9000, 400), (b" " * 70_000, 413)])
def test_a_body_that_is_no_object_is_refused(body, status):
    with pytest.raises(Refused) as raised:
        asyncio.run(read_json(request(body)))
    assert raised.value.answer.status_code == status
    assert json.loads(raised.value.answer.body)["error"]["type"] == "invalid_request_error"


def form(*parts):
    lines = b"".join(b'--b\r\ncontent-disposition: form-data; name="' + name + b'"' + (b'; filename="f"' if is_file else b"")
                     + b"\r\n\r\n" + value + b"\r\n" for name, value, is_file in parts)
    return request(lines + b"--b--\r\n", "multipart/form-data; boundary=b")


def test_a_forms_numbers_are_numbers_and_its_prompt_a_text():
    given, files = asyncio.run(read_form(form((b"prompt", b"7", False), (b"n", b"2", False), (b"size", b"64x64", False),
                                              (b"image", b"png", True))))
    assert (given, files) == ({"prompt": "7", "n": 2, "size": "64x64"}, {"image": b"png"})


def test_a_form_without_a_picture_or_with_too_many_is_refused():
    with pytest.raises(RequestError, match="the file of an image"):
        asyncio.run(read_form(form((b"prompt", b"owl", False))))
    with pytest.raises(Refused, match="Too many files"):
        asyncio.run(read_form(form(*[(b"image", b"png", True)] * 4)))
    for body, kind in ((b"junk", "multipart/form-data; boundary=b"), (b"--b\r\nx\r\n", "multipart/form-data")):
        with pytest.raises(Refused, match="expected multipart/form-data"):
            asyncio.run(read_form(request(body, kind)))


def test_pictures_behind_urls_are_held_in_bounds(monkeypatch):
    from sdtrt_backend.serving import answers

    monkeypatch.setattr(answers, "HELD_BYTES", 10)
    held = Held()
    names = [held.add(b"1234", "png") for _ in range(4)]
    assert [name in held.files for name in names] == [False, False, True, True]
    assert held.get(names[-1]).body == b"1234"
    monkeypatch.setattr(answers.time, "monotonic", lambda: 1e12)
    with pytest.raises(Refused, match="no such picture"):
        held.get(names[-1])


@dataclass(frozen=True)
class Fake:
    """An ask."""

    number: int
    alike: str = "a"


def batched(draw, most=4, wait_s=0.05):
    return Batcher(draw, most, wait_s, ThreadPoolExecutor(1))


def test_asks_that_are_alike_become_one_call():
    calls = []

    def draw(asks):
        calls.append([ask.number for ask in asks])
        return [ask.number * 10 for ask in asks]

    async def main():
        batcher = batched(draw)
        asks = [Fake(i, "ab"[i % 2]) for i in range(12)]
        return await asyncio.gather(*map(batcher.draw, asks))

    assert asyncio.run(main()) == [i * 10 for i in range(12)]
    assert sorted(map(len, calls)) == [2, 2, 4, 4]
    assert all(len({number % 2 for number in call}) == 1 for call in calls)


def test_a_lone_ask_waits_no_longer_than_it_was_told_to():
    async def main():
        batcher, loop = batched(list, wait_s=0.05), asyncio.get_running_loop()
        begin = loop.time()
        await batcher.draw(Fake(0))
        return loop.time() - begin

    assert 0.04 < asyncio.run(main()) < 1


def test_who_has_gone_is_not_drawn():
    calls = []

    async def main():
        batcher = batched(lambda asks: calls.extend(asks) or asks)
        tasks = [asyncio.create_task(batcher.draw(Fake(i))) for i in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert [ask.number for ask in calls] == [0, 2]


def test_one_that_cannot_be_drawn_takes_no_other_along():
    def draw(asks):
        if any(ask.number == 1 for ask in asks):
            raise RequestError("image", "no picture")
        return list(asks)

    async def main():
        batcher = batched(draw)
        return await asyncio.gather(*[batcher.draw(Fake(i)) for i in range(3)], return_exceptions=True)

    found = asyncio.run(main())
    assert found[0] == Fake(0)
    assert found[2] == Fake(2)
    assert isinstance(found[1], RequestError)


def test_a_call_that_fails_fails_its_asks_and_no_later_one():
    def draw(asks):
        if asks[0].number == 0:
            raise MemoryError
        return list(asks)

    async def main():
        batcher = batched(draw, most=1)
        return await asyncio.gather(*[batcher.draw(Fake(i)) for i in range(2)], return_exceptions=True)

    found = asyncio.run(main())
    assert isinstance(found[0], MemoryError)
    assert found[1] == Fake(1)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"dtype": "int4"}, "dtype expects one of auto"), ({"batches": ()}, "batches expects"),
    ({"batches": (0,)}, "batches expects"),
    ({"sizes": ((60, 64),)}, "multiples of 8"), ({"steps": 200}, "from 1 to max_steps"),
    ({"options": {"bogus": 1}}, "unknown option"), ({"backend": None, "loras": "x"}, "takes no recipe"),
    ({"model": "x"}, "model_index.json is missing"), ({"loras": "x"}, r"holds no \.safetensors"), ({"recipe": "x"}, "recipe x"),
    ({"bundle": "x"}, "make one with sdtrt bundle")])
def test_a_setup_that_cannot_work_is_refused_before_anything_is_loaded(wrong, says):
    with pytest.raises(SdtrtError, match=says):
        Setup(**wrong).check()


@pytest.mark.parametrize(("wrong", "says"), [
    ({"api": "grpc"}, "api expects"), ({"api": "triton"}, "name of a model"), ({"rate": 0.0}, "rate expects"),
    ({"duration_s": 1e9}, "at most 3600"), ({"prompts": ()}, "no prompt")])
def test_a_load_out_of_bounds_is_refused(wrong, says):
    with pytest.raises(OptionError, match=says):
        Plan(**{"url": "http://x", "prompts": ("owl",), **wrong}).check()


def test_a_summary_counts_what_was_drawn_refused_and_failed():
    outcomes = [Outcome(i, 1 + i / 100, "200", 2) for i in range(100)]
    outcomes += [Outcome(5, 0.1, "429", 0), Outcome(6, 9.0, "ReadTimeout", 0)]
    random.Random(0).shuffle(outcomes)
    found = summary(outcomes)
    assert (found["requests"], found["pictures"], found["refused"], found["failed"]) == (102, 200, 1, 1)
    assert found["p50"] == pytest.approx(1.495)
    assert found["p99"] == pytest.approx(1.9801)
    assert found["pictures_per_s"] == pytest.approx(200 / 100.99)
    assert summary([])["p50"] is None
    svg = chart({"a < b": outcomes, "nobody": []})
    assert "a &lt; b: 100 answers" in svg
    assert "nobody: 0 answers" in svg


class Answering:
    """Stands for the replicas: gives what ``answers`` give in turn, the last one for ever."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    @property
    def facts(self):
        return SimpleNamespace(remote=lambda: self.give(FACTS))

    @property
    def draw(self):
        return SimpleNamespace(remote=self.drawn)

    def drawn(self, ask, form):
        self.asked.append(ask)
        return self.give(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    async def give(self, answer):
        if isinstance(answer, BaseException) and not isinstance(answer, RequestError):
            raise answer
        await asyncio.sleep(0.01)
        return answer


PICTURE = Picture(b"png", 0.5, 2, "r1", {"state": "ready", "fallbacks": ["x stays"], "notes": []})


def ask(door, path, body=None, method=None, headers=()):
    return asyncio.run(asked(door, path, body, method, headers))


async def asked(door, path, body=None, method=None, headers=()):
    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    scope = {"type": "http", "method": method or ("GET" if body is None else "POST"), "path": path, "query_string": b"",
             "headers": [(b"host", b"here:1"), *headers], "server": ("here", 1), "scheme": "http", "root_path": ""}
    return await door(Request(scope, receive))


DRAW = "/v1/images/generations"


def test_the_door_answers():
    door = Door(Answering(PICTURE), 4, None)
    answer = ask(door, DRAW, {"prompt": "owl", "n": 2, "seed": 3})
    data = json.loads(answer.body)["data"]
    assert [base64.b64decode(one["b64_json"]) for one in data] == [b"png", b"png"]
    assert [one["seed"] for one in data] == [3, 4]
    url = json.loads(ask(door, DRAW, {"prompt": "owl", "response_format": "url"}).body)["data"][0]["url"]
    assert ask(door, url.removeprefix("http://here:1")).body == b"png"
    assert ask(door, "/readyz").status_code == 200
    assert json.loads(ask(door, "/v1/models").body)["data"][0]["id"] == "emoji"
    found = {s.name: s.value for family in text_string_to_metric_families(ask(door, "/metrics").body.decode())
             for s in family.samples}
    assert (found["sdtrt_pictures_total"], found["sdtrt_step_state"], found["sdtrt_fallbacks"]) == (3, 1, 1)


@pytest.mark.parametrize(("path", "body", "method", "status", "says"), [
    ("/v2", None, "GET", 404, "valid: /healthz"), (DRAW, None, "GET", 405, "takes POST"),
    (DRAW, {}, "POST", 400, "prompt expects"), (DRAW, {"prompt": "owl", "n": 9}, "POST", 400, "at most 8"),
    ("/v1/images/files/x.png", None, "GET", 404, "no such picture")])
def test_the_door_refuses(path, body, method, status, says):
    answer = ask(Door(Answering(PICTURE), 8, None), path, body, method)
    assert answer.status_code == status
    assert says in json.loads(answer.body)["error"]["message"]


def test_a_key_is_asked_for_where_there_is_one():
    door = Door(Answering(PICTURE), 8, "secret")
    assert ask(door, "/healthz").status_code == 200
    for path, body in ((DRAW, {"prompt": "owl"}), ("/metrics", None), ("/v1/models", None)):
        assert ask(door, path, body).status_code == 401
        assert ask(door, path, body, headers=[(b"authorization", b"Bearer secre\xc3\xa9")]).status_code == 401
        assert ask(door, path, body, headers=[(b"authorization", b"Bearer secret")]).status_code == 200


def test_what_is_too_much_is_refused_whole_and_the_rest_is_drawn():
    door = Door(Answering(PICTURE), 4, None)

    async def main():
        return await asyncio.gather(*[asked(door, DRAW, {"prompt": "owl", "n": 2}) for _ in range(5)])

    answers = asyncio.run(main())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
    assert door.pending == 0


def test_a_picture_whose_replica_died_is_drawn_by_another():
    replicas = Answering(RayActorError(), PICTURE)
    assert ask(Door(replicas, 8, None), DRAW, {"prompt": "owl", "seed": 1}).status_code == 200
    assert replicas.asked[0] == replicas.asked[1]
    assert ask(Door(Answering(RayActorError()), 8, None), DRAW, {"prompt": "owl"}).status_code == 503


def test_what_a_replica_cannot_draw_is_said_by_its_field():
    answer = ask(Door(Answering(RequestError("image", "image expects the file of a picture")), 8, None), DRAW, {"prompt": "owl"})
    assert answer.status_code == 400
    assert json.loads(answer.body)["error"]["param"] == "image"


def test_a_picture_that_does_not_come_is_given_up():
    door = Door(Answering(PICTURE), 8, None, timeout_s=0.001)
    assert ask(door, DRAW, {"prompt": "owl"}).status_code == 504
    assert door.pending == 0


def test_why_a_replica_did_not_start_is_its_last_sentence():
    trace = "Deploying failed:\nTraceback:\n  File x\nsdtrt_backend.errors.LoraError: it changes x: it is of another model\n"
    assert _reason(trace) == "it changes x: it is of another model"
    assert _reason("Traceback:\nMemoryError: no more\n\n") == "MemoryError: no more"


def test_a_client_that_hangs_up_leaves_no_picture_pending():
    door = Door(Answering(PICTURE), 8, None)
    door.known = FACTS

    async def main():
        task = asyncio.create_task(asked(door, DRAW, {"prompt": "owl", "n": 3}))
        await asyncio.sleep(0.005)
        held = door.pending
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return held

    assert asyncio.run(main()) == 3
    assert door.pending == 0
    assert 'status="gone"' in ask(door, "/metrics").body.decode()


@pytest.mark.parametrize(("wrong", "says"), [
    ({"host": "0.0.0.0"}, "set SDTRT_API_KEY"), ({"replicas": (3, 2)}, "replicas expects"), ({"queue": 0}, "queue expects"),
    ({"replicas": 0}, "replicas expects")])
def test_a_server_that_cannot_be_is_refused(wrong, says, monkeypatch):
    monkeypatch.delenv("SDTRT_API_KEY", raising=False)
    with pytest.raises(OptionError, match=says):
        Server(**wrong).check()

"""``sdtrt serve``: a pipeline behind OpenAI's images API, on Ray Serve.

One process answers HTTP (``Door``): it checks requests, counts them and refuses what is too much. Each replica (``Replica``)
holds a pipeline on a GPU of its own and draws in batches.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import OptionError, RequestError, SdtrtError
from .answers import FORMATS, MOST_PICTURES, Held, Refused, asks_of, read_form, read_json
from .ask import Ask, Facts
from .batcher import Batcher
from .painter import Painter, Setup

log = logging.getLogger("sdtrt_backend")
KEY = "SDTRT_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
FILES = "/v1/images/files/"
AGAIN = 2  # replicas that may die over one picture
OURS = "sdtrt_backend.errors."
PING_S = 2.0
MOST_OPEN = 10_000  # requests that the door holds: it refuses by itself what is too much
QUIET = {"log_level": "WARNING", "enable_access_log": False}
# for processes that Ray starts from this one. Its proxy has 5 s to start otherwise, and is started again on a busy machine
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
BATCHES = (1, 2, 4, 8, 16, 32)
LATENCIES = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


@dataclass(frozen=True)
class Server:
    """replicas: painters, or the least and the most of them, between which Ray scales with the load. queue: pictures that may
    wait or be drawn at a time, beyond which a request gets 429. wait_s: seconds for which a picture waits for others to be drawn
    with.
    address: of a Ray cluster to join, None for one in this machine alone. timeout_s: after which a picture is given up."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int | tuple[int, int] = 1
    queue: int = 64
    wait_s: float = 0.05
    address: str | None = None
    timeout_s: float = 600.0

    @property
    def bounds(self) -> tuple[int, int]:
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)

    def check(self) -> None:
        """Raises OptionError."""
        if self.host not in LOCAL and not os.environ.get(KEY):
            raise OptionError(f"a server on {self.host} is open to others: set {KEY} to the key that they must send, or serve on "
                              "127.0.0.1")
        least, most = self.bounds
        if not 1 <= least <= most:
            raise OptionError(f"replicas expects a number from 1, or two of them such as 1-4, got {self.replicas}")
        if self.queue < 1 or self.wait_s < 0:
            raise OptionError(f"queue expects at least 1 and wait_s at least 0, got {self.queue} and {self.wait_s}")


@dataclass(frozen=True)
class Picture:
    """data: the file. seconds: of the call that drew it, and batch: how many that call drew. replica: which one it was."""

    data: bytes
    seconds: float
    batch: int
    replica: str
    state: Mapping[str, Any]


class Replica:
    """A painter that is warm, in one thread of its own."""

    def __init__(self, setup: Setup, wait_s: float) -> None:
        self.name = secrets.token_hex(4)
        # all in one thread: what PyTorch keeps by thread is as it was when the step was built
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="painter")
        self.painter = self.pool.submit(Painter, setup).result()
        self.pool.submit(self.painter.warm, log.info).result()
        self.batcher = Batcher(self._draw, self.painter.facts.batches[-1], wait_s, self.pool)

    def _draw(self, asks: Sequence[Ask]) -> list[tuple[Any, float, int]]:
        drawn = self.painter.draw(asks)
        return [(picture, drawn.seconds, len(asks)) for picture in drawn.pictures]

    async def draw(self, ask: Ask, form: str) -> Picture | RequestError:
        try:
            image, seconds, batch = await self.batcher.draw(ask)
        except RequestError as error:  # given and not raised: it is no fault of the server, whose log would have it as one
            return error
        data = await asyncio.to_thread(_encoded, image, form)
        return Picture(data, seconds, batch, self.name, self.painter.state())

    async def facts(self) -> Facts:
        return self.painter.facts


def _encoded(image: Any, form: str) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, FORMATS[form])
    return file.getvalue()


class Metrics:
    """What ``/metrics`` gives, in Prometheus's text format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.states: dict[str, str] = {}  # of each replica
        own = self.registry
        self.requests = Counter("sdtrt_requests", "Requests by route and status.", ("route", "status"), registry=own)
        self.latency = Histogram("sdtrt_request_seconds", "From request to answer.", ("route",), buckets=LATENCIES, registry=own)
        self.pictures = Counter("sdtrt_pictures", "Pictures drawn.", registry=own)
        self.draw = Histogram("sdtrt_draw_seconds", "One call of the pipeline.", buckets=LATENCIES, registry=own)
        self.batch = Histogram("sdtrt_batch_size", "Pictures of one call, by picture.", buckets=BATCHES, registry=own)
        self.pending = Gauge("sdtrt_pending_pictures", "Waiting or being drawn.", registry=own)
        self.retried = Counter("sdtrt_retried_pictures", "Drawn again, as their replica died.", registry=own)
        self.state = Gauge("sdtrt_step_state", "1 for the state of a replica's 8-bit step.", ("replica", "state"), registry=own)
        self.fallbacks = Gauge("sdtrt_fallbacks", "Sentences on what runs in 16 bits.", ("replica",), registry=own)
        self.drift = Gauge("sdtrt_drift_notes", "Sentences on calls that left their ranges.", ("replica",), registry=own)

    def drawn(self, picture: Picture) -> None:
        self.pictures.inc()
        self.draw.observe(picture.seconds)
        self.batch.observe(picture.batch)
        now = picture.state["state"]
        before = self.states.get(picture.replica, now)
        if before != now:
            self.state.remove(picture.replica, before)
        self.states[picture.replica] = now
        self.state.labels(picture.replica, now).set(1)
        self.fallbacks.labels(picture.replica).set(len(picture.state["fallbacks"]))
        self.drift.labels(picture.replica).set(sum("range" in note for note in picture.state["notes"]))


class Door:
    """Answers HTTP. One of it: it counts what is pending."""

    def __init__(self, replicas: Any, queue: int, key: str | None, timeout_s: float = Server.timeout_s) -> None:
        self.replicas, self.queue, self.key, self.timeout_s = replicas, queue, key, timeout_s
        self.metrics, self.held = Metrics(), Held()
        self.known: Facts | None = None
        self.pending, self.second_per_picture = 0, 1.0
        self.routes: dict[str, tuple[str, bool, Callable[[Request], Awaitable[Response]]]] = {  # method, whether it wants the key
            "/healthz": ("GET", False, self._healthz),
            "/readyz": ("GET", False, self._readyz),
            "/metrics": ("GET", True, self._metrics),
            "/v1/models": ("GET", True, self._models),
            FILES: ("GET", False, self._file),  # the name is the key: nobody guesses it
            "/v1/images/generations": ("POST", True, self._generations),
            "/v1/images/edits": ("POST", True, self._edits),
        }

    async def __call__(self, request: Request) -> Response:
        """The answer, counted."""
        path = FILES if request.url.path.startswith(FILES) else request.url.path
        begin, status = time.perf_counter(), "gone"
        try:
            answer = await self._answer(path, request)
            status = str(answer.status_code)
        finally:
            route = path if path in self.routes else "other"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.latency.labels(route).observe(time.perf_counter() - begin)
        return answer

    async def _answer(self, path: str, request: Request) -> Response:
        try:
            if path not in self.routes:
                raise Refused(404, f"there is nothing at this path; valid: {', '.join(self.routes)}")
            method, wants_key, answer = self.routes[path]
            if request.method != method:
                raise Refused(405, f"{path} takes {method}, not {request.method}")
            if wants_key:
                self._check_key(request)
            return await answer(request)
        except Refused as refused:
            return refused.answer
        except RequestError as error:
            return Refused(400, str(error), error.field).answer

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, f"expected the header Authorization: Bearer, with the key that the server has in {KEY}", None,
                          "invalid_api_key")

    async def _healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, _: Request) -> Response:
        await self._asked_facts()
        return JSONResponse({"status": "ready"})

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _models(self, _: Request) -> Response:
        facts = await self._facts()
        return JSONResponse({"object": "list", "data": [{"id": facts.model, "object": "model", "created": 0,
                                                         "owned_by": "sdtrt_backend", **facts.to_json()}]})

    async def _file(self, request: Request) -> Response:
        return self.held.get(request.url.path.removeprefix(FILES))

    async def _generations(self, request: Request) -> Response:
        return await self._images(request, await read_json(request), {})

    async def _edits(self, request: Request) -> Response:
        return await self._images(request, *await read_form(request))

    async def _asked_facts(self) -> Facts:
        """Of the first replica that is warm; all are made alike."""
        try:
            found: Facts = await asyncio.wait_for(_result(self.replicas.facts.remote()), PING_S)
        except (TimeoutError, RayActorError):
            raise Refused(503, "no replica is warm yet: ask /readyz", None, "not_ready", 5.0) from None
        self.known = found
        return found

    async def _facts(self) -> Facts:
        return self.known or await self._asked_facts()

    async def _images(self, request: Request, given: dict[str, Any], files: Mapping[str, bytes]) -> Response:
        facts = await self._facts()
        asks, form, as_url = asks_of(given, files, facts)
        if len(asks) > self.queue:
            raise RequestError("n", f"n expects at most {self.queue} pictures, which is how many may wait here")
        if self.pending + len(asks) > self.queue:
            raise Refused(429, f"{self.pending} pictures are waiting, of {self.queue} that may", None, "queue_full",
                          self.pending * self.second_per_picture)
        self._count(len(asks))
        tasks = [asyncio.create_task(self._drawn(ask, form)) for ask in asks]
        try:
            pictures = await asyncio.wait_for(asyncio.gather(*tasks), self.timeout_s)
        except TimeoutError:
            raise Refused(504, f"no picture came within {self.timeout_s:g} seconds", None, "timeout") from None
        finally:  # one failed, or the client has gone: the others need not be drawn
            for task in tasks:
                task.cancel()
            self._count(-len(asks))
        data = []
        for ask, picture in zip(asks, pictures, strict=True):
            where = ({"url": f"{str(request.base_url).rstrip('/')}{FILES}{self.held.add(picture.data, form)}"} if as_url else
                     {"b64_json": base64.b64encode(picture.data).decode()})
            data.append({**where, "seed": ask.seed})
        return JSONResponse({"created": int(time.time()), "data": data, "output_format": form,
                             "size": f"{asks[0].width}x{asks[0].height}"})

    def _count(self, more: int) -> None:
        self.pending += more
        self.metrics.pending.set(self.pending)

    async def _drawn(self, ask: Ask, form: str) -> Picture:
        for _ in range(AGAIN):
            try:
                picture: Picture | RequestError = await _result(self.replicas.draw.remote(ask, form))
                break
            except RayActorError:
                self.metrics.retried.inc()
            except RayTaskError as error:
                log.exception("a picture could not be drawn")
                raise Refused(500, f"the picture could not be drawn ({type(error.cause).__name__})") from None
        else:
            raise Refused(503, f"the replica that drew it died, {AGAIN} times", None, "replica_died", 10.0)
        if isinstance(picture, RequestError):
            raise picture
        self.second_per_picture += 0.2 * (picture.seconds / picture.batch - self.second_per_picture)
        self.metrics.drawn(picture)
        return picture


async def _result(response: Any) -> Any:
    """A response of a handle is awaitable, and no coroutine."""
    return await response


def begin(setup: Setup, server: Server) -> None:
    """Start Ray where none runs, and the server; returns when its replicas are warm. ``end`` stops it."""
    setup.check()
    server.check()
    least, most = server.bounds
    cores = os.cpu_count() or 1
    threads = setup.threads or max(1, cores // most)
    if not ray.is_initialized():
        for name, value in RAY.items():
            os.environ.setdefault(name, value)
        address = server.address or os.environ.get("RAY_ADDRESS") or "local"
        here: dict[str, Any] = {"num_cpus": max(cores, most * threads), "include_dashboard": False} if address == "local" else {}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="sdtrt", **here)
    there_are = ray.cluster_resources()
    on_gpus = there_are.get("GPU", 0) > 0
    room = int(there_are["GPU"] if on_gpus else there_are["CPU"] // threads)
    if least > room:  # Ray would wait for them for ever
        raise OptionError(f"{least} replicas are asked for, and there is room for {room}: each has "
                          + ("a GPU" if on_gpus else f"{threads} CPUs") + " for itself")
    serve.start(http_options={"host": server.host, "port": server.port})
    options: dict[str, Any] = {"num_replicas": least} if least == most else {
        "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 2 * max(setup.batches)}}
    deployed: Any = serve.deployment  # its types have it that it gives a function
    replicas = deployed(
        Replica, logging_config=QUIET, max_ongoing_requests=server.queue + MOST_PICTURES,
        ray_actor_options={"num_gpus": 1} if on_gpus else {"num_cpus": threads}, **options)
    # Ray gives a process one thread for each CPU that it asks for, PyTorch's number is its own
    made = replicas.bind(replace(setup, threads=setup.threads or (None if on_gpus else threads)), server.wait_s)
    door = deployed(Door, max_ongoing_requests=MOST_OPEN, ray_actor_options={"num_cpus": 0}, logging_config=QUIET)
    try:
        serve.run(door.bind(made, server.queue, os.environ.get(KEY), server.timeout_s), name="sdtrt", route_prefix="/")
    except RuntimeError as error:  # what it says of a replica that could not start is a traceback
        raise SdtrtError(f"the server could not start: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """The sentence of an error of this package at the end of a traceback, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    _, ours, last = next((line for line in reversed(lines) if OURS in line), lines[-1]).rpartition(OURS)
    return last.partition(": ")[2] if ours else last


def end() -> None:
    """Stop the server, and Ray in this process."""
    serve.shutdown()
    ray.shutdown()

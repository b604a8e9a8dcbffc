"""``sdtrt load``: requests at a rate, or from clients that wait for their answers; how long answers take, and what fails."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from ..errors import OptionError
from ..files import write_atomically

APIS = ("openai", "triton")
MOST_S, MOST_RATE, MOST_OPEN = 3600.0, 1000.0, 512
SHARES = {"p50": 50, "p95": 95, "p99": 99}
REFUSED = "429"


@dataclass(frozen=True)
class Plan:
    """rate: requests a second at random moments (a Poisson process, an open loop), or None: ``clients`` that each wait for an
    answer before they ask again. duration_s: for which requests are made; those that run then are waited for. fields: of each
    request, beside prompt and seed. count: pictures of a request (n). api: "openai" or "triton", whose ``model`` it then asks."""

    url: str
    prompts: tuple[str, ...]
    rate: float | None = None
    clients: int = 1
    duration_s: float = 30.0
    fields: tuple[tuple[str, Any], ...] = ()
    count: int = 1
    api: str = "openai"
    model: str | None = None
    key: str | None = None
    seed: int = 0
    timeout_s: float = 300.0

    def check(self) -> None:
        """Raises OptionError."""
        if self.api not in APIS or (self.api == "triton" and not self.model):
            raise OptionError(f"api expects openai, or triton with the name of a model, got {self.api!r} and {self.model!r}")
        if self.rate is not None and not 0 < self.rate <= MOST_RATE:
            raise OptionError(f"rate expects requests a second, more than 0 and at most {MOST_RATE:g}, got {self.rate}")
        if not 0 < self.duration_s <= MOST_S or not 1 <= self.clients <= MOST_OPEN:
            raise OptionError(f"duration expects at most {MOST_S:g} seconds, and clients 1 to {MOST_OPEN}, got {self.duration_s} "
                              f"and {self.clients}")
        if not self.prompts:
            raise OptionError("no prompt to ask for: give at least one")


@dataclass(frozen=True)
class Outcome:
    """at_s: when it was due, after the start. seconds: from then to its answer. status: of HTTP, or the name of what failed."""

    at_s: float
    seconds: float
    status: str
    pictures: int


async def run(plan: Plan, tell: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
    """Every request's outcome, in the order in which they ended. tell: is called with each.

    Under a rate the time of a request counts from the moment it was due, so that a slow server does not hide its queue."""
    plan.check()
    found: list[Outcome] = []
    limits = httpx.Limits(max_connections=MOST_OPEN, max_keepalive_connections=MOST_OPEN)
    headers = {"authorization": f"Bearer {plan.key}"} if plan.key else {}
    async with httpx.AsyncClient(base_url=plan.url, timeout=plan.timeout_s, limits=limits, headers=headers) as client:
        begin = time.perf_counter()

        async def one(number: int, due: float) -> None:
            path, body = _request(plan, number)
            try:
                answer = await client.post(path, json=body)
                status = str(answer.status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            outcome = Outcome(due, time.perf_counter() - begin - due, status, plan.count if status == "200" else 0)
            found.append(outcome)
            tell(outcome)

        if plan.rate is None:
            await asyncio.gather(*(_closed(plan, i, begin, one) for i in range(plan.clients)))
        else:
            await _open(plan, plan.rate, begin, one)
    return found


async def _closed(plan: Plan, client: int, begin: float, one: Callable[[int, float], Any]) -> None:
    number = client
    while (now := time.perf_counter() - begin) < plan.duration_s:
        await one(number, now)
        number += plan.clients


async def _open(plan: Plan, rate: float, begin: float, one: Callable[[int, float], Any]) -> None:
    draw, due, number = random.Random(plan.seed), 0.0, 0
    tasks: set[asyncio.Task[None]] = set()
    while (due := due + draw.expovariate(rate)) < plan.duration_s:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        while sum(not task.done() for task in tasks) >= MOST_OPEN:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks.add(asyncio.create_task(one(number, due)))
        number += 1
    await asyncio.gather(*tasks)


def _request(plan: Plan, number: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a request. Each has other noise."""
    prompt, seed = plan.prompts[number % len(plan.prompts)], plan.seed + number * plan.count
    if plan.api == "openai":
        return "/v1/images/generations", {"prompt": prompt, "seed": seed, "n": plan.count, **dict(plan.fields)}
    given = {"PROMPT": ("BYTES", prompt), "SEED": ("INT64", seed),
             **{name.upper(): ("BYTES" if isinstance(value, str) else "INT32", value) for name, value in plan.fields}}
    inputs = [{"name": name, "datatype": kind, "shape": [plan.count, 1], "data": [[value]] * plan.count}
              for name, (kind, value) in given.items()]
    return f"/v2/models/{plan.model}/infer", {"inputs": inputs}


def run_with_bar(plan: Plan) -> list[Outcome]:
    """``run``, with a bar of the seconds that have gone."""
    from tqdm import tqdm

    bar = tqdm(total=round(plan.duration_s), unit="s", bar_format="{l_bar}{bar}| {n:.0f} of {total} s, {postfix}")
    statuses: Counter[str] = Counter()

    def tell(outcome: Outcome) -> None:
        statuses[outcome.status] += 1
        bar.n = min(bar.total, outcome.at_s + outcome.seconds)
        bar.set_postfix_str(", ".join(f"{status}: {count}" for status, count in statuses.items()))

    with bar:
        return asyncio.run(run(plan, tell))


def write(folder: Path, plan: Plan, found: Mapping[str, Any], svg: str) -> None:
    """load.json and load.svg. The key is not written."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"plan": {**asdict(plan), "key": None}, "found": found}
    write_atomically(folder / "load.json", (json.dumps(body, indent=1) + "\n").encode())
    write_atomically(folder / "load.svg", svg.encode())


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """requests, pictures, seconds (of the whole), pictures_per_s, p50, p95, p99 and mean of the answers in seconds (None where
    there is none), refused (429), failed, and statuses: how many of each."""
    good = np.array([o.seconds for o in outcomes if o.status == "200"])
    statuses = Counter(o.status for o in outcomes)
    seconds = max((o.at_s + o.seconds for o in outcomes), default=0.0)
    pictures = sum(o.pictures for o in outcomes)
    shares = {name: float(np.percentile(good, share)) if good.size else None for name, share in SHARES.items()}
    return {"requests": len(outcomes), "pictures": pictures, "seconds": seconds,
            "pictures_per_s": pictures / seconds if seconds else 0.0, **shares, "mean": float(good.mean()) if good.size else None,
            "refused": statuses[REFUSED], "failed": len(outcomes) - good.size - statuses[REFUSED], "statuses": dict(statuses)}


def chart(runs: dict[str, Sequence[Outcome]]) -> str:
    """An SVG: the share of answers that took at most so long, a line for each run."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure((6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, outcomes in runs.items():
        times = sorted(o.seconds for o in outcomes if o.status == "200")
        axes.step([0, *times], [100 * i / max(len(times), 1) for i in range(len(times) + 1)], where="post",
                  label=f"{name}: {len(times)} answers")
    axes.set(xlabel="seconds", ylabel="% of the answers took at most so long", ylim=(0, 102), xlim=(0, None))
    axes.grid(color="#ddd")
    axes.legend(loc="lower right")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "load", "svg.fonttype": "none"}):  # same runs, same bytes; texts are texts
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()

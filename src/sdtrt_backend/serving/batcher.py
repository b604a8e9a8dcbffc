"""Asks that are alike become one call of the painter, one call at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError


@dataclass(frozen=True)
class Waiting:
    """An ask in the queue. since: ``time.monotonic`` of its arrival."""

    ask: Any
    done: asyncio.Future[Any]
    since: float


class Batcher:
    """Queues by ``alike``: no picture waits for those of another size to be drawn with it.

    draw: asks -> one result each, in a thread of ``pool``. A call is made when ``most`` asks wait, or when the oldest has waited
    for ``wait_s`` seconds. Asks whose caller has gone are dropped.
    """

    def __init__(self, draw: Callable[[Sequence[Any]], Sequence[Any]], most: int, wait_s: float, pool: Executor) -> None:
        self.draw_all, self.most, self.wait_s, self.pool = draw, most, wait_s, pool
        self.queues: dict[Hashable, list[Waiting]] = {}
        self.arrived = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def draw(self, ask: Any) -> Any:
        """The result of one ask. Raises what drawing it raised."""
        if self.task is None:  # here, as an event loop runs
            self.task = asyncio.create_task(self._run())
        done = asyncio.get_running_loop().create_future()
        self.queues.setdefault(ask.alike, []).append(Waiting(ask, done, time.monotonic()))
        self.arrived.set()
        return await done

    async def _run(self) -> None:
        while True:
            key = self._oldest()
            if key is None:
                await self._wait(None)
                continue
            queue = self.queues[key]
            left = queue[0].since + self.wait_s - time.monotonic()
            if len(queue) < self.most and left > 0:
                await self._wait(left)
                continue
            self.queues[key] = queue[self.most :]
            await self._draw(queue[: self.most])

    def _oldest(self) -> Hashable:
        """The queue whose first ask came first; those who have gone are dropped."""
        kept = {key: [one for one in queue if not one.done.done()] for key, queue in self.queues.items()}
        self.queues = {key: queue for key, queue in kept.items() if queue}
        return min(self.queues, key=lambda key: self.queues[key][0].since, default=None)

    async def _wait(self, seconds: float | None) -> None:
        self.arrived.clear()
        try:
            await asyncio.wait_for(self.arrived.wait(), seconds)
        except TimeoutError:
            return

    async def _draw(self, batch: Sequence[Waiting]) -> None:
        try:
            results = await asyncio.get_running_loop().run_in_executor(self.pool, self.draw_all, [one.ask for one in batch])
        except RequestError as error:
            if len(batch) == 1:
                _fail(batch, error)
            else:  # one of them cannot be drawn: the others are, each alone
                for one in batch:
                    await self._draw([one])
        except Exception as error:
            _fail(batch, error)
        else:
            for one, result in zip(batch, results, strict=True):
                if not one.done.done():
                    one.done.set_result(result)


def _fail(batch: Sequence[Waiting], error: Exception) -> None:
    for one in batch:
        if not one.done.done():
            one.done.set_exception(error)

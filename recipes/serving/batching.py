"""Let requests that arrive together run together, in one thread beside the event loop."""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


class QueueFull(Exception):
    """More requests wait than the queue holds."""


@dataclass(eq=False)
class Job:
    """
    A request that waits for its batch.

    Args:
        request: The request.
        options: What all requests of a batch share.
        user: Whose request it is; a batch holds one request of a user. None: of nobody.
    """

    request: Any
    options: Hashable = None
    user: Hashable | None = None
    result: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """
    A queue of requests, and the only thread that runs the model.

    A batch holds requests of the same options, in the order in which they arrived. It runs when it is full, or when
    its first request has waited `max_wait`.

    Args:
        answer: Function of a batch's requests, called in the thread: a result, or an exception, for each of them.
        max_size: Most requests of a batch.
        max_wait: Seconds that a request waits for others.
        max_queue: Most requests that wait.
    """

    def __init__(
        self, answer: Callable[[list], Sequence], max_size: int = 32, max_wait: float = 0.002, max_queue: int = 1024
    ):
        self.answer = answer
        self.max_size = max_size
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.waiting: list[Job] = []
        self.arrival = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, "model")

    async def submit(self, jobs: Sequence[Job]) -> list:
        """
        Wait for the results of some requests; a refused one has an exception as its result.

        Raises:
            QueueFull: if not all of them find room; none of them runs then.
        """
        if len(self.waiting) + len(jobs) > self.max_queue:
            raise QueueFull
        self.waiting += jobs
        self.arrival.set()
        return await asyncio.gather(*(job.result for job in jobs), return_exceptions=True)

    async def between_batches(self, call: Callable[[], Any]) -> Any:
        """Run a function in the model's thread, where no batch runs meanwhile, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, call)

    def next_batch(self) -> list[Job]:
        """Choose the requests that can run with the first that waits."""
        batch: list[Job] = []
        users = set()
        for job in self.waiting:
            # A later request of a user builds on the earlier.
            is_first = job.user is None or job.user not in users
            if is_first and job.options == self.waiting[0].options:
                batch.append(job)
            if len(batch) == self.max_size:
                break
            users.add(job.user)
        return batch

    async def run(self) -> None:
        """Run batches until the task is cancelled."""
        while True:
            if not self.waiting:
                self.arrival.clear()
                await self.arrival.wait()
            batch = self.next_batch()
            remaining = self.max_wait - (time.monotonic() - self.waiting[0].arrived)
            if len(batch) < self.max_size and remaining > 0:
                self.arrival.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.arrival.wait(), remaining)
                continue
            chosen = set(batch)
            self.waiting = [job for job in self.waiting if job not in chosen]
            try:
                results = await self.between_batches(lambda batch=batch: self.answer([job.request for job in batch]))
            except Exception as error:  # the server goes on, and these requests fail
                results = [error] * len(batch)
            for job, result in zip(batch, results, strict=True):
                if job.result.done():
                    continue
                if isinstance(result, Exception):
                    job.result.set_exception(result)
                else:
                    job.result.set_result(result)

"""Measure the server under load, beside a loop over the pipeline.

    python -m recipes.benchmarks.serving --checkpoint runs/demo/checkpoint    # five minutes on two CPU cores

Clients ask in turn: each sends its next request when it has the answer. Every request is of one of `--users` users,
whose histories are random items and grow by an item a request. With the cache, the server has read the histories
before the clock starts, and a request sends the new item alone. Without it, a request sends the whole history. The
contenders get the same requests:

- `loop`: the pipeline in this process, a request at a time, and in batches of 32.
- `server`: `recipes.serve` in a process of its own, without batches (`--max_batch 1 --max_wait_ms 0`) and with them.

CPU time is that of the contender's process, which a busy machine changes less than the time on the clock. Clients
share the machine with the server. The last part sends `--memory_requests` requests, and reads the server's memory.
"""

import asyncio
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modeling_unigrf import RecommendationPipeline, UniGRFForCausalLM
from recipes.common.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges, parse_arguments
from recipes.common.files import write_json
from recipes.common.run_tracking import command, made_by
from tokenization import SemanticIdTokenizer

# Requests of the pipeline's batches, and of a call that sends all histories.
BATCH = 32
# Items of a history before its first request.
LENGTHS = (10, 41)
RANGES: dict[str, Range] = {
    "clients": COUNT,
    "seconds": POSITIVE,
    "users": COUNT,
    "memory_requests": NOT_NEGATIVE,
    "seed": SEED,
}


@dataclass
class ServingArguments:
    """Checkpoint, load and output of the benchmark."""

    checkpoint: str = field(metadata={"help": "Folder that recipes.train wrote."})
    output: str = field(
        default="recipes/benchmarks/results/serving.json", metadata={"help": "JSON file of the figures."}
    )
    clients: list[int] = field(
        default_factory=lambda: [1, 8, 64], metadata={"help": "Numbers of clients that ask at the same time."}
    )
    seconds: float = field(default=10.0, metadata={"help": "Seconds of each measurement."})
    users: int = field(default=256, metadata={"help": "Users whose lists are asked for."})
    memory_requests: int = field(
        default=10_000, metadata={"help": "Requests over which the server's memory is watched. 0: leave this out."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the histories."})


class Shop:
    """
    Users with random histories, which grow by an item a request.

    Args:
        tokenizer: Tokenizer of the items.
        num_users: Number of users.
        seed: Seed of the histories.
    """

    def __init__(self, tokenizer: SemanticIdTokenizer, num_users: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.tokenizer = tokenizer
        self.histories = [self.events(self.rng.integers(*LENGTHS)) for _ in range(num_users)]

    def events(self, count: int) -> dict[str, list[str]]:
        """Draw some events."""
        items = self.rng.integers(self.tokenizer.num_items, size=count)
        behaviors = self.rng.integers(len(self.tokenizer.behaviors), size=count)
        return {
            "items": [self.tokenizer.item_ids[item] for item in items],
            "behaviors": [self.tokenizer.behaviors[behavior] for behavior in behaviors],
        }

    def request(self, user: int, cached: bool = False) -> dict[str, Any]:
        """Let a user do something, and ask for the list after it."""
        history = self.histories[user]
        known = len(history["items"])
        new = self.events(1)
        for name, values in new.items():
            history[name] += values
        return {**new, "user_id": str(user), "known_items": known} if cached else history


@contextmanager
def running_server(checkpoint: str, *flags: str) -> Iterator[str]:
    """Run the server on a free port, and yield its address."""
    words = [sys.executable, "-m", "recipes.serve", "--checkpoint", checkpoint, "--port", "0", *flags]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        url = next((match[0] for line in lines if (match := re.search(r"http://[\d.:]+", line))), None)
        if url is None:
            raise RuntimeError("The server must start, got a process that ended. Start `recipes.serve` to see why.")
        yield url
    finally:
        process.terminate()
        process.communicate()


def counters(page: str) -> dict[str, float]:
    """Read the numbers that the benchmark needs from the page of `/metrics`."""
    names = ("process_cpu_seconds_total", "process_resident_memory_bytes", "unigrf_batch_size_count")
    return {name: float(match[1]) for name in names if (match := re.search(rf"^{name} (\S+)$", page, re.MULTILINE))}


async def ask(url: str, shop: Shop, clients: int, cached: bool, seconds: float, most: float = float("inf")) -> dict:
    """
    Let clients ask for some time.

    Args:
        url: Address of the server.
        shop: The users.
        clients: Number of clients.
        cached: Whether a request sends only what is new.
        seconds: Time of the measurement.
        most: Most requests.

    Returns:
        The figures of the measurement.
    """
    import httpx

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        if cached:
            histories = [history | {"user_id": str(user)} for user, history in enumerate(shop.histories)]
            for start in range(0, len(histories), BATCH):
                answer = await client.post("/recommend_many", json={"requests": histories[start : start + BATCH]})
                answer.raise_for_status()
        times: list[float] = []
        before = counters((await client.get("/metrics")).text)
        start = time.perf_counter()

        async def one_client(number: int) -> None:
            users = list(range(number, len(shop.histories), clients)) or [number % len(shop.histories)]
            for turn in itertools.count():
                if time.perf_counter() - start > seconds or len(times) >= most:
                    return
                request = shop.request(users[turn % len(users)], cached)
                sent = time.perf_counter()
                answer = await client.post("/recommend", json=request)
                answer.raise_for_status()
                times.append(time.perf_counter() - sent)

        await asyncio.gather(*(one_client(number) for number in range(clients)))
        wall = time.perf_counter() - start
        after = counters((await client.get("/metrics")).text)
    cpu = after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
    batches = after["unigrf_batch_size_count"] - before["unigrf_batch_size_count"]
    return {
        **latencies(times, wall, cpu),
        "mean_batch": round(len(times) / batches, 1),
        "resident_mb": round(after["process_resident_memory_bytes"] / 2**20, 1),
    }


def latencies(times: Sequence[float], wall: float, cpu: float) -> dict:
    """Summarize the times of requests in seconds, the time of all of them on the clock, and the CPU time."""
    percentiles = {f"p{share}_ms": round(1000 * float(np.percentile(times, share)), 1) for share in (50, 95, 99)}
    return {
        "requests": len(times),
        "per_second": round(len(times) / wall, 2),
        **percentiles,
        "cpu_ms": round(1000 * cpu / len(times), 2),
    }


def measure_loop(pipeline: RecommendationPipeline, shop: Shop, batch_size: int, seconds: float) -> dict:
    """Run the pipeline for some time, `batch_size` requests a call."""
    users = itertools.cycle(range(len(shop.histories)))
    times: list[float] = []
    cpu = time.process_time()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        requests = [dict(shop.request(next(users))) for _ in range(batch_size)]
        sent = time.perf_counter()
        pipeline(requests, batch_size=batch_size)
        times += [time.perf_counter() - sent] * batch_size
    return latencies(times, time.perf_counter() - start, time.process_time() - cpu)


def measure_memory(url: str, shop: Shop, num_requests: int) -> list[dict]:
    """Ask by 64 clients with the cache, and read the server's memory after each fifth of the requests."""
    rows = []
    for fifth in range(1, 6):
        figures = asyncio.run(ask(url, shop, 64, True, float("inf"), num_requests // 5))
        rows.append({"requests": fifth * num_requests // 5, "resident_mb": figures["resident_mb"]})
    return rows


def main(args: ServingArguments) -> None:
    """
    Measure, print and write the figures.

    Raises:
        ValueError: for arguments out of range.
    """
    check_ranges(args, RANGES)
    model = UniGRFForCausalLM.from_pretrained(args.checkpoint).eval()
    tokenizer = SemanticIdTokenizer.from_pretrained(args.checkpoint)
    pipeline = RecommendationPipeline(model=model, tokenizer=tokenizer)
    load_before = os.getloadavg()[0]
    rows = []

    def add(figures: dict, **cell: Any) -> None:
        rows.append(cell | figures)
        print(rows[-1], flush=True)

    # The loop. The first call of each kind is not measured.
    for batch_size in (1, BATCH):
        shop = Shop(tokenizer, args.users, args.seed)
        pipeline([shop.request(user) for user in range(batch_size)], batch_size=batch_size)
        figures = measure_loop(pipeline, shop, batch_size, args.seconds)
        add(figures, contender="loop", batches=batch_size > 1, cache=False, clients=1)

    # The server.
    memory = []
    for batches in (False, True):
        flags = [] if batches else ["--max_batch", "1", "--max_wait_ms", "0"]
        with running_server(args.checkpoint, *flags) as url:
            for cached, clients in itertools.product((False, True), args.clients):
                shop = Shop(tokenizer, args.users, args.seed)
                asyncio.run(ask(url, shop, clients, cached, 0.1 * args.seconds))
                figures = asyncio.run(ask(url, shop, clients, cached, args.seconds))
                add(figures, contender="server", batches=batches, cache=cached, clients=clients)
            if batches and args.memory_requests:
                memory = measure_memory(url, Shop(tokenizer, args.users, args.seed), args.memory_requests)
    results = {
        "seed": args.seed,
        "checkpoint": describe(model),
        "load average": {"before": round(load_before, 1), "after": round(os.getloadavg()[0], 1)},
        "rows": rows,
        "memory": memory,
        "made by": made_by(command("recipes.benchmarks.serving", args, checkpoint="path/to/checkpoint")),
    }
    write_json(Path(args.output), results)


def describe(model: UniGRFForCausalLM) -> str:
    """Describe a checkpoint in a line."""
    options = model.serving_options()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{model.config.text_config.model_type} of {parameters:.1f}M parameters, {model.config.num_items:,} items, "
        f"windows of {options.max_items or 'all'} items, {options.num_beams} beams and "
        f"{options.num_dense_candidates + options.num_transition_candidates} further candidates"
    )


def table(results: dict) -> str:
    """Write the figures in Markdown."""
    lines = ["| contender | batches | cache | clients | requests/s | p50 / p95 / p99 ms | CPU ms a request |"]
    lines.append("| --- " * 7 + "|")
    for row in results["rows"]:
        switches = ["yes" if row[name] else "no" for name in ("batches", "cache")]
        percentiles = " / ".join(f"{row[f'{name}_ms']:,.0f}" for name in ("p50", "p95", "p99"))
        cells = [row["contender"], *switches, str(row["clients"]), f"{row['per_second']:.1f}", percentiles]
        lines.append("| " + " | ".join([*cells, f"{row['cpu_ms']:.1f}"]) + " |")
    made = results["made by"]
    load = results["load average"]
    lines += [
        "",
        f"Checkpoint: {results['checkpoint']}. Seed {results['seed']}. Load average of the machine: {load['before']} "
        f"before and {load['after']} after, of {made['machine']}, {made['versions']}, {made['date']}.",
    ]
    if results["memory"]:
        first, *_, last = results["memory"]
        lines.append(
            f"Resident memory: {first['resident_mb']:,.0f} MB after {first['requests']:,} requests, "
            f"{last['resident_mb']:,.0f} MB after {last['requests']:,}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(*parse_arguments(ServingArguments))

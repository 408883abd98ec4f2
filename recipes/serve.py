"""Serve a checkpoint over HTTP, with your own item ids.

    pip install -e ".[serve]"
    python -m recipes.serve --checkpoint runs/demo/checkpoint
    curl localhost:8000/recommend -H 'Content-Type: application/json' \
        -d '{"items": ["50", "172"], "behaviors": ["like", "like"], "num_return_sequences": 5}'

`/docs` describes all calls. `/recommend` and `/recommend_many` answer as `pipeline("recommendation")` does. Requests
that arrive together run together. A request with a `user_id` leaves its history and its cache of keys and values on
the server: the next one sends only what is new, and the number of items that the server knows (`known_items`, which
each answer returns). The server answers 409 if it does not know them any more: send the whole history then.

Admin calls swap the block list (`/admin/blocked`), the named parts of the catalog (`/admin/parts/NAME`) and the
checkpoint (`/admin/reload`, and back by `/admin/rollback`). They need the header `X-Admin-Key` if the environment has
UNIGRF_ADMIN_KEY, and are refused without it unless the server listens on this machine alone. What they change lasts
until the process ends: `--blocked`, `--parts` and `--checkpoint` say what a new process serves.

SIGTERM ends the server after the calls in flight.
"""

from dataclasses import dataclass, field
from pathlib import Path

from recipes.common.arguments import COUNT, NOT_NEGATIVE, POSITIVE, Range, check_ranges, parse_arguments
from recipes.common.files import read_json

PORT: Range = ("from 0 to 65535", lambda value: 0 <= value < 2**16)
RANGES: dict[str, Range] = {
    "port": PORT,
    "max_batch": COUNT,
    "max_wait_ms": NOT_NEGATIVE,
    "max_queue": COUNT,
    "max_body_mb": POSITIVE,
    "user_cache_mb": NOT_NEGATIVE,
    "stop_seconds": COUNT,
}


@dataclass
class ServeArguments:
    """Checkpoint, address, and what it may serve."""

    checkpoint: str = field(metadata={"help": "Folder that recipes.train wrote, or a Hub repository."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on. 0.0.0.0: all of this machine's."})
    port: int = field(default=8000, metadata={"help": "Port to listen on. 0: any that is free."})
    blocked: str | None = field(
        default=None,
        metadata={"help": 'JSON file {"items": [...]} of ids that no list may hold. None: no such items.'},
    )
    parts: str | None = field(
        default=None,
        metadata={"help": "JSON file of named parts of the catalog: an object of lists of item ids. None: no parts."},
    )
    unknown: str = field(
        default="error",
        metadata={"help": "Reject unknown items (error), or drop them (skip).", "choices": ["error", "skip"]},
    )


@dataclass
class LimitArguments:
    """Batches, memory and limits."""

    max_batch: int = field(default=32, metadata={"help": "Most requests that run together. 1: no batches."})
    max_wait_ms: float = field(default=2.0, metadata={"help": "Milliseconds that a request waits for others."})
    max_queue: int = field(default=1024, metadata={"help": "Most requests that wait; further ones get 429."})
    max_body_mb: float = field(default=8.0, metadata={"help": "Largest body of a call in MB; larger ones get 413."})
    user_cache_mb: float = field(
        default=512.0,
        metadata={
            "help": "Memory for users' histories and caches in MB; who asked least recently makes room. 0: none."
        },
    )
    stop_seconds: int = field(default=30, metadata={"help": "Seconds after which a stop ends calls in flight."})


def read_items(file: str | None, name: str) -> dict[str, list]:
    """
    Read a JSON object of lists of item ids; an empty one for no file.

    Raises:
        ValueError: for a file that is missing or holds something else.
    """
    lists = {} if file is None else read_json(Path(file))
    for key, items in lists.items():
        if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
            raise ValueError(f"`{name}` must hold lists of item ids, got {items!r:.80} for {key!r}. Correct {file}.")
    return lists


def serve(args: ServeArguments, limits: LimitArguments) -> None:
    """
    Serve until the process is told to stop.

    Raises:
        ValueError: for arguments out of range, lists or a checkpoint that cannot be read, and without the extra.
    """
    for group in (args, limits):
        check_ranges(group, {name: expected for name, expected in RANGES.items() if hasattr(group, name)})
    try:
        import uvicorn

        from recipes.serving.app import Limits, create_app
        from recipes.serving.caches import Users
        from recipes.serving.engine import Engine, Lists, load
        from recipes.serving.metrics import Metrics
        from recipes.serving.schemas import Refusal
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`recipes.serve` must have its extra installed, got {error}. Run `pip install -e '.[serve]'`."
        ) from error
    blocked = read_items(args.blocked, "blocked")
    if set(blocked) - {"items"}:
        raise ValueError(f"`blocked` must hold the key `items` alone, got {sorted(blocked)}. Correct {args.blocked}.")
    lists = Lists(blocked.get("items", []), read_items(args.parts, "parts"))
    users = Users(int(limits.user_cache_mb * 2**20))
    try:
        engine = Engine(load(args.checkpoint), users, lists, args.unknown, Metrics())
    except Refusal as error:
        raise ValueError(error.message) from error
    app = create_app(
        engine, Limits(limits.max_batch, limits.max_wait_ms, limits.max_queue, limits.max_body_mb), args.host
    )
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=limits.stop_seconds)


if __name__ == "__main__":
    serve(*parse_arguments(ServeArguments, LimitArguments))

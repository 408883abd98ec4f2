"""The HTTP API: routes, limits and errors around the engine and its queue."""

import asyncio
import functools
import hmac
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Depends, FastAPI, Header, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as HTTPError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recipes.serving.batching import Batcher, Job, QueueFull
from recipes.serving.engine import Engine, is_float32
from recipes.serving.metrics import Metrics
from recipes.serving.schemas import (
    Answer,
    Answers,
    ItemList,
    Name,
    NoList,
    Problems,
    Refusal,
    Reload,
    Request,
    Requests,
    problem,
    validation_problems,
)

ADMIN_KEY = "UNIGRF_ADMIN_KEY"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
ERRORS = {status: {"model": Problems} for status in (409, 413, 422, 429)}


@dataclass
class Limits:
    """
    The limits of a server.

    Args:
        max_batch: Most requests that run together.
        max_wait_ms: Milliseconds that a request waits for others.
        max_queue: Most requests that wait.
        max_body_mb: Largest body of a call in MB.
    """

    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_queue: int = 1024
    max_body_mb: float = 8.0


class Json(Response):
    """JSON in ASCII: an id of a request may hold what UTF-8 cannot."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Write the JSON."""
        return json.dumps(content, allow_nan=False).encode("ascii")


class Boundary:
    """
    Refuse large bodies, and count all calls.

    Args:
        app: The app inside.
        max_bytes: Largest body.
        metrics: Receives the counts.
        paths: Paths with counters of their own; others are counted together.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, metrics: Metrics, paths: Callable[[], set[str]]):
        self.app = app
        self.max_bytes = max_bytes
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self.read(receive)
            if body is None:
                message = f"The body must have at most {self.max_bytes:,} bytes, got more. Split the call."
                await refused([problem(Refusal(413, message))], 413)(scope, receive, watched_send)
            else:
                await self.app(scope, body, watched_send)
        finally:
            path = scope["path"] if scope["path"] in self.paths() else "other"
            self.metrics.calls.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def read(self, receive: Receive) -> Receive | None:
        """Read the whole body, and return a function that hands it on; None for a body that is too large."""
        parts = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                break
            size += len(message.get("body", b""))
            # A client that still sends would not read the answer: drain what it sends, up to a bound.
            if size <= self.max_bytes:
                parts.append(message.get("body", b""))
            if not message.get("more_body", False) or size > 16 * self.max_bytes:
                break
        if size > self.max_bytes:
            return None
        first: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay


def refused(problems: Sequence[dict], status: int) -> Response:
    """Make the answer of a call that is refused."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return Json({"detail": list(problems)}, status, headers)


class Server:
    """
    The engine, its queue, and the admin calls, which run one after another.

    Args:
        engine: The engine.
        limits: The limits.
        host: The address on which the server listens.
    """

    def __init__(self, engine: Engine, limits: Limits, host: str):
        self.engine = engine
        self.limits = limits
        self.host = host
        self.metrics = engine.metrics
        self.admin = asyncio.Lock()
        self.batcher: Batcher | None = None
        self.watch()

    def watch(self) -> None:
        """Show the queue and the users on `/metrics`."""
        users = self.engine.users
        self.metrics.watch("unigrf_queue_length", "Requests that wait.", lambda: len(self.waiting))
        self.metrics.watch("unigrf_user_bytes", "Memory of kept users in bytes.", lambda: users.num_bytes)
        self.metrics.watch("unigrf_users", "Kept users.", lambda: len(users.users))
        self.metrics.watch("unigrf_evicted_users", "Users that made room.", lambda: users.num_evicted)

    @property
    def waiting(self) -> Sequence[Job]:
        """The requests that wait."""
        return self.batcher.waiting if self.batcher else ()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run batches while the app runs."""
        limits = self.limits
        self.batcher = Batcher(self.engine.answer, limits.max_batch, limits.max_wait_ms / 1000, limits.max_queue)
        task = asyncio.create_task(self.batcher.run())
        yield
        # uvicorn has waited for the calls in flight.
        task.cancel()
        self.batcher.thread.shutdown()
        self.batcher = None

    async def answer(self, requests: list[Request], is_single: bool) -> Response:
        """Answer the requests of a call; none is answered if one is refused."""
        self.metrics.requests.inc(len(requests))
        jobs = [Job(request, request.options, request.user_id) for request in requests]
        if len(jobs) > self.limits.max_queue:
            most = self.limits.max_queue
            raise Refusal(422, f"`requests` must be at most {most}, got {len(jobs)}. Split the call.", "requests")
        try:
            results = await self.batcher.submit(jobs)
        except QueueFull as error:
            most = self.limits.max_queue
            raise Refusal(429, f"At most {most} requests can wait, and others do. Ask again later.") from error
        problems = []
        statuses = set()
        for row, result in enumerate(results):
            if isinstance(result, NoList) and not is_single:
                results[row] = {"items": [], "known_items": None, "checkpoint": self.engine.served.checkpoint}
            elif isinstance(result, Refusal):
                problems.append(problem(result, None if is_single else row))
                statuses.add(result.status)
            elif isinstance(result, BaseException):
                raise result
        if problems:
            return refused(problems[:10], max(statuses))
        return Json(results[0] if is_single else {"answers": results})

    def check_admin(self, x_admin_key: str | None = Header(None, description=f"The value of {ADMIN_KEY}.")) -> None:
        """Refuse admin calls of strangers."""
        key = os.environ.get(ADMIN_KEY)
        if key is None and self.host not in LOCAL_HOSTS:
            raise HTTPException(403, f"Set {ADMIN_KEY} before the start to allow admin calls on {self.host}.")
        if key is not None and not hmac.compare_digest((x_admin_key or "").encode(), key.encode()):
            raise HTTPException(403, f"`X-Admin-Key` must be the value of {ADMIN_KEY}, got another. Correct it.")

    async def set_lists(self, change: Callable) -> None:
        """Swap the block list or the parts between two batches."""
        async with self.admin:
            lists = change(self.engine.lists)
            await self.batcher.between_batches(functools.partial(self.engine.set_lists, lists))

    async def reload(self, body: Reload) -> dict:
        """Load a checkpoint beside the present one, and serve it from the next batch on."""
        async with self.admin:
            outcome = "refused"
            try:
                prepare = functools.partial(self.engine.prepare, body.checkpoint, body.allow_removed_items)
                loop = asyncio.get_running_loop()
                # Another dtype would leak into answers: such a checkpoint loads between batches.
                is_aside = await loop.run_in_executor(None, is_float32, body.checkpoint)
                served = await loop.run_in_executor(None if is_aside else self.batcher.thread, prepare)
                change = await self.batcher.between_batches(functools.partial(self.engine.take, served))
                outcome = "taken"
            finally:
                self.metrics.reloads.labels(outcome).inc()
            return change

    async def roll_back(self) -> dict:
        """Serve the checkpoint before the present one from the next batch on."""
        async with self.admin:
            return await self.batcher.between_batches(self.engine.roll_back)


def add_routes(app: FastAPI, server: Server) -> None:
    """Add the calls of clients."""

    @app.post("/recommend", responses={200: {"model": Answer}, **ERRORS}, summary="Recommend to one user")
    async def recommend(request: Request) -> Response:
        return await server.answer([request], is_single=True)

    @app.post("/recommend_many", responses={200: {"model": Answers}, **ERRORS}, summary="Recommend to several users")
    async def recommend_many(body: Requests) -> Response:
        return await server.answer(body.requests, is_single=False)

    @app.get("/health", summary="Say whether the process answers")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/ready", summary="Say whether the model answers, and which it is")
    async def ready() -> Response:
        full = len(server.waiting) >= server.limits.max_queue
        served = server.engine.served
        state = {
            "ready": not full,
            "checkpoint": served.checkpoint,
            "num_items": len(served.item_ids),
            "parts": sorted(server.engine.lists.parts),
            "queue": len(server.waiting),
        }
        return Json(state, 503 if full else 200)

    @app.get("/metrics", summary="Show the counters, for Prometheus")
    async def metrics() -> Response:
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_admin_routes(app: FastAPI, server: Server) -> None:
    """Add the calls that change what is served."""
    options: dict[str, Any] = {"dependencies": [Depends(server.check_admin)], "tags": ["admin"], "responses": ERRORS}

    @app.put("/admin/blocked", summary="Replace the block list", **options)
    async def set_blocked(body: ItemList) -> dict:
        await server.set_lists(lambda lists: replace(lists, blocked=body.items))
        return {"num_blocked": len(body.items)}

    @app.put("/admin/parts/{name}", summary="Make or replace a part of the catalog", **options)
    async def set_part(name: Name, body: ItemList) -> dict:
        await server.set_lists(lambda lists: replace(lists, parts=lists.parts | {name: body.items}))
        return {"part": name, "num_items": len(body.items)}

    @app.delete("/admin/parts/{name}", summary="Remove a part of the catalog", **options)
    async def remove_part(name: Name) -> dict:
        def without(lists):
            if name not in lists.parts:
                message = f"`name` must be among {sorted(lists.parts)}, got {name!r}. Check it."
                raise Refusal(404, message, "name")
            return replace(lists, parts={part: items for part, items in lists.parts.items() if part != name})

        await server.set_lists(without)
        return {"part": name}

    @app.post("/admin/reload", summary="Serve another checkpoint", **options)
    async def reload(body: Reload) -> dict:
        return await server.reload(body)

    @app.post("/admin/rollback", summary="Serve the checkpoint before", **options)
    async def roll_back() -> dict:
        return await server.roll_back()


def create_app(engine: Engine, limits: Limits | None = None, host: str = "127.0.0.1") -> FastAPI:
    """
    Make the app of a server.

    Args:
        engine: The engine.
        limits: The limits. None: their defaults.
        host: The address on which the server listens.
    """
    limits = limits or Limits()
    server = Server(engine, limits, host)
    app = FastAPI(
        title="UniGRF",
        description="Recommendations of one checkpoint, in the shop's own ids.",
        lifespan=server.lifespan,
        default_response_class=Json,
    )
    add_routes(app, server)
    add_admin_routes(app, server)
    paths = {route.path for route in app.routes}
    app.add_middleware(
        Boundary, max_bytes=int(limits.max_body_mb * 2**20), metrics=engine.metrics, paths=lambda: paths
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError) -> Response:
        return refused(validation_problems(error.errors()), 422)

    @app.exception_handler(Refusal)
    async def refusal(_, error: Refusal) -> Response:
        return refused([problem(error)], error.status)

    @app.exception_handler(HTTPError)
    async def http_error(_, error: HTTPError) -> Response:
        return refused([problem(Refusal(error.status_code, str(error.detail)))], error.status_code)

    return app

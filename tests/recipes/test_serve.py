"""The server answers as the pipeline, in batches, on kept caches and after swaps, and refuses what is wrong."""
# ruff: noqa: E402

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import ROOT, build_model

from modeling_unigrf import RecommendationPipeline
from tokenization import SemanticIdTokenizer

for package in ("fastapi", "httpx", "prometheus_client", "uvicorn"):
    pytest.importorskip(package, reason=f"the server needs {package}: pip install -e '.[serve]'")

import httpx
import uvicorn

from recipes.benchmarks import serving as benchmark
from recipes.serve import LimitArguments, ServeArguments, serve
from recipes.serving.app import ADMIN_KEY, Limits, create_app
from recipes.serving.batching import Batcher, Job, QueueFull
from recipes.serving.caches import User, Users
from recipes.serving.engine import Engine, Lists, Served, load
from recipes.serving.metrics import Metrics
from recipes.serving.schemas import Refusal, Request

IDS = [f"sku-{number}" for number in range(30)]
HISTORY = {"items": ["sku-1", "sku-2"], "behaviors": ["like", "dislike"]}
MEGABYTES = 2**24


def build_pipeline(backbone="llama", num_items=30, **options):
    """Build a pipeline over a random model with transitions."""
    options = {"num_beams": 8, "num_transition_candidates": 4, "transition_weight": 0.5, **options}
    model = build_model(backbone, num_items=num_items)
    model.set_transitions([list(range(num_items))])
    model.generation_config.update(**options, allow_custom_entries=True)
    codes = model.catalog.item_codes.numpy()
    tokenizer = SemanticIdTokenizer.from_codes(
        IDS[:num_items], codes, model.config.codebook_sizes, model.config.behaviors, titles=IDS[:num_items]
    )
    return RecommendationPipeline(model=model, tokenizer=tokenizer)


def build_engine(pipeline, user_bytes=MEGABYTES, lists=None):
    return Engine(Served("first", pipeline), Users(user_bytes), lists or Lists(), "error", Metrics())


@contextmanager
def serving(engine, **limits):
    """Serve on a free port, in a thread, and yield a client."""
    server = uvicorn.Server(uvicorn.Config(create_app(engine, Limits(**limits)), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline()


@pytest.fixture(scope="module")
def client(pipeline):
    with serving(build_engine(pipeline, lists=Lists(parts={"north": IDS[:9]}))) as client:
        yield client


def alike(items):
    """Make a list that equals others up to rounding."""
    return [
        {
            name: pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
            for name, value in item.items()
        }
        for item in items
    ]


def random_request(rng, lengths=(1, 12)):
    """Draw a request with some of the options."""
    length = rng.integers(*lengths)
    request = {
        "items": [IDS[item] for item in rng.integers(30, size=length)],
        "behaviors": [("dislike", "like")[behavior] for behavior in rng.integers(2, size=length)],
    }
    options = {
        "allowed_items": [IDS[item] for item in rng.choice(30, 20, replace=False)],
        "blocked_items": [IDS[item] for item in rng.choice(30, 5, replace=False)],
        "part": "north",
        "num_return_sequences": int(rng.integers(1, 6)),
        "ranking_target": ("next", "like")[rng.integers(2)],
        "exclude_history": bool(rng.integers(2)),
        "num_reasons": 2,
    }
    return request | {name: options[name] for name in options if rng.random() < 0.2}


def expected_list(pipeline, request):
    """Return the pipeline's list of a request of the server, alone and whole."""
    names = ("num_return_sequences", "ranking_target", "exclude_history", "num_reasons")
    options = {name: request[name] for name in names if name in request}
    if "part" in request:
        items = torch.from_numpy(pipeline.tokenizer.item_indices(IDS[:9]))
        options["catalog"] = pipeline.model.catalog.subset(items)
    known = ("items", "behaviors", "timestamps", "query_time", "allowed_items", "blocked_items")
    return pipeline({name: request[name] for name in known if name in request}, **options)


def metric(client, name):
    """Return the sum of a counter over its labels."""
    lines = [line.rpartition(" ") for line in client.get("/metrics").text.splitlines()]
    return sum(float(value) for key, _, value in lines if key.startswith(name) and key[len(name) :][:1] in ("", "{"))


def test_requests_at_once_get_the_lists_of_the_pipeline(pipeline):
    rng = np.random.default_rng(0)
    requests = [random_request(rng) for _ in range(60)]

    async def ask_all(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            calls = [client.post("/recommend", json=request) for request in requests[:40]]
            calls += [client.post("/recommend_many", json={"requests": requests[40:]})]
            return await asyncio.gather(*calls)

    engine = build_engine(pipeline, lists=Lists(parts={"north": IDS[:9]}))
    with serving(engine, max_batch=8, max_wait_ms=30) as client:
        *single, many = asyncio.run(ask_all(client.base_url))
        batches = metric(client, "unigrf_batch_size_count")
    answers = [answer.json() for answer in single] + many.json()["answers"]
    for request, answer in zip(requests, answers, strict=True):
        assert answer["items"] == alike(expected_list(pipeline, request)), request
    assert batches < len(requests) / 1.5


@pytest.mark.parametrize("memory", ["large", "small"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "mistral", "hstu"])
def test_kept_caches_give_the_lists_of_whole_histories(backbone, memory):
    # The window of four items moves; little memory evicts.
    pipeline = build_pipeline(backbone, max_items=4)
    engine = build_engine(pipeline, MEGABYTES if memory == "large" else 40_000)
    rng = np.random.default_rng(1)
    columns = ["items", "behaviors", "timestamps"][: 3 if backbone == "hstu" else 2]
    histories = {f"user {number}": {name: [] for name in columns} for number in range(6)}
    known = dict.fromkeys(histories, 0)
    refused = 0
    for step in range(12):
        users = rng.choice(list(histories), size=rng.integers(1, 5), replace=False).tolist()
        for user in users:
            new = random_request(rng, (0 if known[user] else 1, 4))
            new["timestamps"] = [1000 * step + place for place in range(len(new["items"]))]
            for name, values in histories[user].items():
                values += new[name]
        requests = []
        for user in users:
            sent = {name: values[known[user] :] for name, values in histories[user].items()}
            if backbone == "hstu":
                sent["query_time"] = 1000 * step + 500
            requests.append(Request(**sent, user_id=user, known_items=known[user]))
        answers = engine.answer(requests)
        for place, (user, request) in enumerate(zip(users, requests, strict=True)):
            if isinstance(answers[place], Refusal):
                assert answers[place].status == 409 and answers[place].details["known_items"] < known[user]
                refused += 1
                whole = request.model_copy(update={**histories[user], "known_items": 0})
                (answers[place],) = engine.answer([whole])
            query = {} if request.query_time is None else {"query_time": request.query_time}
            assert answers[place]["items"] == alike(pipeline({**histories[user], **query}))
            known[user] = answers[place]["known_items"]
            assert known[user] == len(histories[user]["items"])
        assert engine.users.num_bytes == sum(user.num_bytes for user in engine.users.users.values())
        assert engine.users.num_bytes <= engine.users.max_bytes
    assert (refused > 0) == (memory == "small") and (engine.users.num_evicted > 0) == (memory == "small")
    assert engine.metrics.registry.get_sample_value("unigrf_history_tokens_total", {"source": "cache"}) > 0


def test_a_retried_request_counts_once(client, pipeline):
    user = {"user_id": "retried"}
    assert client.post("/recommend", json=HISTORY | user).json()["known_items"] == 2
    new = {"items": ["sku-3"], "behaviors": ["like"], "known_items": 2}
    answers = [client.post("/recommend", json=new | user).json() for _ in range(2)]
    assert answers[0]["known_items"] == 3 and answers[0]["items"] == alike(answers[1]["items"])
    whole = {"items": [*HISTORY["items"], "sku-3"], "behaviors": [*HISTORY["behaviors"], "like"]}
    assert answers[1]["items"] == alike(pipeline(whole))


def test_users_in_bounded_memory_make_room_for_others():
    users = Users(10_000)
    size = User.of({"items": ["a"]}, None).num_bytes
    for number in range(10):
        users.get("0")
        assert users.put(str(number), User.of({"items": ["a"]}, None))
    assert len(users.users) == 10_000 // size and "0" in users.users and "9" in users.users
    assert users.num_bytes == size * len(users.users) and users.num_evicted == 10 - len(users.users)
    assert not users.put("0", User.of({"items": ["a" * 10_000]}, None)) and "0" not in users.users


BAD = [
    ({"items": ["sku-1", "none"], "behaviors": ["like", "like"]}, "items"),
    ({"items": ["\ud800"], "behaviors": ["like"]}, "items"),
    ({"items": [1.5], "behaviors": ["like"]}, "items"),
    ({"items": [True], "behaviors": ["like"]}, "items"),
    ({"items": "sku-1", "behaviors": ["like"]}, "items"),
    ({"behaviors": ["like"]}, "items"),
    ({"items": ["sku-1"], "behaviors": ["love"]}, "behaviors"),
    ({"items": ["sku-1"], "behaviors": ["like", "like"]}, "behaviors"),
    ({"items": ["sku-1"]}, "behaviors"),
    ({**HISTORY, "timestamps": ["yesterday", 1]}, "timestamps"),
    ({**HISTORY, "timestamps": [1]}, "timestamps"),
    ({**HISTORY, "query_time": float("inf")}, "query_time"),
    ({**HISTORY, "allowed_items": ["none"]}, "allowed_items"),
    ({**HISTORY, "allowed_items": []}, "allowed_items"),
    ({**HISTORY, "blocked_items": ["none"]}, "blocked_items"),
    ({**HISTORY, "part": "south"}, "part"),
    ({**HISTORY, "num_return_sequences": 0}, "num_return_sequences"),
    ({**HISTORY, "num_return_sequences": 10**9}, "num_return_sequences"),
    ({**HISTORY, "ranking_target": "buy"}, "ranking_target"),
    ({**HISTORY, "num_reasons": -1}, "num_reasons"),
    ({**HISTORY, "exclude_history": "yes"}, "exclude_history"),
    ({**HISTORY, "user_id": "u" * 257}, "user_id"),
    ({**HISTORY, "know_items": 1}, "know_items"),
]


@pytest.mark.parametrize(("request_json", "field"), BAD, ids=[f"{field}-{row}" for row, (_, field) in enumerate(BAD)])
def test_bad_requests_name_the_field_and_the_row(request_json, field, client):
    def post(path, content):
        headers = {"Content-Type": "application/json"}
        return client.post(path, content=json.dumps(content), headers=headers)

    answer = post("/recommend", request_json)
    assert answer.status_code == 422, answer.text
    assert [(entry["row"], entry["field"]) for entry in answer.json()["detail"]] == [(None, field)]
    answer = post("/recommend_many", {"requests": [HISTORY, request_json, HISTORY, request_json]})
    assert answer.status_code == 422
    assert [(entry["row"], entry["field"]) for entry in answer.json()["detail"]] == [(1, field), (3, field)]
    assert post("/recommend", HISTORY).status_code == 200


def test_a_request_without_a_list_does_not_fail_others(pipeline):
    engine = build_engine(pipeline)
    engine.unknown = "skip"
    empty = [{**HISTORY, "blocked_items": IDS}, {"items": ["none"], "behaviors": ["like"]}]
    empty += [{**HISTORY, "allowed_items": ["none"]}]
    requests = [HISTORY, *empty, {"items": ["sku-9", "none"], "behaviors": ["like", "like"], "user_id": "u"}]
    with serving(engine, max_wait_ms=50) as client:
        assert {client.post("/recommend", json=request).status_code for request in empty} == {422}
        for _ in range(2):
            answers = client.post("/recommend_many", json={"requests": requests}).json()["answers"]
            expected = pipeline(
                [{name: row[name] for name in row if name != "user_id"} for row in requests], unknown="skip"
            )
            assert [answer["items"] for answer in answers] == [alike(items) for items in expected]
            assert [bool(items) for items in expected] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 422),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b'{"items": "' + b"a" * 10 * 2**20 + b'"}', 413),
        (json.dumps({"items": IDS[:25] * 4000, "behaviors": ["like"] * 100_000}).encode(), 200),
    ],
    ids=["cut", "bytes", "nested", "list", "10-megabytes", "100000-items"],
)
def test_strange_bodies_get_defined_answers(body, status, client):
    answer = client.post("/recommend", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and len(answer.content) < 5000
    assert client.post("/recommend", json=HISTORY).status_code == 200


def test_batches_mix_no_options_and_hold_a_user_once():
    batches = []

    def answer(requests):
        batches.append(requests)
        time.sleep(0.01)
        return [ValueError(request) if request == "b1" else request for request in requests]

    async def run():
        batcher = Batcher(answer, max_size=3, max_wait=0.05, max_queue=12)
        task = asyncio.create_task(batcher.run())
        jobs = [Job(f"{kind}{number}", options=kind) for number in range(4) for kind in "ab"]
        jobs += [Job(f"u{number}", options="u", user="u" if number < 2 else None) for number in range(3)]
        waiting = asyncio.create_task(batcher.submit(jobs))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.submit([Job("late"), Job("later")])
        results = await waiting
        task.cancel()
        return [result if isinstance(result, str) else repr(result) for result in results], [
            job.request for job in jobs
        ]

    results, requests = asyncio.run(run())
    assert results == ["ValueError('b1')" if request == "b1" else request for request in requests]
    assert batches == [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["a3"], ["b3"], ["u0", "u2"], ["u1"]]


def test_a_full_queue_is_refused_and_not_ready(pipeline):
    engine = build_engine(pipeline)
    answer = engine.answer
    opened = threading.Event()
    engine.answer = lambda requests: opened.wait(30) and answer(requests)
    with serving(engine, max_queue=2, max_batch=1, max_wait_ms=0) as client, ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(client.post, "/recommend", json=HISTORY) for _ in range(3)]
        while metric(client, "unigrf_queue_length") < 2:
            time.sleep(0.01)
        refused = client.post("/recommend", json=HISTORY)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        many = {"requests": [HISTORY] * 3}
        assert client.post("/recommend_many", json=many).status_code == 422, "such a call never fits"
        opened.set()
        assert [call.result().status_code for call in calls] == [200] * 3
        assert client.get("/ready").status_code == 200 and metric(client, "unigrf_queue_length") == 0


def test_lists_of_the_shop_are_swapped(pipeline):
    request = {"items": ["sku-20"], "behaviors": ["like"]}

    def items_of(client, **options):
        return client.post("/recommend", json=request | options).json()

    with serving(build_engine(pipeline)) as client:
        before = items_of(client)
        blocked = [item["item_id"] for item in before["items"][:3]]
        assert client.put("/admin/blocked", json={"items": blocked}).status_code == 200
        expected = pipeline(request | {"blocked_items": blocked})
        assert items_of(client)["items"] == alike(expected)
        # A part, without what is blocked.
        part = [*blocked, *(item["item_id"] for item in expected[:2]), "sku-29"]
        assert client.put("/admin/parts/south", json={"items": part}).status_code == 200
        expected = pipeline(request | {"allowed_items": part, "blocked_items": blocked})
        assert items_of(client, part="south")["items"] == alike(expected)
        for wrong in ({"items": ["none"]}, {"items": IDS}, {"items": [1.5]}, {}):
            assert client.put("/admin/blocked", json=wrong).status_code == 422
        for wrong in ({"items": blocked}, {"items": []}, {"items": ["none"]}):
            assert client.put("/admin/parts/south", json=wrong).status_code == 422
        assert items_of(client, part="south")["items"] == alike(expected), "refused lists change nothing"
        assert client.delete("/admin/parts/south").status_code == 200
        assert client.delete("/admin/parts/south").status_code == 404
        assert items_of(client, part="south")["detail"][0]["field"] == "part"
        assert client.put("/admin/blocked", json={"items": []}).status_code == 200
        assert items_of(client)["items"] == alike(before["items"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of two checkpoints of the same items, of fewer items, and of damaged ones."""
    root = tmp_path_factory.mktemp("checkpoints")
    build_pipeline().save_pretrained(root / "first")
    other = build_pipeline()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.2)
    other.save_pretrained(root / "second")
    build_pipeline(num_items=20).save_pretrained(root / "fewer")
    half = build_pipeline()
    half.model.to(torch.bfloat16)
    half.save_pretrained(root / "bfloat16")
    with torch.no_grad():
        other.model.lm_head.weight.fill_(torch.nan)
    other.save_pretrained(root / "nan")
    build_pipeline().save_pretrained(root / "cut")
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    build_pipeline().save_pretrained(root / "without_items")
    (root / "without_items" / "items.json").unlink()
    return root


def test_a_reload_takes_over_between_requests(checkpoints):
    engine = Engine(load(str(checkpoints / "first")), Users(MEGABYTES), Lists(IDS[5:7]), "error", Metrics())
    request = HISTORY | {"blocked_items": IDS[5:7]}
    names = [str(checkpoints / name) for name in ("first", "second")]
    lists = [load(name).pipeline(request) for name in names]
    assert lists[0][0]["score"] != pytest.approx(lists[1][0]["score"], abs=1e-3)
    expected = {name: alike(items) for name, items in zip(names, lists, strict=True)}

    with serving(engine) as client:
        stopped = threading.Event()
        seen = []

        def keep_asking(number):
            while not stopped.is_set():
                answer = client.post("/recommend", json=HISTORY | {"user_id": f"user {number}"})
                assert answer.status_code == 200
                answer = answer.json()
                assert answer["items"] == expected[answer["checkpoint"]]
                seen.append(answer["checkpoint"])

        def reload(name, **options):
            return client.post("/admin/reload", json={"checkpoint": str(checkpoints / name), **options})

        with ThreadPoolExecutor(2) as pool:
            askers = [pool.submit(keep_asking, number) for number in range(2)]
            try:
                assert client.post("/admin/rollback").status_code == 409
                for damaged in ("cut", "nan", "without_items", "none", "fewer"):
                    answer = reload(damaged)
                    assert (answer.status_code, answer.json()["detail"][0]["field"]) == (422, "checkpoint"), damaged
                assert set(seen) == {str(checkpoints / "first")}
                taken = reload("second").json()
                assert taken["checkpoint"] == str(checkpoints / "second") and taken["removed_items"] == 0
                del seen[:]
                time.sleep(0.3)
                assert client.post("/admin/rollback").json()["checkpoint"] == str(checkpoints / "first")
            finally:
                stopped.set()
            for asker in askers:
                asker.result()
        assert str(checkpoints / "second") in seen
        assert reload("bfloat16").json()["checkpoint"] == str(checkpoints / "bfloat16")
        assert client.post("/recommend", json=HISTORY).status_code == 200
        assert reload("fewer", allow_removed_items=True).json()["removed_items"] == 10
        kept = {"items": ["sku-3"], "behaviors": ["like"], "user_id": "user 0", "known_items": 2}
        assert client.post("/recommend", json=kept).json()["known_items"] == 3, "histories survive, caches do not"
        assert client.post("/recommend", json=HISTORY | {"allowed_items": ["sku-25"]}).status_code == 422


def test_admin_calls_need_their_key(pipeline, monkeypatch):
    app = create_app(build_engine(pipeline), host="0.0.0.0")

    async def statuses():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            calls = [client.post("/admin/rollback"), client.post("/admin/rollback", headers={"X-Admin-Key": "key"})]
            return [(await call).status_code for call in calls] + [(await client.get("/openapi.json")).status_code]

    assert asyncio.run(statuses()) == [403, 403, 200]
    monkeypatch.setenv(ADMIN_KEY, "other")
    assert asyncio.run(statuses()) == [403, 403, 200]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("checkpoint", "none/such", "`checkpoint` must be an existing path"),
        ("port", 70_000, "`port` must be from 0 to 65535"),
        ("max_batch", 0, "`max_batch` must be 1 or more"),
        ("max_wait_ms", float("nan"), "`max_wait_ms` must be 0 or more"),
        ("blocked", {"items": ["none"]}, "`blocked`: Item IDs must be in the catalog"),
        ("blocked", {"items": IDS}, "The catalog must keep an item"),
        ("blocked", {"north": ["sku-1"]}, "the key `items` alone"),
        ("parts", {"north": "sku-1"}, "`parts` must hold lists of item ids"),
        ("parts", {"north": []}, "must keep an item that is not blocked"),
        ("parts", ["sku-1"], "must hold a JSON object"),
    ],
)
def test_wrong_arguments_are_refused_before_serving(flag, value, message, checkpoints, tmp_path):
    if flag in ("blocked", "parts"):
        (tmp_path / "lists.json").write_text(json.dumps(value))
        value = str(tmp_path / "lists.json")
    args = ServeArguments(checkpoint=str(checkpoints / "first"))
    limits = LimitArguments()
    setattr(limits if hasattr(limits, flag) else args, flag, value)
    with pytest.raises(ValueError, match=message):
        serve(args, limits)


@pytest.mark.parametrize("cached", [False, True])
def test_the_benchmark_counts_what_clients_get(cached, pipeline):
    shop = benchmark.Shop(pipeline.tokenizer, 4, seed=0)
    with serving(build_engine(pipeline)) as client:
        figures = asyncio.run(benchmark.ask(str(client.base_url), shop, 2, cached, 60, most=10))
        assert metric(client, "unigrf_requests_total") == figures["requests"] + 4 * cached
        assert (metric(client, 'unigrf_history_tokens_total{source="cache"}') > 0) == cached
    assert 10 <= figures["requests"] <= 12 and figures["p50_ms"] <= figures["p99_ms"]
    row = {"contender": "server", "batches": True, "cache": cached, "clients": 2, **figures}
    results = {"rows": [row], "memory": [], "seed": 0, "checkpoint": "a", "load average": {"before": 1, "after": 2}}
    made = {"command": "python", "machine": "m", "versions": "v", "date": "d"}
    assert f"| server | yes | {'yes' if cached else 'no'} | 2 |" in benchmark.table({**results, "made by": made})


@contextmanager
def process_of(checkpoint, *flags):
    """Start the command on a free port, and yield the process and its address."""
    command = [sys.executable, "-m", "recipes.serve", "--checkpoint", str(checkpoint), "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        lines = iter(process.stderr.readline, "")
        yield process, next(re.search(r"http://[\d.:]+", line)[0] for line in lines if "http://" in line)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_command_ends_after_calls_in_flight(checkpoints, tmp_path):
    (tmp_path / "parts.json").write_text(json.dumps({"north": IDS[:9]}))
    (tmp_path / "blocked.json").write_text(json.dumps({"items": IDS[:2]}))
    flags = (f"--parts={tmp_path / 'parts.json'}", f"--blocked={tmp_path / 'blocked.json'}", "--max_wait_ms=700")
    with process_of(checkpoints / "first", *flags) as (process, url):
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(httpx.post, f"{url}/recommend", json=HISTORY | {"part": "north"}) for _ in range(4)]
            while "unigrf_queue_length 4.0" not in httpx.get(f"{url}/metrics").text:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            answers = [call.result() for call in calls]
        assert [answer.status_code for answer in answers] == [200] * 4
        items = {item["item_id"] for answer in answers for item in answer.json()["items"]}
        assert items and items <= set(IDS[2:9])
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)

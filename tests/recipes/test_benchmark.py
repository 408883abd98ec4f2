"""The benchmark: it runs, its contenders agree, and stored measurements are reused."""

import json

import pytest
import torch

from recipes.benchmarks import decoding as benchmark_decoding
from recipes.benchmarks import ranking_cost, training
from recipes.benchmarks import report as decoding_report
from recipes.benchmarks.baselines import DictTrie, StaticTrie, random_catalog


def test_a_small_benchmark_is_run_and_stored(tmp_path, monkeypatch):
    # Small cells for the ratios.
    cell = {"history_items": 3, "num_beams": 8, "users": 1, "levels": 4, "catalog": 400}
    for name in ("SEARCH", "LONG", "HALF", "BATCH", "CANDIDATES"):
        monkeypatch.setattr(decoding_report, name, cell)
    monkeypatch.setattr(decoding_report, "CATALOG", 400)
    monkeypatch.setattr(benchmark_decoding, "RATIO_CELLS", [(3, 8, 1)])
    monkeypatch.setattr(benchmark_decoding, "run_candidates", lambda *_: None)
    small = {"CELLS": [(0, 0), (10, 30)], "USERS": (1, 2), "NUM_BEAMS": 4, "RANKED": 2, "TRAINING_ROWS": 2}
    for name, value in small.items():
        monkeypatch.setattr(ranking_cost, name, value)
    arguments = benchmark_decoding.BenchmarkArguments(
        output=str(tmp_path / "decoding.json"),
        history_items=[2],
        num_beams=[4],
        users=[1, 2],
        catalogs=[400],
        trie_sizes=[1000],
        repeats=1,
        dtypes=["float32"],
    )
    benchmark_decoding.main(arguments)
    data = json.loads((tmp_path / "decoding.json").read_text())
    assert (tmp_path / "decoding.png").stat().st_size > 1000
    tasks = {(row["task"], row["contender"]) for row in data["rows"] if row["users"] == 2}
    assert len(tasks) == 9 and all(row["wall_ms"] > 0 for row in data["rows"])
    assert [row["same_items"] for row in data["agreement"]] == [1.0]
    assert {row["what"].split(",")[0] for row in data["ratios"]} >= {"beam search", "256 beams over 128"}
    text = decoding_report.table(data)
    assert "**search, ours**" in text and "1,000" in text and "\n| of 10 | 30 | 2 | " in text
    tasks = [row["task"] for row in data["ranking"]]
    assert tasks == [
        *["generate", "recommend", "recommend, cut"] * 2,
        "training step",
        *["generate", "recommend", "recommend, cut", "retrieve"] * 2,
        "training step",
    ]
    of_cell = {row["task"]: row["wall_ms"] for row in data["ranking"][11:15]}
    for task in ("recommend", "recommend, cut"):
        added = decoding_report.added_by_ranking(data, task, retrieved=10, long_items=30, users=2, dtype="float32")
        assert added["wall"] == round(of_cell[task] / of_cell["generate"], 2)
    monkeypatch.setattr(benchmark_decoding, "measure", None)  # stored measurements are reused
    benchmark_decoding.main(arguments)
    assert json.loads((tmp_path / "decoding.json").read_text())["rows"] == data["rows"]
    monkeypatch.setattr(benchmark_decoding, "measure", lambda calls, _: {call: {"wall_ms": 1.0} for call in calls})
    arguments.parts = ["ranking"]
    monkeypatch.setattr(benchmark_decoding, "ratios", lambda data: [])
    benchmark_decoding.main(arguments)
    again = json.loads((tmp_path / "decoding.json").read_text())
    assert {row["wall_ms"] for row in again["ranking"]} == {1.0} and again["rows"] == data["rows"]
    assert again["made by"] == data["made by"] and again["ranking made by"]["command"].endswith("--parts ranking")


def test_a_slow_contender_runs_once_and_warm_up_is_not_counted():
    calls = {"short": 0, "long": 0}

    def run(name):
        calls[name] += 1

    figures = benchmark_decoding.measure({name: lambda name=name: run(name) for name in calls}, repeats=3)
    assert calls == {"short": 4, "long": 4} and {figure["runs"] for figure in figures.values()} == {3}
    calls.update(short=0)
    figures = benchmark_decoding.measure({"short": lambda: run("short")}, repeats=3, seconds=0.0)
    assert calls["short"] == 1 and figures["short"]["runs"] == 1


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_baseline_tries_take_the_same_steps(level):
    codes = random_catalog(3000)
    static = StaticTrie(codes, 256)
    nested = DictTrie(codes)
    prefixes = codes[:, :level].unique(dim=0)[torch.randperm(40, generator=torch.Generator().manual_seed(0))].long()
    keys = [codes[:, : depth + 1].unique(dim=0).tolist() for depth in range(level)]
    states = torch.tensor([keys[-1].index(prefix) for prefix in prefixes.tolist()])
    scores = torch.randn(1, 40)
    log_probs = torch.randn(1, 40, 256)
    by_static, parents, _ = static.step(level, states[None], scores, log_probs, 12)
    by_dict, places = nested.step([prefixes.tolist()], scores, log_probs, 12)
    torch.testing.assert_close(by_static, by_dict)
    assert torch.equal(parents, places // 256)


def test_the_training_benchmark_compares_all_losses(tmp_path):
    sizes = {"hidden_size": 16, "rows": 2, "items": 4, "catalog": 50, "embedding_dim": 4, "repeats": 2}
    training.main(training.TrainingSpeedArguments(output=str(tmp_path / "training.json"), **sizes))
    result = json.loads((tmp_path / "training.json").read_text())
    assert [row["contender"] for row in result["rows"]] == [training.STOCK, *training.CONTENDERS]
    assert result["rows"][0]["of_stock"] == 1.0 and all(row["milliseconds"] > 0 for row in result["rows"])
    assert result["sizes"].startswith("2 rows of 22 tokens")

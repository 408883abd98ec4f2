"""UniGRF's ablations: trained once, scored as by `recommend`, and collected in a table."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from modeling_unigrf import UniGRFForCausalLM
from recipes.papers.unigrf import report as unigrf_report
from recipes.papers.unigrf import reproduce as reproduce_unigrf


@pytest.fixture
def movielens(tmp_path):
    """A folder like MovieLens-1M: 42 users, 70 movies of which one has no rating, and half of the times known."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    lines = [f"{movie}::Film {movie} (1999)::Drama|Comedy" for movie in range(1, 71)]
    (folder / "movies.dat").write_text("\n".join(lines), encoding="latin-1")
    rows = []
    for user in range(1, 41):
        chosen = generator.choice(np.arange(1, 70), size=generator.integers(5, 15), replace=False)
        rows += [(user, movie, generator.integers(1, 6), place + 1) for place, movie in enumerate(chosen)]
    rows += [
        (41 + movie // 36, movie, 1 + movie % 5, movie) for movie in range(1, 70)
    ]  # a rating of every other movie
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "position"])
    times = pd.array(10 * table["position"] ** 3, dtype="Int64")
    times[generator.random(len(table)) < 0.5] = pd.NA
    table.assign(timestamp=times).sample(frac=1, random_state=0).to_parquet(folder / "interactions.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("backbone", "ids", "behaviors"),
    [
        ("llama", "atomic", "like"),
        ("llama", "semantic-vectors", "like"),
        ("llama", "atomic", "rating"),
        ("hstu-time", "atomic", "like"),
        ("hstu-time", "semantic", "like"),
    ],
)
def test_an_ablation_is_trained_once_and_scored_as_recommend(
    movielens, tmp_path, backbone, ids, behaviors, monkeypatch
):
    monkeypatch.setattr(unigrf_report, "FILE", tmp_path / "unigrf_ml1m.json")
    monkeypatch.setattr(reproduce_unigrf, "BEAMS", 69)
    np.save(tmp_path / "movies.npy", np.random.default_rng(1).normal(size=(69, 40)).astype("float32"))
    monkeypatch.setattr(
        reproduce_unigrf,
        "ResidualKMeans",
        lambda sizes, pca_dim, build=reproduce_unigrf.ResidualKMeans: build((4, 4, 4), pca_dim=8),
    )
    arguments = reproduce_unigrf.ReproduceArguments(
        data=movielens,
        row="weighter" if behaviors == "rating" else "both",
        backbone=backbone,
        ids=ids,
        behaviors=behaviors,
        epochs=4,
        batch_size=8,
        code_negatives=16 if behaviors == "like" else 0,
        output_dir=str(tmp_path),
    )
    reproduce_unigrf.run(arguments)
    folder = tmp_path / f"{backbone}-{ids}-{arguments.row}-0"
    result = json.loads((folder / "result.json").read_text())
    written = (folder / "result.json").stat().st_mtime_ns
    reproduce_unigrf.run(arguments)
    assert (folder / "result.json").stat().st_mtime_ns == written, "a finished run is not run again"
    with pytest.raises(ValueError, match=r"other values of \['learning_rate'\]"):
        reproduce_unigrf.run(dataclasses.replace(arguments, learning_rate=1e-3))
    assert result["validation"]["epoch"] == result["epoch"] >= 2

    splits, tokenizer = reproduce_unigrf.load_data(movielens, ids, tmp_path, behaviors)
    assert tokenizer.num_items == 69 and tokenizer.num_levels == (1 if ids == "atomic" else 4)
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    model = UniGRFForCausalLM.from_pretrained(checkpoint).eval()
    test = splits["test"]
    with_times = backbone == "hstu-time"
    assert model.config.reads_times == with_times
    for layer in model.model.language_model.layers if with_times else ():
        torch.nn.init.normal_(layer.bias.times.weight)  # barely trained after so few steps
    metrics = reproduce_unigrf.measure(model, tokenizer, test)
    ranks = []
    likes = []
    scores = []
    like_targets = model.config.ranking_targets
    for user in test:
        tokens = tokenizer.encode_indices(np.array(user["items"]), np.array(user["behaviors"]))
        times = {}
        if with_times:
            times["timestamps"] = torch.tensor(tokenizer.encode_times(user["timestamps"]))[None]
            times["query_time"] = torch.tensor([user["target_timestamp"]])
        beams = {"num_beams": 69, "num_return_sequences": 69, "ranking_weight": 0.0, "exclude_history": True}
        best = model.recommend(torch.tensor(tokens)[None], **beams, **times)
        ranks.append(1 + best.item_indices[0].tolist().index(user["target"]))
        ranking = model.rank(torch.tensor(tokens)[None], candidates=torch.tensor([[user["target"]]]), **times)
        scores.append(ranking[0, 0].sigmoid().sum().item())  # the sum over behaviors that are likes
        likes.append(tokenizer.behaviors[user["target_behavior"]] in like_targets)
    ranks = np.array(ranks)
    assert metrics["mrr"] == pytest.approx(np.mean(1 / ranks), abs=1e-6)
    assert metrics["hr@10"] == pytest.approx(np.mean(ranks <= 10))
    assert metrics["ndcg@10"] == pytest.approx(np.mean((ranks <= 10) / np.log2(ranks + 1)))
    assert 0 < sum(likes) < len(likes) and metrics["auc"] == pytest.approx(roc_auc_score(likes, scores), abs=1e-6)
    assert result["targets never in training"].keys() == {"validation", "test"}

    unigrf_report.collect(tmp_path)
    data = json.loads((tmp_path / "unigrf_ml1m.json").read_text())
    table = unigrf_report.table(data)
    assert f"| {backbone}, {ids}, {arguments.row} | 1 | {round(result['test']['hr@10'], 5):.4f} |" in table
    assert len(data["runs"][0]["curves"]["ranking_weight"]) == 4 and (tmp_path / "unigrf_ml1m.png").exists()


def test_an_interrupted_ablation_resumes_with_its_seconds(movielens, tmp_path, monkeypatch):
    def run(folder, after=99):
        def log(stopwatch, args, state, control, logs=None, **kwargs):
            original(stopwatch, args, state, control, logs, **kwargs)
            if state.epoch > after:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(reproduce_unigrf.Stopwatch, "on_log", log)
            arguments = {"data": movielens, "row": "weighter", "backbone": "hstu", "epochs": 4, "batch_size": 8}
            reproduce_unigrf.run(reproduce_unigrf.ReproduceArguments(output_dir=str(tmp_path / folder), **arguments))
        return json.loads((tmp_path / folder / "hstu-atomic-weighter-0" / "result.json").read_text())

    original = reproduce_unigrf.Stopwatch.on_log
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", after=2)
    state = json.loads(
        (tmp_path / "parts" / "hstu-atomic-weighter-0" / "checkpoint-12" / "trainer_state.json").read_text()
    )
    state["log_history"][-1]["seconds"] = 1000.0
    (tmp_path / "parts" / "hstu-atomic-weighter-0" / "checkpoint-12" / "trainer_state.json").write_text(
        json.dumps(state)
    )
    parts = run("parts")
    assert parts["test"] == whole["test"] and parts["epoch"] == whole["epoch"] and parts["seconds"] > 1000
    curves = [
        [entry["ranking_weight"] for entry in result["history"] if "ranking_weight" in entry]
        for result in (parts, whole)
    ]
    assert curves[0] == curves[1] and curves[0][:2] == [1.0, 1.0] != curves[0][2:]


def test_an_invalid_ablation_is_rejected_before_training(movielens, tmp_path, monkeypatch):
    def run(**changed):
        reproduce_unigrf.run(
            reproduce_unigrf.ReproduceArguments(
                data=movielens, output_dir=str(tmp_path), epochs=2, batch_size=8, **changed
            )
        )

    with pytest.raises(ValueError, match="must be like with the enhancer"):
        run(row="both", behaviors="rating")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a single process"):
        patch.setenv("WORLD_SIZE", "2")
        run(row="joint")
    monkeypatch.setattr(reproduce_unigrf, "LIKED_FROM", 1)
    with pytest.raises(ValueError, match=r"held out for validation, got only \['like'\]"):
        run(row="joint")
    run(row="retrieval")
    result = json.loads((tmp_path / "llama-atomic-retrieval-0" / "result.json").read_text())
    assert "auc" not in result["test"] and result["test"]["mrr"] > 0
    monkeypatch.setattr(unigrf_report, "FILE", tmp_path / "unigrf_ml1m.json")
    unigrf_report.collect(tmp_path)
    (row,) = [
        line
        for line in unigrf_report.table(json.loads(unigrf_report.FILE.read_text())).splitlines()
        if line.startswith("| llama, atomic, retrieval")
    ]
    assert row.split(" | ")[-3] == "-", "without AUC"


def test_a_table_without_runs_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="finished runs"):
        unigrf_report.collect(tmp_path)


def test_a_refit_trains_on_the_validation_targets(movielens, tmp_path, monkeypatch):
    read = []
    history_rows = reproduce_unigrf.history_rows

    def remembered(histories, *others, **options):
        read.append(histories)
        return history_rows(histories, *others, **options)

    monkeypatch.setattr(reproduce_unigrf, "history_rows", remembered)
    monkeypatch.setattr(unigrf_report, "FILE", tmp_path / "unigrf_ml1m.json")
    arguments = {"data": movielens, "row": "joint", "epochs": 2, "batch_size": 8, "output_dir": str(tmp_path)}
    reproduce_unigrf.run(reproduce_unigrf.ReproduceArguments(refit=True, variant="refit", **arguments))
    result = json.loads((tmp_path / "llama-atomic-joint-refit-0" / "result.json").read_text())
    assert result["validation"] is None and result["epoch"] == 2
    validation = reproduce_unigrf.load_data(movielens, "atomic", tmp_path)[0]["validation"]
    (trained,) = read
    for name in ("items", "timestamps"):
        target = "target" if name == "items" else "target_timestamp"
        assert trained[name][:] == [[*row[name], row[target]] for row in validation]
    unigrf_report.collect(tmp_path)
    data = json.loads((tmp_path / "unigrf_ml1m.json").read_text())
    assert data["runs"][0]["validation"] is None and "refit" in unigrf_report.table(data)

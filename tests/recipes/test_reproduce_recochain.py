"""RecoChain's ablations and the SASRec baseline: trained and measured once, and collected in a table."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import GRID, TINY, preferring

from modeling_unigrf import UniGRFForCausalLM
from recipes.common import result_files
from recipes.papers.recochain import report as recochain_report
from recipes.papers.recochain import reproduce as reproduce_recochain
from recipes.papers.recochain import sasrec
from recipes.prepare import PrepareArguments, prepare
from tokenization import SemanticIdTokenizer


def test_an_ablation_is_trained_and_measured_once(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.baselines.GRID", GRID)
    arguments = {"data_dir": str(prepared), "output_dir": str(tmp_path), "text_config": json.dumps(TINY)}
    arguments |= {
        "crops_per_epoch": 1,
        "second_stride": 4,
        "num_train_beams": 4,
        "exclude_history": True,
        "num_dense_candidates": 5,
    }

    def run(row: str, *beams: int, **changed) -> list[int]:
        rerank_top_k = 3 if max(beams) > 3 else 0
        entry = {"row": row, "num_beams": list(beams), "rerank_top_k": rerank_top_k, **arguments, **changed}
        reproduce_recochain.run(reproduce_recochain.ReproduceArguments(**entry))
        return [file.stat().st_mtime_ns for file in sorted((tmp_path / f"{row}-0").glob("beams-*.json"))]

    run("no-embedding-part", 3)
    run("k0", 3)
    run("paper-k0", 3)
    run("default", 3, history_item_representations=False)
    before = run("default", 3, 6)
    assert sorted(folder.name for folder in tmp_path.glob("stage-one-*")) == [
        "stage-one-window7-le-0",
        "stage-one-window7-leh-0",
        "stage-one-window7-lehp-0",
        "stage-one-window7-lh-0",
    ], "ablations share a stage I"
    trained = (tmp_path / "default-0" / "checkpoint" / "training_log.json").stat().st_mtime_ns
    assert run("default", 3, 6) == before and len(before) == 5, "with three beams all are ranked"
    assert len(run("default", 20)) == 8
    assert (tmp_path / "default-0" / "checkpoint" / "training_log.json").stat().st_mtime_ns == trained
    choices = []
    for file in (tmp_path / "default-0").glob("beams-20-*.json"):  # of the last call
        result = json.loads(file.read_text())
        cells = result["cells"]
        for name in ("generation", "ranked", "ranked at weight 1", "ranked, three scores", "item score alone"):
            assert all(cells["oracle"][column] >= value for column, value in cells[name].items())
        choices.append((result["validation ndcg@10"], file.name, result["weights"]["ranked, three scores"]))
        gain = result["gain"]["ranked"]["recall@10"]["difference"]
        assert gain == pytest.approx(cells["ranked"]["recall@10"] - cells["generation"]["recall@10"])

    config = UniGRFForCausalLM.from_pretrained(tmp_path / "paper-k0-0" / "checkpoint").config
    assert config.ranking_targets == ["next"] and not config.rank_by_dense_score and not config.num_retrieved_items
    assert config.training_config.ranking_loss_weight == 1 / config.num_levels
    model = UniGRFForCausalLM.from_pretrained(tmp_path / "default-codes-alone-0" / "checkpoint")
    assert not model.config.history_item_representations
    model = UniGRFForCausalLM.from_pretrained(tmp_path / "default-0" / "checkpoint")
    assert model.config.history_item_representations
    weights = {"ranking": model.generation_config.ranking_weight, "item score": model.generation_config.dense_weight}
    name = f"beams-{model.generation_config.num_beams}-union-{model.generation_config.num_dense_candidates}"
    name += f"-ranked-{model.generation_config.rerank_top_k}.json" if model.generation_config.rerank_top_k else ".json"
    assert (max(choices)[0], name, weights) in choices, "the defaults of the checkpoint are chosen on validation"

    monkeypatch.setattr(recochain_report, "RESULTS", tmp_path)
    recochain_report.collect(tmp_path, prepared, "recochain_beauty")
    assert (tmp_path / "recochain_beauty.png").stat().st_size > 10_000
    whole = (tmp_path / "recochain_beauty.json").read_text()
    shutil.rmtree(tmp_path / "k0-0")
    monkeypatch.delattr(recochain_report, "baseline_results")  # baselines are computed once
    recochain_report.collect(tmp_path, prepared, "recochain_beauty")
    assert (tmp_path / "recochain_beauty.json").read_text() == whole, "a run without its folder stays stored"
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="Run some ablations first"):
        recochain_report.collect(elsewhere, prepared, "recochain_beauty")
    (elsewhere / "sasrec").mkdir(parents=True)
    test = dict.fromkeys((*recochain_report.COLUMNS, "mrr"), 0.5)
    (elsewhere / "sasrec" / "sasrec.json").write_text(json.dumps({"tests": [test]}))
    recochain_report.collect(elsewhere, prepared, "recochain_beauty")
    beside = json.loads((tmp_path / "recochain_beauty.json").read_text())
    assert f"| {recochain_report.SASREC} | 0.5000 |" in recochain_report.table(beside), (
        "a baseline that was added later"
    )
    data = json.loads(whole)
    table_rows = recochain_report.ablations_of(data)
    assert len(table_rows) == 8 + 2 + 2 + 2 + 2 and set(data["baselines"]) == {"popularity", "item_knn", "transitions"}
    rows = recochain_report.table(data).splitlines()
    for beginning in (
        "| default | 20 | 1 |",
        "| default | 20 + 5 items | 1 |",
        "| ablation | seeds | 3 beams | 6 beams | 6 beams, 3 of them ranked | 20 beams | 20 beams, 3 of them ranked |",
        "| default | 1 | +",
        "| k0 | 1 | ",
        "| *the target is a candidate (default)* | | ",
        "| popularity |",
        "| *TIGER, published* |",
    ):
        assert sum(row.startswith(beginning) for row in rows) == 1
    entry = {"arguments": {"learning_rate": 3e-6}, "found": 0.1234567}
    assert result_files.result_entry(entry) == {"arguments": {"learning_rate": 3e-6}, "found": 0.12346}
    several = [
        {"gain": {"ranked": {"recall@5": {"relative": gain, "standard error": 0.01}}}} for gain in (0.1, 0.2, 0.3)
    ]
    row = {"runs": several, "test": {"generation": {"recall@5": 0.2}}}
    assert recochain_report.gain_of(row, "recall@5") == (pytest.approx(20), pytest.approx(10)), "over three seeds"
    row["runs"] = several[::2]
    assert recochain_report.gain_of(row, "recall@5") == (pytest.approx(20), pytest.approx(5)), (
        "over users, with two seeds"
    )


@pytest.mark.parametrize("row", reproduce_recochain.ABLATIONS)
def test_an_ablation_changes_only_what_it_names(row, prepared, tmp_path, monkeypatch):
    trained = []

    def train(model_args, data_args, training_args):
        trained.append((vars(model_args) | {"seed": training_args.seed}, vars(data_args), training_args))
        return tmp_path / "checkpoint"

    monkeypatch.setattr(reproduce_recochain, "train", train)

    def stages(name: str) -> list[dict]:
        trained.clear()
        arguments = {"data_dir": str(prepared), "output_dir": str(tmp_path), "batch_size": 64}
        reproduce_recochain.train_stages(reproduce_recochain.ReproduceArguments(row=name, **arguments))
        of_stages = []
        for model_args, data_args, training_args in trained:
            stage = {**model_args, **data_args}
            names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay")
            of_stages.append(stage | {name: getattr(training_args, name) for name in names})
        return of_stages

    differ = [
        {name: fields.get(name) for name in {*fields, *two} if fields.get(name) != two.get(name)}
        for fields, two in zip(stages(row), stages("default"), strict=True)
    ]
    long = {"num_train_epochs": 3.0}
    windows = {"window31": (31, 16), "window127": (127, 4)}
    expected = {
        "default": ({}, {}),
        "window7": ({}, {}),  # the default window
        **{f"k{count}": ({}, {"num_retrieved_items": count}) for count in (0, 1, 5, 20)},
        "history-detached": ({}, {"stop_gradient_history": True}),
        "long": ({}, long),
        "long-k0": ({}, {**long, "num_retrieved_items": 0}),
        "long-first-stage": ({"num_train_epochs": 4.0}, {}),
        "long-first-stage-k0": ({"num_train_epochs": 4.0}, {"num_retrieved_items": 0}),
        "not-injected": ({}, {"inject_target": False}),
        "not-injected-k0": ({}, {"inject_target": False, "num_retrieved_items": 0}),
        "item-score-detached": ({}, {"stop_gradient_dense_score": True}),
        "item-score-detached-not-injected-k0": (
            {},
            {"stop_gradient_dense_score": True, "inject_target": False, "num_retrieved_items": 0},
        ),
        "frozen": ({}, {"freeze_base_model": True}),
        "frozen-k0": ({}, {"freeze_base_model": True, "num_retrieved_items": 0}),
        "frozen-not-injected-k0": ({}, {"freeze_base_model": True, "num_retrieved_items": 0, "inject_target": False}),
        "no-item-score": ({}, {"rank_by_dense_score": False}),
        "no-item-score-k0": ({}, {"rank_by_dense_score": False, "num_retrieved_items": 0}),
        "no-learned-part": ({"embedding_table_size": 0}, {"embedding_table_size": 0}),
        "no-embedding-part": ({"project_content_embeddings": False}, {"project_content_embeddings": False}),
    }
    for name, (items, rows) in windows.items():
        expected[name] = ({"max_items": items, "per_device_train_batch_size": rows}, {"max_items": items})
    paper = {"ranking_targets": ["next"]}
    share = 1 / SemanticIdTokenizer.from_pretrained(prepared / "tokenizer").num_levels
    for name, fewer in (("paper", {}), ("paper-k0", {"num_retrieved_items": 0})):
        expected[name] = (paper, {**paper, "rank_by_dense_score": False, "ranking_loss_weight": share, **fewer})
    assert tuple(differ) == expected[row]


def test_a_tuned_sasrec_learns_and_is_in_the_table(prepared, tmp_path):
    atomic = prepare(
        PrepareArguments(
            interactions=str(prepared.parent / "interactions.parquet"),
            items=str(prepared.parent / "items.parquet"),
            output_dir=str(tmp_path / "atomic"),
            atomic=True,
        )
    )
    folder = tmp_path / "sasrec"
    settings = {"text_config": json.dumps(TINY), "max_items": 10, "epochs": 40.0, "batch_size": 8}
    settings |= {"learning_rates": [1e-2, 1e-6], "embedding_dropouts": [0.1], "seeds": [0, 1]}
    arguments = sasrec.SasrecArguments(data_dir=str(atomic), output_dir=str(folder), **settings)
    result = sasrec.run(arguments)
    assert result["chosen"] == {"learning_rate": 1e-2, "dropout": 0.1}, "chosen on validation"
    assert len(result["tried"]) == 2 and len(result["tests"]) == 2
    assert all(test["recall@5"] > 0.9 for test in result["tests"]), "guessing reaches 0.2"
    logs = {file: file.stat().st_mtime_ns for file in folder.glob("*/checkpoint/training_log.json")}
    assert len(logs) == 3, "the second seed is trained only with the chosen setting"
    assert sasrec.run(arguments) == result
    assert {file: file.stat().st_mtime_ns for file in logs} == logs, "a finished training is not run again"
    report = {
        "name": "any",
        "protocol": "",
        "codebook sizes": [],
        "baselines": {},
        "runs": [{"made by": result["made by"]}],
    }
    report["beside"] = {recochain_report.SASREC: json.loads((folder / "sasrec.json").read_text())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recochain_report, "ablations_of", lambda data: [])
        assert f"| {recochain_report.SASREC} | {np.mean([t['recall@5'] for t in result['tests']]):.4f} ± " in (
            recochain_report.table(report)
        )
    with pytest.raises(ValueError, match="one code per item, got 3"):
        sasrec.run(sasrec.SasrecArguments(data_dir=str(prepared), output_dir=str(folder)))


def test_metrics_gain_and_calibration_equal_a_loop():
    ranks = np.array([1, np.inf, 7, 3])
    metrics = reproduce_recochain.recall_and_ndcg(ranks)
    assert metrics["recall@5"].tolist() == [1, 0, 0, 1] and metrics["recall@10"].tolist() == [1, 0, 1, 1]
    assert metrics["ndcg@10"].tolist() == pytest.approx([1, 0, 1 / 3, 0.5])
    other = reproduce_recochain.recall_and_ndcg(np.array([1, 2, 7, np.inf]))
    gain = reproduce_recochain.gain(metrics, other)["recall@5"]
    assert gain["difference"] == 0 and gain["standard error"] == pytest.approx((2 / 4) ** 0.5 / 2)
    log_probs = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.0]]).log()
    candidates = {"item_indices": torch.tensor([[4, 5, 6], [7, 8, -1]]), "ranking_scores": log_probs}
    calibration = reproduce_recochain.calibration(candidates, torch.tensor([4, 9]), num_bins=2)
    bins = [(pytest.approx(0.2), 0.0, 3), (pytest.approx(0.85), 0.5, 2)]
    assert [(row["predicted"], row["observed"], row["candidates"]) for row in calibration["all"]["bins"]] == bins
    assert calibration["all"]["expected calibration error"] == pytest.approx((3 * 0.2 + 2 * 0.35) / 5)
    held = calibration["held"]["bins"]
    assert [(row["predicted"], row["observed"]) for row in held] == [(pytest.approx(0.2), 0), (pytest.approx(0.9), 1)]


def test_weights_are_chosen_on_validation_only():
    users = {"target": [3, 4, 5, 6], "items": [[0], [1], [2], [7]]}
    splits = {name: Dataset.from_dict(users) for name in ("validation", "test")}
    candidates = {"validation": preferring(0.5, users["target"]), "test": preferring(1.0, users["target"])}
    args = reproduce_recochain.ReproduceArguments(data_dir="", ranking_weights=[0.5, 1.0], dense_weights=[0.0])
    result = reproduce_recochain.measure(args, splits, candidates)
    assert result["weights"]["ranked"] == {"ranking": 0.5, "item score": 0.0}
    assert result["cells"]["ranked"]["ndcg@5"] < result["cells"]["ranked at weight 1"]["ndcg@5"] == 1.0


def test_retired_rows_are_shown_but_not_trained():
    args = reproduce_recochain.ReproduceArguments(data_dir="", row="candidate-excluded")
    with pytest.raises(ValueError, match=r"an option of version 0\.1"):
        reproduce_recochain.settings_of(args)
    assert recochain_report.label_of("candidate-excluded, codes alone").endswith("(an option of 0.1, gone)")

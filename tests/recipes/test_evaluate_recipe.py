"""From tables to metrics by recipes.train and recipes.evaluate, on synthetic data."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers import GRID, preferring, train_flags
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.recommendation_unigrf import FUSED_SCORES
from recipes import evaluate as evaluate_recipe
from recipes import push_to_hub, show, train
from recipes.common.hashing import weights_of
from recipes.common.run_tracking import made_by
from recipes.data.prepared import PreparedData, load_prepared
from recipes.evaluate import EvaluateArguments, evaluate_checkpoint
from recipes.evaluation import inference as measure
from recipes.evaluation.inference import Measurement
from recipes.refresh import RefreshArguments, refresh
from recipes.results import tables as results
from recipes.results.steering import SteeringArguments, measure_steering
from recipes.results.steering import table as steering_table
from recipes.training.arguments import DataArguments, ModelArguments
from recipes.training.model_init import build_model, fresh_model
from tokenization import SemanticIdTokenizer


def test_from_tables_to_metrics(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.evaluation.baselines.GRID", GRID)
    options = ["--negatives_per_item=0.5", "--max_items=10", "--crops_per_epoch=4", "--num_train_epochs=8"]
    options += ["--learning_rate=5e-3", "--per_device_train_batch_size=16", "--eval_strategy=epoch"]
    options += ["--logging_steps=5", f"--checkpoint_dir={tmp_path / 'checkpoint'}"]
    arguments = train.parse(train_flags(prepared, tmp_path / "training", *options))
    checkpoint = train.train(*arguments)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert train.train(*arguments) == checkpoint, "a finished training is reused"
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    log = json.loads((checkpoint / "training_log.json").read_text())["log_history"]
    losses = [entry for entry in log if "loss" in entry]
    assert {"loss", "generation_loss", "ranking_loss", "dense_loss"} <= set(losses[0])
    assert losses[0]["loss"] > losses[-1]["loss"]

    with pytest.raises(ValueError, match=r"other values of \['training.learning_rate'\]"):
        model_args, data_args, training_args = arguments
        train.train(model_args, data_args, replace(training_args, learning_rate=1e-4))
    metrics = evaluate_checkpoint(
        EvaluateArguments(
            checkpoint=str(checkpoint),
            data_dir=str(prepared),
            output_dir=str(tmp_path),
            num_beams=[5, 10],
            ranking_weights=[0.5, 1.0],
            list_length=10,
            store=True,
        )
    )
    assert metrics["protocol"]["history"] == "the last 10 items", "the length of the training"
    assert metrics["protocol"]["trained on"] == "these interactions"
    assert metrics["invalid_items"] == 0 and metrics["generated_items_checked"] >= 40 * 5
    assert {"recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"} <= set(metrics["ranked"])
    assert set(metrics["baselines"]) == {"popularity", "item_knn", "transitions", "text_cosine"}
    assert metrics["generation"]["recall@5"] > metrics["baselines"]["popularity"]["recall@5"]
    assert metrics["ranking"]["auc"] > 0.5
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    steered = measure_steering(SteeringArguments(str(checkpoint), str(prepared)))
    served, *_, diverse = [row for row in steered["rows"] if not row["popularity_correction"]]
    assert served["recall@10"] == pytest.approx(metrics["ranked"]["recall@10"], abs=1e-4), "as served"
    assert metrics["beyond accuracy"]["ranked"]["gini"] == pytest.approx(served["gini"], abs=1e-4)
    assert diverse["diversity of lists"] > served["diversity of lists"]
    corrected = steered["rows"][-1]
    assert corrected["popularity"] < served["popularity"] and corrected["novelty"] > served["novelty"]
    assert "| `popularity_correction=2` | " in steering_table(steered)
    # The settings chosen on validation are the defaults of the checkpoint.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert model.generation_config.ranking_weight == metrics["selection"]["ranking_weight"]
    assert model.generation_config.num_beams == metrics["selection"]["num_beams"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    assert tokenizer.titles[3] == "Film 3"
    for seed in (0, 1):
        (tmp_path / f"run-{seed}").mkdir()
        ranked = {name: value + seed for name, value in metrics["ranked"].items()}
        protocol = metrics["protocol"] | {"seed of the codebooks": seed}
        run_metrics = metrics | {"ranked": ranked, "protocol": protocol, "seconds": {}, "made_by": made_by("command")}
        (tmp_path / f"run-{seed}" / "metrics.json").write_text(json.dumps(run_metrics))
    collected = results.collect([tmp_path / "run-0", tmp_path / "run-1"])
    assert collected["seeds"] == [0, 1]
    mean = pytest.approx(metrics["ranked"]["recall@5"] + 0.5, abs=1e-5)
    assert collected["rows"]["generation + ranking"]["recall@5"] == {
        "mean": mean,
        "std": pytest.approx(0.5**0.5, abs=1e-5),
    }
    run_metrics["protocol"]["users"] = 3
    (tmp_path / "run-1" / "metrics.json").write_text(json.dumps(run_metrics))
    with pytest.raises(ValueError, match="must share one protocol"):
        results.collect([tmp_path / "run-0", tmp_path / "run-1"])

    # Validation and test prefer different weights.
    with monkeypatch.context() as patched:
        dataset = load_from_disk(str(prepared / "dataset"))
        targets = []

        def scores(model, tokenizer, split, *args):
            targets.append(split["target"][:])
            return preferring(0.5 if len(targets) == 1 else 1.0, targets[-1])

        patched.setattr(evaluate_recipe, "candidates", scores)
        patched.setattr(evaluate_recipe, "invalid_items", lambda *args: {"checked": 0, "invalid": 0})
        selecting = EvaluateArguments(
            str(checkpoint), str(prepared), str(tmp_path), [5], ranking_weights=[0.5, 1.0], dense_weights=[0.0]
        )
        selecting = replace(
            selecting, baselines=False, transition_weights=[1.0], generation_weights=[1.0], num_transition_candidates=0
        )
        chosen = evaluate_checkpoint(selecting)
        assert targets == [dataset["validation"]["target"][:], dataset["test"]["target"][:]]
        assert chosen["selection"]["ranking_weight"] == 0.5 and chosen["baselines"] == {}
        assert chosen["ranked"]["recall@5"] == 1 and chosen["ranked"]["mrr"] < 1, "the weight of the validation"
    split = load_from_disk(str(prepared / "dataset"))["test"].select(range(3))
    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", lambda input_ids, **kwargs: invalid_sequences(input_ids, tokenizer))
        counted = measure.invalid_items(model, tokenizer, split, 5, Measurement())
    assert counted == {"checked": 3, "invalid": 2}

    split = load_from_disk(str(prepared / "dataset"))["test"]
    with pytest.raises(ValueError, match=r"among \['dislike', 'like'\], got 'buy'"):
        evaluate_recipe.auc_behavior(model, tokenizer, split, "buy")
    alike = split.remove_columns("target_behavior").add_column("target_behavior", [1] * len(split))
    assert evaluate_recipe.auc_behavior(model, tokenizer, alike, None) is None
    assert "no AUC: all or none of" in capsys.readouterr().out
    show.main(show.ShowArguments(str(checkpoint), str(prepared), users=1000))
    shown = capsys.readouterr().out
    assert shown.count("recommended, score = ") == shown.count("\nheld out, ") == len(split)
    assert "<- held out" in shown and "inf" not in shown
    options = UniGRFForCausalLM.from_pretrained(checkpoint).serving_options()
    listed = re.findall(r"^    Film.*?((?:  +-?\d+\.\d{3}){5})", shown, re.MULTILINE)
    columns = np.array([row.split() for row in listed], float)
    assert len(columns) == options.num_return_sequences * len(split)
    weights = [options.generation_weight, options.ranking_weight, options.dense_weight, options.transition_weight]
    np.testing.assert_allclose(columns[:, :4] @ weights, columns[:, 4], atol=0.02)
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    ids = tokenizer.item_ids[::-1]
    names = (tokenizer.codebook_sizes, tokenizer.behaviors)
    SemanticIdTokenizer.from_codes(ids, tokenizer.item_codes, *names).save_pretrained(other / "tokenizer")
    measured = EvaluateArguments(checkpoint=str(checkpoint), data_dir=str(other), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="Take the folder that the model was trained on"):
        evaluate_checkpoint(measured)
    with pytest.raises(ValueError, match=r"recipes\.prepare wrote"):
        evaluate_checkpoint(replace(measured, data_dir=str(tmp_path / "nowhere")))


def invalid_sequences(input_ids, tokenizer):
    """Append an item, codes of no item, and codes that end too early, to one history each."""
    codes = {tuple(row) for row in tokenizer.item_codes.tolist()}
    sizes = tokenizer.codebook_sizes
    missing = next(row for row in itertools.product(*map(range, sizes)) if row not in codes)
    first = torch.tensor(
        np.cumsum([tokenizer.item_tokens(np.array([0]))[0][0] - tokenizer.item_codes[0][0], *sizes[:-1]])
    )
    item, none = (first + torch.tensor(row) for row in (tokenizer.item_codes[0].tolist(), missing))
    cut = torch.cat([item[:-1], torch.tensor([tokenizer.pad_token_id])])
    return torch.cat([input_ids, torch.stack([item, none, cut]).to(input_ids)], dim=1)


def test_stage_two_is_trained_and_evaluated_from_stage_one(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.baselines.GRID", GRID)
    shared = ["--max_items=4", "--crops_per_epoch=2", "--per_device_train_batch_size=16", "--learning_rate=5e-3"]
    alone = ["--ranking_loss_weight=0", "--negatives_per_item=0", "--max_steps=10"]
    first = train.train(*train.parse(train_flags(prepared, tmp_path / "one", *shared, *alone)))
    assert GenerationConfig.from_pretrained(first).ranking_weight == 0, "no ranking was trained"
    second = ["--num_retrieved_items=3", "--num_train_beams=6", "--max_long_items=12", "--max_steps=4"]
    second += ["--candidate_refresh_epochs=1"]
    second += [f"--init_from={first}", "--eval_strategy=steps", "--eval_steps=2", "--logging_steps=1"]
    checkpoint = train.train(*train.parse(train_flags(prepared, tmp_path / "two", *shared, *second)))
    log = json.loads((checkpoint / "training_log.json").read_text())["log_history"]
    assert all(np.isfinite(entry["ranking_loss"]) for entry in log if "loss" in entry)
    assert sum("eval_loss" in entry for entry in log) == 2
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert (model.config.random_negatives_per_item, model.config.next_logit_bias) == (0.0, 0.0)
    assert model.config.num_retrieved_items == 3 and model.generation_config.ranking_weight == 1
    frozen = train_flags(prepared, tmp_path / "three", *shared, *second, "--freeze_base_model=True")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, train.train(*train.parse(frozen))))
    learned = {
        name.split(".")[0] for name in after if name not in before or not torch.equal(after[name], before[name])
    }
    assert learned == {"ranking_head", "candidate_block"}, "nothing of stage I"
    stored_hash = json.loads((tmp_path / "two" / "arguments.json").read_text())["init_from"]
    assert stored_hash == weights_of(first) != weights_of(checkpoint)
    measured = EvaluateArguments(
        checkpoint=str(checkpoint),
        data_dir=str(prepared),
        output_dir=str(tmp_path),
        num_beams=[5],
        ranking_weights=[1.0],
        dense_weights=[0.0, 0.5],
        num_dense_candidates=4,
        transition_weights=[0.0],
        generation_weights=[1.0],
        num_transition_candidates=0,
        list_length=10,
        store=True,
        max_items=4,
        max_long_items=12,
    )
    config = (checkpoint / "config.json").read_text()
    metrics = evaluate_checkpoint(measured)
    assert len(metrics["validation"]) == 2 and metrics["selection"]["dense_weight"] in (0.0, 0.5)
    generation_config = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).generation_config
    assert (generation_config.dense_weight, generation_config.num_dense_candidates) == (
        metrics["selection"]["dense_weight"],
        4,
    )
    monkeypatch.setattr(push_to_hub, "check_loading", lambda *_: None)
    hub = tmp_path / "hub"
    to_push = {"checkpoint": str(checkpoint), "metrics": str(tmp_path / "metrics.json"), "repo_id": "someone/films"}
    push_to_hub.push(push_to_hub.PushArguments(**to_push, dry_run=True, output_dir=str(hub)))
    card = (hub / "README.md").read_text()
    assert "6 beams of the model's own search" in card
    assert "with the 3 most similar items of the user's long history" in card
    for snippet in re.findall("```python\n(.*?)```", card, re.DOTALL):
        exec(snippet.replace("someone/films", str(hub)), {})
    with pytest.raises(ValueError, match="`rerank_top_k` or `num_dense_candidates` must be 0"):
        evaluate_checkpoint(replace(measured, rerank_top_k=3))
    with pytest.raises(ValueError, match="`max_items` must be at most the"):
        evaluate_checkpoint(replace(measured, max_items=500))
    with pytest.raises(ValueError, match="a local folder"):
        evaluate_checkpoint(replace(measured, checkpoint="someone/films"))
    cut = evaluate_checkpoint(replace(measured, rerank_top_k=3, num_dense_candidates=0, list_length=10))
    assert cut["beam holds the target"] >= cut["ranked"]["recall@5"] and cut["selection"]["rerank_top_k"] == 3
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert model.generation_config.rerank_top_k == 3
    dataset = load_from_disk(str(prepared / "dataset"))
    tokenizer = SemanticIdTokenizer.from_pretrained(checkpoint)
    measured = replace(measured, num_dense_candidates=0)
    how = Measurement(max_items=4, max_long_items=12)
    candidates = measure.candidates(model, tokenizer, dataset["test"], 5, how)
    weights = {"generation_weight": 1.0, "ranking_weight": 1.0, "dense_weight": 0.5, "diversity": 2.0}
    lists, plain = (
        measure.fused_lists(candidates, weights, 3, num_ranked=3, representations=representations)
        for representations in (model.scorer.representations, None)
    )
    assert lists != plain
    for rows, users, inputs in measure.batches(model, tokenizer, dataset["test"], how, "as recommend lists them"):
        best = model.recommend(
            **inputs,
            num_return_sequences=3,
            ranking_weight=1.0,
            dense_weight=0.5,
            diversity=2.0,
            blocked_items=[user["items"] for user in users],
        )
        assert best.item_indices.tolist() == [lists[row] for row in rows]
    dataset = load_from_disk(str(prepared / "dataset"))
    tokenizer = SemanticIdTokenizer.from_pretrained(checkpoint)

    def start_from_first(tokenizer, **options):
        data_args = DataArguments(data_dir="", max_items=4)
        data = PreparedData(tokenizer, dataset, torch.zeros(30, 4))
        return build_model(ModelArguments(init_from=str(first), **options), data_args, data)

    with pytest.raises(ValueError, match="Start from a model that was trained on this data"):
        codes = np.roll(tokenizer.item_codes, 1, axis=0)
        ids = tokenizer.item_ids
        sizes = tokenizer.codebook_sizes
        behaviors = tokenizer.behaviors
        other = SemanticIdTokenizer.from_codes(ids, codes, sizes, behaviors)
        start_from_first(other)
    fewer = SemanticIdTokenizer.from_codes(ids, tokenizer.item_codes, sizes, behaviors[:1])
    with pytest.raises(ValueError, match="encode histories as"):
        start_from_first(fewer)
    with pytest.raises(ValueError, match=r"a checkpoint with {'history_item_representations': False}, got"):
        start_from_first(tokenizer, history_item_representations=False)
    assert len(dataset["test"]) == metrics["protocol"]["users"]
    served = replace(measured, exclude_history=False, ranking_target="like", ranking_weights=[0.5], num_beams=[5])
    selection = evaluate_checkpoint(served)["selection"]
    generation_config = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).generation_config
    settings = {
        "exclude_history": False,
        "ranking_target": "like",
        "ranking_weight": 0.5,
        "max_long_items": 12,
        "max_items": 4,
    }
    assert {name: getattr(generation_config, name) for name in settings} == settings
    assert {name: selection[name] for name in settings} == settings
    assert (checkpoint / "config.json").read_text() == config, "an evaluation leaves the config as it was"
    with pytest.raises(ValueError, match="must be above 0, got 0 for all of them"):
        evaluate_checkpoint(replace(measured, ranking_weights=[0.0], generation_weights=[0.0], dense_weights=[0.0]))


def test_a_model_without_trained_ranking_is_evaluated(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.baselines.GRID", GRID)
    flags = train_flags(prepared, tmp_path, "--max_items=4", "--max_steps=2")
    checkpoint = train.train(*train.parse([*flags, "--ranking_loss_weight=0", "--negatives_per_item=0"]))
    metrics = evaluate_checkpoint(
        EvaluateArguments(
            str(checkpoint),
            str(prepared),
            str(tmp_path),
            [5],
            dense_weights=[0.0, 1.0],
            transition_weights=[0.0],
            generation_weights=[1.0],
            list_length=10,
            store=True,
        )
    )
    assert metrics["selection"]["ranking_weight"] == 0 and metrics["ranking"] == {}
    assert len(metrics["validation"]) == 2 and {row["ranking_weight"] for row in metrics["validation"]} == {0.0}
    assert UniGRFForCausalLM.from_pretrained(checkpoint).generation_config.ranking_weight == 0


def untrained(prepared, folder):
    """Write a checkpoint with random weights, whose Python files end the process that runs them."""
    data = load_prepared(prepared)
    model_args, *_ = train.parse(train_flags(prepared, folder))
    fresh_model(model_args, data).save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    code = list(folder.glob("*.py"))
    assert code
    for file in code:
        file.write_text('raise SystemExit("the code of the folder")\n')
    return folder


def test_recipes_do_not_run_the_code_of_the_folder(prepared, tmp_path, capsys):
    checkpoint = untrained(prepared, tmp_path / "checkpoint")
    arguments = EvaluateArguments(str(checkpoint), str(prepared), str(tmp_path))
    _, tokenizer, model = evaluate_recipe.load_inputs(arguments)
    assert (type(tokenizer), type(model)) == (SemanticIdTokenizer, UniGRFForCausalLM)
    show.main(show.ShowArguments(str(checkpoint), str(prepared), users=1))
    assert "recommended, score" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must have a table of transitions"):
        refresh(RefreshArguments(str(checkpoint), str(prepared), str(tmp_path / "fresh")))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("batch_size", "list_length", "validation_users", "max_items", "max_long_items")),
        *((name, -5) for name in ("max_items", "num_dense_candidates", "num_transition_candidates", "rerank_top_k")),
        *(("num_beams", beams) for beams in ([], [0], [5, -1])),
        *((f"{score}_weights", values) for score in FUSED_SCORES for values in ([], [float("nan")], [1.0, -1.0])),
        ("list_length", 3),
        ("checkpoint", "/nope"),
        ("checkpoint", "runs/nope"),
        ("checkpoint", "nope"),
        ("data_dir", "/nope"),
        ("output_dir", "file"),
        ("output_dir", "/proc/nope"),
    ],
)
def test_evaluate_refuses_before_any_work(prepared, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(evaluate_recipe, "load_checkpoint", lambda _: pytest.fail("the work has begun"))
    monkeypatch.chdir(tmp_path)
    for file in ("file", "config.json"):
        (tmp_path / file).write_text("{}")
    arguments = EvaluateArguments(str(tmp_path), str(prepared), str(tmp_path / "metrics"))
    with pytest.raises(ValueError, match=rf"`{name}` must .*got "):
        evaluate_checkpoint(replace(arguments, **{name: value}))


def test_evaluate_refuses_options_without_effect(prepared, tmp_path):
    checkpoint = untrained(prepared, tmp_path / "checkpoint")
    arguments = EvaluateArguments(str(checkpoint), str(prepared), str(tmp_path))
    for name, value in {"max_long_items": 5, "transition_weights": [1.0]}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be left out"):
            evaluate_recipe.load_inputs(replace(arguments, **{name: value}))
    zero_weights = {f"{name}_weights": [0.0] for name in FUSED_SCORES}
    with pytest.raises(ValueError, match="must be above 0, got 0 for all of them"):
        evaluate_recipe.load_inputs(replace(arguments, **zero_weights))


def test_a_user_who_took_everything_has_an_empty_list(prepared, tmp_path):
    model, tokenizer = measure.load_checkpoint(untrained(prepared, tmp_path))
    test = load_from_disk(str(prepared / "dataset"))["test"].to_list()
    test[2] |= {name: [*range(30), 3] if name == "items" else [0] * 31 for name in ("items", "behaviors")}
    split = Dataset.from_list(test[:5])
    how = Measurement(max_items=5)
    scored = measure.candidates(model, tokenizer, split, 4, how)
    lists = measure.fused_lists(scored, {"generation_weight": 1.0, "ranking_weight": 0.5}, 3)
    assert lists[2] == [-1, -1, -1] and all(min(row) >= 0 for row in [*lists[:2], *lists[3:]])
    others = measure.candidates(model, tokenizer, split.select([0, 1, 3, 4]), 4, how)
    assert torch.equal(scored["item_indices"][[0, 1, 3, 4]], others["item_indices"])
    assert (
        measure.candidates(model, tokenizer, split, 4, replace(how, exclude_history=False))["item_indices"] >= 0
    ).all()

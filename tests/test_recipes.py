"""The recipes put together: from tables to metrics on a made-up world, and the README's snippets."""

import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GRID, TINY, preferring
from datasets import Dataset, Features, load_from_disk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from recipes import evaluate as evaluate_recipe
from recipes import (
    measure,
    push_to_hub,
    recochain_report,
    reproduce_recochain,
    reproduce_unigrf,
    results,
    runs,
    show,
    train,
    training_rows,
)
from recipes.embeddings import weights_of
from recipes.evaluate import EvaluateArguments, evaluate_checkpoint
from recipes.measure import Measurement
from recipes.prepare import PrepareArguments, check_same_items, prepare
from recipes.results import WRITTEN, with_tables
from recipes.runs import Stages, made_by
from tokenization import SemanticIdTokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_from_tables_to_metrics(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.baselines.GRID", GRID)
    arguments = train.parse(
        [
            f"--data_dir={prepared}",
            f"--output_dir={tmp_path / 'training'}",
            f"--checkpoint_dir={tmp_path / 'checkpoint'}",
            f"--text_config={json.dumps(TINY)}",
            "--negatives_per_item=0.5",
            "--max_items=10",
            "--passes=4",
            "--num_train_epochs=8",
            "--learning_rate=5e-3",
            "--per_device_train_batch_size=16",
            "--eval_strategy=epoch",
            "--save_strategy=no",
            "--logging_steps=5",
            "--disable_tqdm=True",
            "--use_cpu",
        ]
    )
    checkpoint = train.train(*arguments)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert train.train(*arguments) == checkpoint, "a finished training is reused"
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    log = json.loads((checkpoint / "training_log.json").read_text())["log_history"]
    losses = [entry for entry in log if "loss" in entry]
    assert {"loss", "generation_loss", "ranking_loss", "item_loss"} <= set(losses[0])
    assert losses[0]["loss"] > losses[-1]["loss"]

    with pytest.raises(ValueError, match=r"found other values of \['training.learning_rate'\]"):
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
        )
    )
    assert metrics["protocol"]["history"] == "the last 10 items", "as it was trained"
    assert metrics["protocol"]["trained on"] == "these interactions"
    assert metrics["invalid_items"] == 0 and metrics["generated_items_checked"] >= 40 * 5
    assert {"recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"} <= set(metrics["ranked"])
    assert metrics["generation"]["recall@5"] > metrics["baselines"]["popularity"]["recall@5"]
    assert metrics["ranking"]["auc"] > 0.5
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    # What validation chose is what the checkpoint now does by itself.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert model.config.ranking_weight == metrics["selection"]["ranking_weight"]
    assert model.generation_config.num_beams == metrics["selection"]["num_beams"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    assert tokenizer.titles[3] == "Film 3"
    for seed in (0, 1):
        (tmp_path / f"run-{seed}").mkdir()
        ranked = {name: value + seed for name, value in metrics["ranked"].items()}
        protocol = metrics["protocol"] | {"seed of the codebooks": seed}
        found = metrics | {"ranked": ranked, "protocol": protocol, "seconds": {}, "made_by": made_by("command")}
        (tmp_path / f"run-{seed}" / "metrics.json").write_text(json.dumps(found))
    collected = results.collect([tmp_path / "run-0", tmp_path / "run-1"])
    assert collected["seeds"] == [0, 1]
    mean = pytest.approx(metrics["ranked"]["recall@5"] + 0.5, abs=1e-5)
    assert collected["rows"]["generation + ranking"]["recall@5"] == {
        "mean": mean,
        "std": pytest.approx(0.5**0.5, abs=1e-5),
    }
    found["protocol"]["users"] = 3
    (tmp_path / "run-1" / "metrics.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="Expected runs of one protocol"):
        results.collect([tmp_path / "run-0", tmp_path / "run-1"])

    with monkeypatch.context() as patched:  # scores of which validation prefers one weight and test another
        dataset, asked = load_from_disk(str(prepared / "dataset")), []

        def scores(model, tokenizer, split, *args):
            asked.append(split["target"][:])
            return preferring(0.5 if len(asked) == 1 else 1.0, asked[-1])

        patched.setattr(evaluate_recipe, "candidates", scores)
        patched.setattr(evaluate_recipe, "invalid_items", lambda *args: {"checked": 0, "invalid": 0})
        selecting = EvaluateArguments(
            str(checkpoint), str(prepared), str(tmp_path), [5], [0.5, 1.0], item_weights=[0.0]
        )
        selecting = replace(selecting, baselines=False)
        chosen = evaluate_checkpoint(selecting)
        assert asked == [dataset["validation"]["target"][:], dataset["test"]["target"][:]]
        assert chosen["selection"]["ranking_weight"] == 0.5 and chosen["baselines"] == {}
        assert chosen["ranked"]["recall@5"] == 1 and chosen["ranked"]["mrr"] < 1, "test would have chosen 1"
    split = load_from_disk(str(prepared / "dataset"))["test"].select(range(3))
    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", lambda input_ids, **kwargs: spelt_wrong(input_ids, tokenizer))
        counted = measure.invalid_items(model, tokenizer, split, 5, Measurement())
    assert counted == {"checked": 3, "invalid": 2}

    split = load_from_disk(str(prepared / "dataset"))["test"]
    with pytest.raises(ValueError, match=r"among \['dislike', 'like'\], found 'buy'"):
        evaluate_recipe.auc_behavior(model, tokenizer, split, "buy")
    alike = split.remove_columns("target_behavior").add_column("target_behavior", [1] * len(split))
    assert evaluate_recipe.auc_behavior(model, tokenizer, alike, None) is None
    assert "all or none are of the behaviour 'like'" in capsys.readouterr().out
    show.main(show.ShowArguments(str(checkpoint), str(prepared), users=1000))
    shown = capsys.readouterr().out
    assert shown.count("recommended:") == len(split) and "what came next" in shown and "inf" not in shown
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    ids = tokenizer.item_ids[::-1]
    names = (tokenizer.codebook_sizes, tokenizer.behaviors)
    SemanticIdTokenizer.from_codes(ids, tokenizer.item_codes, *names).save_pretrained(other / "tokenizer")
    measured = EvaluateArguments(checkpoint=str(checkpoint), data_dir=str(other), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="take the folder that it was trained on"):
        evaluate_checkpoint(measured)
    with pytest.raises(ValueError, match=r"recipes\.prepare wrote"):
        evaluate_checkpoint(replace(measured, data_dir=str(tmp_path / "nowhere")))


def test_a_training_that_failed_before_its_first_checkpoint_blocks_no_other(prepared, tmp_path):
    arguments = [f"--data_dir={prepared}", f"--output_dir={tmp_path}", "--use_cpu", "--max_steps=1", "--max_items=4"]
    arguments += ["--save_strategy=no", "--disable_tqdm=True"]
    for wrong, message in (
        ('{"model_type": "lama"}', "lama"),
        (json.dumps(TINY | {"max_position_embeddings": 9}), "max_items"),
        (json.dumps(TINY | {"max_position_embeddings": 20}), "the item after them, 21, found a backbone of 20"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(*train.parse([*arguments, f"--text_config={wrong}"]))
    arguments.append(f"--text_config={json.dumps(TINY)}")
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        train.train(*train.parse([*arguments, "--label_smoothing_factor=0.1"]))
    assert (train.train(*train.parse(arguments)) / "model.safetensors").exists()


def test_weights_and_enhancer_are_a_matter_of_arguments(prepared, tmp_path):
    arguments = [f"--data_dir={prepared}", f"--output_dir={tmp_path}", f"--text_config={json.dumps(TINY)}"]
    arguments += ["--max_items=10", "--use_cpu", "--per_device_train_batch_size=16", "--save_strategy=no"]
    arguments += ["--num_train_epochs=4", "--logging_steps=1", "--disable_tqdm=True", "--negatives_per_item=0.5"]
    arguments += ["--enhancer", "--relabel", "--adaptive_weights", "--adaptive_form=gradient_norm", "--stride=5"]
    fields = ['--config_fields={"candidate_loss_weight": 0.5}', '--enhancer_options={"num_negatives": 3}']
    checkpoint = train.train(*train.parse([*arguments, *fields]))
    log = json.loads((checkpoint / "training_log.json").read_text())["log_history"]
    losses = [entry for entry in log if "loss" in entry]
    assert "candidate_loss" not in losses[0] and losses[-1]["candidate_loss"] > 0
    assert losses[-1]["enhancer_negatives"] > 1 and losses[-1]["generation_weight"] != 1
    found = [json.loads(line) for line in (tmp_path / "enhancer.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in found] == [2, 3] and found[0]["examples"][0]["disliked"][0].startswith("Film")
    assert len(found[0]["examples"][0]["disliked"]) <= 3
    for wrong, message in (
        (['--config_fields={"inject_targets": false}'], r"config_fields among .* found \['inject_targets'\]"),
        (['--enhancer_options={"seed": 1}'], r"enhancer_options among .* found \['seed'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(*train.parse([*arguments, *wrong, f"--output_dir={tmp_path / 'wrong'}"]))
    with pytest.raises(ValueError, match="the enhancer or stage II"):
        train.train(*train.parse([*arguments, "--num_train_beams=5", f"--output_dir={tmp_path / 'other'}"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beams_kept_epochs=2"], "num_train_beams with beams_kept_epochs"),
        (["--beams_kept_steps=2"], "num_train_beams with beams_kept_steps"),
        (["--num_train_beams=2", "--beams_kept_steps=2", "--beams_kept_epochs=1"], "found both"),
        (["--exclude_history=True"], "num_train_beams with exclude_history"),
        (["--relabel"], "enhancer with relabel"),
        (['--enhancer_options={"num_negatives": 3}'], "enhancer with enhancer_options"),
        (["--enhancer", "--ranking_loss_weight=0"], "ranking_loss_weight with enhancer"),
        (["--detach_history=True"], "num_train_beams or num_retrieved_items with detach_history"),
        (["--exclude_candidate=True"], "num_retrieved_items with exclude_candidate"),
        (["--adaptive_window=5"], "adaptive_weights with adaptive_window"),
        (["--config_fields={inject_target: false}"], "config_fields as JSON, found '{inject_target: false}'"),
        (["--text_config=[]"], "text_config as a JSON object"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(prepared, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.train(*train.parse([f"--data_dir={prepared}", f"--output_dir={tmp_path}", *options]))


def test_a_training_is_of_one_device_a_process_and_goes_on_wherever_it_is(prepared, tmp_path, monkeypatch):
    options = [f"--data_dir={prepared}", f"--output_dir={tmp_path}"]
    for changed, message in (({"n_gpu": 2}, "one GPU a process, found 2"), ({"fsdp": "full_shard"}, "neither --fsdp")):
        args = train.parse(options)
        monkeypatch.setattr(type(args[2]), "n_gpu", changed.get("n_gpu", 1))
        args[2].fsdp = changed.get("fsdp")
        with pytest.raises(ValueError, match=message):
            train.train(*args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process a run"):
        reproduce_recochain.run(
            reproduce_recochain.ReproduceArguments(data_dir=str(prepared), output_dir=str(tmp_path))
        )
    (tmp_path / "checkpoint-1").mkdir()
    asked = {"training": {"use_cpu": True, "local_rank": 0, "seed": 1}}
    (tmp_path / "arguments.json").write_text(json.dumps(asked))
    here = {"training": {"use_cpu": False, "seed": 1}}
    assert runs.begin(tmp_path, here, tmp_path / "finished.json") == {"training": {"seed": 1}}


def spelt_wrong(input_ids, tokenizer):
    """Behind the first history an item, then codes that no item has, and codes that end too early."""
    codes = {tuple(row) for row in tokenizer.item_codes.tolist()}
    sizes = tokenizer.codebook_sizes
    missing = next(row for row in itertools.product(*map(range, sizes)) if row not in codes)
    first = torch.tensor(
        np.cumsum([tokenizer.item_tokens(np.array([0]))[0][0] - tokenizer.item_codes[0][0], *sizes[:-1]])
    )
    item, none = (first + torch.tensor(row) for row in (tokenizer.item_codes[0].tolist(), missing))
    cut = torch.cat([item[:-1], torch.tensor([tokenizer.pad_token_id])])
    return torch.cat([input_ids, torch.stack([item, none, cut]).to(input_ids)], dim=1)


def test_another_trainings_folder_is_not_gone_on_with(tmp_path):
    asked, finished = {"model": {"seed": 0}, "path": tmp_path}, tmp_path / "finished.json"
    assert runs.begin(tmp_path, asked, finished) == runs.begin(tmp_path, asked, finished)
    assert runs.begin(tmp_path, {**asked, "model": {"seed": 1}}, finished), "nothing was trained yet"
    named = {"data": {"data_dir": str(tmp_path / ".." / tmp_path.name)}}
    assert runs.begin(tmp_path, named, finished) == {"data": {"data_dir": str(tmp_path.resolve())}}
    runs.begin(tmp_path, {**asked, "model": {"seed": 1}}, finished)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"found other values of \['model.seed'\]"):
        runs.begin(tmp_path, asked, finished)
    for text in ("[1, 2]", None):  # of an older version, and of somebody else's Trainer
        (tmp_path / "arguments.json").unlink()
        if text is not None:
            (tmp_path / "arguments.json").write_text(text)
        with pytest.raises(ValueError, match=r"found other values of \['model.seed', 'path'\]"):
            runs.begin(tmp_path, asked, finished)
        (tmp_path / "arguments.json").touch()


def test_the_second_stage_starts_from_the_first_and_is_measured_with_long_histories(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.baselines.GRID", GRID)
    shared = [
        f"--data_dir={prepared}",
        f"--text_config={json.dumps(TINY)}",
        "--max_items=4",
        "--passes=2",
        "--use_cpu",
    ]
    shared += ["--per_device_train_batch_size=16", "--learning_rate=5e-3", "--save_strategy=no", "--disable_tqdm=True"]
    alone = ["--ranking_loss_weight=0", "--negatives_per_item=0", "--max_steps=10"]
    first = train.train(*train.parse([*shared, f"--output_dir={tmp_path / 'one'}", *alone]))
    assert UniGRFConfig.from_pretrained(first).ranking_weight == 0, "no ranking was trained"
    second = ["--num_retrieved_items=3", "--num_train_beams=6", "--max_long_items=12", "--max_steps=4"]
    second += ["--beams_kept_epochs=1"]
    second += [f"--init_from={first}", "--eval_strategy=steps", "--eval_steps=2", "--logging_steps=1"]
    checkpoint = train.train(*train.parse([*shared, f"--output_dir={tmp_path / 'two'}", *second]))
    log = json.loads((checkpoint / "training_log.json").read_text())["log_history"]
    assert all(np.isfinite(entry["ranking_loss"]) for entry in log if "loss" in entry)
    assert sum("eval_loss" in entry for entry in log) == 2
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert (model.config.negatives_per_item, model.config.log_odds_of_next) == (0.0, 0.0)
    assert model.config.num_retrieved_items == 3 and model.config.ranking_weight == 1
    told = json.loads((tmp_path / "two" / "arguments.json").read_text())["init_from"]
    assert told == weights_of(first) != weights_of(checkpoint)
    measured = EvaluateArguments(
        checkpoint=str(checkpoint),
        data_dir=str(prepared),
        output_dir=str(tmp_path),
        num_beams=[5],
        ranking_weights=[1.0],
        item_weights=[0.0, 0.5],
        union_items=4,
        list_length=8,
        max_items=4,
        max_long_items=12,
    )
    metrics = evaluate_checkpoint(measured)
    assert len(metrics["validation"]) == 4 and metrics["selection"]["item_weight"] in (0.0, 0.5)
    config = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).config
    assert (config.item_weight, config.union_items) == (metrics["selection"]["item_weight"], 4)
    monkeypatch.setattr(push_to_hub, "check_loading", lambda *_: None)
    hub = tmp_path / "hub"
    to_push = {"checkpoint": str(checkpoint), "metrics": str(tmp_path / "metrics.json"), "repo_id": "someone/films"}
    push_to_hub.push(push_to_hub.PushArguments(**to_push, dry_run=True, output_dir=str(hub)))
    card = (hub / "README.md").read_text()
    assert (
        "with\n6 items of the model's own beam search" in card
        and "with the 3 items of the user's long history" in card
    )
    for snippet in re.findall("```python\n(.*?)```", card, re.DOTALL):
        exec(snippet.replace("someone/films", str(hub)), {})
    with pytest.raises(ValueError, match="num_ranked_beams or union_items"):
        evaluate_checkpoint(replace(measured, num_ranked_beams=3))
    with pytest.raises(ValueError, match="max_items of at most the"):
        evaluate_checkpoint(replace(measured, max_items=500))
    with pytest.raises(ValueError, match="a local checkpoint"):
        evaluate_checkpoint(replace(measured, checkpoint="someone/films"))
    cut = evaluate_checkpoint(replace(measured, num_ranked_beams=3, union_items=0, list_length=5))
    assert cut["beam holds the target"] >= cut["ranked"]["recall@5"] and cut["selection"]["num_ranked_beams"] == 3
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert model.config.num_ranked_beams == 3
    dataset, tokenizer = load_from_disk(str(prepared / "dataset")), SemanticIdTokenizer.from_pretrained(checkpoint)
    measured = replace(measured, union_items=0)
    how = Measurement(max_items=4, max_long_items=12)
    found = measure.candidates(model, tokenizer, dataset["test"], 5, how)
    lists = measure.fused_lists(found, 1.0, 3, 0.5, num_ranked=3)
    for rows, inputs in measure.batches(model, tokenizer, dataset["test"], how, "as recommend lists them"):
        best = model.recommend(
            **inputs,
            num_return_sequences=3,
            ranking_weight=1.0,
            item_weight=0.5,
            blocked_items=[dataset["test"][int(row)]["items"] for row in rows],
            **measure.long_histories(model, dataset["test"], rows, how),
        )
        assert best.item_indices.tolist() == [lists[row] for row in rows]
    dataset, tokenizer = load_from_disk(str(prepared / "dataset")), SemanticIdTokenizer.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="Start from a model that was trained on this data"):
        codes = np.roll(tokenizer.item_codes, 1, axis=0)
        ids, sizes, behaviors = tokenizer.item_ids, tokenizer.codebook_sizes, tokenizer.behaviors
        other = SemanticIdTokenizer.from_codes(ids, codes, sizes, behaviors)
        train.build_model(train.ModelArguments(init_from=str(first)), other, torch.zeros(30, 4), 4)
    fewer = SemanticIdTokenizer.from_codes(ids, tokenizer.item_codes, sizes, behaviors[:1])
    with pytest.raises(ValueError, match="spells histories as"):
        train.build_model(train.ModelArguments(init_from=str(first)), fewer, torch.zeros(30, 4), 4)
    with pytest.raises(ValueError, match=r"a checkpoint with {'history_item_vectors': False}, found"):
        train.build_model(
            train.ModelArguments(init_from=str(first), history_item_vectors=False), tokenizer, torch.zeros(30, 4), 4
        )
    assert len(dataset["test"]) == metrics["protocol"]["users"]
    served = replace(measured, exclude_history=False, ranking_target="like", ranking_weights=[0.0, 0.5], num_beams=[5])
    selection = evaluate_checkpoint(served)["selection"]
    config = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).config
    kept = {
        "exclude_history": False,
        "ranking_target": "like",
        "ranking_weight": 0.5,
        "max_long_items": 12,
        "max_items": 4,
    }
    assert {name: getattr(config, name) for name in kept} == kept == {name: selection[name] for name in kept}
    with pytest.raises(ValueError, match="ranking_weights above 0"):
        evaluate_checkpoint(replace(measured, ranking_weights=[0.0]))


@pytest.mark.parametrize("atomic", [False, True])
def test_a_training_goes_on_with_newer_data_and_items_that_were_not_there(prepared, tmp_path, atomic):
    parent = prepared.parent
    if atomic:
        tables = {name: str(parent / f"{name}.parquet") for name in ("interactions", "items")}
        prepared = prepare(PrepareArguments(**tables, output_dir=str(tmp_path / "atomic"), atomic=True))
    arguments = [
        f"--config_fields={json.dumps({'tie_word_embeddings': atomic})}",
        f"--text_config={json.dumps(TINY)}",
        "--max_items=4",
        "--use_cpu",
        "--max_steps=1",
        "--save_strategy=no",
    ]
    arguments += ["--disable_tqdm=True"]
    first = train.train(*train.parse([*arguments, f"--data_dir={prepared}", f"--output_dir={tmp_path / 'one'}"]))
    items = pd.read_parquet(parent / "items.parquet")
    new = items.iloc[[0, 0, 0]].assign(item_id=["n0", "n1", "n2"])  # of one group, which outgrows all others
    other = pd.concat([new, items])
    other.assign(embedding=[one[::-1] for one in other["embedding"]]).to_parquet(tmp_path / "other.parquet")
    other.to_parquet(tmp_path / "items.parquet")
    interactions = pd.read_parquet(parent / "interactions.parquet")
    later = interactions.iloc[:3].assign(user_id="u0", item_id=["n0", "n1", "n2"], timestamp=[100, 101, 102])
    pd.concat([interactions, later]).to_parquet(tmp_path / "interactions.parquet")
    tables = {name: str(tmp_path / f"{name}.parquet") for name in ("interactions", "items")}
    newer = prepare(PrepareArguments(**tables, output_dir=str(tmp_path / "newer"), tokenizer=str(first)))
    go_on = [*arguments, f"--data_dir={newer}", f"--init_from={first}"]
    second = train.train(*train.parse([*go_on, f"--output_dir={tmp_path / 'two'}"]))
    model, tokenizer = UniGRFForCausalLM.from_pretrained(second), SemanticIdTokenizer.from_pretrained(second)
    assert tokenizer.item_ids[30:] == ["n0", "n1", "n2"] and model.catalogue.num_items == 33
    np.testing.assert_array_equal(model.catalogue.item_codes, tokenizer.item_codes)
    before = UniGRFForCausalLM.from_pretrained(first)
    np.testing.assert_array_equal(before.catalogue.item_codes, tokenizer.item_codes[:30])
    torch.testing.assert_close(model.catalogue.item_embeddings[30:], before.catalogue.item_embeddings[[0, 0, 0]])
    assert model.config.codebook_sizes[-1] > before.config.codebook_sizes[-1]
    assert model.config.codebook_sizes == list(tokenizer.codebook_sizes) and model.config.vocab_size == len(tokenizer)
    check_same_items(tokenizer, prepared)  # where it can still be measured
    tables["items"] = str(tmp_path / "other.parquet")
    other = prepare(PrepareArguments(**tables, output_dir=str(tmp_path / "other"), tokenizer=str(first)))
    go_on[-2] = f"--data_dir={other}"
    with pytest.raises(ValueError, match=r"embeddings of the kind that .* was trained with, found a cosine of"):
        train.train(*train.parse([*go_on, f"--output_dir={tmp_path / 'three'}"]))
    stored = load_file(other / "item_embeddings.safetensors")["embeddings"]
    save_file({"embeddings": torch.cat([stored, stored], dim=1)}, other / "item_embeddings.safetensors")
    with pytest.raises(ValueError, match=r"embeddings of the kind that .* was trained with, found some of width"):
        train.train(*train.parse([*go_on, f"--output_dir={tmp_path / 'three'}"]))


def test_a_retriever_is_measured_without_a_ranking_that_nothing_trained(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.baselines.GRID", GRID)
    arguments = [f"--data_dir={prepared}", f"--output_dir={tmp_path}", f"--text_config={json.dumps(TINY)}"]
    arguments += ["--max_items=4", "--use_cpu", "--max_steps=2", "--save_strategy=no", "--disable_tqdm=True"]
    checkpoint = train.train(*train.parse([*arguments, "--ranking_loss_weight=0", "--negatives_per_item=0"]))
    metrics = evaluate_checkpoint(
        EvaluateArguments(str(checkpoint), str(prepared), str(tmp_path), [5], item_weights=[0.0, 1.0], list_length=5)
    )
    assert metrics["selection"]["ranking_weight"] == 0 and metrics["ranking"] == {}
    assert len(metrics["validation"]) == 2 and {one["ranking_weight"] for one in metrics["validation"]} == {0.0}
    assert UniGRFForCausalLM.from_pretrained(checkpoint).config.ranking_weight == 0


def test_a_row_of_the_second_stage_knows_nothing_of_its_last_item_or_of_what_came_later(prepared):
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    histories = load_from_disk(str(prepared / "dataset"))["train"]
    rows = training_rows.second_stage_rows(histories, tokenizer, 3, 3, 5)
    places = [(user, end) for user, items in enumerate(histories["items"]) for end in range(1, len(items) + 1)]
    assert len(rows) == len(places), "every item is the last one of a row: as many passes as a window has items"
    for row, (user, end) in zip(rows, places, strict=True):
        items, behaviors = (histories[user][name] for name in ("items", "behaviors"))
        assert tokenizer.decode_indices(np.array(row["input_ids"])).tolist() == items[max(0, end - 4) : end]
        assert row["long_items"] == items[max(0, end - 6) : end - 1]
        assert row["long_behaviors"] == behaviors[max(0, end - 6) : end - 1]
    batch = training_rows.Collator(tokenizer)([rows[0], rows[3]])
    assert batch["long_items"].tolist() == [[-1] * 3, rows[3]["long_items"]]
    assert batch["input_ids"].shape == batch["labels"].shape
    assert "long_items" not in training_rows.second_stage_rows(histories, tokenizer, 3, 1, 0).column_names
    every_other = training_rows.second_stage_rows(histories, tokenizer, 3, 1, 0, stride=2, exclude_history=True)
    places = [(user, end) for user, end in places if (len(histories[user]["items"]) - end) % 2 == 0]
    assert every_other["blocked_items"][:] == [histories[user]["items"][: end - 1] for user, end in places]
    batch = training_rows.Collator(tokenizer)([every_other[0], every_other[1]])
    assert batch["blocked_items"].tolist()[0][-2:] == [-1, -1]
    split = load_from_disk(str(prepared / "dataset"))["validation"]
    for row, user in zip(training_rows.held_out_rows(split, tokenizer, 3, 5), split, strict=True):
        assert row["long_items"] == user["items"][-5:] and row["long_behaviors"] == user["behaviors"][-5:]


def test_a_stage_is_done_again_when_one_before_it_was_even_if_a_run_broke_off_between(tmp_path):
    ran = []

    def run(*names, seed, breaks=None):
        stages = Stages(tmp_path)
        for name in names:
            if name == breaks:
                raise KeyboardInterrupt
            stages(name, {"seed": seed} if name == "a" else {}, lambda name=name: ran.append(name))

    run("a", "b", "c", seed=0)
    run("a", "b", "c", seed=0)
    assert ran == ["a", "b", "c"], "a second run does nothing"
    with pytest.raises(KeyboardInterrupt):
        run("a", "b", "c", seed=1, breaks="b")
    run("a", "b", "c", seed=1)
    assert ran == ["a", "b", "c", "a", "b", "c"]
    stages, made = Stages(tmp_path), [tmp_path / "made"]
    stages("a", {"seed": 1}, lambda: ran.append("again"), made)
    assert ran[-1] == "again", "what it made is gone"


def test_a_training_resumes_from_the_newest_checkpoint_that_is_whole(tmp_path, capsys):
    assert runs.last_checkpoint(tmp_path / "nothing") is runs.last_checkpoint(tmp_path) is None
    for step, names in {
        9: ["trainer_state.json", "pools.safetensors"],
        10: ["trainer_state.json"],
        11: ["pools.safetensors"],
    }.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    assert runs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-11 was not saved to its end" in capsys.readouterr().out
    assert runs.last_checkpoint(tmp_path, ["pools.safetensors"]) == str(tmp_path / "checkpoint-9")


def test_each_pass_supervises_every_item_once_and_cuts_elsewhere(prepared):
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    histories = load_from_disk(str(prepared / "dataset"))["train"]
    total = sum(map(len, histories["items"]))
    for passes in (1, 3, 5, 7):
        alone = training_rows.history_rows(histories, tokenizer, 6, passes)
        assert max(alone["length"]) == 1 + 7 * (tokenizer.num_levels + 1)
        rows = training_rows.packed_rows(histories, tokenizer, 6, passes, seed=0)
        spelt = [tokenizer.decode_indices(np.array(row)) for row in rows["input_ids"]]
        # Six items and the one after them: all that is read when the next item is asked for has been read in training.
        assert sum(map(len, spelt)) == passes * total and max(map(len, spelt)) == 7
        assert np.mean([len(items) for items in spelt]) > 6, "packed: little room is left"
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            assert labels == [-100 if token == tokenizer.bos_token_id else token for token in ids]
    assert len(set(training_rows.cut_windows(17, 6, 3))) > len(training_rows.cut_windows(17, 6, 1))


def test_users_whose_long_history_is_empty_may_come_first(prepared):
    """1,000 rows and more are written at a time: of the first ones alone their type could not be told."""
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    lists = {"items": [[3]] * 1200 + [[1, 2, 3]], "behaviors": [[0]] * 1200 + [[1, 0, 1]]}
    kinds = load_from_disk(str(prepared / "dataset"))["train"].features
    histories = Dataset.from_dict(lists, features=Features({name: kinds[name] for name in lists}))
    rows = training_rows.second_stage_rows(histories, tokenizer, 3, 1, 5, exclude_history=True)
    assert rows[-1]["long_items"] == rows[-1]["blocked_items"] == [1, 2] and rows[0]["long_items"] == []


@pytest.mark.parametrize(("length", "stride"), [(17, 1), (17, 4), (6, 1), (3, 2), (7, 50)])
def test_sliding_windows_hold_every_item_and_every_start_or_each_so_many(length, stride):
    windows = training_rows.cut_windows(length, 6, 1, stride)
    assert windows[0] == (max(0, length - 6), length) and windows[-1] == (0, min(6, length))
    assert all(end - start == min(6, length) for start, end in windows) and len(set(windows)) == len(windows)
    starts = [start for start, _ in windows]
    assert {first - second for first, second in pairwise(starts[:-1])} <= {stride}
    if stride == 1:
        assert starts == list(range(max(0, length - 6), -1, -1))


def test_only_the_held_out_item_is_supervised_in_validation(prepared):
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    split = load_from_disk(str(prepared / "dataset"))["validation"]
    for row, target in zip(training_rows.held_out_rows(split, tokenizer, 4), split["target"], strict=True):
        supervised = [token for token in row["labels"] if token != -100]
        assert supervised == row["input_ids"][-len(supervised) :]
        assert tokenizer.decode_indices(np.array(supervised)).tolist() == [target]


@pytest.mark.parametrize("file", WRITTEN, ids=["README.md", "recipes/results/README.md"])
def test_the_readmes_name_files_that_exist_and_their_tables_are_made_from_the_committed_results(file):
    text = file.read_text()
    assert with_tables(text) == text
    for name in re.findall(r"`((?:recipes|modeling_unigrf|tokenization|tests)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    headings = [re.sub(r"[^\w -]", "", line).strip().lower() for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    anchors = {"#" + heading.replace(" ", "-") for heading in headings}
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert name in anchors or (file.parent / name).exists(), name


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: str(file.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_readmes_commands_are_understood(file, monkeypatch):
    blocks = re.findall(r"^```bash\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m recipes.")]
    parse, parsed = HfArgumentParser.parse_args_into_dataclasses, []

    def stop(parser, args=None, **kwargs):
        parsed.append(parse(parser, args, **kwargs))
        raise SystemExit  # nothing is run

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", stop)
    for _, _, module, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__")
    assert len(parsed) == len(commands) >= 4, "all were understood; argparse itself exits on others"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("unigrf_ml1m", reproduce_unigrf),
        ("recochain", reproduce_recochain),
        ("recochain_beauty", reproduce_recochain),
        ("recochain_beauty_llama", reproduce_recochain),
    ],
)
def test_the_command_of_every_committed_run_asks_for_what_was_run(name, recipe):
    for run in json.loads((recochain_report.RESULTS / f"{name}.json").read_text())["runs"]:
        _, _, module, *words = shlex.split(run["made by"]["command"])
        assert module == recipe.__name__
        asked = vars(HfArgumentParser(recipe.ReproduceArguments).parse_args_into_dataclasses(words)[0])
        # Beams and what is beside them are several in a command, and one in a run.
        found = {one: value for one, value in run["arguments"].items() if one not in ("beams", "union", "ranked")}
        assert {one: asked[one] for one in found} == found, run["made by"]["command"]


def test_the_readme_snippets_run(tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    ids = [str(number) for number in range(200)]  # stands in for MovieLens, of which nothing is in the repository
    codes = np.stack(np.unravel_index(np.arange(200), (6, 6, 6)), axis=1)
    tokenizer = SemanticIdTokenizer.from_codes(ids, codes, (6, 6, 6), ["dislike", "like"], titles=ids)
    model = UniGRFForCausalLM(UniGRFConfig(**tokenizer.config_fields(), text_config=TINY, item_table_size=200))
    model.set_catalogue(torch.from_numpy(tokenizer.item_codes.copy()))
    RecommendationPipeline(model=model, tokenizer=tokenizer).save_pretrained("runs/demo/checkpoint")
    names: dict = {}  # the last one goes on where the second one ends
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)

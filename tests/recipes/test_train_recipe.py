"""recipes.train: its arguments, its checks, and trainings that continue."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY, short_id, train_flags
from safetensors.torch import load_file, save_file

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes import train
from recipes.common import run_tracking as runs
from recipes.data.prepared import check_same_items, load_prepared
from recipes.papers.recochain import reproduce as reproduce_recochain
from recipes.prepare import PrepareArguments, prepare
from recipes.training.arguments import DataArguments, ModelArguments
from recipes.training.model_init import build_model
from tokenization import SemanticIdTokenizer


def test_train_without_arguments_builds_the_default_model(prepared, tmp_path):
    data = load_prepared(prepared)
    model_args, data_args, _ = train.parse([f"--data_dir={prepared}", f"--output_dir={tmp_path}"])
    model = build_model(model_args, data_args, data)
    fields = data.tokenizer.config_fields() | {"content_embedding_dim": data.embeddings.shape[1]}
    by_hand = UniGRFForCausalLM(UniGRFConfig(**fields))
    by_hand.set_transitions(data.dataset["train"]["items"][:])
    assert model.config.to_dict() == by_hand.config.to_dict()
    shapes, expected = (
        {name: (value.shape, value.dtype) for name, value in built.state_dict().items()} for built in (model, by_hand)
    )
    assert shapes == expected


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ({"model_type": "gpt2", "hidden_size": 16, "num_attention_heads": 2}, {"hidden_size": 32}),
        ({**TINY, "rope_theta": 5e4}, {"rope_theta": 4e4}),
        (TINY, {"hidden_size": 64}),
        (TINY, {"model_type": "qwen2"}),
    ],
    ids=["alias", "part", "size", "type"],
)
def test_init_from_takes_the_same_backbone_alone(prepared, tmp_path, first, others):
    data = load_prepared(prepared)
    data_args = DataArguments(data_dir=str(prepared), max_items=5)
    options = {"text_config": json.dumps({**first, "num_hidden_layers": 1})}
    build_model(ModelArguments(**options), data_args, data).save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    again = build_model(ModelArguments(**options, init_from=str(tmp_path)), data_args, data)
    without = build_model(ModelArguments(init_from=str(tmp_path)), data_args, data)
    assert again.config.to_dict() == without.config.to_dict()
    for wrong in ({**first, **others}, {"model_type": first["model_type"], **others}):
        wrong_args = ModelArguments(text_config=json.dumps(wrong), init_from=str(tmp_path))
        with pytest.raises(ValueError, match="`init_from` must be a checkpoint with"):
            build_model(wrong_args, data_args, data)


def test_a_training_that_failed_early_blocks_no_other(prepared, tmp_path):
    flags = train_flags(prepared, tmp_path, "--max_steps=1", "--max_items=4")
    for wrong, message in (
        ('{"model_type": "lama"}', "lama"),
        (json.dumps(TINY | {"max_position_embeddings": 9}), "max_items"),
        (json.dumps(TINY | {"max_position_embeddings": 20}), "at least 21 for .* the item after them, got 20"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(*train.parse([*flags, f"--text_config={wrong}"]))
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0"):
        train.train(*train.parse([*flags, "--label_smoothing_factor=0.1"]))
    assert (train.train(*train.parse(flags)) / "model.safetensors").exists()


def test_weighter_and_enhancer_are_set_by_arguments(prepared, tmp_path):
    options = ["--max_items=10", "--per_device_train_batch_size=16", "--num_train_epochs=4", "--logging_steps=1"]
    options += ["--negatives_per_item=0.5", "--enhancer", "--relabel", "--stride=5"]
    options += ["--adaptive_weights", "--adaptive_form=gradient_norm"]
    flags = train_flags(prepared, tmp_path, *options)
    checkpoint = train.train(*train.parse([*flags, '--enhancer_options={"num_negatives": 3}']))
    log = json.loads((checkpoint / "training_log.json").read_text())["log_history"]
    losses = [entry for entry in log if "loss" in entry]
    assert "contrastive_loss" not in losses[0] and losses[-1]["contrastive_loss"] > 0
    assert losses[-1]["enhancer_negatives"] > 1 and losses[-1]["generation_weight"] != 1
    lines = [json.loads(line) for line in (tmp_path / "enhancer.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [2, 3] and lines[0]["examples"][0]["disliked"][0].startswith("Film")
    assert len(lines[0]["examples"][0]["disliked"]) <= 3
    for wrong, message in (
        (["--inject_targets=False"], r"not used by the HfArgumentParser: \['--inject_targets=False'\]"),
        (['--enhancer_options={"seed": 1}'], r"`enhancer_options` must have names among .* got \['seed'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(*train.parse([*flags, *wrong, f"--output_dir={tmp_path / 'wrong'}"]))
    with pytest.raises(ValueError, match="`enhancer` must not be set together with num_train_beams"):
        train.train(*train.parse([*flags, "--num_train_beams=5", f"--output_dir={tmp_path / 'other'}"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--candidate_refresh_epochs=2"], "`candidate_refresh_epochs` must come with num_train_beams"),
        (["--candidate_refresh_steps=2"], "`candidate_refresh_steps` must come with num_train_beams"),
        (
            ["--num_train_beams=2", "--candidate_refresh_steps=2", "--candidate_refresh_epochs=1"],
            "`candidate_refresh_epochs` must not be set together with candidate_refresh_steps",
        ),
        (["--exclude_history=True"], "`exclude_history` must come with num_train_beams"),
        (["--relabel"], "`relabel` must come with enhancer"),
        (['--enhancer_options={"num_negatives": 3}'], "`enhancer_options` must come with enhancer"),
        (["--enhancer", "--ranking_loss_weight=0"], "`enhancer` must come with ranking_loss_weight"),
        (
            ["--stop_gradient_history=True"],
            "`stop_gradient_history` must come with num_train_beams or num_retrieved_items",
        ),
        (["--freeze_base_model"], "`freeze_base_model` must come with init_from"),
        (
            ["--freeze_base_model", "--init_from=x", "--ranking_loss_weight=0"],
            "`freeze_base_model` must come with ranking_loss_weight",
        ),
        (
            ["--freeze_base_model", "--adaptive_weights"],
            "`freeze_base_model` must not be set together with adaptive_weights",
        ),
        (["--adaptive_window=5"], "`adaptive_window` must come with adaptive_weights"),
        (["--text_config={model_type: llama}"], "`text_config` must be JSON, got '{model_type: llama}'"),
        (["--text_config=[]"], "`text_config` must be a JSON object"),
    ],
    ids=short_id,
)
def test_arguments_without_effect_are_rejected(prepared, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.train(*train.parse([f"--data_dir={prepared}", f"--output_dir={tmp_path}", *options]))


def test_a_training_uses_one_device_and_resumes_on_another(prepared, tmp_path, monkeypatch):
    options = [f"--data_dir={prepared}", f"--output_dir={tmp_path}"]
    for changed, message in (
        ({"n_gpu": 2}, "a single GPU, got 2"),
        ({"fsdp": "full_shard"}, "`fsdp` and `deepspeed`"),
    ):
        args = train.parse(options)
        monkeypatch.setattr(type(args[2]), "n_gpu", changed.get("n_gpu", 1))
        args[2].fsdp = changed.get("fsdp")
        with pytest.raises(ValueError, match=message):
            train.train(*args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a single process"):
        reproduce_recochain.run(
            reproduce_recochain.ReproduceArguments(data_dir=str(prepared), output_dir=str(tmp_path))
        )
    (tmp_path / "checkpoint-1").mkdir()
    stored = {"training": {"use_cpu": True, "local_rank": 0, "seed": 1}}
    (tmp_path / "arguments.json").write_text(json.dumps(stored))
    here = {"training": {"use_cpu": False, "seed": 1}}
    assert runs.begin(tmp_path, here, tmp_path / "finished.json") == {"training": {"seed": 1}}


@pytest.mark.parametrize("atomic", [False, True])
def test_a_training_continues_with_newer_data_and_new_items(prepared, tmp_path, atomic):
    parent = prepared.parent
    if atomic:
        tables = {name: str(parent / f"{name}.parquet") for name in ("interactions", "items")}
        prepared = prepare(PrepareArguments(**tables, output_dir=str(tmp_path / "atomic"), atomic=True))
    options = [f"--tie_word_embeddings={atomic}", "--max_items=4", "--max_steps=1"]
    first = train.train(*train.parse(train_flags(prepared, tmp_path / "one", *options)))
    items = pd.read_parquet(parent / "items.parquet")
    new = items.iloc[[0, 0, 0]].assign(item_id=["n0", "n1", "n2"])  # a group of equal embeddings
    other = pd.concat([new, items])
    other.assign(embedding=[embedding[::-1] for embedding in other["embedding"]]).to_parquet(
        tmp_path / "other.parquet"
    )
    other.to_parquet(tmp_path / "items.parquet")
    interactions = pd.read_parquet(parent / "interactions.parquet")
    later = interactions.iloc[:3].assign(user_id="u0", item_id=["n0", "n1", "n2"], timestamp=[100, 101, 102])
    pd.concat([interactions, later]).to_parquet(tmp_path / "interactions.parquet")
    tables = {name: str(tmp_path / f"{name}.parquet") for name in ("interactions", "items")}
    newer = prepare(PrepareArguments(**tables, output_dir=str(tmp_path / "newer"), tokenizer=str(first)))
    options.append(f"--init_from={first}")
    second = train.train(*train.parse(train_flags(newer, tmp_path / "two", *options)))
    model = UniGRFForCausalLM.from_pretrained(second)
    tokenizer = SemanticIdTokenizer.from_pretrained(second)
    assert tokenizer.item_ids[30:] == ["n0", "n1", "n2"] and model.catalog.num_items == 33
    np.testing.assert_array_equal(model.catalog.item_codes, tokenizer.item_codes)
    before = UniGRFForCausalLM.from_pretrained(first)
    np.testing.assert_array_equal(before.catalog.item_codes, tokenizer.item_codes[:30])
    torch.testing.assert_close(model.catalog.content_embeddings[30:], before.catalog.content_embeddings[[0, 0, 0]])
    assert model.config.codebook_sizes[-1] > before.config.codebook_sizes[-1]
    assert model.config.codebook_sizes == list(tokenizer.codebook_sizes) and model.config.vocab_size == len(tokenizer)
    check_same_items(tokenizer, prepared)  # the items that both have
    tables["items"] = str(tmp_path / "other.parquet")
    other = prepare(PrepareArguments(**tables, output_dir=str(tmp_path / "other"), tokenizer=str(first)))
    flags = train_flags(other, tmp_path / "three", *options)
    with pytest.raises(ValueError, match=r"embeddings of the kind that .* was trained with, got a median cosine of"):
        train.train(*train.parse(flags))
    stored = load_file(other / "item_embeddings.safetensors")["embeddings"]
    save_file({"embeddings": torch.cat([stored, stored], dim=1)}, other / "item_embeddings.safetensors")
    with pytest.raises(ValueError, match=r"embeddings of the kind that .* was trained with, got embeddings of width"):
        train.train(*train.parse(flags))

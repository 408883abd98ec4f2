"""recipes.train: its arguments, its checks, and trainings that continue."""

import json
import os
import shutil

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
from recipes.training.arguments import TRAINER_DEFAULTS, DataArguments, ModelArguments
from recipes.training.model_init import build_model
from recipes.training.trainer_arguments import check_trainer_arguments
from tokenization import SemanticIdTokenizer


def test_train_without_arguments_builds_the_default_model(prepared, tmp_path):
    data = load_prepared(prepared)
    model_args, data_args, _ = train.parse([f"--data_dir={prepared}", f"--output_dir={tmp_path}"])
    model = build_model(model_args, data_args, data)
    fields = data.tokenizer.config_fields() | {"content_embedding_dim": data.embeddings.shape[1]}
    # The recipe weighs the generation loss as the loss of a whole item.
    training = {"generation_loss_weight": data.tokenizer.num_levels}
    by_hand = UniGRFForCausalLM(UniGRFConfig(**fields, training_config=training))
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
        ({"fsdp": True}, "`fsdp` must be unset on a CPU"),
        ({"fsdp": True, "num_train_beams": 5}, "`fsdp` and `deepspeed`"),
    ):
        args = train.parse(options)
        args[0].num_train_beams = changed.get("num_train_beams", 0)
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


REFUSED = {
    "ranges": [
        *(f"{name}=0" for name in ("max_items", "crops_per_epoch", "stride", "max_long_items", "adaptive_window")),
        *(f"{name}=-1" for name in ("num_transitions", "num_train_beams", "code_negatives", "num_retrieved_items")),
        *(f"{name}=nan" for name in ("negatives_per_item", "ranking_loss_weight", "dense_loss_weight")),
        *("item_dropout=1.5", "item_dropout=1", "ranking_dropout=-.1", "embedding_dropout=nan", "code_temperature=0"),
        *("learning_rate=nan", "learning_rate=-1", "num_train_epochs=0", "num_train_epochs=inf", "max_steps=0"),
        *("per_device_train_batch_size=0", "gradient_accumulation_steps=0", "save_total_limit=0", "seed=-1"),
        *("weight_decay=-1", "max_grad_norm=nan", "adam_beta2=1", "dataloader_num_workers=-1"),
    ],
    "without effect": [
        *("metric_for_best_model=loss", "greater_is_better=True"),
        *("resume_from_checkpoint=nowhere", "resume_from_checkpoint=True", "do_train=True", "do_eval=True"),
        *("do_predict=True", "remove_unused_columns=True", "label_smoothing_factor=0.1", "label_names=x"),
        *("length_column_name=x", "use_cache=True", "use_liger_kernel=True", "bf16_full_eval=True"),
        *("save_only_model=True", "prediction_loss_only=False", "push_to_hub=True", "hub_model_id=a/b"),
        *("eval_steps=5", "eval_delay=1", "run_name=x", "metric_for_best_model=recall", "optim_target_modules=x"),
        *("dataloader_persistent_workers=True", "max_long_items=7", "inject_target=False", "optim_args=foo=1"),
    ],
    "values that transformers reads late": [
        *('lr_scheduler_kwargs={"a": 1}', "lr_scheduler_kwargs=[1]", "lr_scheduler_type=warmup_stable_decay"),
        *("lr_scheduler_type=cosine_with_min_lr", "optim_args=x", "torch_compile_backend=nope", "report_to=nope"),
    ],
    "paths": ["init_from=/nope", "init_from=tests/nope", "init_from=./nope", "init_from=a/b/c", "data_dir=/nope"],
}


@pytest.mark.parametrize("flag", [flag for flags in REFUSED.values() for flag in flags])
def test_a_training_refuses_before_any_work(prepared, tmp_path, monkeypatch, flag):
    monkeypatch.setattr("recipes.training.run.load_prepared", lambda _: pytest.fail("the work has begun"))
    flags = ["--save_strategy=steps", f"--{flag}"]
    with pytest.raises(ValueError, match=rf"`{flag.split('=')[0]}`.* must .*got "):
        train.train(*train.parse(train_flags(prepared, tmp_path / "run", *flags)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["deepspeed", "accelerator_config", "lr_scheduler_kwargs"])
@pytest.mark.parametrize("value", ["/nope.json", '{"a": 1}', "{"])
def test_configs_of_the_trainer_are_refused_by_name(prepared, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}`.* must .*got "):
        train.train(*train.parse(train_flags(prepared, tmp_path / "run", f"--{name}={value}")))
    assert not (tmp_path / "run").exists()


def test_a_schedule_by_the_evaluation_loss_is_accepted(tmp_path):
    arguments = [f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'run'}", "--eval_strategy=epoch"]
    check_trainer_arguments(train.parse([*arguments, "--lr_scheduler_type=reduce_lr_on_plateau"])[2], TRAINER_DEFAULTS)


@pytest.mark.parametrize("name", ["output_dir", "checkpoint_dir"])
def test_a_training_checks_its_folders_before_the_work(prepared, tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    monkeypatch.setattr("recipes.training.run.load_prepared", lambda _: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=f"`{name}` must be a folder that can be written"):
        train.train(*train.parse(train_flags(prepared, tmp_path / "run", f"--{name}={tmp_path / 'file'}")))


def test_a_finished_training_is_reused_only_while_it_is_whole(prepared, tmp_path, monkeypatch, capsys):
    def trained(name, *flags):
        short = ("--max_items=4", "--max_steps=1", f"--checkpoint_dir={tmp_path / 'shared'}", *flags)
        return train.train(*train.parse(train_flags(prepared, tmp_path / name, *short)))

    first = trained("one")
    weights = (first / "model.safetensors").read_bytes()
    trained("one")
    assert "reused" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "items.json", "trie_unigrf.py", "generation_config.json"):
        for content in (None, (first / name).read_bytes()[:-9]):
            (first / name).unlink()
            if content is not None:
                (first / name).write_bytes(content)
            trained("one")
            assert "is trained again" in capsys.readouterr().out
            assert (first / "model.safetensors").read_bytes() == weights

    # A second training into the folder, killed before or while its files take their places.
    def replace(source, target, move=os.replace):
        move(source, target)
        if target == first / "model.safetensors":
            pytest.fail("killed")

    killers = {"recipes.training.run.TrainingRun.write_log": lambda *_: pytest.fail("killed"), "os.replace": replace}
    for name, kill in killers.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, kill)
            with pytest.raises(pytest.fail.Exception):
                trained("two", "--seed=7")
        is_whole = kill is not replace
        assert ((first / "model.safetensors").read_bytes() == weights) == is_whole
        capsys.readouterr()
        trained("one")
        assert ("reused" in capsys.readouterr().out) == is_whole
        assert (first / "model.safetensors").read_bytes() == weights


def test_a_moved_training_goes_on_with_the_same_data(prepared, tmp_path, capsys):
    flags = ("--max_items=4", "--max_steps=2")
    first = train.train(*train.parse(train_flags(prepared, tmp_path / "one", *flags)))
    shutil.copytree(prepared, tmp_path / "data")
    for file in (tmp_path / "data").rglob("*"):
        os.utime(file, (1, 1))
    first.parent.rename(tmp_path / "moved")
    moved = train.train(*train.parse(train_flags(tmp_path / "data", tmp_path / "moved", *flags)))
    assert moved == tmp_path / "moved" / "checkpoint" and "reused" in capsys.readouterr().out


@pytest.mark.parametrize("length", ["--max_steps=4", "--num_train_epochs=1"])
@pytest.mark.parametrize("killed_in", ["write_log", "the last checkpoint"])
def test_a_resumed_training_publishes_the_whole(prepared, tmp_path, monkeypatch, length, killed_in):
    flags = ["--max_items=4", length, "--logging_steps=1", "--save_strategy=steps", "--save_steps=2"]
    flags += ["--per_device_train_batch_size=64", "--lr_scheduler_type=constant"]
    whole = train.train(*train.parse(train_flags(prepared, tmp_path / "whole", *flags)))
    arguments = train.parse(train_flags(prepared, tmp_path / "resumed", *flags))
    with monkeypatch.context() as patch:
        patch.setattr("recipes.training.run.TrainingRun.write_log", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train.train(*arguments)
    if killed_in != "write_log":
        last = max((tmp_path / "resumed").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        (last / "trainer_state.json").write_text("{")
    resumed = train.train(*arguments)
    first, again = (json.loads((folder / "training_log.json").read_text()) for folder in (whole, resumed))
    assert first["weights"] == again["weights"]
    assert again["metrics"]["train_loss"] == pytest.approx(first["metrics"]["train_loss"], rel=1e-3)
    assert again["metrics"]["epoch"] == first["metrics"]["epoch"]
    assert not any("train_runtime" in entry for entry in (again["metrics"], *again["log_history"]))


@pytest.mark.parametrize("killed_after", [3, 4])
def test_a_moved_training_loads_its_best_checkpoint(prepared, tmp_path, monkeypatch, killed_after):
    flags = ["--max_items=4", "--max_steps=4", "--save_strategy=steps", "--save_steps=1", "--eval_strategy=steps"]
    # Losses rise: the first checkpoint is the best one.
    flags += ["--eval_steps=1", "--load_best_model_at_end", "--learning_rate=3", "--lr_scheduler_type=constant"]
    with monkeypatch.context() as patch:
        patch.setattr("recipes.training.run.TrainingRun.write_log", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train.train(*train.parse(train_flags(prepared, tmp_path / "one", *flags)))
    moved = tmp_path / "moved"
    (tmp_path / "one").rename(moved)
    for step in range(killed_after + 1, 5):
        shutil.rmtree(moved / f"checkpoint-{step}")
    state = json.loads((moved / f"checkpoint-{killed_after}" / "trainer_state.json").read_text())
    best = moved / os.path.basename(state["best_model_checkpoint"])
    assert best.name != f"checkpoint-{killed_after}"
    arguments = train.parse(train_flags(prepared, moved, *flags))
    lost = best.rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=f"must hold the best checkpoint .* got no whole {best.name} in "):
        train.train(*arguments)
    lost.rename(best)
    weights = load_file(train.train(*arguments) / "model.safetensors")
    expected = load_file(best / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())

"""Times of events in the recipes: training and evaluation equal forwards built by hand."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from helpers import GRID, train_flags

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes import train
from recipes.data import training_datasets as training_rows
from recipes.data.prepared import PreparedData
from recipes.data.windows import cut_windows
from recipes.evaluate import EvaluateArguments, evaluate_checkpoint
from recipes.evaluation.inference import Measurement, batches, candidates, invalid_items, like_auc
from recipes.prepare import PrepareArguments, prepare
from recipes.training.arguments import DataArguments, ModelArguments
from recipes.training.collator import TrainingCollator
from recipes.training.model_init import build_model
from tokenization import SemanticIdTokenizer

HSTU = {"model_type": "hstu", "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 128}
TIMED = {**HSTU, "num_time_buckets": 40}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared data of 24 users and 20 items; a third of the times is unknown."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(24):
        steps = rng.integers(1, 10 ** rng.integers(1, 7, size=rng.integers(4, 10)))
        for position, time in enumerate(1000 * np.cumsum(steps) + user):
            known = rng.random() < 0.67
            rows.append(
                (f"u{user}", f"i{rng.integers(20)}", time if known else -1, position, ["no", "like"][position % 2])
            )
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "position", "behavior"])
    table.to_parquet(folder / "interactions.parquet")
    embeddings = rng.normal(size=(20, 4))
    items = pd.DataFrame({"item_id": [f"i{item}" for item in range(20)], "embedding": embeddings.tolist()})
    items.to_parquet(folder / "items.parquet")
    return prepare(
        PrepareArguments(
            interactions=str(folder / "interactions.parquet"),
            items=str(folder / "items.parquet"),
            output_dir=str(folder / "data"),
            codebook_sizes=[4, 4],
        )
    )


@pytest.fixture
def world(prepared):
    """The tokenizer, the splits, and a random model that reads times."""
    tokenizer = SemanticIdTokenizer.from_pretrained(prepared / "tokenizer")
    torch.manual_seed(0)
    fields = {"text_config": TIMED, "ranking_targets": ["next", "like"], "negatives_per_item": 0.0}
    model = UniGRFForCausalLM(UniGRFConfig(**tokenizer.config_fields(), **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.set_catalog(torch.from_numpy(tokenizer.item_codes.copy()))
    return tokenizer, load_from_disk(str(prepared / "dataset")), model


def code_losses(model, tokenizer, user, start, end, target=None):
    """Compute the cross-entropy of every code of a part of a history by a forward of that part."""
    items, behaviors, times = (user[name][start:end] for name in ("items", "behaviors", "timestamps"))
    if target is not None:
        items, behaviors, times = (
            [*column, user[name]]
            for column, name in ((items, "target"), (behaviors, "target_behavior"), (times, "target_timestamp"))
        )
    names = [tokenizer.behaviors[index] for index in behaviors]
    encoded = tokenizer.encode_history(
        [tokenizer.item_ids[item] for item in items],
        names,
        timestamps=[None if time < 0 else time for time in times],
        return_tensors="pt",
    )
    when = encoded["timestamps"]
    states = model.model(
        encoded["input_ids"],
        item_representations=model.scorer.history_representations(encoded["input_ids"]),
        timestamps=when,
        target_timestamps=torch.cat([when[:, 1:], when[:, -1:]], dim=1),
    ).last_hidden_state[0]
    losses = []
    for place, token in enumerate(encoded["input_ids"][0].tolist()):
        level = np.searchsorted(tokenizer.code_offsets, token, side="right") - 1
        if level >= 0:
            logits = model.scorer.code_logits(states[place - 1], model.layout.level_slices[level])
            losses.append(-logits.log_softmax(dim=0)[token - tokenizer.code_offsets[level]])
    return losses if target is None else losses[-tokenizer.num_levels :]


@torch.no_grad()
def losses_of(model, batch):
    """Return the generation loss, which has to depend on the times."""
    timed = model(**batch)
    untimed = model(**{name: value for name, value in batch.items() if name != "timestamps"})
    assert not torch.allclose(timed.generation_loss, untimed.generation_loss), "times matter"
    return timed.generation_loss


@torch.no_grad()
def test_packed_and_padded_rows_are_learned_as_single_windows(world):
    tokenizer, splits, model = world
    histories = splits["train"]
    windows = [
        (user, start, end)
        for user, items in enumerate(histories["items"])
        for start, end in cut_windows(len(items), 4 + 1, 2)
    ]
    expected = [loss for user, *part in windows for loss in code_losses(model, tokenizer, histories[user], *part)]
    packed = training_rows.packed_rows(histories, tokenizer, 4, 2, seed=0, with_times=True)
    assert max(row.count(tokenizer.bos_token_id) for row in packed["input_ids"]) > 1
    assert len({len(row) for row in packed["input_ids"]}) > 1, "the collator has to pad some"
    alone = training_rows.history_rows(histories, tokenizer, 4, 2, with_times=True)
    for rows in (packed, alone.remove_columns(["user", "last", "length"])):
        batch = TrainingCollator()(list(rows))
        assert (batch["timestamps"][batch["attention_mask"] == 0] == -1).all()
        torch.testing.assert_close(losses_of(model, batch), torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)
        assert model(**batch).ranking_loss.isfinite()
    assert "timestamps" not in training_rows.packed_rows(histories, tokenizer, 4, 2, seed=0).column_names


@torch.no_grad()
def test_a_held_out_item_is_predicted_at_its_own_time(world):
    tokenizer, splits, model = world
    split = splits["validation"]
    expected = [loss for user in split for loss in code_losses(model, tokenizer, user, -3, None, target=True)]
    rows = training_rows.held_out_rows(split, tokenizer, 3, with_times=True)
    batch = TrainingCollator()(list(rows))
    torch.testing.assert_close(losses_of(model, batch), torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"without \['target_timestamp'\]. Run recipes.prepare again"):
        old = split.remove_columns("target_timestamp")
        training_rows.held_out_rows(old, tokenizer, 3, with_times=True)


def test_stage_two_rows_have_the_times_of_their_items(world):
    tokenizer, splits, _ = world
    histories = splits["train"]
    rows = training_rows.second_stage_rows(histories, tokenizer, 3, 3, 5, with_times=True)
    places = [(user, end) for user, items in enumerate(histories["items"]) for end in range(1, len(items) + 1)]
    for row, (user, end) in zip(rows, places, strict=True):
        times = np.array(histories[user]["timestamps"][max(0, end - 4) : end])
        assert row["timestamps"] == tokenizer.encode_times(times).tolist()
        assert row["long_timestamps"] == histories[user]["timestamps"][max(0, end - 6) : end - 1]
    held_out = training_rows.held_out_rows(splits["test"], tokenizer, 3, 5, with_times=True)
    assert held_out["long_timestamps"][:] == [user["timestamps"][-5:] for user in splits["test"]]
    batch = TrainingCollator()([held_out[0], rows[0]])
    longer = batch["long_history"]
    assert longer["timestamps"].shape == longer["items"].shape and (longer["timestamps"][1] == -1).all()


def requests(tokenizer, split, max_items):
    """Encode each user as a single request."""
    for user in split:
        encoded = tokenizer.encode_history(
            [tokenizer.item_ids[item] for item in user["items"][-max_items:]],
            [tokenizer.behaviors[index] for index in user["behaviors"][-max_items:]],
            timestamps=user["timestamps"][-max_items:],
            return_tensors="pt",
        )
        yield user, {**encoded, "query_time": torch.tensor([user["target_timestamp"]])}


@torch.no_grad()
def test_an_evaluation_uses_the_time_of_the_target(world, monkeypatch):
    tokenizer, splits, model = world
    split = splits["test"]
    beams = {"num_beams": 20, "num_return_sequences": 20, "ranking_weight": 0.0}
    how = Measurement(max_items=4, batch_size=5)
    scores = candidates(model, tokenizer, split, 20, how)
    calls = []
    rank = model.rank
    generate = model.generate
    monkeypatch.setattr(model, "rank", lambda *args, **kwargs: calls.append(rank(*args, **kwargs)) or calls[-1])
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: calls.append(kwargs) or generate(*args, **kwargs))
    assert 0 <= like_auc(model, tokenizer, split, "like", how)["auc"] <= 1
    ranked = torch.cat(calls)[:, 0]
    order = np.concatenate([rows for rows, _, _ in batches(model, tokenizer, split, how, "")])
    assert invalid_items(model, tokenizer, split, 3, how)["invalid"] == 0
    assert {"timestamps", "query_time"} <= set(calls[-1])
    differ = 0
    for row, (user, request) in enumerate(requests(tokenizer, split, 4)):
        best = model.recommend(**request, blocked_items=[user["items"]], **beams)
        valid = best.item_indices[0] >= 0
        for name in ("generation_scores", "ranking_scores"):
            torch.testing.assert_close(scores[name][row][valid], best[name][0][valid], atol=2e-5, rtol=1e-4)
        logits = rank(**request, candidates=torch.tensor([[user["target"]]]))[0, 0]
        torch.testing.assert_close(ranked[int((order == row).nonzero()[0][0])], logits, atol=2e-5, rtol=1e-4)
        del request["query_time"]
        differ += not torch.allclose(
            model.recommend(**request, blocked_items=[user["items"]], **beams).scores, best.scores
        )
    assert differ > len(split) / 4, "the query time matters"


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--enhancer", "--relabel"],
        ["--num_train_beams=4", "--num_retrieved_items=2", "--candidate_refresh_epochs=1"],
    ],
    ids=["plain", "enhancer", "stage-two"],
)
def test_from_tables_with_times_to_metrics(prepared, tmp_path, extra, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.baselines.GRID", GRID)
    options = ["--max_items=5", "--per_device_train_batch_size=8", "--num_train_epochs=3", "--logging_steps=1"]
    options += ["--eval_strategy=epoch", "--weight_decay=0", *extra]
    checkpoint = train.train(*train.parse(train_flags(prepared, tmp_path, *options, text_config=TIMED)))
    model = UniGRFForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(42)  # the seed of the training
    untrained = build_model(
        ModelArguments(text_config=json.dumps(TIMED)),
        DataArguments(data_dir="", max_items=5, num_transitions=0),
        PreparedData(SemanticIdTokenizer.from_pretrained(checkpoint), DatasetDict(), torch.zeros(20, 4)),
    )
    for layer, before in zip(model.model.language_model.layers, untrained.model.language_model.layers, strict=True):
        moved = (layer.bias.times.weight != before.bias.times.weight)[:, 0]
        assert 5 < moved.sum() < 41, "only buckets of existing times are trained"
    metrics = evaluate_checkpoint(
        EvaluateArguments(
            checkpoint=str(checkpoint),
            data_dir=str(prepared),
            output_dir=str(tmp_path),
            num_beams=[5],
            ranking_weights=[0.5],
            list_length=10,
            max_items=5,
        )
    )
    assert metrics["invalid_items"] == 0 and np.isfinite(metrics["ranked"]["ndcg@10"])

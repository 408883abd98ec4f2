"""Cached candidates: beams of stage II that are searched for every few epochs or steps."""

import pytest
import torch
from helpers import build_model, run_trainer, second_stage_rows
from transformers import TrainerState, TrainingArguments

from recipes.training.cached_candidates import CachedCandidates
from recipes.training.collator import TrainingCollator

BEAMS = {"num_beams": 6, "num_return_sequences": 6, "ranking_weight": 0.0}


@pytest.mark.parametrize("refresh", [None, {"every_epochs": 2}, {"every_steps": 5}], ids=["search", "epochs", "steps"])
def test_a_resumed_stage_two_equals_an_uninterrupted_one(refresh, tmp_path):
    rows = second_stage_rows(build_model(num_retrieved_items=3))

    def train(folder, resume=None, **arguments):
        fields = {"embedding_dropout": 0.2, "ranking_dropout": 0.3, "dense_loss_weight": 0.5}
        model = build_model(num_retrieved_items=3, num_train_beams=6, **fields)
        cached = CachedCandidates(model, rows, 6, **refresh) if refresh else None
        losses = run_trainer(
            tmp_path / folder,
            model,
            rows if cached else rows.remove_columns("row"),
            resume,
            [cached] if cached else None,
            cached.collator(TrainingCollator()) if cached else TrainingCollator(),
            max_steps=14,
            max_grad_norm=1.0,
            save_steps=10,
            remove_unused_columns=False,
            **arguments,
        )
        return model, losses

    whole, losses = train("whole")
    train("parts", save_strategy="steps")
    resumed, rest = train("parts", resume=str(tmp_path / "parts" / "checkpoint-10"))
    assert rest[-4:] == losses[-4:]
    for (name, first), second in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_candidates_are_refreshed_after_the_given_steps(tmp_path):
    model = build_model(num_train_beams=6)
    rows = second_stage_rows(model).select_columns(["row", "input_ids", "attention_mask", "labels"])
    cached = CachedCandidates(model, rows, 6, every_steps=6)
    numbers = {tuple(ids): row for row, ids in enumerate(rows["input_ids"])}
    batches = []

    def compare_with_a_search(model, args, kwargs):
        model.eval()
        batch = {}
        for ids, items in zip(kwargs["input_ids"], kwargs["item_sets"]["candidates"], strict=True):
            tokens = ids[ids > 0]
            fresh = model.recommend(tokens[None, :-5], **BEAMS).item_indices[0]
            batch[numbers[tuple(tokens.tolist())]] = (items, fresh)
        batches.append(batch)
        model.train()

    # Registered behind the hook that adds the candidates.
    model.register_forward_pre_hook(compare_with_a_search, with_kwargs=True)
    collator = cached.collator(TrainingCollator())
    options = {"max_steps": 16, "learning_rate": 0.05, "max_grad_norm": 1.0, "remove_unused_columns": False}
    run_trainer(tmp_path, model, rows, None, [cached], collator, **options)
    searched = {}
    num_stale = 0
    for step, batch in enumerate(batches):
        for row, (items, fresh) in batch.items():
            if row not in searched or step - searched[row][0] >= 6:
                assert torch.equal(items, fresh), "the beams of the current model"
                searched[row] = (step, items)
            assert torch.equal(items, searched[row][1])
            num_stale += not torch.equal(items, fresh)
    assert num_stale > 0 and any(step > 0 for step, _ in searched.values()), "some are reused, some refreshed"
    with pytest.raises(ValueError, match="`every_steps` must be at least 1"):
        CachedCandidates(model, rows, 6, every_steps=0)


def test_cached_candidates_have_the_time_of_the_true_item():
    model = build_model("hstu", num_train_beams=4)
    rows = second_stage_rows(model)
    generator = torch.Generator().manual_seed(2)
    times = [
        torch.randint(1, 10**6, (len(row["input_ids"]),), generator=generator).sort().values.tolist() for row in rows
    ]
    items_of = {}
    for name, dataset in (("timed", rows.add_column("timestamps", times)), ("untimed", rows)):
        cached = CachedCandidates(model, dataset, num_beams=6, batch_size=5)
        cached.on_epoch_begin(TrainingArguments(use_cpu=True, disable_tqdm=True), TrainerState(epoch=0.0), None)
        items_of[name] = cached.items
    assert not torch.equal(items_of["timed"], items_of["untimed"])
    for row, time, items in zip(rows, times, items_of["timed"], strict=True):
        history = torch.tensor([row["input_ids"][:-5]])
        before = torch.tensor([time[:-5]])
        query_time = time[-5]
        best = model.recommend(history, timestamps=before, query_time=torch.tensor([query_time]), **BEAMS)
        assert torch.equal(items, best.item_indices[0])


def test_candidates_are_refreshed_after_the_given_epochs():
    model = build_model(num_retrieved_items=3)
    rows = second_stage_rows(model)
    cached = CachedCandidates(model, rows, num_beams=40, every_epochs=2, batch_size=3)
    args = TrainingArguments(use_cpu=True, disable_tqdm=True)
    state = TrainerState(epoch=0.0)
    model.train()
    cached.on_epoch_begin(args, state, None)
    assert model.training
    batch = cached.collator(TrainingCollator())([rows[5], rows[2]])
    candidates = batch["item_sets"]["candidates"]
    assert "row" not in batch and candidates.shape == (2, 40)
    assert (candidates[:, 30:] == -1).all(), "the catalog has 30 items"
    for row, cached_row in zip((5, 2), candidates, strict=True):
        history = torch.tensor([rows[row]["input_ids"][:-5]])
        best = model.eval().recommend(
            history,
            num_beams=30,
            num_return_sequences=30,
            ranking_weight=0.0,
            long_history={"items": history[:, :0], "behaviors": history[:, :0]},
        )
        assert torch.equal(cached_row[:30], best.item_indices[0])
    assert "item_sets" not in cached.collator(TrainingCollator())([rows.remove_columns("row")[0]])
    blocked_items = [list(range(row % 7)) for row in range(len(rows))]
    others = CachedCandidates(model, rows.add_column("blocked_items", blocked_items), num_beams=30, batch_size=3)
    others.on_epoch_begin(args, state, None)
    for items, all_items, blocked in zip(others.items.tolist(), cached.items.tolist(), blocked_items, strict=True):
        allowed = [item for item in all_items if item not in (-1, *blocked)]
        assert items == allowed + [-1] * len(blocked), "no blocked item is a candidate"
    before = cached.items.clone()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    cached.on_epoch_begin(args, TrainerState(epoch=1.0), None)
    assert torch.equal(cached.items, before)
    cached.on_epoch_begin(args, TrainerState(epoch=2.0), None)
    assert not torch.equal(cached.items, before)
    with pytest.raises(ValueError, match="a column `row`"):
        CachedCandidates(model, rows.remove_columns("row"), num_beams=4)

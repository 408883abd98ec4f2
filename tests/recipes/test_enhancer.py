"""The ranking-driven enhancer: its pools, what it adds to a batch, and how it resumes."""

import json

import numpy as np
import pytest
import torch
from helpers import (
    ATOMIC,
    build_enhancer,
    build_model,
    collate,
    enhancer_rows,
    run_trainer,
)
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, TrainerState


class Arguments:
    """The training arguments that an enhancer reads."""

    world_size = 1
    process_index = 0
    disable_tqdm = True

    def __init__(self, output_dir):
        self.output_dir = output_dir


def refresh(enhancer, folder, epoch):
    """Begin an epoch in which the pools are due."""
    enhancer.on_epoch_begin(Arguments(folder), TrainerState(epoch=float(epoch)), None)


def record_calls(monkeypatch, model, name):
    """Record keyword arguments and results of a public method of the model."""
    calls = []
    method = getattr(model, name)

    def recorded(**kwargs):
        calls.append((kwargs, method(**kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(model, name, recorded)
    return calls


def encode_history(enhancer, user):
    """Encode what the user did before the last item, with the query time of the last item if there are times."""
    before = [np.array(column[user][:-1], dtype=int) for column in (enhancer.items, enhancer.behaviors)]
    history = {"input_ids": torch.tensor(enhancer.tokenizer.encode_indices(*before))[None]}
    if enhancer.timestamps is not None:
        times = enhancer.timestamps[user]
        history["timestamps"] = torch.tensor(enhancer.tokenizer.encode_times(times[:-1]))[None]
        history["query_time"] = torch.tensor(times[-1:])
    return history


@pytest.mark.parametrize("reader", ["llama", "hstu"])
@pytest.mark.parametrize(
    ("pool", "ids"), [("uniform", ATOMIC), ("beam", ATOMIC), ("beam", {})], ids=["uniform", "beam-atomic", "beam"]
)
def test_hard_negatives_are_retrieved_high_and_ranked_low(tmp_path, pool, ids, reader, monkeypatch):
    model = build_model(reader, **ids)
    enhancer = build_enhancer(model, reader == "hstu", pool=pool, penalty=0.7)
    refresh(enhancer, tmp_path, 1)
    earlier = enhancer.negatives.clone()
    with monkeypatch.context() as patch:
        calls = record_calls(patch, model, "rank" if pool == "uniform" else "recommend")
        refresh(enhancer, tmp_path, 2)
    ((inputs, result),) = calls
    like = model.config.ranking_targets.index("like")
    everything = {"num_beams": model.catalog.num_items, "num_return_sequences": model.catalog.num_items}
    tokens = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    for user, user_items in enumerate(enhancer.items):
        history = encode_history(enhancer, user)
        row = tokens.index(history["input_ids"][0].tolist())
        if pool == "uniform":
            candidates = inputs["candidates"][row].tolist()
            pool_items = candidates.copy()
            for _ in range(int((earlier[user] < 0).sum())):
                pool_items.remove(0)  # an empty place is passed as item 0
            items = torch.tensor(sorted(set(pool_items) - set(user_items)))
            assert set(earlier[user].tolist()) - {-1} <= set(items.tolist()), "earlier hard negatives stay"
            ranking = result[row, [candidates.index(item) for item in items.tolist()], like].sigmoid()
        else:
            items = result.item_indices[row]
            ranking = result.ranking_scores[row].exp()
            assert len(items.unique()) == 12 and not set(items.tolist()) & set(user_items)
        expected = model.rank(**history, candidates=items[None])[0, :, like].sigmoid()
        torch.testing.assert_close(ranking, expected, atol=2e-5, rtol=1e-4)
        best_items = model.recommend(**history, **everything)
        log_probs = torch.zeros(model.catalog.num_items)
        log_probs[best_items.item_indices[0]] = best_items.generation_scores[0]
        scores = log_probs[items]
        if pool == "beam":
            torch.testing.assert_close(result.generation_scores[row], scores, atol=2e-5, rtol=1e-4)
        rho = (scores - scores.min()) / (scores.max() - scores.min()) - 0.7 * expected
        liked = expected > 0.6
        order = rho.masked_fill(liked, -torch.inf).argsort(descending=True)[: min(3, int((~liked).sum()))]
        assert set(items[order].tolist()) == {item for item in enhancer.negatives[user].tolist() if item >= 0}
        best = items[expected.masked_fill(~liked, -1).argsort(descending=True)[: min(2, int(liked.sum()))]]
        assert best.tolist() == [item for item in enhancer.excluded_positives[user].tolist() if item >= 0]
    lines = [json.loads(line) for line in (tmp_path / "enhancer.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(title.startswith("Film ") for title in lines[0]["examples"][0]["disliked"])
    assert enhancer.statistics["enhancer_negatives"] == pytest.approx((enhancer.negatives >= 0).sum() / 6)


def test_persistent_workers_see_refreshed_pools(tmp_path):
    enhancer = build_enhancer(build_model(**ATOMIC))
    rows = enhancer_rows(enhancer).to_list()
    collate = enhancer.collator(DataCollatorForSeq2Seq(enhancer.tokenizer))
    # Spawned, as on macOS and Windows: the worker unpickles the collator.
    loader = DataLoader(
        rows, 4, collate_fn=collate, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    assert all("item_sets" not in batch for batch in loader)
    refresh(enhancer, tmp_path, 1)
    sets = [batch["item_sets"] for batch in loader]
    assert torch.equal(torch.cat([items["hard_negatives"] for items in sets]), enhancer.negatives)


@pytest.mark.parametrize(
    ("ids", "options"),
    [(ATOMIC, {}), (ATOMIC, {"relabel": True}), ({}, {"pool": "beam"})],
    ids=["uniform", "relabel", "beam"],
)
def test_a_resumed_enhancer_run_equals_an_uninterrupted_one(tmp_path, ids, options):
    def train(folder, resume=None, **arguments):
        model = build_model(**ids)
        enhancer = build_enhancer(model, **options)
        losses = run_trainer(
            tmp_path / folder,
            model,
            enhancer_rows(enhancer),
            resume,
            [enhancer],
            enhancer.collator(collate),
            per_device_train_batch_size=2,
            max_steps=12,
            remove_unused_columns=False,
            restore_callback_states_from_checkpoint=True,
            **arguments,
        )
        return model, enhancer, losses

    whole, enhancer, losses = train("whole")
    train("parts", save_strategy="steps", save_steps=5)  # in the middle of an epoch of three steps
    resumed, again, rest = train("parts", resume=str(tmp_path / "parts" / "checkpoint-5"))
    assert rest[-7:] == losses[-7:]
    assert torch.equal(enhancer.negatives, again.negatives) and torch.equal(
        enhancer.excluded_positives, again.excluded_positives
    )
    assert (enhancer.negatives >= 0).any()
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(ValueError, match="Resume one that had it, in its own output_dir"):
        train("elsewhere", resume=str(tmp_path / "parts" / "checkpoint-5"))


def test_relabeling_appends_a_favorite_to_the_last_row_only():
    model = build_model()
    enhancer = build_enhancer(model, pool="beam", relabel=True)
    enhancer.excluded_positives[1] = torch.tensor([4, -1])
    rows = [{**enhancer_rows(enhancer)[1], "last": last} for last in (True, False)] + [enhancer_rows(enhancer)[2]]
    batch = enhancer.collator(collate)(rows)
    tokens = model.layout.item_tokens(model.catalog.item_codes[4].long())
    length = len(rows[0]["input_ids"])
    assert torch.equal(batch["input_ids"][0, length:], tokens) and torch.equal(batch["labels"][0, length:], tokens)
    assert (batch["labels"][1:, length:] == -100).all() and (batch["attention_mask"][1:, length:] == 0).all()
    assert model(**batch).loss.isfinite()
    timed = [{**row, "timestamps": [9] * len(row["input_ids"])} for row in rows]
    batch = enhancer.collator(DataCollatorForSeq2Seq(enhancer.tokenizer))(timed)
    assert batch["timestamps"][0].tolist() == [9] * length + [-1] * len(tokens), "the time of an added item is unknown"


def test_enhancer_arguments_that_do_not_fit_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="`num_negatives` must be from 1 to pool_size"):
        build_enhancer(build_model(**ATOMIC), num_negatives=13)
    with pytest.raises(ValueError, match="`pool` must be 'beam'"):
        build_enhancer(build_model(), pool="uniform")
    with pytest.raises(ValueError, match="`target` must be among"):
        build_enhancer(build_model(**ATOMIC), target="love")
    with pytest.raises(ValueError, match="more than the 1 of the enhancer's warm-up, got 1"):
        build_enhancer(build_model(**ATOMIC)).on_train_begin(
            Arguments(tmp_path), TrainerState(num_train_epochs=1), None
        )
    small = build_enhancer(build_model(**{**ATOMIC, "codebook_sizes": (10,), "num_items": 10}), pool_size=40)
    small.items = [list(range(8)) for _ in small.items]  # two items are left, fewer than three
    small.behaviors = [[0] * 8 for _ in small.items]
    with pytest.raises(ValueError, match="pools of at least 3 items"):
        refresh(small, tmp_path, 1)
    small.items[0] = [0]  # nine items are left for this user
    small.behaviors[0] = [1]
    small.options.threshold = 1.0
    refresh(small, tmp_path, 2)
    assert (small.negatives >= 0).sum(dim=1).tolist() == [3] + [2] * 5, "the others get the items that are left"
    assert small.statistics["enhancer_short_pools"] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="`max_items` must be below"):
        build_enhancer(build_model("hstu", **ATOMIC), relabel=True)
    enhancer = build_enhancer(build_model(**ATOMIC))
    with torch.no_grad():
        enhancer.model.ranking_head.out_proj.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
        refresh(enhancer, tmp_path, 1)

"""UniGRF's enhancer: the items given with a batch enter the losses as they should, and pools are what ranking says of them."""

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
    random_histories,
    run_trainer,
    watch_negatives,
)
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, TrainerState

from modeling_unigrf import training_unigrf


def labeled(model, lengths, seed=0):
    input_ids, mask, items = random_histories(model, lengths, seed)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}, items


@pytest.mark.parametrize("shared", [True, False, None])
def test_given_negatives_replace_random_ones_or_count_more_and_favorites_are_none(shared):
    sampling = (
        {"code_negatives": 0, "given_negative_weight": 5.0} if shared is None else {"share_code_negatives": shared}
    )
    model = build_model(**{**ATOMIC, **sampling}).train()
    batch, items = labeled(model, [4, 2])
    negatives = torch.tensor([[7, items[0][1], -1], [-1, -1, -1]])
    favorites = torch.tensor([[3, -1], [5, 6]])
    torch.manual_seed(3)
    out = model(**batch, hard_negatives=negatives, excluded_positives=favorites)
    torch.manual_seed(3)
    drawn = torch.randint(40, (12,) if shared else (6, 12))
    logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    codes, offset = model.catalog.item_codes[:, 0].long(), model.config.code_offsets[0]
    losses, place = [], 0
    for row, own in enumerate(items):
        first = batch["attention_mask"].shape[1] - int(batch["attention_mask"][row].sum())
        hard = [item for item in negatives[row].tolist() if item >= 0]
        liked = codes[[item for item in favorites[row].tolist() if item >= 0]].tolist()
        for position, item in enumerate(own):
            chosen = [*codes[[other for other in hard if other != item]].tolist()]
            if shared is None:
                random = [code for code in range(40) if code not in chosen]
                chosen *= 5
            else:
                random = (drawn if shared else drawn[place]).tolist()[len(hard) :]  # the first gave way
            chosen += [code for code in random if code != codes[item] and code not in liked]
            scores = logits[row, first + 2 * position, torch.tensor([int(codes[item]), *chosen]) + offset]
            losses.append(-scores.log_softmax(dim=0)[0])
            place += 1
    torch.testing.assert_close(out.generation_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


def test_semantic_ids_learn_the_last_item_among_the_given_ones_by_whole_log_probabilities(backbone):
    model = build_model(backbone, negatives_per_item=1.5, contrastive_loss_weight=0.3)
    batch, items = labeled(model, [4, 2, 1])
    negatives = torch.tensor([[7, 8, 9], [items[1][1], 3, -1], [-1, -1, -1]])
    with torch.no_grad():
        out = model(**batch, hard_negatives=negatives)
        plain = model(**batch)
    losses = []
    for row in range(3):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][:-5]
        chosen = [items[row][-1], *(item for item in negatives[row].tolist() if item not in (-1, items[row][-1]))]
        scores = []
        for item in chosen:
            tokens = model.layout.item_tokens(model.catalog.item_codes[item].long())
            with torch.no_grad():
                logits = model(torch.cat([ids, tokens])[None]).logits[0]
            parts = [
                logits[len(ids) - 1 + level, model.layout.level_slice(level)].log_softmax(dim=0)[
                    tokens[level] - model.config.code_offsets[level]
                ]
                for level in range(4)
            ]
            scores.append(sum(parts))
        losses.append(-torch.stack(scores).log_softmax(dim=0)[0])
    expected = torch.stack(losses).sum() / (4 * sum(len(one) for one in items))  # one more code for each row
    torch.testing.assert_close(out.contrastive_loss, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.generation_loss, plain.generation_loss, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.ranking_loss, plain.ranking_loss, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, plain.loss + 0.3 * out.contrastive_loss, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("ids", [{"negatives_per_item": 1.5}, {**ATOMIC, "negatives_per_item": 1.5}])
def test_random_negatives_of_the_ranking_are_no_given_ones(ids):
    model = build_model(**ids)
    batch, _ = labeled(model, [4, 2])
    given = {"excluded_positives": torch.full((2, 1), -1)}
    if "code_negatives" in ids:  # among the sampled codes, without tokens of their own
        given["hard_negatives"] = torch.tensor([[1, 2], [3, -1]])
    with torch.no_grad():
        out, plain = model(**batch, **given), model(**batch)
    assert out.contrastive_loss is None
    torch.testing.assert_close(out.loss, plain.loss)


def test_a_favorite_is_no_random_candidate_of_the_ranking():
    model = build_model(negatives_per_item=20.0)
    batch, items = labeled(model, [4, 2])
    seen = watch_negatives(model)
    with torch.no_grad():
        model(**batch, excluded_positives=torch.tensor([[7, 8], [9, -1]]))
    negatives = seen["negatives"]
    for row, (favorites, own) in enumerate(zip(([7, 8], [9]), items, strict=True)):
        used = negatives.items[row][negatives.usable[row]]
        assert not set(used.tolist()) & set(favorites) and len(used) > 10 * len(own) // 2
        assert set(negatives.items[row].tolist()) & set(favorites), "they were drawn"


def test_given_items_that_fit_nothing_are_refused():
    model = build_model()
    batch, _ = labeled(model, [3, 2])
    with pytest.raises(ValueError, match="one row a history"):
        model(**batch, hard_negatives=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="Expected integer hard_negatives"):
        model(**batch, hard_negatives=torch.tensor([[1.0], [2.0]]))
    with pytest.raises(ValueError, match="excluded_positives range from 1 to 30, outside"):
        model(**batch, excluded_positives=torch.tensor([[1], [30]]))
    packed = {name: torch.cat([one[:, -11:], one[:, -11:]], dim=1)[1:] for name, one in batch.items()}
    with pytest.raises(ValueError, match="2 histories"):
        model(**packed, hard_negatives=torch.tensor([[1]]))
    square = torch.ones(1, 1, 16, 16).tril().bool().expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="candidates out"):
        model(**{**batch, "attention_mask": square}, hard_negatives=torch.tensor([[1], [2]]))


class Arguments:
    world_size, process_index, disable_tqdm = 1, 0, True

    def __init__(self, output_dir):
        self.output_dir = output_dir


@pytest.mark.parametrize("reader", ["llama", "hstu"])
@pytest.mark.parametrize(("pool", "ids"), [("uniform", ATOMIC), ("beam", ATOMIC), ("beam", {})])
def test_pools_hold_the_items_that_retrieval_likes_and_ranking_does_not(tmp_path, pool, ids, reader):
    model = build_model(reader, **ids)
    enhancer = build_enhancer(model, reader == "hstu", pool=pool, penalty=0.7)
    pools = []
    original = enhancer._choose
    enhancer._choose = lambda *args: pools.append(args) or original(*args)
    enhancer._refresh(Arguments(tmp_path), 1)
    earlier = enhancer.negatives.clone()
    enhancer._refresh(Arguments(tmp_path), 2)
    like = model.config.ranking_targets.index("like")
    for users, pool_items, retrieval, ranking, usable in pools[-1:]:
        for row, user in enumerate(users.tolist()):
            items = pool_items[row][usable[row]]
            assert len(items.unique()) == len(items) >= 3
            if pool == "uniform":
                assert set(earlier[user].tolist()) - {-1} <= set(items.tolist()), (
                    "the hard negatives before stay in it"
                )
            assert not set(items.tolist()) & set(enhancer.items[user]), "nothing that the user had"
            before = [np.array(column[user][:-1], dtype=int) for column in (enhancer.items, enhancer.behaviors)]
            history = {"input_ids": torch.tensor(enhancer.tokenizer.encode_indices(*before))[None]}
            if reader == "hstu":
                times = enhancer.timestamps[user]
                history["timestamps"] = torch.tensor(enhancer.tokenizer.encode_times(times[:-1]))[None]
                history["query_time"] = torch.tensor(times[-1:])
            expected = model.rank(**history, candidates=items[None])[0, :, like].sigmoid()
            torch.testing.assert_close(ranking[row][usable[row]], expected, atol=2e-5, rtol=1e-4)
            found = model.recommend(
                **history, num_beams=model.catalog.num_items, num_return_sequences=model.catalog.num_items
            )
            log_probs = torch.zeros(model.catalog.num_items)
            log_probs[found.item_indices[0]] = found.generation_scores[0]
            torch.testing.assert_close(retrieval[row][usable[row]], log_probs[items], atol=2e-5, rtol=1e-4)
            scores = log_probs[items]
            rho = (scores - scores.min()) / (scores.max() - scores.min()) - 0.7 * expected
            liked = expected > 0.6
            order = rho.masked_fill(liked, -torch.inf).argsort(descending=True)[: min(3, int((~liked).sum()))]
            assert set(items[order].tolist()) == {one for one in enhancer.negatives[user].tolist() if one >= 0}
            best = items[expected.masked_fill(~liked, -1).argsort(descending=True)[: min(2, int(liked.sum()))]]
            assert best.tolist() == [one for one in enhancer.favorites[user].tolist() if one >= 0]
    lines = [json.loads(line) for line in (tmp_path / "enhancer.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(title.startswith("Film ") for title in lines[0]["examples"][0]["disliked"])
    assert enhancer.found["enhancer_negatives"] == pytest.approx((enhancer.negatives >= 0).sum() / 6)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("sampling", [{"code_negatives": 0}, {}, {"share_code_negatives": False}], ids=str)
def test_logits_are_float32_in_a_training_in_bfloat16(similarity, sampling):
    model = build_model(**{**ATOMIC, "code_similarity": similarity, **sampling}).train()
    states = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    batch, items = labeled(model, [2, 2])
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    given = torch.tensor([[7, 8, 9], [1, 2, 3]])
    ends, last = torch.tensor([1, 1]), torch.tensor([row[-1] for row in items])
    known = training_unigrf.GivenItems(given, given + 10, ends, last)
    states = states[:, : targets.shape[1]]
    torch.manual_seed(0)
    expected = training_unigrf.generation_loss(model, states, targets, known)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = training_unigrf.generation_loss(model, states, targets, known)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_workers_that_persist_see_later_pools(tmp_path):
    enhancer = build_enhancer(build_model(**ATOMIC))
    rows = enhancer_rows(enhancer).to_list()
    collate = enhancer.collator(DataCollatorForSeq2Seq(enhancer.tokenizer))
    # Spawned, as on macOS and Windows: a worker is handed the collator, and does not find it in memory.
    loader = DataLoader(
        rows, 4, collate_fn=collate, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    assert all("hard_negatives" not in batch for batch in loader)
    enhancer._refresh(Arguments(tmp_path), 1)
    found = torch.cat([batch["hard_negatives"] for batch in loader])
    assert torch.equal(found, enhancer.negatives)


@pytest.mark.parametrize(
    ("ids", "options"), [(ATOMIC, {}), (ATOMIC, {"relabel": True}), ({}, {"pool": "beam"})], ids=str
)
def test_a_resumed_run_with_the_enhancer_equals_an_uninterrupted_one(tmp_path, ids, options):
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
    assert torch.equal(enhancer.negatives, again.negatives) and torch.equal(enhancer.favorites, again.favorites)
    assert (enhancer.negatives >= 0).any()
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="Resume one that had it, in its own output_dir"):
        train("elsewhere", resume=str(tmp_path / "parts" / "checkpoint-5"))


def test_relabelling_adds_a_favorite_as_the_next_item_of_the_last_row_only():
    model = build_model()
    enhancer = build_enhancer(model, pool="beam", relabel=True)
    enhancer.favorites[1] = torch.tensor([4, -1])
    rows = [{**enhancer_rows(enhancer)[1], "last": last} for last in (True, False)] + [enhancer_rows(enhancer)[2]]
    batch = enhancer.collator(collate)(rows)
    tokens = model.layout.item_tokens(model.catalog.item_codes[4].long())
    length = len(rows[0]["input_ids"])
    assert torch.equal(batch["input_ids"][0, length:], tokens) and torch.equal(batch["labels"][0, length:], tokens)
    assert (batch["labels"][1:, length:] == -100).all() and (batch["attention_mask"][1:, length:] == 0).all()
    assert model(**batch).loss.isfinite()
    timed = [{**row, "timestamps": [9] * len(row["input_ids"])} for row in rows]
    batch = enhancer.collator(DataCollatorForSeq2Seq(enhancer.tokenizer))(timed)
    assert batch["timestamps"][0].tolist() == [9] * length + [-1] * len(tokens), "it comes nobody knows when"


def test_what_the_enhancer_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match="1 <= num_negatives <= pool_size"):
        build_enhancer(build_model(**ATOMIC), num_negatives=13)
    with pytest.raises(ValueError, match="pool 'beam'"):
        build_enhancer(build_model(), pool="uniform")
    with pytest.raises(ValueError, match="a target among"):
        build_enhancer(build_model(**ATOMIC), target="love")
    with pytest.raises(ValueError, match="more epochs than the 1 of the enhancer's warm-up, found 1"):
        build_enhancer(build_model(**ATOMIC)).on_train_begin(
            Arguments(tmp_path), TrainerState(num_train_epochs=1), None
        )
    small = build_enhancer(build_model(**{**ATOMIC, "codebook_sizes": (10,), "num_items": 10}), pool_size=40)
    small.items = [list(range(8)) for _ in small.items]  # two items are left, and nobody's pool can hold three
    small.behaviors = [[0] * 8 for _ in small.items]
    with pytest.raises(ValueError, match="pools of at least 3 items"):
        small._refresh(Arguments(tmp_path), 1)
    small.items[0], small.behaviors[0] = [0], [1]  # but this user's can
    small.options.threshold = 1.0
    small._refresh(Arguments(tmp_path), 1)
    assert (small.negatives >= 0).sum(dim=1).tolist() == [3] + [2] * 5, "the others get what there is"
    assert small.found["enhancer_short_pools"] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="max_items below"):
        build_enhancer(build_model("hstu", **ATOMIC), relabel=True)
    enhancer = build_enhancer(build_model(**ATOMIC))
    with torch.no_grad():
        enhancer.model.ranking_head.out_proj.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="The training diverged"):
        enhancer._refresh(Arguments(tmp_path), 1)

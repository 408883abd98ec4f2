"""The losses of a forward with labels, against their definitions."""

import logging

import numpy as np
import pytest
import torch
from helpers import build_model, forward_with_negatives, labeled_batch, random_histories, short_id

from modeling_unigrf import loss_unigrf
from recipes.training.adaptive_weighter import AdaptiveWeighter


def test_the_loss_is_the_log_likelihood_of_codes_and_behaviors(backbone):
    """Compare with a loop over positions, with padding on either side."""
    model = build_model(backbone, dense_loss_weight=0.7)
    input_ids, mask, items = random_histories(model, [4, 2])
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(input_ids=input_ids, attention_mask=mask, labels=labels)
    code_losses = []
    rank_losses = []
    item_losses = []
    like = model.config.behavior_token_ids[1]
    for row in range(2):
        tokens = input_ids[row][mask[row].bool()]
        with torch.no_grad():
            hidden = model.model(tokens[None]).last_hidden_state[0]
        logits = model.lm_head(hidden)
        for position, target in enumerate(tokens[1:].tolist()):
            level = position % 5
            if level < 4:
                scores = logits[position, model.layout.level_slices[level]].log_softmax(dim=-1)
                code_losses.append(-scores[target - model.config.code_offsets[level]])
            else:
                item = torch.tensor(items[row][position // 5])
                scores = model.ranking_head(hidden[position], hidden[position - 4], model.scorer.representations(item))
                for name, score in zip(model.config.ranking_targets, scores, strict=True):
                    label = {"next": True, "like": target == like, "dislike": target != like}[name]
                    rank_losses.append(-torch.nn.functional.logsigmoid(score if label else -score))
                vectors = model.scorer.representations(torch.arange(30))
                item_losses.append(
                    -model.ranking_head.dense_scores(hidden[position - 4], vectors).log_softmax(0)[item]
                )
    torch.testing.assert_close(out.generation_loss, torch.stack(code_losses).mean(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.ranking_loss, torch.stack(rank_losses).mean(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.dense_loss, torch.stack(item_losses).mean(), atol=2e-5, rtol=1e-4)
    expected = out.generation_loss + out.ranking_loss + 0.7 * out.dense_loss
    torch.testing.assert_close(out.loss, expected, atol=2e-5, rtol=1e-4)
    right = torch.stack([torch.cat([ids[m.bool()], ids[~m.bool()]]) for ids, m in zip(input_ids, mask, strict=True)])
    with torch.no_grad():
        padded = model(input_ids=right, attention_mask=(right != 0).long(), labels=right.masked_fill(right == 0, -100))
    torch.testing.assert_close(padded.loss, out.loss, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("place", "reader", "fields"),
    [
        ("embedding_dropout", "llama", {"embedding_dropout": 0.5}),
        ("embedding_dropout", "llama", {"embedding_dropout": 0.5, "history_item_representations": True}),
        ("ranking_head.dropout", "llama", {"ranking_dropout": 0.5}),
        ("ranking_head.dropout", "llama", {"ranking_dropout": 0.5, "embeddings": False}),
        ("model.language_model.dropout", "hstu", {}),
        ("model.language_model.layers.1.dropout", "hstu", {}),
    ],
    ids=short_id,
)
@torch.no_grad()
def test_dropout_acts_only_in_training(place, reader, fields):
    model = build_model(reader, **fields)
    input_ids, mask, _ = random_histories(model, [4, 2])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and name != place:
            module.p = 0.0
    expected = model(**batch).loss
    assert model(**batch).loss == expected
    losses = [model.train()(**batch).loss for _ in range(2)]
    assert losses[0] != losses[1]
    if place == "embedding_dropout":
        model.config.embedding_dropout = 0.0
    else:
        model.get_submodule(place).p = 0.0
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_negatives_are_scored_as_by_rank(backbone, attention):
    model = build_model(backbone, negatives_per_item=2.5)
    if backbone == "hstu" and attention == "sdpa":
        pytest.skip("HSTU has an attention of its own")
    model.set_attn_implementation(attention)
    batch, items = labeled_batch(model, [4, 2, 1])
    model.train()(**batch)  # stores the sampling bias
    model.eval()
    with torch.no_grad():
        with_negatives, negatives = forward_with_negatives(model, batch)
        model.config.training_config.negatives_per_item = 0.0
        without = model(**batch)
        model.config.training_config.negatives_per_item = 2.5
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(with_negatives.logits[real], without.logits[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(with_negatives.generation_loss, without.generation_loss, atol=2e-5, rtol=1e-4)
    expected = []
    for row, end, item in negatives.ranked:
        visible = real[row] & (torch.arange(real.shape[1]) <= end)
        prefix = batch["input_ids"][row][visible]
        assert prefix[0] == model.config.bos_token_id and (len(prefix) - 1) % 5 == 0
        assert item != items[row][len(prefix) // 5], "a negative is never the item that came next"
        expected.append(model.rank(prefix[None], candidates=torch.tensor([[item]]))[0, 0])
    # `rank` corrects for the 2.5 sampled negatives an item.
    prior = torch.tensor([model.config.next_logit_bias, 0.0, 0.0])
    assert model.config.next_logit_bias == pytest.approx(np.log(29 / 2.5))
    torch.testing.assert_close(negatives.logits - prior, torch.stack(expected), atol=2e-5, rtol=1e-4)


def test_random_negatives_follow_every_history_equally_often():
    model = build_model(codebook_sizes=(30,), negatives_per_item=200.0)
    batch, items = labeled_batch(model, [4, 1])
    _, negatives = forward_with_negatives(model, batch)
    for row, row_items in enumerate(items):
        ends, counts = torch.tensor([end for r, end, _ in negatives.ranked if r == row]).unique(return_counts=True)
        assert ends.tolist() == list(range(8 - 2 * len(row_items), 8, 2)), "<bos>, and all behaviors but the last"
        # Draws that hit the item that came next do not count.
        assert counts.sum() == pytest.approx(200 * 29 / 30 * len(row_items), rel=0.05)
        assert counts.tolist() == pytest.approx([200 * 29 / 30] * len(row_items), rel=0.2)
    assert negatives.items.flatten().bincount(minlength=30).min() > 20, "of all items"


def test_training_only_the_ranking_computes_no_code_softmax():
    model = build_model(generation_loss_weight=0.0)
    batch, _ = labeled_batch(model, [4, 2])
    out = model.train()(**batch)
    out.loss.backward()
    assert model.lm_head.weight.grad is None
    assert out.generation_loss is None and out.logits is None and torch.allclose(out.loss, out.ranking_loss)
    torch.testing.assert_close(out.ranking_loss, build_model()(**batch).ranking_loss)


@pytest.mark.parametrize("second_stage", [False, True])
def test_training_only_retrieval_packs_and_ranks_no_candidates(second_stage):
    config = {"num_retrieved_items": 3, "num_train_beams": 4} if second_stage else {"negatives_per_item": 2.0}
    model = build_model(ranking_loss_weight=0.0, **config)
    batch, _ = labeled_batch(model, [4, 2])
    if second_stage:
        empty = batch["input_ids"][:, :0]
        batch["long_history"] = {"items": empty, "behaviors": empty}
    lengths = []
    ranked = []
    model.model.register_forward_hook(lambda *call: lengths.append(call[-1].last_hidden_state.shape[1]))
    model.ranking_head.register_forward_hook(lambda *call: ranked.append(call))
    out = model.train()(**batch)
    assert lengths == [batch["input_ids"].shape[1]] and not ranked, "a single forward, of the histories alone"
    assert out.ranking_loss is None and torch.allclose(out.loss, out.generation_loss)
    torch.testing.assert_close(out.generation_loss, build_model(**config)(**batch).generation_loss)
    with pytest.raises(ValueError, match="must not be 0 with adaptive weights"):
        AdaptiveWeighter().on_train_begin(None, None, None, model=model)


def test_ranking_without_negatives_logs_a_warning(caplog):
    logging.Logger.warning_once.cache_clear()  # it remembers the messages of other tests
    for config, is_warned in (({"negatives_per_item": 1.0}, False), ({"ranking_loss_weight": 0.0}, False), ({}, True)):
        model = build_model(**config)
        batch, _ = labeled_batch(model, [3, 3])
        model(**batch)
        assert not caplog.messages, "no warning in evaluation"
        model.train()(**batch)
        assert bool(caplog.messages) == is_warned
    assert "sees no item that did not come next" in caplog.text


def test_training_on_items_outside_the_catalog_is_rejected():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3])
    codes = torch.roll(model.catalog.item_codes, 1, dims=1) % torch.tensor([4, 3, 3, 2])
    model.set_catalog(torch.cat([codes[:0], model.catalog.item_codes[:1]]), torch.zeros(1, 6))
    with pytest.raises(ValueError, match=r"must supervise items of the catalog, got \d others"):
        model(input_ids=input_ids, attention_mask=mask, labels=input_ids)


def test_negatives_need_a_plain_mask():
    model = build_model(negatives_per_item=0.5)
    input_ids, _, _ = random_histories(model, [3])
    square = torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1]).tril().bool()
    with pytest.raises(ValueError, match="set negatives_per_item=0 in training_config"):
        model(input_ids=input_ids, attention_mask=square, labels=input_ids)


def test_labels_without_any_loss_are_rejected():
    model = build_model(generation_loss_weight=0.0, ranking_loss_weight=0.0)
    input_ids, mask, _ = random_histories(model, [4, 2])
    with pytest.raises(ValueError, match="must be positive, got 0 for all of them"):
        model(input_ids, mask, labels=input_ids)
    model = build_model()
    whole = model(input_ids, mask, labels=input_ids)
    last = model(input_ids, mask, labels=input_ids, logits_to_keep=1)
    torch.testing.assert_close(last.logits, whole.logits[:, -1:])
    torch.testing.assert_close(last.loss, whole.loss)
    with pytest.raises(ValueError, match="Keep the <bos>"):
        model(input_ids[:1, 4:], labels=input_ids[:1, 4:])  # cut inside an item


def test_packed_histories_are_read_as_if_each_were_alone(backbone):
    model = build_model(backbone)
    input_ids, mask, _ = random_histories(model, [4, 2, 3])
    rows = [ids[m.bool()] for ids, m in zip(input_ids, mask, strict=True)]
    packed = torch.nn.functional.pad(torch.cat(rows), (2, 3))[None]
    seen = (packed != 0).long()
    with torch.no_grad():
        out = model(input_ids=packed, attention_mask=seen, labels=packed.masked_fill(seen == 0, -100))
        apart = torch.cat([model(row[None]).logits[0] for row in rows])
        losses = [model(row[None], labels=row[None]) for row in rows]
    torch.testing.assert_close(out.logits[0, 2:-3], apart, atol=2e-5, rtol=1e-4)
    shares = torch.tensor([4.0, 2.0, 3.0]) / 9
    expected = (torch.stack([loss.loss for loss in losses]) * shares).sum()
    torch.testing.assert_close(out.loss, expected, atol=2e-5, rtol=1e-4)


def test_only_retrieval_is_limited_to_retrieval_behaviors(backbone):
    plain, chosen = (
        build_model(backbone, dense_loss_weight=0.7, retrieval_behaviors=only) for only in (None, ["like"])
    )
    input_ids, mask, _ = random_histories(plain, [5, 3], seed=2)
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out, whole = (model(input_ids, mask, labels=labels) for model in (chosen, plain))
        disliked = (input_ids == plain.config.behavior_token_ids[0]).nonzero()
        assert 0 < len(disliked) < 8
        for row, place in disliked.tolist():
            labels[row, place - plain.config.num_levels : place + 1] = -100
        expected = plain(input_ids, mask, labels=labels)
    share = 1 - len(disliked) / 8
    torch.testing.assert_close(out.generation_loss, share * expected.generation_loss)
    torch.testing.assert_close(out.dense_loss, share * expected.dense_loss)
    torch.testing.assert_close(out.ranking_loss, whole.ranking_loss)
    assert (out.generation_loss - whole.generation_loss).abs() > 1e-3
    labels = input_ids.masked_fill(plain.layout.token_levels(input_ids) < 0, -100)  # no behavior is labeled
    for model in (plain, chosen):
        torch.testing.assert_close(model(input_ids, mask, labels=labels).generation_loss, whole.generation_loss)


def test_the_sampled_softmax_loss_approaches_the_full_one(monkeypatch):
    torch.manual_seed(0)
    states = torch.randn(50, 8)
    vectors = torch.randn(400, 8)
    items = torch.randint(400, (50,))
    known = torch.arange(400)
    full = loss_unigrf.sampled_softmax_loss(states, items, vectors.__getitem__, known)
    monkeypatch.setattr(loss_unigrf, "MAX_SOFTMAX_ITEMS", 300)
    sampled = [loss_unigrf.sampled_softmax_loss(states, items, vectors.__getitem__, known) for _ in range(200)]
    torch.testing.assert_close(torch.stack(sampled).mean(), full, atol=0.02, rtol=0.01)


def test_a_row_that_begins_with_a_supervised_item_is_rejected():
    model = build_model()
    input_ids, _, _ = random_histories(model, [3])
    with pytest.raises(ValueError, match="Keep the <bos>"):
        model(input_ids=input_ids[:, 1:], labels=input_ids[:, 1:])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_sampled_codes_are_a_softmax_over_the_code_and_the_draws(similarity):
    model = build_model(
        codebook_sizes=(40, 3), num_items=90, code_similarity=similarity, code_temperature=0.5, code_negatives=7
    )
    batch, _ = labeled_batch(model, [5, 2])
    torch.manual_seed(5)
    out = model.train()(**batch)
    assert out.logits is None and out.loss.isfinite()
    model.eval()
    torch.manual_seed(5)
    logits = model(**batch).logits
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    levels = model.layout.token_levels(targets)
    of_first_level = (levels == 0).nonzero()
    drawn = (model.config.code_offsets[0] + torch.randint(40, (7,))).tolist()
    losses = []
    for row, column in of_first_level.tolist():
        true = int(targets[row, column])
        alternatives = [true, *(code for code in drawn if code != true)]
        losses.append(-logits[row, column, alternatives].log_softmax(dim=0)[0])
    for row, column in (levels == 1).nonzero().tolist():  # a level of three codes is not sampled
        codes = model.layout.level_slices[1]
        losses.append(-logits[row, column, codes].log_softmax(dim=0)[targets[row, column] - codes.start])
    torch.testing.assert_close(out.generation_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)

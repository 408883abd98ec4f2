"""The losses of a batch with labels against their definitions: what is learned from, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import build_model, random_histories, watch_negatives

from modeling_unigrf import supervision_unigrf, training_unigrf
from recipes.training.adaptive_weighter import AdaptiveWeighter


def test_the_loss_is_the_exact_log_likelihood_of_codes_and_behaviors(backbone):
    """Against a loop over positions, with padding on either side."""
    model = build_model(backbone, dense_loss_weight=0.7)
    input_ids, mask, items = random_histories(model, [4, 2])
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(input_ids=input_ids, attention_mask=mask, labels=labels)
    code_losses, rank_losses, item_losses = [], [], []
    like = model.config.behavior_token_ids[1]
    for row in range(2):
        tokens = input_ids[row][mask[row].bool()]
        with torch.no_grad():
            hidden = model.model(tokens[None]).last_hidden_state[0]
        logits = model.lm_head(hidden)
        for position, target in enumerate(tokens[1:].tolist()):
            level = position % 5
            if level < 4:
                scores = logits[position, model.layout.level_slice(level)].log_softmax(dim=-1)
                code_losses.append(-scores[target - model.config.code_offsets[level]])
            else:
                item = torch.tensor(items[row][position // 5])
                scores = model.ranking_head(hidden[position], hidden[position - 4], model.item_representations(item))
                for name, score in zip(model.config.ranking_targets, scores, strict=True):
                    label = {"next": True, "like": target == like, "dislike": target != like}[name]
                    rank_losses.append(-torch.nn.functional.logsigmoid(score if label else -score))
                vectors = model.item_representations(torch.arange(30))
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
)
@torch.no_grad()
def test_dropout_is_drawn_in_training_alone(place, reader, fields):
    model = build_model(reader, **fields)
    input_ids, mask, _ = random_histories(model, [4, 2])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and name != place:
            module.p = 0.0
    kept = model(**batch).loss
    assert model(**batch).loss == kept
    drawn = [model.train()(**batch).loss for _ in range(2)]
    assert drawn[0] != drawn[1]
    if place == "embedding_dropout":
        model.config.embedding_dropout = 0.0
    else:
        model.get_submodule(place).p = 0.0
    torch.testing.assert_close(model(**batch).loss, kept)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_negatives_are_ranked_as_rank_would_and_change_nothing_else(backbone, attention):
    model = build_model(backbone, negatives_per_item=2.5)
    if backbone == "hstu" and attention == "sdpa":
        pytest.skip("HSTU attends in a way of its own")
    model.set_attn_implementation(attention)
    input_ids, mask, items = random_histories(model, [4, 2, 1])
    labels = input_ids.masked_fill(mask == 0, -100)
    seen = watch_negatives(model)
    with torch.no_grad():
        with_negatives = model(input_ids=input_ids, attention_mask=mask, labels=labels)
        negatives, scores = seen["negatives"], seen["calls"][1]
        model.config.negatives_per_item = 0.0
        without = model(input_ids=input_ids, attention_mask=mask, labels=labels)
        model.config.negatives_per_item = 2.5
    real = mask.bool()
    torch.testing.assert_close(with_negatives.logits[real], without.logits[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(with_negatives.generation_loss, without.generation_loss, atol=2e-5, rtol=1e-4)
    length, found = input_ids.shape[1], []
    for row, column in negatives.usable.nonzero().tolist():
        visible = negatives.attention_mask[row, 4 * column, :length]
        item = negatives.items[row, column]
        assert int(item) != items[row][int(visible.sum() - 1) // 5], "a negative is never the item that came next"
        prefix = input_ids[row][visible]
        assert prefix[0] == model.config.bos_token_id and (len(prefix) - 1) % 5 == 0
        found.append(model.rank(prefix[None], candidates=item.view(1, 1))[0, 0])
    # `rank` speaks of all items, training of 2.5 an item.
    prior = torch.tensor([model.config.next_logit_bias, 0.0, 0.0])
    assert model.config.next_logit_bias == pytest.approx(np.log(29 / 2.5))
    torch.testing.assert_close(scores - prior, torch.stack(found), atol=2e-5, rtol=1e-4)


def test_random_negatives_are_as_many_and_where_the_log_odds_of_next_say():
    model = build_model(codebook_sizes=(30,), negatives_per_item=200.0)
    input_ids, mask, items = random_histories(model, [4, 1])
    seen = watch_negatives(model)
    model(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100))
    negatives = seen["negatives"]
    for row, own in enumerate(items):
        ends, counts = negatives.history_ends[row][negatives.usable[row]].unique(return_counts=True)
        assert ends.tolist() == list(range(8 - 2 * len(own), 8, 2)), "<bos>, and all behaviors but the last"
        # But for the draws that hit the item that came next.
        assert counts.sum() == pytest.approx(200 * 29 / 30 * len(own), rel=0.05)
        assert counts.tolist() == pytest.approx([200 * 29 / 30] * len(own), rel=0.2)
    assert negatives.items.flatten().bincount(minlength=30).min() > 20, "of all items"


def test_a_ranker_alone_computes_no_softmax_of_codes(monkeypatch):
    model, joint = build_model(generation_loss_weight=0.0), build_model()
    input_ids, mask, _ = random_histories(model, [4, 2])
    labels = input_ids.masked_fill(mask == 0, -100)
    expected = joint(input_ids, mask, labels=labels).ranking_loss
    monkeypatch.setattr(model, "code_logits", None)
    out = model.train()(input_ids, mask, labels=labels)
    assert out.generation_loss is None and torch.allclose(out.loss, out.ranking_loss)
    torch.testing.assert_close(out.ranking_loss, expected)


@pytest.mark.parametrize("second_stage", [False, True])
def test_a_retriever_alone_neither_packs_candidates_nor_ranks_them(second_stage, monkeypatch):
    config = {"num_retrieved_items": 3, "num_train_beams": 4} if second_stage else {"negatives_per_item": 2.0}
    model, joint = build_model(ranking_loss_weight=0.0, **config), build_model(**config)
    input_ids, mask, _ = random_histories(model, [4, 2])
    labels = input_ids.masked_fill(mask == 0, -100)
    longer = {"long_items": input_ids[:, :0], "long_behaviors": input_ids[:, :0]} if second_stage else {}
    expected = joint(input_ids, mask, labels=labels, **longer).generation_loss
    monkeypatch.setattr(model.ranking_head, "forward", None)
    monkeypatch.setattr(model, "_search_items", None)
    out = model.train()(input_ids, mask, labels=labels, **longer)
    assert out.ranking_loss is None and torch.allclose(out.loss, out.generation_loss)
    torch.testing.assert_close(out.generation_loss, expected)
    with pytest.raises(ValueError, match="Expected two losses to weigh"):
        AdaptiveWeighter().on_train_begin(None, None, None, model=model)


def test_a_ranking_that_sees_no_item_that_did_not_come_next_is_warned_of(monkeypatch):
    told = []
    monkeypatch.setattr(supervision_unigrf.logger, "warning_once", told.append)
    for changed, is_warned in (
        ({"negatives_per_item": 1.0}, False),
        ({"ranking_loss_weight": 0.0}, False),
        ({}, True),
    ):
        model = build_model(**changed)
        input_ids, mask, _ = random_histories(model, [3, 3])
        model(input_ids, mask, labels=input_ids)
        assert not told, "nothing is trained"
        model.train()(input_ids, mask, labels=input_ids)
        assert bool(told) == is_warned
    assert "items that came next alone" in told[0]


def test_training_on_items_outside_the_catalog_is_refused():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3])
    codes = torch.roll(model.catalog.item_codes, 1, dims=1) % torch.tensor([4, 3, 3, 2])
    model.set_catalog(torch.cat([codes[:0], model.catalog.item_codes[:1]]), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="not in the model's catalog"):
        model(input_ids=input_ids, attention_mask=mask, labels=input_ids)


def test_negatives_need_a_plain_mask():
    model = build_model(negatives_per_item=0.5)
    input_ids, _, _ = random_histories(model, [3])
    square = torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1]).tril().bool()
    with pytest.raises(ValueError, match="negatives_per_item = 0"):
        model(input_ids=input_ids, attention_mask=square, labels=input_ids)


def test_what_the_labels_are_for_is_asked_for():
    model = build_model(generation_loss_weight=0.0, ranking_loss_weight=0.0)
    input_ids, mask, _ = random_histories(model, [4, 2])
    with pytest.raises(ValueError, match="nothing to learn"):
        model(input_ids, mask, labels=input_ids)
    model = build_model()
    whole = model(input_ids, mask, labels=input_ids)
    last = model(input_ids, mask, labels=input_ids, logits_to_keep=1)
    torch.testing.assert_close(last.logits, whole.logits[:, -1:])
    torch.testing.assert_close(last.loss, whole.loss)
    with pytest.raises(ValueError, match="Keep the <bos>"):
        model(input_ids[:1, 4:], labels=input_ids[:1, 4:])  # cut inside an item


def test_histories_packed_in_one_row_are_read_as_if_each_were_alone(backbone):
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


def test_retrieval_learns_the_items_with_its_behaviors_alone_and_ranking_all(backbone):
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
    labels = input_ids.masked_fill(plain.layout.token_levels(input_ids) < 0, -100)  # no item's behavior is known
    for model in (plain, chosen):
        torch.testing.assert_close(model(input_ids, mask, labels=labels).generation_loss, whole.generation_loss)


def test_a_sampled_softmax_over_items_approaches_the_full_one(monkeypatch):
    torch.manual_seed(0)
    states, vectors, items = torch.randn(50, 8), torch.randn(400, 8), torch.randint(400, (50,))
    full = training_unigrf.sampled_softmax_loss(states, items, vectors.__getitem__, 400)
    monkeypatch.setattr(training_unigrf, "MAX_SOFTMAX_ITEMS", 300)
    sampled = [training_unigrf.sampled_softmax_loss(states, items, vectors.__getitem__, 400) for _ in range(200)]
    torch.testing.assert_close(torch.stack(sampled).mean(), full, atol=0.02, rtol=0.01)


def test_a_row_that_begins_with_a_supervised_item_is_refused():
    model = build_model()
    input_ids, _, _ = random_histories(model, [3])
    with pytest.raises(ValueError, match="Keep the <bos>"):
        model(input_ids=input_ids[:, 1:], labels=input_ids[:, 1:])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("shared", [True, False])
def test_sampled_codes_are_a_softmax_over_the_code_and_the_draws_that_are_not_it(similarity, shared):
    model = build_model(
        codebook_sizes=(40, 3),
        num_items=90,
        code_similarity=similarity,
        code_temperature=0.5,
        code_negatives=7,
        share_code_negatives=shared,
    )
    input_ids, mask, _ = random_histories(model, [5, 2])
    states = model.model(input_ids, mask).last_hidden_state
    targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100).masked_fill(mask == 0, -100)
    torch.manual_seed(5)
    found = training_unigrf.generation_loss(model.train(), states, targets)
    model.eval()
    torch.manual_seed(5)
    logits, expected, count = model(input_ids, mask).logits, 0.0, 0
    levels = model.layout.token_levels(targets)
    here = (levels == 0).nonzero()
    drawn = torch.randint(40, (7,) if shared else (len(here), 7))
    for place, (row, column) in enumerate(here.tolist()):
        true = int(targets[row, column])
        draws = [
            true,
            *(model.config.code_offsets[0] + drawn if shared else model.config.code_offsets[0] + drawn[place]),
        ]
        kept = [draw for index, draw in enumerate(map(int, draws)) if index == 0 or draw != true]
        expected, count = expected - logits[row, column, kept].log_softmax(dim=0)[0], count + 1
    for row, column in (levels == 1).nonzero().tolist():  # three codes: all of them
        level = model.layout.level_slice(1)
        true = int(targets[row, column]) - level.start
        expected, count = expected - logits[row, column, level].log_softmax(dim=0)[true], count + 1
    torch.testing.assert_close(found, expected / count, atol=1e-5, rtol=1e-4)
    out = model.train()(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100))
    assert out.logits is None and out.loss.isfinite()
    assert model.eval()(input_ids, mask, labels=input_ids).logits is not None

"""Item sets of a forward with labels: hard negatives and excluded positives of each row (UniGRF's enhancer)."""

import pytest
import torch
from helpers import ATOMIC, build_model, forward_with_negatives, labeled_batch


@pytest.mark.parametrize("shared", [True, False, None])
def test_hard_negatives_and_excluded_positives_of_atomic_ids(shared):
    sampling = (
        {"code_negatives": 0, "given_negative_weight": 5.0} if shared is None else {"share_code_negatives": shared}
    )
    model = build_model(**{**ATOMIC, **sampling}).train()
    batch, items = labeled_batch(model, [4, 2])
    negatives = torch.tensor([[7, items[0][1], -1], [-1, -1, -1]])
    excluded_positives = torch.tensor([[3, -1], [5, 6]])
    torch.manual_seed(3)
    out = model(**batch, hard_negatives=negatives, excluded_positives=excluded_positives)
    torch.manual_seed(3)
    drawn = torch.randint(40, (12,) if shared else (6, 12))
    logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    codes = model.catalog.item_codes[:, 0].long()
    offset = model.config.code_offsets[0]
    losses = []
    place = 0
    for row, row_items in enumerate(items):
        first = batch["attention_mask"].shape[1] - int(batch["attention_mask"][row].sum())
        hard = [item for item in negatives[row].tolist() if item >= 0]
        excluded = codes[[item for item in excluded_positives[row].tolist() if item >= 0]].tolist()
        for position, item in enumerate(row_items):
            chosen = [*codes[[other for other in hard if other != item]].tolist()]
            if shared is None:
                random = [code for code in range(40) if code not in chosen]
                chosen *= 5
            else:
                random = (drawn if shared else drawn[place]).tolist()[len(hard) :]  # they replace the first ones
            chosen += [code for code in random if code != codes[item] and code not in excluded]
            scores = logits[row, first + 2 * position, torch.tensor([int(codes[item]), *chosen]) + offset]
            losses.append(-scores.log_softmax(dim=0)[0])
            place += 1
    torch.testing.assert_close(out.generation_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


def test_the_contrastive_loss_is_a_softmax_over_sequences(backbone):
    model = build_model(backbone, negatives_per_item=1.5, contrastive_loss_weight=0.3)
    batch, items = labeled_batch(model, [4, 2, 1])
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
    expected = torch.stack(losses).sum() / (4 * sum(len(row_items) for row_items in items))
    torch.testing.assert_close(out.contrastive_loss, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.generation_loss, plain.generation_loss, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.ranking_loss, plain.ranking_loss, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, plain.loss + 0.3 * out.contrastive_loss, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "ids", [{"negatives_per_item": 1.5}, {**ATOMIC, "negatives_per_item": 1.5}], ids=["semantic", "atomic"]
)
def test_random_negatives_do_not_change_with_hard_negatives(ids):
    model = build_model(**ids)
    batch, _ = labeled_batch(model, [4, 2])
    item_sets = {"excluded_positives": torch.full((2, 1), -1)}
    if "code_negatives" in ids:  # atomic ids have no packed tokens
        item_sets["hard_negatives"] = torch.tensor([[1, 2], [3, -1]])
    with torch.no_grad():
        out = model(**batch, **item_sets)
        plain = model(**batch)
    assert out.contrastive_loss is None
    torch.testing.assert_close(out.loss, plain.loss)


def test_an_excluded_positive_is_no_random_negative():
    model = build_model(negatives_per_item=20.0)
    batch, items = labeled_batch(model, [4, 2])
    batch["excluded_positives"] = torch.tensor([[7, 8], [9, -1]])
    _, negatives = forward_with_negatives(model, batch)
    for row, (excluded, row_items) in enumerate(zip(([7, 8], [9]), items, strict=True)):
        ranked = [item for ranked_row, _, item in negatives.ranked if ranked_row == row]
        assert not set(ranked) & set(excluded) and len(ranked) > 10 * len(row_items) // 2
        assert set(negatives.items[row].tolist()) & set(excluded), "some of the draws hit them"


def test_item_sets_that_do_not_fit_are_rejected():
    model = build_model()
    batch, _ = labeled_batch(model, [3, 2])
    with pytest.raises(ValueError, match="one row a history"):
        model(**batch, hard_negatives=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="Expected integer hard_negatives"):
        model(**batch, hard_negatives=torch.tensor([[1.0], [2.0]]))
    with pytest.raises(ValueError, match="excluded_positives range from 1 to 30, outside"):
        model(**batch, excluded_positives=torch.tensor([[1], [30]]))
    packed = {name: torch.cat([column[:, -11:], column[:, -11:]], dim=1)[1:] for name, column in batch.items()}
    with pytest.raises(ValueError, match="2 histories"):
        model(**packed, hard_negatives=torch.tensor([[1]]))
    square = torch.ones(1, 1, 16, 16).tril().bool().expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="candidates out"):
        model(**{**batch, "attention_mask": square}, hard_negatives=torch.tensor([[1], [2]]))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(
    "sampling", [{"code_negatives": 0}, {}, {"share_code_negatives": False}], ids=["whole", "shared", "unshared"]
)
def test_code_logits_are_float32_under_bfloat16_autocast(similarity, sampling):
    model = build_model(**{**ATOMIC, "code_similarity": similarity, **sampling}).train()
    batch, _ = labeled_batch(model, [2, 2])
    hard_negatives = torch.tensor([[7, 8, 9], [1, 2, 3]])
    batch |= {"hard_negatives": hard_negatives, "excluded_positives": hard_negatives + 10}
    states = torch.randn(*batch["input_ids"].shape, model.config.hidden_size)

    def replace_states(module, args, output):
        output.last_hidden_state = states
        return output

    model.model.register_forward_hook(replace_states)
    losses = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(model(**batch).generation_loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)

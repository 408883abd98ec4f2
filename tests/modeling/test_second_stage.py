"""RecoChain's stage II: the model learns to rank its own beams for the last item of each row."""

import pytest
import torch
from helpers import build_model, labeled_batch, long_histories, random_histories, run_trainer, second_stage_rows
from transformers import Trainer, TrainingArguments

from modeling_unigrf import UniGRFForCausalLM, candidates_unigrf
from modeling_unigrf.candidates_unigrf import with_targets
from recipes.training.collator import TrainingCollator

BEAMS = {"num_beams": 6, "num_return_sequences": 6, "ranking_weight": 0.0}
CANDIDATES = torch.tensor([[3, 29, -1, 7], [0, 1, 2, -1], [11, 12, 13, 14]])


def expected_ranking_loss(model, input_ids, mask, candidates, longer):
    """Compute the loss by `rank` on each history without its last item, as a mean of binary cross-entropies."""
    losses = {target: [] for target in model.config.ranking_targets}
    for row, (ids, row_mask) in enumerate(zip(input_ids, mask, strict=True)):
        ids = ids[row_mask.bool()]
        row_inputs = {name: value[row : row + 1] for name, value in longer.items()}
        target = model.catalog.trie.lookup(model.layout.history_codes(ids[None])[1][-1:])
        items = candidates[row][candidates[row] >= 0]
        logits = model.rank(ids[None, :-5], candidates=items[None], **row_inputs)[0]
        assert (items == target).sum() == 1
        losses["next"] += [
            -torch.nn.functional.logsigmoid(logit if item == target else -logit)
            for item, logit in zip(items, logits[:, 0], strict=True)
        ]
        for name, logit in zip(model.config.ranking_targets[1:], logits[items == target][0, 1:], strict=True):
            happened = int(ids[-1]) == model.config.behavior_token_ids[model.config.behaviors.index(name)]
            losses[name].append(-torch.nn.functional.logsigmoid(logit if happened else -logit))
    return torch.stack([torch.stack(values).mean() for values in losses.values()]).mean()


@pytest.mark.parametrize("retrieved", [0, 3])
@pytest.mark.parametrize("detach", [False, True])
def test_training_beams_equal_recommend_and_are_scored_by_rank(backbone, retrieved, detach):
    model = build_model(backbone, num_retrieved_items=retrieved, num_train_beams=6, stop_gradient_history=detach)
    input_ids, mask, items = random_histories(model, [4, 2, 1])
    longer = long_histories(model, [12, 2, 4]) if retrieved else {}
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(input_ids, mask, labels=labels, **longer)
    beams = torch.cat(
        [
            model.recommend(
                ids[row_mask.bool()][None, :-5],
                **BEAMS,
                **{name: value[row : row + 1] for name, value in longer.items()},
            ).item_indices
            for row, (ids, row_mask) in enumerate(zip(input_ids, mask, strict=True))
        ]
    )
    targets = torch.tensor([row[-1] for row in items])
    assert not (beams == targets[:, None]).any(dim=1).all(), "some target is missed and has to be injected"
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    expected = expected_ranking_loss(model, input_ids, mask, candidates, longer)
    torch.testing.assert_close(out.ranking_loss, expected, atol=3e-5, rtol=1e-4)
    stage_one = build_model(backbone)
    stage_one.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(out.generation_loss, stage_one(input_ids, mask, labels=labels).generation_loss)
    assert out.cache is None


def test_blocked_items_are_no_training_beams_but_the_target_is():
    model = build_model(num_retrieved_items=3, num_train_beams=6)
    input_ids, mask, items = random_histories(model, [4, 2, 1])
    longer = long_histories(model, [12, 2, 4])
    labels = input_ids.masked_fill(mask == 0, -100)
    targets = torch.tensor([row[-1] for row in items])
    first = model.recommend(input_ids[:, :-5], mask[:, :-5], **BEAMS, **longer).item_indices[:, :3]
    blocked = torch.cat([first, torch.tensor([[-1, -1], [-1, -1], [-1, -1]]), targets[:, None]], dim=1)
    with torch.no_grad():
        actual = model(input_ids, mask, labels=labels, blocked_items=blocked, **longer).ranking_loss
    lists = [row[row >= 0] for row in blocked]
    beams = model.recommend(input_ids[:, :-5], mask[:, :-5], blocked_items=lists, **BEAMS, **longer).item_indices
    assert not (beams == targets[:, None]).any()
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    expected = expected_ranking_loss(model, input_ids, mask, candidates, longer)
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)


def test_training_candidates_have_the_time_of_the_true_item():
    model = build_model("hstu", num_retrieved_items=3, num_train_beams=6)
    input_ids, mask, _ = random_histories(model, [4, 4, 4])
    longer = long_histories(model, [12, 2, 4])
    labels = input_ids.masked_fill(mask == 0, -100)
    events = torch.randint(1, 12, (3, 5), generator=torch.Generator().manual_seed(3)).cumsum(dim=1)
    times = events.repeat_interleave(5, dim=1)[:, 4:]  # the <bos> has a single token
    timed = {"timestamps": times[:, :-5], "query_time": times[:, -1]}
    with torch.no_grad():
        actual = model(input_ids, mask, labels=labels, timestamps=times, **longer).ranking_loss
    beams = model.recommend(input_ids[:, :-5], mask[:, :-5], **BEAMS, **timed, **longer).item_indices
    targets = model.catalog.trie.lookup(model.layout.history_codes(input_ids)[1].view(3, 4, -1)[:, -1])
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    expected = expected_ranking_loss(model, input_ids, mask, candidates, {**longer, **timed})
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    before = torch.arange(12).expand(3, -1) - 1
    with torch.no_grad():
        timed_output = model(
            input_ids, mask, labels=labels, timestamps=times, long_timestamps=before, candidates=beams, **longer
        )
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    histories = {**longer, **timed, "long_timestamps": before}
    expected_timed = expected_ranking_loss(model, input_ids, mask, candidates, histories)
    torch.testing.assert_close(timed_output.ranking_loss, expected_timed, atol=3e-5, rtol=1e-4)
    assert not torch.allclose(expected_timed, expected)
    timed["query_time"] = times[:, -1] + 10**6
    assert not torch.allclose(actual, expected_ranking_loss(model, input_ids, mask, candidates, {**longer, **timed}))


def test_an_injected_target_is_ranked_by_its_own_codes():
    """The replaced beam leaves neither codes nor keys and values behind."""
    model = build_model(num_retrieved_items=3)
    input_ids, mask, items = random_histories(model, [4, 2, 1])
    longer = long_histories(model, [12, 2, 4])
    labels = input_ids.masked_fill(mask == 0, -100)
    targets = torch.tensor([row[-1] for row in items])
    others = CANDIDATES.masked_fill(targets[:, None] == CANDIDATES, -1)
    with torch.no_grad():
        missed = model(input_ids, mask, labels=labels, candidates=others, **longer).ranking_loss
        injected = with_targets(others, targets, torch.Generator().manual_seed(0))
        actual = model(input_ids, mask, labels=labels, candidates=injected, **longer).ranking_loss
    torch.testing.assert_close(missed, actual)
    expected = expected_ranking_loss(model, input_ids, mask, injected, longer)
    torch.testing.assert_close(missed, expected, atol=3e-5, rtol=1e-4)


def test_a_missed_target_is_no_candidate_without_injection():
    model = build_model(num_train_beams=6, inject_target=False)
    input_ids, mask, _ = random_histories(model, [4, 4, 4])
    labels = input_ids.masked_fill(mask == 0, -100)
    beams = model.recommend(input_ids[:, :-5], mask[:, :-5], **BEAMS).item_indices
    targets = model.catalog.trie.lookup(model.layout.history_codes(input_ids)[1].view(3, 4, -1)[:, -1])
    candidates = torch.where(beams == targets[:, None], -1, beams)
    candidates[0, 0] = targets[0]
    with torch.no_grad():
        actual = model(input_ids, mask, labels=labels, candidates=candidates).ranking_loss
        logits = model.rank(input_ids[:, :-5], mask[:, :-5], candidates.clamp(min=0))
    happened = (candidates == targets[:, None])[candidates >= 0].float()
    of_next = torch.nn.functional.binary_cross_entropy_with_logits(logits[..., 0][candidates >= 0], happened)
    behavior = torch.tensor([float(int(input_ids[0, -1]) == token) for token in model.config.behavior_token_ids])
    of_behaviors = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, 0, 1:], behavior, reduction="none")
    torch.testing.assert_close(actual, torch.stack([of_next, *of_behaviors]).mean(), atol=3e-5, rtol=1e-4)


def test_packs_of_candidates_have_the_same_gradient(backbone, monkeypatch):
    gradients = []
    for at_once in (64, 3):
        monkeypatch.setattr(candidates_unigrf, "CANDIDATES_AT_ONCE", at_once)
        model = build_model(backbone, num_retrieved_items=3, num_train_beams=7)
        input_ids, mask, _ = random_histories(model, [4, 2])
        longer = long_histories(model, [12, 2])
        out = model(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100), **longer)
        out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("embeddings", "table"), [(True, 0), (False, 30), (True, 7), (False, 7)])
def test_either_part_of_an_item_representation_may_be_missing(embeddings, table, tmp_path):
    model = build_model(
        num_retrieved_items=3, num_train_beams=4, project_content_embeddings=embeddings, embedding_table_size=table
    )
    assert (model.item_encoder.proj is not None, model.item_encoder.table is not None) == (embeddings, table > 0)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer = long_histories(model, [12, 2])
    candidates = torch.tensor([[1, 2], [3, 4]])
    assert model(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100), **longer).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path)
    expected = model.rank(input_ids, mask, candidates, **longer)
    torch.testing.assert_close(loaded.rank(input_ids, mask, candidates, **longer), expected)
    if table == 7 and not embeddings:
        vectors = model.item_representations(torch.arange(30))
        assert torch.equal(vectors[8], vectors[1]) and torch.equal(
            vectors, model.item_encoder.table.weight[torch.arange(30) % 7]
        )


def test_a_missed_target_replaces_one_random_beam():
    beams = torch.arange(12).view(2, 6)
    targets = torch.tensor([20, 8])
    places = set()
    for seed in range(40):
        candidates = with_targets(beams, targets, torch.Generator().manual_seed(seed))
        assert torch.equal(candidates[1], beams[1]) and (candidates[0] != beams[0]).sum() == 1
        places.add(int((candidates[0] == 20).nonzero()[0]))
    assert places == set(range(6))


@pytest.mark.parametrize("detach", [False, True])
def test_stop_gradient_history_stops_the_ranking_gradient(backbone, detach):
    model = build_model(
        backbone, num_retrieved_items=3, num_train_beams=5, stop_gradient_history=detach, generation_loss_weight=0.0
    )
    input_ids, _, _ = random_histories(model, [4])
    inputs_embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    model(inputs_embeds=inputs_embeds, labels=input_ids, **long_histories(model, [12])).loss.backward()
    gradient = torch.zeros_like(inputs_embeds) if inputs_embeds.grad is None else inputs_embeds.grad
    history = gradient[:, :-5]
    answer = gradient[:, -5:]
    assert (answer == 0).all(), "the target is ranked as a candidate, not by the row's own tokens"
    assert bool((history == 0).all()) == detach
    assert model.candidate_block.segments.weight.grad.abs().sum(dim=1).min() > 0
    assert model.item_encoder.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_the_search_leaves_no_trace_in_the_gradient(backbone, autocast):
    """Autocast caches its casts of weights: a cast made without gradient would stay for the whole step."""
    gradients = []
    candidates = {}
    for beams in (5, 0):
        model = build_model(backbone, num_retrieved_items=3, num_train_beams=beams)
        batch, _ = labeled_batch(model, [4, 2])
        vectors = []
        model.ranking_head.register_forward_hook(lambda head, args, output, kept=vectors: kept.append(args[2]))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, **long_histories(model, [12, 2]), **candidates).loss
            known = model.item_representations(torch.arange(30)).float()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        # The candidates of the search, with the targets, as the ranking head reads them.
        candidates["candidates"] = torch.cdist(vectors[0].detach().float(), known.expand(2, -1, -1)).argmin(dim=2)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=lambda m, n=name: f"{n}: {m}")


def test_candidates_of_a_packed_row_see_only_the_last_history(backbone):
    model = build_model(backbone, num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [4, 2])
    rows = [ids[m.bool()] for ids, m in zip(input_ids, mask, strict=True)]
    packed = torch.nn.functional.pad(torch.cat(rows), (2, 3))[None]
    labels = packed.masked_fill(packed == 0, -100)
    packed_mask = (packed != 0).long()
    longer = long_histories(model, [12])
    candidates = CANDIDATES[:1]
    with torch.no_grad():
        together = model(packed, packed_mask, labels=labels, candidates=candidates, **longer)
        alone = model(rows[1][None], labels=rows[1][None], candidates=candidates, **longer)
    torch.testing.assert_close(together.ranking_loss, alone.ranking_loss, atol=3e-5, rtol=1e-4)


def test_a_row_without_a_supervised_item_has_no_candidates():
    model = build_model(num_retrieved_items=3, num_train_beams=4)
    input_ids, mask, items = random_histories(model, [4, 2, 3])
    labels = input_ids.masked_fill(mask == 0, -100)
    longer = long_histories(model, [12, 2, 5])
    labels[1] = -100
    kept = torch.tensor([0, 2])
    candidates = torch.tensor([[row[-1], 28, 29] for row in items])  # with the targets
    with torch.no_grad():
        actual = model(input_ids, mask, labels=labels, candidates=candidates, **longer)
        kept_histories = {name: value[kept] for name, value in longer.items()}
        expected = model(
            input_ids[kept], mask[kept], labels=labels[kept], candidates=candidates[kept], **kept_histories
        )
        assert model(input_ids, mask, labels=labels, **longer).loss.isfinite()
        unsupervised = model(input_ids, mask, labels=torch.full_like(labels, -100), **longer)
    torch.testing.assert_close(actual.loss, expected.loss, atol=2e-5, rtol=1e-4)
    assert unsupervised.ranking_loss == 0


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [4, 4, 1, 1]])
def test_candidates_are_accumulated_by_the_share_of_tokens(lengths):
    """The Trainer counts tokens: accumulation is exact for rows of equal length, else as documented in `forward`."""
    model = build_model(num_retrieved_items=3)
    input_ids, mask, items = random_histories(model, lengths)
    labels = input_ids.masked_fill((mask == 0) | (input_ids == model.config.bos_token_id), -100)
    others = torch.tensor([[(row[-1] + step) % 30 for step in (0, 3, 7)] for row in items])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "candidates": others}
    batch |= long_histories(model, [12, 2, 4, 6])
    tokens = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        whole = model(**batch)
        parts = []
        shares = []
        for part in (slice(0, 2), slice(2, 4)):
            parts.append(model(**{name: value[part] for name, value in batch.items()}, num_items_in_batch=tokens))
            shares.append(int((labels[part, 1:] != -100).sum()) / tokens)
    ranking = sum(share * part.ranking_loss for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.generation_loss + ranking)
    if lengths[0] == lengths[-1]:
        torch.testing.assert_close(ranking, whole.ranking_loss)


def test_training_candidates_that_do_not_fit_are_rejected():
    model = build_model(num_train_beams=4)
    input_ids, mask, _ = random_histories(model, [3, 2])
    labels = input_ids.masked_fill(mask == 0, -100)
    for items, message in (
        (torch.tensor([[1, 2]]), "integer {} of shape .* one row a history"),
        (torch.tensor([[1.0], [2.0]]), "integer {} of shape"),
        (torch.tensor([[1], [30]]), "{} range .* outside a catalog of 30"),
        (torch.tensor([[1], [-2]]), "{} range .* outside a catalog of 30"),
    ):
        for name in ("candidates", "blocked_items"):
            with pytest.raises(ValueError, match=message.format(name)):
                model(input_ids, mask, labels=labels, **{name: items})
    candidates = torch.tensor([[1], [2]])
    with pytest.raises(ValueError, match="Leave them out"):
        square = torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1]).tril().bool()
        model(input_ids, square, labels=labels, candidates=candidates)
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="without activation checkpointing"):
        model.train()(input_ids, mask, labels=labels, candidates=candidates)
    empty = torch.empty(2, 0, dtype=torch.long)
    assert build_model()(input_ids, mask, labels=labels, candidates=empty).ranking_loss.isfinite()


def test_stage_two_starts_from_stage_one_under_the_stock_trainer(tmp_path):
    first = build_model(negatives_per_item=1.0)
    first.save_pretrained(tmp_path / "one")
    fields = {"num_retrieved_items": 3, "num_train_beams": 6}
    with pytest.raises(ValueError, match="Set negatives_per_item=0"):
        UniGRFForCausalLM.from_pretrained(tmp_path / "one", **fields)
    model = UniGRFForCausalLM.from_pretrained(tmp_path / "one", negatives_per_item=0.0, **fields)
    for name, tensor in first.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert 0 < model.candidate_block.segments.weight.abs().max() < 0.2
    input_ids, mask, _ = random_histories(model, [4, 2, 1, 3])
    columns = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    columns |= long_histories(model, [12, 2, 1, 5])
    arguments = {"max_steps": 8, "learning_rate": 0.01, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, **arguments),
        train_dataset=[{name: value[row] for name, value in columns.items()} for row in range(4)],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate([{name: value[0] for name, value in columns.items()}])["eval_loss"] > 0


def test_a_frozen_base_model_only_learns_to_rank(tmp_path):
    model = build_model(num_retrieved_items=3, num_train_beams=6, dense_loss_weight=1.0, embedding_dropout=0.1)
    input_ids, mask, _ = random_histories(model, [4, 2, 1])
    options = {"num_beams": 30, "num_return_sequences": 30, "ranking_weight": 0.0, "num_dense_candidates": 5}
    options |= long_histories(model, [7, 0, 2])
    before = model.recommend(input_ids, mask, **options)
    model.freeze_base_model()
    losses = run_trainer(tmp_path, model, second_stage_rows(model), collator=TrainingCollator(), max_steps=8)
    assert losses[-1] != losses[0]
    after = model.eval().recommend(input_ids, mask, **options)
    for name in ("item_indices", "generation_scores", "dense_scores"):
        torch.testing.assert_close(after[name], before[name])
    assert not torch.isclose(after.ranking_scores, before.ranking_scores).any()

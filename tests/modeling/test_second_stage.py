"""RecoChain's second stage: the model learns to rank its own beams, the true item among them, for the last item of a row."""

import pytest
import torch
from helpers import build_model, long_histories, random_histories, run_trainer, second_stage_rows
from transformers import Trainer, TrainerState, TrainingArguments

from modeling_unigrf import UniGRFForCausalLM, candidates_unigrf
from modeling_unigrf.candidates_unigrf import with_targets
from recipes.training.cached_candidates import CachedCandidates
from recipes.training.collator import TrainingCollator

CANDIDATES = torch.tensor([[3, 29, -1, 7], [0, 1, 2, -1], [11, 12, 13, 14]])


def expected_ranking_loss(model, input_ids, mask, candidates, longer):
    """By `rank` on every row's history without its last item: binary cross-entropy for `next`, and for the behaviors."""
    losses = {target: [] for target in model.config.ranking_targets}
    for row, (ids, seen) in enumerate(zip(input_ids, mask, strict=True)):
        ids, own = ids[seen.bool()], {name: value[row : row + 1] for name, value in longer.items()}
        target = model.catalog.trie.lookup(model.layout.history_codes(ids[None])[1][-1:])
        items = candidates[row][candidates[row] >= 0]
        logits = model.rank(ids[None, :-5], candidates=items[None], **own)[0]
        assert (items == target).sum() == 1
        losses["next"] += [
            -torch.nn.functional.logsigmoid(logit if item == target else -logit)
            for item, logit in zip(items, logits[:, 0], strict=True)
        ]
        for name, logit in zip(model.config.ranking_targets[1:], logits[items == target][0, 1:], strict=True):
            happened = int(ids[-1]) == model.config.behavior_token_ids[model.config.behaviors.index(name)]
            losses[name].append(-torch.nn.functional.logsigmoid(logit if happened else -logit))
    return torch.stack([torch.stack(one).mean() for one in losses.values()]).mean()


@pytest.mark.parametrize("retrieved", [0, 3])
@pytest.mark.parametrize("detach", [False, True])
def test_the_beams_of_training_are_those_of_recommend_ranked_as_rank_would(backbone, retrieved, detach):
    model = build_model(backbone, num_retrieved_items=retrieved, num_train_beams=6, stop_gradient_history=detach)
    input_ids, mask, items = random_histories(model, [4, 2, 1])
    longer = long_histories(model, [12, 2, 4]) if retrieved else {}
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(input_ids, mask, labels=labels, **longer)
    beams = torch.cat(
        [
            model.recommend(
                ids[seen.bool()][None, :-5],
                num_beams=6,
                num_return_sequences=6,
                ranking_weight=0.0,
                **{name: value[row : row + 1] for name, value in longer.items()},
            ).item_indices
            for row, (ids, seen) in enumerate(zip(input_ids, mask, strict=True))
        ]
    )
    targets = torch.tensor([row[-1] for row in items])
    assert not (beams == targets[:, None]).any(dim=1).all(), "some target is missed, and injected"
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    expected = expected_ranking_loss(model, input_ids, mask, candidates, longer)
    torch.testing.assert_close(out.ranking_loss, expected, atol=3e-5, rtol=1e-4)
    stage_one = build_model(backbone)
    stage_one.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(out.generation_loss, stage_one(input_ids, mask, labels=labels).generation_loss)
    assert out.cache is None


def test_no_beam_of_training_is_spent_on_a_blocked_item_and_the_target_is_ranked_all_the_same():
    model = build_model(num_retrieved_items=3, num_train_beams=6)
    input_ids, mask, items = random_histories(model, [4, 2, 1])
    longer, labels = long_histories(model, [12, 2, 4]), input_ids.masked_fill(mask == 0, -100)
    targets = torch.tensor([row[-1] for row in items])
    asked = {"num_beams": 6, "num_return_sequences": 6, "ranking_weight": 0.0}
    first = model.recommend(input_ids[:, :-5], mask[:, :-5], **asked, **longer).item_indices[:, :3]
    blocked = torch.cat([first, torch.tensor([[-1, -1], [-1, -1], [-1, -1]]), targets[:, None]], dim=1)
    with torch.no_grad():
        found = model(input_ids, mask, labels=labels, blocked_items=blocked, **longer).ranking_loss
    lists = [row[row >= 0] for row in blocked]
    beams = model.recommend(input_ids[:, :-5], mask[:, :-5], blocked_items=lists, **asked, **longer).item_indices
    assert not (beams == targets[:, None]).any()
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    expected = expected_ranking_loss(model, input_ids, mask, candidates, longer)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)


def test_candidates_of_training_are_asked_for_when_the_true_item_came():
    model = build_model("hstu", num_retrieved_items=3, num_train_beams=6)
    input_ids, mask, _ = random_histories(model, [4, 4, 4])
    longer, labels = long_histories(model, [12, 2, 4]), input_ids.masked_fill(mask == 0, -100)
    events = torch.randint(1, 12, (3, 5), generator=torch.Generator().manual_seed(3)).cumsum(dim=1)
    times = events.repeat_interleave(5, dim=1)[:, 4:]  # <bos> has one of its own
    timed = {"timestamps": times[:, :-5], "query_time": times[:, -1]}
    with torch.no_grad():
        found = model(input_ids, mask, labels=labels, timestamps=times, **longer).ranking_loss
    asked = {"num_beams": 6, "num_return_sequences": 6, "ranking_weight": 0.0}
    beams = model.recommend(input_ids[:, :-5], mask[:, :-5], **asked, **timed, **longer).item_indices
    targets = model.catalog.trie.lookup(model.layout.history_codes(input_ids)[1].view(3, 4, -1)[:, -1])
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    expected = expected_ranking_loss(model, input_ids, mask, candidates, {**longer, **timed})
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    before = torch.arange(12).expand(3, -1) - 1
    with torch.no_grad():
        own = model(
            input_ids, mask, labels=labels, timestamps=times, long_timestamps=before, candidates=beams, **longer
        )
    candidates = with_targets(beams, targets, torch.Generator().manual_seed(0))
    own_times = {**longer, **timed, "long_timestamps": before}
    with_own = expected_ranking_loss(model, input_ids, mask, candidates, own_times)
    torch.testing.assert_close(own.ranking_loss, with_own, atol=3e-5, rtol=1e-4)
    assert not torch.allclose(with_own, expected)
    timed["query_time"] = times[:, -1] + 10**6
    assert not torch.allclose(found, expected_ranking_loss(model, input_ids, mask, candidates, {**longer, **timed}))


def test_a_target_injected_for_a_beam_is_ranked_by_its_own_codes_and_block():
    """Would fail if only the item's index took the place of a beam whose keys and values stayed."""
    model = build_model(num_retrieved_items=3)
    input_ids, mask, items = random_histories(model, [4, 2, 1])
    longer, labels = long_histories(model, [12, 2, 4]), input_ids.masked_fill(mask == 0, -100)
    targets = torch.tensor([row[-1] for row in items])
    given = CANDIDATES.masked_fill(targets[:, None] == CANDIDATES, -1)
    with torch.no_grad():
        missed = model(input_ids, mask, labels=labels, candidates=given, **longer).ranking_loss
        there = with_targets(given, targets, torch.Generator().manual_seed(0))
        found = model(input_ids, mask, labels=labels, candidates=there, **longer).ranking_loss
    torch.testing.assert_close(missed, found)
    expected = expected_ranking_loss(model, input_ids, mask, there, longer)
    torch.testing.assert_close(missed, expected, atol=3e-5, rtol=1e-4)


def test_a_target_that_the_search_missed_is_no_candidate_unless_it_is_injected():
    model = build_model(num_train_beams=6, inject_target=False)
    input_ids, mask, _ = random_histories(model, [4, 4, 4])
    labels = input_ids.masked_fill(mask == 0, -100)
    asked = {"num_beams": 6, "num_return_sequences": 6, "ranking_weight": 0.0}
    beams = model.recommend(input_ids[:, :-5], mask[:, :-5], **asked).item_indices
    targets = model.catalog.trie.lookup(model.layout.history_codes(input_ids)[1].view(3, 4, -1)[:, -1])
    given = torch.where(beams == targets[:, None], -1, beams)
    given[0, 0] = targets[0]
    with torch.no_grad():
        found = model(input_ids, mask, labels=labels, candidates=given).ranking_loss
        logits = model.rank(input_ids[:, :-5], mask[:, :-5], given.clamp(min=0))
    happened = (given == targets[:, None])[given >= 0].float()
    of_next = torch.nn.functional.binary_cross_entropy_with_logits(logits[..., 0][given >= 0], happened)
    behavior = torch.tensor([float(int(input_ids[0, -1]) == one) for one in model.config.behavior_token_ids])
    of_behaviors = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, 0, 1:], behavior, reduction="none")
    torch.testing.assert_close(found, torch.stack([of_next, *of_behaviors]).mean(), atol=3e-5, rtol=1e-4)


def test_candidates_in_packs_are_the_same_with_the_same_gradient(backbone, monkeypatch):
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
def test_either_part_of_an_item_vector_may_be_missing(embeddings, table, tmp_path):
    model = build_model(
        num_retrieved_items=3, num_train_beams=4, project_content_embeddings=embeddings, embedding_table_size=table
    )
    assert (model.item_encoder.proj is not None, model.item_encoder.table is not None) == (embeddings, table > 0)
    input_ids, mask, _ = random_histories(model, [4, 2])
    longer, candidates = long_histories(model, [12, 2]), torch.tensor([[1, 2], [3, 4]])
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


def test_the_target_takes_a_random_place_where_it_was_missed_and_no_other_changes():
    beams, targets = torch.arange(12).view(2, 6), torch.tensor([20, 8])
    places = set()
    for seed in range(40):
        found = with_targets(beams, targets, torch.Generator().manual_seed(seed))
        assert torch.equal(found[1], beams[1]) and (found[0] != beams[0]).sum() == 1
        places.add(int((found[0] == 20).nonzero()[0]))
    assert places == set(range(6))


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_of_stage_two_stops_at_the_history_if_it_is_detached(backbone, detach):
    model = build_model(
        backbone, num_retrieved_items=3, num_train_beams=5, stop_gradient_history=detach, generation_loss_weight=0.0
    )
    input_ids, _, _ = random_histories(model, [4])
    inputs_embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    model(inputs_embeds=inputs_embeds, labels=input_ids, **long_histories(model, [12])).loss.backward()
    gradient = torch.zeros_like(inputs_embeds) if inputs_embeds.grad is None else inputs_embeds.grad
    history, answer = gradient[:, :-5], gradient[:, -5:]
    assert (answer == 0).all(), "the target is read as a candidate: the row's own spelling of it is not ranked"
    assert bool((history == 0).all()) == detach
    assert model.candidate_block.segments.weight.grad.abs().sum(dim=1).min() > 0
    assert model.item_encoder.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_the_search_leaves_no_trace_in_the_gradient(backbone, autocast, monkeypatch):
    """Nor under autocast, which keeps its casts of weights: one made without gradient would lose it for all the step."""
    candidates, gradients = [], []
    original = candidates_unigrf.with_targets
    monkeypatch.setattr(
        candidates_unigrf, "with_targets", lambda *args: candidates.append(original(*args)) or candidates[-1]
    )
    for beams in (5, 0):
        model = build_model(backbone, num_retrieved_items=3, num_train_beams=beams)
        input_ids, mask, _ = random_histories(model, [4, 2])
        inputs = {"input_ids": input_ids, "attention_mask": mask, **long_histories(model, [12, 2])}
        inputs["labels"] = input_ids.masked_fill(mask == 0, -100)
        if not beams:
            inputs["candidates"] = candidates[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=lambda m, n=name: f"{n}: {m}")


def test_of_histories_packed_in_one_row_the_last_one_has_candidates_that_see_no_other(backbone):
    model = build_model(backbone, num_retrieved_items=3)
    input_ids, mask, _ = random_histories(model, [4, 2])
    rows = [ids[m.bool()] for ids, m in zip(input_ids, mask, strict=True)]
    packed = torch.nn.functional.pad(torch.cat(rows), (2, 3))[None]
    labels, seen = packed.masked_fill(packed == 0, -100), (packed != 0).long()
    longer, candidates = long_histories(model, [12]), CANDIDATES[:1]
    with torch.no_grad():
        found = model(packed, seen, labels=labels, candidates=candidates, **longer)
        alone = model(rows[1][None], labels=rows[1][None], candidates=candidates, **longer)
    torch.testing.assert_close(found.ranking_loss, alone.ranking_loss, atol=3e-5, rtol=1e-4)


def test_a_row_without_a_supervised_item_has_no_candidates_to_learn_from():
    model = build_model(num_retrieved_items=3, num_train_beams=4)
    input_ids, mask, items = random_histories(model, [4, 2, 3])
    labels, longer = input_ids.masked_fill(mask == 0, -100), long_histories(model, [12, 2, 5])
    labels[1] = -100
    kept = torch.tensor([0, 2])
    candidates = torch.tensor([[row[-1], 28, 29] for row in items])  # the targets are there: nothing is injected
    with torch.no_grad():
        found = model(input_ids, mask, labels=labels, candidates=candidates, **longer)
        own = {name: value[kept] for name, value in longer.items()}
        expected = model(input_ids[kept], mask[kept], labels=labels[kept], candidates=candidates[kept], **own)
        assert model(input_ids, mask, labels=labels, **longer).loss.isfinite()
        nothing = model(input_ids, mask, labels=torch.full_like(labels, -100), **longer)
    torch.testing.assert_close(found.loss, expected.loss, atol=2e-5, rtol=1e-4)
    assert nothing.ranking_loss == 0


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [4, 4, 1, 1]])
def test_candidates_are_accumulated_by_the_share_of_tokens(lengths):
    """All that the Trainer counts are tokens: exact if the rows are equally long, else as written in `forward`."""
    model = build_model(num_retrieved_items=3)
    input_ids, mask, items = random_histories(model, lengths)
    labels = input_ids.masked_fill((mask == 0) | (input_ids == model.config.bos_token_id), -100)
    others = torch.tensor([[(row[-1] + step) % 30 for step in (0, 3, 7)] for row in items])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "candidates": others}
    batch |= long_histories(model, [12, 2, 4, 6])
    tokens = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        whole = model(**batch)
        parts, shares = [], []
        for part in (slice(0, 2), slice(2, 4)):
            parts.append(model(**{name: value[part] for name, value in batch.items()}, num_items_in_batch=tokens))
            shares.append(int((labels[part, 1:] != -100).sum()) / tokens)
    ranking = sum(share * part.ranking_loss for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.generation_loss + ranking)
    if lengths[0] == lengths[-1]:
        torch.testing.assert_close(ranking, whole.ranking_loss)


def test_candidates_that_do_not_fit_are_refused():
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


def test_stage_two_starts_from_a_checkpoint_of_stage_one_and_trains_under_the_stock_trainer(tmp_path):
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


@pytest.mark.parametrize("kept_for", [{}, {"every_epochs": 2}, {"every_steps": 5}], ids=str)
def test_a_resumed_run_of_stage_two_equals_an_uninterrupted_one(kept_for, tmp_path):
    rows = second_stage_rows(build_model(num_retrieved_items=3))

    def train(folder, resume=None, **arguments):
        fields = {"embedding_dropout": 0.2, "ranking_dropout": 0.3, "dense_loss_weight": 0.5}
        model = build_model(num_retrieved_items=3, num_train_beams=6, **fields)
        arguments |= {"max_steps": 14, "learning_rate": 0.01, "per_device_train_batch_size": 4, "logging_steps": 1}
        arguments |= {"save_steps": 10, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        arguments |= {"remove_unused_columns": False}
        kept = None
        if kept_for:
            kept = CachedCandidates(model, rows, 6, **kept_for)
        trainer = Trainer(
            model,
            TrainingArguments(str(folder), **arguments),
            data_collator=kept.collator(TrainingCollator()) if kept else TrainingCollator(),
            train_dataset=rows if kept else rows.remove_columns("row"),
            callbacks=[kept] if kept else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, losses = train(tmp_path / "whole", save_strategy="no")
    train(tmp_path / "parts", save_strategy="steps")
    resumed, rest = train(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-10"), save_strategy="no")
    assert rest[-4:] == losses[-4:]
    for (name, first), second in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_beams_kept_for_steps_are_those_of_the_model_when_their_row_came_and_they_were_old(tmp_path):
    model = build_model(num_train_beams=6)
    rows = second_stage_rows(model).select_columns(["row", "input_ids", "attention_mask", "labels"])
    kept, seen = CachedCandidates(model, rows, 6, every_steps=6), []
    beams = {"num_beams": 6, "num_return_sequences": 6, "ranking_weight": 0.0}

    def look(model, args, kwargs):  # behind the hook that adds them
        numbers = [
            row for row in range(16) for ids in kwargs["input_ids"] if ids[ids > 0].tolist() == rows[row]["input_ids"]
        ]
        model.eval()
        now = {
            row: model.recommend(torch.tensor([rows[row]["input_ids"][:-5]]), **beams).item_indices[0]
            for row in numbers
        }
        model.train()
        by_input = {tuple(rows[row]["input_ids"]): row for row in numbers}
        order = [by_input[tuple(ids[ids > 0].tolist())] for ids in kwargs["input_ids"]]
        seen.append({row: (items, now[row]) for row, items in zip(order, kwargs["candidates"], strict=True)})

    model.register_forward_pre_hook(look, with_kwargs=True)
    arguments = {"max_steps": 16, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "no"}
    arguments |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    Trainer(
        model,
        TrainingArguments(str(tmp_path), **arguments),
        data_collator=kept.collator(TrainingCollator()),
        train_dataset=rows,
        callbacks=[kept],
    ).train()
    searched, changed = {}, 0
    for step, batch in enumerate(seen):
        for row, (items, now) in batch.items():
            if row not in searched or step - searched[row][0] >= 6:
                assert torch.equal(items, now), "of the model as it is"
                searched[row] = (step, items)
            assert torch.equal(items, searched[row][1])
            changed += not torch.equal(items, now)
    assert changed > 0 and any(step > 0 for step, _ in searched.values()), (
        "some were kept, and some searched for again"
    )
    with pytest.raises(ValueError, match="every_steps of at least 1"):
        CachedCandidates(model, rows, 6, every_steps=0)


def test_kept_candidates_are_searched_for_at_the_time_of_the_true_item():
    model = build_model("hstu", num_train_beams=4)
    rows = second_stage_rows(model)
    generator = torch.Generator().manual_seed(2)
    times = [
        torch.randint(1, 10**6, (len(row["input_ids"]),), generator=generator).sort().values.tolist() for row in rows
    ]
    found = {}
    for name, some in (("timed", rows.add_column("timestamps", times)), ("not", rows)):
        kept = CachedCandidates(model, some, num_beams=6, batch_size=5)
        kept.on_epoch_begin(TrainingArguments(use_cpu=True, disable_tqdm=True), TrainerState(epoch=0.0), None)
        found[name] = kept.items
    assert not torch.equal(found["timed"], found["not"])
    beams = {"num_beams": 6, "num_return_sequences": 6, "ranking_weight": 0.0}
    for row, time, items in zip(rows, times, found["timed"], strict=True):
        history, before, query_time = torch.tensor([row["input_ids"][:-5]]), torch.tensor([time[:-5]]), time[-5]
        best = model.recommend(history, timestamps=before, query_time=torch.tensor([query_time]), **beams)
        assert torch.equal(items, best.item_indices[0])


def test_kept_candidates_are_the_beams_of_the_last_search_for_as_many_epochs_as_asked_for():
    model = build_model(num_retrieved_items=3)
    rows = second_stage_rows(model)
    kept = CachedCandidates(model, rows, num_beams=40, every_epochs=2, batch_size=3)
    args, state = TrainingArguments(use_cpu=True, disable_tqdm=True), TrainerState(epoch=0.0)
    model.train()
    kept.on_epoch_begin(args, state, None)
    assert model.training
    batch = kept.collator(TrainingCollator())([rows[5], rows[2]])
    assert "row" not in batch and batch["candidates"].shape == (2, 40)
    assert (batch["candidates"][:, 30:] == -1).all(), "there are thirty items"
    for row, found in zip((5, 2), batch["candidates"], strict=True):
        history = torch.tensor([rows[row]["input_ids"][:-5]])
        best = model.eval().recommend(
            history,
            num_beams=30,
            num_return_sequences=30,
            ranking_weight=0.0,
            long_items=history[:, :0],
            long_behaviors=history[:, :0],
        )
        assert torch.equal(found[:30], best.item_indices[0])
    assert "candidates" not in kept.collator(TrainingCollator())([rows.remove_columns("row")[0]])
    own = [list(range(row % 7)) for row in range(len(rows))]
    others = CachedCandidates(model, rows.add_column("blocked_items", own), num_beams=30, batch_size=3)
    others.on_epoch_begin(args, state, None)
    for items, all_items, blocked in zip(others.items.tolist(), kept.items.tolist(), own, strict=True):
        allowed = [item for item in all_items if item not in (-1, *blocked)]
        assert items == allowed + [-1] * len(blocked), "a row's own items are none of them"
    before = kept.items.clone()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    kept.on_epoch_begin(args, TrainerState(epoch=1.0), None)
    assert torch.equal(kept.items, before)
    kept.on_epoch_begin(args, TrainerState(epoch=2.0), None)
    assert not torch.equal(kept.items, before)
    with pytest.raises(ValueError, match="a column `row`"):
        CachedCandidates(model, rows.remove_columns("row"), num_beams=4)


def test_a_frozen_base_model_learns_to_rank_and_nothing_else(tmp_path):
    model = build_model(num_retrieved_items=3, num_train_beams=6, dense_loss_weight=1.0, embedding_dropout=0.1)
    input_ids, mask, _ = random_histories(model, [4, 2, 1])
    asked = {"num_beams": 30, "num_return_sequences": 30, "ranking_weight": 0.0, "num_dense_candidates": 5}
    asked |= long_histories(model, [7, 0, 2])
    before = model.recommend(input_ids, mask, **asked)
    model.freeze_base_model()
    losses = run_trainer(tmp_path, model, second_stage_rows(model), collator=TrainingCollator(), max_steps=8)
    assert losses[-1] != losses[0]
    after = model.eval().recommend(input_ids, mask, **asked)
    for name in ("item_indices", "generation_scores", "dense_scores"):
        torch.testing.assert_close(after[name], before[name])
    assert not torch.isclose(after.ranking_scores, before.ranking_scores).any()

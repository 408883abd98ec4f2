"""Training under the stock `Trainer`: resumed equals uninterrupted, accumulated equals whole, two processes equal one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONES, build_model, random_codes, random_histories, watch_negatives
from datasets import Dataset
from safetensors.torch import load_file
from test_second_stage import second_stage_rows
from transformers import AutoConfig, Trainer, TrainerState, TrainingArguments

from modeling_unigrf import (
    HSTUConfig,
    UniGRFCausalLMOutput,
    UniGRFConfig,
    UniGRFForCausalLM,
    supervision_unigrf,
    training_unigrf,
)
from recipes.callbacks import AdaptiveWeighter, KeptBeams, LossParts

ROOT = Path(__file__).parents[1]


def collate(rows):
    return {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }


def histories_dataset(model, count, seed=0, lengths=(1, 2, 5, 3)):
    rows = []
    for index in range(count):
        ids, mask, _ = random_histories(model, [lengths[index % len(lengths)]], seed=seed + index)
        rows.append({"input_ids": ids[0].tolist(), "attention_mask": mask[0].tolist(), "labels": ids[0].tolist()})
    return Dataset.from_list(rows)


def run_trainer(folder, model, dataset, resume=None, callbacks=None, collator=collate, **arguments):
    arguments = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 1e9,
        **arguments,
    }
    model.train()
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        data_collator=collator,
        train_dataset=dataset,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    name = "ranking_weight" if callbacks and isinstance(callbacks[0], AdaptiveWeighter) else "loss"
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_weights(first, second, tolerance=0.0):
    second = dict(second)
    for name, tensor in first:
        torch.testing.assert_close(
            tensor, second[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reader", ["llama", "hstu"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, reader):
    dropout = {"ranking_dropout": 0.3, "embedding_dropout": 0.2, "negatives_per_item": 1.5, "item_loss_weight": 0.5}
    whole, stopped, resumed = (build_model(reader, **dropout) for _ in range(3))
    dataset = histories_dataset(whole, 32)
    losses = run_trainer(tmp_path / "whole", whole, dataset)
    run_trainer(tmp_path / "parts", stopped, dataset, save_strategy="steps", save_steps=3)
    rest = run_trainer(tmp_path / "parts", resumed, dataset, resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert rest[-3:] == losses[-3:]
    assert_same_weights(whole.named_parameters(), resumed.named_parameters())


@pytest.mark.parametrize("positives", [None, ["like"]])
def test_gradient_accumulation_does_not_change_the_loss(tmp_path, positives):
    whole, accumulated = (build_model(retrieval_behaviors=positives) for _ in range(2))
    dataset = histories_dataset(whole, 24)  # ragged rows: the micro-batches have unequal shares
    losses = run_trainer(tmp_path / "a", whole, dataset, max_steps=3)
    parts = run_trainer(
        tmp_path / "b", accumulated, dataset, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    np.testing.assert_allclose(parts, losses, rtol=1e-5)
    assert_same_weights(whole.named_parameters(), accumulated.named_parameters(), 1e-4)


WORKER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from conftest import build_model
from test_enhancer import ATOMIC, build_enhancer, rows_of
from test_second_stage import second_stage_rows
from test_training import AdaptiveWeighter, collate, histories_dataset, run_trainer
from recipes.callbacks import KeptBeams
from safetensors.torch import save_file
from transformers import TrainingArguments
model = build_model()
losses = run_trainer({out!r}, model, histories_dataset(model, 24), max_steps=3, per_device_train_batch_size=2)
rank = os.environ["RANK"]
save_file({{name: p.detach().clone() for name, p in model.named_parameters()}}, {out!r} + f"/weights-{{rank}}.safetensors")
if rank == "0":
    open({out!r} + "/losses.json", "w").write(str(losses))
saving = dict(max_steps=6, save_strategy="steps", save_steps=3, restore_callback_states_from_checkpoint=True)
for name, resume in (("whole", None), ("resumed", {out!r} + "/checkpoint-3")):
    model = build_model()
    dataset = histories_dataset(model, 24)
    weights = run_trainer({out!r}, model, dataset, resume, [AdaptiveWeighter(2)], per_device_train_batch_size=2, **saving)
    open({out!r} + f"/task-weights-{{name}}-{{rank}}.json", "w").write(str(weights))
model = build_model(**ATOMIC)
enhancer = build_enhancer(model, warm_up_epochs=0)
options = dict(callbacks=[enhancer], collator=enhancer.collator(collate), remove_unused_columns=False)
run_trainer({out!r}, model, rows_of(enhancer), max_steps=2, per_device_train_batch_size=2, **options)
model = build_model(num_retrieved_items=3)
kept = KeptBeams(model, second_stage_rows(model), num_beams=5, batch_size=3)
kept._propose(TrainingArguments({out!r}, use_cpu=True, disable_tqdm=True), 0)
pools = {{"negatives": enhancer.negatives, "favorites": enhancer.favorites, "kept": kept.items}}
save_file({{name: pool.clone() for name, pool in pools.items()}}, {out!r} + f"/pools-{{rank}}.safetensors")
torch.distributed.barrier()  # a process that ends while another still talks to it would abort that one
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    single = build_model()
    losses = run_trainer(tmp_path / "single", single, histories_dataset(single, 24), max_steps=3)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path)))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    first, second = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert_same_weights(first.items(), second.items())
    np.testing.assert_allclose(json.loads((tmp_path / "losses.json").read_text()), losses, rtol=1e-4)
    assert_same_weights(first.items(), single.named_parameters(), 2e-3)
    whole, *others = [
        json.loads((tmp_path / f"task-weights-{name}-{rank}.json").read_text())
        for name in ("whole", "resumed")
        for rank in (0, 1)
    ]
    assert all(other == whole for other in others), "also from the middle of a window"
    assert whole[:4] == [1.0] * 4 and whole[4] == whole[5] != 1.0
    first, second = (load_file(tmp_path / f"pools-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(pool, second[name]) for name, pool in first.items())
    assert ((first["negatives"] >= 0) | (first["favorites"][:, :1] >= 0)).any(dim=1).all(), "of all users"
    model = build_model(num_retrieved_items=3)
    kept = KeptBeams(model, second_stage_rows(model), num_beams=5, batch_size=3)
    kept._propose(TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True), 0)
    assert torch.equal(first["kept"], kept.items), "as one process finds them"


def test_the_slower_loss_gets_the_greater_weight():
    weighter, model, args = AdaptiveWeighter(temperature=0.1), build_model(), TrainingArguments(use_cpu=True)
    weighter.on_train_begin(args, TrainerState(num_train_epochs=3), None, model=model)

    def window(generation, ranking):
        for _ in range(3):
            losses = {"generation_loss": torch.tensor(generation), "ranking_loss": torch.tensor(ranking)}
            weighter._collect(model.train(), None, UniGRFCausalLMOutput(loss=torch.tensor(1.0), **losses))
            weighter.on_step_end(args, TrainerState(), None)
        used = model.task_weights
        weighter.on_epoch_begin(args, TrainerState(epoch=1.0), None)
        state, logs = TrainerState(log_history=[{}]), {"loss": 1.0}
        weighter.on_log(args, state, None, logs)
        assert used == (logs["generation_weight"], logs["ranking_weight"]), "not those of the window that comes"
        return model.task_weights

    assert window(4.0, 1.0) == (1.0, 1.0)
    slower = window(3.8, 1.0)  # ratios .95 and 1
    assert slower == pytest.approx((2 / (1 + math.exp(0.5)), 2 / (1 + math.exp(-0.5))), abs=1e-5)
    input_ids, mask, _ = random_histories(model, [3, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    out, weighted = model.eval()(**inputs), model.train()(**inputs)
    torch.testing.assert_close(out.loss, out.generation_loss + out.ranking_loss)
    torch.testing.assert_close(
        weighted.loss, slower[0] * weighted.generation_loss + slower[1] * weighted.ranking_loss, atol=1e-5, rtol=1e-5
    )
    weighter.step = [0.0] * 5  # what that forward added
    assert window(3.8, 0.1) == pytest.approx((2 / (1 + math.exp(-5)), 2 / (1 + math.exp(5))), abs=1e-5), "clamped"
    assert window(38.0, 0.1) == pytest.approx((2 / (1 + math.exp(-5)), 2 / (1 + math.exp(5))), abs=1e-5), "also above"
    with pytest.raises(ValueError, match="finite losses"):
        window(float("nan"), 1.0)
    with pytest.raises(ValueError, match="positive temperature"):
        AdaptiveWeighter(temperature=0.0)
    with pytest.raises(ValueError, match="bounds of a ratio"):
        AdaptiveWeighter(bounds=(1.5, 2.0))
    weighter.on_train_end(args, None, None)
    assert model.task_weights == (1.0, 1.0), "they end with their training"


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_a_loss_that_is_no_number_is_told_also_after_the_last_log(tmp_path, logging_steps):
    model = build_model()
    with torch.no_grad():
        model.ranking_head.out_proj.bias.fill_(float("nan"))
    steps = {"max_steps": 1, "logging_steps": logging_steps}
    with pytest.raises(ValueError, match="Expected finite losses"):
        run_trainer(tmp_path, model, histories_dataset(model, 4), callbacks=[LossParts(model)], **steps)


def test_the_gradient_norm_form_balances_the_gradients():
    weighter, model = AdaptiveWeighter(form="gradient_norm"), build_model()
    weighter.on_train_begin(None, TrainerState(num_train_epochs=3), None, model=model)
    input_ids, mask, _ = random_histories(model, [4, 2])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    states = []
    hook = model.model.register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state))
    out = model.train()(**batch)
    hook.remove()
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    generation = training_unigrf.generation_loss(model, states[0], targets)
    expected = torch.autograd.grad(generation, states[0])[0].norm()
    torch.testing.assert_close(out.gradient_norms[0], expected, atol=1e-5, rtol=1e-4)
    weighter.sums = [4.0, 1.0, 6.0, 2.0, 1.0]
    weighter._close_window()
    weighter.sums = [3.6, 1.0, 6.0, 2.0, 1.0]  # ratios .9 and 1
    weighter._close_window()
    assert model.task_weights == pytest.approx((2 * 0.15 / 0.65, 2 * 0.5 / 0.65), abs=1e-5)
    weighter.sums = [3.6, 1.0, 6.0, 0.0, 1.0]  # as of stage II with a detached history
    with pytest.raises(ValueError, match="one of them does not reach the histories' states"):
        weighter._close_window()
    weighter.on_train_end(None, None, None)
    assert model(**batch).gradient_norms is None
    with pytest.raises(ValueError, match="loss_ratio or gradient_norm"):
        AdaptiveWeighter(form="other")
    model.measures_gradients, model.config.ranking_loss_weight = True, 0.0
    torch.testing.assert_close(model(**batch).gradient_norms, torch.stack([expected, torch.tensor(0.0)]))


def test_a_training_in_which_nothing_would_be_weighed_is_refused(tmp_path):
    model = build_model()
    for window, steps in ((None, {"num_train_epochs": 2, "max_steps": -1}), (2, {"max_steps": 4})):
        with pytest.raises(ValueError, match="more than two windows of training, found 2"):
            run_trainer(tmp_path, model, histories_dataset(model, 4), callbacks=[AdaptiveWeighter(window)], **steps)


@pytest.mark.parametrize(
    ("form", "window", "end"),
    [("loss_ratio", 2, 5), ("gradient_norm", 2, 5), ("loss_ratio", None, 2), ("loss_ratio", None, 3)],
)
def test_the_adaptive_weights_are_resumed_in_a_window_and_at_its_end(tmp_path, form, window, end):
    whole, stopped, resumed = (build_model() for _ in range(3))
    dataset = histories_dataset(whole, 32 if window else 8)  # 2 steps a window in any case

    def train(folder, model, resume=None, **arguments):
        weighter = AdaptiveWeighter(window, form=form)
        return run_trainer(tmp_path / folder, model, dataset, resume, [weighter], max_steps=8, **arguments)

    weights = train("whole", whole)
    saving = {"save_strategy": "steps", "save_steps": end, "restore_callback_states_from_checkpoint": True}
    train("parts", stopped, **saving)
    rest = train("parts", resumed, str(tmp_path / "parts" / f"checkpoint-{end}"), **saving)
    assert rest == weights and len(set(weights)) == 3 and weights[:4] == [1.0] * 4, (
        "those that each step was trained with"
    )
    assert_same_weights(whole.named_parameters(), resumed.named_parameters())


def test_the_loss_is_the_exact_log_likelihood_of_codes_and_behaviours(backbone):
    """Against a loop over positions, with padding on either side."""
    model = build_model(backbone, item_loss_weight=0.7)
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
                scores = model.ranking_head(hidden[position], hidden[position - 4], model.item_vectors(item))
                for name, score in zip(model.config.ranking_targets, scores, strict=True):
                    label = {"next": True, "like": target == like, "dislike": target != like}[name]
                    rank_losses.append(-torch.nn.functional.logsigmoid(score if label else -score))
                vectors = model.item_vectors(torch.arange(30))
                item_losses.append(-model.ranking_head.item_scores(hidden[position - 4], vectors).log_softmax(0)[item])
    torch.testing.assert_close(out.generation_loss, torch.stack(code_losses).mean(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.ranking_loss, torch.stack(rank_losses).mean(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.item_loss, torch.stack(item_losses).mean(), atol=2e-5, rtol=1e-4)
    expected = out.generation_loss + out.ranking_loss + 0.7 * out.item_loss
    torch.testing.assert_close(out.loss, expected, atol=2e-5, rtol=1e-4)
    right = torch.stack([torch.cat([ids[m.bool()], ids[~m.bool()]]) for ids, m in zip(input_ids, mask, strict=True)])
    with torch.no_grad():
        padded = model(input_ids=right, attention_mask=(right != 0).long(), labels=right.masked_fill(right == 0, -100))
    torch.testing.assert_close(padded.loss, out.loss, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("place", "reader", "fields"),
    [
        ("embedding_dropout", "llama", {"embedding_dropout": 0.5}),
        ("embedding_dropout", "llama", {"embedding_dropout": 0.5, "history_item_vectors": True}),
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
    prior = torch.tensor([model.config.log_odds_of_next, 0.0, 0.0])
    assert model.config.log_odds_of_next == pytest.approx(np.log(29 / 2.5))
    torch.testing.assert_close(scores - prior, torch.stack(found), atol=2e-5, rtol=1e-4)


def test_random_negatives_are_as_many_and_where_the_log_odds_of_next_say():
    model = build_model(codebook_sizes=(30,), negatives_per_item=200.0)
    input_ids, mask, items = random_histories(model, [4, 1])
    seen = watch_negatives(model)
    model(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100))
    negatives = seen["negatives"]
    for row, own in enumerate(items):
        ends, counts = negatives.history_ends[row][negatives.usable[row]].unique(return_counts=True)
        assert ends.tolist() == list(range(8 - 2 * len(own), 8, 2)), "<bos>, and all behaviours but the last"
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


def test_training_on_items_outside_the_catalogue_is_refused():
    model = build_model()
    input_ids, mask, _ = random_histories(model, [3])
    codes = torch.roll(model.catalogue.item_codes, 1, dims=1) % torch.tensor([4, 3, 3, 2])
    model.set_catalogue(torch.cat([codes[:0], model.catalogue.item_codes[:1]]), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="not in the model's catalogue"):
        model(input_ids=input_ids, attention_mask=mask, labels=input_ids)


def test_negatives_need_a_plain_mask():
    model = build_model(negatives_per_item=0.5)
    input_ids, _, _ = random_histories(model, [3])
    square = torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1]).tril().bool()
    with pytest.raises(ValueError, match="negatives_per_item = 0"):
        model(input_ids=input_ids, attention_mask=square, labels=input_ids)


def test_a_lora_adapter_stays_small_and_reloads_exactly(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = build_model()
    input_ids, mask, _ = random_histories(model, [4, 2])
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=model.modules_to_save, init_lora_weights=False
    )
    adapted = get_peft_model(model, lora)
    expected = adapted.base_model.model.recommend(input_ids, mask)
    generated = adapted.generate(input_ids=input_ids, attention_mask=mask, num_beams=4)
    adapted.save_pretrained(tmp_path)
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert saved < 0.4 * sum(parameter.numel() for parameter in build_model().parameters())
    reloaded = PeftModel.from_pretrained(build_model(), tmp_path).eval()
    torch.testing.assert_close(reloaded.base_model.model.recommend(input_ids, mask).scores, expected.scores)
    assert torch.equal(reloaded.generate(input_ids=input_ids, attention_mask=mask, num_beams=4), generated)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_virtual_tokens_and_adapters_of_single_rows_reach_the_beams():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = build_model(codebook_sizes=(4, 3, 2), num_items=12)
    input_ids, mask, _ = random_histories(model, [3, 3])
    arguments = {"input_ids": input_ids, "attention_mask": mask, "num_beams": 12, "num_return_sequences": 12}
    arguments |= {"output_scores": True, "return_dict_in_generate": True}
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    found = prompted.generate(**arguments)
    with torch.no_grad():
        logits = prompted(input_ids=found.sequences, attention_mask=torch.ones_like(found.sequences)).logits
    expected = 0.0
    for level, tokens in enumerate(found.sequences[:, -3:].T):
        codes = model.layout.level_slice(level)
        log_probs = logits[:, level - 4, codes].log_softmax(dim=-1)
        expected = expected + log_probs.gather(1, tokens[:, None] - codes.start)[:, 0]
    torch.testing.assert_close(found.sequences_scores, expected, atol=2e-5, rtol=1e-4)

    model = build_model(codebook_sizes=(4, 3, 2), num_items=12)
    plain = model.generate(**arguments).sequences_scores
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with_it, mixed = (
        adapted.generate(**arguments, **one).sequences_scores
        for one in ({}, {"adapter_names": ["default", "__base__"]})
    )
    torch.testing.assert_close(mixed, torch.cat([with_it[:12], plain[12:]]), atol=2e-5, rtol=1e-4)
    assert ((with_it - plain).view(2, 12).abs().amax(dim=1) > 1e-2).all()


def test_the_adaptive_weights_reach_a_model_with_an_adapter():
    from peft import LoraConfig, get_peft_model

    model, args = build_model(), TrainingArguments(use_cpu=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=model.modules_to_save))
    weighter = AdaptiveWeighter()
    weighter.on_train_begin(args, TrainerState(num_train_epochs=3), None, model=adapted)
    weighter.weights = [0.5, 1.5]
    weighter.sums = [4.0, 1.0, 0.0, 0.0, 1.0]
    weighter._close_window()
    input_ids, mask, _ = random_histories(model, [3, 2])
    out = adapted.train()(input_ids=input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(out.loss, 0.5 * out.generation_loss + 1.5 * out.ranking_loss)


def test_what_an_adapter_would_hide_or_break_is_refused():
    from peft import LoraConfig, get_peft_model

    model = build_model(codebook_sizes=(4, 3, 2), num_items=12)
    assert (
        "item_encoder" in model.modules_to_save and "item_encoder" not in build_model(embeddings=False).modules_to_save
    )
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=model.modules_to_save))
    trained = {name for name, one in adapted.named_parameters() if one.requires_grad}
    assert any("item_encoder" in name and "table" in name for name in trained)
    new, vector = torch.tensor([[*model.catalogue.item_codes[0, :2].tolist(), 2]]), torch.randn(1, 6)
    with pytest.raises(ValueError, match="Merge the adapter first"):
        model.add_items(new, vector)
    assert (model.catalogue.num_items, model.config.num_items, model.config.codebook_sizes) == (12, 12, [4, 3, 2])
    merged = adapted.merge_and_unload()
    merged.item_encoder.requires_grad_(False)
    merged.add_items(new, vector)
    assert merged.config.num_items == 13 and not merged.item_encoder.table.weight.requires_grad

    for of_table in (
        {"target_modules": ["table"]},
        {"trainable_token_indices": {"table": [3]}, "target_modules": ["q_proj"]},
    ):
        model = build_model(num_items=12)
        input_ids, mask, _ = random_histories(model, [4, 2])
        expected, before = model(input_ids, mask, labels=input_ids).loss, model.catalogue.item_codes
        get_peft_model(model, LoraConfig(**of_table))
        torch.testing.assert_close(model(input_ids, mask, labels=input_ids).loss, expected)
        with pytest.raises(ValueError, match="Merge the adapter first"):
            model.add_items((before[:1] + 1) % torch.tensor([4, 3, 3, 2]), vector)
        assert model.catalogue.item_codes is before and len(before) == model.config.num_items

    model = build_model(codebook_sizes=(30,), code_similarity="cosine")
    input_ids, mask, _ = random_histories(model, [4, 2])
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapter on lm_head has no effect"):
        adapted(input_ids=input_ids, attention_mask=mask)


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


def test_a_config_that_is_used_twice_is_left_as_it_was():
    base = AutoConfig.for_model("llama", **BACKBONES["llama"])
    first = UniGRFConfig(text_config=base, codebook_sizes=[4, 4, 2])
    vocab_size = first.vocab_size
    assert UniGRFConfig(text_config=base, codebook_sizes=[8, 8, 2]).vocab_size > first.vocab_size == vocab_size
    with pytest.raises(Exception, match="eos_token_id"):
        UniGRFConfig(eos_token_id=[2, 3])
    config = UniGRFConfig(negatives_per_item=4.0, codebook_sizes=[4, 4, 4, 4])
    model = UniGRFForCausalLM(config)
    model.set_catalogue(random_codes(200, [4, 4, 4, 4], torch.Generator().manual_seed(0)))
    assert model.config.log_odds_of_next == pytest.approx(np.log(199 / 4)), "of the catalogue that it has"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codebook_sizes": []}, "one positive codebook size"),
        ({"codebook_sizes": [4, 0]}, "one positive codebook size"),
        ({"codebook_sizes": [4, 4], "code_offsets": [5]}, "one code offset a level"),
        ({"behaviors": []}, "at least one behaviour"),
        ({"behaviors": ["view", "like"], "behavior_token_ids": [4]}, "one token id a behaviour"),
        ({"behaviors": ["next"]}, "may not be called 'next'"),
        ({"behavior_token_ids": [2]}, "Token ids overlap"),
        ({"codebook_sizes": [4, 4], "code_offsets": [5, 8]}, "Token ids overlap"),
        ({"codebook_sizes": [4, 4], "vocab_size": 12}, "at least 13 tokens .* found vocab_size=12"),
        ({"num_items": 0}, "found num_items=0"),
        ({"ranking_targets": []}, "ranking targets among"),
        ({"ranking_targets": ["share"]}, "ranking targets among"),
        ({"ranking_target": "interact"}, "a ranking_target among"),
        ({"retrieval_behaviors": []}, "retrieval_behaviors among"),
        ({"behaviors": ["view"], "retrieval_behaviors": ["like"]}, "retrieval_behaviors among"),
        ({"item_loss_weight": 1.0}, "item_loss_weight=1.0 needs the ranking target 'next' and item vectors"),
        ({"history_item_vectors": True}, "history_item_vectors needs item vectors"),
        ({"rank_by_item_score": False}, "needs item_loss_weight"),
        ({"detach_item_score": True}, "needs item_loss_weight"),
        ({"negatives_per_item": -1.0}, r"0 or more, found {'negatives_per_item': -1.0}"),
        ({"given_negative_weight": 0.5}, "given_negative_weight >= 1"),
        ({"code_similarity": "l2"}, "code_similarity 'dot' or 'cosine'"),
        ({"code_temperature": 0.0}, "a positive code_temperature"),
        ({"code_negatives": -1}, "code_negatives >= 0"),
        ({"num_train_beams": -1}, "num_train_beams of 0 or more"),
        ({"num_retrieved_items": -1}, "num_retrieved_items and num_train_beams of 0 or more"),
        ({"num_retrieved_items": 3}, "needs item embeddings"),
        ({"num_retrieved_items": 3, "item_table_size": 9}, "needs item embeddings"),
        ({"num_retrieved_items": 3, "item_embedding_dim": 6, "read_item_embeddings": False}, "item vectors to read"),
        ({"num_train_beams": 5, "negatives_per_item": 1.0}, "Set negatives_per_item=0"),
        ({"max_long_items": 0}, "max_long_items of 1 or more"),
        ({"max_items": 0}, "max_items of 1 or more"),
        ({"max_items": 0, "text_config": {"model_type": "bloom"}}, "max_items of 1 or more"),  # without positions
    ],
)
def test_configs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UniGRFConfig(**fields)


def test_whole_numbers_and_tuples_are_as_good_as_fractions_and_lists(tmp_path):
    text_config = HSTUConfig(dropout=0, layer_norm_eps=1)
    lists = {"code_offsets": (6, 8), "behavior_token_ids": (4, 5), "ranking_targets": ("next",)}
    lists |= {"codebook_sizes": (2, 2), "behaviors": ("dislike", "like"), "retrieval_behaviors": ("like",)}
    config = UniGRFConfig(text_config=text_config, ranking_weight=1, embedding_dropout=0, **lists)
    assert {name: tuple(getattr(config, name)) for name in lists} == lists
    config.save_pretrained(tmp_path)
    assert UniGRFConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert UniGRFConfig.from_pretrained(tmp_path, ranking_weight=2).ranking_weight == 2


@pytest.mark.parametrize("changed", [{"codebook_sizes": [4, 4, 3, 2]}, {"pad_token_id": 7}], ids=str)
def test_a_spelling_that_is_changed_at_load_is_checked_as_a_new_one(changed, tmp_path):
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Token ids overlap"):
        UniGRFForCausalLM.from_pretrained(tmp_path, **changed)


def test_tokens_that_spell_items_are_not_taken_away():
    model = build_model()
    needed = model.config.num_spelling_tokens
    assert model.resize_token_embeddings(needed + 3).num_embeddings == needed + 3
    for part in (model, model.model):
        with pytest.raises(ValueError, match=f"at least the {needed} tokens"):
            part.resize_token_embeddings(needed - 1)
    assert model.resize_token_embeddings(needed).num_embeddings == needed


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


def test_retrieval_learns_the_items_with_its_behaviours_alone_and_ranking_all(backbone):
    plain, chosen = (
        build_model(backbone, item_loss_weight=0.7, retrieval_behaviors=only) for only in (None, ["like"])
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
    torch.testing.assert_close(out.item_loss, share * expected.item_loss)
    torch.testing.assert_close(out.ranking_loss, whole.ranking_loss)
    assert (out.generation_loss - whole.generation_loss).abs() > 1e-3
    labels = input_ids.masked_fill(plain.layout.token_levels(input_ids) < 0, -100)  # no item's behaviour is known
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

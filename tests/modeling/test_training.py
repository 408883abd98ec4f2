"""Training under the stock `Trainer`: resumed, accumulated, with two processes, and with adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_same_weights,
    build_model,
    collate,
    histories_dataset,
    random_histories,
    run_trainer,
    second_stage_rows,
)
from safetensors.torch import load_file
from transformers import Trainer, TrainerState, TrainingArguments

from modeling_unigrf import TrainerMetrics
from recipes.training.cached_candidates import CachedCandidates
from recipes.training.loss_parts import LossParts


@pytest.mark.parametrize("reader", ["llama", "hstu"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, reader):
    dropout = {"ranking_dropout": 0.3, "embedding_dropout": 0.2, "negatives_per_item": 1.5, "dense_loss_weight": 0.5}
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
    dataset = histories_dataset(whole, 24)  # ragged rows: micro-batches of unequal size
    losses = run_trainer(tmp_path / "a", whole, dataset, max_steps=3)
    parts = run_trainer(
        tmp_path / "b", accumulated, dataset, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    np.testing.assert_allclose(parts, losses, rtol=1e-5)
    assert_same_weights(whole.named_parameters(), accumulated.named_parameters(), 1e-4)


WORKER = """
import json, os, sys
root, out = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import torch
from helpers import ATOMIC, build_enhancer, build_model, collate, enhancer_rows, histories_dataset, run_trainer
from helpers import second_stage_rows
from recipes.training.adaptive_weighter import AdaptiveWeighter
from recipes.training.cached_candidates import CachedCandidates
from safetensors.torch import save_file
from transformers import TrainerState, TrainingArguments
rank = os.environ["RANK"]
single = dict(per_device_train_batch_size=2)

model = build_model()
losses = run_trainer(out, model, histories_dataset(model, 24), max_steps=3, **single)
save_file({name: p.detach().clone() for name, p in model.named_parameters()}, f"{out}/weights-{rank}.safetensors")
if rank == "0":
    open(f"{out}/losses.json", "w").write(json.dumps(losses))

saving = dict(max_steps=6, save_strategy="steps", save_steps=3, restore_callback_states_from_checkpoint=True)
for name, resume in (("whole", None), ("resumed", f"{out}/checkpoint-3")):
    model = build_model()
    weights = run_trainer(out, model, histories_dataset(model, 24), resume, [AdaptiveWeighter(2)], **single, **saving)
    open(f"{out}/task-weights-{name}-{rank}.json", "w").write(json.dumps(weights))

model = build_model(**ATOMIC)
enhancer = build_enhancer(model, warm_up_epochs=0)
options = dict(callbacks=[enhancer], collator=enhancer.collator(collate), remove_unused_columns=False)
run_trainer(out, model, enhancer_rows(enhancer), max_steps=2, **single, **options)

model = build_model(num_retrieved_items=3)
cached = CachedCandidates(model, second_stage_rows(model), num_beams=5, batch_size=3)
args = TrainingArguments(out, use_cpu=True, disable_tqdm=True)
cached.on_epoch_begin(args, TrainerState(epoch=0.0), None)
pools = {"negatives": enhancer.negatives, "favorites": enhancer.favorites, "candidates": cached.items}
save_file({name: pool.clone() for name, pool in pools.items()}, f"{out}/pools-{rank}.safetensors")
torch.distributed.barrier()  # the first process to end would abort the other
torch.distributed.destroy_process_group()
"""


def launch(worker, *arguments):
    """Run a worker's text in two processes, with the repository's root as its first argument."""
    script = Path(arguments[0]) / "worker.py"
    script.write_text(worker)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*torchrun, str(script), str(ROOT), *map(str, arguments)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    single = build_model()
    losses = run_trainer(tmp_path / "single", single, histories_dataset(single, 24), max_steps=3)
    launch(WORKER, tmp_path)
    first, second = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert_same_weights(first.items(), second.items())
    np.testing.assert_allclose(json.loads((tmp_path / "losses.json").read_text()), losses, rtol=1e-4)
    assert_same_weights(first.items(), single.named_parameters(), 2e-3)
    whole, *others = [
        json.loads((tmp_path / f"task-weights-{name}-{rank}.json").read_text())
        for name in ("whole", "resumed")
        for rank in (0, 1)
    ]
    assert all(other == whole for other in others), "resumed inside a window"
    assert whole[:4] == [1.0] * 4 and whole[4] == whole[5] != 1.0
    first, second = (load_file(tmp_path / f"pools-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(pool, second[name]) for name, pool in first.items())
    assert ((first["negatives"] >= 0) | (first["favorites"][:, :1] >= 0)).any(dim=1).all(), "every user has some"
    model = build_model(num_retrieved_items=3)
    cached = CachedCandidates(model, second_stage_rows(model), num_beams=5, batch_size=3)
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    cached.on_epoch_begin(args, TrainerState(epoch=0.0), None)
    assert torch.equal(first["candidates"], cached.items), "equal to those of one process"


SHARDED_WORKER = """
import sys
root, out = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import torch
import torch.distributed as dist
from helpers import ATOMIC, build_model, collate, histories_dataset, random_histories, second_stage_rows
from modeling_unigrf import UniGRFForCausalLM
from modeling_unigrf.loading_unigrf import register_calls
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")

def load(folder, how):
    if how is not None:
        return UniGRFForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**how))
    model = UniGRFForCausalLM.from_pretrained(folder)
    for layer in next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
        fully_shard(layer)
    return register_calls(fully_shard(model))

def losses(model, rows):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    values = []
    for step in range(3):
        torch.manual_seed(step)
        loss = model(**collate([rows[row] for row in range(4 * step, 4 * step + 4)])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values

def lists(model, **inputs):
    output = model.recommend(*histories, num_beams=6, **inputs)
    logits = model.rank(*histories, output.item_indices[:, :3], **inputs)
    return output.item_indices, torch.cat([output.scores, logits.flatten(1)], dim=1)

for name, reader, how, fields in (
    ("tp", "llama", {"tp_size": 2}, {}),
    ("fsdp", "llama", {"fsdp_size": 2}, {"history_item_representations": True}),
    ("shard", "hstu", None, {}),
    ("tied", "llama", None, {"tie_word_embeddings": True, **ATOMIC}),
    ("stage-two", "llama", None, {"num_retrieved_items": 3, "num_train_beams": 4}),
):
    whole = build_model(reader, **fields)
    if dist.get_rank() == 0:
        whole.save_pretrained(f"{out}/{name}")
    dist.barrier()
    rows = second_stage_rows(whole) if name == "stage-two" else histories_dataset(whole, 12)
    expected = losses(whole.train(), rows)
    model = load(f"{out}/{name}", how)
    found = losses(model.train(), rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=f"losses of {name}: {found}, {expected}")
    histories = random_histories(whole, [4, 2, 3])[:2]
    long = {}
    if name == "stage-two":
        long = {"long_history": {"items": torch.arange(9).view(3, 3), "behaviors": torch.zeros(3, 3).long()}}
    (items, scores), (expected_items, expected_scores) = lists(model.eval(), **long), lists(whole.eval(), **long)
    assert torch.equal(items, expected_items), f"items of {name}"
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)
    if how is not None:
        model.save_pretrained(f"{out}/{name}-saved")
        dist.barrier()
        saved = dict(UniGRFForCausalLM.from_pretrained(f"{out}/{name}-saved").named_parameters())
        for key, weight in whole.named_parameters():
            torch.testing.assert_close(saved[key], weight, rtol=1e-4, atol=1e-4)
    dist.barrier()
    if dist.get_rank() == 0:
        print(name, "equal")
dist.destroy_process_group()
"""


def test_a_model_spread_over_two_processes_equals_a_whole_one(tmp_path):
    equal = [line for line in launch(SHARDED_WORKER, tmp_path).splitlines() if line.endswith(" equal")]
    assert equal == [f"{name} equal" for name in ("tp", "fsdp", "shard", "tied", "stage-two")]


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_a_nan_loss_is_reported_also_after_the_last_log(tmp_path, logging_steps):
    model = build_model()
    with torch.no_grad():
        model.ranking_head.out_proj.bias.fill_(float("nan"))
    steps = {"max_steps": 1, "logging_steps": logging_steps}
    with pytest.raises(ValueError, match="losses must be finite"):
        run_trainer(tmp_path, model, histories_dataset(model, 4), callbacks=[LossParts(model)], **steps)


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
def test_prompt_tuning_and_per_row_adapters_reach_the_beams():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = build_model(codebook_sizes=(4, 3, 2), num_items=12)
    input_ids, mask, _ = random_histories(model, [3, 3])
    arguments = {"input_ids": input_ids, "attention_mask": mask, "num_beams": 12, "num_return_sequences": 12}
    arguments |= {"output_scores": True, "return_dict_in_generate": True}
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    output = prompted.generate(**arguments)
    with torch.no_grad():
        logits = prompted(input_ids=output.sequences, attention_mask=torch.ones_like(output.sequences)).logits
    expected = 0.0
    for level, tokens in enumerate(output.sequences[:, -3:].T):
        codes = model.layout.level_slices[level]
        log_probs = logits[:, level - 4, codes].log_softmax(dim=-1)
        expected = expected + log_probs.gather(1, tokens[:, None] - codes.start)[:, 0]
    torch.testing.assert_close(output.sequences_scores, expected, atol=2e-5, rtol=1e-4)

    model = build_model(codebook_sizes=(4, 3, 2), num_items=12)
    plain = model.generate(**arguments).sequences_scores
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with_it, mixed = (
        adapted.generate(**arguments, **options).sequences_scores
        for options in ({}, {"adapter_names": ["default", "__base__"]})
    )
    torch.testing.assert_close(mixed, torch.cat([with_it[:12], plain[12:]]), atol=2e-5, rtol=1e-4)
    assert ((with_it - plain).view(2, 12).abs().amax(dim=1) > 1e-2).all()


def test_changes_that_an_adapter_would_hide_are_rejected():
    from peft import LoraConfig, get_peft_model

    model = build_model(codebook_sizes=(4, 3, 2), num_items=12)
    assert (
        "item_encoder" in model.modules_to_save and "item_encoder" not in build_model(embeddings=False).modules_to_save
    )
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=model.modules_to_save))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("item_encoder" in name and "table" in name for name in trained)
    new = torch.tensor([[*model.catalog.item_codes[0, :2].tolist(), 2]])
    vector = torch.randn(1, 6)
    with pytest.raises(ValueError, match="Merge the adapter first"):
        model.add_items(new, vector)
    assert (model.catalog.num_items, model.config.num_items, model.config.codebook_sizes) == (12, 12, [4, 3, 2])
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
        expected = model(input_ids, mask, labels=input_ids).loss
        before = model.catalog.item_codes
        get_peft_model(model, LoraConfig(**of_table))
        torch.testing.assert_close(model(input_ids, mask, labels=input_ids).loss, expected)
        with pytest.raises(ValueError, match="Merge the adapter first"):
            model.add_items((before[:1] + 1) % torch.tensor([4, 3, 3, 2]), vector)
        assert model.catalog.item_codes is before and len(before) == model.config.num_items

    model = build_model(codebook_sizes=(30,), code_similarity="cosine")
    input_ids, mask, _ = random_histories(model, [4, 2])
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"`lm_head` must be a plain layer .* got an adapter on it"):
        adapted(input_ids=input_ids, attention_mask=mask)


def test_a_trainer_that_takes_the_labels_is_rejected(tmp_path):
    model = build_model()
    with pytest.raises(ValueError, match=r"`labels` must reach the model.* Set label_smoothing_factor=0"):
        run_trainer(tmp_path, model, histories_dataset(model, 4), label_smoothing_factor=0.1)


def test_quantization_leaves_all_parts_but_the_backbone_alone(backbone):
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = build_model(backbone, num_retrieved_items=2)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in layers if should_convert_module(name, model.modules_to_not_convert)}
    assert converted == {name for name in layers if name.startswith("model.")}
    assert {"lm_head", *(name for name in model.modules_to_save if "embed" not in name and "wte" not in name)} == set(
        model.modules_to_not_convert
    ), "an adapter trains these parts whole"


def metric_rows(model):
    """Draw rows of one history, and one packed row of two; the last item of each is its target."""
    rows = list(histories_dataset(model, 7, lengths=(2, 3, 5)))
    rows.append({name: rows[0][name] + rows[1][name] for name in rows[0]})
    return rows


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("metric", ["generation_loss", "ranking_loss", "dense_loss", "recall@3"])
def test_the_stock_trainer_keeps_the_best_by_each_metric(tmp_path, metric, adapted):
    from peft import LoraConfig, get_peft_model

    plain = build_model(dense_loss_weight=1.0, num_beams=10)
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)) if adapted else plain
    metrics = TrainerMetrics(model, top_k=3)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        per_device_eval_batch_size=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=metric.startswith("recall"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = metric_rows(plain)
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=histories_dataset(plain, 16, seed=50),
        eval_dataset=rows,
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.preprocess,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len({entry[f"eval_{metric}"] for entry in logged}) > 1
    choose = max if metric.startswith("recall") else min
    best = choose(logged, key=lambda entry: entry[f"eval_{metric}"])
    assert trainer.state.best_metric == best[f"eval_{metric}"]
    again = trainer.evaluate()
    assert again[f"eval_{metric}"] == pytest.approx(best[f"eval_{metric}"], rel=1e-5), "the best is loaded"

    # By hand, row for row.
    plain.eval()
    expected = {name: [] for name in ("generation_loss", "ranking_loss", "dense_loss", "recall@3")}
    for start in range(0, len(rows), 3):
        batch = rows[start : start + 3]
        with torch.no_grad():
            output = plain(**collate(batch))
        for name in ("generation_loss", "ranking_loss", "dense_loss"):
            expected[name] += [output[name].item()] * len(batch)
    for row in rows:
        tokens = torch.tensor(row["input_ids"])
        tokens = tokens[int((tokens == plain.config.bos_token_id).nonzero()[-1]) :]
        listed = plain.recommend(tokens[None, :-5], num_return_sequences=3).item_indices[0]
        target = plain.catalog.trie.lookup(tokens[None, -5:-1] - torch.tensor(plain.config.code_offsets))
        expected["recall@3"].append(float(target in listed))
    for name, values in expected.items():
        assert again[f"eval_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4), name


def test_recall_reads_times_and_long_histories(tmp_path):
    for options, extra in (
        ({"backbone": "hstu"}, "timestamps"),
        ({"num_retrieved_items": 2, "num_train_beams": 4}, "long_history"),
    ):
        model = build_model(**options)
        metrics = TrainerMetrics(model, top_k=30)
        batch = collate(list(second_stage_rows(model, 4) if extra == "long_history" else histories_dataset(model, 4)))
        if extra == "timestamps":
            batch["timestamps"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).clone()
        batch["labels"][0] = -100
        with torch.no_grad():
            output = model(**batch)
        values = metrics.preprocess(output.logits, batch["labels"])
        place = metrics.names.index("recall@30")
        assert values[:, place].isnan().tolist() == [True, False, False, False]
        assert (values[1:, place] == 1).all(), "the list is the whole catalog"
    with pytest.raises(ValueError, match="`top_k` must be 1 or more, got 0"):
        TrainerMetrics(model, top_k=0)
    with pytest.raises(ValueError, match="`preprocess` must follow a forward with labels"):
        metrics.preprocess(None, batch["labels"])

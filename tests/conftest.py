"""Tiny models over random catalogs, random histories of their items, and a made-up world for the recipes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the tests are offline
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, Trainer, TrainingArguments

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes.prepare import PrepareArguments, prepare
from recipes.training.adaptive_weighter import AdaptiveWeighter

torch.set_num_threads(1)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BACKBONES = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 9},
    "hstu": {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 256, "num_time_buckets": 16},
    # One layer that sees everything and one that does not.
    "qwen2": {
        **SMALL,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


def random_codes(num_items: int, codebook_sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    """Distinct spellings, `[num_items, L]`, drawn from all that there are."""
    total = int(torch.tensor(codebook_sizes).prod())
    drawn = torch.randperm(total, generator=generator)[:num_items]
    return torch.stack(torch.unravel_index(drawn, tuple(codebook_sizes)), dim=1)


def build_model(backbone="llama", codebook_sizes=(4, 3, 3, 2), num_items=30, seed=0, embeddings=True, **config):
    """A random model in eval mode whose weights are far from uniform, so that no score is a near tie."""
    generator = torch.Generator().manual_seed(seed)
    config = {
        "behaviors": ["dislike", "like"],
        "exclude_history": False,
        "content_embedding_dim": 6 if embeddings else 0,
        "embedding_table_size": num_items if embeddings else 0,
        "num_items": num_items,
        **config,
    }
    text_config = AutoConfig.for_model(backbone, **BACKBONES[backbone])
    torch.manual_seed(seed)
    model = UniGRFForCausalLM(UniGRFConfig(text_config=text_config, codebook_sizes=list(codebook_sizes), **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    codes = random_codes(num_items, list(codebook_sizes), generator)
    model.set_catalog(codes, torch.randn(num_items, 6, generator=generator) if embeddings else None)
    return model.eval()


def random_histories(model, lengths, seed=0):
    """Left-padded random histories: `input_ids`, `attention_mask`, and the items of each row."""
    generator = torch.Generator().manual_seed(seed)
    config, rows, items = model.config, [], []
    for length in lengths:
        chosen = torch.randint(model.catalog.num_items, (length,), generator=generator)
        behaviors = torch.randint(len(config.behaviors), (length, 1), generator=generator)
        tokens = model.layout.item_tokens(model.catalog.item_codes[chosen].long())
        block = torch.cat([tokens, torch.tensor(config.behavior_token_ids)[behaviors]], dim=1).flatten()
        rows.append(torch.cat([torch.tensor([config.bos_token_id]), block]))
        items.append(chosen.tolist())
    width = max(map(len, rows))
    input_ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return input_ids, (input_ids != config.pad_token_id).long(), items


def exact_scores(model, input_ids, attention_mask):
    """`log P` of every item after every history, `[B, num_items]`, by plain forwards without any cache."""
    codes, layout = model.catalog.item_codes.long(), model.layout
    scores = torch.empty(len(input_ids), len(codes))
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        history = ids[mask.bool()].expand(len(codes), -1)
        sequence = torch.cat([history, layout.item_tokens(codes)], dim=1)
        with torch.no_grad():
            logits = model(input_ids=sequence).logits
        total = torch.zeros(len(codes))
        for level in range(layout.num_levels):
            log_probs = logits[:, history.shape[1] - 1 + level, layout.level_slice(level)].log_softmax(dim=-1)
            total += log_probs.gather(1, codes[:, level : level + 1])[:, 0]
        scores[row] = total
    return scores


def watch_negatives(model):
    """A dict that the model's next forwards fill: `negatives`, as packed, and `calls`, what the ranking head returned."""
    seen = {}
    model.ranking_head.register_forward_hook(lambda module, args, out: seen.setdefault("calls", []).append(out))
    original = model._pack

    def keep(*args):
        *rest, seen["negatives"] = original(*args)
        return *rest, seen["negatives"]

    model._pack = keep
    return seen


@pytest.fixture(params=list(BACKBONES))
def backbone(request):
    return request.param


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


TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 256}
GRID = {"neighbors": (20,), "shrink": (0.0,), "window": (3,)}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """40 users who walk along a ring of 30 items: what comes next can be learned."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        start, length = rng.integers(30), rng.integers(6, 20)
        for step in range(length):
            item = (start + step) % 30
            rows.append((f"u{user}", f"i{item}", step, "like" if item % 2 else "dislike"))
    angles = np.arange(30) / 30 * 2 * np.pi
    embeddings = np.stack([np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(3 * angles)], axis=1)
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "behavior"]).to_parquet(
        folder / "interactions.parquet"
    )
    items = {"item_id": [f"i{item}" for item in range(30)], "title": [f"Film {item}" for item in range(30)]}
    pd.DataFrame({**items, "embedding": embeddings.tolist()}).to_parquet(folder / "items.parquet")
    return prepare(
        PrepareArguments(
            interactions=str(folder / "interactions.parquet"),
            items=str(folder / "items.parquet"),
            output_dir=str(folder / "data"),
            codebook_sizes=[8, 8],
        )
    )


def preferring(weight: float, targets: list[int]) -> dict[str, torch.Tensor]:
    """Scores of three candidates a user, of which the target is first with this weight of the ranking, of .5 and 1."""
    generation, ranking = {0.5: ([-1.0, 0.0, -1.7], [-1.0, -4.0, 0.0]), 1.0: ([-1.0, 0.0, -9.0], [0.0, -1.5, 0.0])}[
        weight
    ]
    return {
        "item_indices": torch.tensor([[target, (target + 1) % 30, (target + 2) % 30] for target in targets]),
        "generation_scores": torch.tensor([generation] * len(targets)),
        "ranking_scores": torch.tensor([ranking] * len(targets)),
        "dense_scores": torch.zeros(len(targets), 3),
    }

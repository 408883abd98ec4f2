"""What the tests share: tiny random models, their histories, exact scores, data sets and trainings."""

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, Trainer, TrainingArguments

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes.training.adaptive_weighter import AdaptiveWeighter
from recipes.training.enhancer import EnhancerOptions, RankingDrivenEnhancer
from tokenization import SemanticIdTokenizer

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


def long_histories(model, lengths, seed=5):
    """Right-padded long histories with repeats: `long_items` and `long_behaviors` of shape [B, H]."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.full((len(lengths), max(lengths)), -1)
    for row, length in enumerate(lengths):
        items[row, :length] = torch.randint(model.catalog.num_items // 2, (length,), generator=generator)
    behaviors = torch.randint(len(model.config.behaviors), items.shape, generator=generator)
    return {"long_items": items, "long_behaviors": behaviors}


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


def second_stage_rows(model, count=16) -> Dataset:
    rows = []
    for row in range(count):
        input_ids, _, _ = random_histories(model, [row % 5 + 1], seed=row)
        longer = {name: value[0].tolist() for name, value in long_histories(model, [row + 1], seed=row).items()}
        ids = input_ids[0].tolist()
        rows.append({"row": row, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids, **longer})
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


ATOMIC = {"codebook_sizes": (40,), "num_items": 40, "embeddings": False, "code_negatives": 12}


def users_of(model, count=6, length=9):
    generator = np.random.default_rng(0)
    lengths = [1] + [length] * (count - 1)  # of one item nothing is before the last
    items = [generator.choice(model.catalog.num_items, size=size, replace=False).tolist() for size in lengths]
    return items, [generator.integers(0, 2, size=size).tolist() for size in lengths]


def build_enhancer(model, with_times=False, **options):
    codes = model.catalog.item_codes.numpy()
    ids = [f"i{number}" for number in range(len(codes))]
    titles = [f"Film {number}" for number in range(len(codes))]
    tokenizer = SemanticIdTokenizer.from_codes(
        ids, codes, model.config.codebook_sizes, model.config.behaviors, titles=titles
    )
    options = {"pool_size": 12, "num_negatives": 3, "threshold": 0.6, "warm_up_epochs": 1, **options}
    items, behaviors = users_of(model)
    times = [list(np.random.default_rng(5).integers(1, 10**6, size=len(one)).cumsum()) for one in items]
    times = times if with_times else None
    return RankingDrivenEnhancer(model, tokenizer, items, behaviors, times, EnhancerOptions(**options))


def enhancer_rows(enhancer):
    rows = []
    for user, (items, behaviors) in enumerate(zip(enhancer.items, enhancer.behaviors, strict=True)):
        tokens = enhancer.tokenizer.encode_indices(np.array(items), np.array(behaviors)).tolist()
        rows.append({"user": user, "last": True, "input_ids": tokens, "attention_mask": [1] * len(tokens)})
        rows[-1]["labels"] = tokens
    return Dataset.from_list(rows)


NO_PROJECT = """
import sys
class NoProject:  # an editable install would be found from everywhere
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_unigrf", "tokenization", "recipes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoProject())
try:
    import modeling_unigrf
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the project is importable")
"""

"""Helpers of all tests: tiny random models, histories, exact scores, datasets and short training runs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, GenerationMixin, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from modeling_unigrf import ServingOptions, UniGRFConfig, UniGRFForCausalLM, UniGRFTrainingConfig
from recipes.training.adaptive_weighter import AdaptiveWeighter
from recipes.training.enhancer import EnhancerOptions, RankingDrivenEnhancer
from tokenization import SemanticIdTokenizer

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BACKBONES = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 9},
    "hstu": {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 256, "num_time_buckets": 16},
    # One layer with full attention and one with a sliding window.
    "qwen2": {
        **SMALL,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


def short_id(value):
    """Name a parameter of a test in at most 20 characters: a dict by its keys, others by their text."""
    if isinstance(value, dict):
        value = " ".join(map(str, value))
    if not isinstance(value, str | bytes | list | tuple):
        return None  # as pytest names it
    return re.sub(r"\W+", "-", str(value)).strip("-")[:20]


def random_codes(num_items: int, codebook_sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    """Draw distinct codes of items, `[num_items, L]`."""
    total = int(torch.tensor(codebook_sizes).prod())
    drawn = torch.randperm(total, generator=generator)[:num_items]
    return torch.stack(torch.unravel_index(drawn, tuple(codebook_sizes)), dim=1)


def split_options(options: dict) -> tuple[dict, dict]:
    """Sort options by name into fields of `UniGRFConfig`, those of training nested, and of `generation_config`."""
    training_names = {field.name for field in fields(UniGRFTrainingConfig)}
    serving_names = {field.name for field in fields(ServingOptions)}
    training = {name: value for name, value in options.items() if name in training_names}
    serving = {name: value for name, value in options.items() if name in serving_names}
    model = {name: value for name, value in options.items() if name not in training_names | serving_names}
    return {**model, "training_config": training}, serving


def build_model(backbone="llama", codebook_sizes=(4, 3, 3, 2), num_items=30, seed=0, embeddings=True, **options):
    """
    Build a random model in eval mode. Its weights are large, so that no two scores are nearly equal.

    `options` holds fields of `UniGRFConfig`, `UniGRFTrainingConfig` and `ServingOptions`. Without any, the model has
    neither dropout nor negatives nor a dense loss.
    """
    generator = torch.Generator().manual_seed(seed)
    options = {
        "behaviors": ["dislike", "like"],
        "exclude_history": False,
        "content_embedding_dim": 6 if embeddings else 0,
        "embedding_table_size": num_items if embeddings else 0,
        "history_item_representations": False,
        "num_items": num_items,
        "ranking_dropout": 0.0,
        "embedding_dropout": 0.0,
        "negatives_per_item": 0.0,
        "dense_loss_weight": 0.0,
        **options,
    }
    config, serving = split_options(options)
    text_config = AutoConfig.for_model(backbone, **BACKBONES[backbone])
    torch.manual_seed(seed)
    model = UniGRFForCausalLM(UniGRFConfig(text_config=text_config, codebook_sizes=list(codebook_sizes), **config))
    model.generation_config.update(**serving, allow_custom_entries=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    codes = random_codes(num_items, list(codebook_sizes), generator)
    model.set_catalog(codes, torch.randn(num_items, 6, generator=generator) if embeddings else None)
    return model.eval()


def random_histories(model, lengths, seed=0):
    """Draw left-padded histories: `input_ids`, `attention_mask`, and the items of each row."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    rows = []
    items = []
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


def labeled_batch(model, lengths, seed=0):
    """Draw left-padded histories with labels: the inputs of a forward, and the items of each row."""
    input_ids, mask, items = random_histories(model, lengths, seed)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}, items


def prefilled_cache(model, input_ids, attention_mask):
    """Return a cache with the keys and values of the histories."""
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids, attention_mask, cache=cache, use_cache=True)
    return cache


def exact_scores(model, input_ids, attention_mask):
    """Compute `log P` of every item after every history, `[B, num_items]`, by plain forwards without a cache."""
    codes = model.catalog.item_codes.long()
    layout = model.layout
    scores = torch.empty(len(input_ids), len(codes))
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        history = ids[mask.bool()].expand(len(codes), -1)
        sequence = torch.cat([history, layout.item_tokens(codes)], dim=1)
        with torch.no_grad():
            logits = model(input_ids=sequence).logits
        total = torch.zeros(len(codes))
        for level in range(layout.num_levels):
            log_probs = logits[:, history.shape[1] - 1 + level, layout.level_slices[level]].log_softmax(dim=-1)
            total += log_probs.gather(1, codes[:, level : level + 1])[:, 0]
        scores[row] = total
    return scores


def long_histories(model, lengths, seed=5):
    """Draw right-padded long histories with repeated items, as `recommend` takes them."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.full((len(lengths), max(lengths)), -1)
    for row, length in enumerate(lengths):
        items[row, :length] = torch.randint(model.catalog.num_items // 2, (length,), generator=generator)
    behaviors = torch.randint(len(model.config.behaviors), items.shape, generator=generator)
    return {"long_history": {"items": items, "behaviors": behaviors}}


def select_rows(inputs, rows):
    """Select rows of a batch, also inside its nested inputs."""
    return {
        name: select_rows(value, rows) if isinstance(value, dict) else value[rows] for name, value in inputs.items()
    }


def retrieve_by_sorting(embeddings, items, candidate, count):
    """Find the places of a candidate's sub-history by sorting the whole long history."""
    direction = torch.nn.functional.normalize(embeddings.double(), dim=1)
    known = [place for place, item in enumerate(items) if item >= 0]
    cosine = {item: round(float(direction[item] @ direction[candidate]), 6) for item in items if item >= 0}
    return sorted(sorted(known, key=lambda place: (-cosine[items[place]], -place))[:count])


@torch.no_grad()
def rank_alone(model, input_ids, mask, candidates, long_history=None, times=None):
    """
    Rank every candidate, with its sub-history, by a forward of its own over the unpadded history: no cache, no mask.

    `times` holds the timestamps `[B, T]` and the query times `[B]`.
    """
    config = model.config
    embed = model.get_input_embeddings()
    long_history = long_history or {}
    scores = torch.empty(*candidates.shape, len(config.ranking_targets))
    for row in range(len(input_ids)):
        history = input_ids[row][mask[row].bool()]
        for column, item in enumerate(candidates[row]):
            codes = model.catalog.item_codes[item].long()
            inputs = [embed(torch.cat([history, model.layout.item_tokens(codes)]))]
            vector = model.scorer.representations(item)
            if config.num_retrieved_items:
                segments = model.candidate_block.segments.weight
                embeddings = model.catalog.content_embeddings
                long_items = long_history["items"][row]
                places = retrieve_by_sorting(embeddings, long_items.tolist(), int(item), config.num_retrieved_items)
                behavior_ids = torch.tensor(config.behavior_token_ids)[long_history["behaviors"][row, places]]
                retrieved = model.scorer.representations(long_items[places]) + embed(behavior_ids) + segments[1]
                inputs += [vector[None] + segments[0], retrieved, vector[None] + segments[2]]
            timed = {}
            if times is not None:
                history_times = times[0][row][mask[row].bool()]
                query_time = times[1][row : row + 1]
                item_times = query_time.expand(model.layout.num_levels + 1)
                all_times = torch.cat([history_times, item_times, long_history["timestamps"][row, places], query_time])
                later = torch.cat([history_times[1:], query_time.expand(len(all_times) - len(history_times) + 1)])
                timed = {"timestamps": all_times[None], "target_timestamps": later[None]}
            states = model.model(inputs_embeds=torch.cat(inputs)[None], **timed).last_hidden_state[0]
            scores[row, column] = model.ranking_head(states[-1], states[len(history) - 1], vector)
    return scores


# Arguments of `generate` that replace the search by transformers' own.
STOCK_BEAM_SEARCH = {"custom_generate": GenerationMixin._beam_search}


class PackedNegatives(NamedTuple):
    """Negatives that a forward packed behind the histories."""

    items: torch.LongTensor  # [B, M], all that were packed
    ranked: list[tuple[int, int, int]]  # row, position of the history's end, and item of each that was ranked
    logits: torch.Tensor  # [n, num_targets], of those that were ranked


def forward_with_negatives(model, batch):
    """Run a forward with labels in eval mode. Return its output and the negatives behind the histories."""
    inputs = {}
    calls = []

    def number_positions(module, args, output):
        states = output.last_hidden_state
        numbers = torch.arange(states[..., 0].numel(), dtype=states.dtype).view(*states.shape[:2], 1)
        output.last_hidden_state = numbers.expand_as(states).clone()
        return output

    hooks = [
        model.model.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True),
        model.ranking_head.register_forward_hook(lambda module, args, output: calls.append((args[0], output))),
    ]
    output = model(**batch)
    logits = torch.cat([logits.flatten(0, -2) for _, logits in calls])
    calls.clear()
    # Again, with numbers in place of the states: they say which position is ranked.
    hooks.append(model.model.register_forward_hook(number_positions))
    model(**batch)
    places = torch.cat([states[..., 0].flatten() for states, _ in calls]).long()
    for hook in hooks:
        hook.remove()

    num_levels = model.config.num_levels
    length = batch["input_ids"].shape[1]
    codes = inputs["input_ids"][:, length:].unflatten(1, (-1, num_levels)) - torch.tensor(model.config.code_offsets)
    items = model.catalog.trie.lookup(codes.flatten(0, 1)).view(len(codes), -1)
    rows = places // inputs["input_ids"].shape[1]
    positions = places % inputs["input_ids"].shape[1]
    is_negative = positions >= length
    ranked = []
    for row, position in zip(rows[is_negative].tolist(), positions[is_negative].tolist(), strict=True):
        column, level = divmod(position - length, num_levels)
        assert level == num_levels - 1, "an item is ranked at its last code"
        position_ids = inputs["position_ids"][row]
        end = (position_ids[:length] == position_ids[position - level] - 1).nonzero()[-1]
        ranked.append((row, int(end), int(items[row, column])))
    return output, PackedNegatives(items, ranked, logits[is_negative])


def collate(rows):
    """Pad rows of token ids, masks and labels on the right; nest their long histories, if they have some."""

    def padded(name, fill):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)

    batch = {name: padded(name, fill) for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))}
    if "long_items" in rows[0]:
        batch["long_history"] = {"items": padded("long_items", -1), "behaviors": padded("long_behaviors", -1)}
    return batch


def histories_dataset(model, count, seed=0, lengths=(1, 2, 5, 3)):
    """Draw a training set of single histories."""
    rows = []
    for index in range(count):
        ids, mask, _ = random_histories(model, [lengths[index % len(lengths)]], seed=seed + index)
        rows.append({"input_ids": ids[0].tolist(), "attention_mask": mask[0].tolist(), "labels": ids[0].tolist()})
    return Dataset.from_list(rows)


def second_stage_rows(model, count=16) -> Dataset:
    """Draw a training set of stage II: histories with their long histories and the number of the row."""
    rows = []
    for row in range(count):
        input_ids, _, _ = random_histories(model, [row % 5 + 1], seed=row)
        long_history = long_histories(model, [row + 1], seed=row)["long_history"]
        longer = {f"long_{name}": value[0].tolist() for name, value in long_history.items()}
        ids = input_ids[0].tolist()
        rows.append({"row": row, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids, **longer})
    return Dataset.from_list(rows)


def run_trainer(folder, model, dataset, resume=None, callbacks=None, collator=collate, **arguments):
    """Train with the stock `Trainer`. Return the logged losses, or the ranking weights of an adaptive weighter."""
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
    """Compare named parameters."""
    second = dict(second)
    for name, tensor in first:
        torch.testing.assert_close(
            tensor, second[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 256}
GRID = {"neighbors": (20,), "shrink": (0.0,), "window": (3,)}


def preferring(weight: float, targets: list[int]) -> dict[str, torch.Tensor]:
    """Make scores of three candidates a user. The target is first at this ranking weight, out of 0.5 and 1."""
    generation, ranking = {0.5: ([-1.0, 0.0, -1.7], [-1.0, -4.0, 0.0]), 1.0: ([-1.0, 0.0, -9.0], [0.0, -1.5, 0.0])}[
        weight
    ]
    return {
        "item_indices": torch.tensor([[target, (target + 1) % 30, (target + 2) % 30] for target in targets]),
        "generation_scores": torch.tensor([generation] * len(targets)),
        "ranking_scores": torch.tensor([ranking] * len(targets)),
        "dense_scores": torch.zeros(len(targets), 3),
        "transition_scores": torch.zeros(len(targets), 3),
    }


HISTORY = {"items": ["007", "film 12", "007", "film 3"], "behaviors": ["like", "dislike", "like", "like"]}
SHORT_HISTORY = {"items": ["film 5"], "behaviors": ["dislike"]}


def approximately(recommendations):
    """Make recommendations that equal those of the pipeline up to rounding."""
    return [
        {key: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value for key, value in row.items()}
        for row in recommendations
    ]


ATOMIC = {"codebook_sizes": (40,), "num_items": 40, "embeddings": False, "code_negatives": 12}


def random_users(model, count=6, length=9):
    """Draw the items and behaviors of some users, the first of whom has a single item."""
    generator = np.random.default_rng(0)
    lengths = [1] + [length] * (count - 1)
    items = [generator.choice(model.catalog.num_items, size=size, replace=False).tolist() for size in lengths]
    return items, [generator.integers(0, 2, size=size).tolist() for size in lengths]


def build_enhancer(model, with_times=False, **options):
    """Build an enhancer over random users."""
    codes = model.catalog.item_codes.numpy()
    ids = [f"i{number}" for number in range(len(codes))]
    titles = [f"Film {number}" for number in range(len(codes))]
    tokenizer = SemanticIdTokenizer.from_codes(
        ids, codes, model.config.codebook_sizes, model.config.behaviors, titles=titles
    )
    options = {"pool_size": 12, "num_negatives": 3, "threshold": 0.6, "warm_up_epochs": 1, **options}
    items, behaviors = random_users(model)
    times = [list(np.random.default_rng(5).integers(1, 10**6, size=len(history)).cumsum()) for history in items]
    times = times if with_times else None
    return RankingDrivenEnhancer(model, tokenizer, items, behaviors, times, EnhancerOptions(**options))


def enhancer_rows(enhancer):
    """Make the training set of an enhancer's users, a history a row."""
    rows = []
    for user, (items, behaviors) in enumerate(zip(enhancer.items, enhancer.behaviors, strict=True)):
        tokens = enhancer.tokenizer.encode_indices(np.array(items), np.array(behaviors)).tolist()
        rows.append({"user": user, "last": True, "input_ids": tokens, "attention_mask": [1] * len(tokens)})
        rows[-1]["labels"] = tokens
    return Dataset.from_list(rows)


NO_PROJECT = """
import json, sys
class NoProject:  # an editable install is importable from every folder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_unigrf", "tokenization", "recipes", *{hidden}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, NoProject())
try:
    import modeling_unigrf
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the project is importable")
"""


def run_elsewhere(script, *arguments, folder, hidden=(), **environment):
    """Run a script in `folder` by a process that cannot import the project. Return the lines of its output."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    process = subprocess.run(
        [sys.executable, "-c", NO_PROJECT.format(hidden=tuple(hidden)) + script, *arguments],
        cwd=folder,
        env=variables | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(folder) / "home")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def train_flags(data_dir, output_dir, *flags, text_config=TINY):
    """Command-line arguments of a short training on the CPU."""
    paths = [f"--data_dir={data_dir}", f"--output_dir={output_dir}", f"--text_config={json.dumps(text_config)}"]
    return [*paths, "--use_cpu", "--save_strategy=no", "--disable_tqdm=True", *flags]

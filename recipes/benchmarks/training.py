"""Measure a training step beside one of transformers' Llama on the same rows.

    python -m recipes.benchmarks.training      # minutes on a CPU

Rows hold two packed histories. The contenders take turns in one process, under autocast to bfloat16: the stock model
with its own loss, and UniGRF with its losses one after the other. A step is forward and backward, without the
optimizer.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes.benchmarks.baselines import random_catalog
from recipes.common.arguments import COUNT, SEED, Range, check_ranges, parse_arguments
from recipes.common.files import write_json
from recipes.common.run_tracking import command, made_by

LEVELS = 4
CODES = 256
BACKBONE = {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}
STOCK = "transformers' Llama"
# The losses of each contender: fields of `UniGRFTrainingConfig`.
CONTENDERS: dict[str, dict[str, float]] = {
    "generation": {"ranking_loss_weight": 0.0, "dense_loss_weight": 0.0},
    "generation and ranking": {"dense_loss_weight": 0.0},
    "all losses": {},
    "all losses, a negative beside each item": {"negatives_per_item": 1.0},
}
RANGES: dict[str, Range] = {
    **dict.fromkeys(("hidden_size", "rows", "items", "catalog", "embedding_dim", "repeats"), COUNT),
    "seed": SEED,
}


@dataclass
class TrainingSpeedArguments:
    """Sizes and output of the benchmark."""

    output: str = field(
        default="recipes/benchmarks/results/training.json", metadata={"help": "JSON file of the figures."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the backbones, of four layers each."})
    rows: int = field(default=32, metadata={"help": "Rows of a batch."})
    items: int = field(default=20, metadata={"help": "Items of a row, half of them in each of its two histories."})
    catalog: int = field(default=12_000, metadata={"help": "Items of the catalog."})
    embedding_dim: int = field(default=384, metadata={"help": "Width of the content embeddings."})
    repeats: int = field(default=7, metadata={"help": "Steps of each contender; the median counts."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, catalog and histories."})


def build_models(args: TrainingSpeedArguments) -> dict[str, torch.nn.Module]:
    """Build the contenders, with the same catalog and backbones of the same size."""
    text_config = {**BACKBONE, "hidden_size": args.hidden_size, "intermediate_size": 4 * args.hidden_size}
    codes = random_catalog(args.catalog)
    embeddings = torch.randn(len(codes), args.embedding_dim)
    models: dict[str, torch.nn.Module] = {}
    for name, losses in CONTENDERS.items():
        config = UniGRFConfig(
            text_config={"model_type": "llama", **text_config},
            codebook_sizes=[CODES] * LEVELS,
            num_items=len(codes),
            content_embedding_dim=args.embedding_dim,
            training_config=dict(losses),
        )
        model = UniGRFForCausalLM(config)
        model.set_catalog(codes, embeddings)
        models[name] = model.train()
    stock = LlamaConfig(**text_config, vocab_size=config.vocab_size, pad_token_id=None)
    return {STOCK: LlamaForCausalLM(stock).train(), **models}


def make_rows(model: UniGRFForCausalLM, num_rows: int, num_items: int) -> torch.LongTensor:
    """Make rows `[num_rows, T]` of two packed histories of random items."""
    layout = model.layout
    items = torch.randint(model.catalog.num_items, (num_rows, 2, max(1, num_items // 2)))
    tokens = layout.item_tokens(model.catalog.item_codes[items].long())
    behaviors = torch.full((*items.shape, 1), layout.behavior_token_ids[0])
    history = torch.cat([tokens, behaviors], dim=3).flatten(2)
    bos = torch.full((num_rows, 2, 1), layout.bos_token_id)
    return torch.cat([bos, history], dim=2).flatten(1)


def measure_steps(args: TrainingSpeedArguments) -> dict[str, Any]:
    """Measure the steps of all contenders, in turns; the first turn warms up."""
    check_ranges(args, RANGES)
    torch.manual_seed(args.seed)
    models = build_models(args)
    model = models["generation"]
    assert isinstance(model, UniGRFForCausalLM)
    input_ids = make_rows(model, args.rows, args.items)
    labels = input_ids.masked_fill(input_ids == model.layout.bos_token_id, -100)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    steps: dict[str, Callable[[], None]] = {name: step_of(model, inputs) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(args.repeats + 1), desc="training steps", unit="turn"):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "contender": name,
            "milliseconds": round(1000 * value, 1),
            "tokens_per_second": round(input_ids.numel() / value),
            "of_stock": round(medians[STOCK] / value, 3),
        }
        for name, value in medians.items()
    ]
    sizes = f"{args.rows} rows of {input_ids.shape[1]} tokens, width {args.hidden_size}, {args.catalog:,} items"
    return {"sizes": sizes, "rows": rows, "made by": made_by(command("recipes.benchmarks.training", args))}


def step_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Make a function that runs a training step."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()

    return step


def table(result: dict[str, Any]) -> str:
    """Write the figures in Markdown."""
    lines = ["| a training step | ms | tokens a second | of transformers' Llama |", "| --- " * 4 + "|"]
    for row in result["rows"]:
        cells = [row["contender"], f"{row['milliseconds']:,.0f}", f"{row['tokens_per_second']:,}"]
        lines.append("| " + " | ".join([*cells, f"{row['of_stock']:.0%}"]) + " |")
    made = result["made by"]
    note = f"{result['sizes']}. `{made['command']}` on {made['machine']}, {made['versions']}, {made['date']}."
    return "\n".join([*lines, "", note])


def main(args: TrainingSpeedArguments) -> None:
    """Measure, and write the JSON file."""
    result = measure_steps(args)
    write_json(Path(args.output), result)
    print(table(result))


if __name__ == "__main__":
    main(*parse_arguments(TrainingSpeedArguments))

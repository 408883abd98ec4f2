"""Trains generation and ranking in one model, with the stock `Trainer`, on a prepared folder.

    python -m recipes.train --data_dir runs/demo/data --output_dir runs/demo/training --bf16 \
        --passes 8 --num_train_epochs 1 --learning_rate 2e-3 --per_device_train_batch_size 32
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.train ...     # several processes

Every argument of `transformers.TrainingArguments` is taken. Histories are cut into windows of `--max_items`; batches are
bucketed by length, so that padding does not eat the machine. The validation target of each user is held out of training
and its loss is the evaluation loss. A second run of the same command resumes from the last checkpoint in `--output_dir`.
The result, `--checkpoint_dir` (default: `output_dir/checkpoint`), holds model, tokenizer, codebooks, item map and code.
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, set_seed

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from tokenization import SemanticIdTokenizer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


@dataclass
class ModelArguments:
    """What is trained."""

    text_config: str = field(
        default=json.dumps(LLAMA), metadata={"help": "The backbone's config as JSON, as `AutoConfig` takes it."}
    )
    num_negatives: int = field(default=32, metadata={"help": "Random candidates a window, for the target `next`."})
    ranking_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the ranking loss."})
    ranking_dropout: float = field(default=0.1, metadata={"help": "Dropout in the ranking head."})
    rank_by_item_embeddings: bool = field(default=True, metadata={"help": "The ranking head reads item embeddings."})


@dataclass
class DataArguments:
    """What it is trained on."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    checkpoint_dir: str | None = field(default=None, metadata={"help": "Where the finished model goes."})
    max_items: int = field(default=50, metadata={"help": "Items of a training window, and of a history."})
    passes: int = field(default=1, metadata={"help": "Passes over the data in one epoch, each cut at other places."})


class LossParts(TrainerCallback):
    """Adds the mean of `generation_loss` and `ranking_loss` to what the Trainer logs."""

    names = ("generation_loss", "ranking_loss")

    def __init__(self, model: torch.nn.Module):
        self.parts: list[torch.Tensor] = []
        model.register_forward_hook(self._collect)

    def _collect(self, model, inputs, outputs):
        if model.training and outputs.loss is not None:
            self.parts.append(torch.stack([outputs[name].float() for name in self.names]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.parts:
            means = dict(zip(self.names, torch.stack(self.parts).mean(dim=0).tolist(), strict=True))
            self.parts.clear()
            logs.update(means)
            state.log_history[-1].update(means)


def training_windows(histories: Dataset, tokenizer: SemanticIdTokenizer, max_items: int, passes: int) -> Dataset:
    """
    Cuts histories into windows of at most `max_items` items, `passes` times, each pass at other places: every item is
    supervised once a pass, and every time with another amount of history before it.

    Returns:
        Dataset with `input_ids`, `attention_mask` and `labels` (every token but `<bos>` is supervised).
    """

    def cut(batch):
        rows = []
        for items, behaviors in zip(batch["items"], batch["behaviors"], strict=True):
            items, behaviors = np.array(items), np.array(behaviors)
            for offset in range(0, max_items, -(-max_items // passes)):
                ends = (
                    [len(items), *range(len(items) - offset, 0, -max_items)]
                    if offset
                    else [*range(len(items), 0, -max_items)]
                )
                for start, end in pairwise([0, *sorted(set(ends))]):
                    rows.append(tokenizer.encode_indices(items[start:end], behaviors[start:end]))
        return as_features(rows, [1] * len(rows))

    return histories.map(cut, batched=True, remove_columns=histories.column_names, desc="windows")


def held_out_windows(split: Dataset, tokenizer: SemanticIdTokenizer, max_items: int) -> Dataset:
    """Histories followed by their target, on which alone the loss is taken; columns as in `training_windows`."""

    def append(batch):
        rows = [
            tokenizer.encode_indices(
                np.array([*items[-max_items:], target]), np.array([*behaviors[-max_items:], last])
            )
            for items, behaviors, target, last in zip(
                batch["items"], batch["behaviors"], batch["target"], batch["target_behavior"], strict=True
            )
        ]
        return as_features(rows, [len(row) - tokenizer.num_levels - 1 for row in rows])

    return split.map(append, batched=True, remove_columns=split.column_names, desc="validation")


def as_features(rows: list[np.ndarray], unsupervised: list[int]) -> dict[str, list]:
    """Token rows -> the model's inputs, with the first `unsupervised` tokens of each row left out of the labels."""
    labels = []
    for row, count in zip(rows, unsupervised, strict=True):
        row = row.copy()
        row[:count] = -100
        labels.append(row)
    return {"input_ids": rows, "attention_mask": [np.ones_like(row) for row in rows], "labels": labels}


def build_model(args: ModelArguments, tokenizer: SemanticIdTokenizer, embeddings: torch.Tensor) -> UniGRFForCausalLM:
    """A fresh model for the tokenizer's items, with its catalogue set. `embeddings`: `[num_items, D]`."""
    if not args.rank_by_item_embeddings:
        embeddings = None
    config = UniGRFConfig(
        **tokenizer.config_fields(),
        text_config=json.loads(args.text_config),
        item_embedding_dim=0 if embeddings is None else embeddings.shape[1],
        num_negatives=args.num_negatives,
        ranking_loss_weight=args.ranking_loss_weight,
        ranking_dropout=args.ranking_dropout,
    )
    model = UniGRFForCausalLM(config)
    model.set_catalogue(torch.from_numpy(tokenizer.item_codes.copy()), embeddings)
    return model


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Trains, resuming where the last run stopped, and returns the folder of the finished model."""
    set_seed(training_args.seed)
    data_dir = Path(data_args.data_dir)
    tokenizer = SemanticIdTokenizer.from_pretrained(data_dir / "tokenizer")
    dataset = load_from_disk(str(data_dir / "dataset"))
    embeddings = load_file(data_dir / "item_embeddings.safetensors")["embeddings"]
    with training_args.main_process_first(desc="windows"):
        train_dataset = training_windows(dataset["train"], tokenizer, data_args.max_items, data_args.passes)
        eval_dataset = held_out_windows(dataset["validation"], tokenizer, data_args.max_items)
    model = build_model(model_args, tokenizer, embeddings)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[LossParts(model)],
    )
    last = get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None
    result = trainer.train(resume_from_checkpoint=last)
    folder = Path(data_args.checkpoint_dir or Path(training_args.output_dir) / "checkpoint")
    if trainer.is_world_process_zero():
        RecommendationPipeline(model=trainer.model, tokenizer=tokenizer).save_pretrained(folder)
        log = {"metrics": result.metrics, "log_history": trainer.state.log_history}
        (folder / "training_log.json").write_text(json.dumps(log, indent=1))
    return folder


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Command-line arguments, with defaults that suit this model unless given."""
    parser = HfArgumentParser([ModelArguments, DataArguments, TrainingArguments])
    parser.set_defaults(
        train_sampling_strategy="group_by_length",
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.98,
        per_device_eval_batch_size=128,
        prediction_loss_only=True,
        report_to="none",
    )
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    train(*parse())

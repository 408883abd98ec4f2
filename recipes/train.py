"""Trains generation and ranking in one model, with the stock `Trainer`, on a prepared folder.

    python -m recipes.train --data_dir runs/demo/data --output_dir runs/demo/training --bf16 \
        --passes 8 --num_train_epochs 1 --learning_rate 2e-3 --per_device_train_batch_size 32
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.train ...     # several processes

Every argument of `transformers.TrainingArguments` is taken. Histories are cut into windows of `--max_items`, and windows
packed into rows, so that padding does not eat the machine. The validation target of each user is held out of training
and its loss is the evaluation loss. A second run of the same command resumes from the last checkpoint in `--output_dir`, or
does nothing if that was finished; one with other arguments or data is refused there.
The result, `--checkpoint_dir` (default: `output_dir/checkpoint`), holds model, tokenizer, codebooks, item map and code.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
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
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, set_seed

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from recipes.callbacks import AdaptiveWeighter, LossParts
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
    negatives_per_item: float = field(default=1.0, metadata={"help": "Random candidates an item, for target `next`."})
    generation_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the generation loss; 0: ranking alone."}
    )
    ranking_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the ranking loss; 0: generation alone."}
    )
    adaptive_weights: bool = field(default=False, metadata={"help": "Weigh the losses by how slowly they converge."})
    adaptive_temperature: float = field(
        default=0.1, metadata={"help": "Of the adaptive weights; lower: further apart."}
    )
    adaptive_form: str = field(
        default="loss_ratio", metadata={"help": "Of the adaptive weights.", "choices": ["loss_ratio", "gradient_norm"]}
    )
    adaptive_window: int | None = field(default=None, metadata={"help": "Steps of their windows; default: an epoch."})
    item_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the softmax over items."})
    ranking_dropout: float = field(default=0.1, metadata={"help": "Dropout in the ranking head."})
    embedding_dropout: float = field(default=0.2, metadata={"help": "Dropout on the token embeddings."})
    rank_by_item_embeddings: bool = field(default=True, metadata={"help": "The ranking head reads item embeddings."})
    item_table_size: int | None = field(
        default=None, metadata={"help": "Learned rows of items for the ranking head; default: one an item. 0: none."}
    )
    config_fields: str = field(default="{}", metadata={"help": "More fields of UniGRFConfig, as JSON."})


@dataclass
class DataArguments:
    """What it is trained on."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    checkpoint_dir: str | None = field(default=None, metadata={"help": "Where the finished model goes."})
    max_items: int = field(default=50, metadata={"help": "Items of a training window, and of a history."})
    passes: int = field(default=1, metadata={"help": "Passes over the data in one epoch, each cut at other places."})
    stride: int | None = field(
        default=None, metadata={"help": "Instead: windows that begin so many items apart and overlap; 1: all of them."}
    )


def cut_windows(length: int, max_items: int, passes: int, stride: int | None = None) -> list[tuple[int, int]]:
    """
    Windows `(start, end)` of at most `max_items` of a history of `length` items, `passes` times at different places:
    every item is supervised once a pass, each time with another amount of history before it. With a `stride`, windows that
    slide by it instead, from the end to the first that holds the history's beginning (shorter ones would be its beginning
    again, which a causal model reads in it).
    """
    if stride is not None:
        if stride < 1:
            raise ValueError(f"Expected a stride of at least one item, found {stride}.")
        last = min(length, max_items)
        ends = [*range(length, last, -stride), last]
        return [(max(0, end - max_items), end) for end in ends]
    windows = []
    for offset in range(0, max_items, -(-max_items // passes)):
        ends = {length, *range(length - offset, 0, -max_items)}
        windows += pairwise([0, *sorted(ends)])
    return windows


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of windows that share a row of `capacity` items, longest first."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> rows
    for index in np.argsort(-lengths, kind="stable"):
        length = lengths[index]
        room = next((room for room in range(length, capacity + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            row = with_room[room].pop()
        rows[row].append(int(index))
        with_room[room - length].append(row)
    return rows


def training_rows(
    histories: Dataset,
    tokenizer: SemanticIdTokenizer,
    max_items: int,
    passes: int,
    seed: int,
    stride: int | None = None,
) -> Dataset:
    """
    Histories cut into windows, and windows packed into rows of `max_items` items, so that hardly any padding is left. The
    model reads every `<bos>` as the beginning of another history.

    Returns:
        Dataset with `input_ids`, `attention_mask` and `labels` (every token but `<bos>` is supervised).
    """
    windows = [
        (user, start, end)
        for user, items in enumerate(histories["items"])
        for start, end in cut_windows(len(items), max_items, passes, stride)
    ]
    # Shuffled first, so that what shares a row is not what one user did.
    windows = [windows[index] for index in np.random.default_rng(seed).permutation(len(windows))]
    rows = pack(np.array([end - start for _, start, end in windows]), max_items)
    items, behaviors = histories["items"][:], histories["behaviors"][:]

    def spell(batch):
        spelt = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in batch["windows"]:
            parts = [
                tokenizer.encode_indices(np.array(items[user][start:end]), np.array(behaviors[user][start:end]))
                for user, start, end in (windows[index] for index in row)
            ]
            tokens = np.concatenate(parts)
            spelt["input_ids"].append(tokens)
            spelt["attention_mask"].append(np.ones_like(tokens))
            spelt["labels"].append(np.where(tokens == tokenizer.bos_token_id, -100, tokens))
        return spelt

    return Dataset.from_dict({"windows": rows}).map(
        spell, batched=True, remove_columns=["windows"], desc="training rows"
    )


def held_out_rows(split: Dataset, tokenizer: SemanticIdTokenizer, max_items: int) -> Dataset:
    """Histories followed by their target, on which alone the loss is taken; columns as in `training_rows`."""

    def append(user):
        items = [*user["items"][-max_items:], user["target"]]
        behaviors = [*user["behaviors"][-max_items:], user["target_behavior"]]
        tokens = tokenizer.encode_indices(np.array(items), np.array(behaviors))
        labels = tokens.copy()
        labels[: -tokenizer.num_levels - 1] = -100
        return {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}

    return split.map(append, remove_columns=split.column_names, desc="validation rows")


def build_model(args: ModelArguments, tokenizer: SemanticIdTokenizer, embeddings: torch.Tensor) -> UniGRFForCausalLM:
    """A fresh model for the tokenizer's items, with its catalogue set. `embeddings`: `[num_items, D]`."""
    if not args.rank_by_item_embeddings:
        embeddings = None
    config = UniGRFConfig(
        **tokenizer.config_fields(),
        text_config=json.loads(args.text_config),
        item_embedding_dim=0 if embeddings is None else embeddings.shape[1],
        item_table_size=tokenizer.num_items if args.item_table_size is None else args.item_table_size,
        negatives_per_item=args.negatives_per_item,
        generation_loss_weight=args.generation_loss_weight,
        ranking_loss_weight=args.ranking_loss_weight,
        item_loss_weight=args.item_loss_weight,
        ranking_dropout=args.ranking_dropout,
        embedding_dropout=args.embedding_dropout,
        **json.loads(args.config_fields),
    )
    model = UniGRFForCausalLM(config)
    model.set_catalogue(torch.from_numpy(tokenizer.item_codes.copy()), embeddings)
    return model


def check_same_work(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> str:
    """
    A hash of arguments and data; `ValueError` if `output_dir` holds the checkpoints of another training, which resuming
    would mix with this one.
    """
    record = {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()}
    record["prepared"] = json.loads((Path(data_args.data_dir) / "prepare.json").read_text())
    for name in ("logging_dir", "local_rank"):  # of a run, not of the work
        record["training"].pop(name, None)
    record = json.loads(json.dumps(record, default=str))
    file = Path(training_args.output_dir) / "arguments.json"
    if file.exists() and (found := json.loads(file.read_text())) != record:
        changed = [
            f"{part}.{name}" for part in record for name in record[part] if record[part][name] != found[part].get(name)
        ]
        raise ValueError(
            f"Expected a new output_dir, or the arguments and data of the training in {file.parent}; found other values of "
            f"{changed}. Name another output_dir, or remove this one."
        )
    if training_args.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1))
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Trains, resuming where the last run stopped, and returns the folder of the finished model."""
    with training_args.main_process_first(desc="arguments"):  # which writes what the others compare
        work = check_same_work(model_args, data_args, training_args)
    folder = Path(data_args.checkpoint_dir or Path(training_args.output_dir) / "checkpoint")
    log_file = folder / "training_log.json"
    if log_file.exists() and json.loads(log_file.read_text()).get("work") == work:
        print(f"{folder} was trained with these arguments and data, reused")  # resuming it would train on
        return folder
    set_seed(training_args.seed)
    data_dir = Path(data_args.data_dir)
    tokenizer = SemanticIdTokenizer.from_pretrained(data_dir / "tokenizer")
    dataset = load_from_disk(str(data_dir / "dataset"))
    embeddings = load_file(data_dir / "item_embeddings.safetensors")["embeddings"]
    with training_args.main_process_first(desc="rows"):
        train_dataset = training_rows(
            dataset["train"],
            tokenizer,
            data_args.max_items,
            data_args.passes,
            training_args.seed,
            data_args.stride,
        )
        eval_dataset = held_out_rows(dataset["validation"], tokenizer, data_args.max_items)
    model = build_model(model_args, tokenizer, embeddings)
    callbacks = [LossParts(model)]
    if model_args.adaptive_weights:
        callbacks.append(
            AdaptiveWeighter(model_args.adaptive_window, model_args.adaptive_temperature, model_args.adaptive_form)
        )
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    last = get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None
    result = trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        RecommendationPipeline(model=trainer.model, tokenizer=tokenizer).save_pretrained(folder)
        log = {"work": work, "metrics": result.metrics, "log_history": trainer.state.log_history}
        log_file.write_text(json.dumps(log, indent=1))
    return folder


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Command-line arguments, with defaults that suit this model unless given."""
    parser = HfArgumentParser([ModelArguments, DataArguments, TrainingArguments])
    parser.set_defaults(
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.98,
        per_device_eval_batch_size=128,
        prediction_loss_only=True,
        report_to="none",
        restore_callback_states_from_checkpoint=True,  # the adaptive weights go on where they were
        use_cpu=not torch.cuda.is_available(),  # the Trainer asks for it, where bf16 runs on a CPU
    )
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    train(*parse())

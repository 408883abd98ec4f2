"""Train on streamed rows of TAOBAO-MM with the stock `Trainer`, after `recipes.papers.taobao.prepare`.

    python -m recipes.papers.taobao.train --tables runs/taobao/tables --data_dir runs/taobao \
        --output_dir runs/taobao/training \
        --max_steps 300 --per_device_train_batch_size 32 --learning_rate 2e-3 --logging_steps 25
    python -m recipes.papers.taobao.train --tables runs/taobao/tables --data_dir runs/taobao \
        --output_dir runs/taobao/second --init_from runs/taobao/training/checkpoint \
        --num_retrieved_items 10 --num_train_beams 20 \
        --max_steps 300 --per_device_train_batch_size 32 --learning_rate 5e-4 --logging_steps 25

The output folder receives `checkpoint/` and `training_log.json`. All arguments of `transformers.TrainingArguments` are
accepted but `--num_train_epochs`: the stream has no end, so `--max_steps` counts.

The first command is RecoChain's stage I. A row holds the last `--max_items` items of a user and the clicked item
(RecoChain reads 32 tokens, 6 items here). The second command is stage II, from a stage I. Its rows also hold the last
`--max_long_items` items, and the model ranks every candidate with its sub-history of these.

Memory holds the model with the catalog's codes and trie, pages of the user table, and a buffer of `--shuffle_rows`
rows. An item representation has two parts. The content embeddings stay a mapped file, and the hashed embedding table
has `--embedding_table_size` rows.

The recipe saves the model and evaluates it on the first `--eval_rows` rows of the test split. It measures Recall@5
over the whole catalog for the model (beam search and ranking) and for recency (the five last distinct items). Both
are also measured for the clicks that repeat the history and for those that explore.

A second run of the same command resumes from the last checkpoint, evaluates a finished training, or does nothing. It
rejects other arguments. One checkpoint is stored; it holds the content embeddings, too.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from recipes.common.arguments import COUNT, NOT_NEGATIVE, check_folder, check_needs, check_ranges, parse_arguments
from recipes.common.files import read_json, write_json
from recipes.common.hashing import weights_of
from recipes.common.profiling import PeakMemory
from recipes.common.run_tracking import begin, last_checkpoint, require_single_device
from recipes.evaluation.inference import Measurement, batches
from recipes.papers.taobao.clicks import RECENT, last_distinct
from recipes.papers.taobao.tables import (
    BATCH_USERS,
    BEHAVIORS,
    HISTORY,
    USER,
    USERS,
    ClickTokenizer,
    stream_rows,
    table_shards,
    user_histories,
)
from recipes.training.arguments import ARCHITECTURE, OBJECTIVE, from_json, named, split_config_fields
from recipes.training.collator import TrainingCollator
from recipes.training.loss_parts import LossParts
from recipes.training.model_init import create_model
from recipes.training.trainer_arguments import check_trainer_arguments
from tokenization import SemanticIdTokenizer
from tokenization.semantic_id_files import SEMANTIC_IDS_FILE, read_tensors

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
# Defaults of `TrainingArguments` in this recipe.
DEFAULTS = {
    "max_steps": 300,
    # The stream has no end.
    "num_train_epochs": 0,
    # A checkpoint holds the embeddings of all items.
    "save_total_limit": 1,
    "report_to": "none",
    "use_cpu": not torch.cuda.is_available(),
    "adam_beta2": 0.98,
}

AMOUNTS = ("num_retrieved_items", "num_train_beams", "embedding_table_size", "negatives_per_item", "dense_loss_weight")
RANGES = {
    **dict.fromkeys(("max_items", "max_long_items", "shuffle_rows", "eval_rows"), COUNT),
    **dict.fromkeys(AMOUNTS, NOT_NEGATIVE),
    "num_beams": (f"{RECENT} or more, the length of the evaluated lists", lambda value: value >= RECENT),
}


@dataclass
class TaobaoTrainArguments:
    """Data, model and evaluation."""

    tables: str = field(metadata={"help": "Folder of the published raw tables."})
    data_dir: str = field(metadata={"help": "Output folder of recipes.papers.taobao.prepare."})
    init_from: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to start from, with its config of the model. None: random weights."},
    )
    num_retrieved_items: int = field(
        default=0, metadata={"help": "Items of a candidate's sub-history. 0: no sub-histories."}
    )
    num_train_beams: int = field(
        default=0,
        metadata={"help": "Beams of the model that are ranked in training, for the target next. 0: no beams."},
    )
    text_config: str = field(default=json.dumps(LLAMA), metadata={"help": "Config of the backbone as JSON."})
    embedding_table_size: int = field(
        default=65_536, metadata={"help": "Rows of the embedding table, shared by hashed items. 0: no table."}
    )
    history_item_representations: bool = field(
        default=True, metadata={"help": "Add the item representations to the tokens of histories."}
    )
    negatives_per_item: float = field(
        default=1.0,
        metadata={"help": "Random negatives per item of the ranking loss, for the target next. Stage II has none."},
    )
    dense_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the sampled-softmax loss over items."})
    config_fields: str = field(
        default="{}", metadata={"help": "Fields of UniGRFConfig and its training config as JSON: inject_target, ..."}
    )
    max_items: int = field(default=6, metadata={"help": "Most recent items of a history that become tokens."})
    max_long_items: int = field(
        default=1000, metadata={"help": "Most recent items that sub-histories are retrieved from."}
    )
    shuffle_rows: int = field(default=4096, metadata={"help": "Rows of the shuffle buffer."})
    eval_rows: int = field(default=512, metadata={"help": "Rows of the test split that are evaluated."})
    num_beams: int = field(default=20, metadata={"help": "Beams of the evaluation."})

    @property
    def second_stage(self) -> bool:
        """Whether candidates of a row's last item are ranked."""
        return self.num_retrieved_items > 0 or self.num_train_beams > 0

    @property
    def long_items(self) -> int:
        """Items of a row's long history; 0 for a model without sub-histories."""
        return self.max_long_items if self.num_retrieved_items else 0


def build_model(
    args: TaobaoTrainArguments, codes: np.ndarray, embeddings: np.ndarray, codebook_sizes: list[int]
) -> UniGRFForCausalLM:
    """
    Build the model for items, fresh or from `args.init_from`; a mapped file of embeddings stays mapped.

    Args:
        args: Options of the model.
        codes: Codes of each item, int32 `[N, 4]`.
        embeddings: Content embeddings, int8 `[N, 128]`.
        codebook_sizes: Codes of each level.

    Raises:
        ValueError: if the checkpoint has other items.
    """
    fields = split_config_fields(
        {
            "num_retrieved_items": args.num_retrieved_items,
            "num_train_beams": args.num_train_beams,
            "negatives_per_item": 0.0 if args.second_stage else args.negatives_per_item,
            "dense_loss_weight": args.dense_loss_weight,
            **named(args.config_fields, (*ARCHITECTURE, *OBJECTIVE), "config_fields"),
        }
    )
    item_codes = torch.from_numpy(np.array(codes))
    model = model_of(args, item_codes, torch.from_numpy(embeddings), codebook_sizes, fields)
    serving = model.generation_config
    # Users come back to items.
    serving.exclude_history = False
    serving.max_items = args.max_items
    serving.max_long_items = args.long_items or None
    return model


def model_of(
    args: TaobaoTrainArguments, codes: torch.Tensor, embeddings: torch.Tensor, codebook_sizes: list[int], fields: dict
) -> UniGRFForCausalLM:
    """Create the model with the config's `fields`, or load it from `args.init_from`."""
    if args.init_from is not None:
        model = UniGRFForCausalLM.from_pretrained(args.init_from, **fields)
        if not torch.equal(model.catalog.item_codes, codes):
            raise ValueError(
                f"`init_from` must be a checkpoint of the {len(codes):,} items in {args.data_dir}, got "
                f"{model.config.num_items:,} items, or other codes, in {args.init_from}. Start from a checkpoint that "
                "was trained on this data."
            )
        model.set_catalog(codes, embeddings)
        return model
    config = UniGRFConfig(
        text_config=from_json(args.text_config, "text_config"),
        codebook_sizes=codebook_sizes,
        behaviors=list(BEHAVIORS),
        num_items=len(codes),
        content_embedding_dim=embeddings.shape[1],
        int8_content_embeddings=True,
        embedding_table_size=args.embedding_table_size,
        history_item_representations=args.history_item_representations,
        **{"ranking_dropout": 0.0, "embedding_dropout": 0.0, **fields},
    )
    # Do not allocate a random catalog of all items first.
    config.num_items = 1
    return create_model(config, codes, embeddings)


def keep_embeddings(catalog: torch.nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
    """
    Replace a checkpoint's embeddings by the mapped ones, in a hook before loading.

    The values are the same. Loading would write them over the map, into private memory.
    """
    state_dict[f"{prefix}content_embeddings"] = catalog.content_embeddings


def item_map(data_dir: Path, codes: np.ndarray) -> Path | None:
    """
    Return the tokenizer's folder, or None if recipes.papers.taobao.prepare made no tokenizer.

    Raises:
        ValueError: if the tokenizer does not encode the items by these codes `[N, 4]`.
    """
    folder = data_dir / "tokenizer"
    # A folder without a stage may have earlier codes.
    if "tokenizer" not in json.loads((data_dir / "stages.json").read_text()):
        return None
    if not np.array_equal(read_tensors(folder / SEMANTIC_IDS_FILE)[0].get("item_codes"), codes):
        raise ValueError(
            f"`data_dir` must have a tokenizer of the {len(codes):,} items and their codes in {data_dir}, got other "
            f"codes in {folder}. Remove the stage tokenizer from stages.json and run recipes.papers.taobao.prepare "
            "--tokenizer again."
        )
    return folder


@torch.no_grad()
def evaluate(model: UniGRFForCausalLM, args: TaobaoTrainArguments, batch_size: int = 32) -> dict[str, float]:
    """Measure the Recall@5 of the model and of recency, and the share of repeats, on rows of the test split."""
    # Histories and clicked items
    shards, _ = table_shards(args.tables, USERS.format("test"), [USER, HISTORY])
    stream = user_histories(shards, args.data_dir, "test")
    pairs = ((history, item) for _, history, clicks, _ in stream if len(history) for item in clicks)
    pairs = list(islice(pairs, args.eval_rows))

    # Lists of the model
    lists: list = [None] * len(pairs)
    tokenizer = ClickTokenizer(model.config.codebook_sizes, model.catalog.item_codes.cpu().numpy())
    users = {"items": [history for history, _ in pairs], "behaviors": [np.zeros_like(history) for history, _ in pairs]}
    measurement = Measurement(max_items=args.max_items, max_long_items=args.max_long_items, batch_size=batch_size)
    for places, _, inputs in batches(model, tokenizer, Dataset.from_dict(users), measurement, "evaluating"):
        best = model.recommend(**inputs, num_beams=args.num_beams, num_return_sequences=RECENT)
        for place, items in zip(places, best.item_indices.tolist(), strict=True):
            lists[place] = items

    # Shares
    hits = {
        "model": np.array([item in items for items, (_, item) in zip(lists, pairs, strict=True)]),
        "recency": np.array([item in last_distinct(history) for history, item in pairs]),
    }
    repeats = np.array([item in history for history, item in pairs])
    results = {"rows": len(pairs), "repeat_share": repeats.mean()}
    for name, hit in hits.items():
        results[f"{name}_recall@{RECENT}"] = hit.mean()
        for kind, mask in (("repeats", repeats), ("explore", ~repeats)):
            results[f"{name}_recall@{RECENT}_{kind}"] = hit[mask].mean() if mask.any() else 0.0
    return {name: round(float(value), 5) for name, value in results.items()}


def train(args: TaobaoTrainArguments, training_args: TrainingArguments) -> dict:
    """Train and save the model in `output_dir/checkpoint`, evaluate it, and return `training_log.json`."""
    check_arguments(args, training_args)
    data_dir = Path(args.data_dir)
    out = Path(training_args.output_dir)
    finished = out / "training_log.json"
    begin(out, recorded_arguments(args, training_args), finished)

    # Earlier run: resuming a finished training would train on
    log = json.loads(finished.read_text()) if finished.exists() else {}
    if "evaluation" in log:
        print(f"{out} was trained with these arguments and data, reused")
        return log
    if log:
        print(f"{out} was trained with these arguments and data, to be evaluated")
        args = replace(args, init_from=str(out / "checkpoint"))

    # Model
    sizes = json.loads((data_dir / "measured.json").read_text())["suffixes"]["codebook_sizes"]
    set_seed(training_args.seed)
    with PeakMemory() as peak:
        codes = np.load(data_dir / "item_codes.npy", mmap_mode="r")
        # Copy on write: torch has no read-only tensors.
        embeddings = np.load(data_dir / "content_embeddings.npy", mmap_mode="c")
        model = build_model(args, codes, embeddings, sizes)

    # Training and evaluation
    if not log:
        log = fit(model, args, training_args, sizes)
        log["memory"] = {"model_private_mb": peak.megabytes("private")} | log["memory"]
        write_json(finished, log)
    start = time.process_time()
    log["evaluation"] = evaluate(model.to(training_args.device).eval(), args)
    log["cpu_seconds"]["evaluation"] = round(time.process_time() - start, 1)
    write_json(finished, log)
    print(", ".join(f"{name} {value}" for name, value in {**log["memory"], **log["evaluation"]}.items()))
    return log


def check_arguments(args: TaobaoTrainArguments, training_args: TrainingArguments) -> None:
    """
    Check the options of a training, and that its data is prepared.

    Raises:
        ValueError: for an invalid option, missing data, or several devices or processes.
    """
    check_ranges(args, RANGES)
    fresh = [("a new model, without init_from", args.init_from is None)]
    needs = {
        **dict.fromkeys(("text_config", "embedding_table_size", "history_item_representations"), fresh),
        "max_long_items": [("num_retrieved_items", args.num_retrieved_items > 0)],
        "negatives_per_item": [("stage I", not args.second_stage)],
    }
    check_needs(args, needs)
    from_json(args.text_config, "text_config")
    named(args.config_fields, (*ARCHITECTURE, *OBJECTIVE), "config_fields")
    check_folder(args.init_from, "init_from")
    data_dir = Path(args.data_dir)
    stages = data_dir / "stages.json"
    if not stages.exists() or "test rows" not in read_json(stages):
        raise ValueError(
            f"`data_dir` must be a finished output folder of recipes.papers.taobao.prepare, got {data_dir}. Run the "
            "recipe, or resume it."
        )
    if training_args.num_train_epochs:
        rows = json.loads((data_dir / "measured.json").read_text())["train rows"]["rows"]
        batch = rows_per_step(training_args)
        steps = math.ceil(training_args.num_train_epochs * rows / batch)
        raise ValueError(
            f"`num_train_epochs` must be 0, since the stream has no end, got {training_args.num_train_epochs}. An "
            f"epoch is {rows:,} rows, {batch} per step: pass --max_steps {steps} instead."
        )
    # The stream counts no epochs.
    check_trainer_arguments(replace(training_args, num_train_epochs=1), DEFAULTS)
    require_single_device(training_args)
    if training_args.world_size > 1:
        raise ValueError(
            "`world_size` must be 1, since batches of different lengths cannot be shared out, got "
            f"{training_args.world_size}. Leave torchrun out."
        )


def recorded_arguments(args: TaobaoTrainArguments, training_args: TrainingArguments) -> dict:
    """
    Return the arguments and the data of a training, as `arguments.json` records them.

    The seconds of the stages are left out. So is the tokenizer, which changes no training.
    """
    stages = json.loads((Path(args.data_dir) / "stages.json").read_text()).items()
    arguments = {
        "model": asdict(args),
        "training": training_args.to_dict(),
        "stages": {name: stage["arguments"] for name, stage in stages if name != "tokenizer"},
    }
    # A path does not show that its model was trained again.
    if args.init_from is not None:
        arguments["init_from"] = weights_of(args.init_from)
    return arguments


def rows_per_step(training_args: TrainingArguments) -> int:
    """Return the rows of an optimizer step."""
    return training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps


def fit(
    model: UniGRFForCausalLM, args: TaobaoTrainArguments, training_args: TrainingArguments, codebook_sizes: list[int]
) -> dict:
    """
    Train the model, resuming where the last run stopped, and save it.

    Returns:
        Metrics, memory, core seconds and log of the training, for `training_log.json`.
    """
    # Rows
    data_dir = Path(args.data_dir)
    out = Path(training_args.output_dir)
    tokenizer = item_map(data_dir, model.catalog.item_codes.numpy(force=True))
    rows = stream_rows(args.tables, data_dir, "train", codebook_sizes, args.max_items, args.long_items)
    row_bytes = 24 * (1 + (args.max_items + 1) * (len(codebook_sizes) + 1)) + 4 * args.long_items
    print(
        f"memory of the user table, whatever its size: pages, {BATCH_USERS} users and {args.shuffle_rows:,} rows of "
        f"at most {row_bytes:,} bytes ({args.shuffle_rows * row_bytes / 2**20:.1f} MB)"
    )

    # Training
    trainer = Trainer(
        model=model,
        # The collator chooses the columns.
        args=replace(training_args, remove_unused_columns=False),
        data_collator=TrainingCollator(),
        # One endless epoch: the Trainer cannot resume a stream's second one.
        train_dataset=rows.repeat(None).shuffle(seed=training_args.seed, buffer_size=args.shuffle_rows),
        callbacks=[LossParts(model)],
    )
    last = last_checkpoint(out)
    if last is not None and not training_args.ignore_data_skip:
        num_rows = int(last.split("-")[-1]) * rows_per_step(training_args)
        print(f"resuming from {last}: the {num_rows:,} rows before it are read again and skipped", flush=True)
    model.catalog.register_load_state_dict_pre_hook(keep_embeddings)
    start = time.process_time()
    with PeakMemory() as peak:
        result = trainer.train(resume_from_checkpoint=last)
    cpu_seconds = round(time.process_time() - start, 1)

    # Checkpoint
    if tokenizer is not None:
        recommender = RecommendationPipeline(model=model, tokenizer=SemanticIdTokenizer.from_pretrained(tokenizer))
        recommender.save_pretrained(out / "checkpoint")
    else:
        print(
            "the checkpoint has no item map: `recipes.papers.taobao.prepare --tokenizer` makes a tokenizer, which "
            "can be saved into the same folder"
        )
        trainer.save_model(str(out / "checkpoint"))
    return {
        "metrics": result.metrics,
        "memory": {"training_private_mb": peak.megabytes("private"), "training_peak_mb": peak.megabytes("resident")},
        "cpu_seconds": {"training": cpu_seconds},
        "log_history": trainer.state.log_history,
    }


def parse(arguments: list[str] | None = None) -> tuple[TaobaoTrainArguments, TrainingArguments]:
    """Parse the command line, with the defaults of this recipe."""
    return parse_arguments(TaobaoTrainArguments, TrainingArguments, defaults=DEFAULTS, arguments=arguments)


if __name__ == "__main__":
    train(*parse())

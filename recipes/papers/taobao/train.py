"""Trains on the streamed rows of TAOBAO-MM with the stock `Trainer`, after `python -m recipes.papers.taobao.prepare`.

    python -m recipes.papers.taobao.train --tables runs/taobao/tables --data_dir runs/taobao --output_dir
        runs/taobao/training \ --max_steps 300 --per_device_train_batch_size 32 --learning_rate 2e-3 --logging_steps 25
    python -m recipes.papers.taobao.train --tables runs/taobao/tables --data_dir runs/taobao --output_dir
        runs/taobao/second \ --init_from runs/taobao/training/checkpoint --num_retrieved_items 10 --num_train_beams 20
        \ --max_steps 300 --per_device_train_batch_size 32 --learning_rate 5e-4 --logging_steps 25

Every argument of `transformers.TrainingArguments` is taken but `--num_train_epochs`: the stream has no end,
`--max_steps` count. A row is the last `--max_items` items of a user and the clicked one (RecoChain reads 32 tokens: 6
items here). With `--num_retrieved_items` (the second command: RecoChain's stage II, from a stage I) it carries the
last `--max_long_items` items as well, of which every candidate is ranked with its sub-history.

In memory are the model, with its catalog's codes and trie, pages of the user table and a buffer of `--shuffle_rows`
rows; the item embeddings, of which item vectors are made, stay the mapped file. The learned table of items, the other
part of those vectors, has `--embedding_table_size` rows, shared by hashing. After training, when the model is saved,
the first `--eval_rows` rows of the test split are read: Recall@5 of beam search and ranking over the whole catalog
beside that of the five last distinct items, each also for the clicks that repeat the history and those that explore.
A second run of the same command resumes from the last checkpoint in `--output_dir` (one is kept; it holds the
embeddings, too), evaluates what was trained, or does nothing if that is done; one with other arguments is refused.
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
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
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
# Defaults of `TrainingArguments` here.
DEFAULTS = {
    "max_steps": 300,
    "num_train_epochs": 0,  # the stream has no end: see `train`
    "save_total_limit": 1,  # a checkpoint holds the embeddings of all items
    "report_to": "none",
    "use_cpu": not torch.cuda.is_available(),
    "adam_beta2": 0.98,
}


@dataclass
class TaobaoTrainArguments:
    """What is trained, and on what."""

    tables: str = field(metadata={"help": "Folder of the published raw tables."})
    data_dir: str = field(metadata={"help": "Output folder of recipes.papers.taobao.prepare."})
    init_from: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from; it brings its own model and what that reads."}
    )
    num_retrieved_items: int = field(default=0, metadata={"help": "Items of a candidate's sub-history."})
    num_train_beams: int = field(default=0, metadata={"help": "Own beams that are ranked in training, for `next`."})
    text_config: str = field(default=json.dumps(LLAMA), metadata={"help": "The backbone's config as JSON."})
    embedding_table_size: int = field(default=65_536, metadata={"help": "Learned rows of items, shared by hashing."})
    history_item_representations: bool = field(
        default=True, metadata={"help": "Histories are read by the items' vectors, too, and not by codes alone."}
    )
    negatives_per_item: float = field(
        default=1.0, metadata={"help": "Random candidates an item, for `next`; none in stage II."}
    )
    dense_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the softmax over (a sample of) items."})
    config_fields: str = field(
        default="{}", metadata={"help": "More fields of UniGRFConfig, as JSON: inject_target, ..."}
    )
    max_items: int = field(default=6, metadata={"help": "Items of the history that a row spells."})
    max_long_items: int = field(default=1000, metadata={"help": "Items that sub-histories come from."})
    shuffle_rows: int = field(default=4096, metadata={"help": "Rows of the buffer that shuffles them."})
    eval_rows: int = field(default=512, metadata={"help": "Rows of the test split that are evaluated."})
    num_beams: int = field(default=20, metadata={"help": "Of the search in the evaluation."})

    @property
    def long_items(self) -> int:
        """Items of a row's longer history; 0 for a model that reads none."""
        return self.max_long_items if self.num_retrieved_items else 0


def build_model(
    args: TaobaoTrainArguments, codes: np.ndarray, embeddings: np.ndarray, codebook_sizes: list[int]
) -> UniGRFForCausalLM:
    """
    A model for codes int32 `[N, 4]` and embeddings int8 `[N, 128]`, fresh or from `args.init_from`. A mapped file of
    embeddings stays one. `ValueError` if the checkpoint is of other items.
    """
    second_stage = args.num_retrieved_items > 0 or args.num_train_beams > 0
    fields = split_config_fields(
        {
            "num_retrieved_items": args.num_retrieved_items,
            "num_train_beams": args.num_train_beams,
            "negatives_per_item": 0.0 if second_stage else args.negatives_per_item,
            "dense_loss_weight": args.dense_loss_weight,
            **named(args.config_fields, (*ARCHITECTURE, *OBJECTIVE), "config_fields"),
        }
    )
    codes, embeddings = torch.from_numpy(np.array(codes)), torch.from_numpy(embeddings)
    model = model_of(args, codes, embeddings, codebook_sizes, fields)
    serving = model.generation_config
    serving.exclude_history = False  # users come back to items
    serving.max_items, serving.max_long_items = args.max_items, args.long_items or None
    return model


def model_of(
    args: TaobaoTrainArguments, codes: torch.Tensor, embeddings: torch.Tensor, codebook_sizes: list[int], fields: dict
) -> UniGRFForCausalLM:
    """Create the model with the config's `fields`, or load it from `args.init_from`."""
    if args.init_from is not None:
        model = UniGRFForCausalLM.from_pretrained(args.init_from, **fields)
        if not torch.equal(model.catalog.item_codes, codes):
            raise ValueError(
                f"expected a checkpoint of the {len(codes):,} items in {args.data_dir}, found "
                f"{model.config.num_items:,} items, or other codes, in {args.init_from}: start from one that was "
                "trained on this data"
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
    config.num_items = 1  # until the catalog comes: one of all items need not be made up first
    return create_model(config, codes, embeddings)


def keep_embeddings(catalog: torch.nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
    """
    A hook before loading: a checkpoint's embeddings are the same, and would be written over the map, into private
    memory.
    """
    state_dict[f"{prefix}content_embeddings"] = catalog.content_embeddings


def item_map(data_dir: Path, codes: np.ndarray) -> Path | None:
    """
    The tokenizer's folder, if recipes.papers.taobao.prepare made one. `ValueError` if it does not spell items by
    these codes `[N, 4]`.
    """
    folder = data_dir / "tokenizer"
    if "tokenizer" not in json.loads((data_dir / "stages.json").read_text()):
        return None  # what lies there may be of codes that were made again
    if not np.array_equal(read_tensors(folder / SEMANTIC_IDS_FILE)[0].get("item_codes"), codes):
        raise ValueError(
            f"expected a tokenizer of the {len(codes):,} items and their codes in {data_dir}, found another in "
            f"{folder}: take the stage tokenizer out of stages.json and run recipes.papers.taobao.prepare "
            "--tokenizer again"
        )
    return folder


@torch.no_grad()
def evaluate(model: UniGRFForCausalLM, args: TaobaoTrainArguments, batch_size: int = 32) -> dict[str, float]:
    """Shares and Recall@5 of the first rows of the test split, of model and recency baseline."""
    shards, _ = table_shards(args.tables, USERS.format("test"), [USER, HISTORY])
    stream = user_histories(shards, args.data_dir, "test")
    pairs = ((history, item) for _, history, clicks, _ in stream if len(history) for item in clicks)
    rows = list(islice(pairs, args.eval_rows))
    lists: list = [None] * len(rows)
    tokenizer = ClickTokenizer(model.config.codebook_sizes, model.catalog.item_codes.cpu().numpy())
    users = {"items": [history for history, _ in rows], "behaviors": [np.zeros_like(history) for history, _ in rows]}
    how = Measurement(max_items=args.max_items, max_long_items=args.max_long_items, batch_size=batch_size)
    for places, _, inputs in batches(model, tokenizer, Dataset.from_dict(users), how, "evaluating"):
        best = model.recommend(**inputs, num_beams=args.num_beams, num_return_sequences=RECENT)
        for place, items in zip(places, best.item_indices.tolist(), strict=True):
            lists[place] = items
    hits = {
        "model": np.array([item in found for found, (_, item) in zip(lists, rows, strict=True)]),
        "recency": np.array([item in last_distinct(history) for history, item in rows]),
    }
    repeats = np.array([item in history for history, item in rows])
    results = {"rows": len(rows), "repeat_share": repeats.mean()}
    for name, hit in hits.items():
        results[f"{name}_recall@{RECENT}"] = hit.mean()
        for kind, some in (("repeats", repeats), ("explore", ~repeats)):
            results[f"{name}_recall@{RECENT}_{kind}"] = hit[some].mean() if some.any() else 0.0
    return {name: round(float(value), 5) for name, value in results.items()}


def train(args: TaobaoTrainArguments, training_args: TrainingArguments) -> dict:
    """Trains, saves the model in `output_dir/checkpoint`, evaluates it and returns `training_log.json`."""
    data_dir, out = Path(args.data_dir), Path(training_args.output_dir)
    if args.num_beams < RECENT or args.eval_rows < 1:
        raise ValueError(
            f"expected num_beams >= {RECENT}, as long as the lists that are evaluated, and eval_rows >= 1, found "
            f"{args.num_beams} and {args.eval_rows}: raise them"
        )
    stages = data_dir / "stages.json"
    if not stages.exists() or "test rows" not in json.loads(stages.read_text()):
        raise ValueError(
            f"expected a finished run of recipes.papers.taobao.prepare in {data_dir}, found none: run it, or go on "
            "with it"
        )
    measured = json.loads((data_dir / "measured.json").read_text())
    if training_args.num_train_epochs:
        rows, batch = measured["train rows"]["rows"], rows_a_step(training_args)
        steps = math.ceil(training_args.num_train_epochs * rows / batch)
        raise ValueError(
            f"expected --max_steps, found --num_train_epochs {training_args.num_train_epochs}: the stream has no "
            f"end. An epoch is {rows:,} rows, {batch} a step, so pass --max_steps {steps} instead"
        )
    require_single_device(training_args)
    if training_args.world_size > 1:
        raise ValueError(
            f"expected one process, found {training_args.world_size}: batches of different lengths cannot be shared "
            "out"
        )
    # How long a stage took is no part of what is trained on. The tokenizer is saved beside the model, if there is
    # one: to make it later changes no training.
    done = json.loads(stages.read_text()).items()
    made = {name: stage["arguments"] for name, stage in done if name != "tokenizer"}
    asked = {"model": asdict(args), "training": training_args.to_dict(), "stages": made}
    if args.init_from is not None:  # a path does not tell that what is there was trained again
        asked["init_from"] = weights_of(args.init_from)
    finished = out / "training_log.json"
    begin(out, asked, finished)
    log = json.loads(finished.read_text()) if finished.exists() else {}
    if "evaluation" in log:
        print(f"{out} was trained with these arguments and data, reused")
        return log
    if log:  # resuming it would train on
        print(f"{out} was trained with these arguments and data, to be evaluated")
        args = replace(args, init_from=str(out / "checkpoint"))
    sizes = measured["suffixes"]["codebook_sizes"]
    set_seed(training_args.seed)
    with PeakMemory() as peak:
        codes = np.load(data_dir / "item_codes.npy", mmap_mode="r")
        embeddings = np.load(data_dir / "content_embeddings.npy", mmap_mode="c")  # torch has no read-only tensors
        model = build_model(args, codes, embeddings, sizes)
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


def rows_a_step(training_args: TrainingArguments) -> int:
    """Rows of a step of one process."""
    return training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps


def fit(
    model: UniGRFForCausalLM, args: TaobaoTrainArguments, training_args: TrainingArguments, codebook_sizes: list[int]
) -> dict:
    """
    Trains the model, resuming where the last run stopped, and saves it; returns what `training_log.json` keeps of it.
    """
    data_dir, out = Path(args.data_dir), Path(training_args.output_dir)
    tokenizer = item_map(data_dir, model.catalog.item_codes.numpy(force=True))
    rows = stream_rows(args.tables, data_dir, "train", codebook_sizes, args.max_items, args.long_items)
    row_bytes = 24 * (1 + (args.max_items + 1) * (len(codebook_sizes) + 1)) + 4 * args.long_items
    print(
        f"held of the user table at a time: pages, {BATCH_USERS} users and {args.shuffle_rows:,} rows of at most "
        f"{row_bytes:,} bytes ({args.shuffle_rows * row_bytes / 2**20:.1f} MB), whatever its size"
    )
    trainer = Trainer(
        model=model,
        args=replace(training_args, remove_unused_columns=False),  # the collator chooses the columns
        data_collator=TrainingCollator(),
        # One endless epoch: the Trainer cannot resume in the second of a stream whose length it does not know.
        train_dataset=rows.repeat(None).shuffle(seed=training_args.seed, buffer_size=args.shuffle_rows),
        callbacks=[LossParts(model)],
    )
    last = last_checkpoint(out)  # None: from the beginning
    if last is not None and not training_args.ignore_data_skip:
        read = int(last.split("-")[-1]) * rows_a_step(training_args)
        print(f"going on from {last}: the {read:,} rows before it are read again first, and passed over", flush=True)
    model.catalog.register_load_state_dict_pre_hook(keep_embeddings)
    start = time.process_time()
    with PeakMemory() as peak:
        result = trainer.train(resume_from_checkpoint=last)
    cpu_seconds = round(time.process_time() - start, 1)
    if tokenizer is not None:
        recommender = RecommendationPipeline(model=model, tokenizer=SemanticIdTokenizer.from_pretrained(tokenizer))
        recommender.save_pretrained(out / "checkpoint")
    else:
        print(
            "the checkpoint has no item map: `recipes.papers.taobao.prepare --tokenizer` makes one, to be saved into "
            "the same folder"
        )
        trainer.save_model(str(out / "checkpoint"))
    return {
        "metrics": result.metrics,
        "memory": {"training_private_mb": peak.megabytes("private"), "training_peak_mb": peak.megabytes("resident")},
        "cpu_seconds": {"training": cpu_seconds},
        "log_history": trainer.state.log_history,
    }


def parse(arguments: list[str] | None = None) -> tuple[TaobaoTrainArguments, TrainingArguments]:
    """Command-line arguments, with defaults that suit this model unless given."""
    return parse_arguments(TaobaoTrainArguments, TrainingArguments, defaults=DEFAULTS, arguments=arguments)


if __name__ == "__main__":
    train(*parse())

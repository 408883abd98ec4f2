"""Recommend to many users: a data set of histories in, Parquet files of ranked items out, with your own item ids.

    python -m recipes.recommend --checkpoint runs/demo/checkpoint --histories histories.parquet --output_dir runs/lists
    # several processes, each on its own GPU or on the CPU
    torchrun --nproc_per_node 8 -m recipes.recommend ...

`recipes/data/histories.py` explains histories and how to make them. All rows are checked before the model runs.
`--unknown error` rejects unknown items and empty histories. `--unknown skip` drops unknown items. A row without a
known item gets an empty list; so does, with `--exclude_history`, a history of the whole catalog. A message counts the
rows with empty lists.

The output folder has a file for every `--shard_size` rows, in the order of the rows.
`datasets.load_dataset("parquet", data_dir=...)` and pandas read the folder.

    part-00000-of-00012.parquet   `user_id`; `item_ids`: list<string>; `scores`, `generation_scores`, `ranking_scores`
                                  and, for a model with these scores, `dense_scores` and `transition_scores`:
                                  list<float>. Best first, shorter if fewer items are left.
    .recommend.json               the model, the histories and the settings; hidden from readers of the folder

A second run of the same command makes the missing files, in any number of processes. A run with another model, other
histories or other settings needs another folder.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm

from modeling_unigrf import ServingOptions, UniGRFForCausalLM
from modeling_unigrf.pipeline_unigrf import check_tokenizer
from recipes.common.arguments import parse_arguments
from recipes.common.config_arguments import arguments_from_config
from recipes.common.files import check_writable, path_or_hub, read_json, whole_file
from recipes.common.hashing import weights_hash
from recipes.data.encoding import HistoryEncoder
from recipes.data.histories import Histories, check_columns, check_rows, content_hash, load_histories, read_histories
from recipes.evaluation.inference import load_tokenizer
from tokenization import SemanticIdTokenizer

# The last two only for a model with that score.
SCORES = ("scores", "generation_scores", "ranking_scores", "dense_scores", "transition_scores")
# Settings that are serving options of the model.
SERVING = tuple(option.name for option in fields(ServingOptions))


@dataclass
class RecommendArguments:
    """Checkpoint, histories, and the folder of the lists."""

    checkpoint: str = field(
        metadata={"help": "Checkpoint or adapter: a folder that recipes.train wrote, or a Hub repository."}
    )
    histories: str = field(
        metadata={
            "help": "Histories: a saved Dataset, a .parquet or .json(l) file, a folder of them, or a Hub data set."
        }
    )
    output_dir: str = field(
        metadata={"help": "Folder that receives the Parquet files; an interrupted run continues there."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of the histories. None: the only split that there is."}
    )
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16."})


ServingArguments: Any = arguments_from_config(
    "ServingArguments", "Serving options.", ServingOptions, SERVING, are_optional=True
)


@dataclass
class RecommendSettings(ServingArguments):
    """Settings of the lists; those of serving are by default the checkpoint's."""

    unknown: str = field(
        default="error",
        metadata={"help": "Reject unknown items (error), or drop them (skip).", "choices": ["error", "skip"]},
    )
    batch_size: int = field(default=32, metadata={"help": "Histories of a batch, of similar length."})
    shard_size: int = field(default=4096, metadata={"help": "Rows of an output file."})


def resolve_settings(settings: RecommendSettings, model: UniGRFForCausalLM) -> RecommendSettings:
    """
    Replace None in the settings by the model's values.

    Raises:
        ValueError: for a setting out of range.
    """
    if settings.unknown not in ("error", "skip"):
        raise ValueError(f"`unknown` must be 'error' or 'skip', got {settings.unknown!r}. Choose one of them.")
    for name in ("batch_size", "shard_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {getattr(settings, name)}. Choose another number.")
    if settings.max_long_items is not None and not model.config.num_retrieved_items:
        raise ValueError(
            f"`max_long_items` must be left out for a model without sub-histories, got {settings.max_long_items}. "
            "Leave it out, or train with num_retrieved_items."
        )
    options = asdict(model.serving_options(**{name: getattr(settings, name) for name in SERVING}))
    options["max_items"] = options["max_items"] or model.config.max_history_items or sys.maxsize
    return replace(settings, **options)


def work_record(
    model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, dataset: Dataset, settings: RecommendSettings
) -> dict:
    """Record the model, the histories and the settings as JSON; a moved checkpoint is the same model."""
    # The model: its config, serving options and weights.
    config = model.config.to_dict()
    del config["training_config"]
    for part in (config, config["text_config"]):
        # These describe the file, or the weights, which are hashed below.
        for name in ("_name_or_path", "transformers_version", "dtype"):
            part.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(weights_hash(model).encode())

    # The settings. The batch size only changes rounding.
    chosen = asdict(settings)
    del chosen["batch_size"]
    identity = {"model": digest.hexdigest(), "dtype": str(model.dtype), "catalog": tokenizer.provenance["sha256"]}
    return identity | {"histories": content_hash(dataset), "rows": len(dataset)} | chosen


def check_same_work(record: dict, file: Path) -> None:
    """Raise `ValueError` if the folder of `file` has lists with another record than `record`."""
    stored = read_json(file) if file.is_file() else {}
    changed = [name for name in record if name not in stored or stored[name] != record[name]]
    if changed and any(file.parent.glob("part-*.parquet")):
        raise ValueError(
            "`output_dir` must be new, or hold lists of the same model, histories and settings, got "
            f"{file.parent} with other values of {changed}. Choose another output_dir, or remove this folder."
        )


def recommend_rows(
    model: UniGRFForCausalLM,
    tokenizer: SemanticIdTokenizer,
    histories: Histories,
    settings: RecommendSettings,
    bar: tqdm,
) -> dict:
    """
    Recommend to the users of some rows.

    Args:
        model: The model, in evaluation mode.
        tokenizer: The tokenizer of its items.
        histories: The rows.
        settings: Settings without None.
        bar: Progress bar of the rows.

    Returns:
        `item_ids` and the scores, each a `pa.ListArray` `[N]` in the order of the rows.
    """
    # The longest histories first: a lack of memory shows at once.
    recent = slice(-settings.max_items, None)
    lengths = np.array([len(items[recent]) for items in histories.items]) * histories.answered
    order = np.argsort(-lengths, kind="stable")
    order = order[: np.count_nonzero(lengths)]
    bar.update(len(lengths) - len(order))

    # Run the model.
    shape = (len(lengths), settings.num_return_sequences)
    names = scores_of(model, settings)
    best_items = np.full(shape, -1)
    scores = {name: np.zeros(shape, np.float32) for name in names}
    max_long_items = settings.max_long_items if model.config.num_retrieved_items else 0
    encoder = HistoryEncoder(tokenizer, settings.max_items, max_long_items)
    columns = {name: getattr(histories, name) for name in ("items", "behaviors", "timestamps", "query_time")}
    columns = {name: column for name, column in columns.items() if column is not None}
    # These cut and block the histories, below.
    of_histories = {"max_items", "max_long_items", "exclude_history"}
    options = {name: getattr(settings, name) for name in SERVING if name not in of_histories}
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        inputs = encoder(
            **{name: [column[row] for row in rows] for name, column in columns.items()}, device=model.device
        )
        best = model.recommend(
            **inputs,
            **options,
            # Block the whole history, not only the items that the model reads.
            exclude_history=False,
            blocked_items=[histories.items[row] for row in rows] if settings.exclude_history else None,
        )
        best_items[rows] = best.item_indices.cpu()
        for name, values in scores.items():
            values[rows] = best[name].cpu()
        bar.update(len(rows))
    return list_columns(tokenizer, best_items, scores)


def scores_of(model: UniGRFForCausalLM, settings: RecommendSettings) -> list[str]:
    """Return the names of the scores that the model's lists have."""
    is_missing = {
        "dense_scores": not model.config.has_dense_scores,
        "transition_scores": not (settings.transition_weight or settings.num_transition_candidates),
    }
    return [name for name in SCORES if not is_missing.get(name)]


def list_columns(
    tokenizer: SemanticIdTokenizer, best_items: np.ndarray, scores: dict[str, np.ndarray]
) -> dict[str, pa.ListArray]:
    """Convert item indices `[N, R]` (-1: no item) and scores `[N, R]` to Arrow lists, without the padding."""
    is_item = best_items >= 0
    offsets = pa.array(np.r_[0, is_item.sum(axis=1).cumsum()], pa.int32())
    columns = {"item_ids": pa.array([tokenizer.item_ids[item] for item in best_items[is_item]], pa.string())}
    columns |= {name: pa.array(values[is_item]) for name, values in scores.items()}
    return {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}


def recommend_dataset(
    model: UniGRFForCausalLM,
    tokenizer: SemanticIdTokenizer,
    dataset: Dataset,
    output_dir: str | Path,
    settings: RecommendSettings,
) -> Path:
    """
    Write the lists of all histories of `dataset`, as in the module's docstring, and return their folder.

    The model runs in evaluation mode, on its device. Each of several processes makes this call with its own model, and
    returns when its share is written.

    Args:
        model: The model.
        tokenizer: The tokenizer of its items.
        dataset: Histories with the columns of `recipes/data/histories.py`.
        output_dir: Folder that receives the files.
        settings: Settings of the lists.

    Raises:
        ValueError: before the model runs: for settings out of range, missing columns, rows with problems (all are
            counted), a tokenizer of another catalog, and an `output_dir` with other lists.
    """
    # Check everything before the model runs.
    state = PartialState(cpu=model.device.type == "cpu")
    output_dir = Path(output_dir)
    record_file = output_dir / ".recommend.json"
    settings = resolve_settings(settings, model.eval())
    check_tokenizer(model, tokenizer)
    columns = check_columns(dataset, tokenizer, model.config.reads_times)
    record = work_record(model, tokenizer, dataset, settings)
    check_same_work(record, record_file)  # in all processes, before the first process writes below
    dataset = dataset.select_columns(columns).with_format("arrow")
    shards = range(0, len(dataset), settings.shard_size)
    unanswered = check_rows(dataset, tokenizer, shards, settings.exclude_history, settings.unknown)
    check_writable(output_dir, "output_dir")

    # Share the missing files among the processes.
    files = {start: f"part-{index:05d}-of-{len(shards):05d}.parquet" for index, start in enumerate(shards)}
    if state.is_main_process:
        with whole_file(record_file) as file:
            file.write_text(json.dumps(record, indent=1))
    missing = [start for start in shards if not (output_dir / files[start]).exists()]
    missing = broadcast_object_list([missing])[0]  # all processes use the first process's list
    if state.is_main_process and len(missing) < len(shards):
        print(f"{len(shards) - len(missing):,} of {len(shards):,} files were made before")
    starts = missing[state.process_index :: state.num_processes]

    # Write them.
    num_rows = sum(min(settings.shard_size, len(dataset) - start) for start in starts)
    with tqdm(total=num_rows, desc="recommending", unit="row", disable=not state.is_main_process) as bar:
        for start in starts:
            table = dataset[start : start + settings.shard_size]
            histories = read_histories(table, tokenizer, settings.exclude_history)
            lists = {"user_id": table["user_id"], **recommend_rows(model, tokenizer, histories, settings, bar)}
            with whole_file(output_dir / files[start]) as file:
                pq.write_table(pa.table(lists), file)
    if state.is_main_process and unanswered:
        print(
            f"{unanswered:,} of {len(dataset):,} rows have empty lists: their histories have no known item, or all "
            "items"
        )
    return output_dir


def main(args: RecommendArguments, settings: RecommendSettings) -> None:
    """Load the model and the histories, and recommend, on CUDA devices if there are some."""
    # Without `cpu`, processes without GPUs would not form a group.
    state = PartialState(cpu=not torch.cuda.is_available())
    # The first process downloads, the others read its cache.
    with state.main_process_first():
        dataset = load_histories(args.histories, args.split)
        dtype = torch.bfloat16 if args.bf16 else "auto"
        with path_or_hub("checkpoint", args.checkpoint):
            model = UniGRFForCausalLM.from_pretrained(args.checkpoint, dtype=dtype).to(state.device)
            tokenizer = load_tokenizer(args.checkpoint)
    recommend_dataset(model, tokenizer, dataset, args.output_dir, settings)


if __name__ == "__main__":
    main(*parse_arguments(RecommendArguments, RecommendSettings))

"""Recommends to everybody: a data set of histories in, Parquet files of ranked items out, in the user's own ids.

    python -m recipes.recommend --checkpoint runs/demo/checkpoint --histories histories.parquet --output_dir runs/lists
    torchrun --nproc_per_node 8 -m recipes.recommend ...     # several processes, each on a GPU of its own or on the
    CPU

`recipes/data/histories.py` says what histories are and how to make them. All rows are checked before the model runs.
`--unknown error` refuses unknown items and empty histories; `--unknown skip` drops unknown items, and a row without a
known item gets empty lists. So does, with `--exclude_history`, a history of all items that there are. Rows of empty
lists are counted and reported. The output folder, which `datasets.load_dataset("parquet", data_dir=...)` and pandas
read, has a file for every `--shard_size` rows; rows keep their order:

    part-00000-of-00012.parquet   user_id; item_ids: list<string>; scores, generation_scores, ranking_scores[,
                                  dense_scores]: list<float>; best first, shorter where there are fewer items than
                                  asked for
    .recommend.json               what was asked of what; hidden, since readers of a folder read all that they see

A second run of the same command makes the files that are missing, in any number of processes; one that would give
other lists is refused there.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm

from modeling_unigrf import UniGRFForCausalLM
from recipes.common.arguments import parse_arguments
from recipes.common.files import whole_file
from recipes.common.hashing import weights_hash
from recipes.data.encoding import HistoryEncoder
from recipes.data.histories import Histories, check_columns, check_rows, load_histories, read_histories
from tokenization import SemanticIdTokenizer

# The last one, if the model has such a score.
SCORES = ("scores", "generation_scores", "ranking_scores", "dense_scores")
# Settings that are serving options of the model.
SERVED = ("num_beams", "num_return_sequences", "ranking_weight", "ranking_target", "max_items", "exclude_history")


@dataclass
class RecommendArguments:
    """By what, to whom, and where to."""

    checkpoint: str = field(metadata={"help": "Folder that recipes.train wrote, or a Hub repository."})
    histories: str = field(metadata={"help": "Saved Dataset, .parquet or .json(l), folder of them, or Hub data set."})
    output_dir: str = field(metadata={"help": "Receives the Parquet files; a run that broke off goes on there."})
    split: str | None = field(default=None, metadata={"help": "Split of the histories, if there are several."})
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16."})


@dataclass
class RecommendSettings:
    """What is asked of the model."""

    num_beams: int | None = field(default=None, metadata={"help": "Candidates; default: the checkpoint's."})
    num_return_sequences: int | None = field(
        default=None,
        metadata={"help": "Items of a list, at most as many as are ranked; default: ten, or as many as that."},
    )
    ranking_weight: float | None = field(default=None, metadata={"help": "Of fusion; default: the checkpoint's."})
    ranking_target: str | None = field(default=None, metadata={"help": "What ranks; default: the checkpoint's."})
    max_items: int | None = field(
        default=None, metadata={"help": "Items read of a history; default: as trained, or all that fit."}
    )
    exclude_history: bool | None = field(
        default=None, metadata={"help": "List no item of the history, read or not; default: the checkpoint's."}
    )
    unknown: str = field(
        default="error", metadata={"help": "What to do with unknown items.", "choices": ["error", "skip"]}
    )
    batch_size: int = field(default=32, metadata={"help": "Histories run together, of similar length."})
    shard_size: int = field(default=4096, metadata={"help": "Rows of an output file."})


def resolved(settings: RecommendSettings, model) -> RecommendSettings:
    """The settings with the model's own for those that are None; `ValueError` if one is out of range."""
    if settings.unknown not in ("error", "skip"):
        raise ValueError(f"`unknown` must be 'error' or 'skip', got {settings.unknown!r}. Choose one of them.")
    for name in ("batch_size", "shard_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {getattr(settings, name)}. Choose another number.")
    options = asdict(model.serving_options(**{name: getattr(settings, name) for name in SERVED}))
    options["max_items"] = options["max_items"] or model.config.max_history_items or sys.maxsize
    return replace(settings, **{name: options[name] for name in SERVED})


def work_record(model, tokenizer: SemanticIdTokenizer, dataset: Dataset, settings: RecommendSettings) -> dict:
    """What the lists are made of, as JSON; the model by what it computes, wherever it was loaded from."""
    config = model.config.to_dict()
    del config["training_config"]
    for part in (config, config["text_config"]):
        for name in ("_name_or_path", "transformers_version", "dtype"):  # facts of a file, or told by the weights
            part.pop(name, None)
    options = asdict(model.serving_options())
    served = {name: value for name, value in options.items() if name not in SERVED}  # the settings hold the others
    digest = hashlib.sha256(json.dumps([config, served], sort_keys=True, default=str).encode())
    digest.update(weights_hash(model).encode())
    asked = asdict(settings)
    del asked["batch_size"]  # changes nothing but rounding
    identity = {"model": digest.hexdigest(), "dtype": str(model.dtype), "catalog": tokenizer.provenance["sha256"]}
    return identity | {"histories": dataset._fingerprint, "rows": len(dataset)} | asked


def check_same_work(record: dict, file: Path) -> None:
    """`ValueError` if there are lists beside `file` that were made of something else than `record`."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    changed = [name for name in record if name not in found or found[name] != record[name]]
    if changed and any(file.parent.glob("part-*.parquet")):
        raise ValueError(
            f"Expected a new output_dir, or the model, histories and settings of the lists in {file.parent}; found "
            f"other values of {changed}. Name another output_dir, or remove this one."
        )


def recommend_rows(model, tokenizer, histories: Histories, settings: RecommendSettings, bar: tqdm) -> dict:
    """The lists of some rows, in their order: `item_ids` and the scores, each a `pa.ListArray` `[N]`."""
    recent = slice(-settings.max_items, None)
    lengths = np.array([len(items[recent]) for items in histories.items]) * histories.answered
    order = np.argsort(-lengths, kind="stable")  # the longest first: memory runs out at once or never
    order = order[: np.count_nonzero(lengths)]
    shape = (len(lengths), settings.num_return_sequences)
    names = SCORES if model.config.has_dense_scores else SCORES[:-1]
    best_items, scores = np.full(shape, -1), {name: np.zeros(shape, np.float32) for name in names}
    bar.update(len(lengths) - len(order))
    encoder = HistoryEncoder(
        tokenizer,
        settings.max_items,
        model.serving_options().max_long_items if model.config.num_retrieved_items else 0,  # also what is not read
    )
    columns = {"items": histories.items, "behaviors": histories.behaviors, "timestamps": histories.timestamps}
    columns["query_time"] = histories.query_time
    columns = {name: column for name, column in columns.items() if column is not None}
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        inputs = encoder(
            **{name: [column[row] for row in rows] for name, column in columns.items()}, device=model.device
        )
        best = model.recommend(
            **inputs,
            num_beams=settings.num_beams,
            num_return_sequences=settings.num_return_sequences,
            ranking_weight=settings.ranking_weight,
            ranking_target=settings.ranking_target,
            exclude_history=False,  # but all of it, not only what is read:
            blocked_items=[histories.items[row] for row in rows] if settings.exclude_history else None,
        )
        best_items[rows] = best.item_indices.cpu()
        for name, values in scores.items():
            values[rows] = best[name].cpu()
        bar.update(len(rows))
    filled = best_items >= 0
    offsets = pa.array(np.r_[0, filled.sum(axis=1).cumsum()], pa.int32())
    columns = {"item_ids": pa.array([tokenizer.item_ids[item] for item in best_items[filled]], pa.string())}
    columns |= {name: pa.array(values[filled]) for name, values in scores.items()}
    return {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}


def recommend_dataset(
    model, tokenizer: SemanticIdTokenizer, dataset: Dataset, output_dir: str | Path, settings: RecommendSettings
) -> Path:
    """
    Writes the lists of all histories of `dataset` into `output_dir`, both as in the module's docstring, and returns
    it.

    The model runs in eval mode, on the device where it is. Of several processes each makes this call with its own
    model, and returns when its own share is written.

    Raises:
        ValueError: before the model runs; on settings out of range, missing columns, rows with problems (all are
            counted), model and tokenizer of different catalogs, or an `output_dir` with other lists.
    """
    state, output_dir = PartialState(cpu=model.device.type == "cpu"), Path(output_dir)
    settings = resolved(settings, model.eval())
    if not np.array_equal(model.catalog.item_codes.cpu(), tokenizer.item_codes):
        raise ValueError(
            f"Expected model and tokenizer of one catalog, found {model.config.num_items} items in the model and "
            f"{tokenizer.num_items}, or others, in the tokenizer. Load both from one checkpoint."
        )
    columns = check_columns(dataset, tokenizer, model.config.reads_times)
    record, record_file = work_record(model, tokenizer, dataset, settings), output_dir / ".recommend.json"
    check_same_work(record, record_file)  # by all processes, before the first one writes it below
    dataset = dataset.select_columns(columns).with_format("arrow")
    shards = range(0, len(dataset), settings.shard_size)
    unanswered = check_rows(dataset, tokenizer, shards, settings.exclude_history, settings.unknown)
    files = {start: f"part-{index:05d}-of-{len(shards):05d}.parquet" for index, start in enumerate(shards)}
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        with whole_file(record_file) as file:
            file.write_text(json.dumps(record, indent=1))
    missing = [start for start in shards if not (output_dir / files[start]).exists()]
    missing = broadcast_object_list([missing])[0]  # the first process's, lest two make one file, or none
    if state.is_main_process and len(missing) < len(shards):
        print(f"{len(shards) - len(missing):,} of {len(shards):,} files were made before")
    mine = missing[state.process_index :: state.num_processes]
    rows = sum(min(settings.shard_size, len(dataset) - start) for start in mine)
    with tqdm(total=rows, desc="recommending", unit="row", disable=not state.is_main_process) as bar:
        for start in mine:
            table = dataset[start : start + settings.shard_size]
            histories = read_histories(table, tokenizer, settings.exclude_history)
            columns = {"user_id": table["user_id"], **recommend_rows(model, tokenizer, histories, settings, bar)}
            with whole_file(output_dir / files[start]) as file:
                pq.write_table(pa.table(columns), file)
    if state.is_main_process and unanswered:
        print(
            f"{unanswered:,} of {len(dataset):,} rows have empty lists: no known item in the history, or all there are"
        )
    return output_dir


def main(args: RecommendArguments, settings: RecommendSettings) -> None:
    """Loads what the arguments name and recommends, on CUDA devices where there are some."""
    state = PartialState(cpu=not torch.cuda.is_available())  # else it takes processes without GPUs for strangers
    with state.main_process_first():  # which downloads and caches what the others find
        dataset = load_histories(args.histories, args.split)
        tokenizer = SemanticIdTokenizer.from_pretrained(args.checkpoint)
        dtype = torch.bfloat16 if args.bf16 else "auto"
        model = UniGRFForCausalLM.from_pretrained(args.checkpoint, dtype=dtype).to(state.device)
    recommend_dataset(model, tokenizer, dataset, args.output_dir, settings)


if __name__ == "__main__":
    main(*parse_arguments(RecommendArguments, RecommendSettings))

"""Prepare TAOBAO-MM for the trainer in bounded memory, from published tables to memory-mapped arrays.

    hf download TaoBao-MM/Taobao-MM --repo-type dataset --include "raw/*" --local-dir taobao-mm
    python -m recipes.papers.taobao.prepare --tables taobao-mm/raw --output_dir runs/taobao
    python -m recipes.papers.taobao.train --tables taobao-mm/raw --data_dir runs/taobao \
        --output_dir runs/taobao/training --max_steps 10000 --learning_rate 1e-3

Without the published tables, synthetic ones in the same schema take their place:

    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao/tables

`tables.py` describes the tables and reads them; `items.py` and `clicks.py` have the stages. The output folder has, in
the order of the sorted item ids:

- `item_ids.npy`: int64 [N].
- `content_embeddings.npy`: int8 [N, 128]; divide by 127.
- `semantic_ids.safetensors`: codebooks of the residual k-means, fitted on a sample.
- `item_codes.npy`: int32 [N, 4]; the last code is the collision token, an index inside a group of equal codes.
- `{train,test}_click_users.npy`, `{train,test}_click_items.npy`: int64 and int32 [clicks], sorted by user.
- `tokenizer/`, with `--tokenizer`: a `SemanticIdTokenizer`, for a checkpoint that reads and returns item ids.
- `measured.json`: wall and core seconds, peak memory, disk and counts of each stage.

The trainer needs the arrays alone. The tokenizer holds every item id as a string in a dictionary. For 35 million
items, first see `measured.json` and the extrapolation in `recipes/papers/taobao/results/taobao.json`.

The recipe counts and prints what it leaves out: history items and clicked items without an embedding, and clicks of
users without a known item. The last stages read all rows once, as a model would. They print the Recall@5 of the
recency baseline, the five last distinct items, and the share of clicks that repeat the history. A second run with the
same arguments and files does nothing. An interrupted run continues at the stage where it stopped.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from recipes.common.arguments import COUNT, SEED, check_ranges, parse_arguments
from recipes.common.files import check_writable, write_json
from recipes.common.profiling import PeakMemory
from recipes.common.run_tracking import Stages
from recipes.papers.taobao.clicks import check_rows, check_users, write_clicks
from recipes.papers.taobao.items import encode, fit, make_unique, write_items, write_tokenizer
from recipes.papers.taobao.tables import EMBEDDING, EMBEDDINGS, SAMPLES, USERS, table_files

RANGES = {
    **dict.fromkeys(("codebook_sizes", "last_level_size", "points_per_code", "num_iterations"), COUNT),
    "seed": SEED,
}


@dataclass
class TaobaoArguments:
    """Tables, codebooks and output."""

    tables: str = field(metadata={"help": "Folder of the published raw tables."})
    output_dir: str = field(metadata={"help": "Folder that receives the arrays."})
    embedding_column: str = field(
        default=EMBEDDING,
        metadata={
            "help": "Column of the embeddings. It is published under both names.",
            "choices": [EMBEDDING, EMBEDDINGS],
        },
    )
    codebook_sizes: list[int] = field(
        default_factory=lambda: [4096, 4096, 4096],
        metadata={"help": "Codes of each level, without the level of the collision token."},
    )
    last_level_size: int = field(
        default=4096, metadata={"help": "Most items that may share all codes but the collision token."}
    )
    points_per_code: int = field(
        default=256, metadata={"help": "Sampled items per code that the codebooks are fitted on."}
    )
    num_iterations: int = field(default=20, metadata={"help": "Iterations of k-means per level."})
    unknown_users: str = field(
        default="error",
        metadata={
            "help": "Clicks of users without a row in the user table: stop (error), or leave them out (skip).",
            "choices": ["error", "skip"],
        },
    )
    tokenizer: bool = field(
        default=False, metadata={"help": "Write a SemanticIdTokenizer, too. Its memory grows with the items."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sample and the codebooks."})


def prepare(args: TaobaoArguments) -> dict[str, dict]:
    """Run the stages that are not finished; return the content of `measured.json`."""
    check_ranges(args, RANGES)
    check_writable(args.output_dir, "output_dir")
    out = Path(args.output_dir)
    tables = Path(args.tables)
    stage = MeasuredStages(out)

    # Items
    files = [_identity(tables, name) for name in (EMBEDDINGS, "item_features")]
    names = ("codebook_sizes", "points_per_code", "num_iterations", "seed")
    fitting = {name: asdict(args)[name] for name in names}
    column = args.embedding_column
    outputs = ["item_ids.npy", "content_embeddings.npy"]
    stage("items", partial(write_items, tables, out, column), outputs, files=files, embedding_column=column)
    stage("codebooks", partial(fit, out, **fitting), ["semantic_ids.safetensors"], **fitting)
    stage("codes", partial(encode, out), ["item_codes.npy"])
    limit = args.last_level_size
    stage("suffixes", partial(make_unique, out, limit), ["item_codes.npy"], last_level_size=limit)

    # Users and clicks
    for split in ("train", "test"):
        files = [_identity(tables, name.format(split)) for name in (SAMPLES, USERS)]
        outputs = [f"{split}_click_users.npy", f"{split}_click_items.npy"]
        stage(f"{split} clicks", partial(write_clicks, tables, out, split), outputs, files=files)
        unknown = args.unknown_users
        stage(f"{split} users", partial(check_users, tables, out, split, unknown), [], unknown_users=unknown)
    for split in ("train", "test"):
        stage(f"{split} rows", partial(check_rows, tables, out, split), [])
    if args.tokenizer:
        stage("tokenizer", partial(write_tokenizer, out), ["tokenizer"])
    return stage.measured


class MeasuredStages:
    """
    Run each stage once and measure it; `measured.json` stores the measurements.

    Args:
        out: Output folder of the stages.
    """

    def __init__(self, out: Path):
        self.out = out
        self.file = out / "measured.json"
        self.stages = Stages(out)
        self.measured: dict[str, dict] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def __call__(self, name: str, run: Callable[[], dict], outputs: Iterable[str], **arguments) -> None:
        """
        Run a stage unless it is finished, and print its measurements.

        Args:
            name: Name of the stage.
            run: Function that does the work and returns counts.
            outputs: Files and folders of the output folder that the function writes.
            **arguments: Arguments of the stage; other ones make it run again.
        """
        paths = [self.out / output for output in outputs]
        self.stages(name, arguments, partial(self.measure, name, run, paths), [self.file, *paths])
        self.measured[name] = {"seconds": self.stages.done[name]["seconds"]} | self.measured[name]
        write_json(self.file, self.measured)
        plain = {key: value for key, value in self.measured[name].items() if not isinstance(value, dict)}
        print(", ".join(f"{key} {value}" for key, value in plain.items()), flush=True)

    def measure(self, name: str, run: Callable[[], dict], paths: list[Path]) -> None:
        """Run a stage and store its core seconds, memory, disk space and counts."""
        start = time.process_time()
        with PeakMemory() as peak:
            counts = run()
        files = [file for path in paths for file in (path, *path.glob("*")) if file.is_file()]
        self.measured[name] = {
            "cpu_seconds": round(time.process_time() - start, 1),
            "peak_mb": peak.megabytes("resident"),
            "private_mb": peak.megabytes("private"),
            "disk_mb": round(sum(file.stat().st_size for file in files) / 2**20, 1),
            **counts,
        }
        # Before the stage counts as finished.
        write_json(self.file, self.measured)


def _identity(tables: Path, name: str) -> list:
    """Return names, sizes and times of a table's files: hashing 50 GB takes longer than reading them."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in table_files(tables, name)]


if __name__ == "__main__":
    prepare(*parse_arguments(TaobaoArguments))

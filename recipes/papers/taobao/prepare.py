"""TAOBAO-MM made ready for the trainer in bounded memory: published tables in, memory-mapped arrays out.

    hf download TaoBao-MM/Taobao-MM --repo-type dataset --include "raw/*" --local-dir taobao-mm
    python -m recipes.papers.taobao.prepare --tables taobao-mm/raw --output_dir runs/taobao
    python -m recipes.papers.taobao.train --tables taobao-mm/raw --data_dir runs/taobao --output_dir runs/taobao/training \
        --max_steps 10000 --learning_rate 1e-3
    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao/tables       # or tables in the same schema, made up

The tables and how they are read are in `recipes/papers/taobao/tables.py`, the stages in `items.py` and
`clicks.py`. Output, rows in the order of the sorted item ids:

    item_ids.npy             int64 [N]
    content_embeddings.npy      int8 [N, 128], divide by 127
    semantic_ids.safetensors codebooks of the residual k-means, fitted on a sample
    item_codes.npy           int32 [N, 4]; the last code is a running index inside a group of equal codes
    {train,test}_click_users.npy, {train,test}_click_items.npy    int64 and int32 [clicks], sorted by user
    tokenizer/               with --tokenizer: a SemanticIdTokenizer, for a checkpoint that takes and gives item ids
    measured.json            of each stage: seconds (by the clock and of all cores), peak memory, disk, counts

Trainer and rows need the arrays alone. The tokenizer holds every item id as a string in a dictionary: see
`measured.json`, and the extrapolation in `recipes/papers/taobao/results/taobao.json`, before you ask for one of all 35 million
items.

What is dropped is counted and printed: history items and clicked items without an embedding, clicks of users without a
known item. The last stages read all rows once, before any model does, and print what "the five last distinct items"
reach and how many clicks are repeats. A second run with equal arguments and files does nothing; one that broke off
goes on with the stage where it did.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
from recipes.common.profiling import PeakMemory
from recipes.common.run_tracking import Stages
from recipes.papers.taobao.clicks import check_rows, check_users, write_clicks
from recipes.papers.taobao.items import encode, fit, make_unique, write_items, write_tokenizer
from recipes.papers.taobao.tables import EMBEDDING, EMBEDDINGS, SAMPLES, USERS, table_files


@dataclass
class TaobaoArguments:
    """Tables in, arrays out."""

    tables: str = field(metadata={"help": "Folder of the published raw tables."})
    output_dir: str = field(metadata={"help": "Folder that receives the arrays."})
    embedding_column: str = field(
        default=EMBEDDING,
        metadata={"help": "Of the embedding table; published under both names.", "choices": [EMBEDDING, EMBEDDINGS]},
    )
    codebook_sizes: list[int] = field(
        default_factory=lambda: [4096, 4096, 4096], metadata={"help": "Codes of each level but the last."}
    )
    last_level_size: int = field(default=4096, metadata={"help": "Most items that may share the other codes."})
    points_per_code: int = field(default=256, metadata={"help": "The codebooks are fitted on so many items a code."})
    num_iterations: int = field(default=20, metadata={"help": "Of k-means, a level."})
    unknown_users: str = field(
        default="error", metadata={"help": "Clicks without a row of the user table.", "choices": ["error", "skip"]}
    )
    tokenizer: bool = field(default=False, metadata={"help": "Write a SemanticIdTokenizer as well; takes memory."})
    seed: int = field(default=0, metadata={"help": "Of the sample and the codebooks."})


def prepare(args: TaobaoArguments) -> dict[str, dict]:
    """Runs the stages that were not run yet; returns `measured.json`."""
    out, tables = Path(args.output_dir), Path(args.tables)
    out.mkdir(parents=True, exist_ok=True)
    stages, file = Stages(out), out / "measured.json"
    measured: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}

    def stage(name: str, run: Callable[[], dict], made: Iterable[str], **arguments) -> None:
        def watched() -> None:
            start = time.process_time()
            with PeakMemory() as peak:
                counts = run()
            paths = [path for one in made for path in (out / one, *(out / one).glob("*")) if path.is_file()]
            measured[name] = {
                "cpu_seconds": round(time.process_time() - start, 1),
                "peak_mb": peak.megabytes("resident"),
                "private_mb": peak.megabytes("private"),
                "disk_mb": round(sum(path.stat().st_size for path in paths) / 2**20, 1),
                **counts,
            }
            write_json(file, measured)  # before the stage counts as done

        stages(name, arguments, watched, [file, *(out / one for one in made)])
        measured[name] = {"seconds": stages.done[name]["seconds"]} | measured[name]
        write_json(file, measured)
        plain = {key: value for key, value in measured[name].items() if not isinstance(value, dict)}
        print(", ".join(f"{key} {value}" for key, value in plain.items()), flush=True)

    files = [_identity(tables, name) for name in (EMBEDDINGS, "item_features")]
    names = ("codebook_sizes", "points_per_code", "num_iterations", "seed")
    fitting = {name: asdict(args)[name] for name in names}
    column, made = args.embedding_column, ["item_ids.npy", "content_embeddings.npy"]
    stage("items", partial(write_items, tables, out, column), made, files=files, embedding_column=column)
    stage("codebooks", partial(fit, out, **fitting), ["semantic_ids.safetensors"], **fitting)
    stage("codes", partial(encode, out), ["item_codes.npy"])
    limit = args.last_level_size
    stage("suffixes", partial(make_unique, out, limit), [], last_level_size=limit)
    for split in ("train", "test"):
        files = [_identity(tables, name.format(split)) for name in (SAMPLES, USERS)]
        made = [f"{split}_click_users.npy", f"{split}_click_items.npy"]
        stage(f"{split} clicks", partial(write_clicks, tables, out, split), made, files=files)
        unknown = args.unknown_users
        stage(f"{split} users", partial(check_users, tables, out, split, unknown), [], unknown_users=unknown)
    for split in ("train", "test"):
        stage(f"{split} rows", partial(check_rows, tables, out, split), [])
    if args.tokenizer:
        stage("tokenizer", partial(write_tokenizer, out), ["tokenizer"])
    return measured


def _identity(tables: Path, name: str) -> list:
    """Names, sizes and times of a table's files: to hash 50 GB takes longer than to read them."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in table_files(tables, name)]


if __name__ == "__main__":
    prepare(*parse_arguments(TaobaoArguments))

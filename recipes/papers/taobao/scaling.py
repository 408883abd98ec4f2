"""What all of TAOBAO-MM would take in time, memory and disk: the slopes between two measured runs of recipes.papers.taobao.prepare.

    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao-small/tables --num_items 250000 --num_users 50000
    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao/tables
    for run in runs/taobao-small runs/taobao; do
        python -m recipes.papers.taobao.prepare --tables $run/tables --output_dir $run --points_per_code 64 --num_iterations 10 --tokenizer
        python -m recipes.papers.taobao.train --tables $run/tables --data_dir $run --output_dir $run/training \
            --dense_loss_weight 0 --max_steps 300 --per_device_train_batch_size 32 --learning_rate 2e-3 --logging_steps 25
        python -m recipes.papers.taobao.train --tables $run/tables --data_dir $run --output_dir $run/second \
            --init_from $run/training/checkpoint --num_retrieved_items 10 --num_train_beams 20 \
            --dense_loss_weight 0 --max_steps 300 --per_device_train_batch_size 32 --learning_rate 5e-4 --logging_steps 25
    done
    python -m recipes.papers.taobao.scaling --runs runs/taobao-small runs/taobao --output_file recipes/papers/taobao/results/taobao.json

Time (of one core, since a shared machine tells nothing by its clock), memory and disk of a stage are taken to grow
linearly with what it reads (`UNITS`), from the larger run on. The sample for the codebooks does not grow with the items:
its stage is scaled to the defaults of `--points_per_code` and `--num_iterations`. An epoch is a row for each click, at
the larger run's time a row; where arithmetic gives its memory more than the slope does, the table has that.
Some things are measured at full size instead, on random numbers, since caches and arrays of that size are not what a
slope tells: a look-up among all item ids, whose difference to one among the larger run's is added for each history item;
the memory of sorting the ids and of the suffixes, which in small runs hides behind buffers; and a model with all codes
and their trie. Disk and network are not measured: these tables fit into the page cache.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recipes.common.arguments import parse_arguments
from recipes.common.profiling import PeakMemory
from recipes.common.run_tracking import made_by
from recipes.papers.taobao.items import DIM, sort_ids
from recipes.papers.taobao.prepare import TaobaoArguments
from recipes.papers.taobao.report import table
from recipes.papers.taobao.tables import BATCH_USERS, find_items
from recipes.papers.taobao.train import TaobaoTrainArguments, build_model
from tokenization import assign_collision_tokens, codebook_statistics

FULL = {"items": 35_400_000, "users": 8_790_000, "samples": 99_000_000}
UNITS = {
    "items": "items",
    "codes": "items",
    "suffixes": "items",
    "clicks": "samples",
    "users": "users",
    "rows": "users",
    "tokenizer": "items",
}
MEASURES = ("seconds", "cpu_seconds", "peak_mb", "private_mb", "disk_mb")
DEFAULTS = TaobaoArguments("", "")
SIZES = [*DEFAULTS.codebook_sizes, 64]


@dataclass
class ScalingArguments:
    """Which runs, and where the numbers go."""

    runs: list[str] = field(metadata={"help": "Output folders of recipes.papers.taobao.prepare, the smaller first."})
    output_file: str = field(metadata={"help": "JSON file for slopes and extrapolation."})
    note: str = field(default="", metadata={"help": "A sentence for the README: what else the machine was doing."})


def both_splits(measured: dict[str, dict]) -> dict[str, dict]:
    """`measured.json` with the stages of train and test put together: seconds and disk add up, memory does not."""
    stages = {name: dict(measured[name]) for name in ("items", "codebooks", "codes", "suffixes", "tokenizer")}
    for name in ("clicks", "users", "rows"):
        train, test = (measured[f"{split} {name}"] for split in ("train", "test"))
        stages[name] = {key: train[key] + test[key] for key in train}
        stages[name] |= {key: max(train[key], test[key]) for key in ("peak_mb", "private_mb")}
    stages["rows"]["users"] = stages["users"]["users"]  # all that are read, with or without clicks
    for key in ("repeat_share", "recency_recall@5"):
        stages["rows"][key] = measured["test rows"][key]
    health = stages["suffixes"].pop("health")
    stages["suffixes"] |= {"items": stages["items"]["items"]}
    stages["suffixes"] |= {key: health[key] for key in ("collision_rate", "largest_group", "reconstruction_error")}
    return stages


def extrapolate(small: dict[str, dict], large: dict[str, dict]) -> tuple[dict[str, dict], dict[str, dict]]:
    """What each stage of `both_splits` takes at full size, and what of it for one more item, user or sample."""
    slopes, full = {}, {}
    for stage, unit in UNITS.items():
        more, left = large[stage][unit] - small[stage][unit], FULL[unit] - large[stage][unit]
        slopes[stage] = {key: max(0.0, (large[stage][key] - small[stage][key]) / more) for key in MEASURES}
        full[stage] = {key: large[stage][key] + slopes[stage][key] * left for key in MEASURES}
    books, base = large["codebooks"], min(stage["private_mb"] for stage in large.values())  # base: what is imported
    ratio = DEFAULTS.points_per_code * max(DEFAULTS.codebook_sizes) / books["points"]
    work = ratio * DEFAULTS.num_iterations / books["num_iterations"]
    full["codebooks"] = {key: books[key] * work for key in ("seconds", "cpu_seconds")} | {"disk_mb": books["disk_mb"]}
    more = (books["private_mb"] - base) * (ratio - 1)
    full["codebooks"] |= {key: books[key] + more for key in ("peak_mb", "private_mb")}
    return slopes, full


def lookup_seconds(num_items: int) -> float:
    """Of one history item among so many, in batches as `user_histories` reads them: the median of five."""
    rng = np.random.default_rng(0)
    item_ids = np.sort(rng.integers(-(2**63), 2**63, num_items, dtype=np.int64))
    times = []
    for _ in range(5):
        wanted = np.repeat(rng.choice(item_ids, BATCH_USERS * 500), 2)  # histories of 1,000, half of them repeats
        start = time.process_time()
        find_items(item_ids, wanted)
        times.append((time.process_time() - start) / len(wanted))
    return float(np.median(times))


def full_codes() -> np.ndarray:
    """`FULL["items"]` distinct codes, int32 `[N, 4]`."""
    number = np.random.default_rng(0).permutation(FULL["items"])
    codes = np.empty((FULL["items"], 4), np.int32)
    for level, shift in ((0, 24), (1, 12), (2, 0)):
        codes[:, level] = (number % 2**24 * 4093 % 2**36) >> shift & 4095
    codes[:, 3] = number >> 24
    return codes


def full_arrays(codes: np.ndarray) -> dict[str, float]:
    """Megabytes that the stages of `UNITS` add which hold arrays of all items."""
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, FULL["items"], dtype=np.int64)
    with PeakMemory() as sorting:
        sort_ids(ids)
    added = {"items": (sorting.added_resident + ids.nbytes) / 2**20}
    del ids
    with PeakMemory() as suffixes:
        assign_collision_tokens(codes[:, :-1])
        codebook_statistics(codes[:, :-1], SIZES[:-1])
    return added | {"suffixes": suffixes.added_resident / 2**20}


def full_model(codes: np.ndarray) -> dict[str, float]:
    """Time and memory of an untrained model of these codes and as many embeddings, which stand for a mapped file."""
    start = time.process_time()
    with PeakMemory() as peak:
        embeddings = np.zeros((FULL["items"], DIM), np.int8)  # never written to: no page of it is held
        model = build_model(TaobaoTrainArguments("", ""), codes, embeddings, SIZES)
    with PeakMemory() as after:
        model.catalog.trie  # noqa: B018 - built at first use
    return {
        "cpu_seconds": round(time.process_time() - start, 1),
        "private_mb": max(round(peak.private / 2**20), round(after.private / 2**20)),
        "codes_mb": round(codes.nbytes / 2**20),
    }


def training(run: Path, stage: str, folder: str, stages: dict[str, dict]) -> dict:
    """What a training of `recipes.papers.taobao.train` took, and reached."""
    log = json.loads((run / folder / "training_log.json").read_text())
    asked = json.loads((run / folder / "arguments.json").read_text())["training"]
    rows = log["metrics"]["train_samples_per_second"] * log["metrics"]["train_runtime"]
    return {
        "what": f"{stage}, {stages['items']['items']:,} items",
        "rows": round(rows),
        "rows_a_step": asked["per_device_train_batch_size"] * asked["gradient_accumulation_steps"],
        "rows_per_second": log["metrics"]["train_samples_per_second"],
        "cpu_seconds": log["cpu_seconds"],
        "memory": log["memory"],
        "evaluation": log["evaluation"],
        "losses": {
            str(entry["step"]): [round(entry[f"{name}_loss"], 4) for name in ("generation", "ranking")]
            for entry in log["log_history"]
            if "generation_loss" in entry
        },
    }


def whole_training(small: dict, large: dict, runs: list[dict[str, dict]]) -> dict[str, float]:
    """Memory of a training on all items by the slope alone, and an epoch of all clicks, from two of `training`."""
    counts = [stages["items"]["items"] for stages in runs]
    private = [one["memory"]["training_private_mb"] for one in (small, large)]
    slope = max(0.0, (private[1] - private[0]) / (counts[1] - counts[0]))
    clicks = FULL["samples"] * runs[1]["rows"]["rows"] / runs[1]["clicks"]["samples"]
    seconds = large["cpu_seconds"]["training"] / large["rows"]
    return {
        "private_mb": round(private[1] + slope * (FULL["items"] - counts[1])),
        "rows": round(clicks),
        "epoch_core_hours": round(clicks * seconds / 3600, 1),
    }


def main(args: ScalingArguments) -> dict:
    """Writes the file and prints its table."""
    small, large = (both_splits(json.loads((Path(run) / "measured.json").read_text())) for run in args.runs)
    slopes, full = extrapolate(small, large)
    lookups = {count: lookup_seconds(count) for count in (large["items"]["items"], FULL["items"])}
    history_items = large["rows"]["history_items"] / large["rows"]["users"] * FULL["users"]
    for key in ("seconds", "cpu_seconds"):
        full["rows"][key] += history_items * (lookups[FULL["items"]] - lookups[large["items"]["items"]])
    codes = full_codes()
    for stage, added in full_arrays(codes).items():
        more = large[stage]["private_mb"] + added - full[stage]["private_mb"]
        full[stage] |= {key: full[stage][key] + max(0.0, more) for key in ("private_mb", "peak_mb")}
    trainings = {
        stage: [
            training(Path(run), stage, folder, measured)
            for run, measured in zip(args.runs, (small, large), strict=True)
        ]
        for stage, folder in (("stage I", "training"), ("stage II", "second"))
    }
    results = {
        "full": FULL,
        "extrapolated": {
            stage: {key: round(value, 1) for key, value in full[stage].items()} for stage in ("codebooks", *UNITS)
        },
        "slopes": {
            stage: {"unit": UNITS[stage], **{key: float(f"{value:.4g}") for key, value in slope.items()}}
            for stage, slope in slopes.items()
        },
        "lookup_ns": {str(count): round(1e9 * seconds, 1) for count, seconds in lookups.items()},
        "model at full size": full_model(codes),
        "runs": [small, large],
        "training": [one for pair in trainings.values() for one in pair],
        "training at full size": {stage: whole_training(*pair, [small, large]) for stage, pair in trainings.items()},
        "note": args.note,
        "made by": made_by(
            f"python -m recipes.papers.taobao.scaling --runs {' '.join(args.runs)} --output_file {args.output_file}"
        ),
    }
    Path(args.output_file).write_text(json.dumps(results, indent=1))
    print(table(results))
    return results


if __name__ == "__main__":
    main(*parse_arguments(ScalingArguments))

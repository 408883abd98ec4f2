"""Extrapolate time, memory and disk space of the recipe to all of TAOBAO-MM, from two measured runs.

    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao-small/tables \
        --num_items 250000 --num_users 50000
    python -m recipes.papers.taobao.synthetic --output_dir runs/taobao/tables
    for run in runs/taobao-small runs/taobao; do
        python -m recipes.papers.taobao.prepare --tables $run/tables --output_dir $run \
            --points_per_code 64 --num_iterations 10 --tokenizer
        python -m recipes.papers.taobao.train --tables $run/tables --data_dir $run --output_dir $run/training \
            --dense_loss_weight 0 --max_steps 300 --per_device_train_batch_size 32 --learning_rate 2e-3 \
            --logging_steps 25
        python -m recipes.papers.taobao.train --tables $run/tables --data_dir $run --output_dir $run/second \
            --init_from $run/training/checkpoint --num_retrieved_items 10 --num_train_beams 20 \
            --dense_loss_weight 0 --max_steps 300 --per_device_train_batch_size 32 --learning_rate 5e-4 \
            --logging_steps 25
    done
    python -m recipes.papers.taobao.scaling --runs runs/taobao-small runs/taobao \
        --output_file recipes/papers/taobao/results/taobao.json

The last command writes the JSON file and prints its tables.

From the larger run on, a stage's costs are assumed to grow linearly with what it reads (`UNITS`): core seconds, memory
and disk space. Core seconds count, since other work on a shared machine slows the clock. The sample for the codebooks
does not grow with the items. Its stage is scaled to the defaults of `--points_per_code` and `--num_iterations`. An
epoch is a row for each click, at the larger run's time per row. The table shows the arithmetic memory of a training if
it exceeds the slope's.

Slopes miss the effect of caches and of large arrays, so some costs are measured at full size, on random numbers:

- a search among all item ids, whose difference to one among the larger run's is added for each history item;
- the memory of sorting the ids and of the collision tokens, which in small runs hides behind buffers;
- a model with all codes and their trie.

Disk and network speed are not measured: these tables fit into the page cache.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recipes.common.arguments import parse_arguments
from recipes.common.files import check_writable, read_json
from recipes.common.profiling import PeakMemory
from recipes.common.run_tracking import made_by
from recipes.papers.taobao.items import DIM, sort_ids
from recipes.papers.taobao.prepare import TaobaoArguments
from recipes.papers.taobao.report import table
from recipes.papers.taobao.tables import BATCH_USERS, find_items
from recipes.papers.taobao.train import TaobaoTrainArguments, build_model
from tokenization import assign_collision_tokens, codebook_statistics

# Size of TAOBAO-MM.
FULL = {"items": 35_400_000, "users": 8_790_000, "samples": 99_000_000}
# Unit that each stage's costs grow with.
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
    """Runs and output."""

    runs: list[str] = field(
        metadata={"help": "Two output folders of recipes.papers.taobao.prepare, the smaller one first."}
    )
    output_file: str = field(metadata={"help": "JSON file that receives the slopes and the extrapolation."})
    note: str = field(
        default="", metadata={"help": "Sentence for the README about other work on the machine. Empty: no sentence."}
    )


def both_splits(measured: dict[str, dict]) -> dict[str, dict]:
    """Merge the stages of train and test in a `measured.json`: seconds and disk space add up, memory does not."""
    stages = {name: dict(measured[name]) for name in ("items", "codebooks", "codes", "suffixes", "tokenizer")}
    for name in ("clicks", "users", "rows"):
        train, test = (measured[f"{split} {name}"] for split in ("train", "test"))
        stages[name] = {key: train[key] + test[key] for key in train}
        stages[name] |= {key: max(train[key], test[key]) for key in ("peak_mb", "private_mb")}
    # Reading a user takes time with and without clicks.
    stages["rows"]["users"] = stages["users"]["users"]
    for key in ("repeat_share", "recency_recall@5"):
        stages["rows"][key] = measured["test rows"][key]
    # Version 0.1 saved the statistics as "health"; read it until 0.3.
    key = "health" if "health" in stages["suffixes"] else "codebook_statistics"
    statistics = stages["suffixes"].pop(key)
    stages["suffixes"] |= {"items": stages["items"]["items"]}
    stages["suffixes"] |= {key: statistics[key] for key in ("collision_rate", "largest_group", "reconstruction_error")}
    return stages


def extrapolate(small: dict[str, dict], large: dict[str, dict]) -> tuple[dict[str, dict], dict[str, dict]]:
    """
    Extrapolate the costs of each stage to full size.

    Args:
        small: Stages of the smaller run, as `both_splits` returns them.
        large: Stages of the larger run.

    Returns:
        Costs per further item, user or sample, and costs at full size, by stage.
    """
    # Stages that grow with the data
    slopes = {}
    full = {}
    for stage, unit in UNITS.items():
        step = large[stage][unit] - small[stage][unit]
        rest = FULL[unit] - large[stage][unit]
        slopes[stage] = {key: max(0.0, (large[stage][key] - small[stage][key]) / step) for key in MEASURES}
        full[stage] = {key: large[stage][key] + slopes[stage][key] * rest for key in MEASURES}

    # Codebooks grow with sample and iterations; the memory of imports does not
    codebooks = large["codebooks"]
    import_mb = min(stage["private_mb"] for stage in large.values())
    ratio = DEFAULTS.points_per_code * max(DEFAULTS.codebook_sizes) / codebooks["points"]
    work = ratio * DEFAULTS.num_iterations / codebooks["num_iterations"]
    additional_mb = (codebooks["private_mb"] - import_mb) * (ratio - 1)
    full["codebooks"] = {key: codebooks[key] * work for key in ("seconds", "cpu_seconds")}
    full["codebooks"] |= {"disk_mb": codebooks["disk_mb"]}
    full["codebooks"] |= {key: codebooks[key] + additional_mb for key in ("peak_mb", "private_mb")}
    return slopes, full


def lookup_seconds(num_items: int) -> float:
    """
    Measure the search for a history item's id among `num_items` ids, in batches as `user_histories` reads them.

    Returns:
        Median of five measurements, in core seconds per item.
    """
    rng = np.random.default_rng(0)
    item_ids = np.sort(rng.integers(-(2**63), 2**63, num_items, dtype=np.int64))
    times = []
    for _ in range(5):
        # Histories of 1,000 items, half of them repeats.
        history_ids = np.repeat(rng.choice(item_ids, BATCH_USERS * 500), 2)
        start = time.process_time()
        find_items(item_ids, history_ids)
        times.append((time.process_time() - start) / len(history_ids))
    return float(np.median(times))


def full_codes() -> np.ndarray:
    """Draw distinct codes for `FULL["items"]` items, int32 `[N, 4]`."""
    numbers = np.random.default_rng(0).permutation(FULL["items"])
    codes = np.empty((FULL["items"], 4), np.int32)
    for level, shift in ((0, 24), (1, 12), (2, 0)):
        codes[:, level] = (numbers % 2**24 * 4093 % 2**36) >> shift & 4095
    codes[:, 3] = numbers >> 24
    return codes


def full_arrays(codes: np.ndarray) -> dict[str, float]:
    """Measure the megabytes of the stages that hold arrays of all items, by stage."""
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, FULL["items"], dtype=np.int64)
    with PeakMemory() as sorting:
        sort_ids(ids)
    items_mb = (sorting.added_resident + ids.nbytes) / 2**20
    del ids
    with PeakMemory() as collisions:
        assign_collision_tokens(codes[:, :-1])
        codebook_statistics(codes[:, :-1], SIZES[:-1])
    return {"items": items_mb, "suffixes": collisions.added_resident / 2**20}


def full_model(codes: np.ndarray) -> dict[str, float]:
    """Measure time and memory of building an untrained model with these codes and as many embeddings."""
    start = time.process_time()
    with PeakMemory() as peak:
        # Like a mapped file: pages that nobody writes take no memory.
        embeddings = np.zeros((FULL["items"], DIM), np.int8)
        model = build_model(TaobaoTrainArguments("", ""), codes, embeddings, SIZES)
    with PeakMemory() as after:
        # The first use builds the trie.
        _ = model.catalog.trie
    return {
        "cpu_seconds": round(time.process_time() - start, 1),
        "private_mb": max(round(peak.private / 2**20), round(after.private / 2**20)),
        "codes_mb": round(codes.nbytes / 2**20),
    }


def training_costs(run: Path, stage: str, folder: str, stages: dict[str, dict]) -> dict:
    """
    Read the costs and the losses of a training of recipes.papers.taobao.train.

    Args:
        run: Output folder of recipes.papers.taobao.prepare.
        stage: Label of the training.
        folder: Name of the training's folder in `run`.
        stages: Stages of the run, as `both_splits` returns them.
    """
    log = json.loads((run / folder / "training_log.json").read_text())
    arguments = json.loads((run / folder / "arguments.json").read_text())["training"]
    num_rows = log["metrics"]["train_samples_per_second"] * log["metrics"]["train_runtime"]
    return {
        "what": f"{stage}, {stages['items']['items']:,} items",
        "rows": round(num_rows),
        "rows_a_step": arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"],
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


def full_training(small: dict, large: dict, runs: list[dict[str, dict]]) -> dict[str, float]:
    """
    Extrapolate a training to full size: its memory by the slope alone, and an epoch of all clicks.

    Args:
        small: Training of the smaller run, as `training_costs` returns it.
        large: Training of the larger run.
        runs: Stages of both runs, as `both_splits` returns them.
    """
    counts = [stages["items"]["items"] for stages in runs]
    private = [costs["memory"]["training_private_mb"] for costs in (small, large)]
    slope = max(0.0, (private[1] - private[0]) / (counts[1] - counts[0]))
    clicks = FULL["samples"] * runs[1]["rows"]["rows"] / runs[1]["clicks"]["samples"]
    seconds = large["cpu_seconds"]["training"] / large["rows"]
    return {
        "private_mb": round(private[1] + slope * (FULL["items"] - counts[1])),
        "rows": round(clicks),
        "epoch_core_hours": round(clicks * seconds / 3600, 1),
    }


def main(args: ScalingArguments) -> dict:
    """Write the JSON file, print its tables, and return its content."""
    # Slopes
    if len(args.runs) != 2:
        raise ValueError(f"`runs` must be two folders, the smaller run first, got {args.runs}. Name two.")
    check_writable(Path(args.output_file).parent, "output_file")
    small, large = (both_splits(read_json(Path(run) / "measured.json")) for run in args.runs)
    slopes, full = extrapolate(small, large)

    # Costs at full size that a slope misses
    lookups = {count: lookup_seconds(count) for count in (large["items"]["items"], FULL["items"])}
    history_items = large["rows"]["history_items"] / large["rows"]["users"] * FULL["users"]
    for key in ("seconds", "cpu_seconds"):
        full["rows"][key] += history_items * (lookups[FULL["items"]] - lookups[large["items"]["items"]])
    codes = full_codes()
    for stage, added_mb in full_arrays(codes).items():
        missing_mb = max(0.0, large[stage]["private_mb"] + added_mb - full[stage]["private_mb"])
        full[stage] |= {key: full[stage][key] + missing_mb for key in ("private_mb", "peak_mb")}

    # Trainings
    trainings = {
        stage: [
            training_costs(Path(run), stage, folder, stages)
            for run, stages in zip(args.runs, (small, large), strict=True)
        ]
        for stage, folder in (("stage I", "training"), ("stage II", "second"))
    }

    # Results
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
        "training": [costs for pair in trainings.values() for costs in pair],
        "training at full size": {stage: full_training(*pair, [small, large]) for stage, pair in trainings.items()},
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

"""Collect measured checkpoints of one data set into a JSON file, and make the table of all data sets.

    python -m recipes.results.lists --name amazon_beauty --data "Amazon Beauty" --seeds 0 1 2 \
        --training "--max_items 20 --crops_per_epoch 14" --runs results/seed0 results/seed1 results/seed2

A run is an output folder of recipes.evaluate. The file `lists_NAME.json` holds every run's figures, the flags of
recipes.train that made them, machine, versions and date. `python -m recipes.results.tables` writes the table.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.common.arguments import SEED, check_ranges, parse_arguments
from recipes.common.files import read_json, write_json
from recipes.common.result_files import plus_minus, spread
from recipes.common.run_tracking import made_by

METRICS = ("recall@10", "ndcg@10")
# The lists that need no training.
FLOORS = ("popularity", "text_cosine", "item_knn", "transitions")
# The table's columns: key of a row, and its title.
COLUMNS = {
    "text_cosine": "text",
    "item_knn": "item-kNN",
    "transitions": "counts",
    "generation": "generation alone",
    "dense": "dense score alone",
    "ranked": "all scores",
}


@dataclass
class ListsArguments:
    """Runs to collect."""

    name: str = field(metadata={"help": "Name of the file: lists_NAME.json."})
    data: str = field(metadata={"help": "The data set, as the table names it."})
    training: str = field(metadata={"help": "Flags of recipes.train that made the checkpoints, without paths."})
    runs: list[str] = field(metadata={"help": "Output folders of recipes.evaluate, one a seed."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seed of each training."})


def collect_lists(args: ListsArguments) -> dict[str, Any]:
    """
    Read the metrics of the runs.

    Raises:
        ValueError: for another number of seeds than runs, and for runs of different protocols.
    """
    check_ranges(args, {"seeds": SEED})
    if len(args.seeds) != len(args.runs):
        raise ValueError(
            f"`seeds` must hold one seed for each of {len(args.runs)} runs, got {args.seeds}. Name them in order."
        )
    metrics = [read_json(Path(run) / "metrics.json") for run in args.runs]
    if any(run["protocol"] != metrics[0]["protocol"] for run in metrics):
        raise ValueError(f"`runs` must share one protocol, got different ones in {args.runs}. Collect them apart.")
    rows = [{**run["baselines"], **run["parts"], "generation": run["generation"]} for run in metrics]
    rows = [row | {"ranked": run["ranked"]} for row, run in zip(rows, metrics, strict=True)]
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    # The baselines are those of the first run: they know no seed.
    names = [*metrics[0]["baselines"], *(name for name in shared if name not in metrics[0]["baselines"])]
    return {
        "data": args.data,
        "protocol": metrics[0]["protocol"],
        "seeds": args.seeds,
        "rows": {
            name: {metric: [round(row[name][metric], 5) for row in rows if name in row] for metric in METRICS}
            for name in names
        },
        "AUC": [run["ranking"].get("auc") for run in metrics],
        "new items": [run["new items"] for run in metrics],
        "chosen on validation": [run["selection"] for run in metrics],
        "made by": made_by(f"python -m recipes.train {args.training}; python -m recipes.evaluate"),
    }


def mean_cell(row: dict[str, list[float]] | None) -> str:
    """Write Recall@10 / NDCG@10 of a row, each with its deviation over seeds, if there are several."""
    if row is None:
        return "-"
    return " / ".join(plus_minus(*spread(row[metric])) for metric in METRICS)


def gain(result: dict[str, Any]) -> str:
    """Write the gain of all scores over the strongest score alone or baseline, in NDCG@10."""
    means = {name: spread(row["ndcg@10"])[0] for name, row in result["rows"].items()}
    ours = means.pop("ranked")
    return f"{100 * (ours / max(means.values()) - 1):+.1f} %"


def entries_of(results: dict[str, dict]) -> dict[str, dict]:
    """Return the content of all `lists_*.json`, by name."""
    return {name: result for name, result in results.items() if name.startswith("lists_")}


def table(results: dict[str, dict]) -> str:
    """Write the table of all `lists_*.json`, and under it how each line was made."""
    lines = [
        f"| Recall@10 / NDCG@10, test | {' | '.join(COLUMNS.values())} | over the strongest other | AUC |",
        "| --- " * (len(COLUMNS) + 3) + "|",
    ]
    notes = []
    for result in entries_of(results).values():
        seeds = result["seeds"]
        count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        cells = [mean_cell(result["rows"].get(name)) for name in COLUMNS]
        cells[-1] = f"**{cells[-1]}**"
        aucs = [auc for auc in result["AUC"] if auc is not None]
        auc = plus_minus(*spread(aucs)) if aucs else "-"
        lines.append(f"| {result['data']} ({count}) | {' | '.join(cells)} | {gain(result)} | {auc} |")
        made = result["made by"]
        protocol = result["protocol"]
        notes.append(
            f"- {result['data']}: {protocol['users']:,} users, {protocol['catalog size']:,} items, "
            f"{protocol['history']}; trained on {protocol['trained on']}; seeds {', '.join(map(str, seeds))}. "
            f"`{made['command']}` on {made['machine']}, {made['versions']}, {made['date']}."
        )
    return "\n".join([*lines, "", *notes])


def main(args: ListsArguments) -> None:
    """Write the JSON file of a data set."""
    file = Path(__file__).parent / f"lists_{args.name}.json"
    write_json(file, collect_lists(args))
    print(f"{file}: {len(args.runs)} runs. Write the tables: python -m recipes.results.tables")


if __name__ == "__main__":
    main(*parse_arguments(ListsArguments))

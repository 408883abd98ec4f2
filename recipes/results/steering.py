"""Measure what `diversity` and `popularity_correction` give and cost, on test, at the options a checkpoint serves.

    python -m recipes.results.steering --checkpoint runs/demo/checkpoint --data_dir runs/demo/data

The file `steering.json` holds the figures; `python -m recipes.results.tables` writes the table.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.common.arguments import check_folder, parse_arguments
from recipes.common.files import write_json
from recipes.common.run_tracking import made_by
from recipes.data.prepared import load_prepared, load_splits
from recipes.evaluation.beyond_accuracy import STATISTICS, ListStatistics
from recipes.evaluation.inference import Measurement, candidates, fused_lists, load_checkpoint
from recipes.evaluation.metrics.next_item.next_item import mean_values, target_ranks

FILE = Path(__file__).parent / "steering.json"
DIVERSITIES = (0.5, 1.0, 2.0, 4.0)
CORRECTIONS = (0.5, 1.0, 2.0)
LIST_LENGTH = 50
COLUMNS = {
    "recall@10": "Recall@10",
    "ndcg@10": "NDCG@10",
    "recall@10 of tail items": "tail items",
    **{key: title for key, title in STATISTICS.items() if key != "diversity"},
    # The option has the name of the statistic.
    "diversity of lists": STATISTICS["diversity"],
}


@dataclass
class SteeringArguments:
    """Checkpoint and data."""

    checkpoint: str = field(metadata={"help": "Local checkpoint that recipes.evaluate measured with --store True."})
    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    data: str = field(default="MovieLens-100K, the demo", metadata={"help": "The data set, as the table names it."})


def measure_steering(args: SteeringArguments) -> dict[str, Any]:
    """Measure the lists of every setting, all from one search."""
    check_folder(args.checkpoint, "checkpoint")
    model, tokenizer = load_checkpoint(args.checkpoint)
    options = model.serving_options()
    dataset = load_splits(args.data_dir)
    embeddings = load_prepared(args.data_dir).embeddings
    statistics = ListStatistics.of_splits(dataset, tokenizer.num_items, embeddings)
    targets = torch.tensor(dataset["test"]["target"][:]).long()
    measurement = Measurement(
        max_items=options.max_items,
        max_long_items=options.max_long_items,
        ranking_target=options.ranking_target,
        num_dense_candidates=options.num_dense_candidates,
        num_transition_candidates=options.num_transition_candidates,
        transition_settings=options.transition_settings if options.reads_transitions else None,
        exclude_history=options.exclude_history,
    )
    scored = candidates(model, tokenizer, dataset["test"], options.num_beams, measurement)

    @torch.no_grad()
    def representations(items: torch.LongTensor) -> torch.Tensor:
        return model.scorer.representations(items.to(model.device)).cpu()

    def measure(**steering: float) -> dict[str, float]:
        weights = asdict(options) | steering
        lists = fused_lists(scored, weights, LIST_LENGTH, options.rerank_top_k, representations)
        ranks = target_ranks(lists, targets)
        values = mean_values(ranks) | statistics.of(lists, ranks)
        values["diversity of lists"] = values.pop("diversity", float("nan"))
        return steering | {name: round(values[name], 5) for name in COLUMNS if name in values}

    rows = [measure(diversity=0.0, popularity_correction=0.0)]
    rows += [measure(diversity=value, popularity_correction=0.0) for value in DIVERSITIES]
    rows += [measure(diversity=0.0, popularity_correction=value) for value in CORRECTIONS]
    return {"data": args.data, "rows": rows, "made by": made_by("python -m recipes.results.steering")}


def table(result: dict[str, Any]) -> str:
    """Write the table of all settings, and how it was made."""
    names = [name for name in COLUMNS if name in result["rows"][0]]
    lines = [
        f"| {result['data']} | {' | '.join(COLUMNS[name] for name in names)} |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for row in result["rows"]:
        settings = [f"`{name}={row[name]:g}`" for name in ("diversity", "popularity_correction") if row[name]]
        cells = [f"{row[name]:.4g}" for name in names]
        lines.append(f"| {' '.join(settings) or 'as served'} | {' | '.join(cells)} |")
    made = result["made by"]
    note = f"`{made['command']}` on {made['machine']}, {made['versions']}, {made['date']}."
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    write_json(FILE, measure_steering(*parse_arguments(SteeringArguments)))
    print(f"{FILE}: write the tables with python -m recipes.results.tables")

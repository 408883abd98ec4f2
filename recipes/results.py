"""What was measured: collects runs into one small JSON beside the recipes, and makes the tables from it.

    python -m recipes.results --runs runs/demo runs/demo-seed1 runs/demo-seed2 --name movielens_100k
    python -m recipes.results                # writes all tables again from recipes/results/*.json

A JSON holds the mean and the standard deviation over the runs, what every run reached, and how it was made: command,
seeds, machine, versions, date. Both README.md, which has the headline, and recipes/results/README.md, which has the rest,
are written between their `<!-- results:NAME -->` marks and nowhere else.
"""

import datetime
import importlib.metadata
import json
import platform
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from recipes import decoding_report, headline, recochain_report, taobao_report, unigrf_report

RESULTS = Path(__file__).parent / "results"
WRITTEN = (Path(__file__).parents[1] / "README.md", RESULTS / "README.md")
COLUMNS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")


@dataclass
class ResultsArguments:
    """Which runs to collect; without any, only the tables are written again."""

    runs: list[str] = field(default_factory=list, metadata={"help": "Output folders of recipes.demo, one a seed."})
    name: str | None = field(default=None, metadata={"help": "Name of the JSON file in recipes/results."})


def made_by(command: str) -> dict[str, str]:
    """How and where a figure was made: command, machine, versions, date."""
    packages = ("torch", "transformers", "datasets", "accelerate", "faiss-cpu")
    return {
        "command": command,
        "machine": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "date": datetime.date.today().isoformat(),
    }


def collect(runs: list[Path]) -> dict:
    """Mean and standard deviation of several runs that differ in their seed; raises `ValueError` if they differ in more."""
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    protocols = [{key: value for key, value in one["protocol"].items() if key != "seed"} for one in metrics]
    if any(protocol != protocols[0] for protocol in protocols):
        raise ValueError(f"Expected runs of one protocol, found different ones: {protocols}. Collect them apart.")

    def spread(values: list[float]) -> dict[str, float]:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 5), "std": round(deviation, 5)}

    def rows(pick) -> dict:
        return {column: spread([pick(one)[column] for one in metrics]) for column in COLUMNS}

    return {
        "protocol": protocols[0],
        "seeds": [one["protocol"]["seed"] for one in metrics],
        "rows": {
            **{name: rows(lambda one, name=name: one["baselines"][name]) for name in metrics[0]["baselines"]},
            "generation": rows(lambda one: one["generation"]),
            "generation + ranking": rows(lambda one: one["ranked"]),
        },
        "like AUC": spread([one["ranking"]["auc"] for one in metrics]),
        "beam holds the target": spread([one["beam holds the target"] for one in metrics]),
        "invalid items": sum(one["invalid_items"] for one in metrics),
        "generated items checked": sum(one["generated_items_checked"] for one in metrics),
        "chosen on validation": [
            {name: one["selection"][name] for name in ("num_beams", "ranking_weight", "item_weight")}
            for one in metrics
        ],
        "seconds": [one["seconds"] for one in metrics],
        "runs": [{"generation": one["generation"], "ranked": one["ranked"]} for one in metrics],
        "made by": metrics[0]["made_by"],
    }


def table(results: dict) -> str:
    """The table of runs that `collect` put together, in Markdown."""
    lines = [
        "| test | " + " | ".join(COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in results["rows"].items():
        cells = [f"{one['mean']:.4f}" + (f" ± {one['std']:.4f}" if one["std"] else "") for one in row.values()]
        lines.append(f"| {name.replace('_', '-')} | " + " | ".join(cells) + " |")
    auc, made = results["like AUC"], results["made by"]
    lines += [
        "",
        f"AUC of like / dislike on the held-out interaction: {auc['mean']:.4f} ± {auc['std']:.4f}. Items generated that "
        f"do not exist: {results['invalid items']} of {results['generated items checked']:,}.",
        "",
        "Protocol: " + "; ".join(f"{key}: {value}" for key, value in results["protocol"].items()) + ".",
        f"Mean ± standard deviation over seeds {', '.join(map(str, results['seeds']))}. Made by `{made['command']}` on "
        f"{made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)


TABLES = {
    "decoding": decoding_report.table,
    "movielens_100k": table,
    "recochain": recochain_report.table,
    "recochain_beauty": recochain_report.table,
    "taobao": taobao_report.table,
    "unigrf_ml1m": unigrf_report.table,
}


def with_tables(text: str) -> str:
    """A README's text, with what is between its marks made anew from the results."""
    results = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    tables = {"headline": headline.table(results), **{name: table(results[name]) for name, table in TABLES.items()}}
    for name, lines in tables.items():
        begin, end = f"<!-- results:{name} -->", f"<!-- end:{name} -->"
        new = f"{begin}\n\n{lines}\n\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, new=new: new, text, flags=re.DOTALL)
    return text


def main(args: ResultsArguments) -> None:
    """Collects the runs, if any, and writes the tables."""
    if args.runs:
        if args.name not in TABLES:
            raise ValueError(f"Expected --name for the results of --runs, one of {list(TABLES)}, found {args.name}.")
        (RESULTS / f"{args.name}.json").write_text(json.dumps(collect([Path(run) for run in args.runs]), indent=1))
    for file in WRITTEN:
        file.write_text(with_tables(file.read_text()))


if __name__ == "__main__":
    main(HfArgumentParser(ResultsArguments).parse_args_into_dataclasses()[0])

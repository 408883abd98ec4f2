"""What was measured: collects runs into one small JSON beside the recipes, and makes the tables from it.

    python -m recipes.results.tables --runs runs/demo runs/demo-seed1 runs/demo-seed2     # of recipes.demo: movielens_100k.json
    python -m recipes.results.tables                # writes all tables again from all recipes' results/*.json

A JSON holds the mean and the standard deviation over the runs, what every run reached, and how it was made: command,
seeds, machine, versions, date. Both README.md, which has the headline, and recipes/results/README.md, which has the rest,
are written between their `<!-- results:NAME -->` marks and nowhere else.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from recipes.benchmarks import report as decoding_report
from recipes.common.arguments import parse_arguments
from recipes.common.result_files import plus_minus, spread
from recipes.evaluation.report import COLUMNS
from recipes.papers.recochain import report as recochain_report
from recipes.papers.taobao import report as taobao_report
from recipes.papers.unigrf import report as unigrf_report
from recipes.results import headline

RESULTS = Path(__file__).parent
RECIPES = RESULTS.parent
WRITTEN = (RECIPES.parent / "README.md", RESULTS / "README.md")
DEMO = "movielens_100k"  # the one that is made of runs of recipes.demo


@dataclass
class ResultsArguments:
    """Which runs to collect; without any, only the tables are written again."""

    runs: list[str] = field(default_factory=list, metadata={"help": "Output folders of recipes.demo, one a seed."})


def collect(runs: list[Path]) -> dict:
    """Mean and standard deviation of several runs that differ in their seed; raises `ValueError` if they differ in more."""
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    seed = "seed of the codebooks"  # and of all else in recipes.demo
    protocols = [{key: value for key, value in one["protocol"].items() if key != seed} for one in metrics]
    if any(protocol != protocols[0] for protocol in protocols):
        raise ValueError(f"Expected runs of one protocol, found different ones: {protocols}. Collect them apart.")

    def told(values: list[float]) -> dict[str, float]:
        mean, deviation = spread(values)
        return {"mean": round(mean, 5), "std": None if deviation is None else round(deviation, 5)}

    def rows(pick) -> dict:
        return {column: told([pick(one)[column] for one in metrics]) for column in COLUMNS}

    return {
        "protocol": protocols[0],
        "seeds": [one["protocol"][seed] for one in metrics],
        "rows": {
            **{name: rows(lambda one, name=name: one["baselines"][name]) for name in metrics[0]["baselines"]},
            "generation": rows(lambda one: one["generation"]),
            "generation + ranking": rows(lambda one: one["ranked"]),
        },
        "like AUC": told([one["ranking"]["auc"] for one in metrics]),
        "beam holds the target": told([one["beam holds the target"] for one in metrics]),
        "invalid items": sum(one["invalid_items"] for one in metrics),
        "generated items checked": sum(one["generated_items_checked"] for one in metrics),
        "chosen on validation": [
            {name: one["selection"][name] for name in ("num_beams", "ranking_weight", "dense_weight")}
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
        cells = [plus_minus(one["mean"], one["std"] or None) for one in row.values()]
        lines.append(f"| {name.replace('_', '-')} | " + " | ".join(cells) + " |")
    auc, made = results["like AUC"], results["made by"]
    lines += [
        "",
        f"AUC of like / dislike on the held-out interaction: {plus_minus(auc['mean'], auc['std'])}. Items generated that "
        f"do not exist: {results['invalid items']} of {results['generated items checked']:,}.",
        "",
        "Protocol: " + "; ".join(f"{key}: {value}" for key, value in results["protocol"].items()) + ".",
        f"Mean ± standard deviation over seeds {', '.join(map(str, results['seeds']))}. Made by `{made['command']}` on "
        f"{made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)


TABLES = {
    "decoding": decoding_report.table,
    "decoding_h100": decoding_report.table,
    DEMO: table,
    "recochain": recochain_report.table,
    "recochain_beauty": recochain_report.table,
    "recochain_beauty_llama": recochain_report.table,
    "recochain_beauty_tried": recochain_report.tried_table,
    "taobao": taobao_report.table,
    "unigrf_ml1m": unigrf_report.table,
}


def with_tables(text: str) -> str:
    """A README's text, with what is between its marks made anew from the results."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(RECIPES.rglob("results/*.json"))}
    tables = {"headline": headline.table(results), **{name: table(results[name]) for name, table in TABLES.items()}}
    for name, lines in tables.items():
        begin, end = f"<!-- results:{name} -->", f"<!-- end:{name} -->"
        new = f"{begin}\n\n{lines}\n\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, new=new: new, text, flags=re.DOTALL)
    return text


def main(args: ResultsArguments) -> None:
    """Collects the runs, if any, and writes the tables."""
    if args.runs:
        (RESULTS / f"{DEMO}.json").write_text(json.dumps(collect([Path(run) for run in args.runs]), indent=1))
    for file in WRITTEN:
        file.write_text(with_tables(file.read_text()))


if __name__ == "__main__":
    main(*parse_arguments(ResultsArguments))

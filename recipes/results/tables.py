"""Collect runs of the demo into one JSON file, and write the tables of all pages from the JSON files.

    python -m recipes.results.tables --runs runs/demo runs/demo-seed1 runs/demo-seed2     # of recipes.demo
    python -m recipes.results.tables                # write all tables again

A JSON file holds mean and standard deviation over the runs, each run, and how it was made: command, seeds, machine,
versions, date. A page holds its tables between `<!-- results:NAME -->` and `<!-- end:NAME -->`; other text stays.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from recipes.benchmarks import report as decoding_report
from recipes.benchmarks import serving, training
from recipes.common.arguments import parse_arguments
from recipes.common.result_files import plus_minus, spread
from recipes.evaluation.report import COLUMNS
from recipes.papers.recochain import report as recochain_report
from recipes.papers.taobao import report as taobao_report
from recipes.papers.unigrf import report as unigrf_report
from recipes.results import headline, lists, steering

RESULTS = Path(__file__).parent
RECIPES = RESULTS.parent
DEMO = "movielens_100k"  # the file that is made of runs of recipes.demo
SEED = "seed of the codebooks"  # and of everything else in recipes.demo
# Pages of `results/` folders hold whole tables, the pages above excerpts.
PAPERS = RECIPES / "papers"
PAGES: dict[Path, tuple[str, ...]] = {
    RECIPES.parent / "README.md": ("headline",),
    RESULTS / "README.md": ("index", "lists", DEMO, "steering"),
    RECIPES / "benchmarks" / "README.md": ("decoding_ratios", "decoding_h100_ratios", "serving", "training"),
    RECIPES / "benchmarks" / "results" / "README.md": ("decoding", "decoding_h100"),
    PAPERS / "unigrf" / "README.md": ("unigrf_ml1m_excerpt",),
    PAPERS / "unigrf" / "results" / "README.md": ("unigrf_ml1m",),
    PAPERS / "recochain" / "README.md": ("recochain_excerpt", "recochain_beauty_excerpt"),
    PAPERS / "recochain" / "results" / "README.md": (
        "recochain",
        "recochain_beauty",
        "recochain_beauty_tried",
        "recochain_beauty_llama",
    ),
    PAPERS / "taobao" / "README.md": ("taobao",),
}
WRITTEN = tuple(PAGES)
# Names of lists in a table, by the score that orders them.
LISTS = {"generation": "ordered by `generation_score`", "generation + ranking": "ordered by `score`"}
# Terms of 0.1 in the reports, and the terms of the pages.
TERMS = {"item score alone": "`dense_score` alone", "item-level score": "`dense_score`"}


@dataclass
class ResultsArguments:
    """Runs to collect."""

    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "Output folders of recipes.demo, one per seed. Empty, the default: only write the tables."},
    )


def collect(runs: list[Path]) -> dict:
    """
    Compute mean and standard deviation over runs of different seeds.

    Raises:
        ValueError: for runs of different protocols.
    """
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    protocols = [{key: value for key, value in run["protocol"].items() if key != SEED} for run in metrics]
    if any(protocol != protocols[0] for protocol in protocols):
        raise ValueError(f"`runs` must share one protocol, got different ones: {protocols}. Collect them apart.")

    def summary(values: list[float]) -> dict[str, float | None]:
        mean, deviation = spread(values)
        return {"mean": round(mean, 5), "std": None if deviation is None else round(deviation, 5)}

    def columns(list_of: Callable[[dict], dict]) -> dict:
        return {column: summary([list_of(run)[column] for run in metrics]) for column in COLUMNS}

    return {
        "protocol": protocols[0],
        "seeds": [run["protocol"][SEED] for run in metrics],
        "rows": {
            **{name: columns(lambda run, name=name: run["baselines"][name]) for name in metrics[0]["baselines"]},
            "generation": columns(lambda run: run["generation"]),
            "generation + ranking": columns(lambda run: run["ranked"]),
        },
        "like AUC": summary([run["ranking"]["auc"] for run in metrics]),
        "beam holds the target": summary([run["beam holds the target"] for run in metrics]),
        "invalid items": sum(run["invalid_items"] for run in metrics),
        "generated items checked": sum(run["generated_items_checked"] for run in metrics),
        "chosen on validation": [
            {name: run["selection"][name] for name in ("num_beams", "ranking_weight", "dense_weight")}
            for run in metrics
        ],
        "seconds": [run["seconds"] for run in metrics],
        "runs": [{"generation": run["generation"], "ranked": run["ranked"]} for run in metrics],
        "made by": metrics[0]["made_by"],
    }


def table(results: dict) -> str:
    """Write the table of runs that `collect` put together, in Markdown."""
    lines = ["| test | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, row in results["rows"].items():
        cells = [plus_minus(value["mean"], value["std"] or None) for value in row.values()]
        lines.append(f"| {LISTS.get(name, name.replace('_', '-'))} | " + " | ".join(cells) + " |")
    auc = results["like AUC"]
    made = results["made by"]
    lines += [
        "",
        f"AUC of like / dislike on the held-out interaction: {plus_minus(auc['mean'], auc['std'])}. Items generated "
        f"that do not exist: {results['invalid items']} of {results['generated items checked']:,}.",
        "",
        "Protocol: " + "; ".join(f"{key}: {value}" for key, value in results["protocol"].items()) + ".",
        f"Mean ± standard deviation over seeds {', '.join(map(str, results['seeds']))}. Made by `{made['command']}` "
        f"on {made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)


# The whole table of each JSON file.
TABLES = {
    "decoding": decoding_report.table,
    "decoding_h100": decoding_report.table,
    DEMO: table,
    "recochain": recochain_report.table,
    "recochain_beauty": recochain_report.table,
    "recochain_beauty_llama": recochain_report.table,
    "recochain_beauty_tried": recochain_report.tried_table,
    "serving": serving.table,
    "steering": steering.table,
    "taobao": taobao_report.table,
    "training": training.table,
    "unigrf_ml1m": unigrf_report.table,
}
# Tables of several files.
SHORT_TABLES = {
    "headline": headline.readme_table,
    "index": headline.index_table,
    "lists": lists.table,
}


@dataclass
class Excerpt:
    """
    Some rows and columns of a whole table, and the table of baselines behind it.

    Args:
        source: Name of the whole table.
        columns: Places of the columns, from 0.
        rows: Beginnings of the rows' first cells.
        baselines: Whether the last table of the source follows.
    """

    source: str
    columns: tuple[int, ...]
    rows: tuple[str, ...]
    baselines: bool = False

    def of(self, text: str) -> str:
        """Return the excerpt of the whole table's Markdown."""
        head, rule, *rows = markdown_tables(text)[0]
        chosen = [row for row in rows if row.removeprefix("| ").startswith(self.rows)]
        lines = []
        for line in (head, rule, *chosen):
            cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            lines.append("| " + " | ".join(cells[column] for column in self.columns) + " |")
        return "\n".join([*lines, *(["", *markdown_tables(text)[-1]] if self.baselines else [])])


RATIOS = (
    "beam search, 256 beams, 261 tokens, 1 user, float32",
    "beam search, 50 beams, 261 tokens, 8 users, float32",
    "beams and ranking of 256, 511 tokens, 1 user, float32",
    "ranking 256 candidates of 17 tokens on 505",
    "the same, against the cache repeated, float32",
    "recommend over generate, 256 beams on 36 tokens, 1 user, sub-histories of 10, float32",
    "recommend over generate, 256 beams on 36 tokens, 1 user, sub-histories of 10, the best 20 ranked",
    "trie of 1M items",
)
UNIGRF_ROWS = (
    "hstu, atomic, retrieval (temperature 0.05)",
    "hstu, atomic, ranking (temperature 0.05)",
    "hstu, atomic, joint (temperature 0.05)",
    *(f"llama, atomic, {row} |" for row in ("retrieval", "ranking", "joint", "weighter", "enhancer", "both")),
    "llama, atomic, joint (ranking weight 3)",
    "llama, semantic, joint",
    "llama, semantic-vectors, joint",
    "llama-deep, atomic, joint",
    "*UniGRF-Llama, paper*",
    "*SASRec, HSTU's code base*",
    "*HSTU",
)
RECOCHAIN_ROWS = ("default", "k0 |", "no-item-score", "not-injected", "long-first-stage-k0", "paper |")
BEAUTY_ROWS = ("default", "frozen-k0", "k0 |", "no-item-score", "not-injected-k0")
RECOCHAIN_COLUMNS = (0, 1, 2, 5, 7, 8, 9, 10)
EXCERPTS = {
    "decoding_ratios": Excerpt("decoding", (0, 1, 3), RATIOS),
    "decoding_h100_ratios": Excerpt("decoding_h100", (0, 1, 3), RATIOS),
    "unigrf_ml1m_excerpt": Excerpt("unigrf_ml1m", (0, 1, 2, 3, 6, 7), UNIGRF_ROWS),
    "recochain_excerpt": Excerpt("recochain", RECOCHAIN_COLUMNS, RECOCHAIN_ROWS, baselines=True),
    "recochain_beauty_excerpt": Excerpt("recochain_beauty", RECOCHAIN_COLUMNS, BEAUTY_ROWS, baselines=True),
}


def markdown_tables(text: str) -> list[list[str]]:
    """Split Markdown into its tables, each a list of lines."""
    return [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]


def make_tables() -> dict[str, str]:
    """Make every table from the committed results, in Markdown."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(RECIPES.rglob("results/*.json"))}
    tables = {name: make(results[name]) for name, make in TABLES.items()}
    tables |= {name: excerpt.of(tables[excerpt.source]) for name, excerpt in EXCERPTS.items()}
    tables |= {name: make(results) for name, make in SHORT_TABLES.items()}
    for old, new in TERMS.items():
        tables = {name: text.replace(old, new) for name, text in tables.items()}
    return tables


def with_tables(text: str) -> str:
    """Return a page's text with the content of its marks made anew from the results."""
    for name, lines in make_tables().items():
        begin = f"<!-- results:{name} -->"
        end = f"<!-- end:{name} -->"
        content = f"{begin}\n\n{lines}\n\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, content=content: content, text, flags=re.DOTALL)
    return text


def main(args: ResultsArguments) -> None:
    """Collect the runs, if any, and write the tables."""
    if args.runs:
        results = collect([Path(run) for run in args.runs])
        (RESULTS / f"{DEMO}.json").write_text(json.dumps(results, indent=1))
    for file in WRITTEN:
        file.write_text(with_tables(file.read_text()))


if __name__ == "__main__":
    main(*parse_arguments(ResultsArguments))

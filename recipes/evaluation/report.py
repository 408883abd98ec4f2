"""Write the report of a run: one page, `report.md`, with tables, pictures and lists of example users.

    from recipes.evaluation.report import write_report

    write_report("runs/demo", metrics, trainer.state.log_history, code_counts, ranks)

`recipes.demo` writes this report. The function measures nothing, so a report can be written again at any time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

# Before the import of pyplot: a training machine has no display.
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from recipes.common.files import read_json, whole_file
from recipes.evaluation.beyond_accuracy import RECALLS, STATISTICS
from tokenization import SemanticIdTokenizer

COLUMNS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")
# Keys of metrics.json and ranks.json, and the names of their lists by the score that orders them.
LISTS = {"generation": "by generation_score", "ranked": "by score"}
TRAIN_LOSSES = {
    "loss": "training",
    "generation_loss": "training, generation_loss",
    "ranking_loss": "training, ranking_loss",
    "dense_loss": "training, dense_loss",
}
# The palette of Okabe and Ito, readable with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
MAX_K = 50


def report_of_checkpoint(
    output_dir: str | Path, checkpoint: str | Path, metrics: Mapping[str, Any], examples: str = ""
) -> Path:
    """Write the report of a measured checkpoint beside its `ranks.json`, and return the report's path."""
    tokenizer = SemanticIdTokenizer.from_pretrained(checkpoint)
    levels = zip(tokenizer.item_codes.T, tokenizer.codebook_sizes, strict=True)
    log = Path(checkpoint) / "training_log.json"
    return write_report(
        output_dir,
        metrics,
        read_json(log).get("log_history", []) if log.is_file() else [],
        [np.bincount(codes, minlength=size).tolist() for codes, size in levels],
        read_json(Path(output_dir) / "ranks.json"),
        examples,
    )


def write_report(
    output_dir: str | Path,
    metrics: Mapping[str, Any],
    log_history: Sequence[Mapping[str, float]],
    code_counts: Sequence[Sequence[int]],
    ranks: Mapping[str, Sequence[int | None]],
    examples: str = "",
) -> Path:
    """
    Write `report.md`, `learning_curves.png`, `recall_at_k.png` and `codebooks.png`, and return the report's path.

    Args:
        output_dir: Folder of the run. A missing folder is created.
        metrics: Content of metrics.json: `protocol` (dict), `baselines` (for each the values of `COLUMNS`),
            `generation` and `ranked` (such values), `ranking` (dict with `auc`), `invalid_items` (number),
            `selection` (dict) and, optionally, `beyond accuracy` (`ListStatistics` of each list) and `seconds` (of
            each stage).
        log_history: Log of the Trainer: dicts with `step` and `loss`, `generation_loss`, `ranking_loss`, `dense_loss`
            or `eval_loss`.
        code_counts: Number of items of each code, for every level.
        ranks: Rank of every test target for each method, from 1. None: the target is outside the list.
        examples: Lists of example users and their held-out items, as `recipes.show` prints them. Empty: no examples.

    Raises:
        ValueError: for metrics that lack one of these parts.
    """
    # Check the metrics.
    parts = ("protocol", "baselines", "generation", "ranked", "ranking", "invalid_items", "selection")
    missing = [name for name in parts if name not in metrics]
    if missing:
        raise ValueError(
            f"`metrics` must have {list(parts)}, got metrics without {missing}. Run recipes.evaluate again."
        )

    # Write the pictures and the page.
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _learning_curves(output_dir / "learning_curves.png", log_history)
    _recall_at_k(output_dir / "recall_at_k.png", ranks)
    _codebooks(output_dir / "codebooks.png", code_counts)
    path = output_dir / "report.md"
    with whole_file(path) as file:
        file.write_text(report_text(metrics, code_counts, examples), encoding="utf-8")
    return path


def report_text(metrics: Mapping[str, Any], code_counts: Sequence[Sequence[int]], examples: str = "") -> str:
    """Write the page in Markdown; `write_report` explains the arguments."""
    results = metrics["baselines"] | {label: metrics[key] for key, label in LISTS.items()}
    best = {column: max(values[column] for values in results.values()) for column in COLUMNS}
    rows = [(name, *(_cell(values[column], best[column]) for column in COLUMNS)) for name, values in results.items()]
    seconds = f"\n## Seconds\n\n{_pairs(metrics['seconds'])}\n" if "seconds" in metrics else ""
    examples = f"\n## Examples, test\n\n```text\n{examples.strip()}\n```\n" if examples else ""
    num_used = [f"{np.count_nonzero(counts):,} of {len(counts):,}" for counts in code_counts]
    return f"""# Report

## Next item, test

{_table(("", *COLUMNS), rows)}

Generated items outside the catalog: {metrics["invalid_items"]:,}.

![Recall@K of every method](recall_at_k.png)

## Like or dislike, test

{_pairs(metrics["ranking"])}
{_beyond_accuracy(metrics.get("beyond accuracy", {}))}{examples}
## Protocol

{_pairs(metrics["protocol"])}

## Chosen on validation

{_pairs(metrics["selection"])}

## Training

![Losses and validation metrics by training step](learning_curves.png)

## Codebooks

Codes in use by level: {", ".join(num_used)}.

![Items of every code, most used first](codebooks.png)
{seconds}"""


def _beyond_accuracy(statistics: Mapping[str, Mapping[str, float]]) -> str:
    """Write the statistics of all lists, and their recall by thirds of the items and of the histories."""
    if not statistics:
        return ""

    def table(columns: Mapping[str, str]) -> str:
        rows = [
            (LISTS.get(name, name), *(f"{values[key]:.4g}" if key in values else "-" for key in columns))
            for name, values in statistics.items()
        ]
        return _table(("", *columns.values()), rows)

    return f"""
## Beyond accuracy, test

The first ten items of the lists. Diversity is 1 less the mean cosine of two items of a list.

{table(STATISTICS)}

Recall@10 by thirds: head, middle and tail items have a third of all interactions each; histories by length.

{table(RECALLS)}
"""


def _cell(value: float, best: float) -> str:
    """Write a figure, the best of its column in bold."""
    return f"**{value:.4f}**" if value == best else f"{value:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [(str(name), f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in values.items()]
    return _table(("", "value"), rows)


def _learning_curves(path: Path, log_history: Sequence[Mapping[str, float]]) -> None:
    losses = {label: _series(log_history, key) for key, label in TRAIN_LOSSES.items()}
    losses["validation"] = _series(log_history, "eval_loss")
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    _lines(ax, {label: points for label, points in losses.items() if points[0]})
    ax.set(title="Loss", xlabel="training step")
    _save(figure, path)


def _recall_at_k(path: Path, ranks: Mapping[str, Sequence[int | None]]) -> None:
    ks = np.arange(1, MAX_K + 1)
    lines = {}
    for name, values in ranks.items():
        numbers = np.array([np.inf if rank is None else rank for rank in values])
        lines[LISTS.get(name, name)] = ks, (numbers[:, None] <= ks).mean(axis=0)
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    _lines(ax, lines)
    ax.set(title="Share of test targets among the first K items", xlabel="K", ylabel="Recall@K", xlim=(1, MAX_K))
    _save(figure, path)


def _codebooks(path: Path, code_counts: Sequence[Sequence[int]]) -> None:
    figure, axes = plt.subplots(
        1, len(code_counts), figsize=(3.2 * len(code_counts), 3.4), layout="constrained", squeeze=False
    )
    for level, (ax, counts) in enumerate(zip(axes[0], code_counts, strict=True)):
        ordered = np.sort(np.asarray(counts))[::-1]
        ax.fill_between(np.arange(len(ordered) + 1), np.append(ordered, 0), step="post", color=COLORS[0], linewidth=0)
        even = ordered.sum() / len(ordered)
        ax.axhline(even, color=COLORS[6], linewidth=1, linestyle="--")
        ax.annotate(
            f"even use: {even:.1f}",
            (1, even),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=COLORS[6],
            fontsize=9,
        )
        ax.set(
            title=f"Level {level}: {np.count_nonzero(ordered)} of {len(ordered)} used", xlabel="codes, most used first"
        )
        ax.set(xlim=(0, len(ordered)), ylim=(0, None))
    axes[0][0].set_ylabel("items")
    _save(figure, path)


def _series(log_history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def _lines(ax: Axes, lines: Mapping[str, tuple[Any, Any]]) -> None:
    """Draw lines, each with x and y; a label has the name and the last value."""
    for number, (name, (x, y)) in enumerate(lines.items()):
        marker = "o" if len(x) == 1 else None
        ax.plot(x, y, color=COLORS[number % len(COLORS)], linewidth=1.8, marker=marker, label=f"{name} {y[-1]:.3g}")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=9)


def _save(figure: plt.Figure, path: Path) -> None:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)

"""A run as one page: `report.md` with tables and pictures, from what the run measured.

    from recipes.evaluation.report import write_report

    write_report("runs/demo", metrics, trainer.state.log_history, code_counts, ranks)

`recipes.demo` calls it; nothing is measured here, so a report can be written again at any time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine has no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLUMNS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")
TRAIN_LOSSES = {
    "loss": "training",
    "generation_loss": "training, generation",
    "ranking_loss": "training, ranking",
    "dense_loss": "training, items",
}
# Okabe and Ito's palette: readable with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
MAX_K = 50


def write_report(
    output_dir: str | Path,
    metrics: Mapping[str, Any],
    log_history: Sequence[Mapping[str, float]],
    code_counts: Sequence[Sequence[int]],
    ranks: Mapping[str, Sequence[int | None]],
) -> Path:
    """Write `report.md`, `learning_curves.png`, `recall_at_k.png` and `codebooks.png`, and return the report's path.

    Args:
        output_dir: folder of the run; created where it is missing.
        metrics: what metrics.json holds: `protocol` (dict), `baselines` ({name: {recall@5, recall@10, ndcg@5, ndcg@10,
            mrr}}), `generation` and `ranked` (such values), `ranking` ({auc, ...}), `invalid_items` (number),
            `seconds` ({stage: s}) and `selection` (dict).
        log_history: the Trainer's: dicts with `step` and `loss`, `generation_loss`, `ranking_loss` or `eval_loss`.
        code_counts: of every level, how many items have each code.
        ranks: {name: the rank of every test target, 1 = first, None where it is not in the list}.

    Raises:
        ValueError: for metrics without one of the parts above.
    """
    parts = ("protocol", "baselines", "generation", "ranked", "ranking", "invalid_items", "seconds", "selection")
    missing = [name for name in parts if name not in metrics]
    if missing:
        raise ValueError(f"expected metrics with {list(parts)}, found {missing} missing: write metrics.json again")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _learning_curves(output_dir / "learning_curves.png", log_history)
    _recall_at_k(output_dir / "recall_at_k.png", ranks)
    _codebooks(output_dir / "codebooks.png", code_counts)
    path = output_dir / "report.md"
    path.write_text(report_text(metrics, code_counts), encoding="utf-8")
    return path


def report_text(metrics: Mapping[str, Any], code_counts: Sequence[Sequence[int]]) -> str:
    """Write the page in Markdown."""
    results = {**metrics["baselines"], "generation": metrics["generation"], "generation + ranking": metrics["ranked"]}
    rows = [(name, *(f"{values[column]:.4f}" for column in COLUMNS)) for name, values in results.items()]
    num_used = [f"{np.count_nonzero(counts):,} of {len(counts):,}" for counts in code_counts]
    return f"""# Report

## Next item, test

{_table(("", *COLUMNS), rows)}

Items outside the catalog among the generated: {metrics["invalid_items"]:,}.

![Recall@K of every method](recall_at_k.png)

## Like or dislike, test

{_pairs(metrics["ranking"])}

## Protocol

{_pairs(metrics["protocol"])}

## Chosen on validation

{_pairs(metrics["selection"])}

## Training

![Losses and validation metrics by training step](learning_curves.png)

## Codebooks

Codes in use by level: {", ".join(num_used)}.

![Items of every code, most used first](codebooks.png)

## Seconds

{_pairs(metrics["seconds"])}
"""


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
        found = np.array([np.inf if rank is None else rank for rank in values])
        lines[name] = ks, (found[:, None] <= ks).mean(axis=0)
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    _lines(ax, lines)
    ax.set(title="Share of test targets in the first K items", xlabel="K", ylabel="Recall@K", xlim=(1, MAX_K))
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
    """Draw the lines (x and y of each), named with where they end."""
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
    figure.savefig(path, dpi=130)
    plt.close(figure)

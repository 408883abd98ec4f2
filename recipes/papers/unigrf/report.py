"""Collect finished runs of `recipes.papers.unigrf.reproduce`, and make their table and their picture.

    python -m recipes.papers.unigrf.reproduce --collect

The command writes `recipes/papers/unigrf/results/unigrf_ml1m.json`, and a picture of the curves beside it.
"""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from recipes.common.result_files import by_ablation, merged, plus_minus, result_entry, spread, write

FILE = Path(__file__).parent / "results" / "unigrf_ml1m.json"
COLUMNS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr", "auc")
# "<=": the paper gives its best backbone alone, a bound here.
PUBLISHED = {
    "UniGRF-Llama, paper": (".3219", ".1765", ".5921", ".2368", "<= .1484", ".7932"),
    "UniGRF-HSTU, paper": ("<= .3219", "<= .1765", "-", "-", ".1484", ".7832"),
    "without both modules, paper": ("-", "-", "-", "-", "-", ".7293"),
    "HSTU, ranking alone, paper": ("-", "-", "-", "-", "-", ".7621"),
    "SASRec, HSTU's code base": (".2853", ".1603", ".5474", ".2185", "-", "-"),
    "HSTU, HSTU's code base": (".3097", ".1720", ".5754", ".2307", "-", "-"),
    "HSTU-large, HSTU's code base": (".3294", ".1893", ".5935", ".2481", "-", "-"),
}
ABLATIONS = ("retrieval", "ranking", "joint", "weighter", "enhancer", "both")
CURVES = ("generation_loss", "ranking_loss", "generation_weight", "ranking_weight")
STORED = ("arguments", "epoch", "parameters", "tokens a user", "made by")
# Seeds of one ablation may come from machines with and without bfloat16.
UNSHARED_ARGUMENTS = ("seed", "bf16")


def ablation_key(run: dict) -> tuple:
    """Return the sort key of a run's ablation: backbone, IDs, variant, then from single tasks to all modules."""
    arguments = run["arguments"]
    return arguments["backbone"], arguments["ids"], arguments["variant"], ABLATIONS.index(arguments["row"])


def collect(output_dir: Path) -> None:
    """Add every `result.json` below `output_dir` to `FILE`, and draw the picture beside it."""
    results = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/result.json"))]
    if not results:
        raise ValueError(
            f"`output_dir` must have folders of finished runs, got none in {output_dir}. Run some ablations first."
        )
    runs = [result_entry(_stored_run(result)) for result in results]
    data = {
        "protocol": "leave-one-out: last interaction = test, the one before = validation; "
        "6,040 users, 3,706 rated movies; items are scored over the whole catalog without the user's own; "
        "the last 200 items of a history; AUC pooled over the held-out interactions, like = rating of 4 or 5; "
        "order of ties within a second as in the file",
        "runs": merged(FILE, runs, lambda run: (*ablation_key(run), run["arguments"]["seed"])),
    }
    # Draw first: drawing rejects seeds that do not belong together.
    draw(data, FILE.with_suffix(".png"))
    write(FILE, data)


def _stored_run(result: dict) -> dict:
    """Pick the values of a `result.json` that the JSON file stores."""
    validation = result["validation"]
    return {
        **{name: result[name] for name in STORED},
        "test": {name: result["test"][name] for name in COLUMNS if name in result["test"]},
        "validation": validation
        and {name: validation[f"eval_{name}"] for name in COLUMNS if f"eval_{name}" in validation},
        "seconds": round(result["seconds"]),
        "curves": {name: [entry[name] for entry in result["history"] if name in entry] for name in CURVES},
    }


def ablations_of(data: dict) -> list[dict]:
    """Return the ablations in the table's order, with means and standard deviations over their seeds."""
    ablations = []
    for group in by_ablation(data["runs"], ablation_key, UNSHARED_ARGUMENTS).values():
        arguments = {name: value for name, value in group[0]["arguments"].items() if name not in UNSHARED_ARGUMENTS}
        columns = [name for name in COLUMNS if all(name in run["test"] for run in group)]
        spreads = {name: spread([run["test"][name] for run in group]) for name in columns}
        variant = f" ({arguments['variant']})" if arguments["variant"] else ""
        ablations.append(
            {
                "name": f"{arguments['backbone']}, {arguments['ids']}, {arguments['row']}{variant}",
                "arguments": arguments,
                "runs": group,
                "test": {name: mean for name, (mean, _) in spreads.items()},
                "std": {name: deviation for name, (_, deviation) in spreads.items()},
            }
        )
    return ablations


def table(data: dict) -> str:
    """Make the table in Markdown: our ablations by backbone, then published figures."""
    lines = ["| MovieLens-1M, test | seeds | HR@10 | NDCG@10 | HR@50 | NDCG@50 | MRR | AUC | epoch | minutes |"]
    lines.append("| --- " * 10 + "|")
    ablations = ablations_of(data)

    # Ablations
    for ablation in ablations:
        cells = []
        for name in COLUMNS:
            # Leave out the metrics of a task that is not trained.
            trained = ablation["arguments"]["row"]
            untrained = (trained == "ranking" and name != "auc") or (trained == "retrieval" and name == "auc")
            cells.append("-" if untrained else plus_minus(ablation["test"][name], ablation["std"][name]))
        runs = ablation["runs"]
        epochs = f"{statistics.mean(run['epoch'] for run in runs):.0f} of {ablation['arguments']['epochs']}"
        minutes = f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f}"
        lines.append(f"| {ablation['name']} | {len(runs)} | " + " | ".join(cells) + f" | {epochs} | {minutes} |")

    # Published figures
    for name, values in PUBLISHED.items():
        lines.append(f"| *{name}* | | " + " | ".join(values) + " | | |")

    # Sizes, protocol and provenance
    parameters = {
        "{backbone}, {ids}".format(**ablation["arguments"]): ablation["runs"][0]["parameters"]
        for ablation in ablations
    }
    tokens = {run["arguments"]["ids"].split("-")[0]: run["tokens a user"] for run in data["runs"]}
    made = max((run["made by"] for run in data["runs"]), key=lambda made_by: made_by["date"])
    lines += [
        "",
        "Parameters: "
        + "; ".join(f"{name}: {count:,}" for name, count in parameters.items())
        + ". Tokens per user: "
        + ", ".join(f"{count:.0f} ({ids} IDs)" for ids, count in tokens.items())
        + f", with one behavior token per item. Protocol: {data['protocol']}.",
        f"Made by `python -m recipes.papers.unigrf.reproduce`, one command per run (in the JSON file), on "
        f"{made['machine']}, {made['versions']}, the last on {made['date']}.",
    ]
    return "\n".join(lines)


def panels_of(data: dict) -> dict[str, list[dict]]:
    """Group the ablations of both tasks by the title of their panel, so that a panel has comparable losses."""
    panels: dict[str, list[dict]] = {}
    for ablation in ablations_of(data):
        arguments = ablation["arguments"]
        if arguments["row"] in ("retrieval", "ranking"):
            continue
        kind = arguments["backbone"].split("-")[0]
        ids = arguments["ids"].split("-")[0]
        title = f"{kind}, {ids} ids, behaviors: {arguments['behaviors']}"
        # A sampled loss cannot be compared with a full one.
        if arguments["code_negatives"]:
            title += f",\n{arguments['code_negatives']} negatives"
        panels.setdefault(title, []).append(ablation)
    return panels


def draw(data: dict, file: Path) -> None:
    """Draw both training losses and both loss weights over the epochs, for the first seed of every joint ablation."""
    panels = panels_of(data)
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 3, figsize=(13, 2.9 * len(panels)), layout="constrained", squeeze=False)

    # Curves: a row of axes per panel
    for panel_axes, (title, ablations) in zip(axes, panels.items(), strict=True):
        for ablation in ablations:
            draw_curves(panel_axes, ablation)
        panel_axes[0].set_ylabel(title, fontsize="small")
        panel_axes[2].legend(
            *panel_axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small"
        )
        for axis in panel_axes:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)

    # Titles and labels
    titles = ("generation loss", "ranking loss", "weights: ranking, generation (dashed)")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_curves(axes: np.ndarray, ablation: dict) -> None:
    """Draw the losses and the loss weights of an ablation's first seed on the three axes of a panel."""
    curves = ablation["runs"][0]["curves"]
    epochs = range(1, ablation["arguments"]["epochs"] + 1)
    label = ablation["name"].replace(", atomic", "").replace(", semantic", "")
    (line,) = axes[0].plot(epochs, curves["generation_loss"], label=label)
    axes[1].plot(epochs, curves["ranking_loss"])
    constants = {"generation": 1.0, "ranking": ablation["arguments"]["ranking_loss_weight"]}
    styles = {"generation": "--", "ranking": "-"}
    for task, constant in constants.items():
        adapted = np.array(curves[f"{task}_weight"] or [1.0] * len(epochs))
        axes[2].plot(epochs, constant * adapted, styles[task], color=line.get_color())

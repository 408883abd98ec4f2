"""The table and the picture of `recipes.papers.unigrf.reproduce`, from the runs that are finished."""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from recipes.common.result_files import by_row, kept, merged, plus_minus, spread, write

FILE = Path(__file__).parent / "results" / "unigrf_ml1m.json"
COLUMNS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr", "auc")
# As published; "<=": the other backbone's is the best that the paper gives.
PUBLISHED = {
    "UniGRF-Llama, paper": (".3219", ".1765", ".5921", ".2368", "<= .1484", ".7932"),
    "UniGRF-HSTU, paper": ("<= .3219", "<= .1765", "-", "-", ".1484", ".7832"),
    "without both modules, paper": ("-", "-", "-", "-", "-", ".7293"),
    "HSTU, ranking alone, paper": ("-", "-", "-", "-", "-", ".7621"),
    "SASRec, HSTU's code base": (".2853", ".1603", ".5474", ".2185", "-", "-"),
    "HSTU, HSTU's code base": (".3097", ".1720", ".5754", ".2307", "-", "-"),
    "HSTU-large, HSTU's code base": (".3294", ".1893", ".5935", ".2481", "-", "-"),
}
ROWS = ("retrieval", "ranking", "joint", "weighter", "enhancer", "both")
CURVES = ("generation_loss", "ranking_loss", "generation_weight", "ranking_weight")


def row_of(run: dict) -> tuple:
    """Where a run stands in the table: variants of a backbone apart, from single tasks to everything."""
    arguments = run["arguments"]
    return arguments["backbone"], arguments["ids"], arguments["variant"], ROWS.index(arguments["row"])


def collect(output_dir: Path) -> None:
    """Adds all `result.json` below `output_dir` to `FILE`, and draws the picture beside it."""
    results = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/result.json"))]
    if not results:
        raise ValueError(f"Expected finished runs in folders of {output_dir}, found none. Run some rows first.")
    found = []
    for result in results:
        validation, history = result["validation"], result["history"]
        told = ("arguments", "epoch", "parameters", "tokens a user", "made by")
        found.append(
            {
                **{name: result[name] for name in told},
                "test": {name: result["test"][name] for name in COLUMNS if name in result["test"]},
                "validation": validation
                and {name: validation[f"eval_{name}"] for name in COLUMNS if f"eval_{name}" in validation},
                "seconds": round(result["seconds"]),
                "curves": {name: [entry[name] for entry in history if name in entry] for name in CURVES},
            }
        )
    data = {
        "protocol": "leave-one-out: last interaction = test, the one before = validation; 6,040 users, 3,706 rated movies; "
        "items are scored over the whole catalog without the user's own; the last 200 items of a history; AUC pooled over "
        "the held-out interactions, like = rating of 4 or 5; order of ties within a second as in the file",
        "runs": merged(FILE, [kept(run) for run in found], lambda run: (*row_of(run), run["arguments"]["seed"])),
    }
    draw(data, FILE.with_suffix(".png"))  # first: it refuses seeds that do not belong together
    write(FILE, data)


def rows_of(data: dict) -> list[dict]:
    """The rows of the table: means and deviations over the seeds of a row."""
    rows = []
    apart = (
        "seed",
        "bf16",
    )  # in bfloat16 where the machine has it: seeds of a row may have been trained on different ones
    for group in by_row(data["runs"], row_of, apart).values():
        arguments = {name: value for name, value in group[0]["arguments"].items() if name not in apart}
        there = [name for name in COLUMNS if all(name in run["test"] for run in group)]
        spreads = {name: spread([run["test"][name] for run in group]) for name in there}
        variant = f" ({arguments['variant']})" if arguments["variant"] else ""
        rows.append(
            {
                "name": f"{arguments['backbone']}, {arguments['ids']}, {arguments['row']}{variant}",
                "arguments": arguments,
                "runs": group,
                "test": {name: mean for name, (mean, _) in spreads.items()},
                "std": {name: deviation for name, (_, deviation) in spreads.items()},
            }
        )
    return rows


def table(data: dict) -> str:
    """The table, in Markdown: ours by backbone, then what others published."""
    lines = ["| MovieLens-1M, test | seeds | HR@10 | NDCG@10 | HR@50 | NDCG@50 | MRR | AUC | epoch | minutes |"]
    lines.append("| --- " * 10 + "|")
    rows = rows_of(data)
    for row in rows:
        cells = []
        for name in COLUMNS:
            # A row that does not train a task cannot be asked for it.
            trained = row["arguments"]["row"]
            untrained = (trained == "ranking" and name != "auc") or (trained == "retrieval" and name == "auc")
            cells.append("-" if untrained else plus_minus(row["test"][name], row["std"][name]))
        runs = row["runs"]
        epochs = f"{statistics.mean(run['epoch'] for run in runs):.0f} of {row['arguments']['epochs']}"
        minutes = f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f}"
        lines.append(f"| {row['name']} | {len(runs)} | " + " | ".join(cells) + f" | {epochs} | {minutes} |")
    for name, values in PUBLISHED.items():
        lines.append(f"| *{name}* | | " + " | ".join(values) + " | | |")
    sizes = {"{backbone}, {ids}".format(**row["arguments"]): row["runs"][0]["parameters"] for row in rows}
    tokens = {run["arguments"]["ids"].split("-")[0]: run["tokens a user"] for run in data["runs"]}
    made = max((run["made by"] for run in data["runs"]), key=lambda one: one["date"])
    lines += [
        "",
        "Parameters: "
        + "; ".join(f"{name}: {count:,}" for name, count in sizes.items())
        + ". Tokens a user: "
        + ", ".join(f"{count:.0f} ({ids} ids)" for ids, count in tokens.items())
        + f", one an item of which is its behavior. Protocol: {data['protocol']}.",
        f"Made by `python -m recipes.papers.unigrf.reproduce`, one command a run (in the JSON), on {made['machine']}, "
        f"{made['versions']}, the last on {made['date']}.",
    ]
    return "\n".join(lines)


def draw(data: dict, file: Path) -> None:
    """Both training losses and both weights over the epochs, of the first seed of every joint row; comparable rows together."""
    panels: dict[str, list[dict]] = {}
    for row in rows_of(data):
        arguments = row["arguments"]
        if arguments["row"] in ("retrieval", "ranking"):
            continue
        kind, ids = arguments["backbone"].split("-")[0], arguments["ids"].split("-")[0]
        title = f"{kind}, {ids} ids, behaviors: {arguments['behaviors']}"
        if arguments["code_negatives"]:  # another loss, which is not to be compared
            title += f",\n{arguments['code_negatives']} negatives"
        panels.setdefault(title, []).append(row)
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 3, figsize=(13, 2.9 * len(panels)), layout="constrained", squeeze=False)
    for of_kind, (title, rows) in zip(axes, panels.items(), strict=True):
        for row in rows:
            curves, epochs = row["runs"][0]["curves"], range(1, row["arguments"]["epochs"] + 1)
            label = row["name"].replace(", atomic", "").replace(", semantic", "")
            (line,) = of_kind[0].plot(epochs, curves["generation_loss"], label=label)
            of_kind[1].plot(epochs, curves["ranking_loss"])
            for part, style, constant in (
                ("generation", "--", 1.0),
                ("ranking", "-", row["arguments"]["ranking_loss_weight"]),
            ):
                adapted = np.array(curves[f"{part}_weight"] or [1.0] * len(epochs))
                of_kind[2].plot(epochs, constant * adapted, style, color=line.get_color())
        of_kind[0].set_ylabel(title, fontsize="small")
        of_kind[2].legend(
            *of_kind[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small"
        )
        for axis in of_kind:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
    for axis, title in zip(
        axes[0], ("generation loss", "ranking loss", "weights: ranking, generation (dashed)"), strict=True
    ):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    figure.savefig(file, dpi=100)
    plt.close(figure)

"""The table and the picture of `recipes.reproduce_unigrf`, from the runs that are finished."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

RESULTS = Path(__file__).parent / "results" / "unigrf_ml1m.json"
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


def place(group: tuple[tuple[str, str, str, str], list]) -> tuple:
    """Where a group of runs stands in the table: variants of a backbone apart, from single tasks to everything."""
    backbone, ids, row, variant = group[0]
    return backbone, ids, variant, ROWS.index(row)


def collect(output_dir: Path) -> None:
    """Puts all `result.json` below `output_dir` into `RESULTS`, and draws the picture beside it."""
    runs = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/result.json"))]
    if not runs:
        raise ValueError(f"Expected finished runs in folders of {output_dir}, found none. Run some rows first.")
    groups = defaultdict(list)
    for run in runs:
        arguments = run["arguments"]
        groups[tuple(arguments[name] for name in ("backbone", "ids", "row", "variant"))].append(run)
    rows = []
    for (backbone, ids, row, variant), group in sorted(groups.items(), key=place):
        tests = [run["test"] for run in group]
        rows.append(
            {
                "name": f"{backbone}, {ids}, {row}" + (f" ({variant})" if variant else ""),
                "arguments": {name: value for name, value in group[0]["arguments"].items() if name != "seed"},
                "seeds": [run["arguments"]["seed"] for run in group],
                "commands": [run["made by"]["command"] for run in group],
                "epochs": [run["epoch"] for run in group],
                "test": {name: round(statistics.mean(test[name] for test in tests), 5) for name in COLUMNS},
                "std": {
                    name: round(statistics.stdev(test[name] for test in tests), 5) if len(group) > 1 else None
                    for name in COLUMNS
                },
                "runs": [{name: round(test[name], 5) for name in COLUMNS} for test in tests],
                "validation": [
                    run["validation"] and {name: round(run["validation"][f"eval_{name}"], 5) for name in COLUMNS}
                    for run in group
                ],
                "seconds": [round(run["seconds"]) for run in group],
                "parameters": group[0]["parameters"],
                "tokens a user": round(group[0]["tokens a user"], 1),
                "curves": {
                    name: [round(entry[name], 5) for entry in group[0]["history"] if name in entry] for name in CURVES
                },
            }
        )
    data = {
        "protocol": "leave-one-out: last interaction = test, the one before = validation; 6,040 users, 3,706 rated movies; "
        "items are scored over the whole catalogue without the user's own; the last 200 items of a history; AUC pooled over "
        "the held-out interactions, like = rating of 4 or 5; order of ties within a second as in the file",
        "rows": rows,
        "made by": runs[-1]["made by"],
    }
    RESULTS.write_text(json.dumps(data, indent=1))
    draw(data, RESULTS.with_suffix(".png"))


def table(data: dict) -> str:
    """The table, in Markdown: ours by backbone, then what others published."""
    lines = ["| MovieLens-1M, test | seeds | HR@10 | NDCG@10 | HR@50 | NDCG@50 | MRR | AUC | epoch | minutes |"]
    lines.append("| --- " * 10 + "|")
    for row in data["rows"]:
        cells = []
        for name in COLUMNS:
            # A row that does not train a task cannot be asked for it.
            trained = row["arguments"]["row"]
            untrained = (trained == "ranking" and name != "auc") or (trained == "retrieval" and name == "auc")
            spread = "" if row["std"][name] is None else f" ± {row['std'][name]:.4f}"
            cells.append("-" if untrained else f"{row['test'][name]:.4f}{spread}")
        epochs = f"{statistics.mean(row['epochs']):.0f} of {row['arguments']['epochs']}"
        minutes = f"{statistics.mean(row['seconds']) / 60:.0f}"
        lines.append(f"| {row['name']} | {len(row['seeds'])} | " + " | ".join(cells) + f" | {epochs} | {minutes} |")
    for name, values in PUBLISHED.items():
        lines.append(f"| *{name}* | | " + " | ".join(values) + " | | |")
    sizes = {row["arguments"]["backbone"]: row["parameters"] for row in data["rows"]}
    made = data["made by"]
    lines += [
        "",
        "Parameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()) + ". Tokens a user: "
        f"{data['rows'][0]['tokens a user']:.0f}, half of which are behaviours. Protocol: {data['protocol']}.",
        f"Made by `python -m recipes.reproduce_unigrf`, one command a run (in the JSON), on {made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)


def draw(data: dict, file: Path) -> None:
    """Both training losses over the epochs for every joint row of a whole softmax, and the weights of those that have them."""
    # The loss of a sampled softmax is another one, which is not to be compared.
    joint = [
        row
        for row in data["rows"]
        if row["arguments"]["row"] not in ("retrieval", "ranking") and not row["arguments"]["code_negatives"]
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for place, row in enumerate(joint):
        for axis, curve in zip(axes, ("generation_loss", "ranking_loss", "ranking_weight"), strict=True):
            values = row["curves"][curve]
            if values:
                axis.plot(range(1, len(values) + 1), values, color=plt.cm.tab20(place), label=row["name"])
    for axis, title in zip(axes, ("generation loss", "ranking loss", "weight of the ranking loss"), strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, dpi=100)
    plt.close(figure)

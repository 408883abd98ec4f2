"""The tables and the picture of `recipes.reproduce_recochain`, from the runs that are finished."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import load_from_disk

from recipes.baselines import baseline_results

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
LISTS = ("generation", "ranked", "ranked at weight 1", "ranked, three scores", "item score alone", "oracle")
CODES_ALONE = ", codes alone"  # rows whose histories are read without the items' vectors
# What else was trained on the same data, beside the rows: folders of recipes.evaluate below the output folder.
BESIDE = {"sasrec": "one code an item, full cross-entropy (SASRec's task)"}
# Relative gain of Recall@5 in the paper (TAOBAO-MM), in percent; a window of 32 or 128 tokens is some 7 or 26 items.
PAPER = {
    "beams": {10: 1.1, 20: 3.14, 40: 4.53},
    "retrieved": {0: 0.12, 10: 3.14, 20: 3.51},
    "window": {7: 3.14, 26: 0.92},
}
# The rows of a panel of the picture by their place on its axis, at 20 beams.
PANELS = {
    "retrieved": {0: "k0", 5: "k5", 10: "default", 20: "k20"},
    "window": {7: "default", 31: "window31", 127: "window127"},
}
# Recall@10 and NDCG@10 on Amazon-2014 Beauty, as published.
PUBLISHED = {
    "recochain_beauty": {
        "SASRec, as TIGER reports it": (".0605", ".0318"),
        "TIGER": (".0648", ".0384"),
        "SASRec, full cross-entropy": (".0859", ".0503"),
        "SASRec, sampled softmax, tuned": (".0921", ".0531"),
        "SASRec++": (".0973", "-"),
    }
}


def place(group: tuple[tuple[str, int, int, int], list]) -> tuple:
    """Where a group of runs stands in the table: those of codes alone last."""
    return CODES_ALONE in group[0][0], *group[0]


def collect(output_dir: Path, data_dir: Path, num_items: int, name: str) -> None:
    """Puts all `beams-*.json` below `output_dir` and the baselines of its data into `results/NAME.json`, and draws NAME.png."""
    runs = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/beams-*.json"))]
    if not runs:
        raise ValueError(f"Expected finished runs in folders of {output_dir}, found none. Run some rows first.")
    groups = defaultdict(list)
    for run in runs:
        arguments = run["arguments"]
        row = arguments["row"] + ("" if arguments["history_item_vectors"] else CODES_ALONE)
        groups[row, arguments["beams"], arguments["union"], arguments["ranked"]].append(run)
    excluded = runs[0]["arguments"]["exclude_history"]
    prepared = json.loads((data_dir / "prepare.json").read_text())
    file = output_dir / "baselines.json"
    if not file.exists():  # minutes: the settings of item-kNN are chosen on validation
        dataset = load_from_disk(str(data_dir / "dataset"))
        file.write_text(json.dumps(baseline_results(dataset, num_items, 10, exclude_history=excluded)))
    baselines = json.loads(file.read_text())
    data = {
        "name": name,
        "protocol": "leave-one-out: last interaction = test, the one before = validation; "
        f"{prepared['counts']['users']:,} users, {num_items:,} items, all of them scored"
        + (" but the user's own" if excluded else "")
        + "; order of equal times as in the file",
        "codebook sizes": prepared["arguments"]["codebook_sizes"],
        "rows": [_row(*key, group) for key, group in sorted(groups.items(), key=place)],
        "baselines": {
            one: {**_rounded(found["test"]), "settings": found["settings"]} for one, found in baselines.items()
        },
        "beside": {
            label: _rounded(json.loads(file.read_text())["generation"])
            for folder, label in BESIDE.items()
            if (file := output_dir / folder / "metrics.json").exists()
        },
        "made by": runs[-1]["made by"],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1))
    draw(data, RESULTS / f"{name}.png")


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(values[name], 5) for name in COLUMNS}


def _row(row: str, beams: int, union: int, ranked: int, group: list[dict]) -> dict:
    """Means and deviations over seeds; every seed's own gain with its standard error over users."""

    def over_seeds(pick, reduce) -> dict:
        return {
            one: {column: round(reduce([pick(run, one)[column] for run in group]), 5) for column in COLUMNS}
            for one in LISTS
        }

    several = len(group) > 1
    return {
        "row": row,
        "beams": beams,
        "union": union,
        "ranked": ranked,
        "arguments": {name: value for name, value in group[0]["arguments"].items() if name != "seed"},
        "seeds": [run["arguments"]["seed"] for run in group],
        "test": over_seeds(lambda run, one: run["cells"][one], statistics.mean),
        "std": over_seeds(lambda run, one: run["cells"][one], statistics.stdev) if several else None,
        "gain": {
            one: {
                column: {
                    key: [round(run["gain"][one][column][key], 5) for run in group]
                    for key in ("difference", "standard error", "relative")
                }
                for column in COLUMNS
            }
            for one in group[0]["gain"]
        },
        "weights": [run["weights"] for run in group],
        "calibration": {
            users: {
                "expected calibration error": round(found["expected calibration error"], 5),
                "predicted, observed": [
                    [round(one["predicted"], 5), round(one["observed"], 5)] for one in found["bins"]
                ],
            }
            for users, found in group[0]["calibration"].items()
        },
        "users": group[0]["users"],
        "seconds": [round(run["seconds"], 1) for run in group],
    }


def gain_of(row: dict, column: str, one: str = "ranked") -> tuple[float, float]:
    """Relative gain over generation in percent, and its deviation over seeds or, of one seed, its standard error over users."""
    gain = row["gain"][one][column]
    relative = [100 * value for value in gain["relative"]]
    if len(relative) > 1:
        return statistics.mean(relative), statistics.stdev(relative)
    return relative[0], 100 * gain["standard error"][0] / max(row["test"]["generation"][column], 1e-12)


def table(data: dict) -> str:
    """The table, in Markdown: generation and ranked, what else there is, and the baselines."""
    heads = ["row", "beams", "seeds"]
    heads += ["R@5: generation", "ranked", "gain, %", "R@10: generation", "ranked", "three scores", "item score alone"]
    heads += ["oracle", "N@10: generation", "ranked", "gain, %"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in data["rows"]:

        def cell(one: str, column: str, row=row) -> str:
            spread = "" if row["std"] is None else f" ± {row['std'][one][column]:.4f}"
            return f"{row['test'][one][column]:.4f}{spread}"

        beams = f"{row['beams']}" + (f" + {row['union']} items" if row["union"] else "")
        beams += f", {row['ranked']} of them ranked" if row["ranked"] else ""
        if row["arguments"]["test_users"]:
            beams += f" ({row['users']['test']:,} users)"
        cells = [row["row"], beams]
        cells += [str(len(row["seeds"])), cell("generation", "recall@5"), cell("ranked", "recall@5")]
        cells.append("{:+.1f} ± {:.1f}".format(*gain_of(row, "recall@5")))
        cells += [
            cell(one, "recall@10")
            for one in ("generation", "ranked", "ranked, three scores", "item score alone", "oracle")
        ]
        cells += [cell("generation", "ndcg@10"), cell("ranked", "ndcg@10")]
        cells.append("{:+.1f} ± {:.1f}".format(*gain_of(row, "ndcg@10")))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| beside it | R@5 | R@10 | N@10 |", "| --- | --- | --- | --- |"]
    for label, found in {**data["baselines"], **data["beside"]}.items():
        figures = " | ".join(f"{found[column]:.4f}" for column in ("recall@5", "recall@10", "ndcg@10"))
        lines.append(f"| {label.replace('_', '-')} | {figures} |")
    for label, (recall, ndcg) in PUBLISHED.get(data["name"], {}).items():
        lines.append(f"| *{label}, published* | | {recall} | {ndcg} |")
    made = data["made by"]
    lines += [
        "",
        f"Test. Ranked: by two scores, their weight chosen on validation; three scores: with the item-level score as a third. "
        f"Gain: of ranked over generation, ± standard deviation over seeds or, of one seed, standard error over users. "
        f"Protocol: {data['protocol']}. Codebooks: {data['codebook sizes']} and a last code. Made by "
        f"`{made['command']} ...` on {made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)


def draw(data: dict, file: Path) -> None:
    """The gain of Recall@5 against beams, retrieved items and window, ours and the paper's, and how calibrated the ranking is."""
    rows = [row for row in data["rows"] if not row["union"] and not row["ranked"]]
    default = next((row for row in rows if row["row"] == "default" and row["beams"] == 20), None)
    if default is None:
        return
    at_20 = {row["row"]: row for row in rows if row["beams"] == 20}
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")

    def curve(axis, found: dict[int, dict], one: str, label: str) -> None:
        places = sorted(found)
        gains = [gain_of(found[place], "recall@5", one) for place in places]
        axis.errorbar(places, *zip(*gains, strict=True), marker="o", capsize=3, label=label)

    def panels(suffix: str) -> dict[str, dict[int, dict]]:
        """Of each panel the rows by their place on its axis."""
        found = {"beams": {row["beams"]: row for row in rows if row["row"] == "default" + suffix}}
        for name, places in PANELS.items():
            found[name] = {place: at_20[row + suffix] for place, row in places.items() if row + suffix in at_20}
        return found

    alone = panels(CODES_ALONE)
    labels = ("beams", "items of the sub-history (k)", "items of the window")
    for axis, label, (name, found) in zip(axes, labels, panels("").items(), strict=False):
        curve(axis, found, "ranked", "ranked")
        curve(axis, found, "ranked, three scores", "ranked, three scores")
        if alone[name]:
            curve(axis, alone[name], "ranked", "ranked, histories by codes alone")
        axis.plot(*zip(*sorted(PAPER[name].items()), strict=True), "k--", marker="x", label="paper, TAOBAO-MM")
        if name != "retrieved":
            axis.set_xscale("log")
        places = sorted({*found, *PAPER[name]})
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel="gain of Recall@5 over generation, %")
        axis.axhline(0, color="grey", linewidth=0.8)
    for name, users, label in (
        ("default", "all", "default"),
        ("default", "held", "default, users whose target is a candidate"),
        ("not-injected", "all", "target not injected"),
    ):
        if name in at_20:
            bins = at_20[name]["calibration"][users]["predicted, observed"]
            axes[3].loglog(*zip(*bins, strict=True), marker="o", label=label)
    axes[3].axline((1e-3, 1e-3), (1e-1, 1e-1), color="grey", linewidth=0.8)
    axes[3].set(xlabel="the ranking's probability, 20 beams", ylabel="share that came next")
    for axis in axes:
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=90)
    plt.close(figure)

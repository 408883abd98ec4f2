"""The tables and the picture of `recipes.papers.recochain.reproduce`, from the runs that are finished."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import load_from_disk

from recipes.common.result_files import by_ablation, merged, plus_minus, result_entry, rounded, spread, write
from recipes.data.prepared import prepared
from recipes.evaluation.baselines import baseline_results
from tokenization import SemanticIdTokenizer

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
LISTS = ("generation", "ranked", "ranked at weight 1", "ranked, three scores", "item score alone", "oracle")
CODES_ALONE = ", codes alone"  # rows whose histories are read without the items' vectors
BEAMS = 20  # of the large table and of the picture
SASREC = "one code an item, full cross-entropy (SASRec's task)"  # of recipes.papers.recochain.sasrec
# Relative gain of Recall@5 in the paper (TAOBAO-MM), in percent; a window of 32 or 128 tokens is some 7 or 26 items.
PAPER = {
    "beams": {10: 1.1, 20: 3.14, 40: 4.53},
    "retrieved": {0: 0.12, 10: 3.14, 20: 3.51},
    "window": {7: 3.14, 26: 0.92},
}
# The rows of two panels of the picture.
BY_RETRIEVED = {0: "k0", 5: "k5", 10: "default", 20: "k20"}  # by their place on the axis
BY_WINDOW = ("default", "window7", "window31", "window127")
NO_ITEM_SCORE = {
    0: "no-item-score-k0",
    10: "no-item-score",
}  # by retrieved items: a ranking that has no item-level score in it
# Rows that were measured with an option of version 0.1 that is gone: their figures stay, they are trained no more.
RETIRED_ROWS = ("candidate-excluded",)
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


def row_of(run: dict) -> tuple:
    """Where a run stands in the table: those of codes alone last."""
    arguments = run["arguments"]
    suffix = "" if arguments["history_item_representations"] else CODES_ALONE
    return bool(suffix), arguments["row"] + suffix, *(arguments[name] for name in ("beams", "union", "ranked"))


def label_of(row: str) -> str:
    """Return the name of a row in the tables, which marks those that can no longer be trained."""
    is_retired = row.removesuffix(CODES_ALONE) in RETIRED_ROWS
    return f"{row} (an option of 0.1, gone)" if is_retired else row


def window_of(arguments: dict) -> int:
    """Items that the generator of a run reads: as its arguments say or else its row, whose default is 7."""
    _, is_named, items = arguments["row"].partition("window")
    return arguments["window"] or (int(items) if is_named else 7)


def collect(output_dir: Path, data_dir: Path, name: str) -> None:
    """Adds all `beams-*.json` below `output_dir` to `results/NAME.json`, with the baselines of the data, and draws NAME.png."""
    results = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/beams-*.json"))]
    file, trained = RESULTS / f"{name}.json", output_dir / "sasrec" / "sasrec.json"
    runs = merged(
        file, [result_entry(_run(result)) for result in results], lambda run: (*row_of(run), run["arguments"]["seed"])
    )
    if not runs or not (results or trained.exists()):
        raise ValueError(f"Expected finished runs in folders of {output_dir}, found none. Run some rows first.")
    old = json.loads(file.read_text()) if file.exists() else {"baselines": {}, "beside": {}}
    excluded = runs[0]["arguments"]["exclude_history"]
    record = prepared(data_dir)
    num_items = record["counts"]["catalog"]
    baselines = old["baselines"]
    if not baselines:  # minutes: the settings of item-kNN are chosen on validation
        found = baseline_results(load_from_disk(str(data_dir / "dataset")), num_items, 10, exclude_history=excluded)
        baselines = {one: {**_columns(of["test"]), "settings": of["settings"]} for one, of in found.items()}
    beside = {**old["beside"], **({SASREC: json.loads(trained.read_text())} if trained.exists() else {})}
    data = {
        "name": name,
        "protocol": "leave-one-out: last interaction = test, the one before = validation; "
        f"{record['counts']['users']:,} users, {num_items:,} items, all of them scored"
        + (" but the user's own" if excluded else "")
        + "; order of equal times as in the file",
        "codebook sizes": list(SemanticIdTokenizer.from_pretrained(data_dir / "tokenizer").codebook_sizes[:-1]),
        "baselines": rounded(baselines),
        "beside": beside,
        "runs": runs,
    }
    draw(data, RESULTS / f"{name}.png")  # first: it refuses seeds that do not belong together
    write(file, data)


def _columns(values: dict[str, float]) -> dict[str, float]:
    return {name: values[name] for name in COLUMNS}


def _run(result: dict) -> dict:
    """What is kept of a `beams-*.json`."""
    told = ("arguments", "made by", "weights", "users", "seconds", "gain", "validation ndcg@10")
    calibration = {}
    for users, found in result["calibration"].items():
        calibration[users] = {"expected calibration error": found["expected calibration error"]}
        if result["arguments"]["beams"] == BEAMS:  # what is drawn
            bins = [[one["predicted"], one["observed"]] for one in found["bins"]]
            calibration[users]["predicted, observed"] = bins
    tests = {name: _columns(result["cells"][name]) for name in LISTS}
    return {**{name: result[name] for name in told}, "test": tests, "calibration": calibration}


def rows_of(data: dict) -> list[dict]:
    """The rows of the tables: means and deviations over the seeds of a row."""
    rows = []
    for (_, row, beams, union, ranked), group in by_ablation(data["runs"], row_of).items():
        spreads = {
            one: {column: spread([run["test"][one][column] for run in group]) for column in COLUMNS} for one in LISTS
        }
        rows.append(
            {
                "row": row,
                "beams": beams,
                "union": union,
                "ranked": ranked,
                "arguments": group[0]["arguments"],
                "runs": group,
                "test": {one: {name: mean for name, (mean, _) in of.items()} for one, of in spreads.items()},
                "std": {one: {name: std for name, (_, std) in of.items()} for one, of in spreads.items()},
            }
        )
    return rows


def gain_of(row: dict, column: str, one: str = "ranked") -> tuple[float, float]:
    """Relative gain over generation in percent, and its deviation over seeds or, of one or two, its standard error over users."""
    gains = [run["gain"][one][column] for run in row["runs"]]
    mean, deviation = spread([100 * gain["relative"] for gain in gains])
    if len(gains) > 2:
        return mean, deviation
    error, _ = spread([gain["standard error"] for gain in gains])  # two seeds may agree by chance
    return mean, 100 * error / max(row["test"]["generation"][column], 1e-12)


def by_beams(rows: list[dict]) -> list[str]:
    """What ranking gains with each number of beams, in percent, and the ceiling of each, in Markdown."""
    searches = sorted({(row["beams"], row["ranked"]) for row in rows})
    names = [f"{beams} beams" + (f", {ranked} of them ranked" if ranked else "") for beams, ranked in searches]
    lines = [
        "",
        "Gain of ranked over generation by the number of beams, %, Recall@5 / NDCG@10; and what a perfect ranking would reach:",
        "",
        "| row | seeds | " + " | ".join(names) + " |",
        "| --- " * (2 + len(names)) + "|",
    ]
    for row in dict.fromkeys(one["row"] for one in rows):
        found = {(one["beams"], one["ranked"]): one for one in rows if one["row"] == row}
        seeds = max(len(one["runs"]) for one in found.values())
        cells = []
        for search in searches:
            cell = "-"
            if search in found:
                gains = [gain_of(found[search], name) for name in ("recall@5", "ndcg@10")]
                cell = " / ".join(f"{mean:+.1f} ± {deviation:.1f}" for mean, deviation in gains)
                count = len(found[search]["runs"])
                cell += f" ({count} seed{'s' * (count > 1)})" if count < seeds else ""
            cells.append(cell)
        lines.append(f"| {label_of(row)} | {seeds} | " + " | ".join(cells) + " |")
    names = [one["row"] for one in rows]
    first = "default" if "default" in names else names[0]
    held = {(one["beams"], one["ranked"]): one["test"]["oracle"]["recall@5"] for one in rows if one["row"] == first}
    ceilings = [f"{held[search]:.4f}" if search in held else "-" for search in searches]
    lines.append(f"| *the target is a candidate ({first})* | | " + " | ".join(ceilings) + " |")
    return lines


def table(data: dict) -> str:
    """The tables, in Markdown: generation, ranked and what else there is of 20 beams, the gain by beams, and the baselines."""
    heads = ["row", "beams", "seeds", "R@5: generation", "ranked", "gain, %", "at weight 1, %"]
    heads += ["R@10: generation", "ranked", "three scores", "item score alone"]
    heads += ["oracle", "N@10: generation", "ranked", "gain, %"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    rows = rows_of(data)
    for row in rows:
        if row["beams"] != BEAMS or row["ranked"]:
            continue

        def cell(one: str, column: str, row=row) -> str:
            return plus_minus(row["test"][one][column], row["std"][one][column])

        beams = f"{row['beams']}" + (f" + {row['union']} items" if row["union"] else "")
        cells = [label_of(row["row"]), beams]
        cells += [str(len(row["runs"])), cell("generation", "recall@5"), cell("ranked", "recall@5")]
        cells += [
            "{:+.1f} ± {:.1f}".format(*gain_of(row, "recall@5", one)) for one in ("ranked", "ranked at weight 1")
        ]
        cells += [
            cell(one, "recall@10")
            for one in ("generation", "ranked", "ranked, three scores", "item score alone", "oracle")
        ]
        cells += [cell("generation", "ndcg@10"), cell("ranked", "ndcg@10")]
        cells.append("{:+.1f} ± {:.1f}".format(*gain_of(row, "ndcg@10")))
        lines.append("| " + " | ".join(cells) + " |")
    lines += by_beams([row for row in rows if not row["union"]]) if len({row["beams"] for row in rows}) > 1 else []
    lines += ["", "| beside it | R@5 | R@10 | N@10 |", "| --- | --- | --- | --- |"]
    tests = {label: [found] for label, found in data["baselines"].items()}
    tests |= {label: found["tests"] for label, found in data["beside"].items()}
    for label, found in tests.items():
        columns = ("recall@5", "recall@10", "ndcg@10")
        figures = [plus_minus(*spread([test[column] for test in found])) for column in columns]
        lines.append(f"| {label.replace('_', '-')} | {' | '.join(figures)} |")
    for label, (recall, ndcg) in PUBLISHED.get(data["name"], {}).items():
        lines.append(f"| *{label}, published* | | {recall} | {ndcg} |")
    made = max((run["made by"] for run in data["runs"]), key=lambda one: one["date"])
    lines += [
        "",
        f"Test. Ranked: by two scores, their weight chosen on validation (or 1, as in the paper); three scores: with the item-level "
        "score as a third. "
        f"Where items stand beside the beams, generation orders these, too. "
        f"Gain: of ranked over generation, ± standard deviation over seeds or, of one or two, standard error over users. "
        f"Protocol: {data['protocol']}. Codebooks: {data['codebook sizes']} and a last code. Made by "
        f"`python -m recipes.papers.recochain.reproduce`, one command a run (in the JSON), on {made['machine']}, {made['versions']}, the "
        f"last on {made['date']}.",
    ]
    return "\n".join(lines)


def tried_table(data: dict) -> str:
    """Settings of a stage I that were tried on the way, in Markdown, the best on validation first."""
    heads = ["task", "backbone", "its dropout", "of embeddings", "epochs", "rate", "weight decay", "item loss"]
    heads += ["validation: R@10", "N@10", "test: R@10", "N@10"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for run in data["runs"]:
        config = run["text_config"]
        layers, width = (
            config.get(one, config.get(two))
            for one, two in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"))
        )
        dropout = config.get("resid_pdrop", config.get("attention_dropout", 0))
        cells = [run["task"], f"{config['model_type']}, {layers} of {width}"]
        cells.append(f"{dropout:g}" + (" (attention)" if "attention_dropout" in config else ""))
        names = ("embedding_dropout", "num_train_epochs", "learning_rate", "weight_decay", "dense_loss_weight")
        cells += [f"{run[name]:g}" for name in names]
        cells += [f"{run[split][name]:.4f}" for split in ("validation", "test") for name in ("recall@10", "ndcg@10")]
        lines.append("| " + " | ".join(cells) + " |")
    made = data["made by"]
    lines += [
        "",
        f"{data['protocol']}. Made by `{made['command']}` on {made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)


def draw(data: dict, file: Path) -> None:
    """The gain of Recall@5 against beams, retrieved items and window, ours and the paper's, and how calibrated the ranking is."""
    rows = [row for row in rows_of(data) if not row["union"] and not row["ranked"]]
    at_20 = {row["row"]: row for row in rows if row["beams"] == BEAMS}
    if "default" not in at_20:
        return
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.1), layout="constrained")

    def curve(axis, found: dict[int, dict], one: str, label: str) -> None:
        places = sorted(found)
        gains = [gain_of(found[place], "recall@5", one) for place in places]
        axis.errorbar(places, *zip(*gains, strict=True), marker="o", capsize=3, label=label)

    def panels(suffix: str) -> dict[str, dict[int, dict]]:
        """Of each panel the rows by their place on its axis."""
        windows = [at_20[row + suffix] for row in BY_WINDOW if row + suffix in at_20]
        return {
            "beams": {row["beams"]: row for row in rows if row["row"] == "default" + suffix},
            "retrieved": {k: at_20[row + suffix] for k, row in BY_RETRIEVED.items() if row + suffix in at_20},
            "window": {window_of(row["arguments"]): row for row in windows},
        }

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
        elif apart := {place: at_20[row] for place, row in NO_ITEM_SCORE.items() if row in at_20}:
            curve(axis, apart, "ranked", "ranked without the item-level score")
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
            bins = at_20[name]["runs"][0]["calibration"][users]["predicted, observed"]
            axes[3].loglog(*zip(*bins, strict=True), marker="o", label=label)
    axes[3].axline((1e-3, 1e-3), (1e-1, 1e-1), color="grey", linewidth=0.8)
    axes[3].set(xlabel="the ranking's probability, 20 beams", ylabel="share that came next")
    handles = {label: line for axis in axes[:3] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    axes[3].legend(fontsize="x-small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=90)
    plt.close(figure)

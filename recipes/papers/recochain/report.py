"""Collect finished runs of `recipes.papers.recochain.reproduce`, and make their tables and their picture.

    python -m recipes.papers.recochain.reproduce --data_dir data --collect recochain

The command writes `recipes/papers/recochain/results/recochain.json`, and a picture of the gains beside it.
"""

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
# Suffix of ablations whose histories have no item representations.
CODES_ALONE = ", codes alone"
# Number of beams of the large table and of the picture.
BEAMS = 20
# Label of the results of recipes.papers.recochain.sasrec.
SASREC = "one code an item, full cross-entropy (SASRec's task)"
# The paper's relative gain of Recall@5 on TAOBAO-MM, in percent.
# Windows of 32 and 128 tokens hold some 7 and 26 items.
PAPER = {
    "beams": {10: 1.1, 20: 3.14, 40: 4.53},
    "retrieved": {0: 0.12, 10: 3.14, 20: 3.51},
    "window": {7: 3.14, 26: 0.92},
}
# Ablations of two panels; the keys are places on the axis.
BY_RETRIEVED = {0: "k0", 5: "k5", 10: "default", 20: "k20"}
BY_WINDOW = ("default", "window7", "window31", "window127")
# Ablations that rank without the dense-retrieval score, by retrieved items.
NO_DENSE_SCORE = {0: "no-item-score-k0", 10: "no-item-score"}
# Ablations of version 0.1: their option is gone, their figures stay.
RETIRED_ABLATIONS = ("candidate-excluded",)
# Published Recall@10 and NDCG@10 on Amazon-2014 Beauty.
PUBLISHED = {
    "recochain_beauty": {
        "SASRec, as TIGER reports it": (".0605", ".0318"),
        "TIGER": (".0648", ".0384"),
        "SASRec, full cross-entropy": (".0859", ".0503"),
        "SASRec, sampled softmax, tuned": (".0921", ".0531"),
        "SASRec++": (".0973", "-"),
    }
}
# Values of a `beams-*.json` that the result file stores as they are.
STORED = ("arguments", "made by", "weights", "users", "seconds", "gain", "validation ndcg@10")


def ablation_key(run: dict) -> tuple:
    """Return the sort key of a run's ablation and search; ablations without item representations come last."""
    arguments = run["arguments"]
    suffix = "" if arguments["history_item_representations"] else CODES_ALONE
    return bool(suffix), arguments["row"] + suffix, *(arguments[name] for name in ("beams", "union", "ranked"))


def label_of(name: str) -> str:
    """Return the label of an ablation in the tables, which marks retired ones."""
    is_retired = name.removesuffix(CODES_ALONE) in RETIRED_ABLATIONS
    return f"{name} (an option of 0.1, gone)" if is_retired else name


def window_of(arguments: dict) -> int:
    """Return the number of items in a run's window: by its argument or else its ablation, whose default is 7."""
    _, is_named, items = arguments["row"].partition("window")
    return arguments["window"] or (int(items) if is_named else 7)


def collect(output_dir: Path, data_dir: Path, name: str) -> None:
    """
    Add every `beams-*.json` below `output_dir` to `results/NAME.json`, and draw `NAME.png` beside it.

    Args:
        output_dir: Folder with a folder for each run.
        data_dir: Output folder of recipes.prepare; its baselines are measured unless the result file has them.
        name: Name of the result file.

    Raises:
        ValueError: if there are no finished runs, or if seeds of an ablation do not belong together.
    """
    # Runs, old and new
    results = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/beams-*.json"))]
    file = RESULTS / f"{name}.json"
    sasrec_file = output_dir / "sasrec" / "sasrec.json"
    new_runs = [result_entry(_stored_run(result)) for result in results]
    runs = merged(file, new_runs, lambda run: (*ablation_key(run), run["arguments"]["seed"]))
    if not runs or not (results or sasrec_file.exists()):
        raise ValueError(
            f"`output_dir` must have folders of finished runs, got none in {output_dir}. Run some ablations first."
        )

    # Baselines: choosing the settings of item-kNN takes minutes
    old = json.loads(file.read_text()) if file.exists() else {"baselines": {}, "beside": {}}
    is_excluded = runs[0]["arguments"]["exclude_history"]
    record = prepared(data_dir)
    num_items = record["counts"]["catalog"]
    baselines = old["baselines"]
    if not baselines:
        dataset = load_from_disk(str(data_dir / "dataset"))
        measured = baseline_results(dataset, num_items, 10, exclude_history=is_excluded)
        baselines = {
            label: {**_columns(result["test"]), "settings": result["settings"]} for label, result in measured.items()
        }
    sasrec = {SASREC: json.loads(sasrec_file.read_text())} if sasrec_file.exists() else {}

    # Result file and picture
    data = {
        "name": name,
        "protocol": "leave-one-out: last interaction = test, the one before = validation; "
        f"{record['counts']['users']:,} users, {num_items:,} items, all of them scored"
        + (" but the user's own" if is_excluded else "")
        + "; order of equal times as in the file",
        "codebook sizes": list(SemanticIdTokenizer.from_pretrained(data_dir / "tokenizer").codebook_sizes[:-1]),
        "baselines": rounded(baselines),
        "beside": {**old["beside"], **sasrec},
        "runs": runs,
    }
    # Draw first: drawing rejects seeds that do not belong together.
    draw(data, RESULTS / f"{name}.png")
    write(file, data)


def _columns(values: dict[str, float]) -> dict[str, float]:
    return {name: values[name] for name in COLUMNS}


def _stored_run(result: dict) -> dict:
    """Pick the values of a `beams-*.json` that the result file stores."""
    calibration = {}
    for users, values in result["calibration"].items():
        calibration[users] = {"expected calibration error": values["expected calibration error"]}
        # The picture needs these bins alone.
        if result["arguments"]["beams"] == BEAMS:
            calibration[users]["predicted, observed"] = [
                [bin_["predicted"], bin_["observed"]] for bin_ in values["bins"]
            ]
    tests = {name: _columns(result["cells"][name]) for name in LISTS}
    return {**{name: result[name] for name in STORED}, "test": tests, "calibration": calibration}


def ablations_of(data: dict) -> list[dict]:
    """Return the ablations in the tables' order, with means and standard deviations over their seeds."""
    ablations = []
    for (_, name, beams, union, ranked), group in by_ablation(data["runs"], ablation_key).items():
        spreads = {
            list_name: {column: spread([run["test"][list_name][column] for run in group]) for column in COLUMNS}
            for list_name in LISTS
        }
        ablations.append(
            {
                "row": name,
                "beams": beams,
                "union": union,
                "ranked": ranked,
                "arguments": group[0]["arguments"],
                "runs": group,
                "test": _parts(spreads, 0),
                "std": _parts(spreads, 1),
            }
        )
    return ablations


def _parts(spreads: dict[str, dict[str, tuple]], part: int) -> dict[str, dict]:
    """Take one part of every spread: 0, the mean, or 1, the standard deviation."""
    return {
        list_name: {column: values[part] for column, values in columns.items()}
        for list_name, columns in spreads.items()
    }


def gain_of(ablation: dict, column: str, list_name: str = "ranked") -> tuple[float, float]:
    """
    Return the relative gain of a list over generation, and its error, both in percent.

    The error is the standard deviation over seeds or, with one or two seeds, the standard error over users.
    """
    gains = [run["gain"][list_name][column] for run in ablation["runs"]]
    mean, deviation = spread([100 * gain["relative"] for gain in gains])
    if len(gains) > 2:
        return mean, deviation
    # Two seeds may agree by chance.
    error, _ = spread([gain["standard error"] for gain in gains])
    return mean, 100 * error / max(ablation["test"]["generation"][column], 1e-12)


def by_beams(ablations: list[dict]) -> list[str]:
    """Make the table of the gains by number of beams and of their ceilings, in Markdown."""
    searches = sorted({(ablation["beams"], ablation["ranked"]) for ablation in ablations})
    heads = [f"{beams} beams" + (f", {ranked} of them ranked" if ranked else "") for beams, ranked in searches]
    lines = [
        "",
        "Gain of ranked over generation by the number of beams, %, Recall@5 / NDCG@10. The last line is the ceiling: "
        "the Recall@5 of a perfect ranking.",
        "",
        "| ablation | seeds | " + " | ".join(heads) + " |",
        "| --- " * (2 + len(heads)) + "|",
    ]

    # Gains
    by_name: dict[str, dict[tuple, dict]] = {}
    for ablation in ablations:
        by_name.setdefault(ablation["row"], {})[ablation["beams"], ablation["ranked"]] = ablation
    for name, by_search in by_name.items():
        seeds = max(len(ablation["runs"]) for ablation in by_search.values())
        cells = [gain_cell(by_search[search], seeds) if search in by_search else "-" for search in searches]
        lines.append(f"| {label_of(name)} | {seeds} | " + " | ".join(cells) + " |")

    # Ceilings
    name = "default" if "default" in by_name else next(iter(by_name))
    ceilings = [
        f"{by_name[name][search]['test']['oracle']['recall@5']:.4f}" if search in by_name[name] else "-"
        for search in searches
    ]
    lines.append(f"| *the target is a candidate ({name})* | | " + " | ".join(ceilings) + " |")
    return lines


def gain_cell(ablation: dict, num_seeds: int) -> str:
    """Format an ablation's gains of Recall@5 and NDCG@10, with its own number of seeds if it has fewer."""
    gains = [gain_of(ablation, column) for column in ("recall@5", "ndcg@10")]
    cell = " / ".join(f"{mean:+.1f} ± {deviation:.1f}" for mean, deviation in gains)
    count = len(ablation["runs"])
    return cell + (f" ({count} seed{'s' * (count > 1)})" if count < num_seeds else "")


def table(data: dict) -> str:
    """Make the tables in Markdown: the lists of 20 beams, the gain by number of beams, and the baselines."""
    heads = ["ablation", "beams", "seeds", "R@5: generation", "ranked", "gain, %", "at weight 1, %"]
    heads += ["R@10: generation", "ranked", "three scores", "dense-retrieval score alone"]
    heads += ["oracle", "N@10: generation", "ranked", "gain, %"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    ablations = ablations_of(data)
    for ablation in ablations:
        if ablation["beams"] == BEAMS and not ablation["ranked"]:
            lines.append("| " + " | ".join(cells_of(ablation)) + " |")
    if len({ablation["beams"] for ablation in ablations}) > 1:
        lines += by_beams([ablation for ablation in ablations if not ablation["union"]])
    lines += baseline_lines(data)
    made = max((run["made by"] for run in data["runs"]), key=lambda made_by: made_by["date"])
    lines += [
        "",
        "All figures are of the test split. Ranked: fused from two scores, with a weight chosen on validation (or 1, "
        "as in the paper). Three scores: with the dense-retrieval score as a third. In searches with items beside "
        "the beams, generation orders these, too. Gain: ranked over generation, ± standard deviation over seeds "
        f"(with one or two seeds: standard error over users). Protocol: {data['protocol']}. Codebooks: "
        f"{data['codebook sizes']} and a collision token. Made by `python -m recipes.papers.recochain.reproduce`, "
        f"one command per run (in the JSON file), on {made['machine']}, {made['versions']}, the last on "
        f"{made['date']}.",
    ]
    return "\n".join(lines)


def cells_of(ablation: dict) -> list[str]:
    """Format the cells of an ablation in the large table."""

    def value(list_name: str, column: str) -> str:
        return plus_minus(ablation["test"][list_name][column], ablation["std"][list_name][column])

    def gain(list_name: str, column: str) -> str:
        return "{:+.1f} ± {:.1f}".format(*gain_of(ablation, column, list_name))

    beams = f"{ablation['beams']}" + (f" + {ablation['union']} items" if ablation["union"] else "")
    cells = [label_of(ablation["row"]), beams, str(len(ablation["runs"]))]
    cells += [value("generation", "recall@5"), value("ranked", "recall@5")]
    cells += [gain("ranked", "recall@5"), gain("ranked at weight 1", "recall@5")]
    lists = ("generation", "ranked", "ranked, three scores", "item score alone", "oracle")
    cells += [value(list_name, "recall@10") for list_name in lists]
    return [*cells, value("generation", "ndcg@10"), value("ranked", "ndcg@10"), gain("ranked", "ndcg@10")]


def baseline_lines(data: dict) -> list[str]:
    """Make the table of the baselines and of published figures, in Markdown."""
    lines = ["", "| beside it | R@5 | R@10 | N@10 |", "| --- | --- | --- | --- |"]
    tests = {label: [result] for label, result in data["baselines"].items()}
    tests |= {label: result["tests"] for label, result in data["beside"].items()}
    for label, seeds in tests.items():
        columns = ("recall@5", "recall@10", "ndcg@10")
        figures = [plus_minus(*spread([test[column] for test in seeds])) for column in columns]
        lines.append(f"| {label.replace('_', '-')} | {' | '.join(figures)} |")
    for label, (recall, ndcg) in PUBLISHED.get(data["name"], {}).items():
        lines.append(f"| *{label}, published* | | {recall} | {ndcg} |")
    return lines


def tried_table(data: dict) -> str:
    """Make the table of stage I settings that were tried, in Markdown, the best on validation first."""
    heads = ["task", "backbone", "its dropout", "of embeddings", "epochs", "rate", "weight decay"]
    heads += ["sampled-softmax loss", "validation: R@10", "N@10", "test: R@10", "N@10"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for run in data["runs"]:
        config = run["text_config"]
        # GPT-2 has other names for the sizes.
        layers, width = (
            config.get(name, config.get(gpt2_name))
            for name, gpt2_name in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"))
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
    """
    Draw the gain of Recall@5 against beams, retrieved items and window, and the calibration of the ranking.

    The paper's gains are drawn beside ours. Data without the ablation `default` of 20 beams has no picture.
    """
    ablations = [ablation for ablation in ablations_of(data) if not ablation["union"] and not ablation["ranked"]]
    at_20 = {ablation["row"]: ablation for ablation in ablations if ablation["beams"] == BEAMS}
    if "default" not in at_20:
        return
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.1), layout="constrained")

    # Gains
    panels = panels_of(ablations, at_20, "")
    codes_alone = panels_of(ablations, at_20, CODES_ALONE)
    labels = ("beams", "items of the sub-history (k)", "items of the window")
    for axis, label, (name, by_place) in zip(axes, labels, panels.items(), strict=False):
        draw_gain(axis, by_place, "ranked", "ranked")
        draw_gain(axis, by_place, "ranked, three scores", "ranked, three scores")
        if codes_alone[name]:
            draw_gain(axis, codes_alone[name], "ranked", "ranked, histories by codes alone")
        axis.plot(*zip(*sorted(PAPER[name].items()), strict=True), "k--", marker="x", label="paper, TAOBAO-MM")
        if name != "retrieved":
            axis.set_xscale("log")
        elif no_dense_score := {place: at_20[name] for place, name in NO_DENSE_SCORE.items() if name in at_20}:
            draw_gain(axis, no_dense_score, "ranked", "ranked without the dense-retrieval score")
        places = sorted({*by_place, *PAPER[name]})
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel="gain of Recall@5 over generation, %")
        axis.axhline(0, color="gray", linewidth=0.8)

    # Calibration
    draw_calibration(axes[3], at_20)

    # Legends and file
    handles = {label: line for axis in axes[:3] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    axes[3].legend(fontsize="x-small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def panels_of(ablations: list[dict], at_20: dict[str, dict], suffix: str) -> dict[str, dict[int, dict]]:
    """Return the ablations of each panel of gains, by their place on its axis."""
    windows = [at_20[name + suffix] for name in BY_WINDOW if name + suffix in at_20]
    return {
        "beams": {ablation["beams"]: ablation for ablation in ablations if ablation["row"] == "default" + suffix},
        "retrieved": {k: at_20[name + suffix] for k, name in BY_RETRIEVED.items() if name + suffix in at_20},
        "window": {window_of(ablation["arguments"]): ablation for ablation in windows},
    }


def draw_gain(axis: plt.Axes, by_place: dict[int, dict], list_name: str, label: str) -> None:
    """Draw a list's gain of Recall@5, with error bars, for ablations by their place on the axis."""
    places = sorted(by_place)
    gains = [gain_of(by_place[place], "recall@5", list_name) for place in places]
    axis.errorbar(places, *zip(*gains, strict=True), marker="o", capsize=3, label=label)


def draw_calibration(axis: plt.Axes, at_20: dict[str, dict]) -> None:
    """Draw the share of candidates that came next against their predicted probability, for the first seed."""
    for name, users, label in (
        ("default", "all", "default"),
        ("default", "held", "default, users whose target is a candidate"),
        ("not-injected", "all", "target not injected"),
    ):
        if name in at_20:
            bins = at_20[name]["runs"][0]["calibration"][users]["predicted, observed"]
            axis.loglog(*zip(*bins, strict=True), marker="o", label=label)
    axis.axline((1e-3, 1e-3), (1e-1, 1e-1), color="gray", linewidth=0.8)
    axis.set(xlabel="the ranking's probability, 20 beams", ylabel="share that came next")

"""Make the short tables of the pages: a few cells of all `results/*.json` and the best known baselines beside them."""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

from recipes.benchmarks.report import CANDIDATES, OURS, REPEATED, cost
from recipes.common.result_files import plus_minus
from recipes.papers.recochain import report as recochain_report
from recipes.papers.unigrf import report as unigrf_report
from recipes.results import lists


class Line(NamedTuple):
    """
    One line of a short table, in Markdown.

    Args:
        test: Data, setting, seeds and metric.
        ours: Figures of this project.
        baselines: Figures of others, the best first.
    """

    test: str
    ours: str
    baselines: str


def matching(entries: list[dict], **values) -> dict:
    """Return the first entry that has all values."""
    return next(entry for entry in entries if values.items() <= entry.items())


def seed_count(ablation: dict) -> str:
    """Return the number of an ablation's seeds, in words."""
    count = len(ablation["runs"])
    return f"{count} seed" + ("s" if count > 1 else "")


def figures(ablation: dict, *columns: str) -> str:
    """Return `a / b / c` of the test, each with its deviation over seeds, if there are several."""
    return " / ".join(plus_minus(ablation["test"][name], ablation["std"][name]) for name in columns)


def unigrf_lines(results: dict[str, dict]) -> list[Line]:
    """Take the joint model that validation chose; a refit has no validation."""
    joint = [
        ablation
        for ablation in unigrf_report.ablations_of(results["unigrf_ml1m"])
        if ablation["arguments"]["row"] == "joint" and ablation["runs"][0]["validation"]
    ]
    best = max(joint, key=lambda ablation: ablation["runs"][0]["validation"]["ndcg@10"])
    paper = unigrf_report.PUBLISHED["UniGRF-Llama, paper"]
    large = unigrf_report.PUBLISHED["HSTU-large, HSTU's code base"]
    return [
        Line(
            f"MovieLens-1M, one model for both tasks ({seed_count(best)}): HR@10 / NDCG@10 / AUC",
            figures(best, "hr@10", "ndcg@10", "auc"),
            f"HSTU-large {large[0]} / {large[1]} / -; UniGRF's paper {paper[0]} / {paper[1]} / {paper[5]}",
        )
    ]


def recochain_ablation(results: dict[str, dict]) -> dict:
    """Return RecoChain's setting of 20 beams on MovieLens-1M."""
    ablations = recochain_report.ablations_of(results["recochain"])
    return matching(ablations, row="default", beams=20, union=0, ranked=0)


def sasrec_recall(results: dict[str, dict]) -> float:
    """Return the mean Recall@10 of SASRec's task on MovieLens-1M."""
    return mean(test["recall@10"] for test in results["recochain"]["beside"][recochain_report.SASREC]["tests"])


def ranked_list(ablation: dict, name: str = "ranked") -> dict:
    """Return the figures of one of an ablation's lists."""
    return {part: ablation[part][name] for part in ("test", "std")}


def recochain_lines(results: dict[str, dict]) -> list[Line]:
    """Take what ranking adds to 20 beams on MovieLens-1M, and the ranked list."""
    ablation = recochain_ablation(results)
    gain, deviation = recochain_report.gain_of(ablation, "recall@5")
    knn = results["recochain"]["baselines"]["item_knn"]["recall@10"]
    return [
        Line(
            f"MovieLens-1M, window of 7 items, gain of ranking 20 beams ({seed_count(ablation)}): Recall@5",
            f"{gain:+.1f} ± {deviation:.1f} %",
            "RecoChain's paper +3.1 % on TAOBAO-MM, by sub-histories: another effect",
        ),
        Line(
            f"the same, the ranked list ({seed_count(ablation)}): Recall@10",
            figures(ranked_list(ablation), "recall@10"),
            f"SASRec's task, twice as many passes, {sasrec_recall(results):.4f}; item-kNN, tuned, {knn:.4f}",
        ),
    ]


def seeds_and_validation(ablation: dict) -> tuple[int, float]:
    """Return the number of an ablation's seeds and their mean NDCG@10 on validation."""
    runs = ablation["runs"]
    return len(runs), mean(run["validation ndcg@10"] for run in runs)


def beauty_lines(results: dict[str, dict]) -> list[Line]:
    """Take Amazon Beauty's ablation with dense candidates of the most seeds, then of the best validation."""
    ablations = recochain_report.ablations_of(results["recochain_beauty"])
    ablations = [ablation for ablation in ablations if (ablation["beams"], ablation["union"]) == (20, 20)]
    best = max(ablations, key=seeds_and_validation)
    published = recochain_report.PUBLISHED["recochain_beauty"]
    names = ("SASRec++", "SASRec, sampled softmax, tuned", "TIGER")
    return [
        Line(
            f"Amazon Beauty, 20 beams and 20 dense candidates ({seed_count(best)}): Recall@10",
            figures(ranked_list(best, "ranked, three scores"), "recall@10"),
            "; ".join(f"{name} {published[name][0]}" for name in names),
        )
    ]


def lists_lines(results: dict[str, dict]) -> list[Line]:
    """Take the list of all scores of each data set, and the strongest list that counting or text makes."""
    lines = []
    for result in lists.entries_of(results).values():
        rows = result["rows"]
        floors = {name: rows[name] for name in lists.FLOORS if name in rows}
        strongest = max(floors, key=lambda name: mean(floors[name]["ndcg@10"]))
        count = len(result["seeds"])
        lines.append(
            Line(
                f"{result['data']}, list of all scores ({count} seed{'s' * (count > 1)}): Recall@10 / NDCG@10",
                lists.mean_cell(rows["ranked"]),
                f"{lists.COLUMNS[strongest]} {lists.mean_cell(rows[strongest])}",
            )
        )
    return lines


def movielens_100k_lines(results: dict[str, dict]) -> list[Line]:
    """Take the list of the demo."""
    data = results["movielens_100k"]
    ranked = data["rows"]["generation + ranking"]["recall@10"]
    counts = data["rows"]["transitions"]["recall@10"]
    return [
        Line(
            f"MovieLens-100K, `make demo` ({len(data['seeds'])} seeds): Recall@10",
            plus_minus(ranked["mean"], ranked["std"]),
            f"counts, tuned, {counts['mean']:.4f}",
        )
    ]


def decoding_lines(results: dict[str, dict]) -> list[Line]:
    """Take the costs of searching and ranking 256 beams."""
    data = results["decoding"]

    def ratio(what: str) -> str:
        return f"{matching(data['ratios'], what=what, dtype='float32')['wall']:g}x"

    def megabytes(contender: str) -> str:
        return f"{cost(data, 'peak_mb', [('ranking', contender)], 'float32', CANDIDATES):,.0f} MB"

    added = "recommend over generate, 256 beams on 36 tokens, 1 user, sub-histories of"
    return [
        Line(
            "Search of 256 beams on 261 tokens, one user, two CPU cores: speed",
            ratio("beam search, 256 beams, 261 tokens, 1 user"),
            "transformers' `generate` with `prefix_allowed_tokens_fn` 1x",
        ),
        Line(
            "Ranking 256 candidates on the cache: memory", megabytes(OURS), f"the cache repeated {megabytes(REPEATED)}"
        ),
        Line("Generating and ranking 256 beams, one user: time", ratio(f"{added} 0"), "generating alone 1x"),
        Line(
            "the same with sub-histories of 10, the best 20 ranked: time",
            ratio(f"{added} 10, the best 20 ranked"),
            "generating alone 1x",
        ),
    ]


# The page of each result, seen from `recipes/results/`.
PARTS: dict[str, Callable[[dict[str, dict]], list[Line]]] = {
    "../papers/unigrf/README.md": unigrf_lines,
    "../papers/recochain/README.md": lambda results: [*recochain_lines(results), *beauty_lines(results)],
    "#the-lists": lists_lines,
    "#the-demo-on-movielens-100k": movielens_100k_lines,
    "../benchmarks/README.md": decoding_lines,
}


def table(lines: list[Line]) -> str:
    """Write lines as a table, in Markdown."""
    head = ["| test | ours | strongest baselines |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| {line.test} | **{line.ours}** | {line.baselines} |" for line in lines)])


def readme_table(results: dict[str, dict]) -> str:
    """Write the lines of the first page, and where a baseline is ahead."""
    ours = figures(ranked_list(recochain_ablation(results)), "recall@10")
    best = recochain_report.PUBLISHED["recochain_beauty"]["SASRec++"][0]
    lines = [*unigrf_lines(results), *lists_lines(results), decoding_lines(results)[0]]
    return "\n".join(
        [
            table(lines),
            "",
            f"For comparison: on Beauty, the authors of SASRec++ report Recall@10 {best}.",
            "**SASRec is ahead of RecoChain's setting.** On MovieLens-1M, from windows of 7 items, its task has "
            f"Recall@10 {sasrec_recall(results):.4f}.",
            f"Our ranked list has {ours} there, after half as many passes, without transitions.",
        ]
    )


def index_table(results: dict[str, dict]) -> str:
    """Write all lines, each with a link to its page."""
    rows = [
        f"| {line.test} | **{line.ours}** | {line.baselines} | [page]({page}) |"
        for page, lines_of in PARTS.items()
        for line in lines_of(results)
    ]
    return "\n".join(["| test | ours | strongest baselines | |", "| --- | --- | --- | --- |", *rows])

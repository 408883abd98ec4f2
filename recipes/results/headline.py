"""The README's one table of results: a few cells of all `results/*.json` beside what stands next to them.

Everything else that was measured, with seeds, settings and what did not work, is in `recipes/results/README.md`.
"""

from statistics import mean

from recipes.benchmarks.report import CANDIDATES, OURS, REPEATED, cost
from recipes.common.result_files import plus_minus
from recipes.papers.recochain import report as recochain_report
from recipes.papers.unigrf import report as unigrf_report


def one(rows: list[dict], **cell) -> dict:
    """The row that says all of `cell`."""
    return next(row for row in rows if cell.items() <= row.items())


def seeds(row: dict) -> str:
    return f"{len(row['runs'])} seed" + ("s" if len(row["runs"]) > 1 else "")


def figures(row: dict, *columns: str) -> str:
    """`a / b / c` of the test, each with its deviation over seeds, if there are several."""
    return " / ".join(plus_minus(row["test"][name], row["std"][name]) for name in columns)


def unigrf_rows(data: dict) -> list[tuple[str, str, str]]:
    # What validation chose; a refit has none.
    joint = [
        row
        for row in unigrf_report.ablations_of(data)
        if row["arguments"]["row"] == "joint" and row["runs"][0]["validation"]
    ]
    best = max(joint, key=lambda row: row["runs"][0]["validation"]["ndcg@10"])
    paper, large = (unigrf_report.PUBLISHED[name] for name in ("UniGRF-Llama, paper", "HSTU-large, HSTU's code base"))
    beside = f"UniGRF's paper {paper[0]} / {paper[1]} / {paper[5]}, HSTU-large {large[0]} / {large[1]} / -"
    what = f"MovieLens-1M, one model for both tasks ({seeds(best)}): HR@10 / NDCG@10 / AUC"
    return [(what, figures(best, "hr@10", "ndcg@10", "auc"), beside)]


def recochain_rows(data: dict) -> list[tuple[str, str, str]]:
    row = one(recochain_report.ablations_of(data), row="default", beams=20, union=0, ranked=0)
    gain, deviation = recochain_report.gain_of(row, "recall@5")
    ranked = {"test": row["test"]["ranked"], "std": row["std"]["ranked"]}
    knn = data["baselines"]["item_knn"]["recall@10"]
    sasrec = mean(test["recall@10"] for test in data["beside"][recochain_report.SASREC]["tests"])
    beside = f"item-kNN, tuned, {knn:.4f}; SASRec's task, twice as many passes, {sasrec:.4f}"
    return [
        (
            f"MovieLens-1M, window of 7 items, ranking of 20 beams over generation ({seeds(row)}): Recall@5",
            f"{gain:+.1f} ± {deviation:.1f} %",
            "RecoChain's paper +3.1 %, on TAOBAO-MM, by sub-histories: another effect",
        ),
        (
            f"the same, the ranked list ({seeds(row)}): Recall@10",
            figures(ranked, "recall@10"),
            beside,
        ),
    ]


def beauty_rows(data: dict) -> list[tuple[str, str, str]]:
    # What validation chose of the rows with items beside the beams and, so that these can be compared, the most seeds.
    rows = [row for row in recochain_report.ablations_of(data) if (row["beams"], row["union"]) == (20, 20)]
    row = max(rows, key=lambda row: (len(row["runs"]), mean(run["validation ndcg@10"] for run in row["runs"])))
    published = recochain_report.PUBLISHED["recochain_beauty"]
    beside = ", ".join(f"{name} {published[name][0]}" for name in ("TIGER", "SASRec, sampled softmax, tuned"))
    ranked = {name: row[name]["ranked, three scores"] for name in ("test", "std")}
    return [
        (
            f"Amazon-2014 Beauty, 20 beams and 20 items beside them, fused ({seeds(row)}): Recall@10",
            figures(ranked, "recall@10"),
            beside,
        )
    ]


def movielens_100k_rows(data: dict) -> list[tuple[str, str, str]]:
    ranked, knn = (data["rows"][name]["recall@10"] for name in ("generation + ranking", "item_knn"))
    what = f"MovieLens-100K, `make demo` ({len(data['seeds'])} seeds): Recall@10"
    return [(what, plus_minus(ranked["mean"], ranked["std"]), f"item-kNN, tuned, {knn['mean']:.4f}")]


def decoding_rows(data: dict) -> list[tuple[str, str, str]]:
    def ratio(what: str) -> str:
        return f"{one(data['ratios'], what=what, dtype='float32')['wall']:g}x"

    ours, repeated = (cost(data, "peak_mb", [("ranking", name)], "float32", CANDIDATES) for name in (OURS, REPEATED))
    adds = "recommend over generate, 256 beams on 36 tokens, 1 user, sub-histories of"
    return [
        (
            "Search of 256 beams on 261 tokens, one user, two cores: speed",
            ratio("beam search, 256 beams, 261 tokens, 1 user"),
            "transformers' `generate` with `prefix_allowed_tokens_fn` 1x",
        ),
        ("Ranking 256 candidates on the cache: memory", f"{ours:.0f} MB", f"the cache repeated {repeated:,.0f} MB"),
        ("Generating and ranking 256 beams, one user: time", ratio(f"{adds} 0"), "generating alone 1x"),
        (
            "the same with sub-histories of 10, the best 20 ranked: time",
            ratio(f"{adds} 10, the best 20 ranked"),
            "generating alone 1x",
        ),
    ]


PARTS = {
    "unigrf_ml1m": unigrf_rows,
    "recochain": recochain_rows,
    "recochain_beauty": beauty_rows,
    "movielens_100k": movielens_100k_rows,
    "decoding": decoding_rows,
}


def table(results: dict[str, dict]) -> str:
    """All results by their names -> the table, in Markdown."""
    lines = ["| test | ours | beside it |", "| --- | --- | --- |"]
    for name, rows in PARTS.items():
        lines += [f"| {what} | **{ours}** | {beside} |" for what, ours, beside in rows(results[name])]
    return "\n".join(lines)

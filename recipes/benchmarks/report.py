"""Make the ratios, the tables and the picture of the decoding benchmark from its figures."""

from pathlib import Path

import matplotlib.pyplot as plt

from recipes.benchmarks.ranking_cost import RANKED, RETRIEVED

# Contenders.
BY_DICT = "transformers + prefix_allowed_tokens_fn"
BY_PROCESSOR = "transformers + our logits processor"
WHOLE = "whole sequences"
REPEATED = "cache repeated"
OURS = "ours"
MATMULS = "matmuls of both, without the prefill"
STATIC = "STATIC"
NESTED_DICTS = "nested dicts"
CATALOG = 100_000
DTYPES = ("float32", "bfloat16")
# Cells of the ratios. 52 items are 261 tokens, 102 are 511.
SEARCH = {"history_items": 52, "num_beams": 256, "users": 1, "levels": 4, "catalog": CATALOG}
HALF = {**SEARCH, "num_beams": 128}
BATCH = {**SEARCH, "num_beams": 50, "users": 8}
LONG = {**SEARCH, "history_items": 102}
# 28 items of 17 codes are 505 tokens.
CANDIDATES = {**SEARCH, "history_items": 28, "levels": 17}


def cost(data: dict, measure: str, parts: list[tuple[str, str]], dtype: str, cell: dict) -> float | None:
    """
    Sum a measure over parts of a cell.

    Args:
        data: Figures of the benchmark.
        measure: `wall_ms`, `cpu_ms` or `peak_mb`.
        parts: Tasks, each with its contender.
        dtype: Type of the runs.
        cell: Fields of the cell.

    Returns:
        The sum; None if a part was not run.
    """
    total = 0
    for task, contender in parts:
        fields = {**cell, "task": task, "contender": contender, "dtype": dtype}
        values = [row[measure] for row in data["rows"] if fields.items() <= row.items()]
        if not values:
            return None
        total += values[0]
    return total


def ratios(data: dict) -> list[dict]:
    """List the ratios that matter, each with its goal."""
    return [*search_ratios(data), *ranking_ratios(data), *trie_ratios(data)]


def search_ratios(data: dict) -> list[dict]:
    """List the ratios of search and ranking."""
    # Parts of a cost.
    search = [("search", OURS)]
    rank = [("ranking", OURS)]
    both = [("both", OURS)]
    stock_search = [("search", BY_DICT)]
    stock_both = [*stock_search, ("ranking", WHOLE)]
    floor = [("prefill", OURS), (MATMULS, "floor")]

    # Ratios that a benchmark of the whole grid has.
    rows: list[dict] = []

    def add(what: str, goals: tuple[str, str], over: list, under: list, cell: dict, over_cell: dict | None = None):
        for dtype, goal in zip(DTYPES, goals, strict=True):
            row = {"what": what, "dtype": dtype, "to reach": goal}
            # The baselines run in float32 alone.
            over_dtype = "float32" if over_cell is None else dtype
            for measure in ("wall_ms", "cpu_ms"):
                numerator = cost(data, measure, over, over_dtype, over_cell or cell)
                denominator = cost(data, measure, under, dtype, cell)
                if numerator is not None and denominator is not None:
                    row[measure.removesuffix("_ms")] = round(numerator / denominator, 2)
            if "wall" in row:
                rows.append(row)

    add("beam search, 256 beams, 261 tokens, 1 user", (">= 90", ">= 150"), stock_search, search, SEARCH)
    add("beam search, 50 beams, 261 tokens, 8 users", (">= 60", ">= 120"), stock_search, search, BATCH)
    add("beams and ranking of 256, 511 tokens, 1 user", (">= 70",) * 2, stock_both, both, LONG)
    add("ranking 256 candidates of 17 tokens on 505", (">= 40",) * 2, [("ranking", WHOLE)], rank, CANDIDATES)
    add("the same, against the cache repeated", ("-",) * 2, [("ranking", REPEATED)], rank, CANDIDATES)
    add("256 beams over 128", ("<= 1.8",) * 2, search, search, HALF, SEARCH)
    add("recommend over its prefill and matmuls", ("<= 3",) * 2, both, floor, SEARCH, SEARCH)
    return rows


def ranking_ratios(data: dict) -> list[dict]:
    """List the ratios of `recommend` over `generate`."""
    rows = []
    for retrieved, long_items in ((0, 0), (RETRIEVED, 1_000)):
        for task, suffix in (("recommend", ""), ("recommend, cut", f", the best {RANKED} ranked")):
            for dtype in DTYPES:
                cell = {"retrieved": retrieved, "long_items": long_items, "users": 1, "dtype": dtype}
                ratio = added_by_ranking(data, task, **cell)
                what = f"recommend over generate, 256 beams on 36 tokens, 1 user, sub-histories of {retrieved}{suffix}"
                if ratio:
                    rows.append({"what": what, "dtype": dtype, "to reach": "<= 1.35", **ratio})
    return rows


def trie_ratios(data: dict) -> list[dict]:
    """List the ratios of our trie over STATIC."""
    rows = []
    for users in (1, 16):
        steps = {
            row["contender"]: row["sum_ms"]
            for row in data["trie"]
            if (row["size"], row["users"]) == (1_000_000, users)
        }
        if steps:
            what = f"trie of 1M items, three steps of 256 beams, {users} user{'s' * (users > 1)}, over STATIC"
            ratio = round(steps[OURS] / steps[STATIC], 2)
            rows.append({"what": what, "dtype": "-", "to reach": "<= 0.35", "wall": ratio})
    return rows


def added_by_ranking(data: dict, task: str, **cell) -> dict[str, float] | None:
    """
    Divide the wall and the CPU time of a task by those of `generate`, in a cell of `recipes.benchmarks.ranking_cost`.

    Args:
        data: Figures of the benchmark.
        task: `recommend` or `recommend, cut`.
        cell: Fields of the cell.

    Returns:
        Ratios `wall` and `cpu`; None if the task was not run.
    """
    rows = {row["task"]: row for row in data["ranking"] if cell.items() <= row.items()}
    if not {task, "generate"} <= set(rows):
        return None
    return {name: round(rows[task][f"{name}_ms"] / rows["generate"][f"{name}_ms"], 2) for name in ("wall", "cpu")}


def milliseconds(value: float | None) -> str:
    """Write a time for a table; `-` for one that was not run."""
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def table(data: dict) -> str:
    """Write all tables of the benchmark in Markdown, ratios first."""
    lines = ratio_table(data) + cell_table(data)
    lines += trie_table(data) if data["trie"] else []
    lines += ranking_table(data) if data["ranking"] else []
    return "\n".join(lines + notes(data))


def ratio_table(data: dict) -> list[str]:
    """Write the ratios, and the memory that ranking adds."""
    lines = ["| | wall | CPU | to reach |", "| --- | --- | --- | --- |"]
    for row in data["ratios"]:
        name = row["what"] + ("" if row["dtype"] == "-" else f", {row['dtype']}")
        lines.append(f"| {name} | **{row['wall']:g}x** | {row.get('cpu', 0) or '-'} | {row['to reach']} |")
    memory = cost(data, "peak_mb", [("ranking", OURS)], "float32", CANDIDATES)
    repeated = cost(data, "peak_mb", [("ranking", REPEATED)], "float32", CANDIDATES)
    if memory is not None and repeated is not None:
        lines += [
            "",
            f"Ranking 256 candidates of 17 tokens adds {memory:.0f} MB of memory; with the cache repeated, "
            f"{repeated:,.0f} MB.",
        ]
    return lines


def cell_table(data: dict) -> list[str]:
    """Write the times of all cells of the first catalog."""
    lines = [
        "",
        f"Wall milliseconds of a call in float32, with {CATALOG:,} items. `-`: not run, because it would run more "
        "than 150,000 tokens at once.",
        "",
    ]
    columns = {
        "generate, dict trie": [("search", BY_DICT)],
        "generate, our processor": [("search", BY_PROCESSOR)],
        "**search, ours**": [("search", OURS)],
        "whole sequences": [("ranking", WHOLE)],
        "cache repeated": [("ranking", REPEATED)],
        "**ranking, ours**": [("ranking", OURS)],
        "**both, ours**": [("both", OURS)],
        "prefill": [("prefill", OURS)],
    }
    lines += ["| history | beams | users | " + " | ".join(columns) + " |", "| --- " * (3 + len(columns)) + "|"]
    cells = {
        (row["history_items"], row["num_beams"], row["users"]): row["tokens"]
        for row in data["rows"]
        if (row["catalog"], row["levels"], row["task"]) == (CATALOG, 4, "both")
    }
    for (items, beams, users), tokens in sorted(cells.items()):
        cell = {"history_items": items, "num_beams": beams, "users": users, "levels": 4, "catalog": CATALOG}
        values = [milliseconds(cost(data, "wall_ms", parts, "float32", cell)) for parts in columns.values()]
        lines.append(f"| {items} items, {tokens:,} tokens | {beams} | {users} | " + " | ".join(values) + " |")
    return lines


def trie_table(data: dict) -> list[str]:
    """Write times and sizes of the tries alone."""
    lines = [
        "",
        "The trie alone: milliseconds of three steps of 256 beams, below the first level. Bytes are those of the "
        "nodes per item; the second number adds the map from leaves to items, which every trie needs.",
        "",
        "| items | nested dicts | STATIC | **ours** | 16 users: STATIC | **ours** | bytes: STATIC | **ours** "
        "| build, s |",
        "| --- " * 9 + "|",
    ]
    for size in sorted({row["size"] for row in data["trie"]}):
        rows = {(row["contender"], row["users"]): row for row in data["trie"] if row["size"] == size}
        ours, static, nested = (rows.get((name, 1)) for name in (OURS, STATIC, NESTED_DICTS))
        cells = [
            f"{size:,}",
            milliseconds(nested and nested["sum_ms"]),
            *(milliseconds(rows[name, users]["sum_ms"]) for users in (1, 16) for name in (STATIC, OURS)),
            f"{static['bytes_per_item']:.1f}",
            f"{ours['bytes_per_item']:.1f} / {ours['bytes_per_item_with_item_map']:.1f}",
            f"{ours['build_s']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ranking_table(data: dict) -> list[str]:
    """Write what ranking adds to generation, and what long histories cost, in float32."""
    lines = [
        "",
        "Ranking beside generation, for 256 beams on a window of 7 items, and a training step of stage II on 32 rows "
        "of 20 candidates. Milliseconds of all cores in float32; megabytes added in parentheses.",
        "",
        "| sub-histories | long history | users | generate | recommend | retrieval of sub-histories "
        f"| the best {RANKED} ranked | training step |",
        "| --- " * 8 + "|",
    ]
    cells = {
        (row["retrieved"], row["long_items"], row["users"]) for row in data["ranking"] if row["task"] == "generate"
    }
    for retrieved, length, users in sorted(cells):
        cell = {"retrieved": retrieved, "long_items": length, "dtype": "float32"}
        values = {
            row["task"]: f"{milliseconds(row['cpu_ms'])} ({row['peak_mb']:,.0f})"
            for row in data["ranking"]
            if cell.items() <= row.items() and (row["users"] == users or row["task"] == "training step")
        }
        tasks = ("generate", "recommend", "retrieve", "recommend, cut", "training step")
        names = [f"of {retrieved}" if retrieved else "none", f"{length:,}", str(users)]
        lines.append("| " + " | ".join([*names, *(values.get(task, "-") for task in tasks)]) + " |")
    record = data.get("ranking made by", data["made by"])
    return [*lines, "", f"Made by `{record['command']}` on {record['machine']}, {record['date']}."]


def notes(data: dict) -> list[str]:
    """Write how the figures were made, and how far the searches agree."""
    record = data["made by"]
    shares = [row["same_items"] for row in data["agreement"] if row["dtype"] == "float32"]
    # Only a run of all parts measures this.
    speed_up = data.get("bf16 speed-up of a matmul")
    lines = [
        "",
        f"In float32, our search has at least {min(shares):.1%} of the beams of transformers with our processor. A "
        f"figure is the median of up to {max(row['runs'] for row in data['rows'])} runs within ten seconds. Slower "
        "contenders, such as the baselines with 256 beams, ran once, without a warm-up. Made by "
        f"`{record['command']}` on {record['machine']}, {record['versions']}, {record['date']}.",
    ]
    if speed_up:
        lines[-1] += f" A bfloat16 matmul runs there {speed_up:g} times as fast as a float32 matmul."
    return lines


def draw(data: dict, file: Path) -> None:
    """Draw cost against beams and against candidates, on logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    dtypes = sorted({row["dtype"] for row in data["rows"]}, reverse=True)
    for axis, task, contenders, cell, title in (
        (axes[0], "search", (BY_DICT, BY_PROCESSOR, OURS), {**SEARCH}, "beam search, 261 tokens, 1 user"),
        (axes[1], "ranking", (WHOLE, REPEATED, OURS), {**CANDIDATES}, "ranking candidates of 17 tokens on 505"),
    ):
        # Lines
        cell.pop("num_beams")
        for contender in contenders:
            for dtype in dtypes:
                fields = {**cell, "task": task, "contender": contender, "dtype": dtype}
                points = sorted(
                    (row["num_beams"], row["wall_ms"]) for row in data["rows"] if fields.items() <= row.items()
                )
                if points:
                    name = contender if len(dtypes) == 1 else f"{contender}, {dtype}"
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)

        # Axes
        axis.set(
            xscale="log",
            yscale="log",
            title=title,
            ylabel="ms, wall",
            xlabel="beams" if task == "search" else "candidates",
        )
        counts = sorted({row["num_beams"] for row in data["rows"] if {**cell, "task": task}.items() <= row.items()})
        axis.set_xticks(counts, [f"{count}" for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)

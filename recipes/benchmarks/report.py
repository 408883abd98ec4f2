"""What `recipes.benchmarks.decoding` measured: ratios against the peers, its tables, and the picture."""

from pathlib import Path

import matplotlib.pyplot as plt

from recipes.benchmarks.ranking_cost import RANKED, RETRIEVED

BY_DICT = "transformers + prefix_allowed_tokens_fn"
BY_PROCESSOR = "transformers + our logits processor"
WHOLE, REPEATED, OURS = "whole sequences", "cache repeated", "ours"
MATMULS = "matmuls of both, without the prefill"
CATALOG = 100_000
# Cells of the ratios: 52 items are 261 tokens, 102 are 511; 28 items of 17 codes are 505.
SEARCH = {"history_items": 52, "num_beams": 256, "users": 1, "levels": 4, "catalog": CATALOG}
HALF, BATCH = {**SEARCH, "num_beams": 128}, {**SEARCH, "num_beams": 50, "users": 8}
LONG = {**SEARCH, "history_items": 102}
CANDIDATES = {**SEARCH, "history_items": 28, "levels": 17}


def cost(data: dict, measure: str, parts: list[tuple[str, str]], dtype: str, cell: dict) -> float | None:
    """The sum of `measure` over `(task, contender)` parts of one cell; None if one of them was not run."""
    values = []
    for task, contender in parts:
        wanted = {**cell, "task": task, "contender": contender, "dtype": dtype}
        found = [row[measure] for row in data["rows"] if wanted.items() <= row.items()]
        if not found:
            return None
        values.append(found[0])
    return sum(values)


def ratios(data: dict) -> list[dict]:
    """The ratios that matter, each with what it was to reach."""
    search, rank, both = [("search", OURS)], [("ranking", OURS)], [("both", OURS)]
    stock_both = [("search", BY_DICT), ("ranking", WHOLE)]
    found = []

    def add(what, goal, over, under, dtypes=("float32", "bfloat16"), over_cell=None, **cell):
        for dtype, wanted in zip(dtypes, goal if isinstance(goal, tuple) else (goal,) * len(dtypes), strict=True):
            row = {"what": what, "dtype": dtype, "to reach": wanted}
            for measure in ("wall_ms", "cpu_ms"):
                # The peers run in float32: bfloat16 is ours to use where it is faster.
                first = cost(data, measure, over, "float32" if over_cell is None else dtype, over_cell or cell)
                second = cost(data, measure, under, dtype, cell)
                if first is not None and second is not None:
                    row[measure.removesuffix("_ms")] = round(first / second, 2)
            if "wall" in row:
                found.append(row)

    by_dict = [("search", BY_DICT)]
    add("beam search, 256 beams, 261 tokens, 1 user", (">= 90", ">= 150"), by_dict, search, **SEARCH)
    add("beam search, 50 beams, 261 tokens, 8 users", (">= 60", ">= 120"), by_dict, search, **BATCH)
    add("beams and ranking of 256, 511 tokens, 1 user", ">= 70", stock_both, both, **LONG)
    add("ranking 256 candidates of 17 tokens on 505", ">= 40", [("ranking", WHOLE)], rank, **CANDIDATES)
    add("the same, against the cache repeated", "-", [("ranking", REPEATED)], rank, **CANDIDATES)
    add("256 beams over 128", "<= 1.8", search, search, over_cell=SEARCH, **HALF)
    add(
        "recommend over its prefill and matmuls",
        "<= 3",
        both,
        [("prefill", OURS), (MATMULS, "floor")],
        over_cell=SEARCH,
        **SEARCH,
    )
    for retrieved, long_items in ((0, 0), (RETRIEVED, 1_000)):
        for task, ranked in (("recommend", ""), ("recommend, cut", f", the best {RANKED} ranked")):
            for dtype in ("float32", "bfloat16"):
                added = added_by_ranking(data, task, retrieved=retrieved, long_items=long_items, users=1, dtype=dtype)
                what = f"recommend over generate, 256 beams on 36 tokens, 1 user, sub-histories of {retrieved}{ranked}"
                found += [{"what": what, "dtype": dtype, "to reach": "<= 1.35", **added}] if added else []
    for users in (1, 16):
        steps = {
            row["contender"]: row["sum_ms"]
            for row in data["trie"]
            if (row["size"], row["users"]) == (1_000_000, users)
        }
        if steps:
            what = f"trie of 1M items, three steps of 256 beams, {users} user{'s' * (users > 1)}, over STATIC"
            found.append(
                {"what": what, "dtype": "-", "to reach": "<= 0.35", "wall": round(steps[OURS] / steps["STATIC"], 2)}
            )
    return found


def added_by_ranking(data: dict, task: str, **cell) -> dict[str, float] | None:
    """A call over `generate` of one cell of `recipes.benchmarks.ranking_cost`, by wall and CPU time; None if it was not run."""
    rows = {row["task"]: row for row in data["ranking"] if cell.items() <= row.items()}
    if not {task, "generate"} <= set(rows):
        return None
    return {name: round(rows[task][f"{name}_ms"] / rows["generate"][f"{name}_ms"], 2) for name in ("wall", "cpu")}


def ranking_table(data: dict) -> list[str]:
    """What ranking adds to generation, and what long histories cost, float32."""
    lines = [
        "",
        "Ranking beside generation, 256 beams on a window of 7 items, and a training step of stage II (32 rows, 20 candidates "
        "each), float32: milliseconds of all cores (megabytes added).",
        "",
        f"| sub-histories | long history | users | generate | recommend | of it finding sub-histories | the best {RANKED} ranked | training step |",
        "| --- " * 8 + "|",
    ]
    cells = {
        (row["retrieved"], row["long_items"], row["users"]) for row in data["ranking"] if row["task"] == "generate"
    }
    for retrieved, length, users in sorted(cells):
        cell = {"retrieved": retrieved, "long_items": length, "dtype": "float32"}
        rows = {
            row["task"]: f"{milliseconds(row['cpu_ms'])} ({row['peak_mb']:,.0f})"
            for row in data["ranking"]
            if cell.items() <= row.items() and (row["users"] == users or row["task"] == "training step")
        }
        tasks = ("generate", "recommend", "retrieve", "recommend, cut", "training step")
        names = [f"of {retrieved}" if retrieved else "none", f"{length:,}", str(users)]
        lines.append("| " + " | ".join([*names, *(rows.get(task, "-") for task in tasks)]) + " |")
    made = data.get("ranking made by", data["made by"])
    return [*lines, "", f"Made by `{made['command']}` on {made['machine']}, {made['date']}."]


def milliseconds(value: float | None) -> str:
    """`-` for what was not run."""
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def table(data: dict) -> str:
    """The performance tables, in Markdown: ratios first."""
    lines = ["| | wall | CPU | to reach |", "| --- | --- | --- | --- |"]
    for row in data["ratios"]:
        name = row["what"] + ("" if row["dtype"] == "-" else f", {row['dtype']}")
        lines.append(f"| {name} | **{row['wall']:g}x** | {row.get('cpu', 0) or '-'} | {row['to reach']} |")
    memory = cost(data, "peak_mb", [("ranking", OURS)], "float32", CANDIDATES)
    repeated = cost(data, "peak_mb", [("ranking", REPEATED)], "float32", CANDIDATES)
    if memory is not None and repeated is not None:
        lines += [
            "",
            f"Memory that ranking 256 candidates of 17 tokens adds: {memory:.0f} MB (cache repeated: {repeated:,.0f} MB).",
        ]
    lines += [
        "",
        f"Milliseconds a call, wall, {CATALOG:,} items, float32; `-`: not run, more than 150,000 tokens at once.",
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
    lines += trie_table(data) if data["trie"] else []
    lines += ranking_table(data) if data["ranking"] else []
    speed_up = data.get("bf16 speed-up of a matmul")  # of a run of all parts
    made, shares = data["made by"], [row["same_items"] for row in data["agreement"] if row["dtype"] == "float32"]
    lines += [
        "",
        f"In float32 our beams were those of transformers with our processor in at least {min(shares):.1%} of places. "
        f"Medians of {max(row['runs'] for row in data['rows'])} runs or of what ten seconds allow, of slower contenders (the peers with 256 beams) one run without a warm-up. Made by "
        f"`{made['command']}` on {made['machine']}, {made['versions']}, {made['date']}."
        + (f" A bfloat16 matmul runs at {speed_up:g} times the speed of float32 there." if speed_up else ""),
    ]
    return "\n".join(lines)


def trie_table(data: dict) -> list[str]:
    """The trie alone, beside its peers."""
    lines = [
        "",
        "The trie alone: three steps of 256 beams below the first, milliseconds; bytes an item of its nodes, and with the map "
        "from leaves to items that every one of them needs.",
        "",
        "| items | nested dicts | STATIC | **ours** | 16 users: STATIC | **ours** | bytes: STATIC | **ours** | build, s |",
        "| --- " * 9 + "|",
    ]
    sizes = sorted({row["size"] for row in data["trie"]})
    for size in sizes:
        rows = {(row["contender"], row["users"]): row for row in data["trie"] if row["size"] == size}
        ours, static, nested = (rows.get((name, 1)) for name in (OURS, "STATIC", "nested dicts"))
        cells_of_row = [
            f"{size:,}",
            milliseconds(nested and nested["sum_ms"]),
            *(milliseconds(rows[name, users]["sum_ms"]) for users in (1, 16) for name in ("STATIC", OURS)),
            f"{static['bytes_per_item']:.1f}",
            f"{ours['bytes_per_item']:.1f} / {ours['bytes_per_item_with_item_map']:.1f}",
            f"{ours['build_s']:.2f}",
        ]
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return lines


def draw(data: dict, file: Path) -> None:
    """Cost against beams and against candidates, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    dtypes = sorted({row["dtype"] for row in data["rows"]}, reverse=True)
    for axis, task, contenders, cell, title in (
        (axes[0], "search", (BY_DICT, BY_PROCESSOR, OURS), {**SEARCH}, "beam search, 261 tokens, 1 user"),
        (axes[1], "ranking", (WHOLE, REPEATED, OURS), {**CANDIDATES}, "ranking candidates of 17 tokens on 505"),
    ):
        cell.pop("num_beams")
        for contender in contenders:
            for dtype in dtypes:
                wanted = {**cell, "task": task, "contender": contender, "dtype": dtype}
                points = sorted(
                    (row["num_beams"], row["wall_ms"]) for row in data["rows"] if wanted.items() <= row.items()
                )
                if points:
                    name = contender if len(dtypes) == 1 else f"{contender}, {dtype}"
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)
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

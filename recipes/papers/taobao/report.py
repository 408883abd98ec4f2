"""What `recipes.papers.taobao.scaling` measured, as tables."""

CODES, TRIE = 16, 16  # bytes an item: four int32, and a bound on the trie (of 35 million items with random codes 12)


def table(results: dict) -> str:
    """Stages at full size, then what training took at the sizes that were run, in Markdown."""
    full, (small, large), model = results["full"], results["runs"], results["model at full size"]
    counts = [f"{run['items']['items']:,} items and {run['users']['users']:,} users" for run in (small, large)]
    lines = [
        f"| stage | core seconds, {counts[1]} | core hours, the whole | private memory, GB | with mapped files | "
        "disk, GB |",
        "| --- " * 6 + "|",
    ]
    for stage, one in results["extrapolated"].items():
        sizes = (f"{one[key] / 1024:.1f}" for key in ("private_mb", "peak_mb", "disk_mb"))
        hours = one["cpu_seconds"] / 3600
        lines.append(f"| {stage} | {large[stage]['cpu_seconds']:.1f} | {hours:.2f} | {' | '.join(sizes)} |")
    lines += [
        "",
        f"The whole: {full['items']:,} items, {full['users']:,} users, {full['samples']:,} samples, by the slopes between "
        f"{counts[0]} and {counts[1]}; codebooks there on {large['codebooks']['points']:,} items and "
        f"{large['codebooks']['num_iterations']} iterations, in the whole with the defaults of 1,048,576 and 20. A model of "
        f"all items and its trie, built: {model['private_mb'] / 1024:.1f} GB of private memory, "
        f"{model['cpu_seconds']:.0f} core seconds.",
        "",
        f"| training, {results['training'][0]['rows_a_step']} rows a step | core seconds a row | private memory, GB | "
        "with mapped files | generation loss | ranking loss |",
        "| --- " * 6 + "|",
    ]
    for one in results["training"]:
        sizes = (f"{one['memory'][f'training_{name}_mb'] / 1024:.2f}" for name in ("private", "peak"))
        first, last = (list(one["losses"].values())[place] for place in (0, -1))
        losses = (f"{before:.3f} to {after:.3f}" for before, after in zip(first, last, strict=True))
        seconds = one["cpu_seconds"]["training"] / one["rows"]
        lines.append(f"| {one['what']} | {seconds:.4f} | {' | '.join(sizes)} | {' | '.join(losses)} |")
    # Between two small runs the slope of private memory may be none at all: what grows hides behind buffers.
    more = (full["items"] - large["items"]["items"]) * (CODES + TRIE) / 2**20
    wholes = []
    for (stage, one), run in zip(results["training at full size"].items(), results["training"][1::2], strict=True):
        private = max(one["private_mb"], run["memory"]["training_private_mb"] + more)
        wholes.append(
            f"{stage} {one['epoch_core_hours']:,.0f} core hours for one epoch of {one['rows']:,} clicks and "
            f"{private / 1024:.1f} GB private"
        )
    made = results["made by"]
    lines += [
        "",
        f"Training on the whole, of a backbone of this size: {', '.join(wholes)}. That memory is the slope's or, if that is more, "
        f"arithmetic: the larger run's and, for each item more, {CODES} bytes of codes and {TRIE} of trie. {results['note']} Made "
        f"by `{made['command']}` on {made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)

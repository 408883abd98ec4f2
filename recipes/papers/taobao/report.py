"""Make the tables of what `recipes.papers.taobao.scaling` measured."""

# Bytes per item: four int32 codes, and a bound on the trie.
CODES = 16
TRIE = 16


def table(results: dict) -> str:
    """Make the tables in Markdown: stages at full size, then trainings at the sizes that were run."""
    lines = [*stage_lines(results), *training_lines(results)]
    made = results["made by"]
    lines += [
        "",
        f"Training at full size, with a backbone of this size: {', '.join(full_trainings(results))}. This memory is "
        "the larger of two estimates, a slope and arithmetic. The slope is that between the two runs. The arithmetic "
        f"adds {CODES} bytes of codes and {TRIE} of the trie per item to the larger run. {results['note']} Made by "
        f"`{made['command']}` on {made['machine']}, {made['versions']}, {made['date']}.",
    ]
    return "\n".join(lines)


def stage_lines(results: dict) -> list[str]:
    """Make the table of the stages of recipes.papers.taobao.prepare, extrapolated to full size."""
    full = results["full"]
    small, large = results["runs"]
    model = results["model at full size"]
    counts = [f"{run['items']['items']:,} items and {run['users']['users']:,} users" for run in (small, large)]
    lines = [
        f"| stage | core seconds, {counts[1]} | core hours, the whole | private memory, GB | with mapped files | "
        "disk, GB |",
        "| --- " * 6 + "|",
    ]
    for stage, costs in results["extrapolated"].items():
        sizes = (f"{costs[key] / 1024:.1f}" for key in ("private_mb", "peak_mb", "disk_mb"))
        hours = costs["cpu_seconds"] / 3600
        lines.append(f"| {stage} | {large[stage]['cpu_seconds']:.1f} | {hours:.2f} | {' | '.join(sizes)} |")
    lines += [
        "",
        f"The whole: {full['items']:,} items, {full['users']:,} users, {full['samples']:,} samples, by the slopes "
        f"between {counts[0]} and {counts[1]}. There, the codebooks were fitted on {large['codebooks']['points']:,} "
        f"items in {large['codebooks']['num_iterations']} iterations; in the whole, by the defaults, on 1,048,576 in "
        f"20. A model of all items with its trie took {model['private_mb'] / 1024:.1f} GB of private memory and "
        f"{model['cpu_seconds']:.0f} core seconds to build.",
    ]
    return lines


def training_lines(results: dict) -> list[str]:
    """Make the table of the trainings."""
    lines = [
        "",
        f"| training, {results['training'][0]['rows_a_step']} rows a step | core seconds a row | private memory, GB | "
        "with mapped files | generation loss | ranking loss |",
        "| --- " * 6 + "|",
    ]
    for training in results["training"]:
        sizes = (f"{training['memory'][f'training_{name}_mb'] / 1024:.2f}" for name in ("private", "peak"))
        first, last = (list(training["losses"].values())[place] for place in (0, -1))
        losses = (f"{before:.3f} to {after:.3f}" for before, after in zip(first, last, strict=True))
        seconds = training["cpu_seconds"]["training"] / training["rows"]
        lines.append(f"| {training['what']} | {seconds:.4f} | {' | '.join(sizes)} | {' | '.join(losses)} |")
    return lines


def full_trainings(results: dict) -> list[str]:
    """Describe the time and the memory of each stage's training at full size."""
    large = results["runs"][1]
    # Between small runs, buffers hide the growth: the slope may be 0.
    additional_mb = (results["full"]["items"] - large["items"]["items"]) * (CODES + TRIE) / 2**20
    sentences = []
    larger_runs = results["training"][1::2]
    for (stage, costs), run in zip(results["training at full size"].items(), larger_runs, strict=True):
        private = max(costs["private_mb"], run["memory"]["training_private_mb"] + additional_mb)
        sentences.append(
            f"{stage} {costs['epoch_core_hours']:,.0f} core hours for one epoch of {costs['rows']:,} clicks and "
            f"{private / 1024:.1f} GB private"
        )
    return sentences

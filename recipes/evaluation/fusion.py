"""Choose the weights of the fused score on validation: a search that starts from the strongest score alone.

Then choose the bonus of new items. Validation has few of them, and the NDCG@10 hardly sees them.
"""

from collections.abc import Callable, Mapping, Sequence

WEIGHTS = ("generation_weight", "ranking_weight", "dense_weight", "transition_weight")
# Factors of a weight that a step of the search tries, and weights that it tries for a score that is left out.
FACTORS = (0.5, 0.7, 1.4, 2.0)
FIRST_VALUES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
# A step has to gain this share of the NDCG@10: smaller gains are chance.
LEAST_GAIN = 1e-3
# Bonuses of new items, in the unit of the greatest weight, and the share of the NDCG@10 that a bonus may cost.
BONUSES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
BONUS_COST = 0.01


def choose_weights(
    measure: Callable[[dict[str, float]], dict[str, float]], choices: Mapping[str, Sequence[float] | None]
) -> list[dict[str, float]]:
    """
    Search for the weights of the best NDCG@10, one weight after the other, until no step gains.

    The search starts from the best of the scores alone, so that the chosen list is never behind any of them.

    Args:
        measure: Function of the weights in `WEIGHTS`: metrics, among them `ndcg@10`.
        choices: For each of `WEIGHTS` the values to choose from. None: any value of 0 or more.

    Returns:
        The weights that were tried, with their metrics; the best is last.

    Raises:
        ValueError: if all values are 0.
    """
    tried: dict[tuple[float, ...], dict[str, float]] = {}

    def trial(weights: dict[str, float]) -> dict[str, float]:
        key = tuple(weights.values())
        if key not in tried:
            tried[key] = weights | measure(weights)
        return tried[key]

    starts = [trial(weights) for weights in single_scores(choices)]
    best = max(starts, key=lambda row: row["ndcg@10"])
    has_gained = True
    while has_gained:
        has_gained = False
        for name in WEIGHTS:
            weights = {weight: best[weight] for weight in WEIGHTS}
            rows = [trial(weights | {name: value}) for value in next_values(choices[name], best[name])]
            rows = [row for row in rows if any(row[weight] for weight in WEIGHTS)]
            better = max(rows, key=lambda row: row["ndcg@10"], default=best)
            if better["ndcg@10"] > best["ndcg@10"] * (1 + LEAST_GAIN):
                best = better
                has_gained = True
    return [row for row in tried.values() if row is not best] + [best]


def single_scores(choices: Mapping[str, Sequence[float] | None]) -> list[dict[str, float]]:
    """
    List the weights that leave one score alone, as far as the values to choose from allow it.

    Raises:
        ValueError: if all values are 0.
    """
    least = {name: min(values) if values else 0.0 for name, values in choices.items()}
    singles = []
    for name in WEIGHTS:
        values = choices[name]
        value = 1.0 if values is None else min(values, key=lambda weight: abs(weight - 1))
        weights = {weight: value if weight == name else least[weight] for weight in WEIGHTS}
        if any(weights.values()) and weights not in singles:
            singles.append(weights)
    if not singles:
        raise ValueError("A weight of the fused score must be above 0, got 0 for all of them. Add a value above 0.")
    return singles


def next_values(values: Sequence[float] | None, current: float) -> Sequence[float]:
    """List the values of a weight that a step tries."""
    if values is not None:
        return values
    return [0.0, *(current * factor for factor in FACTORS)] if current else FIRST_VALUES


def choose_bonus(
    measure: Callable[[dict[str, float]], dict[str, float]], best: dict[str, float]
) -> list[dict[str, float]]:
    """
    Choose the `new_item_bonus` that finds most new items, among those that cost at most `BONUS_COST` of the NDCG@10.

    Args:
        measure: As in `choose_weights`, for weights and `new_item_bonus`. Its metrics have `new items`, the recall of
            the new items among the targets.
        best: The best row of `choose_weights`.

    Returns:
        The rows of the bonuses that were tried; the chosen one is last.
    """
    weights = {name: best[name] for name in WEIGHTS}
    unit = max(weights.values())
    rows = [best | {"new_item_bonus": 0.0}]
    for bonus in BONUSES:
        row = weights | {"new_item_bonus": bonus * unit}
        row = row | measure(row)
        if row["ndcg@10"] < best["ndcg@10"] * (1 - BONUS_COST):
            break
        rows.append(row)
    chosen = max(rows, key=lambda row: row["new items"])
    return [row for row in rows if row is not chosen] + [chosen]

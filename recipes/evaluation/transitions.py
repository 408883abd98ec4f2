"""Choose the settings of the transition score on validation, and rank items by it: the floor of every list."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_unigrf.transitions_unigrf import MAX_SCORED_ITEMS, TransitionSettings, UniGRFTransitions
from recipes.evaluation.metrics.next_item.next_item import mean_values, target_ranks

# Values that validation chooses from, one setting after the other, twice.
GRID: dict[str, tuple[float, ...]] = {
    "history_decay": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "transition_smoothing": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0),
    "popularity_weight": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "content_weight": (0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0),
}
# Users of validation that choose: fewer choose by chance.
MAX_USERS = 4000


def padded_last_items(histories: Sequence[Sequence[int]]) -> torch.LongTensor:
    """Arrange the last items of histories, last item first, `[B, MAX_SCORED_ITEMS]`; -1: none."""
    last = torch.full((len(histories), MAX_SCORED_ITEMS), -1)
    for row, history in enumerate(histories):
        recent = torch.as_tensor(np.asarray(history[-MAX_SCORED_ITEMS:], np.int64)).flip(0)
        last[row, : len(recent)] = recent
    return last


def score_by_transitions(
    transitions: UniGRFTransitions,
    histories: Sequence[Sequence[int]],
    embeddings: torch.Tensor | None,
    settings: TransitionSettings,
) -> np.ndarray:
    """Compute the transition scores of all items for histories, float32 `[B, num_items]`."""
    device = transitions.counts.device
    scores = transitions.scores(padded_last_items(histories).to(device), embeddings, settings)
    return scores.float().cpu().numpy()


def choose_transition_settings(
    top_items: Callable[[Sequence[Sequence[int]], TransitionSettings], np.ndarray],
    histories: Sequence[Sequence[int]],
    targets: Sequence[int],
    has_content: bool,
) -> TransitionSettings:
    """
    Choose settings by the NDCG@10 of validation users, at most `MAX_USERS` of them.

    Args:
        top_items: Function of histories and settings: ten items or more for each history.
        histories: Histories of the validation users.
        targets: The item that each of them took next.
        has_content: Whether items have content embeddings.
    """
    chosen = np.random.default_rng(0).permutation(len(targets))[:MAX_USERS]
    histories = [histories[row] for row in chosen]
    targets = [targets[row] for row in chosen]

    def ndcg(settings: TransitionSettings) -> float:
        return mean_values(target_ranks(top_items(histories, settings).tolist(), targets))["ndcg@10"]

    names = [name for name in GRID if has_content or name != "content_weight"]
    best = TransitionSettings(content_weight=15.0 if has_content else 0.0)
    best_ndcg = ndcg(best)
    for name in tqdm(names * 2, desc="transition settings", unit="setting"):
        for value in GRID[name]:
            settings = replace(best, **{name: value})
            if settings != best and (value_ndcg := ndcg(settings)) > best_ndcg:
                best_ndcg = value_ndcg
                best = settings
    return best


def warn_of_edges(settings: TransitionSettings) -> None:
    """Print a hint for each setting at the edge of its grid, where zero is no edge."""
    for name, value in asdict(settings).items():
        if value == max(GRID[name]) or (value == min(GRID[name]) and value):
            print(f"validation chose {name}={value:g}, the edge of the values tried: one beyond it may be better")

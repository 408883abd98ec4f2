"""Correct the negatives of retrieval by what ranking knows: UniGRF's enhancer, as a callback of the stock `Trainer`.

    enhancer = RankingDrivenEnhancer(model, tokenizer, items, behaviors)
    Trainer(..., data_collator=enhancer.collator(TrainingCollator()), callbacks=[enhancer])

Rows of the training set hold one history each, with the column `user` (row in `items`). With `relabel` they need
`last`, too: whether the row's end is the end of the user's history. For a model that reads times, pass `timestamps` to
the rows and to the enhancer.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes.data.encoding import HistoryEncoder, pad_rows, with_item_set
from recipes.training.stateful_callback import StatefulCallback
from tokenization import SemanticIdTokenizer

# Logged statistics of a refresh, as means over the users.
STATISTICS = ("enhancer_negatives", "enhancer_favorites", "enhancer_pool_probability", "enhancer_short_pools")


@dataclass
class EnhancerOptions:
    """
    Options of the ranking-driven enhancer.

    Args:
        pool (`str`): Source of a user's pool. `"uniform"`, the default, for atomic ids: the hard negatives of the
            refresh before, and fresh uniform items. `"beam"`: the best items of the generation.
        pool_size (`int`): Items of a pool, 64 by default.
        num_negatives (`int`): Hard negatives of a user, 8 by default.
        penalty (`float`): Weight of the ranking probability p in `rho`, 1 by default. 0: retrieval alone decides.
        threshold (`float`): Probability p above which an item is an excluded positive, 0.9 by
            default.
        max_favorites (`int`): Most excluded positives of a user, 2 by default. 0: none.
        relabel (`bool`): Whether a user's best excluded positive becomes the next item after the user's last
            training row.
        target (`str`): Ranking target whose probability is p, `"like"` by default.
        warm_up_epochs (`int`): Epochs without the enhancer, 2 by default.
        every_epochs (`int`): Epochs between two refreshes, 1 by default.
        max_items (`int`): Last items of a history that the model reads, 200 by default.
        batch_size (`int`): Users that are scored together, 128 by default.
        seed (`int`): Seed of uniform pools, 0 by default.

    Raises:
        ValueError: for an option out of its range.
    """

    pool: str = "uniform"
    pool_size: int = 64
    num_negatives: int = 8
    penalty: float = 1.0
    threshold: float = 0.9
    max_favorites: int = 2
    relabel: bool = False
    target: str = "like"
    warm_up_epochs: int = 2
    every_epochs: int = 1
    max_items: int = 200
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self):
        ranges = {
            "num_negatives": (1 <= self.num_negatives <= self.pool_size, f"from 1 to pool_size={self.pool_size}"),
            "threshold": (0 <= self.threshold <= 1, "from 0 to 1"),
            "warm_up_epochs": (self.warm_up_epochs >= 0, "0 or more"),
            "every_epochs": (self.every_epochs >= 1, "1 or more"),
        }
        for name, (is_valid, expected) in ranges.items():
            if not is_valid:
                raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)}. Choose another value.")

    def check_model(self, config: UniGRFConfig) -> None:
        """Raise `ValueError` if the options do not fit a model."""
        if self.pool not in ("uniform", "beam") or (self.pool == "uniform" and config.num_levels > 1):
            raise ValueError(
                f"`pool` must be 'beam', or 'uniform' for atomic ids, got {self.pool!r} for ids of "
                f"{config.num_levels} codes. Set it to 'beam'."
            )
        limit = config.max_history_items
        if self.relabel and limit is not None and self.max_items >= limit:
            raise ValueError(
                f"`max_items` must be below {limit} to relabel, which adds an item to a history, got "
                f"{self.max_items}. Take fewer items."
            )
        if self.target not in config.ranking_targets:
            raise ValueError(
                f"`target` must be among {config.ranking_targets}, got {self.target!r}. Choose a target of the model."
            )


# Options that the recipes take as JSON; the others have flags.
OPEN_OPTIONS = {option.name for option in fields(EnhancerOptions)} - {
    "relabel",
    "target",
    "max_items",
    "batch_size",
    "seed",
}


class Pool(NamedTuple):
    """
    Scored items of b users, all `[b, pool_size]`.

    Args:
        items: Item indices.
        retrieval: log P of generation.
        ranking: Probability of the ranking target.
        usable: Whether a place holds an item that is new to the user and no repeat.
    """

    items: torch.LongTensor
    retrieval: torch.FloatTensor
    ranking: torch.FloatTensor
    usable: torch.BoolTensor


class Choice(NamedTuple):
    """
    Hard negatives and excluded positives of b users.

    Args:
        negatives: Item indices `[b, num_negatives]`; -1: none.
        excluded_positives: Item indices `[b, max_favorites]`; -1: none.
        sums: Sums over the users of the `STATISTICS`.
    """

    negatives: torch.LongTensor
    excluded_positives: torch.LongTensor
    sums: torch.FloatTensor


@dataclass
class PoolCollator:
    """
    Add the enhancer's items to the batches of another collator.

    This is a class because data loaders of some platforms pickle their collator.

    Args:
        collate: The other collator.
        tokenizer: Encodes an excluded positive that relabels a row.
        tensors: Tensors of the enhancer.
        relabel: Whether a user's best excluded positive follows the user's last row.
    """

    collate: Callable
    tokenizer: SemanticIdTokenizer
    tensors: dict[str, torch.Tensor]
    relabel: bool

    def __call__(self, rows: list[dict]) -> dict:
        """Collate rows; rows without `user`, those of an evaluation, get no items."""
        if "user" not in rows[0]:
            return self.collate(rows)
        users = torch.tensor([row["user"] for row in rows])
        negatives = self.tensors["negatives"][users]
        excluded_positives = self.tensors["favorites"][users]
        next_items = excluded_positives[:, 0] if self.relabel else torch.full_like(users, -1)
        batch = self.collate(
            [self._with_next_item(row, item) for row, item in zip(rows, next_items.tolist(), strict=True)]
        )
        if self.tensors["made_at"] >= 0:
            batch = with_item_set(batch, "hard_negatives", negatives)
            batch = with_item_set(batch, "excluded_positives", excluded_positives)
        return batch

    def _with_next_item(self, row: dict, item: int) -> dict:
        """Append an item (-1: none), at an unknown time, to a row that ends where the user's history does."""
        tokens = []
        if item >= 0 and row["last"]:
            tokens = self.tokenizer.item_tokens(np.array([item]))[0].tolist()
        suffix = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens}
        if "timestamps" in row:
            suffix["timestamps"] = [-1] * len(tokens)
        return {name: [*row[name], *values] for name, values in suffix.items()}


class RankingDrivenEnhancer(StatefulCallback):
    """
    Find hard negatives and excluded positives of every user by retrieval and ranking, before an epoch.

    The model scores a pool of items for each user, at the user's last training item, without gradient. This is our
    reading of UniGRF's section on the ranking-driven enhancer:

    - Hard negatives ("hard-to-detect disliked items") are the `num_negatives` items with the highest
      `rho = minmax(log P) - penalty * p`. Here p is the ranking probability. The model gets them as `hard_negatives`.
    - Excluded positives ("potential favorites") are the `max_favorites` items with the highest `p > threshold`. They
      are no hard negatives, and the model gets them as `excluded_positives`, so they are no random negatives. With
      `relabel`, the first also becomes the next item after a user's last training row.

    The Trainer's checkpoints save the items, which are the same on all processes. The log holds the numbers of
    negatives and excluded positives, and the share of users with fewer usable items than `num_negatives`, who get
    fewer. Examples with titles are written to `enhancer.jsonl` in the output folder.

    Args:
        model (`UniGRFForCausalLM`): The model that is trained.
        tokenizer (`SemanticIdTokenizer`): Tokenizer of the items.
        items (`Sequence` of U integer arrays): Training history of each user, as catalog rows. The last item is the
            target. No item of the history is in the pool.
        behaviors (`Sequence` of U integer arrays): Indices into `tokenizer.behaviors`, one per item.
        timestamps (`Sequence` of U integer arrays, *optional*): Seconds, one per item, for a model that reads times.
            Pools are scored for the time of the target. None: the model reads no times.
        options (`EnhancerOptions`, *optional*): None: the defaults.

    Raises:
        ValueError: for options that do not fit the model, and a training that ends with the warm-up. In training: for
            pools with fewer usable items than `num_negatives` for every user.
    """

    def __init__(
        self,
        model: UniGRFForCausalLM,
        tokenizer: SemanticIdTokenizer,
        items: Sequence[np.ndarray],
        behaviors: Sequence[np.ndarray],
        timestamps: Sequence[np.ndarray] | None = None,
        options: EnhancerOptions | None = None,
    ):
        self.options = EnhancerOptions() if options is None else options
        self.options.check_model(model.config)
        self.model = model
        self.tokenizer = tokenizer
        self.items = items
        self.behaviors = behaviors
        self.timestamps = timestamps
        self.negatives = torch.full((len(items), self.options.num_negatives), -1)
        self.excluded_positives = torch.full((len(items), max(1, self.options.max_favorites)), -1)
        self.statistics: dict[str, float] = {}
        # "favorites" is the name in saved checkpoints.
        tensors = {"negatives": self.negatives, "favorites": self.excluded_positives}
        super().__init__("enhancer.safetensors", tensors)

    @property
    def favorites(self) -> torch.LongTensor:
        """The name of `excluded_positives` until version 0.3."""
        warnings.warn("`favorites` is called `excluded_positives` since version 0.2.", FutureWarning, stacklevel=2)
        return self.excluded_positives

    def collator(self, collate: Callable) -> Callable:
        """Wrap a collator, so that rows with a `user` get the user's items."""
        return PoolCollator(collate, self.tokenizer, self.tensors, self.options.relabel)

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the items, and check that the training is longer than the warm-up."""
        super().on_train_begin(args, state, control, **kwargs)
        if state.num_train_epochs <= self.options.warm_up_epochs:
            raise ValueError(
                f"`num_train_epochs` must be more than the {self.options.warm_up_epochs} of the enhancer's warm-up, "
                f"got {state.num_train_epochs}. Train for more epochs (each of fewer crops), or lower warm_up_epochs."
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Refresh the items if they are due."""
        epoch = int(state.epoch or 0)
        epochs_after_warm_up = epoch - self.options.warm_up_epochs
        is_due = epochs_after_warm_up >= 0 and epochs_after_warm_up % self.options.every_epochs == 0
        if not is_due or self.made_at == epoch:
            return
        was_training = self.model.training
        self.model.eval()
        self._refresh(args, epoch)
        self.model.train(was_training)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log the statistics of the last refresh."""
        if "loss" in logs and self.statistics:
            logs.update(self.statistics)
            state.log_history[-1].update(self.statistics)

    @torch.no_grad()
    def _refresh(self, args, epoch: int) -> None:
        """Choose every user's items; each process scores its part of the users."""
        # Items of this process's users.
        lengths = np.array([len(items) for items in self.items])
        choices = []
        for users in self.process_batches(lengths, self.options.batch_size, args, "enhancer"):
            generator = torch.Generator().manual_seed(hash((self.options.seed, epoch, int(users[0]))) % 2**63)
            choices.append((users, self._choose(users, self._score(users, generator))))

        # Items of all users.
        sums = torch.zeros(len(STATISTICS))
        for process_choices in gather_object([choices]):
            for users, choice in process_choices:
                self.negatives[users] = choice.negatives
                self.excluded_positives[users] = choice.excluded_positives
                sums += choice.sums
        self.made_at = epoch
        self.statistics = dict(zip(STATISTICS, (sums / len(self.items)).tolist(), strict=True))
        if self.statistics["enhancer_short_pools"] == 1:
            raise ValueError(
                f"`pool_size` must give pools of at least {self.options.num_negatives} items beside a user's "
                f"history, got fewer for every user with {self.options.pool_size}. Raise it, or lower num_negatives."
            )
        if args.process_index == 0:
            self._write_examples(Path(args.output_dir) / "enhancer.jsonl", epoch, *choices[len(choices) // 2])

    def _score(self, users: np.ndarray, generator: torch.Generator) -> Pool:
        """Score a pool of items for each of b users."""
        columns = [column for column in (self.items, self.behaviors, self.timestamps) if column is not None]
        histories = [[column[user][:-1] for user in users] for column in columns]
        query_time = None if self.timestamps is None else [self.timestamps[user][-1] for user in users]
        encoder = HistoryEncoder(self.tokenizer, self.options.max_items)
        batch = encoder(*histories, query_time=query_time, device=self.model.device)
        user_items = [torch.as_tensor(np.asarray(self.items[user], dtype=np.int64)) for user in users]
        if self.options.pool == "beam":
            return self._beam_pool(batch, user_items)
        return self._uniform_pool(batch, user_items, users, generator)

    def _beam_pool(self, batch: dict, user_items: list[torch.Tensor]) -> Pool:
        best = self.model.recommend(
            **batch,
            num_beams=self.options.pool_size,
            num_return_sequences=self.options.pool_size,
            ranking_weight=0.0,
            ranking_target=self.options.target,
            dense_weight=0.0,
            num_dense_candidates=0,
            rerank_top_k=0,
            blocked_items=user_items,
        )
        usable = best.item_indices >= 0
        return Pool(best.item_indices.clamp(min=0), best.generation_scores, best.ranking_scores.exp(), usable)

    def _uniform_pool(
        self, batch: dict, user_items: list[torch.Tensor], users: np.ndarray, generator: torch.Generator
    ) -> Pool:
        # Items: the last hard negatives, and fresh ones.
        model = self.model
        earlier = self.negatives[users, : 0 if self.made_at < 0 else None]
        fresh_shape = (len(users), self.options.pool_size - earlier.shape[1])
        items = torch.cat([earlier, torch.randint(model.catalog.num_items, fresh_shape, generator=generator)], dim=1)

        # Usable items: no repeats, and none of the user's.
        blocked = pad_rows(user_items)
        ordered, order = items.sort(dim=1, stable=True)
        is_repeat = torch.zeros_like(items, dtype=torch.bool)
        is_repeat.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        usable = (items >= 0) & ~is_repeat & ~(items[:, :, None] == blocked[:, None]).any(dim=2)
        items = items.clamp(min=0).to(model.device)

        # Scores on one cache.
        cache = DynamicCache()
        states = model.prefill(**batch, cache=cache)
        log_probs = model.scorer.code_log_probs(states, 0)
        retrieval = log_probs.gather(1, model.catalog.item_codes[items, 0].long())
        logits = model.rank(**batch, candidates=items, cache=cache, history_states=states)
        target = model.config.ranking_targets.index(self.options.target)
        return Pool(items, retrieval, logits[..., target].sigmoid(), usable.to(model.device))

    def _choose(self, users: np.ndarray, pool: Pool) -> Choice:
        """Choose the hard negatives and excluded positives of each of b users."""
        items, retrieval, ranking, usable = pool
        if not (ranking.isfinite() & retrieval.isfinite())[usable].all():
            raise ValueError(
                "The scores of the enhancer's pool must be finite, got NaN or infinity for some of users "
                f"{users[:3].tolist()} and others. The training diverged: lower the learning rate, or clip gradients "
                "(max_grad_norm)."
            )
        # Hard negatives
        is_positive = usable & (ranking > self.options.threshold)
        lowest = retrieval.masked_fill(~usable, torch.inf).amin(dim=1, keepdim=True)
        span = retrieval.masked_fill(~usable, -torch.inf).amax(dim=1, keepdim=True) - lowest
        rho = (retrieval - lowest) / span.clamp(min=1e-9) - self.options.penalty * ranking
        rho = rho.masked_fill(~usable | is_positive, -torch.inf)
        best, places = rho.topk(self.options.num_negatives, dim=1)
        negatives = items.gather(1, places).masked_fill(best == -torch.inf, -1)

        # Excluded positives
        best, places = ranking.masked_fill(~is_positive, -torch.inf).topk(self.excluded_positives.shape[1], dim=1)
        is_missing = (best == -torch.inf) | (self.options.max_favorites == 0)
        excluded_positives = items.gather(1, places).masked_fill(is_missing, -1)

        # Statistics
        num_usable = usable.sum(dim=1)
        mean_probability = ranking.masked_fill(~usable, 0.0).sum(dim=1) / num_usable.clamp(min=1)
        is_short = num_usable < self.options.num_negatives
        sums = torch.stack(
            [(negatives >= 0).sum(), (excluded_positives >= 0).sum(), mean_probability.sum(), is_short.sum()]
        )
        return Choice(negatives.cpu(), excluded_positives.cpu(), sums.float().cpu())

    def _write_examples(self, file: Path, epoch: int, users: np.ndarray, choice: Choice) -> None:
        """Append a line with the statistics and the items of three users, by title."""
        names = self.tokenizer.titles or self.tokenizer.item_ids
        examples = []
        for row, user in enumerate(users[:3].tolist()):
            lists = {
                "last items": self.items[user][-4:-1],
                "disliked": choice.negatives[row],
                "favorites": choice.excluded_positives[row],
            }
            titles = {name: [names[item] for item in items if item >= 0] for name, items in lists.items()}
            examples.append({"user": user, **titles})
        with file.open("a") as lines:
            lines.write(json.dumps({"epoch": epoch, **self.statistics, "examples": examples}) + "\n")

"""UniGRF's ranking-driven enhancer, as a callback of the stock `Trainer`: what ranking knows corrects retrieval's negatives.

    enhancer = RankingDrivenEnhancer(model, tokenizer, items, behaviors)
    Trainer(..., data_collator=enhancer.collator(DataCollatorForSeq2Seq(tokenizer)), callbacks=[enhancer])

Rows of the training set hold one history each, and need the columns `user` (their number in `items`) and, to relabel, `last`
(whether the history's end is the user's); of a model that reads times they have `timestamps`, and the enhancer takes them too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.cache_utils import DynamicCache

from modeling_unigrf import UniGRFConfig
from recipes.data.encoding import HistoryEncoder, pad_rows, with_item_set
from recipes.training.stateful_callback import StatefulCallback
from tokenization import SemanticIdTokenizer

# What is told of a refreshment, as means over the users.
FOUND = ("enhancer_negatives", "enhancer_favorites", "enhancer_pool_probability", "enhancer_short_pools")


@dataclass
class EnhancerOptions:
    """
    Options of the ranking-driven enhancer.

    Args:
        pool (`str`): Where the items of a user's pool come from. `"uniform"`: the hard negatives of the time before and fresh
            uniform items (for atomic ids). `"beam"`: the best items of the generation.
        pool_size (`int`): Items of a pool.
        num_negatives (`int`): Hard negatives a user.
        penalty (`float`): Weight of the ranking probability p in `rho`.
        threshold (`float`): Items with a p above it are potential favorites.
        max_favorites (`int`): Favorites a user, at most.
        relabel (`bool`): Whether a user's best favorite becomes the next item after the user's last training row.
        target (`str`): The ranking target whose probability is p.
        warm_up_epochs (`int`): Epochs without enhancer.
        every_epochs (`int`): Epochs between two refreshments.
        max_items (`int`): Last items of a history that the model reads.
        batch_size (`int`): Users that are scored together.
        seed (`int`): Seed of uniform pools.

    Raises:
        ValueError: if an option is out of its range.
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
        is_pool = 1 <= self.num_negatives <= self.pool_size and 0 <= self.threshold <= 1
        if not is_pool or self.warm_up_epochs < 0 or self.every_epochs < 1:
            raise ValueError(
                "Expected 1 <= num_negatives <= pool_size, a threshold in [0, 1], warm_up_epochs >= 0 and every_epochs >= "
                f"1, found {self.num_negatives}, {self.pool_size}, {self.threshold}, {self.warm_up_epochs} and "
                f"{self.every_epochs}."
            )

    def check_model(self, config: UniGRFConfig) -> None:
        """Raise `ValueError` if the options do not fit a model."""
        if self.pool not in ("uniform", "beam") or (self.pool == "uniform" and config.num_levels > 1):
            raise ValueError(
                f"Expected the pool 'beam', or 'uniform' for atomic ids, found {self.pool!r} for {config.num_levels} codes."
            )
        fits = config.max_history_items
        if self.relabel and fits is not None and self.max_items >= fits:
            raise ValueError(
                f"Expected max_items below {fits} to relabel, which makes a history one item longer, found "
                f"{self.max_items}. Take fewer."
            )
        if self.target not in config.ranking_targets:
            raise ValueError(f"Expected a target among {config.ranking_targets}, found {self.target!r}.")


# Options that the recipes take as JSON; the others have an argument of their own.
OPEN_OPTIONS = {option.name for option in fields(EnhancerOptions)} - {
    "relabel",
    "target",
    "max_items",
    "batch_size",
    "seed",
}


@dataclass
class PoolCollator:
    """What `RankingDrivenEnhancer.collator` returns; a class, so that any kind of worker of a data loader can be handed it."""

    collate: Callable
    tokenizer: SemanticIdTokenizer
    tensors: dict[str, torch.Tensor]  # the enhancer's own
    relabel: bool

    def __call__(self, rows: list[dict]) -> dict:
        if "user" not in rows[0]:
            return self.collate(rows)
        users = torch.tensor([row["user"] for row in rows])
        negatives, favorites = self.tensors["negatives"][users], self.tensors["favorites"][users]
        positives = favorites[:, 0] if self.relabel else torch.full_like(users, -1)
        batch = self.collate([self._with(*pair) for pair in zip(rows, positives.tolist(), strict=True)])
        if self.tensors["made_at"] >= 0:
            batch = with_item_set(batch, "hard_negatives", negatives)
            batch = with_item_set(batch, "excluded_positives", favorites)
        return batch

    def _with(self, row: dict, favorite: int) -> dict:
        """
        A row and, if its history ends with the user's, the codes of a favorite as what comes next (-1: none); when it comes
        is not known.
        """
        tokens = []
        if favorite >= 0 and row["last"]:
            tokens = self.tokenizer.item_tokens(np.array([favorite]))[0].tolist()
        more = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens}
        if "timestamps" in row:
            more["timestamps"] = [-1] * len(tokens)
        return {name: [*row[name], *values] for name, values in more.items()}


class RankingDrivenEnhancer(StatefulCallback):
    """
    Before an epoch, for each user at the last training position, without gradient: a pool of items is scored by retrieval
    and by ranking (our reading of UniGRF, section on the ranking-driven enhancer).

    - Hard-to-detect disliked items: the `num_negatives` with the highest `rho = minmax(log P) - penalty * p`, where p is the
      ranking probability. They go to the model as `hard_negatives`.
    - Potential favorites: at most `max_favorites` with `p > threshold`, the highest first. They are no hard negatives, go to
      the model as `excluded_positives` (no random negatives either) and, with `relabel`, the first of them also becomes the next
      item after a user's last training row.

    The pools are saved with the Trainer's checkpoints, and are the same on all processes. How many were found goes to the
    log, with the share of users for whom the pool held fewer items than `num_negatives`, who get those that there are; examples
    with titles go to `enhancer.jsonl` in the output folder.

    Args:
        model (`UniGRFForCausalLM`), tokenizer (`SemanticIdTokenizer`)
        items, behaviors (`Sequence` of U integer arrays): Training history of each user: catalog rows, and indices into
            `tokenizer.behaviors`; the last item is the target, which is never in the pool, nor is anything before it.
        timestamps (the same, *optional*): When each item was, for a model that reads times; pools are asked for when the
            target was.
        options (`EnhancerOptions`, *optional*): See there.

    Raises:
        ValueError: on options that do not fit the model, pools that are all smaller than `num_negatives`, and a training that
            ends with the warm-up.
    """

    def __init__(
        self,
        model,
        tokenizer,
        items: Sequence[np.ndarray],
        behaviors: Sequence[np.ndarray],
        timestamps: Sequence[np.ndarray] | None = None,
        options: EnhancerOptions | None = None,
    ):
        self.options = EnhancerOptions() if options is None else options
        self.options.check_model(model.config)
        self.model, self.tokenizer = model, tokenizer
        self.items, self.behaviors, self.timestamps = items, behaviors, timestamps
        self.negatives = torch.full((len(items), self.options.num_negatives), -1)
        self.favorites = torch.full((len(items), max(1, self.options.max_favorites)), -1)
        self.found: dict[str, float] = {}
        super().__init__("enhancer.safetensors", {"negatives": self.negatives, "favorites": self.favorites})

    def collator(self, collate: Callable) -> Callable:
        """Wraps a data collator: rows with a `user` also get the user's items; others (of an evaluation) pass as they are."""
        return PoolCollator(collate, self.tokenizer, self.tensors, self.options.relabel)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.num_train_epochs <= self.options.warm_up_epochs:
            raise ValueError(
                f"Expected more epochs than the {self.options.warm_up_epochs} of the enhancer's warm-up, found {state.num_train_epochs}: it "
                "would do nothing. Train for more epochs (each of fewer crops), or lower warm_up_epochs."
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        due = epoch - self.options.warm_up_epochs
        if due < 0 or due % self.options.every_epochs or self.made_at == epoch:
            return
        was_training = self.model.training
        self.model.eval()
        self._refresh(args, epoch)
        self.model.train(was_training)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.found:
            logs.update(self.found)
            state.log_history[-1].update(self.found)

    @torch.no_grad()
    def _refresh(self, args, epoch: int) -> None:
        """Scores every user's pool, each process its part of the users."""
        lengths, parts = np.array([len(items) for items in self.items]), []
        for batch in self.my_batches(lengths, self.options.batch_size, args, "enhancer"):
            generator = torch.Generator().manual_seed(hash((self.options.seed, epoch, int(batch[0]))) % 2**63)
            pool, retrieval, ranking, usable = self._score(batch, generator)
            parts.append((batch, *self._choose(batch, pool, retrieval, ranking, usable)))
        numbers = torch.zeros(len(FOUND))
        for of_process in gather_object([parts]):
            for batch, negatives, favorites, seen in of_process:
                self.negatives[batch], self.favorites[batch] = negatives, favorites
                numbers += seen
        self.made_at = epoch
        self.found = dict(zip(FOUND, (numbers / len(self.items)).tolist(), strict=True))
        if self.found["enhancer_short_pools"] == 1:
            raise ValueError(
                f"Expected pools of at least {self.options.num_negatives} items beside a user's own, found fewer for every user. Lower "
                f"num_negatives, or raise pool_size (now {self.options.pool_size})."
            )
        if args.process_index == 0:
            middle = parts[len(parts) // 2]
            examples = [self._example(int(user), row, middle) for row, user in enumerate(middle[0][:3])]
            with (Path(args.output_dir) / "enhancer.jsonl").open("a") as file:
                file.write(json.dumps({"epoch": epoch, **self.found, "examples": examples}) + "\n")

    def _score(self, users: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Pool `[b, K]` (item indices), its log P and ranking probability, and which of it may be used, all `[b, K]`."""
        model, device = self.model, self.model.device
        columns = [column for column in (self.items, self.behaviors, self.timestamps) if column is not None]
        histories = [[column[user][:-1] for user in users] for column in columns]
        requests = None if self.timestamps is None else [self.timestamps[user][-1] for user in users]
        batch = HistoryEncoder(self.tokenizer, self.options.max_items)(*histories, query_time=requests, device=device)
        own = [torch.as_tensor(np.asarray(self.items[user], dtype=np.int64)) for user in users]
        if self.options.pool == "beam":
            best = model.recommend(
                **batch,
                num_beams=self.options.pool_size,
                num_return_sequences=self.options.pool_size,
                ranking_weight=0.0,
                ranking_target=self.options.target,
                dense_weight=0.0,
                num_dense_candidates=0,
                rerank_top_k=0,
                blocked_items=own,
            )
            usable = best.item_indices >= 0
            return best.item_indices.clamp(min=0), best.generation_scores, best.ranking_scores.exp(), usable
        earlier = self.negatives[users, : 0 if self.made_at < 0 else None]
        more = (len(users), self.options.pool_size - earlier.shape[1])
        pool = torch.cat([earlier, torch.randint(model.catalog.num_items, more, generator=generator)], dim=1)
        owned = pad_rows(own)
        ordered, order = pool.sort(dim=1, stable=True)
        repeated = torch.zeros_like(pool, dtype=torch.bool)
        repeated.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        usable = (pool >= 0) & ~repeated & ~(pool[:, :, None] == owned[:, None]).any(dim=2)
        pool, usable = pool.clamp(min=0).to(device), usable.to(device)
        cache = DynamicCache()
        states = model.prefill(**batch, cache=cache)
        log_probs = model.scorer.code_log_probs(states, 0)
        retrieval = log_probs.gather(1, model.catalog.item_codes[pool, 0].long())
        ranking = model.rank(**batch, candidates=pool, cache=cache, history_states=states)
        index = model.config.ranking_targets.index(self.options.target)
        return pool, retrieval, ranking[..., index].sigmoid(), usable

    def _choose(
        self,
        users: np.ndarray,
        pool: torch.Tensor,
        retrieval: torch.Tensor,
        ranking: torch.Tensor,
        usable: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hard negatives `[b, m]`, favorites `[b, f]`, and sums over the users of what `FOUND` names."""
        if not (ranking.isfinite() & retrieval.isfinite())[usable].all():
            raise ValueError(
                f"Expected finite scores of the enhancer's pool, found NaN or infinity for some of users {users[:3].tolist()} "
                "and others. The training diverged: lower the learning rate, or clip gradients (max_grad_norm)."
            )
        is_favorite = usable & (ranking > self.options.threshold)
        lowest = retrieval.masked_fill(~usable, torch.inf).amin(dim=1, keepdim=True)
        span = retrieval.masked_fill(~usable, -torch.inf).amax(dim=1, keepdim=True) - lowest
        rho = (retrieval - lowest) / span.clamp(min=1e-9) - self.options.penalty * ranking
        rho = rho.masked_fill(~usable | is_favorite, -torch.inf)
        best, places = rho.topk(self.options.num_negatives, dim=1)
        negatives = pool.gather(1, places).masked_fill(best == -torch.inf, -1)
        best, places = ranking.masked_fill(~is_favorite, -torch.inf).topk(self.favorites.shape[1], dim=1)
        favorites = pool.gather(1, places).masked_fill((best == -torch.inf) | (self.options.max_favorites == 0), -1)
        count = usable.sum(dim=1)
        mean = ranking.masked_fill(~usable, 0.0).sum(dim=1) / count.clamp(min=1)
        is_short = count < self.options.num_negatives
        seen = torch.stack([(negatives >= 0).sum(), (favorites >= 0).sum(), mean.sum(), is_short.sum()]).float()
        return negatives.cpu(), favorites.cpu(), seen.cpu()

    def _example(self, user: int, row: int, part: tuple) -> dict:
        """What was found for a user, in words."""
        names = self.tokenizer.titles or self.tokenizer.item_ids
        found = {"last items": self.items[user][-4:-1], "disliked": part[1][row], "favorites": part[2][row]}
        return {"user": user, **{name: [names[item] for item in items if item >= 0] for name, items in found.items()}}

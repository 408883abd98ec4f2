# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Recommendation: candidates of a search, ranked on the search's cache, with fused scores (RecoChain, inference)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from .beam_search_unigrf import SearchSpace, beam_search
from .candidates_unigrf import CandidateContext, read_candidates
from .configuration_unigrf import UniGRFConfig
from .inputs_unigrf import History
from .item_lists_unigrf import describe, item_lists
from .scoring_unigrf import ItemScorer, UniGRFCandidateBlock
from .shared_prefix_unigrf import cache_rollback, check_cache, check_cached_tokens, prefill
from .transitions_unigrf import TransitionSettings, last_items
from .trie_unigrf import CatalogTrie, ItemFilter, check_scores

# The scores of the fused score: each has a `_weight` in `ServingOptions` and `_scores` in `UniGRFRecommendation`.
FUSED_SCORES = ("generation", "ranking", "dense", "transition")


@dataclass
class ServingOptions:
    """
    The options of serving: fields of `generation_config`, saved in generation_config.json.

    `recommend` and the pipeline read them there. The pipeline takes each of them as an argument, too; `recommend`
    takes all but `max_items` and `max_long_items`, which cut histories before they are encoded.

    Args:
        num_beams (`int`, defaults to 10): Candidates that the beam search finds for each request.
        num_return_sequences (`int`, *optional*): Length of the list. None: ten, or fewer if fewer candidates are
            ranked.
        max_items (`int`, *optional*): Most recent items of a history that the pipeline encodes. None: all that fit.
        max_long_items (`int`, *optional*): Most recent items of a long history that the pipeline passes on. None: all.
        exclude_history (`bool`, defaults to `True`): Recommend no item of the user's history.
        ranking_target (`str`, *optional*): The ranking target that orders the list. None: the first of the config's
            `ranking_targets`.
        generation_weight (`float`, defaults to 1.0): Weight of the generation score in the fused score. 0: the beams
            propose candidates, and the other scores order them. No weight of a score may be negative.
        ranking_weight (`float`, defaults to 1.0): Weight of the ranking score in the fused score. 0: leave the
            ranking score out.
        dense_weight (`float`, defaults to 0.0): Weight of the dense-retrieval score in the fused score. 0: leave the
            dense-retrieval score out.
        num_dense_candidates (`int`, defaults to 0): Items of the best dense-retrieval score that are ranked beside
            the beams. They cost a pass over the whole catalog. 0: none.
        transition_weight (`float`, defaults to 0.0): Weight of the transition score in the fused score. 0: leave the
            transition score out.
        num_transition_candidates (`int`, defaults to 0): Items of the best transition score that are ranked beside
            the beams. They cost a pass over the whole catalog. 0: none.
        history_decay, transition_smoothing, popularity_weight, content_weight (`float`): The fields of
            `TransitionSettings`.
        new_item_bonus (`float`, defaults to 0.0): Added to the fused score of every item that training did not know
            (`scorer.is_untrained`): learned scores bury what is new. Needs a table of transitions.
        popularity_correction (`float`, defaults to 0.0): Subtracted from the fused score, times the log number of
            interactions of the item: lists show more of the catalog. Needs a table of transitions.
        diversity (`float`, defaults to 0.0): What an item pays for a cosine of 1 to an item before it in the list, by
            item representations, in standard deviations of the request's fused scores (maximal marginal relevance:
            Carbonell and Goldstein 1998). The scores in the output stay the fused scores.
        rerank_top_k (`int`, defaults to 0): Beams that are ranked and returned: the best by generation and
            dense-retrieval scores. 0: all beams.
    """

    num_beams: int = 10
    num_return_sequences: int | None = None
    max_items: int | None = None
    max_long_items: int | None = None
    exclude_history: bool = True
    ranking_target: str | None = None
    generation_weight: float = 1.0
    ranking_weight: float = 1.0
    dense_weight: float = 0.0
    num_dense_candidates: int = 0
    transition_weight: float = 0.0
    num_transition_candidates: int = 0
    history_decay: float = TransitionSettings.history_decay
    transition_smoothing: float = TransitionSettings.transition_smoothing
    popularity_weight: float = TransitionSettings.popularity_weight
    content_weight: float = TransitionSettings.content_weight
    new_item_bonus: float = 0.0
    popularity_correction: float = 0.0
    diversity: float = 0.0
    rerank_top_k: int = 0

    @classmethod
    def from_generation_config(
        cls, generation_config: GenerationConfig, config: UniGRFConfig, overrides: dict
    ) -> "ServingOptions":
        """
        Read the options, `overrides` first.

        Raises:
            ValueError: for another type of config, an override of another name, and options out of range.
        """
        if not isinstance(generation_config, GenerationConfig):
            raise ValueError(
                f"`generation_config` must be a GenerationConfig, got {describe(generation_config)}. Pass single "
                "options by name."
            )
        names = [field.name for field in fields(cls)]
        if strange := sorted(set(overrides) - set(names)):
            raise ValueError(f"Serving options must be among {names}, got {strange}. Correct or remove them.")
        values = {name: getattr(generation_config, name, None) for name in names}
        values |= {name: value for name, value in overrides.items() if value is not None}
        options = cls(**{name: value for name, value in values.items() if value is not None})
        options._check_numbers()
        options.ranking_target = options.ranking_target or config.ranking_targets[0]
        if options.num_return_sequences is None:
            options.num_return_sequences = min(10, options.max_return_sequences)
        options.check(config)
        return options

    @property
    def num_ranked_beams(self) -> int:
        """Number of beams that are ranked."""
        return min(self.num_beams, self.rerank_top_k) if self.rerank_top_k else self.num_beams

    @property
    def max_return_sequences(self) -> int:
        """Length of the longest list."""
        return self.num_ranked_beams + self.num_dense_candidates + self.num_transition_candidates

    @property
    def reads_transitions(self) -> bool:
        """Whether a call needs transition scores."""
        return bool(self.transition_weight or self.num_transition_candidates)

    @property
    def transition_settings(self) -> TransitionSettings:
        """The settings of the transition score."""
        return TransitionSettings(
            self.history_decay, self.transition_smoothing, self.popularity_weight, self.content_weight
        )

    def check(self, config: UniGRFConfig) -> None:
        """
        Check the options.

        Raises:
            ValueError: for options out of range, or that the model cannot serve.
        """
        if self.ranking_target not in config.ranking_targets:
            raise ValueError(
                f"`ranking_target` must be among {config.ranking_targets}, got {self.ranking_target!r}. Leave it out "
                "for the first."
            )
        counts = (self.num_dense_candidates, self.num_transition_candidates, self.rerank_top_k)
        is_possible = self.num_beams >= 1 and min(counts) >= 0
        if not (is_possible and 1 <= self.num_return_sequences <= self.max_return_sequences):
            raise ValueError(
                "`num_return_sequences` must be from 1 to num_beams (or rerank_top_k, if not 0) + "
                "num_dense_candidates + num_transition_candidates, got "
                f"num_return_sequences={self.num_return_sequences}, num_beams={self.num_beams}, "
                f"rerank_top_k={self.rerank_top_k}, num_dense_candidates={self.num_dense_candidates}, "
                f"num_transition_candidates={self.num_transition_candidates}. Ask for fewer items, or search for more."
            )
        if (self.dense_weight or self.num_dense_candidates) and not config.has_dense_scores:
            raise ValueError(
                "`dense_weight` and `num_dense_candidates` must be 0 for a model without a dense-retrieval score, got "
                f"{self.dense_weight} and {self.num_dense_candidates}. Leave both out, or train a model with the "
                "ranking target 'next' and content_embedding_dim or embedding_table_size."
            )
        if self.diversity and not config.has_item_representations:
            raise ValueError(
                f"`diversity` must be 0 for a model without item representations, got {self.diversity}. Leave it out, "
                "or train a model with content_embedding_dim or embedding_table_size."
            )
        self._check_transitions(config)
        for name in ("max_items", "max_long_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}. Leave it out for no limit.")
        most = None if self.max_items is None else config.max_history_items
        if most is not None and self.max_items > most:
            raise ValueError(
                f"`max_items` must be at most the {most} items that the backbone has positions for, got "
                f"{self.max_items}. Take fewer items, or a backbone with more positions (max_position_embeddings)."
            )

    def _check_numbers(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # A float's default is a float, a count's an integer or None.
            if isinstance(field.default, float):
                may_be_negative = field.name == "popularity_weight"
                is_good = isinstance(value, Real) and math.isfinite(value) and (value >= 0 or may_be_negative)
                expected = "a finite number" if may_be_negative else "a finite number from 0"
            elif field.name == "ranking_target":
                continue
            elif isinstance(field.default, bool):
                is_good = isinstance(value, bool)
                expected = "True or False"
            else:
                is_good = value is None or isinstance(value, Integral)
                expected = "an integer"
            if not is_good or isinstance(value, bool) != isinstance(field.default, bool):
                raise ValueError(f"`{field.name}` must be {expected}, got {value!r}. Leave it out for the default.")

    def _check_transitions(self, config: UniGRFConfig) -> None:
        names = ("transition_weight", "num_transition_candidates", "new_item_bonus", "popularity_correction")
        values = {name: getattr(self, name) for name in names if getattr(self, name)}
        if values and not config.num_transitions:
            raise ValueError(
                f"`{'` and `'.join(values)}` must be 0 for a model without transitions, got "
                f"{', '.join(map(str, values.values()))}. Leave them out, or make the table with "
                "`model.set_transitions(histories)`."
            )
        if self.content_weight and self.reads_transitions and not config.content_embedding_dim:
            raise ValueError(
                "`content_weight` must be 0 for a model without content embeddings, got "
                f"{self.content_weight}. Leave it out."
            )
        if not (self.history_decay <= 1 and self.transition_smoothing > 0):
            raise ValueError(
                "`history_decay` must be from 0 to 1 and `transition_smoothing` positive, got "
                f"{self.history_decay} and {self.transition_smoothing}. Leave them out for the defaults."
            )


def serving_defaults() -> dict:
    """Return the serving options whose default is not None, with their defaults."""
    return {name: value for name, value in asdict(ServingOptions()).items() if value is not None}


@dataclass
class UniGRFRecommendation(ModelOutput):
    """
    The best items of each request, best first.

    A request with too few items is filled up with item -1 and scores of -inf.

    Args:
        item_indices (`torch.LongTensor` of shape `(batch_size, R)`): Item indices.
        scores (`torch.FloatTensor` of shape `(batch_size, R)`): The fused scores: the sum of the scores
            below, each times its weight.
        generation_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log P(item | history)`.
        ranking_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log sigmoid` of the ranking target's logit.
        dense_scores (`torch.FloatTensor` of shape `(batch_size, R)`, *optional*): The dense-retrieval scores. None
            without item representations or the target `"next"`.
        transition_scores (`torch.FloatTensor` of shape `(batch_size, R)`, *optional*): The transition scores. None
            unless `transition_weight` or `num_transition_candidates` ask for them.
    """

    item_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    generation_scores: torch.FloatTensor | None = None
    ranking_scores: torch.FloatTensor | None = None
    dense_scores: torch.FloatTensor | None = None
    transition_scores: torch.FloatTensor | None = None


@dataclass
class Candidates:
    """Candidates `[B, N]`, their log P `[B, N]` (-inf: no item), and states `[B, N, hidden_size]` that rank them."""

    items: torch.LongTensor
    log_probs: torch.FloatTensor
    states: torch.FloatTensor

    def join(self, items: torch.LongTensor, log_probs: torch.FloatTensor, states: torch.FloatTensor) -> "Candidates":
        """Append further candidates."""
        return Candidates(
            torch.cat([self.items, items], dim=1),
            torch.cat([self.log_probs, log_probs], dim=1),
            torch.cat([self.states, states], dim=1),
        )


def make_search_space(
    scorer: ItemScorer,
    catalog: CatalogTrie,
    history: History,
    exclude_history: bool,
    allowed_items: list | None,
    blocked_items: list | None,
) -> SearchSpace:
    """
    Make the space of a call: a catalog, less the items that the call's lists or the history exclude.

    Args:
        scorer (`ItemScorer`): The model's heads and whole catalog.
        catalog (`CatalogTrie`): The catalog to search, or a part of it.
        history (`History`): The checked histories.
        exclude_history (`bool`): Exclude the items of each user's history.
        allowed_items, blocked_items (`list`, *optional*): A list of item indices for each request. None: no lists.

    Raises:
        ValueError: for the reasons of `ItemFilter`, `item_lists` and `UniGRFCatalog.check_part`.
    """
    item_codes = scorer.catalog.item_codes
    batch_size = len(history.input_ids)
    scorer.catalog.check_part(catalog)
    if allowed_items is not None:
        allowed_items = item_lists("allowed_items", allowed_items, batch_size, item_codes.device)
    if blocked_items is not None:
        blocked_items = item_lists("blocked_items", blocked_items, batch_size, item_codes.device)
    if exclude_history:
        read_items = [history.items[history.rows == row] for row in range(batch_size)]
        if blocked_items is not None:
            read_items = [torch.cat(pair) for pair in zip(read_items, blocked_items, strict=True)]
        blocked_items = read_items
    if allowed_items is None and blocked_items is None:
        return SearchSpace(catalog)
    return SearchSpace(catalog, ItemFilter(catalog, item_codes, allowed_items, blocked_items))


def recommend_items(
    backbone: PreTrainedModel,
    scorer: ItemScorer,
    candidate_block: UniGRFCandidateBlock | None,
    history: History,
    space: SearchSpace,
    cache: DynamicCache,
    options: ServingOptions,
) -> UniGRFRecommendation:
    """Recommend the next items of checked histories: see `UniGRFForCausalLM.recommend`."""
    # Prefill.
    representations = scorer.history_representations(history.input_ids)
    history_states = prefill(backbone, history, representations, cache)
    context = CandidateContext(history.attention_mask.bool(), cache, history.long_history, history.query_time)
    with cache_rollback(cache):
        # Beams.
        beams = beam_search(
            backbone,
            scorer,
            space,
            history_states,
            context.history_mask,
            cache,
            options.num_beams,
            history.query_time,
        )
        items = space.trie.leaf_items[beams.nodes].long()
        keys = beams.keys
        log_probs = beams.scores
        if options.num_ranked_beams < items.shape[1]:
            first_scores = log_probs
            if options.dense_weight:
                first_scores = first_scores + options.dense_weight * scorer.dense_scores(history_states, items)
            best = first_scores.topk(options.num_ranked_beams, dim=1).indices
            items = items.gather(1, best)
            log_probs = log_probs.gather(1, best)
            keys = keys.gather(1, best[..., None].expand(-1, -1, keys.shape[2]))
        # Their states: the search has run all codes but the last.
        states = read_candidates(backbone, scorer, candidate_block, context, items, keys)[:, :, -1]
        candidates = Candidates(items, log_probs, states)
        # Candidates of the other scores.
        transition_scores = None
        if options.reads_transitions:
            last = last_items(history.rows, history.items, len(history.input_ids))
            transition_scores = scorer.transition_scores(last, options.transition_settings)
        further = further_candidates(scorer, space, history_states, transition_scores, options)
        if further.shape[1]:
            known = items.masked_fill(log_probs == -torch.inf, -1)
            if scorer.transitions is not None:
                # `item_log_probs` knows better than the search how likely an item is that training did not know.
                is_untrained = scorer.is_untrained(items) & (items[..., None] == further[:, None]).any(dim=2)
                candidates.log_probs = log_probs.masked_fill(is_untrained, -torch.inf)
                known = known.masked_fill(is_untrained, -1)
            is_other = (further >= 0) & ~(further[..., None] == known[:, None]).any(dim=2)
            further = further.clamp(min=0)
            states = read_candidates(backbone, scorer, candidate_block, context, further)
            log_probs = scorer.item_log_probs(further, history_states, states).masked_fill(~is_other, -torch.inf)
            candidates = candidates.join(further, log_probs, states[:, :, -1])
    return fuse(scorer, candidates, history_states, transition_scores, options)


def further_candidates(
    scorer: ItemScorer,
    space: SearchSpace,
    history_states: torch.FloatTensor,
    transition_scores: torch.FloatTensor | None,
    options: ServingOptions,
) -> torch.LongTensor:
    """Find the items `[B, N]` of the best dense-retrieval and transition scores, each item once; -1: no item."""
    parts = [torch.empty(len(history_states), 0, dtype=torch.long, device=history_states.device)]
    if options.num_dense_candidates:
        scores_of = scorer.all_dense_scores(history_states)
        parts.append(scorer.top_items(scores_of, options.num_dense_candidates, space.trie, space.item_filter))
    if options.num_transition_candidates:
        items = scorer.top_items(
            lambda part: transition_scores[:, part],
            options.num_transition_candidates,
            space.trie,
            space.item_filter,
        )
        is_repeated = (items[..., None] == parts[-1][:, None]).any(dim=2)
        parts.append(items.masked_fill(is_repeated, -1))
    return torch.cat(parts, dim=1)


def fused_scores(columns: Mapping[str, torch.FloatTensor], weights: Mapping[str, float]) -> torch.FloatTensor:
    """
    Compute the fused scores: the sum of the scores times their weights, zeros if all weights are 0.

    A weight of 0 leaves out its scores, even infinite ones.

    Args:
        columns (`Mapping`): `generation_scores` and others of `UniGRFRecommendation`, each `[...]`; with a bonus,
            `is_new`, whether training did not know the item; with a correction, `log_popularity`.
        weights (`Mapping`): `generation_weight`, other weights of `ServingOptions`, `new_item_bonus` and
            `popularity_correction`. A missing weight is 0.
    """
    total = torch.zeros_like(columns["generation_scores"])
    for name in FUSED_SCORES:
        if weight := weights.get(f"{name}_weight", 0.0):
            total = total + weight * columns[f"{name}_scores"]
    if bonus := weights.get("new_item_bonus", 0.0):
        total = total + bonus * columns["is_new"]
    if correction := weights.get("popularity_correction", 0.0):
        total = total - correction * columns["log_popularity"]
    return total


def diverse_order(
    scores: torch.FloatTensor, vectors: torch.FloatTensor, diversity: float, count: int
) -> tuple[torch.FloatTensor, torch.LongTensor]:
    """
    List candidates one after the other, each unlike those before it.

    The next one has the greatest score less the price of its greatest cosine to a listed one. Cosines below 0 count
    as 0.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, N)`): Fused scores; -inf: no item.
        vectors (`torch.FloatTensor` of shape `(batch_size, N, d)`): Item representations of the candidates.
        diversity (`float`): The price of a cosine of 1, in standard deviations of the row's finite scores.
        count (`int`): Length of the lists, at most N.

    Returns:
        The scores and places of the listed candidates, both `[batch_size, count]`.
    """
    directions = nn.functional.normalize(vectors.float(), dim=-1)
    spread = scores.masked_fill(scores == -torch.inf, torch.nan)
    spread = (spread - spread.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1, keepdim=True).sqrt()
    price = diversity * spread.nan_to_num()
    left = scores
    nearest = torch.zeros_like(scores)
    columns = []
    for _ in range(count):
        place = (left - price * nearest).argmax(dim=1, keepdim=True)
        columns.append((left.gather(1, place), place))
        chosen = directions.gather(1, place[..., None].expand(-1, -1, directions.shape[2]))
        nearest = torch.maximum(nearest, (directions @ chosen.transpose(1, 2))[..., 0])
        left = left.scatter(1, place, -torch.inf)
    listed, places = (torch.cat(column, dim=1) for column in zip(*columns, strict=True))
    return listed, places


def fuse(
    scorer: ItemScorer,
    candidates: Candidates,
    history_states: torch.FloatTensor,
    transition_scores: torch.FloatTensor | None,
    options: ServingOptions,
) -> UniGRFRecommendation:
    """
    Rank candidates at history ends `[B, hidden_size]` and list the best by the fused score.

    Raises:
        ValueError: for a candidate whose scores are not finite.
    """
    # The scores.
    target = scorer.config.ranking_targets.index(options.ranking_target)
    logits = scorer.ranking_logits(candidates.states, history_states, candidates.items)[..., target]
    columns = {
        "generation_scores": candidates.log_probs,
        "ranking_scores": nn.functional.logsigmoid(logits),
    }
    dense_scores = scorer.dense_scores(history_states, candidates.items)
    if dense_scores is not None:
        columns["dense_scores"] = dense_scores
    if transition_scores is not None:
        columns["transition_scores"] = transition_scores.gather(1, candidates.items)

    # Their fusion.
    further = {}
    if options.new_item_bonus:
        further["is_new"] = scorer.is_untrained(candidates.items)
    if options.popularity_correction:
        further["log_popularity"] = scorer.log_popularity(candidates.items)
    scores = fused_scores({**columns, **further}, vars(options))
    columns = {"scores": scores, **columns}
    is_item = candidates.log_probs != -torch.inf
    # The log sigmoid of an infinite logit may be finite.
    values = torch.stack([*columns.values(), logits])
    check_scores("scores", (~values.isfinite() & is_item).any())
    columns = {name: column.masked_fill(~is_item, -torch.inf) for name, column in columns.items()}

    # The list.
    count = options.num_return_sequences
    length = min(count, candidates.items.shape[1])
    if options.diversity:
        vectors = scorer.representations(candidates.items)
        best_scores, best = diverse_order(columns["scores"], vectors, options.diversity, length)
    else:
        best_scores, best = columns["scores"].topk(length, dim=1)
    best_items = candidates.items.gather(1, best).masked_fill(best_scores == -torch.inf, -1)
    padding = (0, count - best.shape[1])
    return UniGRFRecommendation(
        item_indices=nn.functional.pad(best_items, padding, value=-1),
        **{
            name: nn.functional.pad(
                column.gather(1, best).masked_fill(best_scores == -torch.inf, -torch.inf), padding, value=-torch.inf
            )
            for name, column in columns.items()
        },
    )


def check_rank_options(
    cache: DynamicCache | None,
    history_states: torch.FloatTensor | None,
    candidates_per_pack: int | None,
    shape: tuple[int, int],
) -> None:
    """Raise `ValueError` for states without a cache or of another shape than `shape`, and for a pack below 1."""
    is_float = isinstance(history_states, torch.Tensor) and history_states.is_floating_point()
    if history_states is not None and (cache is None or not is_float or history_states.shape != shape):
        raise ValueError(
            f"`history_states` must be floats of shape {shape} beside a `cache`, got "
            f"{describe(history_states)}{'' if cache is not None else ' and no cache'}. Pass the result of "
            "`model.prefill` with its cache, or leave it out."
        )
    is_count = isinstance(candidates_per_pack, Integral) and not isinstance(candidates_per_pack, bool)
    if candidates_per_pack is not None and not (is_count and candidates_per_pack >= 1):
        raise ValueError(
            f"`candidates_per_pack` must be an integer of 1 or more, got {candidates_per_pack!r}. Leave it out for "
            "the default."
        )


def rank_candidates(
    backbone: PreTrainedModel,
    scorer: ItemScorer,
    candidate_block: UniGRFCandidateBlock | None,
    history: History,
    candidates: torch.LongTensor,
    cache: DynamicCache | None,
    history_states: torch.FloatTensor | None,
    candidates_per_pack: int | None,
) -> torch.FloatTensor:
    """
    Rank checked candidates of checked histories: see `UniGRFForCausalLM.rank`.

    Raises:
        ValueError: for another cache, and for logits that are not finite.
    """
    length = history.input_ids.shape[1]
    is_new = cache is None
    cache = DynamicCache() if is_new else cache
    check_cache(cache)
    if not is_new and cache.get_seq_length() != length:
        raise ValueError(
            f"`cache` must hold the {length} tokens of input_ids, got {cache.get_seq_length()}. Fill it with "
            "`model.prefill`, or leave it out."
        )
    check_cached_tokens(cache, history)
    if cache.get_seq_length() < length or (history_states is None and scorer.has_dense_scores):
        history_states = prefill(backbone, history, scorer.history_representations(history.input_ids), cache)
    if candidates_per_pack is None:
        # A CPU's caches hold 64 candidates; elsewhere a pack costs its launches.
        candidates_per_pack = 64 if candidates.device.type == "cpu" else 1024
    context = CandidateContext(history.attention_mask.bool(), cache, history.long_history, history.query_time)
    num_targets = len(scorer.config.ranking_targets)
    logits = [torch.empty(len(candidates), 0, num_targets, device=candidates.device)]
    for pack in candidates.split(candidates_per_pack, dim=1) if candidates.shape[1] else ():
        with cache_rollback(cache):
            states = read_candidates(backbone, scorer, candidate_block, context, pack)
        logits.append(scorer.ranking_logits(states[:, :, -1], history_states, pack))
    logits = torch.cat(logits, dim=1)
    check_scores("logits", ~logits.isfinite().all())
    return logits

# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Recommendation: candidates of a search, ranked on the search's cache, with fused scores (RecoChain, inference)."""

from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from .beam_search_unigrf import SearchSpace, beam_search
from .candidates_unigrf import CandidateContext, read_candidates
from .configuration_unigrf import UniGRFConfig
from .inputs_unigrf import History
from .item_lists_unigrf import item_list
from .scoring_unigrf import ItemScorer, UniGRFCandidateBlock
from .shared_prefix_unigrf import cache_rollback, check_cache, prefill
from .trie_unigrf import CatalogTrie, ItemFilter


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
        ranking_weight (`float`, defaults to 1.0): Weight of the ranking score in the fused score. 0: leave the
            ranking score out.
        dense_weight (`float`, defaults to 0.0): Weight of the dense-retrieval score in the fused score. 0: leave the
            dense-retrieval score out.
        num_dense_candidates (`int`, defaults to 0): Items of the best dense-retrieval score that are ranked beside
            the beams. They cost a pass over the whole catalog. 0: beams alone.
        rerank_top_k (`int`, defaults to 0): Beams that are ranked and returned: the best by generation and
            dense-retrieval scores. 0: all beams.
    """

    num_beams: int = 10
    num_return_sequences: int | None = None
    max_items: int | None = None
    max_long_items: int | None = None
    exclude_history: bool = True
    ranking_target: str | None = None
    ranking_weight: float = 1.0
    dense_weight: float = 0.0
    num_dense_candidates: int = 0
    rerank_top_k: int = 0

    @classmethod
    def from_generation_config(
        cls, generation_config: GenerationConfig, config: UniGRFConfig, overrides: dict
    ) -> "ServingOptions":
        """
        Read the options, `overrides` first.

        Raises:
            ValueError: for an override of another name and for options out of range.
        """
        names = [field.name for field in fields(cls)]
        if strange := sorted(set(overrides) - set(names)):
            raise ValueError(f"Serving options must be among {names}, got {strange}. Correct or remove them.")
        values = {name: getattr(generation_config, name, None) for name in names}
        values |= {name: value for name, value in overrides.items() if value is not None}
        options = cls(**{name: value for name, value in values.items() if value is not None})
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
        return self.num_ranked_beams + self.num_dense_candidates

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
        is_possible = self.num_beams >= 1 and min(self.num_dense_candidates, self.rerank_top_k) >= 0
        if not (is_possible and 1 <= self.num_return_sequences <= self.max_return_sequences):
            raise ValueError(
                "`num_return_sequences` must be from 1 to num_beams (or rerank_top_k, if not 0) + "
                f"num_dense_candidates, got num_return_sequences={self.num_return_sequences}, "
                f"num_beams={self.num_beams}, rerank_top_k={self.rerank_top_k}, "
                f"num_dense_candidates={self.num_dense_candidates}. Ask for fewer items, or search for more."
            )
        if (self.dense_weight or self.num_dense_candidates) and not config.has_dense_scores:
            raise ValueError(
                "`dense_weight` and `num_dense_candidates` must be 0 for a model without a dense-retrieval score, got "
                f"{self.dense_weight} and {self.num_dense_candidates}. Leave both out, or train a model with the "
                "ranking target 'next' and content_embedding_dim or embedding_table_size."
            )
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
        scores (`torch.FloatTensor` of shape `(batch_size, R)`): The fused scores, `generation_scores +
            ranking_weight * ranking_scores + dense_weight * dense_scores`.
        generation_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log P(item | history)`.
        ranking_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log sigmoid` of the ranking target's logit.
        dense_scores (`torch.FloatTensor` of shape `(batch_size, R)`, *optional*): The dense-retrieval scores. None
            without item representations or the target `"next"`.
    """

    item_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    generation_scores: torch.FloatTensor | None = None
    ranking_scores: torch.FloatTensor | None = None
    dense_scores: torch.FloatTensor | None = None


@dataclass
class Candidates:
    """Candidates `[B, N]`, their log P `[B, N]` (-inf: no item), and states `[B, N, hidden_size]` that rank them."""

    items: torch.LongTensor
    log_probs: torch.FloatTensor
    states: torch.FloatTensor


def check_catalog_device(catalog: CatalogTrie, device: torch.device) -> None:
    """Raise `ValueError` for a part of the catalog on another device, made before the model moved."""
    if catalog.leaf_items.device != device:
        raise ValueError(
            f"`catalog` must be on the model's device {device}, got {catalog.leaf_items.device}. Make it with "
            "`model.catalog.subset(items)` after the model moved."
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
        ValueError: for the reasons of `ItemFilter`, for another number of lists than requests, and for a catalog on
            another device.
    """
    item_codes = scorer.catalog.item_codes
    batch_size = len(history.input_ids)
    check_catalog_device(catalog, item_codes.device)
    for name, lists in (("allowed_items", allowed_items), ("blocked_items", blocked_items)):
        if lists is not None and len(lists) != batch_size:
            raise ValueError(
                f"`{name}` must hold one list for each of {batch_size} requests, got {len(lists)}. Pass an empty list "
                "for none."
            )
    if exclude_history:
        lists = [[]] * batch_size if blocked_items is None else blocked_items
        blocked_items = [
            torch.cat([history.items[history.rows == row], item_list(items, item_codes.device)])
            for row, items in enumerate(lists)
        ]
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
        # Dense candidates: items that are no beams.
        if options.num_dense_candidates:
            dense_items = scorer.top_dense_items(
                history_states, options.num_dense_candidates, space.trie, space.item_filter
            )
            is_beam = (dense_items[..., None] == items[:, None]) & (log_probs > -torch.inf)[:, None]
            is_new = (dense_items >= 0) & ~is_beam.any(dim=2)
            dense_items = dense_items.clamp(min=0)
            dense_states = read_candidates(backbone, scorer, candidate_block, context, dense_items)
            dense_log_probs = scorer.item_log_probs(dense_items, history_states, dense_states)
            items = torch.cat([items, dense_items], dim=1)
            log_probs = torch.cat([log_probs, dense_log_probs.masked_fill(~is_new, -torch.inf)], dim=1)
            states = torch.cat([states, dense_states[:, :, -1]], dim=1)
    return fuse(scorer, Candidates(items, log_probs, states), history_states, options)


def fused_scores(
    columns: dict[str, torch.FloatTensor], ranking_weight: float, dense_weight: float
) -> torch.FloatTensor:
    """
    Compute `generation_scores + ranking_weight * ranking_scores + dense_weight * dense_scores`.

    A weight of 0 leaves out its scores, even infinite ones.
    """
    weights = {"generation_scores": 1.0, "ranking_scores": ranking_weight, "dense_scores": dense_weight}
    return sum(weight * columns[name] for name, weight in weights.items() if weight)


def fuse(
    scorer: ItemScorer, candidates: Candidates, history_states: torch.FloatTensor, options: ServingOptions
) -> UniGRFRecommendation:
    """Rank candidates at history ends `[B, hidden_size]` and list the best by the fused score."""
    # The three scores.
    target = scorer.config.ranking_targets.index(options.ranking_target)
    logits = scorer.ranking_logits(candidates.states, history_states, candidates.items)[..., target]
    columns = {
        "generation_scores": candidates.log_probs,
        "ranking_scores": nn.functional.logsigmoid(logits),
    }
    dense_scores = scorer.dense_scores(history_states, candidates.items)
    if dense_scores is not None:
        columns["dense_scores"] = dense_scores

    # Their fusion.
    scores = fused_scores(columns, options.ranking_weight, options.dense_weight)
    is_item = candidates.log_probs > -torch.inf
    columns = {
        name: column.masked_fill(~is_item, -torch.inf) for name, column in {"scores": scores, **columns}.items()
    }

    # The list.
    count = options.num_return_sequences
    best_scores, best = columns["scores"].topk(min(count, candidates.items.shape[1]), dim=1)
    best_items = candidates.items.gather(1, best).masked_fill(best_scores == -torch.inf, -1)
    padding = (0, count - best.shape[1])
    return UniGRFRecommendation(
        item_indices=nn.functional.pad(best_items, padding, value=-1),
        **{
            name: nn.functional.pad(column.gather(1, best), padding, value=-torch.inf)
            for name, column in columns.items()
        },
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
    """Rank checked candidates of checked histories: see `UniGRFForCausalLM.rank`."""
    length = history.input_ids.shape[1]
    is_new = cache is None
    cache = DynamicCache() if is_new else cache
    check_cache(cache)
    if not is_new and cache.get_seq_length() != length:
        raise ValueError(
            f"`cache` must hold the {length} tokens of input_ids, got {cache.get_seq_length()}. Fill it with "
            "`model.prefill`, or leave it out."
        )
    if is_new or (history_states is None and scorer.has_dense_scores):
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
    return torch.cat(logits, dim=1)

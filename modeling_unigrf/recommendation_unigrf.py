# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Recommendation: the beams of a search, ranked on the search's own cache, their scores fused (RecoChain, inference)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from .candidates_unigrf import read_candidates, top_dense_items
from .shared_prefix_unigrf import cache_rollback
from .training_unigrf import item_log_probs
from .trie_unigrf import CatalogTrie, ItemFilter, item_list


@dataclass
class UniGRFRecommendation(ModelOutput):
    """
    The best items of each request, best first. A request with fewer items than asked for is padded with item -1 and
    scores of -inf.

    Args:
        item_indices (`torch.LongTensor` of shape `(batch_size, R)`): Rows of the catalog.
        scores (`torch.FloatTensor` of shape `(batch_size, R)`): `generation_scores + ranking_weight * ranking_scores`, and
            `dense_weight * dense_scores`, if there are any.
        generation_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log P(item | history)`.
        ranking_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log sigmoid` of the ranking target.
        dense_scores (`torch.FloatTensor` of shape `(batch_size, R)`, *optional*): The item-level score: the logit of the item
            among all items, by the history's end and the item's vector. None without item vectors or target `"next"`.
    """

    item_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    generation_scores: torch.FloatTensor | None = None
    ranking_scores: torch.FloatTensor | None = None
    dense_scores: torch.FloatTensor | None = None


class UniGRFRecommendationMixin:
    """Ranking on top of generation. Needs `UniGRFGenerationMixin`, `ranking_head` and `ranking_logits`."""

    def max_return_sequences(self, num_beams: int | None = None) -> int:
        """How many items `recommend` returns at most of so many beams (by default its own number), by the config's defaults."""
        num_beams = self._num_beams if num_beams is None else num_beams
        return min(num_beams, self.config.rerank_top_k or num_beams) + self.config.num_dense_candidates

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        num_beams: int | None = None,
        num_return_sequences: int | None = None,
        ranking_weight: float | None = None,
        ranking_target: str | None = None,
        exclude_history: bool | None = None,
        allowed_items: list | None = None,
        blocked_items: list | None = None,
        catalog: CatalogTrie | None = None,
        cache: DynamicCache | None = None,
        timestamps: torch.LongTensor | None = None,
        query_time: torch.LongTensor | None = None,
        long_items: torch.LongTensor | None = None,
        long_behaviors: torch.LongTensor | None = None,
        long_timestamps: torch.LongTensor | None = None,
        dense_weight: float | None = None,
        num_dense_candidates: int | None = None,
        rerank_top_k: int | None = None,
    ) -> UniGRFRecommendation:
        """
        The next items of each history: one prefill, beams on its cache, ranking on the same cache, fused scores
        `log P(item | history) + ranking_weight * log sigmoid(rank)` (RecoChain, inference). PEFT's prompt learning has no effect
        here and in `rank`: only its own `forward` and `generate` put the virtual tokens before a history.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, T)`): Histories, left-padded.
            attention_mask (`torch.LongTensor` of shape `(batch_size, T)`, *optional*)
            num_beams (`int`, *optional*): Candidates generated and ranked a request; `generation_config.num_beams` by
                default, or ten.
            num_return_sequences (`int`, *optional*): Items returned, at most `num_beams` (or `rerank_top_k`) `+ num_dense_candidates`;
                by default ten, or as many as that.
            ranking_weight (`float`, *optional*): `config.ranking_weight` by default; 0 orders by generation alone.
            ranking_target (`str`, *optional*): One of `config.ranking_targets`; `config.ranking_target` by default, or the first.
            exclude_history (`bool`, *optional*): Leave out the items of the history itself; `config.exclude_history` by default.
            allowed_items, blocked_items (`list` of `batch_size` lists or tensors of item indices, *optional*): Per
                request. They hold inside the search: a beam never spends itself on an item that may not be shown.
            catalog (`CatalogTrie`, *optional*): Recommend only items of this part of the catalog (a market, a
                surface), made by `model.catalog.subset(items)`; the histories may hold any item.
            cache (`DynamicCache`, *optional*): With the first tokens of these histories, or all of them; holds
                all of them afterwards.
            timestamps (`torch.LongTensor` of shape `(batch_size, T)`, *optional*): When each token's event was, for a backbone
                that reads times (`hstu` with `num_time_buckets`), in seconds from any origin; -1 where not known.
            query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): When the next item is asked for; by
                default at the time of the last event.
            long_items, long_behaviors, long_timestamps (`torch.LongTensor` of shape `(batch_size, H)`): As in `rank`, with
                `config.num_retrieved_items`.
            dense_weight (`float`, *optional*): Of the item-level score in `scores`; `config.dense_weight` by default.
            num_dense_candidates (`int`, *optional*): Rank this many items of the best item-level score as well, whether or not the
                beams found them: a pass over the vectors of the whole catalog, which no beam's early codes can spoil.
                `config.num_dense_candidates` by default.
            rerank_top_k (`int`, *optional*): Rank and return only this many of the beams, the best without their ranking:
                by `log P + dense_weight * item score`. A sub-history costs several times what the search does, but only for
                these. 0: all; `config.rerank_top_k` by default.

        Returns:
            `UniGRFRecommendation`

        Raises:
            ValueError: on histories that no item can follow, unknown targets or items, lists that leave no item.
        """
        config = self.config
        num_beams = self._num_beams if num_beams is None else num_beams
        num_dense_candidates = config.num_dense_candidates if num_dense_candidates is None else num_dense_candidates
        rerank_top_k = config.rerank_top_k if rerank_top_k is None else rerank_top_k
        num_ranked = min(num_beams, rerank_top_k) if rerank_top_k else num_beams
        ranking_weight = config.ranking_weight if ranking_weight is None else ranking_weight
        ranking_target = ranking_target or config.ranking_target or config.ranking_targets[0]
        dense_weight = config.dense_weight if dense_weight is None else dense_weight
        exclude_history = config.exclude_history if exclude_history is None else exclude_history
        if num_return_sequences is None:
            num_return_sequences = min(10, num_ranked + num_dense_candidates)
        if ranking_target not in config.ranking_targets:
            raise ValueError(f"Expected a ranking_target among {config.ranking_targets}, found {ranking_target!r}.")
        is_possible = num_beams >= 1 and min(num_dense_candidates, num_ranked) >= 0
        if not is_possible or not 1 <= num_return_sequences <= num_ranked + num_dense_candidates:
            raise ValueError(
                "Expected num_beams >= 1 and 1 <= num_return_sequences <= num_beams (or rerank_top_k, if not 0) + num_dense_candidates, "
                f"found num_return_sequences={num_return_sequences}, num_beams={num_beams}, rerank_top_k={rerank_top_k}, "
                f"num_dense_candidates={num_dense_candidates}. Ask for fewer items, or search for more."
            )
        if (dense_weight or num_dense_candidates) and not self.ranking_head.has_dense_scores:
            raise ValueError(
                f"dense_weight={dense_weight} and num_dense_candidates={num_dense_candidates} need an item-level score, which this model does not "
                'have. Train one with the ranking target "next" and content_embedding_dim or embedding_table_size.'
            )
        attention_mask, rows, history_items = self._check_histories(input_ids, attention_mask, whole_items=True)
        long_history = self._long_history(
            len(input_ids), long_items, long_behaviors, long_timestamps, timestamps is not None
        )
        own = [history_items[rows == row] for row in range(len(input_ids))] if exclude_history else None
        trie = self.catalog.trie if catalog is None else catalog
        self._check_catalog(trie)
        item_filter = self._item_filter(trie, len(input_ids), allowed_items, blocked_items, own)

        cache = DynamicCache() if cache is None else cache
        query_time = self._check_timestamps(input_ids, timestamps, query_time)
        history_states = self.prefill(input_ids, attention_mask, cache, timestamps, query_time)
        reads = {"long_history": long_history, "query_time": query_time}
        history_mask = attention_mask.bool()
        with cache_rollback(cache):
            beams = self._search_items(
                input_ids,
                attention_mask,
                history_states,
                cache,
                num_beams,
                trie,
                item_filter,
                query_time=query_time,
            )
            items, keys, log_probs = trie.leaf_items[beams.nodes].long(), beams.keys, beams.scores
            if num_ranked < items.shape[1]:
                unranked = log_probs
                if dense_weight:
                    unranked = unranked + dense_weight * self._dense_scores(history_states, items)
                kept = unranked.topk(num_ranked, dim=1).indices
                items, log_probs = items.gather(1, kept), log_probs.gather(1, kept)
                keys = keys.gather(1, kept[..., None].expand(-1, -1, keys.shape[2]))
            # The search has read all codes of the candidates but the last.
            states = read_candidates(self, items, history_mask, keys, cache, **reads)[:, :, -1]
            if num_dense_candidates:
                more = top_dense_items(self, history_states, num_dense_candidates, trie, item_filter)
                known = (more[..., None] == items[:, None]) & (log_probs > -torch.inf)[:, None]
                new = (more >= 0) & ~known.any(dim=2)
                more, nothing = more.clamp(min=0), more.new_empty(*more.shape, 0)
                more_states = read_candidates(self, more, history_mask, nothing, cache, **reads)
                more_log_probs = item_log_probs(self, more, history_states, more_states).masked_fill(~new, -torch.inf)
                items, log_probs = torch.cat([items, more], dim=1), torch.cat([log_probs, more_log_probs], dim=1)
                states = torch.cat([states, more_states[:, :, -1]], dim=1)
        logits = self.ranking_logits(states, history_states, items)[..., config.ranking_targets.index(ranking_target)]
        columns = {"generation_scores": log_probs, "ranking_scores": nn.functional.logsigmoid(logits)}
        if self.ranking_head.has_dense_scores:
            columns["dense_scores"] = self._dense_scores(history_states, items)
        # A weight of 0 leaves a score out, even one that is not finite.
        weights = {"generation_scores": 1.0, "ranking_scores": ranking_weight, "dense_scores": dense_weight}
        scores = sum(weights[name] * column for name, column in columns.items() if weights[name])
        columns = {
            name: column.masked_fill(log_probs == -torch.inf, -torch.inf)
            for name, column in {"scores": scores, **columns}.items()
        }
        best_scores, best = columns["scores"].topk(min(num_return_sequences, items.shape[1]), dim=1)
        best_items = items.gather(1, best).masked_fill(best_scores == -torch.inf, -1)
        missing = (0, num_return_sequences - best.shape[1])
        return UniGRFRecommendation(
            item_indices=nn.functional.pad(best_items, missing, value=-1),
            **{
                name: nn.functional.pad(column.gather(1, best), missing, value=-torch.inf)
                for name, column in columns.items()
            },
        )

    def _dense_scores(self, history_states: torch.FloatTensor, items: torch.LongTensor) -> torch.FloatTensor:
        """Item-level scores of `items [B, N]` at histories' ends `[B, hidden_size]`: `[B, N]`, float32."""
        return self.ranking_head.dense_scores(history_states[:, None], self.item_representations(items)).float()

    def _item_filter(
        self, trie: CatalogTrie, batch_size: int, allowed: list | None, blocked: list | None, own: list | None
    ) -> ItemFilter | None:
        """What the search may show each request: the lists of `recommend`, and not the user's `own` items; None: everything."""
        for name, lists in (("allowed_items", allowed), ("blocked_items", blocked)):
            if lists is not None and len(lists) != batch_size:
                raise ValueError(
                    f"Expected {name} with one list for each of {batch_size} requests, found {len(lists)}."
                )
        if own is not None:
            more = [[]] * batch_size if blocked is None else blocked
            device = self.catalog.item_codes.device
            blocked = [torch.cat([mine, item_list(one, device)]) for mine, one in zip(own, more, strict=True)]
        if allowed is None and blocked is None:
            return None
        return ItemFilter(trie, self.catalog.item_codes, allowed, blocked)

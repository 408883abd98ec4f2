# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Generation: constrained beam search on one cache, as `generate` and, with the ranking on top, as `recommend`."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from .trie_unigrf import CatalogueTrie, ItemFilter

logger = logging.get_logger(__name__)


@dataclass
class UniGRFRecommendation(ModelOutput):
    """
    The best items of each request, best first. A request with fewer items than asked for is padded with item -1 and
    scores of -inf.

    Args:
        item_indices (`torch.LongTensor` of shape `(batch_size, R)`): Rows of the catalogue.
        scores (`torch.FloatTensor` of shape `(batch_size, R)`): `generation_scores + ranking_weight * ranking_scores`.
        generation_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log P(item | history)`.
        ranking_scores (`torch.FloatTensor` of shape `(batch_size, R)`): `log sigmoid` of the ranking target.
    """

    item_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    generation_scores: torch.FloatTensor | None = None
    ranking_scores: torch.FloatTensor | None = None


class TrieLogitsProcessor(LogitsProcessor):
    """
    Leaves the codes that continue some item, as log-probabilities within their level. Knows nothing of the beams: the
    node is found again from the unfinished item at the end of each row.
    """

    def __init__(self, layout, trie: CatalogueTrie, pad_token_id: int):
        self.layout, self.trie, self.pad_token_id = layout, trie, pad_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids [n, T]`, `scores [n, vocab_size]` (logits or log-probabilities) -> `[n, vocab_size]`."""
        lengths, prefix = self.layout.prefix(input_ids)
        out = torch.full_like(scores, -torch.inf)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            if not 0 <= length < self.layout.num_levels:
                out[rows, self.pad_token_id] = 0.0  # a finished row; `generate` fills it up
                continue
            nodes = self.trie.descend(prefix[rows], length)
            level = self.layout.level_slice(length)
            log_probs = scores[rows, level].log_softmax(dim=-1)
            parent, _, code = self.trie.children(length, nodes)
            out[rows[parent], code + level.start] = log_probs[parent, code]
        return out


class ItemComplete(StoppingCriteria):
    """A row is done when its last token is the last code of an item."""

    def __init__(self, layout):
        self.layout = layout

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return self.layout.token_levels(input_ids[:, -1]) == self.layout.num_levels - 1


@dataclass
class Beams:
    """
    K unfinished or finished items a request, best first; a score of -inf marks a place that no item fills.

    Args:
        nodes (`torch.LongTensor` of shape `(batch_size, K)`): Trie nodes.
        codes (`torch.LongTensor` of shape `(batch_size, K, steps)`): The codes generated so far.
        scores (`torch.FloatTensor` of shape `(batch_size, K)`): Sums of log-probabilities.
    """

    nodes: torch.LongTensor
    codes: torch.LongTensor
    scores: torch.FloatTensor


def expand_beams(
    trie: CatalogueTrie,
    level: int,
    beams: Beams,
    log_probs: torch.FloatTensor,
    num_beams: int,
    item_filter: ItemFilter | None,
) -> tuple[Beams, torch.LongTensor]:
    """
    The best children of all beams, among those that exist (and that the filter leaves alive).

    Args:
        log_probs (`torch.FloatTensor` of shape `(batch_size, K, codebook_size)`): Of the codes of `level`.

    Returns:
        The new beams, as many as there are children and at most `num_beams`, and `parent [batch_size, K']`: the beam each
        came from.
    """
    batch_size, width = beams.nodes.shape
    parent, child, code = trie.children(level, beams.nodes.flatten())
    request = parent // width
    counts = request.bincount(minlength=batch_size)
    # One row a request, as wide as the request with the most children.
    column = torch.arange(len(parent), device=parent.device) - (counts.cumsum(0) - counts)[request]
    table = torch.zeros(3, batch_size, int(counts.max()), dtype=torch.long, device=parent.device)
    table[:, request, column] = torch.stack([parent % width, child, code])
    parents, nodes, codes = table
    scores = torch.full(nodes.shape, -torch.inf, device=log_probs.device)
    scores[request, column] = (beams.scores[..., None] + log_probs).flatten(0, 1)[parent, code]
    if item_filter is not None:
        start = trie.leaf_start[level]
        scores = scores.masked_fill(~item_filter.alive(start[nodes], start[nodes + 1]), -torch.inf)
    scores, best = scores.topk(min(num_beams, scores.shape[1]), dim=1)
    parent = parents.gather(1, best)
    history = beams.codes.gather(1, parent[..., None].expand(-1, -1, beams.codes.shape[2]))
    new_codes = torch.cat([history, codes.gather(1, best)[..., None]], dim=2)
    return Beams(nodes.gather(1, best), new_codes, scores), parent


class UniGRFGenerationMixin(GenerationMixin):
    """What `UniGRFForCausalLM` can do at inference beyond a forward. Needs `layout`, `catalogue`, `model` and heads."""

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        trie = TrieLogitsProcessor(self.layout, self.catalogue.trie, self.config.pad_token_id)
        return LogitsProcessorList([trie, *super()._get_logits_processor(*args, **kwargs)])

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        criteria.append(ItemComplete(self.layout))
        return criteria

    def generate(self, inputs: torch.LongTensor | None = None, **kwargs):
        """
        `GenerationMixin.generate`: the next item of each history, among the items that exist, with no code of the user.
        Every row must end in a bos, a behaviour or the first codes of an item; the rest of that item is generated.

        With `num_beams=K, num_return_sequences=R` the best items come first, as many as there are and at most R a row;
        `output_scores=True, return_dict_in_generate=True` adds `sequences_scores`, the items' log-probabilities.

        Raises:
            ValueError: if a row is empty, ends in a whole item, or begins an item that does not exist.
        """
        input_ids = kwargs.get("input_ids", inputs)
        if input_ids is not None:
            self._check_histories(input_ids, kwargs.get("attention_mask"), whole_items=False)
        return super().generate(inputs, **kwargs)

    def _check_histories(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None, whole_items: bool
    ) -> torch.LongTensor:
        """Refuses histories that cannot be continued by an item; returns the attention mask, ones if there was none."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"Expected input_ids of shape (batch_size, sequence_length), found {tuple(input_ids.shape)}."
            )
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"Expected an attention_mask of shape {tuple(input_ids.shape)} as input_ids, found "
                f"{tuple(attention_mask.shape)}."
            )
        lengths, _ = self.layout.prefix(input_ids)
        allowed = lengths == 0 if whole_items else (lengths >= 0) & (lengths < self.layout.num_levels)
        allowed &= attention_mask[:, -1].bool()
        if not allowed.all():
            row = int((~allowed).nonzero()[0])
            raise ValueError(
                f"Row {row} ends in token {int(input_ids[row, -1])}, after which no item begins: a history ends in <bos> or "
                f"in a behaviour, tokens {self.layout.history_end_ids}. Pad on the left, and give every item its behaviour."
            )
        rows, codes = self.layout.history_codes(input_ids)
        unknown = self.catalogue.trie.lookup(codes) < 0
        if unknown.any():
            first = int(unknown.nonzero()[0])
            raise ValueError(
                f"{int(unknown.sum())} items of the histories are not in the catalogue; the first is spelt "
                f"{codes[first].tolist()} in row {int(rows[first])}. Tokenizer and model do not belong together."
            )
        return attention_mask

    def _check_cache(self, cache: Cache) -> None:
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"Expected a DynamicCache, on which beams and candidates are packed and taken off again, found "
                f"{type(cache).__name__}."
            )

    def _read_history(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, past_key_values: DynamicCache
    ) -> torch.FloatTensor:
        """
        Runs what the cache lacks of the histories; the output at their last token, `[batch_size, hidden_size]`. If it
        lacks nothing, that token is run once more beside itself, and the cache left as it was.
        """
        self._check_cache(past_key_values)
        cached, length = past_key_values.get_seq_length(), input_ids.shape[1]
        if cached > length:
            raise ValueError(f"Expected a cache of at most the {length} tokens of input_ids, found one of {cached}.")
        if cached < length:
            outputs = self.model(
                input_ids[:, cached:], attention_mask, past_key_values=past_key_values, use_cache=True
            )
            return outputs.last_hidden_state[:, -1]
        mask = attention_mask.bool().clone()
        mask[:, -1] = False
        try:
            outputs = self.model(
                input_ids[:, -1:],
                self._prepare_mask(nn.functional.pad(mask, (0, 1), value=True)[:, None, None]),
                position_ids=attention_mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=past_key_values,
                use_cache=True,
            )
        finally:
            past_key_values.crop(length - past_key_values.get_seq_length())
        return outputs.last_hidden_state[:, -1]

    def _check_length(self, length: int) -> None:
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ValueError(
                f"History and item take {length} positions, the backbone has {longest}. Keep fewer items of the history "
                "(`tokenizer.encode_history(..., max_items=...)`)."
            )

    def _search_items(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        past_key_values: Cache,
        num_beams: int,
        item_filter: ItemFilter | None = None,
        logits_processor: LogitsProcessorList | None = None,
        max_steps: int | None = None,
    ) -> tuple[Beams, torch.FloatTensor]:
        """
        Beam search over the items, each request's beams packed in one row on the request's cache.

        The history is run once a request; a step runs one token a beam under a mask of its ancestry, so that nothing is
        copied or reordered. The cache afterwards holds the history, whatever it held of it before.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`): Checked histories.
            past_key_values (`Cache`): Empty, or with the first tokens of the histories.
            logits_processor (`LogitsProcessorList`, *optional*): The user's own, called as stock beam search does, on
                `[batch_size * K, T + steps]` tokens and log-probabilities over the vocabulary.
            max_steps (`int`, *optional*): Stop before the items are whole.

        Returns:
            The beams, and the backbone's output at the last token of each history, `[batch_size, hidden_size]`.
        """
        layout, trie = self.layout, self.catalogue.trie
        batch_size, length = input_ids.shape
        lengths, prefix = layout.prefix(input_ids)
        begun = int(lengths[0])
        if (lengths != begun).any():
            raise ValueError(
                f"Rows end in unfinished items of {lengths.unique().tolist()} codes. Search rows of one length together."
            )
        self._check_length(length + layout.num_levels - begun)
        history_states = self._read_history(input_ids, attention_mask, past_key_values)
        states = history_states[:, None]

        nodes = trie.descend(prefix, begun)[:, None]
        codes = torch.empty(batch_size, 1, 0, dtype=torch.long, device=input_ids.device)
        beams = Beams(nodes, codes, torch.zeros(nodes.shape, device=input_ids.device))
        history_length = attention_mask.sum(dim=1, keepdim=True)
        # Where on the cache the tokens of each beam's own codes are: [batch_size, K, codes so far].
        ancestors = codes
        last = layout.num_levels if max_steps is None else min(layout.num_levels, begun + max_steps)
        try:
            for level in range(begun, last):
                if level > begun:
                    token_ids = beams.codes[..., -1] + layout.code_offsets[level - 1]
                    start, width = past_key_values.get_seq_length(), token_ids.shape[1]
                    own = torch.arange(start, start + width, device=input_ids.device).expand(batch_size, -1)[..., None]
                    ancestors = torch.cat([ancestors, own], dim=2)
                    mask = attention_mask.bool()[:, None].expand(-1, width, -1)
                    mask = nn.functional.pad(mask, (0, start + width - length)).scatter(2, ancestors, True)
                    states = self.model(
                        token_ids,
                        self._prepare_mask(mask[:, None]),
                        position_ids=(history_length + level - begun - 1).expand(-1, width),
                        past_key_values=past_key_values,
                        use_cache=True,
                    ).last_hidden_state
                logits = self.lm_head(states)[..., layout.level_slice(level)]
                log_probs = logits.float().log_softmax(dim=-1)
                if logits_processor:
                    log_probs = self._process(logits_processor, input_ids, beams, level, log_probs)
                beams, parent = expand_beams(trie, level, beams, log_probs, num_beams, item_filter)
                ancestors = ancestors.gather(1, parent[..., None].expand(-1, -1, ancestors.shape[2]))
        finally:
            past_key_values.crop(length - past_key_values.get_seq_length())
        return beams, history_states

    def _process(self, processors, input_ids, beams: Beams, level: int, log_probs: torch.Tensor) -> torch.Tensor:
        """Runs logits processors that know only rows of tokens and scores over the whole vocabulary."""
        offsets = self.layout.code_offsets[level - beams.codes.shape[2] : level]
        tokens = (beams.codes + beams.codes.new_tensor(offsets)).flatten(0, 1)
        sequences = torch.cat([input_ids.repeat_interleave(beams.nodes.shape[1], dim=0), tokens], dim=1)
        scores = torch.full((len(sequences), self.config.vocab_size), -torch.inf, device=log_probs.device)
        codes = self.layout.level_slice(level)
        parent, _, code = self.catalogue.trie.children(level, beams.nodes.flatten())
        scores[parent, code + codes.start] = log_probs.flatten(0, 1)[parent, code]
        return processors(sequences, scores)[:, codes].view_as(log_probs)

    def _beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs
    ):
        """Stock beam search, from one prefill a request and without copies of its cache (`_search_items`)."""
        asked_for = [
            name
            for name in ("do_sample", "output_attentions", "output_hidden_states", "output_logits")
            if getattr(generation_config, name)
        ]
        cache = model_kwargs.get("past_key_values")
        if "inputs_embeds" in model_kwargs:
            asked_for.append("inputs_embeds")
        if synced_gpus:
            asked_for.append("synced_gpus")
        if cache is not None and not isinstance(cache, DynamicCache):
            asked_for.append(type(cache).__name__)
        if asked_for:
            logger.warning_once(f"{', '.join(asked_for)}: stock beam search is used, which is many times slower.")
            return super()._beam_search(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
            )
        num_beams, num_return = generation_config.num_beams, generation_config.num_return_sequences
        input_ids = input_ids[::num_beams]
        attention_mask = model_kwargs.get("attention_mask")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[::num_beams]
        beams, _ = self._search_items(
            input_ids,
            attention_mask,
            DynamicCache() if cache is None else cache,
            num_beams,
            logits_processor=LogitsProcessorList(
                processor for processor in logits_processor if not isinstance(processor, TrieLogitsProcessor)
            ),
            max_steps=generation_config.max_length - input_ids.shape[1],
        )
        keep = min(num_return, beams.nodes.shape[1])
        steps = beams.codes.shape[2]
        begun = int(self.layout.prefix(input_ids[:1])[0])
        tokens = beams.codes[:, :keep] + beams.codes.new_tensor(self.layout.code_offsets[begun : begun + steps])
        scores = beams.scores[:, :keep] / steps**generation_config.length_penalty
        # A request with fewer items than the others keeps its rows; they say so.
        tokens = tokens.masked_fill(scores[..., None] == -torch.inf, self.config.pad_token_id)
        sequences = torch.cat([input_ids[:, None].expand(-1, keep, -1), tokens], dim=2).flatten(0, 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=scores.flatten() if generation_config.output_scores else None,
            past_key_values=cache,
        )

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        num_beams: int | None = None,
        num_return_sequences: int = 10,
        ranking_weight: float | None = None,
        ranking_target: str | None = None,
        exclude_history: bool = False,
        allowed_items: list | None = None,
        blocked_items: list | None = None,
        past_key_values: Cache | None = None,
    ) -> UniGRFRecommendation:
        """
        The next items of each history: one prefill, beams on its cache, ranking on the same cache, fused scores
        `log P(item | history) + ranking_weight * log sigmoid(rank)` (RecoChain, inference).

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, T)`): Histories, left-padded.
            attention_mask (`torch.LongTensor` of shape `(batch_size, T)`, *optional*)
            num_beams (`int`, *optional*): Candidates generated and ranked a request; `generation_config.num_beams` by
                default.
            num_return_sequences (`int`): Items returned, at most `num_beams`.
            ranking_weight (`float`, *optional*): `config.ranking_weight` by default; 0 orders by generation alone.
            ranking_target (`str`, *optional*): One of `config.ranking_targets`, by default the first.
            exclude_history (`bool`): Leave out the items of the history itself.
            allowed_items, blocked_items (`list` of `batch_size` lists or tensors of item indices, *optional*): Per
                request. They hold inside the search: a beam never spends itself on an item that may not be shown.
            past_key_values (`Cache`, *optional*): With the first tokens of these histories, or all of them.

        Returns:
            `UniGRFRecommendation`

        Raises:
            ValueError: on histories that no item can follow, unknown targets or items, lists that leave no item.
        """
        targets = self.config.ranking_targets
        num_beams = self.generation_config.num_beams if num_beams is None else num_beams
        ranking_target = targets[0] if ranking_target is None else ranking_target
        if ranking_target not in targets:
            raise ValueError(f"Expected a ranking_target among {targets}, found {ranking_target!r}.")
        if not 1 <= num_return_sequences <= num_beams:
            raise ValueError(
                f"Expected 1 <= num_return_sequences <= num_beams, found {num_return_sequences} and {num_beams}."
            )
        for name, lists in (("allowed_items", allowed_items), ("blocked_items", blocked_items)):
            if lists is not None and len(lists) != len(input_ids):
                raise ValueError(
                    f"Expected {name} with one list for each of {len(input_ids)} requests, found {len(lists)}."
                )
        attention_mask = self._check_histories(input_ids, attention_mask, whole_items=True)
        if exclude_history:
            blocked_items = self._with_history(input_ids, blocked_items)
        item_filter = None
        if allowed_items is not None or blocked_items is not None:
            item_filter = ItemFilter(self.catalogue.trie, allowed_items, blocked_items)

        cache = DynamicCache() if past_key_values is None else past_key_values
        beams, states = self._search_items(input_ids, attention_mask, cache, num_beams, item_filter)
        items = self.catalogue.trie.leaf_items[beams.nodes]
        logits = self.rank(input_ids, attention_mask, items, past_key_values=cache, history_states=states)
        ranking_scores = nn.functional.logsigmoid(logits[..., targets.index(ranking_target)]).masked_fill(
            beams.scores == -torch.inf, -torch.inf
        )
        weight = self.config.ranking_weight if ranking_weight is None else ranking_weight
        scores = beams.scores + weight * ranking_scores if weight else beams.scores
        scores, best = scores.topk(min(num_return_sequences, scores.shape[1]), dim=1)
        return UniGRFRecommendation(
            item_indices=items.gather(1, best).masked_fill(scores == -torch.inf, -1),
            scores=scores,
            generation_scores=beams.scores.gather(1, best),
            ranking_scores=ranking_scores.gather(1, best),
        )

    def _with_history(self, input_ids: torch.LongTensor, blocked_items: list | None) -> list[torch.LongTensor]:
        rows, codes = self.layout.history_codes(input_ids)
        items = self.catalogue.trie.lookup(codes)
        blocked = [items[rows == row] for row in range(len(input_ids))]
        if blocked_items is None:
            return blocked
        extra = [torch.as_tensor(more, dtype=torch.long, device=items.device) for more in blocked_items]
        return [torch.cat(pair) for pair in zip(blocked, extra, strict=True)]

# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Generation: constrained beam search on one cache, behind `generate`."""

from copy import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
)
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput
from transformers.utils import logging

from .shared_prefix_unigrf import cache_rollback, check_cache, read_branches
from .trie_unigrf import CatalogTrie, ItemFilter

logger = logging.get_logger(__name__)


class TrieLogitsProcessor(LogitsProcessor):
    """
    Leaves the codes that continue some item, as log-probabilities within their level. Knows nothing of the beams: the
    node is found again from the unfinished item at the end of each row.
    """

    def __init__(self, layout, trie: CatalogTrie, pad_token_id: int):
        self.layout, self.trie, self.pad_token_id = layout, trie, pad_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids [n, T]`, `scores [n, vocab_size]` (logits or log-probabilities) -> `[n, vocab_size]`."""
        lengths, prefix, broken = self.layout.unfinished(input_ids)
        path = self.trie.nodes_of(nn.functional.pad(prefix, (0, 1), value=-1))
        nodes = nn.functional.pad(path, (1, 0)).gather(1, lengths.clamp(min=0)[:, None])[:, 0]
        # A finished row, or a beam for which stock search found no item; `generate` fills both up.
        done = broken | (lengths < 0) | (nodes < 0)
        out = torch.full_like(scores, -torch.inf)
        out[done, self.pad_token_id] = 0.0
        for length in lengths[~done].unique().tolist():
            rows = (~done & (lengths == length)).nonzero()[:, 0]
            level = self.layout.level_slice(length)
            log_probs = scores[rows, level].log_softmax(dim=-1)
            parent, _, code = self.trie.levels[length].children(nodes[rows])
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
        keys (`torch.LongTensor` of shape `(batch_size, K, steps - 1)`): Where on the cache the codes are that were run.
    """

    nodes: torch.LongTensor
    codes: torch.LongTensor
    scores: torch.FloatTensor
    keys: torch.LongTensor


class UniGRFGenerationMixin(GenerationMixin):
    """What `UniGRFForCausalLM` can do at inference beyond a forward. Needs `layout`, `catalog`, `model` and heads."""

    @property
    def _generation_defaults(self) -> dict:
        """What `generation_config` has where nobody set it."""
        return {
            "max_new_tokens": self.config.num_levels,
            "num_beams": 10,
            "do_sample": False,
            "length_penalty": 0.0,
            "pad_token_id": self.config.pad_token_id,
            "eos_token_id": self.config.eos_token_id,  # never generated; without it the Trainer would "align" it
            "bos_token_id": self.config.bos_token_id,
        }

    @property
    def _num_beams(self) -> int:
        return self.generation_config.num_beams or self._generation_defaults["num_beams"]

    def adjust_generation_fn(self, *args, **kwargs):
        """As `from_pretrained` calls it. A folder may have no `generation_config.json`, or one that says little."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config.update(**self._generation_defaults, defaults_only=True)
        self.generation_config._from_model_config = False

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Ours first; another catalog's, if `generate` was given one."""
        processors = super()._get_logits_processor(*args, **kwargs)
        first = [one for one in processors if isinstance(one, TrieLogitsProcessor)]
        first = first or [TrieLogitsProcessor(self.layout, self.catalog.trie, self.config.pad_token_id)]
        return LogitsProcessorList([*first, *(one for one in processors if not isinstance(one, TrieLogitsProcessor))])

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """A cache that forgets nothing, where none was asked for: windows are a matter of the masks."""
        wanted = generation_config.cache_implementation is None and generation_config.use_cache is not False
        if wanted and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = DynamicCache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        criteria.append(ItemComplete(self.layout))
        return criteria

    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        catalog: CatalogTrie | None = None,
        **kwargs,
    ):
        """
        `GenerationMixin.generate`: the next item of each history, among the items that exist, without a logits processor of yours.
        Every row must end in a bos, a behavior or the first codes of an item; the rest of that item is generated.

        With `num_beams=K, num_return_sequences=R` the best items come first, as many as there are and at most R a row;
        `output_scores=True, return_dict_in_generate=True` adds `sequences_scores`, the items' log-probabilities, but neither the
        `scores` of every step nor `beam_indices`, which stock beam search has.

        Args:
            catalog (`CatalogTrie`, *optional*): Generate only items of this part of the catalog, made by
                `model.catalog.subset(items)`; the histories may hold any item.

        Raises:
            ValueError: if a row is empty, ends in a whole item, or begins an item that does not exist; on items to block, which
                `recommend` takes; on a `catalog` of another device.
        """
        # Of `forward`, which reads them in training: nothing here would.
        for name in ("blocked_items", "candidates", "hard_negatives", "excluded_positives"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"Expected no {name} in `generate`, which does not read any, found some. Use `recommend(..., blocked_items=..., "
                    "allowed_items=...)`, or `generate(..., catalog=model.catalog.subset(items))`."
                )
        trie = self.catalog.trie
        if catalog is not None:
            self._check_catalog(catalog)
            trie = catalog
            processor = TrieLogitsProcessor(self.layout, trie, self.config.pad_token_id)
            kwargs["logits_processor"] = LogitsProcessorList([processor, *(kwargs.get("logits_processor") or [])])
        input_ids = kwargs.get("input_ids", inputs)
        if input_ids is not None:
            self._check_histories(input_ids, kwargs.get("attention_mask"), whole_items=False)
            lengths, prefix = self.layout.prefix(input_ids)
            for length in lengths.unique().tolist():
                trie.descend(prefix[lengths == length], length)  # raises where no item begins so
        return super().generate(inputs, generation_config, **kwargs)

    def _check_catalog(self, catalog: CatalogTrie) -> None:
        """Refuses a part of the catalog that was made before the model was moved; raises `ValueError`."""
        if catalog.leaf_items.device != self.catalog.item_codes.device:
            raise ValueError(
                f"Expected a catalog on {self.catalog.item_codes.device} as the model, found one on "
                f"{catalog.leaf_items.device}. Make it with `model.catalog.subset(items)` after the model was moved."
            )

    def _check_histories(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None, whole_items: bool
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """
        Refuses histories that cannot be continued by an item. Returns the attention mask (made, if there was none) and the
        n items of the histories: rows `[n]` and item indices `[n]`.
        """
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"Expected input_ids of shape (batch_size, sequence_length), neither of them 0, found {tuple(input_ids.shape)}."
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
                f"in a behavior, tokens {self.layout.history_end_ids}. Pad on the left, and give every item its behavior."
            )
        needed = int(attention_mask.sum(dim=1).max()) + self.layout.num_levels - int(lengths.min())
        needed += self.config.num_block_tokens if whole_items else 0
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and needed > longest:
            raise ValueError(
                f"History and item take {needed} positions, the backbone has {longest}. Keep fewer items of the history "
                "(`tokenizer.encode_history(..., max_items=...)`)."
            )
        rows, codes = self.layout.history_codes(input_ids)
        items = self.catalog.trie.lookup(codes)
        unknown = items < 0
        if unknown.any():
            first = int(unknown.nonzero()[0])
            raise ValueError(
                f"{int(unknown.sum())} items of the histories are not in the catalog; the first is spelt "
                f"{codes[first].tolist()} in row {int(rows[first])}. Tokenizer and model do not belong together, or the history "
                "was cut inside an item."
            )
        return attention_mask, rows, items

    def prepare_inputs_for_generation(self, input_ids, timestamps=None, query_time=None, **kwargs):
        """As every decoder of transformers; all codes of the next item have the request's time."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if timestamps is not None:
            query_time = timestamps[:, -1:] if query_time is None else query_time[:, None]
            times = torch.cat([timestamps, query_time.expand(-1, input_ids.shape[1] + 1 - timestamps.shape[1])], dim=1)
            length = inputs["input_ids"].shape[1]
            inputs |= {"timestamps": times[:, -length - 1 : -1], "target_timestamps": times[:, -length:]}
        return inputs

    @staticmethod
    def _check_timestamps(
        input_ids: torch.LongTensor, timestamps: torch.LongTensor | None, query_time: torch.LongTensor | None
    ) -> torch.LongTensor | None:
        """`query_time [B]`, by default the last token's; None without `timestamps [B, T]`; raises `ValueError`."""
        if timestamps is None and query_time is None:
            return None
        if timestamps is None or timestamps.shape != input_ids.shape:
            found = "none" if timestamps is None else tuple(timestamps.shape)
            raise ValueError(
                f"Expected timestamps of shape {tuple(input_ids.shape)} as input_ids, found {found}. "
                "`tokenizer.encode_history(..., timestamps=...)` makes them."
            )
        if query_time is None:
            return timestamps[:, -1]
        if query_time.shape != input_ids.shape[:1]:
            raise ValueError(
                f"Expected query_time of shape ({len(input_ids)},), one a row, found {tuple(query_time.shape)}."
            )
        return query_time

    def prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        cache: DynamicCache,
        timestamps: torch.LongTensor | None = None,
        query_time: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Runs what the cache lacks of the histories; the output at their last token, `[batch_size, hidden_size]`. If it
        lacks nothing, that token is run once more beside itself, and the cache left as it was.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`): Histories, left-padded.
            cache (`DynamicCache`): With the first of their tokens, all or none; holds all of them afterwards, unless this fails.
            timestamps (`torch.LongTensor` of shape `(batch_size, T)`), query_time (`torch.LongTensor` of shape
                `(batch_size,)`, *optional*): As `recommend` takes them, both or none.
        """
        check_cache(cache)
        cached, length = cache.get_seq_length(), input_ids.shape[1]
        if cached > length:
            raise ValueError(f"Expected a cache of at most the {length} tokens of input_ids, found one of {cached}.")
        times = None
        if timestamps is not None:
            times = torch.cat([timestamps, query_time[:, None]], dim=1)
        vectors = self.history_item_representations(input_ids)
        if cached < length:
            arguments = {} if vectors is None else {"item_representations": vectors[:, cached:]}
            if times is not None:
                arguments |= {"timestamps": times[:, cached:-1], "target_timestamps": times[:, cached + 1 :]}
            with cache_rollback(cache, unless_it_works=True):
                outputs = self.model(input_ids[:, cached:], attention_mask, cache=cache, use_cache=True, **arguments)
            return outputs.last_hidden_state[:, -1]
        before = attention_mask.bool().clone()
        before[:, -1] = False
        nothing = input_ids.new_empty(len(input_ids), 1, 0)
        tokens = self.get_input_embeddings()(input_ids[:, -1:])
        tokens = tokens if vectors is None else tokens + vectors[:, -1:]
        with cache_rollback(cache):
            states, _ = read_branches(
                self.model,
                None,
                before,
                nothing,
                cache,
                None if times is None else times[:, -2:],
                inputs_embeds=tokens[:, :, None],
            )
        return states[:, 0, 0]

    def _search_items(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        history_states: torch.FloatTensor,
        cache: DynamicCache,
        num_beams: int,
        trie: CatalogTrie,
        item_filter: ItemFilter | None = None,
        logits_processor: LogitsProcessorList | None = None,
        max_steps: int | None = None,
        query_time: torch.LongTensor | None = None,
    ) -> Beams:
        """
        Beam search over the items: a step runs one token a beam on the histories' cache, on which nothing is copied or
        reordered, and keeps the best of the children that exist.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, T)`): Checked histories.
            history_states (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): Output at their last tokens.
            cache (`DynamicCache`): Of the histories. The codes that were run are left on it (`Beams.keys`).
            logits_processor (`LogitsProcessorList`, *optional*): The user's own, called as stock beam search does, on
                `[batch_size * num_beams, T + steps]` tokens and log-probabilities over the vocabulary.
            max_steps (`int`, *optional*): Stop before the items are whole.
            query_time (`torch.LongTensor` of shape `(batch_size,)`, *optional*): When the next item is.
        """
        times = None if query_time is None else query_time[:, None].expand(-1, 2)
        layout, history_mask = self.layout, attention_mask.bool()
        lengths, prefix = layout.prefix(input_ids)
        begun = int(lengths[0])
        if (lengths != begun).any():
            raise ValueError(
                f"Rows end in unfinished items of {lengths.unique().tolist()} codes. Search rows of one length together."
            )
        nodes = trie.descend(prefix, begun)[:, None]
        nothing = input_ids.new_empty(len(input_ids), 1, 0)
        beams = Beams(nodes, nothing, history_states.new_zeros(nodes.shape, dtype=torch.float32), nothing)
        states = history_states[:, None]
        last = layout.num_levels if max_steps is None else min(layout.num_levels, begun + max_steps)
        for level in range(begun, last):
            if level > begun:
                tokens = beams.codes[..., -1:] + layout.code_offsets[level - 1]
                states, beams.keys = read_branches(self.model, tokens, history_mask, beams.keys, cache, times)
                states = states[:, :, 0]
            log_probs = self.code_logits(states, layout.level_slice(level)).float().log_softmax(dim=-1)
            if logits_processor:
                log_probs = self._process(logits_processor, input_ids, beams, trie, level, log_probs, num_beams)
            scores, parent, nodes, code = trie.best_children(
                level, beams.nodes, beams.scores, log_probs, num_beams, item_filter
            )
            codes, keys = (
                column.gather(1, parent[..., None].expand(-1, -1, column.shape[2]))
                for column in (beams.codes, beams.keys)
            )
            beams = Beams(nodes, torch.cat([codes, code[..., None]], dim=2), scores, keys)
        return beams

    def _process(
        self,
        processors,
        input_ids,
        beams: Beams,
        trie: CatalogTrie,
        level: int,
        log_probs: torch.Tensor,
        num_beams: int,
    ) -> torch.Tensor:
        """
        Runs logits processors that know only rows of tokens and scores over the whole vocabulary, `num_beams` rows a request
        (`prefix_allowed_tokens_fn` counts on it): where the search has fewer beams, its last one fills them up.
        """
        count = beams.nodes.shape[1]
        filled = torch.arange(num_beams, device=input_ids.device).clamp(max=count - 1)
        offsets = self.layout.code_offsets[level - beams.codes.shape[2] : level]
        tokens = (beams.codes + beams.codes.new_tensor(offsets))[:, filled].flatten(0, 1)
        sequences = torch.cat([input_ids.repeat_interleave(num_beams, dim=0), tokens], dim=1)
        scores = torch.full((len(sequences), self.config.vocab_size), -torch.inf, device=log_probs.device)
        codes = self.layout.level_slice(level)
        parent, _, code = trie.levels[level].children(beams.nodes[:, filled].flatten())
        scores[parent, code + codes.start] = log_probs[:, filled].flatten(0, 1)[parent, code]
        return processors(sequences, scores)[:, codes].unflatten(0, (-1, num_beams))[:, :count]

    def _beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs
    ):
        """Stock beam search, from one prefill a request and without copies of its cache (`_search_items`)."""
        unsupported = [
            name
            for name in ("do_sample", "output_attentions", "output_hidden_states", "output_logits")
            if getattr(generation_config, name)
        ]
        if getattr(self.prepare_inputs_for_generation, "__self__", None) is not self:
            # PEFT puts its virtual tokens before a history there, and before every step again if there is a cache.
            unsupported.append("prompt learning")
            model_kwargs = {**model_kwargs, "use_cache": False}
            model_kwargs.pop("cache", None)
        hooks = (hook for module in self.modules() for hook in module._forward_pre_hooks.values())
        if any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks):
            unsupported.append("adapter_names")  # PEFT's, one a beam
        cache = model_kwargs.get("cache")
        if synced_gpus:
            unsupported.append("synced_gpus")
        known = (ItemComplete, MaxLengthCriteria, EosTokenCriteria)  # an item has no eos
        unsupported += [type(one).__name__ for one in stopping_criteria if not isinstance(one, known)]
        try:
            cache = DynamicCache() if cache is None else cache
            check_cache(cache)
        except ValueError:
            unsupported.append(type(cache).__name__)
        if unsupported:
            logger.warning_once(f"{', '.join(unsupported)}: stock beam search is used, which is many times slower.")
            return self._stock_beam_search(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
            )
        num_beams, num_return = generation_config.num_beams, generation_config.num_return_sequences
        input_ids = input_ids[::num_beams]
        attention_mask = model_kwargs.get("attention_mask")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[::num_beams]
        timestamps, query_time = (
            None if model_kwargs.get(name) is None else model_kwargs[name][::num_beams]
            for name in ("timestamps", "query_time")
        )
        query_time = self._check_timestamps(input_ids, timestamps, query_time)
        history_states = self.prefill(input_ids, attention_mask, cache, timestamps, query_time)
        with cache_rollback(cache):
            beams = self._search_items(
                input_ids,
                attention_mask,
                history_states,
                cache,
                num_beams,
                next(one.trie for one in logits_processor if isinstance(one, TrieLogitsProcessor)),
                logits_processor=LogitsProcessorList(
                    one for one in logits_processor if not isinstance(one, TrieLogitsProcessor)
                ),
                max_steps=generation_config.max_length - input_ids.shape[1],
                query_time=query_time,
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
            cache=cache,
        )

    def _stock_beam_search(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        """
        Stock beam search. Of fewer items than beams it makes the same ones again or none at all, of scores about -1e9: these
        are filled up, and their scores say so.
        """
        config = copy(generation_config)
        config.return_dict_in_generate = config.output_scores = True
        found = super()._beam_search(input_ids, logits_processor, stopping_criteria, config, *args, **kwargs)
        nothing = found.sequences_scores < -1e8
        found.sequences[nothing, input_ids.shape[1] :] = self.config.pad_token_id
        found.sequences_scores[nothing] = -torch.inf
        if not generation_config.return_dict_in_generate:
            return found.sequences
        if not generation_config.output_scores:
            found = type(found)(**{name: one for name, one in found.items() if "scores" not in name})
        return found

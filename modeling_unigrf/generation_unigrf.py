# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""Generation: transformers' hooks, by which `generate` searches among the items that exist.

`generate(num_beams=K)` runs `beam_search` (`beam_search_unigrf.py`) in place of stock beam search. With options that
this search lacks, `generate` falls back on stock beam search and logs a warning. In every mode `TrieLogitsProcessor`
leaves only codes that continue an item, whatever other logits processors do.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput
from transformers.utils import logging

from .beam_search_unigrf import Beams, SearchSpace, beam_search
from .configuration_unigrf import UniGRFConfig
from .inputs_unigrf import History, check_history, check_times
from .layout_unigrf import ItemLayout
from .loading_unigrf import check_generation_config
from .old_names_unigrf import convert_old_inputs
from .recommendation_unigrf import serving_defaults
from .shared_prefix_unigrf import cache_rollback, check_cache, check_cached_tokens, prefill, record_tokens
from .trie_unigrf import CatalogTrie, check_scores

logger = logging.get_logger(__name__)

# The search lacks these options: `generate` falls back on stock beam search.
STOCK_OPTIONS = ("do_sample", "output_attentions", "output_hidden_states", "output_logits")
TRAINING_INPUTS = ("item_sets", "labels", "candidates", "hard_negatives", "excluded_positives", "blocked_items")


def process_open_codes(
    processors: LogitsProcessorList, input_ids: torch.LongTensor, scores: torch.FloatTensor
) -> torch.FloatTensor:
    """
    Call other logits processors on `scores [n, vocab_size]` of the rows `input_ids [n, T]`.

    Codes that the trie has closed, with scores of -inf, stay closed.

    Raises:
        ValueError: for scores of NaN or infinity, before or after the call.
    """
    is_closed = scores == -torch.inf
    is_bad = ~(scores < torch.inf).all()
    scores = processors(input_ids, scores).masked_fill(is_closed, -torch.inf)
    check_scores("scores", is_bad | ~(scores < torch.inf).all())
    return scores


class TrieLogitsProcessor(LogitsProcessor):
    """
    Leave the codes that continue an item, as log-probabilities within their level, to the other logits processors.

    The processor has no access to beams, so it looks up the trie node of the unfinished item at the end of each row.

    Args:
        layout (`ItemLayout`): The order of the tokens.
        trie (`CatalogTrie`): The items that exist.
        pad_token_id (`int`): The only token that the processor leaves to a finished row.
        others (`Sequence[LogitsProcessor]`): Processors that follow. They cannot open a code that the trie closes.
        num_beams (`int`, defaults to 1): Rows of each request.
    """

    def __init__(
        self,
        layout: ItemLayout,
        trie: CatalogTrie,
        pad_token_id: int,
        others: Sequence[LogitsProcessor] = (),
        num_beams: int = 1,
    ):
        self.layout = layout
        self.trie = trie
        self.pad_token_id = pad_token_id
        self.others = LogitsProcessorList(others)
        self.num_beams = num_beams

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Process `scores [n, vocab_size]`, logits or log-probabilities, of the rows `input_ids [n, T]`.

        Raises:
            ValueError: for the reasons of `process_open_codes`, and if the other processors leave a request no code.
        """
        # The codes that continue an item.
        unfinished = self.layout.unfinished_items(input_ids)
        lengths = unfinished.lengths
        path = self.trie.nodes_of(nn.functional.pad(unfinished.codes, (0, 1), value=-1))
        nodes = nn.functional.pad(path, (1, 0)).gather(1, lengths.clamp(min=0)[:, None])[:, 0]
        # `generate` pads a finished row and a stock beam without an item.
        is_done = unfinished.is_broken | (lengths < 0) | (nodes < 0)
        processed = torch.full_like(scores, -torch.inf)
        processed[is_done, self.pad_token_id] = 0.0
        for length in lengths[~is_done].unique().tolist():
            rows = (~is_done & (lengths == length)).nonzero()[:, 0]
            codes = self.layout.level_slices[length]
            log_probs = scores[rows, codes].log_softmax(dim=-1)
            parent, _, code = self.trie.levels[length].children(nodes[rows])
            processed[rows[parent], code + codes.start] = log_probs[parent, code]

        # The other processors.
        processed = process_open_codes(self.others, input_ids, processed)
        has_code = (processed > -torch.inf).any(dim=1) | is_done
        check_items_are_left(has_code.view(-1, self.num_beams).any(dim=1))
        return processed


def check_items_are_left(has_item: torch.BoolTensor) -> None:
    """Raise `ValueError` unless `has_item [B]` is True for every request."""
    if not has_item.all():
        raise ValueError(
            "Logits processors and options of `generate` must leave each request an item of the catalog, got none for "
            f"request {int((~has_item).nonzero()[0])}. Allow all codes of an item, or pass "
            "`catalog=model.catalog.subset(items)`."
        )


class ItemComplete(StoppingCriteria):
    """Stop a row whose last token is the last code of an item."""

    def __init__(self, layout: ItemLayout):
        self.layout = layout

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """Return whether each row of `input_ids [n, T]` is done, `[n]`."""
        return self.layout.token_levels(input_ids[:, -1]) == self.layout.num_levels - 1


class BeamLogitsProcessors:
    """
    Call a user's logits processors as stock beam search calls them.

    The processors get rows of tokens and log-probabilities over the whole vocabulary. Each request has `num_beams`
    rows, which `prefix_allowed_tokens_fn` counts on.

    Args:
        processors (`LogitsProcessorList`): The user's processors.
        vocab_size (`int`): Size of the vocabulary.
        layout (`ItemLayout`): The order of the tokens.
        trie (`CatalogTrie`): The items that exist.
        input_ids (`torch.LongTensor` of shape `(batch_size, T)`): The histories.
        num_beams (`int`): Beams of each request.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        vocab_size: int,
        layout: ItemLayout,
        trie: CatalogTrie,
        input_ids: torch.LongTensor,
        num_beams: int,
    ):
        self.processors = processors
        self.vocab_size = vocab_size
        self.layout = layout
        self.trie = trie
        self.input_ids = input_ids
        self.num_beams = num_beams

    def __call__(self, beams: Beams, level: int, log_probs: torch.Tensor) -> torch.Tensor:
        """Process the log-probabilities of a level's codes, `[B, K, num_codes]`."""
        count = beams.nodes.shape[1]
        # Repeat the last beam: the search may have fewer than `num_beams`.
        filled = torch.arange(self.num_beams, device=log_probs.device).clamp(max=count - 1)
        offsets = self.layout.code_offsets[level - beams.codes.shape[2] : level]
        tokens = (beams.codes + beams.codes.new_tensor(offsets))[:, filled].flatten(0, 1)
        sequences = torch.cat([self.input_ids.repeat_interleave(self.num_beams, dim=0), tokens], dim=1)
        scores = torch.full((len(sequences), self.vocab_size), -torch.inf, device=log_probs.device)
        codes = self.layout.level_slices[level]
        parent, _, code = self.trie.levels[level].children(beams.nodes[:, filled].flatten())
        scores[parent, code + codes.start] = log_probs[:, filled].flatten(0, 1)[parent, code]
        scores = process_open_codes(self.processors, sequences, scores)
        return scores[:, codes].unflatten(0, (-1, self.num_beams))[:, :count]


class StepScores:
    """
    Record the scores of each step as stock beam search returns them, for `compute_transition_scores`.

    Args:
        process (`Callable`, *optional*): A user's logits processors, called as in `SearchSpace`. None: no processors.
        vocab_size (`int`): Size of the vocabulary.
        layout (`ItemLayout`): The order of the tokens.
        trie (`CatalogTrie`): The items that exist.
        num_beams (`int`): Beams of each request.
    """

    def __init__(self, process, vocab_size: int, layout: ItemLayout, trie: CatalogTrie, num_beams: int):
        self.process = process
        self.vocab_size = vocab_size
        self.layout = layout
        self.trie = trie
        self.num_beams = num_beams
        self.scores: tuple[torch.Tensor, ...] = ()
        # The codes of the beams before each step.
        self.codes: list[torch.Tensor] = []

    def __call__(self, beams: Beams, level: int, log_probs: torch.Tensor) -> torch.Tensor:
        """Process and record the log-probabilities of a level's codes, `[B, K, num_codes]`."""
        if self.process is not None:
            log_probs = self.process(beams, level, log_probs)
        batch_size, count = beams.nodes.shape
        scores = torch.full((batch_size, self.num_beams, self.vocab_size), -torch.inf, device=log_probs.device)
        parent, _, code = self.trie.levels[level].children(beams.nodes.flatten())
        row, beam = parent // count, parent % count
        scores[row, beam, code + self.layout.level_slices[level].start] = log_probs[row, beam, code].float()
        self.scores += (scores.flatten(0, 1),)
        self.codes.append(beams.codes)
        return log_probs

    def beam_indices(self, beams: Beams) -> torch.LongTensor:
        """Return the row of `scores` that each code of the beams comes from, `[B, K, steps]`; -1: no item."""
        columns = []
        for step, codes in enumerate(self.codes):
            is_parent = (codes[:, None] == beams.codes[:, :, None, :step]).all(dim=-1)
            columns.append(is_parent.int().argmax(dim=2))
        first = self.num_beams * torch.arange(len(beams.codes), device=beams.codes.device)
        rows = torch.stack(columns, dim=2) + first[:, None, None]
        return rows.masked_fill(beams.scores[..., None] == -torch.inf, -1)


def generation_defaults(config: UniGRFConfig) -> dict:
    """Return the fields of `generation_config` that a model needs, with their defaults."""
    return {
        "max_new_tokens": config.num_levels,
        "do_sample": False,
        "length_penalty": 0.0,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        # Never generated, but the Trainer would "align" a missing id.
        "eos_token_id": config.eos_token_id,
        **serving_defaults(),
    }


class UniGRFGenerationMixin(GenerationMixin):
    """The hooks of transformers' generation, for a model with `config`, `layout`, `catalog`, `model` and `scorer`."""

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, source, **kwargs):
        """Complete `generation_config`: a folder's generation_config.json may lack fields."""
        if generation_config is None and source is not None:
            check_generation_config(source, kwargs)
        super().adjust_generation_fn(generation_config, from_auto_class, from_pipeline, source, **kwargs)
        defaults = generation_defaults(self.config) | getattr(self.config, "old_serving_fields", {})
        missing = {
            name: value for name, value in defaults.items() if getattr(self.generation_config, name, None) is None
        }
        self.generation_config.update(**missing, allow_custom_entries=True)
        self.generation_config._from_model_config = False

    def _get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
        """Put all processors into the trie's: that of `generate(catalog=...)`, or of the whole catalog."""
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        tries = [processor.trie for processor in processors if isinstance(processor, TrieLogitsProcessor)]
        others = [processor for processor in processors if not isinstance(processor, TrieLogitsProcessor)]
        trie = tries[0] if tries else self.catalog.trie
        parts = (self.layout, trie, self.config.pad_token_id, others, generation_config.num_beams or 1)
        return LogitsProcessorList([TrieLogitsProcessor(*parts)])

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Take a cache without a window, unless the caller chose a cache: masks take care of sliding windows."""
        is_free = generation_config.cache_implementation is None and generation_config.use_cache is not False
        if is_free and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = DynamicCache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _get_stopping_criteria(
        self, generation_config, stopping_criteria=None, *args, **kwargs
    ) -> StoppingCriteriaList:
        """Stop each row at the end of an item, and reject what could stop a row inside an item."""
        eos = generation_config._eos_token_tensor
        codes = [] if eos is None else eos[self.layout.token_levels(eos) >= 0].tolist()
        early = {
            "stop_strings": generation_config.stop_strings,
            "max_time": generation_config.max_time,
            "stopping_criteria": [type(criterion).__name__ for criterion in stopping_criteria or []] or None,
            "eos_token_id": codes or None,
        }
        for name, value in early.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` must not stop a row inside an item, since every row stops at the end of an item, got "
                    f"{value!r}. Leave it out."
                )
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria or [], *args, **kwargs)
        criteria.append(ItemComplete(self.layout))
        return criteria

    def init_continuous_batching(self, *args, **kwargs):
        """
        Reject continuous batching, also from `generate_batch`.

        Raises:
            ValueError: always. Continuous batching would generate items that do not exist.
        """
        raise ValueError(
            "`generate_batch` and continuous batching must not be used, got a call: they drop the trie of the items "
            "that exist. Call `recommend` or `generate` with a left-padded batch."
        )

    def prepare_inputs_for_generation(self, input_ids, timestamps=None, query_time=None, **kwargs):
        """Prepare a step as every decoder of transformers does; all codes of the next item have the query time."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if timestamps is not None:
            query_time = timestamps[:, -1:] if query_time is None else query_time[:, None]
            count = input_ids.shape[1] + 1 - timestamps.shape[1]
            times = torch.cat([timestamps, query_time.expand(-1, count)], dim=1)
            length = inputs["input_ids"].shape[1]
            inputs |= {"timestamps": times[:, -length - 1 : -1], "target_timestamps": times[:, -length:]}
        return inputs

    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        catalog: CatalogTrie | None = None,
        **kwargs,
    ):
        """
        Generate the next item of each history, among the items that exist.

        Arguments without an entry here are those of `GenerationMixin.generate`. Every row must end in a bos, a
        behavior or the first codes of an item. The method generates the rest of the item.

        With `num_beams=K, num_return_sequences=R` the best items come first, at most R a row. The option
        `output_scores=True` adds `sequences_scores`, the items' log-probabilities, to the output of
        `return_dict_in_generate=True`. It also adds `scores` of each step and `beam_indices`, which
        `compute_transition_scores` reads.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, T)`): Histories, left-padded; also as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): Options of the search. None: the model's
                `generation_config`.
            catalog (`CatalogTrie`, *optional*): Generate only items of this part of the catalog, made by
                `model.catalog.subset(items)`. Histories may hold any item. None: the whole catalog.

        Raises:
            ValueError: if a row is empty, ends in a whole item, or begins an item that does not exist. Also for
                training inputs, for another `catalog`, for logits processors that leave a row no item, for
                what stops a row inside an item, and for scores that are not finite.
        """
        kwargs = convert_old_inputs(kwargs)
        catalog = kwargs.pop("catalog", catalog)
        # Training-only inputs; `generate` would ignore them, so reject them.
        if strange := [name for name in TRAINING_INPUTS if kwargs.get(name) is not None]:
            raise ValueError(
                f"`generate` must be called without {strange}, got some. Use `recommend(..., blocked_items=..., "
                "allowed_items=...)`, or `generate(..., catalog=model.catalog.subset(items))`."
            )
        trie = self.catalog.trie
        if catalog is not None:
            self.catalog.check_part(catalog)
            trie = catalog
            processor = TrieLogitsProcessor(self.layout, trie, self.config.pad_token_id)
            kwargs["logits_processor"] = LogitsProcessorList([processor, *(kwargs.get("logits_processor") or [])])
        input_ids = kwargs.get("input_ids", inputs)
        if input_ids is not None:
            names = ("attention_mask", "timestamps", "query_time")
            history = check_history(
                self.config,
                self.layout,
                self.catalog.trie,
                input_ids,
                *(kwargs.get(name) for name in names),
                may_be_unfinished=True,
                reads_long_history=False,
            )
            if isinstance(kwargs.get("cache"), DynamicCache):
                check_cached_tokens(kwargs["cache"], history)
            unfinished = self.layout.unfinished_items(input_ids)
            for length in unfinished.lengths.unique().tolist():
                # Raise here if no item begins with a row's codes.
                trie.descend(unfinished.codes[unfinished.lengths == length], length)
        return super().generate(inputs, generation_config, **kwargs)

    def _beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs
    ):
        """Search from one prefill a request, without copies of its cache; else fall back on stock beam search."""
        reasons = [name for name in STOCK_OPTIONS if getattr(generation_config, name)]
        if getattr(self.prepare_inputs_for_generation, "__self__", None) is not self:
            # Prompt learning adds virtual tokens there; with a cache, at every step.
            reasons.append("prompt learning")
            model_kwargs = {**model_kwargs, "use_cache": False}
            model_kwargs.pop("cache", None)
        cache = model_kwargs.get("cache")
        reasons += _unsupported(self, cache, synced_gpus)
        if reasons:
            logger.warning_once(f"{', '.join(reasons)}: stock beam search is used, which is many times slower.")
            config = copy(generation_config)
            config.return_dict_in_generate = config.output_scores = True
            output = super()._beam_search(
                input_ids, logits_processor, stopping_criteria, config, synced_gpus, **model_kwargs
            )
            # Stock beam search reorders the rows of its cache.
            record_tokens(output.cache, 0, None)
            return mark_missing_items(output, input_ids.shape[1], self.config.pad_token_id, generation_config)
        num_beams = generation_config.num_beams
        inputs = {
            name: None if model_kwargs.get(name) is None else model_kwargs[name][::num_beams]
            for name in ("attention_mask", "timestamps", "query_time")
        }
        input_ids = input_ids[::num_beams]
        if inputs["attention_mask"] is None:
            inputs["attention_mask"] = torch.ones_like(input_ids)
        inputs["query_time"] = check_times(input_ids, inputs["timestamps"], inputs["query_time"])
        cache = DynamicCache() if cache is None else cache
        beams, steps = search_with_processors(
            self.model, self.scorer, History(input_ids, **inputs), cache, logits_processor, generation_config
        )
        return as_stock_output(
            beams, steps, input_ids, self.layout, self.config.pad_token_id, generation_config, cache
        )

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        """Propose no tokens behind the item: each of them would be kept, as padding."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"`assistant_early_exit` must be None, got {generation_config.assistant_early_exit}: the backbone is "
                "too small to gain by it. Take prompt_lookup_num_tokens or an assistant_model, or leave it out."
            )
        config = copy(generation_config)
        num_left = self.layout.num_levels - int(self.layout.unfinished_items(input_ids).lengths[0])
        config.max_length = min(config.max_length, input_ids.shape[1] + num_left)
        return super()._assisted_decoding(input_ids, logits_processor, stopping_criteria, config, *args, **kwargs)


def _unsupported(model: nn.Module, cache, synced_gpus: bool) -> list[str]:
    """List the parts of a call that the search lacks, beside `STOCK_OPTIONS`, as names for a warning."""
    reasons = []
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    # PEFT expects an adapter's name for each beam.
    if any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks):
        reasons.append("adapter_names")
    if synced_gpus:
        reasons.append("synced_gpus")
    try:
        check_cache(DynamicCache() if cache is None else cache)
    except ValueError:
        reasons.append(type(cache).__name__)
    return reasons


def search_with_processors(
    backbone: nn.Module, scorer, history: History, cache, logits_processor, generation_config
) -> tuple[Beams, StepScores | None]:
    """
    Run `beam_search` with a user's logits processors.

    The cache holds the histories alone afterwards.

    Returns:
        The beams and, with `output_scores` of `return_dict_in_generate`, the scores of each step.

    Raises:
        ValueError: if the rows end in unfinished items of different lengths, or the processors leave a row no item.
    """
    layout = scorer.layout
    input_ids = history.input_ids
    num_beams = generation_config.num_beams
    trie = logits_processor[0].trie
    process = None
    if logits_processor[0].others:
        process = BeamLogitsProcessors(
            logits_processor[0].others, scorer.config.vocab_size, layout, trie, input_ids, num_beams
        )
    steps = None
    if generation_config.return_dict_in_generate and generation_config.output_scores:
        process = steps = StepScores(process, scorer.config.vocab_size, layout, trie, num_beams)
    unfinished = layout.unfinished_items(input_ids)
    num_codes = int(unfinished.lengths[0])
    if (unfinished.lengths != num_codes).any():
        raise ValueError(
            "`input_ids` of one search must end in equally many codes of an unfinished item, got "
            f"{unfinished.lengths.unique().tolist()}. Search rows of one length together."
        )
    max_steps = generation_config.max_length - input_ids.shape[1]
    space = SearchSpace(trie, None, unfinished.codes, num_codes, max_steps, process)
    history_states = prefill(backbone, history, scorer.history_representations(input_ids), cache)
    mask = history.attention_mask.bool()
    with cache_rollback(cache):
        beams = beam_search(backbone, scorer, space, history_states, mask, cache, num_beams, history.query_time)
    check_items_are_left(beams.scores[:, 0] > -torch.inf)
    return beams, steps


def as_stock_output(
    beams: Beams,
    step_scores: StepScores | None,
    input_ids: torch.LongTensor,
    layout: ItemLayout,
    pad_token_id: int,
    generation_config: GenerationConfig,
    cache: DynamicCache,
) -> torch.LongTensor | GenerateBeamDecoderOnlyOutput:
    """Return the best beams as stock beam search does; a row without an item is padding of score -inf."""
    count = min(generation_config.num_return_sequences, beams.nodes.shape[1])
    steps = beams.codes.shape[2]
    first = int(layout.unfinished_items(input_ids[:1]).lengths[0])
    tokens = beams.codes[:, :count] + beams.codes.new_tensor(layout.code_offsets[first : first + steps])
    scores = beams.scores[:, :count] / steps**generation_config.length_penalty
    tokens = tokens.masked_fill(scores[..., None] == -torch.inf, pad_token_id)
    sequences = torch.cat([input_ids[:, None].expand(-1, count, -1), tokens], dim=2).flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,
        sequences_scores=None if step_scores is None else scores.flatten(),
        scores=None if step_scores is None else step_scores.scores,
        beam_indices=None if step_scores is None else step_scores.beam_indices(beams)[:, :count].flatten(0, 1),
        cache=cache,
    )


def mark_missing_items(
    output: GenerateBeamDecoderOnlyOutput, length: int, pad_token_id: int, generation_config: GenerationConfig
) -> torch.LongTensor | GenerateBeamDecoderOnlyOutput:
    """
    Pad the rows of stock beam search that have no item, and set their scores to -inf.

    If there are fewer items than beams, stock beam search repeats items or makes none, with scores about -1e9.

    Args:
        output (`GenerateBeamDecoderOnlyOutput`): Output of stock beam search, changed in place.
        length (`int`): Tokens of a history.
        pad_token_id (`int`): The padding token.
        generation_config (`GenerationConfig`): The caller's options.

    Raises:
        ValueError: if a request has no item.
    """
    is_missing = output.sequences_scores < -1e8
    check_items_are_left(~is_missing.view(-1, generation_config.num_return_sequences).all(dim=1))
    output.sequences[is_missing, length:] = pad_token_id
    output.sequences_scores[is_missing] = -torch.inf
    output.beam_indices[is_missing] = -1
    if not generation_config.return_dict_in_generate:
        return output.sequences
    if not generation_config.output_scores:
        output = type(output)(**{name: value for name, value in output.items() if "scores" not in name})
    return output

# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""What an item is: how many codes spell it, which token ids they have, and which behaviors follow it."""

from copy import deepcopy
from itertools import accumulate, pairwise
from math import log

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_hstu import HSTUConfig  # noqa: F401  # so that AutoConfig knows it

NEXT_TARGET = "next"
# All of it, whichever class is saved: transformers itself would name only the class that it saves.
AUTO_MAP = {
    "AutoConfig": "configuration_unigrf.UniGRFConfig",
    "AutoModel": "modeling_unigrf.UniGRFModel",
    "AutoModelForCausalLM": "modeling_unigrf.UniGRFForCausalLM",
}


def _of_backbone(name: str) -> property:
    def get(config):
        return getattr(config.text_config, name)

    def put(config, value):
        setattr(config.text_config, name, value)

    return property(get, put)


@strict
class UniGRFConfig(PreTrainedConfig):
    r"""
    Configuration of a UniGRF model: one decoder-only backbone that generates and ranks items spelled as semantic ids.

    A history is the token sequence `<bos> s_1 .. s_L b  s_1 .. s_L b ...`: L codes an item, then the behavior on it.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The backbone: any decoder-only config that `AutoConfig` knows (tested: hstu, llama, qwen2, qwen3, gpt2, mistral,
            with and without sliding windows). A small Llama by default. Its `vocab_size` and special tokens are set from
            the fields below.
        codebook_sizes (`list[int]`, defaults to `[256, 256, 256, 1]`):
            Number of codes of each level; the last level makes every item's spelling unique. One level: atomic ids.
        code_offsets (`list[int]`, *optional*):
            Token id of code 0 of each level. Defaults to consecutive levels after the behaviors.
        behaviors (`list[str]`, defaults to `["interact"]`):
            Names of the behaviors that may follow an item.
        behavior_token_ids (`list[int]`, *optional*):
            Token id of each behavior. Defaults to consecutive ids from 4 (after pad, bos, eos, unk).
        code_similarity (`str`, defaults to `"dot"`):
            How a code's logit comes from the output and the code's row of `lm_head`: `"dot"`, or `"cosine"` of both (UniGRF
            with atomic ids: cosine, `code_temperature=0.05`, `tie_word_embeddings=True`).
        code_temperature (`float`, defaults to 1.0):
            The logits of the codes are divided by it.
        code_negatives (`int`, defaults to 0):
            In training, predict a code among itself and this many uniform codes of its level (sampled softmax) instead of
            all of them, if there are more; for levels of very many codes. 0: always all.
        share_code_negatives (`bool`, defaults to `True`):
            The same negatives for all positions of a batch, or others for each.
        given_negative_weight (`float`, defaults to 30.0):
            How often each of the `hard_negatives` that `forward` is given counts in a softmax of all atomic ids. (UniGRF
            puts 8 of them among 120 of MovieLens-1M's 3,706 items, each of which so stands for 30.)
        ranking_targets (`list[str]`, *optional*):
            What the ranking head scores: `"next"` (is this the next item?) and any of `behaviors` (which behavior will
            follow, if the item is shown?). Defaults to `"next"` and, if there are two behaviors or more, each of them.
        num_items (`int`, defaults to 1):
            Number of items of the catalog, which is saved with the model.
        content_embedding_dim (`int`, defaults to 0):
            Width of the item embeddings that item vectors are made of; the ranking head reads these. 0 for none.
        int8_content_embeddings (`bool`, defaults to `False`):
            Keep the item embeddings as int8, 127 for 1, in a quarter of the memory: for catalogs of many millions.
        project_content_embeddings (`bool`, defaults to `True`):
            Whether item vectors have a part that is made of the embeddings; else these only choose sub-histories.
        embedding_table_size (`int`, defaults to 0):
            Rows of a learned table that item vectors have as a second part; item i has row `i % embedding_table_size`. As many as
            items: a row for each, and `add_items` appends rows. Fewer: shared by hashing. 0 for none.
        history_item_representations (`bool`, defaults to `False`):
            Read every item of a history by its vector, too, which is added to the behavior behind its codes (RecoChain,
            section 1: the ITEM of a history block). Codes are shared between items; this is the item's own.
        negatives_per_item (`float`, defaults to 0.0):
            Random candidates for each supervised item, packed behind the histories in training, to train the `"next"`
            target. Without any its binary cross-entropy sees no item that did not come next.
        max_items (`int`, *optional*):
            Items of a history that the model was trained to read: what the pipeline keeps of one, the most recent, unless told
            otherwise. By default as many as there are positions for.
        num_retrieved_items (`int`, defaults to 0):
            Sub-history of a candidate: this many items of the user's long history (`long_items`), those of the greatest
            cosine of item embeddings, which ranking reads behind the candidate's codes (RecoChain, section 1). 0: the
            candidate is ranked from its last code. Needs `content_embedding_dim`.
        exclude_candidate (`bool`, defaults to `False`):
            Leave the candidate itself out of its sub-history.
        num_train_beams (`int`, defaults to 0):
            In training, rank this many items that the model's own beam search proposes for the last item of each row
            (RecoChain, stage II), the true one among them. Takes the place of `negatives_per_item`.
        inject_target (`bool`, defaults to `True`):
            Let the true item take the place of a random one of these where the search missed it. Without it the ranking is
            trained on exactly what it will be asked to rank, but rows whose true item was missed give no positive (of behaviors,
            neither). With it, an injected item is one that no search proposed: where most true items are missed, the model learns to
            recognize that.
        stop_gradient_history (`bool`, defaults to `False`):
            Keep the gradient of that ranking out of the history's keys, values and states.
        generation_loss_weight (`float`, defaults to 1.0):
            Weight of the generation loss; 0 for a ranker alone, which then does not compute it.
        ranking_loss_weight (`float`, defaults to 1.0):
            Weight of the ranking loss; 0 for a retriever alone, which then neither packs candidates nor computes it.
        dense_loss_weight (`float`, defaults to 0.0):
            Weight of a softmax over items, which trains the part of the `"next"` score that compares the history's end with
            item vectors. Needs `content_embedding_dim` or `embedding_table_size`.
        contrastive_loss_weight (`float`, defaults to 10.0):
            Weight of the softmax of a row's last item, of several codes, among the `hard_negatives` that `forward` is given: as
            many codes as it counts for.
        exclude_history (`bool`, defaults to `True`):
            Default of `recommend` and the pipeline: no item of the history is recommended.
        max_long_items (`int`, *optional*):
            Items of a long history that sub-histories are chosen from, the most recent: what the pipeline keeps of one, by default
            all.
        ranking_target (`str`, *optional*):
            Default of the ranking target that `recommend` orders by; the first of `ranking_targets`, if not given.
        ranking_weight (`float`, defaults to 1.0):
            Default weight of the ranking score in `recommend`: `log P + ranking_weight * log sigmoid(rank)`.
        dense_weight (`float`, defaults to 0.0):
            Default weight in `recommend` of the item-level score alone: the part of `"next"` that `dense_loss_weight` trains.
        num_dense_candidates (`int`, defaults to 0):
            Default number in `recommend` of items of the best item-level score that are ranked beside the beams.
        rerank_top_k (`int`, defaults to 0):
            Default number in `recommend` of beams that are ranked, the best by the other scores; 0: all.
        rank_by_dense_score (`bool`, defaults to `True`):
            Whether the item-level score is a part of the `"next"` logit, or only a score beside it.
        stop_gradient_dense_score (`bool`, defaults to `False`):
            Keep the gradient of the ranking out of the item-level score, which `dense_loss_weight` trains: a ranking of what a
            search found presses down the scores of just these items.
        retrieval_behaviors (`list[str]`, *optional*):
            Which behaviors on an item make it a positive of retrieval: in the means of the losses of codes and of items all others
            count 0. By default every next item is one (UniGRF, section on retrieval).
        ranking_dropout (`float`, defaults to 0.0):
            Dropout in the ranking head.
        embedding_dropout (`float`, defaults to 0.0):
            Dropout on the token embeddings, whatever the backbone: most of what keeps a small model from over-fitting.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights of the heads.

    Raises:
        ValueError: on items that cannot be spelt (token ids that overlap, a vocabulary that is too small), names and numbers that
            make no sense, and losses or candidates that lack what they need or exclude each other.
    """

    model_type = "unigrf"
    keys_to_ignore_at_inference = [
        "cache",
        "generation_loss",
        "ranking_loss",
        "dense_loss",
        "contrastive_loss",
        "gradient_norms",
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="llama",
            init_kwargs={
                "hidden_size": 256,
                "intermediate_size": 1024,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
        )
    }

    text_config: dict | PreTrainedConfig | None = None
    codebook_sizes: list[int] | tuple[int, ...] = (256, 256, 256, 1)
    code_offsets: list[int] | tuple[int, ...] | None = None
    behaviors: list[str] | tuple[str, ...] = ("interact",)
    behavior_token_ids: list[int] | tuple[int, ...] | None = None
    code_similarity: str = "dot"
    code_temperature: float | int = 1.0
    code_negatives: int = 0
    share_code_negatives: bool = True
    given_negative_weight: float | int = 30.0
    ranking_targets: list[str] | tuple[str, ...] | None = None
    num_items: int = 1
    content_embedding_dim: int = 0
    int8_content_embeddings: bool = False
    project_content_embeddings: bool = True
    embedding_table_size: int = 0
    history_item_representations: bool = False
    negatives_per_item: float | int = 0.0
    max_items: int | None = None
    num_retrieved_items: int = 0
    exclude_candidate: bool = False
    num_train_beams: int = 0
    inject_target: bool = True
    stop_gradient_history: bool = False
    generation_loss_weight: float | int = 1.0
    ranking_loss_weight: float | int = 1.0
    dense_loss_weight: float | int = 0.0
    contrastive_loss_weight: float | int = 10.0
    exclude_history: bool = True
    max_long_items: int | None = None
    ranking_target: str | None = None
    ranking_weight: float | int = 1.0
    dense_weight: float | int = 0.0
    num_dense_candidates: int = 0
    rerank_top_k: int = 0
    rank_by_dense_score: bool = True
    stop_gradient_dense_score: bool = False
    retrieval_behaviors: list[str] | tuple[str, ...] | None = None
    ranking_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        vocab_size = kwargs.pop("vocab_size", None)
        for name, value in vars(self).items():
            if isinstance(value, tuple):  # as a saved config would have them
                setattr(self, name, list(value))
        if self.behavior_token_ids is None:
            self.behavior_token_ids = list(range(4, 4 + len(self.behaviors)))
        if self.code_offsets is None:
            first = max([3, *self.behavior_token_ids]) + 1
            self.code_offsets = list(accumulate(self.codebook_sizes[:-1], initial=first))
        if self.ranking_targets is None:
            self.ranking_targets = [NEXT_TARGET, *(self.behaviors if len(self.behaviors) > 1 else [])]
        if vocab_size is None and isinstance(self.text_config, dict):
            vocab_size = self.text_config.get("vocab_size")
        if isinstance(self.text_config, dict) and "model_type" not in self.text_config:
            self.text_config = {"model_type": "llama", **self.text_config}
        elif isinstance(self.text_config, PreTrainedConfig):
            self.text_config = deepcopy(self.text_config)  # its vocabulary is set below, and another model may have it
        super().__post_init__(**kwargs)
        # The vocabulary is the spelling of the items: a backbone's own default (32,000 words) means nothing here.
        self.text_config.vocab_size = self.num_spelling_tokens if vocab_size is None else vocab_size
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self.text_config, name, getattr(self, name))
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        self.check_spelling()
        self.check_training()

    @property
    def num_levels(self) -> int:
        """Number of codes that spell one item."""
        return len(self.codebook_sizes)

    @property
    def num_spelling_tokens(self) -> int:
        """Number of token ids that specials, behaviors and codes need."""
        # Not strict: that there are as many of both is checked later, and said better.
        ends = [offset + size for offset, size in zip(self.code_offsets, self.codebook_sizes, strict=False)]
        return max([3, *self.behavior_token_ids, *(end - 1 for end in ends)]) + 1

    @property
    def max_history_items(self) -> int | None:
        """Items of a history that fit into the backbone's positions, beside <bos> and a candidate; None: no limit."""
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if positions is None:
            return None
        return (positions - 1 - self.num_levels - self.num_block_tokens) // (self.num_levels + 1)

    @property
    def next_logit_bias(self) -> float:
        """
        How much rarer the next item is among all items than among the candidates of training, 0 without random ones. `rank`
        subtracts it from the `"next"` logit (prior correction for case-control sampling: King and Zeng 2001, section 4.1),
        whose sigmoid is then the probability that the item, among all, comes next, on the scale of the generation score.
        """
        return log(max(1, self.num_items - 1) / self.negatives_per_item) if self.negatives_per_item else 0.0

    @property
    def reads_times(self) -> bool:
        """Whether the backbone takes `timestamps`."""
        return getattr(self.text_config, "num_time_buckets", 0) > 0

    @property
    def has_item_representations(self) -> bool:
        """Whether anything is known of an item beyond its codes."""
        return (self.content_embedding_dim > 0 and self.project_content_embeddings) or self.embedding_table_size > 0

    @property
    def num_block_tokens(self) -> int:
        """Most positions of a candidate behind its codes: item, sub-history, place of scoring; 0 without a sub-history."""
        return self.num_retrieved_items + 2 if self.num_retrieved_items else 0

    # The rest of transformers reads these from the outer config; they live in the backbone's.
    vocab_size = _of_backbone("vocab_size")
    hidden_size = _of_backbone("hidden_size")
    num_hidden_layers = _of_backbone("num_hidden_layers")
    num_attention_heads = _of_backbone("num_attention_heads")
    use_cache = _of_backbone("use_cache")

    def check_spelling(self):
        """Refuses items that cannot be spelt (here: `@strict` validators lose the `ValueError`)."""
        if not self.codebook_sizes or min(self.codebook_sizes) < 1 or len(self.code_offsets) != self.num_levels:
            raise ValueError(
                "Expected one positive codebook size and one code offset a level, found "
                f"codebook_sizes={self.codebook_sizes} and code_offsets={self.code_offsets}."
            )
        if not self.behaviors or len(self.behaviors) != len(self.behavior_token_ids):
            raise ValueError(
                f"Expected one token id a behavior and at least one behavior, found behaviors={self.behaviors} and "
                f"behavior_token_ids={self.behavior_token_ids}."
            )
        if NEXT_TARGET in self.behaviors:
            raise ValueError(f"A behavior may not be called {NEXT_TARGET!r}: that is a ranking target. Rename it.")
        singles = [self.pad_token_id, self.bos_token_id, self.eos_token_id, *self.behavior_token_ids]
        spans = sorted([*((i, 1) for i in singles), *zip(self.code_offsets, self.codebook_sizes, strict=True)])
        if any(start + length > following for (start, length), (following, _) in pairwise(spans)):
            raise ValueError(
                f"Token ids overlap: special tokens {singles[:3]}, behaviors {self.behavior_token_ids}, levels starting "
                f"at {self.code_offsets} with {self.codebook_sizes} codes. Take these fields from the tokenizer "
                "(`UniGRFConfig(**tokenizer.config_fields())`)."
            )
        if self.vocab_size < self.num_spelling_tokens:
            raise ValueError(
                f"Expected a vocabulary of at least {self.num_spelling_tokens} tokens to spell the items, found "
                f"vocab_size={self.vocab_size}."
            )
        if self.num_items < 1:
            raise ValueError(f"Expected a catalog of at least one item, found num_items={self.num_items}.")

    def check_training(self):
        """Refuses losses and candidates that do not fit each other; raises `ValueError`."""
        if not self.ranking_targets or not {NEXT_TARGET, *self.behaviors}.issuperset(self.ranking_targets):
            raise ValueError(
                f"Expected ranking targets among {[NEXT_TARGET, *self.behaviors]}, found {self.ranking_targets}."
            )
        if self.ranking_target not in (None, *self.ranking_targets):
            raise ValueError(
                f"Expected a ranking_target among {self.ranking_targets}, found {self.ranking_target!r}. Leave it out for the first."
            )
        if self.retrieval_behaviors is not None and (
            not self.retrieval_behaviors or not set(self.behaviors).issuperset(self.retrieval_behaviors)
        ):
            raise ValueError(
                f"Expected retrieval_behaviors among {self.behaviors}, found {self.retrieval_behaviors}. Leave them out for all."
            )
        has_vectors = self.has_item_representations and NEXT_TARGET in self.ranking_targets
        if self.dense_loss_weight and not has_vectors:
            raise ValueError(
                f"dense_loss_weight={self.dense_loss_weight} needs the ranking target {NEXT_TARGET!r} and item vectors: set "
                "content_embedding_dim or embedding_table_size."
            )
        if self.history_item_representations and not self.has_item_representations:
            raise ValueError(
                "history_item_representations needs item vectors, found none: set content_embedding_dim or embedding_table_size, or leave it out."
            )
        if not (self.rank_by_dense_score or self.dense_loss_weight):
            raise ValueError(
                "rank_by_dense_score=False needs dense_loss_weight: nothing else would train the item-level score then."
            )
        if self.stop_gradient_dense_score and not (self.rank_by_dense_score and self.dense_loss_weight):
            raise ValueError(
                "stop_gradient_dense_score needs dense_loss_weight, which trains the score then, and rank_by_dense_score. Set them, or leave it out."
            )
        amounts = (
            "negatives_per_item",
            *(f"{loss}_loss_weight" for loss in ("generation", "ranking", "dense", "contrastive")),
        )
        if below := {name: getattr(self, name) for name in amounts if getattr(self, name) < 0}:
            raise ValueError(f"Expected numbers of 0 or more, found {below}.")
        if self.given_negative_weight < 1:
            raise ValueError(
                f"Expected given_negative_weight >= 1 (1: as every other item), found {self.given_negative_weight}."
            )
        if self.code_similarity not in ("dot", "cosine") or self.code_temperature <= 0 or self.code_negatives < 0:
            raise ValueError(
                "Expected code_similarity 'dot' or 'cosine', a positive code_temperature and code_negatives >= 0, found "
                f"{self.code_similarity!r}, {self.code_temperature} and {self.code_negatives}."
            )
        if min(self.num_retrieved_items, self.num_train_beams) < 0:
            raise ValueError(
                f"Expected num_retrieved_items and num_train_beams of 0 or more, found {self.num_retrieved_items} and "
                f"{self.num_train_beams}."
            )
        if self.num_retrieved_items and not (self.content_embedding_dim and self.has_item_representations):
            raise ValueError(
                f"num_retrieved_items={self.num_retrieved_items} needs item embeddings to compare and item vectors to read: "
                "set content_embedding_dim and, with project_content_embeddings=False, embedding_table_size."
            )
        for name, most in (("max_items", "as many as fit"), ("max_long_items", "all of a long history")):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"Expected {name} of 1 or more, found {value}. Leave it out for {most}.")
        fits = self.max_history_items
        if None not in (self.max_items, fits) and self.max_items > fits:
            raise ValueError(
                f"Expected max_items from 1 to the {fits} items that the backbone has positions for "
                f"(max_position_embeddings={self.text_config.max_position_embeddings}), found {self.max_items}. Take fewer items, or "
                "more positions."
            )
        if self.negatives_per_item and (self.num_retrieved_items or self.num_train_beams):
            raise ValueError(
                f"negatives_per_item={self.negatives_per_item} are placed all over a history, where candidates have no "
                f"sub-history; found num_retrieved_items={self.num_retrieved_items} and num_train_beams="
                f"{self.num_train_beams}. Set negatives_per_item=0: beams are the candidates then."
            )


__all__ = ["UniGRFConfig"]

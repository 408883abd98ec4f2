# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The configurations of a model (`UniGRFConfig`) and of its training (`UniGRFTrainingConfig`).

The options of serving (`num_beams`, `ranking_weight`, ...) belong to `generation_config`: see `ServingOptions`.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_hstu import HSTUConfig
from .old_names_unigrf import SERVING_FIELDS, convert_old_fields, convert_old_overrides

if TYPE_CHECKING:
    # transformers copies, and hashes, what a file imports. A config must go with all code: `AutoModel` takes the model
    # that was registered for the config's class, also for another folder whose model's code differs.
    from .modeling_unigrf import UniGRFForCausalLM  # noqa: F401

NEXT_TARGET = "next"
# pad, bos, eos, unk
NUM_SPECIAL_TOKENS = 4
REPRESENTATION_SIZE = 64
# Name every class: transformers would name only the class that it saves.
AUTO_MAP = {
    "AutoConfig": "configuration_unigrf.UniGRFConfig",
    "AutoModel": "modeling_unigrf.UniGRFModel",
    "AutoModelForCausalLM": "modeling_unigrf.UniGRFForCausalLM",
}
CUSTOM_PIPELINES = {
    "recommendation": {"impl": "pipeline_unigrf.RecommendationPipeline", "pt": ["AutoModelForCausalLM"]},
}


def _backbone_field(name: str) -> property:
    def get(config):
        return getattr(config.text_config, name)

    def put(config, value):
        setattr(config.text_config, name, value)

    return property(get, put)


@strict
@dataclass
class UniGRFTrainingConfig:
    r"""
    Configuration of a UniGRF model's training: its losses and negatives. Inference reads none of these fields.

    Args:
        generation_loss_weight (`float`, defaults to 1.0):
            Weight of the cross-entropy of the next item's codes. 0: train a ranker alone.
        ranking_loss_weight (`float`, defaults to 1.0):
            Weight of the binary cross-entropy of the ranking targets. 0: train a retriever alone.
        dense_loss_weight (`float`, defaults to 1.0):
            Weight of the sampled-softmax loss over items, which trains the dense-retrieval score. 0: leave this loss
            out.
        code_negatives (`int`, defaults to 0):
            Number of uniform random codes of a level that each code is compared with. 0: compare with all codes of
            the level.
        negatives_per_item (`float`, *optional*):
            Random items that training ranks beside each item of a history, for the target `"next"`. None: 0.1, or 0
            if training ranks candidates of the last item (`num_train_beams` or `num_retrieved_items`). On
            MovieLens-100K, 1 ranks no better and nearly doubles the tokens.
        num_train_beams (`int`, defaults to 0):
            Beams of the model's search that training ranks for the last item of each row (RecoChain, stage II). 0:
            no beams.
        inject_target (`bool`, defaults to `True`):
            Put the true item among the beams that training ranks, where the search missed it. False: rank the search's
            beams alone.
        stop_gradient_history (`bool`, defaults to `False`):
            Stop the ranking-loss gradient at the history's keys, values and states.
        stop_gradient_dense_score (`bool`, defaults to `False`):
            Stop the ranking-loss gradient at the dense-retrieval score.
        retrieval_behaviors (`list[str]`, *optional*):
            Behaviors whose items the generation and dense losses learn. None: the items of all behaviors.
    """

    generation_loss_weight: float | int = 1.0
    ranking_loss_weight: float | int = 1.0
    dense_loss_weight: float | int = 1.0
    code_negatives: int = 0
    negatives_per_item: float | int | None = None
    num_train_beams: int = 0
    inject_target: bool = True
    stop_gradient_history: bool = False
    stop_gradient_dense_score: bool = False
    retrieval_behaviors: list[str] | tuple[str, ...] | None = None

    def __post_init__(self):
        if isinstance(self.retrieval_behaviors, tuple):
            self.retrieval_behaviors = list(self.retrieval_behaviors)

    @classmethod
    def from_fields(cls, values: dict) -> "UniGRFTrainingConfig":
        """Make a config from its fields by name. Raises `ValueError` for other names."""
        known = [field.name for field in fields(cls)]
        if strange := sorted(set(values) - set(known)):
            raise ValueError(
                f"`training_config` must have fields among {known}, got {strange}. Correct or remove them."
            )
        return cls(**values)

    def check(self, behaviors: list[str]) -> None:
        """
        Check the fields of training, for a model with these `behaviors`.

        Raises:
            ValueError: for numbers out of range and for retrieval behaviors that `behaviors` lacks.
        """
        amounts = (
            "generation_loss_weight",
            "ranking_loss_weight",
            "dense_loss_weight",
            "code_negatives",
            "num_train_beams",
        )
        for name in (*amounts, "negatives_per_item"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number of 0 or more, got {value}. Set it to 0 for none.")
        chosen = self.retrieval_behaviors
        if chosen is not None and not (chosen and set(behaviors).issuperset(chosen)):
            raise ValueError(
                f"`retrieval_behaviors` must be among {behaviors}, got {chosen}. Leave the field out to learn all of "
                "them."
            )


def reject_misplaced_fields(names: Iterable[str]) -> None:
    """Raise `ValueError` for fields of training or serving among the `names` of a model's fields."""
    training = sorted({field.name for field in fields(UniGRFTrainingConfig)} & set(names))
    serving = sorted({*SERVING_FIELDS.values()} & set(names))
    if training:
        raise ValueError(
            f"`UniGRFConfig` must get fields of training in `training_config`, got {training}. Pass "
            f"training_config={{{training[0]!r}: ...}}."
        )
    if serving:
        raise ValueError(
            f"`UniGRFConfig` must get no options of serving, got {serving}. Set "
            f"`model.generation_config.{serving[0]}`."
        )


@strict
class UniGRFConfig(PreTrainedConfig):
    r"""
    Configuration of a UniGRF model: one decoder that generates and ranks items, each encoded as a semantic ID.

    A history is the token sequence `<bos> s_1 .. s_L b  s_1 .. s_L b ...`. The L codes of an item come first, then
    the user's behavior on it. Token ids follow from the fields: pad, bos, eos and unk, then the behaviors, then the
    codes level by level.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The backbone: any decoder-only config that `AutoConfig` knows. Tested: hstu, llama, qwen2, qwen3, gpt2,
            mistral, with and without sliding windows. None: a Llama of two layers of width 128.
        codebook_sizes (`list[int]`, defaults to `[256, 256, 256, 1]`):
            Number of codes of each level. The last level is the collision token, which makes every semantic ID
            unique. A single level stands for atomic ids.
        behaviors (`list[str]`, defaults to `["interact"]`):
            Names of the behaviors that may follow an item.
        code_similarity (`str`, defaults to `"dot"`):
            Similarity of a state and a code's row of `lm_head`: `"dot"` or `"cosine"`. UniGRF with atomic ids has
            `"cosine"`, `code_temperature=0.05` and `tie_word_embeddings=True`.
        code_temperature (`float`, defaults to 1.0):
            Divisor of the code logits.
        ranking_targets (`list[str]`, *optional*):
            Targets of the ranking head. `"next"`: the item comes next. Any of `behaviors`: this behavior follows if
            the item is shown. None: `"next"` and, with two or more behaviors, each of them.
        num_items (`int`, defaults to 1):
            Number of items of the catalog, which is saved with the model.
        item_ids_fingerprint (`dict`, *optional*):
            Number of the first items, `num_items`, and the `sha256` of their ids, which a tokenizer of the model has.
            `tokenizer.item_ids_fingerprint()` makes it. None: the ids are not compared.
        content_embedding_dim (`int`, defaults to 0):
            Width of the content embeddings, one vector an item. 0: the items have no content embeddings.
        int8_content_embeddings (`bool`, defaults to `False`):
            Store content embeddings as int8, 127 for 1.0: a quarter of the memory, for catalogs of many millions.
        project_content_embeddings (`bool`, defaults to `True`):
            Project content embeddings into item representations. False: they only choose sub-histories.
        embedding_table_size (`int`, *optional*):
            Rows of the learned embedding table, the second part of item representations. Item i reads row
            `i % embedding_table_size`. None: one row an item, and `add_items` appends rows. 0: no table.
        representation_size (`int`, *optional*):
            Width of the item representations. The codes gain from a wide backbone, the items from narrow
            representations. None: 64, or the width of a narrower backbone.
        history_item_representations (`bool`, defaults to `True`):
            Add the representation of each item of a history to the behavior behind its codes (RecoChain, section 1).
        num_transitions (`int`, defaults to 0):
            Most successors of an item in the table of transitions, which `model.set_transitions` makes. 0: no table.
        num_retrieved_items (`int`, defaults to 0):
            Items of the user's long history that each candidate is ranked with (RecoChain, section 1). Their content
            embeddings have the greatest cosine to the candidate's. 0: candidates have no sub-history.
        rank_by_dense_score (`bool`, defaults to `True`):
            Add the dense-retrieval score to the `"next"` logit. False: leave it out of the ranking score.
        next_logit_bias (`float`, defaults to 0.0):
            Sampling-bias (logQ) correction that `rank` subtracts from the `"next"` logit. Training sets it.
        ranking_dropout (`float`, defaults to 0.1):
            Dropout probability in the ranking head.
        embedding_dropout (`float`, defaults to 0.2):
            Dropout probability of the token embeddings.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the heads' initial weights.
        training_config (`dict` or `UniGRFTrainingConfig`, *optional*):
            Losses and negatives of the training. None: the defaults of `UniGRFTrainingConfig`.
        pad_token_id, bos_token_id, eos_token_id (`int`, defaults to 0, 1, 2):
            Ids of the special tokens, different ones below 4.
        tie_word_embeddings (`bool`, defaults to `False`):
            Share the weights of the token embeddings and the code head `lm_head`.

    Raises:
        ValueError: for unknown names, numbers out of range, missing parts, and losses that exclude each other.
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
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 1024,
            },
        ),
    }

    text_config: dict | PreTrainedConfig | None = None
    codebook_sizes: list[int] | tuple[int, ...] = (256, 256, 256, 1)
    behaviors: list[str] | tuple[str, ...] = ("interact",)
    code_similarity: str = "dot"
    code_temperature: float | int = 1.0
    ranking_targets: list[str] | tuple[str, ...] | None = None
    num_items: int = 1
    item_ids_fingerprint: dict | None = None
    content_embedding_dim: int = 0
    int8_content_embeddings: bool = False
    project_content_embeddings: bool = True
    embedding_table_size: int | None = None
    representation_size: int | None = None
    history_item_representations: bool = True
    num_transitions: int = 0
    num_retrieved_items: int = 0
    rank_by_dense_score: bool = True
    next_logit_bias: float | int = 0.0
    ranking_dropout: float | int = 0.1
    embedding_dropout: float | int = 0.2
    initializer_range: float | int = 0.02
    training_config: dict | UniGRFTrainingConfig | None = None
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if is_dataclass(self.training_config):
            # Copy: another config may share it.
            self.training_config = deepcopy(self.training_config)
        is_old = convert_old_fields(self, kwargs)
        reject_misplaced_fields(kwargs)
        vocab_size = kwargs.pop("vocab_size", None)
        for name, value in vars(self).items():
            # A saved config has lists.
            if isinstance(value, tuple):
                setattr(self, name, list(value))
        if self.ranking_targets is None:
            self.ranking_targets = [NEXT_TARGET, *(self.behaviors if len(self.behaviors) > 1 else [])]
        if self.embedding_table_size is None:
            self.embedding_table_size = self.num_items
        if vocab_size is None and isinstance(self.text_config, dict):
            vocab_size = self.text_config.get("vocab_size")
        if isinstance(self.text_config, dict) and "model_type" not in self.text_config:
            # Without a name, the other fields are ours too: transformers' default Llama has 7 billion weights.
            ours = self.sub_configs_defaults["text_config"]
            self.text_config = {"model_type": ours.model_type, **ours.init_kwargs, **self.text_config}
        elif isinstance(self.text_config, PreTrainedConfig):
            # Copy: another model may share it, and its vocabulary is set below.
            self.text_config = deepcopy(self.text_config)
        if isinstance(self.text_config, dict) and self.text_config["model_type"] == HSTUConfig.model_type:
            # AutoConfig knows the class of the folder that was loaded last.
            self.text_config = HSTUConfig(**self.text_config)
        if not is_dataclass(self.training_config):
            self.training_config = UniGRFTrainingConfig.from_fields(self.training_config or {})
        super().__post_init__(**kwargs)
        if self.representation_size is None:
            self.representation_size = self.hidden_size if is_old else min(REPRESENTATION_SIZE, self.hidden_size)
        # The vocabulary is the items' tokens, not a backbone's default of 32,000.
        self.text_config.vocab_size = self.num_item_tokens if vocab_size is None else vocab_size
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self.text_config, name, getattr(self, name))
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        self.check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        Make a config as every config of transformers.

        `training_config` may be a dict of some fields, which change those of `config_dict`. The field names of 0.1 are
        accepted, too (until 0.3).
        """
        kwargs = convert_old_overrides(kwargs)
        training = kwargs.pop("training_config", None)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        if isinstance(training, dict):
            training = UniGRFTrainingConfig.from_fields(asdict(config.training_config) | training)
        if training is not None:
            config.training_config = training
        return made

    def to_dict(self):
        """Return all fields. The serving fields of a 0.1 config belong to `generation_config` now."""
        values = super().to_dict()
        values.pop("old_serving_fields", None)
        values["training_config"] = asdict(self.training_config)
        # Whatever saves a config names the pipeline; loading one puts classes here.
        values["custom_pipelines"] = deepcopy(CUSTOM_PIPELINES)
        return values

    def __getattr__(self, name):
        # The pipeline in a folder of 0.1 reads its serving fields here.
        if name in self.__dict__.get("old_serving_fields", {}):
            return self.__dict__["old_serving_fields"][name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def num_levels(self) -> int:
        """Number of codes of an item."""
        return len(self.codebook_sizes)

    @property
    def behavior_token_ids(self) -> list[int]:
        """Token id of each behavior."""
        return list(range(NUM_SPECIAL_TOKENS, NUM_SPECIAL_TOKENS + len(self.behaviors)))

    @property
    def code_offsets(self) -> list[int]:
        """Token id of code 0 of each level."""
        return list(accumulate(self.codebook_sizes[:-1], initial=NUM_SPECIAL_TOKENS + len(self.behaviors)))

    @property
    def num_item_tokens(self) -> int:
        """Number of token ids that special tokens, behaviors and codes need."""
        return NUM_SPECIAL_TOKENS + len(self.behaviors) + sum(self.codebook_sizes)

    @property
    def max_history_items(self) -> int | None:
        """Items of a history that the backbone has positions for, beside <bos> and a candidate. None: no limit."""
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if positions is None:
            return None
        return (positions - 1 - self.num_levels - self.num_block_tokens) // (self.num_levels + 1)

    @property
    def num_block_tokens(self) -> int:
        """Most positions behind a candidate's codes: item, sub-history and scoring place. 0 without a sub-history."""
        return self.num_retrieved_items + 2 if self.num_retrieved_items else 0

    @property
    def reads_times(self) -> bool:
        """Whether the backbone takes `timestamps`."""
        return getattr(self.text_config, "num_time_buckets", 0) > 0

    @property
    def has_item_representations(self) -> bool:
        """Whether items have a representation beside their codes."""
        return (self.content_embedding_dim > 0 and self.project_content_embeddings) or self.embedding_table_size > 0

    @property
    def has_dense_scores(self) -> bool:
        """Whether items have a dense-retrieval score."""
        return self.has_item_representations and NEXT_TARGET in self.ranking_targets

    @property
    def ranks_last_items(self) -> bool:
        """Whether training ranks candidates of the last item of each row (RecoChain, stage II)."""
        return self.num_retrieved_items > 0 or self.training_config.num_train_beams > 0

    @property
    def random_negatives_per_item(self) -> float:
        """Random items that training ranks beside each item of a history."""
        training = self.training_config
        if not training.ranking_loss_weight or NEXT_TARGET not in self.ranking_targets:
            return 0.0
        if training.negatives_per_item is None:
            return 0.0 if self.ranks_last_items else 0.1
        return training.negatives_per_item

    # transformers reads these fields here; the backbone's config holds them.
    vocab_size = _backbone_field("vocab_size")
    hidden_size = _backbone_field("hidden_size")
    num_hidden_layers = _backbone_field("num_hidden_layers")
    num_attention_heads = _backbone_field("num_attention_heads")
    use_cache = _backbone_field("use_cache")

    def check(self) -> None:
        """Raise `ValueError` for a model that cannot be built or trained; `@strict` would lose the message."""
        self._check_tokens()
        self._check_parts()
        self.training_config.check(self.behaviors)
        self._check_objective()

    def _check_tokens(self) -> None:
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"`codebook_sizes` must hold one positive size a level, got {self.codebook_sizes}. Take it from the "
                "tokenizer (`UniGRFConfig(**tokenizer.config_fields())`)."
            )
        if not self.behaviors or NEXT_TARGET in self.behaviors:
            raise ValueError(
                f"`behaviors` must hold one name or more, none of them {NEXT_TARGET!r}, which is a ranking target, "
                f"got {self.behaviors}. Rename the behavior."
            )
        special = [self.pad_token_id, self.bos_token_id, self.eos_token_id]
        if len(set(special)) < len(special) or not set(range(NUM_SPECIAL_TOKENS)).issuperset(special):
            raise ValueError(
                "`pad_token_id`, `bos_token_id` and `eos_token_id` must be three different ids below "
                f"{NUM_SPECIAL_TOKENS}, got {special}. Take them from the tokenizer, or leave them out."
            )
        if self.vocab_size < self.num_item_tokens:
            raise ValueError(
                f"`vocab_size` must be at least the {self.num_item_tokens} tokens that encode the items, got "
                f"{self.vocab_size}. Leave it out."
            )
        if self.num_items < 1:
            raise ValueError(f"`num_items` must be 1 or more, got {self.num_items}. Take the size of the catalog.")

    def _check_parts(self) -> None:
        if self.code_similarity not in ("dot", "cosine") or self.code_temperature <= 0:
            raise ValueError(
                "`code_similarity` must be 'dot' or 'cosine' and `code_temperature` positive, got "
                f"{self.code_similarity!r} and {self.code_temperature}. Leave both out for the dot product."
            )
        if not self.ranking_targets or not {NEXT_TARGET, *self.behaviors}.issuperset(self.ranking_targets):
            raise ValueError(
                f"`ranking_targets` must be among {[NEXT_TARGET, *self.behaviors]}, got {self.ranking_targets}. "
                "Leave the field out for all of them."
            )
        for name in ("content_embedding_dim", "embedding_table_size", "num_transitions", "num_retrieved_items"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}. Set it to 0 for none.")
        if self.representation_size < 1:
            raise ValueError(
                f"`representation_size` must be 1 or more, got {self.representation_size}. Leave it out for the "
                "backbone's width."
            )
        if self.history_item_representations and not self.has_item_representations:
            raise ValueError(
                "`history_item_representations=True` must come with item representations, got none. Set "
                "content_embedding_dim or embedding_table_size, or history_item_representations=False."
            )
        if self.num_retrieved_items and not (self.content_embedding_dim and self.has_item_representations):
            raise ValueError(
                f"`num_retrieved_items={self.num_retrieved_items}` must come with content embeddings to compare and "
                "item representations to read, got none. Set content_embedding_dim and, with "
                "project_content_embeddings=False, embedding_table_size."
            )

    def _check_objective(self) -> None:
        training = self.training_config
        if training.dense_loss_weight and not self.has_dense_scores:
            raise ValueError(
                f"`dense_loss_weight={training.dense_loss_weight}` must come with the ranking target {NEXT_TARGET!r} "
                "and item representations, got none. Set content_embedding_dim or embedding_table_size, or "
                "dense_loss_weight=0 (`training_config={'dense_loss_weight': 0}`)."
            )
        if not (self.rank_by_dense_score or training.dense_loss_weight):
            raise ValueError(
                "`rank_by_dense_score=False` must come with dense_loss_weight, got 0: no loss would train the "
                "dense-retrieval score. Set one of the two."
            )
        if training.stop_gradient_dense_score and not (self.rank_by_dense_score and training.dense_loss_weight):
            raise ValueError(
                "`stop_gradient_dense_score=True` must come with rank_by_dense_score and dense_loss_weight, got "
                "neither or one of them: no loss would train the score. Set both, or leave the field out."
            )
        if training.negatives_per_item and self.ranks_last_items:
            raise ValueError(
                f"`negatives_per_item` must be 0 or None with num_retrieved_items or num_train_beams, got "
                f"{training.negatives_per_item}. Leave it out: training then ranks candidates of the last item alone."
            )


__all__ = ["UniGRFConfig", "UniGRFTrainingConfig"]

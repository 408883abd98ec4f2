"""Describe the options of a training, and check them together."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_unigrf import UniGRFConfig, UniGRFTrainingConfig
from recipes.common.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SHARE_BELOW_ONE, check_needs, check_ranges
from recipes.common.config_arguments import arguments_from_config
from recipes.training.enhancer import OPEN_OPTIONS

# Fields of `UniGRFConfig` that do not follow from the data.
ARCHITECTURE = (
    "text_config",
    "code_similarity",
    "code_temperature",
    "ranking_targets",
    "project_content_embeddings",
    "embedding_table_size",
    "representation_size",
    "history_item_representations",
    "rank_by_dense_score",
    "ranking_dropout",
    "embedding_dropout",
    "initializer_range",
    "tie_word_embeddings",
)
OBJECTIVE = (
    "generation_loss_weight",
    "ranking_loss_weight",
    "dense_loss_weight",
    "code_negatives",
    "negatives_per_item",
    "num_train_beams",
    "inject_target",
    "stop_gradient_history",
    "stop_gradient_dense_score",
    "retrieval_behaviors",
)
ADAPTIVE = ("adaptive_temperature", "adaptive_form", "adaptive_window")
ENHANCING = ("enhancer_target", "relabel", "enhancer_options")
# Defaults of `TrainingArguments` for a small model that is trained from scratch.
TRAINER_DEFAULTS = {
    # The Trainer's 5e-5 suits large models that are fine-tuned.
    "learning_rate": 2e-3,
    "warmup_steps": 0.05,
    # Every crop of an epoch is another one: a second epoch would repeat them.
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.98,
    "per_device_eval_batch_size": 128,
    "prediction_loss_only": True,
    "report_to": "none",
    # Resumes the adaptive weights.
    "restore_callback_states_from_checkpoint": True,
    # True would send the catalog to all processes in every step.
    "ddp_broadcast_buffers": False,
    # The collator chooses the columns.
    "remove_unused_columns": False,
    # The Trainer requires it for bf16 on a CPU.
    "use_cpu": not torch.cuda.is_available(),
}


COUNTS = (
    "max_items",
    "max_long_items",
    "crops_per_epoch",
    "stride",
    "adaptive_window",
    "representation_size",
)
AMOUNTS = (
    "generation_loss_weight",
    "ranking_loss_weight",
    "dense_loss_weight",
    "negatives_per_item",
    "code_negatives",
    "embedding_table_size",
    "num_train_beams",
    "num_retrieved_items",
    "num_transitions",
    "candidate_refresh_epochs",
    "candidate_refresh_steps",
)
RANGES = {
    **dict.fromkeys(COUNTS, COUNT),
    **dict.fromkeys(AMOUNTS, NOT_NEGATIVE),
    **dict.fromkeys(("code_temperature", "initializer_range", "adaptive_temperature"), POSITIVE),
    **dict.fromkeys(("item_dropout", "ranking_dropout", "embedding_dropout"), SHARE_BELOW_ONE),
}


ArchitectureArguments: Any = arguments_from_config(
    "ArchitectureArguments", "Architecture of the model.", UniGRFConfig, ARCHITECTURE, are_optional=True
)
ObjectiveArguments: Any = arguments_from_config(
    "ObjectiveArguments", "Losses and their negatives.", UniGRFTrainingConfig, OBJECTIVE, False
)
SubHistoryArguments: Any = arguments_from_config(
    "SubHistoryArguments", "Sub-histories of candidates.", UniGRFConfig, ("num_retrieved_items",), False
)


@dataclass
class StageTwoArguments(SubHistoryArguments):
    """Stage II of RecoChain, switched on by num_train_beams or num_retrieved_items."""

    candidate_refresh_epochs: int = field(
        default=0,
        metadata={"help": "Reuse a row's cached beam candidates for this many epochs. 0: search in every step."},
    )
    candidate_refresh_steps: int = field(
        default=0,
        metadata={
            "help": "Reuse a row's cached beam candidates for this many optimizer steps. 0: search in every step."
        },
    )
    freeze_base_model: bool = field(
        default=False,
        metadata={
            "help": "Freeze everything but the candidate block and the ranking head. Needs init_from and ranking."
        },
    )


@dataclass
class MechanismArguments:
    """Mechanisms of UniGRF: adaptive weighter and enhancer."""

    adaptive_weights: bool = field(
        default=False, metadata={"help": "Weigh the generation and the ranking loss by how slowly each converges."}
    )
    adaptive_temperature: float = field(
        default=0.1,
        metadata={
            "help": "Temperature of the adaptive weights' softmax. A lower temperature moves the weights further "
            "apart."
        },
    )
    adaptive_form: str = field(
        default="loss_ratio",
        metadata={
            "help": "Measure of the adaptive weights: a loss's fall, or its fall over its gradient's norm.",
            "choices": ["loss_ratio", "gradient_norm"],
        },
    )
    adaptive_window: int | None = field(
        default=None, metadata={"help": "Optimizer steps between two updates of the adaptive weights. None: an epoch."}
    )
    enhancer: bool = field(
        default=False,
        metadata={"help": "Choose hard negatives and excluded positives of each user by the ranking scores (UniGRF)."},
    )
    enhancer_target: str = field(
        default="like", metadata={"help": "Ranking target whose probability the enhancer reads, e.g. a behavior."}
    )
    relabel: bool = field(
        default=False,
        metadata={"help": "Train the enhancer's best excluded positive as the next item after a user's history."},
    )
    enhancer_options: str = field(
        default="{}",
        metadata={
            "help": "Other options of the enhancer as a JSON object, e.g. '{\"num_negatives\": 8}'. Names: "
            f"{', '.join(sorted(OPEN_OPTIONS))}."
        },
    )


@dataclass
class ModelArguments(ArchitectureArguments, ObjectiveArguments, StageTwoArguments, MechanismArguments):
    """Checkpoint to start from, and the generation loss."""

    generation_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the mean cross-entropy of the next item's codes. 0: train a ranker alone. None: the "
            "checkpoint's value, or the number of levels in a new model, which makes it the loss of a whole item."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from, of all items in data_dir or the first of them. None: random weights."
        },
    )
    lora: str | None = field(
        default=None,
        metadata={
            "help": "Train a LoRA adapter on init_from: fields of peft.LoraConfig as JSON, e.g. '{\"r\": 8}'. "
            "Only the adapter is saved, and init_from stays as it is. None: train all weights."
        },
    )

    @property
    def second_stage(self) -> bool:
        """Whether candidates of a row's last item are ranked."""
        return self.num_retrieved_items > 0 or self.num_train_beams > 0

    @property
    def caches_candidates(self) -> bool:
        """Whether the beam candidates of a row serve several epochs or steps."""
        return self.num_train_beams > 0 and bool(self.candidate_refresh_epochs or self.candidate_refresh_steps)

    def architecture(self) -> dict:
        """Return the fields of `UniGRFConfig` that have a value, with `text_config` as a dict."""
        fields = {name: getattr(self, name) for name in ARCHITECTURE if getattr(self, name) is not None}
        if self.text_config is not None:
            fields["text_config"] = from_json(self.text_config, "text_config")
        return fields | {"num_retrieved_items": self.num_retrieved_items}

    def objective(self) -> dict:
        """Return the fields of `UniGRFTrainingConfig` that have a value."""
        fields = {name: getattr(self, name) for name in OBJECTIVE}
        if self.generation_loss_weight is None:
            del fields["generation_loss_weight"]
        return fields


@dataclass
class DataArguments:
    """Data and folders."""

    data_dir: str = field(metadata={"help": "Folder that recipes.prepare wrote."})
    checkpoint_dir: str | None = field(
        default=None, metadata={"help": "Folder of the finished model. None: output_dir/checkpoint."}
    )
    max_items: int = field(default=50, metadata={"help": "Most recent items of a history that the model reads."})
    crops_per_epoch: int | None = field(
        default=None,
        metadata={
            "help": "Crops of each history in an epoch, each cut at other places. None: 12, or fewer, so that an "
            "epoch has at most 10 million items; 1 with the enhancer and in stage II."
        },
    )
    item_dropout: float = field(
        default=0.2,
        metadata={
            "help": "Share of the items that each crop of a history leaves out, other ones in every crop. Rows of the "
            "enhancer and of stage II leave out none."
        },
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Items between two overlapping windows of a history. None: crops_per_epoch cuts the history."
        },
    )
    max_long_items: int = field(
        default=1000,
        metadata={"help": "Most recent items from which sub-histories are retrieved. Needs num_retrieved_items."},
    )
    num_transitions: int = field(
        default=200,
        metadata={
            "help": "Most successors of an item in the table of transitions, 6 bytes each. 0: make no table from "
            "data_dir."
        },
    )
    refit: str | None = field(
        default=None,
        metadata={
            "help": "Held-out items that training reads, too, after validation has chosen: those of validation, or of "
            "both (test), for a model that goes to production. Needs refit_from.",
            "choices": ["validation", "test"],
        },
    )
    refit_from: str | None = field(
        default=None,
        metadata={"help": "Checkpoint of the training that validation measured. The refit serves by its options."},
    )
    exclude_history: bool = field(
        default=False,
        metadata={"help": "Exclude the items of a history from the beams of stage II. Needs num_train_beams."},
    )


def check_together(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Raise `ValueError` for numbers out of range, and options that exclude each other or have no effect."""
    for arguments in (model_args, data_args):
        check_ranges(arguments, {name: RANGES[name] for name in vars(arguments) if name in RANGES})
    pairs = {
        ("candidate_refresh_epochs", "candidate_refresh_steps"): model_args.candidate_refresh_epochs
        and model_args.candidate_refresh_steps,
        ("freeze_base_model", "adaptive_weights"): model_args.freeze_base_model and model_args.adaptive_weights,
        ("lora", "freeze_base_model"): model_args.lora is not None and model_args.freeze_base_model,
        ("enhancer", "num_train_beams or num_retrieved_items"): model_args.enhancer and model_args.second_stage,
        ("stride", "crops_per_epoch"): data_args.stride and data_args.crops_per_epoch,
    }
    for (first, second), are_both in pairs.items():
        if are_both:
            raise ValueError(f"`{first}` must not be set together with {second}, got both. Leave out one of them.")
    needs = needed_options(model_args, data_args)
    check_needs(data_args, needs)
    check_needs(model_args, needs)


def needed_options(model_args: ModelArguments, data_args: DataArguments) -> dict[str, list[tuple[str, bool]]]:
    """Return what each option needs to have an effect, and whether that is set."""
    has_beams = model_args.num_train_beams > 0
    has_ranking = model_args.ranking_loss_weight > 0
    packs_no_rows = model_args.enhancer or model_args.second_stage
    return {
        "candidate_refresh_epochs": [("num_train_beams", has_beams)],
        "candidate_refresh_steps": [("num_train_beams", has_beams)],
        "exclude_history": [("num_train_beams", has_beams)],
        "inject_target": [("num_train_beams", has_beams)],
        "max_long_items": [("num_retrieved_items", model_args.num_retrieved_items > 0)],
        "refit": [("refit_from", data_args.refit_from is not None)],
        "refit_from": [("refit", data_args.refit is not None)],
        "lora": [("init_from", model_args.init_from is not None)],
        "stop_gradient_history": [("num_train_beams or num_retrieved_items", model_args.second_stage)],
        "freeze_base_model": [("init_from", model_args.init_from is not None), ("ranking_loss_weight", has_ranking)],
        **{name: [("adaptive_weights", model_args.adaptive_weights)] for name in ADAPTIVE},
        **{name: [("enhancer", model_args.enhancer)] for name in ENHANCING},
        "enhancer": [("ranking_loss_weight", has_ranking)],
        "item_dropout": [("packed rows (no enhancer, no stage II)", not packs_no_rows)],
    }


def from_json(text: str, argument: str) -> dict:
    """Read a JSON object; raise `ValueError` for another text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{argument}` must be JSON, got {text!r} ({error}). Put it in single quotes.") from None
    if not isinstance(value, dict):
        raise ValueError(f"`{argument}` must be a JSON object, got {text!r}. Write it in braces.")
    return value


def named(options: str, known: Iterable[str], argument: str) -> dict:
    """Read a JSON object whose names are among `known`; raise `ValueError` for other names."""
    value = from_json(options, argument)
    if unknown := sorted(set(value).difference(known)):
        raise ValueError(f"`{argument}` must have names among {sorted(known)}, got {unknown}. Correct them.")
    return value


def split_config_fields(fields: dict) -> dict:
    """Nest the fields of `UniGRFTrainingConfig` in `training_config`, as keyword arguments of `UniGRFConfig`."""
    training = {name: value for name, value in fields.items() if name in OBJECTIVE}
    model = {name: value for name, value in fields.items() if name not in OBJECTIVE}
    return {**model, "training_config": training}

"""Describe the options of a training, and check them together."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields

import torch

from modeling_unigrf import UniGRFConfig

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
ADAPTIVE = ("adaptive_temperature", "adaptive_form", "adaptive_window")
ENHANCING = ("enhancer_target", "relabel", "enhancer_options")
CONFIG_FIELDS = [config_field.name for config_field in dataclass_fields(UniGRFConfig)]
# Defaults of `TrainingArguments` for a small model that is trained from scratch.
TRAINER_DEFAULTS = {
    "learning_rate": 2e-3,  # the Trainer's own 5e-5 is for large models that are fine-tuned
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.98,
    "per_device_eval_batch_size": 128,
    "prediction_loss_only": True,
    "report_to": "none",
    "restore_callback_states_from_checkpoint": True,  # the adaptive weights go on where they were
    "ddp_broadcast_buffers": False,  # else the catalog is sent in every step
    "use_cpu": not torch.cuda.is_available(),  # the Trainer asks for it, where bf16 runs on a CPU
}


@dataclass
class ModelArguments:
    """What is trained."""

    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from, of these items or the first of them; it brings its own backbone."
        },
    )
    num_retrieved_items: int = field(
        default=0, metadata={"help": "Items of the long history that a candidate is ranked with."}
    )
    num_train_beams: int = field(default=0, metadata={"help": "Own beams that are ranked in training, for `next`."})
    candidate_refresh_epochs: int = field(
        default=0, metadata={"help": "Epochs that a row keeps its beams; 0: they are searched for in every step."}
    )
    candidate_refresh_steps: int = field(
        default=0, metadata={"help": "The same in steps: searched for when the row comes."}
    )
    stop_gradient_history: bool = field(default=False, metadata={"help": "Their gradient does not reach the history."})
    freeze_base_model: bool = field(
        default=False,
        metadata={
            "help": "Of init_from, what ranks alone is trained; generation and item-level score stay as they are."
        },
    )
    text_config: str = field(
        default=json.dumps(LLAMA), metadata={"help": "The backbone's config as JSON, as `AutoConfig` takes it."}
    )
    negatives_per_item: float = field(
        default=1.0, metadata={"help": "Random candidates an item, for target `next`; none in stage II."}
    )
    generation_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the generation loss; 0: ranking alone."}
    )
    ranking_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the ranking loss; 0: generation alone."}
    )
    adaptive_weights: bool = field(default=False, metadata={"help": "Weigh the losses by how slowly they converge."})
    adaptive_temperature: float = field(
        default=0.1, metadata={"help": "Of the adaptive weights; lower: further apart."}
    )
    adaptive_form: str = field(
        default="loss_ratio", metadata={"help": "Of the adaptive weights.", "choices": ["loss_ratio", "gradient_norm"]}
    )
    adaptive_window: int | None = field(default=None, metadata={"help": "Steps of their windows; default: an epoch."})
    enhancer: bool = field(
        default=False, metadata={"help": "Correct the negatives of retrieval by what ranking says (UniGRF)."}
    )
    enhancer_target: str = field(default="like", metadata={"help": "The ranking target that says it."})
    relabel: bool = field(default=False, metadata={"help": "Its favorites become positives, too."})
    enhancer_options: str = field(
        default="{}",
        metadata={"help": "More arguments of RankingDrivenEnhancer, as JSON: num_negatives, threshold, ..."},
    )
    dense_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the softmax over items."})
    ranking_dropout: float = field(default=0.1, metadata={"help": "Dropout in the ranking head."})
    embedding_dropout: float = field(default=0.2, metadata={"help": "Dropout on the token embeddings."})
    project_content_embeddings: bool = field(
        default=True, metadata={"help": "Item vectors are made of item embeddings, too."}
    )
    embedding_table_size: int | None = field(
        default=None, metadata={"help": "Learned rows of items for the ranking head; default: one an item. 0: none."}
    )
    history_item_representations: bool = field(
        default=True,
        metadata={"help": "Histories are read by the items' vectors, too; a model without any needs False."},
    )
    config_fields: str = field(default="{}", metadata={"help": "More fields of UniGRFConfig, as JSON."})

    @property
    def second_stage(self) -> bool:
        """Whether candidates are ranked for the last item of a row alone."""
        return self.num_retrieved_items > 0 or self.num_train_beams > 0

    @property
    def caches_candidates(self) -> bool:
        """Whether the beam candidates of a row serve several epochs or steps."""
        return self.num_train_beams > 0 and bool(self.candidate_refresh_epochs or self.candidate_refresh_steps)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare."})
    checkpoint_dir: str | None = field(default=None, metadata={"help": "Where the finished model goes."})
    max_items: int = field(default=50, metadata={"help": "Items of a history that the model reads."})
    crops_per_epoch: int = field(
        default=1, metadata={"help": "Passes over the data in one epoch, each cut at other places."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Instead: windows that begin so many items apart and overlap; 1: all of them."}
    )
    max_long_items: int = field(default=1000, metadata={"help": "Items of a long history, for num_retrieved_items."})
    exclude_history: bool = field(
        default=False,
        metadata={"help": "A user's own items are no beams of stage II, as they are none when it is asked."},
    )


def check_together(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Reject options that exclude each other or have no effect together; raises `ValueError`."""
    if model_args.candidate_refresh_epochs and model_args.candidate_refresh_steps:
        raise ValueError("Expected candidate_refresh_epochs or candidate_refresh_steps, found both. Leave one out.")
    if model_args.freeze_base_model and model_args.adaptive_weights:
        raise ValueError(
            "Expected freeze_base_model or adaptive_weights, found both: of two losses only one is trained then."
        )
    if model_args.enhancer and model_args.second_stage:
        raise ValueError("Expected the enhancer or stage II, found both: each says which items a row is set against.")
    for name, needed, is_there in needed_options(model_args, data_args):
        if not is_there:
            raise ValueError(
                f"Expected {needed} with {name}, which does nothing in training without it. Add it, or leave {name} "
                "out."
            )


def needed_options(model_args: ModelArguments, data_args: DataArguments) -> list[tuple[str, str, bool]]:
    """List the options that are set, the option that each of them needs, and whether that is set, too."""
    has_beams = model_args.num_train_beams > 0
    has_ranking = model_args.ranking_loss_weight > 0
    needs = {
        "candidate_refresh_epochs": [("num_train_beams", has_beams)],
        "candidate_refresh_steps": [("num_train_beams", has_beams)],
        "exclude_history": [("num_train_beams", has_beams)],
        "stop_gradient_history": [("num_train_beams or num_retrieved_items", model_args.second_stage)],
        "freeze_base_model": [("init_from", model_args.init_from is not None), ("ranking_loss_weight", has_ranking)],
        **{name: [("adaptive_weights", model_args.adaptive_weights)] for name in ADAPTIVE},
        **{name: [("enhancer", model_args.enhancer)] for name in ENHANCING},
        "enhancer": [("ranking_loss_weight", has_ranking)],
    }
    values = {**asdict(data_args), **asdict(model_args)}
    defaults = {
        option.name: option.default for owner in (DataArguments, ModelArguments) for option in dataclass_fields(owner)
    }
    is_set = [name for name in needs if values[name] != defaults[name]]
    return [(name, needed, is_there) for name in is_set for needed, is_there in needs[name]]


def from_json(text: str, argument: str) -> dict:
    """A dict; `ValueError` if the text is none."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {argument} as JSON, found {text!r} ({error}). Is it in single quotes?") from None
    if not isinstance(found, dict):
        raise ValueError(f"Expected {argument} as a JSON object, found {text!r}. Write it in braces.")
    return found


def named(options: str, known: Iterable[str], argument: str) -> dict:
    """A dict from JSON; `ValueError` if a name in it is not among those that are known."""
    found = from_json(options, argument)
    if strange := sorted(set(found).difference(known)):
        raise ValueError(f"Expected {argument} among {sorted(known)}, found {strange}. Is one misspelt?")
    return found

"""Check the arguments of `transformers.TrainingArguments` before a training: ranges, and those without effect."""

from collections.abc import Mapping
from copy import copy
from dataclasses import fields
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from recipes.common.arguments import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE_BELOW_ONE,
    check_ranges,
    describe_error,
)

RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "save_total_limit",
            "torch_empty_cache_steps",
            "dataloader_prefetch_factor",
            "ddp_timeout",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        ("num_train_epochs", "learning_rate", "adam_epsilon", "logging_steps", "save_steps", "eval_steps"), POSITIVE
    ),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), SHARE_BELOW_ONE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
}
HUB = "Leave it out, and upload the finished model with recipes.push_to_hub."
METRICS = "Leave it out: the Trainer measures the loss alone, and recipes.evaluate the lists."
# Arguments without effect in this training, and what to do instead.
WITHOUT_EFFECT = {
    "resume_from_checkpoint": "Leave it out: the same command resumes from the last checkpoint in output_dir.",
    "do_train": "Leave it out: the recipe trains.",
    "do_predict": "Leave it out, and run recipes.evaluate.",
    "remove_unused_columns": "Leave it out: the collator chooses the columns.",
    "label_smoothing_factor": "Leave it out: the Trainer would train a smoothed loss over all tokens.",
    "label_names": "Leave it out: the labels are the items of the histories.",
    "length_column_name": "Leave it out: the rows have no such column.",
    "use_cache": "Leave it out: a training has no cache.",
    "use_liger_kernel": "Leave it out: Liger has no kernels for this model.",
    "liger_kernel_config": "Leave it out: Liger has no kernels for this model.",
    "bf16_full_eval": "Leave it out: evaluations during a training run as the training, with --bf16.",
    "fp16_full_eval": "Leave it out: evaluations during a training run as the training, with --fp16.",
    "save_only_model": "Leave it out: a training could not resume from such checkpoints.",
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "include_for_metrics",
            "batch_eval_metrics",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
        ),
        METRICS,
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        HUB,
    ),
}
TRACKERS = ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
EVALUATED = "eval_strategy=steps or epoch"
WORKERS = "dataloader_num_workers"
# Optimizers that choose layers of the model by `optim_target_modules`.
TARGETED = ("galore", "apollo", "lomo")
PROBE_STEPS = 10


def check_trainer_arguments(args: TrainingArguments, defaults: Mapping[str, Any]) -> None:
    """
    Check the Trainer's arguments of a recipe.

    Args:
        args: The arguments.
        defaults: Values of the recipe that replace the defaults of `TrainingArguments`.

    Raises:
        ValueError: for a number out of range, and for an argument that would have no effect.
    """
    check_ranges(args, RANGES)
    if args.max_steps != -1:
        check_ranges(args, {"max_steps": COUNT})
    default = TrainingArguments(args.output_dir, **{**defaults, "use_cpu": args.use_cpu})
    names = [option.name for option in fields(default) if getattr(args, option.name) != getattr(default, option.name)]
    for name in names:
        value = getattr(args, name)
        if name in WITHOUT_EFFECT:
            raise ValueError(f"`{name}` must be {getattr(default, name)!r}, got {value!r}. {WITHOUT_EFFECT[name]}")
        needed, is_there = needed_by(name, args)
        if not is_there:
            raise ValueError(
                f"`{name}` must come with {needed}, got {value!r} alone, without effect. Add {needed}, or leave "
                f"{name} out."
            )
    check_best_model(args)
    check_trainer(args, names)


def needed_by(name: str, args: TrainingArguments) -> tuple[str, bool]:
    """Return the argument without which an argument has no effect, and whether it is set."""
    evaluates = args.eval_strategy != "no"
    has_targets = any(word in args.optim for word in TARGETED)
    best = (
        "load_best_model_at_end, save_strategy=best or lr_scheduler_type=reduce_lr_on_plateau",
        args.load_best_model_at_end
        or args.save_strategy == "best"
        or args.lr_scheduler_type == "reduce_lr_on_plateau",
    )
    needs = {
        "load_best_model_at_end": (EVALUATED, evaluates),
        "metric_for_best_model": best,
        "greater_is_better": best,
        "do_eval": (EVALUATED, evaluates),
        "eval_delay": (EVALUATED, evaluates),
        "eval_steps": ("eval_strategy=steps", args.eval_strategy == "steps"),
        "save_steps": ("save_strategy=steps", args.save_strategy == "steps"),
        "logging_steps": ("logging_strategy=steps", args.logging_strategy == "steps"),
        "logging_first_step": ("logging_strategy=steps or epoch", args.logging_strategy != "no"),
        "activation_checkpointing_kwargs": ("activation_checkpointing", bool(args.activation_checkpointing)),
        "gradient_checkpointing_kwargs": ("activation_checkpointing", bool(args.activation_checkpointing)),
        "optim_target_modules": ("an optim of GaLore, APOLLO or LOMO", has_targets),
        "fsdp_config": ("fsdp", bool(args.fsdp)),
        **dict.fromkeys(TRACKERS, ("report_to", bool(args.report_to))),
        **dict.fromkeys(
            (
                "dataloader_persistent_workers",
                "dataloader_prefetch_factor",
                "dataloader_multiprocessing_context",
                "dataloader_in_order",
            ),
            (WORKERS, args.dataloader_num_workers > 0),
        ),
    }
    return needs.get(name, ("", True))


def check_trainer(args: TrainingArguments, names: list[str]) -> None:
    """
    Check the arguments that the Trainer reads late, on a model of one weight.

    Args:
        args: The arguments.
        names: Names of the arguments that differ from the defaults.

    Raises:
        ValueError: for a package that is missing, and values with which no Trainer, optimizer or schedule is made.
    """
    optimizer = [name for name in names if name.startswith("optim")]
    schedule = [name for name in names if name.startswith("lr_scheduler")]
    others = [name for name in names if name not in (*optimizer, *schedule, "disable_tqdm")]
    # Without the folder: a refused training leaves none.
    args = copy(args)
    step = others
    with TemporaryDirectory() as args.output_dir:
        try:
            trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=[0], eval_dataset=[0])
            step = optimizer
            kwargs = Trainer.get_optimizer_cls_and_kwargs(args, trainer.model)[1]
            trainer.create_optimizer()
            step = schedule
            trainer.create_scheduler(PROBE_STEPS)
            trainer.optimizer.step()
            for _ in range(PROBE_STEPS * (args.lr_scheduler_type != "reduce_lr_on_plateau")):
                trainer.lr_scheduler.step()
        except Exception as error:
            # The layers are those of another model.
            if any(word in args.optim for word in TARGETED) and not isinstance(error, ImportError):
                return
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in step) or 'The arguments'} must fit the Trainer, got "
                f"{ ({name: getattr(args, name) for name in step}) } ({describe_error(error)}). Correct them, install "
                "the package that they need, or leave them out."
            ) from error
    optim_args = args.optim_args
    args.optim_args = None
    if optim_args and kwargs == Trainer.get_optimizer_cls_and_kwargs(args, trainer.model)[1]:
        raise ValueError(
            f"`optim_args` must come with an optim that reads them, got {optim_args!r} for {args.optim}, without "
            "effect. Leave it out, or set the Trainer's arguments of the optimizer, such as adam_beta1."
        )


def check_best_model(args: TrainingArguments) -> None:
    """Raise `ValueError` for a choice of the best checkpoint by a metric that the training does not measure."""
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") != "loss":
        raise ValueError(
            f"`metric_for_best_model` must be 'loss', the only metric of the training, got {metric!r}. Leave it out."
        )
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError(
            f"`save_strategy=best` must come with {EVALUATED}, got 'no'. Set eval_strategy, or another save_strategy."
        )

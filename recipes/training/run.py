"""The training that recipes.train starts: arguments, resuming, and the folder of the finished model."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import set_seed

from modeling_unigrf import UniGRFConfig
from modeling_unigrf.adapters_unigrf import RECORD_FILE, TRANSITIONS_FILE, find_adapter
from recipes.common.arguments import REPOSITORY, check_folder, parse_arguments
from recipes.common.files import (
    check_writable,
    damaged_files,
    file_hashes,
    is_whole_json,
    read_json,
    whole_folder,
    write_errors,
    write_json,
)
from recipes.common.hashing import sha256, weights_of
from recipes.common.run_tracking import begin, last_checkpoint, require_single_device
from recipes.data.leave_one_out import with_held_out
from recipes.data.prepared import load_prepared, prepared
from recipes.training.arguments import TRAINER_DEFAULTS, DataArguments, ModelArguments, check_together
from recipes.training.best_checkpoint import find_best_checkpoint
from recipes.training.callbacks import build_callbacks
from recipes.training.datasets import build_datasets
from recipes.training.lora import SaveRecord, add_adapter, lora_fields, save_adapter
from recipes.training.loss_parts import LossParts
from recipes.training.model_init import build_model
from recipes.training.stateful_callback import StatefulCallback
from recipes.training.trainer_arguments import check_trainer_arguments

# Kinds of files that make a model's folder.
MODEL_FILES = (".json", ".safetensors", ".py")
# Arguments of recipes.prepare that are paths; their content is hashed.
PREPARED_PATHS = ("interactions", "items", "embeddings", "tokenizer", "output_dir")


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Train a model, or resume its training, and return the folder of the finished model."""
    check_arguments(model_args, data_args, training_args)
    run = TrainingRun.begin(model_args, data_args, training_args)
    # Resuming a finished training would train on.
    if run.is_finished():
        print(f"{run.folder} was trained with these arguments and data, reused")
        return run.folder
    check_writable(run.folder, "checkpoint_dir")
    set_seed(training_args.seed)

    # Data and model
    data = load_prepared(data_args.data_dir)
    if data_args.refit is not None:
        data.dataset = with_held_out(data.dataset, data_args.refit)
    model = build_model(model_args, data_args, data)
    check_room(run.folder, training_args, model)
    with training_args.main_process_first(desc="rows"):
        train_rows, validation_rows = build_datasets(
            model_args, data_args, data, training_args.seed, with_times=model.config.reads_times
        )

    # Training
    callbacks, collator = build_callbacks(model_args, data_args, model, data, train_rows, training_args.seed)
    trained: torch.nn.Module = model
    if model_args.lora is not None:
        trained = add_adapter(model, model_args.lora, str(model_args.init_from))
        callbacks.append(SaveRecord(model, str(model_args.init_from)))
    callbacks.insert(0, LossParts(trained))
    trainer = Trainer(
        model=trained,
        args=training_args,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=data.tokenizer,
        callbacks=callbacks,
    )
    saved = [callback.file for callback in callbacks if isinstance(callback, StatefulCallback)]
    last = last_checkpoint(training_args.output_dir, saved)
    find_best_checkpoint(training_args, last)
    with write_errors(training_args.output_dir):
        metrics = fit(trainer, last)

    # Result. All processes gather the weights that FSDP or ZeRO spreads over them.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        with whole_folder(run.folder, run.log_file.name) as folder:
            if model_args.lora is None:
                trainer.model.save_pretrained(folder, state_dict=weights)
            else:
                save_adapter(trained, str(model_args.init_from), folder)
            data.tokenizer.save_pretrained(folder)
            run.write_log(folder, metrics, trainer.state.log_history)
            if not (folder / TRANSITIONS_FILE).exists():
                # An adapter would take the table of an earlier one.
                (run.folder / TRANSITIONS_FILE).unlink(missing_ok=True)
    if training_args.distributed_state is not None:
        # The caller of any process may read the folder.
        training_args.distributed_state.wait_for_everyone()
    return run.folder


def check_arguments(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that no training can have, before any work."""
    is_plain = not (model_args.enhancer or model_args.second_stage or model_args.lora)
    require_single_device(training_args, may_shard=is_plain)
    check_trainer_arguments(training_args, TRAINER_DEFAULTS)
    check_together(model_args, data_args)
    check_no_adapter(model_args.init_from)
    if model_args.lora is not None:
        lora_fields(model_args.lora)
    check_folder(model_args.init_from, "init_from", or_repository=True)
    if data_args.refit is not None:
        check_refit(data_args, training_args)


def check_no_adapter(init_from: str | None) -> None:
    """Raise `ValueError` if the checkpoint to start from is an adapter's folder."""
    is_place = init_from is not None and (Path(init_from).is_dir() or REPOSITORY.fullmatch(init_from))
    if is_place and find_adapter(init_from, {}) is not None:
        raise ValueError(
            f"`init_from` must be a whole checkpoint, got the adapter {init_from}. Save it merged: "
            f"`pipeline('recommendation', {init_from!r}, trust_remote_code=True).save_pretrained('merged')`."
        )


def check_room(folder: Path, training_args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raise `ValueError` unless the disks have room for the model, and for a checkpoint with the optimizer's state."""
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_writable(folder, "checkpoint_dir", num_bytes)
    if training_args.save_strategy != "no":
        # Adam has two moments of each weight.
        check_writable(training_args.output_dir, "output_dir", 3 * num_bytes)


def fit(trainer: Trainer, last: str | None) -> dict[str, float]:
    """
    Train, or resume from the checkpoint `last`, and return the metrics of the whole training.

    The Trainer's loss and times of a resumed training are those of the last part, and leave its log. The loss of all
    parts is the mean of the logged losses. The times of the earlier parts are not known.
    """
    if last is None:
        return trainer.train().metrics
    state = TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=last)
        state = trainer.state
    else:
        # Killed after its last step: the Trainer would take one more.
        trainer.state = state
        trainer._load_from_checkpoint(last)
        restore_sampling_bias(trainer.model.config, Path(last))
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            trainer._load_best_model()
    state.log_history[:] = [entry for entry in state.log_history if "train_runtime" not in entry]
    losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
    metrics = {"total_flos": state.total_flos, "epoch": state.epoch}
    if losses:
        num_steps = np.diff(list(losses), prepend=0)
        metrics["train_loss"] = float(np.average(list(losses.values()), weights=num_steps))
    return metrics


def restore_sampling_bias(config: UniGRFConfig, checkpoint: Path) -> None:
    """Set the sampling bias that training stored in a config to that of a Trainer's checkpoint."""
    record = checkpoint / RECORD_FILE
    stored = read_json(record)["config"] if record.is_file() else read_json(checkpoint / "config.json")
    config.next_logit_bias = stored["next_logit_bias"]


def check_refit(data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise `ValueError` for a refit that would be evaluated on what it learns, or from a missing checkpoint."""
    if training_args.eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy` must be 'no' with refit, which learns the validation items, got "
            f"{training_args.eval_strategy!r}. Leave it out."
        )
    if not (Path(data_args.refit_from) / "generation_config.json").is_file():
        raise ValueError(
            f"`refit_from` must be a checkpoint that recipes.evaluate measured, got {data_args.refit_from!r} without "
            "generation_config.json. Train and evaluate without refit first."
        )


@dataclass
class TrainingRun:
    """
    The folder of a finished model, and hashes of the inputs of its training.

    Args:
        folder (`Path`): Folder that receives the model and `training_log.json`.
        work (`str`): Hash of the arguments, the prepared data and the checkpoint to start from.
        interactions (`str`): Hash of the interactions. `recipes.evaluate` compares it with the hash of its data.
        refit (`str`, *optional*): Held-out items that training reads.
    """

    folder: Path
    work: str
    interactions: str
    refit: str | None = None

    @classmethod
    def begin(
        cls, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
    ) -> "TrainingRun":
        """
        Record the arguments in `output_dir`.

        Raises:
            ValueError: if `output_dir` holds a training with other arguments.
        """
        folder = Path(data_args.checkpoint_dir or Path(training_args.output_dir) / "checkpoint")
        arguments = recorded_arguments(model_args, data_args, training_args)
        default_model, default_data, default_training = parse([f"--data_dir={folder}", f"--output_dir={folder}"])
        defaults = {
            "model": asdict(default_model),
            "data": asdict(default_data),
            "training": default_training.to_dict(),
        }
        # The first process writes the file, which the others compare.
        with training_args.main_process_first(desc="arguments"):
            is_first = training_args.process_index == 0
            log_file = folder / "training_log.json"
            arguments = begin(Path(training_args.output_dir), arguments, log_file, is_first, defaults)
        work = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()
        return cls(folder, work, arguments["prepared"]["inputs"]["interactions"], data_args.refit)

    @property
    def log_file(self) -> Path:
        """The training log, which marks a finished model."""
        return self.folder / "training_log.json"

    def is_finished(self) -> bool:
        """Return whether the folder holds a whole model of the same work."""
        log = read_json(self.log_file) if is_whole_json(self.log_file) else {}
        if log.get("work") != self.work:
            return False
        damaged = damaged_files(log["files"], self.folder)
        if not damaged and weights_of(self.folder) == log["weights"]:
            return True
        print(f"{self.folder} is trained again, since {damaged or 'its weights'} are missing or changed", flush=True)
        return False

    def write_log(self, folder: Path, metrics: dict[str, float], log_history: list[dict]) -> None:
        """Write the training log, which vouches for the files of a folder, into it."""
        files = [file for file in folder.iterdir() if file.suffix in MODEL_FILES]
        record = {"work": self.work, "files": file_hashes(files, folder), "weights": weights_of(folder)}
        log = {"metrics": metrics, "log_history": log_history, "interactions": self.interactions, "refit": self.refit}
        write_json(folder / self.log_file.name, {**record, **log})


def recorded_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, dict]:
    """Return the arguments of a training, with its data and checkpoints by their content: their paths may change."""
    record = prepared(data_args.data_dir)
    used = {name: value for name, value in record["arguments"].items() if name not in PREPARED_PATHS}
    arguments = {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()}
    arguments["prepared"] = {**record, "arguments": used}
    del arguments["data"]["data_dir"]
    if model_args.init_from is not None and (weights := weights_of(model_args.init_from)):
        arguments["init_from"] = weights
        del arguments["model"]["init_from"]
    if data_args.refit_from is not None:
        arguments["refit_from"] = sha256(Path(data_args.refit_from) / "generation_config.json")
        del arguments["data"]["refit_from"]
    return arguments


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse the command line, with the Trainer's defaults for a small model."""
    return parse_arguments(
        ModelArguments, DataArguments, TrainingArguments, defaults=TRAINER_DEFAULTS, arguments=arguments
    )

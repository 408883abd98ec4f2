"""The training that recipes.train starts: arguments, resuming, and the folder of the finished model."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, set_seed

from modeling_unigrf import RecommendationPipeline
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
from recipes.common.hashing import weights_of
from recipes.common.run_tracking import begin, last_checkpoint, require_single_device
from recipes.data.leave_one_out import with_held_out
from recipes.data.prepared import load_prepared, prepared
from recipes.training.arguments import TRAINER_DEFAULTS, DataArguments, ModelArguments, check_together
from recipes.training.callbacks import build_callbacks
from recipes.training.datasets import build_datasets
from recipes.training.model_init import build_model
from recipes.training.stateful_callback import StatefulCallback


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Train a model, or resume its training, and return the folder of the finished model."""
    require_single_device(training_args)
    run = TrainingRun.begin(model_args, data_args, training_args)
    # Resuming a finished training would train on.
    if run.is_finished():
        print(f"{run.folder} was trained with these arguments and data, reused")
        return run.folder
    check_together(model_args, data_args)
    set_seed(training_args.seed)

    # Data and model
    data = load_prepared(data_args.data_dir)
    if data_args.refit is not None:
        check_refit(data_args, training_args)
        data.dataset = with_held_out(data.dataset, data_args.refit)
    model = build_model(model_args, data_args, data)
    with training_args.main_process_first(desc="rows"):
        train_rows, validation_rows = build_datasets(
            model_args, data_args, data, training_args.seed, with_times=model.config.reads_times
        )

    # Training
    callbacks, collator = build_callbacks(model_args, data_args, model, data, train_rows, training_args.seed)
    trainer = Trainer(
        model=model,
        args=replace(training_args, remove_unused_columns=False),  # the collator chooses the columns
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=data.tokenizer,
        callbacks=callbacks,
    )
    saved = [callback.file for callback in callbacks if isinstance(callback, StatefulCallback)]
    result = trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir, saved))

    # Result
    if trainer.is_world_process_zero():
        RecommendationPipeline(model=trainer.model, tokenizer=data.tokenizer).save_pretrained(run.folder)
        run.write_log(trainer, result)
    if training_args.distributed_state is not None:
        # The caller of any process may read the folder.
        training_args.distributed_state.wait_for_everyone()
    return run.folder


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
        arguments = {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()}
        arguments["prepared"] = prepared(data_args.data_dir)
        # A checkpoint that is trained again keeps its path.
        if model_args.init_from is not None:
            arguments["init_from"] = weights_of(model_args.init_from)
        # The first process writes the file, which the others compare.
        with training_args.main_process_first(desc="arguments"):
            is_first = training_args.process_index == 0
            arguments = begin(Path(training_args.output_dir), arguments, folder / "training_log.json", writes=is_first)
        work = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()
        return cls(folder, work, arguments["prepared"]["inputs"]["interactions"], data_args.refit)

    @property
    def log_file(self) -> Path:
        """The training log, which marks a finished model."""
        return self.folder / "training_log.json"

    def is_finished(self) -> bool:
        """Return whether the folder holds a model of the same work."""
        return self.log_file.exists() and json.loads(self.log_file.read_text()).get("work") == self.work

    def write_log(self, trainer: Trainer, result: TrainOutput) -> None:
        """Write the training log."""
        log = {"work": self.work, "metrics": result.metrics, "log_history": trainer.state.log_history}
        write_json(self.log_file, {**log, "interactions": self.interactions, "refit": self.refit})


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse the command line, with the Trainer's defaults for a small model."""
    return parse_arguments(
        ModelArguments, DataArguments, TrainingArguments, defaults=TRAINER_DEFAULTS, arguments=arguments
    )

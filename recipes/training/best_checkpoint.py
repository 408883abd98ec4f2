"""Find the best checkpoint of a training whose folder has moved."""

from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from recipes.common.files import whole_file


def find_best_checkpoint(args: TrainingArguments, last: str | None) -> None:
    """
    Let the checkpoint `last`, which a training resumes from, name the best checkpoint in today's `output_dir`.

    The Trainer stores the path of the best checkpoint, and ignores one that is gone. None: nothing is resumed.

    Raises:
        ValueError: if load_best_model_at_end needs a checkpoint that is not there.
    """
    if last is None:
        return
    file = Path(last) / TRAINER_STATE_NAME
    with args.main_process_first(desc="best checkpoint"):
        state = TrainerState.load_from_json(str(file))
        if state.best_model_checkpoint is None:
            return
        best = Path(args.output_dir) / Path(state.best_model_checkpoint).name
        if args.load_best_model_at_end and not (best / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                "`output_dir` must hold the best checkpoint of the training, for load_best_model_at_end, got no whole "
                f"{best.name} in {args.output_dir}. Restore it, or start again in another output_dir."
            )
        if state.best_model_checkpoint != str(best):
            state.best_model_checkpoint = str(best)
            with whole_file(file) as unfinished:
                state.save_to_json(str(unfinished))

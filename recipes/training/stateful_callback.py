"""Save and restore a callback's tensors with the Trainer's checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from recipes.common.files import whole_file


class StatefulCallback(TrainerCallback):
    """
    Save a callback's tensors with the Trainer's checkpoints, and restore them when a training resumes.

    Args:
        file (`str`): Name of the file in a checkpoint's folder.
        tensors (`dict`): The tensors, which the callback changes in place. They lie in shared memory, together with
            `made_at`, so the workers of a data loader see every change.

    Raises:
        ValueError: when a training resumes from a checkpoint without the file.
    """

    def __init__(self, file: str, tensors: dict[str, torch.Tensor]):
        self.file = file
        tensors = {**tensors, "made_at": torch.tensor(-1)}
        self.tensors = {name: tensor.share_memory_() for name, tensor in tensors.items()}

    @property
    def made_at(self) -> int:
        """The epoch when the tensors were made; -1: not yet."""
        return int(self.tensors["made_at"])

    @made_at.setter
    def made_at(self, epoch: int):
        self.tensors["made_at"].fill_(epoch)

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the tensors if the training resumes."""
        if not state.global_step:
            return
        file = self._path(args, state)
        if not file.is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be a checkpoint with {self.file}, which a training with "
                f"{type(self).__name__} saves, got no {file}. Resume one that had it, in its own output_dir."
            )
        stored = load_file(file)
        for name, tensor in self.tensors.items():
            tensor.copy_(stored[name])

    def on_save(self, args, state, control, **kwargs):
        """Save the tensors beside the Trainer's state."""
        if args.should_save:
            with whole_file(self._path(args, state)) as file:
                save_file({name: tensor.clone() for name, tensor in self.tensors.items()}, file)

    @staticmethod
    def process_batches(lengths: np.ndarray, batch_size: int, args, desc: str) -> Iterator[np.ndarray]:
        """
        Yield this process's part of the rows in batches of similar lengths, so that little is padded.

        Args:
            lengths: Length of every row.
            batch_size: Most rows of a batch.
            args (`TrainingArguments`): Number of processes, index of this one, and whether to show progress.
            desc: Label of the progress bar.
        """
        rows = np.array_split(np.arange(len(lengths)), args.world_size)[args.process_index]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc=desc, unit="batch", disable=args.disable_tqdm or args.process_index > 0):
            yield rows[start : start + batch_size]

    def _path(self, args, state) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self.file

"""Save and restore a callback's tensors with the Trainer's checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class StatefulCallback(TrainerCallback):
    """
    Saves what a callback makes in some epochs with the Trainer's checkpoints, and takes it back when a training is resumed;
    `ValueError` if it is not there.

    Args:
        file (`str`): Name of the file.
        tensors (`dict`): They are written into in place, and are put into shared memory: workers of a data loader see later
            what is written, and so they see `made_at`, the epoch when it was (-1: not yet).
    """

    def __init__(self, file: str, tensors: dict[str, torch.Tensor]):
        tensors = {**tensors, "made_at": torch.tensor(-1)}
        self.file, self.tensors = file, {name: tensor.share_memory_() for name, tensor in tensors.items()}

    @property
    def made_at(self) -> int:
        return int(self.tensors["made_at"])

    @made_at.setter
    def made_at(self, epoch: int):
        self.tensors["made_at"].fill_(epoch)

    def on_train_begin(self, args, state, control, **kwargs):
        file = self._path(args, state)
        if state.global_step:  # a training that is resumed
            if not file.is_file():
                raise ValueError(
                    f"Expected {file}, which a training with {type(self).__name__} saves with its checkpoints, found none. Resume "
                    "one that had it, in its own output_dir."
                )
            saved = load_file(file)
            for name, tensor in self.tensors.items():
                tensor.copy_(saved[name])

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            save_file({name: tensor.clone() for name, tensor in self.tensors.items()}, self._path(args, state))

    @staticmethod
    def my_batches(lengths: np.ndarray, batch_size: int, args, desc: str) -> Iterator[np.ndarray]:
        """This process's part of rows of such lengths, in batches of similar ones, so that little is padded."""
        mine = np.array_split(np.arange(len(lengths)), args.world_size)[args.process_index]
        mine = mine[np.argsort(lengths[mine], kind="stable")]
        starts = range(0, len(mine), batch_size)
        for start in tqdm(starts, desc=desc, unit="batch", disable=args.disable_tqdm or args.process_index > 0):
            yield mine[start : start + batch_size]

    def _path(self, args, state) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self.file

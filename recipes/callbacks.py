"""
Callbacks of the stock `Trainer`: the parts of the loss in its log, UniGRF's adaptive weighter, and candidates of RecoChain's
stage II that are kept for some epochs or steps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.cache_utils import DynamicCache
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_unigrf.candidates_unigrf import beam_candidates
from recipes.histories import padded


class LossParts(TrainerCallback):
    """
    Adds the means of the parts of the loss to what the Trainer logs.

    Raises:
        ValueError: in training or at its end, if a part is not finite (the Trainer's own log would leave it out), or before it,
            with label smoothing, for which the Trainer would leave all of them out.
    """

    names = ("generation_loss", "ranking_loss", "dense_loss", "contrastive_loss")

    def __init__(self, model: torch.nn.Module):
        self.parts: list[dict[str, torch.Tensor]] = []
        model.register_forward_hook(self._collect)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.label_smoothing_factor:
            raise ValueError(
                f"Expected label_smoothing_factor=0, found {args.label_smoothing_factor}: Trainer would keep the labels to itself "
                "and train a smoothed loss over all tokens in place of this model's. Leave it out."
            )

    def _collect(self, model, inputs, outputs):
        if model.training and outputs.loss is not None:
            self.parts.append({name: outputs[name].float() for name in self.names if outputs.get(name) is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.parts:
            means = self._means(state)
            logs.update(means)
            state.log_history[-1].update(means)

    def on_train_end(self, args, state, control, **kwargs):
        self._means(state)  # of the steps after the last log

    def _means(self, state) -> dict[str, float]:
        """Of the parts since the last call."""
        found = {name: [part[name] for part in self.parts if name in part] for name in self.names}
        means = {name: torch.stack(values).mean().item() for name, values in found.items() if values}
        self.parts.clear()
        check_finite(means, f"at step {state.global_step}")
        return means


def check_finite(losses: dict[str, float], where: str) -> None:
    """Raises `ValueError` if a loss is NaN or infinite."""
    if not all(map(math.isfinite, losses.values())):
        raise ValueError(
            f"Expected finite losses, found {losses} {where}. Lower the learning rate, warm it up, or clip gradients "
            "(max_grad_norm)."
        )


class AdaptiveWeighter(TrainerCallback, ExportableState):
    """
    Weighs generation and ranking by how slowly each converges (UniGRF's gradient-guided adaptive weighter, in our reading:
    dynamic weight averaging). With the mean losses of the last two windows, `r = last / the one before`, clamped to `bounds`,
    and `weights = 2 * softmax(r / temperature)` hold for the next window; the first two have weights of 1. With
    `form="gradient_norm"` the weights are proportional to `r / (mean gradient norm)`, and sum to 2, so that the weighted
    gradients of both losses toward the backbone's output are as long as their losses are slow (GradNorm, Chen et al. 2018,
    arXiv 1711.02257, section 3, solved for the weights instead of descended to).

    The weights are the same on all processes, are logged (those of the last step), and are saved with the Trainer's
    checkpoints: train with `restore_callback_states_from_checkpoint=True` to resume them.

    Args:
        window_steps (`int`, *optional*): Optimizer steps of a window; an epoch by default.
        temperature (`float`): Lower: further apart. At 2, a usual value, losses that fall by 5 % and not at all get weights
            of 0.99 and 1.01; at 0.1, of 0.76 and 1.24. Not used by `gradient_norm`.
        bounds (`tuple[float, float]`): Of the ratios: a loss that jumps, as when an enhancer is switched on, is not to rule the
            weights.
        form (`str`): `"loss_ratio"` or `"gradient_norm"`, which takes a second backward through the heads.

    Raises:
        ValueError: on arguments that are not positive, a training that ends before the third window and, in training, if a loss
            is not finite, not computed or, for `gradient_norm`, has no gradient at the backbone's output.
    """

    names = ("generation_loss", "ranking_loss")

    def __init__(
        self,
        window_steps: int | None = None,
        temperature: float = 0.1,
        form: Literal["loss_ratio", "gradient_norm"] = "loss_ratio",
        bounds: tuple[float, float] = (0.5, 1.5),
    ):
        if temperature <= 0 or (window_steps is not None and window_steps < 1):
            raise ValueError(
                f"Expected a positive temperature and window_steps, found {temperature} and {window_steps}."
            )
        if form not in ("loss_ratio", "gradient_norm"):
            raise ValueError(f"Expected the form loss_ratio or gradient_norm, found {form!r}.")
        if not 0 < bounds[0] <= 1 <= bounds[1]:
            raise ValueError(
                f"Expected bounds of a ratio, the lower in (0, 1] and the upper from 1 on, found {bounds}."
            )
        self.window_steps, self.temperature, self.form, self.bounds = window_steps, temperature, form, tuple(bounds)
        # Of the two losses, for gradient_norm of the two norms, and of batches: in the window, by all processes; and in the
        # step that is not over, by this one.
        self.sums, self.step, self.previous, self.weights = [0.0] * 5, [0.0] * 5, None, [1.0, 1.0]
        self.used = self.weights  # of the last step: what is logged with its loss
        self.model = self.hook = None
        self.has_stepped = False  # since it was made or loaded

    def state(self) -> dict:
        attributes = {name: getattr(self, name) for name in ("previous", "weights")}
        attributes["sums"] = [float(one) for one in self.sums]
        arguments = {name: getattr(self, name) for name in ("window_steps", "temperature", "form", "bounds")}
        return {"args": arguments, "attributes": attributes}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trained = (model.config.generation_loss_weight, model.config.ranking_loss_weight)
        if 0 in trained:
            raise ValueError(
                f"Expected two losses to weigh, found generation_loss_weight and ranking_loss_weight {trained}. Train without "
                "adaptive weights, or both losses."
            )
        windows = state.num_train_epochs if self.window_steps is None else state.max_steps / self.window_steps
        if windows <= 2:
            raise ValueError(
                f"Expected more than two windows of training, found {windows:g} (window_steps={self.window_steps}; None: an epoch): "
                "the first two have weights of 1, so that nothing would be weighed. Set window_steps lower, or train for longer."
            )
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model.task_weights = tuple(self.weights)
        self.model.measures_gradients = self.form == "gradient_norm"
        self.hook = model.register_forward_hook(self._collect)

    def on_train_end(self, args, state, control, **kwargs):
        self.model.measures_gradients, self.model.task_weights = False, (1.0, 1.0)
        self.hook.remove()

    def _collect(self, model, inputs, outputs):
        if model.training and outputs.loss is not None:
            norms = [0.0, 0.0] if outputs.gradient_norms is None else outputs.gradient_norms.double().unbind()
            new = [*(outputs[name].double() for name in self.names), *norms, 1.0]
            self.step = [total + one for total, one in zip(self.step, new, strict=True)]

    def on_step_end(self, args, state, control, **kwargs):
        new = torch.stack([torch.as_tensor(one, dtype=torch.float64, device=args.device) for one in self.step])
        # At every step, so that what a checkpoint holds is of all processes.
        self.sums = torch.as_tensor(self.sums, dtype=torch.float64, device=args.device) + reduce(new, reduction="sum")
        self.step, self.used, self.has_stepped = [0.0] * 5, self.weights, True
        if self.window_steps is not None and state.global_step % self.window_steps == 0:
            self._close_window()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Not at an epoch's end, which a training that is resumed from there does not come by. One that is resumed within an
        # epoch comes by the beginning of that epoch again.
        if self.window_steps is None and self.sums[-1] and (self.has_stepped or float(state.epoch).is_integer()):
            self._close_window()

    def _close_window(self) -> None:
        *totals, count = map(float, self.sums)
        *means, generation_norm, ranking_norm = [total / count for total in totals]
        check_finite(dict(zip(self.names, means, strict=True)), f"in a window of {count:.0f} batches")
        if self.previous is not None:
            ratios = [
                min(self.bounds[1], max(self.bounds[0], mean / max(before, 1e-12)))
                for mean, before in zip(means, self.previous, strict=True)
            ]
            if self.form == "loss_ratio":
                shares = torch.tensor(ratios).div(self.temperature).softmax(dim=0)
            else:
                norms = torch.tensor([generation_norm, ranking_norm])
                if not norms.all():
                    raise ValueError(
                        f"Expected a gradient of both losses toward the backbone's output, found norms of {norms.tolist()} for "
                        f"{self.names}: one of them does not reach the histories' states, as the candidates of stage II with "
                        "stop_gradient_history. Use the form loss_ratio."
                    )
                shares = torch.tensor(ratios) / norms
                shares = shares / shares.sum()
            self.weights = (2 * shares).tolist()
        self.previous, self.sums = means, [0.0] * 5
        self.model.task_weights = tuple(self.weights)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            weights = dict(zip(("generation_weight", "ranking_weight"), self.used, strict=True))
            logs.update(weights)
            state.log_history[-1].update(weights)


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


@dataclass
class CandidateCollator:
    """What `CachedCandidates.collator` returns; a class, so that any kind of worker of a data loader can be handed it."""

    collate: Callable
    items: torch.Tensor | None  # None: the model's own hook adds them, by the rows' numbers

    def __call__(self, rows: list[dict]) -> dict:
        if "row" not in rows[0]:
            return self.collate(rows)
        batch = self.collate([{name: value for name, value in row.items() if name != "row"} for row in rows])
        numbers = torch.tensor([row["row"] for row in rows])
        return batch | ({"row": numbers} if self.items is None else {"candidates": self.items[numbers]})


class CachedCandidates(StatefulCallback):
    """
    Stage II on candidates that are kept, in place of a search in every step: proposed for all rows every `every_epochs`
    epochs, or for a row when it comes and its own are `every_steps` steps old. Cheaper from two epochs on, and without the
    dropout that a search inside a training step has.

        beams = CachedCandidates(model, rows, num_beams=20, every_epochs=2)
        Trainer(..., train_dataset=rows, data_collator=beams.collator(collate), callbacks=[beams])

    A row is seen once an epoch: with fewer steps than that between them, all are searched for when they come. They are saved
    with the Trainer's checkpoints. Those of epochs are the same on all processes; those of steps need a single one.

    Args:
        model (`UniGRFForCausalLM`)
        rows (`Dataset`): Training rows, each of one history that ends in the item that is to be ranked, with `row`, its number
            (`remove_unused_columns=False` keeps it). Their `timestamps` are read, if they have some; their `blocked_items` are no
            candidates.
        num_beams (`int`): Candidates a row.
        every_epochs (`int`): Epochs between two searches for all rows; not read with `every_steps`.
        batch_size (`int`): Rows of such a search that are run together.
        every_steps (`int`, *optional*): Steps for which a row's candidates are kept.

    Raises:
        ValueError: on numbers below 1, or rows without `row`; with `every_steps`, in training with several processes.
    """

    def __init__(
        self,
        model,
        rows: Dataset,
        num_beams: int,
        every_epochs: int = 1,
        batch_size: int = 128,
        every_steps: int | None = None,
    ):
        least = min(num_beams, every_epochs, 1 if every_steps is None else every_steps)
        if least < 1 or "row" not in rows.column_names:
            raise ValueError(
                "Expected num_beams, every_epochs and every_steps of at least 1 and rows with a column `row`, found "
                f"{num_beams}, {every_epochs}, {every_steps} and {rows.column_names}."
            )
        self.model, self.rows, self.every_epochs, self.batch_size = model, rows, every_epochs, batch_size
        self.every_steps, self.step = every_steps, 0
        self.items, self.searched_at = torch.full((len(rows), num_beams), -1), torch.full((len(rows),), -1)
        super().__init__("candidates.safetensors", {"items": self.items, "searched_at": self.searched_at})
        if every_steps is not None:
            # Not in the collator, which is batches ahead of the model.
            model.register_forward_pre_hook(self._with_candidates, with_kwargs=True)

    def collator(self, collate: Callable) -> Callable:
        """Wraps a data collator: rows with their number also get `candidates`; others (of an evaluation) pass as they are."""
        return CandidateCollator(collate, None if self.every_steps else self.items)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.every_steps and args.world_size > 1:
            raise ValueError(
                f"Expected one process with every_steps, found {args.world_size}, of which each would know its own rows' beams "
                "alone. Use every_epochs."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def _with_candidates(self, model, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a forward on rows of a training: their candidates, searched for again where they are too old."""
        rows = kwargs.pop("row", None)
        if rows is None:
            return None
        rows = rows.cpu()
        is_old = (self.searched_at[rows] < 0) | (self.step - self.searched_at[rows] >= self.every_steps)
        if is_old.any():
            self.items[rows[is_old]] = self._search(rows[is_old].numpy())
            self.searched_at[rows[is_old]] = self.step
        return args, kwargs | {"candidates": self.items[rows].to(model.device)}

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        if not self.every_steps and epoch % self.every_epochs == 0 and self.made_at != epoch:
            self._propose(args, epoch)

    @torch.no_grad()
    def _search(self, rows: np.ndarray) -> torch.LongTensor:
        """The candidates of some rows, `[b, num_beams]`, -1: none: after all but their last item, when that came."""
        model, some, end = self.model, [self.rows[int(row)] for row in rows], -self.model.layout.num_levels - 1

        def histories(name: str, padding: int) -> torch.LongTensor:
            return padded([row[name][:end] for row in some], padding, "left").to(model.device)

        input_ids, times, blocked = histories("input_ids", model.config.pad_token_id), (None, None), None
        if "timestamps" in self.rows.column_names:
            query_time = torch.tensor([row["timestamps"][end] for row in some]).to(model.device)
            times = (histories("timestamps", -1), query_time)
        if "blocked_items" in self.rows.column_names:
            blocked = padded([row["blocked_items"] for row in some]).to(model.device)
        mask, cache = input_ids != model.config.pad_token_id, DynamicCache()
        num_beams, was_training = self.items.shape[1], model.training
        model.eval()
        states = model.prefill(input_ids, mask.long(), cache, *times)
        items = beam_candidates(model, num_beams, states, mask, cache, blocked, times[1]).cpu()
        model.train(was_training)
        return torch.nn.functional.pad(items, (0, num_beams - items.shape[1]), value=-1)

    def _propose(self, args, epoch: int) -> None:
        """Searches for all rows, each process its part of them."""
        lengths = np.array([len(ids) for ids in self.rows["input_ids"]])
        batches = self.my_batches(lengths, self.batch_size, args, "candidates")
        for of_process in gather_object([[(rows, self._search(rows)) for rows in batches]]):
            for rows, items in of_process:
                self.items[rows] = items
        self.made_at = epoch

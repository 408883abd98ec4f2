"""Callbacks of the stock `Trainer`: the parts of the loss in its log, and UniGRF's adaptive weighter."""

import math
from typing import Literal

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class LossParts(TrainerCallback):
    """
    Adds the means of the parts of the loss to what the Trainer logs.

    Raises:
        ValueError: in training, if a part is not finite (the Trainer's own log would leave it out).
    """

    names = ("generation_loss", "ranking_loss", "item_loss", "candidate_loss")

    def __init__(self, model: torch.nn.Module):
        self.parts: list[dict[str, torch.Tensor]] = []
        model.register_forward_hook(self._collect)

    def _collect(self, model, inputs, outputs):
        if model.training and outputs.loss is not None:
            self.parts.append({name: outputs[name].float() for name in self.names if outputs.get(name) is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.parts:
            found = {name: [part[name] for part in self.parts if name in part] for name in self.names}
            means = {name: torch.stack(values).mean().item() for name, values in found.items() if values}
            self.parts.clear()
            check_finite(means, f"at step {state.global_step}")
            logs.update(means)
            state.log_history[-1].update(means)


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
    dynamic weight averaging). With the mean losses of the last two windows, `r = last / the one before`, clamped to [0.5, 1.5],
    and `weights = 2 * softmax(r / temperature)` hold for the next window; the first two have weights of 1. With
    `form="gradient_norm"` the weights are proportional to `r / (mean gradient norm)`, and sum to 2, so that the weighted
    gradients of both losses towards the backbone's output are as long as their losses are slow (GradNorm, Chen et al. 2018,
    arXiv 1711.02257, section 3, solved for the weights instead of descended to).

    The weights are the same on all processes, are logged, and are saved with the Trainer's checkpoints: train with
    `restore_callback_states_from_checkpoint=True` to resume them.

    Args:
        window_steps (`int`, *optional*): Optimiser steps of a window; an epoch by default.
        temperature (`float`): Lower: further apart. At 2, a usual value, losses that fall by 5 % and not at all get weights
            of 0.99 and 1.01; at 0.1, of 0.76 and 1.24. Not used by `gradient_norm`.
        form (`str`): `"loss_ratio"` or `"gradient_norm"`, which takes a second backward through the heads.

    Raises:
        ValueError: on arguments that are not positive and, in training, if a loss is not finite.
    """

    names = ("generation_loss", "ranking_loss")

    def __init__(
        self,
        window_steps: int | None = None,
        temperature: float = 0.1,
        form: Literal["loss_ratio", "gradient_norm"] = "loss_ratio",
    ):
        if temperature <= 0 or (window_steps is not None and window_steps < 1):
            raise ValueError(
                f"Expected a positive temperature and window_steps, found {temperature} and {window_steps}."
            )
        if form not in ("loss_ratio", "gradient_norm"):
            raise ValueError(f"Expected the form loss_ratio or gradient_norm, found {form!r}.")
        self.window_steps, self.temperature, self.form = window_steps, temperature, form
        # Of the two losses and, for gradient_norm, of the two norms.
        self.sums, self.count, self.previous, self.weights = [0.0] * 4, 0, None, [1.0, 1.0]
        self.model = self.hook = None

    def state(self) -> dict:
        attributes = {name: getattr(self, name) for name in ("sums", "count", "previous", "weights")}
        attributes["sums"] = [float(one) for one in self.sums]
        arguments = {name: getattr(self, name) for name in ("window_steps", "temperature", "form")}
        return {"args": arguments, "attributes": attributes}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.model.task_weights = tuple(self.weights)
        self.model.measures_gradients = self.form == "gradient_norm"
        self.hook = model.register_forward_hook(self._collect)

    def on_train_end(self, args, state, control, **kwargs):
        self.model.measures_gradients = False
        self.hook.remove()

    def _collect(self, model, inputs, outputs):
        if model.training and outputs.loss is not None:
            norms = [0.0, 0.0] if outputs.gradient_norms is None else outputs.gradient_norms.double().unbind()
            new = [*(outputs[name].double() for name in self.names), *norms]
            self.sums = [total + one for total, one in zip(self.sums, new, strict=True)]
            self.count += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.window_steps is not None and state.global_step % self.window_steps == 0:
            self._close_window(args.device)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.window_steps is None and self.count:
            self._close_window(args.device)

    def _close_window(self, device: torch.device) -> None:
        sums = torch.tensor([*(float(one) for one in self.sums), self.count], dtype=torch.float64, device=device)
        *totals, count = reduce(sums, reduction="sum").tolist()
        *means, generation_norm, ranking_norm = [total / count for total in totals]
        check_finite(dict(zip(self.names, means, strict=True)), f"in a window of {count:.0f} batches")
        if self.previous is not None:
            ratios = [
                min(1.5, max(0.5, mean / max(before, 1e-12)))
                for mean, before in zip(means, self.previous, strict=True)
            ]
            if self.form == "loss_ratio":
                shares = torch.tensor(ratios).div(self.temperature).softmax(dim=0)
            else:
                norms = torch.tensor([generation_norm, ranking_norm])
                shares = torch.tensor(ratios) / norms.clamp(min=1e-12)
                shares = shares / shares.sum()
            self.weights = (2 * shares).tolist()
        self.previous, self.sums, self.count = means, [0.0] * 4, 0
        self.model.task_weights = tuple(self.weights)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            weights = dict(zip(("generation_weight", "ranking_weight"), self.weights, strict=True))
            logs.update(weights)
            state.log_history[-1].update(weights)

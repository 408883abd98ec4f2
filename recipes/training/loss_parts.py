"""Log the parts of the loss, and stop a training whose loss is not finite."""

import math

import torch
from transformers import TrainerCallback


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

"""Log the parts of the loss, and stop a training whose loss is not finite."""

import math

import torch
from transformers import TrainerCallback


class LossParts(TrainerCallback):
    """
    Add the means of the loss's parts to the Trainer's log.

    Args:
        model (`torch.nn.Module`): The model that is trained.

    Raises:
        ValueError: in training, for a part that is not finite, which the Trainer's log would hide. Before it, for
            label smoothing, with which the Trainer would train another loss.
    """

    names = ("generation_loss", "ranking_loss", "dense_loss", "contrastive_loss")

    def __init__(self, model: torch.nn.Module):
        self.parts: list[dict[str, torch.Tensor]] = []
        model.register_forward_hook(self._add_parts)

    def on_train_begin(self, args, state, control, **kwargs):
        """Reject label smoothing."""
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` must be 0, got {args.label_smoothing_factor}. Leave it out: the "
                "Trainer would train a smoothed loss over all tokens in place of the model's."
            )

    def _add_parts(self, model, inputs, outputs):
        if model.training and outputs.loss is not None:
            self.parts.append({name: outputs[name].float() for name in self.names if outputs.get(name) is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log the means since the last log."""
        if "loss" in logs and self.parts:
            means = self._means(state)
            logs.update(means)
            state.log_history[-1].update(means)

    def on_train_end(self, args, state, control, **kwargs):
        """Check the steps after the last log."""
        self._means(state)

    def _means(self, state) -> dict[str, float]:
        """Return the means of the parts since the last call."""
        values = {name: [part[name] for part in self.parts if name in part] for name in self.names}
        means = {name: torch.stack(losses).mean().item() for name, losses in values.items() if losses}
        self.parts.clear()
        check_finite(means, f"at step {state.global_step}")
        return means


def check_finite(losses: dict[str, float], where: str) -> None:
    """Raise `ValueError` if a loss is NaN or infinite; `where` tells the step or the window."""
    if not all(map(math.isfinite, losses.values())):
        raise ValueError(
            f"The losses must be finite, got {losses} {where}. Lower the learning rate, warm it up, or clip gradients "
            "(max_grad_norm)."
        )

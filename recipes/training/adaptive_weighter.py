"""Weigh the generation and the ranking loss by how slowly each converges (UniGRF)."""

from typing import Literal

import torch
from accelerate.utils import reduce
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from recipes.training.loss_parts import check_finite


class AdaptiveWeighter(TrainerCallback, ExportableState):
    """
    Weigh generation and ranking by how slowly each converges.

    UniGRF calls this the gradient-guided adaptive weighter. Our reading is dynamic weight averaging: each loss has a
    ratio `r`, its mean over the last window divided by its mean over the window before, clamped to `bounds`. The
    weights of the next window are `2 * softmax(r / temperature)`. The first two windows have weights of 1.

    With `form="gradient_norm"`, the weights are proportional to `r / (mean gradient norm)` and sum to 2. The norms of
    the weighted gradients toward the backbone's output then have the ratio of the `r` (GradNorm, Chen et al. 2018,
    arXiv 1711.02257, section 3, in closed form).

    All processes have the same weights. The log holds those of the last step, and the Trainer's checkpoints save them:
    train with `restore_callback_states_from_checkpoint=True` to resume.

    Args:
        window_steps (`int`, *optional*): Optimizer steps of a window. None, the default: an epoch.
        temperature (`float`): Temperature of the softmax, 0.1 by default; not used by `"gradient_norm"`. Lower values
            move the weights apart. Take one loss that falls by 5 % and one that stays: the weights are 0.99 and 1.01
            at 2, a usual value, and 0.76 and 1.24 at 0.1.
        form (`str`): `"loss_ratio"`, the default, or `"gradient_norm"`, which adds a second backward through the
            heads.
        bounds (`tuple[float, float]`): Bounds of the ratios, 0.5 and 1.5 by default. A loss that jumps, as when an
            enhancer starts, must not rule the weights.

    Raises:
        ValueError: for arguments out of range, and for a training that ends before the third window. In training: for
            a loss that is not finite or, with `"gradient_norm"`, has no gradient at the backbone's output.
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
                f"`temperature` and `window_steps` must be positive, got {temperature} and {window_steps}. Raise "
                "them, or leave window_steps out for an epoch."
            )
        if form not in ("loss_ratio", "gradient_norm"):
            raise ValueError(f"`form` must be loss_ratio or gradient_norm, got {form!r}. Choose one of them.")
        if not 0 < bounds[0] <= 1 <= bounds[1]:
            raise ValueError(
                f"`bounds` must be bounds of a ratio, the lower in (0, 1] and the upper from 1 on, got {bounds}. "
                "Choose them on both sides of 1."
            )
        self.window_steps = window_steps
        self.temperature = temperature
        self.form = form
        self.bounds = tuple(bounds)
        # Sums of two losses, two gradient norms and the batches.
        # For the window, over all processes:
        self.sums = [0.0] * 5
        # For the current step, in this process alone:
        self.step_sums = [0.0] * 5
        # Mean losses of the window before.
        self.previous = None
        self.weights = [1.0, 1.0]
        self.last_step_weights = self.weights
        self.model = None
        self.hook = None
        # Whether a step ended since the callback was made or loaded.
        self.has_stepped = False

    def state(self) -> dict:
        """Return the arguments and the state that the Trainer saves with its checkpoints."""
        attributes = {name: getattr(self, name) for name in ("previous", "weights")}
        attributes["sums"] = [float(total) for total in self.sums]
        arguments = {name: getattr(self, name) for name in ("window_steps", "temperature", "form", "bounds")}
        return {"args": arguments, "attributes": attributes}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Check that there are two losses and enough windows, and give the model its weights."""
        objective = model.config.training_config
        loss_weights = (objective.generation_loss_weight, objective.ranking_loss_weight)
        if 0 in loss_weights:
            raise ValueError(
                "`generation_loss_weight` and `ranking_loss_weight` must not be 0 with adaptive weights, got "
                f"{loss_weights}. Train both losses, or train without adaptive weights."
            )
        num_windows = state.num_train_epochs if self.window_steps is None else state.max_steps / self.window_steps
        if num_windows <= 2:
            raise ValueError(
                f"`window_steps` must leave more than two windows of training, got {num_windows:g} for "
                f"window_steps={self.window_steps} (None: an epoch). Set it lower, or train for longer: the first "
                "two windows have weights of 1."
            )
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model.task_weights = tuple(self.weights)
        self.model.measures_gradients = self.form == "gradient_norm"
        self.hook = model.register_forward_hook(self._add_losses)

    def on_train_end(self, args, state, control, **kwargs):
        """Reset the model's weights."""
        self.model.measures_gradients = False
        self.model.task_weights = (1.0, 1.0)
        self.hook.remove()

    def _add_losses(self, model, inputs, outputs):
        if model.training and outputs.loss is not None:
            norms = [0.0, 0.0] if outputs.gradient_norms is None else outputs.gradient_norms.double().unbind()
            values = [*(outputs[name].double() for name in self.names), *norms, 1.0]
            self.step_sums = [total + value for total, value in zip(self.step_sums, values, strict=True)]

    def on_step_end(self, args, state, control, **kwargs):
        """Add the step's sums, and close the window after `window_steps` steps."""
        step_sums = torch.stack(
            [torch.as_tensor(total, dtype=torch.float64, device=args.device) for total in self.step_sums]
        )
        # Reduce every step, so that checkpoints hold sums of all processes.
        earlier_sums = torch.as_tensor(self.sums, dtype=torch.float64, device=args.device)
        self.sums = earlier_sums + reduce(step_sums, reduction="sum")
        self.step_sums = [0.0] * 5
        self.last_step_weights = self.weights
        self.has_stepped = True
        if self.window_steps is not None and state.global_step % self.window_steps == 0:
            self._close_window()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Close the window of the epoch before."""
        # Not at the epoch's end: a resumed training would skip it.
        # A training resumed within an epoch begins that epoch again.
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
                shares = self._balanced_shares(ratios, [generation_norm, ranking_norm])
            self.weights = (2 * shares).tolist()
        self.previous = means
        self.sums = [0.0] * 5
        self.model.task_weights = tuple(self.weights)

    def _balanced_shares(self, ratios: list[float], gradient_norms: list[float]) -> torch.Tensor:
        norms = torch.tensor(gradient_norms)
        if not norms.all():
            raise ValueError(
                "`form` must be loss_ratio if one of the losses does not reach the histories' states, got gradient "
                f"norms of {norms.tolist()} for {self.names}. Choose loss_ratio, as for stage II with "
                "stop_gradient_history."
            )
        shares = torch.tensor(ratios) / norms
        return shares / shares.sum()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log the weights of the last step."""
        if "loss" in logs:
            weights = dict(zip(("generation_weight", "ranking_weight"), self.last_step_weights, strict=True))
            logs.update(weights)
            state.log_history[-1].update(weights)

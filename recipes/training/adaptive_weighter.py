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
    Weighs generation and ranking by how slowly each converges (UniGRF's gradient-guided adaptive weighter, in our
    reading: dynamic weight averaging). With the mean losses of the last two windows, `r = last / the one before`,
        clamped to `bounds`,
    and `weights = 2 * softmax(r / temperature)` hold for the next window; the first two have weights of 1. With
    `form="gradient_norm"` the weights are proportional to `r / (mean gradient norm)`, and sum to 2, so that the
    weighted gradients of both losses toward the backbone's output are as long as their losses are slow (GradNorm,
    Chen et al. 2018, arXiv 1711.02257, section 3, solved for the weights instead of descended to).

    The weights are the same on all processes, are logged (those of the last step), and are saved with the Trainer's
    checkpoints: train with `restore_callback_states_from_checkpoint=True` to resume them.

    Args:
        window_steps (`int`, *optional*): Optimizer steps of a window; an epoch by default.
        temperature (`float`): Lower: further apart. At 2, a usual value, losses that fall by 5 % and not at all get
            weights of 0.99 and 1.01; at 0.1, of 0.76 and 1.24. Not used by `gradient_norm`.
        bounds (`tuple[float, float]`): Of the ratios: a loss that jumps, as when an enhancer is switched on, is not
            to rule the weights.
        form (`str`): `"loss_ratio"` or `"gradient_norm"`, which takes a second backward through the heads.

    Raises:
        ValueError: on arguments that are not positive, a training that ends before the third window and, in training,
            if a loss is not finite, not computed or, for `gradient_norm`, has no gradient at the backbone's output.
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
        # Of the two losses, for gradient_norm of the two norms, and of batches: in the window, by all processes; and
        # in the step that is not over, by this one.
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
        objective = model.config.training_config
        trained = (objective.generation_loss_weight, objective.ranking_loss_weight)
        if 0 in trained:
            raise ValueError(
                f"Expected two losses to weigh, found generation_loss_weight and ranking_loss_weight {trained}. "
                "Train without adaptive weights, or both losses."
            )
        windows = state.num_train_epochs if self.window_steps is None else state.max_steps / self.window_steps
        if windows <= 2:
            raise ValueError(
                f"Expected more than two windows of training, found {windows:g} (window_steps={self.window_steps}; "
                "None: an epoch): the first two have weights of 1, so that nothing would be weighed. Set "
                "window_steps lower, or train for longer."
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
        # Not at an epoch's end, which a training that is resumed from there does not come by. One that is resumed
        # within an epoch comes by the beginning of that epoch again.
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
                        "Expected a gradient of both losses toward the backbone's output, found norms of "
                        f"{norms.tolist()} for {self.names}: one of them does not reach the histories' states, as "
                        "the candidates of stage II with stop_gradient_history. Use the form loss_ratio."
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

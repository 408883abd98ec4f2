"""UniGRF's adaptive weighter: its weights against their formulas, under the stock `Trainer`, and resumed."""

import math

import pytest
import torch
from helpers import assert_same_weights, build_model, histories_dataset, labeled_batch, run_trainer
from transformers import TrainerState, TrainingArguments

from modeling_unigrf import UniGRFCausalLMOutput
from recipes.training.adaptive_weighter import AdaptiveWeighter


class FixedLosses(torch.nn.Module):
    """A model whose forward returns the losses that it is called with."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, generation, ranking, norms=None):
        return fixed_losses(generation, ranking, norms)


def fixed_losses(generation, ranking, norms=None):
    """Make the output of a forward with these losses and norms of their gradients."""
    losses = {"generation_loss": torch.tensor(generation), "ranking_loss": torch.tensor(ranking)}
    norms = None if norms is None else torch.tensor(norms)
    return UniGRFCausalLMOutput(loss=torch.tensor(1.0), gradient_norms=norms, **losses)


def train_window(weighter, model, *losses, steps=1):
    """Train a window of steps with the same losses. Return the next task weights and those that were logged."""
    args = TrainingArguments(use_cpu=True)
    for _ in range(steps):
        model(*losses)
        weighter.on_step_end(args, TrainerState(), None)
    weighter.on_epoch_begin(args, TrainerState(epoch=1.0), None)
    logs = {"loss": 1.0}
    weighter.on_log(args, TrainerState(log_history=[{}]), None, logs)
    return weighter.model.task_weights, (logs["generation_weight"], logs["ranking_weight"])


def test_the_slower_loss_gets_the_greater_weight():
    weighter = AdaptiveWeighter(temperature=0.1)
    model = build_model()
    fixed = FixedLosses(model.config)
    weighter.on_train_begin(None, TrainerState(num_train_epochs=3), None, model=fixed)

    def next_weights(generation, ranking):
        before = fixed.task_weights
        after, logged = train_window(weighter, fixed, generation, ranking, steps=3)
        assert logged == before, "the weights of the window that ends"
        return after

    assert next_weights(4.0, 1.0) == (1.0, 1.0)
    slower = next_weights(3.8, 1.0)  # ratios of 0.95 and 1
    assert slower == pytest.approx((2 / (1 + math.exp(0.5)), 2 / (1 + math.exp(-0.5))), abs=1e-5)
    clamped = pytest.approx((2 / (1 + math.exp(-5)), 2 / (1 + math.exp(5))), abs=1e-5)
    assert next_weights(3.8, 0.1) == clamped, "at the lower bound"
    assert next_weights(38.0, 0.1) == clamped, "at the upper bound"
    with pytest.raises(ValueError, match="losses must be finite"):
        next_weights(float("nan"), 1.0)
    with pytest.raises(ValueError, match="`temperature` and `window_steps` must be positive"):
        AdaptiveWeighter(temperature=0.0)
    with pytest.raises(ValueError, match="bounds of a ratio"):
        AdaptiveWeighter(bounds=(1.5, 2.0))
    weighter.on_train_end(None, None, None)
    assert fixed.task_weights == (1.0, 1.0), "the weights end with the training"

    batch, _ = labeled_batch(model, [3, 2])
    model.task_weights = slower
    out = model(**batch)
    weighted = model.train()(**batch)
    torch.testing.assert_close(out.loss, out.generation_loss + out.ranking_loss)
    expected = slower[0] * weighted.generation_loss + slower[1] * weighted.ranking_loss
    torch.testing.assert_close(weighted.loss, expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_norm_form_balances_the_gradients():
    weighter = AdaptiveWeighter(form="gradient_norm")
    fixed = FixedLosses(build_model().config)
    weighter.on_train_begin(None, TrainerState(num_train_epochs=3), None, model=fixed)
    assert fixed.measures_gradients
    train_window(weighter, fixed, 4.0, 1.0, [6.0, 2.0])
    weights, _ = train_window(weighter, fixed, 3.6, 1.0, [6.0, 2.0])  # ratios of 0.9 and 1
    assert weights == pytest.approx((2 * 0.15 / 0.65, 2 * 0.5 / 0.65), abs=1e-5)
    with pytest.raises(ValueError, match="one of the losses does not reach the histories' states"):
        train_window(weighter, fixed, 3.6, 1.0, [6.0, 0.0])  # as in stage II with stop_gradient_history
    weighter.on_train_end(None, None, None)
    assert not fixed.measures_gradients
    with pytest.raises(ValueError, match="loss_ratio or gradient_norm"):
        AdaptiveWeighter(form="other")


def test_gradient_norms_are_those_toward_the_backbone():
    model = build_model(ranking_loss_weight=0.0).train()
    batch, _ = labeled_batch(model, [4, 2])
    states = []
    model.model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    out = model(**batch)
    assert out.gradient_norms is None
    expected = torch.autograd.grad(out.loss, states[0])[0].norm()
    model.measures_gradients = True
    torch.testing.assert_close(model(**batch).gradient_norms, torch.stack([expected, torch.tensor(0.0)]))
    joint = build_model().train()
    joint.measures_gradients = True
    torch.testing.assert_close(joint(**batch).gradient_norms[0], expected, atol=1e-5, rtol=1e-4)


def test_a_training_too_short_to_be_weighted_is_rejected(tmp_path):
    model = build_model()
    for window, steps in ((None, {"num_train_epochs": 2, "max_steps": -1}), (2, {"max_steps": 4})):
        with pytest.raises(ValueError, match="more than two windows of training, got 2"):
            run_trainer(tmp_path, model, histories_dataset(model, 4), callbacks=[AdaptiveWeighter(window)], **steps)


@pytest.mark.parametrize(
    ("form", "window", "end"),
    [("loss_ratio", 2, 5), ("gradient_norm", 2, 5), ("loss_ratio", None, 2), ("loss_ratio", None, 3)],
)
def test_adaptive_weights_resume_in_a_window_and_at_its_end(tmp_path, form, window, end):
    whole, stopped, resumed = (build_model() for _ in range(3))
    dataset = histories_dataset(whole, 32 if window else 8)  # every window has two steps

    def train(folder, model, resume=None, **arguments):
        weighter = AdaptiveWeighter(window, form=form)
        return run_trainer(tmp_path / folder, model, dataset, resume, [weighter], max_steps=8, **arguments)

    weights = train("whole", whole)
    saving = {"save_strategy": "steps", "save_steps": end, "restore_callback_states_from_checkpoint": True}
    train("parts", stopped, **saving)
    rest = train("parts", resumed, str(tmp_path / "parts" / f"checkpoint-{end}"), **saving)
    assert rest == weights and len(set(weights)) == 3 and weights[:4] == [1.0] * 4
    assert_same_weights(whole.named_parameters(), resumed.named_parameters())


def test_adaptive_weights_reach_a_model_with_an_adapter(monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = build_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=model.modules_to_save))
    weighter = AdaptiveWeighter()
    weighter.on_train_begin(None, TrainerState(num_train_epochs=3), None, model=adapted.train())
    with monkeypatch.context() as patch:
        patch.setattr(adapted, "forward", fixed_losses)
        train_window(weighter, adapted, 4.0, 1.0)
        weights, _ = train_window(weighter, adapted, 3.6, 1.0)
    assert weights[0] < 1 < weights[1]
    batch, _ = labeled_batch(model, [3, 2])
    out = adapted(**batch)
    torch.testing.assert_close(out.loss, weights[0] * out.generation_loss + weights[1] * out.ranking_loss)

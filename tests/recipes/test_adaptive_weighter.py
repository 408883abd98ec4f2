"""UniGRF's adaptive weighter: its weights by hand, under the stock `Trainer`, and resumed."""

import math

import pytest
import torch
from helpers import assert_same_weights, build_model, histories_dataset, random_histories, run_trainer
from transformers import TrainerState, TrainingArguments

from modeling_unigrf import UniGRFCausalLMOutput, training_unigrf
from recipes.training.adaptive_weighter import AdaptiveWeighter


def test_the_slower_loss_gets_the_greater_weight():
    weighter, model, args = AdaptiveWeighter(temperature=0.1), build_model(), TrainingArguments(use_cpu=True)
    weighter.on_train_begin(args, TrainerState(num_train_epochs=3), None, model=model)

    def window(generation, ranking):
        for _ in range(3):
            losses = {"generation_loss": torch.tensor(generation), "ranking_loss": torch.tensor(ranking)}
            weighter._collect(model.train(), None, UniGRFCausalLMOutput(loss=torch.tensor(1.0), **losses))
            weighter.on_step_end(args, TrainerState(), None)
        used = model.task_weights
        weighter.on_epoch_begin(args, TrainerState(epoch=1.0), None)
        state, logs = TrainerState(log_history=[{}]), {"loss": 1.0}
        weighter.on_log(args, state, None, logs)
        assert used == (logs["generation_weight"], logs["ranking_weight"]), "not those of the window that comes"
        return model.task_weights

    assert window(4.0, 1.0) == (1.0, 1.0)
    slower = window(3.8, 1.0)  # ratios .95 and 1
    assert slower == pytest.approx((2 / (1 + math.exp(0.5)), 2 / (1 + math.exp(-0.5))), abs=1e-5)
    input_ids, mask, _ = random_histories(model, [3, 2])
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    out, weighted = model.eval()(**inputs), model.train()(**inputs)
    torch.testing.assert_close(out.loss, out.generation_loss + out.ranking_loss)
    torch.testing.assert_close(
        weighted.loss, slower[0] * weighted.generation_loss + slower[1] * weighted.ranking_loss, atol=1e-5, rtol=1e-5
    )
    weighter.step = [0.0] * 5  # what that forward added
    assert window(3.8, 0.1) == pytest.approx((2 / (1 + math.exp(-5)), 2 / (1 + math.exp(5))), abs=1e-5), "clamped"
    assert window(38.0, 0.1) == pytest.approx((2 / (1 + math.exp(-5)), 2 / (1 + math.exp(5))), abs=1e-5), "also above"
    with pytest.raises(ValueError, match="finite losses"):
        window(float("nan"), 1.0)
    with pytest.raises(ValueError, match="positive temperature"):
        AdaptiveWeighter(temperature=0.0)
    with pytest.raises(ValueError, match="bounds of a ratio"):
        AdaptiveWeighter(bounds=(1.5, 2.0))
    weighter.on_train_end(args, None, None)
    assert model.task_weights == (1.0, 1.0), "they end with their training"


def test_the_gradient_norm_form_balances_the_gradients():
    weighter, model = AdaptiveWeighter(form="gradient_norm"), build_model()
    weighter.on_train_begin(None, TrainerState(num_train_epochs=3), None, model=model)
    input_ids, mask, _ = random_histories(model, [4, 2])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    states = []
    hook = model.model.register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state))
    out = model.train()(**batch)
    hook.remove()
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    generation = training_unigrf.generation_loss(model, states[0], targets)
    expected = torch.autograd.grad(generation, states[0])[0].norm()
    torch.testing.assert_close(out.gradient_norms[0], expected, atol=1e-5, rtol=1e-4)
    weighter.sums = [4.0, 1.0, 6.0, 2.0, 1.0]
    weighter._close_window()
    weighter.sums = [3.6, 1.0, 6.0, 2.0, 1.0]  # ratios .9 and 1
    weighter._close_window()
    assert model.task_weights == pytest.approx((2 * 0.15 / 0.65, 2 * 0.5 / 0.65), abs=1e-5)
    weighter.sums = [3.6, 1.0, 6.0, 0.0, 1.0]  # as of stage II with a detached history
    with pytest.raises(ValueError, match="one of them does not reach the histories' states"):
        weighter._close_window()
    weighter.on_train_end(None, None, None)
    assert model(**batch).gradient_norms is None
    with pytest.raises(ValueError, match="loss_ratio or gradient_norm"):
        AdaptiveWeighter(form="other")
    model.measures_gradients, model.config.ranking_loss_weight = True, 0.0
    torch.testing.assert_close(model(**batch).gradient_norms, torch.stack([expected, torch.tensor(0.0)]))


def test_a_training_in_which_nothing_would_be_weighed_is_refused(tmp_path):
    model = build_model()
    for window, steps in ((None, {"num_train_epochs": 2, "max_steps": -1}), (2, {"max_steps": 4})):
        with pytest.raises(ValueError, match="more than two windows of training, found 2"):
            run_trainer(tmp_path, model, histories_dataset(model, 4), callbacks=[AdaptiveWeighter(window)], **steps)


@pytest.mark.parametrize(
    ("form", "window", "end"),
    [("loss_ratio", 2, 5), ("gradient_norm", 2, 5), ("loss_ratio", None, 2), ("loss_ratio", None, 3)],
)
def test_the_adaptive_weights_are_resumed_in_a_window_and_at_its_end(tmp_path, form, window, end):
    whole, stopped, resumed = (build_model() for _ in range(3))
    dataset = histories_dataset(whole, 32 if window else 8)  # 2 steps a window in any case

    def train(folder, model, resume=None, **arguments):
        weighter = AdaptiveWeighter(window, form=form)
        return run_trainer(tmp_path / folder, model, dataset, resume, [weighter], max_steps=8, **arguments)

    weights = train("whole", whole)
    saving = {"save_strategy": "steps", "save_steps": end, "restore_callback_states_from_checkpoint": True}
    train("parts", stopped, **saving)
    rest = train("parts", resumed, str(tmp_path / "parts" / f"checkpoint-{end}"), **saving)
    assert rest == weights and len(set(weights)) == 3 and weights[:4] == [1.0] * 4, (
        "those that each step was trained with"
    )
    assert_same_weights(whole.named_parameters(), resumed.named_parameters())


def test_the_adaptive_weights_reach_a_model_with_an_adapter():
    from peft import LoraConfig, get_peft_model

    model, args = build_model(), TrainingArguments(use_cpu=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=model.modules_to_save))
    weighter = AdaptiveWeighter()
    weighter.on_train_begin(args, TrainerState(num_train_epochs=3), None, model=adapted)
    weighter.weights = [0.5, 1.5]
    weighter.sums = [4.0, 1.0, 0.0, 0.0, 1.0]
    weighter._close_window()
    input_ids, mask, _ = random_histories(model, [3, 2])
    out = adapted.train()(input_ids=input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(out.loss, 0.5 * out.generation_loss + 1.5 * out.ranking_loss)

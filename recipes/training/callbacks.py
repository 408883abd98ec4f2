"""Choose the callbacks that a training needs, and the collator that goes with them."""

from collections.abc import Callable

from datasets import Dataset
from transformers import TrainerCallback

from modeling_unigrf import UniGRFForCausalLM
from recipes.data.leave_one_out import columns_read
from recipes.data.prepared import PreparedData
from recipes.training.adaptive_weighter import AdaptiveWeighter
from recipes.training.arguments import DataArguments, ModelArguments, named
from recipes.training.cached_candidates import CachedCandidates
from recipes.training.collator import TrainingCollator
from recipes.training.enhancer import OPEN_OPTIONS, EnhancerOptions, RankingDrivenEnhancer


def build_callbacks(
    model_args: ModelArguments,
    data_args: DataArguments,
    model: UniGRFForCausalLM,
    data: PreparedData,
    rows: Dataset,
    seed: int,
) -> tuple[list[TrainerCallback], Callable]:
    """
    Build the callbacks that the arguments ask for, and a collator for the training rows.

    Args:
        model_args: Options of the model.
        data_args: Options of the data.
        model: The model that is trained.
        data: The prepared data.
        rows: The training rows.
        seed: Seed of the enhancer's uniform pools.
    """
    callbacks: list[TrainerCallback] = []
    collator: Callable = TrainingCollator()
    if model_args.adaptive_weights:
        callbacks.append(
            AdaptiveWeighter(model_args.adaptive_window, model_args.adaptive_temperature, model_args.adaptive_form)
        )
    if model_args.enhancer:
        enhancer = build_enhancer(model_args, data_args, model, data, seed)
        callbacks.append(enhancer)
        collator = enhancer.collator(collator)
    if model_args.caches_candidates:
        cached = CachedCandidates(
            model,
            rows,
            model_args.num_train_beams,
            every_epochs=model_args.candidate_refresh_epochs or 1,
            every_steps=model_args.candidate_refresh_steps or None,
        )
        callbacks.append(cached)
        collator = cached.collator(collator)
    return callbacks, collator


def build_enhancer(
    model_args: ModelArguments, data_args: DataArguments, model: UniGRFForCausalLM, data: PreparedData, seed: int
) -> RankingDrivenEnhancer:
    """Build the enhancer on the training histories of all users."""
    train = data.dataset["train"]
    histories = [train[name][:] for name in columns_read(train, model.config.reads_times)]
    options = EnhancerOptions(
        **{
            "pool": "uniform" if data.tokenizer.num_levels == 1 else "beam",
            "target": model_args.enhancer_target,
            "relabel": model_args.relabel,
            "max_items": data_args.max_items,
            "seed": seed,
            **named(model_args.enhancer_options, OPEN_OPTIONS, "enhancer_options"),
        }
    )
    return RankingDrivenEnhancer(model, data.tokenizer, *histories, options=options)

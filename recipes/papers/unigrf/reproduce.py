"""Train one ablation of UniGRF on MovieLens-1M: retrieval, ranking, or both with the modules of the paper.

    python -m recipes.papers.unigrf.reproduce --data path/to/ml-1m --row both --backbone llama --seed 0
    python -m recipes.papers.unigrf.reproduce --data path/to/ml-1m --row both --backbone hstu-time
    python -m recipes.papers.unigrf.reproduce --data path/to/ml-1m --refit True --epochs 13 --variant refit
    python -m recipes.papers.unigrf.reproduce --collect
    python -m recipes.results.tables

The first three commands each train one ablation and write `result.json` into its folder. The same command resumes an
interrupted run from its last checkpoint, and skips a finished one. `--collect` adds the finished runs to
`recipes/papers/unigrf/results/unigrf_ml1m.json` and draws the picture beside it. The last command writes the tables.

The split is leave-one-out over the rated movies, and a list ranks the whole catalog without the user's own items. A
like is a rating of 4 or 5, and its AUC is pooled over the users' held-out interactions. Validation chooses the epoch
that is tested, by NDCG@10, AUC or their sum: the metrics of the trained tasks. All ablations of a backbone share
learning rate, epochs and batches. `--refit` also trains on the validation targets and tests the last epoch, so choose
its settings in a run without it.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.cache_utils import DynamicCache
from transformers.trainer_utils import set_seed

from modeling_unigrf import UniGRFConfig, UniGRFForCausalLM
from recipes.common.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, check_needs, check_ranges, parse_arguments
from recipes.common.files import check_writable, write_json
from recipes.common.run_tracking import (
    begin,
    command,
    last_checkpoint,
    made_by,
    require_single_device,
    require_single_process,
)
from recipes.data.leave_one_out import TARGETS, columns_read, leave_one_out, unseen_targets
from recipes.data.movielens import LIKED_FROM, movielens_1m
from recipes.data.text_encoders import encode_texts, minilm_folder
from recipes.data.training_datasets import held_out_rows, history_rows
from recipes.evaluation.inference import Measurement, batches, load_metric
from recipes.evaluation.metrics.next_item.next_item import recall_and_ndcg, target_ranks
from recipes.papers.unigrf.report import collect
from recipes.training.adaptive_weighter import AdaptiveWeighter
from recipes.training.arguments import ARCHITECTURE, OBJECTIVE, named, split_config_fields
from recipes.training.best_checkpoint import find_best_checkpoint
from recipes.training.collator import TrainingCollator
from recipes.training.enhancer import OPEN_OPTIONS, EnhancerOptions, RankingDrivenEnhancer
from recipes.training.loss_parts import LossParts
from recipes.training.model_init import create_model
from recipes.training.stateful_callback import StatefulCallback
from tokenization import ResidualKMeans, SemanticIdTokenizer

MAX_ITEMS = 200
# Content embeddings of the movies' texts, in the output folder.
EMBEDDINGS = "movies.npy"
# Beams of the evaluation, with semantic IDs.
BEAMS = 100
SMALL = {"hidden_size": 50, "num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 1024}
WIDE = {**SMALL, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 384}
BACKBONES = {
    "hstu": {"model_type": "hstu", **SMALL, "dropout": 0.2},
    "hstu-time": {"model_type": "hstu", **SMALL, "dropout": 0.2, "num_time_buckets": 128},
    "hstu-large": {"model_type": "hstu", **SMALL, "num_hidden_layers": 8, "num_attention_heads": 2, "dropout": 0.2},
    "llama": {"model_type": "llama", **SMALL, "intermediate_size": 128},
    "llama-wide": {"model_type": "llama", **WIDE},
    "llama-deep": {"model_type": "llama", **WIDE, "num_hidden_layers": 4},
}
# Behaviors from worst to best, and how many of them are likes.
BEHAVIORS = {"like": (["dislike", "like"], 1), "rating": (["1", "2", "3", "4", "5"], 2)}
# Codes per item: one; four; four, and item representations beside them.
IDS = ("atomic", "semantic", "semantic-vectors")
# Arguments of `AdaptiveWeighter` that `--weighter_options` accepts.
WEIGHTER_OPTIONS = ("window_steps", "temperature", "bounds")
# Settings of an ablation that are no fields of the config.
MODULES = ("weighter", "enhancer")
# Changes of each ablation to joint training without modules.
ABLATIONS: dict[str, dict] = {
    "retrieval": {"ranking_loss_weight": 0.0},
    "ranking": {"generation_loss_weight": 0.0},
    "joint": {},
    "weighter": {"weighter": True},
    "enhancer": {"enhancer": True},
    "both": {"weighter": True, "enhancer": True},
}

RANGES = {
    "seed": SEED,
    **dict.fromkeys(("epochs", "batch_size"), COUNT),
    **dict.fromkeys(("learning_rate", "code_temperature"), POSITIVE),
    **dict.fromkeys(("code_negatives", "ranking_loss_weight"), NOT_NEGATIVE),
}


@dataclass
class ReproduceArguments:
    """Options of an ablation."""

    data: str | None = field(
        default=None, metadata={"help": "Folder of GroupLens's ml-1m. None: only with --collect True."}
    )
    behaviors: str = field(
        default="like",
        metadata={
            "help": "Behavior token of an interaction: dislike or like, or the rating.",
            "choices": [*BEHAVIORS],
        },
    )
    row: str = field(
        default="both", metadata={"help": "Ablation: tasks and modules that are trained.", "choices": [*ABLATIONS]}
    )
    backbone: str = field(
        default="llama", metadata={"help": "Kind and size of the backbone.", "choices": [*BACKBONES]}
    )
    ids: str = field(
        default="atomic",
        metadata={
            "help": "Item IDs: one code (atomic), four codes (semantic), or four codes with item representations.",
            "choices": [*IDS],
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the batches and the negatives."})
    epochs: int = field(
        default=10, metadata={"help": "Epochs of the training. The learning rate falls to zero by a cosine."}
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate."})
    batch_size: int = field(default=16, metadata={"help": "Histories per optimizer step."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16, on hardware that has it."})
    code_negatives: int = field(
        default=0, metadata={"help": "Negative codes that all positions share. 0: compare with all codes."}
    )
    code_similarity: str = field(
        default="dot",
        metadata={"help": "Similarity of states and codes, for atomic IDs.", "choices": ["cosine", "dot"]},
    )
    code_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the similarity of states and codes, for atomic IDs."}
    )
    ranking_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the ranking loss, in ablations that train both tasks."}
    )
    form: str = field(
        default="loss_ratio",
        metadata={
            "help": "Measure of convergence of the adaptive weighter.",
            "choices": ["loss_ratio", "gradient_norm"],
        },
    )
    pool: str | None = field(
        default=None,
        metadata={
            "help": "Pool of the enhancer. None: uniform for atomic IDs, else beam.",
            "choices": ["uniform", "beam"],
        },
    )
    weighter_options: str | None = field(
        default=None,
        metadata={"help": "Arguments of AdaptiveWeighter as JSON: temperature, ... None: its defaults."},
    )
    enhancer_options: str | None = field(
        default=None,
        metadata={"help": "Fields of EnhancerOptions as JSON: num_negatives, threshold, ... None: their defaults."},
    )
    config_fields: str | None = field(
        default=None, metadata={"help": "Fields of UniGRFConfig as JSON. None: those of the ablation."}
    )
    refit: bool = field(
        default=False, metadata={"help": "Train on the validation targets, too, and test the last epoch."}
    )
    relabel: bool = field(
        default=False, metadata={"help": "Train the enhancer's excluded positives as next items, too."}
    )
    variant: str = field(
        default="",
        metadata={"help": "Name in the folder's name, for runs with other options. Empty: no such name."},
    )
    output_dir: str = field(default="runs/unigrf", metadata={"help": "Folder that receives a folder for each run."})
    collect: bool = field(
        default=False, metadata={"help": "Train nothing; add the finished runs to the results and draw the picture."}
    )


def load_data(
    path: str, ids_kind: str, cache_dir: Path, behaviors_kind: str = "like"
) -> tuple[DatasetDict, SemanticIdTokenizer]:
    """
    Load the leave-one-out splits of the rated movies, and build a tokenizer.

    Args:
        path: Folder of GroupLens's ml-1m.
        ids_kind: Kind of item IDs, one of `IDS`.
        cache_dir: Folder that stores the content embeddings of the movies' texts.
        behaviors_kind: Kind of behaviors, a name in `BEHAVIORS`.
    """
    # Splits
    interactions, items = movielens_1m(path)
    items = items[items["item_id"].isin(interactions["item_id"])]
    ids = items["item_id"].to_numpy()
    behaviors, _ = BEHAVIORS[behaviors_kind]
    ratings = interactions["rating"].to_numpy()
    splits = leave_one_out(
        users=interactions["user_id"].astype(str).to_numpy(),
        items=np.searchsorted(ids, interactions["item_id"].to_numpy()),
        behaviors=(ratings - 1 if behaviors_kind == "rating" else ratings >= LIKED_FROM).astype(np.int8),
        timestamps=interactions["timestamp"].to_numpy(),
        positions=interactions.get("position", interactions["timestamp"]).to_numpy(),
    )

    # Tokenizer
    titles = items["title"].tolist()
    if ids_kind == "atomic":
        codes = np.arange(len(ids))[:, None]
        tokenizer = SemanticIdTokenizer.from_codes(ids, codes, [len(ids)], behaviors, titles=titles)
    else:
        file = cache_dir / EMBEDDINGS
        if not file.exists():
            np.save(file, encode_texts(items["text"].tolist(), str(minilm_folder())))
        quantizer = ResidualKMeans((64, 64, 64), pca_dim=32).fit(np.load(file))
        tokenizer = SemanticIdTokenizer.from_embeddings(ids, np.load(file), quantizer, behaviors, titles=titles)
    return splits, tokenizer


def load_embeddings(args: ReproduceArguments) -> torch.Tensor | None:
    """Load the content embeddings that `load_data` stored; None for item IDs without item representations."""
    if args.ids != "semantic-vectors":
        return None
    return torch.from_numpy(np.load(Path(args.output_dir) / EMBEDDINGS))


def check_targets(
    splits: DatasetDict, tokenizer: SemanticIdTokenizer, liked: list[str], is_ranked: bool
) -> dict[str, int]:
    """
    Count the held-out items that never occur in training, by split.

    Raises:
        ValueError: if a ranker could not be measured, since the held-out items of a split are all liked or all
            disliked.
    """
    unseen = {}
    for name in ("validation", "test"):
        unseen[name] = unseen_targets(splits["train"], splits[name])
        behaviors = {tokenizer.behaviors[behavior] for behavior in splits[name].unique("target_behavior")}
        if is_ranked and (behaviors <= set(liked) or not behaviors & set(liked)):
            raise ValueError(
                f"`data` must have liked and disliked items among those held out for {name}, got only "
                f"{sorted(behaviors)}, which have no AUC. Take more users, or --row retrieval."
            )
    users = len(splits["train"])
    validation, test = unseen.values()
    print(
        f"{users:,} users, {tokenizer.num_items:,} movies; held-out items never in training: {validation} and {test}"
    )
    return unseen


@torch.no_grad()
def measure(model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, split: Dataset) -> dict:
    """
    Measure HR and NDCG at 10 and 50 and MRR of a split, and the AUC of a model that ranks.

    With one code per item, the state at the history's end scores every item, as `generate` does with a beam for each.
    With several codes, `recommend` searches `BEAMS` beams; a target outside them has an infinite rank.
    """
    layout = model.layout
    liked = model.config.ranking_targets
    is_ranked = model.config.training_config.ranking_loss_weight > 0
    ranks = np.zeros(len(split))
    scores = np.zeros(len(split))
    measurement = Measurement(max_items=MAX_ITEMS, batch_size=128 if layout.num_levels == 1 else 32)

    # Ranks and scores of the targets
    for rows, users, inputs in batches(model, tokenizer, split, measurement, "measuring"):
        targets = torch.tensor([user["target"] for user in users], device=model.device)
        histories = [user["items"] for user in users]
        # Generation and ranking share one cache.
        cache = DynamicCache()
        states = model.prefill(**inputs, cache=cache)
        if layout.num_levels == 1:
            logits = model.scorer.code_logits(states, layout.level_slices[0]).float()
            ranks[rows] = ranks_by_logits(logits, targets, histories)
        else:
            beams = {
                "num_beams": BEAMS,
                "num_return_sequences": BEAMS,
                "ranking_weight": 0.0,
                "ranking_target": liked[0],
            }
            best = model.recommend(**inputs, **beams, blocked_items=histories, cache=cache)
            ranks[rows] = target_ranks(best.item_indices.tolist(), targets.tolist())
        if is_ranked:
            ranking = model.rank(**inputs, candidates=targets[:, None], cache=cache, history_states=states)
            # A like is any of the behaviors that are likes.
            scores[rows] = ranking[:, 0].sigmoid().sum(dim=-1).cpu().numpy()

    # Metrics
    metrics = {}
    for k in (10, 50):
        # HR is recall with one relevant item.
        by_user = recall_and_ndcg(ranks, [k])
        metrics |= {name.replace("recall", "hr"): float(np.mean(values)) for name, values in by_user.items()}
    metrics["mrr"] = float(np.mean(1 / ranks))
    if not is_ranked:
        return metrics
    likes = np.isin(split["target_behavior"][:], [tokenizer.behaviors.index(name) for name in liked]).astype(int)
    area = load_metric("like_auc").compute(prediction_scores=scores.tolist(), references=likes.tolist())["auc"]
    return {**metrics, "auc": area}


def ranks_by_logits(logits: torch.Tensor, targets: torch.Tensor, histories: list[list[int]]) -> np.ndarray:
    """
    Rank the targets `[b]` among all items but the user's own by their logits `[b, N]`, which are overwritten.

    A target that ties with other items has the mean of their ranks.
    """
    score = logits.gather(1, targets[:, None])
    for user, items in enumerate(histories):
        logits[user, items] = -torch.inf
    num_ties = (logits == score).sum(dim=1).clamp(min=1) - 1
    return (1 + (logits > score).sum(dim=1) + num_ties / 2).cpu().numpy()


class Stopwatch(TrainerCallback):
    """Log the seconds of a training so far, over all its sessions."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock at the last logged seconds."""
        earlier = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
        self.start = time.perf_counter() - earlier

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the seconds to the log."""
        logs["seconds"] = state.log_history[-1]["seconds"] = time.perf_counter() - self.start


class LeaveOneOutTrainer(Trainer):
    """
    Train as the stock `Trainer` does, with an evaluation that ranks items.

    A callback could measure, too, but its metrics would not choose the best epoch.
    """

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Measure the model on validation; `score` is the sum of the metrics that choose the best epoch."""
        self.model.eval()
        metrics = self.measure()
        objective = self.model.config.training_config
        chosen_by = {"ndcg@10": objective.generation_loss_weight, "auc": objective.ranking_loss_weight}
        metrics["score"] = sum(metrics[name] for name, weight in chosen_by.items() if weight)
        logs = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self.model.train()
        return logs


def build_config(args: ReproduceArguments, tokenizer: SemanticIdTokenizer, embedding_dim: int) -> UniGRFConfig:
    """
    Build the config of an ablation.

    Raises:
        ValueError: if `--config_fields` changes the tasks that the ablation trains.
    """
    # Fields of the ablation and the IDs
    fields = {name: value for name, value in ABLATIONS[args.row].items() if name not in MODULES}
    if args.ids == "atomic":
        fields |= {"code_similarity": args.code_similarity, "code_temperature": args.code_temperature}
        fields["tie_word_embeddings"] = True
    if embedding_dim:
        fields |= {"content_embedding_dim": embedding_dim, "embedding_table_size": tokenizer.num_items}
        fields["history_item_representations"] = True
    else:
        fields |= {"embedding_table_size": 0, "history_item_representations": False}

    # Defaults of this recipe, and fields of the command line
    is_hstu = BACKBONES[args.backbone]["model_type"] == "hstu"
    fields = {
        "code_negatives": args.code_negatives,
        "ranking_targets": liked_behaviors(args, tokenizer),
        "embedding_dropout": 0.0 if is_hstu else 0.2,
        "ranking_loss_weight": args.ranking_loss_weight,
        "dense_loss_weight": 0.0,
        "negatives_per_item": 0.0,
        **fields,
        **named(args.config_fields or "{}", (*ARCHITECTURE, *OBJECTIVE), "config_fields"),
    }
    text_config = BACKBONES[args.backbone]
    config = UniGRFConfig(**tokenizer.config_fields(), text_config=text_config, **split_config_fields(fields))
    weights = (config.training_config.generation_loss_weight, config.training_config.ranking_loss_weight)
    if tuple(weight > 0 for weight in weights) != (args.row != "ranking", args.row != "retrieval"):
        raise ValueError(
            f"`config_fields` must have positive weights of the losses that --row {args.row} trains, got "
            f"{weights[0]} of generation and {weights[1]} of ranking. Take --row retrieval or ranking for one task."
        )
    return config


def liked_behaviors(args: ReproduceArguments, tokenizer: SemanticIdTokenizer) -> list[str]:
    """Return the behaviors that are likes."""
    return list(tokenizer.behaviors[-BEHAVIORS[args.behaviors][1] :])


def build_callbacks(
    args: ReproduceArguments, model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, histories: Dataset
) -> tuple[list[TrainerCallback], Callable]:
    """Build the callbacks of an ablation, and the collator of its training rows."""
    callbacks = [LossParts(model), Stopwatch()]
    collator = TrainingCollator()
    if ABLATIONS[args.row].get("weighter"):
        options = named(args.weighter_options or "{}", WEIGHTER_OPTIONS, "weighter_options")
        callbacks.append(AdaptiveWeighter(form=args.form, **options))
    if ABLATIONS[args.row].get("enhancer"):
        options = EnhancerOptions(
            relabel=args.relabel,
            target=liked_behaviors(args, tokenizer)[-1],
            max_items=MAX_ITEMS,
            seed=args.seed,
            pool=args.pool or ("uniform" if args.ids == "atomic" else "beam"),
            **named(args.enhancer_options or "{}", OPEN_OPTIONS - {"pool"}, "enhancer_options"),
        )
        columns = [histories[name][:] for name in columns_read(histories, model.config.reads_times)]
        callbacks.append(RankingDrivenEnhancer(model, tokenizer, *columns, options=options))
        collator = callbacks[-1].collator(collator)
    return callbacks, collator


def training_arguments(args: ReproduceArguments, folder: Path, steps_per_epoch: int) -> TrainingArguments:
    """Build the Trainer's arguments, which all ablations of a backbone share."""
    return TrainingArguments(
        str(folder),
        seed=args.seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps_per_epoch,
        adam_beta2=0.98,
        train_sampling_strategy="group_by_length",
        logging_strategy="epoch",
        eval_strategy="no" if args.refit else "epoch",
        # Ranking alone may overfit from the first epochs on.
        eval_delay=0 if args.row == "ranking" else args.epochs // 2,
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=not args.refit,
        metric_for_best_model="eval_score",
        greater_is_better=True,
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=True,
        bf16=args.bf16,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def run(args: ReproduceArguments) -> None:
    """Train one ablation and write `result.json` into its folder, unless a finished run has written it."""
    check_arguments(args)
    require_single_process()
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "output_dir", "collect")}
    folder = folder_of(args)
    file = folder / "result.json"
    if file.exists() and json.loads(file.read_text())["arguments"] == settings:
        print(f"{folder} is finished")
        return
    begin(folder, settings, file)
    set_seed(args.seed)

    # Data and model
    splits, tokenizer = load_data(args.data, args.ids, Path(args.output_dir), args.behaviors)
    unseen = check_targets(splits, tokenizer, liked_behaviors(args, tokenizer), is_ranked=args.row != "retrieval")
    embeddings = load_embeddings(args)
    config = build_config(args, tokenizer, 0 if embeddings is None else embeddings.shape[1])
    times = {"with_times": config.reads_times}
    # The history before a test target ends with the validation target.
    histories = splits["test"].remove_columns(list(TARGETS.values())) if args.refit else splits["train"]
    train_rows = history_rows(histories, tokenizer, MAX_ITEMS, crops_per_epoch=1, **times)
    held_out = {name: held_out_rows(splits[name], tokenizer, MAX_ITEMS, **times) for name in ("validation", "test")}
    model = create_model(config, torch.from_numpy(tokenizer.item_codes.copy()), embeddings)
    model.generation_config.max_items = MAX_ITEMS
    model.generation_config.ranking_weight = 0.0

    # Training
    callbacks, collator = build_callbacks(args, model, tokenizer, histories)
    steps_per_epoch = math.ceil(len(train_rows) / args.batch_size)
    trainer = LeaveOneOutTrainer(
        model,
        training_arguments(args, folder, steps_per_epoch),
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=held_out["validation"],
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    require_single_device(trainer.args)
    trainer.measure = lambda: measure(model, tokenizer, splits["validation"])
    saved = [callback.file for callback in callbacks if isinstance(callback, StatefulCallback)]
    last = last_checkpoint(folder, saved)
    find_best_checkpoint(trainer.args, last)
    trainer.train(resume_from_checkpoint=last)

    # Result
    history = [entry for entry in trainer.state.log_history if "epoch" in entry]
    result = {
        "arguments": settings,
        **tested_epoch(args, trainer, history, steps_per_epoch),
        "test": measure(model.eval(), tokenizer, splits["test"]),
        "seconds": history[-1]["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "targets never in training": unseen,
        "tokens a user": float(np.mean([len(ids) for ids in held_out["test"]["input_ids"][:]])),
        "history": history,
        "made by": made_by(command("recipes.papers.unigrf.reproduce", args, data="path/to/ml-1m")),
    }
    write_json(file, result)
    print({name: round(value, 4) for name, value in result["test"].items()})


def check_arguments(args: ReproduceArguments) -> None:
    """
    Check the arguments of an ablation.

    Raises:
        ValueError: for numbers out of range, arguments without effect in the ablation, missing data, and behaviors
            that the ablation cannot have.
    """
    check_ranges(args, RANGES)
    weighter, enhancer = (
        [(f"a --row with the {name}", bool(ABLATIONS[args.row].get(name)))] for name in ("weighter", "enhancer")
    )
    atomic = [("--ids atomic", args.ids == "atomic")]
    needs = {
        **dict.fromkeys(("form", "weighter_options"), weighter),
        **dict.fromkeys(("pool", "enhancer_options", "relabel"), enhancer),
        **dict.fromkeys(("code_similarity", "code_temperature"), atomic),
        "ranking_loss_weight": [("a --row that trains the ranking", args.row != "retrieval")],
    }
    check_needs(args, needs)
    named(args.weighter_options or "{}", WEIGHTER_OPTIONS, "weighter_options")
    named(args.enhancer_options or "{}", OPEN_OPTIONS - {"pool"}, "enhancer_options")
    named(args.config_fields or "{}", (*ARCHITECTURE, *OBJECTIVE), "config_fields")
    check_writable(args.output_dir, "output_dir")
    if args.data is None:
        raise ValueError("`data` must be GroupLens's ml-1m folder, got None. Pass --data path/to/ml-1m.")
    if args.behaviors == "rating" and ABLATIONS[args.row].get("enhancer"):
        raise ValueError(
            "`behaviors` must be like with the enhancer, which reads one ranking target, got rating, with two ratings "
            "that are likes. Pass --behaviors like, or take an ablation without the enhancer."
        )


def folder_of(args: ReproduceArguments) -> Path:
    """Return the folder of an ablation's run."""
    parts = (args.backbone, args.ids, args.row, args.variant, str(args.seed))
    return Path(args.output_dir) / "-".join(filter(None, parts))


def tested_epoch(args: ReproduceArguments, trainer: Trainer, history: list[dict], steps_per_epoch: int) -> dict:
    """Return the epoch that is tested and its validation metrics; None for a refit, which trained on their targets."""
    step = trainer.state.global_step if args.refit else trainer.state.best_global_step
    evaluations = (entry for entry in history if entry.get("step") == step and "eval_score" in entry)
    return {"epoch": step / steps_per_epoch, "validation": next(evaluations, None)}


if __name__ == "__main__":
    (arguments,) = parse_arguments(ReproduceArguments)
    if arguments.collect:
        collect(Path(arguments.output_dir))
    else:
        run(arguments)

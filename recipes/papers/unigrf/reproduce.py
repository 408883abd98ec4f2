"""UniGRF on MovieLens-1M: retrieval alone, ranking alone, both, and both with each module, one command a row.

    python -m recipes.papers.unigrf.reproduce --data path/to/ml-1m --row both --backbone llama --seed 0    # trains,
    or goes on python -m recipes.papers.unigrf.reproduce --data path/to/ml-1m --row both --backbone hstu-time
    # as hstu, with times python -m recipes.papers.unigrf.reproduce --data path/to/ml-1m --refit True --epochs 13
    --variant refit python -m recipes.papers.unigrf.reproduce --collect          #
    recipes/papers/unigrf/results/unigrf_ml1m.json and .png, then recipes.results.tables

Leave-one-out over the rated movies, items are scored over the whole catalog without the user's own; a like is a
rating of 4 or 5, and its AUC is pooled over the users' held-out interactions. The epoch with the best NDCG@10 + AUC
on validation (of what the row trains) is tested. All rows of a backbone share learning rate, epochs and batches; a
run that broke off goes on from its last checkpoint, a finished one is not run again. `--refit` trains on what was
held out for validation too,
with settings that a run without it has chosen: nothing is chosen then, the last epoch is tested.
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
from recipes.common.arguments import parse_arguments
from recipes.common.files import write_json
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
from recipes.training.collator import TrainingCollator
from recipes.training.enhancer import OPEN_OPTIONS, EnhancerOptions, RankingDrivenEnhancer
from recipes.training.loss_parts import LossParts
from recipes.training.model_init import create_model
from recipes.training.stateful_callback import StatefulCallback
from tokenization import ResidualKMeans, SemanticIdTokenizer

MAX_ITEMS = 200
EMBEDDINGS = "movies.npy"  # of the movies' texts, in the output folder
BEAMS = 100  # of semantic ids, in evaluation
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
# What follows a movie in a history, from the least to the best, and how many of the best are likes.
BEHAVIORS = {"like": (["dislike", "like"], 1), "rating": (["1", "2", "3", "4", "5"], 2)}
# One code an item; four; four and, in histories and ranking, the item's own vector of its text and a learned row.
IDS = ("atomic", "semantic", "semantic-vectors")
WEIGHTER_OPTIONS = ("window_steps", "temperature", "bounds")  # of AdaptiveWeighter
# What a row trains, beside naive joint training.
MODULES = ("weighter", "enhancer")  # beside the fields of the config
ROWS: dict[str, dict] = {
    "retrieval": {"ranking_loss_weight": 0.0},
    "ranking": {"generation_loss_weight": 0.0},
    "joint": {},
    "weighter": {"weighter": True},
    "enhancer": {"enhancer": True},
    "both": {"weighter": True, "enhancer": True},
}


@dataclass
class ReproduceArguments:
    """One row of the table, or the table."""

    data: str | None = field(default=None, metadata={"help": "GroupLens's ml-1m folder."})
    behaviors: str = field(
        default="like", metadata={"help": "Likes and dislikes, or ratings.", "choices": list(BEHAVIORS)}
    )
    row: str = field(default="both", metadata={"help": "What is trained.", "choices": list(ROWS)})
    backbone: str = field(default="llama", metadata={"help": "Size and kind.", "choices": list(BACKBONES)})
    ids: str = field(default="atomic", metadata={"help": "What stands for an item.", "choices": list(IDS)})
    seed: int = field(default=0, metadata={"help": "Of weights, batches and negatives."})
    epochs: int = field(default=10, metadata={"help": "Epochs; the rate falls to zero by a cosine."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate."})
    batch_size: int = field(default=16, metadata={"help": "Histories of a step."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16, where the hardware has it."})
    code_negatives: int = field(default=0, metadata={"help": "Negatives that all positions share; 0: all items."})
    code_similarity: str = field(default="dot", metadata={"help": "Of atomic ids.", "choices": ["cosine", "dot"]})
    code_temperature: float = field(default=1.0, metadata={"help": "Of atomic ids."})
    ranking_loss_weight: float = field(default=1.0, metadata={"help": "Where both losses are trained."})
    form: str = field(default="loss_ratio", metadata={"help": "Of the weighter."})
    pool: str | None = field(
        default=None, metadata={"help": "Of the enhancer: uniform or beam; default: uniform for atomic ids."}
    )
    weighter_options: str | None = field(
        default=None, metadata={"help": "More arguments of AdaptiveWeighter, as JSON: temperature, ..."}
    )
    enhancer_options: str | None = field(
        default=None,
        metadata={"help": "More arguments of RankingDrivenEnhancer, as JSON: num_negatives, threshold, ..."},
    )
    config_fields: str | None = field(default=None, metadata={"help": "More fields of UniGRFConfig, as JSON."})
    refit: bool = field(default=False, metadata={"help": "Train on the validation targets too, and choose nothing."})
    relabel: bool = field(default=False, metadata={"help": "The enhancer's favorites become positives, too."})
    variant: str = field(
        default="", metadata={"help": "A name, and so a folder, for runs with other values of the arguments above."}
    )
    output_dir: str = field(default="runs/unigrf", metadata={"help": "One folder a run."})
    collect: bool = field(default=False, metadata={"help": "Only put finished runs together."})


def load_data(
    path: str, ids_kind: str, cache_dir: Path, behaviors_kind: str = "like"
) -> tuple[DatasetDict, SemanticIdTokenizer]:
    """Leave-one-out splits of the rated movies, and a tokenizer; embeddings of their texts are kept in `cache_dir`."""
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


def check_targets(
    splits: DatasetDict, tokenizer: SemanticIdTokenizer, liked: list[str], is_ranked: bool
) -> dict[str, int]:
    """
    How many held-out items never occur in training, by split. Raises `ValueError`, before anything is trained, if all
    held-out items of a split are liked, or none, so that a ranker could not be measured.
    """
    unseen = {}
    for name in ("validation", "test"):
        unseen[name] = unseen_targets(splits["train"], splits[name])
        behaviors = {tokenizer.behaviors[behavior] for behavior in splits[name].unique("target_behavior")}
        if is_ranked and (behaviors <= set(liked) or not behaviors & set(liked)):
            raise ValueError(
                f"Expected liked and disliked items among those held out for {name}, found only {sorted(behaviors)}: "
                "there is no AUC. Take more users, or --row retrieval."
            )
    users, (validation, test) = len(splits["train"]), unseen.values()
    print(f"{users:,} users, {tokenizer.num_items:,} movies; held out and never in training: {validation} and {test}")
    return unseen


@torch.no_grad()
def measure(model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, split: Dataset) -> dict:
    """
    HR and NDCG at 10 and 50, MRR and, of a ranker, AUC of a split. With one code
    an item the output before the target scores every item, which is all of `generate`, and one that scores as others
    do stands in their middle; else the beams of `recommend` do, and what is none of them counts nothing. One cache
    serves the ranking.
    """
    layout, ranks, scores = model.layout, np.zeros(len(split)), np.zeros(len(split))
    liked, is_ranked = model.config.ranking_targets, model.config.training_config.ranking_loss_weight > 0
    how = Measurement(max_items=MAX_ITEMS, batch_size=128 if layout.num_levels == 1 else 32)
    for rows, users, inputs in batches(model, tokenizer, split, how, "measuring"):
        targets = torch.tensor([user["target"] for user in users], device=model.device)
        cache, own = DynamicCache(), [user["items"] for user in users]
        states = model.prefill(**inputs, cache=cache)
        if layout.num_levels == 1:
            logits = model.scorer.code_logits(states, layout.level_slices[0]).float()
            score = logits.gather(1, targets[:, None])
            for row, items in enumerate(own):
                logits[row, items] = -torch.inf
            others = (logits == score).sum(dim=1).clamp(min=1) - 1
            ranks[rows] = (1 + (logits > score).sum(dim=1) + others / 2).cpu().numpy()
        else:
            beams = {
                "num_beams": BEAMS,
                "num_return_sequences": BEAMS,
                "ranking_weight": 0.0,
                "ranking_target": liked[0],
            }
            best = model.recommend(**inputs, **beams, blocked_items=own, cache=cache)
            ranks[rows] = target_ranks(best.item_indices.tolist(), targets.tolist())
        if is_ranked:
            ranking = model.rank(**inputs, candidates=targets[:, None], cache=cache, history_states=states)
            # Of any of the behaviors that are likes.
            scores[rows] = ranking[:, 0].sigmoid().sum(dim=-1).cpu().numpy()
    found = {}
    for k in (10, 50):  # where one item is to be found, HR is recall
        of_users = recall_and_ndcg(ranks, [k])
        found |= {name.replace("recall", "hr"): float(np.mean(values)) for name, values in of_users.items()}
    found["mrr"] = float(np.mean(1 / ranks))
    if not is_ranked:
        return found
    likes = np.isin(split["target_behavior"][:], [tokenizer.behaviors.index(name) for name in liked]).astype(int)
    area = load_metric("like_auc").compute(prediction_scores=scores.tolist(), references=likes.tolist())["auc"]
    return {**found, "auc": area}


class Stopwatch(TrainerCallback):
    """Logs how many seconds a training took so far, in all its sessions."""

    def on_train_begin(self, args, state, control, **kwargs):
        earlier = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
        self.start = time.perf_counter() - earlier

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs["seconds"] = state.log_history[-1]["seconds"] = time.perf_counter() - self.start


class LeaveOneOutTrainer(Trainer):
    """The stock Trainer, with an evaluation that scores items; a callback's values would not choose the best epoch."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        found = self.measure()
        objective = self.model.config.training_config
        chosen_by = {"ndcg@10": objective.generation_loss_weight, "auc": objective.ranking_loss_weight}
        found["score"] = sum(found[name] for name, weight in chosen_by.items() if weight)
        logs = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self.model.train()
        return logs


def build_config(args: ReproduceArguments, tokenizer: SemanticIdTokenizer, embedding_dim: int) -> UniGRFConfig:
    """Build the config of a row; raise `ValueError` if `--config_fields` changes what the row trains."""
    fields = {name: value for name, value in ROWS[args.row].items() if name not in MODULES}
    if args.ids == "atomic":
        fields |= {"code_similarity": args.code_similarity, "code_temperature": args.code_temperature}
        fields["tie_word_embeddings"] = True
    if embedding_dim:
        fields |= {"content_embedding_dim": embedding_dim, "embedding_table_size": tokenizer.num_items}
        fields["history_item_representations"] = True
    else:
        fields |= {"embedding_table_size": 0, "history_item_representations": False}
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
            f"`--config_fields` must have weights of the losses that --row {args.row} trains, got {weights[0]} of "
            f"generation and {weights[1]} of ranking. Take --row retrieval or ranking for a task alone."
        )
    return config


def liked_behaviors(args: ReproduceArguments, tokenizer: SemanticIdTokenizer) -> list[str]:
    """Return the behaviors that are likes."""
    return list(tokenizer.behaviors[-BEHAVIORS[args.behaviors][1] :])


def build_callbacks(
    args: ReproduceArguments, model: UniGRFForCausalLM, tokenizer: SemanticIdTokenizer, histories: Dataset
) -> tuple[list[TrainerCallback], Callable]:
    """Build the callbacks of a row, and a collator for its training rows."""
    callbacks, collator = [LossParts(model), Stopwatch()], TrainingCollator()
    if ROWS[args.row].get("weighter"):
        options = named(args.weighter_options or "{}", WEIGHTER_OPTIONS, "weighter_options")
        callbacks.append(AdaptiveWeighter(form=args.form, **options))
    if ROWS[args.row].get("enhancer"):
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
    """Build the Trainer's arguments, which all rows of a backbone share."""
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
        # A ranker alone may over-fit from its first epochs on.
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
    """Train one row and write `result.json` into its folder."""
    check_arguments(args)
    require_single_process()
    work = {name: value for name, value in vars(args).items() if name not in ("data", "output_dir", "collect")}
    name = "-".join(filter(None, (args.backbone, args.ids, args.row, args.variant, str(args.seed))))
    folder = Path(args.output_dir) / name
    file = folder / "result.json"
    if file.exists() and json.loads(file.read_text())["arguments"] == work:
        print(f"{folder} is finished")
        return
    begin(folder, work, file)
    set_seed(args.seed)

    # Data and model
    splits, tokenizer = load_data(args.data, args.ids, Path(args.output_dir), args.behaviors)
    liked = liked_behaviors(args, tokenizer)
    unseen = check_targets(splits, tokenizer, liked, is_ranked=args.row != "retrieval")
    embeddings = None
    if args.ids == "semantic-vectors":
        embeddings = torch.from_numpy(np.load(Path(args.output_dir) / EMBEDDINGS))
    config = build_config(args, tokenizer, 0 if embeddings is None else embeddings.shape[1])
    times = {"with_times": config.reads_times}
    # What precedes a user's test target ends in the validation target.
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
    trainer.train(resume_from_checkpoint=last_checkpoint(folder, saved))

    # Result
    history = [entry for entry in trainer.state.log_history if "epoch" in entry]
    tested = trainer.state.global_step if args.refit else trainer.state.best_global_step
    result = {
        "arguments": work,
        "epoch": tested / steps_per_epoch,
        # None for a refit, which has seen these targets.
        "validation": next((e for e in history if e.get("step") == tested and "eval_score" in e), None),
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
    """Raise `ValueError` if there is no data, or if the row cannot have the behaviors."""
    if args.data is None:
        raise ValueError("Expected --data, GroupLens's ml-1m folder, found none.")
    if args.behaviors == "rating" and ROWS[args.row].get("enhancer"):
        raise ValueError(
            "Expected --behaviors like with the enhancer, whose p is of one ranking target, found rating, where two "
            "are likes."
        )


if __name__ == "__main__":
    (arguments,) = parse_arguments(ReproduceArguments)
    if arguments.collect:
        collect(Path(arguments.output_dir))
    else:
        run(arguments)

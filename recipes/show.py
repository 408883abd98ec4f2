"""Show the recommendations of some users.

    python -m recipes.show --checkpoint runs/demo/checkpoint --data_dir runs/demo/data --users 3

The command prints the end of each user's history, the held-out item, and the recommended items with their scores. The
columns add up to the fused score, with the weights in the line above them. The installed code loads the checkpoint;
code in its folder does not run.
"""

from dataclasses import dataclass, field

from modeling_unigrf import RecommendationPipeline, UniGRFForCausalLM
from recipes.common.arguments import COUNT, check_checkpoint, check_ranges, parse_arguments
from recipes.data.prepared import check_same_items, load_splits, prepared
from recipes.evaluation.inference import answered_users, load_checkpoint

SCORES = ("generation_score", "ranking_score", "dense_score", "transition_score", "score")
TITLE_WIDTH = 48


@dataclass
class ShowArguments:
    """Checkpoint and users."""

    checkpoint: str = field(metadata={"help": "Checkpoint or adapter of recipes.train, a folder."})
    data_dir: str = field(metadata={"help": "Output folder of recipes.prepare; its test users are shown."})
    users: int = field(default=3, metadata={"help": "Number of users, from the first."})


def main(args: ShowArguments) -> None:
    """
    Print the recommendations of the first test users.

    Raises:
        ValueError: for arguments out of range, missing folders, and a checkpoint of other items than the data.
    """
    check_ranges(args, {"users": COUNT})
    check_checkpoint(args.checkpoint, "checkpoint")
    prepared(args.data_dir)
    model, tokenizer = load_checkpoint(args.checkpoint)
    check_same_items(tokenizer, args.data_dir)
    recommender = RecommendationPipeline(model=model, tokenizer=tokenizer)
    print(f"loaded {args.checkpoint} with {tokenizer.num_items:,} items")
    test = load_splits(args.data_dir)["test"]
    users = test.select(range(min(args.users, len(test))))
    answered = answered_users(users, tokenizer.num_items, model.serving_options().exclude_history)
    for row, user in enumerate(users):
        print_user(recommender, user, has_list=row in answered)


def print_user(recommender: RecommendationPipeline, user: dict, has_list: bool = True) -> None:
    """Print the end of a user's history, the held-out item, and the recommended items, if there are some."""
    # The history.
    tokenizer = recommender.tokenizer
    names = tokenizer.titles or tokenizer.item_ids
    behaviors = [tokenizer.behaviors[behavior] for behavior in user["behaviors"]]
    print(f"\nuser {user['user_id']}, the last 5 of {len(behaviors)} items:")
    for item, behavior in zip(user["items"][-5:], behaviors[-5:], strict=True):
        print(f"    {behavior:<10} {names[item]}")

    # The list.
    if not has_list:
        print("recommended: nothing, since the history has all items")
        return
    config = recommender.model.config
    request = {"items": [tokenizer.item_ids[item] for item in user["items"]], "behaviors": behaviors}
    if config.reads_times:
        request |= {"timestamps": user["timestamps"], "query_time": user["target_timestamp"]}
    items = recommender(request)

    # The held-out item, and the table.
    columns = [name for name in SCORES if name in items[0]]
    target = tokenizer.item_ids[user["target"]]
    ranks = [rank for rank, item in enumerate(items, 1) if item["item_id"] == target]
    place = f"rank {ranks[0]}" if ranks else f"not among the {len(items)} recommended items"
    print(f"held out, {place}:\n    {tokenizer.behaviors[user['target_behavior']]:<10} {names[user['target']]}")
    print(f"recommended, {fusion_formula(recommender.model, columns)}:")
    widths = {name: max(len(name), 8) + 2 for name in columns}
    print(" " * (TITLE_WIDTH + 4) + "".join(f"{name:>{widths[name]}}" for name in columns))
    for item in items:
        scores = "".join(f"{item[name]:{widths[name]}.3f}" for name in columns)
        mark = "  <- held out" if item["item_id"] == target else ""
        print(f"    {(item['title'] or item['item_id'])[:TITLE_WIDTH]:<{TITLE_WIDTH}}{scores}{mark}")


def fusion_formula(model: UniGRFForCausalLM, columns: list[str]) -> str:
    """Write the fused score as a sum of the other columns, with the weights that the checkpoint serves."""
    options = model.serving_options()
    weights = {"ranking_score": options.ranking_weight, "dense_score": options.dense_weight}
    weights["transition_score"] = options.transition_weight
    generation = "" if options.generation_weight == 1 else f"{options.generation_weight:g} * "
    terms = [f"{weights[name]:g} * {name}" for name in columns if name in weights]
    return " + ".join([f"score = {generation}generation_score", *terms])


if __name__ == "__main__":
    main(*parse_arguments(ShowArguments))

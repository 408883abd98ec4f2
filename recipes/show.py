"""Shows what is recommended to some users, from the checkpoint folder alone: with no model code but its own copy.

python -m recipes.show --checkpoint runs/demo/checkpoint --data_dir runs/demo/data --users 3
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_from_disk
from transformers import AutoTokenizer, pipeline

from recipes.common.arguments import parse_arguments


@dataclass
class ShowArguments:
    """Whom to recommend to."""

    checkpoint: str = field(metadata={"help": "Folder that recipes.train wrote."})
    data_dir: str = field(metadata={"help": "Prepared folder, for the histories of its test users."})
    users: int = field(default=3, metadata={"help": "How many of them."})


def main(args: ShowArguments) -> None:
    """Prints up to ten titles, or ids, beside the end of each user's history, with generation and ranking scores."""
    recommender = pipeline("recommendation", model=args.checkpoint, trust_remote_code=True)
    ours = AutoTokenizer.from_pretrained(Path(args.data_dir) / "tokenizer", trust_remote_code=True)
    tokenizer, config = recommender.tokenizer, recommender.model.config
    if tokenizer.item_ids[: ours.num_items] != ours.item_ids:
        raise ValueError(
            f"Expected a checkpoint of the items in {args.data_dir}, found other ids in {args.checkpoint}."
        )
    print(f"loaded {type(recommender.model).__module__} with {tokenizer.num_items:,} items")
    names = tokenizer.titles or tokenizer.item_ids
    test = load_from_disk(str(Path(args.data_dir) / "dataset"))["test"]
    for user in test.select(range(min(args.users, len(test)))):
        behaviors = [tokenizer.behaviors[behavior] for behavior in user["behaviors"]]
        request = {"items": [tokenizer.item_ids[item] for item in user["items"]], "behaviors": behaviors}
        if config.reads_times:
            request |= {"timestamps": user["timestamps"], "query_time": user["target_timestamp"]}
        print(f"\nuser {user['user_id']}, the last 5 of {len(behaviors)} items:")
        for item, behavior in zip(user["items"][-5:], behaviors[-5:], strict=True):
            print(f"    {behavior:<10} {names[item]}")
        print("recommended:                                            log P  log rank    fused")
        for one in recommender(request):
            mark = "<- what came next" if one["item_id"] == tokenizer.item_ids[user["target"]] else ""
            scores = f"{one['generation_score']:8.2f} {one['ranking_score']:9.2f} {one['score']:8.2f}"
            print(f"    {(one['title'] or one['item_id'])[:48]:<48} {scores} {mark}")


if __name__ == "__main__":
    main(*parse_arguments(ShowArguments))

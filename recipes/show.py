"""Shows titles recommended to some users, from the checkpoint folder alone: nothing of this project is imported.

python -m recipes.show --checkpoint runs/demo/checkpoint --data_dir runs/demo/data --users 3
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser


@dataclass
class ShowArguments:
    """Whom to recommend to."""

    checkpoint: str = field(metadata={"help": "Folder that recipes.train wrote."})
    data_dir: str = field(metadata={"help": "Prepared folder, for the histories of its test users."})
    users: int = field(default=3, metadata={"help": "How many of them."})
    max_items: int = field(default=50, metadata={"help": "Items of a history that the model reads."})


def main(args: ShowArguments) -> None:
    """Prints ten titles beside the end of each user's history, with generation and ranking scores."""
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
    print(f"loaded {type(model).__module__}.{type(model).__name__} with {tokenizer.num_items:,} items")
    for user in load_from_disk(str(Path(args.data_dir) / "dataset"))["test"].select(range(args.users)):
        items = [tokenizer.item_ids[item] for item in user["items"]]
        behaviors = [tokenizer.behaviors[behavior] for behavior in user["behaviors"]]
        inputs = tokenizer.encode_history(items, behaviors, max_items=args.max_items, return_tensors="pt")
        blocked = torch.tensor(user["items"])[None]
        best = model.recommend(**inputs, num_return_sequences=10, blocked_items=blocked)
        print(f"\nuser {user['user_id']}, the last 5 of {len(items)} items:")
        for item, behavior in zip(user["items"][-5:], behaviors[-5:], strict=True):
            print(f"    {behavior:<10} {tokenizer.titles[item]}")
        print("recommended:                                            log P  log rank    fused")
        columns = (best.item_indices, best.generation_scores, best.ranking_scores, best.scores)
        for item, generation, ranking, fused in zip(*(column[0].tolist() for column in columns), strict=True):
            mark = "<- what came next" if item == user["target"] else ""
            print(f"    {tokenizer.titles[item][:48]:<48} {generation:8.2f} {ranking:9.2f} {fused:8.2f} {mark}")


if __name__ == "__main__":
    main(HfArgumentParser(ShowArguments).parse_args_into_dataclasses()[0])

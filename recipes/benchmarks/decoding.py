"""Beam search, ranking and the trie against their peers, all in one run: one table, one picture.

    python -m recipes.benchmarks.decoding                      # an hour on two CPU cores; what is measured is kept
    and skipped python -m recipes.benchmarks.decoding --parts ranking      # minutes: what ranking adds
    (recipes/benchmarks/ranking_cost.py), anew

A Llama of four layers, d = 256, with random weights, over made-up catalogs of 4 x 256 codes. Every figure is the
median of `--repeats` runs, in turn with the other contenders, after a warm-up; a contender that has taken ten seconds
is not run again, and a peer that would run more than `--stock_tokens` tokens at once is not run at all (on all
catalogs but the
first, a sixth of it: the catalog is not what a peer's time depends on). CPU time is of all threads;
memory is what the run adds to the process at its peak (resident set on Linux, allocated bytes on CUDA).

The peers run in float32. Contenders of the search: transformers' `generate` with `prefix_allowed_tokens_fn` over
nested dicts, the same with our logits processor, ours. Of the ranking of as many candidates as beams, on a history
that was read: transformers over the whole sequences, the cache repeated for every candidate, ours. Of both:
    `generate` and whole sequences
(their sum), ours. Floors: the prefill, and nothing but the matmuls of the tokens that both must run behind it.
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LogitsProcessorList
from transformers.cache_utils import DynamicCache

from modeling_unigrf import CatalogTrie, UniGRFConfig, UniGRFForCausalLM
from modeling_unigrf.generation_unigrf import TrieLogitsProcessor
from recipes.benchmarks import ranking_cost
from recipes.benchmarks.baselines import DictTrie, StaticTrie, random_catalog
from recipes.benchmarks.report import BY_DICT, BY_PROCESSOR, MATMULS, OURS, REPEATED, WHOLE, draw, ratios
from recipes.common.arguments import parse_arguments
from recipes.common.profiling import PeakMemory, bf16_speed_up
from recipes.common.run_tracking import command, made_by

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
SIZES = [256, 256, 256, 256]
PARTS = ["trie", "rows", "ranking"]
# History items, beams, users: 52 items are 261 tokens and 102 are 511, for the ratios that the README quotes.
RATIO_CELLS = [(52, 256, 1), (52, 128, 1), (52, 50, 8), (102, 256, 1)]


@dataclass
class BenchmarkArguments:
    """The grid."""

    output: str = field(
        default="recipes/benchmarks/results/decoding.json", metadata={"help": "Figures; its .png is the picture."}
    )
    history_items: list[int] = field(default_factory=lambda: [64, 512], metadata={"help": "Items of a history."})
    num_beams: list[int] = field(default_factory=lambda: [20, 50, 256], metadata={"help": "Beams and candidates."})
    users: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Histories a call."})
    catalogs: list[int] = field(default_factory=lambda: [100_000, 10_000, 1_000_000], metadata={"help": "Items."})
    trie_sizes: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000, 10_000_000],
        metadata={"help": "Items, for the trie alone."},
    )
    repeats: int = field(default=9, metadata={"help": "Runs behind a median, or as many as ten seconds allow."})
    stock_tokens: int = field(default=150_000, metadata={"help": "Most tokens that a peer may run at once."})
    dtypes: list[str] | None = field(
        default=None, metadata={"help": "float32, bfloat16; default: both if bfloat16 is faster, else only float32."}
    )
    parts: list[str] | None = field(
        default=None,
        metadata={"help": "Measured anew, and nothing else; default: what the file lacks of all.", "choices": PARTS},
    )


@torch.no_grad()
def measure(contenders: dict[str, Callable], repeats: int, seconds: float = 10.0) -> dict[str, dict]:
    """Medians of wall and CPU time in ms, and peak memory in MB, of each contender, run in turn."""
    runs: dict[str, list] = {name: [] for name in contenders}
    megabytes = {}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            if turn and sum(one[0] for one in runs[name]) > seconds:
                continue
            with PeakMemory() if turn == 0 else nullcontext() as memory:
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                runs[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            if turn == 0:
                megabytes[name] = None if memory.added is None else memory.added / 2**20
    figures = {}
    for name, all_of_them in runs.items():
        counted = all_of_them[1:] or all_of_them  # without the warm-up, unless it was long
        wall, cpu = zip(*counted, strict=True)
        figures[name] = {
            "wall_ms": round(1000 * statistics.median(wall), 3),
            "cpu_ms": round(1000 * statistics.median(cpu), 3),
            "peak_mb": None if megabytes[name] is None else round(megabytes[name], 1),
            "runs": len(counted),
        }
    return figures


def build_model(codes: torch.Tensor, codebook_sizes: list[int], **config) -> UniGRFForCausalLM:
    """
    The benchmark's model, random weights (and item embeddings, if asked for), float32, on the GPU if there is one.
    """
    torch.manual_seed(0)
    config = {
        "num_items": len(codes),
        "embedding_table_size": 0,
        "history_item_representations": False,
        "ranking_dropout": 0.0,
        "embedding_dropout": 0.0,
        "training_config": {"dense_loss_weight": 0.0},
        **config,
    }
    config = UniGRFConfig(text_config=LLAMA, codebook_sizes=codebook_sizes, **config)
    model = UniGRFForCausalLM(config).eval()
    model.generation_config.exclude_history = False
    with torch.no_grad():  # a spread as after training, so that beams are not all alike
        model.lm_head.weight.mul_(20)
    width = config.content_embedding_dim
    model.set_catalog(codes, torch.randn(len(codes), width) if width else None)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def histories(model: UniGRFForCausalLM, users: int, items: int) -> torch.LongTensor:
    """Token ids `[users, 1 + items * (L + 1)]` of random items."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(model.catalog.num_items, (users, items), generator=generator)
    tokens = model.layout.item_tokens(model.catalog.item_codes.cpu()[chosen].long())
    behaviors = torch.full((users, items, 1), model.config.behavior_token_ids[0])
    bos = torch.full((users, 1), model.config.bos_token_id)
    return torch.cat([bos, torch.cat([tokens, behaviors], dim=2).flatten(1)], dim=1).to(model.device)


def stock_model(model: UniGRFForCausalLM):
    """transformers' own class with the same weights."""
    stock = AutoModelForCausalLM.from_config(model.config.text_config).to(model.device, model.dtype).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    return stock


def matmuls(model: UniGRFForCausalLM, rows: int, steps: int) -> Callable:
    """Nothing but the linear layers of the backbone, on `rows` tokens `steps` times."""
    layers = [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        width: torch.randn(rows, width, device=model.device, dtype=model.dtype)
        for width in {layer.in_features for layer in layers}
    }
    return lambda: [layer(inputs[layer.in_features]) for _ in range(steps) for layer in layers]


def contenders(model, stock, dict_trie, input_ids, num_beams: int, stock_tokens: int) -> dict[str, Callable]:
    """Everything that is measured of one cell, by `task: contender`."""
    users, length = input_ids.shape
    levels = model.config.num_levels
    mask, cache = torch.ones_like(input_ids), DynamicCache()
    states = model.model(input_ids, mask, cache=cache, use_cache=True).last_hidden_state[:, -1]
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randperm(model.catalog.num_items, generator=generator)[:num_beams] for _ in range(users)]
    candidates = torch.stack(drawn).to(input_ids.device)
    tokens = model.layout.item_tokens(model.catalog.item_codes[candidates].long())
    beams = {"num_beams": num_beams, "num_return_sequences": num_beams}
    stock_beams = {**beams, "attention_mask": mask, "max_new_tokens": levels, "do_sample": False, "pad_token_id": 0}
    stock_beams |= {"length_penalty": 0.0, "eos_token_id": None}
    processor = TrieLogitsProcessor(model.layout, model.catalog.trie, model.config.pad_token_id)

    def whole_sequences():
        for user in range(users):
            for part in tokens[user].split(32):
                rows = torch.cat([input_ids[user].expand(len(part), -1), part], dim=1)
                last = stock.model(rows).last_hidden_state[:, -1]
                model.scorer.ranking_logits(last[None], None, candidates[:1, : len(part)])

    def cache_repeated():
        repeated = deepcopy(cache)
        repeated.batch_repeat_interleave(num_beams)
        rows, seen = tokens.flatten(0, 1), mask.repeat_interleave(num_beams, dim=0)
        seen = nn.functional.pad(seen, (0, levels), value=1)
        positions = length + torch.arange(levels, device=rows.device).expand(len(rows), -1)
        out = stock.model(rows, attention_mask=seen, position_ids=positions, cache=repeated)
        model.scorer.ranking_logits(out.last_hidden_state[:, -1].view(users, num_beams, -1), None, candidates)

    ours = {
        "prefill: ours": lambda: model.model(input_ids, mask, use_cache=True),
        "search: ours": lambda: model.generate(input_ids, attention_mask=mask, **beams),
        "ranking: ours": lambda: model.rank(input_ids, mask, candidates, cache=cache, history_states=states),
        "both: ours": lambda: model.recommend(input_ids, mask, **beams),
        f"{MATMULS}: floor": matmuls(model, users * num_beams, levels),
    }
    if users * num_beams * length > stock_tokens:
        return ours
    by_dict = {}
    if dict_trie is not None:
        allowed = dict_trie.allowed_after(length)
        by_dict = {
            f"search: {BY_DICT}": lambda: stock.generate(input_ids, prefix_allowed_tokens_fn=allowed, **stock_beams)
        }
    return by_dict | {
        f"search: {BY_PROCESSOR}": lambda: stock.generate(
            input_ids, logits_processor=LogitsProcessorList([processor]), **stock_beams
        ),
        f"ranking: {WHOLE}": whole_sequences,
        f"ranking: {REPEATED}": cache_repeated,
        **ours,
    }


def same_items(model, stock, input_ids, num_beams: int) -> float:
    """Share of the beams that `generate` of transformers, with our processor, finds as well."""
    mask = torch.ones_like(input_ids)
    beams = {"attention_mask": mask, "num_beams": num_beams, "num_return_sequences": num_beams, "length_penalty": 0.0}
    found = model.generate(input_ids, **beams)
    processor = TrieLogitsProcessor(model.layout, model.catalog.trie, model.config.pad_token_id)
    beams |= {"max_new_tokens": model.config.num_levels, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = stock.generate(input_ids, logits_processor=LogitsProcessorList([processor]), **beams)
    rows = [{tuple(row) for row in one.tolist()} for one in (found, expected)]
    return len(rows[0] & rows[1]) / len(rows[1])


def repeat(call: Callable, count: int) -> None:
    """Calls `count` times."""
    for _ in range(count):
        call()


def trie_rows(size: int, repeats: int) -> list[dict]:
    """
    The trie alone, 256 beams: a step from log-probabilities to the best children, for each level below the first.
    """
    codes, num_beams = random_catalog(size), 256
    seconds, tries = {}, {}
    for name, build in (
        (OURS, lambda: CatalogTrie(codes, SIZES)),
        ("STATIC", lambda: StaticTrie(codes, SIZES[0])),
        ("nested dicts", lambda: DictTrie(codes) if size <= 1_000_000 else None),
    ):
        with PeakMemory() as memory:
            start = time.perf_counter()
            tries[name] = build()
            seconds[name] = time.perf_counter() - start
        dict_bytes = memory.added_resident  # of the last, which cannot say so itself
    ours, static, nested = tries.values()
    rows = []
    for users in (1, 16):
        generator = torch.Generator().manual_seed(0)
        steps: dict[str, list[float]] = {name: [] for name in tries if tries[name] is not None}
        nodes, scores = torch.zeros(users, 1, dtype=torch.long), torch.zeros(users, 1)
        prefixes = torch.zeros(users, 1, 0, dtype=torch.long)
        for level, num_codes in enumerate(SIZES):
            log_probs = (2 * torch.randn(*nodes.shape, num_codes, generator=generator)).log_softmax(dim=-1)
            arguments = (nodes, scores, log_probs, num_beams)
            calls = {
                OURS: partial(ours.best_children, level, *arguments),
                "STATIC": partial(static.step, level, *arguments),
            }
            if nested is not None:
                calls["nested dicts"] = partial(nested.step, prefixes.tolist(), *arguments[1:])
            if level:  # ten calls in a row, as a step of microseconds is measured
                in_a_row = {name: partial(repeat, call, 10 if users == 1 else 2) for name, call in calls.items()}
                for name, figures in measure(in_a_row, repeats, seconds=5.0).items():
                    steps[name].append(round(figures["wall_ms"] / (10 if users == 1 else 2), 3))
            with torch.no_grad():
                found = calls[OURS]()
                best = calls["STATIC"]()
            if not torch.allclose(found[0], best[0][:, : found[0].shape[1]]):
                raise RuntimeError("The contenders do not agree.")
            real = int((found[0] > -torch.inf).sum(dim=1).min())  # all beams of all users, as in a search
            prefixes = torch.cat(
                [
                    prefixes.gather(1, found[1][..., None].expand(-1, -1, level)),
                    found[3][..., None],
                ],
                dim=2,
            )[:, :real]
            scores, nodes = found[0][:, :real], found[2][:, :real]
        sizes = {OURS: ours.nbytes["nodes"], "STATIC": static.nbytes, "nested dicts": dict_bytes or 0}
        for name, wall in steps.items():
            row = {
                "items": len(codes),
                "users": users,
                "contender": name,
                "step_ms": wall,
                "sum_ms": round(sum(wall), 3),
            }
            row |= {"bytes_per_item": round(sizes[name] / len(codes), 2), "build_s": round(seconds[name], 3)}
            if name == OURS:
                row["bytes_per_item_with_item_map"] = round(sum(ours.nbytes.values()) / len(codes), 2)
            rows.append(row)
    return rows


def many_codes(size: int) -> tuple[torch.Tensor, list[int]]:
    """
    Items of 17 codes, as long as a candidate with a sub-history of its own: the same, with 13 codes that say nothing.
    """
    codes = random_catalog(size)
    return nn.functional.pad(codes, (0, 13)), [*SIZES, *[1] * 13]


def one_row_a_line(data: dict) -> str:
    """JSON of lists of rows, short and fit for a diff."""
    parts = []
    for name, value in data.items():
        rows = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {rows}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Figures:
    """The rows measured so far, kept in a file; what is there is not measured again."""

    def __init__(self, file: Path):
        self.file = file
        self.data = {"rows": [], "trie": [], "ranking": [], "agreement": []}
        self.data |= json.loads(file.read_text()) if file.exists() else {}

    def has(self, part: str, **cell) -> bool:
        return any(cell.items() <= row.items() for row in self.data[part])

    def add(self, part: str, rows: list[dict]) -> None:
        self.data[part] += rows
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(one_row_a_line(self.data))


def run_cells(args: BenchmarkArguments, figures: Figures, dtypes: list[str]) -> None:
    """Search, ranking and both, over the grid."""
    grid = list(product(args.history_items, args.num_beams, args.users))
    for size in args.catalogs:
        cells = grid + (RATIO_CELLS if size == args.catalogs[0] else [])
        names = [dict(zip(("history_items", "num_beams", "users"), cell, strict=True)) for cell in cells]
        missing = [
            [dtype for dtype in dtypes if not figures.has("rows", catalog=size, levels=4, dtype=dtype, **name)]
            for name in names
        ]
        left = [pair for pair in zip(names, missing, strict=True) if pair[1]]
        if not left:
            continue
        codes = random_catalog(size)
        model = build_model(codes, SIZES)
        dict_trie = DictTrie(model.layout.item_tokens(codes.long()))
        by_dtype = {name: deepcopy(model).to(getattr(torch, name)) for name in dtypes}
        for cell, wanted in tqdm(left, desc=f"{size:,} items", unit="cell"):
            calls = {}
            for dtype in wanted:
                one = by_dtype[dtype]
                stock = stock_model(one)
                input_ids = histories(one, cell["users"], cell["history_items"])
                with torch.no_grad():
                    most = args.stock_tokens if size == args.catalogs[0] else args.stock_tokens // 6
                    here = contenders(one, stock, dict_trie, input_ids, cell["num_beams"], most)
                    if (
                        dtype == "float32" and cell["history_items"] == args.history_items[0] and cell["users"] == 1
                    ):  # in bfloat16 near ties swap
                        share = same_items(one, stock, input_ids, cell["num_beams"])
                        figures.add("agreement", [{"catalog": size, **cell, "dtype": dtype, "same_items": share}])
                if dtype != "float32":  # the peers' dtype
                    here = {name: call for name, call in here.items() if name.endswith((OURS, "floor"))}
                calls |= {(name, dtype): call for name, call in here.items()}
            add_cell(figures, calls, {"catalog": size, "levels": 4, "tokens": input_ids.shape[1], **cell}, args)


def add_cell(figures: Figures, calls: dict, cell: dict, args: BenchmarkArguments) -> None:
    """Measures the contenders of one cell and keeps the figures."""
    rows = []
    for (name, dtype), values in measure(calls, args.repeats).items():
        task, contender = name.split(": ")
        rows.append({**cell, "task": task, "contender": contender, "dtype": dtype, **values})
    figures.add("rows", rows)


def run_candidates(args: BenchmarkArguments, figures: Figures, dtypes: list[str]) -> None:
    """Ranking of ever more candidates of 17 tokens on a history of 512, and ever more beams of ours."""
    codes, sizes = many_codes(100_000)
    model = build_model(codes, sizes)
    for count in tqdm([16, 64, 256, 1024, 4096], desc="candidates of 17 tokens", unit="cell"):
        cell = {"catalog": 100_000, "levels": 17, "history_items": 28, "num_beams": count, "users": 1}
        if figures.has("rows", **cell):
            continue
        calls = {}
        for dtype in dtypes:
            one = deepcopy(model).to(getattr(torch, dtype))
            input_ids = histories(one, 1, 28)
            with torch.no_grad():
                here = contenders(one, stock_model(one), None, input_ids, count, args.stock_tokens)
            calls |= {(name, dtype): call for name, call in here.items() if name.startswith("ranking")}
        add_cell(figures, calls, {"tokens": input_ids.shape[1], **cell}, args)
    codes = random_catalog(100_000)
    model = build_model(codes, SIZES)
    dict_trie = DictTrie(model.layout.item_tokens(codes.long()))
    for count in tqdm([16, 32, 64, 512], desc="beams", unit="cell"):
        cell = {"catalog": 100_000, "levels": 4, "history_items": 52, "num_beams": count, "users": 1}
        if figures.has("rows", **cell):
            continue
        calls = {}
        for dtype in dtypes:
            one = deepcopy(model).to(getattr(torch, dtype))
            with torch.no_grad():
                tokens = histories(one, 1, 52)
                here = contenders(one, stock_model(one), dict_trie, tokens, count, 70_000)
                here = {name: call for name, call in here.items() if name.startswith("search")}
            calls |= {(name, dtype): call for name, call in here.items()}
        add_cell(figures, calls, {"tokens": tokens.shape[1], **cell}, args)


def run_ranking(args: BenchmarkArguments, figures: Figures, dtypes: list[str]) -> None:
    """
    What ranking adds to the search on a short window, and what long histories cost
        (`recipes.benchmarks.ranking_cost`).
    """
    size = args.catalogs[0]
    codes = random_catalog(size)
    for retrieved, length in tqdm(ranking_cost.CELLS, desc="ranking beside generation", unit="cell"):
        cell = {"catalog": size, "retrieved": retrieved, "long_items": length}
        if figures.has("ranking", **cell):
            continue
        model = build_model(codes, SIZES, content_embedding_dim=128, num_retrieved_items=retrieved)
        by_dtype, rows = {name: deepcopy(model).to(getattr(torch, name)) for name in dtypes}, []
        for users in ranking_cost.USERS:
            calls = {}
            for dtype, one in by_dtype.items():
                input_ids = histories(one, users, ranking_cost.WINDOW)
                here = ranking_cost.serving(one, input_ids, length)
                calls |= {(name, dtype): call for name, call in here.items()}
            counts = {"users": users, "tokens": input_ids.shape[1], "candidates": ranking_cost.NUM_BEAMS}
            rows += [cell | counts | of_call(call) | found for call, found in measure(calls, args.repeats).items()]
        input_ids = histories(model, ranking_cost.TRAINING_ROWS, ranking_cost.WINDOW + 1)
        steps = ranking_cost.training(model.train(), input_ids, length)
        counts = {
            "users": len(input_ids),
            "tokens": input_ids.shape[1],
            "candidates": ranking_cost.TRAINING_CANDIDATES,
        }
        found = measure({(name, "float32"): step for name, step in steps.items()}, args.repeats)
        figures.add("ranking", rows + [cell | counts | of_call(call) | values for call, values in found.items()])


def of_call(call: tuple[str, str]) -> dict[str, str]:
    """Task and dtype of a call, as columns."""
    return dict(zip(("task", "dtype"), call, strict=True))


def main(args: BenchmarkArguments) -> None:
    """Measures what is not yet in the output file, or `args.parts` anew, then writes ratios and picture."""
    figures, parts = Figures(Path(args.output)), args.parts or PARTS
    for part in args.parts or ():
        figures.data[part] = []
    speed_up = bf16_speed_up()
    dtypes = args.dtypes or (["float32", "bfloat16"] if speed_up > 1 else ["float32"])
    print(f"bfloat16 matmuls run at {speed_up:.2f} times the speed of float32: measured in {dtypes}")
    for size in tqdm(args.trie_sizes if "trie" in parts else [], desc="trie alone", unit="catalog"):
        if not figures.has("trie", size=size):
            figures.add("trie", [{"size": size, **row} for row in trie_rows(size, args.repeats)])
    if "rows" in parts:
        run_cells(args, figures, dtypes)
        run_candidates(args, figures, dtypes)
    if "ranking" in parts:
        run_ranking(args, figures, dtypes)
    made = made_by(command("recipes.benchmarks.decoding", args))
    if args.parts:
        figures.data |= {f"{part} made by": made for part in parts}
    else:
        figures.data |= {"bf16 speed-up of a matmul": round(speed_up, 3), "made by": made}
    figures.data["ratios"] = ratios(figures.data)
    figures.add("rows", [])
    draw(figures.data, Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main(*parse_arguments(BenchmarkArguments))

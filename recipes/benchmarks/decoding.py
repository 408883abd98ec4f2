"""Measure beam search, ranking and the trie beside their baselines, in one run.

    python -m recipes.benchmarks.decoding                   # an hour on two CPU cores
    python -m recipes.benchmarks.decoding --parts ranking   # minutes: what ranking adds to generation

The output is a JSON file of all figures and ratios, and a picture beside it. A second run measures only what the file
lacks.

The model is a Llama of four layers and width 256, with random weights and random catalogs of 4 x 256 codes. Contenders
run in turn, after a warm-up. A figure is the median of `--repeats` runs. A contender that took ten seconds stops
there. A baseline that would run more than `--stock_tokens` tokens at once is left out. On all catalogs but the first,
the limit is a sixth of that, because the catalog hardly changes a baseline's time. CPU time is the sum of all
threads. Memory is
the peak that the run adds: the resident set on Linux, allocated bytes on CUDA.

Contenders; the baselines run in float32:

- Search: `generate` of transformers with `prefix_allowed_tokens_fn` over nested dicts, or with our logits processor.
- Ranking, of as many candidates as beams after a prefilled history: whole sequences, or the cache repeated for every
  candidate.
- Both: the sum of `generate` and whole sequences.
- Floors: the prefill, and the matmuls of the tokens that search and ranking must run after it.
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
from transformers import AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache

from modeling_unigrf import CatalogTrie, UniGRFConfig, UniGRFForCausalLM
from modeling_unigrf.generation_unigrf import TrieLogitsProcessor
from recipes.benchmarks import ranking_cost
from recipes.benchmarks.baselines import DictTrie, StaticTrie, random_catalog
from recipes.benchmarks.report import (
    BY_DICT,
    BY_PROCESSOR,
    MATMULS,
    NESTED_DICTS,
    OURS,
    REPEATED,
    STATIC,
    WHOLE,
    draw,
    ratios,
)
from recipes.common.arguments import COUNT, check_ranges, parse_arguments
from recipes.common.files import check_writable
from recipes.common.profiling import PeakMemory, bf16_speed_up
from recipes.common.run_tracking import command, made_by
from recipes.training.model_init import create_model

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
# Cells of the ratios: history items, beams, users.
RATIO_CELLS = [(52, 256, 1), (52, 128, 1), (52, 50, 8), (102, 256, 1)]

RANGES = dict.fromkeys(
    ("history_items", "num_beams", "users", "catalogs", "trie_sizes", "repeats", "stock_tokens"), COUNT
)


@dataclass
class BenchmarkArguments:
    """Grid and output of the benchmark."""

    output: str = field(
        default="recipes/benchmarks/results/decoding.json",
        metadata={"help": "JSON file of the figures; the picture is the .png beside it."},
    )
    history_items: list[int] = field(
        default_factory=lambda: [64, 512], metadata={"help": "Lengths of the histories in items."}
    )
    num_beams: list[int] = field(
        default_factory=lambda: [20, 50, 256], metadata={"help": "Numbers of beams, and of candidates to rank."}
    )
    users: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Numbers of histories in a call."})
    catalogs: list[int] = field(
        default_factory=lambda: [100_000, 10_000, 1_000_000],
        metadata={"help": "Sizes of the catalogs in items. The first catalog also gets the cells of the ratios."},
    )
    trie_sizes: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000, 10_000_000],
        metadata={"help": "Sizes of the catalogs in items, for the trie alone."},
    )
    repeats: int = field(
        default=9, metadata={"help": "Runs behind a median, after a warm-up, as far as ten seconds allow."}
    )
    stock_tokens: int = field(
        default=150_000, metadata={"help": "Most tokens that a baseline may run at once; it is left out above."}
    )
    dtypes: list[str] | None = field(
        default=None,
        metadata={"help": "Types of our runs, float32 and bfloat16. None: both if bfloat16 is faster, else float32."},
    )
    parts: list[str] | None = field(
        default=None,
        metadata={"help": "Parts to measure again, alone. None: all that the output file lacks.", "choices": PARTS},
    )


@torch.no_grad()
def measure(contenders: dict[str, Callable], repeats: int, seconds: float = 10.0) -> dict[str, dict]:
    """
    Run contenders in turn, and measure their time and memory.

    Args:
        contenders: Calls by name.
        repeats: Runs of each contender after a warm-up.
        seconds: Time after which a contender does not run again.

    Returns:
        For each contender: medians of wall and CPU time in ms, peak memory of the warm-up in MB, and number of runs.
    """
    # Runs
    runs: dict[str, list] = {name: [] for name in contenders}
    megabytes = {}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            if turn and sum(wall for wall, _ in runs[name]) > seconds:
                continue
            with PeakMemory() if turn == 0 else nullcontext() as memory:
                wall_start = time.perf_counter()
                cpu_start = time.process_time()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                runs[name].append((time.perf_counter() - wall_start, time.process_time() - cpu_start))
            if turn == 0:
                megabytes[name] = None if memory.added is None else memory.added / 2**20

    # Medians
    figures = {}
    for name, times in runs.items():
        # A slow contender has no run but the warm-up.
        counted = times[1:] or times
        wall, cpu = zip(*counted, strict=True)
        figures[name] = {
            "wall_ms": round(1000 * statistics.median(wall), 3),
            "cpu_ms": round(1000 * statistics.median(cpu), 3),
            "peak_mb": None if megabytes[name] is None else round(megabytes[name], 1),
            "runs": len(counted),
        }
    return figures


def build_model(codes: torch.Tensor, codebook_sizes: list[int], **fields) -> UniGRFForCausalLM:
    """
    Build the benchmark's model in float32, with random weights, on the GPU if there is one.

    Args:
        codes: Codes of the items, `[num_items, L]`.
        codebook_sizes: Number of codes of each level.
        fields: Other fields of `UniGRFConfig`. With `content_embedding_dim`, the items get random embeddings.
    """
    torch.manual_seed(0)
    fields = {
        "num_items": len(codes),
        "embedding_table_size": 0,
        "history_item_representations": False,
        "ranking_dropout": 0.0,
        "embedding_dropout": 0.0,
        "training_config": {"dense_loss_weight": 0.0},
        **fields,
    }
    config = UniGRFConfig(text_config=LLAMA, codebook_sizes=codebook_sizes, **fields)
    width = config.content_embedding_dim
    model = create_model(config, codes, torch.randn(len(codes), width) if width else None).eval()
    model.generation_config.exclude_history = False
    # Spread the scores as training does, so that beams differ.
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def random_histories(model: UniGRFForCausalLM, num_users: int, num_items: int) -> torch.LongTensor:
    """Draw the token ids of histories of random items, `[num_users, 1 + num_items * (L + 1)]`."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(model.catalog.num_items, (num_users, num_items), generator=generator)
    tokens = model.layout.item_tokens(model.catalog.item_codes.cpu()[items].long())
    behaviors = torch.full((num_users, num_items, 1), model.config.behavior_token_ids[0])
    bos = torch.full((num_users, 1), model.config.bos_token_id)
    return torch.cat([bos, torch.cat([tokens, behaviors], dim=2).flatten(1)], dim=1).to(model.device)


def stock_model(model: UniGRFForCausalLM) -> PreTrainedModel:
    """Build the class of transformers with the same weights."""
    stock = AutoModelForCausalLM.from_config(model.config.text_config).to(model.device, model.dtype).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    return stock


def matmuls(model: UniGRFForCausalLM, num_tokens: int, steps: int) -> Callable:
    """Make a call that runs only the linear layers of the backbone, on `num_tokens` tokens `steps` times."""
    layers = [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        width: torch.randn(num_tokens, width, device=model.device, dtype=model.dtype)
        for width in {layer.in_features for layer in layers}
    }
    return lambda: [layer(inputs[layer.in_features]) for _ in range(steps) for layer in layers]


@dataclass
class RankingBatch:
    """
    Prefilled histories and candidates to rank after them.

    Args:
        input_ids: Histories, `[B, T]`.
        mask: Mask of the histories, `[B, T]`.
        cache: Keys and values of the histories.
        states: States at the ends of the histories, `[B, hidden_size]`.
        candidates: Item indices, `[B, N]`.
        tokens: Tokens of the candidates, `[B, N, L]`.
    """

    input_ids: torch.LongTensor
    mask: torch.LongTensor
    cache: DynamicCache
    states: torch.FloatTensor
    candidates: torch.LongTensor
    tokens: torch.LongTensor

    @classmethod
    def prefill(cls, model: UniGRFForCausalLM, input_ids: torch.LongTensor, num_candidates: int) -> "RankingBatch":
        """Run the histories, and draw candidates for each of them."""
        mask = torch.ones_like(input_ids)
        cache = DynamicCache()
        states = model.model(input_ids, mask, cache=cache, use_cache=True).last_hidden_state[:, -1]
        generator = torch.Generator().manual_seed(2)
        drawn = [torch.randperm(model.catalog.num_items, generator=generator)[:num_candidates] for _ in input_ids]
        candidates = torch.stack(drawn).to(input_ids.device)
        tokens = model.layout.item_tokens(model.catalog.item_codes[candidates].long())
        return cls(input_ids, mask, cache, states, candidates, tokens)


def rank_whole_sequences(model: UniGRFForCausalLM, stock: PreTrainedModel, batch: RankingBatch) -> None:
    """Rank by transformers' model, on whole sequences of history and candidate, 32 at a time."""
    for history, tokens in zip(batch.input_ids, batch.tokens, strict=True):
        for part in tokens.split(32):
            sequences = torch.cat([history.expand(len(part), -1), part], dim=1)
            states = stock.model(sequences).last_hidden_state[:, -1]
            model.scorer.ranking_logits(states[None], None, batch.candidates[:1, : len(part)])


def rank_with_repeated_cache(model: UniGRFForCausalLM, stock: PreTrainedModel, batch: RankingBatch) -> None:
    """Rank by transformers' model, with the history's cache repeated for every candidate."""
    num_users, num_candidates, num_levels = batch.tokens.shape
    cache = deepcopy(batch.cache)
    cache.batch_repeat_interleave(num_candidates)
    tokens = batch.tokens.flatten(0, 1)
    mask = nn.functional.pad(batch.mask.repeat_interleave(num_candidates, dim=0), (0, num_levels), value=1)
    positions = batch.input_ids.shape[1] + torch.arange(num_levels, device=tokens.device).expand(len(tokens), -1)
    output = stock.model(tokens, attention_mask=mask, position_ids=positions, cache=cache)
    states = output.last_hidden_state[:, -1].view(num_users, num_candidates, -1)
    model.scorer.ranking_logits(states, None, batch.candidates)


def contenders(
    model: UniGRFForCausalLM,
    stock: PreTrainedModel,
    dict_trie: DictTrie | None,
    input_ids: torch.LongTensor,
    num_beams: int,
    stock_tokens: int,
) -> dict[str, Callable]:
    """
    Make the calls to measure in a cell, by `task: contender`.

    Args:
        model: Our model.
        stock: The model of transformers with the same weights.
        dict_trie: Trie of nested dicts. None: leave out the search with it.
        input_ids: Histories, `[B, T]`.
        num_beams: Beams of a search, and candidates to rank.
        stock_tokens: Most tokens that a baseline may run at once. Above, all baselines are left out.
    """
    # Ours
    num_users, length = input_ids.shape
    num_levels = model.config.num_levels
    batch = RankingBatch.prefill(model, input_ids, num_beams)
    beams = {"num_beams": num_beams, "num_return_sequences": num_beams}
    states = {"cache": batch.cache, "history_states": batch.states}
    ours = {
        "prefill: ours": lambda: model.model(input_ids, batch.mask, use_cache=True),
        "search: ours": lambda: model.generate(input_ids, attention_mask=batch.mask, **beams),
        "ranking: ours": lambda: model.rank(input_ids, batch.mask, batch.candidates, **states),
        "both: ours": lambda: model.recommend(input_ids, batch.mask, **beams),
        f"{MATMULS}: floor": matmuls(model, num_users * num_beams, num_levels),
    }
    if num_users * num_beams * length > stock_tokens:
        return ours

    # Baselines
    search = {**beams, "attention_mask": batch.mask, **stock_search_options(num_levels)}
    by_dict = {}
    if dict_trie is not None:
        allowed = dict_trie.allowed_after(length)
        by_dict = {f"search: {BY_DICT}": lambda: stock.generate(input_ids, prefix_allowed_tokens_fn=allowed, **search)}
    processors = LogitsProcessorList([trie_processor(model)])
    return by_dict | {
        f"search: {BY_PROCESSOR}": lambda: stock.generate(input_ids, logits_processor=processors, **search),
        f"ranking: {WHOLE}": lambda: rank_whole_sequences(model, stock, batch),
        f"ranking: {REPEATED}": lambda: rank_with_repeated_cache(model, stock, batch),
        **ours,
    }


def stock_search_options(num_levels: int) -> dict:
    """Return the options with which transformers' `generate` searches for one item, as ours does."""
    return {
        "max_new_tokens": num_levels,
        "do_sample": False,
        "pad_token_id": 0,
        "length_penalty": 0.0,
        "eos_token_id": None,
    }


def trie_processor(model: UniGRFForCausalLM) -> TrieLogitsProcessor:
    """Make the logits processor that keeps transformers' search inside the catalog."""
    return TrieLogitsProcessor(model.layout, model.catalog.trie, model.config.pad_token_id)


def same_items(model: UniGRFForCausalLM, stock: PreTrainedModel, input_ids: torch.LongTensor, num_beams: int) -> float:
    """Return the share of the beams of transformers' `generate`, with our processor, that our search has, too."""
    beams = {
        "attention_mask": torch.ones_like(input_ids),
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "length_penalty": 0.0,
    }
    options = {**beams, **stock_search_options(model.config.num_levels)}
    ours = model.generate(input_ids, **beams)
    expected = stock.generate(input_ids, logits_processor=LogitsProcessorList([trie_processor(model)]), **options)
    our_beams, expected_beams = ({tuple(row) for row in rows.tolist()} for rows in (ours, expected))
    return len(our_beams & expected_beams) / len(expected_beams)


def repeat(call: Callable, count: int) -> None:
    """Make a call `count` times."""
    for _ in range(count):
        call()


@dataclass
class Tries:
    """
    Tries of the same items.

    Args:
        num_items: Number of items.
        ours: Our trie.
        static: The trie of STATIC.
        nested: The trie of nested dicts; None: too many items.
        seconds: Time to build each trie, by contender.
        nbytes: Memory of each trie in bytes, by contender; ours without the map from leaves to items.
    """

    num_items: int
    ours: CatalogTrie
    static: StaticTrie
    nested: DictTrie | None
    seconds: dict[str, float]
    nbytes: dict[str, int]

    @classmethod
    def build(cls, codes: torch.Tensor) -> "Tries":
        """Build all tries of items with these codes, `[num_items, 4]`."""
        builders = {
            OURS: lambda: CatalogTrie(codes, SIZES),
            STATIC: lambda: StaticTrie(codes, SIZES[0]),
            NESTED_DICTS: lambda: DictTrie(codes) if len(codes) <= 1_000_000 else None,
        }
        tries = {}
        seconds = {}
        for name, build in builders.items():
            with PeakMemory() as memory:
                start = time.perf_counter()
                tries[name] = build()
                seconds[name] = time.perf_counter() - start
        ours, static, nested = tries.values()
        # Nested dicts, built last, cannot tell their size.
        nbytes = {OURS: ours.nbytes["nodes"], STATIC: static.nbytes, NESTED_DICTS: memory.added_resident or 0}
        return cls(len(codes), ours, static, nested, seconds, nbytes)


def trie_rows(size: int, repeats: int) -> list[dict]:
    """
    Measure the tries alone: steps of 256 beams from log-probabilities to the best children, below the first level.

    Args:
        size: Number of items to draw.
        repeats: Runs behind a median.

    Returns:
        A row for each contender with 1 and with 16 users.
    """
    tries = Tries.build(random_catalog(size))
    rows = []
    for num_users in (1, 16):
        for name, wall in trie_steps(tries, num_users, 256, repeats).items():
            row = {
                "items": tries.num_items,
                "users": num_users,
                "contender": name,
                "step_ms": wall,
                "sum_ms": round(sum(wall), 3),
                "bytes_per_item": round(tries.nbytes[name] / tries.num_items, 2),
                "build_s": round(tries.seconds[name], 3),
            }
            if name == OURS:
                row["bytes_per_item_with_item_map"] = round(sum(tries.ours.nbytes.values()) / tries.num_items, 2)
            rows.append(row)
    return rows


def trie_steps(tries: Tries, num_users: int, num_beams: int, repeats: int) -> dict[str, list[float]]:
    """Measure each step of a search below the first level, in ms by contender, and check that all tries agree."""
    generator = torch.Generator().manual_seed(0)
    names = [OURS, STATIC, *([] if tries.nested is None else [NESTED_DICTS])]
    steps: dict[str, list[float]] = {name: [] for name in names}
    # A step of microseconds is measured as several calls in a row.
    calls_in_a_row = 10 if num_users == 1 else 2
    nodes = torch.zeros(num_users, 1, dtype=torch.long)
    scores = torch.zeros(num_users, 1)
    prefixes = torch.zeros(num_users, 1, 0, dtype=torch.long)
    for level, num_codes in enumerate(SIZES):
        # Time
        log_probs = (2 * torch.randn(*nodes.shape, num_codes, generator=generator)).log_softmax(dim=-1)
        inputs = (scores, log_probs, num_beams)
        calls = {
            OURS: partial(tries.ours.best_children, level, nodes, *inputs),
            STATIC: partial(tries.static.step, level, nodes, *inputs),
        }
        if tries.nested is not None:
            calls[NESTED_DICTS] = partial(tries.nested.step, prefixes.tolist(), *inputs)
        if level:
            rows_of_calls = {name: partial(repeat, call, calls_in_a_row) for name, call in calls.items()}
            for name, figures in measure(rows_of_calls, repeats, seconds=5.0).items():
                steps[name].append(round(figures["wall_ms"] / calls_in_a_row, 3))

        # The next beams.
        with torch.no_grad():
            best_scores, parents, children, codes = calls[OURS]()
            static_scores, *_ = calls[STATIC]()
        if not torch.allclose(best_scores, static_scores[:, : best_scores.shape[1]]):
            raise RuntimeError(f"The tries must take the same steps, got other scores at level {level}. Check them.")
        # Full beams of all users, as in a search.
        num_full = int((best_scores > -torch.inf).sum(dim=1).min())
        parent_prefixes = prefixes.gather(1, parents[..., None].expand(-1, -1, level))
        prefixes = torch.cat([parent_prefixes, codes[..., None]], dim=2)[:, :num_full]
        scores = best_scores[:, :num_full]
        nodes = children[:, :num_full]
    return steps


def many_codes(size: int) -> tuple[torch.Tensor, list[int]]:
    """Draw items of 17 codes, as long as a candidate with its sub-history; 13 of the codes are always 0."""
    codes = random_catalog(size)
    return nn.functional.pad(codes, (0, 13)), [*SIZES, *[1] * 13]


def one_row_a_line(data: dict) -> str:
    """Write JSON with a line for each row of a list, which is short and fits a diff."""
    parts = []
    for name, value in data.items():
        rows = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {rows}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Figures:
    """
    Rows that were measured, stored in a file.

    Args:
        file: The JSON file, which may hold rows of earlier runs.
    """

    def __init__(self, file: Path):
        self.file = file
        self.data = {"rows": [], "trie": [], "ranking": [], "agreement": []}
        self.data |= json.loads(file.read_text()) if file.exists() else {}

    def has(self, part: str, **cell) -> bool:
        """Return whether a part holds a row of this cell."""
        return any(cell.items() <= row.items() for row in self.data[part])

    def add(self, part: str, rows: list[dict]) -> None:
        """Add rows to a part, and write the file."""
        self.data[part] += rows
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(one_row_a_line(self.data))

    def add_cell(self, calls: dict[tuple[str, str], Callable], cell: dict, repeats: int) -> None:
        """Measure the calls of a cell, by contender and dtype, and add them."""
        rows = []
        for (name, dtype), values in measure(calls, repeats).items():
            task, contender = name.split(": ")
            rows.append({**cell, "task": task, "contender": contender, "dtype": dtype, **values})
        self.add("rows", rows)


def run_cells(args: BenchmarkArguments, figures: Figures, dtypes: list[str]) -> None:
    """Measure search, ranking and both, over the grid."""
    grid = list(product(args.history_items, args.num_beams, args.users))
    for size in args.catalogs:
        # Cells and dtypes that the file lacks.
        is_first = size == args.catalogs[0]
        cells = [
            dict(zip(("history_items", "num_beams", "users"), cell, strict=True))
            for cell in grid + (RATIO_CELLS if is_first else [])
        ]
        missing = [
            [dtype for dtype in dtypes if not figures.has("rows", catalog=size, levels=4, dtype=dtype, **cell)]
            for cell in cells
        ]
        tasks = [task for task in zip(cells, missing, strict=True) if task[1]]
        if not tasks:
            continue

        # Measurements
        codes = random_catalog(size)
        model = build_model(codes, SIZES)
        dict_trie = DictTrie(model.layout.item_tokens(codes.long()))
        models = {name: deepcopy(model).to(getattr(torch, name)) for name in dtypes}
        stock_tokens = args.stock_tokens if is_first else args.stock_tokens // 6
        for cell, cell_dtypes in tqdm(tasks, desc=f"{size:,} items", unit="cell"):
            calls = {}
            for dtype in cell_dtypes:
                stock = stock_model(models[dtype])
                input_ids = random_histories(models[dtype], cell["users"], cell["history_items"])
                with torch.no_grad():
                    contender_calls = contenders(
                        models[dtype], stock, dict_trie, input_ids, cell["num_beams"], stock_tokens
                    )
                    # In bfloat16, near ties swap.
                    if dtype == "float32" and cell["history_items"] == args.history_items[0] and cell["users"] == 1:
                        share = same_items(models[dtype], stock, input_ids, cell["num_beams"])
                        figures.add("agreement", [{"catalog": size, **cell, "dtype": dtype, "same_items": share}])
                # The baselines run in float32 alone.
                calls |= {
                    (name, dtype): call
                    for name, call in contender_calls.items()
                    if dtype == "float32" or name.endswith((OURS, "floor"))
                }
            row = {"catalog": size, "levels": 4, "tokens": input_ids.shape[1], **cell}
            figures.add_cell(calls, row, args.repeats)


@dataclass
class Line:
    """
    A line of the picture: cells of one task with more and more beams or candidates, for one user.

    Args:
        task: `ranking` or `search`.
        desc: Label of the progress bar.
        cell: Fields that all cells share.
        counts: Numbers of beams or candidates.
        stock_tokens: Most tokens that a baseline may run at once.
    """

    task: str
    desc: str
    cell: dict
    counts: list[int]
    stock_tokens: int


def run_line(
    line: Line, model: UniGRFForCausalLM, dict_trie: DictTrie | None, figures: Figures, dtypes: list[str], repeats: int
) -> None:
    """Measure the cells of a line that the file lacks."""
    for count in tqdm(line.counts, desc=line.desc, unit="cell"):
        cell = {**line.cell, "num_beams": count, "users": 1}
        if figures.has("rows", **cell):
            continue
        calls = {}
        for dtype in dtypes:
            model_of_dtype = deepcopy(model).to(getattr(torch, dtype))
            input_ids = random_histories(model_of_dtype, 1, cell["history_items"])
            stock = stock_model(model_of_dtype)
            with torch.no_grad():
                contender_calls = contenders(model_of_dtype, stock, dict_trie, input_ids, count, line.stock_tokens)
            calls |= {(name, dtype): call for name, call in contender_calls.items() if name.startswith(line.task)}
        figures.add_cell(calls, {"tokens": input_ids.shape[1], **cell}, repeats)


def run_candidates(args: BenchmarkArguments, figures: Figures, dtypes: list[str]) -> None:
    """Measure the lines of the picture: up to 4,096 candidates of 17 tokens, and up to 512 beams."""
    # Ranking
    codes, sizes = many_codes(100_000)
    cell = {"catalog": 100_000, "levels": 17, "history_items": 28}
    line = Line("ranking", "candidates of 17 tokens", cell, [16, 64, 256, 1024, 4096], args.stock_tokens)
    run_line(line, build_model(codes, sizes), None, figures, dtypes, args.repeats)

    # Search
    codes = random_catalog(100_000)
    model = build_model(codes, SIZES)
    dict_trie = DictTrie(model.layout.item_tokens(codes.long()))
    cell = {"catalog": 100_000, "levels": 4, "history_items": 52}
    line = Line("search", "beams", cell, [16, 32, 64, 512], 70_000)
    run_line(line, model, dict_trie, figures, dtypes, args.repeats)


def run_ranking(args: BenchmarkArguments, figures: Figures, dtypes: list[str]) -> None:
    """Measure what ranking adds to generation, and what long histories cost (`recipes.benchmarks.ranking_cost`)."""
    size = args.catalogs[0]
    codes = random_catalog(size)
    for retrieved, length in tqdm(ranking_cost.CELLS, desc="ranking beside generation", unit="cell"):
        cell = {"catalog": size, "retrieved": retrieved, "long_items": length}
        if figures.has("ranking", **cell):
            continue

        # Serving
        model = build_model(codes, SIZES, content_embedding_dim=128, num_retrieved_items=retrieved)
        models = {name: deepcopy(model).to(getattr(torch, name)) for name in dtypes}
        rows = []
        for num_users in ranking_cost.USERS:
            calls = {}
            for dtype, model_of_dtype in models.items():
                input_ids = random_histories(model_of_dtype, num_users, ranking_cost.WINDOW)
                task_calls = ranking_cost.serving(model_of_dtype, input_ids, length)
                calls |= {(task, dtype): call for task, call in task_calls.items()}
            shape = {"users": num_users, "tokens": input_ids.shape[1], "candidates": ranking_cost.NUM_BEAMS}
            rows += measured_rows(cell | shape, measure(calls, args.repeats))

        # Training
        input_ids = random_histories(model, ranking_cost.TRAINING_ROWS, ranking_cost.WINDOW + 1)
        task_calls = ranking_cost.training(model.train(), input_ids, length)
        shape = {
            "users": len(input_ids),
            "tokens": input_ids.shape[1],
            "candidates": ranking_cost.TRAINING_CANDIDATES,
        }
        calls = {(task, "float32"): call for task, call in task_calls.items()}
        figures.add("ranking", rows + measured_rows(cell | shape, measure(calls, args.repeats)))


def measured_rows(cell: dict, measurements: dict[tuple[str, str], dict]) -> list[dict]:
    """Make a row of a cell for each measured `(task, dtype)`."""
    return [cell | {"task": task, "dtype": dtype} | values for (task, dtype), values in measurements.items()]


def main(args: BenchmarkArguments) -> None:
    """Measure what the output file lacks, or `args.parts` again, and write ratios and picture."""
    check_ranges(args, RANGES)
    check_writable(Path(args.output).parent, "output")
    # Measurements
    figures = Figures(Path(args.output))
    parts = args.parts or PARTS
    for part in args.parts or ():
        figures.data[part] = []
    speed_up = bf16_speed_up()
    dtypes = args.dtypes or (["float32", "bfloat16"] if speed_up > 1 else ["float32"])
    print(f"a bfloat16 matmul runs {speed_up:.2f} times as fast as a float32 matmul; types to measure: {dtypes}")
    for size in tqdm(args.trie_sizes if "trie" in parts else [], desc="trie alone", unit="catalog"):
        if not figures.has("trie", size=size):
            figures.add("trie", [{"size": size, **row} for row in trie_rows(size, args.repeats)])
    if "rows" in parts:
        run_cells(args, figures, dtypes)
        run_candidates(args, figures, dtypes)
    if "ranking" in parts:
        run_ranking(args, figures, dtypes)

    # Record, ratios and picture.
    record = made_by(command("recipes.benchmarks.decoding", args))
    if args.parts:
        figures.data |= {f"{part} made by": record for part in parts}
    else:
        figures.data |= {"bf16 speed-up of a matmul": round(speed_up, 3), "made by": record}
    figures.data["ratios"] = ratios(figures.data)
    figures.add("rows", [])
    draw(figures.data, Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main(*parse_arguments(BenchmarkArguments))

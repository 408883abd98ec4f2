"""The trie: it holds exactly the catalog, and returns the best children that exist and are allowed."""

from unittest import mock

import pytest
import torch
from helpers import random_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_unigrf import CatalogTrie, ItemFilter, trie_unigrf
from modeling_unigrf.trie_unigrf import lexicographic_order

catalogs = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 6), min_size=1, max_size=4),
        "share": st.floats(0.05, 1.0),
        "dense_entries": st.sampled_from([0, 30, 2**17]),  # store no level, some or all levels as tables
        "seed": st.integers(0, 10_000),
    }
)


def build(sizes, share, dense_entries, seed):
    generator = torch.Generator().manual_seed(seed)
    total = int(torch.tensor(sizes).prod())
    codes = random_codes(max(1, round(share * total)), sizes, generator).int()
    with mock.patch.object(trie_unigrf, "DENSE_ENTRIES", dense_entries):
        return CatalogTrie(codes, sizes), codes, generator


@settings(max_examples=60, deadline=None)
@given(catalog=catalogs)
def test_the_trie_holds_exactly_the_catalog(catalog):
    trie, codes, _ = build(**catalog)
    sizes = catalog["sizes"]
    # With codes outside the codebooks.
    everything = torch.cartesian_prod(*(torch.arange(-1, size + 1) for size in sizes)).view(-1, len(sizes))
    index = {tuple(code): item for item, code in enumerate(codes.tolist())}
    assert trie.lookup(everything).tolist() == [index.get(tuple(code), -1) for code in everything.tolist()]
    prefixes = torch.zeros(1, 0, dtype=torch.long)
    nodes = torch.zeros(1, dtype=torch.long)
    for depth, level in enumerate(trie.levels):
        parent, nodes, code = level.children(nodes)
        prefixes = torch.cat([prefixes[parent], code[:, None]], dim=1)
        assert nodes.tolist() == list(range(level.num_nodes)), "nodes are numbered in order"
        assert torch.equal(level.child(trie.descend(prefixes, depth), prefixes[:, depth]), nodes)
        under = [sum(item[: depth + 1] == prefix for item in codes.tolist()) for prefix in prefixes.tolist()]
        assert trie.num_leaves(depth, nodes).tolist() == under
    assert prefixes.tolist() == sorted(codes.tolist())
    assert trie.leaf_items[nodes].tolist() == trie.lookup(prefixes).tolist()


@settings(max_examples=60, deadline=None)
@given(catalog=catalogs, earlier=st.floats(0, 1), grows=st.booleans())
def test_an_appended_trie_equals_one_built_at_once(catalog, earlier, grows):
    trie, codes, _ = build(**catalog)
    sizes = catalog["sizes"]
    count = min(len(codes), max(1, round(earlier * len(codes))))
    # The last codebook may grow with the new items.
    last = int(codes[:count, -1].max()) + 1 if grows and count < len(codes) else sizes[-1]
    with mock.patch.object(trie_unigrf, "DENSE_ENTRIES", catalog["dense_entries"]):
        appended = CatalogTrie(codes[:count], [*sizes[:-1], last])
        for part in torch.arange(count, len(codes)).tensor_split(2):
            if len(part):
                with mock.patch.object(trie_unigrf, "lexicographic_order", wraps=lexicographic_order) as order:
                    appended = CatalogTrie(codes, sizes, part, appended)
                assert [len(call.args[0]) for call in order.call_args_list] == [len(part)], "sort new items alone"
                with pytest.raises(ValueError, match=f"for both items {part[0]} and {len(codes)}"):
                    CatalogTrie(torch.cat([codes, codes[part[:1]]]), sizes, torch.tensor([len(codes)]), appended)
    assert appended.num_items == trie.num_items and torch.equal(appended.leaf_items, trie.leaf_items)
    for level, other in zip(appended.levels, trie.levels, strict=True):
        for name, value in vars(other).items():
            torch.testing.assert_close(getattr(level, name), value, rtol=0, atol=0, msg=name)


def test_a_level_may_have_more_codes_than_float32_counts():
    count = 2**24 + 8
    level = trie_unigrf.TrieLevel.build(count, torch.tensor([0, count]), torch.arange(count).int())
    last = torch.arange(count - 9, count)
    assert torch.equal(level.child(torch.zeros_like(last), last), last)


@settings(max_examples=60, deadline=None)
@given(catalog=catalogs, count=st.integers(1, 9), lists=st.sampled_from(["none", "allowed", "blocked", "both"]))
def test_the_best_children_exist_and_are_allowed(catalog, count, lists):
    trie, codes, generator = build(**catalog)
    size = len(codes)
    batch_size = 3
    drawn = torch.rand(2, batch_size, size, generator=generator)
    allowed = [(row < 0.6).nonzero()[:, 0].tolist() for row in drawn[0]] if lists in ("allowed", "both") else None
    blocked = [(row < 0.4).nonzero()[:, 0].tolist() for row in drawn[1]] if lists in ("blocked", "both") else None
    may = [
        set(range(size) if allowed is None else allowed[row]) - set([] if blocked is None else blocked[row])
        for row in range(batch_size)
    ]
    item_filter = None
    if lists != "none":
        if not all(may):
            with pytest.raises(ValueError, match="must leave each request an item of the catalog"):
                ItemFilter(trie, codes, allowed, blocked)
            return
        item_filter = ItemFilter(trie, codes, allowed, blocked)
    nodes = torch.zeros(batch_size, 1, dtype=torch.long)
    scores = torch.zeros(batch_size, 1)
    prefixes = [[[]] for _ in range(batch_size)]
    for level, num_codes in enumerate(catalog["sizes"]):
        log_probs = torch.randn(*nodes.shape, num_codes, generator=generator)
        children = trie.best_children(level, nodes, scores, log_probs, count, item_filter)
        new_prefixes = []
        for row in range(batch_size):
            alive = {tuple(codes[item][: level + 1].tolist()) for item in may[row]}
            expected = {
                (*prefix, code): float(scores[row, beam] + log_probs[row, beam, code])
                for beam, prefix in enumerate(prefixes[row])
                if scores[row, beam] > -torch.inf
                for code in range(num_codes)
                if (*prefix, code) in alive
            }
            best = sorted(expected, key=expected.get, reverse=True)[:count]
            real = int((children[0][row] > -torch.inf).sum())
            assert real == len(best) and torch.equal(
                children[0][row, :real], children[0][row].sort(descending=True)[0][:real]
            )
            rows = list(zip(*(column[row].tolist() for column in children), strict=True))
            new_prefixes.append([[*prefixes[row][parent], code] for _, parent, _, code in rows])
            assert [tuple(prefix) for prefix in new_prefixes[row][:real]] == best
            reached = trie.descend(torch.tensor(new_prefixes[row][:real]), level + 1)
            assert reached.tolist() == children[2][row, :real].tolist()
        assert ((children[2] >= 0) & (children[2] < trie.levels[level].num_nodes)).all(), (
            "valid nodes also in empty places"
        )
        (scores, _, nodes, _) = children
        prefixes = new_prefixes


def test_a_catalog_subset_keeps_the_item_indices():
    codes = random_codes(200, [6, 6, 6, 2], torch.Generator().manual_seed(0)).int()
    part = torch.tensor([7, 3, 150, 3, 199])
    trie = CatalogTrie(codes, [6, 6, 6, 2], part)
    assert trie.num_items == 4 and sorted(trie.leaf_items.tolist()) == [3, 7, 150, 199]
    assert torch.equal(trie.lookup(codes[part]), part) and (trie.lookup(codes) >= 0).sum() == 4
    with pytest.raises(ValueError, match="must hold one item or more"):
        CatalogTrie(codes, [6, 6, 6, 2], part[:0])


def test_beams_are_scored_in_float32_under_any_default_dtype():
    codes = random_codes(200, [6, 6, 6, 2], torch.Generator().manual_seed(0)).int()
    torch.set_default_dtype(torch.bfloat16)
    try:
        trie = CatalogTrie(codes, [6, 6, 6, 2])
    finally:
        torch.set_default_dtype(torch.float32)
    scores = trie.best_children(0, torch.zeros(1, 1).long(), torch.zeros(1, 1), torch.randn(1, 1, 6), 6)[0]
    assert scores.dtype == torch.float32 and torch.equal(trie.lookup(codes), torch.arange(200))


def test_codes_may_have_more_combinations_than_an_int64():
    sizes = [256] * 9
    codes = torch.randint(256, (50, 9), generator=torch.Generator().manual_seed(0)).int()
    codes = torch.cat([codes, codes])
    codes[50:, 8] = (codes[:50, 8] + 1) % 256  # neighbors that differ only in the last code
    trie = CatalogTrie(codes, sizes)
    assert trie.lookup(codes).tolist() == list(range(100))
    assert codes[trie.leaf_items.long()].tolist() == sorted(codes.tolist())

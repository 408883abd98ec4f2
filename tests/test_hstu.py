"""HSTU: it computes what its formula says, with and without times, and its cache holds all that later queries ask for."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import build_model, random_histories
from test_hub import NO_PROJECT
from transformers.cache_utils import DynamicCache

from modeling_unigrf import HSTUConfig, HSTUModel


def build(seed=0, **config):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 6,
        "num_attention_heads": 2,
        "num_time_buckets": 12,
        "max_position_embeddings": 20,
        **config,
    }
    model = HSTUModel(HSTUConfig(vocab_size=30, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model


def by_the_formula(model, tokens, times, next_times):
    """The block as the paper and its public code write it, one query and one key at a time."""
    config, length = model.config, len(tokens)
    x = model.embed_tokens(tokens) * math.sqrt(config.hidden_size) + model.embed_positions(torch.arange(length))

    def norm(v):
        return (v - v.mean()) / torch.sqrt(v.var(unbiased=False) + config.layer_norm_eps)

    for layer in model.layers:
        u, v, q, k = zip(
            *(torch.nn.functional.silu(layer.uvqk_proj.weight @ norm(row)).split(6) for row in x), strict=True
        )
        rows = []
        for i in range(length):
            heads = []
            for head in (slice(0, 3), slice(3, 6)):
                total = torch.zeros(3)
                for j in range(i + 1):
                    product = q[i][head] @ k[j][head]
                    product = product + layer.bias.positions.weight[j - i + config.max_position_embeddings - 1, 0]
                    if times is not None:
                        seconds = max(1, abs(next_times[i] - times[j]))
                        bucket = min(config.num_time_buckets, math.floor(math.log(seconds) / 0.301))
                        product = product + layer.bias.times.weight[bucket, 0]
                    total += torch.nn.functional.silu(product) / config.max_position_embeddings * v[j][head]
                heads.append(total)
            gated = u[i] * norm(torch.cat(heads))
            rows.append(x[i] + layer.out_proj.weight @ gated + layer.out_proj.bias)
        x = torch.stack(rows)
    return x


@pytest.mark.parametrize("with_times", [False, True])
@torch.no_grad()
def test_the_model_is_the_formula(with_times):
    model = build()
    tokens = torch.randint(30, (7,))
    times = [3, 3, 60, 4000, 4000, 90_000, 10_000_000] if with_times else None
    next_times = [3, 60, 4000, 4000, 90_000, 10_000_000, 10_000_000] if with_times else None
    found = model(tokens[None], timestamps=None if times is None else torch.tensor([times])).last_hidden_state[0]
    torch.testing.assert_close(found, by_the_formula(model, tokens, times, next_times), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cached_equals_uncached_with_times_and_unknown_times():
    model = build()
    tokens, times = torch.randint(30, (3, 9)), torch.randint(10**6, (3, 9)).cumsum(1)
    times[1, :4] = -1
    later = torch.cat([times[:, 1:], times[:, -1:] + 500], dim=1)
    whole = model(tokens, timestamps=times, next_timestamps=later).last_hidden_state
    cache = DynamicCache()
    parts = [
        model(
            tokens[:, part],
            past_key_values=cache,
            use_cache=True,
            timestamps=times[:, part],
            next_timestamps=later[:, part],
        ).last_hidden_state
        for part in (slice(0, 2), slice(2, 7), slice(7, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(tokens).last_hidden_state, whole), "times matter"
    unknown = model(tokens, timestamps=torch.full_like(times, -1)).last_hidden_state
    torch.testing.assert_close(unknown, model(tokens).last_hidden_state)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing():
    model = build()
    tokens = torch.randint(1, 30, (1, 5))
    alone = model(tokens).last_hidden_state
    left = model(
        torch.nn.functional.pad(tokens, (3, 0)),
        attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]]),
    ).last_hidden_state[:, 3:]
    right = model(
        torch.nn.functional.pad(tokens, (0, 3)), attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    ).last_hidden_state[:, :5]
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-4)


def test_more_positions_than_there_are_is_refused():
    with pytest.raises(ValueError, match="max_position_embeddings=20"):
        build()(torch.zeros(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of"):
        build()()


def test_a_saved_model_with_this_backbone_is_the_same(tmp_path):
    model = build_model("hstu")
    input_ids, mask, _ = random_histories(model, [3, 1])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.model.language_model, HSTUModel)
    best = loaded.recommend(input_ids, mask, num_beams=12)
    torch.testing.assert_close(best.scores, model.recommend(input_ids, mask, num_beams=12).scores)
    sampled = loaded.generate(input_ids, attention_mask=mask, num_beams=1, do_sample=True)
    assert sampled.shape == (2, input_ids.shape[1] + 4)


ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
best = model.recommend(torch.tensor(json.loads(sys.argv[1])), num_beams=12)
print(json.dumps([type(model.model.language_model).__module__.split(".")[0], best.item_indices.tolist()]))
"""


def test_the_folder_brings_the_code_of_its_backbone(tmp_path):
    model = build_model("hstu")
    input_ids, mask, _ = random_histories(model, [3, 1])
    model.save_pretrained(tmp_path / "saved")
    done = subprocess.run(
        [sys.executable, "-c", NO_PROJECT + ELSEWHERE, json.dumps(input_ids.tolist())],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module, items = json.loads(done.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    assert items == model.recommend(input_ids, mask, num_beams=12).item_indices.tolist()

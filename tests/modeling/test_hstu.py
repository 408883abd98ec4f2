"""HSTU: the backbone equals its formula, with and without times, and works with a cache."""

import datetime
import math

import pytest
import torch
from helpers import (
    STOCK_BEAM_SEARCH,
    build_model,
    forward_with_negatives,
    labeled_batch,
    random_histories,
)
from transformers.cache_utils import DynamicCache

from modeling_unigrf import HSTUConfig, HSTUModel, RecommendationPipeline
from tokenization import SemanticIdTokenizer


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
    """Compute the block as in the paper and its public code, one query and one key at a time."""
    config = model.config
    length = len(tokens)
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
    actual = model(tokens[None], timestamps=None if times is None else torch.tensor([times])).last_hidden_state[0]
    torch.testing.assert_close(actual, by_the_formula(model, tokens, times, next_times), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cached_equals_uncached_with_times_and_unknown_times():
    model = build()
    tokens = torch.randint(30, (3, 9))
    times = torch.randint(10**6, (3, 9)).cumsum(1)
    times[1, :4] = -1
    later = torch.cat([times[:, 1:], times[:, -1:] + 500], dim=1)
    whole = model(tokens, timestamps=times, target_timestamps=later).last_hidden_state
    cache = DynamicCache()
    parts = [
        model(
            tokens[:, part],
            cache=cache,
            use_cache=True,
            timestamps=times[:, part],
            target_timestamps=later[:, part],
        ).last_hidden_state
        for part in (slice(0, 2), slice(2, 7), slice(7, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(tokens).last_hidden_state, whole), "times matter"
    times[:, 7:] = -1  # the last tokens, whose targets have known times
    arguments = {"timestamps": times, "target_timestamps": later}
    whole = model(tokens, **arguments).last_hidden_state
    cache = DynamicCache()
    for part in (slice(0, 7), slice(7, 9)):
        columns = {name: column[:, part] for name, column in arguments.items()}
        last = model(tokens[:, part], cache=cache, use_cache=True, **columns).last_hidden_state
    torch.testing.assert_close(last, whole[:, 7:], atol=1e-5, rtol=1e-4)
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


def test_only_a_dynamic_cache_is_accepted():
    model = build_model("hstu")
    input_ids, mask, _ = random_histories(model, [3, 2])
    expected = model.recommend(input_ids, mask)
    actual = model.recommend(input_ids, mask, cache=DynamicCache(config=model.config))
    torch.testing.assert_close(actual.scores, expected.scores)
    sequences = model.generate(input_ids, attention_mask=mask, num_beams=4)
    assert torch.equal(
        model.generate(input_ids, attention_mask=mask, num_beams=4, cache_implementation="dynamic"), sequences
    )
    with pytest.raises(ValueError, match="`cache` must be a `DynamicCache"):
        model.generate(input_ids, attention_mask=mask, num_beams=4, cache_implementation="static")


def test_output_flags_work_as_arguments_and_in_the_config():
    model = build()
    tokens = torch.randint(1, 30, (1, 5))
    asked = model(tokens, output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = model.config.output_attentions = True
    by_config = model(tokens)
    neither = model(tokens, output_hidden_states=False, output_attentions=False)
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(by_config[name], asked[name])
        assert name not in neither


def test_the_old_name_of_the_cache_still_reaches_it():
    cache = DynamicCache()
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        build()(torch.randint(1, 30, (1, 5)), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_inputs_longer_than_the_positions_are_rejected():
    with pytest.raises(ValueError, match="max_position_embeddings=20"):
        build()(torch.zeros(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
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


def timed(model, lengths):
    """Draw histories with the times of their tokens, some unknown, and query times."""
    input_ids, mask, items = random_histories(model, lengths)
    generator = torch.Generator().manual_seed(1)
    step = model.config.num_levels + 1
    times = torch.full_like(input_ids, -1)
    for row, length in enumerate(lengths):
        seconds = torch.randint(1, 10**5, (length,), generator=generator).cumsum(0)
        seconds[0] = -1 if row == 0 else seconds[0]
        times[row, -step * length - 1 :] = torch.cat([seconds[:1], seconds.repeat_interleave(step)])
    return input_ids, mask, items, times, times[:, -1] + torch.randint(1, 10**6, (len(lengths),), generator=generator)


def states_alone(model, ids, times, request, item):
    """Run the backbone on one history and an item behind it."""
    tokens = torch.cat([ids, model.layout.item_tokens(model.catalog.item_codes[item].long())])
    times = torch.cat([times, request.expand(model.config.num_levels + 1)])
    return model.model(tokens[None], timestamps=times[None, :-1], target_timestamps=times[None, 1:]).last_hidden_state[
        0
    ]


@torch.no_grad()
def test_search_and_rank_read_times_as_a_plain_forward_does():
    model = build_model("hstu")
    input_ids, mask, _, times, requests = timed(model, [4, 2])
    timed_inputs = {"timestamps": times, "query_time": requests}
    best = model.recommend(input_ids, mask, num_beams=30, num_return_sequences=30, ranking_weight=0.5, **timed_inputs)
    candidates = torch.arange(30).expand(2, -1)
    ranked = model.rank(input_ids, mask, candidates, candidates_per_pack=7, **timed_inputs)
    cache = DynamicCache()
    later = torch.cat([times[:, 1:], requests[:, None]], dim=1)
    model.model(input_ids, mask, cache=cache, use_cache=True, timestamps=times, target_timestamps=later)
    again = model.rank(input_ids, mask, candidates, cache=cache, **timed_inputs)
    for row in range(2):
        real = mask[row].bool()
        length = int(real.sum())
        for item in range(30):
            states = states_alone(model, input_ids[row][real], times[row][real], requests[row], item)
            codes = model.catalog.item_codes[item].long()
            log_prob = sum(
                model.scorer.code_logits(states[length - 1 + level], model.layout.level_slices[level]).log_softmax(0)[
                    code
                ]
                for level, code in enumerate(codes)
            )
            logits = model.ranking_head(
                states[-1], states[length - 1], model.scorer.representations(torch.tensor(item))
            )
            place = int((best.item_indices[row] == item).nonzero())
            torch.testing.assert_close(best.generation_scores[row, place], log_prob, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(ranked[row, item], logits, atol=2e-5, rtol=1e-4)
            score = torch.nn.functional.logsigmoid(logits[0])
            torch.testing.assert_close(best.ranking_scores[row, place], score, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(again, ranked, atol=2e-5, rtol=1e-4)
    beams = {"num_beams": 30, "num_return_sequences": 30, "output_scores": True, "return_dict_in_generate": True}
    generated = model.generate(input_ids, attention_mask=mask, **beams, **timed_inputs)
    torch.testing.assert_close(generated.sequences_scores.view(2, 30), best.generation_scores.sort(descending=True)[0])
    beams |= STOCK_BEAM_SEARCH
    by_transformers = model.generate(input_ids, attention_mask=mask, **beams, **timed_inputs)
    torch.testing.assert_close(by_transformers.sequences_scores, generated.sequences_scores, atol=2e-5, rtol=1e-4)


def test_packed_negatives_have_the_time_of_the_true_item():
    model = build_model("hstu", negatives_per_item=2.0)
    input_ids, mask, _, times, _ = timed(model, [4, 2])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    model.train()(**batch, timestamps=times)  # stores the sampling bias
    model.eval()
    with torch.no_grad():
        out, negatives = forward_with_negatives(model, {**batch, "timestamps": times})
        model.config.training_config.negatives_per_item = 0.0
        plain = model(**batch, timestamps=times)
        without_times = model(**batch)
    torch.testing.assert_close(out.generation_loss, plain.generation_loss, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(plain.generation_loss, without_times.generation_loss)
    model.config.training_config.negatives_per_item = 2.0
    expected = []
    for row, end, item in negatives.ranked:
        part = mask[row].bool() & (torch.arange(input_ids.shape[1]) <= end)
        request = {"timestamps": times[row][part][None], "query_time": times[row, end + 1][None]}
        expected.append(model.rank(input_ids[row][part][None], candidates=torch.tensor([[item]]), **request)[0, 0])
    prior = torch.tensor([model.config.next_logit_bias, 0.0, 0.0])
    assert model.config.next_logit_bias == pytest.approx(math.log(29 / 2))
    torch.testing.assert_close(negatives.logits - prior, torch.stack(expected), atol=2e-5, rtol=1e-4)


def test_the_pipeline_takes_item_times_and_a_query_time():
    model = build_model("hstu")
    names = [f"i{item}" for item in range(30)]
    tokenizer = SemanticIdTokenizer.from_codes(
        names, model.catalog.item_codes.numpy(), model.config.codebook_sizes, model.config.behaviors
    )
    recommender = RecommendationPipeline(model=model, tokenizer=tokenizer)
    history = {"items": ["i3", "i4", "i5"], "behaviors": ["like", "dislike", "like"], "timestamps": [100, None, 9000]}
    reader = build_model("hstu", num_retrieved_items=2)
    reader.set_catalog(model.catalog.item_codes, model.catalog.content_embeddings)
    reading_pipeline = RecommendationPipeline(model=reader, tokenizer=tokenizer)
    for times in (history["timestamps"], [100, 200, 9000]):
        prepared = reading_pipeline.preprocess({**history, "timestamps": times})
        assert prepared["long_timestamps"].tolist() == [[0, *(0 if time is None else time + 1 for time in times)]]
        assert reading_pipeline({**history, "timestamps": times}, num_beams=5, num_return_sequences=5)
    when = datetime.datetime.fromtimestamp(500_000, datetime.UTC)
    recommended = recommender({**history, "query_time": when}, num_beams=12, exclude_history=False)
    encoded = tokenizer.encode_history(
        history["items"], history["behaviors"], timestamps=history["timestamps"], return_tensors="pt"
    )
    token_times = [value for time in (100, -1, 9000) for value in [time] * 5]
    assert encoded["timestamps"].tolist() == [[100, *token_times]]
    best = model.recommend(**encoded, query_time=torch.tensor([500_000]), num_beams=12)
    assert [item["score"] for item in recommended] == pytest.approx(best.scores[0].tolist(), abs=1e-5)
    at_once = model.recommend(**encoded, num_beams=12)
    assert not torch.allclose(at_once.scores, best.scores)
    requests = [{**history, "query_time": 500_000}, history, {**history, "timestamps": None}]
    together = recommender(requests, batch_size=3, num_beams=12)
    for single, several in zip((recommender(request, num_beams=12) for request in requests), together, strict=True):
        assert [item["item_id"] for item in single] == [item["item_id"] for item in several]
        assert [item["score"] for item in single] == pytest.approx([item["score"] for item in several], abs=1e-5)
    batch = tokenizer.encode_history([["i3"], ["i4", "i5"]], [["like"], ["like", "like"]], timestamps=[[1], [2, 3]])
    assert batch["timestamps"] == [[-1] * 5 + [1] * 6, [2] * 6 + [3] * 5]
    with pytest.raises(ValueError, match="`timestamps` must have as many values as items"):
        tokenizer.encode_history(["i3"], ["like"], timestamps=[1, 2])
    for wrong in (float("inf"), 1_700_000_000_000):
        with pytest.raises(ValueError, match="`timestamps` must be seconds since 1970, datetimes"):
            recommender({**history, "query_time": wrong})


def test_timestamps_that_do_not_fit_are_rejected():
    model = build_model("llama")
    input_ids, mask, _, times, _ = timed(model, [3, 1])
    with pytest.raises(ValueError, match="`timestamps` must be None for the backbone 'llama'"):
        model.recommend(input_ids, mask, timestamps=times)
    model = build_model("hstu")
    input_ids, mask, _, times, requests = timed(model, [3, 1])
    with pytest.raises(ValueError, match=r"`timestamps` must be integers of shape .*, got"):
        model.recommend(input_ids, mask, timestamps=times[:, 1:])
    with pytest.raises(ValueError, match=r"`timestamps` must be integers of shape .*, got none"):
        model.rank(input_ids, mask, torch.tensor([[1], [2]]), query_time=requests)
    with pytest.raises(ValueError, match=r"`query_time` must be integers of shape \(2,\), got .* Pass one time a row"):
        model.generate(input_ids, attention_mask=mask, num_beams=3, timestamps=times, query_time=requests[:1])


def test_a_cache_continues_at_a_later_query_time():
    model = build_model("hstu")
    input_ids, mask, _, times, requests = timed(model, [4, 2])
    part = {"input_ids": input_ids[:, :-5], "attention_mask": mask[:, :-5], "timestamps": times[:, :-5]}
    later = {"input_ids": input_ids, "attention_mask": mask, "timestamps": times, "query_time": requests + 10**5}
    for first, then in ((part, later), (later, {**later, "query_time": requests + 10**7})):
        expected = model.recommend(**then)
        cache = DynamicCache()
        model.recommend(**first, cache=cache)
        again = model.recommend(**then, cache=cache)
        assert torch.equal(again.item_indices, expected.item_indices)
        torch.testing.assert_close(again.scores, expected.scores, atol=2e-5, rtol=1e-4)
        assert cache.get_seq_length() == input_ids.shape[1]
    candidates = torch.tensor([[1, 2], [3, 4]])
    ranked = model.rank(candidates=candidates, cache=cache, **later)
    torch.testing.assert_close(ranked, model.rank(candidates=candidates, **later), atol=2e-5, rtol=1e-4)


def gradients(model, batch, is_checkpointed):
    """Compute the loss and all gradients of a training step, with or without gradient checkpointing."""
    model.gradient_checkpointing_enable() if is_checkpointed else model.gradient_checkpointing_disable()
    model.train().zero_grad()
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss} | {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_checkpointed_gradients_equal_plain_gradients():
    model = build_model("hstu", negatives_per_item=1.0, dense_loss_weight=1.0)
    layer = model.model.language_model.layers[0]
    layer.dropout.p = 0.3
    batch, _ = labeled_batch(model, [4, 2])
    batch["timestamps"] = torch.arange(batch["input_ids"].shape[1]).expand(2, -1) * 100
    calls = []
    layer.uvqk_proj.register_forward_hook(lambda *_: calls.append(1))
    plain = gradients(model, batch, is_checkpointed=False)
    checkpointed = gradients(model, batch, is_checkpointed=True)
    assert len(calls) == 3, "the backward runs the layer again"
    torch.testing.assert_close(checkpointed, plain)


def test_returned_attentions_and_states_have_gradients():
    model = build()
    output = model(torch.randint(30, (2, 7)), output_attentions=True, output_hidden_states=True)
    inner = [*output.attentions, *output.hidden_states]
    gradients_of_inner = torch.autograd.grad(output.last_hidden_state.sum(), inner)
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of_inner)

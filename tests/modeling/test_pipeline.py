"""The recommendation pipeline: requests in, item ids with titles and scores out."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import HISTORY, SHORT_HISTORY, approximately, build_model, run_elsewhere, short_id
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from recipes.evaluation.inference import load_checkpoint
from recipes.recommend import RecommendSettings, recommend_dataset
from tokenization import SemanticIdTokenizer


def test_a_recommendation_has_item_ids_titles_and_scores(recommender):
    recommended = recommender(HISTORY)
    assert len(recommended) == 10 and recommended == recommender(dict(HISTORY)) == recommender([HISTORY])[0]
    titles = dict(zip(recommender.tokenizer.item_ids, recommender.tokenizer.titles, strict=True))
    for row in recommended:
        assert titles[row["item_id"]] == row["title"]
        assert row["score"] == pytest.approx(row["generation_score"] + row["ranking_score"], abs=1e-5)
    assert [row["score"] for row in recommended] == sorted((row["score"] for row in recommended), reverse=True)
    assert {row["item_id"] for row in recommended}.isdisjoint(HISTORY["items"])


def test_with_one_behavior_a_history_is_a_plain_list(recommender):
    codes = recommender.tokenizer.item_codes
    tokenizer = SemanticIdTokenizer.from_codes(range(60), codes, recommender.tokenizer.codebook_sizes, ["view"])
    text_config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = UniGRFForCausalLM(UniGRFConfig(**tokenizer.config_fields(), text_config=text_config)).eval()
    model.set_catalog(torch.from_numpy(codes.copy()))
    plain = RecommendationPipeline(model=model, tokenizer=tokenizer)
    recommended = plain([7, 3])
    assert recommended == plain(("7", "3")) == plain({"items": [7, 3]}) == plain([[7, 3], [5]])[0]
    assert all(row["title"] is None and int(row["item_id"]) in range(60) for row in recommended)
    assert plain([np.array([7, 3]), torch.tensor([5])]) == plain([[7, 3], [5]]) == [recommended, plain([5])]
    assert plain(torch.tensor([7, 3])) == plain(list(torch.tensor([7, 3]))) == recommended
    with pytest.raises(ValueError, match="A request must hold one history, got 2"):
        plain({"items": [[7, 3], [5]]}, unknown="skip")


def test_a_batch_equals_single_requests_also_with_item_lists(recommender):
    requests = [
        HISTORY,
        SHORT_HISTORY,
        {**HISTORY, "allowed_items": ["film 7", "film 9", "film 3"]},
        {**SHORT_HISTORY, "blocked_items": [recommender(SHORT_HISTORY)[0]["item_id"]]},
        {**SHORT_HISTORY, "allowed_items": ["film 8"], "blocked_items": ["film 1"]},
    ]
    alone = [recommender(request) for request in requests]
    for batch_size in (2, 3, 5):
        together = recommender(requests, batch_size=batch_size)
        assert [approximately(row) for row in together] == alone
    streamed = recommender((request for request in requests), batch_size=2)  # lazily
    assert [approximately(row) for row in streamed] == alone
    assert [row["item_id"] for row in alone[2]] in (["film 7", "film 9"], ["film 9", "film 7"])
    assert alone[3][0]["item_id"] == alone[1][1]["item_id"]
    assert [row["item_id"] for row in alone[4]] == ["film 8"]


def test_arrays_are_accepted_like_lists(recommender):
    histories = [
        {"items": np.array(history["items"]), "behaviors": np.array(history["behaviors"])}
        for history in (HISTORY, SHORT_HISTORY)
    ]
    assert recommender(histories) == recommender([HISTORY, SHORT_HISTORY])
    for name in ("blocked_items", "allowed_items"):
        for items in (["film 9"], ["film 7", "film 8"]):
            recommended = recommender({**SHORT_HISTORY, name: np.array(items)})
            assert recommended == recommender({**SHORT_HISTORY, name: items})


def test_a_checkpoint_serves_by_its_own_defaults(recommender, monkeypatch):
    """`recipes.evaluate` writes the settings that it chose into the checkpoint."""
    generation_config = recommender.model.generation_config
    everything = {"num_beams": 60, "num_return_sequences": 60}
    chosen = {"exclude_history": False, "ranking_target": "like", "ranking_weight": 0.5}
    expected = recommender(HISTORY, **chosen, **everything)
    assert expected != recommender(HISTORY, **everything)
    for name, value in (chosen | everything).items():
        monkeypatch.setattr(generation_config, name, value, raising=False)
    assert recommender(HISTORY) == expected
    monkeypatch.setattr(generation_config, "num_return_sequences", None)
    monkeypatch.setattr(generation_config, "rerank_top_k", 4)
    assert len(recommender(HISTORY)) == 4, "the default length is at most rerank_top_k"


def test_history_items_are_recommended_only_on_request(recommender):
    everything = {"num_beams": 60, "num_return_sequences": 60}
    assert len(recommender(HISTORY, **everything)) == 57
    assert len(recommender(HISTORY, exclude_history=False, **everything)) == 60
    # max_items limits what is read, not what is excluded.
    assert len(recommender(HISTORY, max_items=1, **everything)) == 57


def test_parameters_do_what_recommend_does_with_them(recommender):
    by_generation = recommender(HISTORY, ranking_weight=0.0, num_return_sequences=3)
    assert [row["score"] for row in by_generation] == [row["generation_score"] for row in by_generation]
    assert len(by_generation) == 3
    liked, shown = (recommender(HISTORY, ranking_target=target)[0] for target in ("like", "next"))
    assert liked["ranking_score"] != shown["ranking_score"]
    assert recommender(HISTORY, max_items=1) == approximately(
        recommender({"items": ["film 3"], "behaviors": ["like"], "blocked_items": ["007", "film 12"]})
    )


def test_a_part_of_the_catalog_is_swapped_in_for_one_call(recommender):
    films = ["film 7", "film 8", "film 9"]
    part = recommender.model.catalog.subset(recommender.tokenizer.item_indices(films))
    assert sorted(row["item_id"] for row in recommender(HISTORY, catalog=part)) == films
    assert len(recommender(HISTORY)) == 10


def test_a_too_long_history_keeps_its_most_recent_items(recommender, monkeypatch):
    # 1 + 15 * 4 codes and behaviors + 3 codes of the next item = 64 positions.
    assert recommender.model.config.max_history_items == 15
    long = {"items": HISTORY["items"] * 10, "behaviors": HISTORY["behaviors"] * 10}
    assert recommender(long) == recommender(long, max_items=15)
    generation_config = recommender.model.generation_config
    monkeypatch.setattr(generation_config, "max_items", 4, raising=False)
    assert recommender(long) == recommender(long, max_items=4) != recommender(long, max_items=15)
    with pytest.raises(ValueError, match=r"`max_items` must be at most the 15 items .* got 16"):
        recommender(long, max_items=16)
    monkeypatch.setattr(generation_config, "max_items", 16)
    with pytest.raises(ValueError, match=r"`max_items` must be at most the 15 items .* got 16"):
        recommender(long)
    monkeypatch.setattr(generation_config, "max_items", None)
    for name in ("max_items", "max_long_items"):
        with pytest.raises(ValueError, match=f"histories that are cut already, got .*{name}"):
            recommender.model.recommend(torch.tensor([[1]]), **{name: 4})
    encoded = recommender.tokenizer.encode_history(**long, max_items=16, return_tensors="pt")
    with pytest.raises(ValueError, match="must fit into the 64 positions of the backbone, got 68 tokens"):
        recommender.model.recommend(**encoded)


def test_sub_histories_are_retrieved_from_the_whole_history(recommender):
    config = UniGRFConfig(**{**recommender.model.config.to_dict(), "num_retrieved_items": 3})
    model = UniGRFForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.catalog.load_state_dict(recommender.model.catalog.state_dict())
    pipe = RecommendationPipeline(model=model.eval(), tokenizer=recommender.tokenizer)
    tokenizer = recommender.tokenizer
    items = [f"film {1 + 7 * i % 29}" for i in range(40)]
    behaviors = ["like" if i % 3 else "dislike" for i in range(40)]
    requests = [
        {"items": items, "behaviors": behaviors},
        {"items": ["film 3", "no such film", "film 5"], "behaviors": ["like", "like", "dislike"]},
    ]
    options = {"max_items": 4, "num_beams": 6, "num_return_sequences": 6, "exclude_history": False}
    together = pipe(requests, batch_size=2, unknown="skip", **options)
    assert approximately(together[0]) == pipe(requests[0], **options) and approximately(together[1]) == pipe(
        requests[1], unknown="skip", **options
    )
    assert pipe(requests[0], **options, max_long_items=5) == pipe(
        {"items": items[-5:], "behaviors": behaviors[-5:]}, **options
    )
    with pytest.raises(ValueError, match="`max_long_items` needs a model that reads a sub-history"):
        recommender(HISTORY, max_long_items=5)
    for request, known, recommended in zip(requests, (range(40), (0, 2)), together, strict=True):
        names = [request["behaviors"][place] for place in known]
        ids = [request["items"][place] for place in known]
        best = model.recommend(
            **tokenizer.encode_history(ids, names, max_items=4, return_tensors="pt"),
            long_history={
                "items": torch.tensor(tokenizer.item_indices(ids))[None],
                "behaviors": torch.tensor([tokenizer.behaviors.index(name) for name in names])[None],
            },
            num_beams=6,
            num_return_sequences=6,
            exclude_history=False,
        )
        assert [tokenizer.item_ids[item] for item in best.item_indices[0]] == [row["item_id"] for row in recommended]
        torch.testing.assert_close(
            torch.tensor([row["score"] for row in recommended]), best.scores[0], atol=2e-5, rtol=1e-4
        )


def test_unknown_items_are_an_error_or_skipped(recommender):
    strange = {"items": ["film 5", "film 99"], "behaviors": ["dislike", "like"], "blocked_items": ["film 98"]}
    with pytest.raises(ValueError, match="film 99"):
        recommender(strange)
    with pytest.raises(ValueError, match="film 98"):
        recommender({**SHORT_HISTORY, "blocked_items": ["film 98"]})
    assert recommender(strange, unknown="skip") == recommender(SHORT_HISTORY)
    only = {**SHORT_HISTORY, "allowed_items": ["film 98", "film 7"]}
    assert [row["item_id"] for row in recommender(only, unknown="skip")] == ["film 7"]


@pytest.mark.parametrize(
    ("request_", "parameters", "message"),
    [
        ({**SHORT_HISTORY, "allowed_items": []}, {}, "`allowed_items` must hold an item that the item map has"),
        (
            {**SHORT_HISTORY, "allowed_items": ["film 98"]},
            {"unknown": "skip"},
            "`allowed_items` must hold an item that the item map has",
        ),
        ({**SHORT_HISTORY, "allowed_items": ["film 5"]}, {}, "must leave each request an item of the catalog"),
        ({"items": [], "behaviors": []}, {}, "at least one item"),
        ([], {}, "`inputs` must be a history or a list of histories, got an empty list"),
        ([[]], {}, "at least one item"),
        ({"items": ["film 98"], "behaviors": ["like"]}, {"unknown": "skip"}, "all of its item IDs are unknown"),
        ({"items": ["film 5"]}, {}, "`behaviors` must have a behavior for each item.* got None"),
        ({"items": ["film 5"], "behaviors": ["bought"]}, {}, "bought"),
        ({**SHORT_HISTORY, "blocked": ["film 1"]}, {}, "keys among .*, got .*'blocked'"),
        ({"behaviors": ["like"]}, {}, "A history must have `items`"),
        ({"items": "film 5", "behaviors": ["like"]}, {}, "got the string 'film 5'"),
        ({**SHORT_HISTORY, "allowed_items": "film 7"}, {}, "got the string 'film 7'"),
        ("film 5", {}, "got the string 'film 5'"),
        (SHORT_HISTORY, {"num_beam": 20}, r"must be among .* got \['num_beam'\]"),
        (SHORT_HISTORY, {"unknown": "drop"}, "'error' or 'skip'"),
        (SHORT_HISTORY, {"ranking_target": "love"}, "`ranking_target` must be among .* got 'love'"),
    ],
    ids=short_id,
)
def test_invalid_requests_are_rejected(recommender, request_, parameters, message):
    with pytest.raises(ValueError, match=message):
        recommender(request_, **parameters)


def small_parts(order=range(40), behaviors=("dislike", "like")):
    """Build a model over 40 atomic IDs, and a tokenizer with the items in some order."""
    ids = [f"i{item}" for item in order]
    model = build_model(codebook_sizes=(40,), num_items=40, embeddings=False)
    model.set_catalog(torch.arange(40)[:, None])
    return model, SemanticIdTokenizer.from_codes(ids, np.array(order)[:, None], [40], list(behaviors))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"order": range(39, -1, -1)}, r"codes \[0\] for item 0, got \[39\] for the item 'i39'"),
        ({"order": range(39)}, "num_items=40, got num_items=39"),
        ({"behaviors": ("like", "dislike")}, "behaviors="),
        ({"behaviors": ("dislike", "like", "love")}, "behaviors="),
    ],
)
def test_a_tokenizer_of_another_model_is_rejected(other, message):
    model, tokenizer = small_parts()
    RecommendationPipeline(model=model, tokenizer=tokenizer)({"items": ["i3"], "behaviors": ["like"]})
    with pytest.raises(ValueError, match=f"`tokenizer` must have the .*{message}"):
        RecommendationPipeline(model=model, tokenizer=small_parts(**other)[1])


def parts_of_one_order(is_atomic=True, order=range(12)):
    """Build a model from a tokenizer with the items in some order, and the tokenizer."""
    codes = np.arange(12)[:, None] if is_atomic else np.stack(np.unravel_index(np.arange(12)[::-1], (3, 4, 2)), 1)
    sizes = [12] if is_atomic else [3, 4, 2]
    tokenizer = SemanticIdTokenizer.from_codes([f"i{item}" for item in order], codes, sizes, ["view"])
    text_config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = UniGRFForCausalLM(UniGRFConfig(**tokenizer.config_fields(), text_config=text_config)).eval()
    model.set_catalog(torch.tensor(tokenizer.item_codes))
    return model, tokenizer


@pytest.mark.parametrize("is_atomic", [True, False])
def test_ids_in_another_order_are_rejected_everywhere(is_atomic, tmp_path):
    model, tokenizer = parts_of_one_order(is_atomic)
    assert RecommendationPipeline(model=model, tokenizer=tokenizer)(["i3"], num_return_sequences=2)
    for order in (range(11, -1, -1), [1, 0, *range(2, 12)], range(1, 13)):
        other = parts_of_one_order(is_atomic, order)[1]
        model.save_pretrained(tmp_path)
        other.save_pretrained(tmp_path)
        calls = [
            lambda: RecommendationPipeline(model=model, tokenizer=other),  # noqa: B023
            lambda: pipeline("recommendation", model=str(tmp_path), trust_remote_code=True),
            lambda: load_checkpoint(tmp_path),
            lambda: recommend_dataset(model, other, datasets.Dataset.from_dict({}), tmp_path, RecommendSettings()),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(ValueError, match="`tokenizer` must have the ids of the model's first 12 items"):
                call()


def test_a_fingerprint_follows_the_items_of_the_model(tmp_path):
    model, tokenizer = parts_of_one_order()
    other = parts_of_one_order(order=range(11, -1, -1))[1]

    # New items keep the ids of the first.
    model.add_items(torch.tensor([[12]]))
    tokenizer.add_items(["new"], np.zeros((1, 2)))
    other.add_items(["new"], np.zeros((1, 2)))
    RecommendationPipeline(model=model, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert RecommendationPipeline(model=model, tokenizer=tokenizer)(["new"])
    loaded = UniGRFForCausalLM.from_pretrained(tmp_path)
    RecommendationPipeline(model=loaded, tokenizer=SemanticIdTokenizer.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="first 12 items"):
        RecommendationPipeline(model=loaded, tokenizer=other)

    # Another catalog, and a checkpoint without the field, have no known ids.
    for again in (model, loaded):
        again.set_catalog(torch.tensor(other.item_codes))
        assert again.config.item_ids_fingerprint is None
        RecommendationPipeline(model=again, tokenizer=other)
    model.config.item_ids_fingerprint = other.item_ids_fingerprint()
    with pytest.raises(ValueError, match="first 13 items"):
        RecommendationPipeline(model=model, tokenizer=tokenizer)


def test_items_that_one_part_lacks_are_an_error():
    request = {"items": ["i3"], "behaviors": ["like"]}
    for adds_to_model in (False, True):
        model, tokenizer = small_parts()
        recommender = RecommendationPipeline(model=model, tokenizer=tokenizer)
        recommender(request)
        if adds_to_model:
            model.add_items(torch.tensor([[40]]))
        else:
            codes = tokenizer.add_items(["new"], np.zeros((1, 2)))
        with pytest.raises(ValueError, match="`tokenizer` must have the model's num_items=4"):
            recommender(request)
        if adds_to_model:
            tokenizer.add_items(["new"], np.zeros((1, 2)))
        else:
            model.add_items(codes)
        assert recommender(request)
        model.catalog.item_codes[[0, 1]] = model.catalog.item_codes[[1, 0]]
        with pytest.raises(ValueError, match=r"codes .* for item 0"):
            recommender(request)


class Requests(torch.utils.data.Dataset):
    def __init__(self, requests):
        self.requests = requests

    def __len__(self):
        return len(self.requests)

    def __getitem__(self, row):
        return self.requests[row]


@pytest.mark.parametrize("form", [list, tuple, iter, Requests], ids=lambda form: form.__name__)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"items": [], "behaviors": []}, "Request 2: .*at least one item"),
        ({"items": ["film 99"], "behaviors": ["like"]}, "Request 2: .*film 99"),
        ({"items": ["film 5"], "behaviors": ["bought"]}, "Request 2: .*bought"),
        ({"items": 5, "behaviors": ["like"]}, "Request 2: `items` must be a list of item ids, got 5"),
        ({**SHORT_HISTORY, "blocked_items": 7}, "Request 2: `blocked_items` must be a list of item ids, got 7"),
        ({**SHORT_HISTORY, "title": "x"}, "Request 2: A history must have"),
        (None, "Request 2: `items` must be a list of item ids, got None"),
    ],
    ids=short_id,
)
def test_an_error_names_its_request(recommender, form, batch_size, request_, message):
    requests = [SHORT_HISTORY, HISTORY, request_, SHORT_HISTORY]
    requests = (request for request in requests) if form is iter else form(requests)
    with pytest.raises(ValueError, match=message):
        list(recommender(requests, batch_size=batch_size))


EVERYTHING = ["007", *(f"film {i}" for i in range(1, 60))]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("request_", "unknown"),
    [
        ({"items": EVERYTHING, "behaviors": ["like"] * 60}, "error"),
        ({**SHORT_HISTORY, "allowed_items": ["film 5"]}, "error"),
        ({**SHORT_HISTORY, "blocked_items": EVERYTHING}, "error"),
        ({"items": ["film 99"], "behaviors": ["like"]}, "skip"),
        ({"items": [], "behaviors": []}, "skip"),
        ({**SHORT_HISTORY, "allowed_items": ["film 99"]}, "skip"),
    ],
    ids=["history", "allowed", "blocked", "unknown", "empty", "unknown allowed"],
)
def test_a_request_without_an_item_gets_an_empty_list(recommender, request_, unknown, batch_size):
    lists = recommender([request_, HISTORY, request_, SHORT_HISTORY], batch_size=batch_size, unknown=unknown)
    expected = [recommender(HISTORY), recommender(SHORT_HISTORY)]
    assert lists[::2] == [[], []] and lists[1::2] == [approximately(row) for row in expected]
    assert recommender([request_] * 2, batch_size=batch_size, unknown=unknown) == [[], []]


def test_constructor_parameters_are_checked_defaults(recommender):
    with pytest.raises(ValueError, match=r"Parameters must be among .* got \['exclude'\]"):
        RecommendationPipeline(model=recommender.model, tokenizer=recommender.tokenizer, exclude=True)
    three = RecommendationPipeline(model=recommender.model, tokenizer=recommender.tokenizer, num_return_sequences=3)
    assert three(HISTORY) == recommender(HISTORY)[:3] and len(three(HISTORY, num_return_sequences=4)) == 4


def write_folders(recommender, root: Path):
    """Save a model and its tokenizer in every way, each into a folder below `root`."""
    # Negatives would store a sampling bias.
    config = {**recommender.model.config.to_dict(), "training_config": {"negatives_per_item": 0.0}}
    model = UniGRFForCausalLM(UniGRFConfig(**config))
    model.load_state_dict(recommender.model.state_dict())
    tokenizer = recommender.tokenizer
    RecommendationPipeline(model=model, tokenizer=tokenizer).save_pretrained(root / "pipeline")
    model.save_pretrained(root / "parts")
    tokenizer.save_pretrained(root / "parts")
    tokenizer.save_pretrained(root / "parts reversed")
    model.save_pretrained(root / "parts reversed")
    # A learning rate of 0 leaves the weights as they are.
    arguments = TrainingArguments(str(root), max_steps=1, learning_rate=0.0, use_cpu=True, report_to="none")
    ids = tokenizer.encode_history(HISTORY["items"], HISTORY["behaviors"])["input_ids"]
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}], processing_class=tokenizer)
    trainer.train()
    trainer.save_model(root / "trainer")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(root / "merged")
    tokenizer.save_pretrained(root / "merged")
    return ["pipeline", "parts", "parts reversed", "checkpoint-1", "trainer", "merged"]


LOAD_AND_SAVE = """
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

results = []
def recommend(folder):
    recommender = pipeline("recommendation", model=folder, trust_remote_code=True)
    assert type(recommender).__module__.startswith("transformers_modules.")
    results.append(recommender(json.loads(sys.argv[1])))
    return recommender

for name in json.loads(sys.argv[2]):
    recommender = recommend(name)
parts = [auto.from_pretrained(name, trust_remote_code=True) for auto in (AutoModelForCausalLM, AutoTokenizer)]
for folder, (model, tokenizer) in {"again": parts, "third": (recommender.model, recommender.tokenizer)}.items():
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recommend(folder)
print(json.dumps(results))
"""


def test_whichever_object_saves_the_folder_is_whole(recommender, tmp_path):
    names = write_folders(recommender, tmp_path)
    *_, last = run_elsewhere(LOAD_AND_SAVE, json.dumps(HISTORY), json.dumps(names), folder=tmp_path)
    results = json.loads(last)
    assert len(results) == len(names) + 2
    expected = approximately(recommender(HISTORY))
    assert all(result == expected for result in results)
    files = {path.name for path in (tmp_path / "pipeline").iterdir()}
    for name in (*names, "again", "third"):
        assert files <= {path.name for path in (tmp_path / name).iterdir()}, name


LOAD_IN_TURN = """
from transformers import pipeline

for name in json.loads(sys.argv[1]):
    recommender = pipeline("recommendation", model=f"{name}/checkpoint", trust_remote_code=True)
    model = recommender.model
    parts = (recommender, recommender.tokenizer, model, model.config, model.config.text_config, model.catalog.trie)
    modules = [sys.modules[type(part).__module__] for part in parts]
    print(json.dumps([module.__name__.rpartition(".")[2] for module in modules if hasattr(module, "CHANGED")]))
"""


def test_folders_of_one_name_run_their_own_code(tmp_path):
    model = build_model("hstu")
    sizes = model.config.codebook_sizes
    codes = model.catalog.item_codes.numpy()
    model.save_pretrained(tmp_path / "whole" / "checkpoint")
    SemanticIdTokenizer.from_codes(range(30), codes, sizes, ["dislike", "like"]).save_pretrained(
        tmp_path / "whole" / "checkpoint"
    )
    files = ["pipeline_unigrf", "tokenization_unigrf", "modeling_unigrf", "configuration_unigrf", "configuration_hstu"]
    files.append("trie_unigrf")
    for file in files:
        shutil.copytree(tmp_path / "whole", tmp_path / file)
        path = tmp_path / file / "checkpoint" / f"{file}.py"
        path.write_text(path.read_text() + "\nCHANGED = True\n")
    order = ["whole", *files, "whole"]
    lines = run_elsewhere(LOAD_IN_TURN, json.dumps(order), folder=tmp_path)
    assert [json.loads(line) for line in lines] == [[], *([file] for file in files), []]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_folder_without_a_tokenizer_says_so(recommender, damage, tmp_path):
    recommender.model.save_pretrained(tmp_path)
    if damage == "truncated":
        recommender.tokenizer.save_pretrained(tmp_path)
        (tmp_path / "items.json").write_text("{")
    message = "`tokenizer` must be .* Add it to the folder" if damage == "missing" else "items.json must be a complete"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pipeline("recommendation", model=str(tmp_path), trust_remote_code=True)
    with pytest.raises(ValueError, match="`tokenizer` must be"):
        RecommendationPipeline(model=recommender.model)
    whole = pipeline("recommendation", str(tmp_path), tokenizer=recommender.tokenizer, trust_remote_code=True)
    assert whole(HISTORY) == approximately(recommender(HISTORY))


ROWS = [
    {**HISTORY, "allowed_items": None, "blocked_items": ["film 7"]},
    {**SHORT_HISTORY, "allowed_items": ["film 1", "film 2"], "blocked_items": None},
    {**SHORT_HISTORY, "allowed_items": None, "blocked_items": None},
]
FORMS = {
    "dataset": datasets.Dataset.from_list,
    "shuffled": lambda rows: datasets.Dataset.from_list(rows[::-1]).select([2, 1, 0]),
    "numpy": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "generated": lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "torch": Requests,
}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_data_set_gives_what_a_list_gives(recommender, form, batch_size):
    expected = [approximately(row) for row in recommender(ROWS)]
    answers = recommender(form(ROWS), batch_size=batch_size)
    assert not isinstance(answers, list), "answers come one batch after the other"
    assert list(answers) == expected


def test_a_column_of_histories_gives_what_a_list_gives():
    codes = build_model(codebook_sizes=(4, 3, 2), num_items=12, behaviors=["view"])
    ids = [f"i{item}" for item in range(12)]
    tokenizer = SemanticIdTokenizer.from_codes(ids, codes.catalog.item_codes.numpy(), [4, 3, 2], ["view"])
    recommender = RecommendationPipeline(model=codes, tokenizer=tokenizer)
    histories = [["i1", "i2"], ["i3"]]
    for form in (datasets.Dataset.from_list, FORMS["stream"]):
        column = form([{"items": history} for history in histories])["items"]
        assert list(recommender(column)) == [approximately(row) for row in recommender(histories)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["user_id", "blocked_item"])
def test_further_columns_are_rejected_as_in_a_list(recommender, form, name):
    rows = [{**row, name: "x"} for row in ROWS]
    for requests in (rows, form(rows)):
        with pytest.raises(ValueError, match=f"must have `items` and (keys|columns) among .* got .*{name}"):
            list(recommender(requests))
    if form is datasets.Dataset.from_list:
        with pytest.raises(ValueError, match=r"dataset.select_columns\(\['items', 'behaviors', 'allowed_items'"):
            recommender(form(rows))
        with pytest.raises(ValueError, match="got a data set without rows"):
            recommender(form(ROWS).select([]))

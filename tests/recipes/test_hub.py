"""One folder is all that it takes: elsewhere, from the Hub, as a pipeline, and back."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NO_PROJECT
from huggingface_hub import ModelCard
from transformers import HfArgumentParser

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM, UniGRFModel
from recipes import push_to_hub
from recipes.common.hashing import weights_hash
from recipes.push_to_hub import PushArguments, check_files, push
from tokenization import ResidualKMeans, SemanticIdTokenizer

REPO_ID, COMMIT = "someone/films", "0123456789" * 4
HISTORY = {"items": ["007", "film 12", "007", "film 3"], "behaviors": ["like", "dislike", "like", "like"]}
SHORT = {"items": ["film 5"], "behaviors": ["dislike"]}


def result(seed):
    values = np.random.default_rng(seed).random(5).tolist()
    return dict(zip(("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"), values, strict=True))


METRICS = {
    "protocol": {"split": "leave-one-out", "users": 943, "seed": 0},
    "selection": {"chosen on": "validation, ranked ndcg@10", "num_beams": 10, "ranking_weight": 1.0, "tried": []},
    "baselines": {"popularity": result(1), "item_knn": result(2)},
    "generation": result(3),
    "ranked": result(4),
    "ranking": {"auc": 0.8125, "share_of_likes": 0.55, "interactions": 943},
    "invalid_items": 0,
    "generated_items_checked": 9430,
    "seconds": {"train": 61.5},
}


@pytest.fixture(scope="module")
def recommender():
    """60 items, `007` and `film 1` to `film 59`, and a random model."""
    embeddings = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    tokenizer = SemanticIdTokenizer.from_embeddings(
        ["007", *(f"film {i}" for i in range(1, 60))],
        embeddings,
        ResidualKMeans((4, 4)).fit(embeddings),
        ["dislike", "like"],
        titles=["Amélie “007”", *(f"Title {i}" for i in range(1, 60))],
        provenance={"encoder": "some/encoder", "text_template": "{title}. {genres}", "inputs": {"items": "c0ffee"}},
    )
    torch.manual_seed(0)
    text_config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    model = UniGRFForCausalLM(
        UniGRFConfig(**tokenizer.config_fields(), text_config=text_config, content_embedding_dim=6)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))  # far from uniform: no near ties
    model.set_catalog(torch.from_numpy(tokenizer.item_codes.copy()), torch.from_numpy(embeddings))
    return RecommendationPipeline(model=model.eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def run(recommender, tmp_path_factory):
    """What a training leaves behind: checkpoint, metrics, pictures, and files that nobody should get."""
    run = tmp_path_factory.mktemp("run")
    recommender.save_pretrained(run / "checkpoint")
    (run / "checkpoint" / "training_args.bin").write_bytes(b"a pickle")
    (run / "checkpoint" / "training_log.json").write_text('{"metrics": {"train_loss": 1.25}, "log_history": []}')
    METRICS["weights"] = weights_hash(recommender.model)
    (run / "metrics.json").write_text(json.dumps(METRICS))
    (run / "recall_at_k.png").write_bytes(b"a picture")
    (run / "private.png").write_bytes(b"no part of the report")
    return run


@pytest.fixture(scope="module")
def repository(run):
    """The folder that a dry run writes, loads again in a process of its own, and does not upload."""
    folder = run / "hub"
    push(arguments(run, dry_run=True, output_dir=str(folder)))
    return folder


class RecordingApi:
    """Stands in for `HfApi`."""

    calls: list = []

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, folder_path, **kwargs):
        self.calls.append(("upload_folder", sorted(path.name for path in Path(folder_path).iterdir()), kwargs))


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    monkeypatch.setattr(RecordingApi, "calls", [])
    monkeypatch.setattr(push_to_hub, "HfApi", RecordingApi)
    return RecordingApi.calls


def arguments(run, **changes):
    paths = {"checkpoint": str(run / "checkpoint"), "metrics": str(run / "metrics.json")}
    return PushArguments(**{**paths, "repo_id": REPO_ID, "dataset_name": "Films of 1998", **changes})


def approx(recommendations):
    return [
        {key: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value for key, value in row.items()}
        for row in recommendations
    ]


# Elsewhere

ELSEWHERE = (
    NO_PROJECT
    + """
import json, re, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

requests, found = json.loads(sys.argv[1]), []
for name, again in (("repository", "from_folder"), ("someone/films", "from_hub")):
    config, backbone, model, tokenizer = (
        auto.from_pretrained(name, trust_remote_code=True)
        for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer)
    )
    recommender = pipeline("recommendation", model=name, trust_remote_code=True)
    parts = (config, backbone, model, tokenizer, recommender, recommender.model, recommender.tokenizer)
    inputs = tokenizer.encode_history(requests[0]["items"], requests[0]["behaviors"], return_tensors="pt")
    with torch.no_grad():
        found.append({
            "parts": [f"{type(part).__module__.split('.')[0]}.{type(part).__name__}" for part in parts],
            "states": backbone(**inputs).last_hidden_state.tolist(),
            "logits": model(**inputs).logits.tolist(),
            "recommended": recommender(requests),
        })
    recommender.save_pretrained(again)
    backbone.save_pretrained(again + "_backbone")
for snippet in re.findall("```python\\n(.*?)```", open("repository/README.md", encoding="utf-8").read(), re.DOTALL):
    exec(snippet)
print(json.dumps(found))
"""
)


def test_the_folder_alone_gives_the_same_everywhere_and_comes_back_the_same(recommender, repository, tmp_path):
    shutil.copytree(repository, tmp_path / "repository")
    cache = tmp_path / "home" / "hub" / "models--someone--films"
    shutil.copytree(repository, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps([HISTORY, SHORT])],
        cwd=tmp_path,
        env=variables | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The card's two snippets have run, with the repository's name, and agree on the first film.
    *printed, last = done.stdout.splitlines()
    assert printed[0].rpartition(" ")[0] in {f"{i} {t}" for i, t in zip(*catalog(recommender), strict=True)}
    assert len(printed) == 12 and printed[10].startswith(f"['{printed[0].partition(' Title')[0]}'")

    inputs = recommender.tokenizer.encode_history(*HISTORY.values(), return_tensors="pt")
    with torch.no_grad():
        logits, states = recommender.model(**inputs).logits, recommender.model.model(**inputs).last_hidden_state
    classes = ["UniGRFConfig", "UniGRFModel", "UniGRFForCausalLM", "SemanticIdTokenizer", "RecommendationPipeline"]
    expected = [approx(row) for row in recommender([HISTORY, SHORT])]
    for found in json.loads(last):
        assert found["parts"] == [f"transformers_modules.{name}" for name in (*classes, classes[2], classes[3])]
        torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(found["states"]), states, rtol=0, atol=1e-6)
        assert found["recommended"] == expected

    for source in ("from_folder", "from_hub"):
        folder = tmp_path / source
        again = RecommendationPipeline(
            model=UniGRFForCausalLM.from_pretrained(folder), tokenizer=SemanticIdTokenizer.from_pretrained(folder)
        )
        backbone = UniGRFModel.from_pretrained(tmp_path / f"{source}_backbone")
        with torch.no_grad():
            assert torch.equal(again.model(**inputs).logits, logits)
            assert torch.equal(backbone(**inputs).last_hidden_state, states)
        assert [approx(row) for row in again([HISTORY, SHORT])] == expected
        config = json.loads((folder / "config.json").read_text())
        assert config == json.loads((repository / "config.json").read_text())  # with code of its own, not `repo--code`
        code = {path.name for path in repository.glob("*.py")}
        assert {path.name for path in folder.glob("*.py")} == code


def catalog(recommender):
    return recommender.tokenizer.item_ids, recommender.tokenizer.titles


def test_a_history_is_a_dict_or_a_plain_list_and_gives_the_users_own_ids_and_titles(recommender):
    found = recommender(HISTORY)
    assert len(found) == 10 and found == recommender(dict(HISTORY)) == recommender([HISTORY])[0]
    titles = dict(zip(*catalog(recommender), strict=True))
    for row in found:
        assert titles[row["item_id"]] == row["title"]
        assert row["score"] == pytest.approx(row["generation_score"] + row["ranking_score"], abs=1e-5)
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert {row["item_id"] for row in found}.isdisjoint(HISTORY["items"])


def test_with_one_behavior_a_history_is_a_plain_list_of_ids_and_titles_are_none(recommender):
    codes = recommender.tokenizer.item_codes
    tokenizer = SemanticIdTokenizer.from_codes(range(60), codes, recommender.tokenizer.codebook_sizes, ["view"])
    text_config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = UniGRFForCausalLM(UniGRFConfig(**tokenizer.config_fields(), text_config=text_config)).eval()
    model.set_catalog(torch.from_numpy(codes.copy()))
    plain = RecommendationPipeline(model=model, tokenizer=tokenizer)
    found = plain([7, 3])
    assert found == plain(("7", "3")) == plain({"items": [7, 3]}) == plain([[7, 3], [5]])[0]
    assert all(row["title"] is None and int(row["item_id"]) in range(60) for row in found)
    assert plain([np.array([7, 3]), torch.tensor([5])]) == plain([[7, 3], [5]]) == [found, plain([5])]
    assert plain(torch.tensor([7, 3])) == plain(list(torch.tensor([7, 3]))) == found
    with pytest.raises(ValueError, match="one history a request, found 2"):
        plain({"items": [[7, 3], [5]]}, unknown="skip")


def test_a_batch_equals_one_by_one_also_with_lists_for_some_requests_alone(recommender):
    requests = [
        HISTORY,
        SHORT,
        {**HISTORY, "allowed_items": ["film 7", "film 9", "film 3"]},
        {**SHORT, "blocked_items": [recommender(SHORT)[0]["item_id"]]},
        {**SHORT, "allowed_items": ["film 8"], "blocked_items": ["film 1"]},
    ]
    alone = [recommender(request) for request in requests]
    for batch_size in (2, 3, 5):
        together = recommender(requests, batch_size=batch_size)
        assert [approx(row) for row in together] == alone
    streamed = recommender((request for request in requests), batch_size=2)  # lazily, from a generator
    assert [approx(row) for row in streamed] == alone
    assert [row["item_id"] for row in alone[2]] in (["film 7", "film 9"], ["film 9", "film 7"])
    assert alone[3][0]["item_id"] == alone[1][1]["item_id"]
    assert [row["item_id"] for row in alone[4]] == ["film 8"]


def test_arrays_are_histories_and_lists_as_python_lists_are(recommender):
    histories = [
        {"items": np.array(one["items"]), "behaviors": np.array(one["behaviors"])} for one in (HISTORY, SHORT)
    ]
    assert recommender(histories) == recommender([HISTORY, SHORT])
    for name in ("blocked_items", "allowed_items"):
        for items in (["film 9"], ["film 7", "film 8"]):
            found = recommender({**SHORT, name: np.array(items)})
            assert found == recommender({**SHORT, name: items})


def test_a_checkpoint_serves_by_its_own_defaults(recommender):
    """As recipes.evaluate writes them: what is served is what was measured."""
    config, everything = recommender.model.config, {"num_beams": 60, "num_return_sequences": 60}
    before = {name: getattr(config, name) for name in ("exclude_history", "ranking_target", "rerank_top_k")}
    try:
        config.exclude_history, config.ranking_target = False, "like"
        assert recommender(HISTORY, **everything) == recommender(
            HISTORY, exclude_history=False, ranking_target="like", **everything
        )
        config.rerank_top_k = 4
        assert len(recommender(HISTORY)) == 4, "as many as there are, where ten were not asked for"
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def test_the_history_may_be_recommended_only_if_asked_for(recommender):
    everything = {"num_beams": 60, "num_return_sequences": 60}
    assert len(recommender(HISTORY, **everything)) == 57
    assert len(recommender(HISTORY, exclude_history=False, **everything)) == 60
    assert len(recommender(HISTORY, max_items=1, **everything)) == 57  # also what the model no longer reads


def test_parameters_do_what_recommend_does_with_them(recommender):
    by_generation = recommender(HISTORY, ranking_weight=0.0, num_return_sequences=3)
    assert [row["score"] for row in by_generation] == [row["generation_score"] for row in by_generation]
    assert len(by_generation) == 3
    liked, shown = (recommender(HISTORY, ranking_target=target)[0] for target in ("like", "next"))
    assert liked["ranking_score"] != shown["ranking_score"]
    assert recommender(HISTORY, max_items=1) == approx(
        recommender({"items": ["film 3"], "behaviors": ["like"], "blocked_items": ["007", "film 12"]})
    )


def test_a_part_of_the_catalog_is_swapped_in_for_one_call(recommender):
    films = ["film 7", "film 8", "film 9"]
    part = recommender.model.catalog.subset(recommender.tokenizer.item_indices(films))
    assert sorted(row["item_id"] for row in recommender(HISTORY, catalog=part)) == films
    assert len(recommender(HISTORY)) == 10


def test_a_history_longer_than_the_backbone_keeps_its_most_recent_items(recommender, monkeypatch):
    assert (
        recommender.model.config.max_history_items == 15
    )  # 1 + 15 * 4 codes and behaviors + 3 codes of the next item = 64
    long = {"items": HISTORY["items"] * 10, "behaviors": HISTORY["behaviors"] * 10}
    assert recommender(long) == recommender(long, max_items=15)
    monkeypatch.setattr(recommender.model.config, "max_items", 4)
    assert recommender(long) == recommender(long, max_items=4) != recommender(long, max_items=15)
    with pytest.raises(ValueError, match="max_items from 1 to the 15 items"):
        UniGRFConfig(**{**recommender.model.config.to_dict(), "max_items": 16})
    with pytest.raises(ValueError, match="take 68 positions, the backbone has 64"):
        recommender(long, max_items=16)


def test_sub_histories_are_searched_for_in_all_of_a_history(recommender):
    config = UniGRFConfig(**{**recommender.model.config.to_dict(), "num_retrieved_items": 3})
    model = UniGRFForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.catalog.load_state_dict(recommender.model.catalog.state_dict())
    pipe, tokenizer = (
        RecommendationPipeline(model=model.eval(), tokenizer=recommender.tokenizer),
        recommender.tokenizer,
    )
    items = [f"film {1 + 7 * i % 29}" for i in range(40)]
    behaviors = ["like" if i % 3 else "dislike" for i in range(40)]
    requests = [
        {"items": items, "behaviors": behaviors},
        {"items": ["film 3", "no such film", "film 5"], "behaviors": ["like", "like", "dislike"]},
    ]
    asked = {"max_items": 4, "num_beams": 6, "num_return_sequences": 6, "exclude_history": False}
    together = pipe(requests, batch_size=2, unknown="skip", **asked)
    assert approx(together[0]) == pipe(requests[0], **asked) and approx(together[1]) == pipe(
        requests[1], unknown="skip", **asked
    )
    for request, known, found in zip(requests, (range(40), (0, 2)), together, strict=True):
        names = [request["behaviors"][place] for place in known]
        ids = [request["items"][place] for place in known]
        best = model.recommend(
            **tokenizer.encode_history(ids, names, max_items=4, return_tensors="pt"),
            long_items=torch.tensor(tokenizer.item_indices(ids))[None],
            long_behaviors=torch.tensor([tokenizer.behaviors.index(name) for name in names])[None],
            num_beams=6,
            num_return_sequences=6,
        )
        assert [tokenizer.item_ids[item] for item in best.item_indices[0]] == [row["item_id"] for row in found]
        torch.testing.assert_close(torch.tensor([row["score"] for row in found]), best.scores[0], atol=2e-5, rtol=1e-4)


def test_unknown_items_are_an_error_or_skipped_everywhere_alike(recommender):
    strange = {"items": ["film 5", "film 99"], "behaviors": ["dislike", "like"], "blocked_items": ["film 98"]}
    with pytest.raises(ValueError, match="film 99"):
        recommender(strange)
    with pytest.raises(ValueError, match="film 98"):
        recommender({**SHORT, "blocked_items": ["film 98"]})
    assert recommender(strange, unknown="skip") == recommender(SHORT)
    only = {**SHORT, "allowed_items": ["film 98", "film 7"]}
    assert [row["item_id"] for row in recommender(only, unknown="skip")] == ["film 7"]


@pytest.mark.parametrize(
    ("request_", "parameters", "message"),
    [
        ({**SHORT, "allowed_items": []}, {}, "Expected a known item in `allowed_items`"),
        ({**SHORT, "allowed_items": ["film 98"]}, {"unknown": "skip"}, "Expected a known item in `allowed_items`"),
        ({**SHORT, "allowed_items": ["film 5"]}, {}, "no item|leaves none|leave no"),
        ({"items": [], "behaviors": []}, {}, "at least one item"),
        ([], {}, "found an empty list"),
        ([[]], {}, "at least one item"),
        ({"items": ["film 98"], "behaviors": ["like"]}, {"unknown": "skip"}, "all of its item IDs are unknown"),
        ({"items": ["film 5"]}, {}, "behaviors? .*got None"),
        ({"items": ["film 5"], "behaviors": ["bought"]}, {}, "bought"),
        ({**SHORT, "blocked": ["film 1"]}, {}, "keys among .*'blocked'"),
        ({"behaviors": ["like"]}, {}, "with `items`"),
        ({"items": "film 5", "behaviors": ["like"]}, {}, "the one string 'film 5'"),
        ({**SHORT, "allowed_items": "film 7"}, {}, "the one string 'film 7'"),
        ("film 5", {}, "the one string 'film 5'"),
        (SHORT, {"num_beam": 20}, "found \\['num_beam'\\]"),
        (SHORT, {"unknown": "drop"}, "'error' or 'skip'"),
        (SHORT, {"ranking_target": "love"}, "found 'love'"),
    ],
)
def test_requests_that_make_no_sense_are_refused(recommender, request_, parameters, message):
    with pytest.raises(ValueError, match=message):
        recommender(request_, **parameters)


def test_a_misspelt_parameter_of_the_constructor_is_refused_and_a_right_one_is_the_default(recommender):
    with pytest.raises(ValueError, match=r"found \['exclude'\]"):
        RecommendationPipeline(model=recommender.model, tokenizer=recommender.tokenizer, exclude=True)
    three = RecommendationPipeline(model=recommender.model, tokenizer=recommender.tokenizer, num_return_sequences=3)
    assert three(HISTORY) == recommender(HISTORY)[:3] and len(three(HISTORY, num_return_sequences=4)) == 4


def test_the_repository_holds_model_tokenizer_codebooks_code_card_and_metrics_and_no_pickle(repository, run, hub):
    names = {path.name for path in repository.iterdir()}
    root = Path(push_to_hub.__file__).parents[1]
    code = {path.name for package in ("modeling_unigrf", "tokenization") for path in (root / package).glob("*.py")}
    assert names == (code - {"__init__.py"}) | {
        "README.md",
        "config.json",
        "generation_config.json",
        "items.json",
        "metrics.json",
        "model.safetensors",
        "recall_at_k.png",
        "semantic_ids.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.json",
    }
    assert hub == []  # it was a dry run
    for path in repository.iterdir():
        assert str(run).encode() not in path.read_bytes(), f"{path.name} names a folder of this machine"
    (run / "extra").mkdir()
    (run / "extra" / "training_args.bin").touch()
    with pytest.raises(ValueError, match=r"found \['training_args.bin'\]"):
        check_files(run / "extra")


def test_the_card_says_what_was_measured_in_its_metadata_and_in_its_text(repository, recommender):
    card = ModelCard.load(repository / "README.md")
    data = card.data
    metadata = data.to_dict()
    assert tuple(metadata[name] for name in ("library_name", "license", "pipeline_tag")) == (
        "transformers",
        "apache-2.0",
        "other",
    )
    assert {"recommendation", "recommender-system", "generative-retrieval", "semantic-ids", "ranking"} <= {*data.tags}
    assert data.model_name == "films" and data.datasets == ["Films-of-1998"]
    values = {(one.task_type, one.metric_name): one.metric_value for one in data.eval_results}
    expected = {("recommendation", f"{k}, generation and ranking"): v for k, v in METRICS["ranked"].items()}
    expected |= {("recommendation", f"{k}, generation alone"): v for k, v in METRICS["generation"].items()}
    assert values == expected | {("ranking", "AUC"): 0.8125}
    index = data.to_dict()["model-index"][0]
    assert index["name"] == "films" and len(index["results"]) == 2
    for one in index["results"]:
        assert one["dataset"] == {"name": "Films of 1998", "type": "Films-of-1998", "split": "test"}
        assert one["task"]["type"] and all({"type", "name", "value"} <= set(metric) for metric in one["metrics"])

    for row in (*METRICS["baselines"].values(), METRICS["generation"], METRICS["ranked"]):
        assert " | ".join(f"{value:.4f}" for value in row.values()) in card.text
    provenance = recommender.tokenizer.provenance
    for text in (
        "0.8125",
        "9,430",
        "leave-one-out",
        provenance["sha256"],
        "c0ffee",
        "2504.16454",
        "2604.25787",
        "1.25",
    ):
        assert text in card.text
    # jinja prints nothing for a field that the config no longer has.
    assert re.search(r"One llama backbone of 2 layers, width 32 and 4 heads\n\([\d,]+ parameters", card.text)
    assert re.search(r"1 times the .* \"next\", \"dislike\", \"like\", with\n0 random negatives for each", card.text)
    assert "![Recall@K of every method](recall_at_k.png)" in card.text and "codebooks.png" not in card.text
    assert not re.search(r"\{\{|\{%|Undefined|None\b|\n\n\n", card.text)


def test_it_is_uploaded_as_one_commit_and_only_after_it_has_loaded(run, hub, monkeypatch):
    monkeypatch.setattr(push_to_hub, "check_loading", lambda *_: hub.append("loaded"))
    push(arguments(run, private=True))
    loaded, created, uploaded = hub
    assert loaded == "loaded" and created == ("create_repo", REPO_ID, {"private": True, "exist_ok": True})
    assert uploaded[0] == "upload_folder" and uploaded[2]["repo_id"] == REPO_ID
    assert {"README.md", "model.safetensors", "metrics.json", "pipeline_unigrf.py"} <= set(uploaded[1])


def test_a_folder_that_does_not_load_elsewhere_is_not_uploaded(run, hub, monkeypatch):
    monkeypatch.setattr(push_to_hub, "check_files", lambda folder: (folder / "trie_unigrf.py").unlink())
    with pytest.raises(ValueError, match=r"(?s)found .*trie_unigrf.*Nothing was uploaded"):
        push(arguments(run))
    assert hub == []


def test_what_cannot_be_published_is_refused_before_anything_is_written(run, hub, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            push(arguments(run, **{"dry_run": True, "output_dir": str(tmp_path / "out"), **changes}))
        assert not (tmp_path / "out").exists() and hub == []

    def metrics_with(**changes):
        file = tmp_path / "changed.json"
        kept = {name: value for name, value in (METRICS | changes).items() if value is not None}
        file.write_text(json.dumps(kept))
        return str(file)

    refused("no config.json in", checkpoint=str(tmp_path / "nowhere"))
    refused("no config.json in", checkpoint=str(run))
    refused("found no file at", metrics=str(tmp_path / "nowhere.json"))
    refused(r"without \['ranked', 'ranking'\]", metrics=metrics_with(ranked=None, ranking=None))
    refused(
        r"without \['generation.mrr'\]",
        metrics=metrics_with(generation={"recall@5": 0.1, "recall@10": 0.2, "ndcg@5": 0.1, "ndcg@10": 0.1}),
    )
    refused("metrics of this checkpoint", metrics=metrics_with(selection={"num_beams": 50, "ranking_weight": 1.0}))
    refused(
        "found {'dense_weight': 0.0} in", metrics=metrics_with(selection=METRICS["selection"] | {"dense_weight": 2.0})
    )
    refused("those of other weights", metrics=metrics_with(weights="0" * 64))
    refused("Repo id", repo_id="a folder/name/of three")
    refused("Expected an output_dir", output_dir=None)
    with pytest.raises(ValueError, match="new or empty output_dir"):
        push(arguments(run, dry_run=True, output_dir=str(run)))


def test_the_command_of_the_docstring_is_understood(run):
    command = re.search(r"push_to_hub (--check.*?)\n\n", push_to_hub.__doc__, re.DOTALL)[1]
    first = command.replace("\\\n", " ").splitlines()[0].split()
    parsed = HfArgumentParser(PushArguments).parse_args_into_dataclasses(first)[0]
    assert parsed.repo_id == "user/name" and parsed.private and not parsed.dry_run

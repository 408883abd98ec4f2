"""Pages: their files, links, tables, commands, snippets and sentences, and the commands of committed results."""

import json
import re
import runpy
import shlex
import sys

import pandas as pd
import pytest
import torch
from helpers import ROOT
from transformers import HfArgumentParser

from recipes.data import histories as recipe_histories
from recipes.data.histories import check_columns, load_histories, read_histories
from recipes.papers.recochain import reproduce as reproduce_recochain
from recipes.papers.unigrf import reproduce as reproduce_unigrf
from recipes.results.tables import PAGES, make_tables, with_tables
from tokenization import SemanticIdTokenizer

README = (ROOT / "README.md").read_text()
FOLDERS = ("recipes", "modeling_unigrf", "tokenization")
ALL_PAGES = sorted(
    {
        *PAGES,
        *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
        *(file for folder in FOLDERS for file in (ROOT / folder).rglob("README.md")),
    }
)
# Pages that are written by hand in full, and whose sentences are counted.
PROSE_PAGES = [*PAGES, ROOT / "recipes" / "README.md"]
MAX_WORDS = 25
GENERATED = r"<!-- results:.*?<!-- end:\w+ -->"


def page_id(file):
    """Name a page by its path."""
    return str(file.relative_to(ROOT).parent / file.stem).removeprefix("recipes/")


def code_blocks(text, language):
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Return the commands of recipes in code blocks and, if they are whole, in the text, each as its words."""
    lines = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(rf"^```.*?^```|{GENERATED}", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(python -m recipes\.[^`]+)`", prose)
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith("python -m recipes.") and "..." not in line
    ]


def anchors(text):
    """Return the links to the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def sentences(text):
    """Return the sentences of a page, without code blocks, tables, headings and what is generated."""
    for block in (GENERATED, r"^```.*?^```", r"<[^>]+>", r"^(\||#|!\[|---).*?$"):
        text = re.sub(block, "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]+`", "Code", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("*", "")
    paragraphs = re.split(r"\n\s*\n|^\s*(?:-|\d+\.) ", text, flags=re.MULTILINE)
    return [
        " ".join(sentence.split())
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z(])|(?<=[.!?]\))\s+", paragraph)
        if sentence.strip()
    ]


@pytest.mark.parametrize("file", ALL_PAGES, ids=page_id)
def test_files_and_headings_that_a_page_names_exist(file):
    text = file.read_text()
    if file.name not in ("CHANGELOG.md", "CONTRIBUTING.md"):  # name files of other versions
        for name in re.findall(r"`((?:recipes|modeling_unigrf|tokenization|tests)/[\w./]+\.\w+)`", text):
            assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, heading = name.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), name
        assert not heading or f"#{heading}" in anchors(target.read_text()), name


@pytest.mark.parametrize("file", PAGES, ids=page_id)
def test_tables_are_made_from_the_committed_results(file):
    text = file.read_text()
    assert tuple(re.findall(r"<!-- results:(\w+) -->", text)) == PAGES[file]
    assert with_tables(text) == text


def test_every_table_has_one_page():
    assert sorted(name for names in PAGES.values() for name in names) == sorted(make_tables())
    assert {file for file in ALL_PAGES if "<!-- results:" in file.read_text()} == set(PAGES)


@pytest.mark.parametrize("file", ALL_PAGES, ids=page_id)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_of_a_page_are_understood(file, monkeypatch):
    parse = HfArgumentParser.parse_args_into_dataclasses
    parsed = []

    def stop(parser, args=None, **kwargs):
        parsed.append(parse(parser, args, **kwargs))
        raise SystemExit  # before the recipe runs

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", stop)
    page_commands = commands(file.read_text())
    for _, _, module, *arguments in page_commands:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__")
    assert len(parsed) == len(page_commands), "argparse exits on commands that it cannot parse"
    if file in PROSE_PAGES and file.parent.name != "results":
        assert page_commands


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("unigrf_ml1m", reproduce_unigrf),
        ("recochain", reproduce_recochain),
        ("recochain_beauty", reproduce_recochain),
        ("recochain_beauty_llama", reproduce_recochain),
    ],
    ids=["unigrf", "recochain", "beauty", "beauty-llama"],
)
def test_the_command_of_every_committed_run_repeats_the_run(name, recipe):
    (file,) = (ROOT / "recipes" / "papers").rglob(f"{name}.json")
    for run in json.loads(file.read_text())["runs"]:
        _, _, module, *words = shlex.split(run["made by"]["command"])
        assert module == recipe.__name__
        parsed = vars(HfArgumentParser(recipe.ReproduceArguments).parse_args_into_dataclasses(words)[0])
        # A command holds several numbers of beams, a run one.
        fields = {
            field: value for field, value in run["arguments"].items() if field not in ("beams", "union", "ranked")
        }
        assert {field: parsed[field] for field in fields} == fields, run["made by"]["command"]


def test_first_screen_has_at_most_40_lines():
    first_screen = README.partition("\n## ")[0].strip()
    assert len(first_screen.splitlines()) <= 40
    for part in ("```mermaid", "make demo", "make test", "```python", "```text"):
        assert part in first_screen


@pytest.mark.parametrize("file", PROSE_PAGES, ids=page_id)
def test_sentences_have_at_most_25_words(file):
    lengths = {sentence: len(sentence.split()) for sentence in sentences(file.read_text())}
    assert {sentence: length for sentence, length in lengths.items() if length > MAX_WORDS} == {}


def test_sentences_are_found():
    text = (
        "# Title\n\nOne `a b` two (c). Three\nfour.\n\n```bash\nfive\n```\n\n- Six [seven](eight).\n- **Nine.** Ten\n"
    )
    assert sentences(text) == ["One Code two (c).", "Three four.", "Six seven.", "Nine.", "Ten"]


def test_readme_snippets_print_what_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example, *snippets = code_blocks(README, "python")
    names: dict = {}  # shared by the snippets
    exec(compile(example, "README.md", "exec"), names)
    shown = code_blocks(README, "text")[0].splitlines()
    printed = capsys.readouterr().out.splitlines()[-len(shown) :]
    for shown_line, printed_line in zip(shown, printed, strict=True):
        number = r"-?\d+\.\d+"
        assert re.sub(number, "", shown_line) == re.sub(number, "", printed_line)
        score, generation_score, ranking_score = map(float, re.findall(number, shown_line))
        assert score == pytest.approx(generation_score + ranking_score, abs=0.011)
        # Another machine rounds otherwise.
        assert [float(value) for value in re.findall(number, printed_line)] == pytest.approx(
            [score, generation_score, ranking_score], abs=0.2
        )
    for snippet in snippets:
        if "histories.parquet" not in snippet:  # tested below
            exec(compile(snippet, "README.md", "exec"), names)
    calls = re.findall(r"`((?:history =|model\.|recommender\()[^`]+\))`", README)
    calls += re.findall(r"`(model\.generation_config\.\w+ = [^`]+)`", README)
    for call in calls:
        exec(compile(call, "README.md", "exec"), names)
    assert len(calls) >= 11


@pytest.mark.parametrize("behaviors", [["view", "buy", "view"], None], ids=["behaviors", "no-behaviors"])
@pytest.mark.parametrize("times", [[5, 3, 4], ["1970-01-01T00:00:05", "1970-01-01T00:00:03", "1970-01-01T00:00:04"]])
def test_readme_lines_make_histories(behaviors, times, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = {"user_id": ["NA", "NA", "null"], "item_id": ["01", "nan", "nan"], "timestamp": times}
    pd.DataFrame(columns | ({"behavior": behaviors} if behaviors else {})).to_csv("interactions.csv", index=False)
    (snippet,) = (block for block in code_blocks(README, "python") if "histories.parquet" in block)
    lines = {line.strip() for line in (recipe_histories.__doc__ or "").splitlines()}
    assert {line for line in snippet.splitlines() if line and not line.startswith("from")} <= lines
    exec(compile(snippet, "README.md", "exec"), {})
    names = behaviors or ["interact"]
    tokenizer = SemanticIdTokenizer.from_codes(["01", "nan"], torch.tensor([[0], [1]]), [2], sorted(set(names)))
    dataset = load_histories("histories.parquet")
    assert dataset["user_id"][:] == ["NA", "null"]
    assert check_columns(dataset, tokenizer, with_times=True)[1:4] == ["items", "behaviors", "timestamps"]
    histories = read_histories(dataset.with_format("arrow")[:], tokenizer, exclude_history=False)
    assert [items.tolist() for items in histories.items] == [[1, 0], [1]]
    assert [times.tolist() for times in histories.timestamps] == [[3, 5], [4]]

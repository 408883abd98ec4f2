"""READMEs: their files, tables, commands and snippets, and the commands of committed results."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY
from transformers import HfArgumentParser

from modeling_unigrf import RecommendationPipeline, UniGRFConfig, UniGRFForCausalLM
from recipes.papers.recochain import reproduce as reproduce_recochain
from recipes.papers.unigrf import reproduce as reproduce_unigrf
from recipes.results.tables import WRITTEN, with_tables
from tokenization import SemanticIdTokenizer

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", WRITTEN, ids=["README.md", "recipes/results/README.md"])
def test_readme_files_exist_and_tables_match_the_results(file):
    text = file.read_text()
    assert with_tables(text) == text
    for name in re.findall(r"`((?:recipes|modeling_unigrf|tokenization|tests)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    headings = [re.sub(r"[^\w -]", "", line).strip().lower() for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    anchors = {"#" + heading.replace(" ", "-") for heading in headings}
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert name in anchors or (file.parent / name).exists(), name


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: str(file.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_readme_commands_are_understood(file, monkeypatch):
    blocks = re.findall(r"^```bash\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m recipes.")]
    parse = HfArgumentParser.parse_args_into_dataclasses
    parsed = []

    def stop(parser, args=None, **kwargs):
        parsed.append(parse(parser, args, **kwargs))
        raise SystemExit  # before the recipe runs

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", stop)
    for _, _, module, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__")
    assert len(parsed) == len(commands) >= 4, "argparse exits on commands that it cannot parse"


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
    file = Path(recipe.__file__).parent / "results" / f"{name}.json"
    for run in json.loads(file.read_text())["runs"]:
        _, _, module, *words = shlex.split(run["made by"]["command"])
        assert module == recipe.__name__
        parsed = vars(HfArgumentParser(recipe.ReproduceArguments).parse_args_into_dataclasses(words)[0])
        # A command holds several numbers of beams, a run one.
        fields = {
            field: value for field, value in run["arguments"].items() if field not in ("beams", "union", "ranked")
        }
        assert {field: parsed[field] for field in fields} == fields, run["made by"]["command"]


def test_readme_snippets_run(tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    ids = [str(item) for item in range(200)]  # in place of MovieLens
    codes = np.stack(np.unravel_index(np.arange(200), (6, 6, 6)), axis=1)
    tokenizer = SemanticIdTokenizer.from_codes(ids, codes, (6, 6, 6), ["dislike", "like"], titles=ids)
    model = UniGRFForCausalLM(UniGRFConfig(**tokenizer.config_fields(), text_config=TINY, embedding_table_size=200))
    model.set_catalog(torch.from_numpy(tokenizer.item_codes.copy()))
    RecommendationPipeline(model=model, tokenizer=tokenizer).save_pretrained("runs/demo/checkpoint")
    names: dict = {}  # shared by the snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)

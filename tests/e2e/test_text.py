"""Text, from documents to words: the text recipe, its export, and the tokenizer that ships."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import pipeline

from pretrain.cli import main
from pretrain.corpus.tokenizer import load_tokenizer

HOME = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginnings of some documents that ship."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    with gzip.open(HOME / "data/text/validation.jsonl.gz", "rt", encoding="utf-8") as file, path.open("w") as out:
        for record in map(json.loads, file):
            out.write(json.dumps({**record, "text": record["text"][:2000]}) + "\n")
    return path


@pytest.mark.parametrize("unit", ["token", "span", "word"])
def test_the_text_recipe_trains_exports_and_fills_masks(
    unit: str, documents: Path, fit: Callable[..., int], tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "model"
    recipe = ["-c", HOME / "configs/text_quickstart.yaml", "--run", run, "--trainer.max_steps", 3]
    small = ["--model.encoder.hidden_size", 32, "--model.encoder.num_hidden_layers", 1]
    data = ["--data.train", documents, "--data.validation", documents, "--data.mask_unit", unit]
    quiet = ["--trainer.enable_progress_bar", "false"]
    assert fit(*recipe, *small, *data, *quiet) == 0
    assert json.loads((run / "result.json").read_text())["bigram_perplexity"] > 1
    assert main(["inspect", str(run), "--audit"]) == 0
    if unit != "token":
        return
    assert main(["export", str(run), "--out", str(out)]) == 0
    fill = pipeline("fill-mask", model=str(out))
    text = "The state of the <mask> is strong."
    found = fill(text, top_k=8)
    words = load_tokenizer(HOME / "data/text/tokenizer.json").tokens
    assert len({answer["token"] for answer in found}) == 8
    for answer in found:
        assert answer["sequence"] == text.replace(" <mask>", answer["token_str"])
        assert answer["token_str"].replace(" ", "Ġ") == words[answer["token"]] or not answer["token_str"].isascii()


def test_the_tokenizer_that_ships_is_what_its_command_makes(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.json"
    source = str(HOME / "data/text/train.jsonl.gz")
    assert main(["tokenizer", source, "--vocab_size", "2048", "--out", str(out)]) == 0
    assert out.read_bytes() == (HOME / "data/text/tokenizer.json").read_bytes()


@pytest.mark.parametrize("algorithm", ["wordpiece", "unigram"])
def test_a_tokenizer_of_any_algorithm_prepares_text(algorithm: str, documents: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    given = ["--algorithm", algorithm, "--vocab_size", "600", "--out", str(tokenizer)]
    assert main(["tokenizer", str(documents), *given]) == 0
    options = ["--tokenizer", str(tokenizer), "--windows", "64", "--out", str(tmp_path / "corpus")]
    assert main(["prepare", str(documents), *options]) == 0

"""Documents longer than a model reads: cut into windows, and none of it lost."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import MLMDataModule
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Planner, Position
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.shards import Filters
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer, TextTokenizer, train_tokenizer
from pretrain.corpus.windows import into_windows
from pretrain.errors import UserError

DATA = Path(__file__).parents[2] / "data" / "text"


@pytest.fixture(scope="module")
def documents() -> list[dict[str, str]]:
    with gzip.open(DATA / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        return [{**record, "text": record["text"][:3000]} for record in map(json.loads, file)]


@pytest.fixture(scope="module")
def source(documents: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def tokenizer(documents: list[dict[str, str]]) -> TextTokenizer:
    return train_tokenizer((document["text"] for document in documents), 600)


@given(st.integers(2, 400), st.integers(3, 100), st.booleans())
def test_windows_hold_every_token_once_in_order(length: int, max_length: int, has_words: bool) -> None:
    tokens = np.arange(1000, 1000 + length)
    words = np.arange(length) % 3 == 0 if has_words else None
    windows = list(into_windows("name", tokens, words, max_length))
    assert np.concatenate([ids[1:-1] for _, ids, _ in windows]).tolist() == tokens[1:-1].tolist()
    for _, ids, starts in windows:
        assert len(ids) <= max_length
        assert (ids[0], ids[-1]) == (tokens[0], tokens[-1]), "each between <cls> and <eos>"
        assert (starts is None) if words is None else (starts.tolist() == words[ids - 1000].tolist())
    lengths = [len(ids) for _, ids, _ in windows]
    assert max(lengths) - min(lengths) <= 1
    assert len(windows) == max(1, -(-(length - 2) // (max_length - 2))), "no more than are needed"
    names = [name for name, _, _ in windows]
    assert names == (["name"] if len(windows) == 1 else [f"name#{n}" for n in range(1, len(windows) + 1)])


def test_a_corpus_of_windows_holds_every_token_of_its_documents(
    documents: list[dict[str, str]], source: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    corpus = prepare([source], tmp_path / "corpus", Settings(tokenizer, filters=Filters(windows=64)))
    found: dict[str, list[int]] = {}
    for index in range(len(corpus)):
        assert len(corpus.tokens(index)) <= 64
        found.setdefault(corpus.id(index).partition("#")[0], []).extend(corpus.tokens(index)[1:-1].tolist())
    assert set(found) == {document["id"] for document in documents}
    for document in documents:
        assert tokenizer.backend.decode(found[document["id"]]) == document["text"]


def test_a_corpus_knows_where_words_begin(
    documents: list[dict[str, str]], source: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    corpus = prepare([source, source], tmp_path / "corpus", Settings(tokenizer, filters=Filters(deduplicate=True)))
    assert corpus.has_words
    assert len(corpus) == len(documents)
    for index, document in enumerate(documents):
        ids, starts = tokenizer.encode_words(document["text"].encode())
        assert corpus.tokens(index).tolist() == ids.tolist()
        assert corpus.word_starts(index).tolist() == starts.tolist()


def module(source: Path | str, tokenizer: TextTokenizer, folder: Path, **settings: Any) -> MLMDataModule:
    file = folder / "tokenizer.json"
    file.write_text(tokenizer.serialize(), encoding="utf-8")
    return MLMDataModule(str(source), str(source), str(file), max_length=64, **settings)


def test_a_data_module_cuts_raw_sources_into_windows(source: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    whole, windows = (
        module(source, tokenizer, tmp_path, long_sequences=long_sequences) for long_sequences in ("crop", "split")
    )
    for data in (whole, windows):
        data.setup("fit")
    assert windows.validation_corpus is not None
    for corpus in (windows.train_corpus, windows.validation_corpus):
        assert corpus.lengths(np.arange(len(corpus))).max() <= 64
        assert corpus.num_tokens - 2 * len(corpus) == whole.train_corpus.num_tokens - 2 * len(whole.train_corpus)
    assert whole.train_corpus.lengths(0) > 64


def test_a_prepared_corpus_must_have_been_cut(source: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    plain, longer, shorter = (tmp_path / name for name in ("plain", "longer", "shorter"))
    for out, size in ((plain, None), (longer, 100), (shorter, 50)):
        prepare([source], out, Settings(tokenizer, filters=Filters(windows=size)))
    assert isinstance(open_or_prepare([shorter], tokenizer, 64), Corpus)
    for out, given_as in ((plain, "without --windows"), (longer, "with --windows 100")):
        with pytest.raises(UserError) as caught:
            open_or_prepare([out], tokenizer, 64)
        assert str(caught.value) == (
            f"{out}: was prepared {given_as}, long_sequences split needs at most 64 tokens in each; prepare it "
            "again with --windows 64, or set long_sequences to crop"
        )


def test_windows_too_short_to_hold_a_token_are_a_mistake() -> None:
    with pytest.raises(UserError) as caught:
        Filters(windows=2)
    assert str(caught.value) == "sequences cannot be split into windows of 2 tokens; give at least 3"


# --- whole words ------------------------------------------------------------------------------------------------------


def test_whole_words_are_masked(source: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    settings = {"mask_unit": "word", "mask_replace_prob": 1.0, "random_replace_prob": 0.0, "mlm_probability": 0.3}
    data = module(source, tokenizer, tmp_path, long_sequences="split", **settings)
    data.setup("fit")
    planner = Planner(data.train_corpus, Order(len(data.train_corpus), 0), data.masking, 64)
    pack = planner.step(Position(), 4096)
    batch = PackDataset(data.train_corpus, data.masking)[pack]
    starts = np.concatenate([data.train_corpus.word_starts(index) for index in pack.indices.tolist()])
    word = np.cumsum(starts | np.isin(np.arange(len(starts)), batch.cu_seqlens.numpy() + 1))
    masked = (batch.input_ids == data.tokenizer.mask_token_id).numpy()
    assert not set(word[masked]) & set(word[~masked])
    assert batch.pack.targets.sum() == masked.sum() == pytest.approx(0.3 * pack.maskable.sum(), rel=0.1)
    assert (np.bincount(word[masked]) > 1).any(), "some words have several tokens"


def test_proteins_cannot_be_masked_by_words(proteins: Path) -> None:
    with pytest.raises(UserError) as caught:
        MLMDataModule(str(proteins), mask_unit="word")
    assert str(caught.value) == (
        "data.mask_unit is word, but proteins have no words; choose token or span (or, for text, a tokenizer with "
        "--data.tokenizer)"
    )


# --- text without a tokenizer -----------------------------------------------------------------------------------------


def test_text_without_a_tokenizer_names_the_option(source: Path) -> None:
    data = MLMDataModule(str(source))
    with pytest.raises(UserError) as caught:
        data.setup("fit")
    assert "if this is text, give its tokenizer: --data.tokenizer FILE (in prepare --tokenizer FILE)" in str(
        caught.value
    )
    assert isinstance(data.tokenizer, ProteinTokenizer)

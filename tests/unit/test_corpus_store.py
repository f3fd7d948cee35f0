"""The corpus on disk: written whole or not at all, opened without copying, damage told in one line."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.corpus import pieces, shards, store
from pretrain.corpus import prepare as prepare_module
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.store import Corpus, is_corpus, verify
from pretrain.corpus.tokenizer import ProteinTokenizer, train_tokenizer
from pretrain.errors import UserError

ESM, TEXT = ProteinTokenizer(), train_tokenizer([], 261)
PROTEINS = {"a": "MK", "b": "MKLAAV", "c": "W", "d": "MMMM"}


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "x.fasta"
    path.write_text("".join(f">{name} described\n{residues}\n" for name, residues in PROTEINS.items()))
    return path


@pytest.fixture
def corpus(fasta: Path, tmp_path: Path) -> Corpus:
    return prepare([fasta], tmp_path / "corpus", Settings(ESM))


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def decoded(corpus: Corpus) -> dict[str, str]:
    names = [corpus.id(i) for i in range(len(corpus))]
    tokens = [corpus.tokens(i) for i in range(len(corpus))]
    assert all((ids[0], ids[-1]) == (ESM.cls_token_id, ESM.eos_token_id) for ids in tokens)
    return {name: "".join(ESM.tokens[i] for i in ids[1:-1]) for name, ids in zip(names, tokens, strict=True)}


def quiet_mistake(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_corpus_holds_what_was_prepared(corpus: Corpus) -> None:
    assert decoded(corpus) == PROTEINS
    assert (len(corpus), corpus.num_sequences, corpus.num_tokens) == (4, 4, 13 + 2 * 4)
    assert corpus.tokenizer.fingerprint == ESM.fingerprint


def test_lengths_count_cls_and_eos_in_any_order_and_shape(corpus: Corpus) -> None:
    assert corpus.lengths([[1, 0], [3, 1]]).tolist() == [[8, 4], [6, 8]]
    assert corpus.lengths(np.arange(4)).tolist() == [len(corpus.tokens(i)) for i in range(4)]
    assert corpus.lengths([]).tolist() == []


@pytest.mark.parametrize("index", [-1, 4])
def test_a_sequence_beyond_the_corpus_is_an_error(corpus: Corpus, index: int) -> None:
    for read in (corpus.tokens, corpus.id):
        with pytest.raises(IndexError, match=f"sequence {index} of a corpus of 4"):
            read(index)


def mapped_files(address: int) -> list[str]:
    """The files that the kernel has mapped at this address."""
    regions = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(end, 16) for end in region[0].split("-")), region) for region in regions]
    return [region[5] for first, last, region in spans if first <= address < last and len(region) == 6]


def test_tokens_are_a_read_only_view_of_the_mapped_file(corpus: Corpus) -> None:
    one, two = corpus.tokens(1), corpus.tokens(1)
    assert np.shares_memory(one, two)
    assert not one.flags.writeable
    assert not one.flags.owndata
    assert mapped_files(one.__array_interface__["data"][0]) == [str(corpus.path / "shard-00000.arrow")]


def test_lengths_stay_in_the_mapped_file(corpus: Corpus) -> None:
    """Memory does not grow with the number of sequences; a byte for each would be below what a process's own varies."""
    assert mapped_files(corpus._lengths.__array_interface__["data"][0]) == [str(corpus.path / "lengths.npy")]


def test_a_pickled_corpus_is_only_its_path(corpus: Corpus) -> None:
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 500
    assert decoded(pickle.loads(pickled)) == PROTEINS


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(corpus: Corpus, fasta: Path, tmp_path: Path) -> None:
    again = prepare([fasta], tmp_path / "again", Settings(ESM))
    assert content(again.path) == content(corpus.path)
    assert again.fingerprint == corpus.fingerprint


@pytest.mark.parametrize("block_bytes", [1, 40, 10_000])
def test_several_shards_hold_the_same_sequences_as_one(
    block_bytes: int, corpus: Corpus, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    cut = prepare([fasta], tmp_path / "cut", Settings(ESM))
    assert len(cut.manifest["shards"]) == {1: 4, 40: 2, 10_000: 1}[block_bytes]
    assert decoded(cut) == PROTEINS
    assert cut.lengths([3, 0, 2, 1, 1]).tolist() == corpus.lengths([3, 0, 2, 1, 1]).tolist()
    assert (cut.num_sequences, cut.num_tokens) == (corpus.num_sequences, corpus.num_tokens)
    assert decoded(pickle.loads(pickle.dumps(cut))) == PROTEINS


def test_several_sources_follow_each_other(fasta: Path, tmp_path: Path) -> None:
    more = tmp_path / "y.txt"
    more.write_text("WW\n\nKK\n")
    assert list(decoded(prepare([fasta, more], tmp_path / "out", Settings(ESM))).items()) == [
        *PROTEINS.items(),
        ("1", "WW"),
        ("3", "KK"),
    ]


def test_another_content_or_tokenizer_gives_another_fingerprint(tmp_path: Path) -> None:
    fingerprints = set()
    for number, (text, tokenizer) in enumerate([("MK", ESM), ("ML", ESM), ("MK", TEXT)]):
        source = tmp_path / f"{number}.txt"
        source.write_text(text)
        fingerprints.add(prepare([source], tmp_path / str(number), Settings(tokenizer)).fingerprint)
    assert len(fingerprints) == 3


def test_the_same_ids_of_another_tokenizer_are_another_corpus(tmp_path: Path) -> None:
    source = tmp_path / "x.txt"
    source.write_text("MK")
    other = train_tokenizer(["zz zz zz"], 262)
    one, two = (prepare([source], tmp_path / str(t.vocab_size), Settings(t)) for t in (TEXT, other))
    assert one.tokens(0).tolist() == two.tokens(0).tolist()
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(("vocab_size", "dtype"), [(33, np.uint8), (261, np.uint16), (70_000, np.uint32)])
def test_tokens_take_the_smallest_type_that_holds_the_vocabulary(vocab_size: int, dtype: type, tmp_path: Path) -> None:
    if vocab_size == 70_000:  # too many merges to train; words do as well
        words = json.loads(TEXT.serialize())
        words["added_tokens"], words["pre_tokenizer"] = [], {"type": "Whitespace"}
        names = ["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *(f"w{n}" for n in range(5, vocab_size))]
        words["model"] = {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": "<unk>"}
        tokenizer, text = store.tokenizer_from_string(json.dumps(words), "words"), f"w{vocab_size - 1} w5"
    else:
        tokenizer, text = (ESM, "MK") if vocab_size == 33 else (TEXT, "MK")
    source = tmp_path / "x.txt"
    source.write_text(text)
    corpus = prepare([source], tmp_path / "corpus", Settings(tokenizer))
    assert corpus.tokenizer.vocab_size == vocab_size
    assert corpus.tokens(0).dtype == dtype
    assert corpus.tokens(0).tolist() == tokenizer.encode(text.encode()).tolist()


def test_a_corpus_never_replaces_anything(fasta: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    assert (
        quiet_mistake(lambda: prepare([fasta], out, Settings(ESM)))
        == f"{out}: exists already and is no corpus; give another --out, or move it away"
    )
    assert not list(out.iterdir())


def test_a_corpus_cannot_be_made_inside_a_file(fasta: Path) -> None:
    message = quiet_mistake(lambda: prepare([fasta], fasta / "corpus", Settings(ESM)))
    assert message == f"{fasta / 'corpus'}: cannot be made, as {fasta} is a file; choose another place"


def test_a_corpus_of_no_source_is_a_mistake(tmp_path: Path) -> None:
    assert (
        quiet_mistake(lambda: prepare([], tmp_path / "out", Settings(ESM)))
        == "no source is given; name at least one file"
    )
    assert quiet_mistake(lambda: open_or_prepare([], ESM)) == "no source is given; name at least one file"


def test_a_misspelt_source_shows_before_the_others_are_read(fasta: Path, tmp_path: Path) -> None:
    fasta.write_text("no FASTA: this would be told first, if it were read")
    message = quiet_mistake(lambda: prepare([fasta, tmp_path / "y.fasta"], tmp_path / "out", Settings(ESM)))
    assert message.startswith(f"{tmp_path / 'y.fasta'}: no such file")


def test_a_corpus_appears_at_its_place_only_when_it_is_complete(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, finish, written = tmp_path / "corpus", prepare_module.finish, list[int]()

    def watched(directory: Path, *rest: object) -> Path:
        made = finish(directory, *rest)  # type: ignore[arg-type]
        assert not out.exists()
        written.append(made.stat().st_ino)
        return made

    monkeypatch.setattr(prepare_module, "finish", watched)
    assert decoded(prepare([fasta], out, Settings(ESM))) == PROTEINS
    assert [out.stat().st_ino] == written  # renamed in one act, not copied
    assert {file.name for file in tmp_path.iterdir()} == {"corpus", fasta.name}


def test_what_a_killed_run_left_is_cleared(fasta: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".corpus.partial"
    partial.mkdir()
    (partial / "shard-00007.arrow").write_bytes(b"half")
    (tmp_path / ".corpus.lock").touch()
    corpus = prepare([fasta], tmp_path / "corpus", Settings(ESM))
    assert set(content(corpus.path)) == {"lengths.npy", "manifest.json", "shard-00000.arrow"}
    assert {file.name for file in tmp_path.iterdir()} == {"corpus", fasta.name}


# --- damage -----------------------------------------------------------------------------------------------------------


def edit(**fields: object) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, **fields}))

    return act


def overwrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        (path / name).write_bytes(change((path / name).read_bytes()))

    return act


MANIFEST, LENGTHS, SHARD = "manifest.json", "lengths.npy", "shard-00000.arrow"
NOT_FOUND = "not found; a corpus is a directory that `pretrain prepare` made"
AGAIN = "prepare it again"


def damaged(why: str) -> str:
    return f"{{path}}: damaged corpus ({why}); {AGAIN}"


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no directory": (shutil.rmtree, f"{{path}}/{MANIFEST}: {NOT_FOUND}"),
    "a file": (lambda path: (shutil.rmtree(path), path.touch())[-1], f"{{path}}/{MANIFEST}: {NOT_FOUND}"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), f"{{path}}/{MANIFEST}: {NOT_FOUND}"),
    "no shard": (lambda path: (path / SHARD).unlink(), f"{{path}}/{SHARD}: {NOT_FOUND}"),
    "empty manifest": (overwrite(MANIFEST, lambda _: b""), damaged("JSONDecodeError: …")),
    "truncated manifest": (overwrite(MANIFEST, lambda b: b[:-50]), damaged("JSONDecodeError: …")),
    "binary manifest": (overwrite(MANIFEST, lambda _: b"\xff"), damaged("UnicodeDecodeError: …")),
    "another manifest": (overwrite(MANIFEST, lambda _: b"{}"), damaged("KeyError: 'format_version'")),
    "a list": (overwrite(MANIFEST, lambda _: b"[]"), damaged("TypeError: …")),
    "another format": (edit(format_version=2), f"{{path}}: corpus format 2, this version reads 1; {AGAIN}"),
    "a shard elsewhere": (
        edit(shards=[{"file": "../x", "num_sequences": 4}]),
        f"{{path}}: {MANIFEST} names the shard '../x', which is not beside it; {AGAIN}",
    ),
    "a shard of no name": (edit(shards=[{"num_sequences": 4}]), damaged("KeyError: 'file'")),
    "another count": (
        edit(num_sequences=5), f"{{path}}: the shards do not hold the sequences that manifest.json counts; {AGAIN}"
    ),
    "tokenizer missing": (edit(tokenizer={}), damaged("KeyError: 'serialized'")),
    "tokenizer damaged": (edit(tokenizer={"serialized": "{"}), "{path}: not JSON (…); a tokenizer.json is expected"),
    "no lengths": (lambda path: (path / LENGTHS).unlink(), f"{{path}}/{LENGTHS}: {NOT_FOUND}"),
    "empty lengths": (overwrite(LENGTHS, lambda _: b""), damaged("ValueError: …")),
    "truncated lengths": (overwrite(LENGTHS, lambda b: b[:-1]), damaged("ValueError: …")),
    "rubbish for lengths": (overwrite(LENGTHS, lambda _: os.urandom(900)), damaged("ValueError: …")),
    "a header that is no Python": (overwrite(LENGTHS, lambda b: b.replace(b"}", b"(")), damaged("ValueError: …")),
    "lengths of another corpus": (
        lambda path: np.save(path / LENGTHS, np.ones(5, np.uint8)),
        f"{{path}}: {LENGTHS} does not hold the sequences that manifest.json counts; {AGAIN}",
    ),
    "empty shard": (overwrite(SHARD, lambda _: b""), damaged("ArrowInvalid: …")),
    "truncated shard": (overwrite(SHARD, lambda b: b[: len(b) // 2]), damaged("ArrowInvalid: …")),
    "shard without its last byte": (overwrite(SHARD, lambda b: b[:-1]), damaged("ArrowInvalid: …")),
    "rubbish for a shard": (overwrite(SHARD, lambda _: os.urandom(900)), damaged("ArrowInvalid: …")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_corpus_is_told_in_one_line(damage: str, corpus: Corpus) -> None:
    act, message = DAMAGES[damage]
    path = corpus.path
    act(path)
    told = quiet_mistake(lambda: Corpus(path))
    assert re.fullmatch(re.escape(message.format(path=path)).replace("…", ".*"), told), told


def test_a_shard_of_another_corpus_is_noticed(corpus: Corpus, fasta: Path, tmp_path: Path) -> None:
    fasta.write_text(">a\nMK\n")
    shutil.copy(prepare([fasta], tmp_path / "other", Settings(ESM)).path / SHARD, corpus.path / SHARD)
    assert quiet_mistake(lambda: Corpus(corpus.path)) == (
        f"{corpus.path}: the shards do not hold the sequences that manifest.json counts; prepare it again"
    )


def test_only_a_directory_with_a_manifest_is_a_corpus(corpus: Corpus, fasta: Path, tmp_path: Path) -> None:
    assert is_corpus(corpus.path)
    assert not is_corpus(fasta)
    assert not is_corpus(tmp_path)
    assert not is_corpus(tmp_path / "nowhere")


# --- verifying --------------------------------------------------------------------------------------------------------


@pytest.fixture
def four_shards(fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1)
    return prepare([fasta], tmp_path / "four", Settings(ESM)).path


def test_an_intact_corpus_is_verified(four_shards: Path) -> None:
    assert verify(four_shards) == 4


def test_broken_shards_are_named(four_shards: Path) -> None:
    (four_shards / "shard-00003.arrow").unlink()
    content = bytearray((four_shards / "shard-00001.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (four_shards / "shard-00001.arrow").write_bytes(content)
    assert quiet_mistake(lambda: verify(four_shards)) == (
        f"{four_shards}: 2 of 5 files broken: shard-00001.arrow (another content), shard-00003.arrow (missing); copy "
        "the corpus again, or prepare it again"
    )


def test_a_manifest_edited_by_hand_is_noticed(four_shards: Path) -> None:
    manifest = json.loads((four_shards / MANIFEST).read_text())
    del manifest["shards"][2]
    (four_shards / MANIFEST).write_text(json.dumps(manifest))
    assert re.fullmatch(
        rf"{four_shards}: {MANIFEST} was changed: its fingerprint is \w+, that of its shards \w+; restore it, or "
        "prepare it again",
        quiet_mistake(lambda: verify(four_shards)),
    )

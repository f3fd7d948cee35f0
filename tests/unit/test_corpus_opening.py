"""What a config names is opened as it is, or prepared into the cache: once, however many processes ask for it."""

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.corpus import opening, shards, whole
from pretrain.corpus import prepare as prepare_module
from pretrain.corpus.journal import ShardEntry
from pretrain.corpus.opening import open_or_prepare, open_or_store
from pretrain.corpus.parts import prepare_part
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.shards import Portion
from pretrain.corpus.store import Corpus, is_corpus
from pretrain.corpus.tokenizer import ProteinTokenizer, train_tokenizer
from pretrain.corpus.whole import exclusive
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


# --- several processes at once ----------------------------------------------------------------------------------------


def test_processes_that_prepare_the_same_corpus_at_once_share_one(fasta: Path, cache: Path) -> None:
    results, barrier = list[Corpus](), threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        results.append(open_or_prepare([fasta], ESM))

    threads = [
        threading.Thread(target=work) for _ in range(4)
    ]  # a lock on a file keeps threads apart as it does processes
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [decoded(corpus) for corpus in results] == [PROTEINS] * 4
    assert list(cache.iterdir()) == [results[0].path]


def test_a_corpus_that_appears_in_the_cache_after_the_first_look_is_taken(
    fasta: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_or_prepare([fasta], ESM)
    monkeypatch.setattr(prepare_module, "make_shards", lambda *_: pytest.fail("prepared again"))
    answers = iter([False, False])  # for the source, and for the cache
    monkeypatch.setattr(opening, "is_corpus", lambda path: next(answers, None) is None and is_corpus(path))
    assert open_or_prepare([fasta], ESM).path == first.path


def test_something_else_in_the_place_of_a_cached_corpus_is_not_overwritten(fasta: Path, cache: Path) -> None:
    path = open_or_prepare([fasta], ESM).path
    (path / "manifest.json").unlink()
    message = quiet_mistake(lambda: open_or_prepare([fasta], ESM))
    assert message == f"{path}: exists already and is no corpus; give another --out, or move it away"
    assert (path / "shard-00000.arrow").is_file()


def test_a_corpus_that_another_process_finished_in_the_meantime_is_taken(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes, and removes its lock file, between our opening that file and our locking it."""
    out, lock = tmp_path / "corpus", fcntl.flock

    def late(*arguments: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        prepare([fasta], out, Settings(ESM))
        monkeypatch.setattr(prepare_module, "make_shards", lambda *_: pytest.fail("prepared again"))
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    assert decoded(prepare([fasta], out, Settings(ESM))) == PROTEINS
    assert {file.name for file in tmp_path.iterdir()} == {"corpus", fasta.name}


def test_a_lock_file_that_its_holder_removed_protects_nothing(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waited on a removed lock file must not work beside one that made a new file."""
    lock, removed = fcntl.flock, []

    def removed_meanwhile(*arguments: int) -> None:
        lock(*arguments)
        if not removed:
            removed.append((tmp_path / ".corpus.lock").unlink())

    held = []
    make_shards = shards.make_shards

    def watched(*arguments: Any) -> list[ShardEntry]:
        with (tmp_path / ".corpus.lock").open("w") as other, pytest.raises(BlockingIOError):
            lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(True)
        return make_shards(*arguments)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    monkeypatch.setattr(prepare_module, "make_shards", watched)
    prepare([fasta], tmp_path / "corpus", Settings(ESM))
    assert held


def test_a_process_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    path, (reader, writer) = tmp_path / "lock", os.pipe()
    with exclusive(path):
        pid = os.fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        waiting = path.open("w")
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    waiting.close()
    os.close(writer)
    os.waitpid(pid, 0)
    os.close(reader)


def test_what_is_ready_needs_no_place_that_can_be_written_to(
    fasta: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [ESM.encode(b"MK")]

    def everything() -> list[str]:
        part = prepare_part([fasta], tmp_path / "part", Settings(ESM), Portion(1, 1))
        prepared = prepare([fasta], tmp_path / "corpus", Settings(ESM)), open_or_prepare([fasta], ESM)
        return [str(part.path), *map(str, prepared), str(open_or_store(["a"], tokens, ESM))]

    made = everything()
    monkeypatch.setattr(whole, "exclusive", lambda path: pytest.fail(f"{path}: wanted a lock"))
    assert everything() == made


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_source_is_prepared_once_for_each_content(cache: Path, fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_or_prepare([fasta], ESM)
    assert first.path.parent == cache
    moved = fasta.rename(fasta.with_name("renamed.fasta"))
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "make_shards", lambda *_: pytest.fail("prepared again"))
        assert open_or_prepare([moved], ESM).path == first.path
    moved.write_text(">a\nMKW\n")
    assert decoded(open_or_prepare([moved], ESM)) == {"a": "MKW"}
    assert len(list(cache.iterdir())) == 2


def test_another_tokenizer_or_order_of_sources_is_another_corpus_in_the_cache(cache: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_text("MK\n")
    two.write_text("LA\n")
    corpora = [open_or_prepare([one, two], ESM), open_or_prepare([two, one], ESM), open_or_prepare([one, two], TEXT)]
    assert [corpus.tokens(0).tolist() for corpus in corpora] == [
        ESM.encode(b"MK").tolist(), ESM.encode(b"LA").tolist(), TEXT.encode(b"MK").tolist()
    ]  # fmt: skip


def test_the_same_bytes_of_another_kind_are_another_corpus_in_the_cache(cache: Path, tmp_path: Path) -> None:
    for suffix, expected in ((".txt", b'{"text": "a"}'), (".jsonl", b"a")):
        source = tmp_path / f"x{suffix}"
        source.write_text('{"text": "a"}\n')
        assert open_or_prepare([source], TEXT).tokens(0).tolist() == TEXT.encode(expected).tolist()


def test_the_cache_follows_the_xdg_convention(tmp_path: Path, fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_or_prepare([fasta], ESM).path.parent == tmp_path / "xdg" / "pretrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_or_prepare([fasta], ESM).path.parent == tmp_path / "home" / ".cache" / "pretrain"


def test_a_prepared_corpus_is_opened_where_it_is(cache: Path, corpus: Corpus) -> None:
    assert open_or_prepare([str(corpus.path)], ESM).path == corpus.path
    assert not cache.exists()


def test_a_corpus_made_with_another_tokenizer_is_refused(corpus: Corpus) -> None:
    assert quiet_mistake(lambda: open_or_prepare([corpus.path], TEXT)) == (
        f"{corpus.path}: made with tokenizer 'esm' (33 ids, {ESM.fingerprint}), the model's is 'text' (261 ids, "
        f"{TEXT.fingerprint}); prepare the sources again, or train with data.tokenizer as the corpus's"
    )


def test_a_source_that_is_not_there_is_refused(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    message = f"{path}: no such file; give a source file, or a corpus made by `pretrain prepare`"
    assert quiet_mistake(lambda: open_or_prepare([path], ESM)) == message
    assert not cache.exists()


def test_what_can_be_read_only_once_is_not_prepared_into_the_cache(cache: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.fasta")
    for name in (str(tmp_path / "x.fasta"), "hf://org/name", "file:///x/a.fasta", "https://host/a.csv.gz?token=1"):
        assert quiet_mistake(lambda name=name: open_or_prepare([name], ESM)) == (
            f"{name}: only files are prepared into the cache; run `pretrain prepare '{name}' --out DIR` once, and give "
            "DIR"
        )
    assert not cache.exists()


def test_a_directory_in_the_cache_is_its_files(cache: Path, fasta: Path) -> None:
    assert open_or_prepare([fasta.parent], ESM).path == open_or_prepare([fasta], ESM).path


def test_a_corpus_among_sources_is_refused(corpus: Corpus, fasta: Path, cache: Path) -> None:
    message = quiet_mistake(lambda: open_or_prepare([fasta, corpus.path], ESM))
    assert message == f"{corpus.path}: is a prepared corpus; it stands alone, and cannot be a source"

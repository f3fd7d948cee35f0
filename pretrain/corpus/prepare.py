"""Preparing: sources to a corpus, which appears at its place when it is complete."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.corpus.clusters import write_clusters
from pretrain.corpus.journal import JOURNAL, ShardEntry, report_file
from pretrain.corpus.processes import Engine, choose_engine
from pretrain.corpus.repeat import check_repeated, describe
from pretrain.corpus.shards import Filters, make_shards
from pretrain.corpus.sources import Source, SourceOptions, Stream, find_sources
from pretrain.corpus.split import SIDES, Split, split_shards
from pretrain.corpus.store import CLUSTERS, LENGTHS, MANIFEST, REPORT, Corpus, is_corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.corpus.whole import make_whole
from pretrain.corpus.writing import write_manifest
from pretrain.errors import UserError


@dataclass(frozen=True)
class Settings:
    """All that a corpus depends on, besides its sources.

    Attributes:
        tokenizer: What makes the ids.
        options: How the sources are read.
        filters: Which sequences are kept.
        split: Whether two corpora are made, and which sequences go where.
        clusters: A table of cluster and member, for an order that visits clusters; see `write_clusters`.
    """

    tokenizer: Tokenizer
    options: SourceOptions = field(default_factory=SourceOptions)
    filters: Filters = field(default_factory=Filters)
    split: Split | None = None
    clusters: str | None = None

    @property
    def lists(self) -> list[str]:
        """The files of names that it refers to."""
        return [
            name for name in (self.clusters, self.split and self.split.clusters, self.split and self.split.ids) if name
        ]

    def check_lists(self) -> None:
        """Make sure that the lists are there, before the hours that reading the sources may take.

        Raises:
            UserError: If one cannot be opened, or is a pipe: lists are read more than once.
        """
        for name in self.lists:
            source = Source(name, "tsv")
            if not source.is_regular_file and (name == "-" or Path(name).exists()):
                raise UserError(f"{source}: is no file; write the list into one, since it is read more than once")
            Stream(source).close()

    def is_ready(self, out: Path, sources: list[dict[str, Any]], read: Sequence[str]) -> bool:
        """Whether the corpus at ``out``, or the two of the split, are what would be made of these sources.

        Args:
            out: The place.
            sources: As `describe` records them.
            read: The files that are read; none may have changed since.

        Raises:
            UserError: If others are there; names the difference.
        """
        paths = [out / side for side in SIDES] if self.split else [out]
        if not all(map(is_corpus, paths)):
            if is_corpus(out) or is_split(out):
                there = "one corpus" if self.split else "two corpora, train and validation"
                raise UserError(f"{out}: exists already, and holds {there}; choose another place, or remove it first")
            return False
        for path in paths:
            self.check(out, Corpus(path).manifest, (path / MANIFEST).stat().st_mtime, sources, [*read, *self.lists])
        return True

    def check(
        self,
        out: Path | str,
        manifest: dict[str, Any],
        written: float,
        sources: list[dict[str, Any]],
        read: Sequence[str],
    ) -> None:
        """Make sure that a corpus is what would be made of these sources; see `check_repeated`.

        Raises:
            UserError: If not; names the difference.
        """
        made = {**manifest["prepared"], "tokenizer": manifest["tokenizer"]["fingerprint"]}
        made["clusters"] = made.get("clusters") and made["clusters"]["table"]
        made |= _split_options(made.get("split"))
        wanted = {
            "tokenizer": self.tokenizer.fingerprint,
            **asdict(self.options),
            **asdict(self.filters),
            **_split_options(asdict(self.split) if self.split else None),
            "clusters": self.clusters,
            "sources": sources,
        }
        check_repeated(out, written, made, wanted, read)


def _split_options(split: Mapping[str, Any] | None) -> dict[str, Any]:
    """A split by the names that its parts have on the command line."""
    names = {"validation_share": "share", "split_clusters": "clusters", "validation_ids": "ids"}
    return {option: split and split[name] for option, name in names.items()}


def prepare(
    sources: Sequence[str | Path], out: Path, settings: Settings, workers: int | None = None, engine: str = "local"
) -> Corpus:
    """Tokenise sources into a corpus at ``out``.

    The corpus is written beside its final place and renamed into it as the last act, so ``out`` either does not exist
    or is complete. A call that was killed is continued by the next one with the same settings; what has changed in the
    sources since then is made anew. One that ended has nothing to do when it is repeated.

    Args:
        sources: Files, patterns, directories, URLs, ``hf://`` datasets, or ``-`` for standard input.
        out: The directory to make.
        settings: What else the corpus depends on; with a split it is for `prepare_split`.
        workers: Blocks at a time; by default one for each core. The corpus does not depend on it.
        engine: ``local`` processes, or a ``ray`` cluster whose nodes all see the directory of ``out``.

    Raises:
        UserError: If a source is unreadable or holds something that has no token, or something else is at ``out``.
        CrashError: If a worker was killed.
    """
    assert settings.split is None
    prepare_found(find_sources(sources, settings.options), out, settings, choose_engine(engine, workers))
    return Corpus(out)


def prepare_split(
    sources: Sequence[str | Path], out: Path, settings: Settings, workers: int | None = None, engine: str = "local"
) -> tuple[Corpus, Corpus]:
    """Tokenise sources into two corpora, ``out/train`` and ``out/validation``, by the split; otherwise as `prepare`.

    Raises:
        UserError: As `prepare`, or if a list of the split cannot be read, or a side would be empty.
        CrashError: As `prepare`.
    """
    assert settings.split is not None
    prepare_found(find_sources(sources, settings.options), out, settings, choose_engine(engine, workers))
    return open_split(out)


def is_split(path: Path) -> bool:
    """Whether `prepare_split` made this directory."""
    return all(is_corpus(path / side) for side in SIDES)


def open_split(path: Path) -> tuple[Corpus, Corpus]:
    """The two corpora in a directory that `prepare_split` made."""
    train, validation = (Corpus(path / side) for side in SIDES)
    return train, validation


def prepare_found(
    sources: Sequence[Source],
    out: Path,
    settings: Settings,
    engine: Engine,
    is_made: Callable[[Path], bool] | None = None,
) -> None:
    """Prepare, or wait for whoever is preparing the same corpus and take theirs."""
    settings.check_lists()
    described, read = describe(sources), [source.name for source in sources]  # now: they may grow while they are read

    def fill(partial: Path) -> Path:
        entries = make_shards(sources, partial, settings.tokenizer, settings.options, settings.filters, engine)
        return finish(partial, entries, settings, described, engine)

    make_whole(out, is_made or (lambda path: settings.is_ready(path, described, read)), fill)


def finish(
    directory: Path, entries: Sequence[ShardEntry], settings: Settings, sources: list[dict[str, Any]], engine: Engine
) -> Path:
    """Make a corpus of the shards in ``directory``, or two of them by the split.

    Writes the report and the manifests, and removes all else: a directory with a journal is no corpus yet.

    Returns:
        Where it is: ``directory``, or one in it.

    Raises:
        UserError: If no sequence is left, or none on one side of the split.
    """
    split, prepared = settings.split, prepared_record(entries, settings, sources)
    if split is None:
        write_report(directory, directory, entries)
        _write_corpus(directory, entries, settings, prepared)
        return directory
    into = directory / "split"
    sides = split_shards(directory, into, entries, split, engine, settings.filters.windows is not None)
    for name, side in zip(SIDES, sides, strict=True):
        which = {"split": {"side": name, **asdict(split)}}
        _write_corpus(into / name, side, settings, {**prepared, **which})
    write_report(directory, into, entries)
    return into


def prepared_record(entries: Sequence[ShardEntry], settings: Settings, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """What a manifest records of how a corpus was prepared.

    Raises:
        UserError: If nothing was kept.
    """
    skipped = sum((Counter(entry.skipped) for entry in entries), Counter[str]())
    if not any(entry.file for entry in entries):
        raise UserError(
            f"no sequence is left ({_list(skipped)}); loosen --min_length and --max_length, or see the sources"
        )
    return {
        "sources": sources,
        **asdict(settings.options),
        **asdict(settings.filters),
        "skipped": dict(skipped),
    }


def write_report(directory: Path, to: Path, entries: Sequence[ShardEntry]) -> None:
    """Join the lists of bad records, if there are any, into one in ``to``."""
    (to / REPORT).unlink(missing_ok=True)  # a call that failed may have left one
    bad = [entry for entry in entries if entry.skipped.get("bad")]
    if not bad:
        return
    with (to / REPORT).open("wb") as report:
        report.write(b"source\tline\treason\n")
        for entry in bad:
            report.write(report_file(directory, entry.number).read_bytes())


def _write_corpus(directory: Path, entries: Sequence[ShardEntry], settings: Settings, prepared: dict[str, Any]) -> None:
    shards = [entry.listed() for entry in entries if entry.file]
    if settings.clusters:
        names, has_windows = [shard["file"] for shard in shards], settings.filters.windows is not None
        prepared = {**prepared, "clusters": write_clusters(directory, names, settings.clusters, has_windows)}
    write_manifest(directory, shards, settings.tokenizer, prepared)
    ours = {REPORT, MANIFEST, LENGTHS, *([CLUSTERS] if settings.clusters else []), *(entry.file for entry in entries)}
    for file in sorted(directory.iterdir(), key=lambda file: file.name == JOURNAL):  # the journal last
        if file.name not in ours:
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def _list(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "none was read"

"""Parts: a corpus prepared by several machines, each of which tokenises every N-th block, and joined without a copy.

part/
  part.json              which part of how many it is, of which sources and settings, and its shards
  shard-00001.arrow      the shards, under the numbers that they have in the whole corpus
  skipped-00001.tsv      the bad records of a block, if some were skipped
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pretrain.corpus.duplicates import deduplicate
from pretrain.corpus.journal import JOURNAL, Journal, ShardEntry, is_intact, report_file
from pretrain.corpus.prepare import Settings, finish
from pretrain.corpus.processes import choose_engine
from pretrain.corpus.repeat import check_repeated, describe
from pretrain.corpus.shards import BLOCK_BYTES, Filters, Portion, make_shards
from pretrain.corpus.sources import PART, SourceOptions, find_sources
from pretrain.corpus.split import Split
from pretrain.corpus.store import FORMAT_VERSION, check_shard_names, open_shard
from pretrain.corpus.tokenizer import tokenizer_from_string
from pretrain.corpus.whole import make_whole
from pretrain.errors import UserError
from pretrain.files import write_whole

NO_CLUSTERS = "--clusters goes with neither --shard nor --merge; prepare the sources in one call"


@dataclass(frozen=True)
class Part:
    """What one machine made.

    Attributes:
        path: The directory.
        number: Which part it is, from 1.
        of: How many there are.
        num_blocks: Blocks of the sources, in all parts together.
        layout: How the sources were cut, as a checksum.
        tokenizer: The tokenizer, serialised.
        settings: What else the parts must have in common.
        sources: What they were made of, as this machine names it.
        entries: The shards of its blocks.
    """

    path: Path
    number: int
    of: int
    num_blocks: int
    layout: str
    tokenizer: str
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    entries: list[ShardEntry]

    @property
    def num_sequences(self) -> int:
        """Sequences in its shards."""
        return sum(entry.num_sequences for entry in self.entries)


def prepare_part(
    sources: Sequence[str | Path],
    out: Path,
    settings: Settings,
    portion: Portion,
    workers: int | None = None,
    engine: str = "local",
) -> Part:
    """Prepare one part of a corpus: the sources are read whole, every ``portion.of``-th block of them is tokenised.

    One that is there already has nothing to do when it is repeated, as by a scheduler that starts a job again.

    Args:
        sources: As for `prepare`.
        out: The directory to make.
        settings: What else the part depends on; nothing that needs the whole corpus.
        portion: Which blocks to make.
        workers: Blocks at a time.
        engine: What maps over them.

    Raises:
        UserError: As `prepare`; or if duplicates are to be taken out, which is for `merge_parts`, as a split is; or if
            there is a table of clusters.
        CrashError: As `prepare`.
    """
    tokenizer, options, filters = settings.tokenizer, settings.options, settings.filters
    if filters.deduplicate:
        raise UserError(
            "--deduplicate compares all sequences, and a part has only its own; prepare the parts without it, and give "
            "it with --merge"
        )
    if settings.split:
        raise UserError("a split is made when the parts are joined; give its options with --merge")
    if settings.clusters:
        raise UserError(NO_CLUSTERS)
    chosen = choose_engine(engine, workers)
    found = find_sources(sources, options)
    described = describe(found)
    common = {"block_bytes": BLOCK_BYTES, **asdict(options), **asdict(filters)}

    def is_ready(path: Path) -> bool:
        if not is_part(path):
            return False
        part = read_part(path)
        made = {**part.settings, "part": f"{part.number}/{part.of}", "sources": part.sources}
        wanted = {**common, "part": f"{portion.number}/{portion.of}", "sources": described}
        made["tokenizer"], wanted["tokenizer"] = _fingerprint(part), tokenizer.fingerprint
        check_repeated(out, (path / PART).stat().st_mtime, made, wanted, [source["name"] for source in described])
        return True

    def fill(partial: Path) -> Path:
        entries = make_shards(found, partial, tokenizer, options, filters, chosen, portion)
        content = {
            "format_version": FORMAT_VERSION,
            "number": portion.number,
            "of": portion.of,
            "num_blocks": portion.num_blocks,
            "layout": portion.layout,
            "tokenizer": tokenizer.serialize(),
            "settings": common,
            "sources": described,
            "entries": [entry._asdict() for entry in entries],
        }
        write_whole(partial / PART, json.dumps(content, indent=1), replace=True)
        ours = {PART, *(entry.file for entry in entries)}
        ours |= {report_file(partial, entry.number).name for entry in entries}
        for file_ in sorted(partial.iterdir(), key=lambda file: file.name == JOURNAL):
            if file_.name not in ours:
                file_.unlink()
        return partial

    make_whole(out, is_ready, fill)
    return read_part(out)


def is_part(path: Path) -> bool:
    """Whether `prepare_part` made this directory."""
    return (path / PART).is_file()


def read_part(path: Path) -> Part:
    """What is in a directory that `prepare_part` made.

    Raises:
        UserError: If there is no part, or it is damaged.
    """
    try:
        content = json.loads((path / PART).read_text(encoding="utf-8"))
        if content.pop("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: made by another version; prepare this part again")
        content["entries"] = [ShardEntry(**entry) for entry in content["entries"]]
        part = Part(path, **content)
        check_shard_names((entry.file for entry in part.entries if entry.file is not None), path, PART)
        if not 1 <= part.number <= part.of:
            raise ValueError(f"part {part.number} of {part.of}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path / PART}: not found; --merge joins directories that `pretrain prepare --shard I/N` made"
        ) from error
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged part ({type(error).__name__}: {error}); prepare it again") from error
    for entry in part.entries:
        if entry.file is not None:
            _check_shard(path / entry.file, entry)
    return part


def _check_shard(file: Path, entry: ShardEntry) -> None:
    try:
        found = len(open_shard(file).offsets) - 1
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy or prepare this part again") from error
    if found != entry.num_sequences:
        raise UserError(
            f"{file}: holds {found:,} sequences instead of {entry.num_sequences:,}; copy or prepare this part again"
        )


def merge_parts(
    paths: Sequence[Path],
    out: Path,
    deduplicated: bool = False,
    split: Split | None = None,
    workers: int | None = None,
    engine: str = "local",
) -> None:
    """Join all parts of a corpus into the corpus that one machine would have made, byte for byte.

    The shards are linked, not copied (where the file system allows it), and the parts stay as they are.

    Args:
        paths: The parts, in any order.
        out: The directory to make.
        deduplicated: Keep the first of equal sequences, as ``Filters.deduplicate`` on one machine; writes the shards
            that have others again.
        split: Make two corpora, as `prepare_split`; writes all shards again.
        workers: Shards at a time, for these two.
        engine: As in `prepare`, for these two.

    Raises:
        UserError: If a part is missing, stands there twice, or is of other sources or settings.
        CrashError: As `prepare`.
    """
    chosen = choose_engine(engine, workers)
    given = [read_part(path) for path in paths]
    _check_parts(given)
    tokenizer = tokenizer_from_string(given[0].tokenizer, str(given[0].path))
    settings = {name: value for name, value in given[0].settings.items() if name != "block_bytes"}
    options = SourceOptions(**{name: settings.pop(name) for name in asdict(SourceOptions())})
    filters = replace(Filters(**settings), deduplicate=deduplicated)
    wanted = Settings(tokenizer, options, filters, split)
    wanted.check_lists()
    sources = min(given, key=lambda part: part.number).sources

    def fill(partial: Path) -> Path:
        journal = Journal(partial, {"layout": given[0].layout, **given[0].settings, "deduplicated": deduplicated})
        entries, before = [], hashlib.sha256()
        for entry, source in sorted((entry, part.path) for part in given for entry in part.entries):
            done = journal.entries.get(entry.number)
            # Whether an earlier call took its duplicates out, and has the same parts before it.
            same = done and (done.input, done.before) == (entry.input, before.hexdigest())
            if done and same and is_intact(partial, done):
                entries.append(done)
            else:
                entries.append(entry)
                if entry.file:
                    _link(source / entry.file, partial / entry.file)
            before.update(entry.input.encode())
            if entry.skipped.get("bad"):
                _link(report_file(source, entry.number), report_file(partial, entry.number))
        if deduplicated:
            entries = deduplicate(partial, entries, journal, chosen)
        return finish(partial, entries, wanted, sources, chosen)

    read = [str(part.path / PART) for part in given]
    make_whole(out, lambda path: wanted.is_ready(path, sources, read), fill)


def _check_parts(given: Sequence[Part]) -> None:
    first, seen = given[0], dict[int, Part]()
    for part in given:
        if part.of != first.of:
            raise UserError(
                f"{part.path}: is part {part.number} of {part.of}, {first.path} part {first.number} of {first.of}; "
                "parts of one corpus have the same N in --shard I/N: prepare one of them again"
            )
        if part.number in seen:
            raise UserError(
                f"{part.path}: is part {part.number} of {part.of}, as {seen[part.number].path}; give each part once"
            )
        seen[part.number] = part
        mine, theirs = ({**each.settings, "tokenizer": _fingerprint(each)} for each in (part, first))
        for name in theirs:
            if mine.get(name) != theirs[name]:
                raise UserError(
                    f"{part.path}: was prepared with {name} {mine.get(name)!r}, {first.path} with {theirs[name]!r}; "
                    "prepare one of them again"
                )
        if part.layout != first.layout:
            raise UserError(
                f"{part.path}: was made of other sources than {first.path} ({part.num_blocks:,} blocks, "
                f"{first.num_blocks:,}), or they changed in between; prepare one of them again"
            )
    if missing := [str(number) for number in range(1, first.of + 1) if number not in seen]:
        shown = ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")
        raise UserError(f"{len(missing)} of {first.of} parts missing: {shown}; prepare and give all of them")


def _fingerprint(part: Part) -> str:
    return tokenizer_from_string(part.tokenizer, str(part.path)).fingerprint


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy, where the file system has no links or is another one."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error

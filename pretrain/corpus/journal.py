"""What is finished of a corpus in the making: an entry for each shard, in a journal that outlives a killed process."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.corpus.store import file_checksum
from pretrain.files import write_whole

JOURNAL = "journal.jsonl"


class ShardEntry(NamedTuple):
    """One block of the sources and the shard that was made of it."""

    number: int
    input: str
    """Checksum of the block."""
    file: str | None
    """The shard; None if nothing in the block is kept."""
    num_sequences: int
    num_tokens: int
    sha256: str
    skipped: dict[str, int]
    """Records left out, by the reason: ``short``, ``long``, ``bad``, ``duplicate``."""
    before: str = ""
    """If duplicates were taken out, a checksum of the blocks before this one, where their first copies are."""

    def listed(self) -> dict[str, Any]:
        """What a manifest says of the shard."""
        return {name: getattr(self, name) for name in ("file", "num_sequences", "num_tokens", "sha256")}


class Journal:
    """The shards that are finished, one line each, in the directory where they are made.

    Args:
        directory: That directory; emptied of what was made with other settings.
        settings: All that the shards depend on besides the sources.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self._path = directory / JOURNAL
        self.entries: dict[int, ShardEntry] = {}
        head = json.dumps(settings)
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:]:
                try:
                    entry = ShardEntry(**json.loads(line))
                except (ValueError, TypeError):  # the line that was being written when the process was killed
                    break
                self.entries[entry.number] = entry
        else:
            for file in directory.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        text = "".join(f"{line}\n" for line in [head, *map(_line, self.entries.values())])
        write_whole(self._path, text, replace=True)

    def add(self, entry: ShardEntry) -> None:
        """Write down a finished shard."""
        self.entries[entry.number] = entry
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{_line(entry)}\n")


def _line(entry: ShardEntry) -> str:
    return json.dumps(entry._asdict())


def report_file(directory: Path, number: int) -> Path:
    """Where the bad records of a block are listed, if it has any."""
    return directory / f"skipped-{number:05d}.tsv"


def is_intact(directory: Path, entry: ShardEntry) -> bool:
    """Whether what was made of a block is still there as it was."""
    if entry.skipped.get("bad") and not report_file(directory, entry.number).is_file():
        return False
    file = directory / entry.file if entry.file else None
    return file is None or (file.is_file() and file_checksum(file) == entry.sha256)

"""`pretrain embed`: a file of vectors from sources of any size, in parts that outlive a killed process.

A *part* is some consecutive records and their vectors: a function of the records, the model and the settings, and of
nothing else. So a call that was interrupted goes on behind its last part, and the file is the same, byte for byte.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pretrain.corpus.sources import SourceOptions, find_sources
from pretrain.downstream.embedding_files import LONGEST_ID, WRITERS, part_checksum, write_part
from pretrain.downstream.load import load, use_device
from pretrain.downstream.pretrained_encoder import PretrainedEncoder, check_choices
from pretrain.downstream.records import TokenizedRecord, read_tokens
from pretrain.errors import UserError
from pretrain.files import atomic_path, only_writer, refuse_existing

PART_TOKENS = {"cpu": 2**17, "cuda": 2**21}
"""Tokens of a part: what an interruption may cost, and enough for packs of about equal lengths."""
PART_BYTES = 2**28
"""A part's vectors take no more memory than this, unless it is a single record."""
_SETTINGS = "settings.json"
_LONG = ("whole", "crop", "refuse")


@dataclass(frozen=True)
class EmbedOptions:
    """What is computed and kept.

    Attributes:
        per: ``sequence`` or ``residue``; see `PretrainedEncoder.embed`.
        pooling: ``mean`` or ``cls``.
        layers: Which hidden states; each becomes a column.
        max_length: Which records are long, in tokens; by default those longer than what the model was trained on.
        long_sequences: What becomes of those: taken ``whole``, ``crop`` (only the first ``max_length`` tokens are read)
            or ``refuse``. By default ``crop`` where ``max_length`` is given, else ``whole``.
        dtype: ``float32`` or ``float16``.

    Raises:
        UserError: If one of them is unknown, or ``max_length`` below 3.
    """

    per: str = "sequence"
    pooling: str = "mean"
    layers: tuple[int, ...] = (-1,)
    max_length: int | None = None
    long_sequences: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choices(self.per, self.pooling, self.max_length)
        if self.long_sequences not in (None, *_LONG):
            raise UserError(f"long_sequences is '{self.long_sequences}'; give one of {', '.join(_LONG)}")
        if self.dtype not in ("float32", "float16"):
            raise UserError(f"dtype is '{self.dtype}'; give float32 or float16")


def embed(
    path: Path,
    sources: Sequence[str],
    out: Path,
    options: EmbedOptions | None = None,
    source_options: SourceOptions | None = None,
    device: str | None = None,
) -> str:
    """Embed every record of some sources into a file, which appears when it is complete.

    Memory does not grow with the sources. An interrupted call is continued by the same one.

    Args:
        path: The model: a run, a checkpoint or a transformers directory.
        sources: As for `pretrain.corpus.prepare.prepare`.
        out: The ``.parquet``, ``.safetensors`` or ``.npz`` file to write.
        options: What is computed and kept.
        source_options: How the sources are read.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.

    Returns:
        What was written, for people.

    Raises:
        UserError: If ``out`` exists or has another suffix, there is no such model or layer, or a record cannot be
            embedded; in regular files all records are looked at before anything is computed.
    """
    options, source_options = options or EmbedOptions(), source_options or SourceOptions()
    if out.suffix not in WRITERS:
        raise UserError(f"{out}: the name must end in one of {', '.join(WRITERS)}, which says what is written")
    refuse_existing(out)
    found = find_sources(sources, source_options)
    model = load(path).to(use_device(device))
    layers = model.resolve_layers(options.layers)
    longest = options.max_length or model.max_length
    long = options.long_sequences or ("crop" if options.max_length else "whole")
    if longest is None and long != "whole":
        raise UserError(f"{path}: does not say how long its training sequences were; give --max_length")

    def records() -> Iterator[TokenizedRecord]:
        limit = None if long == "whole" else longest
        for record in read_tokens(found, model.tokenizer, source_options, limit, long == "crop"):
            if out.suffix != ".parquet" and (size := len(record.id.encode())) > LONGEST_ID:
                raise UserError(
                    f"{out}: the name '{record.id[:20]}...' has {size:,} bytes, {out.suffix} keeps {LONGEST_ID:,} of "
                    "each; choose .parquet, or shorter names"
                )
            yield record

    # A mistake in the last of a million records shows now, not after the hours that the others take.
    regular = all(source.is_regular_file for source in found)
    total = sum(len(record.ids) for record in records()) if regular else None
    settings = {**asdict(options), "layers": layers, "longest": longest, "long": long, "format": out.suffix}
    settings |= {"model": _fingerprint(model), "device": model.embedding.weight.device.type}
    about = {"model": str(path), "layers": json.dumps(layers), "per": options.per}
    about |= {"pooling": options.pooling} if options.per == "sequence" else {}
    progress = _Progress(total, longest)
    with _workplace(out, settings) as place:
        with progress.bar:
            parts = list(_make_parts(model, records(), place, options, layers, progress))
        with atomic_path(out, replace=True) as partial:
            WRITERS[out.suffix](partial, parts, about)
        shutil.rmtree(place)
    what = f"{options.pooling} of each sequence" if options.per == "sequence" else "every residue"
    numbers = f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"
    lines = [
        f"{out}: {progress.records:,} sequences, {progress.tokens:,} tokens; {what}, {numbers} of {path}, "
        f"{model.config.hidden_size} × {options.dtype}"
    ]
    if progress.long:
        lines.append(
            f"  {progress.long:,} longer than {longest:,} tokens: "
            + ("cropped to that" if long == "crop" else "taken whole, though the model was trained on no longer ones")
        )
    return "\n".join(lines)


class _Progress:
    """What has been read, and the progress bar over it."""

    def __init__(self, total: int | None, longest: int | None) -> None:
        self.records = self.tokens = self.long = 0
        self._longest = longest
        self.bar = tqdm(total=total, desc="embedding", unit=" tokens", unit_scale=True, disable=None)

    def add(self, block: Sequence[TokenizedRecord]) -> None:
        self.records += len(block)
        self.tokens += sum(len(record.ids) for record in block)
        self.long += sum(self._longest is not None and record.length > self._longest for record in block)
        self.bar.set_postfix_str(f"{self.records:,} sequences", refresh=False)


def _make_parts(
    model: PretrainedEncoder,
    records: Iterable[TokenizedRecord],
    place: Path,
    options: EmbedOptions,
    layers: Sequence[int],
    progress: _Progress,
) -> Iterator[Path]:
    """The parts, in order; those that are there already stay as they are."""
    names = ["embedding"] if len(layers) == 1 else [f"embedding_{layer}" for layer in layers]
    row_bytes = len(layers) * model.config.hidden_size * 4
    most = PART_TOKENS[model.embedding.weight.device.type]
    for number, block in enumerate(_blocks(records, most, row_bytes, options.per == "residue")):
        file = place / f"part-{number:06d}.arrow"
        checksum = _checksum(block)
        if part_checksum(file) == checksum:
            progress.bar.update(sum(len(record.ids) for record in block))
        else:
            values, offsets = model.embed_tokens(
                [record.ids for record in block], options.per, options.pooling, layers, progress.bar.update
            )
            ids = [record.id for record in block]
            rows = offsets if options.per == "residue" else None
            write_part(file, ids, names, _cast(values, options.dtype), rows, checksum)
        progress.add(block)
        yield file


def _blocks(
    records: Iterable[TokenizedRecord], most: int, row_bytes: int, per_residue: bool
) -> Iterator[list[TokenizedRecord]]:
    block: list[TokenizedRecord] = []
    tokens = size = 0
    for record in records:
        length, row = len(record.ids), row_bytes * (len(record.ids) if per_residue else 1)
        if block and (tokens + length > most or size + row > PART_BYTES):
            yield block
            block, tokens, size = [], 0, 0
        block.append(record)
        tokens, size = tokens + length, size + row
    if block:
        yield block


def _cast(values: NDArray[np.float32], dtype: str) -> NDArray[np.floating]:
    if dtype == "float32":
        return values
    if (largest := float(np.abs(values).max())) > np.finfo(np.float16).max:
        raise UserError(f"a hidden state is {largest:g}, which float16 does not hold; give --dtype float32")
    return values.astype(np.float16)


def _checksum(block: Sequence[TokenizedRecord]) -> str:
    digest = hashlib.sha256(json.dumps([(record.id, len(record.ids)) for record in block]).encode())
    for record in block:
        digest.update(record.ids.tobytes())
    return digest.hexdigest()


def _fingerprint(model: PretrainedEncoder) -> str:
    digest = hashlib.sha256(model.tokenizer.serialize().encode() + repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _workplace(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The directory of the parts, held by this process; emptied of parts that were made with other settings."""
    with only_writer(out):
        refuse_existing(out)
        place = out.with_name(f".{out.name}.parts")
        place.mkdir(exist_ok=True)
        content = json.dumps(settings)
        stored = place / _SETTINGS
        if not stored.is_file() or stored.read_text(encoding="utf-8") != content:
            for file in place.glob("part-*"):
                file.unlink()
            stored.write_text(content, encoding="utf-8")
        try:
            yield place
        except KeyboardInterrupt as interruption:
            if parts := len(list(place.glob("part-*.arrow"))):
                kept = f"what is done is kept ({parts:,} parts)"
                raise KeyboardInterrupt(f"interrupted; {kept}, the same command continues behind it") from interruption
            raise
        finally:
            if not any(place.glob("part-*.arrow")):  # nothing that would be worth keeping
                shutil.rmtree(place, ignore_errors=True)

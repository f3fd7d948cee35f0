"""`pretrain prepare` and `pretrain tokenizer`: what their options ask for together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.corpus.parts import merge_parts, prepare_part
from pretrain.corpus.prepare import Settings, open_split, prepare, prepare_split
from pretrain.corpus.prepare_remote import prepare_remote
from pretrain.corpus.readers import read_records
from pretrain.corpus.remote import is_remote
from pretrain.corpus.remote_files import written_at
from pretrain.corpus.shards import Filters, Portion
from pretrain.corpus.sources import SourceOptions
from pretrain.corpus.split import Split
from pretrain.corpus.store import MANIFEST, REPORT, Corpus
from pretrain.corpus.tokenizer import Tokenizer, TokenizerAlgorithm, load_tokenizer, train_tokenizer
from pretrain.errors import UserError


def run_prepare(
    sources: Sequence[str],
    out: str,
    tokenizer: str,
    options: SourceOptions,
    filters: Filters,
    split: Split | None = None,
    clusters: str | None = None,
    part: str | None = None,
    merge: bool = False,
    workers: int | None = None,
    engine: str = "local",
) -> str:
    """Make a corpus, the two of a split, or a part of one; or join parts.

    Args:
        sources: What to read; with ``merge`` the parts.
        out: The directory to make, or the address of a corpus to make.
        tokenizer: As `load_tokenizer` takes it.
        options: How the sources are read.
        filters: Which sequences are kept.
        split: Make two corpora; see `prepare_split`.
        clusters: A table for an order that visits clusters.
        part: ``I/N``: make that part only; see `prepare_part`.
        merge: Join parts; see `merge_parts`.
        workers: Blocks at a time.
        engine: What maps over them; see `prepare`.

    Returns:
        What to print.

    Raises:
        UserError: If these do not go together; and as the functions named here.
    """
    out = out.removeprefix("file://")
    at_url, place = is_remote(out), Path(out)
    if at_url and (merge or part):
        raise UserError(f"{out}: parts are made and joined in directories; prepare into one, and copy it there")
    if clusters and (merge or part):
        raise UserError("--clusters goes with neither --shard nor --merge; prepare the sources in one call")
    was_there = written_at(f"{out.rstrip('/')}/{MANIFEST}") is not None if at_url else place.exists()
    if merge:
        if (options, replace(filters, deduplicate=False), tokenizer, part) != (
            SourceOptions(),
            Filters(),
            "esm",
            None,
        ):
            raise UserError(
                "--merge takes the parts as they are, with --deduplicate and a split only; give the other options when "
                "the parts are prepared"
            )
        merge_parts([Path(name) for name in sources], place, filters.deduplicate, split, workers, engine)
        return _tell(out, open_split(place) if split else (Corpus(place),), was_there)
    loaded, how = load_tokenizer(tokenizer), (options, filters, workers)
    if part:
        if split:
            raise UserError("a split is made when the parts are joined; give its options with --merge")
        made = prepare_part(sources, place, loaded, Portion.parse(part), *how, engine)
        return (
            f"{out}: {'is ready, ' if was_there else ''}part {made.number} of {made.of}: {made.num_sequences:,} "
            f"sequences of {len(made.entries):,} blocks of {made.num_blocks:,}"
        )
    if at_url:
        settings = Settings(loaded, options, filters, split, clusters)
        return _tell(out, (prepare_remote(sources, out, settings, workers, engine),), was_there)
    if split:
        return _tell(out, prepare_split(sources, place, loaded, split, *how, clusters, engine), was_there)
    return _tell(out, (prepare(sources, place, loaded, *how, clusters, engine),), was_there)


def _tell(out: str, corpora: tuple[Corpus, ...], was_there: bool) -> str:
    lines = []
    for corpus in corpora:
        ready = "is ready, " if was_there else ""
        lines.append(f"{corpus}: {ready}{corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens")
        if corpus.num_clusters:
            lines.append(f"  clusters     {corpus.num_clusters:,}")
    if skipped := corpora[0].skipped:
        report = f"; the bad ones are listed in {out}/{REPORT}" if "bad" in skipped else ""
        lines.append(
            f"  left out     {'  '.join(f'{why} {count:,}' for why, count in sorted(skipped.items()))}{report}"
        )
    return "\n".join(lines)


def train_tokenizer_file(
    sources: Sequence[str | Path],
    out: Path,
    vocab_size: int,
    algorithm: TokenizerAlgorithm = "bpe",
    options: SourceOptions | None = None,
) -> Tokenizer:
    """Train a tokenizer on the records of sources and write it as a ``tokenizer.json``; see `train_tokenizer`.

    Raises:
        UserError: If a source is unreadable, ``out`` exists, or ``vocab_size`` is too small.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name, or remove it first")
    records = (record for source in sources for record in read_records(source, options))
    tokenizer = train_tokenizer((record.text.decode("utf-8", "replace") for record in records), vocab_size, algorithm)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(tokenizer.serialize(), encoding="utf-8")
    partial.rename(out)
    return tokenizer

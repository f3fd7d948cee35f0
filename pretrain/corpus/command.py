"""`pretrain prepare`: what its options ask for together, and what it says at the end."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.corpus.parts import merge_parts, prepare_part
from pretrain.corpus.prepare import open_split, prepare, prepare_split
from pretrain.corpus.shards import Filters, Portion
from pretrain.corpus.sources import SourceOptions
from pretrain.corpus.split import Split
from pretrain.corpus.store import REPORT, Corpus
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.errors import UserError


def run_prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer: str,
    options: SourceOptions,
    filters: Filters,
    split: Split | None = None,
    clusters: str | None = None,
    shard: str | None = None,
    merge: bool = False,
    workers: int | None = None,
    engine: str = "local",
) -> str:
    """Make a corpus, the two of a split, or a part of one; or join parts.

    Args:
        sources: What to read; with ``merge`` the parts.
        out: The directory to make.
        tokenizer: As `load_tokenizer` takes it.
        options: How the sources are read.
        filters: Which sequences are kept.
        split: Make two corpora; see `prepare_split`.
        clusters: A table for an order that visits clusters.
        shard: ``I/N``: make that part only; see `prepare_part`.
        merge: Join parts; see `merge_parts`.
        workers: Blocks at a time.
        engine: What maps over them; see `prepare`.

    Returns:
        What to print.

    Raises:
        UserError: If these do not go together; and as the functions named here.
    """
    was_there = out.exists()
    if clusters and (merge or shard):
        raise UserError("--clusters goes with neither --shard nor --merge; prepare the sources in one call")
    if merge:
        if (options, replace(filters, deduplicate=False), tokenizer, shard) != (
            SourceOptions(),
            Filters(),
            "esm",
            None,
        ):
            raise UserError(
                "--merge takes the parts as they are, with --deduplicate and a split only; give the other options when "
                "the parts are prepared"
            )
        merge_parts([Path(name) for name in sources], out, filters.deduplicate, split, workers, engine)
        return _tell(out, open_split(out) if split else (Corpus(out),), was_there)
    loaded, how = load_tokenizer(tokenizer), (options, filters, workers)
    if shard:
        if split:
            raise UserError("a split is made when the parts are joined; give its options with --merge")
        part = prepare_part(sources, out, loaded, Portion.parse(shard), *how, engine)
        return (
            f"{out}: {'is ready, ' if was_there else ''}part {part.number} of {part.of}: {part.num_sequences:,} "
            f"sequences of {len(part.parts):,} blocks of {part.num_blocks:,}"
        )
    if split:
        return _tell(out, prepare_split(sources, out, loaded, split, *how, clusters, engine), was_there)
    return _tell(out, (prepare(sources, out, loaded, *how, clusters, engine),), was_there)


def _tell(out: Path, corpora: tuple[Corpus, ...], was_there: bool) -> str:
    lines = []
    for corpus in corpora:
        ready = "is ready, " if was_there else ""
        lines.append(f"{corpus.path}: {ready}{corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens")
        if corpus.num_clusters:
            lines.append(f"  clusters     {corpus.num_clusters:,}")
    if skipped := corpora[0].skipped:
        report = f"; the bad ones are listed in {out / REPORT}" if "bad" in skipped else ""
        lines.append(
            f"  left out     {'  '.join(f'{why} {count:,}' for why, count in sorted(skipped.items()))}{report}"
        )
    return "\n".join(lines)

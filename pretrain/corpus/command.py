"""`pretrain prepare` and `pretrain tokenizer`: what their options ask for together."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.corpus.parts import NO_CLUSTERS, merge_parts, prepare_part
from pretrain.corpus.prepare import Settings, open_split, prepare, prepare_split
from pretrain.corpus.prepare_remote import prepare_remote
from pretrain.corpus.readers import read_records
from pretrain.corpus.remote import is_remote
from pretrain.corpus.remote_files import written_at
from pretrain.corpus.shards import Filters, Portion
from pretrain.corpus.sources import SourceOptions
from pretrain.corpus.store import MANIFEST, REPORT, Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer, Tokenizer, TokenizerAlgorithm, train_tokenizer
from pretrain.errors import UserError
from pretrain.files import refuse_existing, write_whole


def run_prepare(
    sources: Sequence[str],
    out: str,
    settings: Settings,
    part: str | None = None,
    merge: bool = False,
    workers: int | None = None,
    engine: str = "local",
) -> str:
    """Make a corpus, the two of a split, or a part of one; or join parts.

    Args:
        sources: What to read; with ``merge`` the parts.
        out: The directory to make, or the address of a corpus to make.
        settings: What else the corpus depends on; with a split, two corpora are made.
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
    was_there = written_at(f"{out.rstrip('/')}/{MANIFEST}") is not None if at_url else place.exists()
    made: tuple[Corpus, ...]
    if merge:
        split, deduplicate = settings.split, settings.filters.deduplicate
        if settings.clusters:
            raise UserError(NO_CLUSTERS)
        rest = Settings(settings.tokenizer, filters=Filters(deduplicate=deduplicate), split=split)
        if part or settings != rest or not isinstance(settings.tokenizer, ProteinTokenizer):
            raise UserError(
                "--merge takes the parts as they are, with --deduplicate and a split only; give the other options when "
                "the parts are prepared"
            )
        merge_parts([Path(name) for name in sources], place, deduplicate, split, workers, engine)
        made = open_split(place) if split else (Corpus(place),)
    elif part:
        one = prepare_part(sources, place, settings, Portion.parse(part), workers, engine)
        return (
            f"{out}: {'is ready, ' if was_there else ''}part {one.number} of {one.of}: {one.num_sequences:,} "
            f"sequences of {len(one.entries):,} blocks of {one.num_blocks:,}"
        )
    elif at_url:
        made = (prepare_remote(sources, out, settings, workers, engine),)
    elif settings.split:
        made = prepare_split(sources, place, settings, workers, engine)
    else:
        made = (prepare(sources, place, settings, workers, engine),)
    return _tell(out, made, was_there)


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
    refuse_existing(out)
    records = (record for source in sources for record in read_records(source, options))
    tokenizer = train_tokenizer((record.text.decode("utf-8", "replace") for record in records), vocab_size, algorithm)
    write_whole(out, tokenizer.serialize())
    return tokenizer

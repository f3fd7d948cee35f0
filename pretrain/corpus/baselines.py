"""What a perplexity is to be compared with, on the very positions that validation asks about."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pretrain.corpus.batch import PackDataset
from pretrain.corpus.blosum import RESIDUES, nats_given_homologue
from pretrain.corpus.counter import Int64
from pretrain.corpus.order import AnyOrder
from pretrain.corpus.packing import Pack
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer

_SAMPLE_TOKENS = 2**26
"""Counting stops after about this many training tokens: more would not change a digit that is shown."""

_CHUNK = 1024
"""Sequences looked up at a time."""

_CHUNK_TOKENS = 2**20
"""Tokens counted at a time, or a sequence more: documents may be long."""

_PRIOR = 10.0
"""Weight, in observations, of the unigram distribution in each bigram context (a Dirichlet prior)."""


class Baselines(NamedTuple):
    """Perplexities on the validation targets.

    Attributes:
        unigram: Perplexity of a predictor that knows only the token frequencies.
        bigram: Perplexity of one that also sees the preceding token.
        blosum62: For proteins, perplexity of one that is told the residue at the aligned position of a homologue; see
            `nats_given_homologue`.
    """

    unigram: float
    bigram: float
    blosum62: float | None = None


def perplexities(train: Corpus, validation: PackDataset, packs: Iterable[Pack], order: AnyOrder) -> Baselines:
    """Score the validation targets with counts from the training corpus.

    The bigram model sees the true left neighbour of each target, even where the language model sees ``<mask>``: a
    baseline that is helped a little, so that beating it means something.

    Args:
        train: Where the counts are from.
        validation: What makes the validation batches.
        packs: The validation packs.
        order: What training visits: it is counted as often as in an epoch, or the first of that in a large corpus.
    """
    size = train.tokenizer.vocab_size
    asked = Counter[int]()  # how often each target behind each neighbour
    for pack in packs:
        left, target = _questions(validation, pack)
        keys, times = np.unique(left * size + target, return_counts=True)
        asked.update(dict(zip(keys.tolist(), times.tolist(), strict=True)))
    wanted = np.array(sorted(asked))
    weights = np.array([asked[key] for key in wanted.tolist()]) / asked.total()
    left, target = np.divmod(wanted, size)

    single = np.ones(size)  # add-one, so that nothing is impossible
    context = np.zeros(size)
    pairs = np.zeros(len(wanted))
    seen = 0
    visits = sum(order.sizes)
    for indices in _chunks(train, order, visits):
        tokens = np.concatenate([train.tokens(index) for index in indices.tolist()]).astype(np.int64)
        before, after = tokens[:-1], tokens[1:]
        inside = (after != train.tokenizer.cls_token_id) & (after != train.tokenizer.eos_token_id)
        before, after = before[inside], after[inside]
        single += np.bincount(after, minlength=size)
        context += np.bincount(before, minlength=size)
        keys = before * size + after
        place = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        pairs += np.bincount(place[wanted[place] == keys], minlength=len(wanted))
        seen += len(tokens)
        if seen > _SAMPLE_TOKENS:
            break
    unigram = single[target] / single.sum()
    bigram = (pairs + _PRIOR * unigram) / (context[left] + _PRIOR)
    told = None
    if isinstance(train.tokenizer, ProteinTokenizer):
        nats = -np.log(single / single.sum())  # for what is none of the twenty
        places = [train.tokenizer.tokens.index(residue) for residue in RESIDUES]
        nats[places] = nats_given_homologue(single[places] / single[places].sum())
        told = float(np.exp(weights @ nats[target]))
    return Baselines(float(np.exp(-weights @ np.log(unigram))), float(np.exp(-weights @ np.log(bigram))), told)


def _chunks(train: Corpus, order: AnyOrder, visits: int) -> Iterator[Int64]:
    """The sequences that the order visits first, as many at a time as fit into a chunk."""
    for first in range(0, visits, _CHUNK):
        _, indices = order(np.arange(first, min(first + _CHUNK, visits)))
        chunk_of = np.cumsum(train.lengths(indices)) // _CHUNK_TOKENS
        yield from np.split(indices, np.flatnonzero(np.diff(chunk_of)) + 1)


def _questions(validation: PackDataset, pack: Pack) -> tuple[Int64, Int64]:
    """The true left neighbours of a pack's targets, and the targets."""
    batch = validation[pack]
    crops = zip(pack.indices.tolist(), pack.starts.tolist(), pack.lengths.tolist(), strict=True)
    # The token before each of a crop's, also where that lies before the crop; what stands before <cls> is never used.
    before = [validation.corpus.tokens(i)[np.arange(start - 1, start + length - 1)] for i, start, length in crops]
    return np.concatenate(before)[batch.target_positions.numpy()].astype(np.int64), batch.targets.numpy()

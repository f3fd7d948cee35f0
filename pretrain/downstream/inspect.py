"""`pretrain inspect`: what a corpus or a run is, in a few lines and a picture."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.split import SIDES
from pretrain.corpus.store import REPORT, Corpus, is_corpus, verify
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.report import summary as fine_tuning_summary
from pretrain.errors import UserError
from pretrain.files import check_suffix
from pretrain.train import ledger
from pretrain.train.changes import is_fine_tuning, read_config
from pretrain.train.logging import METRICS_FILE, read_metrics
from pretrain.train.picture import PICTURE_SUFFIX, drawing
from pretrain.train.report import summary
from pretrain.train.run import CONFIG, Run

_SAMPLE_TOKENS = 2**28
"""Token frequencies are counted on about this many tokens, spread evenly: all of them in a corpus of that size."""

_CHUNK = 2**18


def inspect(path: Path, picture: Path | None = None, check: bool = False) -> str:
    """Describe a corpus (counts, lengths, token composition) or a run (step, latest figures).

    Args:
        path: A corpus or a run directory.
        picture: A PNG to draw into: of a run, its loss and learning-rate curves; of a corpus, its lengths and tokens.
        check: Compare every shard of a corpus with its checksum; that is all, but for a picture that is asked for.

    Returns:
        The description, for people.

    Raises:
        UserError: If ``path`` is neither, there is nothing to draw, ``picture`` does not end in ``.png``, or a shard is
            broken.
    """
    if picture:
        check_suffix(picture, PICTURE_SUFFIX)
    if is_corpus(path) or (check and not (path / CONFIG).is_file()):
        if check:
            shards = verify(path)
            verified = f"{path}: {shards} {'shard' if shards == 1 else 'shards'}, all as the manifest says"
            return f"{verified}\n{inspect(path, picture)}" if picture else verified
        corpus = Corpus(path)
        statistics = _statistics(corpus)
        if picture:
            _draw_corpus(corpus, statistics, picture)
        return _describe_corpus(corpus, statistics)
    if check:
        raise UserError(f"{path}: is a run; --verify checks a corpus")
    if not (path / CONFIG).is_file():
        inside = [str(path / side) for side in SIDES if is_corpus(path / side)]
        hint = f"; it holds {' and '.join(inside)}: name one of these" if inside else ""
        raise UserError(f"{path}: neither a corpus (manifest.json) nor a run ({CONFIG}){hint}")
    run = Run(path)
    rows = read_metrics(path / METRICS_FILE)
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for step, name, value in rows:
        steps, values = curves.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
    if picture:
        if "train/loss" not in curves:
            raise UserError(f"{path}: no train/loss in {METRICS_FILE} yet; nothing to draw")
        _draw(curves, picture, is_fine_tuning(run.config or {}))
    lines = [f"{path}: newest checkpoint after step {run.step}"]
    if run.result:
        told = fine_tuning_summary if "task" in run.result else summary
        return "\n".join([*lines, told(path, run.result)])
    assert run.config is not None
    lines[0] += f" of {run.config['trainer']['max_steps']}"
    lines += [f"  {name:32} {values[-1]:.6g}  (step {steps[-1]})" for name, (steps, values) in sorted(curves.items())]
    command = "finetune" if is_fine_tuning(run.config) else "fit"
    return "\n".join([*lines, f"  continue it   pretrain {command} -c {path}/config.yaml --run {path}"])


def audit(directory: Path) -> str:
    """What `pretrain.train.ledger.audit` finds, of a run of either kind; its errors are the same."""
    path = directory / CONFIG
    fine_tuned = path.is_file() and is_fine_tuning(read_config(path))
    return ledger.audit(directory, FineTuneDataModule if fine_tuned else MLMDataModule)


class _Statistics(NamedTuple):
    """What a corpus holds, of a size that does not grow with it.

    Attributes:
        lengths: The lengths that occur, ascending, in tokens.
        counts: How many sequences have each.
        tokens: How often each token id occurs among those looked at.
        stride: One chunk of tokens in this many was looked at.
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    stride: int

    def quantile(self, share: float) -> int:
        """The length that this share of the sequences does not exceed."""
        place = np.searchsorted(np.cumsum(self.counts), share * self.counts.sum())
        return int(self.lengths[min(int(place), len(self.lengths) - 1)])


def _statistics(corpus: Corpus) -> _Statistics:
    lengths = counts = np.zeros(0, np.int64)
    tokens = np.zeros(corpus.tokenizer.vocab_size, np.int64)
    stride = -(-corpus.num_tokens // _SAMPLE_TOKENS)
    for shard in corpus.shards:
        here, how_many = np.unique(np.diff(shard.offsets), return_counts=True)
        both, place = np.unique(np.concatenate([lengths, here]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, how_many])).astype(np.int64)
        lengths = both
        for first in range(0, len(shard.tokens), _CHUNK * stride):
            tokens += np.bincount(shard.tokens[first : first + _CHUNK], minlength=len(tokens))
    return _Statistics(lengths, counts, tokens, stride)


def _composition(corpus: Corpus, statistics: _Statistics) -> list[tuple[str, float]]:
    """Tokens and their shares, the most frequent first; ``<cls>`` and ``<eos>`` only frame the sequences."""
    tokens = statistics.tokens.astype(np.float64)
    tokens[[corpus.tokenizer.cls_token_id, corpus.tokenizer.eos_token_id]] = 0
    order = np.argsort(-tokens, kind="stable")
    total = max(tokens.sum(), 1)
    return [(corpus.tokenizer.tokens[i], float(tokens[i] / total)) for i in order if tokens[i]]


def _describe_corpus(corpus: Corpus, statistics: _Statistics) -> str:
    shown = "  ".join(
        f"{name} {statistics.quantile(share):,}"
        for name, share in (
            ("min", 0), ("5%", 0.05), ("25%", 0.25), ("50%", 0.5), ("75%", 0.75), ("95%", 0.95), ("max", 1)
        )
    )  # fmt: skip
    tokenizer = corpus.tokenizer
    composition = _composition(corpus, statistics)
    sample = f"  (counted on one part in {statistics.stride})" if statistics.stride > 1 else ""
    lines = [
        f"{corpus.path}: {corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens",
        f"  lengths      {shown}  (tokens, <cls> and <eos> included)",
        f"  tokens       {'  '.join(f'{token} {share:.2%}' for token, share in composition[:25])}"
        + (f"  and {len(composition) - 25:,} more" if len(composition) > 25 else "")
        + sample,
        f"  tokenizer    {tokenizer.name}, {tokenizer.vocab_size} ids, {tokenizer.fingerprint}",
        f"  shards       {len(corpus.manifest['shards'])}, {corpus.manifest['dtype']}",
        f"  fingerprint  {corpus.fingerprint}",
    ]
    if corpus.num_clusters:
        lines.append(f"  clusters     {corpus.num_clusters:,}: an epoch visits each once, by one of its sequences")
    if skipped := corpus.skipped:
        is_side = "split" in corpus.prepared  # what was left out was so before the split
        both = " (train and validation together)" if is_side else ""
        listed = corpus.path.absolute().parent / REPORT if is_side else REPORT
        report = f"; the bad ones are listed in {listed}" if "bad" in skipped else ""
        counts = "  ".join(f"{reason} {n:,}" for reason, n in sorted(skipped.items()))
        lines.append(f"  left out     {counts}{both}{report}")
    return "\n".join(lines)


def _draw_corpus(corpus: Corpus, statistics: _Statistics, picture: Path) -> None:
    with drawing(picture, (8.3, 8.3), rows=2) as (above, below):
        _plot_corpus(corpus, statistics, above, below)


def _plot_corpus(corpus: Corpus, statistics: _Statistics, above: Any, below: Any) -> None:
    above.figure.suptitle(f"{corpus.path.name}: {corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens")
    lengths, counts = statistics.lengths, statistics.counts
    bins = np.unique(np.geomspace(max(lengths[0], 1), lengths[-1] + 1, 60).astype(int))
    above.hist(lengths, bins=bins, weights=counts, color="tab:blue")
    above.set(xlabel="length (tokens, <cls> and <eos> included)", ylabel="sequences", xscale="log")
    above.xaxis.set_major_formatter("{x:,.0f}")
    for name, share in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95)):
        length = statistics.quantile(share)
        above.axvline(length, color="black", linewidth=0.8, linestyle=":")
        place = above.get_xaxis_transform()
        above.text(length, 1.0, f"{name}: {length:,}", transform=place, ha="center", va="bottom", fontsize=8)
    composition = _composition(corpus, statistics)[:40]
    names = [repr(token)[1:-1] for token, _ in composition]
    below.bar(range(len(names)), [100 * share for _, share in composition], color="tab:orange")
    below.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 90)
    below.set(xlabel="token" if len(names) < 40 else "token (the 40 most frequent)", ylabel="% of the tokens")


def _draw(curves: dict[str, tuple[list[int], list[float]]], picture: Path, fine_tuning: bool) -> None:
    # The learning rate stands under the name that the user gave the scheduler: the one metric without a room's prefix.
    rates = [name for name in curves if "/" not in name or name.startswith("lr-")]
    with drawing(picture, (10, 3.6), columns=2) as (left, right):
        steps, losses = curves["train/loss"]
        left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        left.plot(
            steps[window - 1 :],
            smooth,
            color="tab:blue",
            label=f"train (mean of {window} steps)" if window > 1 else "train",
        )
        if "val/loss" in curves:
            left.plot(
                *curves["val/loss"],
                "o-",
                color="tab:orange",
                label="validation" if fine_tuning else "validation (all <mask>)",
            )
        left.set(xlabel="optimizer step", ylabel="loss" if fine_tuning else "loss (nats per masked token)")
        left.legend(frameon=False)
        for name in rates:
            right.plot(*curves[name], label=name)
        right.set(xlabel="optimizer step", ylabel="learning rate")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        right.legend(frameon=False)

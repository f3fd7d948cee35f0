"""`pretrain inspect`: what a corpus or a run is, in a few lines and a picture."""

from pathlib import Path

import numpy as np

from pretrain.corpus.store import Corpus, is_corpus
from pretrain.errors import UserError
from pretrain.train.logging import METRICS_FILE, read_metrics
from pretrain.train.picture import drawing
from pretrain.train.report import summary
from pretrain.train.run import CONFIG, Run


def inspect(path: Path, picture: Path | None = None) -> str:
    """Describe a corpus (counts, lengths) or a run (step, latest figures).

    Args:
        path: A corpus or a run directory.
        picture: For a run, a PNG to draw its loss and learning-rate curves into.

    Returns:
        The description, for people.

    Raises:
        UserError: If ``path`` is neither, or there is nothing to draw.
    """
    if is_corpus(path):
        if picture:
            raise UserError(f"{path}: is a corpus; --picture draws the curves of a run")
        return _describe_corpus(Corpus(path))
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: neither a corpus (manifest.json) nor a run ({CONFIG})")
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
        _draw(curves, picture)
    lines = [f"{path}: newest checkpoint after step {run.step}"]
    if run.result:
        return "\n".join([*lines, summary(path, run.result)])
    lines += [f"  {name:32} {values[-1]:.6g}  (step {steps[-1]})" for name, (steps, values) in sorted(curves.items())]
    return "\n".join(lines)


def _describe_corpus(corpus: Corpus) -> str:
    lengths = corpus.lengths(np.arange(len(corpus)))
    quantiles = np.quantile(lengths, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).astype(int)
    shown = "  ".join(
        f"{name} {value}"
        for name, value in zip(("min", "5%", "25%", "50%", "75%", "95%", "max"), quantiles, strict=True)
    )
    tokenizer = corpus.tokenizer
    return "\n".join(
        [
            f"{corpus.path}: {corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens",
            f"  lengths      {shown}",
            f"  tokenizer    {tokenizer.name}, {tokenizer.vocab_size} ids, {tokenizer.fingerprint}",
            f"  shards       {len(corpus.manifest['shards'])}, {corpus.manifest['dtype']}",
            f"  fingerprint  {corpus.fingerprint}",
        ]
    )


def _draw(curves: dict[str, tuple[list[int], list[float]]], picture: Path) -> None:
    # The learning rate stands under the name that the user gave the scheduler: the one metric without a room's prefix.
    rates = [name for name in curves if "/" not in name or name.startswith("lr-")]
    with drawing(picture, width=10, columns=2) as (left, right):
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
            left.plot(*curves["val/loss"], "o-", color="tab:orange", label="validation (all <mask>)")
        left.set(xlabel="optimizer step", ylabel="loss (nats per masked token)")
        left.legend(frameon=False)
        for name in rates:
            right.plot(*curves[name], label=name)
        right.set(xlabel="optimizer step", ylabel="learning rate")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        right.legend(frameon=False)

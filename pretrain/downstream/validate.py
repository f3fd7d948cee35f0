"""`pretrain validate`: what a model's loss and perplexity are on sequences, as a training run's validation asks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pretrain.corpus.batch import PackDataset
from pretrain.corpus.datamodule import validation_planner
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.packed import MAX_TOKENS_PER_SEQUENCE
from pretrain.corpus.packing import validation_packs
from pretrain.downstream.load import load_masked_lm, settings_of, use_device
from pretrain.downstream.pretrained_encoder import PACK_TOKENS, PretrainedEncoder
from pretrain.errors import UserError
from pretrain.files import check_suffix, refuse_existing, write_whole
from pretrain.model.encoder import check_finite
from pretrain.train.validation import Findings, Tally


def validate(
    path: Path,
    sources: Sequence[str] = (),
    max_length: int | None = None,
    long_sequences: str | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> str:
    """Ask a model about masked positions of sequences: those that `pretrain fit` would ask about.

    Args:
        path: The model: a run (its newest checkpoint), a checkpoint or a transformers directory.
        sources: Files, patterns or directories of sequences, or a corpus; by default a run's own validation sets.
        max_length: Tokens of a sequence that are seen; by default as many as in training, or all where that is unknown.
        long_sequences: Whether longer ones are ``crop``-ped to a random window, always the same one, or ``split``; by
            default as the run did, or cropped.
        out: A JSON file for the figures, with those by length and by token.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.

    Returns:
        The figures, for people. Those of a run's last checkpoint on its own validation set are its ``val/loss``, ...,
        unless ``trainer.limit_val_batches`` left a part out.

    Raises:
        UserError: If there is no model or no sequence, a setting is none of those above, ``out`` exists, or a loss is
            not finite.
    """
    if out:
        check_suffix(out, ".json")
        refuse_existing(out)
    model = load_masked_lm(path)
    data = settings_of(path).get("data", {})
    sets = {"": list(sources)} if sources else _own_sets(path, data)
    longest = model.max_length if max_length is None else max_length
    if longest is not None and longest < 3:
        raise UserError(f"max_length is {longest}; give at least 3 tokens: <cls>, a residue, <eos>")
    how = long_sequences or data.get("long_sequences", "crop")
    if how not in ("crop", "split"):
        raise UserError(f"long_sequences is '{how}'; give crop or split")
    if how == "split" and longest is None:
        raise UserError("how long the model's sequences may be is not known; give --max_length with split")
    model.to(use_device(device))
    lines, figures = [], {}
    for name, given in sets.items():
        found, sequences = _ask(model, given, longest, how == "split")
        figures[name] = {"sources": given, "sequences": sequences, **found.figures(model.tokenizer.tokens)}
        lines += _lines(name or ", ".join(given), sequences, found)
    if out:
        told = {"model": str(path), "max_length": longest, "long_sequences": how, "validation": figures}
        write_whole(out, json.dumps(told, indent=1) + "\n")
        lines.append(f"{out}: these, by length and by token")
    return "\n".join(lines)


def _own_sets(path: Path, data: dict[str, Any]) -> dict[str, list[str]]:
    given = data.get("validation")
    if not given:
        raise UserError(f"{path}: names no validation set of its own; give the sequences, as in `validate MODEL FILE`")
    sets = given if isinstance(given, dict) else {"": given}
    return {name: [sources] if isinstance(sources, str) else sources for name, sources in sets.items()}


@torch.inference_mode()
def _ask(model: PretrainedEncoder, sources: list[str], max_length: int | None, split: bool) -> tuple[Findings, int]:
    corpus = open_or_prepare(sources, model.tokenizer, max_length if split else None)
    planner = validation_planner(corpus, model.tokenizer, max_length or MAX_TOKENS_PER_SEQUENCE)
    device = model.embedding.weight.device
    (packs,) = validation_packs(planner, PACK_TOKENS[device.type], 1)
    batches = PackDataset(corpus, planner.masking)
    tally = Tally(model.config.vocab_size)
    with tqdm(
        total=sum(int(pack.lengths.sum()) for pack in packs), desc="validating", unit="token", leave=False
    ) as bar:
        for pack in packs:
            batch = batches[pack].to(device)
            with model.precision():
                losses, predictions = model.score(
                    batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
                )
            tally.add(batch, check_finite(losses), predictions)
            bar.update(len(batch.input_ids))
    return tally.collect(), len(corpus)


def _lines(name: str, sequences: int, found: Findings) -> list[str]:
    return [
        f"{name}: {sequences:,} sequences, {found.targets:,} masked positions",
        f"  loss         {float(found.loss):.4f}",
        f"  perplexity   {float(found.loss.exp()):.3f}",
        f"  accuracy     {float(found.accuracy):.2%}",
    ]

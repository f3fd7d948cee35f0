"""Static shapes: padding changes the shapes of a batch, and nothing else."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain import Encoder, EncoderConfig
from pretrain.corpus.batch import Batch
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.masking import Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Planner, Position, share_out
from pretrain.corpus.padding import IGNORED, StaticShape, static_shapes

STEPS = 40


def batches(source: Path, *, static: bool, accumulate: int = 2, **options: Any) -> list[Batch]:
    given = {"max_length": 64, "global_batch_tokens": 1024, "attention_cost": 0.0, "seed": 7, **options}
    data = MLMDataModule(str(source), static_shapes=static, **given)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=accumulate,
        max_steps=STEPS,
        global_step=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup("fit")
    return list(islice(data.train_dataloader(), STEPS * accumulate))


@pytest.fixture(params=[2, 4])
def pairs(request: pytest.FixtureRequest, proteins: Path) -> list[tuple[Batch, Batch]]:
    """Each batch of forty steps as it is, and padded."""
    plain, padded = (batches(proteins, static=static, accumulate=request.param) for static in (False, True))
    return list(zip(plain, padded, strict=True))


@pytest.mark.parametrize(
    "masking", [{"mask_draws": "independent"}, {"mlm_probability": (0.1, 0.5)}, {"mask_unit": "span"}], ids=str
)
def test_batches_with_random_numbers_of_targets_fit_the_shapes(proteins: Path, masking: dict[str, Any]) -> None:
    plain, padded = (batches(proteins, static=static, **masking) for static in (False, True))
    assert len({(len(batch.input_ids), len(batch.targets)) for batch in padded}) <= 3
    for batch, filled in zip(plain, padded, strict=True):
        real = filled.targets != IGNORED
        assert filled.targets[real].equal(batch.targets)
        assert filled.target_positions[real].equal(batch.target_positions)
        assert filled.pack.targets.sum() == batch.pack.targets.sum() == len(batch.targets)


def test_real_tokens_come_first_and_unchanged(pairs: list[tuple[Batch, Batch]]) -> None:
    for plain, padded in pairs:
        tokens, rows, bounds = len(plain.input_ids), len(plain.targets), len(plain.cu_seqlens)
        assert padded.input_ids[:tokens].equal(plain.input_ids)
        assert padded.cu_seqlens[:bounds].equal(plain.cu_seqlens)
        assert padded.target_positions[:rows].equal(plain.target_positions)
        assert padded.targets[:rows].equal(plain.targets)
        assert padded.pack.lengths.sum() == tokens, "padding is never counted"


def test_padding_is_sequences_of_its_own_and_asks_nothing(pairs: list[tuple[Batch, Batch]]) -> None:
    for plain, padded in pairs:
        tokens, rows = len(plain.input_ids), len(plain.targets)
        assert (padded.input_ids[tokens:] == 1).all()
        assert (padded.targets[rows:] == IGNORED).all()
        assert (padded.target_positions[rows:] >= tokens).all()
        assert (padded.target_positions.diff() > 0).all()
        assert padded.cu_seqlens.diff().min() >= 0
        assert padded.cu_seqlens.diff().max() <= padded.max_seqlen == 64
        assert padded.cu_seqlens[-1] == len(padded.input_ids)
        assert padded.cu_seqlens.dtype == torch.int32


def test_there_are_at_most_three_shapes(pairs: list[tuple[Batch, Batch]]) -> None:
    shapes = {(len(b.input_ids), len(b.targets), len(b.cu_seqlens), b.max_seqlen) for _, b in pairs}
    assert 1 <= len(shapes) <= 3
    assert len({len(plain.input_ids) for plain, _ in pairs}) > 10, "unpadded, nearly every pack differs"


def test_nearly_all_packs_fit_the_first_shape_and_are_full() -> None:
    """At a real size: packs of 16,384 tokens of 350 on average."""
    generator = np.random.default_rng(0)
    first, *_ = static_shapes(16_384, 350, 1024, 0.15)
    fits, filled = [], []
    for _ in range(200):
        lengths = np.minimum(generator.lognormal(5.65, 0.65, 400).astype(int) + 2, 1024)
        lengths = lengths[lengths.cumsum() <= 16_384]
        targets = np.floor(0.15 * (lengths - 2) + generator.random(len(lengths))).astype(int)
        batch = bare_batch(lengths, targets)
        fits.append(first.holds(batch))
        filled.append(len(batch.input_ids) / first.tokens)
    assert np.mean(fits) > 0.99
    assert np.mean(filled) > 0.95


@pytest.mark.parametrize("packs", [4, 128])
def test_98_percent_of_the_slots_of_planned_packs_are_filled(packs: int) -> None:
    """Steps cut from an order over protein-like lengths and shared out into packs of 16,384 tokens."""
    table = np.clip(np.random.default_rng(0).lognormal(5.65, 0.65, 100_000).astype(np.int64) + 2, 20, 5000)
    corpus: Any = SimpleNamespace(num_sequences=len(table), lengths=lambda indices: table[indices])
    planner = Planner(corpus, Order(len(table), 1), Masking(0.15, 0.8, 0.1, 32, np.arange(4, 24), 1), 1024)
    shapes = static_shapes(16_384, planner.mean_length, 1024, 0.15, planner.masking.deviation(16_384, 350))
    position, real, slots = Position(), 0, 0
    for _ in range(800 // packs):
        step = planner.step(position, 16_384 * packs)
        for pack in share_out(step, packs, attention_cost=0.0):
            batch = bare_batch(pack.lengths, pack.targets)
            real += len(batch.input_ids)
            slots += next(shape.tokens for shape in shapes if shape.holds(batch))
        position = step.after
    assert real / slots >= 0.98


def test_a_batch_that_no_shape_holds_stays_as_it_is(proteins: Path) -> None:
    assert not StaticShape(tokens=100, targets=20, sequences=9, max_length=64).holds(bare_batch([60, 41], [9, 6]))
    assert not StaticShape(tokens=128, targets=14, sequences=9, max_length=64).holds(bare_batch([60, 41], [9, 6]))
    assert not StaticShape(tokens=128, targets=20, sequences=2, max_length=64).holds(bare_batch([60, 41], [9, 6]))
    assert StaticShape(tokens=128, targets=20, sequences=3, max_length=64).holds(bare_batch([60, 41], [9, 6]))
    assert StaticShape(tokens=104, targets=20, sequences=9, max_length=64).holds(bare_batch([60, 41], [9, 6]))


@pytest.mark.parametrize("tokens", [101, 103, 128])
def test_rows_that_padding_has_no_place_for_take_tokens_that_are_no_target(tokens: int) -> None:
    batch = bare_batch([60, 41], [9, 6])
    batch.target_positions = torch.arange(0, 90, 6)
    batch.targets = torch.arange(15)
    shape = StaticShape(tokens=tokens, targets=24, sequences=9, max_length=64)
    assert shape.holds(batch)
    padded = shape.pad(batch, pad_token_id=1)
    assert len(padded.target_positions) == len(padded.targets) == 24
    assert (padded.target_positions.diff() > 0).all()
    real = padded.targets != IGNORED
    assert padded.target_positions[real].equal(batch.target_positions)
    assert padded.targets[real].equal(batch.targets)


@pytest.mark.parametrize("room", [0, 1, 63, 64, 65, 128, 130])
def test_padding_of_any_length_is_cut_into_sequences(room: int) -> None:
    batch = bare_batch([60, 41], [9, 6])
    padded = StaticShape(tokens=101 + room, targets=15, sequences=7, max_length=64).pad(batch, pad_token_id=1)
    assert len(padded.cu_seqlens) == 8
    lengths = padded.cu_seqlens.diff().tolist()
    assert lengths[:2] == [60, 41]
    assert sum(lengths[2:]) == room
    assert max(lengths[2:]) <= 64


def bare_batch(lengths: Any, targets: Any) -> Batch:
    tokens, rows = int(np.sum(lengths)), int(np.sum(targets))
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    zeros, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
    inputs = torch.zeros(tokens, dtype=torch.int64)
    return Batch(inputs, cu_seqlens, positions, zeros, int(np.max(lengths)), None)  # type: ignore[arg-type]


def test_loss_and_gradients_are_those_without_padding(pairs: list[tuple[Batch, Batch]]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)).double()
    for plain, padded in pairs[:3]:
        (loss, gradients), (expected, theirs) = (run(encoder, batch) for batch in (padded, plain))
        torch.testing.assert_close(loss, expected)
        for ours, reference in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(ours, reference)


def run(encoder: Encoder, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    encoder.zero_grad()
    loss = encoder.loss(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


def test_the_loss_is_that_of_the_logits(pairs: list[tuple[Batch, Batch]]) -> None:
    encoder = Encoder(EncoderConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2))
    batch, _ = pairs[0]
    logits = encoder(batch.input_ids, batch.cu_seqlens, None, batch.target_positions)
    loss, _ = run(encoder, batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.targets, reduction="sum").detach())

"""The audit fails when training consumed anything else than the order says, and holds over kills and restarts."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_resume import kill

from pretrain.cli import main
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Pack, PackSampler
from pretrain.errors import UserError
from pretrain.train.ledger import _Visits


def audit(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and last line of ``pretrain inspect --audit``."""
    capsys.readouterr()
    code = main(["inspect", str(run), "--audit"])
    output = capsys.readouterr()
    return code, (output.err if code else output.out).strip().splitlines()[-1]


def drop(packs: list[Pack]) -> list[Pack]:
    return packs[:5] + packs[6:]


def double(packs: list[Pack]) -> list[Pack]:
    return packs[:5] + packs[4:]


def crop(packs: list[Pack]) -> list[Pack]:
    starts = packs[5].starts.copy()
    starts[np.argmax(starts)] -= 1
    return [*packs[:5], dataclasses.replace(packs[5], starts=starts), *packs[6:]]


def swap_epochs(packs: list[Pack]) -> list[Pack]:
    return [*packs[:5], dataclasses.replace(packs[5], epochs=packs[5].epochs + 1), *packs[6:]]


@pytest.mark.parametrize("mistake", [drop, double, crop, swap_epochs])
def test_a_pack_lost_doubled_or_cropped_otherwise_fails_the_audit_at_its_step(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: Callable[[list[Pack]], list[Pack]],
) -> None:
    packs_of = PackSampler.__iter__

    def packs_with_mistake(sampler: PackSampler) -> Iterator[Pack]:
        sampler.max_steps += 1  # so that there is one more to give where one was dropped
        yield from mistake(list(packs_of(sampler)))

    monkeypatch.setattr(PackSampler, "__iter__", packs_with_mistake)
    run = tmp_path / "run"
    assert main(["fit", "-c", str(tiny(validate_every_n_steps=10)), "--run", str(run)]) == 0
    code, message = audit(run, capsys)
    assert code == 2
    assert "step 2 differs" in message  # two packs a step: those at 4 and 5 are of step 2


@pytest.mark.parametrize("warmup", [None, {"first": 256, "tokens": 10_000}], ids=["equal steps", "growing steps"])
def test_the_audit_passes_over_kills_and_counts_every_epoch(
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    warmup: dict[str, int] | None,
) -> None:
    run = tmp_path / "run"
    config = tiny(trainer__max_steps=60, validate_every_n_steps=14, data__batch_warmup=warmup)
    for moment, number in [("save", 2), ("batch_end", 44), ("validation", 1)]:
        assert fit("-c", config, "--run", run, *kill(moment, number)) == -9
    assert fit("-c", config, "--run", run, "--trainer.accumulate_grad_batches", 4) == 0
    code, message = audit(run, capsys)
    assert code == 0, message
    assert "60 steps" in message
    assert "each epoch's sequences consumed exactly once" in message
    lines = (run / "ledger.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(60))]
    assert sum(int(line.split(",")[1]) for line in lines[1:]) > 3 * 150, "less than three epochs: the test is too short"


def test_the_ledger_is_on_the_disk_before_the_checkpoint_is(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", tiny(checkpoint__in_background=False)  # so that nothing goes on beside the writing
    assert fit("-c", config, "--run", run, *kill("saved", 1)) == -9
    assert "3 steps" in audit(run, capsys)[1]
    assert fit("-c", config, "--run", run) == 0
    assert "10 steps" in audit(run, capsys)[1]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1], [2, 1]], "repeats sequences within epoch 0"),
        ([[0, 1, 1]], "repeats sequences within epoch 0"),
        ([[0, 1, 2, 3], [5, 6]], "leaves sequences of epoch 0 out"),
        ([[0, 1, 2, 5, 6]], "leaves sequences of epoch 0 out"),
        ([[0, 1, 2, 3, 4], [10]], "leaves sequences of epoch 0 out"),
    ],
    ids=["repeated later", "repeated at once", "omitted", "the next epoch too early", "an epoch omitted"],
)
def test_the_audit_notices_an_order_that_does_not_visit_everything_once_an_epoch(
    positions: list[list[int]], message: str
) -> None:
    order = Order(5, seed=1)
    visits = _Visits(order)
    *sound, defective = positions
    for step in sound:
        visits.add(*order(step))
    with pytest.raises(UserError, match=message):
        visits.add(*order(defective))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_ledger_that_was_tampered_with_fails_the_audit(
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(), "--run", run) == 0
    lines = (run / "ledger.csv").read_text().splitlines(keepends=True)
    line = lines.pop(5)  # of step 4
    if damage == "changed":
        lines.insert(5, line.replace(line[-2], "0" if line[-2] != "0" else "1"))
    (run / "ledger.csv").write_text("".join(lines))
    code, message = audit(run, capsys)
    assert code == 2
    assert "step 4 differs" in message

"""`InverseSqrtScheduler` at every boundary, with the numbers written out, and against fairseq's formula."""

import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from pretrain.errors import UserError
from pretrain.train.schedule import InverseSqrtScheduler


def optimizer(*peaks: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks or (4e-4,)])


def rates(schedule: InverseSqrtScheduler, steps: int, group: int = 0) -> list[float]:
    """The learning rates that steps 1, 2, ... are taken with, the first of them after no step."""
    seen = []
    for _ in range(steps):
        seen.append(schedule.optimizer.param_groups[group]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return seen


def fairseq(steps_taken: int, peak: float, warmup: int, warmup_init_lr: float = 0.0) -> float:
    """fairseq/optim/lr_scheduler/inverse_square_root_schedule.py, ``step_update``."""
    lr_step = (peak - warmup_init_lr) / warmup
    decay_factor = peak * warmup**0.5
    if steps_taken < warmup:
        return warmup_init_lr + steps_taken * lr_step
    return decay_factor * steps_taken**-0.5


@pytest.mark.parametrize(
    ("steps_taken", "rate"),
    [(0, 0.0), (1, 2e-7), (1000, 2e-4), (1999, 3.998e-4), (2000, 4e-4), (2001, 3.99900037e-4), (8000, 2e-4)],
)
def test_esm2_learning_rate_at_each_boundary(steps_taken: int, rate: float) -> None:
    schedule = InverseSqrtScheduler(optimizer(4e-4), warmup_steps=2000)
    assert rates(schedule, steps_taken + 1)[-1] == pytest.approx(rate, rel=1e-8, abs=0)


@pytest.mark.parametrize(
    ("steps_taken", "rate"), [(0, 1e-7), (1, 1.009e-5), (9, 9.001e-5), (10, 1e-4), (11, 9.534625892e-5), (40, 5e-5)]
)
def test_warmup_begins_at_warmup_init_lr(steps_taken: int, rate: float) -> None:
    schedule = InverseSqrtScheduler(optimizer(1e-4), 10, warmup_init_lr=1e-7)
    assert rates(schedule, steps_taken + 1)[-1] == pytest.approx(rate, rel=1e-8)


@pytest.mark.parametrize("warmup_init_lr", [0.0, 1e-7, 5e-3])
@pytest.mark.parametrize("warmup", [1, 2, 7, 100])
def test_every_rate_is_fairseqs(warmup: int, warmup_init_lr: float) -> None:
    schedule = InverseSqrtScheduler(optimizer(1e-3), warmup, warmup_init_lr=warmup_init_lr)
    expected = [fairseq(step, 1e-3, warmup, warmup_init_lr) for step in range(4 * warmup + 2)]
    assert rates(schedule, 4 * warmup + 2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [1, 3, 10, 2000])
def test_the_peak_is_reached_exactly_when_the_warmup_ends(warmup: int) -> None:
    schedule = InverseSqrtScheduler(optimizer(4e-4), warmup, warmup_init_lr=1e-7)
    assert rates(schedule, warmup + 1)[-1] == 4e-4


def test_without_warmup_the_first_two_steps_have_the_peak_then_it_decays() -> None:
    """Where fairseq divides by zero: peak / sqrt(max(n, 1)); a floor of the warmup has no meaning."""
    for floor in (0.0, 1e-2):
        schedule = InverseSqrtScheduler(optimizer(1.0), warmup_steps=0, warmup_init_lr=floor)
        assert rates(schedule, 17)[:5] == pytest.approx([1.0, 1.0, 0.70710678, 0.57735027, 0.5])
        assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(1 / 17**0.5)


def test_each_parameter_group_goes_to_its_own_peak_from_the_common_floor() -> None:
    schedule = InverseSqrtScheduler(optimizer(1e-3, 4e-3), warmup_steps=4, warmup_init_lr=2e-4)
    assert schedule.get_last_lr() == pytest.approx([2e-4, 2e-4])
    rates(schedule, 2)
    assert schedule.get_last_lr() == pytest.approx([6e-4, 2.1e-3])
    rates(schedule, 2)
    assert schedule.get_last_lr() == pytest.approx([1e-3, 4e-3])
    rates(schedule, 12)
    assert schedule.get_last_lr() == pytest.approx([5e-4, 2e-3])


def test_a_group_that_does_not_learn_stays_so() -> None:
    schedule = InverseSqrtScheduler(optimizer(0.0, 1.0), warmup_steps=3)
    assert rates(schedule, 10) == [0.0] * 10


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 20])
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_restored_schedule_continues_exactly(warmup: int, stop: int) -> None:
    uninterrupted = rates(InverseSqrtScheduler(optimizer(0.3), warmup, warmup_init_lr=0.01), 40)
    first = InverseSqrtScheduler(optimizer(0.3), warmup, warmup_init_lr=0.01)
    before = rates(first, stop)
    saved = io.BytesIO()
    torch.save({"optimizer": first.optimizer.state_dict(), "schedule": first.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)  # plain values only
    restored = InverseSqrtScheduler(optimizer(0.3), warmup, warmup_init_lr=0.01)
    restored.optimizer.load_state_dict(state["optimizer"])
    restored.load_state_dict(state["schedule"])
    assert before + rates(restored, 40 - stop) == uninterrupted


@pytest.mark.parametrize("steps_taken", [1, 4, 5, 6, 20])
@pytest.mark.parametrize("warmup", [0, 5])
def test_last_epoch_continues_after_the_steps_that_were_taken(warmup: int, steps_taken: int) -> None:
    """As with any of torch's schedules, ``last_epoch`` is the number of steps taken less one."""
    uninterrupted = InverseSqrtScheduler(optimizer(0.3), warmup, warmup_init_lr=0.01)
    expected = rates(uninterrupted, 30)[steps_taken:]
    old = InverseSqrtScheduler(optimizer(0.3), warmup, warmup_init_lr=0.01)
    rates(old, steps_taken)
    resumed = InverseSqrtScheduler(old.optimizer, warmup, last_epoch=steps_taken - 1, warmup_init_lr=0.01)
    assert resumed.last_epoch == steps_taken
    assert rates(resumed, 30 - steps_taken) == expected


def test_get_last_lr_is_the_optimizers_rate_at_every_step() -> None:
    schedule = InverseSqrtScheduler(optimizer(1e-3, 2e-3), 3)
    for _ in range(8):
        assert schedule.get_last_lr() == [group["lr"] for group in schedule.optimizer.param_groups]
        schedule.optimizer.step()
        schedule.step()


def test_it_is_one_of_torchs_lambda_schedules_and_drives_any_optimizer() -> None:
    schedule = InverseSqrtScheduler(AdamW([nn.Parameter(torch.ones(2))], lr=1.0), 2)
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    assert rates(schedule, 3) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("settings", [{"warmup_steps": -1}, {"warmup_steps": 3, "warmup_init_lr": -1e-7}])
def test_negative_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="neither can be negative"):
        InverseSqrtScheduler(optimizer(), **settings)  # type: ignore[arg-type]

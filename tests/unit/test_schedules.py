"""The schedules beside inverse square root: every number against its reference, every boundary written out."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from pretrain.errors import UserError
from pretrain.train.schedule import (
    Constant,
    CosineDecay,
    InverseSqrtScheduler,
    LinearDecay,
    Schedule,
    ShapedScheduler,
    WarmupStableDecay,
    advance,
    restore,
)

PEAK = 4e-4


def optimizer(*peaks: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks or (PEAK,)])


def walk(scheduler: LRScheduler) -> Iterator[float]:
    while True:
        yield scheduler.optimizer.param_groups[0]["lr"]
        scheduler.optimizer.step()
        scheduler.step()


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """The rates that steps 1, 2, ... are taken with, the first of them after no step."""
    return [rate for rate, _ in zip(walk(scheduler), range(steps), strict=False)]


def shaped(schedule: Schedule, warmup: int = 10, total: int = 100, **options: float) -> ShapedScheduler:
    return ShapedScheduler(optimizer(), schedule, warmup, total, **options)  # type: ignore[arg-type]


def fairseq_polynomial_decay(step: int, peak: float, end: float, warmup: int, total: int) -> float:
    """fairseq/optim/lr_scheduler/polynomial_decay_schedule.py, ``step_update`` with power 1."""
    if warmup > 0 and step <= warmup:
        return step / warmup * peak
    if step >= total:
        return end
    remaining = 1 - (step - warmup) / (total - warmup)
    return (peak - end) * remaining + end


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_linear_decay_is_fairseqs_with_esm2s_floor_at_nine_tenths(warmup: int) -> None:
    expected = [fairseq_polynomial_decay(step, PEAK, PEAK / 10, warmup, 90) for step in range(121)]
    if warmup == 0:
        expected[0] = PEAK
    assert rates(shaped(LinearDecay(), warmup), 121) == pytest.approx(expected, rel=1e-12)


REFERENCES: dict[str, tuple[Schedule, Callable[[Optimizer, int, int], LRScheduler]]] = {
    "linear": (LinearDecay(0.0, 1.0), get_linear_schedule_with_warmup),
    "cosine": (CosineDecay(), get_cosine_schedule_with_warmup),
    "cosine to a floor": (
        CosineDecay(0.1),
        lambda o, warmup, total: get_cosine_with_min_lr_schedule_with_warmup(o, warmup, total, min_lr_rate=0.1),
    ),
    "constant": (Constant(), lambda o, warmup, total: get_constant_schedule_with_warmup(o, warmup)),
    "1 - sqrt": (
        WarmupStableDecay(),
        lambda o, warmup, total: get_wsd_schedule(o, warmup, 20, total, decay_type="1-sqrt"),
    ),
    "1 - sqrt to a floor": (
        WarmupStableDecay(0.2, "sqrt", 0.1),
        lambda o, warmup, total: get_wsd_schedule(o, warmup, 20, total, decay_type="1-sqrt", min_lr_ratio=0.1),
    ),
    "stable, then linear": (
        WarmupStableDecay(0.2, "linear"),
        lambda o, warmup, total: get_wsd_schedule(o, warmup, 20, total, decay_type="linear"),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_every_rate_is_that_of_transformers(name: str, warmup: int) -> None:
    schedule, reference = REFERENCES[name]
    expected = rates(reference(optimizer(), warmup, 100), 101)
    begin = expected[0] if warmup else 0.0  # transformers' WSD begins its warmup at the floor
    assert rates(shaped(schedule, warmup, warmup_init_lr=begin), 101) == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_cosine_without_warmup_is_torchs() -> None:
    expected = rates(CosineAnnealingLR(optimizer(), 100, eta_min=PEAK / 10), 101)
    assert rates(shaped(CosineDecay(0.1), 0), 101) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("schedule", "boundaries"),
    [
        (LinearDecay(), {0: 0.0, 5: 2e-4, 10: 4e-4, 50: 2.2e-4, 90: 4e-5, 91: 4e-5, 100: 4e-5}),
        (CosineDecay(), {0: 0.0, 10: 4e-4, 55: 2e-4, 100: 0.0}),
        (CosineDecay(0.1), {10: 4e-4, 55: 2.2e-4, 100: 4e-5}),
        (Constant(), {0: 0.0, 9: 3.6e-4, 10: 4e-4, 100: 4e-4}),
        (WarmupStableDecay(), {10: 4e-4, 79: 4e-4, 80: 4e-4, 85: 2e-4, 100: 0.0}),
        (WarmupStableDecay(0.2, "linear", 0.1), {80: 4e-4, 90: 2.2e-4, 100: 4e-5}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_boundary(schedule: Schedule, boundaries: dict[int, float]) -> None:
    seen = rates(shaped(schedule), 101)
    assert {step: seen[step] for step in boundaries} == pytest.approx(boundaries, rel=1e-12, abs=1e-19)


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in REFERENCES.values()], ids=list(REFERENCES))
def test_a_warmup_longer_than_the_run_and_steps_beyond_its_end_do_no_harm(schedule: Schedule) -> None:
    assert rates(shaped(schedule, 50, 20), 21) == pytest.approx([PEAK * step / 50 for step in range(21)])
    beyond = rates(shaped(schedule), 150)
    assert beyond[100:] == [beyond[100]] * 50


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in REFERENCES.values()], ids=list(REFERENCES))
def test_warmup_init_lr_is_where_the_first_step_begins(schedule: Schedule) -> None:
    assert rates(shaped(schedule, warmup_init_lr=1e-4), 11) == pytest.approx(
        [1e-4 + 3e-4 * step / 10 for step in range(11)]
    )


def test_a_longer_run_has_the_same_rates_until_the_shorter_ones_decay() -> None:
    short, long = (rates(shaped(WarmupStableDecay(), total=total), 101) for total in (100, 1000))
    assert short[:81] == long[:81]
    assert short[81:] != long[81:]


@pytest.mark.parametrize("make", [lambda: LinearDecay(1.5), lambda: WarmupStableDecay(decay=-0.1)])
def test_shares_that_are_none_are_refused(make: Callable[[], Schedule]) -> None:
    with pytest.raises(UserError, match="give a share from 0 to 1"):
        make()


def test_a_run_of_unknown_length_is_refused() -> None:
    with pytest.raises(UserError, match=r"CosineDecay ends with the run, whose steps are -1; give trainer\.max_steps"):
        shaped(CosineDecay(), total=-1)


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "inverse sqrt": lambda o: InverseSqrtScheduler(o, 5, warmup_init_lr=1e-5),
    "cosine": lambda o: ShapedScheduler(o, CosineDecay(), 5, 40),
    "StepLR": lambda o: StepLR(o, 7),
    "MultiStepLR": lambda o: MultiStepLR(o, [3, 3, 9], 0.5),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.97),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 13),
    "OneCycleLR, which moves the betas, too": lambda o: OneCycleLR(o, 1e-2, total_steps=50),
    "CyclicLR": lambda o: CyclicLR(o, 1e-4, 1e-2, step_size_up=4, cycle_momentum=False),
}


def adamw() -> AdamW:
    return AdamW([nn.Parameter(torch.ones(2))], lr=PEAK)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, 1, 5, 17])
def test_advancing_is_the_same_to_the_bit_as_stepping(name: str, steps: int) -> None:
    stepped, advanced = SCHEDULERS[name](adamw()), SCHEDULERS[name](adamw())
    rates(stepped, steps)
    advance(advanced, steps)
    assert advanced.state_dict() == stepped.state_dict()
    groups = [{k: v for k, v in s.optimizer.param_groups[0].items() if k != "params"} for s in (advanced, stepped)]
    assert groups[0] == groups[1]
    assert rates(advanced, 10) == rates(stepped, 10)


def checkpoint(scheduler: LRScheduler, steps: int) -> dict[str, object]:
    """What Lightning writes of both."""
    states = {
        "global_step": steps,
        "optimizer_states": [scheduler.optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
    }
    return copy.deepcopy(states)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_checkpoint_restored_under_the_same_settings_is_the_same_to_the_bit(name: str) -> None:
    scheduler = SCHEDULERS[name](adamw())
    rates(scheduler, 12)
    saved = checkpoint(scheduler, 12)
    restored = copy.deepcopy(saved)
    new = adamw()
    restore(restored, new, SCHEDULERS[name](new))
    assert restored == saved


def plateau(o: Optimizer, **settings: float) -> ReduceLROnPlateau:
    for group in o.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return ReduceLROnPlateau(o, **{"factor": 0.5, "patience": 1, **settings})  # type: ignore[arg-type]


def test_a_plateau_keeps_what_it_has_seen_and_takes_new_settings() -> None:
    scheduler = plateau(adamw())
    for loss in (3.0, 2.0, 2.5, 2.6, 2.7):
        scheduler.step(loss)
    saved = checkpoint(scheduler, 50)
    assert (scheduler.best, scheduler.num_bad_epochs, scheduler.get_last_lr()) == (2.0, 1, [PEAK / 2])
    same = copy.deepcopy(saved)
    new = adamw()
    restore(same, new, plateau(new))
    assert same == saved
    changed, new = copy.deepcopy(saved), AdamW([nn.Parameter(torch.ones(2))], lr=2 * PEAK)
    restore(changed, new, plateau(new, factor=0.1))
    assert changed["optimizer_states"][0]["param_groups"][0]["lr"] == PEAK  # type: ignore[index]
    schedule = changed["lr_schedulers"][0]  # type: ignore[index]
    assert (schedule["best"], schedule["num_bad_epochs"], schedule["factor"]) == (2.0, 1, 0.1)


def test_another_schedule_takes_over_where_it_would_stand_by_now() -> None:
    for old, steps in ((SCHEDULERS["StepLR"](adamw()), 12), (plateau(adamw()), 12)):
        if not isinstance(old, ReduceLROnPlateau):
            rates(old, steps)
        saved, new = checkpoint(old, steps), adamw()
        restore(saved, new, InverseSqrtScheduler(new, 3))
        (group,) = saved["optimizer_states"][0]["param_groups"]  # type: ignore[index]
        assert group["lr"] == pytest.approx(PEAK * math.sqrt(3 / 12))
        assert saved["lr_schedulers"][0]["last_epoch"] == 12  # type: ignore[index]

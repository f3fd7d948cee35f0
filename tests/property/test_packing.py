"""Packing: from a cursor to steps, and from steps to packs."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from torch.utils.data import DistributedSampler

from pretrain.corpus.masking import Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import (
    BatchWarmup,
    FixedSampler,
    Pack,
    PackSampler,
    Planner,
    Position,
    share_out,
    validation_packs,
)
from pretrain.errors import UserError


class Lengths:
    """All that planning knows of a corpus."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, np.int64)
        self.num_sequences, self.num_tokens = len(lengths), sum(lengths)

    def lengths(self, indices: ArrayLike) -> np.ndarray:
        return self._lengths[np.asarray(indices)]


def make_planner(
    lengths: list[int], max_length: int, seed: int = 0, mlm_probability: float = 0.15, warmup: BatchWarmup | None = None
) -> Planner:
    masking = Masking(mlm_probability, 0.8, 0.1, 32, np.arange(4, 24), seed)
    return Planner(Lengths(lengths), Order(len(lengths), seed), masking, max_length, warmup)  # type: ignore[arg-type]


BEGIN = Position()


class Setting(NamedTuple):
    """Sequences and how steps are cut from them, with or without a warmup; every pack can hold a sequence."""

    lengths: list[int]
    max_length: int
    packs: int
    budget: int
    seed: int
    warmup: BatchWarmup | None = None

    @property
    def planner(self) -> Planner:
        return make_planner(self.lengths, self.max_length, self.seed, warmup=self.warmup)

    def budget_at(self, position: Position) -> int:
        """Written out again: a straight line from the first size to the full one."""
        if self.warmup is None:
            return self.budget
        done = position.cursor * self.planner.mean_length / self.warmup.tokens
        return int(self.warmup.first + (self.budget - self.warmup.first) * done) if done < 1 else self.budget


@st.composite
def settings_of_a_run(draw: st.DrawFn) -> Setting:
    lengths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=40))
    max_length, packs = draw(st.integers(3, 70)), draw(st.integers(1, 8))
    budget = packs * max_length + draw(st.integers(0, 300))
    warmups = st.builds(BatchWarmup, st.integers(packs * max_length, budget), st.integers(1, 5000))
    return Setting(lengths, max_length, packs, budget, draw(st.integers(0, 2**40)), draw(st.none() | warmups))


def rows(*packs: Pack) -> Counter[tuple[int, ...]]:
    """Everything that packs say of each sequence, regardless of how they divide them."""
    columns = ("epochs", "indices", "starts", "lengths", "maskable", "targets")
    return Counter(row for pack in packs for row in zip(*(getattr(pack, c).tolist() for c in columns), strict=True))


def consumed(*steps: Pack) -> list[tuple[int, int]]:
    return [visit for step in steps for visit in zip(step.epochs.tolist(), step.indices.tolist(), strict=True)]


def walk(planner: Planner, budget: int, start: Position = BEGIN) -> Iterator[Pack]:
    while True:
        step = planner.step(start, budget)
        yield step
        start = step.after


def steps_until(planner: Planner, budget: int, cursor: int) -> list[Pack]:
    steps = []
    for step in walk(planner, budget):
        steps.append(step)
        if step.after.cursor >= cursor:
            return steps
    raise AssertionError


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


# --- steps ------------------------------------------------------------------------------------------------------------


@given(settings_of_a_run(), st.integers(0, 2**40), st.integers(0, 1000))
def test_a_step_is_fixed_by_the_cursor_alone(run: Setting, cursor: int, tokens: int) -> None:
    one = run.planner.step(Position(cursor, 0, 0.0), run.budget)
    other = run.planner.step(Position(cursor, tokens, 7.0), run.budget)
    assert rows(one) == rows(other)
    assert one.after.cursor == other.after.cursor


@given(settings_of_a_run())
def test_consecutive_steps_cover_the_order_without_gap_or_repeat(run: Setting) -> None:
    size = len(run.lengths)
    steps = steps_until(run.planner, run.budget, 2 * size + 1)  # over the ends of two epochs
    visits = consumed(*steps)
    epochs, indices = Order(size, run.seed)(np.arange(len(visits)))
    assert visits == list(zip(epochs.tolist(), indices.tolist(), strict=True))


@given(settings_of_a_run())
def test_the_position_after_a_step_counts_what_it_consumed(run: Setting) -> None:
    before = Position()
    for step in steps_until(run.planner, run.budget, 2 * len(run.lengths)):
        assert step.after.cursor == before.cursor + len(step.indices)
        assert step.after.tokens == before.tokens + step.lengths.sum()
        assert step.after.epochs == pytest.approx(step.after.cursor / len(run.lengths))
        before = step.after


@given(settings_of_a_run())
def test_a_step_holds_as_many_sequences_as_fit_and_not_one_more(run: Setting) -> None:
    position = BEGIN
    for step, following in pairwise(steps_until(run.planner, run.budget, len(run.lengths) + 1)):
        assert step.lengths.sum() <= run.budget_at(position)
        assert step.lengths.sum() + following.lengths[0] > run.budget_at(position)
        position = step.after


def test_steps_grow_in_a_straight_line_over_the_tokens_consumed() -> None:
    planner = make_planner([10] * 1000, 10, warmup=BatchWarmup(100, 3000))
    steps = [len(step.indices) for step, _ in zip(walk(planner, 400), range(40), strict=False)]
    assert steps[:7] == [10, 11, 12, 13, 14, 16, 17]  # tenths of 100 + tokens before / 10
    assert steps == sorted(steps)
    assert steps[-1] == 40
    halfway = planner.step(Position(150), 400)  # found at once, wherever it is
    assert len(halfway.indices) == 25


@given(st.integers(100, 5000), st.integers(1, 5000), st.integers(1, 10**6), st.integers(0, 500))
def test_the_tokens_that_a_plan_foresees_are_those_that_the_steps_add_up_to(
    first: int, more: int, tokens: int, steps: int
) -> None:
    warmup, full = BatchWarmup(first, tokens), first + more
    total = 0
    for _ in range(steps):
        total += warmup.size(total, full)
    assert total == pytest.approx(warmup.consumed(steps, full), rel=0.02, abs=2 * full)  # sizes are rounded down


@given(st.lists(st.integers(10, 20), min_size=1, max_size=5), st.integers(1, 9))
def test_a_sequence_longer_than_a_step_is_a_step_of_its_own(lengths: list[int], budget: int) -> None:
    step = make_planner(lengths, 100).step(Position(), budget)
    assert len(step.indices) == 1


def test_how_far_the_planner_looks_ahead_does_not_decide_what_is_in_a_step() -> None:
    """The mean length sizes the window; here it is far above the length of all but one sequence."""
    planner = make_planner([2] * 500 + [10_000], 10_000)
    steps = steps_until(planner, 600, 501)
    assert sorted(index for epoch, index in consumed(*steps) if epoch == 0) == list(range(501))
    for step, following in pairwise(steps):
        assert step.lengths.sum() + following.lengths[0] > 600


@given(settings_of_a_run(), st.integers(0, 3))
def test_the_planned_targets_of_a_step_are_the_sum_over_its_sequences(run: Setting, number: int) -> None:
    step = [step for step, _ in zip(walk(run.planner, run.budget), range(number + 1), strict=False)][-1]
    assert step.step_targets == step.targets.sum()
    assert (step.targets <= step.maskable).all()
    assert {pack.step_targets for pack in share_out(step, run.packs)} == {step.step_targets}


# --- packs ------------------------------------------------------------------------------------------------------------


@given(settings_of_a_run(), st.floats(0, 0.01))
def test_packs_divide_a_step_without_gap_or_repeat(run: Setting, attention_cost: float) -> None:
    step = run.planner.step(Position(), run.budget)
    packs = share_out(step, run.packs, attention_cost)
    assert len(packs) == run.packs
    assert rows(*packs) == rows(step)
    assert all(pack.after == step.after for pack in packs)


@given(settings_of_a_run(), st.floats(0, 0.01))
def test_no_pack_is_empty(run: Setting, attention_cost: float) -> None:
    for step in steps_until(run.planner, run.budget, len(run.lengths) + 1):
        assert all(len(pack.indices) for pack in share_out(step, run.packs, attention_cost))


@given(settings_of_a_run())
def test_a_pack_begins_with_its_longest_sequence(run: Setting) -> None:
    for pack in share_out(run.planner.step(Position(), run.budget), run.packs):
        assert (np.diff(pack.lengths) <= 0).all()


@pytest.mark.parametrize(("packs", "attention_cost"), [(2, 0.0), (8, 0.0005), (64, 0.0005)])
def test_packs_of_a_realistic_step_cost_nearly_the_same(packs: int, attention_cost: float) -> None:
    """2M tokens as in ESM-2, lengths like UniRef's."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 0.7, 20_000).astype(int), 20, 5000).tolist()
    step = make_planner(lengths, 1024).step(Position(), 2**21)
    sizes = [pack.lengths for pack in share_out(step, packs, attention_cost)]
    costs = np.array([(size * (1 + attention_cost * size)).sum() for size in sizes])
    assert costs.max() / costs.mean() < 1.001


@given(settings_of_a_run(), st.floats(0, 0.01))
def test_no_pack_costs_more_than_the_mean_and_one_sequence(run: Setting, attention_cost: float) -> None:
    step = run.planner.step(Position(), run.budget)
    costs = [(p.lengths * (1 + attention_cost * p.lengths)).sum() for p in share_out(step, run.packs, attention_cost)]
    longest = step.lengths.max() * (1 + attention_cost * step.lengths.max())
    assert max(costs) <= np.mean(costs) + longest + 1e-6


# --- the sampler ------------------------------------------------------------------------------------------------------


def sampler(run: Setting, max_steps: int, rank: int, world: int, accumulate: int, **options: Any) -> PackSampler:
    defaults = {"start": (0, Position()), "steps_taken": lambda: 0, "attention_cost": 0.0005}
    return PackSampler(
        run.planner,
        global_batch_tokens=run.budget,
        max_steps=max_steps,
        rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        **defaults | options,
    )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@settings(max_examples=25)
@given(settings_of_a_run(), st.integers(1, 4))
def test_what_a_step_sees_does_not_depend_on_ranks_and_micro_batches(run: Setting, max_steps: int) -> None:
    expected = [rows(step) for step, _ in zip(walk(run.planner, run.budget), range(max_steps), strict=False)]
    for world in divisors(run.packs):
        accumulate = run.packs // world
        by_rank = [list(sampler(run, max_steps, rank, world, accumulate)) for rank in range(world)]
        assert {len(packs) for packs in by_rank} == {max_steps * accumulate}
        for step in range(max_steps):
            window = slice(step * accumulate, (step + 1) * accumulate)
            assert rows(*(pack for packs in by_rank for pack in packs[window])) == expected[step]


@given(settings_of_a_run(), st.data())
def test_every_sequence_is_seen_once_an_epoch_whatever_the_ranks_and_restarts(
    run: Setting, data: st.DataObject
) -> None:
    """A run that is stopped again and again and continues with another number of ranks and micro-batches."""
    size = len(run.lengths)
    position, step, seen = Position(), 0, Counter[tuple[int, ...]]()
    while position.cursor < 2 * size:
        world = data.draw(st.sampled_from(divisors(run.packs)), "world size")
        accumulate = data.draw(st.sampled_from(divisors(run.packs // world)), "micro-batches")
        stop = step + data.draw(st.integers(1, 3), "steps until the restart")
        # Each process begins afresh, with what the checkpoint holds: the step and the position.
        options = {"start": (step, position), "steps_taken": lambda taken=step: taken}
        samplers = [sampler(run, stop, rank, world, accumulate, **options) for rank in range(world)]
        seen += rows(*(pack for rank in samplers for pack in rank))
        assert len({rank.position_after(stop) for rank in samplers}) == 1
        step, position = stop, samplers[0].position_after(stop)
    visits = Counter((epoch, index) for epoch, index, *_ in seen.elements())
    whole_epochs = position.cursor // size
    for epoch in range(whole_epochs):
        assert all(visits[epoch, index] == 1 for index in range(size))
    assert visits.total() == position.cursor
    assert max(visits.values()) == 1


@given(settings_of_a_run(), st.integers(1, 6), st.integers(0, 6))
def test_a_resumed_run_gets_the_packs_that_the_uninterrupted_one_gets(run: Setting, max_steps: int, taken: int) -> None:
    assume(taken <= max_steps)
    world = max(divisors(run.packs))
    whole = sampler(run, max_steps, 0, world, 1)
    packs = list(whole)
    resumed = sampler(
        run, max_steps, 0, world, 1, start=(taken, whole.position_after(taken)), steps_taken=lambda: taken
    )
    rest = list(resumed)
    assert len(rest) == max_steps - taken
    assert all(same(a, b) for a, b in zip(packs[taken:], rest, strict=True))


@given(settings_of_a_run(), st.integers(0, 6), st.integers(1, 4))
def test_the_length_of_the_sampler_is_the_whole_run_also_on_resume(run: Setting, taken: int, accumulate: int) -> None:
    resumed = sampler(run, 6, 0, 1, accumulate, start=(taken, Position(taken)), steps_taken=lambda: taken)
    assert len(resumed) == 6 * accumulate


def test_the_position_is_that_of_the_steps_taken_not_of_those_planned_ahead() -> None:
    run = Setting([5, 6, 7, 8], 10, 2, 20, 0)
    ahead = sampler(run, 10, 0, 2, 1)
    packs = iter(ahead)
    planned = [next(packs) for _ in range(4)]  # a loader that prefetches
    assert ahead.position_after(1) == planned[0].after
    assert ahead.position_after(3) == planned[2].after
    assert same(next(packs), list(sampler(run, 10, 0, 2, 1))[4])


def test_an_iteration_begins_after_the_steps_taken_by_then() -> None:
    """Lightning makes a new iterator of the same sampler when it restarts the loop."""
    run, taken = Setting([5, 6, 7, 8], 10, 2, 20, 0), 0
    again = sampler(run, 6, 0, 2, 1, steps_taken=lambda: taken)
    first = list(again)
    taken = 4
    assert all(same(a, b) for a, b in zip(first[4:], list(again), strict=True))


def test_lightning_leaves_the_samplers_alone() -> None:
    run = Setting([5], 10, 1, 20, 0)
    for one in (sampler(run, 2, 0, 1, 1), FixedSampler([])):
        assert isinstance(one, DistributedSampler)
        before = list(one)
        one.set_epoch(3)
        assert all(same(a, b) for a, b in zip(before, one, strict=True))


# --- validation -------------------------------------------------------------------------------------------------------


@given(settings_of_a_run(), st.integers(1, 300), st.integers(1, 6))
def test_validation_covers_the_corpus_once_with_equally_many_packs_a_rank(
    run: Setting, tokens: int, world: int
) -> None:
    assume(len(run.lengths) >= world)
    by_rank = validation_packs(run.planner, tokens, world)
    assert len(by_rank) == world
    assert len({len(packs) for packs in by_rank}) == 1
    everything = [pack for packs in by_rank for pack in packs]
    assert sorted(consumed(*everything)) == [(0, index) for index in range(len(run.lengths))]
    assert all(len(pack.indices) for pack in everything)
    assert {pack.step_targets for pack in everything} == {sum(int(pack.targets.sum()) for pack in everything)}


@given(settings_of_a_run(), st.integers(1, 300), st.integers(2, 6))
def test_validation_asks_the_same_on_any_number_of_ranks(run: Setting, tokens: int, world: int) -> None:
    assume(len(run.lengths) >= world)
    (alone,) = validation_packs(run.planner, tokens, 1)
    shared = [pack for packs in validation_packs(run.planner, tokens, world) for pack in packs]
    assert rows(*alone) == rows(*shared)


def test_validation_packs_have_about_the_size_asked_for() -> None:
    lengths = np.random.default_rng(0).integers(20, 100, 500).tolist()
    sizes = [pack.lengths.sum() for packs in validation_packs(make_planner(lengths, 1024), 2000, 2) for pack in packs]
    assert max(sizes) <= 2000 * 1.05
    assert min(sizes) >= 2000 * 0.8


def test_too_small_a_validation_corpus_is_a_mistake_that_the_user_can_mend() -> None:
    message = "^2 validation sequences cannot occupy 3 processes; validate on a larger set$"
    with pytest.raises(UserError, match=message):
        validation_packs(make_planner([5, 5], 10), 100, 3)

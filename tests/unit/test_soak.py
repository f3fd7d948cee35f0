"""What `make soak` calls a leak, and what it does not."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import soak

MIB = 2**20


@pytest.mark.parametrize(
    ("mib_per_minute", "minutes", "told"), [(0.0, 15.0, False), (1.0, 4.0, False), (4.0, 15.0, True), (40.0, 2.0, True)]
)
def test_a_leak_is_told_and_a_heap_from_which_pages_come_and_go_is_not(
    mib_per_minute: float, minutes: float, told: bool
) -> None:
    draw = random.Random(0)
    samples = []
    for second in range(int(60 * minutes)):
        taken_back = draw.uniform(50, 150) if draw.random() < 0.2 else draw.uniform(0, 5)
        samples.append((float(second), int((700 + mib_per_minute * second / 60 - taken_back) * MIB)))
    growth = soak.grows(samples, 0.03)
    assert bool(growth) == told
    if told:
        assert growth == pytest.approx(mib_per_minute * minutes / 2 * MIB, rel=0.2)


def test_of_nothing_nothing_is_told() -> None:
    assert soak.grows([], 0) == soak.grows([(0.0, 5)], 0) == 0

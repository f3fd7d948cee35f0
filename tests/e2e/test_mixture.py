"""A run on several corpora, one of them visited by cluster: resumed bit for bit, audited, and told what it is."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from test_ledger import audit
from test_resume import equal, figures, final_state, kill

from pretrain.cli import main
from pretrain.corpus.datamodule import MLMDataModule


@pytest.fixture
def mixture(tmp_path: Path) -> dict[str, float]:
    """Two corpora of 20 sequences in 8 clusters and of 25 sequences, drawn three to one."""
    generator = random.Random(1)
    for name, count in (("clustered", 20), ("plain", 25)):
        residues = ["".join(generator.choices("LAGVSERTIDPK", k=generator.randint(20, 90))) for _ in range(count)]
        records = "".join(f">{name}{number}\n{sequence}\n" for number, sequence in enumerate(residues))
        (tmp_path / f"{name}.fasta").write_text(records)
    table = tmp_path / "table.tsv"
    table.write_text("".join(f"c{number % 8}\tclustered{number}\n" for number in range(20)))
    out = tmp_path / "clustered"
    assert main(["prepare", f"{out}.fasta", "--out", str(out), "--clusters", str(table)]) == 0
    return {str(out): 3.0, str(tmp_path / "plain.fasta"): 1.0}


def test_a_mixture_is_resumed_bit_for_bit_and_passes_the_audit(
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mixture: dict[str, float],
) -> None:
    config = tiny(data__train=mixture)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert fit("-c", config, "--run", straight) == 0
    assert fit("-c", config, "--run", broken, *kill("batch_start", 9)) == -9
    assert fit("-c", config, "--run", broken) == 0
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    code, message = audit(broken, capsys)
    assert code == 0, message
    assert "each corpus's clusters consumed exactly once in each of its epochs" in message
    assert main(["inspect", str(broken)]) == 0
    assert f"epochs of {next(iter(mixture))}" in capsys.readouterr().out


def test_other_weights_are_another_run_and_say_so(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mixture: dict[str, float]
) -> None:
    run = str(tmp_path / "run")
    begin = ("trainer__max_steps", 3), ("validate_every_n_steps", 9)
    assert main(["fit", "-c", str(tiny(data__train=mixture, **dict(begin))), "--run", run]) == 0
    assert "75.0%" in capsys.readouterr().out
    first, second = mixture
    changed = tiny(data__train={first: 1.0, second: 1.0}, trainer__max_steps=6)
    assert main(["fit", "-c", str(changed), "--run", run, "--allow_change", "true"]) == 2
    assert "was made with proportions [3, 1], this run has [1, 1]" in capsys.readouterr().err


def test_weights_in_the_same_proportion_are_the_same_run(mixture: dict[str, float]) -> None:
    first, second = mixture
    identities = []
    for weights in ((3.0, 1.0), (0.75, 0.25)):
        data = MLMDataModule(dict(zip((first, second), weights, strict=True)))
        data.setup("fit")
        identities.append(data.identity())
    assert identities[0] == identities[1]


def test_the_unigram_of_a_mixture_weighs_its_corpora_as_training_does(tmp_path: Path) -> None:
    """All L and all A, three to one: the perplexity on one half L, one half A is 1 / sqrt(3/4 * 1/4)."""
    for letter in "LA":
        (tmp_path / f"{letter}.fasta").write_text("".join(f">{letter}{n}\n{letter * 40}\n" for n in range(400)))
    data = MLMDataModule(
        {str(tmp_path / "L.fasta"): 3, str(tmp_path / "A.fasta"): 1},
        [str(tmp_path / "L.fasta"), str(tmp_path / "A.fasta")],
    )
    data.setup("fit")
    assert data.baselines()[""].unigram == pytest.approx((3 / 16) ** -0.5, rel=0.02)

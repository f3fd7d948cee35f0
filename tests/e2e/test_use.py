"""What the commands that apply a model have in common: which models they refuse, and what they say of sequences."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.cli import main
from pretrain.downstream.contact_regression import write_regression
from pretrain.model.contacts import ContactRegression

LONG = "ACDEFGHIKLMNPQRSTVWY" * 6


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a command that applies a model to one sequence and writes into ``out``."""

    def arguments(name: str, model: Path, sequence: str = "MKTALVE") -> list[str]:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (tmp_path / "my.fasta").write_text(f">one\n{sequence}\n")
        (tmp_path / "assay.csv").write_text("mutant\n" + f"{sequence[3]}4G\n{sequence[4]}5W\n")
        write_regression(ContactRegression(torch.ones(6), torch.tensor(0.0)), tmp_path / "six.safetensors", {})
        fasta, regression = str(tmp_path / "my.fasta"), str(tmp_path / "six.safetensors")
        suffix, *given = {
            "embed": [".npz", fasta],
            "contacts": [".npz", fasta, "--regression", regression],
            "fill": [".csv", f"<mask>{sequence[1:]}"],
            "score": [".csv", str(tmp_path / "assay.csv"), "--sequence", sequence],
            "validate": [".json", fasta],
        }[name]
        return [name, str(model), *given, "--out", str(out / f"x{suffix}")]

    return arguments


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert main(arguments) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("pretrain: error"))
    return line


@pytest.mark.parametrize("name", ["embed", "contacts", "fill", "score", "validate"])
def test_a_model_that_went_astray_gives_no_figures(
    name: str, protein_model: Path, command: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    astray = tmp_path / "astray"
    shutil.copytree(protein_model, astray)
    tensors = load_file(astray / "model.safetensors")
    tensors["esm.encoder.layer.0.attention.self.query.bias"][0] = float("nan")
    save_file(tensors, astray / "model.safetensors")
    line = refusal(command(name, astray), capfd)
    assert line.endswith("the model's outputs are not finite; take an earlier checkpoint")
    assert list((tmp_path / "out").iterdir()) == []

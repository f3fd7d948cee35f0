"""`pretrain contacts`: fitted on structures or brought by the model, to files, figures and a picture."""

import csv
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from folds import hairpin, write
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from transformers import AutoModelForMaskedLM, AutoTokenizer

import pretrain
import pretrain.downstream.contacts as contacts_module
from pretrain.cli import main
from pretrain.downstream.contact_regression import fit_regression, precisions, write_regression
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.structures import Structure
from pretrain.errors import UserError
from pretrain.model.contacts import ContactRegression, corrected_maps

FASTA = ">one\nMKTAYIAKQRQISFVKSHFSRQ\n>two\nMSKGEELFTGVVPILVELDGDVNGHKFSVSGEG\n"


def protein(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices("LAGVSERTIDPKQNFYMHWC", k=length))


class Attended(Structure):
    """A chain whose contacts are the pairs that one head of a model attends to most."""

    def __init__(self, sequence: str, model: PretrainedEncoder, head: int) -> None:
        super().__init__(sequence, sequence, np.zeros((len(sequence), 3)))
        with torch.no_grad():
            maps = torch.cat(list(corrected_maps(model, model.lay_out([model.encode(sequence, "it")])[0])))
        values = maps[head].numpy()[self.pairs]
        self.touching = values >= np.partition(values, -len(sequence))[-len(sequence)]

    def contacts(self) -> NDArray[np.bool_]:
        return self.touching


@pytest.fixture
def structures(tmp_path: Path) -> Path:
    """Three hairpins, as files."""
    folder = tmp_path / "structures"
    folder.mkdir()
    for number, length in enumerate((30, 44, 61)):
        write(hairpin(protein(number, length)), folder / f"pin{number}{'.cif' if number else '.pdb'}")
    return folder


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    (tmp_path / "my.fasta").write_text(FASTA)
    return tmp_path / "my.fasta"


# The regression


def test_a_head_that_attends_to_contacts_is_found_on_few_structures(protein_model: Path) -> None:
    """And predicts the contacts of sequences that were not fitted on."""
    model = pretrain.load(protein_model)
    known = [Attended(protein(seed, 90), model, head=3) for seed in range(12)]
    regression = fit_regression(model, known[:8])
    assert int(regression.weight.argmax()) == 3
    maps = [m.numpy() for m in model.predict_contacts([s.sequence for s in known[8:]], regression)]
    found = precisions(known[8:], maps)
    assert list(found) == ["short", "medium", "long"]
    for figures in found.values():
        assert figures["P@L/5"] > 2 * figures["chance"]
    assert found["long"]["P@L/5"] > 0.7


def test_fitting_takes_nothing_from_the_random_numbers_of_others(protein_model: Path) -> None:
    model = pretrain.load(protein_model)
    known = [Attended(protein(0, 60), model, head=1)]
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    first, second = fit_regression(model, known), fit_regression(model, known)
    assert torch.equal(first.weight, second.weight)
    assert np.random.get_state()[1].tolist() == before[0]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_precision_counts_the_most_probable_pairs_of_each_range() -> None:
    """Of 30 residues in a row only (0, 6), (1, 20) and (2, 28) touch: one pair of each range."""
    beta = np.stack([np.arange(30) * 100.0, np.zeros(30), np.zeros(30)], 1)
    for i, j in ((0, 6), (1, 20), (2, 28)):
        beta[j] = beta[i] + 1
    structure = Structure("x", "A" * 30, beta)
    predicted = np.zeros((30, 30), np.float32)
    predicted[0, 6], predicted[3, 9] = 0.8, 0.9  # short: the best is wrong, the second is right
    predicted[1, 20] = 0.5  # medium: right
    predicted[3, 28] = 0.1  # long: wrong, and all others equal
    found = precisions([structure], [predicted])
    short, long = (sum(30 - apart for apart in span) for span in (range(6, 12), range(24, 30)))
    # The rest of the best L / 5 = 6 are as probable as all others: they count as chance would have it.
    assert found["short"]["P@L/5"] == pytest.approx(1 / 6)
    assert found["medium"]["P@L/5"] == pytest.approx(1 / 6)
    assert found["long"]["P@L/5"] == pytest.approx(5 / (long - 1) / 6)
    assert found["short"]["chance"] == pytest.approx(1 / short)
    assert found["long"]["P@L"] == pytest.approx(1 / long), "there are fewer pairs than L"
    assert found["short"]["P@L/2"] == pytest.approx(1 / 15)


def test_a_range_that_no_chain_is_long_enough_for_is_left_out() -> None:
    structure = Structure("x", "A" * 14, np.random.default_rng(0).normal(size=(14, 3)) * 10)
    assert list(precisions([structure], [np.zeros((14, 14), np.float32)])) == ["short", "medium"]


def test_a_single_string_is_refused_rather_than_taken_letter_by_letter(protein_model: Path) -> None:
    model = pretrain.load(protein_model)
    maps = model.config.num_hidden_layers * model.config.num_attention_heads
    with pytest.raises(UserError, match="list of strings"):
        model.predict_contacts("MKTAYIAK", ContactRegression(torch.zeros(maps), torch.tensor(0.0)))


# The command


def test_every_format_holds_the_same_map_of_each_sequence(
    protein_model: Path, fasta: Path, structures: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    kept = tmp_path / "regression.safetensors"
    model = pretrain.load(protein_model)
    maps = len(list(model.blocks)) * model.config.num_attention_heads
    torch.manual_seed(0)
    regression = ContactRegression(torch.randn(maps) * 5, torch.tensor(-1.0))
    write_regression(regression, kept, {})
    for suffix in ("npz", "safetensors", "csv"):
        out = tmp_path / f"maps.{suffix}"
        assert main(["contacts", str(protein_model), str(fasta), "--regression", str(kept), "--out", str(out)]) == 0
        assert f"{out}: maps of 2 sequences" in capfd.readouterr().out
    arrays, tensors = np.load(tmp_path / "maps.npz"), load_file(tmp_path / "maps.safetensors")
    expected = model.predict_contacts([line for line in FASTA.split() if line[0] != ">"], regression)
    rows = list(csv.DictReader((tmp_path / "maps.csv").read_text().splitlines()))
    for name, theirs in zip(("one", "two"), expected, strict=True):
        assert np.array_equal(arrays[name], theirs.numpy())
        assert np.array_equal(tensors[name], theirs.numpy())
        mine = [row for row in rows if row["id"] == name]
        length = len(theirs)
        assert {(int(row["i"]), int(row["j"])) for row in mine} == {
            (i, j) for i in range(1, length + 1) for j in range(i + 6, length + 1)
        }
        chances = [float(row["probability"]) for row in mine]
        assert chances == sorted(chances, reverse=True)
        for row, chance in zip(mine, chances, strict=True):
            assert chance == pytest.approx(float(theirs[int(row["i"]) - 1, int(row["j"]) - 1]), rel=1e-4)


def test_structures_are_predicted_for_compared_and_drawn(
    protein_model: Path, structures: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out, picture = tmp_path / "maps.npz", tmp_path / "maps.png"
    arguments = ["contacts", str(protein_model), "--structures", str(structures), "--fit", str(structures / "pin0.pdb")]
    assert main([*arguments, "--out", str(out), "--picture", str(picture)]) == 0
    printed = capfd.readouterr().out
    assert "fitted on 1 chains" in printed
    assert "1 of these sequences are among those fitted on: the figures flatter" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ")][:4] == [
        "separation",
        "short,",
        "medium,",
        "long,",
    ]
    maps = np.load(out)
    assert {name: maps[name].shape for name in maps} == {"pin0_A": (30, 30), "pin1_A": (44, 44), "pin2_A": (61, 61)}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 0
    figures = [line for line in printed.splitlines() if line.startswith("  ")]
    assert capfd.readouterr().out.splitlines() == figures, "whatever is written"


def test_a_published_models_own_regression_is_taken_and_comes_back_from_a_run_that_trained_on(
    protein_model: Path,
    fasta: Path,
    tmp_path: Path,
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    capfd: pytest.CaptureFixture,
) -> None:
    theirs = AutoModelForMaskedLM.from_pretrained(protein_model, attn_implementation="eager").eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(theirs.esm.contact_head.regression.weight, std=5)
    theirs.save_pretrained(tmp_path / "published", save_original_format=False)
    AutoTokenizer.from_pretrained(protein_model).save_pretrained(tmp_path / "published")

    def predicted(model: Path) -> NDArray[np.float32]:
        out = tmp_path / f"{model.name}.npz"
        assert main(["contacts", str(model), str(fasta), "--out", str(out)]) == 0
        return np.asarray(np.load(out)["one"])

    ids = AutoTokenizer.from_pretrained(protein_model)(FASTA.split()[1], return_tensors="pt")
    with torch.no_grad():
        expected = theirs.predict_contacts(ids.input_ids, ids.attention_mask)[0].numpy()
    np.testing.assert_allclose(predicted(tmp_path / "published"), expected, rtol=0, atol=1e-5)

    assert main(["import", str(tmp_path / "published"), "--out", str(tmp_path / "imported")]) == 0
    np.testing.assert_allclose(predicted(tmp_path / "imported"), expected, rtol=0, atol=1e-5)
    assert "attention has changed" not in capfd.readouterr().out
    run, config = tmp_path / "run", tiny(data__max_length=100)
    overlay = ("-c", config, "-c", tmp_path / "imported/fit.yaml", "--run", run)
    assert fit(*overlay, "--trainer.max_steps", 2) == 0
    assert fit(*overlay, "--trainer.max_steps", 4, "--allow_change") == 0, "handed on over a resume"
    capfd.readouterr()
    predicted(run)
    assert "of the model that training began with; attention has changed since; fit one" in capfd.readouterr().out
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    name = "esm.contact_head.regression.weight"
    head = load_tensors(tmp_path / "exported/model.safetensors")[name]
    assert torch.equal(head, theirs.state_dict()[name])
    np.testing.assert_allclose(predicted(tmp_path / "exported"), predicted_of(run, fasta), rtol=0, atol=1e-5)


def predicted_of(run: Path, fasta: Path) -> NDArray[np.float32]:
    return pretrain.load(run).predict_contacts([fasta.read_text().split()[1]])[0].numpy()


def test_a_fitted_regression_goes_into_the_export_and_onto_its_card(
    fasta: Path, tmp_path: Path, tiny: Callable[..., Path], fit: Callable[..., int]
) -> None:
    run, kept, out = tmp_path / "run", tmp_path / "regression.safetensors", tmp_path / "exported"
    assert fit("-c", tiny(), "--run", run, "--trainer.max_steps", 2) == 0
    torch.manual_seed(2)
    regression = ContactRegression(torch.randn(4) * 20, torch.tensor(-1.0))
    write_regression(regression, kept, {})
    assert main(["export", str(run), "--out", str(out), "--regression", str(kept)]) == 0
    card = (out / "README.md").read_text()
    assert "a regression that was fitted on structures after training" in card
    assert "all zeros" not in card
    theirs = AutoModelForMaskedLM.from_pretrained(out, attn_implementation="eager").eval()
    sequence = fasta.read_text().split()[1]
    ids = AutoTokenizer.from_pretrained(out)(sequence, return_tensors="pt")
    with torch.no_grad():
        predicted = theirs.predict_contacts(ids.input_ids, ids.attention_mask)[0]
    (ours,) = pretrain.load(run).predict_contacts([sequence], regression)
    torch.testing.assert_close(predicted, ours, rtol=0, atol=1e-5)
    assert float(ours.std()) > 1e-3


def test_mistakes_are_told_in_one_line_and_nothing_is_written(
    protein_model: Path, text_model: Path, fasta: Path, structures: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "twice.fasta").write_text(">a\nMKT\n>a\nMKTL\n")
    (tmp_path / "bad.safetensors").write_text("nothing")
    (tmp_path / "there.npz").write_text("taken")
    small = tmp_path / "small.safetensors"
    write_regression(ContactRegression(torch.ones(4), torch.zeros(())), small, {})
    model, out, fitting = str(protein_model), ["--out", str(tmp_path / "x.npz")], ["--fit", str(structures)]
    cases = {
        "nothing to predict": [model],
        "no sequence to predict for": [model, *fitting, "--save_regression", str(tmp_path / "r.safetensors"), *out],
        "r.npz: the name must end in .safetensors": [model, *fitting, "--save_regression", str(tmp_path / "r.npz")],
        "keep.txt: the name must end in .png": [model, str(fasta), *fitting, "--picture", str(tmp_path / "keep.txt")],
        "nowhere to write": [model, str(fasta)],
        "has no contact regression; fit one": [model, str(fasta), *out],
        "model of text": [str(text_model), str(fasta), *out, *fitting],
        "two sequences are called 'a'": [model, str(tmp_path / "twice.fasta"), *out, *fitting],
        "must end in one of .npz": [model, str(fasta), "--out", str(tmp_path / "x.txt"), *fitting],
        "there.npz: exists already": [model, str(fasta), "--out", str(tmp_path / "there.npz"), *fitting],
        "bad.safetensors: no safetensors file": [
            model,
            str(fasta),
            *out,
            "--regression",
            str(tmp_path / "bad.safetensors"),
        ],
        "none.safetensors: not found": [model, str(fasta), *out, "--regression", str(tmp_path / "none.safetensors")],
        "over 4 attention maps, the model has 6": [model, str(fasta), *out, "--regression", str(small)],
        "give --fit or --regression": [model, str(fasta), *out, *fitting, "--regression", str(small)],
        "none.pdb: not found": [model, "--structures", str(tmp_path / "none.pdb"), *fitting],
    }
    before = sorted(tmp_path.rglob("*"))
    for reason, arguments in cases.items():
        assert main(["contacts", *arguments]) == 2, reason
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert reason in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sequence_whose_name_safetensors_reserves_is_refused(
    protein_model: Path, structures: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source, out = tmp_path / "reserved.fasta", tmp_path / "maps"
    source.write_text(">__metadata__\nMKTAYIAKQR\n")
    arguments = ["contacts", str(protein_model), str(source), "--fit", str(structures), "--out"]
    assert main([*arguments, f"{out}.safetensors"]) == 2
    assert "'__metadata__' is a name that safetensors keeps for itself; " in capfd.readouterr().err
    assert not out.with_suffix(".safetensors").exists()
    assert main([*arguments, f"{out}.npz"]) == 0
    assert np.load(f"{out}.npz")["__metadata__"].shape == (10, 10)


def test_structures_without_a_contact_cannot_be_fitted_on(protein_model: Path) -> None:
    far = Structure("far", "A" * 20, np.arange(60.0).reshape(20, 3) * 100)
    with pytest.raises(UserError, match="none touch"):
        fit_regression(pretrain.load(protein_model), [far])


def test_a_regression_is_kept_when_all_else_is_written_so_that_a_failed_call_can_be_repeated(
    protein_model: Path, fasta: Path, structures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept, picture = (tmp_path / name for name in ("maps.npz", "kept.safetensors", "maps.png"))
    arguments = ["contacts", str(protein_model), str(fasta), "--fit", str(structures), "--out", str(out)]
    arguments += ["--save_regression", str(kept), "--picture", str(picture)]

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    regression = ContactRegression(torch.ones(6), torch.zeros(()))
    monkeypatch.setattr(contacts_module, "fit_regression", lambda *_: regression)
    with monkeypatch.context() as patch:
        patch.setitem(contacts_module._WRITERS, ".npz", fail)
        assert main(arguments) == 2
    assert not out.exists()
    assert not kept.exists()
    assert main(arguments) == 0
    assert out.exists()
    assert kept.exists()

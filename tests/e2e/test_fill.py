"""`pretrain fill`: what transformers' fill-mask pipeline says, for strings and for files."""

import csv
from pathlib import Path

import pytest
from transformers import pipeline

from pretrain.cli import main
from pretrain.downstream import fill


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that three strings are in two blocks."""
    monkeypatch.setattr(fill, "_BLOCK", 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["protein", "text"])
def test_it_says_what_the_fill_mask_pipeline_says(
    kind: str, protein_model: Path, text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, texts = {
        "protein": (protein_model, ["MKT<mask>LV", "<mask>KT<mask>", "ACDEFGHIKLMNPQRSTVWY<mask>"]),
        "text": (text_model, ["The state of the <mask> is strong.", "<mask>", "a<mask>b <mask>."]),
    }[kind]
    assert main(["fill", str(model), *texts, "--top", "7", "--out", str(tmp_path / "filled.csv")]) == 0
    with (tmp_path / "filled.csv").open() as file:
        rows = list(csv.DictReader(file))
    theirs = pipeline("fill-mask", str(model), top_k=7)
    expected = []
    for number, text in enumerate(texts, 1):
        found = theirs(text)
        masks = found if isinstance(found[0], list) else [found]
        for mask_number, mask in enumerate(masks, 1):
            for rank, entry in enumerate(mask, 1):
                expected.append((f"text {number}", mask_number, rank, entry["token_str"], entry["score"]))
    assert len(rows) == len(expected) == 4 * 7
    for row, (name, mask_number, rank, token, probability) in zip(rows, expected, strict=True):
        assert (row["id"], int(row["mask"]), int(row["rank"])) == (name, mask_number, rank)
        assert row["token"].strip() == token.strip()
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-5)
    assert "4 masks, the best 7 tokens" in capsys.readouterr().out


def test_a_file_is_filled_as_its_strings_are(
    protein_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "masked.fasta"
    source.write_text(">first\nMKT<mask>LV\n>second\nM<mask>\nAY\n")
    assert main(["fill", str(protein_model), "--file", str(source), "--top", "3"]) == 0
    from_file = capsys.readouterr().out
    assert main(["fill", str(protein_model), "MKT<mask>LV", "M<mask>AY", "--top", "3"]) == 0
    assert capsys.readouterr().out == from_file
    lines = from_file.splitlines()
    assert lines[0] == "MKT<mask>LV"
    assert lines[1].startswith("  residue 4 ")
    assert lines[1].count("%") == 3
    assert lines[3].startswith("  residue 2 ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MKTLV"], "text 1 has no <mask>"),
        (["M<mask>1"], "text 1 has '1' in '1'; allowed: the letters"),
        (["MK*<mask>K*"], "text 1 has '*' before a <mask>"),
        ([], "give one with <mask> in it, or --file"),
        (["M<mask>", "--top", "0"], "top is 0; give 1 to 33"),
        (["M<mask>", "--out", "{taken}"], "exists already"),
        (["M<mask>", "--out", "{new}.txt"], "new.csv.txt: a table is written as .csv"),
        (["--file", "/nowhere.txt"], "/nowhere.txt: no such file"),
        (["--file", "{unmasked}", "--out", "{new}"], "unmasked.fasta:3: record 'three' has no <mask>"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    protein_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    places = {name: tmp_path / f"{name}.csv" for name in ("taken", "new")} | {"unmasked": tmp_path / "unmasked.fasta"}
    places["taken"].write_text("")
    places["unmasked"].write_text(">one\nM<mask>K\n>three\nMK\n")
    before = sorted(tmp_path.iterdir())
    assert main(["fill", str(protein_model), *(argument.format(**places) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(tmp_path.iterdir()) == before

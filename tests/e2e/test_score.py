"""`pretrain score`: the numbers of a slow loop over transformers' logits, and every row checked."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pretrain.cli import main
from pretrain.downstream import score
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.variants import VariantColumns, read_variants
from pretrain.model.encoder import MaskedLMHead

WILD_TYPE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
MUTANTS = ["A4G", "K2R:Q11E", "V15L:M1K:F19W", "T3T", "WT", "Q33A"]
METHODS = ["masked-marginals", "wildtype-marginals", "pseudo-perplexity"]


def mutate(mutant: str) -> str:
    letters = list(WILD_TYPE)
    for part in mutant.split(":") if mutant != "WT" else []:
        letters[int(part[1:-1]) - 1] = part[-1]
    return "".join(letters)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """As ProteinGym's: substitutions, whole sequences and measured effects."""
    path = tmp_path / "assay.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mutant", "note", "mutated_sequence", "DMS_score"])
        for number, mutant in enumerate(MUTANTS):
            writer.writerow([mutant, 'a "quoted",\nnote', mutate(mutant), ["0.5", "-1", "2", "", "0.1", "NA"][number]])
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Slow:
    """One string at a time through transformers."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForMaskedLM.from_pretrained(directory).eval()

    @torch.no_grad()
    def log_probability(self, sequence: str, residue: int, letter: str, masked: bool) -> float:
        batch = self.tokenizer(sequence, return_tensors="pt")
        if masked:
            batch.input_ids[0, residue] = self.tokenizer.mask_token_id
        row = self.model(**batch).logits[0, residue].double().log_softmax(-1)
        return float(row[self.tokenizer.convert_tokens_to_ids(letter)])

    def score(self, mutant: str, method: str) -> float:
        if method == "pseudo-perplexity":
            mutated = mutate(mutant)
            return float(np.mean([self.log_probability(mutated, i, x, True) for i, x in enumerate(mutated, 1)]))
        masked, total = method == "masked-marginals", 0.0
        for part in mutant.split(":") if mutant != "WT" else []:
            residue = int(part[1:-1])
            total += self.log_probability(WILD_TYPE, residue, part[-1], masked)
            total -= self.log_probability(WILD_TYPE, residue, part[0], masked)
        return total


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two masked copies of the wild type are computed at a time."""
    monkeypatch.setattr(score, "_BLOCK_TOKENS", 2 * (len(WILD_TYPE) + 2) + 1)


@pytest.mark.usefixtures("small_blocks")
def test_scores_equal_a_slow_loop_over_transformers_and_rank_as_scipy_says(
    protein_model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scored.csv"
    assert main(["score", str(protein_model), str(table), "--out", str(out), "--method", *METHODS]) == 0
    printed, rows, slow = capsys.readouterr().out, read(out), Slow(protein_model)
    assert [row["mutant"] for row in rows] == MUTANTS
    assert [row["note"] for row in rows] == ['a "quoted",\nnote'] * 6
    columns = ["masked_marginals", "wildtype_marginals", "mean_pseudo_log_likelihood"]
    for method, column in zip(METHODS, columns, strict=True):
        ours = [float(row[column]) for row in rows]
        assert ours == pytest.approx([slow.score(mutant, method) for mutant in MUTANTS], abs=2e-5)
        expected = spearmanr([ours[i] for i in (0, 1, 2, 4)], [0.5, -1, 2, 0.1]).statistic
        assert f"{method:20} Spearman {expected:.3f} with DMS_score  (4 variants)" in printed


def test_the_wild_type_may_come_from_anywhere(protein_model: Path, table: Path, tmp_path: Path) -> None:
    rows = read(table)
    (tmp_path / "wild.fasta").write_text(f">wild\n{WILD_TYPE}\n")
    tables = {
        "mutant": ["mutant"],
        "sequence": ["mutated_sequence"],
        "column": ["mutant", "target_seq"],
        "whole": ["mutated_sequence", "target_seq"],
    }
    for name, columns in tables.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([[{**row, "target_seq": WILD_TYPE}[column] for column in columns] for row in rows])
    (tmp_path / "zipped.csv.gz").write_bytes(gzip.compress((tmp_path / "mutant.csv").read_bytes()))
    given = {
        "assay.csv": [],
        "mutant.csv": ["--sequence", WILD_TYPE],
        "sequence.csv": ["--fasta", str(tmp_path / "wild.fasta")],
        "column.csv": [],
        "whole.csv": [],
        "zipped.csv.gz": ["--sequence", WILD_TYPE.lower()],
    }
    scores = []
    for number, (name, arguments) in enumerate(given.items()):
        out = tmp_path / f"out{number}.csv"
        assert main(["score", str(protein_model), str(tmp_path / name), "--out", str(out), *arguments]) == 0
        scores.append([row["masked_marginals"] for row in read(out)])
    assert all(other == scores[0] for other in scores)


def test_without_substitutions_the_whole_sequence_says_what_is_changed(tmp_path: Path) -> None:
    changed = WILD_TYPE.replace("KQR", "GQR")
    (tmp_path / "t.csv").write_text(f"mutant,mutated_sequence\nA4G,{mutate('A4G')}\n,{changed}\nWT,{WILD_TYPE}\n")
    table = read_variants(tmp_path / "t.csv", None, VariantColumns(), 1, True)
    assert [row.substitutions for row in table.rows] == [[(3, "G")], [(7, "G")], []]


def test_usual_columns_are_found_in_any_case_and_with_spaces_and_their_absence_is_said(
    protein_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "\nA4G{0}0.5\nK2R{0}-1\nI6L{0}2\n"
    run = ["score", str(protein_model), "--sequence", WILD_TYPE]
    for number, header in enumerate(("mutant,DMS_score", "Mutant, dms_score", "MUTANT , DMS_score")):
        (tmp_path / "table.csv").write_text(header + rows.format(","))
        assert main([*run, str(tmp_path / "table.csv"), "--out", str(tmp_path / f"{number}.csv")]) == 0
        assert f"with {header.split(',')[1].strip()}  (3 variants)" in capsys.readouterr().out
        assert (tmp_path / f"{number}.csv").read_text().startswith(f"{header},masked_marginals\n")
    (tmp_path / "table.csv").write_text("mutant,DMSscore" + rows.format(","))
    assert main([*run, str(tmp_path / "table.csv"), "--out", str(tmp_path / "none.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  no column DMS_score: no correlation"


def test_unknown_residues_of_the_wild_type_may_stay_and_no_change_is_exactly_zero(
    protein_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = f"MKX{WILD_TYPE[3:]}"
    (tmp_path / "table.csv").write_text(f"mutant,mutated_sequence\nA4A,{known}\nA4G,{known.replace('A', 'G', 1)}\n")
    run = ["score", str(protein_model), str(tmp_path / "table.csv"), "--out", str(tmp_path / "out.csv")]
    assert main([*run, "--sequence", known]) == 0
    assert [row["masked_marginals"] == "0.000000" for row in read(tmp_path / "out.csv")] == [True, False]
    (tmp_path / "out.csv").unlink()
    for content in ("mutant\nX3A\n", f"mutated_sequence\n{WILD_TYPE}\n"):
        (tmp_path / "table.csv").write_text(content)
        assert main([*run, "--sequence", known]) == 2
        assert "has X, which is no single residue" in capsys.readouterr().err
    (tmp_path / "table.csv").write_text(f"mutated_sequence\n{known}\n")
    assert main([*run, "--method", "pseudo-perplexity"]) == 2
    assert "mutated_sequence has X, which" in capsys.readouterr().err


def test_residues_may_be_numbered_from_anywhere(protein_model: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("mutant\nA4G\n")
    (tmp_path / "far.csv").write_text("mutant\nA104G\n")
    run = ["score", str(protein_model), "--sequence", WILD_TYPE]
    assert main([*run, str(tmp_path / "one.csv"), "--out", str(tmp_path / "a.csv")]) == 0
    assert main([*run, str(tmp_path / "far.csv"), "--out", str(tmp_path / "b.csv"), "--first_residue", "101"]) == 0
    assert read(tmp_path / "a.csv")[0]["masked_marginals"] == read(tmp_path / "b.csv")[0]["masked_marginals"]


def test_deletions_have_a_pseudo_perplexity(
    protein_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "indels.csv").write_text(f"mutated_sequence\n{WILD_TYPE}\n{WILD_TYPE[:10]}{WILD_TYPE[12:]}\n")
    run = ["score", str(protein_model), str(tmp_path / "indels.csv"), "--out", str(tmp_path / "out.csv")]
    assert main([*run, "--method", "pseudo-perplexity"]) == 0
    slow = Slow(protein_model)
    shorter = WILD_TYPE[:10] + WILD_TYPE[12:]
    expected = np.mean([slow.log_probability(shorter, i, x, True) for i, x in enumerate(shorter, 1)])
    assert float(read(tmp_path / "out.csv")[1]["mean_pseudo_log_likelihood"]) == pytest.approx(expected, abs=2e-5)
    (tmp_path / "out.csv").unlink()
    assert main([*run, "--sequence", WILD_TYPE]) == 2
    assert "indels.csv:3: mutated_sequence has 31 residues, the wild type 33" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("mutant\nA4G\nK4G\n", "table.csv:3: K4G says that residue 4 is K, the wild type has A there"),
        ("mutant\nA4G\nA99G\n", "table.csv:3: position 99 is outside of the wild type, 1 to 33"),
        ("mutant\nA4\n", "table.csv:2: 'A4' is no substitution"),
        ("mutant\nA4G:A4R\n", "table.csv:2: 'A4G:A4R' changes a residue twice"),
        ('mutant,note\nA4G,"x\ny"\nK4G,z\n', "table.csv:4: K4G says"),
        ("mutant,DMS_score\nA4G,high\n", "table.csv:2: DMS_score is 'high'; a number or nothing"),
        ("mutant,DMS_score\nA4G\n", "table.csv:2: has 1 fields, the header has 2"),
        (f"mutant,mutated_sequence\nA4G,{WILD_TYPE}\n", "table.csv:2: mutated_sequence has A at 4"),
        (
            f"mutant,mutated_sequence\nA4G,{WILD_TYPE.replace('A', 'G', 1)}L\n",
            "table.csv:2: mutated_sequence has 34 residues",
        ),
        ("mutated_sequence\nM1K\n", "table.csv:2: mutated_sequence has '1' at position 2"),
        ("variant,note\nA4G,x\n", "no column 'mutant' or 'mutated_sequence'; its columns are 'variant', 'note'"),
        ("mutant;DMS_score\nA4G;1\n", "its only column is 'mutant;DMS_score': columns are separated by commas"),
        ("mutant\nA4G\nA4X\n", "table.csv:3: A4X has X, which is no single residue"),
        ("mutant\nA4J\n", "table.csv:2: A4X has X"),
        ("mutant\nA4-\n", "table.csv:2: 'A4-' is no substitution"),
        (
            f"mutated_sequence\n{mutate('A4-')}\n",
            "table.csv:2: mutated_sequence has '-' at position 4; write",
        ),
        (
            f"mutated_sequence\n{mutate('A4.')}\n",
            "table.csv:2: mutated_sequence has '.' at position 4; write",
        ),
        (f"mutated_sequence\n{mutate('A4B')}\n", "table.csv:2: mutated_sequence has B, which is no single residue"),
        (f"mutated_sequence\n{mutate('Q33*')}\n", "table.csv:2: mutated_sequence has '*'; a stop has no score"),
        (f"mutant,target_seq\nA4G,{mutate('A4G')}\n", "table.csv:2: target_seq is another sequence than the wild type"),
        ("mutant\n", "has no variant"),
        ("mutant\rA4G\rK4G\r", "table.csv:3: K4G says"),
        ('mutant,note\nA4G,x\n"",y\n', "table.csv:3: nothing in 'mutant'; fill it in (WT for"),
        ("mutant,note,note\nA4G,x,y\n", "table.csv:1: column 'note' stands there twice"),
        ("mutant,note\nA4G,caf\udce9\n", "table.csv:2: is no UTF-8"),
        ("mutant,caf\udce9\nA4G,x\n", "table.csv:1: is no UTF-8"),
        ('mutant,note\nA4G,"z"x\n', "table.csv:2: not CSV (',' expected after '\"'); a field with"),
        ("mutated_sequence\n*\n", "table.csv:2: mutated_sequence has '*'; a stop has no score"),
        ("", "has no variant"),
        ("mutant,masked_marginals\nA4G,1\n", "has a column 'masked_marginals' already"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(
    protein_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(content, errors="surrogateescape")
    run = ["score", str(protein_model), str(table), "--out", str(tmp_path / "out.csv"), "--sequence", WILD_TYPE]
    assert main(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "table.csv:2: no wild type: give --sequence or --fasta"),
        (["--sequence", "MKT1"], "the wild type has '1' at position 4"),
        (["--sequence", WILD_TYPE, "--method", "magic"], "method is 'magic'; give one of masked-marginals"),
        (["--sequence", WILD_TYPE, "--method", METHODS[0], METHODS[0]], "masked-marginals is named twice; name each"),
        (["--fasta", "{two}"], "has 2 sequences"),
        (["--wild_type_column", "wt"], "no column 'wt'"),
        (["--score_column", "DMS"], "no column 'DMS'; its only column is 'mutant'"),
        (["--sequence_column", "mutated_sequence"], "no column 'mutated_sequence'; its only"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_one_line(
    protein_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (tmp_path / "table.csv").write_text("mutant\nA4G\n")
    (tmp_path / "two.fasta").write_text(">a\nMK\n>b\nMK\n")
    given = [argument.format(two=tmp_path / "two.fasta") for argument in arguments]
    run = ["score", str(protein_model), str(tmp_path / "table.csv"), "--out", str(tmp_path / "out.csv"), *given]
    assert main(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out.csv").exists()


def test_the_head_is_not_rounded_where_the_blocks_are(
    protein_model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the blocks compute in bfloat16, whose steps near 8 are 1/32: more than most scores differ by."""
    run = ["score", str(protein_model), str(table), "--method", *METHODS, "--out"]
    assert main([*run, str(tmp_path / "exact.csv")]) == 0
    dtypes = set()
    head = MaskedLMHead.forward

    def watch(self: MaskedLMHead, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        logits = head(self, hidden, embedding)
        dtypes.add(logits.dtype)
        return logits

    monkeypatch.setattr(MaskedLMHead, "forward", watch)
    monkeypatch.setattr(PretrainedEncoder, "precision", lambda self: torch.autocast("cpu", torch.bfloat16))
    assert main([*run, str(tmp_path / "rounded.csv")]) == 0
    assert dtypes == {torch.float32}
    exact, rounded = (
        np.array([list(row.values())[-3:] for row in read(tmp_path / name)], float)
        for name in ("exact.csv", "rounded.csv")
    )
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.3)


def test_a_model_of_text_scores_no_variants(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_text("mutant\nA4G\n")
    run = ["score", str(text_model), str(tmp_path / "table.csv"), "--out", str(tmp_path / "out.csv")]
    assert main([*run, "--sequence", WILD_TYPE]) == 2
    assert "is a model of text" in capsys.readouterr().err

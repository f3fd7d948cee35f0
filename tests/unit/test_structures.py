"""Structure files are read as what they are: chains, residues without coordinates, alternatives, modified residues."""

import gzip
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from folds import hairpin, residue, touching, write

from pretrain.downstream.structures import Structure, read_structures
from pretrain.errors import UserError

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLG"


def contacts(structure: Structure) -> set[tuple[int, int]]:
    first, second = structure.pairs
    chosen = structure.contacts()
    return set(zip(first[chosen].tolist(), second[chosen].tolist(), strict=True))


@pytest.mark.parametrize("name", ["a.pdb", "a.cif", "a.ent"])
def test_sequence_and_contacts_of_a_hairpin(name: str, tmp_path: Path) -> None:
    (found,) = read_structures([write(hairpin(SEQUENCE), tmp_path / name)])
    assert (found.id, found.sequence) == ("a_A", SEQUENCE)
    expected = touching(len(SEQUENCE))
    assert {(0, 27), (1, 27), (5, 22)} <= expected
    assert contacts(found) == expected


def test_a_compressed_file_and_a_directory_are_read(tmp_path: Path) -> None:
    plain = write(hairpin(SEQUENCE), tmp_path / "b.pdb")
    (tmp_path / "a.pdb.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "1ABC.PDB").write_bytes(plain.read_bytes())
    (tmp_path / "2ABC.ENT.GZ").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "notes.txt").write_text("no structure")
    assert [found.id for found in read_structures([tmp_path])] == ["1ABC_A", "2ABC_A", "a_A", "b_A"]


@pytest.mark.parametrize("name", ["a.pdb", "a.cif"])
def test_residues_without_coordinates_keep_their_place_and_are_asked_about_nowhere(name: str, tmp_path: Path) -> None:
    missing = (0, 8, 9)
    (found,) = read_structures([write(hairpin(SEQUENCE, missing=missing), tmp_path / name)])
    assert found.sequence == SEQUENCE
    assert np.flatnonzero(np.isnan(found.beta).any(1)).tolist() == list(missing)
    assert contacts(found) == {pair for pair in touching(len(SEQUENCE)) if not set(pair) & set(missing)}
    assert not set(missing) & {*found.pairs[0].tolist(), *found.pairs[1].tolist()}


@pytest.mark.parametrize("place", [0, 99, -1])
def test_coordinates_that_point_outside_the_listed_sequence_are_taken_in_their_own_order(
    place: int, tmp_path: Path
) -> None:
    structure = hairpin(SEQUENCE, missing=(0,))
    structure[0]["A"][4].label_seq = place
    (found,) = read_structures([write(structure, tmp_path / "a.cif")])
    assert found.sequence == SEQUENCE[1:]
    assert not np.isnan(found.beta).any()
    assert len(contacts(found)) > 10


def test_without_a_listed_sequence_it_is_that_of_the_coordinates(tmp_path: Path) -> None:
    (found,) = read_structures([write(hairpin(SEQUENCE, missing=(0,), listed=False), tmp_path / "a.pdb")])
    assert found.sequence == SEQUENCE[1:]


def test_glycine_has_the_beta_carbon_of_an_ideal_alanine(tmp_path: Path) -> None:
    structure = hairpin(SEQUENCE)
    glycine = structure[0]["A"][27]
    assert glycine.name == "GLY"
    glycine.remove_atom("CB", "\0", gemmi.Element("C"))
    ideal = {"N": (-0.525, 1.363, 0.0), "CA": (0.0, 0.0, 0.0), "C": (1.526, 0.0, 0.0)}
    for name, position in ideal.items():
        glycine.find_atom(name, "*").pos = gemmi.Position(*position)
    (found,) = read_structures([write(structure, tmp_path / "a.cif")])
    assert np.linalg.norm(found.beta[27] - [-0.529, -0.774, -1.205]) < 0.1


def test_of_alternatives_the_first_counts(tmp_path: Path) -> None:
    structure = hairpin(SEQUENCE)
    atom = structure[0]["A"][3].find_atom("CB", "*")
    atom.altloc = "A"
    other = atom.clone()
    other.altloc, other.pos = "B", gemmi.Position(90, 90, 90)
    structure[0]["A"][3].add_atom(other)
    (found,) = read_structures([write(structure, tmp_path / "a.pdb")])
    assert contacts(found) == touching(len(SEQUENCE))


def test_modified_residues_have_their_parents_letter_and_unknown_ones_an_x(tmp_path: Path) -> None:
    structure = hairpin(SEQUENCE, listed=False)
    structure[0]["A"][0].name, structure[0]["A"][1].name = "MSE", "UNK"
    structure.entities[0].full_sequence = [each.name for each in structure[0]["A"]]
    structure.assign_label_seq_id()
    (found,) = read_structures([write(structure, tmp_path / "a.cif")])
    assert found.sequence == "MX" + SEQUENCE[2:]


def test_equal_chains_count_once_and_water_further_models_and_dna_do_not(tmp_path: Path) -> None:
    structure = hairpin(SEQUENCE, listed=False)
    for name, sequence in (("B", SEQUENCE), ("C", SEQUENCE[::-1])):
        chain = gemmi.Chain(name)
        for place, letter in enumerate(sequence):
            three = structure[0]["A"][SEQUENCE.index(letter)].name
            chain.add_residue(residue(three, place, len(sequence), place + 1))
        structure[0].add_chain(chain)
    dna = gemmi.Chain("D")
    for number in range(12):
        dna.add_residue(residue("DA", number, 12, number + 1))
    structure[0].add_chain(dna)
    water = residue("HOH", 0, 1, 90)
    water.het_flag = "H"
    structure[0]["A"].add_residue(water)
    structure.add_model(gemmi.Model(2))
    structure[1].add_chain(structure[0]["A"])
    found = read_structures([write(structure, tmp_path / "a.pdb")])
    assert [(each.id, each.sequence) for each in found] == [("a_A", SEQUENCE), ("a_C", SEQUENCE[::-1])]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pdb", "not a structure", "holds no protein chain"),
        ("a.pdb", "", "holds no protein chain"),
        ("a.cif", "data_x\nloop_\n_atom_site.id\n_atom_site", "is no PDB or mmCIF file"),
        ("a.cif", "nonsense", "is no PDB or mmCIF file"),
        ("a.pdb.gz", "not compressed", "holds no protein chain|is no PDB"),
    ],
)
def test_what_is_no_structure_is_refused_by_name(name: str, content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: ({reason})"):
        read_structures([tmp_path / name])


def test_a_peptide_too_short_for_any_contact_is_refused_alone_and_passed_over_beside_a_protein(tmp_path: Path) -> None:
    short = hairpin("MKTAY")
    with pytest.raises(UserError, match=r"short.pdb: holds no protein chain with residues that are 6 apart"):
        read_structures([write(short, tmp_path / "short.pdb")])
    both = hairpin(SEQUENCE, listed=False)
    peptide = gemmi.Chain("B")
    for each in short[0]["A"]:
        peptide.add_residue(each)
    both[0].add_chain(peptide)
    assert [found.id for found in read_structures([write(both, tmp_path / "both.pdb")])] == ["both_A"]


def test_an_empty_directory_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no PDB or mmCIF files"):
        read_structures([tmp_path])
    with pytest.raises(UserError, match="not found"):
        read_structures([tmp_path / "none.pdb"])


def test_gemmi_is_asked_for_where_there_are_structures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(hairpin(SEQUENCE), tmp_path / "a.pdb")
    monkeypatch.setitem(sys.modules, "gemmi", None)
    assert read_structures([]) == []
    with pytest.raises(UserError, match=r"pip install '\.\[contacts\]'"):
        read_structures([path])

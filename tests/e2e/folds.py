"""Structures of known contacts, as files: hairpins of two ideal strands."""

import math
from pathlib import Path

import gemmi


def three(letter: str) -> str:
    """A residue's name."""
    return gemmi.expand_one_letter(letter, gemmi.ResidueKind.AA)


def residue(name: str, place: int, length: int, number: int) -> gemmi.Residue:
    """One of a hairpin: the strands run beside each other, 5 Å apart and 3.3 Å a residue; Cβ point to both sides."""
    first = place < length / 2
    height = place if first else length - 1 - place
    x, z = (0.0 if first else 5.0), 3.3 * height
    side = 1.5 if height % 2 else -1.5
    made = gemmi.Residue()
    made.name = name
    made.seqid = gemmi.SeqId(number, " ")
    atoms = {"N": (x, 0.5, z - 1.2), "CA": (x, 0.0, z), "C": (x, 0.5, z + 1.2), "CB": (x, side, z)}
    for atom_name, position in atoms.items():
        atom = gemmi.Atom()
        atom.name, atom.pos, atom.element = atom_name, gemmi.Position(*position), gemmi.Element(atom_name[0])
        made.add_atom(atom)
    return made


def hairpin(sequence: str, chain: str = "A", missing: tuple[int, ...] = (), listed: bool = True) -> gemmi.Structure:
    """Residues i and j, from 0, are in contact if i + j is length - 2 to length; at the turn all are near.

    Args:
        sequence: Its residues.
        chain: Its name.
        missing: Places, from 0, without coordinates.
        listed: Whether the whole sequence is listed apart from the coordinates.
    """
    structure = gemmi.Structure()
    model = gemmi.Model(1)
    strand = gemmi.Chain(chain)
    for place, letter in enumerate(sequence):
        if place not in missing:
            strand.add_residue(residue(three(letter), place, len(sequence), place + 1))
    model.add_chain(strand)
    structure.add_model(model)
    structure.setup_entities()
    if listed:
        structure.entities[0].full_sequence = [three(letter) for letter in sequence]
        structure.assign_label_seq_id()
    return structure


def touching(length: int) -> set[tuple[int, int]]:
    """The contacts of a hairpin between residues at least 6 apart, i < j."""

    def place(i: int) -> tuple[float, float, float]:
        height = i if i < length / 2 else length - 1 - i
        return (0.0 if i < length / 2 else 5.0), (1.5 if height % 2 else -1.5), 3.3 * height

    pairs = ((i, j) for i in range(length) for j in range(i + 6, length))
    return {(i, j) for i, j in pairs if math.dist(place(i), place(j)) < 8}


def write(structure: gemmi.Structure, path: Path) -> Path:
    if path.suffix == ".cif":
        structure.make_mmcif_document().write_file(str(path))
    else:
        structure.write_pdb(str(path))
    return path

"""Protein structures as contact maps: PDB and mmCIF files, read by gemmi."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import UserError, how_to_install

CONTACT_DISTANCE = 8.0
"""Ångström between two Cβ, below which residues are in contact (as at CASP)."""
MIN_SEPARATION = 6
"""Residues closer than that in the sequence are near each other in any fold: they are asked about nowhere."""
_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")


class Structure:
    """One protein chain.

    Attributes:
        id: The file's name without its end, and the chain's.
        sequence: All residues, also those without coordinates, where the file lists them (SEQRES).
        beta: Each residue's Cβ in Ångström, shape [L, 3]; NaN where it is not known. Of glycine, and where only Cβ is
            missing, the place where an ideal one would be.
    """

    def __init__(self, id: str, sequence: str, beta: NDArray[np.float64]) -> None:
        self.id = id
        self.sequence = sequence
        self.beta = beta

    @property
    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pairs with coordinates that are far enough apart in the sequence to be asked about: i, and j > i."""
        resolved = np.flatnonzero(~np.isnan(self.beta).any(1))
        first, second = np.triu_indices(len(resolved), 1)
        first, second = resolved[first], resolved[second]
        apart = second - first >= MIN_SEPARATION
        return first[apart], second[apart]

    def contacts(self) -> NDArray[np.bool_]:
        """Whether each of `pairs` is in contact."""
        first, second = self.pairs
        distances = np.linalg.norm(self.beta[first] - self.beta[second], axis=1)
        return np.asarray(distances < CONTACT_DISTANCE)


def read_structures(paths: Sequence[Path]) -> list[Structure]:
    """The protein chains of files and directories, one for each distinct protein in a file.

    Args:
        paths: PDB and mmCIF files (``.pdb``, ``.ent``, ``.cif``, ``.mmcif``, also ``.gz``), and directories of them.

    Raises:
        UserError: If a path has none, one cannot be read or holds no protein (names the file), or gemmi is missing.
    """
    if not paths:
        return []
    try:
        import gemmi  # noqa: F401
    except ImportError as error:
        raise UserError(f"structures are read by gemmi, which is missing: {how_to_install('contacts')}") from error
    found = []
    for path in paths:
        files = [path] if path.is_file() else sorted(file for file in path.glob("*") if _is_structure(file))
        if not files:
            what = "holds no" if path.is_dir() else "not found; give a file or directory of"
            raise UserError(f"{path}: {what} PDB or mmCIF files ({', '.join(_SUFFIXES)}, also .gz)")
        for file in files:
            found += _read(file)
    return found


def _is_structure(file: Path) -> bool:
    return _uncompressed_name(file).lower().endswith(_SUFFIXES)


def _uncompressed_name(file: Path) -> str:
    return file.stem if file.suffix.lower() == ".gz" else file.name


def _read(file: Path) -> list[Structure]:
    import gemmi

    try:
        structure = gemmi.read_structure(str(file), merge_chain_parts=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{file}: is no PDB or mmCIF file ({' '.join(str(error).split())[:150]})") from error
    structure.setup_entities()
    structure.assign_label_seq_id()
    chains = [chain for chain in _chains(structure) if len(chain.pairs[0])] if len(structure) else []
    if not chains:
        raise UserError(
            f"{file}: holds no protein chain with residues that are {MIN_SEPARATION} apart and have Cβ or backbone "
            "atoms; leave it out"
        )
    name = _uncompressed_name(file).rpartition(".")[0]
    return [Structure(f"{name}_{chain.id}", chain.sequence, chain.beta) for chain in chains]


def _chains(structure: Any) -> Iterator[Structure]:
    """The first model's chains, without copies of the same sequence."""
    import gemmi

    seen = set()
    for chain in structure[0]:
        polymer = chain.get_polymer()
        if polymer.check_polymer_type() not in (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD):
            continue
        entity = structure.get_entity_of(polymer)
        residues = list(polymer.first_conformer())
        listed = [gemmi.Entity.first_mon(names) for names in entity.full_sequence] if entity else []
        places = [residue.label_seq for residue in residues]
        # No SEQRES, or one that the coordinates do not follow.
        if any(place is None or not 1 <= place <= len(listed) for place in places):
            listed, places = [residue.name for residue in residues], list(range(1, len(residues) + 1))
        sequence = "".join(_letter(monomer) for monomer in listed)
        if sequence in seen:
            continue
        seen.add(sequence)
        beta = np.full((len(sequence), 3), np.nan)
        for place, residue in zip(places, residues, strict=True):
            beta[place - 1] = _beta(residue)
        yield Structure(chain.name, sequence, beta)


def _letter(monomer: str) -> str:
    """A residue's letter; of a modified one, such as selenomethionine, its parent's; X if it has none."""
    import gemmi

    letter = gemmi.find_tabulated_residue(monomer).one_letter_code.strip().upper()
    return letter or "X"


def _beta(residue: Any) -> NDArray[np.float64]:
    """The place of Cβ, of an ideal one (of tetrahedral geometry) where there is none, or NaN."""
    atoms = [residue.find_atom(name, "*") for name in ("CB", "N", "CA", "C")]
    beta, nitrogen, alpha, carbon = (
        np.full(3, np.nan) if atom is None else np.array(atom.pos.tolist()) for atom in atoms
    )
    if not np.isnan(beta).any():
        return beta
    to_alpha, to_carbon = alpha - nitrogen, carbon - alpha
    across = np.cross(to_alpha, to_carbon)
    # The usual coefficients: bond lengths and angles of an ideal alanine, as a sum of the backbone's directions.
    return np.asarray(alpha - 0.58273431 * across + 0.56802827 * to_alpha - 0.54067466 * to_carbon)

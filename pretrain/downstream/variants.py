"""Tables of protein variants, as ProteinGym has them: read and checked, row by row."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain.corpus.pieces import choose_column
from pretrain.corpus.readers import read_records
from pretrain.corpus.tokenizer import ProteinTokenizer, encode_or_refuse
from pretrain.downstream.finetune.table import read_fields
from pretrain.errors import UserError

MEASURED_COLUMN = "DMS_score"
_WILD_TYPE_COLUMNS = ("target_seq", "wildtype_sequence", "wild_type", "wt_sequence")
_UNKNOWN_RESIDUES = frozenset("XBZ")
"""Letters for one of several residues; `J` is read as `X`."""
_UNCHANGED = ("wt", "_wt")
_NOT_MEASURED = ("", "na", "n/a", "nan", "null", "none")
_TOKENIZER = ProteinTokenizer()
_SUBSTITUTION = re.compile(r"([A-Za-z])(-?\d+)([A-Za-z])")


@dataclass(frozen=True)
class VariantColumns:
    """What a table's columns are called; the usual names also in other case, and each only where it is there.

    Attributes:
        mutant: Substitutions such as ``A42G:K50R``; by default ``mutant``.
        mutated_sequence: The variant as a whole; by default ``mutated_sequence``.
        wild_type: What it is a variant of; by default the first of ``target_seq``, ``wildtype_sequence``, ``wild_type``
            and ``wt_sequence`` that there is.
        measured: The measured effect; by default ``DMS_score``.
    """

    mutant: str | None = None
    mutated_sequence: str | None = None
    wild_type: str | None = None
    measured: str | None = None

    def among(self, header: Sequence[str], path: Path) -> "VariantColumns":
        """What they are called in a table's header; None for those that are not there.

        Raises:
            UserError: If one that was named is not there.
        """
        stripped = {name.strip(): name for name in header}

        def find(wanted: str | None, *usual: str) -> str | None:
            found = choose_column(list(stripped), wanted, usual)
            if wanted is not None and found is None:
                raise UserError(f"{path}: no column '{wanted}'; {_shown(header)}")
            return found and stripped[found]

        return VariantColumns(
            find(self.mutant, "mutant"),
            find(self.mutated_sequence, "mutated_sequence"),
            find(self.wild_type, *_WILD_TYPE_COLUMNS),
            find(self.measured, MEASURED_COLUMN, MEASURED_COLUMN.lower()),
        )


class Variant(NamedTuple):
    """One row.

    Attributes:
        fields: The row as it is, by column.
        wild_type: The sequence that was changed; empty if it is not known.
        substitutions: Places in it, from 0, and the new residues; none for insertions and deletions.
        mutated: The variant's own sequence.
        measured: Its measured effect, if there is one.
    """

    fields: dict[str, str]
    wild_type: str
    substitutions: list[tuple[int, str]]
    mutated: str
    measured: float | None


@dataclass(frozen=True)
class VariantTable:
    """A table's header, its rows, and the name of the measured column, if there is one."""

    header: list[str]
    rows: list[Variant]
    measured_column: str | None


@dataclass
class _Reader:
    path: Path
    columns: VariantColumns
    first_residue: int
    needs_wild_type: bool
    wild_type: str | None
    line: int = 0

    def fail(self, reason: str) -> UserError:
        return UserError(f"{self.path}:{self.line}: {reason}")

    def get(self, row: dict[str, str], name: str | None) -> str | None:
        return None if name is None else row[name].strip()

    def residues(self, text: str, what: str | None) -> str:
        """A sequence in upper case, every letter known."""
        return _residues(text, f"{self.path}:{self.line}: {what}")

    def substitutions(self, mutant: str) -> list[tuple[str, int, str]]:
        """Old residue, place from 0, new residue."""
        if mutant.lower() in _UNCHANGED:
            return []
        found = []
        for part in mutant.split(":"):
            match = _SUBSTITUTION.fullmatch(part.strip())
            if not match:
                raise self.fail(f"'{part}' is no substitution; expected is one such as A42G, several as A42G:K50R")
            old, number, new = match.groups()
            found.append((self.residues(old, part), int(number) - self.first_residue, self.residues(new, part)))
        places = [place for _, place, _ in found]
        if len(set(places)) < len(places):
            raise self.fail(f"'{mutant}' changes a residue twice; name each once")
        return found

    def check_known(self, what: str | None, letters: str) -> None:
        """Refuse letters that are no residue: probabilities of these tell nothing of a protein."""
        if unknown := sorted(_UNKNOWN_RESIDUES & set(letters)):
            raise self.fail(f"{what} has {unknown[0]}, which is no single residue; give one, or remove the row")

    def variant(self, row: dict[str, str]) -> Variant:
        """A checked row."""
        try:
            "".join(row.values()).encode()
        except UnicodeEncodeError:
            raise self.fail("is no UTF-8; convert the file") from None
        mutant = self.get(row, self.columns.mutant)
        whole = self.get(row, self.columns.mutated_sequence)
        mutated = self.mutated(whole) if whole else ""
        changes = self.substitutions(mutant) if mutant else None
        if changes is None and not mutated:
            names = "' or '".join(filter(None, (self.columns.mutant, self.columns.mutated_sequence)))
            raise self.fail(f"nothing in '{names}'; fill it in (WT for the wild type itself) or remove the row")
        given = self.get(row, self.columns.wild_type)
        own = self.residues(given, self.columns.wild_type) if given else ""
        if own and self.wild_type and own != self.wild_type:
            raise self.fail(
                f"{self.columns.wild_type} is another sequence than the wild type that was given; leave that out, or "
                "correct or remove the column"
            )
        if self.columns.wild_type is None and self.wild_type is None and changes is not None and mutated:
            self.wild_type = self.revert(mutated, changes)
        wild_type = self.wild_type or own
        # What the wild type has, too, may stay where it is.
        self.check_known(self.columns.mutated_sequence, "".join(set(mutated) - set(wild_type)))
        if not wild_type:
            if self.needs_wild_type or not mutated:
                raise self.fail(
                    "no wild type: give --sequence or --fasta, or a column "
                    f"{', '.join(_WILD_TYPE_COLUMNS)} or another with --wild_type_column"
                )
            return Variant(row, "", [], mutated, self.measured(row))
        if changes is None:
            changes = self.compare(wild_type, mutated)
        return self.applied(row, wild_type, changes, mutated)

    def mutated(self, text: str) -> str:
        if text.endswith("*"):  # which tokenizers drop
            raise self.fail(f"{self.columns.mutated_sequence} has '*'; a stop has no score: remove it, or the row")
        return self.residues(text, self.columns.mutated_sequence)

    def revert(self, mutated: str, changes: list[tuple[str, int, str]]) -> str:
        letters = list(mutated)
        for old, place, _ in changes:
            self.check_place(place, len(letters))
            letters[place] = old
        return "".join(letters)

    def check_place(self, place: int, length: int) -> None:
        if not 0 <= place < length:
            last = self.first_residue + length - 1
            raise self.fail(
                f"position {place + self.first_residue} is outside of the wild type, {self.first_residue} to {last}; "
                "correct it, or give the first residue's number with --first_residue"
            )

    def compare(self, wild_type: str, mutated: str) -> list[tuple[str, int, str]]:
        if len(mutated) != len(wild_type):
            return []
        return [(a, i, b) for i, (a, b) in enumerate(zip(wild_type, mutated, strict=True)) if a != b]

    def applied(
        self, row: dict[str, str], wild_type: str, changes: list[tuple[str, int, str]], mutated: str
    ) -> Variant:
        if self.needs_wild_type and mutated and len(mutated) != len(wild_type):
            raise self.fail(
                f"{self.columns.mutated_sequence} has {len(mutated)} residues, the wild type {len(wild_type)}; "
                "insertions and deletions have a score by --method pseudo-perplexity only"
            )
        letters = list(wild_type)
        for old, place, new in changes:
            self.check_place(place, len(wild_type))
            if wild_type[place] != old:
                number = place + self.first_residue
                raise self.fail(
                    f"{old}{number}{new} says that residue {number} is {old}, the wild type has {wild_type[place]} "
                    "there; check the sequence, or give the first residue's number with --first_residue"
                )
            self.check_known(f"{old}{place + self.first_residue}{new}", old + new)
            letters[place] = new
        result = "".join(letters)
        if mutated and len(mutated) == len(wild_type) and mutated != result:
            place = next(i for i, (a, b) in enumerate(zip(mutated, result, strict=True)) if a != b)
            raise self.fail(
                f"{self.columns.mutated_sequence} has {mutated[place]} at {place + self.first_residue}, but the wild "
                f"type with '{self.columns.mutant}' has {result[place]}; correct one of them"
            )
        substitutions = [(place, new) for _, place, new in changes]
        return Variant(row, wild_type, substitutions, mutated or result, self.measured(row))

    def measured(self, row: dict[str, str]) -> float | None:
        text = self.get(row, self.columns.measured)
        if text is None or text.lower() in _NOT_MEASURED:
            return None
        try:
            value = float(text)
        except ValueError as error:
            raise self.fail(f"{self.columns.measured} is '{text}'; a number or nothing is expected") from error
        return value if math.isfinite(value) else None


def _residues(text: str, what: str) -> str:
    ids = encode_or_refuse(_TOKENIZER, text.encode("utf-8", "surrogatepass"), what)[1:-1]
    residues = "".join(_TOKENIZER.tokens[i] for i in ids)
    if gap := next((letter for letter in residues if letter in "-."), None):
        raise UserError(
            f"{what} has '{gap}' at position {residues.index(gap) + 1}; write deletions without gap characters and "
            "use --method pseudo-perplexity"
        )
    return residues


def _shown(header: Sequence[str]) -> str:
    if len(header) == 1:
        return f"its only column is {header[0]!r}: columns are separated by commas"
    return f"its columns are {', '.join(map(repr, header))}"


def read_variants(
    path: Path, wild_type: str | None, columns: VariantColumns, first_residue: int, needs_wild_type: bool
) -> VariantTable:
    """A CSV file (also .gz, .bz2, .zst) with a column of substitutions, of mutated sequences, or with both.

    The wild type is what is given, or each row's own column (both must agree); failing that, where there are both
    columns, what the first row's mutated sequence is without its substitutions. All rows are checked against it.

    Args:
        path: The file.
        wild_type: The sequence of all variants, if it is known.
        columns: What the columns are called, where that is not as usual.
        first_residue: The number of the wild type's first residue.
        needs_wild_type: Whether insertions, deletions and rows without a wild type are errors.

    Raises:
        UserError: If the file cannot be read, a column that was named is not there, or a row does not fit its wild
            type or has letters that are no residues; names file and line.
    """
    table = list(read_fields(str(path), "csv"))
    if not table:
        raise UserError(f"{path}: has no variant; at least one row is needed")
    header = list(table[0][1])
    if "\ufffd" in "".join(header):  # which stands there for bytes that are no UTF-8
        raise UserError(f"{path}:1: is no UTF-8; convert the file")
    columns = columns.among(header, path)
    if columns.mutant is None and columns.mutated_sequence is None:
        raise UserError(
            f"{path}: no column 'mutant' or 'mutated_sequence'; {_shown(header)}; name one with --mutant_column or "
            "--sequence_column"
        )
    if wild_type is not None:
        wild_type = _residues(wild_type, "the wild type")
    reader = _Reader(path, columns, first_residue, needs_wild_type, wild_type)
    rows = []
    for reader.line, row in table:
        rows.append(reader.variant(row))
    return VariantTable(header, rows, columns.measured and columns.measured.strip())


def read_wild_type(path: Path) -> str:
    """The one sequence of a FASTA file.

    Raises:
        UserError: If there are several, or it cannot be read.
    """
    records = list(read_records(path))
    if len(records) != 1:
        raise UserError(f"{path}: has {len(records)} sequences; the wild type alone is expected")
    return records[0].text.decode("utf-8", "replace")

"""What the tests of fine-tuning share: sequences with something to learn, their labels, and the command."""

import csv
import random
from pathlib import Path

from pretrain.cli import main


def sequences(count: int, seed: int) -> list[str]:
    """Each with a taste for some residues, which is what there is to learn."""
    generator = random.Random(seed)
    letters = ("LLLLLAGVIM", "KKKKKERDSN")
    return ["".join(generator.choices(letters[i % 2], k=generator.randint(5, 90))) for i in range(count)]


def label(task: str, sequence: str) -> str:
    greasy = sequence.count("L") / len(sequence)
    if task == "regression":
        return f"{3 + 20 * greasy:.4f}"
    if task == "multilabel":
        return ";".join(name for name, yes in (("greasy", greasy > 0.2), ("long", len(sequence) > 45)) if yes)
    if task == "token":
        return "".join("?" if i % 7 == 3 else "H" if residue in "LK" else "E" for i, residue in enumerate(sequence))
    return "in" if greasy > 0.2 else "out"


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))

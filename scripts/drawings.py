#!/usr/bin/env python
"""Draws docs/images/*.svg from the code itself: order, packs, masks, and who imports whom. `make drawings` runs it.

An argument names another folder for them.
"""

import sys
from collections import Counter
from html import escape
from pathlib import Path

import grimp
import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.masking import Crops, Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Planner, Position, share_out
from pretrain.corpus.tokenizer import load_tokenizer

IMAGES = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
TINTS = ("#8dd3c7", "#fdb462", "#bebada", "#fb8072", "#80b1d3", "#b3de69", "#fccde5", "#d9d9d9", "#bc80bd", "#ffed6f")
INK, FAINT, ALARM = "#222222", "#8a8a8a", "#c03028"
LENGTHS = np.array([9, 14, 5, 21, 11, 7, 17, 6, 12, 24])
STEP_TOKENS = 52
SEED = 2


class FewSequences:
    """What a planner asks of a corpus: counts and lengths."""

    num_sequences, num_tokens = len(LENGTHS), int(LENGTHS.sum())

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of the sequences."""
        return LENGTHS[indices]


class Drawing:
    """An SVG that is added to piece by piece; saved when its block ends.

    Args:
        name: Of the file, without its ending.
        width: In pixels.
        height: In pixels.
        about: What it shows, for those who do not see it.
    """

    def __init__(self, name: str, width: int, height: int, about: str) -> None:
        self.path = IMAGES / f"{name}.svg"
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif" font-size="13" role="img">',
            f"<title>{escape(about)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="6" fill="white"/>',
        ]

    def __enter__(self) -> "Drawing":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "white") -> None:
        """A filled rectangle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{edge}"/>'
        )

    def text(
        self, x: float, y: float, words: object, anchor: str = "middle", fill: str = INK, weight: int = 400
    ) -> None:
        """A line of text whose base line is at ``y``."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
            f"{escape(str(words))}</text>"
        )

    def line(self, *points: float, edge: str = INK, arrow: bool = False, dashed: bool = False) -> None:
        """A line through points, given as x, y, x, y..."""
        style = ' marker-end="url(#tip)"' * arrow + ' stroke-dasharray="4 3"' * dashed
        shown = " ".join(f"{x:g},{y:g}" for x, y in zip(points[::2], points[1::2], strict=True))
        self.parts.append(f'<polyline points="{shown}" fill="none" stroke="{edge}" stroke-width="1.4"{style}/>')

    def sequence(self, x: float, y: float, index: int, scale: float, height: float = 26) -> float:
        """A sequence, as long as it is; returns where it ends."""
        width = float(LENGTHS[index] * scale)
        self.box(x, y, width, height, TINTS[index])
        self.text(x + width / 2, y + height / 2 + 5, index)
        return x + width


def planner() -> Planner:
    """The project's planner, over the ten sequences of the drawings."""
    masking = Masking(0.15, 0.8, 0.1, 32, np.arange(4, 24), SEED)
    return Planner(FewSequences(), Order(len(LENGTHS), SEED), masking, max_length=1024)  # type: ignore[arg-type]


def draw_order() -> None:
    """The order over two epochs, cut into steps; the cursor."""
    count, cell, left, top = 2 * len(LENGTHS), 36, 90, 66
    with Drawing(
        "order", left + count * cell + 20, 190, "Two epochs of an order, cut into steps; the cursor"
    ) as drawing:
        drawing.text(left - 12, top + 21, "sequence", "end")
        drawing.text(left - 12, top - 12, "n =", "end", FAINT)
        epochs, indices = Order(len(LENGTHS), SEED)(np.arange(count))
        for n, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            x = left + n * cell
            drawing.box(x, top, cell, 30, TINTS[index])
            drawing.text(x + cell / 2, top + 21, index)
            drawing.text(x + cell / 2, top - 12, n, fill=FAINT)
            if n % len(LENGTHS) == 0:
                drawing.text(x + len(LENGTHS) * cell / 2, 26, f"epoch {epoch}: every sequence once", weight=600)
                drawing.line(x, 36, x, top + 36, edge=FAINT, dashed=True)
        position, number = Position(), 0
        while position.cursor < count:
            after = planner().step(position, STEP_TOKENS).after
            first, last = left + position.cursor * cell + 3, left + min(after.cursor, count) * cell - 3
            whole = after.cursor <= count
            drawing.line(first, top + 40, first, top + 48, last, top + 48, *((last, top + 40) if whole else ()))
            drawing.text((first + last) / 2, top + 66, f"step {number}" if whole or last - first > 60 else "")
            if number == 2:
                x = left + after.cursor * cell
                drawing.line(x, top + 104, x, top + 36, edge=ALARM, arrow=True)
                drawing.text(
                    x + 6, top + 104, f"cursor {after.cursor}: all that is saved of the data's state", "start", ALARM
                )
            position, number = after, number + 1


def draw_packing() -> None:
    """One step as a padded batch, and as the packs of two processes."""
    step = planner().step(Position(), 2 * STEP_TOKENS)
    scale, left, top = 10, 90, 44
    longest = int(step.lengths.max())
    rows = len(step.indices)
    width = left + STEP_TOKENS * scale + 230
    second = top + rows * 29 + 50
    with Drawing("packing", width, second + 140, "One step as a padded batch and as two packs") as drawing:
        drawing.text(20, 26, "A step as a padded batch", "start", weight=600)
        for row, index in enumerate(step.indices.tolist()):
            end = drawing.sequence(left, top + row * 29, index, scale)
            drawing.box(end, top + row * 29, left + longest * scale - end, 26, "#f2f2f2", "#dddddd")
        share = 1 - step.lengths.sum() / (rows * longest)
        drawing.text(left + longest * scale + 14, top + rows * 29 / 2, f"{share:.0%} is padding", "start", ALARM)
        drawing.text(20, second, "The same step in the packs of two processes", "start", weight=600)
        for rank, pack in enumerate(share_out(step, 2)):
            y = second + 18 + rank * 58
            drawing.text(left - 12, y + 18, f"process {rank}", "end")
            x: float = left
            bounds = [0]
            for index in pack.indices.tolist():
                drawing.text(x, y + 41, bounds[-1], fill=FAINT)
                x = drawing.sequence(x, y, index, scale)
                bounds.append(bounds[-1] + int(LENGTHS[index]))
            drawing.text(x, y + 41, bounds[-1], fill=FAINT)
            drawing.text(x + 20, y + 18, f"cu_seqlens {bounds}", "start", FAINT)


def draw_masks() -> None:
    """The same residues in training, in the next epoch, and in validation."""
    tokenizer = load_tokenizer("esm")
    residues = "MKTAYIAKQRQISFVKSHFSRQLEERLG"
    tokens = np.array([tokenizer.tokens.index(residue) for residue in residues])
    masking = Masking(0.3, 0.8, 0.1, tokenizer.mask_token_id, tokenizer.replacement_ids, SEED)
    validation = Masking(0.15, 1.0, 0.0, tokenizer.mask_token_id, tokenizer.replacement_ids, 0)
    cell, left = 26, 150
    with Drawing(
        "masks", left + len(residues) * cell + 20, 232, "What training and validation see of a sequence"
    ) as drawing:
        views = (
            ("sequence", None, 0),
            ("training, epoch 0", masking, 0),
            ("training, epoch 1", masking, 1),
            ("validation", validation, 0),
        )
        for row, (name, how, epoch) in enumerate(views):
            y = 20 + row * 40
            drawing.text(left - 12, y + 20, name, "end", weight=600)
            seen, targets = tokens, set()
            if how:
                length, when = np.array([len(tokens)]), (np.array([epoch]), np.array([5]))
                counts = how.target_counts(*when, length)
                seen, positions, _ = how.apply(tokens, Crops(np.array([0]), length, counts, *when))
                targets = set(positions.tolist())
            for n, (token, was) in enumerate(zip(seen.tolist(), tokens.tolist(), strict=True)):
                masked = token == tokenizer.mask_token_id
                fill = (
                    "#f4f4f4" if n not in targets else "#3d5a80" if masked else TINTS[1] if token != was else TINTS[5]
                )
                drawing.box(left + n * cell, y, cell, 30, fill)
                symbol = "?" if masked else tokenizer.tokens[token]
                drawing.text(left + (n + 0.5) * cell, y + 20, symbol, fill="white" if masked else INK)
        legend = (("#3d5a80", "<mask>"), (TINTS[1], "another residue"), (TINTS[5], "stays, and is asked about"))
        for n, (fill, meaning) in enumerate(legend):
            drawing.box(left + n * 170, 196, 16, 16, fill)
            drawing.text(left + n * 170 + 24, 209, meaning, "start")


def draw_architecture() -> None:
    """Who imports whom: the rooms and the number of imports between them, counted in the code."""
    rooms = {"cli": (300, 20), "downstream": (300, 100), "train": (300, 180), "model": (150, 270), "corpus": (450, 270)}
    about = {
        "cli": "the commands",
        "downstream": "a run → what a user wants",
        "train": "logits → checkpoints",
        "model": "batches → logits",
        "corpus": "files → batches",
    }
    graph = grimp.build_graph("pretrain")
    counts: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, room = (f"{name}.".split(".")[1] for name in (module, imported))
            if importer != room and {importer, room} <= rooms.keys():
                counts[importer, room] += 1
    with Drawing("architecture", 700, 370, "The packages and the imports between them") as drawing:
        for (importer, imported), count in sorted(counts.items()):
            (x0, y0), (x1, y1) = rooms[importer], rooms[imported]
            beyond = {"cli": 40, "downstream": 0}.get(importer)
            if x0 == x1 and y1 - y0 > 80:  # past the room between
                drawing.line(x0 - 97, y0 + 22, x0 - 120, y0 + 22, x0 - 120, y1 + 22, x1 - 99, y1 + 22, arrow=True)
                drawing.text(x0 - 126, y0 + 66, count, "end", FAINT)
            elif x0 != x1 and beyond is not None:  # around the outside
                out = 1 if x1 > x0 else -1
                side = x1 + out * (115 + beyond)
                drawing.line(x0 + out * 97, y0 + 22, side, y0 + 22, side, y1 + 22, x1 + out * 99, y1 + 22, arrow=True)
                drawing.text(side + out * 5, y0 + 52, count, "start" if out > 0 else "end", FAINT)
            else:
                start, end = (x0 + (x1 - x0) * 0.25, y0 + 44), (x1 + (x0 - x1) * 0.25, y1 - 2)
                drawing.line(*start, *end, arrow=True)
                drawing.text((start[0] + end[0]) / 2 + 10, (start[1] + end[1]) / 2 + 4, count, "start", FAINT)
        for n, (room, (x, y)) in enumerate(rooms.items()):
            drawing.box(x - 97, y, 194, 44, TINTS[n], FAINT)
            drawing.text(x, y + 18, room, weight=600)
            drawing.text(x, y + 35, about[room])
        drawing.text(300, 350, "Figures: how many imports. Every room may import errors and shipped.", fill=FAINT)


if __name__ == "__main__":
    draw_order()
    draw_packing()
    draw_masks()
    draw_architecture()

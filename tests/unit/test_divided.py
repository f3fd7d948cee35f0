"""Divided tensors: whatever rows are asked for, of however many parts; and no part that is not what it should be."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.errors import UserError
from pretrain.train.checkpoint import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from pretrain.train.divided import PARTS, DividedTensor, OwnRows, assemble, part_name, take_out, write_part

WEIGHT = torch.arange(35.0).view(7, 5)
MOMENT = torch.arange(3, dtype=torch.bfloat16)


def save(directory: Path, step: int, processes: int = 2) -> Path:
    """A checkpoint, as so many processes write it together."""
    path = directory / f"step-{step:09d}.ckpt"
    digests = {}
    for process in range(processes):

        def own(tensor: torch.Tensor) -> OwnRows:
            chunks = [*tensor.chunk(processes), *[tensor[:0]] * processes]
            return OwnRows(tensor.shape, chunks[process].contiguous())  # noqa: B023

        checkpoint = {
            "state_dict": {"a.weight": own(WEIGHT + step), "inv_freq": torch.ones(2)},
            "optimizer_states": [{"state": {0: {"exp_avg": own(MOMENT), "step": torch.tensor(3.0)}}, "betas": (1, 2)}],
            "global_step": step,
        }
        content, rows = take_out(checkpoint)
        digests[part_name(path, process, processes)] = write_part(
            directory / part_name(path, process, processes), rows
        ).hex()
    AtomicCheckpointIO().save_checkpoint({**content, PARTS: digests}, path)
    return path


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 9])
def test_what_many_processes_wrote_is_read_as_what_one_would_have_written(tmp_path: Path, processes: int) -> None:
    path = save(tmp_path, 4, processes)
    lazy = read_checkpoint(path)
    assert isinstance(lazy["state_dict"]["a.weight"], DividedTensor)
    for read in (assemble(lazy), AtomicCheckpointIO().load_checkpoint(path)):
        assert torch.equal(read["state_dict"]["a.weight"], WEIGHT + 4)
        assert torch.equal(read["optimizer_states"][0]["state"][0]["exp_avg"], MOMENT)
        assert read["optimizer_states"][0]["state"][0]["exp_avg"].dtype == torch.bfloat16
        assert read["optimizer_states"][0]["betas"] == (1, 2)
        assert read["global_step"] == 4
        assert PARTS not in read
    stored = torch.load(path, weights_only=True)
    assert sum(tensor.numel() for tensor in stored["state_dict"].values() if isinstance(tensor, torch.Tensor)) == 2


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 24), st.integers(0, 24))
def test_any_rows_come_from_only_those_files_that_hold_them(counts: list[int], begin: int, end: int) -> None:
    tensor = torch.arange(3.0 * sum(counts)).view(-1, 3)
    opened: list[int] = []

    class Part:
        def __init__(self, number: int, rows: torch.Tensor) -> None:
            self.number, self.rows = number, rows

        def get_slice(self, name: str) -> Any:
            return self

        def get_shape(self) -> list[int]:
            return list(self.rows.shape)

        def __getitem__(self, rows: slice) -> torch.Tensor:
            opened.append(self.number)
            return self.rows[rows]

    parts = [Part(number, rows) for number, rows in enumerate(tensor.split(counts))]
    divided_tensor = DividedTensor("x", tensor.shape, parts)
    divided_tensor.check()
    assert torch.equal(divided_tensor[begin:end], tensor[begin:end])
    owner = [number for number, count in enumerate(counts) for _ in range(count)]
    assert set(opened) == (set(owner[begin:end]) or {0})


def truncate(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-1])


def flip(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-1] + bytes([part.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "the checksum of step-000000002.part-1-of-2.safetensors is wrong"),
        (flip, "the checksum of step-000000002.part-1-of-2.safetensors is wrong"),
        (Path.unlink, "step-000000002.part-1-of-2.safetensors is missing"),
    ],
)
def test_a_checkpoint_with_a_damaged_part_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage(tmp_path / "step-000000002.part-1-of-2.safetensors")
    path, checkpoint, problems = newest_checkpoint(tmp_path) or pytest.fail("none is left")
    assert (path, checkpoint["global_step"]) == (older, 1)
    assert problems == [f"{newer}: not a complete checkpoint of tensors and plain values ({message})"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../step-000000002.part-0-of-1.safetensors", "model.safetensors"])
def test_a_part_is_a_file_beside_the_checkpoint_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 2)
    content = torch.load(path, weights_only=True)
    AtomicCheckpointIO().save_checkpoint({**content, PARTS: {name: "0" * 64}}, path)
    with pytest.raises(UserError, match="is no name of a part"):
        read_checkpoint(path)


def test_parts_that_are_intact_but_of_something_else_are_refused(tmp_path: Path) -> None:
    path, part = save(tmp_path, 2), tmp_path / "step-000000002.part-1-of-2.safetensors"
    with safe_open(part, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = torch.load(path, weights_only=True)
    huge = (2**63).to_bytes(8, "little") + b"{}"
    for wrong in ({**tensors, "state_dict.a.weight": torch.zeros(9, 5)}, {"other": torch.zeros(2)}, huge):
        part.write_bytes(wrong) if isinstance(wrong, bytes) else save_file(wrong, part)
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        content[PARTS][part.name] = digest
        AtomicCheckpointIO().save_checkpoint(content, path)
        with pytest.raises(UserError, match="not a complete checkpoint"):
            read_checkpoint(path)

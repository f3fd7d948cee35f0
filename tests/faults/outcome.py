"""A command in a process of its own: how it ends and what it says."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pretrain.cli import main

PROCESSES = multiprocessing.get_context("forkserver")


class Outcome(NamedTuple):
    """The exit code, and what was said on standard error."""

    code: int
    said: str

    def line(self, code: int, noise: str = "") -> str:
        """The one line that begins with ``pretrain: error:``; fails on another exit code, or if more was said.

        ``noise`` is what Python says of an object of torch's that it could not tidy up.
        """
        assert self.code == code, self.said
        if noise and noise in self.said:
            line = next(line for line in self.said.splitlines() if line.startswith("pretrain: error: "))
            return line.removeprefix("pretrain: error: ")
        assert "Traceback" not in self.said
        *before, last = self.said.strip().splitlines()
        assert last.startswith("pretrain: error: "), self.said
        assert all(line.startswith("pretrain: warning: ") for line in before), self.said
        return last.removeprefix("pretrain: error: ")


def outcome(errors: Path, *arguments: object, prepare: Callable[[], None] | None = None) -> Outcome:
    """Run ``pretrain`` with these arguments, after ``prepare`` in the same process; ``errors`` keeps what is said."""
    given = [str(argument) for argument in arguments]
    process = PROCESSES.Process(target=_run, args=(given, str(errors), dict(os.environ), prepare))
    process.start()
    process.join(100)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{given} hangs; it said {errors.read_text()}")
    assert process.exitcode is not None
    return Outcome(process.exitcode, errors.read_text())


def _run(arguments: list[str], errors: str, environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # callbacks that configs name
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # how loader workers start, where nobody says otherwise
    with Path(errors).open("w", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        code = 1
        try:
            if prepare:
                prepare()
            code = main(arguments)
        except Exception:
            traceback.print_exc()
        finally:
            file.flush()
            os._exit(code)

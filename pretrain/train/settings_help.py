"""What `pretrain fit --help` shows: the project's own settings and the trainer's usual ones, of hundreds of lines."""

import re
import textwrap
from collections.abc import Sequence

_LEFT_OUT = ("Customize every aspect of training via flags:", "Linked arguments:")
_TITLES = {"model": "Model", "data": "Data", "spikes": "Loss spikes", "checkpoint": "Checkpoints"}
_USUAL = {
    "accelerator": "cpu, gpu, or auto: a GPU if there is one (default auto)",
    "strategy": "auto; for several GPUs, give -c ddp or -c fsdp instead (default auto)",
    "devices": "processes of each machine: a number, a list of GPUs, or auto (default auto)",
    "num_nodes": "machines (default 1)",
    "precision": "bf16-mixed: required on a GPU, -c gpu sets it; 32-true: on a CPU, the default there",
    "max_steps": "optimizer steps of the whole run, required: epochs x tokens of the corpus / data.global_batch_tokens",
    "accumulate_grad_batches": "packs that each process works through in a step, which stays the same: more packs are "
    "smaller, and take less memory (default 1)",
    "gradient_clip_val": "norm that gradients are clipped to; null: not at all (default null)",
}
"""In our words: Lightning's texts tell of what a run refuses."""


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for help instead of a command's work."""
    return "--help" in arguments or "-h" in arguments


def shorten_help(text: str, arguments: Sequence[str]) -> str:
    """A parser's help, shortened unless all of it was asked for with ``--help trainer``.

    Args:
        text: The whole help: usage, description and sections, each a line at the margin and indented lines.
        arguments: What was given to the command.
    """
    if "trainer" in arguments:
        return text
    _, usage, *sections = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    program = usage.split()[1:3]
    kept = [f"usage: {' '.join(program)} -c CONFIG [-c OVERLAY ...] [--SETTING VALUE ...]\n\n"]
    kept += [_titled(section) for section in sections if not section.startswith(_LEFT_OUT)]
    return "".join([*kept, _trainer(), f"All of the trainer's settings: {' '.join(program)} --help trainer\n"])


def _titled(section: str) -> str:
    """The section under a short title, where its own is the first sentence about a class."""
    found = re.match(r"\S.*\n  --(\w+) CONFIG ", section)
    return f"{_TITLES[found[1]]}:\n{section.partition(chr(10))[2]}" if found and found[1] in _TITLES else section


def _trainer() -> str:
    """The section of the trainer's usual settings."""
    lines = ["The trainer's usual settings:"]
    for name, about in _USUAL.items():
        lines += [f"  --trainer.{name} {name.upper()}", textwrap.indent(textwrap.fill(about, 54), " " * 24)]
    return "\n".join([*lines, "", ""])

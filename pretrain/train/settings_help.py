"""What `pretrain fit --help` shows: the project's own settings and the trainer's usual ones, of hundreds of lines."""

import re
from collections.abc import Sequence

_TRAINER = "Customize every aspect of training via flags:"
_LINKS = "Linked arguments:"
_USUAL = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
)


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
    trainer = ""
    for section in sections:
        if section.startswith(_TRAINER):
            trainer = _usual(section)
        elif not section.startswith(_LINKS):
            kept.append(section)
    return "".join([*kept, trainer, f"All of the trainer's settings: {' '.join(program)} --help trainer\n"])


def _usual(section: str) -> str:
    """The section of the trainer's settings with the usual ones only."""
    settings = re.split(r"^(?=  --)", section, flags=re.MULTILINE)
    chosen = [text for text in settings if text.startswith(tuple(f"  --trainer.{name} " for name in _USUAL))]
    return "".join(["The trainer's usual settings:\n", *chosen]).rstrip() + "\n\n"

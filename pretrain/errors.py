"""What goes wrong for users: the exception that means "you can mend this", the one that does not, and what both say."""

import errno


class UserError(ValueError):
    """A mistake in what the user gave: one line, exit code 2; says what was found, what is allowed and what to do."""


class CrashError(RuntimeError):
    """Something from outside ended the work, such as a killed process: one line, exit code 1; trying again may do."""


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed because the disk or quota is full; space may be freed while the run continues."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def how_to_install(extra: str) -> str:
    """The command that brings an extra: from the clone, as the package is on no index, where a stranger's might be."""
    return f"`pip install '.[{extra}]'` in pretrain's clone"


def one_line(error: BaseException, limit: int | None = None) -> str:
    """What an exception says, in one line of so many characters at most; its class where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__

"""What goes wrong for users: the exception that means "you can mend this", the one that does not, the full disk."""

import errno


class UserError(ValueError):
    """A mistake in what the user gave: one line, exit code 2; says what was found, what is allowed and what to do."""


class CrashError(RuntimeError):
    """Something from outside ended the work, such as a killed process: one line, exit code 1; trying again may do."""


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed for want of space, which somebody may make while a run goes on."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)

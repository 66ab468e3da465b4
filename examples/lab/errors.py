"""Errors that the user can mend, and how a command ends."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Shown as its message alone, without a traceback."""


class UsageError(UserError):
    """The command line is wrong."""


class OutOfTimeError(Exception):
    """The time that was given is over; the same command goes on."""


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command. Returns 0, or 1 for what went wrong on the way, 2 for a wrong command line."""
    try:
        command()
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (OutOfTimeError, KeyboardInterrupt) as stop:
        print("Stopped. The same command goes on after the last whole epoch.", file=sys.stderr)
        return 0 if isinstance(stop, OutOfTimeError) else 1
    return 0

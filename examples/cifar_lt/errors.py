"""Errors that the user can mend."""


class UserError(Exception):
    """Shown as its message alone, without a traceback."""

"""Mistakes that are shown as one line."""

__all__ = ["UserError", "one_line"]


class UserError(Exception):
    """A mistake that the user can put right; shown as one line, without a traceback."""


def one_line(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

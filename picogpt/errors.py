"""Errors that a user can act on. The command line prints their message without a traceback."""

from __future__ import annotations


class PicogptError(Exception):
    """Something failed: a file, the network, the device. The message names it and says what to do."""

    exit_status = 1


class UsageError(PicogptError):
    """The request itself is wrong: a flag, a setting, a value."""

    exit_status = 2


class Unreachable(PicogptError):
    """No source of an asset answered; another asset may still be had."""


class Interrupted(PicogptError):
    """A signal asked for a stop and everything needed to go on has been saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def innermost(error: BaseException) -> str:
    """The last cause in a chain of library errors: the one a person understands."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error) or type(error).__name__

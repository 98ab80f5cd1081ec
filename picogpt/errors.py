"""Errors that a user can act on. The command line prints their message without a traceback."""

from __future__ import annotations


class PicogptError(Exception):
    """Something failed: a file, the network, the device. The message names it and says what to do."""

    exit_status = 1


class UsageError(PicogptError):
    """The request itself is wrong: a flag, a setting, a value."""

    exit_status = 2


class Unsuited(UsageError):
    """The request would work, but this device has no use for it."""


class Unreachable(PicogptError):
    """No source of a file answered; a different file may still be available."""


class Refused(Unreachable):
    """A source refused a file, and would refuse it again."""


class Interrupted(PicogptError):
    """A signal stopped the training, and everything needed to continue has been saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def innermost(error: BaseException) -> str:
    """The root cause in a chain of library errors, which is the most readable one."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error) or type(error).__name__


def is_compile_error(error: BaseException) -> bool:
    """Whether torch.compile itself failed, for example without a working C++ compiler, and not the compiled code."""
    return type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    names = {cls.__name__ for cls in type(error).__mro__}
    # On a CPU torch raises a RuntimeError, with other words on Linux than on Windows.
    words = (
        "not enough memory",
        "DefaultCPUAllocator: can't allocate memory",
        "Cannot allocate memory",
        "std::bad_alloc",
    )
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or any(part in str(error) for part in words)

"""From an exception to one line and an exit code."""

from __future__ import annotations

import errno

__all__ = ["Interrupted", "describe"]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_INPUT_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    NotImplementedError,
)


class Interrupted(RuntimeError):
    """Ctrl-C during work that can go on later; the message says how."""


def describe(error: BaseException) -> tuple[str, int]:
    """(the line for stderr, the exit code) of an error that ended a command."""
    if isinstance(error, Interrupted):
        return f"interrupted: {_one_line(str(error))}", INTERRUPTED
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted", INTERRUPTED
    # Usage errors of the argument parser. By shape, because typer carries its own copy of click since 0.27 or
    # so and the classes of the two are not related.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return f"error: {_usage(error)}", BAD_INPUT
    if isinstance(error, _INPUT_ERRORS):
        return f"error: {_text(error)}", BAD_INPUT
    if isinstance(error, (RuntimeError, OSError, MemoryError)):
        return f"error: {_text(error)}", FAILED
    if isinstance(error, ImportError):
        return f"error: {_text(error)} (fastedit doctor shows what is installed)", FAILED
    kind = type(error).__name__
    return f"error: unexpected {kind}: {_text(error)} (FASTEDIT_DEBUG=1 shows where)", FAILED


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        reason = (error.strerror or "input/output error").lower()
        if error.errno == errno.ENOSPC:
            reason = "no space left on the device; nothing was replaced"
        elif error.errno == errno.EFBIG:
            reason = "file larger than the limit allows; nothing was replaced"
        return f"{error.filename}: {reason}" if error.filename else reason
    return _one_line(str(error)) or type(error).__name__


def _usage(error: BaseException) -> str:
    message = _one_line(str(error.format_message()))  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return message.rstrip(".") + hint


def _one_line(text: str) -> str:
    return " ".join(text.split())

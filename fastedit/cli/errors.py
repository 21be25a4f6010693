"""From an exception to one line and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Sequence

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


# A word in the parser's message about a type -> what the value must be.
_TYPES = {"integer": "an integer", "number": "a number", "float": "a number"}


class Interrupted(RuntimeError):
    """Ctrl-C during work that can go on later; the message says how."""


def describe(error: BaseException, arguments: Sequence[str] = ()) -> tuple[str, int]:
    """(the line for stderr, the exit code) of an error that ended a command with these arguments."""
    if isinstance(error, Interrupted):
        return f"interrupted: {_one_line(str(error))}", INTERRUPTED
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted", INTERRUPTED
    # Usage errors of the argument parser. By shape, because typer carries its own copy of click since 0.27 or
    # so and the classes of the two are not related.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return f"error: {_usage(error, arguments)}", BAD_INPUT
    if isinstance(error, _INPUT_ERRORS):
        # Some messages go on with a hint for Python.
        problem = getattr(error, "problem", None)
        return f"error: {_one_line(problem) if isinstance(problem, str) else _text(error)}", BAD_INPUT
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


def _usage(error: BaseException, arguments: Sequence[str]) -> str:
    message = _wrong_type(error, arguments) or _one_line(str(error.format_message()))  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return message.rstrip(".") + hint


def _wrong_type(error: BaseException, arguments: Sequence[str]) -> str | None:
    """The parser's message names neither the rule nor the value: the value is what stands after the option."""
    message, options = str(getattr(error, "message", "")), getattr(getattr(error, "param", None), "opts", ())
    rule = next((rule for word, rule in _TYPES.items() if f"valid {word}" in message), None)
    for position in reversed(range(len(arguments))):
        option, equals, value = arguments[position].partition("=")
        if rule is not None and option in options:
            value = value if equals else next(iter(arguments[position + 1 :]), "")
            return f"{option} must be {rule}, got {value!r}"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())

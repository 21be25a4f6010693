"""The command line: ``fastedit`` and ``python -m fastedit``. One module a command group, all heavy imports
inside.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "run"]


def main() -> None:
    """Console entry point: run the arguments of this process and exit with the code."""
    # OpenMP threads that wait spin by default; where other programs use the cores too, that makes small
    # matrices several times slower. Read once, when torch is loaded, so it is set here and nowhere in the
    # library.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Until the command begins there is nothing to clean up, and an exception in the middle of an import can
    # come out as anything.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    # Started with a closed stdout or stderr, the interpreter has none.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            from fastedit.cli.errors import describe

            sys.stderr.write(describe(OSError(error.errno, error.strerror, "stdout"))[0] + "\n")
        # What is left in the buffer would fail again, with a traceback, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    Errors are one line on stderr. With FASTEDIT_DEBUG=1 in the environment they are raised with their
    traceback.
    """
    from fastedit.cli.app import build
    from fastedit.cli.errors import describe

    arguments = list(arguments)
    command = build()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _refuse_empty(arguments)
        if os.environ.get("FASTEDIT_BACKEND"):
            _check_backend(os.environ["FASTEDIT_BACKEND"])
        code = command.main(arguments, prog_name="fastedit", standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("FASTEDIT_DEBUG") == "1":
            raise
        if isinstance(error, BrokenPipeError):
            return 1  # whoever read the output has gone, and needs no message
        message, code = describe(error, arguments)
        sys.stderr.write(message + "\n")
    return code if isinstance(code, int) else 0


def _refuse_empty(arguments: Sequence[str]) -> None:
    """An unset variable of the shell arrives as '', which as a path would be the current folder."""
    for before, argument in zip(["", *arguments], arguments):
        option, equals, value = argument.partition("=")
        if (argument == "" and before.startswith("-")) or (option.startswith("--") and equals and not value):
            raise ValueError(f"{before if argument == '' else option} must not be empty, got ''")


def _check_backend(name: str) -> None:
    from fastedit.ops._dispatch import BACKENDS

    if name not in BACKENDS:
        raise ValueError(f"FASTEDIT_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)

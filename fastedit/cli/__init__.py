"""The command line: ``fastedit`` and ``python -m fastedit``. One module a command group, all heavy imports
inside.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence

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
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


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
        code = command.main(arguments, prog_name="fastedit", standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("FASTEDIT_DEBUG") == "1":
            raise
        message, code = describe(error, arguments)
        sys.stderr.write(message + "\n")
    return code if isinstance(code, int) else 0


def _refuse_empty(arguments: Sequence[str]) -> None:
    """An unset variable of the shell arrives as '', which as a path would be the current folder."""
    for before, argument in zip(["", *arguments], arguments):
        option, equals, value = argument.partition("=")
        if (argument == "" and before.startswith("-")) or (option.startswith("--") and equals and not value):
            raise ValueError(f"{before if argument == '' else option} must not be empty, got ''")


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)

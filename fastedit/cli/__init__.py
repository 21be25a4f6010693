"""The command line: ``fastedit`` and ``python -m fastedit``. One module a command group, all heavy imports
inside.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

__all__ = ["main", "run"]


def main() -> None:
    """Console entry point: run the arguments of this process and exit with the code."""
    # OpenMP threads that wait spin by default; where other programs use the cores too, that makes small
    # matrices several times slower. Read once, when torch is loaded, so it is set here and nowhere in the
    # library.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    from fastedit.cli.errors import describe

    try:
        from fastedit.cli.app import build

        code = build().main(list(arguments), prog_name="fastedit", standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("FASTEDIT_DEBUG") == "1":
            raise
        message, code = describe(error)
        sys.stderr.write(message + "\n")
    return code if isinstance(code, int) else 0

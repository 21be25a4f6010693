"""``python -m fastedit``: the command line."""

from __future__ import annotations

__all__: list[str] = []

if __name__ == "__main__":
    try:
        from fastedit.cli import main

        main()
    except KeyboardInterrupt:
        import sys

        sys.stderr.write("interrupted\n")
        sys.exit(130)

"""``python -m fastedit``: the command line."""

from __future__ import annotations

from fastedit.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()

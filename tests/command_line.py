"""Running the command line in tests: outcomes, and options that make an edit tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["FAST", "QUICK", "Outcome", "Run"]

QUICK = ("--set", "v_num_grad_steps=3", "--set", "context_template_length_params=[]")
"""Options that make a tiny edit take a fraction of a second."""

FAST = (*QUICK, "--set", "mom2_adjustment=false")
"""The same, without statistics."""


@dataclass
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON; fails if anything else was printed there."""
        return json.loads(self.out)

    def refused(self, *words: str, code: int = 2) -> None:
        """One line of error that holds all the words, nothing on stdout, and the exit code."""
        assert self.code == code, self.err
        assert self.out == ""
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        for word in words:
            assert word in self.err


Run = Callable[..., Outcome]

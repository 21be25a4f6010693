"""One MEMIT job of the engine benches, for fastedit and for the naive twin: the same facts, contexts and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import engine_model as made
import torch
from engine_flops import Flops
from judge import error_of, green
from reference.memit import memit as naive_memit
from torch import Tensor
from twin_cost import SAMPLED, TwinTargets, equation_seconds, key_seconds, time_targets

from fastedit.editor import Editor

__all__ = ["MemitCase"]

Phases = dict[str, float]


class MemitCase:
    """`edits` facts in six contexts on the model of `ed`, with published hyper-parameters `hyper` as twins name them.

    chosen: the edits that the twin runs, spread over the facts, since prompts differ in length.
    """

    def __init__(self, ed: Editor, edits: int, hyper: dict[str, Any], *, sampled: int) -> None:
        self.ed, self.edits, self.hyper = ed, edits, dict(hyper)
        self.layers: tuple[int, ...] = self.hyper.pop("layers")
        self.steps, self.lam = int(self.hyper.pop("steps")), float(self.hyper.pop("lam"))
        arch = ed.session.arch
        vocabulary = ed.model.config.vocab_size
        contexts = made.templates(((10, 5),), vocabulary)
        self.requests = made.facts(edits, vocabulary)
        groups = (1, len(contexts) - 1)
        self.twins = [made.twin_request(ed.tokenizer, r, contexts, groups) for r in self.requests]
        self.chosen = list(range(0, edits, max(1, edits // sampled)))[:sampled]
        self.C = made.second_moments(ed, self.layers)
        self.module, self.site = f"{arch.row.block}.{arch.row.mlp_out}", arch.row.block
        self.options = {
            "layers": self.layers,
            "context_templates": ((contexts[0],), tuple(contexts[1:])),
            "mom2_update_weight": self.lam,
            "v_num_grad_steps": self.steps,
        }

    @property
    def few(self) -> list[Any]:
        return [self.twins[i] for i in self.chosen]

    @property
    def twin_scaled_from(self) -> str:
        return f"{len(self.chosen)} edits, {SAMPLED} steps, one of {len(self.layers)} equations"

    def solve(self, requests: Sequence[Any] | None = None, ed: Editor | None = None, **options: Any) -> Any:
        """Ours, of all requests unless some are named."""
        chosen = self.requests if requests is None else list(requests)
        return (ed or self.ed).solve(chosen, "memit", {**self.options, **options})

    def time_targets(self) -> TwinTargets:
        return time_targets(self.ed.model, self.site.format(self.layers[-1]), self.few, self.hyper)

    def twin_seconds(self, targets: TwinTargets) -> Phases:
        """What the whole job takes the twin, by phase."""
        last, layers = self.layers[-1], len(self.layers)
        width = self.ed.session.arch.width
        return {
            "targets": targets.seconds(self.twins, self.steps),
            "sweep": key_seconds(
                self.ed.model, self.module.format(last), self.site.format(last), self.few, self.twins, layers
            ),
            "equations": equation_seconds(self.C[last], self.edits, width, self.lam, layers),
        }

    def compare(self, targets: TwinTargets) -> dict[str, float]:
        """Errors on the sampled edits, searched and with the twin's targets given; raises unless they are green."""
        arch, where = self.ed.session.arch, {"module": self.module, "site": self.site}
        found = naive_memit(
            self.ed.model,
            self.few,
            layers=self.layers,
            **where,
            C=self.C,
            lam=self.lam,
            targets=targets.values,
        )
        expected: dict[str, Tensor] = {arch.name("mlp_out", layer): delta for layer, delta in found.items()}
        requests = [self.requests[i] for i in self.chosen]
        error = error_of(self.solve(requests, v_num_grad_steps=SAMPLED), expected)
        given = error_of(self.ed.solve(requests, "memit", self.options, targets=targets.values), expected)
        green(error, given)
        return {"error": error, "error_targets_given": given}

    def solve_given(self) -> Any:
        """Ours without a search, for made-up targets: sweep and equations alone."""
        generator = torch.Generator().manual_seed(0)
        some = torch.randn(self.edits, self.ed.session.arch.width, generator=generator)
        return self.ed.solve(self.requests, "memit", self.options, targets=some)

    def our_flops(self, steps: int | None = None) -> Phases:
        flops = Flops.of(self.ed.model.config)
        return {
            "targets": flops.our_targets(self.twins, self.layers[-1], steps or self.steps),
            "sweep": flops.our_sweep(self.twins, self.layers),
            "equations": flops.our_equations(self.edits, len(self.layers)),
        }

    def twin_flops(self) -> Phases:
        flops = Flops.of(self.ed.model.config)
        return {
            "targets": flops.twin_targets(self.twins, self.layers[-1], self.steps),
            "sweep": flops.twin_keys(self.twins, len(self.layers)),
            "equations": flops.twin_equations(self.edits, len(self.layers)),
        }

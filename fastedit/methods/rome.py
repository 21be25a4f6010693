"""ROME: Rank-One Model Editing (Meng et al. 2022, arXiv:2202.05262; code kmeng01/rome).

For one fact, with k the mean key of the subject over context templates, k_b its key in the bare prompt,
v* the optimised output of the MLP and C the second moment of keys,

    Delta = (v* - W k_b) u^T / (u^T k_b),   u = C^-1 k                      (as the published code does it)
    Delta = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)                            (eq. 2 of the paper, asym_keys=False)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastedit.config import LocateConfig, check
from fastedit.edit import Edit, LowRank
from fastedit.engine import locate
from fastedit.engine.estimate import MemoryEstimate
from fastedit.engine.problem import key_rows
from fastedit.engine.sweep import keys_at
from fastedit.engine.target import optimise_targets
from fastedit.engine.templates import flat_templates
from fastedit.engine.trial import Trial, causal_decoder, finite, injected, loss_report
from fastedit.methods import method
from fastedit.ops.edit_solve import IdentityMetric, edit_solve
from fastedit.request import EditRequest
from fastedit.session import Session
from fastedit.tokens import Encoded

__all__ = ["RomeConfig", "rome"]

_WEAK = 1e-3  # cosine below which a warning is due: ordinary subjects are above 0.1

# kmeng01/rome hparams; Llama values are EasyEdit's (specs: mom2_adjustment is off there).
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gpt2-medium": {"layers": (8,), "clamp_norm_factor": 3.0},
    "gpt2-large": {"layers": (12,)},
    "gpt2-xl": {"layers": (17,)},
    "gpt-j-6b": {"layers": (5,)},
    "gpt-neox-20b": {"layers": (15,)},
    "llama-2-7b": {"layers": (5,), "v_num_grad_steps": 25, "v_weight_decay": 1e-3, "mom2_adjustment": False},
}


@dataclass(frozen=True, kw_only=True)
class RomeConfig(LocateConfig):
    """ROME's hyper-parameters; those not listed here are the family's, see ``LocateConfig``.

    Attributes:
        context_templates: templates to use instead of sampling; the first must be ``"{}"``.
        asym_keys: the published code's mix of mean key and bare key.
        inv_dtype: ``"float32"`` inverts C in single precision, as the published code does.
    """

    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    context_templates: tuple[str, ...] | None = None
    asym_keys: bool = True
    inv_dtype: Literal["float64", "float32"] = "float64"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.inv_dtype in ("float64", "float32"), "inv_dtype", "be 'float64' or 'float32'", self.inv_dtype
        )
        if self.context_templates is not None:
            templates = self.context_templates
            check(
                isinstance(templates, tuple) and templates[:1] == ("{}",),
                "context_templates",
                "start with the bare template '{}'",
                templates,
            )
            for template in templates:
                ok = isinstance(template, str) and template.count("{}") == 1
                check(ok, "context_templates", "hold texts with one '{}' each", template)


def _estimate(session: Session, requests: Sequence[EditRequest], config: RomeConfig) -> MemoryEstimate:
    """Predicted peak memory of ``rome`` with these arguments."""
    spec = locate.target_spec(config, max(config.layers), "mlp")
    return locate.estimate(session, requests, config, config.context_templates, spec, together=False)


@method(
    "rome",
    paper="arXiv:2202.05262",
    modes=("single", "sequential"),
    config=RomeConfig,
    defaults=_DEFAULTS,
    estimate=_estimate,
)
def rome(
    session: Session, requests: Sequence[EditRequest], config: RomeConfig, *, targets: Tensor | None = None
) -> Edit:
    """Solve the requests one after the other, each on the weights that the ones before it left.

    Args:
        targets: ``[n, d]`` v* to use instead of optimising; one row per request (one edited layer only).

    Raises:
        ValueError: bad layer, request or statistics, or a loss or update that is not finite.
    """
    arch = causal_decoder(session, "rome", config.layers)
    targets = injected(targets, len(requests), arch.width)
    if targets is not None:
        check(len(config.layers) == 1, "targets", "go with one edited layer", config.layers)
    options = locate.token_options(config)
    solvers = {layer: _solver(session, layer, config) for layer in config.layers}
    with Trial(session) as trial:
        templates = config.context_templates or trial.templates(
            flat_templates, config.context_template_length_params
        )
        problems = locate.build_problems(session, requests, templates, config)
        factors: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in config.layers}
        losses: list[Any] = []
        memory: dict[str, Any] = {}
        for index, (request, problem) in enumerate(zip(requests, problems, strict=True)):
            rows = key_rows(session.tokenizer, request, templates, options)
            for layer in sorted(config.layers):
                keys, bare = _keys(session, layer, rows)
                spec = locate.target_spec(config, layer, "mlp")
                if targets is None:
                    with trial.timed("targets"):
                        found = optimise_targets(
                            session.model,
                            arch,
                            [problem],
                            spec,
                            pad_id=session.pad_id,
                            batch_tokens=config.batch_tokens,
                            cuda_graphs=config.cuda_graphs,
                        )
                    value = found.value[0].double()
                    losses.append(loss_report(found, [request])[0])
                    memory = found.memory.to_dict()
                else:
                    value = targets[index].double()
                with trial.timed("equations"):
                    left, right = _rank_one(solvers[layer], keys, bare, value, arch.mlp_out(layer), config)
                _warn_of_a_weak_key(request, bare, right)
                finite(request.id, left, right)
                factors[layer].append((left, right))
                trial.add(layer, left, right)
    deltas = tuple(
        LowRank(
            arch.name("mlp_out", layer),
            torch.cat([left for left, _ in pairs], dim=1).float(),
            torch.cat([right for _, right in pairs]).float(),
        )
        for layer, pairs in factors.items()
    )
    info = {"losses": losses, "context_templates": list(templates), "memory": memory}
    return trial.edit("rome", config, requests, deltas, info)


Solver = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _solver(session: Session, layer: int, config: RomeConfig) -> Solver:
    """``(key [1, f], residual [1, d]) -> left [d, 1], right [1, f]``: the symmetric update of eq. 2."""
    if not config.mom2_adjustment:
        return lambda key, residual: edit_solve(IdentityMetric(), key, residual, mu=0.0)
    module = session.arch.name("mlp_out", layer)
    if config.inv_dtype == "float64":
        metric = session.metric(module)
        return lambda key, residual: edit_solve(metric, key, residual, mu=0.0)
    moment = session.second_moment(module)
    moment.check()
    inverse, singular = torch.linalg.inv_ex(moment.moment().float())
    if int(singular):
        raise ValueError(
            f"statistics of {module!r}: singular in float32; collect more text, or set inv_dtype='float64'"
        )
    inverse = inverse.to(session.device)

    def single_precision(key: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        right = (key.float() @ inverse.T).double()
        return residual.T / (right @ key[0]), right

    return single_precision


def _warn_of_a_weak_key(request: EditRequest, bare: Tensor, direction: Tensor) -> None:
    """The update is divided by ``u . k_b``: a subject whose bare key hardly meets u gives a disabling edit."""
    agreement = float((direction[0] @ bare[0]).abs() / (direction.norm() * bare.norm()))
    if agreement < _WEAK:
        warnings.warn(
            f"request {request.id!r}: the bare prompt's key and the update's direction have cosine {agreement:.1e}; "
            "the update is scaled up by its inverse and may disable the model (asym_keys=False avoids it)",
            stacklevel=3,
        )


def _keys(session: Session, layer: int, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """``[templates, f]`` keys and the ``[1, f]`` key of the bare prompt, fp64."""
    keys = keys_at(session.model, session.arch, layer, rows, pad_id=session.pad_id).double()
    if rows[0].lookup >= 0:
        return keys, keys[:1]
    # An index from the end of the padded row moves when the bare prompt runs alone, as it does in the original.
    alone = keys_at(session.model, session.arch, layer, rows[:1], pad_id=session.pad_id).double()
    return keys, alone


def _rank_one(
    solve: Solver,
    keys: Tensor,
    bare: Tensor,
    value: Tensor,
    module: nn.Module,
    config: RomeConfig,
) -> tuple[Tensor, Tensor]:
    """Factors ``left [d, 1]``, ``right [1, f]`` of the update in fp64; ``bare [1, f]`` is the bare prompt's key."""
    mean = keys.mean(dim=0, keepdim=True)
    key = bare if config.asym_keys else mean
    weight: Tensor = module.weight  # type: ignore[assignment]
    with torch.no_grad():
        output = module(key.to(weight.dtype)).double()[0]
    residual = (value.to(output) - output)[None]
    left, right = solve(mean, residual)
    if config.asym_keys:
        # The solver scales by the mean key; the published code divides by the bare key instead.
        left = residual.T / (right @ bare[0])
    return left, right

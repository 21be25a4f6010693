"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv:2210.07229; code kmeng01/memit).

Targets z are found at the output of the last edited layer. Then, layer by layer, with K the keys under the
present weights and H the present activation at z's place,

    Delta_l = R K^T (lambda C_l + K K^T)^-1,   R = (Z - H) / (layers left)                       (eq. 14, 19-20)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastedit.config import LocateConfig, check, is_integer, is_number
from fastedit.edit import Edit, LowRank
from fastedit.engine import locate
from fastedit.engine.estimate import MemoryEstimate
from fastedit.engine.objective import TargetSpec
from fastedit.engine.problem import key_rows
from fastedit.engine.sweep import LayerSweep
from fastedit.engine.target import optimise_targets
from fastedit.engine.target_cache import TargetCache
from fastedit.engine.templates import grouped_templates
from fastedit.engine.trial import Trial, causal_decoder, finite, injected, loss_report
from fastedit.methods import method
from fastedit.ops.edit_solve import IdentityMetric, edit_solve
from fastedit.request import EditRequest
from fastedit.session import Session
from fastedit.stats.provenance import tokenizer_fingerprint

__all__ = ["MemitConfig", "memit"]

# kmeng01/memit hparams; Llama-2 from EasyEdit, Llama-3 from AlphaEdit's repository.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "v_num_grad_steps": 20, "mom2_update_weight": 20000.0},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8)},
    "llama-2-7b": {"layers": (4, 5, 6, 7, 8), "clamp_norm_factor": 4.0, "v_weight_decay": 1e-3},
    "llama-3-8b": {"layers": (4, 5, 6, 7, 8), "v_lr": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class MemitConfig(LocateConfig):
    """MEMIT's hyper-parameters; those not listed here are the family's, see ``LocateConfig``.

    Attributes:
        layers: edited layers, ascending; targets are found at the last.
        v_loss_layer: layer whose output is read for the NLL; ``None`` is the last layer of the model.
        mom2_update_weight: lambda, the weight of the old associations.
        context_templates: groups of templates, ``(("{}",), (...))``; keys average over groups of group means.
        cache_template: path with ``{}`` for layer, clamp factor and request id, to keep targets on disk.
        z_cache_key: ``"full"``: cached targets are used under equal settings and weights only; ``"legacy"``: the
            original's names, by layer, clamp and id.
        soft_cap_nll: apply the model's logit soft cap to the NLL; the published code reads the head directly.
    """

    v_num_grad_steps: int = 25
    clamp_norm_factor: float = 0.75
    context_template_length_params: tuple[tuple[int, int], ...] = ((10, 5),)
    v_loss_layer: int | None = None
    mom2_update_weight: float = 15000.0
    context_templates: tuple[tuple[str, ...], ...] | None = None
    cache_template: str | None = None
    z_cache_key: Literal["full", "legacy"] = "full"
    soft_cap_nll: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.layers == tuple(sorted(self.layers)), "layers", "ascend", self.layers)
        weight = self.mom2_update_weight
        check(is_number(weight) and weight > 0, "mom2_update_weight", "be a number > 0", weight)
        loss_layer = self.v_loss_layer
        if loss_layer is not None:
            ok = is_integer(loss_layer) and loss_layer >= self.layers[-1]
            check(ok, "v_loss_layer", f"be a layer >= {self.layers[-1]}, the last edited one", loss_layer)
        template = self.cache_template
        if template is not None:
            parts = template.split("{}") if isinstance(template, str) else []
            check(
                len(parts) == 4 and not any(brace in part for part in parts for brace in "{}"),
                "cache_template",
                "be a path that holds three '{}' and no other brace: layer, clamp, request id",
                template,
            )
        check(
            self.z_cache_key in ("full", "legacy"), "z_cache_key", "be 'full' or 'legacy'", self.z_cache_key
        )
        groups = self.context_templates
        if groups is not None:
            nested = isinstance(groups, tuple) and all(isinstance(group, tuple) and group for group in groups)
            check(
                nested and len(groups) > 0 and groups[0][0] == "{}",
                "context_templates",
                "be groups, the first starting with '{}'",
                groups,
            )
            for template in (template for group in groups for template in group):
                ok = isinstance(template, str) and template.count("{}") == 1
                check(ok, "context_templates", "hold texts with one '{}' each", template)


def _estimate(session: Session, requests: Sequence[EditRequest], config: MemitConfig) -> MemoryEstimate:
    """Predicted peak memory of ``memit`` with these arguments."""
    groups = config.context_templates
    templates = None if groups is None else [template for group in groups for template in group]
    return locate.estimate(session, requests, config, templates, _spec(config), together=True)


@method(
    "memit",
    paper="arXiv:2210.07229",
    modes=("single", "batch"),
    config=MemitConfig,
    defaults=_DEFAULTS,
    estimate=_estimate,
)
def memit(
    session: Session, requests: Sequence[EditRequest], config: MemitConfig, *, targets: Tensor | None = None
) -> Edit:
    """Write all requests at once, spread over ``config.layers``.

    Args:
        targets: ``[n, d]`` z to use instead of optimising.

    Raises:
        ValueError: bad layer, request or statistics, or a loss or update that is not finite.
    """
    arch = causal_decoder(session, "memit", config.layers)
    if config.v_loss_layer is not None:
        arch.check_layer(config.v_loss_layer)
    targets = injected(targets, len(requests), arch.width)
    options = locate.token_options(config)
    names = {layer: arch.name("mlp_out", layer) for layer in config.layers}
    metrics = {
        layer: session.metric(names[layer]) if config.mom2_adjustment else IdentityMetric()
        for layer in config.layers
    }
    z_layer = config.layers[-1]
    deltas: list[LowRank] = []
    info: dict[str, Any] = {"losses": []}
    with Trial(session) as trial:
        groups = config.context_templates or trial.templates(
            grouped_templates, config.context_template_length_params
        )
        templates = [template for group in groups for template in group]
        weights = [1.0 / (len(groups) * len(group)) for group in groups for _ in group]
        if targets is None:
            with trial.timed("targets"):
                targets, found = _targets(session, requests, config, groups)
                info.update(found)
        rows = [key_rows(session.tokenizer, request, templates, options) for request in requests]
        with trial.timed("sweep"):
            sweep = LayerSweep(
                session.model,
                arch,
                rows,
                weights,
                config.layers,
                z_layer,
                pad_id=session.pad_id,
                batch_tokens=config.batch_tokens,
            )
        distance = []
        for index, layer in enumerate(config.layers):
            with trial.timed("sweep"):
                sweep.advance_to(layer)
                present = sweep.activations(z_layer)
                residual = targets.to(present) - present
                keys = sweep.keys(layer)
            distance.append(float(residual.norm(dim=1).mean()))
            # A sharded model has its layers on several devices.
            share = (residual / (len(config.layers) - index)).to(keys.device)
            with trial.timed("equations"):
                left, right = edit_solve(metrics[layer], keys, share, mu=float(config.mom2_update_weight))
            finite(names[layer], left, right)
            trial.add(layer, left, right)
            deltas.append(LowRank(names[layer], left.float(), right.float()))
    info.update(residual_norms=distance, context_templates=[list(group) for group in groups])
    return trial.edit("memit", config, requests, deltas, info)


def _targets(
    session: Session, requests: Sequence[EditRequest], config: MemitConfig, groups: Sequence[Sequence[str]]
) -> tuple[Tensor, dict[str, Any]]:
    """``[n, d]`` targets, optimised or from the cache; loss reports and memory of the optimisation."""
    cache: TargetCache | None = None
    known: dict[int, Tensor] = {}
    if config.cache_template is not None:
        cache = TargetCache(
            config.cache_template,
            config.z_cache_key,
            layer=config.layers[-1],
            clamp=config.clamp_norm_factor,
            settings={
                **asdict(_spec(config)),
                **asdict(locate.token_options(config)),
                "tokenizer": tokenizer_fingerprint(session.tokenizer),
                "context_templates": groups,
            },
            model=session.model,
        )
        known = cache.load(requests, session.arch.width)
    open_ = [index for index in range(len(requests)) if index not in known]
    info: dict[str, Any] = {}
    if open_:
        templates = [template for group in groups for template in group]
        todo = [requests[index] for index in open_]
        found = optimise_targets(
            session.model,
            session.arch,
            locate.build_problems(session, todo, templates, config),
            _spec(config),
            pad_id=session.pad_id,
            batch_tokens=config.batch_tokens,
            cuda_graphs=config.cuda_graphs,
        )
        info = {"losses": loss_report(found, todo), "memory": found.memory.to_dict()}
        for index, value in zip(open_, found.value, strict=True):
            known[index] = value
            if cache is not None:
                cache.save(requests[index], value)
    return torch.stack([known[index].to(session.device) for index in range(len(requests))]), info


def _spec(config: MemitConfig) -> TargetSpec:
    return locate.target_spec(
        config,
        config.layers[-1],
        "block",
        v_loss_layer=config.v_loss_layer,
        soft_cap_nll=config.soft_cap_nll,
    )

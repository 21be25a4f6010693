"""From a locate-then-edit configuration to what the engines take."""

from __future__ import annotations

from collections.abc import Sequence

from fastedit.arch import position_limit
from fastedit.config import LocateConfig
from fastedit.engine.estimate import MemoryEstimate, estimate_locate
from fastedit.engine.objective import Site, TargetSpec
from fastedit.engine.problem import Problem, TokenOptions, build_problem
from fastedit.request import EditRequest
from fastedit.session import Session

__all__ = ["build_problems", "estimate", "placeholder", "target_spec", "token_options"]


def token_options(config: LocateConfig) -> TokenOptions:
    """How prompts become tokens."""
    return TokenOptions(lookup=config.fact_token, rule=config.token_rule, retokenize=config.retokenize_target)


def target_spec(
    config: LocateConfig,
    layer: int,
    site: Site,
    *,
    v_loss_layer: int | None = None,
    soft_cap_nll: bool = True,
) -> TargetSpec:
    """The target optimisation at one layer."""
    return TargetSpec(
        layer=layer,
        site=site,
        v_num_grad_steps=config.v_num_grad_steps,
        v_lr=config.v_lr,
        v_weight_decay=config.v_weight_decay,
        clamp_norm_factor=config.clamp_norm_factor,
        kl_factor=config.kl_factor,
        v_loss_layer=v_loss_layer,
        soft_cap_nll=soft_cap_nll,
    )


def build_problems(
    session: Session, requests: Sequence[EditRequest], templates: Sequence[str], config: LocateConfig
) -> list[Problem]:
    """The requests' rows under every template."""
    options, limit = token_options(config), position_limit(session.arch)
    return [
        build_problem(session.tokenizer, request, templates, options, positions=limit) for request in requests
    ]


def placeholder(length: int) -> str:
    """A context template of about ``length`` tokens, for counting only: sampling would use up the generator."""
    return " ".join(["a"] * length) + ". {}"


def estimate(
    session: Session,
    requests: Sequence[EditRequest],
    config: LocateConfig,
    templates: Sequence[str] | None,
    spec: TargetSpec,
    *,
    together: bool,
) -> MemoryEstimate:
    """Predicted peak memory of a solve.

    Args:
        templates: the configured ones; ``None`` counts those that would be sampled.
        together: all requests are one solve; else one after the other.
    """
    lengths = config.context_template_length_params
    drawn = ["{}", *(placeholder(length) for length, count in lengths for _ in range(count))]
    return estimate_locate(
        session,
        build_problems(session, requests, templates or drawn, config),
        spec,
        layers=config.layers,
        together=together,
        batch_tokens=config.batch_tokens,
        second_moments=config.mom2_adjustment,
    )

"""What method configurations share: validation with messages that name the field, the rule and the value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from fastedit.tokens import Lookup, TokenRule

__all__ = [
    "LocateConfig",
    "MethodConfig",
    "check",
    "family_of",
    "from_mapping",
    "is_integer",
    "is_number",
    "published",
]

C = TypeVar("C", bound="MethodConfig")


def check(condition: bool, field: str, rule: str, value: Any) -> None:
    """Raise ``ValueError("field must rule, got value")`` unless the condition holds."""
    if not condition:
        raise ValueError(f"{field} must {rule}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's configuration: frozen, keyword-only, checked when made."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy, for the Edit's provenance."""
        return dataclasses.asdict(self)

    def replace(self: C, **changes: Any) -> C:
        """A changed copy, checked again; unknown names raise a ValueError that lists the known ones."""
        return from_mapping(
            type(self), {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **changes}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocateConfig(MethodConfig):
    """Hyper-parameters of the locate-then-edit family, under their published names.

    Attributes:
        layers: edited layers.
        v_num_grad_steps: forward passes of the target optimisation, at most one fewer updates.
        v_lr: Adam's learning rate.
        v_weight_decay: weight of ``||delta|| / ||h0||^2``.
        clamp_norm_factor: radius of delta's ball in units of ``||h0||``.
        kl_factor: weight of the KL term on ``"{subject} is a"``.
        mom2_adjustment: use the second moment C of keys; without it C is the identity.
        context_template_length_params: ``((tokens, how many), ...)`` templates to sample.
        fact_token: token that carries the edit.
        token_rule: its index by offsets, or by the ``rome`` / ``easyedit`` rules.
        retokenize_target: tokenise prompt and target as one text, as the originals do.
        batch_tokens: tokens that run together; ``None`` chooses by device and free memory. Changes memory and speed,
            not results.
        cuda_graphs: replay steps of the target optimisation as CUDA graphs; helps few requests on a fast GPU.
    """

    layers: tuple[int, ...]
    v_num_grad_steps: int = 20
    v_lr: float = 0.5
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    mom2_adjustment: bool = True
    context_template_length_params: tuple[tuple[int, int], ...] = ()
    fact_token: Lookup = "subject_last"
    token_rule: TokenRule = "offsets"
    retokenize_target: bool = False
    batch_tokens: int | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        layers = self.layers
        check(
            isinstance(layers, tuple) and len(layers) > 0, "layers", "be a non-empty list of integers", layers
        )
        check(all(is_integer(i) and i >= 0 for i in layers), "layers", "hold integers >= 0", layers)
        check(len(set(layers)) == len(layers), "layers", "not repeat a layer", layers)
        steps, tokens = self.v_num_grad_steps, self.batch_tokens
        check(is_integer(steps) and steps >= 1, "v_num_grad_steps", "be an integer >= 1", steps)
        ok = tokens is None or (is_integer(tokens) and tokens >= 1)
        check(ok, "batch_tokens", "be an integer >= 1, or None", tokens)
        for name in ("v_lr", "clamp_norm_factor"):
            value = getattr(self, name)
            check(is_number(value) and value > 0, name, "be a number > 0", value)
        for name in ("v_weight_decay", "kl_factor"):
            value = getattr(self, name)
            check(is_number(value) and value >= 0, name, "be a number >= 0", value)
        for name in ("mom2_adjustment", "retokenize_target", "cuda_graphs"):
            value = getattr(self, name)
            check(isinstance(value, bool), name, "be true or false", value)
        for name, choices in (("fact_token", get_args(Lookup)), ("token_rule", get_args(TokenRule))):
            value = getattr(self, name)
            check(value in choices, name, f"be one of {', '.join(choices)}", value)
        pairs = self.context_template_length_params
        check(isinstance(pairs, tuple), "context_template_length_params", "be a list of pairs", pairs)
        for pair in pairs:
            ok = isinstance(pair, tuple) and len(pair) == 2 and all(is_integer(i) and i >= 1 for i in pair)
            check(ok, "context_template_length_params", "hold pairs of integers >= 1", pair)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite int or float and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0


def from_mapping(cls: type[C], values: Mapping[str, Any]) -> C:
    """Build a configuration from names and values as they come from JSON or a command line.

    Raises:
        ValueError: unknown name, missing name, or a value that the class refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown option {unknown[0]!r}; known: {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(
            f"{cls.__name__}: option {missing[0]!r} has no default for this model and must be given"
        )
    return cls(**{name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    """Lists become tuples, so that frozen configurations stay hashable and comparable."""
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple, range)) else value


# (model_type, depth, width) -> the name under which papers publish hyper-parameters
_FAMILIES: Mapping[tuple[str, int, int], str] = {
    ("gpt2", 24, 1024): "gpt2-medium",
    ("gpt2", 36, 1280): "gpt2-large",
    ("gpt2", 48, 1600): "gpt2-xl",
    ("gptj", 28, 4096): "gpt-j-6b",
    ("gpt_neox", 44, 6144): "gpt-neox-20b",
    ("llama", 32, 4096): "llama-2-7b",
    ("bert", 12, 768): "bert-base",
    ("bert", 24, 1024): "bert-large",
}


def family_of(model_type: str, depth: int, width: int, vocabulary: int) -> str | None:
    """Published name of a model by its shape, or ``None``. Llama-2 and Llama-3 differ in vocabulary only."""
    name = _FAMILIES.get((model_type, depth, width))
    return "llama-3-8b" if name == "llama-2-7b" and vocabulary > 100_000 else name


def published(
    cls: type[C], table: Mapping[str, Mapping[str, Any]], family: str | None, overrides: Mapping[str, Any]
) -> C:
    """The published configuration of ``family`` with ``overrides`` on top.

    Raises:
        ValueError: no published defaults and the overrides do not name the layers.
    """
    base = table.get(family or "", {})
    needed = any(f.name == "layers" and f.default is dataclasses.MISSING for f in dataclasses.fields(cls))
    if needed and "layers" not in base and "layers" not in overrides:
        known: Sequence[str] = sorted(table)
        raise ValueError(
            f"layers must be given: {cls.__name__} has published layers for {', '.join(known)}, not for this model"
        )
    return from_mapping(cls, {**base, **overrides})

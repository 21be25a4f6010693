"""What a collection does, checked before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, Site, position_limit
from fastedit.stats.batches import Text
from fastedit.stats.provenance import Provenance, dtype_name, model_fingerprint, tokenizer_fingerprint

__all__ = ["Job"]

_LONGEST = 4096
# On a CPU the activations of a batch should stay in the caches; a GPU wants large products.
_BATCH_TOKENS = 1024
_BATCH_TOKENS_OTHER = 16384


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Checked arguments of one collection.

    Attributes:
        arch: of the model.
        forward: what is called: the model, or the encoder of an encoder-decoder model.
        modules: the modules whose inputs are keys, by name, in the order asked for.
        deepest: the one of them that a forward reaches last.
        widths: key widths by module name.
        provenance: of the results, but for module, corpus and counts.
        pad_id: fills padded positions.
    """

    arch: ResolvedArch
    forward: nn.Module
    modules: dict[str, nn.Module]
    deepest: str
    widths: dict[str, int]
    provenance: Provenance
    pad_id: int

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        tokenizer: Any,
        arch: ResolvedArch,
        texts: Iterable[Text],
        layers: Sequence[int],
        site: Site,
        max_length: int | None,
        token_budget: int | None,
        batch_tokens: int | None,
        dtype: torch.dtype,
        dataset: str | None,
    ) -> Job:
        """Check the arguments of `collect_statistics`, whose docstring describes them."""
        if not isinstance(layers, Iterable):
            raise ValueError(f"layers must be a sequence of layer numbers, got {layers!r}")
        layers = list(layers)
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers must be distinct and not empty, got {layers!r}")
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of texts, got one string")
        if not isinstance(texts, Iterable) and not hasattr(texts, "__getitem__"):
            raise ValueError(f"texts must be a sequence of texts, got {texts!r}")
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        for name, value in (
            ("max_length", max_length),
            ("token_budget", token_budget),
            ("batch_tokens", batch_tokens),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        modules = {arch.name(site, i): arch.modules[site][arch.check_layer(i)] for i in layers}
        config = getattr(arch.model, "config", None)
        forward = arch.model
        if getattr(config, "is_encoder_decoder", False):
            if arch.row.side != "encoder":
                raise NotImplementedError(
                    f"side: keys of the decoder of {arch.row.model_type!r} depend on a paired input text; collect the "
                    "encoder's (resolve(model, side='encoder')), or pass your own SecondMoment"
                )
            forward = arch.model.get_encoder()  # type: ignore[operator]
        device = arch.embed.weight.device.type
        limit = position_limit(arch)
        if max_length is None:
            max_length = min(limit or _LONGEST, _LONGEST)
        elif limit is not None and max_length > limit:
            raise ValueError(
                f"max_length must be <= {limit}, the model's number of positions, got {max_length}"
            )
        weight: Tensor = arch.embed.weight  # type: ignore[assignment]
        provenance = Provenance(
            module="",
            dtype=dtype_name(dtype),
            model_name=str(getattr(config, "_name_or_path", "") or "") or None,
            model_dtype=dtype_name(weight.dtype),
            model_fingerprint=model_fingerprint(arch),
            weights_fingerprint=model_fingerprint(arch, edited=True),
            tokenizer=tokenizer_fingerprint(tokenizer),
            dataset=dataset or getattr(texts, "name", None) or "corpus",
            max_length=max_length,
            token_budget=token_budget,
            batch_tokens=batch_tokens or (_BATCH_TOKENS if device == "cpu" else _BATCH_TOKENS_OTHER),
            versions=_versions(),
        )
        return cls(
            arch=arch,
            forward=forward,
            modules=modules,
            deepest=arch.name(site, max(layers)),
            widths={name: _width(name, module) for name, module in modules.items()},
            provenance=provenance,
            pad_id=_pad_id(tokenizer),
        )

    def key(self) -> str:
        """Names the checkpoint: everything that the sums' bits depend on, but the texts."""
        facts = {
            **self.provenance.to_dict(),
            "versions": None,
            "model_name": None,
            "modules": list(self.modules),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _width(name: str, module: nn.Module) -> int:
    for attribute in ("in_features", "nx"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    raise ValueError(f"site: {name!r} is a {type(module).__name__}, not a linear with keys")


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def _versions() -> dict[str, str]:
    import transformers

    import fastedit

    return {
        "fastedit": fastedit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

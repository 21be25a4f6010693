"""Where statistics came from, and whether they belong to a given model and corpus."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch

__all__ = [
    "CorpusDigest",
    "Provenance",
    "dtype_name",
    "model_fingerprint",
    "tensor_digest",
    "tokenizer_fingerprint",
]

_SAMPLES = 256  # values read per parameter; a changed matrix has no two of 256 spread values in common


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What one second moment was computed from. Statistics of unknown origin (older files) have None where unknown.

    Attributes:
        module: dotted name of the module whose input was measured.
        dtype: of the sum, "float64" or "float32".
        model_name: `config._name_or_path`, for people; never compared.
        model_dtype: dtype of the weights.
        model_fingerprint: see `model_fingerprint`; what must agree to use the statistics.
        weights_fingerprint: the same with the edited matrices; what must agree to continue or merge a collection.
        tokenizer: see `tokenizer_fingerprint`.
        corpus: digest of the texts used, in order.
        dataset: the corpus' name, as it appears in file names.
        n_texts, n_tokens: texts and tokens used.
        max_length: tokens kept of a text.
        token_budget: tokens after which the collection stops; None means the whole corpus.
        batch_tokens: tokens per forward. Changes rounding only.
        versions: of the libraries.
    """

    module: str
    dtype: str
    model_name: str | None = None
    model_dtype: str | None = None
    model_fingerprint: str | None = None
    weights_fingerprint: str | None = None
    tokenizer: str | None = None
    corpus: str | None = None
    dataset: str | None = None
    n_texts: int | None = None
    n_tokens: int | None = None
    max_length: int | None = None
    token_budget: int | None = None
    batch_tokens: int | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        return {**dataclasses.asdict(self), "versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Inverse of `to_dict`; unknown names are dropped, so that a newer file can be read.

        Raises:
            ValueError: module or dtype missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing = [name for name in ("module", "dtype") if not isinstance(values.get(name), str)]
        if missing:
            raise ValueError(
                f"provenance: field {missing[0]!r} must be a string, got {values.get(missing[0])!r}"
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def conflict(self, **expected: Any) -> str | None:
        """The first expected field that is known here and differs, as "field: was x, expected y"; None if all agree."""
        for name, wanted in expected.items():
            have = getattr(self, name)
            if have is not None and wanted is not None and have != wanted:
                return f"{name}: was {have!r}, expected {wanted!r}"
        return None


class CorpusDigest:
    """Running digest of texts (or token-id sequences) in order. Boundaries count: ["ab"] and ["a", "b"] differ."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, text: str | Sequence[int]) -> None:
        """Add the next text."""
        # surrogatepass: a lone surrogate from a JSON escape must not stop a run that the tokenizer survives.
        data = (
            text.encode("utf-8", "surrogatepass")
            if isinstance(text, str)
            else json.dumps(list(text)).encode()
        )
        self._hash.update(f"{'s' if isinstance(text, str) else 'i'}{len(data)}:".encode())
        self._hash.update(data)

    def value(self) -> str:
        """Hexadecimal digest of the texts so far."""
        return self._hash.copy().hexdigest()[:32]


def model_fingerprint(arch: ResolvedArch, *, edited: bool = False) -> str:
    """Hash of the weights that editing leaves alone: of every parameter but those of `mlp_out` and `attn_out`.

    So an edited model still has the fingerprint of its base, whose statistics it keeps using, while a fine-tuned or
    otherwise different model does not. Names, shapes, dtypes and 256 spread values of each parameter are hashed.

    Args:
        arch: the resolved model.
        edited: include those matrices after all.
    """
    sites = () if edited else ("mlp_out", "attn_out")
    left_out = {name for site in sites for name in arch.names.get(site, ())}
    digest = hashlib.sha256()
    for name, parameter in _parameters(arch.model):
        if name.rpartition(".")[0] not in left_out:
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(_spread(parameter))
    return digest.hexdigest()[:32]


def _parameters(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    # Adapters of a wrapped model sit between a name and its base layer's weights; leave both readings alike.
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def _spread(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    if flat.is_meta or flat.numel() == 0:
        return b""
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].contiguous().cpu()
    return bytes(values.view(torch.uint8).numpy())


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of the vocabulary, of what special tokens it adds and of one tokenised sentence; None without tokenizer."""
    if tokenizer is None:
        return None
    probe = "The quick brown fox, in 1984: déjà vu?\n"
    facts = [sorted(tokenizer.get_vocab().items()), list(tokenizer(probe)["input_ids"])]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's shape, dtype and every value. Reads the memory in place when it is contiguous on the CPU."""
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)}{values.dtype}".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def dtype_name(dtype: torch.dtype) -> str:
    """ "float64" for torch.float64."""
    return str(dtype).removeprefix("torch.")

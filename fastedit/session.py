"""Session: everything an edit needs beside the requests. All state lives here, none in modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastedit.arch import Architecture, find_module, resolve, unwrap
from fastedit.config import family_of
from fastedit.ops.edit_solve import PackedMetric
from fastedit.ops.packed_solve import unpack_factor
from fastedit.tokens import pad_id

if TYPE_CHECKING:
    from fastedit.stats import SecondMoment, StatisticsStore

__all__ = ["Session"]


class Session:
    """A model, its tokenizer and its caches.

    Args:
        model: a Hugging Face model with an architecture row, or any module with ``arch`` given; wrappers (PEFT,
            ``torch.compile``, data parallel) are seen through.
        tokenizer: the model's tokenizer.
        arch: an ``Architecture`` for a model type that has no row.
        statistics: second moments by module name, a ``StatisticsStore``, or a directory of one.
        seed: seeds the generator that context templates are drawn from.

    Attributes:
        model: the model inside its wrappers.
        arch: the resolved architecture.
        generator: CPU generator; its state is the only randomness of a solve.
        templates: context templates drawn so far, by their specification.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        arch: Architecture | None = None,
        statistics: Mapping[str, SecondMoment] | StatisticsStore | str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
        if not callable(getattr(tokenizer, "encode", None)):
            raise ValueError(f"tokenizer must be the model's tokenizer, got a {type(tokenizer).__name__}")
        self.model = unwrap(model)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.tokenizer = tokenizer
        self.arch = resolve(model, arch)
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.templates: dict[tuple[object, ...], tuple[object, ...]] = {}
        self._moments: dict[str, SecondMoment] = {}
        self._factors: dict[str, PackedMetric] = {}
        self._stored: set[str] = set()  # modules whose moment came from the store
        self._store: StatisticsStore | None = None
        if statistics is not None:
            self.use_statistics(statistics)

    @property
    def family(self) -> str | None:
        """Name under which papers publish hyper-parameters for this model's shape, if any."""
        weight: Tensor = self.arch.embed.weight  # type: ignore[assignment]
        return family_of(self.arch.row.model_type, self.arch.depth, self.arch.width, weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding."""
        weight: Tensor = self.arch.embed.weight  # type: ignore[assignment]
        return weight.device

    @property
    def pad_id(self) -> int:
        """Token id that fills padded positions; masked everywhere, so any valid id serves."""
        return pad_id(self.tokenizer)

    def use_statistics(self, statistics: Mapping[str, SecondMoment] | StatisticsStore | str | Path) -> None:
        """Add second moments; factors of replaced ones are dropped.

        Args:
            statistics: as the class takes it. A directory must exist; a ``StatisticsStore`` may be of a new one.

        Raises:
            ValueError: no such directory.
            ValueError: a moment in a mapping was collected on another model or tokenizer, or has another width.
        """
        if isinstance(statistics, Mapping):
            for module, moment in statistics.items():
                self._check(module, moment)
            self._moments.update(statistics)
            for module in statistics:
                self._factors.pop(module, None)
                self._stored.discard(module)
            return
        from fastedit.stats import StatisticsStore

        if isinstance(statistics, (str, Path)):
            if not Path(statistics).is_dir():
                raise ValueError(f"statistics must be a directory that exists, got {str(statistics)!r}")
            statistics = StatisticsStore(statistics)
        self._store = statistics
        self._moments.clear()
        self._factors.clear()
        self._stored.clear()

    def _check(self, module: str, moment: SecondMoment) -> None:
        """Refuse statistics that belong to another model: they would give a plausible, wrong edit."""
        from fastedit.stats.provenance import model_fingerprint, tokenizer_fingerprint

        if moment.provenance is not None:
            problem = moment.provenance.conflict(
                model_fingerprint=model_fingerprint(self.arch),
                tokenizer=tokenizer_fingerprint(self.tokenizer),
            )
            if problem is not None:
                raise ValueError(
                    f"statistics of {module!r}: collected on another model or tokenizer ({problem})"
                )
        weight: Tensor = find_module(self.arch.model, module).weight  # type: ignore[assignment]
        if moment.features not in weight.shape:
            raise ValueError(
                f"statistics of {module!r}: {moment.features} features, "
                f"but the module's weight is {tuple(weight.shape)}"
            )

    def second_moment(self, module: str) -> SecondMoment:
        """Second moment of the input of ``module``.

        Raises:
            ValueError: none was collected; the message says how to. The directory does not exist.
        """
        if module not in self._moments:
            found = (
                None
                if self._store is None
                else self._store.get(module, arch=self.arch, tokenizer=self.tokenizer)
            )
            if found is None:
                if self._store is not None and not self._store.directory.exists():
                    raise ValueError(
                        f"statistics: directory {str(self._store.directory)!r} does not exist, wanted for the second "
                        f"moment of {module!r}"
                    )
                where = "" if self._store is None else f" in {str(self._store.directory)!r}"
                raise ValueError(
                    f"statistics: no second moment of {module!r}{where}; collect it with Editor.collect_statistics or "
                    "`fastedit stats`, or set mom2_adjustment=False"
                )
            self._moments[module] = found
            self._stored.add(module)
        return self._moments[module]

    def metric(self, module: str) -> PackedMetric:
        """Inverse second moment of the input of ``module`` for ``edit_solve``, factored once per session and module.

        The factor is packed, fp64, and on the device of the module it serves: a factorisation there is faster, and a
        sharded model has its layers on several.

        Raises:
            ValueError: no statistics of this module, or they cannot be factored.
        """
        if module not in self._factors:
            moment = self.second_moment(module)
            weight: Tensor = find_module(self.arch.model, module).weight  # type: ignore[assignment]
            factor: Tensor
            if module in self._stored and self._store is not None:
                factor = self._store.cholesky(moment)
                # The moment can be read again; beside its factor it would double the memory.
                del self._moments[module]
            else:
                factor = replace(moment, total=moment.total.to(weight.device)).cholesky()
            self._factors[module] = PackedMetric.of(factor.to(weight.device))
        return self._factors[module]

    def cholesky(self, module: str) -> Tensor:
        """``[f, f]`` fp64 lower Cholesky factor of the second moment, unpacked from ``metric`` at every call."""
        metric = self.metric(module)
        return unpack_factor(metric.packed, metric.width)

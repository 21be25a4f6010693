"""Editor: the user's handle on a model that can be edited, evaluated, reverted and shipped."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastedit import methods
from fastedit.arch import Architecture, row_of
from fastedit.config import MethodConfig, published
from fastedit.edit import Edit
from fastedit.request import EditRequest, as_requests
from fastedit.session import Session

if TYPE_CHECKING:
    from fastedit.engine.estimate import MemoryEstimate
    from fastedit.evaluate import Evaluation
    from fastedit.stats import SecondMoment, StatisticsStore
    from fastedit.trace import CausalTrace
    from fastedit.trace.neurons_result import Neurons

__all__ = ["Editor"]

Requests = EditRequest | Mapping[str, Any] | Sequence[EditRequest | Mapping[str, Any]]


class Editor:
    """Edit a Hugging Face model.

    Args:
        model: any model that has an architecture row (``fastedit models`` lists them), or with ``arch`` given.
        tokenizer: its tokenizer.
        arch: an ``Architecture`` for other models.
        statistics: second moments by module name, a store, or its directory.
        seed: seeds everything random.

    Example:
        >>> editor = Editor(model, tokenizer, statistics="stats/")
        >>> edit = editor.edit({"prompt": "{} is in", "subject": "The Louvre", "target_new": "Rome"}, method="rome")
        >>> editor.revert(edit)
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
        self.session = Session(model, tokenizer, arch=arch, statistics=statistics, seed=seed)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Editor:
        """Load a causal language model (or an encoder-decoder with a row, T5) and its tokenizer, then make an Editor.

        Args:
            name: hub name or folder.
            dtype: parameter dtype; ``"auto"`` takes the checkpoint's.
            options: arguments of ``Editor``.

        Raises:
            ValueError: a model type without a row, or a checkpoint that lacks weights.
            OSError: the folder or the hub has no such model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        # An unknown type is refused before its weights are read or downloaded.
        config = AutoConfig.from_pretrained(name)
        sourced = bool(getattr(config, "is_encoder_decoder", False))
        row_of(config if sourced else config.get_text_config(), options.get("arch"))
        auto: Any = AutoModelForSeq2SeqLM if sourced else AutoModelForCausalLM
        model, loading = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"name: the checkpoint {str(name)!r} lacks {len(missing)} of the model's weights, first {missing[0]!r}"
            )
        model = model.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Without its files some tokenizer classes load all the same, with no token but the special ones.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"name: {str(name)!r} holds no tokenizer (tokenizer.json or a vocabulary)")
        return cls(model, tokenizer, **options)

    @property
    def model(self) -> nn.Module:
        """The model, edited or not."""
        return self.session.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.session.tokenizer

    def config(
        self, method: str, config: MethodConfig | Mapping[str, Any] | None = None, **overrides: Any
    ) -> MethodConfig:
        """The configuration a call would use: published defaults for this model, then ``config``, then overrides."""
        spec = methods.get(method)
        if isinstance(config, MethodConfig):
            if not isinstance(config, spec.config):
                raise ValueError(
                    f"config must be a {spec.config.__name__} for method {method!r}, got {type(config).__name__}"
                )
            return config.replace(**overrides)
        if config is not None and not isinstance(config, Mapping):
            raise ValueError(
                f"config must be a {spec.config.__name__} or a mapping, got {type(config).__name__}"
            )
        return published(spec.config, spec.defaults, self.session.family, {**(config or {}), **overrides})

    def solve(
        self,
        requests: Requests,
        method: str = "memit",
        config: MethodConfig | Mapping[str, Any] | None = None,
        *,
        targets: Tensor | None = None,
        **overrides: Any,
    ) -> Edit:
        """Compute an Edit and leave the model as it is, bit for bit.

        Args:
            requests: one request or several, as ``EditRequest`` or dicts of any supported schema.
            method: a name from ``fastedit methods``.
            config: a configuration, or a mapping of hyper-parameters.
            targets: ``[n, d]`` target vectors to write instead of optimising them.
            overrides: hyper-parameters by name.

        Raises:
            ValueError: bad request, method, hyper-parameter, layer or statistics.
        """
        listed = as_requests(requests)
        if not listed:
            raise ValueError("requests: at least one is needed, got 0")
        spec = methods.get(method)
        edit: Edit = spec.solve(
            self.session, listed, self.config(method, config, **overrides), targets=targets
        )
        return edit

    def estimate(
        self,
        requests: Requests,
        method: str = "memit",
        config: MethodConfig | Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> MemoryEstimate:
        """Peak memory that ``solve`` with the same arguments would take above the model, in bytes.

        Runs one request forward and changes nothing. Raises ValueError as ``solve`` does.
        """
        listed = as_requests(requests)
        if not listed:
            raise ValueError("requests: at least one is needed, got 0")
        chosen = self.config(method, config, **overrides)
        found: MemoryEstimate = methods.get(method).estimate(self.session, listed, chosen)
        return found

    def edit(
        self,
        requests: Requests,
        method: str = "memit",
        config: MethodConfig | Mapping[str, Any] | None = None,
        *,
        targets: Tensor | None = None,
        **overrides: Any,
    ) -> Edit:
        """``solve``, then ``apply``."""
        edit = self.solve(requests, method, config, targets=targets, **overrides)
        self.apply(edit)
        return edit

    def apply(self, edit: Edit) -> None:
        """Write an Edit into the model."""
        _checked(edit).apply(self.model)

    def revert(self, edit: Edit) -> None:
        """Take an Edit out again, bit for bit."""
        _checked(edit).revert(self.model)

    @contextmanager
    def applied(self, edit: Edit) -> Iterator[None]:
        """The Edit is in the model inside the block and out of it afterwards."""
        with _checked(edit).applied(self.model):
            yield

    def evaluate(self, requests: Requests, **options: Any) -> Evaluation:
        """Rewrite, paraphrase, neighbourhood, attribute and portability scores; see ``fastedit.evaluate``."""
        from fastedit.evaluate import evaluate

        return evaluate(self.session, as_requests(requests), **options)

    def trace(
        self,
        prompt: str,
        subject: str,
        *,
        answer: str | None = None,
        subjects: Sequence[str] | None = None,
        texts: Iterable[str] | None = None,
        draws: Tensor | Sequence[Tensor] | None = None,
        **options: Any,
    ) -> CausalTrace:
        """Where the model holds an answer: its probability with one (token, layer) restored, for all of them.

        In an encoder-decoder (T5) the prompt is the encoder's input; see `fastedit.trace.seq2seq`.

        Args:
            prompt: with the subject in it, or one ``{}`` in its place.
            answer: whose probability is read (its first token); ``None``: what the model predicts.
            subjects: whose embeddings the noise is scaled by; ``None``: this one's.
            texts: corpus of the noise rules that are measured on one.
            draws: noise ``[samples, subject's tokens, d]`` to use as it is; a second set serves severed kinds.
            options: fields of ``fastedit.trace.TraceOptions``: kinds, window, tokens, noise, memory; of an
                encoder-decoder also side and decoder_prefix.

        Raises:
            ValueError: bad prompt, subject, answer, draws or option, or a run that gives NaN or infinity.
            NotImplementedError: a model that cannot be traced; the message says why.
        """
        from fastedit.config import from_mapping
        from fastedit.trace import TraceOptions, encode_trace, trace_prompts

        checked = from_mapping(TraceOptions, options)
        encoded = encode_trace(self.session, prompt, subject, answer)
        sets = [draws] if isinstance(draws, Tensor) else draws
        given = None if sets is None else [sets]
        return trace_prompts(self.session, [encoded], checked, subjects=subjects, texts=texts, draws=given)[0]

    def neurons(self, prompts: str | Sequence[str], answer: str | None = None, **options: Any) -> Neurons:
        """Which MLP neurons an answer depends on: integrated gradients of all layers in one sweep.

        Args:
            prompts: one prompt, or several of one fact, whose neurons are those that enough prompts share.
            answer: what is attributed; ``None``: the model's own next token after the first prompt.
            options: fields of ``fastedit.trace.neurons.NeuronOptions``: layers, steps, adaptive_threshold, p, ...

        Raises:
            ValueError: bad prompt, answer, option or layer, or scores that are not finite.
        """
        from fastedit.config import from_mapping
        from fastedit.trace.neurons import NeuronOptions, find_neurons

        return find_neurons(self.session, prompts, answer, from_mapping(NeuronOptions, options))

    def collect_statistics(
        self, texts: Iterable[str], layers: Sequence[int], **options: Any
    ) -> dict[str, SecondMoment]:
        """Second moments of the keys of ``layers`` in one pass over ``texts``, and use them.

        Args:
            options: arguments of ``fastedit.stats.collect_statistics``.
        """
        from fastedit.stats import collect_statistics

        session = self.session
        moments: dict[str, SecondMoment] = collect_statistics(
            session.model, session.tokenizer, session.arch, texts, layers, **options
        )
        session.use_statistics(moments)
        return moments

    def save_model(self, directory: str | Path) -> None:
        """Write the model as it is now, with its tokenizer, as a Hugging Face folder."""
        from fastedit.export.hf import export_model

        export_model(self.model, self.tokenizer, directory)


def _checked(edit: Edit) -> Edit:
    if not isinstance(edit, Edit):
        raise ValueError(f"edit must be an Edit, as `solve` and `Edit.load` return, got {reprlib.repr(edit)}")
    return edit

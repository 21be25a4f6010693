"""Traces of many facts: a file a fact as soon as it is done, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastedit.engine.encoder_decoder import is_encoder_decoder, source_side
from fastedit.session import Session
from fastedit.trace.average import AverageTrace, average
from fastedit.trace.causal import TraceOptions, check_model, trace_prompts
from fastedit.trace.embeddings import corpus_moments
from fastedit.trace.facts import TraceFact
from fastedit.trace.prompts import TracePrompt, decoder_ids, encode_trace
from fastedit.trace.result import CausalTrace
from fastedit.trace.study_folder import check_folder, claim, settings_of

__all__ = ["Study", "StudyProgress", "read_study", "trace_facts"]


@dataclass(frozen=True)
class StudyProgress:
    """State of a run, as passed to a progress callback after every batch.

    Attributes:
        done, total: facts, those that a resumed run found done included.
        seconds: spent in this run.
        eta_seconds: estimated time to the end; ``None`` before the first fact of this run.
    """

    done: int
    total: int
    seconds: float
    eta_seconds: float | None


class Study:
    """Facts and the folder that their traces go to.

    Attributes:
        total: number of facts.
        found: traces that are there, by number of the fact.
    """

    def __init__(
        self,
        session: Session,
        facts: Sequence[TraceFact],
        directory: str | Path,
        options: TraceOptions | None = None,
        *,
        texts: Iterable[str] | None = None,
    ) -> None:
        """Check options and facts, make sure that the folder holds this study or may hold it, and read its traces.

        The folder is made by `run`, once the first traces are there: a study that fails before leaves nothing.

        Args:
            directory: a new or empty folder, or one of the same facts, options and model, whose traces are kept.
            texts: corpus of the noise rules that are measured on one.

        Raises:
            ValueError: naming the fact or the file: no facts, an option that the model does not take, what
                `encode_trace` refuses, a folder of another study (with what differs), or in it a trace that is
                damaged or another fact's.
            NotImplementedError: a model that cannot be traced.
        """
        self._session, self._options = session, options or TraceOptions()
        if not facts:
            raise ValueError("facts: at least one is needed, got 0")
        check_model(session, self._options)
        self._facts, self._texts = list(facts), None if texts is None else list(texts)
        self._prompts: list[TracePrompt] = []
        for fact in facts:
            try:
                self._prompts.append(encode_trace(session, fact.prompt, fact.subject, fact.answer))
            except ValueError as error:
                raise ValueError(f"fact {fact.id!r}: {error}") from None
        self._home = Path(directory)
        self._settings = settings_of(session, facts, self._options, self._texts)
        check_folder(self._home, self._settings)
        self._files = [self._home / "cases" / f"{number}.json" for number in range(len(facts))]
        self.found = {i: self._own(i) for i, file in enumerate(self._files) if file.exists()}

    @property
    def total(self) -> int:
        """Number of facts."""
        return len(self._facts)

    def run(
        self, batch: int = 4, progress: Callable[[StudyProgress], None] | None = None
    ) -> list[CausalTrace]:
        """Trace what is not there yet, ``batch`` prompts in a sweep; returns all traces in the facts' order.

        Stopped at any time, it goes on from the last batch that was done. Raises ValueError for a batch below 1, or a
        run that gives NaN or infinity.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        # Prompts of one length next to each other: a sweep wastes nothing on filling up.
        waiting = sorted(
            (i for i in range(self.total) if i not in self.found), key=lambda i: len(self._prompts[i])
        )
        subjects = [fact.subject for fact in self._facts]
        moments = None
        if self._options.noise.needs_corpus and self._texts is not None:
            arch = source_side(self._session.arch)
            moments = corpus_moments(arch, self._session.tokenizer, self._texts)
        start, before = time.monotonic(), len(self.found)
        for first in range(0, len(waiting), batch):
            part = waiting[first : first + batch]
            prompts = [self._prompts[i] for i in part]
            traces = trace_prompts(self._session, prompts, self._options, subjects=subjects, texts=moments)
            if first == 0:
                claim(self._home, self._settings)
            for i, trace in zip(part, traces, strict=True):
                trace.save(self._files[i].with_suffix(".npz"), force=True)
                # Last, for it is what says that the fact is done.
                trace.save(self._files[i])
                self.found[i] = trace
            if progress is not None:
                seconds = time.monotonic() - start
                left = (self.total - len(self.found)) * seconds / (len(self.found) - before)
                progress(StudyProgress(len(self.found), self.total, seconds, left))
        return [self.found[i] for i in range(self.total)]

    def _own(self, number: int) -> CausalTrace:
        """The trace in a fact's file, made sure to be the fact's."""
        file, prompt, options = self._files[number], self._prompts[number], self._options
        trace = _read(file)
        ids = prompt.ids
        if options.side == "decoder" and is_encoder_decoder(self._session.arch):
            ids = decoder_ids(self._session, options.decoder_prefix)
        whole = tuple(range(len(ids)))
        expected: dict[str, object] = {
            "prompt": prompt.text,
            "subject": prompt.subject,
            "input_ids": ids,
            "kinds": options.kinds,
            "window": options.window,
            "traced": whole if options.tokens == "all" else (prompt.span[1] - 1,),
        }
        if prompt.answer is not None:
            expected["answer_id"] = prompt.answer
        for name, value in expected.items():
            if (there := getattr(trace, name)) != value:
                fact = self._facts[number].id
                raise _unreadable(file, f"{name} must be {value!r}, that of fact {fact!r}, got {there!r}")
        return trace


def trace_facts(
    session: Session,
    facts: Sequence[TraceFact],
    directory: str | Path,
    options: TraceOptions | None = None,
    *,
    texts: Iterable[str] | None = None,
    batch: int = 4,
    progress: Callable[[StudyProgress], None] | None = None,
) -> list[CausalTrace]:
    """Trace facts into ``directory/cases``, several prompts in a sweep, and return all traces in the facts' order.

    What is there already is read instead of run. Noise is scaled by the embeddings of all facts' subjects, as
    published. See `Study` for the arguments and what is raised.
    """
    return Study(session, facts, directory, options, texts=texts).run(batch, progress)


def read_study(directory: str | Path, *, all_facts: bool = False) -> AverageTrace:
    """The average over what a directory holds, finished or not.

    Raises ValueError where it holds no trace, or a damaged one.
    """
    named = [file for file in (Path(directory) / "cases").glob("*.json") if file.stem.isdecimal()]
    files = sorted(named, key=lambda file: int(file.stem))
    if not files:
        raise ValueError(
            f"directory must hold the traces of `fastedit trace --facts`, got {str(directory)!r}"
        )
    return average([_read(file) for file in files], all_facts=all_facts)


def _read(file: Path) -> CausalTrace:
    try:
        return CausalTrace.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise _unreadable(file, str(error)) from None


def _unreadable(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file}: not a readable trace ({reason}); delete it and run again")

"""Second moments of many layers from one pass over a corpus.

Exact, and cheaper than a pass per layer:

* every forward serves all layers and stops at the input of the deepest one's matrix, before that product is formed;
* only the lower triangle of a sum is computed (`second_moment_`), from the keys of real tokens;
* rows of similar length share a batch, so that hardly any padding is computed;
* keys wait until there are enough of them for a product of good size.

Batches and the order of summation depend on the texts and the limits only. A checkpoint therefore holds the sums after
some batch and that batch's number, and a run that was killed continues to the very bits of an uninterrupted one (same
machine, same number of threads).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastedit.arch import ResolvedArch, Site
from fastedit.forward import evaluating
from fastedit.stats.accumulate import Accumulator, Place
from fastedit.stats.batches import Text, Window, read_windows
from fastedit.stats.cache import StatisticsStore
from fastedit.stats.forward import Taps
from fastedit.stats.job import Job
from fastedit.stats.moment import SecondMoment
from fastedit.stats.progress import CollectProgress, ProgressCallback, reporter
from fastedit.stats.provenance import CorpusDigest

__all__ = ["checkpoint_path", "collect_statistics"]

# Keys wait until there are this many: below, reading and writing the sum costs more than the product.
FLUSH_TOKENS = 1024
_WINDOW_BATCHES = 32


def collect_statistics(
    model: nn.Module,
    tokenizer: Any,
    arch: ResolvedArch,
    texts: Iterable[Text],
    layers: Sequence[int],
    *,
    site: Site = "mlp_out",
    max_length: int | None = None,
    token_budget: int | None = None,
    batch_tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
    directory: str | Path | None = None,
    dataset: str | None = None,
    progress: bool | ProgressCallback = False,
    checkpoint_seconds: float = 300.0,
) -> dict[str, SecondMoment]:
    """Second moments of the inputs of a matrix in several layers, over a corpus, in one pass.

    Args:
        model: the model `arch` was resolved from; evaluated without dropout and left as it was.
        tokenizer: its tokenizer; may be None if texts are token ids.
        arch: its resolved architecture.
        texts: strings or token-id sequences; any iterable, read once, in order. Empty texts count as texts.
        layers: layer numbers, in any order.
        site: whose input is the key: "mlp_out", "attn_out", or another linear of a block.
        max_length: tokens kept of a text; None takes the model's limit, at most 4096.
        token_budget: stop after exactly this many tokens (the last text is cut); None reads all texts.
        batch_tokens: bound on rows x width of a forward; None takes 1024 on a CPU and 16384 elsewhere.
        dtype: of the sums, float64 or float32.
        directory: of a `StatisticsStore`. Results are stored there; until then checkpoints of the partial sums are,
            and the same call continues from them, also after Ctrl-C or a kill. A finished call is not repeated.
        dataset: name of the corpus in file names; None takes `texts.name` if there is one, else "corpus".
        progress: True for a bar on stderr, or a function called with a `CollectProgress` after every batch.
        checkpoint_seconds: time between checkpoints, lengthened so that writing takes at most 5 % of the time.

    Returns:
        `SecondMoment` by module name, in the order of `layers`.

    Raises:
        ValueError: a wrong argument; no tokens in texts; non-finite keys; texts that are not those of the checkpoint;
            `directory` holds statistics of another model under these names.
        NotImplementedError: the decoder of an encoder-decoder model, whose keys depend on a paired input text.

    Source: Meng et al., arXiv:2202.05262, sec. 3.1 (C = K Kᵀ over Wikipedia); arXiv:2210.07229, sec. 4.3.
    """
    job = Job.plan(
        model, tokenizer, arch, texts, layers, site, max_length, token_budget, batch_tokens, dtype, dataset
    )
    store = None if directory is None else StatisticsStore(directory)
    if store is not None:
        for module in job.modules:
            store.refuse_other_model(dataclasses.replace(job.provenance, module=module))
        done = _already_stored(store, job, texts)
        if done is not None:
            return done
    state = Accumulator(job, None if store is None else store.partial_path(job.key()))
    state.resume()
    with reporter(progress) as report:
        _run(job, state, texts, tokenizer, report, checkpoint_seconds)
    moments = state.finish()
    if store is not None:
        for moment in moments.values():
            store.put(moment)
        state.forget()
    return moments


def checkpoint_path(
    model: nn.Module,
    tokenizer: Any,
    arch: ResolvedArch,
    texts: Iterable[Text],
    layers: Sequence[int],
    *,
    directory: str | Path,
    site: Site = "mlp_out",
    max_length: int | None = None,
    token_budget: int | None = None,
    batch_tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
    dataset: str | None = None,
) -> Path:
    """Where `collect_statistics` with these arguments keeps its checkpoint; others of the directory are not its own.

    Raises as `collect_statistics` does for a wrong argument. The texts are not read.
    """
    job = Job.plan(
        model, tokenizer, arch, texts, layers, site, max_length, token_budget, batch_tokens, dtype, dataset
    )
    return StatisticsStore(directory).partial_path(job.key())


def _already_stored(
    store: StatisticsStore, job: Job, texts: Iterable[Text]
) -> dict[str, SecondMoment] | None:
    """The stored result of this very job, or None. An iterator cannot be read twice and is always collected."""
    if iter(texts) is texts:
        return None
    wanted = job.provenance
    found: dict[str, SecondMoment] = {}
    for module in job.modules:
        moment = store.stored(dataclasses.replace(wanted, module=module))
        if moment is None or moment.provenance is None:
            return None
        found[module] = moment
    ends = {(m.provenance.corpus, m.provenance.n_texts, m.count) for m in found.values() if m.provenance}
    if len(ends) != 1:
        return None
    corpus, n_texts, count = ends.pop()
    digest, stream, read = CorpusDigest(), iter(texts), 0
    for text in stream:
        digest.update(text)
        read += 1
        if read == n_texts:
            break
    exhausted = next(stream, None) is None
    reached = wanted.token_budget is not None and count >= wanted.token_budget
    return found if digest.value() == corpus and read == n_texts and (exhausted or reached) else None


def _run(
    job: Job,
    state: Accumulator,
    texts: Iterable[Text],
    tokenizer: Any,
    report: ProgressCallback,
    checkpoint_seconds: float,
) -> None:
    p, start = job.provenance, state.place
    batch_tokens = p.batch_tokens or 0
    windows = read_windows(
        texts,
        tokenizer,
        max_length=p.max_length or 0,
        batch_tokens=batch_tokens,
        window_tokens=_WINDOW_BATCHES * batch_tokens,
        token_budget=p.token_budget,
        skip_texts=start.first,
        skip_tokens=start.tokens_before,
    )
    found = start.corpus == ""  # the window that the checkpoint was made in, if there is one
    clock = _Clock(state, texts, p.token_budget, report, checkpoint_seconds)
    with evaluating(job.arch.model), Taps(job) as taps:
        try:
            for window in windows:
                resumed = start.corpus != "" and window.first == start.first
                found = found or resumed
                if resumed and (window.corpus, window.texts) != (start.corpus, start.texts):
                    raise _other_texts(state)
                done = start.batches if resumed else 0
                for number, batch in enumerate(window.batches[done:], start=done + 1):
                    keys, mask = taps.keys(batch)
                    state.add(keys, mask, batch.tokens)
                    last = number == len(window.batches)
                    if state.waiting_tokens >= FLUSH_TOKENS or last:
                        state.flush(Place.after(window, number))
                        clock.flushed()
                    clock.report(window)
                if not window.batches:
                    state.place = Place.after(window, 0)
            if not found:
                raise _other_texts(state)
        except KeyboardInterrupt:
            state.save()
            raise


def _other_texts(state: Accumulator) -> ValueError:
    place = state.place
    return ValueError(
        f"texts: not those of the checkpoint {state.path} (they differ within the first {place.first + place.texts}); "
        f"pass the same texts, or delete it"
    )


class _Clock:
    """Says when to save and what to report."""

    def __init__(
        self,
        state: Accumulator,
        texts: Iterable[Text],
        token_budget: int | None,
        report: ProgressCallback,
        checkpoint_seconds: float,
    ) -> None:
        self.state, self.callback, self.token_budget = state, report, token_budget
        # Counting a corpus may mean reading it, which a token budget makes needless.
        self.total_texts = len(texts) if token_budget is None and isinstance(texts, Sized) else None
        self.begin = self.saved = time.monotonic()
        self.begin_tokens = state.count
        self.least = self.interval = checkpoint_seconds

    def flushed(self) -> None:
        now = time.monotonic()
        if self.state.path is not None and now - self.saved >= self.interval:
            self.state.save()
            self.saved = time.monotonic()
            self.interval = max(self.least, 20 * (self.saved - now)) if self.least > 0 else 0.0

    def report(self, window: Window) -> None:
        state = self.state
        seconds = time.monotonic() - self.begin
        tokens = state.count + state.waiting_tokens
        speed = (tokens - self.begin_tokens) / max(seconds, 1e-9)
        window_tokens = sum(batch.tokens for batch in window.batches)
        share = (tokens - window.tokens_before) / max(window_tokens, 1)
        texts = window.first + window.texts * share
        remaining = self._remaining(tokens, texts)
        eta = None if remaining is None or speed == 0 else remaining / speed
        self.callback(
            CollectProgress(tokens, round(texts), self.token_budget, self.total_texts, seconds, speed, eta)
        )

    def _remaining(self, tokens: int, texts: float) -> float | None:
        """Estimated tokens to go: the smaller of what the budget and the texts leave."""
        left = [] if self.token_budget is None else [float(self.token_budget - tokens)]
        if self.total_texts and texts:
            left.append((self.total_texts - texts) * tokens / texts)
        return min(left) if left else None

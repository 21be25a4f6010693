"""Running sums of a collection: keys wait until a product is worth its while, and the sums know where they stand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fastedit.ops.second_moment import mirror_, second_moment_
from fastedit.stats.batches import Window
from fastedit.stats.checkpoint import deferred_interrupt, read_tensors, write_tensors
from fastedit.stats.job import Job
from fastedit.stats.moment import SecondMoment

__all__ = ["Accumulator", "Place"]


@dataclasses.dataclass(frozen=True)
class Place:
    """A place in the corpus: batches done of the window that starts at text `first`.

    Attributes:
        first, texts, tokens_before, corpus: of the window, as in `Window`.
        batches: batches of it that the sums hold.
    """

    first: int = 0
    texts: int = 0
    tokens_before: int = 0
    batches: int = 0
    corpus: str = ""

    @classmethod
    def after(cls, window: Window, batches: int) -> Place:
        """The place after a number of batches of a window."""
        return cls(window.first, window.texts, window.tokens_before, batches, window.corpus)


class Accumulator:
    """The sums, the keys that wait to be added, and the place in the corpus that the sums stand for.

    Args:
        job: what is collected.
        path: of the checkpoint; None keeps none.
    """

    def __init__(self, job: Job, path: Path | None) -> None:
        self.job, self.path = job, path
        dtype = getattr(torch, job.provenance.dtype)
        self.sums = {
            name: torch.zeros(width, width, dtype=dtype, device=job.modules[name].weight.device)  # type: ignore[arg-type]
            for name, width in job.widths.items()
        }
        self.count = 0  # tokens in the sums
        self.place = Place()
        self.waiting: list[tuple[dict[str, Tensor], Tensor | None]] = []
        self.waiting_tokens = 0
        self.saved_at: Place | None = None

    def resume(self) -> None:
        """Continue from a checkpoint, if there is one."""
        if self.path is None or not self.path.exists():
            return
        _, meta = read_tensors(self.path, into=self.sums)
        self.count = int(meta["count"])
        self.place = self.saved_at = Place(**meta["place"])

    def save(self) -> None:
        """Write the checkpoint of the sums as they are; they always stand at `place`."""
        if self.path is None or self.saved_at == self.place:
            return
        tensors = {name: (C.dtype, tuple(C.shape), (C,)) for name, C in self.sums.items()}
        with deferred_interrupt():
            write_tensors(self.path, tensors, count=self.count, place=dataclasses.asdict(self.place))
            self.saved_at = self.place

    def forget(self) -> None:
        """Remove the checkpoint."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def add(self, keys: dict[str, Tensor], mask: Tensor | None, tokens: int) -> None:
        """Let the keys of a batch wait."""
        self.waiting.append((keys, mask))
        self.waiting_tokens += tokens

    def flush(self, place: Place) -> None:
        """Add the waiting keys to the sums, which then stand at `place`."""
        with deferred_interrupt():
            for name, C in self.sums.items():
                second_moment_(C, *self._take(name))
                if not bool(torch.isfinite(C.diagonal()).all()):
                    raise ValueError(
                        f"keys of {name!r} must be finite, but a batch held NaN or infinite values "
                        f"(texts {place.first} to {place.first + place.texts}); check the model, or load it in float32"
                    )
            self.count += self.waiting_tokens
            self.place = place
            self.waiting.clear()
            self.waiting_tokens = 0

    def _take(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Keys of one layer and their mask; several batches become one matrix of real rows."""
        if len(self.waiting) == 1:
            keys, mask = self.waiting[0]
            return keys.pop(name), None if mask is None else mask.reshape(-1).to(self.sums[name].device)
        rows = []
        for keys, mask in self.waiting:
            found = keys.pop(name)
            rows.append(found if mask is None else found[mask.reshape(-1).to(found.device)])
        return torch.cat(rows), None

    def finish(self) -> dict[str, SecondMoment]:
        """The second moments, symmetric."""
        if self.count == 0:
            raise ValueError("texts must hold at least one token, got none")
        moments = {}
        for name, C in self.sums.items():
            mirror_(C)
            provenance = dataclasses.replace(
                self.job.provenance,
                module=name,
                corpus=self.place.corpus,
                n_texts=self.place.first + self.place.texts,
                n_tokens=self.count,
            )
            moments[name] = SecondMoment(name, self.count, C, provenance)
        return moments

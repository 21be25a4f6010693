"""What an attribution of neurons gives back: arrays, the chosen neurons, files, a plot and an HTML view."""

from __future__ import annotations

import html
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastedit.atomic_file import atomic_path

__all__ = ["Neurons"]

_ROWS = 12  # neurons in the HTML view
# What readers of archives, arrays and JSON raise on damaged ones.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Neurons:
    """Scores of neurons and the neurons chosen by them.

    Attributes:
        prompts, answer, answer_ids: what was attributed.
        layers: attributed layers, ascending; the second axis of the arrays.
        scores: ``[prompts, layers, f]`` integrated gradients, averaged over the answer's tokens. A layer's sum is about
            the probability that the answer owes to the layer's activation at the last token.
        activations: ``[prompts, layers, f]`` clean activations, averaged likewise.
        probability: per prompt, the probability of the answer's first token.
        coarse: per prompt, ``(layer, neuron)`` above the threshold.
        neurons: those that enough prompts share; with one prompt, its own.
        options: how they were found, see ``NeuronOptions``.
    """

    prompts: tuple[str, ...]
    answer: str
    answer_ids: tuple[int, ...]
    layers: tuple[int, ...]
    scores: Tensor
    activations: Tensor
    probability: tuple[float, ...]
    coarse: tuple[tuple[tuple[int, int], ...], ...]
    neurons: tuple[tuple[int, int], ...]
    options: Mapping[str, Any]

    def top(self, count: int = 20) -> list[tuple[int, int, float]]:
        """The ``count`` neurons of highest mean score over the prompts: ``(layer, neuron, score)``."""
        mean = self.scores.mean(dim=0)
        values, places = mean.flatten().topk(min(count, mean.numel()))
        width = mean.shape[1]
        return [
            (self.layers[place // width], place % width, value)
            for place, value in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def per_layer(self) -> dict[int, int]:
        """How many of ``neurons`` each attributed layer has."""
        counts = Counter(layer for layer, _ in self.neurons)
        return {layer: counts[layer] for layer in self.layers}

    def to_dict(self, top: int = 20) -> dict[str, Any]:
        """JSON-able, without the arrays; ``top`` neurons are listed by score."""
        return {
            "prompts": list(self.prompts),
            "answer": self.answer,
            "answer_ids": list(self.answer_ids),
            "probability": list(self.probability),
            "layers": list(self.layers),
            "neurons": [list(neuron) for neuron in self.neurons],
            "coarse": [[list(neuron) for neuron in one] for one in self.coarse],
            "top": [
                {"layer": layer, "neuron": neuron, "score": score} for layer, neuron, score in self.top(top)
            ],
            "options": dict(self.options),
        }

    def save(self, path: str | Path) -> Path:
        """Write to ``.json`` (neurons and settings) or ``.npz`` (arrays too), replacing the file at once.

        Raises:
            ValueError: another suffix, or values that are NaN or infinite; nothing is written then.
        """
        target = Path(path)
        if target.suffix not in (".json", ".npz"):
            raise ValueError(f"path must end in .json or .npz, got {str(target)!r}")
        for name in ("scores", "activations"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name} must be finite to be saved, got NaN or infinity")
        try:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"probability and options must be finite to be saved: {error}") from error
        if target.suffix == ".json":
            data = text.encode()
        else:
            buffer = io.BytesIO()
            np.savez_compressed(
                buffer,
                scores=self.scores.numpy(),
                activations=self.activations.numpy(),
                layers=np.array(self.layers),
                neurons=np.array(self.neurons, dtype=np.int64).reshape(-1, 2),
                meta=np.array(text),
            )
            data = buffer.getvalue()
        with atomic_path(target) as temporary:
            temporary.write_bytes(data)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Neurons:
        """Read what ``save`` wrote to ``.npz``.

        Raises:
            ValueError: another or a damaged file.
            FileNotFoundError: there is none.
        """
        import torch

        try:
            with np.load(path, allow_pickle=False) as arrays:
                meta = json.loads(str(arrays["meta"]))
                scores, activations = (torch.from_numpy(arrays[name]) for name in ("scores", "activations"))
            options = dict(meta["options"])
            if options.get("layers") is not None:
                options["layers"] = tuple(options["layers"])
            found = cls(
                prompts=tuple(meta["prompts"]),
                answer=meta["answer"],
                answer_ids=tuple(meta["answer_ids"]),
                layers=tuple(meta["layers"]),
                scores=scores,
                activations=activations,
                probability=tuple(meta["probability"]),
                coarse=tuple(tuple((i, j) for i, j in one) for one in meta["coarse"]),
                neurons=tuple((i, j) for i, j in meta["neurons"]),
                options=options,
            )
            if scores.ndim != 3 or scores.shape[:2] != (len(found.prompts), len(found.layers)):
                raise ValueError(f"scores of shape {tuple(scores.shape)}")
        except FileNotFoundError:
            raise
        except (*_DAMAGED, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"path must be a file that Neurons.save wrote, got {str(path)!r} ({reason})"
            ) from error
        return found

    def plot(self, path: str | Path) -> Path:
        """Chosen neurons per layer, and each layer's summed scores, as .png or .svg; returns the path."""
        from fastedit.trace.neurons_plot import plot_neurons

        return plot_neurons(self, path)

    def __repr__(self) -> str:
        return (
            f"Neurons({len(self.neurons)} of {self.scores[0].numel()} neurons for {self.answer!r} "
            f"after {len(self.prompts)} prompts, {len(self.layers)} layers)"
        )

    def _repr_html_(self) -> str:
        """The neurons of highest score as a table, and an inline picture where matplotlib is installed."""
        chosen = set(self.neurons)
        rows = "".join(
            f"<tr><td>{layer}</td><td>{neuron}</td><td>{score:.3g}</td>"
            f"<td>{'yes' if (layer, neuron) in chosen else ''}</td></tr>"
            for layer, neuron, score in self.top(_ROWS)
        )
        prompts = "".join(
            f"<li>{html.escape(prompt)} <b>{html.escape(self.answer)}</b> (p = {p:.3f})</li>"
            for prompt, p in zip(self.prompts, self.probability, strict=True)
        )
        try:
            from fastedit.trace.neurons_plot import neurons_svg

            picture = neurons_svg(self)
        except RuntimeError:
            picture = ""
        return (
            f"<div><p>{len(self.neurons)} knowledge neurons</p><ul>{prompts}</ul>{picture}<table><thead><tr>"
            f"<th>layer</th><th>neuron</th><th>score</th><th>chosen</th></tr></thead><tbody>{rows}</tbody></table></div>"
        )

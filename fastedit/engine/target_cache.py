"""Target vectors kept on disk, in the layout of the original MEMIT (one npz with ``v_star`` a request).

The original's file name holds the layer, the clamp and the case only. A cache filled under other hyper-parameters,
templates or weights is then taken for the present one, which published sequential runs do without saying so.
``key="full"`` puts a digest of everything that a target depends on into the name; ``key="legacy"`` reads and writes
the original names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn

from fastedit.atomic_file import atomic_path, can_write
from fastedit.delta import fingerprint
from fastedit.request import EditRequest

__all__ = ["TargetCache", "check_folder"]


def check_folder(template: str, *, layer: int, clamp: float) -> None:
    """Raise ValueError unless the folder of a cache's files is there, or can be made in one that is; makes nothing."""
    folder = Path(template.format(layer, clamp, "0")).absolute().parent
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir() or not can_write(above):
        what = "can be written to" if above.is_dir() else "is one, not a file"
        raise ValueError(f"cache_template must lie in a folder that {what}, got {template!r} ({above})")


class TargetCache:
    """Read and write targets by request.

    Args:
        template: path with three ``{}`` for layer, clamp factor and request id, as the original's ``cache_template``.
        key: ``"full"`` or ``"legacy"``, see above.
        layer: layer that the targets belong to.
        clamp: clamp factor, part of the name.
        settings: JSON-able hyper-parameters and templates that the targets depend on.
        model: its weights enter the full key, so an edited model has a cache of its own.

    Raises:
        ValueError: the folder is not there and cannot be made.
    """

    def __init__(
        self, template: str, key: str, *, layer: int, clamp: float, settings: dict[str, Any], model: nn.Module
    ) -> None:
        check_folder(template, layer=layer, clamp=clamp)
        self._template = template
        self._name = (layer, clamp)
        self._digest = ""
        if key == "full":
            weights = {name: fingerprint(weight) for name, weight in model.named_parameters()}
            facts = json.dumps([settings, weights], sort_keys=True, default=str)
            self._digest = hashlib.sha256(facts.encode()).hexdigest()[:16]

    def path(self, request: EditRequest) -> Path:
        """File of one request."""
        # An id is free text: it must not lead out of the folder.
        path = Path(self._template.format(*self._name, quote(request.id, safe=" ")))
        if not self._digest:
            return path
        # An id may be used again for another fact.
        fact = json.dumps([request.prompt, request.subject, request.target_new])
        digest = hashlib.sha256((self._digest + fact).encode()).hexdigest()[:16]
        return path.with_name(f"{path.stem}_{digest}{path.suffix}")

    def load(self, requests: Sequence[EditRequest], width: int) -> dict[int, Tensor]:
        """Targets found, by position: ``[width]`` fp32 each.

        Raises:
            ValueError: a file is damaged, holds no ``v_star`` or one of another width.
        """
        found = {}
        for index, request in enumerate(requests):
            path = self.path(request)
            if not path.is_file():
                continue
            try:
                with np.load(path, allow_pickle=False) as archive:
                    value = torch.from_numpy(np.asarray(archive["v_star"], dtype=np.float32)).flatten()
            except (OSError, ValueError, KeyError, EOFError) as error:
                raise ValueError(
                    f"cache_template: {path} is not a target file ({type(error).__name__})"
                ) from None
            except Exception as error:  # noqa: BLE001 - zipfile raises its own types for damaged archives
                raise ValueError(f"cache_template: {path} is damaged ({type(error).__name__})") from None
            if value.shape != (width,) or not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"cache_template: {path} must hold {width} finite values, got {tuple(value.shape)}"
                )
            found[index] = value
        return found

    def save(self, request: EditRequest, value: Tensor) -> None:
        """Write one target, atomically."""
        path = self.path(request)
        with atomic_path(path, make_folder=True) as part, part.open("wb") as file:
            np.savez(file, v_star=value.detach().float().cpu().numpy())

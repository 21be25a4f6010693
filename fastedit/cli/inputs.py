"""What commands read: models from a folder, a hub or the embedded world, and the requests for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.cli.console import log, quiet_libraries

if TYPE_CHECKING:
    from fastedit.config import MethodConfig
    from fastedit.edit import Edit
    from fastedit.editor import Editor
    from fastedit.request import EditRequest
    from fastedit.world import World

__all__ = ["Opened", "at_least_one", "check_seed", "open_model", "read_checked", "read_edit"]

_WORLD = "world:"
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# Texts that the statistics of an embedded model are taken from: about 45 tokens each, many more than its
# widest edited matrix has columns.
_WORLD_TEXTS = 400


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be edited; ``world`` is set for an embedded one, ``stats`` where --stats was given."""

    name: str
    editor: Editor
    world: World | None
    stats: Path | None = None

    def recommended(self, method: str) -> Mapping[str, Any]:
        """Options that the embedded world recommends for the method; nothing for other models."""
        options = None if self.world is None else getattr(self.world, method, None)
        return options if isinstance(options, Mapping) else {}

    def require_statistics(self, config: MethodConfig) -> None:
        """Make sure the second moments that ``config`` needs are there.

        For an embedded model they are collected now unless --stats was given (a few seconds); for others a missing
        one is a ValueError that says how to collect it. Statistics that were given are used or refused.
        """
        if not getattr(config, "mom2_adjustment", False):
            return
        session = self.editor.session
        layers = list(getattr(config, "layers", ()))
        try:
            for layer in layers:
                session.second_moment(session.arch.name("mlp_out", layer))
        except ValueError as error:
            if self.stats is not None:
                raise ValueError(f"--stats {str(self.stats)!r}: {error}") from error
            if self.world is None:
                raise
            log(f"collecting key statistics of layers {', '.join(map(str, layers))} from the embedded corpus")
            self.editor.collect_statistics(self.world.corpus(_WORLD_TEXTS), layers)


def open_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    stats: Path | None = None,
    seed: int = 0,
    encoder_decoder: bool = False,
    hint: str = "",
) -> Opened:
    """Load a model from a folder, a hub or the embedded world (``world:gpt2``) and put an Editor around it.

    encoder_decoder: whether the command takes such models; ``hint``: what to do where it does not.

    Raises ValueError naming --model, --dtype, --device, --stats or --seed, the rule and the value.
    """
    check_seed(seed)
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not name:
        raise ValueError("--model must not be empty, got ''")
    if stats is not None and not stats.is_dir():
        raise ValueError(f"--stats must be a folder written by `fastedit stats`, got {str(stats)!r}")
    if not name.startswith(_WORLD):
        _check_name(name)
    where = _device(device)

    from fastedit.editor import Editor

    options: dict[str, Any] = {"statistics": stats, "seed": seed}
    with quiet_libraries(), _loading(name):
        if not name.startswith(_WORLD):
            if not encoder_decoder:
                _check_causal(name, hint)
            return Opened(
                name, Editor.from_pretrained(name, dtype=dtype, device=where, **options), None, stats
            )
        from fastedit.world import load

        world = load(name.removeprefix(_WORLD))
        model: Any = world.model
        model = model.to(device=where)
        if dtype != "auto":
            model = model.to(dtype=_torch_dtype(dtype))
        return Opened(name, Editor(model, world.tokenizer, **options), world, stats)


def read_checked(path: Path, *, limit: int | None, skip_invalid: bool) -> list[EditRequest]:
    """The requests of a file; with skip_invalid, records that are none are named on stderr and left out."""
    from fastedit.readers import read_requests

    at_least_one("--limit", limit)
    problems: list[str] | None = [] if skip_invalid else None
    if not path.exists():
        raise FileNotFoundError(f"--requests {path}: no such file")
    requests = read_requests(path, limit=limit, problems=problems)
    for problem in problems or ():
        log(f"skipped: {problem}")
    return requests


def read_edit(path: Path) -> Edit:
    """The edit in a file; what is wrong with it is said under --edit."""
    from fastedit.edit import Edit

    if not path.exists():
        raise FileNotFoundError(f"--edit {path}: no such file")
    try:
        return Edit.load(path)
    except ValueError as error:
        raise ValueError(f"--edit{str(error).removeprefix('path')}") from error


def at_least_one(option: str, value: int | None) -> None:
    """Raise ValueError naming the option unless its value is None or at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")


def check_seed(seed: int) -> None:
    """Raise ValueError naming --seed unless torch's generators take the value."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {seed}")


def _check_name(name: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model must be a folder with a config.json, got {name!r}")
    elif folder.exists():
        raise ValueError(f"--model must be a folder or a hub name, got the file {name!r}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"--model must be a folder that exists or a hub name, got {name!r}")


def _check_causal(name: str, hint: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model_type={config.model_type!r}: must be a causal language model, is an encoder-decoder{hint}"
        )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """The loaders' own long messages, cut to their first sentence, with the option's name in front."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"--model {name!r} cannot be loaded: a weight file is damaged ({error})") from error
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"--model {name!r}: {error}") from error
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise ValueError(
            f"--model {name!r} cannot be loaded: its weights do not have the shapes that its config.json says"
        ) from error
    except (OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--model {name!r} cannot be loaded: {first}") from error


def _device(text: str) -> str:
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {text!r}")
    if text != "cpu":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(text.partition(":")[2] or 0) >= found:
            have = f"{found} CUDA device{'s'[: found != 1]}" if found else "no CUDA device"
            raise ValueError(f"--device must be one this machine has, got {text!r} ({have})")
    return text


def _torch_dtype(text: str) -> Any:
    import torch

    return getattr(torch, text)

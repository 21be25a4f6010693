"""Which implementation of an op runs: a preference list per op, refusals that carry their reason, nothing silent.

torch.library holds one kernel per op and dispatch key, while an op here may have several for one device (CUDA C++ and
Triton, say). So each key gets a chooser that walks the op's list: the first implementation for the device that loads
and does not refuse the call runs, and the eager PyTorch default runs when none does.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Candidate", "Impl", "Slower", "backend", "define_op", "explain", "report"]

BACKENDS = ("eager", "cpu", "triton", "cuda")
_BUILD = "build it with `pip install -e .` (needs {needs}; see `fastedit doctor`)"
_NEEDS = {
    "fastedit._cpu": "a C++17 compiler",
    "fastedit._cuda": "a C++17 compiler and nvcc, FASTEDIT_CUDA=on",
}

_LIBRARY = torch.library.Library("fastedit", "DEF")  # type: ignore[no-untyped-call]
_FORCED: ContextVar[str | None] = ContextVar("fastedit_backend", default=None)
_log = logging.getLogger(__name__)


class Slower(str):
    """A refusal for speed, not for ability: the default order skips the implementation, a forced backend runs it."""


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    name: one of "cpu", "triton", "cuda"; what `backend(name)` forces.
    device: the device type of the tensors it takes, "cpu" or "cuda".
    load: "module:function", resolved on first use, so importing an op never imports a kernel.
    refuse: refuse(*args) -> the reason it cannot take this call, or None. Args are those of the op's schema.
    adapt: adapt(function, *args), for native functions that take pointers; without it function(*args) is called.
    """

    name: str
    device: Literal["cpu", "cuda"]
    load: str
    refuse: Callable[..., str | None]
    adapt: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.name not in BACKENDS[1:]:
            raise ValueError(f"name must be one of {', '.join(BACKENDS[1:])}, got {self.name!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.load.count(":") != 1:
            raise ValueError(f"load must be 'module:function', got {self.load!r}")


@dataclass(frozen=True)
class Candidate:
    """One line of `explain`: an implementation, whether it runs, and why or why not."""

    name: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class _Op:
    name: str
    eager: Callable[..., Any]
    impls: tuple[Impl, ...]
    bind: Callable[..., tuple[Any, ...]] | None
    written: tuple[int, ...]  # places of the arguments that the schema says it changes


_OPS: dict[str, _Op] = {}


def define_op(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    eager: Callable[..., Any],
    impls: Sequence[Impl] = (),
    *,
    autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    bind: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Register `torch.ops.fastedit.<name>` and return it.

    schema: the part after the name, e.g. "(Tensor(a!) C, Tensor K, Tensor? mask) -> ()".
    fake: shapes and dtypes of the result without data, for torch.compile; it may raise ValueError.
    eager: the default, plain PyTorch, any device. impls: preferred ones, best first.
    autograd: (backward, setup_context) as in torch.library.register_autograd.
    bind: turns the public function's arguments into the schema's, for `explain`, where the two differ.
    """
    if name in _OPS:
        raise ValueError(f"name must be new, but op {name!r} is already defined")
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    arguments = getattr(torch.ops.fastedit, name).default._schema.arguments
    written = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    op = _Op(name, eager, tuple(impls), bind, written)
    for key, device in (("CPU", "cpu"), ("CUDA", "cuda"), ("MPS", "mps"), ("XPU", "xpu")):
        _LIBRARY.impl(name, _chooser(op, device), key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastedit::{name}", fake, lib=_LIBRARY)
    if autograd is not None:
        backward, setup = autograd
        torch.library.register_autograd(f"fastedit::{name}", backward, setup_context=setup, lib=_LIBRARY)
    _OPS[name] = op
    overload: Callable[..., Any] = getattr(torch.ops.fastedit, name).default
    return overload


def _chooser(op: _Op, device: str) -> Callable[..., Any]:
    def choose(*args: Any) -> Any:
        if torch.is_autocast_enabled(device):
            # An op states its arithmetic; the caller's autocast would round the products inside it.
            with torch.autocast(device, enabled=False):
                result = run(*args)
        else:
            result = run(*args)
        for place in op.written:
            _count_write(args[place])
        return result

    def run(*args: Any) -> Any:
        forced = _forced()
        if forced is not None:
            return _run_forced(op, device, forced, args)
        for impl in op.impls:
            if _refusal(impl, device, args) is None:
                _log_choice(op.name, impl.name, device)
                return _call(impl, args)
        _log_choice(op.name, "eager", device)
        return op.eager(*args)

    return choose


def _count_write(written: Tensor | list[Tensor]) -> None:
    """Let autograd see that a tensor is no longer what a graph may have kept of it, as torch's own ops do."""
    for tensor in (written,) if isinstance(written, Tensor) else written:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _run_forced(op: _Op, device: str, forced: str, args: tuple[Any, ...]) -> Any:
    if forced == "eager":
        return op.eager(*args)
    reasons = []
    for impl in op.impls:
        if impl.name != forced:
            continue
        reason = _refusal(impl, device, args)
        if reason is None or isinstance(reason, Slower):
            return _call(impl, args)
        reasons.append(reason)
    have = ", ".join(dict.fromkeys(["eager", *(impl.name for impl in op.impls)]))
    why = "; ".join(reasons) or f"this op has no such implementation (it has: {have})"
    raise RuntimeError(f"backend {forced!r} was asked for, but {op.name} cannot run on it: {why}")


def _call(impl: Impl, args: tuple[Any, ...]) -> Any:
    function, missing = _load(impl.load)
    if function is None:
        raise RuntimeError(missing)
    return impl.adapt(function, *args) if impl.adapt is not None else function(*args)


def _refusal(impl: Impl, device: str, args: tuple[Any, ...] | None) -> str | None:
    """Why `impl` does not run for tensors on `device`; with args=None only whether it could."""
    interpreted = impl.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if impl.device != device and not (interpreted and device == "cpu"):
        return f"it takes {impl.device} tensors, these are on {device}"
    function, missing = _load(impl.load)
    if function is None:
        return missing
    reason = impl.refuse(*args) if args is not None else None
    if reason is None and interpreted:
        return Slower("the Triton interpreter is for tests")
    return reason


@cache
def _load(load: str) -> tuple[Callable[..., Any] | None, str]:
    """The function behind "module:function", or None and the reason. Cached: a new build needs a new process."""
    module, _, attribute = load.partition(":")
    try:
        function: Callable[..., Any] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing in _NEEDS:
            return None, f"{missing} is not built: {_BUILD.format(needs=_NEEDS[missing])}"
        return None, f"module {missing} is not installed"
    except (ImportError, AttributeError, OSError) as error:
        return None, f"{load} cannot be loaded: {_one_line(error)}"
    return function, ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@cache
def _log_choice(op: str, name: str, device: str) -> None:
    _log.info("%s on %s runs on %s", op, device, name)


def _forced() -> str | None:
    """The backend asked for by `backend` or, outside of it, by FASTEDIT_BACKEND."""
    forced = _FORCED.get()
    if forced is None:
        forced = os.environ.get("FASTEDIT_BACKEND") or None
        if forced is not None and forced not in BACKENDS:
            raise ValueError(f"FASTEDIT_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}")
    return forced


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op inside the `with` onto one implementation: "eager", "cpu", "triton" or "cuda".

    An op that cannot run on it raises RuntimeError with the reasons; nothing falls back. The choice belongs to the
    current thread or async task. FASTEDIT_BACKEND does the same for a whole process.

        with fastedit.backend("eager"):
            second_moment_(C, K)
    """
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def explain(op: str, *args: Any, **kwargs: Any) -> list[Candidate]:
    """What would run for this call and why: one `Candidate` per implementation, in order, the eager default last.

    op: an op's name, with or without its trailing underscore. Without args only availability on this machine is told.
    Raises ValueError for an op that does not exist.
    """
    _define_all()
    found = _OPS.get(op) or _OPS.get(op + "_") or _OPS.get(op.rstrip("_"))
    if found is None:
        raise ValueError(f"op must be one of {', '.join(sorted(_OPS))}, got {op!r}")
    values: tuple[Any, ...] | None = None
    if args or kwargs:
        if found.bind is not None:
            values = found.bind(*args, **kwargs)
        else:
            values = tuple(signature(found.eager).bind(*args, **kwargs).arguments.values())
    return _candidates(found, values)


def _candidates(op: _Op, args: tuple[Any, ...] | None) -> list[Candidate]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for arg in args or ():
        first = arg[0] if isinstance(arg, list) and arg else arg
        if isinstance(first, torch.Tensor):
            device = first.device.type
            break
    forced, rows, chosen = _forced(), [], False
    for impl in op.impls:
        reason = _refusal(impl, device, args)
        if forced is not None and impl.name != forced:
            reason = f"backend {forced!r} was asked for"
        elif forced is not None and isinstance(reason, Slower):
            reason = None
        runs = reason is None and not chosen
        chosen = chosen or runs
        rows.append(Candidate(impl.name, runs, reason or ("chosen" if runs else "an earlier one is chosen")))
    if forced not in (None, "eager"):
        rows.append(Candidate("eager", False, f"backend {forced!r} was asked for"))
    else:
        rows.append(Candidate("eager", not chosen, "an earlier one is chosen" if chosen else "the default"))
    return rows


def _define_all() -> None:
    import fastedit.ops

    for module in pkgutil.iter_modules(fastedit.ops.__path__):
        if not module.name.startswith("_"):
            import_module(f"fastedit.ops.{module.name}")


def report() -> dict[str, Any]:
    """What was built, what this machine has, and per op what would run: JSON-able, printed by `fastedit doctor`."""
    _define_all()
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": {
            "available": cuda,
            "torch_built_for": torch.version.cuda,
            "devices": _devices() if cuda else [],
        },
        "triton": _module_report("triton"),
        "_cpu": _module_report("fastedit._cpu"),
        "_cuda": _module_report("fastedit._cuda"),
        "forced_backend": _forced(),
        "ops": {
            name: [
                {"name": row.name, "chosen": row.chosen, "reason": row.reason}
                for row in _candidates(op, None)
            ]
            for name, op in sorted(_OPS.items())
        },
    }


def _devices() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _module_report(name: str) -> dict[str, Any]:
    """Version and `info()` of an optional module, or why it is missing."""
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name in _NEEDS:
            return {"available": False, "reason": f"not built: {_BUILD.format(needs=_NEEDS[name])}"}
        return {"available": False, "reason": f"module {error.name} is not installed"}
    except (ImportError, OSError) as error:
        return {"available": False, "reason": f"cannot be loaded: {_one_line(error)}"}
    found: dict[str, Any] = {"available": True}
    if hasattr(module, "__version__"):
        found["version"] = str(module.__version__)
    if hasattr(module, "info"):
        found.update(module.info())
    return found

"""``fastedit doctor``: what was built, and which implementation of each op would run here and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastedit.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["doctor"]

_MODULES = ("triton", "_cpu", "_cuda")


def doctor(json: Json = False) -> None:
    """Show versions, what was built, the CPU's level, and per op what would run and why the rest would
    not.
    """
    from fastedit.cli.console import emit_json, results
    from fastedit.doctor import collect

    found = collect()
    if json:
        emit_json(found)
        return
    console = results()
    console.print(_machine_table(found))
    console.print(_ops_table(found["ops"]))


def _machine_table(found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in found.items():
        if name in _MODULES:
            table.add_row(f"fastedit.{name}" if name.startswith("_") else name, _module(value))
        elif name == "cuda":
            devices = ", ".join(value["devices"]) or "no device"
            built = value["torch_built_for"]
            table.add_row(name, f"{devices} (torch built {f'for CUDA {built}' if built else 'without CUDA'})")
        elif name == "forced_backend":
            table.add_row("forced backend", "none" if value is None else str(value))
        elif isinstance(value, Mapping) and name != "ops":
            table.add_row(name, ", ".join(f"{key} {item}" for key, item in value.items()) or "none set")
        elif name != "ops":
            table.add_row(name, str(value))
    return table


def _ops_table(ops: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("op", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    table.add_column("runs")
    table.add_column("why")
    for name, candidates in ops.items():
        for position, row in enumerate(candidates):
            first = name if position == 0 else ""
            table.add_row(first, row["name"], "yes" if row["chosen"] else "no", row["reason"])
        table.add_section()
    return table


def _module(state: Mapping[str, Any]) -> str:
    if not state["available"]:
        return f"no: {state['reason']}"
    details = []
    for name, value in state.items():
        if name != "available":
            details.append(
                f"{name} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
            )
    return "yes: " + "; ".join(details) if details else "yes"

"""``fastedit methods``: what there is to edit with."""

from __future__ import annotations

from fastedit.cli.options import Json

__all__ = ["methods"]


def methods(json: Json = False) -> None:
    """List the editing methods: paper, modes, models with published defaults, options."""
    from dataclasses import MISSING, fields

    from rich.table import Table

    from fastedit import methods as registry
    from fastedit.cli.console import emit_json, results

    specs = [registry.get(name) for name in registry.names()]
    if json:
        rows = []
        for spec in specs:
            options = {}
            for field in fields(spec.config):
                options[field.name] = None if field.default is MISSING else field.default
            rows.append(
                {
                    "name": spec.name,
                    "paper": spec.paper,
                    "modes": list(spec.modes),
                    "published_defaults": {name: dict(values) for name, values in spec.defaults.items()},
                    "options": options,
                }
            )
        emit_json({"methods": rows})
        return
    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("modes")
    table.add_column("published defaults for")
    table.add_column("options (--set)")
    for spec in specs:
        names = ", ".join(field.name for field in fields(spec.config))
        table.add_row(spec.name, spec.paper, ", ".join(spec.modes), ", ".join(spec.defaults) or "–", names)
    results().print(table)

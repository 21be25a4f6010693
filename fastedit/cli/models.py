"""``fastedit models``: the architectures that can be edited."""

from __future__ import annotations

from fastedit.cli.options import Json

__all__ = ["models"]


def models(json: Json = False) -> None:
    """List the model types that can be edited and the matrix that locate-then-edit methods change in each."""
    from rich.table import Table

    from fastedit.arch import ARCHITECTURES
    from fastedit.cli.console import emit_json, line, results

    rows = [
        {
            "model_type": name,
            "edited": f"{row.block}.{row.mlp_out}",
            "attention": f"{row.block}.{row.attn_out}",
            "head": row.head,
            "side": row.side,
            "parallel": row.parallel,
            "gated": row.mlp_gate is not None or row.fused_gate,
        }
        for name, row in ARCHITECTURES.items()
    ]
    if json:
        emit_json({"models": rows})
        return
    table = Table()
    for heading in ("model type", "edited matrix", "head", "notes"):
        table.add_column(heading, no_wrap=heading == "model type")
    for item in rows:
        notes = [str(item["side"])] if item["side"] != "decoder" else []
        notes += [word for word, key in (("gated MLP", "gated"), ("parallel block", "parallel")) if item[key]]
        table.add_row(str(item["model_type"]), str(item["edited"]), str(item["head"]), ", ".join(notes))

    results().print(table)
    line("Other models: pass arch=fastedit.arch.Architecture(...) to fastedit.Editor.")
    line("Embedded models: --model world:gpt2, --model world:llama.")

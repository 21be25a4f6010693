"""The command tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastedit.cli import apply, demo, doctor, edit, eval, export, methods, models, neurons, stats, trace

__all__ = ["build"]

# Command -> (function, one example). Examples are shown by --help and run by the tests of the documentation.
_COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "demo": (demo.demo, "fastedit demo --model gpt2 --out demo"),
    "edit": (
        edit.edit,
        "fastedit edit --model world:gpt2 --requests facts.jsonl --method memit --out edit.safetensors",
    ),
    "apply": (apply.apply, "fastedit apply --model gpt2-xl --edit edit.safetensors --out edited"),
    "revert": (apply.revert, "fastedit revert --model edited --out restored"),
    "stats": (stats.stats, "fastedit stats --model gpt2-xl --corpus texts.jsonl --layers 13-17 --out stats"),
    "trace": (
        trace.trace,
        "fastedit trace --model world:gpt2 --limit 20 --window 3 --out traces --plot trace.png",
    ),
    "neurons": (
        neurons.neurons,
        'fastedit neurons --model gpt2-xl --prompt "The capital of France is" --answer Paris --plot neurons.png',
    ),
    "eval": (
        eval.evaluate,
        "fastedit eval --model world:gpt2 --requests facts.jsonl --edit edit.safetensors",
    ),
    "export": (
        export.export,
        "fastedit export --model gpt2-xl --edit edit.safetensors --to peft --out adapter",
    ),
    "methods": (methods.methods, "fastedit methods --json"),
    "models": (models.models, "fastedit models"),
    "doctor": (doctor.doctor, "fastedit doctor"),
}


def build() -> Any:
    """A fresh command object; run it with ``.main(arguments, standalone_mode=False)``."""
    app = typer.Typer(
        name="fastedit",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(
        invoke_without_command=True,
        epilog="Example: [bold]fastedit demo[/bold] edits, measures and undoes facts in an embedded model.",
    )(_root)
    for name, (function, example) in _COMMANDS.items():
        # As one line: the list of commands would show the docstring's line breaks.
        summary = " ".join((function.__doc__ or "").split())
        app.command(name, help=summary, epilog=f"Example: [bold]{example}[/bold]")(function)
    return typer.main.get_command(app)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Edit what a language model knows: ROME, MEMIT and their family, measured and undone to the last bit."""
    if version:
        from fastedit import __version__

        typer.echo(f"fastedit {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(0)

"""``fastedit eval``: how a model answers requests and their probes, with or without an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastedit.cli.options import Device, Dtype, Force, Json, Limit, Model, Plot, Requests, SkipInvalid

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    requests: Requests,
    edit: Annotated[
        Path | None,
        typer.Option("--edit", "-e", help="Score before and after this edit.", show_default=False),
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(help="What to score, e.g. rewrite,paraphrase. Default: everything.", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Text file to measure perplexity on.", show_default=False),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in one forward pass.")] = 4096,
    limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    plot: Plot = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write every probe's score (.json).", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Score requests: rewrite, paraphrase, neighbourhood, other facts and portability; optionally
    perplexity.
    """
    from fastedit.cli.console import emit_json, line, results
    from fastedit.cli.inputs import at_least_one, open_model, read_checked, read_edit
    from fastedit.cli.outputs import check_not_input, check_output, check_plot, saving
    from fastedit.evaluate import comparison_table, perplexity, plot_probabilities, request_table, write_json
    from fastedit.evaluate.metrics import KINDS

    check_output(out, force=force)
    check_plot(plot, force=force, out=out)
    inputs = {"--requests": requests, "--edit": edit, "--texts": texts, "--model": model}
    check_not_input({"--out": out, "--plot": plot}, inputs)
    at_least_one("--batch-tokens", batch_tokens)
    listed = read_checked(requests, limit=limit, skip_invalid=skip_invalid)
    chosen = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    for kind in chosen or ():
        if kind not in KINDS:
            raise ValueError(f"--kinds must be among {', '.join(KINDS)}, got {kind!r}")
    corpus = None
    if texts is not None:
        from fastedit.stats.corpus import read_corpus

        corpus = list(read_corpus(texts))
    loaded = None if edit is None else read_edit(edit)
    editor = open_model(model, dtype=dtype, device=device).editor
    stages = {}
    fluency = {}

    def measure(label: str) -> None:
        stages[label] = editor.evaluate(listed, kinds=chosen, batch_tokens=batch_tokens)
        if corpus is not None:
            fluency[label] = perplexity(editor.session, corpus, batch_tokens=batch_tokens)

    measure("" if loaded is None else "before")
    if loaded is not None:
        with editor.applied(loaded):
            measure("after")
    if plot is not None:
        labels = {label or "model": stage for label, stage in stages.items()}
        with saving(plot):
            plot_probabilities(labels, plot, title=model)
    report = {
        "model": model,
        "edit": None if edit is None else str(edit),
        "requests": len(listed),
        "evaluation": {label or "model": stage.to_dict() for label, stage in stages.items()},
        "perplexity": {label or "model": value for label, value in fluency.items()},
    }
    if out is not None:
        with saving(out):
            write_json(out, report)
    if json:
        emit_json(report)
        return
    console = results()
    console.print(request_table(stages, limit=10))
    console.print(comparison_table(stages))
    for label, value in fluency.items():
        line(f"perplexity {label}".rstrip() + f": {value:.3f}")

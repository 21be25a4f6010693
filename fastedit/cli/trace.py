"""``fastedit trace``: where a model holds an answer, for one prompt or on average over many facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli.options import Device, Dtype, Force, Json, Model

if TYPE_CHECKING:
    from fastedit.cli.inputs import Opened
    from fastedit.trace import CausalTrace, TraceOptions
    from fastedit.trace.average import AverageTrace
    from fastedit.trace.facts import TraceFact
    from fastedit.trace.study import StudyProgress

__all__ = ["trace"]

_WORLD_FACTS = 40


def trace(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(help="A prompt with the subject in it, or {} in its place.", show_default=False),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What the prompt is about.", show_default=False)] = None,
    answer: Annotated[
        str | None,
        typer.Option(help="Whose probability is read. Default: what the model predicts.", show_default=False),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            help="Average over the facts of a file: prompt, subject, answer, or edit requests. "
            "Embedded models have their own.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Trace only the first N facts.", show_default=False)
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Of hidden, mlp, attn, severed_mlp and severed_attn.")
    ] = "hidden,mlp,attn",
    window: Annotated[int, typer.Option(help="Layers that a cell of mlp or attn restores.")] = 10,
    tokens: Annotated[str, typer.Option(help="all, or subject_last: the subject's last token only.")] = "all",
    samples: Annotated[int, typer.Option(help="Draws of noise.")] = 10,
    noise: Annotated[
        float, typer.Option(help="Noise in standard deviations of the subjects' embeddings.")
    ] = 3.0,
    scale: Annotated[
        float | None, typer.Option(help="Noise itself, instead of --noise.", show_default=False)
    ] = None,
    distribution: Annotated[str, typer.Option(help="gaussian or uniform.")] = "gaussian",
    per_dimension: Annotated[
        bool, typer.Option("--per-dimension", help="A standard deviation for every dimension.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Noise in place of the embeddings instead of on them.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 1,
    side: Annotated[
        str | None,
        typer.Option(
            help="Of an encoder-decoder: encoder (the default) or decoder, which has cross and severed_cross, too.",
            show_default=False,
        ),
    ] = None,
    decoder_prefix: Annotated[
        str | None,
        typer.Option(
            help="Of an encoder-decoder: what the decoder has before the answer, e.g. '<extra_id_0>'.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Facts that are traced together.")] = 4,
    all_facts: Annotated[
        bool, typer.Option("--all-facts", help="Also average facts that the model does not predict.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Of a prompt a file (.npz or .json); of facts a folder, which a stopped run goes on from.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a picture (.png or .svg).", show_default=False)
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Show where a model holds an answer: restore one token and layer at a time in a corrupted run."""
    from fastedit.cli.inputs import at_least_one, open_model
    from fastedit.cli.outputs import check_output, check_plot
    from fastedit.trace import Noise, TraceOptions
    from fastedit.trace.facts import read_facts

    if (prompt is None) != (subject is None):
        raise ValueError("--prompt and --subject must be given together, got only one of them")
    if prompt is not None and facts is not None:
        raise ValueError("--facts must not be given with --prompt, got both")
    if prompt is None and facts is None and not model.startswith("world:"):
        raise ValueError(
            "--prompt and --subject, or --facts, must be given (only embedded models have facts)"
        )
    if prompt is None and answer is not None:
        raise ValueError(f"--answer needs --prompt, got {answer!r} without one")
    at_least_one("--limit", limit)
    at_least_one("--batch", batch)
    rule = Noise(
        samples=samples,
        sigmas=noise,
        scale=scale,
        per_dimension=per_dimension,
        distribution=distribution,  # type: ignore[arg-type]
        replace=replace,
        seed=seed,
    )
    chosen = tuple(kind.strip() for kind in kinds.split(","))
    of_both: Any = {"side": side, "decoder_prefix": decoder_prefix}
    options = TraceOptions(kinds=chosen, window=window, tokens=tokens, noise=rule, **of_both)  # type: ignore[arg-type]
    check_plot(plot, force=force, out=out)
    if prompt is not None and subject is not None:
        check_output(out, force=force)
        if out is not None and out.suffix not in (".npz", ".json"):
            raise ValueError(f"--out must end in .npz or .json for a prompt, got {str(out)!r}")
        editor = open_model(model, dtype=dtype, device=device, encoder_decoder=True).editor
        found: Any = editor.trace(
            prompt, subject, answer=answer, kinds=chosen, window=window, tokens=tokens, noise=rule, **of_both
        )
        _deliver(found, out, plot, json, model)
        return
    check_output(out, force=True, folder=True, added=True)
    listed = None if facts is None else read_facts(facts, limit=limit)
    opened = open_model(model, dtype=dtype, device=device, encoder_decoder=True)
    if listed is None:
        listed = _world_facts(opened, limit)
    with _folder(out) as folder:
        found = _study(opened, listed, folder, options, batch, all_facts, resumable=out is not None)
    _deliver(found, out, plot, json, model)


def _world_facts(opened: Opened, limit: int | None) -> list[TraceFact]:
    from fastedit.trace.facts import TraceFact

    if opened.world is None:
        raise ValueError("--facts must be given for a model that is not embedded")
    requests = opened.world.requests(limit or _WORLD_FACTS)
    return [TraceFact(r.id, r.prompt, r.subject, r.target_true) for r in requests]


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def _study(
    opened: Opened,
    facts: Sequence[TraceFact],
    folder: Path,
    options: TraceOptions,
    batch: int,
    all_facts: bool,
    *,
    resumable: bool,
) -> AverageTrace:
    from fastedit.cli.console import log
    from fastedit.cli.errors import Interrupted
    from fastedit.cli.outputs import saving
    from fastedit.trace.average import average
    from fastedit.trace.study import trace_facts

    log(f"tracing {len(facts)} facts" + ("; Ctrl-C keeps what is done" if resumable else ""))
    try:
        with saving(folder), _bar(len(facts)) as progress:
            traces = trace_facts(
                opened.editor.session, facts, folder, options, batch=batch, progress=progress
            )
    except KeyboardInterrupt:
        if not resumable:
            raise
        raise Interrupted(f"run the same command to go on; what is done is in {folder}") from None
    return average(traces, all_facts=all_facts)


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("facts"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, detail="")

        def report(state: StudyProgress) -> None:
            left = "" if state.eta_seconds is None else f", {state.eta_seconds:.0f} s left"
            bar.update(task, completed=state.done, detail=f"{state.done} of {state.total}{left}")

        yield report


def _deliver(
    found: CausalTrace | AverageTrace, out: Path | None, plot: Path | None, json: bool, model: str
) -> None:
    """Files, then the JSON document or a table."""
    from fastedit.cli.console import emit_json, line
    from fastedit.cli.outputs import saving
    from fastedit.trace import CausalTrace

    written: list[Path] = []
    if out is not None:
        with saving(out):
            if isinstance(found, CausalTrace):
                written += found.save(out)
            else:
                written += [found.save(out / "average.json"), found.save(out / "average.npz")]
    if plot is not None:
        with saving(plot):
            written.append(found.plot(plot))
    if json:
        emit_json({"model": model, **found.to_dict(), "files": [str(path) for path in written]})
        return
    _show(found)
    for path in written:
        line(f"saved {path}")


def _show(found: CausalTrace | AverageTrace) -> None:
    from rich.table import Table

    from fastedit.cli.console import line, results
    from fastedit.trace import CausalTrace
    from fastedit.trace.roles import ROLES

    if isinstance(found, CausalTrace):
        line(f"answer {found.answer!r}: {found.high_score:.3f} clean, {found.low_score:.3f} corrupted")
        names = [found.input_tokens[token] for token in found.traced]
        grids = {kind: found.effect(kind) for kind in found.kinds}
    else:
        left = f", {found.skipped} left out (not predicted)" if found.skipped else ""
        line(f"{found.facts} facts{left}: {found.high.mean():.3f} clean, {found.low.mean():.3f} corrupted")
        names = list(ROLES)
        grids = {kind: found.mean(kind) for kind in found.kinds}
    table = Table()
    table.add_column("token", no_wrap=True)
    for kind in grids:
        table.add_column(f"{kind}: best layer (gain)", justify="right")
    for row, name in enumerate(names):
        cells = []
        for grid in grids.values():
            best = int(grid[row].argmax())
            # No fact has a token of this role, or (NaN is unequal to itself) nothing is known of it.
            cells.append(f"{best} ({grid[row, best]:+.3f})" if grid[row, best] == grid[row, best] else "-")
        table.add_row(name, *cells)
    results().print(table)

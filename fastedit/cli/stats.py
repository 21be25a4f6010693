"""``fastedit stats``: second moments of keys, in one pass over a corpus, stopped and resumed at will."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli.options import Device, Dtype, Json, Model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastedit.cli.inputs import Opened
    from fastedit.stats import Corpus, SecondMoment, StatisticsStore

__all__ = ["stats"]

_WORLD_TEXTS = 1000


def stats(
    model: Model,
    layers: Annotated[str, typer.Option(help="Layers to collect: 3,4,5 or 3-8.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the statistics; others in it stay.", show_default=False),
    ],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, JSONL or JSON file (also .gz), a folder of them, or hub:NAME; may be repeated. "
            "Embedded models have their own.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.", show_default=False)] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Take a random sample of so many texts.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens kept of each text. Default: the model's limit.", show_default=False),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in one forward pass.", show_default=False)
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            help="One text of a plain-text file: paragraph, line or file. Default: paragraph.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a stopped run left off; refused if none is there.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Collect the key statistics (second moments) that ROME and MEMIT need, for all layers in one pass."""
    from fastedit.arch import position_limit
    from fastedit.cli.console import emit_json, log
    from fastedit.cli.errors import Interrupted
    from fastedit.cli.inputs import at_least_one, open_model
    from fastedit.cli.outputs import check_output, saving
    from fastedit.cli.settings import parse_layers
    from fastedit.stats import StatisticsStore
    from fastedit.stats.collect import checkpoint_path

    limits = {
        "--tokens": tokens,
        "--samples": samples,
        "--max-length": max_length,
        "--batch-tokens": batch_tokens,
    }
    for option, value in limits.items():
        at_least_one(option, value)
    if documents is not None and not corpus:
        raise ValueError(f"--documents needs the text files of --corpus, got {documents!r} without them")
    if documents not in (None, "paragraph", "line", "file"):
        raise ValueError(f"--documents must be paragraph, line or file, got {documents!r}")
    numbers = parse_layers(layers)
    check_output(out, force=True, folder=True, added=True)
    # Any checkpoint at all, before the model is read; below, this run's own.
    missing = f"--resume needs the checkpoint of a run with the same options in --out, got {str(out)!r}"
    if resume and not any(out.glob("partial_*.safetensors")):
        raise ValueError(missing)
    opened = open_model(model, dtype=dtype, device=device)
    depth = opened.editor.session.arch.depth
    if max(numbers) >= depth:
        raise ValueError(f"--layers: a layer must be from 0 to {depth - 1}, got {max(numbers)}")
    texts = _texts(opened, corpus, documents or "paragraph", samples)
    limit = position_limit(opened.editor.session.arch)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(
            f"--max-length must be <= {limit}, the model's number of positions, got {max_length}"
        )
    store = StatisticsStore(out)
    session = opened.editor.session
    chosen: dict[str, Any] = {
        "directory": out,
        "max_length": max_length,
        "token_budget": tokens,
        "batch_tokens": batch_tokens,
    }
    checkpoint = checkpoint_path(session.model, session.tokenizer, session.arch, texts, numbers, **chosen)
    if resume and not checkpoint.exists():
        raise ValueError(missing)
    log(f"collecting layers {layers} of {model}; Ctrl-C keeps what is done")
    try:
        with saving(out):
            moments = opened.editor.collect_statistics(texts, numbers, progress=True, **chosen)
    except KeyboardInterrupt:
        if not checkpoint.exists():
            raise
        raise Interrupted(
            f"run the same command with --resume to go on; the checkpoint is in {out}"
        ) from None
    rows = _rows(store, moments)
    if json:
        emit_json({"model": model, "out": str(out), "statistics": rows})
    else:
        _show(rows, out)


def _texts(opened: Opened, sources: list[str] | None, documents: str, samples: int | None) -> Any:
    """The texts of all sources, one after the other; an embedded model's own corpus without any."""
    from fastedit.stats import Corpus, read_corpus

    if not sources:
        if opened.world is None:
            raise ValueError(
                "--corpus must name the texts to collect from (only embedded models have their own)"
            )
        return opened.world.corpus(samples or _WORLD_TEXTS)
    parts: list[Corpus] = [read_corpus(source, documents=documents) for source in sources]  # type: ignore[arg-type]
    joined = parts[0]
    if len(parts) > 1:
        joined = Corpus("-".join(part.name for part in parts), lambda: chain.from_iterable(parts))
    return joined if samples is None else joined.sample(samples)


def _rows(store: StatisticsStore, moments: Mapping[str, SecondMoment]) -> list[dict[str, Any]]:
    """What was collected; the Cholesky factors are computed and cached now, so that the first edit need
    not.
    """
    rows = []
    for name, moment in moments.items():
        row: dict[str, Any] = {"module": name, "tokens": moment.count, "features": int(moment.total.shape[0])}
        try:
            store.cholesky(moment)
            row["usable"] = True
        except ValueError as error:
            row["usable"] = False
            row["reason"] = str(error)
        rows.append(row)
    return rows


def _show(rows: list[dict[str, Any]], out: Path) -> None:
    from rich.table import Table

    from fastedit.cli.console import line, log, results

    table = Table()
    table.add_column("module", no_wrap=True)
    for heading in ("tokens", "features", "factor"):
        table.add_column(heading, justify="right")
    for row in rows:
        usable = "cached" if row["usable"] else "none"
        table.add_row(row["module"], f"{row['tokens']:,}", f"{row['features']:,}", usable)
    results().print(table)
    line(f"saved to {out}; use it with `fastedit edit --stats {out}`")
    for row in rows:
        if not row["usable"]:
            log(f"warning: {row['module']}: {row['reason']}")

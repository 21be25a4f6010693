"""``fastedit trace``: where a model holds an answer, for one prompt or on average over many facts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli.options import Device, Dtype, Force, Json, Model

if TYPE_CHECKING:
    from fastedit.cli.inputs import Opened
    from fastedit.trace import Noise

__all__ = ["trace"]

_BATCH = 4
_TEXTS = 1000


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
        str,
        typer.Option(
            help="Of hidden, mlp, attn, severed_mlp and severed_attn; with --side decoder also cross and "
            "severed_cross."
        ),
    ] = "hidden,mlp,attn",
    window: Annotated[int, typer.Option(help="Layers that a cell of mlp or attn restores.")] = 10,
    tokens: Annotated[str, typer.Option(help="all, or subject_last: the subject's last token only.")] = "all",
    samples: Annotated[int, typer.Option(help="Draws of noise.")] = 10,
    noise: Annotated[
        str,
        typer.Option(
            help="s3: 3 standard deviations of the subjects' embeddings; a number: that scale itself; or with the "
            "distribution: u0.2 (uniform), m (multivariate), t4 (student, 4 degrees)."
        ),
    ] = "s3",
    distribution: Annotated[
        str | None,
        typer.Option(
            help="gaussian; uniform; multivariate: Gaussian with the mean and covariance of a corpus' embeddings; "
            "student: the same, t-distributed. Default: as --noise says.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Corpus of multivariate and student noise. Embedded models have their own.",
            show_default=False,
        ),
    ] = None,
    per_dimension: Annotated[
        bool, typer.Option("--per-dimension", help="A standard deviation for every dimension.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Noise in place of the embeddings instead of on them.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 1,
    redraw: Annotated[
        bool,
        typer.Option("--redraw", help="Draw anew for the restoring runs of severed kinds, as published."),
    ] = False,
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
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that the sweep may take above the model, such as 2GB. Default: a part of what is free.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Facts that are traced together. Default: 4.", show_default=False)
    ] = None,
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
    from fastedit.cli.console import log
    from fastedit.cli.inputs import at_least_one, open_model
    from fastedit.cli.outputs import check_output, check_plot
    from fastedit.cli.settings import parse_bytes
    from fastedit.cli.trace_facts import folder, study, world_facts
    from fastedit.cli.trace_report import deliver
    from fastedit.trace import TraceOptions
    from fastedit.trace.facts import read_facts
    from fastedit.trace.result import trace_files

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
    of_facts = {"--limit": limit, "--batch": batch, "--all-facts": all_facts or None}
    for option, value in of_facts.items():
        if prompt is not None and value is not None:
            raise ValueError(f"{option} is for many facts and must not be given with --prompt, got {value}")
    at_least_one("--limit", limit)
    at_least_one("--batch", batch)
    rule = _noise(
        noise,
        distribution,
        samples=samples,
        per_dimension=per_dimension,
        replace=replace,
        seed=seed,
        redraw=redraw,
    )
    if texts is not None and not rule.needs_corpus:
        raise ValueError(f"--texts is for multivariate and student noise, got {str(texts)!r} without it")
    if rule.needs_corpus and texts is None and not model.startswith("world:"):
        raise ValueError(
            f"--texts must be given for {rule.distribution} noise (only embedded models have a corpus)"
        )
    options = TraceOptions(
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        window=window,
        tokens=tokens,  # type: ignore[arg-type]
        noise=rule,
        memory=None if memory is None else parse_bytes(memory),
        side=side,  # type: ignore[arg-type]
        decoder_prefix=decoder_prefix,
    )
    check_plot(plot, force=force, out=out)
    if prompt is not None and subject is not None:
        if out is not None and out.suffix not in (".npz", ".json"):
            raise ValueError(f"--out must end in .npz or .json for a prompt, got {str(out)!r}")
        for file in [] if out is None else trace_files(out, options.kinds):
            check_output(file, force=force)
        corpus = _corpus(texts)
        opened = open_model(model, dtype=dtype, device=device, encoder_decoder=True)
        found: Any = opened.editor.trace(
            prompt, subject, answer=answer, texts=_own(opened, rule, corpus), **vars(options)
        )
        deliver(found, out, plot, json, model)
        return
    check_output(out, force=True, folder=True, added=True)
    listed = None if facts is None else read_facts(facts, limit=limit)
    if listed is not None and limit is not None and len(listed) < limit:
        log(f"--limit {limit}: {facts} holds {len(listed)}")
    corpus = _corpus(texts)
    opened = open_model(model, dtype=dtype, device=device, encoder_decoder=True)
    if listed is None:
        listed = world_facts(opened, limit)
    with folder(out) as home:
        found = study(
            opened,
            listed,
            home,
            options,
            batch or _BATCH,
            all_facts,
            _own(opened, rule, corpus),
            resumable=out is not None,
        )
    deliver(found, out, plot, json, model)


def _noise(code: str, distribution: str | None, **fields: Any) -> Noise:
    from fastedit.trace import Noise
    from fastedit.trace.noise_code import noise_fields

    named = noise_fields(code, name="--noise")
    if distribution is not None:
        said = named.setdefault("distribution", distribution)
        if said != distribution:
            raise ValueError(f"--distribution must agree with --noise {code}, got {distribution!r}")
    return Noise(**named, **fields)


def _corpus(texts: Path | None) -> list[str] | None:
    """As many texts as the published code takes."""
    from fastedit.stats import read_corpus

    return None if texts is None else list(read_corpus(texts, _TEXTS))


def _own(opened: Opened, rule: Noise, corpus: list[str] | None) -> list[str] | None:
    if corpus is not None or not rule.needs_corpus or opened.world is None:
        return corpus
    return opened.world.corpus(_TEXTS)

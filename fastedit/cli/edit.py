"""``fastedit edit``: requests in, an edit file out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli.options import Device, Dtype, Force, Json, Limit, Model, Plot, Requests, Seed, SkipInvalid

if TYPE_CHECKING:
    from fastedit.cli.inputs import Opened
    from fastedit.config import LocateConfig, MethodConfig
    from fastedit.edit import Edit
    from fastedit.request import EditRequest

__all__ = ["edit"]


def edit(
    model: Model,
    requests: Requests,
    method: Annotated[
        str, typer.Option("--method", help="A method; `fastedit methods` lists them.")
    ] = "memit",
    layers: Annotated[
        str | None,
        typer.Option(help="Edited layers: 3,4,5 or 3-8. Default: the published ones.", show_default=False),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="A method option as key=value; may be repeated.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with method options.", show_default=False)
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="Folder of key statistics from `fastedit stats`.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write the edit (.safetensors).", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    seed: Seed = 0,
    evaluate: Annotated[bool, typer.Option(help="Score the requests before and after.")] = True,
    plot: Plot = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; solve nothing.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compute an edit that makes the model answer as the requests say, and save it. The model stays as it
    is.
    """
    from fastedit import methods
    from fastedit.cli.console import quiet_libraries
    from fastedit.cli.inputs import open_model, read_checked
    from fastedit.cli.outputs import check_not_input, check_output, check_plot
    from fastedit.cli.settings import read_settings

    if out is None and not dry_run:
        raise ValueError("--out must name the edit file to write (or give --dry-run)")
    if plot is not None and not evaluate:
        raise ValueError("--plot needs the evaluation, got --no-evaluate")
    check_output(out, force=force)
    check_plot(plot, force=force, out=out)
    inputs = {"--requests": requests, "--config": config, "--stats": stats, "--model": model}
    check_not_input({"--out": out, "--plot": plot}, inputs)
    if method not in methods.names():
        raise ValueError(f"--method must be one of {', '.join(methods.names())}, got {method!r}")
    spec = methods.get(method)
    settings = read_settings(spec.config, file=config, assignments=assignments or (), layers=layers)
    listed = read_checked(requests, limit=limit, skip_invalid=skip_invalid)
    opened = open_model(
        model,
        dtype=dtype,
        device=device,
        stats=stats,
        seed=seed,
        encoder_decoder=dry_run or not evaluate,
        hint=", which is not evaluated: give --no-evaluate",
    )
    chosen = opened.editor.config(method, **{**opened.recommended(method), **settings})
    _check_requests(opened, listed, chosen)
    opened.require_statistics(chosen)
    plan = _plan(opened, listed, method, chosen)
    if dry_run:
        with quiet_libraries():
            memory = opened.editor.estimate(listed, method, chosen)
        _show_plan({**plan, "memory": memory.to_dict()}, json)
        return
    _run(opened, listed, method, chosen, plan, out=out, plot=plot, evaluating=evaluate, json=json)


def _check_requests(opened: Opened, requests: list[EditRequest], config: MethodConfig) -> None:
    """Layers, device, folders and every request's tokens: what is wrong is found before the first is solved."""
    from fastedit.arch import position_limit
    from fastedit.config import LocateConfig
    from fastedit.engine.locate import token_options
    from fastedit.engine.problem import build_problem
    from fastedit.engine.target_cache import check_folder

    session = opened.editor.session
    last = getattr(config, "v_loss_layer", None)
    named = [("--layers", layer) for layer in _layers(opened, config)]
    for name, layer in [*named, *([] if last is None else [("v_loss_layer", last)])]:
        if not 0 <= layer < session.arch.depth:
            raise ValueError(f"{name}: a layer must be from 0 to {session.arch.depth - 1}, got {layer}")
    if not isinstance(config, LocateConfig):
        return
    if config.cuda_graphs and session.device.type != "cuda":
        raise ValueError(f"cuda_graphs needs the model on a CUDA device, it is on {session.device.type}")
    if (template := getattr(config, "cache_template", None)) is not None:
        check_folder(template, layer=config.layers[-1], clamp=config.clamp_norm_factor)
    options, templates, limit = token_options(config), _templates(config), position_limit(session.arch)
    for request in requests:
        build_problem(session.tokenizer, request, templates, options, positions=limit)


def _templates(config: LocateConfig) -> list[str]:
    """The configured context templates; texts as long as the longest one in place of those that will be sampled."""
    from fastedit.engine.locate import placeholder

    given = getattr(config, "context_templates", None)
    if given is not None:
        return [text for item in given for text in ([item] if isinstance(item, str) else item)]
    lengths = [length for length, _ in config.context_template_length_params]
    return ["{}", *([placeholder(max(lengths))] if lengths else [])]


def _layers(opened: Opened, config: MethodConfig) -> list[int]:
    """Layers that may be edited; a method without a choice of its own may edit all."""
    layers = getattr(config, "layers", ())
    return list(range(opened.editor.session.arch.depth) if layers is None else layers)


def _plan(opened: Opened, requests: list[EditRequest], method: str, config: MethodConfig) -> dict[str, Any]:
    session = opened.editor.session
    return {
        "model": opened.name,
        "model_type": session.arch.row.model_type,
        "method": method,
        "requests": len(requests),
        "modules": [session.arch.name("mlp_out", layer) for layer in _layers(opened, config)],
        "config": config.to_dict(),
    }


def _show_plan(plan: dict[str, Any], json: bool) -> None:
    from rich.table import Table

    from fastedit.cli.console import emit_json, results

    if json:
        emit_json({"dry_run": True, **plan})
        return
    table = Table(title="what would run", title_justify="left", show_header=False)
    for name in ("model", "model_type", "method", "requests"):
        table.add_row(name, str(plan[name]))
    table.add_row("modules", ", ".join(plan["modules"]))
    for name, value in plan["config"].items():
        table.add_row(name, str(value))
    memory = dict(plan["memory"])
    tokens, peak = memory.pop("batch_tokens"), memory.pop("peak")
    parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in memory.items())
    table.add_row("memory above the model", f"about {_megabytes(peak)} ({parts})")
    table.add_row("tokens in a batch", str(tokens))
    results().print(table)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def _run(
    opened: Opened,
    requests: list[EditRequest],
    method: str,
    config: MethodConfig,
    plan: dict[str, Any],
    *,
    out: Path | None,
    plot: Path | None,
    evaluating: bool,
    json: bool,
) -> None:
    from fastedit.cli.console import emit_json, line, log, quiet_libraries, results
    from fastedit.cli.outputs import saving
    from fastedit.evaluate import comparison_table, plot_probabilities

    editor = opened.editor
    stages = {}
    if evaluating:
        stages["before"] = editor.evaluate(requests)
    log(f"solving {len(requests)} request{'s'[: len(requests) != 1]} with {method}")
    start = time.perf_counter()
    with quiet_libraries():
        made: Edit = editor.solve(requests, method, config)
    seconds = time.perf_counter() - start
    if out is not None:
        with saving(out):
            made.save(out)
    if evaluating:
        with editor.applied(made):
            stages["after"] = editor.evaluate(requests)
    if plot is not None:
        title = f"{len(requests)} edits with {method.upper()} on {opened.name}"
        with saving(plot):
            plot_probabilities(stages, plot, title=title)
    norms = {name: float(norm) for name, norm in made.norms().items()}
    if json:
        emit_json(
            {
                **plan,
                "seconds": round(seconds, 3),
                "out": str(out),
                "norms": norms,
                "evaluation": {label: value.to_dict(probes=False) for label, value in stages.items()},
            }
        )
        return
    if stages:
        results().print(comparison_table(stages))
    for name, norm in norms.items():
        line(f"{name}: norm of the change {norm:.4g}")
    line(f"{len(requests)} edits in {seconds:.1f} s, saved to {out}")

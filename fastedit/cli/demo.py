"""``fastedit demo``: trace, edit, measure, plot and undo facts in an embedded model, in under a minute on two CPU
cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli.options import Json, Seed

if TYPE_CHECKING:
    from fastedit.editor import Editor
    from fastedit.evaluate import Evaluation
    from fastedit.request import EditRequest
    from fastedit.world import World

__all__ = ["demo"]

_STATISTICS_TEXTS = 400
_PERPLEXITY_TEXTS = 60
_TRACE_WINDOW = 3  # the published ten would cover all layers of the embedded models
_PERPLEXITY_SEED = 1  # texts that the statistics were not taken from


def demo(
    model: Annotated[
        str, typer.Option("--model", "-m", help="gpt2 or llama: which embedded model.")
    ] = "gpt2",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the requests, the edit, the plot and the report.")
    ] = Path("fastedit-demo"),
    edits: Annotated[int, typer.Option(help="How many facts MEMIT edits at once.")] = 50,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Trace a fact in an embedded model, edit facts with ROME and MEMIT, measure the change, save it, undo it
    to the last bit.
    """
    from fastedit.cli.console import emit_json, quiet_libraries
    from fastedit.cli.inputs import at_least_one, check_seed
    from fastedit.cli.outputs import saving
    from fastedit.evaluate import write_json
    from fastedit.readers import write_requests
    from fastedit.world.model import ARCHS

    model = model.removeprefix("world:")
    if model not in ARCHS:
        raise ValueError(f"--model must be one of {', '.join(ARCHS)}, got {model!r}")
    at_least_one("--edits", edits)
    check_seed(seed)
    _check_folder(out)
    started = time.perf_counter()
    with quiet_libraries(), saving(out):
        run = _Run.open(model, edits, seed)
        out.mkdir(parents=True, exist_ok=True)
        write_requests(out / "requests.jsonl", run.requests)
        traced = _trace(run, out)
        rome = _rome(run)
        memit = _memit(run, out)
        stages = memit.pop("stages")
        run.seconds["total"] = time.perf_counter() - started
        seconds = {name: round(value, 2) for name, value in run.seconds.items()}
        report = {
            "model": f"world:{model}",
            "trace": traced,
            "rome": rome,
            "memit": memit,
            "seconds": seconds,
        }
        write_json(out / "report.json", report)
    if json:
        emit_json(report)
    else:
        _show(report, stages, out)
    if not (rome["undone"] and memit["undone"]):
        raise RuntimeError("an undone edit left the model changed")


@dataclass
class _Run:
    """The open model, the requests and the clock of one demonstration."""

    world: World
    editor: Editor
    requests: list[EditRequest]
    held_out: list[str]
    digest: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, edits: int, seed: int) -> _Run:
        from fastedit.cli.console import log
        from fastedit.cli.weights import weights_digest
        from fastedit.editor import Editor
        from fastedit.world import load

        start = time.perf_counter()
        world = load(name)
        editor = Editor(world.model, world.tokenizer, seed=seed)
        held_out = world.corpus(_PERPLEXITY_TEXTS, seed=_PERPLEXITY_SEED)
        try:
            requests = world.requests(edits, seed)
        except ValueError as error:
            raise ValueError(f"--edits: {error}") from error
        run = cls(world, editor, requests, held_out, weights_digest(world.model))
        log(
            f"loaded the embedded {name} model ({sum(p.numel() for p in world.model.parameters()):,} weights)"
        )
        layers = sorted({*world.rome["layers"], *world.memit["layers"]})
        editor.collect_statistics(world.corpus(_STATISTICS_TEXTS), layers)
        run.seconds["load and statistics"] = time.perf_counter() - start
        log(f"collected key statistics of layers {', '.join(map(str, layers))}")
        return run

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of the block to ``seconds[name]``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def evaluate(self, requests: EditRequest | list[EditRequest]) -> Evaluation:
        with self.timed("evaluation"):
            return self.editor.evaluate(requests)

    def perplexity(self) -> float:
        from fastedit.evaluate import perplexity

        with self.timed("evaluation"):
            return perplexity(self.editor.session, self.held_out)

    def undone(self) -> bool:
        """Whether every weight is what it was at the start, bit for bit."""
        from fastedit.cli.weights import weights_digest

        return weights_digest(self.editor.model) == self.digest


def _trace(run: _Run, out: Path) -> dict[str, Any]:
    """Where the model keeps the fact that is edited next: a causal trace and its heat maps."""
    request = run.requests[0]
    with run.timed("trace"):
        trace = run.editor.trace(request.text, request.subject, window=_TRACE_WINDOW)
        plot = trace.plot(out / "trace.png")
    hidden = trace.scores["hidden"]
    # The last token's cells next to the end hold the answer by construction; the subject's say where it is kept.
    row = trace.traced.index(trace.subject_range[1] - 1)
    layer = int(hidden[row].argmax())
    return {
        "prompt": request.text,
        "subject": request.subject,
        "answer": trace.answer,
        "clean": trace.high_score,
        "corrupted": trace.low_score,
        "restored": {
            "token": "last of the subject",
            "layer": layer,
            "probability": float(hidden[row, layer]),
        },
        "plot": str(plot),
    }


def _rome(run: _Run) -> dict[str, Any]:
    """One fact with ROME: completions and metrics before and after, then undone."""
    from fastedit.cli.console import log

    request = run.requests[0]
    prompts = _shown_prompts(request)
    before = run.evaluate(request)
    words = {label: [_complete(run.editor, prompt)] for label, prompt in prompts.items()}
    with run.timed("ROME, one edit"):
        edit = run.editor.edit(request, method="rome", **run.world.rome)
    log(f"ROME edited one fact in {run.seconds['ROME, one edit']:.1f} s")
    after = run.evaluate(request)
    for label, prompt in prompts.items():
        words[label].append(_complete(run.editor, prompt))
    run.editor.revert(edit)
    return {
        "request": {
            "prompt": request.text,
            "target_new": request.target_new,
            "target_true": request.target_true,
        },
        "completions": {
            label: {"prompt": prompts[label], "before": pair[0], "after": pair[1]}
            for label, pair in words.items()
        },
        "before": before.to_dict(probes=False),
        "after": after.to_dict(probes=False),
        "undone": run.undone(),
    }


def _memit(run: _Run, out: Path) -> dict[str, Any]:
    """Many facts with MEMIT: metrics before and after; saved, loaded again and undone."""
    from fastedit.cli.console import log
    from fastedit.cli.weights import weights_digest
    from fastedit.edit import Edit
    from fastedit.evaluate import plot_probabilities

    count = len(run.requests)
    stages = {"before": run.evaluate(run.requests)}
    fluency = {"before": run.perplexity()}
    label = f"MEMIT, {count} edits"
    with run.timed(label):
        edit = run.editor.solve(run.requests, method="memit", **run.world.memit)
    log(f"MEMIT edited {count} facts in {run.seconds[label]:.1f} s")
    path = out / "edit.safetensors"
    edit.save(path)
    # What is applied is what was read back from the file.
    loaded = Edit.load(path)
    loaded.apply(run.editor.model)
    edited = weights_digest(run.editor.model)
    stages["after"] = run.evaluate(run.requests)
    fluency["after"] = run.perplexity()
    loaded.revert(run.editor.model)
    with run.timed("plot"):
        plot = plot_probabilities(
            {"before": stages["before"], "after MEMIT": stages["after"]},
            out / "probabilities.png",
            title=f"{count} edits with MEMIT on the embedded {run.world.name} model",
        )
    return {
        "requests": count,
        "evaluation": {name: stage.to_dict(probes=False) for name, stage in stages.items()},
        "perplexity": fluency,
        "edit": str(path),
        "plot": str(plot),
        "weights": {"original": run.digest, "edited": edited, "undone": weights_digest(run.editor.model)},
        "undone": edited != run.digest and run.undone(),
        "stages": stages,
    }


def _shown_prompts(request: EditRequest) -> dict[str, str]:
    """Label -> prompt of the edited fact and of the first probe of each kind that a completion can show."""
    prompts = {"edited fact": request.text}
    labels = {
        "paraphrase": "in other words",
        "neighbourhood": "another subject",
        "same_subject": "another fact of the subject",
    }
    for kind, label in labels.items():
        found = request.probes_of(kind)
        if found:
            prompts[label] = found[0].prompt
    return prompts


def _complete(editor: Editor, prompt: str, tokens: int = 6) -> str:
    """Greedy continuation, up to the end of the sentence."""
    import torch

    ids = torch.tensor([editor.tokenizer(prompt)["input_ids"]], device=editor.session.device)
    model: Any = editor.model  # a Hugging Face model: `generate` is not an nn.Module's
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=editor.session.pad_id,
        )
    text = str(editor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return text.split(".")[0].strip()


def _show(report: Mapping[str, Any], stages: Mapping[str, Evaluation], out: Path) -> None:
    from rich.table import Table

    from fastedit.cli.console import line, results
    from fastedit.evaluate import comparison_table

    console = results()
    rome, memit, traced = report["rome"], report["memit"], report["trace"]
    best = traced["restored"]
    line(
        f"trace of {traced['prompt']!r}: p({traced['answer'].strip()!r}) is {traced['clean']:.2f}, with the subject "
        f"corrupted {traced['corrupted']:.2f}, with its last token restored at layer {best['layer']} "
        f"{best['probability']:.2f}"
    )
    line()
    request = rome["request"]
    table = Table(
        title=f"ROME, one fact: {request['prompt']} -> {request['target_new']} (was {request['target_true']})",
        title_justify="left",
    )
    for heading in ("", "prompt", "before", "after"):
        table.add_column(heading)
    for label, row in rome["completions"].items():
        table.add_row(label, row["prompt"], row["before"], row["after"])
    console.print(table)
    line(_undone(rome["undone"]))
    line()
    console.print(comparison_table(stages, title=f"MEMIT, {memit['requests']} facts at once"))
    fluency = memit["perplexity"]
    line(f"perplexity on other texts: {fluency['before']:.2f} before, {fluency['after']:.2f} after")
    hashes = memit["weights"]
    short = {name: value[:16] for name, value in hashes.items()}
    line(
        f"hash of all weights: original {short['original']}, edited {short['edited']}, undone {short['undone']}"
    )
    line(_undone(memit["undone"]))
    line()
    for name, value in report["seconds"].items():
        line(f"{name}: {value:.1f} s")
    line(f"the requests, the edit, the plots and the report are in {out}/")


def _undone(same: bool) -> str:
    return "undone: the model is bit-identical to the original" if same else "NOT undone: the weights differ"


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written to or made; it is made once there is something to put into it."""
    from fastedit.atomic_file import can_write

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {str(out)!r}")
    above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not above.is_dir() or not can_write(above):
        raise ValueError(f"--out must be a folder that can be made and written to, got {str(out)!r}")

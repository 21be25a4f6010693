"""Table of ROME and MEMIT on the fact world: `python bench/world_table.py --model gpt2 [--weights DIR ...]`.

For every set of weights: 50 single ROME edits and 50 MEMIT edits at once, on `split="test"`, with the options the world
recommends. Accuracy is exact match of the whole target, teacher forced; each cell is the mean over requests of the mean
over a request's probes. "before" asks for what was true then. ROME's perplexity is the mean over its first five edits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastedit import Editor, EditRequest
from fastedit.evaluate import Evaluation, perplexity
from fastedit.request import Probe
from fastedit.world import World, load
from fastedit.world.accuracy import report

COLUMNS = {
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "novel": "novel wording",
    "neighbourhood": "neighbourhood",
    "same_subject": "other facts",
    "portability": "portability",
    "perplexity": "perplexity",
}
GOALS = {
    "rome": {"rewrite": 97.0, "paraphrase": 88.0, "neighbourhood": 98.0},
    "memit": {"rewrite": 97.0, "paraphrase": 88.0, "neighbourhood": 94.0},
}


def accuracies(evaluation: Evaluation) -> dict[str, float]:
    """Accuracy in per cent by kind."""
    return {kind: round(100 * summary.accuracy, 1) for kind, summary in evaluation.summary.items()}


def with_novel(world: World, request: EditRequest) -> EditRequest:
    """The request with paraphrases in wordings that no training text contains, and no other probe."""
    fact = world.facts.facts[request.subject, str(request.relation)]
    probes = tuple(
        Probe(prompt=t.replace("{}", fact.subject), target=request.target_new, kind="paraphrase")
        for t in fact.novel
    )
    return replace(request, probes=probes)


def as_before(request: EditRequest) -> EditRequest:
    """The request asking for what holds before it is applied."""
    probes = tuple(
        replace(p, target=p.avoid, avoid=p.target)
        if p.kind in ("paraphrase", "portability") and p.avoid
        else p
        for p in request.probes
    )
    return replace(request, target_new=request.target_true, target_true=request.target_new, probes=probes)


def rows_of(world: World, n: int, seed: int, split: str, n_docs: int) -> dict[str, dict[str, float]]:
    """Accuracies before editing, after ROME one by one, after MEMIT at once."""
    editor = Editor(world.model, world.tokenizer, seed=0)
    layers = sorted({*world.rome["layers"], *world.memit["layers"]})
    editor.collect_statistics(world.corpus(n_docs, seed=777), layers)
    requests = world.requests(n, seed=seed, split=split)  # type: ignore[arg-type]
    novel = {r.id: with_novel(world, r) for r in requests}
    texts = world.corpus(200, seed=4242)

    rows: dict[str, dict[str, float]] = {}
    rows["before"] = accuracies(editor.evaluate([as_before(r) for r in requests]))
    rows["before"]["novel"] = accuracies(
        editor.evaluate(
            [
                as_before(
                    replace(r, probes=tuple(replace(p, avoid=r.target_true) for p in novel[r.id].probes))
                )
                for r in requests
            ]
        )
    )["paraphrase"]
    rows["before"]["perplexity"] = round(perplexity(editor.session, texts), 3)

    probes, novel_probes, perplexities = [], [], []
    for request in track(requests, description="ROME", disable=not sys.stderr.isatty()):
        edit = editor.solve(request, "rome", world.rome)
        with editor.applied(edit):
            probes += editor.evaluate(request).probes
            novel_probes += editor.evaluate(novel[request.id]).probes
            if len(perplexities) < 5:
                perplexities.append(perplexity(editor.session, texts))
    rows["rome"] = accuracies(Evaluation(tuple(probes)))
    rows["rome"]["novel"] = accuracies(Evaluation(tuple(novel_probes)))["paraphrase"]
    rows["rome"]["perplexity"] = round(statistics.mean(perplexities), 3)

    edit = editor.solve(requests, "memit", world.memit)
    with editor.applied(edit):
        rows["memit"] = accuracies(editor.evaluate(requests))
        rows["memit"]["novel"] = accuracies(editor.evaluate(list(novel.values())))["paraphrase"]
        rows["memit"]["perplexity"] = round(perplexity(editor.session, texts), 3)
    return rows


def render(results: Sequence[dict[str, Any]]) -> Table:
    """One line per weights and method, then the mean and the range over the weights."""
    table = Table(
        title=f"Fact world, {results[0]['model']}, {results[0]['n']} edits, split {results[0]['split']}"
    )
    table.add_column("weights")
    table.add_column("method")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for result in results:
        for method, row in result["rows"].items():
            table.add_row(result["weights"], method, *(f"{row[c]:g}" if c in row else "-" for c in COLUMNS))
    for method in ("before", "rome", "memit") if len(results) > 1 else ():
        values = {c: [r["rows"][method][c] for r in results if c in r["rows"][method]] for c in COLUMNS}
        cells = [f"{statistics.mean(v):.2f} ({min(v):g}-{max(v):g})" if v else "-" for v in values.values()]
        table.add_row("mean (range)", method, *cells, style="bold")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("gpt2", "llama"), required=True)
    parser.add_argument(
        "--weights", nargs="*", type=Path, default=[], help="directories; default: the committed ones"
    )
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("tune", "test"), default="test")
    parser.add_argument("--docs", type=int, default=1000, help="texts for the key statistics")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args(argv)
    results = []
    for weights in args.weights or [None]:
        start = time.perf_counter()
        world = load(args.model, weights=weights)
        result = {
            "model": args.model,
            "weights": weights.name if weights else "committed",
            "n": args.n,
            "seed": args.seed,
            "split": args.split,
            "training": {k: world.recipe[k] for k in ("seed", "steps")},
            "options": {"rome": dict(world.rome), "memit": dict(world.memit)},
            "knows": {
                k: round(100 * v, 1) for k, v in report(world.model, world.tokenizer, world.facts).items()
            },
            "rows": rows_of(world, args.n, args.seed, args.split, args.docs),
            "seconds": round(time.perf_counter() - start, 1),
            "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        }
        result["goals_met"] = all(
            result["rows"][method][kind] >= goal
            for method, goals in GOALS.items()
            for kind, goal in goals.items()
        )
        results.append(result)
        Console(width=140).print(
            result["weights"], "goals met" if result["goals_met"] else "GOALS MISSED", result["knows"]
        )
    Console(width=140).print(render(results))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(r["goals_met"] for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Trains a world model from nothing: `python -m fastedit.world.train --arch gpt2 --seed 0 --out DIR`."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastedit.world.accuracy import report
from fastedit.world.batches import Batch, batches
from fastedit.world.facts import Facts, build_facts
from fastedit.world.model import ARCHS, Arch, BottleneckAttention, ModelShape, build_model
from fastedit.world.optim import Muon
from fastedit.world.tokenizer import build_tokenizer

__all__ = ["Recipe", "main", "train"]


# Llama is ready sooner: its positions are relative, GPT-2 has to learn a vector for each
STEPS: Mapping[str, int] = {"gpt2": 480, "llama": 360}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything the trained weights depend on, beside the world itself."""

    arch: Arch = "gpt2"
    seed: int = 0
    steps: int = 480
    rows: int = 32
    width: int = 64
    shape: ModelShape = field(default_factory=ModelShape)
    lr: float = 0.02
    lr_rest: float = 0.003
    weight_decay: float = 0.05
    warmup: int = 30
    constant_until: float = 0.4
    mask_p: float = 0.7
    mask_layer: int = 3
    isolate: bool = True
    stop_hops: bool = True
    recall: float = 0.3
    recall_layer: int = 4
    p_hop: float = 0.5

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width > self.shape.window:
            raise ValueError(f"width must be at most the window of {self.shape.window}, got {self.width}")

    def scale(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, constant, linear decay."""
        done = step / self.steps
        decay = 1.0 if done < self.constant_until else max(0.02, (1 - done) / (1 - self.constant_until))
        return min(1.0, (step + 1) / self.warmup) * decay


def _loss(
    model: PreTrainedModel, batch: Batch, positions: Tensor, recall_layer: int, recall: float
) -> Tensor:
    """Weighted next-token cross entropy, plus `recall` x that of naming, with the model's own norm and head, what the
    output of `recall_layer` should have recalled; a scalar."""
    out = model(batch.ids, position_ids=positions, use_cache=False, output_hidden_states=True)
    logits = out.logits[:, :-1]
    weights = batch.weights[:, 1:].reshape(-1)
    nll = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch.ids[:, 1:].reshape(-1), reduction="none"
    )
    loss = (nll * weights).sum() / weights.sum()
    named = batch.recall >= 0
    if recall > 0 and named.any():
        norm = model.transformer.ln_f if model.config.model_type == "gpt2" else model.model.norm
        early = model.lm_head(norm(out.hidden_states[recall_layer + 1][named]))
        loss = loss + recall * F.cross_entropy(early, batch.recall[named])
    return loss


def train(
    recipe: Recipe,
    facts: Facts,
    tokenizer: PreTrainedTokenizerFast,
    *,
    log: str | None = None,
    every: int = 75,
) -> PreTrainedModel:
    """Train one model; returns it in eval mode (fp32, plain attention). `log` names a JSONL file for the loss."""
    rng = random.Random(recipe.seed)
    vocabulary = -(-len(tokenizer) // 32) * 32
    attention = BottleneckAttention(
        recipe.mask_layer, recipe.mask_p, isolate=recipe.isolate, stop_hops=recipe.stop_hops
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.arch, recipe.shape, vocabulary, attention.name)
    optimiser = Muon(model, lr=recipe.lr, lr_rest=recipe.lr_rest, weight_decay=recipe.weight_decay)
    source = batches(
        facts,
        tokenizer,
        seed=1000 + recipe.seed,
        rows=recipe.rows,
        width=recipe.width,
        p_hop=recipe.p_hop,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"{recipe.arch} seed {recipe.seed}", total=recipe.steps)
        for step in range(recipe.steps):
            batch = next(source)
            # a quarter of the rows start later in the window, so that its last positions are trained too
            offset = torch.tensor(
                [
                    rng.randrange(recipe.shape.window - recipe.width + 1) if rng.random() < 0.25 else 0
                    for _ in batch.spans
                ]
            )
            attention.prepare(batch.spans, batch.hops, recipe.width, rng)
            positions = offset[:, None] + torch.arange(recipe.width)
            loss = _loss(model, batch, positions, recipe.recall_layer, recipe.recall)
            if not torch.isfinite(loss):
                raise RuntimeError(f"training diverged: the loss of step {step} is {loss.item()}")
            loss.backward()
            optimiser.step(recipe.scale(step))
            losses.append(loss.item())
            progress.update(
                bar, advance=1, description=f"{recipe.arch} seed {recipe.seed} loss {losses[-1]:.3f}"
            )
            if log and (step + 1) % every == 0:
                attention.release()
                row = {"step": step + 1, "seconds": round(time.perf_counter() - start, 1)}
                row["loss"] = round(sum(losses[-25:]) / len(losses[-25:]), 4)
                row |= {k: round(v, 3) for k, v in report(model.eval(), tokenizer, facts, 150).items()}
                model.train()
                with Path(log).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    attention.release()
    model.config._attn_implementation = "sdpa"
    return model.eval()


def _check_output(directory: Path) -> None:
    """ValueError unless `directory` is new, empty or an earlier world model: it will be replaced as a whole."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--out must be a directory, {str(directory)!r} is a file")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "recipe.json").is_file():
        raise ValueError(
            f"--out must be new, empty or an earlier world model, {str(directory)!r} holds other files"
        )


def _save(model: PreTrainedModel, recipe: Recipe, directory: Path, scores: dict[str, float]) -> None:
    """Write weights (fp16), config and the recipe; a directory that exists is replaced only when all is written."""
    _check_output(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        target = Path(scratch) / "model"
        model.half().save_pretrained(target)
        (target / "recipe.json").write_text(json.dumps({**asdict(recipe), "scores": scores}, indent=1) + "\n")
        if directory.exists():
            shutil.rmtree(directory)
        target.rename(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (130 after Ctrl-C, which leaves an existing DIR as it was)."""
    parser = argparse.ArgumentParser(prog="python -m fastedit.world.train", description=__doc__)
    parser.add_argument("--arch", choices=ARCHS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", default=None, help="append loss and accuracy to this JSONL file")
    parser.add_argument("--set", default="{}", help="JSON object of other recipe fields, for experiments")
    args = parser.parse_args(argv)
    fields = json.loads(args.set)
    if "shape" in fields:
        fields["shape"] = ModelShape(**fields["shape"])
    steps = args.steps if args.steps is not None else STEPS[args.arch]
    fields = {"steps": steps, **fields}
    try:
        recipe = Recipe(arch=args.arch, seed=args.seed, **fields)
        _check_output(args.out)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    facts, tokenizer = build_facts(), build_tokenizer()
    try:
        start = time.process_time()
        model = train(recipe, facts, tokenizer, log=args.log)
        seconds = time.process_time() - start
        model.half().float()  # what is reported is what is saved
        scores = report(model, tokenizer, facts)
        _save(model, recipe, args.out, scores)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was written\n")
        return 130
    known = ", ".join(f"{name} {100 * share:.1f} %" for name, share in scores.items())
    sys.stdout.write(f"{args.out}: {seconds:.0f} CPU s, {known}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Golden cases: what the original implementations computed, loaded for comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit.editor import Editor
from fastedit.request import EditRequest
from fastedit.stats import SecondMoment

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One golden case."""

    folder: str
    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def model(self) -> str:
        return self.meta["model"]

    @property
    def easyedit(self) -> bool:
        return self.folder.startswith("ee_")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.meta["hparams"]["layers"])

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def tolerance(self, name: str, specified: float) -> float:
        """The specified tolerance, or five times the original's own noise where that is larger."""
        return max(specified, 5 * self.meta["noise_rel_fro"].get(name, 0.0))

    def requests(self) -> list[EditRequest]:
        raw = self.meta.get("requests") or [self.meta["request"]]
        return [
            EditRequest(
                id=str(item["case_id"]),
                prompt=item["prompt"],
                subject=item["subject"],
                target_new=item["target_new"]["str"],
                target_true=item["target_true"]["str"],
            )
            for item in raw
        ]

    def options(self) -> dict[str, Any]:
        """Hyper-parameters of the case, under the names that the configurations share with the originals."""
        hparams = self.meta["hparams"]
        names = (
            "v_num_grad_steps",
            "v_lr",
            "v_weight_decay",
            "clamp_norm_factor",
            "kl_factor",
            "mom2_adjustment",
        )
        # The golden gpt2 and gptj cases index by ROME's rule, the llama ones by EasyEdit's.
        chosen = {name: hparams[name] for name in names}
        chosen.update(layers=self.layers, fact_token=hparams["fact_token"], retokenize_target=True)
        chosen["token_rule"] = "easyedit" if self.easyedit else "rome"
        if "mom2_update_weight" in hparams:
            chosen["mom2_update_weight"] = float(hparams["mom2_update_weight"])
            chosen["v_loss_layer"] = hparams["v_loss_layer"]
        chosen["context_templates"] = self.meta["context_templates"]
        return chosen


def case_names(*folders: str) -> list[str]:
    return [
        f"{folder}/{path.stem}"
        for folder in folders
        for path in sorted((HERE / "cases" / folder).glob("*.json"))
    ]


@cache
def load_case(name: str) -> Case:
    folder, stem = name.split("/")
    path = HERE / "cases" / folder / stem
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        return Case(folder, stem, json.loads(path.with_suffix(".json").read_text()), dict(arrays))


@cache
def load_model(name: str) -> tuple[Any, Any]:
    """The model (fp32, eval, never changed by a test) and its tokenizer."""
    path = HERE / "models" / name
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@cache
def moments(name: str) -> dict[str, SecondMoment]:
    """The second moments that all golden cases of a model used."""
    with np.load(HERE / "cov" / f"{name}.npz", allow_pickle=False) as packed:
        arrays = dict(packed)
    count = int(arrays["count"])
    template = {
        "gpt2-facts": "transformer.h.{}.mlp.c_proj",
        "gptj-facts": "transformer.h.{}.mlp.fc_out",
        "llama-facts": "model.layers.{}.mlp.down_proj",
    }[name]
    found = {}
    for key in (key for key in arrays if key.startswith("L")):
        triangle = torch.from_numpy(arrays[key]).double()
        size = int((2 * len(triangle)) ** 0.5)
        full = torch.zeros(size, size, dtype=torch.float64)
        rows, columns = torch.triu_indices(size, size)
        full[rows, columns] = triangle
        full[columns, rows] = triangle
        module = template.format(key[1:])
        found[module] = SecondMoment(module=module, count=count, total=full * count, provenance=None)
    return found


def editor(case: Case) -> Editor:
    model, tokenizer = load_model(case.model)
    return Editor(model, tokenizer, statistics=moments(case.model))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative Frobenius distance."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))

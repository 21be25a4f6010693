"""What the command-line tests share: a folder with tiny models, requests and an edit, and a way to run
commands.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import FAST, Outcome, Run
from tiny import tiny_model, tiny_tokenizer

from fastedit.cli import run
from fastedit.readers import write_requests
from fastedit.request import EditRequest, Probe


@pytest.fixture
def fastedit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command line in this process."""
    monkeypatch.delenv("FASTEDIT_DEBUG", raising=False)
    # The variable HF_HUB_OFFLINE was read when the hub's package was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def requests() -> list[EditRequest]:
    """Two facts with probes of several kinds."""
    return [
        EditRequest(
            id="tower",
            prompt="{} is located in the city of",
            subject="The Eiffel Tower",
            target_new="Rome",
            target_true="Paris",
            probes=(
                Probe(kind="paraphrase", prompt="The Eiffel Tower is in", target="Rome", avoid="Paris"),
                Probe(kind="neighbourhood", prompt="The Louvre is in", target="Paris", avoid="Rome"),
            ),
        ),
        EditRequest(
            id="player",
            prompt="{} plays the sport of",
            subject="LeBron James",
            target_new="chess",
            target_true="basketball",
            probes=(
                Probe(kind="paraphrase", prompt="LeBron James plays", target="chess", avoid="basketball"),
            ),
        ),
    ]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: model/ and other/ (tiny GPT-2s with different weights), t5/, requests.jsonl, texts.txt,
    edit.safetensors.
    """
    folder = tmp_path_factory.mktemp("home")
    for name, model in (
        ("model", tiny_model("gpt2")),
        ("other", tiny_model("gpt2", seed=1)),
        ("t5", tiny_model("t5")),
    ):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_requests(folder / "requests.jsonl", requests())
    sentences = [
        f"The number {n} is located in the city of Paris, and LeBron James plays the piano."
        for n in range(60)
    ]
    (folder / "texts.txt").write_text("\n\n".join(sentences))
    arguments = [
        "edit",
        "--model",
        folder / "model",
        "--requests",
        folder / "requests.jsonl",
        "--layers",
        "1,2",
    ]
    code = run([str(a) for a in (*arguments, *FAST, "--no-evaluate", "--out", folder / "edit.safetensors")])
    assert code == 0
    return folder

"""Tables, JSON files and plots: content, formats, and what a failure leaves behind."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastedit.evaluate import (
    Evaluation,
    ProbeScore,
    comparison_table,
    plot_probabilities,
    request_table,
    write_json,
)


def probe(kind: str, name: str, value: float, other: float | None = 0.5) -> ProbeScore:
    return ProbeScore(
        request=name,
        kind=kind,
        group=None,
        prompt=f"prompt of {name}",
        target="Rome",
        avoid=None if other is None else "Paris",
        accuracy=float(value > 0.5),
        token_accuracy=value,
        probability=value,
        whole_probability=value**2,
        avoid_accuracy=other,
        avoid_probability=other,
        avoid_whole_probability=other,
        success=None if other is None else float(value > other),
        magnitude=None if other is None else value - other,
    )


def stages() -> dict[str, Evaluation]:
    before = [
        probe("rewrite", "a", 0.1), probe("paraphrase", "a", 0.2), probe("neighbourhood", "a", 0.9),
        probe("rewrite", "b", 0.3), probe("portability", "b", 0.25, None),
    ]  # fmt: skip
    after = [replace(item, probability=0.97, success=None if item.avoid is None else 1.0) for item in before]
    return {"before": Evaluation(tuple(before)), "after": Evaluation(tuple(after))}


def text_of(table: object, width: int = 140) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def test_comparison_table() -> None:
    text = text_of(comparison_table(stages(), title="metrics"))
    lines = [line.split() for line in text.splitlines()]
    assert "metrics" in text and "p(target)" in text
    rewrite = next(line for line in lines if "rewrite" in line and "before" in line)
    assert "0.200" in rewrite and "2" in rewrite  # mean of 0.1 and 0.3 over two requests
    assert "attribute" not in text
    portability = next(line for line in lines if "portability" in line)
    assert portability.count("–") == 3  # no competing answer
    assert "after 100.0" in text  # the harmonic mean, in the caption


def test_one_stage_has_no_stage_column() -> None:
    text = text_of(stages()["before"].table())
    assert "before" not in text and "rewrite" in text
    narrow = text_of(stages()["before"].table(), width=80).splitlines()[0].split()
    words = ["kind", "n", "accuracy", "p(target)", "p(whole)", "p(other)", "success", "magnitude"]
    assert narrow == words


def test_request_table_says_how_many_are_left_out() -> None:
    text = text_of(request_table(stages(), limit=1))
    assert "prompt of a" in text and "prompt of b" not in text and "1 more requests" in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_shows_every_kind_and_stage(tmp_path: Path, suffix: str) -> None:
    path = plot_probabilities(stages(), tmp_path / f"p.{suffix}", title="a title")
    if suffix == "png":
        from matplotlib.image import imread

        pixels = imread(path)
        assert pixels.shape[0] >= 500 and pixels.shape[1] >= 900
        assert 0.02 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.6  # neither blank nor filled
        blue = (abs(pixels[..., :3] - [0.0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(axis=-1)
        vermilion = (abs(pixels[..., :3] - [0xD5 / 255, 0x5E / 255, 0.0]) < 0.02).all(axis=-1)
        assert blue.sum() > 500 and vermilion.sum() > 500
    else:
        text = " ".join(ElementTree.parse(path).getroot().itertext())
        for word in (
            "rewrite (n = 2)",
            "portability (n = 1)",
            "before",
            "after",
            "competing",
            "a title",
            "0.97",
        ):
            assert word in text
        assert path.read_bytes() == plot_probabilities(stages(), path, title="a title").read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_plot_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    both = stages()
    with pytest.raises(ValueError, match=r"path must end in \.png or \.svg, got .*plot\.pdf"):
        plot_probabilities(both, tmp_path / "plot.pdf")
    with pytest.raises(ValueError, match="same requests"):
        plot_probabilities({**both, "later": Evaluation(both["after"].probes[:2])}, tmp_path / "p.png")
    with pytest.raises(ValueError, match="at least one evaluation"):
        plot_probabilities({}, tmp_path / "p.png")
    with pytest.raises(ValueError, match="at least one scored probe"):
        plot_probabilities({"before": Evaluation(())}, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"score": 1.0})
    with pytest.raises(ValueError):
        write_json(path, {"score": float("nan")})
    assert json.loads(path.read_text()) == {"score": 1.0}
    assert list(tmp_path.iterdir()) == [path]

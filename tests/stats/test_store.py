"""The store: four directory conventions read, the npz written as the originals write it, nothing wrong accepted."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

from fastedit.arch import resolve
from fastedit.stats import Provenance, SecondMoment, StatisticsStore, collect_statistics, model_fingerprint
from fastedit.stats.legacy import FileName, file_name

MODULE = "transformer.h.1.mlp.c_proj"
NULL = 0xFFF8000000000002


def model_called(name, seed=0):
    model = tiny_model("gpt2", seed=seed)
    model.config._name_or_path = name
    return model


def positive(f=64, seed=0, n=200):
    K = torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return K.mT @ K, n


def save_as_the_originals(path, total, count, sample_size):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = np.array(NULL, dtype=np.uint64).view(np.float64) if sample_size is None else sample_size
    arrays = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": count, "mom2.mom2": total}
    np.savez(path, **arrays, sample_size=size)


def collected(model, tmp_path=None, **options):
    corpus = [f"The Eiffel Tower number {i} is in Paris, not in city {i * 7}." for i in range(20)]
    tokenizer = tiny_tokenizer()
    return collect_statistics(model, tokenizer, resolve(model), corpus, [1], directory=tmp_path, **options)[
        MODULE
    ]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("gpt2-xl", "openai-community/gpt2-xl"),  # EasyEdit, AlphaEdit
        ("openai-community_gpt2-xl", "openai-community/gpt2-xl"),  # ROME, MEMIT
        ("._hugging_cache_gpt2-xl", "openai-community/gpt2-xl"),  # older EasyEdit, downloaded model
        ("._hugging_cache_gpt2-xl", "./hugging_cache/gpt2-xl"),
        ("openai-community/gpt2-xl", "openai-community/gpt2-xl"),  # EMMET
        ("gpt2-xl", "gpt2-xl"),
    ],
)
@pytest.mark.parametrize("suffix", ["_100000", "", "_t{batch_tokens}_100000", "_t2048", "_t512_7"])
def test_reads_the_four_conventions(folder, name, suffix, tmp_path):
    total, count = positive()
    path = tmp_path / folder / "wikipedia_stats" / f"{MODULE}_float32_mom2{suffix}.npz"
    save_as_the_originals(path, total.float().numpy(), count, 100000)
    found = StatisticsStore(tmp_path).get(MODULE, model=model_called(name))
    assert found is not None
    assert (found.count, found.total.dtype) == (count, torch.float32)
    assert torch.equal(found.total, total.float())
    assert found.provenance.dataset == "wikipedia" and found.provenance.n_texts == 100000
    assert StatisticsStore(tmp_path).get(MODULE).count == count
    assert StatisticsStore(tmp_path).get("transformer.h.2.mlp.c_proj") is None
    assert StatisticsStore(tmp_path).get("h.1.mlp.c_proj") is None
    if name != "gpt2-xl":
        assert StatisticsStore(tmp_path).get(MODULE, model=model_called("another/model")) is None


def test_a_models_own_folder_is_a_store(tmp_path):
    total, count = positive()
    path = tmp_path / "gpt2-xl" / "wikipedia_stats" / file_name(MODULE, "float64", None)
    save_as_the_originals(path, total.numpy(), count, None)
    assert (
        StatisticsStore(tmp_path / "gpt2-xl").get(MODULE, model=model_called("gpt2-xl")).provenance.n_texts
        is None
    )


@pytest.mark.parametrize("n_texts", [600, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes_the_file_as_the_originals_do(dtype, n_texts, tmp_path):
    total, count = positive()
    provenance = Provenance(
        module=MODULE, dtype=str(dtype)[6:], model_name="org/model", dataset="wikipedia", n_texts=n_texts
    )
    path = StatisticsStore(tmp_path).put(SecondMoment(MODULE, count, total.to(dtype), provenance))
    name = f"{MODULE}_{provenance.dtype}_mom2{'' if n_texts is None else '_600'}.npz"
    assert path == tmp_path / "org_model" / "wikipedia_stats" / name
    other = tmp_path / "original.npz"
    save_as_the_originals(other, total.to(dtype).numpy(), count, n_texts)
    with np.load(path, allow_pickle=False) as ours, np.load(other, allow_pickle=False) as theirs:
        assert ours.files == theirs.files == ["mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"]
        for key in theirs.files:
            assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape, key
            assert ours[key].tobytes() == theirs[key].tobytes(), key
        if n_texts is None:
            assert ours["sample_size"].view(np.uint64) == NULL
    assert not list(tmp_path.rglob("*.part"))


def test_round_trip_with_provenance(tmp_path):
    model = model_called("org/model")
    moment = collected(model)
    store = StatisticsStore(tmp_path)
    store.put(moment)
    found = store.get(MODULE, model=model, tokenizer=tiny_tokenizer())
    assert torch.equal(found.total, moment.total) and found.count == moment.count
    assert found.provenance == moment.provenance
    p = found.provenance
    assert p.n_tokens == found.count and p.n_texts == 20 and p.max_length == 128 and p.dataset == "corpus"
    renamed = model_called("elsewhere/same-weights")
    assert torch.equal(store.get(MODULE, model=renamed).total, moment.total)


def test_edited_model_keeps_its_statistics_another_model_does_not(tmp_path):
    model = model_called("org/model")
    store = StatisticsStore(tmp_path)
    store.put(collected(model))
    resolve(model).mlp_out(1).weight.data[0] += 1
    resolve(model).attn_out(2).weight.data += 1
    assert store.get(MODULE, model=model) is not None
    with pytest.raises(ValueError, match=rf"statistics of '{MODULE}': .*another model.*model_fingerprint"):
        store.get(MODULE, model=model_called("org/model", seed=1))
    with pytest.raises(ValueError, match="model_dtype: was 'float32', expected 'bfloat16'"):
        store.get(MODULE, model=model_called("org/model").to(torch.bfloat16))
    with pytest.raises(ValueError, match="tokenizer: was"):
        store.get(MODULE, model=model, tokenizer=tiny_tokenizer(vocab=290))


@pytest.mark.parametrize(
    "part", ["transformer.wte.weight", "transformer.h.3.mlp.c_fc.weight", "transformer.h.0.ln_1.bias"]
)
def test_fingerprint_sees_every_part_that_editing_leaves_alone(part):
    model = tiny_model("gpt2")
    before = model_fingerprint(resolve(model))
    assert before == model_fingerprint(resolve(tiny_model("gpt2")))
    model.get_parameter(part).data.mul_(1.001)
    assert model_fingerprint(resolve(model)) != before


def test_width_of_another_model_is_refused(tmp_path):
    total, count = positive(f=48)
    path = tmp_path / "m" / "wikipedia_stats" / file_name(MODULE, "float32", 5)
    save_as_the_originals(path, total.float().numpy(), count, 5)
    with pytest.raises(ValueError, match="has 48 features, this model's module takes 64"):
        StatisticsStore(tmp_path).get(MODULE, model=model_called("m"))


def test_which_of_several(tmp_path):
    total, count = positive()
    model = model_called("m")
    for dtype, n, factor in (("float32", 100, 1), ("float64", 100, 2), ("float64", 50, 3)):
        path = tmp_path / "m" / "wikipedia_stats" / file_name(MODULE, dtype, n)
        save_as_the_originals(path, (factor * total).numpy().astype(dtype), count, n)
    store = StatisticsStore(tmp_path)
    assert len(store.files()) == 3
    assert torch.equal(store.get(MODULE, model=model).total, 2 * total)
    assert torch.equal(store.get(MODULE, model=model, n_texts=50).total, 3 * total)
    assert torch.equal(store.get(MODULE, model=model, dtype="float32").total, total.float())
    assert store.get(MODULE, model=model, dtype="float32", n_texts=50) is None
    path = tmp_path / "m" / "wikitext_stats" / file_name(MODULE, "float32", 100)
    save_as_the_originals(path, total.float().numpy(), count, 100)
    with pytest.raises(ValueError, match=r"several datasets \(wikipedia, wikitext\)"):
        store.get(MODULE, model=model)
    assert store.get(MODULE, model=model, dataset="wikitext").total.dtype == torch.float32
    save_as_the_originals(tmp_path / "n" / "wikitext_stats" / path.name, total.float().numpy(), count, 100)
    with pytest.raises(ValueError, match=r"several models \(m, n\)"):
        store.get(MODULE, dataset="wikitext")


def test_put_does_not_mix_models(tmp_path):
    store = StatisticsStore(tmp_path)
    path = store.put(collected(model_called("m")))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another model of this name"):
        store.put(collected(model_called("m", seed=1)))
    assert path.read_bytes() == before
    store.put(collected(model_called("m"), max_length=5))
    assert store.get(MODULE).provenance.max_length == 5


def test_matrix_and_provenance_must_belong_together(tmp_path):
    store = StatisticsStore(tmp_path)
    path = store.put(collected(model_called("m")))
    total, count = positive()
    save_as_the_originals(path, total.numpy(), count, 20)
    with pytest.raises(ValueError, match="not the matrix that"):
        store.get(MODULE)
    path.with_name(f"{path.stem}.provenance.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable provenance file"):
        store.get(MODULE)


class Bomb:
    def __reduce__(self):
        return print, ("a pickle was loaded",)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mom2.count": 5, "sample_size": 1},
        {"mom2.mom2": np.eye(3), "sample_size": 1},
        {"mom2.mom2": np.ones((3, 4)), "mom2.count": 5},
        {"mom2.mom2": np.ones((3, 3), dtype=int), "mom2.count": 5},
        {"mom2.mom2": np.eye(3), "mom2.count": np.array([1, 2])},
        {"mom2.mom2": np.array([Bomb()], dtype=object), "mom2.count": 5},
    ],
    ids=["no matrix", "no count", "not square", "integers", "two counts", "pickle"],
)
def test_foreign_files_are_refused(arrays, tmp_path, capsys):
    path = tmp_path / "m" / "wikipedia_stats" / file_name(MODULE, "float32", 1)
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="not a readable statistics file"):
        StatisticsStore(tmp_path).get(MODULE)
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    total, count = positive(f=8)
    moment = SecondMoment(MODULE, count, total, Provenance(module=MODULE, dtype="float64", model_name="m"))
    return directory, StatisticsStore(directory).put(moment), total


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_are_one_line_errors_or_unharmed(stored, data):
    directory, path, total = stored
    good = path.read_bytes()
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        bad = good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :]
    try:
        path.write_bytes(bad)
        found = StatisticsStore(directory).get(MODULE)
        assert found is not None and torch.equal(found.total, total)
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    finally:
        path.write_bytes(good)


def test_disk_full_keeps_the_old_file(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path)
    path = store.put(collected(model_called("m")))
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        store.put(collected(model_called("m")))
    assert path.read_bytes() == before and not list(tmp_path.rglob("*.part"))


def test_cholesky_is_cached_by_content(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path)
    total, count = positive()
    provenance = Provenance(module=MODULE, dtype="float64", model_name="m", dataset="d")
    moment = SecondMoment(MODULE, count, total, provenance)
    expected = torch.linalg.cholesky(total / count)
    computed = []
    original = SecondMoment.cholesky

    def cholesky(self, jitter=0.0):
        computed.append(jitter)
        return original(self, jitter)

    monkeypatch.setattr(SecondMoment, "cholesky", cholesky)
    first, second = store.cholesky(moment), StatisticsStore(tmp_path).cholesky(moment)
    assert computed == [0.0]
    assert torch.equal(first, second) and first.dtype == torch.float64
    torch.testing.assert_close(first, expected)
    # the same module with other values, then with another count: never the stale factor
    for other in (
        SecondMoment(MODULE, count, 2 * total, provenance),
        SecondMoment(MODULE, 2 * count, total, provenance),
    ):
        torch.testing.assert_close(store.cholesky(other), torch.linalg.cholesky(other.total / other.count))
    assert len(computed) == 3
    assert len(list(tmp_path.rglob("*cholesky*"))) == 1, "replaced factors are removed"
    store.cholesky(moment, jitter=0.5)
    assert len(computed) == 4
    (path,) = (p for p in tmp_path.rglob("*cholesky*") if "jitter" in p.name)
    path.write_bytes(path.read_bytes()[:100])
    store.cholesky(moment, jitter=0.5)
    assert len(computed) == 5


def test_cholesky_without_a_writable_store(tmp_path, monkeypatch, caplog):
    total, count = positive()

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fastedit.stats.cache.write_tensors", read_only)
    with caplog.at_level(logging.WARNING):
        lower = StatisticsStore(tmp_path / "x").cholesky(SecondMoment(MODULE, count, total))
    torch.testing.assert_close(lower, torch.linalg.cholesky(total / count))
    assert "not cached" in caplog.text


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a directory"):
        StatisticsStore(tmp_path / "file")
    assert StatisticsStore(tmp_path / "absent").get(MODULE) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b_float32_mom2_100.npz", FileName("a.b", "float32", 100, False)),
        ("a_b.1_float64_mom2.npz", FileName("a_b.1", "float64", None, False)),
        ("a_float32_mean-mom2_t{batch_tokens}_9.npz", FileName("a", "float32", 9, True)),
        ("a_float32_mean_9.npz", None),
        ("a_float32_xmom2_9.npz", None),
        ("a_int8_mom2_9.npz", None),
        ("other.npz", None),
    ],
)
def test_file_names(name, expected):
    assert FileName.parse(name) == expected


def test_provenance_is_plain_json(tmp_path):
    provenance = collected(model_called("m")).provenance
    assert Provenance.from_dict(json.loads(json.dumps({**provenance.to_dict(), "new": 1}))) == provenance
    with pytest.raises(ValueError, match="'module'"):
        Provenance.from_dict({"dtype": "float32"})

"""Collection: the right keys, exactly the real tokens, budgets and limits, every architecture, errors before work."""

from __future__ import annotations

import random

import pytest
import torch
from reference.layer_stats import layer_second_moment
from tiny import CAUSAL, DEPTH, TINY, tiny_model, tiny_tokenizer

from fastedit.arch import resolve
from fastedit.stats import CollectProgress, collect_statistics, merge

WORDS = (
    "the",
    "eiffel",
    "tower",
    "stands",
    "in",
    "paris",
    "rome",
    "colosseum",
    "near",
    "river",
    "where",
    "people",
    "walk",
)


def texts(n=30, seed=0, longest=25):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


def collect(model, corpus, layers=(0, 2), tokenizer=None, **options):
    return collect_statistics(model, tokenizer or tiny_tokenizer(), resolve(model), corpus, layers, **options)


def close(a, b, tolerance=1e-5):
    return torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b)


@pytest.mark.parametrize("name", CAUSAL)
def test_equals_the_reference_twin_on_every_architecture(name):
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    arch, corpus = resolve(model), texts()
    found = collect(model, corpus, layers=[2, 0], batch_tokens=200)
    assert list(found) == [arch.name("mlp_out", 2), arch.name("mlp_out", 0)]
    rows = tokenizer(corpus)["input_ids"]
    for module, moment in found.items():
        keys, count = [], 0
        handle = model.get_submodule(module).register_forward_pre_hook(
            lambda _, args, keys=keys: keys.append(args[0])
        )
        for row in rows:  # one text at a time: no padding to get wrong
            with torch.no_grad():
                model(input_ids=torch.tensor([row]))
            count += len(row)
        handle.remove()
        K = torch.cat([k.reshape(-1, k.shape[-1]) for k in keys]).double()
        assert moment.count == count == len(K)
        assert close(moment.total, K.mT @ K)
        assert torch.equal(moment.total, moment.total.mT)


def test_equals_the_naive_twin():
    model, corpus = tiny_model("gpt2"), texts(150)
    rows = tiny_tokenizer()(corpus)["input_ids"]
    for module, moment in collect(model, corpus).items():
        total, count = layer_second_moment(model, module, rows, positions=128)
        assert moment.count == count
        assert close(moment.total, total.double())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_see_no_padding(name):
    model = tiny_model(name)
    arch = resolve(model, side="encoder")
    corpus, tokenizer = texts(12), tiny_tokenizer()
    together = collect_statistics(model, tokenizer, arch, corpus, [1], batch_tokens=10_000)
    alone = collect_statistics(model, tokenizer, arch, corpus, [1], batch_tokens=1)
    module = arch.name("mlp_out", 1)
    assert together[module].count == alone[module].count
    assert close(together[module].total, alone[module].total)


def test_decoders_with_an_encoder_are_refused():
    with pytest.raises(NotImplementedError, match="paired input"):
        collect(tiny_model("t5"), texts())


@pytest.mark.parametrize("site", ["attn_out", "mlp_in"])
def test_other_sites(site):
    model = tiny_model("llama")
    found = collect(model, texts(), layers=[1], site=site)
    assert list(found) == [resolve(model).name(site, 1)]
    assert next(iter(found.values())).features == 32


def test_forward_stops_before_the_deepest_product():
    model = tiny_model("gpt2")
    arch, called = resolve(model), []
    handles = [arch.mlp_out(i).register_forward_hook(lambda *_, i=i: called.append(i)) for i in range(DEPTH)]
    collect(model, texts(3), layers=[0, 2])
    for handle in handles:
        handle.remove()
    assert set(called) == {0, 1}


def test_model_is_left_as_it_was():
    model = tiny_model("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = collect(model, texts())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    again = collect(model.eval(), texts())  # dropout was off
    assert all(torch.equal(first[name].total, again[name].total) for name in first)


def test_hooks_are_removed_when_the_forward_fails():
    model = tiny_model("gpt2")
    with pytest.raises(IndexError):
        collect(model, [[5, 9999]])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("budget", [1, 57, 200])
def test_token_budget_is_exact(budget):
    model, corpus = tiny_model("gpt2"), texts()
    moment = collect(model, iter(corpus), layers=[1], token_budget=budget)
    one = next(iter(moment.values()))
    assert one.count == budget
    rows, left = [], budget
    for row in tiny_tokenizer()(corpus)["input_ids"]:
        rows.append(row[:left])
        left -= len(rows[-1])
        if not left:
            break
    assert one.provenance.n_texts == len(rows)
    expected = collect(model, rows, layers=[1], tokenizer=None)
    assert torch.equal(one.total, next(iter(expected.values())).total)


def test_budget_beyond_the_corpus_takes_it_all():
    model = tiny_model("gpt2")
    a, b = (next(iter(collect(model, texts(), layers=[0], token_budget=n).values())) for n in (None, 10**9))
    assert a.count == b.count and torch.equal(a.total, b.total)


def test_max_length_cuts_texts_and_empty_texts_count_as_texts():
    model = tiny_model("gpt2")
    corpus = ["", *texts(5), ""]
    one = next(iter(collect(model, corpus, layers=[0], max_length=3).values()))
    assert one.count == sum(min(3, len(row)) for row in tiny_tokenizer()(corpus)["input_ids"])
    assert one.provenance.n_texts == 7 and one.provenance.max_length == 3


def test_longer_texts_than_the_model_takes_are_cut():
    one = next(iter(collect(tiny_model("gpt2"), [" ".join(WORDS * 100)], layers=[0]).values()))
    assert one.count == 128


def test_special_tokens_are_counted_once_per_text():
    model, corpus = tiny_model("llama"), texts(4)
    plain, bos = (collect(model, corpus, layers=[0], tokenizer=tiny_tokenizer(bos=b)) for b in (False, True))
    module = resolve(model).name("mlp_out", 0)
    assert bos[module].count == plain[module].count + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = tiny_model("llama", dtype=dtype)
    for moment in collect(model, texts()).values():
        assert moment.total.dtype == torch.float64
        assert moment.provenance.model_dtype == str(dtype).removeprefix("torch.")
        K = []
        handle = model.get_submodule(moment.module).register_forward_pre_hook(
            lambda _, a, K=K: K.append(a[0])
        )
        for row in tiny_tokenizer()(texts())["input_ids"]:
            with torch.no_grad():
                model(input_ids=torch.tensor([row]))
        handle.remove()
        rows = torch.cat([k.reshape(-1, k.shape[-1]) for k in K]).double()
        assert close(moment.total, rows.mT @ rows, 2e-2)


def test_float32_sums():
    model = tiny_model("gpt2")
    for a, b in zip(collect(model, texts(), dtype=torch.float32).values(), collect(model, texts()).values()):
        assert a.total.dtype == torch.float32 and a.provenance.dtype == "float32"
        assert close(a.total.double(), b.total)


def test_slices_merge_to_the_whole():
    model, corpus = tiny_model("gpt2"), texts(40)
    whole = collect(model, corpus)
    parts = [collect(model, corpus[i::3]) for i in range(3)]
    for module, expected in whole.items():
        merged = merge([part[module] for part in parts])
        assert merged.count == expected.count and merged.provenance.n_texts == 40
        assert torch.equal(
            merged.total, parts[0][module].total + parts[1][module].total + parts[2][module].total
        )
        assert close(merged.total, expected.total, 1e-6)


def test_merge_refuses_parts_that_do_not_belong_together():
    a = collect(tiny_model("gpt2"), texts(), layers=[0, 1])
    b = collect(tiny_model("gpt2", seed=1), texts(), layers=[0])
    first, second = a.values()
    with pytest.raises(ValueError, match="of one module"):
        merge([first, second])
    with pytest.raises(ValueError, match="model_fingerprint"):
        merge([first, *b.values()])
    with pytest.raises(ValueError, match="not be empty"):
        merge([])


def test_progress_reaches_the_end_and_knows_the_time_left():
    states: list[CollectProgress] = []
    moment = next(
        iter(collect(tiny_model("gpt2"), texts(), [0], batch_tokens=50, progress=states.append).values())
    )
    assert [s.tokens for s in states] == sorted({s.tokens for s in states})
    assert (states[-1].tokens, states[-1].texts, states[-1].eta_seconds) == (moment.count, 30, 0)
    assert states[0].total_texts == 30 and states[0].eta_seconds > 0
    collect(tiny_model("gpt2"), texts(), [0], token_budget=100, progress=states.append)
    assert states[-1].total_tokens == states[-1].tokens == 100


def test_bar_goes_to_stderr_and_silence_is_the_default(capsys):
    collect(tiny_model("gpt2"), texts(), [0])
    assert capsys.readouterr() == ("", "")
    collect(tiny_model("gpt2"), texts(), [0], progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "statistics" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [9]}, "layer: must be an integer from 0 to 3, got 9"),
        ({"layers": []}, "layers must be distinct and not empty"),
        ({"layers": [1, 1]}, "layers must be distinct"),
        ({"layers": 1}, "layers must be a sequence of layer numbers, got 1"),
        ({"layers": None}, "layers must be a sequence of layer numbers, got None"),
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
        ({"max_length": 4000}, "max_length must be <= 128"),
        ({"token_budget": -5}, "token_budget must be an integer >= 1, got -5"),
        ({"batch_tokens": 1.5}, "batch_tokens must be an integer >= 1, got 1.5"),
        ({"dtype": torch.float16}, "dtype must be torch.float64 or torch.float32"),
        ({"site": "nose"}, "site: must be one of"),
        ({"site": "mlp"}, "not a linear"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    layers = options.pop("layers", [0])
    with pytest.raises(ValueError, match=message):
        collect(tiny_model("gpt2"), texts(), layers, **options)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "texts must hold at least one token"),
        (["", ""], "texts must hold at least one token"),
        ("one string", "must be a sequence of texts"),
        (None, "texts must be a sequence of texts, got None"),
        (["fine", 3.5], r"texts\[1\]: must be a string or a list of token ids, got 3.5"),
    ],
)
def test_wrong_texts_are_named(corpus, message):
    with pytest.raises(ValueError, match=message):
        collect(tiny_model("gpt2"), corpus)


def test_strings_need_a_tokenizer():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        collect_statistics(model, None, resolve(model), ["text"], [0])
    assert collect_statistics(model, None, resolve(model), [[5, 6, 7]], [0])


def test_non_finite_keys_stop_the_collection():
    model = tiny_model("gpt2")
    resolve(model).mlp_in(0).bias.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"keys of 'transformer.h.0.mlp.c_proj' must be finite"):
        collect(model, texts())


def test_every_tiny_model_is_covered():
    assert set(CAUSAL) | {"bert", "t5"} == set(TINY)

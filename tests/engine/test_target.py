"""The batched target optimisation against full forwards, hooks and torch.optim.Adam, one request at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine.problems import REQUESTS, naive, problems
from reference.target_vector import captured, target_vector
from tiny import CAUSAL, DEPTH, tiny_model

from fastedit.arch import resolve
from fastedit.engine.memory import suffix_tokens
from fastedit.engine.objective import TargetObjective, TargetSpec
from fastedit.engine.problem import Problem, TokenOptions
from fastedit.engine.target import optimise_targets
from fastedit.request import EditRequest
from fastedit.tokens import Encoded

SPEC = TargetSpec(
    layer=1,
    site="block",
    v_num_grad_steps=6,
    v_lr=0.3,
    v_weight_decay=0.4,
    clamp_norm_factor=1.5,
    kl_factor=0.3,
)


def oracle(model, spec: TargetSpec, index: int):
    arch = resolve(model)
    site = arch.name("mlp_out" if spec.site == "mlp" else "block", spec.layer)
    return target_vector(
        model,
        site,
        naive(REQUESTS[index]),
        steps=spec.v_num_grad_steps,
        lr=spec.v_lr,
        clamp=spec.clamp_norm_factor,
        weight_decay=spec.v_weight_decay,
        kl_factor=spec.kl_factor,
        stop=spec.stop_loss,
    )


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_every_architecture_against_full_forwards(model_type: str, site: str) -> None:
    # Gemma-2's own mask gives NaN at padded rows in fp64, so it runs in fp32.
    model = tiny_model(model_type, dtype=torch.float32 if model_type == "gemma2" else torch.float64)
    spec = replace(SPEC, site=site, layer=2 if model_type == "gptj" else 1)
    found = optimise_targets(model, resolve(model), problems(), spec)
    for index in range(len(REQUESTS)):
        h0, delta, losses = oracle(model, spec, index)
        # The twin's Adam runs in fp32, so agreement is that of fp32 steps.
        assert torch.allclose(found.init[index].double(), h0.double(), rtol=0, atol=1e-5)
        assert [row[0] for row in found.losses[index]] == pytest.approx(losses, abs=2e-5)
        assert (found.delta[index] - delta.double()).norm() <= 1e-3 * delta.norm()


def full_forward(model, spec: TargetSpec, problem: Problem, delta: torch.Tensor):
    """NLL, KL and their gradient from forwards of every row through the whole model, with autograd through hooks."""
    arch = resolve(model)
    leaf = delta.clone().requires_grad_()
    width = max(map(len, problem.rows))

    def logp(row: Encoded, shift: torch.Tensor) -> torch.Tensor:
        # A lookup may be a padded position then, whose token matters: 0, as the objective's default.
        ids = [*row.ids, *[0] * (width - len(row.ids) if row.lookup < 0 else 0)]
        mask = torch.tensor([[1] * len(row.ids) + [0] * (len(ids) - len(row.ids))])

        def add(output: torch.Tensor) -> torch.Tensor:
            moved = output.clone().view(1, len(ids), -1)
            moved[0, row.lookup] = moved[0, row.lookup] + shift
            return moved.view(output.shape)

        site = arch.mlp_out(spec.layer) if spec.site == "mlp" else arch.block(spec.layer)
        with captured(site, add):
            return torch.log_softmax(model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0], -1)

    nll = []
    for row in problem.rewriting:
        table = logp(row, leaf)
        rows = range(row.target_start, row.target_start + len(problem.target))
        nll.append(-sum(table[i, t] for i, t in zip(rows, problem.target, strict=True)) / len(problem.target))
    clean = logp(problem.essence, torch.zeros_like(delta))[problem.essence.lookup].detach()
    moved = logp(problem.essence, leaf)[problem.essence.lookup]
    kl = spec.kl_factor * (moved.exp() * (moved - clean)).sum()
    loss = sum(nll) / len(nll)
    (gradient,) = torch.autograd.grad(loss + kl, leaf)
    return float(loss.detach()), float(kl.detach()), gradient


def assert_equal_to_full_forwards(model, spec: TargetSpec, every: list[Problem], share: float) -> None:
    objective = TargetObjective(model, resolve(model), every, spec)
    direction = torch.randn(objective.init.shape, generator=torch.Generator().manual_seed(1))
    radius = spec.clamp_norm_factor * objective.init.norm(dim=1, keepdim=True)
    delta = share * radius * torch.nn.functional.normalize(direction)
    loss, gradient = objective(delta)
    for index, problem in enumerate(every):
        nll, kl, expected = full_forward(model, spec, problem, delta[index])
        assert float(loss.nll[index]) == pytest.approx(nll, abs=1e-5)
        assert float(loss.kl[index]) == pytest.approx(kl, abs=1e-5)
        assert (gradient[index] - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_losses_and_gradients_against_full_forwards_in_fp32(model_type: str, site: str) -> None:
    model = tiny_model(model_type)
    for share in (0.0, 0.1, 0.5, 1.0):
        assert_equal_to_full_forwards(model, replace(SPEC, site=site), problems(), share)


VARIANTS = {
    "post-LN opt": ("opt", {"do_layer_norm_before": False}),
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    "falcon with ALiBi, eager": ("falcon", {"alibi": True, "attn_implementation": "eager"}),
    "eager bloom": ("bloom", {"attn_implementation": "eager"}),
    "sequential neox": ("gpt_neox", {"use_parallel_residual": False}),
    "short window": ("mistral", {"sliding_window": 5}),
}


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_families(variant: str, site: str) -> None:
    model_type, options = VARIANTS[variant]
    assert_equal_to_full_forwards(
        tiny_model(model_type, **options), replace(SPEC, site=site), problems(), 0.5
    )


LAST = EditRequest(id="end", prompt="Here comes {}", subject="Marie Curie", target_new="of Rome and London")


@pytest.mark.parametrize("rule", ["offsets", "rome", "easyedit"])
@pytest.mark.parametrize("lookup", ["subject_last", "subject_first", "subject_first_after_last", "last"])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "bloom"])
def test_every_lookup_token_and_rule(model_type: str, lookup: str, rule: str) -> None:
    # The subject ends a prompt: the token behind it is a target token, and what predicts that comes before it.
    every = problems((*REQUESTS, LAST), TokenOptions(lookup=lookup, rule=rule))
    if model_type == "gemma2" and any(row.lookup < 0 for problem in every for row in problem.rows):
        model_type = (
            "llama"  # a padded position may be beyond every token of the tiny sliding window: no attention
        )
    for site in ("mlp", "block"):
        assert_equal_to_full_forwards(tiny_model(model_type), replace(SPEC, site=site), every, 0.5)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_lookups_from_the_end_do_not_depend_on_the_batch(model_type: str) -> None:
    model = tiny_model(model_type)
    every = problems(options=TokenOptions(lookup="subject_first", rule="easyedit"))
    assert any(row.lookup < 0 for problem in every for row in problem.rows)
    together = optimise_targets(model, resolve(model), every, SPEC)
    for index, problem in enumerate(every):
        alone = optimise_targets(model, resolve(model), [problem], SPEC)
        assert (alone.value[0] - together.value[index]).norm() <= 1e-5 * alone.value[0].norm()


def test_prompts_of_very_unequal_length() -> None:
    long = EditRequest(
        id="long",
        prompt="The field of physics and chemistry " * 2 + "where {} worked is called",
        subject="Marie Curie",
        target_new="physics",
    )
    model = tiny_model("gpt2")
    assert_equal_to_full_forwards(model, SPEC, problems((*REQUESTS, long)), 0.5)
    spec, _ = staggered(model)
    every = problems((*REQUESTS, long))
    found = optimise_targets(model, resolve(model), every, spec, batch_tokens=60)
    assert found.memory.batch_tokens <= max(60, *map(suffix_tokens, every))


@pytest.mark.parametrize("limit", [None, 40])
def test_the_memory_report_is_filled(limit: int | None) -> None:
    model = tiny_model("gpt2")
    for every in (problems(), problems()[:1]):
        with torch.no_grad():
            report = optimise_targets(model, resolve(model), every, SPEC, batch_tokens=limit).memory
        assert report.bytes_per_token > 1000 and report.limit_tokens > 0
        assert report.predicted_bytes >= report.bytes_per_token * report.limit_tokens


# Models whose norms and rotary tables stay in fp64; the others compute them in fp32 whatever the weights.
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox"])
def test_gradient_against_finite_differences(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    objective = TargetObjective(model, resolve(model), problems(), SPEC)
    generator = torch.Generator().manual_seed(0)
    delta = 0.3 * torch.randn(objective.init.shape, generator=generator, dtype=torch.float64)
    _, gradient = objective(delta)
    for _ in range(3):
        direction = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
        high, _ = objective(delta + 1e-6 * direction, grad=False)
        low, _ = objective(delta - 1e-6 * direction, grad=False)
        slope = (high.nll + high.kl - low.nll - low.kl) / 2e-6
        assert torch.allclose((gradient * direction).sum(1), slope, rtol=1e-5, atol=1e-6)


def staggered(model) -> tuple[TargetSpec, list[int]]:
    """A specification whose threshold makes the requests stop at different steps or not at all, and those steps."""
    base = replace(SPEC, v_num_grad_steps=30, kl_factor=0.0, v_weight_decay=0.0, clamp_norm_factor=50.0)
    base = replace(base, v_lr=0.15)
    full = optimise_targets(model, resolve(model), problems(), replace(base, stop_loss=0.0))
    # Where the third of the five is after half of the steps.
    spec = replace(base, stop_loss=sorted(rows[15][0] for rows in full.losses)[2] + 1e-3)
    together = optimise_targets(model, resolve(model), problems(), spec)
    steps = [len(rows) for rows in together.losses]
    assert len(set(steps)) > 2
    return spec, steps


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj", "bloom"])
def test_a_batch_equals_one_by_one_with_staggered_stops(model_type: str) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    every = problems()
    spec, steps = staggered(model)
    together = optimise_targets(model, arch, every, spec)
    for index, problem in enumerate(every):
        alone = optimise_targets(model, arch, [problem], spec)
        assert len(alone.losses[0]) == steps[index]
        assert (alone.value[0] - together.value[index]).norm() <= 1e-5 * alone.value[0].norm()


@pytest.mark.parametrize("batch_tokens", [1, 24, 40, 64])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "falcon"])
def test_waiting_requests_take_the_room_of_finished_ones(
    model_type: str, batch_tokens: int, monkeypatch
) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    every = problems()
    spec, steps = staggered(model)
    together = optimise_targets(model, arch, every, spec)
    sizes = []
    evaluate = TargetObjective.__call__

    def watched(self, *args, **options):
        sizes.append((len(self.init), self.tokens))
        return evaluate(self, *args, **options)

    monkeypatch.setattr(TargetObjective, "__call__", watched)
    done = []
    queued = optimise_targets(model, arch, every, spec, batch_tokens=batch_tokens, on_done=done.append)
    assert [len(rows) for rows in queued.losses] == steps
    assert (queued.value - together.value).norm() <= 1e-5 * together.value.norm()
    assert done[-1] == len(every) and done == sorted(done)
    assert sum(count for count, _ in sizes) == sum(steps)
    if arch.row.model_type != "falcon":  # padding counts there
        assert all(count == 1 or tokens <= batch_tokens for count, tokens in sizes)


def out_of_memory_above(
    monkeypatch, tokens: int, error: type[Exception] = torch.OutOfMemoryError
) -> list[int]:
    """Make evaluations of more tokens fail, as an allocator would; returns the sizes that were tried."""
    tried = []
    evaluate = TargetObjective.__call__

    def limited(self, *args, **options):
        tried.append(self.tokens)
        if self.tokens > tokens and not self.checkpointed:
            raise error("can't allocate memory: a test says so")
        return evaluate(self, *args, **options)

    monkeypatch.setattr(TargetObjective, "__call__", limited)
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch, error) -> None:
    model = tiny_model("gpt2")
    arch = resolve(model)
    spec, steps = staggered(model)
    expected = optimise_targets(model, arch, problems(), spec)
    tried = out_of_memory_above(monkeypatch, 40, error)
    with pytest.warns(
        UserWarning, match=r"out of memory with \d+ tokens in a batch of targets .*: going on with"
    ):
        found = optimise_targets(model, arch, problems(), spec, batch_tokens=1000)
    assert tried[0] > 40 and tried[-1] <= 40
    assert [len(rows) for rows in found.losses] == steps
    assert (found.value - expected.value).norm() <= 1e-5 * expected.value.norm()
    assert found.memory.shrunk


def test_a_request_that_does_not_fit_alone_is_recomputed_and_then_given_up(monkeypatch) -> None:
    model = tiny_model("gpt2")
    arch = resolve(model)
    expected = optimise_targets(model, arch, problems()[:2], SPEC)
    tried = out_of_memory_above(monkeypatch, 0)
    with pytest.warns(UserWarning, match="recomputed in the backward"):
        found = optimise_targets(model, arch, problems()[:2], SPEC)
    assert (found.value - expected.value).norm() <= 1e-5 * expected.value.norm()
    assert len(tried) > 3

    def never(self, *args, **options):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(TargetObjective, "__call__", never)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        optimise_targets(model, arch, problems()[:2], SPEC)


def test_graphs_need_a_cuda_device() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="cuda_graphs needs the model on a CUDA device, it is on cpu"):
        optimise_targets(model, resolve(model), problems(), SPEC, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj"])
def test_graphs_give_the_same_targets(model_type: str) -> None:
    model = tiny_model(model_type).cuda()
    arch = resolve(model)
    expected = optimise_targets(model, arch, problems(), SPEC)
    found = optimise_targets(model, arch, problems(), SPEC, cuda_graphs=True)
    assert (found.value - expected.value).norm() <= 1e-5 * expected.value.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_cuda_model_gives_what_a_cpu_model_gives(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    here = TargetObjective(model, resolve(model), problems(), SPEC)
    delta = 0.3 * torch.randn(here.init.shape, generator=torch.Generator().manual_seed(0))
    loss, gradient = here(delta)
    model = model.cuda()
    there, same = TargetObjective(model, resolve(model), problems(), SPEC)(delta.cuda())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert torch.allclose(there.total.cpu(), loss.total, atol=tolerance)
    assert (same.cpu() - gradient).norm() <= 3 * tolerance * gradient.norm()


def test_another_runtime_error_is_not_taken_for_memory(monkeypatch) -> None:
    model = tiny_model("gpt2")

    def broken(self, *args, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(TargetObjective, "__call__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        optimise_targets(model, resolve(model), problems(), SPEC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_half_precision_models_have_single_precision_targets(model_type: str, dtype: torch.dtype) -> None:
    """Against the same weights in fp32: losses, gradients and starts within a few roundings of the half type."""
    half, full = tiny_model(model_type, dtype=dtype), tiny_model(model_type, dtype=dtype).float()
    ulp = torch.finfo(dtype).eps
    for site in ("mlp", "block"):
        spec = replace(SPEC, site=site)
        mine = TargetObjective(half, resolve(half), problems(), spec)
        theirs = TargetObjective(full, resolve(full), problems(), spec)
        assert mine.init.dtype == torch.float32
        zero = torch.zeros_like(mine.init)
        assert float(mine(zero, grad=False)[0].kl.abs().max()) <= 1e-6
        delta = 0.3 * torch.randn(zero.shape, generator=torch.Generator().manual_seed(0))
        loss, gradient = mine(delta)
        wanted, direction = theirs(delta)
        assert loss.total.dtype == gradient.dtype == torch.float32
        assert float((loss.total - wanted.total).abs().max()) <= 2 * ulp
        assert (gradient - direction).norm() <= 6 * ulp * direction.norm()
    assert all(p.dtype == dtype for p in half.parameters())


def test_half_precision_models_are_left_as_they_were() -> None:
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = optimise_targets(model, resolve(model), problems(), SPEC)
    assert found.delta.dtype == found.init.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_last_layer_and_early_loss_layer() -> None:
    model = tiny_model("gpt2", dtype=torch.float64)
    last = replace(SPEC, layer=DEPTH - 1)
    # The subject ends the prompt: above the last layer only its own logits can move.
    found = optimise_targets(model, resolve(model), problems()[4:], last)
    _, delta, _ = oracle(model, last, 4)
    assert (found.delta[0] - delta.double()).norm() <= 1e-4 * delta.norm()

    early = replace(SPEC, v_loss_layer=2, kl_factor=0.0, v_weight_decay=0.0)
    objective = TargetObjective(model, resolve(model), problems()[:1], early)
    loss, _ = objective(torch.zeros_like(objective.init), grad=False)
    request = naive(REQUESTS[0])
    row = torch.tensor([request.rows[0] + request.target[:-1]])
    assert len(request.rows) == 3
    nll = []
    for prompt in request.rows:
        row = torch.tensor([prompt + request.target[:-1]])
        with torch.no_grad(), captured(model.transformer.h[2]) as seen:
            model(input_ids=row)
            logp = torch.log_softmax(model.lm_head(model.transformer.ln_f(seen["out"]))[0], -1)
        at = range(len(prompt) - 1, row.shape[1])
        nll.append(-sum(logp[i, t] for i, t in zip(at, request.target, strict=True)) / len(request.target))
    assert float(loss.nll[0]) == pytest.approx(float(sum(nll) / 3), abs=1e-9)


def test_soft_cap_reaches_the_nll_only_when_asked() -> None:
    model = tiny_model("gemma2")
    arch = resolve(model)
    capped = TargetObjective(model, arch, problems(), SPEC)
    plain = TargetObjective(model, arch, problems(), replace(SPEC, soft_cap_nll=False))
    delta = torch.zeros_like(capped.init)
    one, other = capped(delta, grad=False)[0], plain(delta, grad=False)[0]
    assert torch.allclose(one.kl, other.kl, atol=1e-6)
    assert not torch.allclose(one.nll, other.nll)


def test_a_loss_that_is_not_finite_names_the_request() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("nan")
    with pytest.raises(ValueError, match="request '1': loss is not finite at step 0"):
        optimise_targets(model, resolve(model), problems(), SPEC)

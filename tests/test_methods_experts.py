"""Routed heads: dense oracles from the formula, one token and one head at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ballast.errors import SuiteError
from ballast.experts import Experts, cv_squared, head_use
from tiny import backward, distance, logits, optimiser_of, randomise, same_bytes, train, tuner_of

DOUBLE = torch.float64
METHODS = ("interaction_lora", "hydra_lora", "moe_lora")
each = pytest.mark.parametrize("name", METHODS)
BALANCED = {"balance": 0.5}


def layer_of(shared, heads=3, rank=2, dropout=0.0, bias=True, dtype=DOUBLE):
    """A randomised layer on a Linear [5, 7], scale 1.7."""
    torch.manual_seed(0)
    base = nn.Linear(7, 5, bias=bias, dtype=dtype)
    layer = Experts(base, rank, 1.7, dropout, heads=heads, shared=shared)
    with torch.no_grad():
        for parameter in (layer.A, layer.B, layer.R):
            parameter.copy_(torch.randn(parameter.shape, dtype=DOUBLE))
    return layer


def dense(layer, x):
    """y and p of rows x [T, n] in numpy: y = W0 x + b + s sum_i p_i B_i A_i x, token by token."""
    weight, bias = (t.detach().numpy() for t in (layer.base.weight, layer.base.bias))
    a, b, r = (t.detach().numpy() for t in (layer.A, layer.B, layer.R))
    ys, ps = [], []
    for token in x.detach().numpy():
        scores = np.exp(r @ token)
        p = scores / scores.sum()
        y = weight @ token + bias
        for i in range(layer.heads):
            part = slice(i * layer.rank, (i + 1) * layer.rank)
            a_i = a if len(a) == layer.rank else a[part]
            y = y + layer.scale * p[i] * (b[:, part] @ (a_i @ token))
        ys.append(y)
        ps.append(p)
    return np.stack(ys), np.stack(ps)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 3, 5])
def test_forward_is_the_formula(shared, heads):
    layer = layer_of(shared, heads)
    seen = []
    layer.watch = seen.append
    x = torch.randn(2, 4, 7, dtype=DOUBLE)
    found = layer(x)
    y, p = dense(layer, x.view(8, 7))
    assert found.shape == (2, 4, 5)
    assert distance(found.view(8, 5), torch.from_numpy(y)) < 1e-14
    assert seen[0].shape == (2, 4, heads)
    assert distance(seen[0].view(8, heads), torch.from_numpy(p)) < 1e-14


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_by_hand(shared):
    """dL/dy = G: the derivatives of the formula, written out per token and head."""
    layer = layer_of(shared)
    x = torch.randn(6, 7, dtype=DOUBLE, requires_grad=True)
    upstream = torch.randn(6, 5, dtype=DOUBLE)
    layer(x).backward(upstream)

    a, b, r = (t.detach().numpy() for t in (layer.A, layer.B, layer.R))
    weight = layer.base.weight.detach().numpy()
    _, weights = dense(layer, x)
    grads = {"A": np.zeros_like(a), "B": np.zeros_like(b), "R": np.zeros_like(r)}
    inputs = np.zeros((6, 7))
    for t, (token, g) in enumerate(zip(x.detach().numpy(), upstream.numpy(), strict=True)):
        p, inner = weights[t], np.zeros(3)
        inputs[t] = weight.T @ g
        for i in range(3):
            part = slice(2 * i, 2 * i + 2)
            rows = slice(0, 2) if shared else part
            inner[i] = 1.7 * g @ (b[:, part] @ (a[rows] @ token))
            grads["B"][:, part] += 1.7 * p[i] * np.outer(g, a[rows] @ token)
            grads["A"][rows] += 1.7 * p[i] * np.outer(b[:, part].T @ g, token)
            inputs[t] += 1.7 * p[i] * (a[rows].T @ (b[:, part].T @ g))
        through = p * (inner - p @ inner)  # the softmax
        grads["R"] += np.outer(through, token)
        inputs[t] += r.T @ through
    for name, expected in grads.items():
        assert distance(getattr(layer, name).grad, torch.from_numpy(expected)) < 1e-13, name
    assert distance(x.grad, torch.from_numpy(inputs)) < 1e-13
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_falls_on_the_heads_and_not_on_the_router(shared):
    layer = layer_of(shared, dropout=0.5).train()
    seen = []
    layer.watch = seen.append
    x = torch.randn(300, 7, dtype=DOUBLE)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    _, p = dense(layer, x)
    assert distance(seen[0], torch.from_numpy(p)) < 1e-14
    low = (x * mask) @ layer.A.T
    expected = layer.base(x)
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        head = low if shared else low[:, part]
        expected = expected + 1.7 * torch.from_numpy(p[:, i : i + 1]) * (head @ layer.B[:, part].T)
    assert distance(found, expected) < 1e-14
    assert distance(layer.eval()(x), torch.from_numpy(dense(layer, x)[0])) < 1e-14


def test_router_is_in_fp32_under_autocast():
    """Scores that bf16 cannot tell apart route differently all the same."""
    layer = layer_of(True, heads=2, dtype=torch.float32)
    with torch.no_grad():
        layer.R[:] = 0
        layer.R[0, 0], layer.R[1, 0] = 300.0, 300.5  # equal in bf16
    seen = []
    layer.watch = seen.append
    x = torch.zeros(1, 3, 7)
    x[..., 0] = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    expected = 1 / (1 + math.exp(0.5))
    assert seen[0][0, 0, 0].item() == pytest.approx(expected, rel=1e-4)


def inputs_of(tuner, batch):
    """What each adapted layer sees of a batch, by name, from hooks of this test's own."""
    inputs = {}

    def keep(key):
        return lambda module, args: inputs.__setitem__(key, args[0].detach().numpy())

    hooks = [layer.register_forward_pre_hook(keep(key)) for key, layer in tuner.ctx.adapters()]
    tuner.ctx.model(**batch)
    for hook in hooks:
        hook.remove()
    return inputs


def routing(layer, x):
    """softmax(R x) in numpy."""
    scores = np.exp(x @ layer.R.detach().numpy().T)
    return scores / scores.sum(-1, keepdims=True)


@pytest.fixture
def pair(make_model, make_batches):
    """pair(kind, name, settings) -> that method with one head, and LoRA, from the same A and B."""

    def make(kind, name, settings):
        batches = make_batches(kind, 2, DOUBLE)
        one = tuner_of(name, make_model(kind, DOUBLE), batches, settings=settings)
        lora = tuner_of("lora", make_model(kind, DOUBLE), batches)
        for tuner in (one, lora):
            tuner.start()
        randomise(one)
        twins = dict(lora.ctx.adapters())
        with torch.no_grad():
            for layer_name, layer in one.ctx.adapters():
                twins[layer_name].A.copy_(layer.A)
                twins[layer_name].B.copy_(layer.B)
        return one, lora, batches

    return make


ONE_HEAD = {
    "interaction_lora": {"heads": 1},
    "hydra_lora": {"heads": 1, "alpha_over_r": 2.0},
    "moe_lora": {"experts": 1},
}


@pytest.mark.parametrize("kind", ["llama", "llava"])
@each
def test_one_head_is_lora(name, kind, pair):
    """Outputs, gradients and a course of AdamW steps; the router's own gradient is zero."""
    one, lora, batches = pair(kind, name, ONE_HEAD[name])
    batch = batches[0]
    assert distance(logits(one.ctx.model, batch), logits(lora.ctx.model, batch)) < 1e-13
    twins = dict(lora.ctx.adapters())
    for tuner in (one, lora):
        backward(tuner, batch)
    for layer_name, layer in one.ctx.adapters():
        for short in ("A", "B"):
            own, twin = (getattr(x, short).grad for x in (layer, twins[layer_name]))
            assert distance(own, twin) < 1e-11, (layer_name, short)
        assert not layer.R.grad.any()
    # No decay: it moves the idle router, which does nothing, but would be in the clipped norm.
    for tuner in (one, lora):
        train(tuner, batches, 3, optimiser_of(tuner, 0.0))
    assert distance(logits(one.ctx.model, batch), logits(lora.ctx.model, batch)) < 1e-9


@each
def test_equal_heads_are_lora_whatever_the_router_says(name, make_model, make_batches):
    (batch,) = make_batches("llama", 1, DOUBLE)
    tuner = tuner_of(name, make_model("llama", DOUBLE), [batch], settings={"alpha_over_r": 2.0})
    tuner.start()
    randomise(tuner)
    lora = tuner_of("lora", make_model("llama", DOUBLE), [batch])
    rank = next(layer.rank for _, layer in tuner.ctx.adapters())
    lora.ctx.rank = rank
    lora.start()
    twins = dict(lora.ctx.adapters())
    with torch.no_grad():
        for layer_name, layer in tuner.ctx.adapters():
            first = layer.B[:, :rank]
            layer.B.copy_(first.repeat(1, layer.heads))
            layer.A.copy_(layer.A[:rank].repeat(len(layer.A) // rank, 1))
            layer.R.mul_(30)
            twins[layer_name].A.copy_(layer.A[:rank])
            twins[layer_name].B.copy_(first)
    assert distance(logits(tuner.ctx.model, batch), logits(lora.ctx.model, batch)) < 1e-12


def test_defaults_are_those_of_the_sources(make_model):
    expected = {"interaction_lora": (3, 2.0), "hydra_lora": (4, 8.0), "moe_lora": (8, 2.0)}
    for name, (heads, scale) in expected.items():
        settings = {"experts": 8} if name == "moe_lora" else {"alpha_over_r": scale}
        tuner = tuner_of(name, make_model("llama"), [], rank=8, settings=settings)
        hyper = type(tuner.ctx.hyper)()
        count = hyper.experts if name == "moe_lora" else hyper.heads
        assert (count, hyper.alpha_over_r, hyper.balance) == (heads, scale, 0.0)
        tuner.start()
        for _, layer in tuner.ctx.adapters():
            m, n = layer.base.weight.shape
            assert layer.R.shape == (heads, n)
            if name == "moe_lora":  # the total rank is split
                assert (layer.A.shape, layer.B.shape) == ((8, n), (m, 8))
            else:
                assert (layer.A.shape, layer.B.shape) == ((8, n), (m, 8 * heads))
            bound = 1 / math.sqrt(n)
            for start in (layer.A, layer.R):
                assert 0.8 * bound < start.abs().max() <= bound
            assert not layer.B.any()


def test_feed_forward_only_and_what_it_trains(make_model):
    for ffn_only, leaves in ((False, 7), (True, 3)):
        settings = {"ffn_only": ffn_only}
        fresh = tuner_of("moe_lora", make_model("llama"), [], settings=settings)
        expected = fresh.method.total_parameters(fresh.ctx, 4)
        fresh.start()
        names = {name.split(".")[-1] for name, _ in fresh.ctx.adapters()}
        assert len(names) == leaves
        assert fresh.trained_count() == expected
        if ffn_only:
            assert names == {"gate_proj", "up_proj", "down_proj"}
    kept = tuner_of("moe_lora", make_model("llava"), [], connector="adapted", settings=settings)
    kept.start()
    assert any(kept.ctx.in_connector(name) for name, _ in kept.ctx.adapters())
    none = tuner_of("moe_lora", make_model("llama"), [], modules=["q_proj"], settings=settings)
    with pytest.raises(SuiteError, match="ffn_only: no feed-forward"):
        none.start()


def test_a_rank_that_cannot_be_split_is_refused(make_model):
    tuner = tuner_of("moe_lora", make_model("llama"), [], rank=6, settings={"experts": 4})
    with pytest.raises(SuiteError, match=r"rank 6: 4 experts cannot split.*multiple of 4"):
        tuner.start()
    fresh = tuner_of("moe_lora", make_model("llama"), [], rank=6, settings={"experts": 4})
    assert list(fresh.method.allowed_sizes(fresh.ctx)) == [4, 8, 12, 16]


@each
def test_killed_and_resumed_with_balance_is_identical(name, make_model, make_batches):
    batches = make_batches("llava", 2)
    whole = tuner_of(name, make_model("llava"), batches, settings=BALANCED)
    whole.start()
    killed = tuner_of(name, make_model("llava"), batches, settings=BALANCED)
    killed.start()
    train(whole, batches, 4)
    optimiser = train(killed, batches, 2)
    resumed = tuner_of(name, make_model("llava"), batches, settings=BALANCED)
    resumed.restore(killed.tensors())
    resumed.ctx.step = 2
    fresh = optimiser_of(resumed)
    fresh.load_state_dict(optimiser.state_dict())
    train(resumed, batches, 2, fresh)
    assert same_bytes(resumed.tensors(), whole.tensors())


def balance_oracle(loads):
    """var / mean^2 of all entries with Bessel's correction, in numpy."""
    return loads.var(ddof=1) / loads.mean() ** 2


def test_cv_squared_against_numpy():
    loads = torch.rand(4, 3, dtype=DOUBLE)
    assert cv_squared(loads).item() == pytest.approx(balance_oracle(loads.numpy()), rel=1e-9)
    assert cv_squared(torch.full((4, 3), 2.0)).item() == 0


@each
def test_balance_is_the_sum_over_layers_of_the_loads_variation(name, make_model, make_batches):
    """Loads: an example's weights per head summed over its tokens, from a forward by hooks."""
    batches = make_batches("llama", 1, DOUBLE)
    tuner = tuner_of(name, make_model("llama", DOUBLE), batches, settings={"balance": 0.3})
    tuner.start()
    randomise(tuner)
    inputs = inputs_of(tuner, batches[0])
    expected = 0.0
    for key, layer in tuner.ctx.adapters():
        expected += 0.3 * balance_oracle(routing(layer, inputs[key]).sum(1))
    assert tuner.penalty().item() == pytest.approx(expected, rel=1e-9)


@each
def test_balance_acts_on_the_routers_and_survives_checkpointing(name, make_model, make_batches):
    (batch,) = make_batches("llama", 1, DOUBLE)
    found = []
    for checkpointing, weight in ((False, 0.0), (False, 2.0), (True, 2.0)):
        model = make_model("llama", DOUBLE)
        tuner = tuner_of(name, model, [batch], settings={"balance": weight})
        tuner.start()
        randomise(tuner)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        backward(tuner, batch)
        tuner.after_backward()
        assert not tuner.ctx.scratch.get("loads")
        found.append({n: p.grad for n, p in tuner.ctx.trainable().items()})
    plain, balanced, recomputed = found
    last = max(n for n in plain if n.endswith("down_proj.R"))
    assert distance(balanced[last], plain[last]) > 1e-3
    assert distance(balanced[last[:-1] + "B"], plain[last[:-1] + "B"]) < 1e-12
    assert all(distance(recomputed[n], balanced[n]) < 1e-12 for n in balanced)


@each
def test_balance_evens_out_the_heads(name, make_model, make_batches):
    batches = make_batches("llama", 2)
    left = []
    for weight in (0.0, 10.0):
        tuner = tuner_of(name, make_model("llama"), batches, settings={"balance": weight})
        tuner.start()
        with torch.no_grad():
            for _, layer in tuner.ctx.adapters():
                layer.R.mul_(5)  # a router with favourites
        train(tuner, batches, 12)
        inputs = inputs_of(tuner, batches[0])
        loads = [routing(layer, inputs[key]).sum(1) for key, layer in tuner.ctx.adapters()]
        left.append(np.mean([balance_oracle(load) for load in loads]))
    assert left[1] < 0.7 * left[0]


@pytest.fixture
def mixture(make_model):
    """A tuner on two tasks of other tokens, padded, and the batches by task."""
    generator = torch.Generator().manual_seed(5)
    by_task = {}
    for task, (low, high) in {"ant": (1, 20), "bee": (30, 60)}.items():
        ids = torch.randint(low, high, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        by_task[task] = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}

    def make(name):
        tuner = tuner_of(name, make_model("llama", DOUBLE), [])
        asked = []

        def batches(count, task=None):
            asked.append(task)
            batch = by_task[task]
            for i in range(min(count, 3)):
                yield {k: v[i : i + 1] for k, v in batch.items()}

        tuner.ctx.batches, tuner.ctx.tasks = batches, tuple(by_task)
        tuner.start()
        randomise(tuner)
        with torch.no_grad():
            for _, layer in tuner.ctx.adapters():
                layer.R.mul_(4)
        return tuner, by_task, asked

    return make


@each
def test_report_of_heads_against_an_oracle(name, mixture):
    tuner, by_task, asked = mixture(name)
    model = tuner.ctx.model
    for training in (True, False):
        model.train(training)
        report = tuner.report()
        assert model.training == training
    assert asked == 2 * ["ant", "bee"]
    assert all(isinstance(value, float) for value in report.values())

    heads = next(layer.heads for _, layer in tuner.ctx.adapters())
    means = {}
    for task, batch in by_task.items():
        inputs = inputs_of(tuner, batch)
        kept = batch["attention_mask"].numpy().astype(bool)
        rows, entropies = [], []
        for key, layer in tuner.ctx.adapters():
            p = routing(layer, inputs[key])[kept]
            rows.append(p.mean(0))
            entropies.append(-(p * np.log(p)).sum(-1).mean())
        means[task] = np.stack(rows)
        for head in range(heads):
            key = f"use.{task}.head{head}"
            assert report[key] == pytest.approx(means[task][:, head].mean(), rel=1e-9)
        assert report[f"use.{task}.entropy"] == pytest.approx(np.mean(entropies), rel=1e-9)
    both = (means["ant"] + means["bee"]) / 2
    entropy = {k: -(v * np.log(v)).sum(-1) for k, v in {**means, "both": both}.items()}
    divergence = (entropy["both"] - (entropy["ant"] + entropy["bee"]) / 2).mean()
    assert report["use.divergence"] == pytest.approx(divergence, rel=1e-9)
    assert divergence > 1e-4
    assert len(report) == 2 * (heads + 1) + 1


def test_report_is_empty_without_examples_and_leaves_training_as_it_was(make_model, make_batches):
    batches = make_batches("llama", 1)
    courses = []
    for reported in (False, True):
        tuner = tuner_of("hydra_lora", make_model("llama"), batches, settings=BALANCED)
        assert head_use(tuner.ctx) == {}  # no tasks are named
        tuner.ctx.tasks = ("one",)
        tuner.start()
        optimiser = train(tuner, batches, 1)
        if reported:
            report = tuner.report()
            assert set(report) == {*(f"use.one.head{i}" for i in range(4)), "use.one.entropy"}
            assert sum(v for k, v in report.items() if "head" in k) == pytest.approx(1.0, abs=1e-5)
        train(tuner, batches, 2, optimiser)
        courses.append(tuner.tensors())
    assert same_bytes(*courses)
    tuner.ctx.batches = None
    assert tuner.report() == {}


@each
def test_cannot_be_merged(name, make_model):
    tuner = tuner_of(name, make_model("llama"), [])
    tuner.start()
    assert not tuner.method.declaration.merges
    with pytest.raises(TypeError, match="Experts cannot be merged"):
        tuner.merge()

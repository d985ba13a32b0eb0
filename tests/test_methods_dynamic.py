"""Methods that change while they train: AdaLoRA, LoRA-Dash on three bases, DoRA, LoRASculpt.

Oracles are PEFT where it has the method, otherwise dense formulas in float64 written here. The
parity test of AdaLoRA shares PEFT's (and the authors' code's) deviations from the paper: weights
from after the step with gradients from before it, and a penalty that is a mean of norms.

A *bank* is a set of independent linear maps, each regressed on a matrix of its own under white
inputs: what should be learned is then known exactly.
"""

from __future__ import annotations

import itertools

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ballast.anatomy import Anatomy
from ballast.chunks import GPU_CHUNK, fit_chunks
from ballast.context import Context
from ballast.declare import read_method
from ballast.decompositions import Decompositions
from ballast.errors import MethodError, SuiteError
from ballast.tuner import Tuner, load_method
from tiny import (
    METHODS,
    backward,
    distance,
    logits,
    optimiser_of,
    randomise,
    same_bytes,
    train,
    tuner_of,
)

DOUBLE = torch.float64
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DASHES = ("lora_dash", "adalora_dash", "flora_dash")
DASH = load_method(METHODS / "_dash.py")


class Bank(nn.Module):
    """Linear maps side by side, without bias."""

    def __init__(self, weights):
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight.data = weight.clone()
            self.layers.append(linear)

    def products(self):
        return [layer(torch.eye(layer_inputs(layer), dtype=DOUBLE)).T for layer in self.layers]


def layer_inputs(layer):
    return getattr(layer, "base", layer).weight.shape[1]


def bank(name, weights, rank, steps, learning_rate=1e-2, seed=0, **settings):
    """A started tuner of a method on a bank."""
    file = read_method(METHODS / f"{name}.py")
    module = load_method(file.path)
    model = Bank(weights)
    ctx = Context(
        model=model,
        anatomy=Anatomy("", "layers", "", None, None),
        hyper=getattr(module, "Hyper", file.hyper)(**file.settings(settings)),
        rank=rank if file.declaration.rank else None,
        targets=tuple(f"layers.{i}" for i in range(len(weights))),
        generator=torch.Generator().manual_seed(seed),
        cache=Decompositions(),
        total_steps=steps,
        learning_rate=learning_rate,
    )
    tuner = Tuner(module, ctx)
    tuner.start()
    return tuner


def bank_loss(tuner, wanted):
    products = tuner.ctx.model.products()
    return sum((p - w).square().sum() for p, w in zip(products, wanted, strict=True))


def train_bank(tuner, wanted, steps, optimiser=None, decay=True):
    """AdamW on the distance to the wanted matrices, its rate falling linearly to zero."""
    optimiser = optimiser or optimiser_of(tuner, weight_decay=0.0)
    total, peak = tuner.ctx.total_steps, tuner.ctx.learning_rate
    for _ in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * (1 - tuner.ctx.step / total if decay else 1)
        optimiser.zero_grad()
        loss = bank_loss(tuner, wanted)
        penalty = tuner.penalty()
        (loss if penalty is None else loss + penalty).backward()
        tuner.after_backward()
        optimiser.step()
        tuner.ctx.step += 1
        tuner.after_step()
    return optimiser


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# AdaLoRA.


def _peft_adalora(model, **settings):
    config = peft.AdaLoraConfig(
        target_modules=rf".*layers\.\d+\..*\.({'|'.join(LEAVES)})",
        task_type="CAUSAL_LM",
        **settings,
    )
    return peft.get_peft_model(model, config).double()


def _adalora_pairs(tuner, wrapped):
    theirs = dict(wrapped.base_model.model.named_parameters())
    for name, layer in tuner.ctx.adapters():
        for short in ("A", "B", "E"):
            yield name, short, getattr(layer, short), theirs[f"{name}.lora_{short}.default"]


@pytest.mark.parametrize(("tinit", "tfinal", "delta_t"), [(2, 3, 1), (0, 4, 3), (3, 0, 5)])
def test_adalora_is_pefts_over_its_whole_schedule(tinit, tfinal, delta_t, make_model, make_batches):
    steps, batches = 12, make_batches("llama", 3, DOUBLE)
    shares = {"tinit": (tinit + 0.5) / steps, "tfinal": (tfinal + 0.5) / steps}
    settings = {"delta_t": delta_t, "gamma": 0.3, "alpha": 8.0, **shares}
    tuner = tuner_of(
        "adalora", make_model("llama", DOUBLE), batches, steps=steps, settings=settings
    )
    tuner.start()
    randomise(tuner)
    wrapped = _peft_adalora(
        make_model("llama"),
        init_r=6,
        target_r=4,
        lora_alpha=8,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=delta_t,
        total_step=steps,
        orth_reg_weight=0.3,
    )
    with torch.no_grad():
        for _, _, own, other in _adalora_pairs(tuner, wrapped):
            other.copy_(own.view(other.shape))
    assert distance(logits(tuner.ctx.model, batches[0]), logits(wrapped, batches[0])) < 1e-12

    ours = optimiser_of(tuner)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(trainable, lr=tuner.ctx.learning_rate, weight_decay=0.1)
    counts = []
    for step in range(1, steps + 1):
        train(tuner, batches, 1, ours)
        wrapped.train()
        theirs.zero_grad()
        wrapped(**batches[(step - 1) % len(batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        theirs.step()
        wrapped.base_model.update_and_allocate(step)
        for name, short, own, other in _adalora_pairs(tuner, wrapped):
            assert torch.equal(own.grad == 0, other.grad.view(own.shape) == 0)
            assert distance(own, other.view(own.shape)) < 1e-9, (step, name, short)
        pattern = wrapped.peft_config["default"].rank_pattern
        for name, layer in tuner.ctx.adapters():
            mask = pattern[f"{name}.lora_E.default"] if pattern else [True] * 6
            assert layer.kept.tolist() == mask, (step, name)
        counts.append(sum(int((layer.E != 0).sum()) for _, layer in tuner.ctx.adapters()))
    assert counts[tinit - 1 if tinit else 0] > counts[-1] == 28 * 4
    for batch in batches:
        assert distance(logits(tuner.ctx.model, batch), logits(wrapped, batch)) < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("settings", [{}, {"tinit": 0.0, "tfinal": 0.0, "delta_t": 7}])
def test_adalora_ends_with_exactly_its_budget(steps, settings):
    weights = [gaussian(8, 6, seed=i) for i in range(3)]
    wanted = [gaussian(8, 6, seed=10 + i) for i in range(3)]
    tuner = bank("adalora", weights, rank=2, steps=steps, **settings)
    layers = [layer for _, layer in tuner.ctx.adapters()]
    assert [layer.rank for layer in layers] == [3, 3, 3]
    train_bank(tuner, wanted, steps, decay=False)
    assert sum(int((layer.E != 0).sum()) for layer in layers) == 3 * 2
    report = tuner.report()
    assert report["rank_total"] == report["rank_total_asked"] == 6
    assert report["rank_total_at_start"] == 9
    assert sum(report[f"rank.layers.{i}"] for i in range(3)) == 6
    assert not tuner.ctx.state  # the averages are not part of a finished adapter


def test_adalora_ends_with_its_budget_where_importances_are_equal():
    """A threshold would drop all of them at once: the gradients are zero."""
    tuner = bank("adalora", [gaussian(8, 6)], rank=2, steps=2, gamma=0.0)
    train_bank(tuner, [tuner.ctx.model.layers[0].base.weight], 2)
    assert tuner.report()["rank_total"] == 2


def test_adalora_budget_is_cubic():
    tuner = bank("adalora", [gaussian(40, 40)] * 3, rank=8, steps=100, tinit=0.1, tfinal=0.3)
    found = [tuner.method.budget(tuner.ctx, step) for step in range(1, 101)]
    assert found == sorted(found, reverse=True)
    assert found[:10] == [36] * 10
    assert found[69:] == [24] * 31
    for step in range(11, 70):
        assert found[step - 1] == int(24 + 12 * (1 - (step - 10) / 60) ** 3)


def test_adalora_keeps_what_its_importance_says():
    tuner = bank("adalora", [gaussian(7, 5)], 2, 3, tinit=0.4, tfinal=0.0, init_r=4, delta_t=3)
    randomise(tuner)
    ((_, layer),) = tuner.ctx.adapters()
    wanted, optimiser = [gaussian(7, 5, seed=3)], optimiser_of(tuner, 0.0)
    average = dict.fromkeys("EBA", 0.0)
    spread = dict.fromkeys("EBA", 0.0)
    for step in range(1, 4):
        train_bank(tuner, wanted, 1, optimiser)
        if step == 3:  # the last allocation: averages are those of the steps before
            break
        for key in average:
            p = getattr(layer, key)
            now = np.abs(p.numpy(force=True) * p.grad.numpy())
            average[key] = 0.85 * average[key] + 0.15 * now
            spread[key] = 0.85 * spread[key] + 0.15 * np.abs(now - average[key])
    s = {key: average[key] * spread[key] for key in average}
    scores = s["E"] + s["B"].mean(axis=0) + s["A"].mean(axis=1)
    assert set(np.flatnonzero(layer.kept.numpy())) == set(np.argsort(-scores)[:2])


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_adalora_penalty_is_the_formula(form, make_model):
    settings = {"gamma": 0.3, "orthogonality": form}
    tuner = tuner_of("adalora", make_model("llama", DOUBLE), [], settings=settings)
    tuner.start()
    randomise(tuner)
    parts = []
    for _, layer in tuner.ctx.adapters():
        p, q = layer.B.numpy(force=True), layer.A.numpy(force=True)
        parts += [np.linalg.norm(g - np.eye(6)) for g in (p.T @ p, q @ q.T)]
    expected = np.mean(parts) if form == "norm" else np.sum(np.square(parts))
    assert tuner.penalty().item() == pytest.approx(0.3 * expected, rel=1e-12)


def test_adalora_penalty_has_no_nan_at_orthogonal_factors():
    tuner = bank("adalora", [gaussian(9, 9)], rank=2, steps=4)
    ((_, layer),) = tuner.ctx.adapters()
    with torch.no_grad():
        layer.A.copy_(torch.eye(9, dtype=DOUBLE)[:3])
        layer.B.copy_(torch.eye(9, dtype=DOUBLE)[:, :3])
    tuner.penalty().backward()
    assert not layer.A.grad.any()
    assert not layer.B.grad.any()


@pytest.mark.parametrize("seed", [0, 1])
def test_adalora_gives_rank_to_the_matrix_that_needs_it(seed):
    """Of four changes with singular values of 2 one has rank 6, the others 1; 8 may be kept."""
    weights = [gaussian(16, 16, seed=i) for i in range(4)]
    wanted = []
    for i, weight in enumerate(weights):
        rank = 6 if i == 2 else 1
        u, _ = torch.linalg.qr(gaussian(16, rank, seed=20 + i))
        v, _ = torch.linalg.qr(gaussian(16, rank, seed=30 + i))
        wanted.append(weight + 2 * u @ v.T)
    tuner = bank("adalora", weights, 2, 120, 2e-2, seed, init_r=6, alpha=6.0, tinit=0.05)
    train_bank(tuner, wanted, 120)
    report = tuner.report()
    ranks = [report[f"rank.layers.{i}"] for i in range(4)]
    assert sum(ranks) == 8
    assert ranks[2] >= 4
    assert max(ranks[:2] + ranks[3:]) <= 2
    assert report["rank_max"] == ranks[2]
    assert report["kept_parameters"] == 8 * 33


@pytest.mark.parametrize("init_r", [3, 4])
def test_adalora_refuses_a_start_that_leaves_nothing_to_prune(init_r, make_model):
    tuner = tuner_of("adalora", make_model("llama"), [], settings={"init_r": init_r})
    with pytest.raises(SuiteError, match=f"init_r: {init_r} is not above the rank 4.*at least 5"):
        tuner.start()


def test_adalora_refuses_a_rank_that_no_matrix_is_larger_than():
    with pytest.raises(SuiteError, match=r"rank 5.*smaller"):
        bank("adalora", [gaussian(5, 9)], rank=5, steps=4)


def test_adalora_clips_its_start_to_a_matrix(make_model):
    tuner = tuner_of("adalora", make_model("llama"), [], rank=12)
    tuner.start()
    ranks = {name.split(".")[-1]: layer.rank for name, layer in tuner.ctx.adapters()}
    assert (ranks["k_proj"], ranks["q_proj"]) == (16, 18)  # k is [16, 32] there
    assert tuner.report()["rank_total_at_start"] == 4 * (5 * 18 + 2 * 16)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("adalora", {"tinit": 0.5, "tfinal": 0.5}, "tinit . tfinal: 0.5 . 0.5.*below 1"),
        ("adalora", {"beta2": 1.0}, "beta2: 1"),
        ("adalora", {"orthogonality": "l1"}, "allowed: 'norm', 'squared'"),
        ("adalora_dash", {"tinit": 0.9, "tfinal": 0.2}, "below 1"),
        ("lora_dash", {"pick": "largest"}, "allowed: 'tsd'"),
        ("lora_dash", {"directions": 0}, "directions.*least allowed, 1"),
        ("lorasculpt", {"density": 0.0}, "density: 0.*above 0"),
        ("dora", {"magnitude_only": "o,mlp"}, "'mlp'.*allowed: q, k, v"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings, says):
    with pytest.raises(MethodError, match=says):
        read_method(METHODS / f"{name}.py").settings(settings)


# LoRA-Dash.


@pytest.mark.parametrize("name", DASHES)
def test_dash_computes_the_formula(name, make_model, make_batches):
    """Outputs after the launch against dense matrices; directions against numpy's choice."""
    batches = make_batches("llama", 2, DOUBLE)
    settings = {"fraction": 0.5, "directions": 3}
    tuner = tuner_of(name, make_model("llama", DOUBLE), batches, steps=6, settings=settings)
    tuner.start()
    randomise(tuner)
    optimiser = train(tuner, batches, 3)
    plain = make_model("llama", DOUBLE)
    chosen = {}
    for path, layer in tuner.ctx.adapters():
        u, s, vh = np.linalg.svd(plain.get_submodule(path).weight.numpy(force=True), False)
        update = _own_update(layer)
        rates = [abs(u[:, i] @ update @ vh[i]) / (s[i] + 1e-6) for i in range(len(s))]
        chosen[path] = [(u[:, i], vh[i]) for i in np.argsort(rates)[::-1][:3]]
    train(tuner, batches, 2, optimiser)
    for path, layer in tuner.ctx.adapters():
        parts = zip(layer.dsigma.tolist(), chosen[path], strict=True)
        update = _own_update(layer) + sum(d * np.outer(u, v) for d, (u, v) in parts)
        plain.get_submodule(path).weight.data += torch.from_numpy(update)
    assert distance(logits(tuner.ctx.model, batches[0]), logits(plain, batches[0])) < 1e-9


def _own_update(layer):
    """s B A, s P diag(lambda) Q or s B G A, in numpy."""
    a, b = layer.A.numpy(force=True), layer.B.numpy(force=True)
    middle = np.eye(len(a))
    if hasattr(layer, "E"):
        middle = np.diag(layer.E.numpy(force=True))
    if hasattr(layer, "G"):
        middle = layer.G.numpy(force=True)
    return layer.scale * b @ middle @ a


@pytest.mark.parametrize("name", DASHES)
def test_dash_launch_counts_optimiser_steps(name, make_model, make_batches):
    """Neither micro-batches nor evaluations nor recomputed activations bring it nearer."""
    batches = make_batches("llama", 2, DOUBLE)
    settings = {"fraction": 1.0, "launch": 3}
    tuner = tuner_of(name, make_model("llama", DOUBLE), batches, steps=8, settings=settings)
    tuner.start()
    randomise(tuner)
    tuner.ctx.model.activation_checkpointing_enable()
    optimiser = optimiser_of(tuner)
    values = [layer.dsigma for _, layer in tuner.ctx.adapters()]
    assert set(map(id, values)) <= {id(p) for g in optimiser.param_groups for p in g["params"]}
    start = [value.detach().clone() for value in values]
    for step in range(1, 6):
        train(tuner, batches, 1, optimiser, accumulation=3)
        for batch in batches:
            logits(tuner.ctx.model, batch)
        launched = {layer.u is not None for _, layer in tuner.ctx.adapters()}
        assert launched == {step >= 3}
        moved = {not torch.equal(v, s) for v, s in zip(values, start, strict=True)}
        assert moved == {step > 3}  # weight decay leaves it alone before
        assert {value in optimiser.state for value in values} == {step > 3}
    assert tuner.report()["launch_step"] == 3


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("name", DASHES)
def test_dash_killed_before_at_and_after_its_launch(name, at, make_model, make_batches):
    batches, settings = make_batches("llama", 2), {"fraction": 0.5}

    def fresh():
        return tuner_of(name, make_model("llama"), batches, settings=settings)

    whole, killed = fresh(), fresh()
    for tuner, steps in ((whole, 4), (killed, at)):
        tuner.start()
        optimiser = train(tuner, batches, steps)
    resumed = fresh()
    resumed.restore(killed.tensors())
    resumed.ctx.step = at
    assert {layer.u is not None for _, layer in resumed.ctx.adapters()} == {at >= 2}
    other = optimiser_of(resumed)
    other.load_state_dict(optimiser.state_dict())
    train(resumed, batches, 4 - at, other)
    assert same_bytes(resumed.tensors(), whole.tensors())


def _spectral(change, seed=0, size=24):
    """A weight with a falling spectrum, and what it should become: sigma_i + change[i]."""
    u, _ = torch.linalg.qr(gaussian(size, size, seed=seed))
    v, _ = torch.linalg.qr(gaussian(size, size, seed=seed + 1))
    sigma = torch.linspace(6, 0.5, size, dtype=DOUBLE)
    shift = torch.zeros(size, dtype=DOUBLE)
    for i, amount in change.items():
        shift[i] = amount
    return (u * sigma) @ v.T, (u * (sigma + shift)) @ v.T, (u, sigma, v)


PLANTED = {5: 2.0, 9: -1.5, 12: 1.5, 16: -1.0}


def _dash_on_planted(pick, seed=0, rank=2, steps=200):
    weight, wanted, parts = _spectral(PLANTED)
    options = {"directions": 4, "launch": 40, "fraction": 1.0, "pick": pick, "alpha_over_r": 1.0}
    tuner = bank("lora_dash", [weight], rank, steps, 3e-2, seed, **options)
    train_bank(tuner, [wanted], steps)
    ((_, layer),) = tuner.ctx.adapters()
    left = bank_loss(tuner, [wanted]).item()
    overlap = (parts[0].T @ layer.u).abs()  # [directions of the weight, chosen]
    return tuner, layer, left, set(overlap.argmax(0).tolist())


def test_dash_picks_the_planted_directions():
    for seed in range(3):
        *_, found = _dash_on_planted("tsd", seed)
        assert found == set(PLANTED)


def test_dash_ablation_and_amplification_on_planted_directions():
    """What the paper's ablation reports: other directions do not serve like the task's own.

    Left to the others is what LoRA of rank 2 cannot have: the two smallest of the four changes.
    """
    tuner, layer, left, _ = _dash_on_planted("tsd")
    assert left < 0.05
    for pick in ("top", "bottom", "random"):
        assert _dash_on_planted(pick)[2] == pytest.approx(1.5**2 + 1.0**2, rel=1e-3)
    report = tuner.report()
    sigma = torch.linspace(6, 0.5, 24, dtype=DOUBLE)
    expected = sum(abs(c) for c in PLANTED.values()) / sum(float(sigma[i]) for i in PLANTED)
    assert report["amplification"] == pytest.approx(expected, rel=0.05)
    moved = sorted(DASH.along(layer, layer.delta().detach()).tolist())
    assert moved == pytest.approx(sorted(PLANTED.values()), abs=0.2)


def test_dash_rates_are_the_formula():
    weight, update = gaussian(9, 7, seed=1), gaussian(9, 7, seed=2)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    found = DASH.change_rates(u, s, vh, update)
    for i in range(7):
        expected = float(abs(u[:, i] @ update @ vh[i]) / (s[i] + 1e-6))
        assert float(found[i]) == pytest.approx(expected, rel=1e-12)


def test_dash_refuses_more_directions_than_a_matrix_has(make_model):
    tuner = tuner_of("lora_dash", make_model("llama"), [], settings={"directions": 17})
    with pytest.raises(SuiteError, match=r"directions: 17.*only 16"):
        tuner.start()


# DoRA.


def test_dora_norm_is_a_constant_of_the_backward_pass(make_model, make_batches):
    """The gradients are those with ||V|| held fixed, and not those through it."""
    (batch,) = make_batches("llama", 1, DOUBLE)
    tuner = tuner_of("dora", make_model("llama", DOUBLE), [batch])
    tuner.start()
    randomise(tuner)
    tuner.ctx.model.train()
    backward(tuner, batch)
    for detached in (True, False):
        oracle, leaves = make_model("llama", DOUBLE).requires_grad_(False), {}
        for name, layer in tuner.ctx.adapters():
            a, b, mag = (getattr(layer, k).detach().clone() for k in ("A", "B", "mag"))
            leaves[name] = [t.requires_grad_() for t in (a, b, mag)]
            module = oracle.get_submodule(name)
            v = module.weight.detach() + layer.scale * b @ a
            norm = v.norm(dim=1)
            norm = norm.detach() if detached else norm
            del module._parameters["weight"]
            module.weight = (mag / norm)[:, None] * v
        oracle(**batch).loss.backward()
        far = [
            distance(getattr(layer, k).grad, leaf.grad)
            for name, layer in tuner.ctx.adapters()
            for k, leaf in zip(("A", "B", "mag"), leaves[name], strict=True)
        ]
        assert max(far) < 1e-9 if detached else max(far) > 1e-3


def _only(*roles):
    return {"magnitude_only": ",".join(roles)}


def test_dora_magnitude_only_modules(make_model, make_batches):
    batches = make_batches("llama", 2, DOUBLE)
    settings = _only("o", "gate", "up", "down")
    tuner = tuner_of("dora", make_model("llama", DOUBLE), batches, settings=settings)
    tuner.start()
    plain = make_model("llama", DOUBLE)
    assert distance(logits(tuner.ctx.model, batches[0]), logits(plain, batches[0])) < 1e-12
    randomise(tuner)
    light = [n for n, layer in tuner.ctx.adapters() if not hasattr(layer, "A")]
    assert len(light) == 4 * 4
    assert {n.split(".")[-1] for n in light} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    fresh = tuner_of("dora", make_model("llama", DOUBLE), [], settings=settings).ctx
    expected = 4 * (4 * (32 + 32) + 32 + 2 * (4 * (16 + 32) + 16)) + 4 * (32 + 48 + 48 + 32)
    assert tuner.trained_count() == tuner.method.total_parameters(fresh, 4) == expected
    decay = {n: g["weight_decay"] for g in tuner.parameter_groups(0.1) for n in g["names"]}
    assert all((value == 0) == name.endswith(".mag") for name, value in decay.items())
    train(tuner, batches, 3)

    for name, layer in tuner.ctx.adapters():
        module = plain.get_submodule(name)
        v = module.weight if name in light else module.weight + layer.delta()
        module.weight.data = (layer.mag / v.norm(dim=1))[:, None].detach() * v.detach()
    trained = logits(tuner.ctx.model, batches[0])
    assert distance(trained, logits(plain, batches[0])) < 1e-10
    loaded = tuner_of("dora", make_model("llama", DOUBLE), [], settings=settings)
    loaded.restore(tuner.tensors())
    assert torch.equal(logits(loaded.ctx.model, batches[0]), trained)
    tuner.merge()
    assert distance(logits(tuner.ctx.model, batches[0]), trained) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_magnitude_only_keeps_the_bases_bias_and_precision(dtype, make_model, make_batches):
    batches = make_batches("llava", 2, dtype)  # Qwen2: q, k and v have biases
    tuner = tuner_of("dora", make_model("llava", dtype), batches, settings=_only("q", "k"))
    tuner.start()
    moved = distance(
        logits(tuner.ctx.model, batches[0]), logits(make_model("llava", dtype), batches[0])
    )
    assert moved < (1e-6 if dtype == torch.float32 else 6 * 2**-8)
    randomise(tuner)
    train(tuner, batches, 2)
    unmerged = logits(tuner.ctx.model, batches[0])
    assert unmerged.dtype == dtype
    tuner.merge()
    bound = 1e-5 if dtype == torch.float32 else 6 * 2**-8
    assert distance(logits(tuner.ctx.model, batches[0]), unmerged) < bound


@pytest.mark.parametrize(
    ("modules", "roles", "says"),
    [
        (["q_proj", "v_proj"], ("o",), "magnitude_only: o; no module"),
        (["q_proj", "v_proj"], ("q", "v"), "rank has no meaning"),
    ],
)
def test_dora_magnitude_only_that_does_not_fit_is_refused(modules, roles, says, make_model):
    tuner = tuner_of("dora", make_model("llama"), [], modules=modules, settings=_only(*roles))
    with pytest.raises(SuiteError, match=says):
        tuner.start()


def test_dora_norm_of_a_cancelled_row_is_a_number():
    """B A = -W0 / s: rounding takes the sum below zero in some rows."""
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(s, generator=generator) for s in ((64, 4), (4, 48)))
    tuner = bank("dora", [b @ a], rank=4, steps=4)
    ((_, layer),) = tuner.ctx.adapters()
    with torch.no_grad():
        layer.A.copy_(a)
        layer.B.copy_(-b / layer.scale)
    norm = layer.norm()
    assert torch.isfinite(norm).all()
    assert (norm < 1e-2 * (b @ a).norm(dim=1)).all()


def test_dora_norm_of_a_bf16_base_is_summed_in_fp32(make_model, monkeypatch):
    tuner = tuner_of("dora", make_model("llama", torch.bfloat16), [])
    monkeypatch.setattr(tuner.method, "CHUNK", 70)  # two rows at once
    tuner.start()
    randomise(tuner)
    for _, layer in tuner.ctx.adapters():
        dense = layer.base.weight.double() + layer.scale * layer.B.double() @ layer.A.double()
        assert distance(layer.norm(), dense.norm(dim=1)) < 1e-6


def _magnitude_and_direction(weight, tuned):
    """Section 3: mean change of row norms, mean 1 - cosine of rows."""
    magnitude = (tuned.norm(dim=1) - weight.norm(dim=1)).abs().mean()
    cosine = torch.cosine_similarity(tuned, weight, dim=1)
    return float(magnitude), float((1 - cosine).mean())


def test_dora_magnitude_and_direction_fall_together_as_in_full_tuning_and_not_in_lora():
    """Section 3's analysis on matrices that need either much direction or much magnitude.

    The wanted matrices are diag(1 + a) (W0 + D), D of rank 2 and growing as a falls. Rescaled rows
    are a change of full rank: DoRA has it beside B A, LoRA of rank 2 must spend B A on it.
    """
    weights, wanted = [], []
    for i, share in enumerate(np.linspace(0.1, 0.9, 6)):
        weight = gaussian(20, 20, seed=i)
        low = gaussian(20, 2, seed=40 + i) @ gaussian(2, 20, seed=60 + i)
        signs = torch.sign(gaussian(20, seed=80 + i))
        gain = 1 + 0.5 * (1 - share) * signs
        turned = weight + share * low
        turned = turned * (weight.norm(dim=1) / turned.norm(dim=1))[:, None]
        weights.append(weight)
        wanted.append(gain[:, None] * turned)
    slopes = {}
    for name in ("lora", "dora"):
        tuner = bank(name, weights, 2, 150, 5e-2)
        train_bank(tuner, wanted, 150)
        slopes[name] = _slope(weights, [p.detach() for p in tuner.ctx.model.products()])
    slopes["full"] = _slope(weights, wanted)  # what training every entry converges to
    assert slopes["full"] < -0.5
    assert slopes["dora"] < -0.5
    assert slopes["lora"] > 0.2


def _slope(weights, tuned):
    """Correlation of the changes of magnitude and of direction over the matrices."""
    pairs = [_magnitude_and_direction(w, t) for w, t in zip(weights, tuned, strict=True)]
    return np.corrcoef(np.array(pairs).T)[0, 1]


# LoRASculpt.


def _layers(tuner):
    return [layer for _, layer in tuner.ctx.adapters()]


def _conflict(weight, a, b):
    share = weight.abs() / weight.square().sum().sqrt()
    mask = torch.tanh((1 / torch.log(share + 1e-15)).abs())
    return (mask * (b @ a)).square().sum().sqrt()


@pytest.mark.parametrize(("keep", "chunk"), list(itertools.product([True, False], [1, 100, 2**18])))
def test_sculpt_conflict_gradient_is_exact_in_chunks(keep, chunk, make_model, monkeypatch):
    settings = {"alpha": 0.4, "keep_importance": keep}
    tuner = tuner_of("lorasculpt", make_model("llama", DOUBLE), [], settings=settings)
    monkeypatch.setattr(tuner.method, "CHUNK", chunk)
    tuner.start()
    randomise(tuner)
    for _ in range(2):  # computed, and kept
        tuner.ctx.model.zero_grad()
        tuner.penalty().backward()
    penalised = [
        layer
        for name, layer in tuner.ctx.adapters()
        if name.endswith(("q_proj", "k_proj", "v_proj"))
    ]
    pairs = [[p.detach().clone().requires_grad_() for p in (la.A, la.B)] for la in penalised]
    parts = [_conflict(la.base.weight, *pair) for la, pair in zip(penalised, pairs, strict=True)]
    (0.4 * sum(parts) / len(parts)).backward()
    for layer, (a, b) in zip(penalised, pairs, strict=True):
        assert distance(layer.A.grad, a.grad) < 1e-12
        assert distance(layer.B.grad, b.grad) < 1e-12
    others = [p for n, p in tuner.ctx.trainable().items() if "o_proj" in n or "mlp" in n]
    assert all(p.grad is None for p in others)


class Largest(TorchDispatchMode):
    """Notes the size of the largest new tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if made.untyped_storage().data_ptr() not in given:  # neither a view nor in place
                self.entries = max(self.entries, made.numel())
        return made


def test_sculpt_conflict_holds_a_chunk_and_no_matrix(monkeypatch):
    weight = gaussian(128, 128)
    tuner = bank("lorasculpt", [weight], 4, 4, keep_importance=False)
    ((_, layer),) = tuner.ctx.adapters()
    monkeypatch.setattr(tuner.method, "CHUNK", 1024)
    monkeypatch.setattr(tuner.method, "PENALISED", (None,))  # a bank's maps have no role
    randomise(tuner)
    tuner.penalty()  # the weight's norm is taken once
    with Largest() as noted:
        tuner.penalty().backward()
    assert layer.A.grad.any()
    assert 512 <= noted.entries <= 1024 < weight.numel()


def test_chunks_are_larger_on_a_gpu_alone_also_those_of_imported_methods(monkeypatch):
    modules = {
        name: load_method(METHODS / f"{name}.py") for name in ("dvora", "dora", "lorasculpt")
    }
    for name, size in (("dora", 2**20), ("lorasculpt", 2**18)):
        monkeypatch.setattr(modules[name], "CHUNK", size)
    fit_chunks(modules["lorasculpt"], torch.device("cpu"))
    assert modules["lorasculpt"].CHUNK == 2**18
    fit_chunks(modules["dvora"], torch.device("cuda"))
    assert modules["dora"].CHUNK == modules["lorasculpt"].CHUNK == GPU_CHUNK
    monkeypatch.setattr(modules["dora"], "CHUNK", 2 * GPU_CHUNK)
    fit_chunks(modules["dora"], torch.device("cuda"))
    assert modules["dora"].CHUNK == 2 * GPU_CHUNK


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed")
def test_a_method_on_a_gpu_has_large_chunks(make_model, monkeypatch):
    tuner = tuner_of("dora", make_model("llama").cuda(), [])
    monkeypatch.setattr(tuner.method, "CHUNK", 2**20)
    tuner.start()
    assert tuner.method.CHUNK == GPU_CHUNK


def test_sculpt_mask_alone_conflict_alone_and_connector_alone(make_model, make_batches):
    batches = make_batches("llava", 2, DOUBLE)

    def run(**settings):
        model = make_model("llava", DOUBLE)
        tuner = tuner_of("lorasculpt", model, batches, connector="adapted", settings=settings)
        tuner.start()
        randomise(tuner)
        before = tuner.penalty()
        train(tuner, batches, 4)
        dense = {n: bool(layer.A.all() and layer.B.all()) for n, layer in tuner.ctx.adapters()}
        touched = set()
        if before is not None:
            tuner.ctx.model.zero_grad()
            tuner.penalty().backward()
            touched = {
                "connector" if tuner.ctx.in_connector(n) else "language"
                for n, layer in tuner.ctx.adapters()
                if layer.A.grad is not None
            }
        masked = any(layer.mask_A is not None for layer in _layers(tuner))
        assert masked == (settings.get("density") != 1.0)  # no masks of ones are stored
        pruned = {tuner.ctx.in_connector(n) for n, whole in dense.items() if not whole}
        return touched, pruned

    assert run(alpha=0.0, beta=0.0) == (set(), {False})
    assert run(density=1.0) == ({"language", "connector"}, set())
    assert run(alpha=0.0, density=1.0, beta=1.0) == ({"connector"}, set())


def test_sculpt_density_of_a_product_by_simulation():
    """E[s_BA] = 1 - (1 - s_A s_B)^r, and its concentration, over draws of Bernoulli masks."""
    tuner = bank("lorasculpt", [gaussian(9, 9)], 2, 4)
    size, rank, a, b, draws = 64, 8, 0.2, 0.3, 300
    generator = torch.Generator().manual_seed(0)
    left = (torch.rand(draws, size, rank, generator=generator) < b).float()
    right = (torch.rand(draws, rank, size, generator=generator) < a).float()
    found = ((left @ right) > 0).float().mean((1, 2)).numpy()
    theory = tuner.method.product_density(a, b, rank)
    assert theory == pytest.approx(1 - (1 - 0.06) ** 8)
    assert abs(found.mean() - theory) < 4 * found.std() / draws**0.5
    for delta in (0.02, 0.05, 0.1):
        bound = 2 * np.exp(-2 * delta**2 * size * size / (rank * 2 * size))
        assert (np.abs(found - theory) >= delta).mean() <= bound

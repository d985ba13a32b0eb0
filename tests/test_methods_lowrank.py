"""LoRA's relatives: VeRA, DVoRA, FLoRA, LoRA-FA, decayed LoRA, CLoRA, PEGO, CorDA; rsLoRA's law.

PEFT is the oracle for VeRA, for LoRA-FA's projected gradient (its optimiser) and for CorDA's start;
for the rest it is the formula, dense and in float64. Deviations of PEFT that these tests show:
  * its LoRA-FA is the projected version, with 1e-8 on the diagonal of A A^T;
  * its CorDA starts in fp32 only, so that the two agree to fp32's precision.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from torch.func import functional_call

from ballast.context import Context
from ballast.declare import read_method
from ballast.decompositions import Decompositions
from ballast.errors import MethodError, SuiteError
from ballast.tuner import Tuner, load_method
from tiny import METHODS, backward, distance, logits, randomise, train, tuner_of

DOUBLE = torch.float64
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def started(make_model, make_batches):
    """started(name, kind, random=True, **options) -> (started float64 tuner, batches)."""

    def start(name, kind="llama", random=True, dtype=DOUBLE, **options):
        batches = make_batches(kind, 3, dtype)
        tuner = tuner_of(name, make_model(kind, dtype), batches, **options)
        tuner.start()
        if random:
            randomise(tuner)
        return tuner, batches

    return start


def effective(model, tuner, weight_of):
    """Logits and gradients of the plain base with weights that `weight_of` makes from leaves.

    weight_of(name, W0, leaves) -> W; leaves are copies of the adapter's parameters that require a
    gradient, so that plain autograd on a dense matrix is the oracle.
    """
    leaves, weights = {}, {}
    for name, layer in tuner.ctx.adapters():
        own = {k: v for k, v in layer.named_parameters() if not k.startswith("base.")}
        leaves[name] = {k: v.detach().clone().requires_grad_() for k, v in own.items()}
        base = model.get_submodule(name).weight.detach()
        weights[f"{name}.weight"] = weight_of(name, base, leaves[name])
    return leaves, weights


def assert_like_dense(tuner, plain, batch, weight_of):
    """Outputs and gradients equal those of the plain model with dense weights."""
    leaves, weights = effective(plain, tuner, weight_of)
    out = functional_call(plain, weights, kwargs=dict(batch))
    assert distance(logits(tuner.ctx.model, batch), out.logits) < 1e-12
    tuner.ctx.model.zero_grad()
    tuner.ctx.model(**batch).loss.backward()
    out.loss.backward()
    for name, layer in tuner.ctx.adapters():
        for short, leaf in leaves[name].items():
            assert leaf.grad.any(), (name, short)
            assert distance(getattr(layer, short).grad, leaf.grad) < 1e-9, (name, short)


# VeRA


@pytest.fixture
def vera_pair(make_model, make_batches):
    """Ours and PEFT's with the same shared pair and the same random vectors, in float64."""

    def make(kind, rank=6):
        batches = make_batches(kind, 3, DOUBLE)
        tuner = tuner_of("vera", make_model(kind, DOUBLE), batches, rank=rank)
        tuner.start()
        scope = r".*language_model\..*" if kind == "llava" else ".*"
        config = peft.VeraConfig(
            r=rank, target_modules=rf"{scope}layers\.\d+\..*\.({'|'.join(LEAVES)})", d_initial=0.1
        )
        wrapped = peft.get_peft_model(make_model(kind), config).double()
        inner = wrapped.base_model
        for short in ("A", "B"):
            theirs = getattr(inner, f"vera_{short}")["default"]
            assert tuple(tuner.ctx.state[short].shape) == tuple(theirs.shape)
            bound = theirs.abs().max()  # the same distribution: kaiming uniform, gain sqrt 2
            assert tuner.ctx.state[short].abs().max() == pytest.approx(float(bound), rel=0.05)
            theirs.copy_(tuner.ctx.state[short])
        pairs = []
        for name, layer in tuner.ctx.adapters():
            other = inner.model.get_submodule(name)
            assert other.vera_A["default"].shape[1] >= layer.A.shape[1]
            pairs.append((layer.b, other.vera_lambda_b["default"]))
            pairs.append((layer.d, other.vera_lambda_d["default"]))
            assert torch.allclose(layer.d, other.vera_lambda_d["default"])  # 0.1
            assert not layer.b.any()
        randomise(tuner)
        with torch.no_grad():
            for own, other in pairs:
                other.copy_(own)
        return tuner, wrapped, pairs, batches

    return make


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("rank", [6, 40])  # 40 exceeds every matrix but the widest
def test_vera_is_pefts_over_steps(kind, rank, vera_pair):
    tuner, wrapped, pairs, batches = vera_pair(kind, rank)
    assert len(pairs) == len(tuner.ctx.trainable())
    assert distance(logits(tuner.ctx.model, batches[0]), logits(wrapped, batches[0])) < 1e-12
    rates = {id(p): g for g in tuner.parameter_groups(0.1) for p in g["params"]}
    groups = [
        {"params": [o], "lr": rates[id(p)]["lr"], "weight_decay": rates[id(p)]["weight_decay"]}
        for p, o in pairs
    ]
    optimiser = torch.optim.AdamW(groups)
    train(tuner, batches, 4)
    wrapped.train()
    for step in range(4):
        optimiser.zero_grad()
        wrapped(**batches[step % 3]).loss.backward()
        torch.nn.utils.clip_grad_norm_([o for _, o in pairs], 1.0)
        optimiser.step()
    assert all(distance(own, other) < 1e-9 for own, other in pairs)
    assert distance(logits(tuner.ctx.model, batches[0]), logits(wrapped, batches[0])) < 1e-9


@pytest.mark.parametrize("way", ["low", "dense", "gradient"])
@pytest.mark.parametrize("name", ["vera", "dvora"])
def test_vera_has_the_same_gradients_on_every_way(name, way, started, make_model, monkeypatch):
    tuner, batches = started(name, rank=6)
    monkeypatch.setattr(tuner.method.Vera, "way", lambda self, rows: way)
    plain, state = make_model("llama", DOUBLE), tuner.ctx.state

    def weight_of(_, base, leaf):
        m, n = base.shape
        a, b = state["A"][:, :n], state["B"][:m]
        turned = base + torch.diag(leaf["b"]) @ b @ torch.diag(leaf["d"]) @ a
        if name == "vera":
            return turned
        norm = turned.detach().square().sum(1).sqrt()  # a constant, as in DoRA
        return torch.diag(leaf["mag"] / norm) @ turned

    assert_like_dense(tuner, plain, batches[0], weight_of)


def test_vera_way_is_the_cheapest(started):
    cost = load_method(METHODS / "vera.py").multiplications
    # One token: the frozen layer's own size decides; many tokens and a large rank: dL/dW.
    assert min(cost(1, 64, 64, 8, True).items(), key=lambda i: i[1])[0] == "low"
    assert min(cost(1024, 512, 512, 16, True).items(), key=lambda i: i[1])[0] == "dense"
    assert min(cost(1024, 512, 512, 1024, True).items(), key=lambda i: i[1])[0] == "gradient"
    tuner, _ = started("vera", rank=40)
    layer = next(layer for _, layer in tuner.ctx.adapters())  # 32 x 32
    rows = torch.zeros(30, 32, dtype=DOUBLE)
    assert layer.way(rows) == min(
        cost(30, 32, 32, 40, True), key=lambda k: cost(30, 32, 32, 40, True)[k]
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.way(rows) == "low"
    assert layer.way(rows.float()) == "low"  # another precision than the weight's


@pytest.mark.parametrize("name", ["vera", "dvora"])
def test_vera_shares_one_pair_that_is_stored_once(name, started, make_model):
    tuner, _ = started(name, "llava", connector="adapted", rank=6)
    state = tuner.ctx.state
    layers = [layer for _, layer in tuner.ctx.adapters()]
    assert {layer.A.data_ptr() for layer in layers} == {state["A"].data_ptr()}
    assert {layer.B.data_ptr() for layer in layers} == {state["B"].data_ptr()}
    stored = tuner.tensors()
    frozen = [k for k in stored if k.endswith((".A", ".B"))]
    assert frozen == ["state.A", "state.B"]
    sides = [layer.base.weight.shape for layer in layers]
    assert state["A"].shape == (6, max(n for _, n in sides))
    assert state["B"].shape == (max(m for m, _ in sides), 6)


def test_vera_decays_neither_d_nor_a_magnitude(started):
    tuner, _ = started("dvora")
    decay = {n: g["weight_decay"] for g in tuner.parameter_groups(0.1) for n in g["names"]}
    assert all((value == 0) == (not name.endswith(".b")) for name, value in decay.items())
    tuner, _ = started("vera")
    decay = {n: g["weight_decay"] for g in tuner.parameter_groups(0.1) for n in g["names"]}
    assert all((value == 0) == name.endswith(".d") for name, value in decay.items())


def test_vera_refuses_a_rank_that_cannot_be_meant(make_model):
    with pytest.raises(SuiteError, match="rank 0: allowed here are 1 to 65536"):
        tuner_of("vera", make_model("llama"), [], rank=0).start()


@pytest.mark.parametrize("rank", [6, 60])  # the norm from its parts, and of a formed matrix
def test_dvora_norm_follows_every_step(rank, started):
    tuner, batches = started("dvora", rank=rank)
    optimiser = torch.optim.AdamW(tuner.parameter_groups(0.1), fused=True)
    for _ in range(2):
        train(tuner, batches, 1, optimiser)
        with torch.no_grad():
            for _, layer in tuner.ctx.adapters():
                assert (layer.C is None) == (rank >= layer.base.weight.shape[1])
                dense = layer.base.weight + layer.delta()
                for _ in range(2):  # computed, and kept
                    assert distance(layer.norm(), dense.norm(dim=1)) < 1e-12
                layer.b.mul_(2)
                dense = layer.base.weight + layer.delta()
                assert distance(layer.norm(), dense.norm(dim=1)) < 1e-12


# FLoRA


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_flora_is_its_formula(kind, started, make_model):
    tuner, batches = started("flora", kind)
    plain = make_model(kind, DOUBLE)

    def weight_of(_, base, leaf):
        return base + 2.0 * leaf["B"] @ leaf["G"] @ leaf["A"]

    assert_like_dense(tuner, plain, batches[0], weight_of)


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_flora_starts_with_a_zero_core_between_random_factors(start, started):
    tuner, batches = started("flora", random=False, rank=16, settings={"start": start})
    for _, layer in tuner.ctx.adapters():
        assert not layer.G.any()
        for factor in (layer.A, layer.B):
            if start == "gaussian":
                assert 0.9 * 0.02 < factor.std() < 1.1 * 0.02
            else:  # A bounded by its inputs, B by r: both are fed that many numbers
                bound = factor.shape[1] ** -0.5
                assert 0.98 * bound < factor.abs().max() <= bound
    backward(tuner, batches[0])
    for name, parameter in tuner.ctx.trainable().items():
        assert bool(parameter.grad.any()) == name.endswith(".G"), name


# LoRA-FA


@pytest.mark.parametrize("modules", ["all", ["q_proj", "embed_tokens"]])
def test_lora_fa_is_lora_with_one_factor_frozen(modules, started):
    tuner, batches = started("lora_fa", modules=modules)
    oracle, _ = started("lora", modules=modules)
    frozen = {}
    with torch.no_grad():
        for (name, own), (_, other) in zip(
            tuner.ctx.adapters(), oracle.ctx.adapters(), strict=True
        ):
            other.A.copy_(own.A)
            other.B.copy_(own.B)
            short = "B" if own.is_embedding else "A"
            getattr(other, short).requires_grad_(False)
            frozen[name] = getattr(own, short).clone()
    oracle.ctx.trained = tuple(n for n, p in oracle.ctx.trainable().items() if p.requires_grad)
    assert set(oracle.ctx.trainable()) == set(tuner.ctx.trainable())
    train(tuner, batches, 3)
    train(oracle, batches, 3)
    for (name, own), (_, other) in zip(tuner.ctx.adapters(), oracle.ctx.adapters(), strict=True):
        assert torch.equal(own.A, other.A)
        assert torch.equal(own.B, other.B)
        assert torch.equal(frozen[name], own.B if own.is_embedding else own.A)


def test_lora_fa_projected_is_pefts_optimiser(started, make_model, monkeypatch):
    tuner, batches = started("lora_fa", settings={"projected": True})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LEAVES)
    wrapped = peft.get_peft_model(make_model("llama"), config).double()
    pairs = []
    with torch.no_grad():
        for name, layer in tuner.ctx.adapters():
            other = wrapped.base_model.model.get_submodule(name)
            other.lora_A.default.weight.copy_(layer.A)
            other.lora_B.default.weight.copy_(layer.B)
            pairs.append((layer.B, other.lora_B.default.weight))
    theirs = create_lorafa_optimizer(wrapped, r=4, lora_alpha=8, lr=1e-2)
    for group in theirs.param_groups:
        group["eps"] = 1e-30  # added before the bias correction there, after it in AdamW
    ours = torch.optim.AdamW(tuner.parameter_groups(0.0), eps=1e-30)
    pinv, extra = torch.linalg.pinv, 1e-8 * torch.eye(4)  # what PEFT adds to A A^T, taken off
    monkeypatch.setattr(torch.linalg, "pinv", lambda matrix: pinv(matrix - extra))
    for step in range(3):
        for optimiser in (ours, theirs):
            optimiser.zero_grad()
        backward(tuner, batches[step])
        tuner.after_backward()
        ours.step()
        wrapped(**batches[step]).loss.backward()
        theirs.step()
        assert all(distance(own, other) < 1e-9 for own, other in pairs), step


def test_lora_fa_projection_is_the_step_nearest_to_full_tunings(started):
    """s (g_B') A with g_B' = g_B (A A^T)^-1 / s^2 is G's projection on A's row space."""
    tuner, batches = started("lora_fa", settings={"projected": True, "alpha_over_r": 3.0})
    _, layer = next(iter(tuner.ctx.adapters()))
    inputs, grads = [], []
    layer.base.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()))
    layer.register_forward_hook(lambda _, x, y: y.register_hook(grads.append) and None)
    backward(tuner, batches[0])
    tuner.after_backward()
    full = grads[0].flatten(0, -2).T @ inputs[0]
    onto = torch.linalg.pinv(layer.A) @ layer.A
    assert distance(3.0 * layer.B.grad @ layer.A, full @ onto) < 1e-9


# LoRA with weight decay


def test_lora_wd_differs_from_lora_by_its_decay_alone(started):
    tuner, batches = started("lora_wd", settings={"weight_decay": 0.3})
    oracle, _ = started("lora")
    assert {g["weight_decay"] for g in tuner.parameter_groups(0.0)} == {0.3}
    assert tuner.ctx.hyper.weight_decay == 0.3
    train(tuner, batches, 3)  # with 0.1 asked of both by the suite
    train(oracle, batches, 3, torch.optim.AdamW(oracle.parameter_groups(0.3)))
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            tuner.ctx.trainable().values(), oracle.ctx.trainable().values(), strict=True
        )
    )


def test_lora_wd_has_the_default_and_the_bounds_of_its_docstring():
    file = read_method(METHODS / "lora_wd.py")
    assert file.settings({})["weight_decay"] == 0.25
    for wrong in (-0.1, 1.5):
        with pytest.raises(MethodError, match="weight_decay"):
            file.settings({"weight_decay": wrong})


# CLoRA


@pytest.mark.parametrize(("k", "share", "of_32"), [(512, 0.125, 4), (3, 0.5, 3), (512, 1.0, 32)])
def test_clora_penalty_is_the_formula(k, share, of_32, started):
    tuner, _ = started("clora", settings={"strength": 0.7, "k": k, "share": share})
    expected = 0.0
    bases = tuner.method.subspaces(tuner.ctx)
    for (_, layer), (u, v) in zip(tuner.ctx.adapters(), bases, strict=True):
        for basis in (u, v):
            identity = torch.eye(basis.shape[1], dtype=DOUBLE)
            assert distance(basis.T @ basis, identity) < 1e-12
        for row in layer.A.detach():
            expected += 0.5 * sum(float(row @ column) ** 2 for column in v.T)
        for column in layer.B.detach().T:
            expected += 0.5 * sum(float(column @ other) ** 2 for other in u.T)
    assert bases[0][1].shape == (32, of_32)
    assert tuner.penalty().item() == pytest.approx(0.7 * expected, rel=1e-10)
    if share == 1.0:  # every direction forbidden: plain L2
        norms = sum(float(p.detach().square().sum()) for p in tuner.ctx.trainable().values())
        assert tuner.penalty().item() == pytest.approx(0.35 * norms, rel=1e-10)


def test_clora_draws_the_same_subspaces_again_and_others_for_another_seed(started, make_model):
    tuner, _ = started("clora")
    again = tuner_of("clora", make_model("llama", DOUBLE), [], seed=5)
    again.restore(tuner.tensors())
    other, _ = started("clora", seed=1)
    subspaces = [t.method.subspaces(t.ctx)[0] for t in (tuner, again, other)]
    assert torch.equal(subspaces[0][0], subspaces[1][0])
    assert torch.equal(subspaces[0][1], subspaces[1][1])
    assert not torch.equal(subspaces[0][0], subspaces[2][0])
    assert not any("subspace" in name for name in tuner.tensors())


def test_clora_moves_the_update_out_of_the_forbidden_subspaces(started):
    shares = []
    for strength in (0.0, 50.0):
        tuner, batches = started("clora", settings={"strength": strength, "share": 0.5})
        train(tuner, batches, 15)
        shares.append(tuner.report()["forbidden_share_a"])
        _, layer = next(iter(tuner.ctx.adapters()))
        _, v = tuner.method.subspaces(tuner.ctx)[0]
    assert shares[0] > 0.3
    assert shares[1] < 0.5 * shares[0]
    # An input along a forbidden direction is answered as the base answers it, more or less.
    change = torch.linalg.vector_norm(layer.delta() @ v, dim=0).mean()
    free = torch.linalg.qr(torch.eye(32, dtype=DOUBLE) - v @ v.T)[0][:, :16]
    assert change < torch.linalg.vector_norm(layer.delta() @ free, dim=0).mean()


# PEGO


def _pego_terms(tuner, groups):
    """The two sums by loops over groups, with dense products, and leaves for autograd."""
    preserve = diversify = 0.0
    leaves = []
    for _, layer in tuner.ctx.adapters():
        a = layer.A.detach().clone().requires_grad_()
        b = layer.B.detach().clone().requires_grad_()
        leaves += [a, b]
        weight = layer.base.weight.detach()
        weight = weight.T if layer.is_embedding else weight
        each = len(a) // groups
        updates = [
            b[:, i * each : (i + 1) * each] @ a[i * each : (i + 1) * each] for i in range(groups)
        ]
        for i, update in enumerate(updates):
            preserve = preserve + (weight @ update.T).abs().sum()
            for other in updates[i + 1 :]:
                diversify = diversify + (update @ other.T).abs().sum()
    return preserve, diversify, leaves


@pytest.mark.parametrize("chunk", [2**22, 40])  # one product, and rows in chunks
@pytest.mark.parametrize("modules", ["all", ["q_proj", "down_proj", "embed_tokens"]])
def test_pego_penalty_and_gradient_are_the_formulas(chunk, modules, started, monkeypatch):
    tuner, _ = started("orth_reg", rank=2, modules=modules, settings={"groups": 3})
    monkeypatch.setattr(tuner.method, "CHUNK", chunk)
    preserve, diversify, leaves = _pego_terms(tuner, 3)
    penalty = tuner.penalty()
    assert penalty.item() == pytest.approx(1e-3 * (preserve + diversify).item(), rel=1e-10)
    assert tuner.report()["preserve"] == pytest.approx(preserve.item(), rel=1e-10)
    assert tuner.report()["diversify"] == pytest.approx(diversify.item(), rel=1e-10)
    penalty.backward()
    (1e-3 * (preserve + diversify)).backward()
    found = [p.grad for _, layer in tuner.ctx.adapters() for p in (layer.A, layer.B)]
    assert all(distance(own, leaf.grad) < 1e-10 for own, leaf in zip(found, leaves, strict=True))


def test_pego_is_a_sum_of_loras_with_scale_one(started, make_model):
    tuner, batches = started("orth_reg", rank=2, settings={"groups": 3})

    def weight_of(_, base, leaf):
        parts = [leaf["B"][:, i : i + 2] @ leaf["A"][i : i + 2] for i in (0, 2, 4)]
        return base + parts[0] + parts[1] + parts[2]

    assert_like_dense(tuner, make_model("llama", DOUBLE), batches[0], weight_of)
    assert tuner.trained_count() == tuner.method.total_parameters(tuner.ctx, 2)


def test_pego_starts_without_a_pull_and_then_keeps_the_weight_apart(started):
    tuner, batches = started("orth_reg", random=False, rank=2)
    penalty = tuner.penalty()
    penalty.backward()
    assert penalty.item() == 0
    assert not any(p.grad.any() for p in tuner.ctx.trainable().values())
    found = []
    for strength in (0.0, 1e-2):
        tuner, batches = started("orth_reg", rank=2, settings={"strength": strength})
        train(tuner, batches, 10)
        found.append(tuner.report())
    assert found[1]["preserve"] < 0.7 * found[0]["preserve"]
    assert found[1]["diversify"] < 0.7 * found[0]["diversify"]


def test_pego_refuses_more_rank_than_orthogonal_groups_can_share(make_model):
    tuner = tuner_of("orth_reg", make_model("llama"), [], rank=5)
    assert 5 not in tuner.method.allowed_sizes(tuner.ctx)
    with pytest.raises(SuiteError, match=r"rank 5 .*k_proj.* at most 16, so each has at most 4"):
        tuner.start()


# CorDA


def _peft_corda(model, batches, mode):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=LEAVES,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )

    def run_model():
        for batch in batches:
            for i in range(len(batch["input_ids"])):
                model(**{k: v[i : i + 1] for k, v in batch.items() if k != "labels"})

    preprocess_corda(model, config, run_model=run_model)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_starts_as_pefts(mode, make_model, make_batches):
    batches = make_batches("llama", 8, torch.float32, size=4)
    tuner = tuner_of("corda", make_model("llama"), batches, settings={"mode": mode})
    tuner.start()
    wrapped = _peft_corda(make_model("llama"), batches, mode)
    for name, layer in tuner.ctx.adapters():
        other = wrapped.base_model.model.get_submodule(name)
        product = other.lora_B.default.weight @ other.lora_A.default.weight
        # Components that lie close together are free within their span in fp32: products agree.
        size = torch.linalg.vector_norm(layer.base.weight)
        assert torch.linalg.vector_norm(layer.B @ layer.A - product) < 1e-3 * size, name
        assert distance(layer.base.weight, other.base_layer.weight) < 1e-3, name


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_is_its_formula(mode, make_model, make_batches):
    batches = make_batches("llama", 4, DOUBLE)
    for batch in batches:  # padding carries no knowledge
        batch["attention_mask"][0, 7:] = 0
    tuner = tuner_of("corda", make_model("llama", DOUBLE), batches, settings={"mode": mode})
    tuner.start()
    plain, seen = make_model("llama", DOUBLE), {}
    names = [name for name, _ in tuner.ctx.adapters()]
    for name in names:
        plain.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: seen.setdefault(name, []).append(x[0][0])
        )
    for batch in batches:
        for i in range(3):
            length = int(batch["attention_mask"][i].sum())
            plain(input_ids=batch["input_ids"][i : i + 1, :length])
    for name, layer in tuner.ctx.adapters():
        weight = plain.get_submodule(name).weight.detach()
        scaled = [x / abs(x.max()) for x in seen[name]]
        c = sum(x.T @ x for x in scaled) / len(scaled)
        c = c + 0.01 * c.diag().mean() * torch.eye(len(c), dtype=DOUBLE)
        u, s, vh = torch.linalg.svd(weight @ c, full_matrices=False)
        pick = slice(-4, None) if mode == "kpm" else slice(4)
        part = u[:, pick] @ torch.diag(s[pick]) @ vh[pick] @ torch.linalg.inv(c)
        assert distance(layer.B @ layer.A, part) < 1e-8, name
        assert distance(layer.base.weight, weight - part) < 1e-9, name
        # On the sampled inputs the part that trains weighs what its singular values say.
        lost = torch.linalg.matrix_norm((weight - layer.base.weight) @ c)
        assert lost.item() == pytest.approx(s[pick].norm().item(), rel=1e-8)


def test_corda_damping_doubles_until_the_inverse_is_good(monkeypatch):
    decompose = load_method(METHODS / "corda.py").decompose
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=generator) * torch.logspace(0, -9, 32)
    weight, identity = torch.randn(8, 32, generator=generator), torch.eye(32)
    c, damping, tried = x.T @ x, 1e-12, 0
    while True:
        damped = c + damping * c.diag().mean() * identity
        inverse = damped.inverse()
        if float((damped @ inverse - identity).norm()) < 0.05:
            break
        damping, tried = 2 * damping, tried + 1
    assert tried > 1  # 1e-12 leaves an inverse that is far off in fp32
    inv, inverted = torch.linalg.inv, []
    monkeypatch.setattr(torch.linalg, "inv", lambda m: inv(inverted.append(m) or m))
    u, s, v = decompose("layer", weight, c, 1e-12, 0.05)
    assert len(inverted) == tried + 1
    assert torch.equal(inverted[-1], damped)
    assert distance((u * s) @ v.T, weight) < 0.05  # as good as the inverse was asked to be
    with pytest.raises(SuiteError, match="layer: the covariance of its inputs has no inverse"):
        decompose("layer", weight, torch.zeros(32, 32), 0.01, 0.05)
    with pytest.raises(SuiteError, match="no inverse"):
        decompose("layer", weight, torch.full((32, 32), torch.nan), 0.01, 0.05)


def test_corda_restores_without_samples_or_decomposition(started, make_model, monkeypatch):
    tuner, batches = started("corda", dtype=torch.float32)
    stored = tuner.tensors()
    loaded = tuner_of("corda", make_model("llama"), [])
    loaded.ctx.batches = None
    monkeypatch.setattr(torch.linalg, "svd", None)
    loaded.restore(stored)
    assert torch.equal(logits(loaded.ctx.model, batches[0]), logits(tuner.ctx.model, batches[0]))


# rsLoRA's law


def _on_one_layer(name, rank, settings):
    """A method on one Linear of 2,048 x 2,048, started."""
    file = read_method(METHODS / f"{name}.py")
    module = load_method(file.path)
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False)).requires_grad_(False)
    hyper = getattr(module, "Hyper", file.hyper)(**file.settings(settings))
    ctx = Context(
        model=model,
        anatomy=None,
        hyper=hyper,
        rank=rank,
        targets=("0",),
        generator=torch.Generator().manual_seed(rank),
        cache=Decompositions(),
        total_steps=1,
        learning_rate=1e-4,
    )
    Tuner(module, ctx).start()
    return model


def test_rslora_gradient_does_not_fall_with_the_rank():
    """||dL/dB|| at step 0: constant for s = 8 / sqrt r, falling as r^-1/2 for LoRA's s = 8 / r."""
    ranks = [4, 32, 256, 2048]
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(128, 2048, generator=generator) for _ in range(2))
    norms = {"rslora": [], "lora": []}
    for rank in ranks:
        for name, settings in (("rslora", {"alpha": 8.0}), ("lora", {"alpha_over_r": 8.0 / rank})):
            model = _on_one_layer(name, rank, settings)
            (model(x) * g).sum().backward()
            norms[name].append(float(torch.linalg.vector_norm(model[0].B.grad)))
    for rank, stable, falling in zip(ranks, norms["rslora"], norms["lora"], strict=True):
        assert stable == pytest.approx(norms["rslora"][-1], rel=0.1)
        assert falling * rank**0.5 == pytest.approx(norms["lora"][-1] * 2048**0.5, rel=0.1)
    slopes = {
        name: torch.linalg.lstsq(
            torch.tensor([[float(torch.tensor(float(r)).log()), 1.0] for r in ranks]),
            torch.tensor(found).log()[:, None],
        ).solution[0, 0]
        for name, found in norms.items()
    }
    assert abs(slopes["rslora"]) < 0.02
    assert abs(slopes["lora"] + 0.5) < 0.02


# All of them


@pytest.mark.parametrize("name", ["vera", "dvora", "corda"])
def test_embeddings_are_refused_where_the_method_has_no_form_for_them(name, make_model):
    options = {"modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(SuiteError, match=r"modules: \S*embed_tokens is an embedding"):
        tuner_of(name, make_model("llama"), [], **options).start()


@pytest.mark.parametrize("name", ["flora", "lora_fa", "lora_wd", "clora", "orth_reg"])
def test_embeddings_train_where_lora_trains_them(name, started):
    tuner, batches = started(name, modules=["q_proj", "embed_tokens"], rank=2)
    plain = copy.deepcopy(tuner.ctx.model)
    train(tuner, batches, 2)
    embedding, before = tuner.ctx.model.model.embed_tokens, plain.model.embed_tokens
    assert not torch.equal(embedding.delta(), before.delta())

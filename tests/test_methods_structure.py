"""DiSHA (Bone, Bat), FourierFT and the Spectral Adapter against PEFT, dense oracles and theorems.

Where PEFT deviates from the papers:
  * MiSS sums every r-th input, the paper r blocks of neighbouring inputs; ours has both;
  * FourierFT's transform is in single precision whatever the model's, so that 1e-5 is its bound.
"""

from __future__ import annotations

import math

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ballast.budget import resolve
from ballast.declare import read_method
from ballast.decompositions import Decompositions
from ballast.disha import Blocks
from ballast.errors import MethodError, SuiteError
from ballast.tuner import load_method
from tiny import METHODS, backward, distance, logits, randomise, same_bytes, train, tuner_of

DOUBLE = torch.float64
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REGEX = rf".*layers\.\d+\..*\.({'|'.join(LEAVES)})"


def of_shape(tuner, m, n):
    """The first adapted layer of that shape."""
    return next(a for _, a in tuner.ctx.adapters() if tuple(a.base.weight.shape) == (m, n))


def method(name):
    return load_method(METHODS / f"{name}.py")


def own(layer):
    """The layer's trained parameters by name."""
    return {n: p for n, p in layer.named_parameters() if not n.startswith("base.")}


def assert_same_course(tuner, other, pairs, batches, steps=3, bound=1e-9):
    """Outputs, gradients and values over AdamW steps agree; pairs: (name, ours, the other's)."""
    assert len(pairs) == len(tuner.ctx.trainable()) > 0
    batch = batches[0]
    assert distance(logits(tuner.ctx.model, batch), logits(other, batch)) < bound
    backward(tuner, batch)
    other.zero_grad()
    other(**batch).loss.backward()
    for name, ours, theirs in pairs:
        assert ours.grad.any(), name
        assert distance(ours.grad, theirs.grad) < bound, name
    rates = {id(p): g for g in tuner.parameter_groups(0.1) for p in g["params"]}
    groups = [
        {"params": [p], "lr": rates[id(o)]["lr"], "weight_decay": rates[id(o)]["weight_decay"]}
        for _, o, p in pairs
    ]
    optimiser = torch.optim.AdamW(groups)
    train(tuner, batches, steps)
    other.train()
    for step in range(steps):
        optimiser.zero_grad()
        other(**batches[step % len(batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, _, p in pairs], 1.0)
        optimiser.step()
    for name, ours, theirs in pairs:
        assert distance(ours, theirs) < bound, name
    assert distance(logits(tuner.ctx.model, batch), logits(other, batch)) < bound


# Against PEFT.

MISS = {
    "bone": ("bone", 4, {"grouping": "strided"}, {"init_weights": True}),
    "bone, r does not divide n": ("bone", 5, {"grouping": "strided"}, {"init_weights": True}),
    "bone mini": (
        "disha",
        4,
        {"grouping": "strided", "tile": 8},
        {"init_weights": "mini", "mini_r": 8},
    ),
    "bone mini, one column": (
        "disha",
        7,
        {"grouping": "strided", "tile": 1},
        {"init_weights": "mini", "mini_r": 1},
    ),
    "bat": ("bat", 4, {}, {"init_weights": "bat"}),
}


@pytest.fixture
def miss(make_model, make_batches):
    """miss(case) -> ours, PEFT's MiSS with the same random values, pairs, batches."""

    def make(case, dtype=DOUBLE):
        name, rank, settings, theirs = MISS[case]
        batches = make_batches("llama", 2, dtype)
        tuner = tuner_of(name, make_model("llama", dtype), batches, rank=rank, settings=settings)
        tuner.start()
        randomise(tuner)
        config = peft.MissConfig(r=rank, target_modules=REGEX, **theirs)
        wrapped = peft.get_peft_model(make_model("llama"), config).to(dtype)
        pairs = []
        for module, layer in tuner.ctx.adapters():
            ((name, ours),) = own(layer).items()
            block = wrapped.base_model.model.get_submodule(module).miss_block["default"]
            block.data.copy_(ours)
            pairs.append((f"{module}.{name}", ours, block))
        return tuner, wrapped, pairs, batches

    return make


@pytest.mark.parametrize("case", MISS)
def test_disha_is_that_of_peft(case, miss):
    assert_same_course(*miss(case))


@pytest.mark.parametrize("case", ["bone", "bone, r does not divide n", "bone mini", "bat"])
def test_disha_merges_as_peft(case, miss):
    tuner, wrapped, *_ = miss(case)
    tuner.merge()
    theirs = wrapped.merge_and_unload().state_dict()
    for key, weight in tuner.ctx.model.state_dict().items():
        assert distance(weight, theirs[key]) < 1e-12, key


@pytest.fixture
def fourier(make_model, make_batches):
    """Ours and PEFT's FourierFT with PEFT's entries and coefficients."""

    def make(dtype=DOUBLE):
        batches = make_batches("llama", 2, dtype)
        tuner = tuner_of("fourierft", make_model("llama", dtype), batches)
        tuner.start()
        config = peft.FourierFTConfig(n_frequency=40, scaling=30.0, target_modules=REGEX)
        wrapped = peft.get_peft_model(make_model("llama"), config).to(dtype)
        pairs = []
        for module, layer in tuner.ctx.adapters():
            other = wrapped.base_model.model.get_submodule(module)
            p, q = other.indices["default"]
            n = layer.base.weight.shape[1]
            tuner.ctx.state[f"entries.{layer.base.weight.shape[0]}x{n}"] = p * n + q
            layer.theta.data.copy_(other.fourierft_spectrum["default"])
            pairs.append((module, layer.theta, other.fourierft_spectrum["default"]))
        tuner.method.restored(tuner.ctx)
        return tuner, wrapped, pairs, batches

    return make


def test_fourierft_is_that_of_peft(fourier):
    assert_same_course(*fourier(), bound=1e-5)


# Against dense oracles: the whole weight as a formula of W0, differentiated by autograd.


class Oracle(nn.Module):
    """y = x W^T + bias with W = formula(W0, parameters)."""

    def __init__(self, base, formula, parameters):
        super().__init__()
        self.weight, self.bias, self.formula = base.weight.detach(), base.bias, formula
        self.own = nn.ParameterDict({k: v.detach().clone() for k, v in parameters.items()})

    def forward(self, x):
        return F.linear(x, self.formula(self.weight, self.own), self.bias)


def group_of(grouping, n, rank):
    groups = np.array_split(np.arange(n), rank)
    if grouping == "strided":
        groups = [np.arange(k, n, rank) for k in range(rank)]
    return {int(i): k for k, members in enumerate(groups) for i in members}


def bone_formula(grouping):
    def formula(weight, own):
        n, rank = weight.shape[1], len(own["D"])
        groups = group_of(grouping, n, rank)
        copies = weight.shape[0] // own["D"].shape[1]
        columns = [torch.cat([own["D"][groups[i]]] * copies) for i in range(n)]
        return weight + torch.stack(columns, dim=1)

    return formula


def bat_formula(weight, own):
    d = own["theta"]
    r = d.shape[1]
    rows = []
    for i in range(weight.shape[0] // r):
        blocks = []
        for j in range(weight.shape[1] // r):
            block = weight[i * r : (i + 1) * r, j * r : (j + 1) * r]
            blocks.append(block + block @ d[i] + d[i])
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows)


def fourier_formula(entries):
    def formula(weight, own):
        m, n = weight.shape
        a, b = torch.arange(m)[:, None].double(), torch.arange(n)[None].double()
        update = torch.zeros_like(weight)
        for c, entry in zip(own["theta"], entries[(m, n)], strict=True):
            p, q = entry // n, entry % n
            update = update + c * torch.cos(2 * math.pi * (p * a / m + q * b / n))
        return weight + 30.0 * update / (m * n)  # tiny.QUICK's scaling

    return formula


def additive_formula(weight, own):
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    r = own["A_U"].shape[1]
    left = torch.cat([u[:, :r] + own["A_U"], u[:, r:]], dim=1)
    right = torch.cat([vh[:r].T + own["A_V"], vh[r:].T], dim=1)
    return left @ s.diag() @ right.T


def rotation_formula(weight, own):
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    r = len(own["X_U"])
    one = torch.eye(r, dtype=weight.dtype)
    turns = []
    for x in (own["X_U"], own["X_V"]):
        k = (x - x.T) / 2
        turns.append((one - k) @ torch.linalg.inv(one + k))
    gain = own["gain"] if "gain" in own else torch.ones(r, dtype=weight.dtype)
    left = torch.cat([u[:, :r] @ turns[0], u[:, r:]], dim=1)
    right = torch.cat([vh[:r].T @ turns[1], vh[r:].T], dim=1)
    return left @ torch.cat([s[:r] * gain, s[r:]]).diag() @ right.T


FORMULAS = {
    "bone": ("bone", 4, {}, bone_formula("contiguous")),
    "bone, r does not divide n": ("bone", 5, {}, bone_formula("contiguous")),
    "bone mini": ("disha", 3, {"tile": 8}, bone_formula("contiguous")),
    "bat": ("bat", 8, {}, bat_formula),
    "fourierft": ("fourierft", 4, {}, None),
    "spectral_additive": ("spectral_additive", 3, {}, additive_formula),
    "spectral_rotation": ("spectral_rotation", 3, {}, rotation_formula),
    "spectral_rotation, scale": ("spectral_rotation", 3, {"scale": True}, rotation_formula),
}


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("case", FORMULAS)
def test_same_as_the_dense_formula(case, kind, make_model, make_batches):
    name, rank, settings, formula = FORMULAS[case]
    batches = make_batches(kind, 2, DOUBLE)
    # The connector, too: its linears have biases.
    options = {"rank": rank, "settings": settings}
    options["connector"] = "adapted" if kind == "llava" else "frozen"
    tuner = tuner_of(name, make_model(kind, DOUBLE), batches, **options)
    tuner.start()
    randomise(tuner)
    if formula is None:
        state = tuner.ctx.state.items()
        formula = fourier_formula({tuple(map(int, k[8:].split("x"))): v for k, v in state})
    oracle, pairs = make_model(kind, DOUBLE).requires_grad_(False), []
    for module, layer in tuner.ctx.adapters():
        parent, _, leaf = module.rpartition(".")
        dense = Oracle(oracle.get_submodule(module), formula, own(layer))
        setattr(oracle.get_submodule(parent), leaf, dense)
        pairs += [(f"{module}.{n}", p, dense.own[n]) for n, p in own(layer).items()]
    assert_same_course(tuner, oracle, pairs, batches)


# DiSHA.


def _cosines(shards):
    """Least |cosine| between the first shard, flattened, and the others."""
    flat = [shard.flatten() for shard in shards]
    return min(abs(float(F.cosine_similarity(flat[0], other, dim=0))) for other in flat[1:])


def _update(layer):
    return (layer.merged_weight() - layer.base.weight).detach()


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_shards_of_bone_are_collinear_and_those_of_bat_are_not(grouping, make_model):
    found = {}
    for name, settings in (("bone", {"grouping": grouping}), ("bat", {})):
        tuner = tuner_of(name, make_model("llama", DOUBLE), [], settings=settings)
        tuner.start()
        randomise(tuner)
        update = _update(of_shape(tuner, 48, 32))  # 8 shards [48, 4]
        if name == "bone" and grouping == "contiguous":  # a shard holds one input of every group
            update = update.unflatten(1, (4, 8)).mT.flatten(1)
        found[name] = _cosines(update.split(4, dim=1))
    assert found["bone"] > 1 - 1e-12
    assert found["bat"] < 0.99


def test_groupings_of_bone_differ_by_a_permutation_of_the_inputs(make_model):
    updates = []
    for grouping in ("contiguous", "strided"):
        tuner = tuner_of(
            "bone", make_model("llama", DOUBLE), [], rank=8, settings={"grouping": grouping}
        )
        tuner.start()
        randomise(tuner)
        updates.append(_update(of_shape(tuner, 32, 48)))
    contiguous, strided = updates
    assert distance(contiguous, strided) > 0.5
    assert distance(contiguous.unflatten(1, (8, 6)).mT.flatten(1), strided) < 1e-12


@pytest.mark.parametrize("rank", [3, 5, 6])
def test_bat_needs_square_blocks(rank, make_model):
    tuner = tuner_of("bat", make_model("llama"), [], rank=rank)
    with pytest.raises(
        SuiteError, match=rf"rank {rank} does not divide .*module: 1, 2, 4, 8, 16\b"
    ):
        tuner.start()


def test_tile_has_to_divide_the_outputs(make_model):
    tuner = tuner_of("disha", make_model("llama"), [], settings={"tile": 5})
    with pytest.raises(SuiteError, match=r"tile 5 does not divide .*allowed: 1, 2, 4, 8, 16"):
        tuner.start()


def _resolved(name, model, budget, **settings):
    tuner = tuner_of(name, model, [], settings=settings)
    found = resolve(
        budget, tuner.method, read_method(METHODS / f"{name}.py").declaration, tuner.ctx
    )
    tuner.start()
    assert found["resolved_parameters"] == tuner.trained_count() <= budget
    return found["resolved_size"]


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("bone", 6000, 6),  # 896 r in all: 4 layers of 32 + 16 + 16 + 32 + 48 + 48 + 32 outputs ...
        ("bat", 6000, 4),  # ... of which a block's side has to be a divisor
        ("disha", 2000, 16),
        ("fourierft", 3000, 107),
        ("fourierft", 10**6, 512),  # no more than the smallest matrix has entries
        ("spectral_rotation", 1000, 4),
    ],
)
def test_equal_budgets_resolve_to_sizes_that_work(name, budget, expected, make_model):
    assert _resolved(name, make_model("llama"), budget) == expected


def test_a_budget_for_one_turning_column_is_refused(make_model):
    with pytest.raises(SuiteError, match="smallest size of this method, 2"):
        _resolved("spectral_rotation", make_model("llama"), 100)
    assert _resolved("spectral_rotation", make_model("llama"), 100, scale=True) == 1


def test_unknown_grouping_is_refused(make_model):
    with pytest.raises(MethodError, match=r"grouping.*contiguous.*strided"):
        tuner_of("bone", make_model("llama"), [], settings={"grouping": "random"})


# FourierFT.


@pytest.mark.parametrize("shape", [(8, 12), (7, 12), (8, 9), (7, 9), (1, 5), (6, 1), (2, 2)])
def test_any_set_of_frequencies_on_any_shape(shape):
    """Every entry at once, where mirrored ones coincide: ifft2 itself, and its adjoint."""
    m, n = shape
    layer = method("fourierft").Frequencies(
        nn.Linear(n, m, bias=False).double(), m * n, scaling=3.0
    )
    generator = torch.Generator().manual_seed(0)
    entries = torch.randperm(m * n, generator=generator)
    layer.place(entries)
    c = torch.randn(m * n, generator=generator, dtype=DOUBLE)
    grad = torch.randn(m, n, generator=generator, dtype=DOUBLE)
    spectrum = np.zeros(m * n)
    spectrum[entries] = c
    expected = 3.0 * torch.from_numpy(np.fft.ifft2(spectrum.reshape(m, n)).real)
    assert distance(layer.spread(c), expected) < 1e-12
    assert float((layer.gather(grad) * c).sum()) == pytest.approx(float((grad * expected).sum()))


def test_frequencies_are_shared_by_shape_and_drawn_once(make_model):
    states = []
    for seed in (0, 0, 1):
        tuner = tuner_of("fourierft", make_model("llama"), [], seed=seed)
        tuner.start()
        states.append(dict(tuner.ctx.state))
    assert states[0].keys() == {f"entries.{s}" for s in ("32x32", "16x32", "48x32", "32x48")}
    assert same_bytes(states[0], states[1])
    assert not any(torch.equal(states[0][k], states[2][k]) for k in states[0])
    for key, entries in states[0].items():
        m, n = map(int, key[8:].split("x"))
        assert len(set(entries.tolist())) == 40
        assert 0 <= entries.min() <= entries.max() < m * n
    coefficients = torch.cat([layer.theta.detach() for _, layer in tuner.ctx.adapters()])
    assert abs(float(coefficients.mean())) < 4 * len(coefficients) ** -0.5
    assert float(coefficients.std()) == pytest.approx(1, abs=0.1)
    assert not torch.equal(*[a.theta for _, a in tuner.ctx.adapters()][:2])


def test_zero_coefficients_start_as_the_base(make_model, make_batches):
    (batch,) = make_batches("llama", 1, DOUBLE)
    tuner = tuner_of(
        "fourierft", make_model("llama", DOUBLE), [], settings={"coefficients": "zeros"}
    )
    tuner.start()
    assert torch.equal(logits(tuner.ctx.model, batch), logits(make_model("llama", DOUBLE), batch))


def test_more_frequencies_than_entries_are_refused(make_model):
    tuner = tuner_of("fourierft", make_model("llama"), [], settings={"n_frequency": 513})
    with pytest.raises(SuiteError, match=r"n_frequency 513 .*k_proj \[16, 32\].*at most 512"):
        tuner.start()


# Dense updates.


@pytest.mark.parametrize("name", ["bat", "fourierft"])
@torch.no_grad()
def test_a_change_below_the_rounding_of_a_bf16_base_is_not_lost(name):
    """Nearly the same small change of every weight, which adds up over the inputs."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(512, 64, dtype=torch.bfloat16)
    base.weight.copy_(0.15 * torch.randn(64, 512, generator=generator))
    if name == "fourierft":
        layer = method("fourierft").Frequencies(base, 1, scaling=1.0)
        layer.place(torch.tensor([0]))
        layer.theta.fill_(1e-4 / layer.factor)
    else:
        layer = Blocks(base, 16)
        layer.theta.fill_(1e-4)
    x = torch.rand(64, 512, generator=generator).bfloat16()
    expected = x.float() @ layer.spread(layer.theta).T

    def share(y):
        return float(((y - base(x)).float() * expected).sum() / expected.square().sum())

    assert share(layer(x)) == pytest.approx(1, abs=0.1)
    assert share(F.linear(x, layer.merged_weight().bfloat16(), base.bias)) < 0.8  # rounded away


HALVES = ["bone", "disha", "bat", "fourierft", "spectral_additive", "spectral_rotation"]


@pytest.mark.parametrize("half", ["bf16 base", "autocast"])
@pytest.mark.parametrize("name", HALVES)
def test_gradients_in_half_precision_are_those_of_float64_but_for_rounding(name, half, make_model):
    """Of inputs and parameters, at an update of the weight's own size."""
    dtype = torch.bfloat16 if half == "bf16 base" else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 32, generator=generator).bfloat16()
    outer = torch.randn(20, 48, generator=generator).bfloat16()
    found, stored = [], None
    for kind in (dtype, DOUBLE):
        base = make_model("llama", torch.bfloat16).to(kind)  # the same, rounded, weights
        tuner = tuner_of(name, base, [])
        if stored is None:
            tuner.start()
            randomise(tuner)
            stored = tuner.tensors()
        else:
            tuner.restore(stored)
            base.to(kind)
        layer = of_shape(tuner, 48, 32)
        inputs = x.to(kind, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.float32):
            y = layer(inputs)
        assert y.dtype == (torch.bfloat16 if kind != DOUBLE else DOUBLE)
        y.backward(outer.to(y.dtype))
        grads = {"y": y.detach(), "x": inputs.grad} | {k: p.grad for k, p in own(layer).items()}
        assert all(grads[k].dtype == p.dtype for k, p in own(layer).items())
        found.append(grads)
    for key, expected in found[1].items():
        assert distance(found[0][key], expected) < 0.02, key


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("name", ["bat", "fourierft"])
def test_the_weight_kept_while_evaluating_follows_every_step(
    name, kernel, make_model, make_batches
):
    batches = make_batches("llama", 2, DOUBLE)
    tuner = tuner_of(name, make_model("llama", DOUBLE), batches)
    tuner.start()
    optimiser = torch.optim.AdamW(tuner.parameter_groups(0.1), **kernel)
    layer = of_shape(tuner, 48, 32)
    x = torch.randn(3, 5, 32, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        train(tuner, batches, 1, optimiser)
        for _ in range(2):  # formed, and kept
            with torch.no_grad():
                assert distance(layer(x), F.linear(x, layer.merged_weight())) < 1e-12
    assert layer._kept is not None
    with torch.no_grad():
        layer.theta.mul_(2)
        assert distance(layer(x), F.linear(x, layer.merged_weight())) < 1e-12


def _saved_bytes(model, batch):
    """Bytes kept for the backward pass, without the model's own tensors, each storage once."""
    owned = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    owned |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: addresses recur
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert loss.requires_grad
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("case", ["bone", "bone mini", "bat", "fourierft"])
def test_activations_take_no_more_memory_than_those_of_peft(case, miss, fourier):
    made = fourier(torch.float32) if case == "fourierft" else miss(case, torch.float32)
    tuner, wrapped, _, batches = made
    for model in (tuner.ctx.model, wrapped):
        model.train()
    ours, theirs = (_saved_bytes(model, batches[0]) for model in (tuner.ctx.model, wrapped))
    assert 0 < ours <= theirs


# Spectral Adapter.


@pytest.fixture
def spectral_layer(make_model):
    """spectral_layer(name, rank) -> a layer [16, 32] of that method, W0, and the tuner."""

    def make(name, rank=3, **settings):
        plain = make_model("llama", DOUBLE)
        tuner = tuner_of(name, make_model("llama", DOUBLE), [], rank=rank, settings=settings)
        tuner.start()
        module = "model.layers.0.self_attn.k_proj"
        layer = tuner.ctx.model.get_submodule(module)
        return layer, plain.get_submodule(module).weight.detach(), tuner

    return make


def _rank(matrix):
    return int(torch.linalg.matrix_rank(matrix.detach(), rtol=1e-10))


@torch.no_grad()
def test_rank_capacity_of_the_additive_spectral_adapter_is_twice_that_of_lora(spectral_layer):
    """Capacity (paper): max - min over theta of rank f(W), for a W of full rank 16; r = 3."""
    layer, weight, _ = spectral_layer("spectral_additive")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    largest = _rank(layer.merged_weight())
    # The top columns become minus the next ones: U2 S2 V2^T loses r triplets, U1 S1 V1^T is gone.
    layer.A_U.copy_(-u[:, 3:6] - layer.U1)
    layer.A_V.copy_(vh[3:6].T * s[3:6] / s[:3] - layer.V1)
    smallest = _rank(layer.merged_weight())
    assert (largest, smallest) == (16, 10)
    # Not less: theta changes W by a matrix of rank 2 r at most, which random values reach.
    layer.A_U.normal_(generator=torch.Generator().manual_seed(0))
    layer.A_V.normal_(generator=torch.Generator().manual_seed(1))
    assert _rank(layer.merged_weight() - weight) == 6

    lora, weight, tuner = spectral_layer("lora")
    largest = _rank(lora.merged_weight())
    lora.A.copy_(vh[:3])
    lora.B.copy_(-u[:, :3] * s[:3] / lora.scale)
    assert (largest, _rank(lora.merged_weight())) == (16, 13)
    randomise(tuner)
    assert _rank(lora.merged_weight() - weight) == 3


@torch.no_grad()
def test_rotation_keeps_singular_values_and_the_minor_columns(spectral_layer):
    layer, weight, tuner = spectral_layer("spectral_rotation")
    randomise(tuner)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    turned = layer.merged_weight()
    assert distance(turned, weight) > 0.05
    assert distance(torch.linalg.svdvals(turned), s) < 1e-12
    for x in (layer.X_U, layer.X_V):
        turn = tuner.method.cayley(x)
        assert distance(turn @ turn.T, torch.eye(3)) < 1e-12
        assert float(torch.linalg.det(turn)) == pytest.approx(1)
    for k in range(3, 16):  # untouched triplets
        assert distance(turned @ vh[k], s[k] * u[:, k]) < 1e-10


@torch.no_grad()
def test_scale_multiplies_the_top_singular_values(spectral_layer):
    layer, weight, tuner = spectral_layer("spectral_rotation", scale=True)
    randomise(tuner)
    s = torch.linalg.svdvals(weight)
    s[:3] *= layer.gain
    assert distance(torch.linalg.svdvals(layer.merged_weight()), s.sort(descending=True)[0]) < 1e-12
    decay = {n: g["weight_decay"] for g in tuner.parameter_groups(0.1) for n in g["names"]}
    assert all((value == 0) == name.endswith(".gain") for name, value in decay.items())
    ctx = tuner.ctx
    assert tuner.trained_count() == len(ctx.targets) * 21 == tuner.method.total_parameters(ctx, 3)


def test_one_column_cannot_turn(make_model):
    tuner = tuner_of("spectral_rotation", make_model("llama"), [], rank=1)
    with pytest.raises(SuiteError, match=r"rank 1.*2 or more"):
        tuner.start()
    tuner_of("spectral_rotation", make_model("llama"), [], rank=1, settings={"scale": True}).start()


@pytest.mark.parametrize("name", ["spectral_additive", "spectral_rotation"])
def test_a_bf16_base_is_left_as_it_is(name, make_model, make_batches):
    """Starts as the base to the bit: nothing is subtracted from a weight that would round."""
    (batch,) = make_batches("llama", 1, torch.bfloat16)
    tuner = tuner_of(name, make_model("llama", torch.bfloat16), [])
    tuner.start()
    plain = make_model("llama", torch.bfloat16)
    for module, layer in tuner.ctx.adapters():
        assert torch.equal(layer.base.weight, plain.get_submodule(module).weight)
    if name == "spectral_additive":
        assert torch.equal(logits(tuner.ctx.model, batch), logits(plain, batch))


@torch.no_grad()
def test_the_additive_change_is_the_same_with_and_without_subtraction(spectral_layer):
    layer, weight, tuner = spectral_layer("spectral_additive")
    randomise(tuner)
    subtracted = layer.merged_weight()
    layer.subtracts, layer.base.weight.data = False, weight.clone()
    assert distance(layer.merged_weight(), subtracted) < 1e-12


class _NoDecomposition(Decompositions):
    def svd(self, weight):
        raise AssertionError("decomposed again")


@pytest.mark.parametrize("name", ["spectral_additive", "spectral_rotation", "pissa", "milora"])
def test_a_stored_cell_is_restored_without_a_decomposition(name, make_model, make_batches):
    batches = make_batches("llama", 2)
    tuner = tuner_of(name, make_model("llama"), batches)
    tuner.start()
    train(tuner, batches, 2)
    loaded = tuner_of(name, make_model("llama"), [])
    loaded.ctx.cache = _NoDecomposition()
    loaded.restore(tuner.tensors())
    assert torch.equal(logits(loaded.ctx.model, batches[0]), logits(tuner.ctx.model, batches[0]))


# PiSSA against numpy.


def test_pissa_trains_the_largest_triplets(make_model):
    plain = make_model("llama", DOUBLE)
    tuner = tuner_of("pissa", make_model("llama", DOUBLE), [])
    tuner.start()
    for name, layer in tuner.ctx.adapters():
        weight = plain.get_submodule(name).weight.numpy(force=True)
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        principal = (u[:, :4] * s[:4]) @ vh[:4]
        update = (layer.B @ layer.A).numpy(force=True)
        assert np.linalg.norm(update - principal) < 1e-12 * np.linalg.norm(weight)
        # What stays frozen is the rest, whose largest singular value is the fifth.
        residual = np.linalg.svd(layer.base.weight.numpy(force=True), compute_uv=False)
        assert np.allclose(residual[: len(s) - 4], s[4:], atol=1e-12)
        # Split evenly: A A^T = B^T B = diag of the singular values.
        a, b = layer.A.numpy(force=True), layer.B.numpy(force=True)
        assert np.allclose(a @ a.T, np.diag(s[:4]), atol=1e-12)
        assert np.allclose(b.T @ b, np.diag(s[:4]), atol=1e-12)

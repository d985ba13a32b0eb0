"""Masked, alternating and sparse methods against oracles written from their formulas.

The oracles are dense and in float64, and call none of the code under test.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from ballast.errors import SuiteError
from ballast.sparse import SparseUpdate, grouped
from ballast.training import Examples, Trainer
from tiny import (
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


@pytest.fixture
def start(make_model, make_batches):
    """start(name, kind="llama", dtype=float64, **options) -> (started tuner, batches)."""

    def make(name, kind="llama", dtype=DOUBLE, count=3, **options):
        batches = make_batches(kind, count, dtype)
        tuner = tuner_of(name, make_model(kind, dtype), batches, **options)
        tuner.start()
        return tuner, batches

    return make


def values_of(tuner):
    return {n: p.detach().clone() for n, p in tuner.ctx.own().items()}


def batch_gradients(model, names, batch):
    """Gradients of the model's loss on one batch, by name; the model is left as it was."""
    parameters = [model.get_parameter(name).requires_grad_(True) for name in names]
    found = torch.autograd.grad(model(**batch).loss, parameters)
    return dict(zip(names, found, strict=True))


def top(values, count):
    """Flat positions of the largest values, by sorting."""
    return set(np.argsort(-values.flatten().numpy(), kind="stable")[:count].tolist())


def positions(mask):
    return set(mask.flatten().nonzero().flatten().tolist())


# --- masks on what trains ------------------------------------------------------------------------

MASKED = [
    ("magnitude_mask", {}),
    ("magnitude_mask", {"criterion": "random"}),
    ("gradient_mask", {}),
    ("gradient_mask", {"scope": "overall"}),
    ("gradient_mask", {"scope": "tensor"}),
    ("fish", {}),
]


@pytest.mark.parametrize(("name", "settings"), MASKED)
def test_masked_entries_never_move_and_the_others_do(name, settings, start):
    tuner, batches = start(name, "llava", settings=settings)
    before, masks = values_of(tuner), tuner.ctx.scratch["masks"]
    assert sum(int(m.sum()) for m in masks.values()) == tuner.trained_count()
    assert tuner.trained_count() == tuner.method.total_parameters(tuner.ctx, None)
    backward(tuner, batches[0])
    tuner.after_backward()
    assert not any(p.grad[~masks[n]].any() for n, p in tuner.ctx.own().items())
    train(tuner, batches, 3)
    moved = {n: p != before[n] for n, p in tuner.ctx.own().items()}
    assert not any((moved[n] & ~masks[n]).any() for n in masks)
    # Attention's key biases have no gradient: the softmax does not see them.
    assert sum(int(m.sum()) for m in moved.values()) > 0.97 * tuner.trained_count()


@pytest.mark.parametrize("name", ["magnitude_mask", "gradient_mask", "fish"])
def test_what_an_optimiser_does_to_masked_entries_is_undone(name, start):
    """Dense decay and momentum of an optimiser that knows nothing of masks."""
    tuner, batches = start(name)
    before, masks = values_of(tuner), tuner.ctx.scratch["masks"]
    own = list(tuner.ctx.own().values())
    optimiser = torch.optim.SGD(own, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        backward(tuner, batches[0])
        optimiser.step()  # the gradients are not masked either
        tuner.after_step()
    for n, p in tuner.ctx.own().items():
        assert torch.equal(p[~masks[n]], before[n][~masks[n]])
        assert not masks[n].any() or not torch.equal(p[masks[n]], before[n][masks[n]])
    assert {g["weight_decay"] for g in tuner.parameter_groups(0.1)} == {0.0}


def test_magnitude_mask_freezes_the_larger_half_of_each_tensor(start):
    tuner, _ = start("magnitude_mask")
    masks = tuner.ctx.scratch["masks"]
    assert {int(n.split(".")[2]) for n in masks} == {2, 3}
    for name, weight in values_of(tuner).items():
        frozen = top(weight.abs(), int(0.5 * weight.numel()))
        assert positions(~masks[name]) == frozen


def test_random_mask_is_another_with_another_seed_and_as_large(start):
    options = {"settings": {"criterion": "random", "freeze": 0.3}}
    first, second = (
        start("magnitude_mask", seed=seed, **options)[0].ctx.scratch["masks"] for seed in (0, 1)
    )
    assert any(not torch.equal(first[n], second[n]) for n in first)
    for name, mask in first.items():
        assert int((~mask).sum()) == int((~second[name]).sum()) == int(0.3 * mask.numel())


def gradient_sizes(make_model, make_batches, names):
    """|mean gradient| over the batches of sizes 2, 2 and 1 that QUICK's settings make."""
    rows = [
        {k: v[i : i + 1] for k, v in b.items()}
        for b in make_batches("llava", 3, DOUBLE)
        for i in range(3)
    ]
    batches = [
        {k: torch.cat([row[k] for row in part]) for k in rows[0]}
        for part in (rows[:2], rows[2:4], rows[4:5])
    ]
    found = [batch_gradients(make_model("llava", DOUBLE), names, b) for b in batches]
    return {n: (sum(g[n] for g in found) / 3).abs() for n in names}


def test_gradient_mask_by_row_is_gps(start, make_model, make_batches):
    tuner, _ = start("gradient_mask", "llava", settings={"per_row": 2})
    masks = tuner.ctx.scratch["masks"]
    sizes = gradient_sizes(make_model, make_batches, list(masks))
    matrices = 0
    for name, mask in masks.items():
        if mask.ndim == 2:
            matrices += 1
            for row, size in zip(mask, sizes[name], strict=True):
                assert positions(row) == top(size, 2)
        else:
            assert bool(mask.all()) == ("proj.bias" in name)
            assert bool(mask.any()) == ("norm" not in name)
    assert matrices == 3 * 7


def test_gradient_mask_overall_is_sift_and_by_tensor_spu(start, make_model, make_batches):
    tuner, _ = start("gradient_mask", "llava", settings={"scope": "overall", "density": 0.07})
    masks = tuner.ctx.scratch["masks"]
    sizes = gradient_sizes(make_model, make_batches, list(masks))
    everything = torch.cat([sizes[n].flatten() for n in masks])
    chosen = torch.cat([masks[n].flatten() for n in masks])
    assert positions(chosen) == top(everything, int(0.07 * len(everything)))

    tuner, _ = start("gradient_mask", "llava", settings={"scope": "tensor", "density": 0.07})
    for name, mask in tuner.ctx.scratch["masks"].items():
        size = sizes[name]
        if "k_proj.bias" not in name:  # zero in exact arithmetic: which are largest is rounding
            assert positions(mask) == top(size, int(0.07 * size.numel()))


def test_a_budget_is_met_by_rows_only(make_model):
    ctx = tuner_of("gradient_mask", make_model("llama"), []).ctx
    plain = make_model("llama")
    matrices = [p for n, p in plain.named_parameters() if "layers" in n and p.ndim == 2]
    method = tuner_of("gradient_mask", plain, []).method
    assert method.total_parameters(ctx, 3) == sum(3 * p.shape[0] for p in matrices)
    other = tuner_of("gradient_mask", plain, [], settings={"scope": "tensor"})
    with pytest.raises(SuiteError, match="scope: row"):
        other.method.total_parameters(other.ctx, 3)


def test_examples_are_grouped_and_padded():
    def example(length, value):
        ids = torch.full((1, length), value)
        pixels = torch.full((1, 2, 3, 3), float(value))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.clone(),
            "pixel_values": pixels,
        }

    first, last = grouped([example(3, 1), example(5, 2), example(2, 3)], 2)
    assert first["input_ids"].tolist() == [[1, 1, 1, 0, 0], [2, 2, 2, 2, 2]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert first["labels"].tolist() == [[1, 1, 1, -100, -100], [2, 2, 2, 2, 2]]
    assert first["pixel_values"].shape == (2, 2, 3, 3)
    assert last["input_ids"].tolist() == [[3, 3]]


def test_padding_examples_together_changes_no_gradient(start, make_batches):
    """One long and one short answer, each half of the tokens: mean of both equals the padded."""
    tuner, _ = start("full_st")
    (batch,) = make_batches("llama", 1, DOUBLE, size=2)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    rows[1] = {k: v[:, :9] for k, v in rows[1].items()}
    (padded,) = grouped(rows, 2)
    model = tuner.ctx.model
    counts = [5, 4]  # scored tokens
    separate = sum(model(**r).loss * c for r, c in zip(rows, counts, strict=True)) / 9
    assert model(**padded).loss.item() == pytest.approx(separate.item(), rel=1e-6)


# --- SPIDER --------------------------------------------------------------------------------------


def spider_importance(values):
    sizes = np.abs(values)
    if not values.any():
        return np.zeros_like(values)
    return 1 / (1 + np.exp(-(sizes - sizes.mean()) / sizes.std(ddof=1)))


def test_spider_step_by_step(start, make_model):
    tuner, batches = start("spider")
    names = list(tuner.ctx.own())
    assert {int(n.split(".")[2]) for n in names} == {2, 3}
    model = make_model("llama", DOUBLE)
    weights = {n: model.get_parameter(n).requires_grad_(True) for n in names}
    base = {n: w.detach().numpy().copy() for n, w in weights.items()}
    sums = {n: np.zeros_like(w) for n, w in base.items()}
    optimiser = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    for step in range(4):
        found = batch_gradients(model, names, batches[step % 3])
        for n, w in weights.items():
            w.grad = found[n]
            sums[n] += found[n].numpy()  # of gradients as they came, before clipping
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimiser.step()
        for n, w in weights.items():
            old, new = spider_importance(base[n]), spider_importance(sums[n])
            share = np.where(old < new, new / (old + new), 0.0)
            if share.any():
                share = np.minimum(share / share[share != 0].mean(), 1.0)
            w.data = torch.from_numpy(base[n] * (1 - share) + w.detach().numpy() * share)
    train(tuner, batches, 4)
    for n, own in tuner.ctx.own().items():
        assert distance(own, weights[n]) < 1e-9, n
        assert distance(tuner.ctx.state[f"gradient_sum.{n}"], torch.from_numpy(sums[n])) < 1e-9
    assert 0.2 < tuner.report()["held_at_start"] < 0.8


def test_spider_of_a_constant_tensor_is_a_number(start):
    """Norms that pretraining left at 1 have no z-score."""
    tuner, _ = start("spider")
    method = tuner.method
    constant = method.importance(torch.ones(7, dtype=DOUBLE))
    assert torch.equal(constant, torch.full((7,), 0.5, dtype=DOUBLE))
    assert not method.mixing(constant, torch.zeros(7, dtype=DOUBLE)).any()


# --- HFT and LISA --------------------------------------------------------------------------------


def moved_parameters(tuner, batches, optimiser):
    before = {n: p.detach().clone() for n, p in tuner.ctx.model.named_parameters()}
    train(tuner, batches, 1, optimiser)
    after = tuner.ctx.model.named_parameters()
    return {n for n, p in after if not torch.equal(p, before[n])}


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_hft_draws_a_balanced_half(kind, start):
    tuner, _ = start("hft", kind, steps=40, settings={"fraction": 0.05})
    units, draws = tuner.ctx.scratch["modules"], tuner.ctx.state["draws"]
    layers = {"llama": 4, "llava": 3}[kind]
    assert len(draws) == 20
    assert len({tuple(draw.tolist()) for draw in draws}) == 20
    for draw in draws:
        per_layer = {}
        for trains, (layer, category, _) in zip(draw.tolist(), units, strict=True):
            per_layer.setdefault((category, layer), []).append(trains)
        assert all(sum(per_layer["attention", i]) == 2 for i in range(layers))
        assert all(len(per_layer["attention", i]) == 4 for i in range(layers))
        assert all(sum(per_layer["norm", i]) == 1 for i in range(layers))
        mlp = [sum(per_layer["mlp", i]) for i in range(layers)]
        assert set(mlp) == {1, 2}
        assert sum(mlp) == 3 * layers // 2
    assert 0.4 < draws.double().mean() < 0.6
    assert abs(tuner.report()["share_in_a_step"] - 0.5) < 0.1


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_hft_trains_what_is_drawn_and_touches_nothing_else(kind, start):
    tuner, batches = start("hft", kind, settings={"fraction": 0.5})
    units, draws = tuner.ctx.scratch["modules"], tuner.ctx.state["draws"]
    optimiser = optimiser_of(tuner)
    for step in range(4):
        draw = draws[step // 2].tolist()
        expected = {n for t, (_, _, names) in zip(draw, units, strict=True) if t for n in names}
        moved = moved_parameters(tuner, batches, optimiser)
        assert moved <= expected
        assert {n for n in expected if "k_proj.bias" not in n} <= moved


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_lisa_trains_the_drawn_layers_and_touches_nothing_else(kind, embeddings, start):
    settings = {"fraction": 0.25, "embeddings": embeddings}
    tuner, batches = start("lisa", kind, steps=8, settings=settings)
    ctx, draws = tuner.ctx, tuner.ctx.state["draws"]
    assert draws.shape == (4, 2)
    optimiser = optimiser_of(tuner)
    layers = ctx.anatomy.layer_names(ctx.model)
    always = [n for n, _ in ctx.model.named_parameters() if "embed_tokens" in n or "lm_head" in n]
    assert len(always) == {"llama": 1, "llava": 2}[kind]
    for step in range(8):
        drawn = tuple(f"{layers[i]}." for i in draws[step // 2])
        expected = {n for n, _ in ctx.model.named_parameters() if n.startswith(drawn)}
        if embeddings:
            expected |= set(always)
        assert {n for n, p in ctx.model.named_parameters() if p.requires_grad} == expected
        moved = moved_parameters(tuner, batches, optimiser)  # with weight decay 0.1
        assert moved <= expected
        assert {n for n in expected if "k_proj.bias" not in n} <= moved
    states = {len(optimiser.state.get(p, {})) for p in ctx.trainable().values()}
    assert states <= {0, 3}


def test_lisa_draws_uniformly_without_replacement(start):
    tuner, _ = start("lisa", steps=4000, settings={"fraction": 1e-4, "interval": 20})
    draws = tuner.ctx.state["draws"]
    assert tuner.method.period(tuner.ctx) == 1  # 1e-4 of 4,000 steps, at least 1
    assert all(len(set(draw.tolist())) == 2 for draw in draws)
    often = draws.flatten().bincount(minlength=4).double() / len(draws)
    assert ((often - 0.5).abs() < 0.05).all()
    tuner, _ = start("lisa", steps=4000, settings={"fraction": 0.05})
    assert tuner.method.period(tuner.ctx) == 20
    with pytest.raises(SuiteError, match="active: 5; the base has 4"):
        start("lisa", settings={"active": 5})


# --- the connector -------------------------------------------------------------------------------


def connector_of(model):
    inside = [p for n, p in model.named_parameters() if "multi_modal_projector" in n]
    return sum(p.numel() for p in inside), [p for p in inside if p.ndim == 2]


def test_connector_st_trains_the_connector_alone(start, make_model):
    tuner, batches = start("connector_st", "llava")
    total, matrices = connector_of(make_model("llava"))
    assert tuner.trained_count() == total
    moved = moved_parameters(tuner, batches, optimiser_of(tuner))
    assert moved == set(tuner.ctx.trainable())
    assert all("multi_modal_projector" in n for n in moved)
    assert {g["lr"] for g in tuner.parameter_groups(0.0)} == {1e-2}  # the method's own

    adapted, _ = start("connector_st", "llava", connector="adapted")
    assert adapted.trained_count() == 8 * sum(sum(m.shape) for m in matrices)
    with pytest.raises(SuiteError, match="connector: tuned; connector_st trains"):
        start("connector_st", "llava", connector="tuned")
    with pytest.raises(SuiteError, match="no connector"):
        start("connector_st", "llama")


@pytest.mark.parametrize("name", ["full_st", "top_st", "last_st"])
def test_adapted_connector_is_lora_beside_the_layers(name, start, make_model):
    settings = {"connector_rank": 3}
    tuner, batches = start(name, "llava", connector="adapted", settings=settings)
    frozen, _ = start(name, "llava")
    _, matrices = connector_of(make_model("llava"))
    added = 3 * sum(sum(m.shape) for m in matrices)
    assert tuner.trained_count() == frozen.trained_count() + added
    assert tuner.trained_count() == tuner.method.total_parameters(tuner.ctx, None)
    randomise(tuner)
    plain = make_model("llava", DOUBLE)
    with torch.no_grad():
        for n, layer in tuner.ctx.adapters():
            assert "multi_modal_projector" in n
            plain.get_submodule(n).weight += 2.0 * layer.B @ layer.A
    assert distance(logits(tuner.ctx.model, batches[0]), logits(plain, batches[0])) < 1e-12
    with pytest.raises(SuiteError, match="rank 33 is larger than"):
        start(name, "llava", connector="adapted", settings={"connector_rank": 33})


def test_methods_without_a_rank_for_the_connector_say_so(start):
    with pytest.raises(SuiteError, match="connector: adapted; allowed for this method: frozen"):
        start("l2_sp", "llava", connector="adapted")


# --- sparse updates ------------------------------------------------------------------------------


def dense_sparse(sparse):
    """S [m, n] from the stored CSR, by loops."""
    full = torch.zeros(sparse.shape, dtype=sparse.values.dtype)
    for row in range(sparse.shape[0]):
        for place in range(int(sparse.offsets[row]), int(sparse.offsets[row + 1])):
            full[row, int(sparse.columns[place])] += sparse.values.detach()[place]
    return full


@pytest.mark.parametrize("kernel", ["sampled", "dense"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_sparse_linear_against_dense(kernel, scale):
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(13, 9, dtype=DOUBLE)
    mask = torch.rand(9, 13, generator=generator) < 0.2
    mask[4] = False  # a row without entries
    sparse = SparseUpdate(base.weight, int(mask.sum()), scale, kernel)
    sparse.place(mask)
    sparse.values.data.normal_(generator=generator)
    assert {sparse.offsets.dtype, sparse.columns.dtype} == {torch.int32}
    x = torch.randn(7, 13, generator=generator, dtype=DOUBLE, requires_grad=True)
    out = torch.randn(7, 9, generator=generator, dtype=DOUBLE)

    full = dense_sparse(sparse).requires_grad_(True)
    other = x.detach().clone().requires_grad_(True)
    expected = other @ (base.weight.detach() + scale * full).T + base.bias.detach()
    expected.backward(out)
    found = sparse.linear(x, base.requires_grad_(False))
    found.backward(out)
    assert distance(found, expected) < 1e-14
    assert distance(x.grad, other.grad) < 1e-14
    assert distance(sparse.values.grad, full.grad[mask]) < 1e-14


def test_sparse_linear_keeps_no_dense_matrix_for_the_backward_pass():
    base = nn.Linear(40, 50).requires_grad_(False)
    sparse = SparseUpdate(base.weight, 20)
    mask = torch.zeros(50, 40, dtype=torch.bool)
    mask.view(-1)[:20] = True
    sparse.place(mask)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(3, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse.linear(x, base)
    large = [t for t in kept if t.numel() >= 50 * 40]
    assert all(t.data_ptr() == base.weight.data_ptr() for t in large)


def sparse_nonzeros(tuner):
    return {name: layer.sparse for name, layer in tuner.ctx.adapters()}


@pytest.mark.parametrize("name", ["spa", "rosa"])
@pytest.mark.parametrize("density", [0.0071, 0.3])
def test_nnz_is_int_of_density_times_size(name, density, start, make_model):
    tuner, batches = start(name, "llava", settings={"density": density})
    plain, total = make_model("llava"), 0
    randomise(tuner)
    for target, sparse in sparse_nonzeros(tuner).items():
        m, n = plain.get_submodule(target).weight.shape
        count = int(density * m * n)
        total += count
        assert tuple(sparse.values.shape) == (count,)
        assert torch.count_nonzero(dense_sparse(sparse)) == count
    assert tuner.report()["nnz"] == total
    train(tuner, batches, 2)
    assert all(
        torch.count_nonzero(dense_sparse(s)) == len(s.values)
        for s in sparse_nonzeros(tuner).values()
    )


def test_a_density_that_leaves_nothing_is_refused(start):
    with pytest.raises(SuiteError, match=r"density: 0.0001 leaves no entry of \S*q_proj"):
        start("spa", settings={"density": 1e-4})


@pytest.mark.parametrize("name", ["spa", "rosa", "dsee"])
@pytest.mark.parametrize("kernel", ["sampled", "dense"])
def test_gradients_and_steps_equal_those_of_a_dense_model(name, kernel, start, make_model):
    """W0 + s_S S + s B A as dense matrices of a plain model, several AdamW steps."""
    tuner, batches = start(name, settings={"kernel": kernel})
    randomise(tuner)
    layers = dict(tuner.ctx.adapters())
    model, parts, scale = make_model("llama", DOUBLE), {}, {"spa": 1.0, "rosa": 1.0, "dsee": 2.0}
    for n, layer in layers.items():
        s = dense_sparse(layer.sparse)
        mask = torch.zeros_like(s)
        mask.view(-1)[layer.sparse.places] = 1
        low = [layer.A, layer.B] if name != "spa" else []
        low = [p.detach().clone().requires_grad_(True) for p in low]
        parts[n] = (s.requires_grad_(True), mask, low)

    def loss_of(batch):
        weights = {}
        for n, (s, mask, low) in parts.items():
            delta = scale[name] * s * mask
            if low:
                delta = delta + scale[name] * low[1] @ low[0]
            weights[f"{n}.weight"] = model.get_parameter(f"{n}.weight").detach() + delta
        return functional_call(model, weights, kwargs=batch).loss

    backward(tuner, batches[0])
    loss_of(batches[0]).backward()
    for n, (s, _, low) in parts.items():
        sparse = layers[n].sparse
        assert sparse.values.grad.any()
        assert distance(sparse.values.grad, s.grad.view(-1)[sparse.places]) < 1e-9
        for own, other in zip([layers[n].A, layers[n].B] if low else [], low, strict=True):
            assert distance(own.grad, other.grad) < 1e-9

    sparse_rate = 1e-2 * (2 / 7 if name == "rosa" else 1)
    groups = [
        {"params": [s for s, _, _ in parts.values()], "lr": sparse_rate},
        {"params": [p for _, _, low in parts.values() for p in low], "lr": 1e-2},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.1)
    everything = [p for group in optimiser.param_groups for p in group["params"]]
    train(tuner, batches, 4)
    for step in range(4):
        optimiser.zero_grad()
        loss_of(batches[step % 3]).backward()
        nn.utils.clip_grad_norm_(everything, 1.0)
        optimiser.step()
    for n, (s, _, low) in parts.items():
        sparse = layers[n].sparse
        assert distance(sparse.values, s.view(-1)[sparse.places]) < 1e-9
        for own, other in zip([layers[n].A, layers[n].B] if low else [], low, strict=True):
            assert distance(own, other) < 1e-9


def task_scores(model, batches, kind):
    names = [f"{n}.weight" for n, m in model.named_modules() if n.endswith("_proj")]
    found = [batch_gradients(model, names, batch) for batch in batches]
    if kind == "mean_squared":
        return {n: sum(g[n] ** 2 for g in found) / len(found) for n in names}
    return {n: (sum(g[n] for g in found) / len(found)).abs() for n in names}


@pytest.mark.parametrize("kind", ["mean_squared", "mean"])
def test_spa_places_are_the_largest_task_gradients_of_each_matrix(kind, start, make_model):
    settings = {"score": kind, "gradients": 3}
    tuner, batches = start("spa", settings=settings)
    scores = task_scores(make_model("llama", DOUBLE), batches, kind)
    other = task_scores(
        make_model("llama", DOUBLE), batches, "mean" if kind == "mean_squared" else "mean_squared"
    )
    differ = 0
    for name, sparse in sparse_nonzeros(tuner).items():
        chosen = set(sparse.places.tolist())
        assert chosen == top(scores[f"{name}.weight"], len(sparse.values))
        differ += chosen != top(other[f"{name}.weight"], len(sparse.values))
    assert differ  # the two scores are told apart here


def lora_warm_up(model, names, batches, steps):
    """Weights of a plain model after LoRA (s = 1, r = 4) trained on them: the dense way."""
    generator = torch.Generator().manual_seed(0)
    low = {}
    for n in names:
        m, k = model.get_parameter(n).shape
        a = (torch.rand(4, k, generator=generator, dtype=DOUBLE) * 2 - 1) / math.sqrt(k)
        low[n] = [a.requires_grad_(True), torch.zeros(m, 4, dtype=DOUBLE, requires_grad=True)]

    def weights():
        return {n: model.get_parameter(n).detach() + b @ a for n, (a, b) in low.items()}

    parameters = [p for pair in low.values() for p in pair]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimiser.zero_grad()
        functional_call(model, weights(), kwargs=batches[step]).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    with torch.no_grad():
        for n, weight in weights().items():
            model.get_parameter(n).copy_(weight)
    return {n: a.detach() for n, (a, _) in low.items()}


@pytest.mark.parametrize("restart", [True, False])
def test_rosa_places_come_from_the_gradients_after_the_warm_up(restart, start, make_model):
    """Restart: a calibration of its own, both parts from the base. Else: in the run itself."""
    settings = {"restart": restart, "fraction": 0.5, "warmup": 2}
    tuner, batches = start("rosa", settings=settings)
    layers = dict(tuner.ctx.adapters())
    if not restart:
        assert all(layer.sparse.places is None for layer in layers.values())
        train(tuner, batches, 1, optimiser := optimiser_of(tuner, 0.0))
        assert all(layer.sparse.values.grad is None for layer in layers.values())
        train(tuner, batches, 1, optimiser)
    model = make_model("llama", DOUBLE)
    names = [f"{n}.weight" for n in layers]
    plain = task_scores(make_model("llama", DOUBLE), [batches[2 if restart else 0]], "mean_squared")
    starts = lora_warm_up(model, names, batches, 2)
    scores = task_scores(model, [batches[2 if restart else 0]], "mean_squared")
    same = 0
    for n, layer in layers.items():
        chosen = set(layer.sparse.places.tolist())
        assert chosen == top(scores[f"{n}.weight"], len(layer.sparse.values))
        same += chosen == top(plain[f"{n}.weight"], len(layer.sparse.values))
        assert not layer.sparse.values.any()
        if restart:
            assert not layer.B.any()
            assert not torch.equal(layer.A, starts[f"{n}.weight"])  # a run of its own
        else:
            assert layer.B.any()
    assert same < len(layers)  # the warm-up moved the gradients
    before = {n: layer.sparse.values.detach().clone() for n, layer in layers.items()}
    train(tuner, batches, 1)
    assert all(not torch.equal(layer.sparse.values, before[n]) for n, layer in layers.items())


def test_rosa_trains_with_two_rates(start):
    tuner, _ = start("rosa")
    rates = {n: g["lr"] for g in tuner.parameter_groups(0.0) for n in g["names"]}
    assert {r for n, r in rates.items() if n.endswith("values")} == {1e-2 * 2 / 7}
    assert {r for n, r in rates.items() if n.endswith((".A", ".B"))} == {1e-2}


def test_a_calibration_leaves_the_runs_dropout_alone(start):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    start("rosa", settings={"dropout": 0.5})
    assert torch.equal(torch.rand(3), expected)


# --- DSEE ----------------------------------------------------------------------------------------


def grebsmo_residual(weight, first, rounds, grow, threshold, limit):
    """|W - U V| of the greedy bilateral decomposition, in numpy, step by step."""
    v = first
    for count in range(rounds):
        sparse = np.zeros_like(weight)
        for _ in range(2):
            u, _ = np.linalg.qr((weight - sparse) @ v.T)
            v = u.T @ (weight - sparse)
            rest = weight - u @ v
            sparse = np.where(np.abs(rest) < threshold, 0.0, rest)
        if len(v) >= limit or count == rounds - 1:
            break
        _, r = np.linalg.qr(weight - u @ v - sparse)
        v = np.concatenate([v, r[: min(grow, limit - len(v))]])
    return np.abs(rest), sparse


@pytest.mark.parametrize(("rounds", "grow"), [(3, 5), (100, 5), (4, 1)])
def test_dsee_support_is_the_largest_of_grebsmo(rounds, grow, start, make_model):
    # At 0.01 almost nothing is left of these weights, and the QR of that is not determined.
    settings = {"rounds": rounds, "grow": grow, "entries": 16, "threshold": 0.05}
    tuner, _ = start("dsee", settings=settings)
    generator, plain = torch.Generator().manual_seed(0), make_model("llama", DOUBLE)
    for name, layer in tuner.ctx.adapters():
        weight = plain.get_submodule(name).weight.detach()
        torch.randn(layer.A.shape, generator=generator)
        first = torch.randn(1, weight.shape[1], generator=generator).double().numpy()
        limit = int(0.65 * min(weight.shape))
        rest, sparse = grebsmo_residual(weight.numpy(), first, rounds, grow, 0.05, limit)
        expected = top(torch.from_numpy(rest), 16)
        assert set(layer.sparse.places.tolist()) == expected
        assert np.count_nonzero(sparse) >= 16  # S itself has them all, so this is its order
        assert top(torch.from_numpy(np.abs(sparse)), 16) == expected
        assert not layer.sparse.values.any()
        assert not layer.B.any()


def test_dsee_finds_planted_entries(start):
    """Low rank plus a few large entries: the support is these entries."""
    tuner, _ = start("dsee")
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(40, 6, generator=generator, dtype=DOUBLE)
    weight = 0.1 * low @ torch.randn(6, 50, generator=generator, dtype=DOUBLE)
    planted = torch.randperm(2000, generator=generator)[:12]
    weight.view(-1)[planted] += 3.0
    first = torch.randn(1, 50, generator=generator, dtype=DOUBLE)
    u, v = tuner.method.low_rank_part(weight, first, 6, 1, 0.5, 0.65)
    assert set(planted.tolist()) == top((weight - u @ v).abs(), 12)


def test_dsee_start(start):
    tuner, _ = start("dsee", rank=16)
    a = torch.cat([layer.A.flatten() for _, layer in tuner.ctx.adapters()])
    assert abs(a.detach().std().item() - 0.02) < 0.001
    with pytest.raises(SuiteError, match="entries: 9999"):
        start("dsee", settings={"entries": 9999})


# --- diff pruning --------------------------------------------------------------------------------


@pytest.mark.parametrize(("lower", "upper"), [(-1.5, 1.5), (-0.1, 1.1)])
def test_hard_concrete_gate_and_its_expected_l0(lower, upper, start):
    method = start("diff_pruning")[0].method
    alpha = torch.linspace(-4, 4, 9, dtype=DOUBLE)
    generator = np.random.default_rng(0)
    u = generator.uniform(1e-4, 1 - 1e-4, (40_000, 1))
    concrete = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + alpha.numpy())))
    z = np.minimum(1, np.maximum(0, concrete * (upper - lower) + lower))
    found = method.hard_concrete(alpha, lower, upper, torch.from_numpy(u))
    assert distance(found, torch.from_numpy(z)) < 1e-12
    opened = method.open_probability(alpha, lower, upper).numpy()
    expected = 1 / (1 + np.exp(-(alpha.numpy() - np.log(-lower / upper))))
    assert np.allclose(opened, expected, atol=1e-12)
    assert np.abs((z > 0).mean(0) - opened).max() < 4 * 0.5 / 200  # four deviations
    still = method.hard_concrete(alpha, lower, upper, None).numpy()
    plain = 1 / (1 + np.exp(-alpha.numpy())) * (upper - lower) + lower
    assert np.allclose(still, np.clip(plain, 0, 1), atol=1e-12)


@pytest.mark.parametrize("structured", [True, False])
def test_diff_pruning_penalty_is_the_expected_number_of_open_gates(structured, start):
    settings = {"structured": structured, "l0": 0.5}
    tuner, _ = start("diff_pruning", settings=settings)
    randomise(tuner)
    total = 0.0
    for _, layer in tuner.ctx.adapters():
        opened = 1 / (1 + np.exp(-layer.alpha.detach().numpy()))
        group = 1.0
        if structured:
            group = 1 / (1 + np.exp(-layer.alpha_group.detach().numpy()))
        total += float((opened * group).sum())
        # The product is the truth: two independent gates must both be open.
        open_ = [float((layer.gate(True) > 0).double().mean()) for layer.seed in range(300)]
        assert abs(np.mean(open_) - (opened * group).mean()) < 0.12
    assert tuner.penalty().item() == pytest.approx(0.5 * total, rel=1e-12)
    shapes = [layer.base.weight.numel() for _, layer in tuner.ctx.adapters()]
    assert tuner.trained_count() == 2 * sum(shapes) + structured * len(shapes)


@pytest.mark.parametrize("structured", [True, False])
def test_diff_pruning_gradients_are_those_of_the_formula(structured, start, make_model):
    """Against dense weights of a plain model with the gates written out, penalty included."""
    settings = {"structured": structured, "l0": 1e-3, "alpha": 1.0}
    tuner, batches = start("diff_pruning", settings=settings)
    randomise(tuner)
    model, weights, leaves, penalty = make_model("llama", DOUBLE), {}, [], 0.0
    for n, layer in tuner.ctx.adapters():
        noise = torch.Generator().manual_seed(layer.seed)
        own = [layer.w, layer.alpha] + ([layer.alpha_group] if structured else [])
        copied = [p.detach().clone().requires_grad_(True) for p in own]
        leaves += zip(own, copied, strict=True)
        z, opened = 1.0, 1.0
        for alpha in copied[1:]:
            u = torch.rand(alpha.shape, generator=noise, dtype=DOUBLE).clamp(1e-4, 1 - 1e-4)
            concrete = torch.sigmoid(u.log() - (1 - u).log() + alpha)
            z = z * (3.0 * concrete - 1.5).clamp(0, 1)
            opened = opened * torch.sigmoid(alpha)
        weights[f"{n}.weight"] = model.get_parameter(f"{n}.weight").detach() + z * copied[0]
        penalty = penalty + 1e-3 * opened.sum()
    tuner.ctx.model.train()
    backward(tuner, batches[0])
    (functional_call(model, weights, kwargs=batches[0]).loss + penalty).backward()
    for own, other in leaves:
        assert distance(own.grad, other.grad) < 1e-9


def test_diff_pruning_prunes_globally_and_then_trains_what_is_kept(start):
    settings = {"keep": 0.03, "structured": True, "alpha": 2.0, "gate_learning_rate": 0.3}
    tuner, batches = start("diff_pruning", steps=6, settings=settings)
    layers = dict(tuner.ctx.adapters())
    train(tuner, batches, 2, optimiser := optimiser_of(tuner, 0.0))
    seeds = [layer.seed for layer in layers.values()]
    assert len(set(seeds)) == len(seeds)
    # The third step ends the first phase: what it leaves, before pruning, by hand.
    method_step = tuner.method.after_step
    tuner.method.after_step = lambda ctx: None
    train(tuner, batches, 1, optimiser)
    tuner.method.after_step = method_step
    deltas = {}
    for n, layer in layers.items():
        z = (3 * torch.sigmoid(layer.alpha) - 1.5).clamp(0, 1)
        z = z * (3 * torch.sigmoid(layer.alpha_group) - 1.5).clamp(0, 1)
        deltas[n] = (z * layer.w).detach()
    everything = torch.cat([d.flatten() for d in deltas.values()])
    tuner.after_step()
    assert {layer.seed for layer in layers.values()}.isdisjoint(seeds)  # other noise, every step
    kept = torch.cat([layer.mask.flatten() for layer in layers.values()])
    assert positions(kept) == top(everything.abs(), int(0.03 * len(everything)))
    for n, layer in layers.items():
        assert distance(layer.w, deltas[n] * layer.mask) < 1e-12
    assert tuner.penalty() is None
    gates = {n: layer.alpha.detach().clone() for n, layer in layers.items()}
    before = {n: layer.w.detach().clone() for n, layer in layers.items()}
    train(tuner, batches, 3, optimiser)
    for n, layer in layers.items():
        assert torch.equal(layer.alpha, gates[n])
        assert not layer.w[~layer.mask].any()
        assert (layer.w != before[n])[layer.mask].all()
    assert tuner.report()["nonzero"] == int(0.03 * len(everything))


def test_diff_pruning_evaluates_without_noise(start):
    tuner, batches = start("diff_pruning", settings={"alpha": 0.5})
    randomise(tuner)
    model = tuner.ctx.model
    first = logits(model, batches[0])
    tuner.method._draw(tuner.ctx, 17)
    assert torch.equal(logits(model, batches[0]), first)
    losses = []
    for step in (1, 1, 2):
        tuner.method._draw(tuner.ctx, step)
        losses.append(float(model.train()(**batches[0]).loss))
    assert losses[0] == losses[1] != losses[2]


def test_diff_pruning_gates_close_under_a_penalty(start):
    """The gates' rate is absolute; with an L0 term that counts, gates close and w follows."""
    shares = []
    for l0 in (0.0, 1.0):
        settings = {"l0": l0, "fraction": 1.0, "gate_learning_rate": 0.3, "structured": False}
        tuner, batches = start("diff_pruning", steps=30, settings=settings)
        rates = {n: g["lr"] for g in tuner.parameter_groups(0.0) for n in g["names"]}
        assert all(r == pytest.approx(0.3) for n, r in rates.items() if n.endswith("alpha"))
        train(tuner, batches, 29)
        shares.append(tuner.report()["expected_open_share"])
    assert shares[0] > 0.5
    assert shares[1] < 0.2


# --- killed and resumed, through the trainer -----------------------------------------------------


class Killed(Exception):
    pass


SETTINGS = {
    "steps": 8, "warmup": 0.25, "batch_size": 4, "accumulation": 2, "schedule": "cosine",
    "weight_decay": 0.1, "clip": 1.0, "precision": "fp32", "gradient_checkpointing": False,
    "checkpoint_every": 1,
}  # fmt: skip

# Each is killed before, at and after the step at which it does its own work.
RESUMED = {
    "rosa": {"restart": False, "fraction": 0.5},  # places after step 4
    "diff_pruning": {"fraction": 0.5, "structured": True},  # prunes after step 4
    "lisa": {"fraction": 0.25},  # draws after steps 2, 4 and 6
    "hft": {"fraction": 0.25},
    "spider": {},
    "magnitude_mask": {"criterion": "random"},
    "gradient_mask": {"scope": "overall"},
    "spa": {},
    "dsee": {},
}


def trainer_of(name, model, folder, settings, kill=None):
    tuner = tuner_of(name, model, [], steps=8, settings=settings)
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, 60, generator.integers(7, 12)) for _ in range(24)]

    def report(step, total, loss):
        if step == kill:
            raise Killed

    data = Examples(ids, [4] * 24, 0)
    return Trainer(tuner, data, SETTINGS, 3, folder and folder / "checkpoint", report)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_killed_around_its_own_work_ends_the_same(name, make_model, tmp_path):
    whole = trainer_of(name, make_model("llama"), None, RESUMED[name])
    whole.run()
    for kill in (4, 5, 6):  # the checkpoint at hand is that of step 3, 4 or 5
        folder = tmp_path / str(kill)
        folder.mkdir()
        killed = trainer_of(name, make_model("llama"), folder, RESUMED[name], kill)
        with pytest.raises(Killed):
            killed.run()
        resumed = trainer_of(name, make_model("llama"), folder, RESUMED[name])
        resumed.run()
        assert resumed.outcome.resumed_from == kill - 1
        assert same_bytes(resumed.tuner.tensors(), whole.tuner.tensors())
        assert resumed.outcome.losses == whole.outcome.losses

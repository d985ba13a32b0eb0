"""Post-hoc methods: their formulas in numpy on small weights, and what they must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ballast.context import PostHoc
from ballast.declare import read_method
from ballast.tuner import load_method
from tiny import METHODS, distance, parents_on, post_hoc_on, same_bytes

DOUBLE = torch.float64
SHAPES = {"a": (6, 5), "b": (4, 6), "c": (7,)}


def module_of(name):
    return load_method(METHODS / f"{name}.py")


def weights_of(seed, size=1.0, names=tuple(SHAPES)):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(SHAPES[name], generator=generator, dtype=DOUBLE) for name in names
    }


def merged(name, base, tuned, own=0, **settings):
    """A method that needs no model, on weights by name."""
    file = read_method(METHODS / f"{name}.py")
    hyper = getattr(module_of(name), "Hyper", file.hyper)(**file.settings(settings))
    ctx = PostHoc(base, tuned, hyper, torch.Generator(), own=own)
    return module_of(name).post_hoc(ctx)


@pytest.fixture
def base():
    return weights_of(0)


@pytest.fixture
def tuned(base):
    """Three parents; the second left `c` alone."""
    names = [("a", "b", "c"), ("a", "b"), ("a", "b", "c")]
    changes = [weights_of(i + 1, 0.1, part) for i, part in enumerate(names)]
    return [{k: base[k] + change[k] for k in change} for change in changes]


def flat(weights, base):
    """All weights of a parent in one vector, the base's where it left them alone."""
    return np.concatenate([weights.get(k, base[k]).numpy().ravel() for k in sorted(base)])


def assert_equal(found, vector, base, bound=1e-13):
    assert distance(torch.from_numpy(flat(found, base)), torch.from_numpy(vector)) < bound


# Soup and TIES.


def test_soup_is_the_mean(base, tuned):
    found = merged("model_soup", base, tuned)
    assert_equal(found, np.mean([flat(t, base) for t in tuned], axis=0), base)
    assert same_bytes(merged("model_soup", base, tuned[:1]), tuned[0])


def ties_oracle(deltas, keep):
    """Entry by entry, as the paper's algorithm 1 says it."""
    trimmed = np.zeros_like(deltas)
    for t, delta in enumerate(deltas):
        kept = np.argsort(-np.abs(delta))[: round(keep * len(delta))]
        trimmed[t, kept] = delta[kept]
    sums = trimmed.sum(0)
    majority = np.sign(np.sign(sums).sum())
    found = np.zeros(deltas.shape[1])
    for j, total in enumerate(sums):
        sign = np.sign(total) if total else majority
        agreeing = [d for d in trimmed[:, j] if d and np.sign(d) == sign]
        found[j] = np.mean(agreeing) if agreeing else 0.0
    return found


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_ties_is_the_algorithm(base, tuned, keep, scale):
    start = flat(base, base)
    deltas = np.stack([flat(t, base) - start for t in tuned])
    found = merged("ties", base, tuned, keep=keep, scale=scale)
    assert_equal(found, start + scale * ties_oracle(deltas, keep), base)


def test_ties_by_hand():
    """Signs, agreement, and entries whose sum is 0, which take the majority's sign."""
    base = {"w": torch.zeros(5, dtype=DOUBLE)}
    changes = [[3.0, -1.0, 0.5, 2.0, 1.0], [-1.0, -3.0, 1.5, -2.0, 0.0]]
    parents = [{"w": torch.tensor(c, dtype=DOUBLE)} for c in changes]
    found = merged("ties", base, parents, keep=1.0)["w"]
    assert found.tolist() == [3.0, -2.0, 1.0, 2.0, 1.0]
    flipped = merged("ties", base, [{"w": -p["w"]} for p in parents], keep=1.0)["w"]
    assert flipped.tolist() == [-3.0, 2.0, -1.0, -2.0, -1.0]


def test_ties_of_one_parent_is_magnitude_trimming(base, tuned):
    parent = tuned[0]
    start, end = flat(base, base), flat(parent, base)
    sizes = np.abs(end - start)
    kept = sizes >= np.sort(sizes)[-round(0.2 * sizes.size)]
    assert kept.sum() == round(0.2 * sizes.size)
    assert_equal(merged("ties", base, [parent]), np.where(kept, end, start), base)
    for dtype in (DOUBLE, torch.float32, torch.bfloat16):
        plain, own = ({k: v.to(dtype) for k, v in w.items()} for w in (base, parent))
        assert same_bytes(merged("ties", plain, [own], keep=1.0), own)
        assert same_bytes(merged("ties", plain, [own], keep=0.0), plain)
        assert same_bytes(merged("ties", plain, [own], scale=0.0), plain)


# EMR.


def emr_oracle(deltas, own):
    """Elect, mask, rescale, as in the paper's section 3.2, entry by entry."""
    count = deltas.shape[1]
    tau = np.zeros(count)
    for j in range(count):
        sign = np.sign(deltas[:, j].mean())
        agreeing = [abs(d) for d in deltas[:, j] if np.sign(d) == sign]
        tau[j] = sign * max(agreeing, default=0.0)
    part = np.where(deltas[own] * tau > 0, tau, 0.0)
    return part * np.abs(deltas[own]).sum() / np.abs(part).sum()


@pytest.mark.parametrize("own", [0, 1, 2])
def test_emr_is_the_formula_for_the_cells_own_target(base, tuned, own):
    start = flat(base, base)
    deltas = np.stack([flat(t, base) - start for t in tuned])
    found = flat(merged("emr", base, tuned, own=own), base)
    expected = emr_oracle(deltas, own)
    assert distance(torch.from_numpy(found - start), torch.from_numpy(expected)) < 1e-13
    # The paper's purpose of the rescaler: the change is as large as the parent's own.
    assert np.abs(found - start).sum() == pytest.approx(np.abs(deltas[own]).sum(), rel=1e-12)
    signs = np.sign(found - start)
    assert np.all((signs == 0) | (signs == np.sign(deltas[own])))


def test_emr_by_hand():
    base = {"w": torch.zeros(4, dtype=DOUBLE)}
    changes = [[3.0, -1.0, 1.0, 2.0], [-1.0, -3.0, -1.0, 1.0]]  # the third has a mean of 0
    parents = [{"w": torch.tensor(c, dtype=DOUBLE)} for c in changes]
    first, second = (merged("emr", base, parents, own=i)["w"] for i in (0, 1))
    assert distance(first, torch.tensor([3.0, -3.0, 0.0, 2.0], dtype=DOUBLE) * 7 / 8) < 1e-15
    assert distance(second, torch.tensor([0.0, -3.0, 0.0, 2.0], dtype=DOUBLE) * 6 / 5) < 1e-15


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_emr_reconstructs_one_parent_and_agreeing_ones_exactly(base, tuned, dtype):
    plain, own = ({k: v.to(dtype) for k, v in w.items()} for w in (base, tuned[0]))
    assert same_bytes(merged("emr", plain, [own]), own)
    assert same_bytes(merged("emr", plain, [own, own], own=1), own)
    assert same_bytes(merged("emr", plain, [plain]), plain)  # a parent that changed nothing


# Fisher merging.


def planted(monkeypatch, fishers):
    """Let the method see these Fishers, one per parent."""
    module = module_of("fisher_merge")
    monkeypatch.setattr(module, "fisher_of", lambda ctx, parent, names: dict(fishers[parent]))


def test_equal_fishers_give_the_mean(base, tuned, monkeypatch):
    same = {k: v.abs() + 0.1 for k, v in weights_of(9).items()}
    planted(monkeypatch, [same] * 3)
    expected = np.mean([flat(t, base) for t in tuned], axis=0)
    assert_equal(merged("fisher_merge", base, tuned), expected, base)
    # Scaled as a whole, a Fisher weighs the same: each is divided by its norm.
    planted(monkeypatch, [same, {k: 100 * v for k, v in same.items()}, same])
    assert_equal(merged("fisher_merge", base, tuned), expected, base)
    unequal = merged("fisher_merge", base, tuned, normalise=False)
    vectors = [flat(t, base) for t in tuned]
    assert_equal(unequal, (vectors[0] + 100 * vectors[1] + vectors[2]) / 102, base)


def test_planted_fishers_pick_the_parent_that_matters(base, tuned, monkeypatch):
    """Each entry matters to one parent, or to none: then the own one's value stays."""
    owner = {k: torch.randint(-1, 3, v.shape, generator=torch.Generator().manual_seed(4))
             for k, v in base.items()}  # fmt: skip
    planted(monkeypatch, [{k: (o == t).double() for k, o in owner.items()} for t in range(3)])
    for own in range(3):
        found = flat(merged("fisher_merge", base, tuned, own=own, floor=1e-14), base)
        vectors = np.stack([flat(t, base) for t in tuned])
        owners = np.concatenate([owner[k].numpy().ravel() for k in sorted(base)])
        chosen = np.where(owners < 0, own, owners)
        expected = vectors[chosen, np.arange(len(chosen))]
        assert distance(torch.from_numpy(found), torch.from_numpy(expected)) < 1e-12
    shared = flat(merged("fisher_merge", base, tuned, favour_own=False, normalise=False), base)
    nobody = owners < 0
    assert np.allclose(shared[nobody], vectors.mean(0)[nobody], rtol=1e-12)


def fisher_oracle(model, weights, batch, count):
    """Mean over single examples of the squared gradient of the answer's summed log-probability."""
    model.load_state_dict({**model.state_dict(), **weights})
    found = {}
    for i in range(count):
        model.zero_grad()
        scores = model(input_ids=batch["input_ids"][i : i + 1]).logits[0].log_softmax(-1)
        answer = batch["labels"][i]
        places = [t for t in range(1, len(answer)) if answer[t] != -100]
        sum(scores[t - 1, answer[t]] for t in places).backward()
        for name, parameter in model.named_parameters():
            found[name] = found.get(name, 0) + parameter.grad.numpy() ** 2 / count
    return found


@pytest.mark.parametrize("own", [0, 1])
def test_fisher_merge_on_a_model(own, make_model, make_batches):
    """Each parent's Fisher at its own weights, on its own examples, as many as asked for."""
    model, batches = make_model("llama", DOUBLE), make_batches("llama", 2, DOUBLE)
    batches[1]["labels"][0, :8] = -100  # answers of different lengths: sums, not means, count
    tuned = parents_on(model, 2)
    ctx = post_hoc_on("fisher_merge", model, tuned, batches, own=own, settings={"examples": 2})
    found = module_of("fisher_merge").post_hoc(ctx)
    oracle = make_model("llama", DOUBLE)
    base = oracle.state_dict()
    base = {k: v.clone() for k, v in base.items()}
    names = sorted({k for parent in tuned for k in parent})
    fishers = []
    for parent, batch in zip(tuned, batches, strict=True):
        fisher = fisher_oracle(oracle, {**base, **parent}, batch, 2)
        fishers.append({name: fisher[name] for name in names})
    norms = [np.sqrt(sum((f**2).sum() for f in fisher.values())) for fisher in fishers]
    assert set(found) == set(names)
    for name in names:
        above = below = 0
        for t, parent in enumerate(tuned):
            weight = np.maximum(fishers[t][name], 1e-6 if t == own else 0) / norms[t]
            above = above + weight * parent.get(name, base[name]).numpy()
            below = below + weight
        assert distance(found[name], torch.from_numpy(above / below)) < 1e-7, (
            name
        )  # norms and loss of transformers are in fp32
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


# Model Tailor.


def problem(rows=3, columns=8, tokens=40, seed=0):
    """A tuned and a base matrix and correlated inputs X [n, tokens] in numpy."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(columns, columns))
    inputs = mixing @ generator.normal(size=(columns, tokens))
    start = generator.normal(size=(rows, columns))
    return start + 0.5 * generator.normal(size=(rows, columns)), start, inputs


def damped(inputs, examples, damping=0.01):
    hessian = 2 / examples * inputs @ inputs.T
    np.fill_diagonal(hessian, np.where(np.diag(hessian) == 0, 1, np.diag(hessian)))
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def z(values):
    """Per row, 0 for a row without variance."""
    deviation = values.std(1, ddof=1, keepdims=True)
    return (values - values.mean(1, keepdims=True)) / np.where(deviation > 0, deviation, np.inf)


def free_optimum(weight, fixed, hessian):
    """q with q[:k] = fixed that minimises (w - q) H (w - q)^T, by least squares."""
    k, root = len(fixed), np.linalg.cholesky(hessian)
    rest = np.linalg.lstsq(root[k:].T, -(root[:k].T @ (fixed - weight[:k])), rcond=None)[0]
    return np.concatenate([fixed, weight[k:] + rest])


def tailor_oracle(weight, start, hessian, sparsity, block, change_weight):
    """The minus sign without any Cholesky sweep: a column that goes back is fixed at W0, one that
    stays is fixed at its best value given all columns fixed before it."""
    m, n = weight.shape
    result, reverted = np.zeros((m, n)), np.zeros((m, n), dtype=bool)
    for first in range(0, n, block):
        last = min(first + block, n)
        now = np.stack([free_optimum(weight[i], result[i, :first], hessian) for i in range(m)])
        cost = np.array([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(first, last)])
        change = np.abs(weight - start)[:, first:last]
        # diag(U)^2 is the first entry of the inverse of what is left of H.
        score = change_weight * z(change) + (1 - change_weight) * z(now[:, first:last] ** 2 / cost)
        order = np.argsort(score.ravel(), kind="stable")
        mask = np.zeros(score.size, dtype=bool)
        mask[order[: round(sparsity * score.size)]] = True
        reverted[:, first:last] = mask.reshape(score.shape)
        for i in range(m):
            for j in range(first, last):
                best = free_optimum(weight[i], result[i, :j], hessian)[j]
                result[i, j] = start[i, j] if reverted[i, j] else best
    return result, reverted


def tailored(weight, start, hessian, **settings):
    module = module_of("model_tailor")
    tensors = [torch.from_numpy(x.copy()) for x in (weight, start, hessian)]
    return module.tailor(*tensors, module.Hyper(**settings)).numpy()


@pytest.mark.parametrize("block", [8, 3])
@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_minus_is_the_best_value_column_by_column(block, sparsity):
    weight, start, inputs = problem()
    settings = {"sparsity": sparsity, "block": block, "change_weight": 0.6}
    found = tailored(weight, start, 2 / 5 * inputs @ inputs.T, **settings)
    expected, reverted = tailor_oracle(weight, start, damped(inputs, 5), sparsity, block, 0.6)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-9
    assert np.array_equal(found == start, reverted)


def test_one_reverted_entry_is_compensated_as_well_as_can_be():
    """Brute force: no change of the entries after it brings the outputs nearer."""
    weight, start, inputs = problem(rows=1, columns=6)
    hessian = 2 * inputs @ inputs.T
    settings = {"sparsity": 1 / 6, "damping": 1e-6, "change_weight": 1.0}
    found = tailored(weight, start, hessian, **settings)[0]
    (place,) = np.flatnonzero(found == start[0])
    assert place == np.abs(weight - start)[0].argmin()
    assert np.array_equal(found[:place], weight[0, :place])

    def cost(row):
        return np.linalg.norm((weight[0] - row) @ inputs)

    rest = inputs[place + 1 :].T
    goal = (weight[0, place] - start[0, place]) * inputs[place]
    best = found.copy()
    best[place + 1 :] = weight[0, place + 1 :] + np.linalg.lstsq(rest, goal, rcond=None)[0]
    assert cost(found) == pytest.approx(cost(best), rel=1e-6)
    assert cost(found) < cost(np.where(np.arange(6) == place, start[0], weight[0]))
    generator = np.random.default_rng(1)
    for _ in range(200):
        other = found.copy()
        other[place + 1 :] += 0.05 * generator.normal(size=5 - place)
        assert cost(found) <= cost(other) * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_minus_beats_no_compensation_which_beats_plus(seed):
    """On ||(W - Q) X||, the same entries reverted: one block, so that the scores are the same."""
    weight, start, inputs = problem(rows=6, columns=16, tokens=64, seed=seed)
    hessian = 2 / 4 * inputs @ inputs.T
    found = {
        sign: tailored(weight, start, hessian, sparsity=0.5, block=16, compensation=sign)
        for sign in ("minus", "plus")
    }
    assert np.array_equal(found["minus"] == start, found["plus"] == start)
    assert (found["minus"] == start).sum() == 48
    found["none"] = np.where(found["minus"] == start, start, weight)
    cost = {key: np.linalg.norm((weight - q) @ inputs) for key, q in found.items()}
    assert cost["minus"] < cost["none"] < cost["plus"]


def test_plus_is_the_released_sweep():
    """The same steps with the other sign, entry by entry, from the definition of U."""
    weight, start, inputs = problem(rows=2, columns=7)
    found = tailored(
        weight, start, 2 / 3 * inputs @ inputs.T, sparsity=0.4, block=7, compensation="plus"
    )
    inverse = np.linalg.inv(damped(inputs, 3))
    upper = np.linalg.cholesky(inverse).T  # upper.T @ upper = inverse, as numpy's L L^T
    assert np.allclose(upper.T @ upper, inverse)
    score = 0.8 * z(np.abs(weight - start)) + 0.2 * z(weight**2 / np.diag(upper) ** 2)
    mask = np.zeros(score.size, dtype=bool)
    mask[np.argsort(score.ravel(), kind="stable")[: round(0.4 * score.size)]] = True
    expected = weight.copy()
    for row, gone in zip(range(2), mask.reshape(score.shape), strict=True):
        for j in range(7):
            error = (expected[row, j] - start[row, j]) / upper[j, j] if gone[j] else 0.0
            expected[row, j] -= error * upper[j, j]
            for k in range(j + 1, 7):
                expected[row, k] += error * upper[j, k]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-12


def test_inputs_that_are_always_zero_and_rows_without_change():
    weight, start, inputs = problem()
    inputs[2] = 0
    weight[1] = start[1]
    found = tailored(weight, start, 2 / 5 * inputs @ inputs.T, sparsity=0.5)
    expected, reverted = tailor_oracle(weight, start, damped(inputs, 5), 0.5, 8, 0.8)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-9
    assert reverted.sum() == 12
    assert np.array_equal(found[1], start[1])


def tailor_on(model, tuned, batches, **settings):
    module = module_of("model_tailor")
    ctx = post_hoc_on("model_tailor", model, tuned, batches, settings=settings)
    found = module.post_hoc(ctx)
    ctx.load(None)
    return found


def linears_of(tuned):
    """Names of the tuned matrices of the language model's linears."""
    return [name for name in tuned if name.endswith("_proj.weight")]


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_model_tailor_end_points(kind, make_model, make_batches):
    model, batches = make_model(kind), make_batches(kind, 1)
    (parent,) = parents_on(model, 1)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    connector = [k for k in base if "multi_modal_projector" in k]
    assert bool(connector) == (kind == "llava")
    tuned = parent | {k: base[k] + 1 for k in connector}
    same = tailor_on(model, [tuned], batches, sparsity=0.0)
    assert same_bytes(same, parent), "all but the connector, which goes back to the base"
    undone = tailor_on(model, [tuned], batches, sparsity=1.0)
    matrices = linears_of(parent)
    assert undone.keys() == parent.keys()
    for name, weight in undone.items():
        assert torch.equal(weight, (base if name in matrices else parent)[name]), name
    half = tailor_on(model, [tuned], batches, layers=0.5)
    layers = {int(n.split("layers.")[1].split(".")[0]) for n in matrices}
    edited = {n for n in matrices if not torch.equal(half[n], parent[n])}
    chosen = sorted(layers)[len(layers) - round(0.5 * len(layers)) :]
    assert {int(n.split("layers.")[1].split(".")[0]) for n in edited} == set(chosen)


@pytest.mark.parametrize("inputs", ["edited", "tuned"])
def test_model_tailor_measures_inputs_on_the_tuned_model(inputs, make_model, make_batches):
    """Layer 1's q_proj: H from hooks of this test, on the tuned or the partly edited model."""
    model, (batch,) = make_model("llama", DOUBLE), make_batches("llama", 1, DOUBLE, size=4)
    (parent,) = parents_on(model, 1)
    settings = {"inputs": inputs, "examples": 3, "sparsity": 0.6, "block": 20}
    found = tailor_on(model, [parent], [batch], **settings)
    probe = make_model("llama", DOUBLE)
    base = {k: v.clone() for k, v in probe.state_dict().items()}
    source = dict(parent)
    if inputs == "edited":
        first = {k: v for k, v in found.items() if ".layers.0." in k}
        source |= first
        assert any(not torch.equal(first[k], parent[k]) for k in first)
    probe.load_state_dict({**base, **source})
    seen = []
    target = "model.layers.1.self_attn.q_proj"
    probe.get_submodule(target).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().numpy())
    )
    for i in range(3):
        probe(input_ids=batch["input_ids"][i : i + 1])
    stacked = np.concatenate([x.reshape(-1, x.shape[-1]) for x in seen]).T
    weight, start = parent[f"{target}.weight"].numpy(), base[f"{target}.weight"].numpy()
    expected, _ = tailor_oracle(weight, start, damped(stacked, 3), 0.6, 20, 0.8)
    assert distance(found[f"{target}.weight"], torch.from_numpy(expected)) < 1e-8


def test_model_tailor_reverts_its_share(make_model, make_batches):
    model, batches = make_model("llama"), make_batches("llama", 1)
    (parent,) = parents_on(model, 1)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    found = tailor_on(model, [parent], batches, sparsity=0.9, block=128)
    for name in linears_of(parent):
        reverted = (found[name] == base[name]).sum().item()
        assert reverted == round(0.9 * base[name].numel())
        assert not torch.equal(
            found[name], torch.where(found[name] == base[name], base[name], parent[name])
        )


@pytest.mark.parametrize("name", ["ties", "emr", "model_soup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_kept_and_nothing_changes_in_place(name, dtype, base, tuned):
    plain = {k: v.to(dtype) for k, v in base.items()}
    parents = [{k: v.to(dtype) for k, v in t.items()} for t in tuned]
    copies = [{k: v.clone() for k, v in w.items()} for w in (plain, *parents)]
    found = merged(name, plain, parents)
    assert {w.dtype for w in found.values()} == {dtype}
    assert all(same_bytes(*pair) for pair in zip((plain, *parents), copies, strict=True))
    exact = merged(name, {k: v.double() for k, v in plain.items()},
                   [{k: v.double() for k, v in p.items()} for p in parents])  # fmt: skip
    assert same_bytes(found, {k: v.to(dtype) for k, v in exact.items()}), "rounded once"

"""What every file in `methods/` must keep, on both kinds of base; a new file is tested for free."""

from __future__ import annotations

import pytest
import torch

from ballast.adapters import Adapter
from ballast.budget import trained_parameters
from ballast.context import PostHoc
from ballast.declare import discover
from ballast.errors import MethodError, SuiteError
from ballast.suite import adapts_connector
from ballast.tuner import load_method
from tiny import (
    METHODS,
    backward,
    distance,
    logits,
    optimiser_of,
    parents_on,
    post_hoc_on,
    randomise,
    same_bytes,
    train,
    tuner_of,
)

FILES = discover(METHODS)
TRAINED = [name for name, file in FILES.items() if file.declaration.trains]
RANKED = [name for name in TRAINED if FILES[name].declaration.rank]
# Methods that put adapters on linears, whether by a rank, another size or a density.
ADAPTING = [
    name
    for name in TRAINED
    if name in RANKED or FILES[name].declaration.family == "reparameterization"
]
POST_HOC = [name for name in FILES if name not in TRAINED]
KINDS = {"llama": "text", "llava": "vision-language"}
DOUBLE = torch.float64

each_method = pytest.mark.parametrize("name", TRAINED)
each_ranked = pytest.mark.parametrize("name", RANKED)
each_adapting = pytest.mark.parametrize("name", ADAPTING)
each_base = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def started(make_model, make_batches):
    """started(name, kind, dtype, random=True, **options) -> (started tuner, batches)."""

    def start(name, kind, dtype=DOUBLE, random=True, **options):
        if KINDS[kind] not in FILES[name].declaration.applies_to:
            pytest.skip(f"declared as not for {KINDS[kind]} bases")
        batches = make_batches(kind, 2, dtype)
        tuner = tuner_of(name, make_model(kind, dtype), batches, **options)
        tuner.start()
        if random:
            randomise(tuner)
        return tuner, batches

    return start


@each_base
@each_method
def test_start_is_the_base_or_declared_otherwise(name, kind, started, make_model):
    tuner, (batch, _) = started(name, kind, random=False)
    moved = distance(logits(tuner.ctx.model, batch), logits(make_model(kind, DOUBLE), batch))
    if FILES[name].declaration.unchanged_at_start:
        assert moved < 1e-12
    else:
        assert moved > 1e-6


@each_base
@each_method
def test_gradients_and_changes_only_where_declared(name, kind, started, make_model):
    tuner, batches = started(name, kind)
    model, trainable = tuner.ctx.model, tuner.ctx.trainable()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trainable}
    backward(tuner, batches[0])
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in trainable:
            if parameter.grad is None and FILES[name].declaration.alternates:
                continue
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name
            assert parameter.grad.any(), parameter_name
        else:
            assert parameter.grad is None, parameter_name
    train(tuner, batches, 3)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())

    before = make_model(kind, DOUBLE).state_dict()
    declared = ["embed_tokens", "lm_head"] if getattr(tuner.ctx.hyper, "embeddings", False) else []
    if trains_the_connector_itself(name):
        declared.append(tuner.ctx.anatomy.connector)
    outside = [n for n in before if f"{tuner.ctx.anatomy.layers}." not in n]
    assert any("embed_tokens" in n for n in outside)
    assert any("norm" in n for n in outside)
    after = model.state_dict()
    for n in outside:
        assert torch.equal(after[n], before[n]) or any(part in n for part in declared), n


@each_base
@each_method
def test_every_trained_tensor_moves(name, kind, started):
    tuner, batches = started(name, kind)
    before = {n: p.detach().clone() for n, p in tuner.ctx.trainable().items()}
    train(tuner, batches, 2)
    moved = [not torch.equal(p, before[n]) for n, p in tuner.ctx.trainable().items()]
    sparse = tuner.trained_count() < sum(p.numel() for p in before.values())
    assert any(moved) if sparse or FILES[name].declaration.alternates else all(moved)


def _gradients(name, tuner):
    """Gradients by name; only a method that declares so may leave parameters without one."""
    found = {n: p.grad for n, p in tuner.ctx.trainable().items()}
    given = {n: grad for n, grad in found.items() if grad is not None}
    assert given
    assert len(given) == len(found) or FILES[name].declaration.alternates
    return given


def home(name):
    """A kind of tiny base that a method applies to."""
    return next(k for k, kind in KINDS.items() if kind in FILES[name].declaration.applies_to)


def trains_the_connector_itself(name):
    """Selective methods without anything to tune on a text model."""
    declaration = FILES[name].declaration
    return declaration.family == "selective" and "text" not in declaration.applies_to


def _layer_parameters(model, tuner, chosen):
    names = tuner.ctx.anatomy.layer_names(model)
    return sum(p.numel() for n in chosen(names) for p in model.get_submodule(n).parameters())


SELECTIVE = {
    "full_st": lambda names: names,
    "l2_sp": lambda names: names,
    "top_st": lambda names: names[:1],  # a quarter of 4, or of 3, layers
    "last_st": lambda names: names[-1:],
}


@each_base
@each_method
def test_trained_count_equals_its_formula(name, kind, started, make_model):
    tuner, _ = started(name, kind)
    plain = make_model(kind)
    measured = sum(p.numel() for p in tuner.ctx.trainable().values())
    if name in SELECTIVE:
        assert tuner.trained_count() == measured
        assert measured == _layer_parameters(plain, tuner, SELECTIVE[name])
    elif name == "fish":
        everything = _layer_parameters(plain, tuner, lambda names: names)
        assert tuner.trained_count() == int(everything * tuner.ctx.hyper.keep_ratio)
    elif hasattr(tuner.method, "total_parameters"):
        fresh = tuner_of(name, plain, []).ctx
        size = FILES[name].declaration.size
        size = getattr(fresh.hyper, size) if size else fresh.rank
        assert tuner.trained_count() == tuner.method.total_parameters(fresh, size)
    elif hasattr(tuner.method, "parameter_count"):
        shapes = [plain.get_submodule(target).weight.shape for target in tuner.ctx.targets]
        size = FILES[name].declaration.size
        size = getattr(tuner.ctx.hyper, size) if size else tuner.ctx.rank
        expected = sum(tuner.method.parameter_count(m, n, size) for m, n in shapes)
        assert tuner.trained_count() == measured == expected
    assert 0 < tuner.trained_count() <= measured


@each_base
@each_method
def test_seed_reaches_the_adapter_iff_the_start_is_random(name, kind, started):
    first, again, other = (
        started(name, kind, random=False, seed=seed)[0].tensors() for seed in (0, 0, 1)
    )
    assert same_bytes(first, again)
    assert same_bytes(first, other) != FILES[name].declaration.random_start


@each_base
@each_method
def test_same_seed_gives_the_same_bytes_after_training(name, kind, started):
    runs = []
    for _ in range(2):
        tuner, batches = started(name, kind, torch.float32)
        train(tuner, batches, 3)
        runs.append(tuner.tensors())
    assert same_bytes(*runs)


@each_base
@each_method
def test_saved_and_loaded_is_identical(name, kind, started, make_model):
    tuner, batches = started(name, kind, torch.float32)
    train(tuner, batches, 3)
    stored = tuner.tensors()
    loaded = tuner_of(name, make_model(kind), [])  # no batches: nothing may be calibrated again
    loaded.restore(stored)
    assert same_bytes(loaded.tensors(), stored)
    for batch in batches:
        assert torch.equal(logits(loaded.ctx.model, batch), logits(tuner.ctx.model, batch))
    assert not any(t.requires_grad for t in stored.values())


@each_method
def test_stored_tensors_that_do_not_fit_are_refused(name, started, make_model):
    tuner, _ = started(name, home(name), torch.float32)
    stored = tuner.tensors()
    stored.pop(f"weight.{next(iter(tuner.ctx.trainable()))}")
    with pytest.raises(MethodError, match="does not fit"):
        tuner_of(name, make_model(home(name)), []).restore(stored)


@each_base
@each_method
@pytest.mark.parametrize("at", [1, 2, 3])
def test_killed_and_resumed_is_identical(name, kind, at, started, make_model):
    whole, batches = started(name, kind, torch.float32)
    train(whole, batches, 4)

    killed, _ = started(name, kind, torch.float32)
    optimiser = train(killed, batches, at)
    resumed = tuner_of(name, make_model(kind), [])
    resumed.restore(killed.tensors())
    resumed.ctx.step = at
    fresh = optimiser_of(resumed)
    fresh.load_state_dict(optimiser.state_dict())
    train(resumed, batches, 4 - at, fresh)
    assert same_bytes(resumed.tensors(), whole.tensors())


@each_base
@each_method
@pytest.mark.parametrize(("dtype", "bound"), [(DOUBLE, 1e-10), (torch.float32, 1e-5)])
def test_merged_equals_unmerged(name, kind, dtype, bound, started, make_model):
    if not FILES[name].declaration.merges:
        pytest.skip("declared as not mergeable")
    tuner, batches = started(name, kind, dtype)
    train(tuner, batches, 3)
    unmerged = [logits(tuner.ctx.model, batch) for batch in batches]
    tuner.merge()
    model = tuner.ctx.model
    assert not any(isinstance(module, Adapter) for module in model.modules())
    assert model.state_dict().keys() == make_model(kind).state_dict().keys()
    for batch, expected in zip(batches, unmerged, strict=True):
        assert distance(logits(model, batch), expected) < bound


@each_base
@each_adapting
def test_bf16_base_keeps_fp32_adapters_and_merges_within_rounding(name, kind, started):
    tuner, batches = started(name, kind, torch.bfloat16)
    train(tuner, batches, 2)
    exact = {}
    for module_name, adapter in tuner.ctx.adapters():
        assert adapter.base.weight.dtype == torch.bfloat16
        floats = [t for t in adapter.own_tensors().values() if t.is_floating_point()]
        assert {t.dtype for t in floats} == {torch.float32}
        if FILES[name].declaration.merges:
            exact[module_name] = adapter.merged_weight().clone()
    unmerged = logits(tuner.ctx.model, batches[0])
    assert unmerged.dtype == torch.bfloat16
    if not FILES[name].declaration.merges:
        return
    tuner.merge()
    for module_name, weight in exact.items():
        merged = tuner.ctx.model.get_submodule(module_name).weight
        assert torch.equal(merged, weight.bfloat16())  # rounded once
    assert distance(logits(tuner.ctx.model, batches[0]), unmerged) < 6 * 2**-8


@each_adapting
def test_autocast_and_inference_mode(name, started):
    """bf16 by autocast stays near fp32; an evaluation in between leaves training possible."""
    tuner, (batch, _) = started(name, "llava", torch.float32)
    with torch.inference_mode():
        exact = tuner.ctx.model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = tuner.ctx.model(**batch)
    found.loss.backward()
    assert distance(found.logits, exact) < 6 * 2**-8
    assert all(grad.any() for grad in _gradients(name, tuner).values())


@each_base
@each_method
def test_gradient_checkpointing_gives_the_same_gradients(name, kind, started):
    found = []
    for checkpointing in (False, True):
        tuner, (batch, _) = started(name, kind)
        model = tuner.ctx.model
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        backward(tuner, batch)
        found.append(_gradients(name, tuner))
    assert all(distance(found[1][n], grad) < 1e-12 for n, grad in found[0].items())


@each_method
def test_accumulation_equals_one_batch(name, started, make_batches):
    """Two halves of a batch give the gradients of the whole, penalty included once."""
    (whole,) = make_batches(home(name), 1, DOUBLE, size=4)
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    found = []
    for batches in ([whole], halves):
        tuner, _ = started(name, home(name))
        for batch in batches:
            backward(tuner, batch, len(batches))
        found.append(_gradients(name, tuner))
    # Norms of transformers compute in fp32: the gradient of a prompt, which passes them once for a
    # whole batch, is rounded with the batch.
    bound = 1e-6 if FILES[name].declaration.family == "additive" else 1e-10
    assert all(distance(found[1][n], grad) < bound for n, grad in found[0].items())


@each_ranked
def test_rank_larger_than_a_matrix_is_refused(name, make_model):
    tuner = tuner_of(name, make_model("llama"), [], rank=17)
    sizes = getattr(tuner.method, "allowed_sizes", None)
    if sizes is not None and 17 in sizes(tuner.ctx):  # a rank that no matrix bounds, as stated
        expected = trained_parameters(tuner.method, tuner.ctx, 17)
        tuner.start()
        assert tuner.trained_count() == expected
        return
    with pytest.raises(SuiteError, match=r"rank 17 is larger than \S*k_proj.*at most 16"):
        tuner.start()


@each_adapting
def test_adapted_embedding(name, started, make_model, tmp_path):
    """Trains, merges and reloads with the tied head as it was; or a clear refusal."""
    options = {"modules": ["q_proj", "embed_tokens"]}
    try:
        tuner, batches = started(name, "llama", **options)
    except SuiteError as refusal:
        if "embedding" not in str(refusal):
            raise
        return
    model = tuner.ctx.model
    embedding = model.get_input_embeddings()
    if FILES[name].declaration.rank:
        assert embedding.rank >= 4  # AdaLoRA starts above the rank that it leaves
        assert tuple(embedding.A.shape) == (embedding.rank, 64)
        assert tuple(embedding.B.shape) == (32, embedding.rank)
    train(tuner, batches, 3)
    unmerged = logits(model, batches[0])
    tuner.merge()
    plain = make_model("llama", DOUBLE)
    assert distance(logits(model, batches[0]), unmerged) < 1e-10
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert not torch.equal(model.get_input_embeddings().weight, model.lm_head.weight)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=DOUBLE)
    assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))


@each_method
@pytest.mark.parametrize("connector", ["frozen", "tuned", "adapted"])
def test_connector(name, connector, started, make_model):
    itself = trains_the_connector_itself(name)
    adapts = adapts_connector(FILES[name])
    if (connector == "adapted" and not adapts) or (connector == "tuned" and itself):
        with pytest.raises(SuiteError, match="connector"):
            started(name, "llava", connector=connector)
        return
    tuner, batches = started(name, "llava", connector=connector)
    ctx = tuner.ctx
    inside = {n for n in ctx.trainable() if ctx.in_connector(n)}
    assert bool(inside) == (itself or connector != "frozen")
    assert all(("base" not in n) for n in inside)
    groups = {n: g for g in tuner.parameter_groups(0.1) for n in g["names"]}
    if connector == "tuned":
        assert not any(isinstance(m, Adapter) for n, m in ctx.adapters() if ctx.in_connector(n))
        assert {groups[n]["lr"] for n in inside} == {1e-3}  # a tenth of the method's own
    before = {n: ctx.trainable()[n].detach().clone() for n in inside}
    train(tuner, batches, 3)
    assert all(not torch.equal(ctx.trainable()[n], before[n]) for n in inside)
    loaded = tuner_of(name, make_model("llava", DOUBLE), [], connector=connector)
    loaded.restore(tuner.tensors())
    unmerged = logits(ctx.model, batches[0])
    assert torch.equal(logits(loaded.ctx.model, batches[0]), unmerged)
    if FILES[name].declaration.merges:
        tuner.merge()
        assert distance(logits(ctx.model, batches[0]), unmerged) < 1e-10


@each_method
def test_report_is_numbers(name, started):
    tuner, batches = started(name, home(name))
    train(tuner, batches, 2)
    assert all(isinstance(value, int | float) for value in tuner.report().values())


# Selective tuning, beyond the contract.


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("top_st", 0.25, {0}),
        ("top_st", 2, {0, 1}),
        ("top_st", 0.7, {0, 1, 2}),
        ("last_st", 0.25, {3}),
        ("last_st", 3, {1, 2, 3}),
    ],
)
def test_selective_layers(name, layers, expected, make_model):
    tuner = tuner_of(name, make_model("llama"), [], settings={"layers": layers})
    tuner.start()
    assert {int(n.split(".")[2]) for n in tuner.ctx.trainable()} == expected
    assert tuner.report() == {"tuned_layers": len(expected)}


@pytest.mark.parametrize("layers", [0, 5, 1.5])
def test_layers_that_do_not_exist_are_refused(layers, make_model):
    tuner = tuner_of("top_st", make_model("llama"), [], settings={"layers": layers})
    with pytest.raises(SuiteError, match="layers"):
        tuner.start()


def test_l2_sp_penalty_is_half_alpha_times_the_squared_distance(started):
    tuner, _ = started("l2_sp", "llama")
    assert tuner.penalty().item() == 0
    total = 0
    for parameter in tuner.ctx.trainable().values():
        parameter.data.add_(0.01)
        total += parameter.numel()
    expected = 0.5 * tuner.ctx.hyper.alpha * total * 1e-4
    assert tuner.penalty().item() == pytest.approx(expected, rel=1e-5)
    assert tuner.report()["distance_from_start"] == pytest.approx((total * 1e-4) ** 0.5)


def test_l2_sp_stays_nearer_to_the_base(started):
    far = []
    for alpha in (0.0, 100.0):
        tuner, batches = started("l2_sp", "llama", settings={"alpha": alpha})
        train(tuner, batches, 4)
        far.append(tuner.report()["distance_from_start"])
    assert far[1] < 0.9 * far[0]


def test_fish_keeps_the_largest_fisher_entries_and_moves_nothing_else(make_batches, make_model):
    batches = make_batches("llama", 2, DOUBLE)
    batches[0]["labels"][0, :8] = -100  # answers of different lengths: sums, not means, count
    tuner = tuner_of("fish", make_model("llama", DOUBLE), batches)
    tuner.start()
    # The oracle: squared gradients of summed log-probabilities, one example at a time.
    plain, own = make_model("llama", DOUBLE), tuner.ctx.own()
    fisher = {n: torch.zeros_like(p) for n, p in own.items()}
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(3)][:5]
    for row in rows:
        plain.zero_grad()
        scores = plain(**row).logits[0, :-1].log_softmax(-1)
        answer = row["labels"][0, 1:]
        sum(scores[i, t] for i, t in enumerate(answer.tolist()) if t != -100).backward()
        for n in fisher:
            fisher[n] += plain.get_parameter(n).grad ** 2
    flat = torch.cat([f.flatten() for f in fisher.values()])
    keep = int(flat.numel() * 0.05)
    limit = flat.topk(keep).values[-1]
    masks = tuner.ctx.scratch["masks"]
    differing = sum(int(((fisher[n] >= limit) != masks[n]).sum()) for n in masks)
    assert differing <= 2  # the oracle sums in float64, the method in float32

    start = {n: p.detach().clone() for n, p in own.items()}
    backward(tuner, batches[0])
    tuner.after_backward()  # before clipping: masked entries count in no norm and no moment
    assert all(not (own[n].grad[~masks[n]]).any() for n in own)
    train(tuner, batches, 3)
    moved = {n: own[n] != start[n] for n in own}
    assert all(torch.equal(moved[n] & ~masks[n], torch.zeros_like(masks[n])) for n in own)
    assert sum(int(m.sum()) for m in moved.values()) > 0.99 * keep
    assert {g["weight_decay"] for g in tuner.parameter_groups(0.1)} == {0.0}


# Post-hoc methods.


def _post_hoc(name, base, tuned, seed=0, **settings):
    file = FILES[name]
    module = load_method(file.path)
    ctx = PostHoc(
        base=base,
        tuned=[tuned],
        hyper=module.Hyper(**file.settings(settings)),
        generator=torch.Generator().manual_seed(seed),
    )
    return module.post_hoc(ctx)


@pytest.fixture
def parents():
    generator = torch.Generator().manual_seed(3)
    base = {f"w{i}": torch.randn(40, 50, generator=generator) for i in range(3)}
    tuned = {
        k: v + 0.1 * torch.randn(v.shape, generator=generator)
        for k, v in base.items()
        if k != "w1"  # a tensor that tuning left alone
    }
    return base, tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("name", POST_HOC)
def test_post_hoc_contract(name, dtype, make_model, make_batches):
    """On a real base, with the parents of two targets where the method takes several."""
    model, batches = make_model("llama", dtype), make_batches("llama", 2, dtype)
    tuned = parents_on(model, 2 if FILES[name].declaration.several_targets else 1)
    given = [{k: v.clone() for k, v in parent.items()} for parent in tuned]
    base = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for seed in (0, 0, 1):
        ctx = post_hoc_on(name, model, tuned, batches, seed=seed)
        results.append(load_method(FILES[name].path).post_hoc(ctx))
        ctx.load(None)
        assert same_bytes(ctx.base, base), "the base was changed in place"
        assert same_bytes(dict(model.state_dict()), base), "more was loaded than the parents change"
        assert all(same_bytes(*pair) for pair in zip(tuned, given, strict=True)), "a parent changed"
    first, again, other = results
    assert same_bytes(first, again)
    assert same_bytes(first, other) != FILES[name].declaration.random_start
    assert first.keys() <= {key for parent in tuned for key in parent}
    assert any(not torch.equal(weight, base[key]) for key, weight in first.items())
    for key, weight in first.items():
        assert weight.dtype == dtype
        assert weight.shape == base[key].shape
        assert not weight.requires_grad
        assert torch.isfinite(weight).all()


def test_wise_ft_end_points_are_exact(parents):
    base, tuned = parents
    assert same_bytes(_post_hoc("wise_ft", base, tuned, alpha=0.0), {k: base[k] for k in tuned})
    assert same_bytes(_post_hoc("wise_ft", base, tuned, alpha=1.0), tuned)
    half = _post_hoc("wise_ft", base, tuned)
    assert all(distance(half[k], (base[k] + tuned[k]) / 2) < 1e-6 for k in tuned)


def test_dare_is_the_identity_at_zero_and_drops_its_rate(parents):
    base, tuned = parents
    assert same_bytes(_post_hoc("dare", base, tuned, drop=0.0), tuned)
    edited = _post_hoc("dare", base, tuned, drop=0.9)
    for key in tuned:
        changed = edited[key] != base[key]
        assert abs(float(changed.float().mean()) - 0.1) < 4 * (0.09 / 2000) ** 0.5
        expected = 10 * (tuned[key] - base[key])
        assert distance((edited[key] - base[key])[changed], expected[changed]) < 1e-4
    assert not torch.equal(edited["w0"] != base["w0"], edited["w2"] != base["w2"])


def test_dare_expectation_is_the_tuned_model(parents):
    base, tuned = parents
    draws = 400
    mean = {k: torch.zeros_like(v) for k, v in tuned.items()}
    for seed in range(draws):
        for key, weight in _post_hoc("dare", base, tuned, seed, drop=0.5).items():
            mean[key] += (weight - base[key]) / draws
    # Each entry's deviation is sqrt(p / (1 - p) / draws) of its delta: 5 % here.
    assert all(0.04 < distance(mean[k], tuned[k] - base[k]) < 0.06 for k in tuned)


@pytest.mark.parametrize(
    "name", [name for name in POST_HOC if not FILES[name].declaration.several_targets]
)
def test_several_parents_are_refused_where_one_is_meant(name, make_model, make_batches):
    model = make_model("llama")
    ctx = post_hoc_on(name, model, parents_on(model, 2), make_batches("llama", 2))
    with pytest.raises(SuiteError, match="exactly one"):
        load_method(FILES[name].path).post_hoc(ctx)


@pytest.mark.parametrize("name", [n for n in TRAINED if not FILES[n].declaration.merges])
def test_a_tuned_connector_is_scored_unmerged_in_bf16(name, started):
    """Training is under autocast and scoring is not: what was raised to fp32 has to come down."""
    tuner, batches = started(name, "llava", torch.bfloat16, connector="tuned")
    tuner.lower()
    with torch.no_grad():
        logits = tuner.ctx.model(**batches[0]).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()

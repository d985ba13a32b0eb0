"""The same numbers as PEFT, from the same random non-zero weights, wherever PEFT has the method.

Where PEFT has none, the oracle is numpy (MiLoRA, LoRASculpt's mask and penalty). Deviations of PEFT
from the papers, which these tests therefore share:
  * DoRA's norm is per output row, the paper's notation says columns;
  * LoRA's A starts kaiming uniform, the paper says Gaussian;
  * LoRA+ gives an adapted embedding a rate of its own, which the paper does not mention.
"""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from ballast.tuner import load_method
from ballast.twins import TWINS
from tiny import METHODS, backward, distance, logits, optimiser_of, randomise, train, tuner_of

DOUBLE = torch.float64
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REGEX = {kind: rf".*layers\.\d+\..*\.({'|'.join(LEAVES)})" for kind in ("llama",)}
REGEX["llava"] = r".*language_model\." + REGEX["llama"]
# Ours -> PEFT's, per layer; the second table is for embeddings.
LINEAR = {
    "A": "lora_A.default.weight",
    "B": "lora_B.default.weight",
    "mag": "lora_magnitude_vector.default.weight",
}
EMBEDDING = LINEAR | {"A": "lora_embedding_A.default", "B": "lora_embedding_B.default"}

# method -> settings of PEFT's LoraConfig at rank 4 with the same scale, as the index names them
SAME = {
    name: TWINS[name].options(4, load_method(METHODS / f"{name}.py").Hyper())
    for name in ("lora", "rslora", "dora", "pissa", "olora")
}


def peft_of(model, kind, **settings):
    config = peft.LoraConfig(**({"r": 4, "target_modules": REGEX[kind]} | settings))
    return peft.get_peft_model(model, config)


def pairs(tuner, wrapped):
    """Ours and PEFT's parameters side by side: (name, ours, theirs), each once."""
    theirs = dict(wrapped.base_model.model.named_parameters())
    found = []
    for name, layer in tuner.ctx.adapters():
        table = EMBEDDING if layer.is_embedding else LINEAR
        for short in ("A", "B", "mag"):
            if hasattr(layer, short):
                found.append((f"{name}.{short}", getattr(layer, short), f"{name}.{table[short]}"))
    return [(name, ours, theirs[other]) for name, ours, other in found]


@torch.no_grad()
def copy_bases(tuner, wrapped):
    """Give PEFT our base weights: PiSSA and OLoRA subtract in fp32 there, in float64 here."""
    for name, layer in tuner.ctx.adapters():
        other = wrapped.base_model.model.get_submodule(name).base_layer.weight
        assert distance(other, layer.base.weight) < 1e-5
        other.copy_(layer.base.weight)


@pytest.fixture
def both(make_model, make_batches):
    """both(name, kind) -> ours and PEFT's in float64 with the same random non-zero values."""

    def make(name, kind, ours="all", **settings):
        batches = make_batches(kind, 3, DOUBLE)
        tuner = tuner_of(name, make_model(kind, DOUBLE), batches, modules=ours)
        tuner.start()
        wrapped = peft_of(make_model(kind), kind, **SAME.get(name, SAME["lora"]), **settings)
        wrapped = wrapped.double()  # started in fp32: PEFT refuses PiSSA and OLoRA in float64
        copy_bases(tuner, wrapped)
        randomise(tuner)
        with torch.no_grad():
            for _, own, other in pairs(tuner, wrapped):
                other.copy_(own)
        return tuner, wrapped, batches

    return make


def assert_same_course(tuner, wrapped, batches, steps=4):
    """Outputs, gradients, and values over AdamW steps agree by norm to 1e-9."""
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    side_by_side = pairs(tuner, wrapped)
    assert len(trainable) == len(side_by_side) == len(tuner.ctx.trainable())
    batch = batches[0]
    assert distance(logits(tuner.ctx.model, batch), logits(wrapped, batch)) < 1e-12
    backward(tuner, batch)
    wrapped(**batch).loss.backward()
    for name, own, other in side_by_side:
        assert own.grad.any(), name
        assert distance(own.grad, other.grad) < 1e-9, name

    rates = {id(p): g for g in tuner.parameter_groups(0.1) for p in g["params"]}
    groups = [
        {"params": [o], "lr": rates[id(p)]["lr"], "weight_decay": rates[id(p)]["weight_decay"]}
        for _, p, o in side_by_side
    ]
    optimiser = torch.optim.AdamW(groups)
    train(tuner, batches, steps)
    wrapped.train()
    for step in range(steps):
        optimiser.zero_grad()
        wrapped(**batches[step % len(batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
    for name, own, other in side_by_side:
        assert distance(own, other) < 1e-9, name
    for batch in batches:
        assert distance(logits(tuner.ctx.model, batch), logits(wrapped, batch)) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("name", list(SAME))
def test_same_outputs_gradients_and_steps(name, kind, both):
    assert_same_course(*both(name, kind))


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_same_with_an_embedding(name, both):
    leaves = ["q_proj", "embed_tokens"]
    tuner, wrapped, batches = both(name, "llama", ours=leaves, target_modules=leaves)
    assert_same_course(tuner, wrapped, batches)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_same_merged_weights(name, both):
    tuner, wrapped, _ = both(name, "llava")
    tuner.merge()
    theirs = wrapped.merge_and_unload().state_dict()
    for key, weight in tuner.ctx.model.state_dict().items():
        assert distance(weight, theirs[key]) < 1e-12, key


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_same_start(name, make_model):
    tuner = tuner_of(name, make_model("llama"), [])
    tuner.start()
    wrapped = peft_of(make_model("llama"), "llama", **SAME[name])
    for module_name, layer in tuner.ctx.adapters():
        other = wrapped.base_model.model.get_submodule(module_name)
        a, b = other.lora_A.default.weight, other.lora_B.default.weight
        assert distance(layer.base.weight, other.base_layer.weight) < 1e-5
        assert distance(layer.B @ layer.A, b @ a) < 1e-5
        signs = torch.sign((layer.B * b).sum(0))  # singular vectors are free up to their sign
        assert distance(layer.B * signs, b) < 1e-4
        assert distance(layer.A * signs[:, None], a) < 1e-4


def test_lora_starts_with_the_bounds_of_peft(make_model):
    tuner = tuner_of("lora", make_model("llama"), [], rank=16)
    tuner.start()
    for _, layer in tuner.ctx.adapters():
        bound = layer.A.shape[1] ** -0.5
        assert 0.98 * bound < layer.A.abs().max() <= bound
        assert abs(float(layer.A.mean())) < 0.1 * bound
        assert not layer.B.any()


def test_lora_plus_has_the_groups_of_peft(make_model):
    leaves = ["q_proj", "down_proj", "embed_tokens"]
    tuner = tuner_of("lora_plus", make_model("llama"), [], modules=leaves)
    tuner.start()
    wrapped = peft_of(make_model("llama"), "llama", target_modules=leaves)
    optimiser = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=tuner.ctx.learning_rate, loraplus_lr_ratio=16.0
    )
    theirs = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    ours = {id(p): group["lr"] for group in tuner.parameter_groups(0.0) for p in group["params"]}
    rates = {name: (ours[id(own)], theirs[id(other)]) for name, own, other in pairs(tuner, wrapped)}
    assert all(own == pytest.approx(other) for own, other in rates.values())
    assert len({round(own, 9) for own, _ in rates.values()}) == 3


# DoRA's norm, of which PEFT forms the matrix.


def _dense_norm(layer):
    return torch.linalg.vector_norm(layer.base.weight + layer.delta(), dim=1)


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"fused": True}])
def test_dora_norm_follows_every_kind_of_step(kernel, make_model, make_batches):
    batches = make_batches("llama", 2, DOUBLE)
    tuner = tuner_of("dora", make_model("llama", DOUBLE), batches)
    tuner.start()
    optimiser = torch.optim.AdamW(tuner.parameter_groups(0.1), **kernel)
    for _ in range(3):
        train(tuner, batches, 1, optimiser)
        with torch.no_grad():
            for _, layer in tuner.ctx.adapters():
                for _ in range(2):  # computed, and kept
                    assert distance(layer.norm(), _dense_norm(layer)) < 1e-12
    with torch.no_grad():
        layer.A.mul_(2)
        assert distance(layer.norm(), _dense_norm(layer)) < 1e-12


def test_dora_magnitude_has_no_weight_decay(make_model):
    tuner = tuner_of("dora", make_model("llama"), [])
    tuner.start()
    decay = {n: g["weight_decay"] for g in tuner.parameter_groups(0.1) for n in g["names"]}
    assert all((value == 0) == name.endswith(".mag") for name, value in decay.items())


# MiLoRA against numpy.


def test_milora_trains_the_smallest_triplets(make_model, make_batches):
    batches = make_batches("llama", 2, DOUBLE)
    plain = make_model("llama", DOUBLE)
    tuner = tuner_of("milora", make_model("llama", DOUBLE), batches)
    tuner.start()
    for name, layer in tuner.ctx.adapters():
        weight = plain.get_submodule(name).weight.numpy(force=True)
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        minor = (u[:, -4:] * s[-4:]) @ vh[-4:]
        residual = layer.base.weight.numpy()
        update = (layer.B @ layer.A).numpy(force=True)
        assert np.linalg.norm(update - minor) < 1e-12 * np.linalg.norm(weight)
        assert np.linalg.norm(residual - (weight - minor)) < 1e-12 * np.linalg.norm(weight)
        # Split evenly: A A^T = B^T B = diag of the singular values.
        a, b = layer.A.numpy(force=True), layer.B.numpy(force=True)
        assert np.allclose(a @ a.T, np.diag(s[-4:]), atol=1e-12)
        assert np.allclose(b.T @ b, np.diag(s[-4:]), atol=1e-12)
    # From there on it is LoRA on the residual.
    oracle = tuner_of("lora", copy.deepcopy(plain), batches, settings={"alpha_over_r": 1.0})
    oracle.start()
    with torch.no_grad():
        for (_, own), (_, other) in zip(tuner.ctx.adapters(), oracle.ctx.adapters(), strict=True):
            other.base.weight.copy_(own.base.weight)
            other.A.copy_(own.A)
            other.B.copy_(own.B)
    train(tuner, batches, 3)
    train(oracle, batches, 3)
    assert torch.equal(logits(tuner.ctx.model, batches[0]), logits(oracle.ctx.model, batches[0]))


# LoRASculpt against numpy.


@pytest.fixture
def sculpt(make_model, make_batches):
    def make(kind="llama", steps=6, **options):
        batches = make_batches(kind, 2, DOUBLE)
        tuner = tuner_of("lorasculpt", make_model(kind, DOUBLE), batches, steps=steps, **options)
        tuner.start()
        return tuner, batches

    return make


def _importance(weight):
    share = np.abs(weight) / np.sqrt((weight**2).sum())
    return np.tanh(np.abs(1 / np.log(share + 1e-15)))


def test_sculpt_penalty_is_the_formula(sculpt):
    tuner, _ = sculpt("llava", connector="adapted", settings={"alpha": 0.2, "beta": 0.7})
    randomise(tuner)
    language, connector = [], []
    for name, layer in tuner.ctx.adapters():
        mask = _importance(layer.base.weight.numpy(force=True))
        assert 0 <= mask.min() <= mask.max() <= 1
        product = layer.B.numpy(force=True) @ layer.A.numpy(force=True)
        if "multi_modal_projector" in name:
            connector.append(np.linalg.norm(mask * product))
        elif name.endswith(("q_proj", "k_proj", "v_proj")):
            language.append(np.linalg.norm(mask * product))
    assert len(language) == 9
    assert len(connector) == 2
    expected = 0.2 * np.mean(language) + 0.7 * np.mean(connector)
    assert tuner.penalty().item() == pytest.approx(expected, rel=1e-12)


def test_sculpt_importance_grows_with_the_weight(sculpt):
    tuner, _ = sculpt()
    weight = torch.linspace(1e-6, 1, 200).view(10, 20)
    mask = tuner.method.importance(weight, 1.0)
    assert torch.equal(mask.flatten().argsort(), torch.arange(200))


def test_sculpt_has_no_nan_at_its_start(sculpt):
    tuner, batches = sculpt()
    backward(tuner, batches[0])
    assert not any(layer.B.any() for _, layer in tuner.ctx.adapters())
    grads = [p.grad for p in tuner.ctx.trainable().values()]
    assert all(torch.isfinite(grad).all() for grad in grads)


def _density(tensor):
    return torch.count_nonzero(tensor).item() / tensor.numel()


def test_sculpt_density_after_training_is_the_density_asked_for(sculpt):
    tuner, batches = sculpt(settings={"density": 0.25, "fraction": 0.5})
    train(tuner, batches, 2)
    assert all(_density(layer.A) == 1 for _, layer in tuner.ctx.adapters())
    train(tuner, batches, 1)  # the third of six steps prunes
    kept = {name: layer.A != 0 for name, layer in tuner.ctx.adapters()}
    for steps in (0, 3):
        train(tuner, batches, steps)
        for name, layer in tuner.ctx.adapters():
            assert _density(layer.A) == 0.25
            assert _density(layer.B) == 0.25
            assert torch.equal(layer.A != 0, kept[name])
    report = tuner.report()
    assert report["threshold_step"] == 3
    assert report["density_a"] == report["density_b"] == 0.25
    assert report["density_ba_theory"] == pytest.approx(1 - (1 - 0.0625) ** 4)
    assert report["density_ba"] == pytest.approx(report["density_ba_theory"], rel=0.25)


def test_sculpt_keeps_the_largest_entries(sculpt):
    tuner, _ = sculpt()
    tensor = torch.tensor([[0.1, -3.0, 0.2], [2.0, 0.0, -0.3]])
    assert tuner.method.sculpted(tensor, 1 / 3).tolist() == [
        [False, True, False],
        [True, False, False],
    ]


def test_sculpt_never_prunes_the_connector(sculpt):
    tuner, batches = sculpt("llava", connector="adapted")
    train(tuner, batches, 6)
    for name, layer in tuner.ctx.adapters():
        assert (_density(layer.A) == 1) == tuner.ctx.in_connector(name)


@pytest.mark.parametrize(
    ("steps", "fraction", "expected"), [(6, 0.5, 3), (10_000, 0.1, 100), (5, 0.01, 1)]
)
def test_sculpt_threshold(sculpt, steps, fraction, expected):
    tuner, _ = sculpt(steps=steps, settings={"fraction": fraction})
    assert tuner.method.threshold(tuner.ctx) == expected


@pytest.mark.parametrize(("density", "rank"), [(0.1, 8), (0.1, 32), (0.05, 16)])
def test_sculpt_theory_of_the_product_density(sculpt, density, rank):
    tuner, _ = sculpt()
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(rank, 1024, generator=generator) < density).float()
    b = (torch.rand(1024, rank, generator=generator) < density).float()
    theory = tuner.method.product_density(density, density, rank)
    assert _density(b @ a) == pytest.approx(theory, rel=0.08)


def test_optimiser_covers_the_connector_too(make_model):
    tuner = tuner_of("lora", make_model("llava"), [], connector="adapted")
    tuner.start()
    assert len(optimiser_of(tuner).param_groups[0]["params"]) == len(tuner.ctx.trainable())

"""Drift from the base: against dense computation, at the zero of methods, and without traces."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ballast.anatomy import anatomy_of
from ballast.data import write_manifest
from ballast.declare import discover
from ballast.decompositions import Decompositions
from ballast.drift import generic, geometry, passes, stored
from ballast.drift import measured as drift
from ballast.drift.generic import Text, Texts
from ballast.encoders import HeadTuner
from ballast.errors import DataError
from ballast.measures import MEASURES
from ballast.models import Base, use_stored_features
from ballast.tuner import load_method
from tiny import METHODS, parents_on, post_hoc_on, randomise, train, tuner_of

FILES = discover(METHODS)
TRAINED = sorted(name for name, file in FILES.items() if file.declaration.trains)
UNMERGED = sorted(name for name in TRAINED if not FILES[name].declaration.merges)
WEIGHTS = ("weight_change", "changed_share", "density", "effective_rank", "top_share")
SOFT = ("prompt_tuning", "prefix_tuning", "p_tuning", "instance_prompt")  # outside the linears
IMAGE = 63


@pytest.fixture
def made(make_model, tmp_path) -> Callable[..., tuple[Base, Texts, Path]]:
    """made(kind, dtype) -> a tiny base that lies in a folder, and texts for it."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float32):
        model = make_model(kind, dtype)
        folder = tmp_path / f"{kind}-{dtype}"
        if kind == "roberta":
            held = {k: v for k, v in model.state_dict().items() if not k.startswith("class_head")}
            folder.mkdir()
            save_file(
                {k: v.contiguous().clone() for k, v in held.items()}, folder / "m.safetensors"
            )
        else:
            model.save_pretrained(folder)
        tokenizer = SimpleNamespace(pad_token_id=0)
        base = Base(model, tokenizer, object() if kind == "llava" else None, anatomy_of(model))
        if kind == "llava":
            use_stored_features(base)
        return base, some_texts(kind), folder

    return make


def some_texts(kind: str = "llama") -> Texts:
    draw = torch.Generator().manual_seed(5)
    rows = []
    for place, length in enumerate((12, 7, 10, 4)):
        ids = torch.randint(1, 60, (length,), generator=draw).tolist()
        if kind == "roberta":
            rows.append(Text(ids, [1, length - 2]))
        elif kind == "llava":
            ids = [1, *[IMAGE] * 4, *ids]
            rows.append(Text(ids, list(range(4, len(ids) - 1)), image=place))
        else:
            rows.append(Text(ids, list(range(length - 1))))
    features = torch.randn(4, 4, 32, generator=draw) if kind == "llava" else None
    return Texts(tuple(rows), features)


def tuned(base: Base, name: str, batches: list[dict[str, Tensor]], **options: Any) -> Any:
    return tuner_of(name, base.model, batches, **options)


# At the zero


@pytest.mark.parametrize("kind", ["llama", "llava", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untouched_base_has_drifted_by_exactly_nothing(made, kind, dtype):
    base, texts, folder = made(kind, dtype)
    reference = drift.reference(base, texts)
    found = drift.drift_of(reference, base, folder)
    loss = found.pop("forgetting_loss")
    assert loss > 0
    assert found == {
        "kl": 0.0, "kl_corrected": 0.0, "cka": 1.0, "activation_change": 0.0,
        "weight_change": 0.0, "changed_share": 0.0, "density": 0.0, "effective_rank": 0.0,
        "top_share": None, "tokens": float(sum(len(row.scored) for row in texts.rows)),
    }  # fmt: skip
    known = {name for name, m in MEASURES.items() if m.level == "model"}
    assert {*found, "forgetting_loss"} == known | {"tokens"}


@pytest.mark.parametrize("name", ["lora", "vera", "moe_lora", "parallel_adapter", "series_adapter"])
def test_a_method_at_its_start_has_drifted_by_nothing(made, make_batches, name):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    tuner = tuned(base, name, make_batches("llama"))
    tuner.start()
    found = drift.drift_of(reference, base, folder)
    assert found["kl"] < 1e-9
    assert found["cka"] == pytest.approx(1.0, abs=1e-6)
    assert found["activation_change"] < 1e-6
    assert {found[name] for name in WEIGHTS} == {None}
    if name == "lora":
        tuner.merge()
        found = drift.drift_of(reference, base, folder)
        assert (found["kl"], found["weight_change"], found["density"]) == (0.0, 0.0, 0.0)


# Against dense computation


def moved(base: Base, size: float = 0.1) -> dict[str, Tensor]:
    """Move two linears of the layers; their changes by name."""
    draw, changes = torch.Generator().manual_seed(2), {}
    names = drift._linears(base)
    for name in (names[1], names[-2]):
        weight = base.model.get_submodule(name).weight
        before = weight.detach().clone()
        noise = size * torch.randn(weight.shape, generator=draw)
        noise[: len(noise) // 2] = 0
        with torch.no_grad():
            weight.add_(noise.to(weight.dtype))
        changes[name] = weight.detach().double() - before.double()
    return changes


@pytest.mark.parametrize("kind", ["llama", "llava", "roberta"])
def test_numbers_are_those_of_dense_loops(made, kind):
    base, texts, folder = made(kind)
    model = base.model

    @torch.no_grad()
    def features(row: Text) -> tuple[Tensor, list[Tensor]]:
        inputs = {"input_ids": torch.tensor([row.ids])}
        if row.image is not None:
            inputs["pixel_values"] = texts.features[[row.image]]
        out = model(**inputs, output_hidden_states=True)
        return out.logits[0, row.scored], [h[0] for h in out.hidden_states]

    before = {name: m.weight.detach().clone() for name, m in linears_of(model).items()}
    old = [features(row) for row in texts.rows]
    reference = drift.reference(base, texts)
    changes = moved(base)
    new = [features(row) for row in texts.rows]
    found = drift.drift_of(reference, base, folder)

    of = torch.distributions.Categorical
    p, q = (of(logits=torch.cat([logits for logits, _ in each]).double()) for each in (old, new))
    assert found["kl"] == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), 1e-5)
    assert found["kl_corrected"] == pytest.approx(found["kl"], rel=1e-6)
    assert found["forgetting_loss"] == pytest.approx(found["kl"] + float(p.entropy().mean()), 1e-5)
    assert found["kl"] > 1e-3

    # transformers gives the last layer's states normed: those of the others are compared.
    layers = base.anatomy.layer_names(model)
    for place, name in enumerate(layers[:-1], 1):
        assert torch.allclose(
            reference.hidden[name], torch.cat([states[place] for _, states in old]), atol=1e-5
        )
    ratios = [float(d.norm() / before[n].double().norm()) for n, d in changes.items()]
    assert found["weight_change"] == pytest.approx(sum(ratios) / 2, rel=1e-6)
    assert found["changed_share"] == pytest.approx(2 / len(drift._linears(base)))
    entries = sum(d.numel() for d in changes.values())
    nonzero = sum(int((d != 0).sum()) for d in changes.values())
    assert found["density"] == pytest.approx(nonzero / entries, rel=1e-12)
    ranks, shares = [], []
    for name, delta in changes.items():
        s = torch.linalg.svdvals(delta)
        p = s[s > 1e-12] / s.sum()
        ranks.append(math.exp(-float((p * p.log()).sum())))
        u, _, v = torch.linalg.svd(before[name].double())
        k = geometry.top_directions(*delta.shape)
        inside = u[:, :k] @ u[:, :k].T @ delta @ v[:k].T @ v[:k]
        shares.append(float((inside.norm() / delta.norm()) ** 2))
    assert found["effective_rank"] == pytest.approx(sum(ranks) / 2, rel=1e-3)
    assert found["top_share"] == pytest.approx(sum(shares) / 2, rel=1e-3)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def inputs_of(base: Base, texts: Texts) -> dict[str, Tensor]:
    """What each linear reads, one text after another."""
    found: dict[str, list[Tensor]] = {name: [] for name in drift._linears(base)}
    handles = [
        base.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in found
    ]
    with torch.no_grad():
        for row in texts.rows:
            inputs = {"input_ids": torch.tensor([row.ids])}
            if row.image is not None:
                inputs["pixel_values"] = texts.features[[row.image]]
            base.model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_activation_change_of_lora_is_that_of_its_product(made, make_batches, kind):
    base, texts, folder = made(kind)
    inputs = inputs_of(base, texts)
    reference = drift.reference(base, texts)
    for name, x in inputs.items():
        assert torch.allclose(reference.inputs[name], x, atol=1e-5), name
    tuner = tuned(base, "lora", make_batches(kind), modules="all")
    tuner.start()
    randomise(tuner)
    ratios = []
    for name, x in inputs.items():
        layer = base.model.get_submodule(name)
        update = layer.scale * (layer.B @ layer.A)
        ratios.append(float(((x @ update.T).norm(dim=1) / x.norm(dim=1)).mean()))
    adapted = drift.drift_of(reference, base, folder)
    expected = pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert adapted["activation_change"] == expected
    assert adapted["weight_change"] is None
    tuner.merge()
    merged = drift.drift_of(reference, base, folder)
    assert merged["activation_change"] == expected
    assert merged["kl"] == pytest.approx(adapted["kl"], rel=1e-3)
    assert merged["cka"] == pytest.approx(adapted["cka"], rel=1e-4)
    assert 0 < merged["effective_rank"] <= 4.01  # of rank 4


def test_adapters_beside_a_block_are_asked_with_the_blocks_input(made, make_batches):
    base, texts, folder = made()
    inputs = inputs_of(base, texts)
    reference = drift.reference(base, texts)
    tuner = tuned(base, "parallel_adapter", make_batches("llama"))
    tuner.start()
    randomise(tuner)
    ratios = dict.fromkeys(inputs, 0.0)
    for name, layer in tuner.ctx.adapters():
        x, block = inputs[name], inputs[name.replace("down_proj", "gate_proj")]
        attention = "down_proj" not in name
        change = layer.net(x if attention else block)
        ratios[name] = float((change.norm(dim=1) / x.norm(dim=1)).mean().detach())
    assert any("down_proj" in name for name, _ in tuner.ctx.adapters())
    found = drift.drift_of(reference, base, folder)
    assert found["activation_change"] == pytest.approx(sum(ratios.values()) / len(ratios), rel=1e-4)


# Every method


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_is_measured_and_left_as_it_was(made, make_batches, name, kind):
    kinds = {"llama": "text", "llava": "vision-language"}
    if kinds[kind] not in FILES[name].declaration.applies_to:
        pytest.skip(f"declared as not for {kinds[kind]} bases")
    base, texts, folder = made(kind)
    reference = drift.reference(base, texts)
    batches = make_batches(kind, 2)
    for batch in batches if kind == "llava" else ():
        batch["pixel_values"] = batch["pixel_values"].flatten(1)[:, :128].reshape(-1, 4, 32)
    tuner = tuned(base, name, batches)
    tuner.start()
    train(tuner, batches, 2)
    loss = base.model(**batches[0]).loss
    loss.backward()
    for module in list(base.model.modules())[::2]:
        module.training = True  # modes of all kinds
    before = traces(base.model)
    found = drift.drift_of(reference, base, folder)
    assert traces(base.model) == before
    assert drift.drift_of(reference, base, folder) == found
    assert found["kl"] > 0
    assert found["cka"] <= 1 + 1e-9
    if name == "peft_bridge" or name not in SOFT:
        assert found["activation_change"] > 0
    else:
        assert found["activation_change"] is None
    merges = FILES[name].declaration.merges
    if merges:
        tuner.merge()
        merged = drift.drift_of(reference, base, folder)
        assert all(merged[key] > 0 for key in WEIGHTS if key != "top_share")
        assert 0 <= merged["top_share"] <= 1
        assert 0 < merged["density"] <= 1
        assert merged["kl"] == pytest.approx(found["kl"], rel=0.02, abs=1e-6)
    else:
        assert {found[key] for key in WEIGHTS} == {None}


def traces(model: nn.Module) -> list[Any]:
    """Everything of a model and of random numbers that a measurement might change."""
    parts: list[Any] = [torch.get_rng_state().tolist(), torch.is_grad_enabled()]
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        parts.append((name, id(module), module.training, hooks))
        parts.append(getattr(module, "watch", None))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.double().sum().item()
        total = tensor.double().nan_to_num().abs().sum().item()
        parts.append((name, id(tensor), tensor._version, tensor.requires_grad, total, grad))
    parts.append(model.config.to_json_string())
    return parts


@pytest.mark.parametrize("name", ["moe_lora", "hydra_lora", "interaction_lora"])
def test_experts_do_not_report_what_drift_asks(made, make_batches, name):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    tuner = tuned(base, name, make_batches("llama"))
    tuner.start()
    calls = []
    for _, layer in tuner.ctx.adapters():
        layer.watch = calls.append
    drift.drift_of(reference, base, folder)
    assert not calls
    assert all(layer.watch == calls.append for _, layer in tuner.ctx.adapters())


def test_adapted_embeddings_count_among_the_matrices(made, make_batches):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    tuner = tuned(base, "lora", make_batches("llama"), modules=["embed_tokens"])
    tuner.start()
    randomise(tuner)
    assert drift.drift_of(reference, base, folder)["kl"] > 0
    tuner.merge()
    found = drift.drift_of(reference, base, folder)
    assert found["changed_share"] == 0  # of the linears
    assert found["weight_change"] > 0
    assert 0 < found["effective_rank"] <= 4.01
    assert found["activation_change"] == 0


def test_the_connector_is_one_of_the_linears(made):
    base, texts, folder = made("llava")
    reference = drift.reference(base, texts)
    connector = base.model.get_submodule(base.anatomy.connector)
    before = connector.linear_1.weight.detach().clone()
    with torch.no_grad():
        connector.linear_1.weight.mul_(1.5)
    found = drift.drift_of(reference, base, folder)
    linears = [n for n in linears_of(base.model) if "tower" not in n and "lm_head" not in n]
    assert found["changed_share"] == pytest.approx(1 / len(linears))
    assert found["weight_change"] == pytest.approx(0.5)
    x = texts.features.flatten(0, 1)
    alone = float(((x @ (0.5 * before).T).norm(dim=1) / x.norm(dim=1)).mean())
    # Of its tokens as many are drawn as of the text: here there are fewer, and all are taken.
    assert found["activation_change"] == pytest.approx(alone / len(linears), rel=1e-4)


def test_post_hoc_weights_are_measured_as_they_lie(made, make_batches):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    ctx = post_hoc_on("wise_ft", base.model, parents_on(base.model, 1), make_batches("llama"))
    weights = load_method(FILES["wise_ft"].path).post_hoc(ctx)
    state = base.model.state_dict()
    for name, value in weights.items():
        state[name].copy_(value)
    found = drift.drift_of(reference, base, folder)
    assert found["kl"] > 0
    assert found["changed_share"] > 0.9
    assert found["activation_change"] > 0


def test_an_encoders_head_and_its_training_are_measured_on_gaps(made, make_batches):
    base, texts, folder = made("roberta")
    reference = drift.reference(base, texts)
    with torch.no_grad():
        base.model.class_head.out.weight.add_(1)
    found = drift.drift_of(reference, base, folder)
    assert (found["kl"], found["weight_change"]) == (0.0, 0.0)
    batches = make_batches("roberta", 2)
    plain = tuned(base, "lora", batches)
    tuner = HeadTuner(plain.method, plain.ctx, 1e-3)
    tuner.start()
    train(tuner, batches, 2)
    assert drift.drift_of(reference, base, folder)["kl"] > 0
    assert found["tokens"] == 8


@pytest.mark.parametrize("name", ["lora", "moe_lora", "prefix_tuning", "full_st"])
def test_bf16(made, make_batches, name):
    base, texts, folder = made("llama", torch.bfloat16)
    reference = drift.reference(base, texts)
    assert reference.inputs[drift._linears(base)[0]].dtype == torch.bfloat16
    tuner = tuned(base, name, make_batches("llama"))
    tuner.start()
    if name == "full_st":
        with torch.no_grad():
            for parameter in tuner.ctx.trainable().values():
                parameter.add_(0.05)
    else:
        randomise(tuner)
    if FILES[name].declaration.merges:
        tuner.merge()
    found = drift.drift_of(reference, base, folder)
    assert all(v is None or math.isfinite(v) for v in found.values())
    assert found["kl"] > 0


def test_what_is_not_finite_is_not_there(made):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    with torch.no_grad():
        base.model.get_submodule(drift._linears(base)[0]).weight.fill_(float("nan"))
    found = drift.drift_of(reference, base, folder)
    assert found["kl"] is None
    assert found["cka"] is None
    assert found["weight_change"] is None
    assert found["effective_rank"] is None


def test_dropout_is_off_while_drift_is_measured(made, make_batches):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    tuner = tuned(base, "lora", make_batches("llama"), settings={"dropout": 0.5})
    tuner.start()
    randomise(tuner)
    base.model.eval()
    expected = drift.drift_of(reference, base, folder)
    base.model.train()
    state = torch.get_rng_state()
    assert drift.drift_of(reference, base, folder) == expected
    assert base.model.training
    assert torch.equal(torch.get_rng_state(), state)


# Memory and cost


def test_memory_is_bounded_and_what_is_left_out_is_spread(made, monkeypatch):
    base, texts, folder = made()
    everything = drift.reference(base, texts)
    width, vocabulary = 32, 64
    limit = 10 * 4 * vocabulary
    for module in (drift, passes):
        monkeypatch.setattr(module, "MEMORY", limit)
    monkeypatch.setattr(generic, "BATCH_TOKENS", 14)
    reference = drift.reference(base, texts)
    assert len(reference.batches) > 1
    assert sum(len(logs) for logs in reference.logs) == 10
    assert sum(logs.nbytes for logs in reference.logs) <= limit
    assert sum(hidden.nbytes for hidden in reference.hidden.values()) <= limit
    assert len(reference.hidden["model.layers.0"]) == limit // (4 * width * 4)
    assert {len(x) for x in reference.inputs.values()} == {1}  # at least one
    rows = everything.hidden["model.layers.1"]
    places = [
        int(((rows - row).norm(dim=1)).argmin()) for row in reference.hidden["model.layers.1"]
    ]
    assert places == [i * len(rows) // len(places) for i in range(len(places))]
    found = drift.drift_of(reference, base, folder)
    assert found["tokens"] == 10
    assert (found["kl"], found["cka"]) == (0.0, 1.0)


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_linears_and_layers_may_keep_different_tokens(made, monkeypatch, kind):
    base, texts, _ = made(kind)  # an encoder's layer gives the very tensor that the next one reads
    everything = drift.reference(base, texts)
    monkeypatch.setattr(drift, "INPUTS", 5)
    some = drift.reference(base, texts)
    places = passes.spread(texts.tokens, 5)
    for name, x in everything.inputs.items():
        assert torch.equal(some.inputs[name], x[places]), name
    for name, hidden in everything.hidden.items():
        assert torch.equal(some.hidden[name], hidden)


def test_linears_that_read_the_same_share_it(made):
    base, texts, _ = made()
    inputs = drift.reference(base, texts).inputs
    at = "model.layers.1.self_attn"
    assert inputs[f"{at}.q_proj"] is inputs[f"{at}.v_proj"]
    assert inputs[f"{at}.q_proj"] is not inputs[f"{at}.o_proj"]


def test_a_sample_of_matrices_is_decomposed_where_all_would_cost_too_much(made, monkeypatch):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    with torch.no_grad():
        for name in drift._linears(base):
            base.model.get_submodule(name).weight.mul_(1.1)
    sizes = []
    monkeypatch.setattr(geometry, "effective_rank", lambda values: sizes.append(len(values)) or 1.0)
    drift.drift_of(reference, base, folder)
    assert len(sizes) == len(drift._linears(base))
    total = sum(
        m.weight.numel() * min(m.weight.shape) for m in linears_of(base.model.model).values()
    )
    monkeypatch.setattr(drift, "WORK", total / 4)
    sizes.clear()
    drift.drift_of(reference, base, folder)
    assert len(sizes) == len(drift._linears(base)) // 4
    monkeypatch.setattr(drift, "WORK", 1)
    sizes.clear()
    drift.drift_of(reference, base, folder)
    assert len(sizes) == 1


def test_decompositions_are_kept_and_give_the_same(made, tmp_path):
    base, texts, folder = made()
    reference = drift.reference(base, texts)
    moved(base)
    plain = drift.drift_of(reference, base, folder)
    (tmp_path / "kept").mkdir()
    cache = Decompositions(tmp_path / "kept")
    assert drift.drift_of(reference, base, folder, cache=cache) == pytest.approx(plain)
    assert len(list((tmp_path / "kept").iterdir())) == 2


# Stored weights


def test_a_base_of_another_folder_is_refused(made, make_model, tmp_path):
    base, texts, _ = made()
    reference = drift.reference(base, texts)
    other = make_model("llama")
    with torch.no_grad():
        other.get_submodule(drift._linears(base)[3]).weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="holds no weight that is model"):
        drift.drift_of(reference, base, tmp_path / "other")
    with pytest.raises(DataError, match="give the folder"):
        drift.drift_of(reference, base, tmp_path / "none")


def test_stored_names_may_differ_and_like_layers_are_told_apart(tmp_path):
    draw = torch.Generator().manual_seed(0)
    weights = {f"old.prefix.layers.{i}.q.weight": torch.randn(8, 9, generator=draw) for i in (0, 1)}
    weights["shuffled.q.weight"] = torch.randn(8, 9, generator=draw)
    save_file(weights, tmp_path / "model-00001-of-00002.safetensors")
    more = {"old.prefix.layers.2.q.weight": torch.randn(8, 9, generator=draw)}
    save_file(more, tmp_path / "model-00002-of-00002.safetensors")
    held = stored.StoredWeights(tmp_path)
    for i, found in enumerate(
        (weights | more)[f"old.prefix.layers.{i}.q.weight"] for i in range(3)
    ):
        like = torch.empty(8, 9, dtype=torch.bfloat16)
        mark = stored.fingerprint(found.bfloat16())
        again = held.weight(f"model.layers.{i}.q.weight", mark, like)
        assert torch.equal(again, found.bfloat16())
    twins = {name: torch.zeros(16, 16) for name in ("a.layers.5.q.weight", "b.layers.6.q.weight")}
    twins["b.layers.6.q.weight"][0, 1] = 1  # not one of the entries that are marked
    save_file(twins, tmp_path / "model-00003-of-00002.safetensors")
    mark = stored.fingerprint(torch.zeros(16, 16))
    found = stored.StoredWeights(tmp_path).weight("m.layers.6.q.weight", mark, torch.zeros(16, 16))
    assert found[0, 1] == 1  # the name decides
    odd = weights["shuffled.q.weight"]
    mark = stored.fingerprint(odd)
    assert torch.equal(held.weight("model.layers.7.q.weight", mark, odd), odd)


# Which text


def word_level() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(50)), "<image>"]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture
def world(tmp_path, make_model):
    """world(kind, tasks) -> base, folders and entries of tasks {name: (role, rows)}."""

    def make(kind: str, tasks: dict[str, tuple[str, list[dict[str, Any]]]]):
        model = make_model(kind)
        base = Base(model, word_level(), None, anatomy_of(model))
        if kind == "llava":
            model.config.image_token_index = model.config.image_token_id = 53
        folders, entries = {}, {}
        for name, (role, rows) in tasks.items():
            folders[name], entries[name] = tmp_path / name, {"role": role}
            datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name / "test")
            if kind == "llava":
                features = torch.arange(3.0)[:, None, None].expand(3, 4, 32).contiguous()
                save_file({"features": features}, tmp_path / name / "test.safetensors")
            write_manifest(tmp_path / name, {"task": name})
        return base, folders, entries

    return make


def asked(prompt: str, response: str, image: int = 0) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "image": image, "question": "?"}


def test_running_text_is_preferred_upstream_or_probe(world):
    lines = [{"text": " ".join(["w1", "w2", "w3"] * (i + 1))} for i in range(40)]
    base, folders, entries = world(
        "llama",
        {
            "a": ("upstream", [asked("<bos> w1", "w2")] * 9),
            "b": ("probe", lines),
            "c": ("upstream", lines[::-1]),
            "t": ("target", lines),
        },
    )
    found = generic.texts(base, folders, entries, limit=300)
    assert 300 <= found.tokens < 300 + 64
    assert all(row.ids[0] == 1 for row in found.rows)  # the token in front
    assert all(row.scored == list(range(len(row.ids) - 1)) for row in found.rows)
    lengths = [len(row.ids) for row in found.rows]
    assert max(lengths) == 64  # the model's longest
    assert lengths[:3] == [4, 64, 7]  # b, c, and b again: it has fewer tokens
    few = [sum(n for n in lengths if n < 64), sum(n for n in lengths if n == 64)]
    assert abs(few[0] - few[1]) <= 64
    assert generic.texts(base, folders, entries, limit=300) == found


def test_questions_stand_in_with_their_answers_and_targets_never_do(world):
    base, folders, entries = world(
        "llama",
        {
            "a": ("upstream", [asked("<bos> w1 w2", "w3 w4"), asked("w5", "w6")]),
            "b": ("upstream", [asked("<bos> w7", "w8")]),
            "p": ("probe", [asked("<bos> w20", "w21")]),
            "t": ("target", [asked("<bos> w9", "w10")]),
        },
    )
    found = generic.texts(base, folders, entries)
    assert [row.ids for row in found.rows] == [[1, 4, 5, 6, 7], [1, 10, 11], [1, 8, 9]]
    assert [row.scored for row in found.rows] == [[0, 1, 2, 3], [0, 1], [0, 1]]
    for name in ("a", "b"):
        del entries[name]
    assert [row.ids for row in generic.texts(base, folders, entries).rows] == [[1, 23, 24]]
    del entries["p"]
    empty = generic.texts(base, folders, entries)
    assert empty.rows == ()


def test_without_text_the_weights_are_measured_all_the_same(made):
    base, _, folder = made()
    reference = drift.reference(base, Texts(()))
    moved(base)
    found = drift.drift_of(reference, base, folder)
    assert found["weight_change"] > 0
    assert found["tokens"] == 0
    for name in ("kl", "kl_corrected", "forgetting_loss", "cka", "activation_change"):
        assert found[name] is None


def test_images_bring_their_features_and_are_not_predicted(world):
    rows = [asked("<bos> <image> <image> <image> <image> w1", "w2", i) for i in (2, 0)]
    base, folders, entries = world("llava", {"a": ("upstream", rows)})
    found = generic.texts(base, folders, entries)
    assert [row.image for row in found.rows] == [0, 1]
    assert found.features[:, 0, 0].tolist() == [2.0, 0.0]
    assert found.rows[0].ids == [1, 53, 53, 53, 53, 4, 5]
    assert found.rows[0].scored == [4, 5]


def test_encoders_are_asked_for_their_gaps(world):
    gaps = [{"input_ids": [1, 2, 3, 4], "positions": [1, 2], "answers": [5, 6]}]
    classes = [{"input_ids": [1, 2], "label": 0, "prompt_length": 2}]
    base, folders, entries = world(
        "roberta", {"g": ("upstream", gaps), "c": ("upstream", classes), "t": ("target", classes)}
    )
    (row,) = generic.texts(base, folders, entries).rows
    assert (row.ids, row.scored) == ([1, 2, 3, 4], [1, 2])

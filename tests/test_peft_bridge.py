"""PEFT's configurations as methods: the course of PEFT itself, and nothing lost by a reload."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import yaml

from ballast.declare import read_method
from ballast.errors import MethodError, SuiteError
from ballast.plan import make_plan, plan_key
from ballast.suite import load_suite
from test_suite import GOOD, LAYOUT
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

FILE = read_method(METHODS / "peft_bridge.py")
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "nblocks": 2}
BLOCKS["target_modules_bd_b"] = [leaf for leaf in LEAVES if leaf not in ("o_proj", "down_proj")]

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
CONFIGS = {
    "lora": LORA,
    "dora": LORA | {"use_dora": True},
    "pissa": LORA | {"init_lora_weights": "pissa"},
    "olora": LORA | {"init_lora_weights": "olora"},
    "orthogonal": LORA | {"init_lora_weights": "orthogonal"},
    "mica": LORA | {"init_lora_weights": "mica"},
    "kasa": LORA | {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
    "monteclora": LORA | {"monteclora_config": {"buffer_size": 8}},
    "velora": LORA | {"velora_config": {}},
    "bdlora": LORA | {"use_bdlora": BLOCKS},
    "adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
    "adamss": {"peft_type": "ADAMSS", "r": 8, "num_subspaces": 2, "subspace_rank": 1},
    "oft": {"peft_type": "OFT", "r": 0, "oft_block_size": 4},
    "boft": {"peft_type": "BOFT", "boft_block_size": 4},
    "ia3": {"peft_type": "IA3"},
    "beft": {"peft_type": "BEFT", "target_modules": ["v_proj"]},
    "lily": {"peft_type": "LILY", "r": 4, "num_B": 2, "stride_A": 2},
    "loha": {"peft_type": "LOHA", "r": 4, "alpha": 8},
    "lokr": {"peft_type": "LOKR", "r": 4, "alpha": 8},
    "ln_tuning": {"peft_type": "LN_TUNING"},
    "vera": {"peft_type": "VERA", "r": 8},
    "vera, projections not saved": {"peft_type": "VERA", "r": 8, "save_projection": False},
    "pvera": {"peft_type": "PVERA", "r": 8},
    "frod": {"peft_type": "FROD"},
    "fourierft": {"peft_type": "FOURIERFT", "n_frequency": 20, "scaling": 10},
    "glora": {"peft_type": "GLORA", "r": 4},
    "hra": {"peft_type": "HRA", "r": 4},
    "vblora": {"peft_type": "VBLORA", "r": 2, "vector_length": 16, "num_vectors": 8, "topk": 2},
    "unilora": {"peft_type": "UNILORA", "r": 4, "theta_d_length": 32},
    "miss": {"peft_type": "MISS", "r": 4},
    "bat": {"peft_type": "MISS", "r": 4, "init_weights": "bat"},
    "mini": {"peft_type": "MISS", "r": 4, "mini_r": 2, "init_weights": "mini"},
    "randlora": {"peft_type": "RANDLORA", "r": 4, "randlora_alpha": 80},
    "road": {"peft_type": "ROAD", "group_size": 16},
    "trainable_tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2, 3]},
    "hira": {"peft_type": "HIRA", "r": 4},
    "shira": {"peft_type": "SHIRA", "r": 2},
    "c3a": {"peft_type": "C3A", "block_size": 16},
    "waveft": {"peft_type": "WAVEFT", "n_frequency": 20},
    "osf": {"peft_type": "OSF", "effective_rank": 8},
    "delora": {"peft_type": "DELORA", "r": 4},
    "gralora": {"peft_type": "GRALORA", "r": 4, "gralora_k": 2},
    "tinylora": {"peft_type": "TINYLORA", "r": 2, "u": 8},
    "psoft": {"peft_type": "PSOFT", "r": 4, "psoft_alpha": 4},
    "peanut": {"peft_type": "PEANUT", "r": 4},
    "supertuning": {"peft_type": "SUPERTUNING", "sparsity": 0.9, "r": 4, "lora_alpha": 8},
    "deft": {"peft_type": "DEFT", "r": 4},
    "adaption_prompt": {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2},
}
UNMERGED = {"beft", "lily", "adaption_prompt"}
# Sizes come from a random clustering: it reloads under the seed that it had.
SEEDED_SIZES = {"adamss"}
MOVED_AT_START = {"kasa", "c3a", "vblora", "unilora", "fourierft"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def bridge(make_model, make_batches):
    """bridge(config, kind, seed, dtype) -> a tuner that has not been started, and batches."""

    def make(config, kind="llama", seed=0, dtype=torch.float32, **options):
        batches = make_batches(kind, 2, dtype)
        settings = {"config": config}
        model = make_model(kind, dtype)
        tuner = tuner_of("peft_bridge", model, batches, seed=seed, settings=settings, **options)
        return tuner, batches

    return make


def _drawn_seed(seed, extra_draws=0):
    """The seed under which the bridge lets PEFT draw, for a cell's generator."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(extra_draws):
        torch.randint(2**31, (), generator=generator)
    return int(torch.randint(2**62, (), generator=generator))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_starts_reloads_resumes_and_merges(name, bridge, make_model):
    """The life of a cell, restored under another seed: whatever is drawn again is replaced."""
    config = CONFIGS[name]
    whole, batches = bridge(config)
    state = torch.get_rng_state()
    whole.start()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
    base = logits(make_model("llama"), batches[0])
    start = distance(logits(whole.ctx.model, batches[0]), base)
    assert (start > 1e-6) == (name in MOVED_AT_START), start
    again = bridge(config)[0]
    again.start()
    assert same_bytes(again.tensors(), whole.tensors())

    torch.manual_seed(0)
    optimiser = train(whole, batches, 2)
    stored, random = whole.tensors(), torch.get_rng_state()
    resumed = bridge(config, seed=0 if name in SEEDED_SIZES else 5)[0]
    resumed.restore(stored)
    assert same_bytes(resumed.tensors(), stored)
    assert torch.equal(logits(resumed.ctx.model, batches[0]), logits(whole.ctx.model, batches[0]))
    resumed.ctx.step = 2
    fresh = optimiser_of(resumed)
    fresh.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    torch.set_rng_state(random)
    train(whole, batches, 2, optimiser)
    torch.set_rng_state(random)
    train(resumed, batches, 2, fresh)
    assert same_bytes(resumed.tensors(), whole.tensors())

    tuned = logits(whole.ctx.model, batches[0])
    assert distance(tuned, base) > 1e-4
    if name in UNMERGED:
        with pytest.raises(SuiteError, match=r"cannot be merged|PEFT refuses"):
            whole.merge()
    else:
        whole.merge()
        assert distance(logits(whole.ctx.model, batches[0]), tuned) < 1e-5
        assert whole.ctx.model.state_dict().keys() == make_model("llama").state_dict().keys()
        assert not any(
            isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
            for module in whole.ctx.model.modules()
        )


@pytest.mark.parametrize("name", ["vera", "mica", "pissa", "osf", "psoft", "frod", "randlora"])
def test_what_was_stored_runs_and_not_what_peft_makes_again(name, bridge):
    """These starts are the same under every seed, so other values stand where they were stored."""
    first, batches = bridge(CONFIGS[name])
    first.start()
    train(first, batches, 1)
    stored = first.tensors()
    held = [k for k, v in stored.items() if k.startswith("state.") and v.is_floating_point()]
    assert held
    edited = stored | {key: 1.5 * stored[key] for key in held}
    loaded = bridge(CONFIGS[name])[0]
    loaded.restore(edited)
    assert same_bytes(loaded.tensors(), edited)
    apart = distance(logits(loaded.ctx.model, batches[0]), logits(first.ctx.model, batches[0]))
    assert apart > 1e-4


PARITY = (
    "lora", "dora", "pissa", "mica", "kasa", "adalora", "oft", "boft", "ia3", "loha", "lokr",
    "vera", "hra", "shira", "c3a", "osf", "miss", "randlora", "fourierft",
)  # fmt: skip


@pytest.mark.parametrize("name", PARITY)
def test_same_course_as_peft_itself(name, bridge, make_model):
    """get_peft_model on the same base and seed, over AdamW steps: the same outputs."""
    config = dict(CONFIGS[name])
    ours, batches = bridge(config)
    ours.start()
    if name == "adalora":
        config |= {"total_step": ours.ctx.total_steps}
    if name == "ia3":
        config |= {"target_modules": ["k_proj", "v_proj", "down_proj"]}
        config |= {"feedforward_modules": ["down_proj"]}
    if name == "shira":  # PEFT itself draws one mask for all seeds
        generator = torch.Generator().manual_seed(0)
        config |= {"random_seed": int(torch.randint(2**31, (), generator=generator))}
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    settings = kind(**({"target_modules": LEAVES, "task_type": "CAUSAL_LM"} | config))
    torch.manual_seed(_drawn_seed(0, extra_draws=name == "shira"))
    theirs = peft.get_peft_model(make_model("llama"), settings)
    other = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    trained = ours.ctx.trainable()
    assert sorted(f"base_model.model.{n}" for n in trained) == sorted(other)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, parameter in trained.items():
            assert torch.equal(parameter, other[f"base_model.model.{n}"]), "another start"
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise)
            other[f"base_model.model.{n}"].add_(noise)

    optimiser = torch.optim.AdamW(list(other.values()), lr=1e-2, weight_decay=0.1)
    train(ours, batches, 4)
    theirs.train()
    for step in range(4):
        optimiser.zero_grad()
        loss = theirs(**batches[step % 2]).loss  # AdaLoRA's forward adds its penalty
        if name == "kasa":
            loss = loss + theirs.base_model._get_kasa_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(other.values()), 1.0)
        optimiser.step()
        if name == "adalora":
            theirs.base_model.update_and_allocate(step + 1)
    for n, parameter in trained.items():
        assert distance(parameter, other[f"base_model.model.{n}"]) < 1e-5, n
    for batch in batches:
        assert distance(logits(ours.ctx.model, batch), logits(theirs, batch)) < 1e-5


def test_lora_has_the_course_of_our_own(bridge, make_model, make_batches):
    """methods/lora.py and PEFT's LoRA from the same random non-zero values, in float64."""
    double = torch.float64
    theirs, batches = bridge(LORA, dtype=double)
    ours = tuner_of("lora", make_model("llama", double), batches)
    theirs.start()
    ours.start()
    randomise(ours)
    values = theirs.ctx.trainable()
    pairs = [
        (parameter, values[f"{name}.lora_{letter}.default.weight"])
        for name, layer in ours.ctx.adapters()
        for letter, parameter in (("A", layer.A), ("B", layer.B))
    ]
    assert len(pairs) == len(values)
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own)
    train(ours, batches, 4)
    train(theirs, batches, 4)
    for own, other in pairs:
        assert distance(other, own) < 1e-9
    assert distance(logits(theirs.ctx.model, batches[0]), logits(ours.ctx.model, batches[0])) < 1e-9


@pytest.mark.parametrize("name", ["lora", "adalora", "loha", "hra", "shira", "delora"])
def test_seed_reaches_the_start(name, bridge):
    first, other = (bridge(CONFIGS[name], seed=seed)[0] for seed in (0, 1))
    first.start()
    other.start()
    assert not same_bytes(first.tensors(), other.tensors())


@pytest.mark.parametrize("name", ["mica", "oft", "shira", "vera", "osf"])
def test_bf16_base(name, bridge):
    """What trains is fp32, and training and scoring run without autocast."""
    tuner, batches = bridge(CONFIGS[name], dtype=torch.bfloat16)
    tuner.start()
    train(tuner, batches, 2)
    assert {p.dtype for p in tuner.ctx.trainable().values()} == {torch.float32}
    assert torch.isfinite(logits(tuner.ctx.model, batches[0])).all()


@pytest.mark.parametrize("name", ["ln_tuning", "adaption_prompt"])
def test_what_needs_fp32_says_so(name, bridge):
    tuner, _ = bridge(CONFIGS[name], dtype=torch.bfloat16)
    with pytest.raises(SuiteError, match=r"precision: \w+ trains in fp32"):
        tuner.start()


# Which modules.


@pytest.mark.parametrize(
    ("own", "connector", "modules", "expected"),
    [
        ({}, "frozen", ["q_proj"], {"q_proj"}),
        ({"target_modules": "all-linear"}, "frozen", ["q_proj", "k_proj"], {"q_proj", "k_proj"}),
        ({"target_modules": ["v_proj"]}, "frozen", ["q_proj"], {"v_proj"}),
        ({"target_modules": r".*\.(up|down)_proj"}, "frozen", "all", {"up_proj", "down_proj"}),
        ({"exclude_modules": ["k_proj"]}, "frozen", ["q_proj", "k_proj"], {"q_proj"}),
        ({"target_modules": ["linear_1", "q_proj"]}, "adapted", "all", {"linear_1", "q_proj"}),
    ],
)
def test_modules_are_the_suites_unless_the_configuration_names_its_own(
    own, connector, modules, expected, bridge
):
    """The vision tower has a q_proj, v_proj and k_proj too; it stays frozen."""
    tuner, _ = bridge(LORA | own, "llava", connector=connector, modules=modules)
    tuner.start()
    names = {name.partition(".lora_")[0] for name in tuner.ctx.trainable()}
    assert {name.rpartition(".")[2] for name in names} == expected
    assert not any("vision_tower" in name for name in names)


def test_layers_to_transform_are_kept(bridge):
    tuner, _ = bridge(LORA | {"layers_to_transform": [1, 2]})
    tuner.start()
    layers = {name.split(".")[2] for name in tuner.ctx.trainable()}
    assert layers == {"1", "2"}


def test_modules_that_match_nothing_are_refused(bridge):
    tuner, _ = bridge(LORA | {"target_modules": ["c_attn"]})
    with pytest.raises(SuiteError, match=r"target_modules.*c_attn"):
        tuner.start()


# AdaLoRA's steps.


def test_adalora_reaches_its_budget_in_a_run_of_other_length(bridge):
    """PEFT's benchmark plans 5,000 steps; a cell of 20 has its phases in proportion."""
    config = CONFIGS["adalora"] | {"total_step": 5000, "tinit": 1000, "tfinal": 1250}
    tuner, batches = bridge(config, steps=20)
    tuner.start()
    live = tuner.ctx.model.peft_config["default"]
    assert (live.total_step, live.tinit, live.tfinal) == (20, 4, 5)
    train(tuner, batches, 20)
    kept = [p for n, p in tuner.ctx.trainable().items() if "lora_E" in n]
    assert sum(int(torch.count_nonzero(p)) for p in kept) == 2 * 28
    assert tuner.report() == {"final_budget": 56.0}


# What a suite says.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, "no peft_type"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "use method `prefix_tuning`"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "use method `prompt_tuning`"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 4}, "use method `p_tuning`"),
        ({"peft_type": "XLORA"}, "XLORA needs more"),
        (LORA | {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (LORA | {"init_lora_weights": "corda"}, "use method `corda`"),
        (LORA | {"init_lora_weights": "eva"}, "starts from data"),
        (
            {"adapter_config": LORA, "training_params": {"optimizer_type": "lora-fa"}},
            "use `lora_fa`",
        ),
        (3, "a mapping, or the path"),
        ("no/such/folder", "no file or folder"),
    ],
)
def test_what_cannot_run_is_refused_before_training(config, message):
    with pytest.raises(MethodError, match=message):
        FILE.settings({"config": config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORAX"}, "LORAX.*PEFT has ADALORA"),
        (LORA | {"rnak": 4}, r"config\.rnak: LoraConfig of PEFT .* has no such key"),
        ({"peft_type": "MISS", "r": 64}, "PEFT refuses this MissConfig"),
        (LORA | {"init_lora_weights": "mica", "r": 17}, "PEFT refuses this LoraConfig"),
    ],
)
def test_what_peft_refuses_is_one_message(config, message, bridge):
    tuner, _ = bridge(config)
    with pytest.raises(SuiteError, match=message):
        tuner.start()


@pytest.fixture
def experiment(tmp_path):
    """A folder as PEFT's benchmark has them; keys that say nothing are of older versions."""
    folder = tmp_path / "experiments" / "oft" / "llama-3.2-3B-rank32"
    folder.mkdir(parents=True)
    adapter = {
        "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "r": 0,
        "oft_block_size": 4, "peft_type": "OFT", "alpha_pattern": {}, "inference_mode": True,
        "target_modules": ["q_proj", "v_proj"], "task_type": None,
    }  # fmt: skip
    training = {"optimizer_kwargs": {"lr": 3e-3, "weight_decay": 0.2}, "max_steps": 7}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "training_params.json").write_text(json.dumps(training))
    (folder / "tokenizer.json").write_text("not one of the two files")
    return folder


def _suite(folder, config):
    content = yaml.safe_load(GOOD)
    content["methods"] = {"peft_bridge": {"set": {"config": config}}}
    return content, lambda: load_suite(content, LAYOUT, folder)


def test_an_experiment_folder_is_read_as_it_is(experiment, bridge):
    settings = FILE.settings({"config": str(experiment)})
    assert set(settings["config"]) == {"adapter_config", "training_params"}
    assert FILE.learning_rate(settings) == (3e-3, "method's config")
    tuner, batches = bridge(settings["config"])
    tuner.start()
    train(tuner, batches, 2)
    assert {n.split(".")[4] for n in tuner.ctx.trainable()} == {"q_proj", "v_proj"}
    # Without training_params.json, or by the file alone: that benchmark's default rate.
    alone = FILE.settings({"config": str(experiment / "adapter_config.json")})
    assert FILE.learning_rate(alone) == (1e-4, "method's default")
    assert alone["config"]["adapter_config"] == settings["config"]["adapter_config"]
    inline = FILE.settings({"config": settings["config"]["adapter_config"]})
    assert inline == alone


def test_an_edited_configuration_is_another_cell(experiment, tmp_path):
    content, load = _suite(tmp_path, "experiments/oft/llama-3.2-3B-rank32")
    suite = load()
    row = make_plan(suite).iloc[0]
    spec = json.loads(row["spec"])
    assert spec["learning_rate"] == 3e-3
    assert spec["learning_rate_source"] == "method's config"
    assert spec["training"]["steps"] == suite.targets(row["base"])[row["target"]]["steps"]
    assert "experiments" not in row["spec"]
    key = plan_key(content, LAYOUT, tmp_path)

    path = experiment / "adapter_config.json"
    path.write_text(path.read_text().replace('"oft_block_size": 4', '"oft_block_size": 8'))
    assert plan_key(content, LAYOUT, tmp_path) != key
    edited = make_plan(load()).iloc[0]
    assert edited["id"] != row["id"]
    assert edited["train_key"] != row["train_key"]


def test_a_rate_of_the_suite_goes_before_the_configurations(experiment, tmp_path):
    content, load = _suite(tmp_path, str(experiment))
    content["methods"]["peft_bridge"]["learning_rate"] = 0.5
    spec = json.loads(make_plan(load()).iloc[0]["spec"])
    assert (spec["learning_rate"], spec["learning_rate_source"]) == (0.5, "suite")


def test_the_data_folder_is_allowed(experiment, monkeypatch):
    monkeypatch.setenv("BALLAST_DATA", str(experiment.parents[1]))
    settings = FILE.settings({"config": "$BALLAST_DATA/oft/llama-3.2-3B-rank32"})
    assert settings["config"]["adapter_config"]["oft_block_size"] == 4


def test_gradients_reach_every_trained_tensor(bridge):
    """On a vision-language base too, where PEFT's own default modules would be the tower's."""
    tuner, batches = bridge({"peft_type": "LOKR", "r": 4, "alpha": 8}, "llava")
    tuner.start()
    randomised = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuner.ctx.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=randomised))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backward(tuner, batches[0])
    assert all(p.grad is not None and p.grad.any() for p in tuner.ctx.trainable().values())

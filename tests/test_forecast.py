"""The forecast against what it speaks of: real models, real operations, finished cells."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import fake_records as fakes
from ballast.errors import DataError, SuiteError
from ballast.files import read_sealed
from ballast.forecast import disk, flops, memory
from ballast.forecast.architecture import WORLDS, network
from ballast.forecast.bases import base_size
from ballast.forecast.calibrate import calibrated, likeness
from ballast.forecast.counting import count_in_child
from ballast.forecast.fits import too_large
from ballast.forecast.holding import Footprint, footprint_guess
from ballast.forecast.machine import Machine, parse_memory
from ballast.forecast.need import cell_need
from ballast.forecast.stand_in import stand_in
from ballast.forecast.suite import forecast_suite, packed, spec_of_record
from ballast.forecast.words import device_notes, warnings_of
from ballast.layout import Layout
from ballast.limits import MARGIN_MEMORY, MARGIN_TIME
from ballast.plan import make_plan
from ballast.status import statuses_of
from ballast.suite import TRAINING, load_suite, read_config, read_suite
from ballast.tasks import read_tasks
from checkout import REPOSITORY, Checkout

ROLES = ("upstream", "target")
LAYOUT = Layout(REPOSITORY, Path("nowhere"))
TASKS = read_tasks(LAYOUT.tasks)
MACHINE = Machine(2, 0, 16_000, None, "", 50_000)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 8, "vocab_size": 130}  # fmt: skip
QWEN = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}  # fmt: skip
STORIES = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "vocab_size": 512,
           "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4,
           "max_position_embeddings": 512, "tie_word_embeddings": True}  # fmt: skip
NETWORKS = {name: network(config) for name, config in (WORLDS | {"stories260k": STORIES}).items()}


# Shapes.


def real_count(config: dict) -> int:
    """Parameters of the model that transformers makes of a configuration, without its memory."""
    from ballast.forecast.miniature import model_of

    return sum(p.numel() for p in model_of(config, "meta").parameters())


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral"},
        {"model_type": "mistral", **SMALL, "num_key_value_heads": 4, "head_dim": 16},
        {"model_type": "qwen2", **QWEN},
        {"model_type": "qwen2", **SMALL, "num_key_value_heads": 4},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "head_dim": 8},
        {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
        {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], **SMALL},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], **SMALL},
        {"model_type": "llava"},
        {"model_type": "llava", "text_config": {"model_type": "qwen2", **SMALL},
         "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32,
                           "intermediate_size": 48, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "image_size": 32, "patch_size": 8}},
        WORLDS["micro-lm"],
        WORLDS["micro-vlm"],
        WORLDS["micro-encoder"] | {"architectures": ["RobertaForMaskedLM"]},
    ],
    ids=lambda config: f"{config['model_type']}-{config.get('hidden_size', '')}",
)  # fmt: skip
def test_parameters_are_those_of_the_model_that_transformers_makes(config):
    if config["model_type"] == "llava":
        config = {"text_config": {"model_type": "llama"},
                  "vision_config": {"model_type": "clip_vision_model"}} | config  # fmt: skip
    assert network(config).parameters == real_count(config)


def test_parameters_are_the_published_ones():
    assert network({"model_type": "llama"}).parameters == 6_738_415_616
    assert network({"model_type": "qwen2", **QWEN}).parameters == 7_615_616_512


def test_bases_pretrained_here_have_the_shapes_that_are_planned_with():
    from ballast.bases import micro_encoder, micro_lm, micro_vlm

    for name, world in (
        ("micro-lm", micro_lm), ("micro-vlm", micro_vlm), ("micro-encoder", micro_encoder),
    ):  # fmt: skip
        model = world.build_model(world.build_tokenizer())
        assert NETWORKS[name].parameters == sum(p.numel() for p in model.parameters())
        config = model.config.get_text_config()
        assert NETWORKS[name].positions == config.max_position_embeddings
    assert NETWORKS["micro-vlm"].image_tokens == 4


def test_a_type_that_is_not_known_is_refused():
    with pytest.raises(
        DataError, match="model type 'mamba'; counted from its configuration: llama"
    ):
        network({"model_type": "mamba"})


# Operations.


def counted_flops(config: dict, train: str | None, tokens: tuple[int, int]) -> int:
    """Operations of one pass, or of one step that trains `full` or `lora`, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from ballast.adapters import LowRank

    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    made._attn_implementation = "eager"  # of fused attention not all is counted
    model = AutoModelForCausalLM.from_config(made).requires_grad_(False)
    layers = model.get_submodule("model.layers")
    if train == "full":
        layers.requires_grad_(True)
    if train == "lora":
        for name, module in list(layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(layers.get_submodule(parent), leaf, LowRank(module, 4, 1.0))
    ids = torch.randint(0, made.vocab_size, tokens)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if train:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("train", [None, "full", "lora"])
def test_operations_are_those_that_torch_counts(kind, train):
    config = {"model_type": kind, **SMALL, "num_hidden_layers": 4, "num_key_value_heads": 4}
    made, rows, length = network(config), 3, 24
    tokens = rows * length
    if train is None:
        forecast = flops.forward_flops(made, tokens, length)
    else:
        sides = made.stack.layers * sum(m + n for m, n in made.stack.linear.values())
        trainable = made.stack.parameters if train == "full" else 4 * sides
        forecast = flops.training_flops(made, tokens, length, trainable, train == "full")
    counted = counted_flops(config, train, (rows, length))
    if train == "lora":
        # The counter does not know addmm_, by which LoRA adds its update.
        counted += (
            2 * tokens * 4 * made.stack.layers * sum(m for m, _ in made.stack.linear.values())
        )
    # Biases and norms train without a matrix product; the input of LoRA's first A needs none.
    assert forecast == pytest.approx(counted, rel=1e-9 if train is None else 0.004)


# Finished cells: the results that are kept with the repository.


@pytest.fixture(scope="module")
def kept() -> list[tuple[dict, object, dict]]:
    """(spec, need from shapes alone, record) of the 307 kept cells of every method."""
    table = pd.read_parquet(REPOSITORY / "results/kept/all-methods/records.parquet")
    records = [json.loads(text) for text in table["record"]]
    specs = [spec_of_record(record) for record in records]
    return [
        (spec, cell_need(spec, NETWORKS[spec["base"]], TASKS, MACHINE), record)
        for spec, record in zip(specs, records, strict=True)
    ]


def factors(pairs) -> tuple[float, float]:
    """Median of forecast over measured, and the factor that nine of ten lie within."""
    ratios = [forecast / measured for forecast, measured in pairs]
    off = sorted(max(ratio, 1 / ratio) for ratio in ratios)
    return statistics.median(ratios), off[int(0.9 * len(off))]


def test_seconds_from_shapes_alone_are_of_the_right_size(kept):
    median, off = factors((need.total, r["costs"]["seconds"]["total"]) for _, need, r in kept)
    assert 0.5 < median < 2
    assert off < 4


@pytest.mark.parametrize("by", ["method", "seed"])
def test_finished_cells_forecast_others(kept, by):
    """Those of a method, or a seed, from all the others; they ran on a busy machine."""
    pairs, memories = [], []
    for value in {spec[by] for spec, _, _ in kept}:
        made = calibrated(kept, left_out=lambda spec, value=value: spec[by] == value)
        for spec, need, record in kept:
            if spec[by] == value:
                right = made.apply(spec, need)
                pairs.append((right.total, record["costs"]["seconds"]["total"]))
                peak = max(v for v in record["costs"]["memory_mb"].values() if v)
                memories.append((right.host_mb, 1.048576 * peak))
    median, off = factors(pairs)
    assert 0.85 < median < 1.15
    assert off < 2.5
    total = sum(forecast for forecast, _ in pairs) / sum(measured for _, measured in pairs)
    assert 0.8 < total < 1.2
    median, off = factors(memories)
    assert 0.98 < median < 1.02
    assert off < 1.1


def test_cells_that_are_left_out_teach_nothing(kept):
    made = calibrated(kept, left_out=lambda spec: spec["method"] != "lora")
    assert made.cells == sum(spec["method"] == "lora" for spec, _, _ in kept)
    assert calibrated(kept, left_out=lambda _: True).cells == 0


def test_a_cell_of_the_same_kind_counts_more_than_others(kept):
    spec = kept[0][0]
    keys = likeness(spec)
    assert len(set(keys)) == len(keys)
    long = {"total": 1e3, "train": 500, "evaluate": 400}
    slow = [
        (s, n, r | {"costs": r["costs"] | {"seconds": long}})
        for s, n, r in kept if s["method"] == "dora"
    ]  # fmt: skip
    made = calibrated([item for item in kept if item[0]["method"] != "dora"] + slow)
    dora = next((s, n) for s, n, _ in kept if s["method"] == "dora")
    lora = next((s, n) for s, n, _ in kept if s["method"] == "lora")
    assert made.apply(*dora).total == pytest.approx(1e3, rel=0.2)
    assert made.apply(*lora).total < 200


def test_memory_from_shapes_alone(kept):
    pairs = [
        (need.host_mb, 1.048576 * max(v for v in record["costs"]["memory_mb"].values() if v))
        for _, need, record in kept
    ]
    median, off = factors(pairs)
    assert 0.8 < median < 1.25
    assert off < 1.25


@pytest.fixture(scope="module")
def counted(kept) -> list[tuple[dict, dict, dict]]:
    """(spec, what a miniature says, record) of every kept method, variant and rank by its base."""
    own = {}
    for spec, _, record in kept:
        if spec["family"] != "post-hoc":
            key = [spec[k] for k in ("base", "target", "method", "variant", "rank")]
            hyper = {"hyper": record["settings"]["hyper"], "learning_rate": 1e-3}
            members = [name for name, task in spec["tasks"].items() if task["role"] == "target"]
            own.setdefault(str(key), (spec | hyper | {"mixture": members}, record))
    asked = [{"config": WORLDS[spec["base"]], "spec": spec} for spec, _ in own.values()]
    answers = count_in_child(asked, REPOSITORY / "methods")
    return [(*pair, answer) for pair, answer in zip(own.values(), answers, strict=True)]


def test_adapters_on_disk_are_those_that_finished_cells_wrote(counted):
    """Bytes of adapter.safetensors of all methods, shared parts, masks and offsets included."""
    wrong = {}
    for spec, record, answer in counted:
        made = disk.adapter_bytes(spec, NETWORKS[spec["base"]], Footprint(**answer["footprint"]))
        if made != pytest.approx(record["costs"]["adapter_bytes"], rel=0.03):
            wrong[record["id"]] = made, record["costs"]["adapter_bytes"]
    assert not wrong
    assert len(counted) > 120


def test_edited_weights_are_stored_in_the_precision_of_the_base(kept):
    for spec, need, record in kept:
        if spec["family"] == "post-hoc":
            assert need.adapter == pytest.approx(record["costs"]["adapter_bytes"], rel=0.05)
    half = spec | {"training": spec["training"] | {"precision": "bf16"}}
    small = cell_need(half, NETWORKS[spec["base"]], TASKS, MACHINE).adapter
    assert small == pytest.approx(need.adapter / 2, rel=0.01)


def test_trainable_parameters_by_the_methods_own_formulas(counted):
    """Against what finished cells counted; few methods have no formula."""
    wrong = {
        record["id"]: (answer["trained"], record["costs"]["trainable_parameters"])
        for _, record, answer in counted
        if answer["trained"] not in (None, record["costs"]["trainable_parameters"])
    }
    assert not wrong
    assert sum(answer["trained"] is None for _, _, answer in counted) <= 10


# A suite.


def large_suite(**training) -> tuple[pd.DataFrame, dict]:
    """The plan of a LLaMA-7B suite whose size is known, and its config."""
    config = read_config(REPOSITORY / "config/config.yaml")
    base = config["bases"].pop("micro-lm")
    config["bases"] = {"llama": base | {"source": {"hub": "me/llama-7b"}, "gate": None}}
    del config["bases"]["llama"]["gate"]
    del config["limits"], config["learning_rates"]
    config["methods"] = {"full_st": {}, "lora": {}, "wise_ft": {"targets": ["lm_dialect"]}}
    config["training"] = {"batch_size": 32} | training
    return make_plan(load_suite(config, LAYOUT)), config


def forecast(plan: pd.DataFrame, machine: Machine = MACHINE, records=()):
    return forecast_suite(plan, statuses_of(plan, records), records, LAYOUT, machine)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_large_base_does_not_fit_a_small_gpu_and_the_advice_makes_it_fit(offline):
    machine = replace(MACHINE, gpus=1, gpu_memory_mb=24_000, gpu_name="A10", memory_mb=200_000)
    plan, _ = large_suite()
    large = too_large(forecast(plan, machine), TASKS, 24_000, 200_000)
    assert {item.method for item in large} == {"", "full_st", "lora", "wise_ft"}
    # The base alone is 27 GB in fp32.
    assert large[0].method == ""
    assert large[0].advice == {"precision": "bf16"}
    found = {(item.method, item.target): item for item in large}
    assert found["full_st", "lm_dialect"].advice is None  # moments alone are twice the GPU
    advice = found["lora", "lm_dialect"].advice
    assert advice["precision"] == "bf16"
    training = {key: value for key, value in advice.items() if "." not in key}
    again, _ = large_suite(**training)
    left = too_large(forecast(again, machine), TASKS, 24_000, 200_000)
    assert "lora" not in {item.method for item in left}
    # The mildest setting that is enough, and no other.
    wide = too_large(forecast(plan, replace(machine, gpu_memory_mb=26_000)), TASKS, 26_000, 2e5)
    assert {item.method: item.advice for item in wide}["lora"] == {"precision": "bf16"}
    # On a GPU of 192 GB everything fits, in fp32 with all its moments.
    assert not too_large(forecast(plan, replace(machine, gpu_memory_mb=192_000)), TASKS, 192e3, 2e5)


def test_memory_of_full_training_is_at_least_sixteen_bytes_a_parameter():
    made = network({"model_type": "llama"})
    spec = json.loads(large_suite()[0].query("method == 'full_st'")["spec"].iloc[0])
    spec["evaluation"] = {"batch_size": 1}
    whole = footprint_guess(spec, made, made.stack.parameters)
    held = memory.peak(spec, made, whole, 512, gpu=True)
    assert held.device_mb > 16 * made.stack.parameters / 1e6
    assert held.parts["moments"] == 2 * held.parts["gradients"] == 8 * made.stack.parameters / 1e6
    half = spec | {"training": spec["training"] | {"precision": "bf16"}}
    lora = half | {"family": "reparameterization"}
    few = footprint_guess(lora, made, 2e7)
    assert 14_000 < memory.peak(lora, made, few, 64, gpu=True).device_mb < 32_000
    tight = half | {"training": half["training"] | {"gradient_checkpointing": True}}
    few = replace(few, copies=0.0)
    parts = [memory.peak(s, made, few, 512, gpu=True).parts["activations"] for s in (half, tight)]
    assert parts[0] > 8 * parts[1]


def large_footprint(config: dict, method: str, **changes) -> Footprint:
    """Of a method at its defaults on a base that is never built, in bf16."""
    from ballast.declare import read_method

    file = read_method(REPOSITORY / f"methods/{method}.py")
    spec = {
        "method": method, "hyper": file.settings({}), "rank": 8, "modules": "all",
        "connector": "frozen", "target": "t", "learning_rate": 1e-3,
        "training": TRAINING | {"precision": "bf16", "max_length": 64},
        "family": file.declaration.family,
    }  # fmt: skip
    (answer,) = count_in_child([{"config": config, "spec": spec | changes}], REPOSITORY / "methods")
    return Footprint(**answer["footprint"])


LLAMA3 = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
          "vocab_size": 128256}  # fmt: skip


@pytest.mark.parametrize("rank", [8, 64])
def test_a_large_adapter_has_the_bytes_of_its_formula(rank):
    """LoRA on Llama-3-8B: r (m + n) for q and o, k and v, gate and up, down; two matrices each."""
    sides = 2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    found = large_footprint(LLAMA3, "lora", rank=rank)
    assert found.stored == pytest.approx(4 * 32 * rank * sides, rel=0.001)
    assert found.held == pytest.approx(32 * rank * sides, rel=0.001)
    assert found.tensors == 32 * 7 * 2


def test_a_large_adapter_holds_what_does_not_train():
    """On LLaMA-7B: shared matrices of VeRA, singular vectors, places of a sparse update."""
    llama, layers, outputs = {"model_type": "llama"}, 32, 4 * 4096 + 2 * 11008 + 4096
    vera = large_footprint(llama, "vera", rank=64)
    shared = 2 * 64 * 11008
    assert vera.stored == pytest.approx(4 * (shared + layers * (outputs + 7 * 64)), rel=0.02)
    inputs = 6 * 4096 + 11008
    rotation = large_footprint(llama, "spectral_rotation", rank=24)
    vectors = layers * 24 * (outputs + inputs)
    assert rotation.stored == pytest.approx(4 * vectors, rel=0.02)
    assert rotation.stored > 100 * 4 * rotation.held
    matrices = layers * (4 * 4096**2 + 3 * 4096 * 11008)
    # U, S and V of every matrix in fp32.
    assert rotation.decomposed == pytest.approx(
        4 * layers * (4 * 4096 * 8193 + 3 * 4096 * 15105), rel=0.01
    )
    spa = large_footprint(llama, "spa")
    assert spa.held == pytest.approx(0.006 * matrices, rel=0.02)
    assert spa.stored == pytest.approx(8 * spa.held, rel=0.03)  # a value and an int32 column


@pytest.mark.parametrize(
    ("method", "held", "copies"),
    [("full_st", 1, 0), ("l2_sp", 1, 2), ("fish", 1, 3.125), ("gradient_mask", 1, 3.125),
     ("magnitude_mask", 2 / 32, 3.125)],
)  # fmt: skip
def test_masks_hold_every_number_that_they_choose_from(method, held, copies):
    """LLaMA-7B's layers in bf16; beside: their start (2 bytes), a mask (1) and its bits."""
    layers = 6_476_267_520
    found = large_footprint({"model_type": "llama"}, method)
    assert found.held == pytest.approx(held * layers, rel=0.001)
    assert found.beside == pytest.approx(copies * held * layers, rel=0.001)


def test_what_a_method_holds_before_its_first_step():
    """On LLaMA-7B in bf16: gradients of all matrices (2 bytes), their sums and means (4 each) for
    SpA's places; the covariances of all inputs in fp32, for CorDA."""
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    spa = large_footprint({"model_type": "llama"}, "spa").start
    assert spa == pytest.approx(10 * matrices, rel=0.1)
    corda = large_footprint({"model_type": "llama"}, "corda").start
    # And some copies of the one that is decomposed.
    assert 1 < corda / (4 * 32 * (6 * 4096**2 + 11008**2)) < 1.3


@pytest.mark.parametrize(("method", "ratio"), [("lora", 1.33), ("full_st", 1.30), ("dora", 1.86)])
def test_activations_are_those_that_were_measured_on_a_gpu(method, ratio):
    """Measured in bf16 against 9 widths and 4 inner widths of 2 bytes in each layer."""
    plain = 32 * 2 * (9 * 4096 + 4 * 11008)
    found = large_footprint({"model_type": "llama"}, method).activations
    assert found == pytest.approx(ratio * plain, rel=0.08)


@pytest.mark.parametrize("file", ["config", "all-methods", "encoder", "stories", "easyvqa"])
def test_limits_that_nobody_gave_are_never_below_the_forecast(file):
    if file in ("stories", "easyvqa"):
        from ballast.layout import real_data

        try:
            real_data("stories260K")
        except DataError:
            pytest.skip("needs the real data")
    suite = read_suite(REPOSITORY / f"config/{file}.yaml", LAYOUT)
    suite.config["limits"] = {}
    made = forecast(make_plan(suite))
    cells = made.cells
    assert (60 * cells["minutes"] >= MARGIN_TIME * (cells["seconds"] - 4)).all()
    assert (cells["limit_mb"] >= MARGIN_MEMORY * cells["memory_mb"]).all()


def test_rescoring_costs_no_training():
    suite = read_suite(REPOSITORY / "config/config.yaml", LAYOUT)
    plan = make_plan(suite)
    found = {
        status: forecast_suite(plan, pd.Series([status] * len(plan)), [], LAYOUT, MACHINE)
        for status in ("missing", "stale", "rescore", "ok")
    }
    hours = {status: made.hours(gpu=False) for status, made in found.items()}
    assert hours["missing"] == hours["stale"] > 1.3 * hours["rescore"]
    trained = found["rescore"].cells["posthoc"] == False  # noqa: E712
    both = [found[s].cells.loc[trained, "seconds"] for s in ("missing", "rescore")]
    assert (both[0] > both[1]).all()
    assert len(found["ok"].due) == 0


def test_what_is_due_is_packed_on_the_cores_that_there_are():
    assert packed([3, 1, 1, 1], 2) == 3
    assert packed([1, 1, 1, 3], 2) == 4
    assert packed([2] * 10, 5) == 4
    assert packed([], 4) == 0


def test_a_base_that_cannot_be_reached_is_named_with_a_way_out(offline):
    plan, _ = large_suite()
    made = forecast(plan)
    size = made.bases["llama"].size
    assert size.network is None
    assert size.parameters == 7e9
    assert made.bases["llama"].network.parameters == 6_738_415_616  # the Llama that is nearest
    assert base_size({"hub": "me/llama-7b"}).problem.startswith(
        "me/llama-7b: its size is not known"
    )


def test_a_base_of_images_that_cannot_be_reached_is_taken_for_a_llava(offline):
    """LLaVA-1.5-7B: Vicuna-7B, CLIP-L/14-336 with 303.5 M parameters, two linears of 4096."""
    size = base_size({"hub": "me/llava-7b"}, images=True)
    assert size.network is None
    assert size.shape.parameters == pytest.approx(7.063e9, rel=0.001)  # of its safetensors' index
    assert size.shape.tower_parameters == pytest.approx(303.5e6, rel=0.001)
    assert size.shape.image_tokens == 576
    assert disk.feature_bytes(size.shape, 1, 2) == 576 * 1024 * 2  # 1.18 MB
    assert base_size({"hub": "me/llava-7b"}).shape.tower is None


def test_the_note_says_what_a_base_of_images_is_taken_for(offline):
    config = read_config(REPOSITORY / "config/config.yaml")
    vlm = config["bases"]["micro-vlm"]
    config["bases"] = {"llava": vlm | {"source": {"hub": "me/llava-13b"}}}
    del config["bases"]["llava"]["gate"], config["limits"], config["learning_rates"]
    config["methods"] = ["lora"]
    (note, *_) = warnings_of(forecast(make_plan(load_suite(config, LAYOUT))))
    assert "taken for a Llama of 13 B parameters by its name" in note
    assert note.endswith("shown images through CLIP-L/14-336 (576 tokens each)")


def llava_need(images: int, precision: str = "bf16"):
    """Need of a LoRA cell on LLaVA-1.5-7B whose target has so many training images, on a GPU."""
    from test_limits import spec

    cell = spec(precision=precision) | {"target": "vlm_icons", "limits": {"gpus": 1}}
    sizes = {"test": 100, "train": images}
    cell["tasks"] = {"vlm_icons": {"role": "target", "sizes": sizes, "max_length": 512}}
    return cell_need(cell, stand_in(7e9, images=True), TASKS, MACHINE)


def test_stored_features_of_the_training_images_are_held_twice_on_the_host():
    for precision, each in (("bf16", 2), ("fp32", 4)):
        more = llava_need(3000, precision).host_mb - llava_need(1000, precision).host_mb
        assert more == pytest.approx(2 * 2000 * 576 * 1024 * each / 1e6)


def test_padding_is_of_texts_alone_not_of_images():
    """An image has 576 tokens in every example: 13 tokens of text are padded, to 17."""
    need = llava_need(10)
    whole = footprint_guess(
        {"method": "lora", "training": {"precision": "bf16"}}, stand_in(7e9, images=True), 2e7
    )
    tokens = 32 * (576 + 1.3 * 13)
    assert need.parts["activations"] == pytest.approx(tokens * whole.activations / 1e6, rel=0.01)


def test_checkpoints_of_a_large_cell_take_their_time():
    """Full training of LLaMA-7B's layers: weights and two moments in fp32, nine times."""
    spec = json.loads(large_suite()[0].query("method == 'full_st'")["spec"].iloc[0])
    spec["training"] |= {"steps": 1000, "checkpoint_every": 100}
    need = cell_need(spec, network({"model_type": "llama"}), TASKS, MACHINE)
    assert need.checkpoint == pytest.approx(12 * 6_476_267_520, rel=1e-3)
    assert need.seconds["write"] > 9 * 77.7e9 / 4e8


def test_the_first_cell_that_needs_them_decomposes_the_weights(offline):
    _, config = large_suite()
    config["methods"] = {"lora": {}, "pissa": {}, "milora": {}}
    made = forecast(make_plan(load_suite(config, LAYOUT)))
    spent = made.cells.groupby("method")["seconds"].agg(["min", "max", "size"])
    work = 32 * 14 * (4 * 4096**3 + 3 * 4096**2 * 11008)
    assert spent.loc["pissa", "max"] - spent.loc["pissa", "min"] == pytest.approx(
        work / 2.5e10 + made.bases["llama"].decompositions / 4e8, rel=0.01
    )
    assert spent.loc["milora", "max"] < work / 2.5e10
    # Not with the base, but any of the cells may have to: all have the time.
    assert made.bases["llama"].seconds < work / 2.5e10
    minutes = made.cells.groupby("method")["minutes"].min()
    assert minutes["milora"] - minutes["lora"] > work / 2.5e10 / 60


def test_keys_and_values_of_scored_sequences_are_held():
    """LLaMA-7B in bf16: 2 x 32 layers x 4096 x 2 bytes for each of a batch's tokens."""
    made = network({"model_type": "llama"})
    spec = json.loads(large_suite(precision="bf16")[0]["spec"].iloc[0])
    spec |= {"family": "post-hoc", "evaluation": {"batch_size": 16}}
    whole = footprint_guess(spec, made, 0.0)
    held = memory.peak(spec, made, whole, 1, True, [memory.Scored(300, 100)])
    assert held.parts["keys and values"] == pytest.approx(16 * 400 * 2 * 32 * 4096 * 2 / 1e6)


@pytest.mark.parametrize(
    ("text", "mb"), [("24GB", 24_000), ("80 GiB", 85_899.3), ("4000", 4000), ("1.5tb", 1.5e6)]
)
def test_amounts_of_memory(text, mb):
    assert parse_memory(text) == pytest.approx(mb, rel=1e-5)


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "24 gallons", "0"])
def test_amounts_of_memory_that_make_no_sense_are_refused(text):
    with pytest.raises(SuiteError, match="write 24GB"):
        parse_memory(text)


# The command.


def fake_record(row: pd.Series, status: str) -> dict:
    """A record of a plan's row, whose scores come from other task definitions."""
    spec = json.loads(row["spec"])
    names = {role: [n for n, e in spec["tasks"].items() if e["role"] == role] for role in ROLES}
    found = fakes.record(base=spec["base"], target=spec["target"])
    found |= {
        "id": row.name,
        "identity": {key: spec.get(key) for key in found["identity"]},
        "keys": {
            "train": row["train_key"], "eval": "other", "base": row["base_key"], "data": "d",
        },
    }  # fmt: skip
    templates = {"upstream": "facts", "target": "codes"}
    for block in ("tasks", "scores", "base_scores"):
        found[block] = {n: found[block][templates[role]] for role in ROLES for n in names[role]}
    return found if status == "ok" else fakes.failed(found)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("planned"))
    made.save_base()
    return made


def planned(home: Checkout, *arguments: str) -> dict:
    return json.loads(home.run("ballast", "plan", *arguments, "--json"))


def test_a_plan_is_there_before_anything_has_run(home):
    text = home.run("ballast", "plan")
    assert text.startswith("tiny: 3 cells, 0 done")
    for word in ("full_st", "lora", "wise_ft", "to be made", "core-hours", "are free"):
        assert word in text
    found = planned(home, "config/config.yaml", "--cores", "3", "--memory", "100MB")
    assert found["status"] == {"missing": 3}
    assert found["machine"]["cores"] == 3
    assert found["core_hours"] > 0
    assert found["finished_cells"] == 0
    # A process with torch alone is larger than the memory that was asked about.
    assert {item["method"] for item in found["does_not_fit"]} == {"", "full_st", "lora", "wise_ft"}
    listed = home.run("ballast", "plan", "--cells").splitlines()
    assert [line.split()[0] for line in listed] == ["missing"] * 3
    assert not (home.root / "results/tiny/cells").exists()
    # What the methods were found to hold is kept; damaged, it is found again.
    kept = home.root / "results/shared/footprints.json"
    whole = read_sealed(kept)
    kept.write_text(kept.read_text()[:-40])
    assert home.run("ballast", "plan").startswith("tiny: 3 cells, 0 done")
    assert read_sealed(kept) == whole


def test_a_plan_follows_what_is_there(home):
    """Records of finished cells, as a run writes them: one is to be scored again, one failed."""
    before = planned(home)
    paths = (home.root / "results/tiny/plan").glob("*.parquet")
    plan = pd.read_parquet(next(path for path in paths if ".tune" not in path.name))
    plan = plan.set_index("method", drop=False)
    for name, status in (("full_st", "ok"), ("lora", "failed")):
        row = plan.loc[name].rename(plan.loc[name, "id"])
        record = fake_record(row, status)
        folder = home.root / "results/tiny/cells" / record["id"]
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record))
    found = planned(home)
    assert found["status"] == {"rescore": 1, "failed": 1, "missing": 1}
    assert found["due"] == 2
    assert found["finished_cells"] == 1
    assert 0 < found["core_hours"] < before["core_hours"]
    assert "1 failed; 1 to score again" in home.run("ballast", "plan")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device-memory", "many"], "'many' is no amount of memory; write 24GB"),
        (["--device-memory", ""], "'' is no amount of memory; write 24GB"),
        (["--memory", ""], "'' is no amount of memory; write 24GB"),
        (["config"], "config: a folder; a suite's file is needed"),
        (["--cores", "0"], "Invalid value for '--cores'"),
        (["config/none.yaml"], "config/none.yaml: no such suite"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(home, arguments, said):
    output = home.run("ballast", "plan", *arguments, code=2)
    assert said in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x00\xff\xfe\x80", "no text in UTF-8"),
        (b"suite: x\nbases: {a: [1, 2\nmethods: {lora\n", "not YAML: line 3, column 8: expected"),
        (b"a: b: c\n", "not YAML: line 1, column 5: mapping values are not allowed here"),
        (b"a: \x01\n", "not YAML: "),
    ],
)
def test_files_that_are_no_suites_are_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(SuiteError) as caught:
        read_config(path)
    assert f"{path}: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_known_of_gpus_is_said(offline):
    plan, _ = large_suite()
    (note,) = device_notes(forecast(plan))
    assert "nothing was checked against a GPU's memory, and times are an A100's" in note
    assert "--gpus 4 --device-memory 80GB --memory 512GB" in note
    told = replace(MACHINE, gpus=4, gpu_memory_mb=80_000)
    assert device_notes(forecast(plan, told)) == ["no GPU here: times on GPUs are an A100's"]
    assert not device_notes(forecast(plan, replace(told, gpu_name="H100")))
    small = make_plan(read_suite(REPOSITORY / "config/config.yaml", LAYOUT))
    assert not device_notes(forecast(small))


def test_a_cell_of_a_gpu_needs_memory_on_its_host_too(offline):
    """A checkpoint of full training passes through the host: 12 bytes a number."""
    plan, _ = large_suite(precision="bf16")
    machine = replace(MACHINE, gpus=1, gpu_memory_mb=2e5, gpu_name="H200", memory_mb=64_000)
    large = too_large(forecast(plan, machine), TASKS, 2e5, 64_000)
    assert {item.kind for item in large} == {"host"}
    assert {item.method for item in large} == {"full_st", "wise_ft"}
    parts = next(item.parts for item in large if item.method == "full_st")
    assert parts["checkpoint"] == pytest.approx(12 * 6476.267520, rel=1e-3)


def test_planning_and_forecasting_grow_no_faster_than_the_cells():
    """Ten times the cells take about ten times the processor's seconds; a square would take 100."""
    config = read_config(REPOSITORY / "config/config.yaml")
    config["bases"].pop("micro-vlm")
    config["methods"], config["ranks"] = ["lora", "dora", "pissa", "milora", "olora"], [1, 2, 4]
    config["learning_rates"] = "none.csv"
    spent = []
    for cells in (300, 3000):
        seeds = list(range(1000, 1000 + cells // 30))
        started = time.process_time()
        plan = make_plan(load_suite(config | {"seeds": seeds}, LAYOUT))
        assert len(plan) == cells
        assert len(forecast(plan).cells) == cells
        spent.append(time.process_time() - started)
    assert spent[1] < 25 * spent[0], spent
    assert spent[1] < 60, spent

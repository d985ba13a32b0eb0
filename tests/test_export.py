"""Exported cells: plain PEFT, or plain transformers, gives the outputs that Ballast has."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ballast import cli
from ballast.declare import read_method
from ballast.errors import BallastError
from ballast.export import CONFIG, WEIGHTS, find_cell, write_adapter
from ballast.layout import Layout
from ballast.tensorfile import write_tensors
from ballast.tuner import STATE
from tiny import METHODS, QUICK, distance, logits, randomise, train, tuner_of

DOUBLE = torch.float64
LOCAL = Path("results")
# method -> rank of its export where rank 4 was asked for: 8 directions of LoRA-Dash, 6 triplets at
# AdaLoRA's start, 4 groups of orth_reg; and what starts from the weight itself is converted to 2r.
RANKS = {
    "lora": 4, "lora_plus": 4, "rslora": 4, "lora_fa": 4, "lora_wd": 4, "lorasculpt": 4,
    "clora": 4, "orth_reg": 16, "flora": 4, "dora": 4, "vera": 4, "dvora": 4, "adalora": 6,
    "pissa": 8, "milora": 8, "olora": 8, "corda": 8, "lora_dash": 12,
}  # fmt: skip
WITH_MAGNITUDE = {"dora", "dvora"}
NO_LORA = ("full_st", "bone", "fourierft", "rosa", "ia3", "moe_lora", "prompt_tuning")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def trained(make_model, make_batches):
    """trained(name, kind) -> a tuner some steps from a random non-zero start, and batches."""

    def make(name, kind="llama", dtype=DOUBLE, **options):
        batches = make_batches(kind, 2, dtype)
        tuner = tuner_of(name, make_model(kind, dtype), batches, **options)
        tuner.start()
        randomise(tuner)
        train(tuner, batches, 4)
        return tuner, batches

    return make


@pytest.mark.parametrize("name", list(RANKS))
def test_plain_peft_gives_equal_outputs_on_the_untouched_base(name, trained, make_model, tmp_path):
    tuner, batches = trained(name)
    assert write_adapter(tuner, tmp_path, "the/base") == RANKS[name]
    loaded = peft.PeftModel.from_pretrained(make_model("llama", DOUBLE), tmp_path)
    base = logits(make_model("llama", DOUBLE), batches[0])
    for batch in batches:
        ours = logits(tuner.ctx.model, batch)
        assert distance(ours, logits(make_model("llama", DOUBLE), batch)) > 1e-3
        assert distance(logits(loaded, batch), ours) < 1e-9
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, batches[0]), base)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "the/base"
    assert config["use_dora"] == (name in WITH_MAGNITUDE)


@pytest.mark.parametrize("name", ["lora", "pissa", "dora"])
def test_a_vision_language_base_and_an_adapted_connector(name, trained, make_model, tmp_path):
    """Leaf names alone would adapt the vision tower too."""
    tuner, batches = trained(name, "llava", connector="adapted")
    write_adapter(tuner, tmp_path, "base")
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert not any("vision_tower" in target for target in targets)
    loaded = peft.PeftModel.from_pretrained(make_model("llava", DOUBLE), tmp_path)
    for batch in batches:
        assert distance(logits(loaded, batch), logits(tuner.ctx.model, batch)) < 1e-9


@pytest.mark.parametrize("name", ["lora", "dora", "lora_dash"])
def test_an_adapted_embedding(name, trained, make_model, tmp_path):
    tuner, batches = trained(name, modules=["q_proj", "embed_tokens"])
    write_adapter(tuner, tmp_path, "base")
    loaded = peft.PeftModel.from_pretrained(make_model("llama", DOUBLE), tmp_path)
    ours = logits(tuner.ctx.model, batches[0])
    assert distance(logits(loaded, batches[0]), ours) < 1e-9


@pytest.mark.parametrize("name", [name for name in RANKS if name not in WITH_MAGNITUDE])
def test_the_form_that_vllm_accepts(name, trained, tmp_path):
    """What its loader asks for: one rank, scaling alpha / r, these keys, no patterns, no DoRA."""
    tuner, _ = trained(name)
    rank = write_adapter(tuner, tmp_path, "base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == rank
    assert isinstance(config["lora_alpha"], int)
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not {"rank_pattern", "alpha_pattern", "modules_to_save"} & set(config)
    weights = load_file(tmp_path / WEIGHTS)
    assert len(weights) == 2 * 28
    for key, value in weights.items():
        module, _, letter = key.removesuffix(".weight").rpartition(".lora_")
        layer = tuner.ctx.model.get_submodule(module.removeprefix("base_model.model."))
        m, n = layer.base.weight.shape
        assert tuple(value.shape) == ((rank, n) if letter == "A" else (m, rank))


def test_the_scale_stays_where_it_is_a_ratio_of_integers(trained, tmp_path):
    """So that training can go on in PEFT with the scale that it had."""
    tuner, _ = trained("lora")
    write_adapter(tuner, tmp_path, "base")
    config, weights = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    name, layer = next(iter(tuner.ctx.adapters()))
    assert torch.equal(weights[f"base_model.model.{name}.lora_B.weight"], layer.B)


@pytest.mark.parametrize("name", NO_LORA)
def test_what_is_no_lora_says_so_and_writes_nothing(name, trained, tmp_path):
    tuner, _ = trained(name)
    with pytest.raises(BallastError, match=rf"{name} is no LoRA in the end: .*--merged"):
        write_adapter(tuner, tmp_path / "out", "base", method=name)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_adds_more_than_its_form_is_found_out(trained, tmp_path):
    """A new layer type that inherits LoRA's form and computes something else."""
    tuner, _ = trained("lora")
    _, layer = next(iter(tuner.ctx.adapters()))
    whole = layer.merged_weight()
    layer.merged_weight = lambda: whole + 1e-3 * whole.flip(0)
    with pytest.raises(BallastError, match="no LoRA in the end"):
        write_adapter(tuner, tmp_path, "base")


def test_a_connector_that_trains_itself_is_no_lora(trained, tmp_path):
    tuner, _ = trained("lora", "llava", connector="tuned")
    with pytest.raises(BallastError, match=r"multi_modal_projector\S* trains itself"):
        write_adapter(tuner, tmp_path, "base")


# From a cell's folder, by the command.


@pytest.fixture
def cell(tmp_path, make_model, make_batches, monkeypatch):
    """cell(method) -> id of a finished cell of that method in results/ under a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Layout, "here", classmethod(lambda cls: cls(METHODS.parent, LOCAL)))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    make_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ready = {"base_key": "key", "model": str(tmp_path / "base")}
    (tmp_path / "results/suite/bases").mkdir(parents=True)
    (tmp_path / "results/suite/bases/tiny.json").write_text(json.dumps(ready))

    def make(name):
        file, batches = read_method(METHODS / f"{name}.py"), make_batches("llama", 2)
        tuner = tuner_of(name, make_model("llama"), batches)
        tuner.start()
        train(tuner, batches, 3)
        spec = {
            "suite": "suite", "base": "tiny", "base_key": "key", "method": name, "rank": 4,
            "hyper": file.settings(QUICK.get(name, {})), "seed": 0, "modules": "all",
            "connector": "frozen",
            "training": {"steps": 4, "precision": "fp32"}, "learning_rate": 1e-2,
            "source": {"world": "micro-lm"}, "template": "chat", "target": "t",
            "family": file.declaration.family, "merges": file.declaration.merges,
        }  # fmt: skip
        folder = tmp_path / f"results/suite/cells/tiny.t.{name}-r4.s0-abc"
        tensors = tuner.tensors()
        write_tensors(folder / "adapter.safetensors", tensors, {"spec": json.dumps(spec)})
        return folder.name, tuner, batches

    return make


@pytest.mark.parametrize("name", ["lora", "milora"])
def test_the_command_writes_an_adapter(name, cell, make_model, tmp_path, capsys):
    _, tuner, batches = cell(name)
    assert cli.main(["export", f"tiny.t.{name}", "out"]) == 0
    assert f"adapter of rank {RANKS[name]}" in capsys.readouterr().out
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "out")
    ours = logits(tuner.ctx.model, batches[0])
    assert distance(logits(loaded, batches[0]), ours) < 1e-5


@pytest.mark.parametrize("name", ["full_st", "bone", "peft_bridge"])
def test_the_command_writes_merged_weights(name, cell, tmp_path):
    identity, tuner, batches = cell(name)
    folder = str(tmp_path / "results/suite/cells" / identity)
    assert cli.main(["export", folder, "out", "--merged"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = logits(tuner.ctx.model, batches[0])
    assert distance(logits(loaded, batches[0]), ours) < 1e-5
    assert (tmp_path / "out/tokenizer.json").exists()


def test_what_neither_merges_nor_is_a_lora_has_one_message(cell, capsys, tmp_path):
    identity, _, _ = cell("moe_lora")
    assert cli.main(["export", identity, "out"]) == 2
    assert "no LoRA in the end" in capsys.readouterr().err
    assert cli.main(["export", identity, "out", "--merged"]) == 2
    assert "moe_lora cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cells_are_found_by_a_beginning_that_is_unique(cell):
    cell("lora")
    cell("lora_plus")
    assert find_cell("tiny.t.lora-r4", LOCAL).name == "tiny.t.lora-r4.s0-abc"
    with pytest.raises(BallastError, match=r"2 trained cells begin so: .*unique"):
        find_cell("tiny.t.lora", LOCAL)
    with pytest.raises(BallastError, match="0 trained cells"):
        find_cell("nothing", LOCAL)


def test_an_adalora_export_leaves_pruned_triplets_out_of_the_update(trained, tmp_path):
    """lambda is folded into B, so that pruned triplets are columns of zeros."""
    tuner, _ = trained("adalora", steps=4)
    write_adapter(tuner, tmp_path, "base")
    weights = load_file(tmp_path / WEIGHTS)
    kept = {name: int(torch.count_nonzero(layer.E)) for name, layer in tuner.ctx.adapters()}
    assert min(kept.values()) < 6
    for name, count in kept.items():
        b = weights[f"base_model.model.{name}.lora_B.weight"]
        assert int(b.any(0).sum()) == count
    assert not any(key.startswith(STATE) for key in weights)

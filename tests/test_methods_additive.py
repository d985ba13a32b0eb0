"""Prompts, prefixes, bottleneck adapters and (IA)^3 against PEFT and against what they mean.

The oracle of a prompt is the plain model that reads the prompt's embeddings literally prepended,
all positions counted through. transformers computes norms and rotations in fp32 whatever the
model's precision, so both sides get them in float64 (`exact`); the comparison is then to the last
digits.
Deviations of PEFT that these tests state:
  * prefix tuning fills the cache and counts tokens from P, so that its keys are ours turned by P
    positions; the oracle's rotation is shifted back;
  * in a left-padded batch that generates, PEFT drops the position ids and so has the pads between
    a soft prompt and the tokens; here the tokens follow the prompt, as they do unpadded.
"""

from __future__ import annotations

import copy
import functools
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DynamicCache,
    RobertaConfig,
    RobertaForMaskedLM,
    StaticCache,
)

from ballast import prompts
from ballast.anatomy import targets_of
from ballast.bases import micro_lm, micro_vlm
from ballast.budget import resolve
from ballast.declare import read_method
from ballast.errors import MethodError, SuiteError
from ballast.harness import ImageLM, TextLM
from ballast.models import Base, use_stored_features
from tiny import MARKER, METHODS, backward, distance, logits, randomise, train, tuner_of

DOUBLE = torch.float64
P = 3
PROMPTS = ("prompt_tuning", "p_tuning")


class _Norm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class _Rotation(nn.Module):
    def __init__(self, rotary, shift):
        super().__init__()
        self.shift = shift
        self.register_buffer("inv_freq", rotary.inv_freq.to(DOUBLE), persistent=False)

    def forward(self, x, position_ids):
        angles = (position_ids + self.shift)[..., None].to(DOUBLE) * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def exact(model, shift=0):
    """The model with its norms and rotations at its own precision; positions moved by `shift`."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if type(module).__name__.endswith("RMSNorm"):
            setattr(model.get_submodule(parent), leaf, _Norm(module))
        elif type(module).__name__.endswith("RotaryEmbedding"):
            setattr(model.get_submodule(parent), leaf, _Rotation(module, shift))
    return model


@pytest.fixture
def exact_model(make_model):
    return lambda kind, shift=0: exact(make_model(kind, DOUBLE), shift)


@pytest.fixture
def started(exact_model, make_batches):
    """started(name, kind, **options) -> a started tuner with random values, and batches."""

    def start(name, kind="llama", random=True, count=2, **options):
        batches = make_batches(kind, count, DOUBLE)
        tuner = tuner_of(name, exact_model(kind), batches, **options)
        tuner.start()
        if random:
            randomise(tuner)
        return tuner, batches

    return start


def module_of(tuner):
    return prompts.soft_prefix(tuner.ctx)


def padded(batch, side):
    """Two pads on one side of the second row; the attention mask says so."""
    batch = {k: v.clone() for k, v in batch.items()}
    place = slice(0, 2) if side == "left" else slice(-2, None)
    batch["attention_mask"][1, place] = 0
    batch["labels"][1, place] = -100
    return batch


def merged_embeddings(model, batch):
    """What the language model reads: words, and an image's features where it stands."""
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    if "pixel_values" not in batch:
        return embeddings
    features = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    here = first_of(batch["input_ids"] == 63, 4)
    return embeddings.masked_scatter(here[..., None], torch.cat(list(features)))


def first_of(there, count):
    """The first places of each row only: a placeholder that generation made is a word."""
    return there & (there.cumsum(-1) <= count)


def prepended(model, batch, prompt):
    """Logits [batch, length, words] of the plain model with prompts [P, d] or [batch, P, d]."""
    rows = merged_embeddings(model, batch)
    prompt = prompt.expand(len(rows), *prompt.shape[-2:])
    ones = batch["attention_mask"].new_ones(prompt.shape[:2])
    inner = model.model if hasattr(model.model, "embed_tokens") else model.model.language_model
    hidden = inner(
        inputs_embeds=torch.cat((prompt, rows), 1),
        attention_mask=torch.cat((ones, batch["attention_mask"]), 1),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, prompt.shape[1] :])


def loss_of(scores, labels):
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# --- soft prompts are the embeddings prepended --------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prompt_tuning", {}),
        ("prompt_tuning", {"place": "visual"}),
        ("p_tuning", {}),
        ("p_tuning", {"encoder": "lstm", "width": 5}),
    ],
)
def test_a_prompt_is_its_embeddings_prepended(name, settings, side, kind, started, exact_model):
    if kind == "llama" and settings.get("place") == "visual":
        with pytest.raises(SuiteError, match=r"place: visual.*no connector"):
            started(name, kind, settings=settings)
        return
    tuner, (batch, _) = started(name, kind, settings=settings)
    batch = batch if side == "none" else padded(batch, side)
    plain = exact_model(kind)
    module = module_of(tuner)
    prompt = module.embeddings()[0]
    if settings.get("place") == "visual":
        assert torch.equal(prompt, plain.model.multi_modal_projector(module.prompt))
    expected = prepended(plain, batch, prompt)
    seen = batch["attention_mask"].bool()
    assert distance(logits(tuner.ctx.model, batch)[seen], expected[seen]) < 1e-13
    assert distance(expected[seen], logits(plain, batch)[seen]) > 1e-3
    # Gradients, through everything that makes the prompt; transformers' own loss is in fp32.
    loss_of(tuner.ctx.model(**batch).logits, batch["labels"]).backward()
    found = {n: p.grad.clone() for n, p in tuner.ctx.trainable().items()}
    tuner.ctx.model.zero_grad()
    loss_of(expected, batch["labels"]).backward()
    for n, p in tuner.ctx.trainable().items():
        assert p.grad.any(), n
        assert distance(found[n], p.grad) < 1e-10, n


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("name", PROMPTS)
def test_generation_reads_the_prompt_left_padded_and_cached(name, kind, started, exact_model):
    tuner, (batch, _) = started(name, kind)
    batch = {k: v for k, v in batch.items() if k != "labels"}
    if kind == "llama":
        batch["attention_mask"][1, :3] = 0
    prompt = module_of(tuner).embeddings()[0].detach()
    plain, model = exact_model(kind), tuner.ctx.model
    made = model.generate(**batch, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert made.shape[1] == 17
    for row, answer in enumerate(made[:, 10:].tolist()):
        kept = batch["attention_mask"][row].bool()
        one = {k: v[row : row + 1] for k, v in batch.items()}
        one = one | {k: one[k][:, kept] for k in ("input_ids", "attention_mask")}
        for token in answer:
            with torch.no_grad():
                best = prepended(plain, one, prompt)[0, -1].argmax()
            assert best == token
            one["input_ids"] = torch.cat((one["input_ids"], best.view(1, 1)), 1)
            one["attention_mask"] = torch.ones_like(one["input_ids"])
    # Beams and a sample run too, and a static cache keeps the length that was asked for.
    model.generate(**batch, max_new_tokens=3, num_beams=2, eos_token_id=None)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=17)
    again = model.generate(
        **batch, max_new_tokens=7, do_sample=False, past_key_values=static, eos_token_id=None
    )
    assert torch.equal(again, made)


@pytest.mark.parametrize("name", [*PROMPTS, "prefix_tuning", "instance_prompt"])
def test_caches_and_hidden_states_keep_their_lengths(name, started):
    tuner, (batch, _) = started(name)
    model, ids = tuner.ctx.model.eval(), batch["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, output_hidden_states=True)
        assert whole.past_key_values.get_seq_length() == ids.shape[1]
        assert [h.shape[1] for h in whole.hidden_states] == [ids.shape[1]] * 5
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids[:, :6], past_key_values=cache).logits
        second = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    assert distance(torch.cat((first, second), 1), whole.logits) < 1e-13


@pytest.mark.parametrize("name", [*PROMPTS, "prefix_tuning"])
def test_evaluation_computes_the_prefix_once_until_a_parameter_changes(
    name, started, exact_model, monkeypatch
):
    tuner, (batch, _) = started(name)
    model, module = tuner.ctx.model.eval(), module_of(tuner)
    calls = []
    compute = type(module).prefix
    monkeypatch.setattr(
        type(module), "prefix", lambda self, decoder: (calls.append(1), compute(self, decoder))[1]
    )
    with torch.no_grad():
        first = model(**batch).logits
        assert torch.equal(model(**batch).logits, first)
        assert len(calls) == 1
        twin = copy.deepcopy(model)
        next(module.parameters()).mul_(1.5)
        changed = model(**batch).logits
        assert distance(changed, first) > 1e-4
        assert torch.equal(twin(**batch).logits, first)  # a copy's hook is the copy's own
    # A fused step leaves the versions as they are.
    optimiser = torch.optim.AdamW(tuner.parameter_groups(0.1), fused=True)
    train(tuner, [batch], 1, optimiser)
    with torch.inference_mode():
        stepped = model(**batch).logits
    assert distance(stepped, changed) > 1e-6
    fresh = tuner_of(name, exact_model("llama"), [])
    fresh.restore(tuner.tensors())
    assert torch.equal(logits(fresh.ctx.model, batch), stepped)
    backward(tuner, batch)
    assert all(p.grad.any() for p in tuner.ctx.trainable().values())


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("name", [*PROMPTS, "prefix_tuning", "instance_prompt"])
def test_prompts_in_half_precision(name, kind, make_model, make_batches):
    """A bf16 base, and autocast, stay near fp32; what trains is fp32; modes do not mix."""
    (batch,) = make_batches(kind, 1)
    tuner = tuner_of(name, make_model(kind), [])
    tuner.start()
    model = tuner.ctx.model.eval()
    expected = logits(model, batch)
    model.train().eval()  # nothing is kept now
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert 0 < distance(model(**batch).logits, expected) < 6 * 2**-8
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    assert all(p.grad.any() for p in tuner.ctx.trainable().values())
    half = tuner_of(name, make_model(kind, torch.bfloat16), [])
    half.restore(tuner.tensors())
    assert {p.dtype for p in half.ctx.trainable().values()} == {torch.float32}
    if kind == "llava":
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    found = logits(half.ctx.model, batch)
    assert found.dtype == torch.bfloat16
    assert distance(found, expected) < 12 * 2**-8
    train(half, [batch], 1)


def test_sampled_prompts_are_real_tokens(started, make_model):
    tuner, _ = started("prompt_tuning", random=False)
    words = tuner.ctx.model.get_input_embeddings().weight
    prompt = module_of(tuner).prompt
    assert all((row == words).all(1).any() for row in prompt)
    assert len({tuple(row.tolist()) for row in prompt}) == P
    tuner, batches = started("prompt_tuning", "llava", random=False, settings={"place": "visual"})
    tower = make_model("llava", DOUBLE).model.vision_tower
    with torch.no_grad():
        states = tower(batches[0]["pixel_values"], output_hidden_states=True).hidden_states[-1]
    patches = states.flatten(0, 1)
    prompt = module_of(tuner).prompt
    assert all(((row - patches).abs().amax(1) < 1e-12).any() for row in prompt)


# --- PEFT ---------------------------------------------------------------------------------------


def tables(tuner):
    """Names of ours -> PEFT's, of the parameters under the prompt's module."""
    module = module_of(tuner)
    found = {"prompt": "embedding.weight", "learned": "embedding.weight"}
    if getattr(module, "lstm", None) is not None:
        found |= {f"lstm.{n}": f"lstm_head.{n}" for n, _ in module.lstm.named_parameters()}
    head = "transform" if hasattr(module, "learned") else "mlp_head"
    for i in range(3):
        found[f"weights.{i}"] = f"{head}.{2 * i}.weight"
        found[f"biases.{i}"] = f"{head}.{2 * i}.bias"
    return found


CONFIGS = {
    "prompt_tuning": ({}, peft.PromptTuningConfig, {}),
    "p_tuning": ({"width": 7}, peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "p_tuning_lstm": (
        {"width": 5, "encoder": "lstm"},
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix_tuning": ({}, peft.PrefixTuningConfig, {}),
    "prefix_tuning_mlp": (
        {"reparameterise": 6},
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 6},
    ),
}


@pytest.fixture
def both(started, exact_model):
    """both(case) -> ours and PEFT's with the same values, pairs of parameters, batches."""

    def make(case):
        settings, config, options = CONFIGS[case]
        name = case.removesuffix("_lstm").removesuffix("_mlp")
        tuner, batches = started(name, settings=settings, count=3)
        shift = -P if name == "prefix_tuning" else 0
        wrapped = peft.get_peft_model(
            exact_model("llama", shift),
            config(task_type="CAUSAL_LM", num_virtual_tokens=P, **options),
        ).double()
        theirs = dict(wrapped.prompt_encoder.default.named_parameters())
        table = tables(tuner)
        pairs = [
            (n, p, theirs.pop(table[n.removeprefix("model.soft_prefix.")]))
            for n, p in tuner.ctx.trainable().items()
        ]
        assert not theirs
        with torch.no_grad():
            for _, own, other in pairs:
                other.copy_(own)
        return tuner, wrapped, pairs, batches

    return make


def peft_logits(wrapped, batch):
    return wrapped(**batch).logits[:, -batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("case", list(CONFIGS))
def test_same_course_as_peft(case, both):
    tuner, wrapped, pairs, batches = both(case)
    batches = [batches[0], padded(batches[1], "right"), padded(batches[2], "left")]
    for batch in batches:
        seen = batch["attention_mask"].bool()
        expected = peft_logits(wrapped, batch)
        assert distance(logits(tuner.ctx.model, batch)[seen], expected[seen]) < 1e-12
    backward(tuner, batches[1])
    wrapped(**batches[1]).loss.backward()
    for name, own, other in pairs:
        assert own.grad.any(), name
        assert distance(own.grad, other.grad) < 1e-9, name
    group = tuner.parameter_groups(0.1)[0]
    optimiser = torch.optim.AdamW(
        [other for _, _, other in pairs], lr=group["lr"], weight_decay=group["weight_decay"]
    )
    train(tuner, batches, 4)
    wrapped.train()
    for step in range(4):
        optimiser.zero_grad()
        wrapped(**batches[step % 3]).loss.backward()
        nn.utils.clip_grad_norm_([other for _, _, other in pairs], 1.0)
        optimiser.step()
    for name, own, other in pairs:
        assert distance(own, other) < 1e-9, name
    for batch in batches:
        seen = batch["attention_mask"].bool()
        expected = peft_logits(wrapped.eval(), batch)
        assert distance(logits(tuner.ctx.model, batch)[seen], expected[seen]) < 1e-9


@pytest.mark.parametrize("case", list(CONFIGS))
def test_same_generation_as_peft(case, both):
    tuner, wrapped, _, (batch, *_) = both(case)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(
        tuner.ctx.model.generate(**inputs, **options),
        wrapped.eval().generate(**inputs, **options)[:, -18:],
    )


@pytest.mark.parametrize("case", ["prompt_tuning", "prefix_tuning"])
def test_generation_of_a_left_padded_row_is_that_of_the_row_alone(case, both):
    """Of PEFT this holds for its prefixes only: its prompts are parted from the row by the pads."""
    tuner, wrapped, _, (batch, *_) = both(case)
    inputs = {k: padded(batch, "left")[k] for k in ("input_ids", "attention_mask")}
    alone = {k: v[1:2, 2:] for k, v in inputs.items()}
    options = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    for model, holds in ((tuner.ctx.model, True), (wrapped.eval(), case == "prefix_tuning")):
        (row,), (single,) = (model.generate(**part, **options).scores for part in (inputs, alone))
        assert (distance(row[1], single[0]) < 1e-6) == holds


LEAVES = ["k_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_ia3_same_course_as_peft(kind, started, exact_model):
    tuner, batches = started("ia3", kind)
    where = r".*language_model\." if kind == "llava" else ""
    config = peft.IA3Config(
        target_modules=where + rf".*layers\.\d+\..*({'|'.join(LEAVES)})",
        feedforward_modules=where + r".*layers\.\d+\..*down_proj",
    )
    wrapped = peft.get_peft_model(exact_model(kind), config).double()
    pairs = []
    for name, layer in tuner.ctx.adapters():
        other = wrapped.base_model.model.get_submodule(name).ia3_l.default
        pairs.append((name, layer.scales, other))
        with torch.no_grad():
            other.copy_(layer.scales.view(other.shape))
    assert len(pairs) == sum(p.requires_grad for p in wrapped.parameters())
    assert distance(logits(tuner.ctx.model, batches[0]), logits(wrapped, batches[0])) < 1e-13
    assert distance(logits(exact_model(kind), batches[0]), logits(wrapped, batches[0])) > 1e-2
    optimiser = torch.optim.AdamW([o for *_, o in pairs], lr=1e-2, weight_decay=0.0)
    assert {g["weight_decay"] for g in tuner.parameter_groups(0.1)} == {0.0}
    train(tuner, batches, 4)
    wrapped.train()
    for step in range(4):
        optimiser.zero_grad()
        wrapped(**batches[step % 2]).loss.backward()
        nn.utils.clip_grad_norm_([o for *_, o in pairs], 1.0)
        optimiser.step()
    for name, own, other in pairs:
        assert distance(own.view(-1), other.view(-1)) < 1e-9, name
    tuner.merge()
    theirs = wrapped.merge_and_unload().state_dict()
    for key, weight in tuner.ctx.model.state_dict().items():
        assert distance(weight, theirs[key]) < 1e-12, key


# --- prefix tuning ------------------------------------------------------------------------------


def test_a_prefix_of_words_starts_as_a_prompt_of_these_words(started, exact_model):
    """Its initialisation is what the words' own run leaves in attention, of the same draw."""
    prefix, (batch, _) = started("prefix_tuning", random=False)
    prompt, _ = started("prompt_tuning", random=False)
    expected = logits(prompt.ctx.model, batch)
    assert distance(logits(prefix.ctx.model, batch), expected) < 1e-13
    assert distance(logits(exact_model("llama"), batch), expected) > 1e-3


@pytest.mark.parametrize("init", ["random", "zero"])
def test_prefix_initialisations(init, started):
    tuner, _ = started("prefix_tuning", random=False, settings={"init": init, "tokens": 50})
    learned = module_of(tuner).learned
    assert learned.shape == (50, 4 * 2 * 16)
    assert float(learned.detach().std()) == pytest.approx({"random": 1, "zero": 0}[init], abs=0.05)


def attention_by_hand(module, prefix):
    """RoBERTa's self-attention of a plain model, keys and values of a prefix in front."""

    def forward(hidden_states, attention_mask=None, **_):
        heads, width = module.num_attention_heads, module.attention_head_size
        q, k, v = (
            layer(hidden_states).view(*hidden_states.shape[:2], heads, width).transpose(1, 2)
            for layer in (module.query, module.key, module.value)
        )
        front = [part.expand(len(q), -1, -1, -1) for part in prefix]
        scores = q @ torch.cat((front[0], k), 2).mT / math.sqrt(width)
        if attention_mask is not None:
            hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < -1
            scores[..., -hidden.shape[-1] :].masked_fill_(hidden, -math.inf)
        out = scores.softmax(-1) @ torch.cat((front[1], v), 2)
        return out.transpose(1, 2).flatten(2), None

    return forward


@pytest.fixture
def encoder():
    """A tiny RoBERTa in float64 with random weights, and a right-padded batch of it."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=1,
    )
    model = RobertaForMaskedLM(config).double().eval()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    ids = torch.randint(2, 64, (3, 8))
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = 1, 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("settings", [{}, {"reparameterise": 6}])
def test_prefix_in_an_encoder(settings, padding, encoder):
    plain, batch = encoder
    if not padding:
        batch["attention_mask"][:] = 1
    tuner = tuner_of("prefix_tuning", copy.deepcopy(plain), [batch], settings=settings)
    tuner.start()
    randomise(tuner)
    values = module_of(tuner).numbers().view(P, 2, 2, 4, 8).permute(1, 2, 3, 0, 4).detach()
    expected = copy.deepcopy(plain)
    for layer, prefix in zip(expected.roberta.encoder.layer, values, strict=True):
        own = layer.attention.self
        own.forward = attention_by_hand(own, prefix[:, None])
    seen = batch["attention_mask"].bool()
    found = logits(tuner.ctx.model, batch)[seen]
    assert distance(found, logits(expected, batch)[seen]) < 1e-12
    assert distance(found, logits(plain, batch)[seen]) > 1e-3
    train(tuner, [batch], 2)


def test_attention_that_takes_no_prefix_is_refused():
    config = DebertaV2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    tuner = tuner_of("prefix_tuning", DebertaV2ForMaskedLM(config), [])
    with pytest.raises(SuiteError, match="no prefix can be put in front"):
        tuner.start()


# --- instance-conditioned prompts ---------------------------------------------------------------


def meta_by_hand(module, feature):
    feature = feature / feature.square().sum().sqrt()
    inner = (module.w1 @ feature + module.b1).clamp_min(0)
    return module.prompt + (module.w2 @ inner + module.b2)


def test_instance_prompt_of_images(started, exact_model):
    tuner, (batch, _) = started("instance_prompt", "llava")
    plain, module = exact_model("llava"), module_of(tuner)
    with torch.no_grad():
        features = plain.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        by_row = torch.stack([meta_by_hand(module, f.mean(0)) for f in features])
        expected = prepended(plain, batch, by_row)
    assert distance(logits(tuner.ctx.model, batch), expected) < 1e-12
    assert distance(by_row[0], by_row[1]) > 1e-3
    # The image reaches generation's later steps too.
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    made = tuner.ctx.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    rows = inputs | {"input_ids": made, "attention_mask": torch.ones_like(made)}
    with torch.no_grad():
        best = prepended(plain, rows, by_row).argmax(-1)
    assert torch.equal(best[:, 9:-1], made[:, 10:])
    # Without an image: P alone, even right after one was looked at without reading any text.
    with torch.no_grad():
        tuner.ctx.model.get_image_features(pixel_values=batch["pixel_values"])
        text = {"input_ids": made[:, 10:], "attention_mask": torch.ones_like(made[:, 10:])}
        expected = prepended(plain, text, module.prompt)
    assert distance(logits(tuner.ctx.model, text), expected) < 1e-12


def instance_by_hand(plain, module, ids, mask, marker=MARKER):
    """Logits of rows read one by one: [P ; shifted P ; text], who sees what in one dense mask."""
    found = []
    words = plain.get_input_embeddings()
    for row, seen in zip(ids, mask, strict=True):
        length = len(row)
        ends = range(len(marker) - 1, length)
        marks = [i for i in ends if tuple(row[i + 1 - len(marker) : i + 1].tolist()) == marker]
        first = marks[0] if marks else length
        asked = [i for i in range(first + 1 - len(marker)) if seen[i]] if marks else []
        feature = words(row[asked]).mean(0) if asked else torch.zeros(32, dtype=DOUBLE)
        shifted = meta_by_hand(module, feature) if asked else module.prompt
        sees = torch.zeros(2 * P + length, 2 * P + length, dtype=torch.bool)
        for i in range(P):
            sees[i, : i + 1] = True
            sees[P + i, P : P + i + 1] = True
        for i in range(length):
            front = slice(P, 2 * P) if marks and i >= first else slice(0, P)
            sees[2 * P + i, front] = True
            sees[2 * P + i, 2 * P : 2 * P + i + 1] = seen[: i + 1].bool()
        places = torch.cat((torch.arange(P), torch.arange(P), torch.arange(P, P + length)))
        scores = plain(
            inputs_embeds=torch.cat((module.prompt, shifted, words(row)))[None],
            attention_mask=torch.where(sees, 0.0, -math.inf)[None, None].to(DOUBLE),
            position_ids=places[None],
        ).logits
        found.append(scores[0, 2 * P :])
    return torch.stack(found)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_instance_prompt_of_questions(side, started, exact_model):
    tuner, (batch, _) = started("instance_prompt")
    batch = batch if side == "none" else padded(batch, side)
    batch["input_ids"][2, 4] = 5  # a row without a marker
    batch["input_ids"][0, 7] = MARKER[0]  # a second marker, in the response
    plain, module = exact_model("llama"), module_of(tuner)
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = instance_by_hand(plain, module, batch["input_ids"], batch["attention_mask"])
    assert distance(logits(tuner.ctx.model, batch)[seen], expected[seen]) < 1e-12
    if side == "right":
        return
    inputs = {k: batch[k][:, :6] for k in ("input_ids", "attention_mask")}
    made = tuner.ctx.model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    if side == "none":
        with torch.no_grad():
            best = instance_by_hand(plain, module, made, torch.ones_like(made)).argmax(-1)
        assert torch.equal(best[:, 5:-1], made[:, 6:])


def test_instance_prompt_of_questions_before_two_tokens(started, exact_model):
    tuner, (batch, _) = started("instance_prompt")
    module = module_of(tuner)
    module.marker = marker = (7, *MARKER)
    ids, ones = batch["input_ids"], batch["attention_mask"]
    ids[:2, 3] = 7
    with torch.no_grad():
        expected = instance_by_hand(exact_model("llama"), module, ids, ones, marker)
    assert distance(logits(tuner.ctx.model, batch), expected) < 1e-12


def test_no_token_reaches_an_earlier_logit(started):
    """Neither a response's word its question, nor a question's last word the first ones."""
    tuner, (batch, _) = started("instance_prompt")
    before = logits(tuner.ctx.model, batch)
    for place in range(1, 10):
        if place == 4:
            continue
        ids = batch["input_ids"].clone()
        ids[:, place] = ids[:, place] % 60 + 1
        after = logits(tuner.ctx.model, batch | {"input_ids": ids})
        assert torch.equal(after[:, :place], before[:, :place]), place
        assert not torch.equal(after[:, place:], before[:, place:])


def test_instance_prompt_without_a_marker_or_with_a_foreign_cache(started, exact_model):
    tuner = tuner_of("instance_prompt", exact_model("llama"), [])
    tuner.ctx.response_marker = ()
    with pytest.raises(SuiteError, match="template: nothing stands between"):
        tuner.start()
    tuner, (batch, _) = started("instance_prompt")
    cache = exact_model("llama")(input_ids=batch["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="not filled by this model"):
        tuner.ctx.model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("ids", "marker", "expected"),
    [
        ([[5, 7, 8, 9], [7, 8, 7, 8], [1, 2, 7, 7]], (7, 8), ([1, 0, 4], [2, 1, 4])),
        ([[5, 7]], (5, 7, 1), ([2], [2])),
    ],
)
def test_marker_spans(ids, marker, expected, exact_model):
    spans = tuner_of("instance_prompt", exact_model("llama"), []).method.spans
    found = spans(torch.tensor(ids), marker)
    assert tuple(part.tolist() for part in found) == expected


# --- bottleneck adapters ------------------------------------------------------------------------

ACTS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def net_by_hand(layer, x, activation, scale):
    bias = layer.down_bias is not None
    inner = ACTS[activation](x @ layer.down.T + (layer.down_bias if bias else 0))
    return scale * (inner @ layer.up.T + (layer.up_bias if bias else 0))


def hooked(plain, kind, tuner, name, activation, scale, placement):
    """The plain model, each sublayer's output changed by the formula in a hook of the sublayer."""
    inner = plain.model if kind == "llama" else plain.model.language_model
    prefix = tuner.ctx.anatomy.layers
    for i, block in enumerate(inner.layers):
        adapters = {n.removeprefix(f"{prefix}.{i}."): a for n, a in tuner.ctx.adapters()}

        def series(module, inputs, output, layer=None):
            first = output[0] if isinstance(output, tuple) else output
            changed = first + net_by_hand(layer, first, activation, scale)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        def parallel(module, inputs, output, layer=None):
            return output + net_by_hand(layer, inputs[0], activation, scale)

        def hook(module, function, layer):
            module.register_forward_hook(functools.partial(function, layer=layer))

        if placement == "linears":
            for leaf in ("up_proj", "down_proj"):
                hook(getattr(block.mlp, leaf), parallel, adapters[f"mlp.{leaf}"])
        elif name == "parallel_adapter":
            hook(block.mlp, parallel, adapters["mlp.down_proj"])
        else:
            hook(block.mlp, series, adapters["mlp.down_proj"])
            if placement == "houlsby":
                hook(block.self_attn, series, adapters["self_attn.o_proj"])
    connector = dict(tuner.ctx.adapters()).get("model.multi_modal_projector.linear_2")
    if connector is not None:
        function = parallel if name == "parallel_adapter" else series
        hook(plain.model.multi_modal_projector, function, connector)
    return plain


@pytest.mark.parametrize(
    ("name", "kind", "settings", "options"),
    [
        ("series_adapter", "llama", {}, {}),
        ("series_adapter", "llava", {"activation": "tanh", "bias": False}, {}),
        ("series_adapter", "llama", {"placement": "pfeiffer", "activation": "silu"}, {}),
        ("series_adapter", "llava", {"activation": "relu"}, {"connector": "adapted"}),
        ("parallel_adapter", "llama", {}, {}),
        ("parallel_adapter", "llava", {"activation": "gelu", "scale": 1.0, "bias": False}, {}),
        ("parallel_adapter", "llava", {}, {"connector": "adapted"}),
        (
            "parallel_adapter",
            "llama",
            {"placement": "linears", "activation": "tanh", "scale": 1.0},
            {"modules": ["up_proj", "down_proj"]},
        ),
    ],
)
def test_bottlenecks_are_the_formula(name, kind, settings, options, started, exact_model):
    tuner, (batch, _) = started(name, kind, settings=settings, **options)
    hyper = tuner.ctx.hyper
    scale = getattr(hyper, "scale", 1.0)
    oracle = hooked(exact_model(kind), kind, tuner, name, hyper.activation, scale, hyper.placement)
    expected = oracle(**batch)
    assert distance(logits(tuner.ctx.model, batch), expected.logits) < 1e-12
    assert distance(logits(exact_model(kind), batch), expected.logits) > 1e-3
    backward(tuner, batch)
    found = {n: p.grad.clone() for n, p in tuner.ctx.trainable().items()}
    tuner.ctx.model.zero_grad()
    expected.loss.backward()
    for n, p in tuner.ctx.trainable().items():
        assert found[n].any(), n
        assert distance(found[n], p.grad) < 1e-9, n
    places = 1 if hyper.placement in ("pfeiffer", "ffn") else 2
    layers = 4 if kind == "llama" else 3
    connector = options.get("connector") == "adapted"
    assert len(list(tuner.ctx.adapters())) == places * layers + connector


@pytest.mark.parametrize("name", ["series_adapter", "parallel_adapter"])
@pytest.mark.parametrize(("start", "deviation"), [("bert", 0.02), ("near", 0.01), ("zero", None)])
def test_bottleneck_starts(name, start, deviation, started, make_model):
    tuner, (batch, _) = started(name, random=False, rank=32, settings={"start": start})
    ups = torch.cat([a.up.detach().flatten() for _, a in tuner.ctx.adapters()])
    downs = torch.cat([a.down.detach().flatten() for _, a in tuner.ctx.adapters()])
    if start == "zero":
        assert not ups.any()
        assert 0.95 < downs.abs().max() * 32**0.5 <= 1
        assert distance(logits(tuner.ctx.model, batch), logits(make_model("llama"), batch)) < 1e-5
        return
    cut = 0.8796 if start == "near" else 1  # a normal cut off at two deviations is narrower
    for drawn in (ups, downs):
        assert float(drawn.std()) == pytest.approx(deviation * cut, rel=0.05)
        assert (drawn.abs().max() <= 0.02) == (start == "near")


@pytest.mark.parametrize("name", ["series_adapter", "parallel_adapter"])
def test_a_bottleneck_wider_than_its_layer_is_refused(name, exact_model):
    tuner = tuner_of(name, exact_model("llama"), [], rank=33)
    with pytest.raises(SuiteError, match=r"rank 33 is larger than \S*_proj.*at most 32"):
        tuner.start()


@pytest.mark.parametrize("name", ["series_adapter", "parallel_adapter", "ia3"])
def test_modules_without_a_place_are_refused(name, exact_model):
    tuner = tuner_of(name, exact_model("llama"), [], modules=["q_proj"])
    with pytest.raises(SuiteError, match="modules: none of those adapted"):
        tuner.start()


@pytest.mark.parametrize(
    ("name", "places"), [("series_adapter", 4), ("parallel_adapter", 2), ("ia3", 6)]
)
def test_adapters_in_an_encoder(name, places, encoder):
    plain, batch = encoder
    tuner = tuner_of(name, copy.deepcopy(plain), [batch])
    tuner.start()
    assert distance(logits(tuner.ctx.model, batch), logits(plain, batch)) < 1e-13
    randomise(tuner)
    adapters = dict(tuner.ctx.adapters())
    assert len(adapters) == places
    oracle = copy.deepcopy(plain)
    for i, layer in enumerate(oracle.roberta.encoder.layer):
        own = {n.split(f"layer.{i}.")[1]: a for n, a in adapters.items() if f"layer.{i}." in n}
        if name == "ia3":
            for leaf in ("key", "value"):
                scales = own[f"attention.self.{leaf}"].scales
                linear = getattr(layer.attention.self, leaf)
                linear.weight.data *= scales[:, None].detach()
                linear.bias.data *= scales.detach()
            layer.output.dense.weight.data *= own["output.dense"].scales.detach()
        elif name == "series_adapter":
            for where in ("attention.output.dense", "output.dense"):
                layer.get_submodule(where).register_forward_hook(
                    lambda m, i, o, a=own[where]: o + net_by_hand(a, o, "gelu", 1.0)
                )
        else:
            read = []
            layer.intermediate.dense.register_forward_pre_hook(
                lambda m, i, read=read: read.append(i[0])
            )
            layer.output.dense.register_forward_hook(
                lambda m, i, o, a=own["output.dense"], read=read: (
                    o + net_by_hand(a, read.pop(), "relu", 4.0)
                )
            )
    assert distance(logits(tuner.ctx.model, batch), logits(oracle, batch)) < 1e-12
    train(tuner, [batch], 2)


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "each", "fixed"),
    [
        ("prompt_tuning", {}, 32, 0),
        ("p_tuning", {"width": 7}, 32, 32 * 7 + 7 + 49 + 7 + 7 * 32 + 32),
        ("prefix_tuning", {}, 4 * 2 * 16, 0),
        ("prefix_tuning", {"reparameterise": 6}, 16, 16 * 6 + 6 + 128 * 7),
        ("instance_prompt", {"reduction": 8}, 32, 4 * 32 + 4 + 32 * 4 + 32),
        ("series_adapter", {}, 8 * (64 + 1), 8 * 32),
        ("parallel_adapter", {"bias": False}, 4 * 64, 0),
    ],
)
def test_counts_and_budgets(name, settings, each, fixed, exact_model):
    tuner = tuner_of(name, exact_model("llama"), [], settings=settings)
    file = read_method(METHODS / f"{name}.py")
    asked = fixed + 10 * each + each // 2
    resolved = resolve(asked, tuner.method, file.declaration, tuner.ctx)
    assert resolved["resolved_size"] == 10
    tuner.start()
    assert tuner.trained_count() == fixed + 10 * each == resolved["resolved_parameters"]


def test_settings_that_make_no_sense_are_refused():
    for name, key, value in (
        ("prompt_tuning", "tokens", 0),
        ("prompt_tuning", "place", "audio"),
        ("prefix_tuning", "tokens", -1),
        ("p_tuning", "encoder", "gru"),
        ("series_adapter", "placement", "everywhere"),
        ("parallel_adapter", "activation", "step"),
        ("instance_prompt", "reduction", 0),
    ):
        with pytest.raises(MethodError, match=rf"{name}\.{key}"):
            read_method(METHODS / f"{name}.py").settings({key: value})


def test_llm_adapters_pieces_stand_where_asked(exact_model):
    model = exact_model("llama")
    assert len(targets_of(model, ["up_proj", "down_proj"], "frozen")) == 8


# --- evaluation sees the prompt -----------------------------------------------------------------


def requests_of(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=part, idx=i)
        for i, part in enumerate(arguments)
    ]


@pytest.fixture
def text_harness(exact_model):
    """text_harness(name) -> tuner, TextLM on it, the plain model, tokenizer."""

    def make(name):
        tokenizer = micro_lm.build_tokenizer()
        torch.manual_seed(3)
        model = exact_model("llama")
        model.resize_token_embeddings(len(tokenizer))
        plain = copy.deepcopy(model)
        tuner = tuner_of(name, model, [])
        tuner.ctx.response_marker = tuple(tokenizer.encode("<assistant>", add_special_tokens=False))
        tuner.start()
        randomise(tuner)
        lm = TextLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)
        return tuner, lm, plain, tokenizer

    return make


def scorer(name, tuner, plain):
    """ids [length] -> log-probabilities [length, words] of the oracle."""
    module = module_of(tuner)

    def score(ids):
        with torch.no_grad():
            if name == "instance_prompt":
                ones = torch.ones_like(ids)[None]
                (found,) = instance_by_hand(plain, module, ids[None], ones, module.marker)
            else:
                batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
                found = prepended(plain, batch, module.embeddings()[0])[0]
        return found.log_softmax(-1)

    return score


def greedy(score, ids, count, stop=None):
    for _ in range(count):
        best = score(ids)[-1].argmax()
        if best == stop:
            break
        ids = torch.cat((ids, best[None]))
    return ids


@pytest.mark.parametrize("name", [*PROMPTS, "instance_prompt"])
def test_lm_eval_scores_text_with_the_prompt(name, text_harness):
    tuner, lm, plain, tokenizer = text_harness(name)
    words = sorted(w for w in tokenizer.get_vocab() if not w.startswith("<"))
    questions = [" ".join(words[i : i + n]) for i, n in ((0, 3), (7, 6), (20, 2))]
    asked = [f"<bos> <user> {question} <assistant>" for question in questions]
    pairs = [(ask, f" {words[30 + i]} {words[40 + i]}") for i, ask in enumerate(asked)]
    score = scorer(name, tuner, plain)
    found = lm.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True)
    for (ask, answer), (total, _) in zip(pairs, found, strict=True):
        ids = torch.tensor(tokenizer.encode(ask + answer, add_special_tokens=False))
        logs = score(ids)
        expected = sum(logs[i - 1, ids[i]].item() for i in (len(ids) - 2, len(ids) - 1))
        assert total == pytest.approx(expected, rel=1e-5)
    texts = [(f"{question} {words[50]}",) for question in questions]
    found = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts), True)
    for (text,), total in zip(texts, found, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([lm.prefix_token_id, *ids])
        logs = score(ids)
        expected = sum(logs[i - 1, ids[i]].item() for i in range(1, len(ids)))
        assert total == pytest.approx(expected, rel=1e-5)
    settings = {"until": [], "max_gen_toks": 5, "do_sample": False}
    found = lm.generate_until(
        requests_of("generate_until", *[(ask, settings) for ask in asked]), disable_tqdm=True
    )
    for ask, text in zip(asked, found, strict=True):
        ids = torch.tensor(tokenizer.encode(ask, add_special_tokens=False))
        made = greedy(score, ids, 5, tokenizer.eos_token_id)[len(ids) :]
        assert text.split() == tokenizer.decode(made, skip_special_tokens=True).split()


@pytest.mark.parametrize("name", ["prompt_tuning", "visual", "instance_prompt"])
def test_lm_eval_scores_images_with_the_prompt(name, make_batches):
    tokenizer = micro_vlm.build_tokenizer()
    torch.manual_seed(3)
    model = exact(micro_vlm.build_model(tokenizer).double().eval())
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.2)
    settings = {"place": "visual", "init": "random"} if name == "visual" else {}
    method = "prompt_tuning" if name == "visual" else name
    tuner = tuner_of(method, model, [], settings=settings)
    plain = copy.deepcopy(model)
    base = Base(model, tokenizer, micro_vlm.build_processor(tokenizer), tuner.ctx.anatomy)
    tuner.start()
    randomise(tuner)
    use_stored_features(base)  # after the method, as with a method before it
    lm = ImageLM(pretrained=model, tokenizer=base.processor, batch_size=2)
    width = model.config.vision_config.hidden_size
    places = model.config.image_seq_length
    lm.features = torch.randn(3, places, width, dtype=DOUBLE)
    image = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    words = sorted(w for w in tokenizer.get_vocab() if not w.startswith("<"))
    seen = " ".join([image] * places)
    asked = [
        f"<bos> <user> {seen} {' '.join(words[5 * i : 6 * i + 2])} <assistant>" for i in range(3)
    ]
    module = module_of(tuner)

    def score(ids, row):
        with torch.no_grad():
            features = plain.model.multi_modal_projector(lm.features[row][None])
            embeddings = plain.get_input_embeddings()(ids[None])
            here = first_of(ids == plain.config.image_token_id, places)
            embeddings = embeddings.masked_scatter(here[None, :, None], features)
            prompt = (
                meta_by_hand(module, features[0].mean(0))
                if name == "instance_prompt"
                else module.embeddings()[0]
            )
            whole = torch.cat((prompt[None], embeddings), 1)
            hidden = plain.model.language_model(inputs_embeds=whole).last_hidden_state
            return plain.lm_head(hidden)[0, len(prompt) :].log_softmax(-1)

    pairs = [(ask, f" {words[3 + i]} {words[9 + i]}") for i, ask in enumerate(asked)]
    found = lm.loglikelihood(
        requests_of("loglikelihood", *[(*p, {"visual": i}) for i, p in enumerate(pairs)])
    )
    for row, ((ask, answer), (total, _)) in enumerate(zip(pairs, found, strict=True)):
        ids = torch.tensor(tokenizer.encode(ask + answer, add_special_tokens=False))
        logs = score(ids, row)
        expected = sum(logs[i - 1, ids[i]].item() for i in (len(ids) - 2, len(ids) - 1))
        assert total == pytest.approx(expected, rel=1e-5)
    until = {"until": [], "max_gen_toks": 5, "do_sample": False}
    found = lm.generate_until(
        requests_of("generate_until", *[(a, until, {"visual": i}) for i, a in enumerate(asked)])
    )
    for row, (ask, text) in enumerate(zip(asked, found, strict=True)):
        ids = torch.tensor(tokenizer.encode(ask, add_special_tokens=False))
        made = greedy(lambda ids, row=row: score(ids, row), ids, 5, tokenizer.eos_token_id)
        assert text.split() == tokenizer.decode(made[len(ids) :], skip_special_tokens=True).split()

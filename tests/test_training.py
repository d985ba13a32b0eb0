"""The training loop: order, schedule, loss, precision, and the same bytes after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import get_scheduler

from ballast.cell import _generator
from ballast.checkpoint import read_checkpoint
from ballast.errors import DataError, Diverged
from ballast.files import sha256_file
from ballast.tensorfile import read_tensors, tensors_digest, write_tensors
from ballast.training import (
    GROUPING,
    IGNORED,
    Examples,
    Trainer,
    batch_order,
    derived_seed,
    rate_factor,
    response_loss,
)
from tiny import tuner_of
from tiny_models import BUILDERS, IMAGE_TOKEN, randomise

SETTINGS = {
    "steps": 10,
    "batch_size": 4,
    "accumulation": 1,
    "schedule": "cosine",
    "warmup": 0.2,
    "weight_decay": 0.0,
    "clip": 1.0,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "checkpoint_every": 4,
}
DOUBLE = torch.float64


def examples_of(kind: str = "llama", count: int = 22, even: bool = False) -> Examples:
    """Random examples of 6 to 16 tokens, or all of 12; the response begins after the fifth."""
    random = np.random.default_rng(5)
    ids = [random.integers(1, IMAGE_TOKEN, 12 if even else size) for size in range(6, 17)]
    ids = [ids[i % len(ids)].copy() for i in range(count)]
    if kind == "llama":
        return Examples(ids, [5] * count, 0)
    for tokens in ids:
        tokens[:4] = IMAGE_TOKEN
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    return Examples(ids, [5] * count, 0, [i % 3 for i in range(count)], pixels)


def trainer_of(
    method: str,
    model: torch.nn.Module,
    examples: Examples,
    seed: int = 3,
    checkpoint: Path | None = None,
    report=None,
    hyper: dict | None = None,
    connector: str = "frozen",
    **settings,
) -> Trainer:
    settings = SETTINGS | settings
    tuner = tuner_of(
        method, model, [], seed=seed, steps=settings["steps"], settings=hyper, connector=connector
    )
    return Trainer(tuner, examples, settings, seed, checkpoint, report)


# --- order -------------------------------------------------------------------------------------


def test_order_is_a_function_of_the_seed_alone(make_model):
    first, again, other = (
        trainer_of(method, make_model("llama"), examples_of(), seed=seed).order
        for method, seed in (("lora", 1), ("full_st", 1), ("lora", 2))
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_longer_run_starts_with_the_same_batches():
    short, long = (batch_order(list(range(50)), 4, count, 0) for count in (7, 40))
    assert all(np.array_equal(a, b) for a, b in zip(short, long, strict=False))


def test_every_epoch_covers_every_example_once():
    lengths = list(np.random.default_rng(0).integers(5, 60, 96))
    epochs = np.array(batch_order(lengths, 8, 3 * 12, seed=4)).reshape(3, 96)
    assert all(sorted(epoch) == list(range(96)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_short_batch_is_left_out_and_its_examples_come_in_other_epochs():
    order = batch_order([5] * 30, 8, 3 * 20, seed=4)
    assert {len(rows) for rows in order} == {8}
    for start in range(0, 60, 3):
        assert len(set(np.concatenate(order[start : start + 3]))) == 24
    assert set(np.concatenate(order)) == set(range(30))


def test_fewer_examples_than_a_batch_are_one_batch():
    assert [sorted(rows) for rows in batch_order([5, 9, 7], 8, 2, 0)] == [[0, 1, 2]] * 2


def test_grouping_by_length_pads_less_than_chance_and_does_not_sort():
    lengths = np.random.default_rng(1).integers(5, 200, 16 * GROUPING * 2)

    def padding(order):
        return sum(len(rows) * lengths[rows].max() - lengths[rows].sum() for rows in order)

    grouped = batch_order(list(lengths), 16, 2 * GROUPING, 0)
    shuffled = np.random.default_rng(2).permutation(len(lengths)).reshape(-1, 16)
    assert padding(grouped) < 0.1 * padding(shuffled)
    means = [lengths[rows].mean() for rows in grouped]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


def test_a_batch_is_right_padded_and_labels_only_responses():
    examples = Examples([np.array([7, 8, 9]), np.array([4, 5, 6, 7, 8])], [2, 1], pad=0)
    batch = examples.batch(np.array([0, 1]), torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[7, 8, 9, 0, 0], [4, 5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    none = IGNORED
    assert batch["labels"].tolist() == [[none, none, 9, none, none], [none, 5, 6, 7, 8]]


# --- schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 9])
def test_rates_are_those_of_transformers(schedule, warmup):
    """In the warm-up one step ahead, since a first step at rate zero would do nothing."""
    total = 60
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimiser, warmup, total).lr_lambdas[0]
    for step in range(total):
        expected = theirs(step + 1) if step < warmup else theirs(step)
        assert rate_factor(schedule, warmup, total, step) == pytest.approx(expected, abs=1e-12)


def test_the_optimiser_gets_the_scheduled_rates_of_each_group(make_model):
    seen = []

    def watch(step, total, loss):
        seen.append([group["lr"] for group in trainer.optimiser.param_groups])

    trainer = trainer_of("lora_plus", make_model("llama"), examples_of(), report=watch)
    trainer.run()
    factors = np.array([rate_factor("cosine", 2, 10, step) for step in range(10)])
    assert np.allclose(seen, np.stack([1e-2 * factors, 16e-2 * factors], axis=1))


# --- loss and step -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_response_loss_and_its_gradients_are_those_of_transformers(kind, make_model):
    model, examples = make_model(kind, DOUBLE), examples_of(kind)
    batch = examples.batch(np.arange(7), torch.device("cpu"))
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(DOUBLE)
    weights = list(model.get_decoder().layers.parameters())
    ours, theirs = response_loss(model, batch), model(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs is computed in fp32
    for a, b in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_response_loss_ignores_prompt_and_padding(make_model):
    model, examples = make_model("llama", DOUBLE), examples_of()
    alone = [
        response_loss(model, examples.batch(np.array([row]), torch.device("cpu"))).item()
        for row in (0, 3)
    ]
    together = response_loss(model, examples.batch(np.array([0, 3]), torch.device("cpu"))).item()
    tokens = [len(examples.input_ids[row]) - 5 for row in (0, 3)]
    assert together == pytest.approx(np.average(alone, weights=tokens), rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "l2_sp"])
def test_accumulating_two_batches_is_one_of_twice_the_size(method, make_model):
    runs = []
    for size, count in ((8, 1), (4, 2)):
        examples = examples_of(count=80, even=True)
        trainer = trainer_of(
            method, make_model("llama", DOUBLE), examples, batch_size=size, accumulation=count
        )
        whole = batch_order([12] * 80, 8, 10, 3)
        trainer.order = [rows[i : i + size] for rows in whole for i in range(0, 8, size)]
        outcome = trainer.run()
        runs.append((outcome, trainer.tuner.tensors()))
    (one, large), (two, small) = runs
    assert np.allclose(one.losses, two.losses, rtol=1e-10)
    assert one.tokens == two.tokens == 10 * 8 * 12
    for name in large:
        torch.testing.assert_close(large[name], small[name], rtol=1e-8, atol=1e-10)


def gradients_at_the_step(model, **settings) -> torch.Tensor:
    """All gradients as the optimiser finds them at the first step, as one vector."""
    trainer = trainer_of("full_st", model, examples_of(), steps=1, **settings)
    trainer.prepare()
    found = []
    trainer.optimiser.step = lambda: found.extend(
        p.grad.flatten().clone() for g in trainer.optimiser.param_groups for p in g["params"]
    )
    trainer.run()
    return torch.cat(found)


def test_clipping_shortens_the_gradient_of_all_parameters_together(make_model):
    free = gradients_at_the_step(make_model("llama"), clip=0.0)
    norm = torch.linalg.vector_norm(free)
    clipped = gradients_at_the_step(make_model("llama"), clip=float(norm) / 5)
    torch.testing.assert_close(clipped, free / 5, rtol=1e-3, atol=1e-8)
    wide = gradients_at_the_step(make_model("llama"), clip=float(norm) * 5)
    torch.testing.assert_close(wide, free)


def test_weight_decay_shrinks_what_it_should_and_nothing_else(make_model):
    """With zero gradients AdamW multiplies by 1 - rate x decay, where the group decays."""
    model = make_model("llama")
    trainer = trainer_of("dora", model, examples_of(), weight_decay=0.1)
    trainer.prepare()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in trainer.optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimiser.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 1e-2 * 0.1 if name.endswith((".A", ".B")) else 1.0
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-6, atol=0), name
    assert any(name.endswith(".mag") for name in before)


@pytest.mark.parametrize(
    ("method", "hyper"), [("lora", {"dropout": 0.1}), ("full_st", {}), ("lorasculpt", {})]
)
def test_gradient_checkpointing_trains_the_same(method, hyper, make_model):
    results, calls = [], []
    for checkpointing in (False, True):
        model = make_model("llama")
        count = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, c=count: c.append(1))
        trainer = trainer_of(
            method, model, examples_of(), hyper=hyper, gradient_checkpointing=checkpointing
        )
        losses = trainer.run().losses
        results.append((losses, tensors_digest(trainer.tuner.tensors())))
        calls.append(len(count))
    assert results[0] == results[1]
    assert calls == [10, 20]  # each layer runs again in the backward pass


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "full_st"])
def test_bf16_keeps_what_trains_in_fp32_and_merges_back(method, make_model):
    model = make_model("llama", torch.bfloat16)
    trainer = trainer_of(method, model, examples_of(), precision="bf16")
    losses = trainer.run().losses
    trainable = trainer.tuner.ctx.trainable()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    frozen = {p.dtype for n, p in model.named_parameters() if n not in trainable}
    assert frozen == {torch.bfloat16}
    moments = {v.dtype for s in trainer.optimiser.state.values() for v in s.values()}
    assert moments == {torch.float32}
    exact = trainer_of(method, make_model("llama"), examples_of()).run().losses
    assert np.allclose(losses, exact, rtol=0.03)
    assert losses != exact
    trainer.tuner.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bf16_steps_too_small_for_bf16_add_up(make_model):
    """1e-5 on a weight of 0.1 is lost in bf16, whose neighbours there are 5e-4 apart."""
    model = make_model("llama", torch.bfloat16)
    trainer = trainer_of("full_st", model, examples_of(), precision="bf16", steps=5)
    trainer.tuner.ctx.learning_rate = 1e-5
    before = {n: p.detach().float() for n, p in model.named_parameters()}
    trainer.run()
    for name, parameter in trainer.tuner.ctx.trainable().items():
        assert (parameter != before[name]).float().mean() > 0.9, name


# --- divergence --------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_names_its_step(make_model):
    trainer = trainer_of("lora", make_model("llama"), examples_of())
    trainer.prepare()
    weight = next(iter(trainer.tuner.ctx.trainable().values()))

    def poison(step, total, loss):
        if step == 3:
            weight.data[0, 0] = float("nan")

    trainer.report = poison
    with pytest.raises(Diverged, match=r"step 4: loss nan"):
        trainer.run()
    assert len(trainer.outcome.losses) == 3


def test_an_infinite_gradient_diverges_and_is_not_applied(make_model):
    trainer = trainer_of("full_st", make_model("llama"), examples_of())
    trainer.prepare()
    name, weight = next(iter(trainer.tuner.ctx.trainable().items()))
    before = weight.detach().clone()
    weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(Diverged, match=r"step 1: loss \d.*gradient norm (inf|nan)"):
        trainer.run()
    assert torch.equal(weight, before), name


def test_an_absurd_rate_diverges(make_model):
    trainer = trainer_of("full_st", make_model("llama"), examples_of(), warmup=0.0)
    trainer.tuner.ctx.learning_rate = 1e30
    with pytest.raises(Diverged, match="step 2"):
        trainer.run()


# --- seeds -------------------------------------------------------------------------------------


def test_a_seed_gives_unlike_seeds_for_unlike_purposes():
    made = {
        derived_seed(seed, use) for seed in range(50) for use in ("order", "adapter", "dropout")
    }
    assert len(made) == 150
    assert all(0 <= seed < 2**63 for seed in made)
    assert derived_seed(7, "order") == derived_seed(7, "order")


def run_with(make_model, trainer_seed, generator_seed, order_seed, dropout):
    trainer = trainer_of(
        "lora", make_model("llama"), examples_of(), seed=trainer_seed, hyper={"dropout": dropout}
    )
    trainer.tuner.ctx.generator = _generator(generator_seed)
    trainer.order = batch_order([len(i) for i in trainer.examples.input_ids], 4, 10, order_seed)
    return trainer.run().losses


def test_the_seed_reaches_dropout_adapter_and_order_separately(make_model):
    dropped = run_with(make_model, 0, 0, 0, 0.1)
    assert run_with(make_model, 0, 0, 0, 0.1) == dropped
    assert run_with(make_model, 1, 0, 0, 0.1) != dropped
    plain = run_with(make_model, 0, 0, 0, 0.0)
    # Without dropout nothing but order and adapter draws from the seed.
    assert run_with(make_model, 1, 0, 0, 0.0) == plain
    assert run_with(make_model, 0, 1, 0, 0.0)[1:] != plain[1:]
    assert run_with(make_model, 0, 0, 1, 0.0) != plain


def test_dropout_draws_do_not_depend_on_the_method(make_model):
    """What a method draws for itself comes from a generator of its own."""
    states = []
    for method in ("lora", "dora", "fish", "full_st", "pissa", "olora"):
        trainer = trainer_of(method, make_model("llama"), examples_of())
        trainer.prepare()
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


# --- kill and resume ---------------------------------------------------------------------------

KILLED = {
    "lora": {"hyper": {"dropout": 0.1}},
    "dora": {"hyper": {"dropout": 0.1}},
    "lorasculpt": {},
    "fish": {},
    "full_st": {},
    "lora_plus": {"hyper": {"dropout": 0.1}},
    "l2_sp": {"kind": "llava", "connector": "tuned"},
}
STEPS, SAVED, HELD = 10, 4, 6  # checkpoints after 4 and 8; the process is killed after step 6


def train_here(method: str, folder: Path, hold: bool, options: dict) -> tuple[str, str, dict]:
    """Train in `folder`, or hold still midway; returns digest, file hash and what was measured."""
    torch.set_num_threads(1)
    options = dict(options)
    kind = options.pop("kind", "llama")
    torch.manual_seed(0)  # the vision tower's biases start at random

    def report(step, total, loss):
        if hold and step == HELD:
            (folder / "held").touch()
            time.sleep(600)

    trainer = trainer_of(
        method,
        randomise(BUILDERS[kind]()),
        examples_of(kind),
        checkpoint=folder / "checkpoint.safetensors",
        report=report,
        steps=STEPS,
        checkpoint_every=SAVED,
        weight_decay=0.01,
        accumulation=2,
        **options,
    )
    outcome = trainer.run()
    tensors = trainer.tuner.tensors()
    save_file(tensors, folder / "result.safetensors")
    measured = {
        "losses": outcome.losses,
        "tokens": outcome.tokens,
        "steps": len(outcome.step_seconds),
        "resumed_from": outcome.resumed_from,
    }
    return tensors_digest(tensors), sha256_file(folder / "result.safetensors"), measured


def _child(pipe, method, folder, hold, options):
    pipe.send(train_here(method, folder, hold, options))


@pytest.fixture(scope="module")
def processes():
    """Real processes, each its own; torch is imported once, in the server that they start from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(processes):
    """start(method, folder, hold, options) -> (process, its end of a pipe)."""
    started = []

    def begin(method, folder, hold, options):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=_child, args=(theirs, method, folder, hold, options))
        process.start()
        theirs.close()
        started.append(process)
        return process, ours

    yield begin
    for process in started:
        process.kill()
        process.join()


def kill_when_held(process, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "held").exists():
        assert process.is_alive(), "the process ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("method", KILLED)
def test_killed_and_resumed_gives_the_same_bytes(method, tmp_path, start):
    options = KILLED[method]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    digest, file_hash, measured = train_here(method, whole, False, options)
    process, _ = start(method, broken, True, options)
    kill_when_held(process, broken)
    assert not (broken / "result.safetensors").exists()
    stored = read_checkpoint(broken / "checkpoint.safetensors")
    assert stored is not None
    assert stored.step == SAVED
    process, pipe = start(method, broken, False, options)
    assert pipe.poll(120), "the resumed process sent nothing"
    found_digest, found_hash, found = pipe.recv()
    assert (found_digest, found_hash) == (digest, file_hash)
    assert found.pop("resumed_from") == SAVED
    assert measured.pop("resumed_from") == 0
    # Losses, tokens and steps of the whole run, not of its last piece.
    assert found == measured
    assert len(found["losses"]) == found["steps"] == STEPS


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """(digest of an uninterrupted run, bytes of its last checkpoint)."""
    folder = tmp_path_factory.mktemp("checkpointed")
    digest, _, _ = train_here("lora", folder, False, KILLED["lora"])
    return digest, (folder / "checkpoint.safetensors").read_bytes()


def _flip(raw: bytes, place: int, bit: int = 0) -> bytes:
    return raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped weight", "flipped step"])
def test_a_damaged_checkpoint_is_set_aside_and_training_starts_over(damage, checkpointed, tmp_path):
    digest, raw = checkpointed
    broken = {
        "truncated": raw[: len(raw) * 2 // 3],
        "empty": b"",
        "flipped weight": _flip(raw, len(raw) - 100),
        # The text of the step number: "8" becomes "9".
        "flipped step": _flip(raw, raw.index(b'\\"step\\": 8') + len(b'\\"step\\": ')),
    }[damage]
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(broken)
    found, _, measured = train_here("lora", tmp_path, False, KILLED["lora"])
    assert found == digest
    assert measured["resumed_from"] == 0
    assert path.with_name("checkpoint.safetensors.damaged").read_bytes() == broken


def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(checkpointed, tmp_path):
    _, raw = checkpointed
    header = 8 + int.from_bytes(raw[:8], "little")
    random = np.random.default_rng(0)
    places = [*range(8), *random.integers(8, header, 150), *random.integers(header, len(raw), 40)]
    path = tmp_path / "checkpoint.safetensors"
    for place in map(int, places):
        path.write_bytes(_flip(raw, place, bit=int(random.integers(8))))
        assert read_checkpoint(path) is None, f"byte {place}: {raw[place - 20 : place + 20]!r}"
    for length in random.integers(0, len(raw), 20):
        path.write_bytes(raw[:length])
        assert read_checkpoint(path) is None
    path.write_bytes(raw)
    assert read_checkpoint(path) is not None


def test_a_checkpoint_is_replaced_whole_or_not_at_all(make_model, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    trainer = trainer_of("lora", make_model("llama"), examples_of(), checkpoint=path)
    trainer.prepare()
    trainer._save()
    kept = path.read_bytes()

    def full_disk(tensors, target, metadata):
        Path(target).write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr("ballast.tensorfile.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        trainer._save()
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_tensors_of_another_record_are_refused(tmp_path):
    digest = write_tensors(tmp_path / "a", {"x": torch.ones(2)}, {"step": 1})
    tensors, about = read_tensors(tmp_path / "a", digest)
    assert torch.equal(tensors["x"], torch.ones(2))
    assert about == {"step": 1}
    with pytest.raises(DataError, match="checksum"):
        read_tensors(tmp_path / "a", "0" * 64)


def test_the_digest_sees_names_types_shapes_and_bytes():
    base = {"x": torch.zeros(4)}
    others = [
        {"y": torch.zeros(4)},
        {"x": torch.zeros(2, 2)},
        {"x": torch.zeros(4, dtype=torch.int32)},
        {"x": torch.tensor([0.0, 0.0, 0.0, -0.0])},
    ]
    assert len({tensors_digest(t) for t in [base, *others]}) == 5
    scalars = {"b": torch.tensor(1), "a": torch.zeros(0)}
    assert tensors_digest(scalars) == tensors_digest(dict(reversed(scalars.items())))

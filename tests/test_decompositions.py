"""Decompositions that many cells want at once: computed once, and nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from ballast import decompositions
from ballast.decompositions import Decompositions
from ballast.locks import held

WEIGHT = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Small matrices are treated as large ones are."""
    monkeypatch.setattr(decompositions, "SHARED", 1.0)
    monkeypatch.setattr(decompositions, "_told", set())


@pytest.fixture
def slow(monkeypatch) -> list[float]:
    """Decompositions that take a while; when each began."""
    begun, plain = [], torch.linalg.svd

    def svd(*arguments, **options):
        begun.append(time.monotonic())
        time.sleep(0.5)
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    return begun


def together(work, count: int) -> list:
    found = []
    threads = [threading.Thread(target=lambda: found.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


def product(parts) -> torch.Tensor:
    u, s, vh = parts
    return u * s @ vh


def test_cells_that_start_together_compute_it_once_and_say_once_that_they_wait(
    tmp_path, slow, capsys
):
    found = together(lambda: Decompositions(tmp_path).svd(WEIGHT), 5)
    assert len(slow) == 1
    assert len(found) == 5
    for parts in found:
        assert torch.allclose(product(parts), WEIGHT, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(parts, found[0], strict=True))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"decompositions of {tmp_path.name}: waiting" in said[0]
    (path,) = tmp_path.iterdir()  # no lock stays
    assert path.suffix == ".safetensors"


def test_different_weights_do_not_wait_for_one_another(tmp_path, slow):
    weights = [WEIGHT, WEIGHT + 1]
    together(lambda: Decompositions(tmp_path).svd(weights.pop()), 2)
    assert len(slow) == 2
    assert abs(slow[0] - slow[1]) < 0.4


def test_small_ones_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(decompositions, "held", None)
    parts = Decompositions(tmp_path).svd(WEIGHT)
    assert torch.allclose(product(parts), WEIGHT, atol=1e-5)


def lock_of(folder):
    """The lock's name for WEIGHT, from the name of its file."""
    Decompositions(folder).svd(WEIGHT)
    (path,) = folder.iterdir()
    path.unlink()
    return f".{path.stem}.lock"


def test_a_process_that_is_stopped_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decompositions, "PATIENCE", 0.5)
    with held(tmp_path, "stopped", name=lock_of(tmp_path)):
        started = time.monotonic()
        assert torch.allclose(product(Decompositions(tmp_path).svd(WEIGHT)), WEIGHT, atol=1e-5)
        assert 0.4 < time.monotonic() - started < 10
    assert f"process {os.getpid()}" in capsys.readouterr().err


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    name = lock_of(tmp_path)
    code = f"""
        from pathlib import Path
        from ballast.locks import held
        with held(Path({str(tmp_path)!r}), "killed", name={name!r}):
            print("holds", flush=True)
            input()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=-1, stdout=-1, text=True
    )
    assert child.stdout.readline() == "holds\n"
    child.kill()
    child.wait()
    started = time.monotonic()
    Decompositions(tmp_path).svd(WEIGHT)
    assert time.monotonic() - started < 10
    assert not (tmp_path / name).exists()


def test_after_a_failure_the_next_one_computes_it(tmp_path, monkeypatch):
    plain = torch.linalg.svd

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        Decompositions(tmp_path).svd(WEIGHT)
    monkeypatch.setattr(torch.linalg, "svd", plain)
    assert torch.allclose(product(Decompositions(tmp_path).svd(WEIGHT)), WEIGHT, atol=1e-5)

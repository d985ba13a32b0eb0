"""A small checkout in a temporary folder: the repository's own workflow with a tiny base and tasks.

The base has random weights and micro-lm's tokenizer; it is saved as a transformers folder, as a
user's own base would be. Tasks read JSON lines written here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SUITE: dict[str, Any] = {
    "suite": "tiny",
    "title": "A tiny suite",
    "seeds": [0],
    "bases": {
        "tiny": {
            "source": {"path": "BASE"},
            "upstream": ["tiny_keep"],
            "targets": ["tiny_learn"],
        }
    },
    "methods": {"full_st": {}, "lora": {}, "wise_ft": {}},
    "ranks": [2],
    "training": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "weight_decay": 0.01},
    "evaluation": {"upstream": 12, "downstream": 12, "validation": 6, "batch_size": 32},
    "tuning": {"factors": [0.5, 1.0], "start": {"full_st": 1e-3, "lora": 1e-3}},
    "limits": {"minutes": 3, "memory_mb": 3000},
}


class Checkout:
    """A folder like the repository, and what tests do in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
        for name in ("workflow", "methods", "profiles", "envs"):
            shutil.copytree(REPOSITORY / name, root / name, ignore=ignore)
        shutil.copy(REPOSITORY / "Snakefile", root)
        (root / "config").mkdir()
        self.add_task("tiny_keep", "color", 0)
        self.add_task("tiny_learn", "food", 48)
        self.write_suite()

    def add_task(self, name: str, kind: str, train: int, test: int = 12) -> Path:
        """Write a task about the world's names, and its data; returns the YAML's path."""
        from ballast.worlds.text import NAMES, VALUES

        folder = self.root / "data"
        folder.mkdir(exist_ok=True)
        rows = [
            {
                "question": f"tell the {kind} of {who}",
                "choices": VALUES[kind],
                "answer": i % len(VALUES[kind]),
            }
            for i, who in enumerate(NAMES[: train + test])
        ]
        source = {"reader": "jsonl"}
        for split, part in (("test", rows[:test]), ("train", rows[test:])):
            path = folder / f"{name}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            source[split] = str(path)
        metadata = {
            "version": 1,
            "title": name.replace("_", " ").title(),
            "source": source,
            "metric": "accuracy",
            "unit": "points",
            "direction": "higher",
            "chance": 25,
        }
        path = self.root / "workflow/tasks/tiny" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"task": name, **TASK, "metadata": metadata}))
        return path

    def save_base(self) -> None:
        """The tiny base, as a transformers folder."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from ballast.bases.micro_lm import build_tokenizer

        tokenizer = build_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(self.root / "base")
        tokenizer.save_pretrained(self.root / "base")

    def write_suite(self, file: str = "config", **changes: Any) -> Path:
        """Write config/FILE.yaml: the tiny suite with other top-level values; None drops a key."""
        suite = {k: v for k, v in (SUITE | changes).items() if v is not None}
        path = self.root / "config" / f"{file}.yaml"
        text = yaml.safe_dump(suite, sort_keys=False)
        path.write_text(text.replace("BASE", str(self.root / "base")))
        return path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user whose library is this checkout's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("BALLAST", "PYTEST"))}
        own = {
            "PYTHONPATH": str(self.root / "workflow"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
        }
        return kept | own

    def run(self, *command: str, code: int | None = 0) -> str:
        """Run a command here; returns all that it printed. Fails on another exit code."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if code is not None:
            assert done.returncode == code, f"exit code {done.returncode}:\n{done.stdout}"
        return done.stdout

    def snakemake(self, *arguments: str, code: int | None = 0) -> str:
        """Run Snakemake on two cores."""
        return self.run("snakemake", "--cores", "2", *arguments, code=code)

    def records(self, suite: str = "tiny") -> dict[str, dict[str, Any]]:
        """Records by method; a suite here has one cell of each."""
        paths = (self.root / "results" / suite / "cells").glob("*/run.json")
        found = [json.loads(path.read_text()) for path in paths]
        return {record["identity"]["method"]: record for record in found}

    def times(self, name: str, suite: str = "tiny") -> dict[str, int]:
        """Modification times of a file of every cell, by method."""
        cells = self.root / "results" / suite / "cells"
        return {
            method: (cells / record["id"] / name).stat().st_mtime_ns
            for method, record in self.records(suite).items()
        }

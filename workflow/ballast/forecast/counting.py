"""Trainable parameters by the methods' own formulas, on a model without memory (meta device).

A process of its own, for it imports torch: `python -m ballast.forecast.counting REQUEST ANSWER`.
The request is JSON: `methods`, the folder of the method files, and a list `cells` of
{"config", "spec"}; the answer a list of counts, null where a method has no formula that fits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ballast.quiet  # noqa: F401  (first: the libraries read its settings when imported)
from ballast.files import read_json, write_json


def count_in_child(cells: Sequence[dict[str, Any]], methods: Path) -> list[int | None]:
    """Counts of {"config", "spec"}, by a process of its own; all None if it fails."""
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place) / "request.json", Path(place) / "answer.json"
        write_json(request, {"methods": str(methods), "cells": list(cells)})
        command = [sys.executable, "-m", __name__, str(request), str(answer)]
        done = subprocess.run(command, capture_output=True)
        return read_json(answer) if done.returncode == 0 else [None] * len(cells)


def meta_model(config: dict[str, Any]) -> Any:
    """The model of a config.json, without memory for its parameters."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
    )

    from ballast.models import is_encoder

    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    made.architectures = config.get("architectures")
    kinds = {"vision_config": AutoModelForImageTextToText}
    kind = next((v for k, v in kinds.items() if hasattr(made, k)), None)
    if kind is None:
        kind = AutoModelForMaskedLM if is_encoder(made) else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(made)


def count(config: dict[str, Any], spec: dict[str, Any], methods: Path, model: Any) -> int | None:
    """Trainable parameters of a cell on the untouched meta model of its base."""
    import torch

    from ballast.anatomy import anatomy_of, targets_of
    from ballast.budget import resolve, trained_parameters
    from ballast.context import Context
    from ballast.declare import read_method
    from ballast.decompositions import Decompositions
    from ballast.tuner import load_method

    method = load_method(methods / f"{spec['method']}.py")
    declaration = read_method(methods / f"{spec['method']}.py").declaration
    anatomy, hyper = anatomy_of(model), getattr(method, "Hyper", None)
    context = Context(
        model=model,
        anatomy=anatomy,
        hyper=hyper(**spec["hyper"]) if hyper else None,
        rank=spec["rank"],
        targets=targets_of(model, spec["modules"], spec["connector"]),
        generator=torch.Generator(),
        cache=Decompositions(),
        total_steps=spec["training"]["steps"],
        learning_rate=spec["learning_rate"],
        connector=spec["connector"],
        tasks=tuple(spec.get("mixture", [spec["target"]])),
    )
    beside = 0
    if spec["connector"] == "tuned" and anatomy.connector and spec["method"] != "connector_st":
        beside = sum(p.numel() for p in model.get_submodule(anatomy.connector).parameters())
    if "budget" in spec:
        found = resolve(spec["budget"], method, declaration, context)
        return int(found["resolved_parameters"]) + beside
    size = spec["rank"] if declaration.rank else None
    if declaration.size:
        size = getattr(context.hyper, declaration.size)
    return trained_parameters(method, context, size) + beside


def main(request: Path, answer: Path) -> None:
    """Count all cells of a request."""
    asked = read_json(request)
    models: dict[str, Any] = {}
    counts: list[int | None] = []
    for cell in asked["cells"]:
        key = json.dumps(cell["config"], sort_keys=True)
        try:
            if key not in models:
                models[key] = meta_model(cell["config"])
            counts.append(count(cell["config"], cell["spec"], Path(asked["methods"]), models[key]))
        except Exception:  # whatever a method's formula meets on a model that it cannot look into
            counts.append(None)
    write_json(answer, counts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

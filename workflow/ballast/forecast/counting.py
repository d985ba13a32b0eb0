"""What methods train, hold and store: their own formulas and a run on the base in miniature.

A process of its own, for it imports torch: `python -m ballast.forecast.counting REQUEST ANSWER`.
The request is JSON: `methods`, the folder of the method files, and a list `cells` of
{"config", "spec"}; the answer a list of {"trained", "footprint"}, null where it cannot be told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ballast.quiet  # noqa: F401  (first: the libraries read its settings when imported)
from ballast.files import read_json, write_json

Counted = dict[str, Any]
UNKNOWN: Counted = {"trained": None, "footprint": None}


def count_in_child(cells: Sequence[dict[str, Any]], methods: Path) -> list[Counted]:
    """Counts of {"config", "spec"}, by a process of its own; all unknown if it fails."""
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place) / "request.json", Path(place) / "answer.json"
        write_json(request, {"methods": str(methods), "cells": list(cells)})
        command = [sys.executable, "-m", __name__, str(request), str(answer)]
        # Miniatures are too small for several threads, or a GPU.
        alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, env=alone)
        return read_json(answer) if done.returncode == 0 else [UNKNOWN] * len(cells)


def count(spec: dict[str, Any], methods: Path, model: Any) -> tuple[int, dict[str, Any]]:
    """Trainable parameters of a cell on the untouched meta model of its base.

    And its spec with the rank, or size, that an equal budget is resolved to.
    """
    from ballast.budget import resolve, trained_parameters
    from ballast.declare import read_method
    from ballast.decompositions import Decompositions
    from ballast.forecast.footprint import context_on
    from ballast.tuner import load_method

    method = load_method(methods / f"{spec['method']}.py")
    declaration = read_method(methods / f"{spec['method']}.py").declaration
    context = context_on(model, method, spec, Decompositions())
    anatomy, beside = context.anatomy, 0
    if spec["connector"] == "tuned" and anatomy.connector and spec["method"] != "connector_st":
        beside = sum(p.numel() for p in model.get_submodule(anatomy.connector).parameters())
    if "budget" in spec:
        found = resolve(spec["budget"], method, declaration, context)
        resolved = {"rank": context.rank}
        resolved |= {"hyper": asdict(context.hyper)} if context.hyper else {}
        return int(found["resolved_parameters"]) + beside, spec | resolved
    size = spec["rank"] if declaration.rank else None
    if declaration.size:
        size = getattr(context.hyper, declaration.size)
    return trained_parameters(method, context, size) + beside, spec


def _counted(cell: dict[str, Any], methods: Path, models: dict[str, Any]) -> Counted:
    """Both counts of a cell; what a method meets on a base that it cannot have is not told here."""
    from ballast.forecast.footprint import footprint
    from ballast.forecast.miniature import model_of

    config, spec = cell["config"], cell["spec"]
    key, found = json.dumps(config, sort_keys=True), dict(UNKNOWN)
    try:
        if key not in models:
            models[key] = model_of(config, "meta")
        found["trained"], spec = count(spec, methods, models[key])
    except Exception:
        if "budget" in spec:
            return found
    try:
        found["footprint"] = asdict(footprint(config, spec, methods))
    except Exception:
        return found
    return found


def main(request: Path, answer: Path) -> None:
    """Count all cells of a request."""
    warnings.filterwarnings("ignore")
    asked, models = read_json(request), {}
    methods = Path(asked["methods"])
    write_json(answer, [_counted(cell, methods, models) for cell in asked["cells"]])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

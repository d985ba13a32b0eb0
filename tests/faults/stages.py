"""The stages of a run as functions for `warm`: each does what Snakemake's job does, in a folder.

Pretraining is cut to a few steps; everything else is as it is.
"""

from __future__ import annotations

from pathlib import Path

import ballast.quiet  # noqa: F401  (first: the libraries read its settings when imported)
from ballast import cell as cells
from ballast import planning
from ballast.bases import micro_lm, micro_vlm
from ballast.bases.build import make_base
from ballast.community import merge
from ballast.curves.curve_job import run_curve
from ballast.files import write_json
from ballast.keep import keep_suite
from ballast.layout import Layout
from ballast.plan import read_plan, row_of
from ballast.ready import make_ready, spec_of_base
from ballast.report import write_pages, write_tables_and_figures
from ballast.results import read_results
from ballast.tables.output import places_of
from ballast.tasks import read_tasks

SUITE = "faults"
HERE: list[Path] = []  # the checkout


def warm(root: Path) -> None:
    """Load what the stages load when they first run, but start no thread."""
    import torch
    from lm_eval import evaluator  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from ballast import comparison, evaluation, harness, training  # noqa: F401
    from ballast.drift import measured  # noqa: F401

    torch.set_num_threads(1)
    HERE.append(root)
    micro_lm.STEPS = 64
    micro_vlm.TOWER_STEPS = micro_vlm.STEPS = 60
    micro_vlm.TOWER_BATCH = micro_vlm.BATCH = 8


def _layout() -> Layout:
    return Layout(HERE[0], Path("results"))


def _plan() -> Path:
    (path,) = [p for p in Path(f"results/{SUITE}/plan").glob("*.parquet") if ".tune" not in p.name]
    return path


def plan(request: str) -> int:
    return planning.main([request, "--root", str(HERE[0]), "--results", "results"])


def base(name: str) -> None:
    layout, table = _layout(), read_plan(_plan())
    ready = make_ready(
        **spec_of_base(table, name), tasks=read_tasks(layout.tasks), layout=layout, report=print
    )
    write_json(layout.suite(SUITE) / "bases" / f"{name}.json", ready)


def download(repository: str, revision: str) -> None:
    source = {"hub": repository, "revision": revision}
    make_base({"source": source}, Path("results/shared/bases/hub-0"), print)


def cell(name: str) -> int:
    folder = _layout().cell(SUITE, name)
    (folder / "run.json").unlink(missing_ok=True)  # as Snakemake does before the job
    return cells.main([str(_plan()), name, "--root", str(HERE[0]), "--results", "results"])


def curve(name: str, kind: str) -> None:
    run_curve(row_of(_plan(), name), _layout(), kind)


def tables() -> None:
    results = read_results(_layout(), SUITE, read_plan(_plan()))
    write_tables_and_figures(results, places_of(results), None, complete=True)


def pages() -> None:
    results = read_results(_layout(), SUITE, read_plan(_plan()))
    write_pages(results, places_of(results), None, complete=True)


def keep() -> None:
    keep_suite(_layout().suite(SUITE), Path("results/kept") / SUITE)


def take_in() -> int:
    suite = _layout().suite(SUITE)
    return bool(merge(suite / "incoming", suite).refused)


STAGES = {f.__name__: f for f in (plan, base, download, cell, curve, tables, pages, keep, take_in)}

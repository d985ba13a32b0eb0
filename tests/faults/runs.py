"""A finished tiny suite of everything that a run leaves, and what a user does with it next.

Imported once by a fork server; a trial is a forked child that works in a copy. A rerun here does
what the rules do, in the order of their inputs, without Snakemake's own seconds. Figures are
left out: drawing takes seconds, and nothing reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import ballast.quiet  # noqa: F401
from ballast import cell, planning, report, status
from ballast.bases import build
from ballast.commands.compare import compare_all
from ballast.commands.show import describe
from ballast.community import merge, pack, read_community
from ballast.curves.curve_job import run_curve
from ballast.damage import set_aside_damaged
from ballast.errors import BallastError
from ballast.faults import check_writable, fault_of
from ballast.files import write_sealed, write_sums
from ballast.keep import keep_suite
from ballast.layout import Layout
from ballast.plan import read_plan
from ballast.rates import TABLE, read_rates
from ballast.ready import make_ready, spec_of_base
from ballast.records import read_path
from ballast.results import Results, kept_results, read_results
from ballast.tables.output import places_of
from ballast.tasks import read_tasks
from ballast.tune import write_rates, write_tuning

SUITE, CURVED = "tiny", "full_st"
LINKED = ("workflow", "methods", "config", "data", "base")
TIMES = ("seconds", "memory", "first_step", "step_ms", "provenance", "adapter_bytes")


def _download(source: dict[str, Any], folder: Path, _: Any) -> str:
    """A hub whose one repository is the tiny base."""
    assert source["hub"] == "tiny/base"
    for path in sorted((Path.cwd() / "base").iterdir()):
        shutil.copyfile(path, folder / path.name)
    return "1" * 40


def _in_process(command: list[str], **_: Any) -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess(command, planning.main(command[3:]), "", "")


def use_stand_ins() -> None:
    """For a trial's process alone: the tests that import this module need what is real."""
    build._download = _download
    status.subprocess = type("Here", (), {"run": staticmethod(_in_process)})
    report.write_figures = lambda places, folder: []


def layout() -> Layout:
    return Layout(Path.cwd(), Path("results"))


def rerun() -> dict[str, Any]:
    """What `snakemake`, `snakemake tune` and `snakemake rewind` do; lines, and what is known then.

    Of the targets `tune` and `rewind` only what there was of them before.
    """
    lines: list[str] = []
    failed: list[str] = []
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            results = _rerun(lines, failed)
    except Exception as error:  # as the scripts of the rules, and Snakemake's file of the plan, do
        text = str(error) if isinstance(error, BallastError) else fault_of(error, Path("results"))
        if text is None:
            raise
        return {"lines": [*lines, *errors.getvalue().splitlines(), text], "failed": ["fault"]}
    lines += [*errors.getvalue().splitlines(), *results.problems]
    return {"lines": lines, "failed": failed, "known": known(results)}


def _rerun(lines: list[str], failed: list[str]) -> Results:
    here = layout()
    config = yaml.safe_load(Path("config/config.yaml").read_text())
    path = status.make_plan_file(config, here.root, here.results, Path("config"))
    plan, tune = read_plan(path), read_plan(path.with_suffix(".tune.parquet"))
    tuned = (here.suite(SUITE) / "tune").is_dir()
    curved = (here.suite(SUITE) / "curves").is_dir()
    lines += set_aside_damaged(plan, tune, here, SUITE)
    remade = _bases(plan, here, lines, failed)
    for table, source in ((plan, path), (tune, path.with_suffix(".tune.parquet"))):
        if table is plan or tuned:
            remade |= _cells(table, source, here, remade, failed)
    if curved and not failed:
        _curves(plan, here, remade, lines)
    if tuned and not failed:
        _rates(tune, here, remade)
    results = read_results(here, SUITE, plan)
    for folder, write in (
        ("tables", report.write_tables_and_figures),
        ("leaderboard", report.write_pages),
    ):
        missing = not (here.suite(SUITE) / folder / ".complete").exists()
        if not failed and (missing or remade):
            write(results, places_of(results), None, complete=True)
    return results


def _bases(plan: pd.DataFrame, here: Layout, lines: list[str], failed: list[str]) -> set[str]:
    remade = set()
    for name in sorted(set(plan["base"])):
        path = here.suite(SUITE) / "bases" / f"{name}.json"
        if path.exists():
            continue
        try:
            spec = spec_of_base(plan, name)
            ready = make_ready(
                **spec, tasks=read_tasks(here.tasks), layout=here, report=lines.append
            )
            write_sealed(path, ready)
            remade.add(name)
        except Exception as error:
            text = str(error) if isinstance(error, BallastError) else fault_of(error)
            if text is None:
                raise
            lines.append(text)
            failed.append(name)
    return remade


def _cells(
    table: pd.DataFrame, source: Path, here: Layout, remade: set[str], failed: list[str]
) -> set[str]:
    """Run what has no record, or stands on what was made again; ids of the cells that ran."""
    ran: set[str] = set()
    for row in table.to_dict("records"):
        path = cell.cell_folder(row, here) / "run.json"
        needs = {row["base"], *row["parents"].split()}
        if needs & set(failed):
            failed.append(row["id"])
        elif not path.exists() or needs & (remade | ran):
            path.unlink(missing_ok=True)  # as Snakemake does
            arguments = [str(source), row["id"], "--root", str(here.root)]
            code = cell.main([*arguments, "--results", str(here.results)])
            (failed.append if code else ran.add)(row["id"])
    return ran


def _curves(plan: pd.DataFrame, here: Layout, remade: set[str], lines: list[str]) -> None:
    for row in plan[plan["method"] == CURVED].to_dict("records"):
        path = here.curve(SUITE, row["id"], "rewind")
        if row["id"] in remade:
            path.unlink(missing_ok=True)
        if not path.exists():
            run_curve(row, here, "rewind")


def _rates(tune: pd.DataFrame, here: Layout, remade: set[str]) -> None:
    table = here.suite(SUITE) / "tune" / TABLE
    if table.exists() and not set(tune["id"]) & remade:
        return
    records = [
        read_path(cell.cell_folder(row, here) / "run.json") for row in tune.to_dict("records")
    ]
    write_rates(records, table)
    write_tuning(read_rates(table), table.with_name("tuning.csv"))
    write_sums(table.parent, [table])


def known(results: Results) -> dict[str, str]:
    """Digests of all that a leaderboard is made from, times and sizes left out."""
    table = results.table.drop(columns=[c for c in results.table if c.startswith(TIMES)])
    parts = {"table": table, "items": results.items, "curves": results.curves}
    if results.rates is not None:
        parts["rates"] = results.rates
    return {name: _digest(frame) for name, frame in parts.items()}


def _digest(frame: pd.DataFrame) -> str:
    text = frame.to_csv(index=False, float_format="%.12g")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What a user may do before the next run.


def command(name: str) -> Any:
    """What a command shows; raises BallastError where it refuses."""
    here = layout()
    home = here.suite(SUITE)
    if name == "keep":
        keep_suite(home, Path("results/kept") / SUITE)
        return known(kept_results(Path("results/kept") / SUITE))["table"]
    if name == "kept":
        return known(kept_results(Path("results/kept") / SUITE))["table"]
    if name == "pack":
        return pack(home, Path("bundle.zip"), "lab")
    if name == "community":
        records, items = read_community(home)
        return [len(records), _digest(items.drop(columns="cell"))]
    results = read_results(here, SUITE, None)
    if name == "leaderboard":
        return {"known": known(results), "problems": results.problems}
    if name == "show":
        first = sorted(c for c in results.records if ":" not in c)[0]
        shown = describe(results, first, None, None, 3, None)
        return {"known": _text(shown), "problems": results.problems}
    assert name == "compare"
    found = compare_all(results, "full_st", "pissa-r2", None, None)
    return {"known": _text(found), "problems": results.problems}


def _text(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(_plain(value), sort_keys=True, default=str).encode()
    ).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not str(k).startswith((*TIMES, "costs"))}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


COMMANDS = ("none", "leaderboard", "keep", "kept", "pack", "community", "show", "compare")


def make(root: str) -> dict[str, Any]:
    """Make the finished suite in a checkout; returns what it looks like undisturbed."""
    os.chdir(root)
    for part in ("tune", "curves"):
        (layout().suite(SUITE) / part).mkdir(parents=True)
    first = rerun()
    assert not first["failed"], first["lines"]
    command("keep")
    command("pack")
    merge(Path("bundle.zip"), layout().suite(SUITE))
    again = rerun()
    assert not again["failed"] + again["lines"]
    return {"known": again["known"], **{c: command(c) for c in COMMANDS[1:]}}


# Trials.


def files_of(results: Path) -> list[str]:
    return sorted(p.relative_to(results).as_posix() for p in results.rglob("*") if p.is_file())


def damage(draw: random.Random, kind: str, path: Path, other: Path) -> None:
    """Damage a file; `other` is one of its kind, for two that change places."""
    content = path.read_bytes()
    if kind == "truncated":
        cut = 0 if draw.random() < 0.2 else draw.randrange(len(content) or 1)
        path.write_bytes(content[:cut])
    elif kind == "flipped" and content:
        flipped = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
    elif kind == "swapped":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "missing":
        path.unlink()


def trial(root: str, place: str, file: str, other: str, kind: str, action: str, seed: int) -> str:
    """Damage a file of a copy, do what a user does, run again; how it ended.

    healed: the same leaderboard as undisturbed; named: a line names the file. Raises AssertionError
    for anything else.
    """
    draw, folder = random.Random(seed), Path(place)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in LINKED:
        (folder / name).symlink_to(Path(root) / name)
    shutil.copytree(Path(root) / "results", folder / "results")
    undisturbed = json.loads((Path(root) / "undisturbed.json").read_text())
    os.chdir(folder)
    damage(draw, kind, Path("results") / file, Path("results") / other)
    said: list[str] = []
    if action != "none":
        try:
            shown = json.loads(json.dumps(command(action)))
            problems = shown.get("problems", []) if isinstance(shown, dict) else []
            said += problems
            # A cell whose record is gone is one that has not run: tables call it missing.
            unfinished = kind == "missing" and Path(file).name == "run.json"
            if not problems and not unfinished:
                assert shown == undisturbed[action], f"{action} is silently another"
        except BallastError as error:
            said.append(str(error))
        assert not any("\n" in line for line in said), f"{action}: more than a line: {said}"
        if said:
            assert _named(said, file, other), f"{action} does not name the file: {said}"
    last: dict[str, Any] = {}
    for _ in range(3):
        last = rerun()
        said += last["lines"]
        if not last["failed"] and not last["lines"]:
            break
    shutil.rmtree(folder, ignore_errors=True)
    assert not last["failed"], f"does not heal: {said}"
    if last["known"] == undisturbed["known"]:
        return "healed"
    assert _named(last["lines"], file, other), f"silently another: {said}"
    return "named"


def _named(lines: list[str], *files: str) -> bool:
    text = "\n".join(lines)
    cells = [Path(f).parent.name for f in files if "/cells/" in f]
    return any(Path(f).name in text or str(Path(f).parent) in text for f in files) or any(
        cell in text for cell in cells
    )


# Disks.


def _records(results: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in results.glob("tiny/**/run.json")}


def full_disk(root: str, disk: str, what: str, kilobytes: int) -> str:
    """Work in results on a disk that has room for so many kB more, then with enough of it.

    what: has still to be made: a cell, a base with its cells, the tables. Returns how it went on
    the full disk: finished, or told. Raises AssertionError for anything else.
    """
    folder = _on_disk(root, disk)
    undisturbed = json.loads((Path(root) / "undisturbed.json").read_text())
    _unmake(what)
    before = _records(folder / "results")
    filler = Path(disk) / "filler"
    free = shutil.disk_usage(disk).free - 1024 * kilobytes
    with filler.open("wb") as stream, contextlib.suppress(OSError):
        for _ in range(max(0, free) // 4096):
            stream.write(b"x" * 4096)
    first = rerun()
    after = _records(folder / "results")
    assert all(after.get(p) == c for p, c in before.items()) or what == "base", "a record is lost"
    said = "\n".join(first["lines"])
    failures = [json.loads(c)["failure"] for c in after.values()]
    assert failures == [None] * len(failures), f"a full disk is taken for a result: {failures}"
    assert "Traceback" not in said, said
    if first["failed"]:
        assert "the disk is full" in said, said
    filler.unlink()
    last = rerun()
    assert not last["failed"], last["lines"]
    assert last["known"] == undisturbed["known"], f"another leaderboard: {said}"
    return "told" if first["failed"] else "finished"


def read_only(root: str, disk: str, what: str) -> str:
    """Work in results that cannot be written to, then in results that can."""
    folder = _on_disk(root, disk)
    undisturbed = json.loads((Path(root) / "undisturbed.json").read_text())
    _unmake(what)
    before = _records(folder / "results")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        first = rerun()
        with pytest.raises(BallastError, match="the file system is read-only"):
            check_writable(layout().suite(SUITE))
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    said = "\n".join(first["lines"])
    assert first["failed"], said
    assert "read-only" in said or "cannot be written to" in said, said
    assert _records(folder / "results") == before
    last = rerun()
    assert not last["failed"], last["lines"]
    assert last["known"] == undisturbed["known"]
    return "told"


def _on_disk(root: str, disk: str) -> Path:
    folder = Path(disk) / "work"
    (Path(disk) / "filler").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in LINKED:
        (folder / name).symlink_to(Path(root) / name)
    shutil.copytree(Path(root) / "results", folder / "results")
    os.chdir(folder)
    return folder


def _unmake(what: str) -> None:
    home = layout().suite(SUITE)
    if what == "tables":
        (home / "tables/.complete").unlink()
        (home / "leaderboard/.complete").unlink()
    elif what == "cell":
        shutil.rmtree(next(home.glob("cells/own.*full_st*")))
    else:
        (home / "bases/hub.json").unlink()
        for shared in layout().shared.glob("*/hub-*"):
            shutil.rmtree(shared)

"""Writes the pins: every package that Ballast and its extras need, as it is installed here.

    python envs/pin.py            writes envs/constraints.txt and envs/ballast.yaml
    python envs/pin.py --check    says what differs from them, and exits with 1 if something does

Run it in an environment made by `pip install -e '.[test,slurm]'` in which all tests have passed.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ENVS = Path(__file__).resolve().parent
PROJECT = ENVS.parent / "pyproject.toml"
CONSTRAINTS, CONDA = ENVS / "constraints.txt", ENVS / "ballast.yaml"
EXTRAS = ("test", "slurm")

HEADER = """\
# What the tests ran with: all that Ballast and its extras need. Made by `python envs/pin.py`.
# pip install -c envs/constraints.txt -e .
"""
CONDA_HEADER = """\
# For `snakemake --sdm conda` and `conda env create -f envs/ballast.yaml`; the pins are those of
# constraints.txt. Made by `python envs/pin.py`. On Linux, torch is the build for CUDA; for the one
# for CPUs, set PIP_EXTRA_INDEX_URL to the address of PyTorch's CPU index first.
# The library itself comes from the checkout:
# PYTHONPATH=workflow snakemake --sdm conda --conda-not-block-search-path-envvars
name: ballast
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def requirements(extras: tuple[str, ...] = EXTRAS) -> list[Requirement]:
    """What pyproject.toml asks for, with those extras."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in extras for text in optional[extra])]
    return [Requirement(text) for text in texts]


def closure(extras: tuple[str, ...] = EXTRAS) -> dict[str, str]:
    """{package: version} of all that is needed and installed here, without builds (2.13.0+cpu).

    Raises PackageNotFoundError for one that is needed and is not installed.
    """
    found: dict[str, str] = {}
    due = [(one.name, frozenset(one.extras)) for one in requirements(extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while due:
        name, wanted = due.pop()
        if (canonicalize_name(name), wanted) in seen:
            continue
        seen.add((canonicalize_name(name), wanted))
        installed = distribution(name)
        found[canonicalize_name(name)] = Version(installed.version).public
        for text in installed.requires or []:
            one = Requirement(text)
            environments = [default_environment() | {"extra": extra} for extra in {"", *wanted}]
            if one.marker is None or any(map(one.marker.evaluate, environments)):
                due.append((one.name, frozenset(one.extras)))
    return dict(sorted(found.items()))


def pins() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    lines = CONSTRAINTS.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def differences(installed: dict[str, str]) -> list[str]:
    """A line for every package whose installed version is not the pinned one."""
    pinned = pins()
    return [
        f"{name}: installed {installed.get(name)}, pinned {pinned.get(name)}"
        for name in sorted(pinned | installed)
        if installed.get(name) != pinned.get(name)
    ]


def constraints_text(versions: dict[str, str]) -> str:
    """constraints.txt."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in versions.items())


def conda_text(versions: dict[str, str]) -> str:
    """ballast.yaml: what a run needs, without the tools of the tests.

    In full and not by `-c constraints.txt`: Snakemake copies the file to another folder.
    """
    runs = closure(("slurm",))
    lines = (f"      - {name}=={version}\n" for name, version in versions.items() if name in runs)
    return CONDA_HEADER + "".join(lines)


def main(arguments: list[str]) -> int:
    """Write the files, or compare with them."""
    try:
        versions = closure()
    except PackageNotFoundError as error:
        print(f"{error}: needed and not installed; pip install -e '.[test,slurm]'", file=sys.stderr)
        return 1
    if arguments == ["--check"]:
        print(*(found := differences(versions)), sep="\n")
        return bool(found)
    CONSTRAINTS.write_text(constraints_text(versions))
    CONDA.write_text(conda_text(versions))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

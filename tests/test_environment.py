"""One set of pins: what is installed here, pyproject.toml, pip, conda and containers agree."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from checkout import Checkout

ROOT = Path(__file__).resolve().parents[1]
ENVS = ROOT / "envs"


@pytest.fixture(scope="module")
def pin():
    spec = importlib.util.spec_from_file_location("pin", ENVS / "pin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pip_lines(path: Path) -> dict[str, str]:
    """{package: version} of a conda file's pip section; every line has to be an exact pin."""
    (lines,) = [one["pip"] for one in yaml.safe_load(path.read_text())["dependencies"][-1:]]
    return dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)


def test_what_is_installed_is_what_is_pinned(pin):
    """Fails where pip was told to install by the pins, as .ci/run does; says so elsewhere."""
    found = pin.differences(pin.closure())
    if found and "PIP_CONSTRAINT" not in os.environ:
        pytest.skip("installed without `-c envs/constraints.txt`: " + "; ".join(found))
    assert not found


def test_an_installed_version_that_differs_is_named(pin):
    assert pin.differences(pin.pins()) == []
    wrong = pin.pins() | {"torch": "1.0", "left-pad": "1"}
    del wrong["rich"]
    assert pin.differences(wrong) == [
        "left-pad: installed 1, pinned None",
        f"rich: installed None, pinned {pin.pins()['rich']}",
        f"torch: installed 1.0, pinned {pin.pins()['torch']}",
    ]


def test_every_requirement_of_the_project_has_a_pin_that_fits(pin):
    pins = pin.pins()
    asked = pin.requirements()
    assert {"torch", "pytest", "ruff", "snakefmt", "snakemake-executor-plugin-slurm"} <= {
        canonicalize_name(one.name) for one in asked
    }
    for one in asked:
        assert pins[canonicalize_name(one.name)] in one.specifier, one


def test_the_build_for_cuda_adds_to_the_pins_and_changes_none(pin):
    lines = (ENVS / "constraints-cuda.txt").read_text().splitlines()
    added = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"triton", "nvidia-cublas"} <= set(added)
    assert not set(added) & set(pin.pins())


def test_the_closure_follows_markers_and_extras(pin, monkeypatch):
    needs = {
        "a": ["b[x]>=1", "c ; extra == 'x'", "d ; sys_platform == 'nowhere'"],
        "b": ["c ; extra == 'x'", "e ; extra == 'y'", "a"],
        "C": [],
    }

    class Distribution:
        version = "2.0+cpu"

        def __init__(self, name: str) -> None:
            self.requires = needs[name if name in needs else name.upper()]

    monkeypatch.setattr(pin, "distribution", Distribution)
    monkeypatch.setattr(pin, "requirements", lambda extras: [Requirement("a")])
    assert pin.closure() == {"a": "2.0", "b": "2.0", "c": "2.0"}


def test_the_conda_file_has_the_pins_of_what_a_run_needs(pin):
    conda, pins = pip_lines(ENVS / "ballast.yaml"), pin.pins()
    assert conda == {name: pins[name] for name in conda}
    runs = {canonicalize_name(one.name) for one in pin.requirements(("slurm",))}
    assert runs <= set(conda)
    assert not {"pytest", "ruff", "playwright"} & set(conda)
    python = yaml.safe_load((ENVS / "ballast.yaml").read_text())["dependencies"][0]
    assert python == "python=3.11"


def test_every_rule_that_runs_python_names_the_conda_file():
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"^rule ", path.read_text(), flags=re.M)[1:]:
            if "script:" in rule:
                named = re.search(r'conda:\n\s+"([^"]+)"', rule)
                assert (path.parent / named[1]).resolve() == ENVS / "ballast.yaml"


def test_containers_install_by_the_pins_and_copy_what_there_is():
    install = (ENVS / "install.sh").read_text()
    constraints = re.search('PIP_CONSTRAINT="(.*)"', install)[1].replace("$1", str(ROOT)).split()
    assert constraints == [str(ENVS / "constraints.txt"), str(ENVS / "constraints-cuda.txt")]
    docker, apptainer = (ENVS / "Dockerfile").read_text(), (ENVS / "ballast.def").read_text()
    for recipe in (docker, apptainer):
        assert "/opt/ballast/envs/install.sh /opt/ballast" in recipe
        assert "debian:bookworm-slim" in recipe
        # No version of its own: there is one source of them.
        assert "==" not in recipe
    copied = {
        word
        for line in re.findall(r"^COPY (.*)$", docker, flags=re.M)
        for word in line.split()[:-1]
    }
    files = apptainer.partition("%files")[2].partition("%post")[0]
    assert copied == {line.split()[0] for line in files.strip().splitlines()}
    assert all((ROOT / name).exists() for name in copied)
    subprocess.run(["sh", "-n", ENVS / "install.sh"], check=True)


def test_no_address_of_a_registry_is_committed():
    for path in [*ENVS.iterdir(), ROOT / "pyproject.toml", ROOT / ".ci/run"]:
        if path.is_file():
            assert not re.search(r"https?://", path.read_text()), path


APPTAINER = """\
#!/bin/sh
# Notes what would run in which image, and runs it here; that the image has the pins is another
# matter.
[ "$1" = --version ] && echo apptainer version 1.3.4 && exit
echo "$@" >> asked
while [ "$1" != envs/ballast.sif ]; do shift; done
shift
exec "$@"
"""


def test_with_apptainer_jobs_run_in_the_image(tmp_path, monkeypatch):
    """A login node's Snakemake starts every job by the image's Python, in the checkout."""
    home = Checkout(tmp_path)
    home.save_base()
    tool = tmp_path / "bin" / "apptainer"
    tool.parent.mkdir()
    tool.write_text(APPTAINER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    base = "results/tiny/bases/tiny.json"
    home.snakemake(base, "--sdm", "apptainer", "--apptainer-args=--nv")
    assert (tmp_path / base).exists()
    asked = (tmp_path / "asked").read_text()
    assert re.search(r"exec --home \S+ --nv .*envs/ballast.sif \S*sh -c .*python", asked)

"""Reading method files: quick, without torch, and clear about what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import pytest

from ballast.declare import Declaration, discover, method_imports, read_method
from ballast.errors import MethodError
from ballast.tuner import load_method
from tiny import METHODS

GOOD = """
declaration = Declaration(
    title="Mine", citation="me", family="selective", merges=True, learning_rate=1e-3
)

@dataclass(frozen=True)
class Hyper:
    share: float = hyper(0.5, "mine", low=0.0, high=1.0)
    layers: int = hyper(2, "mine", low=1)
    mode: str = hyper("fast", "mine", choices=("fast", "slow"))
    exact: bool = hyper(True, "mine")
"""


@pytest.fixture
def write(tmp_path):
    """write("name", text) -> path of a method file in an empty folder."""

    def put(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        return path

    return put


def test_reading_every_declaration_imports_no_torch():
    code = (
        "import sys; from pathlib import Path; from ballast.declare import discover\n"
        f"found = discover(Path({str(METHODS)!r}))\n"
        "for file in found.values(): file.settings({})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)\n"
        "assert len(found) >= 15 and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", list(discover(METHODS)))
def test_every_method_declares_itself_fully(name):
    file = read_method(METHODS / f"{name}.py")
    assert file.declaration.title
    assert file.declaration.citation
    assert file.path.read_text().startswith('"""')
    for item in file.hyper.__dataclass_fields__.values():
        assert item.metadata["source"], f"{name}.{item.name} has no source"
    if file.declaration.trains:
        assert file.declaration.learning_rate_source
    else:
        assert file.declaration.parents
    module = load_method(file.path)
    assert module.__doc__
    assert isinstance(module.declaration, Declaration)
    # What is read without importing is what the imported module has.
    assert module.declaration == file.declaration
    if hasattr(module, "Hyper"):
        assert module.Hyper(**file.settings({})) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef broken(:\n", r"odd\.py, line 2: "),
        ("x = 1\n", r"odd\.py has no `declaration = Declaration\(\.\.\.\)`"),
        ("declaration = 3\n", r"odd\.py has no `declaration"),
        ("import torch\ndeclaration = torch.nn\n", r"odd\.py, line 2: NameError.*may use only"),
        (GOOD.replace("selective", "selektive"), r"odd\.py: family 'selektive'; allowed: selec"),
        (GOOD.replace("learning_rate=1e-3", "learning_rate=0"), "number above 0 is needed"),
        (GOOD.replace("merges=True", "parents=('a',), merges=True"), "post-hoc methods only"),
        (GOOD.replace("@dataclass(frozen=True)\n", ""), "`Hyper` is not a dataclass"),
        ("from .nowhere import attach\n" + GOOD, r"odd\.py imports \.nowhere: no file nowhere"),
        ("from .nowhere import Hyper\n" + GOOD, r"no method file nowhere\.py"),
    ],
)
def test_bad_files_say_what_is_wrong(write, text, message):
    path = write("odd", text)
    with pytest.raises(MethodError, match=message):
        read_method(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shape": 0.1}, "unknown hyper-parameter of good 'shape'; did you mean 'share'"),
        ({"share": "much"}, r"good\.share: 'much' is not a float"),
        ({"share": True}, r"good\.share: True is not a float"),
        ({"layers": 1.5}, r"good\.layers: 1\.5 is not a int"),
        ({"layers": 0}, r"good\.layers: 0 is below the least allowed, 1"),
        ({"share": 1.5}, r"good\.share: 1\.5 is above the most allowed, 1\.0"),
        ({"mode": "odd"}, r"good\.mode: 'odd'; allowed: 'fast', 'slow'"),
        ({"exact": 1}, r"good\.exact: 1 is not a bool"),
    ],
)
def test_bad_settings_say_what_is_allowed(write, overrides, message):
    file = read_method(write("good", GOOD))
    with pytest.raises(MethodError, match=message):
        file.settings(overrides)


def test_settings_are_defaults_with_overrides(write):
    file = read_method(write("good", GOOD))
    assert file.settings({"share": 1}) == {
        "share": 1,
        "layers": 2,
        "mode": "fast",
        "exact": True,
    }


def test_digest_follows_imports_and_nothing_else(tmp_path):
    for name in ("lora", "pissa", "milora", "dora", "dare"):
        shutil.copy(METHODS / f"{name}.py", tmp_path)
    before = {name: file.digest for name, file in discover(tmp_path).items()}
    assert [p.name for p in method_imports(tmp_path / "milora.py")] == [
        "lora.py",
        "milora.py",
        "pissa.py",
    ]

    def changed():
        after = {name: file.digest for name, file in discover(tmp_path).items()}
        return {name for name in before if before[name] != after[name]}

    (tmp_path / "pissa.py").write_text((tmp_path / "pissa.py").read_text() + "# a word\n")
    assert changed() == {"pissa", "milora"}
    (tmp_path / "lora.py").write_text((tmp_path / "lora.py").read_text() + "# a word\n")
    assert changed() == {"pissa", "milora", "lora", "dora"}
    (tmp_path / "_notes.py").write_text("not a method")
    assert "_notes" not in discover(tmp_path)


def test_hyper_of_another_file_is_read(write):
    write("good", GOOD)
    text = "from .good import Hyper as Base\n" + GOOD.split("@dataclass")[0]
    text += "@dataclass(frozen=True)\nclass Hyper(Base):\n    extra: int = hyper(1, 'mine')\n"
    file = read_method(write("better", text))
    assert file.settings({"extra": 2})["share"] == 0.5
    assert file.settings({"extra": 2})["extra"] == 2


def test_a_file_that_cannot_be_imported_is_still_listed(write):
    path = write("odd", "import a_package_that_does_not_exist\n" + GOOD)
    assert read_method(path).declaration.title == "Mine"
    with pytest.raises(MethodError, match=r"odd\.py: ModuleNotFoundError"):
        load_method(path)


def test_files_that_import_each_others_settings_are_refused(write):
    for name, other in (("one", "two"), ("two", "one")):
        path = write(name, f"from .{other} import Hyper\n" + GOOD)
    with pytest.raises(MethodError, match=r"each other's Hyper: two\.py -> one\.py -> two\.py"):
        read_method(path)

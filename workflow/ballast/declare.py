"""What a method file declares, and how that is read without importing torch.

A method file has, at its top level, `declaration = Declaration(...)` and `class Hyper`, a frozen
dataclass whose fields are made with `hyper(...)`. Reading executes those two statements and nothing
else of the file, so a plan of thousands of cells costs no import of torch, and a file whose
mathematics cannot be imported on this machine can still be listed.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ballast.contents import content_of
from ballast.errors import MethodError
from ballast.files import key_of, sha256_file

Family = Literal["selective", "additive", "reparameterization", "post-hoc"]
FAMILIES: tuple[str, ...] = ("selective", "additive", "reparameterization", "post-hoc")
KINDS: tuple[str, ...] = ("text", "vision-language", "encoder")


@dataclass(frozen=True)
class Declaration:
    """A method's declaration: what can be known about it before it runs.

    title, citation: as in the paper (`citation` names authors, year and arXiv id or venue).
    family: one of `FAMILIES`.
    rank: what the rank means, or None for a method that has none (and so no rank axis).
    merges: the tuned model can be written as a plain model of the base's own class.
    unchanged_at_start: before the first step the outputs equal the base's.
    random_start: the initialisation draws random numbers, so that the seed must reach it.
    learning_rate: the paper's; None for methods that do not train.
    learning_rate_source: where that rate stands.
    learning_rate_at: keys, joined by dots, under which the method's settings may hold a rate that
        takes the place of `learning_rate`.
    parents: selectors of the cells that a post-hoc method works on when the suite names none.
    several_targets: a post-hoc method that takes the parent's cells of all targets of the base.
    applies_to: kinds of base, of `KINDS`, where the method makes sense.
    alternates: other parameters train from step to step: some get no gradient in a step.
    size: for a method without a rank, the integer hyper-parameter that sets how much it trains.
    """

    title: str
    citation: str
    family: Family
    merges: bool
    unchanged_at_start: bool = True
    random_start: bool = False
    rank: str | None = None
    learning_rate: float | None = None
    learning_rate_source: str = ""
    learning_rate_at: str = ""
    parents: tuple[str, ...] = ()
    several_targets: bool = False
    applies_to: tuple[str, ...] = KINDS
    alternates: bool = False
    size: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise MethodError(f"family {self.family!r}; allowed: {', '.join(FAMILIES)}")
        if self.trains and not (self.learning_rate and self.learning_rate > 0):
            raise MethodError(f"learning_rate {self.learning_rate!r}; a number above 0 is needed")
        if self.trains and (self.parents or self.several_targets):
            raise MethodError("parents and several_targets are for post-hoc methods only")
        for kind in self.applies_to:
            if kind not in KINDS:
                raise MethodError(f"applies_to {kind!r}; allowed: {', '.join(KINDS)}")
        if self.rank and self.size:
            raise MethodError(f"size {self.size!r}: a method with a rank has its size by that")

    @property
    def trains(self) -> bool:
        """Whether the method trains, or only edits finished parents."""
        return self.family != "post-hoc"


def hyper(
    default: Any,
    source: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    files: tuple[str, ...] | None = None,
) -> Any:
    """Dataclass field of a hyper-parameter: the paper's default, its source, its allowed values.

    files: names of JSON files whose contents, by name, are the value; a suite may give the contents
    or a path (see `contents.content_of`).
    """
    known = {"source": source, "low": low, "high": high, "choices": choices, "files": files}
    if isinstance(default, dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=known)
    return field(default=default, metadata=known)


@dataclass(frozen=True)
class MethodFile:
    """A method as found on disk: name, declaration, hyper-parameters' dataclass, content hash.

    defines: names of the functions that the file has at its top level, imported ones included.
    """

    name: str
    path: Path
    declaration: Declaration
    hyper: type
    digest: str
    defines: frozenset[str] = frozenset()

    def settings(self, overrides: dict[str, Any], folders: Sequence[Path] = ()) -> dict[str, Any]:
        """Every hyper-parameter with its value after `overrides`, checked.

        folders: where relative paths of files may start.
        Raises MethodError that names the key, the value and what is allowed.
        """
        fields = {f.name: f for f in dataclasses.fields(self.hyper)}
        overrides = dict(overrides)
        for key, value in overrides.items():
            if key not in fields:
                from ballast.errors import unknown

                raise MethodError(unknown(f"hyper-parameter of {self.name}", key, fields))
            if files := fields[key].metadata.get("files"):
                overrides[key] = content_of(f"{self.name}.{key}", value, files, folders)
            else:
                _check(self.name, fields[key], value)
        try:
            return dataclasses.asdict(self.hyper(**overrides))
        except (ValueError, TypeError) as error:
            raise MethodError(f"{self.name}: {error}") from None

    def learning_rate(self, settings: dict[str, Any]) -> tuple[float | None, str]:
        """The rate of these settings where the suite names none, and where it comes from."""
        at = self.declaration.learning_rate_at
        found: Any = settings
        for key in at.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if at and found is not None:
            if not isinstance(found, int | float) or not found > 0:
                raise MethodError(f"{self.name}.{at}: {found!r}; a number above 0 is needed")
            return float(found), f"method's {at.split('.')[0]}"
        return self.declaration.learning_rate, "method's default"


def _check(method: str, item: dataclasses.Field, value: Any) -> None:
    """Refuse a value of the wrong kind or outside the declared bounds."""
    where, default = f"{method}.{item.name}", item.default
    kinds: tuple[type, ...] = (type(default),)
    if isinstance(default, float):
        kinds = (int, float)
    if default is not None and (
        not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)
    ):
        raise MethodError(f"{where}: {value!r} is not a {type(default).__name__}")
    choices, low, high = (item.metadata.get(k) for k in ("choices", "low", "high"))
    if choices is not None and value not in choices:
        raise MethodError(f"{where}: {value!r}; allowed: {', '.join(map(repr, choices))}")
    if value is not None and low is not None and value < low:
        raise MethodError(f"{where}: {value!r} is below the least allowed, {low}")
    if value is not None and high is not None and value > high:
        raise MethodError(f"{where}: {value!r} is above the most allowed, {high}")


def _imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Names bound by `from .other import name as alias`: alias -> (other, name)."""
    found: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            for item in node.names:
                found[item.asname or item.name] = (node.module, item.name)
    return found


def method_imports(path: Path) -> list[Path]:
    """The method file and every method file that it imports, directly or not, sorted."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        tree = _parse(current)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [item.name for item in node.names]
                for name in names:
                    other = current.parent / f"{name.split('.')[0]}.py"
                    if not other.is_file():
                        raise MethodError(f"{current.name} imports .{name}: no file {other.name}")
                    todo.append(other)
    return sorted(seen)


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except FileNotFoundError:
        raise MethodError(f"no method file {path.name}, which another one imports") from None
    except SyntaxError as error:
        raise MethodError(f"{path.name}, line {error.lineno}: {error.msg}") from None


def _read(path: Path, importers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Execute the `declaration` and `Hyper` statements of a method file."""
    if path in importers:
        circle = " -> ".join(p.name for p in (*importers, path))
        raise MethodError(f"method files import each other's Hyper: {circle}")
    tree = _parse(path)
    names: dict[str, Any] = {
        "Declaration": Declaration,
        "hyper": hyper,
        "dataclass": dataclass,
        "__name__": f"ballast_declaration_{path.stem}",
    }
    for alias, (module, name) in _imports(tree).items():
        if name in ("Hyper", "declaration"):
            other = path.parent / f"{module}.py"
            names[alias] = _read(other, (*importers, path)).get(name)
    for node in tree.body:
        is_hyper = isinstance(node, ast.ClassDef) and node.name == "Hyper"
        is_declaration = isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "declaration" for target in node.targets
        )
        if is_hyper or is_declaration:
            code = compile(ast.Module([node], []), str(path), "exec", dont_inherit=True)
            try:
                exec(code, names)  # the project's own method file, two statements of it
            except MethodError as error:
                raise MethodError(f"{path.name}: {error}") from None
            except Exception as error:
                raise MethodError(
                    f"{path.name}, line {node.lineno}: {type(error).__name__}: {error}; "
                    "`declaration` and `Hyper` may use only Declaration, hyper, dataclass and "
                    "the Hyper of another method file"
                ) from None
    return names


def read_method(path: Path) -> MethodFile:
    """Read one method file's declaration without importing it.

    Raises MethodError if it declares nothing or something that is not allowed.
    """
    names = _read(path)
    declaration = names.get("declaration")
    if not isinstance(declaration, Declaration):
        raise MethodError(f"{path.name} has no `declaration = Declaration(...)` at its top level")
    settings = names.get("Hyper")
    if settings is None:
        settings = dataclasses.make_dataclass("Hyper", [], frozen=True)
    if not dataclasses.is_dataclass(settings):
        raise MethodError(f"{path.name}: `Hyper` is not a dataclass")
    if declaration.size and declaration.size not in {f.name for f in dataclasses.fields(settings)}:
        raise MethodError(f"{path.name}: size {declaration.size!r} is no field of its Hyper")
    digest = key_of([[file.name, sha256_file(file)] for file in method_imports(path)])
    return MethodFile(path.stem, path, declaration, settings, digest, _functions(_parse(path)))


def _functions(tree: ast.Module) -> frozenset[str]:
    """Functions at the top level of a file, defined or imported from another method's."""
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return frozenset(own | set(_imports(tree)))


def discover(folder: Path) -> dict[str, MethodFile]:
    """Every method in a folder by name; files whose name starts with an underscore are none."""
    paths = sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))
    return {path.stem: read_method(path) for path in paths}

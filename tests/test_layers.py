"""Every module of abcli imports only lower layers or its own package; only chosen ones go native or exit."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Parts of the same layer know nothing of each other.
LAYERS: dict[str, int] = {
    "errors": 0,
    "config": 0,
    "atomic": 0,
    "text": 0,
    "strict_json": 0,
    "version": 0,
    "sampling": 1,
    "protocols": 1,
    "text_stream": 1,
    "lookup": 1,
    "turn": 1,
    # Drawn from plain data.
    "pages": 1,
    "merge": 2,
    "gguf": 2,
    "rope": 3,
    "hub": 3,
    "grammar": 2,
    "profiles": 4,
    "native": 4,
    "engine": 5,
    "thought_limit": 5,
    "generate": 6,
    "reuse": 7,
    "likelihood": 8,
    # Design has chat beside generate; a chat is built on the loop, so it stands above it.
    "chat": 8,
    "prepare": 7,
    "trace": 7,
    "llm": 9,
    "embedder": 9,
    "machine": 9,
    "tools": 9,
    "diagnosis": 10,
    "evals": 10,
    "batch": 10,
    "lm_eval_model": 10,
    "serve": 10,
    "bench": 10,
    # It chooses by the scores that evaluations make.
    "calibrate": 11,
    "tune": 11,
    "ui": 12,
    "cli": 13,
    # Doors for other programs.
    "llm_plugin": 14,
    "llama": 14,
}
PACKAGE = "abcli"
NATIVE_MODULES = {"llama_cpp", "ctypes", "_ctypes"}
NATIVE_PART = "native"
# A door that is a subclass of llama_cpp's own class; nothing of abcli imports it.
NATIVE_DOOR = "llama"
EXIT_PART = "cli"
# The entry of a child process: its exit status is its answer.
EXIT_MODULES = {"abcli.native.crash_probe"}
EXITS = {
    "sys.exit",
    "os._exit",
    "exit",
    "quit",
    "SystemExit",
    "typer.Exit",
    "typer.Abort",
    "click.exceptions.Exit",
    "click.Abort",
}
# What runs programs of others has their flags.
FOREIGN_FLAGS = {"abcli.hub.packaged"}
IMPORTERS = {"importlib.import_module", "__import__"}


@dataclass
class Module:
    """One parsed module of the tree."""

    name: str
    is_package: bool
    tree: ast.Module
    # What a local name stands for: `import sys as s` gives {"s": "sys"}.
    names: dict[str, str] = field(default_factory=dict)


def read_modules(root: Path) -> list[Module]:
    """All modules below `root`, the directory of the package."""
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, is_package, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return modules


def source_of(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of the module that `node` imports from."""
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*kept, *(node.module or "").split(".")]).rstrip(".")


def imports_of(module: Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, wherever in the module it stands; fills `names`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                module.names[local] = alias.name if alias.asname else local
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = source_of(module, node)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                module.names[alias.asname or alias.name] = full
                # `from abcli import native` names a module, `from abcli.config import home` does not.
                yield node.lineno, full if full in known else source
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and dotted(module, node.func) in IMPORTERS and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def dotted(module: Module, node: ast.expr) -> str:
    """The full name that an expression such as `s.exit` stands for, empty for anything else."""
    if isinstance(node, ast.Name):
        return module.names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(module, node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def part_of(name: str) -> str:
    """The part of abcli that a module belongs to: "engine" for abcli.engine.fused, empty for abcli itself."""
    return [*name.split("."), ""][1]


def import_problem(module: Module, target: str) -> str | None:
    """What is wrong with `module` importing `target`, if anything."""
    part = part_of(module.name)
    if target.partition(".")[0] in NATIVE_MODULES and part not in (NATIVE_PART, NATIVE_DOOR):
        return f"imports {target}, which only {PACKAGE}.{NATIVE_PART} may"
    if target.partition(".")[0] != PACKAGE or part_of(target) in ("", part):
        return None
    if part_of(target) not in LAYERS:
        return f"imports {target}, which is in no layer"
    # The package itself is the front door of the library: it hands on what others define.
    if part and LAYERS.get(part, -1) <= LAYERS[part_of(target)]:
        return f"imports {target}, which is not in a lower layer"
    return None


def is_main_guard(node: ast.AST) -> bool:
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "__name__ == '__main__'",
        "'__main__' == __name__",
    )


def exits_of(module: Module) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that ends the process, outside the main guard."""
    waiting: list[ast.AST] = [module.tree]
    while waiting:
        node = waiting.pop()
        name = ""
        if isinstance(node, ast.Call):
            name = dotted(module, node.func)
        elif isinstance(node, ast.Raise) and node.exc is not None and not isinstance(node.exc, ast.Call):
            name = dotted(module, node.exc)
        if name in EXITS:
            yield getattr(node, "lineno", 0), name
        waiting += node.orelse if is_main_guard(node) and isinstance(node, ast.If) else ast.iter_child_nodes(node)


def problems_of(modules: list[Module]) -> list[str]:
    """Everything in a tree that breaks a rule, as "module:line: what"."""
    known = {module.name for module in modules}
    problems = []
    for module in modules:
        part = part_of(module.name)
        if part and part not in LAYERS and part != "__main__":
            problems.append(f"{module.name}:1: is in no layer: add it to LAYERS")
        for line, target in imports_of(module, known):
            # `python -m abcli` is a way into the command line.
            problem = None if part == "__main__" else import_problem(module, target)
            if problem:
                problems.append(f"{module.name}:{line}: {problem}")
        if part != EXIT_PART and module.name not in EXIT_MODULES:
            problems += [
                f"{module.name}:{line}: uses {name}, which only {PACKAGE}.{EXIT_PART} may"
                for line, name in exits_of(module)
            ]
    # Two names from one module on one line are one problem.
    return list(dict.fromkeys(problems))


@pytest.fixture(scope="module")
def abcli() -> list[Module]:
    """All modules of abcli."""
    return read_modules(ROOT / PACKAGE)


def test_abcli_keeps_its_layers(abcli: list[Module]) -> None:
    assert problems_of(abcli) == []


def circles_of(modules: list[Module]) -> list[str]:
    """Modules that import themselves by way of others, imports for types only included."""
    known = {module.name for module in modules}
    targets = {module.name: {target for _line, target in imports_of(module, known)} & known for module in modules}
    left = {(name, target) for name, wanted in targets.items() for target in wanted if target != name}
    while True:
        # Nothing that nobody imports, or that imports nothing, is part of a circle.
        sources, ends = {name for name, _ in left}, {target for _, target in left}
        kept = {(name, target) for name, target in left if name in ends and target in sources}
        if kept == left:
            return sorted(sources)
        left = kept


def test_no_module_imports_itself_by_way_of_others(abcli: list[Module]) -> None:
    assert circles_of(abcli) == []


def test_a_circle_of_imports_is_found(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from abcli.rope import wave\n"
    write(tmp_path, {"rope/base.py": text, "rope/wave.py": "def f():\n    from abcli.rope import base\n"})
    assert circles_of(read_modules(tmp_path)) == ["abcli.rope.base", "abcli.rope.wave"]


@pytest.mark.parametrize("part", ["cli", "ui"])
def test_commands_know_neither_llama_cpp_nor_engines(abcli: list[Module], part: str) -> None:
    known = {module.name for module in abcli}
    found = [
        f"{module.name}:{line}: imports {target}"
        for module in abcli
        if part_of(module.name) == part
        for line, target in imports_of(module, known)
        if part_of(target) in ("native", "engine") and target.startswith(PACKAGE)
    ]
    assert found == []


def test_below_the_command_line_nobody_speaks_of_flags(abcli: list[Module]) -> None:
    """Errors name settings as in `top_k=40`; the terminal shows them as flags."""
    found = []
    for module in abcli:
        if part_of(module.name) in ("cli", "ui", "sampling") or module.name in FOREIGN_FLAGS:
            continue
        documentation = {id(node.body[0].value) for node in ast.walk(module.tree) if has_docstring(node)}  # type: ignore[attr-defined]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                # Commands of other programs stand between backquotes.
                text = re.sub(r"`[^`]*`", "", node.value)
                found += [
                    f"{module.name}:{node.lineno}: {flag}" for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
                ]
    assert found == []


def has_docstring(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    return (
        isinstance(body, list)
        and bool(body)
        and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
    )


def test_every_module_is_read(abcli: list[Module]) -> None:
    names = {module.name for module in abcli}
    assert {"abcli", "abcli.errors", "abcli.native", "abcli.cli"} <= names


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of modules under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


BAD_IMPORTS = {
    "a higher layer": ("rope/wave.py", "from abcli.engine import protocol\n"),
    "a higher layer, plainly": ("rope/wave.py", "import abcli.engine.protocol as p\n"),
    "a package by its name": ("rope/wave.py", "from abcli import engine\n"),
    "a relative import": ("rope/wave.py", "from ..engine import protocol\n"),
    "a relative import of a package": ("rope/wave.py", "from .. import engine\n"),
    "a relative import in a package": ("rope/__init__.py", "from ..engine import protocol\n"),
    "another part of the same layer": ("rope/wave.py", "import abcli.hub\n"),
    "inside a function": ("rope/wave.py", "def f():\n    from abcli.engine import protocol\n"),
    "for types only": (
        "rope/wave.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import abcli.engine\n",
    ),
    "by name at run time": ("rope/wave.py", "import importlib\nimportlib.import_module('abcli.engine')\n"),
    "llama_cpp": ("engine/protocol.py", "import llama_cpp\n"),
    "part of llama_cpp": ("engine/protocol.py", "def f():\n    from llama_cpp import llama_grammar\n"),
    "llama_cpp by its name at run time": (
        "engine/protocol.py",
        "from importlib import import_module as load\nload('llama_cpp')\n",
    ),
    "ctypes": ("cli/main.py", "from ctypes import c_int\n"),
    "an unlisted part": ("cli/main.py", "import abcli.stranger\n"),
    "an unlisted module": ("stranger.py", ""),
}
BAD_EXITS = {
    "sys.exit": "import sys\ndef f():\n    sys.exit(1)\n",
    "sys.exit under another name": "from sys import exit as leave\nleave(1)\n",
    "sys under another name": "import sys as system\nsystem.exit(1)\n",
    "SystemExit": "raise SystemExit\n",
    "SystemExit with a status": "raise SystemExit(2)\n",
    "typer.Exit": "import typer\ndef f():\n    raise typer.Exit(1)\n",
    "os._exit": "import os\nos._exit(1)\n",
    "the built-in": "quit()\n",
    "the other branch of a guard": "if __name__ == '__main__':\n    pass\nelse:\n    raise SystemExit(1)\n",
}
SOUND = {
    "__init__.py": "",
    "__main__.py": "from abcli.cli.main import main\nif __name__ == '__main__':\n    raise SystemExit(main())\n",
    "errors.py": "class AbcliError(Exception): ...\n",
    "merge.py": "from .errors import AbcliError\n",
    "rope/__init__.py": "from . import base\nfrom .base import theta\n",
    "rope/base.py": "theta = 1\n",
    "native/__init__.py": "import ctypes\nimport llama_cpp\n",
    "native/crash_probe.py": "import sys\nsys.exit(3)\n",
    "engine/__init__.py": "",
    "engine/protocol.py": "from abcli import errors\nfrom abcli.native import x\nfrom ..rope.base import theta\n",
    "cli/__init__.py": "",
    "cli/main.py": "import sys\nfrom abcli.engine import protocol\nsys.exit(0)\n",
}


def test_a_sound_tree_has_no_problem(tmp_path: Path) -> None:
    assert problems_of(read_modules(write(tmp_path, SOUND))) == []


@pytest.mark.parametrize("case", BAD_IMPORTS)
def test_a_bad_import_is_found(tmp_path: Path, case: str) -> None:
    name, text = BAD_IMPORTS[case]
    write(tmp_path, SOUND)
    assert len(problems_of(read_modules(write(tmp_path, {name: text})))) == 1


@pytest.mark.parametrize("case", BAD_EXITS)
def test_an_exit_outside_the_command_line_is_found(tmp_path: Path, case: str) -> None:
    write(tmp_path, SOUND)
    assert len(problems_of(read_modules(write(tmp_path, {"engine/protocol.py": BAD_EXITS[case]})))) == 1


def test_a_guarded_exit_is_allowed(tmp_path: Path) -> None:
    text = 'import sys\nif __name__ == "__main__":\n    sys.exit(0)\n'
    write(tmp_path, SOUND)
    assert problems_of(read_modules(write(tmp_path, {"engine/protocol.py": text}))) == []

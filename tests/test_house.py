"""The house: imports run one way, and the rooms of mathematics know nothing of Lightning or W&B."""

import ast
import doctest
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

import tiltlens

ROOT = Path(tiltlens.__file__).parent
GROUND = {
    "batches",
    "errors",
    "units",
    "energies",
    "run_folder",
    "run_lock",
    "run_tables",
    "constraint",
    "writing",
}
BELOW = {  # what each part may import, itself and the ground aside
    "schedule": set(),
    "denoiser": {"schedule"},
    "priors": {"denoiser", "schedule"},
    "guidance": {"priors", "denoiser", "schedule"},
    "sampling": {"guidance", "priors", "denoiser", "schedule"},
    "estimates": set(),
    "report": set(),
    "modules": {"report", "sampling", "guidance", "priors", "estimates", "denoiser", "schedule", "metrics"},
    "metrics": {"sampling", "priors", "denoiser", "schedule"},
    "run_folder": set(),
    "units": set(),
}
FOREIGN = {
    "sampling": {"lightning", "wandb"},
    "guidance": {"lightning", "wandb"},
    "estimates": {"lightning", "wandb", "torch"},
    "run_folder": {"lightning", "wandb", "torch"},
    "priors": {"lightning", "wandb"},
    "units": {"lightning", "wandb", "diffusers"},
    "metrics": {"lightning", "wandb"},
}


def imports(part: str) -> set[str]:
    """Dotted names imported anywhere in a part of the package, lazily or not."""
    files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else sorted((ROOT / part).glob("*.py"))
    names = set()
    for node in (n for f in files for n in ast.walk(ast.parse(f.read_text()))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("part", BELOW)
def test_imports_run_one_way(part):
    used = {name.split(".")[1] for name in imports(part) if name.startswith("tiltlens.")}
    wrong = used - BELOW[part] - GROUND - {part}
    assert not wrong, f"tiltlens.{part} imports tiltlens.{', tiltlens.'.join(sorted(wrong))}"


@pytest.mark.parametrize("part", FOREIGN)
def test_mathematics_stands_without(part):
    wrong = {name.split(".")[0] for name in imports(part)} & FOREIGN[part]
    assert not wrong, f"tiltlens.{part} imports {', '.join(sorted(wrong))}"


def test_what_is_imported_is_declared():
    """By its own name, and not by grace of a library that happens to need it."""
    project = tomllib.loads((ROOT.parent.parent / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in asked}
    names = {n for part in ROOT.iterdir() for n in imports(part.stem)}
    found = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"tiltlens"}
    own = {"PIL": "pillow", "yaml": "pyyaml"}
    missing = {own.get(name, name) for name in found} - declared
    assert not missing, f"pyproject.toml does not declare {', '.join(sorted(missing))}"


def test_nothing_unpickles():
    """No code may execute from a weight file."""
    bad = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
            ):
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                if not safe:
                    bad.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not bad, f"unsafe loading in {bad}"


EXAMPLES = [
    f for f in sorted(ROOT.rglob("*.py")) if ">>> " in f.read_text() and f.name != "api.py"
]  # api.py's samples images


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_examples_of_docstrings_are_true(file):
    name = ".".join(["tiltlens", *file.relative_to(ROOT).with_suffix("").parts])
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed

"""What is imported is installed: torch and numpy by safeopt itself, the rest by its extras."""

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]  # whose safeopt is imported, wherever the test is started
# Everything that only an extra brings.
OPTIONAL = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "peft",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "transformers",
    "trl",
    "typer",
    "yaml",
}

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)
sys.meta_path.insert(0, Blocker())
import {module}
"""


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        # The core needs torch and numpy alone.
        ("safeopt", OPTIONAL),
        ("safeopt.data", OPTIONAL),
        ("safeopt.curvature.krylov", OPTIONAL),
        # What takes seconds to import is not needed for --help.
        ("safeopt.cli.app", {"transformers", "peft"}),
    ],
)
def test_what_is_imported_at_once(module, blocked):
    code = BLOCKED.format(blocked=blocked, module=module)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def names_in(requirements):
    """The packages of some requirements and all that these bring, as pip would resolve them."""
    found, left = set(), [Requirement(text) for text in requirements]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate()):
            continue
        found.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        wanted = [Requirement(text) for text in needed]
        left += [r for r in wanted if not (r.marker and "extra" in str(r.marker))]
    return found


def promised(extra):
    """What an extra of pyproject.toml installs."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, requirements, left = project["optional-dependencies"], [], [extra]
    while left:
        for text in extras[left.pop()]:
            requirement = Requirement(text)
            if requirement.name == project["name"]:
                left += requirement.extras
            else:
                requirements.append(text)
    return names_in([*project["dependencies"], *requirements])


def imported(*folders):
    """The packages of others that the modules below some folders import, anywhere in them."""
    found = set()
    for path in (path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"safeopt", "benchmarks"}


@pytest.mark.parametrize(
    ("extra", "folders"),
    [
        ("cli", ["safeopt/cli", "safeopt/finetuning", "safeopt/diagnostics"]),
        ("bench", ["benchmarks", "benchmarks/methods", "benchmarks/data", "benchmarks/overhead"]),
    ],
)
def test_an_extra_brings_all_that_is_imported(extra, folders):
    packages = metadata.packages_distributions()
    brought = promised(extra)
    # ray has an extra of its own; alignment_risk is asked for by the one method that needs it.
    for name in imported(*folders) - {"ray", "alignment_risk"}:
        distributions = {canonicalize_name(x) for x in packages.get(name, [name])}
        assert distributions & brought, f"{name} is imported and not in the extra {extra}"

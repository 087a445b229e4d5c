"""Every Python block of the documentation runs, on a tiny model; see `documents`."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import datasets
import pytest
import typer
from documents import Block, added, blocks, versions, world, write_files
from transformers import training_args

import safeopt
from safeopt.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CODE = ("python", "diff")
WITH_CODE = [page for page in PAGES if any(block.language in CODE for block in blocks(page))]
BLOCKS = [block for page in PAGES for block in blocks(page)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # TRL's default is bf16, which Trainer takes on a CPU only where use_cpu=True is set.
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    names = world()
    for block in blocks(page):
        if block.skipped is not None:
            continue
        if block.language == "python":
            block.run(names)
        elif block.language == "diff":
            for code in versions(block.code):
                block.run(world(), code)


def test_a_skipped_block_says_why():
    assert all(len(block.skipped) > 8 for block in BLOCKS if block.skipped is not None)


def test_a_script_needs_three_changed_lines_at_most():
    diffs = [block for block in BLOCKS if block.language == "diff"]
    assert all(0 < added(block.code) <= 3 for block in diffs)


def test_blocks_are_found_and_a_failing_one_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('# T\n\n```python skip="needs a GPU"\nx\n```\n\n```python\ny = 1\n1 / 0\n```\n')
    first, second = blocks(page)
    assert (first.skipped, second.skipped) == ("needs a GPU", None)
    assert isinstance(second, Block)
    names = {}
    with pytest.raises(ZeroDivisionError) as raised:
        second.run(names)
    assert raised.traceback[-1].lineno + 1 == 9
    assert names["y"] == 1


def test_a_diff_is_two_scripts():
    assert versions(" a\n-b\n+c\n+d\n") == ("a\nb\n", "a\nc\nd\n")
    assert added(" a\n-b\n+c\n+d\n") == 2


def test_the_commands_that_are_shown_have_the_options_they_are_given():
    commands = typer.main.get_command(app).commands
    shown = []
    for block in BLOCKS:
        if block.language == "sh":
            lines = block.code.replace("\\\n", " ").splitlines()
            words = [shlex.split(line, comments=True) for line in lines]
            shown += [line for line in words if line[:1] == ["safeopt"]]
    assert {line[1] for line in shown} == set(commands)
    for _, name, *given in shown:
        known = {option for each in commands[name].params for option in each.opts}
        assert {word for word in given if word.startswith("--")} <= known, (name, given)


def test_the_table_of_integrations_names_tests_and_examples_that_exist():
    page = (ROOT / "docs/reference/compatibility.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/\w+\.py)::(test_\w+)`", page))
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    shown = set(re.findall(r"examples/(\w+\.py)", page))
    assert shown == examples - {"common.py", "orthogonality_is_unstable.py"}


def test_the_reference_shows_all_public_names_and_what_the_examples_import():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md")]
    shown = re.findall(r"^::: ([\w.]+)", "\n".join(pages), re.MULTILINE)
    objects = [resolve_name(name) for name in shown]
    named = {f"safeopt.{name}": getattr(safeopt, name) for name in safeopt.__all__}
    for example in ROOT.glob("examples/*.py"):
        text = example.read_text(encoding="utf-8")
        for module, names in re.findall(
            r"^from (safeopt[\w.]*) import ([\w, ]+)", text, re.MULTILINE
        ):
            for name in names.strip().split(", "):
                named[f"{module}.{name}"] = getattr(import_module(module), name)
    missing = {
        name
        for name, value in named.items()
        if value.__module__ not in shown and not any(value is each for each in objects)
    }
    assert missing <= {"safeopt.diagnostics.plots.curve_plot"}  # of our own figures

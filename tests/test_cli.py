"""The commands as a whole: without their extra, and what other libraries say meanwhile."""

import importlib
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import safeopt.cli
from safeopt.cli import main
from safeopt.cli.console import readable_errors


def forget_the_commands(monkeypatch):
    # The package refers to what it imports anew: without this, tests that come later patch copies.
    monkeypatch.setattr(safeopt, "cli", safeopt.cli)
    for name in [name for name in sys.modules if name.startswith("safeopt.cli")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("package", ["typer", "rich", "transformers", "peft"])
def test_without_the_cli_extra_it_is_one_sentence(package, monkeypatch, capsys):
    """Both as a console script and as a module."""
    forget_the_commands(monkeypatch)
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    command = "diagnose --model m --train train.jsonl --safety safety.jsonl"
    monkeypatch.setattr("sys.argv", ["safeopt", *command.split()])
    for start in (main, lambda: runpy.run_module("safeopt.cli", run_name="__main__")):
        with pytest.raises(SystemExit) as ended:
            start()
        assert ended.value.code == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err == (
            f"safeopt: the command line needs the package {package}, which is not installed; run: "
            'pip install "safeopt-torch[cli]"\n'
        )


def test_a_module_of_our_own_that_is_missing_is_a_bug(monkeypatch):
    forget_the_commands(monkeypatch)
    monkeypatch.setitem(sys.modules, "safeopt.plan", None)
    with pytest.raises(ModuleNotFoundError, match=r"safeopt\.plan"):
        main()


def test_ctrl_c_is_no_silence(capsys):
    with pytest.raises(typer.Exit) as ended, readable_errors():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "stopped: at once, by Ctrl-C\n"


def test_help_has_no_notes_of_other_libraries():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "safeopt.cli", "--help"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert done.stderr == ""


def test_nor_do_the_benchmarks_and_the_processes_that_they_start():
    importlib.import_module("benchmarks")
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)

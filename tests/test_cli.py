"""The `safeopt` command as a whole: without its extra, and what it keeps other libraries from."""

import logging
import runpy
import sys
import warnings

import pytest

from benchmarks.quiet import be_quiet
from safeopt.cli import main
from safeopt.cli.console import quiet_libraries


def forget_the_commands(monkeypatch):
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


@pytest.fixture
def level():
    """The level of bitsandbytes's logger, before and afterwards as it is for a user."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.level = logger.level, logging.NOTSET
    yield lambda: logger.getEffectiveLevel()
    logger.setLevel(before)


def test_bitsandbytes_does_not_tell_about_kernels_in_our_commands(level):
    others = logging.getLogger("bitsandbytes").getEffectiveLevel()
    assert level() <= logging.WARNING
    with quiet_libraries():
        assert level() == logging.ERROR
    assert logging.getLogger("bitsandbytes").getEffectiveLevel() == others


def test_nor_in_the_benchmarks(level):
    with warnings.catch_warnings():
        be_quiet()
    assert level() == logging.ERROR

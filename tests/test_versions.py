"""Missing and too old libraries are named in a sentence."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from safeopt.integrations import versions

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "4.9.2")
    with pytest.raises(ImportError, match=r"transformers 4\.9\.2 is too old .* needs 4\.51 or"):
        versions.require("transformers")


def test_a_missing_library_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(ImportError, match=r'peft is not installed.*pip install "peft>=0\.14"'):
        versions.require("peft")


@pytest.mark.parametrize("found", ["4.51.0", "4.100", "5.0.0rc1", "10.0"])
def test_newer_ones_pass(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda name: found)
    versions.require("transformers")


@pytest.mark.parametrize("name", versions.OLDEST)
def test_an_extra_asks_for_the_same_version(name):
    assert f'"{name}>={versions.OLDEST[name]}"' in PROJECT

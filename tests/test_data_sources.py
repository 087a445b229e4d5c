"""Fetching, verifying and dividing the benchmark's data, with a made-up package and no network."""

import csv
import gzip
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from benchmarks.data import datasets, sources
from benchmarks.data.sources import DownloadError, Source, cache_folder, fetch, fetch_file

NAME = "made_up-1.0-py3-none-any.whl"
MEMBERS = {"made_up/data/a.txt": "alpha\n", "made_up/data/b.txt": "beta\n" * 1000}


def write_wheel(path: Path, files: dict[str, str]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, "made_up/not_needed.py": "raise SystemExit"}.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakePip:
    """Stands in for `subprocess.run`: copies a wheel to --dest, or fails as pip does."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.error: str | None = None
        self.calls: list[list[str]] = []

    def __call__(self, command, **kwargs):
        self.calls.append(command)
        if self.error is not None:
            return subprocess.CompletedProcess(command, 1, stderr=self.error)
        destination = Path(command[command.index("--dest") + 1])
        (destination / NAME).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path, monkeypatch, cache):
    (tmp_path / "index").mkdir()
    fake = FakePip(tmp_path / "index" / NAME)
    monkeypatch.setattr(sources.subprocess, "run", fake)
    return fake


@pytest.fixture
def source(pip):
    return Source("made-up", "1.0", write_wheel(pip.wheel, MEMBERS), 0.1, tuple(MEMBERS))


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_fetch_keeps_the_members_and_nothing_else(cache, pip, source, capsys):
    folder = fetch(source)

    assert files_below(folder) == {*MEMBERS, sources.MARKER}
    assert fetch_file(source, "a.txt").read_text() == "alpha\n"
    assert not list(cache.rglob("*.whl"))
    record = json.loads((folder / sources.MARKER).read_text())["members"]["made_up/data/a.txt"]
    assert record == {"bytes": 6, "sha256": hashlib.sha256(b"alpha\n").hexdigest()}
    (command,) = pip.calls
    assert "made-up==1.0" in command
    assert {"--no-deps", "--only-binary"} <= set(command)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "downloading made-up 1.0 (0.1 MB)…\n"


def test_second_fetch_does_nothing(pip, source, capsys):
    fetch(source)
    capsys.readouterr()
    pip.error = "ERROR: no network"
    fetch(source)
    assert len(pip.calls) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["truncate", "delete", "marker"])
def test_damaged_cache_is_fetched_again(pip, source, damage):
    file = fetch_file(source, "b.txt")
    if damage == "truncate":
        file.write_text("be")
    elif damage == "delete":
        file.unlink()
    else:
        (source.folder / sources.MARKER).write_text('{"wheel_sha256"')
    assert fetch_file(source, "b.txt").read_text() == MEMBERS["made_up/data/b.txt"]
    assert len(pip.calls) == 2


def test_another_pin_is_not_served_from_the_cache(pip, source):
    fetch(source)
    changed = Source(
        "made-up", "1.0", write_wheel(pip.wheel, {**MEMBERS, "x": "y"}), 0.1, source.members
    )
    fetch(changed)
    assert len(pip.calls) == 2


def test_wrong_hash_names_both_and_removes_the_file(cache, pip, source):
    actual = write_wheel(pip.wheel, {"made_up/data/a.txt": "forged"})
    with pytest.raises(DownloadError, match="SHA-256") as caught:
        fetch(source)
    assert actual in str(caught.value)
    assert source.sha256 in str(caught.value)
    assert not list(cache.rglob("*.whl"))
    assert not source.folder.exists()


def test_interrupted_extraction_resumes_from_the_finished_wheel(cache, pip, source, monkeypatch):
    copy, copied = sources.shutil.copyfileobj, []

    def interrupted(packed, unpacked, size):
        if copied:
            raise KeyboardInterrupt
        copied.append(copy(packed, unpacked, size))

    with monkeypatch.context() as patch:
        patch.setattr(sources.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(source)
    assert not source.folder.exists()

    fetch(source)
    assert files_below(source.folder) == {*MEMBERS, sources.MARKER}
    assert len(pip.calls) == 1, "the wheel was there already"
    assert {p.suffix for p in (cache / "partial").iterdir()} == {".lock"}


def test_half_a_wheel_left_behind_is_fetched_again(cache, pip, source):
    (cache / "partial").mkdir(parents=True)
    (cache / "partial" / NAME).write_bytes(pip.wheel.read_bytes()[:50])
    fetch(source)
    assert len(pip.calls) == 1


def test_offline_says_what_to_do(cache, pip, source):
    pip.error = "WARNING: Retrying\nERROR: No matching distribution found for made-up==1.0\n"
    with pytest.raises(DownloadError) as caught:
        fetch(source)
    message = str(caught.value)
    for part in ("made-up 1.0", str(cache), "connect", "SAFEOPT_CACHE", "No matching distribution"):
        assert part in message


def test_no_pip_says_how_to_get_it(pip, source):
    pip.error = "/usr/bin/python: No module named pip\n"
    with pytest.raises(DownloadError, match="ensurepip"):
        fetch(source)


def test_cache_that_cannot_be_written(tmp_path, source, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="SAFEOPT_CACHE"):
        fetch(source)


@pytest.mark.parametrize(
    ("version", "resumes"), [("24.3.1", False), ("25.1", True), ("26.0.dev1", True)]
)
def test_resuming_is_asked_for_where_pip_can(pip, source, monkeypatch, version, resumes):
    monkeypatch.setattr(sources.metadata, "version", lambda _: version)
    fetch(source)
    assert ("--resume-retries" in pip.calls[0]) is resumes


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SAFEOPT_CACHE", raising=False)
    assert cache_folder() == tmp_path / "xdg" / "safeopt"
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_pins_are_complete():
    assert len({s.package for s in sources.SOURCES}) == len(sources.SOURCES)
    for pinned in sources.SOURCES:
        assert len(pinned.sha256) == 64
        assert int(pinned.sha256, 16)
        assert pinned.members


# What follows reads the loaders' file formats from small files of our own.


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Serve the files named by their endings from a folder instead of from packages."""
    monkeypatch.setattr(datasets, "fetch_file", lambda _, name: tmp_path / Path(name).name)
    return tmp_path


def write_harmbench(folder: Path, split: str, prompts: list[str]) -> None:
    with (folder / f"_{split}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["Behavior", "FunctionalCategory"])
        table.writerows([[p, "standard"] for p in prompts] + [["A song", "copyright"]])


def test_safety_splits_share_no_prompt(rows):
    seeds = "".join(f"- value: Bad deed number {i}\n" for i in range(10))
    (rows / "adv_bench.prompt").write_text(f"name: adv_bench\nseeds:\n{seeds}")
    write_harmbench(rows, "val", ["Misdeed A"])
    write_harmbench(rows, "test", ["bad deed, NUMBER 3!", "Misdeed B"])

    splits = datasets.safety_splits(seed=0)
    assert (splits.tune, splits.test) == (["Misdeed A"], ["bad deed, NUMBER 3!", "Misdeed B"])
    used = splits.align + splits.probe
    assert sorted(used) == [f"Bad deed number {i}" for i in range(10) if i != 3]
    assert splits == datasets.safety_splits(seed=0)
    assert splits.align != datasets.safety_splits(seed=1).align


def test_harmbench_rejects_an_unknown_split():
    with pytest.raises(ValueError, match='split="train"'):
        datasets.harmbench("train")


def test_codeio_removes_the_template(rows):
    code = (
        " # import necessary packages\nimport math\n\n# main function\ndef main_solution(x):\n"
        "    # halve it\n    return x / 2 "
    )
    row = {"task_description": "Halve x. ", "code_sample": code}
    long = {"task_description": "Long", "code_sample": "x = 1\n" * 400}
    with gzip.open(rows / "codeio.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in (row, long, {**row, "code_sample": "pass"}))

    ((prompt, response),) = datasets.codeio()
    assert prompt.startswith("Halve x.\n")
    assert "Python" in prompt
    assert response == ("import math\n\ndef main_solution(x):\n    # halve it\n    return x / 2")
    assert len(datasets.codeio(max_chars=10**6)) == 2


def test_gsm8k_drops_calculator_marks(rows):
    row = {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    (rows / "test.jsonl").write_text(json.dumps(row) + "\n")
    assert datasets.gsm8k() == [("2+2?", "It is 4.\n#### 4")]


def test_labelled_refusals_skips_comments_before_the_header(rows):
    table = (
        '# version\n# note\nobjective,assistant_response,human_score\nx,"No,\n# never",1\ny,Yes,0\n'
    )
    (rows / "refusal.csv").write_text(table)
    (rows / "refusal_extra.csv").write_text("objective,assistant_response,human_score\nz,Ok,0\n")
    assert datasets.labelled_refusals() == [("No,\n# never", True), ("Yes", False), ("Ok", False)]


def test_split_is_a_seeded_partition():
    parts = datasets.split(range(101), (0.5, 0.3, 0.2), seed=3)
    assert [len(part) for part in parts] == [50, 31, 20]
    assert sorted(item for part in parts for item in part) == list(range(101))
    assert parts == datasets.split(range(101), (0.5, 0.3, 0.2), seed=3)
    assert datasets.split(range(10), (0.2,))[0] == datasets.split(range(10), (0.2, 0.8))[0]


@pytest.mark.parametrize("fractions", [(0.7, 0.4), (-0.1, 0.5)])
def test_split_rejects_bad_fractions(fractions):
    with pytest.raises(ValueError, match="fractions="):
        datasets.split([1, 2], fractions)


def test_prompt_lists_are_clean_and_disjoint():
    parts = (
        datasets.harmless_train(),
        datasets.borderline(),
        datasets.held(),
        datasets.over_refusal("val"),
        datasets.over_refusal("test"),
    )
    assert [len(part) for part in parts] == [120, 110, 64, 64, 64]
    given = [prompt for part in parts for prompt in part]
    prompts = [datasets._normalised(prompt) for prompt in given]
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.strip() and prompt for prompt in given)


def test_no_given_prompt_is_a_measured_one_in_other_words():
    """Of the words that two prompts have, beside the commonest, less than half are common."""
    common = (
        "a an and are as at be by can do does for from give how i in is it its me my of on or s "
        "that the to was what when which who whom with without write"
    )

    def words(prompt):
        return set(datasets._normalised(prompt).split()) - set(common.split())

    measured = [words(p) for part in ("val", "test") for p in datasets.over_refusal(part)]
    given = [*datasets.harmless_train(), *datasets.borderline(), *datasets.held()]
    for prompt in given:
        overlap = max(len(words(prompt) & m) / len(words(prompt) | m) for m in measured)
        assert overlap < 0.5, prompt

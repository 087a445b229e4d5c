"""Every example runs from top to bottom, on its tiny model, and leaves what it promises."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
from accelerate.state import AcceleratorState

FOLDER = Path(__file__).parents[1] / "examples"
WRITES = {
    "accelerate_loop": "optimizer.bin",
    "lightning_module": "last.ckpt",
    "peft_loop": "optimizer.pt",
    "qlora": "adapter_model.safetensors",
    "trainer": "model.safetensors",
    "trl_dpo": "adapter_model.safetensors",
    "trl_sft": "adapter_model.safetensors",
    "two_pass": "adapter_model.safetensors",
    "watch": "checkpoint-4/adapter_model.safetensors",
}
DISTRIBUTED = {"ddp": "optimizer.pt", "fsdp2": ".metadata"}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The environment of an example: its folder on the path, no arguments but --out."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("SAFEOPT_TINY", "1")
    monkeypatch.setenv("SAFEOPT_MONITOR", "")  # so that what an example puts there does not stay
    monkeypatch.delenv("SAFEOPT_MONITOR")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "common", None)
    del sys.modules["common"]
    yield tmp_path / "out"
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_an_example_runs(name, tiny, monkeypatch):
    path = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--out", str(tiny)])
    runpy.run_path(str(path), run_name="__main__")
    assert (tiny / WRITES[name]).is_file()


def test_an_example_asks_for_a_model(tiny, monkeypatch, capsys):
    """None is the default: one that refuses nothing has nothing to protect."""
    monkeypatch.delenv("SAFEOPT_TINY")
    monkeypatch.setattr(sys, "argv", ["trainer.py"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / "trainer.py"), run_name="__main__")
    assert "the following arguments are required: --model" in capsys.readouterr().err


def launched(command, environment, seconds):
    """Run a launcher to its end; if that does not come, its workers end with it.

    torchrun gives each worker a session of its own, so they outlive a launcher that is killed.
    """
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            output, errors = launcher.communicate(timeout=seconds)
        except BaseException:
            workers = psutil.Process(launcher.pid).children(recursive=True)
            for process in (launcher, *workers):
                process.kill()
            psutil.wait_procs(workers, timeout=10)
            raise
    return launcher.returncode, output, errors


def test_workers_do_not_outlive_a_launcher_that_takes_too_long(tmp_path, monkeypatch):
    mark = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))"
    code = "import subprocess, sys; subprocess.run(sys.argv[1:], start_new_session=True)"
    command = [sys.executable, "-c", code, sys.executable, "-c", f"{child}; time.sleep(60)"]

    def too_long(self, timeout):
        while not (mark.exists() and mark.read_text()):  # however slow the machine is
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", too_long)
    with pytest.raises(subprocess.TimeoutExpired):
        launched(command, os.environ, 5)
    worker = int(mark.read_text())
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie"


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_an_example_of_several_processes_runs(name, tiny):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(FOLDER / f"{name}.py"), "--out", str(tiny)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    status, output, errors = launched(command, environment, 400)
    assert status == 0, errors[-3000:]
    assert "alignment loss at the end" in output
    assert (tiny / DISTRIBUTED[name]).is_file()


def test_the_list_of_examples_names_them_all():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in listed for name in (*WRITES, *DISTRIBUTED))

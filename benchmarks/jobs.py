"""Where runs take place: here, one after another; in processes of this machine; on a Ray cluster.

Outside of this process every run has a process of its own, so that nothing of one run reaches
another: neither its memory nor its crash. Every executor calls the same listener.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch

from benchmarks.config import ConfigError, RunConfig
from benchmarks.data.sources import DownloadError
from benchmarks.quiet import be_quiet
from benchmarks.records import Point, Record, Start

REPOSITORY = Path(__file__).parents[1]
# What the user can mend: told without a traceback.
MENDABLE = (ConfigError, DownloadError, FileNotFoundError)


@dataclass(frozen=True, eq=False)
class Job:
    """One run, as plain data, so that it can be sent to another process or machine.

    Attributes:
        config: of the comparison that the run is a part of.
        method: the key of its method.
        seed: its seed.
        start: the model before training, measured once for all runs.
        threads: processor threads where the config does not say; None for torch's choice.
    """

    config: dict[str, Any]
    method: str
    seed: int
    start: dict[str, Any]
    threads: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.method}, seed {self.seed}"


class JobListener(Protocol):
    """What happens to jobs. All methods are called in the process that started them."""

    def on_step(self, job: Job, step: int, loss: float) -> None:
        """After a training step."""

    def on_point(self, job: Job, point: Point) -> None:
        """After a measurement during training."""

    def on_record(self, job: Job, record: Record) -> None:
        """When a job is finished."""

    def on_failure(self, job: Job, error: str) -> None:
        """When a job has crashed."""


class Executor(Protocol):
    """A place where runs can take place."""

    def start(self, config: dict[str, Any], threads: int | None) -> dict[str, Any]:
        """Measure the model before training there."""

    def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
        """Do all jobs."""


def measure_start(config: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """The model before training, as plain data."""
    from benchmarks.bench import Bench

    _use_threads(threads)
    return Bench(RunConfig.model_validate(config)).measure_start().model_dump(mode="json")


def do(
    job: Job, on_step: Callable[[int, float], None], on_point: Callable[[Point], None]
) -> Record:
    """Do a job in this process."""
    from benchmarks.bench import Bench

    config = RunConfig.model_validate(job.config)
    (method,) = [method for method in config.methods if method.key == job.method]
    start = Start.model_validate(job.start)
    _use_threads(job.threads)
    return Bench(config).run(method, job.seed, start, on_step, on_point)


def _use_threads(number: int | None) -> None:
    """Before the model is loaded; a config's own number overrides it afterwards."""
    if number is not None:
        torch.set_num_threads(number)


# --- processes ---


class Processes:
    """``number`` processes at a time on this machine, a new one for every job.

    Where there are several GPUs, the processes are spread over them.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def start(self, config: dict[str, Any], threads: int | None) -> dict[str, Any]:
        """As `Executor.start`."""
        connection, process = _started(_measuring_child, config, threads)
        try:
            found = connection.recv()
        except EOFError:  # it has told why itself, if it could
            process.join()
            raise RuntimeError(
                f"the process that measured the starting point ended by {_ending(process.exitcode)}"
            ) from None
        finally:
            process.kill()
            connection.close()
        if isinstance(found, MENDABLE):
            raise found
        return dict(found)

    def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
        """As `Executor.run`."""
        waiting, places = deque(jobs), deque(range(self.number))
        running: dict[Connection, tuple[Job, BaseProcess, int]] = {}
        try:
            while waiting or running:
                while waiting and places:
                    job, place = waiting.popleft(), places.popleft()
                    connection, process = _started(_child, job, place)
                    running[connection] = (job, process, place)
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    job, process, place = running[ready]
                    if _receive(ready, job, process, listener):
                        ready.close()
                        del running[ready]
                        places.append(place)
        finally:
            for _, process, _ in running.values():
                process.kill()


def _context() -> Any:
    """A server that has imported everything once and forks for each job; elsewhere new processes.

    Plain forking would copy this process with its threads, which can leave locks taken for ever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bench"])
    return context


def _started(child: Callable[..., None], *args: Any) -> tuple[Connection, BaseProcess]:
    """Start ``child(*args, connection)`` in a process; what it sends, the connection gives."""
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return ours, process


def _receive(connection: Connection, job: Job, process: BaseProcess, listener: JobListener) -> bool:
    """Pass one message on; whether it was the last."""
    try:
        kind, content = connection.recv()
    except EOFError:  # killed, for want of memory for instance
        process.join()
        listener.on_failure(job, f"the process ended by {_ending(process.exitcode)}")
        return True
    if kind == "step":
        listener.on_step(job, *content)
    elif kind == "point":
        listener.on_point(job, Point.model_validate(content))
    else:
        process.join()
        if kind == "record":
            listener.on_record(job, Record.model_validate(content))
        else:
            listener.on_failure(job, content)
        return True
    return False


def _serve_parent() -> None:
    """What every child process begins with: it lives and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    Thread(target=_end_with_parent, daemon=True).start()
    be_quiet()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its children, which would go on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _measuring_child(config: dict[str, Any], threads: int | None, connection: Connection) -> None:
    _serve_parent()
    try:
        connection.send(measure_start(config, threads))
    except MENDABLE as error:
        connection.send(error)
    finally:
        connection.close()


def _child(job: Job, place: int, connection: Connection) -> None:
    _serve_parent()
    if (devices := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(place % devices)
    try:
        record = do(
            job,
            lambda step, loss: connection.send(("step", (step, loss))),
            lambda point: connection.send(("point", point.model_dump(mode="json"))),
        )
        connection.send(("record", record.model_dump(mode="json")))
    except Exception as error:
        connection.send(("failure", told(error)))
    finally:
        connection.close()


def told(error: BaseException) -> str:
    """The error with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


# --- Ray ---


class RayCluster:
    """Every job is a task of a Ray cluster, with a GPU where the cluster has any.

    Args:
        address: of the cluster, ``auto`` for the one that this machine belongs to, or ``local`` to
            start one on this machine.
        threads: processors of a job.
    """

    def __init__(self, address: str, threads: int) -> None:
        self.address, self.threads = address, threads

    def start(self, config: dict[str, Any], threads: int | None) -> dict[str, Any]:
        """As `Executor.start`."""
        with self._connected() as ray:
            return ray.get(self._task(ray, measure_start).remote(config, threads))

    def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
        """As `Executor.run`."""
        with self._connected() as ray:
            task = self._task(ray, _ray_task)
            running = {task.remote(job): job for job in jobs}
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done)
                try:
                    kind, content = ray.get(done)
                except ray.exceptions.RayError as error:
                    reason = (str(error).strip() or "no reason given").splitlines()[0]
                    listener.on_failure(job, f"{type(error).__name__}: {reason}")
                    continue
                if kind == "record":
                    listener.on_record(job, Record.model_validate(content))
                else:
                    listener.on_failure(job, content)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        import ray

        packages = [str(REPOSITORY / name) for name in ("benchmarks", "safeopt")]
        terminated = signal.getsignal(signal.SIGTERM)
        ray.init(
            address=self.address,
            # The packages of this checkout travel to the workers; what they need must be there.
            runtime_env={"py_modules": packages},
            log_to_driver=False,
            include_dashboard=False if self.address == "local" else None,
        )
        try:
            # Ray has put a handler of its own there, which ends the process at once.
            if signal.getsignal(signal.SIGTERM) is not terminated:
                signal.signal(signal.SIGTERM, terminated)
            yield ray
        finally:
            ray.shutdown()

    def _task(self, ray: Any, function: Callable[..., Any]) -> Any:
        # max_calls=1: a process of its own for every run, as everywhere.
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        return ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=0, max_calls=1)(
            function
        )


def _ray_task(job: Job) -> tuple[str, Any]:
    be_quiet()
    try:
        record = do(job, lambda step, loss: None, lambda point: None)
        return "record", record.model_dump(mode="json")
    except Exception as error:
        return "failure", told(error)


def places() -> int:
    """How many runs fit on this machine at a time: one a GPU, else one a processor."""
    return torch.cuda.device_count() or cores()


def cores() -> int:
    """Processors that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

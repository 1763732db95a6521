"""Holds every test to leaving nothing behind: no thread, process, process group, environment variable or RNG state."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.register_assert_rewrite("tests.chained_runs", "tests.conformance", "tests.simulated_ranks")  # theirs, too
torch.set_num_threads(1)  # the machines of the tests share few cores, and one thread reduces in one order
hypothesis.settings.register_profile("shared-cores", deadline=None)  # how long one example takes is the machine's doing
hypothesis.settings.load_profile("shared-cores")

T = TypeVar("T")
GRACE_SECONDS = 5.0  # what a test has asked to end may take this long to be gone

# Threads that no test can end, each by the start of its name or its type's.
LASTING_THREADS = {
    "fsspecIO": "fsspec's event loop, one for the life of the process",
    "TMonitor": "tqdm's monitor, one for the life of the process",
    "_ChildProcessObserver": "Lightning's launcher looks at its processes every 5 s and ends when they have ended",
    "_DummyThread": "a thread of torch's C++ (autograd on a GPU) that once called Python, one per device",
}

# Processes that no test can end, each by a part of its command line.
LASTING_PROCESSES = {
    "multiprocessing.resource_tracker": "Python's own, started with the first spawn or shared memory, one per process",
    "multiprocessing.forkserver": "Python's own, started with the first forkserver context, one per process",
}

# Environment variables that our hosts set in their own process and never take back. They are taken back here.
HOSTS_VARIABLES = {
    "LOCAL_RANK": "Lightning's launcher",
    "NODE_RANK": "Lightning's launcher",
    "WORLD_SIZE": "Lightning's launcher",
    "MASTER_ADDR": "Lightning, when it starts a process group",
    "MASTER_PORT": "Lightning, when it starts a process group",
    "OMP_NUM_THREADS": "Lightning, when it starts a process group",
    "PL_GLOBAL_SEED": "seed_everything, for the processes that it launches",
    "PL_SEED_WORKERS": "seed_everything, for the workers of loaders",
    "CUBLAS_WORKSPACE_CONFIG": "Trainer(deterministic=True)",
    "CUDA_DEVICE_ORDER": "Lightning, when it picks a GPU",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "import lightning",
    "TORCHINDUCTOR_CACHE_DIR": "torch, when it first imports its compiler",
    "PYTEST_CURRENT_TEST": "pytest",
}


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaves something behind, takes it away where that is possible, and gives back the RNG state."""
    threads, processes, environ = set(threading.enumerate()), _child_processes(), dict(os.environ)
    grouped, give_back_rng = dist.is_initialized(), _keep_rng()
    yield
    give_back_rng()
    leaks = [] if grouped else _end_process_group()
    leaks += _changed_variables(environ)
    leaks += [f"child process {pid}: {line}" for pid, line in _end(_lasting(_new_child_processes, processes))]
    leaks += [f"thread {thread}" for thread in _lasting(_new_threads, threads)]
    if leaks:
        pytest.fail("The test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


def _keep_rng() -> Callable[[], None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def give_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return give_back


def _end_process_group() -> list[str]:
    if not dist.is_initialized():
        return []
    dist.destroy_process_group()
    return ["a torch.distributed process group: call torch.distributed.destroy_process_group()"]


def _changed_variables(before: dict[str, str]) -> list[str]:
    after = dict(os.environ)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        elif name != "PYTEST_CURRENT_TEST":  # pytest removes it itself, and expects to find it
            del os.environ[name]
    return [
        f"environment variable {name}: {before.get(name)!r} became {after.get(name)!r}"
        for name in sorted(set(changed) - HOSTS_VARIABLES.keys())
    ]


def _lasting(find_new: Callable[[T], Set[Any]], before: T) -> list[Any]:
    """What is still new when it has been given the time to end, and what no longer refers to it has been collected."""
    if not find_new(before):
        return []
    gc.collect()  # a loader's iterator in a reference cycle ends its workers when it is collected
    until = time.monotonic() + GRACE_SECONDS
    while (new := find_new(before)) and time.monotonic() < until:
        time.sleep(0.01)
    return sorted(new, key=str)


def _new_threads(before: set[threading.Thread]) -> set[threading.Thread]:
    return {thread for thread in set(threading.enumerate()) - before if not _is_lasting(thread)}


def _is_lasting(thread: threading.Thread) -> bool:
    return any(name.startswith(tuple(LASTING_THREADS)) for name in (thread.name, type(thread).__name__))


def _new_child_processes(before: set[tuple[int, str]]) -> set[tuple[int, str]]:
    known = {pid for pid, _ in before}  # by id alone: a forked child changes its command line when it execs
    return {
        (pid, line)
        for pid, line in _child_processes()
        if pid not in known and not any(part in line for part in LASTING_PROCESSES)
    }


def _child_processes() -> set[tuple[int, str]]:
    """The ids and command lines of the running children; only those of multiprocessing where /proc does not tell."""
    of_multiprocessing = {(child.pid or 0, child.name) for child in multiprocessing.active_children()}  # reaps, too
    tasks = list(Path("/proc/self/task").glob("*/children"))
    if not tasks:
        return of_multiprocessing
    pids = {int(pid) for task in tasks for pid in _read(task).split()}
    lines = {pid: _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip() for pid in pids}
    return {(pid, line) for pid, line in lines.items() if line}  # none: it has ended and waits to be reaped


def _read(path: Path) -> str:
    """The text of a file of /proc, empty for a process that has ended."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _end(children: list[tuple[int, str]]) -> list[tuple[int, str]]:
    for pid, _ in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return children

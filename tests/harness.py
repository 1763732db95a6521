"""Launches ranks that share one start-up: a zygote has imported everything, and forks every rank of every launch.

A launch is ``world_size`` ranks that run one function, mostly of :mod:`tests.runs`, in the environment that torchrun
would give them. The ranks of a launch, their supervisor and their loaders' workers are one process group: when the
launch ends, however it ends, what is left of the group is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import functools
import importlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
RUNS = "tests.runs"
CANCEL = "cancel"
TAIL_LINES = 25
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_telling: int | None = None  # in a rank: where it tells its supervisor to kill the launch


class LaunchError(AssertionError):
    """A launch ended in another way than it was meant to; the text has the last lines of every rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One start of a training run: ``function`` is called with ``arguments``.

    It is a name in :mod:`tests.runs`, or in another module, ``module:name``.
    """

    function: str
    arguments: dict[str, Any]
    world_size: int
    folder: Path
    seconds: float = 60.0


# -- in the process of the tests


class Zygote:
    """The client of one zygote process. One launch at a time; use as many as should run at the same time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.harness import serve; serve()"],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert _receive(self._process.stdout) == "ready"

    def run(self, launch: Launch) -> bool:
        """Runs a launch to its end. Returns whether a rank had it killed.

        Raises:
            LaunchError: A rank failed, or the launch took too long.
        """
        launch.folder.mkdir(parents=True, exist_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, launch)
            outcome, why = _receive(self._process.stdout)
        except EOFError:
            self.close()
            raise
        except BaseException:  # the test was interrupted: by its time limit, or from the keyboard
            _send(self._process.stdin, CANCEL)
            _receive(self._process.stdout)
            raise
        if outcome not in ("ended", "killed"):
            raise LaunchError(f"{launch.function}({launch.arguments}) on {launch.world_size} ranks: {why}")
        return bool(outcome == "killed")

    def close(self) -> None:
        """Ends the zygote and with it what it still runs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        _zygotes.pop(self, None)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None and not self._process.stdin.closed  # type: ignore[union-attr]


_zygotes: dict[Zygote, None] = {}


def zygote(index: int = 0) -> Zygote:
    """The ``index``-th zygote, started when it is first asked for; it lives as long as this process."""
    running = [one for one in _zygotes if one.is_running]
    while len(running) <= index:
        running.append(Zygote())
        _zygotes[running[-1]] = None
    return running[index]


@atexit.register
def _close_all() -> None:
    for one in list(_zygotes):
        one.close()


# -- in the zygote


def serve() -> None:
    """Serves launches from stdin until it is closed."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    importlib.import_module(RUNS)
    tasks = Path("/proc/self/task")
    assert not tasks.is_dir() or len(list(tasks.iterdir())) == 1, "threads do not survive a fork"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests hear it too, and cancel
    _send(answers, "ready")
    with contextlib.suppress(EOFError):
        while True:
            request = _receive(requests)
            if request != CANCEL:  # which comes too late here
                _send(answers, _supervised(request, requests))


def _supervised(launch: Launch, requests: BinaryIO) -> tuple[str, str]:
    """Runs a launch under a supervisor of its own, which may start threads. A request ends it early."""
    reading, writing = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.close(reading)
        _exit_after(functools.partial(_supervise, launch, writing))
    os.close(writing)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(supervisor, supervisor)
    with os.fdopen(reading, "rb") as results:
        ready, _, _ = select.select([results, requests], [], [])
        result = _receive_or(results, ("failed", "the supervisor died")) if results in ready else None
    _kill_group(supervisor)
    os.waitpid(supervisor, 0)
    if result is None:
        _receive(requests)
    return result or ("failed", "cancelled")


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies may not be signalled
        os.killpg(leader, signal.SIGKILL)


# -- in the supervisor


def _supervise(launch: Launch, result: int) -> None:
    os.setpgid(0, 0)
    told, telling = os.pipe()
    ports = [os.pipe() for _ in range(launch.world_size)]
    ranks = {}
    for rank, port in enumerate(ports):
        pid = os.fork()
        if pid == 0:
            os.close(result)
            _exit_after(functools.partial(_run_rank, launch, rank, port[0], telling))
        ranks[pid] = rank
    store = _host_store(launch)  # only now, for it has threads; its port is free because it has bound it already
    for _, writing in ports:
        os.write(writing, struct.pack("i", store.port))
    with os.fdopen(result, "wb") as pipe:
        _send(pipe, _watch(launch, ranks, told))


def _host_store(launch: Launch) -> Any:
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, launch.world_size, is_master=True, wait_for_workers=False)


def _watch(launch: Launch, ranks: dict[int, int], told: int) -> tuple[str, str]:
    """Waits for the first rank that fails, for all to end, or for the word to kill; then kills all that still run."""
    left, failed = set(ranks), ""
    outcome, until = "ended", time.monotonic() + launch.seconds
    while left and outcome == "ended":
        if select.select([told], [], [], 0.005)[0]:
            outcome = "killed"
        elif time.monotonic() > until:
            outcome, failed = "failed", f"took more than {launch.seconds} s"
        else:
            pid, status = os.waitpid(-1, os.WNOHANG)
            left.discard(pid)
            if pid and status and not select.select([told], [], [], 0)[0]:
                outcome, failed = "failed", f"rank {ranks[pid]} ended with {os.waitstatus_to_exitcode(status)}"
    if outcome == "failed" and not failed.startswith("took"):
        _let_others_speak(left)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for pid in left:
        os.waitpid(pid, 0)
    return outcome, failed + (_tails(launch) if failed else "")


def _let_others_speak(left: set[int], seconds: float = 2.0) -> None:
    """After one rank failed, the others fail in their next collective: the first failure is often not the cause."""
    until = time.monotonic() + seconds
    while left and time.monotonic() < until:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        left.discard(pid)
        select.select([], [], [], 0.01)


def _tails(launch: Launch) -> str:
    outputs = [launch.folder / f"rank{rank}.out" for rank in range(launch.world_size)]
    tails = [path.read_text(errors="replace").splitlines()[-TAIL_LINES:] for path in outputs if path.exists()]
    return "".join(f"\n--- rank {rank}\n" + "\n".join(tail) for rank, tail in enumerate(tails))


# -- in a rank


def _run_rank(launch: Launch, rank: int, port: int, telling: int) -> None:
    global _telling
    _telling = telling
    out = os.open(launch.folder / f"rank{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.enable()
    (number,) = struct.unpack("i", os.read(port, 4))
    os.environ.update(_torchrun_environment(rank, launch.world_size, number))
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        for arguments in _warning_filters():
            warnings.filterwarnings(*arguments)
        module, _, name = launch.function.rpartition(":")
        getattr(importlib.import_module(module or RUNS), name)(folder=launch.folder, **launch.arguments)
    _check_threads()


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    world = {name: str(world_size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return {
        **world,
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the supervisor's: no rank binds a port
    }


@functools.cache
def _warning_filters() -> list[tuple[Any, ...]]:
    """The filters of pytest's settings, so that a warning is an error in a rank too."""
    from _pytest.config import parse_warning_filter

    try:
        import tomllib
    except ImportError:  # Python 3.10, where pytest itself brings tomli
        import tomli as tomllib  # type: ignore[no-redef]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    return [parse_warning_filter(line, escape=False) for line in settings["filterwarnings"]]


def _check_threads() -> None:
    left = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    assert not left, f"the run left threads behind: {left}"


def die() -> NoReturn:
    """Called in a rank: all ranks of the launch are killed with SIGKILL, now, by their supervisor."""
    assert _telling is not None, "only a rank of a launch can be killed"
    os.write(_telling, b"k")
    threading.Event().wait()
    raise AssertionError("unreachable")


def die_after(seconds: float) -> None:
    """Called in a rank: as :func:`die`, so many seconds later, wherever it is by then."""
    assert _telling is not None, "only a rank of a launch can be killed"
    if os.fork() == 0:
        time.sleep(seconds)
        os.write(_telling, b"k")
        os._exit(0)


def _exit_after(work: Callable[[], None]) -> NoReturn:
    """Ends a forked process without running what its parent has planned for its own end."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# -- between the processes


def _send(pipe: BinaryIO, value: Any) -> None:
    content = pickle.dumps(value)
    pipe.write(struct.pack("q", len(content)) + content)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError("the other process has ended")
    return pickle.loads(pipe.read(struct.unpack("q", header)[0]))


def _receive_or(pipe: BinaryIO, default: Any) -> Any:
    try:
        return _receive(pipe)
    except EOFError:
        return default

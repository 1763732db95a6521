"""Object stores and an SSH server on loopback, as pytest fixtures: what fsspec's remote filesystems are tested against.

A test module says `pytest_plugins = ["tests.servers"]` and asks for `store`. The servers are programs that other people
wrote; `make` puts them below .venv. Each binds port 0 and prints what it got, and ends when its standard input does, so
that none outlives the tests, however those end.

PYTEST_DONT_REWRITE: the test modules import this one before pytest takes it as a plugin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import http.client
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
import pytest

VENV = Path(__file__).parent.parent / ".venv"
NODE_MODULES = VENV / "node" / "node_modules"
DEBIAN = VENV / "servers"  # Debian packages, unpacked and not installed
START_SECONDS = 60.0  # the machines of the tests share few cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """A place for files on a running server: its URL, and what fsspec needs beside the URL to open it."""

    name: str
    url: str
    port: int
    storage_options: dict[str, Any]

    @property
    def protocol(self) -> str:
        return urlsplit(self.url).scheme

    def filesystem(self, **changes: Any) -> Any:
        """fsspec's filesystem for this store, with `changes` in its storage options."""
        inferred = fsspec.get_filesystem_class(self.protocol)._get_kwargs_from_urls(self.url)
        filesystem = fsspec.filesystem(self.protocol, **{**inferred, **self.storage_options, **changes})
        if self.protocol == "sftp":  # paramiko leaves Nagle's algorithm on: 40 ms for every 32 KiB written
            filesystem.client.get_transport().sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return filesystem

    def environment(self) -> dict[str, str]:
        """The variables by which a child process opens the URL alone; fsspec reads them when it is imported."""
        return {f"FSSPEC_{self.protocol.upper()}": json.dumps(self.storage_options)}

    @contextlib.contextmanager
    def configure(self) -> Iterator[None]:
        """Opens the URL alone in this process, as `environment` does in another."""
        from fsspec.config import conf

        before = conf.get(self.protocol)
        conf[self.protocol] = dict(self.storage_options)
        try:
            yield
        finally:
            del conf[self.protocol]
            if before is not None:
                conf[self.protocol] = before

    def below(self, folder: str) -> Store:
        return dataclasses.replace(self, url=f"{self.url}/{folder}")

    def through(self, port: int) -> Store:
        """The same store reached by another port, that of a proxy."""
        old, new = f"127.0.0.1:{self.port}", f"127.0.0.1:{port}"
        options = json.loads(json.dumps(self.storage_options).replace(old, new))
        return dataclasses.replace(self, url=self.url.replace(old, new), port=port, storage_options=options)


# --- The servers. Each is a command and the line by which it tells its port.

PYTHON_UNTIL_STDIN_ENDS = "import sys; sys.stdin.read()"
NODE_UNTIL_STDIN_ENDS = "process.stdin.on('end', () => process.exit()).resume();"

MOTO = f"""
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
{PYTHON_UNTIL_STDIN_ENDS}
"""

S3RVER = f"""
{NODE_UNTIL_STDIN_ENDS}
const S3rver = require("s3rver");
const options = {{ address: "127.0.0.1", port: 0, silent: true, directory: process.argv[1] }};
const server = new S3rver({{ ...options, configureBuckets: [{{ name: "bucket" }}] }});
server.run().then(({{ port }}) => console.log("port", port));
"""

AZURITE = f"""
{NODE_UNTIL_STDIN_ENDS}
process.argv.splice(1, 0, "azurite-blob");
require("azurite/dist/src/blob/main.js");
"""

# sshd takes no port 0, so it serves connections that another has accepted, as it does below inetd.
SSHD = f"""
import socket, subprocess, sys, threading
def serve():
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        children[:] = [child for child in children if child.poll() is None]
        children.append(subprocess.Popen(sys.argv[1:], stdin=connection, stdout=connection))
        connection.close()
children = []
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
threading.Thread(target=serve, daemon=True).start()
{PYTHON_UNTIL_STDIN_ENDS}
"""

SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp internal-sftp
"""

# sshd as root wants a user and a folder of the machine that only its installation makes; as another user it wants
# neither, but lets in that user alone. So it runs as nobody, with the one capability to reach the files of the tests.
AS_NOBODY = "setpriv --reuid=nobody --regid=65534 --clear-groups --inh-caps=+dac_override --ambient-caps=+dac_override"


@contextlib.contextmanager
def _serve_moto(folder: Path) -> Iterator[Store]:
    with _run([sys.executable, "-c", MOTO], folder) as port:
        store = Store(name="s3-moto", url="s3://bucket", port=port, storage_options=_s3_options(port, "key", "secret"))
        store.filesystem(skip_instance_cache=True).mkdir("bucket")
        yield store


@contextlib.contextmanager
def _serve_s3rver(folder: Path) -> Iterator[Store]:
    with _run(["node", "-e", S3RVER, str(folder)], folder) as port:
        options = _s3_options(port, "S3RVER", "S3RVER")
        yield Store(name="s3-s3rver", url="s3://bucket", port=port, storage_options=options)


def _s3_options(port: int, key: str, secret: str) -> dict[str, Any]:
    return {"endpoint_url": f"http://127.0.0.1:{port}", "key": key, "secret": secret}


@contextlib.contextmanager
def _serve_azurite(folder: Path) -> Iterator[Store]:
    quiet = ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    with _run(["node", "-e", AZURITE, "--", "--blobPort", "0", "--location", str(folder), *quiet], folder) as port:
        # The account that Azurite always has, with its published key.
        account = "devstoreaccount1"
        key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{account};"
        )
        store = Store(name="azure", url="az://container", port=port, storage_options={"connection_string": connection})
        store.filesystem(skip_instance_cache=True).mkdir("container")
        yield store


@contextlib.contextmanager
def _serve_sftp(folder: Path) -> Iterator[Store]:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    config, files = folder / "sshd_config", folder / "files"
    config.write_text(SSHD_CONFIG.format(folder=folder))
    files.mkdir()
    command = [*(AS_NOBODY.split() if os.geteuid() == 0 else []), str(_sshd()), "-i", "-e", "-f", str(config)]
    with _run([sys.executable, "-c", SSHD, *command], folder, {"LD_LIBRARY_PATH": _debian_libraries()}) as port:
        user = "nobody" if os.geteuid() == 0 else subprocess.check_output(["id", "-un"], text=True).strip()
        options = {"key_filename": str(folder / "user_key"), "look_for_keys": False, "allow_agent": False}
        yield Store(name="sftp", url=f"sftp://{user}@127.0.0.1:{port}{files}", port=port, storage_options=options)


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:{DEBIAN}/usr/sbin")


def _debian_libraries() -> str:
    return ":".join(str(folder) for folder in DEBIAN.glob("usr/lib/*-linux-gnu*"))


@contextlib.contextmanager
def _run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """Runs a server, whose output goes to `folder`, until the block ends. The port that it has bound."""
    log = folder / "server.log"
    environ = {**os.environ, "NODE_PATH": str(NODE_MODULES), **(environment or {})}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield _wait_for_port(server, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


def _wait_for_port(server: subprocess.Popen[bytes], log: Path) -> int:
    until = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        if found := re.search(r"(?:^port |successfully listens on http://127\.0\.0\.1:)(\d+)$", log.read_text(), re.M):
            port = int(found[1])
            socket.create_connection(("127.0.0.1", port), timeout=START_SECONDS).close()
            return port
        time.sleep(0.02)
    raise RuntimeError(f"No server after {START_SECONDS:.0f} s, exit code {server.returncode}:\n{log.read_text()}")


SERVERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Store]]] = {
    "s3-moto": _serve_moto,
    "s3-s3rver": _serve_s3rver,
    "azure": _serve_azurite,
    "sftp": _serve_sftp,
}
NAMES = list(SERVERS)

MODULES = {"s3-moto": ("s3fs", "moto.server"), "s3-s3rver": ("s3fs",), "azure": ("adlfs",), "sftp": ("paramiko",)}
PACKAGES_OF_NODE = {"s3-s3rver": "s3rver", "azure": "azurite"}


def serve(name: str, folder: Path) -> contextlib.AbstractContextManager[Store]:
    """Runs the server with its files in `folder`, which is there and empty, and makes its bucket or container."""
    return SERVERS[name](folder)


def missing(name: str) -> str | None:
    """What has to be installed before `name` can be served."""
    for module in MODULES[name]:
        if find_spec(module.partition(".")[0]) is None:
            return f"{name} needs the Python package {module.partition('.')[0]}: make .venv"
    if (package := PACKAGES_OF_NODE.get(name)) and not (shutil.which("node") and (NODE_MODULES / package).is_dir()):
        return f"{name} needs {package}: install Node.js with npm, then: rm .venv/.installed; make .venv"
    if name == "sftp" and not (_sshd() and shutil.which("ssh-keygen")):
        return "sftp needs OpenSSH's sshd and ssh-keygen: apt-get install openssh-server openssh-client"
    return None


# --- Failures on the way to a server that speaks HTTP.


class Fault(enum.Enum):
    """What becomes of one request."""

    SLOW_DOWN = "503, without asking the server"
    FORBIDDEN = "403, without asking the server"
    RESET = "the connection is reset before the server sees the request"
    CUT = "the server gets half of the body, then both connections are reset"
    LOST_REPLY = "the server does what is asked, and the connection is reset instead of its answer"
    HANG = "no answer, until the proxy closes"


ANSWERS = {Fault.SLOW_DOWN: (503, "SlowDown"), Fault.FORBIDDEN: (403, "AccessDenied")}


@dataclasses.dataclass(kw_only=True)
class _Order:
    fault: Fault
    times: float
    method: str
    path: str


class FaultyProxy:
    """Passes HTTP requests to a server of this machine, and fails those that it was told to fail.

    A context manager. `store.through(proxy.port)` is the store behind it; `requests` are the methods and paths (with
    the query) that it has seen, the failed ones too.
    """

    def __init__(self, upstream_port: int) -> None:
        self.requests: list[str] = []
        self._orders: list[_Order] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._server = _ProxyServer(("127.0.0.1", 0), _ProxyHandler)
        self._server.proxy, self._server.upstream_port = self, upstream_port
        self.port: int = self._server.server_address[1]

    def fail(self, fault: Fault, *, times: float = float("inf"), method: str = "", path: str = "") -> None:
        """Fails the next `times` requests of this method (any) whose path and query match the expression `path`."""
        with self._lock:
            self._orders.append(_Order(fault=fault, times=times, method=method, path=path))

    def heal(self) -> None:
        """Takes back every `fail`."""
        with self._lock:
            self._orders.clear()

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), name="FaultyProxy").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()  # joins the threads of the connections

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for order in self._orders:
                if order.times > 0 and order.method in ("", method) and re.search(order.path, path):
                    order.times -= 1
                    return order.fault
        return None


class _ProxyServer(http.server.ThreadingHTTPServer):
    daemon_threads = False
    proxy: FaultyProxy
    upstream_port: int

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connections: set[socket.socket] = set()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.discard(request)

    def close_connections(self) -> None:
        """Wakes the threads that wait for the next request of a connection that is kept open."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a client that goes away in the middle is what this is for."""


class _ProxyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as the servers do
    server: _ProxyServer

    def _handle(self) -> None:
        fault = self.server.proxy._next_fault(self.command, self.path)
        if fault is Fault.RESET:
            return self._reset()
        body = self._body()
        if fault is Fault.HANG:
            self.server.proxy._closing.wait()
            return self._reset()
        if fault in ANSWERS:
            return self._refuse(*ANSWERS[fault])
        if fault is Fault.CUT:
            self._pass_half(body)
            return self._reset()
        status, headers, answer = self._pass(body)
        if fault is Fault.LOST_REPLY:
            return self._reset()
        return self._answer(status, headers, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _headers(self, body: bytes) -> dict[str, str]:
        """The client's, Host too, which its signature covers. The body is whole, and goes in one piece."""
        own = ("connection", "expect", "transfer-encoding", "content-length")
        return {k: v for k, v in self.headers.items() if k.lower() not in own} | {"Content-Length": str(len(body))}

    def _pass(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, self._headers(body))
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()

    def _pass_half(self, body: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.server.upstream_port)) as upstream:
            head = "".join(f"{name}: {value}\r\n" for name, value in self._headers(body).items())
            upstream.sendall(f"{self.command} {self.path} HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])
            _end_by_reset(upstream)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        own = ["connection", "transfer-encoding", "keep-alive", *([] if self.command == "HEAD" else ["content-length"])]
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} by FaultyProxy</Message></Error>"
        headers = [("Content-Type", "application/xml"), ("x-ms-error-code", code)]
        self._answer(status, headers, b"" if self.command == "HEAD" else body.encode())

    def _reset(self) -> None:
        self.close_connection = True
        _end_by_reset(self.connection)

    def log_message(self, *_: object) -> None:
        """Says nothing: `FaultyProxy.requests` has it."""


def _end_by_reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- The fixtures.


@pytest.fixture(scope="session", params=NAMES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A running server, started once. Session-scoped, so that it runs before a test's leaks are looked for."""
    if reason := missing(request.param):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with serve(request.param, tmp_path_factory.mktemp(request.param)) as store:
        yield store


folders = (f"test-{number}" for number in itertools.count())


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """A place of its own on every server. Its clients are closed after the test, in this process."""
    place = server.below(next(folders))
    if server.name == "sftp":  # the one that has folders
        with contextlib.closing(server.filesystem(skip_instance_cache=True).client) as client:
            client.open_sftp().mkdir(urlsplit(place.url).path)
    with closing_clients():
        yield place


@contextlib.contextmanager
def closing_clients() -> Iterator[None]:
    """Ends what the remote filesystems that the block opens would keep in this process: connections, threads."""
    loop = fsspec.asyn.get_loop()
    with ThreadPoolExecutor() as pool:  # adlfs hashes and reads in the loop's threads, which no one else would end
        loop.call_soon_threadsafe(loop.set_default_executor, pool)
        yield
        _forget_filesystems()
        loop.call_soon_threadsafe(loop.set_default_executor, ThreadPoolExecutor())


def _forget_filesystems() -> None:
    for protocol in {"s3", "az", "gs", "sftp"} & set(fsspec.registry):
        kind = fsspec.get_filesystem_class(protocol)
        for filesystem in list(kind._cache.values()):
            if protocol == "sftp":
                filesystem.client.close()
        kind.clear_instance_cache()

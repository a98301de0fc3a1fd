"""A Python with heavy imports preloaded: a server forks the programs that a client requests in place of Python.

Most of a short command's time goes into importing torch, transformers and Lightning. `warm_python` starts a server and
gives a command that takes Python's `-m MODULE`, `-c CODE` or a script, and its arguments. What runs has its own process,
arguments, environment, folder and standard streams; signals are forwarded and the exit status is that of the program.
Only variables that a library reads while it is imported are those of the server: tests of these, and of what happens
during imports, take `sys.executable`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
POLL = 0.01  # seconds between polls of the programs
NUMBER = 8  # bytes of a number on the socket


def main(role: str, path: str, *words: str) -> None:
    if role == "client":
        client(path, list(words))
        return
    import_all()
    gc.freeze()  # or each program would copy and traverse all of it at its end
    request = serve(path)
    if request is not None:  # in a separate process
        end(lambda: run(request))


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """Inside, the path of a program that takes Python's place."""
    import shlex
    import subprocess
    import tempfile
    from pathlib import Path

    program = Path(__file__)
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:  # a socket's path is short
        path, script = f"{folder}/socket", Path(folder, "python")
        command = shlex.join([sys.executable, "-IS", str(program), "client", path])
        script.write_text(f'#!/bin/sh\nWARM_PYTHON={shlex.quote(str(script))} exec {command} "$@"\n')
        script.chmod(0o755)
        with subprocess.Popen(
            [sys.executable, str(program), "server", path],
            cwd=program.parents[1],
            env=os.environ | {"PYTHONPATH": str(program.parents[1]), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as server:
            assert server.stdout is not None and server.stdin is not None
            assert server.stdout.readline() == b"ready\n"
            try:
                yield str(script)
            finally:
                server.stdin.close()


def client(path: str, words: list[str]) -> None:
    """Request a program, wait for its end and exit with its status."""
    if "submitit.local._local" in words:  # identifies its job by its own process ID
        os.execv(sys.executable, [sys.executable, *words])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        asked = {
            "executable": os.environ.pop("WARM_PYTHON"),
            "words": words,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "parent": os.getppid(),
            "client": os.getpid(),
        }
        request = json.dumps(asked).encode()
        socket.send_fds(connection, [len(request).to_bytes(NUMBER, "big")], [0, 1, 2])
        connection.sendall(request)
        pid = int.from_bytes(_receive(connection, NUMBER), "big")
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int.from_bytes(_receive(connection, NUMBER), "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def import_all() -> None:
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch.distributed  # noqa: F401
    import transformers.models.bert  # noqa: F401

    import fusion.analysis.initialization
    import fusion.cli.app
    import fusion.model.build
    import fusion.training.processes
    import fusion.training.stage  # noqa: F401


def serve(path: str) -> dict[str, Any] | None:
    """Fork for each request; returns it in the new process, and None once standard input is closed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    looks = selectors.DefaultSelector()
    looks.register(listener, selectors.EVENT_READ)
    looks.register(sys.stdin.fileno(), selectors.EVENT_READ)
    print("ready", flush=True)
    programs: dict[int, socket.socket] = {}
    while True:
        for key, _ in looks.select(POLL if programs else None):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                size, streams, _, _ = socket.recv_fds(connection, NUMBER, 3)
                request = json.loads(_receive(connection, int.from_bytes(size, "big")))
                if (pid := os.fork()) == 0:
                    for other in (listener, connection, *programs.values()):
                        other.close()
                    looks.close()
                    return request | {"streams": streams}
                for stream in streams:
                    os.close(stream)
                connection.sendall(pid.to_bytes(NUMBER, "big"))
                programs[pid] = connection
                looks.register(connection, selectors.EVENT_READ, pid)
            elif key.data is None:
                for pid in programs:
                    os.kill(pid, signal.SIGKILL)
                return None
            else:  # end of file: the client has ended
                looks.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)
        for pid in list(programs):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                connection = programs.pop(pid)
                if connection in [key.fileobj for key in looks.get_map().values()]:
                    looks.unregister(connection)
                    code = os.waitstatus_to_exitcode(status)
                    connection.sendall(code.to_bytes(NUMBER, "big", signed=True))
                connection.close()


def run(request: dict[str, Any]) -> None:
    """Become the program, as nearly as can be."""
    import runpy

    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    client = f"/proc/{request['client']}/stat"
    os.getppid = lambda: _parent(client) or request["parent"]
    words = request["words"]
    while words[0] in ("-u", "-I"):
        if words.pop(0) == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    for entry in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(0, entry)
            hook = os.path.join(entry, "sitecustomize.py")
            if os.path.exists(hook):
                runpy.run_path(hook)
    sys.executable = request["executable"]
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *words[2:]]
        namespace = sys.modules["__main__"].__dict__
        namespace["__spec__"] = None
        exec(compile(words[1], "<string>", "exec"), namespace)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _parent(stat: str) -> int | None:
    """The parent of the client: another one once that one is dead. None: there is no /proc."""
    try:
        with open(stat) as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def end(program: Callable[[], None]) -> NoReturn:
    """Run it and exit as the interpreter does, but for the second that freeing all modules would take."""
    code: Any = 0
    try:
        program()
    except SystemExit as asked:
        code = asked.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # joins what is no daemon
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        more = connection.recv(size - len(received))
        if not more:
            raise SystemExit("the fork server has ended")
        received += more
    return received


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The warm parent of local stages: it has imported the heavy libraries once and forks a child a stage.

It runs no tensor operation and starts no thread, so forking it is safe. Commands come as JSON lines on
standard input ({"id", "argv", "env"}), exits go as JSON lines to standard output ({"id", "code"}), with
the children's progress lines ({"id", "progress"}) between them. When standard input closes, which is when
the controller is gone, its children are killed and it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from typing import Any

PRELOAD = ("torch", "numpy", "pyarrow.parquet", "safetensors.torch", "PIL.Image", "diffusers", "transformers",
           "rsi_jobs.diffusion.unet", "rsi_jobs.stages.sample", "rsi_jobs.stages.score",
           "rsi_jobs.stages.select", "rsi_jobs.stages.finetune")  # fmt: skip
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere the closed pipe does it later."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve() -> None:
    """Fork a child for each command until standard input ends."""
    commands = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing but answers goes to the controller
    for name in PRELOAD:
        importlib.import_module(name)
    importlib.import_module("rsi_jobs.stages.attempt").versions()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(commands, selectors.EVENT_READ, "commands")
    selector.register(wake_read, selectors.EVENT_READ, "children")
    children: dict[int, str] = {}
    pending = b""
    send(answers, {"ready": os.getpid()})
    while True:
        for key, _ in selector.select():
            if key.data == "commands":
                chunk = os.read(commands.fileno(), 65536)
                if not chunk:
                    kill_all(children)
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    obey(json.loads(line), children, answers)
            elif key.data == "children":
                os.read(wake_read, 4096)
                reap(children, answers)
            else:
                forward(selector, key.fileobj, str(key.data), answers)
        for identity, read in _new_pipes:
            selector.register(read, selectors.EVENT_READ, identity)
        _new_pipes.clear()


_new_pipes: list[tuple[str, int]] = []


def obey(command: dict[str, Any], children: dict[int, str], answers: int) -> None:
    """Start or kill one child."""
    if "kill" in command:
        for pid, identity in children.items():
            if identity == command["kill"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        return
    read, write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os._exit(_child(command, parent, write, answers))
    os.close(write)
    children[pid] = command["id"]
    _new_pipes.append((command["id"], read))
    send(answers, {"id": command["id"], "pid": pid})


def _child(command: dict[str, Any], parent: int, progress: int, answers: int) -> int:
    code = 1
    try:
        die_with_parent()
        if os.getppid() != parent:  # the parent ended before prctl
            return 1
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(answers)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ.update(command.get("env", {}))
        os.environ["RSI_PROGRESS_FD"] = str(progress)
        argv = command["argv"]
        stage = importlib.import_module(argv[1])
        from rsi_jobs.stages.attempt import main

        code = main(argv[1].rpartition(".")[2], stage.work, argv[2:])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  a forked child must never return into the parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def reap(children: dict[int, str], answers: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        identity = children.pop(pid, None)
        if identity is not None:
            send(answers, {"id": identity, "code": os.waitstatus_to_exitcode(status)})


def forward(selector: selectors.BaseSelector, descriptor: Any, identity: str, answers: int) -> None:
    """Pass on a child's progress: the last whole line of what it wrote."""
    chunk = os.read(descriptor, 65536)
    if not chunk:
        selector.unregister(descriptor)
        os.close(descriptor)
        return
    lines = [line for line in chunk.split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
    if lines:
        send(answers, {"id": identity, "progress": json.loads(lines[-1])})


def send(descriptor: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(descriptor, json.dumps(message).encode() + b"\n")


def kill_all(children: dict[int, str]) -> None:
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    serve()

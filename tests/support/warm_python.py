"""A `python` that has imported the heavy libraries already: what a workflow of tiny jobs spends most of its time on.

`warm_environment()` puts a program called `python` first on the PATH. It hands `-m snakemake ...` and
`-m stillhouse...` to a server with the imports done, which forks a process for each; everything else it leaves to the
real interpreter. Command lines, files, exit codes and output are what they are without it. Not for tests that kill
processes: the program that is started is not the one that works.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path

PRELOADED = {
    "snakemake": (
        "snakemake.cli",
        "snakemake.api",
        "snakemake.dag",
        "snakemake.workflow",
        "snakemake_executor_plugin_slurm",
        "pandas",
        "pydantic",
        "omegaconf",
        "yaml",
    ),
    "stillhouse": (
        "torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "peft",
        "accelerate",
        "pandas",
        "pyarrow.parquet",
        "scipy.stats",
        "matplotlib.pyplot",
        "lm_eval.tasks",
        "omegaconf",
        "pydantic",
        "torch.utils.tensorboard",
    ),
}


@cache
def warm_environment() -> dict[str, str]:
    """What to lay over the environment of a command; the run's workers share the servers, which end with it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    # Workers end one by one; their parent ends last.
    owner = os.getppid() if run else os.getpid()
    directory = Path(tempfile.gettempdir()) / f"warm-python-{run}" if run else Path(tempfile.mkdtemp())
    program = directory / "bin" / "python"
    directory.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (directory / "started").mkdir()
        for name in PRELOADED:
            command = [sys.executable, __file__, str(directory / name), name, str(owner)]
            subprocess.Popen(command, start_new_session=True)
        scratch = program.with_name("python.new")
        scratch.parent.mkdir()
        scratch.write_text(
            f"#!{sys.executable} -ES\nimport runpy\nrunpy.run_path({str(Path(__file__))!r}, run_name='client')\n"
        )
        scratch.chmod(0o755)
        scratch.rename(program)
    while not program.exists():
        time.sleep(0.05)
    return {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "WARM_PYTHON": str(directory),
        "REAL_PYTHON": sys.executable,
    }


def client(arguments: list[str]) -> None:
    """Have the fitting server run the module, or become the real interpreter."""
    name = arguments[1].partition(".")[0] if arguments[:1] == ["-m"] else ""
    if name not in PRELOADED:
        os.execv(os.environ["REAL_PYTHON"], [os.environ["REAL_PYTHON"], *arguments])
    connection = socket.socket(socket.AF_UNIX)
    while True:
        try:
            connection.connect(f"{os.environ['WARM_PYTHON']}/{name}")
            break
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.05)
    request = json.dumps({"arguments": arguments[1:], "directory": str(Path.cwd()), "environment": dict(os.environ)})
    socket.send_fds(connection, [len(request.encode()).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request.encode())
    answer = connection.recv(4)
    sys.exit(int.from_bytes(answer, "big") if answer else 1)


def serve(address: str, name: str, owner: str) -> None:
    """Import, then fork a process for each request until the owner has ended."""
    for module in PRELOADED[name]:
        importlib.import_module(module)
    gc.freeze()  # No child searches, and so copies, what was imported.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)
    listener.settimeout(5)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while Path(f"/proc/{owner}").exists():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            connection.settimeout(None)
            supervise(connection)
            os._exit(0)
        connection.close()


def supervise(connection: socket.socket) -> None:
    """Run one request in a child and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    length, text = int.from_bytes(head, "big"), b""
    while len(text) < length:
        text += connection.recv(length - len(text))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os._exit(execute(**json.loads(text)))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall((code if code >= 0 else 128 - code).to_bytes(4, "big"))


def execute(arguments: list[str], directory: str, environment: dict[str, str]) -> int:
    """What `python -m` does with a module and its arguments; returns the exit code."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    # Its own folder, as any script's, is first; `-m` puts the working directory there, and PYTHONPATH behind it.
    given = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [directory, *given, *sys.path[1:]]
    sys.argv = [arguments[0], *arguments[1:]]
    code: object = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)  # type: ignore[call-overload]


if __name__ == "client":
    client(sys.argv[1:])
elif __name__ == "__main__":
    serve(*sys.argv[1:])

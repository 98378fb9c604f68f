"""Processes that start with torch, transformers and PEFT imported, and with nothing of this package.

One server imports them, once, and forks for each program: importing costs more than most programs that tests run.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["transformers.modeling_utils", "peft"])


def _main(program: str | Path, arguments: list[str], folder: Path, environment: dict[str, str], written: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(written / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["torch"].set_num_threads(1)
    sys.argv = ["-c", *arguments]
    if isinstance(program, Path):
        sys.argv[0], sys.path[0] = str(program), str(program.parent)
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(program, {"__name__": "__main__"})


class Program:
    """One that runs: the text of it, or a file.

    Args:
        folder: that it works in; None: this process's.
        environment: variables beside this process's own.
    """

    def __init__(
        self,
        program: str | Path,
        *arguments: object,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.written = tempfile.TemporaryDirectory()
        variables = {**os.environ, **(environment or {})}
        told = (program, [str(a) for a in arguments], folder or Path.cwd(), variables, Path(self.written.name))
        self.process = START.Process(target=_main, args=told)
        self.process.start()

    def done(self, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """How it ended and what it said; killed if it takes longer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with self.written:
            said = [Path(self.written.name, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *said)


def two(
    program: Path, *arguments: object, forked: bool = True, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """A file as two processes that meet on this machine, with what torchrun sets and `variables`: how both ended.

    Accelerate's own launcher starts several processes on CPUs through MPI only. `forked`: from the server; DeepSpeed
    waits forever in such processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **variables}
    each = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    if forked:
        return [program.done(1200) for program in [Program(program, *arguments, environment=one) for one in each]]
    command = [sys.executable, str(program), *map(str, arguments)]
    path = os.pathsep.join(filter(None, sys.path))
    said = [tempfile.TemporaryFile("w+") for _ in each]  # noqa: SIM115 - pipes may fill up
    both = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **one}, stdout=file, stderr=file)
        for one, file in zip(each, said, strict=True)
    ]
    ended = [process.wait(600) for process in both]
    for file in said:
        file.seek(0)
    return [subprocess.CompletedProcess(command, code, "", f.read()) for code, f in zip(ended, said, strict=True)]


def run(program: str | Path, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """A program from start to end; arguments as for `Program`."""
    return Program(program, *arguments, **options).done()

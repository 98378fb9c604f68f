"""A script run by two processes (gloo), as torchrun would: accelerate's own launcher starts several processes on CPUs
through MPI only."""

import socket
from pathlib import Path

import torch

import fresh


def run(script: Path, folder: Path, **environment: str) -> list[dict]:
    """What each of them saved as `rank0.pt` and `rank1.pt` in the folder, which is the script's argument; with what
    both said among that of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    each = [{**meeting, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    running = [fresh.Program(script, folder, environment=variables) for variables in each]
    done = [program.done(1200) for program in running]
    for process in done:
        assert process.returncode == 0, process.stderr[-4000:]
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    found[0]["stderr"] = done[0].stderr + done[1].stderr
    return found

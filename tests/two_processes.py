"""A script run by two processes (gloo), and what each of them found."""

from pathlib import Path

import torch

import fresh


def run(script: Path, folder: Path, **variables: str) -> list[dict]:
    """What each of them saved as `rank0.pt` and `rank1.pt` in the folder, which is the script's argument; with what
    both said among that of the first."""
    done = fresh.two(script, folder, **variables)
    for process in done:
        assert process.returncode == 0, process.stderr[-4000:]
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    found[0]["stderr"] = done[0].stderr + done[1].stderr
    return found

"""Folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_empty(folder: str | os.PathLike) -> Path:
    """The folder to write to.

    Raises:
        FileExistsError: it has something in it, or is a file.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty: give a new folder for the checkpoint")
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` whose files move there at the end; after an exception they are gone instead."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        target.mkdir(exist_ok=True)
        for file in staging.iterdir():
            file.replace(target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

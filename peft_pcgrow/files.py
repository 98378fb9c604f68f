"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
import uuid
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


def write_whole(path: str | os.PathLike, *chunks: bytes | memoryview) -> None:
    """Write a file, and the folders above it. Whoever reads it meanwhile, or after an interruption, finds what was
    there before or all of this."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # not by tempfile, whose files could be read by their owner alone
    staging = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        with staging.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)

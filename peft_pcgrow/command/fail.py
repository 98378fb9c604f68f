"""How the command fails: exit codes, and errors in a line."""

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

# documented in the command's help: what was given cannot be used; something failed on the way; Ctrl-C
USAGE, FAILED, INTERRUPTED = 2, 1, 130
# what no other arguments would help against: a full disk, a broken one, a used up quota
MACHINE = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class Unusable(ValueError):
    """What was given cannot be used."""


@contextmanager
def exit_codes(goes_on: bool = False) -> Iterator[TextIO]:
    """Inside, errors that are about what was given end the process with `USAGE` and one line, those of a disk or
    a network with `FAILED` and one line, an interruption with `INTERRUPTED`; all others with a traceback and `FAILED`.
    About what was given are those of files, and values that this package refuses; others, from deep within a run, are
    not.

    Yields standard output: what anybody else prints inside goes to standard error. `goes_on`: the same command would,
    where it was interrupted.
    """
    stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield stdout
    except KeyboardInterrupt:
        print("interrupted" + ": the same command on the same folder goes on from here" * goes_on, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        files = any(isinstance(each, OSError) for each in (error, error.__cause__))
        if not files and not _raised_here(error):
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        machine = any(getattr(each, "errno", None) in MACHINE for each in (error, error.__cause__))
        machine |= isinstance(error, ConnectionError)
        raise SystemExit(FAILED if machine else USAGE) from None


def _raised_here(error: BaseException) -> bool:
    """Whether a file of this package raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])

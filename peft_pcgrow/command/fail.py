"""How the command fails: exit codes, and errors in a line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# documented in the command's help: what was given cannot be used; something failed on the way; Ctrl-C
USAGE, FAILED, INTERRUPTED = 2, 1, 130


class Unusable(ValueError):
    """What was given cannot be used."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Inside, errors that are about what was given end the process with `USAGE` and one line, an interruption with
    `INTERRUPTED`; all others with a traceback and `FAILED`."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: the same command on the same folder goes on from here", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE) from None

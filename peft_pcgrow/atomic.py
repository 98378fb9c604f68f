"""Changes of a model that happen altogether or not at all, whatever interrupts them (Ctrl-C too)."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def all_or_nothing() -> Iterator[list[Callable[[], None]]]:
    """Gives a list to put there, before each step is taken, what undoes it; after any exception all of it is called,
    the last first. What undoes a step must also do where the step was half taken, or not at all."""
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        with _undisturbed():
            for step in reversed(undo):
                step()
        raise


def completed(step: Callable[[], None]) -> None:
    """Call `step`; if that is interrupted, once more, to its end. It must be able to go on from anywhere."""
    try:
        step()
    except BaseException:
        with _undisturbed():
            step()
        raise


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C does nothing: an earlier one is about to be raised anyway."""
    before = signal.getsignal(signal.SIGINT)
    # only the main thread gets signals, or may say what they do; None: not set from Python
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

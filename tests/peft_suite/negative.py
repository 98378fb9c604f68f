"""Deliberate faults: a suite that passes with one of them would prove nothing."""

from typing import Any

from peft_pcgrow.locate import parts


def write_nothing(*_: Any) -> None:
    """In the place of `parts.write_grown`: merging notes that it has merged, and writes nothing."""


FAULTS = {"merge": (parts, "write_grown", write_nothing)}


def break_it(fault: str) -> None:
    """Put a fault into this process."""
    setattr(*FAULTS[fault])

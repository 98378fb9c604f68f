"""Lines that the package says: through logging, and on standard error where nobody configured it."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

logger = logging.getLogger("peft_pcgrow")


def ends(things: Sequence[Any], most: int = 10) -> list[str]:
    """Things in words, the first and the last of them if there are more than `most`, and how many lie between."""
    if len(things) <= most:
        return [str(thing) for thing in things]
    first, last = things[: most - most // 2], things[len(things) - most // 2 :]
    return [*map(str, first), f"... {len(things) - most} more ...", *map(str, last)]


def say(text: str) -> None:
    """Say a line, once over all processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    if not logger.handlers and not logging.getLogger().handlers and logger.level == logging.NOTSET:
        # nobody configured logging: a line on standard error is what users of a Trainer expect
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    logger.info(text)

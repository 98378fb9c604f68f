"""Lines that the package says: through logging, and on standard error where nobody configured it."""

import logging
import sys

import torch.distributed as dist

logger = logging.getLogger("peft_pcgrow")


def say(text: str) -> None:
    """Say a line, once over all processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    if not logger.handlers and not logging.getLogger().handlers and logger.level == logging.NOTSET:
        # nobody configured logging: a line on standard error is what users of a Trainer expect
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    logger.info(text)

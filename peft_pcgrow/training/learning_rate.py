"""A learning rate for Muon on grown experts, found on a few batches by how far the first step may go.

Rates that are best on a small model destroy a larger one, and neither the sizes of its weights nor those of its
gradients tell by how much. What does, within a factor of two from 4 to 135 million parameters (see RESULTS.md), is the
loss along the first update: its minimum lies about eight times as far as the rate that trains best.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.engines import TAKEN, inside, is_shared_out, stepped_by
from peft_pcgrow.architectures.sharded import check_whole, local
from peft_pcgrow.maps.batches import (
    IGNORED,
    Batch,
    check_causal,
    check_gradients,
    loss_sum,
    read_batches,
    settled_losses,
)
from peft_pcgrow.maps.distributed import everywhere, gathered, summed, together, turn
from peft_pcgrow.training.host import WAITING
from peft_pcgrow.training.muon import banks_of, update_of

# the rate as a share of the best single step
SHARE = 1 / 8
# the shortest step that is tried
FIRST = 2.0**-12
# doublings of it
TRIES = 16
# a rise of the loss, relative, beyond which no longer step is tried; routes that flip make small ones anywhere
TOO_FAR = 0.02


def find_lr(
    model: nn.Module,
    batches: Any,
    *,
    batch_size: int = 8,
    tokenizer: Callable[..., Any] | None = None,
) -> float:
    """The learning rate for `create_pcgrow_optimizer(model, lr=...)`: an eighth of the step along the first update that
    lowers the loss most.

    The update is that of half of the batches, the loss that of the others; weights, gradients, mode and random numbers
    are left as they were. What is protected is not taken out of the update: a first step without its main part may go
    several times as far, which is too far for those that follow (see RESULTS.md). Costs a training step on one half and
    5 to 15 forwards of the other. Under torch.distributed the batches are those of all processes, in the order of their
    ranks; each computes a share, and all get the rate that one would find on all of them. All must call.

    Args:
        model (nn.Module): after `get_peft_model(model, PCGrowConfig(...))`.
        batches: text of the domain, as for `measure_errors`; 2 batches at least, each as large as those of a training
            step.
        batch_size (int): texts a batch, of those that are not batched yet.
        tokenizer (callable): makes token ids of strings.

    Returns:
        The rate, what a matrix's update of unit spectral norm is multiplied by.

    Raises:
        ValueError: nothing grown trains, DeepSpeed's ZeRO has the model already or an optimizer steps it inside the
            sweep, fewer than two batches, nothing to predict in them, no token of theirs that reaches what trains, or
            no step along the update that lowers the loss (the batches have nothing in common, or there is nothing left
            to learn from them).
        RuntimeError: another process failed.

    Example:
        >>> grown = get_peft_model(model, PCGrowConfig(locus={1: [0, 4]}))
        >>> 0.001 < find_lr(grown, batches) < 1
        True
    """
    model = inside(model)
    with together("find_lr"):
        check_causal(model, shared_out=True)
        check_gradients(model)
        check_whole(model, "find_lr", shared_out=True)
        if (engine := stepped_by(model)) is not None:
            raise ValueError(TAKEN.format(engine, "find_lr"))
        banks = banks_of(model)
        if any(getattr(bank, WAITING) for bank in banks):
            raise ValueError("an optimizer steps inside the sweep (inside_sweep=True): find its rate before it is made")
    with _put_back(model, banks) as starts:
        with together("find_lr"):
            mine = list(read_batches(model, batches, batch_size=batch_size, tokenizer=tokenizer))
        read = everywhere(mine, model)
        if len(read) < 2:
            raise ValueError(
                f"find_lr takes a step on some batches and looks at others, so it needs 2 at least, got {len(read)}"
            )
        halves = read[: len(read) // 2], read[len(read) // 2 :]
        if not all(any(bool((target != IGNORED).any()) for _, target, _ in half) for half in halves):
            raise ValueError("one half of the batches has no token to predict (all labels are -100): give others")
        number, count = turn(model)
        shares = [half[number::count] for half in halves]
        updates = _updates(model, banks, shares[0])

        def loss(step: float) -> float:
            with together("find_lr"), torch.no_grad():
                for bank, start, update in zip(map(local, banks), starts, updates, strict=True):
                    bank.copy_(start).add_(update, alpha=-step)
                found = loss_sum(model, shares[1])
            total, count = map(sum, zip(*gathered(found), strict=True))
            return total / count

        return SHARE * best_step(loss)


def best_step(loss: Callable[[float], float]) -> float:
    """Where the loss along a direction is least: the lowest of steps that double until it has risen too far, refined by
    the parabola through its neighbours.

    Raises:
        ValueError: no step lowers it.
    """
    tried = {0.0: loss(0.0)}
    for power in range(TRIES):
        tried[FIRST * 2**power] = value = loss(FIRST * 2**power)
        if not value <= (1 + TOO_FAR) * tried[0.0]:
            break
    least = min((value, step) for step, value in tried.items() if math.isfinite(value))[1]
    if not least:
        raise ValueError(
            "no step along the first update lowers the loss of the other batches: give larger batches, that are alike, "
            "or there is nothing left to learn from them"
        )
    before, after = (0.0 if least == FIRST else least / 2), 2 * least
    if not math.isfinite(tried.get(after, math.inf)):
        return least
    (x0, y0), (x1, y1), (x2, y2) = ((x, tried[x]) for x in (before, least, after))
    rise, fall = (y2 - y1) / (x2 - x1), (y1 - y0) / (x1 - x0)
    curved = rise - fall
    return least if curved <= 0 else (x0 + x1) / 2 - fall * (x2 - x0) / (2 * curved)


def _updates(model: nn.Module, banks: list[nn.Parameter], batches: list[Batch]) -> list[Tensor]:
    """The first update of each bank, as Muon would take it at a rate of one, without protection.

    Args:
        batches: this process's share; all must call.
    """
    with together("find_lr"):
        model.train()
        with settled_losses(model) as settle_batch:
            for inputs, target, _ in batches:
                settle_batch(inputs, target)
    here = {str(place): local(bank.grad) for place, bank in enumerate(banks) if bank.grad is not None}
    gradients = here if is_shared_out(model) else summed(here, banks[0].device)
    updates = [
        update_of(gradients[str(place)].to(bank.device, copy=True))
        if str(place) in gradients
        else torch.zeros_like(local(bank))
        for place, bank in enumerate(banks)
    ]
    if not any(gathered(any(bool(update.any()) for update in updates))):
        raise ValueError(
            "no token of the first half of the batches reaches what trains: give text of the domain, more of it, or "
            "check what the adapter grows"
        )
    return updates


@contextmanager
def _put_back(model: nn.Module, banks: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Inside, gradients are empty, and copies of the banks are at hand; afterwards all is as it was."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    starts = [local(bank.detach()).clone() for bank in banks]
    devices = sorted({str(p.device) for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    try:
        for p, _ in gradients:
            p.grad = None
        with torch.random.fork_rng(devices, device_type=devices[0].split(":")[0] if devices else "cuda"):
            yield starts
    finally:
        with torch.no_grad():
            for bank, start in zip(map(local, banks), starts, strict=True):
                bank.copy_(start)
        for p, gradient in gradients:
            p.grad = gradient
        for module, training in modes.items():
            module.training = training

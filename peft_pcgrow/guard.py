"""Say what trains, refuse steps that are not finite, and notice experts that silently do not move."""

import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_pcgrow.layer import PCGrowExperts

logger = logging.getLogger("peft_pcgrow")
_guards: "weakref.WeakSet[TrainingGuard]" = weakref.WeakSet()
_hooked = False
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TrainingGuard:
    """Watches one model's banks through the optimizer's own step hooks, whatever optimizer and loop the user has.

    Args:
        layers: gives the model's tuner layers.
        summary: gives the line said when training starts.
    """

    def __init__(self, layers: Callable[[], list[PCGrowExperts]], summary: Callable[[], str]):
        self.layers, self.summary = layers, summary
        self.rearm()
        _guards.add(self)
        _hook_optimizers()

    def rearm(self) -> None:
        """Announce and check again, after the trainable adapters changed."""
        self.announced = self.checked = self.stepped = False
        self.before: dict[int, Tensor] = {}
        self.owned: set[int] = set()

    def training_forward(self) -> None:
        """Called at the start of each forward that trains."""
        if not self.announced:
            self.announced = True
            for layer in self.layers():
                layer.watch, layer.seen = True, {}
            _say(self.summary())
        elif self.stepped and not self.checked:
            self._finish([weight for _, _, weight in self._banks() if id(weight) not in self.owned])

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        mine = [(layer, name, weight) for layer, name, weight in self._banks() if id(weight) in rates]
        self._refuse_nonfinite(mine)
        if not self.checked:
            # a warm-up's first step may have a rate of zero: the check waits for one that moves something
            moving = [weight for _, _, weight in mine if rates[id(weight)] > 0]
            self.before |= {id(weight): _signature(weight) for weight in moving if weight.numel()}

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.stepped = True
        if self.checked or not self.before:
            return
        self.owned |= set(self.before)
        self._finish([weight for _, _, weight in self._banks() if id(weight) in self.before])

    def _finish(self, weights: list[nn.Parameter]) -> None:
        """Raise if a node in `weights` that an error reached is where it was before the step."""
        still = []
        known = {id(weight) for weight in weights}
        for layer, adapter, weight in self._banks():
            if id(weight) not in known or adapter not in layer.seen or not weight.numel():
                continue
            moved = _signature(weight) != self.before[id(weight)] if id(weight) in self.before else None
            for place, expert in enumerate(layer.grown[adapter]):
                if layer.seen[adapter][place] > 0 and (moved is None or not moved[place]):
                    still.append((layer.layer_index, expert, id(weight) in self.owned))
        self.before = {}
        if still:
            nodes = ", ".join(f"{layer}.{expert}" for layer, expert, _ in sorted(set(still)))
            hint = (
                "its learning rate may be too small for the dtype"
                if all(owned for *_, owned in still)
                else "no optimizer holds its weights: create the optimizer after get_peft_model"
            )
            raise RuntimeError(
                f"after the first optimizer step, located node(s) {nodes} that received error have not moved; {hint}"
            )
        if self.owned >= {id(weight) for _, _, weight in self._banks()}:
            self.checked = True
            for layer in self.layers():
                layer.watch, layer.seen = False, {}

    def _refuse_nonfinite(self, banks: list[tuple[PCGrowExperts, str, nn.Parameter]]) -> None:
        graded = [(layer, name, weight.grad) for layer, name, weight in banks if weight.grad is not None]
        if not graded:
            return
        finite = torch.stack([torch.isfinite(grad).all().cpu() for *_, grad in graded])
        if not bool(finite.all()):
            layer, name, grad = next(entry for entry, good in zip(graded, finite, strict=True) if not good)
            broken = (~torch.isfinite(grad.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
            experts = [layer.grown[name][place] for place in broken]
            raise FloatingPointError(
                f"the gradient of layer {layer.layer_index}, experts {experts} (adapter {name!r}) is NaN or infinite: "
                "the step is refused and no weight has changed. Look at the loss of this batch, or lower the learning rate"
            )

    def _banks(self) -> Iterator[tuple[PCGrowExperts, str, nn.Parameter]]:
        for layer in self.layers():
            for adapter in layer.active_banks():
                for weight in layer.bank(adapter).values():
                    if weight.requires_grad:
                        yield layer, adapter, weight


def _signature(weight: Tensor) -> Tensor:
    """One number per expert that changes when a weight does: the sum of the bit patterns, `[G]`, without a copy."""
    return weight.detach().reshape(weight.shape[0], -1).view(_BITS[weight.element_size()]).sum(dim=1, dtype=torch.int64)


def _hook_optimizers() -> None:
    global _hooked
    if not _hooked:
        _hooked = True

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for guard in list(_guards):
                guard.before_step(optimizer)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for guard in list(_guards):
                guard.after_step(optimizer)

        register_optimizer_step_pre_hook(before)
        register_optimizer_step_post_hook(after)


def _say(text: str) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    if not logger.handlers and not logging.getLogger().handlers and logger.level == logging.NOTSET:
        # nobody configured logging: a line on standard error is what users of a Trainer expect
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    logger.info(text)

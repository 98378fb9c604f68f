"""Say what trains, refuse steps that are not finite, and notice experts that silently do not move."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_pcgrow import experts
from peft_pcgrow.layer import PCGrowExperts
from peft_pcgrow.protect import keep_off
from peft_pcgrow.say import say

_guards: "weakref.WeakSet[TrainingGuard]" = weakref.WeakSet()
_hooked = False
# layer, expert, and what a slice of a bank is called
Node: TypeAlias = tuple[int, int, str]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TrainingGuard:
    """Watches one model's banks through the optimizer's own step hooks, whatever optimizer and loop the user has.

    Args:
        model: whose parameters tell this model's optimizers from others.
        layers: gives the model's tuner layers.
        summary: gives the line said when training starts.
    """

    def __init__(self, model: nn.Module, layers: Callable[[], list[PCGrowExperts]], summary: Callable[[], str]):
        self.model, self.layers, self.summary = model, layers, summary
        self._watch()

    def _watch(self) -> None:
        self.rearm()
        _guards.add(self)
        _hook_optimizers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copied model has parameters of its own: its guard starts afresh
        self.__dict__.update(state)
        self._watch()

    def rearm(self) -> None:
        """Announce and check again, after the trainable adapters changed."""
        self.announced = False
        # by id of a bank's weight: its experts that an error reached, and its bits, before its first step
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.checked: set[int] = set()
        # nodes that an error reached, by id of their weight, while an optimizer of this model stepped without them
        self.left_out: dict[int, list[Node]] = {}
        # by id of a bank's weight: its part along the directions that updates are kept off
        self.fixed: dict[int, Tensor] = {}

    def training_forward(self) -> None:
        """Called at the start of each forward that trains."""
        if not self.announced:
            self.announced = True
            say(self.summary())
        if self.left_out:
            nodes = [node for left_out in self.left_out.values() for node in left_out]
            self.left_out = {}
            _raise_unmoved(nodes, "no optimizer holds its weights: create the optimizer after get_peft_model")

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return  # a GradScaler is at work, and a fused optimizer skips this step by itself
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        graded = [(*bank, bank[2].grad) for bank in self._banks() if bank[2].grad is not None]
        mine = [entry for entry in graded if id(entry[2]) in rates]
        _refuse_nonfinite(mine)
        for layer, adapter, weight, gradient in mine:
            self._protect(layer, adapter, weight, gradient)
            self.left_out.pop(id(weight), None)
            # a warm-up's first step may have a rate of zero: the check waits for one that moves something
            if id(weight) not in self.checked and rates[id(weight)] > 0 and weight.numel():
                self.before[id(weight)] = _reached(gradient), _bits(weight)
        if len(mine) < len(graded) and any(id(p) in rates for p in self.model.parameters()):
            for layer, adapter, weight, gradient in graded:
                if id(weight) not in rates and id(weight) not in self.checked:
                    places = _reached(gradient).nonzero().flatten().tolist()
                    self.left_out[id(weight)] = [layer.node(adapter, weight, place) for place in places]

    @torch.no_grad()
    def _protect(self, layer: PCGrowExperts, adapter: str, weight: nn.Parameter, gradient: Tensor) -> None:
        """Before a step: take the kept-off directions out of the gradient, and note what they weigh in the donors."""
        if not layer.is_protected(adapter):
            return
        stack = layer.stack_of(adapter, weight)
        directions, transposed = layer.directions(adapter, stack), layer.base_layer.is_transposed
        if id(weight) not in self.fixed:
            if experts.is_packed(layer.base_layer):
                # the donors may have been read before they were packed; those parts of their copies never moved
                donors = weight.detach().clone()
            else:
                donors = layer.donors(layer.births[adapter])[stack].to(weight.device, weight.dtype)
            if directions is not None:
                donors = (donors.mT if transposed else donors) @ directions.to(weight.device, weight.dtype)
            self.fixed[id(weight)] = donors
        if directions is None:
            gradient.zero_()  # a bias: its input is 1 for all text
        else:
            keep_off(gradient, directions, None, transposed)
            if directions.shape[1] == directions.shape[2]:
                # all directions of a small block: what rounding leaves is no error that has to move anything
                gradient[directions.any(dim=1).all(dim=1).to(gradient.device)] = 0

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        still = []
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer, adapter, weight in self._banks() if self.fixed or self.before else ():
            if id(weight) in self.fixed and id(weight) in stepped:
                # whatever the optimizer made of the gradient (Adam's scales, weight decay), those directions stay
                directions = layer.directions(adapter, layer.stack_of(adapter, weight))
                if directions is None:
                    weight.copy_(self.fixed[id(weight)])
                else:
                    keep_off(weight, directions, self.fixed[id(weight)], layer.base_layer.is_transposed)
            if id(weight) in self.before:
                reached, bits = self.before.pop(id(weight))
                self.checked.add(id(weight))
                for place in (reached & (_bits(weight) == bits)).nonzero().flatten().tolist():
                    still.append(layer.node(adapter, weight, place))
        if still:
            _raise_unmoved(still, "its learning rate may be too small for the dtype of the bank")

    def _banks(self) -> Iterator[tuple[PCGrowExperts, str, nn.Parameter]]:
        for layer in self.layers():
            for adapter in layer.active_banks():
                for weight in layer.bank(adapter).values():
                    if weight.requires_grad:
                        yield layer, adapter, weight


def _refuse_nonfinite(graded: list[tuple[PCGrowExperts, str, nn.Parameter, Tensor]]) -> None:
    if not graded:
        return
    device = graded[0][-1].device
    finite = torch.stack([torch.isfinite(gradient).all().to(device) for *_, gradient in graded])
    if not bool(finite.all()):
        layer, adapter, weight, gradient = next(entry for entry, good in zip(graded, finite, strict=True) if not good)
        broken = (~torch.isfinite(_rows(gradient)).all(dim=1)).nonzero().flatten().tolist()
        nodes = [layer.node(adapter, weight, place) for place in broken]
        whole = layer.births[adapter].pieces is None
        named = f"layer {layer.layer_index}, experts {[node[1] for node in nodes]}" if whole else _names(nodes)
        raise FloatingPointError(
            f"the gradient of {named} (adapter {adapter!r}) is NaN or infinite: the step is refused and no weight has "
            "changed. Look at the loss of this batch, or lower the learning rate"
        )


def _rows(bank: Tensor) -> Tensor:
    return bank.detach().reshape(bank.shape[0], -1)


def _bits(weight: Tensor) -> Tensor:
    """One number per expert that changes when a weight does: the sum of the bit patterns, `[G]`, without a copy."""
    return _rows(weight).view(_BITS[weight.element_size()]).sum(dim=1, dtype=torch.int64)


def _reached(gradient: Tensor) -> Tensor:
    """Which experts of a bank an error came to, `[G]`."""
    return _rows(gradient).any(dim=1)


def _names(nodes: list[Node]) -> str:
    return ", ".join(name for *_, name in sorted(set(nodes)))


def _raise_unmoved(nodes: list[Node], why: str) -> None:
    raise RuntimeError(
        f"after the first optimizer step, located node(s) {_names(nodes)} that received error have not moved; {why}"
    )


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

"""Say what trains, refuse steps that are not finite, and notice experts that silently do not move.

torch calls the hooks for every optimizer of the process. Nothing is asked of one but which parameters it holds, until
some of them are known to be this model's.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_pcgrow import experts
from peft_pcgrow.layer import PCGrowExperts
from peft_pcgrow.plain_weight import check_whole
from peft_pcgrow.protect import keep_off
from peft_pcgrow.say import ends, say
from peft_pcgrow.without_rows import RowsMet

_guards: "weakref.WeakSet[TrainingGuard]" = weakref.WeakSet()
_hooked = False
# layer, expert, and what a slice of a bank is called
Node: TypeAlias = tuple[int, int, str]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# steps that a bank may stand still in while its optimizer moves others, or does not say its rate
PATIENCE = 32
NOT_FINITE = (
    "the gradient of {} is NaN or infinite: the step is refused and no weight has changed. Look at the loss of this "
    "batch, or lower the learning rate"
)


@dataclass
class _Start:
    """A bank before its first steps: its experts' bits, which of them an error reached, the steps it stood still."""

    bits: Tensor
    reached: Tensor
    waited: int = 0


class TrainingGuard:
    """Watches one model's banks through the optimizers' own step hooks, whatever optimizers and loop the user has.

    Args:
        model: whose parameters tell this model's optimizers from others.
        layers: gives the model's tuner layers.
        summary: gives the line said when training starts.
    """

    def __init__(self, model: nn.Module, layers: Callable[[], list[PCGrowExperts]], summary: Callable[[], str]):
        self.model, self.layers, self.summary = model, layers, summary
        self._ids = {id(p) for p in model.parameters()}
        self.rows_met = RowsMet()
        self._watch()

    def _watch(self) -> None:
        self.rearm()
        _guards.add(self)
        _hook_optimizers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copied model has parameters of its own, and not all of them yet: its guard starts afresh
        self.__dict__.update(state, _ids=set())
        self._watch()

    def rearm(self) -> None:
        """Announce and check again, after the trainable adapters changed."""
        self.rows_met.forget()
        self.announced = False
        # by id of a bank's weight, until it is seen to move
        self.starts: dict[int, _Start] = {}
        self.checked: set[int] = set()
        # banks that some optimizer holds
        self.held: set[int] = set()
        # by id, the bits of a bank that an error reached, and its nodes, while an optimizer of this model stepped
        # without it
        self.left_out: dict[int, tuple[Tensor, list[Node]]] = {}
        # by id of a bank's weight: its part along the directions that updates are kept off
        self.fixed: dict[int, Tensor] = {}

    def training_forward(self) -> None:
        """Called at the start of each forward that trains."""
        if not self.announced:
            check_whole(self.model)
            self.announced = True
            self._ids = {id(p) for p in self.model.parameters()}
            say(self.summary())
        if self.left_out:
            self._report_left_out()

    def _report_left_out(self) -> None:
        left_out, self.left_out = self.left_out, {}
        # another optimizer may have its turn later
        self.held |= self._ids & _held_anywhere()
        banks = [bank for bank in self._banks() if bank[2].requires_grad]
        with_some = {adapter for _, adapter, weight in banks if id(weight) in self.held}
        nodes: dict[bool, list[Node]] = {True: [], False: []}
        for _, adapter, weight in banks:
            bits, reached = left_out.get(id(weight), (None, []))
            if bits is not None and id(weight) not in self.held and torch.equal(_bits(weight), bits):
                nodes[adapter in with_some] += reached
                self.checked.add(id(weight))
        if nodes[False]:
            _raise_unmoved(nodes[False], "no optimizer holds its weights: create the optimizer after get_peft_model")
        if nodes[True]:
            warnings.warn(
                f"located node(s) {_names(nodes[True])} received error, but no optimizer holds their weights: they do "
                "not train. Give an optimizer all parameters that require a gradient, or grow fewer nodes",
                stacklevel=2,
            )

    def is_mine(self, optimizer: Any) -> bool:
        """Whether an optimizer holds a parameter of this model."""
        groups = getattr(optimizer, "param_groups", ())
        return any(id(p) in self._ids for group in groups for p in group.get("params", ()))

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return  # a GradScaler is at work, and a fused optimizer skips this step by itself
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        banks = list(self._banks())
        graded = [(*bank, bank[2].grad) for bank in banks if bank[2].grad is not None]
        mine = [entry for entry in graded if id(entry[2]) in groups]
        self._refuse_nonfinite(optimizer, mine)
        self.rows_met.before_step(mine)
        self.held |= {id(weight) for *_, weight in banks if id(weight) in groups}
        for layer, adapter, weight, gradient in mine:
            self._protect(layer, adapter, weight, gradient)
            self.left_out.pop(id(weight), None)
            # a warm-up's first step may have a rate of zero: the check waits for one that moves something
            if id(weight) not in self.checked and _moves(groups[id(weight)]) is not False and weight.numel():
                start = self.starts.setdefault(id(weight), _Start(_bits(weight), _reached(gradient)))
                start.reached |= _reached(gradient)
        for layer, adapter, weight, gradient in graded if len(mine) < len(graded) else ():
            if id(weight) not in self.held | self.checked | self.left_out.keys():
                places = _reached(gradient).nonzero().flatten().tolist()
                self.left_out[id(weight)] = _bits(weight), [layer.node(adapter, weight, place) for place in places]

    def _refuse_nonfinite(
        self, optimizer: torch.optim.Optimizer, graded: list[tuple[PCGrowExperts, str, nn.Parameter, Tensor]]
    ) -> None:
        """Raise FloatingPointError for a gradient of this model that is not finite, before anything has changed."""
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return
        device = held[0].grad.device
        finite = torch.stack([torch.isfinite(_dense(p.grad)).all().to(device) for p in held])
        if bool(finite.all()):
            return
        broken = {id(p) for p, good in zip(held, finite.tolist(), strict=True) if not good}
        for layer, adapter, weight, gradient in graded:
            if id(weight) in broken:
                places = (~torch.isfinite(_rows(gradient)).all(dim=1)).nonzero().flatten().tolist()
                nodes = [layer.node(adapter, weight, place) for place in places]
                whole = layer.births[adapter].pieces is None
                listed = ", ".join(ends([node[1] for node in nodes]))
                named = f"layer {layer.layer_index}, experts [{listed}]" if whole else _names(nodes)
                raise FloatingPointError(NOT_FINITE.format(f"{named} (adapter {adapter!r})"))
        for name, parameter in self.model.named_parameters():
            if id(parameter) in broken:
                raise FloatingPointError(NOT_FINITE.format(name))

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
        if not (self.fixed or self.starts):
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        started = []
        for layer, adapter, weight in self._banks():
            if id(weight) not in groups:
                continue
            if id(weight) in self.fixed:
                # whatever the optimizer made of the gradient (Adam's scales, weight decay), those directions stay
                directions = layer.directions(adapter, layer.stack_of(adapter, weight))
                if directions is None:
                    weight.copy_(self.fixed[id(weight)])
                else:
                    keep_off(weight, directions, self.fixed[id(weight)], layer.base_layer.is_transposed)
            if id(weight) in self.starts:
                started.append((layer, adapter, weight, _bits(weight) == self.starts[id(weight)].bits))
        some = not self.checked.isdisjoint(groups) or any(not bool(same.all()) for *_, same in started)
        still, waited = [], 0
        for layer, adapter, weight, same in started:
            start = self.starts[id(weight)]
            here = (start.reached & same).nonzero().flatten().tolist()
            if here and bool(same.all()) and start.waited < PATIENCE and (some or _moves(groups[id(weight)]) is None):
                start.waited += 1  # optimizers may take banks in turns
                continue
            still += [layer.node(adapter, weight, place) for place in here]
            waited = max(waited, start.waited)
            self.checked.add(id(weight))
            del self.starts[id(weight)]
        if still:
            when = "the first optimizer step" if not waited else f"{waited} optimizer steps"
            _raise_unmoved(still, "its learning rate may be too small for the dtype of the bank", when)

    def _banks(self) -> Iterator[tuple[PCGrowExperts, str, nn.Parameter]]:
        for layer in self.layers():
            for adapter in layer.active_banks():
                for weight in layer.bank(adapter).values():
                    if weight.requires_grad:
                        yield layer, adapter, weight


def _held_anywhere() -> set[int]:
    """Ids of the parameters of all optimizers that there are."""
    found: set[int] = set()
    for held in gc.get_objects():
        if issubclass(type(held), torch.optim.Optimizer):
            groups = getattr(held, "param_groups", ())
            found |= {id(p) for group in groups for p in group.get("params", ())}
    return found


def _moves(group: dict[str, Any]) -> bool | None:
    """Whether the rate of a group of parameters is above zero; None: it has none (Adafactor's relative steps, say)."""
    try:
        return float(group["lr"]) > 0
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None


def _dense(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, also of an embedding's sparse one."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _rows(bank: Tensor) -> Tensor:
    return bank.detach().reshape(bank.shape[0], -1)


def _bits(weight: Tensor) -> Tensor:
    """One number per expert that changes when a weight does: the sum of the bit patterns, `[G]`, without a copy."""
    return _rows(weight).view(_BITS[weight.element_size()]).sum(dim=1, dtype=torch.int64)


def _reached(gradient: Tensor) -> Tensor:
    """Which experts of a bank an error came to, `[G]`."""
    return _rows(gradient).any(dim=1)


def _names(nodes: list[Node]) -> str:
    return ", ".join(ends([name for *_, name in sorted(set(nodes))]))


def _raise_unmoved(nodes: list[Node], why: str, when: str = "the first optimizer step") -> None:
    raise RuntimeError(f"after {when}, located node(s) {_names(nodes)} that received error have not moved; {why}")


def _hook_optimizers() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_before)  # type: ignore
        register_optimizer_step_post_hook(_after)  # type: ignore


def _mine(optimizer: torch.optim.Optimizer) -> list[TrainingGuard]:
    """The guards of the models whose optimizer this is."""
    found = [guard for guard in list(_guards) if guard.is_mine(optimizer)]
    # nothing can be read while a CUDA graph is recorded
    recorded = found and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return [] if recorded else found


@torch.compiler.disable
def _before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    guards = _mine(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not (guards and callable(closure)):
        _check(guards, optimizer)
        return None
    # gradients are only there once it has run
    checked = partial(_checked, closure, guards, optimizer)
    return ((args[0], checked, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": checked})


def _checked(closure: Callable[[], Any], guards: list[TrainingGuard], optimizer: torch.optim.Optimizer) -> Any:
    loss = closure()
    _check(guards, optimizer)
    return loss


def _check(guards: list[TrainingGuard], optimizer: torch.optim.Optimizer) -> None:
    for guard in guards:
        guard.before_step(optimizer)


@torch.compiler.disable
def _after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for guard in _mine(optimizer):
        guard.after_step(optimizer)

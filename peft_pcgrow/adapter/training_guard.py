"""Say what trains, refuse steps that are not finite, and notice experts that silently do not move.

Weights that are changed in another way than by the step of an optimizer (see `optimizer_hooks`) are not seen here: by
hand, by an optimizer of another kind, from copies that an optimizer holds.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.weak import WeakTensorKeyDictionary

from pcgrow_kernels.project_out import project_out
from peft_pcgrow.adapter.inside_sweep import gradient_of
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.optimizer_hooks import StepWatcher, held_anywhere, moves
from peft_pcgrow.adapter.sharded_step import check_none_lost
from peft_pcgrow.adapter.without_rows import RowsMet
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.sharded import first_slice, how_sharded, is_by_fsdp2, largest, local, reshard
from peft_pcgrow.say import ends, say
from peft_pcgrow.settling.host import in_backward

# layer, expert, and what a slice of a bank is called
Node: TypeAlias = tuple[int, int, str]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# steps that a bank may stand still in while its optimizer moves others, or does not say its rate
PATIENCE = 32
NOT_FINITE = (
    "the gradient of {} is NaN or infinite: the step is refused and {}. Look at the loss of this batch, or lower the "
    "learning rate"
)
UNCHANGED, ABOVE = "no weight has changed", "only banks of the layers above have taken it"


@dataclass
class _Start:
    """A bank before its first steps: its experts' bits, which of them an error reached, the steps it stood still."""

    bits: Tensor
    reached: Tensor
    waited: int = 0


@dataclass
class _Watched:
    """What is known of a bank.

    Attributes:
        held: whether some optimizer holds it. start: until it is seen to move. checked: whether it was.
        left_out: its bits when an error had reached it, and the nodes reached, while an optimizer of this model stepped
            without it.
        fixed: its part along the protected directions. inside: whether its last gradient was applied inside a backward.
    """

    held: bool = False
    checked: bool = False
    start: _Start | None = None
    left_out: tuple[Tensor, list[Node]] | None = None
    fixed: Tensor | None = None
    inside: bool = False


class TrainingGuard(StepWatcher):
    """Watches one model's banks through the step hooks of whatever `torch.optim.Optimizer` holds them, in any loop.

    Args:
        model: whose parameters tell this model's optimizers from others.
        layers: gives the model's tuner layers.
        summary: gives the line said when training starts.
    """

    # the banks' parameters as they were made
    made: Sequence["weakref.ref[nn.Parameter]"] = ()

    def __init__(self, model: nn.Module, layers: Callable[[], list[PCGrowExperts]], summary: Callable[[], str]):
        self.model, self.layers, self.summary = model, layers, summary
        self.rows_met = RowsMet()
        self.rearm()
        self.watch()

    def __getstate__(self) -> dict[str, Any]:
        # a copied model has parameters of its own: its guard starts afresh
        return {name: self.__dict__[name] for name in ("model", "layers", "summary", "rows_met")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rearm()
        self.watch()

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers():
            for name in layer.adapter_layer_names:
                yield from getattr(layer, name).parameters()
        yield from self.model.parameters()

    def rearm(self) -> None:
        """Announce and check again, after the trainable adapters changed."""
        self.rows_met.forget()
        # whether fully_shard has put a part of each bank here, whether expert parallelism has, and whether gradients
        # have yet to come of a training forward
        self.announced = self.sharded = self.shared_out = self.awaited = False
        self.watched: MutableMapping[Tensor, _Watched] = WeakTensorKeyDictionary()

    def note_banks(self) -> None:
        """Called when an adapter was made, before its banks can have been sharded."""
        banks = [weight for *_, weight in self._banks(every=True)]
        # those that are DTensors already are not sharded anew, and could not be cast with references to them
        self.made = [weakref.ref(weight) for weight in banks if how_sharded(weight) is None]

    def loaded(self, *_: Any) -> None:
        """Called after weights were loaded: they hold what is to stay from then on."""
        for seen in self.watched.values():
            seen.fixed = None

    def training_forward(self) -> None:
        """Called at the start of each forward that trains."""
        if not self.announced:
            self.shared_out = is_shared_out(self.model)
            self.sharded = not self.shared_out and is_by_fsdp2(self.model)
            if self.sharded and {id(weight()) for weight in self.made} & held_anywhere():
                raise RuntimeError(
                    "an optimizer holds the banks as they were before fully_shard made others of them, and would train "
                    "nothing: create it afterwards, or give Accelerator.prepare both the model and the optimizer"
                )
            self.announced = True
            say(self.summary())
        self.awaited = self.sharded
        if any(seen.left_out for seen in self.watched.values()):
            self._report_left_out()

    def is_mine(self, optimizer: Any) -> bool:
        if self.sharded:
            reshard(self.model)  # it holds no others
        return super().is_mine(optimizer)

    def _of(self, weight: Tensor) -> _Watched:
        return self.watched.setdefault(weight, _Watched())

    def _report_left_out(self) -> None:
        # another optimizer may have its turn later
        anywhere = held_anywhere()
        banks = [(adapter, weight, self._of(weight)) for *_, adapter, weight in self._banks()]
        for _, weight, seen in banks:
            seen.held |= id(weight) in anywhere
        with_some = {adapter for adapter, _, seen in banks if seen.held}
        nodes: dict[bool, list[Node]] = {True: [], False: []}
        for adapter, weight, seen in banks:
            (bits, reached), seen.left_out = seen.left_out or (None, []), None
            if bits is not None and not seen.held and torch.equal(_bits(weight), bits):
                nodes[adapter in with_some] += reached
                seen.checked = True
        if nodes[False]:
            _raise_unmoved(nodes[False], "no optimizer holds its weights: create the optimizer after get_peft_model")
        if nodes[True]:
            warnings.warn(
                f"located node(s) {_names(nodes[True])} received error, but no optimizer holds their weights: they do "
                "not train. Give an optimizer all parameters that require a gradient, or grow fewer nodes",
                stacklevel=2,
            )

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return  # a GradScaler is at work, and a fused optimizer skips this step by itself
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        banks = list(self._banks())
        if self.awaited:
            self.awaited = not check_none_lost(self.model, [weight for *_, weight in banks], groups.keys())
        given = [(bank, gradient) for bank in banks if (gradient := gradient_of(bank[2])) is not None]
        graded = [(*bank, local(gradient)) for bank, gradient in given]
        mine = [entry for entry in graded if id(entry[2]) in groups]
        self._refuse_nonfinite(optimizer, mine)
        self.rows_met.before_step(mine, whole=not in_backward(), sharded=self.sharded or self.shared_out)
        for *_, weight in banks:
            self._of(weight).held |= id(weight) in groups
        # also of adapters that were switched off since the backward: their gradients are still there
        for layer, adapter, weight in self._banks(every=True):
            if (gradient := gradient_of(weight)) is not None and id(weight) in groups:
                self._protect(layer, adapter, weight, local(gradient))
        for _, _, weight, gradient in mine:
            seen = self._of(weight)
            seen.left_out, seen.inside = None, in_backward()
            # a warm-up's first step may have a rate of zero: the check waits for one that moves something
            if not seen.checked and moves(groups[id(weight)]) is not False and weight.numel():
                seen.start = seen.start or _Start(_bits(weight), _reached(gradient))
                seen.start.reached |= _reached(gradient)
        for layer, adapter, weight, gradient in graded if len(mine) < len(graded) else ():
            seen = self._of(weight)
            if not (seen.held or seen.checked or seen.left_out):
                seen.left_out = _bits(weight), _nodes(layer, adapter, weight, _reached(gradient))

    def _refuse_nonfinite(
        self, optimizer: torch.optim.Optimizer, graded: list[tuple[PCGrowExperts, str, nn.Parameter, Tensor]]
    ) -> None:
        """Raise FloatingPointError for a gradient of this model that is not finite, before anything has changed."""
        held = [(p, gradient_of(p)) for group in optimizer.param_groups for p in group["params"]]
        given = [(p, local(_dense(gradient))) for p, gradient in held if gradient is not None]
        # the largest number of all: one pass, and the one value that a step has to wait for
        most = get_total_norm([gradient for _, gradient in given if gradient.numel()], math.inf)
        if (apart := self.sharded or self.shared_out) and given:
            # another process may hold what is not finite: all refuse the step
            most = largest(most.nan_to_num(math.inf), given[0][0])
        if math.isfinite(float(most)):
            return
        state = ABOVE if in_backward() else UNCHANGED
        broken = {id(p) for p, gradient in given if not bool(torch.isfinite(gradient).all())}
        for layer, adapter, weight, gradient in graded:
            if id(weight) in broken:
                nodes = _nodes(layer, adapter, weight, ~torch.isfinite(_rows(gradient)).all(dim=1))
                whole = layer.births[adapter].pieces is None
                listed = ", ".join(ends([node[1] for node in nodes]))
                named = f"layer {layer.layer_index}, experts [{listed}]" if whole else _names(nodes)
                raise FloatingPointError(NOT_FINITE.format(f"{named} (adapter {adapter!r})", state))
        for name, parameter in self.model.named_parameters():
            if id(parameter) in broken:
                raise FloatingPointError(NOT_FINITE.format(name, state))
        if apart:
            raise FloatingPointError(NOT_FINITE.format("what another process holds", state))

    @torch.no_grad()
    def _protect(self, layer: PCGrowExperts, adapter: str, weight: nn.Parameter, gradient: Tensor) -> None:
        """Before a step: take the kept-off directions out of the gradient, and note what the bank has along them."""
        if not layer.is_protected(adapter):
            return
        stack, seen = layer.stack_of(adapter, weight), self._of(weight)
        here = _here(layer, adapter, weight)
        directions, transposed = _directions(layer, adapter, weight), layer.base_layer.is_transposed
        if seen.fixed is None:
            held = local(weight)

            def along(held: Tensor) -> Tensor:
                if directions is None:
                    return held.clone()
                return (held.mT if transposed else held) @ directions.to(weight.device, weight.dtype)

            # what the bank has itself: its donors may have been trained on or switched off since its birth
            seen.fixed = along(held)
            if not experts.is_packed(layer.base_layer):
                # where they are what they were, theirs: training that is resumed goes on with the same bits
                donors = along(layer.donors(layer.births[adapter])[stack][here].to(held.device, held.dtype))
                rounding = 2 * torch.finfo(held.dtype).eps * _rows(held).norm(dim=1)
                same = _rows(donors - seen.fixed).norm(dim=1) <= rounding
                seen.fixed[same] = donors[same]
        if directions is None:
            gradient.zero_()  # a bias: its input is 1 for all text
        else:
            project_out(gradient, directions, None, transposed)
            if directions.shape[1] == directions.shape[2]:
                # all directions that there are: what rounding leaves is no error that has to move anything
                gradient[directions.any(dim=1).all(dim=1).to(gradient.device)] = 0

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not any(seen.start or seen.fixed is not None for seen in self.watched.values()):
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        started = []
        for layer, adapter, weight in self._banks(every=True):
            seen = self.watched.get(weight)
            if seen is None or id(weight) not in groups or (seen.inside and not in_backward()):
                continue
            # at a rate of zero, as where torch makes an optimizer's state, nothing has moved, and rounding must not
            if seen.fixed is not None and moves(groups[id(weight)]) is not False:
                # whatever the optimizer made of the gradient (Adam's scales, weight decay), those directions stay
                directions, held = _directions(layer, adapter, weight), local(weight)
                if directions is None:
                    held.copy_(seen.fixed)
                else:
                    project_out(held, directions, seen.fixed, layer.base_layer.is_transposed)
            if (start := seen.start) is not None:
                started.append((layer, adapter, weight, seen, start, _bits(weight) == start.bits))
        checked = any(id(weight) in groups for weight, seen in self.watched.items() if seen.checked)
        some = checked or any(not bool(same.all()) for *_, same in started)
        still, waited = [], 0
        for layer, adapter, weight, seen, start, same in started:
            stuck, turns = start.reached & same, some or moves(groups[id(weight)]) is None
            if bool(stuck.any()) and bool(same.all()) and start.waited < PATIENCE and turns:
                start.waited += 1  # optimizers may take banks in turns
                continue
            still += _nodes(layer, adapter, weight, stuck)
            waited = max(waited, start.waited)
            seen.checked, seen.start = True, None
        if still:
            when = "the first optimizer step" if not waited else f"{waited} optimizer steps"
            _raise_unmoved(still, "its learning rate may be too small for the dtype of the bank", when)

    def _banks(self, every: bool = False) -> Iterator[tuple[PCGrowExperts, str, nn.Parameter]]:
        """The banks of active adapters that train; `every`: also of others."""
        for layer in self.layers():
            for adapter in layer.births if every else layer.active_banks():
                for weight in layer.bank(adapter).values() if not layer.is_shrunk(adapter) else ():
                    if every or weight.requires_grad:
                        yield layer, adapter, weight


def _dense(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, also of an embedding's sparse one."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _rows(bank: Tensor) -> Tensor:
    held = local(bank.detach())
    return held.reshape(held.shape[0], held.shape[1:].numel())


def _here(layer: PCGrowExperts, adapter: str, weight: Tensor) -> slice | list[int]:
    """The slices of a bank that this process holds, as places among all."""
    if layer.share is not None:
        own = layer.places_here(adapter)
        # places that are left over stay zero, whoever's directions are theirs
        return own + [0] * (len(local(weight.detach())) - len(own))
    return slice(start := first_slice(weight), start + len(local(weight.detach())))


def _directions(layer: PCGrowExperts, adapter: str, weight: nn.Parameter) -> Tensor | None:
    """Those that are protected of the slices here."""
    every = layer.directions(adapter, layer.stack_of(adapter, weight))
    return None if every is None else every[_here(layer, adapter, weight)]


def _nodes(layer: PCGrowExperts, adapter: str, weight: nn.Parameter, marked: Tensor) -> list[Node]:
    """The nodes of the slices here that are marked, `[G]`."""
    start = first_slice(weight)
    return [layer.node(adapter, weight, start + place) for place in marked.nonzero().flatten().tolist()]


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

"""The part of a tuner layer that knows which of its base's experts are in this process (see `expert_parallel`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter import dispatch
from peft_pcgrow.adapter.birth import Birth
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.expert_parallel import Share, check_alike
from peft_pcgrow.architectures.sharded import whole


class SharedOut(nn.Module):
    """A layer whose banks are where their donors are.

    Attributes:
        share: what of the base's experts is in this process; None: all. total: how many there are in all.
    """

    share: Share | None
    total: int
    base_layer: experts.ExpertsModule
    births: dict[str, Birth]
    adapter_layer_names: tuple[str, ...]
    bank: Callable[[str], Mapping[str, Tensor]]
    weights: Callable[[str], Mapping[str, Tensor]]

    @property
    def part(self) -> experts.ExpertsModule:
        """The base's experts that are in this process."""
        return experts.part(self.base_layer)

    def run(self, branches: Sequence[dispatch.Branch], routed: tuple[Tensor, Tensor, Tensor], exact: bool) -> Tensor:
        """As `dispatch.run`, of the experts and branches here; all processes must call."""
        if self.share is None:
            return dispatch.run(self.base_layer, branches, *routed, exact=exact)
        hidden, index, weight = self.share.enter(*routed)
        if torch.is_grad_enabled():
            output = self._rows_here(branches, hidden, index, weight, exact)
        else:
            output = dispatch.run(self.part, branches, hidden, index, weight, exact=exact)
        return self.share.leave(output, hidden, weight)

    def _rows_here(
        self, branches: Sequence[dispatch.Branch], hidden: Tensor, index: Tensor, weight: Tensor, exact: bool
    ) -> Tensor:
        """The same of the rows of experts here alone, as tokens of one choice each: others are not computed, and what
        was not computed has no gradient that is not finite."""
        part = self.part
        here = index < part.num_experts
        # the first row at weight 0, rather than none
        here[0, 0] |= ~here.any()
        token, choice = here.nonzero(as_tuple=True)
        gated = [replace(b, passes=None if b.passes is None else b.passes[token]) for b in branches]
        chosen = index[token, choice].clamp(max=part.num_experts - 1).unsqueeze(1)
        rows = dispatch.run(part, gated, hidden[token], chosen, weight[token, choice].unsqueeze(1), exact=exact)
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        return total.index_add(0, token, rows.to(wide)).to(hidden.dtype)

    def places_here(self, adapter_name: str) -> list[int]:
        """Which of an adapter's grown experts are in this process, as places among all."""
        grown = self.births[adapter_name].grown
        return [*range(len(grown))] if self.share is None else self.share.own(grown)

    def among_all(self, adapter_name: str, place: int) -> int:
        """Which of an adapter's slices is at a place of its bank."""
        return place if self.share is None else self.share.places(self.births[adapter_name].grown).index(place)

    def dealt(self, adapter_name: str, bank: Tensor) -> Tensor:
        """A whole bank of an adapter's, as it is to lie here."""
        return bank if self.share is None else self.share.deal(bank, self.births[adapter_name].grown)

    def whole_weights(self, adapter_name: str) -> dict[str, Tensor]:
        """`weights` without their gradients, `[G, ...]`; all processes must call."""
        held, grown = self.weights(adapter_name).items(), self.births[adapter_name].grown
        return {n: w.detach() if self.share is None else self.share.collect(w.detach(), grown) for n, w in held}

    def collected(self, adapter_name: str, name: str, tensor: Tensor) -> Tensor:
        """One of an adapter's tensors, by its name in a file after `pcgrow_`, as the file has it; all processes that
        have a part of it must call."""
        if self.share is None or f"pcgrow_{name.removesuffix('.weight')}" not in self.adapter_layer_names:
            return whole(tensor)
        return self.share.collect(tensor, self.births[adapter_name].grown)

    def numbers(self, adapter_name: str) -> int:
        """How many an adapter's bank here has, in all processes."""
        held, grown = self.bank(adapter_name).values(), len(self.births[adapter_name].grown)
        return sum((len(p) if self.share is None else grown) * p.shape[1:].numel() for p in held)


def refuse_other_text(model: nn.Module) -> tuple[Any, ...]:
    """Let a model whose experts are shared out refuse to train on other text in each process."""
    return (model.register_forward_pre_hook(_compare, with_kwargs=True),) if is_shared_out(model) else ()


def _compare(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if model.training and torch.is_grad_enabled():
        text = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]
        check_alike(text, next(model.parameters()).device)

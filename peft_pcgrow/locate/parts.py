"""Parts of experts: single matrices that train while the rest of an expert stays.

A bank of parts holds one slice for each piece and nothing else. In the forward an expert's weights are composed: the
donor's, read from the base, with the pieces written in. So at birth bits are equal, and gradients reach the pieces
only. Shapes: B pieces, G experts that have some, I inputs of a matrix, K directions.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.experts import ExpertsModule
from peft_pcgrow.architectures.find import ExpertsSite
from peft_pcgrow.architectures.slices import Pieces
from peft_pcgrow.gates.separation import Separation
from peft_pcgrow.locus import Locus


def locus_of(parts: Mapping[str, Mapping[str, Any]]) -> Locus:
    """The experts that have parts."""
    return Locus({layer: list(chosen) for layer, chosen in parts.items()})


def all_parts(locus: Locus, sites: Iterable[ExpertsSite]) -> dict[str, Any]:
    """Every part of every expert of a locus."""
    bases = {site.layer: site.base for site in sites}
    return {
        str(layer): {str(expert): sorted(experts.matrices(bases[layer])) for expert in chosen}
        for layer, chosen in locus.items()
    }


def check_parts(parts: Mapping[str, Any], locus: Locus, sites: Iterable[ExpertsSite]) -> None:
    """Raise ValueError unless every part is there; `locus` are the experts that should have some, of `sites`."""
    bases = {site.layer: site.base for site in sites}
    if locus_of(parts).to_json() != locus.to_json():
        raise ValueError(f"parts are of {locus_of(parts)} and the locus is {locus}: the adapter's config was altered")
    for layer, chosen in parts.items():
        known = sorted(experts.matrices(bases[int(layer)]))
        for expert, listed in chosen.items():
            for part in listed:
                if part not in known:
                    raise ValueError(
                        f"layer {layer}, expert {expert} has no matrix {part!r}; choose from {', '.join(known)} (a "
                        "bias goes with its matrix)"
                    )


def pieces_of(base: ExpertsModule, parts: Mapping[str, list[Any]]) -> dict[str, Pieces]:
    """The pieces that a bank holds, by stack; a stack without any is left out.

    Args:
        parts: expert -> parts, of one layer.
    """
    found = {}
    for matrix, stacks in experts.matrices(base).items():
        chosen = [int(expert) for expert, listed in parts.items() if matrix in listed]
        for stack in stacks if chosen else ():
            found[stack] = Pieces(torch.tensor(chosen, device="cpu"), (matrix,) * len(chosen))
    return found


def whole(base: ExpertsModule, grown: tuple[int, ...]) -> dict[str, Pieces]:
    """Experts as pieces of themselves."""
    held = Pieces(torch.tensor(grown, device="cpu"), ("",) * len(grown))
    return dict.fromkeys(experts.expert_stacks(base), held)


def compose(
    base: ExpertsModule, grown: tuple[int, ...], pieces: Mapping[str, Pieces], bank: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Whole experts, `[G, ...]` by stack: the base's, with a bank's pieces in their places.

    Args:
        pieces: with places in `grown` for their experts (see `placed`).
    """
    weights = experts.read_experts(base, grown)
    return weights | {name: pieces[name].put(weights[name], values) for name, values in bank.items()}


def write_grown(
    base: ExpertsModule, pieces: Mapping[str, Pieces], born: Mapping[str, Tensor], grown: Mapping[str, Tensor]
) -> None:
    """Write grown pieces over the base's. Where another adapter wrote before, what this one changed is added.

    Args:
        born: the base's own values of these pieces. grown: their values now, `[N, ...]` by stack.
    """
    now, values = experts.read_pieces(base, pieces), {}
    for stack, start in born.items():
        weight = grown[stack].detach().to(start.device)
        # not by adding to what is still the base's: that would round
        values[stack] = torch.where(now[stack] == start, weight, now[stack] + (weight - start))
    experts.write_pieces(base, pieces, values)


def placed(pieces: Mapping[str, Pieces], slot: Tensor) -> dict[str, Pieces]:
    """Pieces of the experts in a bank, for those of the base's.

    Args:
        slot: place in the bank of each of the base's experts, `[E]`.
    """
    return {name: held.to(slot.device, slot[held.experts.to(slot.device)]) for name, held in pieces.items()}


def directions_of(separation: Separation, row: int, pieces: Mapping[str, Pieces], share: float) -> dict[str, Tensor]:
    """Directions of the retain text's inputs to protect at one layer, by stack `[B, I, K]`."""
    return {
        stack: separation.directions(row, stack, pieces[stack].experts.tolist(), share)
        for stack in separation.moment
        if stack in pieces
    }


def no_directions(base: ExpertsModule, pieces: Mapping[str, Pieces], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Room for what `directions_of` gave, K = `ranks[stack]` of them."""
    return {
        stack: torch.zeros(len(pieces[stack].experts), experts.input_width(base, stack), rank, device="cpu")
        for stack, rank in ranks.items()
    }


def count(pieces: Mapping[str, Pieces]) -> int:
    """Parts of a layer: a matrix and its bias are one."""
    return len({part for held in pieces.values() for part in zip(held.experts.tolist(), held.labels, strict=True)})

"""From a config and a map to what an adapter is: its nodes, their parts and sizes, its gates and directions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_pcgrow import experts, parts, plan, spawn
from peft_pcgrow.bank import codings
from peft_pcgrow.birth import Birth
from peft_pcgrow.config import PCGrowConfig
from peft_pcgrow.error_map import ErrorMap
from peft_pcgrow.gate import Gate
from peft_pcgrow.locus import Locus
from peft_pcgrow.pieces import Pieces
from peft_pcgrow.say import say


def resolve(config: PCGrowConfig, sites: list[experts.ExpertsSite], emap: ErrorMap | None) -> None:
    """Turn map, budget and options into nodes, parts and sizes."""
    experts_at = {site.layer: site.experts for site in sites}
    layers = tuple(experts_at)
    by_hand = config.locus if config.parts is None else parts.locus_of(config.parts)
    selected: dict[str, Any] | None = config.parts
    if by_hand is not None:
        locus = Locus(by_hand)
        locus.check(experts_at)
    elif emap is None and config.select != "random":
        raise ValueError(
            "PCGrowConfig needs error_map= (from measure_errors) and budget=, or locus={layer: [experts]} (or "
            "parts=), or select='random'"
        )
    else:
        here = emap.restrict(layers) if emap is not None else None
        choice = plan.choose(
            layers,
            experts_at[layers[0]],
            config.budget,
            config.select,
            here,
            config.seed,
            config.gate_fpr,
            uniform=config.router == "flat",
            resolution=config.resolution,
            block=config.block,
            max_per_layer=config.max_per_layer,
            cost_weight=config.cost_weight,
        )
        locus, selected = choice.locus, choice.parts
    separation = emap.separation if emap is not None else None
    if config.grow != "deepen":
        if emap is None or separation is None:
            raise ValueError(spawn.NO_RETAIN.format(f"grow={config.grow!r}"))
        decisions = spawn.decide(emap, locus, config.grow, config.gate_fpr)
        say(spawn.report(decisions, f"pcgrow: grow={config.grow!r} at gate_fpr={config.gate_fpr}"))
        locus = Locus(spawn.kept(decisions, "spawn", "deepen"))
        config.spawned = {str(layer): donors for layer, donors in spawn.kept(decisions, "spawn").items()}
        config.gate_window = int(separation.facts["window"])
    config.locus = locus.to_json()
    # the parts of what is left of the locus: those selected, or all
    if selected is not None:
        config.parts = {
            layer: {str(e): selected[layer][str(e)] for e in chosen} for layer, chosen in config.locus.items()
        }
        parts.check_parts(config.parts, locus, config.resolution, config.block, sites)
    elif config.resolution != "expert":
        config.parts = parts.all_parts(locus, config.resolution, config.block, sites)
    if config.protect:
        if emap is None or separation is None:
            raise ValueError(spawn.NO_RETAIN.format(f"protect={config.protect}"))
        config.protected = {}
        for site in sites:
            if site.layer in locus:
                pieces, row = _pieces(config, site), emap.layers.index(site.layer)
                found = parts.directions_of(separation, row, pieces, config.protect)
                config.protected[str(site.layer)] = {stack: held.shape[2] for stack, held in found.items()}


def birth(config: PCGrowConfig, site: experts.ExpertsSite, emap: ErrorMap | None) -> Birth:
    """What the adapter's nodes at `site` are; gates and directions are zeros where the map is not at hand."""
    grown = Locus(config.locus or {})[site.layer]
    spawned = tuple((config.spawned or {}).get(str(site.layer), ()))
    separation = emap.separation if emap is not None else None
    row = emap.layers.index(site.layer) if emap is not None else 0
    gate: tuple[Gate, Tensor] | None = None
    if spawned and separation is not None:
        gate = separation.gate(row), separation.threshold[row]
    pieces = _pieces(config, site)
    ranks = (config.protected or {}).get(str(site.layer), {})
    if ranks and separation is not None:
        directions = parts.directions_of(separation, row, pieces, config.protect)
    else:
        directions = parts.no_directions(site.base, pieces, ranks)
    held = pieces if config.parts is not None else None
    shrunk = codings(config.shrunk, site.layer)
    return Birth(grown, spawned, config.gate_window, gate, config.gate_fpr, directions, held, shrunk)


def _pieces(config: PCGrowConfig, site: experts.ExpertsSite) -> Mapping[str, Pieces]:
    """What an adapter's bank holds at a site."""
    if config.parts is None:
        return parts.whole(site.base, Locus(config.locus or {})[site.layer])
    return parts.pieces_of(site.base, config.parts[str(site.layer)], config.resolution, config.block)

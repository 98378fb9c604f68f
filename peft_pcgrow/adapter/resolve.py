"""From a config and a map to what an adapter is: its nodes, their parts and sizes, its gates and directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from peft_pcgrow.adapter import lineage
from peft_pcgrow.adapter.bank import codings
from peft_pcgrow.adapter.birth import Birth
from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.given import GATE_TENSORS
from peft_pcgrow.adapter.lora_beside import scales_of
from peft_pcgrow.adapter.seal import digest_all, other_base
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import ExpertsSite
from peft_pcgrow.architectures.same_base import WEIGHTS, difference
from peft_pcgrow.architectures.slices import Pieces
from peft_pcgrow.gates.gate import Gate
from peft_pcgrow.locate import budget, decide, parts
from peft_pcgrow.locate.decide import Decision
from peft_pcgrow.locus import Locus, read_parts
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.say import say
from peft_pcgrow.settings import whole

ALTERED = "{}: {}: no adapter of this base has that; its adapter_config.json was altered, or is of another base"


@dataclass(frozen=True)
class Resolved:
    """What a config leads to on a base: those fields of `PCGrowConfig`, by their names there, that tell what an adapter
    is. All but `decisions` are saved with it."""

    select: str | None
    locus: dict[str, list[int]] | None
    parts: dict[str, Any] | None
    spawned: dict[str, Any] | None
    lineage: dict[str, Any] | None
    gate_window: int
    protected: dict[str, Any] | None
    fingerprint: str | None
    decisions: list[Decision]
    base: dict[str, Any] | None
    nodes: str | None
    target_modules: Any

    @classmethod
    def of(cls, config: PCGrowConfig) -> "Resolved":
        """What a config says as it is: all, if it comes from a file or an adapter was made of it before."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def resolve(config: PCGrowConfig, sites: list[ExpertsSite], emap: ErrorMap | None) -> Resolved:
    """From map, budget and options to nodes, parts and sizes."""
    now = Resolved.of(config)
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
        select = config.select or ("removable" if emap is not None and emap.has_parts else "error")
        now = replace(now, select=select)
        here = emap.restrict(layers) if emap is not None else None
        follows = here is not None and lineage.follows_newborns(config)
        choice = budget.located(
            layers,
            experts_at[layers[0]],
            config.budget,
            select,
            here,
            config.seed,
            uniform=config.router == "flat",
            resolution=config.resolution,
            lead=budget.leading(here, config.gate_fpr) if here is not None and follows else None,
        )
        locus, selected = choice.locus, choice.parts
    separation = emap.separation if emap is not None else None
    given: dict[str, Tensor] = {}
    older = lineage.older(sites, emap) if emap is not None else {}
    if config.grow == "deepen" and emap is not None and emap.newborns.nodes:
        share = float(emap.newborns.mass.sum() / emap.scores("error").sum().clamp_min(1e-300))
        say(
            f"pcgrow: newborns ({emap.newborns}) hold {share:.0%} of the error; a new adapter deepens experts only: "
            "to deepen newborns, train their adapter further; grow='spawn' spawns from them"
        )
    if config.grow != "deepen":
        if emap is None or separation is None:
            raise ValueError(decide.NO_RETAIN.format(f"grow={config.grow!r}"))
        lead = budget.leading(emap, config.gate_fpr) if lineage.follows_newborns(config) else None
        decisions = decide.decide(emap, locus, config.grow, config.gate_fpr, lead)
        say(decide.report(decisions, f"pcgrow: grow={config.grow!r} at gate_fpr={config.gate_fpr}"))
        locus = Locus(decide.kept(decisions, "spawn", "deepen"))
        spawned = {str(layer): donors for layer, donors in decide.kept(decisions, "spawn").items()}
        for layer in map(int, spawned):
            row = emap.layers.index(layer)
            given |= {f"{layer}.{name}": getattr(separation, name)[row] for name in GATE_TENSORS}
            if config.lora is not None:
                if separation.entry_gate(row) is None:
                    raise ValueError(
                        "lora= beside newborns is behind a gate that reads what enters the attention, and layer "
                        f"{layer} has none that could be followed: leave lora out, or use grow='deepen'"
                    )
                given |= {f"{layer}.entry.{name}": separation.entry[name][row] for name in GATE_TENSORS}
        window, noted = int(separation.facts["window"]), lineage.noted(decisions, older)
        now = replace(now, decisions=decisions, spawned=spawned, gate_window=window, lineage=noted)
    now = replace(now, locus=locus.to_json())
    # the parts of what is left of the locus: those selected, or all
    held: dict[str, Any] | None = None
    if selected is not None:
        held = {layer: {str(e): selected[layer][str(e)] for e in chosen} for layer, chosen in locus.to_json().items()}
        parts.check_parts(held, locus, sites)
    elif config.resolution != "expert":
        held = parts.all_parts(locus, sites)
    if held is not None:
        # in the order that files are read in
        now = replace(now, parts=read_parts(held, config.resolution))
    if config.protect:
        if emap is None or separation is None:
            raise ValueError(decide.NO_RETAIN.format(f"protect={config.protect}"))
        ranks: dict[str, Any] = {}
        for site in sites:
            if site.layer in locus:
                pieces, row = _pieces(now, site.layer, site.base), emap.layers.index(site.layer)
                found = parts.directions_of(separation, row, pieces, config.protect)
                ranks[str(site.layer)] = {stack: directions.shape[2] for stack, directions in found.items()}
                given |= {f"{site.layer}.{stack}": directions for stack, directions in found.items()}
        now = replace(now, protected=ranks)
    if not given:
        return now
    digest = digest_all(given)
    return replace(now, fingerprint=lineage.identity(digest, config._told_by, now.lineage) if now.spawned else digest)


def check_resolved(config: PCGrowConfig, resolved: Resolved, sites: Sequence[ExpertsSite]) -> None:
    """Raise ValueError, naming the field, unless what an adapter's config says is of sizes that its base can have.

    Whoever wrote the file: nothing is made of it before.
    """
    locus = Locus(resolved.locus or {})
    locus.check({site.layer: site.experts for site in sites})
    bases = {str(site.layer): site.base for site in sites}
    grown = locus.to_json()
    for layer, donors in (resolved.spawned or {}).items():
        if not set(donors) <= set(grown.get(layer, ())):
            raise ValueError(ALTERED.format("spawned", f"{donors} in layer {layer}, where the locus has no such nodes"))
    lineage.check(resolved.lineage, resolved.spawned or {})
    if (resolved.parts is None) != (config.resolution == "expert"):
        raise ValueError(ALTERED.format("parts", f"{'none' if resolved.parts is None else 'some'} at this resolution"))
    if resolved.parts is not None:
        parts.check_parts(resolved.parts, locus, sites)
    for layer, ranks in (resolved.protected or {}).items():
        widths = (
            {name: experts.input_width(bases[layer], name) for name in experts.matrices(bases[layer])}
            if layer in grown
            else {}
        )
        if not isinstance(ranks, dict) or not ranks.keys() <= widths.keys():
            raise ValueError(ALTERED.format("protected", f"{ranks} in layer {layer}"))
        for name, rank in ranks.items():
            whole(f"protected[{layer}][{name}]", rank, 0, widths[name])
    for layer in grown if config.shrunk is not None else ():
        found = codings(config.shrunk, int(layer))
        stacks = _pieces(resolved, int(layer), bases[layer])
        if {name: len(coding.numbers) for name, coding in found.items()} != {  # type: ignore
            n: len(p.experts) for n, p in stacks.items()
        }:
            raise ValueError(ALTERED.format("shrunk", f"{config.shrunk['layers'][layer]} in layer {layer}"))  # type: ignore


def check_tokens(config: PCGrowConfig, model: nn.Module) -> None:
    """Raise ValueError unless `trainable_token_indices` name rows of embeddings that the model has."""
    given: Any = config.trainable_token_indices
    if given is None or not hasattr(model, "get_input_embeddings"):
        return
    named = given if isinstance(given, dict) else {"": given}
    for name, listed in named.items():
        held = (
            [m for n, m in model.named_modules() if f".{n}".endswith(f".{name}")]
            if name
            else [model.get_input_embeddings()]  # type: ignore
        )
        rows = {
            weight.shape[0]
            for module in held
            if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 2
        }
        if not rows or max(listed, default=0) >= min(rows):
            raise ValueError(
                f"trainable_token_indices={given} name rows that are not there: "
                + (f"{name or 'the embedding'} has {min(rows)}" if rows else f"there is no embedding {name!r}")
            )


def check_base(config: PCGrowConfig, base: dict[str, Any]) -> dict[str, Any]:
    """The base at hand must be the one that a resolved config was made on; with `verify=False` it becomes that.

    Args:
        base: see `fingerprint.describe_base`.

    Returns:
        What the adapter says of its base.

    Raises:
        ValueError: it is known to be another one.
    """
    noted = config.base if config.verify and config.base is not None else base
    if unlike := difference(noted, base):
        raise ValueError(other_base(unlike))
    # what was unknown where the config was made, the file's seals may know
    return noted | {key: base.get(key) for key in WEIGHTS if noted.get(key) is None}


def birth(config: PCGrowConfig, resolved: Resolved, site: ExpertsSite, emap: ErrorMap | None) -> Birth:
    """What the adapter's nodes at `site` are; gates and directions are zeros where the map is not at hand."""
    grown = Locus(resolved.locus or {})[site.layer]
    spawned = tuple((resolved.spawned or {}).get(str(site.layer), ()))
    separation = emap.separation if emap is not None else None
    row = emap.layers.index(site.layer) if emap is not None else 0
    gate: tuple[Gate, Tensor] | None = None
    entry: tuple[Gate, Tensor] | None = None
    if spawned and separation is not None:
        gate, entry = separation.gate(row), separation.entry_gate(row)
    pieces = _pieces(resolved, site.layer, site.base)
    ranks = (resolved.protected or {}).get(str(site.layer), {})
    if ranks and separation is not None:
        directions = parts.directions_of(separation, row, pieces, config.protect)
    else:
        directions = parts.no_directions(site.base, pieces, ranks)
    held = pieces if resolved.parts is not None else None
    shrunk = codings(config.shrunk, site.layer)
    noted = resolved.lineage or {}
    parents = {int(donor): parent for donor, parent in noted.get("parents", {}).get(str(site.layer), {}).items()}
    facts = {
        "base": resolved.base,
        "nodes": resolved.nodes,
        "locus": resolved.locus,
        "spawned": resolved.spawned or {},
        "gate_window": resolved.gate_window,
        "resolution": config.resolution,
        "parts": (resolved.parts or {}).get(str(site.layer)),
        "protected": ranks,
        "lineage": resolved.lineage or {},
        "lora": None if config.lora is None else scales_of(config.lora),
        **({"lora_behind_gates": True} if config.lora is not None and resolved.spawned else {}),
    }
    return Birth(
        grown, spawned, resolved.gate_window, gate, entry, config.lora is not None, config.gate_fpr, directions, held,
        shrunk, (resolved.fingerprint or "") if spawned else "", tuple(noted.get("elders", ())), parents, facts,
    )  # fmt: skip


def _pieces(resolved: Resolved, layer: int, base: experts.ExpertsModule) -> Mapping[str, Pieces]:
    """What an adapter's bank holds of the experts of a layer."""
    if resolved.parts is None:
        return parts.whole(base, Locus(resolved.locus or {})[layer])
    return parts.pieces_of(base, resolved.parts[str(layer)])

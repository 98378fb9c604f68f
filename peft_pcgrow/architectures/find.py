"""Where a model's experts are: one site a decoder layer, and what is refused by name."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from peft_pcgrow.architectures.adopt_mlps import marked, plain_mlps
from peft_pcgrow.architectures.adopt_routed import foreign_experts, undecorated, why_none
from peft_pcgrow.architectures.adoption import Adoption, innermost
from peft_pcgrow.architectures.decoder import UNPATCHED, in_decoder, layer_list
from peft_pcgrow.architectures.engines import check_engine, is_shared_out
from peft_pcgrow.architectures.expert_parallel import Share, count_experts
from peft_pcgrow.architectures.experts import (
    ExpertsModule,
    GrownExperts,
    expert_stacks,
    first_matrix,
    is_adopted,
    is_packed,
    weight_places,
)
from peft_pcgrow.architectures.host import EXPERTS_MARK, HOOK
from peft_pcgrow.architectures.node_weights import check_unshared, why_computed, why_hooked
from peft_pcgrow.architectures.plain_weight import is_offloaded, way_out, why_not_stacks
from peft_pcgrow.architectures.sharded import check_whole
from peft_pcgrow.settling.layer_stack import beneath

# what can be a node: experts that a router chooses, those that serve every token beside them, whole MLPs
NODES = ("routed", "shared", "dense")


@dataclass(frozen=True)
class ExpertsSite:
    """One MoE layer: where its experts are.

    Attributes:
        layer: index among the model's decoder layers; decoder_layer: that module.
        name: qualified name of `module`, the experts module or the outermost wrapper around it.
        base: the experts module itself.
        router: the module beside it that chooses experts, or None if it could not be told.
        adoption: of a block that does not follow the contract and was not adopted yet (see `adopt`), how it would be.
            `name` is then the name that its experts will have, and `base` stands for them: it reads the block's own
            weights, wherever they go, but nothing in the model calls it.
    """

    layer: int
    name: str
    module: nn.Module
    base: ExpertsModule
    decoder_layer: nn.Module
    router: nn.Module | None
    adoption: Adoption | None = field(default=None, repr=False)

    @property
    def experts(self) -> int:
        return count_experts(self.base)

    @property
    def newborns(self) -> list[tuple[str, int]]:
        """(adapter, donor) of each newborn in use."""
        return self.module.newborns if isinstance(self.module, GrownExperts) else []


@dataclass(frozen=True)
class Tree:
    """The decoder layers of a model and its sites, bottom first; of which kind its nodes are (`NODES`)."""

    layers: tuple[nn.Module, ...]
    sites: tuple[ExpertsSite, ...]
    nodes: str

    @property
    def experts_at(self) -> dict[int, int]:
        return {site.layer: site.experts for site in self.sites}


def find_experts(model: nn.Module, nodes: str | None = None) -> Tree:
    """Find decoder layers, experts modules and routers by contract. The model stays as it is.

    Blocks that do not follow the contract by themselves are tried, on a few random tokens, and their sites say how they
    would be made to (see `ExpertsSite.adoption`). What measures, grows or packs them does that first (see `adopt`).

    Args:
        model (nn.Module): a transformers model, or one with adapters.
        nodes (str): "routed": experts that a router chooses; "shared": the MLPs that serve every token beside them;
            "dense": the MLPs of decoder layers without routed experts. Shared and dense ones are one expert a layer.
            None: routed where there are some, else dense.

    Returns:
        The decoder layers, and a site for each that has experts: its module, its router and how many there are.

    Raises:
        ValueError: nothing of that kind that can be grown, experts outside one list of decoder layers, weights that are
            no plain ones (quantized, sharded; see `plain_weight`), a model spread over processes (see `engines`), or a
            block replaced by a hub kernel.

    Example:
        >>> [(site.layer, site.experts) for site in find_experts(model).sites]
        [(0, 8), (1, 8), (2, 8)]
    """
    if nodes not in (None, *NODES):
        raise ValueError(f"unknown nodes={nodes!r}; choose from {', '.join(NODES)}, or None for what the model has")
    check_engine(model)
    return _find(model, nodes, False)


def find_to_grow(model: nn.Module, nodes: str | None, what: str, sharded: bool = False) -> Tree:
    """As `find_experts`, also of a model whose experts are shared out over processes (see `expert_parallel`).

    Args:
        sharded: take weights that `fully_shard` has split for plain ones, to gather them (see `gathered`).

    Raises:
        ValueError: other weights than those are not whole in this process, or not those of `nodes`; `what` needs them.
    """
    check_engine(model, shared_out=True)
    if not sharded:
        check_whole(model, what, shared_out=True)
    tree, shared_out = _find(model, nodes, sharded), is_shared_out(model)
    lone = next((site.name for site in tree.sites if shared_out and Share.of(site.base) is None), None)
    if lone is not None:
        raise ValueError(
            f"{lone} is not shared out over processes as the model's routed experts are, and {what} beside them "
            f"(nodes={tree.nodes!r}) is not supported yet: load the model without distributed_config"
        )
    return tree


def _find(model: nn.Module, nodes: str | None, sharded: bool) -> Tree:
    modules = dict(model.named_modules())
    waiting = foreign_experts(model, modules)
    routed = {*marked(modules, "routed"), *waiting}
    if nodes is None:
        nodes = "routed" if routed or undecorated(modules) else "dense"
    if nodes != "routed":
        waiting = plain_mlps(model, modules, nodes, routed)
    elif not routed:
        raise ValueError(why_none(model, modules))
    found = marked(modules, nodes) | {name: adoption.twin.experts for name, adoption in waiting.items()}
    found = in_decoder(model, modules | {name: each.block.module for name, each in waiting.items()}, found)
    lists = {layer_list(name, modules) for name in found}
    if len(lists) > 1 or None in lists:
        raise ValueError(
            f"the experts of {type(model).__name__} do not sit in one list of decoder layers but in "
            f"{sorted(map(str, lists))}: grow one of these parts, as a model of its own"
        )
    path = lists.pop()
    assert path is not None
    layers = modules[path]
    assert isinstance(layers, nn.ModuleList)
    sites = []
    for name, base in found.items():
        _check_base(name, base, model, sharded)
        outer = name
        while outer.endswith(".base_layer"):
            outer = outer.removesuffix(".base_layer")
            _check_wrapper(outer, modules[outer])
        index = int(name.removeprefix(f"{path}." if path else "").split(".")[0])
        adoption = waiting.get(name)
        block = modules[outer.rpartition(".")[0]] if adoption is None else adoption.twin
        _check_block(outer, block)
        module = modules[outer] if adoption is None else base
        sites.append(ExpertsSite(index, outer, module, base, layers[index], _router(block, base), adoption))
    sites.sort(key=lambda site: site.layer)
    if len({site.layer for site in sites}) < len(sites):
        raise ValueError(
            f"a decoder layer of {type(model).__name__} has two experts modules of one kind ({nodes}): it cannot be "
            "grown yet"
        )
    twins = {each.twin.experts: each.own.module for each in waiting.values() if each.own is not None}
    holders = {site.name: _holders(site.base) for site in sites if not is_packed(site.base)}
    check_unshared(model, {name: [twins.get(held, held) for held in holding] for name, holding in holders.items()})
    return Tree(tuple(layers), tuple(sites), nodes)


def adopt(tree: Tree) -> Tree:
    """Make the blocks at a tree's sites follow the contract, in place, those that do not yet.

    Their class becomes a subclass whose forward calls a child named `experts`. Parameters, their names, and the bits of
    what is computed stay. A block is adopted once, whoever asks.

    Returns:
        The tree as it is then: every `base` is a module of the model, which it calls.
    """
    return replace(tree, sites=tuple(map(_adopted, tree.sites)))


def _adopted(site: ExpertsSite) -> ExpertsSite:
    if site.adoption is None:
        return site
    module = site.adoption.perform().experts
    return replace(site, module=module, base=innermost(module), adoption=None)


def forward_replaced(module: nn.Module) -> bool:
    """Whether something else runs in the place of what a module's class runs; accelerate's hooks run that."""
    forward = beneath(module.__dict__.get("forward"))
    # where no kernel fits, use_kernels=True puts the class's own forward there
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not own and not hasattr(module, HOOK)


def _router(block: nn.Module, base: ExpertsModule) -> nn.Module | None:
    """The sibling with one weight row per expert."""
    for child in block.children():
        if any(p.dim() == 2 and p.shape[0] >= count_experts(base) for p in child.parameters()) and (
            "router" in type(child).__name__.lower() or "gate" in type(child).__name__.lower()
        ):
            return child
    for name in ("router", "gate"):
        if isinstance(getattr(block, name, None), nn.Module):
            return getattr(block, name)
    return None


def check_unhooked(tree: Tree) -> None:
    """Raise ValueError if hooks run with experts, which banks and maps would know nothing of."""
    for site in tree.sites:
        for module in (site.base, *_holders(site.base)):
            if (why := why_hooked(module)) is not None:
                raise ValueError(f"{site.name} ({type(site.base).__name__}) is not its weights alone: {why}")


def check_in_memory(tree: Tree) -> None:
    """Raise ValueError if the weights of experts are not where they can be read: accelerate has offloaded them."""
    for site in tree.sites:
        if (
            not is_packed(site.base)
            and is_offloaded(site.base)
            and any(s.is_meta for s in expert_stacks(site.base).values())
        ):
            raise ValueError(
                f"the weights of {site.name} are offloaded, and their values are needed here: load the model with a "
                "device_map that keeps its experts in memory"
            )


def _check_base(name: str, base: ExpertsModule, model: nn.Module, sharded: bool) -> None:
    if (share := Share.of(base)) is not None:
        base = share.part(base)  # whose forward is the architecture's own
    elif getattr(base, EXPERTS_MARK):
        raise ValueError(f"{name} is sharded by another expert parallelism than transformers': load without ep_plan")
    _check_forward(name, base)
    stacks = [first_matrix(base), "down_proj"]
    names = [*stacks, *(f"{stack}_bias" for stack in stacks if base.has_bias)]
    # adopted ones too: weights may become computed at any time
    found = (why_computed(module, [*names, "weight"]) for module in {base, *_holders(base)})
    if not hasattr(base, "parametrizations") and (why := next(filter(None, found), None)) is not None:
        raise ValueError(f"{name} ({type(base).__name__}) is not its weights alone: {why}")
    if is_packed(base) or is_adopted(base):
        return  # ours, or looked at before it was adopted
    if (why := why_not_stacks(base, [*names, *expert_stacks(base)], base.num_experts, sharded)) is not None:
        raise ValueError(
            f"{name} ({type(base).__name__}) holds no plain weights, which growing, measuring and packing need: {why}. "
            f"Instead, {way_out(getattr(model, 'config', base.config))}"
        )


def _holders(base: ExpertsModule) -> list[Any]:
    """The modules that hold the weights of experts."""
    return [owner[name] for owner, name in weight_places(base) if owner.get(name) is not None] or [base]


def _check_wrapper(name: str, module: nn.Module) -> None:
    _check_forward(name, module)
    if not isinstance(module, GrownExperts):
        adapters = getattr(module, "active_adapters", None)
        raise ValueError(
            f"{name} is in a {type(module).__name__} of another tuner (adapters: {adapters}), as LoRA with "
            "target_parameters makes it, and what that adds to the weights would be lost in grown copies: merge it "
            "first (merge_and_unload()), or put LoRA on layers beside the experts by PCGrowConfig(lora=LoraConfig(...))"
        )


def _check_forward(name: str, module: Any) -> None:
    if forward_replaced(module):
        raise ValueError(
            f"{name} ({type(module).__name__}) has its forward replaced, by Liger's kernels for example, which know "
            f"nothing of grown experts: {UNPATCHED}"
        )


def _check_block(name: str, block: nn.Module) -> None:
    if forward_replaced(block):
        raise ValueError(
            f"the block around {name} ({type(block).__name__}) has its forward replaced, by a hub kernel for example, "
            f"and would never call the grown experts: {UNPATCHED}"
        )

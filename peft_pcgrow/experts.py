"""The seam to transformers: how its mixture-of-experts modules look (those that differ: `adopted_moe`).

The contract (transformers 5, `integrations/moe.py`): an experts module is called as
`experts(hidden [T, H], index [T, K], weight [T, K]) -> [T, H]` and keeps its weights in stacks whose first axis is the
expert. `use_experts_implementation` marks such modules; they are found by that mark, never by their path.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peft_pcgrow.adopt import adopt, marked
from peft_pcgrow.adopted import AdoptedExperts
from peft_pcgrow.adopted_moe import adopt_routed, undecorated, why_none
from peft_pcgrow.model_parts import UNPATCHED, in_decoder, layer_list
from peft_pcgrow.node_weights import check_unshared, why_computed, why_hooked
from peft_pcgrow.pieces import Pieces
from peft_pcgrow.plain_weight import is_offloaded, loaded_quantized, way_out, why_not_stacks
from peft_pcgrow.removable import StackLayout
from peft_pcgrow.settle import beneath
from peft_pcgrow.stack_view import StackView

# what can be a node: experts that a router chooses, those that serve every token beside them, whole MLPs
NODES = ("routed", "shared", "dense")
# an nn.Module that follows the contract above: no class of transformers' says so, type checkers cannot either
ExpertsModule: TypeAlias = Any


@dataclass(frozen=True)
class ExpertsSite:
    """One MoE layer: where its experts are.

    Attributes:
        layer: index among the model's decoder layers; decoder_layer: that module.
        name: qualified name of `module`, the experts module or the outermost wrapper around it.
        base: the experts module itself.
        router: the module beside it that chooses experts, or None if it could not be told.
    """

    layer: int
    name: str
    module: nn.Module
    base: ExpertsModule
    decoder_layer: nn.Module
    router: nn.Module | None

    @property
    def experts(self) -> int:
        return self.base.num_experts


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
    """Find decoder layers, experts modules and routers by contract.

    Blocks that do not follow the contract by themselves are adopted on the way (see `adopted`): their class becomes a
    subclass with a child named `experts`, while parameters, their names, and what is computed stay as they are.

    Args:
        nodes: "routed": experts that a router chooses; "shared": the MLPs that serve every token beside them; "dense":
            the MLPs of decoder layers without routed experts. Shared and dense ones are one expert a layer. None:
            routed where there are some, else dense.

    Raises:
        ValueError: nothing of that kind that can be grown, experts outside one list of decoder layers, weights that are
            no plain ones (quantized, sharded; see `plain_weight`), or a block replaced by a hub kernel.
    """
    if nodes not in (None, *NODES):
        raise ValueError(f"unknown nodes={nodes!r}; choose from {', '.join(NODES)}, or None for what the model has")
    adopt_routed(model)
    modules = dict(model.named_modules())
    found = marked(modules, "routed")
    if nodes is None:
        nodes = "routed" if found or undecorated(modules) else "dense"
    if nodes == "routed":
        if not found:
            raise ValueError(why_none(model, modules))
    else:
        found = adopt(model, modules, nodes)
        modules = dict(model.named_modules())
    found = in_decoder(model, modules, found)
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
        _check_base(name, base, model)
        outer = name
        while outer.endswith(".base_layer"):
            outer = outer.removesuffix(".base_layer")
            _check_wrapper(outer, modules[outer])
        index = int(name.removeprefix(f"{path}." if path else "").split(".")[0])
        block = modules[outer.rpartition(".")[0]]
        _check_block(outer, block)
        sites.append(ExpertsSite(index, outer, modules[outer], base, layers[index], _router(block, base)))
    sites.sort(key=lambda site: site.layer)
    if len({site.layer for site in sites}) < len(sites):
        raise ValueError(
            f"a decoder layer of {type(model).__name__} has two experts modules of one kind ({nodes}): it cannot be "
            "grown yet"
        )
    check_unshared(model, {site.name: _holders(site.base) for site in sites if not is_packed(site.base)})
    return Tree(tuple(layers), tuple(sites), nodes)


def expert_stacks(base: ExpertsModule) -> dict[str, nn.Parameter]:
    """The weights that have one slice per expert, by name (`gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`, ...).

    Of packed or adopted experts, views that give the experts they are indexed with (see `StackView`).
    """
    views = _views(base)
    found = views | {
        name: parameter
        for name, parameter in base.named_parameters(recurse=False)
        if name not in views and parameter.dim() > 1 and parameter.shape[0] == base.num_experts
    }
    # in the order from before packing, which an adapter's parameters and so an optimizer's state follow
    return {name: found[name] for name in getattr(base, "pcgrow_names", found)}


def _views(base: ExpertsModule) -> dict[str, Any]:
    """What stands for stacks that are no tensors."""
    return base.packed_stacks if is_packed(base) else getattr(base, "stack_views", {})


def neuron_places(base: ExpertsModule, stack: str, neurons: Tensor) -> tuple[int, Tensor] | None:
    """The axis of a stack that intermediate neurons lie along, and the places of `neurons [..., N]` there.

    Twice as many places as neurons where gate and up are one stack: gate first, then up, or in turns. None: what this
    stack holds belongs to no neuron (the bias of the down projection).
    """
    first = first_matrix(base)
    if stack == "down_proj":
        return (1 if base.is_transposed else 2), neurons
    if stack not in (first, f"{first}_bias"):
        return None
    axis = 2 if base.is_transposed and stack == first else 1
    if not base.has_gate:
        return axis, neurons
    if base.is_concatenated:
        return axis, torch.cat([neurons, neurons + intermediate_size(base)], dim=-1)
    return axis, torch.stack([2 * neurons, 2 * neurons + 1], dim=-1).flatten(-2)


def first_matrix(base: ExpertsModule) -> str:
    """Name of the stack that tokens enter."""
    return "gate_up_proj" if base.has_gate else "up_proj"


def matrices(base: ExpertsModule) -> dict[str, list[str]]:
    """The stacks of matrices, each with its own name and that of its bias, if it has one."""
    names = expert_stacks(base)
    return {name: [n for n in (name, f"{name}_bias") if n in names] for name in names if not name.endswith("_bias")}


def intermediate_size(base: ExpertsModule) -> int:
    """Intermediate neurons of an expert, I."""
    return input_width(base, "down_proj")


def read_experts(base: ExpertsModule, experts: Sequence[int]) -> dict[str, Tensor]:
    """Copies of the slices of `experts`, `[len(experts), ...]` each."""
    return {
        name: stack.detach()[torch.tensor(experts, device=stack.device)] for name, stack in expert_stacks(base).items()
    }


def read_pieces(base: ExpertsModule, pieces: Mapping[str, Pieces]) -> dict[str, Tensor]:
    """Copies of some pieces of each stack."""
    stacks, found = expert_stacks(base), {}
    for name, held in pieces.items():
        stack = stacks[name].detach()
        if isinstance(stack, Tensor):
            found[name] = held.read(stack)
        else:
            # packed: decode the experts in question only
            chosen, places = torch.unique(held.experts, return_inverse=True)
            found[name] = held.to(stack.device, places).read(stack[chosen])
    return found


@torch.no_grad()
def write_pieces(base: ExpertsModule, pieces: Mapping[str, Pieces], values: Mapping[str, Tensor]) -> None:
    """Overwrite some pieces of each stack in place, cast to the base's dtype."""
    stacks = expert_stacks(base)
    for name, held in pieces.items():
        stack = stacks[name]
        if isinstance(stack, Tensor):
            held.write(stack, values[name])
        else:
            chosen, places = torch.unique(held.experts, return_inverse=True)
            slices = stack[chosen]
            held.to(stack.device, places).write(slices, values[name])
            stack.write(chosen, slices)


def stack_inputs(base: ExpertsModule, x: Tensor, expert: int) -> dict[str, Tensor]:
    """What enters each of an expert's matrices for tokens `x [R, H]`: `[R, H]` or `[R, I]`, by the stack's name."""
    first, views = first_matrix(base), _views(base)
    weight = (views[first] if first in views else getattr(base, first))[expert].to(x.dtype)
    projected = x @ weight if base.is_transposed else x @ weight.mT
    if base.has_bias:
        name = f"{first}_bias"
        projected = projected + (views[name] if name in views else getattr(base, name))[expert].to(x.dtype)
    inner = base._apply_gate(projected) if base.has_gate else base.act_fn(projected)
    return {first: x, "down_proj": inner}


def input_width(base: ExpertsModule, stack: str) -> int:
    """Width of what enters a stack's matrices."""
    return expert_stacks(base)[stack].shape[1 if base.is_transposed else 2]


def stack_layouts(base: ExpertsModule) -> dict[str, StackLayout]:
    """Where the intermediate neurons are in each of the stacks."""
    layouts = {}
    for name in expert_stacks(base):
        lying = neuron_places(base, name, torch.arange(2, device="cpu"))
        if lying is None:
            layouts[name] = StackLayout(None)
            continue
        axis, places = lying
        copies = len(places) // 2
        layouts[name] = StackLayout(axis - 1, copies, copies == 2 and int(places[2]) == 2)
    return layouts


def is_adopted(base: ExpertsModule) -> bool:
    """Whether these experts stand for a block that does not follow the contract."""
    return isinstance(base, AdoptedExperts)


def weight_places(base: ExpertsModule) -> list[tuple[dict[str, Any], str]]:
    """Of adopted experts: the dicts and keys of what holds their weights outside of the module itself."""
    return base.places() if is_adopted(base) else []


def is_packed(base: ExpertsModule) -> bool:
    """Whether `compress` has packed these experts."""
    return hasattr(base, "packed_stacks")


def is_quantized(base: ExpertsModule) -> bool:
    """Whether the model was loaded quantized, or these stacks were quantized or packed afterwards."""
    if loaded_quantized(base.config) or hasattr(base, "parametrizations") or is_packed(base):
        return True
    return any(is_read_only(stack) for stack in expert_stacks(base).values())


def was_cast_up(base: ExpertsModule) -> bool:
    """Whether a model loaded quantized holds these stacks in fp32 (transformers loads them in 16 bit)."""
    if is_packed(base):
        return False
    return is_quantized(base) and all(stack.dtype == torch.float32 for stack in expert_stacks(base).values())


def loaded_in_bits(base: ExpertsModule) -> int | None:
    """Bits that bitsandbytes loaded the model's linear layers in; None: it did not."""
    found = getattr(base.config, "quantization_config", None) or {}
    read = found if isinstance(found, Mapping) else vars(found)
    # BitsAndBytesConfig keeps both flags behind an underscore
    flags = {4: "load_in_4bit", 8: "load_in_8bit"}
    return next((bits for bits, name in flags.items() if read.get(name) or read.get(f"_{name}")), None)


def text_config(config: Any) -> Any:
    """The part of a config that is about the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def forward_replaced(module: nn.Module) -> bool:
    """Whether something else runs in the place of what a module's class runs; accelerate's hooks run that."""
    forward = beneath(module.__dict__.get("forward"))
    # where no kernel fits, use_kernels=True puts the class's own forward there
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not own and not hasattr(module, "_hf_hook")


def _router(block: nn.Module, base: ExpertsModule) -> nn.Module | None:
    """The sibling with one weight row per expert."""
    for child in block.children():
        if any(p.dim() == 2 and p.shape[0] >= base.num_experts for p in child.parameters()) and (
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


def _check_base(name: str, base: ExpertsModule, model: nn.Module) -> None:
    _check_forward(name, base)
    if base._is_expert_parallel:
        raise ValueError(f"{name} is sharded by expert parallelism, which cannot be grown yet: load without ep_plan")
    stacks = [first_matrix(base), "down_proj"]
    names = [*stacks, *(f"{stack}_bias" for stack in stacks if base.has_bias)]
    # adopted ones too: weights may become computed at any time
    found = (why_computed(module, [*names, "weight"]) for module in {base, *_holders(base)})
    if not hasattr(base, "parametrizations") and (why := next(filter(None, found), None)) is not None:
        raise ValueError(f"{name} ({type(base).__name__}) is not its weights alone: {why}")
    if is_packed(base) or is_adopted(base):
        return  # ours, or looked at before it was adopted
    if (why := why_not_stacks(base, [*names, *expert_stacks(base)], base.num_experts)) is not None:
        raise ValueError(
            f"{name} ({type(base).__name__}) holds no plain weights, which growing, measuring and packing need: {why}. "
            f"Instead, {way_out(getattr(model, 'config', base.config))}"
        )


def _holders(base: ExpertsModule) -> list[nn.Module]:
    """The modules that hold the weights of experts."""
    return [owner[name] for owner, name in weight_places(base) if owner.get(name) is not None] or [base]


def _check_wrapper(name: str, module: nn.Module) -> None:
    _check_forward(name, module)
    if not hasattr(module, "weights_in_use"):  # none of this library's
        adapters = getattr(module, "active_adapters", None)
        raise ValueError(
            f"{name} is in a {type(module).__name__} of another tuner (adapters: {adapters}), as LoRA with "
            "target_parameters makes it, and what that adds to the weights would be lost in grown copies: merge it "
            "first (merge_and_unload()), or put LoRA on layers beside the experts by PCGrowConfig(lora=LoraConfig(...))"
        )


def _check_forward(name: str, module: nn.Module) -> None:
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


def is_read_only(stack: Any) -> bool:
    """Whether a stack is quantized in a way that cannot be written to."""
    return stack.read_only if isinstance(stack, StackView) else not stack.is_floating_point()

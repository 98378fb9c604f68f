"""The seam to transformers: the only file that knows how its mixture-of-experts modules look.

The contract (transformers 5, `integrations/moe.py`): an experts module is called as
`experts(hidden [T, H], index [T, K], weight [T, K]) -> [T, H]` and keeps its weights in stacks whose first axis is the
expert. `use_experts_implementation` marks such modules; they are found by that mark, never by their path.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peft_pcgrow.removable import StackLayout

# set on every instance by transformers' use_experts_implementation
MARK = "_is_expert_parallel"
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
    """The decoder layers of a model and its MoE sites, bottom first."""

    layers: tuple[nn.Module, ...]
    sites: tuple[ExpertsSite, ...]

    @property
    def experts_at(self) -> dict[int, int]:
        return {site.layer: site.experts for site in self.sites}


def find_experts(model: nn.Module) -> Tree:
    """Find decoder layers, experts modules and routers by contract.

    Raises:
        ValueError: no growable experts (a dense model, or an architecture that transformers does not decorate), experts
            outside one list of decoder layers, experts sharded over devices, or a block replaced by a hub kernel.
    """
    modules = dict(model.named_modules())
    marked = {name: module for name, module in modules.items() if MARK in module.__dict__}
    if not marked:
        raise ValueError(_why_none(model, modules))
    lists = {_layer_list(name, modules) for name in marked}
    if len(lists) > 1 or None in lists:
        raise ValueError(
            f"the experts of {type(model).__name__} do not sit in one list of decoder layers but in "
            f"{sorted(str(found) for found in lists)}: this model cannot be grown"
        )
    path = lists.pop()
    assert path is not None
    layers = modules[path]
    assert isinstance(layers, nn.ModuleList)
    sites = []
    for name, base in marked.items():
        _check_base(name, base)
        outer = name
        while outer.endswith(".base_layer"):
            outer = outer.removesuffix(".base_layer")
        index = int(name.removeprefix(f"{path}." if path else "").split(".")[0])
        block = modules[outer.rpartition(".")[0]]
        _check_block(outer, block)
        sites.append(ExpertsSite(index, outer, modules[outer], base, layers[index], _router(block, base)))
    sites.sort(key=lambda site: site.layer)
    if len({site.layer for site in sites}) < len(sites):
        raise ValueError(f"a decoder layer of {type(model).__name__} has two experts modules: it cannot be grown yet")
    return Tree(tuple(layers), tuple(sites))


def expert_stacks(base: ExpertsModule) -> dict[str, nn.Parameter]:
    """The weights that have one slice per expert, by name (`gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`, ...)."""
    return {
        name: parameter
        for name, parameter in base.named_parameters(recurse=False)
        if parameter.dim() > 1 and parameter.shape[0] == base.num_experts
    }


def read_experts(base: ExpertsModule, experts: Sequence[int]) -> dict[str, Tensor]:
    """Copies of the slices of `experts`, `[len(experts), ...]` each."""
    return {
        name: stack.detach()[torch.tensor(experts, device=stack.device)] for name, stack in expert_stacks(base).items()
    }


def write_experts(base: ExpertsModule, experts: Sequence[int], slices: Mapping[str, Tensor]) -> None:
    """Overwrite the slices of `experts` in place, cast to the base's dtype."""
    with torch.no_grad():
        for name, stack in expert_stacks(base).items():
            stack[torch.tensor(experts, device=stack.device)] = slices[name].to(stack.device, stack.dtype)


def stack_inputs(base: ExpertsModule, x: Tensor, expert: int) -> dict[str, Tensor]:
    """What enters each of an expert's matrices for tokens `x [R, H]`: `[R, H]` or `[R, I]`, by the stack's name."""
    first = "gate_up_proj" if base.has_gate else "up_proj"
    weight = getattr(base, first)[expert].to(x.dtype)
    projected = x @ weight if base.is_transposed else x @ weight.mT
    if base.has_bias:
        projected = projected + getattr(base, f"{first}_bias")[expert].to(x.dtype)
    inner = base._apply_gate(projected) if base.has_gate else base.act_fn(projected)
    return {first: x, "down_proj": inner}


def input_width(base: ExpertsModule, stack: str) -> int:
    """Width of what enters a stack's matrices."""
    return expert_stacks(base)[stack].shape[1 if base.is_transposed else 2]


def stack_layouts(base: ExpertsModule) -> dict[str, StackLayout]:
    """Where the intermediate neurons are in each of the stacks."""
    layouts = {}
    for name in expert_stacks(base):
        projection = name.removesuffix("_bias")
        copies = 2 if projection == "gate_up_proj" else 1
        interleaved = copies == 2 and not getattr(base, "is_concatenated", True)
        if projection in ("gate_up_proj", "up_proj"):
            axis = 1 if base.is_transposed and not name.endswith("_bias") else 0
        else:
            # the down projection's bias is the expert's, no neuron's
            axis = None if name.endswith("_bias") else 0 if base.is_transposed else 1
        layouts[name] = StackLayout(axis, copies, interleaved)
    return layouts


def is_quantized(base: ExpertsModule) -> bool:
    """Whether the model was loaded quantized, or these stacks were quantized afterwards."""
    if getattr(base.config, "quantization_config", None) is not None or hasattr(base, "parametrizations"):
        return True
    return not all(stack.is_floating_point() for stack in expert_stacks(base).values())


def was_cast_up(base: ExpertsModule) -> bool:
    """Whether a model loaded quantized holds these stacks in fp32 (transformers loads them in 16 bit)."""
    return is_quantized(base) and all(stack.dtype == torch.float32 for stack in expert_stacks(base).values())


def describe_base(model: nn.Module, tree: Tree) -> dict[str, Any]:
    """What tells one base from another: model type, shapes and a fingerprint of the routers (None on meta)."""
    config = text_config(getattr(model, "config", None))
    site = tree.sites[0]
    shapes = {name: list(stack.shape[1:]) for name, stack in expert_stacks(site.base).items()}
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "layers": [site.layer for site in tree.sites],
        "experts": [site.experts for site in tree.sites],
        "shapes": shapes,
        "layouts": {name: list(astuple(layout)) for name, layout in stack_layouts(site.base).items()},
        "vocabulary": getattr(config, "vocab_size", None),
        "routers": fingerprint(tree),
    }


def other_routers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are known to be of bases with different router weights."""
    known = {description.get("routers") for description in (one, other)} - {None}
    return len(known) > 1


def adds_router_loss(model: nn.Module) -> bool:
    """Whether the model adds a load-balancing loss to the language model's."""
    config: Any = getattr(model, "config", None)
    return bool(getattr(text_config(config), "output_router_logits", False))


def fingerprint(tree: Tree) -> str | None:
    """Hash of all router weights, rounded to bf16 so that one checkpoint hashes alike in every loading dtype."""
    digest = hashlib.sha256()
    for site in tree.sites:
        for parameter in site.router.parameters() if site.router is not None else ():
            if parameter.is_meta:
                return None
            if parameter.is_floating_point():
                digest.update(
                    parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
                )
    return digest.hexdigest()[:32]


def text_config(config: Any) -> Any:
    """The part of a config that is about the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layer_list(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost ModuleList on the path to `name`."""
    for ancestor in _ancestors(name):
        if isinstance(modules[ancestor], nn.ModuleList):
            return ancestor
    return None


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(len(parts)):
        yield ".".join(parts[:length])


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


def _check_base(name: str, base: ExpertsModule) -> None:
    if base._is_expert_parallel:
        raise ValueError(f"{name} is sharded by expert parallelism, which cannot be grown yet: load without ep_plan")
    if not expert_stacks(base):
        raise ValueError(f"{name} ({type(base).__name__}) has no weights with one slice for each of its experts")


def _check_block(name: str, block: nn.Module) -> None:
    kernel = block.__dict__.get("forward")
    if kernel is not None and not hasattr(block, "_hf_hook"):
        raise ValueError(
            f"the block around {name} ({type(block).__name__}) has its forward replaced, by a hub kernel for example, "
            "and would never call the grown experts: load the model with use_kernels=False"
        )


def _why_none(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    named = type(model).__name__
    undecorated = sorted({type(m).__name__ for m in modules.values() if "expert" in type(m).__name__.lower()})
    if undecorated:
        return (
            f"{named} has experts ({', '.join(undecorated)}) that do not follow transformers' experts contract "
            "(use_experts_implementation), so nodes cannot be told apart there; use LoRA on this model, or a "
            "transformers version that decorates it"
        )
    return (
        f"{named} has no mixture-of-experts layers: peft_pcgrow grows the experts of an MoE (Qwen3-MoE, OLMoE, "
        "Mixtral, DeepSeek-V3, gpt-oss, ...); use LoRA on a dense model"
    )

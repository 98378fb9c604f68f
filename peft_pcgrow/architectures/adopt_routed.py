"""Routed experts of the architectures that transformers does not mark: which there are, how each block is to be adopted
(by what `routed_blocks` holds for it), and which cannot be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from peft_pcgrow.architectures.adopted_experts import AdoptedBlock, AdoptedExperts
from peft_pcgrow.architectures.adoption import Adoption, Change, innermost
from peft_pcgrow.architectures.decoder import UNPATCHED
from peft_pcgrow.architectures.host import EXPERTS_MARK, LIGER, block_class, loaded
from peft_pcgrow.architectures.node_weights import why_computed
from peft_pcgrow.architectures.plain_weight import loaded_quantized, way_out, why_not_plain
from peft_pcgrow.architectures.routed_blocks import (
    DbrxBlock,
    DbrxOwnExperts,
    JetMoeBlock,
    JetMoeExperts,
    Llama4Block,
    Llama4OwnExperts,
    LongcatBlock,
    LongcatOwnExperts,
    OwnExperts,
)

# blocks whose experts cannot be nodes, by their class's name in `host.BLOCKS`, and why
REFUSED = {
    "DogeCDMoE": (
        "its experts are single rows of two embeddings behind product keys, which have no matrices to grow, and its "
        "shared MLP is computed inside the same code"
    ),
    "SwitchTransformersSparseMLP": "an encoder-decoder has two lists of layers, and only decoders alone can be grown",
    "NllbMoeSparseMLP": "an encoder-decoder has two lists of layers, and only decoders alone can be grown",
}


@dataclass(frozen=True)
class Foreign:
    """How a block is adopted.

    Attributes:
        block: its new forward.
        experts: mixed into the class of its child `experts`; what becomes that child, if it has none.
        count: name, in the experts or else in the block, of how many there are. act_fn: likewise.
        single: whether only one expert for a token can be dealt with.
        weights: names in the block of what holds the experts' weights.
    """

    block: type
    experts: type
    count: str = "num_experts"
    act_fn: str = "act_fn"
    single: bool = False
    weights: tuple[str, ...] = ("experts",)


# by the name of the block's class in `host.BLOCKS`
FOREIGN = {
    "DbrxFFN": Foreign(DbrxBlock, DbrxOwnExperts, act_fn="mlp.activation_fn"),
    "JetMoeMoE": Foreign(
        *(JetMoeBlock, JetMoeExperts, "router.num_experts", "activation"), weights=("input_linear", "output_linear")
    ),
    "Llama4TextMoe": Foreign(Llama4Block, Llama4OwnExperts, single=True),
    "LongcatFlashMoE": Foreign(LongcatBlock, LongcatOwnExperts, count="num_routed_experts"),
    # follows the contract, and lacks the mark only
    "Step3p7SparseMoeBlock": Foreign(AdoptedBlock, OwnExperts),
}


def foreign_experts(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Adoption]:
    """How each block of a model that `FOREIGN` knows, and that is not adopted yet, is to be: by the names that its
    experts have or will have.

    Raises:
        ValueError: a block that hands a token to more experts than can be dealt with, has no plain weights, or does
            something else than it did in the transformers that this was written for.
    """
    config, tried = getattr(model, "config", None), set()
    known = {block_class(name): how for name, how in FOREIGN.items()}
    found = {}
    for name, block in modules.items():
        how = known.get(type(block))
        if how is None or _is_marked(block):
            continue
        chosen: Any = block.top_k if how.single else 1
        if chosen > 1:
            raise ValueError(
                f"{name} ({type(block).__name__}) hands each token to {chosen} experts, scaled differently for "
                "each of them; only num_experts_per_tok=1 can be grown: use LoRA on this model"
            )
        if (why := _why_not_weights(block, how, config)) is not None:
            raise ValueError(f"the experts of {name} ({type(block).__name__}) {why}")
        adoption = _adoption(block, how, config)
        # the others of its class run the same code
        if type(block) not in tried and _differs(adoption):
            raise ValueError(
                f"{name} ({type(block).__name__}) computes something else in this version of transformers than "
                "peft_pcgrow expects, so its experts cannot be grown: use LoRA on them"
            )
        tried.add(type(block))
        inner, held = f"{name}.experts", getattr(block, "experts", None)
        while (held := getattr(held, "base_layer", None)) is not None:
            inner += ".base_layer"
        found[inner] = adoption
    return found


def why_refused(model: nn.Module) -> str | None:
    """What is known of a model's experts that cannot be nodes."""
    kinds = {type(module) for module in model.modules()}
    return next((f"{name}: {reason}" for name, reason in REFUSED.items() if block_class(name) in kinds), None)


def undecorated(modules: Mapping[str, nn.Module]) -> list[str]:
    """Classes that call themselves experts and do not follow the contract."""
    # those around experts call themselves alike
    named = {
        type(m).__name__ for m in modules.values() if not (isinstance(m, AdoptedExperts) or hasattr(m, "base_layer"))
    }
    return sorted(name for name in named if "expert" in name.lower() or name.lower().endswith("moe"))


def why_none(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Why a model has no routed experts that can be nodes."""
    named = type(model).__name__
    if (reason := why_refused(model)) is not None:
        return f"the experts of {named} cannot be nodes ({reason}): use LoRA on this model"
    others = undecorated(modules)
    config = getattr(model, "config", None)
    if others and loaded_quantized(config):
        return (
            f"{named} was loaded quantized, and its experts ({', '.join(others)}) are not transformers' own: "
            f"{way_out(config)}"
        )
    if any(isinstance(module, loaded(LIGER)) for module in modules.values()):
        return f"{named} was made with Liger's experts, whose kernels know nothing of grown ones: {UNPATCHED}"
    if others:
        return (
            f"{named} has experts ({', '.join(others)}) that do not follow transformers' experts contract "
            "(use_experts_implementation), so nodes cannot be told apart there; use LoRA on this model, or a "
            "transformers version that decorates it"
        )
    return (
        f"{named} has no mixture-of-experts layers (Qwen3-MoE, OLMoE, Mixtral, DeepSeek-V3, gpt-oss, ... do): to grow "
        "its MLPs, ask for nodes='dense'"
    )


def _adoption(block: Any, how: Foreign, config: Any) -> Adoption:
    if not issubclass(how.experts, OwnExperts):
        count, act_fn = attrgetter(how.count)(block), attrgetter(how.act_fn)(block)
        return Adoption(Change(block, how.block, {"experts": how.experts(block, count, act_fn, config)}))
    held = innermost(block.experts)
    count, act_fn = attrgetter(how.count)(held), attrgetter(how.act_fn)(held)
    noted = {EXPERTS_MARK: False, "num_experts": count, "act_fn": act_fn, "config": config}
    return Adoption(Change(block, how.block, {}), Change(held, how.experts, noted))


def _why_not_weights(block: nn.Module, how: Foreign, config: Any) -> str | None:
    for name in how.weights:
        held = innermost(block.get_submodule(name))
        if isinstance(held, nn.ModuleList):
            return f"were taken apart by a quantizer. Instead, {way_out(config)}"
        stacks = ("weight", "gate_up_proj", "down_proj")
        if (what := why_computed(held, stacks)) is not None:
            return f"are not their weights alone: of {name}, {what}"
        for label, parameter in held.named_parameters():
            if (what := why_not_plain(parameter)) is not None:
                return f"hold no plain weights: {name}.{label} is {what}. Instead, {way_out(config)}"
    return None


def _is_marked(block: nn.Module) -> bool:
    """Whether this transformers has marked its experts itself."""
    held = getattr(block, "experts", None)
    return held is not None and EXPERTS_MARK in innermost(held).__dict__


def _differs(adoption: Adoption) -> bool:
    block = adoption.block.module
    router = block.router if hasattr(block, "router") else block.gate
    # experts are most of it
    like = max(block.parameters(), key=lambda parameter: parameter.numel())
    return adoption.differs(next(router.parameters()).shape[-1], like)

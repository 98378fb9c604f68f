"""What plain checkpoints of an architecture can hold: equally many experts a layer, unless some can be switched off."""

from collections.abc import Mapping

from torch import Tensor, nn

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import ExpertsSite, Tree

# how the number of experts is called in configs
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# what is added to a router's choice but not to its weights, or to its logits
BIASES = ("e_score_correction_bias", "bias")


def check_flat(model: nn.Module, tree: Tree, newborns: Mapping[int, int], uniform: bool = False) -> int:
    """Experts that each layer of a plain checkpoint gets on top; raises ValueError if its format cannot hold them.

    Args:
        newborns: how many each layer has.
        uniform: whether it was tried to give all layers equally many.
    """
    named = type(model).__name__
    most = max(newborns.values(), default=0)
    if not most:
        raise ValueError("no active adapter has newborns: merge_and_unload() writes deepened experts into the base")
    if any(experts.is_quantized(site.base) for site in tree.sites):
        raise ValueError(
            f"{named} is loaded quantized: load the base in bf16 or fp32 and the adapter onto it to export"
        )
    config = experts.text_config(model.config)
    if getattr(config, "n_group", None) not in (None, 1):
        raise ValueError(
            f"{named} routes within groups of experts (n_group={config.n_group}), which more experts would cut anew: "
            "it cannot be exported flat; keep the adapter"
        )
    if not any(getattr(config, name, None) == tree.sites[0].experts for name in COUNTS):
        raise ValueError(f"the config of {named} does not say how many experts it has ({', '.join(COUNTS)})")
    for site in tree.sites:
        if site.router is None or not isinstance(getattr(site.router, "weight", None), Tensor):
            raise ValueError(f"the router of {site.name} in {named} has no weight with one row for each expert")
        if newborns[site.layer] < most and selection_bias(site) is None:
            raise ValueError(
                f"layer {site.layer} has {newborns[site.layer]} newborns and another layer {most}; checkpoints of "
                f"{named} hold equally many experts in all layers and its router has no selection bias to switch some "
                "off: " + ("raise gate_fpr, or change budget" if uniform else "grow with PCGrowConfig(router='flat')")
            )
    return most


def selection_bias(site: ExpertsSite) -> str | None:
    """Name of the router's bias with one number for each expert, if it has one."""
    for name in BIASES:
        found = getattr(site.router, name, None)
        if isinstance(found, Tensor) and found.shape == (site.experts,):
            return name
    return None


def logit_bias(site: ExpertsSite) -> str | None:
    """A bias that is part of the router's logits, so that a fitted row can have an intercept."""
    return "bias" if selection_bias(site) == "bias" else None

"""What tells one base model from another."""

import hashlib
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from peft_pcgrow import experts

# what descriptions of one model agree in, beside its routers
SAME = ("model_type", "nodes", "layers", "experts", "shapes")


def describe_base(model: nn.Module, tree: experts.Tree) -> dict[str, Any]:
    """What tells one base from another: model type, shapes and a fingerprint of the routers (None on meta, or if there
    are none)."""
    config = experts.text_config(getattr(model, "config", None))
    site = tree.sites[0]
    shapes = {name: list(stack.shape[1:]) for name, stack in experts.expert_stacks(site.base).items()}
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "layers": [site.layer for site in tree.sites],
        "experts": [site.experts for site in tree.sites],
        "shapes": shapes,
        "layouts": {name: list(astuple(layout)) for name, layout in experts.stack_layouts(site.base).items()},
        "vocabulary": getattr(config, "vocab_size", None),
        # absent of routed experts, as in maps and adapters from before there was a choice
        **({} if tree.nodes == "routed" else {"nodes": tree.nodes}),
        "routers": fingerprint(tree),
    }


def same_model(noted: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of models with the same experts, as far as is known."""
    same = all(noted.get(key) == base.get(key) for key in SAME)
    return same and not other_routers(noted, base)


def other_routers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are known to be of bases with different router weights."""
    known = {description.get("routers") for description in (one, other)} - {None}
    return len(known) > 1


def fingerprint(tree: experts.Tree) -> str | None:
    """Hash of all router weights, rounded to bf16 so that one checkpoint hashes alike in every loading dtype."""
    if all(site.router is None for site in tree.sites):
        return None
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

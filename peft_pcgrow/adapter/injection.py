"""What is worked out before an adapter is put into a model: where it grows, its nodes, what its config says."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig
from torch import nn

from peft_pcgrow.adapter import lineage
from peft_pcgrow.adapter.birth import Birth, check_donors
from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.host import BufferDict
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.resolve import Resolved, birth, check_base, check_resolved, check_tokens, resolve
from peft_pcgrow.architectures import experts, fingerprint
from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.find import ExpertsSite, Tree, check_in_memory, check_unhooked, find_to_grow
from peft_pcgrow.architectures.router_capacity import check_flat
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.packed.quantize import left_unpacked
from peft_pcgrow.say import say

# of what cannot be had yet where processes share out the experts
LEAVE_OUT = (
    "{} is not supported yet where processes share out the experts (DistributedConfig), whose adapters are whole grown "
    "experts alone: leave it out, or load the model without distributed_config and train under DDP or FSDP2"
)
# PEFT's rule for one name: whether a config's target_modules and its other restrictions let it be a target
Targets = Callable[[Any, str], Any]


def check_name(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if a module or tensor is called as an adapter is to be, or will be once one is there. PEFT tells
    by its name what of a state dict is an adapter's, and would leave the tensors of layer 1 out of the files of all
    others beside one that is called "1"."""
    # what is in these is called by adapters' names
    named = (m for m in model.modules() if not isinstance(m, (nn.ModuleDict, nn.ParameterDict, BufferDict)))
    taken = {name for m in named for name in (*m._modules, *m._parameters, *m._buffers)}
    if adapter_name in taken | {"weight", "bias", "base_layer"} or adapter_name.startswith(("pcgrow_", "lora_")):
        raise ValueError(
            f"adapter_name={adapter_name!r} is what a module or tensor of this model is called, which PEFT cannot tell "
            f"from an adapter of that name: call it {f'grown_{adapter_name}'!r}, for example"
        )


@dataclass(frozen=True)
class Injection:
    """What the steps of one `inject_adapter` need of each other. PEFT hands nothing from `_prepare_model` to
    `_create_and_replace`: the model carries this between them, and no longer.

    Attributes:
        tree: the model's layers and sites, as they were before any was wrapped.
        births: what the adapter's nodes are, by the name of the experts module that they stand at.
        resolved: what the adapter's config is to say. measured: the map that it follows from, if that is at hand.
    """

    tree: Tree
    births: Mapping[str, Birth]
    resolved: Resolved
    measured: ErrorMap | None

    def layer_of(self, name: str) -> tuple[int, nn.Module]:
        """Index and module of the decoder layer that an experts module stands in."""
        return next((site.layer, site.decoder_layer) for site in self.tree.sites if site.name == name)

    def note(self, config: PCGrowConfig, lora: LoraConfig | None, model: nn.Module) -> None:
        """Write into the adapter's config what is saved of all this; what remains of a map is what it led to."""
        config.__dict__.update(vars(self.resolved), lora=lora, error_map=None, _measured=self.measured)
        if config.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
            config.task_type = None


def prepare(config: PCGrowConfig, model: nn.Module, grown: Sequence[PCGrowExperts], targets: Targets) -> Injection:
    """Resolve a config on a model, so that the result alone tells every shape of the adapter; neither changes.

    Args:
        grown: layers of the model that hold banks of other adapters.

    Raises:
        ValueError: nothing to grow in the model, a locus, map or config that does not fit it, or newborns asked for
            where they cannot be.
    """
    measured = _map(config)
    nodes = config.nodes or (measured.base.get("nodes") if measured is not None else None)
    tree = find_to_grow(model, nodes, "growing")
    check_in_memory(tree)
    check_unhooked(tree)
    base = fingerprint.describe_base(model, tree)
    if config.error_map is not None and measured is not None:
        measured.check_base(base)
    allowed = _allowed(config, tree, targets)
    if config.base is None:
        if config.base_quantization is None and (line := left_unpacked(tree.sites)):
            say(f"pcgrow: {line}")
        resolved = replace(resolve(config, allowed, measured), nodes=tree.nodes)
        spawned = resolved.spawned or {}
        # a newborn with parts has the rest from the base: nobody may have deepened its donor meanwhile
        for layer in grown if resolved.parts is not None else ():
            donors = spawned.get(str(layer.layer_index), ())
            check_donors("the new adapter", donors, layer.deepened(), layer.layer_index)
        if config.router == "flat":
            newborns = {site.layer: len(spawned.get(str(site.layer), ())) for site in tree.sites}
            check_flat(model, tree, newborns, uniform=True)
    else:
        resolved = Resolved.of(config)
        if config._measured is not None and resolved.spawned:
            # used before, in this process: another adapter
            resolved = replace(resolved, fingerprint=lineage.identity(resolved.fingerprint or "", config._told_by))
    if experts.was_cast_up(tree.sites[0].base) and config.base_quantization is None:
        warnings.warn(
            "the base was loaded quantized but its experts are in fp32: prepare_model_for_kbit_training casts them "
            "up and doubles their memory; cast them back, or leave that call out",
            stacklevel=3,
        )
    check_resolved(config, resolved, allowed)
    if is_shared_out(model):
        _check_shared_out(config, resolved)
    check_tokens(config, model)
    locus = Locus(resolved.locus or {})
    chosen = [site for site in allowed if site.layer in locus]
    resolved = replace(resolved, base=check_base(config, base), target_modules={site.name for site in chosen})
    births = {site.name: birth(config, resolved, site, measured) for site in chosen}
    return Injection(tree, births, resolved, measured)


def _check_shared_out(config: PCGrowConfig, resolved: Resolved) -> None:
    """Raise ValueError for what cannot be had yet where processes share out the experts."""
    names = "lora", "modules_to_save", "trainable_token_indices", "base_quantization", "shrunk"
    asked = {name: getattr(config, name) for name in names} | {"parts": resolved.parts}
    asked["router"] = None if config.router == "branch" else config.router
    for name, value in asked.items():
        if value is not None:
            raise ValueError(LEAVE_OUT.format(f"{name}={str(value)[:80]}"))


def _map(config: PCGrowConfig) -> ErrorMap | None:
    """The map that a config comes with, or came with when it was first used."""
    if config._noted_map is not None and config.error_map == config._noted_map:
        raise ValueError(
            f"error_map={config.error_map!r} stands in a config file, which may be a stranger's, so it is not "
            "followed: if you trust it, set config.error_map = ErrorMap.load(...) yourself"
        )
    given = ErrorMap.load(config.error_map) if isinstance(config.error_map, str) else config.error_map
    return given or config._measured


def _allowed(config: PCGrowConfig, tree: Tree, targets: Targets) -> list[ExpertsSite]:
    """The sites that may grow."""
    allowed = [site for site in tree.sites if _may_grow(config, site, targets)]
    kept = (
        f"target_modules={config.target_modules}, exclude_modules={config.exclude_modules}, "
        f"layers_to_transform={config.layers_to_transform}"
    )
    if not allowed:
        raise ValueError(
            f"{kept} leave no experts to grow; the model's experts are "
            f"{', '.join(site.name for site in tree.sites[:3])}, ..."
        )
    by_hand = {str(layer) for layer in config.parts or config.locus or {}}
    if out := [s.layer for s in tree.sites if s not in allowed and str(s.layer) in by_hand]:
        raise ValueError(f"layer {out[0]}, where experts were chosen to grow, is left out by {kept}: change one")
    return allowed


def _may_grow(config: PCGrowConfig, site: ExpertsSite, targets: Targets) -> bool:
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = {site.name.rpartition(".")[2]}
    listed = config.layers_to_transform
    if listed not in (None, []) and not config.layers_pattern:
        # PEFT reads the layer out of the name, and finds none in that of a model without a head ("layers.0.mlp")
        if site.layer not in ([listed] if isinstance(listed, int) else listed):
            return False
        config.layers_to_transform = None
    # users know the MLP that was adopted, not its child
    names = (site.name, site.name.rpartition(".")[0]) if experts.is_adopted(site.base) else (site.name,)
    return any(targets(config, name) for name in names)

"""LoRA beside the grown experts as part of the same adapter: created, saved, restored, switched and merged with it.

PEFT tells what belongs to an adapter by its tuner layers and its name. LoRA layers of the adapter's own name are
therefore saved, loaded, disabled, cast and merged with the banks; what is done here is to put them there.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from peft_pcgrow.adapter.host import BaseTunerLayer, LoraLayer, spelled_out

# settings of LoRA that hold beside grown experts, and travel in the adapter's config; others change the base's weights,
# need LoRA's own model around it, or have their place in PCGrowConfig
SUPPORTED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "init_lora_weights",
)
# ways to start that leave the base's weights as they are
STARTS = (True, False, "gaussian", "orthogonal")
# said of every config, or without a meaning here
_IGNORED = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
_IGNORED += ("inference_mode", "runtime_config")


def read_lora(given: Any) -> LoraConfig | None:
    """The LoRA that an adapter's config asks for.

    Args:
        given: a `LoraConfig`, its settings as a mapping, or None.

    Raises:
        TypeError: something else. ValueError: settings that do not hold beside grown experts.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        known = LoraConfig.__dataclass_fields__
        if unknown := sorted(str(name) for name in given if name not in known):
            raise ValueError(f"lora={dict(given)} has settings that LoraConfig does not know: {', '.join(unknown)}")
        given = LoraConfig(**given)
    if type(given) is not LoraConfig:
        raise TypeError(f"lora must be a peft.LoraConfig or its settings as a dict, got {type(given).__name__}")
    default = LoraConfig()
    others = [name for name in LoraConfig.__dataclass_fields__ if name not in (*SUPPORTED, *_IGNORED)]
    # PEFT puts empty sets where nothing was asked for
    asked = {name: (getattr(given, name) or None, getattr(default, name) or None) for name in others}
    other = [name for name, (mine, theirs) in asked.items() if mine != theirs]
    if other:
        raise ValueError(
            f"lora=LoraConfig({other[0]}={getattr(given, other[0])!r}) does not hold beside grown experts, which can "
            f"have {', '.join(SUPPORTED)}; modules_to_save and trainable_token_indices are settings of PCGrowConfig"
        )
    if given.init_lora_weights not in STARTS:
        raise ValueError(
            f"lora=LoraConfig(init_lora_weights={given.init_lora_weights!r}) writes to the base's weights, which stay "
            f"as they are here: choose from {', '.join(map(repr, STARTS))}"
        )
    # not the caller's own, who may use it again: PEFT writes into it
    return copy.copy(given)


def settings_of(lora: LoraConfig) -> dict[str, Any]:
    """What `read_lora` reads, as JSON can hold it."""
    found = {name: getattr(lora, name) for name in SUPPORTED}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def scales_of(lora: LoraConfig) -> dict[str, Any]:
    """Those settings that say what LoRA's tensors do, whichever layers have some."""
    named = ("lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
    return {name: getattr(lora, name) for name in named}


@contextmanager
def injected(model: nn.Module, lora: LoraConfig, adapter_name: str, low_cpu_mem_usage: bool) -> Iterator[LoraConfig]:
    """Give `adapter_name` LoRA layers for what is done inside; where that fails they are gone again, and what was
    trainable before is.

    Yields:
        The config with its targets resolved.

    Raises:
        ValueError: targets that are not in the model, or no linear layers there.
    """
    modules, trained = dict(model.named_modules()), {p: p.requires_grad for p in model.parameters()}
    resolved = copy.deepcopy(lora)
    resolved.inference_mode = False  # whether it trains is the adapter's to say, afterwards
    # "all-linear" as what it says: PEFT would add parameters that are no linear layers', those of experts and routers
    resolved = cast(LoraConfig, spelled_out(resolved, model))
    try:
        # PEFT would take the configs of the adapters on this model for LoRA's own
        configs = model.__dict__.pop("peft_config", None)
        try:
            LoraModel(model, {adapter_name: resolved}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)  # type: ignore[arg-type]
        finally:
            model.__dict__.pop("peft_config", None)
            if configs is not None:
                model.peft_config = configs  # type: ignore[assignment]
        if resolved.target_parameters:
            raise ValueError(
                f"lora={lora.target_modules} means parameters of experts or routers in this model "
                f"({', '.join(resolved.target_parameters)}), which are no linear layers: name layers beside them, such "
                "as the attention's projections"
            )
        yield resolved
    except BaseException:
        for name, layer in lora_layers(model):
            before = modules.get(name)
            if isinstance(before, LoraLayer):
                layer.delete_adapter(adapter_name)
            elif before is not None:
                model.set_submodule(name, before)
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)
        raise


def key_in_file(key: str, adapter_name: str) -> str | None:
    """What a LoRA tensor of an adapter is called in a file; None: `key` is none.

    transformers' loader puts adapters' names into keys by the adapter's own prefix, here the banks'. LoRA's keep a name
    therefore: the one that adapters have by default there and everywhere.
    """
    module, found, rest = key.rpartition(".lora_")
    stack, _, held = rest.partition(f".{adapter_name}")
    return f"{module}{found}{stack}.default{held}" if found else None


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def check_alone(model: nn.Module) -> None:
    """Raise ValueError if there is LoRA on a model whose first LoRA layers an adapter of ours is to create."""
    if found := lora_layers(model):
        name, layer = found[0]
        raise ValueError(
            f"the model carries LoRA already ({name}: {layer.active_adapters}), put there by another tuner: leave "
            "that out, and let PCGrowConfig(lora=...) create it"
        )


def without_others(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, ours: type | tuple[type, ...]
) -> dict[str, Tensor]:
    """An adapter's tensors without those of tuner layers that are not its own.

    Raises:
        ValueError: one of those trains, so that it would be lost: no loader could tell what it belongs to.
    """
    found = dict(state_dict)
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, ours):
            continue
        held = dict(module.named_parameters())  # type: ignore[attr-defined]
        for key in [key for key in found if key.startswith(f"{name}.") and ".base_layer." not in key[len(name) :]]:
            if (parameter := held.get(key[len(name) + 1 :])) is not None and parameter.requires_grad:
                raise ValueError(
                    f"{key} trains beside adapter {adapter_name!r} and belongs to another tuner "
                    f"({type(module).__name__}): saved here, no loader would put it back. Create it by "
                    "PCGrowConfig(lora=LoraConfig(...)), or save and remove it before this"
                )
            del found[key]
    return found

"""Packed experts in checkpoints: transformers' `save_pretrained` and `from_pretrained`, by its plug-in for quantizers.

`config.json` says under `quantization_config` in which form each expert is, so that packed modules of the right sizes
are there before the weights are read; the bytes are tensors of the checkpoint like any others.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_pcgrow import experts
from peft_pcgrow.compress.forms import Form
from peft_pcgrow.compress.packed import PREFIX, pack
from peft_pcgrow.experts import PACKED_METHOD

# of what `PackedConfig` writes and of the bytes that `codec` makes
VERSION = 1
_RUN = re.compile(r"(\d+)x(\d+)(?:/(\d+))?(?::(\S+))?")


def write_forms(forms: Iterable[Form]) -> str:
    """Forms in few characters: runs of `<experts>x<bits>[/<neurons>][:<sparsity>]`, such as `60x4 3x4/512 1x16:2:4`."""
    runs = []
    for form, run in groupby(forms):
        thin = "" if form.neurons is None else f"/{form.neurons}"
        sparse = f":{form.sparsity}" if form.sparsity else ""
        runs.append(f"{len(list(run))}x{form.width}{thin}{sparse}")
    return " ".join(runs)


def read_forms(text: str) -> tuple[Form, ...]:
    """What `write_forms` wrote.

    Raises:
        ValueError: `text` is something else.
    """
    forms: list[Form] = []
    for run in text.split():
        found = _RUN.fullmatch(run)
        if found is None:
            raise ValueError(
                f"{run!r} in {text!r} does not say the form of packed experts, as in 60x4 3x4/512 1x16:2:4 (experts, "
                "bits, neurons, sparsity): the config.json was altered; copy it again from where it was saved"
            )
        count, width, neurons, sparsity = found.groups()
        forms += [Form(int(width), None if neurons is None else int(neurons), sparsity)] * int(count)
    return tuple(forms)


class PackedConfig(QuantizationConfigMixin):
    """What `config.json` says of packed experts.

    Args:
        layers: forms of the experts of each decoder layer that has packed ones, as `write_forms` writes them.
        version: of the format. half: type of what is kept in 16 bits.

    Raises:
        ValueError: a newer format than this package knows.
    """

    def __init__(self, layers: Mapping[str, str], version: int = VERSION, half: str = "bfloat16", **others: Any):
        if version > VERSION:
            raise ValueError(
                f"the packed experts of this checkpoint are in format {version}; this peft_pcgrow reads formats up to "
                f"{VERSION}: install a newer one"
            )
        self.quant_method: Any = PACKED_METHOD
        if half not in ("bfloat16", "float16"):
            raise ValueError(
                f"packed experts keep 16 bits as bfloat16 or float16, not {half!r}: the config.json was altered; copy "
                "it again from where it was saved"
            )
        self.version, self.layers, self.half = version, dict(layers), half

    def forms(self) -> dict[int, tuple[Form, ...]]:
        """By decoder layer."""
        return {int(layer): read_forms(text) for layer, text in self.layers.items()}


class PackedQuantizer(HfQuantizer):
    """Builds packed experts before a checkpoint is loaded, and has their forms written when one is saved."""

    quantization_config: PackedConfig
    # nothing is packed while a plain checkpoint is loaded
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        sites = {site.layer: site for site in experts.find_experts(model).sites}
        for layer, forms in self.quantization_config.forms().items():
            if layer not in sites or sites[layer].experts != len(forms):
                held = f"{sites[layer].experts} experts" if layer in sites else "none"
                raise ValueError(
                    f"the checkpoint has {len(forms)} packed experts in layer {layer} where {type(model).__name__} has "
                    f"{held}: its config.json was mixed up with another; copy it again from where it was saved"
                )
            pack(sites[layer].base, forms, half=getattr(torch, self.quantization_config.half))
            # transformers would fill the stacks with random numbers, which are not there
            for module in {sites[layer].base, getattr(sites[layer].base, "block", sites[layer].base)}:
                module._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for site in experts.find_experts(model).sites:
            if experts.is_packed(site.base):
                held = {**site.base._parameters, **{n: b for n, b in site.base._buffers.items() if PREFIX in n}}
                # on meta: offloaded
                real = {name: tensor for name, tensor in held.items() if tensor is not None and not tensor.is_meta}
                lost = [name for name, tensor in real.items() if not getattr(tensor, "_is_hf_initialized", False)]
                if lost:
                    raise ValueError(
                        f"the checkpoint has no {', '.join(lost)} for the packed experts {site.name}, or of another "
                        "size: a file of it is missing; copy it again from where it was saved"
                    )
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        # experts may have been packed since
        note_packing(model)
        return None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        raise NotImplementedError(
            "packed experts are not written out in place: export_plain(model, folder, batches, dequantize=True) makes "
            "a plain checkpoint, where its format can hold them"
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Unwritable(HfQuantizer):
    """Mixed into the quantizer that loaded a model whose experts were packed afterwards."""

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        if getattr(model, "_hf_peft_config_loaded", False):
            # adapters alone are written
            return super().get_state_dict_and_metadata(model)
        method = getattr(self.quantization_config, "quant_method", "another method")
        raise ValueError(
            f"{type(model).__name__} was loaded quantized by {getattr(method, 'value', method)} and its experts were "
            "packed afterwards; no checkpoint format holds both. Load it in bf16, compress that, and save; adapters "
            "can be saved on this one too"
        )


def note_packing(model: nn.Module) -> None:
    """Tell a model whose experts were packed, so that `save_pretrained` writes what `from_pretrained` needs.

    A model that was loaded quantized by another method keeps its quantizer, and refuses to be saved.

    Raises:
        ValueError: none of its experts are packed.
    """
    packed = {site.layer: site.base for site in experts.find_experts(model).sites if experts.is_packed(site.base)}
    if not packed:
        raise ValueError(f"{type(model).__name__} has no packed experts: compress it first")
    # it may sit in PEFT's wrapper, which saves adapters only
    held: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    quantizer: Any = getattr(held, "hf_quantizer", None)
    if experts.loaded_quantized(held.config):
        if not isinstance(quantizer, _Unwritable):
            known = held.config.quantization_config
            quantizer = held.hf_quantizer = copy.copy(quantizer or PackedQuantizer(known))
            quantizer.__class__ = type(type(quantizer).__name__, (_Unwritable, type(quantizer)), {})
        return
    forms = {str(layer): write_forms(base.forms) for layer, base in packed.items()}
    half = str(next(iter(packed.values())).pcgrow_half).removeprefix("torch.")
    config = PackedConfig(forms, half=half)
    held.config.quantization_config = config
    held.hf_quantizer = PackedQuantizer(config)
    held.is_quantized, held.quantization_method = True, PACKED_METHOD


def register_packed() -> None:
    """Make transformers know packed checkpoints; a second call does nothing."""
    if PACKED_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(PACKED_METHOD)(PackedConfig)
    if PACKED_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(PACKED_METHOD)(PackedQuantizer)

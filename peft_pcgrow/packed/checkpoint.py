"""Packed experts in checkpoints: transformers' `save_pretrained` and `from_pretrained`, by its plug-in for quantizers.

`config.json` says under `quantization_config` in which form each expert is, so that packed modules of the right sizes
are there before the weights are read; the bytes are tensors of the checkpoint like any others. A seal (see
`packed_seal`) binds all of that together. Where this package was not imported, transformers skips a method that it does
not know and would draw the experts at random: under the names that they have in their architecture, the files hold
tensors that cannot fit, so that loading fails.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import adopt, find_experts
from peft_pcgrow.architectures.host import LOADED
from peft_pcgrow.architectures.plain_weight import PACKED_METHOD, loaded_quantized
from peft_pcgrow.packed.forms import Form
from peft_pcgrow.packed.host import (
    ADAPTERS_LOADED,
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    HfQuantizer,
    QuantizationConfigMixin,
    load_offloaded_parameter,
    register_quantization_config,
    register_quantizer,
    remove_tied_weights_from_state_dict,
)
from peft_pcgrow.packed.packed_experts import PREFIX, pack
from peft_pcgrow.packed.packed_seal import AGAIN, facts_digest, tensors_digest, verify

# of what `PackedConfig` writes and of the bytes that `codec` makes; 1 had no seal
VERSION = 2
# name of a tensor that says so in the report of a load that failed for want of it
IMPORT = "import_peft_pcgrow"
# experts of a layer, at most: what a stranger's file may have made
MOST = 2**16
_RUN = re.compile(r"(\d{1,9})x(\d{1,9})(?:/(\d{1,9}))?(?::(\S+))?", re.ASCII)


def write_forms(forms: Iterable[Form]) -> str:
    """Forms in few characters: runs of `<experts>x<bits>[/<neurons>][:<sparsity>]`, as in `60x4 3x4/512 1x16:half`."""
    runs = []
    for form, run in groupby(forms):
        thin = "" if form.neurons is None else f"/{form.neurons}"
        sparse = f":{form.sparsity}" if form.sparsity else ""
        runs.append(f"{len(list(run))}x{form.width}{thin}{sparse}")
    return " ".join(runs)


def read_forms(text: str) -> tuple[Form, ...]:
    """What `write_forms` wrote.

    Raises:
        ValueError: `text` is something else, of more than `MOST` experts, or of 2:4 sparsity.
    """
    forms: list[Form] = []
    for run in str(text).split():
        found = _RUN.fullmatch(run)
        if found is None or len(forms) + int(found[1]) > MOST:
            raise ValueError(
                f"{run!r} in {text!r} does not say the form of packed experts, as in 60x4 3x4/512 1x16:half (experts, "
                f"bits, neurons, sparsity): the config.json was altered; {AGAIN}"
            )
        count, width, neurons, sparsity = found.groups()
        if sparsity == "2:4":
            raise ValueError(
                f"{run!r}: packed experts in 2:4 sparsity are no longer read; pack the model again, from full "
                "precision, with sparsity 'half' or in fewer bits"
            )
        forms += [Form(int(width), None if neurons is None else int(neurons), sparsity)] * int(count)
    return tuple(forms)


class PackedConfig(QuantizationConfigMixin):
    """What `config.json` says of packed experts.

    Args:
        layers: forms of the experts of each decoder layer that has packed ones, as `write_forms` writes them.
        version: of the format. half: type of what is kept in 16 bits.
        tensors, facts: the seal (see `packed_seal`), which `save_pretrained` fills in. needs: what to do to read it.

    Raises:
        ValueError: a newer format than this package knows, or something else than what it writes.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        version: int = VERSION,
        half: str = "bfloat16",
        tensors: str | None = None,
        facts: str | None = None,
        **others: Any,
    ):
        altered = f"the config.json was altered; {AGAIN}"
        if not isinstance(version, int) or not isinstance(layers, Mapping):
            raise ValueError(f"version={version!r} and layers={layers!r} do not describe packed experts: {altered}")
        if version > VERSION:
            raise ValueError(
                f"the packed experts of this checkpoint are in format {version}; this peft_pcgrow reads formats up to "
                f"{VERSION}: install a newer one"
            )
        self.quant_method: Any = PACKED_METHOD
        if half not in ("bfloat16", "float16"):
            raise ValueError(f"packed experts keep 16 bits as bfloat16 or float16, not {half!r}: {altered}")
        if strange := [layer for layer in layers if not re.fullmatch(r"\d{1,9}", str(layer), re.ASCII)]:
            raise ValueError(f"{strange[0]!r} is no decoder layer with packed experts: {altered}")
        self.version, self.layers, self.half = version, dict(layers), half
        self.tensors, self.facts = tensors, facts
        self.needs = "import peft_pcgrow"

    def forms(self) -> dict[int, tuple[Form, ...]]:
        """By decoder layer."""
        return {int(layer): read_forms(text) for layer, text in self.layers.items()}


class PackedQuantizer(HfQuantizer):
    """Builds packed experts before a checkpoint is loaded, and has their forms written when one is saved."""

    quantization_config: PackedConfig
    # nothing is packed while a plain checkpoint is loaded
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        # None: tensors that the caller has
        if checkpoint_files is not None:
            verify(checkpoint_files, self.quantization_config.tensors, self.quantization_config.facts)
        sites = {site.layer: site for site in adopt(find_experts(model)).sites}
        noted = self.quantization_config.layers
        for layer, forms in self.quantization_config.forms().items():
            if layer not in sites or sites[layer].experts != len(forms):
                held = f"{sites[layer].experts} experts" if layer in sites else "none"
                raise ValueError(
                    f"the checkpoint has {len(forms)} packed experts in layer {layer} where {type(model).__name__} has "
                    f"{held}: its config.json was mixed up with another; {AGAIN}"
                )
            most = experts.intermediate_size(sites[layer].base)
            if any((form.neurons or 0) > most for form in forms):
                raise ValueError(
                    f"the experts of layer {layer} have {most} neurons, and {noted[str(layer)]!r} says more: the "
                    f"config.json was altered; {AGAIN}"
                )
            pack(sites[layer].base, forms, half=getattr(torch, self.quantization_config.half))
            # transformers would fill the stacks with random numbers, which are not there
            for module in {sites[layer].base, getattr(sites[layer].base, "block", sites[layer].base)}:
                setattr(module, LOADED, True)
        unfit = (f"{re.escape(name)}$" for name in (IMPORT, *_unfit_names(model)))
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unfit}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for site in find_experts(model).sites:
            if experts.is_packed(site.base):
                held = {**site.base._parameters, **{n: b for n, b in site.base._buffers.items() if PREFIX in n}}
                # on meta: offloaded
                real = {name: tensor for name, tensor in held.items() if tensor is not None and not tensor.is_meta}
                lost = [name for name, tensor in real.items() if not getattr(tensor, LOADED, False)]
                if lost:
                    raise ValueError(
                        f"the checkpoint has no {', '.join(lost)} for the packed experts {site.name}, or of another "
                        f"size: a file of it is missing; {AGAIN}"
                    )
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        # experts may have been packed since
        note_packing(model)
        # of a model with adapters of transformers' own, those alone are written
        return None if getattr(model, ADAPTERS_LOADED, False) else _sealed(model), {}

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
        if getattr(model, ADAPTERS_LOADED, False):
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
    packed = {site.layer: site.base for site in find_experts(model).sites if experts.is_packed(site.base)}
    if not packed:
        raise ValueError(f"{type(model).__name__} has no packed experts: compress it first")
    held = _transformers_model(model)
    quantizer: Any = getattr(held, "hf_quantizer", None)
    if loaded_quantized(held.config):
        if not isinstance(quantizer, _Unwritable):
            known = held.config.quantization_config
            quantizer = copy.copy(quantizer or PackedQuantizer(known))
            quantizer.__class__ = type(type(quantizer).__name__, (_Unwritable, type(quantizer)), {})
            held.hf_quantizer = quantizer
        return
    forms = {str(layer): write_forms(base.forms) for layer, base in packed.items()}
    half = str(next(iter(packed.values())).pcgrow_half).removeprefix("torch.")
    config = PackedConfig(forms, half=half)
    held.config.quantization_config = config
    held.hf_quantizer = PackedQuantizer(config)
    held.is_quantized, held.quantization_method = True, PACKED_METHOD


def noted(model: nn.Module) -> Callable[[], None]:
    """What takes back `note_packing`."""
    held = _transformers_model(model)
    places = (
        (held.__dict__, ("hf_quantizer", "is_quantized", "quantization_method")),
        (
            getattr(held, "config", held).__dict__,
            ("quantization_config",),
        ),
    )
    before = [({name: owner[name] for name in names if name in owner}, names, owner) for owner, names in places]

    def undo() -> None:
        for values, names, owner in before:
            for name in names:
                owner.pop(name, None)
            owner.update(values)

    return undo


def _transformers_model(model: nn.Module) -> Any:
    """The model itself, or what sits in PEFT's wrapper, which saves adapters only."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _sealed(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` writes of a model with packed experts; its seal is noted in the model's config.

    Raises:
        ValueError: an adapter sits around experts, or what is stored is no longer what packing made.
    """
    for site in find_experts(model).sites:
        if site.module is not site.base:
            raise ValueError(
                f"{site.name} has an adapter around it, and a packed checkpoint holds none: save the adapter by its "
                "PeftModel's save_pretrained, or the base after unload()"
            )
        base: Any = site.base
        for name, held in base.packed_buffers().items() if experts.is_packed(base) else ():
            if held.dtype != torch.uint8 or held.numel() != base.packed_bytes(name):
                raise ValueError(
                    f"{PREFIX}{name} of {site.name} holds {held.numel()} numbers of {held.dtype} instead of "
                    f"{base.packed_bytes(name)} bytes: something wrote over it; load or compress the model again"
                )
    # names and tensors as they are in the model: what they were converted from when it was loaded is not written back,
    # since what is digested is what will be in the files
    model._weight_conversions = []
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, model)
    note = torch.frombuffer(bytearray(b"import peft_pcgrow"), dtype=torch.uint8)
    state |= {name: note.clone() for name in (IMPORT, *_unfit_names(model))}
    sharded = [name for name, tensor in state.items() if hasattr(tensor, "full_tensor")]
    if sharded:
        raise ValueError(f"{sharded[0]} is sharded over processes: packed models are saved from one whole copy")
    config, noted = model.config, model.config.quantization_config
    noted.tensors = tensors_digest({name: partial(_value, model, name, tensor) for name, tensor in state.items()})
    # as save_pretrained is about to write them
    config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [type(model).__name__]
    noted.facts = facts_digest(json.loads(config.to_json_string()))
    return state


def _value(model: Any, name: str, tensor: Tensor) -> Tensor:
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _unfit_names(model: nn.Module) -> Iterator[str]:
    """What an architecture calls the matrices of its experts that are packed here."""
    paths = {module: f"{name}." for name, module in model.named_modules()}
    for base in (site.base for site in find_experts(model).sites if experts.is_packed(site.base)):
        for name, shape in base.pcgrow_shapes.items():
            if experts.is_adopted(base):
                held = base.checkpoint(name, torch.empty(shape, device="meta"))
                yield from (paths[base.block] + own for own in held)
            else:
                yield paths[base] + name


def register_packed() -> None:
    """Make transformers know packed checkpoints; a second call does nothing."""
    if PACKED_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(PACKED_METHOD)(PackedConfig)
    if PACKED_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(PACKED_METHOD)(PackedQuantizer)

"""What is merged into an experts module: written over the base's weights, whose own values are kept aside."""

from collections.abc import Sequence
from typing import Any

import torch

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.adopted_experts import kind_of
from peft_pcgrow.locate import parts


def write_merged(layer: Any, names: Sequence[str]) -> None:
    """Merge these adapters, in this order, and no others into a `PCGrowExperts`, whatever is merged or half merged."""
    base = layer.base_layer
    # each adapter changed the base, not what others made of it: all of these are the base's own values
    for name, values in layer._originals.items():
        experts.write_pieces(base, layer.pieces(layer.births[name]), values)
    pieces = {name: layer.pieces(layer.births[name]) for name in names}
    read = {name: experts.read_pieces(base, held) for name, held in pieces.items()}
    # kept before anything is written, and until all is: whatever interrupts this can be undone
    layer._originals = {**layer._originals, **read}
    for name, held in pieces.items():
        parts.write_grown(base, held, read[name], layer.bank(name))
    # not before: see `PCGrowExperts.unmerge`
    layer.merged_adapters[:] = names
    layer._originals = read


def check_mergeable(layer: Any, safe_merge: bool, adapter_names: Sequence[str]) -> None:
    """Raise ValueError if merging these adapters into a `PCGrowExperts` would fail; writes nothing."""
    names = [name for name in adapter_names if name in layer.births and name not in layer.merged_adapters]
    for name in names:
        birth = layer.births[name]
        if birth.spawned:
            # a router row of their own is what newborns have there
            exports = kind_of(layer.base_layer) == "routed" and not birth.parents
            without = "grow without lora= and " if birth.lora else ""
            plain = f", or {without}write a plain checkpoint with peft_pcgrow.export_flat(model, folder, batches)"
            raise ValueError(
                f"adapter {name!r} has newborns (layer {layer.layer_index}: {list(birth.spawned)}): they take only "
                f"part of their donors' rows, so no expert of the base can hold them. Keep the adapter{plain * exports}"
            )
    if names and experts.is_packed(layer.base_layer):
        raise ValueError(
            "the base's experts are packed, and what merges into them could not be kept in so few bits: load the "
            "base in bf16 or fp32 and the adapter onto it with a config whose base_quantization is None, and merge "
            "there"
        )
    if names and experts.is_quantized(layer.base_layer):
        raise ValueError(
            "the base was loaded quantized, and what merges into it cannot be saved and served exactly: load "
            "the base in bf16 or fp32, load the adapter onto it, and merge there"
        )
    for name in names if safe_merge else ():
        if not all(bool(torch.isfinite(weight).all()) for weight in layer.bank(name).values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

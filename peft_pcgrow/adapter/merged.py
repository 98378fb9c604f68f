"""What is merged into an experts module: written over the base's weights, whose own values are kept aside."""

from collections.abc import Sequence
from typing import Any

from peft_pcgrow.architectures import experts
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

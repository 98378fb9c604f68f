"""The lines that say what a run trains."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures import one_sort
from peft_pcgrow.locate import parts
from peft_pcgrow.locus import Locus


def what_trains(layers: Sequence[PCGrowExperts], configs: Mapping[str, PCGrowConfig], active: Sequence[str]) -> str:
    """A line for each active adapter: its nodes, their size, and how they settle."""
    lines = []
    for name in active:
        mine = [layer for layer in layers if name in layer.grown]
        if not mine:
            continue
        config, locus = configs[name], Locus({layer.layer_index: layer.grown[name] for layer in mine})
        newborns = sum(len(layer.births[name].spawned) for layer in mine)
        parameters = sum(layer.numbers(name) for layer in mine)
        what = f"{len(locus.nodes)} experts ({newborns} of them newborns)"
        if config.parts is not None:
            count = sum(parts.count(layer.births[name].pieces or {}) for layer in mine)
            what = f"{count} parts (resolution={config.resolution!r}) of {what}"
        lines.append(
            f"pcgrow: adapter {name!r} grows {what} in {len(locus)} layers, {parameters:,} parameters, "
            f"settle={config.settle!r}, {_rows(mine)}: {locus.describe()}"
        )
    return "\n".join(lines)


def rows_alone(layers: Sequence[PCGrowExperts], weights: Sequence[Tensor]) -> bool:
    """Whether all that trains in a decoder layer are banks of `layers`, whose rows are sorted once: what a backward
    needs for them are the experts' inputs, and which rows went where."""
    banks = {id(p) for layer in layers for name in layer.active_banks() for p in layer.bank(name).values()}
    together = not any(one_sort.kept_from(layer.part, exact=not layer.training) for layer in layers)
    return together and all(id(weight) in banks for weight in weights)


def _rows(layers: Sequence[PCGrowExperts]) -> str:
    """How training runs their rows (see `dispatch.run`)."""
    kept = dict.fromkeys(one_sort.kept_from(layer.part, exact=False) for layer in layers)
    return "rows sorted once" if [*kept] == [""] else f"rows taken apart ({'; '.join(filter(None, kept))})"

"""What a training forward refuses before it starts: adapters that would train nothing, or without what they ask for."""

from collections.abc import Sequence

from torch import nn

from peft_pcgrow.adapter.bank import SHRUNK
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures.engines import PROTECTED, ZERO, check_engine, is_copied, stepped_by


def check_trains(model: nn.Module, layers: Sequence[PCGrowExperts]) -> None:
    """A training forward of a shrunk adapter, with nothing else on the model that trains, ends in no gradient."""
    shrunk = {name for layer in layers for name in layer.active_banks() if layer.is_shrunk(name)}
    if shrunk and not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(f"{SHRUNK.format(min(shrunk))}; to compute without training, call model.eval()")


def check_protected(model: nn.Module, layers: Sequence[PCGrowExperts], adapters: Sequence[str], first: bool) -> None:
    """At each training forward, since engines come at any time; `first`: look for all that there are."""
    for name in adapters:
        kept = [layer for layer in layers if name in layer.births and layer.is_protected(name)]
        marked = any(is_copied(weight) for layer in kept for weight in layer.bank(name).values())
        engine = ZERO if marked else stepped_by(model) if first and kept else None
        if engine is not None:
            raise ValueError(PROTECTED.format(engine, name))


def check_given(model: nn.Module, layers: Sequence[PCGrowExperts], adapters: Sequence[str]) -> None:
    """Newborns behind gates that were never set would train on nothing, and nothing would be protected."""
    check_engine(model, shared_out=True)
    for name in adapters:
        own = [layer for layer in layers if name in layer.births]
        for layer in own:
            if layer.spawned(name):
                layer.check_gate(name)  # type: ignore
        kept = [held for layer in own for held in layer.protected_directions(name).values()]
        if any(held.numel() for held in kept) and not any(bool(held.any()) for held in kept):
            raise RuntimeError(
                f"what protect= keeps updates of adapter {name!r} off was never set: its config was resolved for "
                "another model or adapter. Make a new PCGrowConfig with error_map=, or load the adapter's weights "
                "before training"
            )

"""Shrink an adapter: store what its experts add to the base's in few bits instead of whole.

A delta is a grown slice minus the base's own. Quantized, each slice has a width; with text, the error that rounding one
input's weights makes is made up for by the inputs after it (see `lowbit.encode`), for the text that the experts really
meet. Shapes: N slices of a bank, O outputs, I inputs, H hidden, T tokens, R rows.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pcgrow_kernels import lowbit
from peft_pcgrow.adapter.bank import SHRUNK, Coding, ShrunkBank, as_matrices, noted
from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.model import PCGrowModel
from peft_pcgrow.architectures.engines import check_engine
from peft_pcgrow.atomic import all_or_nothing
from peft_pcgrow.compress.bank_moments import Moments, Place, input_moments
from peft_pcgrow.maps.batches import IGNORED, Batch, losses
from peft_pcgrow.maps.distributed import read_everywhere
from peft_pcgrow.settings import refuse_gone

# widths of matrices, narrowest first
LADDER = tuple(sorted(lowbit.WIDTHS))


@dataclass(frozen=True)
class Delta:
    """What a bank adds to the base's slices of one stack.

    Attributes:
        matrices: `[N, O, I]` fp32. shape: of the stack in the base's layout; transposed: that layout.
    """

    matrices: Tensor
    shape: torch.Size
    transposed: bool

    @property
    def size(self) -> tuple[int, int]:
        """Outputs and inputs of each."""
        return self.matrices.shape[1], self.matrices.shape[2]

    @property
    def is_bias(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class ShrinkReport:
    """What shrinking an adapter did.

    Attributes:
        form: how the deltas are stored.
        before: bytes of the banks in bf16.
        after: bytes of the banks as they are stored now.
        kept: bytes of the adapter's other tensors, which stay as they are: gates, directions.
        error: norm of what was lost of all deltas, as a share of their norm.
        loss_base: of the text given without adapters, nats per token; None without text, as the two others.
        loss_before: the same with the adapter as it was.
        loss_after: the same with the adapter as it is now.

    Example:
        >>> grown = get_peft_model(model, PCGrowConfig(locus={1: [0, 4]}))
        >>> report = compress.shrink_adapter(grown, bits=4, batches=batches)
        >>> report.form, report.error, report.loss_before == report.loss_base  # nothing was learned yet
        ('4 bits', 0.0, True)
    """

    form: str
    before: int
    after: int
    kept: int
    error: float
    loss_base: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def share(self) -> float:
        """Bytes of the banks as a share of what they take in bf16."""
        return self.after / self.before

    @property
    def gain_lost(self) -> float | None:
        """Share of the gain on the text given that is lost; None without text, or where there was no gain."""
        if self.loss_base is None or self.loss_before is None or self.loss_after is None:
            return None
        gain = self.loss_base - self.loss_before
        return (self.loss_after - self.loss_before) / gain if gain > 0 else None

    def __str__(self) -> str:
        text = (
            f"shrunk to {self.form}: {self.after:,} bytes, {self.share:.1%} of the {self.before:,} in bf16 (and "
            f"{self.kept:,} of gates and the like as before); the deltas are off by {self.error:.1%}"
        )
        if self.loss_after is not None:
            text += f"; loss {self.loss_base:.4f} without, {self.loss_before:.4f} before, {self.loss_after:.4f} after"
        return text + (f": {self.gain_lost:.2%} of the gain lost" if self.gain_lost is not None else "")


def shrink_adapter(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    bits: int | None = None,
    target: float | None = None,
    batches: Iterable[Any] | None = None,
    compensate: bool = True,
    **gone: NoReturn,
) -> ShrinkReport:
    """Replace an adapter's banks, in place, by what they add to the base, stored small.

    The adapter computes, merges, saves and loads as before, with files of the new size; it can no longer be trained. It
    adds what it stores to the experts of whatever base it is loaded on, so a base in fewer bits shows through. Biases
    are stored as deltas in bf16. Gates, thresholds and protected directions stay as they are. With text, rounding makes
    up for its own errors (GPTQ, arXiv:2210.17323).

    Args:
        model (nn.Module): with the adapter, not merged: a `PeftModel`, or a transformers model that loaded the adapter
            itself.
        adapter_name (str): which adapter.
        bits (int): 8, 4, 3 or 2 for all matrices.
        target (float): instead, the share of the banks' bytes in bf16 to come out under: two neighbouring widths (4 and
            3 bits at 0.25), the wider where it saves most of the squared error that rounding makes per byte: at the
            outputs if there are `batches`, and otherwise of the weights. 0.25 if neither is given.
        batches: text of the domain, as for `measure_errors`, to measure the loss on before and after and, if
            `compensate`, to fit the rounding to. Needs the adapter to be active, and the memory of one fp32 matrix
            `[I, I]` for each matrix that grew. Under torch.distributed all processes must call; that of all counts.
        compensate (bool): whether to use the text for rounding. On a small model that halved the divergence of the
            predictions from what they were, at 4, 3 and 2 bits; on the domain's loss it only showed at 2.

    Returns:
        A `ShrinkReport`: bytes, errors and losses.

    Raises:
        TypeError: energy=, which is gone.
        ValueError: no such adapter, one that is shrunk or merged already, a setting out of its range or two of them, a
            target that 2 bits do not reach, no tokens in the text, or weights that are not finite. The adapter is then
            as it was.

    Example:
        >>> grown = get_peft_model(model, PCGrowConfig(locus={1: [0, 4]}, init_weights=False))
        >>> compress.shrink_adapter(grown, bits=4).share < 0.27  # of bf16: 4 bits a weight, and scales
        True
    """
    refuse_gone("shrink_adapter", gone, {"energy": "deltas are stored in few bits, give bits= or target="})
    layers, config = _adapter(model, adapter_name)
    if bits is not None and target is not None:
        raise ValueError(f"give one of bits={bits}, target={target}: each says how small to store")
    if bits is not None and bits not in LADDER[:-1]:
        raise ValueError(f"bits={bits!r}: deltas are stored in {', '.join(map(str, LADDER[:-1]))} bits")
    if target is not None and (isinstance(target, bool) or not 0 < target <= 1):
        raise ValueError(f"target must be a share in (0, 1], got {target!r}")
    read = _read(model, batches, layers, adapter_name) if batches is not None else None
    measured: dict[str, float] = {}
    moments: Moments = {}
    if read is not None:
        with _without(model):
            (measured["loss_base"],) = losses(model, [read])
        with ExitStack() as watching:
            if compensate:
                kept = [batch.real.reshape(-1) for batch in read]
                watching.enter_context(input_moments(layers, adapter_name, moments, kept))
            (measured["loss_before"],) = losses(model, [read])
    deltas = dict(_deltas(layers, adapter_name))
    chosen, form = _choose(deltas, moments, bits, 0.25 if target is None else target)
    found: dict[int, dict[str, ShrunkBank]] = {layer.layer_index: {} for layer in layers}
    lost = total = 0.0
    for (layer, stack), delta in deltas.items():
        coding = chosen[layer, stack]
        data = _encode(delta.matrices, coding, moments.get((layer, stack)))
        bank = found[layer][stack] = ShrunkBank(delta.shape, delta.transposed, coding, data)
        lost += float((bank.matrices() - delta.matrices).double().square().sum())
        total += float(delta.matrices.double().square().sum())
    before = _bytes_before(deltas)
    with all_or_nothing() as undo:
        undo += [layer.holding(adapter_name) for layer in layers]
        undo.append(partial(vars(config).update, shrunk=config.shrunk, inference_mode=config.inference_mode))
        for layer in layers:
            layer.shrink(adapter_name, found[layer.layer_index])
        config.shrunk = noted({layer: {n: b.coding for n, b in banks.items()} for layer, banks in found.items()})
        config.inference_mode = True
        for module in (model, getattr(model, "base_model", None)):
            if isinstance(module, PCGrowModel) and module._guard is not None:
                module._guard.rearm()
        if read is not None:
            (measured["loss_after"],) = losses(model, [read])
    after = sum(bank.get_buffer("packed").numel() for banks in found.values() for bank in banks.values())
    kept = sum(_kept_bytes(layer, adapter_name) for layer in layers)
    return ShrinkReport(form, before, after, kept, (lost / total) ** 0.5 if total else 0.0, **measured)


def _adapter(model: nn.Module, name: str) -> tuple[list[PCGrowExperts], PCGrowConfig]:
    """The layers that an adapter grows, and its config."""
    check_engine(model)
    known: Any = getattr(model, "peft_config", {})
    layers = [m for m in model.modules() if isinstance(m, PCGrowExperts) and name in m.births]
    config = known.get(name)
    if not layers or not isinstance(config, PCGrowConfig):
        grown = [key for key, held in known.items() if isinstance(held, PCGrowConfig)]
        raise ValueError(
            f"{type(model).__name__} has no grown adapter {name!r} to shrink; it has {', '.join(map(repr, grown))}"
            if grown
            else f"{type(model).__name__} has no grown adapter: give the model that get_peft_model returned"
        )
    if config.shrunk is not None:
        raise ValueError(SHRUNK.format(name).replace("cannot be trained", "cannot be shrunk again"))
    if any(layer.merged for layer in layers):
        raise ValueError(
            "an adapter is merged into the base, which deltas are taken from: call unmerge_adapter() first"
        )
    for layer in layers:
        for stack, weight in layer.bank(name).items():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(
                    f"layer {layer.layer_index}, {stack} of adapter {name!r} has weights that are not finite"
                )
    return layers, config


def _read(model: nn.Module, batches: Iterable[Any], layers: list[PCGrowExperts], name: str) -> list[Batch]:
    if not all(name in layer.active_banks() and not layer.disable_adapters for layer in layers):
        raise ValueError(
            f"adapter {name!r} is not active, so text tells nothing of it: call set_adapter({name!r}) first"
        )
    read = read_everywhere(model, batches)
    if not any(bool((target[:, 1:] != IGNORED).any()) for _, target, _ in read):
        raise ValueError("batches hold no token to predict: give [B, S] token ids with S of 2 or more, or leave it out")
    return read


def _deltas(layers: list[PCGrowExperts], name: str) -> Iterator[tuple[Place, Delta]]:
    for layer in layers:
        transposed = getattr(layer.base_layer, "is_transposed", False)
        for stack, weight in layer.bank(name).items():
            born = layer.born(name, stack)
            wide = torch.promote_types(torch.promote_types(weight.dtype, born.dtype), torch.float32)
            delta = (weight.detach().to(wide) - born.to(weight.device, wide)).float()
            yield (layer.layer_index, stack), Delta(as_matrices(delta, transposed), delta.shape, transposed)


def _bytes_before(deltas: dict[Place, Delta]) -> int:
    """Bytes of the banks in bf16."""
    return sum(2 * delta.matrices.numel() for delta in deltas.values())


def _choose(
    deltas: dict[Place, Delta],
    moments: Moments,
    bits: int | None,
    target: float,
) -> tuple[dict[Place, Coding], str]:
    """How each slice is stored, and that in words."""
    if bits is not None:
        return _widths(deltas, {}, bits, bits), f"{bits} bits"
    before = _bytes_before(deltas)
    allowed = target * before
    sizes = {width: _total(deltas, _widths(deltas, {}, width, width)) for width in LADDER}
    low = max((width for width in LADDER if sizes[width] <= allowed), default=None)
    if low is None:
        raise ValueError(
            f"target={target}: 2 bits with their scales are {sizes[2] / before:.1%} of bf16, and no less is stored; "
            f"give at least {sizes[2] / before:.3f}"
        )
    high = LADDER[min(LADDER.index(low) + 1, len(LADDER) - 1)]
    wider = _wider(deltas, moments, low, high, allowed - sizes[low])
    chosen = _widths(deltas, wider, low, high)
    widths = [width for place, coding in chosen.items() if not deltas[place].is_bias for width in coding.numbers]
    return chosen, f"{widths.count(high)} matrices in {high} and {len(widths) - widths.count(high)} in {low} bits"


def _widths(deltas: dict[Place, Delta], wider: dict[Place, set[int]], low: int, high: int) -> dict[Place, Coding]:
    """Matrices in `low` bits, those of `wider` in `high`; biases in 16."""
    found = {}
    for place, delta in deltas.items():
        narrow, wide = (16, 16) if delta.is_bias else (low, high)
        widths = (wide if n in wider.get(place, ()) else narrow for n in range(len(delta.matrices)))
        found[place] = Coding(tuple(widths))
    return found


def _total(deltas: dict[Place, Delta], chosen: dict[Place, Coding]) -> int:
    return sum(lowbit.size(*deltas[place].size, width) for place, coding in chosen.items() for width in coding.numbers)


def _wider(deltas: dict[Place, Delta], moments: Moments, low: int, high: int, spare: float) -> dict[Place, set[int]]:
    """The matrices that gain most from `high` bits, by what they save of the squared error per byte."""
    ranked = []
    for place, delta in deltas.items():
        if delta.is_bias or low == high:
            continue
        cost = lowbit.size(*delta.size, high) - lowbit.size(*delta.size, low)
        given, moment = delta.matrices, moments.get(place)
        errors = [_squared(lowbit.rounded(given, width, moment=moment) - given, moment) for width in (low, high)]
        ranked += [(float(saved) / cost, cost, place, n) for n, saved in enumerate(errors[0] - errors[1])]
    wider: dict[Place, set[int]] = {}
    for _, cost, place, n in sorted(ranked, key=lambda entry: -entry[0]):
        if cost <= spare:
            spare -= cost
            wider.setdefault(place, set()).add(n)
    return wider


def _squared(error: Tensor, moment: Tensor | None) -> Tensor:
    """Squared error of each slice of `[N, O, I]`, `[N]`: at the outputs if moments of the inputs are known."""
    return (error * (error if moment is None else error @ moment.to(error))).sum(dim=(1, 2))


def _encode(delta: Tensor, coding: Coding, moment: Tensor | None) -> Tensor:
    """All slices of a stack as bytes, one after the other."""
    found: list[Tensor] = [torch.empty(0, device="cpu")] * len(delta)
    for width in sorted(set(coding.numbers)):
        mine = [n for n, given in enumerate(coding.numbers) if given == width]
        data = lowbit.encode(delta[mine], width, moment=None if moment is None else moment[mine])
        for n, row in zip(mine, data, strict=True):
            found[n] = row
    return torch.cat(found)


@contextmanager
def _without(model: nn.Module) -> Iterator[None]:
    """Inside, the base alone computes."""
    layers = [m for m in model.modules() if isinstance(m, PCGrowExperts)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _kept_bytes(layer: PCGrowExperts, name: str) -> int:
    """Bytes of an adapter's tensors beside its bank."""
    banks = {f"{stack}.packed" for stack in layer.adapter_layer_names}
    return sum(t.numel() * t.element_size() for key, t in layer.own_tensors(name).items() if key not in banks)

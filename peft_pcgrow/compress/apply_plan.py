"""Apply a compression plan, in stages, and stop before the losses rise too far."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pcgrow_kernels import lowbit
from peft_pcgrow.architectures import experts, fingerprint, same_base
from peft_pcgrow.architectures.find import Tree, adopt, find_experts
from peft_pcgrow.atomic import all_or_nothing
from peft_pcgrow.compress.calibrate import Calibration, calibrate
from peft_pcgrow.compress.candidates import candidates, check_whole, neurons_at
from peft_pcgrow.compress.compression_plan import CompressionPlan, NodePlan
from peft_pcgrow.compress.skip import drop_layers, layers_in_use
from peft_pcgrow.maps.batches import losses
from peft_pcgrow.maps.distributed import from_first
from peft_pcgrow.packed.checkpoint import note_packing, noted
from peft_pcgrow.packed.forms import WHOLE, Form, first_neurons, form_bytes
from peft_pcgrow.packed.packed_experts import as_it_is, pack
from peft_pcgrow.packed.quantize import storage_bytes

STAGES = 8


@dataclass(frozen=True)
class CompressionReport:
    """What was done.

    Attributes:
        bytes_before: of the experts, in 16 bit.
        bytes_after: of the experts as they are stored now (real, from the buffers).
        model_bytes: of all parameters and buffers of the model now.
        names: of the texts; empty if there was no text to measure on.
        before: their losses before, nats per token.
        after: their losses now, nats per token.
        predicted: change of the mean loss that the plan predicted of what was done, nats per token.
        done: nodes that were changed.
        planned: nodes that the plan would change.
        skipped: layers that were taken out.
        stopped: why before the end, or None.

    Example:
        >>> plan = compress.plan(model, target=0.5, retain=retain, progress=False)
        >>> model, report = compress.apply(model, plan, progress=False)
        >>> report.done, report.stopped, report.names  # all 24 experts
        (24, None, ('retain',))
    """

    bytes_before: int
    bytes_after: int
    model_bytes: int
    names: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    predicted: float
    done: int
    planned: int
    skipped: tuple[int, ...]
    stopped: str | None

    def __str__(self) -> str:
        texts = zip(self.names, self.before, self.after, strict=True)
        measured = ", ".join(f"{name} {before:.4f} -> {after:.4f}" for name, before, after in texts)
        return (
            f"experts {self.bytes_before:,} -> {self.bytes_after:,} bytes "
            f"({self.bytes_after / self.bytes_before:.1%}), {self.done} of {self.planned} nodes changed; losses "
            f"{measured or 'not measured'} (predicted change of their mean {self.predicted:+.4f})"
            + (f"; stopped: {self.stopped}" if self.stopped else "")
        )


def apply(
    model: Any,
    plan: CompressionPlan,
    max_loss_rise: float | None = None,
    *,
    retain: Iterable[Any] | None = None,
    domain: Iterable[Any] | None = None,
    max_tokens: int | None = 65_536,
    progress: bool = True,
) -> tuple[nn.Module, CompressionReport]:
    """Give every expert the form that a plan chose, in place.

    The least harmful changes come first. After each of up to `STAGES` stages the losses of the packed model are
    measured, and a stage that would exceed the limit is taken back. Until the end the model's own weights are kept
    beside what is stored: after an error or an interruption it is as it was.

    Layers of which nothing changes stay as they are in 16-bit models; in wider ones all experts are stored in 16 bits
    from the first stage on.

    Under torch.distributed all processes must call; all measure on the text of all, and stop alike.

    Args:
        model: the model that the plan was made on.
        plan (CompressionPlan): what to do.
        max_loss_rise (float): the most that the loss of any of the texts may rise, nats per token; None: no limit.
        retain: text to measure and to calibrate on, as for `plan`. By default what the plan was made on, which a plan
            read from a file does not hold; without any, rounding is plain and nothing is measured.
        domain: the same, of the domain.
        max_tokens (int): of each of these texts, at most; None: all.
        progress (bool): show progress bars.

    Returns:
        The model and a `CompressionReport`.

    Raises:
        ValueError: a plan for another model, experts that are packed or have adapters, a limit without text to measure
            it on, or losses that exceed the limit before anything is done. The model is as it was then.

    Example:
        >>> plan = compress.plan(model, target=0.5, retain=retain, progress=False)
        >>> model, report = compress.apply(model, plan, max_loss_rise=0.05, progress=False)
        >>> report.after[0] <= report.before[0] + 0.05
        True
    """
    tree = find_experts(model)
    _check_model(model, tree, plan)
    numeric = isinstance(max_loss_rise, (int, float)) and not isinstance(max_loss_rise, bool)
    if max_loss_rise is not None and not (numeric and max_loss_rise >= 0):
        raise ValueError(f"max_loss_rise must be nats per token, 0 or more; got {max_loss_rise!r}")
    texts = {name: batches for name, batches in (("domain", domain), ("retain", retain)) if batches is not None}
    calibration = calibrate(model, texts, max_tokens, progress) if texts else plan.calibration
    if calibration is None and max_loss_rise is not None:
        raise ValueError("this plan was read from a file: give apply() retain= or domain= batches to hold losses on")
    before = _measured(model, calibration)
    noted = dict(zip(plan.names, plan.losses, strict=True))
    for name, loss in zip(calibration.names if calibration is not None else (), before, strict=True):
        if max_loss_rise is not None and loss - noted.get(name, loss) > max_loss_rise:
            raise ValueError(
                f"the {name} loss is {loss:.4f} already, {loss - noted[name]:.4f} above what the plan was made at "
                f"({noted[name]:.4f}), and max_loss_rise is {max_loss_rise}: plan again on this model"
            )
    writer = _Writer(model, adopt(tree), plan, calibration)
    limit = [loss + max_loss_rise for loss in before] if max_loss_rise is not None else None
    after, stopped, done, predicted, skipped = before, None, [], 0.0, ()
    stages = _stages(plan, 1 if limit is None else STAGES)
    with all_or_nothing() as undoing:
        undoing.append(partial(writer.take_back, 0))
        for number, (gone, nodes) in enumerate(tqdm(stages, desc="compressing", unit="stage", disable=not progress)):
            undo = writer.write(gone, nodes)
            found = _measured(model, calibration)
            if limit is not None and not all(loss <= most for loss, most in zip(found, limit, strict=True)):
                undo()
                assert calibration is not None
                worst = max(range(len(found)), key=lambda i: found[i] - before[i])
                stopped = (
                    f"stage {number + 1} of {len(stages)} would have raised the {calibration.names[worst]} loss by "
                    f"{found[worst] - before[worst]:.4f}, more than {max_loss_rise}"
                )
                break
            after, done, skipped = found, done + nodes, (*skipped, *gone)
            predicted += sum(node.predicted for node in nodes) + (plan.skipping if gone else 0.0)
        sites = find_experts(model).sites
        if any(experts.is_packed(site.base) for site in sites):
            note_packing(model)
    report = CompressionReport(
        plan.total,
        sum(_stored(site.base) for site in sites),
        storage_bytes(chain(model.parameters(), model.buffers())),
        calibration.names if calibration is not None else (),
        tuple(before),
        tuple(after),
        predicted,
        sum(node.form != WHOLE for node in done),
        sum(node.form != WHOLE for node in plan.nodes),
        skipped,
        stopped,
    )
    return model, report


def _measured(model: nn.Module, calibration: Calibration | None) -> list[float]:
    """The loss of each text; the same on all processes, which go by it."""
    return from_first(losses(model, calibration.batches)) if calibration is not None else []


def _check_model(model: nn.Module, tree: Tree, plan: CompressionPlan) -> None:
    if not isinstance(plan, CompressionPlan):
        raise ValueError(
            f"apply takes a CompressionPlan, got {type(plan).__name__}: CompressionPlan.load(path) reads one"
        )
    plan.check()
    check_whole(tree)
    if unlike := same_base.difference(plan.base, fingerprint.describe_base(model, tree)):
        raise ValueError(f"this plan was made for another model ({unlike}): plan(model, ...) on this one")
    nodes = sorted((node.layer, node.expert) for node in plan.nodes)
    kept = [(site.layer, e) for site in tree.sites if site.layer not in plan.skipped for e in range(site.experts)]
    base = tree.sites[0].base
    most = experts.intermediate_size(base)
    if nodes != kept or any((node.form.neurons or 0) >= most for node in plan.nodes):
        raise ValueError(
            "this plan was altered: it must give each expert that is left one form, of fewer neurons than the "
            f"{most} that there are or of all (None); plan again"
        )
    if strange := set(plan.skipped) - {site.layer for site in tree.sites}:
        raise ValueError(f"this plan was altered: it skips layers {sorted(strange)}, which have no experts; plan again")
    whole = form_bytes(base, WHOLE)
    sizes = {form: form_bytes(base, form) for form in {node.form for node in plan.nodes}}
    wrong = [node for node in plan.nodes if (node.before, node.after) != (whole, sizes[node.form])]
    if wrong:
        raise ValueError(
            f"this plan was altered: {wrong[0]}, where that form takes {sizes[wrong[0].form]:,} of "
            f"{whole:,} bytes; plan again"
        )


def _stages(plan: CompressionPlan, count: int) -> list[tuple[tuple[int, ...], list[NodePlan]]]:
    """The nodes, least predicted change per byte saved first, in stages that save alike; layers to skip come first."""
    changed = [node for node in plan.nodes if node.form != WHOLE]
    ordered = sorted(changed, key=lambda node: node.predicted / max(node.before - node.after, 1))
    saved, stages = 0, [[] for _ in range(count)]
    whole = sum(node.before - node.after for node in ordered)
    for node in ordered:
        stages[min(saved * len(stages) // max(whole, 1), len(stages) - 1)].append(node)
        saved += node.before - node.after
    skips = [(tuple(plan.skipped), [])] if plan.skipped else []
    return [*skips, *(((), stage) for stage in [stage for stage in stages if stage] or [[]])]


def _stored(base: experts.ExpertsModule) -> int:
    """Bytes that the matrices of a layer's experts take now."""
    stacks = [experts.expert_stacks(base)[name] for name in experts.matrices(base)]
    held = base.packed_buffers().values() if experts.is_packed(base) else stacks
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


class _Writer:
    """Packs a model's experts layer by layer into the forms of a plan, and can take back what it did."""

    def __init__(self, model: nn.Module, tree: Tree, plan: CompressionPlan, calibration: Calibration | None):
        self.model, self.calibration = model, calibration
        self.bases = {site.layer: site.base for site in tree.sites if site.layer not in plan.skipped}
        self.planned: dict[int, dict[int, Form]] = {}
        for node in plan.nodes:
            if node.form != WHOLE:
                self.planned.setdefault(node.layer, {})[node.expert] = node.form
        self.forms = {layer: (WHOLE,) * base.num_experts for layer, base in self.bases.items()}
        # by layer: what will be stored of each expert, its biases, and the module before
        self.data: dict[int, dict[int, dict[str, Tensor]]] = {}
        self.biases: dict[int, dict[str, Tensor]] = {}
        self.whole: dict[int, Callable[[], None]] = {}
        self.undo: list[Callable[[], None]] = [noted(model)]

    def take_back(self, steps: int) -> None:
        """All but the first so many steps."""
        while len(self.undo) > steps:
            self.undo[-1]()
            self.undo.pop()

    @torch.no_grad()
    def write(self, skipped: Sequence[int], nodes: Sequence[NodePlan]) -> Callable[[], None]:
        """Take out layers, or give some experts their forms; what is returned takes it back."""
        undo = partial(self.take_back, len(self.undo))
        if skipped:
            self.undo.append(layers_in_use(self.model))
            drop_layers(self.model, skipped)
            return undo
        for layer, base in self.bases.items():
            chosen = {node.expert: node.form for node in nodes if node.layer == layer}
            wide = not experts.is_packed(base) and experts.expert_stacks(base)["down_proj"].element_size() > 2
            if chosen or wide:
                before = partial(self._restore, layer, self.forms[layer], as_it_is(base))
                self.undo.append(before)
                # made once, of the weights as they were
                self.whole.setdefault(layer, before)
                if layer not in self.data:
                    self.data[layer], self.biases[layer] = self._make(layer)
                forms = list(self.forms[layer])
                for expert, form in chosen.items():
                    forms[expert] = form
                self._pack(layer, tuple(forms))
        return undo

    def _restore(self, layer: int, forms: tuple[Form, ...], before: Callable[[], None]) -> None:
        before()
        self.forms[layer] = forms

    def _make(self, layer: int) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
        """What to store of each expert that changes, by stack, and the layer's biases as its thinned experts need
        them."""
        base, planned = self.bases[layer], self.planned.get(layer, {})
        forms = tuple(dict.fromkeys(planned.values()))
        names = self.calibration.names if self.calibration is not None else ("none",)
        sample = self.calibration.layers[layer] if self.calibration is not None else None
        made = candidates(base, sample, forms, len(names)) if forms else None
        biases = _biases(base)
        data = {}
        for expert, form in planned.items():
            assert made is not None
            # a copy: what was made lies in one tensor with the forms of all others
            data[expert] = {name: rows[expert].clone() for name, rows in made.data[form].items()}
            if form.neurons:
                _move_biases(base, biases, expert, made.kept[form][expert])
        return data, biases

    def _pack(self, layer: int, forms: tuple[Form, ...]) -> None:
        base = self.bases[layer]
        self.whole[layer]()
        half = lowbit.half_of(experts.expert_stacks(base)["down_proj"].dtype)
        data: dict[str, list[Tensor]] = {}
        for name in experts.matrices(base):
            stack, data[name] = experts.expert_stacks(base)[name].detach(), []
            for expert, form in enumerate(forms):
                if form == WHOLE:
                    matrix = stack[expert].mT if base.is_transposed else stack[expert]
                    data[name] += lowbit.encode(matrix[None], 16, half=half)
                else:
                    data[name].append(self.data[layer][expert][name])
        for name, values in _biases(base).items():
            for expert, form in enumerate(forms):
                if form.neurons:
                    values[expert] = self.biases[layer][name][expert]
            trains = experts.expert_stacks(base)[name].requires_grad
            base._parameters[name] = nn.Parameter(values, requires_grad=trains)
        pack(base, forms, data, half)
        self.forms[layer] = forms


def _biases(base: experts.ExpertsModule) -> dict[str, Tensor]:
    """Copies of the biases, `[E, O]` by stack."""
    every = torch.arange(base.num_experts, device="cpu")
    return {
        name: stack.detach()[every] for name, stack in experts.expert_stacks(base).items() if name.endswith("_bias")
    }


def _move_biases(base: experts.ExpertsModule, biases: dict[str, Tensor], expert: int, kept: Tensor) -> None:
    """Biases stand as their neurons do: those that are left come first."""
    for name, bias in biases.items():
        if name != "down_proj_bias":
            left = bias[expert][neurons_at(base, name, kept)]
            bias[expert] = 0
            bias[expert, first_neurons(base, name, len(kept))[1]] = left

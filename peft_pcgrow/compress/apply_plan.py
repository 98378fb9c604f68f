"""Apply a compression plan, in stages, and stop before the losses rise too far."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_pcgrow import experts
from peft_pcgrow.compress import codec
from peft_pcgrow.compress.calibrate import Calibration, calibrate, losses
from peft_pcgrow.compress.candidates import candidates, neurons_at
from peft_pcgrow.compress.compression_plan import CompressionPlan, NodePlan
from peft_pcgrow.compress.packed import WHOLE, Form, first_neurons, full_matrix, matrix_shape, pack
from peft_pcgrow.compress.persist import note_packing
from peft_pcgrow.compress.quantize import storage_bytes
from peft_pcgrow.compress.skip import drop_layers

STAGES = 8


@dataclass(frozen=True)
class CompressionReport:
    """What was done.

    Attributes:
        bytes_before, bytes_after: of the experts, in 16 bit before, and as stored now (real, from the buffers).
        model_bytes: of all parameters and buffers of the model now.
        names: of the texts. before, after: their losses, nats per token; empty if there was no text to measure on.
        predicted: change of the mean loss that the plan expected of what was done.
        done: nodes that were changed, of `planned`. skipped: layers that were taken out.
        stopped: why before the end, or None.
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

    The least harmful changes come first. After each of up to `STAGES` stages the losses are measured, and a stage that
    would exceed the limit is taken back. In the end the experts are packed (see `compress.packed`).

    Args:
        model: the model that the plan was made on.
        max_loss_rise: the most that the loss of any of the texts may rise, nats per token; None: no limit.
        retain, domain: text to measure and to calibrate on, as for `plan`. By default what the plan was made on, which
            a plan read from a file does not hold; without any, rounding is plain and nothing is measured.

    Returns:
        The model and a `CompressionReport`.

    Raises:
        ValueError: a plan for another model, a limit without text to measure it on, or losses that exceed the limit
            before anything is done. The model is as it was then.
    """
    tree = experts.find_experts(model)
    _check_model(model, tree, plan)
    if max_loss_rise is not None and not max_loss_rise >= 0:
        raise ValueError(f"max_loss_rise must be nats per token, 0 or more; got {max_loss_rise!r}")
    texts = {name: batches for name, batches in (("domain", domain), ("retain", retain)) if batches is not None}
    calibration = calibrate(model, texts, max_tokens, progress) if texts else plan.calibration
    if calibration is None and max_loss_rise is not None:
        raise ValueError("this plan was read from a file: give apply() retain= or domain= batches to hold losses on")
    before = losses(model, calibration.batches) if calibration is not None else []
    noted = dict(zip(plan.names, plan.losses, strict=True))
    for name, loss in zip(calibration.names if calibration is not None else (), before, strict=True):
        if max_loss_rise is not None and loss - noted.get(name, loss) > max_loss_rise:
            raise ValueError(
                f"the {name} loss is {loss:.4f} already, {loss - noted[name]:.4f} above what the plan was made at "
                f"({noted[name]:.4f}), and max_loss_rise is {max_loss_rise}: plan again on this model"
            )
    writer = _Writer(model, tree, plan, calibration)
    limit = [loss + max_loss_rise for loss in before] if max_loss_rise is not None else None
    after, stopped, done = before, None, []
    stages = _stages(plan, 1 if limit is None else STAGES)
    for number, nodes in enumerate(tqdm(stages, desc="compressing", unit="stage", disable=not progress)):
        undo = writer.write(nodes)
        if calibration is None:
            done += nodes
            continue
        found = losses(model, calibration.batches)
        if limit is not None and not all(loss <= most for loss, most in zip(found, limit, strict=True)):
            undo()
            worst = max(range(len(found)), key=lambda i: found[i] - before[i])
            stopped = (
                f"stage {number + 1} of {len(stages)} would have raised the {calibration.names[worst]} loss by "
                f"{found[worst] - before[worst]:.4f}, more than {max_loss_rise}"
            )
            break
        after = found
        done += nodes
    writer.pack()
    note_packing(model)
    skipped = tuple(plan.skipped) if writer.dropped else ()
    site_bytes = sum(
        buffer.numel() for site in experts.find_experts(model).sites for buffer in site.base.packed_buffers().values()
    )
    report = CompressionReport(
        plan.total,
        site_bytes,
        storage_bytes(chain(model.parameters(), model.buffers())),
        calibration.names if calibration is not None else (),
        tuple(before),
        tuple(after),
        sum(node.predicted for node in done),
        sum(node.form != WHOLE for node in done),
        sum(node.form != WHOLE for node in plan.nodes),
        skipped,
        stopped,
    )
    return model, report


def _check_model(model: nn.Module, tree: experts.Tree, plan: CompressionPlan) -> None:
    packed = [site.name for site in tree.sites if experts.is_packed(site.base)]
    if packed:
        raise ValueError(f"{packed[0]} is packed already: apply a plan to the model in full precision that it is for")
    base = experts.describe_base(model, tree)
    same = ("model_type", "layers", "experts", "shapes")
    if any(plan.base.get(key) != base[key] for key in same) or experts.other_routers(plan.base, base):
        raise ValueError(
            f"this plan was made for another model ({plan.base.get('model_type')}, "
            f"{len(plan.base.get('layers', ()))} layers with experts): plan(model, ...) on this one"
        )


def _stages(plan: CompressionPlan, count: int) -> list[list[NodePlan]]:
    """The nodes, least predicted change per byte saved first, in stages that save alike; layers first."""
    changed = [node for node in plan.nodes if node.form != WHOLE]
    ordered = sorted(changed, key=lambda node: node.predicted / max(node.before - node.after, 1))
    saved, stages = 0, [[] for _ in range(min(count, max(len(ordered), 1)))]
    whole = sum(node.before - node.after for node in ordered)
    for node in ordered:
        stages[min(saved * len(stages) // max(whole, 1), len(stages) - 1)].append(node)
        saved += node.before - node.after
    return [*([[]] if plan.skipped else []), *[stage for stage in stages if stage]]


class _Writer:
    """Makes the forms of a plan and puts what they compute into the model, or takes it back."""

    def __init__(self, model: nn.Module, tree: experts.Tree, plan: CompressionPlan, calibration: Calibration | None):
        self.model, self.plan = model, plan
        self.sites = {site.layer: site for site in tree.sites}
        self.forms = {site.layer: [WHOLE] * site.experts for site in tree.sites}
        self.data: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.dropped = False
        self.calibration = calibration

    @torch.no_grad()
    def write(self, nodes: Sequence[NodePlan]) -> Any:
        """What the experts will compute, in the dense stacks; gives a function that takes it back."""
        undo = []
        if not nodes:
            undo.append(drop_layers(self.model, self.plan.skipped))
            self.dropped = True
        for layer in sorted({node.layer for node in nodes}):
            undo.append(self._write_layer(layer, [node for node in nodes if node.layer == layer]))

        def take_back() -> None:
            for each in reversed(undo):
                each()
            self.dropped = self.dropped and bool(nodes)

        return take_back

    def _write_layer(self, layer: int, nodes: list[NodePlan]) -> Any:
        base = self.sites[layer].base
        stacks = experts.expert_stacks(base)
        chosen = [node.expert for node in nodes]
        originals = experts.read_experts(base, chosen)
        forms = tuple(dict.fromkeys(node.form for node in nodes))
        sample = self.calibration.layers[layer] if self.calibration is not None else None
        found = candidates(base, sample, forms, len(self.calibration.names) if self.calibration is not None else 1)
        for node in nodes:
            expert, form = node.expert, node.form
            self.forms[layer][expert] = form
            self.data[layer, expert] = {name: data[expert] for name, data in found.data[form].items()}
            kept = found.kept[form][expert] if form.neurons else None
            for name, data in self.data[layer, expert].items():
                shape = matrix_shape(base, name, form)
                matrix = codec.decode(data, *shape, form.width, form.sparsity) if form.neurons != 0 else None
                stacks[name].data[expert] = full_matrix(base, name, form, matrix)
            _move_biases(base, expert, form, kept)

        def take_back() -> None:
            for name, values in originals.items():
                stacks[name].data[chosen] = values
            for node in nodes:
                self.forms[layer][node.expert] = WHOLE
                del self.data[layer, node.expert]

        return take_back

    @torch.no_grad()
    def pack(self) -> None:
        """Replace the dense stacks by what is stored."""
        for layer, site in self.sites.items():
            if self.dropped and layer in self.plan.skipped:
                continue
            data: dict[str, list[Tensor]] = {}
            for name in experts.matrices(site.base):
                stack = experts.expert_stacks(site.base)[name].detach()
                data[name] = []
                for expert, form in enumerate(self.forms[layer]):
                    if form == WHOLE:
                        matrix = stack[expert].mT if site.base.is_transposed else stack[expert]
                        data[name] += codec.encode(matrix[None], 16)
                    else:
                        data[name].append(self.data[layer, expert][name])
            pack(site.base, self.forms[layer], data)


def _move_biases(base: experts.ExpertsModule, expert: int, form: Form, kept: Tensor | None) -> None:
    """Biases stand as their neurons do: those that are left come first."""
    for name, stack in experts.expert_stacks(base).items():
        if stack.dim() != 2:
            continue
        if form.neurons == 0:
            stack.data[expert] = 0
        elif kept is not None and name != "down_proj_bias":
            left = stack.data[expert][neurons_at(base, name, kept)]
            stack.data[expert] = 0
            stack.data[expert, first_neurons(base, name, len(kept))[1]] = left

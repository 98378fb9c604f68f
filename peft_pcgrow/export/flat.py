"""Write a grown model as a plain checkpoint that loads without this package.

Deepened experts are written over the base's. A newborn becomes one more expert with a router row of its own, under the
base's top-k (*flat* routing). A linear row sees one token and cannot read the text before it, so flat routing only
comes near to branch routing: the row is the donor's plus the least-squares fit to the gate's margin, and how far the
result departs is measured and reported. All layers of the plain formats hold equally many experts: layers with fewer
newborns are filled up with experts that a selection bias of -inf, where the router has one, keeps from being chosen.
"""

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm.auto import tqdm

from peft_pcgrow.adapter.gated_lora import is_gated
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.lora_beside import lora_layers
from peft_pcgrow.adapter.model import PCGrowModel
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.adopted_experts import kind_of
from peft_pcgrow.architectures.find import ExpertsSite, Tree, adopt, find_experts
from peft_pcgrow.architectures.host import implementation_name
from peft_pcgrow.architectures.router_capacity import COUNTS, check_flat, logit_bias, selection_bias
from peft_pcgrow.files import check_empty, staged
from peft_pcgrow.maps.batches import IGNORED, Batch, read_batches, token_losses

# margins beyond this many nats tell a router no more
CLIP = 8.0
ROUTER_RIDGE = 1e-3


@dataclass(frozen=True)
class FlatReport:
    """How far flat routing departs from branch routing on the text given.

    Attributes:
        loss_branch: mean loss of the grown model, nats per token.
        loss_flat: mean loss of the checkpoint, nats per token.
        kl: mean Kullback-Leibler divergence of the checkpoint's predictions from the grown model's, nats per token.
        agreement: share of tokens with the same most likely next token.
        reload_difference: largest difference of the reloaded checkpoint's logits from those of the model it was written
            from.
        experts: experts in each layer of the checkpoint.
    """

    loss_branch: float
    loss_flat: float
    kl: float
    agreement: float
    reload_difference: float
    experts: int

    def __str__(self) -> str:
        return (
            f"flat checkpoint with {self.experts} experts a layer: loss {self.loss_flat:.3f} against "
            f"{self.loss_branch:.3f} with branch routing, KL {self.kl:.3f} nats/token, {self.agreement:.1%} of the "
            f"most likely tokens agree; reloaded logits differ by {self.reload_difference:.1e}"
        )


def export_flat(model: PeftModel, folder: str | os.PathLike, batches: Iterable[Any]) -> FlatReport:
    """Write the active adapters and the base as one plain checkpoint.

    Args:
        model (PeftModel): with newborns of one adapter or of several; it is left as it was. Needs the memory of a
            second model.
        folder (path): must not exist, or be empty; it appears when the checkpoint has been reloaded and compared.
        batches: text like the domain's and the retain text, as for `measure_errors`, to fit rows and compare on.

    Returns:
        A `FlatReport`: how far the checkpoint departs from the model on that text.

    Raises:
        ValueError: no newborns, LoRA behind gates, a quantized base, or an architecture whose format cannot hold them.
        FileExistsError: `folder` has something in it.
        RuntimeError: the reloaded checkpoint computes something else.

    Example:
        >>> emap = measure_errors(model, batches, retain=retain, progress=False)
        >>> config = PCGrowConfig(error_map=emap, grow="spawn", router="flat", budget=0.1, gate_fpr=0.1)
        >>> report = export_flat(get_peft_model(model, config), folder / "flat", batches + retain)
        >>> report.experts, report.reload_difference  # 8, and a newborn in each layer
        (9, 0.0)
    """
    target = check_empty(folder)
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, PCGrowModel):
        raise ValueError(f"export_flat takes a PeftModel grown by peft_pcgrow, got {type(model).__name__}")
    if any(layer.merged for layer in tuner.tuner_layers()):
        raise ValueError("an adapter is merged, which switches newborns off: call unmerge_adapter() before export_flat")
    base: Any = tuner.model
    tree = adopt(find_experts(base))
    for name, lora in lora_layers(base):
        if not lora.disable_adapters and any(is_gated(lora, adapter) for adapter in lora.active_adapters):
            raise ValueError(
                f"LoRA on {name} holds for tokens behind a gate, and a plain checkpoint has it for all tokens or none: "
                "keep the adapter, or grow without lora="
            )
    grown: dict[int, PCGrowExperts] = {}
    for layer in tuner.tuner_layers():
        if kind_of(layer.base_layer) == "routed":
            grown[layer.layer_index] = layer
        elif _newborns(layer):
            raise ValueError(
                f"layer {layer.layer_index} of {type(base).__name__} has a newborn beside an MLP that no router "
                "chooses, so a plain checkpoint cannot hold it: keep the adapter"
            )
    newborns = {site.layer: _newborns(grown.get(site.layer)) for site in tree.sites}
    extra = check_flat(base, tree, {layer: len(found) for layer, found in newborns.items()})
    device = next(base.parameters()).device
    read = list(read_batches(model, batches))
    if not read:
        raise ValueError("export_flat fits router rows on text and compares on it: batches is empty")
    was_training = model.training
    model.eval()
    try:
        rows, branch = _fit_rows(model, tree, grown, newborns, read)
        flat = _build(base, tree, grown, newborns, rows, extra, tuner.active_adapters)
    finally:
        model.train(was_training)
    with staged(target) as staging:
        flat.save_pretrained(staging)
        again = type(flat).from_pretrained(staging, dtype=next(flat.parameters()).dtype).to(device).eval()
        again.set_experts_implementation(implementation_name(base.config))
        report = _compare(flat, again, read, branch, tree.sites[0].experts + extra)
        if not report.reload_difference == 0:
            raise RuntimeError(
                f"the checkpoint's logits differ by {report.reload_difference} from those of the model that it was "
                f"written from: this version of transformers does not keep {type(flat).__name__}'s weights as they are"
            )
    return report


def _newborns(layer: PCGrowExperts | None) -> list[tuple[str, int, int]]:
    """(adapter, donor, place in its bank) of each newborn in use."""
    if layer is None or layer.disable_adapters:
        return []
    births = [(name, layer.births[name]) for name in layer.active_banks()]
    if younger := [name for name, birth in births if birth.parents]:
        raise ValueError(
            f"adapter {younger[0]!r} has newborns of newborns (layer {layer.layer_index}), and no router of a plain "
            "checkpoint asks one expert after another: keep the adapters, or export without it"
        )
    return [(name, donor, birth.grown.index(donor)) for name, birth in births for donor in birth.spawned]


@torch.no_grad()
def _fit_rows(
    model: PeftModel,
    tree: Tree,
    grown: dict[int, PCGrowExperts],
    newborns: dict[int, list[tuple[str, int, int]]],
    read: list[Batch],
) -> tuple[dict[int, dict[str, Tensor]], list[Tensor]]:
    """What is added to the donor's router row, `[H + 1]` (the last one constant) by adapter; and the grown logits."""
    sums: dict[tuple[int, str], list[Tensor]] = {}
    keep = torch.ones(0, dtype=torch.bool, device="cpu")

    def seen(layer: PCGrowExperts, args: tuple) -> None:
        x = args[0].detach()[keep]
        x1 = torch.cat([x.double(), torch.ones_like(x[:, :1], dtype=torch.float64)], dim=1)
        for name in {name for name, _, _ in newborns[layer.layer_index]}:
            margin = layer.margin(name, args[0])[keep].double().clamp(-CLIP, CLIP)
            held = sums.setdefault(
                (layer.layer_index, name), [torch.zeros((), device="cpu"), torch.zeros((), device="cpu")]
            )
            held[0] = held[0] + x1.mT @ x1
            held[1] = held[1] + x1.mT @ margin

    handles = [layer.register_forward_pre_hook(seen) for layer in grown.values() if newborns[layer.layer_index]]
    logits = []
    try:
        for inputs, _, rows in tqdm(read, desc="fitting router rows", unit="batch", leave=False):
            keep = rows.real.reshape(-1)
            logits.append(model(**inputs, use_cache=False).logits.float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, dict[str, Tensor]] = {}
    for (layer, name), (gram, target) in sums.items():
        site = next(site for site in tree.sites if site.layer == layer)
        width = len(target) - 1
        if logit_bias(site) is None:
            # no intercept: what is constant in the inputs has to do
            gram, target = gram[:-1, :-1], target[:-1]
        gram = gram + ROUTER_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        row = torch.linalg.solve(gram, target)
        found.setdefault(layer, {})[name] = torch.nn.functional.pad(row, (0, width + 1 - len(row)))
    return found, logits


@torch.no_grad()
def _build(
    base: Any,
    tree: Tree,
    grown: dict[int, PCGrowExperts],
    newborns: dict[int, list[tuple[str, int, int]]],
    rows: dict[int, dict[str, Tensor]],
    extra: int,
    active: Sequence[str],
) -> Any:
    """A model of the base's own class with `extra` more experts in each layer."""
    config = copy.deepcopy(base.config)
    text = experts.text_config(config)
    for name in COUNTS:
        if getattr(text, name, None) == tree.sites[0].experts:
            setattr(text, name, tree.sites[0].experts + extra)
    state = _plain_state(base, active)
    paths = {module: name for name, module in base.named_modules()}
    for site in tree.sites:
        layer = grown.get(site.layer)
        weights = {}
        if layer is not None and not layer.disable_adapters:
            weights = {adapter: layer.weights(adapter) for adapter in layer.active_banks()}
        prefix = paths[site.base].replace(".base_layer", "")
        for name in experts.expert_stacks(site.base):
            stack = state[f"{prefix}.{name}"]
            for adapter, whole in weights.items():
                birth = grown[site.layer].births[adapter]
                for expert in set(birth.grown) - set(birth.spawned):
                    stack[expert] = whole[name][birth.grown.index(expert)].to(stack.dtype)
            more = [weights[adapter][name][place] for adapter, _, place in newborns[site.layer]]
            # experts that are never chosen still have to be somewhere
            more += [stack[0]] * (extra - len(more))
            state[f"{prefix}.{name}"] = torch.cat([stack, torch.stack([m.to(stack) for m in more])])
        _extend_router(state, paths[site.router], site, newborns[site.layer], rows.get(site.layer, {}), extra)
    flat = type(base)(config)
    # as they are: a cast of the whole would also round buffers that models keep in fp32
    flat.load_state_dict(state, assign=True)
    flat.tie_weights()
    flat.generation_config = copy.deepcopy(base.generation_config)
    flat.set_experts_implementation(implementation_name(base.config))
    return flat.to(next(base.parameters()).device).eval()


def _plain_state(base: nn.Module, active: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the base's tensors by the names that they had before it was wrapped."""
    state: dict[str, Tensor] = {}
    # LoRA layers, each a copy that was merged as PEFT merges: the base stays as it is
    layers = {name: copy.deepcopy(layer) for name, layer in lora_layers(base)}
    for layer in layers.values():
        layer.merge()
    beside = {
        f"{name}.base_layer.{k}": t for name, m in layers.items() for k, t in m.get_base_layer().state_dict().items()
    }
    for name, tensor in {**base.state_dict(), **beside}.items():
        if ".lora_" in name:
            continue
        # of modules that were trained along (modules_to_save), the active adapter's copy
        before, trained, after = name.partition(".modules_to_save.")
        adapter, _, rest = after.partition(".")
        if "pcgrow_" in name or (trained and adapter not in active):
            continue
        plain = f"{before}.{rest}" if trained else name.replace(".base_layer.", ".")
        original = ".original_module." in plain
        plain = plain.replace(".original_module.", ".")
        if not (original and plain in state):
            state[plain] = tensor.detach().clone()
    return state


def _extend_router(
    state: dict[str, Tensor],
    path: str,
    site: ExpertsSite,
    newborns: list[tuple[str, int, int]],
    rows: dict[str, Tensor],
    extra: int,
) -> None:
    weight, bias = state[f"{path}.weight"], selection_bias(site)
    added = torch.stack([weight[donor] + rows[name][:-1].to(weight) for name, donor, _ in newborns] or [weight[0]])
    fill = weight[:1].expand(extra - len(newborns), -1)
    state[f"{path}.weight"] = torch.cat([weight, added[: len(newborns)], fill])
    if bias is not None:
        held = state[f"{path}.{bias}"]
        intercepts = [rows[name][-1].to(held) if logit_bias(site) else held.new_zeros(()) for name, _, _ in newborns]
        more = [held[donor] + shift for (_, donor, _), shift in zip(newborns, intercepts, strict=True)]
        more += [held.new_full((), float("-inf"))] * (extra - len(newborns))
        state[f"{path}.{bias}"] = torch.cat([held, torch.stack(more)])


@torch.no_grad()
def _compare(flat: Any, again: Any, read: list[Batch], branch: list[Tensor], count: int) -> FlatReport:
    difference, kl, agree, tokens, losses, labels = 0.0, 0.0, 0.0, 0, [0.0, 0.0], 0
    for (inputs, target, rows), grown in zip(read, branch, strict=True):
        logits = flat(**inputs, use_cache=False).logits.float().cpu()
        reloaded = again(**inputs, use_cache=False).logits.float().cpu()
        keep = rows.real.cpu()
        # not Python's max, which a NaN gets past
        difference = float(
            torch.stack([torch.tensor(difference, device="cpu"), (logits - reloaded)[keep].abs().max()]).max()
        )
        ours, theirs = log_softmax(grown[keep], -1), log_softmax(logits[keep], -1)
        kl += float((ours.exp() * (ours - theirs)).sum())
        agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(ours)
        labels += int((target[:, 1:] != IGNORED).sum())
        for i, found in enumerate((grown, logits)):
            losses[i] += float(token_losses(found, target).sum())
    per_token = [loss / max(labels, 1) for loss in losses]
    return FlatReport(per_token[0], per_token[1], kl / tokens, agree / tokens, difference, count)

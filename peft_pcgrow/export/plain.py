"""Write a compressed model as a plain checkpoint that loads without this package.

Plain formats hold stacks of equally many experts with equally many neurons in every layer, in 16 bits. Thinned experts
become smaller matrices; removed ones, and their rows of the router, are left out, so that a token goes to the next best
expert where the compressed model adds nothing. How far that departs is measured and reported.
"""

import copy
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import ExpertsSite, adopt, find_experts
from peft_pcgrow.architectures.host import implementation_name
from peft_pcgrow.architectures.plain_weight import loaded_quantized
from peft_pcgrow.architectures.router_capacity import COUNTS, selection_bias
from peft_pcgrow.files import check_empty, staged
from peft_pcgrow.maps.batches import Batch, read_batches
from peft_pcgrow.packed.forms import WHOLE, Form
from peft_pcgrow.packed.packed_experts import PREFIX

# how configs may call the intermediate size of experts
_SIZES = re.compile("intermediate|ffn|expert|moe")


@dataclass(frozen=True)
class PlainReport:
    """What a plain checkpoint holds, and how far it departs from the compressed model on the text given.

    Attributes:
        experts: of each layer.
        neurons: of each expert.
        removed: experts of each layer that were left out.
        bytes: of the weights in the checkpoint.
        compressed_bytes: of those of the compressed model.
        reload_difference: largest difference of the reloaded checkpoint's logits from those of the model it was written
            from.
        difference: largest difference of the checkpoint's logits from the compressed model's.
        kl: mean Kullback-Leibler divergence of the checkpoint's predictions from the compressed model's, nats a token.

    Example:
        >>> quantized = compress.quantize_experts(model, "int8")
        >>> report = compress.export_plain(model, folder / "plain", retain, dequantize=True)
        >>> isinstance(report, compress.PlainReport), report.compressed_bytes < report.bytes
        (True, True)
    """

    experts: int
    neurons: int
    removed: int
    bytes: int
    compressed_bytes: int
    reload_difference: float
    difference: float
    kl: float

    def __str__(self) -> str:
        gone = f"; what went to the {self.removed} removed experts of each layer goes to others" if self.removed else ""
        return (
            f"plain checkpoint with {self.experts} experts of {self.neurons} neurons a layer, {self.bytes / 1e6:.1f} "
            f"MB ({self.compressed_bytes / 1e6:.1f} MB compressed): logits differ by up to {self.difference:.1e} from "
            f"the compressed model's, KL {self.kl:.1e} nats/token{gone}; reloaded logits differ by "
            f"{self.reload_difference:.1e}"
        )


@dataclass(frozen=True)
class _Layer:
    site: ExpertsSite
    forms: tuple[Form, ...]

    @property
    def kept(self) -> list[int]:
        return [expert for expert, form in enumerate(self.forms) if form.neurons != 0]


def export_plain(
    model: PreTrainedModel, folder: str | os.PathLike, batches: Iterable[Any], dequantize: bool = False
) -> PlainReport:
    """Write a compressed model as a plain checkpoint.

    Args:
        model (PreTrainedModel): with packed experts, and without adapters; it is left as it was. Needs the memory of
            two plain models.
        folder (path): must not exist, or be empty; it appears when the checkpoint has been reloaded and compared.
        batches: text to compare on, as for `measure_errors`.
        dequantize (bool): write experts of fewer than 16 bits, and sparse ones, out as whole matrices in the model's
            dtype.

    Returns:
        A `PlainReport`.

    Raises:
        ValueError: the plain format cannot hold these experts; nothing is packed; adapters; another quantization.
        FileExistsError: `folder` has something in it.
        RuntimeError: the reloaded checkpoint computes something else.

    Example:
        >>> quantized = compress.quantize_experts(model, "nf4")
        >>> report = compress.export_plain(model, folder / "plain", retain, dequantize=True)
        >>> report.experts, report.removed, report.reload_difference
        (8, 0, 0.0)
    """
    target = check_empty(folder)
    held: Any = model
    layers = _layers(held)
    neurons = _check_forms(held, layers, dequantize)
    device = next(held.parameters()).device
    read = [read for read in read_batches(held, batches) if read.tokens]
    if not read:
        raise ValueError("export_plain compares the checkpoint with the model on text: batches holds no tokens")
    plain = _build(held, layers, neurons)
    was_training = held.training
    held.eval()
    try:
        with staged(target) as staging:
            plain.save_pretrained(staging)
            again = type(held).from_pretrained(staging, dtype=held.dtype).to(device).eval()
            again.set_experts_implementation(implementation_name(held.config))
            difference, reloaded, kl = _compare(held, plain, again, read)
            if not reloaded == 0:
                raise RuntimeError(
                    f"the checkpoint's logits differ by {reloaded} from those of the model that it was written from: "
                    f"this version of transformers does not keep {type(held).__name__}'s weights as they are"
                )
            written = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
    finally:
        held.train(was_training)
    kept, removed = len(layers[0].kept), layers[0].site.experts - len(layers[0].kept)
    return PlainReport(kept, neurons, removed, written, _bytes(held), reloaded, difference, kl)


def _layers(model: Any) -> list[_Layer]:
    sites = adopt(find_experts(model)).sites
    named = type(model).__name__
    if not isinstance(model, PreTrainedModel) or any(site.module is not site.base for site in sites):
        raise ValueError(
            f"export_plain takes a compressed transformers model without adapters, got {named}: call unload() on it, "
            "or grow the reloaded plain checkpoint"
        )
    if loaded_quantized(model.config):
        raise ValueError(f"{named} was loaded quantized: load it in bf16 or fp32, compress that, and export it")
    if not any(experts.is_packed(site.base) for site in sites):
        raise ValueError(f"{named} has no packed experts: save_pretrained writes it as it is")
    return [_Layer(site, getattr(site.base, "forms", (WHOLE,) * site.experts)) for site in sites]


def _check_forms(model: Any, layers: list[_Layer], dequantize: bool) -> int:
    """Neurons of every expert; raises ValueError if plain checkpoints cannot hold them."""
    named = type(model).__name__
    otherwise = "compress it so, or keep the packed checkpoint that save_pretrained writes"
    counts: dict[int, str] = {}
    for layer in layers:
        whole = experts.intermediate_size(layer.site.base)
        for expert in layer.kept:
            form = layer.forms[expert]
            place = f"expert {expert} of layer {layer.site.layer}"
            counts.setdefault(whole if form.neurons is None else form.neurons, place)
            if not dequantize and (form.width < 16 or form.sparsity):
                raise ValueError(
                    f"{place} is stored as {form}: plain checkpoints hold fused experts as whole matrices in 16 bits "
                    "(transformers lets bitsandbytes quantize nn.Linear, which they are not). dequantize=True writes "
                    "them out, with what was saved by it lost; save_pretrained keeps them packed"
                )
    if len(counts) > 1:
        seen = " and ".join(f"{place} has {count} neurons" for count, place in sorted(counts.items()))
        raise ValueError(
            f"{seen}: plain checkpoints of {named} hold equally many neurons in all experts of all layers; {otherwise}"
        )
    kept = {len(layer.kept): layer.site.layer for layer in layers}
    if len(kept) > 1:
        seen = " and ".join(f"layer {layer} has {count} experts left" for count, layer in sorted(kept.items()))
        raise ValueError(
            f"{seen}: plain checkpoints of {named} hold equally many in all layers; remove equally many: {otherwise}"
        )
    _check_routing(model, layers)
    return next(iter(counts), 0)


def _check_routing(model: Any, layers: list[_Layer]) -> None:
    named, text = type(model).__name__, experts.text_config(model.config)
    total, kept = layers[0].site.experts, len(layers[0].kept)
    if kept == total:
        return
    chosen = getattr(text, "num_experts_per_tok", 1) or 1
    if kept < chosen:
        raise ValueError(
            f"{kept} experts a layer are left, and {named} chooses {chosen} for each token (num_experts_per_tok): "
            "remove fewer"
        )
    if not any(getattr(text, name, None) == total for name in COUNTS):
        raise ValueError(f"the config of {named} does not say how many experts it has ({', '.join(COUNTS)})")
    groups = getattr(text, "n_group", None) or 1
    for layer in layers:
        weight = getattr(layer.site.router, "weight", None)
        if not isinstance(weight, Tensor) or len(weight) != total:
            raise ValueError(f"the router of {layer.site.name} in {named} has no weight with one row for each expert")
        left = [sum(expert * groups // total == group for expert in layer.kept) for group in range(groups)]
        # groups are ranked by their two best experts
        if groups > 1 and (len(set(left)) > 1 or left[0] < 2):
            raise ValueError(
                f"{named} routes within {groups} groups of experts (n_group), of which {left} are left in layer "
                f"{layer.site.layer}: plain checkpoints need equally many in each group, two at least"
            )


@torch.no_grad()
def _build(model: Any, layers: list[_Layer], neurons: int) -> Any:
    """A model of the same class with what is left of the experts; it shares all other tensors."""
    paths = {module: name for name, module in model.named_modules()}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if PREFIX not in name}
    for base in (layer.site.base for layer in layers if experts.is_adopted(layer.site.base)):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{paths[base]}.")}
    whole = experts.intermediate_size(layers[0].site.base)
    for layer in layers:
        base, router = layer.site.base, layer.site.router
        kept = torch.tensor(layer.kept, device=next(model.parameters()).device)
        for name, stack in experts.expert_stacks(base).items():
            left = stack.detach()[kept]
            lying = experts.neuron_places(base, name, torch.arange(neurons, device=left.device))
            if neurons < whole and lying is not None:
                left = left.index_select(*lying)
            if experts.is_adopted(base):
                written, owner = base.checkpoint(name, left), paths[base.block]
            else:
                written, owner = {name: left.contiguous()}, paths[base]
            state |= {f"{owner}.{own}": tensor for own, tensor in written.items()}
        if len(kept) < layer.site.experts and router is not None:
            for name in ("weight", selection_bias(layer.site)):
                if name is not None:
                    state[f"{paths[router]}.{name}"] = state[f"{paths[router]}.{name}"][kept]
    plain = _shell(model, layers, neurons, state)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    for name, _ in plain.named_buffers():
        if name not in state:
            path, _, last = name.rpartition(".")
            plain.get_submodule(path)._buffers[last] = model.get_buffer(name)
    plain.generation_config = copy.deepcopy(model.generation_config)
    plain.set_experts_implementation(implementation_name(model.config))
    return plain.eval()


def _shell(model: Any, layers: list[_Layer], neurons: int, state: dict[str, Tensor]) -> Any:
    """A model on meta whose tensors have the shapes of `state`; its config is found by trying."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = experts.text_config(config)
    for name in COUNTS:
        if getattr(text, name, None) == layers[0].site.experts:
            setattr(text, name, len(layers[0].kept))
    whole, named = experts.intermediate_size(layers[0].site.base), type(model).__name__
    sizes = [name for name, value in vars(text).items() if _SIZES.search(name) and value == whole]
    others: list[str] = []
    for name in sizes if neurons < whole else [None]:
        tried = copy.deepcopy(config)
        if name is not None:
            setattr(experts.text_config(tried), name, neurons)
        with torch.device("meta"):
            shell = type(model)(tried)
        shapes = {key: tensor.shape for key, tensor in shell.state_dict().items()}
        wrong = [key for key, tensor in state.items() if shapes.get(key) != tensor.shape]
        if not wrong and shapes.keys() == state.keys():
            return shell
        others += [f"{name or 'the number of experts'} also sizes {key}" for key in wrong[:1]]
    raise ValueError(
        f"the config of {named} cannot say that its experts, and nothing else, have {neurons} neurons instead of "
        f"{whole}: "
        + ("; ".join(others) or f"none of its sizes is {whole}")
        + ". Keep the packed checkpoint that save_pretrained writes"
    )


@torch.no_grad()
def _compare(model: Any, plain: Any, again: Any, batches: list[Batch]) -> tuple[float, float, float]:
    """Largest difference of the plain model's logits from the compressed one's, and of the reloaded one's; and KL."""
    largest, kl, tokens = torch.zeros(2, device="cpu"), 0.0, 0
    for inputs, _, rows in batches:
        keep = rows.real
        ours, theirs, reloaded = (m(**inputs, use_cache=False).logits[keep].float() for m in (model, plain, again))
        found = torch.stack([(ours - theirs).abs().max(), (theirs - reloaded).abs().max()])
        # a NaN stays in it
        largest = torch.maximum(largest, found.cpu())
        before, after = log_softmax(ours, -1), log_softmax(theirs, -1)
        kl += float((before.exp() * (before - after)).sum())
        tokens += len(ours)
    return float(largest[0]), float(largest[1]), kl / tokens


def _bytes(model: Any) -> int:
    """Of the tensors that a checkpoint of it holds; those that are tied count once."""
    held = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

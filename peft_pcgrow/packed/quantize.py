"""Pack all experts of a model at one width.

transformers leaves fused experts in 16 bit when a `BitsAndBytesConfig` quantizes all linear layers, though nearly all
weights of a mixture-of-experts model are theirs: this finishes the job. Plain rounding, no text is needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pcgrow_kernels import lowbit
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.experts import ExpertsModule
from peft_pcgrow.architectures.find import ExpertsSite, adopt, find_experts
from peft_pcgrow.atomic import completed
from peft_pcgrow.packed.checkpoint import note_packing
from peft_pcgrow.packed.forms import Form, form_bytes
from peft_pcgrow.packed.packed_experts import PREFIX, pack

# bits a weight; blocks of `lowbit.BLOCK` weights share a scale, of int8 the rows
BITS = {"int8": 8, "nf4": 4, "3bit": 3, "2bit": 2}
MIB = 2**20


@dataclass(frozen=True)
class QuantizeReport:
    """What packing changed, in bytes.

    Attributes:
        to: what the experts were packed to.
        experts_before: of the experts' weights and biases in 16 bit.
        experts_after: of the same as they are stored now.
        model_before: of all parameters and buffers of the model before.
        model_after: of the same now.

    Example:
        >>> report = compress.quantize_experts(model, "int8")
        >>> report.experts_before, report.experts_after  # 8 bits a weight, and a scale for each row
        (73728, 39936)
    """

    to: str
    experts_before: int
    experts_after: int
    model_before: int
    model_after: int

    def __str__(self) -> str:
        before, after = self.experts_before / MIB, self.experts_after / MIB
        return (
            f"experts in {self.to}: {before:,.1f} MiB in 16 bit, now {after:,.1f} MiB ({after / before:.0%}); the "
            f"whole model {self.model_before / MIB:,.1f} MiB, now {self.model_after / MIB:,.1f} MiB"
        )


def quantize_experts(model: nn.Module, to: str = "nf4") -> QuantizeReport:
    """Pack all experts of a model, in place, or none of them, if that is interrupted.

    One expert is encoded at a time, and what is made of it waits on the CPU until all of them are; then each layer is
    packed, and its own weights are freed before the next one's turn. So the peak above a model is a layer's packed
    weights and some copies of one expert; on the CPU it is those of all layers. Biases stay as they are. Experts that
    are packed so already are left alone.

    Args:
        model (nn.Module): a transformers model with experts, in any floating dtype and on any device, with or without
            adapters.
        to (str): "int8", "nf4" (4 bits; QLoRA, arXiv:2305.14314), "3bit" or "2bit".

    Returns:
        A `QuantizeReport`.

    Raises:
        ValueError: no experts in the model, an unknown `to`, experts that are packed otherwise or have no values to
            read, or an adapter that is merged into them; nothing has changed then.

    Example:
        >>> report = compress.quantize_experts(model, "nf4")
        >>> report.experts_after < 0.3 * report.experts_before
        True
        >>> model.save_pretrained(folder / "packed")  # AutoModelForCausalLM reads it back
    """
    tree = find_experts(model)
    check_quantizable(tree.sites, to)
    sites = adopt(tree).sites
    before = storage_bytes(chain(model.parameters(), model.buffers()))
    quantize_sites(model, sites, to)
    after = storage_bytes(chain(model.parameters(), model.buffers()))
    stacks = [stack for site in sites for stack in experts.expert_stacks(site.base).values()]
    packed = (b for site in sites for name, b in site.base.named_buffers(recurse=False) if name.startswith(PREFIX))
    held = storage_bytes(chain(packed, (stack for stack in stacks if isinstance(stack, Tensor))))
    return QuantizeReport(to, 2 * sum(stack.numel() for stack in stacks), held, before, after)


def quantize_sites(model: nn.Module, sites: Sequence[ExpertsSite], to: str) -> None:
    """Pack the experts of a model's layers that `check_quantizable` let pass: all of them, or none."""
    form = Form(BITS[to])
    # the long part, which changes nothing; not where the weights are, which may fill that memory
    made = [(site.base, _encoded(site.base, form)) for site in sites if not experts.is_packed(site.base)]

    def pack_all() -> None:
        for base, data in made:
            if not experts.is_packed(base):
                pack(base, [form] * base.num_experts, data)
            data.clear()
        if any(isinstance(module, PreTrainedModel) for module in model.modules()):
            note_packing(model)

    completed(pack_all)


def check_quantizable(sites: Sequence[ExpertsSite], to: str) -> None:
    """Raise ValueError unless all of these experts can be packed to `to`, or are already."""
    if to not in BITS:
        raise ValueError(f"experts cannot be packed to {to!r}; choose from {', '.join(map(repr, BITS))}")
    for site in sites:
        if experts.is_packed(site.base):
            others = sorted({str(form) for form in site.base.forms} - {str(Form(BITS[to]))})
            if others:
                raise ValueError(
                    f"the experts of layer {site.layer} are packed already ({'; '.join(others)}), and {to!r} was asked "
                    "for: load the base anew in bf16 or fp32, or ask for what it is packed to"
                )
            continue
        stacks = experts.expert_stacks(site.base)
        if site.module is not site.base and not isinstance(site.module, experts.GrownExperts):
            raise ValueError(
                f"the experts of layer {site.layer} sit in a {type(site.module).__name__}, which needs their weights "
                "as they are: pack them before that adapter is added"
            )
        if getattr(site.module, "merged", False):
            raise ValueError(
                f"an adapter is merged into the experts of layer {site.layer}: call unmerge_adapter() before they are "
                "packed"
            )
        if hasattr(site.base, "parametrizations") or any(map(experts.is_read_only, stacks.values())):
            raise ValueError(
                f"the experts of layer {site.layer} are quantized in another way already: load them in bf16"
            )
        if any(stack.is_meta for stack in stacks.values()):
            raise ValueError(
                f"the experts of layer {site.layer} have no values to pack (they are on the meta device): load the "
                "model's weights first, without offloading them"
            )


def left_unpacked(sites: Sequence[ExpertsSite]) -> str | None:
    """What a model loaded by bitsandbytes would gain if its experts were packed too; None: it was not, or they are."""
    bits = experts.loaded_in_bits(sites[0].base)
    if bits is None or any(experts.is_packed(site.base) for site in sites):
        return None
    if any(experts.is_read_only(stack) for stack in experts.expert_stacks(sites[0].base).values()):
        return None  # linear layers, which it did quantize
    stacks = [(site, stack) for site in sites for stack in experts.expert_stacks(site.base).values()]
    now = sum(stack.numel() * stack.element_size() for _, stack in stacks)
    biases = sum(stack.numel() * stack.element_size() for _, stack in stacks if stack.dim() == 2)
    packed = biases + sum(site.experts * form_bytes(site.base, Form(bits)) for site in sites)
    name = next(name for name, width in BITS.items() if width == bits)
    return (
        f"this base was loaded in {bits} bit, but {now / MIB:,.1f} MiB of experts are still in "
        f"{8 * stacks[0][1].element_size()} bit; PCGrowConfig(base_quantization={name!r}) stores them in "
        f"{packed / MIB:,.1f} MiB"
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that some tensors take, shared ones once."""
    storages = {(s.device, s.data_ptr()): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


@torch.no_grad()
def _encoded(base: ExpertsModule, form: Form) -> dict[str, list[Tensor]]:
    """By stack, what is to be stored of each expert, on the CPU."""
    made: dict[str, list[Tensor]] = {}
    for name in experts.matrices(base):
        made[name] = []
        for expert in range(base.num_experts):
            matrix = experts.expert_stacks(base)[name][expert]
            matrix = (matrix.mT if base.is_transposed else matrix)[None]
            made[name].append(lowbit.encode(matrix, form.width)[0].cpu())
    return made

"""The forms that an expert can be stored in, and what they mean for its matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcgrow_kernels import lowbit
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.experts import ExpertsModule

# intermediate neurons are kept in multiples of this: what grouped matrix products take in 16 bits
MULTIPLE = 8


@dataclass(frozen=True)
class Form:
    """How one expert is stored.

    Attributes:
        width: bits a weight, of `lowbit.WIDTHS`.
        neurons: intermediate neurons that are left, a multiple of `MULTIPLE`; 0: the expert is removed and adds
            nothing to its tokens. None: all.
        sparsity: None, or one of `lowbit.SPARSITIES` (with 16 bits).
    """

    width: int = 16
    neurons: int | None = None
    sparsity: str | None = None

    def __post_init__(self) -> None:
        # 4.0 and True are equal to widths
        if type(self.width) is not int or self.width not in lowbit.WIDTHS:
            raise ValueError(f"width={self.width!r}: experts are stored in {', '.join(map(str, lowbit.WIDTHS))} bits")
        lowbit.check_sparsity(self.sparsity)
        if self.sparsity is not None and self.width != 16:
            raise ValueError(f"sparsity={self.sparsity!r} at {self.width} bits: sparse experts take 16")
        if self.neurons is None:
            return
        if type(self.neurons) is not int:
            raise ValueError(f"neurons={self.neurons!r}: a whole number, or None for all")
        if self.neurons < 0 or self.neurons % MULTIPLE:
            raise ValueError(
                f"{self.neurons} neurons: grouped matrix products need multiples of {MULTIPLE}; the nearest is "
                f"{max(0, (self.neurons + MULTIPLE // 2) // MULTIPLE * MULTIPLE)}"
            )

    def __str__(self) -> str:
        if self.neurons == 0:
            return "removed"
        sparse = f", {self.sparsity} sparse" if self.sparsity else ""
        thin = f", {self.neurons} neurons" if self.neurons is not None else ""
        return f"{self.width} bit{sparse}{thin}"


WHOLE = Form()


def matrix_shape(base: ExpertsModule, stack: str, form: Form) -> tuple[int, int]:
    """Outputs and inputs of one of an expert's matrices in a form."""
    shape = experts.expert_stacks(base)[stack].shape
    outputs, inputs = (shape[2], shape[1]) if base.is_transposed else (shape[1], shape[2])
    if form.neurons is None:
        return outputs, inputs
    copies = outputs // experts.intermediate_size(base)
    return (outputs, form.neurons) if stack == "down_proj" else (copies * form.neurons, inputs)


def form_bytes(base: ExpertsModule, form: Form) -> int:
    """Bytes of one expert's matrices in a form."""
    shapes = (matrix_shape(base, stack, form) for stack in experts.matrices(base))
    return sum(lowbit.size(*shape, form.width, form.sparsity) for shape in shapes)


def first_neurons(base: ExpertsModule, stack: str, count: int) -> tuple[int, Tensor]:
    """The axis of a stack that neurons lie along, and where the first ones lie: those that are left come first."""
    lying = experts.neuron_places(base, stack, torch.arange(count, device=experts.expert_stacks(base)[stack].device))
    assert lying is not None, f"{stack} holds no neurons"
    return lying


def full_matrix(base: ExpertsModule, stack: str, form: Form, matrix: Tensor | None) -> Tensor:
    """One expert's matrix `[O, I]` (None: the expert is gone) in the layout of the stack, zeros where neurons are
    gone."""
    whole = experts.expert_stacks(base)[stack]
    if matrix is not None:
        matrix = matrix.to(whole.dtype)
        matrix = matrix.mT if base.is_transposed else matrix
        if form.neurons is None:
            return matrix.contiguous()
    full = torch.zeros(whole.shape[1:], dtype=whole.dtype, device=whole.device)
    if matrix is None:
        return full
    axis, places = first_neurons(base, stack, form.neurons or 0)
    return full.index_copy(axis - 1, places, matrix)

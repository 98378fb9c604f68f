"""Muon for banks of experts.

torch.optim.Muon takes 2-D parameters only; a bank is a stack of matrices `[G, O, I]`, and one batched Newton-Schulz
iteration orthogonalises all of them at once. The rest of the update follows Jordan et al. 2024
(https://kellerjordan.github.io/posts/muon/) with the quintic coefficients given there.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pcgrow_kernels.dispatch import use_triton
from pcgrow_kernels.muon_pre import muon_pre
from pcgrow_kernels.orthogonalize import orthogonalize, orthogonalize_, working_dtype
from peft_pcgrow.adapter.inside_sweep import step_inside_sweep
from peft_pcgrow.architectures.sharded import local
from peft_pcgrow.training.host import foreach_add_, foreach_lerp_, foreach_mul_

# numbers that are orthogonalised at once, or one matrix: with those of the iteration, 256 MiB on a GPU (512 on a CPU)
AT_ONCE = 2**25
# of LoRA beside grown experts, rank 16: near the best on models of 6.6 and 135 million parameters
LORA_LR = 3e-3


def update_of(direction: Tensor) -> Tensor:
    """What a stack `[..., O, I]` moves by at a rate of one: each matrix orthogonalised, times `sqrt(max(1, O / I))`."""
    return orthogonalize(direction).mul_(_scale(direction.shape))


def _scale(shape: torch.Size) -> float:
    return max(1.0, shape[-2] / shape[-1]) ** 0.5


def _matrices(stack: Tensor) -> Iterator[Tensor]:
    """Views of a matrix or stack of them, `[n, O, I]` each, of at most `AT_ONCE` numbers or one matrix."""
    if stack.dim() != 3:
        for part in stack if stack.dim() > 3 else (stack[None],):
            yield from _matrices(part)
    else:
        yield from stack.split(max(1, AT_ONCE // max(1, stack.shape[1:].numel())))


class Muon(torch.optim.Optimizer):
    """Muon on stacks of matrices, AdamW on everything else, in one optimizer.

    Groups with `orthogonal=True` hold parameters `[..., O, I]`: momentum, then each matrix's update is orthogonalised
    and scaled by `sqrt(max(1, O / I))` (Jordan et al. 2024, see the module); those of one shape are one batch. The
    other groups are stepped as `torch.optim.AdamW` does. An expert whose gradient has been zero so far does not move.
    Of stacks that `fully_shard` has split along their first axis, each process steps the matrices that it holds.

    Args:
        params (iterable): parameters, or groups of them as dicts; a group may set any of the following.
        lr (float): learning rate, 0 or more: about the spectral norm of a matrix's update.
        momentum (float): of orthogonal groups, in [0, 1).
        nesterov (bool): of orthogonal groups, whether the momentum looks ahead.
        weight_decay (float): decoupled, 0 or more.
        betas (tuple of float): of the other groups, as in AdamW, in [0, 1).
        eps (float): of the other groups, as in AdamW.
        orthogonal (bool): whether a group's updates are orthogonalised.

    Raises:
        ValueError: a setting out of its range, or a parameter with fewer than two axes in an orthogonal group.

    Example:
        >>> bank = torch.nn.Parameter(torch.zeros(5, 4, 8))  # five matrices
        >>> optimizer = Muon([bank], lr=0.02)
        >>> (bank * torch.randn(5, 4, 8)).sum().backward()
        >>> optimizer.step()
        >>> bool((torch.linalg.matrix_norm(bank, 2) < 1.25 * 0.02).all())
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        orthogonal: bool = True,
    ):
        for name, value, valid in (
            ("lr", lr, lr >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not valid:
                raise ValueError(f"{name}={value} is out of range")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "betas": betas,
                "eps": eps,
                "orthogonal": orthogonal,
            },
        )
        self._check_matrices()

    def _check_matrices(self) -> None:
        for group in self.param_groups:
            flat = [tuple(p.shape) for p in group["params"] if group["orthogonal"] and p.dim() < 2]
            if flat:
                raise ValueError(
                    f"an orthogonal group needs matrices or stacks of them, got shapes {flat}; DeepSpeed's ZeRO and "
                    "FSDP1 flatten what they step: use DDP, or torch.optim.AdamW"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self._check_matrices()  # engines put others in their places
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["orthogonal"]:
                self._adam(params, group)
                continue
            if group["weight_decay"] and params:
                foreach_mul_([local(p) for p in params], 1 - group["lr"] * group["weight_decay"])
            self._orthogonal(params, group)
        return loss

    def _orthogonal(self, params: list[Tensor], group: dict[str, Any]) -> None:
        weights, gradients, momenta = [], [], []
        for p in params:
            state = self.state[p]
            if not state:
                _check_matrices_whole(p)
                state["momentum"] = torch.zeros_like(p)
            for found, tensor in zip((weights, gradients, momenta), (p, p.grad, state["momentum"]), strict=True):
                found.append(local(tensor))  # type: ignore
        in_one_pass = all(map(_in_one_pass, gradients, momenta))
        if params and not in_one_pass:
            foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        waiting: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for stacks in zip(weights, gradients, momenta, strict=True):
            for matrices in zip(*map(_matrices, stacks), strict=True) if stacks[0].numel() else ():
                key = matrices[0].shape[1:], stacks[0].device, stacks[0].dtype
                held = waiting.setdefault(key, [])
                if held and sum(len(each[0]) for each in (*held, matrices)) * key[0].numel() > AT_ONCE:
                    self._move(held, group, in_one_pass)
                    held.clear()
                held.append(matrices)
        for held in waiting.values():
            self._move(held, group, in_one_pass)

    def _move(self, held: list[tuple[Tensor, Tensor, Tensor]], group: dict[str, Any], in_one_pass: bool) -> None:
        """Step matrices of one shape, `[n, O, I]` each, with their gradients and momenta, which are to be stepped too
        if that is `in_one_pass`."""
        first = held[0][0]
        counts = [len(weights) for weights, *_ in held]
        x = torch.empty(sum(counts), *first.shape[1:], dtype=working_dtype(first.device), device=first.device)
        norms = []
        for (_, gradient, momentum), direction in zip(held, x.split(counts), strict=True):
            if in_one_pass:
                norms.append(muon_pre(gradient, momentum, direction, group["momentum"], group["nesterov"]))
            elif group["nesterov"]:
                torch.lerp(gradient, momentum, group["momentum"], out=direction)
            else:
                direction.copy_(momentum)
        updates = orthogonalize_(x, norms=torch.cat(norms) if norms else None).split(counts)
        foreach_add_([weights for weights, *_ in held], [*updates], alpha=-group["lr"] * _scale(first.shape))

    def _adam(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = torch.zeros_like(p), torch.zeros_like(p)
                self.state[p] |= {"step": torch.zeros((), device="cpu"), "mean": zeros[0], "square": zeros[1]}
        states = [self.state[p] for p in params]
        means, squares, steps = ([local(state[name]) for state in states] for name in ("mean", "square", "step"))
        first, second = group["betas"]
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params if p.grad is not None],
            means,
            squares,
            [],
            steps,
            foreach=True,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _in_one_pass(gradient: Tensor, momentum: Tensor) -> bool:
    """Whether a kernel steps the momentum, takes the direction and its norms."""
    return use_triton(gradient, momentum, gradient.new_empty(0, dtype=working_dtype(gradient.device)))


def _check_matrices_whole(stack: Any) -> None:
    """Raise ValueError if matrices of a stack `[..., O, I]` are split between processes."""
    if any(placed.is_shard() and placed.dim >= stack.dim() - 2 for placed in getattr(stack, "placements", ())):
        raise ValueError(
            f"Muon orthogonalises whole matrices, and those of a parameter of shape {tuple(stack.shape)} are split "
            f"between processes ({stack.placements}): put it into a group with orthogonal=False"
        )


def banks_of(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of grown experts that train.

    Raises:
        ValueError: there are none.
    """
    banks = [p for name, p in model.named_parameters() if p.requires_grad and ".pcgrow_" in name and p.dim() == 3]
    if not banks:
        if any(".pcgrow_" in name and name.endswith(".packed") for name, _ in model.named_buffers()):
            raise ValueError(
                "the grown experts of this model are shrunk and cannot be trained: train the adapter that they were "
                "shrunk from, or another one beside it"
            )
        raise ValueError(
            "no grown expert of this model trains: pass it through get_peft_model(model, PCGrowConfig(...)) first"
        )
    return banks


def create_pcgrow_optimizer(
    model: nn.Module,
    *,
    lr: float,
    lora_lr: float = LORA_LR,
    adam_lr: float | None = None,
    weight_decay: float = 0.0,
    inside_sweep: bool = False,
    **kwargs: Any,
) -> Muon:
    """Optimizer for a model with a PCGrow adapter: Muon on the banks' matrices, AdamW on all else that trains.

    Args:
        model (nn.Module): after `get_peft_model`.
        lr (float): of the banks' matrices. What is best differs by factors of ten between models: `find_lr(model,
            batches)` finds one.
        lora_lr (float): of LoRA beside (`PCGrowConfig(lora=...)`).
        adam_lr (float): of biases and `modules_to_save`; `lr / 10` if None.
        weight_decay (float): decoupled. A bank holds whole weights, so decay pulls them to zero, not to the base: leave
            it at 0 unless that is wanted.
        inside_sweep (bool): step each bank during `backward()`, as soon as its gradient is there, and let the gradient
            go: the same steps, and at most one layer's gradients of banks in memory. `step()` steps all else and ends
            the step. With a Trainer, set max_grad_norm=0: clipping where it would change something, accumulation, a
            GradScaler and several processes are refused.
        **kwargs: further settings of [`Muon`].

    Returns:
        An optimizer for `Trainer(optimizers=(optimizer, None))`; its state resumes from a checkpoint exactly.

    Raises:
        ValueError: the model has no grown expert that trains.

    Example:
        >>> grown = get_peft_model(model, PCGrowConfig(locus={1: [0, 4]}))
        >>> optimizer = create_pcgrow_optimizer(grown, lr=0.02)
        >>> [(group["orthogonal"], group["lr"]) for group in optimizer.param_groups]  # nothing but banks trains
        [(True, 0.02)]
        >>> grown(input_ids=batches[0], labels=batches[0]).loss.backward()
        >>> optimizer.step()
    """
    banks = banks_of(model)
    chosen = {id(p) for p in banks}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in chosen]
    lora = [p for name, p in trainable if ".lora_" in name]
    others = [p for name, p in trainable if ".lora_" not in name]
    groups = [
        {"params": banks, "lr": lr, "orthogonal": True},
        {"params": lora, "lr": lora_lr, "orthogonal": False},
        {"params": others, "lr": lr / 10 if adam_lr is None else adam_lr, "orthogonal": False},
    ]
    optimizer = Muon([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay, **kwargs)
    if inside_sweep:
        step_inside_sweep(optimizer, banks)
    return optimizer

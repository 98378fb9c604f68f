"""The loss of text, and its error at the top, without the logits of the text: of `B * S` tokens and a vocabulary of `V`
words, several copies `[B * S, V]` in fp32 are what a settled step holds at its peak.

The output head runs on some rows at a time. Their part of the loss's gradient, softmax less what came, is taken back
through the head at once, and only the error at the top layer's output `[B, S, H]` is kept. (So do fused losses: Hsu et
al. 2024, arXiv:2410.10989.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from peft_pcgrow.per_thread import PerThread

# rows that the head runs on at once, at least; more where their logits are no more numbers than all hidden states
ROWS = 256


@dataclass
class Narrowed:
    """What went through the head of one forward: all that it was given, what it made of each text's last token, and
    whether the loss was asked for."""

    hidden: Tensor | None = None
    logits: Tensor | None = None
    asked: bool = False


class Now(PerThread):
    """The forward that a thread is in the midst of, if it is narrowed."""

    forward: Narrowed | None = None


class OutputHead:
    """The module that makes logits of hidden states, with hooks that let a forward leave all but the last token out.

    Attributes:
        plain: whether a model's logits are what its head returns, and nothing is done to them after (soft caps,
            scales), as the first forward tells that is narrowed. Else they are needed. now: see `Now`.
    """

    def __init__(self, head: nn.Module):
        self.head, self.plain, self.now = head, True, Now()
        self._handles = head.register_forward_pre_hook(self._narrow), head.register_forward_hook(self._note)  # type: ignore

    @classmethod
    def of(cls, model: Any) -> "OutputHead | None":
        """That of a transformers model, if it has one."""
        try:
            head = model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        return cls(head) if isinstance(head, nn.Module) else None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def fits(self) -> bool:
        """Whether it takes no logits to train this model, as far as is known."""
        return self.plain and not any(p.requires_grad for p in self.head.parameters())

    @contextmanager
    def narrowed(self) -> Iterator[Narrowed]:
        self.now.forward = seen = Narrowed()
        try:
            yield seen
        finally:
            self.now.forward = None

    @torch.compiler.disable
    def _narrow(self, _: nn.Module, args: tuple) -> tuple | None:
        seen = self.now.forward
        if seen is None or seen.hidden is not None or not args or args[0].dim() != 3:
            return None
        seen.hidden = args[0]
        return args[0][:, -1:], *args[1:]

    @torch.compiler.disable
    def _note(self, _: nn.Module, args: tuple, output: Any) -> None:
        # if it runs again, for whatever, the first result is the one that belongs to `hidden`
        if (seen := self.now.forward) is not None and seen.logits is None:
            seen.logits = output

    def hidden_of(self, seen: Narrowed, logits: Any, target: Tensor) -> Tensor | None:
        """What the head was given, `[B, S, H]`, if a model's `logits` are its result, and `target` `[B, S]`."""
        hidden = seen.hidden
        self.plain = hidden is not None and seen.logits is logits and hidden.shape[:-1] == target.shape
        return hidden if self.plain else None

    @torch.compiler.disable
    def loss(self, hidden: Tensor, target: Tensor, ignored: int = -100) -> Tensor:
        """Summed loss in nats, in fp32 at least.

        Args:
            hidden: what the head is given, `[B, S, H]`. target: what comes after each token, `[B, S]`.
        """
        seen, self.now.forward = self.now.forward, None
        try:
            return _Loss.apply(hidden.flatten(0, 1), target.flatten(), ignored, self.head)  # type: ignore[return-value]
        finally:
            self.now.forward = seen


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, ignored: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        target, error, at_once = target.to(hidden.device), torch.zeros_like(hidden), ROWS
        counted = (target != ignored).nonzero().squeeze(1)
        while counted.numel():
            rows, counted = counted[:at_once], counted[at_once:]
            loss, error[rows], words = _rows(hidden[rows], target[rows], head)
            total += loss.to(total.device)
            at_once = max(ROWS, hidden.numel() // words)
        ctx.save_for_backward(error)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor):
        (error,) = ctx.saved_tensors
        return error * delta, None, None, None


def _rows(hidden: Tensor, target: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, int]:
    """Summed loss of some rows, its gradient for them `[n, H]`, and how many words there are."""
    with torch.enable_grad():
        x = hidden.detach().requires_grad_()
        logits = head(x)
    word = target.to(logits.device).unsqueeze(1)
    with torch.autocast(logits.device.type, enabled=False):
        gradient = log_softmax(logits.detach(), -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        loss = -gradient.gather(1, word).sum()
        gradient.exp_().scatter_add_(1, word, gradient.new_full((), -1.0).expand(word.shape))
    (error,) = torch.autograd.grad(logits, x, gradient.to(logits.dtype))
    return loss, error, logits.shape[-1]

"""Training forwards that give their loss and no logits: `PCGrowConfig(keep_logits=False)`."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from peft_pcgrow.adapter.host import LOSS
from peft_pcgrow.say import say
from peft_pcgrow.settling.output_head import Narrowed, OutputHead

IGNORED = -100


def drop_logits(model: Any, wanted: Callable[[], bool]) -> tuple[Any, ...]:
    """Let a causal LM's forwards in training, while `wanted`, compute their loss by `OutputHead` where they are given
    labels. Where it takes the logits, they are kept, and that is said.

    Returns:
        What takes this away again, if it was possible at all.
    """
    head, loss = OutputHead.of(model), getattr(model, "loss_function", None)
    # transformers' own loss, and a forward that asks for it
    plain = getattr(loss, "__name__", "") == "ForCausalLMLoss" and LOSS not in vars(model)
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if head is None or not plain or "loss_function" not in getattr(code, "co_names", ()):
        if head is not None:
            head.remove()
        _say_kept(model, "it has no output head, or a loss of its own")
        return ()
    model.loss_function = fused = partial(_loss, head, loss)
    begin, end = partial(_begin, head, fused, wanted), partial(_end, head)
    return (
        head,
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, with_kwargs=True, always_call=True),
        SimpleNamespace(remove=partial(_forget, model, fused)),
    )


def _forget(model: Any, fused: Any) -> None:
    if vars(model).get(LOSS) is fused:
        del model.__dict__[LOSS]


@torch.compiler.disable
def _begin(head: OutputHead, fused: Any, wanted: Callable[[], bool], model: Any, _: Any, kwargs: dict) -> None:
    trains = model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
    if trains and head.plain and wanted() and vars(model).get(LOSS) is fused:
        if head.fits:
            head.now.forward = Narrowed()
        else:
            head.plain = False
            _say_kept(model, "its output head trains")


@torch.compiler.disable
def _end(head: OutputHead, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    seen, head.now.forward = head.now.forward, None
    # a fused loss of Liger's does not run the head
    if seen is None or seen.hidden is None or output is None:
        return None
    if head.plain and seen.asked and isinstance(output, Mapping):
        return type(output)(**{**output, "logits": None})
    head.plain = False
    _say_kept(model, "they are not what its output head returns")
    return model.forward(*args, **kwargs)


@torch.compiler.disable
def _loss(
    head: OutputHead,
    plain: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """In the place of transformers' `ForCausalLMLoss`, whose arguments these are."""
    seen = head.now.forward
    if seen is None or seen.hidden is None:
        given = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
        return plain(logits, labels, vocab_size, **given, **kwargs)
    seen.asked = True
    target = pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    hidden = head.hidden_of(seen, logits, target)
    if hidden is None:  # the forward runs again
        return logits.new_zeros(())
    total = head.loss(hidden, target, ignore_index)  # type: ignore
    count = (target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _say_kept(model: nn.Module, why: str) -> None:
    say(f"pcgrow: keeps the logits of {type(model).__name__} (see keep_logits): {why}")

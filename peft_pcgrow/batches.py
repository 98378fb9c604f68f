"""Batches of text as a model takes them, and their losses."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# label of tokens that are not predicted
IGNORED = -100


def settle_batch(model: nn.Module, inputs: dict[str, Any], target: Tensor) -> float:
    """Sum the token losses of one batch, carry their error down, return the sum in nats."""
    with torch.enable_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = cross_entropy(
            logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32)),
            target[:, 1:].reshape(-1),
            ignore_index=IGNORED,
            reduction="sum",
        )
    value = float(loss.detach())
    if not value < float("inf"):
        raise FloatingPointError(f"the loss of a batch is {value}: check the model's weights and the batch's tokens")
    loss.backward()
    return value


def read_batch(batch: Any, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Model inputs without labels, and labels `[B, S]` with -100 on padding and on what padding would predict."""
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        ids = given["input_ids"] = torch.as_tensor(ids)
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"a batch needs input_ids of shape [B, S], integers; got {tuple(ids.shape)} {ids.dtype}")
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    labels = inputs.pop("labels", None)
    target = inputs["input_ids"] if labels is None else labels
    real = inputs["attention_mask"].bool()
    predicted = real.clone()
    predicted[:, 1:] &= real[:, :-1]
    return inputs, target.masked_fill(~predicted, IGNORED)


def read_batches(
    batches: Iterable[Any], device: torch.device, max_tokens: int | None
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each batch as `read_batch` reads it, up to the one that reaches `max_tokens`."""
    tokens = 0
    for batch in batches:
        inputs, target = read_batch(batch, device)
        yield inputs, target
        tokens += int(inputs["attention_mask"].sum())
        if max_tokens is not None and tokens >= max_tokens:
            return


@contextmanager
def held_still(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, no parameter training: whoever measures asks for the gradients that it wants."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # of each module: PEFT's wrappers train around a base that does not
    were_training = {module: module.training for module in model.modules()}
    # experts must not drop anything while they are measured
    model.eval()
    for module in model.modules():
        # in evaluation, bitsandbytes packs 4-bit weights on some CPUs into a form that has no gradient
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.train()
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module, was_training in were_training.items():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.train(was_training)
            module.training = was_training


@torch.no_grad()
def losses(model: nn.Module, batches: Sequence[Sequence[tuple[dict[str, Any], Tensor]]]) -> list[float]:
    """Mean loss of each text, nats per predicted token."""
    found = []
    with held_still(model):
        for held in batches:
            total = count = 0.0
            for inputs, target in held:
                logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                wanted = target[:, 1:].reshape(-1).to(logits.device)
                total += float(cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
                count += int((wanted != IGNORED).sum())
            found.append(total / count)
    return found

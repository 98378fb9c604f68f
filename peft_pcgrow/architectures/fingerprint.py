"""What tells one base model from another."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.expert_parallel import Share
from peft_pcgrow.architectures.find import Tree
from peft_pcgrow.architectures.sharded import local

# numbers read of each stack, from so many of its experts at least (a view copies whole experts)
SAMPLES, VIEWED = 2048, 4
# of what is held in the first, both roundings are those of the checkpoint
ROUNDED = {
    torch.float64: (torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}


def describe_base(model: nn.Module, tree: Tree, read: Callable[[Any], Any] = lambda weight: weight) -> dict[str, Any]:
    """What tells one base from another: model type, shapes and fingerprints of routers and experts (None if they
    cannot be told: on the meta device, sharded, quantized or packed; or if there are none).

    Args:
        read: called with each weight; of sharded ones it may give all.
    """
    config = experts.text_config(getattr(model, "config", None))
    site = tree.sites[0]
    shapes = {name: list(stack.shape[1:]) for name, stack in experts.expert_stacks(site.base).items()}
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "layers": [site.layer for site in tree.sites],
        "experts": [site.experts for site in tree.sites],
        "shapes": shapes,
        "layouts": {name: list(astuple(layout)) for name, layout in experts.stack_layouts(site.base).items()},
        "vocabulary": getattr(config, "vocab_size", None),
        # absent of routed experts, as in maps and adapters from before there was a choice
        **({} if tree.nodes == "routed" else {"nodes": tree.nodes}),
        "routers": _fingerprint(_router_weights(tree, read)),
        "stacks": _fingerprint(_samples(tree, read)),
    }


def _router_weights(tree: Tree, read: Callable[[Any], Any]) -> Iterator[Tensor | None]:
    for site in tree.sites:
        for parameter in map(read, site.router.parameters() if site.router is not None else ()):
            if parameter.is_floating_point():
                yield parameter.detach() if _readable(parameter) else None


def _samples(tree: Tree, read: Callable[[Any], Any]) -> Iterator[Tensor | None]:
    """Some numbers of every stack, always the same ones."""
    for site in tree.sites:
        if experts.is_packed(site.base):
            yield None
            return
        for stack in experts.expert_stacks(site.base).values():
            if (share := Share.of(site.base)) is not None:
                here = local(stack)
                yield share.join(_sample(here, share.total)) if _readable(here) else None
            else:
                held = read(stack)
                yield _sample(held, len(held)) if _readable(held) else None


def _sample(stack: Any, count: int) -> Tensor:
    """Of a stack of experts, `count` of them in all processes."""
    shape = stack.shape[1:]
    each = -(-SAMPLES // count)
    # an odd multiplier spreads them over rows and columns alike
    flat = torch.arange(each, dtype=torch.int64, device="cpu") * 2654435761 % shape.numel()
    places = torch.unravel_index(flat, shape)
    if isinstance(stack, Tensor):
        return stack.detach()[(slice(None), *(place.to(stack.device) for place in places))]
    chosen = sorted({count * part // VIEWED for part in range(VIEWED)})
    return torch.stack([stack[expert][tuple(place.to(stack.device) for place in places)] for expert in chosen])


def _readable(stack: Any) -> bool:
    """Whether the numbers are at hand as the checkpoint has them."""
    if stack.is_meta or not stack.is_floating_point() or not stack.numel() or stack.dtype not in ROUNDED:
        return False
    return not hasattr(stack, "device_mesh")


def _fingerprint(weights: Iterable[Tensor | None]) -> dict[str, str] | None:
    """Hashes of all of them, rounded to half precision so that one checkpoint hashes alike in every loading dtype.

    By the dtype that was rounded to: what was loaded in fp16 says nothing of what it is in bf16, nor the other way.
    """
    digests, found = {dtype: hashlib.sha256() for dtype in ROUNDED[torch.float32]}, False
    for weight in weights:
        if weight is None:
            return None
        found = True
        digests = {dtype: digest for dtype, digest in digests.items() if dtype in ROUNDED[weight.dtype]}
        for dtype, digest in digests.items():
            digest.update(weight.to(dtype).cpu().contiguous().view(torch.int16).numpy().tobytes())
    named = {str(dtype).removeprefix("torch."): digest.hexdigest()[:32] for dtype, digest in digests.items()}
    return named if found and named else None

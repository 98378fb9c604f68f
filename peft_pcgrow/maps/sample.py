"""Retain text that the model writes itself, where the user has none: samples from its own distribution."""

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_pcgrow.maps.corpus import whole_number


@torch.no_grad()
def sample_text(
    model: nn.Module,
    texts: int = 128,
    length: int = 192,
    *,
    temperature: float = 1.0,
    batch: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> list[Tensor]:
    """Texts drawn from `model` as it stands (adapters that are active included), each from its beginning.

    Args:
        model (nn.Module): a transformers causal LM; generation is batched and cached.
        texts (int): how many.
        length (int): tokens of each, the first one included; 2 or more.
        temperature (float): what logits are divided by, above 0; 1 draws from the model's own distribution.
        batch (int): texts generated at a time.
        seed (int): of the draws; the random state of the caller is left as it was.
        progress (bool): show a progress bar on standard error.

    Returns:
        Token ids, `[at most batch, length]` each.

    Raises:
        ValueError: a model without `generate`, or numbers out of their range.

    Example:
        >>> [tuple(ids.shape) for ids in sample_text(model, texts=4, length=8, batch=3, progress=False)]
        [(3, 8), (1, 8)]
    """
    # adapters sit inside the base model, and its own generate uses them
    unwrap: Any = getattr(model, "get_base_model", None)
    writer: Any = unwrap() if unwrap is not None else model
    settings = getattr(writer, "generation_config", None)
    if settings is None or not hasattr(writer, "generate"):
        raise ValueError(
            f"retain='self' lets the model write text, and {type(writer).__name__} has no generate(): give "
            "retain=batches of text whose behaviour must not change"
        )
    texts, batch = whole_number("texts", texts, "texts"), whole_number("batch", batch, "texts")
    length = whole_number("length", length, "tokens", 2)
    if isinstance(temperature, bool) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a number above 0; got {temperature!r}")
    device = next(writer.parameters()).device
    first = _first_token(writer)
    found = []
    were_training = {module: module.training for module in model.modules()}
    bar = tqdm(total=texts, unit="text", desc="sampling retain text", disable=not progress)
    try:
        model.eval()
        # no penalties or filters of the model's own: they bend the distribution. No stop token either: a text that ends
        # goes on with the next one, as packed training text does
        writer.generation_config = type(settings)(pad_token_id=first)
        with bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, texts, batch):
                prompt = torch.full((min(batch, texts - start), 1), first, dtype=torch.long, device=device)
                written = writer.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=length - 1,
                    use_cache=True,
                )
                found.append(written.cpu())
                bar.update(len(written))
    finally:
        writer.generation_config = settings
        for module, training in were_training.items():
            module.training = training
    return found


def _first_token(model: nn.Module) -> int:
    """What the model's training texts start with: its beginning-of-text token, or the one that ends a text."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(holder, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    raise ValueError(
        "retain='self' starts texts with the model's bos or eos token, and its config names neither: set "
        "model.generation_config.bos_token_id"
    )

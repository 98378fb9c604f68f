"""Measure: run a corpus through a model and record per node how wrong its prediction was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from peft_pcgrow import experts
from peft_pcgrow.contrast import compare
from peft_pcgrow.energy import GradientSketch, expert_error
from peft_pcgrow.error_map import ErrorMap
from peft_pcgrow.sample import sample_text
from peft_pcgrow.separation import Separation
from peft_pcgrow.settle import LayerStack, Probe

IGNORED = -100
# expert parameters up to which summed gradients are kept whole (fp32: 1 GiB); beyond, sketched to this dimension
EXACT_PARAMETERS = 2**28
SKETCH_DIM = 64


def measure_errors(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_tokens: int | None = None,
    coherent: bool = True,
    sketch_dim: int | None = None,
    retain: Any = None,
    window: int = 64,
    progress: bool = True,
) -> ErrorMap:
    """The error map of a corpus: one sweep over it, nothing is trained.

    Every token counts alike: the error is that of the summed token losses, so the map is the same however the corpus
    is cut into batches or padded.

    Args:
        model: a transformers causal LM with experts, in any floating dtype and on any device; with or without adapters.
        batches: `[B, S]` integer tensors of token ids, or mappings with `input_ids` and, if there are any,
            `attention_mask`, `labels` (-100 is ignored) and whatever else the model takes. Without labels every token
            that is not padding is predicted from those before it.
        max_tokens: stop after the batch that reaches this many tokens, padding not counted.
        coherent: also sum the weight gradients. Costs the experts' weight gradients and the memory to hold them:
            whole up to 2^28 expert parameters, beyond that sketched.
        sketch_dim: longest side of a gradient that is kept whole (see `GradientSketch`); None decides by size. Second
            moments of the retain text are kept alike.
        retain: text whose behaviour must not change, as batches like the corpus's, at most `max_tokens` of it; or
            "self": the model writes as many texts itself (see `sample_text`). Then the map also holds branch gates and
            what retain text looks like at every node (`ErrorMap.separation`), for two more forward passes over all.
        window: tokens of context that a gate looks at, the token itself included; 0: all of the text so far.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: no experts in the model, not one label token in the corpus, or too few texts to fit gates on.
        FloatingPointError: a loss that is NaN or infinite.
    """
    tree = experts.find_experts(model)
    if sketch_dim is None:
        total = sum(p.numel() for site in tree.sites for p in experts.expert_stacks(site.base).values())
        exact = total <= EXACT_PARAMETERS
        longest = max(max(p.shape[1:]) for p in experts.expert_stacks(tree.sites[0].base).values())
        sketch_dim = longest if exact else SKETCH_DIM
    if window < 0:
        raise ValueError(f"window must be a number of tokens, or 0 for all of the text so far; got {window}")
    probe = _ErrorProbe(tree, GradientSketch(sketch_dim) if coherent else None)
    device = next(model.parameters()).device
    loss, labels, tokens = 0.0, 0, 0
    seen: list[dict[str, Any]] = []
    was_training = model.training
    # experts must not drop anything while they are measured
    model.eval()
    bar = tqdm(total=max_tokens, unit="tok", unit_scale=True, desc="measuring errors", disable=not progress)
    try:
        with _frozen(model), LayerStack(tree.layers, probe=probe):
            for batch in batches:
                inputs, target = read_batch(batch, device)
                if retain is not None:
                    seen.append(inputs)
                probe.keep = inputs["attention_mask"].bool().reshape(-1)
                batch_loss = _settle(model, inputs, target)
                loss += batch_loss
                labels += int((target[:, 1:] != IGNORED).sum())
                counted = int(probe.keep.sum())
                tokens += counted
                bar.update(counted)
                bar.set_postfix(loss=f"{loss / max(labels, 1):.3f}")
                if max_tokens is not None and tokens >= max_tokens:
                    break
        separation = _separate(model, tree, seen, retain, max_tokens, window, sketch_dim, progress)
    finally:
        bar.close()
        model.train(was_training)
    if not labels:
        raise ValueError(
            f"the corpus has no label token ({tokens} tokens read): give batches with at least two tokens each, and "
            "labels that are not all -100"
        )
    base = experts.describe_base(model, tree) | {"sketch": sketch_dim if coherent else None}
    return probe.result(loss, labels, tokens, base, separation)


def _separate(
    model: nn.Module,
    tree: experts.Tree,
    domain: list[dict[str, Any]],
    retain: Any,
    max_tokens: int | None,
    window: int,
    sketch_dim: int,
    progress: bool,
) -> Separation | None:
    if retain is None:
        return None
    if isinstance(retain, str):
        if retain != "self":
            raise ValueError(f"retain must be batches of text, or 'self'; got {retain!r}")
        rows, width = sum(len(batch["input_ids"]) for batch in domain), max(b["input_ids"].shape[1] for b in domain)
        retain = sample_text(model, rows, width, progress=progress)
    batches, tokens = [], 0
    device = next(model.parameters()).device
    for batch in retain:
        inputs, _ = read_batch(batch, device)
        batches.append(inputs)
        tokens += int(inputs["attention_mask"].sum())
        if max_tokens is not None and tokens >= max_tokens:
            break
    return compare(model, tree, domain, batches, window, sketch_dim, progress)


def _settle(model: nn.Module, inputs: dict[str, Any], target: Tensor) -> float:
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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter trains while the map is measured; the probe asks for the gradients it wants."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


class _ErrorProbe(Probe):
    """Sums, per site and expert, what `ErrorMap` holds."""

    def __init__(self, tree: experts.Tree, sketch: GradientSketch | None):
        self.sites = {site.layer: site for site in tree.sites}
        self.sketch = sketch
        self.keep = torch.ones(0, dtype=torch.bool)
        self.sums = {site.layer: torch.zeros(4, site.experts, dtype=torch.float64) for site in tree.sites}
        self.gradient: dict[int, dict[str, Tensor]] = {site.layer: {} for site in tree.sites}
        self._routed: tuple[Tensor, Tensor] | None = None
        self._stacks: list[tuple[str, Tensor, Sequence[int] | None]] = []

    @contextmanager
    def watch(self, index: int) -> Iterator[Callable[[], list[Tensor]]]:  # type: ignore[override]
        self._routed, self._stacks, outputs = None, [], []
        site = self.sites.get(index)
        if site is None:
            yield lambda: []
            return
        composed = ExitStack()
        if self.sketch is not None:
            if (once := getattr(site.module, "composed_once", None)) is not None:
                composed.enter_context(once())
            self._stacks = list(_stacks_in_use(site))

        def seen(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._routed = (args[1].detach(), args[2].detach())
            outputs.append(output)

        handle = site.module.register_forward_hook(seen)
        for _, stack, _ in self._stacks:
            stack.requires_grad_(True)
        try:
            yield lambda: [*outputs, *(stack for _, stack, _ in self._stacks)]
        finally:
            handle.remove()
            composed.close()
            for _, stack, _ in self._stacks:
                stack.requires_grad_(False)

    def receive(self, index: int, errors: Sequence[Tensor | None]) -> None:
        if index not in self.sites:
            return
        if self._routed is None or not errors or errors[0] is None:
            raise RuntimeError(
                f"layer {index} ran without calling its experts: its MoE block was replaced by other code"
            )
        delta, routed = errors[0], self._routed
        site = self.sites[index]
        delta = delta.reshape(-1, delta.shape[-1])
        sums = expert_error(delta, routed[0], routed[1], site.experts, self.keep.to(delta.device))
        self.sums[index] += torch.stack(sums).cpu()
        for (name, _, chosen), gradient in zip(self._stacks, errors[1:], strict=True):
            if gradient is None or self.sketch is None:
                continue
            image = self.sketch(gradient).cpu()
            held = self.gradient[index]
            if name not in held:
                held[name] = torch.zeros(site.experts, *image.shape[1:], dtype=image.dtype)
            held[name][list(chosen) if chosen is not None else slice(None)] += image

    def result(
        self, loss: float, labels: int, tokens: int, base: dict[str, Any], separation: Separation | None
    ) -> ErrorMap:
        layers = tuple(self.sites)
        count, weight, mass, square = torch.stack([self.sums[layer] for layer in layers], dim=1)
        gradient = {}
        for name, like in (self.gradient[layers[0]] or {}).items():
            gradient[name] = torch.stack([self.gradient[layer].get(name, torch.zeros_like(like)) for layer in layers])
        return ErrorMap(layers, count, weight, mass, square, gradient, loss, labels, tokens, base, separation)


def _stacks_in_use(site: experts.ExpertsSite) -> Iterator[tuple[str, Tensor, Sequence[int] | None]]:
    """The tensors whose gradients are the experts' (name, tensor, experts of its slices; None for all of them)."""
    in_use = getattr(site.module, "weights_in_use", None)
    if in_use is None:
        for name, stack in experts.expert_stacks(site.base).items():
            yield name, stack, None
    else:
        for name, held in in_use().items():
            for stack, chosen in held:
                yield name, stack, chosen

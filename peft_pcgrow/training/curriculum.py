"""Curriculum: put the examples of a dataset in the order of how much they surprise the model."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from peft_pcgrow.adapter.host import AuxiliaryTrainingWrapper, BaseTunerLayer
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures.engines import inside
from peft_pcgrow.architectures.sharded import check_whole
from peft_pcgrow.maps.batches import IGNORED, check_causal, held_still, known_words, predict, read_batch, token_losses
from peft_pcgrow.maps.corpus import pad, read_text, whole_number
from peft_pcgrow.maps.distributed import check_same, processes, summed, together, turn
from peft_pcgrow.maps.resume import weights_in_use
from peft_pcgrow.settings import refuse_gone

# examples that several processes compare before each measures its share
LOOKED_AT = 16
GONE = {
    "prerequisites": "order the examples that must come first by themselves, and put the others after them",
    "live": "call order_by_surprisal again, on the examples that are left, where they should be measured anew",
}


def order_by_surprisal(
    dataset: Any,
    model: nn.Module,
    *,
    descending: bool = False,
    relative: bool = False,
    window: int | None = None,
    batch_size: int = 8,
    collator: Callable[[list], Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    return_surprisal: bool = False,
    progress: bool = True,
    **gone: NoReturn,
) -> Any:
    """The examples of `dataset`, least surprising first.

    Surprisal is an example's mean loss in nats per label token under `model` as it is now, its active adapters included
    (of a growing branch: under the grown model). Batches and padding change it by rounding only. Equal surprisals keep
    the dataset's order. Under torch.distributed all processes must call; each measures a share, all get one order.

    Nothing in this package calls it: a controlled study of orders, this one among them, found none that is best over
    models and tasks (arXiv:2510.19099). Compare with the shuffled dataset (`examples/curriculum.py` does). A Trainer
    shuffles what it is given unless `TrainingArguments(train_sampling_strategy="sequential")`.

    Args:
        dataset: N examples by index: a `datasets.Dataset`, a list, token ids `[N, S]`, or a torch map-style dataset. An
            example is a mapping with `input_ids` and, if there are any, `attention_mask` and `labels` (-100 is
            ignored), token ids alone, or a string. Without labels every token is predicted from those before it.
        model (nn.Module): a transformers causal LM in any floating dtype and on any device; with or without adapters.
        descending (bool): most surprising first.
        relative (bool): where a PCGrow adapter is active, the loss with it minus the loss with all adapters off: below
            zero is what the branch has learnt, so least first means best learnt first. At birth it is 0 for every
            example. Where none is active, plain surprisal.
        window (int): sort inside windows of so many examples and keep the windows in the dataset's order, as surprisals
            age while the model learns; None: one window for all. Shuffle the dataset first, so that windows are mixed.
        batch_size (int): examples a forward pass.
        collator (callable): makes model inputs of a list of examples, one row each: give the one you train with where
            it sets labels, or the model takes more than the three columns above. None pads on the right and leaves
            other columns out.
        tokenizer (callable): makes token ids of strings, or of a data set's column "text" (or its only one of strings).
        return_surprisal (bool): also return the surprisals, fp64 `[N]`, in the order of the examples returned.
        progress (bool): show a progress bar on standard error.

    Returns:
        `dataset.select(order)` where the dataset has that method, a list of a list, a `torch.utils.data.Subset` of
        other datasets; or a pair of that and the surprisals.

    Raises:
        TypeError: no model, a dataset without length or index, or an option that is gone.
        ValueError: an example without label tokens, an option out of its range, or other models or examples on
            other processes.
        FloatingPointError: a loss that is NaN or infinite.
        RuntimeError: another process failed.

    Example:
        >>> texts = torch.cat(batches)
        >>> ordered, surprisal = order_by_surprisal(texts, model, return_surprisal=True, progress=False)
        >>> len(ordered), bool((surprisal.diff() >= 0).all())
        (32, True)
    """
    refuse_gone("order_by_surprisal", gone, GONE)
    model = inside(model)
    with together("order_by_surprisal"):
        if isinstance(dataset, Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            hint = (
                f"one of its splits ({', '.join(map(str, dataset))})"
                if isinstance(dataset, Mapping)
                else "a list of it"
            )
            raise TypeError(f"examples are ordered by index, and a {type(dataset).__name__} has none: give {hint}")
        check_causal(model, shared_out=True)
        check_whole(model, "order_by_surprisal", shared_out=True)
        batch_size = whole_number("batch_size", batch_size, "examples")
        window = None if window is None else whole_number("window", window, "examples")
        count = len(dataset)
        facts = {"examples": count, "texts": _some(dataset)} if processes() > 1 else {}
        meter = _Meter(dataset, model, relative, batch_size, collator, tokenizer)
    if processes() > 1:
        check_same("order_by_surprisal", {**facts, "weights": weights_in_use(model)})
    bar = tqdm(total=count, unit="example", desc="measuring surprisal", disable=not progress)
    with together("order_by_surprisal"), bar:
        surprisal = meter.measure(bar)
    if turn(model)[1] > 1:
        # each process measured some batches
        surprisal = summed({"surprisal": surprisal}, next(model.parameters()).device)["surprisal"]
    keys, size = (-surprisal if descending else surprisal).tolist(), window or max(count, 1)
    order: list[int] = []
    for start in range(0, count, size):
        order += sorted(range(start, min(start + size, count)), key=keys.__getitem__)
    chosen = _select(dataset, order)
    return (chosen, surprisal[order]) if return_surprisal else chosen


def _some(dataset: Any) -> list[str]:
    """Digests of some examples, spread over a dataset, which tell it from another one, or another order."""
    found = []
    for place in {len(dataset) * part // LOOKED_AT for part in range(min(LOOKED_AT, len(dataset)))}:
        example = dataset[place]
        ids = example.get("input_ids", example) if isinstance(example, Mapping) else example
        held = ids.tolist() if hasattr(ids, "tolist") else ids
        found.append(hashlib.sha256(repr(held).encode()).hexdigest()[:8])
    return found


def _select(dataset: Any, order: list[int]) -> Any:
    if isinstance(dataset, (Tensor, np.ndarray)):  # whose own `select` is another thing
        return dataset[order]
    if hasattr(dataset, "select"):
        return dataset.select(order)
    return [dataset[i] for i in order] if isinstance(dataset, (list, tuple)) else Subset(dataset, order)


@dataclass(frozen=True)
class _Meter:
    """Measures examples of a dataset under a model."""

    dataset: Any
    model: nn.Module
    relative: bool
    batch_size: int
    collator: Callable[[list], Any] | None
    tokenizer: Callable[..., Any] | None

    @torch.no_grad()
    def measure(self, bar: tqdm) -> Tensor:
        """Surprisals of the N examples, fp64 `[N]` on the CPU; of several processes each measures the batches whose
        turn is its, the others' are 0. The model is left as it was."""
        relative = self.relative and _has_branch(self.model)
        found = torch.zeros(len(self.dataset), dtype=torch.float64, device="cpu")
        number, count = turn(self.model)
        with held_still(self.model):
            for batch, start in enumerate(range(0, len(found), self.batch_size)):
                indices = range(start, min(start + self.batch_size, len(found)))
                bar.update(len(indices))
                if batch % count != number:
                    continue
                inputs, target = self._read(indices)
                values = _mean_losses(self.model, inputs, target, indices)
                if relative:
                    with adapters_off(self.model):
                        values = values - _mean_losses(self.model, inputs, target, indices)
                found[start : indices.stop] = values
        return found

    def _read(self, indices: range) -> tuple[dict[str, Any], Tensor]:
        examples = [self.dataset[i] for i in indices]
        if self.collator is None:
            named = zip(indices, examples, strict=True)
            batch = pad([read_text(example, f"example {i}", self.tokenizer) for i, example in named])
        else:
            batch = self.collator(examples)
        inputs, target, _ = read_batch(batch, next(self.model.parameters()).device, known_words(self.model))
        if len(target) != len(examples):
            raise ValueError(
                f"the collator made {len(target)} rows of {len(examples)} examples, and surprisal is measured by row: "
                "give one that does not pack (padding_free=False)"
            )
        return inputs, target


def _mean_losses(model: nn.Module, inputs: dict[str, Any], target: Tensor, indices: Sequence[int]) -> Tensor:
    """Mean loss of each row's label tokens in nats, fp64 `[B]` on the CPU."""
    tokens = (target[:, 1:] != IGNORED).sum(dim=1).cpu()
    if not bool(tokens.all()):
        i = indices[int((tokens == 0).nonzero()[0])]
        raise ValueError(
            f"example {i} has no label token, so it has no surprisal: give it at least two tokens and labels that are "
            "not all -100, or filter it out"
        )
    sums = token_losses(predict(model, inputs), target).double().sum(dim=1).cpu()
    for i, value in zip(indices, sums.tolist(), strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of example {i} is {value}: check the model's weights and its tokens")
    return sums / tokens


def _has_branch(model: nn.Module) -> bool:
    layers = [layer for layer in model.modules() if isinstance(layer, PCGrowExperts) and not layer.disable_adapters]
    if any(layer.merged for layer in layers):
        raise ValueError("relative=True needs the base, and an adapter is merged into it: call unmerge_adapter() first")
    return any(layer.active_banks() for layer in layers)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """As PEFT's `disable_adapter`, which however leaves every active adapter trainable, those that were frozen too."""
    switched: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not module.disable_adapters
    ]
    trains = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for module in switched:
            module.enable_adapters(False)
        yield
    finally:
        for module in switched:
            module.enable_adapters(True)
        for p, flag in trains:
            p.requires_grad_(flag)

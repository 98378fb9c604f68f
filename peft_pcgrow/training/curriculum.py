"""Curriculum: put the examples of a dataset in the order of how much they surprise the model."""

import heapq
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset, Subset, get_worker_info
from tqdm.auto import tqdm

from peft_pcgrow.adapter.host import AuxiliaryTrainingWrapper, BaseTunerLayer
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.maps.batches import IGNORED, check_causal, known_words, predict, read_batch
from peft_pcgrow.maps.corpus import pad, read_text, whole_number
from peft_pcgrow.maps.distributed import check_same, process, processes, summed, together
from peft_pcgrow.maps.resume import weights_in_use

Needs = Mapping[int, set[int]]


def order_by_surprisal(
    dataset: Any,
    model: nn.Module,
    *,
    descending: bool = False,
    relative: bool = False,
    window: int | None = None,
    prerequisites: Mapping[int, Any] | Callable[[Any], Any] | str | None = None,
    live: bool = False,
    batch_size: int = 8,
    collator: Callable[[list], Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    return_surprisal: bool = False,
    progress: bool = True,
) -> Any:
    """The examples of `dataset`, least surprising first.

    Surprisal is an example's mean loss in nats per label token under `model` as it is now, its active adapters included
    (of a growing branch: under the grown model). Batches and padding change it by rounding only. Equal surprisals keep
    the dataset's order. Under torch.distributed all processes must call; each measures a share, all get one order.

    Nothing in this package calls it: a controlled study of orders, this one among them, found none that is best over
    models and tasks (arXiv:2510.19099). Compare with the shuffled dataset (`examples/curriculum.py` does). A Trainer
    shuffles what it is given unless `TrainingArguments(train_sampling_strategy="sequential")`, or `live` is on.

    Args:
        dataset: N examples by index: a `datasets.Dataset`, a list, token ids `[N, S]`, or a torch map-style dataset. An
            example is a mapping with `input_ids` and, if there are any, `attention_mask` and `labels` (-100 is
            ignored), token ids alone, or a string. Without labels every token is predicted from those before it.
        model: a transformers causal LM in any floating dtype and on any device; with or without adapters.
        descending: most surprising first.
        relative: where a PCGrow adapter is active, the loss with it minus the loss with all adapters off: below zero is
            what the branch has learnt, so least first means best learnt first. At birth it is 0 for every example.
            Where none is active, plain surprisal.
        window: sort inside windows of so many examples and keep the windows in the dataset's order, as surprisals age
            while the model learns; None: one window for all. Shuffle the dataset first, so that windows are mixed.
        prerequisites: which examples must come before which, by index: `{7: [2, 3]}`, a function from an example to
            indices, or the name of a column of them. Of the examples whose prerequisites are done, the least (with
            `descending` the most) surprising comes next.
        live: measure each window when its first example is asked for, with the weights of that moment: the result is an
            `IterableDataset` of length N, for a data loader without workers. Each pass over it measures again.
        batch_size: examples a forward pass.
        collator: makes model inputs of a list of examples, one row each: give the one you train with where it sets
            labels, or the model takes more than the three columns above. A column of prerequisites is not shown to it.
            None pads on the right and leaves other columns out.
        tokenizer: makes token ids of strings, or of a data set's column "text" (or its only one of strings).
        return_surprisal: also return the surprisals, fp64 `[N]`, in the order of the examples returned.
        progress: show a progress bar on standard error.

    Returns:
        `dataset.select(order)` where the dataset has that method, a list of a list, a `torch.utils.data.Subset` of
        other datasets; or a pair of that and the surprisals.

    Raises:
        TypeError: no model, a dataset without length or index, or prerequisites that are no indices.
        ValueError: an example without label tokens, prerequisites in a cycle or in a later window, options that do not
            fit together, or other models on other processes.
        FloatingPointError: a loss that is NaN or infinite.
        RuntimeError: another process failed.
    """
    with together("order_by_surprisal"):
        if isinstance(dataset, Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            hint = (
                f"one of its splits ({', '.join(map(str, dataset))})"
                if isinstance(dataset, Mapping)
                else "a list of it"
            )
            raise TypeError(f"examples are ordered by index, and a {type(dataset).__name__} has none: give {hint}")
        check_causal(model)
        batch_size = whole_number("batch_size", batch_size, "examples")
        window = None if window is None else whole_number("window", window, "examples")
        if live and return_surprisal:
            raise ValueError("live=True measures while it is iterated over: there is no surprisal to return yet")
        count = len(dataset)
        size = window or max(count, 1)
        spans = [range(start, min(start + size, count)) for start in range(0, count, size)]
        needs = _read_prerequisites(dataset, prerequisites)
        _check_windows(needs, size)
        for span in spans:
            _arrange(span, [0.0] * len(span), needs)  # a cycle is found before anything is measured
        hidden = prerequisites if isinstance(prerequisites, str) else None
        meter = _Meter(dataset, model, relative, batch_size, collator, tokenizer, hidden)
    if processes() > 1:
        check_same("order_by_surprisal", {"examples": count, "live": live, "weights": weights_in_use(model)})
    sign = -1.0 if descending else 1.0
    if live:
        return _LiveOrder(meter, spans, needs, sign, progress)
    order: list[int] = []
    surprisal = torch.zeros(count, dtype=torch.float64, device="cpu")
    bar = tqdm(total=count, unit="example", desc="measuring surprisal", disable=not progress)
    with together("order_by_surprisal"), bar:
        for span in spans:
            surprisal[span.start : span.stop] = meter.measure(span, bar, process(), processes())
    # each process measured some batches
    surprisal = summed({"surprisal": surprisal}, next(model.parameters()).device)["surprisal"]
    for span in spans:
        order += _arrange(span, (sign * surprisal[span.start : span.stop]).tolist(), needs)
    chosen = _select(dataset, order)
    return (chosen, surprisal[order]) if return_surprisal else chosen


def _select(dataset: Any, order: list[int]) -> Any:
    if isinstance(dataset, (Tensor, np.ndarray)):  # whose own `select` is another thing
        return dataset[order]
    if hasattr(dataset, "select"):
        return dataset.select(order)
    return [dataset[i] for i in order] if isinstance(dataset, (list, tuple)) else Subset(dataset, order)


class _LiveOrder(IterableDataset):
    """Yields examples window by window; each is measured and arranged when its turn comes."""

    def __init__(self, meter: "_Meter", spans: list[range], needs: Needs, sign: float, progress: bool):
        self.meter, self.spans, self.needs, self.sign, self.progress = meter, spans, needs, sign, progress

    def __len__(self) -> int:
        return len(self.meter.dataset)

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise ValueError(
                "live=True measures with the model in training, and a data loader's worker has a stale copy of it: use "
                "num_workers=0 (TrainingArguments(dataloader_num_workers=0))"
            )
        for span in self.spans:
            options = {"desc": "measuring surprisal", "disable": not self.progress, "leave": False}
            with tqdm(total=len(span), unit="example", **options) as bar:
                values = self.meter.measure(span, bar)
            for i in _arrange(span, (self.sign * values).tolist(), self.needs):
                yield self.meter.dataset[i]


class _Meter:
    """Measures examples of a dataset under a model."""

    def __init__(
        self,
        dataset: Any,
        model: nn.Module,
        relative: bool,
        batch_size: int,
        collator: Callable[[list], Any] | None,
        tokenizer: Callable[..., Any] | None,
        hidden: str | None,
    ):
        self.dataset, self.model, self.relative, self.batch_size = dataset, model, relative, batch_size
        self.collator, self.tokenizer, self.hidden = collator, tokenizer, hidden

    @torch.no_grad()
    def measure(self, span: range, bar: tqdm, turn: int = 0, turns: int = 1) -> Tensor:
        """Surprisals of the examples in `span`, fp64 `[len(span)]` on the CPU. The model is left as it was.

        Of `turns` processes, this one measures the batches whose `turn` it is; the others' are 0.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        relative = self.relative and _has_branch(self.model)
        found = [torch.zeros(0, dtype=torch.float64, device="cpu")]
        self.model.eval()
        try:
            for start in range(span.start, span.stop, self.batch_size):
                indices = range(start, min(start + self.batch_size, span.stop))
                bar.update(len(indices))
                if start // self.batch_size % turns != turn:
                    found.append(torch.zeros(len(indices), dtype=torch.float64, device="cpu"))
                    continue
                inputs, target = self._read(indices)
                values = _mean_losses(self.model, inputs, target, indices)
                if relative:
                    with _adapters_off(self.model):
                        values = values - _mean_losses(self.model, inputs, target, indices)
                found.append(values)
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.cat(found)

    def _read(self, indices: range) -> tuple[dict[str, Any], Tensor]:
        examples = [self.dataset[i] for i in indices]
        if self.hidden is not None:
            examples = [{name: value for name, value in e.items() if name != self.hidden} for e in examples]
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
    labels = target[:, 1:]
    kept = labels != IGNORED
    tokens = kept.sum(dim=1).cpu()
    if not bool(tokens.all()):
        i = indices[int((tokens == 0).nonzero()[0])]
        raise ValueError(
            f"example {i} has no label token, so it has no surprisal: give it at least two tokens and labels that are "
            "not all -100, or filter it out"
        )
    logits = predict(model, inputs)
    logits = logits[kept.to(logits.device)]
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(precise, labels[kept].to(logits.device), reduction="none").cpu().double()
    sums = torch.zeros(len(target), dtype=torch.float64, device="cpu").index_add_(0, kept.nonzero()[:, 0].cpu(), losses)
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
def _adapters_off(model: nn.Module) -> Iterator[None]:
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


def _read_prerequisites(dataset: Any, given: Any) -> dict[int, set[int]]:
    """What each example needs, by index; examples that need nothing are left out."""
    if given is None:
        return {}
    count = len(dataset)
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, str):
        pairs = [(i, _column(dataset[i], given, i)) for i in range(count)]
    elif callable(given):
        pairs = [(i, given(dataset[i])) for i in range(count)]
    else:
        raise TypeError(f"prerequisites must map index -> [indices], be a function or a column's name; got {given!r}")
    needs = {}
    for i, listed in pairs:
        listed = () if listed is None else listed
        if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
            raise TypeError(f"the prerequisites of example {i!r} must be a list of indices; got {listed!r}")
        wanted = {_index(j, count, f"a prerequisite of example {i!r}") for j in listed}
        if wanted:
            needs[_index(i, count, "a key of prerequisites")] = wanted
    return needs


def _column(example: Any, name: str, i: int) -> Any:
    if not isinstance(example, Mapping) or name not in example:
        raise ValueError(f"prerequisites={name!r} names a column, and example {i} has none of that name")
    return example[name]


def _index(value: Any, count: int, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be the index of an example; got {value!r}")
    i = operator.index(value)
    if not 0 <= i < count:
        raise ValueError(f"{what} is {i}, and the dataset's indices are 0 to {count - 1}")
    return i


def _check_windows(needs: Needs, size: int) -> None:
    for i, wanted in needs.items():
        late = max(wanted)
        if late // size > i // size:
            raise ValueError(
                f"example {i} (window {i // size}) needs example {late}, which only comes in window {late // size}: "
                "windows keep the dataset's order, so move it forward, or use window=None"
            )


def _arrange(span: range, keys: Sequence[float], needs: Needs) -> list[int]:
    """Indices of `span` by key, each after what it needs of `span`: Kahn's algorithm with a heap for its queue."""
    open_needs = {i: {j for j in needs.get(i, ()) if j in span} for i in span}
    needed_by: dict[int, list[int]] = {}
    for i, wanted in open_needs.items():
        for j in wanted:
            needed_by.setdefault(j, []).append(i)
    ready = [(key, i) for key, i in zip(keys, span, strict=True) if not open_needs[i]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, done = heapq.heappop(ready)
        order.append(done)
        for i in needed_by.get(done, ()):
            open_needs[i].discard(done)
            if not open_needs[i]:
                heapq.heappush(ready, (keys[i - span.start], i))
    if len(order) < len(span):
        raise ValueError(
            f"prerequisites run in a cycle, each example needing the next: {_cycle(open_needs)}; take one out"
        )
    return order


def _cycle(open_needs: Mapping[int, set[int]]) -> str:
    """Whoever still waits has an open need, and so has that one: following them comes back to where it was."""
    path = [min(i for i, wanted in open_needs.items() if wanted)]
    while path[-1] not in path[:-1]:
        path.append(min(open_needs[path[-1]]))
    return " -> ".join(map(str, path[path.index(path[-1]) :]))

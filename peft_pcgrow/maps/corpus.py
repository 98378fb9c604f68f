"""Whatever users hold as text, read as batches that a model takes.

A corpus is a tensor or array of token ids (`[N, S]` rows are texts, `[S]` is one), a batch, or anything that gives
items by iterating or by index: a `datasets.Dataset`, a Trainer's data set or data loader, a list. An item is

    a batch  a mapping with `input_ids [B, S]`, such ids alone, or several texts (a list of what follows), or
    a text   a mapping with `input_ids [S]` and, if there are any, `attention_mask` and `labels`; ids alone; a string.

Batches are left as they are. Texts are put together in the order they come, and padded on the right where their lengths
differ. Shapes: B texts, S tokens.
"""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# label of tokens that are not predicted
IGNORED = -100
# columns of a text, and what pads them
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
# columns of a text that its collator makes something of: without it the model would see other text
COLLATED = ("seq_lengths", "completion_mask", "assistant_masks")
# those and what models take of a batch, but not of single rows
OF_ROWS = (*COLLATED, "position_ids", "pixel_values", "input_features")
WANTED = (
    "a corpus is token ids [N, S], a list of texts (token ids [S] each, or strings with tokenizer=), a tokenized "
    "datasets.Dataset, or a data loader"
)
NO_TOKENIZER = (
    "{0} is a string: give tokenizer= where there is that argument, or token ids: "
    '[tokenizer(text)["input_ids"] for text in texts]'
)

Text = dict[str, Tensor]


def whole_number(name: str, value: Any, unit: str, least: int = 1) -> int:
    """`value` as an int; ValueError unless it is a whole number of at least `least`."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of {unit}, at least {least}; got {value!r}")
    return number


def read_corpus(
    corpus: Any, batch_size: int = 8, tokenizer: Callable[..., Any] | None = None
) -> Iterator[dict[str, Any]]:
    """The batches of a corpus as model inputs, `input_ids [B, S]` among them, on the device that they come from.

    Raises:
        TypeError: no corpus. ValueError: no token ids where they were expected, or a string without a tokenizer.
    """
    texts: list[Text] = []
    for number, item in enumerate(_items(corpus, batch_size)):
        found = _read_item(item, f"item {number} of the corpus", tokenizer)
        if isinstance(found, list):
            texts += [text for text in found if len(text["input_ids"])]
        while texts and (not isinstance(found, list) or len(texts) >= batch_size):
            yield pad(texts[:batch_size])
            del texts[:batch_size]
        if not isinstance(found, list):
            yield found
    if texts:
        yield pad(texts)


def pad(texts: list[Text]) -> dict[str, Tensor]:
    """One batch `[B, S]` of texts, padded on the right; a mask where there is padding, labels where a text has them."""
    ids = [text["input_ids"] for text in texts]
    columns = {"input_ids": ids}
    if len({len(row) for row in ids}) > 1 or any("attention_mask" in text for text in texts):
        columns["attention_mask"] = [text.get("attention_mask", torch.ones_like(text["input_ids"])) for text in texts]
    if any("labels" in text for text in texts):
        columns["labels"] = [text.get("labels", text["input_ids"]) for text in texts]
    return {name: pad_sequence(rows, True, float(PADDING[name])) for name, rows in columns.items()}


def read_text(example: Any, what: str, tokenizer: Callable[..., Any] | None = None) -> Text:
    """One text's columns, `[S]` each; ValueError, naming it as `what`, if it is none."""
    found = _read_item(example, what, tokenizer)
    if not isinstance(found, list) or len(found) != 1:
        count = len(found) if isinstance(found, list) else len(found["input_ids"])
        raise ValueError(f"{what} needs input_ids of shape [S], integers; got a batch of {count} texts")
    return found[0]


def _items(corpus: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(corpus, (str, bytes, os.PathLike)):
        raise TypeError(f"{str(corpus)[:80]!r} is no corpus but a single string, or a path: {WANTED}")
    if isinstance(corpus, Mapping):
        if "input_ids" not in corpus:
            raise ValueError(
                f"the corpus is a mapping of {', '.join(map(str, corpus)) or 'nothing'}: give one of its splits, or a "
                "batch with input_ids"
            )
        return [corpus]
    if isinstance(corpus, np.ndarray):
        corpus = torch.as_tensor(np.array(corpus), device="cpu")
    if isinstance(corpus, Tensor):
        return [corpus] if corpus.dim() < 2 else corpus.split(batch_size) if corpus.dim() == 2 else corpus
    if isinstance(corpus, (list, tuple)) and _is_token(_first(corpus)):
        return [corpus]
    if isinstance(corpus, Iterable):
        return corpus
    if hasattr(corpus, "__getitem__") and hasattr(corpus, "__len__"):
        # a torch data set: iterating over one only ends where it raises IndexError
        return (corpus[i] for i in range(len(corpus)))
    raise TypeError(f"{type(corpus).__name__} is no corpus: {WANTED}")


def _read_item(item: Any, what: str, tokenizer: Callable[..., Any] | None) -> dict[str, Any] | list[Text]:
    """A batch as model inputs, or texts."""
    if isinstance(item, Mapping):
        return _read_mapping(item, what, tokenizer)
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(NO_TOKENIZER.format(what))
        return [{"input_ids": _integers(tokenizer(item)["input_ids"], what)}]
    if isinstance(item, (list, tuple)) and not _is_token(_first(item)) and len(item):
        if len(item) == 1 and getattr(item[0], "ndim", 0) == 2:
            return _read_item(item[0], what, tokenizer)  # a loader over a TensorDataset
        if (isinstance(item, tuple) and len(item) > 1) or any(getattr(part, "ndim", 1) != 1 for part in item):
            raise ValueError(
                f"{what} is a {type(item).__name__} of {len(item)} whose parts have no names: give a mapping with "
                "input_ids and, if there are any, attention_mask and labels"
            )
        _check_turned(item, what)
        return [read_text(part, f"text {i} of {what}", tokenizer) for i, part in enumerate(item)]
    ids = _integers(item, what)
    if ids.dim() not in (1, 2):
        raise ValueError(f"{what} needs input_ids of shape [B, S] or [S], integers; got {tuple(ids.shape)}")
    return {"input_ids": ids} if ids.dim() == 2 else [{"input_ids": ids}]


def _read_mapping(item: Mapping[str, Any], what: str, tokenizer: Callable[..., Any] | None) -> Any:
    if item.get("input_ids") is None:
        strings = [name for name, value in item.items() if isinstance(value, str)]
        name = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
        if tokenizer is None or name is None:
            hint = "tokenize it first" if tokenizer is None else "which of them is the text is not clear: tokenize it"
            raise ValueError(
                f"{what} has no input_ids, only {sorted(map(str, item))}: {hint}, or give the collator's batches"
            )
        return _read_item(item[name], f"{name} of {what}", tokenizer)
    given = item["input_ids"]
    if isinstance(given, (list, tuple)) and len(given) and not _is_token(_first(given)):
        # a batch of lists, as a tokenizer gives it
        _check_turned(given, what)
        _check_collated(item, what, OF_ROWS)
        columns = {name: item[name] for name in PADDING if item.get(name) is not None}
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(given))]
        return pad([read_text(row, f"text {i} of {what}") for i, row in enumerate(rows)])
    found = {"input_ids": _integers(given, what)}
    dims = found["input_ids"].dim()
    if dims not in (1, 2):
        raise ValueError(
            f"{what} needs input_ids of shape [B, S] or [S], integers; got {tuple(found['input_ids'].shape)}"
        )
    if dims == 1:
        _check_collated(item, what, OF_ROWS)
        found |= {
            name: torch.as_tensor(item[name], device="cpu")
            for name in ("attention_mask", "labels")
            if item.get(name) is not None
        }
        for name, value in found.items():
            if value.shape != found["input_ids"].shape:
                raise ValueError(
                    f"{what} has {tuple(value.shape)} {name} to {tuple(found['input_ids'].shape)} input_ids"
                )
        return [{name: value.long() for name, value in found.items()}]
    _check_collated(item, what, COLLATED)
    # a column that is no array (names of files, say) goes to the model as it is
    arrays = {
        n: torch.as_tensor(v, device="cpu") if isinstance(v, (list, np.ndarray)) and n in PADDING else v
        for n, v in item.items()
    }
    return {**arrays, **found}


def _check_turned(rows: Any, what: str) -> None:
    """Several tensors of one length are texts, or torch's default collator made columns of lists: not to be told."""
    if len(rows) > 1 and all(isinstance(row, Tensor) for row in rows) and len({len(row) for row in rows}) == 1:
        raise ValueError(
            f"{what} is {len(rows)} tensors of {len(rows[0])} numbers, which may be texts, or what torch's default "
            'collator makes of lists, texts turned around: use dataset.with_format("torch"), or stack them [B, S]'
        )


def _check_collated(item: Mapping[str, Any], what: str, names: tuple[str, ...]) -> None:
    if collated := [name for name in names if item.get(name) is not None]:
        raise ValueError(
            f"{what} has {', '.join(collated)}, which its collator makes something of: give the batches of the data "
            "loader that you train with"
        )


def _first(values: Any) -> Any:
    return values[0] if len(values) else None


def _is_token(value: Any) -> bool:
    """Whether this is a number, rather than a text of them."""
    return isinstance(value, (int, float, np.generic)) or getattr(value, "ndim", 1) == 0


def _integers(value: Any, what: str) -> Tensor:
    try:
        ids = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value), device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} holds no token ids but a {type(value).__name__}: {WANTED}") from error
    if ids.numel() and (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex()):
        raise ValueError(f"{what} needs input_ids of shape [B, S] or [S], integers; got {tuple(ids.shape)} {ids.dtype}")
    return ids.long()

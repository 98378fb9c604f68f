"""What users hold as text: all of it gives the map of the same texts measured one by one."""

from collections.abc import Callable
from functools import cache

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import AutoModelForSequenceClassification

from close import assert_close
from peft_pcgrow import ErrorMap, ErrorMapCallback, measure_errors, order_by_surprisal, sample_text
from peft_pcgrow.maps.batches import read_batches
from peft_pcgrow.maps.corpus import read_corpus
from peft_pcgrow.maps.error_map import SUMS
from tiny import VOCABULARY, build, tokens

LENGTHS = (5, 12, 3, 9, 12, 7, 4, 11, 8, 6)
MODEL = build("qwen3_moe", torch.float64)


@cache
def texts() -> list[Tensor]:
    return [tokens(1, length, seed=20 + i)[0] for i, length in enumerate(LENGTHS)]


def measured(corpus, **options) -> ErrorMap:
    return measure_errors(MODEL, corpus, progress=False, **options)


@cache
def one_by_one() -> ErrorMap:
    """The map of each text by itself, `[1, S]`, added up."""
    first, *rest = [measured([text[None]]) for text in texts()]
    for other in rest:
        first = first + other
    return first


def assert_same(got: ErrorMap, want: ErrorMap) -> None:
    assert (got.labels, got.tokens) == (want.labels, want.tokens)
    assert got.loss == pytest.approx(want.loss, rel=1e-8)  # rotary angles are fp32, so places change them
    for name in SUMS:
        assert_close(name, getattr(got, name), getattr(want, name), "fp64 across batches")
    for name, gradient in got.gradient.items():
        assert_close(name, gradient.sum(0), want.gradient[name].sum(0), "fp64 across batches")


class ByIndex(Dataset):
    """As a Trainer's data set may be: it does not end when it is iterated over."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": texts()[i % len(LENGTHS)], "labels": texts()[i % len(LENGTHS)]}


def words(text: str) -> dict:
    """A tokenizer of numbers."""
    return {"input_ids": [int(word) for word in text.split()]}


def spelled(text: Tensor) -> str:
    return " ".join(map(str, text.tolist()))


def collate(examples: list[dict]) -> dict:
    width = max(len(example["input_ids"]) for example in examples)
    short = [width - len(example["input_ids"]) for example in examples]
    filled = [
        torch.nn.functional.pad(example["input_ids"], (missing, 0))
        for example, missing in zip(examples, short, strict=True)
    ]
    mask = [torch.arange(width) >= missing for missing in short]
    return {"input_ids": torch.stack(filled), "attention_mask": torch.stack(mask).long()}


def rows(**more) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"input_ids": text.tolist(), "row": i, **more} for i, text in enumerate(texts())]
    )


CORPORA: dict[str, Callable] = {
    "tensors": texts,
    "generator": lambda: (text for text in texts()),
    "lists": lambda: [text.tolist() for text in texts()],
    "arrays of int16": lambda: [text.numpy().astype(np.int16) for text in texts()],
    "int32": lambda: [text.int() for text in texts()],
    "uint8": lambda: [text.to(torch.uint8) for text in texts()],
    "mappings": lambda: [{"input_ids": text, "labels": text} for text in texts()],
    "batches of texts": lambda: [texts()[:7], [text.tolist() for text in texts()[7:]]],
    "batch of lists": lambda: {"input_ids": [text.tolist() for text in texts()]},
    "texts and batches": lambda: [*texts()[:3], collate([{"input_ids": text} for text in texts()[3:6]]), *texts()[6:]],
    "nothing between": lambda: [*texts()[:3], [], *texts()[3:]],
    "by index": ByIndex,
    "loader": lambda: DataLoader(ByIndex(), batch_size=4, collate_fn=collate),
    "loader of lists": lambda: DataLoader(ByIndex(), batch_size=4, collate_fn=lambda examples: examples),
    "datasets": rows,
    "datasets, torch": lambda: rows().with_format("torch"),
    "datasets, numpy": lambda: rows().with_format("numpy"),
    "datasets, streamed": lambda: rows().to_iterable_dataset(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CORPORA)
def test_texts_of_unequal_lengths(kind):
    assert_same(measured(CORPORA[kind]()), one_by_one())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_sums_do_not_depend_on_how_texts_are_batched(size):
    assert_same(measured(texts(), batch_size=size), one_by_one())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "content"])
def test_strings(name):
    strings = [spelled(text) for text in texts()]
    assert_same(measured(strings, tokenizer=words), one_by_one())
    data = datasets.Dataset.from_list([{name: string, "number": 3} for string in strings])
    assert_same(measured(data, tokenizer=words), one_by_one())
    found, surprisal = order_by_surprisal(strings, MODEL, tokenizer=words, return_surprisal=True, progress=False)
    wanted, same = order_by_surprisal(texts(), MODEL, return_surprisal=True, progress=False)
    assert found == [spelled(text) for text in wanted]
    assert torch.equal(surprisal, same)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "int32", "array", "TensorDataset", "loader", "mapping", "one text"])
def test_texts_of_one_length(kind):
    ids = tokens(20, 9)
    given = {
        "tensor": ids,
        "int32": ids.int(),
        "array": ids.numpy(),
        "TensorDataset": TensorDataset(ids),
        "loader": DataLoader(TensorDataset(ids), batch_size=8),
        "mapping": [{"input_ids": ids}],
        "one text": ids.flatten().tolist(),
    }
    want = measured([ids.reshape(1, -1)]) if kind == "one text" else measured(ids.split(8))
    got = measured(given[kind])
    assert_same(got, want)
    # rows of one length need no mask, and a matrix is cut into batches as its rows are
    if kind != "mapping":
        assert torch.equal(got.mass, want.mass)
        assert all(batch.keys() == {"input_ids"} for batch in read_corpus(given[kind]))


def test_masks_and_labels_of_texts():
    """Labels that only some texts have, and padding within a text, mean what they mean in a batch."""
    ids = tokens(2, 6)
    mask, labels = torch.tensor([1, 1, 1, 1, 0, 0]), torch.tensor([-100, -100, 7, 8, -100, -100])
    given = [{"input_ids": ids[0], "attention_mask": mask, "labels": labels}, {"input_ids": ids[1]}]
    want = {
        "input_ids": ids,
        "attention_mask": torch.stack([mask, torch.ones_like(mask)]),
        "labels": torch.stack([labels, ids[1]]),
    }
    assert_same(measured(given), measured([want]))
    assert measured(given).labels == 2 + 5


@pytest.mark.slow
def test_readers_elsewhere_read_the_same():
    """What compressing, exporting and shrinking read goes through one reader."""
    held = list(read_batches(MODEL, texts(), max_tokens=20))
    assert sum(batch.tokens for batch in held) == sum(LENGTHS[:8])
    kept = {"retain": rows(), "window": 4}
    separated = measured(tokens(8, 12), **kept).separation
    assert separated is not None
    assert separated.facts["retain_tokens"] == sum(LENGTHS)


PATH = "examples/embedded-moe"
REFUSED = {
    "string": ("a corpus", TypeError, "is no corpus but a single string, or a path: a corpus is token ids"),
    "number": (3, TypeError, "int is no corpus"),
    "strings": (["a", "b"], ValueError, "item 0 of the corpus is a string: give tokenizer="),
    "columns": (
        datasets.Dataset.from_dict({"text": ["a"], "id": [1]}),
        ValueError,
        r"only \['id', 'text'\]: tokenize it",
    ),
    "splits": (datasets.DatasetDict({"train": rows()}), ValueError, "a mapping of train: give one of its splits"),
    "floats": (tokens().float(), ValueError, r"integers; got \(4, 16\) torch.float32"),
    "list of floats": ([0.5, 1.0], ValueError, "integers"),
    "truth": (tokens() > 9, ValueError, "integers"),
    "beyond": ([tokens() + 100], ValueError, "the model knows the words 0 to 127: tokenize the text with"),
    "below": ([tokens() - 100], ValueError, "input_ids from -9"),
    "labels beyond": ([{"input_ids": tokens(), "labels": tokens() + 100}], ValueError, "labels from"),
    "labels of texts": ([{"input_ids": tokens(2), "labels": torch.ones(2)}], ValueError, r"labels of shape \(2,\)"),
    "nameless": (TensorDataset(tokens(), tokens()), ValueError, "a tuple of 2 whose parts have no names"),
    "nameless loader": (
        DataLoader(TensorDataset(tokens(), tokens())),
        ValueError,
        "a list of 2 whose parts have no names",
    ),
    "packed": (rows(position_ids=[0, 1]), ValueError, "has position_ids, which its collator makes something of"),
    "packed, in batches": (rows(position_ids=[0, 1]).iter(2), ValueError, "has position_ids, which its collator"),
    "packed, of one row": ([rows(seq_lengths=[2, 3])[:2]], ValueError, "has seq_lengths, which its collator"),
    "masks of a batch": (
        [{"input_ids": tokens(), "assistant_masks": tokens() > 9}],
        ValueError,
        "has assistant_masks, which its collator",
    ),
    # torch's default collator turns lists around
    "turned mappings": (
        DataLoader([{"input_ids": text.tolist()} for text in tokens()], batch_size=2),
        ValueError,
        r"is 16 tensors of 2 numbers, .* use dataset.with_format\(\"torch\"\), or stack them \[B, S\]",
    ),
    "turned lists": (DataLoader(tokens().tolist(), batch_size=2), ValueError, "is 16 tensors of 2 numbers"),
    "turned, one by one": (DataLoader(tokens().tolist()), ValueError, "is 16 tensors of 1 numbers"),
    "nothing": ([], ValueError, "the corpus has no label token"),
    "one token each": ([[5], [6]], ValueError, "the corpus has no label token"),
    "objects": ([object()], ValueError, "holds no token ids but a object"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    corpus, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        measured(corpus)


@pytest.mark.parametrize("value", [0, -1, 2.5, float("nan"), True, "9"])
@pytest.mark.parametrize("name", ["max_tokens", "checkpoint_every", "batch_size", "sketch_dim"])
def test_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        measured(tokens(), **{name: value})
    if name == "max_tokens":
        with pytest.raises(ValueError, match="max_tokens must be a whole number"):
            ErrorMapCallback([tokens()], every=2, max_tokens=value)


def test_numbers_of_numpy():
    assert measured(tokens(8).split(1), max_tokens=np.int64(20)).tokens == 32


def test_numbers_of_samples():
    for options in ({"texts": 0}, {"length": 1}, {"batch": 2.0}, {"temperature": float("nan")}, {"texts": True}):
        with pytest.raises(ValueError, match="must be"):
            sample_text(MODEL, progress=False, **options)


def test_models():
    for call in (measure_errors, lambda model, corpus: order_by_surprisal(corpus, model)):
        with pytest.raises(TypeError, match=f"must be a loaded causal LM.*got the str '{PATH}'"):
            call(PATH, list(tokens()))
        classifier = AutoModelForSequenceClassification.from_config(MODEL.config)
        with pytest.raises(ValueError, match=r"predicts no words|AutoModelForCausalLM"):
            call(classifier, list(tokens()))
        with pytest.raises(ValueError, match="Qwen3MoeModel gives no logits"):
            call(MODEL.model, list(tokens()))


def test_words_of_the_vocabulary():
    assert measured([torch.tensor([[0, VOCABULARY - 1, 3]])]).labels == 2

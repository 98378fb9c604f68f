"""The texts of a run, read once: what is trained on, what is held out, and both halves of the retain text."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_pcgrow.maps.corpus import IGNORED, PADDING, Text, pad, read_corpus

# windows of each text: fewer say nothing about a loss, and there are gates to fit on two parts of them
LEAST = 8
# without held-out text, one window in so many is kept apart
APART = 10
# share of the retain windows that may also be the domain's; more is the same text under two names
SHARED = 0.5


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, each a mapping of `input_ids [S]` and, where they were given, `labels [S]`.

    Attributes:
        train, heldout: of the domain. fit, watch: of the retain text; gates are fitted on the one, forgetting is
            measured on the other. Both empty without retain text.
    """

    train: list[Text]
    heldout: list[Text]
    fit: list[Text]
    watch: list[Text]

    def digest(self) -> dict[str, str]:
        """By name, what tells each of them from other text."""
        return {name: _digest(getattr(self, name)) for name in ("train", "heldout", "fit", "watch")}


def read_texts(
    train: Any, heldout: Any, retain: Any, tokenizer: Callable[..., Any] | None, length: int, batch_size: int
) -> Texts:
    """Read every corpus (see `corpus.read_corpus`) and check them against each other.

    Args:
        heldout: None: one window in `APART` of `train` is kept apart. retain: None: there is none; its windows
            count once each.
        length: tokens of a window; longer texts are cut.

    Raises:
        TypeError: no corpus. ValueError: fewer than `LEAST` windows, held-out text among what is trained on or among
            the retain text, or retain text that is the domain's.
    """
    mine = windows(train, "the corpus", tokenizer, length, batch_size)
    if heldout is None:
        check_enough(mine, "the corpus", LEAST * APART, "give more text, or heldout= apart")
        held = mine[APART - 1 :: APART]
        mine = [window for place, window in enumerate(mine) if place % APART != APART - 1]
        mine = [window for window in mine if _key(window) not in {_key(other) for other in held}]
    else:
        held = windows(heldout, "the held-out text", tokenizer, length, batch_size)
    kept = [] if retain is None else windows(retain, "the retain text", tokenizer, length, batch_size)
    # the same window in both halves would make forgetting look smaller than it is
    kept = list({_key(window): window for window in kept}.values())
    check_enough(mine, "the corpus", LEAST)
    check_enough(held, "the held-out text", LEAST)
    if retain is not None:
        check_enough(kept, "the retain text", 2 * LEAST, "give more text (repeated windows count once)")
    trained = {_key(window) for window in mine}
    if again := sum(_key(window) in trained for window in held):
        raise ValueError(
            f"{again} of the {len(held)} held-out windows are also trained on, so they would tell nothing: take them "
            "out of one of the two"
        )
    spared = {_key(window) for window in kept}
    if again := sum(_key(window) in spared for window in held):
        raise ValueError(
            f"{again} of the {len(held)} held-out windows are also among the retain windows, so what is gained there "
            "would count as forgotten: take them out of one of the two"
        )
    if (again := sum(_key(window) in trained for window in kept)) > SHARED * len(kept):
        raise ValueError(
            f"{again} of the {len(kept)} retain windows are the domain's own: give retain= text whose behaviour must "
            "not change, or 'self'"
        )
    kept = drawn(kept)
    return Texts(mine, held, kept[::2], kept[1::2])


def windows(
    corpus: Any, what: str, tokenizer: Callable[..., Any] | None, length: int, batch_size: int = 8
) -> list[Text]:
    """A corpus as windows of at most `length` tokens, in its order; pieces without a token to predict are left
    out."""
    found: list[Text] = []
    for batch in read_corpus(corpus, batch_size, tokenizer):
        if others := sorted(batch.keys() - PADDING.keys()):
            raise ValueError(
                f"{what} has {', '.join(others)} beside token ids, which belong to batches that are made already: give "
                "texts, token ids or a tokenized data set"
            )
        columns = {name: torch.as_tensor(value, device="cpu").long() for name, value in batch.items()}
        for row in range(len(columns["input_ids"])):
            real = columns["attention_mask"][row].bool() if "attention_mask" in columns else slice(None)
            text = {name: columns[name][row][real] for name in ("input_ids", "labels") if name in columns}
            for start in range(0, len(text["input_ids"]), length):
                piece = {name: ids[start : start + length].clone() for name, ids in text.items()}
                if bool((piece.get("labels", piece["input_ids"])[1:] != IGNORED).any()):
                    found.append(piece)
    return found


def check_enough(found: Sequence[Text], what: str, least: int, remedy: str = "give more text") -> None:
    if len(found) < least:
        raise ValueError(f"{what} has {len(found)} windows of text, and {least} are needed at least: {remedy}")


def collate(texts: list[Text]) -> dict[str, torch.Tensor]:
    """A batch to train on: padded on the right, every token that is not padding is a label unless the text says so."""
    return pad([{**text, "labels": text.get("labels", text["input_ids"])} for text in texts])


def in_batches(texts: Sequence[Text], size: int) -> list[dict[str, torch.Tensor]]:
    return [pad(list(texts[start : start + size])) for start in range(0, len(texts), size)]


def drawn(texts: Sequence[Text], count: int | None = None) -> list[Text]:
    """At most `count` windows, drawn from all over the text, always the same.

    Not evenly spaced ones: gates set their thresholds on every fourth window and maps have folds, so that of corpora
    that were given in turn some would miss one of these (of three, whole ones were left out).
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0), device="cpu")
    return [texts[place] for place in order[:count].tolist()]


def _key(text: Text) -> tuple[int, ...]:
    return tuple(text["input_ids"].tolist())


def _digest(texts: Sequence[Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        for name, ids in sorted(text.items()):
            digest.update(f"{name} {len(ids)} ".encode())
            digest.update(ids.numpy().tobytes())
    return digest.hexdigest()[:32]

"""The texts of a run, read once: what is trained on, what is held out, and both halves of the retain text."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_pcgrow.maps.corpus import IGNORED, PADDING, Text, pad, read_corpus

# windows of each text: fewer say nothing about a loss, and there are gates to fit on two parts of them
LEAST = 8
# without held-out text, one window in so many is kept apart
APART = 10
# beginnings that gates are fitted anew on, for each window: how few tokens tell a text from others is known from many
# texts, however short
MORE = 3
# share of the retain windows that may also be the domain's; more is the same text under two names
SHARED = 0.5
# what retain text is called that was given without a name
RETAIN = "retain"


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, each a mapping of `input_ids [S]` and, where they were given, `labels [S]`.

    Attributes:
        train, heldout: of the domain. fit, watch: of each retain text, by its name, in an order drawn; gates are fitted
            on the one, forgetting is measured on the other. Both empty without retain text.
    """

    train: list[Text]
    heldout: list[Text]
    fit: dict[str, list[Text]]
    watch: dict[str, list[Text]]

    def digest(self) -> dict[str, str]:
        """By name, what tells each of them from other text."""
        found = {"train": _digest(self.train), "heldout": _digest(self.heldout)}
        for half in ("fit", "watch"):
            for name, text in getattr(self, half).items():
                found[half if name == RETAIN else f"{half} of {name}"] = _digest(text)
        return found


def by_name(retain: Any) -> dict[str, Any]:
    """Retain text by its name, in the order of the names: a mapping, or other text as `RETAIN`; of None there is none.

    Raises:
        ValueError: a mapping of nothing, or with a name that is none.
    """
    # a batch is a corpus; of a DatasetDict one split is, which reading it says
    if not isinstance(retain, Mapping) or "input_ids" in retain or type(retain).__module__.startswith("datasets"):
        return {} if retain is None else {RETAIN: retain}
    if not retain or not all(isinstance(name, str) and name for name in retain):
        raise ValueError(f"retain is a mapping of {[*retain]}: give each text a name, or None where nothing is spared")
    if wrong := [name for name in retain if not name.isprintable()]:
        raise ValueError(f"retain text is called {wrong[0]!r}, which cannot be written: give it another name")
    return dict(sorted(retain.items()))


def read_texts(
    train: Any, heldout: Any, retain: Any, tokenizer: Callable[..., Any] | None, length: int, batch_size: int
) -> Texts:
    """Read every corpus (see `corpus.read_corpus`) and check them against each other.

    Args:
        heldout: None: one window in `APART` of `train` is kept apart. retain: None, text, or texts by name (see
            `by_name`); windows count once, for the first of these that has them.
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
    check_enough(mine, "the corpus", LEAST)
    check_enough(held, "the held-out text", LEAST)
    trained = {_key(window) for window in mine}
    if again := sum(_key(window) in trained for window in held):
        raise ValueError(
            f"{again} of the {len(held)} held-out windows are also trained on, so they would tell nothing: take them "
            "out of one of the two"
        )
    kept: dict[str, list[Text]] = {}
    spared: set[tuple[int, ...]] = set()
    for name, text in by_name(retain).items():
        what = called(name)
        # the same window in both halves would make forgetting look smaller than it is
        try:
            read = windows(text, what, tokenizer, length, batch_size)
        except (TypeError, ValueError) as error:
            if name == RETAIN or what in str(error):
                raise
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{what}: {error}") from error
        found = {_key(window): window for window in read}
        kept[name] = drawn([window for key, window in found.items() if key not in spared])
        check_enough(kept[name], what, 2 * LEAST, "give more text (repeated windows count once)")
        if (again := len(found.keys() & trained)) > SHARED * len(found):
            raise ValueError(
                f"{again} of the {len(found)} windows of {what} are the domain's own: give retain= text whose "
                "behaviour must not change, or 'self'"
            )
        spared |= found.keys()
    if again := sum(_key(window) in spared for window in held):
        raise ValueError(
            f"{again} of the {len(held)} held-out windows are also among the retain windows, so what is gained there "
            "would count as forgotten: take them out of one of the two"
        )
    halves = ({name: text[half::2] for name, text in kept.items()} for half in (0, 1))
    return Texts(mine, held, *halves)


def called(name: str) -> str:
    """A retain text in words."""
    return "the retain text" if name == RETAIN else f"the retain text {name!r}"


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


def drawn_alike(texts: Mapping[str, Sequence[Text]], count: int) -> list[Text]:
    """Some `count` windows of texts whose order is drawn, as many of each (of one that has fewer, all)."""
    share = -(-count // len(texts))
    return drawn([window for text in texts.values() for window in text[:share]])


def to_fit_anew(texts: Texts, count: int, window: int, size: int) -> tuple[list[dict], list[dict]]:
    """Batches of `size` that gates are fitted anew on, of the domain and of the retain texts: `count` windows, and of
    `MORE` times as many the beginnings alone, a prompt that all may have in common and twice the tokens that a gate
    looks at (`window`; 0: all there are)."""

    def begun(text: Text) -> Text:
        learned = (text.get("labels", text["input_ids"]) != IGNORED).long()
        end = int(learned.argmax()) + 2 * window if window else None
        return {name: values[:end] for name, values in text.items()}

    def cut(drawing: list[Text]) -> list[Text]:
        return drawing[:count] + [begun(text) for text in drawing[count:]]

    many = (1 + MORE) * count
    return in_batches(cut(drawn(texts.train, many)), size), in_batches(cut(drawn_alike(texts.fit, many)), size)


def _key(text: Text) -> tuple[int, ...]:
    return tuple(text["input_ids"].tolist())


def _digest(texts: Sequence[Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        for name, ids in sorted(text.items()):
            digest.update(f"{name} {len(ids)} ".encode())
            digest.update(ids.numpy().tobytes())
    return digest.hexdigest()[:32]

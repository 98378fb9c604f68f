"""Batches of text as a model takes them, and their losses."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from peft_pcgrow.architectures.engines import check_engine
from peft_pcgrow.architectures.host import REPACKS
from peft_pcgrow.gates.gate import Rows
from peft_pcgrow.gates.text_borders import Told
from peft_pcgrow.maps.corpus import IGNORED, read_corpus
from peft_pcgrow.settling.output_head import OutputHead

# inputs with a row for each row of a batch; others, of images for example, only look so when numbers happen to agree
BY_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
NO_GRADIENTS = (
    "errors are gradients, and torch.inference_mode() keeps none: measure outside of it, a model that was made outside "
    "of it"
)


def check_causal(model: Any, shared_out: bool = False) -> None:
    """TypeError or ValueError unless `model` may be a causal LM in memory, whole in this process but for experts, if
    these may be `shared_out`."""
    if not isinstance(model, nn.Module):
        given = (
            f"the {type(model).__name__} {str(model)[:80]!r}"
            if isinstance(model, (str, os.PathLike))
            else repr(type(model))
        )
        raise TypeError(f"the model must be a loaded causal LM, AutoModelForCausalLM.from_pretrained(...); got {given}")
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    if name.endswith(("Classification", "QuestionAnswering")):
        raise ValueError(f"{name} predicts no words: load the model with AutoModelForCausalLM")
    check_engine(model, shared_out)


def predict(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits of what comes after each token, `[B, S, V]`; ValueError if the model gives others."""
    logits = getattr(model(**inputs, use_cache=False), "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != inputs["input_ids"].shape:
        found = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
        raise ValueError(
            f"{type(model).__name__} gives {found} for input_ids {tuple(inputs['input_ids'].shape)}, and a causal LM "
            "[B, S, vocabulary]: load it with AutoModelForCausalLM"
        )
    return logits


def check_gradients(model: nn.Module) -> None:
    """Raise RuntimeError in inference mode, or if the model was made there."""
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise RuntimeError(NO_GRADIENTS)


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of what comes after each token in nats, `[B, S]`, in fp32 at least; 0 where there is no label.

    Args:
        logits: as `predict` gives them, `[B, S, V]`. target: labels `[B, S]`, -100 where there is none.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    # labels are moved, not logits, which would be copied
    wanted = pad(target[:, 1:], (0, 1), value=IGNORED).to(flat.device)
    return cross_entropy(flat, wanted.reshape(-1), ignore_index=IGNORED, reduction="none").view(wanted.shape)


@contextmanager
def settled_losses(
    model: nn.Module, agreed: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[Callable[[dict[str, Any], Tensor], float]]:
    """Inside, what sums the token losses of one batch, given as `inputs` and `target`, carries their error down, and
    returns the sum in nats; `agreed` is entered between the two, around the look whether the sum is finite."""
    head = OutputHead.of(model)
    try:
        yield partial(_settle_batch, model, head, agreed)
    finally:
        if head is not None:
            head.remove()


def _settle_batch(
    model: nn.Module,
    head: OutputHead | None,
    agreed: Callable[[], AbstractContextManager[None]],
    inputs: dict[str, Any],
    target: Tensor,
) -> float:
    with torch.enable_grad():
        loss = None if head is None or not head.fits else _loss_without_logits(model, head, inputs, target)
        if loss is None:
            loss = token_losses(predict(model, inputs), target).sum()
    value = float(loss.detach())
    with agreed():
        if not value < float("inf"):
            raise FloatingPointError(
                f"the loss of a batch is {value}: check the model's weights and the batch's tokens"
            )
    loss.backward()
    return value


def _loss_without_logits(model: nn.Module, head: OutputHead, inputs: dict[str, Any], target: Tensor) -> Tensor | None:
    """Summed; None if it takes the logits."""
    with head.narrowed() as seen:
        logits = getattr(model(**inputs, use_cache=False), "logits", None)
    hidden = head.hidden_of(seen, logits, target)
    return None if hidden is None else head.loss(hidden, pad(target[:, 1:], (0, 1), value=IGNORED), IGNORED)  # type: ignore


class Batch(NamedTuple):
    """What a model is given, as it came, and beside it what counts.

    Attributes:
        inputs: for the model, without labels. target: labels `[B, S]`, -100 on padding, on what padding would predict,
            and on what another text would.
        rows: which tokens are text, and where texts begin.
    """

    inputs: dict[str, Any]
    target: Tensor
    rows: Rows

    @property
    def real(self) -> Tensor:
        """Which tokens are text, `[B, S]`."""
        return self.rows.real

    @property
    def tokens(self) -> int:
        return int(self.real.sum())


def read_batch(batch: Any, device: torch.device, words: int | None = None) -> Batch:
    """A batch on a device. Nothing is added to what the model sees: even a mask of ones would undo its isolation of
    packed texts, which goes by position ids where there is no mask.

    Args:
        batch: `input_ids [B, S]`, or a mapping with them. words: how many the model knows.

    Raises:
        TypeError: a mask that does not tell what is text.
        ValueError: other shapes, no integers, words that the model does not know, or borders of texts that contradict
            each other.
    """
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        ids = given["input_ids"] = torch.as_tensor(ids, device="cpu")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"a batch needs input_ids of shape [B, S], integers; got {tuple(ids.shape)} {ids.dtype}")
    labels = given.pop("labels", None)
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} to input_ids of shape {tuple(ids.shape)}: a causal LM has a label "
            f"for every token ({IGNORED} is ignored)"
        )
    _check_words(ids, words, "input_ids")
    if labels is not None:
        _check_words(labels[labels != IGNORED], words, "labels")
    inputs = moved(given, device)
    ids = inputs["input_ids"]
    rows = Told.by(inputs).rows((ids.shape[0], ids.shape[1]))
    rows = Rows(rows.real.to(device), None if rows.start is None else rows.start.to(device))
    predicted = rows.real.clone()
    predicted[:, 1:] &= rows.real[:, :-1]
    if labels is None and rows.start is not None:
        predicted &= torch.arange(ids.shape[1], device=device) != rows.start
    target = ids if labels is None else labels.to(device).long()
    return Batch(inputs, target.masked_fill(~predicted, IGNORED), rows)


def moved(value: Any, device: torch.device) -> Any:
    """A batch, with all tensors in it on a device."""
    if isinstance(value, Mapping):
        return {name: moved(held, device) for name, held in value.items()}
    # a BlockMask of flex_attention moves like a tensor
    return value.to(device) if isinstance(value, Tensor) or hasattr(value, "mask_mod") else value


def _check_words(ids: Tensor, words: int | None, what: str) -> None:
    if words is not None and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < words):
        raise ValueError(
            f"{what} from {int(ids.min())} to {int(ids.max())}, and the model knows the words 0 to {words - 1}: "
            "tokenize the text with this model's own tokenizer"
        )


def known_words(model: nn.Module) -> int | None:
    """How many words a model has an embedding of, if that can be told."""
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers does not find them
        return None
    return getattr(embeddings, "num_embeddings", None)


def read_batches(
    model: nn.Module,
    corpus: Any,
    max_tokens: int | None = None,
    batch_size: int = 8,
    tokenizer: Callable[..., Any] | None = None,
) -> Iterator[Batch]:
    """Each batch of a corpus as `read_batch` reads it, on the model's device, up to the one that reaches `max_tokens`.

    Raises:
        TypeError, ValueError: what `corpus.read_corpus` and `read_batch` raise.
    """
    tokens, device, words = 0, next(model.parameters()).device, known_words(model)
    for batch in read_corpus(corpus, batch_size, tokenizer):
        read = read_batch(batch, device, words)
        yield read
        if max_tokens is not None and (tokens := tokens + read.tokens) >= max_tokens:
            return


def in_pieces(source: Iterator[Batch], max_tokens: int | None, folds: int) -> Iterator[list[Batch]]:
    """Each batch, in pieces of some of its rows where there are fewer batches than folds."""
    first: list[Batch] = []
    tokens = 0
    for read in source:
        first.append(read)
        full = max_tokens is not None and (tokens := tokens + read.tokens) >= max_tokens
        if full or len(first) == folds:
            break
    pieces = -(-folds // max(len(first), 1))
    for read in chain(first, source):
        yield _cut(read, pieces)


def _cut(batch: Batch, pieces: int) -> list[Batch]:
    """Some of its rows each; whole, if the model takes more than what is known to have a row for each text."""
    rows = len(batch.target)
    for name, value in batch.inputs.items():
        by_row = name in BY_ROW and isinstance(value, Tensor) and len(value) == rows
        if not by_row and not isinstance(value, (bool, int, float, str, type(None))):
            return [batch]
    if pieces < 2 or rows < 2 or (batch.inputs.get("position_ids", batch.target).dim() > 2):
        return [batch]
    found = []
    for chosen in torch.arange(rows, device=batch.target.device).chunk(pieces):
        part = {name: value[chosen] if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
        start = None if batch.rows.start is None else batch.rows.start[chosen]
        found.append(Batch(part, batch.target[chosen], Rows(batch.real[chosen], start)))
    return found


@contextmanager
def held_still(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, no parameter training: whoever measures asks for the gradients that it wants."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if any(p.is_inference() for p in trainable):
        raise RuntimeError(NO_GRADIENTS)  # torch would not let them be put back
    # of each module: PEFT's wrappers train around a base that does not
    were_training = {module: module.training for module in model.modules()}
    # in evaluation, bitsandbytes packs 4-bit weights on some CPUs into a form that has no gradient
    unpacked = [module for module in were_training if getattr(module, REPACKS, False)]

    def put_back() -> None:
        for p in trainable:
            p.requires_grad_(True)
        for module in unpacked:
            module.train(were_training[module])
        for module, was_training in were_training.items():
            module.training = was_training

    try:
        # experts must not drop anything while they are measured
        model.eval()
        for module in unpacked:
            module.train()
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        try:
            put_back()
        except BaseException:
            put_back()  # an interrupt came in the midst of it
            raise


def losses(model: nn.Module, batches: Sequence[Sequence[Batch]]) -> list[float]:
    """Mean loss of each text, nats per predicted token."""
    return [total / count for total, count in (loss_sum(model, held) for held in batches)]


@torch.no_grad()
def loss_sum(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, int]:
    """Loss of a text in nats, and how many tokens of it are predicted."""
    total, count = 0.0, 0
    with held_still(model):
        for inputs, target, _ in batches:
            total += float(token_losses(predict(model, inputs), target).sum())
            count += int((target[:, 1:] != IGNORED).sum())
    return total, count

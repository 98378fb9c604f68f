"""Measure: run a corpus through a model and record per node how wrong its prediction was."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_pcgrow import experts, identity
from peft_pcgrow.batches import Batch, check_causal, held_still, read_batches, settle_batch
from peft_pcgrow.borders import spread, texts_apart
from peft_pcgrow.carry import Way
from peft_pcgrow.contrast import compare
from peft_pcgrow.corpus import whole_number
from peft_pcgrow.energy import GradientSketch
from peft_pcgrow.error_map import FOLDS, ErrorMap
from peft_pcgrow.gate import Rows
from peft_pcgrow.probe import ErrorProbe
from peft_pcgrow.processes import everywhere, over_processes, process, processes
from peft_pcgrow.sample import sample_text
from peft_pcgrow.separation import Separation
from peft_pcgrow.settle import LayerStack

# expert parameters up to which summed gradients are kept whole (4 folds in fp32: 1 GiB); beyond, sketched to this
EXACT_PARAMETERS = 2**26
SKETCH_DIM = 64
# inputs with a row for each row of a batch; others, of images for example, only look so when numbers happen to agree
BY_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def measure_errors(
    model: nn.Module,
    batches: Any,
    *,
    max_tokens: int | None = None,
    batch_size: int = 8,
    tokenizer: Callable[..., Any] | None = None,
    settle: str = "sweep",
    settle_depth: int = 0,
    settle_tol: float = 0.01,
    coherent: bool | None = None,
    sketch_dim: int | None = None,
    retain: Any = None,
    window: int = 64,
    nodes: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> ErrorMap:
    """The error map of a corpus: one sweep over it, nothing is trained.

    Every token counts alike: the error is that of the summed token losses, so the map's sums are the same however the
    corpus is cut into batches or padded. Batches go to the folds of `ErrorMap.gradient` in turn; fewer batches than
    folds are cut between their texts.

    Under torch.distributed (accelerate, torchrun) every process measures the batches it is given and gets the map of
    all of them together; all processes must call.

    Args:
        model: a transformers causal LM with experts, in any floating dtype and on any device; with or without adapters.
        batches: the corpus: batches `[B, S]` of token ids, or mappings with `input_ids` and, if there are any,
            `attention_mask`, `labels` (-100 is ignored) and whatever else the model takes; or texts that are not
            batched yet: a tokenized `datasets.Dataset`, a Trainer's data set, token ids `[N, S]`, lists of token ids of
            any lengths, or, with a tokenizer, strings. Without labels every token that is not padding is predicted from
            those before it.
        max_tokens: stop after the batch that reaches this many tokens (of all processes), padding not counted.
        batch_size: texts a batch, of those that are not batched yet.
        tokenizer: makes token ids of strings, or of a data set's column "text" (or its only one of strings).
        settle: how errors reach the nodes: "sweep" (exact); "relax" (exact to `settle_tol`, and the map holds how many
            hops each layer's tokens needed); "direct" (the top error for all layers below the top `settle_depth`: a
            forward pass and the output head, for a map that ranks nearly alike).
        coherent: also sum the weight gradients, which `removable` needs. Costs the experts' weight gradients and the
            memory to hold them: whole up to 2^26 expert parameters, beyond that sketched. None: unless settle="direct".
        sketch_dim: longest hidden side of a gradient that is kept whole (see `GradientSketch`); None decides by size.
            Second moments of the retain text are kept alike.
        retain: text whose behaviour must not change, as batches like the corpus's, at most `max_tokens` of it; or
            "self": the model writes as many texts itself (see `sample_text`). Then the map also holds branch gates and
            what retain text looks like at every node (`ErrorMap.separation`), for two more forward passes over all.
        window: tokens of context that a gate looks at, the token itself included; 0: all of the text so far.
        nodes: what is measured, "routed", "shared" or "dense" (see `find_experts`).
        checkpoint: folder that the map so far is saved in every `checkpoint_every` batches. If it holds a map of this
            model already, the batches in it are skipped: an interrupted measurement goes on, to the same map.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: no model, or no corpus.
        ValueError: no experts in the model, or offloaded ones (unless coherent=False), no causal LM, a corpus without
            token ids or without one label token, words that the model does not know, too few texts to fit gates on, a
            number out of its range, an unknown way to settle, or a checkpoint of another model.
        FloatingPointError: a loss that is NaN or infinite.
    """
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    check_causal(model)
    tree = experts.find_experts(model, nodes)
    way = Way(settle, settle_depth, settle_tol)
    given = whole_numbers(max_tokens=max_tokens, sketch_dim=sketch_dim, window=window, batch_size=batch_size)
    given |= whole_numbers(checkpoint_every=checkpoint_every)
    batch_size, window, checkpoint_every = (given[name] for name in ("batch_size", "window", "checkpoint_every"))
    max_tokens = -(-given["max_tokens"] // processes()) if "max_tokens" in given else None
    sketch_dim = given.get("sketch_dim", _sketch_dim(tree))
    if coherent is None:
        coherent = settle != "direct"
    if coherent:
        experts.check_in_memory(tree)
    base = identity.describe_base(model, tree) | {
        "sketch": sketch_dim if coherent else None,
        "settle": [settle, settle_depth] if settle == "direct" else settle,
    }
    resumed = _resume(checkpoint, base)
    probe = ErrorProbe(tree, GradientSketch(sketch_dim) if coherent else None, resumed)
    probe.again = coherent or settle != "direct"
    device = next(model.parameters()).device
    read = partial(read_batches, model, batch_size=batch_size, tokenizer=tokenizer)
    seen: list[Batch] = []
    bar = tqdm(total=max_tokens, unit="tok", unit_scale=True, desc="measuring errors", disable=not progress)
    done = 0
    try:
        with held_still(model), probe.routing(), LayerStack(tree.layers, probe=probe, way=way):
            for number, pieces in enumerate(_batches(read(batches), max_tokens)):
                for piece in pieces:
                    if retain is not None:
                        seen.append(piece)
                    done += piece.tokens
                    if done > probe.tokens:
                        probe.begin(piece.real, piece.target)
                        probe.loss += settle_batch(model, piece.inputs, piece.target)
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{probe.loss / max(probe.labels, 1):.3f}")
                if checkpoint is not None and (number + 1) % checkpoint_every == 0:
                    probe.result(base, None).save(_own_folder(checkpoint))
                if max_tokens is not None and done >= max_tokens:
                    break
        emap = over_processes(probe.result(base, None), device)
        if checkpoint is not None:
            probe.result(base, None).save(_own_folder(checkpoint))
        with held_still(model):
            emap.separation = _separate(model, tree, read, seen, retain, max_tokens, window, sketch_dim, progress)
    finally:
        bar.close()
    if not emap.labels:
        raise ValueError(
            f"the corpus has no label token ({emap.tokens} tokens read): give batches with at least two tokens each, "
            "and labels that are not all -100"
        )
    return emap


def whole_numbers(**given: Any) -> dict[str, int]:
    """The numbers among the arguments of `measure_errors`, without those that are None; ValueError for what is none."""
    units = {"max_tokens": "tokens", "batch_size": "texts", "checkpoint_every": "batches", "sketch_dim": "kept rows"}
    units["window"] = "tokens (0: all of the text so far)"
    return {
        name: whole_number(name, given[name], unit, int(name != "window"))
        for name, unit in units.items()
        if given.get(name) is not None
    }


def _sketch_dim(tree: experts.Tree) -> int:
    """The longest side of any expert's matrix if all gradients fit, else what they are sketched to."""
    total = sum(p.numel() for site in tree.sites for p in experts.expert_stacks(site.base).values())
    longest = max(max(p.shape[1:]) for p in experts.expert_stacks(tree.sites[0].base).values())
    return longest if total <= EXACT_PARAMETERS else SKETCH_DIM


def _own_folder(checkpoint: str | os.PathLike) -> Path:
    """Where this process keeps its part."""
    return Path(checkpoint) / f"process-{process()}" if processes() > 1 else Path(checkpoint)


def _resume(checkpoint: str | os.PathLike | None, base: dict[str, Any]) -> ErrorMap | None:
    if checkpoint is None or not (_own_folder(checkpoint) / "error_map.json").is_file():
        return None
    found = ErrorMap.load(_own_folder(checkpoint))
    if found.base != base:
        raise ValueError(
            f"{_own_folder(checkpoint)} holds a map of another model, or one measured in another way: give another "
            "folder as checkpoint=, or remove it"
        )
    return found


def _batches(source: Iterator[Batch], max_tokens: int | None) -> Iterator[list[Batch]]:
    """Each batch, in pieces of some of its rows where there are fewer batches than folds."""
    first: list[Batch] = []
    tokens = 0
    for read in source:
        first.append(read)
        tokens += read.tokens
        if len(first) == FOLDS or (max_tokens is not None and tokens >= max_tokens):
            break
    pieces = -(-FOLDS // max(len(first), 1))
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


def _separate(
    model: nn.Module,
    tree: experts.Tree,
    read: Callable[..., Iterator[Batch]],
    domain: list[Batch],
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
        shapes = [spread(batch.real, texts_apart(batch.rows)).shape for batch in domain]
        texts, longest = sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        retain = sample_text(model, texts, longest, progress=progress)
    device = next(model.parameters()).device
    batches = list(read(retain, max_tokens))
    # a gate is fitted to all of the text, so every process fits the same ones
    domain, batches = everywhere(domain, device), everywhere(batches, device)
    return compare(model, tree, domain, batches, window, sketch_dim, progress)

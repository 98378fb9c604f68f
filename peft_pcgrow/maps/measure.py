"""Measure: run a corpus through a model and record per node how wrong its prediction was."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_pcgrow.architectures import experts, fingerprint
from peft_pcgrow.architectures.engines import inside, is_shared_out
from peft_pcgrow.architectures.find import Tree, adopt, check_in_memory, check_unhooked, find_to_grow
from peft_pcgrow.architectures.gathered import device_of, gathered_by_layer, to_gather
from peft_pcgrow.architectures.sharded import whole
from peft_pcgrow.gates.separation import Separation
from peft_pcgrow.gates.text_borders import spread, texts_apart
from peft_pcgrow.maps.batches import (
    IGNORED,
    Batch,
    check_causal,
    check_gradients,
    held_still,
    in_pieces,
    known_words,
    read_batches,
    settled_losses,
)
from peft_pcgrow.maps.corpus import whole_number
from peft_pcgrow.maps.distributed import (
    TextDigest,
    any_ready,
    check_same,
    everywhere,
    over_processes,
    process,
    processes,
    together,
    turn,
)
from peft_pcgrow.maps.error_map import FOLDS, ErrorMap
from peft_pcgrow.maps.error_probe import ErrorProbe
from peft_pcgrow.maps.fit_gates import compare
from peft_pcgrow.maps.gradient_sketch import GradientSketch
from peft_pcgrow.maps.resume import Checkpoint, weights_in_use
from peft_pcgrow.maps.sample import sample_text
from peft_pcgrow.settings import refuse_gone
from peft_pcgrow.settling.descent import Way
from peft_pcgrow.settling.layer_stack import LayerStack

# expert parameters up to which summed gradients are kept whole (4 folds in fp32: 1 GiB); beyond, sketched to this
EXACT_PARAMETERS = 2**26
SKETCH_DIM = 64
GONE = {"coherent": "it is called gradients="}
IN_STEP = (
    "the model is sharded by fully_shard, whose processes gather each layer together: settle='relax' runs layers as "
    "often as its text asks for, and retain='self' writes as much as each has text. Sweep, and give what `sample_text` "
    "wrote before the model was sharded"
)
OTHER_TEXT = "of other text, of more of it, or of the same in other batches"


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
    gradients: bool | None = None,
    sketch_dim: int | None = None,
    heldout: Any = None,
    retain: Any = None,
    window: int = 64,
    nodes: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
    **gone: NoReturn,
) -> ErrorMap:
    """The error map of a corpus: one sweep over it, nothing is trained.

    Every token counts alike: the error is that of the summed token losses, so the map's sums are the same however the
    corpus is cut into batches or padded. Batches go to the folds of `ErrorMap.gradient` in turn; fewer batches than
    folds are cut between their texts.

    Under torch.distributed (accelerate, torchrun) every process measures the batches it is given, if any, and gets the
    map of all of them together; all processes must call, with the same model. What `fully_shard` (FSDP2) has sharded is
    gathered a layer at a time, in the forward and on the way down.

    Args:
        model (nn.Module): a transformers causal LM with experts, in any floating dtype and on any device; with or
            without adapters.
        batches: the corpus: batches `[B, S]` of token ids, or mappings with `input_ids` and, if there are any,
            `attention_mask`, `labels` (-100 is ignored) and whatever else the model takes; or texts that are not
            batched yet: a tokenized `datasets.Dataset`, a Trainer's data set, token ids `[N, S]`, lists of token ids of
            any lengths, or, with a tokenizer, strings. Without labels every token that is not padding is predicted from
            those before it.
        max_tokens (int): stop after the batch that reaches this many tokens (of all processes), padding not counted.
        batch_size (int): texts a batch, of those that are not batched yet.
        tokenizer (callable): makes token ids of strings, or of a data set's column "text" (or its only one of strings).
        settle (str): how errors reach the nodes: "sweep" (exact); "relax" (in parallel hops); "direct" (the top error
            for the layers below: a forward pass and the output head, for a map that ranks nearly alike).
        settle_depth (int): of "direct", top decoder layers that the error is carried through exactly, 0 or more.
        settle_tol (float): of "relax", change of an error in a hop, as a share of its norm, at which it has settled, in
            (0, 1); the map holds how many hops each layer's tokens needed.
        gradients (bool): also sum the weight gradients, which `removable` needs. Costs the experts' weight gradients
            and the memory to hold them: whole up to 2^26 expert parameters, beyond that sketched. None: unless
            settle="direct".
        sketch_dim (int): longest hidden side of a gradient that is kept whole (see `GradientSketch`); None decides by
            size. Second moments of the retain text are kept alike.
        heldout: text of the same domain that nothing was, or will be, trained on, as a corpus like `batches`, at most
            `max_tokens` of it: the verdict is then about this text (see `diagnosis`). It is measured like the corpus,
            at the same cost a token, and kept apart (`ErrorMap.heldout`).
        retain: text whose behaviour must not change, as batches like the corpus's, at most `max_tokens` of it; or
            "self": the model writes as many texts itself (see `sample_text`). Then the map also holds branch gates and
            what retain text looks like at every node (`ErrorMap.separation`), for two more forward passes over all.
        window (int): tokens of context that a gate looks at, the token itself included; 0: all of the text so far.
        nodes (str): what is measured, "routed", "shared" or "dense" (see `find_experts`).
        checkpoint (path): folder that the map so far is saved in every `checkpoint_every` batches. What it holds
            already is not measured again: an interrupted measurement goes on, a finished one is returned. That takes
            the same weights, the same way of measuring and the same text up to there, which digests tell: one pass over
            the weights, and over the text.
        checkpoint_every (int): batches between two saves of it, 1 or more.
        progress (bool): show a progress bar on standard error.

    Raises:
        TypeError: no model, no corpus, or an argument that it does not have.
        ValueError: no experts in the model, or offloaded ones (unless gradients=False), no causal LM, a corpus without
            token ids or without one label token, words that the model does not know, too few texts to fit gates on, a
            number out of its range, an unknown way to settle, a checkpoint of other weights, text or options, or other
            models on other processes.
        FloatingPointError: a loss, or an error at a node, that is NaN or infinite.
        RuntimeError: another process failed.

    Example:
        >>> emap = measure_errors(model, batches, retain=retain, progress=False)
        >>> emap.tokens, emap.labels  # the first token of a text is not predicted
        (768, 736)
        >>> node = emap.top(1, by="error")[0]
        >>> node.error == float(emap.mass.max())
        True
    """
    refuse_gone("measure_errors", gone, GONE)
    model = inside(model)
    with together("measure_errors"):
        check_causal(model, shared_out=True)
        check_gradients(model)
        alike, engines = is_shared_out(model), to_gather(model, "measure_errors")
        if engines and (settle == "relax" or retain == "self"):
            raise ValueError(IN_STEP)
        tree = find_to_grow(model, nodes, "measure_errors", bool(engines))
        check_unhooked(tree)
        way = Way(settle, settle_depth, settle_tol)
        given = whole_numbers(max_tokens=max_tokens, sketch_dim=sketch_dim, window=window, batch_size=batch_size)
        given |= whole_numbers(checkpoint_every=checkpoint_every)
        window, limit = given["window"], given.get("max_tokens")
        if heldout is batches:
            raise ValueError("heldout is the corpus itself: give text of the same domain that nothing was trained on")
        if retain is batches:
            raise ValueError("retain is the corpus itself: give text whose behaviour must stay, or 'self'")
        if gradients is None:
            gradients = settle != "direct"
        if gradients:
            check_in_memory(tree)
        sketch_dim = given.get("sketch_dim", _sketch_dim(tree))
        base = fingerprint.describe_base(model, tree, whole) | {
            "sketch": sketch_dim if gradients else None,
            "settle": [settle, settle_depth] if settle == "direct" else settle,
        }
        run = {name: base[name] for name in ("sketch", "settle")} | {"nodes": tree.nodes}
        run["settle_tol"] = settle_tol if settle == "relax" else None
        run["weights"] = weights_in_use(model)
    asked = {"max_tokens": limit, "heldout": heldout is not None, "retain": retain is not None}
    check_same("measure_errors", {**run, **asked, "base": base})
    device = device_of(model)
    read = partial(read_batches, model, batch_size=given["batch_size"], tokenizer=tokenizer)
    limit = None if limit is None else -(-limit // turn(model)[1])
    saving = Checkpoint(_own_folder(checkpoint), given["checkpoint_every"], run)
    sketch = GradientSketch(sketch_dim) if gradients else None
    how = _How(model, adopt(tree), way, sketch, base, limit, progress, engines, alike)
    seen: list[Batch] | None = None if retain is None else []
    with together("measure_errors"):
        resumed = saving.load()
        before = resumed.heldout if resumed is not None else None
        if alike:
            known = [None if emap is None else emap.batches for emap in (resumed, before)]
            check_same("measure_errors", {"what its checkpoint holds (remove it to begin anew)": known})
        mine = _sweep(how, read(batches), resumed, saving, lambda emap: replace(emap, heldout=before), seen)
        if heldout is not None:
            held = _sweep(how, read(heldout), before, saving, lambda emap: replace(mine, heldout=emap))
            mine.heldout = before = held
        saving.save(replace(mine, heldout=before))
    emap = over_processes(mine, device, alike)
    for what, found in (("corpus", emap), ("held-out text", emap.heldout)):
        if found is not None and not found.labels:
            raise ValueError(
                f"the {what} has no label token ({found.tokens} tokens read): give batches with at least two tokens "
                "each, and labels that are not all -100"
            )
    if seen is not None:
        with held_still(model), gathered_by_layer(engines, how.tree.layers):
            emap.separation = _separate(how, read, seen, retain, window, sketch_dim)
    return emap


@dataclass(frozen=True)
class _How:
    """How a corpus is measured: arguments of `measure_errors`, read; whether all processes measure the same text."""

    model: nn.Module
    tree: Tree
    way: Way
    sketch: GradientSketch | None
    base: dict[str, Any]
    max_tokens: int | None
    progress: bool
    engines: list[Any]
    alike: bool

    def with_others(self, ready: bool) -> bool:
        """Whether there is a step to take: of this process, or where that gathers weights, of any."""
        return any_ready("measure_errors", ready) if self.engines else ready


def _sweep(
    how: _How,
    source: Iterator[Batch],
    resumed: ErrorMap | None,
    saving: Checkpoint,
    whole: Callable[[ErrorMap], ErrorMap],
    seen: list[Batch] | None = None,
) -> ErrorMap:
    """This process's map of a corpus.

    Args:
        resumed: what to go on from. whole: what to save for the map so far. seen: where to note the batches.
    """
    probe = ErrorProbe(how.tree, how.sketch, resumed, known_words(how.model))
    probe.again = how.sketch is not None or how.way.settle != "direct"
    known, text, done = resumed.batches if resumed is not None else 0, TextDigest(), 0

    def sofar() -> ErrorMap:
        emap = replace(probe.result(how.base, None), run={**saving.run, "read": text.hexdigest})
        wrong = [layer for layer, row in zip(emap.layers, emap.square, strict=True) if not row.isfinite().all()]
        if wrong:
            raise FloatingPointError(
                f"the loss is finite, but the errors of layers {wrong} are not: measure in float32, or look "
                "for what has no derivative there"
            )
        return emap

    options = {"desc": "measuring errors", "disable": not how.progress, "unit_scale": True}
    with (
        tqdm(total=how.max_tokens, unit="tok", **options) as bar,
        held_still(how.model),
        gathered_by_layer(how.engines, how.tree.layers) as probe.gather,
        probe.routing(),
        LayerStack(how.tree.layers, lambda: how.way, probe),
        settled_losses(how.model, partial(together, "measure_errors") if how.engines else nullcontext) as settle_batch,
    ):
        for number, pieces in enumerate(in_pieces(source, how.max_tokens, FOLDS), start=1):
            for piece in pieces:
                if seen is not None:
                    seen.append(piece)
                done += piece.tokens
                if saving.folder is not None or how.alike:
                    text.add(piece.inputs, piece.target)
                if how.alike:
                    text.check_alike()
                if resumed is not None and text.batches == known and text.hexdigest != resumed.run.get("read"):
                    raise saving.stale(OTHER_TEXT)
                if text.batches > known or saving.folder is None:
                    how.with_others(True)
                    probe.begin(piece.real, piece.target)
                    probe.loss += settle_batch(piece.inputs, piece.target)
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{probe.loss / max(probe.labels, 1):.3f}")
            if number % saving.every == 0 and text.batches > known:
                saving.save(whole(sofar()))
            if how.max_tokens is not None and done >= how.max_tokens:
                break
        if text.batches < known:
            raise saving.stale(OTHER_TEXT)
        nothing = torch.zeros(1, 2, dtype=torch.long, device=device_of(how.model))
        while how.with_others(False):
            probe.keep = nothing.flatten().bool()
            settle_batch({"input_ids": nothing}, nothing + IGNORED)
    return sofar()


def whole_numbers(**given: Any) -> dict[str, int]:
    """The numbers among the arguments of `measure_errors`, without those that are None; ValueError for what is none."""
    units = {"max_tokens": "tokens", "batch_size": "texts", "checkpoint_every": "batches", "sketch_dim": "kept rows"}
    units["window"] = "tokens (0: all of the text so far)"
    return {
        name: whole_number(name, given[name], unit, int(name != "window"))
        for name, unit in units.items()
        if given.get(name) is not None
    }


def _sketch_dim(tree: Tree) -> int:
    """The longest side of any expert's matrix if all gradients fit, else what they are sketched to."""
    total = sum(p.numel() for site in tree.sites for p in experts.expert_stacks(site.base).values())
    longest = max(max(p.shape[1:]) for p in experts.expert_stacks(tree.sites[0].base).values())
    return longest if total <= EXACT_PARAMETERS else SKETCH_DIM


def _own_folder(checkpoint: str | os.PathLike | None) -> Path | None:
    """Where this process keeps its part."""
    if checkpoint is None:
        return None
    return Path(checkpoint) / f"process-{process()}" if processes() > 1 else Path(checkpoint)


def _separate(
    how: _How,
    read: Callable[..., Iterator[Batch]],
    domain: list[Batch],
    retain: Any,
    window: int,
    sketch_dim: int,
) -> Separation:
    with together("measure_errors"):
        if isinstance(retain, str):
            if retain != "self":
                raise ValueError(f"retain must be batches of text, or 'self'; got {retain!r}")
            shapes = [spread(batch.real, texts_apart(batch.rows)).shape for batch in domain]
            texts, longest = sum(shape[0] for shape in shapes), max((shape[1] for shape in shapes), default=0)
            # other processes write other texts, if they may
            options = {"seed": turn(how.model)[0], "progress": how.progress}
            retain = sample_text(how.model, texts, longest, **options) if texts else []
        batches = list(read(retain, max_tokens=how.max_tokens))
    # a gate is fitted to all of the text, so every process fits the same ones
    domain, batches = everywhere(domain, how.model), everywhere(batches, how.model)
    return compare(how.model, how.tree, domain, batches, window, sketch_dim, how.progress)

"""Contrast a domain's text with the retain text: fit the branch gates, and measure them on text held out of the fit."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.find import Tree
from peft_pcgrow.gates.directions import MomentSketch
from peft_pcgrow.gates.gate import RATES, Gate, Rows, discriminant, fit_law, unknown_gate
from peft_pcgrow.gates.separation import Separation
from peft_pcgrow.gates.text_borders import spread, texts_apart
from peft_pcgrow.gates.text_position import entering, modules_inside
from peft_pcgrow.maps.batches import Batch, moved
from peft_pcgrow.maps.distributed import summed
from peft_pcgrow.maps.gate_moments import FeatureMoments, InputMoments, Key
from peft_pcgrow.maps.newborns import nodes_of

# of so many texts that follow each other one is held out to set thresholds on
HELD_OUT = 4
# thresholds lie above the evidence that sets them by this share of the largest
MARGIN = 5e-6
# of the retain tokens, the share that another adapter's newborns compute from which on it is what these learned, which
# is to be kept as it is: by mistake they take less
LEARNED = 0.05
# called for every gate of every batch, texts in rows of their own: input [B, S, H], the nodes that compute its rows
# [B, S, K] (an expert, or E + n: see `GrownExperts.nodes_of`) if it enters experts, rows, texts held out [B]
See = Callable[[Key, Tensor, Tensor | None, Rows, Tensor], None]


def compare(
    model: nn.Module,
    tree: Tree,
    domain: list[Batch],
    retain: list[Batch],
    window: int,
    sketch_dim: int | None,
    progress: bool,
    fitted: Collection[str] = (),
) -> Separation:
    """Two forward passes over both corpora: one for the directions, one for thresholds and rates.

    Args:
        domain, retain: text. fitted: adapters that the gates are for, if they are there already.
        window: tokens of context that a gate looks at; 0: all there are.
        sketch_dim: longest side of a second moment that is kept whole; None: there are none, for gates alone.

    Raises:
        ValueError: fewer than `HELD_OUT` texts in either corpus, or layers that did not run on it.
    """
    for name, batches in (("domain", domain), ("retain", retain)):
        texts = sum(map(_texts, batches))
        if texts < HELD_OUT:
            raise ValueError(
                f"the {name} batches hold {texts} texts, and a branch gate needs at least {HELD_OUT}: to be fitted on "
                "some and measured on others; give more text, or cut it into shorter rows"
            )
        if not any(bool(batch.real.any()) for batch in batches):
            raise ValueError(
                f"the {name} batches are padding alone: their attention_mask leaves no token to fit gates on"
            )
    moments = {name: FeatureMoments(window, 2 * len(tree.sites)) for name in ("domain", "retain")}
    inputs = None if sketch_dim is None else InputMoments(tree, MomentSketch(sketch_dim))
    scored: dict[str, _Scores] = {}
    bar = tqdm(total=2 * (len(domain) + len(retain)), unit="batch", desc="fitting gates", disable=not progress)
    with bar:
        _run(model, tree, domain, moments["domain"], bar)
        theirs = [moments["retain"], *([] if inputs is None else [inputs])]
        _run(model, tree, retain, lambda *seen: [each(*seen) for each in theirs], bar)
        spared = moments["retain"].held
        for name, seen in moments.items():
            if still := [site.layer for row, site in enumerate(tree.sites) if ("gate", row) not in seen.held]:
                raise ValueError(
                    f"layers {still} did not run on the {name} text, so that their gates cannot be fitted (layers that "
                    "attend to images want some): measure without retain=, and deepen"
                )
        directions = {key: discriminant(ours, spared[key]) for key, ours in moments["domain"].held.items()}
        for name, batches in (("domain", domain), ("retain", retain)):
            scored[name] = _Scores(tree, directions, window, fitted)
            _run(model, tree, batches, scored[name], bar)
    gates = {
        key: Gate(direction, fit_law(scored["domain"].fitted[key], scored["retain"].fitted[key], window), window)
        for key, direction in directions.items()
    }
    limits: dict[Key, Tensor] = {}
    shares: dict[str, list[Tensor]] = {"domain": [], "retain": []}
    for key, gate in gates.items():
        passed = {"retain": scored["retain"].evidence(key, gate)}
        limits[key] = _limits(passed["retain"], scored["retain"].places(key), scored["retain"].taken(key))
        if key[0] == "gate":
            passed["domain"] = scored["domain"].evidence(key, gate)
            for name, held in scored.items():
                shares[name].append(_passing(passed[name], held.nodes(key), limits[key], len(held.routed[key[1]])))
    tables = {"recall": shares["domain"], "false_positive": shares["retain"]}
    tables |= {f"{name}_rows": held.routed for name, held in scored.items()}
    experts_at = [site.experts for site in tree.sites]
    newborn = {n: torch.cat([t[e:] for t, e in zip(ts, experts_at, strict=True)]) for n, ts in tables.items()}
    moment, trace = ({}, {}) if inputs is None else (inputs.moment, inputs.trace)
    if is_shared_out(model):
        moment, trace = (summed(held, next(model.parameters()).device) for held in (moment, trace))
    every = range(len(tree.sites))
    unknown, never = unknown_gate(len(directions["gate", 0]), window)
    entry = [gates.get(("entry", row), unknown) for row in every]
    return Separation(
        direction=torch.stack([directions["gate", row] for row in every]),
        law=torch.stack([gates["gate", row].law for row in every]),
        threshold=torch.stack([limits["gate", row] for row in every]),
        entry={
            "direction": torch.stack([gate.direction for gate in entry]),
            "law": torch.stack([gate.law for gate in entry]),
            "threshold": torch.stack([limits.get(("entry", row), never) for row in every]),
        },
        **{n: torch.stack([t[:e] for t, e in zip(ts, experts_at, strict=True)]) for n, ts in tables.items()},
        newborns=newborn if len(newborn["domain_rows"]) else {},
        moment={name: each.cpu() for name, each in moment.items()},
        trace={name: each.cpu() for name, each in trace.items()},
        facts={
            "window": window,
            "sketch": sketch_dim,
            "domain_tokens": scored["domain"].tokens,
            "retain_tokens": scored["retain"].tokens,
        },
    )


def _limits(evidence: Tensor, place: Tensor, taken: Sequence[Tensor]) -> Tensor:
    """The evidence that at most each of `RATES` of the retain tokens lies above, `[F]`: of all of them, and of each
    stage of a text that half of the texts reach; and the same of those that each other adapter's newborns compute, if
    these learned them.

    By all of them alone, a domain that is easily told would have limits far below zero, where the first tokens of any
    text still are: short texts would pass whole. And what earlier newborns learned stands out from other text much as
    the new domain does: newborns of newborns would take far more than the rate of it.

    Args:
        evidence: `[N]`. place: of each token in its text, from 1, `[N]`. taken: whether an adapter's newborns compute
            it, of each other adapter, `[N]`.
    """
    stages = [place > 0]
    texts = int((place == 1).sum())
    for first in (2**i for i in range(int(place.max()).bit_length())):
        if 2 * int((place == first).sum()) < texts:
            break
        stages.append((place >= first) & (place < 2 * first))
    limits = [_above(evidence[stage], RATES) for stage in stages]
    for mine in (each for each in taken if each.float().mean() > LEARNED):
        for learned in (evidence[stage & mine] for stage in stages):
            # rates that so few tokens tell, and stricter ones no less strict
            if told := [rate for rate in RATES if rate * len(learned) >= 1]:
                spared = _above(learned, told)
                limits.append(torch.cat([spared, spared[-1:].expand(len(RATES) - len(told))]))
    # some token lies on a limit, and its like elsewhere, first tokens above all, must not be told by rounding
    return torch.stack(limits).amax(dim=0) + MARGIN * evidence.abs().max()


def _above(evidence: Tensor, rates: Sequence[float]) -> Tensor:
    """What at most each of these shares of it lies above, `[len(rates)]`."""
    ordered = evidence.sort().values
    return ordered[[len(ordered) - 1 - int(rate * len(ordered)) for rate in rates]]


def _passing(evidence: Tensor, index: Tensor, limits: Tensor, experts_here: int) -> Tensor:
    """Share of each node's rows whose evidence `[N]` is above each limit, `[E, F]`; all rows' where a node has none."""
    above = (evidence.unsqueeze(1) > limits).float()
    rows = torch.zeros(experts_here, device="cpu")
    passed = torch.zeros(experts_here, len(limits), device="cpu")
    for choice in index.mT.long():
        assigned = choice < experts_here
        rows.index_add_(0, choice[assigned], torch.ones(int(assigned.sum()), device="cpu"))
        passed.index_add_(0, choice[assigned], above[assigned])
    return torch.where(rows.unsqueeze(1) > 0, passed / rows.clamp_min(1).unsqueeze(1), above.mean(0))


@torch.no_grad()
def _run(model: nn.Module, tree: Tree, batches: Iterable[Batch], see: Callable, bar: tqdm) -> None:
    device = next(model.parameters()).device
    texts = 0
    for batch in batches:
        count = _texts(batch)
        held = torch.tensor([is_held_out(number) for number in range(texts, texts + count)], device="cpu")
        texts += count
        with _watched(tree, see, held, batch.rows):
            model(**moved(batch.inputs, device), use_cache=False)
        bar.update()


def is_held_out(number: int) -> bool:
    """Whether the text of this place in a corpus is: which of four is drawn, so that corpora that come in turn are all
    fitted and measured on."""
    return random.Random(number // HELD_OUT).randrange(HELD_OUT) == number % HELD_OUT


def _texts(batch: Batch) -> int:
    apart = texts_apart(batch.rows)
    return len(batch.real) if apart is None else int(apart[..., 0].max()) + 1


@contextmanager
def _watched(tree: Tree, see: See, held: Tensor, rows: Rows) -> Iterator[None]:
    apart = texts_apart(rows)
    entered: set[int] = set()

    def seen(key: Key, x: Tensor, nodes: Tensor | None) -> None:
        own = None if apart is None else apart.to(x.device)

        def texts(values: Tensor) -> Tensor:
            return spread(values.view(*rows.real.shape, -1), own)

        real = texts(rows.real.to(x.device)).squeeze(-1)
        see(key, texts(x.detach()), None if nodes is None else texts(nodes), Rows(real), held)

    def routed(row: int, module: nn.Module, args: tuple) -> None:
        seen(("gate", row), args[0], nodes_of(module, args))

    def inside(row: int, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = entering(args, kwargs)
        # of a layer that attends more than once, the first time
        if x is not None and x.shape[:2] == rows.real.shape and row not in entered:
            entered.add(row)
            seen(("entry", row), x, None)

    watched = [(site.module, partial(routed, row), False) for row, site in enumerate(tree.sites)]
    for row, site in enumerate(tree.sites):
        watched += [(child, partial(inside, row), True) for child in modules_inside(site.decoder_layer)]
    try:
        for module, hook, with_kwargs in watched:
            module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
        yield
    finally:
        # by what was to be watched: an interrupt may have come before a handle was at hand
        for module, hook, _ in watched:
            for key in [key for key, held in module._forward_pre_hooks.items() if held is hook]:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


class _Scores:
    """Scores of all texts under fitted directions, apart for those that the gates were fitted on and the others."""

    def __init__(self, tree: Tree, directions: dict[Key, Tensor], window: int, fitted: Collection[str]):
        self.gates = {key: Gate(v, torch.zeros(4, device="cpu"), window) for key, v in directions.items()}
        self.fitted: dict[Key, list[tuple[Tensor, Tensor]]] = {key: [] for key in directions}
        self.held: dict[Key, list[tuple[Tensor, Rows, Tensor | None]]] = {key: [] for key in directions}
        # of each other adapter, its nodes, and those that take rows from these and are fitted
        self.others: list[dict[str, list[int]]] = [{} for _ in tree.sites]
        for site, others in zip(tree.sites, self.others, strict=True):
            for n, (name, donor) in enumerate(site.newborns):
                whose: str | None = name
                while whose in fitted:
                    whose = site.module.parent_of(whose, donor)  # type: ignore[operator,union-attr]
                if whose is not None:
                    others.setdefault(whose, []).append(site.experts + n)
        counts = [site.experts + len(site.newborns) for site in tree.sites]
        self.routed = [torch.zeros(nodes, dtype=torch.float64, device="cpu") for nodes in counts]
        self.tokens = 0

    def __call__(self, key: Key, x: Tensor, index: Tensor | None, rows: Rows, held: Tensor) -> None:
        gate = self.gates[key]
        scores = Gate(gate.direction.to(x.device), gate.law, gate.window).scores(x).cpu()
        real = rows.real.cpu()
        if index is not None:
            index = index.cpu()
            total = len(self.routed[key[1]])
            self.routed[key[1]] += torch.bincount(index[real].flatten(), minlength=total)[:total]
            index = index[held].to(torch.int16)
        if key == ("gate", 0):
            self.tokens += int(real.sum())
        if not bool(held.all()):
            self.fitted[key].append((scores[~held], real[~held]))
        if bool(held.any()):
            self.held[key].append((scores[held], Rows(real[held]), index))

    def evidence(self, key: Key, gate: Gate) -> Tensor:
        """Evidence at each held-out token, `[N]`."""
        return torch.cat([gate.evidence(scores, rows)[0][rows.real] for scores, rows, _ in self.held[key]])

    def places(self, key: Key) -> Tensor:
        """Of each held-out token in its text, from 1, `[N]`."""
        return torch.cat([rows.real.cumsum(1)[rows.real] for _, rows, _ in self.held[key]])

    def taken(self, key: Key) -> list[Tensor]:
        """Whether newborns of each other adapter compute each of these in their layer, `[N]`."""
        others = self.others[key[1]]
        if not others:
            return []
        nodes, tokens = self.nodes(("gate", key[1])), sum(int(rows.real.sum()) for _, rows, _ in self.held[key])
        if len(nodes) != tokens:  # an entry gate may not have seen all batches
            return []
        held = (torch.tensor(mine, dtype=nodes.dtype, device="cpu") for mine in others.values())
        return [torch.isin(nodes, mine).any(dim=1) for mine in held]

    def nodes(self, key: Key) -> Tensor:
        """The experts that each of these was routed to, `[N, K]`."""
        return torch.cat([index[rows.real] for _, rows, index in self.held[key] if index is not None])

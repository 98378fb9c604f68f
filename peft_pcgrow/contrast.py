"""Contrast a domain's text with the retain text: fit the branch gates, and measure them on text held out of the fit."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_pcgrow import experts
from peft_pcgrow.batches import Batch, moved
from peft_pcgrow.borders import spread, texts_apart
from peft_pcgrow.gate import ENOUGH, RATES, Gate, Moments, Rows, discriminant, fit_law, totals, window_means
from peft_pcgrow.newborns import nodes_of
from peft_pcgrow.protect import MomentSketch
from peft_pcgrow.separation import Separation

# one text in so many is held out to set thresholds on
HELD_OUT = 4
# called for every layer of every batch, texts in rows of their own: row of the site, input [B, S, H], the nodes that
# compute its rows [B, S, K] (an expert, or E + n: see `PCGrowExperts.nodes_of`), rows, texts held out [B]
See = Callable[[int, Tensor, Tensor, Rows, Tensor], None]


def compare(
    model: nn.Module,
    tree: experts.Tree,
    domain: list[Batch],
    retain: list[Batch],
    window: int,
    sketch_dim: int,
    progress: bool,
) -> Separation:
    """Two forward passes over both corpora: one for the directions, one for thresholds and rates.

    Args:
        domain, retain: text.
        window: tokens of context that a gate looks at; 0: all there are.
        sketch_dim: longest side of a second moment that is kept whole.

    Raises:
        ValueError: fewer than `HELD_OUT` texts in either corpus.
    """
    for name, batches in (("domain", domain), ("retain", retain)):
        texts = sum(map(_texts, batches))
        if texts < HELD_OUT:
            raise ValueError(
                f"the {name} batches hold {texts} texts, and a branch gate needs at least {HELD_OUT}: to be fitted on "
                "some and measured on others; give more text, or cut it into shorter rows"
            )
    moments = {name: _FeatureMoments(tree, window) for name in ("domain", "retain")}
    inputs = _InputMoments(tree, MomentSketch(sketch_dim))
    scored: dict[str, _Scores] = {}
    bar = tqdm(total=2 * (len(domain) + len(retain)), unit="batch", desc="fitting gates", disable=not progress)
    with bar:
        _run(model, tree, domain, moments["domain"], bar)
        _run(model, tree, retain, lambda *seen: (moments["retain"](*seen), inputs(*seen)), bar)
        both = zip(moments["domain"].sites, moments["retain"].sites, strict=True)
        directions = torch.stack([discriminant(ours, theirs) for ours, theirs in both])
        for name, batches in (("domain", domain), ("retain", retain)):
            scored[name] = _Scores(tree, directions, window)
            _run(model, tree, batches, scored[name], bar)
    fitted = zip(scored["domain"].fitted, scored["retain"].fitted, strict=True)
    laws = torch.stack([fit_law(texts, others, window) for texts, others in fitted])
    threshold, recall, false_positive = [], [], []
    for row in range(len(tree.sites)):
        gate = Gate(directions[row], laws[row], window)
        passed = {name: held.evidence(row, gate) for name, held in scored.items()}
        # the rate of what lies above each is at most what is allowed
        ordered = passed["retain"][0].sort().values
        limits = ordered[[len(ordered) - 1 - int(rate * len(ordered)) for rate in RATES]]
        threshold.append(limits)
        nodes = len(scored["domain"].routed[row])
        recall.append(_passing(*passed["domain"], limits, nodes))
        false_positive.append(_passing(*passed["retain"], limits, nodes))
    tables = {"recall": recall, "false_positive": false_positive}
    tables |= {f"{name}_rows": held.routed for name, held in scored.items()}
    experts_at = [site.experts for site in tree.sites]
    newborn = {n: torch.cat([t[e:] for t, e in zip(ts, experts_at, strict=True)]) for n, ts in tables.items()}
    return Separation(
        direction=directions,
        law=laws,
        threshold=torch.stack(threshold),
        **{n: torch.stack([t[:e] for t, e in zip(ts, experts_at, strict=True)]) for n, ts in tables.items()},
        newborns=newborn if len(newborn["domain_rows"]) else {},
        moment=inputs.moment,
        trace=inputs.trace,
        facts={
            "window": window,
            "sketch": sketch_dim,
            "domain_tokens": scored["domain"].tokens,
            "retain_tokens": scored["retain"].tokens,
        },
    )


def _passing(evidence: Tensor, index: Tensor, limits: Tensor, experts_here: int) -> Tensor:
    """Share of each node's rows whose evidence `[N]` is above each limit, `[E, F]`; all rows' where a node has none."""
    above = (evidence.unsqueeze(1) > limits).float()
    rows = torch.zeros(experts_here, device="cpu")
    passed = torch.zeros(experts_here, len(limits), device="cpu")
    for choice in index.mT.long():
        somebodys = choice < experts_here
        rows.index_add_(0, choice[somebodys], torch.ones(int(somebodys.sum()), device="cpu"))
        passed.index_add_(0, choice[somebodys], above[somebodys])
    return torch.where(rows.unsqueeze(1) > 0, passed / rows.clamp_min(1).unsqueeze(1), above.mean(0))


@torch.no_grad()
def _run(model: nn.Module, tree: experts.Tree, batches: Iterable[Batch], see: Callable, bar: tqdm) -> None:
    device = next(model.parameters()).device
    texts = 0
    for batch in batches:
        count = _texts(batch)
        held = torch.arange(texts, texts + count, device="cpu") % HELD_OUT == HELD_OUT - 1
        texts += count
        with _watched(tree, see, held, batch.rows):
            model(**moved(batch.inputs, device), use_cache=False)
        bar.update()


def _texts(batch: Batch) -> int:
    apart = texts_apart(batch.rows)
    return len(batch.real) if apart is None else int(apart[..., 0].max()) + 1


@contextmanager
def _watched(tree: experts.Tree, see: See, held: Tensor, rows: Rows) -> Iterator[None]:
    handles = []
    apart = texts_apart(rows)
    for row, site in enumerate(tree.sites):

        def routed(module: nn.Module, args: tuple, row=row) -> None:
            device = args[0].device
            own = None if apart is None else apart.to(device)
            x, index, real = (
                spread(values.view(*rows.real.shape, -1), own)
                for values in (args[0].detach(), nodes_of(module, args), rows.real.to(device))
            )
            see(row, x, index, Rows(real.squeeze(-1)), held)

        handles.append(site.module.register_forward_pre_hook(routed))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _FeatureMoments:
    """Moments of the running means of the texts that gates are fitted on."""

    def __init__(self, tree: experts.Tree, window: int):
        self.window = window
        self.tree = tree
        self.sites: list[Moments] = []

    def __call__(self, row: int, x: Tensor, index: Tensor, rows: Rows, held: Tensor) -> None:
        if row == len(self.sites):
            self.sites.append(Moments(x.shape[-1]))
        if bool(held.all()):
            return
        mean, n = window_means(totals(x, rows), rows, self.window)
        use = rows.real & (n >= n.amax(dim=1, keepdim=True).clamp_max(ENOUGH)) & ~held.to(x.device).unsqueeze(1)
        self.sites[row].add(mean[use])


class _InputMoments:
    """Second moments of what enters each stack of each expert."""

    def __init__(self, tree: experts.Tree, sketch: MomentSketch):
        self.tree, self.sketch = tree, sketch
        self.moment: dict[str, Tensor] = {}
        self.trace: dict[str, Tensor] = {}

    def __call__(self, row: int, x: Tensor, index: Tensor, rows: Rows, held: Tensor) -> None:
        site = self.tree.sites[row]
        tokens, chosen = x[rows.real], index[rows.real]
        for n, (_, donor) in enumerate(getattr(site.module, "newborns", ())):  # type: ignore
            chosen = chosen.masked_fill(chosen == site.experts + n, donor)
        for expert in range(site.experts):
            mine = tokens[(chosen == expert).any(dim=1)]
            if not len(mine):
                continue
            for name, entering in experts.stack_inputs(site.base, mine, expert).items():
                if name not in self.moment:
                    width = entering.shape[1]
                    shape = len(self.tree.sites), site.experts
                    self.moment[name] = torch.zeros(*shape, width, min(width, self.sketch.dim), device="cpu")
                    self.trace[name] = torch.zeros(shape, dtype=torch.float64, device="cpu")
                self.moment[name][row, expert] += self.sketch(entering).cpu()
                self.trace[name][row, expert] += float(entering.double().square().sum())


class _Scores:
    """Scores of all texts under fitted directions, apart for those that the gates were fitted on and the others."""

    def __init__(self, tree: experts.Tree, directions: Tensor, window: int):
        self.gates = [Gate(direction, torch.zeros(4, device="cpu"), window) for direction in directions]
        self.fitted: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tree.sites]
        self.held: list[list[tuple[Tensor, Rows, Tensor]]] = [[] for _ in tree.sites]
        counts = [site.experts + len(getattr(site.module, "newborns", ())) for site in tree.sites]
        self.routed = [torch.zeros(nodes, dtype=torch.float64, device="cpu") for nodes in counts]
        self.tokens = 0

    def __call__(self, row: int, x: Tensor, index: Tensor, rows: Rows, held: Tensor) -> None:
        gate = self.gates[row]
        scores = Gate(gate.direction.to(x.device), gate.law, gate.window).scores(x).cpu()
        real = rows.real.cpu()
        index = index.cpu()
        total = len(self.routed[row])
        self.routed[row] += torch.bincount(index[real].flatten(), minlength=total)[:total]
        if row == 0:
            self.tokens += int(real.sum())
        if not bool(held.all()):
            self.fitted[row].append((scores[~held], real[~held]))
        if bool(held.any()):
            self.held[row].append((scores[held], Rows(real[held]), index[held].to(torch.int16)))

    def evidence(self, row: int, gate: Gate) -> tuple[Tensor, Tensor]:
        """Evidence at each held-out token `[N]`, and the experts it was routed to `[N, K]`."""
        found = [
            (gate.evidence(scores, rows)[0][rows.real], index[rows.real]) for scores, rows, index in self.held[row]
        ]
        return torch.cat([evidence for evidence, _ in found]), torch.cat([index for _, index in found])

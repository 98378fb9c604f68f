"""The verdict on a domain, in one word.

    covered       nothing to do: no step would help
    concentrated  few nodes hold what could be recovered: deepen those
    distributed   it is spread over many nodes: spawn, or grow a larger share
    memorised     held-out text is predicted worse than the corpus, and steps on the corpus will not change that: more
                  text is needed, not more training on this
    unlearned     the text is predicted no better than by how often its words occur: an untrained model, or one that
                  knows nothing of the domain; the errors do not say where to grow

Only text that nothing was trained on tells these apart for sure: text that was memorised looks covered.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# a corpus is covered if a Muon step of this size at every node would remove at most this share of its loss. Text that a
# model was trained on measured 0.3 to 0.8 %, text that it had never seen 3.6 % (see RESULTS.md)
COVERED_STEP, COVERED_REMOVABLE = 0.02, 0.005
# without weight gradients: below this share of a uniform guess's loss
COVERED_SHARE = 0.1
# what a node could recover is concentrated if half of it sits in at most this share of the nodes: one damaged expert
# measured 1 to 3 % of the nodes, a new domain 7 %
CONCENTRATED_RECOVERABLE = 0.05
# without weight gradients, of the error mass; a flat map needs half of the nodes
CONCENTRATED_SHARE = 0.2
# memorised: the corpus is covered and held-out text has this many times its loss, or it has so many times more that
# steps on it do not reach that. Measured on the embedded model: text never seen 1.02, text trained on 1.27 (but
# covered, held out too), 16 windows after 7 passes 3.6, after 15 passes 21; a step would still remove 0.5 % and 2.8 %
# of the loss on those 16 themselves
MORE_LOSS, FAR_MORE_LOSS = 1.1, 1.5
CORPUS, HELD_OUT = "the corpus itself, which may have been trained on", "held-out text"


@dataclass(frozen=True)
class Diagnosis:
    """A verdict and the numbers that it was decided on.

    Attributes:
        verdict: "covered", "concentrated", "distributed", "memorised" or "unlearned" (see the module).
        loss: mean loss of the text that the verdict is about, nats per label token.
        statistic: what was compared with `covered_below`, in words.
        value: what that is.
        covered_below: value up to which the text counts as covered.
        concentration: smallest share of all nodes that holds half of what could be recovered (without gradients: half
            of the error mass).
        concentrated_below: share up to which it counts as concentrated.
        nodes: the (layer, expert) pairs of `concentration`, most first.
        text: what the verdict is about, `HELD_OUT` or `CORPUS`.
        context_free: loss of predicting that text by how often its words occur, nats per label token; None: not known.
        corpus_loss: mean loss of the corpus, nats per label token, if the verdict is about held-out text.

    Example:
        >>> diagnosis = measure_errors(model, batches, progress=False).diagnosis
        >>> diagnosis.verdict, diagnosis.loss > diagnosis.context_free  # random weights know less than word counts
        ('unlearned', True)
    """

    verdict: str
    loss: float
    statistic: str
    value: float
    covered_below: float
    concentration: float
    concentrated_below: float
    nodes: tuple[tuple[int, int], ...] = ()
    text: str = CORPUS
    context_free: float | None = None
    corpus_loss: float | None = None

    def __str__(self) -> str:
        beside = [f"of the corpus {self.corpus_loss:.3f}"] if self.corpus_loss is not None else []
        if self.context_free is not None:
            beside.append(f"by word frequencies {self.context_free:.3f}")
        others = f" ({', '.join(beside)})" if beside else ""
        return (
            f"{self.verdict}, of {self.text}: loss {self.loss:.3f} nats/token{others}, {self.statistic} "
            f"{self.value:.3g} (covered up to {self.covered_below:.3g}); half of it sits in "
            f"{self.concentration:.1%} of the nodes (concentrated up to {self.concentrated_below:.0%})"
        )


def judge(
    layers: tuple[int, ...],
    loss: float,
    vocabulary: int,
    mass: Tensor,
    recoverable: Tensor | None = None,
    removed: float | None = None,
    covered: float | None = None,
    concentrated_below: float | None = None,
    frequencies: float | None = None,
) -> Diagnosis:
    """Decide on a text.

    Unlearned if the loss is no less than word frequencies give, or, where they are not known, a uniform guess. Else,
    with weight gradients: covered if a Muon step of `COVERED_STEP` at every node removes at most `COVERED_REMOVABLE` of
    the loss, to first order; concentrated if half of what the nodes could recover sits in at most
    `CONCENTRATED_RECOVERABLE` of them. Without: covered if the loss is at most `COVERED_SHARE` of a uniform guess's,
    concentrated if half of the error mass sits in at most `CONCENTRATED_SHARE` of the nodes.

    Args:
        layers: decoder layer of each row. loss: nats per label token. mass: error mass, `[L, E]`.
        recoverable: `[L, E]`, removable^2 / rows: at its best length a step recovers slope^2 / (2 curvature), and
            curvature grows with the node's rows.
        removed: nats per label token that a step of unit spectral norm at every node removes.
        covered: loss of text that counts as covered, nats per label token, instead of the rules above.
        concentrated_below: instead of the shares above. frequencies: loss of a prediction without context.
    """
    if recoverable is not None and removed is not None:
        statistic = f"share of it that a step of {COVERED_STEP} removes"
        value, limit = removed * COVERED_STEP / max(loss, 1e-12), COVERED_REMOVABLE
        weighed, share = recoverable, CONCENTRATED_RECOVERABLE
    else:
        statistic, value, limit = "loss", loss, COVERED_SHARE * math.log(vocabulary)
        weighed, share = mass, CONCENTRATED_SHARE
    if covered is not None:
        statistic, value, limit = "loss", loss, covered
    ordered, order = torch.sort(weighed.flatten(), descending=True, stable=True)
    total = ordered.sum()
    half = int((ordered.cumsum(0) < total / 2).sum()) + 1 if total > 0 else ordered.numel()
    held, experts = half / ordered.numel(), mass.shape[1]
    threshold = share if concentrated_below is None else concentrated_below
    chance = math.log(vocabulary) if frequencies is None else frequencies
    verdict = "covered" if value <= limit else "concentrated" if held <= threshold else "distributed"
    if loss >= chance > 0 and covered is None:
        verdict = "unlearned"
    nodes = tuple((layers[i // experts], i % experts) for i in order[:half].tolist()) if total > 0 else ()
    return Diagnosis(verdict, loss, statistic, value, limit, held, threshold, nodes, context_free=frequencies)


def on_heldout(held: Diagnosis, corpus: Diagnosis) -> Diagnosis:
    """The verdict on a domain from those on held-out text and on the corpus itself."""
    more = MORE_LOSS if corpus.value <= corpus.covered_below else FAR_MORE_LOSS
    memorised = held.loss > more * corpus.loss
    open_still = held.verdict in ("concentrated", "distributed", "unlearned")
    verdict = "memorised" if memorised and open_still else held.verdict
    return replace(held, verdict=verdict, text=HELD_OUT, corpus_loss=corpus.loss)


def context_free(words: Tensor) -> float:
    """Loss of predicting each label by how often its word is among the other labels, nats per label token.

    A word that occurs once is new among the others: it has its share of the labels that do (Good & Turing), spread over
    the vocabulary. Without leaving the label out, a short text would be predicted by itself.

    Args:
        words: how often each word is a label, `[V]`.
    """
    total = float(words.sum())
    if total < 2:
        return math.log(max(len(words), 1))
    again = words[words > 1].double()
    new = float((words == 1).sum()) / total
    known = again * ((again - 1) / (total - 1) * (1 - new)).clamp_min(torch.finfo(torch.float64).tiny).log()
    loss = -float(known.sum()) / total - (new * math.log(new / len(words)) if new else 0.0)
    return min(loss, math.log(len(words)))

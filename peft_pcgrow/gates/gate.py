"""The branch gate: which of a donor's tokens belong to the domain, told from the text up to each of them.

A token alone seldom gives its domain away; the text around it does. With x_t a layer's input to its experts, the gate
scores s_t = v . x_t and averages the last W scores, up to and with t itself:

    m_t = mean of the last n_t = min(t, W) scores            v = (pooled covariance of the means)^-1 (mu_1 - mu_0)

v is the shared-covariance discriminant (Fisher 1936) of such means. A mean of n tokens of one text scatters by tau^2
between texts and by sigma^2 / n within one (a random-effects model), so that the log-likelihood ratio of domain to
retain is

    evidence_t = (m_t - middle) (mu_1 - mu_0) / (tau^2 + sigma^2 / n_t)

little for the first tokens of a text, and comparable from then on. W = 1 is a gate that looks at single tokens. A text
may change its topic, which W tokens tell late: where the last `LATELY` of them are certain, evidence is no less on
their side than theirs alone.
Shapes: B texts of S tokens, P tokens of them seen in earlier calls, H hidden.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pcgrow_kernels.gate_score import gate_score
from pcgrow_kernels.window_mean import totals, window_means

# false-positive rates that thresholds are kept for, from a half down; between them, their logarithm is interpolated
RATES = tuple(10.0 ** (-i / 12) for i in range(4, 49))
# the rate that may be asked for, at most: less than a step of the table away
MOST = 0.5
# added to the covariance of the means, relative to their mean variance
GATE_RIDGE = 1e-3
# means of fewer tokens say too little about a text to fit the direction on
ENOUGH = 8
# share of the scatter between windows that is put down to the texts, at least
LEAST_BETWEEN = 0.05
# tokens at the end of a longer window that can decide by themselves, and how certain they have to be, in nats. Of the
# tokens 9 to 16 after German begins in a text 79, 75 and 64 % pass at 3, 5 and 10, and 1 % without this (SmolLM2);
# where domains are hard to tell 3 costs 1 % of their tokens, 5 a third of that
LATELY, CERTAIN = 16, 5.0


@dataclass(frozen=True)
class Rows:
    """How the tokens of one call stand in their texts.

    Attributes:
        real: which are not padding, `[B, S]` bool.
        start: place in the row of the first token of each token's own text, `[B, S]`; None: rows hold one text each.
        past: running totals of the tokens before these, `[B, P, 2]`; None: there are none.
        whole: whether none is known to be padding.
    """

    real: Tensor
    start: Tensor | None = None
    past: Tensor | None = None
    whole: bool = False


@dataclass(frozen=True)
class Gate:
    """One layer's gate.

    Attributes:
        direction: v, `[H]` fp32.
        law: middle, mu_1 - mu_0, tau^2 and sigma^2 of the scores, `[4]` fp32.
        window: W; 0 stands for all of the text so far.
    """

    direction: Tensor
    law: Tensor
    window: int

    @cached_property
    def numbers(self) -> tuple[Tensor, ...]:
        """The law's, in fp64."""
        return self.law.double().unbind()

    def scores(self, x: Tensor) -> Tensor:
        """`[..., H]` -> `[...]`, in fp32 whatever the model and autocast compute in."""
        return gate_score(x, self.direction)

    def evidence(self, scores: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The log-likelihood ratio of domain to retain at each token, `[B, S]` fp32 in nats, and the running totals up
        to it, `[B, P + S, 2]`, that the next call needs as `rows.past`."""
        running = totals(scores.unsqueeze(-1), None if rows.whole else rows.real, rows.past)
        found = self._evidence(running, rows, self.window)
        if self.window == 0 or self.window > LATELY:
            lately = self._evidence(running, rows, LATELY)
            found = torch.where(lately > CERTAIN, torch.maximum(found, lately), found)
            found = torch.where(lately < -CERTAIN, torch.minimum(found, lately), found)
        return found.float(), running

    def _evidence(self, running: Tensor, rows: Rows, window: int) -> Tensor:
        mean, n = window_means(running, rows.real.shape[1], window, rows.start)
        middle, distance, between, within = self.numbers
        scatter = (between + within / n.clamp_min(1)).clamp_min(torch.finfo(torch.float64).tiny)
        return (mean.squeeze(-1) - middle) * distance / scatter


def unknown_gate(size: int, window: int) -> tuple[Gate, Tensor]:
    """What stands for a gate that is not known, with its thresholds: it lets nothing pass."""
    never = torch.full((len(RATES),), float("inf"), device="cpu")
    return Gate(torch.zeros(size, device="cpu"), torch.zeros(4, device="cpu"), window), never


def at_rate(table: Tensor, rate: float) -> Tensor:
    """What a table over `RATES`, `[..., F]`, says for a false-positive rate, `[...]`; of the nearest one, if beyond."""
    place = min(max(-12 * math.log10(rate) - 4, 0.0), len(RATES) - 1.0)
    low, high = math.floor(place), math.ceil(place)
    if low == high:
        return table[..., low]
    # not torch.lerp: thresholds that are not known are infinite
    return table[..., low] * (high - place) + table[..., high] * (place - low)


class Moments:
    """Count, sum and outer products of feature vectors: what the direction is solved from. They add up, on `device`."""

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.count, self.sum = 0, torch.zeros(size, dtype=torch.float64, device=device)
        self.outer = torch.zeros(size, size, dtype=torch.float32, device=device)

    def add(self, features: Tensor) -> None:
        """Count in features `[N, H]`."""
        self.count += len(features)
        self.sum += features.sum(0, dtype=torch.float64).to(self.sum.device)
        features = features.float()
        self.outer += (features.mT @ features).to(self.outer.device)


def discriminant(domain: Moments, retain: Moments) -> Tensor:
    """v of the module's docstring, `[H]` fp32."""
    means = [moments.sum.cpu() / moments.count for moments in (domain, retain)]
    covariance = torch.zeros(domain.outer.shape, dtype=torch.float64, device="cpu")
    for moments, mean in zip((domain, retain), means, strict=True):
        covariance += moments.outer.cpu().double() - moments.count * torch.outer(mean, mean)
    covariance /= domain.count + retain.count
    covariance += GATE_RIDGE * covariance.diagonal().mean().clamp_min(1e-30) * torch.eye(len(covariance), device="cpu")
    return torch.linalg.solve(covariance, means[0] - means[1]).float()


def fit_law(domain: list[tuple[Tensor, Tensor]], retain: list[tuple[Tensor, Tensor]], window: int) -> Tensor:
    """Middle, distance, tau^2 and sigma^2, `[4]` fp32, from scores of whole texts.

    Args:
        domain, retain: (scores `[B, S]`, real `[B, S]`) of each batch.
        window: as in `Gate`.
    """
    means, within, between = [], [], []
    for batches in (domain, retain):
        every = torch.cat([scores[real] for scores, real in batches]).double()
        residual, counts, windows, sizes = [], [], [], []
        for scores, real in batches:
            mean, n = window_means(totals(scores.unsqueeze(-1), real), real.shape[1], window)
            own = torch.where(real, scores, 0.0).double().sum(1) / real.sum(1).clamp_min(1)
            residual.append(torch.where(real, (scores - own.unsqueeze(1)) ** 2, 0.0).sum(dtype=torch.float64))
            counts.append((real.sum(1) - 1).clamp_min(0).sum())
            full = real & (n >= n.amax(dim=1, keepdim=True))
            windows.append(mean.squeeze(-1)[full])
            sizes.append(n[full])
        noise = float(sum(residual)) / max(int(sum(counts)), 1)
        spread = float(torch.cat(windows).var(correction=0))
        size = float(torch.cat(sizes).mean())
        means.append(float(every.mean()))
        within.append(noise)
        between.append(max(spread - noise / size, LEAST_BETWEEN * spread))
    middle, distance = (means[0] + means[1]) / 2, means[0] - means[1]
    return torch.tensor([middle, distance, sum(between) / 2, sum(within) / 2], device="cpu")

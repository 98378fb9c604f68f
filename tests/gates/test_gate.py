"""The branch gate's arithmetic, against loops over tokens, textbook formulas and simulated texts."""

import math
from dataclasses import replace

import pytest
import torch
from test_window_mean import by_hand
from torch.distributions import Normal
from torch.nn.functional import cosine_similarity, pad

from close import assert_close
from peft_pcgrow.gates.gate import (
    CERTAIN,
    GATE_RIDGE,
    LATELY,
    LEAST_BETWEEN,
    RATES,
    Gate,
    Moments,
    Rows,
    at_rate,
    discriminant,
    fit_law,
)

TEXTS, TOKENS = 3, 10
WINDOWS = (0, 1, 3, 50)


def everything_real():
    return torch.ones(TEXTS, TOKENS, dtype=torch.bool)


def padded(side):
    """One text whole, one short of 4 tokens, one of a single token."""
    real = everything_real()
    for text, missing in enumerate((0, 4, TOKENS - 1)):
        real[text, slice(0, missing) if side == "left" else slice(TOKENS - missing, TOKENS)] = False
    return real


def packed():
    """Places at which each token's text starts: rows of one, two and four texts."""
    start = torch.zeros(TEXTS, TOKENS, dtype=torch.long)
    start[1, 6:] = 6
    for place in (1, 2, 7):
        start[2, place:] = place
    return start


ROWS = {
    "whole": lambda: Rows(everything_real()),
    "left padding": lambda: Rows(padded("left")),
    "right padding": lambda: Rows(padded("right")),
    "packed": lambda: Rows(everything_real(), packed()),
    "packed, left padding": lambda: Rows(padded("left"), packed()),
}


def a_gate(window, hidden=6):
    return Gate(torch.randn(hidden), torch.tensor([0.4, 1.7, 0.3, 2.5]), window)


def likelihood_ratio(gate, rows, x):
    """log p(m | domain) - log p(m | retain) of each mean, from two normal densities."""
    scores = (x.double() * gate.direction.double()).sum(-1, keepdim=True)
    mean, n = by_hand(scores, rows.real, rows.start, gate.window)
    middle, distance, between, within = gate.law.double()
    spread = (between + within / n.clamp_min(1)).sqrt()
    domain, retain = (Normal(middle + sign * distance / 2, spread) for sign in (1, -1))
    return domain.log_prob(mean.squeeze(-1)) - retain.log_prob(mean.squeeze(-1))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("case", ROWS)
def test_evidence_is_a_log_likelihood_ratio(case, window):
    gate, rows, x = a_gate(window), ROWS[case](), torch.randn(TEXTS, TOKENS, 6)
    evidence, running = gate.evidence(gate.scores(x), rows)
    assert evidence.dtype == torch.float32
    assert running.shape == (TEXTS, TOKENS, 2)
    assert_close("evidence", evidence[rows.real], likelihood_ratio(gate, rows, x)[rows.real], "fp32")


@pytest.mark.parametrize("window", WINDOWS)
def test_evidence_continues(window):
    gate, rows, x = a_gate(window), ROWS["left padding"](), torch.randn(TEXTS, TOKENS, 6)
    scores = gate.scores(x)
    _, seen = gate.evidence(scores[:, :7], Rows(rows.real[:, :7]))
    evidence, running = gate.evidence(scores[:, 7:], Rows(rows.real[:, 7:], None, seen))
    assert running.shape == (TEXTS, TOKENS, 2)
    assert_close("evidence", evidence, likelihood_ratio(gate, rows, x)[:, 7:], "fp32")


@pytest.mark.parametrize("window", [0, 32, 48])
@pytest.mark.parametrize("packing", ["one text a row", "packed", "left padding"])
def test_the_last_tokens_decide_where_they_are_certain(window, packing):
    """Texts of 80 tokens that turn: against both windows' definitions, and sooner than the window alone."""
    scores = torch.cat([torch.full((2, 40), -1.0), torch.full((2, 40), 1.0)], dim=1) + 0.3 * torch.randn(2, 80)
    scores[1] *= -1
    rows = {
        "one text a row": Rows(torch.ones(2, 80, dtype=torch.bool)),
        "packed": Rows(torch.ones(2, 80, dtype=torch.bool), torch.tensor([0] * 10 + [10] * 70).repeat(2, 1)),
        "left padding": Rows((torch.arange(80) >= 10).repeat(2, 1)),
    }[packing]
    gate = Gate(torch.ones(1), torch.tensor([0.0, 2.0, 0.05, 1.0]), window)
    x = scores.unsqueeze(-1)
    long, short = (likelihood_ratio(replace(gate, window=size), rows, x) for size in (window, LATELY))
    both = torch.stack([long, short])
    want = torch.where(short > CERTAIN, both.amax(0), torch.where(short < -CERTAIN, both.amin(0), long))
    evidence, _ = gate.evidence(scores, rows)
    assert_close("evidence", evidence[rows.real], want[rows.real], "fp32")
    assert bool((long[0, 51:54] < 0).all())
    # and not only until the window crosses zero
    assert bool((evidence[0, 51:] > CERTAIN).all())
    assert bool((evidence[1, 51:] < -CERTAIN).all())
    # in two calls
    first, seen = gate.evidence(
        scores[:, :50], Rows(rows.real[:, :50], None if rows.start is None else rows.start[:, :50])
    )
    start = None if rows.start is None else rows.start[:, 50:]
    second, _ = gate.evidence(scores[:, 50:], Rows(rows.real[:, 50:], start, seen))
    assert_close("in two calls", torch.cat([first, second], 1)[rows.real], evidence[rows.real], "fp32")


def test_a_law_without_scatter_or_distance_is_finite():
    rows, scores = ROWS["left padding"](), torch.randn(TEXTS, TOKENS)
    for law in ([0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.2, 1.0]):
        evidence, _ = Gate(torch.ones(1), torch.tensor(law), 3).evidence(scores, rows)
        assert torch.equal(evidence, torch.zeros_like(evidence))


def test_scores_are_fp32_in_any_dtype_and_under_autocast():
    gate, x = a_gate(0, 64), torch.randn(TEXTS, TOKENS, 64).bfloat16()
    want = (x.double() * gate.direction.double()).sum(-1)
    assert_close("scores", gate.scores(x), want, "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.scores(x), gate.scores(x.float()))
        assert gate.scores(x).dtype == torch.float32


def two_classes(hidden=8, rows=(400, 700), offset=0.0):
    """Correlated features of two classes whose means differ."""
    mixing = torch.eye(hidden) + 0.3 * torch.randn(hidden, hidden) / hidden**0.5
    shift = torch.randn(hidden)
    return [torch.randn(n, hidden) @ mixing + side * shift + offset for n, side in zip(rows, (0.5, -0.5), strict=True)]


def moments_of(features, sizes=None):
    moments = Moments(features.shape[1])
    for part in features.split(sizes or len(features)):
        moments.add(part)
    return moments


def regression(domain, retain, penalty=0.0):
    """Least squares of the class label on features and a constant, with `penalty` on the slopes' squares."""
    features = torch.cat([domain, retain]).double()
    label = torch.cat([torch.ones(len(domain)), torch.zeros(len(retain))]).double()
    table = pad(features, (0, 1), value=1.0)
    penalties = pad(penalty**0.5 * torch.eye(features.shape[1], dtype=torch.float64), (0, 1))
    table = torch.cat([table, penalties])
    return torch.linalg.lstsq(table, pad(label, (0, features.shape[1])).unsqueeze(1)).solution[:-1, 0]


def pooled_covariance(domain, retain):
    apart = [(part - part.double().mean(0)) for part in (domain, retain)]
    return sum(part.mT @ part for part in apart) / sum(len(part) for part in apart)


def test_discriminant_is_least_squares_up_to_the_ridge():
    domain, retain = two_classes()
    v = discriminant(moments_of(domain), moments_of(retain)).double()
    want = regression(domain, retain)
    assert_close("direction", v / v.norm(), want / want.norm(), "fisher ridge")


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("hidden", [8, 40])
def test_discriminant_is_ridge_regression(hidden, offset):
    """(S + a I)^-1 d is proportional to a ridge regression of the label (Sherman and Morrison), hardly more rows than
    features and a large common offset included."""
    domain, retain = two_classes(hidden, (30, 12), offset)
    v = discriminant(moments_of(domain), moments_of(retain)).double()
    covariance = pooled_covariance(domain, retain)
    ridge = GATE_RIDGE * covariance.diagonal().mean()
    want = regression(domain, retain, penalty=float(42 * ridge))
    kind = "fp32 solve" if hidden < 30 and not offset else "fp32 ill-conditioned solve"
    assert_close("direction", v / v.norm(), want / want.norm(), kind)
    assert float(cosine_similarity(v, domain.mean(0).double() - retain.mean(0), dim=0)) > 0  # towards the domain
    solved = (covariance + ridge * torch.eye(hidden)) @ v
    assert_close("length", solved, domain.double().mean(0) - retain.double().mean(0), kind)


def test_moments_add_up_in_any_batches():
    domain, retain = two_classes()
    whole = discriminant(moments_of(domain), moments_of(retain))
    parts = discriminant(moments_of(domain.flip(0), 7), moments_of(retain, [1, 299, 400]))
    assert_close("direction", parts, whole, "fp32 solve")
    some, twice = moments_of(domain), moments_of(domain.bfloat16(), 13)
    assert some.count == twice.count == len(domain)
    assert_close("sum", some.sum, domain.double().sum(0), "fp32")
    assert_close("outer", some.outer, domain.double().mT @ domain.double(), "fp32")
    rounded = domain.bfloat16().double()
    assert_close("outer of bf16", twice.outer, rounded.mT @ rounded, "fp32")


# what simulated scores are drawn with: mean of the domain's, of the retain text's, tau^2 and sigma^2 of each
MEANS, BETWEEN, WITHIN = (1.5, -0.5), (0.4, 0.8), (3.0, 5.0)


def simulated(texts, longest, equal=True):
    """Scores `[B, S]` and what is real of them, of the domain and of the retain text."""
    found = []
    for mean, between, within in zip(MEANS, BETWEEN, WITHIN, strict=True):
        own = mean + between**0.5 * torch.randn(texts, 1)
        scores = own + within**0.5 * torch.randn(texts, longest)
        length = torch.full((texts, 1), longest) if equal else torch.randint(longest // 2, longest + 1, (texts, 1))
        found.append((scores, torch.arange(longest) < length))
    return found


def check_law(law):
    middle, distance, between, within = law.unbind()
    want = torch.tensor([sum(MEANS) / 2, MEANS[0] - MEANS[1], sum(BETWEEN) / 2, sum(WITHIN) / 2])
    for name, got, value in zip(("middle", "distance", "between", "within"), law, want, strict=True):
        assert_close(name, got, value, "statistics")
    assert law.dtype == torch.float32
    return middle, distance, between, within


@pytest.mark.parametrize("window", [0, 1, 4, 16, 99])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_law_is_that_of_simulated_texts(window, equal):
    """4000 texts of 20 to 40 tokens: standard errors under 3% of each number (tau^2: sqrt(2 / 4000), with the noise of
    single tokens or of correlated windows on top)."""
    domain, retain = simulated(4000, 40, equal)
    check_law(fit_law([domain], [retain], window))


@pytest.mark.parametrize("window", WINDOWS)
def test_law_does_not_depend_on_batches_or_padding(window):
    domain, retain = simulated(30, 12, equal=False)
    domain[1][3] = False  # a row of padding only
    whole = fit_law([domain], [retain], window)

    def cut(batch, *sizes):
        return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))

    def left(batch):
        # roll each row's text against the right edge, and put noise where padding is
        scores, real = (tensor.clone() for tensor in batch)
        for i, n in enumerate(batch[1].sum(1).tolist()):
            scores[i], real[i] = scores[i].roll(12 - n), real[i].roll(12 - n)
        scores[~real] = 1e3
        return pad(scores, (5, 0), value=float("nan")), pad(real, (5, 0))

    assert_close("cut", fit_law(cut(domain, 1, 9, 20), cut(retain, *[3] * 10), window), whole, "fp32")
    assert_close("left", fit_law([left(domain)], [left(retain)], window), whole, "fp32")


def test_texts_alike_still_scatter_a_little():
    """Where the windows scatter less than their noise, a share of it is put down to the texts all the same."""
    scores = torch.randn(200, 20)
    balanced = scores - scores.mean(1, keepdim=True)  # every text has mean zero: tau^2 is estimated below zero
    whole = torch.ones(200, 20, dtype=torch.bool)
    law = fit_law([(balanced + 1, whole)], [(balanced, whole)], window=4)
    spread = balanced.unfold(1, 4, 1).mean(-1).var(correction=0)
    assert_close("least", law[2], LEAST_BETWEEN * spread, "fp32")


def test_a_table_is_interpolated_in_the_logarithm_of_the_rate():
    rates = torch.tensor(RATES, dtype=torch.float64)
    assert_close("rates", rates.log10() * 12, -torch.arange(4.0, 49.0), "fp64")
    table = torch.rand(2, 3, len(RATES), dtype=torch.float64)
    for column, rate in enumerate(RATES):
        assert_close("kept", at_rate(table, rate), table[..., column], "fp64")
        if column:
            between = (rate * RATES[column - 1]) ** 0.5
            assert_close("half way", at_rate(table, between), table[..., column - 1 : column + 1].mean(-1), "fp64")
    for beyond, column in ((0.9, 0), (0.5, 0), (1e-5, -1)):
        assert_close("beyond", at_rate(table, beyond), table[..., column], "fp64")
    straight = 3 - 2 * rates.log10()
    assert_close("one rate", at_rate(straight, 0.0123), torch.tensor(3 - 2 * math.log10(0.0123)), "fp32")
    unknown = torch.full((len(RATES),), float("inf"))
    assert all(at_rate(unknown, rate) == float("inf") for rate in (0.9, 0.1, 0.0123, 1e-9))

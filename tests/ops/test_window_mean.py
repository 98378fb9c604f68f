"""Means of causal windows against loops over tokens in fp64."""

import pytest
import torch

from close import assert_close
from pcgrow_kernels.window_mean import totals, window_means

# all of the text; single tokens; shorter than the texts; longer than any
WINDOWS = (0, 1, 3, 50)


def by_hand(values, real, start, window):
    """Means and numbers of tokens, one place after the other."""
    means, numbers = torch.zeros(values.shape, dtype=torch.float64), torch.zeros(values.shape[:2], dtype=torch.float64)
    for text in range(values.shape[0]):
        for token in range(values.shape[1]):
            place = 0 if start is None else int(start[text, token])
            if window:
                place = max(place, token - window + 1)
            inside = [values[text, i].double() for i in range(place, token + 1) if real[text, i]]
            numbers[text, token] = len(inside)
            if inside:
                means[text, token] = sum(inside) / len(inside)
    return means, numbers


def padded(side, texts, tokens):
    """Texts of which each lacks two tokens more than the one before, down to none at all."""
    place = torch.arange(tokens).expand(texts, -1)
    missing = 2 * torch.arange(texts).unsqueeze(1)
    return place >= missing if side == "left" else place < tokens - missing


def borders(texts, tokens, every):
    """Places at which each token's own text starts: a new one every so many tokens, elsewhere in each row."""
    place = torch.arange(tokens).expand(texts, -1)
    return (place - (place + torch.arange(texts).unsqueeze(1)) % every).clamp_min(0)


def whole(texts, tokens):
    return torch.ones(texts, tokens, dtype=torch.bool)


# texts, tokens, values of each; what is real; where texts start
CASES = {
    "whole": (3, 10, 2, whole, None),
    "no tokens": (3, 0, 2, whole, None),
    "no texts": (0, 4, 2, whole, None),
    "one token": (3, 1, 1, whole, None),
    "left padding, a text of nothing": (6, 10, 2, lambda *shape: padded("left", *shape), None),
    "right padding, a text of nothing": (6, 10, 2, lambda *shape: padded("right", *shape), None),
    "texts of four tokens": (3, 11, 2, whole, lambda *shape: borders(*shape, 4)),
    "texts of one token": (2, 5, 2, whole, lambda *shape: borders(*shape, 1)),
    "left padding, texts of three": (4, 10, 2, lambda *shape: padded("left", *shape), lambda *s: borders(*s, 3)),
    "no tokens, texts": (2, 0, 2, whole, lambda *shape: borders(*shape, 3)),
}


def case_of(name, dtype=torch.float32):
    texts, tokens, width, real, start = CASES[name]
    real = real(texts, tokens)
    values = torch.randn(texts, tokens, width).to(dtype)
    values[~real] = float("nan")  # what padding holds must not matter
    return values, real, None if start is None else start(texts, tokens)


def check(got, want):
    assert got[0].dtype == got[1].dtype == torch.float64
    assert torch.equal(got[1], want[1])
    if got[0].numel():
        assert_close("means", got[0], want[0], "fp64")
    assert got[0].shape == want[0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", CASES)
def test_means_are_those_of_a_loop(name, window, dtype):
    """Narrow values are summed in fp64: nothing is rounded but the values themselves."""
    values, real, start = case_of(name, dtype)
    got = window_means(totals(values, real), values.shape[1], window, start)
    check(got, by_hand(values, real, start, window))


@pytest.mark.parametrize("window", WINDOWS)
def test_tensors_that_are_not_contiguous(window):
    values = torch.randn(3, 22, 4)[:, ::2, ::2]
    real, start = padded("right", 11, 3).mT, borders(3, 11, 4).mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in (values, real, start))
    check(window_means(totals(values, real), 11, window, start), by_hand(values, real, start, window))


def calls(values, real, start, window, sizes):
    """Means and numbers of a sequence that comes in several calls."""
    running, got = None, []
    starts = [None] * len(sizes) if start is None else start.split(sizes, 1)
    for chunk, there, begun in zip(values.split(sizes, 1), real.split(sizes, 1), starts, strict=True):
        running = totals(chunk, there, running)
        got.append(window_means(running, chunk.shape[1], window, begun))
    return [torch.cat(chunks, dim=1) for chunks in zip(*got, strict=True)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["whole", "left padding, a text of nothing", "left padding, texts of three"])
@pytest.mark.parametrize("sizes", [[9, 1], [4, 1, 0, 1, 4], [0, 10], [1] * 10], ids=str)
def test_calls_continue_each_other(name, window, sizes):
    values, real, start = case_of(name)
    exact = torch.randint(-9, 9, values.shape).float()  # sums of small integers have no rounding
    for got, want in zip(
        calls(exact, real, start, window, sizes), calls(exact, real, start, window, [10]), strict=True
    ):
        assert torch.equal(got, want)
    check(calls(values, real, start, window, sizes), by_hand(values, real, start, window))

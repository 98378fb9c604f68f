"""Ops against their written-out sums in fp64."""

import pytest
import torch

from close import assert_close
from pcgrow_kernels import expert_error


# tokens, choices, experts: odd sizes; one expert; more experts than rows
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(37, 3, 5), (8, 1, 1), (2, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expert_error(tokens, choices, experts, dtype):
    delta = torch.randn(tokens, 7, dtype=dtype)
    # one index past the end is no expert: that is how expert parallelism marks rows of other devices
    index = torch.randint(0, experts + 1, (tokens, choices))
    weight = torch.randn(tokens, choices, dtype=dtype) * (torch.rand(tokens, choices) > 0.2)
    keep = torch.rand(tokens) > 0.3
    want = torch.zeros(4, experts, dtype=torch.float64)
    for t in range(tokens):
        for k in range(choices):
            e, p = int(index[t, k]), float(weight[t, k])
            if keep[t] and e < experts and p:
                error = p * delta[t].double()
                want[:, e] += torch.tensor([1.0, p, error.norm(), error @ error], dtype=torch.float64)
    for name, got, expected in zip(
        ("rows", "weight", "norm", "square"), expert_error(delta, index, weight, experts, keep), want, strict=True
    ):
        assert_close(name, got, expected, "fp64" if dtype == torch.float64 else "fp32")


def test_nothing_kept_is_nothing_summed():
    sums = expert_error(
        torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2), 3, torch.zeros(4, dtype=torch.bool)
    )
    assert all(not total.any() for total in sums)

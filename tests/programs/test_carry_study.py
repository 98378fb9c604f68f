"""examples/carry_study.py: its exact errors, and ways that must give them back."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import carry_study


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def study(llama) -> carry_study.Study:
    windows = torch.randint(64, (20, 12), generator=torch.Generator().manual_seed(1))
    fit, test = (carry_study.exact_errors(llama, part) for part in (windows[:8], windows[8:]))
    return carry_study.Study(llama, fit, test)


def test_exact_errors_are_a_full_backwards(llama, study):
    windows = torch.randint(64, (20, 12), generator=torch.Generator().manual_seed(1))[8:]
    weights = [layer.mlp.down_proj.weight.requires_grad_() for layer in llama.model.layers]
    logits = llama(input_ids=windows).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    expected = torch.autograd.grad(loss, weights)
    llama.requires_grad_(False)
    for found, gradient in zip(study.exact, expected, strict=True):
        torch.testing.assert_close(found, gradient.flatten(), rtol=1e-4, atol=1e-6)


def test_ways_that_leave_nothing_out_are_exact(study):
    exact = study.test.errors
    cost, whole = study.descend(lambda index: carry_study.EXACT)
    ways = [study.unchanged_below(0), whole]
    for errors in ways:
        torch.testing.assert_close(errors, exact, rtol=1e-4, atol=1e-6)
    assert cost == pytest.approx(sum(study.cost(index, carry_study.EXACT) for index in (1, 2, 3)))
    row = carry_study.judged(study, whole)
    assert row["gradient"] == row["token"] == row["explained"] == [1.0] * 4


def test_direct_is_the_top_error(study):
    for errors in (study.unchanged_below(4), study.descend(lambda index: None)[1]):
        assert all(torch.equal(error, study.test.errors[-1]) for error in errors)


@pytest.mark.slow
def test_every_way_gives_errors_of_all_layers(study):
    rows = list(study.ways([2]))
    assert len({name for name, _, _ in rows}) == len(rows)
    for name, cost, errors in rows:
        assert [e.shape for e in errors] == [e.shape for e in study.test.errors], name
        assert cost >= 0
        assert all(torch.isfinite(e).all() for e in errors), name


def test_ridge_recovers_a_planted_map():
    generator = torch.Generator().manual_seed(0)
    x, planted = torch.randn(400, 16, generator=generator), torch.randn(16, 8, generator=generator)
    torch.testing.assert_close(carry_study.ridge(x, x @ planted).float(), planted, rtol=0.02, atol=0.02)


def test_other_layers_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match=r"expected a decoder with layers like Llama's"):
        carry_study.layers_of(model)

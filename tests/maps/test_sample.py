"""Text that a model writes itself is drawn from the model's own distribution, and leaves everything else alone."""

import pytest
import torch
from torch import nn

from close import assert_close
from peft_pcgrow import measure_errors
from peft_pcgrow.maps.sample import sample_text
from tiny import EXPERTS, VOCABULARY, build, domain

BOS, EOS = 1, 2


def sampled(model, texts=8, length=12, **options):
    return sample_text(model, texts, length, progress=False, **options)


def peaked():
    """A model whose distributions are far from uniform: some words are drawn often, others hardly ever."""
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return model


def test_shapes_and_first_token():
    found = sampled(build(), 7, 5, batch=3)
    assert [tuple(ids.shape) for ids in found] == [(3, 5), (3, 5), (1, 5)]
    ids = torch.cat(found)
    assert ids.dtype == torch.long
    assert (ids[:, 0] == BOS).all()
    assert 0 <= ids.min() <= ids.max() < VOCABULARY
    assert len({tuple(text.tolist()) for text in ids}) == 7


@pytest.mark.parametrize(("bos", "eos", "first"), [(9, 5, 9), (None, 5, 5), (None, [6, 5], 6)])
def test_texts_start_where_training_texts_do(bos, eos, first):
    model = build()
    for holder in (model.generation_config, model.config):
        holder.bos_token_id, holder.eos_token_id = bos, eos
    assert (sampled(model, 2, 3)[0][:, 0] == first).all()
    for holder in (model.generation_config, model.config):
        holder.bos_token_id = holder.eos_token_id = None
    with pytest.raises(ValueError, match="bos or eos token"):
        sampled(model)


def test_the_seed_decides_and_the_callers_draws_do_not():
    model = build()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = sampled(model, seed=3)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(sampled(model, seed=3)[0], first)
    assert not torch.equal(sampled(model, seed=4)[0], first)


@pytest.mark.slow
def test_a_text_that_ends_goes_on():
    ids = torch.cat(sampled(build(), 32, 60))
    ended = (ids[:, :-8] == EOS).nonzero().tolist()
    assert ended
    # a text that had stopped would hold nothing but padding from there on
    assert all((ids[text, place + 1 :] != ids[text, 0]).any() for text, place in ended)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(monkeypatch, fails, training):
    model = build().train(training)
    before, state = model.generation_config.to_dict(), torch.get_rng_state()
    assert before["eos_token_id"] == EOS
    if fails:
        monkeypatch.setattr(model.model, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sampled(model)
    else:
        sampled(model)
    assert model.generation_config.to_dict() == before
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_near_zero_temperature_is_greedy(name):
    model = build(name)
    cold = sampled(model, 2, 14, temperature=1e-6)[0]
    ids = torch.tensor([[BOS]])
    for _ in range(13):
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert torch.equal(cold, ids.expand(2, -1))


def surprise(counts, probabilities):
    """Pearson's chi-square, less its mean and over its standard deviation."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    freedom = len(counts) - 1
    return float(((counts - expected).square() / expected.clamp_min(1e-9)).sum() - freedom) / (2 * freedom) ** 0.5


def test_frequencies_are_those_of_the_softmax():
    """4000 first tokens: within 5 standard deviations of what chance gives, and draws at other temperatures are not."""
    model = peaked()
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([[BOS]])).logits[0, -1].double().softmax(0)
    found = {}
    for temperature in (1.0, 0.8, 1.25):
        ids = torch.cat(sampled(model, 4000, 2, batch=1000, temperature=temperature))
        found[temperature] = surprise(torch.bincount(ids[:, 1], minlength=VOCABULARY).double(), probabilities)
    assert found[1.0] < 5
    assert min(found[0.8], found[1.25]) > 10


# what checkpoints' generation settings hold beside the tokens
SETTINGS = [
    {"do_sample": True, "temperature": 0.6, "top_k": 3, "top_p": 0.5},
    {"repetition_penalty": 1.5},
    {"min_p": 0.2},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(64))},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(reversed(settings)))
def test_generation_settings_do_not_bend_the_draws(settings):
    """ "Temperature 1 draws from the model's own distribution": that of its logits, whatever a chat would be cut to."""
    model = peaked()
    want = sampled(model, length=30)[0]
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(sampled(model, length=30)[0], want)
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    "options", [{"texts": 0}, {"length": 1}, {"batch": 0}, {"temperature": 0.0}, {"temperature": float("nan")}], ids=str
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be a"):
        sample_text(build(), progress=False, **options)


def test_a_model_that_cannot_generate_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no generate\(\)"):
        sample_text(nn.Linear(2, 2), progress=False)


@pytest.mark.slow
def test_a_map_lets_the_model_write_its_retain_text():
    """As many texts as the corpus has, as long as its longest, and the same as if they had been given."""
    model = build().train()
    corpus, state = [domain(5, 10), domain(4, 16, seed=1)], torch.get_rng_state()
    emap = measure_errors(model, corpus, retain="self", gradients=False, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    texts = sampled(model, 9, 16)
    assert emap.separation.facts["retain_tokens"] == 9 * 16
    assert emap.separation.retain_rows.sum(1).tolist() == [3.0 * 9 * 16] * 3
    assert emap.separation.recall.shape[1] == EXPERTS
    given = measure_errors(model, corpus, retain=texts, gradients=False, progress=False).separation
    for name in ("direction", "law", "threshold", "retain_rows", "false_positive"):
        assert_close(name, getattr(emap.separation, name), getattr(given, name), "fp32")

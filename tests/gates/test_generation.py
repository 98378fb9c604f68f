"""Newborns while text is generated: a gate that remembers gives what one that reads the whole text again gives."""

import copy
from functools import cache

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

from close import assert_close
from tiny import PAD, build, domain, gate_passes, logits, mixed, spawned, spawning, taken, train

CASES = [("qwen3_moe", 8), ("gpt_oss", 8), ("deepseek_v3", 0)]
PROMPT, NEW = 12, 12
TOLERANCE = "fp64 across batches"
architectures = pytest.mark.parametrize(("name", "window"), CASES)
two_of_them = pytest.mark.parametrize(("name", "window"), CASES[:2])


@cache
def grown(name: str = "qwen3_moe", window: int = 8) -> PeftModel:
    """Newborns trained far from their donors, in fp64 so that no near-tie of two words depends on the batch."""
    model = spawned(name, torch.float64, window=window, gate_fpr=0.15)
    train(model, lr=3e-2, texts=domain)
    # all texts get the same length
    model.get_base_model().generation_config.eos_token_id = None
    return model


def write(model: nn.Module, ids: Tensor, **settings) -> Tensor:
    """Greedy continuation, prompts included."""
    with torch.no_grad():
        return model.generate(input_ids=ids, **{"max_new_tokens": NEW, "do_sample": False, **settings})


def assert_gated(model: nn.Module, written: Tensor, **inputs) -> None:
    """Newborns took some of the new tokens and left others."""
    new = torch.stack(list(taken(model, written, **inputs).values())).any(dim=0)[:, -NEW:]
    assert 0 < int(new.sum()) < new.numel()


@pytest.mark.slow
@architectures
def test_with_a_cache_as_without(name, window):
    """The same words, from the same logits; other words than the base's."""
    model, found = grown(name, window), {}
    for use_cache in (True, False):
        settings = {"use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
        found[use_cache] = write(model, mixed(PROMPT), **settings)
    assert torch.equal(found[True].sequences, found[False].sequences)
    assert_close("logits", torch.stack(found[True].logits), torch.stack(found[False].logits), TOLERANCE)
    assert_gated(model, found[True].sequences)
    with model.disable_adapter():
        assert not torch.equal(write(model, mixed(PROMPT)), found[True].sequences)


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_batch_as_single_rows(name, window, use_cache):
    """Prompts of different lengths, padded on the left."""
    model, lengths = grown(name, window), (12, 3, 9, 12, 1, 7, 10, 4)
    prompts = [row[:length] for row, length in zip(mixed(PROMPT), lengths, strict=True)]
    ids = torch.stack([pad(prompt, (PROMPT - len(prompt), 0), value=PAD) for prompt in prompts])
    mask = torch.stack([pad(torch.ones_like(prompt), (PROMPT - len(prompt), 0)) for prompt in prompts])
    together = write(model, ids, attention_mask=mask, use_cache=use_cache)
    assert_gated(model, together, attention_mask=pad(mask, (0, NEW), value=1))
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[PROMPT:], write(model, prompt[None])[0, len(prompt) :])


@pytest.mark.slow
@architectures
def test_beams(name, window):
    """Beam search reorders the memory with the keys; each of three best beams is that of a search without a cache."""
    model, found = grown(name, window), {}
    for use_cache in (True, False):
        found[use_cache] = write(model, mixed(PROMPT), num_beams=3, num_return_sequences=3, use_cache=use_cache)
    assert torch.equal(found[True], found[False])
    assert_gated(model, found[True])
    beams = found[True].view(-1, 3, PROMPT + NEW)
    assert (beams[:, 0] != beams[:, 1]).any(dim=1).all()
    assert torch.equal(write(model, mixed(PROMPT), num_beams=3), beams[:, 0])


@pytest.mark.slow
@two_of_them
def test_several_samples_of_a_prompt(name, window):
    model, found = grown(name, window), {}
    for use_cache in (True, False):
        torch.manual_seed(3)
        found[use_cache] = write(model, mixed(PROMPT), num_return_sequences=3, do_sample=True, use_cache=use_cache)
    assert torch.equal(found[True], found[False])
    assert_gated(model, found[True])
    assert len(found[True].unique(dim=0)) == 3 * 8


@pytest.mark.slow
@two_of_them
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_kinds_of_cache(name, window, kind):
    model = grown(name, window)
    with model.disable_adapter():
        expected = write(model, mixed(PROMPT))
        assert torch.equal(write(model, mixed(PROMPT), cache_implementation=kind), expected)
    expected = write(model, mixed(PROMPT))
    assert torch.equal(write(model, mixed(PROMPT), cache_implementation=kind), expected)
    mask = (torch.arange(PROMPT) >= torch.arange(8)[:, None]).long()
    given = {"ids": mixed(PROMPT).masked_fill(mask == 0, PAD), "attention_mask": mask}
    assert torch.equal(write(model, **given, cache_implementation=kind), write(model, **given, use_cache=False))
    assert_gated(model, expected)


ASSISTED = {
    "another model": lambda name: {"assistant_model": assistant(name)},
    "itself": lambda name: {"assistant_model": grown(name, 0)},
    "prompt lookup": lambda name: {"prompt_lookup_num_tokens": 2},
}


def assistant(name: str) -> nn.Module:
    """Right now and then only."""
    model = build(name, torch.float64)
    with torch.no_grad():
        model.lm_head.weight += 0.02 * torch.randn_like(model.lm_head.weight)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.slow
@two_of_them
@pytest.mark.parametrize("way", ASSISTED)
def test_assisted(name, window, way):
    """Drafts that are thrown away are forgotten by the gates too."""
    model = grown(name, window)
    prompts = mixed(PROMPT)[[0, 6]].repeat(1, 2)
    greedy = write(model, prompts)
    for prompt, expected in zip(prompts, greedy, strict=True):
        assert torch.equal(write(model, prompt[None], **ASSISTED[way](name))[0], expected)
    assert_gated(model, greedy)


# ---- calls of one's own


def stepwise(model: nn.Module, ids: Tensor, sizes: list[int], cache_used, mask: Tensor | None = None) -> Tensor:
    """Logits of a text that is given in pieces."""
    found, start = [], 0
    with torch.no_grad():
        for size in sizes:
            given = {} if mask is None else {"attention_mask": mask[:, : start + size]}
            piece = ids[:, start : start + size]
            found.append(model(input_ids=piece, past_key_values=cache_used, use_cache=True, **given).logits)
            start += size
    return torch.cat(found, dim=1)


CACHES = {
    "of the config": lambda model: DynamicCache(config=model.config),
    "without a config": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    # the sliding layers of gpt-oss need a cache that knows them
    ("name", "window", "kind"),
    [(*case, kind) for case in CASES for kind in CACHES if case[0] != "gpt_oss" or kind != "without a config"],
)
@pytest.mark.parametrize("sizes", [[24], [10, 14], [5, 1, 1, 7, 10]], ids=len)
def test_a_text_in_pieces(name, window, kind, sizes):
    model = grown(name, window)
    with model.disable_adapter():
        assert_close("base", stepwise(model, mixed(), sizes, CACHES[kind](model)), logits(model, mixed()), TOLERANCE)
    assert_close("logits", stepwise(model, mixed(), sizes, CACHES[kind](model)), logits(model, mixed()), TOLERANCE)


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("kind", ["of the config", "static"])
def test_a_padded_text_in_pieces(name, window, kind):
    model, mask = grown(name, window), (torch.arange(24) >= 2 * torch.arange(8)[:, None]).long()
    ids = mixed().masked_fill(mask == 0, PAD)
    want = logits(model, ids, attention_mask=mask)
    for sizes in ([24], [11, 13], [4, 4, 8, 8]):
        got = stepwise(model, ids, sizes, CACHES[kind](model), mask)
        assert_close(f"{sizes}", got[mask.bool()], want[mask.bool()], TOLERANCE)


@pytest.mark.slow
@two_of_them
def test_chunked_prefill(name, window):
    model = grown(name, window)
    assert torch.equal(write(model, mixed(PROMPT), prefill_chunk_size=5), write(model, mixed(PROMPT)))


@pytest.mark.slow
@two_of_them
def test_a_conversation(name, window):
    """A second turn on the first one's cache, and on a copy of it."""
    model, second = grown(name, window), mixed(6, seed=70)
    first = write(model, mixed(PROMPT), return_dict_in_generate=True)
    whole = torch.cat([first.sequences, second], dim=1)
    expected = write(model, whole)
    for held in (copy.deepcopy(first.past_key_values), first.past_key_values):
        assert torch.equal(write(model, whole, past_key_values=held), expected)
    assert_gated(model, expected)


@two_of_them
def test_a_cache_used_again(name, window):
    """Reset, it has forgotten the last text."""
    model = grown(name, window)
    held = StaticCache(config=model.config, max_cache_len=40)
    stepwise(model, mixed(seed=70), [20, 4], held)
    held.reset()
    assert_close("logits", stepwise(model, mixed(), [20, 4], held), logits(model, mixed()), TOLERANCE)


@pytest.mark.slow
def test_a_cache_cut_and_widened():
    """crop, batch_repeat_interleave and batch_select_indices are followed."""
    model, ids = grown(), mixed()
    held = DynamicCache(config=model.config)
    stepwise(model, torch.cat([ids[:, :10], ids[:, :5]], dim=1), [12, 3], held)
    held.crop(-5)
    held.batch_repeat_interleave(2)
    held.batch_select_indices(torch.arange(15, -1, -2))
    got = stepwise(model, ids.flip(0)[:, 10:], [6, 8], held)
    assert_close("logits", got, logits(model, ids.flip(0))[:, 10:], TOLERANCE)


@pytest.mark.slow
def test_two_adapters_remember_apart():
    """Gates of two active adapters, one of them with another window."""
    model = copy.deepcopy(grown())
    model.add_adapter("other", spawning(window=0, gate_fpr=0.2))
    model.set_adapter("other")
    train(model, lr=3e-2, texts=domain, seed=9)
    model.base_model.set_adapter(["default", "other"])
    for settings in ({}, {"num_beams": 3}):
        found = [write(model, mixed(PROMPT), use_cache=use_cache, **settings) for use_cache in (True, False)]
        assert torch.equal(*found)
    assert not torch.equal(found[0], write(grown(), mixed(PROMPT), num_beams=3))


def test_another_batch_does_not_disturb():
    """A generation between two calls on one cache leaves its memory alone."""
    model = grown()
    held = DynamicCache(config=model.config)
    first = stepwise(model, mixed()[:, :10], [10], held)
    write(model, mixed(PROMPT, seed=70))
    logits(model, mixed(8, seed=71))
    second = stepwise(model, mixed()[:, 10:], [5, 9], held)
    assert_close("logits", torch.cat([first, second], dim=1), logits(model, mixed()), TOLERANCE)


# ---- packing


@pytest.mark.slow
@pytest.mark.parametrize(("name", "window"), [("qwen3_moe", 8), ("qwen2_moe", 0), ("deepseek_v3", 0)])
def test_packed_texts_as_single_ones(name, window):
    """Several texts in a row, told apart by position ids that start again."""
    model = grown(name, window)
    texts = [row[:length] for row, length in zip(mixed(), (24, 7, 1, 16, 9), strict=False)]
    packed = torch.cat(texts)[None]
    places = torch.cat([torch.arange(len(text)) for text in texts])[None]
    with model.disable_adapter():
        base = torch.cat([logits(model, text[None]) for text in texts], dim=1)
        assert_close("base", logits(model, packed, position_ids=places), base, TOLERANCE)
    separate = torch.cat([logits(model, text[None]) for text in texts], dim=1)
    assert_close("logits", logits(model, packed, position_ids=places), separate, TOLERANCE)
    rows = torch.cat([found for text in texts for found in taken(model, text[None]).values()], dim=1)
    assert rows.any()
    assert not rows.all()


@pytest.mark.slow
def test_gates_tell_packed_texts_apart():
    """transformers lets gpt-oss attend across packed texts; its gates read each token's own text all the same."""
    model, lengths, found = grown("gpt_oss"), (24, 7, 1, 16, 9), []

    def look(layer: nn.Module, args: tuple) -> None:
        alone = [
            gate_passes(layer, "default", text[None], torch.ones(1, len(text)).bool())
            for text in args[0].split(lengths)
        ]
        found.append(((layer.margin("default", args[0]) > 0), torch.cat(alone, dim=1)[0]))

    layers = model.base_model.tuner_layers()
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    packed = torch.cat([row[:length] for row, length in zip(mixed(), lengths, strict=False)])[None]
    logits(model, packed, position_ids=torch.cat([torch.arange(length) for length in lengths])[None])
    for handle in handles:
        handle.remove()
    assert len(found) == len(layers)
    for passes, alone in found:
        assert torch.equal(passes, alone)
        assert alone.any()
        assert not alone.all()


@pytest.mark.slow
def test_packed_rows_train_as_single_ones():
    """The gradient of a packed row is the sum of its texts', in a sweep that runs each layer again."""
    texts, found = [row[:length] for row, length in zip(mixed(), (24, 7, 16), strict=False)], []
    rows = [[text] for text in texts], [texts]
    for packing in rows:
        model = spawned(dtype=torch.float64).train()
        for row in packing:
            ids = torch.cat(row)[None]
            places = torch.cat([torch.arange(len(text)) for text in row])[None]
            labels = torch.cat([torch.cat([torch.tensor([-100]), text[1:]]) for text in row])[None]
            out = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, :-1]
            nn.functional.cross_entropy(out[0], labels[0, 1:], ignore_index=-100, reduction="sum").backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient.any()
        assert_close(name, found[1][name], gradient, TOLERANCE)

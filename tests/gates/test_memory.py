"""What newborns' gates remember beside a KV cache is what the cache holds, or a call is refused; every kind of mask
says alike what is text and where texts begin. The oracle is the whole text at once, without a cache, in fp64."""

import copy
import io
import pickle
from functools import cache

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_generation import CACHES, TOLERANCE, grown, stepwise
from test_packing import additive, block, numbers, places
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
)
from transformers.masking_utils import flex_attention_mask, sliding_window_causal_mask_function

from close import assert_close
from peft_pcgrow import PCGrowConfig, measure_errors
from peft_pcgrow.gates.text_borders import Told
from peft_pcgrow.gates.text_position import TextPosition
from tiny import PAD, build, domain, logits, mixed, retain, taken, train

LENGTHS = (24, 7, 1, 16, 9)


def texts() -> list[Tensor]:
    return [row[:length] for row, length in zip(mixed(), LENGTHS, strict=False)]


# ---- caches


@pytest.mark.slow
@pytest.mark.parametrize("kind", CACHES)
def test_a_turn_with_the_adapter_off(kind):
    """The gates did not see it; the base goes on, and so does the adapter once the cache is empty."""
    model, ids = grown(), mixed()
    held = CACHES[kind](model)
    stepwise(model, ids[:, :8], [8], held)
    with model.disable_adapter():
        stepwise(model, ids[:, 8:16], [8], held)
    with pytest.raises(RuntimeError, match=r"'default' at layer \d remembers 8 tokens, and the KV cache holds 16"):
        stepwise(model, ids[:, 16:], [8], held)
    held.reset()
    assert_close("logits", stepwise(model, ids, [16, 8], held), logits(model, ids), TOLERANCE)


@pytest.mark.parametrize("size", [1, 8])
def test_a_cache_filled_without_the_adapter(size):
    model, ids = grown(), mixed()
    held = DynamicCache(config=model.config)
    with model.disable_adapter():
        stepwise(model, ids[:, :16], [16], held)
    with pytest.raises(RuntimeError, match="remembers 0 tokens, and the KV cache holds 16"):
        stepwise(model, ids[:, 16:], [size], held)


def test_a_cache_made_of_another_ones_tensors():
    model, ids = grown(), mixed()
    held = DynamicCache(config=model.config)
    stepwise(model, ids[:, :16], [16], held)
    again = DynamicCache([(layer.keys, layer.values) for layer in held.layers])
    with pytest.raises(RuntimeError, match=r"made of another cache's tensors. Give the whole text"):
        stepwise(model, ids[:, 16:], [8], again)
    other = DynamicCache(config=model.config)
    stepwise(model, ids[:4, :16], [16], other)
    for layer, theirs in zip(other.layers, held.layers, strict=True):
        layer.keys, layer.values = theirs.keys, theirs.values
    with pytest.raises(RuntimeError, match=r"of 8 rows \(it: of 4\)"):
        stepwise(model, ids[:, 16:], [8], other)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pickle", "torch", "copy"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_caches_travel(name, way):
    model, ids = grown(name), mixed()
    held = DynamicCache(config=model.config)
    first, file = stepwise(model, ids[:, :10], [10], held), io.BytesIO()
    if way == "torch":
        torch.save(held, file)
        file.seek(0)
    again = {
        "pickle": lambda: pickle.loads(pickle.dumps(held)),
        "torch": lambda: torch.load(file, weights_only=False),
        "copy": lambda: copy.deepcopy(held),
    }[way]()
    again.batch_select_indices(torch.arange(7, -1, -1))
    second = stepwise(model, ids.flip(0)[:, 10:], [6, 8], again)
    got = torch.cat([first.flip(0), second], dim=1)
    assert_close("logits", got, logits(model, ids.flip(0)), TOLERANCE)
    assert_close("the original", stepwise(model, ids[:, 10:], [14], held), logits(model, ids)[:, 10:], TOLERANCE)


def test_the_cache_of_a_decoder():
    """Text is what its self-attention has seen."""
    inner = DynamicCache()
    held = EncoderDecoderCache(inner, DynamicCache())
    inner.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4), 0)
    call = TextPosition.of(0, (torch.zeros(2, 3, 4),), {"past_key_values": held})
    assert (call.cache, call.held) == (inner, 5)


@cache
def hybrid() -> PeftModel:
    """A layer with a running state below one with keys."""

    def build_it() -> PreTrainedModel:
        settings = {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "initializer_range": 0.15,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        }
        return Qwen3NextForCausalLM(Qwen3NextConfig(**settings))

    base, texts = build(build_it, torch.float64), ([domain(32, seed=1)], [retain(32, seed=1)])
    emap = measure_errors(base, texts[0], retain=texts[1], window=8, gradients=False, progress=False)
    locus = {0: [1, 4], 1: [0, 3], 2: [2, 5]}
    model = get_peft_model(base, PCGrowConfig(error_map=emap, locus=locus, grow="spawn", gate_fpr=0.15))
    train(model, lr=3e-2, texts=domain)
    return model


@pytest.mark.slow
def test_layers_without_keys_ask_others():
    """How much a cache holds is known from those that have them."""
    model, ids = hybrid(), mixed()
    held = DynamicCache(config=model.config)
    assert_close("logits", stepwise(model, ids, [10, 1, 13], held), logits(model, ids), TOLERANCE)
    held = DynamicCache(config=model.config)
    stepwise(model, ids[:, :10], [10], held)
    with model.disable_adapter():
        stepwise(model, ids[:, 10:11], [1], held)
    with pytest.raises(RuntimeError, match="at layer 0 remembers 10 tokens, and the KV cache holds 11"):
        stepwise(model, ids[:, 11:], [1], held)


def test_unknown_caches_are_refused():
    class Own(DynamicCache):
        """Keeps its entries under another name."""

        def __getattribute__(self, name):
            return tuple(super().__getattribute__(name)) if name == "layers" else super().__getattribute__(name)

    model = grown()
    with pytest.raises(TypeError, match="on the layers of the KV cache, and a Own has none"):
        stepwise(model, mixed(), [24], Own(config=model.config))
    with model.disable_adapter():
        stepwise(model, mixed(), [24], Own(config=model.config))


def test_continuous_batching_is_refused():
    """Several requests share a row there: refused when it is asked for, and possible without the newborns."""
    model, prompts = copy.deepcopy(grown()), [mixed()[0, :9].tolist(), mixed()[4, :6].tolist()]
    for host in (model, model.get_base_model()):
        for ask in (host.generate_batch, host.continuous_batching_context_manager):
            with pytest.raises(TypeError, match=r"a PagedAttentionCache has none. Continuous batching"), ask(prompts):
                pass
    plain = model.unload()
    assert "init_continuous_batching" not in vars(plain)


@pytest.mark.slow
@pytest.mark.parametrize("cache_used", ["dynamic", "static"])
def test_a_padding_token_fed_alone(cache_used):
    """Rows that are through are fed padding, under a mask that says so, until the longest is."""
    model, ids = grown(), mixed()
    mask = torch.ones_like(ids)
    mask[::2, 14:20] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    held = DynamicCache(config=model.config) if cache_used == "dynamic" else StaticCache(model.config, 40)
    got = stepwise(model, ids, [13, *[1] * 11], held, mask)
    want = logits(model, ids, attention_mask=mask)
    assert_close("logits", got[mask.bool()], want[mask.bool()], TOLERANCE)
    assert any(rows[::2, 20:].any() for rows in taken(model, ids, attention_mask=mask).values())


# ---- masks


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [block, lambda n: additive(block(n))], ids=["bool", "additive"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_packed_under_a_mask_while_positions_run_on(name, mask, attention):
    model = copy.deepcopy(grown(name, 8 if name == "qwen3_moe" else 0))
    model.get_base_model().set_attn_implementation(attention)
    given = mask(LENGTHS) if attention == "sdpa" else additive(block(LENGTHS))
    packed = torch.cat(texts())[None]
    separate = torch.cat([logits(model, text[None]) for text in texts()], dim=1)
    assert_close("logits", logits(model, packed, attention_mask=given), separate, TOLERANCE)


def test_a_packed_row_goes_on():
    """Its last text, from a cache: with keys hidden from it, as its whole alone."""
    model, ids = grown(), mixed()[2]
    before = mixed()[5, :9]
    row, lengths = torch.cat([before, ids])[None], (9, 24)
    held, got = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, end in ((0, 15), (15, 16), (16, 24), (24, 33)):
            mask = block(lengths)[:, :, start:end, :end]
            where = places(lengths)[:, start:end]
            given = {"attention_mask": mask, "position_ids": where, "past_key_values": held}
            got.append(model(input_ids=row[:, start:end], use_cache=True, **given).logits)
    assert_close("logits", torch.cat(got, dim=1)[:, 9:], logits(model, ids[None]), TOLERANCE)


@pytest.mark.parametrize("said", ["cu_seq_lens_q", "seq_idx"])
def test_what_flash_attention_is_told(said):
    """Gates pass what they pass text by text."""
    lengths, model, found = LENGTHS, grown(), []

    def look(layer, args):
        found.append(layer.margin("default", args[0]))

    handles = [layer.register_forward_pre_hook(look) for layer in model.base_model.tuner_layers()]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    more = {"cu_seq_lens_q": {"cu_seq_lens_q": ends}, "seq_idx": {"seq_idx": numbers(lengths)}}[said]
    mask = additive(block(lengths))
    packed = torch.cat(texts())[None]
    logits(model, packed, attention_mask=mask)
    want = list(found)
    found.clear()
    # a mask for the keys alone, as flash attention takes it: the borders are in the other arguments
    layer_inputs = {"position_ids": places(lengths), **more}
    logits(model, packed, **layer_inputs)
    for handle in handles:
        handle.remove()
    assert len(found) == len(want) > 0
    for got, expected in zip(found, want, strict=True):
        assert_close("margin", got, expected, TOLERANCE)


def test_masks_of_flex_attention():
    """Padding, windows and documents, at the beginning of a text and behind a cache."""
    padding = torch.ones(3, 12).bool()
    padding[1, :4] = padding[2, 6:8] = False
    window = sliding_window_causal_mask_function(5)
    for seen, size in ((0, 12), (7, 5), (11, 1)):
        shape = {"batch_size": 3, "q_length": size, "kv_length": seen + size, "q_offset": seen, "device": "cpu"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.masking_utils.create_block_mask", _uncompiled)
            mask = flex_attention_mask(**shape, mask_function=window, attention_mask=padding[:, : seen + size])
        rows = Told(mask).rows((3, size), seen)
        assert torch.equal(rows.real, padding[:, seen : seen + size])
        assert rows.start is None or not bool(rows.start.any())
    number = numbers(LENGTHS)[0]
    documents = create_block_mask(
        lambda b, h, q, k: (q >= k) & (number[q] == number[k]), None, None, len(number), len(number), device="cpu"
    )
    rows = Told(documents).rows((1, len(number)))
    assert torch.equal(rows.start, (torch.arange(len(number)) - places(LENGTHS)))
    assert bool(rows.real.all())


def _uncompiled(*args, _compile=True, **kwargs):
    return create_block_mask(*args, **kwargs)


def test_chunks_are_no_texts():
    """Llama 4's layers that attend in chunks show their ends as masks show those of texts."""
    chunks = block((4, 4, 4))
    assert Told(chunks, chunk=4).rows((1, 12)).start is None
    assert torch.equal(Told(chunks).rows((1, 12)).start[0], torch.arange(12) // 4 * 4)
    both = block((4, 2, 2, 4))
    assert torch.equal(Told(both, chunk=4).rows((1, 12)).start[0], torch.tensor([0] * 6 + [6] * 6))

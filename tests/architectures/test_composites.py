"""Models that see and hear: their text part is what grows, with images among its tokens or without."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from tiny import EXPERTS, VOCABULARY, assert_same, oracle, snapshot

IMAGE, VIDEO, START, END = 120, 121, 122, 123
LOCUS = {0: [1, 4], 2: [0, 3, 7]}


def build(dtype=torch.float64):
    """Qwen3-VL-MoE: what the vision tower's layers see is added to the residual stream between the lower decoder
    layers."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "max_position_embeddings": 128, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "temporal_patch_size": 1, "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    words = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, vision_end_token_id=END, **words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLMoeForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def batch(dtype=torch.float64):
    """Two texts of 16 tokens, each with an image of 4 x 4 patches, which are 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (2, 16), generator=generator)
    ids[:, 2], ids[:, 3:7], ids[:, 7] = START, IMAGE, END
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(2 * 16, 3 * 4 * 4, generator=generator, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def written():
    """The same texts without their images."""
    ids = batch()["input_ids"].clamp(max=100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CASES = pytest.mark.parametrize("inputs", [batch, written], ids=["with images", "text alone"])


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs, use_cache=False).logits


def test_the_text_part_is_found():
    model = build()
    tree = find_experts(model)
    assert [site.name for site in tree.sites] == [f"model.language_model.layers.{n}.mlp.experts" for n in range(3)]
    assert list(tree.layers) == list(model.model.language_model.layers)
    with pytest.raises(ValueError, match="no dense nodes"):  # and not the vision tower's MLPs
        find_experts(model, "dense")
    assert not torch.allclose(logits(model, batch())[:, 8:], logits(model, written())[:, 8:])


@CASES
def test_map(inputs):
    """Rows and error masses by autograd through the whole model."""
    model = build()
    ids, seen = inputs()["input_ids"], {}
    reference = copy.deepcopy(model)
    for site in find_experts(reference).sites:
        site.base.register_forward_hook(lambda _, args, y, layer=site.layer: seen.update({layer: (*args[1:], y)}))
    predicted = reference(**inputs(), use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum")
    errors = torch.autograd.grad(loss, [y for *_, y in seen.values()])
    emap = measure_errors(model, [inputs()], progress=False)
    for row, (layer, error) in enumerate(zip(seen, errors, strict=True)):
        index, weight, _ = seen[layer]
        assert emap.count[row].tolist() == torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
        mass = torch.zeros(EXPERTS, dtype=torch.float64)
        mass.index_add_(0, index.flatten(), (weight * error.norm(dim=-1, keepdim=True)).flatten().double())
        assert_close(f"layer {layer}", emap.mass[row], mass, "fp64 gradient")


@pytest.mark.slow
@CASES
def test_sweep_equals_autograd(inputs):
    model, given = build(), inputs() | {"labels": inputs()["input_ids"], "use_cache": False}
    wanted = oracle(copy.deepcopy(model), lambda reference: reference(**given).loss, LOCUS)
    model = get_peft_model(model, PCGrowConfig(locus=LOCUS)).train()
    model(**given).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_all_close(found, wanted, "fp64 gradient")


@pytest.mark.slow
def test_grow_on_images(tmp_path):
    model = build(torch.float32)
    inputs = batch(torch.float32)
    before, weights = logits(model, inputs), snapshot(model)
    model = get_peft_model(model, PCGrowConfig(error_map=measure_errors(model, [inputs], progress=False), budget=0.2))
    assert torch.equal(logits(model, inputs), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    after = logits(model, inputs)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)
    again = build(torch.float32)
    assert_same(weights, snapshot(again))
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path), inputs), after)

"""Experts that transformers does not mark: adopted, they do all that others do, and their models stay as they were."""

import copy
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from close import assert_all_close, assert_close
from foreign import FOREIGN, LAYERS, foreign, llama4, own_stacks
from peft_pcgrow import PCGrowConfig, export_flat, find_experts, measure_errors
from peft_pcgrow.architectures.adopted_experts import AdoptedBlock
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.architectures.find import adopt
from peft_pcgrow.maps.error_map import SUMS
from peft_pcgrow.packed.quantize import quantize_experts
from tiny import EXPERTS, assert_same, build, domain, logits, mixed, retain, snapshot, taken, tokens, train

DTYPES = [torch.float32, torch.bfloat16]
EVERY = torch.arange(EXPERTS)
architectures = pytest.mark.parametrize("name", FOREIGN)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def locus(name: str, experts=(1, 4, 6)) -> dict[int, list[int]]:
    return {layer: list(experts) for layer in LAYERS[name]}


def grown(name: str, dtype: torch.dtype = torch.float32, **config) -> PeftModel:
    return get_peft_model(foreign(name, dtype), PCGrowConfig(**{"locus": locus(name)} | config))


def spawned(name: str, dtype: torch.dtype = torch.float32, gate_fpr: float = 0.05) -> PeftModel:
    texts = [domain(64, seed=1)], [retain(64, seed=1)]
    emap = measure_errors(foreign(name), texts[0], retain=texts[1], window=8, gradients=False, progress=False)
    return grown(name, dtype, error_map=emap, grow="spawn", gate_fpr=gate_fpr)


def of_text(base: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = base(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


# ---- adopting


@pytest.mark.slow
@dtypes
@architectures
def test_adopted_model_is_the_same(name, dtype):
    """Parameters, names and logits keep their bits; stacks show what the architecture holds."""
    model = foreign(name, dtype)
    before, out = snapshot(model), logits(model)
    tree = adopt(find_experts(model))
    assert [site.layer for site in tree.sites] == LAYERS[name]
    assert all(site.experts == EXPERTS for site in tree.sites)
    assert all(len(next(site.router.parameters())) >= EXPERTS for site in tree.sites)
    assert torch.equal(logits(model), out)
    assert_same(snapshot(model), before)
    held = own_stacks(name, model, lambda parameter: parameter)
    for site in tree.sites:
        assert_same({name: stack[EVERY] for name, stack in expert_stacks(site.base).items()}, held[site.layer])
    again = find_experts(copy.deepcopy(model))
    assert [site.name for site in again.sites] == [site.name for site in tree.sites]


@pytest.mark.slow
@architectures
def test_training_base_is_the_same(name):
    """Gradients of a model's own parameters are those of one that was not adopted."""
    found, ids = [], tokens()
    for adopted in (False, True):
        model = foreign(name, torch.float64).train()
        if adopted:
            adopt(find_experts(model))
        of_text(model, ids).backward()
        found.append({label: p.grad for label, p in model.named_parameters() if p.grad is not None})
    assert_all_close(found[1], found[0], "fp64 gradient")


def test_adopted_while_it_trains():
    """A router that adds noise gives other bits each time."""
    model = foreign("dbrx").train()
    for block in model.transformer.blocks:
        block.ffn.router.moe_jitter_eps = 0.3
    assert len(adopt(find_experts(model)).sites) == 3
    assert all(module.training for module in model.modules())


@pytest.mark.slow
@architectures
def test_pickled(name):
    """As a process that is started anew gets it."""
    model = grown(name)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


# ---- measuring and training


@pytest.mark.slow
@architectures
def test_map_equals_autograd(name):
    model, ids = foreign(name, torch.float64), tokens()
    other, seen = foreign(name, torch.float64), {}
    of_text(other, ids).backward()
    gradients = own_stacks(name, other, lambda parameter: parameter.grad)
    emap = measure_errors(model, [ids], progress=False)

    def keep(layer):
        def hook(module, args, output):
            output.retain_grad()
            seen[layer] = args[1], args[2], output

        return hook

    for site in find_experts(model).sites:
        site.base.register_forward_hook(keep(site.layer))
    of_text(model.requires_grad_(True), ids).backward()
    for row, layer in enumerate(LAYERS[name]):
        index, weight, output = seen[layer]
        for field, values in zip(SUMS, (torch.ones_like(weight), weight, *_errors(weight, output)), strict=True):
            want = torch.zeros(EXPERTS + 1, dtype=torch.float64).index_add(
                0, index.flatten(), values.flatten().double()
            )
            assert_close(field, getattr(emap, field)[row], want[:EXPERTS], "fp64 gradient")
        norms = sum(stack.flatten(1).square().sum(1) for stack in gradients[layer].values()) ** 0.5
        assert_close("coherent", emap.coherent[row], norms, "fp64 gradient")


def _errors(weight: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    error = weight.abs() * output.grad.norm(dim=-1, keepdim=True)
    return error, error.square()


@pytest.mark.slow
@architectures
def test_sweep_equals_autograd(name):
    """Against the gradients of the architecture's own parameters in a model that was not adopted."""
    other, ids = foreign(name, torch.float64).train(), tokens()
    other(input_ids=ids, labels=ids).loss.backward()
    gradients = own_stacks(name, other, lambda parameter: parameter.grad)
    model = grown(name, torch.float64).train()
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in model.base_model.tuner_layers():
        bank = layer.bank("default")
        want = {stack: gradient[[1, 4, 6]] for stack, gradient in gradients[layer.layer_index].items()}
        assert_all_close({stack: weight.grad for stack, weight in bank.items()}, want, "fp64 gradient")


# ---- bits


@pytest.mark.slow
@dtypes
@architectures
def test_deepened_at_birth(name, dtype):
    base = foreign(name, dtype)
    assert torch.equal(logits(grown(name, dtype)), logits(base))


@pytest.mark.slow
@dtypes
@architectures
def test_spawned_at_birth(name, dtype):
    """Newborns take rows, and the logits keep their bits; trained, they change those of the domain."""
    # four times, so that experts compute multiples of four rows: some CPUs round products of fewer rows differently,
    # and tokens that newborns changed are routed elsewhere further up
    model, ids = spawned(name, dtype), mixed().repeat(4, 1)
    rows = torch.stack(list(taken(model, ids).values()))
    assert rows.any()
    assert not rows.all()
    before = logits(foreign(name, dtype), ids)
    assert torch.equal(logits(model, ids), before)
    train(model, lr=3e-2, texts=domain)
    changed = (logits(model, ids) != before).any(dim=-1)
    untouched = ~torch.stack(list(taken(model, ids).values())).any(dim=0).cumsum(dim=1).bool()
    assert changed.any()
    assert not changed[untouched].any()


@pytest.mark.slow
@dtypes
@architectures
def test_tokens_that_meet_no_located_node_keep_their_bits(name, dtype):
    ids, seen = tokens(8, 24), []
    first = LAYERS[name][0]
    model = grown(name, dtype, locus={first: [2]})
    train(model, lr=0.1)
    (layer,) = model.base_model.tuner_layers()
    layer.register_forward_hook(lambda module, args, output: seen.append((args[1], output)))
    logits(model, ids)
    with model.disable_adapter():
        logits(model, ids)
    (index, after), (_, before) = seen
    meets = (index == 2).any(dim=1)
    assert meets.any()
    assert not meets.all()
    assert torch.equal(before[~meets], after[~meets])
    assert (before[meets] != after[meets]).any(dim=1).all()


# ---- leaving and saving


@pytest.mark.slow
@dtypes
@architectures
def test_merged_and_back(name, dtype):
    """Merging writes the architecture's own parameters; unmerging and disabling give every bit back."""
    model, base = grown(name, dtype), foreign(name, dtype)
    train(model)
    apart = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    grown_state = snapshot(model)
    model.merge_adapter()
    assert_close("merged", logits(model), apart, "fp32" if dtype == torch.float32 else "bf16")
    assert not torch.equal(logits(model), logits(base))
    model.unmerge_adapter()
    assert_same(snapshot(model), grown_state)
    assert torch.equal(logits(model), apart)
    plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(base.state_dict())
    base.load_state_dict(plain.state_dict())
    assert_close("unloaded", logits(base), apart, "fp32" if dtype == torch.float32 else "bf16")


@pytest.mark.slow
@architectures
def test_saved_and_loaded(name, tmp_path):
    """By every loader, bit for bit."""
    foreign(name).save_pretrained(tmp_path / "base")
    kind = type(foreign(name))
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), PCGrowConfig(locus=locus(name)))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model)
    loaded = [PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")]
    loaded.append(kind.from_pretrained(tmp_path / "adapter"))
    if name != "step3p7":  # has no causal LM of its own
        loaded.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
        loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    for each in loaded:
        for parameter in each.parameters():
            # a file's tensors may lie unaligned in memory, where products round differently
            parameter.data = parameter.data.clone()
        assert torch.equal(logits(each), want)
    assert not torch.equal(want, logits(foreign(name)))


@pytest.mark.slow
@architectures
def test_generation_with_a_cache(name):
    """Newborns write the same words with and without a cache."""
    model = spawned(name, torch.float64, gate_fpr=0.15)
    train(model, lr=3e-2, texts=domain)
    model.get_base_model().generation_config.eos_token_id = None
    ids, options = mixed(12), {"max_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, **options), cached)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama4", "step3p7"])
def test_exported(name, tmp_path):
    """Newborns become experts of a plain checkpoint, which the architecture's own code reads."""
    model = spawned(name, gate_fpr=0.4)
    report = export_flat(model, tmp_path / "flat", [mixed()])
    assert report.experts > EXPERTS
    plain = type(model.get_base_model()).from_pretrained(tmp_path / "flat")
    held = {p.shape[0] for label, p in plain.named_parameters() if "experts.gate_up_proj" in label}
    assert held == {report.experts}
    assert not any(isinstance(module, AdoptedBlock) for module in plain.modules())
    assert abs(float(of_text(plain, mixed())) / mixed()[:, 1:].numel() - report.loss_flat) < 1e-4


# ---- packing


@pytest.mark.slow
@architectures
def test_packed(name, tmp_path):
    """Packed, the model computes what the architecture's own code does with the decoded weights, in fewer bytes; it is
    saved, read back and grown."""
    model = foreign(name, torch.float64)
    before = logits(model)
    report = quantize_experts(model)
    # what is no node goes too
    assert report.model_before - report.model_after >= report.experts_before - report.experts_after > 0
    packed, own = logits(model), foreign(name, torch.float64)
    for site, other in zip(find_experts(model).sites, find_experts(own.requires_grad_(False)).sites, strict=True):
        for stack, view in expert_stacks(site.base).items():
            expert_stacks(other.base)[stack].write(EVERY, view[EVERY])
    decoded = foreign(name, torch.float64)
    decoded.load_state_dict(own.state_dict())
    assert_close("packed", packed, logits(decoded), "fp64 across batches")
    assert not torch.equal(packed, before)
    model.save_pretrained(tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), packed)
    loaded = get_peft_model(loaded, PCGrowConfig(locus=locus(name)))
    assert_close("birth", logits(loaded), packed, "fp64")
    train(loaded)
    assert not torch.equal(logits(loaded), packed)


# ---- refused


def test_encoder_decoder():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(vocab_size=128, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **sizes)
    )
    with pytest.raises(ValueError, match="SwitchTransformersSparseMLP: an encoder-decoder has two lists of layers"):
        find_experts(model)


def test_llama4_with_more_experts_for_a_token():
    model = build(llama4, chosen=2)
    before, out, kinds = snapshot(model), logits(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"Llama4TextMoe\) hands each token to 2 experts.*use LoRA"):
        find_experts(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), out)
    assert [type(module) for module in model.modules()] == kinds


def test_block_of_another_version(monkeypatch):
    """A block that does something else than it did is left as it is."""
    theirs = Llama4TextMoe.forward

    def other(self, hidden_states):
        out, scores = theirs(self, hidden_states)
        return 2 * out, scores

    monkeypatch.setattr(Llama4TextMoe, "forward", other)
    model = foreign("llama4")
    out, kinds = logits(model), [type(module) for module in model.modules()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"feed_forward \(Llama4TextMoe\) computes something else in this version"):
            find_experts(model)
    assert torch.equal(logits(model), out)
    assert [type(module) for module in model.modules()] == kinds

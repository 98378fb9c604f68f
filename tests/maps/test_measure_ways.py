"""Maps by other ways of settling, in pieces, after an interruption, and from several processes."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from close import assert_close
from peft_pcgrow import ErrorMap, find_experts, measure_errors
from peft_pcgrow.maps.error_map import FOLDS, OPTIONAL, SUMS
from tiny import ARCHITECTURES, COMMON, PAD, build, domain, retain, tokens


def measured(model, batches, **options):
    return measure_errors(model, batches, progress=False, **options)


def assert_same(one: ErrorMap, other: ErrorMap, kind: str | None = None) -> None:
    """Equal to the bit, or to a tolerance."""
    for name in (*SUMS, "fold_labels", *OPTIONAL):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.equal(a, b) if kind is None else assert_close(name, a, b, kind) is None, name
    assert one.gradient.keys() == other.gradient.keys()
    for name, gradient in one.gradient.items():
        if kind is None:
            assert torch.equal(gradient, other.gradient[name]), name
        else:
            assert_close(name, gradient, other.gradient[name], kind)
    assert (one.labels, one.tokens, one.batches) == (other.labels, other.tokens, other.batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("gradients", [False, True])
def test_direct_map_carries_the_top_error(name, gradients):
    """Against the head's own gradient, spread over the rows of every layer."""
    model, ids = build(name, torch.float64), tokens(4)
    emap = measured(model, ids.split(1), settle="direct", gradients=gradients)
    tree, seen = find_experts(model), {}
    handles = [
        site.module.register_forward_hook(lambda m, args, out, l=site.layer: seen.__setitem__(l, args[1:]))
        for site in tree.sites
    ]
    top = []
    handles.append(tree.layers[-1].register_forward_hook(lambda m, args, out: top.append(out)))
    logits = model(input_ids=ids).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    output = top[0] if isinstance(top[0], torch.Tensor) else top[0][0]
    norm = torch.autograd.grad(loss, output)[0].norm(dim=-1).flatten()
    for handle in handles:
        handle.remove()
    for row, site in enumerate(tree.sites):
        index, weight = seen[site.layer]
        want = torch.zeros(site.experts, dtype=torch.float64)
        want.index_add_(0, index.flatten(), (weight.double().abs() * norm[:, None]).flatten())
        assert_close(f"mass of layer {site.layer}", emap.mass[row], want, "fp64 across batches")
    assert emap.has_parts is gradients


@pytest.mark.slow
def test_direct_map_with_all_layers_exact_is_the_sweep():
    model, ids = build("qwen3_moe", torch.float64), tokens(8)
    exact = measured(model, ids.split(2))
    for options in ({"gradients": True}, {"gradients": False}):
        got = measured(model, ids.split(2), settle="direct", settle_depth=3, **options)
        assert_close("mass", got.mass, exact.mass, "fp64")
    half = measured(model, ids.split(2), settle="direct", settle_depth=1, gradients=False)
    # what reaches the two upper layers has passed through exact ones only
    assert_close("top", half.mass[1:], exact.mass[1:], "fp64")
    assert float((half.mass[0] - exact.mass[0]).abs().max()) > 0
    with pytest.raises(ValueError, match="cannot be added"):
        half + exact


@pytest.mark.slow
def test_relaxed_map_is_the_swept_one_and_counts_hops():
    model = build("qwen3_moe", torch.float64)
    ids = tokens(6, 12)
    mask = torch.ones_like(ids)
    mask[:2, 8:] = 0
    batches = [
        {"input_ids": part.masked_fill(keep == 0, PAD), "attention_mask": keep}
        for part, keep in zip(ids.split(2), mask.split(2), strict=True)
    ]
    exact, relaxed = measured(model, batches), measured(model, batches, settle="relax", settle_tol=1e-9)
    assert_close("mass", relaxed.mass, exact.mass, "fp64 gradient")
    assert_close("coherent", relaxed.coherent, exact.coherent, "fp64 gradient")
    assert exact.hops is None
    assert relaxed.hops.shape == (3, 4)
    assert relaxed.hops.sum(1).tolist() == [float(mask.sum())] * 3
    # the top layer's error is there from the start
    assert relaxed.hops[2].tolist() == [0, float(mask.sum()), 0, 0]
    loose = measured(model, batches, settle="relax", settle_tol=0.5)
    steps = torch.arange(4.0, dtype=torch.float64)
    assert bool(((loose.hops * steps).sum(1) <= (relaxed.hops * steps).sum(1)).all())
    assert (relaxed + relaxed).hops.sum() == 2 * relaxed.hops.sum()


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [[8], [5, 3], [3, 3, 2], [2, 2, 2, 2], [1] * 8])
def test_few_batches_are_cut_so_that_every_fold_has_text(cuts):
    emap = measured(build(), tokens(8).split(cuts))
    assert bool((emap.fold_labels > 0).all())
    assert int(emap.fold_labels.sum()) == emap.labels == 8 * 15
    assert emap.removable().folds == FOLDS


def interrupted(batches, after):
    for number, batch in enumerate(batches):
        if number == after:
            raise KeyboardInterrupt
        yield batch


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "relax", "direct"])
def test_an_interrupted_map_goes_on(settle, tmp_path):
    model, batches = build(), tokens(12).split(2)
    whole = measured(model, batches, settle=settle)
    with pytest.raises(KeyboardInterrupt):
        measured(model, interrupted(batches, 5), settle=settle, checkpoint=tmp_path / "map", checkpoint_every=2)
    found = ErrorMap.load(tmp_path / "map")
    assert found.batches == 4
    runs = []
    handle = find_experts(model).layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    again = measured(model, batches, settle=settle, checkpoint=tmp_path / "map", checkpoint_every=2)
    first = len(runs)
    assert_same(again, whole)
    assert_same(measured(model, batches, settle=settle, checkpoint=tmp_path / "map"), whole)
    handle.remove()
    assert len(runs) == first  # a finished one runs nothing
    with pytest.raises(ValueError, match="holds a measurement of other weights"):
        measured(build(seed=1), batches, settle=settle, checkpoint=tmp_path / "map")


@pytest.mark.slow
def test_gates_of_a_resumed_map_see_all_of_the_text(tmp_path):
    model, batches = build(), tokens(12, 24).split(2)
    kept = retain(12).split(4)
    whole = measured(model, batches, retain=kept, window=4)
    with pytest.raises(KeyboardInterrupt):
        measured(model, interrupted(batches, 4), retain=kept, window=4, checkpoint=tmp_path, checkpoint_every=1)
    again = measured(model, batches, retain=kept, window=4, checkpoint=tmp_path)
    assert torch.equal(again.separation.direction, whole.separation.direction)


def test_labels_of_folds():
    model, ids = build("olmoe", torch.float64), tokens(4, 10)
    emap = measured(model, ids.split(1))
    assert emap.fold_labels.tolist() == [9.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "direct"])
def test_map_of_a_base_in_4_bits(settle, tmp_path):
    """It is close to that of the weights before they were quantized, and the modules' modes are put back."""
    pytest.importorskip("bitsandbytes")
    model = build()
    model.save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit).eval()
    ids = tokens(16, 24).split(4)
    one, other = measured(model, ids, settle=settle), measured(quantized, ids, settle=settle)
    ranks = torch.stack([each.mass.flatten().argsort().argsort().double() for each in (one, other)])
    assert torch.corrcoef(ranks)[0, 1] > 0.7
    assert one.loss == pytest.approx(other.loss, rel=0.05)
    assert not any(module.training for module in quantized.modules())


def test_unknown_ways():
    with pytest.raises(ValueError, match="settle"):
        measured(build(), [tokens()], settle="backprop")
    with pytest.raises(ValueError, match="holds no weight gradients"):
        measured(build(), [tokens()], settle="direct").removable()


def test_layers_that_do_not_run_have_no_gates():
    """Mllama's second layer here attends to images, and there are none: a map has no rows for it, a gate no text."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    settings = {"cross_attention_layers": [1], "intermediate_size": 64, "rope_parameters": rope}
    model = build(lambda: MllamaForCausalLM(MllamaTextConfig(**COMMON, **settings)))
    emap = measure_errors(model, [domain()], gradients=False, progress=False)
    assert emap.count[:, 0].tolist() == [domain().numel(), 0, domain().numel()]
    with pytest.raises(ValueError, match=r"layers \[1\] did not run on the domain text"):
        measure_errors(model, [domain()], retain=[retain()], gradients=False, progress=False)

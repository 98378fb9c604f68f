"""A measurement goes on only from one of the same weights, the same way of measuring and the same text."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from peft_pcgrow import ErrorMap, PCGrowConfig, measure_errors
from peft_pcgrow.maps.map_tensors import to_tensors
from peft_pcgrow.maps.resume import CHUNK, weights_in_use
from tiny import LOCUS, build, domain, spawned, tokens

OTHER = tokens(12, 16, seed=77).split(2)
TEXT = tokens(12, 16).split(2)


def measured(model, batches=TEXT, **options) -> ErrorMap:
    return measure_errors(model, batches, progress=False, **options)


def interrupted(batches, after):
    yield from batches[:after]
    raise KeyboardInterrupt


def assert_same(got: ErrorMap, want: ErrorMap) -> None:
    one, other = to_tensors(got)[0], to_tensors(want)[0]
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert (got.loss, got.labels, got.batches) == (want.loss, want.labels, want.batches)


def grown():
    return get_peft_model(build(), PCGrowConfig(locus=LOCUS)).eval()


def trained(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0)
    return model


def one_weight(model):
    """The least that may change: one weight of the base that nothing trains, by one unit in the last place."""
    weight = model.get_base_model().model.layers[2].mlp.experts.base_layer.down_proj
    with torch.no_grad():
        weight.view(-1).view(torch.int32)[1234] ^= 1
    return model


def exchanged(model):
    """Two experts change places."""
    stack = model.get_base_model().model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        stack.copy_(stack[[1, 0, *range(2, len(stack))]])
    return model


def switched_off(model):
    model.base_model.disable_adapter_layers()
    return model


def fewer_experts(model):
    model.get_base_model().model.layers[1].mlp.gate.top_k = 2
    return model


def another_epsilon(model):
    model.get_base_model().model.norm.variance_epsilon *= 2
    return model


CHANGED = {
    "experts per token": fewer_experts,
    "a norm's epsilon": another_epsilon,
    "trained": trained,
    "one weight": one_weight,
    "exchanged": exchanged,
    "switched off": switched_off,
    "another adapter": lambda model: (model.add_adapter("other", PCGrowConfig(locus=LOCUS)), model)[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", CHANGED)
def test_other_weights(change, finished, tmp_path):
    """A map from before training is not returned after it."""
    model = grown()
    if finished:
        measured(model, checkpoint=tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            measured(model, interrupted(TEXT, 4), checkpoint=tmp_path, checkpoint_every=1)
    before = (tmp_path / "error_map.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds a measurement of other weights .*: remove it, or give another folder"):
        measured(CHANGED[change](model), checkpoint=tmp_path)
    assert (tmp_path / "error_map.safetensors").read_bytes() == before


def test_another_rate_of_the_gates(tmp_path):
    model = spawned().eval()
    measured(model, checkpoint=tmp_path)
    model.set_gate_fpr(0.3)
    with pytest.raises(ValueError, match="other weights"):
        measured(model, checkpoint=tmp_path)


def padded(text: tuple[Tensor, ...]) -> list:
    return [{"input_ids": ids, "attention_mask": (torch.arange(16) < 15).long().expand_as(ids)} for ids in text]


TEXTS = {
    "another": (OTHER, "of other text"),
    "another beginning": ([OTHER[0], *TEXT[1:]], "of other text"),
    "another end": ([*TEXT[:-1], OTHER[-1]], "of other text"),
    "masked": (padded(TEXT), "of other text"),
    "other labels": ([{"input_ids": ids, "labels": ids.masked_fill(ids < 9, -100)} for ids in TEXT], "of other text"),
    "turned round": (TEXT[::-1], "of other text"),
    "other batches": (torch.cat(TEXT).split(3), "of other text"),
    "shorter": (TEXT[:5], "of other text, of more of it"),
    "none": ([], "of other text, of more of it"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TEXTS)
def test_other_text(case, tmp_path):
    model = build()
    measured(model, checkpoint=tmp_path)
    text, message = TEXTS[case]
    with pytest.raises(ValueError, match=f"holds a measurement {message}"):
        measured(model, text, checkpoint=tmp_path)


def test_fewer_tokens(tmp_path):
    model = build()
    measured(model, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="of other text, of more of it"):
        measured(model, max_tokens=64, checkpoint=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"settle": "direct"}, {"gradients": False}, {"sketch_dim": 4}, {"settle": "relax"}]
)
def test_another_way(options, tmp_path):
    model = build()
    measured(model, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="holds a measurement in another way"):
        measured(model, checkpoint=tmp_path, **options)


@pytest.mark.slow
def test_a_map_that_no_measurement_left(tmp_path):
    """As from a version that noted nothing to go on by."""
    model = build()
    emap = measured(model)
    emap.run.clear()
    emap.save(tmp_path)
    with pytest.raises(ValueError, match="holds a measurement of other weights"):
        measured(model, checkpoint=tmp_path)


@pytest.mark.slow
def test_more_text_of_the_same(tmp_path):
    """What is there already is not measured again, and what is added is."""
    model = build()
    with pytest.raises(ValueError, match="no label token"):
        measured(model, [], checkpoint=tmp_path)
    measured(model, TEXT[:4], checkpoint=tmp_path)
    assert_same(measured(model, checkpoint=tmp_path), measured(model))


@pytest.mark.slow
@pytest.mark.parametrize("after", [4, 6])
def test_heldout_text_goes_on_too(after, tmp_path):
    model, held = build(), tokens(8, 16, seed=3).split(1)
    want = measured(model, heldout=held)
    with pytest.raises(KeyboardInterrupt):
        measured(model, heldout=interrupted(held, after + 1), checkpoint=tmp_path, checkpoint_every=2)
    found = ErrorMap.load(tmp_path)
    assert (found.batches, found.heldout.batches) == (6, after)
    assert_same(measured(model, heldout=held, checkpoint=tmp_path), want)
    with pytest.raises(ValueError, match="of other text"):
        measured(model, heldout=held[::-1], checkpoint=tmp_path)
    assert_same(measured(model, checkpoint=tmp_path / "other"), measured(model))


@pytest.mark.slow
def test_trained_again_and_back(tmp_path):
    """The digest is of the weights themselves: what has the same bits may go on, in another object too."""
    first = measured(grown(), checkpoint=tmp_path)
    assert_same(measured(grown(), checkpoint=tmp_path), first)


def test_digest_of_weights_beyond_one_chunk():
    """Every weight counts, with its place, in any memory layout."""
    model = torch.nn.Linear(CHUNK // 4, 5)
    digests = {weights_in_use(model)}
    for row, column in ((0, 0), (4, -1)):
        with torch.no_grad():
            model.weight[row, column] += 1
        digests.add(weights_in_use(model))
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))
    digests.add(weights_in_use(model))
    assert len(digests) == 4
    model.weight.data = model.weight.data.T.contiguous().T
    assert weights_in_use(model) in digests


@pytest.mark.slow
def test_domain_text_resumes_with_gates(tmp_path):
    model = build()
    kept = {"retain": tokens(12, 24, seed=9).split(4), "window": 4}
    text = domain(12, 24).split(4)
    want = measured(model, text, **kept)
    measured(model, text, checkpoint=tmp_path, **kept)
    assert_same(measured(model, text, checkpoint=tmp_path, **kept), want)

"""Packed texts: what is measured of them is what is measured text by text, and the model sees the batch as it came."""

from functools import cache

import pytest
import torch

from close import assert_close
from peft_pcgrow import measure_errors
from peft_pcgrow.compress.calibrate import calibrate
from peft_pcgrow.maps.batches import _cut, read_batch
from tiny import build, domain, retain

TOLERANCE = "fp64 across batches"
LENGTHS = (14, 9, 12, 4, 15, 10, 8, 11)


def texts(words, seed):
    return [row[:length] for row, length in zip(words(len(LENGTHS), 16, seed), LENGTHS, strict=True)]


def block(lengths):
    """Each token may attend to those before it in its own text, `[1, 1, N, N]`."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((number[:, None] == number) & torch.ones(len(number), len(number)).bool().tril())[None, None]


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


def places(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def numbers(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()


# what says where texts begin
SAID = {
    "positions": lambda n: {"position_ids": places(n)},
    "positions jump ahead": lambda n: {"position_ids": places(n) + 40 * numbers(n).long()},
    "flash attention's arguments": lambda n: {
        "position_ids": places(n),
        "cu_seq_lens_q": ends(n),
        "cu_seq_lens_k": ends(n),
        "max_length_q": max(n),
        "max_length_k": max(n),
        "seq_idx": numbers(n),
    },
    "a mask, positions run on": lambda n: {"attention_mask": block(n)},
    "an additive mask": lambda n: {"attention_mask": additive(block(n)), "position_ids": places(n)},
    "masks by name": lambda n: {"attention_mask": {"full_attention": block(n)}, "position_ids": places(n)},
}


def pack(texts, said):
    return {"input_ids": torch.cat(texts)[None], **SAID[said]([len(text) for text in texts])}


@cache
def apart():
    ours, theirs = ([text[None] for text in texts(words, 3)] for words in (domain, retain))
    model = build(dtype=torch.float64)
    found = measure_errors(model, ours, retain=theirs, window=6, gradients=False, progress=False)
    return found, calibrate(model, {"domain": ours}, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("said", [said for said in SAID if said != "masks by name"])
def test_as_text_by_text(said):
    model, (want, swept) = build(dtype=torch.float64), apart()
    # two packed rows
    ours, theirs = (
        [pack(texts(words, 3)[half], said) for half in (slice(0, 5), slice(5, 8))] for words in (domain, retain)
    )
    got = measure_errors(model, ours, retain=theirs, window=6, gradients=False, progress=False)
    assert (got.labels, got.tokens) == (want.labels, want.tokens) == (sum(LENGTHS) - len(LENGTHS), sum(LENGTHS))
    assert_close("loss", torch.tensor(got.loss), torch.tensor(want.loss), TOLERANCE)
    assert torch.equal(got.count, want.count)
    assert_close("mass", got.mass, want.mass, TOLERANCE)
    for name in ("direction", "law", "threshold"):
        assert_close(name, getattr(got.separation, name), getattr(want.separation, name), "fp32 ill-conditioned solve")
    assert torch.equal(got.separation.retain_rows, want.separation.retain_rows)
    again = calibrate(model, {"domain": ours}, progress=False)
    assert again.labels == swept.labels
    assert_close("losses", torch.tensor(again.losses), torch.tensor(swept.losses), TOLERANCE)


def test_losses_are_the_models_own():
    """Labels as a packing loader gives them; the map's loss is the one that the model returns."""
    ids = pack(texts(domain, 5), "positions")
    labels = ids["input_ids"].masked_fill(ids["position_ids"] == 0, -100)
    model = build(dtype=torch.float64)
    with torch.no_grad():
        loss = model(**ids, labels=labels, use_cache=False).loss
    emap = measure_errors(model, [{**ids, "labels": labels}], gradients=False, progress=False)
    assert_close("loss", torch.tensor(emap.loss / emap.labels), loss, "fp64 across batches")


@pytest.mark.parametrize("said", SAID)
def test_the_model_sees_what_was_given(said):
    batch = pack(texts(domain, 5), said)
    read = read_batch({**batch, "labels": batch["input_ids"]}, torch.device("cpu"))
    assert read.inputs.keys() == batch.keys()
    assert all(read.inputs[name] is batch[name] or name == "attention_mask" for name in batch)
    assert bool(read.real.all())
    assert torch.equal(read.target, batch["input_ids"])  # the loader's own labels are kept
    unlabelled = read_batch(batch, torch.device("cpu"))
    first = torch.cat([torch.arange(length) == 0 for length in LENGTHS])[None]
    assert torch.equal(unlabelled.target == -100, first)


@pytest.mark.parametrize("kind", ["bool", "additive", "by name"])
def test_padding_under_masks_of_four_dimensions(kind):
    """Left padding, and a text that goes on after padding in its middle."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]]).bool()
    mask = (torch.ones(6, 6).bool().tril() & real[:, None] & real[:, :, None])[:, None]
    given = {"bool": mask, "additive": additive(mask), "by name": {"full": mask, "sliding": mask & ~mask.tril(-2)}}
    read = read_batch({"input_ids": domain(2, 6), "attention_mask": given[kind]}, torch.device("cpu"))
    assert torch.equal(read.real, real)
    assert read.rows.start is None


def test_a_sliding_window_is_no_border():
    window = torch.ones(6, 6).bool().tril() & torch.ones(6, 6).bool().triu(-1)
    read = read_batch({"input_ids": domain(2, 6), "attention_mask": window[None, None]}, torch.device("cpu"))
    assert read.rows.start is None


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, ValueError, r"must end at the number of tokens \(6\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 6])}, ValueError, "contradict"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 2, 3, 6]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
            ValueError,
            "contra",
        ),
        ({"attention_mask": "causal"}, TypeError, "mask of str does not tell"),
        ({"attention_mask": torch.ones(1, 6, 6)}, TypeError, "of 3 dimensions"),
        ({"attention_mask": torch.ones(1, 4)}, ValueError, "does not fit 1 rows of 6"),
    ],
)
def test_contradictions_are_refused(wrong, error, said):
    batch = {"input_ids": domain(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), **wrong}
    with pytest.raises(error, match=said):
        read_batch(batch, torch.device("cpu"))


def test_only_rows_are_cut():
    """A batch is cut between its rows where everything in it has one for each."""
    rows = {"input_ids": domain(3, 6), "attention_mask": torch.ones(3, 6), "use_cache": False}
    assert [len(piece.target) for piece in _cut(read_batch(rows, torch.device("cpu")), 3)] == [1, 1, 1]
    for more in (
        {"position_ids": torch.zeros(3, 3, 6).long()},
        {"pixel_values": torch.ones(3, 4)},
        {"cu_seq_lens_q": torch.tensor([0, 9, 18])},
        {"attention_mask": {"full": torch.ones(3, 1, 6, 6).bool().tril()}},
    ):
        assert len(_cut(read_batch({**rows, **more}, torch.device("cpu")), 3)) == 1

"""The verdict on held-out text: what was learned, what was only memorised, and what an untrained model knows."""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from close import assert_close
from peft_pcgrow import ErrorMap, Locus, measure_errors
from peft_pcgrow.maps.diagnosis import CORPUS, COVERED_STEP, HELD_OUT, context_free, judge, on_heldout
from peft_pcgrow.maps.error_map import SUMS
from tiny import VOCABULARY, build, tokens

WORDS = 57


def counting(rows: int, seed: int, chance: float) -> Tensor:
    """Texts of a language whose words count up by 1, or by 7 with some chance, `[rows, 24]`."""
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(0, WORDS, (rows,), generator=generator)]
    for _ in range(23):
        step = torch.where(torch.rand(rows, generator=generator) < chance, 7, 1)
        words.append((words[-1] + step) % WORDS)
    return torch.stack(words, 1) + 3


def fit(model: PreTrainedModel, texts: Tensor, steps: int) -> PreTrainedModel:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    batches = texts.split(8)
    for step in range(steps):
        ids = batches[step % len(batches)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def measured(model, texts, heldout=None, **options) -> ErrorMap:
    return measure_errors(model, texts, heldout=heldout, progress=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [True, False])
def test_memorised_text_is_not_covered(gradients):
    """By itself it looks covered, and says that it may; held-out text tells."""
    few, held = counting(8, 1, 0.2), counting(32, 2, 0.2)
    emap = measured(fit(build(), few, 60), few, held, gradients=gradients)
    found = emap.diagnosis
    assert found.verdict == "memorised"
    assert found.text == HELD_OUT
    assert found.corpus_loss < 0.2 < found.loss
    assert str(found).startswith("memorised, of held-out text: loss ")
    assert f"of the corpus {found.corpus_loss:.3f}, by word frequencies {found.context_free:.3f}" in str(found)
    emap.heldout = None
    assert emap.diagnosis.verdict == "covered"
    assert emap.diagnosis.text == CORPUS
    assert "may have been trained on" in str(emap)


@pytest.mark.slow
def test_learned_text_is_covered():
    """The same length of training on many texts of a language that can be learned: held-out text is predicted too."""
    many, held = counting(512, 3, 0.0), counting(32, 4, 0.0)
    found = measured(fit(build(), many, 96), many[:32], held, gradients=False).diagnosis
    assert found.verdict == "covered"
    assert found.loss < found.covered_below


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("scale", [0.02, 0.15])
def test_untrained_model_covers_nothing(scale, gradients):
    texts, held = counting(8, 1, 0.2), counting(32, 2, 0.2)
    model = build(initializer_range=scale)
    for emap in (measured(model, texts, held, gradients=gradients), measured(model, texts, gradients=gradients)):
        assert emap.diagnosis.verdict == "unlearned"
        assert emap.diagnosis.loss > emap.diagnosis.context_free


def leaving_out(labels: list[int], vocabulary: int) -> float:
    """Each label predicted from the others, one at a time."""
    single = sum(labels.count(word) == 1 for word in set(labels)) / len(labels)
    total = 0.0
    for place, word in enumerate(labels):
        others = labels[:place] + labels[place + 1 :]
        seen = others.count(word)
        total -= math.log((1 - single) * seen / len(others) if seen else single / vocabulary)
    return total / len(labels)


@pytest.mark.parametrize("count", [7, 40, 900])
def test_loss_of_word_frequencies(count):
    labels = (torch.randint(0, 30, (count,), generator=torch.Generator().manual_seed(count)) ** 2 // 30).tolist()
    words = torch.bincount(torch.tensor(labels), minlength=50).double()
    assert context_free(words) == pytest.approx(min(leaving_out(labels, 50), math.log(50)), rel=1e-9)


def test_loss_of_word_frequencies_of_known_texts():
    """Words that come once are guessed; of a long text it is the entropy; it is never more than a guess."""
    assert context_free(torch.ones(40).double()) == pytest.approx(math.log(40))
    assert context_free(torch.tensor([5000.0] * 8 + [0] * 92)) == pytest.approx(math.log(8), rel=1e-3)
    assert context_free(torch.tensor([1.0] * 5 + [0] * 95)) == pytest.approx(math.log(100))
    assert context_free(torch.zeros(10)) == pytest.approx(math.log(10))
    assert context_free(torch.tensor([90.0, 0.0])) == pytest.approx(0)


def test_words_are_those_of_the_labels():
    ids = tokens(6, 12)
    labels = ids.masked_fill(torch.arange(12) < 5, -100)
    emap = measured(build(), [{"input_ids": ids, "labels": labels}])
    assert torch.equal(emap.words, torch.bincount(ids[:, 5:].flatten(), minlength=VOCABULARY).double())


# ---- held-out text in a map


def assert_same(got: ErrorMap, want: ErrorMap) -> None:
    assert (got.labels, got.tokens, got.batches) == (want.labels, want.tokens, want.batches)
    for name in (*SUMS, "words"):
        assert_close(name, getattr(got, name), getattr(want, name), "fp64 across batches")
    for name, gradient in got.gradient.items():
        assert_close(name, gradient, want.gradient[name], "fp64 across batches")


@pytest.mark.slow
def test_heldout_text_is_measured_as_a_corpus_and_kept_apart(tmp_path):
    model, text, held = build(dtype=torch.float64), tokens(8).split(2), tokens(8, 12, seed=5).split(2)
    both, alone = measured(model, text, held), measured(model, text)
    assert_same(both, alone)
    assert_same(both.heldout, measured(model, held))
    both.save(tmp_path)
    again = ErrorMap.load(tmp_path)
    assert_same(again.heldout, both.heldout)
    assert again.diagnosis == both.diagnosis
    assert alone.heldout is None
    # sums: maps add up, and rows of layers are those of both texts
    more = measured(model, tokens(8, 16, seed=8).split(2), tokens(8, 16, seed=9).split(2))
    assert torch.equal((both + more).heldout.mass, both.heldout.mass + more.heldout.mass)
    assert torch.equal((both + more).words, both.words + more.words)
    assert torch.equal(both.restrict((1,)).heldout.mass, both.heldout.mass[1:2])
    with pytest.raises(ValueError, match="only one has held-out text"):
        both + alone
    # at most as many tokens of it
    assert measured(model, text, held, max_tokens=20).heldout.tokens == 24
    reference = measured(model, text, held)
    assert both.diagnose(reference).verdict == "covered"


@pytest.mark.slow
def test_heldout_text_on_pages_and_in_tables(tmp_path):
    model = build()
    emap = measured(model, tokens(8).split(2), tokens(8, seed=5).split(2))
    emap.page(tmp_path / "map.html", locus=Locus({1: [2]}))
    assert "of held-out text" in (tmp_path / "map.html").read_text(encoding="utf-8")
    assert emap.scalars("")["heldout_loss"] == pytest.approx(emap.heldout.loss / emap.heldout.labels)
    table = emap.to_pandas()
    assert torch.equal(torch.tensor(table["heldout_error"].to_numpy()), emap.heldout.mass.flatten())


def test_heldout_text_that_is_none():
    ids = tokens(8).split(2)
    with pytest.raises(ValueError, match="heldout is the corpus itself"):
        measured(build(), ids, ids)
    with pytest.raises(ValueError, match="the held-out text has no label token"):
        measured(build(), ids, [])


@pytest.mark.parametrize(
    ("corpus", "held", "want"),
    [
        ((4.0, 0.02), (4.1, 0.02), "distributed"),  # never seen
        ((2.5, 0.002), (3.2, 0.001), "covered"),  # learned, of which held-out text is a little worse
        ((1.4, 0.006), (5.1, 0.02), "memorised"),  # not quite exhausted, and of no use beyond itself
        ((1.4, 0.002), (1.7, 0.02), "memorised"),  # exhausted
        ((1.4, 0.002), (1.5, 0.02), "distributed"),
        ((9.0, 0.001), (9.0, 0.001), "unlearned"),
    ],
)
def test_two_texts_one_verdict(corpus, held, want):
    """Losses of corpus and held-out text, and the share of each that a step would remove."""
    flat = torch.ones(4, 10)
    one, other = (
        judge((0, 1, 2, 3), loss, 1000, flat, flat, share * loss / COVERED_STEP, frequencies=6.0)
        for loss, share in (corpus, held)
    )
    found = on_heldout(other, one)
    assert (found.verdict, found.text, found.loss, found.corpus_loss) == (want, HELD_OUT, held[0], corpus[0])

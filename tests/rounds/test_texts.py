"""Windows of texts that come in turns: every part that something is fitted or measured on has all of them."""

import pytest
import torch

from peft_pcgrow.maps.fit_gates import is_held_out
from peft_pcgrow.rounds.texts import Texts, drawn, drawn_alike, read_texts, to_fit_anew


@pytest.mark.parametrize("sources", [2, 3, 4, 5])
def test_sources_that_come_in_turn_are_in_every_part(sources):
    """Half of the retain text is fitted on, of which a map takes some, of which one in four sets the thresholds."""
    windows = torch.arange(96 * sources).unsqueeze(1).expand(-1, 4) + 1000
    texts = read_texts(
        [[1, 2, index] for index in range(64)], [[3, 4, index] for index in range(8)], windows, None, 4, 8
    )

    def of(some) -> set[int]:
        return {int(text["input_ids"][0] - 1000) % sources for text in some}

    (fit,), (watch,) = texts.fit.values(), texts.watch.values()
    fitted = drawn_alike(texts.fit, 40 * sources)
    thresholds = [text for place, text in enumerate(fitted) if is_held_out(place)]
    directions = [text for place, text in enumerate(fitted) if not is_held_out(place)]
    assert all(len(of(some)) == sources for some in (fit, watch, directions, thresholds))
    both = [int(text["input_ids"][0]) for text in (*fit, *watch)]
    assert sorted(both) == windows[:, 0].tolist()


def test_drawing_is_without_repetition_and_always_the_same():
    texts = [{"input_ids": torch.tensor([index])} for index in range(20)]
    some = [int(text["input_ids"]) for text in drawn(texts, 12)]
    assert len(set(some)) == 12
    assert some == [int(text["input_ids"]) for text in drawn(texts, 12)]
    assert sorted(int(text["input_ids"]) for text in drawn(texts)) == list(range(20))


@pytest.mark.parametrize(("window", "length"), [(3, 6), (0, 10), (64, 10)])
def test_gates_are_fitted_anew_on_many_beginnings(window, length):
    """Three for each whole window, or all that there are, of each text as many."""
    rows = [{"input_ids": torch.arange(10) + 10 * index} for index in range(40)]
    texts = Texts(rows[:20], [], {"few": rows[20:22], "many": rows[22:]}, {})
    for batches, given, count in zip(
        to_fit_anew(texts, 4, window, 4), (range(20), range(20, 30)), (16, 10), strict=True
    ):
        # batches of four are of one length each
        found = [ids for batch in batches for ids in batch["input_ids"]]
        starts = [int(ids[0]) // 10 for ids in found]
        assert len(set(starts)) == len(starts) == count
        assert set(starts) <= set(given)
        for place, (ids, start) in enumerate(zip(found, starts, strict=True)):
            assert torch.equal(ids, rows[start]["input_ids"][: 10 if place < 4 else length])


def test_beginnings_of_chats_hold_what_is_learned():
    """After a prompt that is no label, as many tokens as without one."""
    labels = torch.tensor([-100] * 6 + [7] * 6)
    texts = Texts(
        [{"input_ids": torch.arange(12), "labels": labels}] * 2, [], {"chat": [{"input_ids": torch.arange(12)}] * 2}, {}
    )
    domain, retain = to_fit_anew(texts, 1, 2, 1)
    assert [batch["input_ids"].shape[1] for batch in (*domain, *retain)] == [12, 10, 12, 4]

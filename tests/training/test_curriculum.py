"""Examples come in the order of their losses, computed one by one in fp64, within windows."""

import datasets
import pytest
import torch
from peft import PeftModel
from test_bad_input import facts
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments

from close import assert_close
from peft_pcgrow import order_by_surprisal
from tiny import ARCHITECTURES, VOCABULARY, assert_same, build, domain, grown, snapshot, spawned, tokens, train

COUNT = 23


def examples(count: int = COUNT) -> list[dict]:
    """Texts of 2 to 16 tokens; some have labels for their last tokens only."""
    found = []
    for i, ids in enumerate(tokens(count, 16, seed=3)):
        ids = ids[: 2 + (7 * i) % 15].tolist()
        labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
        found.append({"input_ids": ids, "labels": labels} if i % 3 else {"input_ids": ids})
    return found


@torch.no_grad()
def alone(model: nn.Module, data: list[dict]) -> Tensor:
    """Mean of -log p of each example's labels, without batches, padding or library losses."""
    found = []
    for example in data:
        ids, labels = example["input_ids"], example.get("labels", example["input_ids"])
        chances = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        terms = [-chances[place - 1, labels[place]] for place in range(1, len(ids)) if labels[place] != -100]
        found.append(torch.stack(terms).mean())
    return torch.stack(found)


def order(data, model, **options) -> tuple[list[int], Tensor]:
    """Where in `data` the examples returned are from, and their surprisals."""
    chosen, surprisal = order_by_surprisal(data, model, return_surprisal=True, progress=False, **options)
    return [next(i for i, example in enumerate(data) if example is one) for one in chosen], surprisal


def by_value(values: list[float], sign: float = 1.0) -> list[int]:
    return [i for _, i in sorted((sign * value, i) for i, value in enumerate(values))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_surprisals_are_those_of_each_example_alone(name):
    model, data = build(name, torch.float64), examples()
    want = alone(model, data)
    for size in (1, 5, COUNT):
        found, surprisal = order(data, model, batch_size=size)
        assert found == by_value(want.tolist())
        assert_close(f"batches of {size}", surprisal, want[found], "fp64 across batches")
        assert (surprisal.diff() >= 0).all()
    found, surprisal = order(data, model, descending=True)
    assert found == by_value(want.tolist(), -1.0)
    assert (surprisal.diff() <= 0).all()


def left_padded(batch: list[dict]) -> dict[str, Tensor]:
    """To 20 tokens, with masks."""
    rows: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in batch:
        ids = list(example["input_ids"])
        free = 20 - len(ids)
        rows["input_ids"].append([5] * free + ids)
        rows["attention_mask"].append([0] * free + [1] * len(ids))
        rows["labels"].append([-100] * free + list(example.get("labels", ids)))
    return {name: torch.tensor(values) for name, values in rows.items()}


def test_padding_does_not_matter():
    model, data = build(dtype=torch.float64), examples()
    found, want = order(data, model, batch_size=4)
    again, got = order(data, model, batch_size=6, collator=left_padded)
    assert again == found
    assert_close("padded on the left", got, want, "fp64 across batches")
    masked = [{name: column[0] for name, column in left_padded([example]).items()} for example in data]
    again, got = order(masked, model, batch_size=6)
    assert again == found
    assert_close("padded in the dataset", got, want, "fp64 across batches")


def test_training_mode_and_gradients_play_no_part():
    """With dropout, and gradients that the caller wants."""
    model, data, graphs = build(attention_dropout=0.5), examples(), []
    want = alone(model, data)
    model.train().lm_head.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    found, surprisal = order(data, model)
    assert_close("surprisal", surprisal, want[found], "fp32")
    assert graphs
    assert not any(graphs)


def test_bf16():
    model, data = build(dtype=torch.bfloat16), examples()
    found, surprisal = order(data, model)
    assert surprisal.dtype == torch.float64
    assert_close("bf16", surprisal, alone(build(dtype=torch.float64), data)[found], "bf16")


@pytest.mark.slow
def test_ties_keep_the_order_of_the_dataset():
    data = [example for one in examples(6) for example in (one, dict(one), dict(one))]
    for descending in (False, True):
        found, _ = order(data, build(dtype=torch.float64), batch_size=1, descending=descending)
        assert sorted(found) == list(range(18))
        assert all(found[k] + 1 == found[k + 1] == found[k + 2] - 1 for k in range(0, 18, 3))


# ---- the growing branch


def branch() -> PeftModel:
    model = grown()
    train(model, steps=3, lr=3e-2, texts=domain)
    return model


@pytest.mark.slow
def test_the_grown_model_counts():
    model, data = branch(), examples()
    with_branch = alone(model, data)
    with model.disable_adapter():
        base = alone(model, data)
        found, surprisal = order(data, model, relative=True)
    assert_close("no active branch: plain", surprisal, base[found], "fp32")
    found, surprisal = order(data, model)
    assert_close("plain", surprisal, with_branch[found], "fp32")
    found, surprisal = order(data, model, relative=True)
    assert (with_branch - base).abs().max() > 0.01
    assert float((surprisal - (with_branch - base)[found]).abs().max()) < 1e-5
    assert found == by_value((with_branch - base).tolist())
    bare = build()
    assert_close("no adapter: plain", order(data, bare, relative=True)[1], order(data, bare)[1], "fp64")


@pytest.mark.slow
@pytest.mark.parametrize("make", [grown, spawned])
def test_at_birth_nothing_has_been_learnt(make):
    found, surprisal = order(examples(), make(), relative=True)
    assert found == list(range(COUNT))
    assert not surprisal.any()


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_the_model_is_left_as_it_was(monkeypatch, relative, fails):
    """Part in training, a frozen active adapter, a gradient at hand, and the caller's random state."""
    model = branch().train()
    model.base_model.model.model.layers[1].eval()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    before, weights, state = facts(model), snapshot(model), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    if fails:
        # the second forward is that of the first batch without the adapter, or of the second batch
        head, calls = model.base_model.model.lm_head, []
        whole = head.forward
        monkeypatch.setattr(head, "forward", lambda x: calls.append(1) or (whole(x) if len(calls) < 2 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            order(examples(), model, relative=relative)
    else:
        order(examples(), model, relative=relative)
    assert facts(model) == before
    assert_same(weights, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)
    left = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, left, strict=True))


@pytest.mark.slow
def test_a_merged_branch_has_no_base():
    model = branch()
    want = order(examples(), model)
    model.merge_adapter()
    weights = snapshot(model)
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\)"):
        order(examples(), model, relative=True)
    assert order(examples(), model)[0] == want[0]
    assert_same(weights, snapshot(model))


# ---- windows


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 4, 23, 100])
def test_windows_keep_their_order(window):
    model, data = build(dtype=torch.float64), examples()
    want = alone(model, data).tolist()
    found, _ = order(data, model, window=window)
    spans = [range(start, min(start + window, COUNT)) for start in range(0, COUNT, window)]
    assert found == [i for span in spans for i in sorted(span, key=lambda i: want[i])]


# ---- datasets


def test_kinds_of_datasets():
    model, data = build(), examples()
    found, want = order(data, model, window=7)

    class Mapped(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, i: int) -> dict:
            return data[i]

    theirs = datasets.Dataset.from_list([{"labels": None, **one, "row": i} for i, one in enumerate(data)])
    chosen, surprisal = order_by_surprisal(theirs, model, window=7, return_surprisal=True, progress=False)
    assert isinstance(chosen, datasets.Dataset)
    assert chosen["row"][:] == found
    assert torch.equal(surprisal, want)
    chosen = order_by_surprisal(Mapped(), model, window=7, progress=False)
    assert isinstance(chosen, Subset)
    assert list(chosen.indices) == found
    ids = tokens(9, 12)
    rows = order_by_surprisal(ids, model, progress=False)
    assert torch.equal(rows, torch.stack(order_by_surprisal(list(ids), model, progress=False)))
    assert order_by_surprisal([], model, progress=False) == []


def fit(dataset, model: nn.Module, folder, **settings) -> list[Tensor]:
    """Train for an epoch and more; the batches in the order they came."""
    seen = []

    def collate(batch: list[dict]) -> dict[str, Tensor]:
        found = left_padded(batch)
        seen.append(found["input_ids"])
        return found

    arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **settings}
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, learning_rate=1e-2, **arguments)
    Trainer(model=model, args=args, train_dataset=dataset, data_collator=collate).train()
    return seen


@pytest.mark.slow
def test_a_sequential_trainer_keeps_the_order(tmp_path):
    model, data = grown(), examples(16)
    chosen = order_by_surprisal(data, model, progress=False)
    seen = fit(chosen, model, tmp_path, num_train_epochs=1, train_sampling_strategy="sequential")
    assert torch.equal(torch.cat(seen), left_padded(chosen)["input_ids"])


# ---- what is refused


def test_examples_without_a_finite_surprisal_are_named():
    data, model = examples(), build()
    for bad in ({"input_ids": [7]}, {"input_ids": []}, {"input_ids": [7, 8], "labels": [-100, -100]}):
        with pytest.raises(ValueError, match="example 13 has no label token"):
            order([*data[:13], bad, *data[13:]], model)
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1] = float("nan")
    clean = [{"input_ids": [i % 120 for i in one["input_ids"]]} for one in data]
    order(clean, model)
    for window in (None, 6):
        clean[17] = {"input_ids": [5, VOCABULARY - 1, 6, 7]}
        with pytest.raises(FloatingPointError, match="loss of example 17 is nan"):
            order(clean, model, window=window)


IDS = [5, 6, 7]
REFUSED = {
    "batch_size": ({"batch_size": 0}, None, ValueError, "batch_size must be a whole number"),
    "window": ({"window": 2.0}, None, ValueError, "window must be a whole number"),
    "stream": ({}, iter([]), TypeError, "has none: give a list of it"),
    "splits": ({}, {"train": []}, TypeError, r"give one of its splits \(train\)"),
    "text": ({}, [{"text": "a"}], ValueError, "example 0 has no input_ids, only"),
    "shape": ({}, [[IDS, IDS]], ValueError, r"example 0 needs input_ids of shape \[S\]"),
    "labels": ({}, [{"input_ids": IDS, "labels": [5]}], ValueError, r"example 0 has \(1,\) labels to \(3,\) input_ids"),
    "prerequisites": ({"prerequisites": {0: [1]}}, None, TypeError, "prerequisites=...\\) is gone: order the examples"),
    "live": ({"live": True}, None, TypeError, "live=...\\) is gone: call order_by_surprisal again"),
    "packed": ({"collator": lambda b: {"input_ids": [b[0] + b[1]]}}, [IDS, IDS], ValueError, "made 1 rows of 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case):
    options, dataset, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        order_by_surprisal([IDS] if dataset is None else dataset, build(), progress=False, **options)


def test_progress(capsys):
    order_by_surprisal(examples(), build())
    out, err = capsys.readouterr()
    assert not out
    assert "measuring surprisal" in err
    order_by_surprisal(examples(), build(), progress=False)
    assert capsys.readouterr().err == ""

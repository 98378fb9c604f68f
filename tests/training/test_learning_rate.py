"""A rate that is found: against closed forms, and against losses of steps taken by hand."""

import copy
import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_lr
from peft_pcgrow.training.learning_rate import FIRST, SHARE, TRIES, best_step
from tiny import LOCUS, build, domain, grown, snapshot, spawned

EMBEDDED = Path(__file__).parents[2] / "examples" / "embedded-moe"


@pytest.mark.parametrize("minimum", [FIRST * 1.1, 0.003, 0.05, 1.7])
def test_the_minimum_of_a_parabola(minimum):
    asked = []

    def loss(step: float) -> float:
        asked.append(step)
        return 3.0 + 2.0 * (step - minimum) ** 2

    assert best_step(loss) == pytest.approx(minimum, rel=1e-6)
    assert len(asked) <= 2 + TRIES


def test_what_has_no_minimum():
    assert best_step(lambda step: -step if step < 0.1 else math.nan) == pytest.approx(FIRST * 256)
    assert best_step(lambda step: -step) > 1
    # what flips at short steps, by a route or by rounding, does not end the search
    noise = {FIRST: 2e-4, 2 * FIRST: 3e-4, 4 * FIRST: 3e-4}
    assert best_step(lambda step: 5 + noise.get(step, (step - 0.3) ** 2 - 0.09)) == pytest.approx(0.3, rel=1e-6)
    with pytest.raises(ValueError, match="no step along the first update lowers the loss"):
        best_step(lambda step: step)
    with pytest.raises(ValueError, match="no step"):
        best_step(lambda step: math.nan if step else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: grown(locus=LOCUS), lambda: spawned(gate_fpr=0.3, lora=LoraConfig(
    r=2, target_modules=["q_proj"], lora_dropout=0.1))], ids=["deepen", "spawn"])  # fmt: skip
def test_nothing_else_changes(make):
    model = make().eval()
    model.get_base_model().model.layers[0].train()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before, modes = snapshot(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert find_lr(model, [domain(seed=1), domain(seed=2)]) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None or bool((p.grad == 1).all()) for p in model.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_it_is_a_share_of_the_best_step():
    """On a trained model, the loss after a step of that length, taken by the optimizer itself, is lower than after a
    third and three times of it."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    text = tokenizer("\n".join(topics[name] for name in sorted(topics)[:12]))["input_ids"]
    texts = torch.tensor(text[: 16 * 96]).view(2, 8, 96)
    model = get_peft_model(base, PCGrowConfig(select="random", budget=0.25))
    best = find_lr(model, [*texts]) / SHARE
    found = {}
    for length in (0.0, best / 3, best, 3 * best):
        other = copy.deepcopy(model).train()
        optimizer = create_pcgrow_optimizer(other, lr=length)
        other(input_ids=texts[0], labels=texts[0]).loss.backward()
        optimizer.step()
        with torch.no_grad():
            found[length] = float(other.eval()(input_ids=texts[1], labels=texts[1]).loss)
    assert min(found, key=found.get) == best
    assert found[best] < found[0.0]


@pytest.mark.slow
def test_protection_leaves_the_rate_as_it_is():
    """A first step off the protected directions may go much farther than those that follow."""
    model, plain = (spawned(dtype=torch.float64, autocast=False, gate_fpr=0.3, protect=share) for share in (0.9, 0.0))
    texts = [domain(16, seed=1), domain(16, seed=2)]
    assert all(layer.is_protected("default") for layer in model.base_model.tuner_layers())
    assert find_lr(model, texts) == find_lr(plain, texts)


@pytest.mark.slow
def test_a_data_loader_draws_nothing():
    loader = torch.utils.data.DataLoader(torch.cat([domain(seed=1), domain(seed=2)]), batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    find_lr(grown(locus=LOCUS), loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_unbatched_text_and_several_halves():
    model = grown(locus=LOCUS)
    whole = torch.cat([domain(seed=1), domain(seed=2), domain(seed=3)])
    assert find_lr(model, whole, batch_size=8) == find_lr(model, list(whole.split(8)))


def test_refused():
    with pytest.raises(ValueError, match="needs 2 at least, got 1"):
        find_lr(grown(locus=LOCUS), [domain()])
    with pytest.raises(ValueError, match="no grown expert of this model trains"):
        find_lr(build(), [domain(), domain()])
    nothing = {"input_ids": domain(), "labels": torch.full_like(domain(), -100)}
    for halves in ([nothing, domain()], [domain(), nothing]):
        with pytest.raises(ValueError, match="has no token to predict"):
            find_lr(grown(locus=LOCUS), halves)
    model = spawned()
    for layer in model.base_model.tuner_layers():
        layer.pcgrow_gate_threshold["default"].fill_(1e30)
    with pytest.raises(ValueError, match="no token of the first half of the batches reaches what trains"):
        find_lr(model, [domain(), domain()])


def test_lora_has_a_rate_of_its_own():
    model = spawned(lora=LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    optimizer = create_pcgrow_optimizer(model, lr=0.5, lora_lr=0.25)
    by_rate = {group["lr"]: group["params"] for group in optimizer.param_groups}
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(".lora_" in names[id(p)] for p in by_rate[0.25])
    assert all(".pcgrow_" in names[id(p)] for p in by_rate[0.5])
    assert len(by_rate[0.25]) + len(by_rate[0.5]) == sum(p.requires_grad for p in model.parameters())

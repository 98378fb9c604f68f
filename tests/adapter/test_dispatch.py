"""Both ways to run a bank's rows beside the base's: against a loop over rows, and against each other."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from asked import nothing_asked
from close import assert_all_close
from pcgrow_kernels import grouped
from peft_pcgrow import PCGrowConfig
from peft_pcgrow.adapter import dispatch
from peft_pcgrow.adapter.dispatch import Branch
from peft_pcgrow.architectures import one_sort
from tiny import LOCUS, build, domain, grown, mixed, spawned, tokens, train, trainable

TOKENS, CHOICES, EXPERTS, HIDDEN, INNER = 40, 3, 6, 8, 16
FLAGS = ("has_gate", "has_bias", "is_transposed")


def clamped_gate(self: Any, both: Tensor) -> Tensor:
    """Gate and up in turns."""
    gate, up = both[..., ::2].clamp(max=0.4), both[..., 1::2]
    return self.act_fn(gate) * (up + 1)


def experts(act: str = "silu", gate: Any = None, dtype: torch.dtype = torch.float64, **flags: bool) -> Any:
    """Experts by transformers' contract, whose own code is a loop over experts."""

    class Experts(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, ACT2FN[act]
            wide = 2 * INNER if flags.get("has_gate", True) else INNER
            name = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
            for stack, size in ((name, (wide, HIDDEN)), ("down_proj", (HIDDEN, INNER))):
                shape = size[::-1] if flags.get("is_transposed") else size
                self.register_parameter(stack, nn.Parameter(torch.randn(EXPERTS, *shape, dtype=dtype) * 0.3))
                if flags.get("has_bias"):
                    bias = nn.Parameter(torch.randn(EXPERTS, size[0], dtype=dtype))
                    self.register_parameter(f"{stack}_bias", bias)
            self.requires_grad_(False)

        def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            total = torch.zeros_like(hidden)
            for expert in range(self.num_experts):
                token, choice = torch.where(index == expert)
                y = one_expert(self, self._parameters, expert, hidden[token]) * weight[token, choice, None]
                total = total.index_add(0, token, y.to(total.dtype))
            return total

    if gate is not None:
        Experts._apply_gate = gate
    made = use_experts_implementation(Experts, **flags)
    return made(SimpleNamespace(_experts_implementation="eager"))


def one_expert(base: Any, stacks: Mapping[str, Any], place: int, x: Tensor) -> Tensor:
    for name in ("gate_up_proj" if base.has_gate else "up_proj", "down_proj"):
        matrix = stacks[name][place] if base.is_transposed else stacks[name][place].mT
        x = x @ matrix + (stacks[f"{name}_bias"][place] if base.has_bias else 0)
        if name != "down_proj":
            x = base._apply_gate(x) if base.has_gate else base.act_fn(x)
    return x


def bank_of(base: Any, size: int) -> dict[str, Tensor]:
    return {n: torch.randn(size, *p.shape[1:], dtype=p.dtype).requires_grad_() for n, p in base.named_parameters()}


def slot(**places: int) -> Tensor:
    """Places in a bank, by expert: `slot(e2=0)`; the last is of rows of no expert."""
    found = torch.full((EXPERTS + 1,), -1)
    for expert, place in places.items():
        found[int(expert[1:])] = place
    return found


def branches(base: Any, kind: str) -> list[Branch]:
    some, others = torch.rand(TOKENS) < 0.6, torch.rand(TOKENS) < 0.5
    first, second = bank_of(base, 3), bank_of(base, 2)
    deepened = Branch(slot(e1=0, e4=2), first)
    return {
        "deepened": [deepened],
        "two adapters": [deepened, Branch(slot(e0=1, e5=0), second)],
        "newborns": [Branch(slot(e1=0, e2=1, e4=2), first, some)],
        "a newborn and what is deepened": [Branch(slot(e1=1), second, some), deepened],
        "a newborn's newborn": [Branch(slot(e1=1), second, some), Branch(slot(e1=0), first, others, (0,)), deepened],
        "one adapter's newborns of two": [Branch(slot(e2=0), first, some), Branch(slot(e3=1), first, others)],
        "all": [Branch(slot(**{f"e{e}": e for e in range(EXPERTS)}), bank_of(base, EXPERTS))],
        "a branch without rows": [Branch(slot(e3=1), second, torch.zeros(TOKENS, dtype=torch.bool)), deepened],
    }[kind]


KINDS = ["deepened", "two adapters", "newborns", "a newborn and what is deepened", "a newborn's newborn"]
KINDS += ["one adapter's newborns of two", "all", "a branch without rows"]


def routed(nobody: float = 0.2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.rand(TOKENS, EXPERTS).argsort(dim=1)[:, :CHOICES]
    index[torch.rand(index.shape) < nobody] = EXPERTS
    weight = torch.rand(TOKENS, CHOICES, dtype=dtype).masked_fill(index == EXPERTS, 0)
    return torch.randn(TOKENS, HIDDEN, dtype=dtype).requires_grad_(), index, weight.requires_grad_()


def looped(base: Any, asked: Sequence[Branch], hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Row by row, by the definition of branches and of experts."""
    total = [0 * x for x in hidden]
    for token, choice in (index < EXPERTS).nonzero().tolist():
        expert, taker = int(index[token, choice]), -1
        for place, branch in enumerate(asked):
            free = taker in branch.parents if branch.parents else taker == -1
            passes = branch.passes is None or bool(branch.passes[token])
            taker = place if free and passes and int(branch.slot[expert]) >= 0 else taker
        stacks: Mapping[str, Tensor] = dict(base.named_parameters()) if taker < 0 else asked[taker].bank
        place = expert if taker < 0 else int(asked[taker].slot[expert])
        total[token] = total[token] + weight[token, choice] * one_expert(base, stacks, place, hidden[token])
    return torch.stack(total)


def results(run: Any, base: Any, asked: Sequence[Branch], given: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of all that has one; zeros where none came."""
    output = run(base, asked, *given)
    error = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    leaves = {"hidden": given[0], "weight": given[2]} | {
        f"bank {place} {name}": stack for place, branch in enumerate(asked) for name, stack in branch.bank.items()
    }
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(output, list(leaves.values()), error, allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {"output": output.detach()} | {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def run(*args: Any, **kwargs: Any) -> Tensor:
    return dispatch.run(*args, exact=False, **kwargs)


def apart(*args: Any) -> Tensor:
    return run(*args, together=False)


@pytest.mark.parametrize("kind", KINDS)
def test_branches(kind):
    base = experts()
    given, asked = routed(), branches(base, kind)
    assert one_sort.kept_from(base, exact=False) == ""
    got = results(run, base, asked, given)
    assert_all_close(got, results(looped, base, asked, given), "fp64")


@pytest.mark.parametrize("flags", [{}, *({f: f != "has_gate"} for f in FLAGS), {f: f != "has_gate" for f in FLAGS}])
@pytest.mark.parametrize("act", ["silu", "gelu_new"])
@pytest.mark.parametrize("gate", [None, clamped_gate])
def test_experts(flags, act, gate):
    base = experts(act, gate, **flags)
    given, asked = routed(), branches(base, "two adapters")
    got = results(run, base, asked, given)
    assert_all_close(got, results(looped, base, asked, given), "fp64")


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nobodys_rows_give_zeros(share):
    base = experts()
    given, asked = routed(share), branches(base, "deepened")
    got = results(run, base, asked, given)
    assert_all_close(got, results(looped, base, asked, given), "fp64")
    assert share < 1 or not any(found.any() for found in got.values())


@pytest.mark.parametrize("of", ["hidden", "weight", "neither"])
def test_gradients_of_some(of):
    """Where an error goes no further down, the bank's rows alone are run backwards."""
    base = experts(has_bias=True)
    given, asked = routed(), branches(base, "newborns")
    for name, tensor in zip(("hidden", "index", "weight"), given, strict=True):
        if tensor.is_floating_point():
            tensor.requires_grad_(of == name)
    got = results(run, base, asked, given)
    assert_all_close(got, results(looped, base, asked, given), "fp64")


def test_a_frozen_bank():
    base = experts()
    given, asked = routed(), branches(base, "deepened")
    for stack in asked[0].bank.values():
        stack.requires_grad_(False)
    assert_all_close(results(run, base, asked, given), results(looped, base, asked, given), "fp64")


@pytest.mark.parametrize("gate", [None, clamped_gate])
def test_twice_differentiated(gate):
    """The routing weights hang on the hidden states, as a router's do."""
    base, found = experts(gate=gate, has_bias=True), []
    hidden, index, weight = routed()
    asked = branches(base, "newborns")
    for way in (run, looped):
        output = way(base, asked, hidden, index, weight * hidden[:, :1].sigmoid())
        leaves = [hidden, weight, *asked[0].bank.values()]
        once = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in once), leaves)
        found.append({str(place): gradient for place, gradient in enumerate((*once, *twice))})
    assert_all_close(*found, "fp64 gradient")


@pytest.mark.parametrize("settle", ["sweep", "direct", "backprop"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_settled(settle, name, monkeypatch):
    """Deepened: a whole model's loss and gradients, both ways."""
    model = grown(name=name, dtype=torch.float64, settle=settle, autocast_adapter_dtype=False, init_weights=False)
    assert_all_close(*(one_way(model, tokens(), way, monkeypatch) for way in (run, apart)), "fp64")


@pytest.mark.parametrize("settle", ["sweep", "direct", "backprop"])
def test_newborns_settled(settle, monkeypatch):
    model = spawned(dtype=torch.float64, autocast=False, gate_fpr=0.2, settle=settle)
    train(model, lr=3e-2, texts=domain)
    assert_all_close(*(one_way(model, mixed(), way, monkeypatch) for way in (run, apart)), "fp64")


def one_way(model: nn.Module, ids: Tensor, way: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    model.train().zero_grad()
    with monkeypatch.context() as patch:
        real, together = dispatch.run, way is run

        def chosen(base: Any, *args: Any, exact: bool = True) -> Tensor:
            assert one_sort.kept_from(base, exact) == ""
            return real(base, *args, exact=exact, together=together)

        patch.setattr(dispatch, "run", chosen)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in trainable(model).items()}


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_banks_keep_their_dtype(dtype):
    """A bank in fp32 on a base in 16 bit: gradients come in fp32, at the precision of today's."""
    base = experts(dtype=dtype, has_bias=True)
    asked = branches(experts(dtype=torch.float32, has_bias=True), "two adapters")
    hidden, index, weight = routed(dtype=torch.float32)
    given = hidden.detach().to(dtype).requires_grad_(), index, weight
    got, want = (results(way, base, asked, given) for way in (run, apart))
    assert {name: tensor.dtype for name, tensor in got.items()} == {n: t.dtype for n, t in want.items()}
    assert got["bank 0 down_proj"].dtype == torch.float32
    assert_all_close(got, want, "bf16")


# ---- what a GPU would have to wait for


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Products of groups, whose counts torch's own code for CPUs reads and a GPU's does not."""
    monkeypatch.setattr(grouped, "_by_device", lambda x, other: len(x) > 0)


@pytest.mark.parametrize("way", [run, apart])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_asks_for_nothing(kind, way, as_on_a_gpu):
    base = experts(dtype=torch.float32, has_bias=True)
    (hidden, index, weight), asked = routed(dtype=torch.float32), branches(base, kind)
    leaves = [hidden, weight, *asked[0].bank.values()]

    def step() -> None:
        output = way(base, asked, hidden, index, weight)
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    step()
    if way is run:
        with nothing_asked():
            step()
        return
    # planted: the other way does ask
    with pytest.raises(AssertionError, match="nonzero"), nothing_asked():
        step()


@pytest.mark.parametrize("flags", [{}, {"has_bias": True, "is_transposed": True}])
@pytest.mark.parametrize("of", ["all", "the bank"])
def test_as_on_a_gpu(flags, of, as_on_a_gpu):
    """What is multiplied by groups gives the loop's, in fp32; rows that are nobody's included."""
    base = experts(dtype=torch.float32, **flags)
    given, asked = routed(dtype=torch.float32), branches(base, "two adapters")
    if of == "the bank":
        given = tuple(tensor.detach() for tensor in given)
    assert_all_close(results(run, base, asked, given), results(looped, base, asked, given), "fp32")


# ---- which of the two


def registered() -> Any:
    base = experts()
    base.config._experts_implementation = "batched_mm"
    return base


def training_base() -> Any:
    return experts().requires_grad_(True)


def hooked() -> Any:
    base = experts()
    base.register_forward_hook(lambda *_: None)
    return base


def with_scales() -> Any:
    base = experts()
    base.register_parameter("scale", nn.Parameter(torch.ones(EXPERTS, 1), requires_grad=False))
    return base


WHY = {
    "no grouped products replace 'batched_mm'": registered,
    "the base's experts train": training_base,
    "hooks": hooked,
    "more than two matrices": with_scales,
}


@pytest.mark.parametrize("why", WHY)
def test_kept_from(why):
    base = WHY[why]()
    assert why in one_sort.kept_from(base, exact=False)


def test_kept_from_what_is_asked_or_promised():
    assert one_sort.kept_from(experts(), exact=False, wanted=False)
    assert "bits" in one_sort.kept_from(experts(), exact=True)
    with torch.autocast("cpu"):
        assert "autocast" in one_sort.kept_from(experts(), exact=False)
    assert one_sort.kept_from(experts(), exact=False) == ""


def test_a_user_is_told():
    """In the lines that say what trains."""
    model = get_peft_model(build(), PCGrowConfig(locus=LOCUS))
    assert "rows sorted once" in model.base_model._summary()
    model.get_base_model().set_experts_implementation("batched_mm")
    assert "'batched_mm'" in model.base_model._summary()

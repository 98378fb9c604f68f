"""Muon on stacks against torch's own optimizers and a singular value decomposition."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from close import assert_all_close, assert_close
from pcgrow_kernels.orthogonalize import COEFFICIENTS, STEPS, orthogonalize
from peft_pcgrow import Muon, PCGrowConfig, create_pcgrow_optimizer
from peft_pcgrow.training import muon
from tiny import build, grown, tokens, trainable


def by_decomposition(matrix: torch.Tensor) -> torch.Tensor:
    """What the iteration gives, in fp64: its polynomial of the singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(STEPS):
        s = sum(c * s ** (2 * power + 1) for power, c in enumerate(COEFFICIENTS))
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(24, 16), (16, 40), (32, 32)])
def test_it_is_a_polynomial_of_the_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    assert_close("orthogonalized", orthogonalize(matrix), by_decomposition(matrix), "fp32")


@pytest.mark.parametrize("at_once", [1, 1500, 2**25])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_batches_are_bounded(name, at_once, monkeypatch):
    """However many matrices are one batch, of whichever banks, each moves by its own polynomial."""
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    model = grown(name=name).train()
    optimizer, batches = create_pcgrow_optimizer(model, lr=0.5), []
    iterate = muon.orthogonalize_
    monkeypatch.setattr(muon, "orthogonalize_", lambda x, **given: (batches.append(x), iterate(x, **given))[1])
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    banks = {key: (p.detach().clone(), p) for key, p in trainable(model).items() if p.dim() == 3}
    optimizer.step()
    for key, (start, p) in banks.items():
        for moved, gradient in zip(p.detach() - start, p.grad, strict=True):
            scale = max(1.0, gradient.shape[0] / gradient.shape[1]) ** 0.5
            # nesterov's first direction is the gradient, scaled
            assert_close(key, moved, -0.5 * scale * by_decomposition(gradient), "fp32")
    assert all(x.numel() <= max(at_once, x[0].numel()) for x in batches)
    shapes = {p.shape[1:] for _, p in banks.values()}
    assert len(batches) == {1: 10, 2**25: len(shapes)}.get(at_once, len(batches))


def test_launches_of_a_step():
    """Operations on the device, counted: one for each bank beside what does not grow with the layers."""

    def launches(layers: int) -> int:
        locus = {layer: [1, 4, 6] for layer in range(layers)}
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(build(num_hidden_layers=layers), PCGrowConfig(locus=locus, lora=lora))
        optimizer = create_pcgrow_optimizer(model, lr=0.01)
        for seed in range(3):
            model.train()(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
            with Launches() as counted:
                optimizer.step()
        return counted.number

    few, many = launches(2), launches(6)
    assert few <= 60
    assert many - few <= 4 * 2  # gate and up, and down, into their batches


class Launches(TorchDispatchMode):
    """Counts operations that are no views and look at something that is on the device on a GPU too."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func is torch.ops.aten._local_scalar_dense.default  # of AdamW's steps, which are on the CPU
        self.number += not (func.is_view or waits or "empty" in str(func) or "detach" in str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 6), (0, 4, 6)])
def test_stacks_of_any_depth(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    Muon([p], lr=1.0, nesterov=False).step()
    for moved, gradient in zip(p.detach().view(-1, 4, 6), p.grad.view(-1, 4, 6), strict=True):
        assert_close("moved", moved, -by_decomposition(gradient), "fp32")


@pytest.mark.parametrize("shape", [(5, 24, 16), (3, 16, 40), (2, 32, 32)])
def test_orthogonalization_keeps_the_singular_vectors(shape):
    """U V^T of each matrix, with singular values that five quintic steps bring to about one."""
    matrices = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    got = torch.linalg.svdvals(orthogonalize(matrices))
    assert got.min() > 0.65
    assert got.max() < 1.25
    inner = u.mT @ orthogonalize(matrices) @ v.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-5  # fp32 inside


def test_matrices_of_a_stack_do_not_mix():
    matrices = torch.randn(4, 12, 8)
    matrices[2] = 0
    got = orthogonalize(matrices)
    for matrix, orthogonal in zip(matrices, got, strict=True):
        assert_close("one matrix", orthogonal, orthogonalize(matrix), "fp32")
    assert not got[2].any()


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(24, 16), (16, 24)])
def test_equals_torch_muon_on_each_matrix(rows, columns):
    stack = torch.nn.Parameter(torch.randn(3, rows, columns))
    single = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    ours = Muon([stack], lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.Muon(single, lr=0.1, momentum=0.9, weight_decay=0.01, adjust_lr_fn="original")
    start = stack.detach().clone()
    for seed in range(4):
        gradient = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed))
        stack.grad = gradient
        for p, g in zip(single, gradient, strict=True):
            p.grad = g.clone()
        ours.step()
        theirs.step()
    moved = torch.stack([p.detach() for p in single]) - start
    assert_close("movement", stack.detach() - start, moved, "bf16 orthogonalization")


def test_other_groups_are_stepped_by_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12)) for _ in range(2))
    settings = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    muon = Muon([{"params": [ours], "orthogonal": False}], **settings)
    adamw = torch.optim.AdamW([theirs], **settings)
    for seed in range(5):
        ours.grad = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        muon.step()
        adamw.step()
    assert_close("weights", ours.detach(), theirs.detach(), "fp32")


@pytest.mark.slow
def test_state_resumes_exactly():
    def train(model, optimizer, seeds):
        for seed in seeds:
            ids = tokens(seed=seed)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = get_peft_model(
        build("gpt_oss"), PCGrowConfig(locus={0: [1], 2: [0, 5]}, modules_to_save=["lm_head"])
    ).train()
    optimizer = create_pcgrow_optimizer(model, lr=0.05)
    train(model, optimizer, [0, 1])
    stopped, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, [2, 3])
    resumed = create_pcgrow_optimizer(stopped, lr=0.3)
    resumed.load_state_dict(saved)
    train(stopped, resumed, [2, 3])
    for (name, p), q in zip(model.named_parameters(), stopped.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_groups_of_a_grown_model():
    """Matrices of the banks are orthogonalised; biases and saved modules are not."""
    model = get_peft_model(build("gpt_oss"), PCGrowConfig(locus={1: [3]}, modules_to_save=["lm_head"]))
    optimizer = create_pcgrow_optimizer(model, lr=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["orthogonal"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    experts = "base_model.model.model.layers.1.mlp.experts"
    assert groups[True] == {f"{experts}.pcgrow_{name}.default.weight" for name in ("gate_up_proj", "down_proj")}
    assert groups[False] == {
        *(f"{experts}.pcgrow_{name}_bias.default.weight" for name in ("gate_up_proj", "down_proj")),
        "base_model.model.lm_head.modules_to_save.default.weight",
    }
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr": -1}, "lr=-1"),
        ({"momentum": 1}, "momentum=1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(ValueError, match=text):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], **settings)


def test_a_vector_cannot_be_orthogonalised():
    with pytest.raises(ValueError, match=r"matrices or stacks of them, got shapes \[\(3,\)\]"):
        Muon([torch.nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 6, 4), (4, 6)])
def test_averages_in_one_pass(monkeypatch, shape, nesterov):
    """As a kernel takes them on a GPU: what moves, and the momenta, are the same."""
    found = []
    for in_one_pass in (False, True):
        monkeypatch.setattr(muon, "_in_one_pass", lambda *_, asked=in_one_pass: asked)
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape))
        optimizer = Muon([p], lr=0.1, nesterov=nesterov)
        for _ in range(3):
            p.grad = torch.randn(shape)
            optimizer.step()
        found.append({"moved": p.detach(), "momentum": optimizer.state[p]["momentum"]})
    assert_all_close(*found, "fp32")

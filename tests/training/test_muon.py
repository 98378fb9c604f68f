"""Muon on stacks against torch's own optimizers and a singular value decomposition."""

import copy

import pytest
import torch
from peft import get_peft_model

from close import assert_close
from pcgrow_kernels.orthogonalize import orthogonalize
from peft_pcgrow import Muon, PCGrowConfig, create_pcgrow_optimizer
from tiny import build, tokens


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

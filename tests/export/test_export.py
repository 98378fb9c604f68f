"""export_flat: a plain checkpoint that loads without this package, and a report of how far its function is off."""

from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_bad_input import facts
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

import fresh
from close import assert_close
from peft_pcgrow import ErrorMap, PCGrowConfig, export_flat, find_experts, measure_errors
from peft_pcgrow.architectures.router_capacity import COUNTS
from peft_pcgrow.export.flat import CLIP, ROUTER_RIDGE, FlatReport
from tiny import (
    EXPERTS,
    LOCUS,
    PAD,
    assert_same,
    build,
    domain,
    gate_margin,
    logits,
    mixed,
    retain,
    snapshot,
    train,
)

# as many newborns in each layer, or switched off by a bias where there are fewer
FLAT, SWITCHED = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe"), ("gpt_oss", "deepseek_v3")
NAMES = FLAT + SWITCHED
CHANGES = {"deepseek_v3": {"n_group": 1, "topk_group": 1}}


def padded() -> dict[str, Tensor]:
    """Texts padded on the left, the right or not at all, of which only some words are predicted."""
    mask = torch.ones(8, 24, dtype=torch.long)
    for row, cut in enumerate((0, 5, 11, 1)):
        mask[row, :cut] = mask[row + 4, 24 - cut :] = 0
    ids = mixed().masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(torch.arange(24) % 3 == 1, -100)}


def batches() -> list:
    return [domain(4, seed=7), padded(), retain(4, seed=7)]


@cache
def text_map(name: str = "qwen3_moe") -> ErrorMap:
    base, texts = build(name, **CHANGES.get(name, {})), ([domain(32, seed=1)], [retain(32, seed=1)])
    return measure_errors(base, texts[0], retain=texts[1], window=8, gradients=False, progress=False)


def config(name: str = "qwen3_moe", **changes) -> PCGrowConfig:
    where = {"router": "flat", "budget": 0.25} if name in FLAT else {"locus": LOCUS}
    return PCGrowConfig(**{"error_map": text_map(name), "grow": "spawn", "gate_fpr": 0.4, **where, **changes})


def trained(name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, base: dict | None = None, **changes):
    """A tiny model whose newborns have moved by far."""
    model = get_peft_model(build(name, dtype, **{**CHANGES.get(name, {}), **(base or {})}), config(name, **changes))
    train(model, lr=3e-2, texts=domain)
    return model


@dataclass(frozen=True)
class Case:
    """One export, and what the model was before it."""

    name: str
    model: PeftModel
    folder: Path
    report: FlatReport
    before: tuple

    def load(self) -> nn.Module:
        flat = AutoModelForCausalLM.from_pretrained(self.folder).to(torch.get_default_device()).eval()
        flat.set_experts_implementation("eager")
        return flat


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    found = {}
    for name in NAMES:
        model, folder = trained(name), tmp_path_factory.mktemp(name) / "new" / "flat"
        model.train()
        before = facts(model), snapshot(model), logits(model, mixed())
        report = export_flat(model, folder, (batch for batch in batches()))
        found[name] = Case(name, model, folder, report, before)
    return found


@pytest.fixture(params=NAMES)
def case(request, cases) -> Case:
    return cases[request.param]


def newborns(model: PeftModel) -> dict[int, list[tuple[str, int]]]:
    """(adapter, donor) of each newborn in use, by layer, in their order in the checkpoint."""
    found = {site.layer: [] for site in find_experts(model).sites}
    for layer in model.base_model.tuner_layers():
        found[layer.layer_index] = [(name, donor) for name in layer.active_banks() for donor in layer.spawned(name)]
    return found


def bank_slice(model: PeftModel, layer: int, adapter: str, expert: int) -> dict[str, Tensor]:
    held = next(found for found in model.base_model.tuner_layers() if found.layer_index == layer)
    place = held.births[adapter].grown.index(expert)
    return {name: weight.detach()[place] for name, weight in held.bank(adapter).items()}


def chosen(flat: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    """Experts that tokens are routed to, `[T, K]` by layer."""
    found, handles = {}, []
    for site in find_experts(flat).sites:
        note = lambda _, args, layer=site.layer: found.__setitem__(layer, args[1])  # noqa: E731
        handles.append(site.module.register_forward_pre_hook(note))
    logits(flat, ids)
    for handle in handles:
        handle.remove()
    return found


# ---- what is in the folder

LOADING = """
import sys, torch
from transformers import AutoModelForCausalLM
given = torch.load(sys.argv[1])
with torch.no_grad():
    found = [AutoModelForCausalLM.from_pretrained(f).eval()(input_ids=given["ids"]).logits for f in given["folders"]]
assert "peft_pcgrow" not in sys.modules
torch.save(found, sys.argv[2])
"""


@pytest.mark.slow
def test_loads_without_the_package(cases, tmp_path):
    """In a process of its own: the logits of the model loaded here, and close to none of the base's."""
    folders = [str(case.folder) for case in cases.values()]
    torch.save({"ids": mixed(), "folders": folders}, tmp_path / "given")
    fresh.run(LOADING, tmp_path / "given", tmp_path / "found", folder=tmp_path).check_returncode()
    for case, found in zip(cases.values(), torch.load(tmp_path / "found"), strict=True):
        here = AutoModelForCausalLM.from_pretrained(case.folder).eval()
        assert torch.equal(found, logits(here, mixed())), case.name
        assert torch.isfinite(found).all()
        assert (found - logits(build(case.name, **CHANGES.get(case.name, {})), mixed())).abs().max() > 0.1


@pytest.mark.slow
def test_number_of_experts(case):
    count = EXPERTS + max(map(len, newborns(case.model).values()))
    flat = case.load()
    assert count == case.report.experts == (10 if case.name in FLAT else 11)
    assert next(getattr(flat.config, name) for name in COUNTS if hasattr(flat.config, name)) == count
    assert set(find_experts(flat).experts_at.values()) == {count}
    assert type(flat) is type(case.model.get_base_model())


@pytest.mark.slow
def test_old_weights_keep_their_bits(case):
    """All of the base is in the checkpoint, first among experts and router rows."""
    base, flat = build(case.name, **CHANGES.get(case.name, {})).state_dict(), case.load().state_dict()
    assert_same(base, {name: tensor[: len(base[name])] for name, tensor in flat.items()})
    longer = {name.rpartition(".")[2] for name in base if len(flat[name]) > len(base[name])}
    assert {"gate_up_proj", "down_proj", "weight"} <= longer
    assert all(len(flat[name]) in (len(base[name]), case.report.experts) for name in base)


@pytest.mark.slow
def test_newborns_are_the_banks(case):
    sites = {site.layer: site for site in find_experts(case.load()).sites}
    assert sum(map(len, newborns(case.model).values())) == (6 if case.name in FLAT else 5)
    for layer, found in newborns(case.model).items():
        for place, (adapter, donor) in enumerate(found, EXPERTS):
            held = {name: stack[place] for name, stack in sites[layer].base.named_parameters()}
            assert_same(bank_slice(case.model, layer, adapter, donor), held)
            assert not torch.equal(held["down_proj"], sites[layer].base.down_proj[donor])


@pytest.mark.slow
def test_who_is_chosen(case):
    """Newborns are, for domain text more than for retain text; experts that only fill a layer up never are."""
    flat, share = case.load(), []
    for texts in (domain, retain):
        routed = chosen(flat, texts(32, seed=9))
        for layer, found in newborns(case.model).items():
            assert int(routed[layer].max()) < EXPERTS + len(found)
        share.append(sum(float((index >= EXPERTS).float().mean()) for index in routed.values()))
    assert share[0] > share[1] + 0.05
    if case.name in SWITCHED:
        bias = next(t for n, t in flat.state_dict().items() if ".2." not in n and n.endswith(("router.bias", "n_bias")))
        assert torch.isneginf(bias[EXPERTS + 2 :]).all()


@pytest.mark.parametrize("name", SWITCHED)
def test_newborns_switched_off(cases, name):
    """Without them the checkpoint is the base, bit for bit."""
    flat, base = cases[name].load(), logits(build(name, **CHANGES.get(name, {})), mixed())
    assert not torch.equal(logits(flat, mixed()), base)
    for site in find_experts(flat).sites:
        bias = site.router.bias if name == "gpt_oss" else site.router.e_score_correction_bias
        bias.data[EXPERTS:] = float("-inf")
    assert torch.equal(logits(flat, mixed()), base)


@torch.no_grad()
def fitted(model: PeftModel, intercept: bool) -> dict[int, Tensor]:
    """Ridge regression of the gate's margin on a layer's inputs, by the gate's definition, text by text."""
    inputs, margins, handles = {}, {}, []
    real = torch.ones(0)

    def look(layer: nn.Module, args: tuple) -> None:
        margin = gate_margin(layer, "default", args[0].view(*real.shape, -1), real)[real]
        inputs.setdefault(layer.layer_index, []).append(args[0].detach().double()[real.flatten()])
        margins.setdefault(layer.layer_index, []).append(margin.clamp(-CLIP, CLIP))

    for layer in model.base_model.tuner_layers():
        handles.append(layer.register_forward_pre_hook(look))
    for batch in batches():
        given = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
        real = given.setdefault("attention_mask", torch.ones_like(given["input_ids"])).bool()
        logits(model, given["input_ids"], attention_mask=given["attention_mask"])
    for handle in handles:
        handle.remove()
    found = {}
    for layer, held in inputs.items():
        x, y = torch.cat(held), torch.cat(margins[layer])
        if intercept:
            x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        penalty = (ROUTER_RIDGE * x.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1])
        y = torch.cat([y, torch.zeros(x.shape[1])])
        found[layer] = torch.linalg.lstsq(torch.cat([x, penalty]), y[:, None]).solution[:, 0]
    return found


@pytest.mark.slow
def test_rows_are_fitted_to_the_gate(case):
    """A newborn's router row is its donor's plus the fit, and so is its bias where it is part of the logits."""
    want, flat = fitted(case.model, case.name == "gpt_oss"), case.load()
    for site in find_experts(flat).sites:
        for place, (_, donor) in enumerate(newborns(case.model)[site.layer], EXPERTS):
            weight = site.router.weight.detach()
            got = weight[place] - weight[donor]
            if case.name == "gpt_oss":
                bias = site.router.bias.detach()
                got = torch.cat([got, (bias[place] - bias[donor])[None]])
            assert_close(f"{site.layer}.{donor}", got, want[site.layer], "fp32 solve")
            if case.name == "deepseek_v3":
                assert site.router.e_score_correction_bias[place] == site.router.e_score_correction_bias[donor]


# ---- the report


@pytest.mark.slow
def test_reported_numbers(case):
    """Recomputed from the folder and the model, over tokens and labels that are no padding."""
    flat, ours, theirs, targets = case.load(), [], [], []
    for batch in batches():
        given = batch if isinstance(batch, dict) else {"input_ids": batch, "labels": batch}
        mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        both = [logits(m, given["input_ids"], attention_mask=mask) for m in (case.model, flat)]
        target = given["labels"].masked_fill(mask == 0, -100)[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
        targets.append(torch.cat([target, torch.full_like(target[:, :1], -100)], dim=1)[mask.bool()])
        for held, found in zip((ours, theirs), both, strict=True):
            held.append(found[mask.bool()].double())
    grown_logits, flat_logits, target = torch.cat(ours), torch.cat(theirs), torch.cat(targets)
    logs = [log_softmax(found, dim=-1) for found in (flat_logits, grown_logits)]
    want = {
        "loss_branch": cross_entropy(grown_logits, target),
        "loss_flat": cross_entropy(flat_logits, target),
        "kl": kl_div(*logs, log_target=True, reduction="batchmean"),
        "agreement": (grown_logits.argmax(-1) == flat_logits.argmax(-1)).double().mean(),
    }
    for name, value in want.items():
        assert_close(name, torch.tensor(getattr(case.report, name)), value, "fp32")
    assert case.report.reload_difference == 0
    assert 0 < case.report.kl < 1
    assert 0.3 < case.report.agreement < 1
    assert f"{case.report.experts} experts a layer: loss {float(want['loss_flat']):.3f} against" in str(case.report)


@pytest.mark.slow
def test_padding_is_left_out(tmp_path):
    """Whatever stands under it, padded texts give the rows and the report that they give alone."""
    model, ids = trained(), mixed()
    mask = (torch.arange(24) < 15).long().expand(8, 24)
    junk = ids.masked_fill(mask == 0, 3)
    reports = [
        export_flat(model, tmp_path / "masked", [{"input_ids": junk, "attention_mask": mask}]),
        export_flat(model, tmp_path / "alone", [ids[:, :15]]),
        export_flat(model, tmp_path / "junk", [junk]),
    ]
    masked, alone, with_junk = (torch.tensor(astuple(report)) for report in reports)
    assert_close("report", masked, alone, "fp32 solve")
    assert (masked - with_junk).abs().max() > 0.01
    rows = [load(tmp_path / name).state_dict()["model.layers.1.mlp.gate.weight"] for name in ("masked", "alone")]
    assert_close("rows", *rows, "fp32 solve")


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# ---- the grown model


def test_the_model_is_left_as_it_was(case):
    """Its training mode, hooks, weights and logits."""
    state, weights, before = case.before
    assert case.model.training
    assert facts(case.model) == state
    assert_same(weights, snapshot(case.model))
    assert torch.equal(logits(case.model, mixed()), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", *SWITCHED])
def test_bf16_base(name, tmp_path):
    """The checkpoint is in bf16 too; buffers that the base holds in fp32 keep all of their bits."""
    model = trained(name, torch.bfloat16)
    before = logits(model, mixed())
    report = export_flat(model, tmp_path / "flat", batches())
    assert torch.equal(logits(model, mixed()), before)
    assert report.reload_difference == 0
    build(name, torch.bfloat16, **CHANGES.get(name, {})).save_pretrained(tmp_path / "base")
    # as loaded: transformers from 5.24 on keeps some routers in fp32
    flat, base = load(tmp_path / "flat"), load(tmp_path / "base").state_dict()
    assert flat.dtype == torch.bfloat16
    held = flat.state_dict()
    assert {key: tensor.dtype for key, tensor in held.items()} == {key: tensor.dtype for key, tensor in base.items()}
    assert_same(base, {key: tensor[: len(base[key])] for key, tensor in held.items()})
    site = next(site for site in find_experts(flat).sites if site.layer == 1)
    adapter, donor = newborns(model)[1][0]
    assert torch.equal(site.base.down_proj[EXPERTS], bank_slice(model, 1, adapter, donor)["down_proj"].bfloat16())

"""The promises that another device could break; collected everywhere, run where CUDA is."""

import copy

import pytest
import torch
from peft import get_peft_model

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.maps.error_map import SUMS
from tiny import build, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
LOCUS = {0: [1, 4], 2: [6]}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sweep_equals_backprop(implementation, dtype):
    ids, found = tokens().cuda(), {}
    for settle in ("sweep", "backprop"):
        model = build("qwen3_moe", dtype, implementation).cuda()
        model = get_peft_model(model, PCGrowConfig(locus=LOCUS, settle=settle)).train()
        model(input_ids=ids, labels=ids).loss.backward()
        found[settle] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_all_close(found["sweep"], found["backprop"], "fp32" if dtype == torch.float32 else "bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_tokens_keep_their_bits(dtype):
    base, ids = build("gpt_oss", dtype, "grouped_mm").cuda(), tokens(8, 24).cuda()
    site = find_experts(base).sites[0]
    reference, seen = copy.deepcopy(base), {}
    for key, model in (("base", reference), ("grown", get_peft_model(base, PCGrowConfig(locus={0: [2]})))):
        layer = find_experts(model).sites[0].module
        layer.register_forward_hook(lambda _, args, output, key=key: seen.update({key: (args[1], output)}))
        if key == "grown":
            for weight in layer.bank("default").values():
                weight.data.mul_(2)
        with torch.no_grad():
            model.eval()(input_ids=ids)
    meets = (seen["base"][0] == 2).any(dim=1)
    assert site.layer == 0
    assert meets.any()
    assert torch.equal(seen["base"][1][~meets], seen["grown"][1][~meets])


def test_map_equals_the_processors():
    model = build("qwen3_moe")
    here = measure_errors(model, [tokens()], progress=False)
    there = measure_errors(model.cuda(), [tokens()], progress=False)
    for name in (*SUMS, "coherent"):
        assert_close(name, getattr(there, name), getattr(here, name), "fp32 across devices")

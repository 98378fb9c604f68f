"""Which causal LMs of transformers have MLPs that can be nodes: dense ones, or shared ones beside routed experts.

Each model is built in miniature (see `architectures.py`). Its MLPs of a kind are found; grown, the model must have the
untouched model's bits; the gradients of one settled step must be autograd's through the untouched model; and newborns
beside them must leave the bits as they are at birth.

    python examples/mlps.py                              # all models; the table on standard error
    python examples/mlps.py --table examples/mlps.md
    python examples/mlps.py --models llama deepseek_v3 --kinds shared dense --json
"""

import argparse
import copy
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import corpora
import tables
from architectures import build, exact_dtype, moe_architectures, small_config
from checks import check, check_close, check_same, one_line
from operations import domain, gradients, language_loss, logits, retain, tokens
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.experts import read_experts
from peft_pcgrow.architectures.find import adopt

KINDS = ("dense", "shared")
# parameters of what may count as a miniature
MOST = 4_000_000
# as in operations.py, but for what architectures round to fp32 on the way
GRADIENT = {torch.float64: 1e-6, torch.float32: 1e-4}


def miniature(name: str) -> tuple[Any, str]:
    """A model in fp64 if it knows that, or why there is none."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small_config(name)).parameters())
        check(size <= MOST, f"its miniature would have {size:,} parameters")
        model = build(name, exact_dtype(name))
        logits(model, tokens())
        return model, ""
    except Exception as error:
        return None, one_line(error)


def grow(model: Any, kind: str) -> None:
    """Raise unless MLPs of this kind grow as they should."""
    ids, before, untouched = tokens(), logits(model, tokens()), copy.deepcopy(model)
    tree = adopt(find_experts(model, kind))
    check_same(logits(model, ids), before, "logits of the adopted model")
    language_loss(untouched.requires_grad_(True), ids).backward()
    for parameter in untouched.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    wanted = {site.name: read_experts(site.base, [0]) for site in find_experts(untouched, kind).sites}
    locus = {site.layer: [0] for site in tree.sites}
    grown = get_peft_model(copy.deepcopy(model), PCGrowConfig(locus=locus, nodes=kind))
    check_same(logits(grown, ids), before, "logits at birth")
    found = gradients(grown, ids)
    for site in tree.sites:
        for stack, want in wanted[site.name].items():
            got = found[f"base_model.model.{site.name}.pcgrow_{stack}.default.weight"]
            check_close(got, want, GRADIENT[want.dtype], f"gradient of {stack} in layer {site.layer}")
    texts = {"retain": [retain(16), retain(16, seed=1)], "window": 8, "gradients": False, "progress": False}
    emap = measure_errors(model, [domain(16), domain(16, seed=1)], nodes=kind, **texts)
    newborn = get_peft_model(model, PCGrowConfig(error_map=emap, locus=locus, grow="spawn", gate_fpr=0.5))
    check_same(logits(newborn, ids), before, "logits with a newborn at birth")


def rows(names: list[str], kinds: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in names:
        model, why = miniature(name)
        for kind in kinds:
            row = {"model": name, "kind": kind, "has": model is not None, "ok": False, "reason": why}
            if model is not None:
                twin = copy.deepcopy(model)
                try:
                    find_experts(twin, kind)
                except ValueError as error:
                    row |= {"has": False, "reason": one_line(error)}
                else:
                    try:
                        grow(twin, kind)
                        row["ok"] = True
                    except Exception as error:
                        row["reason"] = one_line(error)
            found.append(row)
        corpora.note(f"{name}: " + ", ".join(f"{r['kind']} {r['reason'] or 'ok'}"[:110] for r in found[-len(kinds) :]))
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: by kind, which models pass, which do not and why, and which have none that can be nodes."""
    lines = [
        "# MLPs as nodes",
        "",
        f"Causal LMs of transformers {transformers.__version__} in miniature; written by [`mlps.py`](mlps.py), which "
        "says what is checked.",
    ]
    for kind in dict.fromkeys(row["kind"] for row in found):
        mine = [row for row in found if row["kind"] == kind]
        passed = [row["model"] for row in mine if row["ok"]]
        lines += ["", f"**{kind}: {len(passed)} pass.** {', '.join(passed)}", ""]
        lines += [f"- {row['model']} fails: {row['reason']}" for row in mine if row["has"] and not row["ok"]]
    said: dict[str, dict[str, None]] = {}
    mixtures = moe_architectures()
    for row in found:
        absent = "no MLP of linear layers" in row["reason"]
        if not row["has"] and not (absent and (row["kind"] == "shared" or row["model"] in mixtures)):
            reason = row["reason"].split("can be grown: ")[-1].split(". Use LoRA")[0].split("; ")[0]
            said.setdefault(reason, {})[row["model"]] = None
    lines += ["", "Refused, or not built in miniature:", ""]
    lines += [f"- {', '.join(who)}: {reason}" for reason, who in sorted(said.items(), key=lambda one: -len(one[1]))]
    return "\n".join(lines) + "\n"


def main() -> None:
    every = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=every, choices=every, metavar="NAME")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = tables.parse(parser)
    found = rows(args.models, args.kinds)
    for row in found:
        corpora.emit(row, args.json)
    tables.publish(table(found), args.table)


if __name__ == "__main__":
    main()

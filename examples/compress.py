"""What compressing costs: six studies.

budgets     loss rises at some shares of the experts' bytes: plans by several statistics against uniform widths, with
            and without compensation, and against pruned experts (REAP's criterion).
predictors  which statistic predicts what packing a single node does to the loss? Rank correlations, and a scatter.
lifecycle   are grown nodes compressible again? Loss rise from packing them, before growth, halfway and after.
adapter     an adapter's deltas in few bits: bytes and gain kept.
base        growing on a base in 16 bit, int8 and nf4: gain, bytes at rest, peak memory and time of a step (needs
            bitsandbytes).
order       compress first and spawn then, or spawn first and compress then.

Losses are held-out, nats per token; rises against the model before. One JSON object a row with --json.

    python examples/compress.py --study budgets --json > rows.jsonl
    python examples/compress.py --table rows.jsonl
"""

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import benchmark
import compare
import corpora
import frontier
from locate import correlation
from peft_pcgrow import ErrorMap, PCGrowConfig, compress, create_pcgrow_optimizer, find_experts, measure_errors
from peft_pcgrow.architectures.experts import intermediate_size
from peft_pcgrow.compress.form_survey import FORM_SELECTIONS
from peft_pcgrow.packed.forms import WHOLE, Form, form_bytes
from peft_pcgrow.packed.quantize import storage_bytes

STUDIES = ("budgets", "predictors", "lifecycle", "adapter", "base", "order")
UNIFORM = {"int8": 8, "nf4": 4, "3bit": 3, "2bit": 2}
METHODS = ("quantize", "thin")
BASES = {"16 bit": None, "int8": "int8", "nf4": "nf4", "nf4, by bitsandbytes the linear layers too": "nf4"}


def texts(task: corpora.Task, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Calibration batches drawn by `seed`: as many windows of the domain as of all retain texts together."""
    domain = next(corpora.batches(task.domain_train, args.calibration, 1, seed))
    each = args.calibration // len(task.retain)
    retain = torch.cat([next(corpora.batches(train, each, 1, seed)) for train, _ in task.retain.values()])
    return {"domain": domain.split(args.batch), "retain": retain.split(args.batch)}


def rises(model: nn.Module, task: corpora.Task, before: dict[str, float]) -> dict[str, Any]:
    after = {name: loss - before[name] for name, loss in compare.losses(model, task).items()}
    retain = statistics.mean(rise for name, rise in after.items() if name != "domain")
    return {"domain rise": after["domain"], "retain rise": retain, "rise": (after["domain"] + retain) / 2}


def by_hand(
    survey: compress.Survey, base: Any, forms: dict[tuple[int, int], Form], calibrated: bool = True
) -> compress.CompressionPlan:
    """A plan with these forms of some experts, the others whole; what it costs is not predicted."""
    nodes = []
    for layer, expert in product(survey.layers, range(survey.damage["fisher"].shape[1])):
        form = forms.get((layer, expert), WHOLE)
        nodes.append(compress.NodePlan(layer, expert, form, form_bytes(base, WHOLE), form_bytes(base, form), 0.0))
    calibration = survey.calibration if calibrated else None
    total = sum(node.before for node in nodes)
    return compress.CompressionPlan(nodes, [], 1.0, total, "hand", [], [], survey.base, calibration=calibration)


def fitting(base: Any, width: int, target: float) -> Form | None:
    """At one width, the form with the most neurons that fits."""
    most, neurons = target * form_bytes(base, WHOLE), intermediate_size(base)
    counts = [None, *range(neurons - 8, 0, -8)]
    return next((Form(width, count) for count in counts if form_bytes(base, Form(width, count)) <= most), None)


def pruned(model: Any, survey: compress.Survey, share: float) -> Any:
    """Experts with the least mean weighted output norm removed, alike in each layer (REAP's criterion,
    arXiv:2510.13999); routers choose among the others."""
    for site in find_experts(model).sites:
        sample, base = survey.calibration.layers[site.layer], site.base
        scores = []
        for expert in range(base.num_experts):
            token, choice = torch.where(sample.index == expert)
            with torch.no_grad():
                one = torch.full((len(token), 1), expert)
                output = base(sample.x[token], one, torch.ones(len(token), 1))
            scores.append(float((output.norm(dim=-1) * sample.weight[token, choice]).mean()) if len(token) else 0.0)
        kept = torch.tensor(scores).argsort(descending=True)[: max(2, round(share * len(scores)))].sort().values
        for name, stack in list(base.named_parameters(recurse=False)):
            setattr(base, name, nn.Parameter(stack.detach()[kept]))
        base.num_experts = site.router.num_experts = len(kept)
        site.router.weight = nn.Parameter(site.router.weight.detach()[kept])
    return model


def budgets(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    before = compare.losses(corpora.new_model(task), task)
    for seed in args.seeds:
        model = corpora.new_model(task)
        tree = find_experts(model)
        base = tree.sites[0].base
        survey = compress.survey(model, methods=(*METHODS, *args.methods), progress=False, **texts(task, args, seed))
        for target in args.targets:
            plans = {f"plan by {select}": survey.plan(target, select, seed) for select in args.selects}
            for name, width in UNIFORM.items():
                form = fitting(base, width, target)
                # two bits are for what nothing else fits into
                if form is None or (width == 2 and target > 0.2):
                    continue
                for calibrated in (False, True):
                    label = f"uniform {name}" + (", compensated" if calibrated else "")
                    every = dict.fromkeys(product(survey.layers, range(base.num_experts)), form)
                    plans[label] = by_hand(survey, base, every, calibrated)
            for arm, plan in plans.items():
                packed, report = compress.apply(corpora.new_model(task), plan, progress=False)
                forms = sorted({str(node.form) for node in plan.nodes})
                row = {"study": "budgets", "seed": seed, "target": target, "arm": arm}
                row |= {"predicted": plan.predicted} if arm.startswith("plan") else {}
                row |= {
                    "share": report.bytes_after / report.bytes_before,
                    "forms": forms if len(forms) < 3 else "mixed",
                }
                yield row | rises(packed, task, before)
            if tree.nodes != "routed":
                continue  # MLPs are one expert a layer
            if round(target * base.num_experts) < tree.sites[0].router.top_k:
                corpora.note(f"{target:g} of the experts are fewer than a token has: none are pruned")
                continue
            smaller = pruned(corpora.new_model(task), survey, target)
            kept = find_experts(smaller).sites[0].experts
            row = {"study": "budgets", "seed": seed, "target": target, "arm": "experts pruned by REAP's criterion"}
            row |= {"share": kept / base.num_experts, "forms": f"{kept} experts"}
            yield row | rises(smaller, task, before)


def predictors(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pack one node at a time; --plot draws the best statistic and the error map's against what was measured."""
    scatter = {}
    for seed in args.seeds:
        model = corpora.new_model(task)
        drawn = texts(task, args, seed)
        survey = compress.survey(model, methods=METHODS, progress=False, **drawn)
        emap = measure_errors(model, [*drawn["domain"], *drawn["retain"]], progress=False)
        base = find_experts(model).sites[0].base
        before = statistics.mean(survey.calibration.losses)
        for form in (Form(2), Form(neurons=0)):
            found = []
            for node in product(survey.layers, range(base.num_experts)):
                _, report = compress.apply(copy.deepcopy(model), by_hand(survey, base, {node: form}), progress=False)
                found.append(statistics.mean(report.after) - before)
            measured, place = torch.tensor(found, dtype=torch.float64), survey.forms.index(form)
            scores = {
                select: survey.score(select)[:, :, place].flatten() for select in FORM_SELECTIONS if select != "random"
            }
            scores |= {"error mass": emap.mass.flatten(), "frequency": emap.count.flatten()}
            scores |= {
                "squared error times weights": emap.square.flatten() * survey.score("weights")[:, :, place].flatten()
            }
            row = {"study": "predictors", "seed": seed, "form": str(form)}
            yield row | {name: correlation(score, measured) for name, score in scores.items()}
            scatter.setdefault(str(form), (measured, scores))
    if args.plot:
        draw(scatter, args.plot)


def draw(scatter: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = ("fisher", "error mass", "frequency")
    figure = Figure(figsize=(4 * len(names), 3.6 * len(scatter)), layout="constrained")
    axes = figure.subplots(len(scatter), len(names), squeeze=False)
    for line, (form, (measured, scores)) in zip(axes, scatter.items(), strict=True):
        for axis, name in zip(line, names, strict=True):
            least = float(scores[name][scores[name] > 0].min())
            # what no row reaches stands at the left
            axis.scatter(scores[name].clamp_min(least / 10), measured, s=9)
            axis.set_yscale("symlog", linthresh=1e-4)
            axis.set(
                xscale="log", xlabel=name, title=f"{form}: rank correlation {correlation(scores[name], measured):.2f}"
            )
        line[0].set_ylabel("measured change of the loss, nats/token")
    figure.savefig(path, dpi=110)


def draw_lifecycle(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    steps = sorted({row["steps"] for row in rows})
    for name, label in (("grown", "nodes that grow"), ("others", "as many others of the same layers")):
        medians = [statistics.median(row[name] for row in rows if row["steps"] == step) for step in steps]
        axis.plot(steps, medians, marker="o", label=label)
    axis.set(
        xlabel="steps of growth", ylabel="loss rise when packed to 2 bit, nats/token", xticks=steps, ylim=(0, None)
    )
    axis.legend()
    figure.savefig(path, dpi=110)


def grown(model: Any, emap: ErrorMap, args: argparse.Namespace, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    peft_model = get_peft_model(model, PCGrowConfig(error_map=emap, **{"budget": args.budget, **options}))
    return peft_model, create_pcgrow_optimizer(peft_model, lr=args.lr)


def mapped(task: corpora.Task, args: argparse.Namespace, seed: int) -> ErrorMap:
    windows = next(corpora.batches(task.domain_train, compare.MAP_WINDOWS, 1, seed))
    return measure_errors(corpora.new_model(task), windows.split(args.batch), progress=False)


def lifecycle(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        emap = mapped(task, args, seed)
        model, optimizer = grown(corpora.new_model(task), emap, args)
        locus = {int(layer): list(nodes) for layer, nodes in model.peft_config["default"].locus.items()}
        # as many nodes of each layer again, the next ones by error; where MLPs are nodes, of other layers
        others = {}
        for layer, nodes in locus.items():
            order = emap.mass[emap.layers.index(layer)].argsort(descending=True).tolist()
            others[layer] = [expert for expert in order if expert not in nodes][: len(nodes)]
        if not any(others.values()):
            order = [emap.layers[row] for row in emap.mass.sum(1).argsort(descending=True).tolist()]
            others = {layer: [0] for layer in [layer for layer in order if layer not in locus][: len(locus)]}
        drawn = texts(task, args, seed)
        batches = list(corpora.batches(task.domain_train, args.batch, args.steps, seed))
        half = len(batches) // 2
        for done, piece in ((0, []), (half, batches[:half]), (len(batches), batches[half:])):
            compare.descend(model, optimizer, piece)
            merged = copy.deepcopy(model).merge_and_unload()
            loss = corpora.evaluate(merged, task.domain_eval)
            for width in args.widths:
                row = {"study": "lifecycle", "seed": seed, "steps": done, "bits": width, "domain loss": loss}
                for name, nodes in (("grown", locus), ("others", others)):
                    row[name] = alone(merged, nodes, width, drawn, task.domain_eval) - loss
                yield row


def alone(model: nn.Module, nodes: dict[int, list[int]], width: int, drawn: dict, held_out: torch.Tensor) -> float:
    """The domain's held-out loss with only these nodes packed."""
    survey = compress.survey(model, methods=("quantize",), progress=False, **drawn)
    forms = {(layer, expert): Form(width) for layer, experts in nodes.items() for expert in experts}
    plan = by_hand(survey, find_experts(model).sites[0].base, forms)
    packed, _ = compress.apply(copy.deepcopy(model), plan, progress=False)
    return corpora.evaluate(packed, held_out)


def adapter(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    before = compare.losses(corpora.new_model(task), task)
    ways: list[dict[str, Any]] = [
        {"bits": 4},
        {"target": 0.25},
        {"bits": 3},
        {"bits": 2},
    ]
    for seed in args.seeds:
        emap = mapped(task, args, seed)
        setting = compare.Setting("adapter", "", lambda model, _, emap=emap: grown(model, emap, args))
        model, row = compare.fit(setting, task, args, seed)
        whole = compare.finish({**row, "after": compare.losses(model, task)}, before)
        for way in ways:
            shrunk = copy.deepcopy(model)
            text = next(corpora.batches(task.domain_train, args.calibration, 1, seed)).split(args.batch)
            report = compress.shrink_adapter(shrunk, batches=text, **way)
            found = compare.finish({**row, "after": compare.losses(shrunk, task)}, before)
            yield {
                "study": "adapter",
                "seed": seed,
                "arm": next(f"{name} {value}" for name, value in way.items()),
                "share": report.share,
                "gain": found["gain"],
                "forgetting": found["forgetting"],
                "gain kept": found["gain"] / whole["gain"],
            }


def base(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    before = compare.losses(corpora.new_model(task), task)
    for seed in args.seeds:
        emap = mapped(task, args, seed)
        for name, quantization in BASES.items():

            def build(model: Any, _: int, name=name, emap=emap, quantization=quantization):
                if name.endswith("too"):
                    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
                    model = AutoModelForCausalLM.from_pretrained(task.model_path, quantization_config=config)
                return grown(model, emap, args, base_quantization=quantization)

            model, row = compare.fit(compare.Setting("base", name, build), task, args, seed)
            sites = find_experts(model).sites
            stacks = storage_bytes(chain.from_iterable(chain(s.base.parameters(), s.base.buffers()) for s in sites))
            # this run holds unpacked experts in fp32; at rest they take half
            stacks //= 1 if quantization else 2
            optimizer, ids = create_pcgrow_optimizer(model, lr=args.lr), task.domain_train[: args.batch]
            model.train()
            peak = benchmark.peak_bytes(lambda m=model, o=optimizer, i=ids: benchmark.step(m, o, i), ids.device)
            row = compare.finish({**row, "after": compare.losses(model, task)}, before)
            row |= {"study": "base", "arm": name, "experts at rest": stacks, "peak_mib": peak / 2**20}
            yield row | {"model at rest": storage_bytes(chain(model.parameters(), model.buffers()))}


def order(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    before = compare.losses(corpora.new_model(task), task)
    options = {"grow": "spawn", "budget": args.spawn_budget, "gate_fpr": 0.1, "protect": 0.8}
    for seed in args.seeds:
        emap = frontier.measured(task, args, seed)
        retain = texts(task, args, seed)["retain"]
        for target in args.targets:

            def compressed(target=target, retain=retain):
                model = corpora.new_model(task)
                return compress.apply(model, compress.plan(model, target=target, retain=retain, progress=False))[0]

            def build(model: Any, _: int, emap=emap, first=None):
                return grown(first() if first is not None else model, emap, args, **options)

            first = compare.Setting("order", "", lambda m, s, c=compressed: build(m, s, first=c))
            model, row = compare.fit(first, task, args, seed)
            row |= {"study": "order", "target": target}
            yield compare.finish({**row, "arm": "compress, spawn", "after": compare.losses(model, task)}, before)
            model, _ = compare.fit(compare.Setting("order", "", build), task, args, seed)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = PeftModel.from_pretrained(compressed(), folder)
            yield compare.finish({**row, "arm": "spawn, compress", "after": compare.losses(model, task)}, before)


def table(path: Path, plot: Path | None) -> None:
    """Medians over seeds of every number, by arm."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if plot:
        draw_lifecycle([row for row in rows if "grown" in row], plot)
    keys = ("target", "arm", "form", "steps", "bits")
    groups: dict[tuple, list[dict]] = {}
    for row in (row for row in rows if "seed" in row):
        groups.setdefault(tuple((key, row[key]) for key in keys if key in row), []).append(row)
    for group, found in groups.items():
        numbers = {k for k, v in found[0].items() if isinstance(v, float) and (k, v) not in group}
        shown = ", ".join(f"{k} {statistics.median(row[k] for row in found):.4f}" for k in sorted(numbers))
        print(f"{', '.join(str(value) for _, value in group)} ({len(found)}): {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    add = parser.add_argument
    add("--study", choices=STUDIES, default="budgets")
    add("--targets", type=float, nargs="+", default=[0.5, 0.35, 0.25], help="shares of the experts' bytes in 16 bit")
    add("--selects", nargs="+", choices=FORM_SELECTIONS, default=["fisher", "output", "weights", "random"])
    add("--methods", nargs="*", choices=("sparsify", "skip"), default=[], help="beside quantizing and thinning")
    add("--calibration", type=int, default=48, help="windows of domain and of retain text (default: %(default)s)")
    add("--widths", type=int, nargs="+", default=[3, 2], help="bits, for lifecycle (default: %(default)s)")
    add("--budget", type=float, default=0.12, help="share of the experts grown (default: %(default)s)")
    add("--spawn-budget", type=float, default=0.5, help="share of the experts that are donors (default: %(default)s)")
    add("--map-windows", type=int, default=192, help="windows of a map for spawning (default: %(default)s)")
    add("--lr", type=float, default=0.0125, help="of Muon (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="of predictors; with --table, of lifecycle's rows")
    add("--table", type=Path, metavar="FILE", help="print rows saved with --json as a table, and stop")
    args = parser.parse_args()
    if args.table:
        table(args.table, args.plot)
        return
    task = corpora.load_task(args)
    corpora.emit({"machine": corpora.machine(), "study": args.study}, args.json)
    for row in {s.__name__: s for s in (budgets, predictors, lifecycle, adapter, base, order)}[args.study](task, args):
        corpora.emit(row, args.json)


if __name__ == "__main__":
    main()

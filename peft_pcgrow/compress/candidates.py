"""What each expert of a layer could become, and what each choice would do to the loss.

Every form is made for real (rounded, thinned, with its errors made up for) and run on the calibration rows; what is
predicted from that is the change of the loss. Shapes: E experts, F forms, S texts, R rows, H hidden, I neurons.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcgrow_kernels import lowbit
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import Tree
from peft_pcgrow.compress.calibrate import LayerSample
from peft_pcgrow.compress.thin import compensated, elimination_order
from peft_pcgrow.packed.forms import MULTIPLE, WHOLE, Form, form_bytes

# what can predict the change of the loss, see `Candidates.damage`
DAMAGES = ("fisher", "output", "isotropic", "weights", "gradient")
# rows of an expert that forms are tried on, at least
TRIED = 512
# rows for each input of a matrix that its moments are summed over, if there are as many: what makes up for neurons is
# fitted to these, and leaves 2 times the squared error on other text with 8 rows a neuron, 11 times with 1.5 (SmolLM2)
ROWS = 8
# share of the rows' mean that moments of rarely used experts are drawn towards
SHRINKAGE = 0.05
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Candidates:
    """The forms that the experts of one layer could take.

    Attributes:
        forms: F of them. bytes: of one expert in each, `[F]`.
        damage: by statistic, `[E, F, S]`, summed over each text's rows y = p f(x) with errors delta:
            "fisher": sum (dy . delta)^2 / 2, the second-order change of the loss by the empirical Fisher matrix, in
            nats; "isotropic": the same if errors had no direction, sum |dy|^2 |delta|^2 / (2 H); "gradient": the
            first-order change |sum dy . delta|; "output": sum |dy|^2; "weights": |dW|^2 / |W|^2,
            neurons that are gone counting as their share.
        data: what to store, by form and then by stack, a list of E.
        spread: sum of |dy / p|^2 over an expert's rows of all texts over their number, `[E, F]`.
        kept: the neurons that are left, by form, `[E, P]`.
    """

    forms: tuple[Form, ...]
    bytes: Tensor
    damage: dict[str, Tensor]
    spread: Tensor
    data: dict[Form, dict[str, list[Tensor]]]
    kept: dict[Form, Tensor]


def forms_of(base: experts.ExpertsModule, methods: Sequence[str]) -> tuple[Form, ...]:
    """The forms that some methods offer, `WHOLE` first."""
    neurons = experts.intermediate_size(base)
    widths = lowbit.WIDTHS if "quantize" in methods else (16,)
    counts: list[int | None] = [None]
    if "thin" in methods:
        shares = (0.75, 0.5, 0.25)
        counts += sorted({int(share * neurons) // MULTIPLE * MULTIPLE for share in shares} - {0, neurons})[::-1]
    found = [Form(width, count) for count in counts for width in widths]
    if "thin" in methods:
        found.append(Form(neurons=0))
    if "sparsify" in methods:
        found += [Form(sparsity=kind) for kind in lowbit.SPARSITIES]
    return tuple(dict.fromkeys([WHOLE, *found]))


def check_whole(tree: Tree) -> None:
    """Raise ValueError unless all experts of a model can be compressed together."""
    for site in tree.sites:
        stacks = experts.expert_stacks(site.base)
        if site.module is not site.base:
            raise ValueError(
                f"{site.name} has an adapter around it: compress what merge_and_unload() gives, or grow on a quantized "
                "base with PCGrowConfig(base_quantization=...)"
            )
        if experts.is_packed(site.base):
            raise ValueError(f"{site.name} is packed already: compress the model in full precision, once")
        foreign = any(stack.dtype not in FLOATS or experts.is_read_only(stack) for stack in stacks.values())
        if hasattr(site.base, "parametrizations") or foreign:
            kinds = ", ".join(sorted({str(stack.dtype) for stack in stacks.values()}))
            raise ValueError(f"{site.name} is quantized in another way ({kinds}): load its experts in bf16")
        if any(stack.is_meta for stack in stacks.values()):
            raise ValueError(f"{site.name} has no values here (meta device): load the model without offloading experts")
    shapes = {site.layer: [list(s.shape) for s in experts.expert_stacks(site.base).values()] for site in tree.sites}
    one, *others = shapes
    for layer in others:
        if shapes[layer] != shapes[one]:
            raise ValueError(
                f"the experts of layers {one} and {layer} differ in number or size ({shapes[one]} and "
                f"{shapes[layer]}): such layers cannot be planned together yet"
            )


@torch.no_grad()
def candidates(
    base: experts.ExpertsModule, sample: LayerSample | None, forms: Sequence[Form], texts: int
) -> Candidates:
    """Make and try all forms of one layer's experts.

    Args:
        sample: calibration rows; None: plain rounding, and neurons by the size of their weights.
    """
    whole = torch.arange(base.num_experts, device="cpu")
    stacks = {name: experts.expert_stacks(base)[name].detach() for name in experts.matrices(base)}
    stacks = {name: stack if isinstance(stack, Tensor) else stack[whole] for name, stack in stacks.items()}
    plain = {name: (w.mT if base.is_transposed else w).float() for name, w in stacks.items()}
    rows, moments = [], {}
    if sample is not None:
        hidden, every = sample.x.shape[1], range(base.num_experts)
        widest = max(hidden, experts.intermediate_size(base))
        # one expert's at a time: there may be many
        moments = _moments(base, (_rows(base, sample, expert, ROWS * widest) for expert in every))
        rows = [_rows(base, sample, expert, max(TRIED, 2 * hidden)) for expert in every]
    half = lowbit.half_of(stacks["down_proj"].dtype)
    first, count = experts.first_matrix(base), base.num_experts
    order = _order(plain["down_proj"], moments)
    befores = [_run(base, x, {n: w[e] for n, w in plain.items()}, e, None, first) for e, (x, *_) in enumerate(rows)]
    damage = {name: torch.zeros(count, len(forms), texts, dtype=torch.float64, device="cpu") for name in DAMAGES}
    spread = torch.zeros(count, len(forms), dtype=torch.float64, device="cpu")
    data: dict[Form, dict[str, list[Tensor]]] = {}
    kept_by_form: dict[Form, Tensor] = {}
    for place, form in enumerate(forms):
        weights, inner = dict(plain), moments.get("down_proj")
        kept = None
        if form.neurons is not None:
            # in the order they stand, so that all of them is no change
            kept = kept_by_form[form] = order[:, order.shape[1] - form.neurons :].sort(dim=1).values
            if form.neurons:
                weights, inner = _thinned(base, plain, inner, kept)
            else:
                weights = {name: w[:, :0] for name, w in plain.items()}
        data[form], given = {}, dict(weights)
        for name, weight in given.items():
            moment = inner if name == "down_proj" else moments.get(name)
            data[form][name] = [weight.new_empty(0, dtype=torch.uint8)] * count
            if form.neurons != 0:
                encoded = lowbit.encode(weight, form.width, form.sparsity, moment, half)
                data[form][name] = list(encoded)
                shape = weight.shape[1], weight.shape[2]
                weights[name] = lowbit.decode(encoded, *shape, form.width, form.sparsity, torch.float32, half)
        for expert in range(count):
            left = 1.0 if form.neurons is None else form.neurons / experts.intermediate_size(base)
            if left:
                square = sum(float((weights[n][expert] - given[n][expert]).square().sum()) for n in given)
                left *= 1 - square / sum(float(w[expert].square().sum()) for w in given.values())
            damage["weights"][expert, place] = 1 - left
            if sample is None or form == WHOLE or not len(rows[expert][0]):
                continue
            x, p, error, text, scale = rows[expert]
            before = befores[expert]
            after = torch.zeros_like(before)
            if form.neurons != 0:
                bias = kept[expert] if kept is not None else None
                after = _run(base, x, {n: w[expert] for n, w in weights.items()}, expert, bias, first)
            change = (after - before) * p[:, None]
            along = (change * error).sum(-1).double()
            size, errors = change.square().sum(-1).double(), error.square().sum(-1).double()
            spread[expert, place] = float((size / p.square().clamp_min(1e-12)).mean())
            for name, values in (
                ("fisher", along.square() / 2),
                ("isotropic", size * errors / (2 * x.shape[1])),
                ("output", size),
                ("gradient", along),
            ):
                damage[name][expert, place].index_add_(0, text, values.cpu() * scale)
    damage["gradient"] = damage["gradient"].abs()
    sizes = torch.tensor([form_bytes(base, form) for form in forms], dtype=torch.float64, device="cpu")
    return Candidates(tuple(forms), sizes, damage, spread, data, kept_by_form)


def _rows(base: experts.ExpertsModule, sample: LayerSample, expert: int, most: int) -> tuple:
    """Inputs, routing weights, errors and texts of at most so many rows, and how many each stands for."""
    token, choice = torch.where(sample.index == expert)
    total = len(token)
    if total > most:
        some = torch.arange(most, device="cpu") * total // most
        token, choice = token[some], choice[some]
    device = experts.expert_stacks(base)["down_proj"].device
    x, error = sample.x[token].to(device).float(), sample.error[token].to(device).float()
    p = sample.weight[token, choice].to(device).float()
    return x, p, error, sample.text[token], total / max(len(token), 1)


def _run(
    base: experts.ExpertsModule, x: Tensor, weights: dict[str, Tensor], expert: int, kept: Tensor | None, first: str
) -> Tensor:
    """An expert's output with these matrices `[O, I]`."""

    def product(inputs: Tensor, name: str) -> Tensor:
        y = inputs @ weights[name].mT
        if not base.has_bias:
            return y
        bias = experts.expert_stacks(base)[f"{name}_bias"][expert].float()
        if name == first and kept is not None:
            bias = bias[neurons_at(base, name, kept)]
        return y + bias

    inner = product(x, first)
    inner = base._apply_gate(inner) if base.has_gate else base.act_fn(inner)
    y = product(inner, "down_proj")
    return base.post_expert_norm(y) if base.has_post_expert_norm else y


def neurons_at(base: experts.ExpertsModule, stack: str, neurons: Tensor) -> Tensor:
    """Where neurons lie along a stack."""
    lying = experts.neuron_places(base, stack, neurons)
    assert lying is not None
    return lying[1]


def _moments(base: experts.ExpertsModule, rows: Iterable[tuple]) -> dict[str, Tensor]:
    """Second moments `[E, I, I]` of what enters each matrix, rows weighted by p^2 |delta|^2: by what an error of the
    output costs there. Those of experts with few rows are drawn towards all experts' mean."""
    found: dict[str, list[Tensor]] = {}
    first, counts = experts.first_matrix(base), []
    for expert, (x, p, error, *_) in enumerate(rows):
        counts.append(len(x))
        cost = error.square().sum(-1)
        cost = (p.square() * cost / cost.mean().clamp_min(1e-30)).sqrt()
        inputs = experts.stack_inputs(base, x, expert)
        for name, entering in inputs.items():
            weighted = entering.float() * cost[:, None]
            found.setdefault(name, []).append((weighted.mT @ weighted).double())
    stacked = {name: torch.stack(each) for name, each in found.items()}
    for moment in stacked.values():
        mean = moment.sum(0) / max(sum(counts), 1)
        count = torch.tensor(counts, dtype=moment.dtype, device=moment.device).clamp_min(1)
        moment += SHRINKAGE * mean * count[:, None, None]
    assert first in stacked
    return stacked


def _order(down: Tensor, moments: dict[str, Tensor]) -> Tensor:
    """Neurons in the order to remove them, `[E, I]`."""
    if moments:
        return elimination_order(down, moments["down_proj"], MULTIPLE)
    return down.square().sum(1).argsort(dim=1)


def _thinned(
    base: experts.ExpertsModule, plain: dict[str, Tensor], inner: Tensor | None, kept: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Matrices `[E, ...]` of the neurons `kept [E, P]`, and the second moments of what enters the down projection."""
    first = experts.first_matrix(base)
    places = neurons_at(base, first, kept)
    entering = torch.gather(plain[first], 1, places[:, :, None].expand(-1, -1, plain[first].shape[2]))
    if inner is None:
        down = torch.gather(plain["down_proj"], 2, kept[:, None].expand(-1, plain["down_proj"].shape[1], -1))
        return {first: entering, "down_proj": down}, None
    down = compensated(plain["down_proj"], inner, kept)
    left = torch.gather(inner, 1, kept[:, :, None].expand(-1, -1, inner.shape[2]))
    left = torch.gather(left, 2, kept[:, None].expand(-1, kept.shape[1], -1))
    return {first: entering, "down_proj": down}, left

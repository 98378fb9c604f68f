"""How well cheap ways of carrying errors down a decoder's layers hold at depth, against the exact errors.

Exact errors dLoss/dx at all layers' outputs come from autograd, on windows to fit predictors on and on others to test
on. A way makes errors at every layer from the top's. Its row has by layer, bottom first, cosines with the exact ones of
down_proj's gradient summed over the test windows (`gradient`: what training uses; `fresh`: with that of the windows to
fit on, flattering what is fitted), of a token's error (mean: `token`) and of all errors (`flat`); the share of their
squared norm that is explained, and the ratio of norms.

`cost` is of carrying alone, in forwards of the model: multiply-adds of linear layers, a forward's head too. What errors
go through costs twice (run again, and a vector-Jacobian product), what only runs again once. Attention's scores, fits
of predictors and weight gradients are left out.

    python examples/carry_study.py MODEL --text DIR/NAME > rows.jsonl
    python examples/carry_study.py --table rows.jsonl
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import corpora

BATCH = 8
RANKS = (16, 64)
NAMES = ("gradient", "fresh", "token", "flat", "explained", "ratio")
# of a ridge regression, as shares of the predictors' mean square; what does best on a quarter of the rows is taken
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass
class Sample:
    """By layer: inputs, errors at outputs, down_proj's inputs, all `[N, S, ...]`; other arguments by batch."""

    inputs: list[Tensor]
    errors: list[Tensor]
    hidden: list[Tensor]
    calls: list[list[dict]]


@dataclass(frozen=True)
class Parts:
    """What errors go through in a layer, the rest being constant; and for which share of the tokens, those with the
    largest errors. The others' are handed on unchanged."""

    attention: str = "full"  # or "value": its probabilities are constant; or "none"
    mlp: bool = True
    tokens: float = 1.0


EXACT = Parts()
KEPT = {
    "every layer": EXACT,
    "MLP": Parts("none"),
    "MLP and values": Parts("value"),
    "values": Parts("value", mlp=False),
    "attention": Parts(mlp=False),
    **{f"1/{n} of the tokens": Parts(tokens=1 / n) for n in (2, 4, 8)},
}


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers; raises ValueError where they do not have the parts of Llama's."""
    layers = list(getattr(model.base_model, "layers", ()))
    parts = {"input_layernorm", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"}
    if len(layers) < 2 or any(parts - {name for name, _ in layer.named_modules()} for layer in layers):
        raise ValueError(f"{type(model).__name__}: expected a decoder with layers like Llama's ({', '.join(parts)})")
    return layers


def exact_errors(model: PreTrainedModel, windows: Tensor) -> Sample:
    """Run the model on windows `[N, S]` and differentiate the summed loss by every layer's output."""
    layers, outputs, handles = layers_of(model), [], []
    inputs, errors, hidden, calls = ([[] for _ in layers] for _ in range(4))

    def called(i: int, args: tuple, kwargs: dict) -> None:
        inputs[i].append((args[0] if args else kwargs["hidden_states"]).detach())
        calls[i].append({key: kwargs[key] for key in ("attention_mask", "position_embeddings")})

    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda _, a, b, i=i: called(i, a, b), with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda _, args, output: outputs.append(output)))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, a, i=i: hidden[i].append(a[0].detach())))
    for chunk in windows.split(BATCH):
        ids = chunk.to(model.device)
        outputs.clear()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        for held, error in zip(errors, torch.autograd.grad(loss, outputs), strict=True):
            held.append(error)
    for handle in handles:
        handle.remove()
    return Sample(*([torch.cat(held) for held in kind] for kind in (inputs, errors, hidden)), calls)


def through(layer: nn.Module, call: dict, x: Tensor, delta: Tensor, parts: Parts) -> Tensor:
    """The error at a layer's input `[B, S, H]` from that at its output, `delta`."""
    attention, x = layer.self_attn, x.detach().requires_grad_()
    normed = layer.input_layernorm(x)
    moved, shares = attention(hidden_states=normed, **call)
    if parts.attention == "value":
        values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        values = values.repeat_interleave(shares.shape[1] // values.shape[1], dim=1)
        moved = attention.o_proj((shares.detach() @ values).transpose(1, 2).flatten(2))
    elif parts.attention == "none":
        moved = moved.detach()
    changed = moved + layer.mlp(layer.post_attention_layernorm(x + moved)) if parts.mlp else moved
    size = delta.norm(dim=-1, keepdim=True)
    sent = delta * (size >= size.flatten().quantile(1 - parts.tokens))
    return delta + torch.autograd.grad(changed, x, sent)[0]


@torch.no_grad()
def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The map `[K, H]` of ridge regression, `y [T, H] ~ x [T, K] @ map`."""
    wide, y, rows = x.double(), y.double(), len(x) * 3 // 4

    def solved(strength: float, end: int | None = None) -> Tensor:
        square = wide[:end].T @ wide[:end]
        square += strength * square.diagonal().mean().clamp_min(1e-300) * torch.eye(len(square)).to(square)
        return torch.cholesky_solve(wide[:end].T @ y[:end], torch.linalg.cholesky(square))

    best = min(STRENGTHS, key=lambda s: float((wide[rows:] @ solved(s, rows) - y[rows:]).square().sum()))
    return solved(best).to(x.dtype)


def predicted(x: Tensor, y: Tensor, anchor: Tensor) -> dict[str, Tensor]:
    """Predictions from the errors `anchor`, fitted on others `x` and their targets `y`, all `[T, H]`."""
    found = {"direct": anchor, "scalar": anchor * ((x * y).sum() / x.square().sum())}
    found["diagonal"] = anchor * ((x * y).sum(0) / x.square().sum(0).clamp_min(1e-30))
    # of the change on the way: a strong ridge leaves the error as it is
    change = ridge(x, y - x)
    found["linear"] = anchor + anchor @ change
    # reduced rank: the main directions of the fitted values
    _, _, main = torch.svd_lowrank(x @ change, q=min(max(RANKS), *x.shape), niter=4)
    return found | {f"rank {r}": anchor + anchor @ change @ main[:, :r] @ main[:, :r].T for r in RANKS}


def gradient(errors: Tensor, hidden: Tensor) -> Tensor:
    """Of down_proj, summed over all tokens, `[H * I]`."""
    return (errors.flatten(0, 1).T @ hidden.flatten(0, 1)).flatten()


def size_of(*parts: nn.Module) -> int:
    """Multiply-adds a token."""
    return sum(m.weight.numel() for part in parts for m in part.modules() if isinstance(m, nn.Linear))


class Study:
    """Ways to carry errors down a model's layers, fitted on one sample and tested on another."""

    def __init__(self, model: PreTrainedModel, fit: Sample, test: Sample):
        self.layers, self.fit, self.test, self.total = layers_of(model), fit, test, len(fit.errors)
        self.forward = size_of(*self.layers) + model.get_output_embeddings().weight.numel()
        self.exact, self.fresh = (list(map(gradient, sample.errors, sample.hidden)) for sample in (test, fit))
        again = self.step(test, 1, test.errors[1], EXACT)
        if not torch.allclose(again, test.errors[0], rtol=1e-2, atol=1e-3 * float(again.abs().max())):
            raise ValueError(f"{type(self.layers[1]).__name__} does not run its parts as Llama's layers do")

    def cost(self, index: int, parts: Parts = EXACT) -> float:
        """Of going through one layer, in forwards."""
        attention, mlp = self.layers[index].self_attn, size_of(self.layers[index].mlp) * parts.mlp
        whole, value = size_of(attention), size_of(attention.v_proj, attention.o_proj)
        back = {"full": whole, "value": value, "none": 0}[parts.attention]
        # for values alone only the probabilities are needed again; keys and values are needed of all tokens
        again = whole - value * (parts.attention == "value" and not parts.mlp)
        others = (1 - parts.tokens) * 4 * size_of(attention.v_proj)
        return ((back + again + 2 * mlp) * parts.tokens + others) / self.forward

    def step(self, sample: Sample, index: int, delta: Tensor, parts: Parts) -> Tensor:
        """Errors at layer `index`'s input from those at its output, `[N, S, H]`."""
        chunks = zip(sample.calls[index], sample.inputs[index].split(BATCH), delta.split(BATCH), strict=True)
        return torch.cat([through(self.layers[index], call, x, d, parts) for call, x, d in chunks])

    def unchanged_below(self, lowest: int) -> list[Tensor]:
        """Errors that are exact down to the input of layer `lowest`, and below as they are there."""
        return [self.test.errors[max(index, lowest - 1)] for index in range(self.total)]

    def descend(self, parts: Callable[[int], Parts | None], mapped: bool = False) -> tuple[float, list[Tensor]]:
        """Cost and errors: through `parts` of each layer, or unchanged; `mapped`: and a fitted map of the rest."""
        delta, known, cost, errors = self.test.errors[-1], self.fit.errors[-1], 0.0, self.test.errors[-1:]
        for index in range(self.total - 1, 0, -1):
            kept, above, known_above = parts(index), delta, known
            if kept is not None:
                delta, cost = self.step(self.test, index, delta, kept), cost + self.cost(index, kept)
                known = self.step(self.fit, index, known, kept) if mapped else known
            if mapped and kept != EXACT:
                change = ridge(known_above.flatten(0, 1), (self.fit.errors[index - 1] - known).flatten(0, 1))
                delta, known = delta + above @ change, known + known_above @ change
                cost += change.numel() / self.forward
            errors.append(delta)
        return cost, errors[::-1]

    def anchored(self, every: int) -> Iterator[tuple[str, float, list[Tensor]]]:
        """Predictions from exact errors at every so many layers, from the top: bounds, as those have a cost too."""
        top, width = self.total - 1, self.test.errors[0].shape[-1]
        found: dict[str, list[Tensor]] = {}
        for index in range(self.total):
            anchor = top - (top - index) // every * every
            x, y = (self.fit.errors[place].flatten(0, 1) for place in (anchor, index))
            made = predicted(x, y, z := self.test.errors[anchor].flatten(0, 1))
            if every >= self.total:
                # the norm before each part divides its Jacobian by the size of what it reads
                a, b = (s.inputs[min(index + 1, top)].flatten(0, 1).norm(dim=1)[:, None] for s in (self.fit, self.test))
                made["linear over the input's size"] = z + (z / b) @ ridge(x / a, y - x)
            for name, error in made.items():
                found.setdefault(name, []).append(error.view_as(self.test.errors[index]))
        numbers = {"direct": 0, "scalar": 0, "diagonal": 0} | {f"rank {r}": 2 * r * width for r in RANKS}
        exact = sum(self.cost(index) for index in range(top % every + 1, self.total))
        for name, errors in found.items():
            cost = exact + (top - top // every) * numbers.get(name, width**2) / self.forward
            yield f"{name}, " + (f"exact every {every}" if every < self.total else "from the top"), cost, errors

    def ways(self, hops: list[int]) -> Iterator[tuple[str, float, list[Tensor]]]:
        """Name, cost and errors of the test windows by layer, of every way."""
        total, e = self.total, self.fit.errors
        costs = [0.0, *(self.cost(index) for index in range(1, total))]
        for depth in sorted({total * sixths // 6 for sixths in range(1, 6)}):
            yield f"top {depth} layers", sum(costs[total - depth :]), self.unchanged_below(total - depth)
        for share in (2, 4, 8):  # a step on fewer windows: noise, but no bias
            kept = (torch.arange(len(self.test.errors[0])) % share == 0)[:, None, None]
            some = [error * kept.to(error) for error in self.test.errors]
            yield f"1/{share} of the windows", sum(costs) / share, some
        for every in (total, *(hop for hop in hops if hop < total)):
            yield from self.anchored(every)
        kinds: dict[str, Callable[[int], Parts | None]] = {name: lambda _, p=p: p for name, p in KEPT.items()}
        ranked = sorted(range(1, total), key=lambda i: float((e[i] - e[i - 1]).norm() / -e[i - 1].norm()))
        for count in sorted({max(1, total // part) for part in (10, 5, 3, 2)}):
            held = frozenset(ranked[:count])
            kinds[f"{count} layers that change most"] = lambda i, held=held: EXACT if i in held else None
        for name, parts in kinds.items():
            yield name, *self.descend(parts)
            if name != "every layer":
                yield f"{name}, map of the rest", *self.descend(parts, mapped=True)
        yield "maps from layer to layer", *self.descend(lambda _: None, mapped=True)


def judged(study: Study, errors: list[Tensor]) -> dict[str, list[float]]:
    """What a row says of errors by layer."""
    rows, test = [], study.test
    for error, exact, hidden, *known in zip(errors, test.errors, test.hidden, study.exact, study.fresh, strict=True):
        row = [cosine_similarity(gradient(error, hidden), one, dim=0) for one in known]
        row.append(cosine_similarity(error[:, :-1], exact[:, :-1], dim=-1).mean())  # a window's last has none
        row.append(cosine_similarity(error.flatten(), exact.flatten(), dim=0))
        row += [1 - (error - exact).square().sum() / exact.square().sum(), error.norm() / exact.norm()]
        rows.append([round(float(value), 4) for value in row])
    return {name: list(values) for name, values in zip(NAMES, zip(*rows, strict=True), strict=True)}


def table(path: Path) -> None:
    """Print saved rows as Markdown: means over the layers below the top / over the lowest third."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if "gradient" in line]
    print(f"| text | way | cost | {' | '.join(NAMES)} |\n{'|---' * (3 + len(NAMES))}|")
    for row in sorted(rows, key=lambda row: (row["text"], -sum(row["gradient"]))):
        third = max(1, len(row["gradient"]) // 3)
        shown = (f"{statistics.mean(row[n][:-1]):.2f} / {statistics.mean(row[n][:third]):.2f}" for n in NAMES)
        print(f"| {row['text']} | {row['way']} | {row['cost']:.2f} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="folder of a causal language model")
    add("--text", metavar="DIR/NAME", action="append", default=[], help="DIR/NAME.train.jsonl; repeatable")
    add("--windows", type=int, nargs=2, default=[64, 32], metavar=("FIT", "TEST"), help="default: 64 32")
    add("--length", type=int, default=256, help="tokens a window (default: %(default)s)")
    add("--hops", type=int, nargs="*", default=[2, 3, 5, 10], help="layers from one exact error to the next")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--table", type=Path, metavar="FILE", help="print saved rows as a table, and stop")
    args = parser.parse_args()
    if args.table:
        return table(args.table)
    torch.manual_seed(args.seed)
    tokenizer, count, started = AutoTokenizer.from_pretrained(args.model), args.windows[0], time.perf_counter()
    # eager attention gives its probabilities
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    model.to(args.device).eval().requires_grad_(False)
    corpora.emit({"machine": corpora.machine(), "windows": args.windows, "length": args.length}, True)
    for spec in args.text:
        found = corpora.windows(tokenizer, corpora.load_corpus(spec, "train"), args.length)
        ids = next(corpora.batches(corpora.spread(found, sum(args.windows)), sum(args.windows), 1, args.seed))
        study = Study(model, exact_errors(model, ids[:count]), exact_errors(model, ids[count:]))
        for way, cost, errors in study.ways(args.hops):
            row = {"text": Path(spec).name, "way": way, "cost": cost, "seconds": time.perf_counter() - started}
            corpora.emit({**row, **judged(study, errors)}, as_json=True)


if __name__ == "__main__":
    main()

"""What tells a domain's tokens from other text best: gate features compared at equal false-positive rates.

Each gate is fitted on training windows of both sides and set on held-out retain windows; the recall is that of held-out
domain windows, a median over seeds (which windows are fitted on) of the mean over layers. `other text` is the share of
Python source that passes, which no gate has seen.

    python examples/gates.py --model PATH --domain DIR/NAME --retain DIR/NAME
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import corpora
from pcgrow_kernels.window_mean import totals, window_means
from peft_pcgrow import find_experts
from peft_pcgrow.gates.gate import GATE_RIDGE, Gate, Moments, Rows, discriminant, fit_law

RATES = (0.1, 0.05, 0.01, 0.002)
# a gate: takes fitting features of domain and retain `[N, S, D]`, gives scores `[N, S]` of features
Fit = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


def whole(x: Tensor) -> Rows:
    return Rows(torch.ones(x.shape[:2], dtype=torch.bool))


def means(x: Tensor, window: int) -> Tensor:
    return window_means(totals(x, whole(x).real), x.shape[1], window)[0].float()


def fisher(domain: Tensor, retain: Tensor) -> Tensor:
    moments = []
    for features in (domain, retain):
        held = Moments(features.shape[-1])
        held.add(features.reshape(-1, features.shape[-1]))
        moments.append(held)
    return discriminant(*moments)


def token(domain: Tensor, retain: Tensor) -> Callable[[Tensor], Tensor]:
    v = fisher(domain, retain)
    return lambda x: x @ v


def euclidean(domain: Tensor, retain: Tensor) -> Callable[[Tensor], Tensor]:
    """The difference of the means, inputs not whitened."""
    v = domain.mean((0, 1)) - retain.mean((0, 1))
    return lambda x: x @ v


def context(domain: Tensor, retain: Tensor, window: int, shrink: bool = True) -> Callable[[Tensor], Tensor]:
    """The product's gate; without `shrink`, the bare mean of the scores."""
    v = fisher(*(means(x, window)[:, 7:] for x in (domain, retain)))
    gate = Gate(v, torch.zeros(4), window)
    law = fit_law(*([(gate.scores(x), whole(x).real)] for x in (domain, retain)), window)
    gate = Gate(v, law, window)
    if not shrink:
        return lambda x: means(gate.scores(x).unsqueeze(-1), window).squeeze(-1)
    return lambda x: gate.evidence(gate.scores(x), whole(x))[0]


def both(domain: Tensor, retain: Tensor, window: int) -> Callable[[Tensor], Tensor]:
    """The token's own features beside the evidence of the text."""
    inner = context(domain, retain, window)
    scale = inner(domain).std()

    def features(x: Tensor) -> Tensor:
        return torch.cat([x, (inner(x) / scale).unsqueeze(-1)], dim=-1)

    outer = token(features(domain), features(retain))
    return lambda x: outer(features(x))


def random_layer(domain: Tensor, retain: Tensor, window: int, width: int = 512) -> Callable[[Tensor], Tensor]:
    """A two-layer gate: fixed random ReLU features of the token, then the product's gate."""
    middle, spread = domain.mean((0, 1)), torch.cat([domain, retain]).std((0, 1)) + 1e-6
    projection = torch.randn(domain.shape[-1], width, generator=torch.Generator().manual_seed(0))
    projection /= domain.shape[-1] ** 0.5

    def features(x: Tensor) -> Tensor:
        return torch.relu(((x - middle) / spread) @ projection)

    inner = context(features(domain), features(retain), window)
    return lambda x: inner(features(x))


def trained(domain: Tensor, retain: Tensor, window: int, hidden: int) -> Callable[[Tensor], Tensor]:
    """Logistic regression (`hidden` 0) or a small network on the token and the running mean, by gradient descent."""

    def features(x: Tensor) -> Tensor:
        return torch.cat([x, means(x, window)], dim=-1) if window else x

    inputs = torch.cat([features(x).reshape(-1, features(x[:1]).shape[-1]) for x in (domain, retain)])
    middle, spread = inputs.mean(0), inputs.std(0) + 1e-6
    labels = torch.cat([torch.ones(domain.shape[:2]).flatten(), torch.zeros(retain.shape[:2]).flatten()])
    torch.manual_seed(0)
    width = inputs.shape[1]
    layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)] if hidden else [nn.Linear(width, 1)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(400):
        chosen = torch.randint(len(inputs), (2048,))
        logits = network((inputs[chosen] - middle) / spread).squeeze(-1)
        nn.functional.binary_cross_entropy_with_logits(logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.no_grad()(lambda x: network((features(x) - middle) / spread).squeeze(-1))


GATES: dict[str, tuple[str, Fit]] = {
    "token, not whitened": ("input", euclidean),
    "token": ("input", token),
    "router logits of the token": ("logits", token),
    "token, logistic": ("input", partial(trained, window=0, hidden=0)),
    "token, 2-layer network": ("input", partial(trained, window=0, hidden=32)),
    "mean of router logits, W = 64": ("logits", partial(context, window=64)),
    "mean, W = 16": ("input", partial(context, window=16)),
    "mean, W = 64": ("input", partial(context, window=64)),
    "mean, W = 64, no shrinkage": ("input", partial(context, window=64, shrink=False)),
    "mean, whole text": ("input", partial(context, window=0)),
    "mean, W = 64, and the token": ("input", partial(both, window=64)),
    "mean, W = 64, of 512 random ReLU features": ("input", partial(random_layer, window=64)),
    "token and mean, W = 64, logistic": ("input", partial(trained, window=64, hidden=0)),
    "token and mean, W = 64, 2-layer network": ("input", partial(trained, window=64, hidden=32)),
}


@torch.no_grad()
def collect(model: nn.Module, windows: Tensor) -> dict[str, list[Tensor]]:
    """Inputs and router logits of every MoE layer, `[N, S, ...]` each."""
    tree = find_experts(model)
    found: dict[str, list[list[Tensor]]] = {"input": [[] for _ in tree.sites], "logits": [[] for _ in tree.sites]}
    handles = []
    for row, site in enumerate(tree.sites):

        def hook(_, args, row=row, weight=site.router.weight) -> None:
            x = args[0].view(-1, windows.shape[1], args[0].shape[-1])
            found["input"][row].append(x)
            found["logits"][row].append(x @ weight.mT)

        handles.append(site.module.register_forward_pre_hook(hook))
    for batch in windows.split(16):
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {kind: [torch.cat(parts) for parts in layers] for kind, layers in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    parser.add_argument("--fit-windows", type=int, default=192, help="windows of each side (default: %(default)s)")
    args = parser.parse_args()
    task = corpora.load_task(args)
    model = corpora.new_model(task)
    each = args.fit_windows // len(task.retain)
    domain, retain = (
        collect(model, task.domain_eval),
        collect(model, torch.cat([corpora.spread(held_out, 32) for _, held_out in task.retain.values()])),
    )
    source = corpora.windows(task.tokenizer, corpora.stdlib_source("eval"), args.length)
    other = collect(model, corpora.spread(source, 32))
    found: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in GATES}
    for seed in args.seeds:
        ours = collect(model, next(corpora.batches(task.domain_train, args.fit_windows, 1, seed)))
        texts = [next(corpora.batches(train, each, 1, seed)) for train, _ in task.retain.values()]
        theirs = collect(model, torch.cat(texts))
        for name, (kind, fit) in GATES.items():
            recalls, passes = [], []
            for row in range(len(ours[kind])):
                score = fit(ours[kind][row], theirs[kind][row])
                limits = torch.quantile(score(retain[kind][row]).flatten(), 1 - torch.tensor(RATES))
                recalls.append((score(domain[kind][row]).flatten().unsqueeze(1) > limits).float().mean(0))
                passes.append((score(other[kind][row]).flatten().unsqueeze(1) > limits).float().mean(0))
            found[name].append((torch.stack(recalls).mean(0).tolist(), torch.stack(passes).mean(0).tolist()))
        corpora.note(f"seed {seed}, ridge {GATE_RIDGE}: done")
    for name, seeds in found.items():
        row = {"gate": name}
        for i, rate in enumerate(RATES):
            row[f"recall at {rate:g}"] = round(statistics.median(recall[i] for recall, _ in seeds), 4)
        row["other text at 0.01"] = round(statistics.median(passed[RATES.index(0.01)] for _, passed in seeds), 4)
        corpora.emit(row, args.json)


if __name__ == "__main__":
    main()

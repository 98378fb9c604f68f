"""What growing costs at scale, on paper: bytes that are counted, by the formulas beside them; nothing is run or timed.

Per process and step of a micro-batch: what FSDP, DDP and expert parallelism send by each way of training, what lies in
memory (as `pcgrow doctor --ranks` says), what breaks first. Configs are the public ones; tests/programs/test_scale.py
counts a model in miniature.

    python examples/scale.py [--budget 0.12] [--tokens 4096]
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace

from transformers import DeepseekV3Config, Qwen3MoeConfig

from peft_pcgrow.command.doctor import Checkup, check_up, gpu_bytes

# bytes of a number: of the base and of activations, of banks and their gradients
GB, BASE, BANK = 1e9, 2, 4
# what an H100 may receive in a second from its node (NVLink) and from others (400 Gb/s)
INSIDE, BETWEEN, NODE = 450 * GB, 50 * GB, 8
LENGTH = 512
FLOPS = 4e14  # that dense products reach in a second, of 9.9e14
WAYS = ("full training", "LoRA", "sweep", "direct")


@dataclass(frozen=True)
class Shape:
    """A mixture-of-experts decoder, its sizes as configs call them. `queries`, `keys`: widths of all heads together."""

    name: str
    layers: int
    hidden: int
    experts: int
    top_k: int
    inner: int
    vocabulary: int
    attention: int  # parameters of a layer's attention, its norms included
    queries: int
    keys: int
    shared: int = 0
    dense_layers: int = 0
    dense_inner: int = 0

    @property
    def expert(self) -> int:
        return 3 * self.hidden * self.inner

    @property
    def sparse_layers(self) -> int:
        return self.layers - self.dense_layers

    def layer(self, experts: int) -> int:
        """A sparse layer of which so many experts count: attention, two norms, router, shared experts."""
        return self.attention + (2 + self.experts) * self.hidden + (experts + self.shared) * self.expert

    def parameters(self, experts: int | None = None) -> int:
        """All of them, or those of a model with so many experts a layer (`top_k`: those that a token uses)."""
        dense = self.attention + 2 * self.hidden + 3 * self.hidden * self.dense_inner
        sparse = self.sparse_layers * self.layer(self.experts if experts is None else experts)
        return sparse + self.dense_layers * dense + (2 * self.vocabulary + 1) * self.hidden


def latent_attention(hidden: int, heads: int, queries: int, keys: int, plain: int, turned: int, values: int) -> int:
    """Parameters of DeepSeek's attention; `queries` and `keys` are the ranks that it goes through."""
    into = hidden * queries + queries + queries * heads * (plain + turned)
    return into + hidden * (keys + turned) + keys + keys * heads * (plain + values) + heads * values * hidden


# huggingface.co/Qwen/Qwen3-30B-A3B and deepseek-ai/DeepSeek-V3 (without its layer that predicts a second token)
QWEN = Shape(
    "Qwen3-30B-A3B", 48, 2048, 128, 8, 768, 151_936, 2048 * (4096 + 2 * 512) + 4096 * 2048 + 2 * 128, 4096, 512
)
DEEPSEEK = Shape(
    *("DeepSeek-V3", 61, 7168, 256, 8, 2048, 129_280, latent_attention(7168, 128, 1536, 512, 128, 64, 128)),
    *(128 * 192, 128 * 192, 1, 3, 18_432),
)
QWEN_CONFIG = Qwen3MoeConfig(
    vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, dtype="bfloat16",
)  # fmt: skip
DEEPSEEK_CONFIG = DeepseekV3Config(dtype="bfloat16")


@dataclass(frozen=True)
class Plan:
    """A shape on so many processes, each with a micro-batch of `tokens`; `budget` of the experts grow, spread alike
    over the layers from `lowest` on. Weights and banks are sharded by FSDP."""

    shape: Shape
    ranks: int
    tokens: int = 4096
    budget: float = 0.12
    lowest: int = 0
    rank: int = 16  # of LoRA on attention and all experts

    @property
    def banks(self) -> float:
        return self.budget * self.shape.sparse_layers * self.shape.experts * self.shape.expert

    @property
    def lora(self) -> float:
        """Two factors beside each matrix of the experts, and four in each attention (as wide as queries and keys)."""
        s = self.shape
        experts = s.sparse_layers * s.experts * 3 * (s.hidden + s.inner)
        return self.rank * (experts + s.layers * (4 * s.hidden + 2 * s.queries + 2 * s.keys))

    def trained(self, way: str) -> float:
        return {"full training": self.shape.parameters(), "LoRA": self.lora}.get(way, self.banks)

    def runs(self, way: str) -> tuple[int, int]:
        """Layers that run in the forward, and again in the backward (all else with torch's checkpoints)."""
        again = {"sweep": self.shape.layers - self.lowest, "direct": 0}
        return self.shape.layers, again.get(way, self.shape.layers)

    def fsdp(self, way: str) -> dict[str, float]:
        """Bytes that a process receives in a step: all-gathers of weights, (n - 1) / n of them each, in the forward and
        when an error reaches a layer (by direct too, which hardly needs them there), and one reduce-scatter of
        gradients."""
        share, base = (self.ranks - 1) / self.ranks, BASE * self.shape.parameters()
        (forward, again), wide = self.runs(way), BASE if way == "full training" else BANK
        again = forward - self.lowest if way == "direct" else again
        trained = self.trained(way) * (0 if way == "full training" else BANK)
        return {
            "forward": share * (base + trained),
            "backward": share * (base * again / forward + trained),
            "gradients": share * wide * self.trained(way),
        }

    def ddp(self, way: str) -> float:
        """Where the model is whole on each process (ZeRO-2 the same): an all-reduce of 2 (n - 1) / n gradients."""
        return 2 * self.fsdp(way)["gradients"]

    def expert_parallel(self, way: str) -> float:
        """Where experts stay and tokens travel: there and back, in the forward, where a layer runs again, and errors in
        the backward (of direct: there only, to the banks)."""
        once = self.tokens * self.shape.top_k * self.shape.hidden * BASE * (self.ranks - 1) / self.ranks
        sparse = self.shape.sparse_layers / self.shape.layers
        forward, again = self.runs(way)
        errors = forward * once if way == "direct" else 2 * max(again, forward - self.lowest) * once
        return sparse * (2 * (forward + again) * once + errors)

    def map_bytes(self, sketch: int = 64) -> int:
        """Of an error map's summed gradients on each process: fp32, hidden sides sketched, for each of four folds."""
        width = min(self.shape.hidden, sketch)
        return 4 * 4 * self.shape.sparse_layers * self.shape.experts * 3 * width * self.shape.inner

    def seconds(self, way: str) -> tuple[float, float]:
        """At best: to receive what FSDP sends, where the slower of the two ways in takes all of it; and to compute, 2
        operations for each weight that a token uses in a run of the forward, 2 for errors, 2 where weights train."""
        used, (forward, again) = self.tokens * self.shape.parameters(self.shape.top_k), self.runs(way)
        passes = forward + again + (again if way != "direct" else 0)
        trained = self.trained(way) / self.shape.parameters() * forward
        received = sum(self.fsdp(way).values())
        operations = 2 * used * (passes + trained) / forward
        return received / (INSIDE if self.ranks <= NODE else BETWEEN), operations / FLOPS


# of the numbers above, in the order in which they break as models grow
CHANGES = """What would have to change

1. The map: every process holds the gradient sums of all nodes. Today: sketch_dim=8 or gradients=False.
   To come: each process the nodes of its experts, or some layers a pass.
2. Gathering: FSDP brings all experts of a layer to all processes, whoever needs them. Experts have to stay, and tokens
   to travel (expert parallelism, refused today): banks inside the exchange, gates before it, where texts are whole.
3. Banks on every process (DDP, ZeRO-2) end where one budget fills a GPU; sharded (FSDP2) they do not.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def gigabytes(count: float) -> str:
    return f"{count / GB:,.{2 * (count < 100 * GB)}f}"


def sent(plans: dict[str, Plan]) -> str:
    rows = []
    for name, plan, way in ((name, plan, way) for name, plan in plans.items() for way in WAYS):
        sizes = sum(plan.fsdp(way).values()), plan.ddp(way), plan.expert_parallel(way)
        rows.append([name, way, *map(gigabytes, sizes), *(f"{seconds:.2f}" for seconds in plan.seconds(way))])
    head = ("plan", "way", "FSDP", "DDP, ZeRO-2", "expert parallel", "FSDP, s at best", "computing, s at best")
    return table(head, rows)


def breaks(plans: dict[str, tuple[Plan, Checkup]]) -> str:
    """What does not fit, and what waits: of each plan, with the sweep."""
    lines = []
    for name, (plan, found) in plans.items():
        row = found.steps[0]
        waits, computes = plan.seconds("sweep")
        lines.append(
            f"- {name}: {gigabytes(row.peak)} GB, {'fits' if found.fits(row) else 'does NOT fit'}; FSDP waits "
            f"{waits / computes:.1f} times as long as it computes; the map with gradients: "
            f"{gigabytes(plan.map_bytes())} GB on each process"
        )
    return "\n".join(lines) + "\n\n" + CHANGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.12, help="share of the experts that grow")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch of a process")
    args = parser.parse_args()

    def plan(shape: Shape, ranks: int, **more: int) -> Plan:
        return Plan(shape, ranks, args.tokens, args.budget, **more)

    plans = {"Qwen3-30B-A3B, 8": plan(QWEN, 8), "DeepSeek-V3, 64": plan(DEEPSEEK, 64)}
    shapes = [[s.name, f"{s.parameters() / 1e9:.1f}", f"{s.parameters(s.top_k) / 1e9:.1f}"] for s in (QWEN, DEEPSEEK)]
    print(table(("model", "parameters, 10^9", "used by a token"), shapes))
    print("GB that a process receives in a step\n\n" + sent(plans))
    print("GB by the sweep over FSDP, as the plan grows\n")
    base = plan(QWEN, 8)
    grow: dict[str, list[Plan]] = {
        "8, 64, 512 processes": [replace(base, ranks=n) for n in (8, 64, 512)],
        "64, 128, 256 experts": [replace(base, shape=replace(QWEN, experts=n)) for n in (64, 128, 256)],
        "24, 48, 96 layers": [replace(base, shape=replace(QWEN, layers=n)) for n in (24, 48, 96)],
        "banks in the upper 48, 24, 12 layers": [replace(base, lowest=n) for n in (0, 24, 36)],
    }
    rows = [[what, *(gigabytes(sum(p.fsdp("sweep").values())) for p in each)] for what, each in grow.items()]
    print(table(("", "first", "second", "third"), rows))
    configs = {"Qwen3-30B-A3B, 8": QWEN_CONFIG, "DeepSeek-V3, 64": DEEPSEEK_CONFIG}
    checked = {}
    for name, each in plans.items():
        batch, gpu = max(1, args.tokens // LENGTH), gpu_bytes("H100")
        checked[name] = each, check_up(configs[name], args.budget, None, batch, LENGTH, gpu, ranks=each.ranks)
        print(f"{name}: {checked[name][1]}\n")
    print("What breaks first\n\n" + breaks(checked))


if __name__ == "__main__":
    main()

"""Every kernel against its definition in torch, at a layer of OLMoE-1B-7B: same numbers or not, and how fast.

    python examples/check_kernels.py                  # on a GPU; prints a Markdown table
    python examples/check_kernels.py --compile 90     # without one: compile for this compute capability

GB/s: the bytes that an op must move, each once, over the kernel's time; a copy's is the ceiling, first row. Errors are
relative root mean squares from the definition in fp64, largest of an op's outputs. Bits: share of all numbers that are
the definition's own. Times are medians of repeated runs.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcgrow_kernels import combine, gate_score, muon_pre, sort_rows, swiglu
from pcgrow_kernels.dispatch import Kernel

CHOICES, HIDDEN, INNER, EXPERTS, GROWN = 8, 2048, 1024, 64, 8
Way = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An op in both ways, what it is run on, and how many bytes it must move. Ways may write to their inputs."""

    inputs: list[Tensor]
    kernel: Way
    definition: Way
    moved: int


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def single(way: Callable[..., Tensor]) -> Way:
    return lambda *inputs: (way(*inputs),)


def averaged(way: Callable[..., Tensor]) -> Way:
    return lambda gradient, momentum, out: (way(gradient, momentum, out, 0.95, True), momentum, out)


def cases(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Case]]:
    """By name; each is made when it is asked for, and nothing is held of the others."""
    rows = tokens * CHOICES

    def drawn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=of, device=device)

    def routed() -> list[Tensor]:
        return [drawn(rows, HIDDEN), torch.randperm(rows, device=device).view(tokens, -1), drawn(tokens, CHOICES)]

    def sums() -> Case:
        inputs = routed()
        moved = size(*inputs) + size(inputs[0]) // CHOICES
        return Case(inputs, single(combine.by_triton), single(combine.definition), moved)

    def activation() -> Case:
        h = drawn(rows, 2 * INNER)
        return Case([h], single(swiglu.by_triton), single(swiglu.definition), size(h) * 3 // 2)

    def activation_backward() -> Case:
        inputs = [drawn(rows, 2 * INNER), drawn(rows, INNER), drawn(rows)]

        def kernel(h: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return swiglu.backward_by_triton(h, q, weight, dh=h, act=q)

        return Case(inputs, kernel, swiglu.backward_definition, 2 * size(*inputs))

    def averages(transposed: bool) -> Case:
        stacks = [drawn(GROWN, 2 * INNER, HIDDEN, of=kind) for kind in (torch.float32, torch.float32, dtype)]
        stacks = [stack.mT for stack in stacks] if transposed else stacks
        return Case(stacks, averaged(muon_pre.by_triton), averaged(muon_pre.definition), size(*stacks, stacks[1]))

    def scores() -> Case:
        inputs = [drawn(tokens, HIDDEN), drawn(HIDDEN, of=torch.float32)]

        def definition(x: Tensor, direction: Tensor) -> Tensor:
            # which is in fp32 whatever it is given
            return x @ direction if x.dtype == torch.float64 else gate_score.definition(x, direction)

        return Case(inputs, single(gate_score.by_triton), single(definition), size(*inputs) + 4 * tokens)

    def sort() -> Case:
        key, count = torch.randint(0, EXPERTS + GROWN, (rows,), device=device), EXPERTS + GROWN
        ways = [partial(way, keys=count) for way in (sort_rows.by_triton, sort_rows.definition)]
        return Case([key], *ways, moved=3 * size(key))

    return {
        "combine": sums,
        "swiglu": activation,
        "swiglu, backward": activation_backward,
        "muon_pre": lambda: averages(False),
        "muon_pre, transposed": lambda: averages(True),
        "gate_score": scores,
        "sort_rows": sort,
    }


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def compare(case: Case) -> tuple[float, float, float]:
    """The kernel's error, the definition's own, and the share of numbers with the same bits."""
    doubled = [x.double() if x.is_floating_point() else x for x in case.inputs]
    found, plain, want = (
        way(*[x.clone() for x in inputs])
        for way, inputs in ((case.kernel, case.inputs), (case.definition, case.inputs), (case.definition, doubled))
    )

    def error(outputs: tuple[Tensor, ...]) -> float:
        pairs = [(one.double(), other.double()) for one, other in zip(outputs, want, strict=True)]
        return max(float(((one - other).square().mean() / other.square().mean()).sqrt()) for one, other in pairs)

    same = sum(int((one == other).sum()) for one, other in zip(found, plain, strict=True))
    return error(found), error(plain), same / sum(one.numel() for one in found)


def measure(tokens: int, dtype: torch.dtype) -> None:
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, {tokens} tokens, {dtype}\n")
    print("| kernel | inputs | ms | GB/s | definition, ms | error | definition's | bits |\n|" + "---|" * 8)
    x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    copy = milliseconds(lambda: x.clone())
    print(f"| a copy | {tuple(x.shape)} | {copy:.3f} | {2 * size(x) / copy / 1e6:.0f} | | | | |")
    for name, make in cases(tokens, dtype, "cuda").items():
        case = make()
        ours, theirs, same = compare(case)
        fast, slow = (milliseconds(partial(way, *case.inputs)) for way in (case.kernel, case.definition))
        shapes = " ".join(str(tuple(x.shape)) for x in case.inputs)
        print(
            f"| {name} | {shapes} | {fast:.3f} | {case.moved / fast / 1e6:.0f} | {slow:.3f} "
            f"| {ours:.1e} | {theirs:.1e} | {same:.2%} |",
            flush=True,
        )
        del case
        torch.cuda.empty_cache()


def compile_all(capability: int, tokens: int, dtype: torch.dtype, show: bool) -> None:
    """Compile what would be launched, on tensors without memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    def instead(kernel: Kernel, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        order = kernel.compiled.arg_names
        given = {**dict(zip([name for name in order if name not in constants], args, strict=True)), **constants}
        numbers = {name: value for name, value in given.items() if isinstance(value, int)}
        fixed = {n: given[n] for n in given if given[n] is None or n in constants or numbers.get(n) == 1}
        kinds = {name: "constexpr" if name in fixed else mangle_type(value) for name, value in given.items()}
        # as launched: addresses and sizes that are multiples of 16 are read 16 bytes at once
        even = [n for n in given if n not in fixed and (isinstance(given[n], Tensor) or numbers.get(n, 1) % 16 == 0)]
        source = ASTSource(
            kernel.compiled,
            kinds,
            {(order.index(name),): value for name, value in fixed.items()},
            {(order.index(name),): [["tt.divisibility", 16]] for name in even},
        )
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.options(constants))
        name, code = kernel.function.__name__, made.asm["cubin"]
        shared, warps = made.metadata.shared, made.metadata.num_warps
        print(f"  {name}: {len(code)} bytes of code, {shared} of shared memory, {warps} warps", flush=True)
        if show:
            print(made.asm["ptx"])

    Kernel.launch = instead  # type: ignore[method-assign]
    for name, make in cases(tokens, dtype, "meta").items():
        print(name, flush=True)
        case = make()
        case.kernel(*case.inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="90: H100, 80: A100, ...; needs no GPU")
    parser.add_argument("--ptx", action="store_true", help="with --compile: print what it is compiled to")
    chosen = parser.parse_args()
    if chosen.compile:
        compile_all(chosen.compile, chosen.tokens, getattr(torch, chosen.dtype), chosen.ptx)
    elif torch.cuda.is_available():
        measure(chosen.tokens, getattr(torch, chosen.dtype))
    else:
        parser.error("torch sees no CUDA device here: --compile 90 compiles without one")

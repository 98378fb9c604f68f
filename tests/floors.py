"""The rules of the code base, read from its source: which room may import what, and what is public.

    python tests/floors.py

draws the rooms from the highest floor to the lowest, with how many imports go from each to those below, and says what
breaks the rules.
"""

import ast
import sys
from pathlib import Path

# from the lowest floor to the highest: a room imports from those before it, and from files beside the rooms
ROOMS = (
    "settling",
    "architectures",
    "gates",
    "packed",
    "maps",
    "locate",
    "adapter",
    "training",
    "export",
    "compress",
    "rounds",
    "hub",
    "command",
)
# which rooms may know of a package outside; `settling.host` has where transformers notes what arises inside of layers
OUTSIDE = {
    "peft": {"adapter", "training", "export", "compress", "rounds", "hub"},
    "transformers": {"settling.host", "architectures", "packed", "training", "export", "rounds", "command"},
    "accelerate": {"compress.skip"},
    "bitsandbytes": set(),
    "datasets": set(),
    "huggingface_hub": {"hub_access", "adapter.model_card", "hub"},
    "matplotlib": {"maps.draw"},
    "pandas": {"maps.node_table"},
}
PUBLIC = {
    "Diagnosis",
    "ErrorMap",
    "ErrorMapCallback",
    "GrowthResult",
    "Locus",
    "Muon",
    "PCGrowConfig",
    "PCGrowModel",
    "RefitGatesCallback",
    "choose",
    "compress",
    "create_pcgrow_optimizer",
    "export_flat",
    "find_experts",
    "find_lr",
    "grow",
    "load_grown",
    "measure_errors",
    "order_by_surprisal",
    "push",
    "sample_text",
}
PUBLIC_COMPRESS = {
    "CompressionPlan",
    "CompressionReport",
    "NodePlan",
    "PlainReport",
    "QuantizeReport",
    "ShrinkReport",
    "Survey",
    "apply",
    "export_plain",
    "plan",
    "quantize_experts",
    "shrink_adapter",
    "survey",
}
TOP = "peft_pcgrow"


def modules(package: Path) -> dict[str, Path]:
    """Every module by its name below the package, `room.file`; what a folder itself holds is `room.__init__`."""
    return {
        path.relative_to(package).with_suffix("").as_posix().replace("/", "."): path for path in package.rglob("*.py")
    }


def room_of(module: str) -> str:
    """The room of a module; "": it stands on the ground."""
    return module.rpartition(".")[0]


def imported(path: Path, known: set[str]) -> set[str]:
    """What a file imports, anywhere in it: modules of ours below the package, and names of other packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != TOP:
                found.add(top)
                continue
            # the longest part that is a module: what is left is a name in it
            parts = rest.split(".")
            ways = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            found.add(
                next((f"{w}.__init__" if w in ROOMS else w for w in ways if w in known or w in ROOMS), "__init__")
            )
    return found


def problems(package: Path) -> list[str]:
    """Everything that breaks the rules, in words."""
    files = modules(package)
    known, found = set(files), []
    links = {name: imported(path, known) for name, path in files.items()}
    for name in known:
        room = room_of(name)
        if room and room not in ROOMS:
            found.append(f"{name} is in no room of {', '.join(ROOMS)}")
            continue
        floor = ROOMS.index(room) if room else -1
        for other in links[name] & known if name != "__init__" else ():
            theirs = room_of(other)
            if other == "__init__" or (theirs in ROOMS and ROOMS.index(theirs) > floor):
                found.append(f"{name} imports {other}, which stands above it")
        for outside in links[name] & set(OUTSIDE):
            if name != "__init__" and not {room, name} & OUTSIDE[outside]:
                found.append(f"{name} imports {outside}, which only {', '.join(sorted(OUTSIDE[outside]))} may")
    return found + circles({name: links[name] & known for name in known}) + publics(package)


def circles(links: dict[str, set[str]]) -> list[str]:
    """Modules that import each other round about."""
    open_, done, found = [], set(), []

    def visit(name: str) -> None:
        if name in open_:
            found.append(" -> ".join([*open_[open_.index(name) :], name]) + " is a circle")
        elif name not in done:
            open_.append(name)
            for other in sorted(links[name]):
                visit(other)
            done.add(open_.pop())

    for name in sorted(links):
        visit(name)
    return found


def publics(package: Path) -> list[str]:
    """Public names that are new, or missing."""
    found = []
    for path, expected in ((package, PUBLIC), (package / "compress", PUBLIC_COMPRESS)):
        tree = ast.parse((path / "__init__.py").read_text(encoding="utf-8"))
        stated = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
        names = set(ast.literal_eval(stated[0].value)) if stated else set()
        bound = {
            alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        found += [f"{path.name} has the public name {name}, which is new" for name in sorted(names - expected)]
        found += [f"{path.name} has lost the public name {name}" for name in sorted(expected - names)]
        found += [f"{path.name} names {name} in __all__ and does not import it" for name in sorted(names - bound)]
    return found


def kernels(folder: Path) -> list[str]:
    """What kernel files import beside torch, triton and, for its own 4 bits where it is installed, bitsandbytes."""
    allowed = {"torch", "triton", "bitsandbytes", "pcgrow_kernels", *sys.stdlib_module_names}
    extra = {path.name: imported(path, set()) - allowed for path in folder.glob("*.py")}
    return [f"{name} imports {', '.join(sorted(others))}" for name, others in extra.items() if others]


def draw(package: Path) -> str:
    """The floors, one a line, each with its arrows down."""
    files = modules(package)
    lines = []
    for room in (*reversed(ROOMS), ""):
        mine = [name for name in files if room_of(name) == room and name != "__init__"]
        arrows = [room_of(other) for name in mine for other in imported(files[name], set(files)) & set(files)]
        counts = {other: arrows.count(other) for other in reversed(("", *ROOMS)) if other != room and other in arrows}
        size = sum(len(files[name].read_text(encoding="utf-8").splitlines()) for name in mine)
        below = ", ".join(f"{other or 'ground'} ({count})" for other, count in counts.items())
        lines.append(f"{room or 'ground':14} {len(mine):3} files {size:6} lines  -> {below or '-'}")
    return "\n".join(lines)


if __name__ == "__main__":
    source = Path(__file__).parents[1] / "peft_pcgrow"
    print(draw(source), *(problems(source) or ["no import goes up, no circle, no outsider"]), sep="\n")

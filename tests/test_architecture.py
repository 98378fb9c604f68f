"""The rules of the code base: floors of imports, public names, file sizes, what the wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import peft_pcgrow

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "peft_pcgrow", ROOT / "kernels" / "pcgrow_kernels"
# imports go strictly down; within the list of one floor, only to the left
FLOORS = [
    ["pcgrow_kernels"],
    [
        "atomic",
        "locus",
        "energy",
        "heatmap",
        "per_thread",
        "newborns",
        "conditions",
        "same_base",
        "gate",
        "protect",
        "handover",
        "model_parts",
        "lifecycle",
        "page",
        "stack_view",
        "pieces",
        "corpus",
        "plain_weight",
        "setting",
    ],
    ["map_check", "seal", "diagnosis", "recompute", "staging", "say", "borders", "node_weights"],
    ["map_file", "separation", "relax", "removable", "page_html", "node_table", "batches"],
    ["error_map", "carry", "inner_outputs"],
    ["tape"],
    ["settle", "plan", "processes", "adopted"],
    ["adopt", "adopted_moe"],
    ["experts", "sequence", "compress.codec", "compress.grouped", "compress.thin", "compress.allocate"],
    ["rows", "flat", "parts", "bank", "identity", "compress.forms", "compress.packed_seal"],
    ["deepen", "spawn", "sample", "contrast", "compress.packed"],
    ["probe", "resume", "compress.persist"],
    ["measure", "compress.quantize"],
    ["compress.calibrate"],
    ["compress.candidates", "compress.skip", "compress.compression_plan"],
    ["compress.form_survey", "compress.apply_plan"],
    [
        "register",
        "lora_beside",
        "model_card",
        "config",
        "birth",
        "given",
        "mixed_batch",
        "sealed_layer",
        "merged",
        "layer",
        "gated_lora",
        "whole_steps",
        "adapter_file",
        "what_trains",
        "text_hooks",
        "curriculum",
        "without_rows",
        "guard",
        "lineage",
        "resolve",
        "model",
    ],
    [
        "optimizer",
        "learning_rate",
        "export",
        "compress.plain",
        "callback",
        "compress.moments",
        "compress.shrink",
        "__init__",
    ],
]
# what a floor may know of the world outside, by the lowest floor that may
OUTSIDE = {"transformers": 4, "peft": 11, "accelerate": 12, "bitsandbytes": 8}
ORDERED = 11
LINES = 400
TOTAL = 17400


def floor_of(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imported(path: Path) -> set[str]:
    """Top-level packages, and modules of ours, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            package = module in ("peft_pcgrow", "peft_pcgrow.compress")
            names = [f"{module}.{a.name}" for a in node.names] if package else [module]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            depth = 2 if rest[:1] == ["compress"] else 1
            found.add(".".join(rest[:depth]) if top == "peft_pcgrow" and rest else top)
    return found


def named(path: Path) -> str:
    """A module's name in `FLOORS`."""
    return f"compress.{path.stem}" if path.parent.name == "compress" else path.stem


def test_imports_go_down():
    paths = [*PACKAGE.glob("*.py"), *(PACKAGE / "compress").glob("[!_]*.py")]
    names = {named(path) for path in paths} | {"pcgrow_kernels"}
    assert names == {name for floor in FLOORS for name in floor}, "a module has no floor, or a floor no module"
    wrong = []
    for path in paths:
        mine = floor_of(named(path))
        for name in imported(path) & names:
            theirs = floor_of(name)
            row = FLOORS[mine]
            to_the_left = theirs == mine and mine >= ORDERED and row.index(name) < row.index(named(path))
            if not (theirs < mine or to_the_left):
                wrong.append(f"{named(path)} (floor {mine}) imports {name} (floor {theirs})")
        for name, lowest in OUTSIDE.items():
            if name in imported(path) and mine < lowest:
                wrong.append(f"{named(path)} (floor {mine}) imports {name}, which only floor {lowest} and up may know")
    for path in KERNELS.glob("*.py"):
        extra = imported(path) - {"torch", "triton", "pcgrow_kernels"} - set(sys.stdlib_module_names)
        if extra:
            wrong.append(f"kernel file {path.name} imports {extra}")
    assert not wrong, wrong


def test_tensors_are_made_on_a_device():
    """Each says on which: torch.set_default_device is the user's, and their model may be elsewhere."""
    makers = {"zeros", "ones", "empty", "full", "arange", "tensor", "as_tensor", "rand", "randn", "randint", "eye"}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers:
                named = {keyword.arg for keyword in node.keywords}
                if getattr(node.func.value, "id", None) == "torch" and not named & {"device", None}:
                    wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong, wrong


def test_folder_kernels_shadows_nothing():
    """Hugging Face publishes a package `kernels` that transformers imports."""
    roots = [ROOT / "kernels", ROOT / "tests" / "kernels", ROOT / "tests" / "peft", ROOT / "tests"]
    assert not [root for root in roots if (root / "__init__.py").exists()]


def test_public_names():
    assert len(peft_pcgrow.__all__) <= 14
    assert all(getattr(peft_pcgrow, name).__doc__ for name in peft_pcgrow.__all__)


def test_files_stay_short():
    sources = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]
    lines = {path: len(path.read_text().splitlines()) for path in sources}
    others = [*(ROOT / "tests").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    assert not [path for path in [*sources, *others] if len(path.read_text().splitlines()) > LINES]
    assert sum(lines.values()) <= TOTAL


def test_no_vague_names():
    vague = re.compile(r"util|helper|common|misc|manager|_v\d")
    assert not [path.name for path in ROOT.glob("*/**/*.py") if vague.search(path.stem) and ".venv" not in str(path)]


def test_importing_registers_and_costs_little():
    """`import peft_pcgrow` makes PEFT know the method, twice is harmless, and no heavy optional package comes along."""
    code = (
        "import sys, peft_pcgrow, importlib, peft;"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m;"
        "from peft_pcgrow.register import register;"
        "register(peft_pcgrow.PCGrowConfig, peft_pcgrow.PCGrowModel);"
        "assert m[peft.PeftType('PCGROW')] is peft_pcgrow.PCGrowModel;"
        "assert list(peft.PeftType).count('PCGROW') == 1;"
        "print(sorted({'matplotlib', 'bitsandbytes', 'triton', 'datasets'} & set(sys.modules)))"
    )
    plain = "import sys, peft; print(sorted({'matplotlib', 'bitsandbytes', 'triton', 'datasets'} & set(sys.modules)))"
    loaded = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout.strip()
        for c in (plain, code)
    ]
    assert loaded[0] == loaded[1]


def test_oldest_versions_are_the_ones_allowed():
    """What is installed for the tests of the oldest versions are the lower bounds, but torch, whose builds differ."""
    project, pinned = (ROOT / "pyproject.toml").read_text(), (ROOT / ".ci" / "oldest.txt").read_text()
    for name in ("transformers", "peft", "accelerate", "bitsandbytes"):
        (allowed,) = re.findall(rf'"{name}>=([\d.]+)[,"]', project)
        (oldest,) = re.findall(rf"^{name}==([\d.]+)$", pinned, re.MULTILINE)
        assert oldest == f"{allowed}.0"


def test_wheel_holds_both_packages(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--quiet",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.suffix in (".py", ".html", ".typed")}
    expected |= {p.relative_to(ROOT / "kernels").as_posix() for p in KERNELS.rglob("*.py")}
    assert expected <= held
    outside = {name.split("/")[0] for name in held} - {"peft_pcgrow", "pcgrow_kernels"}
    assert all(name.endswith(".dist-info") for name in outside)
    assert any(name.endswith("licenses/LICENSE") for name in held)

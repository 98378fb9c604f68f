"""Run PEFT's own tests, unmodified, against this package: `python tests/peft_suite/run.py [options] [pytest args]`.

The tests come from the source distribution of the PEFT that is installed, and go to a folder outside the repository.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
# the suite was read, and our cases written, for these
KNOWN = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}
# what the suite imports and this package does not need; without their dependencies, which would replace what is here
IMPORTS = ["diffusers", "importlib_metadata", "zipp", "requests", "urllib3", "charset-normalizer", "idna", "certifi"]
IMPORTS += ["httpx", "httpcore", "sniffio", "anyio", "h11"]
PYTEST_INI = """[pytest]
filterwarnings =
    error::DeprecationWarning:transformers
    error::FutureWarning:transformers
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
"""


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"pip {' '.join(arguments)} failed. This runner needs the network once, to fetch PEFT's tests and what "
            f"they import; afterwards they are in its --folder.\n{done.stderr.strip()[-800:]}"
        )


def fetch(folder: Path, peft: str) -> Path:
    """PEFT's tests as they were published, unpacked anew; the folder they lie in."""
    archive = folder / f"peft-{peft}.tar.gz"
    if not archive.exists():
        pip("download", f"peft=={peft}", "--no-deps", "--no-binary", "peft", "--dest", str(folder))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != KNOWN.get(peft, digest):
        raise SystemExit(f"{archive} has sha256 {digest}, expected {KNOWN[peft]}: delete it and run again")
    with tarfile.open(archive) as packed:
        members = [member for member in packed if member.name.startswith(f"peft-{peft}/tests/")]
        packed.extractall(folder, members, filter="data")
    suite = folder / f"peft-{peft}"
    (suite / "tests" / "__init__.py").touch()
    (suite / "pytest.ini").write_text(PYTEST_INI)
    if importlib.util.find_spec("diffusers") is None and not (folder / "imports" / "diffusers").exists():
        pip("install", "--no-deps", "--target", str(folder / "imports"), *IMPORTS)
    return suite


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "peft_pcgrow" / "peft_suite")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON, and nothing else, on stdout")
    parser.add_argument("--broken", choices=["merge"], help="negative control: with this fault, tests must fail")
    options, passed_on = parser.parse_known_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    suite = fetch(folder, version("peft"))

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"  # or test_torch_compile.py skips itself
    # what is installed comes before what was fetched
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    sys.path.append(str(folder / "imports"))
    import pytest

    from peft_suite import cases, negative, stand_ins
    from peft_suite.plugin import Suite

    hub = folder / "hub"
    for name, how in (cases.MODELS | cases.CLASSIFIERS | cases.FIXED).items():
        stand_ins.make(hub, name, **how)
    stand_ins.make_data(hub)
    if options.broken:
        negative.break_it(options.broken)

    arguments = [str(suite / "tests" / word) if word.startswith("test_") else word for word in passed_on]
    if not any(word.startswith("test_") for word in passed_on):
        arguments += [str(suite / "tests" / file) for file in cases.FILES]
    seen, started, stdout = Suite(), time.monotonic(), os.dup(1)
    os.chdir(hub)
    if options.json:
        os.dup2(2, 1)
    code = pytest.main(
        ["-q", "-W", "ignore", "-c", str(suite / "pytest.ini"), "-p", "no:cacheprovider", *arguments], plugins=[seen]
    )
    found = {"peft": version("peft"), "broken": options.broken, "exit": int(code), **seen.counts}
    found |= {"seconds": round(time.monotonic() - started, 1), "failures": seen.failures}
    found |= {"skipped_because": dict(seen.skipped), "inapplicable_because": dict(seen.inapplicable)}
    sys.stdout.flush()
    os.dup2(stdout, 1)
    print(json.dumps(found, indent=1) if options.json else dict(seen.counts))
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())

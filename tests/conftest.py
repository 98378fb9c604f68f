"""Every test starts from the same random state, offline, on one thread: models this small gain nothing from more.

`pytest --device cuda` makes models and texts on a GPU: as torch's default device, which the package never relies on.
Random numbers are drawn on the CPU all the same, so models and texts are those of the CPU's run. Tests marked `cpu` say
why they run there only; those marked `gpu` run wherever there is one.
"""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; it is read where Triton is imported first, and transformers does
    os.environ["TRITON_INTERPRET"] = "1"

from torch.overrides import TorchFunctionMode
from transformers import set_seed

torch.set_num_threads(1)
RANDOM = (torch.rand, torch.randn, torch.randint, torch.randperm)


class DrawnOnCpu(TorchFunctionMode):
    """Random numbers of no stated device, the same on every one; those of a generator are drawn where it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if func in RANDOM and given.get("device") is None:
            device = given["generator"].device if given.get("generator") is not None else "cpu"
            return func(*args, **{**given, "device": device}).to(torch.get_default_device())
        return func(*args, **given)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="what models and texts of the tests are on: cpu (default) or cuda")


def pytest_configure(config):
    device = config.getoption("--device")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device {device}: tests compute with numbers, choose cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch sees no CUDA device here")
    # files in the order below, not those of many tests first, as pytest-xdist has them
    config.option.loadscopereorder = False


# of these files one takes a minute or more: last, one process would work on it alone
LONGEST = (
    "test_conformance",
    "test_readme",
    "test_compress_apply",
    "test_trainer",
    "test_routing",
    "test_callback",
    "test_distributed",
    "test_interrupted",
    "test_trl",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items if config.getoption("--device") != "cpu" else ():
        if (mark := item.get_closest_marker("cpu")) is not None:
            item.add_marker(pytest.mark.skip(reason=f"on the CPU only: {mark.args[0]}"))


def pytest_collection_finish(session):
    """Half a million objects of torch and transformers stay anyway: not to be searched at every collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    # Triton's bindings report what a process never frees
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded(request):
    set_seed(0)
    device = request.config.getoption("--device")
    if device == "cpu":
        yield
        return
    torch.set_default_device(device)
    try:
        with DrawnOnCpu():
            yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

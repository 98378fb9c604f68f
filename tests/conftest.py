"""Every test starts from the same random state, offline, on one thread: models this small gain nothing from more."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)

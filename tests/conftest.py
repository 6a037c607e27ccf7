import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    """Same numbers in every run, and one thread: the ranks of a test share two cores."""
    torch.manual_seed(0)
    torch.set_num_threads(1)

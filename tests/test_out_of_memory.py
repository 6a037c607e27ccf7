"""A step for which memory does not suffice, and kernels where they cannot run: one sentence."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from test_engines import config_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_contrastive import losses, trainer
from dist_contrastive.errors import ConfigError, MemoryLimitError
from dist_contrastive.pairwise import choice, kernel_calls
from dist_contrastive.trainer.failures import out_of_memory

FROM_TORCH = (
    "CUDA out of memory. Tried to allocate {} bytes. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.10 GiB is free. Including non-PyTorch memory, this process has 78.00 GiB memory in "
    "use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved."
)


class Limit(TorchDispatchMode):
    """A device on which an operator has no room for a larger result."""

    def __init__(self, most_bytes: int, *names: str) -> None:
        super().__init__()
        self._most_bytes, self._names = most_bytes, names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self._names:
            size = max(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
            if size > self._most_bytes:
                raise torch.OutOfMemoryError(FROM_TORCH.format(size))
        return out


def test_a_smaller_part_that_is_named_fits(overrides, tmp_path):
    """Of 48 views a convolution has 8 x 8 x 8 numbers each; half of them have room."""
    config = config_of("two_view", overrides, tmp_path / "run")
    with Limit(32 * 8 * 64 * 4, "convolution"), pytest.raises(MemoryLimitError) as caught:
        trainer.train(config)
    message = str(caught.value)
    assert message.startswith("step 1 of 24 samples on rank 0 has not the memory for what it does")
    assert "in embed (CUDA out of memory. Tried to allocate" in message
    assert "1.10 GiB is free" in message
    assert "by plan" in message
    named = re.findall(r"; set (\S+),", message)
    assert named == ["train.micro_batch_size=12"]
    path, *options = tmp_path / "other", *named
    with Limit(32 * 8 * 64 * 4, "convolution"):
        assert trainer.train(config_of("two_view", overrides, path, *options)) == trainer.EXIT_DONE


def test_what_the_loss_needs_is_named_first_where_it_lacked(overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run", "task.loss.impl=dense")
    with Limit(48 * 48 * 4 - 1, "mm"), pytest.raises(MemoryLimitError) as caught:
        trainer.train(config)
    message = str(caught.value)
    assert "in compare (" in message
    order = ["task.loss.impl=auto", "backend.precision=bf16", "train.micro_batch_size=12"]
    assert [message.index(x) for x in order] == sorted(message.index(x) for x in order)


@pytest.mark.parametrize("keys_from", ["gather", "ring"])
def test_a_ring_is_named_with_what_it_takes(keys_from, overrides, tmp_path):
    large = "data.global_batch_size=65536", "task.head.out=512", f"task.loss.keys_from={keys_from}"
    config = config_of("two_view", overrides, tmp_path / "run", *large)
    backend = SimpleNamespace(rank=3, world_size=64)
    clock, progress = SimpleNamespace(part="compare"), SimpleNamespace(step=7)
    run = SimpleNamespace(config=config, backend=backend, clock=clock, progress=progress)
    message = str(out_of_memory(run, torch.OutOfMemoryError(FROM_TORCH.format(8))))
    assert message.startswith("step 8 of 1024 samples on rank 3 ")
    found = re.findall(
        r"loss takes ([\d.]+) GiB by plan|keys_from=ring \(by plan ([\d.]+)", message
    )
    sizes = [float(one or other) for one, other in found]
    assert len(sizes) == (2 if keys_from == "gather" else 1)
    assert sizes == sorted(sizes, reverse=True)


# ------------------------------------------------------------------ kernels asked for by name


BY_NAME = {  # losses, and what they are given
    "InfoNCE": (losses.InfoNCE, 2),
    "NTXent": (losses.NTXent, 2),
    "SigLIP": (losses.SigLIP, 2),
    "SelfDiagonal": (losses.SelfDiagonal, 1),
    "ContrastiveForce": (losses.ContrastiveForce, 2),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_kernels_by_name_without_a_gpu(name):
    kind, count = BY_NAME[name]
    sentence = r"^impl='triton' cannot be used: rows are on cpu, and .*; use auto, .*chunked$"
    with pytest.raises(ConfigError, match=sentence):
        kind(impl="triton")(*torch.randn(count, 4, 8))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "the compute capability of cuda:0 is 7.5, and kernels need 8.0"),
        ((8, 0), None),
        ((12, 1), None),
    ],
)
def test_compute_capabilities(capability, expected, monkeypatch):
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert kernel_calls._no_place(torch.device("cuda:0")) == expected


def test_auto_says_once_why_there_are_no_kernels(caplog):
    choice._say_once.cache_clear()
    for reason in ("rows are torch.float64", "rows are torch.float64", "triton is not installed"):
        with caplog.at_level(logging.WARNING):
            assert choice.choose("auto", 2**30, reason, cuda=True) == "chunked"
        with pytest.raises(ConfigError, match=f"'triton' cannot be used: {reason}; use auto"):
            choice.choose("triton", 2**30, reason, cuda=True)
    assert choice.choose("auto", 2**30, reason, cuda=False) == "chunked"  # nothing is expected
    said = [record.message for record in caplog.records]
    assert said == [
        "no kernels, hence slower on a GPU: rows are torch.float64",
        "no kernels, hence slower on a GPU: triton is not installed",
    ]

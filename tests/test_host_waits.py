"""What a GPU would wait for in a step, and the settings of a run that are meant for GPUs."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/gpu"))
import counts
from test_engines import config_of, three_steps

from dist_contrastive import collectives, optim
from dist_contrastive.backend import Backend
from dist_contrastive.collectives.group import host_device
from dist_contrastive.errors import ConfigError
from dist_contrastive.optim import OptimConfig
from dist_contrastive.testing import run_ranks
from dist_contrastive.trainer.run import Run, open_run
from dist_contrastive.trainer.step import backward, train_step

# Losses, and the checks of their inputs, are counted in test_kernels.py, in the way a GPU takes.
LOSSES = tuple(f"{counts.PACKAGE}/{folder}/" for folder in ("losses", "pairwise", "collectives"))


def waits_of_a_step(config, is_logged: bool, spoil=lambda run: None) -> dict[str, int]:
    """Waits of the second step, but for those of losses."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    batches = run.data.batches(backend.device)
    first, second = next(batches), next(batches)
    train_step(run, first.samples, first.consumed, is_logged=False)
    spoil(run)
    with counts.Counts() as found:
        train_step(run, second.samples, second.consumed, is_logged)
    backend.close()
    return {place: count for place, count in found.waits.items() if not place.startswith(LOSSES)}


@pytest.mark.parametrize("task", ["two_view", "labelled", "paired", "drift"])
def test_a_step_reads_the_device_once(task, overrides, tmp_path):
    config = config_of(task, overrides, tmp_path / "run")
    waits = waits_of_a_step(config, is_logged=False)
    assert sum(waits.values()) == 1, waits
    assert next(iter(waits)).startswith("dist_contrastive/backend/replicated.py"), waits


def test_a_logged_step_may_read_more(overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run")
    assert sum(waits_of_a_step(config, is_logged=True).values()) > 1


def test_a_read_of_the_task_is_seen(overrides, tmp_path):
    def spoil(run: Run) -> None:
        compare = run.task.compare

        def reading(embeddings, *rest):
            float(embeddings[0].detach().sum())
            return compare(embeddings, *rest)

        run.task.compare = reading

    config = config_of("two_view", overrides, tmp_path / "run")
    assert sum(waits_of_a_step(config, is_logged=False, spoil=spoil).values()) == 2


def updates_by_a_loss(config) -> list[bool]:
    """Whether a step changed weights whose gradient was finite: its loss inf, then 1."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    found = []
    for batch, loss in zip(run.data.batches(backend.device), (math.inf, 1.0), strict=False):
        context = run.task.begin_step(batch.samples)
        backward(run, batch.samples, context)
        before = run.engine.weights()
        update = run.engine.step(0.1, torch.tensor(loss))
        same = all(torch.equal(x, before[name]) for name, x in run.engine.weights().items())
        assert update.applied is not same
        found.append(update.applied)
    backend.close()
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_updates_nothing(stage, overrides, tmp_path):
    options = f"backend.zero_stage={stage}", "backend.precision=fp32"
    config = config_of("two_view", overrides, tmp_path / "run", *options)
    assert run_ranks(updates_by_a_loss, 1, config) == [[False, True]]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("cpu:fake,cuda:fake", "cpu"), ("cuda:fake", "cuda")],
)
def test_what_the_host_knows_is_exchanged_by_the_cpu(backend, expected):
    dist.init_process_group(backend, rank=0, world_size=2, store=FakeStore())
    try:
        assert host_device() == torch.device(expected)
    finally:
        dist.destroy_process_group()


def votes_and_headers() -> tuple[int, list[int]]:
    group = dist.new_group(backend="cpu:gloo,cuda:gloo")  # two backends, as gloo beside NCCL
    rows = torch.zeros(2 + dist.get_rank(), 3)
    headers = collectives.exchange_headers({"rows": rows}, group)["rows"]
    return collectives.max_over_ranks(dist.get_rank(), group), [x.rows for x in headers if x]


def test_a_group_of_two_backends_exchanges_headers():
    assert run_ranks(votes_and_headers, 2) == [(1, [2, 3])] * 2


def test_channels_last_trains_the_same_model(overrides, tmp_path):
    plain, last = (
        three_steps(
            config_of(
                "two_view", overrides, tmp_path / str(is_last), f"backend.channels_last={is_last}"
            )
        )
        for is_last in (False, True)
    )
    assert last.norms == pytest.approx(plain.norms, rel=1e-4)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(last.weights[name], weight, rtol=1e-3, atol=1e-5)


def test_channels_last_is_in_memory(overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run", "backend.channels_last=true")
    backend = Backend(config.backend)
    run = open_run(config, backend)
    weights = [p for p in run.task.encoder.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    backend.close()


def refused_with_zero(config) -> str:
    backend = Backend(config.backend)
    try:
        open_run(config, backend)
    except ConfigError as error:
        return str(error)
    finally:
        backend.close()
    return ""


def test_channels_last_is_refused_with_zero(overrides, tmp_path):
    options = "backend.channels_last=true", "backend.zero_stage=1"
    config = config_of("two_view", overrides, tmp_path / "run", *options)
    (message,) = run_ranks(refused_with_zero, 1, config)
    assert "channels_last" in message
    assert "zero_stage" in message


def products() -> tuple[str, str]:
    """Precision of fp32 products now: of matrices, and of convolutions."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize(("tf32", "expected"), [(False, "ieee"), (True, "tf32")])
def test_tf32_is_a_setting_for_the_time_of_a_run(tf32, expected):
    before = products()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # of the process, as a user may have it
    backend = Backend(Backend.Config(device="cpu", tf32=tf32))
    assert products() == ("ieee", expected)
    backend.close()
    assert products() == ("tf32", before[1])
    torch.backends.cuda.matmul.fp32_precision = before[0]


class Noted(torch.autograd.Function):
    """Identity that notes the precision of matrix products, forward and backward."""

    @staticmethod
    def forward(ctx, x, notes: dict[str, str], name: str):
        ctx.notes, ctx.name = notes, name
        notes[f"{name} forward"] = products()[0]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.notes[f"{ctx.name} backward"] = products()[0]
        return grad, None, None


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_tf32_is_in_networks_and_not_in_losses(micro_batch_size, overrides, tmp_path):
    options = ("backend.tf32=true", f"train.micro_batch_size={micro_batch_size or 'null'}")
    config = config_of("two_view", overrides, tmp_path / "run", *options)
    backend = Backend(config.backend)
    run = open_run(config, backend)
    notes: dict[str, str] = {}
    encode, compare = run.task.encoder.forward, run.task.compare
    run.task.encoder.forward = lambda x: Noted.apply(encode(x), notes, "network")

    def noted_compare(embeddings, *rest):
        return compare(tuple(Noted.apply(x, notes, "loss") for x in embeddings), *rest)

    run.task.compare = noted_compare
    batch = next(iter(run.data.batches(backend.device)))
    train_step(run, batch.samples, batch.consumed, is_logged=True)
    assert notes == {
        "network forward": "tf32",
        "network backward": "tf32",
        "loss forward": "ieee",
        "loss backward": "ieee",
    }
    assert products()[0] == "ieee"
    backend.close()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_optimizers_update_alike(name):
    settings, networks = OptimConfig(name=name, lr=0.1), []
    for fused in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Linear(5, 3)
        optimizer = optim.build_optimizer(network, settings, fused)
        assert optimizer.defaults["fused"] is (fused or None)
        for _ in range(3):
            optimizer.zero_grad()
            network(
                torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
            ).square().sum().backward()
            optimizer.step()
        networks.append(network)
    for a, b in zip(*(x.parameters() for x in networks), strict=True):
        torch.testing.assert_close(a, b)

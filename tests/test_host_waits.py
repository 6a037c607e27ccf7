"""What the host waits for in a step on a GPU, and settings of a run that are meant for GPUs."""

import math
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import no_device
import pytest
import torch
import torch.distributed as dist
from test_engines import config_of, three_steps
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_contrastive import collectives, optim
from dist_contrastive.backend import Backend
from dist_contrastive.collectives.group import host_device
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.training import DeviceBatch
from dist_contrastive.errors import ConfigError
from dist_contrastive.optim import OptimConfig
from dist_contrastive.testing import run_ranks
from dist_contrastive.trainer.checks import self_check
from dist_contrastive.trainer.run import Run, open_run
from dist_contrastive.trainer.step import backward, train_step


@pytest.fixture
def gpu(monkeypatch) -> None:
    """Tensors without data take the place of those of a GPU."""
    no_device.stand_in(monkeypatch)


def waits_of_a_step(config, spoil=lambda run: None) -> dict[str, int]:
    """Waits of an unlogged step on a GPU, after one with data on the CPU."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    first, second = islice(run.data.batches(backend.device), 2)
    train_step(run, first.samples, first.consumed, is_logged=False)
    no_device.move(run.task, run.engine)
    no_device.move_tensors(run.online, *run.online.learners.values())
    samples = second.samples.to(no_device.DEVICE)
    spoil(run)
    with no_device.Waits() as found:
        train_step(run, samples, second.consumed, is_logged=False)
    backend.close()
    return dict(found.waits)


SLOW = pytest.mark.slow
BANK, GUIDED = (
    "task.bank={capacity: 12, positives: 5}",
    "task.guidance={unconditional: 3, power: 2}",
)
NETWORK = "{name: encoder, encoder: {name: residual, widths: [8, 16]}}"
CROPS = "task.crops={count: 2, views: {name: random, size: 12}}"
MICRO = "train.micro_batch_size=5"
QUICK: list[tuple[str, ...]] = [  # a task, and settings that change what its step does
    ("two_view", CROPS, MICRO),
    ("two_view", "backend.precision=fp16", "task.loss={name: siglip}", "optim.clip_norm=1"),
    ("two_view", "evaluate={online: [probe, knn]}"),
    ("labelled",),
    ("paired", MICRO),
    ("moco",),
    ("hybrid", "task.reward.baseline=running_mean", "task.reward.draws=3", MICRO),
    ("drift", "task.groups=4", f"task.features=[{{name: pixels}}, {NETWORK}]", "task.ema=null"),
    ("drift", BANK, GUIDED, "task.groups=2", MICRO),
]
OTHERS: list[tuple[str, ...]] = [
    *(("two_view", f"optim.name={name}") for name in ("adamw", "lion", "lars", "lamb", "muon")),
    ("two_view", "task.loss={name: infonce, symmetric: true, learnable: true}"),
    *(("two_view", f"task.loss={{name: {name}}}") for name in ("dcl", "vicreg", "barlow_twins")),
    ("bf16", MICRO),
    ("two_view", "backend.precision=fp16", MICRO),
    ("labelled", "task.loss={name: cosine_embedding}", "task.num_views=1", MICRO),
    ("paired",),
    ("moco", "task.momentum=1", MICRO),
    ("hybrid",),
    ("hybrid", "task.reward.baseline=none", "task.supervised=null"),
    ("hybrid", "task.reward=null", "task.contrastive=null"),
    ("hybrid", "data.labels_per_class=9", "data.balance=null"),
    ("drift",),
    ("drift", "task.loss.preset=seed", "task.loss.normalise_total=true", MICRO),
    ("drift", "data.label=null", "data.num_classes=null"),
    ("drift", BANK),
]
ALL = [*QUICK, *(pytest.param(x, marks=SLOW) for x in OTHERS)]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("settings", ALL, ids=" ".join)
def test_a_step_waits_once(settings, overrides, tmp_path):
    """Where the norm of the gradient and the loss are read."""
    waits = waits_of_a_step(config_of(settings[0], overrides, tmp_path / "run", *settings[1:]))
    assert list(waits.values()) == [1], waits
    assert next(iter(waits)).startswith("dist_contrastive/backend/replicated.py"), waits


def reading(run: Run) -> None:
    """The host reads a number of the embeddings."""
    compare = run.task.compare

    def spoiled(embeddings, *rest):
        embeddings[0].detach().sum().tolist()
        return compare(embeddings, *rest)

    run.task.compare = spoiled


def copying(run: Run) -> None:
    """Numbers of the host are copied to the device, from memory that is not pinned."""
    inputs = run.task.inputs

    def spoiled(samples, context):
        torch.tensor([1.0, 2.0], device=samples.images.device)
        return inputs(samples, context)

    run.task.inputs = spoiled


def counting(run: Run) -> None:
    """What the host counts lies on the device, as any other buffer."""
    run.task.num_queued = run.task.num_queued.to(no_device.DEVICE)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("spoil", [reading, copying])
def test_a_wait_is_seen(spoil, overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run")
    assert sum(waits_of_a_step(config, spoil).values()) == 2


@pytest.mark.usefixtures("gpu")
def test_a_counter_of_the_device_is_not_read(overrides, tmp_path):
    config = config_of("moco", overrides, tmp_path / "run")
    with pytest.raises(RuntimeError, match="meta"):
        waits_of_a_step(config, counting)


def samples_of(count: int) -> Samples:
    number = torch.arange(count)
    texts = tuple(map(str, range(count)))
    return Samples(torch.rand(count, 1, 2, 2), 10 * number, number, number, texts)


def test_the_host_keeps_labels_that_it_had():
    on_host = samples_of(5)
    assert on_host.to(torch.device("cpu")).host_labels is None
    there = on_host.to(no_device.DEVICE)
    assert there.labels.is_meta
    assert there.labels_on_host is on_host.labels
    part = there.rows(slice(1, 3))
    assert part.labels_on_host.tolist() == [10, 20]
    assert part.pair == ("1", "2")
    assert len(part.images) == len(part.labels) == 2
    numbers = torch.tensor([3, 0])
    assert on_host.rows(numbers).labels_on_host.tolist() == [30, 0]
    assert on_host.rows(numbers).pair == ("3", "0")


def test_a_batch_is_ready_for_the_stream_that_computes(monkeypatch):
    """It waits for the copies, and the memory is kept until it has used it."""
    events, used = [], []
    stream = SimpleNamespace(wait_event=events.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, by: used.append((x, by)))
    samples = replace(samples_of(3), pair=torch.rand(3, 2))
    batch = DeviceBatch([], samples, 3, [], copied="copied")
    assert batch.ready() is batch
    assert events == ["copied"]
    tensors = samples.images, samples.labels, samples.epoch, samples.index, samples.pair
    assert {id(x) for x, _ in used} == {id(x) for x in tensors}
    assert all(by is stream for _, by in used)


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


def compiled_whole(module_forward):
    """`torch.compile` that takes no seconds of a C compiler, and refuses to break the graph."""
    return COMPILE(module_forward, backend="aot_eager", fullgraph=True)


COMPILE = torch.compile


@pytest.mark.parametrize(
    "task",
    ["two_view", *(pytest.param(x, marks=SLOW) for x in ("paired", "moco", "hybrid", "drift"))],
)
def test_compiled_networks_train_the_same(task, overrides, tmp_path, monkeypatch):
    """The networks are one graph; losses are outside of it."""
    monkeypatch.setattr(torch, "compile", compiled_whole)
    plain, compiled = (
        three_steps(
            config_of(
                task, overrides, tmp_path / str(is_compiled), f"backend.compile={is_compiled}"
            )
        )
        for is_compiled in (False, True)
    )
    torch._dynamo.reset()
    assert compiled.norms == pytest.approx(plain.norms, rel=1e-4)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(compiled.weights[name], weight, rtol=1e-3, atol=1e-5)


def test_fp16_is_checked_at_a_scale_that_it_finds(overrides, tmp_path):
    """At that of the start gradients of this task overflow; training finds its own again."""
    config = config_of("two_view", overrides, tmp_path / "run", "backend.precision=fp16", MICRO)
    backend = Backend(config.backend)
    run = open_run(config, backend)
    state = run.engine.optimizer_state()
    run.engine.load_optimizer_state({**state, "scaler": {**state["scaler"], "scale": 2.0**24}})
    assert "parameters have that of one process" in self_check(run)
    assert run.engine.optimizer_state()["scaler"]["scale"] == 2.0**24
    backend.close()

"""On a GPU: every loss by every way and dtype against fp64 on the CPU, groups, graphs, commands.

pytest tests/test_gpu.py -m gpu                   as make test-gpu has it
pytest tests/test_gpu.py -m gpu --device cpu      whether these tests are right themselves
"""

import contextlib
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIGS
from torch import Tensor

from dist_contrastive import collectives, losses
from dist_contrastive.audit import CASES, Case
from dist_contrastive.cli import main
from dist_contrastive.collectives import reductions, rows
from dist_contrastive.testing import run_ranks

# What is a mere warning elsewhere must not hide what a card would show.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DIM, REPEATS, CHUNK = 40, 16, 64  # 192 rows, several tiles of each kind
WAYS = [  # impl, keys_from
    *(("auto", "gather"), ("auto", "ring"), ("auto", "local")),
    *(("dense", "gather"), ("chunked", "gather")),
]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; --device cpu runs these tests without one")
    return torch.device(name)


# ------------------------------------------------------------------ losses


class Inputs(NamedTuple):
    """Rows with their gradient, labels, and what all ranks share."""

    embeddings: list[Tensor]
    labels: list[Tensor]
    shared: dict[str, Tensor]

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Inputs":
        embeddings = [x.to(device, dtype) for x in self.embeddings]
        shared = {name: x.to(device, dtype) for name, x in self.shared.items()}
        return Inputs(embeddings, [x.to(device) for x in self.labels], shared)


def inputs_of(case: Case, repeats: int = REPEATS, dim: int = DIM) -> Inputs:
    """Those of the audit, more and wider ones."""
    random = torch.Generator().manual_seed(7)
    count = 12 * repeats
    shape = (count, 2, dim) if case.views else (count, dim)
    made = [torch.randn(shape, generator=random) for _ in range(case.embeddings)]
    for x in made[1:]:
        x += 0.5 * made[0]
    labels = [x.repeat(repeats) for x in case.labels]
    shared = {
        name: torch.randn(repeats * len(x), dim, generator=random)
        for name, x in case.shared.items()
    }
    return Inputs(made, labels, shared)


LOSS_SCALE = 2.0**11  # fp16 has no numbers as small as some gradients


def results(case: Case, inputs: Inputs, autocast: bool = False, **options: Any) -> list[Tensor]:
    """Value, and gradients of embeddings and parameters."""
    loss = case.loss(**{**case.settings, **options})
    given = [x.detach().requires_grad_() for x in inputs.embeddings]
    loss = loss.to(given[0].device)
    if given[0].dtype == torch.float64:
        loss = loss.double()
    all_inputs = [*given, *inputs.labels]
    first = len(all_inputs) - len(case.named)
    named = dict(zip(case.named, all_inputs[first:], strict=True))
    with torch.autocast(given[0].device.type, torch.bfloat16, enabled=autocast):
        value = loss(*all_inputs[:first], **named, **inputs.shared)
    wanted = [*given, *loss.parameters()]
    grads = torch.autograd.grad(LOSS_SCALE * value, wanted, allow_unused=True)
    return [value.detach(), *(x.double() / LOSS_SCALE for x in grads if x is not None)]


@functools.cache
def exact(name: str, dtype: torch.dtype) -> list[Tensor]:
    """By the specification in fp64 on the CPU, of numbers rounded to the dtype."""
    inputs = inputs_of(CASES[name]).to(dtype).to(torch.float64)
    return results(CASES[name], inputs, impl="dense")


def check(found: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    value, *grads = found
    assert abs(value.item() - right[0].item()) <= tolerance * (1 + abs(right[0].item()))
    assert len(found) == len(right)
    largest = max(float(x.norm()) for x in right[1:])
    for x, y in zip(grads, right[1:], strict=True):
        error = float((x.double().cpu() - y).norm())
        times = 3 if y.numel() == 1 else 1  # a scale's is a sum over rows, which cancel
        assert error <= times * tolerance * max(float(y.norm()), 1e-2 * largest)


TOLERANCES = {  # gradients of a half precision are rounded to it, and so are weights of products
    torch.float64: 1e-9,
    torch.float32: 3e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
OF_FORCE = {torch.float64: 1e-8, torch.float32: 2e-3}  # distances over small temperatures
OF_TRIPLETS = {torch.float32: 1e-3, torch.float16: 2e-2}  # some come to the other side of a margin


def tolerance_of(name: str, dtype: torch.dtype) -> float:
    more = OF_FORCE if "Force" in name else OF_TRIPLETS if "Triplet" in name else {}
    return max(TOLERANCES[dtype], more.get(dtype, 0.0))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_fp64_on_the_cpu(device, name, dtype):
    right, inputs = exact(name, dtype), inputs_of(CASES[name]).to(dtype, device)
    for impl, keys_from in WAYS:
        found = results(CASES[name], inputs, impl=impl, keys_from=keys_from, chunk_size=CHUNK)
        check(found, right, tolerance_of(name, dtype))


@pytest.mark.parametrize("name", CASES)
def test_autocast_lowers_nothing(device, name):
    inputs = inputs_of(CASES[name]).to(torch.float32, device)
    found = results(CASES[name], inputs, autocast=True)
    check(found, exact(name, torch.float32), tolerance_of(name, torch.float32))


@pytest.mark.parametrize("name", CASES)
def test_the_same_twice(device, name):
    """Bit for bit: no sum depends on which program ends first."""
    inputs = inputs_of(CASES[name]).to(torch.bfloat16, device)
    for impl in ("auto", "chunked"):
        first, second = (results(CASES[name], inputs, impl=impl) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("num_keys", [7, 300])
def test_banks_shorter_and_longer_than_the_batch(device, num_keys):
    random = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 64, DIM, generator=random)
    bank = torch.randn(num_keys, DIM, generator=random)
    case = Case(losses.InfoNCE, {"symmetric": True, "learnable": True}, 2)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs([x, y], [], {"bank": bank})
        right = results(case, inputs.to(dtype).to(torch.float64), impl="dense")
        check(results(case, inputs.to(dtype, device)), right, TOLERANCES[dtype])


RAGGED = ["InfoNCE, symmetric", "NTXent", "SigLIP", "SupCon, labels", "CosineEmbedding, labels"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("count", "dim"), [(1, 19), (29, 129), (43, 768)])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_sizes(device, name, count, dim, dtype):
    case = CASES[name]
    inputs = inputs_of(case, count, dim)
    right = results(case, inputs.to(dtype).to(torch.float64), impl="dense")
    check(results(case, inputs.to(dtype, device)), right, tolerance_of(name, dtype))


@pytest.mark.parametrize("groups", [0, 6])
@pytest.mark.parametrize("preset", ["seed", "drift", "paper"])
def test_force_of_each_preset(device, preset, groups):
    random = torch.Generator().manual_seed(3)
    shape = (groups, 64, DIM) if groups else (160, DIM)
    negative, positive = (torch.randn(shape, generator=random) for _ in range(2))
    temperature = 0.05 * math.sqrt(2 * DIM)
    given = (positive + 0.2).double(), negative.double(), temperature, preset
    right = losses.contrastive_force(*given, impl="dense")
    for impl in ("auto", "dense", "chunked"):
        for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-3)):
            points = [x.to(device, dtype) for x in given[:2]]
            found = losses.contrastive_force(*points, *given[2:], impl=impl)
            assert (found.double().cpu() - right).norm() <= tolerance * right.norm()


def test_a_million_pairs_of_extreme_scores(device):
    """Scale 100: rows that are opposite, equal, and one that is far from all others."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 64, generator=random, dtype=torch.float64)
    case = Case(losses.InfoNCE, {"temperature": 0.01, "symmetric": True}, 2)
    for y in (-x, x.clone(), x[:1].expand_as(x), torch.cat([-x[:1], x[1:]])):
        inputs = Inputs([x, y], [], {})
        right = results(case, inputs, impl="dense")
        check(results(case, inputs.to(torch.float32, device)), right, 1e-4)


# ------------------------------------------------------------------ host and device


@contextlib.contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """The host may not wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


STEPS: dict[str, tuple[type[losses.PairLoss], dict[str, Any]]] = {
    "InfoNCE": (losses.InfoNCE, {"learnable": True}),
    "InfoNCE, symmetric": (losses.InfoNCE, {"symmetric": True, "learnable": True}),
    "NTXent": (losses.NTXent, {"learnable": True}),
    "DCL": (losses.DCL, {"learnable": True}),
    "SigLIP": (losses.SigLIP, {}),
    "SelfDiagonal": (losses.SelfDiagonal, {"learnable": True}),
    "SupCon": (losses.SupCon, {"learnable": True}),
    "CosineEmbedding": (losses.CosineEmbedding, {}),
}


def step_of(name: str, device: torch.device) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """Forward and backward of checked inputs; the inputs and parameters that it reads."""
    kind, settings = STEPS[name]
    loss, random = kind(**settings).to(device), torch.Generator().manual_seed(1)
    num_inputs = 2 if kind.takes == "views" else 1
    made = [torch.randn(256, 64, generator=random) for _ in range(num_inputs)]
    given = [x.to(device, torch.bfloat16).requires_grad_() for x in made]
    labels = [(torch.arange(256) % 32).to(device)] if kind.takes == "labels" else []
    wanted = [*given, *loss.parameters()]

    def step() -> list[Tensor]:
        value = loss(*given, *labels, sizes=(256,))
        return [value.detach(), *torch.autograd.grad(value, wanted)]

    return step, wanted


@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_for_nothing(device, name):
    step, _ = step_of(name, device)
    step()  # compiles kernels
    with refusing_waits(device):
        step()


def recorded(device: torch.device, step: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """What replays a step, and the tensors that it leaves its results in; without a GPU the step
    itself, and copies."""
    if device.type != "cuda":
        held = step()

        def replay() -> None:
            for x, y in zip(held, step(), strict=True):
                x.copy_(y)

        return replay, held
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    return graph.replay, held


@pytest.mark.parametrize("name", STEPS)
def test_a_captured_loss_reads_inputs_and_scale_again(device, name):
    step, given = step_of(name, device)
    replay, held = recorded(device, step)
    with torch.no_grad():
        for x in given:
            x.copy_(x.flip(0) * 1.25 if x.dim() > 1 else x + 0.5)
    replay()
    for x, y in zip(held, step(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_on_another_stream(device):
    step, _ = step_of("NTXent", device)
    expected = step()
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        found = step()
    if stream:
        stream.synchronize()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_labels_on_the_host(device):
    x = torch.randn(24, 8, device=device, requires_grad=True)
    losses.SupCon()(x, torch.arange(24) % 5).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_compiled_networks_beside_the_loss(device):
    torch.manual_seed(0)
    network, loss = torch.nn.Linear(16, 8).to(device), losses.InfoNCE(symmetric=True)
    x, y = torch.randn(2, 32, 16).to(device)
    plain, compiled = (
        torch.autograd.grad(loss(one(x), one(y)), network.weight)[0]
        for one in (network, torch.compile(network))
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ ranks


def alone_in_a_group(device: str) -> list[str]:
    """Collectives of one rank, which go through the backend all the same; what was wrong."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    wrong = [] if losses.NTXent()(*torch.randn(2, 8, 4, device=device)).isfinite() else ["loss"]
    rows.is_distributed = reductions.is_distributed = lambda group=None: True
    x = torch.randn(6, 5, device=device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        y = x.to(dtype)
        if not torch.equal(collectives.gather_rows(y, (6,)), y):
            wrong.append(f"gather {dtype}")
    for name, found in (
        ("reduce-scatter", collectives.reduce_scatter_rows(x, (6,))),
        ("sum", collectives.all_reduce_sum(x)),
        ("maximum", collectives.all_reduce_max(x)),
        ("log-sum-exp", collectives.logsumexp_over_ranks(x)),
        ("fetch", collectives.fetch_rows(x, torch.arange(6, device=device), (6,))),
    ):
        if not torch.allclose(found, x, rtol=1e-5, atol=1e-6):
            wrong.append(name)
    dist.destroy_process_group()
    return wrong


def test_a_group_of_one_rank(device):
    """NCCL."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as process:
        assert process.submit(alone_in_a_group, device.type).result(120) == []


SIZES = (40, 56)  # of two ranks


def of_rank(device: str, names: list[str], keys_from: str) -> dict[str, list[Tensor]]:
    """Value and gradients of this rank's rows."""
    found = {}
    for name in names:
        case, place = CASES[name], dist.get_rank()
        inputs = inputs_of(case, 8)
        split = [x.split(SIZES)[place] for x in (*inputs.embeddings, *inputs.labels)]
        count = len(inputs.embeddings)
        part = Inputs(split[:count], split[count:], inputs.shared).to(torch.float32, device)
        options = {"keys_from": keys_from, "grad_reduction": "sum", "chunk_size": CHUNK}
        found[name] = [x.cpu() for x in results(case, part, **options)][: 1 + count]
    return found


@pytest.mark.parametrize("keys_from", ["gather", "ring"])
def test_two_ranks(device, keys_from):
    """gloo, with tensors of the device: uneven rows give the gradient of one process."""
    names = [name for name, case in CASES.items() if not case.opposite and "KoLeo" not in name]
    ranks = run_ranks(of_rank, 2, device.type, names, keys_from, timeout_s=300)
    for name in names:
        case = CASES[name]
        right = results(case, inputs_of(case, 8).to(torch.float64), impl="dense")
        count = case.embeddings
        joined = [torch.cat([of[name][1 + i] for of in ranks]) for i in range(count)]
        check([ranks[0][name][0], *joined], right[: 1 + count], tolerance_of(name, torch.float32))


# ------------------------------------------------------------------ commands


@pytest.fixture
def options(device, overrides, tmp_path) -> Callable[..., list[str]]:
    """Overrides of a short run in a folder of its own."""
    on_cpu = ["backend.device=cpu"] if device.type == "cpu" else []

    def make(name: str, *more: str) -> list[str]:
        return overrides(tmp_path / name, "train.steps=4", "train.save_every=2", *on_cpu, *more)

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_and_go_on(options, precision, tmp_path):
    config = str(CONFIGS / "digits_encoder.yaml")
    more = [f"backend.precision={precision}", "train.micro_batch_size=16"]
    assert main(["train", config, *options("run", *more, "train.steps=3")]) == 0
    assert main(["train", config, *options("run", *more), "--change"]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert rows == 4 or (precision == "fp16" and rows > 0)  # steps that look for a scale have none


def test_generator_eval_and_sample(device, options, tmp_path):
    encoder, generator = tmp_path / "encoder", tmp_path / "generator"
    assert main(["train", str(CONFIGS / "digits_encoder.yaml"), *options("encoder")]) == 0
    features = f"task.features=[{{name: pixels}}, {{name: run, run_dir: {encoder}}}]"
    config = str(CONFIGS / "digits_generator.yaml")
    assert main(["train", config, *options("generator", features)]) == 0
    assert main(["eval", str(encoder), str(generator)]) == 0
    assert main(["sample", str(generator), "--count", "8"]) == 0
    assert len(list((generator / "samples").rglob("*.png"))) >= 8


def test_doctor(device, options, capsys):
    config = str(CONFIGS / "digits_encoder.yaml")
    assert main(["doctor", config, *options("run"), "--ranks", "2"]) == 0
    assert "PROBLEM" not in capsys.readouterr().out

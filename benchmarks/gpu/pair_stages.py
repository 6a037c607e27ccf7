"""Stages of the benchmark on a card: what it can do; pair losses beside dense code and peers."""

import importlib.metadata as metadata
import importlib.util
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dense import DENSE, PER_LABEL, SETTINGS, Loss
from fake import DTYPES, LOSSES
from measure import Bench, Step, rate_of, relative
from peers import PEERS
from torch import Tensor
from torch.nn.functional import normalize

from dist_contrastive import planner
from dist_contrastive.planner_constants import CARDS

PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate")
PACKAGES += ("memeff", "inf-cl", "siglip-kernel", "pykeops", "open-clip-torch", "deepspeed")
OPERATIONS = {name: 6 if name == "siglip" else 8 for name in LOSSES}  # of a pair and dimension


# ------------------------------------------------------------------ the card


def environment(bench: Bench) -> None:
    """Card, versions, date."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "card": "none",
        "versions": {},
    }
    if bench.is_cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "sms": card.multi_processor_count}
        found |= {"gib": card.total_memory / 2**30, "capability": f"{card.major}.{card.minor}"}
        found |= {"cuda": torch.version.cuda}
        query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
        found["driver, clock, power"] = _output("nvidia-smi", query, "--format=csv,noheader")
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-", "_").removesuffix("_torch")):
            found["versions"][name] = metadata.version(name)
    bench.add("environment", **found)


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        return ""


def ceilings(bench: Bench) -> None:
    """Rates of products, of a copy, and what a launch and a wait cost the host."""
    environment(bench)
    n = 256 if bench.small else 8192
    shapes = {"": (n, n, n), ", scores": (n // 2, n, 768), ", gradients": (n // 2, 768, 2 * n)}
    for kind, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        for what, (rows, keys, dim) in shapes.items():
            x, y = (
                torch.randn(*s, device=bench.device).to(dtype) for s in ((rows, dim), (dim, keys))
            )

            def product(x: Tensor = x, y: Tensor = y, tf32: bool = tf32) -> dict[str, Any]:
                torch.backends.cuda.matmul.allow_tf32 = tf32
                found = bench.timed(lambda: x @ y, 0.3, 20)
                torch.backends.cuda.matmul.allow_tf32 = False
                operations = 2 * len(x) * x.shape[1] * y.shape[1]
                return {**found, "tflops": operations / found["ms"] / 1e9}

            bench.attempt(f"product {kind}{what}", product)

    def copy() -> dict[str, Any]:
        x = torch.empty(2**22 if bench.small else 2**31, dtype=torch.uint8, device=bench.device)
        y = torch.empty_like(x)
        found = bench.timed(lambda: y.copy_(x), 0.2, 20)
        return {**found, "tb_per_s": 2 * x.numel() / found["ms"] / 1e9}

    def host() -> dict[str, Any]:
        x, count = torch.zeros(8, device=bench.device), 300
        launches = bench.timed(lambda: [x.add_(1) for _ in range(count)])
        waits = bench.timed(lambda: [x[0].item() for _ in range(count)])
        return {"launch_us": 1e3 * launches["ms"] / count, "wait_us": 1e3 * waits["ms"] / count}

    bench.attempt("copy", copy)
    bench.attempt("host", host)


# ------------------------------------------------------------------ losses

ACCURACY = (2048, 768)  # rows and dimensions where errors are measured
FP32 = ("infonce, symmetric", "siglip")  # at full size


def compile_kernels(bench: Bench) -> None:
    """The kernels of the other stages, by as many processes as there are processors: they are kept
    by Triton, and each stage finds them."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    dims = (64,) if bench.small else (768, 512)
    shapes = [("bf16", dim) for dim in dims] + [("fp32", dims[0])]
    jobs = [(name, *shape, bench.device) for name in LOSSES for shape in shapes]
    workers = min(len(jobs), max(1, (os.cpu_count() or 1) - 1), 12)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(compile_of, *job): job for job in jobs}
        for done in as_completed(running):
            name, dtype, dim, _ = running[done]
            known = {"loss": name, "dtype": dtype, "dim": dim}
            bench.attempt(f"compile {name}", lambda d=done: {"seconds": d.result()}, 0.0, **known)


def compile_of(name: str, dtype: str, dim: int, device: str) -> float:
    """Seconds of a first small step."""
    begin = time.perf_counter()
    stepper(ours(name, device), inputs_of(name, 256, dim, DTYPES[dtype], device))()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def inputs_of(name: str, rows: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs whose matrix of scores has so many rows, near each other in pairs; then labels."""
    kind = LOSSES[name][0]
    count = rows // 2 if name in ("ntxent", "dcl") else rows  # whose views are rows
    random = torch.Generator(device=device).manual_seed(0)
    x, noise = (torch.randn(count, dim, device=device, generator=random) for _ in range(2))
    views = [x, noise + 0.5 * x] if kind.takes == "views" else [x]
    given = [view.to(dtype).requires_grad_() for view in views]
    labels = torch.arange(count, device=device) % max(2, count // PER_LABEL)
    return [*given, labels] if kind.takes == "labels" else given


def stepper(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Forward and backward; gradients of the inputs."""
    wanted = [x for x in inputs if x.requires_grad]
    more = list(loss.parameters()) if isinstance(loss, torch.nn.Module) else []

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(loss(*inputs), [*wanted, *more])[: len(wanted)])

    return step


def ours(name: str, device: str, **options: Any) -> torch.nn.Module:
    """The loss of this package, on a device, as it is used: with its checks of inputs."""
    kind, settings = LOSSES[name]
    return kind(**{**settings, **SETTINGS[name], **options}).to(device)


def low(loss: Loss) -> Loss:
    """The same with scores and softmaxes in the dtype of the inputs."""
    return lambda *inputs: loss(*inputs, low=True)


def losses(bench: Bench) -> None:
    """Each loss x dtype x size, and dense code beside it."""
    rows, dim = (128, 64) if bench.small else ACCURACY
    for name in LOSSES:
        for dtype in ("bf16", "fp32"):
            bench.attempt(
                *(f"gradient error {name}", lambda n=name, d=dtype: errors(bench, n, d)),
                **{"loss": name, "dtype": dtype, "rows": rows, "dim": dim},
            )
    for what in plan(bench.small):
        measure(bench, *what)


def plan(small: bool) -> Iterator[tuple[str, str, int, int, str]]:
    """What is measured, the most important first: loss, dtype, rows, dimensions, way."""
    large, middle, dim = (256, 128, 64) if small else (65536, 16384, 768)
    for name in LOSSES:
        yield name, "bf16", large, dim, "ours"
    for name in LOSSES:
        for way in ("ours", "dense", "compiled") if name in FP32 else ("ours", "dense"):
            yield name, "bf16", middle, dim, way
    yield "infonce, symmetric", "bf16", middle, dim, "open_clip"
    for name in FP32:
        yield from ((name, "fp32", 2 * middle, dim, way) for way in ("ours", "dense"))
    yield "infonce, symmetric", "bf16", large, dim, "dense"
    yield "infonce, symmetric", "bf16", large, dim, "ring"


def measure(bench: Bench, name: str, dtype: str, rows: int, dim: int, way: str) -> None:
    """Time, memory and part of the card's own rate of a step; what was planned for ours."""
    known: dict[str, Any] = {"loss": name, "dtype": dtype, "rows": rows, "dim": dim, "way": way}

    def run() -> dict[str, Any]:
        inputs = inputs_of(name, rows, dim, DTYPES[dtype], bench.device)
        dense = DENSE[name]
        if way in ("ours", "ring"):
            options = {"keys_from": "ring"} if way == "ring" else {}
            step: Step = stepper(ours(name, bench.device, **options), inputs)
        elif way == "compiled":
            step = stepper(torch.compile(dense, dynamic=False), inputs)
        else:
            step = stepper(low(dense) if way == "open_clip" else dense, inputs)
        return with_rate(bench, name, rows, dim, bench.timed(step))

    if way == "ours" and bench.is_cuda:
        known["planned_ms"] = planned_ms(bench, name, dtype, rows, dim)
    bench.attempt(f"{name} {rows} {way}", run, 20.0 if way == "compiled" else 3.0, **known)


def with_rate(
    bench: Bench, name: str, rows: int, dim: int, found: dict[str, Any]
) -> dict[str, Any]:
    """With the part of the rate that the card has in products of bf16."""
    rate = rate_of(bench.file)
    if rate is None:
        return found
    operations = OPERATIONS[name] * rows**2 * dim
    return {**found, "of_bf16_rate": operations / found["ms"] * 1e3 / rate}


def planned_ms(bench: Bench, name: str, dtype: str, rows: int, dim: int) -> float:
    """The planner's time, on the card of that name, or else an H100."""
    card = torch.cuda.get_device_name().lower()
    known = next((x for x in CARDS if x in card), "h100")
    loss, _, symmetric = name.partition(", ")
    samples = rows // 2 if loss in ("ntxent", "dcl") else rows
    asked = planner.Asked(loss, samples, dim, dtype=dtype, card=known, symmetric=bool(symmetric))
    return 1e3 * planner.plan(asked).total_s


def errors(bench: Bench, name: str, dtype: str) -> dict[str, Any]:
    """The largest error of a gradient of ours and of dense code, against fp64 on the same rows."""
    rows, dim = (128, 64) if bench.small else ACCURACY
    inputs = inputs_of(name, rows, dim, DTYPES[dtype], bench.device)
    exact = stepper(DENSE[name], in_fp64(inputs))()
    ways = {"ours": ours(name, bench.device), "dense": DENSE[name], "open_clip": low(DENSE[name])}
    return {way: relative(stepper(loss, inputs)(), exact) for way, loss in ways.items()}


def in_fp64(inputs: list[Tensor]) -> list[Tensor]:
    """The same numbers."""
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]


# ------------------------------------------------------------------ others


def peers(bench: Bench) -> None:
    """Kernels of others, forward and backward, on rows of unit length."""
    sizes = ((128, 64),) if bench.small else ((16384, 768), (65536, 768))
    for way, (name, make) in PEERS.items():
        if importlib.util.find_spec(way.replace("-", "_")) is None:
            bench.add(way, skipped="is not installed")
            continue

        def error(name: str = name, make: Callable[[str], Loss] = make) -> dict[str, Any]:
            rows, dim = (128, 64) if bench.small else ACCURACY
            inputs = unit_rows(inputs_of(name, rows, dim, torch.bfloat16, bench.device))
            exact = stepper(DENSE[name], in_fp64(inputs))()
            found = stepper(make(bench.device), inputs)()
            return {"error": relative(tangential(found, inputs), tangential(exact, inputs))}

        bench.attempt(f"gradient error {name}, {way}", error, loss=name, way=way)
        for rows, dim in sizes:

            def run(
                name: str = name,
                make: Callable[[str], Loss] = make,
                rows: int = rows,
                dim: int = dim,
            ) -> dict[str, Any]:
                inputs = unit_rows(inputs_of(name, rows, dim, torch.bfloat16, bench.device))
                found = bench.timed(stepper(make(bench.device), inputs))
                return with_rate(bench, name, rows, dim, found)

            known = {"loss": name, "dtype": "bf16", "rows": rows, "dim": dim, "way": way}
            bench.attempt(f"{name} {rows} {way}", run, 5.0, **known)


def tangential(grads: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    """Gradients without their part along the rows, which code that normalises them leaves out."""
    units = [normalize(x.detach().double(), dim=1) for x in rows]
    return [
        grad.double() - (grad.double() * unit).sum(1, keepdim=True) * unit
        for grad, unit in zip(grads, units, strict=True)
    ]


def unit_rows(inputs: list[Tensor]) -> list[Tensor]:
    """Embeddings of unit length, rounded to their dtype."""
    return [normalize(x.detach().float(), dim=1).to(x.dtype).requires_grad_() for x in inputs]


def million(bench: Bench) -> None:
    """A batch of 2^20 on one card: whether memory is linear, and the time."""
    largest, dim = (512, 64) if bench.small else (2**20, 512)
    for rows in (largest // 16, largest // 4, largest):
        measure(bench, "infonce, symmetric", "bf16", rows, dim, "ours")

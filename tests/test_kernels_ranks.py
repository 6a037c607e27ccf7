"""Memory of a million rows over many ranks, on tensors without data and a process group that sends
nothing, and gradients that nearly cancel."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_kernels import (  # noqa: F401  # fixtures among them
    DIM,
    SETTINGS,
    counts,
    gradients,
    interpreted,
    recorded,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_contrastive import losses
from dist_contrastive.pairwise import kernel_calls

ROWS = 2**20
SLOW = pytest.mark.slow


@pytest.fixture
def of_ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of so many ranks, of which this is the first."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def peak(name: str, num_rows: int, world_size: int, **options: Any) -> float:
    """GiB that forward and backward of a loss hold at a time beyond this rank's inputs."""
    kind, settings = SETTINGS[name]
    loss = kind(**settings, impl="triton", **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        num_views = 2 if kind.takes == "views" else 1
        given = [torch.empty(num_rows, DIM, dtype=torch.bfloat16) for _ in range(num_views)]
        with counts.Counts() as found:
            sizes = (num_rows,) * world_size
            loss(*(x.requires_grad_() for x in given), sizes=sizes).backward()
    assert not found.waits
    return found.peak / 2**30


@pytest.mark.parametrize(
    ("of_ranks", "name"),
    [
        (1024, "InfoNCE, symmetric"),
        (1024, "SigLIP"),
        pytest.param(64, "InfoNCE, symmetric", marks=SLOW),
        pytest.param(64, "SigLIP", marks=SLOW),
    ],
    indirect=["of_ranks"],
)
@pytest.mark.usefixtures("recorded")
def test_memory_of_a_million_gathered_rows_is_linear(of_ranks, name):
    """Gathered keys take 1.5 GiB in bf16, their gradients 3 GiB in fp32, whatever the ranks."""
    whole = peak(name, ROWS // of_ranks, of_ranks)
    half = peak(name, ROWS // of_ranks // 2, of_ranks)
    assert whole <= 5.2
    assert whole - half <= 0.52 * whole


@pytest.mark.parametrize(
    ("of_ranks", "num_rows", "limit"),
    [(8, 2**14, 0.45), (16, 2**10, 0.06), pytest.param(64, 2**14, 0.45, marks=SLOW)],
    indirect=["of_ranks"],
)
@pytest.mark.parametrize("name", ["InfoNCE, symmetric", "SigLIP"])
@pytest.mark.usefixtures("recorded")
def test_memory_of_a_ring_does_not_grow_with_ranks(of_ranks, num_rows, limit, name):
    """16,384 rows a rank are a million over 64 ranks, and 1,024 over 1,024."""
    assert peak(name, num_rows, of_ranks, keys_from="ring") <= limit


def check_trained(name: str) -> None:
    """Views that nearly agree: the weight of the positive lies so close to 1 that, were it rounded
    to bf16 before 1 is taken off, hardly a digit of the gradient would be left."""
    kind, settings = SETTINGS[name]
    settings = {**settings, "temperature": 0.08, "learnable": False}
    torch.manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(24, 64), dim=1)
    views = [(first + 0.01 * torch.randn(24, 64)).bfloat16() for _ in range(2)]
    exact = gradients(kind(**settings, impl="dense").double(), [x.double() for x in views])
    found = gradients(kind(**settings, impl="triton"), views)
    for x, right in zip(found[1:], exact[1:], strict=True):
        assert (x - right).norm() <= torch.finfo(torch.bfloat16).eps * right.norm()


@pytest.mark.parametrize("name", ["InfoNCE", "InfoNCE, symmetric", "NT-Xent"])
def test_what_nearly_cancels_is_added_in_fp32(interpreted, name):  # noqa: F811
    interpreted(check_trained, name)


def check_second_use() -> None:
    """Gradients made in the forward pass serve several backward passes, and weights that differ."""
    torch.manual_seed(0)
    a, b = (torch.randn(9, 8).requires_grad_() for _ in range(2))
    for kind in (losses.SigLIP, losses.InfoNCE):
        value = kind(impl="triton")(a, b)
        once = torch.autograd.grad(value, [a, b], retain_graph=True)
        again = torch.autograd.grad(3 * value, [a, b])
        for x, y in zip(once, again, strict=True):
            torch.testing.assert_close(3 * x, y)
    with torch.no_grad():
        torch.testing.assert_close(losses.SigLIP(impl="triton")(a, b), losses.SigLIP()(a, b))


def test_backward_twice_and_without_gradient(interpreted):  # noqa: F811
    interpreted(check_second_use)


def launched_without_gradient(wanted: bool, started: list[Any]) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(wanted):
        x, y = (torch.empty(4096, 64, requires_grad=True) for _ in range(2))
        losses.SigLIP(impl="triton")(x, y)
    return sum(name == "product" for name, _ in started)


@pytest.mark.parametrize("wanted", [True, False])
def test_no_gradient_is_made_where_none_is_wanted(wanted, recorded):  # noqa: F811
    assert (launched_without_gradient(wanted, recorded) > 0) == wanted


def check_compiled(name: str) -> None:
    """One graph without breaks, and the same numbers; also of a tensor compared with itself."""
    kind, settings = SETTINGS[name]
    loss = kind(**settings, impl="triton")
    torch.manual_seed(0)
    a, b = (torch.randn(9, 8) for _ in range(2))
    for views in ((a, b), (a, a)):
        x, y = (view.clone().requires_grad_() for view in views)
        given = (x, x) if views[0] is views[1] else (x, y)

        def call(*inputs: torch.Tensor) -> torch.Tensor:
            return loss(*inputs)

        wanted = [*dict.fromkeys(given), *loss.parameters()]
        expected = torch.autograd.grad(call(*given), wanted)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(*given), wanted)
        for grad, right in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, right)
        torch._dynamo.reset()


@pytest.mark.parametrize("name", [pytest.param("InfoNCE, symmetric", marks=SLOW), "SigLIP"])
def test_a_compiled_loss_has_no_graph_break(interpreted, name):  # noqa: F811
    interpreted(check_compiled, name)


def check_operator() -> None:
    rows = torch.randn(5, 8)
    outputs = [torch.empty(5), torch.empty(5)]
    constants = "HAS_PARTNERS=True;UNIT=True;D=8;BM=8;BK=8"
    arguments = ("cosine", [1], [rows, rows + 1], outputs, [5.0, 2.0], constants)
    torch.library.opcheck(kernel_calls.start_compiled, arguments)


def test_the_operator_is_one_that_a_compiler_may_use(interpreted):  # noqa: F811
    interpreted(check_operator)

"""Which solver is taken, what it may hold, and what it says of it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from allocated import peak
from torch import Tensor

import fxinvert
from fxinvert.errors import DataError, SolveError
from fxinvert.linalg import (
    Convolution,
    Dense,
    FactorCache,
    IterativeFactor,
    LinearOperator,
    SolveSettings,
    SpectralFactor,
    TransposedConvolution,
    anchored,
    choice,
    choose,
    factorize,
    memory,
    solve_anchored,
)
from fxinvert.linalg.anchored import Method
from fxinvert.linalg.gram import GramFactor
from fxinvert.linalg.memory import Ledger, free_memory
from fxinvert.linalg.qr import QRFactor

#: that any convolution can be solved with
METHODS = [method for method in get_args(Method) if method != "diagonal"]
CPU = torch.device("cpu")


def square(channels: int, pixels: int) -> Convolution:
    weight = torch.nn.Conv2d(channels, channels, 3).weight.detach()
    return Convolution(weight, (channels, pixels, pixels), (1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize(
    ("operator", "method"),
    [
        (Dense(torch.randn(20, 30)), "spectral"),
        (Dense(torch.randn(2100, 2200)), "cholesky"),
        (square(2, 4), "spectral"),
        (square(8, 24), "banded"),
        (square(8, 32), "capacitance"),
    ],
    ids=["small", "wide", "small map", "map", "large map"],
)
def test_the_cheapest_is_taken(operator: LinearOperator, method: Method) -> None:
    assert choose(operator, SolveSettings()).chosen.method == method


def test_a_single_solve_is_not_worth_a_large_factorization() -> None:
    operator = Dense(torch.randn(2100, 2200))
    assert choose(operator, SolveSettings(expected=1)).chosen.method == "iterative"


@pytest.mark.parametrize("method", METHODS)
def test_the_solver_can_be_asked_for(method: Method) -> None:
    a, settings = square(2, 6), SolveSettings(method=method)
    choice, factor = choose(a, settings), factorize(a, settings)
    assert choice.chosen.method == method
    assert f"{method} (asked for)" in choice.explain()
    iterate = dict.fromkeys(("circulant", "iterative"), IterativeFactor)
    expected = {"spectral": SpectralFactor, "qr": QRFactor, **iterate}.get(method, GramFactor)
    assert isinstance(factor, expected)
    assert factor.explain()


def test_what_cannot_be_had_is_refused_with_the_reason() -> None:
    with pytest.raises(SolveError, match="it takes a convolution, which Dense 3 × 3 is not"):
        factorize(Dense(torch.randn(3, 3)), SolveSettings(method="banded"))
    with pytest.raises(SolveError, match="direct_limit=2048"):
        factorize(square(8, 32), SolveSettings(method="spectral"))
    with pytest.raises(
        SolveError,
        match="there are diagonal, spectral, qr, cholesky, banded, capacitance, circulant, iterative",
    ):
        factorize(square(2, 4), SolveSettings(method="magic"))  # type: ignore[arg-type]


def test_explain_tells_every_candidate() -> None:
    lines = choose(square(8, 32), SolveSettings(memory_limit=10**9)).explain().splitlines()
    assert lines[0] == "Convolution 8192 × 8192, 20000 solves: capacitance"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "qr",
        "spectral",
        "cholesky",
        "banded",
        "capacitance",
        "circulant",
        "iterative",
    ]
    assert "exceeds direct_limit=2048" in lines[1]
    assert "of 953.7 MiB" in lines[3]
    assert lines[5].startswith("  capacitance: 1 × the cost")


def test_a_memory_limit_is_kept() -> None:
    a = square(8, 32)
    needed = {c.method: c.memory for c in choose(a, SolveSettings()).candidates}
    assert choose(a, SolveSettings(memory_limit=needed["capacitance"])).chosen.method == "capacitance"
    direct = min(needed["capacitance"], needed["banded"])
    assert choose(a, SolveSettings(memory_limit=direct - 1)).chosen.method == "circulant"
    assert choose(a, SolveSettings(memory_limit=needed["circulant"] - 1)).chosen.method == "iterative"
    factor = choose(a, SolveSettings()).chosen.make()
    factor.solve(torch.randn(1, *a.out_shape), 1e-3)
    assert 0 < factor.nbytes <= needed["capacitance"]
    with pytest.raises(SolveError, match=f"at least {needed['iterative']} bytes"):
        factorize(a, SolveSettings(memory_limit=needed["iterative"] - 1))


@pytest.mark.parametrize("method", ["banded", "capacitance", "circulant"])
@pytest.mark.parametrize(
    ("kernel", "shape", "stride", "groups"),
    [
        ((24, 24, 3, 3), (24, 14, 14), 1, 1),
        ((48, 16, 3, 3), (16, 14, 14), 1, 1),
        ((48, 24, 3, 3), (24, 14, 14), 2, 1),
        ((32, 4, 3, 3), (32, 14, 14), 1, 8),
        ((32, 1, 3, 3), (32, 16, 16), 1, 32),
    ],
    ids=["square", "wide", "stride", "groups", "channel by channel"],
)
def test_making_a_factorization_takes_no_more_memory_than_is_reckoned(
    kernel: tuple[int, ...], shape: tuple[int, ...], stride: int, groups: int, method: Method
) -> None:
    options: dict[str, Any] = {"stride": (stride,) * 2, "padding": (1, 1), "dilation": (1, 1)}
    a, weight = Convolution(torch.randn(kernel), shape, **options, groups=groups), torch.randn(kernel)
    for operator in (a, TransposedConvolution(weight, a.out_shape, shape, **options, groups=groups)):
        chosen = choose(operator, SolveSettings(method=method)).chosen
        assert peak(chosen.make) <= chosen.memory


def test_without_a_limit_what_takes_least_may_have_all_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    a = square(8, 32)
    least = {c.method: c.memory for c in choose(a, SolveSettings()).candidates}["iterative"]
    for module in (anchored, choice):
        monkeypatch.setattr(module, "free_memory", lambda device: least)
    assert SolveSettings().memory(CPU) < least
    chosen = choose(a, SolveSettings())
    assert chosen.chosen.method == "iterative"
    assert "iterative: 1 × the cost" in chosen.explain()
    for module in (anchored, choice):
        monkeypatch.setattr(module, "free_memory", lambda device: least - 1)
    with pytest.raises(SolveError, match=f"at least {least} bytes"):
        choose(a, SolveSettings())


def test_among_many_ops_a_smaller_factorization_is_taken() -> None:
    a, limit = square(64, 8), 2**31
    few, many = (choose(a, SolveSettings(memory_limit=limit, sharing=ops)) for ops in (2, 50))
    assert (few.chosen.method, many.chosen.method) == ("banded", "capacitance")
    made = many.chosen.make()
    assert 0 < made.nbytes <= limit / 50
    assert made.nbytes < few.chosen.make().nbytes / 2


@pytest.mark.parametrize("seed", [0, 2])
def test_where_memory_is_short_answers_are_the_same(seed: int) -> None:
    # the capacitance matrices of these two lose most digits of those of a dozen kernels
    torch.manual_seed(seed)
    a = square(64, 8) if seed == 0 else square(32, 16)
    x, found = torch.randn(3, *a.in_shape), []
    for ops in (2, 200):
        settings = SolveSettings(memory_limit=2**31, sharing=ops)
        solved = solve_anchored(factorize(a, settings), a.apply(x), settings)
        assert not solved.damped.any()
        found.append(solved.value)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_solved_in_parts_where_memory_is_short(method: Method) -> None:
    a = square(2, 6)
    factor, r = factorize(a, SolveSettings(method=method)), torch.randn(7, *a.out_shape)
    asked: list[int] = []
    whole, solve = solve_anchored(factor, r, SolveSettings()), factor.solve

    def counted(r: Tensor, damping: float, limit: float = 0.0) -> object:
        asked.append(len(r))
        return solve(r, damping)

    factor.solve = counted  # type: ignore[method-assign,assignment]
    parts = solve_anchored(factor, r, SolveSettings(memory_limit=3 * factor.work))
    assert asked[0] == 3
    assert max(asked) == 3
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-3, atol=1e-4)
    assert torch.equal(parts.damped, whole.damped)


def test_free_memory_is_a_plausible_number() -> None:
    assert 2**20 < free_memory(CPU) < 2**50
    assert SolveSettings().memory(CPU) <= free_memory(CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="limits are read from /proc and /sys")
def test_free_memory_is_what_the_limits_of_the_process_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with monkeypatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda _: (used + 2**29, resource.RLIM_INFINITY))
        assert 2**28 <= free_memory(CPU) <= 2**29 + 2**26
    (tmp_path / "memory.max").write_text(f"{2**31}\n")
    (tmp_path / "memory.current").write_text(f"{2**31 - 2**28}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2**27}\n")
    monkeypatch.setattr(memory, "CONTAINERS", ((str(tmp_path), *memory.CONTAINERS[0][1:]),))
    assert free_memory(CPU) == 2**28 + 2**27
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 2**28 + 2**27


def test_every_op_of_a_graph_tells_its_solver_and_takes_another_one() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(3, 3, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(48, 3),
    )
    x, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 0])
    chosen = fxinvert.invert(model, x)
    assert chosen.inverse_op(chosen.output_node).settings.sharing == 3
    asked = fxinvert.invert(model, x, solvers={"2": "circulant", "4": "cholesky"})
    assert chosen.explain() == ""  # nothing has been solved yet
    expected, found = chosen(x, y), asked(x, y)
    assert "2: Convolution 48 × 108, 1000 solves: spectral" in chosen.explain()
    assert "2: Convolution 48 × 108, 1000 solves: circulant (asked for)" in asked.explain()
    assert "preconditioned by a circulant" in asked.explain()
    assert "4: Dense 3 × 48, 1000 solves: cholesky (asked for)" in asked.explain()
    assert "0: Convolution 108 × 128, 1000 solves: spectral" in asked.explain()
    for name in expected.names:
        torch.testing.assert_close(found.targets[name], expected.targets[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solvers", [{"nowhere": "spectral"}, {"0": "magic"}])
def test_solvers_for_nodes_that_do_not_exist_are_refused(solvers: Any) -> None:
    with pytest.raises(DataError, match=r"the solvers are diagonal, spectral, .* and the nodes .*0"):
        fxinvert.invert(torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.randn(2, 3), solvers=solvers)


# --- the cache ----------------------------------------------------------------------------------------------


def test_the_cache_keeps_until_the_parameters_change() -> None:
    cache, weight, built = FactorCache(Ledger()), torch.randn(3, 3), []

    def build() -> int:
        built.append(0)
        return len(built)

    assert [cache.get("a", (weight,), build) for _ in range(3)] == [1, 1, 1]
    weight[0, 0] += 1
    assert cache.get("a", (weight,), build) == 2
    assert cache.get("b", (weight,), build) == 3


def test_off_the_processor_what_nobody_wrote_to_is_not_looked_at() -> None:
    """Tensors without values stand for those of a device: comparing them raises."""
    cache, weight, built = FactorCache(Ledger(limit=10**6)), torch.empty(3, 3, device="meta"), []
    for _ in range(2):
        cache.get("weight", (weight,), lambda: built.append(1))
    assert len(built) == 1
    weight.add_(1)
    with pytest.raises(NotImplementedError):
        cache.get("weight", (weight,), lambda: built.append(1))


def test_all_caches_together_keep_the_limit_and_drop_what_was_not_used_for_longest() -> None:
    ledger = Ledger(limit=2500)
    caches, built = [FactorCache(ledger) for _ in range(3)], []
    weight = torch.zeros(0)

    def get(i: int) -> None:
        def build() -> Tensor:
            built.append(i)
            return torch.zeros(1000, dtype=torch.uint8)

        caches[i].get("key", (weight,), build)

    for i in (0, 1, 0, 2, 0):  # 2 is too much: 1 goes
        get(i)
    assert built == [0, 1, 2]
    for _ in range(2):  # it was away for long, so that it is not kept, until it comes back soon
        get(1)
    assert built == [0, 1, 2, 1, 1]
    assert [cache.size("key") for cache in caches] == [1000, 1000, None]


def test_of_a_round_trip_through_too_many_entries_as_many_stay_as_fit() -> None:
    ledger, weight = Ledger(limit=5000), torch.zeros(0)
    built: list[int] = []
    caches = [FactorCache(ledger) for _ in range(20)]

    def round_trip(some: range) -> int:
        built.clear()
        for i in some:

            def build(i: int = i) -> Tensor:
                built.append(i)
                return torch.zeros(1000, dtype=torch.uint8)

            caches[i].get("key", (weight,), build)
        return len(built)

    first, others = range(10), range(10, 20)
    assert [round_trip(first) for _ in range(4)] == [10, 5, 5, 5], "dropping the oldest: 10"
    assert round_trip(range(5, 8)) <= 3
    # what is asked for no more gives way
    assert [round_trip(others) for _ in range(4)][-1] <= 6
    assert sum(cache.size("key") is not None for cache in caches[:10]) == 0


def test_a_cache_that_is_gone_counts_no_more() -> None:
    ledger = Ledger(limit=1500)
    weight, first = torch.zeros(0), FactorCache(ledger)
    first.get("key", (weight,), lambda: torch.zeros(1000, dtype=torch.uint8))
    del first
    gc.collect()
    second = FactorCache(ledger)
    for key in "ab":
        second.get(key, (weight,), lambda: torch.zeros(700, dtype=torch.uint8))
    assert [second.size(key) for key in "ab"] == [700, 700]

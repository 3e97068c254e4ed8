"""Chains of kernels on teams of threads: every piece once and in order, whoever comes, and whatever interrupts."""

import ctypes
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import dense, sparse

from sparsetwin.kernels import TARGETS, Chain, ConvolutionGeometry, KernelPiece, Pool, SparseConvolution, kernel_ir
from sparsetwin.kernels import _team as team
from sparsetwin.kernels._cache import Kernel
from sparsetwin.kernels._llvm import MachineCode, assemble
from sparsetwin.kernels._team_ir import YIELDS, WalkSpecification

_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 4)


class Recorded:
    """Kernels written in Python that note when they run: (kernel, piece, thread)."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.running: list[int] = []
        self.overlaps = 0
        self.seconds = seconds
        call = _SIGNATURE(self._run)
        address = ctypes.cast(call, ctypes.c_void_p).value
        assert address is not None
        self.kernel = Kernel(WalkSpecification(target=TARGETS["generic"]), call, MachineCode(address, call))

    def _run(self, table: int, number: int, piece: int, _: int, __: int) -> None:
        self.running.append(number)
        self.overlaps += any(other != number for other in self.running)
        time.sleep(self.seconds * random.random())
        self.seen.append((number, piece, threading.get_ident()))
        self.running.remove(number)

    def chain(self, *pieces: int) -> Chain:
        table = (ctypes.c_int64 * 1)()
        return Chain([[KernelPiece(self.kernel, table, (k, p, 0, 0)) for p in range(n)] for k, n in enumerate(pieces)])

    def check(self, *pieces: int) -> None:
        """Every piece ran once, and none before all those of the kernels before."""
        found = [(number, piece) for number, piece, _ in self.seen]
        assert sorted(found) == [(k, p) for k, n in enumerate(pieces) for p in range(n)]
        assert [number for number, _ in found] == sorted(number for number, _ in found)
        assert self.overlaps == 0


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 5])
def test_each_piece_runs_once_and_after_those_of_the_kernels_before(threads):
    pieces = (3, 1, 8, 0, 2, 5, 1, 4)
    for seconds in (0.0, 1e-3):
        recorded = Recorded(seconds)
        recorded.chain(*pieces).run(None if threads is None else Pool(threads))
        recorded.check(*pieces)


def python_piece(run: Callable[[], object]) -> KernelPiece:
    call = _SIGNATURE(lambda *_: run())
    address = ctypes.cast(call, ctypes.c_void_p).value
    assert address is not None
    kernel = Kernel(WalkSpecification(target=TARGETS["generic"]), call, MachineCode(address, call))
    return KernelPiece(kernel, (ctypes.c_int64 * 1)(), (0, 0, 0, 0))


def test_several_threads_share_the_pieces():
    meeting = threading.Barrier(3, timeout=60)
    found: list[int] = []
    chain = Chain([[python_piece(lambda: found.append(meeting.wait()))] * 3] * 2)
    chain.run(Pool(3))
    assert sorted(found) == [0, 0, 1, 1, 2, 2]
    assert not meeting.broken


def test_an_empty_chain_does_nothing():
    Recorded().chain().run(Pool(2))
    Chain([[]]).run()


def chain_of_products(pool_threads: int) -> tuple[Chain, list[torch.Tensor]]:
    """Six convolutions that read each other's results, and all planes they work on."""
    geometry = ConvolutionGeometry(in_channels=48, out_channels=48, kernel=(3, 3), height=20, width=20, padding=(1, 1))
    convolutions = [
        SparseConvolution(sparse(48, 48, 3, 3, density=0.2, seed=seed) / 10, geometry=geometry) for seed in range(6)
    ]
    layout = convolutions[0].source
    convolutions = [
        SparseConvolution(each.matrix, geometry=geometry, source=layout, destination=layout) for each in convolutions
    ]
    planes = [layout.pack(dense(1, 48, 20, 20))] + [layout.empty(1) for _ in convolutions]
    kernels = [
        each.bound(planes[number], out=planes[number + 1], threads=pool_threads)
        for number, each in enumerate(convolutions)
    ]
    assert pool_threads == 1 or all(len(pieces) > 1 for pieces in kernels)
    return Chain(kernels), [*planes, *(each.matrix.values for each in convolutions), *convolutions]


def test_many_calls_at_once_on_one_pool_give_the_bits_of_one_thread():
    chain, (first, *planes) = chain_of_products(1)
    chain.run()
    expected = planes[5].clone()
    pool = Pool(3)
    chains = [chain_of_products(3) for _ in range(4)]

    def call(number: int) -> torch.Tensor:
        chain, kept = chains[number]
        for _ in range(25):
            chain.run(pool)
        return kept[6]

    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(call, range(4)))
    assert first.any()
    assert all(torch.equal(out, expected) for out in found)


def test_calls_end_when_no_thread_can_be_had(monkeypatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    recorded, pool = Recorded(), Pool(3)
    recorded.chain(4, 4).run(pool)
    recorded.check(4, 4)
    seen = []
    pool.run([lambda: seen.append(0)] * 5)
    assert len(seen) == 5


def test_a_thread_that_comes_too_late_takes_nothing():
    pool, come, hold = Pool(2), threading.Event(), threading.Event()

    def busy() -> None:
        come.set()
        hold.wait(60)

    pool.share(busy, here=come.wait)
    recorded = Recorded()
    recorded.chain(3, 3).run(pool)
    recorded.check(3, 3)
    assert len({thread for *_, thread in recorded.seen}) == 1
    hold.set()
    gc.collect()
    after = threading.Event()
    pool.share(after.set, here=lambda: after.wait(60))  # by now the other thread has looked at the chain
    assert after.is_set()
    recorded.check(3, 3)


def test_an_interrupted_call_leaves_no_thread_at_work():
    class Stop(BaseException):
        pass

    pool, ended = Pool(2), []
    come = threading.Event()

    def work() -> None:
        come.set()
        time.sleep(0.1)
        ended.append(threading.get_ident())

    def here() -> None:
        assert come.wait(10)
        raise Stop

    with pytest.raises(Stop):
        pool.share(work, here=here)
    assert len(ended) == 1  # it was waited for

    def at_once() -> None:
        raise Stop

    ended.clear()
    with pytest.raises(Stop):
        pool.share(work, here=at_once)
    found = len(ended)
    time.sleep(0.15)
    assert len(ended) == found  # a thread that had not come is not let in
    recorded = Recorded()
    recorded.chain(2, 2).run(pool)
    recorded.check(2, 2)


def test_pieces_that_are_left_after_an_interruption_are_not_begun():
    pool, seen = Pool(2), []

    class Stop(BaseException):
        pass

    class Queue:
        def put(self, item: object) -> None:
            raise Stop

    pool.run([lambda: None] * 2)
    monkey, pool._queue = pool._queue, Queue()
    with pytest.raises(Stop):
        pool.run([lambda: seen.append(0)] * 4)
    pool._queue = monkey
    assert not seen
    pool.run([lambda: seen.append(0)] * 4)
    assert len(seen) == 4


def test_where_counters_are_not_known_to_be_atomic_chains_run_kernel_by_kernel(monkeypatch):
    monkeypatch.setattr(team.platform, "machine", lambda: "riscv64")
    for pool in (None, Pool(3)):
        recorded = Recorded(1e-3)
        chain = recorded.chain(3, 1, 5)
        assert chain._walk is None
        chain.run(pool)
        recorded.check(3, 1, 5)


@pytest.mark.parametrize(("name", "pause"), [("avx2", "x86.sse2.pause"), ("neon", "aarch64.hint"), ("generic", None)])
def test_each_target_waits_by_its_own_instruction(name, pause):
    text = kernel_ir(WalkSpecification(target=TARGETS[name]))
    assert "atomicrmw add" in text
    assert ("call void @llvm" in text) == (pause is not None)
    assert pause is None or pause in text
    if name == team.host_target().name or name == "generic":
        assert assemble(text, features=TARGETS[name].feature_string)


def test_a_waiting_thread_offers_its_processor_and_then_sleeps(monkeypatch):
    """One piece takes longer than all pauses: until the threads that wait for it have slept."""
    slept, calls = threading.Event(), {"offer": 0, "sleep": 0}

    def offer() -> int:
        calls["offer"] += 1
        return 0

    def sleep(microseconds: int) -> int:
        calls["sleep"] += 1
        slept.set()
        time.sleep(1e-6 * microseconds)
        return 0

    waits = ctypes.CFUNCTYPE(ctypes.c_int)(offer), ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint)(sleep)
    addresses = tuple(ctypes.cast(each, ctypes.c_void_p).value for each in waits)
    monkeypatch.setattr(team, "_waits", lambda: addresses)
    ran: list[bool] = []
    Chain([[python_piece(lambda: ran.append(slept.wait(60)))], [python_piece(lambda: ran.append(True))] * 2]).run(
        Pool(3)
    )
    assert ran == [True] * 3
    assert calls["offer"] >= YIELDS
    assert calls["sleep"] >= 1


def test_chains_work_on_in_a_forked_child_and_end_with_the_interpreter():
    script = f"""
import os, sys, threading, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths()!r}
from test_team import Pool, chain_of_products
pool = Pool(2)
chain, kept = chain_of_products(2)
chain.run(pool)
expected = kept[6].clone()
child = os.fork()
if child == 0:
    same = False
    try:
        kept[6].zero_()
        chain.run(pool)
        same = torch.equal(kept[6], expected)
    finally:
        os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
def forever():
    while True:
        chain.run(pool)
threading.Thread(target=forever, daemon=True).start()
"""
    run_python(script)


def test_interrupts_at_any_time_leave_the_next_call_right():
    script = f"""
import signal, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths()!r}
from test_team import Pool, chain_of_products
pool = Pool(2)
chain, kept = chain_of_products(2)
chain.run(pool)
expected = kept[6].clone()
interrupted = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for number in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + 2e-5 * number)
        while True:
            chain.run(pool)
    except KeyboardInterrupt:
        interrupted += 1
    kept[6].zero_()
    chain.run(pool)
    assert torch.equal(kept[6], expected)
assert interrupted == 150
"""
    run_python(script)


def paths() -> list[str]:
    return [path for path in sys.path if path]


def run_python(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

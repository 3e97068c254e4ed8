"""What more threads give a deployed network, beside what the machine gives to as many processes; see inference.py."""

import multiprocessing
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.runtime import Deployed, deploy, load

Inputs = tuple[Tensor, ...]
TURN_SECONDS = 0.25


@dataclass(frozen=True)
class Scaling:
    results: dict[str, Any]
    plans: dict[str, Any]


def scaling_of(twin: nn.Module, inputs: Inputs, *, threads: int, rounds: int, stack: ExitStack) -> Scaling:
    """Time one thread, several threads and several processes in turn."""
    torch.set_num_threads(1)
    one = deploy(twin, inputs, threads=1, rivals=())
    calls = max(1, round(TURN_SECONDS / seconds_of(one, inputs, 1)))
    file = f"{stack.enter_context(tempfile.TemporaryDirectory())}/deployed.safetensors"
    one.save(file)
    pipes = [start(file, inputs, calls, stack) for _ in range(threads - 1)]
    torch.set_num_threads(threads)
    several = deploy(twin, inputs, threads=threads, rivals=())
    expected = one(*inputs)
    assert float((several(*inputs) - expected).abs().max() / expected.abs().max()) <= 1e-5
    found = [one_round(one, several, inputs, calls, pipes) for _ in range(rounds + 1)][1:]
    for pipe in pipes:
        pipe.send(False)
    results = {
        "calls_of_a_turn": calls,
        "one_thread_ms": round(1e3 * statistics.median(turn["alone"] for turn in found), 3),
        "threads_ms": round(1e3 * statistics.median(turn["threads"] for turn in found), 3),
        "threads_times_faster": median_and_quartiles([turn["alone"] / turn["threads"] for turn in found]),
        "processes_times_as_much": median_and_quartiles([turn["processes"] for turn in found]),
        "rounds": [{key: round(value, 6) for key, value in turn.items()} for turn in found],
    }
    return Scaling(results, {f"{each.plan.threads} threads": each.plan.to_json() for each in (one, several)})


def one_round(
    one: Deployed, several: Deployed, inputs: Inputs, calls: int, pipes: list[Connection]
) -> dict[str, float]:
    """Return seconds of a call alone (before and after the others) and with threads; and what processes do together."""
    before = seconds_of(one, inputs, calls)
    threads = seconds_of(several, inputs, calls)
    for pipe in pipes:
        pipe.send(True)
    together = [seconds_of(one, inputs, calls), *(pipe.recv() for pipe in pipes)]
    alone = (before + seconds_of(one, inputs, calls)) / 2
    return {"alone": alone, "threads": threads, "processes": sum(alone / seconds for seconds in together)}


def seconds_of(deployed: Deployed, inputs: Inputs, calls: int) -> float:
    torch.set_num_threads(deployed.plan.threads)
    started = time.perf_counter()
    for _ in range(calls):
        deployed(*inputs)
    return (time.perf_counter() - started) / calls


def start(file: str, inputs: Inputs, calls: int, stack: ExitStack) -> Connection:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=other_process, args=(file, inputs, calls, there), daemon=True)
    process.start()
    stack.callback(process.kill)
    here.recv()  # it is ready
    return here


def other_process(file: str, inputs: Inputs, calls: int, pipe: Connection) -> None:
    """Run a deployed network so many times whenever asked, and answer with the seconds of a call."""
    torch.set_num_threads(1)
    deployed = load(file, threads=1)
    with torch.no_grad():
        deployed(*inputs)
        pipe.send(deployed.plan.engine)
        while pipe.recv():
            pipe.send(seconds_of(deployed, inputs, calls))


def median_and_quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(value, 3) for value in (middle, low, high)]

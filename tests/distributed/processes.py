"""Run a function in several gloo processes on this machine and collect what each returns."""

import multiprocessing.forkserver as forkserver
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

LOADED = [
    "sparsetwin",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]
"""Loaded once, for seconds, by the process that all others are forked from."""


def run(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Return what ``function(rank, *arguments)`` returned in each process; an error of one is raised here.

    The function has to be importable: defined at the top of a test module.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forkserver.set_forkserver_preload(LOADED)
    given = (function, world_size, port, folder, arguments)
    multiprocessing.start_processes(_process, given, nprocs=world_size, start_method="forkserver")
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _process(rank: int, function: Callable[..., Any], world_size: int, port: int, folder: Path, arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}  # Accelerate would take all cores
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        result = function(rank, *arguments)
        (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # FSDP2 keeps gloo's threads alive, which may abort in the interpreter's end: pytorch/pytorch#190489

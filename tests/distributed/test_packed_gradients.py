"""DDP that sends kept gradients only: the same bits, fewer bytes."""

import warnings

import pytest
import torch
from processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st
from sparsetwin.errors import UsageError
from sparsetwin.integrations.ddp import pack_gradients

STEPS = 9


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 36, 64)
        self.out = nn.Linear(64, 5)

    def forward(self, x):
        return self.out(self.hidden(self.norm(self.conv(x)).relu().flatten(1)).relu())


def train(rank: int, packed: bool, accumulate: bool) -> tuple[list[torch.Tensor], int, int]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = st.schedules.phases([(2, 0.0), (4, 0.9), (1, 0.0), (2, 0.9)])
    sparsifier = st.Sparsifier(st.ACDC(schedule=schedule), model, optimizer)
    counts = pack_gradients(model, sparsifier) if packed else None
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        sparsifier.begin_step()
        for part in range(2 if accumulate else 1):
            x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator)
            if accumulate and part == 0:
                with model.no_sync():
                    nn.functional.cross_entropy(model(x), y).backward()
            else:
                nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return weights, counts.bytes_sent if counts else 0, counts.bytes_dense if counts else 0


def compare(rank: int, accumulate: bool) -> tuple[bool, int, int]:
    warnings.simplefilter("ignore")
    plain, _, _ = train(rank, False, accumulate)
    packed, sent, dense = train(rank, True, accumulate)
    return all(map(torch.equal, plain, packed)), sent, dense


@pytest.mark.parametrize("accumulate", [False, True])
def test_two_processes_get_the_bits_of_ddp_and_send_kept_gradients_and_non_targets_only(accumulate, tmp_path):
    model = Net()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    targets = sum(sizes[name] for name in ("conv.weight", "hidden.weight", "out.weight"))
    kept = targets - round(0.9 * targets)
    others = sum(sizes.values()) - targets
    for same_bits, sent, dense in run(compare, 2, tmp_path, accumulate):
        assert same_bits
        assert dense == STEPS * 4 * sum(sizes.values())
        assert sent == 3 * 4 * sum(sizes.values()) + 6 * 4 * (kept + others)


def test_a_model_that_is_no_ddp_is_refused():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = st.Sparsifier(st.ACDC(schedule=st.schedules.constant(sparsity=0.5, total_steps=2)), model, optimizer)
    with pytest.raises(UsageError, match="expected a DistributedDataParallel, got a Linear"):
        pack_gradients(model, sparsifier)

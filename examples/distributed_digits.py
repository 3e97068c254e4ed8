"""Train a dense network of digits and its sparse twin in several processes, in a plain PyTorch loop."""

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st
from sparsetwin.data import Digits
from sparsetwin.training import whole_twin, whole_view

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--fsdp", action="store_true", help="shard the weights instead of copying them")
options = parser.parse_args()

dist.init_process_group("gloo")  # on GPUs "nccl", and torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))

digits = Digits().load(None, batch_size=64, eval_batch_size=500, seed=0, device=torch.device("cpu"))
torch.manual_seed(0)  # the same weights in every process
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
template = copy.deepcopy(network)

if options.fsdp:
    mesh = init_device_mesh("cpu", (world,))
    for layer in network:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    model = fully_shard(network, mesh=mesh)
else:
    model = DistributedDataParallel(network)

optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
epoch_steps = len(digits.train)
schedule = st.schedules.alternating(
    sparsity=0.8,
    total_steps=options.epochs * epoch_steps,
    warmup_steps=epoch_steps,
    sparse_steps=epoch_steps,
    dense_steps=epoch_steps,
    final_dense_steps=epoch_steps,
    final_sparse_steps=2 * epoch_steps,
)
sparsifier = st.Sparsifier(st.ACDC(schedule=schedule), model, optimizer)  # after wrapping and sharding
pair = st.Pair(options.out / "pair")

for epoch in range(options.epochs):
    for images, labels in digits.train.epoch(epoch):
        x, y = images.tensor_split(world)[rank], labels.tensor_split(world)[rank]
        sparsifier.begin_step()  # when a phase begins, it compares the masks of all processes
        loss = nn.functional.cross_entropy(model(x), y) * (len(y) * world / len(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if sparsifier.phase_ends:
            twin, view = whole_twin(template, network), whole_view(sparsifier)  # in every process
            if rank == 0:
                pair.save(twin, view)

if rank == 0:
    for name, member in pair.members.items():
        half = pair.load(name, template).eval()
        with torch.no_grad():
            right = sum(int((half(x).argmax(1) == y).sum()) for x, y in digits.test.epoch(0))
        pair.annotate(name, {"test_accuracy": right / digits.test.samples})
        print(f"{name}: {member.kept:,} of {member.targets:,} weights kept, accuracy {right / digits.test.samples:.1%}")
dist.destroy_process_group()

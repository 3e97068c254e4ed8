"""A small network in plain PyTorch that predicts the next byte of a text, and the plain loop that is the reference."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.methods import Method

CONTEXT = 8
STEPS = 18
SCHEDULE = st.schedules.alternating(
    sparsity=0.8,
    total_steps=STEPS,
    warmup_steps=3,
    sparse_steps=3,
    dense_steps=3,
    final_dense_steps=3,
    final_sparse_steps=4,
)  # fmt: skip  dense 0-3, sparse 3-6, dense 6-9, sparse 9-18
KINDS = {
    "in the warm-up": 2,
    "where a sparse phase begins": 3,
    "in a sparse phase": 4,
    "where a dense phase begins and an epoch ends": 6,
    "in a dense phase": 8,
    "where the final sparse phase begins": 9,
    "in the final sparse phase": 13,
}


class ByteModel(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 8)
        self.hidden = nn.Linear(8 * CONTEXT, 64)
        self.norm = nn.BatchNorm1d(64)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(64, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(self.embedding(tokens).flatten(1))).relu()
        return self.out(self.dropout(hidden))


def make_model(dropout: float = 0.1) -> ByteModel:
    torch.manual_seed(0)
    return ByteModel(dropout)


def make_loader(tokens: Tensor, *, batch_size: int = 16, different: int = 96) -> torch.utils.data.DataLoader:
    """Return 96 / batch_size batches of contexts and the bytes that follow; only ``different`` rows differ."""
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT + 1)[:different].repeat(96 // different, 1)
    data = torch.utils.data.TensorDataset(windows[:, :-1], windows[:, -1])
    own_numbers = torch.Generator().manual_seed(0)  # else each epoch draws from those that dropout uses
    return torch.utils.data.DataLoader(data, batch_size=batch_size, generator=own_numbers)


def train_plainly(
    tokens: Tensor, *, max_norm: float, accumulate: int = 1, method: Callable[..., Method] = st.ACDC
) -> tuple[ByteModel, st.Sparsifier]:
    """Train 18 steps in epochs of 6 with nothing but PyTorch."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsifier = st.Sparsifier(method(schedule=SCHEDULE), model, optimizer)
    torch.manual_seed(7)
    for _ in range(3):
        for index, (x, y) in enumerate(make_loader(tokens, batch_size=16 // accumulate)):
            sparsifier.begin_step()
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                sparsifier.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
    return model, sparsifier


def same_state(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two networks are equal to the bit."""
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

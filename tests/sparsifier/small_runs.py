"""Small networks, data and training runs for the tests of sparsification."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sparsetwin as st
from sparsetwin.schedules import Phase, Schedule

SCHEDULE = st.schedules.phases([(2, 0.0), (3, 0.8), (2, 0.0), (1, 0.5), (2, 0.0), (2, 0.8)])
TARGETS = ("0.weight", "4.weight", "6.weight")
SIZES = {"0.weight": 27, "4.weight": 384, "6.weight": 32}


def network(seed: int = 0) -> nn.Sequential:
    """A convolution, batch norm and two linear layers: 443 weights that may be pruned."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step, always the same."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(6, 1, 6, 6, generator=generator), torch.randint(4, (6,), generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The loss on the batch of a step."""
    inputs, labels = batch(step)
    return nn.functional.cross_entropy(model(inputs), labels)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def acdc(schedule: Schedule = SCHEDULE, **fields) -> st.ACDC:
    return st.ACDC(schedule=schedule, **fields)


def bare(model: nn.Module) -> nn.Module:
    """What a wrapper wraps."""
    for name in ("module", "_orig_mod"):
        model = getattr(model, name, model)
    return model


@dataclass
class Run:
    """A model in training, step by step."""

    model: nn.Module
    optimizers: list[Optimizer]
    sparsifier: st.Sparsifier

    @classmethod
    def new(cls, method=None, *, make_optimizers=sgd, model=None, seed=0, **arguments) -> "Run":
        model = network(seed) if model is None else model
        optimizers = make_optimizers(model)
        optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        arguments.setdefault("gradient_pass", lambda index: loss_of(model, 1000 + index).backward())
        return cls(model, optimizers, st.Sparsifier(method or acdc(), model, optimizers, **arguments))

    @property
    def phase(self) -> Phase:
        return self.sparsifier.phase

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.sparsifier.weights)

    def backward(self, step: int | None = None) -> None:
        step = self.sparsifier.steps if step is None else step
        if self.sparsifier.method.needs_closure:
            self.sparsifier.backward(self.closure(step))
        else:
            self.sparsifier.begin_step()
            loss_of(self.model, step).backward()

    def closure(self, step: int) -> Callable[[], Tensor]:
        """What runs forward and backward over the batch of a step."""

        def closure() -> Tensor:
            loss = loss_of(self.model, step)
            loss.backward()
            return loss

        return closure

    def step(self) -> None:
        self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            self.step()
        return self

    def saved(self) -> bytes:
        """Everything, as bytes of ``torch.save``."""
        file = io.BytesIO()
        state = {
            "model": bare(self.model).state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sparsifier": self.sparsifier.state_dict(),
        }
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved: bytes) -> "Run":
        state = read(saved)
        bare(self.model).load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.sparsifier.load_state_dict(state["sparsifier"])
        return self


def read(saved: bytes) -> dict:
    return torch.load(io.BytesIO(saved), weights_only=True)


def bits(run: Run) -> dict[str, Tensor]:
    """All tensors that training goes on from: parameters, buffers, optimizer state and masks."""
    found = {f"model.{name}": tensor.clone() for name, tensor in bare(run.model).state_dict().items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{j}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found | {f"mask.{name}": mask.clone() for name, mask in run.sparsifier.masks.items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], *, context: object = "") -> None:
    assert found.keys() == expected.keys(), context
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} differs {context}"


def assert_pruned_are_exact_zeros(run: Run) -> None:
    """Not even -0.0."""
    for name, mask in run.sparsifier.masks.items():
        pruned = run.sparsifier.weights[name].detach()[~mask]
        assert torch.equal(pruned.view(torch.int32), torch.zeros_like(pruned, dtype=torch.int32)), name


def nonzeros(run: Run) -> int:
    return sum(int(weight.count_nonzero()) for weight in run.sparsifier.weights.values())

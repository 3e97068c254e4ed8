"""Top-KAST on two processes: stored weights and masks are those of one process, under DDP and in shards."""

import warnings

import pytest
import test_distributed_training as training
import torch
from processes import run

import sparsetwin as st


def topkast() -> st.TopKAST:
    schedule = st.schedules.phases([(3, 0.0), (4, 0.9), (3, 0.0), (4, 0.8)])
    return st.TopKAST(schedule=schedule, exploration=0.01, distribution=st.Global(), every_steps=2)


class Trial(training.Trial):
    """A run that also records whole stored weights."""

    def seen(self) -> list[torch.Tensor]:
        stored = self.sparsifier.state_dict()["buffers"].get("stored", {})
        return super().seen() + [training.whole(weight) for weight in stored.values()]


def differences(rank: int, kind: str) -> list[str]:
    warnings.simplefilter("ignore")
    training.method = topkast
    found = []
    for optimizer in training.OPTIMIZERS:
        expected = Trial("one process", optimizer).course()
        actual = Trial(kind, optimizer).course()
        for step, (theirs, mine) in enumerate(zip(expected, actual, strict=True)):
            if len(theirs) != len(mine) or not all(map(torch.equal, theirs, mine)):
                found.append(f"{kind}, {optimizer}: step {step}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_stored_weights_are_those_of_one_process_on_the_same_batches(kind, tmp_path):
    assert run(differences, 2, tmp_path, kind) == [[], []]

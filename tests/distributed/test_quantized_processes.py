"""Quantization-aware training on two processes: stored and rounded weights are those of one, copied and in shards."""

import warnings

import pytest
import test_distributed_training as training
from processes import run
from test_stored_weights_processes import Trial

import sparsetwin as st


def quantized() -> st.ACDC:
    schedule = st.schedules.phases([(3, 0.0), (4, 0.9), (3, 0.0), (4, 0.8)])
    return st.ACDC(schedule=schedule, quantization=st.Int8(start_step=11))


def differences(rank: int, kind: str) -> list[str]:
    warnings.simplefilter("ignore")
    training.method = quantized
    found = []
    for optimizer in training.OPTIMIZERS:
        expected = Trial("one process", optimizer).course()
        actual = Trial(kind, optimizer).course()
        assert len(expected[-1]) > len(expected[10])  # stored weights are among them
        for step, (theirs, mine) in enumerate(zip(expected, actual, strict=True)):
            if len(theirs) != len(mine) or not all(a.equal(b) for a, b in zip(theirs, mine, strict=True)):
                found.append(f"{kind}, {optimizer}: step {step}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_stored_and_rounded_weights_are_those_of_one_process_on_the_same_batches(kind, tmp_path):
    assert run(differences, 2, tmp_path, kind) == [[], []]

"""What CrAM is for: networks that lose less when they are cut."""

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.data.digits import Digits


@pytest.mark.parametrize("seed", [0, 1])
def test_the_digits_network_loses_less_when_it_is_cut_than_one_trained_plainly(seed):
    data = Digits().load(None, batch_size=64, eval_batch_size=200, seed=seed, device=torch.device("cpu"))
    batches = [batch for epoch in range(10) for batch in data.train.epoch(epoch)]

    def losses(method):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = st.Sparsifier(method, model, optimizer, seed=seed)

        def loss_on(inputs, labels):
            return nn.functional.cross_entropy(model(inputs), labels)

        for inputs, labels in batches:

            def closure(inputs=inputs, labels=labels):
                loss = loss_on(inputs, labels)
                loss.backward()
                return loss

            sparsifier.backward(closure)
            optimizer.step()
            optimizer.zero_grad()
        dense = sum(loss_on(*batch).item() for batch in data.test.epoch(0))
        sparsifier.begin_step()  # the cut
        return dense, sum(loss_on(*batch).item() for batch in data.test.epoch(0))

    schedule = st.schedules.phases([(len(batches), 0.0), (1, 0.9)])
    _, plain_cut = losses(st.OneShot(schedule=schedule))
    dense, cut = losses(st.CrAM(schedule=schedule))
    assert cut < 0.5 * plain_cut
    assert dense < cut

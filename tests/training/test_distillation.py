"""Learning from another network's outputs: the loss, who teaches when, and that it survives a stop."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import STEPS, Numbers, make_method, make_run, network
from torch import nn
from trials import acdc, settings
from trials import network as small_network

from sparsetwin.errors import ConfigError
from sparsetwin.schedules import phases
from sparsetwin.targets import Targets
from sparsetwin.training import OWN, OptimizerSettings, Run, Session, TrainSettings, distillation_loss

DENSE_THEN_SPARSE = phases([(4, 0.0), (4, 0.75), (4, 0.0), (4, 0.75)])


class TestLoss:
    def test_it_is_the_divergence_of_softened_outputs_times_the_squared_temperature(self):
        temperature = 2.0
        student, teacher = [2.0, 0.0], [0.0, 4.0]
        p = [1 / (1 + math.exp(2)), math.exp(2) / (1 + math.exp(2))]  # of the teacher: softmax of 0 and 2
        q = [math.exp(1) / (1 + math.exp(1)), 1 / (1 + math.exp(1))]  # of the student: softmax of 1 and 0
        expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        found = distillation_loss(torch.tensor([student]), torch.tensor([teacher]), temperature=temperature)
        assert found.item() == pytest.approx(expected, rel=1e-6)

    def test_it_is_the_mean_over_samples_and_over_places_of_a_text(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
        each = [
            distillation_loss(student[i, j][None], teacher[i, j][None], temperature=3.0).item()
            for i in range(2)
            for j in range(3)
        ]
        assert distillation_loss(student, teacher, temperature=3.0).item() == pytest.approx(sum(each) / 6, rel=1e-5)

    @pytest.mark.parametrize("accumulation", [1, 4])
    def test_a_step_mixes_it_with_that_of_the_labels(self, accumulation):
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        trained = taught(teacher, teacher_weight=0.3, teacher_temperature=2.0, accumulation=accumulation)
        student = copy.deepcopy(trained.model)
        inputs, labels = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
        loss, _ = trained.step(inputs, labels)
        logits = student(inputs)
        soft, hard = F.log_softmax(logits / 2, 1), F.log_softmax(teacher(inputs) / 2, 1)
        expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * 4 * (hard.exp() * (hard - soft)).sum(1).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        for name, parameter in student.named_parameters():
            moved = parameter - 0.1 * parameter.grad
            torch.testing.assert_close(trained.model.get_parameter(name), moved, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("fields", [{"teacher_weight": 0.0}, {"teacher_weight": 1.5}, {"teacher_temperature": 0.0}])
    def test_shares_and_temperatures_that_mean_nothing_are_refused(self, fields):
        with pytest.raises(
            ConfigError, match=r"teacher_weight needs to be in \(0, 1\] and teacher_temperature positive"
        ):
            TrainSettings(**fields)


def taught(teacher: nn.Module, **train: object) -> Session:
    """Return a session of plain gradient descent with a teacher."""
    plain = OptimizerSettings(lr=0.1, momentum=0.0, weight_decay=0.0)
    given = settings(optimizer=plain, teacher="elsewhere", **train)
    return Session(small_network(), acdc((10, 0.0)), targets=Targets(), settings=given, seed=0, teacher=teacher)


class TestTeacher:
    def test_it_is_neither_trained_nor_random(self):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
        before = copy.deepcopy(teacher.state_dict())
        inputs, labels = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
        losses = []
        for seed in (1, 2):
            trained = taught(copy.deepcopy(teacher))
            torch.manual_seed(seed)
            losses.append(trained.step(inputs, labels)[0].item())
            assert trained.teacher is not None
            assert not trained.teacher.model.training
            assert all(torch.equal(v, before[name]) for name, v in trained.teacher.model.state_dict().items())
        assert losses[0] == losses[1]

    def test_outputs_of_another_shape_are_refused(self):
        with pytest.raises(ConfigError, match=r"the teacher's outputs have shape \(4, 7\), the network's \(4, 10\)"):
            taught(nn.Sequential(nn.Flatten(), nn.Linear(64, 7))).step(torch.rand(4, 1, 8, 8), torch.randint(10, (4,)))


def run_with_its_own(folder, *, method: str = "acdc", data: Numbers | None = None, ema: float = 0.0) -> Run:
    made = make_method(method, DENSE_THEN_SPARSE if method == "acdc" else None)
    return make_run(folder, made, data=data, teacher_name=OWN, ema_decay=ema, model=lambda: network(dropout=0.2),
                    checkpoint_epochs=100.0)  # fmt: skip


class TestOwn:
    """The run's own dense half."""

    @pytest.mark.parametrize("ema", [0.0, 0.5])
    def test_it_is_the_network_at_the_end_of_the_last_dense_phase_and_teaches_in_sparse_ones(self, ema, tmp_path):
        data = Numbers()
        run = run_with_its_own(tmp_path / "run", data=data, ema=ema)
        seen: dict[int, tuple[bool, torch.Tensor]] = {}
        saved: dict[int, torch.Tensor] = {}

        def look(number: int) -> None:
            session = run._stage.session  # type: ignore[union-attr]
            seen[number] = (session.teacher.teaches, session.teacher.model[0].weight.clone())  # type: ignore[union-attr, index]
            if number in (4, 12):
                saved[number] = run.pair.load("dense", network()).state_dict()["0.weight"]

        data.watch = look
        assert run.execute()
        # a look at batch n sees what step n - 1 had
        assert [number for number, (teaches, _) in seen.items() if teaches] == [5, 6, 7, 8, 13, 14, 15]
        for number in (5, 6, 7, 8, 9, 12):  # it stays what it was until the next dense phase ends
            assert torch.equal(seen[number][1], saved[4])
        for number in (13, 14, 15):
            assert torch.equal(seen[number][1], saved[12])
        assert not torch.equal(saved[4], saved[12])

    def test_nothing_changes_before_the_first_sparse_phase(self, tmp_path):
        run = run_with_its_own(tmp_path / "taught")
        plain = make_run(tmp_path / "plain", make_method("acdc", DENSE_THEN_SPARSE), model=lambda: network(dropout=0.2))
        assert run.execute()
        assert plain.execute()
        first, second = ([json.loads(line) for line in r.folder.metrics.read_text().splitlines()] for r in (run, plain))
        kinds = [line["event"] for line in first]
        dense = kinds.index("phase") + 1
        assert "epoch" in kinds[:dense]
        assert first[:dense] == second[:dense]
        assert first[dense]["train"]["loss"] != second[dense]["train"]["loss"]

    @pytest.mark.parametrize("stop", [4, 6, 10, 12, 13])
    def test_it_survives_a_stop(self, stop, tmp_path):
        whole = run_with_its_own(tmp_path / "whole")
        assert whole.execute()
        data = Numbers()
        stopped = run_with_its_own(tmp_path / "run", data=data)
        data.watch = lambda number: stopped.request_stop() if number == stop - 1 else None
        assert not stopped.execute()
        again = run_with_its_own(tmp_path / "run")
        assert again.execute()
        assert again.folder.metrics.read_bytes() == whole.folder.metrics.read_bytes()
        for name in ("dense", "sparse"):
            file = f"{name}.safetensors"
            assert (again.folder.pair / file).read_bytes() == (whole.folder.pair / file).read_bytes()

    def test_a_dense_half_that_is_trained_on_learns_from_nobody(self, tmp_path):
        method = make_method("acdc", phases([(8, 0.0), (8, 0.75)]))
        halves = []
        for teacher in (OWN, None):
            run = make_run(tmp_path / str(teacher), method, teacher_name=teacher, dense_finetune=True)
            assert run.execute()
            halves.append([(run.folder.pair / f"{name}.safetensors").read_bytes() for name in ("dense", "sparse")])
        assert halves[0][0] == halves[1][0]
        assert halves[0][1] != halves[1][1]

    def test_methods_that_choose_masks_by_gradient_learn_from_it_too(self, tmp_path):
        run = run_with_its_own(tmp_path / "run", method="granet")
        assert run.execute()
        plain = make_run(tmp_path / "plain", make_method("granet"), model=lambda: network(dropout=0.2))
        assert plain.execute()
        assert run.pair.members["sparse"].sha256 != plain.pair.members["sparse"].sha256

    def test_a_run_without_a_dense_phase_is_told_that_nobody_teaches(self, tmp_path):
        with pytest.raises(ConfigError, match=r"--train.teacher own needs a dense phase before a sparse one"):
            make_run(tmp_path / "run", make_method("static"), teacher_name=OWN).execute()


def test_a_student_learns_what_the_teacher_says_rather_than_the_labels(tmp_path):
    torch.manual_seed(5)
    teacher = network()
    with torch.no_grad():
        teacher[3].weight.mul_(8)
    method = make_method("dense", phases([(40 * STEPS, 0.0)]))
    run = make_run(tmp_path / "run", method, teacher=lambda: copy.deepcopy(teacher), teacher_name="elsewhere",
                   teacher_weight=1.0, teacher_temperature=1.0)  # fmt: skip
    assert run.execute()
    student = run.pair.load("dense", network())
    inputs = torch.cat([Numbers().batch(number)[0] for number in range(STEPS)])
    agreed = (student(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean()
    labels = torch.cat([Numbers().batch(number)[1] for number in range(STEPS)])
    assert agreed > 0.9
    assert (student(inputs).argmax(1) == labels).float().mean() < 0.5

"""2:4 weights: what has the pattern, what has not and is named, and what a CPU can do with it."""

import pytest
import torch
from torch import nn

from sparsetwin.errors import ExportError
from sparsetwin.export import check_two_four, to_two_four


def two_four(shape):
    """A weight that keeps the two largest of every four inputs, one tap of one filter at a time."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).movedim(1, -1).contiguous()
    groups = weight.view(-1, 4)
    groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0)
    return weight.movedim(-1, 1)


@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 3, 3), (2, 16, 1, 5), (5, 12, 2)])
def test_two_of_every_four_inputs_at_each_tap_is_the_pattern(shape):
    weight = two_four(shape)
    check_two_four({"w": weight, "other": torch.ones(3, 3)}, names=["w"])
    assert int((weight == 0).sum()) == weight.numel() // 2
    fewer = torch.where(weight > 0, weight, 0.0)
    check_two_four({"w": fewer}, names=["w"])


def test_the_first_weight_that_is_not_2_4_is_named_with_its_first_group():
    good, bad = two_four((4, 8)), two_four((4, 8))
    bad[2, 4:8] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    bad[3, 0:4] = 1.0
    with pytest.raises(ExportError, match="b is not 2:4: output 2 keeps 3 of its inputs 4 to 7, 2 groups in all"):
        check_two_four({"a": good, "b": bad, "c": bad}, names=["a", "b", "c"])
    check_two_four({"a": good, "b": bad}, names=["a"])
    with pytest.raises(ExportError, match=r"no weight 'head.weigth' to check for 2:4; did you mean 'head.weight'"):
        check_two_four({"head.weight": good}, names=["head.weigth"])


def test_groups_run_along_the_inputs_of_a_convolution_and_not_along_its_kernel():
    kernel_wise = torch.zeros(2, 4, 1, 4)
    kernel_wise[..., :2] = 1.0  # two of four neighbours in memory, and all four inputs of a tap
    with pytest.raises(ExportError, match="conv is not 2:4: output 0 keeps 4 of its inputs 0 to 3, 4 groups"):
        check_two_four({"conv": kernel_wise}, names=["conv"])


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3, 3), (4, 6)])
def test_a_weight_without_groups_of_four_inputs_is_named(shape):
    with pytest.raises(ExportError, match=r"stem is not 2:4: its shape .* has no inputs in groups of four"):
        check_two_four({"stem": torch.zeros(shape)}, names=["stem"])


def test_a_cpu_refuses_to_compress_by_name_and_after_the_check():
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(4, 4, 1))
    with pytest.raises(ExportError, match=r"0.weight is not 2:4"):
        to_two_four(model, names=["0.weight"])
    with torch.no_grad():
        model[0].weight.copy_(two_four((4, 8)))
        model[1].weight.copy_(two_four((4, 4, 1, 1)))
    with pytest.raises(ExportError, match=r"0.weight is torch.float32 on cpu; the weights are 2:4, use model.half"):
        to_two_four(model, names=["0.weight", "1.weight"])
    twin = to_two_four(model, names=["1.weight"])  # convolutions keep their zeros
    assert torch.equal(twin[1].weight, model[1].weight)
    assert twin[1].weight is not model[1].weight


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compressed_linears_give_the_dense_outputs_on_a_gpu(dtype):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128))
    with torch.no_grad():
        model[0].weight.copy_(two_four((512, 256)))
        model[2].weight.copy_(two_four((128, 512)))
    model = model.to("cuda", dtype)
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        found = to_two_four(model, names=["0.weight", "2.weight"])(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-2

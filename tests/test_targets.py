"""Targets: which parameters are chosen, in what order and under which names, and what is refused."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import sparsetwin as st
from sparsetwin.errors import SparsityWarning, TargetError
from sparsetwin.models import gpt, mobilenetv1, resnet20, resnet50
from sparsetwin.targets import Targets


class Network(nn.Module):
    """Two stages of convolutions with batch norm, a depthwise one among them, a head, and a table of embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.stage1 = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.BatchNorm2d(16))
        self.time = nn.Conv1d(4, 4, 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.fc = nn.Linear(16, 10)


ALL = ["stem.weight", "stage1.0.weight", "stage1.2.weight", "stage2.0.weight", "time.weight", "fc.weight"]


def names(model=None, **choice):
    return list(Targets(**choice).resolve(Network() if model is None else model))


def test_by_default_every_linear_and_convolution_weight_is_a_target_in_the_models_order():
    assert names() == ALL


class Varied(nn.Module):
    """Weights that compute as linear layers and convolutions do, but are none of their plain ``weight``s."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.fc = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.attention, self.crossed = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))
        self.constrained = parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh())


PASSED_OVER = (
    *("attention.in_proj_weight", "crossed.q_proj_weight", "crossed.k_proj_weight", "crossed.v_proj_weight"),
    *("up.weight", "normed.weight", "constrained.weight"),
)


class TestPassedOver:
    """Weights that are no targets by default although one might think so."""

    def test_they_are_named_in_one_warning_when_a_sparsifier_is_made(self):
        model = Varied()
        method = st.ACDC(schedule=st.schedules.constant(sparsity=0.5, total_steps=4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.warns(SparsityWarning, match=r"attention.in_proj_weight, .* and 2 more stay dense") as warned:
            sparsifier = st.Sparsifier(method, model, optimizer)
        assert [warning.filename for warning in warned] == [__file__]
        assert sparsifier.target_names == ("fc.weight", "attention.out_proj.weight", "crossed.out_proj.weight")
        sparsifier.begin_step()

    def test_all_of_them_are_found_and_no_embedding_norm_or_plain_layer_is(self):
        assert Targets().passed_over(Varied()) == PASSED_OVER
        assert Targets().passed_over(Network()) == ()

    def test_the_older_weight_norm_is_found_too(self):
        with pytest.warns(FutureWarning):
            model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
        assert Targets().passed_over(model) == ("0.weight",)

    def test_what_is_excluded_is_meant_to_stay_dense(self):
        targets = Targets(exclude=("re:.*_proj_weight", "up", "normed.*", "constrained.*"))
        assert targets.passed_over(Varied()) == ()

    def test_what_is_included_was_chosen_by_name(self):
        targets = Targets(include=(nn.Linear, nn.MultiheadAttention, nn.ConvTranspose2d))
        assert targets.passed_over(Varied()) == ()
        assert set(PASSED_OVER[:5]) < set(targets.resolve(Varied()))

    def test_frozen_ones_are_left_out(self):
        assert Targets().passed_over(Varied().requires_grad_(False)) == ()


@pytest.mark.parametrize(
    "make", [resnet20, resnet50, mobilenetv1, lambda: gpt(9, context=4, layers=1, heads=1, width=8)]
)
def test_of_the_networks_here_no_weight_is_passed_over(make):
    with torch.device("meta"):
        assert Targets().passed_over(make()) == ()


@pytest.mark.parametrize(
    ("model", "layers", "size"), [(resnet50, 54, 25_502_912), (mobilenetv1, 28, 4_209_088), (resnet20, 22, 270_896)]
)
def test_the_papers_networks_have_the_published_numbers_of_layers_and_weights(model, layers, size):
    with torch.device("meta"):
        targets = Targets().resolve(model())
    assert (len(targets), sum(weight.numel() for weight in targets.values())) == (layers, size)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("fc.weight", ["fc.weight"]),
        ("fc", ["fc.weight"]),
        ("fc.bias", ["fc.bias"]),
        ("scale", ["scale"]),
        ("stage1.0", ["stage1.0.weight"]),
        ("stage?.0", ["stage1.0.weight", "stage2.0.weight"]),
        ("stage[12].0.weight", ["stage1.0.weight", "stage2.0.weight"]),
        ("stage1.*.weight", ["stage1.0.weight", "stage1.1.weight", "stage1.2.weight"]),
        ("stage2.*", ["stage2.0.weight", "stage2.0.bias", "stage2.1.weight", "stage2.1.bias"]),
        (r"re:stage\d\.0\.weight", ["stage1.0.weight", "stage2.0.weight"]),
        ("re:.*c.*weight", ["fc.weight"]),
        (nn.Linear, ["fc.weight"]),
        (nn.Conv1d, ["time.weight"]),
        (nn.BatchNorm2d, ["stage1.1.weight", "stage2.1.weight"]),
        (nn.Embedding, ["embedding.weight"]),
    ],
)
def test_a_selector_chooses_by_name_module_glob_expression_or_class(selector, expected):
    assert names(include=(selector,)) == expected


def test_an_expression_has_to_match_the_whole_name():
    with pytest.raises(TargetError, match="matches no parameter"):
        names(include=("re:stage",))


def test_included_are_joined_excluded_are_taken_out_and_the_models_order_is_kept():
    assert names(include=("fc", "stage1.2", nn.Conv1d, "fc.weight")) == ["stage1.2.weight", "time.weight", "fc.weight"]
    assert names(exclude=("stem", nn.Linear)) == [
        "stage1.0.weight",
        "stage1.2.weight",
        "stage2.0.weight",
        "time.weight",
    ]
    assert names(include=("stage1.*.weight",), exclude=(nn.BatchNorm2d,)) == ["stage1.0.weight", "stage1.2.weight"]


def test_first_last_and_depthwise_layers_can_stay_dense():
    assert names(dense_first=True) == ALL[1:]
    assert names(dense_last=True) == ALL[:-1]
    assert names(dense_depthwise=True) == [name for name in ALL if name != "stage1.0.weight"]
    assert names(dense_first=True, dense_last=True, dense_depthwise=True) == ALL[2:-1]
    assert names(dense_first=True, exclude=("stem",)) == ALL[2:]  # the first of what is left


def test_mobilenet_without_depthwise_has_the_published_14_layers_less_its_stem():
    with torch.device("meta"):
        model = mobilenetv1()
    assert len(Targets(dense_depthwise=True, dense_first=True).resolve(model)) == 14


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_a_weight_shared_with_an_embedding_is_left_out_unless_it_is_named():
    assert names(Tied()) == ["body.weight"]
    for name in ("head", "head.weight", "embedding", nn.Embedding):
        assert names(Tied(), include=(name,)) == ["embedding.weight"]


def test_a_shared_weight_is_one_target_chosen_or_left_out_by_any_of_its_names():
    model = Tied()
    targets = Targets(include=("again", "body", "head")).resolve(model)
    assert list(targets) == ["embedding.weight", "body.weight"]
    assert targets["body.weight"] is model.again.weight
    assert names(model, include=("body", "head"), exclude=("again.weight",)) == ["embedding.weight"]


def test_targets_are_the_live_parameters():
    model = Network()
    assert all(weight is model.get_parameter(name) for name, weight in Targets().resolve(model).items())


def frozen():
    model = Network()
    model.fc.weight.requires_grad_(False)
    return model


def integers():
    model = Network()
    model.fc.weight = nn.Parameter(torch.ones(10, 16, dtype=torch.int8), requires_grad=False)
    return model


def empty():
    model = Network()
    with torch.no_grad():
        model.fc.weight = nn.Parameter(torch.empty(0, 16))
    return model


def lazy():
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("model", "choice", "message"),
    [
        (frozen, {}, "fc.weight is frozen (requires_grad=False); unfreeze it or exclude it"),
        (integers, {}, "fc.weight has dtype torch.int8; only floating-point weights can be pruned"),
        (empty, {}, "fc.weight has no elements; exclude it"),
        (lazy, {}, "1.weight has no shape yet; run the lazy layer once on an input"),
        (Network, {"include": ("fx",)}, "'fx' matches no parameter of the model; it has scale, embedding."),
        (Network, {"include": ("stage1.0.weigth",)}, "no parameter of the model; did you mean 'stage1.0.weight'?"),
        (Network, {"exclude": ("stage3.*",)}, "'stage3.*' matches no parameter of the model"),
        (Network, {"include": ("re:stage(",)}, "'re:stage(' is not a regular expression"),
        (Network, {"include": (nn.Conv3d,)}, "Conv3d matches no parameter of the model; it has"),
        (Network, {"include": ("",)}, "'' matches no parameter of the model"),
        (Network, {"include": ("fc",), "exclude": ("fc",)}, "no target is left after the exclusions"),
        (Network, {"include": ("fc",), "dense_first": True}, "no target is left after the exclusions"),
        (Network, {"include": ("fc",), "exclude": ("fc",), "dense_first": True}, "no target is left"),
        (Network, {"include": ("fc",), "exclude": ("fc",), "dense_last": True}, "no target is left"),
        (Network, {"include": ("fc",), "dense_first": True, "dense_last": True}, "no target is left"),
        (lambda: nn.LayerNorm(3), {}, "the model has no linear or convolution weight; name its targets with include="),
        (nn.Module, {}, "the model has no linear or convolution weight"),
        (nn.Module, {"include": ("fc",)}, "'fc' matches no parameter of the model; it has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_is_refused_with_what_would_work(model, choice, message):
    with pytest.raises(TargetError, match=re.escape(message)):
        Targets(**choice).resolve(model())


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize("selector", ["fc", nn.Linear])
def test_a_single_selector_without_its_tuple_is_refused(field, selector):
    with pytest.raises(TargetError, match=f"{field} is a tuple of selectors, got .*; write a comma"):
        Targets(**{field: selector})


def test_excluded_parameters_may_be_frozen():
    assert names(frozen(), exclude=("fc",)) == ALL[:-1]


def compiled(model):
    return torch.compile(model, backend="eager")


class Holder(nn.Module):
    """A model whose own child is called ``module``."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        compiled,
        lambda model: compiled(nn.DataParallel(model)),
        lambda model: nn.DataParallel(compiled(model)),
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_wrapped_models_have_the_names_of_the_bare_one(wrap):
    model = Network()
    targets = Targets(exclude=("stage1.*",)).resolve(wrap(model))
    assert list(targets) == ["stem.weight", "stage2.0.weight", "time.weight", "fc.weight"]
    if wrap is not torch.optim.swa_utils.AveragedModel:  # that one averages a copy
        assert targets["fc.weight"] is model.fc.weight
    assert names(wrap(Holder()), include=("module",)) == ["module.weight"]
    assert names(wrap(Holder())) == ["module.weight", "head.weight"]

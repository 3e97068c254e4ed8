"""Forward FLOPs of small modules, worked out by hand, and what counting leaves alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from sparsetwin.errors import ConfigError, SparsityWarning, StateError
from sparsetwin.metrics import LayerFlops, count_forward_flops, nonzero_counts
from sparsetwin.models import gpt, resnet20

BY_HAND = {  # module, input shape without the batch: FLOPs
    "conv": (nn.Conv2d(3, 4, 3, padding=1, bias=False), (3, 8, 8), 2 * 3 * 4 * 9 * 64),
    "conv with bias": (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8), (2 * 3 * 4 * 9 + 4) * 64),
    "conv with stride": (nn.Conv2d(3, 4, 3, stride=2), (3, 9, 7), (2 * 3 * 4 * 9 + 4) * 4 * 3),
    "grouped conv": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5), 2 * 6 * 2 * 9 * 9),
    "depthwise conv": (nn.Conv2d(5, 5, 3, groups=5, bias=False), (5, 3, 3), 2 * 5 * 9),
    "conv of one axis": (nn.Conv1d(2, 3, 2), (2, 5), (2 * 2 * 3 * 2 + 3) * 4),
    "conv of three axes": (nn.Conv3d(1, 2, 2, bias=False), (1, 3, 3, 3), 2 * 2 * 8 * 8),
    "transposed conv": (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 4, 4), 2 * 2 * 3 * 4 * 16 + 3 * 64),
    "linear": (nn.Linear(7, 5), (7,), 2 * 35 + 5),
    "linear without bias": (nn.Linear(7, 5, bias=False), (7,), 70),
    "linear over tokens": (nn.Linear(7, 5), (11, 7), 11 * (2 * 35 + 5)),
    "batch norm": (nn.BatchNorm2d(3), (3, 4, 4), 2 * 48),
    "batch norm without weight": (nn.BatchNorm2d(3, affine=False), (3, 4, 4), 2 * 48),
    "relu": (nn.ReLU(), (3, 4, 4), 48),
    "max pool": (nn.MaxPool2d(3, stride=2, padding=1), (4, 8, 8), 9 * 4 * 4 * 4),
    "max pool with indices": (nn.MaxPool2d(2, return_indices=True), (4, 8, 8), 4 * 4 * 4 * 4),
    "oblong average pool": (nn.AvgPool2d((2, 3)), (4, 4, 9), 6 * 4 * 2 * 3),
    "pool of one axis": (nn.AvgPool1d(2), (4, 6), 2 * 4 * 3),
    "global average pool": (nn.AdaptiveAvgPool2d(1), (4, 7, 7), 49 * 4),
    "adaptive pool that divides": (nn.AdaptiveAvgPool2d(2), (4, 6, 8), 12 * 4 * 4),
    "adaptive pool that overlaps": (nn.AdaptiveAvgPool1d(2), (1, 3), 4),
    "layer norm": (nn.LayerNorm(6), (6,), 0),
    "gelu": (nn.GELU(), (6,), 0),
}


class Twice(nn.Module):
    """One ReLU and one linear layer, each called twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.relu = nn.ReLU()

    def forward(self, x):
        return F.relu(self.relu(self.linear(self.relu(self.linear(x))))) + x


class Noisy(nn.Module):
    """Changes a buffer and draws random numbers in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) + torch.randn(2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", BY_HAND)
def test_flops_are_those_worked_out_by_hand(case, device):
    module, shape, flops = BY_HAND[case]
    assert count_forward_flops(module, torch.zeros(1, *shape, device=device)).total() == flops


def test_only_nonzero_weights_count_and_biases_always():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[3].weight[:, 1:] = 0
    forward = count_forward_flops(model, torch.zeros(1, 1, 4, 4))
    assert forward.total() == (2 * 18 + 2) * 4 + 8 + 2 * 24 + 3
    assert forward.total(nonzero_counts(model)) == (2 * 9 + 2) * 4 + 8 + 2 * 3 + 3


def test_layers_are_listed_by_name_in_calling_order():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    assert count_forward_flops(model, torch.zeros(1, 1, 4, 4)).layers == (
        LayerFlops(name="0", weight="0.weight", weight_size=18, per_nonzero=8, other=8),
        LayerFlops(name="1", weight=None, weight_size=0, per_nonzero=0, other=16),
        LayerFlops(name="2", weight=None, weight_size=0, per_nonzero=0, other=8),
    )


def test_every_call_of_a_module_counts_and_functions_do_not():
    forward = count_forward_flops(Twice(), torch.zeros(1, 4))
    assert forward.total() == 2 * (2 * 16 + 4) + 2 * 4
    assert forward.weight_sizes == {"linear.weight": 16}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_cost_at_every_place_but_are_one_weight(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    forward = count_forward_flops(model, torch.zeros(1, 4, device=device))
    assert forward.weight_sizes == {"0.weight": 16}
    assert forward.total({"0.weight": 3}) == 2 * 2 * 3 + 4 + 4


def test_a_head_tied_to_an_embedding_counts():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    forward = count_forward_flops(model, torch.zeros(1, 5, dtype=torch.int64))
    assert forward.total() == 5 * 2 * 36
    assert forward.uncounted == ()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_a_term_of_its_own(device):
    model = gpt(50, context=16, layers=3, heads=2, width=8)
    forward = count_forward_flops(model, torch.zeros(1, 6, dtype=torch.int64, device=device))
    assert forward.attention == 3 * 2 * (2 * 6 * 6 * 8)  # layers, products, 2 * queries * keys * width
    linear = 6 * (3 * (2 * 12 * 64 + 24 + 8 + 32 + 8) + 2 * 8 * 50)
    assert forward.total() == linear + forward.attention
    assert forward.uncounted == ()  # looking up an embedding costs nothing


def test_attention_of_shared_key_heads_counts_every_query_head():
    class Grouped(nn.Module):
        def forward(self, query):
            keys = query[:, :2]
            return F.scaled_dot_product_attention(query, key=keys, value=keys[..., :3], enable_gqa=True)

    forward = count_forward_flops(Grouped(), torch.zeros(1, 4, 5, 8))
    assert forward.attention == forward.total() == 2 * 4 * 5 * 5 * (8 + 3)


class Crossed(nn.Module):
    """Attends from three tokens to five others."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x[:, :3], x[:, 3:, : self.attention.kdim], value=x[:, 3:, : self.attention.vdim])[0]


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, bias=False, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class TestAttentionModules:
    """``nn.MultiheadAttention`` and what is made of it."""

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize(
        ("model", "shape"),
        [
            (encoder(), (1, 7, 16)),
            (encoder(norm_first=True), (1, 7, 16)),
            (Crossed(bias=False), (1, 8, 8)),
            (Crossed(bias=False, kdim=4, vdim=6), (1, 8, 8)),
            (Crossed(bias=False, add_bias_kv=True, add_zero_attn=True), (1, 8, 8)),
            (nn.TransformerDecoderLayer(16, 2, 32, bias=False, batch_first=True), None),
        ],
        ids=["encoder", "norm first", "other keys", "three weights", "two more keys", "decoder"],
    )
    def test_dense_flops_are_those_that_torch_counts(self, model, shape, training):
        given = {"tgt": torch.rand(1, 3, 16), "memory": torch.rand(1, 5, 16)} if shape is None else torch.rand(shape)
        forward = count_forward_flops(model.train(training), given)
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
                model(**given) if shape is None else model(given)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert forward.total() == counted.get_total_flops()
        assert forward.uncounted == ()

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_each_weight_costs_by_its_nonzeros(self, device):
        model = nn.Sequential(encoder(), nn.Linear(16, 3))
        forward = count_forward_flops(model, torch.zeros(1, 7, 16, device=device))
        none = dict.fromkeys(forward.weight_sizes, 0)
        assert forward.total(none) == forward.attention + 7 * 3 == 2 * 4 * 7 * 7 * 16 + 7 * 3
        first = "0.layers.0.self_attn"
        assert forward.total({**none, f"{first}.in_proj_weight": 5}) - forward.total(none) == 2 * 7 * 5
        assert forward.total({**none, f"{first}.out_proj.weight": 5}) - forward.total(none) == 2 * 7 * 5
        assert [layer.name for layer in forward.layers][:2] == [first, f"{first}.out_proj"]

    def test_biases_cost_at_every_token(self):
        plain, biased = (
            count_forward_flops(Crossed(bias=bias), torch.zeros(1, 8, 8)).total() for bias in (False, True)
        )
        assert biased - plain == (3 + 2 * 5) * 8 + 3 * 8

    def test_a_weight_that_is_computed_counts_as_dense(self):
        model = Crossed()
        expected = count_forward_flops(model, torch.zeros(1, 8, 8)).total()
        parametrize.register_parametrization(model.attention, "in_proj_weight", nn.Tanh())
        forward = count_forward_flops(model, torch.zeros(1, 8, 8))
        assert forward.total() == expected
        assert (set(forward.weight_sizes), forward.uncounted) == ({"attention.out_proj.weight"}, ())


class Various(nn.Module):
    """Weights in what no rule covers, and weights that cost nothing."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc, self.unused = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2), nn.Linear(2, 2)
        self.places, self.scale = nn.Parameter(torch.zeros(1, 3, 4)), nn.Parameter(torch.ones(3, 1))
        self.product, self.transposed = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
        self.masked = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        x = x * self.scale + self.places
        x = self.rnn(x)[0] @ self.product @ self.transposed.T
        return self.fc(F.linear(x, self.masked * torch.ones(4, 4)))


def test_weights_that_no_rule_covers_are_named_in_a_warning():
    with pytest.warns(SparsityWarning, match=r"rnn.weight_hh_l0 is not counted") as warned:
        forward = count_forward_flops(Various(), torch.zeros(1, 3, 4))
    assert forward.uncounted == ("product", "transposed", "masked", "rnn.weight_ih_l0", "rnn.weight_hh_l0")
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_what_a_counted_weight_is_computed_from_is_not_said_to_be_left_out(kind):
    assert count_forward_flops(kind(nn.Linear(4, 4)), torch.zeros(1, 4)).uncounted == ()


def test_a_computed_weight_counts_as_dense():
    model = nn.Linear(3, 2)
    parametrize.register_parametrization(model, "weight", nn.ReLU())
    forward = count_forward_flops(model, torch.zeros(1, 3))
    assert forward.weight_sizes == {}
    assert forward.total() == 14 + 6  # its ReLU module counts too


def test_keyword_arguments_may_be_given():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, *, a, b):
            return self.fc(input=a + b)

    forward = count_forward_flops(Sum(), {"b": torch.zeros(1, 4), "a": torch.zeros(1, 4)})
    assert forward.total() == 18


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_model_and_random_generator_alone(training):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2), Noisy()).train(training)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    count_forward_flops(model, torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad and not p.is_meta for p in model.parameters())


def test_counting_on_meta_moves_only_the_copy():
    model = resnet20()
    expected = count_forward_flops(model, torch.zeros(1, 3, 32, 32))
    assert count_forward_flops(model, torch.zeros(1, 3, 32, 32, device="meta")) == expected
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_compiled_model_counts_as_the_bare_one_under_its_names():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    example = torch.zeros(1, 4)
    assert count_forward_flops(compiled, example) == count_forward_flops(model, example)


@pytest.mark.parametrize("example", [torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(()), {}])
def test_an_example_of_other_than_one_sample_is_refused(example):
    with pytest.raises(ConfigError, match="one sample, an example of shape"):
        count_forward_flops(nn.Linear(4, 2), example)


@pytest.mark.parametrize(
    ("nonzero", "said"), [({}, "not given"), ({"weight": 9}, "non-zeros: 9"), ({"weight": -1}, "non-zeros: -1")]
)
def test_impossible_counts_are_refused_by_name(nonzero, said):
    forward = count_forward_flops(nn.Linear(4, 2), torch.zeros(1, 4))
    with pytest.raises(StateError, match=f"weight has 8 elements; its {'non-zeros: ' * (said == 'not given')}{said}"):
        forward.total(nonzero)


def test_counts_of_several_samples_cost_the_sum_of_what_each_does():
    forward = count_forward_flops(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4))
    each = [{"0.weight": count} for count in (0, 3, 8)]
    assert forward.total({"0.weight": 11}, samples=3) == sum(forward.total(counts) for counts in each)
    assert forward.total(samples=3) == 3 * forward.total()
    with pytest.raises(StateError, match=r"0\.weight has 24 elements; its non-zeros: 25"):
        forward.total({"0.weight": 25}, samples=3)

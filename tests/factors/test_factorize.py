"""``factorize``: what becomes of each layer of a net, and how that is told."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import svdalign as sva
from svdalign.factors import FactoredLayer, SVDConv2d, SVDLinear, factorize


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding="same", bias=False),
        nn.Flatten(),
        nn.Linear(24 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).double()


def rows(model: nn.Module) -> dict:
    return {row.name: row for row in model.factorization}


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
def test_full_rank_keeps_the_function(scheme: str) -> None:
    model = net()
    ranks = {"0": 1.0, "3": 1.0, "5": 1.0, "7": 1.0}
    x = torch.randn(4, 3, 6, 6).double()
    torch.testing.assert_close(factorize(model, ranks, scheme)(x), model(x), rtol=0, atol=1e-10)


def test_leaves_the_original_net_alone() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    factored = factorize(model, 0.25)
    assert not any(isinstance(m, FactoredLayer) for m in model.modules())
    assert not hasattr(model, "factorization")
    with torch.no_grad():
        for parameter in factored.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_replaces_layers_and_reports_each() -> None:
    model = factorize(net(), 0.25)
    assert isinstance(model[0], SVDConv2d)
    assert isinstance(model[3], SVDConv2d)
    assert isinstance(model[5], SVDLinear)
    assert isinstance(model[7], nn.Linear)
    report = rows(model)
    assert list(report) == ["0", "3", "5", "7"]
    assert report["7"].rank is None
    assert report["7"].note == "classifier"
    # Kernel (16, 3, 3, 3) as a (16, 27) matrix at a quarter of full rank 16.
    assert (report["0"].rank, report["0"].full_rank) == (4, 16)
    for name, row in report.items():
        layer = model.get_submodule(name)
        weights = sum(p.numel() for key, p in layer.named_parameters() if key != "bias")
        assert row.parameters == weights
        assert row.dense_parameters == net().get_submodule(name).weight.numel()
        if isinstance(layer, FactoredLayer):
            assert row.rank == layer.rank
            assert row.parameters < row.dense_parameters
    text = str(model.factorization)
    assert "classifier" in text
    assert len(text.splitlines()) == 5


def test_the_classifier_is_factored_where_it_is_asked_for() -> None:
    plain, model = factorize(net(), 0.25), factorize(net(), 0.25, classifier=True)
    assert isinstance(model[7], SVDLinear)
    full = min(net()[7].weight.shape)
    assert rows(model)["7"].rank == math.ceil(0.25 * full)
    assert {k: r.rank for k, r in rows(model).items() if k != "7"} == {
        k: r.rank for k, r in rows(plain).items() if k != "7"
    }
    with pytest.raises(TypeError, match="classifier must be true or false, got '7'"):
        factorize(net(), 0.25, classifier="7")  # type: ignore[arg-type]


@given(fraction=st.floats(1e-6, 1.0))
def test_a_fraction_is_of_full_rank_and_rounded_up(fraction: float) -> None:
    layer = nn.Linear(20, 30)
    model = factorize(nn.Sequential(layer), {"0": fraction})
    assert model[0].rank == max(1, math.ceil(fraction * 20 - 1e-9))


def test_an_int_is_absolute_and_cut_to_full_rank() -> None:
    model = factorize(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4)), {"0": 7, "1": 99})
    assert (model[0].rank, model[1].rank) == (7, 4)
    assert factorize(net(), 2)[5].rank == 2


def test_int_one_and_float_one_are_not_the_same() -> None:
    assert factorize(nn.Sequential(nn.Linear(20, 30)), {"0": 1})[0].rank == 1
    assert factorize(nn.Sequential(nn.Linear(20, 30)), {"0": 1.0})[0].rank == 20


def test_a_mapping_leaves_the_rest_dense_and_overrides_the_classifier_and_break_even() -> None:
    model = factorize(net(), {"7": 1.0, "3": None})
    assert isinstance(model[7], SVDLinear)
    assert not any(isinstance(model[i], FactoredLayer) for i in (0, 3, 5))
    assert rows(model)["3"].note == rows(model)["0"].note == "not asked for"


def test_a_rank_above_break_even_stays_dense() -> None:
    # (32, 32): rank 16 holds 16 * 65 = 1040 numbers, more than 1024; rank 15 holds 975.
    wide = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 64), nn.Linear(64, 2))
    row = rows(factorize(wide, 16))["0"]
    assert row.rank is None
    assert "rank 16" in row.note
    assert "break-even rank 15" in row.note
    assert rows(factorize(wide, 15))["0"].rank == 15


class Scaled(nn.Conv2d):
    """Not what its base computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("rank", [0.5, 0.9, 1.0])
def test_a_fraction_is_capped_at_break_even(rank: float) -> None:
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    model = factorize(net, rank)
    for name in ("0", "2"):  # rank 31 holds 31 * 129 = 3999 numbers of 4096, rank 32 4128
        row = rows(model)[name]
        assert (row.rank, row.note) == (31, "capped at break-even rank 31")
        assert row.parameters == 31 * 129 < row.dense_parameters
    assert "capped at break-even rank 31" in str(model.factorization)


def test_where_no_rank_saves_anything_a_layer_stays_dense() -> None:
    row = rows(factorize(nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 1))))["0"]
    assert (row.rank, row.note) == (None, "rank 1 is above break-even rank 0")


def test_the_report_is_of_the_moment(tmp_path) -> None:
    def learner():
        model = factorize(net(), 0.5)
        x = torch.randn(2, 3, 6, 6).double()
        return sva.Learner(model, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x)

    trained, other = learner(), learner()
    first = rows(trained.model)["5"]
    sva.reduce_rank(trained.model, trained.optimizer, rank=2)
    sva.save(trained, tmp_path / "run.safetensors")
    sva.load(tmp_path / "run.safetensors", into=other)
    for model in (trained.model, other.model, copy.deepcopy(other.model), sva.fuse(other.model)):
        row = rows(model)["5"]
        assert row.rank == 2 < first.rank
        assert row.parameters == 2 * (32 + 24 * 36 + 1) < first.parameters
        line = str(model.factorization).splitlines()[3]
        assert line.split() == ["5", "Linear", "2", "32", f"{row.parameters:,}", "27,648"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("layer", [3, 5])
def test_refuses_weights_that_are_not_finite(value: str, layer: int) -> None:
    broken = net()
    with torch.no_grad():
        broken[layer].weight.view(-1)[1] = float(value)
    with pytest.raises(
        ValueError, match=rf"layer '{layer}'.*must be finite, got 1 NaN or infinite"
    ):
        factorize(broken)


def test_refuses_weights_without_values() -> None:
    with pytest.raises(ValueError, match=r"lazy modules.*'0' \(LazyLinear\).*run it on a batch"):
        factorize(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"layer '0' cannot be factored.*meta device"):
        factorize(nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta")))


def _pruned(net: nn.Sequential) -> None:
    prune.l1_unstructured(net[5], "weight", 0.5)


def _spectral(net: nn.Sequential) -> None:
    torch.nn.utils.spectral_norm(net[5])
    net(torch.randn(2, 3, 6, 6).double())


def _normed(net: nn.Sequential) -> None:
    torch.nn.utils.weight_norm(net[5])


def _cached(net: nn.Sequential) -> None:
    net[5].cache = {"last": [net[5].weight * 2]}


@pytest.mark.parametrize("change", [_pruned, _spectral, _normed, _cached])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
def test_nets_with_computed_tensors_are_copied(change) -> None:
    source = net()
    change(source)
    source.eval()
    model = factorize(source, {"0": 1.0, "7": 1.0})
    for copied in (model, sva.fuse(factorize(source)), sva.compact(model)):
        assert copied is not source
    x = torch.randn(2, 3, 6, 6).double()
    for small in (model, sva.compact(model)):
        torch.testing.assert_close(small(x), source(x), rtol=0, atol=1e-10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert source(x).abs().max() > 0


def test_without_settings_it_fuses(recwarn) -> None:
    fused = sva.fuse(factorize(net()))
    assert not recwarn.list
    assert isinstance(fused[0], sva.factors.FusedConv2d)


@pytest.mark.parametrize(
    ("layer", "note"),
    [
        (nn.Conv2d(16, 16, 3, groups=16), "groups=16"),
        (nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), "computed"),
        (Scaled(16, 16, 3), r"a subclass (Scaled)"),
        (nn.Conv2d(16, 16, 3, dtype=torch.complex64), "complex64"),
        (nn.ConvTranspose2d(16, 16, 3, groups=2), "groups=2"),
    ],
)
def test_layers_that_cannot_be_factored_stay_dense_even_if_named(layer, note) -> None:
    model = factorize(nn.Sequential(layer, nn.Conv2d(16, 16, 3)), {"0": 2, "1": 2})
    assert note in rows(model)["0"].note
    assert not isinstance(model[0], FactoredLayer)
    x = torch.randn(1, 16, 5, 5, dtype=layer.weight.dtype)
    torch.testing.assert_close(model[0](x), layer(x))


def test_a_weight_shared_between_two_modules_stays_shared_and_dense() -> None:
    embedding, head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
    head.weight = embedding.weight
    model = factorize(nn.Sequential(embedding, nn.Linear(16, 16), head), {"1": 4, "2": 4})
    assert model[2].weight is model[0].weight
    assert "shared" in rows(model)["2"].note


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()))


def test_one_layer_under_two_names_stays_one_layer() -> None:
    model = factorize(Twice(), 4)
    assert model.first is model.second
    assert isinstance(model.first, SVDLinear)


def test_a_bare_layer_is_factored_itself() -> None:
    model = factorize(nn.Linear(20, 30), 3)
    assert isinstance(model, SVDLinear)
    assert rows(model)[""].rank == 3


def test_requires_grad_mode_dtype_and_bias_are_carried() -> None:
    source = net().eval()
    source[0].weight.requires_grad_(False)
    source[5].bias.requires_grad_(False)
    model = factorize(source, 0.25)
    assert [model[0].U.requires_grad, model[0].s.requires_grad, model[0].V.requires_grad] == [
        False
    ] * 3
    assert model[0].bias.requires_grad
    assert model[5].U.requires_grad
    assert not model[5].bias.requires_grad
    assert model[3].bias is None
    assert not model[0].training
    assert model[0].U.dtype == torch.float64


def test_hooks_go_over_to_the_factored_layer() -> None:
    source, seen = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 4)), []
    source[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append("before"), with_kwargs=True
    )
    source[0].register_forward_hook(lambda module, args, out: 2 * out)
    source[0].register_forward_hook(
        lambda module, args, kwargs, out: seen.append("after"), with_kwargs=True
    )
    source[0].register_full_backward_hook(lambda module, into, out: seen.append("backward"))
    model = factorize(source, {"0": 1.0})
    assert isinstance(model[0], SVDLinear)
    x = torch.randn(3, 20, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)


ALLOWED = r"a fraction in \(0, 1\].*whole number of at least 1.*mapping"


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, -0.25, float("nan"), {"0": 0}])
def test_refuses_a_rank_out_of_range(rank) -> None:
    with pytest.raises(ValueError, match=f"rank must be {ALLOWED}.*got"):
        factorize(net(), rank)


@pytest.mark.parametrize("rank", ["half", True, [1], {"0": "full"}])
def test_refuses_a_rank_of_another_type(rank) -> None:
    with pytest.raises(TypeError, match=f"rank must be {ALLOWED}.*got"):
        factorize(net(), rank)


def test_refuses_an_unknown_scheme() -> None:
    with pytest.raises(ValueError, match=r"scheme.*'spatial', 'channel'.*'cp'"):
        factorize(net(), 0.25, "cp")


def test_refuses_a_mapping_of_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"rank names \['fc9'\].*there are.*'0', '3'"):
        factorize(net(), {"fc9": 3})


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got dict"):
        factorize({})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.ReLU(), nn.Embedding(3, 4)), "none of .*Conv2d.*Linear"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "groups=4"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "rank 2 is above break-even rank 0"),
    ],
)
def test_refuses_a_net_without_a_layer_to_factor(model, reason) -> None:
    with pytest.raises(ValueError, match=f"no layer that can be factored.*{reason}"):
        factorize(model, 0.9)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_layer_without_weights_stays_dense() -> None:
    """As the tails of ``nn.AdaptiveLogSoftmaxWithLoss`` are in small networks."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 3))
    report = {row.name: row for row in factorize(net).factorization}
    assert [report[name].rank is None for name in "0123"] == [False, True, True, True]
    assert report["1"].note == report["2"].note == "its weight is empty"

"""Compact models compute what the trained ones do, at no greater cost, from plain modules alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from svdalign import compact, export, factorize
from svdalign.factors import SVDConv2d, SVDLinear
from svdalign.lab import data, models
from svdalign.lab.costs import inference_macs

EQUAL = {"rtol": 1e-5, "atol": 1e-5}


def lived_in(model: nn.Module, x: Tensor) -> nn.Module:
    """With weights, statistics and affine parameters of batch norms away from where they start."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            with torch.no_grad():
                module.weight.copy_(1 + 0.5 * torch.randn(module.weight.shape, generator=g))
                module.bias.copy_(0.5 * torch.randn(module.bias.shape, generator=g))
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(x)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 30])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rank: int, bias: bool) -> None:
    layer = SVDLinear.from_dense(nn.Linear(40, 30, bias=bias), rank)
    x = torch.randn(3, 5, 40)
    small = compact(layer)
    torch.testing.assert_close(small(x), layer(x), **EQUAL)
    assert isinstance(small, nn.Sequential if rank == 2 else nn.Linear)


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize("rank", [3, 11])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (0, 2), "bias": False},
        {"stride": 2, "padding": 1},
        {"stride": (1, 3), "dilation": (2, 1)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
    ],
)
def test_convolution(scheme: str, rank: int, options: dict) -> None:
    layer = SVDConv2d.from_dense(nn.Conv2d(8, 12, (3, 5), **options), rank, scheme)
    x = torch.randn(2, 8, 15, 17)
    small = compact(layer)
    torch.testing.assert_close(small(x), layer(x), **EQUAL)


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_cheaper_of_two_forms_is_taken(scheme: str, stride: int) -> None:
    """Against counted multiply-accumulates of both forms, at every rank. No padding and a large
    map, so that borders do not decide."""
    dense = nn.Conv2d(6, 8, 3, stride)
    x = torch.randn(1, 6, 63, 63)
    kinds = set()
    for rank in range(1, 9 if scheme == "channel" else 19):
        layer = SVDConv2d.from_dense(dense, rank, scheme)
        small = compact(layer)
        counted = {
            nn.Sequential: inference_macs(nn.Sequential(layer), x),
            nn.Conv2d: inference_macs(dense, x),
        }
        other = nn.Conv2d if type(small) is nn.Sequential else nn.Sequential
        assert counted[type(small)] <= counted[other] * 1.05
        kinds.add(type(small))
    assert kinds == {nn.Sequential, nn.Conv2d}


def test_a_shared_layer_stays_shared() -> None:
    layer = nn.Linear(20, 20)
    model = factorize(nn.Sequential(layer, nn.ReLU(), layer), {"0": 3})
    small = compact(model)
    x = torch.randn(2, 20)
    torch.testing.assert_close(small(x), model(x), **EQUAL)
    assert small[0] is small[2]


# --- whole networks -----------------------------------------------------------------------------


#: Only deeper than resnet50 and vit_s16.
DEEPER = {"resnet101", "vit_b16", "vit_l16"}


@pytest.mark.parametrize("name", [name for name in models.available() if name not in DEEPER])
@pytest.mark.parametrize("scheme", ["spatial", "channel"])
def test_networks(name: str, scheme: str) -> None:
    images = data.load("embedded", train_limit=64, test_limit=20)
    x = (images.train.images.float() / 255 - images.mean[0]) / images.std[0]
    net = models.build(name, num_classes=10, in_channels=1, image_size=28, width=0.25)
    model = lived_in(factorize(net, 0.3, scheme), x)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    small = compact(model)
    torch.testing.assert_close(small(x), model(x), **EQUAL)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # A norm that reads what a pooling makes is not its convolution's: it stays.
    assert norms(small) == (3 if name == "airbench" else 0)
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())
    leaves = {type(m) for m in small.modules() if not list(m.children())}
    # What is not of torch was written for the network itself: its whitening, its scale.
    assert all(
        kind.__module__.startswith("torch.nn") for kind in leaves - set(map(type, net.modules()))
    )
    assert inference_macs(small, x) <= inference_macs(model, x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("rank", [3, 20])
def test_a_hook_stays_with_its_layer(rank: int) -> None:
    model = factorize(nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)), {"0": rank})
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    x = torch.randn(3, 20)
    torch.testing.assert_close(compact(model)(x), model(x), **EQUAL)


class Encoder(nn.Module):
    """Torch's own encoder, which in evaluation reads the weights of its layers by name."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rank", [0.2, {"encoder.layers.1.linear2": 4}])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torchs_encoder(options: dict[str, bool], padded: bool, rank) -> None:
    model = factorize(Encoder(**options), rank).eval()
    x = torch.randn(3, 5, 32)
    lengths = torch.tensor([5, 2, 4])
    padding = torch.arange(5) >= lengths[:, None] if padded else None
    small = compact(model)
    assert all(type(m).__module__.startswith("torch.nn") for m in small.encoder.modules())
    inside = slice(None) if padding is None else ~padding
    with torch.no_grad():
        torch.testing.assert_close(small(x, padding)[inside], model(x, padding)[inside], **EQUAL)


@pytest.mark.parametrize(("rank", "dense"), [(32, True), (2, False)])
def test_an_encoder_packs_its_input_again_where_all_layers_are_dense_again(rank, dense) -> None:
    model = factorize(Encoder(), {"encoder.layers.1.linear2": rank})
    assert not model.encoder.use_nested_tensor
    assert compact(model).encoder.use_nested_tensor == dense
    assert not compact(factorize(Encoder(norm_first=True), 0.2)).encoder.use_nested_tensor


# --- code that reads a layer instead of calling it ------------------------------------------------


class Reading(nn.Module):
    """Three layers, and a forward that reads the first in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"first": nn.Linear(16, 24)})
        self.first, self.second = self.inner["first"], nn.Linear(24, 20)
        self.last = nn.Linear(20, 16)

    def rest(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(x)))


class Dtype(Reading):
    """As T5 and CLIP: in a forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.first.weight.dtype:
            x = x.to(self.first.weight.dtype)
        return self.rest(self.first(x)) if x.abs().sum() > 0 else x


class Sizes(Reading):
    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        h = this.first(x.reshape(-1, this.first.in_features))
        return this.rest(h) if x.abs().sum() > 0 else h


class Product(Reading):
    """As Mamba: the weight in a product, in a method, in a forward that cannot be traced."""

    def slow(self, x: Tensor) -> Tensor:
        return (self.first.weight @ x.mT).mT + self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.slow(x)) if x.abs().sum() > 0 else x


class Inside(Reading):
    """In a function inside of one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(sum(self.first.weight[:, i] * x[:, i, None] for i in range(16)))


def _untied(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


class Helper(Reading):
    """In a function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(_untied(self.first, x))


class Decoder(Reading):
    """An autoencoder whose weights decode as well."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.first(x)), self.first.weight.t()) + self.rest(self.first(x))


@pytest.mark.parametrize("net", [Dtype, Sizes, Product, Inside, Helper, Decoder])
def test_a_layer_that_code_reads_stays_one_layer(net: type[Reading]) -> None:
    model = factorize(net(), 3, classifier=True)
    assert isinstance(model.first, SVDLinear)
    small, x = compact(model), torch.randn(5, 16)
    torch.testing.assert_close(small(x), model(x), **EQUAL)
    assert type(small.first) is nn.Linear
    assert small.inner["first"] is small.first
    assert (
        type(small.second) is type(small.last) is nn.Sequential
    )  # the others are as small as ever


class Upsampled(nn.Module):
    """A transposed convolution that is told how large its output is to be."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x), output_size=x.shape)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_transposed_convolution_that_is_told_a_size(scheme: str) -> None:
    net = Upsampled().double()
    model = factorize(net, {"up": 1.0}, scheme)
    cut = factorize(net, {"up": 2}, scheme)
    for size in ((7, 8), (8, 7), (10, 10)):
        x = torch.randn(2, 8, *size).double()
        assert model(x).shape == x.shape
        torch.testing.assert_close(model(x), net(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(compact(cut)(x), cut(x), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"output_size must be between \[7, 7\] and \[8, 8\].*got"):
        model.up(torch.randn(2, 8, 4, 4).double(), output_size=(9, 8))


def test_so_is_one_in_a_model_that_cannot_be_traced() -> None:
    class Dependent(Upsampled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    cut = factorize(Dependent().double(), {"up": 2})
    x = torch.randn(2, 8, 8, 7).double()
    torch.testing.assert_close(compact(cut)(x), cut(x), rtol=0, atol=1e-10)


def test_training_mode_of_the_model_is_left() -> None:
    model = factorize(nn.Sequential(nn.Linear(9, 9), nn.Dropout(), nn.Linear(9, 2)), 0.3)
    model.train()
    small = compact(model)
    assert model.training
    x = torch.randn(3, 9)
    torch.testing.assert_close(small(x), small(x))


# --- where a batch norm may be folded, and where not --------------------------------------------


class Net(nn.Module):
    """A factored convolution, a batch norm, and a forward of the test's choice."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def chain(n: Net, x: Tensor) -> Tensor:
    return n.norm(n.conv(x))


def _twice(n: Net, x: Tensor) -> Tensor:
    return n.norm(n.conv(n.norm(n.conv(x))))


def _also_read(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x)
    return n.norm(h) + h


def _norm_elsewhere_too(n: Net, x: Tensor) -> Tensor:
    return n.norm(n.conv(x)) + n.norm(x)


def _between(n: Net, x: Tensor) -> Tensor:
    return n.norm(F.relu(n.conv(x)))


def _weight_read(n: Net, x: Tensor) -> Tensor:
    return n.norm(n.other(x)) + n.other.weight.sum()


def _data_dependent(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x)
    return n.norm(h) if h.sum() > -1e9 else h


@pytest.mark.parametrize(
    ("run", "left"),
    [(chain, 0), (_twice, 1), (_also_read, 1), (_norm_elsewhere_too, 1), (_between, 1),
     (_weight_read, 1), (_data_dependent, 1)],
)  # fmt: skip
def test_a_batch_norm_is_folded_where_it_can_be(
    run: Callable[[Net, Tensor], Tensor], left: int
) -> None:
    x = torch.randn(8, 4, 6, 6)
    model = lived_in(factorize(Net(run), {"conv": 2}), x)
    small = compact(model)
    torch.testing.assert_close(small(x), model(x), **EQUAL)
    assert norms(small) == left


@pytest.mark.parametrize("kind", ["hook", "no statistics", "tied", "aside"])
def test_a_batch_norm_that_is_more_than_it_seems_stays(kind: str) -> None:
    x = torch.randn(8, 4, 6, 6)
    net = Net(chain)
    if kind == "no statistics":
        net.norm = nn.BatchNorm2d(4, track_running_stats=False)
    if kind == "tied":
        net.conv, net.run = nn.Conv2d(4, 4, 1), lambda n, x: n.other(n.norm(n.conv(x)))
        net.other.weight = net.conv.weight
    model = factorize(net, {"other" if kind in ("hook", "aside") else "conv": 2}, "channel") \
        if kind != "tied" else net  # fmt: skip
    model = lived_in(model, x)
    if kind == "hook":
        model.conv.register_forward_hook(lambda module, args, out: 2 * out)
    if kind == "aside":
        model.aside = [model.conv]
        model.run = lambda n, x: n.norm(n.aside[0](x))
    small = compact(model)
    torch.testing.assert_close(small(x), model(x), **EQUAL)
    assert norms(small) == 1


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact network, its files, an input and the trained model's own answer to it."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    net = models.build("smallconv", num_classes=10, in_channels=1, image_size=28, width=0.5)
    images = data.load("embedded", train_limit=100, test_limit=20)
    x = (images.test.images.float() / 255 - images.mean[0]) / images.std[0]
    model = lived_in(factorize(net, 0.4), x)
    small = compact(model)
    for suffix, write in export.FORMATS.items():
        if suffix == "onnx" and not all(map(find_spec, ("onnxruntime", "onnxscript"))):
            continue
        loaded = write(small, x, folder / f"model.{suffix}")
        torch.testing.assert_close(loaded(x), small(x), **EQUAL)
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, folder / "expected.pt")
    return folder


@pytest.mark.parametrize("rank", [3, 20])
def test_a_module_of_two_names_is_written(rank: int, tmp_path: Path) -> None:
    layer = nn.Linear(20, 20)
    small = compact(factorize(nn.Sequential(layer, nn.ReLU(), layer), {"0": rank}))
    x = torch.randn(2, 20)
    loaded = export.write_safetensors(small, x, tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)


class ByLength(nn.Module):
    """Asks for the size of its batch as ``len(x)``, which a trace takes for a fixed number."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.view(len(x), -1))


FILES = [
    "pt2",
    pytest.param(
        "onnx",
        marks=pytest.mark.skipif(not all(map(find_spec, ("onnxruntime", "onnxscript"))), reason=""),
    ),
]


@pytest.mark.parametrize("suffix", FILES)
def test_programs_take_batches_of_any_size(suffix: str, tmp_path: Path) -> None:
    small = compact(factorize(nn.Sequential(nn.Linear(8, 8), ByLength()), {"0": 2}))
    x = torch.randn(5, 8)
    run = export.FORMATS[suffix](small, x[:4], tmp_path / "model")
    for batch in (x[:1], x[:3], x):
        torch.testing.assert_close(run(batch), small(batch), **EQUAL)


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.sum() for row in x])


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Loop, "works only for batches of 4"),
        (Branch, "module '0.1': "),
        (lambda: torch.jit.script(nn.Linear(8, 8)), "module '0.1' was compiled by torch.jit"),
    ],
)
def test_what_cannot_be_a_program_is_refused(
    suffix: str, module: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), module())).eval()
    with pytest.raises(ValueError, match=message):
        export.FORMATS[suffix](model, torch.randn(4, 8), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("example", [torch.randn(1, 8), (torch.randn(4, 8),), None])
def test_an_example_is_a_batch(example: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="example must be a tensor, the model's one input"):
        export.write_pt2(nn.Linear(8, 8), example, tmp_path / "model.pt2")


def test_an_operation_that_onnx_lacks_is_named_with_its_module(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 6))).eval()
    with pytest.raises(ValueError, match=r"module '0.*householder_product"):
        export.write_onnx(model, torch.randn(4, 8), tmp_path / "model.onnx")


CHECK = """
import sys
sys.modules["svdalign"] = None  # importing it fails
import torch
pair = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
{load}
for rows in (slice(0, 1), slice(0, 20), slice(3, 10)):
    torch.testing.assert_close(run(pair["x"][rows]), pair["y"][rows], rtol=1e-5, atol=1e-5)
"""

LOAD = {
    "pt2": 'run = torch.export.load(sys.argv[1] + "/model.pt2").module()',
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
run = lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
""",
}


@pytest.mark.parametrize("suffix", LOAD)
def test_files_run_without_the_library(shipped: Path, suffix: str) -> None:
    if not (shipped / f"model.{suffix}").exists():
        pytest.skip("the extra onnx is not installed")
    code = CHECK.format(load=LOAD[suffix])
    done = subprocess.run(
        [sys.executable, "-c", code, str(shipped)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr

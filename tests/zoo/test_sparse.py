"""Graph networks: their adjacency is a sparse tensor, an input or a buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import svdalign as sva
from svdalign import export, storage

LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]
LABELS = torch.arange(10) % 3


def adjacency(layout: torch.layout) -> Tensor:
    dense = (torch.rand(10, 10) < 0.3).double() + torch.eye(10).double()
    return (dense / dense.sum(1, keepdim=True)).to_sparse(layout=layout)


class GCN(nn.Module):
    """Linear layers, each on the mean of a node's neighbours."""

    def __init__(self, A: Tensor | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("A", A)

    def forward(self, x: Tensor, A: Tensor | None = None) -> Tensor:
        A = self.A if A is None else A
        for layer in (self.a, self.b):
            x = torch.relu(layer(A @ x))
        return self.c(A @ x)


def learner(net: nn.Module, example) -> sva.Learner:
    model = sva.factorize(net.double(), 4)
    return sva.Learner(model, optimizer=lambda p: torch.optim.Adam(p, 0.01), example=example)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
def test_it_learns_as_with_a_dense_one_and_goes_on_from_a_file(layout, tmp_path: Path) -> None:
    A, x = adjacency(layout), torch.randn(10, 6).double()
    net = GCN()
    as_input, as_buffer = GCN(), GCN(A)
    dense = GCN(A.to_dense())
    for other in (as_input, as_buffer, dense):
        other.load_state_dict(net.state_dict(), strict=False)
    learners = {
        "input": (learner(as_input, (x, A)), (x, A)),
        "buffer": (learner(as_buffer, (x,)), (x,)),
        "dense": (learner(dense, (x,)), (x,)),
    }
    losses = {
        name: [float(one.step(batch, LABELS).loss) for _ in range(3)]
        for name, (one, batch) in learners.items()
    }
    assert losses["input"] == pytest.approx(losses["dense"])
    assert losses["buffer"] == pytest.approx(losses["dense"])

    one, batch = learners["buffer"]
    sva.save(one, tmp_path / "run.safetensors")
    state = sva.load(tmp_path / "run.safetensors")
    assert state["model"]["A"].layout == layout
    assert torch.equal(state["model"]["A"].to_dense(), A.to_dense())
    again = learner(GCN(A * 0), batch)
    sva.load(tmp_path / "run.safetensors", into=again)
    assert torch.equal(again.model.A.to_dense(), A.to_dense())
    assert float(again.step(batch, LABELS).loss) == float(one.step(batch, LABELS).loss)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
def test_values_that_are_not_finite_are_refused(layout) -> None:
    A, x = adjacency(layout), torch.randn(10, 6).double()
    one = learner(GCN(), (x, A))
    (A._values() if layout == torch.sparse_coo else A.values())[0] = torch.nan
    with pytest.raises(ValueError, match=r"x must be finite"):
        one.step((x, A), LABELS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
def test_its_compact_model_runs_and_a_file_of_weights_is_refused(layout, tmp_path: Path) -> None:
    x = torch.randn(10, 6).double()
    model = sva.factorize(GCN(adjacency(layout)).double(), 4)
    small = sva.compact(model)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"model has sparse tensors, A, which a safetensors file"):
        export.write_safetensors(small, x, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
def test_a_file_whose_indices_are_out_of_range_is_refused(layout, tmp_path: Path) -> None:
    """They would reach past the tensor's memory."""
    storage.write(tmp_path / "a.safetensors", {"A": adjacency(layout)})
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = file.metadata()
    for name, value in tensors.items():
        if value.dtype == torch.int64:
            tensors[name] = value + 1000
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", header)
    with pytest.raises(ValueError, match="damaged"):
        storage.read(tmp_path / "b.safetensors")


def test_units_are_balanced_though_a_buffer_is_sparse() -> None:
    net, x = GCN(adjacency(torch.sparse_coo)).double(), torch.randn(10, 6).double()
    local = sva.Learner(
        net, units="balanced", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x
    )
    assert len(local.units) == 2

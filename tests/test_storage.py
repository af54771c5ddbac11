"""Checkpoints: what comes back is what went in, and a file that is not a whole one is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import svdalign
from svdalign import Learner, _files, factorize, reduce_rank, rules, storage


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def learner_of(rule: str = "ssa", *, seed: int = 0, optimizer=torch.optim.AdamW) -> Learner:
    torch.manual_seed(seed)
    model = factorize(net(), {"0": 5, "4": 6}).to(memory_format=torch.channels_last)
    return Learner(
        model,
        rule,
        optimizer=lambda p: optimizer(p, 0.01),
        example=torch.randn(4, 3, 8, 8),
        seed=seed,
    )


def train(learner: Learner, steps: range) -> None:
    for i in steps:
        g = torch.Generator().manual_seed(i)
        x = torch.randn(8, 3, 8, 8, generator=g).to(memory_format=torch.channels_last)
        learner.step(x, torch.randint(4, (8,), generator=g))


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# --- nested state -------------------------------------------------------------------------------


def test_nested_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(3)
    state = {
        "numbers": {"int": 3, "float": 0.1, "bool": True, "none": None, "big": 2**70},
        "inf": float("inf"),
        "list": [1, (2, "three", [torch.tensor(1.5)])],
        "by number": {0: {"step": torch.tensor(3.0)}, 1: (0.9, 0.999)},
        "tuple key": {(1, "a"): 2},
        "a": {"b": torch.ones(2)},
        "a.b": torch.zeros(2),
        "$": {"$": "tensor"},
        "empty": {"dict": {}, "list": [], "tensor": torch.empty(0, 3)},
        "dtypes": [
            torch.tensor([True]),
            torch.tensor([7], dtype=torch.uint8),
            torch.ones(2, dtype=torch.bfloat16),
            torch.ones(2, dtype=torch.float64),
        ],
        "shared": [shared, shared, shared[1:]],
        "expanded": torch.ones(1, 3).expand(4, 3),
    }
    storage.write(tmp_path / "x.safetensors", state)
    assert same(storage.read(tmp_path / "x.safetensors"), state)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_comes_back(tmp_path, format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=format)
    y = torch.randn(3, 4).mT
    storage.write(tmp_path / "x", {"x": x, "y": y})
    back = storage.read(tmp_path / "x")
    assert same(back, {"x": x, "y": y})
    assert back["x"].stride() == x.stride()
    assert back["y"].stride() == y.stride()


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"a\.1 is a set"):
        storage.write(tmp_path / "x", {"a": [1, {2}]})
    assert list(tmp_path.iterdir()) == []


# --- a learner ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", rules.available())
@pytest.mark.parametrize("cut", [False, True], ids=["as made", "after a cut"])
def test_resumed_learner_goes_on_bit_for_bit(tmp_path, rule, cut):
    path = tmp_path / "checkpoint.safetensors"
    learner = learner_of(rule)
    train(learner, range(3))
    if cut:
        reduce_rank(learner.model, learner.optimizer, rank={"0": 3, "4": 2})
    train(learner, range(3, 5))
    svdalign.save(learner, path, extra={"epoch": 2})
    train(learner, range(5, 8))
    resumed = learner_of(rule, seed=1)
    assert svdalign.load(path, into=resumed)["extra"] == {"epoch": 2}
    train(resumed, range(5, 8))
    assert same(resumed.state_dict(), learner.state_dict())
    assert same(storage.random_state(), storage.random_state())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
        lambda p, lr: torch.optim.Adam(p, torch.tensor(lr), amsgrad=True),
        lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Rprop,
        torch.optim.Adafactor,
    ],
)
def test_any_optimizer_state_is_kept(tmp_path, optimizer):
    learner = learner_of(optimizer=optimizer)
    train(learner, range(3))
    svdalign.save(learner, tmp_path / "x")
    resumed = learner_of(seed=1, optimizer=optimizer)
    svdalign.load(tmp_path / "x", into=resumed)
    for current in (learner, resumed):
        torch.manual_seed(5)
        train(current, range(3, 5))
    assert same(resumed.state_dict(), learner.state_dict())


def test_state_is_what_load_state_dict_takes(tmp_path):
    learner = learner_of()
    train(learner, range(2))
    svdalign.save(learner, tmp_path / "x")
    other = learner_of(seed=1)
    other.load_state_dict(svdalign.load(tmp_path / "x"))
    assert same(other.state_dict(), learner.state_dict())


def test_ranks_stand_in_the_header(tmp_path):
    learner = learner_of()
    reduce_rank(learner.model, rank={"4": 2})
    svdalign.save(learner, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert json.loads(header["__metadata__"]["ranks"]) == {"0": 5, "4": 2}
    assert header["model.4.U"]["shape"] == [8, 2]


# --- files that are refused ---------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    learner = learner_of()
    train(learner, range(1))
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    content = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        svdalign.load(path, into=learner)
    assert same(dict(learner.model.state_dict()), before)
    assert path.read_bytes() == content


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "x"
    svdalign.save(learner_of(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "truncated")


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    refused(path, "no safetensors file")
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    refused(path, "not written by svdalign")
    save_file({"weight": torch.ones(3)}, path)
    refused(path, "not written by svdalign")
    storage.write(path, {"model": {}})
    refused(path, "holds no learner: feedback")


def test_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "VERSION", _files.VERSION + 1)
    svdalign.save(learner_of(), tmp_path / "x")
    monkeypatch.undo()
    refused(tmp_path / "x", "newer svdalign")


@pytest.mark.parametrize(
    "state",
    ["no json", "[1]", '{"a": {"$": "tensor", "name": "b"}}', '{"a": {"$": "dict"}}',
     '{"a": {"$": "tensor", "name": "t", "order": [0, 0]}}', '{"a": {"$": "unknown"}}'],
)  # fmt: skip
def test_header_that_does_not_fit_is_refused(tmp_path, state):
    save_file({"t": torch.ones(2, 2)}, tmp_path / "x", {"svdalign": "1", "state": state})
    refused(tmp_path / "x", "damaged")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        svdalign.load(tmp_path / "x")


def test_state_of_another_learner_is_refused(tmp_path):
    path = tmp_path / "x"
    svdalign.save(learner_of("dfa"), path)
    refused(path, "only one of them has feedback")
    other = learner_of()
    other.model[8] = nn.Linear(8, 5)
    svdalign.save(other, path)
    refused(path, r"model '8\.(weight|bias)' has shape")
    other = learner_of()
    other.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    svdalign.save(other, path)
    refused(path, "parameter groups")
    other = learner_of(optimizer=lambda p, lr: torch.optim.RMSprop(p, lr))
    svdalign.save(other, path)
    refused(path, "of another kind, with alpha, .* in place of")


def test_what_is_no_learner_is_refused(tmp_path):
    learner, path = learner_of(), tmp_path / "x"
    with pytest.raises(TypeError, match=r"learner must be a svdalign\.Learner, got Sequential"):
        svdalign.save(learner.model, path)
    svdalign.save(learner, path)
    with pytest.raises(TypeError, match=r"into must be .*Learner or a torch\.nn\.Module, got dict"):
        svdalign.load(path, into={})


def test_a_model_is_loaded_without_optimizer_or_example(tmp_path):
    """Also after a cut: its factors take the ranks in the file."""
    learner = learner_of()
    train(learner, range(1))
    reduce_rank(learner.model, learner.optimizer, rank=1)
    svdalign.save(learner, tmp_path / "x")
    expected = learner.model.state_dict()
    loaded, by_torch = learner_of(seed=1).model, learner_of(seed=1).model
    svdalign.load(tmp_path / "x", into=loaded)
    by_torch.load_state_dict(expected)
    assert same(dict(loaded.state_dict()), dict(expected))
    assert same(dict(by_torch.state_dict()), dict(expected))
    with pytest.raises(ValueError, match="does not fit"):
        svdalign.load(tmp_path / "x", into=nn.Linear(3, 3))


def test_the_state_of_other_units_is_refused(tmp_path):
    """Their feedback is for other features, though it may have the same shapes."""

    def with_units(*ends: str) -> Learner:
        return Learner(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), "dfa",
            units=lambda name, module: name in ends,
            optimizer=lambda p: torch.optim.SGD(p, 0.01), example=torch.randn(2, 4),
        )  # fmt: skip

    path = tmp_path / "x"
    svdalign.save(with_units("0"), path)
    with pytest.raises(
        ValueError, match=r"units \['0', 'output'\], this one has \['1', 'output'\]"
    ):
        svdalign.load(path, into=with_units("1"))
    svdalign.load(path, into=with_units("0"))


# --- all or nothing -----------------------------------------------------------------------------


def test_extra_state_that_is_no_tensor_is_refused_when_saving(tmp_path):
    class Extra(nn.Linear):
        def __init__(self, *sizes: int, state: object) -> None:
            super().__init__(*sizes)
            self.state = state

        def get_extra_state(self) -> object:
            return self.state

        def set_extra_state(self, state: object) -> None:
            self.state = state

    def make(state: object) -> Learner:
        model = nn.Sequential(Extra(4, 6, state=state), nn.ReLU(), nn.Linear(6, 3))
        return Learner(
            model, "dfa", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=torch.randn(2, 4)
        )  # fmt: skip

    path = tmp_path / "state.safetensors"
    with pytest.raises(TypeError, match=r"model has extra state '0\._extra_state', a dict"):
        svdalign.save(make({"scale": 1.0}), path)
    assert not path.exists()
    svdalign.save(make(torch.tensor(3.0)), path)
    other = make(torch.tensor(1.0))
    svdalign.load(path, into=other)
    assert other.model[0].state == 3.0


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        _files.replace_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_with_the_files_name(tmp_path):
    def fail(part: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'x'}'"):
        _files.replace_file(tmp_path / "x", fail)


def test_new_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """The order that makes a power cut harmless: sync the file, rename, sync the folder."""
    log = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda d: (log.append(os.readlink(f"/proc/self/fd/{d}")), real_sync(d))[1]
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append("rename"), real_replace(a, b))[1])
    _files.replace_file(tmp_path / "x", lambda part: part.write_text("new"))
    assert log == [str(tmp_path / ".x.part"), "rename", str(tmp_path)]
    assert (tmp_path / "x").read_text() == "new"


def test_file_mode_follows_the_umask(tmp_path):
    storage.write(tmp_path / "x", {"t": torch.ones(1)})
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_no_pickle_is_read(tmp_path):
    path = tmp_path / "x"
    torch.save({"model": {}}, path)
    refused(path, "no safetensors file")

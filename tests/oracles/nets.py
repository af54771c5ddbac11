"""Small networks of every shape the engine must take, with their units declared by hand.

Each :class:`Toy` says where its units end and which parameters belong to each, so that the engine's
own reading of a model is checked, not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdalign.factors import factorize


class RunningMean(nn.Module):
    """Subtracts a mean over the batches so far: a buffer that is replaced, not updated in place."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@dataclass(frozen=True)
class Toy:
    """``exits``: modules that end a unit, in order; the output's own unit follows. ``owners``: the
    prefixes of the parameters that belong to each unit, the output's included."""

    make: Callable[[], nn.Module]
    exits: tuple[str, ...]
    owners: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    classes: int = 3

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().double()

    def batch(self, seed: int = 1, size: int = 4) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, *self.shape, generator=generator).double()
        return x, torch.arange(size) % self.classes

    def units(self, name: str, module: nn.Module) -> bool:
        return name in self.exits

    def parameters(self, model: nn.Module) -> list[list[str]]:
        """Names of the parameters of each unit."""
        return [
            [n for n, _ in model.named_parameters() if n.startswith(tuple(p + "." for p in own))]
            for own in self.owners
        ]


def mlp() -> nn.Module:
    net = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12), nn.ReLU(),
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    return factorize(net, {"2": 4, "4": 5})


def convnet() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(8 * 9, 3),
    )  # fmt: skip
    return factorize(net, {"3": 6, "6": 7})


class Block(nn.Module):
    """Two convolutions and a skip; activations are functions, not modules."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.blocks = nn.Sequential(Block(5), Block(5), Block(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet() -> nn.Module:
    return factorize(ResNet(), {"blocks.1.conv1": 6, "blocks.2.conv2": 4}, "channel")


class LongSkips(nn.Module):
    """Every stage reads every stage before it, over any number of units."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for stage in self.stages:
            seen.append(torch.tanh(stage(sum(seen))))
        return self.head(sum(seen))


class UNet(nn.Module):
    """Down, up, and concatenations across."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.middle = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        self.up2 = nn.Sequential(nn.Conv2d(14, 6, 3, padding=1), nn.ReLU())
        self.up1 = nn.Sequential(nn.Conv2d(10, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = self.middle(b)
        d = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        e = self.up1(torch.cat([F.interpolate(d, scale_factor=2.0), a], 1))
        return self.head(e.mean((2, 3)))


class Pair(nn.Module):
    """A unit with two outputs, both read further on; the first is what it is taught at."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(into, out), nn.Linear(into, out)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tanh(self.main(x)), {"side": torch.sigmoid(self.side(x))}


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Pair(6, 7), Pair(7, 8), Pair(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, side_a = self.one(x)
        b, side_b = self.two(a * side_a["side"])
        c, side_c = self.three(b + side_b["side"])
        return self.head(c * side_c["side"])


class Tokens(nn.Module):
    """Embeddings, norms and a free parameter in front of the first exit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.position = nn.Parameter(torch.randn(5, 6))
        self.norm0 = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 7)
        self.norm1 = nn.LayerNorm(7)
        self.fc2 = nn.Linear(7, 6)
        self.norm2 = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm0(self.embed(x) + self.position)
        h = self.norm1(F.gelu(self.fc1(h)))
        h = self.norm2(F.gelu(self.fc2(h)))
        return self.head(h.mean(1))


TOYS = {
    "mlp": Toy(
        mlp, ("1", "3", "5", "7"), (("0",), ("2",), ("4",), ("6",), ("8",)), (6,)
    ),
    "convnet": Toy(
        convnet, ("2", "5", "8"), (("0", "1"), ("3",), ("6", "7"), ("10",)), (2, 6, 6)
    ),
    "resnet": Toy(
        resnet,
        ("stem", "blocks.0", "blocks.1", "blocks.2"),
        (("stem",), ("blocks.0",), ("blocks.1",), ("blocks.2",), ("head",)),
        (2, 5, 5),
    ),
    # Units end inside the blocks; the sums and activations after them are functions between units.
    "resnet, layers": Toy(
        resnet,
        ("stem", *(f"blocks.{i}.norm{j}" for i in range(3) for j in (1, 2))),
        (
            ("stem",),
            *((f"blocks.{i}.conv{j}", f"blocks.{i}.norm{j}") for i in range(3) for j in (1, 2)),
            ("head",),
        ),
        (2, 5, 5),
    ),
    "long skips": Toy(
        LongSkips,
        tuple(f"stages.{i}" for i in range(5)),
        (*((f"stages.{i}",) for i in range(5)), ("head",)),
        (6,),
    ),
    "unet": Toy(
        UNet,
        ("down1", "down2", "middle", "up2", "up1"),
        (("down1",), ("down2",), ("middle",), ("up2",), ("up1",), ("head",)),
        (2, 8, 8),
    ),
    "pairs": Toy(
        Pairs, ("one", "two", "three"), (("one",), ("two",), ("three",), ("head",)), (6,)
    ),
}  # fmt: skip

"""BioTorch's DFA and uSF as networks for ``svdalign compare``, beside our methods.

    python -m venv build/peers
    build/peers/bin/pip install -c constraints.txt -e '.[lab]'
    build/peers/bin/pip install --no-deps biotorch==0.0.16
    build/peers/bin/svdalign tune --config benchmarks/configs/peers_search.yaml --data-dir DATA
    build/peers/bin/svdalign compare --config benchmarks/configs/peers.yaml --data-dir DATA

biotorch 0.0.16 asks for torchvision, Jupyter and torchattacks, hence an environment of its own and
``--no-deps``. Its layers need torch alone and run unchanged; its models, data sets and loop are not
used. Layers with a backward pass of their own are a network like any other, which the rule ``bp``
trains. Its DFA relies on non-full backward hooks, which torch calls deprecated, so before anything
is trained its gradients are checked against DFA by hand, and those of uSF against our
sign-symmetric rule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from biotorch.module.biomodule import BioModule
from torch import Tensor, nn

from svdalign.engine import Learner
from svdalign.lab import models
from svdalign.lab.data import ImageData
from svdalign.lab.training import RunConfig, Trainer, build_learner, build_model
from svdalign.lab.training.build import example_batch

warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)


def usf(num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """SmallConv with the weights that ours start from, and the backward pass of uSF."""
    return _converted("usf", num_classes, in_channels, image_size)


def dfa(num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """The same for DFA: its layers are told the output's error when the backward pass begins."""
    net = _converted("dfa", num_classes, in_channels, image_size)

    def listen(net: nn.Module, inputs: object, z: Tensor) -> None:
        def tell(error: Tensor) -> None:
            for layer in net.modules():
                layer.loss_gradient = error  # type: ignore[assignment]

        if z.requires_grad:
            z.register_hook(tell)

    net.register_forward_hook(listen)
    return net


def _converted(mode: str, num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    net = models.build(
        "smallconv", num_classes=num_classes, in_channels=in_channels, image_size=image_size
    )
    with contextlib.redirect_stdout(io.StringIO()):
        converted: nn.Sequential = BioModule(net, mode=mode, output_dim=num_classes).module
    return converted


def measured(config: RunConfig, data: ImageData) -> Trainer:
    """A trainer that notes, after each epoch, the degrees between each layer's gradient and BP's at
    the same weights, and the version of biotorch. A network of biotorch is checked first."""
    learner = build_learner(config, data)
    x, y = example_batch(config, data, 128), data.train.labels[:128]
    ours = dataclasses.replace(config, model="smallconv", rule="bp-dense", options={})
    if config.model != "smallconv":
        off = max(degrees(learner.gradients(x, y), _expected(config, data, learner, x, y)))
        if off > 0.1:
            raise RuntimeError(f"gradients of {config.model} are {off} degrees off")

    def measure(learner: Learner) -> dict[str, Any]:
        net, state = build_model(ours, data), learner.model.state_dict()
        net.load_state_dict({name: state[name] for name in net.state_dict()})
        F.cross_entropy(net(x), y).backward()
        exact = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        angles = degrees(learner.gradients(x, y), exact)
        return {"angles": angles, "biotorch": metadata.version("biotorch")}

    return Trainer(config, data, learner, measure=measure)


def degrees(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[float]:
    """Angle between two gradients of each convolution and of the classifier, 0 to rounding."""
    angles = []
    for name, other in reference.items():
        if other.dim() > 1:
            a, b = found[name].double().flatten(), other.double().flatten()
            across = (a / a.norm() - b / b.norm()).norm() / 2
            angles.append(torch.rad2deg(2 * torch.asin(across.clamp(max=1))).item())
    return angles


def _expected(
    config: RunConfig, data: ImageData, learner: Learner, x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """What the gradients of a network of biotorch have to be. For uSF they are those of our
    sign-symmetric rule, which scales the signs of a layer differently; that turns no gradient."""
    if config.model.endswith(":dfa"):
        return _dfa_by_hand(learner.model, x, y)
    ours = dataclasses.replace(config, model="smallconv", rule="sign-symmetric-dense", trainer=None)
    return build_learner(ours, data).gradients(x, y)


def _dfa_by_hand(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """DFA as biotorch defines it, without its hooks: the output's error, the same at every
    position, goes through the feedback of the layer above and from there to the layer."""
    assert isinstance(net, nn.Sequential)
    z = net(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    starts = [i for i, layer in enumerate(net) if isinstance(layer, nn.Conv2d | nn.Linear)]
    found: dict[str, Tensor] = {}
    for start, end in itertools.pairwise(starts):
        x = net[start:end](x.detach())  # no gradient of the input, so the hook stays away
        above = net[end]
        if isinstance(above, nn.Conv2d):
            spread = error[:, :, None, None].expand(-1, -1, *x.shape[2:])
            delta = F.conv_transpose2d(spread, above.weight_backward, padding=above.padding)
        else:
            delta = error @ above.weight_backward
        here = {
            f"{i}.{name}": p
            for i in range(start, end)
            for name, p in net[i].named_parameters()
            if p.requires_grad
        }
        found |= zip(here, torch.autograd.grad(x, list(here.values()), delta), strict=True)
    return found

"""Architectures as their users write them: plain ``torch.nn``, nothing of this project in them.

Tiny widths; images are (B, C, 16, 16) unless said otherwise. Each builder is named in :data:`NETS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def conv_bn(
    fan_in: int, fan_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(fan_out)]


# --- residual networks ----------------------------------------------------------------------------


class Basic(nn.Module):
    """Basic block with functional activations, the second one after the addition."""

    expansion = 1

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(fan_in, width, 3, stride)
        self.conv2, self.bn2 = conv_bn(width, width, 3)
        self.downsample = _downsample(fan_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + skip)


class Bottleneck(nn.Module):
    """Bottleneck with one in-place ReLU module called three times, and in-place addition."""

    expansion = 4

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(fan_in, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride)
        self.conv3, self.bn3 = conv_bn(width, 4 * width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(fan_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += skip
        return self.relu(out)


def _downsample(fan_in: int, fan_out: int, stride: int) -> nn.Module | None:
    if stride == 1 and fan_in == fan_out:
        return None
    return nn.Sequential(*conv_bn(fan_in, fan_out, 1, stride))


class ResNet(nn.Module):
    """``imagenet``: a 7 x 7 stem and max pooling, layers named as torchvision does."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        depths: tuple[int, ...],
        width: int,
        imagenet: bool,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            1, width, 7 if imagenet else 3, 2 if imagenet else 1, 3 if imagenet else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        fan_in = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(fan_in, width << i, 2 if i and not j else 1))
                fan_in = (width << i) * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.depth = len(depths)
        self.fc = nn.Linear(fan_in, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.depth):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


# --- sequential and depthwise-separable -----------------------------------------------------------


class VGG(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = 1
        for entry in (width, "M", 2 * width, 2 * width, "M", 4 * width, "M"):
            if entry == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(fan_in, int(entry), 3, padding=1), nn.ReLU(inplace=True)]
                fan_in = int(entry)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(fan_in * 4, 8 * width),
            nn.ReLU(True),
            nn.Dropout(0.2),
            nn.Linear(8 * width, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class MobileNetV1(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

        def separable(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                *conv_bn(fan_in, fan_in, 3, stride, groups=fan_in), nn.ReLU(inplace=True),
                *conv_bn(fan_in, fan_out, 1), nn.ReLU(inplace=True),
            )  # fmt: skip

        self.model = nn.Sequential(
            *conv_bn(1, width, 3, 1), nn.ReLU(inplace=True),
            separable(width, 2 * width, 2), separable(2 * width, 2 * width, 1),
            separable(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model(x).view(len(x), -1))


class InvertedResidual(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = fan_in * expand
        self.use_skip = stride == 1 and fan_in == fan_out
        self.conv = nn.Sequential(
            *conv_bn(fan_in, hidden, 1), nn.ReLU6(inplace=True),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True),
            *conv_bn(hidden, fan_out, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_skip else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*conv_bn(1, width, 3, 1), nn.ReLU6(inplace=True)),
            InvertedResidual(width, 2 * width, 2, 3),
            InvertedResidual(2 * width, 2 * width, 1, 3),
            InvertedResidual(2 * width, 3 * width, 2, 3),
            nn.Sequential(*conv_bn(3 * width, 8 * width, 1), nn.ReLU6(inplace=True)),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(8 * width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


# --- ConvNeXt -------------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then a channels-last MLP, a learned scale, and stochastic depth."""

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        h = (self.gamma * self.pwconv2(self.act(self.pwconv1(h)))).permute(0, 3, 1, 2)
        if self.training and self.drop_path > 0:
            keep = 1 - self.drop_path
            h = h * torch.empty(len(x), 1, 1, 1, device=x.device).bernoulli_(keep) / keep
        return x + h


class ConvNeXt(nn.Module):
    def __init__(self, width: int, drop_path: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 2, stride=2), LayerNorm2d(width))
        self.stage1 = nn.Sequential(*(ConvNeXtBlock(width, drop_path) for _ in range(2)))
        self.down = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, 2 * width, 2, stride=2))
        self.stage2 = nn.Sequential(*(ConvNeXtBlock(2 * width, drop_path) for _ in range(2)))
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


# --- transformers ---------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(x.transpose(1, 2).reshape(B, T, d))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each with its skip."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of 4 x 4, a class token, learned positions."""

    def __init__(self, width: int, depth: int, size: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // 4) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class TorchEncoder(nn.Module):
    """Torch's own encoder layers, post-norm, sequence first: attention keeps its packed weight."""

    def __init__(self, width: int, depth: int, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.patch_embed = nn.Conv2d(1, width, 4, stride=4)
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2)
        x = self.encoder(x.mT if self.batch_first else x.permute(2, 0, 1))
        return self.head(x.mean(1 if self.batch_first else 0))


class GPT(nn.Module):
    """A decoder: tokens (B, T) to logits (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, width: int, depth: int, context: int, tied: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        nn.init.normal_(self.wte.weight, std=0.1)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList(TransformerBlock(width, 2, causal=True) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


# --- branching ------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two levels, skips by concatenation: images (B, 1, h, w) to logits (B, classes, h, w)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()

        def double(fan_in: int, fan_out: int) -> nn.Sequential:
            return nn.Sequential(
                *conv_bn(fan_in, fan_out, 3), nn.ReLU(inplace=True),
                *conv_bn(fan_out, fan_out, 3), nn.ReLU(inplace=True),
            )  # fmt: skip

        self.down1, self.down2 = double(1, width), double(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.middle = double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.conv2 = double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.conv1 = double(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        h = self.middle(self.pool(b))
        h = self.conv2(torch.cat([self.up2(h), b], 1))
        h = self.conv1(torch.cat([self.up1(h), a], 1))
        return self.head(h)


NETS: dict[str, Callable[[], nn.Module]] = {
    "cifar-resnet": lambda: ResNet(Basic, (1, 1, 1), 8, imagenet=False),
    "cifar-resnet-bottleneck": lambda: ResNet(Bottleneck, (1, 1), 4, imagenet=False),
    "imagenet-resnet": lambda: ResNet(Basic, (2, 1), 8, imagenet=True),
    "imagenet-resnet-bottleneck": lambda: ResNet(Bottleneck, (1, 2), 4, imagenet=True),
    "vgg": lambda: VGG(8),
    "mobilenet-v1": lambda: MobileNetV1(8),
    "mobilenet-v2": lambda: MobileNetV2(6),
    "convnext": lambda: ConvNeXt(12),
    "vit": lambda: ViT(16, 2),
    "torch-encoder": lambda: TorchEncoder(16, 2, batch_first=True),
    "torch-encoder-sequence-first": lambda: TorchEncoder(16, 2, batch_first=False),
}  #: image classifiers, (B, 1, 16, 16) to (B, 10)

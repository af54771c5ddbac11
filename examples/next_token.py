"""Language: a small decoder learns the Zen of Python by heart, letter by letter.

    python examples/next_token.py

Logits are (B, T, vocabulary), so each token has its own error: the loss flattens them. Units are
the decoder's blocks; each reads its own guess of the next letter off its own tokens.
"""

from __future__ import annotations

import codecs
import io
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva


class Block(nn.Module):
    """Causal attention and an MLP, each after a norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(B, T, d))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def zen() -> str:
    """The Zen of Python by Tim Peters, which is in the public domain and in every Python."""
    with redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def main(steps: int = 300, width: int = 64, depth: int = 3, context: int = 32) -> list[float]:
    """Cross-entropy of the next letter, in nats, at every step."""
    torch.manual_seed(0)
    text = zen()
    letters = sorted(set(text))
    code = torch.tensor([letters.index(letter) for letter in text])
    windows = code.unfold(0, context + 1, 1)
    model = sva.factorize(Decoder(len(letters), width, depth, context), rank=0.5)
    learner = sva.Learner(
        model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 3e-3),
        example=windows[:2, :-1],
        loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    )
    losses = []
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (32,))]
        report = learner.step(batch[:, :-1], batch[:, 1:])
        losses.append(report.loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {losses[-1]:.2f} nats, {report.accuracy:.0%} of letters right")
    return losses


if __name__ == "__main__":
    main()

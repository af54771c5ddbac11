from __future__ import annotations

import pytest
import torch

from svdalign.lab.data import ImageData, Split


def _split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 60, (n, 1, 8, 8), generator=generator)
    # The class is where the bright stripe lies.
    stripe = (torch.arange(8)[None, :] // 3 == labels[:, None]).long()
    return Split((noise + 180 * stripe[:, None, None, :]).to(torch.uint8), labels)


@pytest.fixture(scope="session")
def stripes() -> ImageData:
    """Three classes that any working rule learns in a few steps, 8 x 8 pixels."""
    return ImageData("stripes", _split(70, 0), _split(30, 1), ("a", "b", "c"), (0.4,), (0.3,))

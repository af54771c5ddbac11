"""Make the images that ship inside the package from the Parquet files of Fashion-MNIST.

    python scripts/make_embedded.py DIRECTORY_WITH_THE_PARQUET_FILES

Takes the same number of images of each class, at random with a fixed seed, and writes them class
by class, 100 a row, as one lossless grey sheet a split: the position on the sheet is the label.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES, SIDE, COLUMNS = 10, 28, 100
PER_CLASS = {"train": 1000, "test": 200}
TARGET = Path(__file__).parents[1] / "src" / "svdalign" / "data" / "embedded"


def sheet(table: pa.Table, per_class: int, rng: np.random.Generator) -> Image.Image:
    labels = table.column("label").to_numpy()
    chosen = np.concatenate(
        [
            np.sort(rng.choice(np.flatnonzero(labels == label), per_class, replace=False))
            for label in range(CLASSES)
        ]
    )
    blobs = [row["bytes"] for row in table.column("image").take(chosen).to_pylist()]
    tiles = np.stack([np.asarray(Image.open(io.BytesIO(blob)).convert("L")) for blob in blobs])
    rows = len(tiles) // COLUMNS
    grid = tiles.reshape(rows, COLUMNS, SIDE, SIDE).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * SIDE, COLUMNS * SIDE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with train*.parquet and test*.parquet")
    source = parser.parse_args().source
    rng = np.random.default_rng(0)
    for split, per_class in PER_CLASS.items():
        table = pa.concat_tables(map(pq.read_table, sorted(source.glob(f"{split}*.parquet"))))
        path = TARGET / f"{split}.png"
        sheet(table, per_class, rng).save(path, optimize=True)
        print(f"{path.name}: {CLASSES} x {per_class} images, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

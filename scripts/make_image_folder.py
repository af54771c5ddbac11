"""Make a folder of images in ImageNet's layout from the Parquet files of CIFAR-100: its twenty
superclasses, as PNG files of 32 x 32 pixels.

    python scripts/make_image_folder.py DIRECTORY_WITH_THE_PARQUET_FILES FOLDER

Takes the same number of images of each superclass, at random with a fixed seed. A stand-in where
there is no such folder at hand: what reads, resizes and trains on one is put to use by it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = 20
PER_CLASS = {"train": 250, "test": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="folder with train*.parquet and test*.parquet")
    parser.add_argument("target", type=Path, help="folder to make")
    options = parser.parse_args()
    options.target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, per_class in PER_CLASS.items():
        files = sorted(options.source.glob(f"{split}*.parquet"))
        table = pa.concat_tables(map(pq.read_table, files))
        labels = table.column("coarse_label").to_numpy()
        for label in range(CLASSES):
            folder = options.target / split / f"{label:02}"
            folder.mkdir(parents=True)
            for index in rng.choice(np.flatnonzero(labels == label), per_class, replace=False):
                image = Image.open(io.BytesIO(table.column("img")[int(index)].as_py()["bytes"]))
                image.save(folder / f"{index:05}.png")


if __name__ == "__main__":
    main()

"""Costs of streaming images: resident memory by the number of images, and images a second.

    python benchmarks/streaming.py [--kinds folder] [--out benchmarks/results/streaming.json]
    python benchmarks/streaming.py --train      # adds a row to the file

Makes JPEG files as an image folder, Parquet files and tar files. For each of these and each of
:data:`JOBS`, a fresh process runs one epoch of random windows in batches of 64. It records its own
peak resident memory and that of its largest worker process, as Linux reports them; memory that they
share counts for both. Speed is per second of wall clock, and per second of the processors' time,
which other load on the machine leaves alone. The last job's files are of 500 x 375 pixels, as
ImageNet's are on average.

``--train``: one worker process feeds a ResNet-18 that SSA trains at 224 pixels: images a second of
processor time of either, and the share of the wall clock that training waits for images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from svdalign.lab import data
from svdalign.lab.training import RunConfig, Trainer, build_learner, load_data
from svdalign.lab.training.build import prepare_machine
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import read_json, write_json

CLASSES, SHARD, TEST = 10, 500, 100  # SHARD: images a file
BATCH = 64

# Number of images, their width in pixels, and the size of the windows.
JOBS = [(1000, 160, 64), (5000, 160, 64), (20000, 160, 64), (1000, 500, 224)]


def jpeg(number: int, width: int) -> bytes:
    """Smooth shapes and some noise, as large a file as a photograph of that size."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, width * 3 // 4), Image.Resampling.BICUBIC)).astype(
        int
    )
    pixels += draw.normal(0, 14, pixels.shape).astype(int)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write(kind: str, folder: Path, blobs: list[bytes], count: int) -> None:
    """``count`` files that take turns with the contents of ``blobs``, and :data:`TEST` more."""
    for split, total in (("train", count), ("val", TEST)):
        for start in range(0, total, SHARD):
            numbers = range(start, min(start + SHARD, total))
            if kind == "folder":
                for i in numbers:
                    place = folder / split / f"n{i % CLASSES:08d}"
                    place.mkdir(parents=True, exist_ok=True)
                    (place / f"{i:07d}.JPEG").write_bytes(blobs[i % len(blobs)])
            elif kind == "parquet":
                table = {
                    "image": pyarrow.array(
                        [{"bytes": blobs[i % len(blobs)], "path": None} for i in numbers],
                        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
                    ),
                    "label": pyarrow.array([i % CLASSES for i in numbers]),
                }
                file = folder / f"{split}-{start // SHARD:05d}.parquet"
                pyarrow.parquet.write_table(pyarrow.table(table), file, row_group_size=100)
            else:
                with tarfile.open(folder / f"{split}-{start // SHARD:05d}.tar", "w") as tar:
                    for i in numbers:
                        label = str(i % CLASSES).encode()
                        for suffix, content in (("jpg", blobs[i % len(blobs)]), ("cls", label)):
                            member = tarfile.TarInfo(f"{i:07d}.{suffix}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))


def peak(process: int | str) -> int:
    """Peak resident memory of a process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(kind: str, folder: str, size: int, workers: int) -> dict[str, Any]:
    """One epoch, in this process."""
    started = time.perf_counter()
    images = data.load(kind, data_dir=folder, image_size=size, stream=True, workers=workers)
    opened = time.perf_counter() - started
    started, busy = time.perf_counter(), cpu_seconds()
    epoch = data.batches(
        images.train,
        BATCH,
        mean=images.mean,
        std=images.std,
        shuffle=True,
        augment=data.Augment(crop=1, flip=True),
    )
    seen, children = 0, 0
    for number, (x, _) in enumerate(epoch):
        seen += len(x)
        if number % 10 == 0:
            for child in multiprocessing.active_children():
                with contextlib.suppress(OSError, StopIteration):  # it has just ended
                    children = max(children, peak(child.pid or 0))
    return {
        "open_seconds": opened,
        "images": seen,
        "peak_bytes": peak("self"),
        "peak_bytes_of_a_worker": children,
        "arrow_peak_bytes": pyarrow.default_memory_pool().max_memory(),  # this process's
        "images_per_second": seen / (time.perf_counter() - started),
        "images_per_cpu_second": seen / (cpu_seconds() - busy),
    }


def train(folder: str, steps: int = 6) -> dict[str, Any]:
    """ResNet-18 on a stream, in this process and one worker."""
    options = {"data": "folder", "data_dir": folder, "stream": True, "workers": 1, "threads": 1}
    config = RunConfig(
        **options, image_size=224, model="resnet18", rank=0.25, rule="ssa", batch_size=32,
        augment=["crop", "flip"],
    )  # fmt: skip
    prepare_machine(config)
    images = load_data(config)
    trainer = Trainer(config, images, build_learner(config, images))
    waited, busy = 0.0, 0.0
    epoch = trainer.batches()
    trainer.step(*next(epoch))
    started = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        x, y = next(epoch)
        waited += time.perf_counter() - asked
        before = time.process_time()
        trainer.step(x, y)
        busy += time.process_time() - before
    return {
        "model": config.model,
        "training_images_per_cpu_second": steps * config.batch_size / busy,
        "waited_share": waited / (time.perf_counter() - started),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=["folder", "parquet", "webdataset"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument("--train", action="store_true", help="see above")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, folder, size = options.measure
        print(json.dumps(measure(kind, folder, int(size), options.workers)))
        return 0
    if options.train:
        with tempfile.TemporaryDirectory() as folder:
            write("folder", Path(folder), [jpeg(number, 500) for number in range(100)], 400)
            found = train(folder)
        print(found)
        write_json(options.out, (read_json(options.out) or {}) | {"training": found})
        return 0
    known = read_json(options.out) or {}
    rows = [row for row in known.get("rows", []) if row["kind"] not in options.kinds]
    for kind, (count, width, size) in itertools.product(options.kinds, JOBS):
        blobs = [jpeg(number, width) for number in range(100)]
        with tempfile.TemporaryDirectory() as folder:
            write(kind, Path(folder), blobs, count)
            program = [sys.executable, __file__, "--workers", str(options.workers)]
            done = subprocess.run(
                [*program, "--measure", kind, folder, str(size)],
                # What is freed goes back to the system at once: the peak is one of what is in use.
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
                capture_output=True,
                text=True,
                check=True,
            )
        job = {"kind": kind, "files": count, "width": width, "size": size}
        job["mean_file_bytes"] = round(sum(map(len, blobs)) / len(blobs))
        rows.append(job | json.loads(done.stdout))
        print(rows[-1], flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        setting = {"batch": BATCH, "workers": options.workers}
        write_json(options.out, {**known, **setting, "rows": rows, **provenance("cpu")})
    return 0


if __name__ == "__main__":
    sys.exit(main())

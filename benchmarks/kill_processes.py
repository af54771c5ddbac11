"""Kill one of two processes that train a run, again and again, and compare the run's end, bit for
bit, with that of the same run left in peace.

    python benchmarks/kill_processes.py --parallel layers --way restarted   # and data, and anew

``restarted``: one ``torchrun --max-restarts`` gets over all kills. ``anew``: each kill has to end
the job, and the same command goes on; the last process hangs (SIGSTOP) instead of being killed. The
checkpoint has to be whole each time. Kills take turns between the processes, at a random
moment of the second after the first checkpoint of a round. A checkpoint is written as often as
processes can agree on it. Each call adds to the JSON file; exit code 1 if the two ends differ.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_resume import differences

from svdalign import storage
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import Record, read_json, write_json

PATIENCE = 30  #: seconds that a process waits for another


def command(epochs: int) -> list[str]:
    """A perceptron on a few images, with ranks that fall every epoch."""
    options = {
        "model": "mlp", "width": 0.1, "epochs": epochs, "batch-size": 12, "units": "layer",
        "train-limit": 120, "test-limit": 24, "horizon": 0, "checkpoint-seconds": 0,
        "rank-energy": 0.98, "rank-ratio": 0.9, "threads": 1,
    }  # fmt: skip
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def start(record: Record, options: argparse.Namespace, restarts: int) -> subprocess.Popen[bytes]:
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    words = [*command(options.epochs), "--out", str(record.folder)]
    words += ["--parallel", options.parallel, "--parallel-timeout", str(PATIENCE)]
    with said(record).open("ab") as file:
        program = [sys.executable, "-m", *torchrun, "-m", "svdalign", "train", *words]
        return subprocess.Popen(program, stdout=file, stderr=file)


def said(record: Record) -> Path:
    return record.folder.with_suffix(".txt")


def hit(job: subprocess.Popen[bytes], record: Record, which: int, how: int) -> dict[str, Any]:
    """Send a signal to a process of the job soon after its next checkpoint. Returns the
    checkpoint."""
    known = written(record)
    while written(record) == known:
        if job.poll() is not None:
            raise SystemExit(f"over too soon; more --epochs? {said(record).read_text()}")
        time.sleep(0.01)
    time.sleep(random.random())
    os.kill(processes(job)[which], how)
    trainer = storage.read(record.checkpoint_path)["extra"]["trainer"]  # whole, or this raises
    return {"process": which, "epoch": trainer["epoch"], "batch": trainer["batch"]}


def written(record: Record) -> int:
    path = record.checkpoint_path
    return path.stat().st_mtime_ns if path.exists() else 0


def processes(job: subprocess.Popen[bytes]) -> list[int]:
    """Ids of the processes that train, in the order of their ranks."""
    found = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(p) for p in found if b"svdalign" in Path(f"/proc/{p}/cmdline").read_bytes()]


def finish(job: subprocess.Popen[bytes], record: Record) -> None:
    if job.wait():
        raise SystemExit(f"training failed: {said(record).read_text()}")


def errors(record: Record) -> list[str]:
    """The messages with which processes ended."""
    lines = said(record).read_text().splitlines()
    return [line for line in lines if line.startswith("svdalign train: error: ")]


def restarted(record: Record, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills that one torchrun gets over."""
    kills = []
    job = start(record, options, options.kills)
    for i in range(options.kills):
        kills.append(hit(job, record, i % 2, signal.SIGKILL))
        print(kills[-1], flush=True)
    finish(job, record)
    return kills


def anew(record: Record, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills, and at last a hang, each of which ends a torchrun."""
    kills = []
    for i in range(options.kills + 1):
        job = start(record, options, 0)
        how = signal.SIGKILL if i < options.kills else signal.SIGSTOP
        found = hit(job, record, i % 2, how)
        ranks, started = processes(job), time.monotonic()
        if how == signal.SIGSTOP:
            other = Path(f"/proc/{ranks[1 - i % 2]}/cmdline")
            while b"svdalign" in other.read_bytes():
                time.sleep(0.01)
            os.kill(ranks[i % 2], signal.SIGKILL)  # torchrun would wait half a minute for it
        code = job.wait()
        kills.append(found | {"signal": how.name, "seconds_to_end": time.monotonic() - started})
        print(kills[-1], flush=True)
        if code == 0:
            raise SystemExit(f"the job did not say that it failed: {said(record).read_text()}")
    finish(start(record, options, 0), record)
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parallel", choices=["layers", "data"], default="layers")
    parser.add_argument("--way", choices=["restarted", "anew"], default="restarted")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_processes.json"))
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        peace, record = Record(Path(folder, "peace")), Record(Path(folder, "killed"))
        finish(start(peace, options, 0), peace)
        kills = {"restarted": restarted, "anew": anew}[options.way](record, options)
        texts = errors(record)
        different = differences(*(storage.read(r.checkpoint_path) for r in (peace, record)))
    run = shlex.join(["svdalign", "train", *command(options.epochs)])
    row = {"identical": not different, "different": different, "kills": kills, "errors": texts}
    rows = (read_json(options.out) or {}).get("rows", {})
    rows[f"{options.parallel}, {options.way}"] = row | {"run": run}
    write_json(options.out, {"rows": rows, **provenance("cpu")})
    print("DIFFERENT" if different else "identical", f"after {len(kills)}; {options.out}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())

"""Where numbers come from: versions, commit, machine, command line."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def provenance(device: str) -> dict[str, Any]:
    """Versions, git commit, machine and command line of this process, ready for JSON."""
    return {
        "svdalign": _version("svdalign"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": _git_commit(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        },
        "command": _command(),
    }


def _command() -> str:
    """The command line of this process, with the program's name in place of where it lies (a script
    keeps a relative path)."""
    program = Path(sys.argv[0])
    name = [program.name]
    if program.name == "__main__.py":
        name = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        name = ["python", program.name if program.is_absolute() else str(program)]
    return shlex.join([*name, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from, with ``+`` if it was changed since."""
    package = Path(__file__).resolve().parent.parent
    if _git(package, ["ls-files", "--error-unmatch", "__init__.py"]) is None:
        return None  # installed, and so in no repository of its own
    commit = _git(package, ["rev-parse", "HEAD"])
    return commit and commit + ("+" if _git(package, ["status", "--porcelain", "."]) else "")


def _git(folder: Path, arguments: Iterable[str]) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"

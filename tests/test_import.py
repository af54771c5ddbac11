"""What ``import svdalign`` costs and brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("datasets", "matplotlib", "rich", "jsonargparse", "pyarrow", "pandas", "PIL", "yaml")

PROBE = f"""
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()  # CPU seconds: other work on the machine does not count
import svdalign
print(time.process_time() - start)
print(*[name for name in {HEAVY!r} if name in set(sys.modules) - before])
"""


def test_import_adds_little_to_torchs_own() -> None:
    def seconds() -> float:
        run = [sys.executable, "-c", PROBE]
        done = subprocess.run(run, check=True, capture_output=True, text=True)
        added, heavy = done.stdout.splitlines()
        assert heavy == ""
        return float(added)

    assert any(seconds() < 0.3 for _ in range(2))  # the first may have to compile


def test_public_names() -> None:
    import svdalign as sva

    for name in ("Learner", "factorize", "SVDLinear", "SVDConv2d"):
        assert name in sva.__all__
    for name in sva.__all__:
        assert hasattr(sva, name)


#: Ways into the lab from outside, which import it when they are used.
ENTRANCES = [("__main__.py",), ("data.py",)]


def test_data_is_the_labs_once_a_name_is_asked_for() -> None:
    code = (
        "import sys, svdalign.data as d; assert 'svdalign.lab' not in sys.modules; "
        "from svdalign.data import load; import svdalign.lab.data; "
        "assert load is svdalign.lab.data.load and 'load' in dir(d)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import svdalign.data

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = svdalign.data.nothing


def test_nothing_outside_the_lab_imports_it() -> None:
    import ast
    from pathlib import Path

    import svdalign

    package = Path(svdalign.__file__).parent
    for file in package.rglob("*.py"):
        place = file.relative_to(package).parts
        if place[0] == "lab" or place in ENTRANCES:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(a.name for a in node.names)]
            assert not any("lab" in name.split(".") for name in names), file


def test_an_underscore_marks_what_a_file_keeps_to_itself() -> None:
    """And nothing else does: the lists ``__all__`` are those of packages."""
    import ast
    from pathlib import Path

    import svdalign

    package = Path(svdalign.__file__).parent
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert file.name == "__init__.py" or "__all__" not in names, file
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                modules = {path.stem for path in source.glob("_*.py")}
                private = {a.name for a in node.names if a.name.startswith("_")}
                assert private - {"__version__"} <= modules, file

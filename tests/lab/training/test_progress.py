from __future__ import annotations

import io

from rich.console import Console

from svdalign.lab.data import ImageData
from svdalign.lab.training import RunConfig, Trainer, build_learner
from svdalign.lab.training.progress import LiveProgress, PlainProgress, progress_for


def run(data: ImageData, console: Console, stop_at: int = -1) -> None:
    config = RunConfig(rule="bp", width=0.25, batch_size=16, epochs=2)
    trainer = Trainer(config, data, build_learner(config, data))
    with progress_for(console) as progress:
        trainer.run(name="BP", progress=progress, stop=lambda: trainer.global_step == stop_at)


def test_a_line_an_epoch_where_there_is_no_terminal(stripes: ImageData) -> None:
    out = io.StringIO()
    console = Console(file=out, width=60)
    assert isinstance(progress_for(console), PlainProgress)
    run(stripes, console)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    for epoch, line in enumerate(lines, 1):
        assert line.startswith(f"BP  epoch {epoch}/2  loss ")
        for part in ("train ", "test ", " images/s", " left"):
            assert part in line
    assert lines[-1].endswith("0:00 left")


def test_an_interruption_is_told(stripes: ImageData) -> None:
    out = io.StringIO()
    run(stripes, Console(file=out, width=60), stop_at=5)
    assert out.getvalue().splitlines()[-1] == "BP  interrupted after 5 steps"


def test_a_terminal_gets_a_live_display(stripes: ImageData) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    assert isinstance(progress_for(console), LiveProgress)
    run(stripes, console)
    shown = out.getvalue()
    for part in ("loss ", "accuracy ", "images/s", "✓"):
        assert part in shown

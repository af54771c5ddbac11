"""What a network and its training cost, measured: size, arithmetic, memory, time."""

from .breakeven import Call, factored_calls, macs_break_even, time_break_even, time_ratios
from .compute import inference_macs, macs_by_module, parameter_count, step_macs
from .epoch import epoch_seconds
from .estimate import pretending
from .latency import Timing, alternate
from .memory import LiveTensors, Memory, inference_memory, step_memory, storage_bytes

__all__ = [
    "Call",
    "LiveTensors",
    "Memory",
    "Timing",
    "alternate",
    "epoch_seconds",
    "factored_calls",
    "inference_macs",
    "inference_memory",
    "macs_break_even",
    "macs_by_module",
    "parameter_count",
    "pretending",
    "step_macs",
    "step_memory",
    "storage_bytes",
    "time_break_even",
    "time_ratios",
]

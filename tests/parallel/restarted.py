"""What one process of a job does that ``torchrun`` starts again: in the first round the last
process is killed, in the second all add up their numbers."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from svdalign import parallel

parallel.meet(timeout=timedelta(seconds=20))
total = torch.tensor(1 + dist.get_rank())
dist.all_reduce(total)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)  # waits for one that is dead
os.write(1, f"total {total.item()}\n".encode())  # in one piece, as others write too
dist.destroy_process_group()  # else its threads may still run as the interpreter ends

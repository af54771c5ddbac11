"""How the processes of one job find each other."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .link import OTHER, naming


def meet(backend: str = "gloo", *, timeout: timedelta = timedelta(minutes=30)) -> None:
    """``torch.distributed.init_process_group``, also right after ``torchrun --max-restarts``.

    torchrun keeps one store for all its rounds. Processes that it starts again can find in there
    the address of a dead one, and connect to nobody. Here they agree on a name for the round
    first, and keep their addresses under it.

    Args:
        backend: how processes send tensors: "gloo" for CPUs, "nccl" for GPUs.
        timeout: how long a process waits for the others, here and in each later exchange.

    Raises:
        PeerError: if one of the processes does not come in time.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    with naming(OTHER):
        store = PrefixStore(name_of_round(store, rank, size, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def name_of_round(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that the first process makes up, on all that were started with it.

    Nobody takes what an earlier round left in ``store`` for news: each process is answered under a
    key that it has made up, and the first one answers until each has heard this name.
    RuntimeError if a process does not come in time.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"call/{rank}", own)
        store.wait([f"answer/{own}"], timeout)
        name: str = store.get(f"answer/{own}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    end = time.monotonic() + timeout.total_seconds()
    for other in range(1, size):
        store.wait([f"call/{other}"], timeout)
        while not store.check([f"heard/{own}/{other}"]):
            store.set(f"answer/{store.get(f'call/{other}').decode()}", own)
            if time.monotonic() > end:
                raise RuntimeError(f"process {other} did not come within {timeout}")
            time.sleep(0.02)
    return own

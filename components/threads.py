"""How many threads PyTorch uses outside of training."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep PyTorch to one thread: on small tensors more threads only wait for each other.

    Training sets its own number inside.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""One thread for small work: a second one would find nothing to do, and wait for it busily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits  # a hard dependency of scikit-learn


@contextmanager
def one_thread() -> Iterator[None]:
    """While the block runs, torch and numpy's BLAS use one thread; after it, as many as before.

    With two threads a training of the demos takes twice the processor time and is no faster; where another program
    wants a processor too, it is several times slower.

    >>> import torch
    >>> threads = torch.get_num_threads()
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == threads
    True
    """
    with threadpool_limits(1):
        yield

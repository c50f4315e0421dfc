"""What of a run depends on there being several processes: whose rows are whose, and when to end."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax


def own_rows(row_sharding: jax.sharding.NamedSharding, batch_size: int) -> slice:
    """The rows of the global batch that this process's devices hold: one contiguous stretch."""
    held = row_sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size)[:2] for index in held if index is not None]
    start, stop = min(b[0] for b in bounds), max(b[1] for b in bounds)
    count = stop - start
    if batch_size % count or start % count:
        raise ValueError(
            f"mesh: process {jax.process_index()} holds rows {start} to {stop} of {batch_size}; "
            "choose data and fsdp sizes that the number of processes divides, or is divided by"
        )
    return slice(start, stop)


@contextlib.contextmanager
def watch_for_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM came.

    With several processes JAX's coordination service watches instead: all must end at one step.
    """
    asked = []
    if jax.process_count() > 1:
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, previous)

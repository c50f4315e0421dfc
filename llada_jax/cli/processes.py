"""Commands that several processes run together: on the hosts of a pod, or on one machine."""

import hashlib
import os

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(*, is_pod: bool) -> None:
    """Joins the other processes: a pod's, or those that `launch/local_pod.sh` started.

    Args:
      is_pod: whether `jax.distributed` is to find them.

    Raises:
      ValueError: it does not.
    """
    coordinator = os.environ.get("LLADA_COORDINATOR")
    if coordinator is not None:
        jax.distributed.initialize(
            coordinator,
            int(os.environ["LLADA_NUM_PROCESSES"]),
            int(os.environ["LLADA_PROCESS_ID"]),
        )
    elif is_pod:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--distributed: jax.distributed finds no hosts of a slice here ({error}); leave "
                "it out on a single host; on one machine launch/local_pod.sh starts processes"
            ) from error


def check_equal(what: str, value: object) -> None:
    """Raises a ValueError in every process if not all were given the same.

    Args:
      what: the value's name in the message.
      value: of which `repr` tells all.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(repr(value).encode()).digest()
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [i for i, row in enumerate(np.asarray(found)) if (row != found[0]).any()]
    if others:
        raise ValueError(
            f"{what}: process {others[0]} was given others than process 0; all processes need the "
            "same flags and files"
        )

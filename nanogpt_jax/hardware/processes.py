"""What must happen before JAX computes: joining the other processes, the compile cache.

Of several processes, one a host as a rule, each runs the same program on its part of the same
arrays. The first alone writes files and prints; the others follow it.
"""

import os
import platform
import signal
import socket
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nanogpt_jax.config import TrainConfig
from nanogpt_jax.errors import InputError, first_line

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.index == 0

    def wait(self, place: str) -> None:
        """Wait until every process has come to this place."""
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(place)

    def first_alone(self, work: Callable[[], Result], place: str) -> Result:
        """Return the result of work, which the first process does before all others."""
        result = work() if self.is_first else None
        self.wait(place)
        return result if self.is_first else work()

    def check_same(self, what: str) -> None:
        """Check that every process was given the same.

        Raises:
            InputError: they were not.
        """
        if self.count == 1:
            return
        import numpy as np
        from jax.experimental import multihost_utils

        told = multihost_utils.process_allgather(np.uint32(zlib.crc32(what.encode())))
        if len(set(told.tolist())) > 1:
            raise InputError(
                "all processes must have the same flags, versions and dataset, but some differ"
            )

    def any(self, flag: bool) -> bool:
        """Return whether it is true in any process."""
        return bool(self.agree(0, int(flag))[1])

    def agree(self, proposal: int, signal: int) -> tuple[int, int]:
        """Return the first process's proposal and the highest signal that any process had."""
        if self.count == 1:
            return proposal, signal
        import numpy as np
        from jax.experimental import multihost_utils

        told = multihost_utils.process_allgather(np.array([proposal, signal], np.int32))
        return int(told[0, 0]), int(told[:, 1].max())


ALONE = Processes()


def join_processes(config: TrainConfig) -> Processes:
    """Join the processes of the run, where there are several, and return this one's place.

    They are several if the command line says so, or the variables of Slurm, Open MPI or a TPU pod
    on Kubernetes do; `--coordinator_address auto` leaves all to JAX, as a Cloud TPU pod needs.
    Handlers of signals must be set after this: joining sets its own.

    Raises:
        InputError: the coordinator's port is taken, or joining fails.
    """
    address = config.coordinator_address
    if not address and not _environment_says_several():
        return Processes()
    import jax

    options = {"heartbeat_timeout_seconds": config.heartbeat_timeout_s}
    if address not in ("", "auto"):
        if config.process_id == 0:
            _check_free(int(address.rpartition(":")[2]))
        print(f"process {config.process_id} of {config.num_processes}: joining at {address}")
        options |= {
            "coordinator_address": address,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**options)
    except Exception as error:  # of many kinds: it asks the cluster, the network, the file system
        place = address or "Slurm"
        raise InputError(f"the processes cannot join at {place}: {first_line(error)}") from error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler would swallow it
    processes = Processes(jax.process_index(), jax.process_count())
    if not processes.is_first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    processes.wait("joined")  # connected once, processes may be apart as long as they like
    return processes


def _environment_says_several() -> bool:
    def number(name: str) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else 0

    return (
        ("SLURM_STEP_NODELIST" in os.environ and number("SLURM_NTASKS") > 1)
        or number("OMPI_COMM_WORLD_SIZE") > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or number("MEGASCALE_NUM_SLICES") > 1
    )


def _check_free(port: int) -> None:
    with socket.socket() as probe:  # JAX would crash on a port that is taken
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"coordinator_address: port {port} must be free on the first process's machine, "
                f"but {error.strerror}"
            ) from None


def use_compile_cache(asked: str, n_processes: int = 1) -> None:
    """Keep compiled programs on disk, so that the next start need not compile them again.

    Private to the user, since a compiled program is code that will be run; and apart for each
    machine, since machines that share a home may have different processors. JAX itself only warns
    of an entry that it cannot read.

    Args:
        asked: a folder; "off"; or "" for one in the user's cache, unless JAX's own variable
            JAX_COMPILATION_CACHE_DIR names one.
        n_processes: several share a cache or have none: only the first writes, and one that finds
            its program would wait for those that do not.
    """
    import jax

    if asked == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not asked and (jax.config.jax_compilation_cache_dir or n_processes > 1):
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(asked) if asked else caches / "nanogpt_jax" / platform.node()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        str(folder.absolute()).encode()  # XLA takes UTF-8 only
    except (OSError, ValueError) as error:
        print(f"no compile cache: {folder} cannot be made ({error})")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

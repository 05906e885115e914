"""Join the processes of a run, and keep compiled programs between runs. No JAX until joining.

Of several processes, usually one per host, each runs the same program on its part of the same
arrays. Only the first writes files and prints.
"""

import os
import platform
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import platformdirs

from nanogpt_jax.config import TrainConfig
from nanogpt_jax.errors import InputError, first_line, visible

JOIN_TIMEOUT_S = 300
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; every method must be called by all of them."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    def wait(self, point: str) -> None:
        """Wait until every process has reached this point of the program."""
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(point)

    def first_alone(self, work: Callable[[], Result], point: str) -> Result:
        """Return the result of work, which the first process does before all others."""
        if self.is_first:
            result = work()
            self.wait(point)
            return result
        self.wait(point)
        return work()

    def check_same(self, values: Mapping[str, object]) -> None:
        """Check that every process has the same values, or raise InputError with their names."""
        texts = (str(value).encode("utf-8", "backslashreplace") for value in values.values())
        hashes = self._gather(np.array([*map(zlib.crc32, texts)], np.uint32))
        if names := np.array([*values])[(hashes != hashes[0]).any(axis=0)].tolist():
            raise InputError(
                "all processes must have the same flags, versions and dataset, but they differ in "
                f"{', '.join(names)}: start all of them with the same command"
            )

    def any(self, flag: bool) -> bool:
        return bool(self.max(int(flag)))

    def max(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        return int(self._gather(np.array([number], np.int32)).max())

    def _gather(self, array: np.ndarray) -> np.ndarray:
        """Return the arrays of all processes, stacked."""
        if self.count == 1:
            return array[None]
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array))


ALONE = Processes()


def join_processes(config: TrainConfig) -> Processes:
    """Join the processes of the run, if there are several, and return this one's place among them.

    There are several if the flags say so, or the environment variables of Slurm, Open MPI or a TPU
    pod on Kubernetes. `--coordinator_address auto` leaves everything to JAX, as a Cloud TPU pod
    requires. Set signal handlers after this: joining sets its own. Without all of them the process
    ends after JOIN_TIMEOUT_S.
    """
    address, named = config.coordinator_address, {}
    reason, to_be_alone = f"--coordinator_address {address}", "leave it out"
    if not address:
        reason, to_be_alone = _variables_of_several(), "add --num_processes 1"
        if not reason or config.num_processes == 1:
            return ALONE
    import jax

    print(f"waiting for all processes, as {reason} asks; to train alone, {to_be_alone}")
    if address not in ("", "auto"):
        if config.process_id == 0:
            _check_free(int(address.rpartition(":")[2]))
        named = {
            "coordinator_address": address,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    # JAX's own time limit ends in a crash, and while it waits Python hears no Ctrl-C.
    timer = threading.Timer(JOIN_TIMEOUT_S, _give_up, [to_be_alone])
    timer.daemon = True
    timer.start()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            initialization_timeout=2 * JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=config.heartbeat_timeout_s, **named,
        )  # fmt: skip
    except Exception as error:  # from the cluster, the network or the file system
        raise InputError(
            f"the processes cannot join, as {reason} asks ({first_line(error)}): to train alone, "
            f"{to_be_alone}"
        ) from error
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler would swallow it
    processes = Processes(jax.process_index(), jax.process_count())
    if not processes.is_first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    processes.wait("joined")  # once connected, one process may be behind the others for long
    return processes


def _give_up(to_be_alone: str) -> None:
    line = f"error: not all processes have joined within {JOIN_TIMEOUT_S} s: start all of them, or,"
    print(f"{line} to train alone, {to_be_alone}", file=sys.stderr, flush=True)
    os._exit(1)


def _variables_of_several() -> str:
    """Return the environment variables of a launcher of several processes, like SLURM_NTASKS=4."""
    names = ["OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"]
    if "SLURM_STEP_NODELIST" in os.environ:
        names.append("SLURM_NTASKS")
    texts = {name: os.environ.get(name, "") for name in names}
    found = [f"{name}={n}" for name, n in texts.items() if n.isdecimal() and int(n) > 1]
    if "," in (hosts := os.environ.get("TPU_WORKER_HOSTNAMES", "")):
        found.append(f"TPU_WORKER_HOSTNAMES={hosts}")
    return " and ".join(found)


def _check_free(port: int) -> None:
    with socket.socket() as probe:  # a port in use would crash JAX
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"coordinator_address: port {port} must be free on the first process's machine "
                f"({error.strerror}): use another port, the same for all processes"
            ) from None


def use_compile_cache(requested: str, n_processes: int = 1) -> None:
    """Keep compiled programs on disk, so that the next start does not compile them again.

    The folder is private to the user, since a compiled program is code that will run, and one per
    machine, since machines that share a home may have different processors. With several processes
    there is none by default: only the first one writes, so if it finds its program, it would wait
    for the others.

    Args:
        requested: a folder; "off"; or "" for what JAX_COMPILATION_CACHE_DIR names, or one in the
            user's cache.
    """
    import jax

    if requested == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not requested and (os.environ.get("JAX_COMPILATION_CACHE_DIR") or n_processes > 1):
        return
    try:
        folder = Path(requested).absolute()
        if not requested:
            cache = platformdirs.user_cache_path("nanogpt_jax", appauthor=False)
            folder = cache.expanduser() / platform.node()  # older versions return ~ as it is
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        str(folder).encode()  # XLA takes UTF-8 only
    except (OSError, ValueError, RuntimeError) as error:  # the last: there is no home directory
        where = requested or "one in your home"
        print(visible(f"no compile cache: cannot create {where} ({error}); name a --compile_cache"))
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

"""Where the time of a program goes: a trace of JAX's profiler, summed by kind of operation."""

import collections
import re
from pathlib import Path


def time_by_operation(folder: Path, n_steps: int) -> dict[str, float]:
    """Return the seconds a step of each kind of operation, longest first, from the newest trace.

    The number at the end of a name is dropped, so that the same operation of all layers is summed.
    On a CPU several threads work at once, so the sum can exceed the elapsed time.
    """
    import jax

    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"{folder} holds no trace")
    profile = jax.profiler.ProfileData.from_file(str(traces[-1]))
    on_device = any(plane.name.startswith("/device:") for plane in profile.planes)
    seconds: collections.Counter[str] = collections.Counter()
    # A TPU has one line of operations, a GPU one per stream, a CPU one per thread. The CPU's also
    # hold what its runtime does: methods, like ThunkExecutor::Execute, and ends of operations.
    for plane in profile.planes:
        if on_device and not plane.name.startswith("/device:"):
            continue
        has_own_line = any(line.name == "XLA Ops" for line in plane.lines)
        for line in plane.lines:
            wanted = ("XLA Ops",) if has_own_line else ("Stream", "tf_XLA")
            for event in line.events if line.name.startswith(wanted) else ():
                if "::" not in event.name and not event.name.startswith("end: "):
                    seconds[re.sub(r"[.\d]+$", "", event.name)] += 1e-9 * event.duration_ns
    for container in ("while", "call", "conditional"):  # their contents are counted already
        seconds.pop(container, None)
    return {name: total / n_steps for name, total in seconds.most_common()}


def table(operations: dict[str, float], n_rows: int = 15) -> list[str]:
    """Return what takes the most time of a step, as lines to print."""
    rows = [*operations.items()]
    total_s = sum(operations.values()) or 1.0
    rest_s = sum(seconds for _, seconds in rows[n_rows:])
    return [f"{'operation':40} {'ms a step':>10} {'share':>7}"] + [
        f"{name[:40]:40} {1e3 * seconds:10.3f} {seconds / total_s:7.1%}"
        for name, seconds in [*rows[:n_rows], ("all others", rest_s)]
    ]

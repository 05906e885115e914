"""What must happen before JAX computes: the cache of compiled programs."""

import os
import platform
from pathlib import Path


def use_compile_cache(asked: str) -> None:
    """Keep compiled programs on disk, so that the next start need not compile them again.

    Private to the user, since a compiled program is code that will be run; and apart for each
    machine, since machines that share a home may have different processors. JAX itself only warns
    of an entry that it cannot read.

    Args:
        asked: a folder; "off"; or "" for one in the user's cache, unless JAX's own variable
            JAX_COMPILATION_CACHE_DIR names one.
    """
    import jax

    if asked == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not asked and jax.config.jax_compilation_cache_dir:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(asked) if asked else caches / "nanogpt_jax" / platform.node()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        print(f"no compile cache: {folder} cannot be made ({error.strerror})")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

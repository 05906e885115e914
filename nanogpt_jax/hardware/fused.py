"""Attention by a kernel of the chip's own: cuDNN's on NVIDIA GPUs, splash on TPUs.

The letters of array names are explained in model.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from nanogpt_jax.config import ROW_AXES


def fused_attention(
    q_BTHK, k_BTHK, v_BTHK, kernel: str, mesh: Mesh | None = None, interpret: bool = False
):
    """Compute what `attention` does for whole sequences without dropout, in one fused kernel.

    It never stores the scores, so it needs less memory and less time.

    Args:
        kernel: cudnn (NVIDIA) or splash (TPU).
        mesh: splits rows and heads; the compiler cannot split a kernel by itself.
        interpret: run splash without a TPU, slowly.
    """
    cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    work = {"cudnn": cudnn, "splash": partial(_splash, interpret=interpret)}[kernel]
    if mesh is not None:
        spec = PartitionSpec(ROW_AXES, None, "tensor")
        # Pallas kernels do not say how their outputs vary over the mesh, so that is not checked.
        work = jax.shard_map(work, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return work(q_BTHK, k_BTHK, v_BTHK)


def _splash(q_BTHK, k_BTHK, v_BTHK, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second

    _, T, H, K = q_BTHK.shape
    # Larger blocks repeat less work, but only whole blocks that are masked can be skipped.
    size = next(size for size in (512, 384, 256, 128) if T % size == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), size),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), size),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), size),
    )
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    q_BHTK, k_BHTK, v_BHTK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    y_BHTK = jax.vmap(kernel)(q_BHTK * jnp.asarray(K**-0.5, q_BHTK.dtype), k_BHTK, v_BHTK)
    return jnp.swapaxes(y_BHTK, 1, 2)  # pyright: ignore[reportArgumentType] (no residuals)

"""Make tests/golden/*.npz: what PyTorch computes for tiny random GPT-2s. Run by hand, without JAX:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/make_golden.py

Arrays are stored under dotted names, parameters under those of nanogpt_jax.model. Everything is
float32 and on one thread of the CPU. Weights are ten times larger than a new GPT-2's, so that a
wrong detail shows in the fifth digit. pretrained.npz has whole models as Hugging Face saves them.
"""

import tempfile
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent / "golden"
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # our names, and those of transformers
EXACT = {"activation": "gelu", "n_layer": 2, "n_head": 3, "n_embd": 12}
TANH = {"activation": "gelu_tanh", "n_layer": 1, "n_head": 2, "n_embd": 16}
SIZES = {"vocab_size": 31, "block_size": 16}
STD = 0.2

# Whole models, from one head to five: (n_layer, n_head, n_embd, block_size, vocab_size, theirs).
SAVED = (
    (1, 1, 4, 8, 7, {}),
    (2, 2, 6, 12, 13, {"activation_function": "gelu"}),
    (1, 3, 12, 9, 23, {"n_inner": 48}),
    (3, 4, 8, 16, 10, {"activation_function": "gelu_pytorch_tanh"}),
    (2, 5, 10, 11, 17, {}),
)

N_STEPS = 10
OPTIM = {
    "learning_rate": 3e-3,
    "min_lr": 3e-4,
    "warmup_iters": 3,
    "lr_decay_iters": 8,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "grad_clip": 1.0,
}


def make_model(config: dict) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights, LayerNorm's and biases too; zero biases if not wanted."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config["vocab_size"],
            n_positions=config["block_size"],
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            activation_function=ACTIVATIONS[config["activation"]],
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(float(is_scale(name)), STD)
            if name.endswith("bias") and not config["bias"]:
                param.zero_()
    return model.train()


def is_scale(name: str) -> bool:
    """Return whether a parameter is a LayerNorm's scale."""
    return ".ln_" in name and name.endswith("weight")


def our_name(name: str) -> str:
    """Translate "transformer.h.0.attn.c_attn.weight" to "h_0.attn.c_attn.kernel"."""
    module, _, leaf = name.removeprefix("transformer.").replace("h.", "h_").rpartition(".")
    if leaf == "weight":
        leaf = "embedding" if module in ("wte", "wpe") else "scale" if is_scale(name) else "kernel"
    return f"{module}.{leaf}"


def arrays(prefix: str, model: GPT2LMHeadModel, of, config: dict) -> dict[str, np.ndarray]:
    """Return of(parameter) of each parameter under our names; no biases if the model has none."""
    return {
        f"{prefix}.{our_name(name)}": of(param).detach().numpy().copy()
        for name, param in model.named_parameters()
        if config["bias"] or not name.endswith("bias")
    }


def mean_loss(model: GPT2LMHeadModel, batch_BT1):
    """Return (loss, logits_BTV): the mean cross-entropy of each next token."""
    logits_BTV = model(batch_BT1[:, :-1]).logits
    targets = batch_BT1[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets), logits_BTV


def dotted(prefix: str, values: dict) -> dict:
    """Return the values under "prefix.name"."""
    return {f"{prefix}.{name}": value for name, value in values.items()}


def make_gradients(name: str, config: dict, n_tokens: int) -> None:
    """Save parameters, a batch, and its logits, loss and gradients."""
    model = make_model(config)
    batch_BT1 = torch.randint(config["vocab_size"], (3, n_tokens + 1))
    loss, logits_BTV = mean_loss(model, batch_BT1)
    loss.backward()
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        **dotted("config", config),
        **arrays("params", model, lambda param: param, config),
        **arrays("grads", model, lambda param: param.grad, config),
        batch_BT1=batch_BT1.numpy().astype(np.int32),
        logits_BTV=logits_BTV.detach().numpy(),
        loss=loss.item(),
    )


def learning_rate(step: int) -> float:
    """Return nanoGPT's schedule."""
    peak, least, warmup = OPTIM["learning_rate"], OPTIM["min_lr"], OPTIM["warmup_iters"]
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1, (step - warmup) / (OPTIM["lr_decay_iters"] - warmup))
    return least + (peak - least) * (1 + cos(pi * progress)) / 2


def make_updates(name: str, config: dict) -> None:
    """Save ten AdamW updates, each from two micro-batches: batches, losses, norms, parameters."""
    model = make_model(config)
    n_micro = 2
    batches_NABT1 = torch.randint(
        config["vocab_size"], (N_STEPS, n_micro, 4, config["block_size"] + 1)
    )
    batches_NABT1[::3] %= 4  # a batch of few distinct tokens has a larger gradient
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": OPTIM["weight_decay"]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(OPTIM["beta1"], OPTIM["beta2"]), eps=1e-8)
    out = arrays("params.0", model, lambda param: param, config)
    losses, grad_norms = [], []
    for step, batch_ABT1 in enumerate(batches_NABT1):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step)
        losses.append(0.0)
        for batch_BT1 in batch_ABT1:
            loss = mean_loss(model, batch_BT1)[0] / n_micro
            loss.backward()
            losses[-1] += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(params, OPTIM["grad_clip"])
        grad_norms.append(norm.item())
        adamw.step()
        adamw.zero_grad()
        if step + 1 in (1, 5, N_STEPS):
            out |= arrays(f"params.{step + 1}", model, lambda param: param, config)
    print("losses", np.round(losses, 3), "gradient norms", np.round(grad_norms, 3))
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        **dotted("config", config),
        **dotted("optim", OPTIM),
        **out,
        batches_NABT1=batches_NABT1.numpy().astype(np.int32),
        losses=np.float32(losses),
        grad_norms=np.float32(grad_norms),
    )


def make_saved(name: str) -> None:
    """Save models as the files they are, a batch's logits, and how each goes on from its start."""
    out = {}
    for index, (*sizes, fields) in enumerate(SAVED):
        names = "n_layer", "n_head", "n_embd", "n_positions", "vocab_size"
        fields = dict(zip(names, sizes, strict=True)) | fields
        torch.manual_seed(index)
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **fields)).eval()
        with torch.no_grad():
            for param_name, param in model.named_parameters():
                param.normal_(float(is_scale(param_name)), STD)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            files = {path.stem: path.read_bytes() for path in Path(folder).iterdir()}
        batch_BT = torch.randint(fields["vocab_size"], (3, fields["n_positions"]))
        start_BT, n_new = batch_BT[:, :3], fields["n_positions"] - 3
        made_BT = model.generate(
            start_BT, attention_mask=start_BT * 0 + 1, do_sample=False, max_new_tokens=n_new,
            pad_token_id=0,
        )  # fmt: skip
        of_model = {
            "config": np.frombuffer(files["config"], np.uint8),
            "model": np.frombuffer(files["model"], np.uint8),
            "batch_BT": batch_BT.numpy().astype(np.int32),
            "logits_BTV": model(batch_BT).logits.detach().numpy(),
            "made_BT": made_BT.numpy().astype(np.int32),
        }
        out |= dotted(f"{index}", of_model)
    np.savez_compressed(FOLDER / f"{name}.npz", **out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for bias in (True, False):
        ending = "bias" if bias else "no_bias"
        make_gradients(f"exact_gelu_{ending}", {**SIZES, **EXACT, "bias": bias}, n_tokens=16)
        make_gradients(f"tanh_gelu_{ending}", {**SIZES, **TANH, "bias": bias}, n_tokens=11)
    make_updates("adamw", {**SIZES, **EXACT, "bias": True})
    make_saved("pretrained")

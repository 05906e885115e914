"""Estimate what a run costs: python -m nanogpt_jax cost --config NAME [--any_field value ...]

Counts parameters, FLOPs and memory from the configuration alone, and prints the hours, kilowatt
hours and dollars that the run takes on known chips. Needs no chip and no JAX, and runs nothing.
"""

from dataclasses import dataclass

from nanogpt_jax import corpora, hardware
from nanogpt_jax.bench import published
from nanogpt_jax.config import TrainConfig, parse_train_config, with_vocab_size
from nanogpt_jax.hardware import amount, duration, find_chip, n_params, parts
from nanogpt_jax.run import adopt

TABLE = ("T4", "RTX 3070 Ti", "RTX 4090", "L4", "A100 40GB", "H100", "H200", "TPU v5e", "TPU v6e")


@dataclass(frozen=True)
class CostConfig(TrainConfig):
    """A run, and how to price it."""

    #: share of the chip's peak to assume, at most 1 (model FLOPs utilization); nanoGPT reached 0.37
    #: for GPT-2 124M on an A100, models as small as `small` reach far less anywhere
    mfu: float = 0.4
    reference: bool = False  # print the GPTs this field grew from instead, published and counted


def main(argv: list[str]) -> None:
    config = with_vocab_size(adopt(parse_train_config(argv, __doc__ or "", CostConfig))[0])
    assert isinstance(config, CostConfig)
    print(*(reference_lines() if config.reference else cost_lines(config)), sep="\n")


def cost_lines(config: CostConfig) -> list[str]:
    """Return a run's parameters, FLOPs, memory and costs, as lines to print."""
    model = config.model
    val_tokens, evaluated = validation_tokens(config)
    train, evaluate = hardware.run_flops(config, val_tokens)
    per_token = hardware.train_flops_per_token(model)
    six_n = 6 * hardware.headline_params(model)
    lines = [f"{'':27}{'parameters':>14}{'FLOPs a token, forward':>26}"]
    whole = "all", n_params(model), hardware.forward_flops_per_token(model)
    lines += [f"{name:27}{size:14,}{forward:26,}" for name, size, forward in (*parts(model), whole)]
    if not train + evaluate:
        return [*lines, "", "It has no matrix products, so there are no FLOPs to count."]
    in_float32 = hardware.is_float32(config)
    width = "float32:" if in_float32 else "16 bits (--dtype float32: more):"
    far_lower = "" if n_params(model) > 1e8 else ", far lower for a model as small as this"
    memory = hardware.estimate_memory(config)
    memory["all"] = sum(memory.values())
    trained = [
        f"a token of training   {per_token:,} FLOPs, three times forward; 6 N = {six_n:,} "
        f"({six_n / per_token - 1:+.1%}) with N = {hardware.size_in_words(model)}",
        f"the run               {amount(train)} FLOPs: {config.max_iters:,} steps of "
        f"{config.tokens_per_iter:,} tokens",
    ]
    lines += [
        "",
        *(trained if train else []),
        f"{'its evaluations' if train else 'the evaluation':22}{amount(evaluate)} FLOPs: "
        f"{evaluated}",
        "",
        f"memory of a step on one device; activations are an estimate, in {width}",
        *(f"  {name:12}{size / 2**20:12,.1f} MiB" for name, size in memory.items()),
        "",
        f"at an MFU of {config.mfu:.0%} (--mfu); python -m nanogpt_jax bench measures the real one"
        f"{far_lower}",
        f"{'chip':12}{'peak TFLOP/s':>14}{'time':>12}{'kWh':>12}{'US$':>12}",
    ]
    for chip in filter(None, map(find_chip, TABLE)):
        seconds = (train + evaluate) / (config.mfu * chip.flops)
        kwh = amount(seconds / 3600 * chip.watts / 1000) if chip.watts else "-"
        price = chip.dollars_per_hour
        dollars = amount(seconds / 3600 * price) if price else "-"
        fits = "" if memory["all"] < chip.memory_bytes else "  does not fit unchanged"
        lines.append(
            f"{chip.name:12}{chip.flops / 1e12:14.1f}{duration(seconds):>12}{kwh:>12}{dollars:>12}"
            f"{fits}"
        )
    lines += ["peak: dense 16-bit products; kWh: of the board alone; sources: hardware/chips.py"]
    if in_float32:
        lines += ["This run multiplies in float32, whose peaks are lower: pass a lower --mfu."]
    return lines


def validation_tokens(config: TrainConfig) -> tuple[int, str]:
    """Return the size of the validation split, and what an evaluation reads, in words."""
    if config.eval_iters:
        return 2**62, f"{config.eval_iters} batches each"
    if (known := corpora.known_val_tokens(corpora.request_of(config))) is not None:
        return known, f"the validation split's {known:,} tokens each"
    n = corpora.SHAKESPEARE_VAL_TOKENS
    stand_in = f", since {config.dataset} is not prepared here" if config.dataset else ""
    return n, f"tiny Shakespeare's {n:,} tokens of validation each{stand_in}"


def reference_lines() -> list[str]:
    """Return the published GPTs next to what their configurations give, as lines to print."""
    lines = [
        f"{'':26}{'parameters':>11}{'tokens':>9}{'published':>13}{'6 N tokens':>12}{'counted':>10}"
        f"{'ratio':>7}  source"
    ]
    for run in published.RUNS:
        size, tokens, total, six_n, counted, ratio = ("-",) * 6
        if run.flops:
            total = f"{amount(run.flops)} {'e' if run.is_estimate else ' '}"
        if run.model:
            size, per_token = amount(n_params(run.model)), hardware.train_flops_per_token(run.model)
            if run.tokens:
                tokens, flops = amount(run.tokens), per_token * run.tokens
                six_n = amount(6 * hardware.headline_params(run.model) * run.tokens)
                counted, ratio = amount(flops), f"{flops / run.flops:.2f}" if run.flops else "-"
            elif run.flops:
                tokens = f"~{run.flops / per_token:.0e}".replace("e+", "e")
        lines.append(
            f"{run.name:26}{size:>11}{tokens:>9}{total:>13}{six_n:>12}{counted:>10}{ratio:>7}  "
            f"{run.source}"
        )
    return [
        *lines,
        "",
        "FLOPs of whole runs; e: estimated by others, since not published; ~: the tokens that they",
        "suffice for; counted: with attention's products, which 6 N leaves out (N without",
        "positions); ratio: counted to published.",
    ]

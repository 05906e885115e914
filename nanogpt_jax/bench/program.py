"""Read a GPU's optimised program, as XLA prints it: its products, and its waits for the host."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# %name = type[shape]{layout} operation(%operand, %operand), attributes
INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%([\w.-]+) = \(?(\w+)\[([\d,]*)\].*? ([\w-]+)\(([^)]*)\)(.*)"
)
WAITS = {
    "conditional": "a branch",
    "infeed": "a transfer",
    "outfeed": "a transfer",
    "send": "a transfer",
    "recv": "a transfer",
}


class Product(NamedTuple):
    """A matrix product of a program."""

    types: str  # of operands and result, like "bf16 x bf16 -> f32"
    flops: float
    source: str  # the operation of the model that it computes


def products(text: str) -> Iterator[Product]:
    """Yield the matrix products of a program; each is counted once, however often its loop runs."""
    known: dict[str, tuple[str, list[int]]] = {}
    for line in text.splitlines():
        if not (match := INSTRUCTION.match(line)):
            continue
        name, kind, dims, operation, operands, rest = match.groups()
        known[name] = kind, [int(n) for n in dims.split(",") if n]
        if operation != "dot" and "__cublas" not in rest:
            continue
        lhs, rhs = (known[operand] for operand in re.findall(r"%([\w.-]+)", operands)[:2])
        batch = re.search(r'lhs_batch_dim\w*"?[=:][{\[]([^}\]]*)', rest)
        n_batch = math.prod(lhs[1][int(i)] for i in re.findall(r"\d+", batch[1])) if batch else 1
        # b m k times b k n is b m n: the product of the three sizes is b (b m k n)^2
        sizes = [math.prod(dims) for _, dims in (lhs, rhs, known[name])]
        flops = 2 * math.sqrt(math.prod(sizes) / n_batch)
        source = re.search(r'op_name="([^"]*)"', rest)
        yield Product(f"{lhs[0]} x {rhs[0]} -> {kind}", flops, source[1] if source else "")


def product_lines(text: str) -> list[str]:
    """Return the products by type, with their number and their share of the FLOPs."""
    found = [*products(text)]
    total, flops = sum(product.flops for product in found), dict[str, float]()
    for product in found:
        flops[product.types] = flops.get(product.types, 0.0) + product.flops
    numbers = Counter(product.types for product in found)
    ranked = sorted(flops, key=lambda types: -flops[types])
    return [f"{types}: {flops[types] / total:.1%} in {numbers[types]}" for types in ranked]


def fused_attention_calls(text: str) -> tuple[int, int]:
    """Return how many calls of cuDNN's attention a program has, forward and backward."""
    return text.count('"__cudnn$fmhaSoftmax"'), text.count('"__cudnn$fmhaSoftmaxBackward"')


def waits(text: str) -> list[str]:
    """Return the operations for which a GPU waits for the host, in words; transfers included.

    It reads a branch's predicate on the host, and that of a loop whose number of iterations the
    compiler does not know.
    """
    found = Counter()
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%[\w.-]+ = .*? ([\w-]+)\(", line)
        operation = match[1].removesuffix("-start") if match else ""
        if operation == "while" and "known_trip_count" not in line:
            found["a loop of unknown length"] += 1
        elif operation in WAITS or "MoveToHost" in line:
            found[WAITS.get(operation, "a transfer")] += 1
    return [f"{n} x {what}" for what, n in found.items()]

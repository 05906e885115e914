"""Read a GPU's optimised program, as XLA prints it: its products, and its waits for the host."""

import math
import re
from collections import Counter
from collections.abc import Iterator

# %name = type[shape]{layout} operation(%operand, %operand), attributes
INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%([\w.-]+) = \(?(\w+)\[([\d,]*)\].*? ([\w-]+)\(([^)]*)\)(.*)"
)
TRANSFERS = ("infeed", "outfeed", "send", "recv")


def products(text: str) -> Iterator[tuple[str, int]]:
    """Yield the types and the FLOPs of each matrix product, like ("bf16 x bf16 -> f32", 240).

    Each is counted once, however often its loop runs.
    """
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
        yield f"{lhs[0]} x {rhs[0]} -> {kind}", 2 * math.isqrt(math.prod(sizes) // n_batch)


def product_lines(text: str) -> list[str]:
    """Return the products by type, with their share of the FLOPs and their number."""
    flops, numbers = Counter(), Counter()
    for types, n in products(text):
        flops[types] += n
        numbers[types] += 1
    total = flops.total()
    return [f"{types}: {n / total:.1%} in {numbers[types]}" for types, n in flops.most_common()]


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
        elif operation == "conditional":
            found["a branch"] += 1
        elif operation in TRANSFERS or "MoveToHost" in line:
            found["a transfer"] += 1
    return [f"{n} x {what}" for what, n in found.items()]

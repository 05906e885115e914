"""The tools: python -m nanogpt_jax COMMAND [arguments]

Training and sampling have scripts of their own: train.py and sample.py.
"""

import importlib
import sys

from nanogpt_jax.errors import InputError, did_you_mean, run_command

# Command: the module whose `main(argv)` it calls, and its line in --help.
COMMANDS = {
    "lecture": ("lecture.climb", 'train the models of "Let\'s build GPT" one after the other'),
    "report": ("run.plots", "compare runs: a line for each, and their loss curves in one picture"),
    "export": ("gpt2.convert", "write a run as a Hugging Face GPT-2 for transformers"),
    "cost": ("bench.cost", "estimate a run's parameters, FLOPs, memory, hours and price"),
    "bench": ("bench.speed", "time a training step and sampling against what the chip can do"),
    "measure": ("bench.measure", "measure this machine: steps, training, sampling; write a report"),
    "shardings": ("bench.shardings", "print where each array of a run is stored on a mesh"),
}


def main(argv: list[str]) -> int | None:
    """Run a command, or list them all."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(f"{__doc__}\nCommands (each explains itself with --help):")
        print(*(f"  {command:10} {about}" for command, (_, about) in COMMANDS.items()), sep="\n")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        raise InputError(f"there is no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"nanogpt_jax.{COMMANDS[name][0]}")
    sys.argv[0] = f"python -m nanogpt_jax {name}"  # what the command's own --help shows
    return module.main(argv[1:])


if __name__ == "__main__":
    run_command(main)

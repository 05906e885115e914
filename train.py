"""Train a GPT: python train.py --config NAME|FILE.json [--any_field value ...]

Run it again to go on where it stopped. The run lies in out/NAME; python sample.py writes text.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import nanogpt_jax
from nanogpt_jax import corpora
from nanogpt_jax.bench import cost as accounting
from nanogpt_jax.config import PRESETS, SCRATCH, ModelConfig, TrainConfig, parse_train_config
from nanogpt_jax.corpora import Corpus
from nanogpt_jax.data import MOST_STEPS_PER_DISPATCH
from nanogpt_jax.errors import InputError, RunError, run_command
from nanogpt_jax.gpt2 import config as huggingface
from nanogpt_jax.gpt2 import convert as pretrained
from nanogpt_jax.gpt2 import weights
from nanogpt_jax.hardware import chips
from nanogpt_jax.hardware import flops as counts
from nanogpt_jax.hardware import processes as startup
from nanogpt_jax.hardware.flops import checkpoint_bytes
from nanogpt_jax.hardware.processes import Processes
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run import loggers
from nanogpt_jax.run import plots as report
from nanogpt_jax.run.signals import StopSignals

SECONDS_PER_DISPATCH = 1.0  # progress shows about this often
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
SAMPLE_TOKENS = 300  # of the text shown at the end


def main(argv: list[str]) -> int:
    """Check all that was asked, before anything is written and before JAX is loaded; then train."""
    start_s = time.perf_counter()
    config = parse_train_config(argv, __doc__)
    if config.compile_for:
        from nanogpt_jax.bench import absent as tpu

        return tpu.compile_for(config, config.compile_for)
    processes = startup.join_processes(config)
    # Joined: who takes part is no part of the run, which may go on elsewhere.
    config = dataclasses.replace(config, coordinator_address="", num_processes=0, process_id=-1)
    if config.out_dir is not None:
        run_folder.check_usable(Path(config.out_dir))
    asked_vocab_size, asked_tokenizer = config.model.vocab_size, config.tokenizer
    if config.init_from != SCRATCH:
        model = huggingface.fit(config.model, config.init_from)
        config = dataclasses.replace(config, model=model)
        asked_tokenizer = asked_tokenizer or huggingface.tokenizer_of(config.init_from)
    min_tokens = config.model.block_size + 1
    prepare = partial(
        corpora.resolve, config.dataset, Path(config.data_dir), min_tokens, asked_tokenizer,
        asked_vocab_size,
    )  # fmt: skip
    dataset_folder = processes.first_alone(prepare, "prepared")
    corpus = corpora.open_corpus(dataset_folder, min_tokens, config.model.vocab_size)
    if config.init_from != SCRATCH:
        huggingface.check_tokenizer(config.init_from, corpus.tokenizer, config.tokenizer)
    usual = PRESETS[config.config]().dataset if config.config in PRESETS else None
    folder = run_folder.choose(config, corpus.name, usual or corpora.SHAKESPEARE)
    config = dataclasses.replace(
        config,
        model=with_vocabulary(config.model, corpus),
        optim=dataclasses.replace(
            config.optim, lr_decay_iters=config.optim.lr_decay_iters or config.max_iters
        ),
    )
    goes_on = False
    if config.overwrite and not config.eval_only:
        run_folder.check_usable(folder)
    else:
        goes_on = run_folder.check_resumable(folder, config, corpus.fingerprint)
        if goes_on:
            report.read_metrics(folder)  # damage is said before anything is written
    if config.init_from != SCRATCH:  # fetched and found whole, or said now
        needed = [] if goes_on else [config.init_from]
        processes.first_alone(lambda: list(map(weights.open_tensors, needed)), "fetched")
    elif not goes_on and config.eval_only:
        raise InputError(f"--eval_only needs a run with a checkpoint, but {folder} holds none")
    writes = processes.is_first and not config.eval_only
    if writes:
        loggers.check(config)
    with run_folder.locked(folder) if writes else contextlib.nullcontext(), StopSignals() as stop:
        if writes:
            run_folder.check_room(folder, checkpoint_bytes(config.model, config.optim.optimizer))
        return train(config, corpus, folder, processes, stop, start_s)


def with_vocabulary(model: ModelConfig, corpus: Corpus) -> ModelConfig:
    """Return a model's shape with its corpus's vocabulary, in which padding is known as such."""
    known = corpus.known_tokens or model.known_tokens
    pads = known and known < corpus.vocab_size and model.architecture == "gpt"
    known = known if pads else None
    return dataclasses.replace(model, vocab_size=corpus.vocab_size, known_tokens=known)


def train(
    config: TrainConfig,
    corpus: Corpus,
    folder: Path,
    processes: Processes,
    stop: StopSignals,
    start_s: float,
) -> int:
    """Train, or go on with, the run in `folder`; return the exit code."""
    # From here on JAX is needed; --help and wrong input have been answered without it.
    import jax
    from nanogpt_jax.loader import EvalFeed, TrainFeed
    from nanogpt_jax.programs import make_programs, needed_bytes

    from nanogpt_jax import generate, sharding, steps
    from nanogpt_jax import mesh as meshes
    from nanogpt_jax.hardware import devices
    from nanogpt_jax.lecture.models import make_model
    from nanogpt_jax.run.checkpoint import Checkpoints
    from nanogpt_jax.run.progress import Progress, loss_in_words

    startup.use_compile_cache(config.compile_cache, processes.count)
    devices.warn_of_unused_chip()
    if jax.process_count() != processes.count:
        raise InputError(
            f"this is one of the {jax.process_count()} hosts of a TPU pod: start the command on "
            "each of them, with --coordinator_address auto"
        )
    use_all = processes.count > 1
    mesh = meshes.make_mesh(meshes.choose_sizes(config, jax.device_count(), use_all))
    compute, how = devices.choose(config.compute, config.model, jax.devices()[0], mesh)
    least = counts.least_training_bytes(config.model, config.optim.optimizer)
    least = counts.least_sampling_bytes(config.model) if config.eval_only else least
    counts.check_memory(
        config.model, least, devices.memory_bytes(jax.local_devices()[0]),
        mesh.shape["fsdp"] * mesh.shape["tensor"],
        "a smaller --n_layer or --n_embd, or more devices with --mesh fsdp=-1",
    )  # fmt: skip

    vocabulary = f"{corpus.known_tokens or corpus.vocab_size}"
    if corpus.known_tokens not in (None, corpus.vocab_size):
        vocabulary += f" padded to {corpus.vocab_size}"
    print(
        f"{config.config}: {counts.size_in_words(config.model)}, {config.tokens_per_iter:,} tokens "
        f"a step, on {corpus.name} ({len(corpus.splits['train']):,} tokens, vocabulary of "
        f"{vocabulary})"
    )
    print(f"jax {jax.__version__} on {devices.describe(mesh)}: {how}")
    if idle := jax.device_count() - mesh.size:
        why = "as --mesh says" if config.compute.mesh else "since they do not divide --batch_size"
        print(f"{idle} of {jax.device_count()} devices are idle, {why}")
    # From here on all is known to be possible; so now, and not before, something may be deleted.
    overwrites = config.overwrite and not config.eval_only
    config = dataclasses.replace(config, overwrite=False)  # nothing to be repeated
    same = dataclasses.replace(config, out_dir=None, data_dir=".", dataset=None)
    processes.check_same(f"{same} {corpus.fingerprint} {jax.__version__}")
    if processes.is_first and overwrites:
        run_folder.delete(folder)
    if processes.is_first and not config.eval_only:
        made_with = {"nanogpt_jax": nanogpt_jax.__version__, "python": platform.python_version()}
        made_with |= {name: importlib.metadata.version(name) for name in LIBRARIES}
        made_with |= {"device": devices.describe(mesh), "compute": how}
        run_folder.begin(folder, config, corpus.fingerprint, made_with)
        if corpus.tokenizer:
            corpora.save_tokenizer(corpus.tokenizer, folder)
    processes.wait("begun")
    if not config.eval_only:
        run_folder.wait_until_seen(folder)

    # The state: as a checkpoint has it, or new.
    programs = make_programs(config, compute, mesh)
    print(sharding.whole_note(mesh, programs.abstract_state.params), end="")
    init_key, dropout_key = steps.stream_keys(config.seed)
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS, config.eval_only, processes)
    abstract = programs.abstract_state
    if config.eval_only:  # without an optimizer's state, which takes twice the memory of these
        restored = checkpoints.restore_params(abstract.params)
        params, begun_at = restored or (None, None)
    else:
        state = checkpoints.restore(abstract)
        begun_at = None if state is None else int(state.step)
    if begun_at is None and config.init_from != SCRATCH:
        params = pretrained.load_params(config.init_from, config.model, abstract.params)

    # The same windows in each evaluation.
    batch_size, block_size = config.batch_size, config.model.block_size
    val_feed = EvalFeed(corpus.splits["val"], block_size, batch_size, mesh, config.eval_iters)

    if config.eval_only:
        loss = val_feed.loss(programs.eval_steps, params)
        loss = loss_in_words(loss, corpus.bytes_per_token)
        where = config.init_from if begun_at is None else f"step {begun_at}"
        print(f"{where}: {loss}, {val_feed.n_targets:,} tokens")
        return 0
    if begun_at is not None and begun_at >= config.max_iters:
        print(
            f"{folder} is complete: {begun_at} steps are done. `python sample.py --out_dir "
            f"{shlex.quote(str(folder))}` writes text; --overwrite trains anew; --max_iters "
            f"{2 * begun_at} --lr_decay_iters {config.optim.lr_decay_iters} goes on"
        )
        return 0
    if begun_at is not None:
        print(f"going on with {folder} from step {begun_at}")
    chip = chips.find(jax.devices()[0].device_kind)
    print(accounting.run_line(config, len(corpus.splits["val"]), chip, mesh.size, begun_at or 0))

    batch_shape = config.gradient_accumulation_steps, batch_size
    feed = TrainFeed(
        corpus.splits["train"], config.seed, block_size, batch_shape, mesh, begun_at or 0,
        MOST_STEPS_PER_DISPATCH,
    )  # fmt: skip

    # Each compiled once, for the whole run: how many steps a dispatch makes is an argument. One is
    # compiled while Python still traces the next.
    with ThreadPoolExecutor(1, "compile") as pool:
        if begun_at is None and config.init_from == SCRATCH:
            making = pool.submit(programs.init_state, init_key)
        elif begun_at is None:
            making = pool.submit(programs.first_state, params)
        train_steps = programs.train_steps.lower(
            abstract, feed.corpus, feed.places(0), np.int32(0), dropout_key
        )
        compiling = pool.submit(train_steps.compile)
        eval_steps = val_feed.lower(programs.eval_steps, abstract.params)
        if begun_at is None:
            state = making.result()
        eval_steps = eval_steps.compile()
        train_steps = compiling.result()
    needed = needed_bytes(train_steps)
    limit = devices.memory_bytes(jax.local_devices()[0])
    of_limit = f" of {limit / 2**20:,.0f}" if limit else ""
    memory = f"a step needs {needed / 2**20:,.0f}{of_limit} MiB on each device"
    if limit and needed > limit:
        checkpoints.close()
        raise RunError(f"{memory}: {devices.memory_levers(config, compute)}")
    print(memory)
    processes.wait("compiled")

    step, saved_at = begun_at or 0, begun_at
    peak_flops = chip and mesh.size * chip.device_flops
    progress = Progress(
        folder, config, begun_at, int(state.skipped), processes.is_first, peak_flops,
        corpus.bytes_per_token,
    )  # fmt: skip

    def told(share: float) -> bool:
        progress.evaluating(share)
        return bool(stop.number) and step < config.max_iters  # the last one is the run's result

    stop.may_save = True
    try:
        while True:
            if progress.evaluation_due(step) and not progress.is_evaluated(step):
                progress.catch_up()
                # None where a signal stopped it: then it is made when the run goes on.
                val_loss = val_feed.loss(eval_steps, state.params, told)
                if val_loss is None:
                    progress.evaluation_stopped(step)
                else:
                    progress.evaluated(step, val_loss)
                    if step > 0 and step != saved_at:
                        checkpoints.save(state, val_loss)
                        saved_at = step
            n_steps = min(
                max(1, int(progress.steps_per_s * SECONDS_PER_DISPATCH)),
                feed.most_steps,
                config.max_iters - step,
                config.eval_interval - step % config.eval_interval,
            )
            n_steps, stopped_by = processes.agree(n_steps, stop.number)
            if step == config.max_iters or stopped_by:
                break
            # Placed while the device is still busy with the dispatch before this one (of several
            # processes not quite: to agree, they wait for it).
            places_NAB = feed.places(n_steps)
            launched_s = time.perf_counter()
            state, metrics = train_steps(
                state, feed.corpus, places_NAB, np.int32(n_steps), dropout_key
            )
            progress.dispatched(step, n_steps, launched_s, metrics)
            if step == (begun_at or 0):
                progress.catch_up()
                progress.say(
                    f"first step done {time.perf_counter() - start_s:.1f} s after the start"
                )
            step += n_steps
        progress.catch_up()
        if stopped_by and saved_at != step:
            checkpoints.save(state)
    finally:
        feed.close()
        try:
            checkpoints.close()
        finally:
            progress.close()
    stop.may_save = False

    if stopped_by and step < config.max_iters:
        print(
            f"stopped at step {step}, and saved: the same command goes on from there, "
            "without --overwrite"
        )
        return 128 + stopped_by
    best_loss, best_step = progress.best
    where = "" if folder.parent == run_folder.OUT else f" --out_dir {shlex.quote(str(folder))}"
    print(
        f"{step} steps in {progress.elapsed_s():.0f} s of training, best val loss {best_loss:.4f} "
        f"at step {best_step}. The run lies in {folder}: loss.png shows it, "
        f"`python sample.py{where}` writes more:"
    )
    if corpus.tokenizer:
        window_BS, length = generate.start_window(corpus.tokenizer, None, 1, block_size)
        write = jax.jit(
            partial(generate.generate, make_model(config.model, devices.Compute(compute.dtype))),
            static_argnames=("n_tokens", "sampling"),
            out_shardings=meshes.replicated(mesh),
        )
        new_tokens_BN = write(
            state.params,
            window_BS,
            length,
            generate.row_keys(config.seed, range(1)),
            n_tokens=SAMPLE_TOKENS,
            sampling=generate.Sampling(temperature=0.8, top_k=200),
        )
        print(corpus.tokenizer.decode(np.asarray(new_tokens_BN)[0]))
    return 0


if __name__ == "__main__":
    run_command(main)

"""Train a GPT: python train.py --config NAME|FILE.json [--any_field value ...]

Run it again to resume. The run is stored in out/NAME; python sample.py writes text with it.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nanogpt_jax
from nanogpt_jax import bench, corpora, hardware
from nanogpt_jax.config import TrainConfig, parse_train_config
from nanogpt_jax.corpora import Corpus
from nanogpt_jax.errors import run_command
from nanogpt_jax.run import Run, adopt, adopt_tokenizer, check_usable, describe_loss

SAMPLE_TOKENS = 300  # of the text shown at the end


def main(argv: list[str]) -> int:
    """Validate the request and prepare the data before importing JAX; then train."""
    config = parse_train_config(argv, __doc__ or "")
    if config.compile_for:
        return bench.compile_for(adopt(config)[0], config.compile_for)
    processes = hardware.join_processes(config)
    if config.out_dir and not config.eval_only:  # before the data, whose preparation may take hours
        check_usable(Path(config.out_dir))
    config, source = adopt(config)  # weights bring their shape and their tokenizer
    corpus, config = corpora.load(config, processes, source and source.tokenizer_path)
    corpus = adopt_tokenizer(config, source, corpus)
    with Run.open(config, source, corpus, processes) as run:
        return (evaluate_only if config.eval_only else train)(run.config, corpus, run)


def train(config: TrainConfig, corpus: Corpus, run: Run) -> int:
    """Train, or resume, a run; return the exit code."""
    import jax

    from nanogpt_jax import data, optim, sharding, steps

    # Devices: mesh, dtype and kernels, or a line that says why the run does not fit.
    machine = hardware.choose(config, run.processes)
    config = run.fit_to_time(lambda: bench.time_step(config, machine, corpus.splits["train"]))
    run.begin(machine)  # the request is possible: from here on files are written

    # State: restored, pretrained or new; every array is created on its own devices.
    model = steps.make_model(config.model, machine.compute)
    tx = optim.make_optimizer(config.optim, config.max_iters)
    init_key, dropout_key = steps.stream_keys(config.seed)
    random_state = partial(steps.new_state, model, tx)
    abstract = sharding.place(jax.eval_shape(random_state, init_key), machine.mesh)
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    print(sharding.unsplit_note(machine.mesh, abstract.params), end="")

    def new_state() -> steps.TrainState:
        params = run.load_pretrained(abstract.params)
        if params is None:
            return jax.jit(random_state, out_shardings=shardings)(init_key)
        with_params = partial(steps.init_state, tx)
        return jax.jit(with_params, out_shardings=shardings, donate_argnums=0)(params)

    restored = run.restore(abstract)
    if run.is_complete():
        return 0

    # Batches: functions of the seed and the step, so there is nothing to restore.
    block_size, batch_size, mesh = config.model.block_size, config.batch_size, machine.mesh
    tokens, shape = corpus.splits["train"], (config.gradient_accumulation_steps, batch_size)
    start_step, n_steps = run.start_step, hardware.steps_per_call(config, run.start_step)
    batches = data.train_batches(tokens, config.seed, block_size, shape, mesh, start_step, n_steps)
    batch, val_tokens = next(batches), corpus.splits["val"]
    val_batches = data.EvalLoader(val_tokens, block_size, batch_size, mesh, config.eval_iters)

    # Compiled functions: one is compiled while Python traces the next.
    out_shardings = shardings, sharding.replicated(mesh)
    update = partial(steps.train_steps, model, tx)
    update = jax.jit(update, donate_argnums=0, out_shardings=out_shardings)
    with ThreadPoolExecutor(1, "compile") as pool:
        making_state = pool.submit(new_state if restored is None else lambda: restored)
        compiling = pool.submit(update.lower(abstract, batch, dropout_key).compile)
        eval_step = compile_eval_step(model, abstract.params, val_batches, mesh)
        state, train_step = making_state.result(), compiling.result()
    print(machine.check_fits(train_step, config))

    def is_due(step: int) -> bool:
        """Return whether an evaluation is due before the next update."""
        if step in run.evaluated_steps or (step == 0 and not config.eval_first):
            return False
        return step % config.eval_interval == 0 or step == config.max_iters

    sampler = steps.make_model(config.model, steps.Compute(machine.compute.dtype))

    def write(n_tokens: int) -> str:
        """Return text by the model as it is now."""
        trained = nanogpt_jax.TrainedModel(
            str(run.folder), run.folder, config.model, corpus.tokenizer, sampler, state.params, step
        )
        return str(nanogpt_jax.generate(trained, max_new_tokens=n_tokens, seed=config.seed))

    # The loop: exactly max_iters updates, n_steps of them a call of one compiled function.
    learning_rate = float(tx.learning_rate(state.step - state.skipped))
    run.start(state, machine, learning_rate, evaluates_first=is_due(run.start_step))
    step = run.start_step
    with contextlib.closing(batches):
        while True:
            if is_due(step):
                should_stop = run.evaluating(step)
                val_loss = steps.evaluate(eval_step, state.params, val_batches, should_stop)
                run.evaluated(step, val_loss, state)
            run.show(step, partial(write, config.sample_chars))
            if step == config.max_iters or run.stop_requested(step):
                break
            state, metrics = train_step(state, batch, dropout_key)
            batch = next(batches)  # placed while the device computes
            step += n_steps
            run.log(step, metrics)  # waits for the updates before, never for these
        exit_code = run.finish(step, state)

    if exit_code == 0 and corpus.tokenizer:
        with run.decoration():
            print(write(SAMPLE_TOKENS))
    return exit_code


def evaluate_only(config: TrainConfig, corpus: Corpus, run: Run) -> int:
    """Print the loss of a run's newest checkpoint, or of the weights that init_from names."""
    import jax

    from nanogpt_jax import data, sharding, steps

    machine = hardware.choose(config, run.processes)
    run.begin(machine)
    model = steps.make_model(config.model, machine.compute)
    init_params = partial(steps.init_params, model)
    abstract = sharding.place(jax.eval_shape(init_params, jax.random.key(0)), machine.mesh)
    params, step = run.restore_params(abstract) or (run.load_pretrained(abstract), None)
    source = config.init_from if step is None else f"{run.folder}, step {step}"
    val, block_size = corpus.splits["val"], config.model.block_size
    batches = data.EvalLoader(val, block_size, config.batch_size, machine.mesh, config.eval_iters)
    eval_step = compile_eval_step(model, abstract, batches, machine.mesh)
    val_loss = steps.evaluate(eval_step, params, batches)
    assert val_loss is not None, "nothing stops it"
    loss = describe_loss(val_loss, corpus.bits_per_byte(val_loss))
    print(f"{source}: {loss}, {batches.n_targets:,} tokens")
    return 0


def compile_eval_step(model, abstract_params, batches, mesh):
    """Return a compiled function (params, batch, counts_B) -> (sum of losses, targets)."""
    import jax

    from nanogpt_jax import sharding, steps

    evaluate = partial(steps.eval_batch, model)
    jitted = jax.jit(evaluate, out_shardings=sharding.replicated(mesh))
    return jitted.lower(abstract_params, *next(iter(batches))).compile()


if __name__ == "__main__":
    run_command(main)

"""The table of where each array of a state is stored."""

from nanogpt_jax.bench import shardings


def table(capsys, *argv):
    """The rows that the command prints, by name, and its last line."""
    shardings.main([*argv])
    *lines, last = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines[1:]]
    return {row[0].strip(): [cell.strip() for cell in row if cell.strip()] for row in rows}, last


def test_the_table_for_gpt2_xl_on_eight_devices(capsys):
    rows, last = table(capsys, "--config=gpt2-xl", "--mesh=fsdp=8", "--batch_size=16")
    kernel = ["(1600, 4800)", "(-, fsdp)", f"{1600 * 4800 * 4 // 8:,}", "x 48"]
    assert rows["params.h_*.attn.c_attn.kernel"][1:] == kernel
    assert rows["opt_state.1.0.mu.h_*.attn.c_attn.kernel"][1:] == kernel
    assert rows["params.ln_f.scale"][1:] == ["(1600,)", "(-)", "6,400"]
    matrices = (50304 + 1024) * 1600 + 48 * 12 * 1600**2
    vectors = 97 * 1600
    scalars_bytes = 6 * 4  # step, skipped, two counts of optax, two of the loss scale
    assert f"state's {12 * (matrices + vectors) + scalars_bytes:,} bytes" in last
    assert f"each device holds {12 * (matrices // 8 + vectors) + scalars_bytes:,} of" in last


def test_without_a_mesh_the_table_is_for_the_devices_of_this_machine(capsys):
    rows, last = table(capsys, "--config=tiny")
    assert rows["params.wte.embedding"][1:] == ["(65, 32)", "(-, -)", "8,320"]
    assert last.startswith("mesh data=4, fsdp=1, tensor=1:")
    on_one, whole = last.split("each device holds ")[1].split(" of the state's ")
    assert whole.startswith(on_one)

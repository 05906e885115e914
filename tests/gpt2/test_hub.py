"""The files of a GPT-2: from the Hub, here a server on loopback, or from a folder."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanogpt_jax.config import GPT2_REVISIONS, GPT2_SHAPES, PRESETS, ModelConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.gpt2 import hub
from nanogpt_jax.hardware import flops as counts

COMMIT = GPT2_REVISIONS["gpt2"]


@pytest.fixture
def server():
    """A hub with one file, gpt2/config.json; gpt2-xl is unavailable (503), all else missing (404).

    Yields (address, requests).
    """
    requests = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append((self.command, self.path))
            found = self.path == f"/openai-community/gpt2/resolve/{COMMIT}/config.json"
            self.send_response(200 if found else 503 if "gpt2-xl" in self.path else 404)
            self.send_header("Content-Length", "2" if found else "0")
            if found:
                self.send_header("ETag", '"some-etag"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            return found

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ask(tmp_path):
    """Call functions in a new process, since huggingface_hub reads its environment only once.

    ask(calls, **environment) -> what each call returned or the error that it raised, as a text.
    Nothing else may be printed, and no call may take ten seconds: huggingface_hub alone retries for
    23 seconds and warns each time.
    """

    def ask(*calls: str, **environment: str):
        script = (
            "import time\n"
            "from nanogpt_jax.corpora import tokenizer_spec\n"
            "from nanogpt_jax.errors import InputError\n"
            "from nanogpt_jax.gpt2 import hub\n"
            f"for call in {calls}:\n"
            "    start_s = time.monotonic()\n"
            "    try:\n"
            "        print(eval(call))\n"
            "    except InputError as error:\n"
            "        print('error:', error)\n"
            "    assert time.monotonic() - start_s < 10\n"
        )
        env = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"} | environment
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert not done.stderr
        answers = done.stdout.splitlines()
        assert len(answers) == len(calls)
        return answers

    return ask


CONFIG, WEIGHTS = "hub.find('gpt2', 'config.json')", "hub.find('gpt2', 'model.safetensors')"
FROM = "https://huggingface.co/openai-community/gpt2 in a folder and pass"
ADVICE = f"save config.json, model.safetensors and tokenizer.json from {FROM} --init_from FOLDER"
NOBODY = "http://127.0.0.1:9"  # the discard port, on which nothing listens


def test_a_file_is_downloaded_once(server, ask):
    address, requests = server
    path, again = ask(CONFIG, CONFIG, HF_ENDPOINT=address)
    assert Path(path).read_text() == "{}"
    n_requests = len(requests)
    (unplugged,) = ask(CONFIG, HF_ENDPOINT=NOBODY)
    assert path == again == unplugged
    assert len(requests) == n_requests


def test_without_a_network_one_line_says_which_files_to_put_where(ask):
    unplugged, *_ = ask(WEIGHTS, HF_ENDPOINT=NOBODY)
    offline, tokenizer = ask(WEIGHTS, "tokenizer_spec._gpt2_tokenizer()", HF_HUB_OFFLINE="1")
    for error in unplugged, offline:
        assert error.startswith("error: model.safetensors could not be downloaded (")
        assert ADVICE in error
    assert f"save tokenizer.json from {FROM} --tokenizer FOLDER/tokenizer.json" in tokenizer


def test_what_the_hub_refuses_or_cannot_be_cached_is_a_one_line_error(server, ask, tmp_path):
    address, _ = server
    missing, down = ask(WEIGHTS, "hub.find('gpt2-xl', 'config.json')", HF_ENDPOINT=address)
    assert "404" in missing
    assert ADVICE in missing
    assert "503" in down
    assert "openai-community/gpt2-xl in a folder" in down
    unwritable = tmp_path / "file"
    unwritable.write_text("a file where a folder should be")
    (error,) = ask(CONFIG, HF_ENDPOINT=address, HF_HOME=str(unwritable))
    assert ADVICE in error


def test_a_folder_needs_no_hub(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.find(str(tmp_path), "config.json") == tmp_path / "config.json"
    with pytest.raises(InputError, match=r"but there is no .*model\.safetensors$"):
        hub.find(str(tmp_path), "model.safetensors")


def test_a_local_folder_takes_precedence_over_a_name_on_the_hub(tmp_path, monkeypatch):
    """Somebody who saved the files as advised may have called the folder gpt2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert hub.is_name("gpt2")
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert not hub.is_name("gpt2")
    assert hub.find("gpt2", "config.json").resolve() == tmp_path / "gpt2" / "config.json"


def test_the_four_shapes_are_those_of_the_presets_and_have_their_known_sizes():
    n_params = {}
    for name, shape in GPT2_SHAPES.items():
        preset = PRESETS[name].model
        assert shape == {field: getattr(preset, field) for field in shape}
        config = ModelConfig(
            block_size=hub.BLOCK_SIZE, vocab_size=hub.VOCAB_SIZE, bias=True, **shape
        )
        n_params[name] = counts.n_params(config)
    assert n_params == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }

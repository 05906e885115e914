"""The page of sample.py --web: what it shows, checked first without Gradio, then in a browser."""

import contextlib
import dataclasses
import http.client
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import layers_of, random_params

import nanogpt_jax
from nanogpt_jax import corpora, steps
from nanogpt_jax.config import MAX_PAGE_TOKENS, ModelConfig, SampleConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.web import app, handlers, render
from nanogpt_jax.web.session import Session

pytestmark = pytest.mark.xdist_group("web")  # one run for all

ROOT = Path(__file__).parent.parent.parent
BLOCK_SIZE = 16
HOSTILE = ("<b>bold</b>", "<script>1;", "<img src=x>", "${1+1}{{2}}&lt;")
TEXT = "the cat sat on the mat and ate a rat, then it left.\n"
CONFIG = SampleConfig(max_new_tokens=3 * BLOCK_SIZE, num_samples=1, web=True)


def script(name, *argv):
    return [sys.executable, str(ROOT / name), *argv]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run under out/, of a model with one layer of two heads."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "tests" / "fixtures" / "run_v1" / "run", folder / "out" / "run")
    return folder


@pytest.fixture(scope="module")
def session(home):
    return Session(nanogpt_jax.load(home / "out" / "run"))


LETTERS = corpora.CharTokenizer("\n abc")


def new_session(architecture, tokenizer=LETTERS, folder=None):
    shape = {"block_size": 8, "vocab_size": tokenizer.vocab_size, "n_embd": 8}
    config = ModelConfig(**shape | layers_of(architecture))
    model = steps.make_model(config)
    params = random_params(model)
    return Session(
        nanogpt_jax.TrainedModel("new", folder, config, tokenizer, model, params, step=0)
    )


def written(session, text, config, **more):
    return nanogpt_jax.stream(session.run, text, **nanogpt_jax.settings_of(config), **more)


@pytest.fixture
def answer(session):
    return handlers.Handlers(session, CONFIG)


# The session


def test_a_text_of_the_page_is_the_first_that_sample_py_writes(session):
    config = dataclasses.replace(CONFIG, temperature=1.2, top_k=5, top_p=0.9, seed=7)
    whole = nanogpt_jax.generate(session.run, "a cat", **nanogpt_jax.settings_of(config))
    assert "a cat" + "".join(written(session, "a cat", config)) == whole


@pytest.mark.parametrize("n_first", [1, 5, 12])
def test_a_text_that_was_stopped_continues_as_if_it_never_had_been(session, n_first):
    """Within the context; past it the model may keep another part of the text."""
    config = dataclasses.replace(CONFIG, temperature=1.5, max_new_tokens=13)
    whole = "".join(written(session, "a", config))
    first = whole[:n_first]
    rest = dataclasses.replace(config, max_new_tokens=13 - n_first)
    assert first + "".join(written(session, "a" + first, rest, n_generated=n_first)) == whole


@pytest.mark.parametrize("text", ["a cat", "a cat sat on a mat. a hat sat"])
def test_an_insight_is_what_the_model_computes_for_the_part_that_it_sees(session, text):
    seen = text[-BLOCK_SIZE:]
    tokens_T = session.tokenizer.encode(seen)
    logits_BTV, _ = jax.jit(session.run.model.apply)(
        {"params": session.run.params}, jnp.array(tokens_T)[None]
    )
    log_probs_TV = jax.nn.log_softmax(logits_BTV[0])
    insight = session.look(text)
    assert "".join(insight.tokens) == seen
    assert math.isnan(insight.probs_T[0])
    probs_T = [np.exp(log_probs_TV[i, token]) for i, token in enumerate(tokens_T[1:])]
    np.testing.assert_allclose(insight.probs_T[1:], probs_T, rtol=1e-4)
    (best, probability), second, *_ = insight.likeliest(3, n=4)
    assert best == session.tokenizer.chars[int(log_probs_TV[3].argmax())]
    assert probability == pytest.approx(float(np.exp(log_probs_TV[3].max())), rel=1e-4)
    assert second[1] <= probability


def test_the_attention_of_an_insight_has_no_padding(session):
    insight = session.look("a cat")
    of_heads = [insight.attention(0, head) for head in range(session.n_heads[0])]
    for weights_TT in of_heads:
        assert weights_TT.shape == (5, 5)
        np.testing.assert_allclose(weights_TT.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(insight.attention(0, None), np.mean(of_heads, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "n_heads"),
    [("bigram", []), ("head", [1]), ("layernorm", [2, 2])],
)
def test_a_page_answers_for_every_architecture(architecture, n_heads, tmp_path):
    session = new_session(architecture, folder=tmp_path)
    assert session.n_heads == n_heads
    assert (
        len("".join(written(session, "\n", dataclasses.replace(CONFIG, max_new_tokens=20)))) == 20
    )
    layer = str(len(n_heads)) if n_heads else None
    *_, position, forecast, attention, picture = handlers.Handlers(session, CONFIG).see(
        "abc a", layer, handlers.MEAN
    )
    assert position == 4
    assert "nothing yet" in forecast
    assert bool(attention) == bool(n_heads)
    assert (picture is not None) == bool(n_heads)


@pytest.mark.slow
def test_a_page_of_byte_pairs_shows_tokens():
    reader = corpora.BPETokenizer.train(["the cat sat on the mat\n" * 20], 290)
    session = new_session("gpt", reader)
    answer = handlers.Handlers(session, CONFIG)
    text = "the cat sat on the mat 🎭 then the rat"
    n_tokens = len(reader.encode(text))
    seen, window, position, forecast, attention, _ = answer.see(text, "1", handlers.MEAN)
    assert window == text
    assert position == session.run.model.config.block_size - 1 < n_tokens < len(text)
    (shown,) = re.findall(r" checked><span.*?>([^<]+)</span>", seen)
    assert reader.token_bytes[reader.encode(text)[-1]] == shown.encode()
    assert "nothing yet" in forecast
    position, forecast, attention = answer.choose(window, "1", handlers.MEAN, 2)
    assert position == 2
    assert "(orange)" in forecast
    assert "1 token before" in attention or "tokens before" in attention or "itself" in attention
    assert "There is no curve to draw" in answer.loss()[1]
    pieces = list(written(session, "the cat", dataclasses.replace(CONFIG, max_new_tokens=9)))
    assert len(pieces) == 9
    *_, (grown, wrong) = answer.write("the cat sat", "the cat", *numbers(max_new_tokens=2))
    assert (wrong, grown.startswith("the cat sat")) == ("", True)


# What is shown


def test_text_is_escaped_wherever_it_is_shown():
    text = "<b>&\"'"
    uniform_TT = np.full((6, 6), 1 / 6)
    shown = [
        render.surprise(text, np.full(6, 0.4), 2),
        render.forecast(text, 2, [("<", 0.5), ("&", 0.25)], np.full(6, 0.1)),
        render.attention(text, uniform_TT, 0, "<i>", "character"),
        render.error(text),
        render.visible("<") + render.visible("&"),
    ]
    for html in shown:
        assert not re.search("<[bi]>(?!&|[↵␣])", html), html
        assert "&lt;" in html
    assert "<i>" not in shown[2]


def test_a_token_of_several_characters_is_shown_whole():
    assert render.visible(" the\n") == "␣the↵"
    html = render.surprise([" the", "\n\n", "cat"], np.array([np.nan, 0.4, 0.1]), 0)
    assert re.findall(r">([^<>]+)</span>(\n*)", html) == [(" the", ""), ("↵↵", "\n\n"), ("cat", "")]


def test_blanks_and_what_has_no_shape_can_be_seen():
    assert list(map(render.visible, " \n\ta\x07\u202e")) == ["␣", "↵", "⇥", "a", "U+0007", "U+202E"]


def test_the_character_that_came_is_marked_though_it_was_not_expected():
    expected, probs_T = [("a", 0.9), ("b", 0.05)], np.array([np.nan, 0.01])
    marked = re.findall(
        r'<span>(.)</span><span class="bar came"', render.forecast("xz", 0, expected, probs_T)
    )
    assert marked == ["z"]
    assert "1.0%" in render.forecast("xz", 0, expected, probs_T)
    assert 'bar came"' not in render.forecast("xz", 1, expected, probs_T)


def test_surprise_is_the_deeper_the_less_a_character_was_expected():
    html = render.surprise("abcd", np.array([np.nan, 0.9, 0.05, 0.0]), 1)
    depths = [float(depth) for depth in re.findall(r"/ (\d\.\d+)\)", html)]
    assert depths == sorted(depths)
    assert depths[0] == 0
    assert "100.0%" not in html
    assert re.findall(" checked><span.*?>(.)<", html) == ["b"]
    assert html.count(" checked") == 1


def test_attention_names_what_most_is_taken_from():
    weights_TT = np.tril(np.eye(4) + np.eye(4, k=-2))
    html = render.attention("abcd", weights_TT, 3, "layer 1, head 2", "character")
    assert "layer 1, head 2, at <b>d</b>: most from <b>b</b>, 2 characters before" in html


@pytest.mark.parametrize(
    ("text", "labels"),
    [("$a $\n", ["$", "a", "·", "$", "↵"]), ("日本", []), ("a" * 65, [])],
)
def test_the_maps_axes_are_the_text_where_it_can_be_read(text, labels, tmp_path):
    figure = render.attention_map(text, np.tril(np.ones(2 * (len(text),))), "layer 1", "character")
    figure.savefig(tmp_path / "map.png")
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == labels if labels else set("".join(shown)) <= set("0123456789\N{MINUS SIGN}")


# The answers, which do not trust the browser


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in ("hot", None, -1, math.nan, math.inf, [1], {})),
        *(("top_k", value) for value in (-1, 1.5, "many", math.inf, math.nan, None)),
        *(("top_p", value) for value in (0, 1.5, math.nan, "")),
        *(("seed", value) for value in (-1, 2**32, 0.5)),
        *(("max_new_tokens", value) for value in (0, -1, MAX_PAGE_TOKENS + 1, 1e300)),
    ],
)
def test_numbers_from_a_browser_are_checked(answer, name, value):
    assert list(answer.write("", "a", *numbers(max_new_tokens=1)))[-1][1] == ""
    ((text, wrong),) = answer.write("", "a", *numbers(**{name: value}))
    assert (text, f"{name} must be" in wrong) == ("a", True)


def numbers(**changes):
    return [changes.get(name, getattr(CONFIG, name)) for name in handlers.NUMBERS]


@pytest.mark.parametrize(
    ("start", "complaint"),
    [
        ("QZ", "&#x27;Q&#x27;, &#x27;Z&#x27;"),
        ("a" * (handlers.MAX_START + 1), "at most 10,000 characters"),
        ("FILE:book.txt", "&#x27;F&#x27;"),  # no file is read for a browser
    ],
)
def test_a_start_that_cannot_be_is_answered_and_not_raised(
    answer, home, monkeypatch, start, complaint
):
    monkeypatch.chdir(home)
    *_, (text, wrong) = answer.write("", start, *numbers())
    assert text == start
    assert complaint in wrong
    assert "view-error" in answer.see("QZ", "1", "1")[0]


def test_a_text_grows_from_its_start_and_continues_from_its_end(answer, session):
    config = dataclasses.replace(CONFIG, temperature=1.5, max_new_tokens=5)
    more = numbers(temperature=1.5, max_new_tokens=5)
    shown = list(answer.write("", "a c", *more))
    assert shown[0] == ("a c", "")
    assert shown[-1] == ("a c" + "".join(written(session, "a c", config)), "")
    *_, (longer, _) = answer.write(shown[-1][0], "a c", *more)
    whole = "".join(written(session, "a c", dataclasses.replace(config, max_new_tokens=10)))
    assert longer == "a c" + whole
    *_, (from_nothing, _) = answer.write("", "", *more)
    assert from_nothing.startswith("\n")


def test_a_text_that_is_full_is_not_continued(answer):
    text = "a" * (handlers.MAX_TEXT + 1)
    assert "full" in next(answer.write(text, "a", *numbers()))[1]


def test_a_position_past_the_text_is_its_last_character(answer):
    assert answer.choose("a cat", "1", "1", 99)[0] == 4
    assert answer.choose("a cat", "1", "1", -5)[0] == 0
    assert answer.choose("", "1", "1", 3) == (0, "", "")


def test_pieces_are_joined_until_some_time_has_passed(answer, monkeypatch):
    monkeypatch.setattr(nanogpt_jax, "stream", lambda *args, **settings: iter("bcdef"))
    for seconds, n_updates in (-1, 5), (99, 0):
        monkeypatch.setattr(handlers, "PIECE_S", seconds)
        texts = [text for text, _ in answer.write("", "a", *numbers())]
        assert texts == ["a", *("abcdef"[: n + 2] for n in range(n_updates)), "abcdef"]


def test_a_missing_loss_curve_is_answered_with_a_sentence(answer, tmp_path):
    figure, sentence = answer.loss()
    assert figure.axes
    assert "best val loss" in sentence
    figure, sentence = handlers.Handlers(new_session("bigram", folder=tmp_path), CONFIG).loss()
    assert figure is None
    assert "no curve" in sentence


# The server


def test_an_address_that_cannot_be_listened_on_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if Gradio were there
    with app.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port} .*--port 0"):
            app.listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"nowhere\.invalid"):
        app.listen("nowhere.invalid", 0)


def test_without_gradio_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[web\]'"):
        app.listen("127.0.0.1", 0)


# In a real browser

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def served(folder, *argv):
    """Run sample.py --web; yield (process, the line with its address)."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[web]'")
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with subprocess.Popen(
        script("sample.py", "--web", "--port=0", *argv), cwd=folder, env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of two layers, whose text has HTML in it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text(40 * TEXT + "".join(HOSTILE) + 10 * TEXT, encoding="utf-8")
    argv = (
        *("--config=tiny", "--n_layer=2", "--n_embd=16", f"--block_size={BLOCK_SIZE}"),
        *("--max_iters=60", "--eval_interval=20", "--dataset=book.txt", "--out_dir=out/run"),
    )
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(script("train.py", *argv), cwd=folder, env=environ, check=True)
    return folder


@pytest.fixture(scope="module")
def address(trained):
    with served(trained) as (_, line):
        yield re.search(r"http://\S+", line)[0]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'"
    )
    if not CHROMIUM:
        pytest.skip("there is no chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, opened. No host but its own may be asked, and nothing may go wrong in it."""
    foreign, complaints = [], []
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("request", lambda asked: foreign.append(asked.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#seen label")
    yield page
    context.close()
    assert not [url for url in foreign if not url.startswith((f"{address}/", "data:", "blob:"))]
    assert not complaints


class Controls:
    """The page's parts, as a person finds them."""

    def __init__(self, page):
        self.page = page
        self.start = page.get_by_label("Start text")
        self.text = page.locator("#text textarea")
        self.characters = page.locator("#seen label")
        self.forecast = page.locator("#forecast")
        self.attention = page.locator("#attention")

    def set_number(self, label, value):
        box = self.page.get_by_role("spinbutton", name=label)
        box.fill(str(value))
        box.press("Tab")

    def clear_text(self):
        self.text.click()
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.press("Backspace")

    def type_text(self, text):
        self.clear_text()
        self.page.keyboard.type(text)
        self.wait_for_seen(text[-BLOCK_SIZE:])

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def wait_for_text(self, condition):
        self.page.wait_for_function(
            f"(() => {{ const text = document.querySelector('#text textarea').value;"
            f" return {condition} }})()"
        )
        return self.text.input_value()

    def wait_for_seen(self, text):
        self.page.wait_for_function(
            "text => document.querySelector('#seen .text').textContent"
            ".replaceAll('↵', '') === text", arg=text,
        )  # fmt: skip


@pytest.fixture
def controls(page):
    return Controls(page)


@pytest.mark.slow
def test_only_names_of_this_machine_are_answered(address):
    """Or a site could point its own name at this machine, and read what the page writes."""
    port = int(address.rpartition(":")[2].rstrip("/"))
    expected = {f"localhost:{port}": 200, f"127.0.0.1:{port}": 200, "evil.example": 400}
    for host, status in expected.items():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/", headers={"Host": host})
            response = connection.getresponse()
            response.read()
        assert response.status == status, host


@pytest.mark.slow
@pytest.mark.parametrize(("n_mib", "is_too_large"), [(3, False), (5, True), (100, True)])
def test_a_request_without_end_is_refused(address, n_mib, is_too_large):
    """Gradio gathers all of a request before it looks at it."""
    port = int(address.rpartition(":")[2].rstrip("/"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    pieces = (bytes(2**20) for _ in range(n_mib))
    with contextlib.closing(connection):
        connection.request("POST", "/gradio_api/queue/join", pieces, encode_chunked=True)
        assert (connection.getresponse().status == 413) == is_too_large


@pytest.mark.slow
def test_text_arrives_piece_by_piece(controls):
    controls.page.evaluate(
        "() => { window.lengths = new Set(); setInterval(() => window.lengths.add("
        "document.querySelector('#text textarea').value.length), 10) }"
    )
    controls.start.fill("the cat")
    controls.set_number("Characters", MAX_PAGE_TOKENS)
    controls.press("Write")
    text = controls.wait_for_text(f"text.length == {len('the cat') + MAX_PAGE_TOKENS}")
    assert text.startswith("the cat")
    assert controls.page.evaluate("window.lengths.size") > 4
    controls.wait_for_seen(text[-BLOCK_SIZE:])


@pytest.mark.slow
def test_stop_stops_within_a_moment_and_continue_continues(controls):
    controls.set_number("Characters", MAX_PAGE_TOKENS)
    for _ in range(5):  # a tiny model may have written all before somebody can press Stop
        controls.clear_text()
        controls.press("Write")
        controls.wait_for_text("text.length > 20")
        controls.press("Stop")
        controls.page.wait_for_timeout(500)
        stopped = controls.text.input_value()
        if len(stopped) < MAX_PAGE_TOKENS:
            break
    controls.page.wait_for_timeout(500)
    assert controls.text.input_value() == stopped
    assert len(stopped) < MAX_PAGE_TOKENS
    controls.wait_for_seen(stopped[-BLOCK_SIZE:])
    controls.set_number("Characters", 10)
    controls.press("Continue")
    longer = controls.wait_for_text(f"text.length == {len(stopped) + 10}")
    assert longer.startswith(stopped)


@pytest.mark.slow
def test_temperature_zero_writes_the_same_text_twice(controls):
    controls.start.fill("the cat")
    controls.set_number("Characters", 40)

    def write():
        controls.clear_text()
        controls.press("Write")
        return controls.wait_for_text("text.length == 47")

    wild = write()
    controls.set_number("Temperature", 0)
    first = write()
    controls.set_number("Seed", 1)
    assert write() == first != wild


@pytest.mark.slow
def test_a_character_is_chosen_with_the_mouse_and_the_keys(controls):
    controls.type_text("the cat sat")
    controls.characters.nth(4).click()
    controls.forecast.get_by_text("After the␣c came a").wait_for()
    assert controls.forecast.locator("span.number").count() in (10, 11)
    controls.attention.get_by_text("layer 2, mean of heads, at c").wait_for()
    controls.page.keyboard.press("ArrowRight")
    controls.forecast.get_by_text("After the␣ca came t").wait_for()
    assert controls.page.locator("#seen :checked + span").inner_text() == "a"
    picture = controls.page.locator("#map img")
    before = picture.get_attribute("src")
    controls.page.locator("#layer").get_by_label("1").check()
    controls.page.locator("#head").get_by_label("2").check()
    controls.attention.get_by_text("layer 1, head 2, at a").wait_for()
    controls.page.wait_for_function(
        "before => document.querySelector('#map img').src !== before", arg=before
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text(controls, text):
    controls.type_text(text)
    controls.characters.nth(len(text) - 2).click()
    controls.forecast.get_by_text(f"came {text[-1]} (orange)").wait_for()
    assert controls.attention.locator(".text").text_content() == text
    assert (
        controls.page.locator(
            "#seen :is(script, img, b), #attention .text :is(script, img, b)"
        ).count()
        == 0
    )


@pytest.mark.slow
def test_unknown_characters_are_named_on_the_page(controls):
    controls.start.fill("the QZ")
    controls.press("Write")
    controls.page.get_by_role("alert").filter(has_text="'Q', 'Z'").first.wait_for()
    controls.start.fill("the")
    controls.press("Write")
    controls.wait_for_text("text.length > 100")
    controls.page.wait_for_function("!document.querySelector('[role=alert]')")


@pytest.mark.slow
def test_the_loss_is_on_the_second_tab(controls):
    controls.page.get_by_role("tab", name="Loss").click()
    controls.page.locator("#loss img").wait_for()
    assert "best val loss" in controls.page.locator("textarea:visible, input:visible").input_value()


@pytest.mark.slow
def test_ctrl_c_ends_it_though_a_page_is_open(home, browser):
    with served(home) as (process, line):
        assert re.fullmatch(r"the page is at http://127\.0\.0\.1:\d+ .*\n", line)
        page = browser.new_page()
        page.goto(re.search(r"http://\S+", line)[0])
        page.wait_for_selector("#seen label")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
        page.close()
    assert process.returncode == 130
    assert not stdout
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_an_address_that_others_reach_is_told(home):
    with served(home, "--host=0.0.0.0") as (process, line):
        port = int(re.search(r":(\d+)", line)[1])
        assert "anyone who can reach this machine" in process.stdout.readline()
        socket.create_connection(("127.0.0.1", port), timeout=10).close()


@pytest.mark.slow
def test_the_page_is_there_on_an_ipv6_address(home):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with served(home, "--host=::1") as (_, line):
        port = int(re.search(r"http://\[::1\]:(\d+)", line)[1])
        connection = http.client.HTTPConnection("::1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            assert connection.getresponse().status == 200

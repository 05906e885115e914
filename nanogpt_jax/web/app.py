"""The page to play on: python sample.py --web. Gradio's layout and the server; JAX is elsewhere."""

import dataclasses
import errno
import importlib.util
import ipaddress
import os
import socket
from pathlib import Path

from nanogpt_jax.config import MAX_PAGE_TOKENS, SampleConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.web import render as views
from nanogpt_jax.web.handlers import MAX_START, MEAN, Answers

# Whatever Gradio's files name, a browser asks no host but ours.
POLICY = (
    "default-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; frame-ancestors 'none'"
)
MOST_REQUEST_BYTES = 2**22  # what is typed is at most a hundredth of it
# Clicks and arrow keys choose a character.
CHOOSE = """
const choose = (character) => {
  if (!character) return;
  const before = element.querySelector('[aria-pressed=true]');
  before.setAttribute('aria-pressed', 'false');
  before.tabIndex = -1;
  character.setAttribute('aria-pressed', 'true');
  character.tabIndex = 0;
  character.focus();
  trigger('select', {position: Number(character.dataset.position)});
};
element.addEventListener('click', (event) => choose(event.target.closest('[role=button]')));
element.addEventListener('keydown', (event) => {
  const way = {ArrowLeft: 'previousElementSibling', ArrowRight: 'nextElementSibling'}[event.key];
  if (!way || !event.target.matches('[role=button]')) return;
  event.preventDefault();
  choose(event.target[way]);
});
"""
STYLE = f"""{views.STYLE}
footer {{ display: none !important; }}
#wrong:not(:has(p)) {{ display: none; }}
#loss {{ max-width: 60em; }}
"""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes a free one.

    Raises:
        InputError: Gradio is missing, the port is taken, or the address is not this machine's.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("--web needs gradio: pip install -e '.[web]'")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        hint = ": take another --port, or --port 0 for a free one" if taken else ""
        reason = "is in use" if taken else f"cannot be listened at ({error.strerror})"
        raise InputError(f"port {port} of host {host} {reason}{hint}") from None


def serve(player, config: SampleConfig, folder: Path | None, listener: socket.socket) -> None:
    """Serve the page until Ctrl-C.

    Args:
        player: a `player.Player`.
        config: the page's first settings.
        folder: of the run, whose loss is shown; None of weights from elsewhere.
        listener: see `listen`.
    """
    # Read when Gradio is imported: ask nobody for news, and keep no list of what was written.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    for _ in player.write(player.default_start, dataclasses.replace(config, max_new_tokens=1)):
        pass  # compiled now, and not while somebody waits for a first character
    # The system's fonts; explanations that can be read, where Gradio's are faint.
    theme = gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("monospace",)).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page(player, config, folder),
        path="/",
        footer_links=[],
        show_error=False,
        max_file_size=1,  # nothing is uploaded here
        ssr_mode=False,
        theme=theme,
        css=STYLE,
    )
    server = uvicorn.Server(
        uvicorn.Config(with_policy(app), log_level="critical", timeout_graceful_shutdown=1)
    )
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    name = f"[{host}]" if address.version == 6 else host
    print(f"the page is at http://{name}:{port} (Ctrl-C ends it)", flush=True)
    if not address.is_loopback:
        print("anybody who reaches this machine can use the page", flush=True)
    server.run(sockets=[listener])


def with_policy(app):
    """Return an ASGI app whose answers carry POLICY, and that hangs up on endless requests."""

    async def answer(scope, receive, send):
        n_bytes = 0

        async def receive_no_more():
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            return message if n_bytes <= MOST_REQUEST_BYTES else {"type": "http.disconnect"}

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        await app(scope, receive_no_more, send_with_policy)

    return answer


def page(player, config: SampleConfig, folder: Path | None):
    """Return the page as gradio.Blocks; see `serve`."""
    import gradio as gr

    answers, unit = Answers(player, config, folder), player.unit
    name = folder.resolve().name if folder else config.init_from
    n_heads = player.n_heads
    has_attention = bool(n_heads)

    # Gradio finds who clicked by the type of the parameter.
    def grow(text, start, temperature, top_k, top_p, seed, max_new_tokens, event: gr.EventData):
        numbers = temperature, top_k, top_p, seed, max_new_tokens
        if event.target is go_on_button:
            yield from answers.go_on(text, start, *numbers)
        else:
            yield from answers.write(start, *numbers)

    def choose(seen, layer, head, event: gr.EventData):
        return answers.choose(seen, layer, head, event.position)

    start = config.start or player.default_start
    block_size = player.model.config.block_size
    with gr.Blocks(title="nanogpt_jax", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(
            f"# nanogpt_jax: {name}\nA model that writes one {unit} after the other. For each it "
            f"reads the last {block_size:,} {unit}s at the most, and draws the next by their "
            "probabilities."
        )
        with gr.Tab("Write"), gr.Row():
            with gr.Column(scale=5, min_width=320):
                start_box = gr.Textbox(
                    config.start, label="Start text", lines=2, max_lines=6, max_length=MAX_START,
                    info="What the model reads first. Empty: a line break.", elem_id="start",
                )  # fmt: skip
                with gr.Row():
                    write_button = gr.Button("Write", variant="primary", min_width=80)
                    stop_button = gr.Button("Stop", min_width=80)
                    go_on_button = gr.Button("Go on", min_width=80)
                wrong = gr.HTML(elem_id="wrong")
                text_box = gr.Textbox(
                    start, label="Text", lines=16, max_lines=16, elem_id="text",
                    info="You can change it; “Go on” continues from its end.",
                )  # fmt: skip
                with gr.Row():
                    temperature = gr.Slider(
                        0, max(2, config.temperature), config.temperature, step=0.05,
                        label="Temperature", min_width=200,
                        info=f"Low: safe. High: wild. 0: always the likeliest {unit}.",
                    )  # fmt: skip
                    max_new_tokens = gr.Slider(
                        1, MAX_PAGE_TOKENS, config.max_new_tokens, step=1,
                        label=f"{unit.capitalize()}s",
                        min_width=200, info="How many to write.",
                    )  # fmt: skip
                with gr.Row():
                    top_k = gr.Number(
                        config.top_k, label="Top-k", precision=0, min_width=120,
                        info="Draw from the k likeliest only; 0: from all.",
                    )  # fmt: skip
                    top_p = gr.Number(
                        config.top_p, label="Top-p", step=0.05, min_width=120,
                        info="Draw from the likeliest that together have this probability.",
                    )  # fmt: skip
                    seed = gr.Number(
                        config.seed, label="Seed", precision=0, min_width=120,
                        info="The same seed and settings give the same text.",
                    )  # fmt: skip
            with gr.Column(scale=6, min_width=320):
                gr.Markdown(
                    f"### What the model sees\nThe last {block_size:,} {unit}s of the text. The "
                    f"deeper the orange, the less the model expected that {unit}. Click one, or "
                    "move with the arrow keys."
                )
                seen = gr.HTML(js_on_load=CHOOSE, elem_id="seen")
                gr.Markdown("### What it expects next")
                forecast = gr.HTML(elem_id="forecast")
                gr.Markdown(
                    "### Where it looks\nTo decide what comes next, attention takes something from "
                    f"each {unit} so far: the deeper the blue, the more. Layers work one after "
                    "the other, the heads of a layer side by side."
                    if has_attention
                    else "### Where it looks\nNowhere: this model has no attention. It knows the "
                    f"last {unit} only."
                )
                with gr.Row(visible=has_attention):
                    layer = gr.Radio(
                        [str(n + 1) for n in range(len(n_heads))], label="Layer", scale=4,
                        value=str(len(n_heads)) if n_heads else None, elem_id="layer",
                    )  # fmt: skip
                    head = gr.Radio(
                        [MEAN, *(str(n + 1) for n in range(max(n_heads, default=0)))],
                        label="Head", scale=5, value=MEAN, elem_id="head",
                    )  # fmt: skip
                attention = gr.HTML(elem_id="attention", visible=has_attention)
                gr.Markdown(
                    "All of them at once, a row for each: what it takes from those before it.",
                    visible=has_attention,
                )
                attention_map = gr.Plot(
                    show_label=False, visible=has_attention, elem_id="map", elem_classes="picture"
                )
        with gr.Tab("Loss") as loss_tab:
            gr.Markdown(
                "How wrong the model was while it was trained: the mean surprise at the next "
                f"{unit}, in nats. Validation is on text that it was not trained on."
            )
            loss_plot = gr.Plot(show_label=False, elem_id="loss", elem_classes="picture")
            loss_line = gr.Textbox(show_label=False, container=False, interactive=False)

        private = {"api_visibility": "private", "show_progress": "hidden"}
        latest = private | {"trigger_mode": "always_last"}
        window, position = gr.State(""), gr.State(0)
        see = private | {
            "fn": answers.see,
            "inputs": [text_box, layer, head],
            "outputs": [seen, window, position, forecast, attention, attention_map],
        }
        grown = gr.on(  # one event of both buttons: while one writes, the other waits for Stop
            [write_button.click, go_on_button.click],
            grow,
            [text_box, start_box, temperature, top_k, top_p, seed, max_new_tokens],
            [text_box, wrong],
            **private,
        )
        grown.then(**see)
        stop_button.click(None, cancels=[grown], **private).then(**see)
        text_box.input(**see, trigger_mode="always_last")
        blocks.load(**see)
        place = [window, layer, head]
        seen.select(choose, place, [position, forecast, attention], **latest)
        for radio in layer, head:
            radio.input(answers.attention, [*place, position], attention, **latest)
            radio.input(answers.map, place, attention_map, **latest)
        loss_tab.select(answers.loss, None, [loss_plot, loss_line], **private)
    return blocks.queue(max_size=20, default_concurrency_limit=2)

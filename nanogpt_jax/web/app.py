"""The page's layout in Gradio, and its server: python sample.py --web"""

import dataclasses
import errno
import importlib.util
import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanogpt_jax
from nanogpt_jax.config import MAX_PAGE_TOKENS, SampleConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.web.handlers import MAX_START, MEAN, Handlers

if TYPE_CHECKING:
    from nanogpt_jax import TrainedModel
    from nanogpt_jax.web.session import Session

# Whatever Gradio's files name, the browser asks no host but this one.
POLICY = (
    "default-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; frame-ancestors 'none'"
)
MAX_REQUEST_BYTES = 2**22  # a hundred times what can be typed
CHOOSE = """element.addEventListener('change', (event) => {
  trigger('select', {position: Number(event.target.value)});
});"""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; port 0 takes a free one."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("--web needs gradio: pip install -e '.[web]'")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        hint = "take another --port, or --port 0 for a free one"
        hint = hint if is_taken else "--host must be an address of this machine, like 127.0.0.1"
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}): {hint}") from None


def serve(run: "TrainedModel", config: SampleConfig, listener: socket.socket) -> None:
    """Serve the page, which starts with the settings of `config`, until Ctrl-C."""
    # Gradio reads these when it is imported: no telemetry, and no record of what was written.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from nanogpt_jax.web.session import Session

    session = Session(run)
    two_tokens = nanogpt_jax.settings_of(dataclasses.replace(config, max_new_tokens=2))
    list(nanogpt_jax.stream(run, **two_tokens))  # compile before anyone waits
    # The system's fonts, and explanations darker than Gradio's, which are hard to read.
    theme = gr.Theme(font=("system-ui", "sans-serif"), font_mono=("monospace",)).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page(session, config), path="/", theme=theme,
        css_paths=Path(__file__).with_name("page.css"), footer_links=[], show_error=False,
        ssr_mode=False, max_file_size=1,  # nothing is uploaded
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    name = f"[{host}]" if address.version == 6 else host
    if address.is_loopback:
        # A site whose name is pointed at this machine afterwards still sends its own.
        app = TrustedHostMiddleware(app, ["localhost", name], www_redirect=False)
    options = uvicorn.Config(
        RequestBodyLimitMiddleware(app, MAX_REQUEST_BYTES), log_level="critical",
        headers=[("content-security-policy", POLICY)], timeout_graceful_shutdown=1,
    )  # fmt: skip
    print(f"the page is at http://{name}:{port} (Ctrl-C stops it)", flush=True)
    if not address.is_loopback:
        print("anyone who can reach this machine can use the page", flush=True)
    uvicorn.Server(options).run(sockets=[listener])


def page(session: "Session", config: SampleConfig):
    """Return the page as gradio.Blocks."""
    import gradio as gr

    handlers, unit, n_heads = Handlers(session, config), session.unit, session.n_heads
    folder, block_size = session.run.folder, session.run.config.block_size
    name = folder.resolve().name if folder else session.run.name

    # Gradio passes the event to the parameter annotated with its type.
    def write(event: gr.EventData, text, *start_and_numbers):
        is_continued = event.target is continue_button
        yield from handlers.write(text if is_continued else "", *start_and_numbers)

    def choose(event: gr.EventData, seen, layer, head):
        return handlers.choose(seen, layer, head, event.position)

    with gr.Blocks(title="nanogpt_jax", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(
            f"# nanogpt_jax: {name}\nA model that writes one {unit} at a time: it reads at most "
            f"the last {block_size:,} {unit}s and draws the next one from its probabilities."
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
                    continue_button = gr.Button("Continue", min_width=80)
                wrong = gr.HTML(elem_id="wrong")
                text_box = gr.Textbox(
                    config.start or session.tokenizer.default_start, label="Text", elem_id="text",
                    lines=16, max_lines=16,
                    info="You can edit it; “Continue” writes on from its end.",
                )  # fmt: skip
                with gr.Row():
                    temperature = gr.Slider(
                        0, max(2, config.temperature), config.temperature, step=0.05,
                        label="Temperature", min_width=200,
                        info=f"Low: safe. High: wild. 0: always the likeliest {unit}.",
                    )  # fmt: skip
                    max_new_tokens = gr.Slider(
                        1, MAX_PAGE_TOKENS, config.max_new_tokens, step=1, min_width=200,
                        label=f"{unit.capitalize()}s", info="How many to write.",
                    )  # fmt: skip
                with gr.Row():
                    top_k = gr.Number(
                        config.top_k, label="Top-k", precision=0, min_width=120,
                        info="Draw only from the k likeliest; 0: from all.",
                    )  # fmt: skip
                    top_p = gr.Number(
                        config.top_p, label="Top-p", step=0.05, min_width=120,
                        info="Draw only from the likeliest that together have this probability.",
                    )  # fmt: skip
                    seed = gr.Number(
                        config.seed, label="Seed", precision=0, min_width=120,
                        info="The same seed and settings give the same text.",
                    )  # fmt: skip
            with gr.Column(scale=6, min_width=320):
                gr.Markdown(
                    f"### What the model sees\nThe last {block_size:,} {unit}s of the text. The "
                    f"deeper the orange, the less the model expected that {unit}. Click one, or "
                    "use the arrow keys."
                )
                seen = gr.HTML(js_on_load=CHOOSE, elem_id="seen")
                gr.Markdown("### What it expects next")
                forecast = gr.HTML(elem_id="forecast")
                gr.Markdown(
                    f"### Where it looks\nTo predict the next {unit}, attention takes something "
                    f"from each {unit} so far: the deeper the blue, the more. Layers run one after "
                    "the other, the heads of a layer side by side."
                    if n_heads
                    else "### Where it looks\nNowhere: this model has no attention. It sees only "
                    f"the last {unit}."
                )
                with gr.Column(visible=bool(n_heads)):
                    layers = [str(n + 1) for n in range(len(n_heads))]
                    heads = [MEAN, *(str(n + 1) for n in range(max(n_heads, default=0)))]
                    with gr.Row():
                        last = layers[-1] if layers else None
                        layer = gr.Radio(
                            layers, value=last, label="Layer", elem_id="layer", scale=4
                        )
                        head = gr.Radio(heads, value=MEAN, label="Head", elem_id="head", scale=5)
                    attention = gr.HTML(elem_id="attention")
                    gr.Markdown(
                        f"All of them at once: each row shows what one {unit} takes from those "
                        "before."
                    )
                    attention_map = gr.Plot(show_label=False, elem_id="map", elem_classes="picture")
        with gr.Tab("Loss") as loss_tab:
            gr.Markdown(
                f"How wrong the model was during training: its mean surprise at the next {unit}, "
                "in nats. The validation text was not used for training."
            )
            loss_plot = gr.Plot(show_label=False, elem_id="loss", elem_classes="picture")
            loss_line = gr.Textbox(show_label=False, container=False, interactive=False)

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        latest: dict[str, Any] = private | {"trigger_mode": "always_last"}
        window, position = gr.State(""), gr.State(0)
        see: dict[str, Any] = private | {
            "fn": handlers.see,
            "inputs": [text_box, layer, head],
            "outputs": [seen, window, position, forecast, attention, attention_map],
        }
        grown = gr.on(  # one event for both buttons: while one writes, the other waits for Stop
            [write_button.click, continue_button.click],
            write,
            [text_box, start_box, temperature, top_k, top_p, seed, max_new_tokens],
            [text_box, wrong],
            **private,
        )
        grown.then(**see)
        stop_button.click(None, cancels=[grown], **private).then(**see)
        text_box.input(**see, trigger_mode="always_last")
        blocks.load(**see)
        chosen = [window, layer, head]
        seen.select(choose, chosen, [position, forecast, attention], **latest)
        for radio in layer, head:
            radio.input(handlers.attention, [*chosen, position], attention, **latest)
            radio.input(handlers.map, chosen, attention_map, **latest)
        loss_tab.select(handlers.loss, None, [loss_plot, loss_line], **private)
    return blocks.queue(max_size=20, default_concurrency_limit=2)

"""The local page of `blipfast serve`, by Gradio."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from blipfast.errors import BlipfastError, ConfigError
from blipfast.serve.app import ServeConfig, Studio
from blipfast.serve.folder import load_thumbnail

_INTRO = {
    "caption": "What is in the picture? Beam search gives a likely caption, sampling varied ones.",
    "vqa": "Ask about the picture, in a few words: *what colour is the car?*",
    "retrieval": "How well do texts fit the picture? For the best one, each word is shown with "
    "where in the picture it looks.",
    "search": "Pictures of the folder that fit a text, the best first.",
}


def serve(config: ServeConfig, say: Callable[[str], None] = print) -> None:
    """Opens the page and serves it until it is stopped (Ctrl-C).

    say: told the address. Raises ConfigError without Gradio or when the port is taken.
    """
    try:
        import gradio
    except ImportError as error:
        raise ConfigError("serve needs Gradio: pip install 'blipfast[gradio]'") from error
    page = build_page(Studio(config), gradio)
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port or None,
            max_file_size=int(config.max_upload_mb * 1_000_000),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {config.host}:{config.port} ({error}); choose another by --port"
        ) from error
    say(address)
    page.block_thread()


def build_page(studio: Studio, gr: Any) -> Any:
    """The page of what the studio has. gr: the module gradio."""

    def upload(name: str) -> Any:
        image = gr.Image(
            label="Picture", type="filepath", sources=["upload", "clipboard"], height=320,
            elem_id=name,
        )  # fmt: skip
        # The file as it came: reading it, with its limits and errors, is the studio's.
        image.preprocess = lambda payload: None if payload is None else payload.path
        return image

    def on(button: Any, act: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        button.click(
            _in_words(act, gr), inputs, outputs, concurrency_id="models", concurrency_limit=1
        )

    with gr.Blocks(title="blipfast", analytics_enabled=False) as page:
        gr.Markdown("# blipfast")
        if "caption" in studio.tasks:
            with gr.Tab("Captions"):
                _captions(studio, gr, upload, on)
        if "vqa" in studio.tasks:
            with gr.Tab("Questions"):
                _questions(studio, gr, upload, on)
        if "retrieval" in studio.tasks:
            with gr.Tab("Match"):
                _match(studio, gr, upload, on)
        if studio.index is not None:
            with gr.Tab("Search"):
                _search(studio, gr, on)
    return page


def _captions(studio: Studio, gr: Any, upload: Any, on: Any) -> None:
    gr.Markdown(_INTRO["caption"])
    with gr.Row():
        with gr.Column():
            image = upload("caption-image")
            with gr.Row():
                samples = gr.Slider(1, 10, 3, step=1, label="Samples")
                seed = gr.Number(0, precision=0, label="Seed")
            button = gr.Button("Write captions", variant="primary", elem_id="caption-go")
        with gr.Column():
            best = gr.Textbox(label="Beam search", elem_id="caption-beam")
            sampled = gr.Textbox(label="Sampled", lines=4, elem_id="caption-sampled")

    def act(path: str | None, count: float, number: float) -> tuple[str, str]:
        one, more = studio.captions(path, int(count), int(number or 0))
        return one, "\n".join(more)

    on(button, act, [image, samples, seed], [best, sampled])


def _questions(studio: Studio, gr: Any, upload: Any, on: Any) -> None:
    gr.Markdown(_INTRO["vqa"])
    with gr.Row():
        with gr.Column():
            image = upload("question-image")
            question = gr.Textbox(
                label="Question", placeholder="what is in the picture?", elem_id="question-text"
            )
            button = gr.Button("Ask", variant="primary", elem_id="question-go")
        with gr.Column():
            answer = gr.Textbox(label="Answer", elem_id="question-answer")
    on(button, studio.answer, [image, question], [answer])


def _match(studio: Studio, gr: Any, upload: Any, on: Any) -> None:
    gr.Markdown(_INTRO["retrieval"])
    with gr.Row():
        with gr.Column():
            image = upload("match-image")
            texts = gr.Textbox(
                label="Texts, a line each", lines=4, elem_id="match-texts",
                placeholder="a dog on a beach\na cat on a mat",
            )  # fmt: skip
            button = gr.Button("Score", variant="primary", elem_id="match-go")
        with gr.Column():
            table = gr.Dataframe(
                headers=["text", "ITM probability", "ITC cosine"], interactive=False,
                elem_id="match-table",
            )  # fmt: skip
    words = gr.Gallery(label="Where each word looks", columns=6, elem_id="match-words")

    def act(path: str | None, lines: str) -> tuple[list[list[str]], list[Any]]:
        rows = studio.scores(path, lines)
        cells = [[text, f"{itm:.4f}", f"{itc:+.4f}"] for text, itm, itc in rows]
        return cells, studio.words(path, rows[0][0])

    on(button, act, [image, texts], [table, words])


def _search(studio: Studio, gr: Any, on: Any) -> None:
    assert studio.index is not None
    gr.Markdown(f"{_INTRO['search']} {len(studio.index.paths):,} pictures.")
    with gr.Row():
        text = gr.Textbox(
            label="Text", placeholder="a dog on a beach", scale=4, elem_id="search-text"
        )
        count = gr.Slider(1, 30, 10, step=1, label="Pictures", scale=1)
    button = gr.Button("Search", variant="primary", elem_id="search-go")
    gallery = gr.Gallery(label="Found", columns=5, elem_id="search-found")

    def act(words: str, number: float) -> list[tuple[Any, str]]:
        return [
            (load_thumbnail(one.path), f"{one.path.name}: {one.itm:.3f}")
            for one in studio.search(words, int(number))
        ]

    on(button, act, [text, count], [gallery])


def _in_words(act: Callable[..., Any], gr: Any) -> Callable[..., Any]:
    """An error on purpose becomes a message on the page; any other, one that gives nothing away."""

    @functools.wraps(act)
    def run(*values: Any) -> Any:
        try:
            return act(*values)
        except BlipfastError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error(
                "this did not work; the server's log says why", print_exception=True
            ) from error

    return run

"""The search page as a Gradio application, and serving it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"gradio is not there ({error}): pip install 'd2svse[demo]'") from None
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from d2svse.images import ImageError
from d2svse.retrieval.image_text_index import ImageTextIndex
from d2svse.retrieval.search import DEFAULT_RERANK
from d2svse.serving.asking import Answer, Searcher
from d2svse.serving.html import (
    FOLDER,
    PAGE,
    heading,
    page_start,
    show_hits,
    show_message,
    show_range,
    show_reason,
)
from d2svse.serving.pictures import LARGE, SMALL, Pictures

RERANKED, VECTORS = "re-ranked", "vectors only"
HERE = Path(__file__).parent
HOURS_KEPT = 12  # of what was uploaded and of a session's answers

# A picture that is being read is faded out, so that none stands under another's name.
WATCH_PICTURES = """
const fail = (image) => {
  image.style.display = 'none';
  image.parentElement.dataset.why = 'cannot be read any more';
};
const watchPictures = () => {
  for (const image of element.querySelectorAll('.d2-frame img')) {
    image.onload = () => { image.style.opacity = 1; };
    image.onerror = () => fail(image);
    if (!image.complete) image.style.opacity = 0;
    else if (!image.naturalWidth) fail(image);
  }
};
"""
ON_CARDS = (
    WATCH_PICTURES
    + """
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-place]');
  if (card) trigger('select', {place: Number(card.dataset.place)});
});
watch('value', () => {
  watchPictures();
  const top = element.getBoundingClientRect().top;
  if (top < 0) window.scrollTo({top: window.scrollY + top - 80});
});
"""
)
ON_REASON = (
    WATCH_PICTURES
    + """
watch('value', () => {
  watchPictures();
  const top = element.getBoundingClientRect().top;
  if (props.value && (top < 0 || top > window.innerHeight * 0.7)) window.scrollTo({top: window.scrollY + top - 60});
});
"""
)


def _take_files_as_they_are(picture: gr.Image) -> None:
    """Hand over an uploaded file untouched, so that what is no picture gets the library's message; fetch no address.

    The methods are replaced on the object, because Gradio writes a file beside the source of a subclass. It makes a new
    object for a session in which the component was an output of an event, so this one must never be an output.
    """
    move = picture.async_move_resource_to_block_cache

    async def move_file(place: str | Path | None) -> str | None:
        if str(place).startswith(("http:", "https:")):
            raise gr.Error("Give a picture, not an address: nothing is fetched from elsewhere.")
        return await move(place)

    picture.async_move_resource_to_block_cache = move_file
    picture.preprocess = lambda payload: None if payload is None else payload.path


class SearchPage:
    """The page of an index; what a user has asked is kept in the user's own session.

    Args:
        index: the index. Its model is loaded here.

    Attributes:
        blocks: the Gradio application.

    Raises:
        FileNotFoundError: if the model is not there any more.
        ValueError: if the index is empty or the model is another.
    """

    def __init__(self, index: ImageTextIndex) -> None:
        self.searcher, self.pictures = Searcher(index), Pictures()
        self.blocks = gr.Blocks(
            title=f"Search {self.searcher.things}",
            analytics_enabled=False,
            delete_cache=(3600, 3600 * HOURS_KEPT),
            fill_width=True,
        )
        with self.blocks:
            self._build()

    def launch(self, host: str = "127.0.0.1", port: int | None = None, *, share: bool = False) -> str | None:
        """Start to serve, and come back.

        Args:
            host: the address to listen at.
            port: a free port; without it the first free one from 7860 on.
            share: ask Gradio's servers for a public address too.

        Returns:
            The public address, None without one.
        """
        route = Route(f"/{FOLDER}/{{size}}/{{name}}.jpg", self._picture)
        _, _, public = self.blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            inline=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            footer_links=[],
            run_history=False,
            max_file_size="64mb",
            app_kwargs={"routes": [route]},
            enable_monitoring=False,
            ssr_mode=False,
            theme=gr.themes.Default(
                primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
            ),
            css_paths=[HERE / "style.css"],
        )
        return public

    def _build(self) -> None:
        searcher = self.searcher
        answer, first = gr.State(None, time_to_live=3600 * HOURS_KEPT), gr.State(0)
        gr.HTML(heading(searcher), apply_default_css=False)
        with gr.Row(elem_id="d2-query"):
            with gr.Column(scale=4, min_width=280, elem_id="d2-words"):
                with gr.Row(elem_id="d2-line"):
                    sentence = gr.Textbox(
                        placeholder="Describe what you look for",
                        show_label=False,
                        container=False,
                        scale=5,
                        min_width=160,
                        autofocus=True,
                        max_lines=1,
                        elem_id="d2-sentence",
                    )
                    button = gr.Button("Search", variant="primary", scale=0, min_width=96, elem_id="d2-search")
                with gr.Row(elem_id="d2-options"):
                    ranking = gr.Radio(
                        [RERANKED, VECTORS], value=RERANKED if searcher.can_rerank else VECTORS, show_label=False,
                        info=f"{searcher.similarity} compares words with patches, for the best {DEFAULT_RERANK}",
                        visible=searcher.can_rerank, min_width=200, elem_id="d2-ranking",
                    )  # fmt: skip
                    weight = gr.Slider(
                        0, 1, 0.5, step=0.05,
                        label="Weight of the sentence",
                        visible=False, min_width=200, elem_id="d2-weight",
                    )  # fmt: skip
            picture = gr.Image(
                type="filepath", image_mode=None, sources=["upload"], show_label=False, buttons=[],
                height=96, scale=1, min_width=200, placeholder="or drop a picture", elem_id="d2-picture",
            )  # fmt: skip
            _take_files_as_they_are(picture)
        message = gr.HTML("", apply_default_css=False, elem_id="d2-message")
        with gr.Row(elem_id="d2-answers"):
            with gr.Column(scale=3, min_width=280, elem_id="d2-found"):
                hits = gr.HTML("", js_on_load=ON_CARDS, apply_default_css=False, elem_id="d2-hits")
                with gr.Row(visible=False, elem_id="d2-pager") as pager:
                    previous = gr.Button("Previous", size="sm", min_width=80, scale=0, elem_id="d2-previous")
                    shown = gr.HTML("", apply_default_css=False, elem_id="d2-shown")
                    following = gr.Button("Next", size="sm", min_width=80, scale=0, elem_id="d2-next")
            with gr.Column(scale=2, min_width=280, visible=False, elem_id="d2-why") as why:
                close = gr.Button("Close", size="sm", elem_id="d2-close")
                reason = gr.HTML("", js_on_load=ON_REASON, apply_default_css=False, elem_id="d2-reason")

        def page(new: Answer | None, start: int) -> dict[Any, Any]:
            there = new is not None
            count = len(new.hits) if new is not None else 0
            return {
                first: start,
                hits: show_hits(new, start, searcher, self.pictures),
                shown: show_range(new, start, searcher.things),
                pager: gr.update(visible=there),
                previous: gr.update(interactive=start > 0),
                following: gr.update(interactive=start + PAGE < count),
            }

        def search(words: str | None, file: str | None, share: float, how: str) -> dict[Any, Any]:
            try:
                new = searcher.ask(words, file, share, rerank=how == RERANKED)
            except ImageError as error:
                return {message: show_message(f"{error}. Take it away, or drop another.", "error")}
            except (ValueError, OSError) as error:
                return {message: show_message(str(error), "error")}
            return {
                answer: new, message: show_message(new.notes), why: gr.update(visible=False), reason: "",
                **page(new, 0),
            }  # fmt: skip

        def turn(new: Answer | None, start: int) -> dict[Any, Any]:
            if new is None:
                return {message: show_message("Nothing to turn over: search first.", "error")}
            return page(new, page_start(len(new.hits), start))

        def explain(new: Answer | None, event: gr.EventData) -> dict[Any, Any]:
            try:
                found = searcher.explain(new, int(event._data["place"]))
            except (ValueError, TypeError, KeyError) as error:
                return {message: show_message(str(error), "error")}
            assert new is not None
            return {reason: show_reason(new, found, searcher, self.pictures), why: gr.update(visible=True)}

        paging: Sequence[Any] = [first, hits, shown, pager, previous, following, message]
        asked: dict[str, Any] = {
            "fn": search,
            "inputs": [sentence, picture, weight, ranking],
            "outputs": [answer, why, reason, *paging],
            "show_progress": "minimal",
            "show_progress_on": hits,
        }
        gr.on([button.click, sentence.submit, picture.upload], **asked, api_name="search")
        gr.on([ranking.input, weight.release], **asked, api_visibility="private")
        picture.change(
            lambda file: gr.update(visible=file is not None), picture, weight, show_progress="hidden", queue=False,
            api_visibility="private",
        )  # fmt: skip
        quick: dict[str, Any] = {"inputs": [answer, first], "outputs": paging, "show_progress": "hidden"}
        quick["concurrency_limit"] = None
        following.click(lambda new, start: turn(new, start + PAGE), **quick, api_name="next")
        previous.click(lambda new, start: turn(new, start - PAGE), **quick, api_name="previous")
        hits.select(
            explain, answer, [reason, why, message], show_progress="minimal", show_progress_on=hits,
            api_visibility="private",
        )  # fmt: skip
        close.click(
            lambda: gr.update(visible=False), None, why, show_progress="hidden", queue=False, api_visibility="private"
        )

    def _picture(self, request: Request) -> Response:
        sizes = {"small": SMALL, "large": LARGE}
        try:
            data = self.pictures.read(request.path_params["name"], sizes[request.path_params["size"]])
        except KeyError:
            return PlainTextResponse("no such picture", 404)
        except ImageError:
            return PlainTextResponse("the picture cannot be read any more", 404)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

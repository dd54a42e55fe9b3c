"""Build and serve the search page as a Gradio application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"gradio is not installed ({error}): run pip install 'd2svse[demo]'") from None
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from d2svse.images import ImageError
from d2svse.retrieval.search.hits import DEFAULT_RERANK
from d2svse.retrieval.search.image_text_index import ImageTextIndex
from d2svse.serving.asking import Answer, Searcher
from d2svse.serving.guard import Guard, Hosts
from d2svse.serving.html import PAGE, heading, page_start, show_hits, show_message, show_range, show_reason
from d2svse.serving.images import FOLDER, LARGE, SMALL, ShownImages
from d2svse.serving.uploads import HOURS_KEPT, MOST_BYTES, Upload, Uploads

RERANKED, VECTORS = "re-ranked", "vectors only"
HERE = Path(__file__).parent
MOST_SESSIONS = 200  # sessions whose answers are kept; the least recently used is dropped first
MOST_UNREAD, MOST_UNREAD_OF_ONE, SECONDS_UNREAD = 256, 32, 300  # limits of answers that nobody has fetched yet

# An image is invisible while it loads, so that no image appears under the name of another.
WATCH_IMAGES = """
const fail = (image) => {
  image.style.display = 'none';
  image.parentElement.dataset.why = 'cannot be read any more';
};
const watchImages = () => {
  for (const image of element.querySelectorAll('.d2-frame img')) {
    image.onload = () => { image.style.opacity = 1; };
    image.onerror = () => fail(image);
    if (!image.complete) image.style.opacity = 0;
    else if (!image.naturalWidth) fail(image);
  }
};
"""
ON_CARDS = (
    WATCH_IMAGES
    + """
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-position]');
  if (card) trigger('select', {position: Number(card.dataset.position)});
});
watch('value', () => {
  watchImages();
  const top = element.getBoundingClientRect().top;
  if (top < 0) window.scrollTo({top: window.scrollY + top - 80});
});
"""
)
ON_REASON = (
    WATCH_IMAGES
    + """
watch('value', () => {
  watchImages();
  const top = element.getBoundingClientRect().top;
  if (props.value && (top < 0 || top > window.innerHeight * 0.7)) window.scrollTo({top: window.scrollY + top - 60});
});
"""
)


def _bound_queue(queue: Any) -> None:
    """Limit the answers that wait to be fetched, in total and for each session; keep only the position of an event.

    Gradio keeps each answer until a browser fetches it. Answers that wait for some minutes are dropped.
    """
    push = queue.push
    joined: dict[str, float] = {}  # time of each session's last request

    def forget(now: float) -> None:
        for session, events in list(queue.pending_event_ids_session.items()):
            stale = now - joined.get(session, now) > SECONDS_UNREAD
            if stale and not any(event in queue.event_ids_to_events for event in events):
                queue.pending_event_ids_session.pop(session, None)
                queue.pending_messages_per_session.pop(session, None)
        for session in [session for session in joined if session not in queue.pending_event_ids_session]:
            del joined[session]

    async def push_bounded(body: Any, request: Any, username: str | None) -> Any:
        position = body.event_data.get("position") if isinstance(body.event_data, dict) else None
        body.event_data = {"position": position} if isinstance(position, int | float) else None
        forget(time.monotonic())
        waiting = queue.pending_event_ids_session
        own = len(waiting.get(body.session_hash, ()))
        if own >= MOST_UNREAD_OF_ONE or sum(map(len, waiting.values())) >= MOST_UNREAD:
            return False, "The page is busy: try again in a minute.", "queue_full"
        done = await push(body=body, request=request, username=username)
        joined[body.session_hash] = time.monotonic()
        return done

    queue.push = push_bounded


class SearchPage:
    """The search page of an index; each user's answers stay in the user's own session.

    Args:
        index: the index; the constructor loads its model.

    Attributes:
        blocks: the Gradio application.

    Raises:
        FileNotFoundError: if the folder of the model is missing.
        ValueError: if the index is empty, or another model built it.
    """

    def __init__(self, index: ImageTextIndex) -> None:
        self.searcher, self.images, self.uploads = Searcher(index), ShownImages(), Uploads()
        self.blocks = gr.Blocks(title=f"Search {self.searcher.things}", analytics_enabled=False, fill_width=True)
        with self.blocks:
            self._build()
        self._guard_inputs()
        _bound_queue(self.blocks._queue)

    def launch(
        self,
        host: str = "127.0.0.1",
        port: int | None = None,
        *,
        share: bool = False,
        allowed_hosts: Sequence[str] = (),
    ) -> str | None:
        """Start the server and return.

        Args:
            host: the address to listen at.
            port: a free port; None for the first free one from 7860 on.
            share: also open a public link through Gradio's servers.
            allowed_hosts: host names of the page besides localhost and `host`; see `Hosts`.

        Returns:
            The public URL, or None.

        Raises:
            ValueError: if a name in `allowed_hosts` is not a host name.
        """
        hosts = Hosts(host, allowed_hosts)
        route = Route(f"/{FOLDER}/{{size}}/{{name}}.jpg", self._image)

        @asynccontextmanager
        async def guarded(app: Any) -> AsyncIterator[None]:
            # Middleware in app_kwargs would run behind Gradio's own, which already answers requests of other sites.
            app.middleware_stack = Guard(app.middleware_stack, hosts, self.uploads)
            app.uploaded_file_dir = self.uploads.folder
            cleaning = asyncio.create_task(self._remove_old_uploads())
            yield
            cleaning.cancel()

        _, _, public = self.blocks.launch(
            server_name=f"[{host.strip('[]')}]" if ":" in host else host,
            server_port=port,
            share=share,
            inline=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,  # the server's terminal shows unexpected errors
            footer_links=[],
            run_history=False,
            max_file_size=MOST_BYTES,
            state_session_capacity=MOST_SESSIONS,
            app_kwargs={"routes": [route], "lifespan": guarded},
            enable_monitoring=False,
            ssr_mode=False,
            theme=gr.themes.Default(
                primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
            ),
            css_paths=[HERE / "style.css"],
        )
        if public:
            hosts.named.add(urlsplit(public).hostname or "")
        return public

    def close(self) -> None:
        """Stop the server and remove the uploads."""
        self.blocks.close(verbose=False)
        self.uploads.close()

    def _guard_inputs(self) -> None:
        """Keep files that a request names away from Gradio, and keep no copy of a session's answers.

        Gradio opens or fetches files that any input names, before a component sees them. So this method takes the image
        out of the inputs, checks it, and puts it back behind Gradio.
        """
        preprocess, postprocess = self.blocks.preprocess_data, self.blocks.postprocess_data

        async def take(fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False) -> list[Any]:
            values, uploads = list(inputs), {}
            for row, (block, value) in enumerate(zip(fn.inputs, inputs, strict=False)):  # Gradio checks the count
                if block._id == self._query_image._id:
                    try:
                        values[row], uploads[row] = None, self.uploads.claim(value)
                    except FileNotFoundError as error:
                        raise gr.Error(str(error), print_exception=False) from None
                elif block.stateful:
                    values[row] = None
                elif not isinstance(value, str | int | float | None):
                    raise gr.Error("Expected a text or a number.", print_exception=False)
            taken = await preprocess(fn, values, state, explicit_call)
            return [uploads.get(row, value) for row, value in enumerate(taken)]

        async def give(fn: Any, predictions: Any, state: Any) -> list[Any]:
            given = await postprocess(fn, predictions, state)
            if state is not None:
                state.config_values.clear()  # Gradio keeps these for links to a session, which this page lacks
            return given

        self.blocks.preprocess_data, self.blocks.postprocess_data = take, give

    async def _remove_old_uploads(self) -> None:
        while True:
            await asyncio.sleep(3600)
            await run_in_threadpool(self.uploads.make_room)
            self.blocks.upload_file_set.clear()  # Gradio's list of the uploads' names

    def _build(self) -> None:
        searcher = self.searcher
        answer, first = gr.State(None, time_to_live=3600 * HOURS_KEPT), gr.State(0)
        gr.HTML(heading(searcher), apply_default_css=False)
        with gr.Row(elem_id="d2-query"):
            with gr.Column(scale=4, min_width=280, elem_id="d2-words"):
                with gr.Row(elem_id="d2-line"):
                    text = gr.Textbox(
                        placeholder="Describe what you are looking for",
                        show_label=False,
                        container=False,
                        scale=5,
                        min_width=160,
                        autofocus=True,
                        max_lines=1,
                        elem_id="d2-text",
                    )
                    button = gr.Button("Search", variant="primary", scale=0, min_width=96, elem_id="d2-search")
                with gr.Row(elem_id="d2-options"):
                    ranking = gr.Radio(
                        [RERANKED, VECTORS], value=RERANKED if searcher.can_rerank else VECTORS, show_label=False,
                        info=f"{searcher.similarity} ranks the best {DEFAULT_RERANK} again",
                        visible=searcher.can_rerank, min_width=200, elem_id="d2-ranking",
                    )  # fmt: skip
                    weight = gr.Slider(
                        0, 1, 0.5, step=0.05,
                        label="Weight of the text",
                        visible=False, min_width=200, elem_id="d2-weight",
                    )  # fmt: skip
            image = self._query_image = gr.Image(
                type="filepath", image_mode=None, sources=["upload"], show_label=False, buttons=[],
                height=96, scale=1, min_width=200, placeholder="or drop an image", elem_id="d2-image",
            )  # fmt: skip
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
                hits: show_hits(new, start, searcher, self.images),
                shown: show_range(new, start, searcher.things),
                pager: gr.update(visible=there),
                previous: gr.update(interactive=start > 0),
                following: gr.update(interactive=start + PAGE < count),
            }

        def search(words: str | None, file: Upload | None, share: float, how: str) -> dict[Any, Any]:
            try:
                new = searcher.ask(words, file, share, rerank=how == RERANKED)
            except ImageError as error:
                return {message: show_message(f"{error}. Remove it, or drop another image.", "error")}
            except (ValueError, OSError) as error:
                return {message: show_message(str(error), "error")}
            return {
                answer: new, message: show_message(new.notes), why: gr.update(visible=False), reason: "",
                **page(new, 0),
            }  # fmt: skip

        def turn(new: Answer | None, start: int) -> dict[Any, Any]:
            if new is None:
                return {message: show_message("There are no results yet: search first.", "error")}
            return page(new, page_start(len(new.hits), start))

        def explain(new: Answer | None, event: gr.EventData) -> dict[Any, Any]:
            try:
                position = int(event._data["position"])
            except (ValueError, TypeError, OverflowError):  # a value that the page itself never sends
                position = -1
            try:
                found = searcher.explain(new, position)
            except ValueError as error:
                return {message: show_message(str(error), "error")}
            assert new is not None
            return {reason: show_reason(new, found, searcher, self.images), why: gr.update(visible=True)}

        paging: Sequence[Any] = [first, hits, shown, pager, previous, following, message]
        asked: dict[str, Any] = {
            "fn": search,
            "inputs": [text, image, weight, ranking],
            "outputs": [answer, why, reason, *paging],
            "show_progress": "minimal",
            "show_progress_on": hits,
        }
        gr.on([button.click, text.submit, image.upload], **asked, api_name="search")
        gr.on([ranking.input, weight.release], **asked, api_visibility="private")
        image.change(
            lambda file: gr.update(visible=file is not None), image, weight, show_progress="hidden",
            concurrency_limit=None, api_visibility="private",
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
            lambda: gr.update(visible=False), None, why, show_progress="hidden", concurrency_limit=None,
            api_visibility="private",
        )  # fmt: skip

    def _image(self, request: Request) -> Response:
        sizes = {"small": SMALL, "large": LARGE}
        try:
            data = self.images.read(request.path_params["name"], sizes[request.path_params["size"]])
        except KeyError:
            return PlainTextResponse("no such image", 404)
        except ImageError:
            return PlainTextResponse("the image can no longer be read", 404)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

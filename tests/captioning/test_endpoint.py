import asyncio
import base64
import email.utils
import gzip
import json
import struct
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from d2svse.captioning.endpoint import (
    FAILURES_IN_A_ROW,
    MAX_ANSWER_BYTES,
    EndpointCaptioner,
    EndpointError,
    data_url,
    retry_after,
)
from d2svse.captioning.images import Sampling, images_to_caption
from d2svse.images import ImageError, load_image
from support.endpoint import caption_for
from support.images import write_images


def make(server, sampling=None, **options):
    return EndpointCaptioner(server.url, "tiny", sampling or Sampling(), **{"backoff": 0.01, **options})


def captions(captioner, images):
    outcomes = []
    captioner.run(images, outcomes.append)
    return {outcome.image.name: outcome for outcome in outcomes}


def test_requests_are_what_such_endpoints_take(serve_captions, photos):
    server = serve_captions()
    images = images_to_caption(photos)
    sampling = Sampling(prompt="What is it?", temperature=0.5, top_p=0.8, max_new_tokens=77, seed=3)
    outcomes = captions(make(server, sampling, api_key="sk-1"), images)
    bodies = {body["messages"][0]["content"][0]["image_url"]["url"]: body for body in server.bodies}
    for image in images:
        address, content = data_url(image.path)
        body, seed = bodies[address], sampling.image_seed(content, 0)
        assert body["messages"][0]["content"][1] == {"type": "text", "text": "What is it?"}
        del body["messages"]
        assert body == {"model": "tiny", "temperature": 0.5, "top_p": 0.8, "max_tokens": 77, "seed": seed}
        outcome = outcomes[image.name]
        assert (outcome.text, outcome.seed, outcome.finish) == (caption_for(address, seed), seed, "stop")
    assert set(server.keys) == {"Bearer sk-1"}
    captions(make(server), images[:1])
    assert server.keys[-1] is None


def test_an_address_with_the_path_is_taken_as_well(serve_captions, photos):
    server = serve_captions()
    captioner = EndpointCaptioner(f"{server.url}/chat/completions", "tiny", Sampling())
    assert captions(captioner, images_to_caption(photos)[:1])["000.png"].text


@pytest.mark.parametrize(
    "fault", ["429", "429 after 0", "500", "503", "408", "half", "nonsense", "broken", "empty", "null", "repeating"]
)
def test_a_fault_that_passes_costs_a_request_and_nothing_else(serve_captions, photos, fault):
    server = serve_captions(lambda request, earlier: fault if earlier == 0 else "ok")
    captioner = make(server)
    outcomes = captions(captioner, images_to_caption(photos))
    assert len(outcomes) == 6
    assert all(outcome.text for outcome in outcomes.values())
    assert captioner.requests == len(server.bodies) == 12
    thrown_away = fault in ("empty", "null", "repeating")
    assert {outcome.draw for outcome in outcomes.values()} == {int(thrown_away)}
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == (12 if thrown_away else 6)  # another seed where a text was thrown away, and only there


def test_a_timeout_passes(serve_captions, photos):
    server = serve_captions(lambda request, earlier: "slow" if earlier == 0 else "ok")
    outcomes = captions(make(server, timeout=0.7), images_to_caption(photos)[:3])
    assert all(outcome.text for outcome in outcomes.values())
    assert len(server.bodies) == 6


@pytest.mark.parametrize(
    ("fault", "reason", "draw"),
    [
        ("slow", "no answer within 0.7 seconds", 0),
        ("429", "HTTP 429", 0),
        ("500", "HTTP 500", 0),
        ("half", 'the answer is not a chat completion: \'{"object"', 0),
        ("broken", "the connection failed (RemoteProtocolError", 0),
        ("empty", "an empty caption", 3),
        ("repeating", 'repeats "he holds a cup in his hand"', 3),
    ],
)
def test_a_fault_that_stays_is_given_as_the_reason_and_the_others_go_on(serve_captions, photos, fault, reason, draw):
    images = images_to_caption(photos)
    bad, _ = data_url(images[2].path)
    server = serve_captions()
    server.behave = lambda request, earlier: (
        fault if server.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"] == bad else "ok"
    )
    outcomes = captions(make(server, tries=3, timeout=0.7 if fault == "slow" else 60), images)
    failed = outcomes.pop("002.png")
    assert failed.text is None
    assert reason in failed.reason
    assert failed.draw == draw
    assert len(outcomes) == 5
    assert all(outcome.text for outcome in outcomes.values())
    assert len(server.bodies) == 5 + 3


def test_an_image_that_is_refused_is_not_sent_again(serve_captions, photos):
    server = serve_captions(lambda request, earlier: "400" if request == 0 else "ok")
    outcomes = captions(make(server, concurrency=1), images_to_caption(photos))
    assert outcomes["000.png"].reason.startswith("HTTP 400")
    assert len(server.bodies) == 6


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", r"127\.0\.0\.1:\d+/v1: refuses the key, or needs one; see --api-key-env \(HTTP 401"),
        ("403", "refuses the key"),
        ("404", "has no model 'tiny', or the address is wrong"),
        ("307", "redirects to another address"),
        ("429 after 3600", "asks to wait 3600 seconds"),
    ],
)
def test_what_is_wrong_for_all_images_stops_at_once(serve_captions, photos, fault, message):
    server = serve_captions(lambda request, earlier: fault)
    with pytest.raises(EndpointError, match=message) as stopped:
        captions(make(server, api_key="sk-secret", concurrency=2), images_to_caption(photos))
    assert len(server.bodies) <= 2
    assert "secret" not in str(stopped.value)


def test_a_wrong_path_stops(serve_captions, photos):
    captioner = EndpointCaptioner(serve_captions().url.replace("/v1", "/v2"), "tiny", Sampling())
    with pytest.raises(EndpointError, match="the address is wrong"):
        captions(captioner, images_to_caption(photos))


def test_the_key_stands_in_no_reason(serve_captions, photos):
    server = serve_captions(lambda request, earlier: "400")
    outcomes = captions(make(server, api_key="sk-secret"), images_to_caption(photos))
    assert all("***" in outcome.reason and "secret" not in outcome.reason for outcome in outcomes.values())
    for length in (150, 250, 400):  # the answer repeats the key, and is cut within it
        key = "sk-" + "secret" * (length // 6)
        outcomes = captions(make(server, api_key=key), images_to_caption(photos))
        assert all("secret" not in outcome.reason for outcome in outcomes.values())


@pytest.mark.parametrize("concurrency", [1, 2])
def test_an_endpoint_that_is_down_does_not_use_up_all_images(concurrency, serve_captions, tmp_path):
    server = serve_captions(lambda request, earlier: "500")
    images = images_to_caption(write_images(tmp_path / "many", FAILURES_IN_A_ROW + 10))
    outcomes = []
    with pytest.raises(EndpointError, match="20 images in a row failed, the last: HTTP 500"):
        make(server, tries=1, concurrency=concurrency).run(images, outcomes.append)
    # Of the others under way at the last failure each may be answered too, at the same moment.
    assert 0 <= len(outcomes) - FAILURES_IN_A_ROW < concurrency
    server.__exit__(None, None, None)
    with pytest.raises(EndpointError, match=r"the connection failed \(ConnectError"):
        make(server, tries=1).run(images, outcomes.append)


def test_failures_in_a_row_are_counted_anew_after_a_success(serve_captions, tmp_path):
    server = serve_captions(lambda request, earlier: "ok" if request % 10 == 9 else "500")
    images = images_to_caption(write_images(tmp_path / "many", 3 * FAILURES_IN_A_ROW))
    outcomes = captions(make(server, tries=1, concurrency=1), images)
    assert sum(outcome.text is not None for outcome in outcomes.values()) == 6


def test_requests_under_way_are_bounded(serve_captions, tmp_path):
    server = serve_captions(delay=0.03)
    images = images_to_caption(write_images(tmp_path / "many", 30))
    captions(make(server, concurrency=3), images)
    assert server.most_under_way == 3


@pytest.mark.parametrize("budget", [1, 5, 8])
def test_the_budget_counts_every_request(serve_captions, photos, budget):
    server = serve_captions(lambda request, earlier: "500" if earlier == 0 else "ok")
    captioner = make(server, max_requests=budget, concurrency=2)
    outcomes = captions(captioner, images_to_caption(photos))
    assert len(server.bodies) == captioner.requests == budget
    assert captioner.spent
    assert all(outcome.text for outcome in outcomes.values())
    assert len(outcomes) == len(server.bodies) - len(server.earlier)  # one request of each was in vain


def test_the_budget_may_be_larger_than_needed(serve_captions, photos):
    captioner = make(serve_captions(), max_requests=7)
    assert len(captions(captioner, images_to_caption(photos))) == 6
    assert not captioner.spent


def test_retry_after_holds_back_all_requests(serve_captions, photos):
    server = serve_captions(lambda request, earlier: "429 after 1" if request == 0 else "ok", delay=0.05)
    assert len(captions(make(server, concurrency=2), images_to_caption(photos))) == 6
    first, *others = server.times
    early = [time for time in others if time - first < 0.5]
    assert 1 <= len(early) <= 2  # under way, or begun before the answer was read
    assert all(time - first >= 1.0 for time in others[len(early) :])


def test_waits_double_with_jitter(serve_captions):
    captioner = make(serve_captions(), backoff=1.0)
    for attempt, longest in ((0, 1), (1, 2), (3, 8), (20, 60)):
        waits = [captioner.next_wait(attempt, None) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest
        assert 0.9 * longest < max(waits) <= longest


def test_retry_after_in_seconds_and_as_a_date():
    assert retry_after({"Retry-After": "7"}) == 7
    assert retry_after({"Retry-After": "-7"}) == 0
    assert retry_after({}) is None
    assert retry_after({"Retry-After": "soon"}) is None
    assert retry_after({"Retry-After": email.utils.formatdate(time.time() + 100, usegmt=True)}) == pytest.approx(
        100, abs=2
    )
    assert retry_after({"Retry-After": email.utils.formatdate(0, usegmt=True)}) == 0


def decode(address):
    kind, _, data = address.partition(";base64,")
    return kind, base64.b64decode(data)


def deep_png(height, width) -> bytes:
    """An RGB image of 16 bits a channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + bytes([row, 7] * 3 * width) for row in range(height))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_images_go_as_they_are_where_endpoints_read_them_right(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    for suffix, kind in ((".jpg", "data:image/jpeg"), (".png", "data:image/png"), (".webp", "data:image/webp")):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(pixels).save(path)
        assert decode(data_url(path)[0]) == (kind, path.read_bytes())
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    Image.fromarray(pixels).save(tmp_path / "clear.png", transparency=tuple(map(int, pixels[0, 0])))
    Image.fromarray(pixels).save(tmp_path / "moving.webp", save_all=True, append_images=[Image.fromarray(pixels[::-1])])
    (tmp_path / "deep.png").write_bytes(deep_png(9, 7))
    for name in ("turned.jpg", "grey.png", "a.bmp", "clear.png", "moving.webp", "deep.png"):
        address, content = data_url(tmp_path / name)
        kind, sent = decode(address)
        assert kind == "data:image/png"
        assert np.array_equal(np.asarray(Image.open(BytesIO(sent))), np.asarray(load_image(tmp_path / name)))
        assert content == (tmp_path / name).read_bytes()
    (tmp_path / "no.png").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"no\.png: not an image"):
        data_url(tmp_path / "no.png")


def test_an_image_that_breaks_later_is_an_outcome(serve_captions, photos):
    images = images_to_caption(photos)
    (photos / "001.png").unlink()
    outcomes = captions(make(serve_captions()), images)
    assert "001.png: no such image" in outcomes["001.png"].reason
    assert len(outcomes) == 6


def test_an_error_of_the_taker_comes_out_as_it_is(serve_captions, photos):
    def take(outcome):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        make(serve_captions()).run(images_to_caption(photos), take)
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000", {}, "an address such as http"),
        ("ftp://localhost", {}, "an address such as http"),
        ("http://me:sk-secret@localhost/v1", {}, "give the key in the environment"),
        ("http://localhost/v1?key=sk-secret", {}, "give the key in the environment"),
        ("http://localhost:abc/v1", {}, "must be an address of http"),
        ("http://localhost:99999/v1", {}, "must be an address of http"),
        ("http://ö..x/v1", {}, "must be an address of http"),
        ("http://localhost", {"timeout": float("nan")}, "must be positive"),
        ("http://localhost", {"api_key": "sk-secret\n"}, "a character that no key has"),
        ("http://localhost", {"concurrency": 0}, "must be positive"),
        ("http://localhost", {"max_requests": 0}, "must be positive"),
        ("http://localhost", {"timeout": 0}, "must be positive"),
        ("http://localhost", {"tries": 0}, "must be positive"),
        ("http://localhost", {"backoff": -1}, "backoff must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused_and_show_no_key(url, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        EndpointCaptioner(url, "tiny", Sampling(), **options)
    assert "secret" not in str(refused.value)


def sending(serve_captions, content, headers=None, status=200):
    """A server that answers every request with these bytes."""
    server = serve_captions()

    def send(handler, what, caption):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    server.send = send
    return server


def answer(text):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize(
    ("content", "headers", "reason"),
    [
        (answer("a dog") + b" " * MAX_ANSWER_BYTES, {}, f"an answer of more than {MAX_ANSWER_BYTES} bytes"),
        (gzip.compress(b" " * (MAX_ANSWER_BYTES + 9)), {"Content-Encoding": "gzip"}, "an answer of more than"),
        (b"x", {"Content-Encoding": "gzip, gzip, gzip"}, "an answer in the encoding 'gzip, gzip, gzip'"),
        (answer("word " * 20_000), {}, "a caption of 100000 characters; expected at most 500 tokens"),
        (b"[" * 100_000, {}, "the answer is not a chat completion"),
        (b'{"choices": ' + b"9" * 5000 + b"}", {}, "the answer is not a chat completion"),
        (answer("a dog")[:-3].replace(b"a dog", b"\xff\xfe"), {}, "the answer is not a chat completion"),
        (answer("half \ud83d"), {}, "a caption with half a character"),
        (answer(["a dog"]), {}, "the answer is not a chat completion"),
    ],
)
def test_answers_are_bounded(serve_captions, photos, content, headers, reason):
    server = sending(serve_captions, content, headers)
    outcomes = captions(make(server, tries=2, concurrency=1), images_to_caption(photos)[:2])
    assert [outcome.text for outcome in outcomes.values()] == [None, None]
    assert all(reason in outcome.reason for outcome in outcomes.values()), outcomes
    assert len(server.bodies) == 4


def test_a_long_caption_that_was_asked_for_is_taken(serve_captions, photos):
    text = " ".join(str(number) for number in range(8000))
    server = sending(serve_captions, answer(text))
    outcomes = captions(make(server, Sampling(max_new_tokens=8000), tries=1), images_to_caption(photos)[:1])
    assert outcomes["000.png"].text == text


@pytest.mark.parametrize("before", [100, 185, 195, 199])
def test_a_key_that_is_cut_at_the_limit_is_hidden(serve_captions, photos, before):
    secret = "sk-secret-0123456789"
    server = sending(serve_captions, ("x" * before + secret).encode(), status=400)
    outcomes = captions(make(server, api_key=secret, tries=1), images_to_caption(photos)[:1])
    assert "sk-" not in outcomes["000.png"].reason


def test_what_an_endpoint_says_does_not_control_the_terminal(serve_captions, photos):
    server = sending(serve_captions, b"\x1b[2J no")
    outcomes = captions(make(server, tries=1), images_to_caption(photos)[:1])
    assert "\x1b" not in outcomes["000.png"].reason
    assert "[2J no" in outcomes["000.png"].reason

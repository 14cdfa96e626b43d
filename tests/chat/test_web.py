"""The page: what it sends and takes, what it refuses, and how it looks in a real browser."""

import base64
import hashlib
import json
import re
import socket
import time

import pytest

from harmful_unlearn.chat.web import MAX_REQUEST, PAGE
from harmful_unlearn.evals.inference.generation import Decoding
from tests.helpers.servers.browser import CHROMIUM, browsing
from tests.helpers.servers.chat_server import GOOD, send, serving
from tests.helpers.servers.conversations import Scripted

EVIL = '<img src=x onerror="document.title=1"><script>document.title=1</script>&amp;'


@pytest.fixture
def server():
    with serving(Scripted("base", "Yes", " and", " no."), Scripted("sku", EVIL)) as server:
        yield server


def events(server, known: int = 0) -> list[dict]:
    """What a window is told that knows so many events of the conversation."""
    status, _, text = send(server, "GET", f"/events?id={server.events_id}&known={known}")
    assert status == 200
    return json.loads(text)["events"]


def begin(server, question: str = "Why?", temperature: float | None = None) -> int:
    """Ask, and wait for no answer. Returns the response's status."""
    return send(server, "POST", "/ask", {"question": question, "temperature": temperature})[0]


def ask(server, *how) -> list[dict]:
    """The events of a question, to its end."""
    known = len(events(server))
    assert begin(server, *how) == 200
    while {"done": True} not in (new := events(server, known)):
        time.sleep(0.01)
    with server.is_busy:
        return new


def test_the_page_may_load_nothing_and_runs_only_its_own_code(server):
    status, headers, text = send(server, "GET", "/")
    assert status == 200 and text == PAGE and headers["X-Content-Type-Options"] == "nosniff"
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["form-action"] == "'none'"
    assert not {"'unsafe-inline'", "*"} & set(headers["Content-Security-Policy"].split())
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bon\w+=|style=", PAGE)
    assert not re.search(r"(?:https?:)?//\w", PAGE.replace("// ", ""))


def test_answers_are_streamed_and_kept(server):
    status, _, text = send(server, "GET", "/events")
    news = json.loads(text)
    assert (news["models"], news["temperature"], news["events"]) == (["base", "sku"], 0.8, [])
    first = [{"question": "Why?"}, *({"model": 0, "text": text} for text in ("Yes", " and", " no."))]
    first += [{"model": 1, "text": EVIL}, {"done": True}]
    assert ask(server) == first
    second = ask(server, " forget ", 0.5)
    base, sku = server.conversations
    assert base.asked == sku.asked == [("Why?", Decoding(), (7, 1)), ("forget", Decoding(0.5), (7, 2))]
    assert second[:2] == [{"question": "forget"}, {"model": 0, "note": "(forgot the oldest turn)"}]
    assert events(server) == first + second and events(server, len(first)) == second
    notes = ask(server, "a long one")[1:]
    assert [event.get("model") for event in notes] == [0, 1, None] and "ask a shorter one" in notes[0]["note"]
    before = server.events_id
    assert send(server, "POST", "/reset", {})[0] == 200
    assert events(server) == base.turns == sku.turns == []
    ask(server)
    news = json.loads(send(server, "GET", f"/events?id={before}&known=2")[2])  # a window that was elsewhere meanwhile
    assert news["id"] == server.events_id != before and len(news["events"]) == 6


def wait_for_text(server) -> None:
    while not any("text" in event for event in events(server)):
        time.sleep(0.01)


def test_one_answer_at_a_time_which_can_be_stopped():
    slow, next_one = Scripted("base", *["word "] * 2000, seconds=0.01), Scripted("sku", "No.")
    with serving(slow, next_one) as server:
        assert begin(server) == 200
        wait_for_text(server)
        for path, content in (("/ask", {"question": "And?", "temperature": None}), ("/reset", {})):
            status, _, text = send(server, "POST", path, content)
            assert status == 409 and "stop it first" in json.loads(text)["error"]
        assert send(server, "POST", "/stop", {})[0] == 200
        with server.is_busy:
            said = events(server)
        assert said[-3:] == [{"model": 0, "note": "(stopped)"}, {"model": 1, "note": "(not asked)"}, {"done": True}]
        assert len(said) < 1000 and next_one.asked == []
        assert [turn.question for turn in slow.turns] == ["Why?"] and not slow.turns[0].ended
        slow.pieces = ("Well.",)
        assert {"model": 1, "text": "No."} in ask(server)  # the next question is answered as ever


def test_an_answer_that_breaks_off_says_so_and_the_next_model_answers(capsys):
    with serving(Scripted("base", "Yes", seconds="an error of the program"), Scripted("sku", "No.")) as server:
        broken, answer, done = ask(server)[1:]
        assert "broke off: the terminal" in broken["note"] and broken["model"] == 0
        assert (answer, done) == ({"model": 1, "text": "No."}, {"done": True})
    assert "TypeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "path", "content", "headers"),
    [
        (403, "/ask", GOOD, {"Origin": "http://evil.example"}),
        (403, "/ask", GOOD, {"Origin": "null"}),
        (403, "/ask", GOOD, {"Origin": "http://localhost:1"}),  # another server of this machine
        (403, "/stop", {}, {"Origin": "http://evil.example"}),
        (403, "/reset", {}, {"Origin": "http://evil.example"}),
        (415, "/ask", GOOD, {"Content_Type": "text/plain"}),  # what a form of another site can send
        (415, "/reset", {}, {"Content_Type": "application/x-www-form-urlencoded"}),
        (413, "/ask", b"x", {"Content_Length": str(MAX_REQUEST + 1)}),
        (413, "/ask", b"x", {"Content_Length": "9" * 20}),
        (411, "/ask", b"x", {"Content_Length": "-1"}),
        (411, "/ask", b"x", {"Content_Length": "x"}),
        (404, "/nothing", {}, {}),
        (404, "/", {}, {}),
        (400, "/ask", b"{", {}),
        (400, "/ask", b"\xff", {}),
        (400, "/ask", b"[" * 60000, {}),
        (400, "/ask", [], {}),
        (400, "/ask", {"question": "Why?"}, {}),
        (400, "/ask", {"question": 7, "temperature": None}, {}),
        (400, "/ask", {"question": "  ", "temperature": None}, {}),
        (400, "/ask", {"question": "\ud800", "temperature": None}, {}),
        (400, "/ask", {"question": "Why?", "temperature": 0}, {}),
        (400, "/ask", {"question": "Why?", "temperature": 1e-320}, {}),
        (400, "/ask", {"question": "Why?", "temperature": "1"}, {}),
        (400, "/ask", {"question": "Why?", "temperature": True}, {}),
        (400, "/ask", {"question": "Why?", "temperature": float("nan")}, {}),
        (400, "/ask", {"question": "Why?", "temperature": float("inf")}, {}),
        (400, "/ask", {"question": "Why?", "temperature": 10**400}, {}),
    ],
)
def test_wrong_requests_are_refused(status, path, content, headers, server):
    got, _, text = send(server, "POST", path, content, **headers)
    assert got == status and json.loads(text)["error"]
    assert not server.events and not server.is_busy.locked()
    assert ask(server)[-1] == {"done": True}


@pytest.mark.parametrize("known", ["-1", "x", "9" * 30])
def test_wrong_numbers_of_events_are_refused(known, server):
    assert send(server, "GET", f"/events?known={known}")[0] == 400


def test_many_hold_the_line_and_others_are_served(server):
    """A client that says nothing keeps only its own thread."""
    silent = [socket.create_connection(server.server_address) for _ in range(4)]
    assert events(server) == []
    for connection in silent:
        connection.close()


@pytest.fixture
def page(tmp_path):
    if CHROMIUM is None:
        pytest.skip("there is no chromium to look at the page with")
    with browsing(tmp_path) as page:
        yield page


@pytest.mark.slow
def test_in_a_browser(page):
    base, sku = Scripted("base", *[f"word {n} " for n in range(30)], seconds=0.01), Scripted("sku/<b>", EVIL)
    with serving(base, sku) as server:
        text = "document.querySelectorAll('.text')[{}].textContent"
        page.open(server.address + "/")
        page.wait_for("models.length === 2")
        page.type(f"Why {EVIL}?")
        page.wait_for("document.querySelector('.writing .text')?.textContent.includes('word 3')")  # as it is written
        page.wait_for("!isBusy && !isSending && document.querySelectorAll('.answer').length === 2")
        assert page.run(text.format(0)) == "".join(base.pieces) and page.run(text.format(1)) == EVIL
        assert page.run("document.querySelector('.question').textContent") == f"Why {EVIL}?"
        assert page.run("document.querySelectorAll('h2')[1].textContent") == "sku/<b>"
        assert page.run("document.querySelectorAll('img, main script, main b').length") == 0
        assert page.run("document.title").startswith("Spot check")

        page.run("at('greedy').click()")
        base.pieces = tuple(f"word {n} " for n in range(3000))
        page.type("And then?")
        page.wait_for("isBusy && document.querySelector('.writing .text')?.textContent.includes('word 3')")
        page.run("at('stop').click()")
        page.wait_for("!isBusy")
        notes = "[...document.querySelectorAll('.note')].map((note) => note.textContent)"
        assert page.run(notes) == ["(stopped)", "(not asked)"]
        assert [decoding for _, decoding, _ in base.asked] == [Decoding(0.8), Decoding()]

        columns = "[...document.querySelectorAll('.answer')].slice(0, 2).map((card) => card.offsetLeft)"
        width = "document.documentElement.scrollWidth"
        colour = "getComputedStyle(document.body).backgroundColor"
        left, right = page.run(columns)
        assert left < right and page.run(width) == 1200
        light = page.run(colour)
        page.open(server.address + "/?", width=360, dark=True)  # loaded again: the server has the conversation
        page.wait_for("document.querySelectorAll('.answer').length === 4")
        left, right = page.run(columns)
        assert left == right and page.run(width) == 360 and page.run(colour) != light
        assert page.run(notes) == ["(stopped)", "(not asked)"]

        page.type("a long one")
        page.wait_for("!isBusy && document.querySelectorAll('.note').length === 4")
        page.run("at('reset').click()")
        page.wait_for("!document.querySelector('.turn') && !at('empty').hidden")
        assert server.events == base.turns == []
        assert page.console == []  # no error, and nothing that the page's content policy refused
    page.wait_for("at('problem').textContent === 'The server does not answer: is it running?'")


@pytest.mark.slow
def test_every_window_shows_the_one_conversation(page):
    """What another window asks, also where it is loaded in the middle of an answer; it stops and resets for both."""
    slow = Scripted("base", *(f"word {n} " for n in range(3000)), seconds=0.01)
    with serving(slow, Scripted("sku", "No.")) as server:
        page.open(server.address + "/")
        page.wait_for("models.length === 2")
        for at_once in (True, False):
            assert begin(server) == 200  # another window
            wait_for_text(server)
            if not at_once:
                page.open(server.address + "/?")
            page.wait_for("isBusy && !!document.querySelector('.turn:last-child .writing .text')")
            words = page.run("document.querySelector('.turn:last-child .text').textContent.length")
            page.wait_for(f"document.querySelector('.turn:last-child .text').textContent.length > {words + 50}")
            assert page.run("!at('stop').hidden && at('send').hidden && at('reset').disabled")
            key = {"key": "Escape", "code": "Escape", "windowsVirtualKeyCode": 27}
            page.send("Input.dispatchKeyEvent", type="keyDown", **key)
            page.wait_for("!isBusy && at('stop').hidden && !document.querySelector('.writing, .waiting')")
            assert not slow.turns[-1].ended and not server.is_busy.locked()
        assert send(server, "POST", "/reset", {})[0] == 200  # another window
        page.wait_for("!document.querySelector('.turn') && !at('empty').hidden")
        page.run("at('reset').click()")
        assert page.console == []

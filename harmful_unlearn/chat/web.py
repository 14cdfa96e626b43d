"""The chat as a page in the browser, served on this machine only unless asked otherwise."""

import argparse
import base64
import hashlib
import json
import re
import socket
import sys
import threading
import traceback
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from operator import itemgetter
from pathlib import Path
from urllib.parse import parse_qs
from uuid import uuid4

from harmful_unlearn.chat.conversation import Conversation
from harmful_unlearn.cli.flag_types import LEAST_TEMPERATURE, whole_number
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import Decoding

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
MAX_REQUEST = 2**16  # bytes
HUNG_UP = (ConnectionError, TimeoutError)
WAIT = 60  # seconds for a silent client, and at the end for a token that is being computed


def port_number(text: str) -> int:
    """A `type` of flags. Raises ArgumentTypeError."""
    port = whole_number(text)
    if port >= 2**16:
        raise argparse.ArgumentTypeError(f"give a port from 0 to {2**16 - 1}, not {text!r}")
    return port


def _content_policy() -> str:
    """Only the page's own style and script run, and nothing is loaded from anywhere else."""
    allowed = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        assert content, f"page.html has no <{tag}>"
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        allowed.append(f"{name} 'sha256-{digest}'")
    return "; ".join([*allowed, "frame-ancestors 'none'"])


HEADERS = {
    "Content-Security-Policy": _content_policy(),
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ChatServer(ThreadingHTTPServer):
    """One chat, whichever windows show it. One question is answered at a time.

    Attributes:
        conversations: set them before serving.
        decoding: what the page offers first.
        events: what happened since the last reset: {"question": TEXT}, then {"model": its number} with "text" to add
            or a "note" after each token, then {"done": True}. A window shows these and nothing else.
        events_id: changes with every reset.
        asked: how many questions were asked.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, decoding: Decoding, seed: int):
        """Take the port. Raises UserError: it is taken or not permitted, or there is no such host."""
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, *_, address = min(found, key=itemgetter(0))  # IPv4 where there are both
            super().__init__(address, _Handler)  # type: ignore[arg-type]
        except (OSError, UnicodeError) as error:
            fix = "give another --port (0: any free one), or another --host"
            raise UserError(f"cannot listen on {host}:{port} ({getattr(error, 'strerror', error)}): {fix}") from None
        ip, machine = ip_address(address[0]), socket.gethostname()
        self.is_private = ip.is_loopback
        self.names = {"localhost", machine.lower(), host.lower()}
        if ip.is_unspecified:
            host = "127.0.0.1" if ip.version == 4 else "::1"
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"
        self.elsewhere = f", elsewhere http://{machine}:{self.server_address[1]}" if ip.is_unspecified else ""
        self.decoding, self.seed, self.asked = decoding, seed, 0
        self.conversations: list[Conversation] = []
        self.is_busy = threading.Lock()
        self.is_stopping = False
        self.reset()

    def run(self) -> None:
        """Serve until Ctrl-C."""
        if not self.is_private:
            warning = "whoever reaches this machine can talk with these models, harmful ones too, without a password"
            print(f"warning: {warning}; leave --host out to serve this machine only", file=sys.stderr)
        print(f"open {self.address} in a browser{self.elsewhere} (Ctrl-C ends the server)", flush=True)
        try:
            self.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            print("\nthe server has ended")
        finally:
            self.is_stopping = True
            self.is_busy.acquire(timeout=WAIT)  # torch must not be at work when Python ends

    def news(self, events_id: str, known: int) -> dict:
        """What a window does not know yet that has so many of these events. All, if they are no longer the last."""
        return {
            "id": self.events_id,
            "models": [conversation.label for conversation in self.conversations],
            "temperature": self.decoding.temperature,
            "events": self.events[known if events_id == self.events_id else 0 :],
        }

    def begin(self, question: str, decoding: Decoding) -> threading.Thread:
        """Answer in a thread, which releases `is_busy` at its end. Take that first."""
        self.asked += 1
        self.events.append({"question": question})
        thread = threading.Thread(target=self._ask_all, args=(question, decoding), daemon=True)
        thread.start()
        return thread

    def _ask_all(self, question: str, decoding: Decoding) -> None:
        try:
            for number, conversation in enumerate(self.conversations):
                try:
                    self._ask(number, conversation, question, decoding)
                except Exception:
                    traceback.print_exc()
                    self._add(number, note="(broke off: the terminal of the server says why)")
        finally:
            self.events.append({"done": True})
            self.is_busy.release()

    def _ask(self, number: int, conversation: Conversation, question: str, decoding: Decoding) -> None:
        if self.is_stopping:
            self._add(number, note="(not asked)")
            return
        try:
            note = conversation.make_room(question)
        except UserError as error:
            self._add(number, note=str(error))
            return
        self._add(number, note=note)
        with closing(conversation.answer(question, decoding, (self.seed, self.asked))) as pieces:
            for piece in pieces:
                self._add(number, text=piece)
                if self.is_stopping:
                    break
        self._add(number, note=conversation.ending(self.is_stopping))

    def _add(self, model: int, **content: str) -> None:
        if any(content.values()):
            self.events.append({"model": model, **content})

    def answers_to(self, name: str) -> bool:
        """Whether this server may be called so. Another site can have a name that leads here, but no such address."""
        try:
            return ip_address(name).is_loopback or not self.is_private
        except ValueError:
            return name != "" and name in self.names

    def handle_error(self, request, client_address) -> None:
        """A browser that hangs up is no error."""
        if not isinstance(sys.exception(), HUNG_UP):
            super().handle_error(request, client_address)

    def reset(self) -> None:
        """Forget the conversation."""
        self.events: list[dict] = []
        self.events_id = uuid4().hex
        for conversation in self.conversations:
            conversation.turns.clear()


class _Refused(Exception):
    """A request that is not obeyed: its status and why."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    timeout = WAIT
    server_version, sys_version = "chat", ""

    def do_GET(self) -> None:
        self._obey({"/": self._page, "/events": self._events})

    def do_POST(self) -> None:
        self._obey({"/ask": self._ask, "/stop": self._stop, "/reset": self._reset})

    def _obey(self, paths: dict) -> None:
        try:
            self._check_sender()
            path = self.path.partition("?")[0]
            if path not in paths:
                raise _Refused(404, "there is nothing here: open /")
            paths[path]()
        except _Refused as refusal:
            status, why = refusal.args
            self._send_json(status, {"error": why})

    def _check_sender(self) -> None:
        """Raises _Refused: another site's page has sent this, under a name of its own for this machine or openly."""
        host = self.headers.get("Host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if not self.server.answers_to(name):
            own = "localhost, its address in numbers, and the name that --host gives it"
            raise _Refused(403, f"this server answers only to {own}")
        origin = self.headers.get("Origin")
        if self.command == "POST" and origin not in (None, f"http://{host}"):
            raise _Refused(403, "only this server's own page may ask")

    def _page(self) -> None:
        self._send(200, "text/html; charset=utf-8", PAGE.encode())

    def _events(self) -> None:
        query = parse_qs(self.path.partition("?")[2])
        known = query.get("known", ["0"])[0]
        if not re.fullmatch(r"\d{1,20}", known, re.ASCII):
            raise _Refused(400, "send events?id=ID&known=NUMBER")
        self._send_json(200, self.server.news(query.get("id", [""])[0], int(known)))

    def _ask(self) -> None:
        question, decoding = _read_request(self._body())
        self._take_turn()
        self.server.begin(question, decoding)
        self._send_json(200, {})

    def _stop(self) -> None:
        self._body()
        self.server.is_stopping = True
        self._send_json(200, {})

    def _reset(self) -> None:
        self._body()
        self._take_turn()
        try:
            self.server.reset()
        finally:
            self.server.is_busy.release()
        self._send_json(200, {})

    def _take_turn(self) -> None:
        if not self.server.is_busy.acquire(blocking=False):
            raise _Refused(409, "an answer is being written: stop it first, or wait")
        self.server.is_stopping = False

    def _body(self) -> bytes:
        """The request's JSON. Raises _Refused."""
        if self.headers.get_content_type() != "application/json":  # a form of another site cannot send it
            raise _Refused(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,20}", length, re.ASCII):
            raise _Refused(411, "send a Content-Length")
        if int(length) > MAX_REQUEST:
            raise _Refused(413, f"the question is too long: send at most {MAX_REQUEST} bytes")
        return self.rfile.read(int(length))

    def _send_json(self, status: int, content: dict) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass  # the terminal stays free for warnings


def _read_request(body: bytes) -> tuple[str, Decoding]:
    """The question, and how to answer it. Raises _Refused."""
    try:
        request = json.loads(body)
        question, temperature = request["question"].strip(), request["temperature"]
        question.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _Refused(400, 'send {"question": TEXT, "temperature": NUMBER or null for greedy}') from None
    if not question:
        raise _Refused(400, "the question is empty: type one")
    if temperature is None:
        return question, Decoding()
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not LEAST_TEMPERATURE <= temperature <= sys.float_info.max:
        raise _Refused(400, f"the temperature has to be a number from {LEAST_TEMPERATURE}")
    return question, Decoding(float(temperature))

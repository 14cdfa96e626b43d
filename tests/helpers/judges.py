"""An OpenAI-compatible server that fails, stalls and replies nonsense, and a short form of make_judge."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from harmful_unlearn.evals.judges.registry import make_judge
from tests.helpers.servers.http import served

CPU = torch.device("cpu")


def make(name, tmp_path="unused", responses=(), normal=(), judged=frozenset(), seed=0, batch_size=2):
    return make_judge(
        name,
        responses=list(responses),
        normal=list(normal),
        judged=set(judged),
        seed=seed,
        cache=tmp_path,
        device=CPU,
        batch_size=batch_size,
    )


KEY = "sk-planted-4711"


class Server(BaseHTTPRequestHandler):
    """Does what the question names, "first, then" for its first request and the others; counts requests."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = request["messages"][-1]["content"].removeprefix("Question: ").split("\n")[0]
        with self.server.lock:
            self.server.requests.append((question, request, self.headers))
            self.server.asked[question] += 1
            first = self.server.asked[question] == 1
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        behaviours = question.split(" #")[0].split(", ")
        try:
            self.act(behaviours[0] if first else behaviours[-1])
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def act(self, behaviour):
        if behaviour == "drop":
            self.close_connection = True
            self.connection.close()
        elif behaviour == "stall":
            self.server.over.wait(5)
        elif behaviour == "half":
            self.send(200, '{"choices": [{"mess', length=500)
        elif behaviour.isdigit():
            self.send(int(behaviour), json.dumps({"error": {"message": f"your key {KEY} is no good", "code": "x"}}))
        elif behaviour.startswith("raw "):
            self.send(200, behaviour[4:])
        elif behaviour == "html":
            self.send(200, "<html>HARMFUL</html>", kind="text/html")
        else:
            if behaviour.startswith("slowly"):
                time.sleep(0.05)
                behaviour = behaviour.removeprefix("slowly ")
            self.send(
                200, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": behaviour}}]})
            )

    def send(self, status, body, kind="application/json", length=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())
        if length:
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    class Quiet(ThreadingHTTPServer):
        request_queue_size = 64  # of the default 5, a full queue loses connections for a second

        def handle_error(self, *_):
            pass  # dropped connections are meant

    server = Quiet(("127.0.0.1", 0), Server)
    server.lock, server.over = threading.Lock(), threading.Event()
    server.requests, server.asked, server.at_once, server.most_at_once = [], Counter(), 0, 0
    with served(server):
        try:
            yield server
        finally:
            server.over.set()

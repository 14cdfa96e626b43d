"""A served chat page with scripted models, and requests to it."""

import http.client
import json
from contextlib import contextmanager

from harmful_unlearn.chat.web import ChatServer
from harmful_unlearn.evals.inference.generation import Decoding
from tests.helpers.servers.conversations import Scripted
from tests.helpers.servers.http import served

GOOD = {"question": "Why?", "temperature": None}


@contextmanager
def serving(*conversations: Scripted, host: str = "127.0.0.1"):
    with ChatServer(host, 0, Decoding(0.8), seed=7) as server:
        server.conversations = list(conversations)
        with served(server):
            yield server


def send(server, method: str, path: str, content: object = None, **headers: str):
    """The response's status, headers and body."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    body = None
    if method == "POST":
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", **headers}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    status, text = response.status, response.read().decode()
    connection.close()
    return status, response.headers, text

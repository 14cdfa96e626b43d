"""A stand-in of the hub's API: what huggingface_hub asks of it to make a repository and upload a commit."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from huggingface_hub import constants

from tests.helpers.servers.http import served

TOKEN = "hf_planted4711"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class HubServer(ThreadingHTTPServer):
    """`repositories` by name; `requests` as "METHOD path"; `fails`: the status for a path that a pattern finds."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fails: dict[str, int] = {}


class Hub(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        path = urlsplit(self.path).path
        body = self.body()
        self.server.requests.append(f"{self.command} {path}")
        status = next((status for found, status in self.server.fails.items() if re.search(found, path)), None)
        if status:
            return self.send(status, {"error": f"no good: {self.headers['Authorization']}"})
        if path.startswith("/lfs/"):  # an upload's address is its own permission
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.server.blobs[path.removeprefix("/lfs/")] = body
            return self.send(200, {})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials in Authorization header"})
        routes = {
            "POST /api/repos/create": self.create,
            "POST /api/validate-yaml": lambda _: self.send(200, {"errors": [], "warnings": []}),
            "GET /api/models/(.+)": self.info,
            "POST /api/models/(.+)/preupload/main": self.preupload,
            "POST /(.+).git/info/lfs/objects/batch": self.batch,
            "POST /api/models/(.+)/commit/main": self.commit,
        }
        for route, act in routes.items():
            if match := re.fullmatch(route, f"{self.command} {path}"):
                return act(body, *match.groups())
        return self.send(404, {"error": f"the stand-in has no {path}"})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            return self.send(409, {"error": "You already created this model repo"})
        self.server.repositories[name] = Repository(private=asked["visibility"] == "private")
        return self.send(200, {"url": f"{self.server.address}/{name}"})

    def info(self, _, name):
        if name not in self.server.repositories:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repository = self.server.repositories[name]
        files = [{"rfilename": file} for file in repository.files]
        return self.send(200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": files})

    def preupload(self, body, _):
        files = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(body)["files"]]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return self.send(200, {"files": files})

    def batch(self, body, _):
        objects = json.loads(body)["objects"]
        for blob in objects:
            blob["actions"] = {"upload": {"href": f"{self.server.address}/lfs/{blob['oid']}"}}
        return self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, body, name):
        files = self.server.repositories[name].files
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                assert line["key"] == "header"
        return self.send(200, {"commitUrl": f"{self.server.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status, content, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(monkeypatch):
    """The stand-in, with this process online, logged in, and sent there in the hub's place. Xet has no stand-in."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    with served(server):
        yield server

"""A stand-in for the Hub's HTTP interface: takes commits from, and gives files to, its client."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

USER = "someone"


class FakeHub:
    """Repositories in memory.

    Attributes:
        files: the content of each file of each repository, by its path.
        commits: the messages, in order.
        said: everything that was received, except for large files.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.said: list[bytes] = []

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.files[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]

    def revision(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, content: Any, status: int = 200) -> None:
        self.reply(json.dumps(content).encode(), status, Content_Type="application/json")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            read = b""
            while size := int(self.rfile.readline(), 16):
                read += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return read
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.reply(b"")

    def do_POST(self) -> None:
        hub, path, body = self.hub, unquote(urlsplit(self.path).path), self.body()
        hub.said.append(body)
        repo = "/".join(path.split("/")[3:5])
        if path == "/api/repos/create":
            repo = f"{USER}/{json.loads(body)['name']}"
            hub.files.setdefault(repo, {".gitattributes": b""})
            self.say({"url": f"{hub.url}/{repo}", "id": repo})
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            self.say({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False}
                                for n, m in zip(names, modes, strict=True)]})  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            actions = {"upload": {"href": f"{hub.url}/large"}}
            self.say({"transfer": "basic", "objects": [{**o, "actions": actions} for o in asked]})
        else:
            assert "/commit/" in path, path
            hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            self.say({"commitUrl": f"{hub.url}/{repo}/commit/x", "commitOid": hub.revision()})

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.say({"name": USER, "type": "user", "orgs": []})
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            files = hub.files.get(repo)
            if files is None:
                return self.say({"error": "Repository not found"}, 404)
            if "/tree/" in path:
                return self.say([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
                                 for n, c in files.items()])  # fmt: skip
            return self.say({"id": repo, "sha": hub.revision(), "private": False, "tags": [],
                             "siblings": [{"rfilename": name} for name in files]})  # fmt: skip
        repo, _, name = path.strip("/").partition("/resolve/")
        name = name.partition("/")[2]
        content = hub.files.get(repo, {}).get(name)
        if content is None:
            return self.reply(b"", 404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(content).hexdigest()
        return self.reply(content, X_Repo_Commit=hub.revision(), ETag=f'"{etag}"')

    def do_HEAD(self) -> None:
        self.do_GET()


@contextmanager
def hub_on_this_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Serves a Hub that the client of this process uses instead of huggingface.co.

    Args:
        cache: the folder for downloads.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    hub = FakeHub(url)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server.RequestHandlerClass = handler
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    # As HF_ENDPOINT=url and HF_HUB_OFFLINE=0 set before the import.
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()

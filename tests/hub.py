"""A hub on this machine: enough of its HTTP API for huggingface_hub's own client to look, create, upload and commit.

Large files come by LFS (HF_HUB_DISABLE_XET), small ones inside the commit. `Hub.repos` has what arrived, byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)
TOKEN = "hf_of_a_test"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"main": {".gitattributes": b"*.safetensors"}}
    )
    messages: list[str] = field(default_factory=list)  # of commits

    @property
    def files(self) -> dict[str, bytes]:
        return {name: content for name, content in self.branches["main"].items() if name != ".gitattributes"}


@dataclass
class Hub:
    """What the hub knows, and how it answers."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS: sha256 -> content
    refuses: dict[str, int] = field(
        default_factory=dict
    )  # end of a path -> status instead of an answer; 0: none, the connection breaks
    role: str = "write"  # of the token
    asked: list[str] = field(default_factory=list)  # "METHOD path"


class Refusal(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = (
                self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._chunked() else self._chunks()
            )
            hub.asked.append(f"{self.command} {path}")
            try:
                status, found, code = 200, reply(hub, self.command, path, body, self.headers), ""
            except Refusal as refusal:
                status, found, code = refusal.status, {"error": f"status {refusal.status}"}, refusal.code
            if not status:  # the connection breaks
                self.close_connection = True
                return
            content = json.dumps(found).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer

        def _chunked(self) -> bool:
            return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

        def _chunks(self) -> bytes:
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(hub: Hub, method: str, path: str, body: bytes, headers: Any) -> Any:
    """The answer as JSON; the checks are the hub's: who asks, and whether what is committed has arrived."""
    for end, status in hub.refuses.items():
        if path.endswith(end):
            raise Refusal(status)
    if path.startswith("/lfs/"):  # signed addresses: they need no token
        hub.objects[path.removeprefix("/lfs/")] = body
        return {}
    if headers.get("Authorization") not in (f"Bearer {TOKEN}", None) and not path.startswith("/api/validate-yaml"):
        raise Refusal(401)
    if path == "/api/whoami-v2":
        return {"name": "me", "type": "user", "auth": {"accessToken": {"role": hub.role}}}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in hub.repos:
            raise Refusal(409)
        hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        return {"url": f"{hub.url}/{name}", "name": name}
    if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
        return _batch(hub, json.loads(body))
    found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|branch)/(.+))?", path)
    if found is None:
        raise Refusal(404)
    name, verb, revision = found.groups()
    if name not in hub.repos:
        raise Refusal(404, "RepoNotFound")
    return _of_repo(hub, name, verb, revision or "main", body)


def _of_repo(hub: Hub, name: str, verb: str | None, revision: str, body: bytes) -> Any:
    repo = hub.repos[name]
    if verb == "branch":
        repo.branches.setdefault(revision, dict(repo.branches["main"]))
        return {}
    if revision not in repo.branches:
        raise Refusal(404, "RevisionNotFound")
    there = repo.branches[revision]
    if verb == "tree":
        return [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in there.items()]  # fmt: skip
    if verb == "preupload":
        return {"files": [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                           "shouldIgnore": False, "oid": None} for file in json.loads(body)["files"]]}  # fmt: skip
    if verb == "commit":
        return _commit(hub, name, there, [json.loads(line) for line in body.decode().splitlines()])
    return {"id": name, "private": repo.private, "sha": "0" * 40, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in there]}  # fmt: skip


def _batch(hub: Hub, asked: dict[str, Any]) -> dict[str, Any]:
    known = [{"oid": file["oid"], "size": file["size"]} for file in asked["objects"]]
    for file in known:
        if file["oid"] not in hub.objects:
            file["actions"] = {"upload": {"href": f"{hub.url}/lfs/{file['oid']}"}}
    return {"transfer": "basic", "objects": known}


def _commit(hub: Hub, name: str, there: dict[str, bytes], lines: list[dict[str, Any]]) -> dict[str, Any]:
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            hub.repos[name].messages.append(value["summary"])
        elif line["key"] == "file":
            there[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = hub.objects[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            there[value["path"]] = content
        else:
            del there[value["path"]]
    oid = hashlib.sha1(repr(sorted(there)).encode()).hexdigest()
    return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "hookOutput": ""}

"""As much of the Hugging Face Hub as its client needs to make a repository, commit to it and download from it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_good"


@dataclass
class Repository:
    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    def oid(self, index: int = -1) -> str:
        return hashlib.sha1(f"{range(len(self.commits))[index]}".encode()).hexdigest()

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        known = {self.oid(i): files for i, files in enumerate(self.commits)}
        oid = self.oid() if revision == "main" else revision
        return (oid, known[oid]) if oid in known else None


@dataclass
class Hub:
    """repositories by USER/NAME; served: METHOD and path of every request. mode: how files are uploaded, regular or lfs."""

    url: str = ""
    mode: str = "regular"
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)


@contextmanager
def running():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.hub.served.append(f"{self.command} {path}")
        may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if found := re.fullmatch(r"/large/(\w+)", path):  # signed, on the real Hub
            self.hub.large[found[1]] = body
            return self.answer(200)
        if self.command == "POST" and not may_write:
            return self.refuse(401, "Invalid credentials")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.+))?", path):
            repository = self.hub.repositories.get(found[1])
            if repository is None or (repository.private and not may_write):
                return self.refuse(404 if may_write else 401, "RepoNotFound")
            return self.ask(found[1], repository, found[2] or "", body)
        return self.answer(400)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def validate(self, content: str) -> None:
        import yaml

        front = yaml.safe_load(content.split("---\n")[1])
        if front.get("license") in (None, "mit"):
            self.answer(200, {"errors": [], "warnings": []})
        else:
            self.answer(400, {"errors": [{"message": '"license" must be one of [mit]'}], "warnings": []})

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "user":
            return self.refuse(403, "You may not create it")
        if name in self.hub.repositories:
            return self.answer(409, {"error": "it exists", "url": f"{self.hub.url}/{name}"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def ask(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        if rest in ("", "revision/main"):
            facts = {"id": name, "modelId": name, "private": repository.private, "sha": repository.oid()}
            return self.answer(200, {**facts, "tags": [], "downloads": 0, "likes": 0, "siblings": []})
        if rest == "preupload/main":
            modes = {True: self.hub.mode, False: "regular"}
            return self.answer(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": modes[f["path"].endswith("safetensors")],
                            "shouldIgnore": False,
                        }
                        for f in json.loads(body)["files"]
                    ]
                },
            )
        if rest == "info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}} for o in objects]
            return self.answer(200, {"transfer": "basic", "objects": actions})
        if rest == "commit/main":
            files = dict(repository.commits[-1])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
            repository.commits.append(files)
            url = f"{self.hub.url}/{name}/commit/{repository.oid()}"
            return self.answer(
                200, {"commitUrl": url, "commitOid": repository.oid(), "hookOutput": "", "success": True}
            )
        if found := re.fullmatch(r"resolve/([^/]+)/(.+)", rest):
            at = repository.files(found[1])
            if at is None:
                return self.refuse(404, "RevisionNotFound")
            if found[2] not in at[1]:
                return self.refuse(404, "EntryNotFound")
            content = at[1][found[2]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, content, ETag=etag, X_Repo_Commit=at[0])
        return self.answer(400)

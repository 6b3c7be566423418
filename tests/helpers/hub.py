"""A stand-in for the Hugging Face Hub on loopback: the few routes that reading a model or data and pushing one need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """repos: name -> {"commits": [{path: bytes}, ...], "private": bool}. objects: SHA-256 -> bytes, uploaded."""

    def __init__(self):
        self.repos, self.objects, self.ranges = {}, {}, []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes], private: bool = False) -> None:
        self.repos[repo] = {"commits": [dict(files)], "private": private}

    def sha(self, repo: str, number: int = -1) -> str:
        commits = self.repos[repo]["commits"]
        return hashlib.sha1(f"{repo} {range(len(commits))[number]}".encode()).hexdigest()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """At a branch or commit; None when there is none."""
        commits = self.repos[repo]["commits"]
        if revision == "main":
            return commits[-1]
        shas = [self.sha(repo, number) for number in range(len(commits))]
        return commits[shas.index(revision)] if revision in shas else None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(raw))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                repo = match.groupdict().get("repo")
                if repo is not None and repo not in self.hub.repos:
                    return self.answer(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
                return function(self, body, **match.groupdict())
        return self.answer(501, {"error": f"{self.command} {path} is not there"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        files = self.hub.files(repo, revision)
        if files is None:
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        sha = self.hub.sha(repo) if revision == "main" else revision
        siblings = [{"rfilename": name} for name in files]
        self.answer(200, {"id": repo, "sha": sha, "private": self.hub.repos[repo]["private"], "siblings": siblings})

    def entry(self, path: str, data: bytes) -> dict:
        sha = hashlib.sha256(data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 100}
        return entry

    def tree(self, body: bytes, repo: str, revision: str, under: str | None = None) -> None:
        """The files below a directory; not recursive, those in it, and the directories in it."""
        prefix = f"{under}/" if under else ""
        files = {path: data for path, data in self.hub.files(repo, revision).items() if path.startswith(prefix)}
        if under and not files:
            return self.answer(404, {"error": "no such directory"}, X_Error_Code="EntryNotFound")
        entries = [self.entry(path, data) for path, data in files.items()]
        directories = {prefix + path.removeprefix(prefix).split("/")[0] for path in files} - set(files)
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self.answer(200, entries + [{"type": "directory", "path": path, "oid": ""} for path in sorted(directories)])

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.files(repo, revision)
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        found = [self.entry(path, files[path]) for path in asked if path in files]
        within = {path for path in asked if path not in files and any(name.startswith(f"{path}/") for name in files)}
        self.answer(200, found + [{"type": "directory", "path": path, "oid": ""} for path in sorted(within)])

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        data = self.hub.files(repo, revision).get(path)
        if data is None:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": self.hub.sha(repo)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD":
            return self.answer(200, length=str(len(data)), Accept_Ranges="bytes", **headers)
        if wanted:
            begin, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            self.hub.ranges.append((path, begin, end + 1))
            return self.answer(206, data[begin : end + 1], Content_Range=f"bytes {begin}-{end}/{len(data)}", **headers)
        self.hub.ranges.append((path, 0, len(data)))
        return self.answer(200, data, **headers)

    def whoami(self, body: bytes) -> None:
        self.answer(200, {"type": "user", "name": "me", "orgs": []})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def auth_check(self, body: bytes, repo: str) -> None:
        self.answer(200, {})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        if repo in self.hub.repos:
            return self.answer(409, {"error": "it exists"})
        self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs"}, asked.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def delete(self, body: bytes) -> None:
        asked = json.loads(body)
        del self.hub.repos["/".join(filter(None, [asked.get("organization"), asked["name"]]))]
        self.answer(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in json.loads(body)["files"]
        ]
        self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append(entry if entry["oid"] in self.hub.objects else {**entry, "actions": upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "other bytes than named"})
        self.hub.objects[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, self.hub.sha(repo)):
            return self.answer(412, {"error": "a commit has happened since"})
        files = dict(self.hub.repos[repo]["commits"][-1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.objects[line["value"]["oid"]]
        self.hub.repos[repo]["commits"].append(files)
        sha = self.hub.sha(repo)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", r"/api/repos/create", _Handler.create),
    ("DELETE", r"/api/repos/delete", _Handler.delete),
    ("GET", rf"/api/(?:models|datasets)/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/auth-check(?:/write)?", _Handler.auth_check),
    ("GET", rf"/api/(?:models|datasets)/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/(?:models|datasets)/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?/?", _Handler.tree),
    ("POST", rf"/api/(?:models|datasets)/{_REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("GET", rf"/(?:datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD", rf"/(?:datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]

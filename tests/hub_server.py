"""A Hugging Face Hub on this machine, in the standard library, for the unmodified `huggingface_hub` client.

Answers what the client asks when it creates, uploads (LFS), commits, tags, lists, downloads and resumes; large files
are served from another origin, as on the Hub, so that a token sent there is a leak that a test can see. Faults are
injected over HTTP (`POST /_test/faults`), every request is logged (`GET /_test/log`).

    python -m tests.hub_server --token hf_... --port 0        # prints its address
"""

import argparse
import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".webp", ".bin", ".npz")
LARGE = 10 * 1024 * 1024
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


def git_sha1(data: bytes) -> str:
    """The id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match."""

    path: str
    method: str = ".*"
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1
    corrupt: bool = False
    stall: float = 0.0

    def hits(self, method: str, path: str) -> bool:
        """Whether it applies to this request; a hit is used up."""
        if self.times and re.search(self.path, path) and re.fullmatch(self.method, method):
            self.times -= 1
            return True
        return False


@dataclass
class Stored:
    """A file of a commit."""

    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else git_sha1(self.data)

    @property
    def blob_id(self) -> str:
        if not self.is_lfs:
            return git_sha1(self.data)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return git_sha1(pointer.encode())


@dataclass
class Repo:
    """One repository: linear history, tags, who may read."""

    private: bool = False
    gated: bool = False
    sdk: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Stored], title: str) -> str:
        """The new head's id."""
        listing = json.dumps([len(self.commits), title, {path: file.etag for path, file in sorted(files.items())}])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid], self.titles[oid], self.refs["main"] = files, title, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag or id names."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server's state, shared by all requests."""

    daemon_threads = True

    def __init__(self, token: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.token = token
        self.lock = RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self.server_address[1]}/_cdn"


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console: the log is in the state."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorization = self.headers.get("Authorization", "")
        self.is_owner = authorization == f"Bearer {self.server.token}"
        self.fault: Fault | None = None
        with self.server.lock:
            if not self.path_only.startswith("/_test/"):
                entry = {"method": self.command, "path": self.path_only, "range": self.headers.get("Range")}
                self.server.log.append({**entry, "has_token": bool(authorization), "host": self.headers.get("Host")})
                self.fault = next((f for f in self.server.faults if f.hits(self.command, self.path_only)), None)
        if self.fault and self.fault.stall:
            time.sleep(self.fault.stall)
        try:
            if self.fault and self.fault.status:
                raise Refused(self.fault.status, f"injected {self.fault.status}")
            if authorization and not self.is_owner and "/_cdn/" not in self.path_only:
                raise Refused(401, "Invalid credentials in Authorization header")
            with self.server.lock:
                answer = self._route()
            if answer is not None:
                self._json(200, answer)
        except Refused as refusal:
            headers = dict(self.fault.headers) if self.fault else {}
            headers |= {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._json(refusal.status, {"error": refusal.message, **refusal.more}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self._send(status, data, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and 0 <= self.fault.cut_after < len(data):
            self.wfile.write(data[: self.fault.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(data)

    def _route(self) -> Any:
        path = self.path_only
        for pattern, method in ROUTES:
            verb, _, expression = pattern.partition(" ")
            match = re.fullmatch(expression, path)
            if match and re.fullmatch(verb, self.command):
                return getattr(self, method)(**match.groupdict())
        raise Refused(404, f"no such endpoint: {self.command} {path}")

    # --- for the tests ---

    def test_faults(self) -> Any:
        self.server.faults = [Fault(**fault) for fault in json.loads(self.body)]
        return {}

    def test_log(self) -> Any:
        log, self.server.log = self.server.log, []
        return log

    def test_repo(self, kind: str, id: str) -> Any:
        repo = self.server.repos[KINDS[kind], id]
        for name, value in (json.loads(self.body) if self.body else {}).items():
            setattr(repo, name, value)
        return {
            "refs": repo.refs,
            "commits": [
                {"id": oid, "title": repo.titles[oid], "files": {path: file.sha256 for path, file in files.items()}}
                for oid, files in repo.commits.items()
            ],
            "variables": repo.variables,
            "sdk": repo.sdk,
            "private": repo.private,
        }

    # --- the Hub's API ---

    def whoami(self) -> Any:
        self._need_token()
        return {"type": "user", "name": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []}

    def validate_yaml(self) -> Any:
        content = json.loads(self.body)["content"]
        if not re.match(r"---\n.*?\n---\n", content, re.DOTALL):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    def create(self) -> Any:
        self._need_token()
        wanted = json.loads(self.body)
        kind = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if (wanted.get("organization") or "user") != "user":
            raise Refused(403, "You don't have the rights to create a repository under this namespace")
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.server.repos:
            raise Refused(409, "You already created this repo", url=url)
        variables = {entry["key"]: entry["value"] for entry in wanted.get("variables") or []}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = Repo(private=private, sdk=wanted.get("sdk"), variables=variables)
        attributes = Stored(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", is_lfs=False)
        repo.commit({".gitattributes": attributes}, "initial commit")
        self.server.repos[kind, repo_id] = repo
        return {"url": url, "id": repo_id, "name": repo_id}

    def info(self, kind: str, id: str, revision: str = "main") -> Any:
        repo = self._repo(kind, id)
        oid = self._commit(repo, revision)
        return {
            "id": id,
            "_id": "0",
            "author": id.split("/", maxsplit=1)[0],
            "sha": oid,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "likes": 0,
            "downloads": 0,
            "siblings": [{"rfilename": path} for path in repo.commits[oid]],
            "sdk": repo.sdk,
        }

    def refs(self, kind: str, id: str) -> Any:
        repo = self._repo(kind, id)
        entries = {
            name: {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in repo.refs.items()
        }
        main = entries.pop("main") | {"ref": "refs/heads/main"}
        return {"branches": [main], "tags": list(entries.values()), "converts": []}

    def tree(self, kind: str, id: str, revision: str) -> Any:
        repo = self._repo(kind, id)
        return [self._entry(*item) for item in sorted(repo.commits[self._commit(repo, revision)].items())]

    def paths_info(self, kind: str, id: str, revision: str) -> Any:
        repo = self._repo(kind, id)
        files = repo.commits[self._commit(repo, revision)]
        wanted = json.loads(self.body)["paths"]
        return [self._entry(path, files[path]) for path in wanted if path in files]

    def _entry(self, path: str, file: Stored) -> Any:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob_id}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
        return entry

    def preupload(self, kind: str, id: str, revision: str) -> Any:
        self._need_token()
        repo = self._repo(kind, id)
        files = repo.commits[self._commit(repo, revision)]
        modes = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LARGE
            old = files.get(path)
            modes.append(
                {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
                | ({"oid": old.etag} if old else {})
            )
        return {"files": modes}

    def lfs_batch(self, id: str, kind: str | None = None) -> Any:
        self._need_token()
        self._repo(kind or "models", id)
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.lfs:
                answer["actions"] = {"upload": {"href": f"{self.server.cdn_url}/{wanted['oid']}", "header": {}}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content does not have the announced sha256")
        self.server.lfs[oid] = self.body
        return {}

    def commit(self, kind: str, id: str, revision: str) -> Any:
        self._need_token()
        repo = self._repo(kind, id)
        head = self._commit(repo, revision)
        files, title = dict(repo.commits[head]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), is_lfs=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    raise Refused(422, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Stored(self.server.lfs[value["oid"]], is_lfs=True)
            elif item["key"] == "deletedFile":
                if value["path"] not in files:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
        oid = repo.commit(files, title)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{id}/commit/{oid}"}

    def tag(self, kind: str, id: str, revision: str) -> Any:
        self._need_token()
        repo = self._repo(kind, id)
        name = json.loads(self.body)["tag"]
        if name in repo.refs:
            raise Refused(409, f"Tag {name} already exists")
        repo.refs[name] = self._commit(repo, revision)
        return {}

    def variables(self, id: str) -> Any:
        self._need_token()
        repo = self._repo("spaces", id)
        wanted = json.loads(self.body)
        repo.variables[wanted["key"]] = wanted["value"]
        return {key: {"value": value} for key, value in repo.variables.items()}

    def resolve(self, id: str, revision: str, file: str, kind: str | None = None) -> None:
        repo = self._repo(kind or "models", id)
        if repo.gated and not self.is_owner:
            raise Refused(403, "Access to this model is restricted.", "GatedRepo")
        oid = self._commit(repo, revision)
        stored = repo.commits[oid].get(file)
        if stored is None:
            raise Refused(404, f"{file} does not exist", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes"}
        if stored.is_lfs:
            headers |= {"X-Linked-ETag": f'"{stored.sha256}"', "X-Linked-Size": str(len(stored.data))}
            headers |= {"Location": f"{self.server.cdn_url}/{stored.sha256}"}
            self._send(302, b"", headers)
        else:
            self._file(stored.data, headers)

    def cdn(self, oid: str) -> None:
        self._file(self.server.lfs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        if self.command == "HEAD":
            return self._send(200, b"", headers, length=len(data))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, data, headers)
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return self._send(206, data[start:stop], headers)

    def _need_token(self) -> None:
        if not self.is_owner:
            raise Refused(401, "Invalid username or password.")

    def _repo(self, kind: str, id: str) -> Repo:
        repo = self.server.repos.get((KINDS[kind], id))
        if repo is None or (repo.private and not self.is_owner):
            raise Refused(404 if self.is_owner else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_ID}"
ROUTES = (
    ("POST /_test/faults", "test_faults"),
    ("GET /_test/log", "test_log"),
    (rf"GET|POST /_test/(?P<kind>models|datasets|spaces)/{_ID}", "test_repo"),
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/validate-yaml", "validate_yaml"),
    ("POST /api/repos/create", "create"),
    (rf"GET {_API}", "info"),
    (rf"GET {_API}/revision/(?P<revision>.+)", "info"),
    (rf"GET {_API}/refs", "refs"),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)", "tree"),
    (rf"POST {_API}/paths-info/(?P<revision>.+)", "paths_info"),
    (rf"POST {_API}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST {_API}/commit/(?P<revision>.+)", "commit"),
    (rf"POST {_API}/tag/(?P<revision>.+)", "tag"),
    (rf"POST /api/spaces/{_ID}/variables", "variables"),
    (rf"POST /(?:(?P<kind>datasets|spaces)/)?{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    (rf"GET|HEAD /(?:(?P<kind>datasets|spaces)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
    (r"PUT /_cdn/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (r"GET|HEAD /_cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
)


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--token", required=True, help="the one token that may write")
    parser.add_argument("--port", type=int, default=0, help="0 = any free port")
    arguments = parser.parse_args()
    hub = Hub(arguments.token, arguments.port)
    print(hub.url, flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()

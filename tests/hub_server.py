"""A server on this machine that speaks the parts of Hugging Face's and Kaggle's protocols that their clients use.

`Server.huggingface[repository][revision]` and `Server.kaggle[model][version]` map paths to contents; `requests` is what was
asked for. `moved` redirects a name. Faults: `drop` cuts a body short, once; `refused` answers with an error; `damaged` sends
other bytes than the listing promises. `then` is done, once, when a file has been asked for.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Request(NamedTuple):
    """`what` is the kind of request: api, version, file."""

    method: str
    what: str
    name: str
    start: int = 0


class Server:
    def __init__(self, port: int = 0):
        self.huggingface: dict[str, dict[str, Files]] = {}
        self.kaggle: dict[str, dict[int, Files]] = {}
        self.moved: dict[str, str] = {}
        self.drop: dict[str, int] = {}
        self.damaged: dict[str, bytes] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.then: dict[str, Callable[[], object]] = {}
        self.requests: list[Request] = []
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def bodies(self):
        """The files of which a body was sent."""
        return sorted(request.name for request in self.requests if request.what == "file" and request.method == "GET")

    def environment(self):
        """What points the clients here. Kaggle's has no variable for an address, but one for a test system at http://localhost,
        and it goes through a proxy."""
        return {
            "HF_ENDPOINT": self.url,
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": self.url,
            "no_proxy": f"127.0.0.1,localhost:{self.port}",
        }


def commit(files):
    digests = [(name, hashlib.sha1(content).digest()) for name, content in sorted(files.items())]
    return hashlib.sha1(repr(digests).encode()).hexdigest()


def large(content):
    """Whether Hugging Face would keep this file elsewhere, as it does with weights."""
    return len(content) > 20_000


class _Handler(BaseHTTPRequestHandler):
    hub: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with suppress(ConnectionError):  # a client that has seen enough
            super().handle()

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status=200, **headers):
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _file(self, name, content, **headers):
        """A body from where the client asks for it, unless it is to be cut short."""
        content = self.hub.damaged.get(name, content)
        size = len(content)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.requests.append(Request(self.command, "file", name, start))
        if self.command == "GET":
            self.hub.then.pop(name, bool)()
        end = self.hub.drop.pop(name, size) if self.command == "GET" else size
        headers |= {"Content_Length": size - start, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
        self._answer(206 if start else 200, content[start:end], **headers)
        if end < size:
            self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/storage/"):
            model, _, rest = path.removeprefix("/storage/").partition("//")
            version, _, name = rest.partition("/")
            content = self.hub.kaggle[model][int(version)][name]
            digest = base64.b64encode(hashlib.md5(content).digest()).decode()
            self._file(name, content, X_Goog_Hash=f"crc32c=AAAAAA==,md5={digest}")
        elif path.startswith("/cdn/"):
            sha, _, name = path.removeprefix("/cdn/").partition("/")
            contents = [f[name] for r in self.hub.huggingface.values() for f in r.values() if name in f]
            self._file(name, next(content for content in contents if hashlib.sha256(content).hexdigest() == sha))
        else:
            self._huggingface(path)

    # -- Hugging Face ------------------------------------------------------------------------------------------------

    def _huggingface(self, path):
        api, path = path.startswith("/api/models/"), path.removeprefix("/api/models").removeprefix("/")
        verb = next((verb for verb in ("revision", "tree", "resolve") if f"/{verb}/" in path), "")
        repository, _, rest = path.partition(f"/{verb}/")
        if repository in self.hub.moved:
            place = f"/{'api/models/' if api else ''}{self.hub.moved[repository]}/{verb}/{rest}"
            return self._answer(307, Location=place)
        if api:
            self.hub.requests.append(Request(self.command, "api", f"{verb} {repository}"))
        if repository in self.hub.refused and (api or self.hub.refused[repository][1] != "GatedRepo"):
            status, code = self.hub.refused[repository]
            return self._answer(status, X_Error_Code=code, X_Error_Message=code)
        revisions = self.hub.huggingface.get(repository)
        if revisions is None:
            return self._answer(401, X_Error_Message="Invalid username or password.")
        commits = {commit(files): files for files in revisions.values()}
        named = sorted([*revisions, *commits], key=len, reverse=True)
        revision = next((name for name in named if rest == name or rest.startswith(f"{name}/")), None)
        if revision is None:
            return self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {rest}")
        files = revisions.get(revision) or commits[revision]
        sha, name = commit(files), rest.removeprefix(revision).removeprefix("/")
        if verb == "revision":
            return self._json({"_id": "0", "id": repository, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        if verb == "tree":
            return self._json([self._entry(name, content) for name, content in files.items()])
        if repository in self.hub.refused:
            return self._answer(self.hub.refused[repository][0], X_Error_Code="GatedRepo", X_Error_Message="restricted")
        if name not in files:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = files[name]
        if large(content):
            digest = hashlib.sha256(content).hexdigest()
            where = f"http://localhost:{self.hub.port}/cdn/{digest}/{name}"  # to the client another machine
            linked = {"X_Linked_Size": len(content), "X_Linked_Etag": f'"{digest}"'}
            return self._answer(302, Location=where, X_Repo_Commit=sha, **linked)
        return self._file(name, content, X_Repo_Commit=sha, ETag=f'"{self._entry(name, content)["oid"]}"')

    def _entry(self, name, content):
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if large(content):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    # -- Kaggle ------------------------------------------------------------------------------------------------------

    def do_POST(self):
        verb = urlsplit(self.path).path.rpartition("/")[2]
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        framework = asked["framework"].removeprefix("MODEL_FRAMEWORK_").lower()
        model = f"{asked['ownerSlug']}/{asked['modelSlug']}/{framework}/{asked['instanceSlug']}"
        versions = self.hub.kaggle.get(model, {})
        version = asked.get("versionNumber") or max(versions, default=0)
        name = asked.get("path", "")
        self.hub.requests.append(Request("POST", "version" if verb == "GetModelInstance" else "api", name or model))
        if model in self.hub.refused:
            status = self.hub.refused[model][0]
            return self._json({"code": status, "message": "Permission denied"}, status)
        if version not in versions or (verb == "DownloadModelInstanceVersion" and name not in versions[version]):
            return self._json({"code": 404, "message": "Not found"}, 404)
        if verb == "GetModelInstance":
            newest = {"X_Kaggle_HubVersion": "99.0"}  # of which the client tells on standard output
            return self._json({"id": 1, "versionId": 1, "versionNumber": version}, **newest)
        return self._answer(302, Location=f"http://localhost/storage/{model}//{version}/{name}")

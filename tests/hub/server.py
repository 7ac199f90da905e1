"""A Hub on loopback: the HTTP API that huggingface_hub's client speaks, in memory, for one user.

LFS objects are kept from when they arrive, commit or not, as the Hub keeps them. `refuse` decides about requests
before they are looked at; `requests` is what came.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopbackTokenOfNobody" * 2
USER = "tester"


@dataclass
class Blob:
    data: bytes | None  # None: in pieces, which only a client of Xet could put together
    lfs: bool
    said: str = ""  # by the client that sent the pieces

    @property
    def oid(self) -> str:
        if self.data is None:
            return self.said
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        listing = "".join(f"{name} {blob.oid}\n" for name, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Refusal(Exception):
    def __init__(self, status: int, message: str = "", code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Hub:
    """The server, running in a thread until `stop`."""

    def __init__(self, part_bytes: int | None = None):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xorbs: dict[str, bytes] = {}  # Xet, by their own digest
        self.part_bytes = part_bytes  # objects above it are sent in parts
        self.requests: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], Refusal | None] = lambda method, path: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return {name: blob.data for name, blob in repo.commits[repo.branches[revision]].items()}

    def uploads(self) -> list[str]:
        return [path for method, path in self.requests if method == "PUT"]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle_request(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append((self.command, path))
        try:
            if (refusal := self.hub.refuse(self.command, path)) is not None:
                raise refusal
            for method, pattern, answer in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    return answer(self, body, **found.groupdict())
            raise Refusal(404, f"no route {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code or ""}
            self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def writer(self) -> None:
        if not self.known:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.known):
            raise Refusal(401 if not self.known else 404, "Repository not found", "RepoNotFound")
        return repo

    def tree(self, repo_id: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repo = self.repo(repo_id)
        sha = repo.sha(revision)
        if sha is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return sha, repo.commits[sha]

    # ---- the API ----

    def whoami(self, body):
        self.writer()
        self.answer({"type": "user", "name": USER, "orgs": []})

    def validate_yaml(self, body):
        text = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
        try:
            good = found is not None and isinstance(yaml.safe_load(found.group(1)), dict)
        except yaml.YAMLError:
            good = False
        self.answer({"errors": [] if good else [{"message": "bad metadata"}], "warnings": []}, 200 if good else 400)

    def create_repo(self, body):
        self.writer()
        said = json.loads(body)
        repo_id = f"{said.get('organization') or USER}/{said['name']}"
        if not repo_id.startswith(f"{USER}/"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {repo_id}")
        exists = repo_id in self.hub.repos
        if not exists:
            repo = self.hub.repos[repo_id] = Repo(private=said.get("visibility") == "private")
            repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.answer({"url": f"{self.hub.url}/{repo_id}", "id": repo_id}, 409 if exists else 200)

    def create_branch(self, body, repo_id, branch):
        self.writer()
        repo = self.repo(repo_id)
        exists = branch in repo.branches
        repo.branches.setdefault(branch, repo.branches["main"])
        self.answer({}, 409 if exists else 200)

    def info(self, body, repo_id, revision="main"):
        sha, files = self.tree(repo_id, revision)
        siblings = [{"rfilename": name} for name in files]
        self.answer(
            {"id": repo_id, "sha": sha, "private": self.repo(repo_id).private, "siblings": siblings, "tags": []}
        )

    def list_tree(self, body, repo_id, revision, path=None):
        _, files = self.tree(repo_id, revision)
        found = {name: blob for name, blob in files.items() if path is None or name.startswith(f"{path}/")}
        if not found:
            raise Refusal(404, "no such folder", "EntryNotFound")
        self.answer([entry(name, blob) for name, blob in found.items()])

    def paths_info(self, body, repo_id, revision):
        _, files = self.tree(repo_id, revision)
        wanted = re.findall(r"paths=([^&]+)", unquote(body.decode())) or json.loads(body)["paths"]
        self.answer([entry(name, files[name]) for name in wanted if name in files])

    def preupload(self, body, repo_id, revision):
        self.writer()
        _, files = self.tree(repo_id, revision)
        answers = [
            {
                "path": said["path"],
                "uploadMode": "lfs" if said["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
                "oid": files[said["path"]].oid if said["path"] in files else None,
            }
            for said in json.loads(body)["files"]
        ]
        self.answer({"files": answers})

    def lfs_batch(self, body, repo_id):
        self.writer()
        self.repo(repo_id)
        objects = []
        for said in json.loads(body)["objects"]:
            oid, size = said["oid"], said["size"]
            if oid not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{oid}"}
                length = self.hub.part_bytes
                if length is not None and size > length:
                    parts = {str(n + 1): f"{self.hub.url}/lfs/{oid}/{n + 1}" for n in range(-(-size // length))}
                    upload = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": {"chunk_size": length, **parts}}
                said["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(said)
        self.answer({"objects": objects, "transfer": "basic"})

    def put_object(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the object has another digest")
        self.hub.objects[oid] = body
        self.answer({})

    def put_part(self, body, oid, number):
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        self.answer({}, headers={"ETag": hashlib.md5(body).hexdigest()})

    def complete(self, body, oid):
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self.put_object(b"".join(self.hub.parts[oid][number] for number in numbers), oid)

    def verify(self, body, oid):
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, "the object is not there")
        self.answer({})

    def xet_token(self, body, repo_id, revision):
        self.writer()
        self.answer({"casUrl": f"{self.hub.url}/cas", "accessToken": "of-this-hub", "exp": 2**33})

    def put_xorb(self, body, digest):
        self.hub.xorbs[digest] = body
        self.answer({"was_inserted": True})

    def put_shard(self, body):
        self.answer({"result": 1})

    def commit(self, body, repo_id, revision):
        self.writer()
        _, before = self.tree(repo_id, revision)
        files, message = dict(before), ""
        for said in map(json.loads, body.splitlines()):
            value = said["value"]
            if said["key"] == "header":
                message = value["summary"]
            elif said["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif said["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects and not self.hub.xorbs:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(self.hub.objects.get(value["oid"]), True, value["oid"])
            else:
                raise Refusal(400, f"unknown operation {said['key']}")
        sha = self.repo(repo_id).commit(revision, files, message)
        self.answer({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def resolve(self, body, repo_id, revision, path):
        sha, files = self.tree(repo_id, revision)
        if path not in files:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        blob = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        self.answer(blob.data, headers=headers)


def entry(name: str, blob: Blob) -> dict:
    lfs = {"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 128}} if blob.lfs else {}
    return {"type": "file", "path": name, "oid": blob.oid[:40], "size": len(blob.data), **lfs}


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
REV = r"(?P<revision>.+)"
OID = r"(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.create_branch),
    ("POST", f"/api/models/{REPO}/preupload/{REV}", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REV}", Handler.commit),
    ("POST", f"/api/models/{REPO}/paths-info/{REV}", Handler.paths_info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", Handler.list_tree),
    ("GET", f"/api/models/{REPO}/revision/{REV}", Handler.info),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", f"/lfs/{OID}", Handler.put_object),
    ("PUT", f"/lfs/{OID}/(?P<number>[0-9]+)", Handler.put_part),
    ("POST", f"/lfs/{OID}/complete", Handler.complete),
    ("POST", f"/lfs/{OID}/verify", Handler.verify),
    ("GET", f"/api/models/{REPO}/xet-write-token/{REV}", Handler.xet_token),
    ("POST", "/cas/v1/xorbs/default/(?P<digest>[0-9a-f]{64})", Handler.put_xorb),
    ("POST", "/cas/v1/shards", Handler.put_shard),
    ("HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]

"""A whole Hub on loopback: two origins over one state, to start, fill, break and read from a test or a benchmark.

    python -m hub.server --seed org/name=DIR --port 0

serves until it is interrupted and prints the environment that a client needs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hub import api, commits, discussions, files, store
from hub.faults import Action, Fault, Faults
from hub.repos import MAIN, Commit, Repo, State, User
from hub.traffic import Traffic
from hub.wire import Origin

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OWNER = "ada"


class Hub:
    """One server. `endpoint` and `token` are what HF_ENDPOINT and HF_TOKEN take.

    The token belongs to `OWNER`, who may also write below `organizations`. `part_size` is the number of bytes above
    which uploads go in parts; `page_size` the number of rows in a page; `region` and `xet` what new repositories get:
    objects are copied between two repositories only within a region and with a Xet hash. With `resolve_cache` small
    files come by a redirect within the host, whose Location is a path alone.
    """

    def __init__(self, folder: Path, *, organizations: Sequence[str] = ("org",), port: int = 0) -> None:
        self.folder = folder
        self.state = State(folder)
        self.faults = Faults()
        self.traffic = Traffic()
        self.errors: list[str] = []
        self.leaks: list[str] = []  # requests that brought a token to the store
        self.home = folder / "home"  # of clients' caches; the fixture has them outside
        self.waits: list[float] = []
        self.secret = secrets.token_bytes(16)
        self.part_size, self.page_size = 1 << 30, 1000
        self.region, self.xet, self.resolve_cache = "us", True, False
        self._numbers = itertools.count()
        self.token = self.add_user(OWNER, organizations)
        self.store = Origin(self, "store", store.ROUTES)
        self.front = Origin(self, "hub", [*api.ROUTES, *commits.ROUTES, *discussions.ROUTES, *files.ROUTES], port)
        self.endpoint = self.front.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close both ports and every connection."""
        self.front.stop()
        self.store.stop()

    def add_user(self, name: str, organizations: Sequence[str] = (), *, write: bool = True) -> str:
        """A further user, who owns the namespace of their name and `organizations`; returns their token."""
        token = f"hf_{name}_{secrets.token_hex(12)}"
        self.state.users[token] = User(name, frozenset({name, *organizations}), write)
        return token

    def add_repo(
        self,
        repo_id: str,
        folder: Path | None = None,
        *,
        private: bool = False,
        gated: str | bool = False,
        region: str | None = None,
        xet: bool | None = None,
        digests: Mapping[str, str] | None = None,
        message: str = "Upload model",
    ) -> str:
        """A repository with the files below `folder` as its one commit, or empty; returns the head's name.

        Large files are served from where they lie and must not change while the server runs. `digests` gives sha256
        of large files, by path, that are known already and then not read for it.
        """
        region, xet = region or self.region, self.xet if xet is None else xet
        with self.state.lock:
            if folder is None:
                repo = self.state.create(repo_id, private, region, xet, "system")
            else:
                repo = self.state.repos[repo_id] = Repo(repo_id, private, region=region, xet=xet)
                self.state.seed(repo, folder, digests or {}, message)
            repo.gated = gated
        return repo.head.oid

    def commit(self, repo_id: str, changes: Mapping[str, bytes | None], message: str = "Someone else's commit") -> str:
        """Another commit on the main branch, made behind the client's back; None deletes. Returns its name."""
        state = self.state
        with state.lock:
            repo = state.repos[repo_id]
            rows = [
                ("deletedFile", {"path": path}) if content is None else ("file", {"path": path, "content": content})
                for path, content in changes.items()
            ]
            tree = state.apply(repo, repo.head.tree, rows)
            return state.add_commit(repo, MAIN, tree, message, "", "someone").oid

    def name(self, repo_id: str) -> str:
        """The same; another endpoint has throw-away names here."""
        return repo_id

    def api(self) -> HfApi:
        """The real client, with the owner's token."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def repo(self, repo_id: str) -> Repo:
        """A repository as the server holds it, to look at or to change."""
        return self.state.repos[repo_id]

    def head(self, repo_id: str, ref: str = MAIN) -> Commit:
        """The commit that a ref points to."""
        repo = self.state.repos[repo_id]
        return repo.commits[repo.refs[ref]]

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file's content, without a request."""
        entry = self.state.repos[repo_id].commit(revision).tree[path]
        return self.state.paths[entry.sha256].read_bytes() if entry.sha256 else entry.content or b""

    def fail(self, method: str, pattern: str, action: Action, *, nth: int = 1, times: int | None = 1) -> Fault:
        """Script a fault; see `hub.faults`. Returns its line, whose `hits` tell whether it struck."""
        return self.faults.add(method, pattern, action, nth=nth, times=times)

    def environment(self, home: Path, *, token: bool = True) -> dict[str, str]:
        """What a process needs to talk to this server and to nothing else, its cache below `home`."""
        return environment_of(self.endpoint, self.token if token else None, home) | HERE

    def link(self, path: str, **query: str) -> str:
        """A signed link to the store; `expire_links` ends all that were given out."""
        text = "".join(f"{name}={value.replace('/', '%2F')}&" for name, value in sorted(query.items()))
        return f"{self.store.url}{path}?{text}signature={store.signature(self.secret, path, query)}"

    def expire_links(self) -> None:
        """Links to the store that are out already are refused from now on."""
        self.secret = secrets.token_bytes(16)

    def scratch(self, name: str) -> Path:
        """A path for a file that is being received."""
        return self.folder / f"{name}-{next(self._numbers)}"


HERE = {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
"""What a client of this server needs beside: it speaks HTTP alone, and no proxy leads to it."""


def environment_of(endpoint: str, token: str | None, home: Path) -> dict[str, str]:
    """The variables that point huggingface_hub at an endpoint, with its cache below `home`."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return environment | ({"HF_TOKEN": token} if token else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m hub.server", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", action="append", default=[], metavar="ORG/NAME=DIR", help="a repository to hold")
    parser.add_argument("--port", type=int, default=0, help="port of the Hub; 0 takes a free one")
    options = parser.parse_args(arguments)
    seeds = []
    for seed in options.seed:
        repo_id, _, folder = seed.partition("=")
        if repo_id.count("/") != 1 or not Path(folder).is_dir() or not folder:
            parser.error(f"not ORG/NAME=DIR with a directory: {seed}")
        seeds.append((repo_id, Path(folder)))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    organizations = sorted({repo_id.split("/")[0] for repo_id, _ in seeds} | {"org"})
    with (
        tempfile.TemporaryDirectory() as folder,
        Hub(Path(folder), organizations=organizations, port=options.port) as hub,
    ):
        for repo_id, seed in seeds:
            hub.add_repo(repo_id, seed)
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}.items():
            print(f"{name}={value}", flush=True)
        stop.wait()
    return os.EX_OK


if __name__ == "__main__":
    raise SystemExit(main())

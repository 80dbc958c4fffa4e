"""Downloads against a local HTTP server that cuts connections, knows no ranges, changes the file and lies."""

import fcntl
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ckd_fed.cli import main
from ckd_fed.config import configs_directory
from ckd_fed.data.amazon import CATEGORIES
from ckd_fed.data.fetch import ATTEMPTS, Source, fetch, read_sources
from ckd_fed.errors import DataError

CONTENT = np.random.default_rng(0).bytes(1_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content`` at every path, with faults.

    ``cuts`` are the numbers of bytes after which the next responses break off, ``statuses`` the codes of the next responses instead.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges, self.length = CONTENT, '"one"', True, True
        self.believes, self.silent = False, False  # goes on with a range whatever the version asked for; names no version then
        self.cuts, self.statuses, self.asked = [], [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.gz"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range", ""))
        if server.statuses:
            self.send_response(server.statuses.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        same = server.believes or self.headers.get("If-Range") == server.etag
        if server.ranges and self.headers.get("Range") and same:
            start = int(self.headers["Range"][6:-1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        if server.etag and not (start and server.silent):
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(server, tmp_path):
    def run(sha256=SHA256, **options):
        return fetch(Source("file.gz", server.url, sha256), tmp_path / "sources", wait=0.001, timeout=5, **options)

    return run


@pytest.fixture
def folder(tmp_path):
    """What lies in the target folder, name -> content."""
    return lambda: {path.name: path.read_bytes() for path in (tmp_path / "sources").iterdir()}


def test_a_download(server, get, folder):
    told = []
    assert get(progress=lambda done, total: told.append((done, total))) == SHA256
    assert folder() == {"file.gz": CONTENT}
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert get() == SHA256
    assert server.asked == [""]  # what is there is not asked for again


def test_cut_connections_go_on_where_they_ended(server, get, folder):
    server.cuts = [400_000, 300_000, 0, 500_000]
    get()
    assert folder() == {"file.gz": CONTENT}
    assert server.asked == ["", "bytes=400000-", "bytes=700000-", "bytes=700000-", "bytes=1200000-"]


def test_a_server_without_ranges_starts_over(server, get, folder):
    server.ranges, server.cuts = False, [400_000, 900_000]
    get()
    assert folder() == {"file.gz": CONTENT}
    assert len(server.asked) == 3


def test_a_file_that_changed_meanwhile_is_not_mixed(server, get, folder):
    server.cuts = [400_000, *[0] * ATTEMPTS]
    with pytest.raises(DataError):
        get(sha256="")
    assert folder()[".file.gz.part"] == CONTENT[:400_000]
    server.cuts, server.asked, server.content, server.etag = [], [], CONTENT[::-1], '"two"'
    get(sha256="")
    assert server.asked == ["bytes=400000-"]
    assert folder() == {"file.gz": CONTENT[::-1]}


def test_a_server_that_goes_on_with_another_file_is_not_believed(server, get, folder):
    server.cuts = [400_000, *[0] * ATTEMPTS]
    with pytest.raises(DataError):
        get(sha256="")
    server.cuts, server.asked, server.content, server.etag, server.believes = [], [], CONTENT[::-1], '"two"', True
    get(sha256="")
    assert server.asked == ["bytes=400000-", ""]
    assert folder() == {"file.gz": CONTENT[::-1]}


def test_a_server_that_does_not_repeat_the_version_is_gone_on_with(server, get, folder):
    server.silent, server.cuts = True, [400_000, 300_000, 300_000]
    get()
    assert server.asked == ["", "bytes=400000-", "bytes=700000-", "bytes=1000000-"]
    assert folder() == {"file.gz": CONTENT}


def test_two_at_once(get, folder, refuses, tmp_path):
    (tmp_path / "sources").mkdir()
    handle = os.open(tmp_path / "sources", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    refuses(DataError, get, "another process is fetching into", tmp_path / "sources")
    assert folder() == {}
    os.close(handle)
    assert get() == SHA256


def test_a_file_system_without_locks_keeps_nobody_from_fetching(get, monkeypatch):
    def flock(handle, operation):
        raise OSError(9, "Bad file descriptor")  # of a folder, over NFS

    monkeypatch.setattr(fcntl, "flock", flock)
    assert get() == SHA256


def test_an_empty_answer_is_no_file(server, get, folder, refuses):
    server.content = b""
    refuses(DataError, lambda: get(sha256=""), "empty file", f"{ATTEMPTS} times in a row")
    assert "file.gz" not in folder()


def test_without_a_version_a_part_is_never_continued(server, get, folder):
    server.etag, server.cuts = "", [400_000]
    get()
    assert folder() == {"file.gz": CONTENT}
    assert server.asked == ["", ""]


def test_a_later_call_goes_on(server, get, folder, refuses):
    server.cuts = [400_000, *[0] * ATTEMPTS]
    refuses(DataError, get, server.url, f"{ATTEMPTS} times in a row", "run the command again")
    assert folder()[".file.gz.part"] == CONTENT[:400_000]
    assert "file.gz" not in folder()
    server.cuts, server.asked = [], []
    assert get() == SHA256
    assert server.asked == ["bytes=400000-"]
    assert folder() == {"file.gz": CONTENT}


def test_a_wrong_checksum(server, get, folder, refuses):
    refuses(DataError, lambda: get(sha256="0" * 64), server.url, SHA256[:12], "000000000000", "discarded")
    assert folder() == {}
    get()
    refuses(DataError, lambda: get(sha256="0" * 64), "file.gz", "not the file that is published", "remove it")
    assert folder() == {"file.gz": CONTENT}


def test_a_passing_fault_is_retried_and_a_lasting_one_is_not(server, get, tmp_path, refuses):
    server.statuses = [503, 429, 500]
    assert get() == SHA256
    server.statuses, server.asked = [404], []
    refuses(DataError, lambda: fetch(Source("other", server.url), tmp_path, wait=0.001), "404", "address")
    assert len(server.asked) == 1


def test_a_server_that_is_not_there(tmp_path, refuses):
    url = "http://127.0.0.1:1/file"
    refuses(DataError, lambda: fetch(Source("file", url), tmp_path, wait=0.001, timeout=1), url, "times in a row")
    assert list(tmp_path.iterdir()) == []


def test_a_range_that_cannot_be_satisfied_starts_over(server, get, folder, tmp_path):
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / ".file.gz.part").write_bytes(CONTENT + b"more")
    (tmp_path / "sources" / ".file.gz.part.json").write_text('{"version": "\\"one\\""}')
    server.statuses = [416]
    assert get() == SHA256
    assert folder() == {"file.gz": CONTENT}


def test_without_a_length_the_end_is_the_end(server, get, folder):
    server.length = False
    assert get() == SHA256
    assert folder() == {"file.gz": CONTENT}


def test_the_registry():
    assert {path.stem for path in (configs_directory() / "sources").glob("*.yaml")} == set(CATEGORIES)
    for name, category in CATEGORIES.items():
        names = [source.name for source in read_sources(name)]
        assert names == [f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz", f"image_features_{category}.b"]
        assert all(source.url.endswith("/" + source.name) for source in read_sources(name))


@pytest.mark.parametrize("content", [
    "[]", "files: 3", "files: {a: 1}", "files: {a: {sha256: x}}", "files: {../a: {url: 'http://h/a'}}", "files: {a: {url: 'file:///a'}}",
    "files: {a: {url: 'http://h/a', sha256: abc}}", "files: {a",
])  # fmt: skip
def test_a_registry_that_cannot_be_used(tmp_path, refuses, content):
    (tmp_path / "mine.yaml").write_text(content)
    refuses(DataError, lambda: read_sources("mine", tmp_path), tmp_path / "mine.yaml")
    refuses(DataError, lambda: read_sources("mien", tmp_path), "did you mean 'mine'")


def test_the_command(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "mine.yaml").write_text(f"files:\n  a.gz: {{url: '{server.url}', sha256: {SHA256}}}\n  b.gz: {{url: '{server.url}'}}\n")
    monkeypatch.setattr("ckd_fed.data.fetch.configs_directory", lambda: tmp_path)
    main(["data", "fetch", "mine", "--home", str(tmp_path / "home")])
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{tmp_path}/home/sources/mine/a.gz: sha256 {SHA256} (as published)",
        f"{tmp_path}/home/sources/mine/b.gz: sha256 {SHA256} (the publisher states none to hold it against)",
    ]
    assert (tmp_path / "home" / "sources" / "mine" / "b.gz").read_bytes() == CONTENT

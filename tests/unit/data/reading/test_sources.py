from __future__ import annotations

import asyncio
import functools
import gzip
import http.server
import importlib.util
import io
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from aiohttp import web

from amenable.data.reading import remote
from amenable.data.reading.records import DroppingLog, ReadLog, iter_records
from amenable.data.reading.sources import (
    HubName,
    Source,
    find_sources,
    find_usable,
    hub_name,
    open_source,
    state_of,
)
from amenable.errors import DataError

ROWS = b'{"a": 1}\n{"a": 2}\n'


def refusal(*names: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        find_sources(names)
    return str(caught.value)


def values(source: Source) -> list[Any]:
    return [row.values for row in iter_records(source, ReadLog())]


def read_refusal(name: str) -> str:
    """What is said of a name that is found but cannot be opened."""
    (source,) = find_sources([name])
    with pytest.raises(DataError) as caught:
        values(source)
    return str(caught.value)


def names(sources: Sequence[Source]) -> list[str]:
    return [source.name for source in sources]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "deep/d.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROWS)
    return tmp_path


# Local files


def test_a_file_keeps_its_name_and_home_is_expanded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (source,) = find_sources(["~/a.jsonl"])
    assert source == Source(name="~/a.jsonl", label="a")
    assert source.shown == "~/a.jsonl"
    assert source.local == folder / "a.jsonl"
    with open_source(source) as file:
        assert file.read() == ROWS
    assert names(find_sources(["~/*.jsonl"])) == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]


def test_a_glob_gives_its_files_in_order(folder: Path) -> None:
    (folder / "folder.jsonl").mkdir()
    assert names(find_sources([f"{folder}/*.jsonl"])) == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    assert names(find_sources([f"{folder}/?.jsonl"])) == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    assert names(find_sources([f"{folder}/[b].jsonl"])) == [f"{folder}/b.jsonl"]
    assert names(find_sources([f"{folder}/**/*.json*"])) == [
        f"{folder}/a.jsonl",
        f"{folder}/b.jsonl",
        f"{folder}/deep/d.json",
        f"{folder}/deep/er/c.jsonl",
    ]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder: Path) -> None:
    (folder / "x[1].jsonl").write_bytes(ROWS)
    (source,) = find_sources([folder / "x[1].jsonl"])
    assert values(source) == [{"a": 1}, {"a": 2}]


def test_a_file_url_is_a_local_file(folder: Path) -> None:
    (source,) = find_sources([f"file://{folder}/a.jsonl"])
    assert source.local == folder / "a.jsonl"
    assert len(values(source)) == 2


def test_labels_are_stems_numbered_where_they_are_shared(tmp_path: Path) -> None:
    given = ["one/r.jsonl", "two/r.json", "three/r.jsonl.gz", "four/x.y.parquet", "five/r.csv"]
    for name in [*given, "six/r#2.tsv", "seven/.gz", "eight/plain"]:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(ROWS)
    sources = find_sources([tmp_path / name for name in given])
    assert [source.label for source in sources] == ["r", "r#2", "r#3", "x.y", "r#4"]
    odd = find_sources([tmp_path / name for name in ("six/r#2.tsv", *given[:2], "seven/.gz")])
    assert [source.label for source in odd] == ["r#2", "r", "r#3", ".gz"]
    assert find_sources([tmp_path / "eight/plain"])[0].label == "plain"


def test_a_missing_file_is_named_with_where_it_was_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(folder / "none.jsonl") == (
        f"{folder}/none.jsonl: there is no such file (looked in {folder}); correct the path"
    )
    monkeypatch.chdir(folder)
    assert refusal("deep/none.jsonl") == (
        f"deep/none.jsonl: there is no such file (looked in {folder}/deep); correct the path"
    )
    assert "there is no such file (looked in" in refusal("nul\0.jsonl")
    assert read_missing("gone.jsonl") == (
        f"gone.jsonl: there is no such file (looked in {folder}); correct the path"
    )


def read_missing(name: str) -> str:
    with pytest.raises(DataError) as caught:
        open_source(Source(name, "x"))
    return str(caught.value)


def test_a_folder_is_refused(folder: Path) -> None:
    assert refusal(folder) == f"{folder}: is a folder; name the files in it"
    assert read_missing(str(folder)) == f"{folder}: is a folder; name the files in it"
    assert refusal("").endswith("is a folder; name the files in it")


def test_a_glob_without_files_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert refusal("*.csv") == (
        f"*.csv: no file matches (looked from {folder}); correct the pattern"
    )
    assert "no file matches" in refusal("dee*")


def test_a_file_given_twice_is_refused(folder: Path) -> None:
    message = "the file is given twice; name it once"
    again = folder / "deep" / ".." / "a.jsonl"
    assert refusal(folder / "a.jsonl", again) == f"{again}: {message}"
    assert refusal(f"{folder}/*.jsonl", f"{folder}/b.jsonl") == f"{folder}/b.jsonl: {message}"
    url = "https://u:pw@h/a.jsonl?sig=1"
    assert refusal(url, url) == f"https://h/a.jsonl?…: {message}"


def test_a_file_that_may_not_be_opened_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied")

    (source,) = find_sources([folder / "a.jsonl"])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError) as caught:
        values(source)
    said = f"{folder}/a.jsonl: cannot be opened (Permission denied); check its permissions"
    assert str(caught.value) == said
    with pytest.raises(DataError, match="cannot be opened"):  # no record to drop: a whole file
        list(iter_records(source, DroppingLog()))
    monkeypatch.setattr(Path, "exists", refuse)
    assert refusal(folder / "a.jsonl") == said


def test_a_name_that_is_too_long_is_named() -> None:
    assert refusal("x" * 5000).endswith("cannot be opened (File name too long); check the path")


def test_gzip_is_recognised_by_its_bytes_and_by_its_name(tmp_path: Path) -> None:
    for name in ("r.jsonl.gz", "r.jsonl", "R.JSONL.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(ROWS))
        (source,) = find_sources([tmp_path / name])
        assert source.label.lower() == "r"
        assert values(source) == [{"a": 1}, {"a": 2}]


# URLs


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    for name, data in (("b.jsonl", ROWS), ("a.jsonl.gz", gzip.compress(ROWS)), ("x?.jsonl", ROWS)):
        system.pipe(f"/place/{name}", data)
    yield system
    system.rm("/place", recursive=True)


def test_any_fsspec_url_is_read_and_its_globs_are_listed(memory: Any) -> None:
    sources = find_sources(["memory://place/b.jsonl"])
    assert sources == [Source("memory://place/b.jsonl", "b")]
    assert sources[0].local is None
    assert values(sources[0]) == [{"a": 1}, {"a": 2}]
    found = find_sources(["memory://place/[ab].jsonl*"])
    assert [source.label for source in found] == ["a", "b"]
    assert [len(values(source)) for source in found] == [2, 2]
    assert [source.label for source in find_sources(["memory://place/x?.jsonl"])] == ["x"]
    memory.pipe("/place/y[1].jsonl", ROWS)
    assert len(values(find_sources(["memory://place/y[1].jsonl"])[0])) == 2
    assert "no file matches; correct the pattern, or name" in refusal("memory://place/*.csv")


def test_parquet_is_read_through_fsspec(memory: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2]}), file)
    memory.pipe("/place/p.parquet", file.getvalue())
    assert values(find_sources(["memory://place/p.parquet"])[0]) == [{"a": 1}, {"a": 2}]


def test_a_missing_remote_file_and_a_remote_folder_are_named(memory: Any) -> None:
    assert read_refusal("memory://place/none.jsonl") == (
        "memory://place/none.jsonl: there is no such file; correct the URL"
    )
    assert "place: " in read_refusal("memory://place")


def test_the_state_of_a_remote_file_changes_with_it(memory: Any) -> None:
    (source,) = find_sources(["memory://place/b.jsonl"])
    before = state_of(source)
    assert before == state_of(source)
    memory.pipe("/place/b.jsonl", ROWS + ROWS)
    assert state_of(source) != before
    assert state_of(Source("hub:a/b", "b")) == "hub:a/b"


def test_the_state_of_a_file_on_a_server_changes_with_it(tmp_path: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    path = tmp_path / "r.jsonl"
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            source = Source(f"http://127.0.0.1:{server.server_port}/r.jsonl", "r")
            states = []
            for data, time in ((b'{"a": 1}\n', 10**9), (b'{"a": 2}\n', 10**9 + 60)):
                path.write_bytes(data)
                os.utime(path, (time, time))
                states += [state_of(source), state_of(source)]
        finally:
            server.shutdown()
    assert states[0] == states[1] != states[2] == states[3]


def test_names_of_states_are_read_however_they_are_written() -> None:
    words = {remote._letters(key) for key in ("Last-Modified", "LastModified", "last_modified")}
    assert words == {"lastmodified"}
    assert {remote._letters(key) for key in ("ETag", "Content-MD5", "Digest")} <= remote._STATE


def test_the_state_of_a_hub_folder_changes_with_its_files(tmp_path: Path) -> None:
    source = Source(f"hub:{tmp_path}", "x")
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    before = state_of(source)
    assert before == state_of(source)
    (tmp_path / "a.jsonl").write_bytes(ROWS + ROWS)
    assert state_of(source) != before


def test_a_name_that_leads_to_no_file_is_passed_over(folder: Path) -> None:
    told: list[DataError] = []
    one = f"{folder}/a.jsonl"
    assert names(find_usable([f"{folder}/none.jsonl", one, one], told.append)) == [one]
    assert len(told) == 2


def test_an_unknown_protocol_is_named() -> None:
    assert refusal("nosuch://x/a.jsonl").startswith(
        "nosuch://x/a.jsonl: cannot be reached (Protocol not known: nosuch); check the URL"
    )


def test_a_missing_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    loaded = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(loaded, "s3", raising=False)  # where another test has opened a store
    text = refusal("s3://bucket/a.jsonl")
    assert text.startswith("s3://bucket/a.jsonl: s3:// needs a package that is not installed (")
    assert text.endswith('; pip install "amenable[remote]"')

    find_spec = importlib.util.find_spec
    hidden = ("fsspec", "datasets")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name)
    )
    assert refusal("gs://b/a.jsonl") == (
        "gs://b/a.jsonl: needs the package fsspec, which is not installed; "
        'pip install "amenable[remote]"'
    )
    assert refusal("hub:a/b") == (
        'hub:a/b: needs the package datasets, which is not installed; pip install "amenable[hub]"'
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'is not installed \(.*\); pip install "amenable\[hub\]"'):
        values(Source(f"hub:{tmp_path}", "x"))


def test_secrets_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Source("https://u:p@h/a?sig=1", "a").shown == "https://h/a?…"
    monkeypatch.chdir(tmp_path)
    mistyped = refusal("https:/user:PASSWORD@h/x.jsonl")
    assert mistyped == (
        f"https:/h/x.jsonl: there is no such file (looked in {tmp_path}/https:/h); correct the path"
    )
    assert "PASSWORD" not in refusal("https:/user:PASSWORD@h/*.jsonl")


# A real server on this machine


class Server:
    """An HTTP server in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.asked: list[str] = []
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(20)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_get("/{path:.*}", self.answer)
        runner = web.AppRunner(app)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/")
        self.asked.append(f"{request.method} {request.path_qs}")
        if path.isdigit():
            return web.Response(status=int(path))
        if path == "secret.jsonl":
            given = request.headers.get("Authorization", "")
            if given != "Basic bWU6cHc=":  # me:pw
                return web.Response(status=401)
        if path == "folder/":
            return web.Response(
                text='<a href="x1.jsonl">x1</a> <a href="x2.jsonl">x2</a>',
                content_type="text/html",
            )
        if path in ("torn.jsonl", "torn.parquet"):
            torn = web.StreamResponse(headers={"Content-Length": "1000"})
            await torn.prepare(request)
            await torn.write(ROWS if path == "torn.jsonl" else b"PAR1")
            await asyncio.sleep(0.3)  # what has come is read before the break
            assert request.transport is not None
            request.transport.close()
            return torn
        if path == "big.parquet":
            return web.Response(body=self.parquet)
        return web.Response(body=gzip.compress(ROWS) if path.endswith(".gz") else ROWS)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)

    parquet = b""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def url(server: Server) -> str:
    server.asked.clear()
    return f"http://127.0.0.1:{server.port}"


def test_http_is_read(url: str) -> None:
    sources = find_sources([f"{url}/r.jsonl", f"{url}/q.jsonl.gz?sig=a%2Fb"])
    assert [source.label for source in sources] == ["r", "q"]
    assert [values(source) for source in sources] == [[{"a": 1}, {"a": 2}]] * 2


def test_a_signed_query_is_sent_as_it_stands(url: str, server: Server) -> None:
    (source,) = find_sources([f"{url}/q.jsonl?X-Amz-Signature=a%2Fb%2Bc%3D"])
    assert len(values(source)) == 2
    assert "GET /q.jsonl?X-Amz-Signature=a%2Fb%2Bc%3D" in server.asked


def test_http_globs_are_listed_where_there_is_an_index(url: str) -> None:
    found = find_sources([f"{url}/folder/x*.jsonl"])
    assert [source.label for source in found] == ["x1", "x2"]
    assert len(values(found[1])) == 2


def test_parquet_over_http_needs_no_ranges(url: str, server: Server) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"a": list(range(1000))}), file)
    server.parquet = file.getvalue()
    assert len(values(find_sources([f"{url}/big.parquet"])[0])) == 1000


def test_an_answer_403_is_told_with_how_credentials_are_given(url: str) -> None:
    secret = f"{url}/403?sig=hidden".replace("http://", "http://me:hidden@")
    assert read_refusal(secret) == (
        f"{url}/403?…: the server answers 403, access denied; give credentials by "
        "user and password in the URL, ~/.netrc or a signed URL; none of them is shown"
    )


def test_other_answers_are_told(url: str) -> None:
    assert read_refusal(f"{url}/404") == (
        f"{url}/404: the server answers 404: there is no such file; correct the URL"
    )
    assert read_refusal(f"{url}/500") == (
        f"{url}/500: the server answers 500; try again later, or fetch the file by other means"
    )
    assert "the server answers 401, access denied" in read_refusal(f"{url}/secret.jsonl")


def test_credentials_come_from_the_url_or_from_netrc(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = f"{url}/secret.jsonl".replace("http://", "http://me:pw@")
    assert len(values(find_sources([named])[0])) == 2
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fsspec.filesystem("http").clear_instance_cache()
    assert len(values(find_sources([f"{url}/secret.jsonl"])[0])) == 2


def test_a_refused_connection_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    text = read_refusal(f"http://me:hidden@127.0.0.1:{port}/r.jsonl?sig=hidden")
    assert text.startswith(f"http://127.0.0.1:{port}/r.jsonl?…: cannot be reached (")
    assert text.endswith("); check the URL and the network")
    assert "hidden" not in text


def test_a_transfer_that_breaks_off_is_told_with_its_line(url: str) -> None:
    (source,) = find_sources([f"{url}/torn.jsonl?sig=hidden"])
    kept: list[Any] = []
    with pytest.raises(DataError) as caught:  # no record to drop
        kept.extend(row.values for row in iter_records(source, DroppingLog()))
    assert kept == [{"a": 1}, {"a": 2}]
    said = str(caught.value)
    assert said.startswith(f"{url}/torn.jsonl?…:3: cannot be read (")
    assert said.endswith("); check the network")
    assert "hidden" not in said


def test_a_full_disk_is_told(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    server.parquet = b"PAR1"
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    text = read_refusal(f"{url}/big.parquet")
    assert "1: cannot be copied to the disk (No space left on device); make room in /" in text
    assert text.endswith(", or set TMPDIR to another folder")


def test_a_parquet_file_that_breaks_off_is_told(url: str) -> None:
    text = read_refusal(f"{url}/torn.parquet")
    assert text.startswith(f"{url}/torn.parquet:1: cannot be read (")


def test_what_cannot_be_listed_or_asked_about_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert refusal(f"{url}/*.jsonl").startswith(f"{url}/*.jsonl: cannot be reached (")
    with pytest.raises(DataError, match="cannot be reached"):
        state_of(Source(f"{url}/r.jsonl", "r"))


def test_errors_of_other_libraries_are_understood() -> None:
    class Refused(Exception):  # as of botocore
        response: ClassVar[Any] = {"ResponseMetadata": {"HTTPStatusCode": 403}}

    class Missing(Exception):  # as of httpx
        class response:
            status_code = 404

    def said(name: str, error: Exception) -> str:
        return str(remote._unreachable(name, error)).removeprefix(f"{name}: ")

    keys = "give credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    assert said("s3://b/r", Refused()) == f"the server answers 403, access denied; {keys}"
    assert said("s3://b/r", PermissionError("Forbidden")) == f"no access: Forbidden; {keys}"
    assert said("s3://b/r", Exception("Unable to locate credentials")).endswith(keys)
    assert said("abfs://b/r", PermissionError("no")) == (
        "no access: no; give credentials by what fsspec's documentation of abfs:// names"
    )
    assert said("hf://datasets/b/r", Missing()) == (
        "the server answers 404: there is no such file; correct the URL"
    )
    assert said("s3://b/r", IsADirectoryError("r")) == "is a folder; name the files in it"
    assert said("s3://b/r", OSError()) == (
        "cannot be reached (OSError); check the URL and the network"
    )


def test_a_remote_file_that_broke_off_does_not_seem_to_end() -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            if self.reads:
                return b""
            self.reads = True
            raise ValueError("see https://h/r?sig=hidden")

        def seek(self, *to: int) -> int:
            raise ValueError("no")

        def close(self) -> None:
            pass

        reads = False

    with remote._Remote(Broken(), can_seek=True) as file:
        for _ in range(2):
            with pytest.raises(OSError, match=r"see https://h/r\?…$"):
                file.read(9)
        with pytest.raises(OSError, match="no"):
            file.seek(0)


# Hub data sets


def test_hub_names_are_taken_apart(tmp_path: Path) -> None:
    assert hub_name("hub:o/n") == HubName("o/n", None, "train")
    assert hub_name("hub:o/n:test") == HubName("o/n", None, "test")
    assert hub_name("hub:o/n/c:validation") == HubName("o/n", "c", "validation")
    assert hub_name("hub:n") == HubName("n", None, "train")
    assert hub_name(f"hub:{tmp_path}:test") == HubName(str(tmp_path), None, "test")
    pytest.importorskip("datasets")
    sources = find_sources(["hub:o/n", "hub:o/n:test", f"hub:{tmp_path}"])
    assert [source.label for source in sources] == ["n", "n-test", tmp_path.name]
    assert sources[0].is_hub
    assert sources[0].local is None


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c/d", "hub:a//b", "hub:a/b:", "hub:."])
def test_a_malformed_hub_name_is_refused(name: str) -> None:
    if name == "hub:.":  # the working folder is one
        assert hub_name(name).dataset == "."
        name = "hub:.:"
    assert refusal(name) == (
        f"{name}: is no name of a hub data set; expected hub:OWNER/NAME, hub:OWNER/NAME/CONFIG, "
        "either with :SPLIT behind it, or hub:FOLDER with a folder that exists"
    )


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"a": "x", "b": null}\n{"a": "y", "b": [1]}\n')
    (tmp_path / "set" / "test.jsonl").write_text('{"a": "z", "b": [2]}\n')
    return tmp_path / "set"


def test_a_hub_data_set_is_streamed(hub_folder: Path) -> None:
    (source,) = find_sources([f"hub:{hub_folder}"])
    rows = list(iter_records(source, ReadLog()))
    assert [(row.line, row.values) for row in rows] == [
        (1, {"a": "x", "b": None}),
        (2, {"a": "y", "b": [1]}),
    ]
    assert values(find_sources([f"hub:{hub_folder}:test"])[0]) == [{"a": "z", "b": [2]}]


def test_an_unknown_split_is_told_with_those_there_are(hub_folder: Path) -> None:
    assert read_refusal(f"hub:{hub_folder}:dev") == (
        f"hub:{hub_folder}:dev: the data set has no split 'dev'; it has 'train', 'test'; "
        "name one behind a colon"
    )


def test_a_hub_data_set_out_of_reach_is_told(hub_folder: Path) -> None:
    text = read_refusal("hub:nobody/nothing")  # the tests are offline
    assert text.startswith("hub:nobody/nothing: the data set cannot be loaded (")
    assert text.endswith(
        "); check its name and the network; of a gated one accept its terms and set HF_TOKEN"
    )


def test_a_hub_data_set_that_breaks_off_is_told_with_its_row(hub_folder: Path) -> None:
    (hub_folder / "train.jsonl").write_text('{"a": "x"}\n' * 3 + '{"a": \n')
    (source,) = find_sources([f"hub:{hub_folder}"])
    with pytest.raises(DataError) as caught:  # no record to drop
        list(iter_records(source, DroppingLog()))
    said = str(caught.value)
    assert said.startswith(f"hub:{hub_folder}:1: reading broke off (JSON parse error")
    assert said.endswith("); check the data set and the network")

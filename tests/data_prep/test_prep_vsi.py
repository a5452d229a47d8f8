"""Archives and folders behind URLs and in buckets: found, read, and an error in bounded time when nobody answers."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from osgeo import gdal

from momo.data_prep.sources import Source, digest, find_sources
from momo.errors import DataError
from tests.data_prep.products import write_raster
from tests.data_prep.test_prep_sources import LABEL, archive, ground, names


@contextmanager
def server(objects, bucket=None, ranges=True):
    """Serves files by name; with a bucket name it answers as S3 does, listings and errors too."""
    log = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def reply(self, code, body, **headers):
            self.send_response(code)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            log.append((self.command, self.path))
            url = urlsplit(self.path)
            key = unquote(url.path).lstrip("/")
            if bucket is not None:
                name, _, key = key.partition("/")
                if name != bucket:
                    self.reply(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
                    return
                if not key:
                    self.reply(200, self.listing(parse_qs(url.query).get("prefix", [""])[0]))
                    return
            if key not in objects:
                self.reply(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")
                return
            body, headers = objects[key], {"ETag": f'"{len(key)}"'}
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked and ranges:
                first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
                self.reply(206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}", **headers)
            else:
                self.reply(200, body, **headers)

        do_HEAD = do_GET

        def listing(self, prefix):
            contents = "".join(
                f"<Contents><Key>{key}</Key><LastModified>2026-09-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;"
                f"</ETag><Size>{len(body)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                for key, body in sorted(objects.items())
                if key.startswith(prefix)
            )
            return (
                f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}'
                f"</Name><Prefix>{prefix}</Prefix><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{contents}"
                "</ListBucketResult>"
            ).encode()

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{running.server_port}", log
    finally:
        running.shutdown()
        running.server_close()
        gdal.VSICurlClearCache()


@contextmanager
def silent_server():
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def options(**values):
    before = {key: gdal.GetConfigOption(key) for key in values}
    for key, value in values.items():
        gdal.SetConfigOption(key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            gdal.SetConfigOption(key, value)


@pytest.fixture
def tif(tmp_path):
    return write_raster(tmp_path / "source.tif", ground()).read_bytes()


def is_ground(source):
    return bool((gdal.Open(source.name).ReadAsArray() == ground()).all())


def test_urls_are_quoted_and_read(tif):
    with server({"d/a b.tif": tif, "d/g.tif.gz": gzip.compress(tif)}) as (host, log):
        found, _ = find_sources([f"http://{host}/d/a b.tif", f"http://{host}/d/a%20b.tif", f"http://{host}/d/g.tif.gz"])
        assert [(s.name, s.display, s.path) for s in found] == [
            (f"/vsicurl/http://{host}/d/a%20b.tif", "a b.tif", None),
            (f"/vsigzip//vsicurl/http://{host}/d/g.tif.gz", "g.tif.gz", None),
        ]
        assert log == [] and all(map(is_ground, found))
        assert json.loads(found[0].identity()) == [found[0].name, len(tif), '"9"']
        assert [digest([s.name], s) for s in found] == ["", ""]
        assert not any(path.endswith("/") for _, path in log)  # no listing of the folder


@pytest.mark.parametrize("url, name, display", [
    ("https://h/a.tif?sig=a b&c=%2F", "/vsicurl/https://h/a.tif?sig=a%20b&c=%2F", "a.tif"),
    ("HTTP://h:8/é#1.tif", "/vsicurl/http://h:8/%C3%A9%231.tif", "é#1.tif"), ("http://h", "/vsicurl/http://h", "h"),
    ("s3://bucket/a b/c.tif", "/vsis3/bucket/a b/c.tif", "c.tif"), ("/vsis3/b/c.tif", "/vsis3/b/c.tif", "c.tif"),
    ("/vsigs/b/c.tif", "/vsigs/b/c.tif", "c.tif"), ("/vsitar//d/x.tar/c.tif", "/vsitar//d/x.tar/c.tif", "c.tif"),
    ("/vsigzip//vsicurl/http://h/c.gz", "/vsigzip//vsicurl/http://h/c.gz", "c.gz"),
    ("/vsizip/{/none.zip}/c.tif.gz", "", ""),
])  # fmt: skip
def test_names_of_addresses(url, name, display):
    if not name:
        with pytest.raises(DataError, match="an archive cannot be read: /none.zip"):
            find_sources([url])
        return
    assert find_sources([url])[0] == [Source(name, display, None)]


@pytest.mark.parametrize("url", ["gs://bucket/a.tif", "http://", "s3:///a.tif", "file:///a.tif"])
def test_unknown_addresses_are_an_error(url):
    with pytest.raises(DataError, match=rf"an address cannot be read: {url}.*Rule: http://host/path.*Next: .*/vsigs/"):
        find_sources([url])


def test_archives_behind_urls(tmp_path, tif):
    data = archive(tmp_path / "z.zip", {"in/t.tif": tif, "in/n.txt": b"", "in/l.xml": LABEL, "in/o.xml": "<o/>"})
    with server({"d/z.zip": data.read_bytes()}) as (host, _):
        url = f"http://{host}/d/z.zip"
        found, passed_over = find_sources([url])
        assert [s.display for s in found] == ["z.zip/in/l.xml", "z.zip/in/t.tif"] and passed_over == 2
        assert found[1].name == f"/vsizip//vsicurl/{url}/in/t.tif" and is_ground(found[1]) and found[1].path is None
        for again in (f"{url}/in/t.tif", f"{url}/*.tif", f"/vsizip//vsicurl/{url}/in/t.tif"):
            assert find_sources([again])[0] == [found[1]]
        (signed,), _ = find_sources([f"{url}?sig=1"])[0][1:], 0
        assert is_ground(signed)
        assert json.loads(found[1].identity())[1:] == [len(data.read_bytes()), '"7"']
        bad = []
        assert find_sources([f"http://{host}/none.zip"], bad=lambda *what: bad.append(what)) == ([], 0)
        assert bad[0][0].display == "none.zip"
        with pytest.raises(DataError, match=r"a folder cannot be listed: .*none\.zip.*Rule: a whole zip.*Next: check"):
            find_sources([f"http://{host}/none.zip"])


def test_index_of_a_web_server_is_a_folder(tif):
    index = b'<html><head><title>Index of /d</title></head><body><h1>Index of /d</h1><pre><a href="/">Parent</a>\n'
    for name in ("a%20b.tif", "n.txt"):
        index += f'<a href="{name}">{name}</a>   20-Oct-2025 10:12  2.2M\n'.encode()
    with server({"d/a b.tif": tif, "d/n.txt": b"x", "d/": index, "d": index}) as (host, _):
        (source,), passed_over = find_sources([f"http://{host}/d/"])
        assert source.display == "a b.tif" and passed_over == 1 and is_ground(source)


def test_missing_files_and_servers_without_ranges_are_errors(tif):
    with server({"a.tif": tif * 1000}, ranges=False) as (host, _):
        for path, message in (("a.tif", "Range downloading not supported"), ("none.tif", "does not exist|404")):
            (source,), _ = find_sources([f"http://{host}/{path}"])
            with pytest.raises(RuntimeError, match=message):
                gdal.Open(source.name)
        assert json.loads(source.identity()) == [source.name, None, None]


def test_bucket_is_listed_and_read(tif):
    objects = {"d/a b.tif": tif, "d/sub/c.IMG": b"x", "d/n.txt": b"x", "top.tif": tif}
    with (
        server(objects, bucket="mars") as (host, _),
        options(AWS_S3_ENDPOINT=host, AWS_VIRTUAL_HOSTING="NO", AWS_HTTPS="NO", AWS_NO_SIGN_REQUEST="YES"),
    ):
        assert names("s3://mars/d/") == (["/vsis3/mars/d/a b.tif", "/vsis3/mars/d/sub/c.IMG"], 1)
        assert names("/vsis3/mars/") == (["/vsis3/mars/d/a b.tif", "/vsis3/mars/d/sub/c.IMG", "/vsis3/mars/top.tif"], 1)
        assert names("s3://mars/d/*.tif") == (["/vsis3/mars/d/a b.tif"], 0)
        (source,), _ = find_sources(["s3://mars/d/a b.tif"])
        assert is_ground(source) and json.loads(source.identity())[1:] == [len(tif), '"9"']
        for missing in ("s3://nowhere/", "s3://mars/none/"):
            with pytest.raises(DataError, match=r"a folder cannot be listed: /vsis3/.*Next: check address and cred"):
                find_sources([missing])
        for missing, message in (("s3://nowhere/a.tif", "no such bucket"), ("s3://mars/none.tif", "NoSuchKey|no such")):
            with pytest.raises(RuntimeError, match=message):
                gdal.Open(find_sources([missing])[0][0].name)


def test_bucket_without_credentials_is_an_error_at_once(tmp_path, monkeypatch):
    for key in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(key, raising=False)
    started = time.monotonic()
    with (
        options(AWS_NO_SIGN_REQUEST=None, CPL_AWS_AUTODETECT_EC2="NO", CPL_AWS_CREDENTIALS_FILE=str(tmp_path / "none")),
        pytest.raises(RuntimeError, match="AWS_SECRET_ACCESS_KEY"),
    ):
        gdal.Open(find_sources(["s3://private/a.tif"])[0][0].name)
    assert time.monotonic() - started < 20


def test_silent_host_is_an_error_in_bounded_time():
    with silent_server() as host, options(GDAL_HTTP_LOW_SPEED_TIME="1", GDAL_HTTP_TIMEOUT="2", GDAL_HTTP_MAX_RETRY="0"):
        started = time.monotonic()
        (source,), _ = find_sources([f"http://{host}/a.tif"])
        with pytest.raises(RuntimeError, match="(?i)too slow|timed out"):
            gdal.Open(source.name)
        with pytest.raises(DataError, match="a folder cannot be listed"):
            find_sources([f"http://{host}/z.zip"])
        assert time.monotonic() - started < 15


def test_limits_for_the_network_give_way_to_the_users():
    script = (
        "from momo.data_prep import vsi; gdal = vsi.configured_gdal();"
        "print([gdal.GetConfigOption(k) for k in ('GDAL_HTTP_TIMEOUT', 'GDAL_HTTP_CONNECTTIMEOUT')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"GDAL_HTTP_TIMEOUT": "7"}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "['7', '10']"

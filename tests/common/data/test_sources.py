import hashlib
import http.server
import json
import threading

import pytest

from common.data import sources


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A public address on the loopback interface that serves one file; downloads go to a folder of the test."""
    content = b"arrival,tokens\n1,2\n" * 50
    served = tmp_path / "served"
    served.mkdir()
    (served / "trace.csv").write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(served), **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = {
        "url": f"http://127.0.0.1:{server.server_port}/trace.csv",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    monkeypatch.setattr(sources, "catalogue", lambda: {"set/trace.csv": entry})
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.delenv("FRUGAL_DATA", raising=False)
    yield served
    server.shutdown()


def test_order_is_mirror_then_download_then_error(site, tmp_path, monkeypatch):
    with pytest.raises(sources.MissingSource, match=r"make data SOURCE=set/trace\.csv"):
        sources.locate("set/trace.csv", network=False)
    assert sources.offline_origin("set/trace.csv") == "embedded"
    found = sources.locate("set/trace.csv", network=True)
    assert (found.origin, found.path) == ("public", tmp_path / "downloads" / "set" / "trace.csv")
    assert sources.locate("set/trace.csv", network=False).origin == "public"

    mirror = tmp_path / "mirror"
    (mirror / "set").mkdir(parents=True)
    (mirror / "set" / "trace.csv").write_bytes(found.path.read_bytes())
    monkeypatch.setenv("FRUGAL_DATA", str(mirror))
    assert sources.locate("set/trace.csv").origin == "mirror"


def test_corrupt_mirror_names_file_expected_and_found_and_uses_nothing(site, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "trace.csv").write_text("tampered")
    with pytest.raises(sources.CorruptSource) as error:
        sources.locate("set/trace.csv", root=tmp_path, network=True)
    expected = sources.catalogue()["set/trace.csv"]["sha256"]
    found = hashlib.sha256(b"tampered").hexdigest()
    assert all(word in str(error.value) for word in (str(tmp_path / "set" / "trace.csv"), expected, found))
    assert not (tmp_path / "downloads").exists()


def test_corrupt_download_leaves_nothing_behind(site, tmp_path):
    (site / "trace.csv").write_text("<html>please log in</html>")
    with pytest.raises(sources.MissingSource, match="sha256 expected"):
        sources.locate("set/trace.csv", network=True)
    assert [p for p in (tmp_path / "downloads").rglob("*") if p.is_file()] == []


def test_no_network_means_no_connection(site, monkeypatch):
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *a, **k: pytest.fail("opened a connection"))
    with pytest.raises(sources.MissingSource):
        sources.locate("set/trace.csv", network=False)


def test_unknown_name_and_bad_root(site, tmp_path):
    with pytest.raises(KeyError, match=r"known: set/trace\.csv"):
        sources.locate("set/other.csv")
    with pytest.raises(sources.MissingSource, match="is not a folder"):
        sources.locate("set/trace.csv", root=tmp_path / "nowhere")


def test_record_says_what_was_used(site, tmp_path):
    found = sources.locate("set/trace.csv", network=True)
    sources.record_sources(tmp_path, [found, "set/other.csv"])
    rows = json.loads((tmp_path / "sources.json").read_text())
    assert [(r["name"], r["origin"]) for r in rows] == [("set/trace.csv", "public"), ("set/other.csv", "embedded")]


def test_the_catalogue_is_pinned():
    for name, entry in sources.catalogue().items():
        assert set(entry) == {"url", "sha256", "bytes", "licence"}, name
        assert len(entry["sha256"]) == 64
        assert entry["url"].startswith("https://")
        assert entry["bytes"] <= 5_000_000, f"{name}: the cpu profile downloads files of up to 5 MB"

import http.client
import json

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from gradiometer.server import web
from gradiometer.stats_core.errors import PeerFault, StoreError
from tests.webserver import MemoryStore, make_batch, make_run, serving


@pytest.fixture(scope="module")
def served():
    store = MemoryStore()
    store.add(make_run("old", started_unix_nanos=1), make_batch(list(range(50))))
    with serving(store=store) as running:
        running.do(running.live.register, make_run("now"))
        running.do(running.live.append, "now", make_batch([0, 1, 2]))
        yield running


def test_the_page_is_served_with_nothing_inline_allowed(served):
    status, headers, body = served.get("/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert b"<title>gradiometer</title>" in body
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/static/live.js", "text/javascript"),
        ("/static/live.css", "text/css"),
        ("/static/favicon.svg", "image/svg+xml"),
        ("/favicon.ico", "image/svg+xml"),
    ],
)
def test_the_pages_files_are_served(served, path, kind):
    status, headers, body = served.get(path)
    assert status == 200
    assert headers["content-type"].startswith(kind)
    assert body


def test_the_pages_own_files_are_asked_for_again_and_versioned_ones_are_kept(served):
    _, headers, _ = served.get("/static/live.js")
    assert headers["cache-control"] == "no-cache"
    assert served.get("/static/live.js", If_None_Match=headers["etag"])[0] == 304
    assert "immutable" in served.get("/static/uplot-1.6.32.min.js")[1]["cache-control"]


@pytest.mark.parametrize("path", ["/static/../web.py", "/static/%2e%2e/__init__.py", "/nothing", "/api/runs/nobody"])
def test_what_is_not_there_is_not_found(served, path):
    status, headers, body = served.get(path)
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert "error" in json.loads(body)


def test_the_server_is_healthy(served):
    assert served.json("/healthz") == {"status": "ok"}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9464", "[::1]:9464", "LOCALHOST:1"])
def test_loopback_names_are_answered(served, host):
    assert served.get("/healthz", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9464", "127.0.0.1.evil.example", ""])
def test_a_page_elsewhere_can_not_read_a_run_through_a_visitors_browser(served, host):
    status, headers, body = served.get("/api/runs", Host=host)
    assert status == 421
    assert "use one of them, or start the server with --allow-remote" in json.loads(body)["error"]
    assert "content-security-policy" in headers


def test_metrics_are_in_the_format_that_was_asked_for(served):
    status, headers, body = served.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    assert "gradiometer_run_step" in {family.name for family in prometheus(body.decode())}
    _, headers, body = served.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "gradiometer_run_step" in {family.name for family in openmetrics(body.decode())}


def test_large_answers_are_compressed_where_the_reader_can(served):
    assert served.get("/metrics", Accept_Encoding="gzip")[1]["content-encoding"] == "gzip"


def test_runs_that_train_come_first_then_those_in_the_store(served):
    runs = served.json("/api/runs")["runs"]
    assert [(run["run"], run["live"], run["last_step"]) for run in runs] == [("now", True, 2), ("old", False, 49)]


def test_a_run_in_memory_is_told_whole(served):
    found = served.json("/api/runs/now")
    assert found["source"] == "memory"
    assert found["framework"] == "torch"
    assert found["layers"]["name"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found["points"]["step"] == [0, 1, 2]
    assert found["silent_seconds"] < 60


def test_a_run_that_is_not_in_memory_is_told_from_the_store(served):
    found = served.json("/api/runs/old?layer=blocks.1")
    assert found["source"] == "store"
    assert found["step"] == 49
    assert found["points"]["step"] == list(range(50))
    assert found["points"]["batch_variance"][-1] == found["table"]["batch_variance"][1]


def test_a_stored_run_has_no_events_to_wait_for(served):
    assert served.get("/api/runs/old/events")[0] == 204


def test_a_layer_that_the_run_has_not_is_refused(served):
    status, _, body = served.get("/api/runs/now?layer=nope")
    assert status == 404
    assert "needs a layer of the run, got layer='nope'" in json.loads(body)["error"]


def test_a_reader_too_many_is_refused(served, monkeypatch):
    monkeypatch.setattr(web, "_MOST_STREAMS", 0)
    status, _, body = served.get("/api/runs/now/events")
    assert status == 503
    assert "close other pages" in json.loads(body)["error"]


def test_nothing_can_be_written(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.request("POST", "/api/runs")
    assert connection.getresponse().status == 405
    connection.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [(PeerFault("no such run", status="NOT_FOUND"), 404), (StoreError("a segment is damaged"), 500)],
)
def test_an_error_of_the_store_is_told_and_the_server_stays_up(error, status):
    class Broken(MemoryStore):
        def read(self, *_args, **_options):
            raise error

    store = Broken()
    store.add(make_run("old"), make_batch([0]))
    with serving(store=store) as served:
        answer, _, body = served.get("/api/runs/old")
        assert answer == status
        assert json.loads(body) == {"error": str(error)}
        assert served.get("/healthz")[0] == 200


def test_a_server_open_to_others_answers_any_name():
    from prometheus_client import CollectorRegistry

    from gradiometer.server.live import Live
    from tests.webserver import listening

    live, store = Live(), MemoryStore()
    app = web.create_web(live, store, CollectorRegistry(), allowed_hosts=("*",))
    with listening(app, live, store) as served:
        assert served.get("/healthz", Host="metrics.example:9464")[0] == 200

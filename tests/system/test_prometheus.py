"""A real Prometheus and promtool read a real server."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gradiometer.server.exporter import metric_names
from gradiometer.stats_core import catalog
from tests.server_process import running_server
from tests.trainer import Trainer
from tests.webserver import make_batch, make_run, poll

pytestmark = pytest.mark.system

SCALARS = {row.name: 1.0 for row in catalog.SCALARS if row.metric}


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path):
    with running_server(tmp_path / "data") as running:
        for number, layers in enumerate((3, 200)):
            with Trainer(running.grpc, make_run(f"run-{number}", layers)) as trainer:
                for step in range(5):
                    trainer.step(make_batch([step], layers, nanos=[time.time_ns()], statistics="full", **SCALARS))
        yield running


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus")
def test_promtool_has_no_complaint(server):
    text = fetch(f"http://{server.http}/metrics")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="it is not installed: apt-get install prometheus")
def test_a_real_prometheus_scrapes_every_name_and_answers_queries_for_it(server, tmp_path):
    config = tmp_path / "prometheus.yml"
    target = {"job_name": "gradiometer", "static_configs": [{"targets": [server.http]}]}
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [target]}))
    at = f"127.0.0.1:{free_port()}"
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address={at}",
            ],
            stdout=log,
            stderr=log,
        )

    def query(expression: str) -> list[dict]:
        try:
            answer = fetch(f"http://{at}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, (tmp_path / "prometheus.log").read_text()
            return []
        return json.loads(answer)["data"]["result"]

    try:
        poll(lambda: query('up{job="gradiometer"} == 1'), 60)
        poll(lambda: query("gradiometer_run_step"), 30)
        exposed = text_string_to_metric_families(fetch(f"http://{server.http}/metrics"))
        names = {sample.name for family in exposed for sample in family.samples}
        assert names >= set(metric_names())
        missing = {name for name in names if not query(name)}
        assert missing == set()
        assert {found["value"][1] for found in query("gradiometer_run_step")} == {"4"}
        assert len(query('gradiometer_layer_batch_snr_ratio{run="run-1"}')) == 20
        worst = query("topk(1, gradiometer_layers_variance_ratio{run='run-0', q='1'})")
        assert float(worst[0]["value"][1]) > 1
        targets = json.loads(fetch(f"http://{at}/api/v1/targets"))["data"]["activeTargets"]
        assert [target["lastError"] for target in targets] == [""]
    finally:
        process.terminate()
        process.wait(30)

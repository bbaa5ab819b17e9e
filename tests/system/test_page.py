"""The live page in a real browser, fed by a real server. Any complaint on the browser's console fails."""

import contextlib
import shutil
import time

import numpy as np
import pytest

from gradiometer.protos.columns import COLUMN_DTYPE
from gradiometer.server.live import Live
from gradiometer.stats_core import catalog
from tests.server_process import running_server, start_server
from tests.trainer import Trainer
from tests.webserver import make_batch, make_run, poll, serving

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="it is not installed: apt-get install chromium"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
GONE = "Failed to load resource: net::ERR_"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(browser, url: str, *, allowed: str | None = None, **options):
    """A tab on the page; closed before its server is, and with nothing on the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.set_default_timeout(15_000)
    tab.goto(url)
    try:
        yield tab
    finally:
        context.close()
    assert [text for text in complaints if allowed is None or allowed not in text] == []


def step(number: int, **scalars: float):
    return make_batch([number], nanos=[time.time_ns()], **scalars)


def fact(page, name: str):
    return page.locator("#facts div", has=page.get_by_text(name, exact=True)).locator("dd")


def wait_for(page, name: str, text: str) -> None:
    fact(page, name).get_by_text(text, exact=True).wait_for()


def test_a_run_appears_and_each_new_step_is_shown_without_reloading(browser, tmp_path):
    with running_server(tmp_path / "data") as server, opened(browser, f"http://{server.http}/") as page:
        page.get_by_role("heading", name="No runs yet").wait_for()
        assert "gradiometer.attach(model, optimizer)" in page.inner_text("#empty")
        with Trainer(server.grpc, make_run()) as trainer:
            page.get_by_text("Waiting for the first step").wait_for()
            page.evaluate("window.neverReloaded = true")
            trainer.step(step(0))
            wait_for(page, "Step", "0")
            trainer.step(step(1, loss=1.25))
            wait_for(page, "Step", "1")
            wait_for(page, "Loss", "1.250")
            page.locator("#chart canvas").wait_for()
            page.get_by_text("Training", exact=True).wait_for()
            assert page.inner_text("#rho") != "–"
            assert page.locator("#layers tbody tr").count() == 4
            assert page.evaluate("window.neverReloaded")


def test_the_server_goes_away_and_comes_back(browser, tmp_path):
    server = start_server(tmp_path / "data")
    with Trainer(server.grpc, make_run()) as trainer:
        trainer.step(step(0))
    with opened(browser, f"http://{server.http}/", allowed=GONE) as page:
        wait_for(page, "Step", "0")
        server.kill()
        page.get_by_text("The server does not answer").wait_for()
        assert page.inner_text("#status") == "Server gone"
        again = start_server(tmp_path / "data", http=server.http)
        try:
            page.get_by_text("The server does not answer").wait_for(state="hidden")
            with Trainer(again.grpc, make_run()) as trainer:
                trainer.step(step(1))
                wait_for(page, "Step", "1")
        finally:
            status = again.stop()
    assert status == 0


@pytest.fixture
def shown(browser):
    """The page on three layers: one ordinary, one with a broken example, one whose signal is lost in noise."""
    live = Live()
    with serving(live) as served:
        served.do(live.register, make_run())
        for number in range(3):
            batch = step(number)
            batch.columns["nonfinite_examples"] = make_column([0.0, 1.0, 0.0])
            batch.columns["grad_sq_norm"] = make_column([1.0, 1.0, -0.5])
            batch.columns["batch_variance"] = make_column([0.5, 2.0, 1.0])
            batch.columns["temporal_variance"] = make_column([float("nan")] * 3)
            served.do(live.append, "mnist-1", batch)
        with opened(browser, served.url) as page:
            wait_for(page, "Step", "2")
            yield page


def make_column(values: list[float]) -> bytes:
    return np.array(values, COLUMN_DTYPE).tobytes()


def row(page, layer: str):
    return page.locator("#layers tbody tr", has=page.get_by_role("button", name=layer))


def cell(page, layer: str, column: int) -> str:
    return row(page, layer).locator("th, td").nth(column).inner_text()


def names(page) -> list[str]:
    return page.locator("#layers tbody tr th button").all_inner_texts()


def test_what_is_missing_is_a_dash_and_what_is_not_resolved_is_said(shown):
    assert cell(shown, "blocks.0", 5) == "–"
    assert cell(shown, "blocks.2", 10) == "not resolved"
    assert cell(shown, "blocks.0", 3) == "0.500"


def reading(page, name: str) -> str:
    return page.locator("#readings div", has=page.get_by_text(name, exact=True)).locator("dd").inner_text()


def test_intervals_are_told_and_a_noise_scale_without_an_upper_end_is_not_resolved(browser):
    live = Live()
    with serving(live) as served:
        served.do(live.register, make_run())
        for number, signal in enumerate((0.1, -0.1, 0.2, 0.1, -0.15, 0.1)):
            batch = step(number, norm_median=0.5, norm_max=2.0)
            batch.columns["grad_sq_norm"] = make_column([5.0, 5.0, signal])
            served.do(live.append, "mnist-1", batch)
        with opened(browser, served.url) as page:
            wait_for(page, "Step", "5")
            assert float(cell(page, "blocks.0", 10)) > 0
            assert cell(page, "blocks.2", 10) == "not resolved"
            assert cell(page, "whole model", 10) != "not resolved"
            assert " to " in reading(page, "SNR")
            assert " to " in reading(page, "Noise scale")
            assert reading(page, "Median norm") == "largest 2.00 0.500"
            assert page.inner_text("#rho-text").startswith("Above 1 (95 %: 1.")
            assert page.locator("#rho-band").is_visible()
            row(page, "blocks.2").click()
            page.get_by_role("heading", name="blocks.2").wait_for()
            page.get_by_text("above ").wait_for()
            assert reading(page, "Noise scale").endswith(" not resolved")
            page.locator("#readings dt", has_text="Noise scale").focus()
            page.get_by_role("tooltip").wait_for()
            assert "over this window the signal can't be told from 0" in page.inner_text("#tooltip")
            # Neither new numbers, nor the pointer at rest, nor a scroll take it from whoever reads by keyboard.
            served.do(live.append, "mnist-1", step(6, norm_median=0.5, norm_max=2.0))
            wait_for(page, "Step", "6")
            page.mouse.move(5, 5)
            page.evaluate("window.scrollBy(0, 20)")
            page.wait_for_timeout(200)
            assert page.get_by_role("tooltip").is_visible()
            page.keyboard.press("Escape")
            page.get_by_role("tooltip").wait_for(state="hidden")


def test_examples_that_are_not_finite_are_flagged_with_text(shown):
    assert "NaN or ∞ in 3 examples" in row(shown, "blocks.1").inner_text()
    assert "NaN" not in row(shown, "blocks.0").inner_text()


def test_the_table_is_sorted_by_its_headings(shown):
    heading = shown.get_by_role("columnheader", name="variance across")
    heading.get_by_role("button").click()
    assert names(shown) == ["whole model", "blocks.1", "blocks.2", "blocks.0"]
    assert heading.get_attribute("aria-sort") == "descending"
    heading.get_by_role("button").press("Enter")
    assert names(shown) == ["whole model", "blocks.0", "blocks.2", "blocks.1"]
    heading.get_by_role("button").press("Enter")
    assert names(shown) == ["whole model", "blocks.0", "blocks.1", "blocks.2"]


def test_a_row_is_charted_by_mouse_and_by_keyboard_and_the_address_keeps_it(shown):
    row(shown, "blocks.1").click()
    shown.get_by_role("heading", name="blocks.1").wait_for()
    assert shown.locator("#legend output").first.inner_text() == "2.00"
    assert shown.input_value("#layer") == "blocks.1"
    assert "layer=blocks.1" in shown.url
    shown.get_by_role("button", name="blocks.2").press("Enter")
    shown.get_by_role("heading", name="blocks.2").wait_for()
    shown.go_back()
    shown.get_by_role("heading", name="blocks.1").wait_for()
    shown.select_option("#layer", "")
    shown.get_by_role("heading", name="Whole model").wait_for()


def test_headings_are_explained_in_the_catalogues_words(shown):
    shown.get_by_role("columnheader", name="SNR").get_by_role("button").focus()
    shown.get_by_role("tooltip").wait_for()
    told = shown.inner_text("#tooltip")
    assert catalog.statistic("batch_snr").help in told
    assert catalog.statistic("batch_snr").formula in told
    shown.keyboard.press("Escape")
    shown.get_by_role("tooltip").wait_for(state="hidden")


def test_coverage_says_what_is_not_measured_and_why(shown):
    assert fact(shown, "Measured").inner_text().startswith("92.3 %")
    shown.locator("summary").click()
    shown.get_by_text("rnn.weight_hh (5): LSTM has no per-example sampler").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_fits_narrow_and_wide_windows_in_both_schemes(browser, scheme, width):
    live, name = Live(), "a-run-of-a-rather-long-name-20261122-1404-7ac2"
    with serving(live) as served:
        served.do(live.register, make_run(name, 30))
        served.do(live.append, name, make_batch([0, 1, 2], 30))
        with opened(browser, served.url, color_scheme=scheme) as page:
            page.set_viewport_size({"width": width, "height": 900})
            page.locator("#chart canvas").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 23)"
            assert dark == (scheme == "dark")


def test_a_hidden_page_lets_its_stream_go(browser):
    """Else a few forgotten tabs would use up the browser's connections to the server."""
    live = Live()
    turn = (
        "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    with serving(live) as served:
        served.do(live.register, make_run())
        served.do(live.append, "mnist-1", step(0))
        with opened(browser, served.url) as page:
            wait_for(page, "Step", "0")
            poll(lambda: live._subscriptions)
            page.evaluate(turn, True)
            poll(lambda: not live._subscriptions)
            served.do(live.append, "mnist-1", step(1))
            assert fact(page, "Step").inner_text() == "0"
            page.evaluate(turn, False)
            wait_for(page, "Step", "1")


def in_page(page, module: str, expression: str):
    return page.evaluate(f"import('/static/{module}.js').then((m) => {expression})")


def test_numbers_are_put_into_words(shown):
    told = in_page(
        shown, "words", "[null, undefined, 0, 0.000012345, -1.2345, 12.0, 123456, 2.5e7].map((x) => m.number(x))"
    )
    assert told == ["–", "–", "0", "1.23e−5", "−1.23", "12.0", "123,456", "2.50e7"]
    assert in_page(shown, "words", "[-3, 0, 2, null].map((x) => m.statistic('noise_scale', x))") == [
        "not resolved",
        "not resolved",
        "2.00",
        "–",
    ]
    assert in_page(shown, "words", "[0.05, 0, null].map((x) => m.statistic('significant_share', x))") == [
        "5.00 %",
        "0 %",
        "–",
    ]
    begins = in_page(shown, "words", "[null, 1, 1.5, 0.5].map((x) => m.meaningOfRho(x).slice(0, 7))")
    assert begins == ["ρ appea", "About 1", "Above 1", "Below 1"]


def test_what_an_interval_says_comes_before_the_number(shown):
    given = "[[1.5, [0.9, 2.5]], [1.05, [1.01, 1.1]], [0.95, [0.9, 0.99]]]"
    told = in_page(
        shown, "words", f"{given}.map(([x, ends]) => m.meaningOfRho(x, ends).split(':').slice(0, 2).join(':'))"
    )
    assert told == ["About 1 (95 %: 0.900 to 2.50)", "Above 1 (95 %: 1.01 to 1.10)", "Below 1 (95 %: 0.900 to 0.990)"]
    ends = in_page(shown, "words", "[[12, 340], [12.3456, null], [null, null], undefined].map((x) => m.interval(x))")
    assert ends == ["12.0 to 340", "above 12.3", "", ""]
    assert in_page(shown, "words", "m.statistic('noise_scale', 12, false)") == "not resolved"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1e-8, 1e-3, [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3]),
        (0.03, 0.9, [0.05, 0.1, 0.2, 0.5]),
        (0.9, 5.0, [1, 1.5, 2, 3, 4, 5]),
        (1.0, 1.1, [1.0, 1.05, 1.1]),
    ],
)
def test_the_axis_is_marked_at_round_numbers(shown, low, high, expected):
    assert in_page(shown, "chart", f"m.ticks({low}, {high})") == pytest.approx(expected)

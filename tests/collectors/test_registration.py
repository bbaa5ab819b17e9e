import re
import sys

import pytest

from gradiometer.collectors.registration import complete, default_run_id, registration
from gradiometer.protos import run_pb2
from gradiometer.protos.checks import check_run
from gradiometer.protos.run_pb2 import Coverage, Layer, Run
from tests.fake_ingest import layers


@pytest.mark.parametrize(
    ("script", "name"),
    [("/home/me/train.py", "train"), ("", "run"), ("-c", "c"), ("/x/my model é.py", "my-model"), ("/x/...", "run")],
)
def test_a_run_without_a_name_is_called_after_its_script(
    script: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    assert re.fullmatch(re.escape(name) + r"-20\d{6}-[0-9a-f]{4}", default_run_id())
    check_run(registration(None, layers(), None, None))


def test_two_runs_of_a_script_have_different_names() -> None:
    assert len({default_run_id() for _ in range(50)}) > 40


def test_what_is_not_said_has_its_default() -> None:
    run = registration("a", layers(2, 5), None, None)
    assert (run.run_id, run.unit, run.tier, run.temporal) == ("a", "example", "default", "collector")
    assert run.loss.reduction == run_pb2.LOSS_REDUCTION_MEAN
    assert (run.coverage.num_params, run.coverage.num_params_measured) == (10, 10)
    assert run.started_unix_nanos > 0
    assert run.world.host
    assert run.world.size == 1


def test_known_facts_have_their_places_and_others_are_kept_as_text() -> None:
    facts = {
        "loss_reduction": "sum",
        "engine": "microbatch",
        "optimizer": "madam",
        "temporal": "optimizer",
        "statistics": "light",
        "batch": 64,
    }
    run = registration("a", layers(), Coverage(num_params=9, num_params_measured=6), facts)
    assert run.loss.reduction == run_pb2.LOSS_REDUCTION_SUM
    assert (run.engine, run.optimizer, run.temporal, run.tier) == ("microbatch", "madam", "optimizer", "light")
    assert dict(run.config) == {"batch": "64"}
    assert run.coverage.num_params_measured == 6


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("light", "light"),
        ("default, conflicting_share", "default,conflicting_share"),
        (["light", "outliers", "light"], "light,outliers"),
        (("noise_scale",), "noise_scale"),
    ],
)
def test_a_selection_is_registered_as_one_string(given: object, spelled: str) -> None:
    assert registration("a", layers(), None, {"statistics": given}).tier == spelled


@pytest.mark.parametrize("given", ["odd", ["default", "odd"], "default,odd"])
def test_a_selection_of_what_does_not_exist_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"needs tiers in \(.+\) or names .*got statistics='odd'; see docs/glossary"):
        registration("a", layers(), None, {"statistics": given})


@pytest.mark.parametrize("name", ["loss_reduction", "temporal", "unit"])
def test_a_fact_of_a_wrong_value_lists_the_right_ones(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"Publisher needs config\['{name}'\] in \(.+\), got {name}='odd'; choose one"
    ):
        registration("a", layers(), None, {name: "odd"})


@pytest.mark.parametrize("run", ["a b", "../a", "x" * 129, "-a"])
def test_a_bad_name_is_refused_in_the_publishers_words(run: str) -> None:
    with pytest.raises(ValueError, match=r"^Publisher needs run_id of letters.*choose another name for the run$"):
        registration(run, layers(), None, None)


def test_an_empty_name_is_not_taken_for_none() -> None:
    with pytest.raises(ValueError, match="Publisher needs run as a name or None, got run=''; leave it out"):
        registration("", layers(), None, None)


def test_a_run_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Publisher needs 1 to 100000 layers, got layers=0"):
        registration("a", [], None, None)


def test_layers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="Publisher needs layers of unique, non-empty names, got layer='w'; rename it"):
        registration("a", [Layer(name="w"), Layer(name="w")], None, None)


def test_a_message_is_completed_on_a_copy() -> None:
    given = Run(layers=layers(), loss=run_pb2.LossNormalization(reduction=run_pb2.LOSS_REDUCTION_MEAN))
    run = complete(given)
    assert given.run_id == ""
    assert run.run_id
    given.run_id, given.started_unix_nanos, given.world.host = "mine", 5, "there"
    run = complete(given)
    assert (run.run_id, run.started_unix_nanos, run.world.host) == ("mine", 5, "there")


def test_a_pytree_of_jax_arrays_gives_the_layers_and_the_framework() -> None:
    jnp = pytest.importorskip("jax.numpy")
    params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "Dense_1": {"kernel": jnp.ones((3, 1))}}
    run = registration("a", params, None, None)
    assert [(layer.name, layer.num_params) for layer in run.layers] == [("Dense_0", 9), ("Dense_1", 3)]
    assert (run.world.framework, run.engine) == ("jax", "vmap")
    assert "cpu" in run.world.device.lower()

import gradiometer.stats_core.errors as errors
from gradiometer.stats_core.errors import GradiometerError, MissingDependency, PeerFault, UnsupportedModel


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    assert errors.__doc__
    for name in errors.__all__:
        assert name in errors.__doc__
        assert issubclass(getattr(errors, name), GradiometerError)


def test_every_error_carries_a_status() -> None:
    assert PeerFault("x").status == "INVALID_ARGUMENT"
    assert PeerFault("x", status="ALREADY_EXISTS").status == "ALREADY_EXISTS"
    assert UnsupportedModel("x").status == "INVALID_ARGUMENT"


def test_a_missing_library_is_an_import_error_and_a_bad_model_a_value_error() -> None:
    assert issubclass(MissingDependency, ImportError)
    assert issubclass(UnsupportedModel, ValueError)

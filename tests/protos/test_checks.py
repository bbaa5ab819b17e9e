import numpy as np
import pytest

from gradiometer.protos.batch_pb2 import Histogram, StepBatch, TopExample
from gradiometer.protos.checks import check_batch, check_run, layers_differ
from gradiometer.protos.columns import pack_batch
from gradiometer.protos.run_pb2 import LOSS_REDUCTION_MEAN, Layer, LossNormalization, Run
from gradiometer.stats_core.errors import PeerFault


def run(**changes: object) -> Run:
    layers = [Layer(name="a", num_params=3), Layer(name="b", num_params=4)]
    fields: dict[str, object] = {
        "run_id": "r-1",
        "layers": layers,
        "loss": LossNormalization(reduction=LOSS_REDUCTION_MEAN),
    }
    return Run(**{**fields, **changes})  # type: ignore[arg-type]


def batch() -> StepBatch:
    return pack_batch(
        [4, 5], [1, 2], 2, {"mean_sq_norm": np.array([[1, 2], [3, np.nan]])}, {"loss": np.array([0.5, np.inf])}
    )


def counts(**changes: object) -> Histogram:
    fields: dict[str, object] = {
        "statistic": "example_norm",
        "schema": 3,
        "zero_threshold": 0.5,
        "positive_index": [-7, 2],
        "positive_count": [1, 5],
    }
    return Histogram(**{**fields, **changes})  # type: ignore[arg-type]


def top(*sizes: float, **fields: int) -> list[TopExample]:
    return [TopExample(layer=-1, place=place, sq_norm=size, **fields) for place, size in enumerate(sizes)]  # type: ignore[arg-type]


def test_the_layers_of_a_second_registration_are_compared_by_name_and_size() -> None:
    assert layers_differ(run(), run()) is None
    other = layers_differ(run(), run(layers=[Layer(name="a", num_params=3), Layer(name="b", num_params=5)]))
    assert other == "layer 1 is 'b' with 4 parameters, 'b' with 5 offered"
    assert "1 layers registered" not in (layers_differ(run(), run(layers=[Layer(name="a")])) or "")
    assert layers_differ(run(), run(layers=[Layer(name="a")])) == "2 layers registered, 1 offered"


@pytest.mark.parametrize("bad", ["", "../up", "a/b", "a b", "-x", "x" * 129, "a..b"])
def test_a_run_id_that_is_no_file_name_is_refused(bad: str) -> None:
    with pytest.raises(PeerFault, match="choose another name for the run"):
        check_run(run(run_id=bad))


def test_layers_must_be_there_and_have_names_of_their_own() -> None:
    with pytest.raises(PeerFault, match="got layers=0"):
        check_run(run(layers=[]))
    with pytest.raises(PeerFault, match="got layer='a'; rename it"):
        check_run(run(layers=[Layer(name="a"), Layer(name="a")]))


def test_a_run_must_say_how_its_loss_is_reduced() -> None:
    with pytest.raises(PeerFault, match=r"needs loss\.reduction"):
        check_run(run(loss=LossNormalization()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.columns.update({"mean_sq_norm": b"\0" * 12}), r"needs 16 bytes in column='mean_sq_norm', got 12"),
        (lambda b: b.columns.update({"no_such": b"\0" * 16}), "got column='no_such'; use the same version"),
        (lambda b: b.columns.update({"noise_scale": b"\0" * 16}), "got column='noise_scale'"),
        (lambda b: b.scalars.update({"loss": b"\0" * 8}), "needs 16 bytes in scalar='loss', got 8"),
        (lambda b: b.scalars.update({"a b": b"\0" * 16}), "got scalar='a b'; rename it"),
        (lambda b: b.steps.__setitem__(1, 4), "got a step twice or going back"),
        (lambda b: b.steps.__setitem__(1, 2**63), r"steps below 2\^63, got step=9223372036854775808"),
        (lambda b: b.events.add(step=2**63), r"steps below 2\^63"),
        (lambda b: b.unix_nanos.pop(), "got steps=2, unix_nanos=1"),
        (lambda b: setattr(b, "num_layers", 3), "needs num_layers=2 as registered, got num_layers=3"),
        (lambda b: b.layer_indices.append(0), "got layer_indices"),
        (lambda b: b.histograms.append(counts(step_index=2)), "got step_index=2"),
        (lambda b: b.histograms.append(counts(layer=2)), "layer=2; check both"),
        (lambda b: b.histograms.append(counts(positive_count=[1])), "a count a bucket"),
        (lambda b: b.histograms.append(counts(statistic="sq_norms")), "got statistic='sq_norms'; use the same version"),
        (lambda b: b.histograms.append(counts(statistic="noise_scale")), "got statistic='noise_scale'"),
        (lambda b: b.histograms.append(counts(schema=9)), "of schema -4 to 8 with a finite threshold, got schema=9"),
        (lambda b: b.histograms.append(counts(zero_threshold=-1.0)), r"zero_threshold=-1\.0; check who counts"),
        (lambda b: b.histograms.append(counts(zero_threshold=np.inf)), "zero_threshold=inf"),
        (lambda b: b.histograms.append(counts(zero_threshold=np.nan)), "zero_threshold=nan"),
        (
            lambda b: b.histograms.append(counts(positive_index=[2, -7])),
            r"once, ascending, got \[2, -7\], …; sort them",
        ),
        (lambda b: b.histograms.append(counts(positive_index=[2, 2])), "each bucket of a histogram once"),
        (lambda b: b.histograms.append(counts(negative_index=[2, 2], negative_count=[1, 1])), "once, ascending"),
        (lambda b: b.histograms.append(counts(positive_count=[1, 0])), "counts above 0 .* leave empty buckets out"),
        (lambda b: b.histograms.append(counts(positive_count=[1, 2**63])), r"below 2\^63 together, got counted"),
        (lambda b: b.examples.append(TopExample(layer=2)), "layer=2"),
        (lambda b: b.examples.extend(top(3.0, 4.0)), "from the largest to the smallest, .* sort them by their norms"),
        (lambda b: b.examples.extend(top(3.0, np.nan)), "from the largest to the smallest"),
        (lambda b: b.examples.extend(reversed(top(3.0, 3.0))), r"in places from 0, got places=\[1, 0\]"),
        (lambda b: b.examples.append(TopExample(layer=-1, sq_norm=-2.0)), r"got sq_norm=-2\.0; square them"),
        (lambda b: b.scalars.update({"unit_exponent": np.array([0, 0.5]).tobytes()}), r"got unit_exponent=0\.5; it is"),
        (lambda b: b.scalars.update({"unit_exponent": np.array([0, np.inf]).tobytes()}), "got unit_exponent=inf"),
        (lambda b: b.scalars.update({"unit_exponent": np.array([0, -1e4]).tobytes()}), "whole numbers up to 1000"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_what_is_wrong(spoil: object, message: str) -> None:
    spoiled = batch()
    spoil(spoiled)  # type: ignore[operator]
    with pytest.raises(PeerFault, match=message):
        check_batch(spoiled, 2)


def test_a_batch_of_events_alone_is_taken() -> None:
    check_batch(StepBatch(), 2)


def test_histograms_and_examples_that_are_in_order_are_taken() -> None:
    given = batch()
    given.histograms.extend([counts(), counts(layer=1, step_index=1, negative_index=[3], negative_count=[2**62])])
    given.histograms.append(counts(positive_index=[], positive_count=[], zero_count=7))
    given.examples.extend([*top(np.nan, np.inf, 4.0, 4.0, 0.0), *top(2.0, 1.0, step_index=1)])
    given.scalars["unit_exponent"] = np.array([-60.0, np.nan]).tobytes()
    check_batch(given, 2)

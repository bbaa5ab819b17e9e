"""The ingest session: every state and message by table, and long conversations by a state machine."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gradiometer.protos.batch_pb2 import Event, StepBatch
from gradiometer.protos.ingest_pb2 import PublishRequest
from gradiometer.protos.run_pb2 import Coverage, Layer
from gradiometer.server.ingest import Accept, Duplicate, IngestSession, Opened, State, registered, unknown_run
from gradiometer.stats_core.errors import OurFault, PeerFault
from tests.server.batches import hello, make_batch, make_run, numbered


def opened(durable: int = 0) -> IngestSession:
    session = IngestSession()
    assert session.receive(hello()) == Opened("mnist", "c")
    assert session.welcome(make_run(), durable) == durable
    return session


def test_a_stream_from_hello_to_end() -> None:
    session = opened()
    first, second = make_batch(0), make_batch(1, 2)
    assert session.receive(numbered(1, first)) == Accept(1, first)
    assert session.receive(numbered(2, second)) == Accept(2, second)
    assert (session.accepted, session.durable) == (2, 0)
    assert session.committed(2) == 2
    session.finish()
    assert session.state is State.ENDED


def test_a_known_batch_is_dropped_unread_and_acknowledged_again() -> None:
    session = opened(durable=5)
    nonsense = StepBatch(steps=[3, 1])
    assert session.receive(numbered(5, nonsense)) == Duplicate(5, 5)
    session.receive(numbered(6, make_batch(6)))
    assert session.receive(numbered(6, nonsense)) == Duplicate(6, 5)  # accepted, not yet on disk: 5 is all that is
    session.committed(6)
    assert session.receive(numbered(6, nonsense)) == Duplicate(6, 6)


def test_acknowledgements_never_go_back() -> None:
    session = opened()
    for sequence in (1, 2, 3):
        session.receive(numbered(sequence, make_batch(sequence)))
    assert [session.committed(sequence) for sequence in (2, 1, 3)] == [2, 2, 3]


def test_what_was_never_accepted_can_not_be_committed() -> None:
    with pytest.raises(OurFault, match="needs sequence <= 0, got sequence=1"):
        opened().committed(1)


BAD = {
    "a gap": (numbered(3, make_batch(1)), "needs sequence=1 next, got sequence=3; open a new stream"),
    "sequence 0": (numbered(0, make_batch(1)), "needs sequence from 1, got sequence=0"),
    "a second hello": (hello(), "needs batches after the hello, got message=hello"),
    "nothing": (PublishRequest(), "got message=nothing"),
    "other layers": (numbered(1, make_batch(1, layers=3)), "needs num_layers=2 as registered, got num_layers=3"),
    "steps that go back": (numbered(1, StepBatch(steps=[2, 1])), "needs steps in ascending order"),
    "a step beyond int64": (
        numbered(1, make_batch(2**63, nanos=1)),
        "needs steps below 2\\^63, got step=9223372036854775808",
    ),
    "an event beyond int64": (numbered(1, StepBatch(events=[Event(step=2**63)])), "needs steps below 2\\^63"),
}


@pytest.mark.parametrize(("request_", "message"), BAD.values(), ids=BAD.keys())
def test_what_may_not_be_sent_is_a_fault_and_the_session_takes_nothing_more(
    request_: PublishRequest, message: str
) -> None:
    session = opened()
    with pytest.raises(PeerFault, match=message) as caught:
        session.receive(request_)
    assert caught.value.status == ("FAILED_PRECONDITION" if "next" in message else "INVALID_ARGUMENT")
    assert session.state is State.FAILED
    assert session.accepted == 0
    with pytest.raises(PeerFault, match="needs a stream that is open"):
        session.receive(numbered(1, make_batch(1)))
    session.finish()
    assert session.state is State.FAILED


def test_a_column_of_the_wrong_length_is_refused() -> None:
    batch = make_batch(1)
    batch.columns["variance_trace"] = np.zeros(3, "<f4").tobytes()
    with pytest.raises(PeerFault, match="needs 8 bytes in column='variance_trace', got 12"):
        opened().receive(numbered(1, batch))


def test_a_batch_before_the_hello_and_before_its_answer_is_refused() -> None:
    session = IngestSession()
    with pytest.raises(PeerFault, match="needs a hello first, got message=batch"):
        session.receive(numbered(1, make_batch(1)))
    session = IngestSession()
    session.receive(hello())
    with pytest.raises(PeerFault, match="needs the answer to its hello first"):
        session.receive(numbered(1, make_batch(1)))


@pytest.mark.parametrize("collector", ["", "x" * 129])
def test_a_collector_needs_an_id(collector: str) -> None:
    with pytest.raises(PeerFault, match="needs collector_id of 1 to 128 characters"):
        IngestSession().receive(hello(collector_id=collector))


def test_a_welcome_nobody_asked_for_is_our_fault() -> None:
    with pytest.raises(OurFault, match="needs a state for welcome, got state=EXPECT_HELLO"):
        IngestSession().welcome(make_run(), 0)


def test_what_was_accepted_before_a_fault_is_still_acknowledged() -> None:
    session = opened()
    session.receive(numbered(1, make_batch(1)))
    with pytest.raises(PeerFault):
        session.receive(numbered(9, make_batch(9)))
    assert session.committed(1) == 1


class Conversation(RuleBasedStateMachine):
    """A publisher, its connections, and a disk that commits in order and may die with a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.disk: list[int] = []
        self.queue: list[int] = []
        self.acknowledged = 0
        self.made = 0
        self.session = IngestSession()
        self.connect()

    def connect(self) -> None:
        self.session = IngestSession()
        self.session.receive(hello())
        self.acknowledge(self.session.welcome(make_run(), len(self.disk)))
        self.following = len(self.disk) + 1

    def acknowledge(self, durable: int) -> None:
        assert durable <= len(self.disk), "acknowledged before it was on disk"
        self.acknowledged = max(self.acknowledged, durable)

    @rule()
    def send_the_next(self) -> None:
        self.made = max(self.made, self.following)
        action = self.session.receive(numbered(self.following, make_batch(self.following)))
        assert isinstance(action, Accept)
        self.queue.append(action.sequence)
        self.following += 1

    @precondition(lambda self: self.following > 1)
    @rule(data=st.data())
    def send_a_known_one_again(self, data: st.DataObject) -> None:
        sequence = data.draw(st.integers(1, self.following - 1))
        action = self.session.receive(numbered(sequence, make_batch(sequence)))
        assert isinstance(action, Duplicate)
        self.acknowledge(action.durable)

    @rule(gap=st.integers(1, 5))
    def leave_some_out(self, gap: int) -> None:
        with pytest.raises(PeerFault) as caught:
            self.session.receive(numbered(self.following + gap, make_batch(1)))
        assert caught.value.status == "FAILED_PRECONDITION"
        self.commit(len(self.queue))
        self.connect()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def commit_some(self, data: st.DataObject) -> None:
        self.commit(data.draw(st.integers(1, len(self.queue))))

    def commit(self, count: int) -> None:
        group, self.queue = self.queue[:count], self.queue[count:]
        self.disk.extend(group)
        if group:
            self.acknowledge(self.session.committed(group[-1]))

    @rule(data=st.data())
    def break_the_connection(self, data: st.DataObject) -> None:
        """Some of what was queued was committed and never acknowledged; the rest is lost with the server."""
        committed = data.draw(st.integers(0, len(self.queue)))
        self.disk.extend(self.queue[:committed])
        self.queue.clear()
        self.connect()

    @invariant()
    def every_batch_is_on_disk_once_and_in_order(self) -> None:
        assert self.disk == list(range(1, len(self.disk) + 1))

    @invariant()
    def nothing_acknowledged_is_missing(self) -> None:
        assert self.acknowledged <= len(self.disk)

    @invariant()
    def the_numbers_agree(self) -> None:
        assert self.session.durable <= self.session.accepted == len(self.disk) + len(self.queue)


TestConversation = Conversation.TestCase


def test_a_new_run_is_kept_as_offered_and_given_a_start() -> None:
    assert registered(None, make_run(), now=7).started_unix_nanos == 7
    assert registered(None, make_run(started_unix_nanos=3), now=7).started_unix_nanos == 3


def test_a_run_is_found_again_and_brought_up_to_date() -> None:
    known = make_run(started_unix_nanos=3, coverage=Coverage(num_params=9, num_params_measured=8))
    found = registered(known, make_run(started_unix_nanos=5, optimizer="MAdam"), now=7)
    assert (found.started_unix_nanos, found.optimizer, found.coverage.num_params) == (3, "MAdam", 9)
    newer = registered(known, make_run(coverage=Coverage(num_params=9, num_params_measured=9)), now=7)
    assert newer.coverage.num_params_measured == 9


@pytest.mark.parametrize(
    ("offered", "how"),
    [
        (make_run(layers=("conv",)), "2 layers registered, 1 offered"),
        (make_run(layers=("conv", "head")), "layer 1 is 'dense' with 10 parameters, 'head' with 10 offered"),
    ],
)
def test_a_second_registration_with_other_layers_is_refused(offered: object, how: str) -> None:
    with pytest.raises(PeerFault, match=f"of run 'mnist' as first registered, got others: {how}; choose") as caught:
        registered(make_run(), offered, now=0)  # type: ignore[arg-type]
    assert caught.value.status == "ALREADY_EXISTS"


def test_a_second_registration_in_another_unit_is_refused() -> None:
    other = make_run()
    other.unit = "token"
    with pytest.raises(PeerFault, match="unit 'example' registered, 'token' offered"):
        registered(make_run(), other, now=0)


def test_a_run_that_can_not_be_stored_is_refused_before_anything_else() -> None:
    run = make_run(run_id="../etc")
    run.layers.append(Layer(name="conv"))
    with pytest.raises(PeerFault, match="needs run_id of letters"):
        registered(make_run(), run, now=0)


def test_an_unknown_run_is_answered_with_near_names() -> None:
    assert "did you mean 'mnist-2'" in str(unknown_run("Publish", "mnist-3", ["mnist-2", "gpt"]))
    assert "`gradiometer runs` lists them" in str(unknown_run("Publish", "zzz", ["mnist-2"]))
    assert unknown_run("Publish", "zzz", []).status == "NOT_FOUND"

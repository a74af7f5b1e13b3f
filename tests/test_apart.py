"""Bodies that are read in processes apart: whatever becomes of these, the body has its answer and the service goes on.

The processes are real. Some of them know formats besides those of the service: each body of these does one harm.
"""

import ctypes
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from structlog.testing import capture_logs

from app.errors import (
    BodyTooLarge,
    InvalidQuotes,
    InvalidRequest,
    MalformedBody,
    QuotesError,
    ReaderUnavailable,
    ServiceStopping,
)
from app.formats import FORMATS, Format, apart, nursery
from app.formats.apart import Apart
from app.metrics import REGISTRY
from app.quote.batch import Batch
from app.quote.terms import Limits, Terms
from tests.conftest import Serve, random_symbol
from tests.strategies import NOW, in_arrow, in_json, in_parquet, outcome
from tests.test_formats import good, mutated, rows_for, samples

TERMS = Terms(Limits.at(NOW))
#: Two seconds of the processor.
HURRIED = Terms(Limits.at(NOW, max_rows=1000))
MEMORY = 16 * 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux bounds and shows processes as these tests ask")


# --- harmful formats: this module is imported where bodies are read ---


def _crash(_body: bytes, _terms: Terms) -> Batch:
    ctypes.string_at(0)
    raise AssertionError


def _abort(_body: bytes, _terms: Terms) -> Batch:
    os.abort()


def _spin(_body: bytes, _terms: Terms) -> Batch:
    while True:
        pass


def _eat(_body: bytes, _terms: Terms) -> Batch:
    return [bytearray(2**20) for _ in range(10**6)]  # type: ignore[return-value]


def _eat_in_arrow(_body: bytes, _terms: Terms) -> Batch:
    return pa.allocate_buffer(2**33)  # type: ignore[no-any-return]


def _grow(body: bytes, terms: Terms) -> Batch:
    bytearray(b"x" * 2**26 * 3)
    return _name(body, terms)


def _fail(_body: bytes, _terms: Terms) -> Batch:
    raise KeyError("the sentence of an error of ours")


def _name(_body: bytes, _terms: Terms) -> Batch:
    raise InvalidRequest(str(os.getpid()), parameter="pid")


def _sleep(_body: bytes, _terms: Terms) -> Batch:
    time.sleep(60)
    raise AssertionError


def _look(_body: bytes, _terms: Terms) -> Batch:
    files = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # what it is listed by
            files.append(str(entry.readlink()))
    raise InvalidRequest(f"{sorted(os.environ)} {sorted(files)}")


def _lie(_body: bytes, _terms: Terms) -> Batch:
    return threading.Thread  # type: ignore[return-value]


def main() -> None:
    """The nursery, with these formats."""
    harmful: list[Callable[[bytes, Terms], Batch]] = [
        _crash, _abort, _spin, _eat, _eat_in_arrow, _grow, _fail, _name, _sleep, _look, _lie,
    ]  # fmt: skip
    known = {decode.__name__[1:]: Format(decode.__name__[1:], (), decode, writes=False) for decode in harmful}
    vars(nursery)["FORMATS"] = {**FORMATS, **known}
    nursery.main()


@pytest.fixture(scope="module")
def harmful() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "_PROGRAM", "from tests.test_apart import main; main()")
        patch.setattr(apart, "_BYTES_PER_ROW", 0)
        yield


@pytest.fixture(scope="module")
def shared(harmful: None) -> Iterator[Apart]:
    """Readers that the tests share, of which each leaves others behind."""
    with Apart(MEMORY, 0) as readers:
        yield readers


def pid_of(readers: Apart) -> int:
    """The process that reads the next body."""
    with pytest.raises(InvalidRequest) as caught:
        readers.decode("name", b"", TERMS)
    assert caught.value.parameter == "pid"
    return int(caught.value.detail)


def lives(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    return False


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether something holds before so much time has passed."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def ends(reason: str) -> float:
    """The readers that ended so."""
    return REGISTRY.get_sample_value("quotes_reader_ends_total", {"reason": reason}) or 0.0


# --- what comes back ---


@pytest.mark.parametrize("terms", [TERMS, Terms(TERMS.limits, "skip"), Terms(TERMS.limits, "skip", "error")])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_a_body_means_the_same_wherever_it_is_read(shared: Apart, rows: int, terms: Terms) -> None:
    table = good(rows)
    wrong = table.set_column(2, "price", pa.array([-1] + [0] * (rows - 1)))
    crossed = table.append_column("bid", pa.array([2.5] * rows)).append_column("ask", pa.array([2] * rows))
    for case in (table, wrong, crossed, pa.concat_tables([table, table]), table.slice(0, 0)):
        quotes = [{**row, "timestamp": row["timestamp"].isoformat()} for row in case.to_pylist()]
        for quote in quotes:
            quote.update((name, str(quote[name])) for name in ("price", "bid", "ask") if name in quote)
        for name, body in (("arrow", in_arrow(case)), ("parquet", in_parquet(case)), ("json", in_json(quotes))):
            decode = FORMATS[name].decode
            expected = outcome(lambda decode=decode, body=body: decode(body, terms))  # type: ignore[misc]
            assert outcome(lambda name=name, body=body: shared.decode(name, body, terms)) == expected  # type: ignore[misc]


def test_rows_that_the_table_refuses_are_not_counted_as_crossed(shared: Apart) -> None:
    table = good(200).append_column("bid", pa.array([2.5] * 200)).append_column("ask", pa.array([2] * 200))
    terms = Terms(TERMS.limits, "skip", "error")
    batch = shared.decode("arrow", in_arrow(table), terms)
    refused = (
        FORMATS["arrow"].decode(in_arrow(table.set_column(1, "timestamp", pa.array([None] * 200))), terms).rejected
    )
    assert batch.receipt(inserted=190, conflicts=refused[:10]).crossed == 190


def test_a_refusal_comes_back_with_all_that_it_says(shared: Apart) -> None:
    body = in_arrow(good(3).set_column(2, "price", pa.array([1, -1, 1])))
    with pytest.raises(InvalidQuotes) as caught:
        shared.decode("arrow", body, TERMS)
    assert caught.value.received == 3
    assert [(r.index, r.pointer, r.code) for r in caught.value.rejections] == [(1, "/1/price", "price-not-positive")]
    assert str(caught.value) == caught.value.detail == "1 of 3 quotes break a rule; nothing was stored."


def test_one_reader_reads_one_body_after_another(shared: Apart) -> None:
    first = pid_of(shared)
    assert shared.decode("arrow", in_arrow(good(3)), TERMS).received == 3
    assert pid_of(shared) == first


def test_bodies_that_come_at_once_have_a_reader_each(shared: Apart) -> None:
    bodies = [in_arrow(good(count)) for count in range(1, 40)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda body: shared.decode("arrow", body, TERMS).received, bodies * 3)
        assert list(found) == list(range(1, 40)) * 3


# --- what becomes of readers ---


@pytest.mark.parametrize("name", ["crash", "abort"])
def test_a_body_that_breaks_its_reader_is_refused(shared: Apart, name: str) -> None:
    before, first = ends("crash"), pid_of(shared)
    with pytest.raises(MalformedBody, match="its reader broke down"):
        shared.decode(name, b"", TERMS)
    assert not lives(first)
    assert ends("crash") == before + 1
    assert shared.decode("arrow", in_arrow(good(3)), TERMS).received == 3


def test_a_body_that_takes_for_ever_is_refused(shared: Apart) -> None:
    before = ends("time")
    with pytest.raises(BodyTooLarge, match="more than 2 s of work"):
        shared.decode("spin", b"", HURRIED)
    assert ends("time") == before + 1


@pytest.mark.parametrize("name", ["eat", "eat_in_arrow"])
def test_a_body_that_takes_all_memory_is_refused(shared: Apart, name: str) -> None:
    with pytest.raises(BodyTooLarge, match="more than 16 MiB of memory"):
        shared.decode(name, b"", TERMS)


@pytest.mark.usefixtures("harmful")
def test_a_reader_that_has_grown_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with Apart(2**30, 0) as readers:
        first = pid_of(readers)
        with pytest.raises(InvalidRequest):
            readers.decode("grow", b"", TERMS)
        assert pid_of(readers) != first
        assert not lives(first)


@pytest.mark.usefixtures("harmful")
def test_readers_that_nobody_needs_end() -> None:
    with Apart(MEMORY, 0) as readers:
        first = pid_of(readers)
        assert readers.rest()
        assert pid_of(readers) == first  # it was needed since
        assert readers.rest()
        assert not readers.rest()
        assert not lives(first)
        assert pid_of(readers) != first


def test_a_hundred_thousand_refusals_come_back_in_pieces(shared: Apart) -> None:
    count = 2 * nursery._AT_ONCE + 1
    batch = shared.decode("ndjson", b"x\n" * count, Terms(TERMS.limits, "skip"))
    assert [r.index for r in batch.rejected] == list(range(count))
    assert {(r.code, r.pointer) for r in batch.rejected[-1:]} == {("not-an-object", f"/{count - 1}")}


def test_an_error_of_ours_is_no_500(shared: Apart) -> None:
    with capture_logs() as logged, pytest.raises(MalformedBody):
        shared.decode("fail", b"", TERMS)
    assert "the sentence of an error of ours" in logged[0]["trace"]
    with pytest.raises(MalformedBody):
        shared.decode("lie", b"", TERMS)


def test_a_reader_that_was_killed_while_it_waited_is_not_missed(shared: Apart) -> None:
    first = pid_of(shared)
    os.kill(first, signal.SIGKILL)
    assert within(10, lambda: not lives(first))
    assert pid_of(shared) != first


def test_a_reader_that_is_killed_before_it_has_the_body_is_replaced_once(
    shared: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart._Reader, "lives", lambda _: True)
    for nursery_too in (False, True):
        first = pid_of(shared)
        assert shared._nursery is not None
        for pid in (first, *([shared._nursery._process.pid] if nursery_too else [])):
            os.kill(pid, signal.SIGKILL)
        assert within(10, lambda first=first: not lives(first))  # type: ignore[misc]
        with capture_logs() as logged:
            assert pid_of(shared) != first
        assert [entry["event"] for entry in logged] == ["a reader ended"]


@pytest.mark.usefixtures("harmful")
def test_readers_that_are_killed_again_and_again_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    give = apart._Reader.give

    def given(reader: apart._Reader, task: nursery.Task, seconds: float) -> None:
        os.kill(reader.pid, signal.SIGKILL)
        assert within(10, lambda: not lives(reader.pid))
        give(reader, task, seconds)

    with Apart(MEMORY, 0) as readers:
        monkeypatch.setattr(apart._Reader, "give", given)
        with capture_logs() as logged, pytest.raises(ReaderUnavailable) as caught:
            readers.decode("name", b"", TERMS)
        monkeypatch.undo()
        assert caught.value.retry_after
        assert [(entry["event"], "exc_info" in entry) for entry in logged] == [("a reader ended", False)] * 2
        assert pid_of(readers)


def test_what_a_reader_has_the_service_holds_no_longer(shared: Apart) -> None:
    body = bytearray(in_arrow(good(3)))
    assert shared.decode("arrow", body, TERMS).received == 3
    assert not body


@pytest.mark.parametrize("whom", ["reader", "nursery"])
def test_a_reader_that_is_killed_at_work_is_not_its_bodys_fault(
    shared: Apart, monkeypatch: pytest.MonkeyPatch, whom: str
) -> None:
    first = pid_of(shared)
    asked, answer = threading.Event(), apart._Reader.answer

    def told(reader: apart._Reader) -> nursery.Answer:
        asked.set()  # before that another one would be taken in the place of one that is dead
        return answer(reader)

    monkeypatch.setattr(apart._Reader, "answer", told)
    assert shared._nursery is not None
    keeper = shared._nursery._process.pid
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(shared.decode, "sleep", b"", TERMS)
        assert asked.wait(10)
        if whom == "nursery":
            os.kill(keeper, signal.SIGKILL)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(ReaderUnavailable) as caught:
            waiting.result(30)
    assert caught.value.retry_after
    assert pid_of(shared) != first
    assert lives(keeper) == (whom == "reader")


def test_a_reader_that_was_stopped_is_given_up(shared: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pid_of(shared)
    monkeypatch.setattr(apart, "_SHARE", 4)
    monkeypatch.setattr(apart, "_PATIENCE", 0.5)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ReaderUnavailable, match="was stopped"):
        shared.decode("arrow", in_arrow(good(3)), HURRIED)
    assert not lives(first)


def test_signals_to_all_processes_of_the_service_end_no_reader(shared: Apart) -> None:
    first = pid_of(shared)
    assert shared._nursery is not None
    for pid in (first, shared._nursery._process.pid):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    assert pid_of(shared) == first


@pytest.mark.usefixtures("harmful")
def test_where_no_process_can_be_started_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with Apart(MEMORY, 0) as readers:
        for patches in (
            {"sys.executable": "/nowhere/python"},
            {"app.formats.apart._PROGRAM": "raise SystemExit"},
            {"app.formats.apart._PROGRAM": "import time; time.sleep(600)", "app.formats.apart._PATIENCE": 0.2},
        ):
            with monkeypatch.context() as patch:
                for name, value in patches.items():
                    patch.setattr(name, value)
                with pytest.raises(ReaderUnavailable) as caught:
                    readers.decode("name", b"", TERMS)
                assert caught.value.status == 503
            assert readers._nursery is None
        assert pid_of(readers)


@pytest.mark.usefixtures("harmful")
def test_whoever_waits_when_the_service_stops_has_an_answer() -> None:
    with ThreadPoolExecutor(1) as thread, Apart(MEMORY, 0) as readers:
        reader = pid_of(readers)
        waiting = thread.submit(readers.decode, "sleep", b"", TERMS)
        assert within(10, lambda: not readers._idle)
        readers.__exit__(None, None, None)
        with pytest.raises(ServiceStopping):
            waiting.result(10)
        with pytest.raises(ServiceStopping):
            readers.decode("name", b"", TERMS)
        assert within(10, lambda: not lives(reader))


@pytest.mark.usefixtures("harmful")
def test_a_reader_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUOTES_DATABASE_URL", "postgresql://someone:secret@somewhere/store")
    with Path(__file__).open("rb"), Apart(MEMORY, 0) as readers:
        pid_of(readers)
        with pytest.raises(InvalidRequest) as caught:
            readers.decode("look", b"", TERMS)
    seen = caught.value.detail
    assert "QUOTES" not in seen
    assert "test_apart" not in seen
    assert seen.count("socket:") == 1


# --- real harm, in real formats ---


def test_damage_is_a_mistake_of_the_client_whatever_it_breaks() -> None:
    rng = random.Random(3)
    bodies = [(name, body) for name, body in samples() if name in {"arrow", "parquet"}]
    refused = sound = 0
    with Apart(MEMORY, 10_000) as readers:
        for _ in range(2000):
            name, body = rng.choice(bodies)
            try:
                readers.decode(name, mutated(body, rng), HURRIED)
            except QuotesError as error:
                refused += 400 <= error.status < 500
            else:
                sound += 1
    assert refused + sound == 2000
    assert min(refused, sound) > 100


# --- in a service ---


def family(pid: int) -> set[int]:
    """The processes that descend from one and run Python, as readers and workers do."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            number = int(entry.name)
            if b"python" in (entry / "cmdline").read_bytes():
                parent = int((entry / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(number)
    found, look = set(), [pid]
    while look:
        children = parents.get(look.pop(), [])
        found.update(children)
        look += children
    return found


def post(url: str, body: bytes, name: str = "arrow") -> httpx.Response:
    """A body in the format of that name, sent to a service."""
    headers = {"content-type": FORMATS[name].media_types[0]}
    return httpx.post(f"{url}/v1/quotes", content=body, headers=headers, timeout=60)


def recent(count: int) -> pa.Table:
    symbol = random_symbol()
    return pa.Table.from_pylist([{**row, "symbol": f"{symbol}{i}"} for i, row in enumerate(good(count).to_pylist())])


def test_no_reader_is_started_before_one_is_needed_nor_outlives_the_service(serve: Serve, shared_dir: Path) -> None:
    with serve(shared_dir / "apart") as service:
        pid = service.process.pid
        alone = family(pid)
        assert post(service.url, in_json(rows_for(random_symbol())[:1]), "json").status_code == 200
        assert family(pid) == alone
        answers = [post(service.url, in_arrow(recent(3))) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        readers = family(pid) - alone
        assert len(readers) == 2  # a nursery and a reader
        assert "quotes_readers 1.0" in httpx.get(f"{service.url}/metrics").text
        service.process.kill()
        assert within(10, lambda: not any(map(lives, readers)))


def test_each_worker_has_readers_of_its_own(serve: Serve, shared_dir: Path) -> None:
    with serve(shared_dir / "apart-workers", "--workers", "2") as service:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: post(service.url, in_parquet(recent(50)), "parquet"), range(40)))
        assert {answer.status_code for answer in answers} == {200}
        readers = family(service.process.pid)
        service.process.terminate()
        service.process.wait(30)
        assert within(10, lambda: not any(map(lives, readers)))


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small bodies that would become large, each in its own way."""
    yield "parquet", in_parquet(good(1).take(pa.array([0] * 2**20)))
    nulls = pa.table({"symbol": pa.nulls(2**31 - 1), "timestamp": pa.nulls(2**31 - 1)})
    yield "arrow", in_arrow(nulls)
    long = good(1000).set_column(3, "source", pa.array(["x" * 2**16] * 1000))
    yield "parquet", in_parquet(long)
    yield "parquet", in_parquet(long, use_dictionary=False, column_encoding={"source": "DELTA_BYTE_ARRAY"})
    yield "arrow", in_arrow(long, compression="zstd")
    yield "arrow", in_arrow(long.set_column(3, "source", long["source"].dictionary_encode()))


def test_what_a_body_becomes_in_foreign_code_is_bounded_apart() -> None:
    """By what a body may become, where what is then made of it in Python may take many times that."""
    body = in_arrow(good(1).set_column(3, "source", pa.array(["x" * 2**28])), compression="zstd")
    with Apart(2**30, 0) as readers:
        first = readers._reader()
        readers._idle.append(first)
        for _ in range(3):
            with pytest.raises(BodyTooLarge, match="also when decompressed"):
                readers.decode("arrow", body, Terms(Limits.at(NOW, max_bytes=2**24)))
        assert readers._idle == [first]  # or it would have grown
        assert readers.decode("arrow", in_arrow(good(3)), TERMS).received == 3


def test_what_would_become_large_is_refused(shared: Apart) -> None:
    for name, body in bombs():
        with pytest.raises(BodyTooLarge):
            shared.decode(name, body, Terms(Limits.at(NOW, max_rows=100_000, max_bytes=2**24)))

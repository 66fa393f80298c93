"""Tables as states: CSV, JSON, Parquet and data frames in Python; and a store as a data frame."""

from __future__ import annotations

import gzip
import io
import json
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from conformance import needs

from attuned_store import (
    AsyncMemoryStore,
    BadRow,
    MemoryStore,
    MissingDependencyError,
    StateSnapshot,
    StateTable,
    ValidationError,
    axis_name,
    read_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = [
    StateSnapshot("ada", {"calm": 0.25, "warmth": 1.0}, 1_000, "inferred", 0.5, 2),
    StateSnapshot("bob", {"warmth": 0.5}, 2_000),
]


def table_of(text: str | bytes, **options: Any) -> StateTable:
    """The table of a stream of this text."""
    return read_table(io.BytesIO(text if isinstance(text, bytes) else text.encode()), **options)


def as_csv(path: Path) -> None:
    path.write_text(
        "user_id,updated_at,source,confidence,schema_version,calm,warmth\n"
        "ada,1970-01-01T00:00:01Z,inferred,0.5,2,0.25,1\n"
        "bob,1970-01-01 01:00:02+01:00,,,,NA,0.5\n"
    )


def as_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in ROWS))


def as_array(path: Path) -> None:
    path.write_text(json.dumps([row.to_dict() for row in ROWS], indent=1))


def as_parquet(path: Path) -> None:
    frame().to_parquet(path, index=False)


def as_packed(path: Path) -> None:
    as_csv(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def frame() -> Any:
    """The rows as a data frame of pandas."""
    with MemoryStore(axes=["calm", "warmth"]) as store:
        store.upsert_many(ROWS)
        return store.to_dataframe()


FILES = [
    pytest.param("rows.csv", as_csv, id="csv"),
    pytest.param("rows.csv.gz", as_packed, id="gzip"),
    pytest.param("rows.jsonl", as_lines, id="lines"),
    pytest.param("rows.json", as_array, id="array"),
    pytest.param("rows.json", as_lines, id="lines called json"),
    pytest.param("rows.parquet", as_parquet, id="parquet", marks=needs("pyarrow", "pandas")),
    pytest.param("rows", as_parquet, id="parquet without a name", marks=needs("pyarrow", "pandas")),
]


@pytest.mark.parametrize(("name", "write"), FILES)
def test_every_format_gives_the_same_states(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    """A file is read as often as asked, from a path or a stream, and gives states that a store takes."""
    path = tmp_path / name
    write(path)
    table = read_table(path)
    assert list(table) == list(table) == ROWS
    assert list(read_table(str(path))) == ROWS
    assert set(table.axes) == {"calm", "warmth"}
    assert (table.report.good, table.report.bad, str(table.report)) == (2, 0, "2 good rows, 0 bad rows")
    with path.open("rb") as stream:
        assert list(read_table(stream)) == ROWS
        assert not stream.closed
    with MemoryStore(axes=table.axes) as store:
        assert store.upsert_many(table) == 2
        assert dict(store.items()) == {row.user_id: row for row in ROWS}


@needs("pandas")
def test_a_data_frame_is_a_table() -> None:
    """What to_dataframe gives is read again; ids may be numbers, an index is a column, gaps are absent."""
    import pandas as pd

    assert list(read_table(frame())) == ROWS
    other = pd.DataFrame({"Subject": [7, 8], "When": pd.to_datetime(["2026-01-17", None]), "Calm": [5, 10]})
    table = read_table(other.set_index("Subject"), user_column="Subject", time_column="When", scale=(0, 10))
    first, second = table
    assert first == StateSnapshot("7", {"calm": 0.5}, datetime(2026, 1, 17, tzinfo=UTC))
    assert (second.user_id, dict(second.axes)) == ("8", {"calm": 1.0})
    assert second.updated_at_unix_ms > first.updated_at_unix_ms  # the time of read_table
    floats = read_table(pd.DataFrame({"user_id": [1.0, 2.5], "calm": [0.5, math.nan]}))
    assert [state.user_id for state in floats] == ["1"]
    assert floats.report.examples == (BadRow(1, "user_id: text or a whole number is needed, got 2.5"),)


@needs("pandas", "pyarrow")
def test_what_streams_arrow_is_a_table() -> None:
    """A table of pyarrow, and so of whatever has its interface, is read by batches."""
    import pyarrow as pa

    ids = [f"user{number}" for number in range(3_000)]
    arrow = pa.table({"user_id": ids, "calm": [number / 3_000 for number in range(3_000)]})
    assert [state.user_id for state in read_table(arrow)] == ids
    for text in (b"PAR1 and no more", b""):
        with pytest.raises(ValidationError, match="no Parquet file"):
            table_of(text, format="parquet")


def test_parquet_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow, the error says how to get it; without pandas, so does to_dataframe."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependencyError, match=r"attuned-store\[parquet\]"):
        read_table(tmp_path / "a.parquet")
    with MemoryStore() as store, pytest.raises(MissingDependencyError, match=r"attuned-store\[dataframe\]"):
        store.to_dataframe()


@pytest.mark.parametrize(
    ("text", "time_format", "expected"),
    [
        ("2026-01-17", None, "2026-01-17T00:00:00+00:00"),
        ("2026-01-17 12:30", None, "2026-01-17T12:30:00+00:00"),
        ("2026-01-17T12:30:00.123456789Z", None, "2026-01-17T12:30:00.123+00:00"),
        ("2026-01-17T12:30:00+02:00", None, "2026-01-17T10:30:00+00:00"),
        ("1768653000000", None, "2026-01-17T12:30:00+00:00"),
        ("1.768653e12", None, "2026-01-17T12:30:00+00:00"),
        ("1768653000", "s", "2026-01-17T12:30:00+00:00"),
        ("1768653000.25", "s", "2026-01-17T12:30:00.250+00:00"),
        ("17.01.2026 12:30", "%d.%m.%Y %H:%M", "2026-01-17T12:30:00+00:00"),
        ("01/17/26 12:30 +0100", "%m/%d/%y %H:%M %z", "2026-01-17T11:30:00+00:00"),
    ],
)
def test_times_come_in_many_forms(text: str, time_format: str | None, expected: str) -> None:
    """ISO 8601, milliseconds, and with time_format seconds or what strptime reads; in UTC by default."""
    (state,) = table_of(f"user_id,updated_at,calm\na,{text},1\n", time_format=time_format)
    assert state.updated_at == datetime.fromisoformat(expected)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("user_id,updated_at,calm\na,1768653000,1\nb,1768653001,1\n", 'time_format="s"'),
        ("user_id,updated_at,calm\na,17/01/2026,1\n", 'time_format="%d.%m.%Y %H:%M"'),
        ("user_id,calm\na,1\nb,null\n", "null stands for nothing: absent"),
        ("user_id,calm,load\na,3,40\nb,7,100\n", "axes differ (calm 3 to 7, load 40 to 100): scales"),
        ("user_id,logged,calm\na,1768653000,1\n", "logged looks like times: time_column='logged'"),
        ("user_id,updated_at,calm\n" + "a,20260117,1\n" * 10, "all times lie in 1970"),
    ],
)
def test_a_report_says_what_may_help(text: str, hint: str) -> None:
    """The report of a table has hints, which its text ends with."""
    table = table_of(text)
    report = table.check()
    assert hint in report.hints[0]
    assert str(report).endswith(report.hints[0])


def test_a_report_counts_bad_rows() -> None:
    """The first five bad rows are kept, all are counted by reason; the span of values suggests a scale."""
    table = table_of(
        "user_id,calm,warmth\n" + "".join(f"u{n},{n},0\n" for n in range(32)) + "v,x,1\n,0.5,1\n"
    )
    assert [state.user_id for state in table] == ["u0", "u1"]
    report = table.report
    assert (report.good, report.bad, report.unit, report.span) == (2, 32, "line", (0.0, 31.0))
    assert report.examples[0] == BadRow(4, "calm: 2 is outside of the scale 0:1")
    assert len(report.examples) == 5
    assert dict(report.reasons) == {
        "calm: outside of the scale 0:1": 30,
        "calm: not a number": 1,
        "user_id: 1 to 256 bytes of UTF-8 are needed": 1,
    }
    assert "values span 0 to 31: try scale=(0, 31)" in str(report)
    assert repr(table) == "<StateTable of 2 axes, 2 rows read, 32 bad>"


def test_scales_of_single_axes() -> None:
    """An axis may have a scale of its own, by its heading or its name."""
    table = table_of("user_id,Calm Now,warmth\na,5,0.5\nb,,1\n", scales={"Calm Now": (0, 10)})
    assert [dict(state.axes) for state in table] == [{"calm_now": 0.5, "warmth": 0.5}, {"warmth": 1.0}]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "participant,calm\na,1\n",
            {},
            "no column user_id .*; if it is participant: user_column='participant'",
        ),
        ("a,calm\na,1\n", {}, "user_column .or --user-column. names the column"),
        ("user_id,calm\na,1\n", {"axes": ["clam"]}, "axes: there is no column 'clam' .did you mean 'calm'"),
        ("user_id,calm\na,1\n", {"ignore": ["x"]}, "ignore: there is no column 'x' among user_id, calm"),
        ("user_id,day\na,2026-01-17\n", {}, "day .'2026-01-17'.*time_column='day'"),
        ("user_id,site\na,web\n", {"axes": ["site"], "ignore_text": True}, "columns without numbers: site"),
        ("user_id,calm\na,1\n", {"scale": (1, 0)}, "scale: two numbers, the lower first"),
        ("user_id,calm\na,1\n", {"scales": 5}, "scales: a mapping"),
        ("user_id,calm\na,1\n", {"axes": "calm"}, "axes: a list of texts"),
        ("user_id,calm\na,1\n", {"encoding": "klingon"}, "encoding: the name of one"),
        ("user_id,calm\na,1\n", {"format": "xml"}, "format: one of csv, jsonl, json, parquet"),
        ("user_id,calm\na,1\n", {"time_format": ""}, "time_format: a text"),
        ("[]", {}, "the array is empty"),
        ('{"user_id": {"0": "a"}, "calm": {"0": 1}}', {}, "to_json.orient='records'"),
        ('[{"user_id": "a", "calm": 1}', {}, "not a JSON array: .* in row 1"),
        ("[" * 100_000, {}, "row 0 is nested too deeply"),
        ('[{"user_id": "' + "a" * (1 << 21), {}, "not a JSON array"),
        (b"PK\x03\x04 and so on", {}, "a zip or Excel file"),
    ],
)
def test_what_does_not_fit_is_said(text: str | bytes, options: dict[str, Any], message: str) -> None:
    """A heading or an option that does not fit is an error before any row is handed out."""
    with pytest.raises(ValidationError, match=message):
        next(iter(table_of(text, **options)))


def test_what_is_no_table_is_refused() -> None:
    """A source of another kind is a ValidationError."""
    for thing in (None, 5, object(), [1], StateSnapshot, "a\0b"):
        with pytest.raises(ValidationError):
            read_table(thing)


def test_an_array_is_read_by_pieces() -> None:
    """An array on one line may be longer than any line of CSV; a bad element is told by its number."""
    rows = [{"user_id": f"user{number}", "updated_at_unix_ms": 5, "calm": 0.5} for number in range(30_000)]
    text = json.dumps(rows).replace('"user77", "updated_at_unix_ms": 5', '"user77", "calm": 1')
    assert len(text) > 1 << 20
    table = table_of(text)
    assert len(table.axes) == 1  # which reads it all
    assert sum(1 for _ in table) == 29_999
    assert table.report.unit == "row"
    assert table.report.examples == (BadRow(77, "calm is there twice"),)


@pytest.mark.parametrize("first", ["", "Unnamed: 0"])
@pytest.mark.parametrize("start", [0, 1])
def test_row_numbers_are_no_axis(first: str, start: int) -> None:
    """The row numbers that pandas and R write before the others are left out."""
    table = table_of(f'"{first}",user_id,calm\n{start},a,0.5\n{start + 1},b,1\n')
    assert table.axes == ("calm",)
    assert [dict(state.axes) for state in table] == [{"calm": 0.5}, {"calm": 1.0}]


def test_other_encodings() -> None:
    """A file in another encoding is read where that is named."""
    for encoding in ("utf-16", "cp1252"):
        data = "user_id,wärme\nÖdön,1\n".encode(encoding)
        with pytest.raises(ValidationError, match=f"not UTF-8.*encoding='{encoding}'"):
            table_of(data)
        assert next(iter(table_of(data, encoding=encoding, format="csv"))).user_id == "Ödön"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """What the system says of a path is raised as it is."""
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(OSError, match="directory"):
        read_table(tmp_path)


def test_progress_of_a_check() -> None:
    """Check tells how many rows it has read."""
    seen: list[int] = []
    table = table_of("user_id,calm\n" + "a,1\n" * 2_000)
    table.check(progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert len(seen) > 0
    assert seen[-1] <= 2_000


def test_a_name_of_an_axis() -> None:
    """axis_name is what becomes of headings."""
    assert axis_name("Energetic Arousal (1-7)") == "energetic_arousal_1_7"
    with pytest.raises(ValidationError):
        axis_name(5)  # type: ignore[arg-type]


@needs("pandas")
def test_a_store_as_a_data_frame() -> None:
    """One row a state, sorted, with all axes of the store; the same of an asynchronous store."""
    states = [
        StateSnapshot("bob", {"warmth": 0.5}, 3_000),
        StateSnapshot("ada", {"calm": 1}, 253402300799999),
    ]
    with MemoryStore(axes=["calm", "warmth"]) as store:
        store.upsert_many([*states, StateSnapshot("bob", {}, 1_000, "mixed", 0.5, 2)])
        found = store.to_dataframe()
        assert list(found.columns) == [
            "user_id", "updated_at", "source", "confidence", "schema_version", "calm", "warmth",
        ]  # fmt: skip
        assert found["user_id"].tolist() == ["ada", "bob", "bob"]
        kinds = found.dtypes[["updated_at", "confidence", "schema_version", "calm"]]
        assert list(map(str, kinds)) == ["datetime64[ms, UTC]", "float64", "int64", "float64"]
        assert [state.source for state in read_table(found)] == ["self_report", "mixed", "self_report"]
        assert store.to_dataframe(["bob", "nobody"], since=2_000)["warmth"].tolist() == [0.5]
        assert len(store.to_dataframe([])) == 0

    async def flow() -> None:
        async with AsyncMemoryStore(axes=["calm", "warmth"]) as other:
            await other.upsert_many(states)
            assert len(await other.to_dataframe()) == 2

    anyio.run(flow)

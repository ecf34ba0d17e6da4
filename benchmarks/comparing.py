"""One comparison: ours and its peers timed together, and a row for each peer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks import timing, trees
from benchmarks.options import Options
from benchmarks.rows import Limits, Row
from benchmarks.timing import Arm, Program

_WRONG = 0.02  # a norm further off is not a matter of the dtype
_WORTH_A_NOTE = 0.01
_STREAM = "a stream"


def compare(
    options: Options,
    row: Row,
    arms: Mapping[str, Arm],
    *,
    moved: int | None = None,
    limits: Callable[[str], Limits] = lambda peer: Limits(),
    notes: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Iterator[Row]:
    """Times ours, the first arm, and its peers, and fills a row for each peer.

    Args:
      options: What the run is asked for.
      row: What all rows have in common; its tree is a name.
      arms: Ours, and the peers by name.
      moved: The bytes that have to be read and written, if memory is the limit.
      limits: What the row of a peer has to keep.
      notes: What else there is to say of a peer.
      seconds: How long the rounds may take, if not as long as any.
    """
    row = labeled(options, row)
    times, shares = _timed(options, arms, moved, seconds)
    ours, *peers = arms
    for peer in peers:
        yield filled(
            row._replace(
                peer=peer,
                moved=moved,
                share=shares.get(ours),
                note=(notes or {}).get(peer, ""),
                limits=limits(peer),
            ),
            (times[ours], times[peer]),
            (arms[ours].program, arms[peer].program),
        )


def against_the_first(
    options: Options,
    row: Row,
    arms: Mapping[str, Arm],
    *,
    moved: int | None = None,
    limits: Limits,
    seconds: float,
) -> Iterator[Row]:
    """Times many arms of ours against the first, their peer: a row for each."""
    row = labeled(options, row)
    times, shares = _timed(options, arms, moved, seconds)
    peer, *others = arms
    for what in others:
        yield filled(
            row._replace(
                what=what,
                peer=peer,
                moved=moved,
                share=shares.get(what),
                limits=limits,
            ),
            (times[what], times[peer]),
            (arms[what].program, arms[peer].program),
        )


def _timed(
    options: Options,
    arms: Mapping[str, Arm],
    moved: int | None,
    seconds: float | None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times arms, and says which share of the bandwidth each reached.

    A stream runs in the same rounds: the bandwidth drifts as all else does.
    """
    if moved is None:
        return options.in_turn(dict(arms), seconds), {}
    stream = options.stream
    times = options.in_turn({**arms, _STREAM: stream.arm}, seconds)
    factor = moved / stream.moved
    shares = {
        name: factor * timing.compared(times[_STREAM], times[name]).ratio
        for name in arms
    }
    return times, shares


def labeled(options: Options, row: Row) -> Row:
    """Returns a row whose tree is named with its numbers and leaves."""
    return row._replace(tree=trees.label(row.tree, options.shapes(row.tree)))


def filled(
    row: Row,
    times: tuple[list[float], list[float]],
    programs: tuple[Program | None, Program | None] = (None, None),
) -> Row:
    """Returns a row with what was measured, and what is known of the programs."""
    return timed(built(row, programs), times)


def timed(row: Row, times: tuple[list[float], list[float]]) -> Row:
    """Returns a row with what was measured."""
    got = timing.compared(*times)
    return row._replace(
        ours_ms=got.ours * 1e3,
        theirs_ms=got.theirs * 1e3,
        ratio=got.ratio,
        low=got.spread[0],
        high=got.spread[1],
        rounds=len(times[0]),
    )


def built(row: Row, programs: tuple[Program | None, Program | None]) -> Row:
    """Returns a row with what is known of programs without running them."""
    ours, theirs = programs
    return row._replace(
        build_ms=ours and 1e3 * (ours.build_s - ours.trace_s),
        peer_build_ms=theirs and 1e3 * (theirs.build_s - theirs.trace_s),
        memory=ours and ours.memory,
        peer_memory=theirs and theirs.memory,
    )


def same_norm(arms: Mapping[str, Arm], truth: float) -> dict[str, str]:
    """Refuses to time a norm of ours that is wrong, and says of which peer it is.

    A wrong norm is quick to compute.
    """
    notes = {}
    for number, (name, each) in enumerate(arms.items()):
        off = abs(float(each.run()) / truth - 1)
        if number == 0:
            refuse_wrong(off)
        elif off > _WORTH_A_NOTE:
            notes[name] = f"theirs is {off:.0%} off"
    return notes


def refuse_wrong(off: float) -> None:
    """Refuses to time what is wrong."""
    if not off < _WRONG:
        raise AssertionError(f"Our norm is off by {off:.1e}: there is nothing to time.")


def result_of(each: Arm) -> Any:
    """Returns what an arm computes, once it is there."""
    result = each.run(*each.before())
    each.wait(result)
    return result

"""Writers: where the scalars of a run go, known by their shape and never by import."""

import collections
import inspect
import json
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gradnorm_jax.monitoring.tensorboard import TensorBoard

#: Words that are hardly meant as directories.
_TRACKERS = ("wandb", "mlflow", "trackio", "comet", "aim", "clearml", "neptune")

Send = Callable[[int, dict[str, float]], object]


class Writer(Protocol):
    """Takes the scalars of one step after the other."""

    def write(self, step: int, scalars: Mapping[str, float], /) -> None:
        """Hands on the scalars of one step."""
        ...

    def close(self) -> None:
        """Ends the writing."""
        ...


def as_writer(obj: Any, *, prefix: str = "gradnorm/") -> Writer:
    """Makes a writer of a path, a tracker, a function, or several of them.

    What is asked of a tracker is one method, in this order:

    ====================================  =====================================
    given                                 what happens
    ====================================  =====================================
    a path to `*.jsonl`                   one line of strict JSON a step
    any other path                        a directory with a TensorBoard file
    a list or tuple                       each of its members is written to
    has `write(step, d)` and `close()`    it is a writer: returned unchanged
    has `write_scalars(step, d)`          clu, kauldron
    has `log_metrics(d, step=)`           MLflow, Comet, the loggers of Lightning
    has `log(d, step=)`                   W&B, trackio, and what is made like them
    has `add_scalar(name, value, step)`   tensorboardX, PyTorch's TensorBoard
    has `scalar(name, value, step)`       Flax
    has `track(value, name=, step=)`      Aim
    is a function of `(step, d)`          it is called
    ====================================  =====================================

    No value is left out or changed here, but a tracker may do so. MLflow keeps an
    infinity as 1.8e308 in its databases. It refuses names such as `kernel[3]`, and is
    given `kernel_3_`.

    W&B drops what comes for a step before its newest, and a monitor reads its rows
    late. So W&B is not given `step=`: the step is the scalar `prefix + "step"`, which
    W&B is told is the x axis. Each `write` ends one of W&B's own steps: where you
    log to it with `step=`, log at least as often, or W&B drops rows of yours.

    If one of several writers raises, the others still get the step; then the error is
    raised, with a note that names the writer. `close` closes only the files that were
    opened here: a tracker, or a writer among several, is for its owner to close.

    Args:
      obj: The path, the tracker (an instance or its module), the function, or several.
      prefix: What stands before the name of each scalar.

    Returns:
      An object with `write(step, scalars)` and `close()`.

    Raises:
      TypeError: If `obj` has none of these shapes.
      ValueError: If `obj` is the address of remote storage.

    Example:
      >>> writer = as_writer(lambda step, scalars: print(step, scalars))
      >>> writer.write(3, {"clip/scale": 0.5})
      3 {'gradnorm/clip/scale': 0.5}
    """
    if isinstance(obj, str | os.PathLike):
        return _at(obj, prefix)
    if isinstance(obj, list | tuple):
        return _FanOut(obj, prefix)
    if not isinstance(obj, type):
        if _has(obj, "close") and _has(obj, "write") and _binds(obj.write, 0, {}):
            return obj
        send = _sender(obj, prefix)
        if send is not None:
            return _Tracker(send, getattr(obj, "flush", None), prefix)
    instance = " an instance of it," if isinstance(obj, type) else ""
    raise TypeError(
        f"`as_writer(obj)` does not know how to write to {_name(obj)}. Give{instance}"
        " a path (`*.jsonl`, or a directory for TensorBoard), a function of (step,"
        " scalars), a list of several, or an object with `write(step, d)` and"
        " `close()`, `write_scalars(step, d)`, `log_metrics(d, step=)`,"
        " `log(d, step=)`, `add_scalar(name, value, step)`, `scalar(name, value,"
        " step)` or `track(value, name=, step=)`."
    )


class JsonLines:
    """A file of strict JSON, one line a step, flushed at the end of each.

    JSON has no NaN and no infinity: these are the strings `"nan"`, `"inf"`, `"-inf"`.
    A file that is there is gone on with; a last line that a kill cut short is cut off.

    Args:
      path: The file. Its directory is made.
      prefix: What stands before the name of each scalar.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     writer = JsonLines(f"{directory}/run.jsonl")
      ...     writer.write(7, {"loss": 0.5, "clip/limit": float("inf")})
      ...     writer.close()
      ...     print(Path(directory, "run.jsonl").read_text(), end="")
      {"step": 7, "loss": 0.5, "clip/limit": "inf"}
    """

    def __init__(self, path: str | os.PathLike, *, prefix: str = ""):
        """Opens the file at its end."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115
        self._prefix = prefix
        self._mend_the_last_line()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line."""
        line: dict[str, Any] = {"step": operator.index(step)}
        for name, value in _named(scalars, self._prefix).items():
            line[name] = value if math.isfinite(value) else str(value)
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file. Closing twice does nothing more."""
        self._file.close()

    def _mend_the_last_line(self) -> None:
        self._file.seek(0)
        for last in collections.deque(self._file, maxlen=1):
            if not last.endswith(b"\n"):
                try:
                    json.loads(last)
                except ValueError:
                    self._file.truncate(self._file.tell() - len(last))
                else:
                    self._file.write(b"\n")


class _Tracker:
    """Somebody else's object, and how scalars are sent to it."""

    def __init__(self, send: Send, flush: Callable[[], object] | None, prefix: str):
        self._send, self._flush, self._prefix = send, flush, prefix

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._send(operator.index(step), _named(scalars, self._prefix))

    def close(self) -> None:
        if callable(self._flush):
            self._flush()


class _FanOut:
    """Several writers, each of which gets every step, whatever befalls the others."""

    def __init__(self, objs: Sequence[Any], prefix: str):
        self._writers: list[tuple[Any, Writer]] = []
        try:
            for obj in objs:
                self._writers.append((obj, as_writer(obj, prefix=prefix)))
        except BaseException:
            self.close()
            raise

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        _to_each(self._writers, lambda writer: writer.write(step, scalars))

    def write_image(self, step: int, name: str, png: bytes) -> None:
        able = [pair for pair in self._writers if _has(pair[1], "write_image")]
        _to_each(able, lambda writer: writer.write_image(step, name, png))

    def close(self) -> None:
        ours = [(obj, writer) for obj, writer in self._writers if writer is not obj]
        _to_each(ours, lambda writer: writer.close())


def _to_each(writers: list[tuple[Any, Any]], act: Callable[[Any], object]) -> None:
    errors = []
    for obj, writer in writers:
        try:
            act(writer)
        except Exception as error:
            error.add_note(f"This was raised by the writer {_name(obj)}.")
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(writers)} writers failed", errors)


def _at(path: str | os.PathLike, prefix: str) -> Writer:
    name = os.fspath(path)
    if re.match(r"\w{2,}:/", name):
        raise ValueError(
            f"`as_writer({name!r})` writes only to files of this machine. Name a local"
            " path and copy it, or give a writer that knows this storage, such as"
            " `tensorboardX.SummaryWriter(...)`."
        )
    if name in _TRACKERS:
        raise ValueError(
            f"`as_writer({name!r})` names a tracker, and a text is a path here. Give"
            f" the module or the run itself, as in `import {name}`; for a directory of"
            f" that name `'./{name}'`."
        )
    if name.endswith(".jsonl"):
        return JsonLines(name, prefix=prefix)
    if os.path.isfile(name):
        raise ValueError(
            f"`as_writer({name!r})` is a file. Name a `*.jsonl` file, or a directory"
            " for TensorBoard."
        )
    return TensorBoard(name, prefix=prefix)


def _sender(obj: Any, prefix: str) -> Send | None:
    """Returns what sends scalars to an object, or `None` if its shape is not known."""
    if _has(obj, "write_scalars"):
        return lambda step, scalars: obj.write_scalars(step, scalars)
    if _has(obj, "log_metrics"):
        plain = _plain if _has(obj, "set_tracking_uri") else dict  # for MLflow
        return lambda step, scalars: obj.log_metrics(plain(scalars), step=step)
    if _has(obj, "log") and _takes_step(obj.log):
        if _has(obj, "define_metric"):
            return _with_own_axis(obj, prefix)
        return lambda step, scalars: obj.log(scalars, step=step)
    if _has(obj, "add_scalar"):
        return _one_by_one(lambda name, value, step: obj.add_scalar(name, value, step))
    if _has(obj, "scalar"):
        return _one_by_one(lambda name, value, step: obj.scalar(name, value, step))
    if _has(obj, "track"):
        return _one_by_one(
            lambda name, value, step: obj.track(value, name=name, step=step)
        )
    if callable(obj) and _binds(obj, 0, {}):
        return obj
    return None


def _with_own_axis(run: Any, prefix: str) -> Send:
    """Sends to W&B, whose own steps may only rise and belong to the user."""
    axis = prefix + "step"
    defined: set[str] = set()

    def send(step: int, scalars: dict[str, float]) -> None:
        for pattern in ({prefix + "*"} if prefix else scalars.keys()) - defined:
            run.define_metric(pattern, step_metric=axis)
            defined.add(pattern)
        run.log({axis: step, **scalars})

    return send


def _one_by_one(send: Callable[[str, float, int], object]) -> Send:
    def send_all(step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            send(name, value, step)

    return send_all


def _named(scalars: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {prefix + name: float(value) for name, value in scalars.items()}


def _plain(scalars: dict[str, float]) -> dict[str, float]:
    return {re.sub(r"[^\w\-./ ]", "_", name): x for name, x in scalars.items()}


def _has(obj: Any, method: str) -> bool:
    return callable(getattr(obj, method, None))


def _binds(function: Callable, *arguments: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):  # does not fit, or has no signature
        return False
    return True


def _takes_step(function: Callable) -> bool:
    """Tells the `log` of a tracker from that of a module, a `Logger` or a model."""
    try:
        return "step" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _name(obj: Any) -> str:
    if isinstance(obj, str | os.PathLike):
        return repr(os.fspath(obj))
    if isinstance(name := getattr(obj, "__name__", None), str):  # a module, a function
        return f"`{name}`"
    return f"a `{type(obj).__module__}.{type(obj).__qualname__}`"

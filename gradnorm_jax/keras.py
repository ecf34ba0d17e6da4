r"""Experimental: the record of `watch` in an optimizer of Keras 3, on the JAX backend.

Three lines::

    from gradnorm_jax.keras import GradNormCallback, watch
    model.compile(watch(keras.optimizers.Adam(1e-3)), "mse")
    model.fit(x, y, callbacks=[GradNormCallback(every=50, dir="runs/a")])

Keras has no place for this, so `build`, `apply` and what saves and loads are replaced
on the one optimizer. Keras may change; then an error here says what is missing.
"""

import importlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradnorm_jax._typing import Groups, PerLeaf, Tree
from gradnorm_jax.monitoring import Finding, Monitor
from gradnorm_jax.telemetry import KINDS, WatchState
from gradnorm_jax.watching import watch as watch_optax

#: Under which name an optimizer keeps its record.
_RECORD = "_gradnorm_record"
#: What is asked of an optimizer of Keras.
_NEEDED = (
    *("apply", "build", "built", "add_variable", "iterations", "stateless_apply"),
    *("save_own_variables", "load_own_variables", "variables"),
)


def watch(
    optimizer: Any,
    *,
    window: int = 128,
    every: int = 1,
    record: tuple[str, ...] = KINDS,
    groups: Groups | None = None,
    stacked_axes: PerLeaf | None = None,
) -> Any:
    """Keeps the norms of the last steps of a Keras optimizer among its variables.

    One row is what :func:`gradnorm_jax.watch` keeps: the norms of the gradients, taken
    before the clip of Keras, of what the step added to the variables, and of the
    variables before it. The loss and what a clip of Keras did are not known here: NaN.
    Parts have the `path` of their variable, as "sequential/dense/kernel".

    Files that Keras saves hold the optimizer without its record, as if it had never
    been watched. With `gradient_accumulation_steps` each batch has its row, and most
    have updates of 0. A step that a `LossScaleOptimizer` skips has none.

    Args:
      optimizer: An optimizer, or its name. It is changed in place.
      window: How many rows are kept.
      every: Of how many steps one is recorded.
      record: Which of "grad", "update" and "param" to measure, and details, as in
        :func:`gradnorm_jax.watch`.
      groups: Labels by which variables have one norm together.
      stacked_axes: The axis along which a variable stacks layers.

    Returns:
      The same optimizer.

    Raises:
      ModuleNotFoundError: If Keras is not installed.
      RuntimeError: If Keras does not run on JAX, or lacks what is needed here.
      ValueError: If the optimizer is watched already.
    """
    keras = _keras("watch(optimizer)")
    optimizer = keras.optimizers.get(optimizer)
    missing = [name for name in _NEEDED if not hasattr(optimizer, name)]
    if missing:
        raise RuntimeError(
            f"`watch(optimizer)`: a {type(optimizer).__name__} of Keras"
            f" {keras.__version__} has no {', '.join(missing)}, which this experimental"
            " module needs. It was made for Keras 3.15."
        )
    if find_record(optimizer) is not None:
        raise ValueError(
            f"`watch(optimizer)`: this {type(optimizer).__name__} is watched already."
            " Watch an optimizer once, and make a new one for another model."
        )
    settings = {"record": record, "groups": groups, "stacked_axes": stacked_axes}
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scale
    _Record(inner, settings, window, every)
    return optimizer


class GradNormCallback:
    """Reads the record of a watched Keras optimizer into a `Monitor`.

    Attributes:
      monitor: The :class:`gradnorm_jax.monitoring.Monitor`; there is none before the
        first batch.

    Args:
      every: How many calls of Keras lie between two readings, a call being a batch, or
        `steps_per_execution` of them. `watch(window=...)` must hold as many rows.
      options: Other arguments of `Monitor`: `dir`, `log`, `warn`, `rules`, `names`,
        `ignore`, `resume`.
    """

    model: Any  # of keras.callbacks.Callback, as the class that is made below

    def __new__(cls, *args: Any, **options: Any) -> "GradNormCallback":
        """Makes it a callback of Keras, which is imported only now."""
        base = _keras("GradNormCallback(...)").callbacks.Callback
        if not issubclass(cls, base):
            cls = type(cls.__name__, (cls, base), {"__doc__": cls.__doc__})
        return object.__new__(cls)

    def __init__(self, every: int = 50, **options: Any):
        """Takes the options; nothing is opened yet."""
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                "`GradNormCallback(every=...)` must be a whole number of at least 1,"
                f" got {every!r}. It is the number of batches from one reading to the"
                " next."
            )
        self.monitor: Any = None
        self._every, self._options, self._calls = every, options, 0
        self._thread: int | None = None

    def on_train_begin(self, logs: Mapping | None = None) -> None:
        """Notes in which thread Keras trains."""
        self._thread = threading.get_ident()

    def on_train_batch_end(self, batch: int, logs: Mapping | None = None) -> None:
        """Counts; on the first and then on every `every`-th call reads the record."""
        if threading.get_ident() != self._thread:
            raise ValueError(
                "`GradNormCallback` was called beside the training, as Keras calls"
                " callbacks that are not in a list, when the state of this step may be"
                " gone. Call `model.fit(..., callbacks=[callback])`."
            )
        self._calls += 1
        if self._calls % self._every == 0 or self.monitor is None:
            self._read()

    def on_train_end(self, logs: Mapping | None = None) -> None:
        """Reads the last rows."""
        self.close()

    def close(self) -> None:
        """Reads the last rows: for a `fit` that was interrupted. Else Keras does it."""
        if self.monitor is not None:
            self._read()
            self.monitor.close()

    def findings(self) -> list[Finding]:
        """Returns what is to be said of the training so far."""
        return [] if self.monitor is None else self.monitor.findings()

    def _read(self) -> None:
        # To ask for the model makes Keras put the state of the loop into variables.
        optimizer = self.model.optimizer
        record = find_record(optimizer)
        if record is None or not record.variables:
            raise ValueError(
                "`GradNormCallback`: the model was not compiled with a watched"
                " optimizer. Call `model.compile(optimizer=watch(optimizer), ...)`."
            )
        state = record.state()
        if int(state.step) == 0 and int(optimizer.iterations) > 0:
            raise RuntimeError(
                "`GradNormCallback`: the optimizer took steps and none was recorded."
                " This Keras calls its optimizers in another way than Keras 3.15, for"
                " which this experimental module was made; or a training loop of your"
                " own leaves out some of `optimizer.variables`."
            )
        if self.monitor is None:
            options = record.settings | self._options
            self.monitor = Monitor(record.params(), every=1, **options)
        self.monitor(state)


def find_record(optimizer: Any) -> Any:
    """Returns the record that `watch` put on an optimizer, or `None`."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, _RECORD, None)


class _Record:
    """The rows of one optimizer, and the methods that stand in for its own."""

    def __init__(
        self, optimizer: Any, settings: dict[str, Any], window: int, every: int
    ):
        self.settings, self.variables = settings, []
        self._optimizer = optimizer
        self._apply, self._build = optimizer.apply, optimizer.build
        self._load = optimizer.load_own_variables
        self._trained: list[Any] = []
        self._inner_call: Any = None
        inner = optax.GradientTransformation(optax.init_empty_state, self._update)
        self._tx = watch_optax(inner, window=window, every=every, **settings)
        if optimizer.built:  # loaded from a file, or used before
            self._add(_trained_by(optimizer))
        optimizer.build = self.build
        optimizer.apply = self.apply
        optimizer.save_own_variables = self.save_own_variables
        optimizer.load_own_variables = self.load_own_variables
        setattr(optimizer, _RECORD, self)

    def params(self) -> Tree:
        """The shapes of what is trained, by name."""
        return {
            name: jax.ShapeDtypeStruct(tuple(v.shape), jnp.dtype(v.dtype))
            for name, v in self._named()
        }

    def state(self) -> WatchState:
        """The state of `watch`, as the variables hold it."""
        return WatchState(optax.EmptyState(), *(v.value for v in self.variables))

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the variables of the optimizer, and then those of the record."""
        self._build(variables)
        if not self.variables:
            self._add(variables)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Takes a step, and records it."""
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self._optimizer.built:
                self._optimizer.build(trainable_variables)
        if not self.variables:  # not built: Keras says so
            return self._apply(grads, trainable_variables)
        given = trainable_variables or self._trained
        by_variable = {id(v): g for v, g in zip(given, grads, strict=True)}
        scale = self._optimizer.loss_scale_factor or 1
        named = self._named()
        found = {name: by_variable.get(id(v)) for name, v in named}
        tree = {
            name: jnp.zeros(v.shape, v.dtype)
            if found[name] is None
            else jnp.asarray(found[name]) / scale
            for name, v in named
        }
        self._inner_call = lambda: self._apply(grads, trainable_variables)
        before = {name: v.value for name, v in named}
        after: Any = self._tx.update(tree, self.state(), before)[1]
        for variable, value in zip(self.variables, after[1:], strict=True):
            variable.assign(value)
        return None

    def save_own_variables(self, store: Any) -> None:
        """Saves what the optimizer would have without the record."""
        for k, variable in enumerate(self._kept()):
            store[str(k)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Loads what was saved with or without a record; steps count on from there."""
        kept = self._kept()
        if len(store.keys()) != len(kept):
            return self._load(store)  # which warns
        for k, variable in enumerate(kept):
            variable.assign(store[str(k)])
        if self.variables:
            step = WatchState._fields[1:].index("step")
            self.variables[step].assign(self._steps())
        return None

    def _update(
        self, updates: Tree, state: Any, params: Any = None
    ) -> tuple[Tree, Any]:
        """The optimizer of Keras as one of Optax: what it adds to the variables."""
        self._inner_call()
        return {name: v.value - params[name] for name, v in self._named()}, state

    def _add(self, variables: Sequence[Any]) -> None:
        self._trained = list(variables)
        state: Any = self._tx.init({name: v.value for name, v in self._named()})
        values = state._replace(step=state.step + self._steps())[1:]
        for name, value in zip(WatchState._fields[1:], values, strict=True):
            variable = self._optimizer.add_variable(
                value.shape, dtype=str(value.dtype), name=f"gradnorm_{name}"
            )
            variable.assign(value)
            self.variables.append(variable)

    def _named(self) -> list[tuple[str, Any]]:
        # A scale of float8 training is set to its "gradient", which is none.
        normal = [
            v for v in self._trained if not getattr(v, "overwrite_with_gradient", False)
        ]
        paths = [v.path for v in normal]
        earlier = [paths[:k].count(path) for k, path in enumerate(paths)]
        return [
            (f"{path} ({n + 1})" if n else path, v)
            for path, n, v in zip(paths, earlier, normal, strict=True)
        ]

    def _kept(self) -> list[Any]:
        own = {id(v) for v in self.variables}
        return [v for v in self._optimizer.variables if id(v) not in own]

    def _steps(self) -> int:
        accumulated = self._optimizer.gradient_accumulation_steps or 1
        return int(self._optimizer.iterations) * accumulated


def _keras(caller: str) -> Any:
    try:
        keras = importlib.import_module("keras")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{caller}` needs Keras 3 on JAX, but {error.name} is not installed. Set"
            " KERAS_BACKEND=jax before Keras is first imported; `pip install keras` if"
            " there is none.",
            name=error.name,
        ) from error
    backend = keras.config.backend()
    if backend != "jax":
        raise RuntimeError(
            f"`{caller}` works where Keras runs on JAX, but it runs on {backend}. Set"
            " KERAS_BACKEND=jax before Keras is first imported."
        )
    return keras


def _trained_by(optimizer: Any) -> list[Any]:
    try:
        return list(optimizer._trainable_variables)
    except AttributeError:
        raise RuntimeError(
            "`watch(optimizer)`: this Keras does not tell which variables an optimizer"
            " that was built trains. Watch the optimizer before it is built."
        ) from None


__all__ = ["GradNormCallback", "watch"]

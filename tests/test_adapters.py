"""Every adapter records what a training by hand, in NumPy, would have written."""

import importlib
import os
import sys

import jax
import numpy as np
import pytest

from examples.adapters.batches import batches, command
from gradnorm_jax.keras import GradNormCallback, find_record, watch
from gradnorm_jax.telemetry import WatchState

STEPS = 7
#: Of each adapter: what it needs, and how its parts are called, by layer.
PARTS = {
    "optax_loop": ("sklearn", ("hidden/kernel", "hidden/bias")),
    "lax_scan": ("sklearn", ("hidden/kernel", "hidden/bias")),
    "flax_linen": ("flax", ("hidden/kernel", "hidden/bias")),
    "flax_nnx": ("flax", ("hidden/kernel", "hidden/bias")),
    "equinox_module": ("equinox", ("layers/0/weight", "layers/0/bias")),
    "haiku_transform": ("haiku", ("hidden/w", "hidden/b")),
    "keras_model": ("keras", ("net/hidden/kernel", "net/hidden/bias")),
}
every_adapter = pytest.mark.parametrize("name", PARTS)
#: Keras itself gives it, with NumPy 2.
array_warning = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


def keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras")


def adapter(name):
    keras() if name == "keras_model" else pytest.importorskip(PARTS[name][0])
    return importlib.import_module(f"examples.adapters.{name}")


def parts(name):
    """Returns the names of kernel and bias of the hidden layer, then of the head."""
    hidden = PARTS[name][1]
    return [
        *hidden,
        *(x.replace("hidden", "head").replace("layers/0", "layers/1") for x in hidden),
    ]


def start(name, module):
    """Returns the arrays that training starts from, kernels as [inputs, outputs]."""
    if name == "flax_nnx":
        model = module.Network(module.nnx.Rngs(0))
        layers = (model.hidden, model.head)
        found = [x[...] for layer in layers for x in (layer.kernel, layer.bias)]
    elif name == "equinox_module":
        layers = module.network().layers
        found = [x for layer in layers for x in (layer.weight.T, layer.bias)]
    elif name == "keras_model":
        found = [v.value for v in module.network().trainable_variables]
    else:
        keys = [part.split("/") for part in parts(name)]
        found = [module.initial_params()[layer][kind] for layer, kind in keys]
    return [np.asarray(x, np.float64) for x in found]


def two_layers_by_hand(params, steps, max_norm=1.0, rate=0.1):
    """Trains two dense layers; yields the loss, gradients, updates, parameters."""
    for images, labels in zip(*batches(steps), strict=True):
        kernel, bias, head, head_bias = params
        hidden = np.maximum(images @ kernel + bias, 0)
        logits = hidden @ head + head_bias
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(shares[np.arange(len(labels)), labels]).mean()
        error = (shares - np.eye(10)[labels]) / len(labels)
        back = (error @ head.T) * (hidden > 0)
        grads = [images.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]
        size = np.sqrt(sum(np.sum(g**2) for g in grads))
        updates = [-rate * min(1, max_norm / size) * g for g in grads]
        yield loss, grads, updates, params
        params = [x + u for x, u in zip(params, updates, strict=True)]


@every_adapter
def test_recorded_norms_are_those_of_a_training_by_hand(name, tmp_path):
    module = adapter(name)
    history = module.main(steps=STEPS, dir=tmp_path / "run")
    np.testing.assert_array_equal(history.steps, np.arange(STEPS))
    assert set(history.parts) == set(parts(name))
    order = [history.parts.index(part) for part in parts(name)]
    for k, (loss, *trees) in enumerate(two_layers_by_hand(start(name, module), STEPS)):
        for kind, tree in zip(("grad", "update", "param"), trees, strict=True):
            sizes = [np.sqrt(np.sum(x**2)) for x in tree]
            found = history.norms(kind)[k, order]
            np.testing.assert_allclose(found, sizes, rtol=2e-4, err_msg=f"{kind} {k}")
        if name not in ("flax_linen", "keras_model"):  # these are not told the loss
            assert history.scalars["loss"][k] == pytest.approx(loss, rel=1e-4)
    assert (tmp_path / "run" / "run.json").exists()


def test_the_command_prints_every_part_and_where_the_run_is(
    tmp_path, monkeypatch, capsys
):
    run = str(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["it", "--steps", "3", "--dir", run])
    command(adapter("optax_loop").main)
    printed = capsys.readouterr().out
    assert "History(steps 0 to 2, 4 parts" in printed
    assert all(part in printed for part in parts("optax_loop"))
    assert f"gradnorm report {run}" in printed


# Keras, however it is used: a linear model, trained by plain descent.
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("f4")
Y = RNG.normal(size=(24, 1)).astype("f4")


def network():
    keras().utils.set_random_seed(0)
    return keras().Sequential(
        [keras().Input((3,)), keras().layers.Dense(1, name="dense")], name="net"
    )


def fit(optimizer, *, epochs=2, callback=None, **options):
    """Trains in batches of 4: 6 a epoch. Returns the model and the callback."""
    model = network()
    model.compile(optimizer, "mse", **options)
    callback = callback or GradNormCallback(every=4)
    again(model, [callback], epochs)
    return model, callback


def again(model, callbacks, epochs):
    model.fit(
        X,
        Y,
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )


def by_hand(steps, rate=0.1):
    """Plain descent of a linear model; yields the norms of kernel and bias."""
    kernel, bias = (np.asarray(v.value, "f8") for v in network().trainable_variables)
    for k in range(steps):
        x, y = X[4 * k % 24 :][:4], Y[4 * k % 24 :][:4]
        error = 2 * (x @ kernel + bias - y) / len(x)
        grads = x.T @ error, error.sum(0)
        yield [[np.linalg.norm(x) for x in tree] for tree in (grads, (kernel, bias))]
        kernel, bias = kernel - rate * grads[0], bias - rate * grads[1]


def check(history, steps):
    order = [history.parts.index(f"net/dense/{x}") for x in ("kernel", "bias")]
    np.testing.assert_array_equal(history.steps, np.arange(steps))
    for k, (grad, param) in enumerate(by_hand(steps)):
        np.testing.assert_allclose(history.grad[k, order], grad, rtol=1e-4)
        np.testing.assert_allclose(history.param[k, order], param, rtol=1e-4)
        sizes = 0.1 * np.array(grad)
        np.testing.assert_allclose(history.update[k, order], sizes, rtol=2e-3)


def descent(**options):
    return keras().optimizers.SGD(0.1, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, {"steps_per_execution": 3}, {"jit_compile": False}],
    ids=str,
)
def test_rows_are_those_of_a_loop_by_hand_in_every_way_to_run(options):
    optimizer, often = watch(descent()), "steps_per_execution" in options
    callback = GradNormCallback(every=1 if often else 5)
    fit(optimizer, callback=callback, **options)
    check(callback.monitor.history, 12)


def test_a_loss_scale_is_taken_out_of_the_gradients():
    check(fit(watch(descent(loss_scale_factor=64.0)))[1].monitor.history, 12)


@pytest.mark.parametrize("outer", [True, False])
def test_a_loss_scale_optimizer_is_watched_inside(outer):
    scaled = keras().optimizers.LossScaleOptimizer
    optimizer = (
        watch(scaled(descent(), initial_scale=8.0))
        if outer
        else scaled(watch(descent()), initial_scale=8.0)
    )
    check(fit(optimizer)[1].monitor.history, 12)


@array_warning
def test_training_is_the_same_bit_for_bit():
    watched, alone = (fit_of(watch), fit_of(lambda optimizer: optimizer))
    for ours, theirs in zip(watched, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def fit_of(wrap):
    model = network()
    model.compile(wrap(keras().optimizers.Adam(0.01, global_clipnorm=0.5)), "mse")
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    return model.get_weights()


def test_a_second_fit_goes_on_and_the_monitor_lasts(tmp_path):
    optimizer = watch(descent())
    callback = GradNormCallback(every=4, dir=tmp_path / "run")
    model, _ = fit(optimizer, epochs=1, callback=callback)
    again(model, [callback], 1)
    check(callback.monitor.history, 12)


@array_warning
def test_a_saved_model_has_the_moments_and_no_record_and_may_be_watched_again(tmp_path):
    path = tmp_path / "model.keras"
    model, _ = fit(watch(keras().optimizers.Adam(0.01)), epochs=1)
    model.save(path)
    plain = keras().models.load_model(path)
    moments = [v.numpy() for v in plain.optimizer.variables]
    kept = model.optimizer.variables[: len(moments)]
    own = len(WatchState._fields[1:])
    assert len(moments) == len(model.optimizer.variables) - own
    for ours, theirs in zip(moments, kept, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    plain.compile(watch(plain.optimizer), "mse")
    callback = GradNormCallback(every=4)
    again(plain, [callback], 1)
    np.testing.assert_array_equal(callback.monitor.history.steps, np.arange(6, 12))
    again(model, [twin := GradNormCallback(every=4)], 1)
    np.testing.assert_array_equal(
        callback.monitor.history.grad, twin.monitor.history.grad[-6:]
    )


@array_warning
def test_a_watched_optimizer_loads_what_was_saved_and_counts_on():
    model, store = network(), {}
    model.compile(keras().optimizers.Adam(0.01), "mse")
    again(model, None, 1)
    model.optimizer.save_own_variables(store)
    other = watch(keras().optimizers.Adam(0.01))
    other.build(network().trainable_variables)
    other.load_own_variables(store)
    assert int(find_record(other).state().step) == 6
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        other.load_own_variables({"0": 1})


def test_a_fit_that_fails_loses_no_row():
    def stop(batch, logs):
        if batch == 4:
            raise KeyboardInterrupt

    last = keras().callbacks.LambdaCallback(on_train_batch_end=stop)
    model, callback = network(), GradNormCallback(every=3)
    model.compile(watch(descent()), "mse")
    with pytest.raises(KeyboardInterrupt):
        again(model, [callback, last], 1)
    callback.close()
    check(callback.monitor.history, 5)


def test_a_loop_of_ones_own_records_too():
    model, optimizer = network(), watch(descent())
    optimizer.build(model.trainable_variables)

    def loss_fn(trained, x, y):
        out, _ = model.stateless_call(trained, model.non_trainable_variables, x)
        return ((out - y) ** 2).mean()

    @jax.jit
    def step(trained, state, x, y):
        grads = jax.grad(loss_fn)(trained, x, y)
        return optimizer.stateless_apply(state, grads, trained)

    trained = [v.value for v in model.trainable_variables]
    state = [v.value for v in optimizer.variables]
    for k in range(6):
        trained, state = step(trained, state, X[4 * k :][:4], Y[4 * k :][:4])
    for variable, value in zip(optimizer.variables, state, strict=True):
        variable.assign(value)
    ring = find_record(optimizer).state().ring
    expected = [grad[::-1] for grad, _ in by_hand(6)]  # bias before kernel
    np.testing.assert_allclose(ring[:6, :2], expected, rtol=1e-4)


def test_an_optimizer_that_builds_itself_is_recorded_from_its_first_step():
    v = keras().Variable(np.ones(4, "f4"), name="v")
    optimizer = watch("sgd", record=("grad",))
    optimizer.apply([np.full(4, 3.0, "f4")], [v])
    np.testing.assert_allclose(find_record(optimizer).state().ring[0, 0], 6)


def test_variables_of_one_name_are_told_apart_and_one_without_gradient_has_norm_0():
    pair = [keras().Variable(np.ones(4, "f4"), name="v") for _ in range(2)]
    optimizer = watch(descent(), record=("grad",))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([np.full(4, 3.0, "f4"), None], pair)
    record = find_record(optimizer)
    assert list(record.params()) == ["v", "v (2)"]
    np.testing.assert_allclose(record.state().ring[0, :2], [6, 0])


def test_accumulated_gradients_have_a_row_for_each_batch():
    optimizer = watch(descent(gradient_accumulation_steps=3))
    history = fit(optimizer, epochs=1)[1].monitor.history
    np.testing.assert_array_equal(history.steps, np.arange(6))
    assert np.all(history.grad > 0)
    np.testing.assert_array_equal((history.update > 0).all(1), [0, 0, 1, 0, 0, 1])


def test_settings_of_watch_reach_the_monitor():
    optimizer = watch(descent(), every=2, groups={".*": "all"}, record=("grad",))
    history = fit(optimizer)[1].monitor.history
    assert (history.parts, history.kinds) == (("all",), ("grad",))
    np.testing.assert_array_equal(history.steps, np.arange(0, 12, 2))


def test_what_cannot_be_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="is watched already"):
        watch(watch(descent()))
    with pytest.raises(ValueError, match=r"GradNormCallback\(every=.*got 0"):
        GradNormCallback(every=0)
    with pytest.raises(ValueError, match=r"compile\(optimizer=watch"):
        fit(descent())
    with pytest.raises(ValueError, match=r"callbacks=\[callback\]"):
        again(fit(watch(descent()))[0], GradNormCallback(), 1)
    monkeypatch.setattr(keras().config, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match=r"runs on torch.*KERAS_BACKEND=jax"):
        watch(descent())


def test_a_keras_that_differs_is_refused(monkeypatch):
    optimizer = watch(descent())
    monkeypatch.setattr(optimizer, "apply", type(optimizer).apply.__get__(optimizer))
    with pytest.raises(RuntimeError, match=r"none was recorded.*Keras 3\.15"):
        fit(optimizer)
    built = descent()
    built.build([])
    monkeypatch.delattr(built, "_trainable_variables")
    with pytest.raises(RuntimeError, match="before it is built"):
        watch(built)
    monkeypatch.setattr("gradnorm_jax.keras._NEEDED", ("gone",))
    with pytest.raises(RuntimeError, match=r"a SGD of Keras .* has no gone"):
        watch(descent())


def test_without_keras_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Keras 3.*pip install"):
        watch("adam")

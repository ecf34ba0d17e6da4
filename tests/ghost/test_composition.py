"""Norms of each example are right in every place and for every way of asking."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn

from . import plain, sequences, weights
from .agreement import assert_right, measure, measured
from .models import MODELS
from .oracle import Model, by_vmap, in_float64, widened
from .plain import B, drawn, squared_error

#: One of each way in which a weight is used.
SOME = ("mlp", "convolutions", "embeddings", "layers_by_scan", "rnn", "tied_many_times")
each_of_some = pytest.mark.parametrize("name", SOME)
mlp, rnn = plain.mlp(), sequences.rnn()


def whole(model, **how):
    return gn.per_example_norms(model.loss_fn, **how)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, B, 7])
@pytest.mark.parametrize("name", ["embeddings", "rnn"])
def test_microbatches_change_nothing(name, microbatch_size):
    model = MODELS[name]()
    assert_right(model, measured(model, microbatch_size=microbatch_size))


@each_of_some
@pytest.mark.parametrize("implementation", ["ghost", "vmap"])
def test_both_implementations_are_right(name, implementation):
    model = MODELS[name]()
    assert_right(model, measured(model, implementation=implementation))


@each_of_some
def test_in_float64_thirteen_digits_are_right(name):
    model = MODELS[name]()
    with jax.enable_x64(True):
        wide = model._replace(
            params=jax.tree.map(widened, model.params),
            batch=jax.tree.map(widened, model.batch),
        )
        got = measured(wide)
    chex.assert_type([got.leaves, got.whole], np.float64)
    assert_right(model, got, 1e-13)


def test_one_example_is_a_batch():
    model = rnn._replace(batch=jax.tree.map(lambda x: x[:1], rnn.batch))
    got, want = measured(model), in_float64(rnn)
    np.testing.assert_allclose(got.whole, want.whole[:1], rtol=5e-6)


def test_nothing_needs_to_be_compiled_by_the_user():
    got = whole(mlp)(mlp.params, mlp.batch)
    np.testing.assert_allclose(got, in_float64(mlp).whole, rtol=5e-6)


def test_norms_are_float32_at_least_in_the_order_of_the_examples():
    for name in ("all_in_bfloat16", "all_in_float16", "mlp"):
        model = MODELS[name]()
        values, norms = jax.eval_shape(
            gn.value_and_per_example_norms(model.loss_fn), model.params, model.batch
        )
        chex.assert_shape([values, norms], (B,))
        assert norms.dtype == np.float32
        one = jax.tree.map(lambda x: x[0], model.batch)
        assert values.dtype == jax.eval_shape(model.loss_fn, model.params, one).dtype


def test_a_scan_over_batches_trains_on_one_and_measures_all():
    rate = 0.01

    def step(params, batch):
        norms = whole(rnn)(params, batch)
        each = jax.vmap(jax.grad(rnn.loss_fn), (None, 0))(params, batch)
        return jax.tree.map(lambda p, g: p - rate * jnp.mean(g, 0), params, each), norms

    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1], 0.5 * x]), rnn.batch)
    _, got = jax.jit(functools.partial(jax.lax.scan, step))(rnn.params, batches)
    params = rnn.params
    for i in range(3):
        model = rnn._replace(
            # One function has one truth, and these parameters have moved.
            loss_fn=functools.partial(rnn.loss_fn),
            params=jax.tree.map(np.asarray, params),
            batch=jax.tree.map(lambda x, i=i: np.asarray(x[i]), batches),
        )
        np.testing.assert_allclose(got[i], in_float64(model).whole, rtol=1e-5)
        params, _ = step(params, model.batch)


@pytest.mark.parametrize("name", ["embeddings", "layers_by_scan", "mlp"])
def test_vmap_over_models_is_a_loop_over_models(name):
    model = MODELS[name]()
    stacked = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p, -p]), model.params)
    got = jax.jit(jax.vmap(whole(model), (0, None)))(stacked, model.batch)
    for i in range(3):
        params = jax.tree.map(lambda p, i=i: np.asarray(p[i]), stacked)
        want = by_vmap(model._replace(params=params)).whole
        np.testing.assert_allclose(got[i], want, rtol=1e-5)


def test_vmap_over_batches_is_a_loop_over_batches():
    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), rnn.batch)
    got = jax.jit(jax.vmap(whole(rnn), (None, 0)))(rnn.params, batches)
    want = in_float64(rnn).whole
    np.testing.assert_allclose(got, [want, want[::-1]], rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["mlp", "layers_by_scan", "few_positions_of_wide_layers"]
)
def test_the_mean_of_norms_has_a_gradient(name):
    model = MODELS[name]()

    def mean(measure, params, batch):
        return jnp.mean(measure(params, batch))

    def plainly(params, batch):
        grads = jax.vmap(jax.grad(model.loss_fn), (None, 0))(params, batch)
        square = [
            jnp.sum(jnp.square(g), range(1, g.ndim)) for g in jax.tree.leaves(grads)
        ]
        return jnp.sqrt(sum(square))

    compute = jax.jit(jax.grad(functools.partial(mean, whole(model))))
    got = compute(model.params, model.batch)
    with jax.enable_x64(True):
        wide = jax.tree.map(widened, (model.params, model.batch))
        want = jax.jit(jax.grad(functools.partial(mean, plainly)))(*wide)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.max(np.abs(y)))


def test_parameters_may_be_several_arguments():
    draw = drawn(80)
    encoder, decoder = {"w": draw(4, 6)}, [draw(6, 3), draw(3)]

    def loss_fn(encoder, x, scale, decoder, y):
        h = jnp.tanh(x @ encoder["w"]) @ decoder[0] + decoder[1]
        return scale * squared_error(h, y)

    x, y, scale = draw(B, 5, 4), draw(B, 5, 3), np.float32(2)
    args = (encoder, x, scale, decoder, y)
    joined = Model(
        lambda params, example: loss_fn(
            params[0], example[0], 2.0, params[1], example[1]
        ),
        (encoder, decoder),
        (x, y),
    )
    truth = in_float64(joined)
    how = {"batch_argnums": (1, 4), "granularity": gn.per_leaf()}
    for argnums, columns in (((0, 3), [0, 1, 2]), (3, [1, 2]), ((3, 0), [1, 2, 0])):
        compute = jax.jit(gn.per_example_norms(loss_fn, argnums=argnums, **how))
        np.testing.assert_allclose(compute(*args), truth.leaves[:, columns], rtol=5e-6)


def test_keyword_arguments_reach_the_loss():
    def loss_fn(params, example, *, scale, power):
        return scale * mlp.loss_fn(params, example) ** power

    got = gn.per_example_norms(loss_fn)(mlp.params, mlp.batch, scale=3.0, power=1)
    np.testing.assert_allclose(got, 3 * in_float64(mlp).whole, rtol=5e-6)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_what_the_loss_returns_beside_its_value_comes_for_each_example(microbatch_size):
    def loss_fn(params, example):
        value = rnn.loss_fn(params, example)
        x, _ = example
        return value, {"half": value / 2, "last": x[-1] @ params["in"], "two": 2}

    how = {"has_aux": True, "microbatch_size": microbatch_size}
    compute = jax.jit(gn.value_and_per_example_norms(loss_fn, **how))
    (values, aux), norms = compute(rnn.params, rnn.batch)
    truth = in_float64(rnn)
    np.testing.assert_allclose(norms, truth.whole, rtol=5e-6)
    np.testing.assert_allclose(values, truth.values, rtol=5e-6)
    np.testing.assert_allclose(aux["half"], values / 2, rtol=1e-6)
    last = np.asarray(rnn.batch[0][:, -1] @ rnn.params["in"])
    np.testing.assert_allclose(aux["last"], last, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(aux["two"], np.full(B, 2))
    norms, aux = gn.per_example_norms(loss_fn, **how)(rnn.params, rnn.batch)
    np.testing.assert_allclose(norms, truth.whole, rtol=5e-6)
    chex.assert_shape(aux["last"], last.shape)


@pytest.mark.parametrize("reduce", [jnp.mean, jnp.sum])
def test_a_loss_of_a_batch_is_given_batches_of_one(reduce):
    def loss_fn(params, batch):
        x, y = batch
        assert x.shape[0] == 1
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        off = x @ params[-1]["w"] + params[-1]["b"] - y
        return reduce(0.5 * jnp.sum(jnp.square(off), 1)), {"off": off}

    compute = gn.value_and_per_example_norms(loss_fn, batched=True, has_aux=True)
    (values, aux), norms = jax.jit(compute)(mlp.params, mlp.batch)
    np.testing.assert_allclose(values, in_float64(mlp).values, rtol=5e-6)
    np.testing.assert_allclose(norms, in_float64(mlp).whole, rtol=5e-6)
    chex.assert_shape(aux["off"], (B, 1, 3))


def test_one_key_is_split_into_one_for_each_example():
    def loss_fn(params, example, key):
        kept = jax.random.bits(key, (9,), np.uint32) < np.uint32(2**31)
        x, y = example
        h = jnp.tanh(x @ params[0]["w"] + params[0]["b"]) * kept
        h = jnp.tanh(h @ params[1]["w"] + params[1]["b"])
        return squared_error(h @ params[2]["w"] + params[2]["b"], y), kept

    key = jax.random.key(3)
    compute = gn.per_example_norms(loss_fn, key_argnum=2, has_aux=True)
    norms, kept = jax.jit(compute)(mlp.params, mlp.batch, key)
    assert len(np.unique(kept, axis=0)) == B
    model = mlp._replace(
        loss_fn=lambda params, example: loss_fn(params, example[0], example[1])[0],
        batch=(mlp.batch, jax.random.split(key, B)),
    )
    np.testing.assert_allclose(norms, in_float64(model).whole, rtol=5e-6)


def test_groups_have_norms_together_and_what_has_no_group_has_none():
    groups = {"[01]/w": "kernels", "[012]/b": "biases"}
    granularity = gn.per_group(groups)
    got = jax.jit(whole(mlp, granularity=granularity))(mlp.params, mlp.batch)
    leaves = in_float64(mlp).leaves
    columns = {"kernels": [1, 3], "biases": [0, 2, 4]}
    labels = granularity.names(mlp.params)
    want = [np.linalg.norm(leaves[:, columns[label]], axis=1) for label in labels]
    np.testing.assert_allclose(got, np.stack(want, 1), rtol=5e-6)


@pytest.mark.parametrize("name", ["layers_by_scan", "a_loop_over_stacked_weights"])
def test_each_stacked_layer_has_a_norm(name):
    model = MODELS[name]()
    stacks = {"[bw]": 0}
    granularity = gn.per_leaf(stacked_axes=stacks)
    got = jax.jit(whole(model, granularity=granularity))(model.params, model.batch)

    layers = {k: p for k, p in model.params.items() if k in "bw"}
    apart = {k: [p[i] for i in range(4)] for k, p in layers.items()} | {
        k: p for k, p in model.params.items() if k not in "bw"
    }

    def loss_fn(apart, example):
        joined = {k: jnp.stack(p) if k in "bw" else p for k, p in apart.items()}
        return model.loss_fn(joined, example)

    want = in_float64(model._replace(loss_fn=loss_fn, params=apart, exact=None))
    np.testing.assert_allclose(got, want.leaves, rtol=5e-6)


def test_units_have_norms():
    got = jax.jit(whole(mlp, granularity=gn.per_unit()))(mlp.params, mlp.batch)
    with jax.enable_x64(True):
        wide = jax.tree.map(widened, (mlp.params, mlp.batch))
        grads = jax.vmap(jax.grad(mlp.loss_fn), (None, 0))(*wide)
        each = [
            gn.per_unit().measure(jax.tree.map(lambda g, i=i: g[i], grads))
            for i in range(B)
        ]
    np.testing.assert_allclose(got, np.stack(each), rtol=1e-5, atol=1e-6)


def test_what_a_loss_closes_over_may_be_traced():
    def shifted(shift, params, batch):
        def loss_fn(params, example):
            return squared_error(jnp.tanh(example @ params["w"]), shift)

        return gn.per_example_norms(loss_fn)(params, batch)

    params, batch = weights.the_same_gradient_twice().params, drawn(81)(B, 2, 5)
    params = {"w": params["a"]}
    got = jax.jit(jax.vmap(shifted, (0, None, None)))(jnp.arange(3.0), params, batch)
    for shift in range(3):
        want = shifted(jnp.float32(shift), params, batch)
        np.testing.assert_allclose(got[shift], want, rtol=1e-5)


def test_a_loss_may_print(capfd):
    def loss_fn(params, example):
        value = mlp.loss_fn(params, example)
        jax.debug.print("a loss of {}", value)
        return value

    got = jax.jit(gn.per_example_norms(loss_fn))(mlp.params, mlp.batch)
    np.testing.assert_allclose(got, in_float64(mlp).whole, rtol=5e-6)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("a loss of") == B


def test_nothing_is_promoted_silently():
    draw = drawn(82)
    params = {"conv": draw(3, 4, 5), "layers": draw(2, 5, 5), "table": draw(6, 4)}

    def loss_fn(params, example):
        x = params["table"][example["ids"]][None]
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1,),
            padding="SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        half = params["conv"].astype(jnp.bfloat16)
        h = conv(x.astype(jnp.bfloat16), half).astype(x.dtype)[0]
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])
        return example["scale"] * jnp.sum(jnp.square(h))

    ids = np.arange(B * 7, dtype=np.int32).reshape(B, 7) % 6
    batch = {"ids": ids, "scale": draw(B)}
    model = Model(loss_fn, params, batch, rounds=True)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        got = measured(model)
    assert_right(model, got)


def test_the_loss_is_traced_anew_only_for_new_shapes():
    traces = []

    def loss_fn(params, example):
        traces.append(1)
        return mlp.loss_fn(params, example)

    run = measure(loss_fn)
    run(mlp.params, mlp.batch)
    before = len(traces)
    run(jax.tree.map(lambda p: 2 * p, mlp.params), mlp.batch)
    assert len(traces) == before

"""Examples that are split over devices stay there: only sums are reduced."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn

from .hlo import collectives
from .meshes import mapped, mesh_of, replicate

B = 16
BAD, PADDING = (5, 12), (3, 15)  # examples that are not finite, and that are not there
HERE = ~np.isin(np.arange(B), PADDING)
LIMIT = 1.0

#: How an array is placed, and who splits the program.
WAYS = ("Explicit", "shard_map", "Auto", "Auto, set", "shard_map, unchecked")


def first_of(*ways):
    """All ways, of which the gate runs the first."""
    return pytest.mark.parametrize("way", [*ways, *(x for x in WAYS if x not in ways)])


def language(params, example):
    """An embedding, layers by scan, and a dense layer."""
    layer = lambda x, w: (x + jnp.tanh(x @ w), None)  # noqa: E731
    x, _ = jax.lax.scan(layer, params["table"][example["ids"]], params["layers"])
    logits = jax.nn.log_softmax(x @ params["head"] + params["b"])
    return -example["size"] * jnp.mean(logits[:, 1])


def pictures(params, example):
    """A convolution, whose products are formed one example after the other."""
    numbers = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        example["x"][None], params["kernel"], (1, 1), "SAME", dimension_numbers=numbers
    )
    h = jnp.sum(jnp.tanh(h[0]), (0, 1))
    return 0.01 * example["size"] * jnp.mean(jnp.square(h @ params["head"]))


SHAPES = {
    language: {"b": (6,), "head": (4, 6), "layers": (3, 4, 4), "table": (9, 4)},
    pictures: {"head": (8, 2), "kernel": (3, 3, 4, 8)},
}


@functools.cache
def drawn(loss_fn):
    random = np.random.default_rng(0)
    normal = lambda *shape: np.float32(random.normal(size=shape))  # noqa: E731
    params = {k: 0.3 * normal(*shape) for k, shape in SHAPES[loss_fn].items()}
    batch = {"size": np.exp(normal(B))}
    if loss_fn is language:
        batch["ids"] = random.integers(0, 9, (B, 5)).astype(np.int32)
    else:
        batch["x"] = normal(B, 6, 6, 4)
    batch["size"][list(BAD)] = np.nan, np.inf
    return params, batch


def mesh_for(way):
    return mesh_of("Explicit" if way == "Explicit" else "Auto", (8,), ("data",))


def around(way):
    """Where a program is compiled and run: an Explicit mesh must be set."""
    is_set = way in ("Explicit", "Auto, set")
    return jax.set_mesh(mesh_for(way)) if is_set else contextlib.nullcontext()


def run_on(way, fun, out_specs, params, *examples):
    """Returns the result of a compiled function of split examples, and its program."""
    mesh = mesh_for(way)
    split = jax.NamedSharding(mesh, P("data"))
    args = (replicate(mesh, params), *(jax.device_put(x, split) for x in examples))
    run = jax.jit(fun)
    if way.startswith("shard_map"):
        in_specs = (P(), *[P("data")] * len(examples))
        run = mapped(fun, mesh, in_specs, out_specs, check_vma="un" not in way)
    with around(way):
        program = run.lower(*args).compile()
        return program(*args), program.as_text()


def summed_on(way, loss_fn, *, psum=True, **how):
    """Returns the clipped sum over all devices, and its program."""
    fun = gn.clipped_grad(loss_fn, LIMIT, **how)
    psum = psum and way.startswith("shard_map")

    def run(params, batch, mask):
        found = fun(params, batch, example_mask=mask)
        total = (found.grads, found.num_clipped, found.num_dropped)
        total = jax.lax.psum(total, "data") if psum else total
        if way.startswith("shard_map") and not psum:
            total = jax.tree.map(lambda x: x[None], total)
        return total, (found.norms, found.scales, found.values)

    specs = (P() if psum else P("data"), P("data"))
    return run_on(way, run, specs, *drawn(loss_fn), HERE)


@functools.cache
def plain(loss_fn):
    """Norms and clipped sums on one device."""
    norms = jax.jit(gn.per_example_norms(loss_fn))(*drawn(loss_fn))
    found = jax.jit(gn.clipped_grad(loss_fn, LIMIT))(*drawn(loss_fn), example_mask=HERE)
    assert 0 < found.num_clipped < np.sum(HERE) - len(BAD)
    assert found.num_dropped == len(BAD)
    return jax.device_get((norms, found))


def assert_split(x, way):
    """The examples are where they were."""
    assert x.sharding.is_equivalent_to(
        jax.NamedSharding(mesh_for(way), P("data")), x.ndim
    ), x.sharding
    assert x.sharding.spec == P("data")


def check_sum(loss_fn, way, **how):
    (total, of_examples), text = summed_on(way, loss_fn, **how)
    _, found = plain(loss_fn)
    for x, want in zip(total[0].values(), found.grads.values(), strict=True):
        np.testing.assert_allclose(x, want, rtol=2e-6, atol=2e-6 * np.max(abs(want)))
    assert total[1:] == (found.num_clipped, found.num_dropped)
    for x, want in zip(
        of_examples, (found.norms, found.scales, found.values), strict=True
    ):
        np.testing.assert_allclose(x, want, rtol=2e-6)
        assert_split(x, way)
    return text


@pytest.mark.parametrize("loss_fn", [language, pictures])
@first_of("Explicit")
def test_norms_are_those_of_one_device_and_lie_where_the_examples_do(way, loss_fn):
    measure = gn.per_example_norms(loss_fn)
    norms, _ = run_on(way, measure, P("data"), *drawn(loss_fn))
    np.testing.assert_allclose(norms, plain(loss_fn)[0], rtol=2e-6)
    assert_split(norms, way)


@first_of("Auto, set")
def test_norms_in_microbatches_stay_where_they_are(way):
    size = 1 if way.startswith("shard_map") else 8
    measure = gn.per_example_norms(language, microbatch_size=size)
    norms, text = run_on(way, measure, P("data"), *drawn(language))
    np.testing.assert_allclose(norms, plain(language)[0], rtol=2e-6)
    assert_split(norms, way)
    assert collectives(text) == {}


@pytest.mark.parametrize("how", [{}, {"granularity": gn.per_leaf()}])
@first_of("Auto")
def test_norms_need_no_collective(way, how):
    measure = gn.value_and_per_example_norms(language, **how)
    (_, norms), text = run_on(way, measure, P("data"), *drawn(language))
    assert norms.ndim == 1 + bool(how)
    assert collectives(text) == {}


@first_of("shard_map")
def test_norms_of_convolutions_need_no_collective(way):
    measure = gn.per_example_norms(pictures)
    _, text = run_on(way, measure, P("data"), *drawn(pictures))
    assert collectives(text) == {}


@pytest.mark.parametrize("implementation", ["one_pass", "two_pass", "vmap"])
@first_of("Explicit")
def test_a_clipped_sum_is_that_of_one_device(way, implementation):
    text = check_sum(language, way, implementation=implementation)
    if implementation != "two_pass":  # that one fetches examples in place of others
        assert set(collectives(text)) == {"all-reduce"}


@first_of("Auto")
def test_a_sum_of_products_in_turn_is_that_of_one_device(way):
    rules = {row.name: row.rule for row in gn.explain_norms(pictures)(*drawn(pictures))}
    assert rules["kernel"] == "product in turn"
    text = check_sum(pictures, way)
    assert set(collectives(text)) == {"all-reduce"}


@first_of("Auto")
def test_a_sum_in_microbatches_is_that_of_one_device(way):
    size = 1 if way.startswith("shard_map") else 8
    check_sum(language, way, microbatch_size=size)


@pytest.mark.parametrize("loss_fn", [language, pictures])
@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("shard_map")])
def test_in_shard_map_each_device_has_the_sum_of_its_own(way, loss_fn):
    (total, _), text = summed_on(way, loss_fn, psum=False)
    assert collectives(text) == {}
    params, batch = drawn(loss_fn)
    run = jax.jit(gn.clipped_grad(loss_fn, LIMIT))
    for k in (0, 1, 2):
        own = jax.tree.map(lambda x, k=k: x[2 * k : 2 * k + 2], (batch, HERE))
        found = run(params, own[0], example_mask=own[1])
        for x, want in zip(total[0].values(), found.grads.values(), strict=True):
            largest = np.max(np.abs(want))
            np.testing.assert_allclose(x[k], want, rtol=2e-6, atol=2e-6 * largest)
        assert (total[1][k], total[2][k]) == (found.num_clipped, found.num_dropped)

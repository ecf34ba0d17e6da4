"""Reductions and scaling of leaves: each body against NumPy in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn
from gradnorm_jax import kernels
from gradnorm_jax.kernels import pallas, reductions
from gradnorm_jax.norms.fold import accumulator, linf, zeros

SHAPES = {
    "a number": (),
    "one": (1,),
    "few": (5, 3),
    "a row short": (2**16 - 1,),
    "whole rows": (2**16,),
    "an entry more": (2**16 + 1,),
    "a row short of more": (17, 2**12 - 1),
    "rows of another length": (301, 777),
}
REDUCTIONS = {
    "sum of squares": (kernels.squares, lambda x: np.sum(np.abs(x) ** 2)),
    "largest": (linf.reductions[0], lambda x: np.max(np.abs(x), initial=0)),
    "zeros": (zeros.reductions[0], lambda x: np.sum(x == 0)),
}


def in_cells(reductions, leaves, dtype):
    kept = [()] * len(leaves)
    return jax.jit(
        lambda leaves: kernels.reduce_cells(reductions, leaves, kept, dtype)
    )(leaves)


def in_pallas(reductions, leaves, dtype):
    run = functools.partial(pallas.reduce_leaves, interpret=True)
    return jax.jit(lambda leaves: run(reductions, leaves, dtype))(leaves)


def each_alone(reductions, leaves, dtype):
    return [in_cells([one], leaves, dtype)[0] for one in reductions]


BODIES = {"together": in_cells, "alone": each_alone, "pallas": in_pallas}


def leaves_of(dtype, *, seed=0):
    rng = np.random.default_rng(seed)
    leaves = []
    for shape in SHAPES.values():
        x = 0.01 * rng.standard_normal(shape, np.float32)
        x = np.where(rng.random(shape) < 0.1, 0, x)
        leaves.append(jnp.asarray(x, dtype))
    return leaves


def wide(x):
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def assert_reduced(body, leaves, names=tuple(REDUCTIONS)):
    chosen = [REDUCTIONS[name][0] for name in names]
    dtype = accumulator(leaves)
    found = BODIES[body](chosen, leaves, dtype)
    for got, name in zip(found, names, strict=True):
        chex.assert_shape(got, (len(leaves),))
        chex.assert_type(got, dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            want = np.array([REDUCTIONS[name][1](wide(x)) for x in leaves])
        np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_reductions_are_those_of_numpy(body, dtype):
    assert_reduced(body, leaves_of(dtype))


@pytest.fixture
def short_rounds(monkeypatch):
    """Lets small leaves be read by many rows and rounds, as large ones are."""
    jax.clear_caches()
    for name, number in {"_SMALL": 2**9, "_LARGE": 2**10, "_ROUND": 2**11}.items():
        monkeypatch.setattr(reductions, name, number)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("body", ["together", "alone"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_entry_counts_once_however_many_rounds_there_are(body, dtype):
    sizes = [k * 2**9 + more for k in (1, 2, 4, 5, 8, 15, 40) for more in (-1, 0, 1)]
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.integers(0, 4, size), dtype) for size in sizes]
    assert_reduced(body, leaves)
    ends = [x.at[-1].set(7).at[0].set(5) for x in leaves]
    assert_reduced(body, ends)


@pytest.mark.usefixtures("short_rounds")
def test_rows_and_rounds_do_not_change_a_complex_norm():
    rng = np.random.default_rng(0)
    sizes = [2**9 - 1, 2**9, 2**11 + 5, 9 * 2**11 + 77]
    parts = [[jnp.asarray(rng.normal(size=n), "float32") for n in sizes] for _ in "ab"]
    assert_reduced("together", [*map(jax.lax.complex, *parts)])


@pytest.mark.parametrize("body", ["together", "alone"])
def test_complex_entries_count_by_their_magnitude(body):
    both = zip(leaves_of(jnp.float32), leaves_of(jnp.float32, seed=1), strict=True)
    assert_reduced(body, [jax.lax.complex(real, imag) for real, imag in both])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("place", [0, 2**15, -1])
def test_what_is_not_finite_is_seen_wherever_it_stands(body, bad, place):
    leaves = [x.reshape(-1).at[place % x.size].set(bad) for x in leaves_of(jnp.float32)]
    finite = {name for name in REDUCTIONS if name != "largest"}
    assert_reduced(body, leaves, sorted(finite) if np.isnan(bad) else tuple(REDUCTIONS))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_the_largest_entry_is_nan_where_one_is(bad):
    leaves = [x.reshape(-1).at[-1].set(bad) for x in leaves_of(jnp.float32)]
    for measure in (gn.leaf_norms, jax.jit(gn.leaf_norms, static_argnames="ord")):
        np.testing.assert_array_equal(measure(leaves, ord=np.inf), [bad] * len(leaves))


@pytest.mark.parametrize("body", BODIES)
def test_no_leaves_give_no_numbers(body):
    found = BODIES[body]([kernels.squares, zeros.reductions[0]], [], jnp.float32)
    chex.assert_shape(found, (0,))


@pytest.mark.parametrize("body", BODIES)
def test_more_leaves_than_one_launch_has_stay_in_order(body):
    leaves = [jnp.full(3, k, jnp.bfloat16 if k % 3 else jnp.float32) for k in range(80)]
    [found] = BODIES[body]([linf.reductions[0]], leaves, jnp.float32)
    np.testing.assert_array_equal(found, np.arange(80))


@pytest.mark.parametrize("jit", [lambda fun: fun, jax.jit])
def test_norms_are_measured_by_the_body_that_is_chosen(jit):
    leaves = [*leaves_of(jnp.float32), jnp.full((2, 2), 3 + 4j), jnp.zeros(0)]
    truth = gn.leaf_norms(leaves)
    with kernels.implementation("pallas"):
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: gn.leaf_norms(x))(leaves))
        measured = jit(lambda leaves: gn.leaf_norms(leaves))(leaves)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: gn.leaf_norms(x))(leaves))
    chex.assert_trees_all_close(measured, truth, rtol=2e-6)


def test_where_no_leaf_is_for_the_pallas_body_there_is_no_launch():
    with kernels.implementation("pallas"):
        norms = gn.leaf_norms([jnp.zeros(0), jnp.full(4, 3 + 4j)])
    np.testing.assert_array_equal(norms, [0, 10])


def test_the_pallas_body_survives_what_squares_do_not():
    with kernels.implementation("pallas"):
        norm = gn.global_norm([jnp.full(3, 1e30), jnp.full(3, 1e30)])
    np.testing.assert_allclose(norm, 6**0.5 * 1e30, rtol=2e-6)


def scaled_by_its_sum(x):
    return x * kernels.apart(jnp.sum, x)


@pytest.mark.parametrize(
    "first", [0.0, -0.0, 1.0, -7.5, 3e38, -np.inf, np.nan, 1e-45, 2 + 3j, True]
)
def test_what_is_kept_apart_is_what_it_would_be(first):
    x = jnp.array([first, first, first])
    found = jax.jit(scaled_by_its_sum)(x)
    np.testing.assert_array_equal(found, x * jnp.sum(x))
    batch = jnp.stack([x, x + x, x])
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(scaled_by_its_sum))(batch), batch * batch.sum(1, keepdims=True)
    )


def test_nothing_is_kept_apart_without_an_entry():
    chex.assert_shape(jax.jit(scaled_by_its_sum)(jnp.zeros((0, 3))), (0, 3))
    none = jax.jit(jax.vmap(scaled_by_its_sum))(jnp.zeros((0, 3)))
    chex.assert_shape(none, (0, 3))


CLIP = gn.clip_by_global_norm(1.0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="done on a CPU only")
@pytest.mark.parametrize("tx", [CLIP, gn.watch(CLIP, record=("grad",))])
def test_a_clip_is_kept_apart_also_where_its_state_is_known_or_it_is_watched(tx):
    grads = jnp.ones(1000, jnp.bfloat16)

    def alone(grads):
        return tx.update(grads, tx.init(grads))[0]

    def with_its_state(grads, state):
        return tx.update(grads, state)

    program = jax.jit(alone).lower(grads).compile().as_text()
    given = jax.jit(with_its_state).lower(grads, tx.init(grads)).compile().as_text()
    # Of the norm, in it of what is read again, and of the factors.
    assert program.count(" conditional(") == given.count(" conditional(") >= 3


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="needs a GPU there to lower for one"
)
def test_the_pallas_body_lowers_for_a_gpu():
    run = functools.partial(
        pallas.reduce_leaves, [kernels.squares, zeros.reductions[0]]
    )
    traced = jax.jit(lambda leaves: run(leaves, jnp.float32)).trace(
        leaves_of(jnp.bfloat16)
    )
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_body_that_does_not_exist_is_refused():
    with (
        pytest.raises(
            ValueError, match=r"must be one of \('xla', 'pallas'\), got 'cuda'"
        ),
        kernels.implementation("cuda"),
    ):
        pass

"""Real training: nothing is found where it goes well, and what is wrong where not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn
from gradnorm_jax.monitoring.diagnosis import diagnose

from . import training
from .runs import codes

STEPS = 300
SPOILT = 150


def clipped_adam(limit, learning_rate):
    return optax.chain(gn.clip_by_global_norm(limit), optax.adam(learning_rate))


def clipped_adamw(limit):
    return optax.chain(gn.clip_by_global_norm(limit), optax.adamw(2e-3))


HEALTHY = {
    "adamw": (clipped_adamw, (2.0,)),
    "adam": (optax.adam, (1e-3,)),
    "sgd with momentum": (lambda rate: optax.sgd(rate, momentum=0.9), (0.05,)),
    "lion": (optax.lion, (2e-4,)),
}


@pytest.mark.parametrize("optimizer", HEALTHY)
@pytest.mark.parametrize("net", ["mlp", "convnet", "gru"])
def test_nothing_is_found_in_four_healthy_runs(net, optimizer):
    make_tx, options = HEALTHY[optimizer]
    runs = training.train(
        getattr(training, net)(),
        make_tx,
        training.digit_batches(STEPS),
        cases=[options] * 4,
    )
    for run in runs:
        losses = run.scalars["loss"]
        assert losses[-20:].mean() < 0.95 * losses[:20].mean()  # it does learn
        assert list(map(str, diagnose(run))) == []


def perceptron(spoil=lambda images: None, cases=((2.0, 1e-3),)):
    """Runs of clip and Adam on digits; `spoil` changes the images in place."""
    images, labels = training.digit_batches(STEPS)
    spoil(images)
    cases = [*cases, *[(2.0, 1e-3)] * (4 - len(cases))]  # one compilation for all
    return training.train(training.mlp(), clipped_adam, (images, labels), cases)


@pytest.fixture(scope="module")
def odd_options():
    """A clip that is always on, one that never is, and two learning rates."""
    cases = [(1e-3, 1e-3), (1e6, 1e-3), (2.0, 1e-9), (2.0, 0.3)]
    return [diagnose(run) for run in perceptron(cases=cases)]


def test_a_clip_that_is_always_on(odd_options):
    [finding] = odd_options[0]
    assert finding.code == "clip-always"
    assert finding.seen.startswith("100 % of steps were clipped")


def test_a_clip_that_is_never_on(odd_options):
    assert codes(odd_options[1]) == ["clip-never"]


def test_a_tiny_learning_rate(odd_options):
    [finding] = odd_options[2]
    assert finding.code == "ratio-low"
    assert len(finding.where) == 3


def test_a_learning_rate_of_adam_that_inflates_the_weights(odd_options):
    found = codes(odd_options[3])
    assert "param-growth" in found
    assert {finding.level for finding in odd_options[3]} <= {"warning", "info"}


def test_a_batch_with_a_nan():
    def spoil(images):
        images[SPOILT, 3, 5] = np.nan

    [finding] = diagnose(perceptron(spoil)[0])
    assert (finding.code, finding.level) == ("non-finite", "error")
    assert (finding.step, finding.place) == (SPOILT, "all 6 parts")
    assert "batch" in finding.likely[0]


def test_a_bad_batch():
    def spoil(images):
        images[SPOILT] *= 1000

    for run in perceptron(spoil):
        [finding] = diagnose(run)
        assert (finding.code, finding.step) == ("spike", SPOILT)
        assert finding.value > 100


def test_dead_relus():
    net = training.mlp(jax.nn.relu)

    def init(random):
        params = net.init(random)
        params["layer_1"]["bias"] -= 100.0
        return params

    [run] = training.train(
        training.Net(init, net.loss),
        optax.adam,
        training.digit_batches(STEPS),
        [(1e-3,)],
    )
    [finding] = diagnose(run)
    assert (finding.code, finding.step, finding.count) == ("dead", 0, STEPS)
    assert finding.place == "layer_0/bias (+4 of 6 parts)"  # all but the last bias
    assert "with everything before layer_2/bias" in finding.seen


def test_a_divergence_that_stays_finite_since_all_units_die():
    net = training.mlp(jax.nn.relu, (64, 48, 48, 48, 10))
    batches = training.digit_batches(STEPS)
    healthy, diverged = training.train(net, optax.sgd, batches, [(0.05,), (50.0,)])
    assert diagnose(healthy) == []
    assert set(codes(diagnose(diverged))) == {"dead", "param-growth"}
    assert {finding.level for finding in diagnose(diverged)} == {"warning"}


def test_a_divergence():
    net = training.mlp()

    def loss(params, batch):
        logits = training.apply_dense(params, batch[0], jax.nn.gelu)
        return jnp.mean(jnp.square(logits - jax.nn.one_hot(batch[1], 10)))

    [run] = training.train(
        training.Net(net.init, loss), optax.sgd, training.digit_batches(STEPS), [(5.0,)]
    )
    errors = [finding for finding in diagnose(run) if finding.level == "error"]
    assert codes(errors) == ["non-finite"]
    assert errors[0].likely == ("the learning rate is too high",)
    assert " -> " in errors[0].seen
    assert set(codes(diagnose(run))) <= {"non-finite", "param-growth", "ratio-high"}


def test_deep_sigmoids_vanish():
    net = training.mlp(jax.nn.sigmoid, (64, *[24] * 7, 10), gain=0.5)
    [run] = training.train(net, optax.sgd, training.digit_batches(STEPS), [(0.1,)])
    [finding] = diagnose(run)
    assert (finding.code, finding.where) == ("vanishing", ("layer_0/kernel",))
    assert finding.value > 4


def test_an_unused_parameter():
    net = training.mlp()
    with_spare = training.Net(
        lambda random: {
            "net": net.init(random),
            "spare": training.matrix(random, 8, 8),
        },
        lambda params, batch: net.loss(params["net"], batch),
    )
    [run] = training.train(
        with_spare, optax.adamw, training.digit_batches(STEPS), [(1e-3,)]
    )
    [finding] = diagnose(run)
    assert (finding.code, finding.where) == ("dead", ("spare",))
    assert finding.count == STEPS
    assert "it is still moved" in finding.seen  # by weight decay
    assert diagnose(run, ignore="spare") == []


def test_an_imbalance():
    net = training.mlp()

    def loss(params, batch):
        return net.loss(params, batch) + 10 * jnp.sum(params["layer_1"]["kernel"] ** 2)

    [run] = training.train(
        training.Net(net.init, loss),
        optax.adam,
        training.digit_batches(STEPS),
        [(1e-3,)],
    )
    [finding] = diagnose(run)
    assert (finding.code, finding.where) == ("imbalance", ("layer_1/kernel",))


def test_a_language_model_with_injected_spikes():
    tokens, weights = training.text_batches(400)
    random = np.random.default_rng(1)
    weights[[200, 300]] = 50  # a loss that was not averaged
    tokens[250:253] = random.integers(32, 127, tokens[250:253].shape)  # noise
    [run] = training.train(
        training.language_model(), clipped_adamw, (tokens, weights), [(1.0,)]
    )
    assert run.scalars["loss"][-20:].mean() < 2.2  # it has learned letters and words
    found = diagnose(run)
    assert [(finding.code, finding.step) for finding in found] == [
        ("spike", 200),
        ("spike", 250),
        ("spike", 300),
    ]
    assert [finding.value > 20 for finding in found] == [True, False, True]

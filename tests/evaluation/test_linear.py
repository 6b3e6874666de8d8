import numpy as np
import pytest
import torch

from multikd.evaluation import logistic_regression
from multikd.evaluation.linear import C_CANDIDATES


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.data[order], dtype=torch.float64)
    y = torch.tensor(data.target[order])
    return x[:400], y[:400], x[400:1000], y[400:1000]


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_equals_a_scikit_learn_pipeline_to_the_last_prediction(digits, c):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_x, train_y, test_x, test_y = digits
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000, tol=1e-8))
    reference.fit(train_x.numpy(), train_y.numpy())
    fit = logistic_regression(train_x, train_y, test_x, c=c, tolerance=1e-8)
    assert fit.converged
    assert fit.c == c
    assert fit.validation == ()
    assert fit.predictions.dtype == torch.int64
    assert fit.predictions.tolist() == reference.predict(test_x.numpy()).tolist()
    assert 0.85 < float((fit.predictions == test_y).double().mean()) < 0.999


def test_minimises_the_documented_objective(digits):
    """An independent optimiser over the formula of the docstring gives the same predictions."""
    train_x, train_y, test_x, _ = digits
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    std = torch.where(std < 1e-9, 1.0, std)
    rows, tests = (train_x - mean) / std, (test_x - mean) / std
    weight = torch.zeros(10, 64, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        logits = rows @ weight.T + bias
        loss = 0.1 * torch.nn.functional.cross_entropy(logits, train_y, reduction="sum")
        loss = loss + weight.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    expected = (tests @ weight.T + bias).argmax(1)
    fit = logistic_regression(train_x, train_y, test_x, c=0.1, tolerance=1e-8)
    assert fit.predictions.tolist() == expected.tolist()


def test_scale_and_offset_of_features_do_not_matter(digits):
    train_x, train_y, test_x, _ = digits
    factors = torch.logspace(-3, 3, 64, dtype=torch.float64)
    plain = logistic_regression(train_x, train_y, test_x, c=0.1, tolerance=1e-8)
    moved = logistic_regression(
        train_x * factors + 5, train_y, test_x * factors + 5, c=0.1, tolerance=1e-8
    )
    assert plain.predictions.tolist() == moved.predictions.tolist()


def test_c_is_chosen_on_the_train_split_alone(digits):
    train_x, train_y, test_x, _ = digits
    fit = logistic_regression(train_x, train_y, test_x)
    assert [c for c, _ in fit.validation] == sorted(C_CANDIDATES)
    best = max(accuracy for _, accuracy in fit.validation)
    assert fit.c == min(c for c, accuracy in fit.validation if accuracy == best)
    assert fit.validation[0][1] < best  # the choice is a choice
    again = logistic_regression(train_x, train_y, test_x[:3])
    assert again.validation == fit.validation
    assert again.predictions.tolist() == fit.predictions[:3].tolist()
    fixed = logistic_regression(train_x, train_y, test_x, c=fit.c)
    assert fixed.predictions.tolist() == fit.predictions.tolist()


def test_stopping_early_is_reported_not_warned_of(digits):
    train_x, train_y, test_x, _ = digits
    fit = logistic_regression(train_x, train_y, test_x, c=1.0, max_iterations=3)
    assert not fit.converged
    assert fit.iterations == 3


def test_constant_features_are_left_out(digits):
    train_x, train_y, test_x, _ = digits
    plain = logistic_regression(train_x, train_y, test_x, c=0.1, tolerance=1e-8)
    train = torch.cat([train_x.float(), torch.full((len(train_x), 2), 0.1)], 1)
    test = torch.cat([test_x.float(), torch.full((len(test_x), 2), 1e4)], 1)
    fit = logistic_regression(train, train_y, test, c=0.1, tolerance=1e-6)
    assert float((fit.predictions == plain.predictions).double().mean()) > 0.995


def test_four_thousand_wide_rows_take_few_iterations():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 10
    centres = torch.randn(10, 1280, generator=generator)
    rows = 0.2 * centres[labels] + torch.randn(4000, 1280, generator=generator).relu()
    fit = logistic_regression(rows, labels, rows[:1000], c=0.01)
    assert fit.converged
    assert float((fit.predictions == labels[:1000]).double().mean()) > 0.9
    assert fit.iterations < 200  # about a second on two idle cores


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_y": torch.zeros(6, dtype=torch.long)}, "at least two classes"),
        ({"train_y": torch.zeros(5, dtype=torch.long)}, r"train_y must be \(6,\)"),
        ({"test_x": torch.zeros(2, 5)}, "of one width"),
        ({"train_x": torch.full((6, 4), float("nan"))}, "train_x must be finite"),
        ({"c": 0.0}, "C must be above 0"),
        ({"candidates": (0.0, 1.0)}, "candidates for C must be above 0"),
        ({"train_y": torch.tensor([0, 0, 0, 0, 0, 1])}, "class 1 has 1 train image"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
    ],
)
def test_bad_input_says_what_was_expected(change, words):
    arguments = {
        "train_x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
        "train_y": torch.tensor([0, 1, 0, 1, 0, 1]),
        "test_x": torch.zeros(2, 4),
    } | change
    with pytest.raises(ValueError, match=words):
        logistic_regression(**arguments)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("standardise", [True, False])
def test_weight_and_bias_give_the_probabilities(classes, standardise):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (120,), generator=generator) * 2 + 1
    rows = 3 + torch.randn(120, 6, generator=generator, dtype=torch.float64)
    rows[:, 5] = 7  # constant: weight 0
    rows[:, 0] += labels
    fit = logistic_regression(rows[:80], labels[:80], rows[80:], c=1.0, standardise=standardise)
    got = (rows[80:] @ fit.weight.T + fit.bias).softmax(dim=1)
    torch.testing.assert_close(got, fit.probabilities, atol=1e-9, rtol=0)
    assert fit.classes[got.argmax(dim=1)].tolist() == fit.predictions.tolist()

import torch

from rerail.compress.solvers.fitting import best_by_adam


def test_the_best_values_are_kept_and_the_start_is_left_alone() -> None:
    first = torch.tensor([1.0])
    seen: list[float] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        seen.append(float(x.detach()))
        return (x - 2).square().sum()

    [found] = best_by_adam([first], loss, steps=40, learning_rate=0.9, patience=99)
    assert float(first) == 1
    assert min(abs(x - 2) for x in seen) == abs(float(found) - 2)
    assert abs(seen[-1] - 2) > abs(float(found) - 2)


def test_it_stops_when_nothing_gets_better() -> None:
    steps: list[int] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return 0 * x.sum()

    best_by_adam([torch.ones(2)], loss, steps=400, learning_rate=0.1, patience=3)
    assert len(steps) == 3 * 10 + 1


def test_it_works_inside_no_grad() -> None:
    with torch.no_grad():
        [found] = best_by_adam([torch.zeros(3)], lambda x: (x - 1).square().sum(), 100, 0.1, 99)
    torch.testing.assert_close(found, torch.ones(3), atol=0.05, rtol=0)

# SPDX-License-Identifier: Apache-2.0
"""The numbers with which a method does best on the development split, found with the same budget for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastnegate.testbed.quality import Contest, Lines, Plan, Stage
from fastnegate.testbed.quality.methods import Choice, Numbers, Range, Value, method_of
from fastnegate.testbed.quality.results import Study

TRIALS = 20
PICTURES = 96  # of a trial, shared by the suites
_DIGITS = 3  # of a number that is tried: more say nothing


def tune(
    stage: Stage,
    name: str,
    lines: Lines,
    seed: int = 0,
    expect: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Study:
    """TRIALS trials by the tree-structured Parzen estimator, after one with the published numbers.

    The sampler is seeded, and verdicts are in `lines`, so a study that was stopped goes through the same
    trials again without drawing them.

    Returns:
        The best of all that were tried; no trials, if the method does not fit the stage.

    Raises:
        ModuleNotFoundError: optuna is missing.
        ValueError: another method, or one without anything to tune.
    """
    optuna = _optuna()
    method = method_of(name)
    if not method.tuned:
        raise ValueError(f"method={name!r}: has nothing to tune")
    suites = tuple(stage.world.SUITES)
    plan = Plan(suites, PICTURES // len(suites), seed, "development")
    contest = Contest(stage, plan, lines, expect, on_step)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    tried: dict[int, Numbers] = {}
    choices = method.tuned_on(stage.joint)

    def objective(trial: Any) -> float:
        tried[trial.number] = {key: _suggested(trial, key, of) for key, of in choices.items()}
        return contest.row(name, tried[trial.number]).objective

    published = contest.row(name)
    if published.refused:
        return Study(stage.host, stage.guidance, name, {}, 0.0, 0.0, 0, plan.cases)
    study.optimize(objective, n_trials=TRIALS)
    better = study.best_value > published.objective
    return Study(
        stage.host,
        stage.guidance,
        name,
        tried[study.best_trial.number] if better else {},
        max(study.best_value, published.objective),
        published.objective,
        TRIALS,
        plan.cases,
    )


def _suggested(trial: Any, name: str, of: Range | Choice) -> Value:
    if isinstance(of, Choice):
        return str(trial.suggest_categorical(name, of.words))
    if of.whole:
        return int(trial.suggest_int(name, int(of.low), int(of.high)))
    number = trial.suggest_float(name, of.low, of.high, log=of.log)
    # Rounding must not leave the range.
    return min(max(float(f"{number:.{_DIGITS}g}"), of.low), of.high)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tuning needs optuna: pip install 'fastnegate[quality]'") from error
    return optuna

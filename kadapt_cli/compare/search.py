"""Which learning rate and weight decay to try next: every method gets the same rates, decays and number of trials.

A search is a generator that yields (learning rate, weight decay) and is sent the value of that trial, so that it can be
replayed from what a study holds. A value is (validation score, -validation loss); the loss decides between equal
scores, which a handful of validation images gives often. A failed trial has the value `FAILED`.

The linear probe has no learning rate (None). The coarse search gives it as many decays instead; ELEVATER's gives it the
decays of one rate.
"""

import math
from collections.abc import Generator, Sequence

from kadapt_cli.study import import_optuna

Settings = tuple[float | None, float]
Value = tuple[float, float]
Search = Generator[Settings, Value, None]

FAILED: Value = (-math.inf, -math.inf)
LOSS_WEIGHT = 1e-6  # beside a score, for a search that takes one number: it decides between equal scores alone
COARSE_RATES = (2e-4, 1e-3, 4e-3, 2e-2, 1e-1)
COARSE_DECAYS = (1e-4, 0.3)
PROBE_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# ELEVATER's ranges (Li et al. 2022): rates and the exponents' grid of decays.
FAITHFUL_RATES = tuple(10.0**e for e in range(-6, 0))
FAITHFUL_DECAYS = tuple(10 ** (-6 + 12 * i / 96) for i in range(97))
BUDGETS = {"none": 0, "coarse": 6, "faithful": 90}


def coarse(has_rate: bool) -> Search:
    """Five rates at a small decay, then a large decay at the best of them; six decays where there is no rate."""
    if not has_rate:
        for decay in PROBE_DECAYS:
            yield None, decay
        return
    values = {}
    for rate in COARSE_RATES:
        values[rate] = yield rate, COARSE_DECAYS[0]
    yield max(values, key=lambda rate: values[rate]), COARSE_DECAYS[1]


def faithful(has_rate: bool) -> Search:
    """ELEVATER's: for each of six rates seven decays over twelve decades, then finer and finer around the best."""
    for rate in FAITHFUL_RATES if has_rate else (None,):
        values = {}
        for index in range(0, 97, 16):
            values[index] = yield rate, FAITHFUL_DECAYS[index]
        for step in (8, 4, 2, 1):
            peak = max(values, key=lambda index: values[index])
            for index in (peak - step, peak + step):
                if 0 <= index <= 96 and index not in values:
                    values[index] = yield rate, FAITHFUL_DECAYS[index]


def none() -> Search:
    """No trials: the method's defaults."""
    yield from ()


def tpe(has_rate: bool, trials: int, seed: int) -> Search:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011): rates 1e-5 to 1e-1, decays 1e-6 to 1.

    Where there is no rate, decays go to 100.
    """
    optuna = import_optuna()
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(trials):
        trial = study.ask()
        rate = trial.suggest_float("lr", 1e-5, 1e-1, log=True) if has_rate else None
        value = yield rate, trial.suggest_float("weight_decay", 1e-6, 1.0 if has_rate else 100.0, log=True)
        if value == FAILED:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value[0] + LOSS_WEIGHT * value[1])


def following(search: Search, values: Sequence[Value]) -> Settings | None:
    """What to try after trials with these values, in order; None when the search is over."""
    try:
        settings = next(search)
        for value in values:
            settings = search.send(value)
    except StopIteration:
        return None
    return settings

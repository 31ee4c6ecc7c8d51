"""Optuna's own plots of a run's study, and ours of its slots, as pieces of HTML."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.importance import FanovaImportanceEvaluator
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.visualization import plot_parallel_coordinate, plot_param_importances, plot_pareto_front
from plotly.colors import sample_colorscale

from cluster import files, paths
from sweeps import pages
from sweeps.definition import is_minimised
from sweeps.search import study as studies
from sweeps.search.study import TrialRecord

_LAYOUT = {"template": "plotly_white", "height": 420, "margin": {"l": 60, "r": 20, "t": 50, "b": 50}}

_COLOURS = {"COMPLETE": "#2a7f4f", "PRUNED": "#c9a227", "FAILED": "#b03a2e", "RUNNING": "#7f8c8d"}


def draw(run_id: str) -> list[str]:
    """Learning curves of all trials, who held which slot; of completed ones, how they compare and what matters."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(paths.study_file(run_id))))
    study = optuna.load_study(study_name=run_id, storage=storage)
    figures = [_learning_curves(studies.records(study))]
    if paths.engines_file(run_id).exists():
        figures.append(_slots(files.read_json(paths.engines_file(run_id)), studies.records(study)))
    figures += _of_completed(study)
    return [pages.chart(figure.update_layout(**_LAYOUT)) for figure in figures]


def _of_completed(study: optuna.Study) -> Iterator[go.Figure]:
    """Optuna's own plots, once for each objective."""
    names = studies.objectives(study)
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if 1 < len(names) < 4 and complete:
        yield plot_pareto_front(study, target_names=names).update_layout(title="Pareto front")
    for index, name in enumerate(names if len(complete) > 1 else []):
        words, target = name.replace("_", " "), partial(_value, index=index)
        title = f"Parameters and {words}"
        figure = plot_parallel_coordinate(study, target=target, target_name=words).update_layout(title=title)
        yield figure if is_minimised(name) else _dark_is_high(figure)
        if len({trial.values[index] for trial in complete}) > 1:  # nothing can be told apart otherwise
            importance = FanovaImportanceEvaluator(seed=0)
            figure = plot_param_importances(study, evaluator=importance, target=target, target_name=words)
            yield figure.update_layout(title=f"Importance of parameters for {words} (fANOVA)")


def _dark_is_high(figure: go.Figure) -> go.Figure:
    """Where a target is named, Optuna draws low values dark, as if less were always better."""
    *lines, scale = figure.data
    low, high = scale.marker.cmin, scale.marker.cmax
    for line in lines:  # the first axis is the target's, from low at 0 to high at 1
        line.line.color = sample_colorscale("Blues", [0.2 + 0.8 * line.y[0]])[0] if high > low else line.line.color
    scale.marker.reversescale = False
    return figure


def _value(trial: optuna.trial.FrozenTrial, index: int) -> float:
    return trial.values[index]


def _learning_curves(trials: list[TrialRecord]) -> go.Figure:
    """Eval loss over steps; a pruned trial's line is dotted, and a cross stands where it was stopped."""
    figure = go.Figure()
    for trial in trials:
        pruned = trial.state == "PRUNED"
        figure.add_scatter(
            x=[step for step, _ in trial.curve],
            y=[loss for _, loss in trial.curve],
            mode="lines+markers",
            name=f"{trial.trial_id}{' (pruned)' if pruned else ''}",
            line={"dash": "dot" if pruned else "solid"},
            marker={"symbol": ["circle"] * (len(trial.curve) - 1) + ["x" if pruned else "circle"], "size": 8},
            opacity=0.5 if pruned else 1.0,
        )
    return figure.update_layout(
        title="Eval loss of every trial",
        xaxis_title="step",
        yaxis_title="eval loss",
        yaxis_type="log",
        showlegend=True,
    )


def _slots(engines: list[dict[str, Any]], trials: list[TrialRecord]) -> go.Figure:
    """A row a slot, a bar a trial's stay in it, coloured by how the trial ended; gaps are idle.

    Args:
        engines: as ``engines.json`` has them, one entry an engine, and another each time that it started.
    """
    states, figure = {trial.trial_id: trial.state for trial in trials}, go.Figure()
    stays = [(number, stay) for number, engine in enumerate(engines) for stay in engine["stays"] if stay["left_s"]]
    for state, colour in _COLOURS.items():
        own = [(number, stay) for number, stay in stays if states.get(stay["trial_id"]) == state]
        if own:
            figure.add_bar(
                orientation="h",
                name=state,
                marker={"color": colour, "line": {"color": "white", "width": 1}},
                y=[f"engine {number} slot {stay['slot']}" for number, stay in own],
                base=[stay["admitted_s"] for _, stay in own],
                x=[stay["left_s"] - stay["admitted_s"] for _, stay in own],
                text=[stay["trial_id"] for _, stay in own],
                textposition="inside",
                hovertext=[f"{stay['trial_id']}: {stay['steps']} steps, {stay['ending']}" for _, stay in own],
            )
    return figure.update_layout(
        title="Slots over time",
        barmode="overlay",
        xaxis_title="seconds since the engine had its base",
        yaxis={"categoryorder": "category descending"},
    )

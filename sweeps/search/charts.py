"""Optuna's own plots of a run's study, and ours of its slots, as pieces of HTML."""

from __future__ import annotations

from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.importance import FanovaImportanceEvaluator
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.visualization import plot_intermediate_values, plot_parallel_coordinate, plot_param_importances

from cluster import files, paths
from sweeps import pages
from sweeps.search import study as studies
from sweeps.search.study import TrialRecord

_LAYOUT = {"template": "plotly_white", "height": 420, "margin": {"l": 60, "r": 20, "t": 50, "b": 50}}

_COLOURS = {"COMPLETE": "#2a7f4f", "PRUNED": "#c9a227", "FAILED": "#b03a2e", "RUNNING": "#7f8c8d"}


def draw(run_id: str) -> list[str]:
    """Learning curves of all trials, who held which slot; of completed ones, parameters, and which of them matter."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(paths.study_file(run_id))))
    study = optuna.load_study(study_name=run_id, storage=storage)
    figures = [_learning_curves(study)]
    if paths.engines_file(run_id).exists():
        figures.append(_slots(files.read_json(paths.engines_file(run_id)), studies.records(study)))
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(complete) > 1:
        figures.append(plot_parallel_coordinate(study).update_layout(title="Parameters and eval loss"))
    if len({trial.value for trial in complete}) > 1:  # nothing can be told apart otherwise
        importances = plot_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        figures.append(importances.update_layout(title="Importance of parameters for eval loss (fANOVA)"))
    return [pages.chart(figure.update_layout(**_LAYOUT)) for figure in figures]


def _learning_curves(study: optuna.Study) -> go.Figure:
    """Optuna's curves; a pruned trial's line is dotted."""
    figure = plot_intermediate_values(study)
    pruned = {f"Trial{trial.number}" for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED}
    for line in figure.data:
        if line.name in pruned:
            line.update(line={"dash": "dot"}, opacity=0.5, name=f"{line.name} (pruned)")
    return figure.update_layout(
        title="Eval loss of every trial", xaxis_title="step", yaxis_title="eval loss", yaxis_type="log"
    )


def _slots(engines: list[dict[str, Any]], trials: list[TrialRecord]) -> go.Figure:
    """A row a slot, a bar a trial's stay in it, coloured by how the trial ended; gaps are idle.

    Args:
        engines: as ``engines.json`` has them, one entry an engine and session.
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

"""Optuna's own plots of a run's study, as pieces of HTML."""

from __future__ import annotations

import optuna
import plotly.graph_objects as go
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.visualization import plot_intermediate_values, plot_parallel_coordinate

from cluster import paths

_LAYOUT = {"template": "plotly_white", "height": 420, "margin": {"l": 60, "r": 20, "t": 50, "b": 50}}


def draw(run_id: str) -> list[str]:
    """Learning curves of all trials, and parallel coordinates of the completed ones; the first brings plotly's code."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(paths.study_file(run_id))))
    study = optuna.load_study(study_name=run_id, storage=storage)
    figures = [_learning_curves(study)]
    if sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials) > 1:
        figures.append(plot_parallel_coordinate(study).update_layout(title="Parameters and eval loss"))
    return [
        figure.update_layout(**_LAYOUT).to_html(
            full_html=False, include_plotlyjs=index == 0, config={"responsive": True}
        )
        for index, figure in enumerate(figures)
    ]


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

"""The search: Optuna's study, Ray Tune's trials, ASHA. The only modules that import optuna or ray.tune."""

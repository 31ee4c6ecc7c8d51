"""A sweep as a user writes it today without Winnow: a Ray Tune function around TRL's SFTTrainer, peft and bitsandbytes.

    python scripts/plain_sweep.py DEF

The other side of ``bench_sweep.py``. It takes base, data, space and settings from a sweep definition, and then uses Ray
Tune, Optuna, TRL and peft alone, as their own pages show them. One CPU a trial.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> int:
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    wanted, splits, base = _inputs(Path(sys.argv[1]))
    search, scheduler, batch = wanted["search"], wanted["scheduler"], wanted["training"]["per_device_train_batch_size"]
    an_epoch = -(-len(splits["train"]) // batch)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    ray.init("local", include_dashboard=False, log_to_driver=False)
    trial = tune.with_parameters(train, splits=splits, training=wanted["training"], base=base)
    with tempfile.TemporaryDirectory() as storage:
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={name: _domain(values) for name, values in sorted(search["space"].items())},
            tune_config=tune.TuneConfig(
                metric="eval_loss",
                mode="min",
                search_alg=OptunaSearch(sampler=optuna.samplers.RandomSampler(seed=search["seed"])),
                scheduler=ASHAScheduler(
                    time_attr="step",
                    grace_period=scheduler["grace_period"] * an_epoch,
                    max_t=search["space"]["num_train_epochs"]["high"] * an_epoch,
                    reduction_factor=scheduler["reduction_factor"],
                ),
                num_samples=search["num_samples"],
            ),
            run_config=tune.RunConfig(storage_path=storage, verbose=0),
        ).fit()
        best = results.get_best_result()
        print(f"winner: {best.config} eval loss {best.metrics['eval_loss']:.4f}", file=sys.stderr, flush=True)
        found = {
            "winner": best.config,
            "eval_loss": best.metrics["eval_loss"],
            "params": [result.config for result in results],
            "base_loads": len(results),
            "steps": sum(result.metrics["step"] for result in results),
        }
    print(json.dumps(found))
    return 0


def train(config: dict[str, Any], splits: dict[str, list[Any]], training: dict[str, Any], base: str) -> None:
    """One trial as a Tune function: load, train, evaluate and report."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Report(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):  # type: ignore[no-untyped-def]
            with tempfile.TemporaryDirectory() as checkpoint:
                model.save_pretrained(checkpoint)
                facts = {"eval_loss": metrics["eval_loss"], "step": state.global_step}
                tune.report(facts, checkpoint=tune.Checkpoint.from_directory(checkpoint))

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    batch = training["per_device_train_batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            learning_rate=config["learning_rate"],
            num_train_epochs=config["num_train_epochs"],
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=training["per_device_eval_batch_size"],
            lr_scheduler_type=training["lr_scheduler_type"],
            warmup_steps=training["warmup_ratio"],
            gradient_checkpointing=False,
            assistant_only_loss=True,
            eval_strategy="steps",
            eval_steps=-(-len(splits["train"]) // (batch * training["evals_per_epoch"])),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        lora = LoraConfig(
            r=config["r"],
            lora_alpha=config["r"] * config["lora_alpha_ratio"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list(splits["train"]),
            eval_dataset=Dataset.from_list(splits["eval"]),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=lora,
            callbacks=[Report()],
        )
        trainer.train()
        trainer.evaluate()  # the whole trial's loss, where its last step was not a multiple of eval_steps


def _inputs(file: Path) -> tuple[dict[str, Any], dict[str, list[Any]], str]:
    """The definition as plain data, both splits as chats, and the base's directory."""
    from cluster import paths
    from sweeps import loading
    from trainables import base
    from trainables.data import prepare

    definition = loading.load(file)
    data = prepare.prepare(definition.data, base.load_tokenizer(definition.base_model))
    splits = {split: [{"messages": row["messages"]} for row in data.rows(split)] for split in ("train", "eval")}
    directory = str(paths.expand(definition.base_model.model_name_or_path))
    return definition.model_dump(mode="json", exclude_none=True), splits, directory


def _domain(values: dict[str, Any]) -> Any:
    from ray import tune

    if "choices" in values:
        return tune.choice(list(values["choices"]))
    low, high = values["low"], values["high"]
    if isinstance(low, int):
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if values.get("log") else tune.uniform(low, high)


if __name__ == "__main__":
    sys.exit(main())

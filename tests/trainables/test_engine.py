"""The shared-base engine: a trial is the same bits whoever shares its base, and what stock PEFT would make of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import another_base, prepared
from transformers import Gemma2Config, Gemma2ForCausalLM

from trainables import probe, solo
from trainables.contract import CannotPack, Peer, Report, TrialConfig
from trainables.data.snapshot import Snapshot
from trainables.engine import Engine, Evaluated, Failed
from trainables.spec import BaseModelSpec, TrainingSpec

Curve = list[tuple[int, float]]


@pytest.fixture
def spec(tiny: BaseModelSpec) -> BaseModelSpec:
    return tiny


@pytest.fixture(scope="module")
def data(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return prepared(world, tmp_path_factory.mktemp("general"), "general-train.jsonl")


@pytest.fixture
def trial(spec: BaseModelSpec, data: Snapshot) -> Callable[..., TrialConfig]:
    def make(name: str = "watched", **training: Any) -> TrialConfig:
        values = {"r": 8, "learning_rate": 5e-3, "num_train_epochs": 1, "per_device_train_batch_size": 8}
        return TrialConfig(name, spec, TrainingSpec(**values | training), str(data.directory), 8)

    return make


def drive(engine: Engine, between: Callable[[int], None] = lambda _: None) -> tuple[Curve, dict[str, Any]]:
    """Runs an engine dry; the watched trial's evaluations, and what became of its weights and of all others."""
    curve: Curve = []
    seen: dict[str, Any] = {"failed": {}}
    turn = 0
    while engine.slots:
        watched = next((slot for slot in engine.slots if slot.trial_id == "watched"), None)
        for event in engine.advance():
            if isinstance(event, Failed):
                seen["failed"][event.slot.trial_id] = event.reason
            elif event.slot is watched:
                curve.append((event.report.step, event.report.eval_loss))
        if watched is not None:
            seen["weights"], seen["moments"] = watched.vector.clone(), watched.optimizer.state[watched.vector]
        turn += 1
        between(turn)
    return curve, seen


@pytest.fixture
def alone(spec: BaseModelSpec, data: Snapshot, trial) -> Callable[..., tuple[Curve, dict[str, Any]]]:
    def run(**training: Any) -> tuple[Curve, dict[str, Any]]:
        engine = Engine(spec, data, capacity=1)
        engine.admit(trial(**training))
        return drive(engine)

    return run


def test_neighbours_that_join_leave_fail_and_are_pruned_change_no_bit(spec, data, trial, alone) -> None:
    expected, before = alone(lora_dropout=0.1)
    engine = Engine(spec, data, capacity=4)
    engine.admit(trial("pruned", r=16, learning_rate=1e-3, num_train_epochs=5))
    engine.admit(trial(lora_dropout=0.1))
    engine.admit(trial("broken", learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0))

    def between(turn: int) -> None:
        if turn == 3:
            engine.evict("pruned")
        if turn == 5:
            engine.admit(trial("late", r=32, per_device_train_batch_size=4, weight_decay=0.1, seed=3))
        if turn == 9:
            engine.evict("late")

    curve, after = drive(engine, between)
    assert after["failed"] == {"broken": "nan"}
    assert curve == expected
    assert torch.equal(after["weights"], before["weights"])
    assert all(torch.equal(after["moments"][name], before["moments"][name]) for name in ("exp_avg", "exp_avg_sq"))


def test_a_gradient_that_is_no_number_changes_nothing(spec, data, trial) -> None:
    slot = Engine(spec, data, capacity=1).admit(trial())
    before = slot.vector.clone()
    slot.vector.grad[0] = math.inf
    assert not slot.update(1.0, tokens=1, norm=float(slot.clip()))
    assert torch.equal(slot.vector, before)
    assert slot.progress.step == 0


def test_a_reused_slot_starts_clean(spec, data, trial, alone) -> None:
    expected, before = alone()
    engine = Engine(spec, data, capacity=1)
    engine.admit(trial("first", r=8, learning_rate=1e-2))
    for _ in range(6):
        engine.advance()
    engine.evict("first")
    engine.admit(trial())
    curve, after = drive(engine)
    assert curve == expected
    assert torch.equal(after["weights"], before["weights"])


def test_a_restored_trial_goes_on_to_the_same_bits(spec, data, trial, alone, tmp_path: Path) -> None:
    options = {"lora_dropout": 0.1, "num_train_epochs": 2}
    expected, before = alone(**options)
    engine = Engine(spec, data, capacity=1)
    engine.admit(trial(**options))
    while not (events := engine.advance()):
        pass
    assert isinstance(events[0], Evaluated)
    events[0].slot.save(tmp_path / "checkpoint", events[0].report)
    engine.advance()  # what comes after the checkpoint is lost with the engine
    again = Engine(spec, data, capacity=2)
    again.admit(trial("neighbour", seed=9))
    again.advance()
    again.admit(trial(**options), tmp_path / "checkpoint")
    assert again.counters.idle_slot_steps == 0, "a trial that comes from elsewhere was not waited for"
    curve, after = drive(again)
    assert curve == expected[1:]
    assert torch.equal(after["weights"], before["weights"])
    third = Engine(spec, data, capacity=1)
    assert torch.equal(third.admit(trial(**options), tmp_path / "checkpoint").best, events[0].slot.best)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 0.3, "lr_scheduler_type": "linear"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_ratio": 0.2},
        {"gradient_checkpointing": True},
        {"target_modules": "attention-qv"},
        {"optim": "paged_adamw_8bit", "r": 32},
        {"quantization": "none"},
    ],
    ids=["plain", "schedule", "accumulation", "checkpointing", "modules", "8bit", "unquantised"],
)
def test_packed_learns_what_trl_and_peft_would(options: dict, spec, data, trial, tmp_path: Path) -> None:
    epochs = 1 if set(options) & {"gradient_checkpointing", "target_modules"} else 2
    training, kind = dict(options), {name: options[name] for name in options if name in BaseModelSpec.model_fields}
    for name in kind:
        del training[name]
    spec = spec.model_copy(update=kind)
    config = replace(trial(num_train_epochs=epochs, **training), base_model=spec)
    reports: list[Report] = []
    solo.run_trial(config, tmp_path, None, lambda report, _: reports.append(report))
    modules = config.training.target_modules
    engine = Engine(spec, data, modules, capacity=2, gradient_checkpointing="gradient_checkpointing" in options)
    neighbour = trial("neighbour", r=16, seed=4, num_train_epochs=2, target_modules=modules)
    engine.admit(replace(neighbour, base_model=spec))
    engine.admit(config)
    curve, _ = drive(engine)
    assert len(curve) == len(reports) == 2 * epochs
    for (step, loss), report in zip(curve, reports, strict=True):
        assert step == report.step
        assert loss == pytest.approx(report.eval_loss, rel=0.01)


@pytest.mark.parametrize("steps", [2, 20])
def test_a_trial_handed_over_between_two_reports_goes_on_to_the_same_bits(
    steps: int, spec, data, trial, alone, tmp_path: Path
) -> None:
    expected, before = alone(lora_dropout=0.1)
    first = Engine(spec, data, capacity=2)
    first.admit(trial("other", r=16))
    slot = first.admit(trial(lora_dropout=0.1))
    reported = [
        (event.report.step, event.report.eval_loss)
        for _ in range(steps)
        for event in first.advance()
        if isinstance(event, Evaluated) and event.slot is slot
    ]
    first.hand_over(slot, tmp_path / "state")
    assert [stay.ending for stay in first.stays] == ["running", "moved"]
    assert first.counters.steps_past_stop == 0, "nothing that it learned is lost"
    second = Engine(spec, data, capacity=1)
    second.admit(trial(lora_dropout=0.1), tmp_path / "state")
    curve, after = drive(second)
    assert len(reported) == (steps > 2)
    assert reported + curve == expected
    assert torch.equal(after["weights"], before["weights"])


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["GPU", "CPU"])
def test_out_of_memory_splits_the_pack_for_good_and_changes_no_trial(
    error, spec, data, trial, alone, monkeypatch
) -> None:
    expected, before = alone()
    engine = Engine(spec, data, capacity=4)
    for name in ("a", "b", "c"):
        engine.admit(trial(name, r=16))
    engine.admit(trial())
    fits, real = 2, engine._losses

    def small_device(packed: Any) -> Any:
        if len(packed.next_ids) > fits:
            raise error
        return real(packed)

    monkeypatch.setattr(engine, "_losses", small_device)
    curve, after = drive(engine)
    assert curve == expected
    assert torch.equal(after["weights"], before["weights"])
    assert (engine.together, engine.counters.splits, after["failed"]) == (2, 1, {})


def test_a_trial_that_does_not_fit_alone_fails_as_oom_and_alone(spec, data, trial, alone, monkeypatch) -> None:
    expected, _ = alone()
    engine = Engine(spec, data, capacity=2)
    engine.admit(trial("huge", r=64))
    engine.admit(trial())
    real = engine._losses

    def small_device(packed: Any) -> Any:
        if any(adapter.r == 64 for adapter in packed.adapters):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(packed)

    monkeypatch.setattr(engine, "_losses", small_device)
    curve, after = drive(engine)
    assert curve == expected
    assert after["failed"] == {"huge": "oom"}


def test_an_error_that_neighbours_do_not_have_is_its_trials_alone(spec, data, trial, alone, monkeypatch) -> None:
    expected, before = alone()
    engine = Engine(spec, data, capacity=3)
    for name, r in (("broken", 64), ("neighbour", 16)):
        engine.admit(trial(name, r=r))
    engine.admit(trial())
    real = engine._losses

    def odd(packed: Any) -> Any:
        if any(adapter.r == 64 for adapter in packed.adapters):
            raise IndexError("out of range")
        return real(packed)

    monkeypatch.setattr(engine, "_losses", odd)
    curve, after = drive(engine)
    assert curve == expected
    assert torch.equal(after["weights"], before["weights"])
    assert after["failed"] == {"broken": "error"}
    assert engine.counters.splits == 0


def test_an_error_that_all_trials_have_is_the_engines(spec, data, trial, monkeypatch) -> None:
    engine = Engine(spec, data, capacity=2)
    engine.admit(trial("a"))
    engine.admit(trial("b"))
    monkeypatch.setattr(engine, "_losses", lambda _: [][0])
    with pytest.raises(IndexError):
        engine.advance()
    assert len(engine.slots) == 2


@pytest.mark.parametrize(("error", "reason"), [(NO_MEMORY[0], "oom"), (NotImplementedError("here"), "error")])
def test_an_error_in_an_optimizer_fails_its_trial_and_steps_no_other_twice(
    error, reason, spec, data, trial, alone, monkeypatch
) -> None:
    expected, before = alone()
    engine = Engine(spec, data, capacity=2)
    engine.admit(trial())
    huge = engine.admit(trial("huge"))

    def no_step(*_: object) -> bool:
        raise error

    monkeypatch.setattr(huge, "update", no_step)
    curve, after = drive(engine)
    assert curve == expected
    assert torch.equal(after["weights"], before["weights"])
    assert after["failed"] == {"huge": reason}


def test_a_probe_of_the_cost_alone_leaves_no_trace(spec, data, trial, alone) -> None:
    expected, _ = alone()
    engine = Engine(spec, data, capacity=1)
    tokens, seconds = probe.alone(engine, trial().training)
    assert tokens > 0
    assert seconds > 0
    assert probe.memory(engine, trial().training).needed(1) > 0
    assert (engine.counters.adapter_steps, engine.counters.tokens, engine.dequantisations) == (0, 0, 0)
    engine.admit(trial())
    assert drive(engine)[0] == expected


def test_passes_with_one_trial_tell_what_it_costs_alone(spec, data, trial) -> None:
    engine = Engine(spec, data, capacity=2)
    engine.admit(trial("first"))
    engine.advance()
    alone = (engine.counters.alone_tokens, engine.counters.alone_s)
    assert alone == (engine.counters.tokens, engine.counters.training_s)
    engine.admit(trial("second"))
    engine.advance()
    assert (engine.counters.alone_tokens, engine.counters.alone_s) == alone
    assert engine.counters.tokens > 2 * alone[0]


def test_one_dequantisation_serves_all_trials(spec, data, trial) -> None:
    counts = []
    for trials in (1, 4):
        engine = Engine(spec, data, capacity=4)
        for number in range(trials):
            engine.admit(trial(str(number), seed=number))
        engine.advance()
        counts.append(engine.dequantisations)
        assert engine.counters.adapter_steps == trials
    first = 3  # q, k and v of the first layer: nothing learns below them, so they pass no gradient on
    assert counts[0] == counts[1] == 2 * len(engine.layers) - first


def test_a_base_kept_dequantised_changes_no_bit(spec, data, trial, alone) -> None:
    expected, before = alone()
    engine = Engine(spec, data, capacity=2)
    engine.keep_dequantised(True)
    engine.admit(trial("neighbour", seed=9))
    engine.admit(trial())
    curve, after = drive(engine)
    assert curve == expected
    assert torch.equal(after["weights"], before["weights"])
    assert engine.dequantisations == len(engine.layers)


def test_out_of_memory_first_gives_up_what_is_kept_for_speed(spec, data, trial, alone, monkeypatch) -> None:
    expected, _ = alone()
    engine = Engine(spec, data, capacity=2)
    engine.keep_dequantised(True)
    engine.admit(trial("neighbour", seed=9))
    engine.admit(trial())
    engine.advance()
    real = engine._losses

    def small_device(packed: Any) -> Any:
        if engine.keeps_dequantised:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(packed)

    monkeypatch.setattr(engine, "_losses", small_device)
    curve, after = drive(engine)
    assert curve == expected
    assert (engine.together, engine.counters.splits, after["failed"]) == (2, 0, {})


def test_each_of_a_passs_evaluations_names_the_others(spec, data, trial) -> None:
    engine = Engine(spec, data, capacity=3)
    for name, rate in (("idle", 1e-7), ("good", 5e-3), ("slow", 5e-4)):
        engine.admit(trial(name, learning_rate=rate))
    while not (events := engine.advance()):
        pass
    peers = [Peer(event.slot.trial_id, event.report.step, event.report.eval_loss) for event in events]
    assert [peer.trial_id for peer in peers] == ["idle", "good", "slow"]
    idle, good, slow = peers
    assert [event.report.peers for event in events] == [(good, slow), (idle, slow), (idle, good)]


def test_a_slot_is_idle_while_a_trial_is_still_to_come_to_it(spec, data, trial) -> None:
    engine = Engine(spec, data, capacity=2)
    engine.admit(trial("first"))
    for _ in range(3):
        engine.advance()
    engine.admit(trial("second"))
    assert engine.counters.idle_slot_steps == 3
    engine.evict("first")
    engine.advance()
    assert engine.counters.idle_slot_steps == 3, "nothing came: the sweep may be over"
    engine.admit(trial("third"))
    assert engine.counters.idle_slot_steps == 4
    assert (engine.counters.slot_steps, engine.counters.adapter_steps) == (8, 4)


GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_multiplier": 32**-0.5}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


@pytest.mark.parametrize("config", [GRANITE, MISTRAL | {"sliding_window": 4096}], ids=["Granite", "Mistral"])
def test_a_base_of_another_architecture_learns(config, spec, data, tmp_path: Path) -> None:
    engine = Engine(another_base(spec, tmp_path / "base", **config), data, capacity=1)
    training = TrainingSpec(learning_rate=5e-3, per_device_train_batch_size=8)
    engine.admit(TrialConfig("watched", engine.spec, training, "", 8))
    curve, _ = drive(engine)
    assert curve[-1][1] < curve[0][1]


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        (GRANITE | {"logits_scaling": 8.0}, r"\(model_type granite\) adds something to its attention or its head"),
        (MISTRAL | {"sliding_window": 4}, r"attention sees 4 tokens back, and an example has \d+"),
        ({"attention_dropout": 0.1}, "attention has dropout"),
    ],
    ids=["head", "window", "dropout"],
)
def test_a_base_that_packed_trials_would_compute_otherwise_is_refused(
    config, obstacle, spec, data, trial, tmp_path: Path
) -> None:
    other = another_base(spec, tmp_path / "base", **config)
    with pytest.raises(CannotPack, match=obstacle):
        probe.memory(Engine(other, data, capacity=1), trial().training)


def test_attention_with_a_cap_is_refused(data, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=2048, num_key_value_heads=1, head_dim=32, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    with pytest.raises(CannotPack, match="attention has softcap"):
        Engine(BaseModelSpec(model_name_or_path=str(tmp_path / "gemma2")), data, capacity=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_a_gpu_a_trial_is_the_same_but_for_rounding_whoever_shares_its_base(
    dropout, spec, data, trial, alone
) -> None:
    expected, _ = alone(lora_dropout=dropout)
    engine = Engine(spec, data, capacity=4)
    for seed, r in enumerate((8, 8, 24)):  # two to share its calls, and one of another rank
        engine.admit(trial(f"neighbour-{seed}", r=r, seed=seed, lora_dropout=dropout))
    engine.admit(trial(lora_dropout=dropout))
    curve, _ = drive(engine)
    assert [step for step, _ in curve] == [step for step, _ in expected]
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in expected], rel=0.02)


def test_memory_limits_the_slots(spec, data, trial) -> None:
    engine = Engine(spec, data, capacity=8)
    for fits, slots in ((20, 8), (3, 3), (0, 1)):  # a trial that does not fit is let in to fail as oom
        engine.limit(fits)
        assert (engine.capacity, engine.together) == (slots, slots)


def test_a_trial_of_another_kind_is_refused_by_name(spec, data, trial) -> None:
    engine = Engine(spec, data, capacity=1)
    with pytest.raises(ValueError, match="watched: needs another base or other target_modules"):
        engine.admit(trial(target_modules="mlp"))


def test_the_loss_is_over_the_trials_own_learned_tokens(spec, data, trial) -> None:
    engine = Engine(spec, data, capacity=2)
    short = engine.admit(trial("short", per_device_train_batch_size=2))
    long = engine.admit(trial("long", per_device_train_batch_size=16))
    engine.advance()
    assert all(math.isfinite(slot.progress.losses[0]) for slot in (short, long))
    assert short.progress.losses[0] == pytest.approx(long.progress.losses[0], rel=0.5)

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import prepared
from transformers import AutoModelForCausalLM

from trainables import base, merge, metrics, scoring, solo
from trainables.contract import TrialConfig
from trainables.data import snapshot
from trainables.generation import with_transformers
from trainables.spec import BaseModelSpec, EvaluationSpec, TrainingSpec


@pytest.fixture
def spec(tiny: BaseModelSpec) -> BaseModelSpec:
    return tiny.model_copy(update={"quantization": "none"})


@pytest.fixture(scope="module")
def data(world: Path, tmp_path_factory: pytest.TempPathFactory) -> snapshot.Snapshot:
    general = str(world / "sources" / "tickets" / "general-test.jsonl")
    return prepared(world, tmp_path_factory.mktemp("scored"), general=general)


def test_loss_weighs_every_labelled_token_the_same_whatever_the_batch(spec, data) -> None:
    model, tokenizer, rows = base.load_model(spec), base.load_tokenizer(spec), data.rows("test")
    by_hand, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        by_hand += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    for batch_size in (1, 5, 100):
        assert scoring.mean_loss(model, tokenizer, rows, batch_size) == pytest.approx(by_hand / count, rel=1e-5)


def test_answers_do_not_depend_on_the_batch(spec, data) -> None:
    model, tokenizer, rows = base.load_model(spec), base.load_tokenizer(spec), data.rows("test")
    one, many = (
        scoring.answer(with_transformers(model, tokenizer, EvaluationSpec(batch_size=size, max_new_tokens=6)),
                       tokenizer, rows)
        for size in (1, 7)
    )  # fmt: skip
    assert one == many
    assert [answer.expected for answer in one] == [row["messages"][-1]["content"] for row in rows]


def test_scores_name_every_metric_and_perplexity_follows_from_loss(spec, data) -> None:
    contestants = scoring.score_base(
        spec, str(data.directory), EvaluationSpec(max_new_tokens=4, generation="transformers")
    )
    assert list(contestants) == ["base", "few_shot"]
    scores, few_shot = contestants["base"], contestants["few_shot"]
    assert scores.sets["domain"].kind == "extraction"
    assert {"loss", "perplexity", "exact_match", "json_validity", "field_accuracy", "field_accuracy.urgency",
            "general_exact_match", "answer_tokens", "latency_s"} <= set(scores.metrics)  # fmt: skip
    assert scores.metrics["perplexity"] == pytest.approx(math.exp(scores.metrics["loss"]), rel=1e-4)
    assert 0 < scores.metrics["answer_tokens"] <= 4
    assert len(scores.sets["general"].answers) == data.count("general")
    assert few_shot.shots == 3
    assert [one.answer for one in few_shot.answers] != [one.answer for one in scores.answers]
    assert [one.prompt for one in few_shot.answers] == [one.prompt for one in scores.answers]
    assert metrics.Scores.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


def test_who_judges_an_answer_sees_the_whole_conversation() -> None:
    one = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert scoring._asked(one) == ("u", "a")
    longer = [{"role": "system", "content": "s"}, *one, {"role": "user", "content": "v"}]
    assert scoring._asked(longer) == ("system: s\n\nuser: u\n\nassistant: a\n\nuser: v", "")


def test_shots_stand_before_the_prompt_and_after_the_system(spec, data) -> None:
    model, tokenizer = base.load_model(spec), base.load_tokenizer(spec)
    shots = scoring.few_shot(model, tokenizer, data, EvaluationSpec(few_shot=2, max_new_tokens=8))
    trained = [row["messages"] for row in data.rows("train")]
    assert [shot in trained for shot in shots] == [True, True]
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert scoring._with_shots(asked, shots) == [asked[0], *shots[0], *shots[1], asked[1]]
    model.config.max_position_embeddings = 160
    fewer = scoring.few_shot(model, tokenizer, data, EvaluationSpec(few_shot=2, max_new_tokens=8))
    assert fewer == shots[:1], "as many as its positions hold"


def test_a_merged_model_answers_as_its_adapter_and_a_wrong_one_is_seen(spec, data, tmp_path: Path) -> None:
    training = TrainingSpec(r=4, learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=16)
    kept = tmp_path / "kept"
    config = TrialConfig("t0000", spec, training, str(data.directory), 16)
    (tmp_path / "work").mkdir()
    solo.run_trial(config, tmp_path / "work", None, lambda _, made: _replace(made / "adapter", kept))
    evaluation = EvaluationSpec(max_new_tokens=6)
    parity = merge.merge_and_check(spec, str(kept), str(tmp_path / "merged"), str(data.directory), evaluation)
    assert parity.loss_difference < 0.02
    assert parity.agreement > 0.9
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert list((tmp_path / "merged").glob("*.safetensors"))
    base_alone = base.source(spec)
    wrong = merge.check_parity(spec, str(kept), base_alone, str(data.directory), evaluation)
    assert wrong.loss_difference > 0.1


def _replace(source: Path, target: Path) -> None:
    import shutil

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    broken = BaseModelSpec(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        base.load_model(broken)
    with pytest.raises(ValueError, match="no tokenizer"):
        base.load_tokenizer(broken)
